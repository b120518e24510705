import accelerated
import keras
import numpy as np
import pytest
from data import to_numpy, traced
from manifolds.test_fast_exp import random_skew

from keras_lipnext.manifolds import branchless, polar, rotate
from keras_lipnext.manifolds.branchless import QUADRATIC_LIMIT, QUARTIC_LIMIT


def tensor(a):
    return keras.ops.convert_to_tensor(np.asarray(a, "float32"))


def orthogonal(n, batch=2, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(batch, n, n)))[0]


def defect(x):
    x = to_numpy(x).astype("float64")
    return np.abs(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1])).max()


@pytest.mark.parametrize("n", [1, 2, 20, 33])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 0.03, 0.3])
def test_without_a_given_norm_it_turns_as_rotate_does(n, norm):
    x, d = tensor(orthogonal(n)), tensor(random_skew(n, norm, 0, batch=(2,)))
    moved = branchless.turn(x, d)
    # Below 0.04 radians `rotate` takes a polynomial of third order.
    tolerance = 1e-6 + min(norm, 0.04) ** 3 / 6
    np.testing.assert_allclose(to_numpy(moved), to_numpy(rotate(x, d)), atol=tolerance)
    assert defect(moved) < (6e-7 if accelerated.ON_CPU else 2e-6)


@pytest.mark.parametrize("norm", [1e-3, 0.01, 0.03])
def test_with_the_norm_of_muons_direction_it_turns_as_rotate_does(norm):
    """Whose singular values lie within 23 % of 1."""
    x = tensor(orthogonal(20))
    d = np.zeros((20, 20))
    planes = np.linspace(0.77, 1.23, 10) * norm / 1.23
    d[np.arange(0, 20, 2), np.arange(1, 20, 2)] = planes
    q = orthogonal(20, 1, 3)[0]
    d = tensor(np.stack([q @ (d - d.T) @ q.T] * 2))
    moved = branchless.turn(x, d, tensor(norm))
    np.testing.assert_allclose(to_numpy(moved), to_numpy(rotate(x, d, tensor(norm))), atol=2e-6)
    assert defect(moved) < (6e-7 if accelerated.ON_CPU else 2e-6)


@pytest.mark.parametrize("norm", [1.0, 3.0, 1e3, 1e6])
@pytest.mark.parametrize("limit, given", [(QUARTIC_LIMIT, False), (QUADRATIC_LIMIT, True)])
def test_a_step_too_far_is_shortened_and_stays_near_the_manifold(norm, limit, given):
    x, d = orthogonal(20), random_skew(20, norm, 0, batch=(2,))
    moved = branchless.turn(tensor(x), tensor(d), *([tensor(norm)] if given else []))
    assert defect(moved) < 1e-3
    angles = np.angle(np.linalg.eigvals(np.swapaxes(x, 1, 2) @ to_numpy(moved)))
    # The bound of the norm is above it by up to n^(1/8).
    assert 0.4 * limit < np.abs(angles).max() < 1.03 * limit


@pytest.mark.parametrize("size", [1e-4, 1e-3, 0.01, 0.03])
@pytest.mark.parametrize("wide", [False, True])
def test_thin_matrices_are_retracted_as_by_polar(size, wide):
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.normal(size=(2, 20, 8)))[0]
    u = size * rng.normal(size=x.shape)
    a = np.swapaxes(x, 1, 2) @ u
    u = u - x @ (a + np.swapaxes(a, 1, 2)) / 2
    x, u = (np.swapaxes(m, 1, 2) if wide else m for m in (x, u))
    moved = branchless.retract(tensor(x), tensor(u))
    np.testing.assert_allclose(to_numpy(moved), to_numpy(polar(tensor(x + u))), atol=1e-6)


def test_a_huge_step_of_a_thin_matrix_is_shortened():
    x = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 8)))[0]
    u = 100 * np.random.default_rng(1).normal(size=x.shape)
    a = x.T @ u
    x = branchless.retract(tensor(x), tensor(u - x @ (a + a.T) / 2))
    assert defect(x) < 0.02
    for _ in range(2):
        x = branchless.retract(x, keras.ops.zeros_like(x))
    assert defect(x) < 1e-6


def removing_drift():
    """Function of matrices and numbers of steps: `remove_drift` at each, one program."""
    program = traced(branchless.remove_drift)

    def removed(x, steps):
        for step in steps:
            x = program(x, keras.ops.convert_to_tensor(step, "int32"))
        return x

    return removed


@pytest.mark.parametrize("n", [1, 5, 8, 16, 20, 64])
def test_two_dozen_steps_remove_drift(n):
    """To first order: what is left is of the size of its square."""
    x = orthogonal(n) + 1e-4 * np.random.default_rng(1).normal(size=(2, n, n))
    removed = removing_drift()
    for start in (0, 1000):
        once = removed(tensor(x), range(start, start + 24))
        assert defect(once) < 4e-7 + 1e-8 * n
        assert defect(removed(once, range(start + 24, start + 48))) < 4e-7


@pytest.mark.parametrize("rhythm", [1, 2, 3, 4, 8, 16, 29])
def test_variables_that_skip_steps_have_their_turn(rhythm):
    x = tensor(orthogonal(16) + 1e-4 * np.random.default_rng(1).normal(size=(2, 16, 16)))
    removed = removing_drift()
    for first in range(min(rhythm, 3)):
        steps = range(first, first + 2 * 37 * rhythm, rhythm)
        assert defect(removed(x, steps)) < 4e-7


def test_weights_far_off_come_back():
    removed = removing_drift()
    for scale in (0.5, 1.5, 3.0, 100.0):
        x = scale * orthogonal(12) + 0.01 * np.random.default_rng(1).normal(size=(2, 12, 12))
        assert defect(removed(tensor(x), range(960))) < 1e-6


def test_other_members_of_a_batch_do_not_suffer_from_one():
    x, d = orthogonal(8), random_skew(8, 0.1, 0, batch=(2,))
    removed = removing_drift()
    for bad in (np.nan, np.inf, 1e30):
        y, e = x.copy(), d.copy()
        y[1, 2, 3] = e[1, 2, 3] = bad
        for function in (branchless.turn, branchless.retract):
            expected = to_numpy(function(tensor(x), tensor(d)))
            np.testing.assert_array_equal(to_numpy(function(tensor(x), tensor(e)))[0], expected[0])
        expected = to_numpy(removed(tensor(x), range(3)))
        np.testing.assert_array_equal(to_numpy(removed(tensor(y), range(3)))[0], expected[0])


def test_the_same_in_rounded_products(monkeypatch):
    """What is measured of a point is exact: drift ends at rounding; a step adds 2^-11 of itself."""
    accelerated.round_products(monkeypatch)
    x, d = tensor(orthogonal(64)), tensor(random_skew(64, 0.01, 0, batch=(2,)))
    moved = branchless.turn(x, d)
    assert defect(moved) < 1e-5
    assert defect(removing_drift()(moved, range(24))) < 4e-7
    thin = branchless.retract(x[:, :, :16], 0.01 * x[:, :, 16:32])
    assert defect(thin) < 6e-7
