"""Composite layers that declare `certified_parts`: what they must be, and do, to be unrolled.

`keras_lipnext.certification` shows one.

Such a layer says that its `call` is the composition of these layers, in this order. Everything else
about it is proven of the parts. That it is true is checked twice: the class that declares the parts
must be the one that defines `call`, and hold no weights beside theirs; and its own answers to
batches made to tell layers apart must be those of the parts, one after the other.
"""

import contextlib
import dataclasses
import inspect

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.arguments import title
from keras_lipnext.backend import keras_private
from keras_lipnext.lipschitz.own_precision import arithmetic_of
from keras_lipnext.norms.roundoff import ARITHMETIC

_NAME = "certified_parts"
# Axes of unknown size are tried with so many entries.
_SIDE = 16
# What a `call` that computes the same in another way may differ by, in units of its dtype's
# rounding and of its largest entry. Applied one after the other the parts answer the same bits.
_UNITS = {"float64": 2.0**10, "float32": 2.0**6, "bfloat16": 4.0, "float16": 4.0}


@dataclasses.dataclass(frozen=True)
class Composite:
    """An application of a composite layer that was unrolled.

    Attributes:
        name: Path of the layer.
        layer: The composite.
        parts: Its parts, in order.
        input_shape: With batch axis, None where unknown.
        input_dtype: That it is given.
    """

    name: str
    layer: keras.layers.Layer
    parts: tuple
    input_shape: tuple
    input_dtype: str


def declares_parts(operation):
    """Whether a layer declares that it is the composition of its sub-layers; None declares none."""
    layer = isinstance(operation, keras.layers.Layer)
    return layer and getattr(operation, _NAME, None) is not None


def parts_of(layer):
    """The parts that a composite layer declares; ValueError, with the reason, if it may not."""
    owner = next((cls for cls in type(layer).__mro__ if _NAME in vars(cls)), None)
    if _NAME in vars(layer) or owner is None or not inspect.isfunction(vars(owner)[_NAME]):
        # As an attribute Keras' files would name the parts' weights by it, and older files not.
        raise _refusal(layer, "make it a method, of the class whose `call` it describes")
    for method in ("call", "__call__"):
        caller = next(cls for cls in type(layer).__mro__ if method in vars(cls))
        if not issubclass(owner, caller):
            raise _refusal(
                layer,
                f"its class {caller.__name__} defines another `{method}` than {owner.__name__}, "
                "which declares the parts: declare its own, or none, `certified_parts = None`",
            )
    parts = layer.certified_parts()
    if not isinstance(parts, (tuple, list)) or not parts:
        raise _refusal(layer, f"they must be a tuple of layers. Received: {parts!r}")
    for part in parts:
        if not isinstance(part, keras.layers.Layer):
            raise _refusal(layer, f"a part must be a layer. Received: {part!r}")
        if not part.built:
            raise _refusal(
                layer, f"its part {title(part)} is not built: build parts in `build`, in order"
            )
    held = {id(weight) for part in parts for weight in part.weights}
    for weight in layer.weights:
        if id(weight) not in held:
            raise _refusal(layer, f"its weight '{weight.path}' belongs to none of its parts")
    return tuple(parts)


def answer_of(layer, part, given):
    """The symbolic output of a part for a symbolic input; ValueError if they do not fit."""
    try:
        made = part.compute_output_spec(given)
    except Exception as error:
        raise _refusal(
            layer,
            f"its part {title(part)} takes no inputs of shape {tuple(given.shape)}, which the "
            f"parts in front of it make: {type(error).__name__}: {str(error)[:300]}",
        ) from error
    if not isinstance(made, keras.KerasTensor):
        raise _refusal(layer, f"its part {title(part)} makes several outputs, {made!r}")
    return made


def check_one_tensor(layer, node):
    """ValueError unless a layer is called with one tensor, not in a list, and answers with one."""
    given, made = node.arguments.args or tuple(node.arguments.kwargs.values()), node.output_tensors
    if len(node.input_tensors) != 1 or given[0] is not node.input_tensors[0] or len(made) != 1:
        raise _refusal(
            layer,
            f"it takes {len(node.input_tensors)} tensors and makes {len(made)}. A composition "
            "takes one, not in a list, and makes one",
        )


