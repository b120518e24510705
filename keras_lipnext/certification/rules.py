"""Lipschitz constants of layers: one rule a layer class.

A rule is a function `rule(layer, norm) -> float`: an upper bound of the l2 Lipschitz constant of
the layer at inference, over the whole tensor. `norm(layer, kernel)` bounds the kernel's spectral
norm: proven from the stored values when certifying, nominal (1 on the manifold) when training.

Rules belong to the exact class: a subclass may compute something else.
"""

import keras

from keras_lipnext import layers
from keras_lipnext.layers._channels import title

_RULES = {}


def lipschitz_rule(*classes):
    """Decorator that registers the rule of one or more layer classes.

    Example:

    ```python
    @keras_lipnext.certification.lipschitz_rule(MyScaling)
    def my_scaling(layer, norm):
        return abs(layer.factor)
    ```
    """

    def register(rule):
        for cls in classes:
            _RULES[cls] = rule
        return rule

    return register


def layer_constant(layer, norm):
    """Upper bound of the layer's Lipschitz constant; ValueError if its class is unknown."""
    rule = _RULES.get(type(layer))
    if rule is None:
        raise refusal(layer, "no Lipschitz constant is known for its class")
    return float(rule(layer, norm))


def refusal(layer, reason):
    """The error for a layer that cannot be certified, with the ways out."""
    return ValueError(
        f"{title(layer)} cannot be certified: {reason}. Replace it by "
        "a layer from keras_lipnext.layers, or register the Lipschitz constant of its class with "
        "@keras_lipnext.certification.lipschitz_rule."
    )


# Activations of slope bounded by the constant, with no jump.
_ACTIVATIONS = {
    keras.activations.linear: 1.0,
    keras.activations.relu: 1.0,
    keras.activations.relu6: 1.0,
    keras.activations.elu: 1.0,
    keras.activations.softplus: 1.0,
    keras.activations.softsign: 1.0,
    keras.activations.tanh: 1.0,
    keras.activations.hard_tanh: 1.0,
    keras.activations.sigmoid: 0.25,
}


def activation_constant(layer):
    constant = _ACTIVATIONS.get(layer.activation)
    if constant is None:
        name = getattr(layer.activation, "__name__", layer.activation)
        raise refusal(layer, f"no Lipschitz constant is known for its activation {name!r}")
    return constant


@lipschitz_rule(
    keras.layers.InputLayer,
    keras.layers.Identity,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.Reshape,
    keras.layers.Permute,
    layers.BetaAbs,
    layers.L2Pool,
    layers.MaxMin,
    layers.PositionalBias,
    layers.SpatialShift,
)
def _one(layer, norm):
    return 1.0


@lipschitz_rule(keras.layers.Activation)
def _activation(layer, norm):
    return activation_constant(layer)


@lipschitz_rule(keras.layers.ReLU)
def _relu(layer, norm):
    if layer.threshold != 0:
        raise refusal(layer, f"it jumps at its threshold {layer.threshold}")
    return max(1.0, abs(layer.negative_slope))


@lipschitz_rule(keras.layers.Rescaling)
def _rescaling(layer, norm):
    if not isinstance(layer.scale, (int, float)):
        raise refusal(layer, "its scale is not one number")
    return abs(layer.scale)


@lipschitz_rule(layers.OrthogonalDense, keras.layers.Dense)
def _dense(layer, norm):
    if getattr(layer, "quantization_mode", None):
        raise refusal(layer, f"it is quantized ({layer.quantization_mode})")
    return norm(layer, layer.kernel) * activation_constant(layer)


@lipschitz_rule(layers.NormalizedDense, layers.PatchEmbedding)
def _kernel_norm(layer, norm):
    return norm(layer, layer.kernel)


@lipschitz_rule(layers.ShiftMixing)
def _shift_mixing(layer, norm):
    # With A = S - I, E = R R^T - I and s >= ||R||: T^T T <= I + R^T A^T E A R, and ||A|| <= 2, so
    # ||T||^2 <= 1 + 4 s^2 max(s^2 - 1, 0). Both paddings.
    square = norm(layer, layer.kernel) ** 2
    return (1 + 4 * square * max(square - 1, 0.0)) ** 0.5 * (1 + 8 * 2.0**-53)


@lipschitz_rule(layers.LipNeXtBlock)
def _block(layer, norm):
    constant = 1.0
    for part in layer.parts:
        constant *= layer_constant(part, norm) * (1 + 2.0**-52)
    return constant
