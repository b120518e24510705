import keras
import numpy as np
import pytest
from data import to_numpy
from hypothesis import given
from hypothesis import strategies as st
from manifolds.test_polar import SHAPES

from keras_lipnext import backend
from keras_lipnext.manifolds import orthogonalize
from keras_lipnext.manifolds.orthogonalize import LARGEST, scales


def singular_values(x):
    return np.linalg.svd(to_numpy(x).astype("float64"), compute_uv=False)


@given(st.sampled_from(SHAPES), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]), st.integers(0, 1000))
def test_singular_values_come_close_to_one(shape, scale, seed):
    m = scale * np.random.default_rng(seed).normal(size=shape)
    u, s, vh = np.linalg.svd(m, full_matrices=False)
    with backend.float64_scope():
        result = to_numpy(orthogonalize(m))
    # The bound of the largest singular value is that of the fourth powers.
    share = s / (s**4).sum(axis=-1, keepdims=True) ** 0.25
    values = np.einsum("...ji,...jk,...lk->...il", u, result, vh)
    diagonal = np.diagonal(values, axis1=-2, axis2=-1)
    assert (diagonal < 1.23).all()
    assert (diagonal[share >= 0.02] > 0.77).all()
    np.testing.assert_allclose(values, diagonal[..., None] * np.eye(s.shape[-1]), atol=1e-12)


@pytest.mark.parametrize("steps", range(1, 9))
def test_every_number_of_steps_has_the_bound_that_a_rotation_takes_for_granted(steps):
    """The default interval of singular values: the largest come out just below the bound."""
    s = np.geomspace(1e-4, 1, 80)
    largest = singular_values(orthogonalize(np.diag(s).astype("float32"), steps=steps)).max()
    assert 1.19 < largest < LARGEST == 1.23


def test_more_steps_reach_smaller_values():
    m = np.diag([1.0, 0.5, 0.1, 1e-3])
    with backend.float64_scope():
        few, many = (singular_values(orthogonalize(m, steps=s, smallest=1e-3)) for s in (2, 8))
    assert few.min() < 0.05
    np.testing.assert_allclose(many, 1, atol=0.1)


@pytest.mark.parametrize("smallest", [0.02, 1e-3])  # in float32 the latter takes the plain steps
@pytest.mark.parametrize("shape", [(48, 6), (6, 48)])
def test_much_taller_matrices_take_the_same_steps(shape, smallest):
    """In float32, with singular values from 1 to far below `smallest`."""
    n = min(shape)
    rng = np.random.default_rng(0)
    u, _, vh = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = np.geomspace(1, 1e-6, n)
    expected = s / (s**4).sum() ** 0.25
    factors, last = scales(smallest, 4)
    for a in factors:
        expected = a * expected * (3 - (a * expected) ** 2) / 2
    m = ((u * s) @ vh).astype("float32")
    result = to_numpy(orthogonalize(m, smallest=smallest)).astype("float64")
    np.testing.assert_allclose(result, (u * (last * expected)) @ vh, atol=3e-5)


def test_scales_map_the_interval_to_the_shortest():
    """The ends of the interval meet, and no other scale gives a shorter one."""

    def image(low, scale):
        z = scale * np.linspace(low, 1, 1001)
        values = z * (3 - z**2) / 2
        return values.min() / values.max()

    for low in (0.02, 0.3):
        (scale,), _ = scales(low, 1)
        assert image(low, scale) > max(image(low, scale * f) for f in (0.99, 1.01))


def test_skew_stays_skew():
    m = np.random.default_rng(0).normal(size=(8, 8)).astype("float32")
    result = to_numpy(orthogonalize(m - m.T))
    np.testing.assert_allclose(result, -result.T, atol=1e-6)
    np.testing.assert_allclose(singular_values(result), 1, atol=0.23)


def test_zero_stays_zero():
    m = np.stack([np.zeros((3, 3)), np.eye(3)]).astype("float32")
    result = to_numpy(orthogonalize(m))
    np.testing.assert_array_equal(result[0], 0)
    np.testing.assert_allclose(singular_values(result[1]), 1, atol=0.23)


def test_half_precision():
    m = keras.ops.cast(np.random.default_rng(0).normal(size=(4, 6)), "bfloat16")
    result = orthogonalize(m)
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    values = singular_values(keras.ops.cast(result, "float32"))
    np.testing.assert_allclose(values, 1, atol=0.25)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_stays_non_finite(bad):
    m = np.eye(3, dtype="float32")
    m[0, 1] = bad
    assert not np.isfinite(to_numpy(orthogonalize(m))).all()