def check_output(layer, made, expected):
    """ValueError unless the last part's output, of shape `made`, is the layer's own."""
    if len(made) != len(expected) or any(
        n is not None and m is not None and n != m for n, m in zip(made[1:], expected[1:])
    ):
        raise _refusal(
            layer, f"they make outputs of shape {made}, and the layer itself of {expected}"
        )


def check_composites(graph):
    """ValueError, with the reason, unless each composite of a `Graph` answers as its parts do."""
    done = set()
    for composite in graph.composites:
        key = (id(composite.layer), composite.input_shape)
        if key not in done:
            done.add(key)
            _compare(composite)


def declared_composites(graph):
    """The composites of a `Graph` whose parts are the word of whoever wrote them, not ours."""
    return tuple(
        composite
        for composite in graph.composites
        if not type(composite.layer).__module__.startswith("keras_lipnext.")
    )


def composite_notes(graph):
    """A sentence on each of the `declared_composites`."""
    return tuple(
        f"Layer '{composite.name}' ({type(composite.layer).__name__}) counts as its parts, "
        f"{', '.join(part.name for part in composite.parts)}, one after the other, as its "
        "`certified_parts` declares. Its own answers were compared with theirs; that they agree "
        "on all inputs is not proven."
        for composite in declared_composites(graph)
    )


def probes(shape, dtype, seed=0):
    """A batch that tells layers apart: entries of both signs, of many sizes, no two alike."""
    rng = np.random.default_rng(seed)
    if not keras.backend.is_float_dtype(dtype):
        return rng.integers(0, 2 if dtype == "bool" else 128, size=shape)
    x = rng.normal(size=shape)
    x[1::3] = rng.random(size=x[1::3].shape)
    x[2::3] *= 8.0
    return x.astype("float32").astype("float64")


def _compare(composite):
    layer = composite.layer
    shape = tuple(_SIDE if n is None else n for n in composite.input_shape[1:])
    dtypes = {within.compute_dtype for within in keras_private.layers_within(layer)}
    scope = backend.float64_scope() if "float64" in dtypes else contextlib.nullcontext()
    size = composite.input_shape[0] or 3
    with scope, backend.inference_scope():
        x = keras.ops.convert_to_tensor(
            probes((size, *shape), composite.input_dtype), dtype=composite.input_dtype
        )
        try:
            own, composed = _at_inference(layer, x), x
            for part in composite.parts:
                composed = _at_inference(part, composed)
        except Exception as error:
            raise _refusal(
                layer,
                f"it could not be compared with them on inputs of shape {(size, *shape)}: "
                f"{type(error).__name__}: {str(error)[:300]}",
            ) from error
        dtype = keras.backend.standardize_dtype(own.dtype)
        own, composed = (
            np.asarray(keras.ops.convert_to_numpy(y), "float64") for y in (own, composed)
        )
    names = (dtypes | {dtype}) & set(ARITHMETIC)
    units = (_UNITS[name] * arithmetic_of(name, layer)[0] for name in names)
    allowed = max(units, default=0.0)
    largest = np.abs(composed).max(initial=0.0, where=np.isfinite(composed))
    same = own.shape == composed.shape and np.allclose(
        own, composed, rtol=0.0, atol=allowed * largest, equal_nan=True
    )
    if not same:
        raise _refusal(
            layer, "its `call` answers otherwise than they do, applied one after the other"
        )


def _at_inference(layer, x):
    known = "training" in inspect.signature(type(layer).call).parameters
    return layer(x, training=False) if known else layer(x)


def _refusal(layer, reason):
    return ValueError(
        f"{title(layer)} cannot be certified by its `certified_parts`: {reason}. They promise that "
        "`call` is `x = part(x)` for each of them, in order, and nothing else."
    )
