from typing import Any

import keras

from keras_lipnext.arguments import number
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Config, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class Scale(keras.layers.Layer):
    """Multiplies by one learned factor: |factor|-Lipschitz, for outputs whose constant is learned.

    Behind a 1-Lipschitz network it makes a K-Lipschitz one, K = |factor| as the stored weight says.
    Where K is given, `keras.layers.Rescaling(K)` does that, and cannot grow in training: a
    `CertifiableModel`, whose loss counts on the constant, takes that one only.

    Example:

    ```python
    inputs = keras.Input((8,))
    x = keras_lipnext.layers.OrthogonalDense(1)(inputs)
    model = keras.Model(inputs, keras_lipnext.layers.Scale(3.0)(x))
    keras_lipnext.lipschitz_bound(model).constant  # 3, until it is trained
    ```

    Args:
        factor: Number at which the weight starts.

    Input shape:
        Tensor of any shape.

    Output shape:
        The input's.

    Raises:
        ValueError: if `factor` is not a number.
    """

    def __init__(self, factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.initial_factor = number("factor", factor)

    def build(self, input_shape: Shape) -> None:
        self.factor = self.add_weight(
            name="factor",
            shape=(),
            initializer=keras.initializers.Constant(self.initial_factor),
            aggregation="mean",
        )

    def call(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {**super().get_config(), "factor": self.initial_factor}
