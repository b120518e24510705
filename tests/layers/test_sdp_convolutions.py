"""What SDPConv2D and SDPResidualConv2D must do alike."""

import itertools

import keras
import numpy as np
import pytest
import sdp_checks
from data import called
from layer_checks import random_input

from keras_lipnext.layers import SDPConv2D, SDPResidualConv2D

BOUNDS = ["aol", "sll", "spectral"]
both = pytest.mark.parametrize("convolution", [SDPConv2D, SDPResidualConv2D])


@both
@pytest.mark.parametrize("bound", BOUNDS)
def test_diagonal_equals_its_definition(convolution, bound):
    for size in (1, (2, 3)):
        sdp_checks.check_diagonal(convolution(4, size, bound, dtype="float64"), (5, 5, 3))


def executed():
    """Every size and bound with each layer, and on one backend all of both."""
    sizes = (
        (1, "same", (5, 5)),
        (3, "same", (5, 6)),
        (4, "circular", (6, 5)),
        (6, "same", (6, 6)),
        (7, "circular", (7, 7)),
        (6, "circular", (2, 1)),
    )
    for (i, convolution), (j, bound), (k, size) in itertools.product(
        enumerate((SDPConv2D, SDPResidualConv2D)), enumerate(BOUNDS), enumerate(sizes)
    ):
        marks = () if (i + k) % 3 == j else pytest.mark.once
        yield pytest.param(convolution, bound, *size, marks=marks)


@pytest.mark.parametrize("convolution, bound, size, padding, sides", list(executed()))
def test_constant_of_the_executed_kernel(convolution, bound, size, padding, sides):
    layer = convolution(4, size, bound, padding=padding)
    sdp_checks.check_executed_kernel(layer, sides)


@both
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 5)])
def test_images_smaller_than_the_kernel_wrap_around_more_than_once(convolution, size):
    """As a copy of the image repeated to all sides, of sizes known or not."""
    layer = convolution(3, 7, padding="circular", kernel_initializer="glorot_normal")
    layer.build((None, None, None, 2))
    x = random_input((2, *size, 2))
    outputs = called(layer, x)
    repeated = called(layer, np.tile(x, (1, 9, 9, 1)))
    np.testing.assert_allclose(outputs, repeated[:, : size[0], : size[1]], atol=1e-5)
    if size == (2, 1):
        inputs = keras.Input((None, None, 2))
        model = keras.Model(inputs, layer(inputs))
        np.testing.assert_allclose(model.predict(x, verbose=0), outputs, atol=1e-6)


@both
def test_other_inputs_than_built_for_are_refused(convolution):
    layer = convolution(4, 3)
    layer.build((None, 4, 4, 3))
    with pytest.raises(ValueError, match="to have value 3, but received input with shape"):
        layer(random_input((1, 4, 4, 2)))
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        layer(random_input((4, 4, 3)))


@pytest.mark.parametrize(
    "convolution, bound",
    [
        (SDPConv2D, "aol"),
        (SDPResidualConv2D, "sll"),
        (SDPConv2D, "spectral"),
        pytest.param(SDPResidualConv2D, "aol", marks=pytest.mark.once),
        pytest.param(SDPConv2D, "sll", marks=pytest.mark.once),
        pytest.param(SDPResidualConv2D, "spectral", marks=pytest.mark.once),
    ],
)
def test_gradients(convolution, bound):
    sdp_checks.check_gradients(
        lambda **k: convolution(3, 3, bound, activation="tanh", **k), (4, 3, 2)
    )
    sdp_checks.check_gradients_are_finite(convolution(3, 3, bound), (4, 3, 2))
