"""A Keras model as a list of steps: which layer or operation makes which value from which.

Nested models and blocks are unrolled, so that every step is one layer or one operation of
`keras.ops`. What cannot be read off the graph (an overridden `call`, several inputs) is refused.
"""

import dataclasses
import hashlib
import inspect
import json

import keras
import numpy as np
from keras.src.models.functional import Functional

from keras_lipnext import layers
from keras_lipnext.layers._channels import title


@dataclasses.dataclass(frozen=True)
class Value:
    """Reference to the value of this index; the model's input has index 0."""

    index: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One application of a layer or of an operation of `keras.ops`.

    Attributes:
        name: Path of the layer, "nested_model/block/layer".
        operation: The layer or operation.
        args, kwargs: Arguments of the call, with `Value` in place of tensors.
        inputs: Indices of the values read, in order.
        outputs: Indices of the values made.
        input_shapes, output_shapes: Symbolic shapes, batch axis included, None where unknown.
    """

    name: str
    operation: object
    args: tuple
    kwargs: dict
    inputs: tuple
    outputs: tuple
    input_shapes: tuple
    output_shapes: tuple

    @property
    def kind(self):
        """Name of the operation's class."""
        return type(self.operation).__name__

    @property
    def title(self):
        """How messages name the step."""
        return f"Layer '{self.name}' ({self.kind})"


@dataclasses.dataclass(frozen=True)
class Graph:
    """The steps of a model, each after those whose values it reads.

    Attributes:
        name: The model's name.
        input_shape: With batch axis; None where unknown.
        steps: Tuple of `Step`.
        output: Index of the model's output.
    """

    name: str
    input_shape: tuple
    steps: tuple
    output: int

    def digest(self):
        """SHA-256 of what defines the function: steps, configurations and weights, in hex."""
        digest = hashlib.sha256()
        seen = {}
        for step in self.steps:
            # Names do not matter to the function, nor does what only training reads.
            config = {
                key: value
                for key, value in step.operation.get_config().items()
                if key not in ("name", "trainable", "dtype")
                and not key.endswith(("_initializer", "_regularizer", "_constraint"))
            }
            number = seen.setdefault(id(step.operation), len(seen))
            plain = (step.kind, number, config, step.args, step.kwargs, step.outputs)
            digest.update(json.dumps(plain, sort_keys=True, default=_plain).encode())
            if number == len(seen) - 1:
                for weight in getattr(step.operation, "weights", ()):
                    array = np.ascontiguousarray(keras.ops.convert_to_numpy(weight))
                    dtype = keras.backend.standardize_dtype(weight.dtype)
                    digest.update(f"{dtype}{array.shape}".encode())
                    digest.update(np.asarray(array, "float64").astype("<f8").tobytes())
        return digest.hexdigest()


def trace(model):
    """The `Graph` of a built functional or Sequential model.

    Raises:
        ValueError: if the model has no graph, not one input and one output, or overrides `call`.
    """
    _check(model)
    steps, values = [], {}
    values[id(model.inputs[0])] = Value(0)
    counter = iter(range(1, 1 << 62))
    _collect(model, values, steps, counter, prefix="")
    shape = tuple(model.inputs[0].shape)
    return Graph(model.name, shape, tuple(steps), values[id(model.outputs[0])].index)


def _plain(value):
    if isinstance(value, Value):
        return {"value": value.index}
    if hasattr(value, "shape"):
        return np.asarray(keras.ops.convert_to_numpy(value)).tolist()
    return str(value)


