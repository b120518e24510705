import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext.layers import GroupSort, MaxMin


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("size", [1, 2, 3, 6, None])
def test_equals_numpy(size, axis):
    x = random_input((2, 6, 3, 6))
    rows = np.moveaxis(x, axis, -1)
    m = 6 // (size or 6)
    expected = np.empty_like(rows)
    for i in range(m):
        expected[..., i::m] = -np.sort(-rows[..., i::m], axis=-1)
    outputs = to_numpy(GroupSort(size, axis=axis)(x))
    np.testing.assert_array_equal(outputs, np.moveaxis(expected, -1, axis))


@pytest.mark.parametrize("axis", [-1, 1])
def test_pairs_are_max_min(axis):
    x = random_input((2, 6, 3, 6))
    np.testing.assert_array_equal(
        to_numpy(GroupSort(2, axis=axis)(x)), to_numpy(MaxMin(axis=axis)(x))
    )


def test_groups_that_do_not_fit():
    with pytest.raises(ValueError, match=r"groups of 3 channels.*Received: 7 channels"):
        GroupSort(3)(np.ones((2, 7)))
    for size in (0, 2.0, True):
        with pytest.raises(ValueError, match=r"`group_size` must be a positive integer"):
            GroupSort(size)
