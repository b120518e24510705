import keras
import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext.layers import PositionalBias


def test_one_value_a_position():
    layer = PositionalBias("normal")
    x = random_input((2, 3, 4, 5))
    added = to_numpy(layer(x)) - x
    assert tuple(layer.bias.shape) == (3, 4, 1)
    np.testing.assert_allclose(added, np.broadcast_to(to_numpy(layer.bias), x.shape), atol=1e-6)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_inputs_that_are_no_floats(dtype):
    layer = PositionalBias("normal", dtype="mixed_bfloat16")
    added = layer(keras.ops.ones((2, 3, 4, 5), dtype))
    assert keras.backend.standardize_dtype(added.dtype) == "bfloat16"
    np.testing.assert_allclose(
        to_numpy(added), np.broadcast_to(1 + to_numpy(layer.bias), added.shape), rtol=0.01
    )


def test_unknown_sizes():
    with pytest.raises(ValueError, match=r"needs a known height and width. Received"):
        PositionalBias()(keras.Input((None, 4, 3)))
