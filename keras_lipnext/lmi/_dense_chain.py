"""A model as a chain of live Dense layers, whose kernels training follows.

    h_0 = scale * x + const,   h_i = phi_i(W_i h_{i-1} + b_i),   y = W_l h_{l-1} + b_l

with W_i the transpose of a kernel. `_chain.py` reads more, as NumPy copies for proofs.
"""

import dataclasses

import keras
import numpy as np

from keras_lipnext.activations import ACTIVATION_LAYERS, find_activation, is_softmax
from keras_lipnext.lipschitz.model import read
from keras_lipnext.lipschitz.rules.base import find_rule
from keras_lipnext.overrides import replaced, unusual_arguments


@dataclasses.dataclass(frozen=True)
class DenseChain:
    """A chain of Dense layers.

    Attributes:
        layers: Tuple of the live `keras.layers.Dense`; the last one makes the outputs.
        slopes: Tuple of (a, b), the bounds of the slope of each activation between them, a < b.
        scale: Float, the factor of a Rescaling layer in front.
    """

    layers: tuple
    slopes: tuple
    scale: float = 1.0


def dense_chain(model):
    """`DenseChain` of a built functional or Sequential model. Softmax at its end is left out.

    Raises:
        ValueError: naming the layer, if there is one that does not fit.
    """
    steps = read(model).steps
    dense, slopes, scale, value = [], [], 1.0, 0
    for step in steps:
        layer = step.operation
        if step.inputs != (value,) or len(step.outputs) != 1:
            raise _refusal(step, "the model branches there")
        value = step.outputs[0]
        arguments = unusual_arguments(layer, step.args, step.kwargs)
        if isinstance(layer, keras.layers.Layer) and (arguments or replaced(layer)):
            raise _refusal(step, "it is not called as its class is")
        activated = type(layer) in ACTIVATION_LAYERS
        if type(layer) is keras.layers.Dense:
            _check_dense(step)
            if len(slopes) < len(dense):
                raise _refusal(step, "no activation is in front of it: two Dense layers are one")
            dense.append(layer)
            activated = not (step is steps[-1] and is_softmax(layer.activation))
        elif type(layer) is keras.layers.Rescaling and not dense:
            if np.ndim(layer.scale):
                raise _refusal(step, "it scales entries by different factors")
            scale = scale * float(layer.scale)
        elif not (activated or _passes_on(step)):
            raise _refusal(step, "it is not one of Dense, activation, Dropout, Flatten, Rescaling")
        if activated and _slopes(step) != (1.0, 1.0):
            if len(slopes) == len(dense):
                raise _refusal(step, "there is no Dense layer before its activation")
            slopes.append(_slopes(step))
    if not dense or len(slopes) == len(dense):
        raise ValueError(
            f"Model '{model.name}' must end in a linear Dense layer, or in softmax behind one."
        )
    if len({id(layer) for layer in dense}) < len(dense):
        raise ValueError(f"Model '{model.name}' applies one Dense layer several times.")
    if not 0 < abs(scale) < float("inf"):
        raise ValueError(f"Model '{model.name}' scales its inputs by {scale}.")
    return DenseChain(tuple(dense), tuple(slopes), abs(scale))


def _passes_on(step):
    """Whether a layer hands its input on, at most as a vector."""
    rule = find_rule(step) if isinstance(step.operation, keras.layers.Layer) else None
    return rule is not None and (rule.identity or type(step.operation) is keras.layers.Flatten)


def _slopes(step):
    activation = find_activation(step.operation)
    if activation is None:
        name = getattr(step.operation, "activation", step.operation)
        raise _refusal(step, f"no bounds of the slope of its activation {name!r} are known")
    a, b = map(float, activation.slopes)
    if a == b != 1:
        raise _refusal(step, "its activation is linear")
    return a, b


def _check_dense(step):
    layer = step.operation
    if len(step.input_shapes[0]) != 2:
        raise _refusal(step, "it is applied along one axis of a larger tensor: Flatten first")
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        raise _refusal(step, "it is quantized or holds a LoRA")


def _refusal(step, reason):
    return ValueError(
        f"{step.title} does not fit into a chain of Dense layers: {reason}. For Dense layers on "
        "features that others compute, make them a model of their own and pass it as `head`; for "
        "other networks see keras_lipnext.LipNeXt and the layers of keras_lipnext.layers."
    )
