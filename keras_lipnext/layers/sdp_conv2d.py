from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import positive_integer
from keras_lipnext.layers.images import channel_axis, spatial_axes
from keras_lipnext.layers.sdp_base import CentredOrthogonal, SDPConvolution, pair
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Activation, Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class SDPConv2D(SDPConvolution):
    """2-D convolution `activation(W T^(-1/2) x + b)`, 1-Lipschitz as T is diagonal, W^T W <= T.

    T has one entry for each input channel; |W^T W| is the correlation of the kernel with itself,
    its magnitudes summed over all offsets. See `SDPDense` for the bounds; "orthogonal" there is
    none for convolutions. "spectral" evaluates the kernel's symbol on a grid and is the dearest.

    Example:

    ```python
    layer = keras_lipnext.layers.SDPConv2D(32, 3, bound="aol", activation="relu")
    ```

    Args:
        filters: Positive integer, number of output channels.
        kernel_size: Positive integer, or two (height, width).
        bound: "aol", "sll" or "spectral".
        strides: Positive integer, or two.
        padding: "same", zeros in front (k - 1) // 2 and behind k // 2, or "circular".
        activation: Keras activation, a 1-Lipschitz one.
        use_bias: Whether to add a bias.
        kernel_initializer: Keras initializer of the kernel, of shape (height, width, inputs,
            filters). None starts with an orthogonal matrix at its centre, 0 elsewhere.
        bias_initializer: Keras initializer.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Images of rank 4; the batch and spatial sizes may be None.

    Output shape:
        (batch, ceil(height / strides), ceil(width / strides), filters), or channels first.

    Raises:
        ValueError: for an unknown bound or padding, an activation that is known not to be
            1-Lipschitz, or arguments that are not positive integers.

    Reference:
        Araujo et al. (ICLR 2023), arXiv 2303.03169; AOL: Prach, Lampert (ECCV 2022), 2208.03160.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, int],
        bound: str = "aol",
        strides: int | tuple[int, int] = 1,
        padding: str = "same",
        activation: Activation = None,
        use_bias: bool = True,
        kernel_initializer: Initializer = None,
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
            kernel_initializer=kernel_initializer or CentredOrthogonal(),
            bias_initializer=bias_initializer,
            **kwargs,
        )
        self.filters = positive_integer("filters", filters)
        self.strides = pair("strides", strides)

    def build(self, input_shape: Shape) -> None:
        channels = self._check_image(input_shape)
        shape = (*self.kernel_size, channels, self.filters)
        self._add_weights(shape, columns=channels, biases=self.filters)

    def _columns_last(self, kernel: Tensor) -> Tensor:
        return ops.transpose(kernel, (0, 1, 3, 2))

    def effective_kernel(self) -> Tensor:
        """The kernel with its inputs scaled by T^(-1/2)."""
        w, inverse, _ = self.diagonal_form()
        return ops.transpose(w * ops.sqrt(inverse), (0, 1, 3, 2))

    def call(self, inputs: Tensor) -> Tensor:
        x = self._channels_last(self._cast(inputs))
        x = self._convolved(x, self._cast(self.effective_kernel()), self.strides)
        x = x if self.bias is None else x + self._cast(self.bias)
        return self._own_format(self.activation(x))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        shape = list(input_shape)
        for axis, stride in zip(spatial_axes(self.data_format, 4), self.strides):
            size = shape[axis]
            shape[axis] = size and -(-size // stride)
        shape[channel_axis(self.data_format)] = self.filters
        return tuple(shape)

    def get_config(self) -> Config:
        return {**super().get_config(), "filters": self.filters, "strides": self.strides}
