"""The rules of Keras' merging layers."""

import math

import keras

from keras_lipnext.lipschitz.rounding import joining
from keras_lipnext.lipschitz.rules.base import Bound, library_rule
from keras_lipnext.norms.roundoff import ROUNDING

kl = keras.layers


def merged(context, combine, roundings=0):
    """`Bound` of an entrywise map of several inputs; a broadcast input counts as often as used."""
    broadcast = 1.0
    for shape in context.input_shapes:
        if len(shape) != len(context.output_shape):
            raise context.refusal(f"it broadcasts shapes {context.input_shapes}")
        repeats = 1
        for side, out in zip(shape, context.output_shape):
            unknown = None in (side, out) and not context.equal_sides()
            if (len(context.input_shapes) > 1 and unknown) or (side is None) != (out is None):
                raise context.refusal(
                    f"it may broadcast shapes {context.input_shapes}, whose unknown sizes only the "
                    "data tell: certify data, or give the model's input known sizes"
                )
            if side == 1 and out != 1:
                repeats *= out
        broadcast = max(broadcast, math.sqrt(repeats) * (1 + ROUNDING))
    rounding = roundings * context.arithmetic.rounding
    if roundings and context.joined:
        rounding += joining(context, context.joined)
    return Bound(broadcast, relative=rounding * broadcast, combine=combine)


@library_rule(kl.Add)
def addition(layer, context):
    return merged(context, "sum", roundings=len(context.input_shapes))


@library_rule(kl.Subtract)
def subtraction(layer, context):
    return merged(context, "sum", roundings=1)


@library_rule(kl.Average)
def average(layer, context):
    # The sum is rounded before it is divided: relative to the mean of the norms.
    return merged(context, "mean", roundings=len(context.input_shapes) + 2)


@library_rule(kl.Maximum, kl.Minimum)
def extremum(layer, context):
    return merged(context, "hypot")


@library_rule(kl.Concatenate)
def concatenation(layer, context):
    if layer.axis % (len(context.output_shape) + 1) == 0:
        raise context.refusal("it joins samples along the batch axis")
    return Bound(1.0)
