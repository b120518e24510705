import keras
import numpy as np
import pytest
import scipy.linalg
from data import to_numpy
from hypothesis import given
from hypothesis import strategies as st
from manifolds.test_fast_exp import NORMS, SIZES, random_skew

from keras_lipnext import backend
from keras_lipnext.manifolds import rotate


def rotation(d):
    """p(D), in the dtype of d."""
    identity = np.broadcast_to(np.eye(d.shape[-1], dtype=d.dtype), d.shape)
    return to_numpy(rotate(keras.ops.convert_to_tensor(identity), keras.ops.convert_to_tensor(d)))


@given(st.sampled_from(SIZES), st.sampled_from(NORMS), st.integers(0, 100))
def test_it_is_a_rotation_close_to_the_exponential(n, norm, seed):
    d = random_skew(n, norm, seed)
    with backend.float64_scope():
        p = rotation(d)
    # Of the truncation at most two epsilons; squaring doubles the rounding of what is halved.
    assert np.abs(p.T @ p - np.eye(n)).max() < 2e-15 * max(1, norm) + 3e-16 * n
    # Halved s times, D leaves 2^s (||D|| / 2^s)^3 / 49 <= ||D||^3 / 49.
    third = norm**3 / (6 if norm < 2e-4 else 49)
    assert np.linalg.norm(p - scipy.linalg.expm(d), 2) <= 1.001 * third + 1e-14 * max(1, norm)


@pytest.mark.parametrize("n", [2, 64, 200])
@pytest.mark.parametrize("norm", [1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 100.0])
def test_float32_leaves_about_one_epsilon(n, norm):
    p = rotation(random_skew(n, norm, 0).astype("float32")).astype("float64")
    assert np.abs(p.T @ p - np.eye(n)).max() < 2.0**-23 * (6 + 2 * norm)


@pytest.mark.parametrize("norm", [0.02, 0.03, 0.2, 0.38])
def test_the_defect_is_the_polynomials(norm):
    """Just below a threshold a low order has the most to do, and where p^T p - I is known."""
    d = random_skew(2, norm, 0).astype("float32")
    p = rotation(d).astype("float64")
    c = (1 - 0.5**0.5) / 2
    # In one plane the quadratic is a rotation.
    exact = 0 if norm**4 / 16 < 2.0**-22 else c**4 * norm**8
    np.testing.assert_allclose(p.T @ p, (1 + exact) * np.eye(2), atol=2e-7)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("norm", [0.03, 0.12, 0.38, 2.0])
def test_one_plane_turning_in_many_dimensions(norm, given):
    """All of D in one plane that is spread over all entries: small entries, a large norm."""
    u, v = (np.linalg.qr(np.random.default_rng(0).normal(size=(400, 2)))[0]).T
    d = norm * (np.outer(u, v) - np.outer(v, u))
    d, identity = (keras.ops.convert_to_tensor(a.astype("float32")) for a in (d, np.eye(400)))
    p = to_numpy(rotate(identity, d, norm if given else None)).astype("float64")
    assert abs(np.linalg.norm(p, 2) - 1) < 2.0**-23 + 2e-7


def test_a_known_norm_decides_what_is_computed():
    d = random_skew(64, 0.03, 0).astype("float32")
    loose = rotation(d)
    identity = keras.ops.eye(64)
    tight = to_numpy(rotate(identity, keras.ops.convert_to_tensor(d), 0.03))
    np.testing.assert_allclose(tight, np.eye(64) + d + d @ d / 2, atol=1e-7)
    assert np.abs(tight - loose).max() > 2e-7


def test_other_members_of_a_batch_do_not_suffer_from_one():
    d = np.stack([random_skew(4, 0.5, 0), np.full((4, 4), np.nan)])
    with backend.float64_scope():
        np.testing.assert_allclose(rotation(d)[0], rotation(d[:1])[0], atol=1e-15)


def test_a_batch_takes_the_polynomial_of_its_largest_member():
    d = random_skew(6, 2.0, 0, batch=(3,))
    d[0] *= 1e-6
    with backend.float64_scope():
        p = rotation(d)
    np.testing.assert_allclose(
        p.swapaxes(1, 2) @ p, np.broadcast_to(np.eye(6), d.shape), atol=5e-15
    )


