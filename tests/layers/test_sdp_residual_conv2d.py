import pytest
import sdp_checks
from layer_checks import check_data_formats, check_layer, check_variant

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


def test_policies():
    sdp_checks.check_policies(SDPResidualConv2D, {}, (4, 5, 3))


def test_activations():
    sdp_checks.check_activations(SDPResidualConv2D, {}, "0, 1")


@pytest.mark.parametrize("bound", BOUNDS)
def test_half_precision_with_kernels_of_any_size(bound):
    layer = SDPResidualConv2D(4, 3, bound, dtype="mixed_float16")
    sdp_checks.check_half_precision(layer, (4, 3, 2))


def test_refuses_slopes_beyond_1():
    with pytest.raises(ValueError, match=r"whose slope lies in \[0, 1\].*'gelu'"):
        SDPResidualConv2D(3, activation="gelu")
