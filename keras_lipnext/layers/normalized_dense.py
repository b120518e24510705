from typing import Any

import keras

from keras_lipnext.arguments import positive_integer
from keras_lipnext.backend import one_program
from keras_lipnext.layers.images import channels_of, matmul
from keras_lipnext.layers.weights import NAMESPACE, accumulating_dtype, add_bias
from keras_lipnext.typing import Config, DType, Initializer, Shape, Tensor

UNIT_NORM = keras.constraints.UnitNorm(axis=0)


@one_program
def _normalised(kernel: Tensor) -> Tensor:
    return UNIT_NORM(kernel)


@keras.saving.register_keras_serializable(NAMESPACE)
class NormalizedDense(keras.layers.Layer):
    """Linear classification head with unit-norm weight vectors (last-layer normalisation).

    `logits = input @ kernel + bias`, where each column of `kernel`, the weight vector w_k of
    class k, has norm 1, kept by a unit-norm constraint after each optimizer step. Logit
    differences z_i - z_j change by at most ||w_i - w_j|| times the change of the input: the
    constants a per-pair certificate uses. Under a mixed precision policy it computes and answers
    in float32.

    Example:

    ```python
    head = keras_lipnext.layers.NormalizedDense(10)
    head(np.ones((2, 16))).shape  # (2, 10)
    ```

    Args:
        units: Positive integer, number of classes.
        use_bias: Whether to add a bias.
        kernel_initializer: Keras initializer; its columns are normalised.
        bias_initializer: Keras initializer.

    Input shape:
        (..., d).

    Output shape:
        (..., units).

    Raises:
        ValueError: if `units` is not a positive integer.

    Reference:
        Last-layer normalisation: Singla, Singla, Feizi (ICLR 2022), arXiv 2108.04062.
    """

    def __init__(
        self,
        units: int,
        use_bias: bool = True,
        kernel_initializer: Initializer = "glorot_normal",
        bias_initializer: Initializer = "zeros",
        dtype: DType = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype=accumulating_dtype(dtype), **kwargs)
        self.units = positive_integer("units", units)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def build(self, input_shape: Shape) -> None:
        features = channels_of(self, input_shape, -1)
        self.kernel = self.add_weight(
            name="kernel",
            shape=(features, self.units),
            initializer=lambda shape, dtype: _normalised(self.kernel_initializer(shape, dtype)),
            constraint=UNIT_NORM,
            aggregation="mean",
        )
        self.bias = None
        if self.use_bias:
            self.bias = add_bias(self, (self.units,), self.bias_initializer)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})

    def call(self, inputs: Tensor) -> Tensor:
        logits = matmul(inputs, self.kernel, -1)
        return logits if self.bias is None else logits + self.bias

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "units": self.units,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }
