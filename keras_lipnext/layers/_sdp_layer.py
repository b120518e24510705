"""What SDPDense, SDPResidualDense, SDPConv2D and SDPResidualConv2D share."""

import keras
from keras import ops

from keras_lipnext.layers import _sdp
from keras_lipnext.layers._channels import (
    NAMESPACE,
    add_bias,
    add_stiefel_kernel,
    image_sizes,
    positive_integer,
    resolve_data_format,
    title,
)

# Monotone and 1-Lipschitz: the residual form needs slopes in [0, 1].
# tests/certification/test_activations.py measures them.
SLOPES_IN_0_1 = (
    *("linear", "relu", "relu6", "leaky_relu", "elu", "celu", "softplus", "squareplus"),
    *("softsign", "soft_shrink", "tanh", "tanh_shrink", "hard_tanh", "sigmoid", "hard_sigmoid"),
    *("sparse_sigmoid", "log_sigmoid"),
)


@keras.saving.register_keras_serializable(NAMESPACE)
class CentredOrthogonal(keras.initializers.Initializer):
    """Kernel of a convolution that is an orthogonal matrix at its centre and 0 elsewhere."""

    def __init__(self, seed=None):
        self.seed = seed

    def __call__(self, shape, dtype=None):
        matrix = keras.initializers.Orthogonal(seed=self.seed)(shape[2:], dtype)
        before = [(k - 1) // 2 for k in shape[:2]]
        pads = [(b, k - 1 - b) for b, k in zip(before, shape)]
        return ops.pad(matrix[None, None], [*pads, (0, 0), (0, 0)])

    def get_config(self):
        return {"seed": self.seed}


class SDPLayer(keras.layers.Layer):
    """A kernel W, the name of a bound, and T of both. Not for use on its own."""

    def __init__(self, bound, activation, use_bias, kernel_initializer, bias_initializer, **kwargs):
        super().__init__(**kwargs)
        if bound not in _sdp.BOUNDS:
            raise ValueError(
                f"`bound` must be one of {', '.join(_sdp.BOUNDS)}. Received: bound={bound!r}"
            )
        self.bound = bound
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def _add_weights(self, shape, columns, biases):
        """kernel, bias, and log_q for SLL: T has `columns` entries."""
        self.bias = self.log_q = None
        if self.bound == "orthogonal":
            add = add_stiefel_kernel
            self.kernel = add(self, shape, self.kernel_initializer)
        else:
            # In its own precision: T is computed from it. The product then casts.
            self.kernel = self.add_weight(
                name="kernel", shape=shape, initializer=self.kernel_initializer, autocast=False
            )
        if self.use_bias:
            self.bias = add_bias(self, (biases,), self.bias_initializer)
        if self.bound == "sll":
            self.log_q = self.add_weight(
                name="log_q", shape=(columns,), initializer="zeros", autocast=False
            )

    def _check_slopes(self):
        allowed = [getattr(keras.activations, name) for name in SLOPES_IN_0_1]
        if self.activation not in allowed:
            name = getattr(self.activation, "__name__", self.activation)
            raise ValueError(
                f"{title(self)} is 1-Lipschitz only with an activation whose slope lies in [0, 1], "
                f"one of {', '.join(SLOPES_IN_0_1)}. Received: activation={name!r}"
            )

    def diagonal_form(self, kernel=None, log_q=None):
        """(W / s, 1 / T of that, s), in float32 or float64; T is 1, and s, for "orthogonal".

        Args:
            kernel, log_q: Values to use instead of the weights'.
        """
        w = self._columns_last(_sdp.wide(self.kernel if kernel is None else kernel))
        if self.bound == "orthogonal":
            ones = ops.ones_like(w[(0,) * (len(w.shape) - 1)])
            return w, ones, ones[0]
        w, scale = _sdp.scaled(w)
        log_q = self.log_q if log_q is None else log_q
        log_q = None if log_q is None else _sdp.wide(log_q)
        return w, _sdp.inverse_diagonal(w, self.bound, log_q), scale

    def _columns_last(self, kernel):
        """W: the linear layers' kernel is W^T, whose rows T scales; the residual ones' is W."""
        return kernel

    def get_config(self):
        return {
            **super().get_config(),
            "bound": self.bound,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }


class SDPConvolution(SDPLayer):
    """What the two convolutions share: sizes, padding and the layout of images."""

    def __init__(self, kernel_size, padding, data_format, **kwargs):
        super().__init__(**kwargs)
        sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size,) * 2
        if len(sizes) != 2:
            raise ValueError(
                f"`kernel_size` is an integer or two. Received: kernel_size={kernel_size!r}"
            )
        self.kernel_size = tuple(positive_integer("kernel_size", k) for k in sizes)
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

    def _check_image(self, input_shape):
        height, width, channels = image_sizes(self, input_shape)
        for name, size, k in zip(("height", "width"), (height, width), self.kernel_size):
            if self.padding == "circular" and size is not None and size < k // 2:
                raise ValueError(
                    f"{title(self)} wraps around by {k // 2} positions. Received: {name}={size}"
                )
        return channels

    def _convolved(self, x, kernel, strides=(1, 1), adjoint=False):
        """The convolution of a channels-last image; its adjoint with `adjoint`."""
        if adjoint:
            kernel = ops.transpose(ops.flip(kernel, axis=(0, 1)), (0, 1, 3, 2))
        for axis, k in enumerate(self.kernel_size, start=1):
            before, after = (k - 1) // 2, k // 2
            x = self._padded(x, axis, *((after, before) if adjoint else (before, after)))
        return ops.conv(x, kernel, strides, padding="valid", data_format="channels_last")

    def _padded(self, x, axis, before, after):
        if self.padding == "same":
            return ops.pad(x, [(before, after) if a == axis else (0, 0) for a in range(4)])
        front = (slice(None),) * axis
        last, first = x[(*front, slice(-before, None))], x[(*front, slice(after))]
        parts = [last] * (before > 0) + [x] + [first] * (after > 0)
        return ops.concatenate(parts, axis=axis)

    def _channels_last(self, x):
        return x if self.data_format == "channels_last" else ops.transpose(x, (0, 2, 3, 1))

    def _own_format(self, x):
        return x if self.data_format == "channels_last" else ops.transpose(x, (0, 3, 1, 2))

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "padding": self.padding,
            "data_format": self.data_format,
        }
