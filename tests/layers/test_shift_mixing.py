import keras
import numpy as np
import pytest
from data import called, to_numpy
from layer_checks import random_input

from keras_lipnext import backend
from keras_lipnext.layers import ShiftMixing
from keras_lipnext.layers.spatial_shift import shift_groups
from keras_lipnext.manifolds import stiefel


def test_stores_the_moving_rows_only():
    layer = ShiftMixing(1 / 8)
    layer.build((None, 4, 4, 16))
    assert tuple(layer.kernel.shape) == (16, 8)


@pytest.mark.parametrize("padding", ["circular", "zero"])
def test_kernel_gradient_equals_the_full_form(padding):
    """The Riemannian gradient of R_s is the part of R's that can change the function.

    Along tangent directions of the moving rows both forms have the same slope.
    """
    channels, group = 16, 2
    shape = (2, 3, 4, channels)
    with backend.float64_scope():
        x = keras.ops.convert_to_tensor(random_input(shape, "float64"))
        weights = keras.ops.convert_to_tensor(random_input(shape, "float64", seed=1))
        full = stiefel.projx(random_input((channels, channels), "float64", seed=2))

        def full_loss(rotation):
            rotated = keras.ops.matmul(x, keras.ops.transpose(rotation))
            shifted = shift_groups(rotated, 4 * group, padding, "channels_last")
            return keras.ops.matmul(shifted, rotation) * weights

        def reduced_loss(kernel):
            rows = keras.ops.matmul(x, kernel)
            moved = shift_groups(rows, 4 * group, padding, "channels_last") - rows
            return keras.ops.matmul(moved, keras.ops.transpose(kernel)) * weights

        full_slope = called(lambda full: backend.gradient(full_loss, full), full)
        kernel = keras.ops.transpose(full)[:, : 4 * group]
        slope = called(lambda kernel: backend.gradient(reduced_loss, kernel), kernel)
        rotation, kernel = to_numpy(full), to_numpy(kernel)
    # A rotation R exp(A) of the whole basis moves the rows R_s by R_s A.
    a = random_input((channels, channels), "float64", seed=3)
    a = a - a.T
    by_full = np.sum(full_slope * (rotation @ a))
    by_reduced = np.sum(slope * (rotation[: 4 * group] @ a).T)
    assert by_full == pytest.approx(by_reduced, rel=1e-10)


def test_circular_is_an_isometry():
    with backend.float64_scope():
        layer = ShiftMixing(1 / 8, dtype="float64")
        x = random_input((10, 5, 4, 16), "float64")
        outputs = to_numpy(layer(keras.ops.convert_to_tensor(x)))
    norms = [np.linalg.norm(v.reshape(10, -1), axis=1) for v in (x, outputs)]
    np.testing.assert_allclose(*norms, rtol=1e-12)


def test_channels_not_divisible():
    with pytest.raises(ValueError, match=r"ratio=0.125, channels=20.*multiples of 8"):
        ShiftMixing(1 / 8)(np.ones((1, 4, 4, 20)))
