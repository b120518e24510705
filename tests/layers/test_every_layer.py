"""Every layer of the library does what `layer_checks` asks of it: a new layer is a new `Row`."""

import itertools

import keras
import pytest
from layer_checks import CHECKS, Row, applies, once

from keras_lipnext import layers
from keras_lipnext.layers import (
    BetaAbs,
    FullShiftMixing,
    GroupSort,
    Householder,
    L2Pool,
    LipNeXtBlock,
    MaxMin,
    NormalizedDense,
    OrthogonalDense,
    PatchEmbedding,
    PositionalBias,
    SandwichDense,
    Scale,
    SDPConv2D,
    SDPDense,
    SDPResidualConv2D,
    SDPResidualDense,
    ShiftMixing,
    SpatialShift,
)

IMAGES = (3, 4, 5, 16)
BOUNDS = ["aol", "sll", "spectral"]
DENSE_BOUNDS = [*BOUNDS, "orthogonal"]


def shifting(cls, arguments, variant, channels=16):
    shape = (3, 4, 5, channels)
    return Row(cls, arguments, shape, shape, variant=variant)


def rows():
    for shape in ((2, 3, 4, 8), (3, 8)):
        yield Row(BetaAbs, {"beta": 0.5}, shape, shape, variant=len(shape) == 2)
    yield from of_other_ranks()
    for beta in (0, 0.75, 1):
        yield Row(BetaAbs, {"beta": beta, "axis": 1}, (2, 8, 3), (2, 8, 3), variant=True)
    for cls in (SpatialShift, ShiftMixing, FullShiftMixing):
        yield shifting(cls, {"ratio": 1 / 8, "padding": "zero"}, False)
        for padding in ("circular", "zero"):
            yield shifting(cls, {"ratio": 1 / 4, "padding": padding}, True, 8)
        yield shifting(cls, {"ratio": 1 / 8, "padding": "circular"}, True)
    yield shifting(SpatialShift, {"ratio": 1 / 6}, True, 12)
    yield Row(L2Pool, {"epsilon": 1e-6}, (3, 4, 5, 6), (3, 6))
    for padding, mixing in (("circular", "full"), ("zero", "reduced")):
        arguments = {"shift_ratio": 1 / 8, "beta": 0.5, "padding": padding, "mixing": mixing}
        yield Row(LipNeXtBlock, arguments, (2, 3, 4, 16), (2, 3, 4, 16), sizes=True)
    yield Row(MaxMin, {}, (3, 8), (3, 8))
    yield Row(MaxMin, {"axis": 1}, (2, 4, 3), (2, 4, 3), variant=True)
    yield Row(GroupSort, {"group_size": 4}, (3, 8), (3, 8))
    for size, axis in ((3, 1), (None, 1), (1, 2), (2, -1)):
        arguments = {"group_size": size, "axis": axis}
        yield Row(GroupSort, arguments, (2, 6, 4), (2, 6, 4), variant=True)
    yield Row(Householder, {"angle_initializer": "random_normal"}, (3, 8), (3, 8))
    yield Row(Householder, {"axis": 1}, (2, 4, 3), (2, 4, 3), variant=True)
    yield Row(Scale, {"factor": -2.5}, (3, 2, 4), (3, 2, 4), nominal=None)
    for use_bias in (True, False):  # single logits, not the vector of them, are 1-Lipschitz
        arguments = {"units": 5, "use_bias": use_bias}
        yield Row(NormalizedDense, arguments, (4, 6), (4, 5), nominal=None, variant=not use_bias)
    for units in (6, 3, 9):
        yield Row(OrthogonalDense, {"units": units}, (4, 6), (4, units))
    for arguments, shape, output_shape in (
        ({"units": 5, "activation": "relu", "use_bias": False}, (2, 3, 3, 4), (2, 3, 3, 5)),
        ({"units": 5, "axis": 1, "bias_initializer": "ones"}, (2, 4, 3, 3), (2, 5, 3, 3)),
        ({"units": 4, "kernel_initializer": "glorot_uniform"}, (2, 7, 4), (2, 7, 4)),
    ):
        yield Row(OrthogonalDense, arguments, shape, output_shape, variant=True)
    for units in (20, 12):
        arguments = {"patch_size": 2, "units": units}
        shapes = (2, 4, 6, 3), (2, 2, 3, units)
        yield Row(PatchEmbedding, arguments, *shapes, variant=units == 12)
    yield Row(PositionalBias, {"initializer": "normal"}, (2, 3, 4, 5), (2, 3, 4, 5), sizes=True)
    yield from sdp_rows()


