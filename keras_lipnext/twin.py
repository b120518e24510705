"""A twin of a model that evaluates the same stored weights in float64."""

import contextlib
import functools
import inspect

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.activations import (
    ACTIVATION_LAYERS,
    Activation,
    find_activation,
    is_softmax,
)
from keras_lipnext.arguments import title
from keras_lipnext.backend import keras_private
from keras_lipnext.lipschitz.graph import Value
from keras_lipnext.lipschitz.model import read
from keras_lipnext.lipschitz.rules.base import find_rule, size
from keras_lipnext.lipschitz.rules.layers import slice_step
from keras_lipnext.lipschitz.rules.operations import NUMERIC
from keras_lipnext.norms.roundoff import ROUNDING
from keras_lipnext.overrides import plain_settings


class Float64Twin:
    """Evaluates the logits of `model` in float64, on any backend, whatever its dtype policy.

    The layers are rebuilt from their configurations with dtype float64 and given the stored
    weights, which float64 holds exactly; activations are evaluated by the formulas in
    keras_lipnext/activations.py. `predict` and `fit` would cast inputs to float32, so batches go
    to the layers directly, compiled as a whole on JAX and TensorFlow.

    Args:
        model: A Keras model, or the `Certifiable` read from it.
        norms: Whether a call measures the norms of all values of the graph, too.

    Raises:
        RuntimeError: on a release of jaxlib whose programs are known to compute wrong numbers.

    Attributes:
        norms: {index of a value: upper bounds of its computed norms, shape (samples,)} of the last
            call; None if they are not measured.
    """

    def __init__(self, model, norms=False):
        backend.check_compiler()
        certifiable = read(model) if isinstance(model, keras.Model) else model
        self._input_shape = certifiable.graph.input_shape
        self._output = certifiable.head.outputs[0] if certifiable.head else certifiable.body.output
        self._shapes = {}
        self._program, functions, twins = [], {}, []
        with backend.float64_scope():
            for step in certifiable.steps:
                kind = None if isinstance(step.operation, keras.layers.Layer) else step.kind
                key = id(step.operation)
                if key not in functions:
                    functions[key] = _evaluation(step, step is certifiable.head, twins)
                constants = keras.tree.map_structure(
                    lambda a, kind=kind: a if isinstance(a, Value) else _constant(a, kind),
                    (step.args, step.kwargs),
                )
                self._program.append((step, functions[key], *constants))
        self.variables = [v for layer in twins for v in layer.weights]
        self.norms, self._measuring = None, norms
        function = self._logits_and_norms if norms else self.tensor
        self._compiled = backend.compiled(function, self.variables)

    def __call__(self, x):
        """Logits for one batch, a NumPy float64 array."""
        answer = self.call(self._compiled, x)
        if not self._measuring:
            return answer
        shapes = self.shapes(x)
        logits, norms = answer[:, : -len(shapes)], answer[:, -len(shapes) :].T
        logits = logits.reshape(len(logits), *shapes[self._output][1:])
        entries = (size(shape[1:]) for shape in shapes.values())
        # A sum of n squares, its root, and squares that underflow.
        self.norms = {
            i: norm * (1 + (n + 16) * ROUNDING) + n * 2.0**-500
            for i, norm, n in zip(shapes, norms, entries)
        }
        return logits

    def call(self, compiled, x):
        """What a function made by `backend.compiled` answers to a batch of inputs, in NumPy."""
        x = np.asarray(x, "float64")
        expected = self._input_shape
        if x.ndim != len(expected) or any(
            n is not None and n != m for n, m in zip(expected[1:], x.shape[1:])
        ):
            raise ValueError(
                f"The model takes inputs of shape {expected}. Received: a batch of shape {x.shape}"
            )
        with backend.float64_scope(), backend.inference_scope():
            try:
                outputs = compiled(keras.ops.convert_to_tensor(x, dtype="float64"))
            except Exception as error:
                if not type(error).__module__.startswith("tensorflow"):
                    raise
                raise ValueError(
                    "TensorFlow cannot evaluate the model in float64 on this machine (on a CPU it "
                    "has no channels-first convolutions). Certify the file with "
                    f"KERAS_BACKEND=torch or jax. {type(error).__name__}: {str(error)[-300:]}"
                ) from error
            outputs = keras.ops.convert_to_numpy(outputs)
        if outputs.dtype != np.float64 or len(outputs) != len(x):
            raise ValueError(
                f"The model, built in float64, answered {outputs.shape} in {outputs.dtype} to a "
                f"batch of {len(x)} inputs."
            )
        return outputs

    def tensor(self, x):
        """Logits for a float64 tensor of the backend, differentiable."""
        return self._values(x)[self._output]

    def _logits_and_norms(self, x):
        """Logits, and behind them the norms of all values in order, (samples, logits + values)."""
        values = self._values(x)
        flat = {i: keras.ops.reshape(v, (-1, size(v.shape[1:]))) for i, v in values.items()}
        norms = keras.ops.stack([keras.ops.norm(v, axis=-1) for v in flat.values()], axis=-1)
        return keras.ops.concatenate([flat[self._output], norms], axis=-1)

    def _values(self, x):
        """{index: value} of the graph."""
        values, shapes = {0: x}, {0: tuple(x.shape)}
        for step, function, args, kwargs in self._program:
            args, kwargs = _filled_in(args, kwargs, values)
            outputs, lossy = backend.call_in_float64(function, *args, **kwargs)
            outputs = keras.tree.flatten(outputs)
            _check_float64(step, outputs, lossy)
            for index, output in zip(step.outputs, outputs, strict=True):
                values[index], shapes[index] = output, tuple(output.shape)
        self._shapes[tuple(x.shape[1:])] = shapes
        return values

    def shapes(self, x):
        """{index of a value of the graph: its shape} for a batch that was evaluated."""
        return self._shapes[tuple(np.shape(x)[1:])]

    def at_zero(self, step, shapes):
        """||f(0)|| of one step, evaluated in float64."""
        _, function, args, kwargs = next(p for p in self._program if p[0] is step)
        with backend.float64_scope(), backend.inference_scope():
            zeros = {i: keras.ops.zeros((1, *shapes[i][1:]), dtype="float64") for i in step.inputs}
            args, kwargs = _filled_in(args, kwargs, zeros)
            outputs = keras.tree.flatten(function(*args, **kwargs))
            outputs = [keras.ops.convert_to_numpy(output) for output in outputs]
        return float(np.sqrt(sum(np.linalg.norm(output) ** 2 for output in outputs)))


