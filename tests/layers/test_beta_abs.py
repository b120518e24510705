import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext.layers import BetaAbs


@pytest.mark.parametrize("axis", [-1, 1])
def test_equals_numpy(axis):
    x = random_input((2, 8, 3, 8))
    expected = np.moveaxis(x.copy(), axis, -1)
    expected[..., :6] = np.abs(expected[..., :6])
    outputs = to_numpy(BetaAbs(0.75, axis=axis)(x))
    np.testing.assert_array_equal(outputs, np.moveaxis(expected, -1, axis))


def test_contains_minmax_up_to_rotation():
    """MinMax(x) = Q^T betaAbs(Q x) with Q the pairwise (x - y, x + y) / sqrt 2, beta = 1/2."""
    x = random_input((50, 2), "float32")
    q = np.array([[1, -1], [1, 1]], "float32") / np.sqrt(2, dtype="float32")
    outputs = to_numpy(BetaAbs(0.5)(x @ q.T)) @ q
    expected = np.stack([x.max(axis=1), x.min(axis=1)], axis=1)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\]. Received: beta="):
        BetaAbs(beta)
