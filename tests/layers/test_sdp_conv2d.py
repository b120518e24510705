import keras
import numpy as np
import pytest
import sdp_checks
from data import to_numpy
from layer_checks import check_data_formats, check_layer, check_variant, random_input

from keras_lipnext.layers import SDPConv2D

BOUNDS = ["aol", "sll", "spectral"]
# The grid of "spectral" and that of the verified norm both add a little to their bounds.
NORM_GRID = {1: 1.0, 2: 1.02, 3: 1.02, 5: 1.02, 7: 1.1}


def test_basics():
    check_layer(SDPConv2D, {"filters": 4, "kernel_size": 3}, (3, 5, 4, 2), (3, 5, 4, 4))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    "size, strides, padding, shape",
    [
        (1, 1, "same", (5, 4)),
        (2, 1, "circular", (5, 4)),
        ((3, 5), 2, "same", (3, 2)),
        (7, (2, 3), "circular", (3, 2)),
    ],
)
def test_variants(bound, size, strides, padding, shape):
    arguments = {"filters": 3, "kernel_size": size, "bound": bound, "strides": strides}
    arguments |= {"padding": padding, "kernel_initializer": "glorot_normal"}
    check_variant(SDPConv2D, arguments, (2, 5, 4, 2), (2, *shape, 3))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size, padding", [(3, "same"), ((2, 4), "circular")])
def test_equals_numpy(bound, size, padding):
    layer = SDPConv2D(3, size, bound, strides=2, padding=padding, activation="relu")
    sdp_checks.check_values(layer, (5, 6, 2), "SDPConv2D")


@pytest.mark.parametrize("bound", BOUNDS)
def test_data_formats(bound):
    arguments = {"filters": 3, "kernel_size": 3, "bound": bound, "strides": 2}
    check_data_formats(SDPConv2D, arguments, (2, 5, 4, 2))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size", NORM_GRID)
def test_constant_of_any_kernel(bound, size):
    layer = SDPConv2D(3, size, bound)
    count = 64 if size < 5 else 24
    sdp_checks.check_constants(layer, (None, 8, 8, 4), count, NORM_GRID[size])


@pytest.mark.parametrize("bound", BOUNDS)
def test_diagonal_equals_its_definition(bound):
    for size in (1, (2, 3)):
        sdp_checks.check_diagonal(SDPConv2D(4, size, bound, dtype="float64"), (5, 5, 3))


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
    layer = SDPConv2D(4, size, bound, padding=padding)
    sdp_checks.check_executed_kernel(layer, sides)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 5)])
def test_images_smaller_than_the_kernel_wrap_around_more_than_once(size):
    """As a copy of the image repeated to all sides, of sizes known or not."""
    layer = SDPConv2D(3, 7, padding="circular", kernel_initializer="glorot_normal")
    layer.build((None, None, None, 2))
    x = random_input((2, *size, 2))
    outputs = to_numpy(layer(x))
    repeated = to_numpy(layer(np.tile(x, (1, 9, 9, 1))))
    np.testing.assert_allclose(outputs, repeated[:, : size[0], : size[1]], atol=1e-5)
    inputs = keras.Input((None, None, 2))
    model = keras.Model(inputs, layer(inputs))
    np.testing.assert_allclose(model.predict(x, verbose=0), outputs, atol=1e-6)


def test_policies():
    sdp_checks.check_policies(SDPConv2D, {"filters": 4, "kernel_size": 3}, (4, 5, 3))


def test_activations():
    sdp_checks.check_activations(SDPConv2D, {"filters": 4, "kernel_size": 3}, "-1, 1")


def test_other_inputs_than_built_for_are_refused():
    layer = SDPConv2D(4, 3)
    layer.build((None, 4, 4, 3))
    with pytest.raises(ValueError, match="to have value 3, but received input with shape"):
        layer(random_input((1, 4, 4, 2)))
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        layer(random_input((4, 4, 3)))


@pytest.mark.parametrize("bound", BOUNDS)
def test_gradients(bound):
    sdp_checks.check_gradients(
        lambda **k: SDPConv2D(3, 3, bound, activation="tanh", **k), (4, 3, 2)
    )
    sdp_checks.check_gradients_are_finite(SDPConv2D(3, 3, bound), (4, 3, 2))


def test_starts_as_an_isometry():
    layer = SDPConv2D(6, 3)
    layer.build((None, 5, 5, 4))
    assert sdp_checks.norm(sdp_checks.to_numpy(layer.effective_kernel())) > 1 - 1e-4


def test_refusals():
    with pytest.raises(ValueError, match="holds for matrices only"):
        SDPConv2D(4, 3, "orthogonal")
    with pytest.raises(ValueError, match=r"`padding` must be .* Received: padding='valid'"):
        SDPConv2D(4, 3, padding="valid")
    with pytest.raises(ValueError, match=r"`kernel_size` is an integer or two"):
        SDPConv2D(4, (3, 3, 3))
    for strides in ((1, 2, 3), (2,)):
        with pytest.raises(ValueError, match=r"`strides` is an integer or two. Received: strides="):
            SDPConv2D(4, 3, strides=strides)
