from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import positive_integer
from keras_lipnext.layers.images import channels_of, matmul
from keras_lipnext.layers.sdp_base import SDPLayer
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Activation, Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class SDPDense(SDPLayer):
    """Dense layer `activation(W T^(-1/2) x + b)`, 1-Lipschitz as T is diagonal and W^T W <= T.

    Any kernel will do: T is computed from it in every call. With

    - `bound="aol"`, T_ii = sum_j |W^T W|_ij, the almost-orthogonal layer (AOL);
    - `bound="sll"`, T_ii = sum_j |W^T W|_ij q_j / q_i with q > 0 learned;
    - `bound="spectral"`, T = ||W||^2 I, spectral normalisation, the norm bounded from above by
      Gram iteration;
    - `bound="orthogonal"`, T = I, the kernel on the Stiefel manifold, as `OrthogonalDense`.

    Example:

    ```python
    layer = keras_lipnext.layers.SDPDense(64, bound="aol", activation="relu")
    ```

    Args:
        units: Positive integer, size of the output.
        bound: "aol", "sll", "spectral" or "orthogonal".
        activation: Keras activation, a 1-Lipschitz one.
        use_bias: Whether to add a bias.
        kernel_initializer: Keras initializer of the kernel, W^T, of shape (d, units).
        bias_initializer: Keras initializer.

    Input shape:
        (..., d).

    Output shape:
        (..., units).

    Raises:
        ValueError: for an unknown bound, an activation that is known not to be 1-Lipschitz, or if
            `units` is not a positive integer.

    Reference:
        Araujo et al. (ICLR 2023), arXiv 2303.03169; AOL: Prach, Lampert (ECCV 2022), 2208.03160.
    """

    def __init__(
        self,
        units: int,
        bound: str = "aol",
        activation: Activation = None,
        use_bias: bool = True,
        kernel_initializer: Initializer = "orthogonal",
        bias_initializer: Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            bound, activation, use_bias, kernel_initializer, bias_initializer, **kwargs
        )
        self.units = positive_integer("units", units)

    def build(self, input_shape: Shape) -> None:
        features = channels_of(self, input_shape, -1)
        self._add_weights((features, self.units), columns=features, biases=self.units)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})

    def _columns_last(self, kernel: Tensor) -> Tensor:
        return ops.transpose(kernel)

    def effective_kernel(self) -> Tensor:
        """T^(-1/2) W^T, shape (d, units): what the input is multiplied with."""
        w, inverse, _ = self.diagonal_form()
        return ops.transpose(w * ops.sqrt(inverse))

    def call(self, inputs: Tensor) -> Tensor:
        x = matmul(self._cast(inputs), self._cast(self.effective_kernel()), -1)
        return self.activation(x if self.bias is None else x + self._cast(self.bias))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> Config:
        return {**super().get_config(), "units": self.units}
