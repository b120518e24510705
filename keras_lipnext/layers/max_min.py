from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import title
from keras_lipnext.layers.images import channels_of
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Config, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class MaxMin(keras.layers.Layer):
    """MaxMin (GroupSort2): sorts the pairs (channel i, channel i + channels/2).

    The larger entries fill the first half of the channels, the smaller ones the second half. It
    permutes entries, so it is 1-Lipschitz and preserves norms.

    Example:

    ```python
    keras_lipnext.layers.MaxMin()(np.array([[1.0, 2.0, 3.0, -1.0]]))  # [[3, 2, 1, -1]]
    ```

    Args:
        axis: The axis of the channels, of even size.

    Input shape:
        Tensor of any rank >= 2.

    Output shape:
        The input's.

    Raises:
        ValueError: if the number of channels is odd.

    Reference:
        Sorting out Lipschitz function approximation (Anil et al., ICML 2019), arXiv 1811.05381.
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis

    def build(self, input_shape: Shape) -> None:
        channels = channels_of(self, input_shape, self.axis)
        if channels % 2:
            raise ValueError(
                f"{title(self)} sorts pairs of channels and needs an even number of "
                f"them along axis {self.axis}. Received: {channels} channels, "
                f"input_shape={tuple(input_shape)}"
            )

    def call(self, inputs: Tensor) -> Tensor:
        first, second = ops.split(inputs, 2, axis=self.axis)
        return ops.concatenate(
            [ops.maximum(first, second), ops.minimum(first, second)], axis=self.axis
        )

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {**super().get_config(), "axis": self.axis}
