"""Layers that are linear maps along single axes: their matrices, and what applies them.

Resizing and adaptive pooling weigh each axis on its own. The backends of Keras evaluate them in
float32 whatever the input; written as one matrix for each axis, their norm is proven and their
evaluation is that of a product.
"""

import math

import keras
import numpy as np
from keras import ops

kl = keras.layers


def nearest(inputs, outputs):
    """Nearest entries, shape (inputs, outputs): i reads floor((i + 1/2) inputs / outputs)."""
    matrix = np.zeros((inputs, outputs))
    columns = np.arange(outputs)
    matrix[(2 * columns + 1) * inputs // (2 * outputs), columns] = 1
    return matrix


def bilinear(inputs, outputs):
    """Linear interpolation, shape (inputs, outputs), entries correctly rounded.

    Output i reads position (i + 1/2) inputs / outputs - 1/2, clipped to the axis: a fraction of
    denominator 2 outputs, so that whole numbers tell its neighbours and weights exactly.
    """
    matrix = np.zeros((inputs, outputs))
    whole, columns = 2 * outputs, np.arange(outputs)
    position = np.clip((2 * columns + 1) * inputs - outputs, 0, (inputs - 1) * whole)
    low, part = position // whole, position % whole
    matrix[low, columns] = (whole - part) / whole
    matrix[np.minimum(low + 1, inputs - 1), columns] += part / whole
    return matrix


def windows(inputs, outputs):
    """(starts, ends) of the windows of adaptive pooling: floor(i n / m) to ceil((i + 1) n / m)."""
    edges = np.arange(outputs + 1) * inputs
    return edges[:-1] // outputs, -(-edges[1:] // outputs)


def windows_in_float32(inputs, outputs):
    """Whether Keras, which divides in float32 on some backends, finds these very windows."""
    edges = np.arange(outputs + 1, dtype="float32") * np.float32(inputs)
    for quotients in (edges / np.float32(outputs), edges * (1 / np.float32(outputs))):
        found = np.floor(quotients[:-1]), np.ceil(quotients[1:])
        if any((a != b).any() for a, b in zip(found, windows(inputs, outputs))):
            return False
    return True


def adaptive_average(inputs, outputs):
    """Means over the windows of adaptive pooling, shape (inputs, outputs)."""
    starts, ends = windows(inputs, outputs)
    rows = np.arange(inputs)[:, None]
    return ((rows >= starts) & (rows < ends)) / (ends - starts)


def spatial_axes(layer, rank):
    """Axes of a tensor of this rank, batch axis included, that are neither samples nor channels."""
    first = 2 if layer.data_format == "channels_first" else 1
    return range(first, first + rank - 2)


INTERPOLATIONS = {"nearest": nearest, "bilinear": bilinear}


def _resized(layer, shape):
    matrix = INTERPOLATIONS[layer.interpolation]
    sizes = zip(spatial_axes(layer, len(shape)), (layer.height, layer.width), strict=True)
    return {axis: matrix(shape[axis], outputs) for axis, outputs in sizes}


def _up_sampled(layer, shape):
    matrix = INTERPOLATIONS[layer.interpolation]
    sizes = zip(spatial_axes(layer, len(shape)), layer.size, strict=True)
    return {axis: matrix(shape[axis], times * shape[axis]) for axis, times in sizes}


def _adaptively_averaged(layer, shape):
    sizes = zip(spatial_axes(layer, len(shape)), layer.output_size, strict=True)
    return {axis: adaptive_average(shape[axis], outputs) for axis, outputs in sizes}


# Functions of (layer, shape with batch axis) that answer with {axis: matrix (inputs, outputs)}.
AXIS_MAPS = {
    kl.Resizing: _resized,
    kl.UpSampling2D: _up_sampled,
    kl.AdaptiveAveragePooling1D: _adaptively_averaged,
    kl.AdaptiveAveragePooling2D: _adaptively_averaged,
    kl.AdaptiveAveragePooling3D: _adaptively_averaged,
}


def applied(layer, x):
    """What the layer answers to a float64 tensor."""
    for axis, matrix in AXIS_MAPS[type(layer)](layer, tuple(x.shape)).items():
        kernel = ops.convert_to_tensor(matrix, dtype="float64")
        x = ops.moveaxis(ops.matmul(ops.moveaxis(x, axis, -1), kernel), -1, axis)
    return x


def entries(maps, shape):
    """The largest number of entries of a sample on the way, whatever the order of the axes."""
    return math.prod(max(n, maps[a].shape[1]) if a in maps else n for a, n in enumerate(shape) if a)
