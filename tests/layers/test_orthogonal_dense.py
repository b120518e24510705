import keras
import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext import backend
from keras_lipnext.layers import OrthogonalDense
from keras_lipnext.manifolds import stiefel


@pytest.mark.parametrize("axis", [-1, 1])
def test_equals_numpy(axis):
    layer = OrthogonalDense(5, activation="tanh", axis=axis, bias_initializer="normal")
    x = random_input((2, 4, 3, 4))
    outputs = layer(x)
    expected = np.tanh(np.moveaxis(x, axis, -1) @ to_numpy(layer.kernel) + to_numpy(layer.bias))
    np.testing.assert_allclose(to_numpy(outputs), np.moveaxis(expected, -1, axis), atol=1e-6)


@pytest.mark.parametrize("initializer", [None, "glorot_uniform", "identity"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 5), (5, 8)])
def test_kernel_starts_orthonormal(initializer, shape):
    layer = OrthogonalDense(shape[1], kernel_initializer=initializer)
    layer.build((None, shape[0]))
    assert float(stiefel.defect(layer.kernel)) < 2e-6


def test_two_layers_differ():
    first, second = OrthogonalDense(6), OrthogonalDense(6)
    first.build((1, 6))
    second.build((1, 6))
    assert np.abs(to_numpy(first.kernel) - to_numpy(second.kernel)).max() > 0.1


def test_isometry_when_it_widens():
    with backend.float64_scope():
        layer = OrthogonalDense(9, dtype="float64")
        x = random_input((20, 6), "float64")
        outputs = to_numpy(layer(keras.ops.convert_to_tensor(x)))
    np.testing.assert_allclose(
        np.linalg.norm(outputs, axis=1), np.linalg.norm(x, axis=1), rtol=1e-12
    )


@pytest.mark.parametrize("units", [0, -3, 2.5, "8", True])
def test_bad_units(units):
    with pytest.raises(ValueError, match=r"`units` must be a positive integer. Received: units="):
        OrthogonalDense(units)


def test_unknown_features():
    with pytest.raises(ValueError, match=r"needs a known size of axis -1. Received"):
        OrthogonalDense(4)(keras.Input((None,)))


def test_batch_axis():
    with pytest.raises(ValueError, match=r"must exist and not be the batch axis"):
        OrthogonalDense(4, axis=0)(np.ones((2, 3)))
