"""Layers on one and three spatial axes: formulas written out by loops, and isometries.

What every layer must do at any rank is in test_every_layer.py.
"""

import itertools

import keras
import numpy as np
import pytest
from data import called
from hypothesis import given
from hypothesis import strategies as st
from layer_checks import random_input

from keras_lipnext import backend
from keras_lipnext.layers import (
    FullShiftMixing,
    L2Pool,
    LipNeXtBlock,
    PatchEmbedding,
    PositionalBias,
    ShiftMixing,
    SpatialShift,
)

SIDES = [(5,), (4, 3), (3, 2, 4), (1,), (2, 1, 3)]


def moved(x, group, padding):
    """Entry by entry: group 2a comes from the next position along axis a, 2a + 1 from the last."""
    y = x.copy()
    sides = x.shape[1:-1]
    for place in np.ndindex(*sides):
        for g, (axis, step) in enumerate(itertools.product(range(len(sides)), (-1, 1))):
            source = list(place)
            source[axis] -= step
            inside = padding == "circular" or 0 <= source[axis] < sides[axis]
            source[axis] %= sides[axis]
            of = slice(g * group, (g + 1) * group)
            y[(slice(None), *place, of)] = x[(slice(None), *source, of)] * inside
    return y


def layout(x, data_format):
    return x if data_format == "channels_last" else np.moveaxis(x, -1, 1)


