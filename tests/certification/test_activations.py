"""Activations: constants and accuracy of the float64 evaluation, against mpmath."""

import itertools

import extended
import keras
import mpmath
import numpy as np
import pytest
from data import to_numpy
from keras import ops

from keras_lipnext import activations, backend
from keras_lipnext.activations import (
    FUNCTIONS,
    OPERATION_ACTIVATIONS,
    celu,
    clipped_relu,
    elu,
    leaky_relu,
    parametric_relu,
    soft_shrink,
    squareplus,
)


def _step(x, low, high):
    return min(max(x, low), high)


def _softplus(x):
    return mpmath.log1p(mpmath.exp(-abs(x))) + max(x, 0)


def _elu(alpha):
    return lambda x: x if x > 0 else mpmath.mpf(alpha) * mpmath.expm1(x)


EXACT = {
    "linear": lambda x: x,
    "relu": lambda x: max(x, 0),
    "relu6": lambda x: _step(x, 0, 6),
    "leaky_relu": lambda x: x if x > 0 else mpmath.mpf(0.2) * x,
    "elu": _elu(1),
    "celu": _elu(1),
    "selu": lambda x: mpmath.mpf(1.0507009873554805) * _elu(1.6732632423543772)(x),
    "gelu": lambda x: x * mpmath.ncdf(x),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "mish": lambda x: x * mpmath.tanh(_softplus(x)),
    "softplus": _softplus,
    "log_sigmoid": lambda x: -_softplus(-x),
    "squareplus": lambda x: (x + mpmath.sqrt(x * x + 4)) / 2,
    "softsign": lambda x: x / (1 + abs(x)),
    "sparse_plus": lambda x: (x + 1) ** 2 / 4 if abs(x) < 1 else max(x, 0),
    "soft_shrink": lambda x: mpmath.sign(x) * max(abs(x) - mpmath.mpf(0.5), 0),
    "tanh": mpmath.tanh,
    "tanh_shrink": lambda x: x - mpmath.tanh(x),
    "hard_tanh": lambda x: _step(x, -1, 1),
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "hard_sigmoid": lambda x: _step(x / 6 + mpmath.mpf(0.5), 0, 1),
    "sparse_sigmoid": lambda x: _step((x + 1) / 2, 0, 1),
    "hard_silu": lambda x: x * _step(x / 6 + mpmath.mpf(0.5), 0, 1),
    "gelu by tanh": lambda x: (
        x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3))) / 2
    ),
    "elu 1.7": _elu(1.7),
    "celu 0.6": lambda x: x if x > 0 else mpmath.mpf(0.6) * mpmath.expm1(x / mpmath.mpf(0.6)),
    "leaky_relu -1.2": lambda x: x if x > 0 else mpmath.mpf(-1.2) * x,
    "clipped relu": lambda x: min(x, mpmath.mpf(0.7)) if x > 0 else mpmath.mpf(0.1) * x,
    "squareplus 0.3": lambda x: (x + mpmath.sqrt(x * x + mpmath.mpf(0.3))) / 2,
    "soft_shrink 1.1": lambda x: mpmath.sign(x) * max(abs(x) - mpmath.mpf(1.1), 0),
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "arctan": mpmath.atan,
    "arcsinh": mpmath.asinh,
    "erf": mpmath.erf,
}
TABLE = {
    **FUNCTIONS,
    "gelu by tanh": activations.gelu(True),
    "elu 1.7": elu(1.7),
    "celu 0.6": celu(0.6),
    "leaky_relu -1.2": leaky_relu(-1.2),
    "clipped relu": clipped_relu(0.1, 0.7),
    "squareplus 0.3": squareplus(0.3),
    "soft_shrink 1.1": soft_shrink(1.1),
    **{
        name.lower(): OPERATION_ACTIVATIONS[name]
        for name in ("Sin", "Cos", "Arctan", "Arcsinh", "Erf")
    },
}
POINTS = np.concatenate(
    [
        np.linspace(-40, 40, 401),
        np.linspace(-4, 4, 801),
        *(sign * np.logspace(-300, 8, 120) for sign in (1, -1)),
    ]
)


def test_every_activation_of_the_table_is_checked():
    assert set(TABLE) == set(EXACT)


@pytest.mark.parametrize("name", EXACT)
def test_float64_evaluation(name):
    """Off by less than half of what the allowance grants, at points of every size."""
    entry = TABLE[name]
    with backend.float64_scope():
        computed = to_numpy(
            entry.function(keras.ops.convert_to_tensor(POINTS.copy(), dtype="float64"))
        )
    assert computed.dtype == np.float64
    with mpmath.workprec(200):
        for x, y in zip(POINTS, computed):
            error = abs(mpmath.mpf(float(y)) - EXACT[name](mpmath.mpf(float(x))))
            allowed = entry.ulps / 2 * 2.0**-53 * (entry.constant * abs(x) + entry.at_zero)
            assert error <= allowed + 2.0**-1021, (x, float(error / max(allowed, 1e-300)))


OF_KERAS = {
    "gelu by tanh": lambda x: keras.activations.gelu(x, approximate=True),
    "elu 1.7": lambda x: ops.elu(x, 1.7),
    "celu 0.6": lambda x: ops.celu(x, 0.6),
    "leaky_relu -1.2": lambda x: ops.leaky_relu(x, -1.2),
    "clipped relu": keras.layers.ReLU(negative_slope=0.1, max_value=0.7),
    "squareplus 0.3": lambda x: ops.squareplus(x, 0.3),
    "soft_shrink 1.1": lambda x: ops.soft_shrink(x, 1.1),
}
FLOATS = np.concatenate(
    [
        np.linspace(-40, 40, 2001),
        np.linspace(-4, 4, 4001),
        *(sign * np.logspace(-37, 16.85, 1000) for sign in (1, -1)),
    ]
).astype("float32")


@pytest.mark.parametrize("name", EXACT)
def test_float32_evaluation(name):
    """What Keras itself answers, compiled by `predict`: off by half of what is granted at most."""
    entry = TABLE[name]
    if name in FUNCTIONS:
        function = keras.layers.Activation(getattr(keras.activations, name))
    else:
        function = OF_KERAS.get(name) or getattr(ops, name)
    inputs = keras.Input(FLOATS.shape)
    computed = to_numpy(keras.Model(inputs, function(inputs)).predict_on_batch(FLOATS[None]))[0]
    assert computed.dtype == np.float32
    wide = FLOATS.astype("float64")
    with backend.float64_scope():
        exact = to_numpy(entry.function(ops.convert_to_tensor(wide, dtype="float64")))
    granted = (entry.ulps + 4) * (entry.constant * abs(wide) + entry.at_zero + entry.cancelling)
    if name == "linear":
        granted = 0 * wide
    off = abs(computed - exact) / (granted * 2.0**-24 / 2 + 2.0**-120)
    assert off.max() <= 1, (float(off.max()), float(FLOATS[off.argmax()]))


@pytest.mark.parametrize("name", EXACT)
def test_constants_are_the_largest_slopes(name):
    """Above the slope everywhere, the least below it, and both reached to a millionth."""
    entry = TABLE[name]
    with mpmath.workprec(200):
        points = [mpmath.mpf(float(x)) for x in [*np.linspace(-9, 9, 1201), -1e7, 1e7]]
        tiny = mpmath.mpf(2) ** -60

        def slope(x):
            return (EXACT[name](x + tiny) - EXACT[name](x)) / tiny

        slopes = [slope(x) for x in points]
        rough = [float(s) for s in slopes]
        for extreme in (points[int(np.argmax(rough))], points[int(np.argmin(rough))]):
            slopes += [slope(extreme + mpmath.mpf(k) / 4000) for k in range(-80, 81)]
        largest = max(map(abs, slopes))
        assert entry.constant * (1 - 1e-6) <= largest <= entry.constant * (1 + 2.0**-50)
        assert entry.slopes[0] - 2.0**-50 <= min(slopes) <= entry.slopes[0] + 1e-6
        assert entry.slopes[1] == entry.constant
        assert abs(EXACT[name](mpmath.mpf(0))) <= entry.at_zero


# Their slopes fall and rise, or rise, fall and rise again.
SHAPELESS = {"gelu", "gelu by tanh", "silu", "mish", "hard_silu", "tanh_shrink", "soft_shrink"}
SHAPELESS |= {"soft_shrink 1.1", "sin", "cos"}


@pytest.mark.parametrize("name", EXACT)
def test_slopes_rise_and_fall_as_declared(name):
    entry = TABLE[name]
    convex_to, concave_from = entry.bends
    assert (concave_from <= convex_to) == (name not in SHAPELESS)
    points = np.linspace(-9, 9, 601)
    with mpmath.workprec(200):
        exact = [EXACT[name](mpmath.mpf(float(x))) for x in points]
        rises = np.array([float((b - a) / mpmath.mpf(0.03)) for a, b in itertools.pairwise(exact)])
        before, after = points[1:] <= convex_to, points[:-1] >= concave_from
        assert (np.diff(rises[before]) >= -1e-12).all()
        assert (np.diff(rises[after]) <= 1e-12).all()
        for start, end, slope in entry.pieces:
            inside = [mpmath.mpf(float(x)) for x in points if start <= x <= end]
            for a, b in itertools.pairwise(inside):
                rise = EXACT[name](b) - EXACT[name](a)
                assert abs(rise - mpmath.mpf(slope) * (b - a)) < 1e-50


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.3, 1.0, 1.5])
def test_bends_of_any_slope(slope):
    end = np.inf if slope <= 1 else -np.inf
    for entry in (leaky_relu(slope), clipped_relu(slope, None), parametric_relu(np.array([slope]))):
        assert entry.bends == (end, end)
    assert elu(slope).bends[0] == (-np.inf if slope < 0 else np.inf if slope <= 1 else 0)
    bounded = clipped_relu(slope, 2.0)
    assert bounded.bends == ((2, 0) if 0 <= slope <= 1 else (-np.inf, np.inf))
    assert [piece[2] for piece in bounded.pieces] == [slope, 1, 0]
    assert parametric_relu(np.array([0.5, 1.5])).bends == (-np.inf, np.inf)


@pytest.mark.skipif(not extended.HAS_LONG, reason="longdouble is float64 here")
@pytest.mark.parametrize("name", sorted(extended.ACTIVATIONS))
def test_the_80_bit_reference(name):
    """What the other tests compare with is itself right to 1e-17."""
    x = np.concatenate([np.linspace(-30, 30, 601), np.linspace(-3, 3, 601)])
    values = extended.ACTIVATIONS[name](x.astype(extended.LONG))
    with mpmath.workprec(150):
        for point, value in zip(x, values):
            high = float(value)
            wide = mpmath.mpf(high) + mpmath.mpf(float(value - extended.LONG(high)))
            error = abs(wide - EXACT[name](mpmath.mpf(float(point))))
            assert error <= 2e-17 * (1 + abs(point))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_are_what_keras_computes(name):
    x = np.linspace(-5, 5, 201).astype("float32")
    expected = to_numpy(getattr(keras.activations, name)(keras.ops.convert_to_tensor(x)))
    actual = [float(EXACT[name](mpmath.mpf(float(v)))) for v in x]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)
