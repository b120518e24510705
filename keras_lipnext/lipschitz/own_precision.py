"""What a model's own precision can do to its logits, beside those of an evaluation in float64.

The model computes in types of its own. What that can do to its logits follows from the same bounds
as the rounding of float64 does, in the arithmetic of each step. Wherever the two differ by more, a
layer computes something else than was certified.
"""

import dataclasses
import math

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.backend import keras_private
from keras_lipnext.lipschitz.rounding import (
    forward_errors,
    head_allowances,
    input_norms,
    logit_allowances,
    of_rows,
)
from keras_lipnext.lipschitz.rules.base import Bound, size
from keras_lipnext.norms.roundoff import ARITHMETIC, TF32, UNIT_ROUNDOFF

# What float32 implementations of functions may lose beyond the rounding of each operation. Where
# numbers are shorter, functions are computed in float32 and rounded.
_SLACK = 16.0


def types(step):
    """Names of the floating point types that a step computes in, in the model itself."""
    operation = step.operation
    if isinstance(operation, keras.layers.Layer):
        names = {layer.compute_dtype for layer in keras_private.layers_within(operation)}
        if not operation.autocast:
            names |= set(step.input_dtypes)
    else:
        names = {*step.input_dtypes, *([str(operation.dtype)] if step.kind == "Cast" else ())}
    return names & set(ARITHMETIC)


def convolves(operation):
    """Whether an operation, or a layer in it, may convolve, or leave products to cuDNN otherwise.

    That is known of the library's layers and Keras' dense ones; others may do so inside.
    """
    if not isinstance(operation, keras.layers.Layer):
        return "Conv" in type(operation).__name__
    return any(
        hasattr(part, "kernel_size")
        or not (
            type(part) in (keras.layers.Dense, keras.layers.EinsumDense)
            or type(part).__module__.startswith("keras_lipnext.")
        )
        for part in keras_private.layers_within(operation)
    )


def arithmetic_of(name, operation):
    """(unit roundoff, smallest full number) of an operation's products of a type, on this device.

    Float32 is what the device and the program's settings make of it.
    """
    if name == "float32":
        name = backend.float32_products(convolves(operation))
    return TF32 if name == "tf32" else ARITHMETIC[name]


def low_precision(certifiable):
    """Whether a layer or a cast computes in less than float32."""
    found = set().union(*(types(step) for step in certifiable.steps))
    return not found <= {"float32", "float64"}


def as_certified(own, predictions):
    """Which of a model's own answers, shape (rows, classes), are finite and of these classes."""
    return np.isfinite(own).all(axis=-1) & (own.argmax(axis=-1) == predictions)


def own_allowances(certifiable, bounds, shapes, inputs, logits, compared):
    """What its own precision can do to the model's margins, shape (rows, classes).

    Args:
        bounds: For each step of the body, the sequence of `Bound` of its parts.
        shapes: {index of a value of the graph: its shape}.
        inputs: Float64, shape (samples, ...).
        logits: Float64, of the float64 evaluation, shape (rows, classes): of each sample in turn,
            as many.
        compared: `Compared`, these logits.
    """
    body = certifiable.body
    coarse = [_coarser(step, parts, shapes) for step, parts in zip(body.steps, bounds)]
    norms = input_norms(inputs)
    # `predict` casts what it is given.
    names = {keras.config.floatx(), certifiable.graph.input_dtype} & set(ARITHMETIC)
    unit, tiny = _coarsest(map(ARITHMETIC.get, names))
    given = 2 * unit * norms + tiny * math.sqrt(size(inputs.shape[1:]))
    r, d = (
        of_rows(v, len(logits)) for v in forward_errors(body, coarse, norms, given)[body.output]
    )
    unit, tiny = _arithmetic(certifiable.head or (body.steps[-1] if body.steps else None))
    scale = _slack(unit) / UNIT_ROUNDOFF
    kernel, distances = compared.kernel, compared.distances
    if kernel is None:
        return logit_allowances(logits, d) + scale * logit_allowances(logits, 0 * d)
    exact = np.zeros_like(d)
    allowed = scale * head_allowances(logits, compared, r + d, exact)
    allowed += distances[logits.argmax(axis=-1)] * d[:, None]
    return allowed + (tiny * size(kernel.shape) * (1 + np.abs(kernel).max()) * (1 + r + d))[:, None]


