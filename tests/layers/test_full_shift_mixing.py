import keras
import numpy as np
import pytest
from data import called, in_one_program, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from layer_checks import random_input

from keras_lipnext import backend
from keras_lipnext.layers import FullShiftMixing, ShiftMixing
from keras_lipnext.manifolds import stiefel


def test_stores_the_whole_matrix():
    layer = FullShiftMixing(1 / 8)
    layer.build((None, 4, 4, 16))
    assert tuple(layer.kernel.shape) == (16, 16)
    assert float(stiefel.defect(layer.kernel)) < 2e-6


@pytest.mark.parametrize("padding", ["circular", "zero"])
def test_equals_the_papers_formula(padding):
    """R^T S(R x), pixel by pixel in NumPy."""
    x = random_input((2, 3, 4, 8), "float64")
    with backend.float64_scope():
        layer = FullShiftMixing(1 / 8, padding, dtype="float64")
        layer.build(x.shape)
        actual = called(layer, x)
        r = to_numpy(layer.kernel).T
    rotated = np.einsum("rc,bhwc->bhwr", r, x)
    shifted = rotated.copy()
    for group, (axis, step) in enumerate([(1, -1), (1, 1), (2, -1), (2, 1)]):
        size = x.shape[axis]
        for to in range(size):
            source = np.take(rotated, (to - step) % size, axis=axis)[..., group]
            inside = padding == "circular" or 0 <= to - step < size
            position = (slice(None),) * axis + (to,)
            shifted[(*position, ..., group)] = source * inside
    expected = np.einsum("rc,bhwr->bhwc", r, shifted)
    np.testing.assert_allclose(actual, expected, atol=1e-13)


def output_and_input_gradient(layer, x, weights):
    def both(t):
        slope = backend.gradient(lambda u: keras.ops.tanh(layer(u)) * weights, t)
        return layer(t), slope

    if not layer.built:
        layer.build(x.shape)
    return map(to_numpy, in_one_program(both)(x))


@given(
    ratio=st.sampled_from([1 / 16, 1 / 8, 3 / 16, 1 / 4]),
    padding=st.sampled_from(["circular", "zero"]),
    data_format=st.sampled_from(["channels_last", "channels_first"]),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_equals_the_reduced_form(ratio, padding, data_format, size, seed):
    """Outputs and gradients for the inputs, in float64."""
    shape = (2, *size, 16) if data_format == "channels_last" else (2, 16, *size)
    with backend.float64_scope():
        x, weights = (
            keras.ops.convert_to_tensor(random_input(shape, "float64", seed=seed + i))
            for i in (0, 1)
        )
        full = FullShiftMixing(ratio, padding, data_format=data_format, dtype="float64")
        values, slopes = output_and_input_gradient(full, x, weights)
        actual, actual_slopes = output_and_input_gradient(full.reduced(), x, weights)
        np.testing.assert_allclose(actual, values, atol=1e-13)
        np.testing.assert_allclose(actual_slopes, slopes, atol=1e-13)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
def test_reduced_carries_the_columns_exactly(policy):
    full = FullShiftMixing(1 / 8, "zero", "ones", "channels_first", dtype=policy, name="mixing")
    full.trainable = False
    full.build((None, 16, 4, None))
    layer = full.reduced()
    assert type(layer) is ShiftMixing
    assert layer.get_config() == full.get_config()
    assert not layer.trainable
    kernels = [to_numpy(keras.ops.cast(v.kernel, "float32")) for v in (full, layer)]
    np.testing.assert_array_equal(kernels[1], kernels[0][:, :8])
    outputs = layer(random_input((2, 16, 3, 5)))
    assert keras.backend.standardize_dtype(outputs.dtype) == full.compute_dtype


def test_reduced_needs_weights():
    with pytest.raises(ValueError, match=r"'mix' \(FullShiftMixing\) has no weights to carry"):
        FullShiftMixing(name="mix").reduced()


def test_channels_not_divisible():
    with pytest.raises(ValueError, match=r"ratio=0.125, channels=20.*multiples of 8"):
        FullShiftMixing(1 / 8)(np.ones((1, 4, 4, 20)))
