import itertools

import pytest
import sdp_checks

from keras_lipnext.layers import SDPConv2D

BOUNDS = ["aol", "sll", "spectral"]
# The grid of "spectral" and that of the verified norm both add a little to their bounds.
NORM_GRID = {1: 1.0, 2: 1.02, 3: 1.02, 5: 1.02, 7: 1.1}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size, padding", [(3, "same"), ((2, 4), "circular")])
def test_equals_numpy(bound, size, padding):
    layer = SDPConv2D(3, size, bound, strides=2, padding=padding, activation="relu")
    sdp_checks.check_values(layer, (5, 6, 2), "SDPConv2D")


def kernel_sizes():
    """Every size and bound; of the large ones, whose norms take long, some on one backend only."""
    for bound, size in itertools.product(BOUNDS, NORM_GRID):
        few = size > 3 and (size, bound) not in ((5, "sll"), (7, "aol"), (7, "spectral"))
        yield pytest.param(bound, size, marks=pytest.mark.once if few else ())


@pytest.mark.parametrize("bound, size", list(kernel_sizes()))
def test_constant_of_any_kernel(bound, size):
    layer = SDPConv2D(3, size, bound)
    count = 32 if size < 5 else 16
    sdp_checks.check_constants(layer, (None, 8, 8, 4), count, NORM_GRID[size])


def test_policies():
    sdp_checks.check_policies(SDPConv2D, {"filters": 4, "kernel_size": 3}, (4, 5, 3))


def test_activations():
    sdp_checks.check_activations(SDPConv2D, {"filters": 4, "kernel_size": 3}, "-1, 1")


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
