from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import positive_integer, title
from keras_lipnext.layers.images import channels_of
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Config, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class GroupSort(keras.layers.Layer):
    """GroupSort: sorts groups of `group_size` channels, the largest entry first.

    With m = channels / group_size groups, group i is the channels i, i + m, i + 2 m, ...: the
    first m channels of the output hold the largest entry of each group, the last m the smallest.
    `group_size=2` is `MaxMin`. It permutes entries, so it is 1-Lipschitz and preserves norms.

    Example:

    ```python
    layer = keras_lipnext.layers.GroupSort(3)
    layer(np.array([[1.0, 2.0, 3.0, -1.0, 2.0, 5.0]]))  # [[3, 5, 2, 2, 1, -1]]
    ```

    Args:
        group_size: Positive integer that divides the number of channels. None sorts all of them
            (full sort).
        axis: The axis of the channels.

    Input shape:
        Tensor of any rank >= 2.

    Output shape:
        The input's.

    Raises:
        ValueError: if `group_size` is no positive integer, or does not divide the number of
            channels.

    Reference:
        Sorting out Lipschitz function approximation (Anil et al., ICML 2019), arXiv 1811.05381.
    """

    def __init__(self, group_size: int | None, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if group_size is not None:
            group_size = positive_integer("group_size", group_size)
        self.group_size = group_size
        self.axis = axis

    def build(self, input_shape: Shape) -> None:
        channels = channels_of(self, input_shape, self.axis)
        if channels % (self.group_size or channels):
            raise ValueError(
                f"{title(self)} sorts groups of {self.group_size} channels, which must divide "
                f"their number. Received: {channels} channels, input_shape={tuple(input_shape)}"
            )
        rank = len(input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=rank, axes={self.axis % rank: channels})

    def call(self, inputs: Tensor) -> Tensor:
        last = self.input_spec.ndim - 1
        axis = self.axis % (last + 1)
        channels = self.input_spec.axes[axis]
        size = self.group_size or channels
        x = ops.moveaxis(inputs, axis, last)
        groups = ops.reshape(x, (*ops.shape(x)[:-1], size, channels // size))
        ordered = -ops.sort(-groups, axis=-2)
        return ops.moveaxis(ops.reshape(ordered, ops.shape(x)), last, axis)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {**super().get_config(), "group_size": self.group_size, "axis": self.axis}
