import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext.layers import MaxMin


@pytest.mark.parametrize("axis", [-1, 1])
def test_equals_numpy(axis):
    x = random_input((2, 6, 3, 6))
    rows = np.moveaxis(x, axis, -1)
    first, second = rows[..., :3], rows[..., 3:]
    expected = np.concatenate([np.maximum(first, second), np.minimum(first, second)], axis=-1)
    outputs = to_numpy(MaxMin(axis=axis)(x))
    np.testing.assert_array_equal(outputs, np.moveaxis(expected, -1, axis))


def test_odd_channels():
    with pytest.raises(ValueError, match=r"even number of them along axis -1. Received: 7"):
        MaxMin()(np.ones((2, 7)))
