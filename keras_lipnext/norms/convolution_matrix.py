"""Convolutions of small inputs as explicit matrices (block-Toeplitz, without wrap-around)."""

import itertools
import math

import numpy as np


def output_sides(kernel, sides, strides, padding, dilation_rate):
    """Spatial sides of a convolution's output.

    Args:
        kernel: Shape (*spatial, inputs, outputs).
        sides: Spatial sides of the input.
        strides, dilation_rate: One integer a spatial axis.
        padding: "valid", "same" or "causal", as Keras means them.
    """
    return tuple(
        max((side - span) // stride + 1, 0) if padding == "valid" else math.ceil(side / stride)
        for side, span, stride in zip(sides, _spans(kernel, dilation_rate), strides)
    )


def convolution_matrices(kernel, sides, strides, padding, dilation_rate, groups=1):
    """The matrices of a convolution on flattened inputs. Entries are the kernel's, exactly.

    Args:
        kernel: Shape (*spatial, inputs // groups, outputs).
        sides, strides, padding, dilation_rate: As for `output_sides`.
        groups: Integer, divides the outputs.

    Returns:
        Array of shape (groups, prod(sides) * inputs // groups, prod(output_sides) * outputs //
        groups), both flattened row-major, channels last: `y = x @ matrix`.
    """
    outputs = output_sides(kernel, sides, strides, padding, dilation_rate)
    spans = _spans(kernel, dilation_rate)
    *spatial, fan_in, channels = kernel.shape
    kernel = np.moveaxis(kernel.reshape(*spatial, fan_in, groups, channels // groups), -2, 0)
    matrix = np.zeros((groups, *sides, fan_in, *outputs, kernel.shape[-1]), kernel.dtype)
    for tap in itertools.product(*map(range, spatial)):
        index = []  # on each axis: the inputs that this tap reads, and for which outputs
        for axis, t in enumerate(tap):
            places = np.arange(outputs[axis])
            reads = places * strides[axis] + t * dilation_rate[axis]
            if padding == "causal":
                reads -= spans[axis] - 1
            elif padding == "same":  # the odd entry at the end
                total = (outputs[axis] - 1) * strides[axis] + spans[axis] - sides[axis]
                reads -= max(total, 0) // 2
            inside = (reads >= 0) & (reads < sides[axis])
            index.append((reads[inside], places[inside]))
        reads = np.ix_(*(r for r, _ in index))
        places = np.ix_(*(p for _, p in index))
        # NumPy puts the axes of indices that stand apart in front of all others.
        matrix[(slice(None), *reads, slice(None), *places)] = kernel[(slice(None), *tap)]
    return matrix.reshape(groups, math.prod(sides) * fan_in, -1)


def _spans(kernel, dilation_rate):
    """What the kernel reaches over along each axis."""
    return [(side - 1) * rate + 1 for side, rate in zip(kernel.shape, dilation_rate)]
