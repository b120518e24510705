"""Activations: the slopes of each, its value at 0, and how it is evaluated in float64.

Keras passes some of their constants on as float32 on TensorFlow (the slope of leaky_relu, the
coefficient of gelu), so that certificates evaluate the formulas written here.
"""

import collections.abc
import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_lipnext.norms.roundoff import ROUNDING
from keras_lipnext.overrides import replaced


@dataclasses.dataclass(frozen=True)
class Activation:
    """A function of one real variable, applied entry by entry.

    Attributes:
        function: Its evaluation on float64 tensors.
        constant: Upper bound of its slope's magnitude; it has no jump.
        at_zero: Upper bound of its magnitude at 0.
        ulps: Its float64 evaluation at x is off by at most ulps * 2^-53 * (constant |x| + at_zero);
            0 if exact. tests/certification/test_activations.py measures less than half of it.
        least: Lower bound of its slope, None if it is only known to be above -constant.
        cancelling: Size of numbers that a backend's own float32 evaluation may subtract from each
            other, as exp(x) - 1 where elu has expm1(x): with it in place of `at_zero` the same
            holds, of u = 2^-24 and the function as Keras evaluates it.
        bends: (p, q): its slope rises up to p and falls from q on; known if q <= p. Then the slope
            rises first and falls then, or does one of the two alone.
        pieces: (start, end, slope) of intervals on which it is linear, exactly.
    """

    function: object
    constant: float = 1.0
    at_zero: float = 0.0
    ulps: float = 64.0
    least: float | None = None
    cancelling: float = 0.0
    bends: tuple[float, float] = (-math.inf, math.inf)
    pieces: tuple = ()

    @property
    def slopes(self):
        """(lower, upper) bound of its slope."""
        return (-self.constant if self.least is None else self.least), self.constant


# Of convex functions, of concave ones, and of those that are convex up to 0 and concave beyond.
_CONVEX, _CONCAVE, _S_SHAPED = (math.inf, math.inf), (-math.inf, -math.inf), (0.0, 0.0)
_UNKNOWN = (-math.inf, math.inf)


def _kinked(slope):
    """(bends, pieces) of a function of this slope below 0 and of 1 above."""
    pieces = ((-math.inf, 0.0, float(np.float64(slope))), (0.0, math.inf, 1.0))
    return (_CONVEX if slope <= 1 else _CONCAVE), pieces


def leaky_relu(slope):
    """max(x, 0) + slope * min(x, 0)."""
    bends, pieces = _kinked(slope)
    return Activation(
        lambda x: ops.maximum(x, 0) + ops.minimum(x, 0) * np.float64(slope),
        max(1.0, abs(slope)),
        ulps=4.0,
        least=min(1.0, slope),
        bends=bends,
        pieces=pieces,
    )


def elu(alpha):
    """x for positive x, alpha (exp(x) - 1) for others."""
    return Activation(
        lambda x: ops.maximum(x, 0) + ops.expm1(ops.minimum(x, 0)) * np.float64(alpha),
        max(1.0, abs(alpha)),
        least=min(0.0, alpha),
        cancelling=abs(alpha),
        # The slope is alpha exp(x) below 0, and 1 above.
        bends=_CONVEX if 0 <= alpha <= 1 else _S_SHAPED if alpha > 1 else _UNKNOWN,
    )


def celu(alpha):
    """x for positive x, alpha (exp(x / alpha) - 1) for others."""
    alpha = np.float64(alpha)
    return Activation(
        lambda x: ops.maximum(x, 0) + ops.expm1(ops.minimum(x, 0) / alpha) * alpha,
        least=0.0,
        cancelling=float(alpha),
        bends=_CONVEX if alpha > 0 else _UNKNOWN,
    )


def gelu(approximate):
    """x Phi(x), or its approximation by tanh."""
    if approximate:
        inner, cubic = np.float64(math.sqrt(2 / math.pi)), np.float64(0.044715)
        # The largest slope is 1.128993..., near 1.42.
        return Activation(
            lambda x: x * (1 + ops.tanh(inner * (x + cubic * (x * x * x)))) / 2,
            1.1289931,
            least=-0.1289931,
        )
    # The slope Phi(x) + x phi(x) is largest at sqrt(2).
    return Activation(
        lambda x: x * (1 + ops.erf(x / np.float64(math.sqrt(2)))) / 2, 1.1289042, least=-0.1289042
    )


def clipped_relu(negative_slope, max_value):
    """`keras.layers.ReLU` without a threshold."""
    slope = np.float64(negative_slope)
    bends, pieces = _kinked(negative_slope)
    if max_value is not None:
        end = float(np.float64(max_value))
        pieces = (pieces[0], (0.0, end, 1.0), (end, math.inf, 0.0))
        bends = (end, 0.0) if 0 <= negative_slope <= 1 else _UNKNOWN

    def function(x):
        positive = ops.maximum(x, 0)
        if max_value is not None:
            positive = ops.minimum(positive, np.float64(max_value))
        return positive + ops.minimum(x, 0) * slope if slope else positive

    return Activation(
        function,
        max(1.0, abs(negative_slope)),
        ulps=4.0 if slope else 0.0,
        least=min(0.0, negative_slope),
        bends=bends,
        pieces=pieces,
    )


