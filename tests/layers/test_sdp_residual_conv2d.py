import keras
import numpy as np
import pytest
import sdp_checks
from data import to_numpy
from layer_checks import check_data_formats, check_layer, check_variant, random_input

from keras_lipnext.layers import SDPResidualConv2D

BOUNDS = ["aol", "sll", "spectral"]


def test_basics():
    arguments = {"hidden_filters": 4, "kernel_size": 3, "activation": "tanh"}
    check_layer(SDPResidualConv2D, arguments, (3, 5, 4, 2), (3, 5, 4, 2))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    "hidden, size, padding",
    [(None, 1, "same"), (5, 2, "circular"), (1, (3, 5), "same"), (3, 7, "circular")],
)
def test_variants(bound, hidden, size, padding):
    arguments = {"hidden_filters": hidden, "kernel_size": size, "bound": bound}
    check_variant(SDPResidualConv2D, arguments | {"padding": padding}, (2, 5, 4, 2), (2, 5, 4, 2))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size, padding", [(3, "same"), ((2, 4), "circular"), (2, "same")])
def test_equals_numpy(bound, size, padding):
    layer = SDPResidualConv2D(3, size, bound, padding=padding)
    sdp_checks.check_values(layer, (5, 6, 2), "SDPResidualConv2D")


@pytest.mark.parametrize("bound", BOUNDS)
def test_data_formats(bound):
    arguments = {"hidden_filters": 3, "kernel_size": 3, "bound": bound}
    check_data_formats(SDPResidualConv2D, arguments, (2, 5, 4, 2))


@pytest.mark.parametrize("bound", BOUNDS)
def test_constant_of_any_kernel(bound):
    sdp_checks.check_constants(SDPResidualConv2D(3, 3, bound), (None, 8, 8, 4), 64, 1.02)


@pytest.mark.parametrize("bound", BOUNDS)
def test_diagonal_equals_its_definition(bound):
    for size in (1, (2, 3)):
        sdp_checks.check_diagonal(SDPResidualConv2D(4, size, bound, dtype="float64"), (5, 5, 3))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    "size, padding, sides",
    [
        (1, "same", (5, 5)),
        (3, "same", (5, 6)),
        (4, "circular", (6, 5)),
        (6, "same", (6, 6)),
        (7, "circular", (7, 7)),
        (6, "circular", (2, 1)),
    ],
)
def test_constant_of_the_executed_kernel(bound, size, padding, sides):
    layer = SDPResidualConv2D(4, size, bound, padding=padding)
    sdp_checks.check_executed_kernel(layer, sides)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 5)])
def test_images_smaller_than_the_kernel_wrap_around_more_than_once(size):
    """As a copy of the image repeated to all sides, of sizes known or not."""
    layer = SDPResidualConv2D(3, 7, padding="circular", kernel_initializer="glorot_normal")
    layer.build((None, None, None, 2))
    x = random_input((2, *size, 2))
    outputs = to_numpy(layer(x))
    repeated = to_numpy(layer(np.tile(x, (1, 9, 9, 1))))
    np.testing.assert_allclose(outputs, repeated[:, : size[0], : size[1]], atol=1e-5)
    inputs = keras.Input((None, None, 2))
    model = keras.Model(inputs, layer(inputs))
    np.testing.assert_allclose(model.predict(x, verbose=0), outputs, atol=1e-6)


def test_policies():
    sdp_checks.check_policies(SDPResidualConv2D, {}, (4, 5, 3))


def test_activations():
    sdp_checks.check_activations(SDPResidualConv2D, {}, "0, 1")


def test_other_inputs_than_built_for_are_refused():
    layer = SDPResidualConv2D(4, 3)
    layer.build((None, 4, 4, 3))
    with pytest.raises(ValueError, match="to have value 3, but received input with shape"):
        layer(random_input((1, 4, 4, 2)))
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        layer(random_input((4, 4, 3)))


@pytest.mark.parametrize("bound", BOUNDS)
def test_half_precision_with_kernels_of_any_size(bound):
    layer = SDPResidualConv2D(4, 3, bound, dtype="mixed_float16")
    sdp_checks.check_half_precision(layer, (4, 3, 2))


@pytest.mark.parametrize("bound", BOUNDS)
def test_gradients(bound):
    sdp_checks.check_gradients(
        lambda **k: SDPResidualConv2D(3, 3, bound, activation="tanh", **k), (4, 3, 2)
    )
    sdp_checks.check_gradients_are_finite(SDPResidualConv2D(3, 3, bound), (4, 3, 2))


def test_refuses_slopes_beyond_1():
    with pytest.raises(ValueError, match=r"whose slope lies in \[0, 1\].*'gelu'"):
        SDPResidualConv2D(3, activation="gelu")
