"""What SDPDense, SDPResidualDense, SDPConv2D and SDPResidualConv2D share."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import keras
from keras import ops

from keras_lipnext.activations import ACTIVATION_LAYERS, FUNCTIONS, NO_CONSTANT, of_function
from keras_lipnext.arguments import positive_integer, resolve_data_format, title
from keras_lipnext.layers import sdp_diagonal
from keras_lipnext.layers.images import channel_axis, channels_along, sides_of
from keras_lipnext.layers.weights import NAMESPACE, add_stiefel_kernel
from keras_lipnext.typing import Activation, Config, Initializer, Shape, Tensor

# Monotone and 1-Lipschitz: the residual form needs slopes in [0, 1].
SLOPES_IN_0_1 = [name for name, f in FUNCTIONS.items() if f.slopes[0] >= 0 and f.slopes[1] <= 1]


def _slopes(activation: Any) -> tuple[float, float] | None:
    """(least, largest) slope of an activation, infinite if it has none; None if not known."""
    if type(activation) is keras.layers.Activation:
        return _slopes(activation.activation)
    if isinstance(activation, keras.layers.PReLU):
        return None  # training changes them
    entry = of_function(activation)
    if entry is not None:
        return entry.slopes
    names = (*NO_CONSTANT, "log_softmax")
    steep = any(activation is getattr(m, n, m) for m in (keras.activations, ops) for n in names)
    return (-math.inf, math.inf) if steep or type(activation) in ACTIVATION_LAYERS else None


def check_monotone(layer: keras.layers.Layer) -> None:
    """ValueError unless the slopes of a layer's activation are known to lie in [0, 1]."""
    slopes = _slopes(layer.activation)
    if slopes is None or slopes[0] < 0 or slopes[1] > 1:
        refuse_activation(layer, "1-Lipschitz only with an activation whose slope lies in [0, 1]")


def refuse_activation(layer: keras.layers.Layer, condition: str) -> NoReturn:
    name = getattr(layer.activation, "__name__", layer.activation)
    raise ValueError(
        f"{title(layer)} is {condition}, such as {', '.join(SLOPES_IN_0_1)}. Received: "
        f"activation={name!r}. Another one can follow as a layer of its own."
    )


@keras.saving.register_keras_serializable(NAMESPACE)
class CentredOrthogonal(keras.initializers.Initializer):
    """Kernel of a convolution that is an orthogonal matrix at its centre and 0 elsewhere."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        matrix = keras.initializers.Orthogonal(seed=self.seed)(shape[2:], dtype)
        before = [(k - 1) // 2 for k in shape[:2]]
        pads = [(b, k - 1 - b) for b, k in zip(before, shape)]
        return ops.pad(matrix[None, None], [*pads, (0, 0), (0, 0)])

    def get_config(self) -> Config:
        return {"seed": self.seed}


class SDPLayer(keras.layers.Layer):
    """A kernel W, the name of a bound, and T of both. Not for use on its own."""

    def __init__(
        self,
        bound: str,
        activation: Activation,
        use_bias: bool,
        kernel_initializer: Initializer,
        bias_initializer: Initializer,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if bound not in sdp_diagonal.BOUNDS:
            raise ValueError(
                f"`bound` must be one of {', '.join(sdp_diagonal.BOUNDS)}. "
                f"Received: bound={bound!r}"
            )
        self.bound = bound
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self._check_activation()

    def _add_weights(self, shape: Shape, columns: int, biases: int) -> None:
        """kernel, bias, and log_q for SLL: T has `columns` entries."""
        self.bias = self.log_q = None
        if self.bound == "orthogonal":
            add = add_stiefel_kernel
            self.kernel = add(self, shape, self.kernel_initializer)
        else:
            # In its own precision: T is computed from it. The product then casts.
            self.kernel = self.add_weight(
                name="kernel", shape=shape, initializer=self._initial_kernel, autocast=False
            )
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(biases,),
                initializer=self.bias_initializer,
                aggregation="mean",
                autocast=False,
            )
        if self.bound == "sll":
            self.log_q = self.add_weight(
                name="log_q", shape=(columns,), initializer="zeros", autocast=False
            )

    def _initial_kernel(self, shape: Shape, dtype: str | None = None) -> Tensor:
        """Drawn in float32 at least: there is no QR decomposition in half precision."""
        drawn = self.kernel_initializer(shape, dtype if dtype == "float64" else "float32")
        return ops.cast(drawn, dtype)

    def _check_activation(self) -> None:
        """Of the linear layers: what is known not to be 1-Lipschitz is refused."""
        slopes = _slopes(self.activation)
        if slopes is not None and max(map(abs, slopes)) > 1:
            refuse_activation(
                self, "1-Lipschitz only with an activation whose slope lies in [-1, 1]"
            )

    def diagonal_form(
        self, kernel: Tensor | None = None, log_q: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(W / s, 1 / T of that, s), in float32 or float64; T is 1, and s, for "orthogonal".

        Args:
            kernel, log_q: Values to use instead of the weights'.
        """
        w = self._columns_last(sdp_diagonal.wide(self.kernel if kernel is None else kernel))
        if self.bound == "orthogonal":
            ones = ops.ones_like(w[(0,) * (len(w.shape) - 1)])
            return w, ones, ones[0]
        w, scale = sdp_diagonal.scaled(w)
        log_q = self.log_q if log_q is None else log_q
        log_q = None if log_q is None else sdp_diagonal.wide(log_q)
        return w, sdp_diagonal.inverse_diagonal(w, log_q, bound=self.bound), scale

    def _cast(self, x: Tensor) -> Tensor:
        """In the compute dtype; Keras leaves integers as they are."""
        return ops.cast(ops.convert_to_tensor(x), self.compute_dtype)

    def _columns_last(self, kernel: Tensor) -> Tensor:
        """W: the linear layers' kernel is W^T, whose rows T scales; the residual ones' is W."""
        return kernel

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "bound": self.bound,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }


