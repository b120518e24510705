import keras
import numpy as np
import pytest
import scipy.linalg
from data import to_numpy
from hypothesis import given
from hypothesis import strategies as st

from keras_lipnext import backend
from keras_lipnext.manifolds import fast_exp
from keras_lipnext.manifolds.fast_exp import skew_norm as spectral_norm_bound


def random_skew(n, norm, seed, batch=()):
    a = np.random.default_rng(seed).normal(size=(*batch, n, n))
    a = a - np.swapaxes(a, -1, -2)
    largest = np.linalg.norm(a, 2, axis=(-2, -1)).max() if n > 1 else 1
    return a * (norm / max(largest, 1e-300))


SIZES = [1, 2, 3, 8, 12]
NORMS = [0.0, 1e-9, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0, 2.0, 3.1416, 30.0, 1e3]


@given(st.sampled_from(SIZES), st.sampled_from(NORMS), st.integers(0, 100))
def test_equals_scipy_in_float64(n, norm, seed):
    d = random_skew(n, norm, seed)
    with backend.float64_scope():
        result = to_numpy(fast_exp(d))
    # Squaring doubles relative errors: they grow with the norm.
    np.testing.assert_allclose(result, scipy.linalg.expm(d), atol=5e-14 * max(1, norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", [2, 16, 64])
def test_is_never_silently_inaccurate_in_float32(n, norm):
    """Whatever the branch, the error stays at working precision; LipNeXt's reaches 8e-3."""
    d = random_skew(n, norm, 0).astype("float32")
    expected = scipy.linalg.expm(d.astype("float64"))
    np.testing.assert_allclose(to_numpy(fast_exp(d)), expected, atol=2e-6 * max(1, norm))


def test_a_step_of_adam_at_a_large_rate():
    """All entries +-lr: the Frobenius norm grows like lr * n, and so may the spectral one."""
    n, rate = 64, 0.1
    d = rate * np.sign(random_skew(n, 1, 3))
    worst = rate * (np.triu(np.ones((n, n)), 1) - np.tril(np.ones((n, n)), -1))
    for case in (d, worst):
        expected = scipy.linalg.expm(case)
        np.testing.assert_allclose(to_numpy(fast_exp(case.astype("float32"))), expected, atol=2e-5)


@given(st.sampled_from(SIZES), st.integers(0, 1000))
def test_the_spectral_bound_is_one(n, seed):
    d = random_skew(n, 2.5, seed)
    with backend.float64_scope():
        bound = float(spectral_norm_bound(*map(keras.ops.convert_to_tensor, (d, d @ d))))
    assert bound >= np.linalg.norm(d, 2) * (1 - 1e-14)


def test_batches_use_their_largest_member():
    d = random_skew(6, 5.0, 0, batch=(3,))
    d[0] *= 1e-6
    with backend.float64_scope():
        result = to_numpy(fast_exp(d))
    np.testing.assert_allclose(result, [scipy.linalg.expm(m) for m in d], atol=1e-13)


def test_half_precision():
    d = keras.ops.cast(random_skew(6, 0.5, 0), "bfloat16")
    result = fast_exp(d)
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    expected = scipy.linalg.expm(to_numpy(keras.ops.cast(d, "float32")).astype("float64"))
    np.testing.assert_allclose(to_numpy(keras.ops.cast(result, "float32")), expected, atol=0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_stays_non_finite(bad):
    d = np.zeros((4, 4), "float32")
    d[0, 1], d[1, 0] = bad, -bad
    assert not np.isfinite(to_numpy(fast_exp(d))).all()


def test_rectangular_is_refused():
    with pytest.raises(ValueError, match=r"square matrices. Received: shape=\(3, 4\)"):
        fast_exp(np.zeros((3, 4)))
