from typing import Any

import keras

from keras_lipnext.arguments import positive_integer
from keras_lipnext.layers.images import along, channels_of, matmul
from keras_lipnext.layers.weights import NAMESPACE, add_bias, add_stiefel_kernel, serialize_optional
from keras_lipnext.typing import Activation, Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class OrthogonalDense(keras.layers.Layer):
    """Dense layer whose kernel has orthonormal rows or columns.

    `output = activation(input @ kernel + bias)`, with `kernel` of shape (d, units) and
    `kernel^T kernel = I` (units <= d) or `kernel kernel^T = I` (units > d). The linear map is an
    isometry when units >= d and the projection on a subspace when units < d: 1-Lipschitz always.
    The stored kernel is the effective one. Its `Stiefel` constraint lets any optimizer train it;
    `keras_lipnext.optimizers` move along the manifold.

    Example:

    ```python
    layer = keras_lipnext.layers.OrthogonalDense(64, activation="relu")
    ```

    Args:
        units: Positive integer, size of the output.
        activation: Keras activation. A 1-Lipschitz one ("relu", "tanh", "softplus", ...) keeps the
            layer 1-Lipschitz; certification refuses those whose constant it does not know.
        use_bias: Whether to add a bias.
        axis: The axis of the features, -1 by default, 1 for channels-first images.
        kernel_initializer: Keras initializer, whose draw is projected on the manifold. None draws
            a random orthogonal matrix.
        bias_initializer: Keras initializer.

    Input shape:
        Tensor of any rank >= 2 with `d` features along `axis`.

    Output shape:
        The input's, with `units` along `axis`.

    Raises:
        ValueError: if `units` is not a positive integer or the size of `axis` is unknown.
    """

    def __init__(
        self,
        units: int,
        activation: Activation = None,
        use_bias: bool = True,
        axis: int = -1,
        kernel_initializer: Initializer = None,
        bias_initializer: Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.units = positive_integer("units", units)
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.axis = axis
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def build(self, input_shape: Shape) -> None:
        features = channels_of(self, input_shape, self.axis)
        self.kernel = add_stiefel_kernel(self, (features, self.units), self.kernel_initializer)
        self.bias = None
        if self.use_bias:
            self.bias = add_bias(self, (self.units,), self.bias_initializer)
        self.input_spec = keras.layers.InputSpec(
            min_ndim=2, axes={self.axis % len(input_shape): features}
        )

    def call(self, inputs: Tensor) -> Tensor:
        x = matmul(inputs, self.kernel, self.axis)
        if self.bias is not None:
            x = x + along(self.bias, self.axis, len(x.shape))
        return self.activation(x)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        shape = list(input_shape)
        shape[self.axis] = self.units
        return tuple(shape)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "axis": self.axis,
            "kernel_initializer": serialize_optional(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }
