from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import positive_integer
from keras_lipnext.layers.images import channels_of, matmul
from keras_lipnext.layers.sdp_base import SDPResidual
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Activation, Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class SDPResidualDense(SDPResidual):
    """Residual layer `x - 2 W T^-1 sigma(W^T x + b)`, 1-Lipschitz as T is diagonal, W^T W <= T.

    sigma has slopes in [0, 1]. With `bound="sll"` it is the SDP-based Lipschitz layer,
    T_ii = sum_j |W^T W|_ij q_j / q_i with q > 0 learned; with "spectral", T = ||W||^2 I, the convex
    potential layer (CPL); with "aol" q is 1; with "orthogonal" T = I, W on the Stiefel manifold.

    Example:

    ```python
    layer = keras_lipnext.layers.SDPResidualDense(256, bound="sll")
    ```

    Args:
        hidden_units: Positive integer, the number of W's columns. None takes as many as the input
            has features.
        bound: "sll", "spectral", "aol" or "orthogonal".
        activation: Keras activation with slopes in [0, 1]: relu, tanh, sigmoid, ...
        use_bias: Whether to add a bias b.
        kernel_initializer: Keras initializer of W, of shape (d, hidden_units).
        bias_initializer: Keras initializer.

    Input shape:
        (..., d).

    Output shape:
        The input's.

    Raises:
        ValueError: for an unknown bound, another activation, or if `hidden_units` is not a
            positive integer.

    Reference:
        Araujo et al. (ICLR 2023), arXiv 2303.03169; CPL: Meunier et al. (ICML 2022), 2110.12690.
    """

    def __init__(
        self,
        hidden_units: int | None = None,
        bound: str = "sll",
        activation: Activation = "relu",
        use_bias: bool = True,
        kernel_initializer: Initializer = "glorot_normal",
        bias_initializer: Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            bound, activation, use_bias, kernel_initializer, bias_initializer, **kwargs
        )
        if hidden_units is not None:
            positive_integer("hidden_units", hidden_units)
        self.hidden_units = hidden_units

    def build(self, input_shape: Shape) -> None:
        features = channels_of(self, input_shape, -1)
        hidden = self.hidden_units or features
        self._add_weights((features, hidden), columns=hidden, biases=hidden)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})

    def call(self, inputs: Tensor) -> Tensor:
        kernel, sizes, inverses = self.residual_form()
        kernel, inputs = self._cast(kernel), self._cast(inputs)
        hidden = self._hidden(matmul(inputs, kernel, -1), sizes, inverses)
        return inputs - 2 * matmul(hidden, ops.transpose(kernel), -1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {**super().get_config(), "hidden_units": self.hidden_units}
