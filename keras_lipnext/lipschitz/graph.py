"""A Keras model as a list of steps: which layer or operation makes which value from which.

Nested models and blocks are unrolled, so that every step is one layer or one operation of
`keras.ops`. What cannot be read off the graph (an overridden `call`, several inputs) is refused.
"""

import dataclasses
import hashlib
import json

import keras
import numpy as np

from keras_lipnext.arguments import title
from keras_lipnext.backend import keras_private
from keras_lipnext.lipschitz.composites import (
    Composite,
    answer_of,
    check_one_tensor,
    check_output,
    declares_parts,
    parts_of,
)
from keras_lipnext.overrides import (
    first_argument_positional,
    plain_settings,
    replaced,
    unusual_arguments,
)

HASH_FORMAT = 2


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
        input_dtypes: Names of the dtypes of the values read.
    """

    name: str
    operation: object
    args: tuple
    kwargs: dict
    inputs: tuple
    outputs: tuple
    input_shapes: tuple
    output_shapes: tuple
    input_dtypes: tuple = ()

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
        input_dtype: That the model declares.
        composites: The `Composite` layers that were unrolled, nested ones behind the outer.
    """

    name: str
    input_shape: tuple
    steps: tuple
    output: int
    input_dtype: str = "float32"
    composites: tuple = ()

    def digest(self):
        """SHA-256 of what defines the function, "2:" and hex: steps, configurations and weights.

        2 is the version of its format: 1 named classes by the modules that defined them.
        """
        digest = hashlib.sha256(repr((HASH_FORMAT, self.input_shape, self.output)).encode())
        seen = {}
        for step in self.steps:
            operation = step.operation
            number = seen.setdefault(id(operation), len(seen))
            plain = (class_name(type(operation)), number, _settings(operation))
            plain += (step.args, step.kwargs, step.outputs)
            digest.update(json.dumps(plain, sort_keys=True, default=_plain).encode())
            if number == len(seen) - 1:
                for weight in stored_values(operation):
                    array = np.ascontiguousarray(keras.ops.convert_to_numpy(weight))
                    dtype = keras.backend.standardize_dtype(weight.dtype)
                    digest.update(f"{dtype}{array.shape}".encode())
                    digest.update(np.asarray(array, "float64").astype("<f8").tobytes())
        return f"{HASH_FORMAT}:{digest.hexdigest()}"


def class_name(cls):
    """What a hash calls a class: the same wherever the file lies that defines it.

    A registered class by its registered name, "keras_lipnext>BetaAbs"; those of Keras by theirs,
    a layer apart from the operation of that name. A class that nobody registered has no name but
    its module's and its own, "module:Class".
    """
    registered = keras.saving.get_registered_name(cls)
    if keras.saving.get_registered_object(registered) is cls:
        return registered
    if cls.__module__.startswith("keras."):
        room = "layers" if issubclass(cls, keras.layers.Layer) else "ops"
        return f"keras.{room}.{cls.__qualname__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def stored_values(operation):
    """What the operation stores: its weights, and the statistics of a Normalization layer."""
    values = list(getattr(operation, "weights", ()))
    if type(operation) is keras.layers.Normalization:
        values += [operation.mean, operation.variance]
    return values


def _settings(operation):
    """What the operation is configured to do. Names do not matter, nor what only training reads."""
    if isinstance(operation, keras.layers.Layer):
        settings = operation.get_config()
        if not type(operation).__module__.startswith(("keras.", "keras_lipnext.")):
            settings = {**settings, **plain_settings(operation)}
    else:
        settings = {key: v for key, v in vars(operation).items() if not key.startswith("_")}
    return {
        key: value
        for key, value in settings.items()
        if key not in ("name", "trainable", "dtype")
        and not key.endswith(("_initializer", "_regularizer", "_constraint"))
    }


def trace(model):
    """The `Graph` of a built functional or Sequential model.

    Raises:
        ValueError: if the model has no graph, not one input and one output, or overrides `call`.
    """
    _check(model)
    steps = _Steps()
    output = _collect(model, Value(0), steps, prefix="")
    given = model.inputs[0]
    dtype = keras.backend.standardize_dtype(given.dtype)
    made, composites = tuple(steps.made), tuple(steps.composites)
    return Graph(model.name, tuple(given.shape), made, output.index, dtype, composites)


class _Steps:
    """What `_collect` makes: steps, the composites they come from, and the number of values."""

    def __init__(self):
        self.made, self.composites, self._count = [], [], 0

    def value(self):
        """A new `Value`."""
        self._count += 1
        return Value(self._count)


def _plain(value):
    if isinstance(value, Value):
        return {"value": value.index}
    if hasattr(value, "shape"):
        return np.asarray(keras.ops.convert_to_numpy(value)).tolist()
    return str(value)