def test_it_rotates_from_the_right():
    x, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    d = random_skew(5, 0.01, 0)
    with backend.float64_scope():
        moved = to_numpy(rotate(*map(keras.ops.convert_to_tensor, (x, d))))
    np.testing.assert_allclose(moved, x @ scipy.linalg.expm(d), atol=1e-7)


@pytest.mark.parametrize("norm", [1e12, np.inf])
def test_a_useless_bound_of_the_norm_does_no_harm(norm):
    d = random_skew(6, 0.5, 0).astype("float32")
    tensors = map(keras.ops.convert_to_tensor, (np.eye(6, dtype="float32"), d))
    p = to_numpy(rotate(*tensors, norm=norm, period=8)).astype("float64")
    assert np.abs(p.T @ p - np.eye(6)).max() < 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_stays_non_finite(bad):
    d = np.zeros((4, 4), "float32")
    d[0, 1], d[1, 0] = bad, -bad
    assert not np.isfinite(rotation(d)).all()


def planted(angles, seed=0):
    """Skew-symmetric, of these angles, in random planes."""
    n = 2 * len(angles)
    d = np.zeros((n, n))
    d[np.arange(0, n, 2), np.arange(1, n, 2)] = angles
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    d = q @ d @ q.T
    return d - d.T


@pytest.mark.parametrize("angle", [1e-4, 1e-3, 1e-2])
def test_the_quadratic_is_exact_where_all_angles_are_alike(angle):
    d, identity = planted([angle] * 8), np.eye(16)
    with backend.float64_scope():
        p = to_numpy(rotate(*map(keras.ops.convert_to_tensor, (identity, d)), period=1e-9))
    np.testing.assert_allclose(p.T @ p, identity, atol=1e-15)
    b = 1 / (1 + np.sqrt(1 - angle**2))
    quadratic = identity + d + b * d @ d
    np.testing.assert_allclose(p, quadratic, atol=1e-15)


@given(
    st.sampled_from([1, 2, 5, 12]).flatmap(
        lambda n: st.lists(st.floats(0, 1), min_size=n, max_size=n)
    ),
    st.floats(1e-5, 0.5),
)
def test_callers_who_orthonormalise_get_at_most_sqrt_epsilon(angles, scale):
    d = planted(scale * np.array(angles))
    n = len(d)
    with backend.float64_scope():
        tensors = map(keras.ops.convert_to_tensor, (np.eye(n), d))
        p = to_numpy(rotate(*tensors, period=8))
    defect = p.T @ p - np.eye(n)
    assert np.linalg.norm(defect, 2) < 2.0**-26 + 1e-14
    # What gathers in eight such steps is not visible above rounding, root mean square.
    assert 8 * np.linalg.norm(defect) / np.sqrt(n) < 6 * 2.0**-52 * np.sqrt(n) + 1e-14


@pytest.mark.parametrize(
    "largest, period",
    [
        (0.01, 8),  # below sqrt(epsilon) in a step, but far from invisible
        (0.3, 1e-9),  # nothing gathers, but one step leaves more than sqrt(epsilon)
    ],
)
def test_both_conditions_of_the_quadratic_are_kept(largest, period):
    d = planted(largest * np.linspace(0.1, 1, 8))
    with backend.float64_scope():
        tensors = map(keras.ops.convert_to_tensor, (np.eye(16), d))
        p = to_numpy(rotate(*tensors, period=period))
    assert np.abs(p.T @ p - np.eye(16)).max() < 1e-14


def test_noise_leaves_less_by_the_quadratic_than_by_taylors():
    d = np.random.default_rng(0).normal(size=(200, 200)) * 1e-4
    d = (d - d.T) / np.sqrt(2)
    identity = np.eye(200)
    with backend.float64_scope():
        tensors = map(keras.ops.convert_to_tensor, (identity, d))
        p = to_numpy(rotate(*tensors, period=1e-9))  # lets the quadratic pass
    defect = p.T @ p - identity
    assert abs(np.trace(defect)) < 1e-13  # Taylor's: 4e-10
    share = np.linalg.norm(defect) / np.sqrt(200) / (200**2 * 1e-16)
    assert 0.33 < share < 0.37  # of n^2 lr^4; Taylor's leaves 0.94
