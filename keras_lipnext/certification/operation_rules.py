"""The rules of the operations of `keras.ops` that a functional model may use between its layers.

None may touch the batch axis: a certificate speaks of one sample, whatever is beside it.
"""

import math

import keras
import numpy as np

from keras_lipnext.certification.activations import (
    INNER_SOFTMAX,
    OPERATION_ACTIVATIONS,
    operation_activation,
)
from keras_lipnext.certification.graph import Value
from keras_lipnext.certification.merging_rules import merged
from keras_lipnext.certification.norms import gamma
from keras_lipnext.certification.rounding import added, scaled
from keras_lipnext.certification.rules import ROUNDING, Bound, operation_rule, size


@operation_rule(*OPERATION_ACTIVATIONS)
def activation(operation, context):
    if not 2.0**-64 <= getattr(operation, "alpha", 1.0) <= 2.0**64:
        raise context.refusal(f"its alpha is {operation.alpha}: it must be positive, and moderate")
    return operation_activation(operation).bound(context.output_shape)


@operation_rule("Softmax", "LogSoftmax")
def softmax(operation, context):
    raise context.refusal(INNER_SOFTMAX)


@operation_rule("Negative", "Absolute", "Abs", "Fabs", "Copy", "StopGradient")
def exact(operation, context):
    return Bound(1.0)


@operation_rule("Clip")
def clip(operation, context):
    """Rounds nothing; sends 0 to the nearer end of an interval that leaves it out."""
    low, high = (np.asarray(v, "float64") for v in (operation.x_min, operation.x_max))
    if low.ndim or high.ndim or not low <= high:
        raise context.refusal("its limits are not two numbers, the smaller first")
    return Bound(1.0, context.offset_norm(np.clip(0.0, low, high)))


@operation_rule("Cast")
def cast(operation, context):
    if "float" not in str(operation.dtype):
        raise context.refusal(f"it rounds to {operation.dtype}")
    return Bound(1.0)  # in real arithmetic: the float64 evaluation skips it


# Arithmetic between tensors, or of one tensor and a constant.
ARITHMETIC = ("Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum")


def _constant(context):
    """The constant operand as float64, or None between two tensors; checks that it broadcasts."""
    operands = [*context.step.args, *context.step.kwargs.values()]
    constants = [v for v in operands if not isinstance(v, Value)]
    if len(operands) != 2 or len(constants) > 1:
        raise context.refusal(f"it is called with {operands}")
    if not constants:
        return None
    constant = context.array(np.asarray(keras.ops.convert_to_numpy(constants[0])))
    rank = len(context.input_shape) + 1
    if constant.ndim > rank or (constant.ndim == rank and constant.shape[0] != 1):
        raise context.refusal(
            f"a constant of shape {constant.shape} gives each sample of a batch another value"
        )
    return constant


@operation_rule("Add", "Subtract")
def addition(operation, context):
    constant = _constant(context)
    if constant is None:
        return merged(context, "sum", roundings=1)
    return (merged(context, "hypot"), added(context, constant))


@operation_rule("Multiply")
def multiplication(operation, context):
    constant = _constant(context)
    if constant is None:
        raise context.refusal("a product of two tensors has no Lipschitz constant")
    return (merged(context, "hypot"), scaled(context, constant))


@operation_rule("Divide", "TrueDivide")
def division(operation, context):
    constant = _constant(context)
    if constant is None or not isinstance(context.step.args[0], Value):
        raise context.refusal("dividing by a tensor has no Lipschitz constant")
    if (constant == 0).any():
        raise context.refusal("it divides by zero")
    return (merged(context, "hypot"), scaled(context, 1 / constant))


@operation_rule("Maximum", "Minimum")
def extremum(operation, context):
    constant = _constant(context)
    bound = merged(context, "hypot")
    if constant is None:
        return bound
    return (bound, Bound(1.0, context.offset_norm(constant)))


# Rearrangements.