def _collect(model, given, steps, prefix):
    """Appends the model's steps, applied to the value `given`; returns the value of its output.

    Each application of a model has values of its own: a nested model may be made of the very
    tensors of the model around it.
    """
    values = {id(model.inputs[0]): given}
    for node in _ordered_nodes(model):
        operation = node.operation
        name = prefix + operation.name
        args, kwargs = _map_tensors(node.arguments, lambda t: values[id(t)])
        args, kwargs = first_argument_positional(operation, args, kwargs)
        reads = tuple(values[id(t)].index for t in node.input_tensors)
        shapes = tuple(tuple(t.shape) for t in node.input_tensors)
        unusual = unusual_arguments(operation, args, kwargs)
        if isinstance(operation, keras.Model):
            _check(operation)
            _check_at_inference(operation, unusual)
            _check_same_shape(operation, "takes inputs of", operation.inputs[0], shapes[0])
            made = _collect(operation, Value(reads[0]), steps, f"{name}/")
            made_shape = tuple(node.output_tensors[0].shape)
            _check_same_shape(operation, "makes outputs of", operation.outputs[0], made_shape)
            values[id(node.output_tensors[0])] = made
            continue
        if type(operation) is keras.layers.SpectralNormalization and not (
            unusual or replaced(operation)
        ):
            # At inference it is the layer that it wraps, whose kernel it divided in training.
            operation, kwargs = operation.layer, {}
        if declares_parts(operation) and not replaced(operation):
            _check_at_inference(operation, unusual)
            check_one_tensor(operation, node)
            made, spec = _unrolled(operation, args[0], node.input_tensors[0], steps, name)
            check_output(operation, tuple(spec.shape), tuple(node.output_tensors[0].shape))
            values[id(node.output_tensors[0])] = made
            continue
        for tensor in node.output_tensors:
            values[id(tensor)] = steps.value()
        steps.made.append(
            Step(
                name,
                operation,
                args,
                kwargs,
                reads,
                tuple(values[id(t)].index for t in node.output_tensors),
                shapes,
                tuple(tuple(t.shape) for t in node.output_tensors),
                tuple(keras.backend.standardize_dtype(t.dtype) for t in node.input_tensors),
            )
        )
    return values[id(model.outputs[0])]


def _unrolled(layer, value, given, steps, name):
    """Appends the steps of a composite layer's parts; returns the value and spec of its output.

    Args:
        value: The `Value` that it reads.
        given: What it is, a KerasTensor.
    """
    dtype = keras.backend.standardize_dtype(given.dtype)
    parts = parts_of(layer)
    steps.composites.append(Composite(name, layer, parts, tuple(given.shape), dtype))
    for part in parts:
        path = f"{name}/{part.name}"
        made = answer_of(layer, part, given)
        if isinstance(part, keras.Model):
            _check(part)
            _check_same_shape(part, "takes inputs of", part.inputs[0], tuple(given.shape))
            value = _collect(part, value, steps, f"{path}/")
        elif declares_parts(part) and not replaced(part):
            value, _ = _unrolled(part, value, given, steps, path)
        else:
            read, value = value, steps.value()
            steps.made.append(
                Step(
                    path,
                    part,
                    (read,),
                    {},
                    (read.index,),
                    (value.index,),
                    (tuple(given.shape),),
                    (tuple(made.shape),),
                    (keras.backend.standardize_dtype(given.dtype),),
                )
            )
        given = made
    return value, given


def _ordered_nodes(model):
    """The nodes on the way from the model's input to its output, each after its predecessors."""
    ordered, done = [], set()
    stack = [keras_private.node_of(model.outputs[0])]
    own_input = id(model.inputs[0])
    while stack:
        node = stack[-1]
        if id(node) in done:
            stack.pop()
            continue
        waiting = [
            keras_private.node_of(t)
            for t in node.input_tensors
            if id(t) != own_input and id(keras_private.node_of(t)) not in done
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


def _map_tensors(arguments, function):
    def replace(x):
        return function(x) if isinstance(x, keras.KerasTensor) else x

    args = keras.tree.map_structure(replace, arguments.args)
    return tuple(args), keras.tree.map_structure(replace, arguments.kwargs)


def _check_at_inference(operation, unusual):
    if unusual:
        raise ValueError(
            f"{title(operation)} is called with {', '.join(unusual)}, not as at inference."
        )


def _check_same_shape(model, what, tensor, given):
    """Keras may insert an axis on the way into a nested model, or the model was changed since."""
    expected = tuple(tensor.shape)
    if len(given) != len(expected) or any(
        n is not None and m is not None and n != m for n, m in zip(expected[1:], given[1:])
    ):
        raise ValueError(
            f"{title(model)}, a nested model, {what} shape {expected}, and the model around it has "
            f"{given} there. Reshape explicitly, and build the outer model after the inner one."
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
            "subclassed or not built. Call a Sequential model on data first; of a subclassed model "
            "make a functional model of its layers: i = keras.Input(shape), then "
            "keras.Model(i, model.call(i))."
        )
    if not keras_private.is_graph(model):
        raise ValueError(
            f"Model '{model.name}' ({type(model).__name__}) overrides `call`: what it computes is "
            "not its graph of layers, and cannot be certified. Express it as layers of a "
            "functional model: i = keras.Input(shape), then keras.Model(i, model.call(i))."
        )
    if len(outputs) != 1 or len(model.inputs) != 1:
        raise ValueError(
            f"Model '{model.name}' must have one input and one output to be certified. Received: "
            f"{len(model.inputs)} inputs and {len(outputs)} outputs. Certify a model of each "
            "output apart, keras.Model(model.inputs, model.outputs[0]); join several inputs in "
            "one, which the model takes apart."
        )
