import math
from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import positive_integer
from keras_lipnext.layers.images import channels_of, matmul
from keras_lipnext.layers.sdp_base import check_monotone
from keras_lipnext.layers.sdp_diagonal import Q_RANGE, wide
from keras_lipnext.layers.weights import NAMESPACE, add_bias, add_stiefel_kernel, serialize_optional
from keras_lipnext.typing import Activation, Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class SandwichDense(keras.layers.Layer):
    """Sandwich layer `sqrt(2) A^T Psi sigma(sqrt(2) Psi^-1 B x + b)`, 1-Lipschitz.

    A A^T + B B^T = I, Psi is diagonal, positive and learned, and sigma has slopes in [0, 1]: the
    layer of Lipschitz-bounded deep networks (LBDN).

    The kernel [A B]^T, of shape (units + d, units), lives on the Stiefel manifold: that is the
    condition. The paper makes such matrices by a Cayley transform of free parameters in each call;
    here, as in the other layers, the stored weight is the effective one, any optimizer trains it,
    and `certify` measures it.

    Example:

    ```python
    layer = keras_lipnext.layers.SandwichDense(64)
    ```

    Args:
        units: Positive integer, size of the output.
        activation: Keras activation with slopes in [0, 1]: relu, tanh, sigmoid, ...
        use_bias: Whether to add a bias b.
        kernel_initializer: Keras initializer, whose draw is projected on the manifold. None draws
            a random point of it.
        bias_initializer: Keras initializer.

    Input shape:
        (..., d).

    Output shape:
        (..., units).

    Raises:
        ValueError: for another activation, or if `units` is not a positive integer.

    Reference:
        Wang, Manchester (ICML 2023), arXiv 2301.11526.
    """

    def __init__(
        self,
        units: int,
        activation: Activation = "relu",
        use_bias: bool = True,
        kernel_initializer: Initializer = None,
        bias_initializer: Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.units = positive_integer("units", units)
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        check_monotone(self)

    def build(self, input_shape: Shape) -> None:
        features = channels_of(self, input_shape, -1)
        shape = (self.units + features, self.units)
        self.kernel = add_stiefel_kernel(self, shape, self.kernel_initializer)
        self.bias = None
        if self.use_bias:
            self.bias = add_bias(self, (self.units,), self.bias_initializer, autocast=False)
        self.log_psi = self.add_weight(
            name="log_psi",
            shape=(self.units,),
            initializer="zeros",
            aggregation="mean",
            autocast=False,
        )
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})

    def scales(self) -> tuple[Tensor, Tensor]:
        """(sqrt(2) / Psi, Psi / sqrt(2)), in float32 or float64."""
        log_psi = ops.clip(wide(self.log_psi), -Q_RANGE, Q_RANGE)
        return math.sqrt(2) * ops.exp(-log_psi), ops.exp(log_psi) / math.sqrt(2)

    def call(self, inputs: Tensor) -> Tensor:
        kernel = ops.convert_to_tensor(self.kernel)
        scales, inverses = self.scales()
        x = wide(matmul(inputs, kernel[self.units :], -1)) * scales
        x = self.activation(x if self.bias is None else x + wide(self.bias)) * inverses
        x = ops.cast(x, self.compute_dtype)
        return 2 * matmul(x, ops.transpose(kernel[: self.units]), -1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": serialize_optional(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }
