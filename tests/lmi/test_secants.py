"""Slopes near a point: never left by secants in 80 bits, exact where they can be."""

import extended
import keras
import numpy as np
import pytest

from keras_lipnext.activations import FUNCTIONS, find_activation, parametric_relu
from keras_lipnext.lipschitz.model import read
from keras_lipnext.lmi._affine import AffineLayer, Chain
from keras_lipnext.lmi._chain import read_chain
from keras_lipnext.lmi._secants import evaluated, pre_activations, secants

pytestmark = pytest.mark.skipif(not extended.HAS_LONG, reason="longdouble is float64 here")

kl, LONG = keras.layers, extended.LONG


def layer_of(*names):
    activations = tuple(find_activation(kl.Activation(name)) for name in names)
    return AffineLayer("a", np.eye(1), np.zeros(1), activations=activations)


def bounds_at(name, v, reach, off=0.0):
    v, off, reach = (np.array(a, "float64", ndmin=2) for a in np.broadcast_arrays(v, off, reach))
    low, high = secants(layer_of(name), v, off, reach)
    return low[0], high[0]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_no_secant_leaves_them(name):
    random = np.random.default_rng(0)
    v = np.concatenate([random.normal(size=150) * 3, random.choice([-3, -1, 0, 1, 3, 6.0], 50)])
    reach = np.exp(random.uniform(-12, 2, 200))
    off = np.where(random.random(200) < 0.5, 0.0, 1e-3 * reach)
    low, high = bounds_at(name, v, reach, off)
    exact = extended.ACTIVATIONS[name]
    shares = LONG(1) * np.concatenate([[-1, 1], random.uniform(-1, 1, 60), [1e-3, -1e-3]])
    for side in (-1, 0, 1):  # where v itself may be
        centre = (v + LONG(side) * off)[:, None]
        other = centre + shares * reach[:, None]
        quotient = (exact(other) - exact(centre)) / (other - centre)
        noise = 1e-18 * (1 + np.abs(exact(other))) / np.abs(other - centre)
        assert (quotient >= low[:, None] - noise).all()
        assert (quotient <= high[:, None] + noise).all()


@pytest.mark.parametrize(
    ("v", "reach", "expected"),
    [
        (1.0, 4.0, (0.25, 1)),
        (-1.0, 4.0, (0, 0.75)),
        (0.0, 1.0, (0, 1)),
        (1.0, 0.5, (1, 1)),
        (-1.0, 0.5, (0, 0)),
        (1.0, 0.0, (1, 1)),
    ],
)
def test_a_relu_by_hand(v, reach, expected):
    (low,), (high,) = bounds_at("relu", v, reach)
    assert (low, high) == pytest.approx(expected, abs=1e-13)
    if expected[0] == expected[1]:  # exactly: the neuron is linear, or dropped
        assert (low, high) == expected


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus", "softsign", "squareplus", "selu"])
def test_they_close_in_on_the_slope(name):
    v = np.array([-2.0, -0.7, 0.4, 1.5])
    low, high = bounds_at(name, v, 1e-5)
    exact = extended.ACTIVATIONS[name]
    step = LONG(1e-7)
    slope = ((exact(v + step) - exact(v - step)) / (2 * step)).astype("float64")
    np.testing.assert_allclose(low, slope, atol=2e-5)
    np.testing.assert_allclose(high, slope, atol=2e-5)


def test_across_the_bend_of_an_s():
    """From tanh at 1 to -0.5: below the slope at 0, above the steepest secant, a tenth off."""
    (_,), (high,) = bounds_at("tanh", 1.0, 1.5)
    steepest = max((np.tanh(1) - np.tanh(v)) / (1 - v) for v in np.linspace(-0.5, 0.9, 500))
    assert steepest < high < min(1, 1.1 * steepest)
    (_,), (mirrored,) = bounds_at("tanh", -1.0, 1.5)
    assert mirrored == pytest.approx(high, rel=1e-12)


def test_activations_in_a_row_have_the_slopes_they_have_anywhere():
    layer = layer_of("leaky_relu", "tanh")
    low, high = secants(layer, np.array([[5.0]]), np.zeros((1, 1)), np.full((1, 1), 1e-3))
    assert (low[0, 0], high[0, 0]) == layer.slopes


