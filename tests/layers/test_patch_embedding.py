import keras
import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext import backend
from keras_lipnext.layers import PatchEmbedding


def test_equals_numpy():
    layer = PatchEmbedding(2, 16)
    x = random_input((2, 4, 6, 3))
    outputs = to_numpy(layer(x))
    kernel = to_numpy(layer.kernel)
    for i in range(2):
        for j in range(3):
            patch = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, -1)
            np.testing.assert_allclose(outputs[:, i, j], patch @ kernel, atol=1e-5)


def test_is_an_isometry():
    with backend.float64_scope():
        layer = PatchEmbedding(3, 30, dtype="float64")
        x = random_input((10, 6, 9, 3), "float64")
        outputs = to_numpy(layer(keras.ops.convert_to_tensor(x)))
    norms = [np.linalg.norm(v.reshape(10, -1), axis=1) for v in (x, outputs)]
    np.testing.assert_allclose(*norms, rtol=1e-12)


def test_too_few_units():
    with pytest.raises(
        ValueError, match=r"units >= patch_size\^2 \* channels = 48. Received: units=47"
    ):
        PatchEmbedding(4, 47)(np.ones((1, 8, 8, 3)))


def test_patches_do_not_tile():
    with pytest.raises(ValueError, match=r"Received: width=10, not a multiple of 4"):
        PatchEmbedding(4, 48)(np.ones((1, 8, 10, 3)))


@pytest.mark.parametrize("patch_size", [0, 1.5, None])
def test_bad_patch_size(patch_size):
    with pytest.raises(ValueError, match=r"`patch_size` must be a positive integer"):
        PatchEmbedding(patch_size, 48)
