"""Generic properties over a table of shapes: a new kind of point is a new row."""

import keras
import numpy as np
import pytest
import scipy.linalg
from data import to_numpy, traced

from keras_lipnext import backend
from keras_lipnext.manifolds import stiefel
from keras_lipnext.manifolds.stiefel import STRUCTURED_FROM

SHAPES = [(1, 1), (6, 6), (9, 4), (4, 9), (7, 1), (3, 9, 4), (2, 5, 5)]


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def point(shape):
    u, _, vh = np.linalg.svd(normal(shape, 0), full_matrices=False)
    return u @ vh


def as_tall(a):
    return np.swapaxes(a, -1, -2) if a.shape[-2] < a.shape[-1] else a


def gram_defect(x):
    x = as_tall(x)
    return np.abs(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1])).max()


def tangency(x, u):
    x, u = as_tall(x), as_tall(u)
    a = np.swapaxes(x, -1, -2) @ u
    return np.abs(a + np.swapaxes(a, -1, -2)).max()


@pytest.fixture(autouse=True)
def in_float64():
    with backend.float64_scope():
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_projx_is_an_idempotent_projection(shape):
    x = to_numpy(stiefel.projx(normal(shape, 1)))
    assert gram_defect(x) < 1e-14
    np.testing.assert_allclose(to_numpy(stiefel.projx(x)), x, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_proju_is_the_orthogonal_projection_on_the_tangent_space(shape):
    x, v = point(shape), normal(shape, 1)
    u = to_numpy(stiefel.proju(x, v))
    assert tangency(x, u) < 1e-13
    np.testing.assert_allclose(to_numpy(stiefel.proju(x, u)), u, atol=1e-13)
    # The residual is orthogonal to every tangent vector.
    other = to_numpy(stiefel.proju(x, normal(shape, 2)))
    assert abs(np.sum((v - u) * other)) < 1e-12


@pytest.mark.parametrize("move", [stiefel.retr, stiefel.expmap])
@pytest.mark.parametrize("shape", SHAPES)
def test_moves_stay_on_the_manifold_and_start_along_u(move, shape):
    x = point(shape)
    u = to_numpy(stiefel.proju(x, normal(shape, 1)))
    assert gram_defect(to_numpy(move(x, u))) < 1e-13
    np.testing.assert_allclose(to_numpy(move(x, 0 * u)), x, atol=1e-14)
    step = 1e-6
    slope = (to_numpy(move(x, step * u)) - to_numpy(move(x, -step * u))) / (2 * step)
    np.testing.assert_allclose(slope, u, atol=1e-8)


@pytest.mark.parametrize("project", [stiefel.retr, traced(stiefel.retr)], ids=["at once", "traced"])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e5, 1e6])
def test_retractions_of_steep_tangents(size, project):
    """Of X + U one singular value is this large, the others are 1: nothing is decomposed."""
    x = point((64, 16)).astype("float32")
    u = np.outer(*(np.random.default_rng(n).normal(size=n) for n in (64, 16)))
    u = to_numpy(stiefel.proju(x, u.astype("float32")))
    u *= size / np.linalg.norm(u, 2)
    moved = to_numpy(project(*map(keras.ops.convert_to_tensor, (x, u)))).astype("float64")
    assert gram_defect(moved) < 2e-6


def test_expmap_of_the_orthogonal_group():
    x, u = point((6, 6)), normal((6, 6), 1)
    u = to_numpy(stiefel.proju(x, u))
    np.testing.assert_allclose(to_numpy(stiefel.expmap(x, u)), x @ scipy.linalg.expm(x.T @ u))


def test_expmap_is_a_geodesic():
    """exp_x(s u) then the velocity carried on for t equals exp_x((s + t) u)."""
    x = point((9, 4))
    u = to_numpy(stiefel.proju(x, normal((9, 4), 1)))

    def along(t):
        return to_numpy(stiefel.expmap(x, t * u))

    step = 1e-6
    velocity = (along(0.7 + step) - along(0.7 - step)) / (2 * step)
    onward = to_numpy(stiefel.expmap(along(0.7), 0.5 * velocity))
    np.testing.assert_allclose(onward, along(1.2), atol=1e-8)


def test_wide_is_the_transpose_of_tall():
    x, v = point((9, 4)), normal((9, 4), 1)
    for fn in (stiefel.proju, stiefel.retr, stiefel.expmap):
        np.testing.assert_allclose(to_numpy(fn(x.T, v.T)), to_numpy(fn(x, v)).T, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_defect(shape):
    x = point(shape) + 0.1 * normal(shape, 1)
    assert float(stiefel.defect(x)) == pytest.approx(gram_defect(x), rel=1e-12)


@pytest.mark.parametrize(
    "shape", [(1, 1), (8, 8), (8, 3), (3, 8), (STRUCTURED_FROM, 40), (40, STRUCTURED_FROM)]
)
def test_random_points(shape):
    x = to_numpy(stiefel.random(shape, seed=1, dtype="float64"))
    assert x.shape == shape
    assert x.dtype == np.float64
    assert gram_defect(x) < 1e-13
    np.testing.assert_array_equal(to_numpy(stiefel.random(shape, seed=1, dtype="float64")), x)
    if max(shape) > 1:
        assert np.abs(to_numpy(stiefel.random(shape, seed=2, dtype="float64")) - x).max() > 1e-3


@pytest.mark.parametrize("shape", [(6, 4), (40, 33)])
def test_a_seed_is_the_same_point_on_every_backend(shape):
    """Of float32, drawn here as the documents say."""
    drawn = np.random.default_rng(7).standard_normal(shape).astype("float32")
    q, r = np.linalg.qr(drawn)
    expected = q * np.sign(np.diagonal(r))
    np.testing.assert_allclose(to_numpy(stiefel.random(shape, seed=7)), expected, atol=1e-6)
    np.testing.assert_allclose(to_numpy(stiefel.random(shape[::-1], seed=7)).T, expected, atol=1e-6)


def test_a_seed_is_the_same_large_point_on_every_backend():
    x = to_numpy(stiefel.random((STRUCTURED_FROM, 3), seed=7))
    first, last = [0.00141672, -0.00447878, -0.00147111], [0.00166222, 0.01843057, -0.00005854]
    np.testing.assert_allclose(x[[0, -1]], [first, last], rtol=0, atol=1e-6)


def test_random_points_are_uniformly_distributed():
    """First and second moments of the entries over O(3): mean 0, variance 1/3."""
    draws = np.stack([to_numpy(stiefel.random((3, 3), seed=s)) for s in range(300)])
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=0.12)
    np.testing.assert_allclose((draws**2).mean(axis=0), 1 / 3, atol=0.08)


def test_large_random_points_are_dense():
    x = to_numpy(stiefel.random((STRUCTURED_FROM, 64), seed=0))
    assert np.abs(x).max() < 0.3
    assert np.mean(np.abs(x) > 0.05 / np.sqrt(STRUCTURED_FROM)) > 0.8


def test_seed_generators_advance():
    seeds = keras.random.SeedGenerator(5)
    first, second = (to_numpy(stiefel.random((5, 5), seed=seeds)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 3, 4)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match=r"positive sizes. Received: shape="):
        stiefel.random(shape)
