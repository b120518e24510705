from fractions import Fraction

import keras
import numpy as np
import pytest
from data import to_numpy
from hypothesis import given
from hypothesis import strategies as st

from keras_lipnext import backend
from keras_lipnext.radius import (
    certified_radii,
    certified_radii_float64,
    pairwise_distances,
    pairwise_distances_float64,
)


def test_pairwise_distances():
    kernel = np.random.default_rng(0).normal(size=(7, 5)).astype("float32")
    expected = np.linalg.norm(kernel[:, :, None] - kernel[:, None, :], axis=0)
    actual = to_numpy(pairwise_distances(keras.ops.convert_to_tensor(kernel)))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    exact = pairwise_distances_float64(kernel)
    wide = kernel.astype("float64")
    reference = np.linalg.norm(wide[:, :, None] - wide[:, None, :], axis=0)
    assert (exact >= reference).all()
    np.testing.assert_allclose(exact, reference, rtol=1e-14)


def test_distances_are_rounded_up():
    kernel = np.random.default_rng(0).normal(size=(30, 12))
    distances = pairwise_distances_float64(kernel)
    columns = [[Fraction(v) for v in column] for column in kernel.T]
    for i in range(12):
        for j in range(12):
            exact = sum((a - b) ** 2 for a, b in zip(columns[i], columns[j]))
            assert Fraction(float(distances[i, j])) ** 2 >= exact


@pytest.mark.parametrize("scale", [1e-170, 1e-300, 1e170])
def test_distances_survive_extreme_scales(scale):
    kernel = np.random.default_rng(0).normal(size=(7, 5))
    np.testing.assert_allclose(
        pairwise_distances_float64(scale * kernel) / scale,
        pairwise_distances_float64(kernel),
        rtol=1e-13,
    )


def test_distance_gradients_are_finite():
    kernel = np.random.default_rng(0).normal(size=(7, 5)).astype("float32")
    kernel[:, 3] = kernel[:, 1]
    slope = backend.gradient(pairwise_distances, keras.ops.convert_to_tensor(kernel))
    assert np.isfinite(to_numpy(slope)).all()


def brute_force(logits, distances):
    i = int(np.argmax(logits))
    return min((logits[i] - logits[j]) / distances[i, j] for j in range(len(logits)) if j != i)


@given(st.integers(2, 6), st.integers(0, 10_000))
def test_radii_equal_brute_force_and_are_rounded_down(classes, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(8, classes))
    distances = pairwise_distances_float64(rng.normal(size=(9, classes)))
    predictions, radii, _ = certified_radii_float64(logits, distances)
    expected = np.array([brute_force(z, distances) for z in logits])
    np.testing.assert_array_equal(predictions, logits.argmax(axis=1))
    assert (radii <= expected).all()
    np.testing.assert_allclose(radii, expected, rtol=1e-14)
    with backend.float64_scope():
        tensors = (keras.ops.convert_to_tensor(a) for a in (logits, distances))
        np.testing.assert_allclose(to_numpy(certified_radii(*tensors)), expected, rtol=1e-12)


FAIL_CLOSED = [
    ("tie", [1.0, 1.0, 0.0]),
    ("all equal", [0.0, 0.0, 0.0]),
    ("NaN logit", [2.0, np.nan, 0.0]),
    ("all NaN", [np.nan] * 3),
    ("+inf logit", [np.inf, 0.0, 0.0]),
    ("-inf logit", [2.0, -np.inf, 0.0]),
    ("two +inf", [np.inf, np.inf, 0.0]),
]


@pytest.mark.parametrize("name, logits", FAIL_CLOSED)
def test_fail_closed(name, logits):
    distances = np.ones((3, 3)) - np.eye(3)
    predictions, radii, _ = certified_radii_float64([logits], distances)
    assert radii[0] == 0
    assert (predictions[0] == -1) == (not np.isfinite(logits).all())
    with backend.float64_scope():
        tensors = (keras.ops.convert_to_tensor(np.array(a)) for a in ([logits], distances))
        assert to_numpy(certified_radii(*tensors))[0] == 0


def test_allowances_are_subtracted_and_the_deciding_class_named():
    distances = np.ones((3, 3)) - np.eye(3)
    logits = np.array([[3.0, 2.0, 1.0]] * 3)
    allowances = np.array([[9.0, 0.25, 0.0], [9.0, 0.0, 1.5], [9.0, 1.25, 0.0]])
    _, radii, deciding = certified_radii_float64(logits, distances, allowances)
    np.testing.assert_allclose(radii, [0.75, 0.5, 0.0], rtol=1e-14)
    assert (radii[:2] < [0.75, 0.5]).all()
    np.testing.assert_array_equal(deciding, [1, 2, 1])


@pytest.mark.parametrize("allowance", [np.nan, np.inf])
def test_an_allowance_without_bound_certifies_nothing(allowance):
    _, radii, _ = certified_radii_float64([[1.0, 0.0]], np.ones((2, 2)), np.array([[0, allowance]]))
    assert radii[0] == 0


def test_overflow_never_enlarges_a_radius():
    """Distances or margins past what doubles hold: a finite radius, or none."""
    tiny = np.full((2, 2), 1e-310)
    _, radii, _ = certified_radii_float64([[1.0, 0.0]], tiny)
    assert 0 < radii[0] <= 2.0**1000
    huge = np.full((2, 2), 1e10)
    predictions, radii, _ = certified_radii_float64([[1.7e308, -1.7e308]], huge)
    assert radii[0] == 0
    assert predictions[0] == -1


def test_equal_weight_vectors_give_no_certificate():
    distances = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    _, radii, _ = certified_radii_float64([[1.0 + 1e-15, 1.0, 0.0], [0, 0, 5.0]], distances)
    assert radii[0] == 0
    assert radii[1] == pytest.approx(5.0)
