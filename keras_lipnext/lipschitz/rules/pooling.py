"""The rules of Keras' pooling and resizing layers."""

import math

import keras
import numpy as np

from keras_lipnext.lipschitz.rounding import added_up, mapped
from keras_lipnext.lipschitz.rules.axis_maps import (
    AXIS_MAPS,
    INTERPOLATIONS,
    adaptive_average,
    applied,
    spatial_axes,
    windows_in_float32,
)
from keras_lipnext.lipschitz.rules.base import Bound, library_rule, size
from keras_lipnext.norms.roundoff import ROUNDING

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
    total = added_up(context, count)
    return Bound(constant, relative=2 * context.arithmetic.gamma(total + 2) * constant)


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
    total = added_up(context, int(positions))
    return Bound(constant, relative=2 * context.arithmetic.gamma(total + 2) * constant)


def _axis_maps(layer, context):
    """`Bound`s of a layer of `AXIS_MAPS`."""
    context.check_program(
        "the backends of Keras weigh its entries by numbers that each computes in a way of its own"
    )
    shape = (None, *context.input_shape)
    if None in (shape[axis] for axis in spatial_axes(layer, len(shape))):
        raise context.refusal(f"the size of its input of shape {context.input_shape} is unknown")
    return tuple(mapped(context, AXIS_MAPS[type(layer)](layer, shape)))


def _interpolation(layer, context):
    """Refuses what the backends of Keras do in different ways, or what is not linear."""
    if layer.interpolation not in INTERPOLATIONS:
        raise context.refusal(
            f"its interpolation is {layer.interpolation!r}, which the backends of Keras do in "
            "different ways: use 'nearest' or 'bilinear'"
        )


@library_rule(
    kl.AdaptiveAveragePooling1D,
    kl.AdaptiveAveragePooling2D,
    kl.AdaptiveAveragePooling3D,
    evaluation=applied,
)
def adaptive_average_pooling(layer, context):
    _check_windows(layer, context)
    return _axis_maps(layer, context)


@library_rule(kl.AdaptiveMaxPooling1D, kl.AdaptiveMaxPooling2D, kl.AdaptiveMaxPooling3D)
def adaptive_max_pooling(layer, context):
    """As max pooling: an entry counts once a window, on each axis."""
    times = 1
    for inputs, outputs in _check_windows(layer, context):
        times *= int((adaptive_average(inputs, outputs) > 0).sum(axis=1).max())
    return Bound(math.sqrt(times) * (1 + ROUNDING))


def _check_windows(layer, context):
    """[(inputs, outputs)] of the axes of an adaptive pooling; refuses where backends differ."""
    shape = (None, *context.input_shape)
    sides = [
        (shape[axis], outputs)
        for axis, outputs in zip(spatial_axes(layer, len(shape)), layer.output_size, strict=True)
    ]
    for inputs, outputs in sides:
        if inputs is None:
            raise context.refusal(f"the size of its input of shape {shape[1:]} is unknown")
        if outputs > inputs or not windows_in_float32(inputs, outputs):
            raise context.refusal(
                f"the backends of Keras pool {inputs} entries to {outputs} in different ways; an "
                "AveragePooling or MaxPooling of known windows has a rule"
            )
    return sides


def _check_images(context):
    """Keras takes a tensor of rank 3 for one image, and its samples for rows of pixels."""
    if len(context.input_shape) != 3:
        raise context.refusal(
            f"it takes samples of shape {context.input_shape} for the rows of one image: give them "
            "an axis of channels"
        )


@library_rule(kl.Resizing, evaluation=applied)
def resizing(layer, context):
    _check_images(context)
    _interpolation(layer, context)
    for option in ("antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio"):
        if getattr(layer, option):
            raise context.refusal(f"its {option} is on")
    return _axis_maps(layer, context)


@library_rule(kl.CenterCrop, converts=True)
def center_crop(layer, context):
    _check_images(context)
    shape = (None, *context.input_shape)
    sides = [shape[axis] for axis in spatial_axes(layer, len(shape))]
    if None in sides or sides[0] < layer.height or sides[1] < layer.width:
        raise context.refusal(
            f"it resizes images that are smaller than {layer.height} x {layer.width}, as those of "
            f"shape {context.input_shape} may be: use Resizing, or larger images"
        )
    return Bound(1.0)


@library_rule(kl.UpSampling1D, kl.UpSampling3D)
@library_rule(kl.UpSampling2D, evaluation=applied)
def up_sampling(layer, context):
    if getattr(layer, "interpolation", "nearest") != "nearest":
        _interpolation(layer, context)
        return _axis_maps(layer, context)
    return Bound(math.sqrt(math.prod(np.atleast_1d(layer.size))) * (1 + ROUNDING))


@library_rule(kl.RepeatVector)
def repeat_vector(layer, context):
    return Bound(math.sqrt(layer.n) * (1 + ROUNDING))
