from typing import Any

import keras

from keras_lipnext.arguments import positive_integer
from keras_lipnext.layers.sdp_base import SDPConvolution, SDPResidual
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Activation, Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class SDPResidualConv2D(SDPResidual, SDPConvolution):
    """Residual convolution `x - 2 W T^-1 sigma(W^T x + b)`, 1-Lipschitz as W^T W <= T, T diagonal.

    W^T is a convolution to `hidden_filters` channels, W its adjoint, sigma has slopes in [0, 1].
    T has one entry for each hidden channel. See `SDPResidualDense` for the bounds; there is no
    "orthogonal" for convolutions.

    Example:

    ```python
    layer = keras_lipnext.layers.SDPResidualConv2D(32, 3, bound="sll")
    ```

    Args:
        hidden_filters: Positive integer, the number of hidden channels. None takes as many as the
            input has.
        kernel_size: Positive integer, or two (height, width).
        bound: "sll", "spectral" or "aol".
        padding: "same" (zeros) or "circular".
        activation: Keras activation with slopes in [0, 1]: relu, tanh, sigmoid, ...
        use_bias: Whether to add a bias b.
        kernel_initializer: Keras initializer of the kernel, of shape (height, width, inputs,
            hidden_filters).
        bias_initializer: Keras initializer.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Images of rank 4; the batch and spatial sizes may be None.

    Output shape:
        The input's.

    Raises:
        ValueError: for an unknown bound or padding, another activation, or arguments that are not
            positive integers.

    Reference:
        Araujo et al. (ICLR 2023), arXiv 2303.03169; CPL: Meunier et al. (ICML 2022), 2110.12690.
    """

    def __init__(
        self,
        hidden_filters: int | None = None,
        kernel_size: int | tuple[int, int] = 3,
        bound: str = "sll",
        padding: str = "same",
        activation: Activation = "relu",
        use_bias: bool = True,
        kernel_initializer: Initializer = "glorot_normal",
        bias_initializer: Initializer = "zeros",
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            kernel_size,
            padding,
            data_format,
            bound=bound,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            **kwargs,
        )
        if hidden_filters is not None:
            positive_integer("hidden_filters", hidden_filters)
        self.hidden_filters = hidden_filters

    def build(self, input_shape: Shape) -> None:
        channels = self._check_image(input_shape)
        hidden = self.hidden_filters or channels
        self._add_weights((*self.kernel_size, channels, hidden), columns=hidden, biases=hidden)

    def call(self, inputs: Tensor) -> Tensor:
        kernel, sizes, inverses = self.residual_form()
        kernel, x = self._cast(kernel), self._channels_last(self._cast(inputs))
        hidden = self._hidden(self._convolved(x, kernel), sizes, inverses)
        return self._own_format(x - 2 * self._convolved(hidden, kernel, adjoint=True))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {**super().get_config(), "hidden_filters": self.hidden_filters}
