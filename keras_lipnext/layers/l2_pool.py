from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import number, resolve_data_format
from keras_lipnext.layers.images import channel_axis, channels_along, sides_of, spatial_axes
from keras_lipnext.layers.weights import NAMESPACE, accumulating_dtype
from keras_lipnext.typing import Config, DType, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class L2Pool(keras.layers.Layer):
    """Global L2 pooling: the norm of each channel over all positions.

    `output[c] = sqrt(sum_p x[p, c]^2 + epsilon)`, p running over all positions: 1-Lipschitz for
    every epsilon >= 0; a positive one keeps the gradient finite at zero. Under a mixed precision
    policy it computes and answers in float32.

    Example:

    ```python
    keras_lipnext.layers.L2Pool()(np.ones((2, 4, 4, 8)))  # shape (2, 8), all 4
    ```

    Args:
        epsilon: Non-negative float.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Series (batch, length, channels), images (batch, height, width, channels) or volumes (batch,
        depth, height, width, channels), or channels first; batch and spatial sizes may be None.

    Output shape:
        (batch, channels).

    Raises:
        ValueError: for another rank or a negative epsilon.

    Reference:
        LipNeXt (Hu et al., ICLR 2026), arXiv 2601.18513.
    """

    def __init__(
        self,
        epsilon: float = 1e-12,
        data_format: str | None = None,
        dtype: DType = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype=accumulating_dtype(dtype), **kwargs)
        if not number("epsilon", epsilon) >= 0:
            raise ValueError(f"`epsilon` must not be negative. Received: epsilon={epsilon!r}")
        self.epsilon = epsilon
        self.data_format = resolve_data_format(data_format)

    def build(self, input_shape: Shape) -> None:
        sides_of(self, input_shape)
        channels_along(self, input_shape)

    def call(self, inputs: Tensor) -> Tensor:
        axes = spatial_axes(self.data_format, len(inputs.shape))
        energy = ops.sum(ops.square(inputs), axis=axes)
        return ops.sqrt(energy + self.epsilon)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], input_shape[channel_axis(self.data_format)])

    def get_config(self) -> Config:
        return {**super().get_config(), "epsilon": self.epsilon, "data_format": self.data_format}
