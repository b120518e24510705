"""The activation that a layer or operation is or ends in, as rules take it."""

import math

import keras

from keras_lipnext.activations import FUNCTIONS, NO_CONSTANT, find_activation, is_softmax
from keras_lipnext.lipschitz.rules.base import Bound, size

INNER_SOFTMAX = (
    "softmax inside a network has no useful constant; at the end of a model, over the classes, it "
    "is recognised, as a layer of its own or of a Dense layer or 1 x 1 convolution, and the logits "
    "in front of it are certified"
)


def activation_bound(activation, context):
    """`Bound` of an `Activation` applied to a tensor of the shape of the context's output."""
    shape = context.output_shape
    offset = activation.at_zero * math.sqrt(size(shape)) if activation.at_zero else 0.0
    ulps, absolute, linear = activation.ulps, offset, activation is FUNCTIONS["linear"]
    if context.arithmetic.program and not linear:
        ulps += 4  # the constants of its formula, held in the type of the program
        if activation.cancelling:
            absolute = offset + activation.cancelling * math.sqrt(size(shape))
    rounding = ulps * context.arithmetic.unit
    return Bound(
        activation.constant,
        offset,
        rounding * activation.constant,
        rounding * absolute,
        terms=None if linear else 0,
    )


def activation_of(layer, context):
    """As `find_activation`; ValueError if there is none."""
    activation = find_activation(layer)
    function = getattr(layer, "activation", None)
    if isinstance(function, keras.layers.PReLU) and activation is None:
        raise context.refusal(
            "its activation, a PReLU, is not built, so that its weights are neither known nor "
            "saved: use the layer PReLU behind it"
        )
    if isinstance(function, keras.layers.PReLU):
        context.array(function.alpha)  # refuses what is not finite, or free in training
    if activation is None and is_softmax(function):
        raise context.refusal(INNER_SOFTMAX)
    if activation is None and getattr(function, "__name__", None) in NO_CONSTANT:
        name = function.__name__
        raise context.refusal(f"its activation {name!r} has no constant: it {NO_CONSTANT[name]}")
    if activation is None:
        name = getattr(layer.activation, "__name__", layer.activation)
        raise context.refusal(
            f"no Lipschitz constant is known for its activation {name!r} (known: "
            f"{', '.join(sorted(FUNCTIONS))})"
        )
    return activation
