from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipnext.arguments import number
from keras_lipnext.layers.images import along, channels_of
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Config, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class BetaAbs(keras.layers.Layer):
    """beta-Abs: the absolute value of the first `beta * channels` channels, the others unchanged.

    1-Lipschitz, and norm-preserving wherever no entry crosses zero. At beta = 1/2 it contains
    MinMax up to rotations.

    Example:

    ```python
    layer = keras_lipnext.layers.BetaAbs(beta=0.5)
    layer(np.array([[-1.0, -2.0, -3.0, 4.0]]))  # [[1, 2, -3, 4]]
    ```

    Args:
        beta: Share of the channels that is rectified, in [0, 1]; `beta * channels` is rounded to
            the nearest whole number.
        axis: The axis of the channels.

    Input shape:
        Tensor of any rank >= 2.

    Output shape:
        The input's.

    Raises:
        ValueError: if `beta` lies outside [0, 1].

    Reference:
        LipNeXt (Hu et al., ICLR 2026), arXiv 2601.18513.
    """

    def __init__(self, beta: float = 0.75, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= number("beta", beta) <= 1:
            raise ValueError(f"`beta` must be in [0, 1]. Received: beta={beta!r}")
        self.beta = beta
        self.axis = axis

    def build(self, input_shape: Shape) -> None:
        channels = channels_of(self, input_shape, self.axis)
        rank = len(input_shape)
        # In a traced call sizes may be tensors.
        self.rectified = round(self.beta * channels)
        self.input_spec = keras.layers.InputSpec(ndim=rank, axes={self.axis % rank: channels})

    def call(self, inputs: Tensor) -> Tensor:
        channels = self.input_spec.axes[self.axis % self.input_spec.ndim]
        mask = along(np.arange(channels) < self.rectified, self.axis, self.input_spec.ndim)
        return ops.where(mask, ops.abs(inputs), inputs)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {**super().get_config(), "beta": self.beta, "axis": self.axis}
