"""The explicit matrix against one assembled tap by tap, and against Keras' own layers."""

import accelerated
import keras
import numpy as np
import pytest
from data import to_numpy
from hypothesis import given
from hypothesis import strategies as st
from test_convolutions import operator

from keras_lipnext.norms.convolution_matrix import convolution_matrices, output_sides

pytestmark = pytest.mark.once


@given(
    st.integers(1, 3),
    st.sampled_from(["valid", "same", "causal"]),
    st.integers(1, 2),
    st.integers(0, 10000),
)
def test_equals_the_sum_over_taps(rank, padding, groups, seed):
    rng = np.random.default_rng(seed)
    spatial, sides = rng.integers(1, 4, rank), rng.integers(1, 6, rank)
    strides, dilation = rng.integers(1, 4, rank), rng.integers(1, 3, rank)
    kernel = rng.normal(size=(*spatial, rng.integers(1, 3), groups * rng.integers(1, 3)))
    expected = operator(kernel, sides, strides, dilation, padding, groups)
    found = convolution_matrices(kernel, sides, strides, padding, dilation, groups)
    inputs, positions = kernel.shape[-2], np.prod(sides)
    parts = found.reshape(groups, positions, inputs, -1, kernel.shape[-1] // groups)
    full = np.zeros((positions, groups, inputs, parts.shape[3], groups, parts.shape[4]))
    for g in range(groups):
        full[:, g, :, :, g, :] = parts[g]
    np.testing.assert_array_equal(full.reshape(expected.shape[::-1]).T, expected)


CASES = [
    (lambda: keras.layers.Conv2D(3, 3, padding="same"), (1, 1, 2)),
    (lambda: keras.layers.Conv2D(3, (3, 2), strides=2, padding="same"), (4, 5, 2)),
    (lambda: keras.layers.Conv2D(3, (2, 5), strides=(3, 2), padding="same"), (4, 3, 2)),
    (lambda: keras.layers.Conv2D(2, (3, 2), strides=2), (4, 5, 2)),
    (lambda: keras.layers.Conv2D(2, (4, 2), dilation_rate=(1, 3), padding="same"), (3, 4, 2)),
    (lambda: keras.layers.Conv2D(4, 2, groups=2, padding="same"), (3, 2, 4)),
    (lambda: keras.layers.Conv1D(3, 4, padding="causal", dilation_rate=2), (5, 2)),
    (lambda: keras.layers.Conv1D(3, 4, strides=3, padding="same"), (2, 2)),
    (lambda: keras.layers.Conv3D(2, 2, padding="same"), (2, 1, 3, 1)),
    (lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), (2, 3, 2)),
    (lambda: keras.layers.DepthwiseConv2D(2, strides=2, padding="same"), (3, 5, 2)),
]


@accelerated.of_cpus()
@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_what_keras_computes(case):
    """Padding that falls to one side only is where backends could differ."""
    make, shape = CASES[case]
    layer = make()
    layer.build((None, *shape))
    kernel = to_numpy(layer.kernel)
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")
    expected = to_numpy(layer(x))
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        groups = shape[-1]
        kernel = kernel.reshape(*kernel.shape[:-2], 1, -1)
    settings = (shape[:-1], layer.strides, layer.padding, layer.dilation_rate)
    assert output_sides(kernel, *settings) == expected.shape[1:-1]
    matrices = convolution_matrices(kernel, *settings, groups)
    parts = x.reshape(2, -1, groups, kernel.shape[-2])
    found = np.stack(
        [parts[:, :, g].reshape(2, -1) @ matrices[g] for g in range(groups)], axis=0
    ).reshape(groups, 2, *expected.shape[1:-1], -1)
    found = np.moveaxis(found, 0, -2).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