def answer(layer, x):
    """What a layer of float64 answers to channels-last inputs, channels last."""
    with backend.float64_scope():
        x = layout(x, layer.data_format)
        layer.build(x.shape)
        y = called(layer, x)
    return y if layer.data_format == "channels_last" or y.ndim < x.ndim else np.moveaxis(y, 1, -1)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("padding", ["circular", "zero"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_shifts_equal_numpy(sides, padding, data_format):
    x = random_input((2, *sides, 14), "float64")
    layer = SpatialShift(1 / 7, padding, data_format=data_format, dtype="float64")
    np.testing.assert_array_equal(answer(layer, x), moved(x, 2, padding))


def test_a_volume_moves_the_way_it_says():
    x = np.zeros((1, 3, 3, 3, 7))
    x[0, 1, 1, 1] = 1
    y = answer(SpatialShift(1 / 7, dtype="float64"), x)[0]
    ways = [(0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2), (1, 1, 1)]
    for channel, place in enumerate(ways):
        assert y[..., channel].sum() == y[(*place, channel)] == 1


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("padding", ["circular", "zero"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_mixing_equals_the_papers_formula(sides, padding, data_format):
    """R^T S R x with all of R, and from the rows that move alone."""
    x = random_input((2, *sides, 14), "float64")
    full = FullShiftMixing(1 / 7, padding, data_format=data_format, dtype="float64")
    found = answer(full, x)
    with backend.float64_scope():
        r = np.asarray(keras.ops.convert_to_numpy(full.kernel)).T
        reduced = full.reduced()
        assert tuple(reduced.kernel.shape) == (14, 4 * len(sides))
    np.testing.assert_allclose(found, moved(x @ r.T, 2, padding) @ r, atol=1e-13)
    np.testing.assert_allclose(answer_of_built(reduced, x), found, atol=1e-13)


def answer_of_built(layer, x):
    with backend.float64_scope():
        y = called(layer, layout(x, layer.data_format))
    return y if layer.data_format == "channels_last" else np.moveaxis(y, 1, -1)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_pool_and_bias_equal_numpy(sides, data_format):
    x = random_input((2, *sides, 6), "float64")
    layer = L2Pool(epsilon=0.1, data_format=data_format, dtype="float64")
    positions = x.reshape(2, -1, 6)
    np.testing.assert_allclose(answer(layer, x), np.sqrt((positions**2).sum(1) + 0.1), rtol=1e-14)
    layer = PositionalBias("normal", data_format=data_format, dtype="float64")
    found = answer(layer, x)
    bias = keras.ops.convert_to_numpy(layer.bias)
    assert bias.shape == ((*sides, 1) if data_format == "channels_last" else (1, *sides))
    np.testing.assert_array_equal(found, x + bias.reshape(*sides, 1))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("counts", [(3,), (2, 3), (2, 1, 3)], ids=str)
def test_patches_are_what_slices_are(counts, data_format):
    x = random_input((2, *(2 * n for n in counts), 3), "float64")
    layer = PatchEmbedding(2, 24, data_format=data_format, dtype="float64")
    found = answer(layer, x)
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    assert found.shape == (2, *counts, 24)
    for place in np.ndindex(*counts):
        patch = x[(slice(None), *(slice(2 * i, 2 * i + 2) for i in place))]
        expected = patch.reshape(2, -1) @ kernel
        np.testing.assert_allclose(found[(slice(None), *place)], expected, atol=1e-13)


@pytest.mark.parametrize("padding", ["circular", "zero"])
@pytest.mark.parametrize("sides", [(5,), (3, 2, 4)], ids=str)
def test_a_block_equals_the_papers_formula(sides, padding):
    """beta_abs(M R^T S(R (x + p)) + b), all matrices whole."""
    x = random_input((2, *sides, 14), "float64")
    block = LipNeXtBlock(1 / 7, 0.5, padding, "full", dtype="float64")
    with backend.float64_scope():
        block.build(x.shape)
        block.positional_bias.bias.assign(random_input((*sides, 1), "float64", seed=1))
        block.dense.bias.assign(random_input((14,), "float64", seed=2))
        found = called(block, x)
        p, r, m, b = map(
            keras.ops.convert_to_numpy,
            (
                block.positional_bias.bias,
                block.mixing.kernel,
                block.dense.kernel,
                block.dense.bias,
            ),
        )
    z = moved((x + p) @ r, 2, padding) @ r.T @ m + b
    z[..., :7] = abs(z[..., :7])
    np.testing.assert_allclose(found, z, atol=1e-13)


def energies(x):
    return (x.reshape(len(x), -1) ** 2).sum(1)


@given(
    sides=st.sampled_from(SIDES),
    data_format=st.sampled_from(["channels_last", "channels_first"]),
    cls=st.sampled_from([SpatialShift, ShiftMixing, FullShiftMixing]),
    seed=st.integers(0, 99),
)
def test_isometries(sides, data_format, cls, seed):
    """Circular shifts keep all of the norm; with zeros at the border none is gained.

    And what they lose is what leaves the map: of plain shifts the entries at its borders.
    """
    x = random_input((2, *sides, 12), "float64", seed=seed)
    layer = cls(1 / 12, data_format=data_format, dtype="float64")
    np.testing.assert_allclose(energies(answer(layer, x)), energies(x), rtol=1e-12)
    layer = cls(1 / 12, "zero", data_format=data_format, dtype="float64")
    after = energies(answer(layer, x))
    assert (after <= energies(x) * (1 + 1e-12)).all()
    if cls is SpatialShift:
        lost = sum(
            (np.take(x, end, axis=axis + 1)[..., 2 * axis + i] ** 2).reshape(2, -1).sum(1)
            for axis, (i, end) in itertools.product(range(len(sides)), enumerate((0, -1)))
        )
        np.testing.assert_allclose(after, energies(x) - lost, rtol=1e-12)


@given(
    counts=st.sampled_from([(3,), (2, 3), (2, 1, 3)]),
    patch=st.integers(1, 2),
    data_format=st.sampled_from(["channels_last", "channels_first"]),
    seed=st.integers(0, 99),
)
def test_stems_and_pools_keep_the_norm(counts, patch, data_format, seed):
    x = random_input((2, *(patch * n for n in counts), 3), "float64", seed=seed)
    stem = PatchEmbedding(patch, 24, data_format=data_format, dtype="float64")
    np.testing.assert_allclose(energies(answer(stem, x)), energies(x), rtol=1e-12)
    pool = L2Pool(0.0, data_format=data_format, dtype="float64")
    np.testing.assert_allclose(energies(answer(pool, x)), energies(x), rtol=1e-12)


LAYERS = [SpatialShift, ShiftMixing, FullShiftMixing, L2Pool, PositionalBias, LipNeXtBlock]


@pytest.mark.parametrize("cls", [*LAYERS, lambda: PatchEmbedding(2, 64)])
@pytest.mark.parametrize("shape", [(2, 16), (2, 2, 2, 2, 2, 16)], ids=str)
def test_other_ranks_are_refused(cls, shape):
    message = (
        r"series of rank 3, \(batch, length, channels\), or images of rank 4, \(batch, height, "
        r"width, channels\), or volumes of rank 5, .*Received: input_shape=\(2, "
    )
    with pytest.raises(ValueError, match=message):
        cls().build(shape)


@pytest.mark.parametrize("shape, names", [((2, None, 3), "length"), ((2, 4, None, 3, 3), "depth")])
def test_biases_name_the_sizes_they_need(shape, names):
    with pytest.raises(ValueError, match=rf"one value a position and needs a known {names}"):
        PositionalBias().build(shape)


def test_patches_that_do_not_tile_name_the_axis():
    with pytest.raises(ValueError, match=r"series with patches of 3 positions.*length=8, not a mu"):
        PatchEmbedding(3, 9).build((2, 8, 1))
    with pytest.raises(ValueError, match=r"volumes with patches of 3 x 3 x 3.*depth=8, not a mult"):
        PatchEmbedding(3, 27).build((2, 8, 3, 3, 1))
    with pytest.raises(ValueError, match=r"units >= patch_size\^3 \* channels = 8. Received"):
        PatchEmbedding(2, 7).build((2, 8, 2, 2, 1))


def test_a_built_layer_keeps_to_its_rank():
    layer = SpatialShift(1 / 8)
    layer.build((2, 4, 8))
    with pytest.raises(ValueError, match="expected ndim=3, found ndim=4"):
        layer(np.ones((2, 4, 4, 8)))
