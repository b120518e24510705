"""Lower bounds of W1: below the distance of samples whose distance is known."""

import keras
import numpy as np
import pytest
from data import saturating

from keras_lipnext.guarantees import wasserstein
from keras_lipnext.guarantees.enclose import Outputs


def critic(kernel):
    inputs = keras.Input((len(kernel),))
    layer = keras.layers.Dense(1)
    model = keras.Model(inputs, layer(inputs))
    layer.set_weights([np.asarray(kernel, "float32"), np.array([7.0], "float32")])
    return model


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e6])
def test_a_translation(scale):
    """W1 is the length of the shift; the linear critic along it is the best."""
    rng = np.random.default_rng(0)
    p = rng.integers(-8, 8, size=(40, 2)) / 8
    bound = wasserstein(critic(scale * np.array([[0.75], [1.0]])), p + np.array([3, 4]), p)
    assert 5 * (1 - 1e-9) < bound.lower_bound <= 5
    assert bound.constant == pytest.approx(1.25 * abs(scale), rel=1e-12)
    weak = bound.of_distributions(diameter=8.0, delta=0.05)
    deviation = 8 * np.sqrt(2 / 40 * np.log(40) / 2)
    assert weak == pytest.approx(5 - deviation, rel=1e-6) and weak < 5 - deviation
    with pytest.raises(ValueError, match="further apart"):
        bound.of_distributions(diameter=4.9)
    assert "at least" in str(bound)


def test_random_critics_never_exceed_the_distance_on_the_line():
    """On the line W1 is the mean distance of the sorted samples."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(30, 1)), rng.normal(1, 2, size=(30, 1))
    exact = np.abs(np.sort(p, axis=0) - np.sort(q, axis=0)).mean()
    for seed in range(4):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((1,))
        x = keras.layers.Dense(8, activation="tanh")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1)(x))
        assert 0 <= wasserstein(model, p, q).lower_bound <= exact


def test_nothing_overflows():
    far = np.full((3, 1), 1.7e308)
    bound = wasserstein(critic([[1e-10]]), far, -far)
    assert 1e308 < bound.lower_bound < np.inf  # of 3.4e308
    with pytest.raises(ValueError, match="not finite"):
        wasserstein(saturating(), np.array([[3e155, 4e155]]), np.zeros((1, 2)))


def test_what_is_refused():
    x = np.zeros((2, 2))
    with pytest.raises(ValueError, match="not finite"):
        wasserstein(critic(np.ones((2, 1))), x, x + np.nan)
    inputs = keras.Input((2,))
    with pytest.raises(ValueError, match="one output"):
        wasserstein(keras.Model(inputs, keras.layers.Dense(2)(inputs)), x, x)
    bound = wasserstein(critic(np.ones((2, 1))), x, x)
    assert bound.lower_bound == 0
    for arguments in ({"diameter": -1}, {"diameter": 1, "delta": 0}):
        with pytest.raises(ValueError):
            bound.of_distributions(**arguments)


def test_a_constant_that_is_too_small_is_found(monkeypatch):
    real = Outputs._bounded
    changed = lambda *a: (real(*a)[0], 0.999 * real(*a)[1])  # noqa: E731
    monkeypatch.setattr(Outputs, "_bounded", changed)
    with pytest.raises(AssertionError):
        test_a_translation(1.0)
