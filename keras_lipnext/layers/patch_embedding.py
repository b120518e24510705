from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import positive_integer, resolve_data_format, title
from keras_lipnext.layers.images import image_sizes, matmul
from keras_lipnext.layers.weights import NAMESPACE, add_stiefel_kernel, serialize_optional
from keras_lipnext.typing import Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class PatchEmbedding(keras.layers.Layer):
    """Isometric stem: non-overlapping patches, flattened and multiplied by an orthonormal matrix.

    Space-to-depth rearranges the entries; the kernel, of shape (patch_size^2 * channels, units)
    with units >= patch_size^2 * channels, has orthonormal rows. Both preserve norms exactly.

    Example:

    ```python
    stem = keras_lipnext.layers.PatchEmbedding(patch_size=4, units=64)
    stem(np.ones((1, 32, 32, 3))).shape  # (1, 8, 8, 64)
    ```

    Args:
        patch_size: Positive integer, side of a patch in pixels.
        units: Positive integer, at least patch_size^2 * channels.
        kernel_initializer: Keras initializer, whose draw is projected on the manifold. None draws
            a random orthonormal matrix.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Images of rank 4; the batch and spatial sizes may be None. The height and width must be
        multiples of `patch_size`.

    Output shape:
        (batch, height / patch_size, width / patch_size, units), or channels first.

    Raises:
        ValueError: if `units` is too small to be an isometry or the patches do not tile the image.
    """

    def __init__(
        self,
        patch_size: int,
        units: int,
        kernel_initializer: Initializer = None,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.patch_size = positive_integer("patch_size", patch_size)
        self.units = positive_integer("units", units)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.data_format = resolve_data_format(data_format)

    def entries(self, input_shape: Shape) -> int:
        """Numbers in a patch of such images; an error if they cannot be embedded."""
        height, width, channels = image_sizes(self, input_shape)
        p = self.patch_size
        if self.units < p * p * channels:
            raise ValueError(
                f"{title(self)} is an isometry only if units >= patch_size^2 "
                f"* channels = {p * p * channels}. Received: units={self.units}, patch_size={p}, "
                f"channels={channels}. Use more units or smaller patches."
            )
        for name, size in (("height", height), ("width", width)):
            if size is not None and size % p:
                raise ValueError(
                    f"{title(self)} tiles the image with patches of "
                    f"{p} x {p} pixels. Received: {name}={size}, not a multiple of {p}; pad or "
                    "crop the images, or choose another patch_size."
                )
        return p * p * channels

    def build(self, input_shape: Shape) -> None:
        self.kernel = add_stiefel_kernel(
            self, (self.entries(input_shape), self.units), self.kernel_initializer
        )

    def call(self, inputs: Tensor) -> Tensor:
        first = self.data_format == "channels_first"
        x = ops.transpose(inputs, (0, 2, 3, 1)) if first else inputs
        p = self.patch_size
        batch, height, width, channels = ops.shape(x)
        rows, columns = height // p, width // p
        # The true batch size, not -1: patches that do not tile must fail, not mix images.
        x = ops.reshape(x, (batch, rows, p, columns, p, channels))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        x = ops.reshape(x, (batch, rows, columns, p * p * channels))
        x = matmul(x, self.kernel, -1)
        return ops.transpose(x, (0, 3, 1, 2)) if first else x

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        height, width, _ = image_sizes(self, input_shape)
        tokens = tuple(n and n // self.patch_size for n in (height, width))
        if self.data_format == "channels_first":
            return (input_shape[0], self.units, *tokens)
        return (input_shape[0], *tokens, self.units)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "patch_size": self.patch_size,
            "units": self.units,
            "kernel_initializer": serialize_optional(self.kernel_initializer),
            "data_format": self.data_format,
        }
