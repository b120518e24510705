import math
from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import title
from keras_lipnext.layers.images import along, channels_of
from keras_lipnext.layers.sdp_diagonal import wide
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class Householder(keras.layers.Layer):
    """Householder activation: each pair of channels z is reflected where v^T z < 0.

    `z - 2 v min(v^T z, 0)` with v = (sin(theta / 2), -cos(theta / 2)) for the pair (channel i,
    channel i + channels/2) and one learned angle theta a pair. The two pieces, the identity and a
    reflection, meet where v^T z = 0: 1-Lipschitz, and norm-preserving everywhere. theta = pi/2,
    where it starts, is `MaxMin`.

    Example:

    ```python
    keras_lipnext.layers.Householder()(np.array([[1.0, 2.0, 3.0, -1.0]]))  # [[3, 2, 1, -1]]
    ```

    Args:
        axis: The axis of the channels, of even size.
        angle_initializer: Keras initializer of the angles, of shape (channels / 2,), in radians.
            None starts them at pi/2.

    Input shape:
        Tensor of any rank >= 2.

    Output shape:
        The input's.

    Raises:
        ValueError: if the number of channels is odd.

    Reference:
        Singla, Singla, Feizi (ICLR 2022), arXiv 2108.04062, order 1.
    """

    def __init__(
        self, axis: int = -1, angle_initializer: Initializer = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        if angle_initializer is None:
            angle_initializer = keras.initializers.Constant(math.pi / 2)
        self.angle_initializer = keras.initializers.get(angle_initializer)

    def build(self, input_shape: Shape) -> None:
        channels = channels_of(self, input_shape, self.axis)
        if channels % 2:
            raise ValueError(
                f"{title(self)} reflects pairs of channels and needs an even number of "
                f"them along axis {self.axis}. Received: {channels} channels, "
                f"input_shape={tuple(input_shape)}"
            )
        self.angle = self.add_weight(
            name="angle",
            shape=(channels // 2,),
            initializer=self.angle_initializer,
            aggregation="mean",
            autocast=False,  # rounded to half precision, v would be no unit vector
        )
        rank = len(input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=rank, axes={self.axis % rank: channels})

    def call(self, inputs: Tensor) -> Tensor:
        half = along(wide(self.angle) / 2, self.axis, len(inputs.shape))
        sine, cosine = ops.sin(half), ops.cos(half)
        first, second = ops.split(wide(inputs), 2, axis=self.axis)
        behind = 2 * ops.minimum(sine * first - cosine * second, 0)
        parts = [first - sine * behind, second + cosine * behind]
        return ops.cast(ops.concatenate(parts, axis=self.axis), self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "axis": self.axis,
            "angle_initializer": keras.initializers.serialize(self.angle_initializer),
        }
