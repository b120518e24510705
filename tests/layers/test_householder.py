import keras
import numpy as np
import pytest
from data import called, to_numpy
from layer_checks import random_input

from keras_lipnext import lipschitz_bound
from keras_lipnext.layers import Householder, MaxMin


@pytest.mark.parametrize("axis", [-1, 1])
def test_starts_as_max_min(axis):
    x = random_input((2, 6, 3, 6))
    outputs = to_numpy(Householder(axis=axis)(x))
    np.testing.assert_allclose(outputs, to_numpy(MaxMin(axis=axis)(x)), atol=1e-6)


def test_equals_the_published_reflection():
    """z where v^T z > 0, else [cos, sin; sin, -cos] z: of the norm of z in both cases."""
    layer = Householder(angle_initializer="random_normal")
    x = random_input((64, 2))
    z = to_numpy(layer(x))
    (angle,) = to_numpy(layer.angle)
    reflection = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    ahead = x @ [np.sin(angle / 2), -np.cos(angle / 2)] > 0
    assert 8 < ahead.sum() < 56
    np.testing.assert_allclose(z, np.where(ahead[:, None], x, x @ reflection), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), np.linalg.norm(x, axis=1), rtol=1e-6)


def test_half_precision_keeps_norms():
    """v is made, and applied, in float32: only the answer is rounded."""
    x = random_input((64, 32))
    layer = Householder(angle_initializer="random_normal", dtype="mixed_bfloat16")
    z = called(lambda x: keras.ops.cast(layer(x), "float32"), x)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), np.linalg.norm(x, axis=1), rtol=4e-3)


def test_odd_channels():
    with pytest.raises(ValueError, match=r"even number of them along axis -1. Received: 7"):
        Householder()(np.ones((2, 7)))


def test_angles_without_end_are_refused():
    """Of a huge angle sine and cosine may be anything."""
    inputs = keras.Input((4,))
    layer = Householder(angle_initializer=keras.initializers.Constant(1e15))
    model = keras.Model(inputs, layer(inputs))
    with pytest.raises(ValueError, match=r"an angle of 9\d+\.0 radians is too large"):
        lipschitz_bound(model)