def _check_float64(step, outputs, lossy):
    """Sees the promise of float64 kept; `backend.float64_scope` alone would be believed."""
    dtypes = {keras.backend.standardize_dtype(output.dtype) for output in outputs}
    if lossy is not None or dtypes != {"float64"}:
        how = f"by its operation {lossy}" if lossy else f"and answers in {', '.join(dtypes)}"
        raise ValueError(
            f"{step.title} computes in lower precision although built in float64, {how}: what "
            "rounding can do to it is not bounded. Have it compute in the dtype of its inputs."
        )


def _filled_in(args, kwargs, values):
    return keras.tree.map_structure(
        lambda a: values[a.index] if isinstance(a, Value) else a, (args, kwargs)
    )


def _evaluation(step, is_head, twins):
    """What evaluates a step on float64 tensors: a layer rebuilt in float64, or a function.

    Layers are appended to `twins`.
    """
    operation, rule = step.operation, find_rule(step)
    if rule and rule.identity:
        return lambda x, **kwargs: x
    if rule and rule.evaluation:
        return lambda x, **kwargs: rule.evaluation(operation, x)
    if not isinstance(operation, keras.layers.Layer):
        activation = find_activation(operation)
        return activation.function if activation else operation.call
    if type(operation) is keras.layers.TimeDistributed:
        return _on_slices(_evaluation(slice_step(step), False, twins))
    # What a layer of someone else's does with an attribute of that name is not known.
    proven = is_head or (rule is not None and rule.proven)
    activation = find_activation(operation) if proven else None
    if type(operation) in ACTIVATION_LAYERS and activation:
        return lambda x, **kwargs: activation.function(x)
    # Softmax behind a head is left out.
    if is_head and activation is None and is_softmax(getattr(operation, "activation", None)):
        activation = Activation(lambda x: x)
    linear = {"activation": "linear"} if activation else {}
    twin = _float64_layer(step, len(twins), linear, proven)
    if activation:
        twin.activation = activation.function
    if not proven:
        for name, value in plain_settings(operation).items():
            setattr(twin, name, value)
    twins.append(twin)
    if "training" in inspect.signature(type(operation).call).parameters:
        return lambda *args, **kwargs: twin(*args, **{**kwargs, "training": False})
    return twin


def _on_slices(function):
    """The function applied to slices along the first axis, which become samples for it."""

    def apply(x, **kwargs):
        y = function(keras.ops.reshape(x, (-1, *x.shape[2:])))
        return keras.ops.reshape(y, (-1, x.shape[1], *y.shape[1:]))

    return apply


