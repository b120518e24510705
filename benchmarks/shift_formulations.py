"""The formulations of ShiftMixing's step that shifts.py measures against each other.

`STEPS` holds functions of (x, K, padding), x of shape (batch, height, width, channels) and K, the
kernel, of shape (channels, 4 g) with orthonormal columns, that answer x + (S - I)(x K) K^T.
"""

import numpy as np
from keras import ops

from keras_lipnext.layers import spatial_shift

DIRECTIONS = spatial_shift.directions(2)


def groups(rows):
    return zip(ops.split(rows, 4, axis=-1), ((i + 1, step) for i, step in DIRECTIONS))


def border(x, axis, start, stop):
    keep = [slice(None)] * axis + [slice(start, stop)]
    return x[tuple(keep)]


def zeros_beside(axis, step):
    padding = [(0, 0)] * 4
    padding[axis] = (1, 0) if step > 0 else (0, 1)
    return padding


def slid(x, axis, step, padding):
    """One group moved by slices joined by hand."""
    if padding == "circular":
        parts = (border(x, axis, -1, None), border(x, axis, None, -1))
        if step < 0:
            parts = (border(x, axis, 1, None), border(x, axis, None, 1))
        return ops.concatenate(parts, axis=axis)
    kept = border(x, axis, None, -1) if step > 0 else border(x, axis, 1, None)
    return ops.pad(kept, zeros_beside(axis, step))


def rolled(x, axis, step, padding):
    """One group moved by `roll`; for zero padding, with its border cut and padded."""
    if padding == "circular":
        return ops.roll(x, step, axis=axis)
    return slid(x, axis, step, padding)


def sources(height, width, padding):
    """(positions, 4) indices of where each position's four groups come from, and a mask."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    found = np.stack([grid - step * np.eye(2, dtype=int)[axis] for axis, step in DIRECTIONS], 2)
    inside = ((found >= 0) & (found < (height, width))).all(axis=-1)
    found %= (height, width)
    positions = found[..., 0] * width + found[..., 1]
    mask = np.ones_like(inside) if padding == "circular" else inside
    return positions.reshape(-1, 4), mask.reshape(-1, 4)


# Functions of (rows, padding), rows = x K of shape (batch, height, width, 4 g), that
# answer (S - I) rows.


def library(rows, padding):
    """What the library does."""
    return spatial_shift.shift_changes(rows, padding, "channels_last")


def roll(rows, padding):
    """Roll each group, join them, subtract."""
    moved = [rolled(part, axis, step, padding) for part, (axis, step) in groups(rows)]
    return ops.concatenate(moved, axis=-1) - rows


def roll_first(rows, padding):
    """Roll each group, subtract, join."""
    moved = [rolled(part, axis, step, padding) - part for part, (axis, step) in groups(rows)]
    return ops.concatenate(moved, axis=-1)


def roll_masked(rows, padding):
    """As `roll`; for zero padding, what came round the border is set to zero afterwards."""
    moved = [ops.roll(part, step, axis=axis) for part, (axis, step) in groups(rows)]
    moved = ops.concatenate(moved, axis=-1)
    if padding == "zero":
        _, height, width, columns = rows.shape
        _, mask = sources(height, width, padding)
        mask = np.repeat(mask, columns // 4, axis=1).reshape(height, width, columns)
        moved = ops.where(mask, moved, 0.0)
    return moved - rows


def slices(rows, padding):
    """Slices joined by hand along each axis, then joined, then subtracted."""
    moved = [slid(part, axis, step, padding) for part, (axis, step) in groups(rows)]
    return ops.concatenate(moved, axis=-1) - rows


def pad_and_slice(rows, padding):
    """All rows padded by one pixel at once, from which each group takes its window."""
    _, height, width, _ = rows.shape
    if padding == "zero":
        padded = ops.pad(rows, [(0, 0), (1, 1), (1, 1), (0, 0)])
    else:
        padded = ops.concatenate([rows[:, -1:], rows, rows[:, :1]], axis=1)
        padded = ops.concatenate([padded[:, :, -1:], padded, padded[:, :, :1]], axis=2)
    moved = []
    for part, (axis, step) in groups(padded):
        start = [1, 1]
        start[axis - 1] -= step
        moved.append(part[:, start[0] : start[0] + height, start[1] : start[1] + width])
    return ops.concatenate(moved, axis=-1) - rows


def gather_groups(rows, padding):
    """Each group takes its positions, then they are joined."""
    batch, height, width, columns = rows.shape
    index, mask = sources(height, width, padding)
    flat = ops.reshape(rows, (batch, height * width, columns))
    moved = [ops.take(p, index[:, i], axis=1) for i, (p, _) in enumerate(groups(flat))]
    if padding == "zero":
        moved = [ops.where(mask[:, i, None], m, 0.0) for i, m in enumerate(moved)]
    return ops.reshape(ops.concatenate(moved, axis=-1) - flat, rows.shape)


def gather(rows, padding):
    """One gather: positions and groups on one axis, of vectors of a group's channels."""
    batch, height, width, columns = rows.shape
    index, mask = sources(height, width, padding)
    flat = ops.reshape(rows, (batch, height * width * 4, columns // 4))
    moved = ops.take(flat, (4 * index + np.arange(4)).reshape(-1), axis=1)
    if padding == "zero":
        moved = ops.where(mask.reshape(-1, 1), moved, 0.0)
    return ops.reshape(moved - flat, rows.shape)


def einsum(rows, padding):
    """One einsum with S - I written as four matrices of positions x positions."""
    batch, height, width, columns = rows.shape
    index, mask = sources(height, width, padding)
    eye = np.eye(height * width, dtype="float32")
    difference = np.stack([eye[index[:, i]] * mask[:, i, None] - eye for i in range(4)])
    flat = ops.reshape(rows, (batch, height * width, 4, columns // 4))
    return ops.reshape(ops.einsum("ipq,bqig->bpig", difference, flat), rows.shape)


def leading(rows, padding):
    """Groups brought to a leading axis, where each is whole, and back."""
    batch, height, width, columns = rows.shape
    split = ops.moveaxis(ops.reshape(rows, (batch, height, width, 4, columns // 4)), 3, 0)
    moved = [rolled(split[n], i + 1, step, padding) for n, (i, step) in enumerate(DIRECTIONS)]
    return ops.reshape(ops.stack(moved, axis=3), rows.shape) - rows


SHIFTS = (
    library,
    roll,
    roll_first,
    roll_masked,
    slices,
    pad_and_slice,
    gather_groups,
    gather,
    einsum,
    leading,
)


def mixing(shift):
    """The whole step around a formulation of (S - I) rows."""

    def call(x, kernel, padding):
        rows = ops.matmul(x, kernel)
        return x + ops.matmul(shift(rows, padding), ops.transpose(kernel))

    return call


def partial_products(x, kernel, padding):
    """x + sum_i (S_i - I)(x K_i) K_i^T: four pairs of thinner products, no joins."""
    result = x
    for columns, (axis, step) in groups(kernel):
        part = ops.matmul(x, columns)
        part = rolled(part, axis, step, padding) - part
        result = result + ops.matmul(part, ops.transpose(columns))
    return result


def floor(x, kernel, padding):
    """The two products and the sum alone, nothing shifted."""
    return x + ops.matmul(ops.matmul(x, kernel), ops.transpose(kernel))


STEPS = {
    "floor": floor,
    **{shift.__name__: mixing(shift) for shift in SHIFTS},
    "partial_products": partial_products,
}
