from typing import Any

import keras

from keras_lipnext.arguments import resolve_data_format
from keras_lipnext.layers.images import channel_axis, matmul
from keras_lipnext.layers.spatial_shift import (
    check_shift,
    moving_channels,
    shift_changes,
    shifted_channels,
)
from keras_lipnext.layers.weights import NAMESPACE, add_stiefel_kernel, serialize_optional
from keras_lipnext.typing import Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class ShiftMixing(keras.layers.Layer):
    """Spatial shift in a learned orthogonal basis, `R^T S R`, at the cost of the moving rows.

    Only the rows `R_s` of the orthogonal `R` whose channels move enter the function, `4 * ratio *
    channels` of them for images, because the others stay and `R^T R = I`:

        R^T S R x = x + R_s^T (S_s - I) R_s x      exactly.

    So the layer stores `kernel = R_s^T`, of shape (channels, 4 * ratio * channels) with orthonormal
    columns, and costs 8 * ratio instead of 2 products of channels x channels; of series half of
    that, of volumes half more. It is an isometry for circular padding and 1-Lipschitz for zero
    padding.

    Example:

    ```python
    layer = keras_lipnext.layers.ShiftMixing(ratio=1 / 8)
    layer(np.ones((1, 4, 4, 16))).shape  # (1, 4, 4, 16)
    ```

    Args:
        ratio: Share of the channels that moves in each direction, of which each spatial axis has
            two: in (0, 1/2] for series, (0, 1/4] for images, (0, 1/6] for volumes.
        padding: "circular" or "zero".
        kernel_initializer: Keras initializer, whose draw is projected on the manifold. None draws
            a random orthonormal matrix.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Series (batch, length, channels), images (batch, height, width, channels) or volumes (batch,
        depth, height, width, channels), or channels first; batch and spatial sizes may be None.

    Output shape:
        The input's.

    Raises:
        ValueError: for another rank, ratio, padding, or channels the groups do not divide.

    Reference:
        The block's `R^T S R`: LipNeXt (Hu et al., ICLR 2026), arXiv 2601.18513.
    """

    def __init__(
        self,
        ratio: float = 1 / 8,
        padding: str = "circular",
        kernel_initializer: Initializer = None,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_shift(ratio, padding)
        self.ratio = ratio
        self.padding = padding
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.data_format = resolve_data_format(data_format)

    def build(self, input_shape: Shape) -> None:
        channels = shifted_channels(self, input_shape)
        self.moving = moving_channels(self, channels, len(input_shape) - 2)
        self.kernel = add_stiefel_kernel(
            self, self._kernel_shape(channels), self.kernel_initializer
        )

    def _kernel_shape(self, channels: int) -> tuple[int, int]:
        """Shape of the kernel for this many channels: of R^T, the columns that move."""
        return channels, self.moving

    def call(self, inputs: Tensor) -> Tensor:
        kernel, axis = keras.ops.convert_to_tensor(self.kernel), channel_axis(self.data_format)
        return inputs + matmul(self.changes(inputs, kernel), keras.ops.transpose(kernel), axis)

    def changes(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """`(S_s - I) R_s x` of a kernel R_s^T: in the basis of the rows that move."""
        rows = matmul(inputs, kernel, channel_axis(self.data_format))
        return shift_changes(rows, self.padding, self.data_format)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "ratio": self.ratio,
            "padding": self.padding,
            "kernel_initializer": serialize_optional(self.kernel_initializer),
            "data_format": self.data_format,
        }
