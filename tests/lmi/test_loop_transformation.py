import keras
import numpy as np
import pytest
from data import to_numpy

from keras_lipnext import backend, lmi
from keras_lipnext.lmi.loop_transformation import convex_form

ACTIVATIONS = ["relu", "tanh", "sigmoid", "gelu", "silu", keras.layers.LeakyReLU(0.2), "softplus"]


def network(units=(7, 5, 6), activation="relu", scale=1.0, seed=0):
    model = keras.Sequential([keras.layers.Rescaling(2.0, offset=-0.5)])
    for n in units:
        model.add(keras.layers.Dense(n, activation=activation))
    model.add(keras.layers.Dense(3))
    model.build((None, 4))
    random = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(scale * random.normal(size=weight.shape))
    return model


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("units", [(), (7,), (7, 5, 6)])
def test_the_transformed_network_is_the_original(activation, units):
    """To rounding, in float64 against the model rebuilt in float64."""
    model = network(units, activation)
    transformed = lmi.loop_transformation(model)
    x = np.random.default_rng(1).normal(size=(20, 4))
    with backend.float64_scope(), backend.inference_scope():
        value = keras.ops.convert_to_tensor(2.0 * x - 0.5)
        for layer in model.layers[1:]:
            kernel, bias = (to_numpy(w).astype("float64") for w in layer.weights)
            kernel, bias = map(keras.ops.convert_to_tensor, (kernel, bias))
            value = keras.ops.matmul(value, kernel) + bias
            if layer is not model.layers[-1]:
                value = layer.activation(value)
        expected = to_numpy(value)
    assert expected.dtype == "float64"
    # Keras passes some constants of activations on as float32.
    exact = activation in ("relu", "tanh", "sigmoid", "silu", "softplus")
    np.testing.assert_allclose(transformed(x), expected, rtol=1e-8 if exact else 1e-5)
    np.testing.assert_allclose(transformed(x), to_numpy(model(x)), rtol=1e-3, atol=1e-3)
    for i, size in enumerate(units):  # strictly lower block triangular
        rows = slice(sum(units[:i]), sum(units[:i]) + size)
        assert not transformed.F[rows, rows.start :].any()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_psi_is_1_lipschitz(activation):
    (psi,) = lmi.loop_transformation(network((7,), activation)).psi
    v = np.linspace(-6, 6, 20001)
    slopes = np.diff(psi(v[:, None])[:, 0]) / np.diff(v)
    assert np.abs(slopes).max() <= 1 + 1e-6
    assert slopes.max() > 0.98  # and the range of slopes is no wider than it must be


def test_the_condition_bounds_the_constant():
    """The smallest L with fixed multipliers is above all difference quotients, not by much."""
    transformed = lmi.loop_transformation(network((7,)))
    random = np.random.default_rng(0)
    x = random.normal(size=(4000, 4)) * 2
    dx = random.normal(size=x.shape) * 1e-6
    quotients = np.linalg.norm(transformed(x + dx) - transformed(x), axis=1)
    lower = (quotients / np.linalg.norm(dx, axis=1)).max()
    proven = lmi.lipsdp(network((7,)), time_limit=60)
    multipliers = 2 * np.ones(7)

    def holds(lipschitz, multipliers):
        return np.linalg.eigvalsh(transformed.quadratic_form(lipschitz, multipliers))[0] >= 0

    assert not holds(lower * 0.99, multipliers * lower**2)
    found = [
        (lipschitz, scale)
        for lipschitz in np.geomspace(lower, 50 * lower, 60)
        for scale in np.geomspace(1e-2, 1e4, 40)
        if holds(lipschitz, scale * multipliers)
    ]
    lipschitz, _ = min(found)
    assert proven.constant * 0.999 <= lipschitz <= 3 * proven.constant


def test_the_convex_form():
    """Positive semidefinite iff the quadratic form is, and linear: the admissible are convex."""
    transformed = lmi.loop_transformation(network((7, 5), scale=0.3))
    random = np.random.default_rng(0)
    answers = []
    for lipschitz in np.geomspace(0.1, 100, 12):
        multipliers = lipschitz * np.exp(0.2 * random.normal(size=12))
        lowest = np.linalg.eigvalsh(transformed.quadratic_form(lipschitz, multipliers))[0]
        convex = np.linalg.eigvalsh(transformed.convex_form(lipschitz, multipliers))[0]
        answers.append(lowest >= 0)
        assert (convex >= -1e-9) == (lowest >= -1e-9)
    assert set(answers) == {False, True}
    one, two = (
        (random.random(), random.random(5), random.normal(size=(3, 9)), random.normal(size=(5, 9)))
        for _ in range(2)
    )
    identity = convex_form(0.0, np.zeros(5), np.zeros((3, 9)), np.zeros((5, 9)))
    middle = [(p + q) / 2 for p, q in zip(one, two)]
    np.testing.assert_allclose(
        convex_form(*middle), (convex_form(*one) + convex_form(*two)) / 2, atol=1e-12
    )
    assert (identity[4 + 5 : 4 + 5 + 3, 4 + 5 : 4 + 5 + 3] == np.eye(3)).all()
