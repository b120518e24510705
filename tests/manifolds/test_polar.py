import keras
import numpy as np
import pytest
from data import called, to_numpy, traced
from hypothesis import given
from hypothesis import strategies as st

from keras_lipnext import backend
from keras_lipnext.manifolds import newton_schulz, polar, polar_svd


def numpy_polar(x):
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def near_stiefel(shape, distance, seed):
    """A random matrix with singular values in [1 - distance, 1 + distance]."""
    rng = np.random.default_rng(seed)
    u, s, vh = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = 1 + distance * rng.uniform(-1, 1, size=s.shape)
    return (u * s[..., None, :]) @ vh


SHAPES = [(1, 1), (1, 5), (5, 1), (6, 6), (12, 5), (5, 12), (3, 7, 4), (2, 3, 4, 4), (2, 16, 5)]


@given(
    st.sampled_from(SHAPES),
    st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.03, 0.1, 0.3, 0.6, 0.9]),
    st.integers(0, 1000),
)
def test_equals_svd_in_float64(shape, distance, seed):
    x = near_stiefel(shape, distance, seed)
    with backend.float64_scope():
        result = to_numpy(polar(x))
    np.testing.assert_allclose(result, numpy_polar(x), atol=2e-14)


@given(st.sampled_from(SHAPES), st.sampled_from([1e-4, 1.0, 1e4]), st.integers(0, 1000))
def test_far_from_the_manifold(shape, scale, seed):
    x = scale * np.random.default_rng(seed).normal(size=shape)
    with backend.float64_scope():
        result = to_numpy(polar(x))
    conditioning = 1 / np.linalg.svd(x / scale, compute_uv=False).min()
    np.testing.assert_allclose(result, numpy_polar(x), atol=1e-13 * conditioning)


def test_every_switching_point_reaches_working_precision():
    """Just below a threshold the fewest steps have the most to do."""
    for distance in np.geomspace(1e-9, 0.9, 120):
        x = near_stiefel((4, 4), distance, 1)
        with backend.float64_scope():
            result = to_numpy(polar(x))
        assert np.abs(result.T @ result - np.eye(4)).max() < 5e-15


def test_a_batch_takes_as_many_steps_as_its_worst_member():
    x = np.stack([near_stiefel((4, 4), d, 1) for d in (0.0, 0.3, 1e-5, 0.8)])
    with backend.float64_scope():
        result = to_numpy(polar(x))
    np.testing.assert_allclose(result, numpy_polar(x), atol=2e-14)


@pytest.mark.parametrize("distance", [0.0, 1e-5, 1e-3, 0.03, 0.1, 0.3, 0.6, 0.9])
def test_float32_reaches_working_precision(distance):
    x = near_stiefel((64, 32), distance, 0).astype("float32")
    result = to_numpy(polar(x)).astype("float64")
    assert np.abs(result.T @ result - np.eye(32)).max() < 1.5e-6
    np.testing.assert_allclose(result, numpy_polar(x.astype("float64")), atol=2e-6)


def test_newton_schulz_squares_the_defect():
    x = near_stiefel((10, 10), 1e-3, 0)
    before = np.abs(x.T @ x - np.eye(10)).max()
    with backend.float64_scope():
        y = to_numpy(newton_schulz(keras.ops.convert_to_tensor(x), steps=1))
    assert np.abs(y.T @ y - np.eye(10)).max() < 10 * before**2


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="counted as they run")
@pytest.mark.parametrize(
    "distance, most",
    [
        (1e-5, 2),  # one Newton-Schulz step
        (1e-3, 6),  # of the size of a step by an ordinary optimizer: noise
        (0.02, 6),
    ],
)
def test_the_number_of_products_grows_with_the_distance(distance, most, monkeypatch):
    """What little has moved, as after each step of any optimizer, is put back cheaply."""
    import sys

    module, counted = sys.modules["keras_lipnext.manifolds.polar"], []
    real = module.matmul
    monkeypatch.setattr(module, "matmul", lambda *a: counted.append(1) or real(*a))
    x = near_stiefel((200, 200), distance, 0).astype("float32")
    result = to_numpy(polar(x)).astype("float64")
    assert len(counted) <= most
    assert np.abs(result.T @ result - np.eye(200)).max() < 1.5e-6


