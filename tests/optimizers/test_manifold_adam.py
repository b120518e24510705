import accelerated
import keras
import numpy as np
import pytest
import scipy.linalg
from data import to_numpy
from optimizers.reference import NumpyAdam, Reference, polar

from keras_lipnext import backend
from keras_lipnext.manifolds import Stiefel
from keras_lipnext.optimizers import ManifoldAdam


def test_the_exponential_is_the_geodesic_step():
    rng = np.random.default_rng(0)
    with backend.float64_scope():
        variable = keras.Variable(polar(rng.normal(size=(6, 6))), dtype="float64")
        variable.constraint = Stiefel()
        reference = Reference(to_numpy(variable), 0.3, NumpyAdam, exp=scipy.linalg.expm)
        optimizer = ManifoldAdam(0.3, retraction="exponential")
        for _ in range(5):
            gradient = rng.normal(size=(6, 6))
            optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
            reference.step(gradient)
            # Keras holds rates, and TensorFlow casts betas, as float32.
            np.testing.assert_allclose(to_numpy(variable), reference.x, atol=2e-5)


@accelerated.of_cpus()
def test_clipnorm_acts_on_the_euclidean_gradient():
    variable = keras.Variable(np.eye(3, dtype="float32"))
    variable.constraint = Stiefel()
    optimizer = ManifoldAdam(0.1, clipnorm=1.0, beta_1=0.0)
    gradient = np.array([[0, 30, 0], [0, 0, 0], [0, 0, 40]], "float32")
    optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    # Clipped to norm 1 (0.6 and 0.8), then projected: skew part 0.3, so v = 0.001 * 0.3^2.
    velocity = to_numpy(optimizer._moments[0][1])
    np.testing.assert_allclose(velocity[0, 1], 0.001 * 0.3**2, rtol=1e-5)


def test_unknown_retraction():
    with pytest.raises(ValueError, match=r"one of polynomial, exponential. Received: retraction='"):
        ManifoldAdam(retraction="cayley")
