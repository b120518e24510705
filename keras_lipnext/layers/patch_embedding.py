from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import positive_integer, resolve_data_format, title
from keras_lipnext.layers.images import NAMES, SPATIAL, channels_along, matmul, sides_of
from keras_lipnext.layers.weights import NAMESPACE, add_stiefel_kernel, serialize_optional
from keras_lipnext.typing import Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class PatchEmbedding(keras.layers.Layer):
    """Isometric stem: non-overlapping patches, flattened and multiplied by an orthonormal matrix.

    Space-to-depth rearranges the entries; the kernel, of shape (entries, units) with units >=
    entries, has orthonormal rows. Both preserve norms exactly. A patch of an image has patch_size^2
    * channels entries, of a series patch_size * channels, of a volume patch_size^3 * channels.

    Example:

    ```python
    stem = keras_lipnext.layers.PatchEmbedding(patch_size=4, units=64)
    stem(np.ones((1, 32, 32, 3))).shape  # (1, 8, 8, 64)
    ```

    Args:
        patch_size: Positive integer, side of a patch, in pixels or positions.
        units: Positive integer, at least the number of entries of a patch.
        kernel_initializer: Keras initializer, whose draw is projected on the manifold. None draws
            a random orthonormal matrix.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Series (batch, length, channels), images (batch, height, width, channels) or volumes (batch,
        depth, height, width, channels), or channels first; batch and spatial sizes may be None.
        Spatial sizes must be multiples of `patch_size`.

    Output shape:
        (batch, height / patch_size, width / patch_size, units) of images, or channels first, and
        likewise of series and volumes.

    Raises:
        ValueError: if `units` is too small to be an isometry or the patches do not tile the input.
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
        """Numbers in a patch of such inputs; an error if they cannot be embedded."""
        sides, channels = sides_of(self, input_shape), channels_along(self, input_shape)
        p, n = self.patch_size, len(sides)
        if self.units < p**n * channels:
            power = f"^{n}" if n > 1 else ""
            raise ValueError(
                f"{title(self)} is an isometry only if units >= patch_size{power} "
                f"* channels = {p**n * channels}. Received: units={self.units}, patch_size={p}, "
                f"channels={channels}. Use more units or smaller patches."
            )
        for name, size in zip(SPATIAL[n], sides):
            if size is not None and size % p:
                unit = "pixels" if n == 2 else "positions"
                raise ValueError(
                    f"{title(self)} tiles {NAMES[n]} with patches of "
                    f"{' x '.join([str(p)] * n)} {unit}. Received: {name}={size}, not a multiple "
                    f"of {p}; pad or crop the {NAMES[n]}, or choose another patch_size."
                )
        return p**n * channels

    def build(self, input_shape: Shape) -> None:
        self.kernel = add_stiefel_kernel(
            self, (self.entries(input_shape), self.units), self.kernel_initializer
        )

    def call(self, inputs: Tensor) -> Tensor:
        first, p, n = self.data_format == "channels_first", self.patch_size, len(inputs.shape) - 2
        x = ops.transpose(inputs, (0, *range(2, n + 2), 1)) if first else inputs
        batch, *sides, channels = ops.shape(x)
        tokens = [side // p for side in sides]
        # The true batch size, not -1: patches that do not tile must fail, not mix images.
        x = ops.reshape(x, (batch, *(m for count in tokens for m in (count, p)), channels))
        ends = [2 * axis + 1 for axis in range(n)]
        x = ops.transpose(x, (0, *ends, *(axis + 1 for axis in ends), 2 * n + 1))
        x = ops.reshape(x, (batch, *tokens, p**n * channels))
        x = matmul(x, self.kernel, -1)
        return ops.transpose(x, (0, n + 1, *range(1, n + 1))) if first else x

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        tokens = tuple(n and n // self.patch_size for n in sides_of(self, input_shape))
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
