import keras
import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext import backend
from keras_lipnext.layers import L2Pool


def test_equals_numpy():
    x = random_input((2, 4, 5, 6))
    expected = np.sqrt((x.astype("float64") ** 2).sum(axis=(1, 2)))
    np.testing.assert_allclose(to_numpy(L2Pool()(x)), expected, rtol=1e-6)


def test_gradient_at_zero_is_finite():
    x = keras.ops.zeros((1, 2, 2, 3))
    assert np.isfinite(to_numpy(backend.gradient(L2Pool(), x))).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_accumulates_in_float32_under_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    layer = L2Pool()
    assert layer.compute_dtype == "float32"
    # A bfloat16 sum of 4096 ones stops growing at 256.
    outputs = layer(keras.ops.ones((1, 64, 64, 1), dtype=policy.removeprefix("mixed_")))
    assert keras.backend.standardize_dtype(outputs.dtype) == "float32"
    np.testing.assert_allclose(to_numpy(outputs), 64, rtol=1e-6)


def test_bad_rank():
    with pytest.raises(ValueError, match=r"images of rank 4"):
        L2Pool()(np.ones((2, 3)))


def test_bad_epsilon():
    with pytest.raises(ValueError, match=r"`epsilon` must not be negative"):
        L2Pool(epsilon=-1e-3)
