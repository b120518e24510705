"""Coverage of conformal sets, on clean and on attacked inputs."""

import keras
import numpy as np
import pytest

from keras_lipnext.guarantees import ConformalPredictor, conformal


def problem(samples, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, samples)
    x = rng.normal(size=(samples, 2)) * 0.6 + np.array([[1, 0], [-1, 0], [0, 1]])[y]
    return x.astype("float32"), y


def classifier():
    inputs = keras.Input((2,))
    head = keras.layers.Dense(3)
    model = keras.Model(inputs, head(inputs))
    head.set_weights([np.array([[1, -1, 0], [0, 0, 1]], "float32"), np.zeros(3, "float32")])
    return model


def check_coverage():
    """Every class moved to its worst place in the ball: the linear model's is known exactly."""
    model, epsilon = classifier(), 0.5
    predictor = conformal(model, *problem(400, 0), alpha=0.2)
    x, y = problem(2000, 1)
    kernel = model.get_weights()[0].astype("float64")
    clean = predictor.sets(x)[np.arange(2000), y]
    assert 0.76 < clean.mean() < 0.84
    z = x @ kernel
    z[np.arange(2000), y] = -np.inf
    step = (kernel[:, z.argmax(axis=1)] - kernel[:, y]).T
    attacked = x + epsilon * step / np.linalg.norm(step, axis=1, keepdims=True)
    sets = predictor.sets(attacked, epsilon * (1 + 1e-9))
    # Who is covered clean is covered attacked: not on average alone.
    assert sets[np.arange(2000), y][clean].all()
    assert predictor.sets(attacked)[np.arange(2000), y].mean() < 0.6
    assert sets.sum(axis=1).mean() < 2.9


def test_coverage():
    check_coverage()


def test_a_constant_that_is_too_small_is_found(monkeypatch):
    real = ConformalPredictor.sets
    monkeypatch.setattr(
        ConformalPredictor, "sets", lambda self, x, epsilon=0.0: real(self, x, 0.97 * epsilon)
    )
    with pytest.raises(AssertionError):
        check_coverage()


def test_the_quantile_has_the_correction_of_finite_samples():
    model, (x, y) = classifier(), problem(9, 0)
    z = x.astype("float64") @ model.get_weights()[0]
    own = z[np.arange(9), y].copy()
    z[np.arange(9), y] = -np.inf
    scores = np.sort(z.max(axis=1) - own)
    assert conformal(model, x, y, 0.1).threshold == pytest.approx(scores[8])
    assert conformal(model, x, y, 0.5).threshold == pytest.approx(scores[4])
    few = conformal(model, x, y, 0.05)
    assert few.threshold == np.inf and few.sets(x).all()


def test_fails_closed():
    model, (x, y) = classifier(), problem(20, 0)
    predictor = conformal(model, x, y)
    assert predictor.sets(np.full((1, 2), np.nan)).all()
    for alpha in (0, 1, 2):
        with pytest.raises(ValueError, match="alpha"):
            conformal(model, x, y, alpha)
    with pytest.raises(ValueError, match="epsilon"):
        predictor.sets(x, -1)
    model.set_weights([2 * w for w in model.get_weights()])
    with pytest.raises(ValueError, match="hash"):
        predictor.sets(x)
