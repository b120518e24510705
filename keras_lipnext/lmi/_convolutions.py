"""Convolutions of small inputs as explicit matrices (block-Toeplitz, without wrap-around)."""

import math

import numpy as np


def output_sides(kernel, shape, strides, padding, dilation_rate):
    """Spatial sides of a convolution's output.

    Args:
        kernel: Shape (*spatial, inputs, outputs).
        shape: Of the input, (*spatial, inputs), without batch axis.
        strides, dilation_rate: One integer a spatial axis.
        padding: "valid" or "same", as Keras means them.
    """
    return tuple(
        math.ceil(side / stride) if padding == "same" else (side - span) // stride + 1
        for side, span, stride in zip(shape, _spans(kernel, dilation_rate), strides)
    )


def convolution_matrix(kernel, shape, strides, padding, dilation_rate):
    """The matrix of a convolution on flattened inputs. Entries are those of the kernel, exactly.

    Args:
        As for `output_sides`: one or two spatial axes.

    Returns:
        Array of shape (prod(output), prod(input)), both flattened row-major, channels last.
    """
    sides = output_sides(kernel, shape, strides, padding, dilation_rate)
    places = []  # for each axis: the input read by each output at each offset of the kernel
    for axis, span in enumerate(_spans(kernel, dilation_rate)):
        total = max((sides[axis] - 1) * strides[axis] + span - shape[axis], 0)
        before = total // 2 if padding == "same" else 0
        offsets = np.arange(kernel.shape[axis]) * dilation_rate[axis]
        places.append(np.arange(sides[axis]) * strides[axis] - before + offsets[:, None])
    if len(sides) == 1:  # one row
        kernel, shape, sides = kernel[None], (1, *shape), (1, *sides)
        places.insert(0, np.zeros((1, 1), int))
    matrix = np.zeros((*sides, kernel.shape[-1], *shape), kernel.dtype)
    for i, rows in enumerate(places[0]):
        for j, columns in enumerate(places[1]):
            out_row, out_column = np.nonzero(
                ((rows >= 0) & (rows < shape[0]))[:, None]
                & ((columns >= 0) & (columns < shape[1]))[None, :]
            )
            matrix[out_row, out_column, :, rows[out_row], columns[out_column], :] = kernel[i, j].T
    return matrix.reshape(math.prod(sides) * kernel.shape[-1], math.prod(shape))


def _spans(kernel, dilation_rate):
    """What the kernel reaches over along each axis."""
    return [(side - 1) * rate + 1 for side, rate in zip(kernel.shape, dilation_rate)]