@pytest.mark.parametrize("distance", [1e-6, 0.03, 0.1, 0.7, 1.0])
def test_inside_a_program_it_is_the_same(distance):
    """Where loop and decomposition are compiled, needed or not."""
    x = near_stiefel((9, 5), distance, 0).astype("float32")
    inside = to_numpy(traced(polar)(keras.ops.convert_to_tensor(x)))
    np.testing.assert_allclose(to_numpy(polar(x)), inside, rtol=0, atol=3e-7)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="what JAX compiles")
def test_nothing_is_compiled_that_is_not_needed(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("decomposed")

    monkeypatch.setattr("jax.numpy.linalg.svd", refuse)
    x = near_stiefel((23, 17), 1e-5, 0).astype("float32")
    result = to_numpy(polar(x))
    assert np.abs(result.T @ result - np.eye(17)).max() < 1.5e-6
    with pytest.raises(AssertionError, match="decomposed"):
        called(polar, x)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="what JAX traces")
def test_a_constant_of_a_program():
    x = keras.ops.convert_to_tensor(near_stiefel((9, 5), 0.03, 0), "float32")
    expected = 1 + to_numpy(polar(x))
    np.testing.assert_allclose(called(lambda y: y + polar(x), np.ones((9, 5))), expected, atol=1e-6)


@pytest.mark.parametrize("project", [polar, traced(polar)], ids=["at once", "traced"])
@pytest.mark.parametrize("factor", [1e-3, 0.07, 0.3, 3.0])
def test_multiples_of_orthogonal_matrices(factor, project):
    """Scaled, they are orthogonal: but for rounding, which grew with them."""
    for x in (np.eye(64), np.eye(4096, 8), near_stiefel((64, 64), 0, 0)):
        result = to_numpy(project(keras.ops.convert_to_tensor((factor * x).astype("float32"))))
        np.testing.assert_allclose(result, x, atol=1e-6)
        gram = result.T.astype("float64") @ result
        assert np.abs(gram - np.eye(x.shape[1])).max() < 1.5e-6


@pytest.mark.parametrize("project", [polar, traced(polar)], ids=["at once", "traced"])
def test_small_matrices_are_not_turned(project):
    """An error of the Gram matrix before they are scaled would leave another orthogonal matrix."""
    x = np.zeros((1024, 2))
    x[:2] = [[1, 0.5], [-0.3, 0.9]]
    for factor in (1e-3, 0.016, 0.017, 0.1):
        result = to_numpy(project(keras.ops.convert_to_tensor((factor * x).astype("float32"))))
        np.testing.assert_allclose(result, numpy_polar(x), atol=3e-7)


@pytest.mark.parametrize("project", [polar, traced(polar)], ids=["at once", "traced"])
@pytest.mark.parametrize("value", [0, 1])
def test_rank_deficient(value, project):
    """Alone and beside others."""
    for x in (np.full((1, 4, 4), value), np.stack([np.eye(4), np.full((4, 4), value)])):
        for result in to_numpy(project(keras.ops.convert_to_tensor(x.astype("float32")))):
            assert np.abs(result.T @ result - np.eye(4)).max() < 2e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_stays_non_finite(bad):
    x = np.eye(4, dtype="float32")
    x[0, 0] = bad
    assert not np.isfinite(to_numpy(polar(x))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
def test_other_members_of_a_batch_do_not_suffer_from_one(bad):
    """Neither where steps suffice nor where one must be decomposed."""
    for other in (1.3 * np.eye(3), np.diag([1.0, 0.5, 1e-7]), np.ones((3, 3))):
        x = np.stack([other, np.full((3, 3), bad)]).astype("float32")
        for project in (polar, traced(polar)):
            result = to_numpy(project(keras.ops.convert_to_tensor(x)))[0].astype("float64")
            assert np.abs(result.T @ result - np.eye(3)).max() < 2e-6


@pytest.mark.parametrize("scale", [1e-18, 1e20, 1e37])
def test_tiny_and_huge_matrices(scale):
    x = near_stiefel((5, 3), 0.3, 0)
    result = to_numpy(polar((scale * x).astype("float32")))
    np.testing.assert_allclose(result, numpy_polar(x), atol=2e-6)


@pytest.mark.parametrize("fn", [polar, polar_svd])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(fn, dtype):
    x = keras.ops.cast(near_stiefel((8, 4), 0.05, 0), dtype)
    result = fn(x)
    assert keras.backend.standardize_dtype(result.dtype) == dtype
    result = to_numpy(keras.ops.cast(result, "float32"))
    np.testing.assert_allclose(result.T @ result, np.eye(4), atol=0.02)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"`polar` expects matrices.*Received: shape=\(3,\)"):
        polar(np.ones(3))
