"""What the layers share: which axes of a sample are what, its sizes, products along an axis.

Samples are series, images or volumes: of one, two or three spatial axes, and channels.
"""

from collections.abc import Sequence

import keras
from keras import ops

from keras_lipnext.arguments import title
from keras_lipnext.typing import Shape, Tensor

# Names of a sample's spatial axes, by their number.
SPATIAL = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
NAMES = {1: "series", 2: "images", 3: "volumes"}


def channel_axis(data_format: str) -> int:
    return -1 if data_format == "channels_last" else 1


def spatial_axes(data_format: str, rank: int) -> tuple[int, ...]:
    """The axes of a batch of this rank that are neither samples nor channels."""
    first = 1 if data_format == "channels_last" else 2
    return tuple(range(first, first + rank - 2))


def sides_of(
    layer: keras.layers.Layer, input_shape: Shape, spatial: Sequence[int] = (1, 2, 3)
) -> tuple[int | None, ...]:
    """The sizes of the spatial axes; raises unless they are as many as one of `spatial`."""
    if len(input_shape) - 2 not in spatial:
        taken = ", or ".join(
            f"{NAMES[n]} of rank {n + 2}, ({', '.join(('batch', *SPATIAL[n], 'channels'))})"
            for n in spatial
        )
        raise ValueError(
            f"{title(layer)} expects {taken}; with data_format='channels_first' channels are the "
            f"second axis. Received: input_shape={tuple(input_shape)}"
        )
    return tuple(input_shape[a] for a in spatial_axes(layer.data_format, len(input_shape)))


def channels_along(layer: keras.layers.Layer, input_shape: Shape) -> int:
    """Number of channels by the layer's data format; raises if they are unknown."""
    return channels_of(layer, input_shape, channel_axis(layer.data_format))


def channels_of(layer: keras.layers.Layer, input_shape: Shape, axis: int) -> int:
    """Size of the channel axis, which must exist and be known when the layer is built."""
    if not -len(input_shape) <= axis < len(input_shape) or axis % len(input_shape) == 0:
        raise ValueError(
            f"{title(layer)} works on axis {axis}, which must exist "
            f"and not be the batch axis. Received: input_shape={tuple(input_shape)}"
        )
    channels = input_shape[axis]
    if channels is None:
        raise ValueError(
            f"{title(layer)} needs a known size of axis {axis}. "
            f"Received: input_shape={tuple(input_shape)}"
        )
    return channels


def matmul(x: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Multiplies the vectors along `axis` of `x`, read as rows, by `kernel`.

    As one matrix of all rows: of a product with three batch axes XLA makes the kernel's gradient by
    transposing both operands, which on a GPU takes as long as the product.
    """
    if axis not in (-1, len(x.shape) - 1):
        return ops.moveaxis(matmul(ops.moveaxis(x, axis, -1), kernel, -1), -1, axis)
    if len(x.shape) == 2:
        return ops.matmul(x, kernel)
    rows = ops.matmul(ops.reshape(x, (-1, x.shape[-1])), kernel)
    return ops.reshape(rows, (*ops.shape(x)[:-1], kernel.shape[-1]))


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """Reshapes a vector so that it broadcasts along `axis` of a tensor of `rank`."""
    shape = [1] * rank
    shape[axis] = -1
    return ops.reshape(vector, shape)