def _axes(context, axes, rank=None):
    """The axes, not negative; refuses None and the batch axis."""
    rank = len(context.input_shape) + 1 if rank is None else rank
    if axes is None:
        raise context.refusal("it mixes the samples of a batch: give axes other than 0")
    axes = tuple(a % rank for a in np.atleast_1d(axes).tolist())
    if 0 in axes:
        raise context.refusal("it works on the batch axis")
    return axes


@operation_rule("Reshape")
def reshape(operation, context):
    sizes = size(context.input_shape), size(context.output_shape)
    if sizes[0] != sizes[1] or math.isinf(sizes[0]):
        raise context.refusal(
            f"it reshapes samples of shape {context.input_shape} to {context.output_shape}, which "
            "may mix the samples of a batch"
        )
    return Bound(1.0)


@operation_rule("Transpose")
def transpose(operation, context):
    if operation.axes is None or operation.axes[0] != 0:
        raise context.refusal("it moves the batch axis")
    return Bound(1.0)


@operation_rule("Moveaxis")
def moveaxis(operation, context):
    _axes(context, [*operation.source, *operation.destination])
    return Bound(1.0)


@operation_rule("Swapaxes")
def swapaxes(operation, context):
    _axes(context, [operation.axis1, operation.axis2])
    return Bound(1.0)


@operation_rule("Flip", "Roll", "Squeeze", "Split")
def along_axes(operation, context):
    _axes(context, operation.axis)
    return Bound(1.0)


@operation_rule("ExpandDims", "Concatenate", "Stack")
def along_new_axes(operation, context):
    if not all(isinstance(v, Value) for v in keras.tree.flatten(context.step.args)):
        raise context.refusal("it joins tensors with constants")
    _axes(context, operation.axis, rank=len(context.output_shape) + 1)
    return Bound(1.0)


@operation_rule("Pad")
def pad(operation, context):
    values = [v for v in context.step.args[1:] if v is not None]
    if operation.mode != "constant" or values or context.step.kwargs.get("constant_values"):
        raise context.refusal("it pads with something else than zeros")
    widths = operation.pad_width
    if len(widths) == 1 or any(widths[0]):
        raise context.refusal("it pads the batch axis")
    return Bound(1.0)


@operation_rule("GetItem")
def getitem(operation, context):
    keys = context.step.args[1]
    keys = keys if isinstance(keys, (tuple, list)) else (keys,)
    plain = all(k is None or k is ... or isinstance(k, (int, slice)) for k in keys)
    axes = sum(k is not None and k is not ... for k in keys)
    if keys and keys[0] is ...:
        whole = axes <= len(context.input_shape)  # the ellipsis stands for the batch axis at least
    else:
        whole = keys and keys[0] == slice(None)
    if not plain or not whole:
        raise context.refusal(f"x[{keys}] does more than take slices of each sample: use x[:, ...]")
    return Bound(1.0)


# Reductions.


def _count(context, operation):
    """Number of entries that go into one of the output; None where unknown."""
    axes = _axes(context, operation.axis)
    sides = [context.input_shape[a - 1] for a in axes]
    return None if None in sides else math.prod(sides)


@operation_rule("Sum")
def sum_of(operation, context):
    count = _count(context, operation)
    if count is None:
        raise context.refusal(f"the number of terms of {context.input_shape} is unknown")
    constant = math.sqrt(count) * (1 + ROUNDING)
    return Bound(constant, relative=2 * gamma(count + 2) * constant)


@operation_rule("Mean")
def mean(operation, context):
    count = _count(context, operation)
    if count is None:
        return Bound(1.0, relative=math.inf)  # of one entry at least; known when certifying
    constant = (1 + 2 * ROUNDING) / math.sqrt(count)
    return Bound(constant, relative=2 * gamma(count + 2) * constant)


@operation_rule("Max", "Min", "Amax", "Amin")
def largest(operation, context):
    _axes(context, operation.axis)
    if getattr(operation, "initial", None) is not None:
        raise context.refusal("it has an initial value")
    return Bound(1.0)