class SDPResidual(SDPLayer):
    """What the residual layers share: h(x) = x - 2 D R^-1 sigma(R D^T x + b), slopes in [0, 1].

    D = W T^(-1/2) and R = T^(1/2) make it x - 2 W T^-1 sigma(W^T x + b). ||D|| <= 1 whatever the
    size of W is, so that D can be rounded to half precision; R and b stay in float32.
    """

    def _check_activation(self) -> None:
        check_monotone(self)

    def residual_form(self) -> tuple[Tensor, Tensor, Tensor]:
        """(D, of the kernel's shape, R, R^-1), in float32 or float64."""
        w, inverse, scale = self.diagonal_form()
        root = ops.sqrt(inverse)
        return w * root, scale / root, root / scale

    def _hidden(self, x: Tensor, sizes: Tensor, inverses: Tensor) -> Tensor:
        """R^-1 sigma(R x + b) of x = D^T inputs."""
        x = sdp_diagonal.wide(x) * sizes
        x = self.activation(x if self.bias is None else x + sdp_diagonal.wide(self.bias))
        return self._cast(x * inverses)


class SDPConvolution(SDPLayer):
    """What the two convolutions share: sizes, padding and the layout of images."""

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        padding: str,
        data_format: str | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kernel_size = pair("kernel_size", kernel_size)
        if padding not in ("same", "circular"):
            raise ValueError(
                f"`padding` must be 'same' (zeros) or 'circular'. Received: padding={padding!r}"
            )
        if self.bound == "orthogonal":
            raise ValueError(
                "`bound='orthogonal'` holds for matrices only: a kernel with orthonormal columns "
                "is no orthogonal convolution. Use 'aol', 'sll' or 'spectral'."
            )
        self.padding = padding
        self.data_format = resolve_data_format(data_format)

    def _check_image(self, input_shape: Shape) -> int:
        sides_of(self, input_shape, spatial=(2,))
        channels = channels_along(self, input_shape)
        axis = channel_axis(self.data_format)
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={axis: channels})
        return channels

    def _convolved(
        self, x: Tensor, kernel: Tensor, strides: tuple[int, int] = (1, 1), adjoint: bool = False
    ) -> Tensor:
        """The convolution of a channels-last image; its adjoint with `adjoint`."""
        if adjoint:
            kernel = ops.transpose(ops.flip(kernel, axis=(0, 1)), (0, 1, 3, 2))
        for axis, k in enumerate(self.kernel_size, start=1):
            before, after = (k - 1) // 2, k // 2
            x = self._padded(x, axis, *((after, before) if adjoint else (before, after)))
        return ops.conv(x, kernel, strides, padding="valid", data_format="channels_last")

    def _padded(self, x: Tensor, axis: int, before: int, after: int) -> Tensor:
        if self.padding == "same":
            return ops.pad(x, [(before, after) if a == axis else (0, 0) for a in range(4)])
        size = x.shape[axis]
        if size is None or size < max(before, after):  # it may wrap around more than once
            size = ops.shape(x)[axis]
            positions = ops.arange(-before, size + after, dtype="int32") % size
            return ops.take(x, positions, axis=axis)
        front = (slice(None),) * axis
        last, first = x[(*front, slice(-before, None))], x[(*front, slice(after))]
        parts = [last] * (before > 0) + [x] + [first] * (after > 0)
        return ops.concatenate(parts, axis=axis)

    def _channels_last(self, x: Tensor) -> Tensor:
        return x if self.data_format == "channels_last" else ops.transpose(x, (0, 2, 3, 1))

    def _own_format(self, x: Tensor) -> Tensor:
        return x if self.data_format == "channels_last" else ops.transpose(x, (0, 3, 1, 2))

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "padding": self.padding,
            "data_format": self.data_format,
        }


def pair(name: str, value: Any) -> tuple[int, int]:
    """One positive integer or two, as two."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * 2
    if len(values) != 2:
        raise ValueError(f"`{name}` is an integer or two. Received: {name}={value!r}")
    first, second = (positive_integer(name, v) for v in values)
    return first, second