def soft_shrink(threshold):
    """x, nearer to 0 by `threshold`, and 0 within it."""
    threshold = np.float64(threshold)
    return Activation(
        lambda x: ops.maximum(x - threshold, 0) + ops.minimum(x + threshold, 0),
        ulps=4.0,
        least=0.0,
    )


def squareplus(b):
    """(x + sqrt(x^2 + b)) / 2."""
    b = np.float64(b)
    return Activation(
        lambda x: (x + ops.sqrt(x * x + b)) / 2,
        at_zero=math.sqrt(b) / 2 * (1 + ROUNDING),
        least=0.0,
        bends=_CONVEX,
    )


def parametric_relu(alpha):
    """x for positive x, alpha x for others, alpha an array that is broadcast."""
    return Activation(
        lambda x: (
            ops.maximum(x, 0) + ops.minimum(x, 0) * ops.convert_to_tensor(alpha, dtype="float64")
        ),
        float(np.abs(alpha).max(initial=1.0)),
        ulps=4.0,
        least=float(alpha.min(initial=1.0)),
        bends=_CONVEX if (alpha <= 1).all() else _CONCAVE if (alpha >= 1).all() else _UNKNOWN,
    )


def _sparse_plus(x):
    inner = ops.minimum(ops.maximum(x, -1), 1) + 1
    return inner * inner / 4 + ops.maximum(x - 1, 0)


def _softplus(x):
    return ops.maximum(x, 0) + ops.log1p(ops.exp(-ops.abs(x)))


_SELU_ALPHA, _SELU_SCALE = np.float64(1.6732632423543772), np.float64(1.0507009873554805)

FUNCTIONS = {
    "linear": Activation(lambda x: x, ulps=0.0, least=1.0, bends=_CONVEX),
    "relu": clipped_relu(0.0, None),
    "relu6": clipped_relu(0.0, 6.0),
    "leaky_relu": leaky_relu(0.2),
    "elu": elu(1.0),
    "celu": celu(1.0),
    "selu": Activation(
        lambda x: (ops.maximum(x, 0) + ops.expm1(ops.minimum(x, 0)) * _SELU_ALPHA) * _SELU_SCALE,
        1.7580994,
        least=0.0,
        cancelling=1.7580994,
        bends=_S_SHAPED,
    ),
    "gelu": gelu(False),
    "silu": Activation(lambda x: x * ops.sigmoid(x), 1.0998394, least=-0.0998394),
    "mish": Activation(lambda x: x * ops.tanh(_softplus(x)), 1.0884991, least=-0.1125262),
    "softplus": Activation(_softplus, at_zero=0.6931472, least=0.0, bends=_CONVEX),
    "log_sigmoid": Activation(
        lambda x: -_softplus(-x), at_zero=0.6931472, least=0.0, bends=_CONCAVE
    ),
    "squareplus": squareplus(4.0),
    "sparse_plus": Activation(_sparse_plus, at_zero=0.25, least=0.0, bends=_CONVEX),
    "softsign": Activation(lambda x: x / (1 + ops.abs(x)), least=0.0, bends=_S_SHAPED),
    "soft_shrink": soft_shrink(0.5),
    "tanh": Activation(ops.tanh, least=0.0, bends=_S_SHAPED),
    "tanh_shrink": Activation(lambda x: x - ops.tanh(x), least=0.0),
    "hard_tanh": Activation(
        lambda x: ops.minimum(ops.maximum(x, -1), 1),
        ulps=0.0,
        least=0.0,
        bends=(1.0, -1.0),
        pieces=((-math.inf, -1.0, 0.0), (-1.0, 1.0, 1.0), (1.0, math.inf, 0.0)),
    ),
    "sigmoid": Activation(ops.sigmoid, 0.25, at_zero=0.5, least=0.0, bends=_S_SHAPED),
    "hard_sigmoid": Activation(
        lambda x: ops.minimum(ops.maximum(x / 6 + 0.5, 0), 1),
        1 / 6 + 1e-9,
        at_zero=0.5,
        least=0.0,
        bends=(3.0, -3.0),
        pieces=((-math.inf, -3.0, 0.0), (3.0, math.inf, 0.0)),
    ),
    "sparse_sigmoid": Activation(
        lambda x: ops.minimum(ops.maximum((x + 1) / 2, 0), 1),
        0.5,
        at_zero=0.5,
        least=0.0,
        bends=(1.0, -1.0),
        pieces=((-math.inf, -1.0, 0.0), (-1.0, 1.0, 0.5), (1.0, math.inf, 0.0)),
    ),
    "hard_silu": Activation(
        lambda x: x * ops.minimum(ops.maximum(x / 6 + 0.5, 0), 1), 1.5, least=-0.5
    ),
}

