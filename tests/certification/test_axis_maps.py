"""The matrices of resizing and adaptive pooling: what the backends of Keras compute."""

from fractions import Fraction

import keras
import numpy as np
import pytest
from data import to_numpy

from keras_lipnext.lipschitz.rules.axis_maps import (
    adaptive_average,
    bilinear,
    nearest,
    windows_in_float32,
)

SIZES = [(1, 3), (3, 1), (2, 5), (5, 2), (7, 3), (3, 7), (12, 9), (9, 24), (28, 32)]


def test_bilinear_is_exact_but_for_the_last_rounding():
    for inputs, outputs in SIZES:
        found = bilinear(inputs, outputs)
        assert (found.sum(axis=0) == 1).all()
        for i in range(outputs):
            place = Fraction(2 * i + 1, 2) * inputs / outputs - Fraction(1, 2)
            place = min(max(place, 0), inputs - 1)
            for k in range(inputs):
                assert found[k, i] == float(max(1 - abs(place - k), 0))


@pytest.mark.parametrize("kind, matrix", [("nearest", nearest), ("bilinear", bilinear)])
def test_resizing_is_what_keras_computes(kind, matrix):
    for inputs, outputs in SIZES:
        images = np.eye(inputs, dtype="float32")[:, :, None, None]
        actual = keras.ops.image.resize(images, (outputs, 1), kind, data_format="channels_last")
        np.testing.assert_allclose(
            to_numpy(actual)[:, :, 0, 0], matrix(inputs, outputs), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("inputs, outputs", [(6, 4), (9, 2), (12, 3), (10, 4)])
def test_adaptive_pooling_is_what_keras_computes(inputs, outputs):
    assert windows_in_float32(inputs, outputs)
    matrix = adaptive_average(inputs, outputs)
    eye = np.eye(inputs, dtype="float32")[:, :, None]
    average = to_numpy(keras.layers.AdaptiveAveragePooling1D(outputs)(eye))[..., 0]
    np.testing.assert_allclose(average, matrix, rtol=1e-6)
    largest = to_numpy(keras.layers.AdaptiveMaxPooling1D(outputs)(eye))[..., 0]
    np.testing.assert_array_equal(largest > 0, matrix > 0)


def test_windows_that_float32_gets_wrong():
    """14 * fl(1 / 7) is above 2: on JAX Keras answers NaN."""
    assert not windows_in_float32(14, 7)
    assert windows_in_float32(14, 2)
