import sys

import accelerated
import keras
import numpy as np
import pytest
from data import to_numpy

from keras_lipnext import backend
from keras_lipnext.manifolds import RandomStiefel, Stiefel
from keras_lipnext.models.estimate import step_flops
from keras_lipnext.optimizers import ManifoldMuon


def kernel(shape):
    variable = keras.Variable(RandomStiefel(0)(shape))
    variable.constraint = Stiefel()
    return variable


def test_every_plane_turns_by_the_learning_rate():
    """Whatever the size of the gradient, and of the matrix."""
    for size in (6, 24):
        for scale in (1e-12, 1.0, 1e12):
            variable = kernel((size, size))
            before = to_numpy(variable).astype("float64")
            gradient = scale * np.random.default_rng(size).normal(size=(size, size))
            ManifoldMuon(0.02).apply([keras.ops.convert_to_tensor(gradient, "float32")], [variable])
            angles = np.abs(np.angle(np.linalg.eigvals(before.T @ to_numpy(variable))))
            # The gradient's small singular values, relative to its largest, turn less.
            np.testing.assert_allclose(np.median(angles), 0.02, rtol=0.23)
            assert angles.max() < 0.02 * 1.23


def test_a_vanishing_gradient_moves_nothing():
    variable = kernel((6, 4))
    before = to_numpy(variable).copy()
    ManifoldMuon(0.02).apply([keras.ops.zeros((6, 4))], [variable])
    np.testing.assert_allclose(to_numpy(variable), before, atol=1e-6)


def test_it_keeps_one_moment_of_a_manifold_variable():
    optimizer, plain = ManifoldMuon(), keras.Variable(np.zeros(3, "float32"))
    optimizer.build([kernel((4, 4)), plain])
    # iterations, learning rate, decay, momentum of the kernel, two moments of the vector
    assert sum(v.shape == (4, 4) for v in optimizer.variables) == 1
    assert sum(v.shape == (3,) for v in optimizer.variables) == 2


@accelerated.of_cpus("accelerators do without Gram matrices of the smaller side")
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="counted as they run")
@pytest.mark.parametrize("shape", [(48, 48), (48, 24), (24, 48), (192, 24), (24, 768)])
def test_a_step_costs_the_square_of_the_smaller_side(shape, monkeypatch):
    """As `LipNeXt.estimate` counts, the drift of square matrices left out: never m^2 n."""
    flops = []

    def counted(a, b, precision="exact"):
        flops.append(2 * a.shape[-2] * a.shape[-1] * b.shape[-1])
        return real(a, b, precision)

    real = backend.matmul
    for name in ("stiefel", "polar", "orthogonalize", "rotation"):
        monkeypatch.setattr(sys.modules[f"keras_lipnext.manifolds.{name}"], "matmul", counted)
    monkeypatch.setattr(sys.modules["keras_lipnext.optimizers.manifold_muon"], "matmul", counted)
    gradient = np.random.default_rng(0).normal(size=shape).astype("float32")
    optimizer, x = ManifoldMuon(0.02), RandomStiefel(0)(shape)[None]
    gradient = keras.ops.convert_to_tensor(gradient)[None]
    optimizer.manifold_step(x, gradient, 0.02, [keras.ops.zeros_like(x)])
    assert sum(flops) == pytest.approx(step_flops(*shape), rel=0.05)


@pytest.mark.parametrize("momentum", [1.0, -0.1, "much"])
def test_bad_momentum(momentum):
    with pytest.raises(ValueError, match=r"`momentum` must be .* Received: momentum="):
        ManifoldMuon(momentum=momentum)


def test_bad_number_of_newton_schulz_steps():
    with pytest.raises(ValueError, match=r"positive integer. Received: newton_schulz_steps=0"):
        ManifoldMuon(newton_schulz_steps=0)