def margins_apart(certifiable, bounds, shapes, inputs, logits, own, compared):
    """Which own margins z_i - z_j differ from those in float64 by more than rounding explains.

    Args:
        own: The model's own answers, of the shape of the logits.
        bounds, shapes, inputs, logits, compared: As for `own_allowances`.

    Returns:
        Booleans, shape (rows, classes).
    """
    allowed = own_allowances(certifiable, bounds, shapes, inputs, logits, compared)
    body = certifiable.body
    unit, _ = _arithmetic(certifiable.head or (body.steps[-1] if body.steps else None))
    values, own = logits, own.astype("float64")
    for step in certifiable.shares:
        unit, tiny = _arithmetic(step)
        if step is certifiable.shares[-1]:
            own, lost = _logarithms(step, own, unit, tiny)
        else:
            # Shares move by no more than margins do, and their rounding is relative to 1.
            values, lost = _shares(step, values), _slack(unit) * (64 + values.shape[-1])
        allowed = allowed.max(axis=-1, keepdims=True) * 2 + lost
    # The order of the logits is that of all that is made of them.
    top, rows = logits.argmax(axis=-1), np.arange(len(logits))
    exact, found = (z[rows, top][:, None] - z for z in (values, own))
    if certifiable.shares:
        allowed = allowed + 2.0**10 * unit * np.abs(exact)
    with np.errstate(invalid="ignore"):
        return (np.abs(exact - found) > allowed) & np.isfinite(exact) & np.isfinite(found)


def _arithmetic(step):
    """(unit roundoff, smallest full number), the coarsest of a step's types, or of Keras' own."""
    if step is None:
        return ARITHMETIC[keras.config.floatx()]
    return _coarsest(arithmetic_of(name, step.operation) for name in types(step))


def _coarsest(known):
    return tuple(map(max, zip(ARITHMETIC["float64"], *known)))


def _slack(unit):
    """What an operation may be off by, relatively, where its rounding is `unit`."""
    return unit * (_SLACK if unit < 2.0**-16 else 1.0)


def _coarser(step, parts, shapes):
    """The bounds of a step in the arithmetic of the model, its inputs and outputs rounded."""
    unit, tiny = _arithmetic(step)
    scale = _slack(unit) / UNIT_ROUNDOFF
    entries = sum(size(shapes[i][1:]) for i in (*step.inputs, *step.outputs))
    weights = sum(size(weight.shape) for weight in getattr(step.operation, "weights", ()))
    absolute = tiny * math.sqrt(entries)
    rounded = Bound(1.0, relative=2 * unit, absolute=absolute)
    return (
        dataclasses.replace(rounded, combine=parts[0].combine),
        *(
            dataclasses.replace(
                part,
                # Weights too small for the type vanish.
                relative=scale * part.relative + tiny * math.sqrt(weights),
                absolute=scale * part.absolute + absolute,
            )
            for part in parts
        ),
        rounded,
    )


def _is_log(step):
    function = getattr(step.operation, "activation", None)
    return step.kind == "LogSoftmax" or getattr(function, "__name__", "") == "log_softmax"


def _shares(step, values):
    with np.errstate(all="ignore"):
        shifted = values - values.max(axis=-1, keepdims=True)
        logarithms = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return logarithms if _is_log(step) else np.exp(logarithms)


def _logarithms(step, own, unit, tiny):
    """(logarithms of the shares that the model ends in, how far off rounding puts them)."""
    lost = _slack(unit) * (64 + own.shape[-1])
    if _is_log(step):
        return own, lost + 4 * unit * np.nan_to_num(np.abs(own), posinf=0.0, neginf=0.0)
    with np.errstate(all="ignore"):
        return np.log(np.where(own > tiny / unit, own, np.nan)), lost