def of_other_ranks():
    """Series and volumes: two directions of shifts along each axis."""
    for sides, ratio in (((5,), 1 / 2), ((2, 3, 4), 1 / 6)):
        shape = (3, *sides, 12)
        for cls, padding in itertools.product(
            (SpatialShift, ShiftMixing, FullShiftMixing), ("circular", "zero")
        ):
            yield Row(cls, {"ratio": ratio, "padding": padding}, shape, shape, variant=True)
        yield Row(L2Pool, {"epsilon": 1e-6}, shape, (3, 12), variant=True)
        arguments = {"initializer": "normal"}
        yield Row(PositionalBias, arguments, shape, shape, sizes=True, variant=True)
        arguments = {"shift_ratio": ratio, "beta": 0.5, "padding": "zero"}
        yield Row(LipNeXtBlock, arguments, shape, shape, sizes=True, variant=True)
    arguments = {"patch_size": 2, "units": 20}
    for sides in ((6,), (2, 4, 6)):
        shapes = (2, *sides, 2), (2, *(n // 2 for n in sides), 20)
        yield Row(PatchEmbedding, arguments, *shapes, variant=True)


def sdp_rows():
    yield Row(SDPDense, {"units": 5, "bound": "sll"}, (4, 6), (4, 5))
    for (i, bound), (j, units) in itertools.product(enumerate(DENSE_BOUNDS), enumerate((3, 9))):
        arguments = {"units": units, "bound": bound, "activation": "tanh", "use_bias": units > 3}
        once = bound != "orthogonal" and (i + j) % 2 == 1
        yield Row(SDPDense, arguments, (2, 3, 6), (2, 3, units), variant=True, once=once)
    arguments = {"hidden_units": 5, "bound": "sll", "activation": "tanh"}
    yield Row(SDPResidualDense, arguments, (4, 6), (4, 6))
    for (i, bound), (j, hidden) in itertools.product(
        enumerate(DENSE_BOUNDS), enumerate((3, None, 9))
    ):
        arguments = {"hidden_units": hidden, "bound": bound, "use_bias": hidden != 3}
        once = bound != "orthogonal" and i != j
        yield Row(SDPResidualDense, arguments, (2, 3, 6), (2, 3, 6), variant=True, once=once)
    yield Row(SandwichDense, {"units": 5}, (4, 6), (4, 5))
    for units, activation in ((3, "tanh"), (9, "relu"), (6, "sigmoid")):
        arguments = {"units": units, "activation": activation, "use_bias": units > 3}
        # A sigmoid's slope is at most 1/4, which the constant does not heed.
        reached = 0.2 if activation == "sigmoid" else 0.9
        shapes = (2, 3, 6), (2, 3, units)
        yield Row(SandwichDense, arguments, *shapes, reached=reached, variant=True)
    yield Row(SDPConv2D, {"filters": 4, "kernel_size": 3}, (3, 5, 4, 2), (3, 5, 4, 4))
    for (i, bound), (j, (size, strides, padding, sides)) in itertools.product(
        enumerate(BOUNDS),
        enumerate(
            (
                (1, 1, "same", (5, 4)),
                (2, 1, "circular", (5, 4)),
                ((3, 5), 2, "same", (3, 2)),
                (5, (2, 3), "circular", (3, 2)),
            )
        ),
    ):
        arguments = {"filters": 3, "kernel_size": size, "bound": bound, "strides": strides}
        arguments |= {"padding": padding, "kernel_initializer": "glorot_normal"}
        reached = 0.9 if strides == 1 else 0.3  # the bound counts all positions
        shapes, once = ((2, 5, 4, 2), (2, *sides, 3)), i != j % 3
        yield Row(SDPConv2D, arguments, *shapes, reached=reached, variant=True, once=once)
    arguments = {"hidden_filters": 4, "kernel_size": 3, "activation": "tanh"}
    yield Row(SDPResidualConv2D, arguments, (3, 5, 4, 2), (3, 5, 4, 2))
    options = ((None, 1, "same"), (5, 2, "circular"), (1, (3, 5), "same"), (3, 5, "circular"))
    for (i, bound), (j, (hidden, size, padding)) in itertools.product(
        enumerate(BOUNDS), enumerate(options)
    ):
        arguments = {"hidden_filters": hidden, "kernel_size": size, "bound": bound}
        arguments |= {"padding": padding}
        shape, once = (2, 5, 4, 2), i != (j + 1) % 3
        yield Row(SDPResidualConv2D, arguments, shape, shape, variant=True, once=once)


ROWS = list(rows())


@pytest.mark.parametrize(
    "check, row",
    [
        pytest.param(check, row, marks=pytest.mark.once if once(check, row) else ())
        for row in ROWS
        for check in CHECKS
        if applies(check, row)
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).removeprefix("check_"),
)
def test_every_layer(check, row):
    check(row)


def test_no_layer_is_missing():
    public = {getattr(layers, name) for name in layers.__all__}
    known = {row.cls for row in ROWS if not row.variant}
    assert {cls for cls in public if issubclass(cls, keras.Layer)} == known
