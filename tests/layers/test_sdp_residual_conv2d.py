import pytest
import sdp_checks

from keras_lipnext.layers import SDPResidualConv2D

BOUNDS = ["aol", "sll", "spectral"]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size, padding", [(3, "same"), ((2, 4), "circular"), (2, "same")])
def test_equals_numpy(bound, size, padding):
    layer = SDPResidualConv2D(3, size, bound, padding=padding)
    sdp_checks.check_values(layer, (5, 6, 2), "SDPResidualConv2D")


@pytest.mark.parametrize("bound", BOUNDS)
def test_constant_of_any_kernel(bound):
    sdp_checks.check_constants(SDPResidualConv2D(3, 3, bound), (None, 8, 8, 4), 32, 1.02)


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
