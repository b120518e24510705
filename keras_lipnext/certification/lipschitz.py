"""The Lipschitz constant of a model: the product of its layers' constants along the graph."""

import dataclasses

import keras
from keras.src.models.functional import Functional

from keras_lipnext import layers
from keras_lipnext.certification.norms import spectral_norm_bound
from keras_lipnext.certification.rules import layer_constant, refusal
from keras_lipnext.layers._channels import title
from keras_lipnext.manifolds import Stiefel


@dataclasses.dataclass(frozen=True)
class LipschitzBound:
    """Proven l2 Lipschitz bound of a model's body, everything before the linear head.

    Attributes:
        constant: Float, the product of the layers' constants, rounded up.
        constants: Tuple of (layer name, class name, constant), in order.
        head: The linear layer that makes the logits, or None; then `constant` covers the logits.
    """

    constant: float
    constants: tuple
    head: keras.layers.Layer | None

    def __str__(self):
        width = max(len(name) for name, _, _ in self.constants)
        rows = [f"{name:<{width}}  {kind:<16}  {c:.12f}" for name, kind, c in self.constants]
        head = self.head.name if self.head else "none: the constant covers the logits"
        return "\n".join(
            [*rows, f"Lipschitz constant of the body: {self.constant:.12f}", f"head: {head}"]
        )


def lipschitz_bound(model):
    """Proves an upper bound of the model's l2 Lipschitz constant from its stored weights.

    Args:
        model: Built functional or Sequential Keras model (nested ones included) in which each
            layer has one input and one output.

    Returns:
        `LipschitzBound`.

    Raises:
        ValueError: naming the layer, if one has no known constant or weights without a norm; if
            the model is not built or not a graph of layers.
    """
    return _bound(layer_chain(model), _proven_norm)


def nominal_constant(model):
    """Lipschitz constant by construction: every marked kernel counts as exactly orthogonal.

    For losses and metrics in training. A layer whose norm training can change has none: an error.
    """
    return _bound(layer_chain(model), _nominal_norm).constant


def _proven_norm(layer, kernel):
    try:
        norm = spectral_norm_bound(keras.ops.convert_to_numpy(kernel))
    except ValueError as error:
        raise ValueError(f"{title(layer)}: {error}") from error
    if norm == 0:
        raise ValueError(
            f"{title(layer)} has an all-zero kernel: the model is "
            "constant, or its weights were not loaded."
        )
    return norm


def _nominal_norm(layer, kernel):
    if not isinstance(getattr(kernel, "constraint", None), Stiefel):
        raise refusal(
            layer, "its norm is free to grow in training, so that its nominal constant is unknown"
        )
    return 1.0


def _bound(chain, norm):
    head = chain[-1] if is_linear_head(chain[-1]) else None
    constants, product = [], 1.0
    for layer in chain[:-1] if head else chain:
        constant = layer_constant(layer, norm)
        constants.append((layer.name, type(layer).__name__, constant))
        product *= constant * (1 + 2.0**-52)
    if not (2.0**-1000 < product < 2.0**1000):
        raise ValueError(
            f"The product of the layers' Lipschitz constants is {product}: no radius follows."
        )
    return LipschitzBound(product, tuple(constants), head)


def is_linear_head(layer):
    """Whether the layer is a plain linear map of vectors, so that pairwise constants apply."""
    if type(layer) is layers.NormalizedDense:
        return True
    return (
        type(layer) in (keras.layers.Dense, layers.OrthogonalDense)
        and layer.activation is keras.activations.linear
        and not getattr(layer, "quantization_mode", None)
    )


def layer_chain(model):
    """The layers a sample passes, nested models unrolled, from the input layer to the output."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a keras.Model. Received: {model!r} of type {type(model).__name__}"
        )
    outputs = getattr(model, "outputs", None)
    if outputs is None or getattr(model, "inputs", None) is None:
        raise ValueError(
            f"Model '{model.name}' ({type(model).__name__}) has no graph to certify: it is "
            "subclassed or not built. Build it as a functional model, "
            "keras_lipnext.CertifiableModel(inputs, outputs), or call a Sequential model on data "
            "first."
        )
    if type(model).call not in (Functional.call, keras.Sequential.call):
        raise ValueError(
            f"Model '{model.name}' ({type(model).__name__}) overrides `call`: what it computes is "
            "not its graph of layers, and cannot be certified. Express it as layers of a "
            "functional model."
        )
    if len(outputs) != 1 or len(model.inputs) != 1:
        raise ValueError(
            f"Model '{model.name}' must have one input and one output to be certified. Received: "
            f"{len(model.inputs)} inputs and {len(outputs)} outputs."
        )
    chain, tensor = [], outputs[0]
    while True:
        history = tensor._keras_history
        operation = history.operation
        if isinstance(operation, keras.layers.InputLayer):
            return [operation, *reversed(chain)]
        if isinstance(operation, keras.Model):
            chain.extend(reversed(layer_chain(operation)[1:]))
        else:
            chain.append(operation)
        node = operation._inbound_nodes[history.node_index]
        if not isinstance(operation, keras.layers.Layer):
            raise refusal(operation, "it is an operation, not a layer (for x / 255 use Rescaling)")
        if len(node.input_tensors) != 1:
            raise refusal(operation, "it combines several tensors")
        if unusual := _unusual_arguments(node):
            raise refusal(operation, f"it is called with {unusual}, not as at inference")
        tensor = node.input_tensors[0]


def _unusual_arguments(node):
    """Arguments of a layer's call beside the tensor that can change what it computes."""
    harmless = {"training": (None, False), "mask": (None,)}
    named = {
        name: value
        for name, value in node.arguments.kwargs.items()
        if not any(value is default for default in harmless.get(name, (None,)))
    }
    return [*node.arguments.args[1:], *(f"{name}={value!r}" for name, value in named.items())]