# Operations of `keras.ops`, by the names of their classes.
OPERATION_ACTIVATIONS = {
    "Relu": FUNCTIONS["relu"],
    "Relu6": FUNCTIONS["relu6"],
    "LeakyRelu": lambda operation: leaky_relu(operation.negative_slope),
    "Elu": lambda operation: elu(operation.alpha),
    "Celu": lambda operation: celu(operation.alpha),
    "Selu": FUNCTIONS["selu"],
    "Gelu": lambda operation: gelu(operation.approximate),
    "Silu": FUNCTIONS["silu"],
    "Softplus": FUNCTIONS["softplus"],
    "LogSigmoid": FUNCTIONS["log_sigmoid"],
    "Softsign": FUNCTIONS["softsign"],
    "Tanh": FUNCTIONS["tanh"],
    "TanhShrink": FUNCTIONS["tanh_shrink"],
    "HardTanh": FUNCTIONS["hard_tanh"],
    "Sigmoid": FUNCTIONS["sigmoid"],
    "HardSigmoid": FUNCTIONS["hard_sigmoid"],
    "SparseSigmoid": FUNCTIONS["sparse_sigmoid"],
    "HardSilu": FUNCTIONS["hard_silu"],
    "ReLU": lambda operation: clipped_relu(operation.negative_slope, operation.max_value),
    "SoftShrink": lambda operation: soft_shrink(operation.threshold),
    "Squareplus": lambda operation: squareplus(operation.b),
    "SparsePlus": FUNCTIONS["sparse_plus"],
    "Sin": Activation(ops.sin),
    "Cos": Activation(ops.cos, at_zero=1.0),
    "Arctan": Activation(ops.arctan, least=0.0, bends=_S_SHAPED),
    "Arcsinh": Activation(ops.arcsinh, least=0.0, bends=_S_SHAPED),
    "Erf": Activation(ops.erf, 1.1283792, least=0.0, bends=_S_SHAPED),
}

_ACTIVATIONS = {getattr(keras.activations, name): entry for name, entry in FUNCTIONS.items()}
# `Dense(activation=keras.ops.relu)`; where the defaults of keras.ops differ, they are theirs.
_ACTIVATIONS |= {
    getattr(ops, name): entry for name, entry in FUNCTIONS.items() if hasattr(ops, name)
}
_ACTIVATIONS[ops.gelu] = gelu(True)


def of_function(function):
    """The `Activation` that a function, or a layer given as one, is; or None."""
    if isinstance(function, keras.layers.Layer) and replaced(function):
        return None
    if type(function) in ACTIVATION_LAYERS:  # `Dense(activation=LeakyReLU(0.1))`
        return find_activation(function)
    if type(function) is keras.layers.PReLU and function.built:
        alpha = keras.ops.convert_to_numpy(function.alpha)
        return parametric_relu(np.asarray(alpha, "float64"))
    return _ACTIVATIONS.get(function) if isinstance(function, collections.abc.Hashable) else None


# Layers that are nothing but an activation, and what each is.
ACTIVATION_LAYERS = {
    keras.layers.Activation: lambda layer: of_function(layer.activation),
    keras.layers.ReLU: lambda layer: clipped_relu(layer.negative_slope, layer.max_value),
    keras.layers.LeakyReLU: lambda layer: leaky_relu(layer.negative_slope),
    keras.layers.ELU: lambda layer: elu(layer.alpha),
}


def broken(operation):
    """Why the settings of a layer or operation leave it without a constant; or None."""
    threshold = getattr(operation, "threshold", 0)
    if type(operation).__name__ == "SoftShrink":  # continuous, but for negative thresholds
        threshold = 0 if threshold >= 0 else threshold
    if threshold != 0:
        return f"it jumps at its threshold {threshold}"
    if (getattr(operation, "max_value", None) or 0) < 0:
        return f"its max_value is {operation.max_value}"
    is_layer = isinstance(operation, keras.layers.Layer)
    if not is_layer and not 2.0**-64 <= getattr(operation, "alpha", 1.0) <= 2.0**64:
        return f"its alpha is {operation.alpha}: it must be positive, and moderate"
    # Smaller than b, x^2 may underflow.
    if not is_layer and not 2.0**-64 <= getattr(operation, "b", 1.0) <= 2.0**64:
        return f"its b is {operation.b}: it must be positive, and moderate"
    return None


def find_activation(operation):
    """The `Activation` that a layer or operation of `keras.ops` is or ends in, or None."""
    if broken(operation):
        return None
    if not isinstance(operation, keras.layers.Layer):
        entry = OPERATION_ACTIVATIONS.get(type(operation).__name__)
    elif type(operation) in ACTIVATION_LAYERS:
        entry = ACTIVATION_LAYERS[type(operation)]
    else:
        return of_function(getattr(operation, "activation", None))
    return entry(operation) if callable(entry) else entry


# Activations that no constant bounds, by their names in keras.activations, and why.
NO_CONSTANT = {
    "exponential": "grows ever steeper",
    "glu": "multiplies one half of its input by shares made from the other, a product of two "
    "tensors",
    "hard_shrink": "jumps at its threshold",
    "threshold": "jumps at its threshold",
}


def is_softmax(function):
    """Whether the activation only makes shares of logits, keeping their order."""
    names = ("softmax", "log_softmax")
    return any(
        function is getattr(module, name) for module in (keras.activations, ops) for name in names
    )
