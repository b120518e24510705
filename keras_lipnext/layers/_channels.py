"""What the layers share: the channel axis, image shapes and the dtype of accumulating layers."""

import numbers

import keras
from keras import ops

from keras_lipnext.manifolds.constraint import ProjectedInitializer, RandomStiefel, Stiefel

NAMESPACE = "keras_lipnext"


def title(layer):
    """How error messages name a layer."""
    return f"Layer '{layer.name}' ({type(layer).__name__})"


def channel_axis(data_format):
    return -1 if data_format == "channels_last" else 1


def spatial_axes(data_format):
    return (1, 2) if data_format == "channels_last" else (2, 3)


def resolve_data_format(data_format):
    if data_format is None:
        return keras.config.image_data_format()
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(
            "`data_format` must be 'channels_last', 'channels_first' or None. "
            f"Received: data_format={data_format!r}"
        )
    return data_format


def image_sizes(layer, input_shape):
    """(height, width, channels) of a rank 4 shape; raises for another rank or unknown channels."""
    if len(input_shape) != 4:
        raise ValueError(
            f"{title(layer)} expects images of rank 4, (batch, height, "
            f"width, channels) or, for data_format='channels_first', (batch, channels, height, "
            f"width). Received: input_shape={tuple(input_shape)}"
        )
    height, width = (input_shape[a] for a in spatial_axes(layer.data_format))
    return height, width, channels_of(layer, input_shape, channel_axis(layer.data_format))


def channels_of(layer, input_shape, axis):
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


def matmul(x, kernel, axis):
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


def along(vector, axis, rank):
    """Reshapes a vector so that it broadcasts along `axis` of a tensor of `rank`."""
    shape = [1] * rank
    shape[axis] = -1
    return ops.reshape(vector, shape)


def positive_integer(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return int(value)


def number(name, value):
    """Raises unless `value` is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}")
    return value


def share(name, value):
    """Raises unless `value` is a number in [0, 1)."""
    if not 0 <= number(name, value) < 1:
        raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={value!r}")
    return value


def accumulating_dtype(dtype):
    """Policy for layers that sum many terms: the policy's variable dtype, float32 when mixed.

    Under mixed_bfloat16 and mixed_float16 pooling and the head run, and answer, in float32.
    """
    return keras.dtype_policies.get(dtype or keras.config.dtype_policy()).variable_dtype


def add_stiefel_kernel(layer, shape, initializer):
    """Weight "kernel" that lives on the Stiefel manifold, random if no initializer is given."""
    return layer.add_weight(
        name="kernel",
        shape=shape,
        initializer=RandomStiefel() if initializer is None else ProjectedInitializer(initializer),
        constraint=Stiefel(),
        aggregation="mean",
    )


def add_bias(layer, shape, initializer):
    return layer.add_weight(name="bias", shape=shape, initializer=initializer, aggregation="mean")


def serialize_optional(initializer):
    return None if initializer is None else keras.initializers.serialize(initializer)