def _collect(model, values, steps, counter, prefix):
    """Appends the steps that lead to the model's output. `values` knows its inputs."""
    for node in _ordered_nodes(model, values):
        operation = node.operation
        name = prefix + operation.name
        args, kwargs = _map_tensors(node.arguments, lambda t: values[id(t)])
        reads = tuple(values[id(t)].index for t in node.input_tensors)
        unusual = unusual_arguments(operation, args, kwargs)
        if isinstance(operation, keras.Model):
            _check(operation)
            if unusual:
                raise ValueError(
                    f"{title(operation)} is called with {', '.join(unusual)}, not as at inference."
                )
            _check_same_shape(operation, tuple(node.input_tensors[0].shape))
            values[id(operation.inputs[0])] = Value(reads[0])
            _collect(operation, values, steps, counter, f"{name}/")
            values[id(node.output_tensors[0])] = values[id(operation.outputs[0])]
            continue
        if type(operation) is layers.LipNeXtBlock and not unusual:
            value, shape = Value(reads[0]), tuple(node.input_tensors[0].shape)
            for part in operation.parts:
                made = Value(next(counter))
                steps.append(
                    Step(
                        f"{name}/{part.name}",
                        part,
                        (value,),
                        {},
                        (value.index,),
                        (made.index,),
                        (shape,),
                        (shape,),
                    )
                )
                value = made
            values[id(node.output_tensors[0])] = value
            continue
        for tensor in node.output_tensors:
            values[id(tensor)] = Value(next(counter))
        steps.append(
            Step(
                name,
                operation,
                args,
                kwargs,
                reads,
                tuple(values[id(t)].index for t in node.output_tensors),
                tuple(tuple(t.shape) for t in node.input_tensors),
                tuple(tuple(t.shape) for t in node.output_tensors),
            )
        )


def _ordered_nodes(model, known):
    """The nodes on the way from the model's input to its output, each after its predecessors."""
    ordered, done = [], set()
    stack = [model.outputs[0]._keras_history]
    own_input = id(model.inputs[0])
    while stack:
        history = stack[-1]
        node = history.operation._inbound_nodes[history.node_index]
        if id(node) in done:
            stack.pop()
            continue
        waiting = [
            t._keras_history
            for t in node.input_tensors
            if id(t) != own_input and id(_node_of(t)) not in done
        ]
        if not waiting:
            done.add(id(node))
            stack.pop()
            if not node.is_input:
                ordered.append(node)
            elif id(node.output_tensors[0]) != own_input:
                raise ValueError(f"Model '{model.name}' reads a tensor that is not its input.")
        stack.extend(waiting)
    return ordered


def _node_of(tensor):
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def _map_tensors(arguments, function):
    def replace(x):
        return function(x) if isinstance(x, keras.KerasTensor) else x

    args = keras.tree.map_structure(replace, arguments.args)
    return tuple(args), keras.tree.map_structure(replace, arguments.kwargs)


def unusual_arguments(operation, args, kwargs):
    """Arguments of a layer's call beside its tensors that can change what it computes."""
    # Keras notes the default of `training`, True for augmentation, as if it had been given;
    # `predict` overrides it.
    call = inspect.signature(type(operation).call).parameters
    default = call["training"].default if "training" in call else None
    harmless = {"training": (None, False, default), "mask": (None,)}
    named = {
        name: value
        for name, value in kwargs.items()
        if not any(value is default for default in harmless.get(name, (None,)))
    }
    return [*map(repr, args[1:]), *(f"{name}={value!r}" for name, value in named.items())]


def _check_same_shape(model, given):
    """Keras would insert or squeeze an axis on the way into a nested model: not here."""
    expected = tuple(model.inputs[0].shape)
    if len(given) != len(expected) or any(
        n is not None and m is not None and n != m for n, m in zip(expected[1:], given[1:])
    ):
        raise ValueError(
            f"{title(model)}, a nested model, takes inputs of shape {expected} and is called on "
            f"{given}: reshape them explicitly to certify the model."
        )


def _check(model):
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
    overrides = (
        type(model).call not in (Functional.call, keras.Sequential.call)
        or type(model).__call__ not in (Functional.__call__, keras.Sequential.__call__)
        or not {"call", "__call__"}.isdisjoint(vars(model))
    )
    if overrides:
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
