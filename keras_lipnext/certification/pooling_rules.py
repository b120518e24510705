"""The rules of Keras' pooling and resizing layers."""

import math

import keras
import numpy as np

from keras_lipnext.certification.norms import gamma
from keras_lipnext.certification.rules import ROUNDING, Bound, library_rule, size

kl = keras.layers


def _overlap(layer):
    """Number of windows that one entry can fall into."""
    return math.prod(math.ceil(p / s) for p, s in zip(layer.pool_size, layer.strides))


@library_rule(kl.MaxPooling1D, kl.MaxPooling2D, kl.MaxPooling3D)
def max_pooling(layer, context):
    """|max a - max b| <= ||a - b|| in each window; an entry counts once a window."""
    return Bound(math.sqrt(_overlap(layer)) * (1 + ROUNDING))


@library_rule(kl.AveragePooling1D, kl.AveragePooling2D, kl.AveragePooling3D)
def average_pooling(layer, context):
    """A mean over n entries has norm 1/sqrt(n)."""
    if layer.padding == "same" and _pads(layer, context.input_shape):
        raise context.refusal(
            'with padding="same" the backends of Keras average border windows differently; use '
            '"valid", or ZeroPadding in front of it'
        )
    count = math.prod(layer.pool_size)
    constant = math.sqrt(_overlap(layer) / count) * (1 + 2 * ROUNDING)
    return Bound(constant, relative=2 * gamma(count + 2) * constant)


def _pads(layer, shape):
    """Whether "same" padding adds anything to a sample of this shape."""
    first = layer.data_format == "channels_first"
    sides = shape[1:] if first else shape[:-1]
    return any(
        n is None or (math.ceil(n / s) - 1) * s + p > n
        for n, p, s in zip(sides, layer.pool_size, layer.strides)
    )


@library_rule(kl.GlobalMaxPooling1D, kl.GlobalMaxPooling2D, kl.GlobalMaxPooling3D)
def global_max_pooling(layer, context):
    return Bound(1.0)


@library_rule(kl.GlobalAveragePooling1D, kl.GlobalAveragePooling2D, kl.GlobalAveragePooling3D)
def global_average_pooling(layer, context):
    if None in context.input_shape:
        return Bound(1.0, relative=math.inf)  # one position at least; known when certifying
    positions = size(context.input_shape) / size(context.output_shape)
    constant = (1 + 2 * ROUNDING) / math.sqrt(positions)
    return Bound(constant, relative=2 * gamma(int(positions) + 2) * constant)


@library_rule(kl.UpSampling1D, kl.UpSampling2D, kl.UpSampling3D)
def up_sampling(layer, context):
    if getattr(layer, "interpolation", "nearest") != "nearest":
        raise context.refusal(f"its interpolation is {layer.interpolation!r}: use 'nearest'")
    return Bound(math.sqrt(math.prod(np.atleast_1d(layer.size))) * (1 + ROUNDING))


@library_rule(kl.RepeatVector)
def repeat_vector(layer, context):
    return Bound(math.sqrt(layer.n) * (1 + ROUNDING))
