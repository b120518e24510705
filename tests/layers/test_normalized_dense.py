import keras
import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext.layers import NormalizedDense


def test_equals_numpy():
    layer = NormalizedDense(5, bias_initializer="normal")
    x = random_input((3, 6))
    expected = to_numpy(layer(x))
    np.testing.assert_allclose(
        expected, x @ to_numpy(layer.kernel) + to_numpy(layer.bias), atol=1e-6
    )


def test_weight_vectors_have_norm_one_before_and_after_training():
    layer = NormalizedDense(5)
    model = keras.Sequential([keras.Input((6,)), layer])
    norms = np.linalg.norm(to_numpy(layer.kernel), axis=0)
    np.testing.assert_allclose(norms, 1, atol=1e-6)
    model.compile(keras.optimizers.Adam(0.1), loss="mse")
    model.fit(random_input((32, 6)), random_input((32, 5)), epochs=2, verbose=0)
    norms = np.linalg.norm(to_numpy(layer.kernel), axis=0)
    np.testing.assert_allclose(norms, 1, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_answers_in_float32_under_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    outputs = NormalizedDense(5)(random_input((3, 6)))
    assert keras.backend.standardize_dtype(outputs.dtype) == "float32"


def test_bad_units():
    with pytest.raises(ValueError, match=r"`units` must be a positive integer"):
        NormalizedDense(0)
