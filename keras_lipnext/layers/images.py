"""What the layers share: where the channels of an image are, its sizes, products along an axis."""

import keras
from keras import ops

from keras_lipnext.arguments import title
from keras_lipnext.typing import Shape, Tensor


def channel_axis(data_format: str) -> int:
    return -1 if data_format == "channels_last" else 1


def spatial_axes(data_format: str) -> tuple[int, int]:
    return (1, 2) if data_format == "channels_last" else (2, 3)


def image_sizes(
    layer: keras.layers.Layer, input_shape: Shape
) -> tuple[int | None, int | None, int]:
    """(height, width, channels) of a rank 4 shape; raises for another rank or unknown channels."""
    if len(input_shape) != 4:
        raise ValueError(
            f"{title(layer)} expects images of rank 4, (batch, height, "
            f"width, channels) or, for data_format='channels_first', (batch, channels, height, "
            f"width). Received: input_shape={tuple(input_shape)}"
        )
    height, width = (input_shape[a] for a in spatial_axes(layer.data_format))
    return height, width, channels_of(layer, input_shape, channel_axis(layer.data_format))


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