def _float64_layer(step, index, settings, proven):
    layer = step.operation
    try:
        config = {**_float64_config(layer, f"layer_{index}"), **settings}
        twin = type(layer).from_config(config)
    except Exception as error:
        raise ValueError(
            f"{title(layer)} cannot be built in float64 from its configuration, which its "
            f"`get_config` must give: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    inputs = {
        i: keras.KerasTensor(shape, dtype="float64")
        for i, shape in zip(step.inputs, step.input_shapes)
    }
    args, kwargs = keras.tree.map_structure(
        lambda a: inputs[a.index] if isinstance(a, Value) else a, (step.args, step.kwargs)
    )
    # What a layer of someone else's makes of its first weights is not known.
    with _nothing_drawn(twin) if proven else contextlib.nullcontext():
        twin(*args, **kwargs)
    # A PReLU as an activation has weights of its own, and is evaluated by its formula.
    apart = {id(w) for w in getattr(getattr(layer, "activation", None), "weights", ())}
    sources = [w for w in layer.weights if id(w) not in apart]
    built, stored = ([tuple(w.shape) for w in each] for each in (twin.weights, sources))
    if built != stored:
        raise _changed(step, f"it holds weights of shapes {stored}, its configuration says {built}")
    for target, source in zip(twin.weights, sources, strict=True):
        values = keras.ops.convert_to_numpy(source)
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(source.dtype)):
            values = np.asarray(values, "float64")
            if keras.backend.standardize_dtype(target.dtype) != "float64":
                raise ValueError(
                    f"{title(layer)} built its weight '{target.path}' in {target.dtype} although "
                    "its dtype is float64: it cannot be evaluated exactly enough to certify."
                )
        target.assign(values)
    if proven:
        _check_attributes(step, twin)
    # These are no weights, and Keras would round them to float32 on some backends.
    rule = find_rule(step)
    for name in rule.numbers if rule else ():
        values = np.asarray(keras.ops.convert_to_numpy(getattr(layer, name)), "float64")
        setattr(twin, name, keras.ops.convert_to_tensor(values, dtype="float64"))
    return twin


@contextlib.contextmanager
def _nothing_drawn(layer):
    """A layer builds its weights as zeros: stored ones follow, and drawing them takes time."""
    layer.add_weight = functools.partial(_zeros, layer.add_weight)
    try:
        yield
    finally:
        del layer.add_weight


def _zeros(add_weight, *args, **kwargs):
    return add_weight(*args, **{**kwargs, "initializer": "zeros"})


def _check_attributes(step, twin):
    """Refuses a layer one of whose attributes was changed behind its configuration's back.

    Numbers would not always tell: max and average pooling agree on a constant image.
    """
    mine, its = vars(step.operation), vars(twin)
    ignored = {*vars(keras.layers.Layer()), *keras_private.BUILD_ATTRIBUTES}
    for name in sorted((mine.keys() & its.keys()) - ignored):
        values = (mine[name], its[name])
        alike = all(map(_is_plain, values))
        missing = (values[0] is None) != (values[1] is None)
        if missing or (alike and values[0] != values[1]):
            raise _changed(step, f"`{name}` is {mine[name]!r}, by its configuration {its[name]!r}")


def _is_plain(value):
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _changed(step, what):
    """The error for a layer that is not what its configuration says."""
    return ValueError(
        f"{step.title} was changed after it was built: {what}. Build the model anew, with the "
        "layer as it is meant, and load its weights."
    )


def _float64_config(layer, name):
    """Configuration of the twin. TensorFlow would pass Python floats on as float32."""
    config = {k: np.float64(v) if type(v) is float else v for k, v in layer.get_config().items()}
    return {**config, "name": name, "dtype": "float64"}


def _constant(value, kind):
    """A constant of an operation: numbers that are computed with as float64 tensors."""
    tensor = hasattr(value, "shape") and hasattr(value, "dtype")
    if not tensor and (type(value) is not float and kind not in NUMERIC):
        return value  # an axis, a shape, a slice
    array = np.asarray(keras.ops.convert_to_numpy(value) if tensor else value)
    if kind == "Pad":  # with a Python number, not with a tensor on each backend
        return float(array)
    if array.dtype.kind in "iub" and kind not in NUMERIC:
        return array
    return keras.ops.convert_to_tensor(array.astype("float64"), dtype="float64")