def test_off_counts_on_both_sides_of_a_bend():
    """The computed 0.01 may be -0.01 in truth: no exact slope, and the secants of both."""
    (low,), (high,) = bounds_at("relu", 0.01, 0.005, 0.02)
    assert low == 0 and high == 1


def test_an_activation_of_another_shape_is_refused():
    activation = parametric_relu(np.full((2, 3), 0.5))
    with pytest.raises(ValueError, match="each entry of a vector"):
        evaluated(activation, np.zeros((1, 3)))


def bent():
    """A chain with everything that rounds: Rescaling, products, statistics, saturation."""
    random = np.random.default_rng(7)
    normalization = kl.BatchNormalization()
    model = keras.Sequential(
        [
            keras.Input((5,)),
            kl.Rescaling(1 / 3, -0.7),
            kl.Dense(7),
            normalization,
            kl.Activation("tanh"),
            kl.Dense(6),
            kl.Dense(6, "softplus"),
            kl.LeakyReLU(0.3),
            kl.Rescaling(0.1, 5.0),
            kl.Dense(3),
        ]
    )
    for weight in model.weights:
        weight.assign(random.uniform(0.5, 2, weight.shape) * random.choice([-1, 1], weight.shape))
    normalization.moving_variance.assign(random.uniform(0.1, 4, 7))
    return model


def test_pre_activations_are_within_their_errors_and_those_are_small():
    model, x = bent(), np.random.default_rng(8).normal(size=(40, 5))
    logits, off = pre_activations(read_chain(model), x)[-1]
    exact = extended.logits(read(model), x)
    assert (np.abs(logits - exact) <= off).all()
    assert (off < 1e-11).all()
    # No bound so large that it would hide a wrong one.
    assert np.median(off / np.maximum(np.abs(logits - exact), 1e-17)) < 1e4


@pytest.mark.parametrize(("error", "bias_error", "least"), [(0.5, 0.0, 2.5), (0.0, 0.25, 0.25)])
def test_every_source_of_error_counts(error, bias_error, least):
    """Of a matrix off by 0.5, at (3, 4), up to 2.5; of its bias; each times 2 behind it."""
    relu = layer_of("relu").activations
    first = AffineLayer("a", np.zeros((1, 2)), np.ones(1), error, relu, np.full(1, bias_error))
    second = AffineLayer("b", np.full((1, 1), -2.0), np.zeros(1))
    chain = Chain("m", "logits", (first, second))
    (_, one), (_, two) = pre_activations(chain, np.array([[3.0, 4.0]]))
    assert least <= one[0, 0] < 1.5 * least and 2 * least <= two[0, 0] < 3 * least


def test_a_sum_that_cancels_may_lose_all():
    """Any order of it may lose the 1, and more."""
    ones = AffineLayer("c", np.ones((1, 3)), np.zeros(1))
    ((_, off),) = pre_activations(Chain("m", "logits", (ones,)), np.array([[1e16, 1.0, -1e16]]))
    assert 4 < off[0, 0] < 100


def test_biases_that_were_multiplied_are_within_their_errors():
    model = bent()
    layers = {layer.__class__.__name__ + str(i): layer for i, layer in enumerate(model.layers)}
    chain = read_chain(model)
    d = [extended.wide(w) for w in layers["Dense1"].weights]
    gamma, beta, mean, variance = map(extended.wide, layers["BatchNormalization2"].weights)
    factor = gamma / np.sqrt(variance + LONG(model.layers[2].epsilon))
    exact = ((LONG(-0.7) * np.ones(5)) @ d[0] + d[1] - mean) * factor + beta
    apart = np.abs(chain.layers[0].bias - exact)
    assert (apart <= chain.layers[0].bias_error).all() and apart.max() > 0
    assert chain.layers[0].bias_error.max() < 1e-13
    plain = read_chain(keras.Sequential([keras.Input((3,)), kl.Dense(4, "relu"), kl.Dense(2)]))
    assert not any(np.any(layer.bias_error) for layer in plain.layers)
