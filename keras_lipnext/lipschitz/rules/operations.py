"""The rules of the operations of `keras.ops` that a functional model may use between its layers.

None may touch the batch axis: a certificate speaks of one sample, whatever is beside it.
"""

import math

import keras
import numpy as np

from keras_lipnext.activations import NO_CONSTANT
from keras_lipnext.lipschitz.graph import Value
from keras_lipnext.lipschitz.rounding import added, added_up, block_diagonal, held, scaled
from keras_lipnext.lipschitz.rules.base import Bound, library_rule, size
from keras_lipnext.lipschitz.rules.contractions import (
    NoContraction,
    einsum_axes,
    matmul_axes,
    matrices,
    tensordot_axes,
)
from keras_lipnext.lipschitz.rules.layers import vanishing_squares
from keras_lipnext.lipschitz.rules.merging import merged
from keras_lipnext.norms.roundoff import ROUNDING


@library_rule("Glu", "Exp", "HardShrink", "Threshold")
def without_constant(operation, context):
    name = {"Glu": "glu", "Exp": "exponential", "HardShrink": "hard_shrink"}
    raise context.refusal(
        f"it has no constant: it {NO_CONSTANT[name.get(context.step.kind, 'threshold')]}"
    )


def _clipped(operation, x):
    """Its limits are attributes, which some backends round to float32."""
    low, high = (
        keras.ops.convert_to_tensor(np.float64(v), dtype="float64")
        for v in (operation.x_min, operation.x_max)
    )
    return keras.ops.minimum(keras.ops.maximum(x, low), high)


@library_rule("Clip", evaluation=_clipped)
def clip(operation, context):
    """Rounds nothing; sends 0 to the nearer end of an interval that leaves it out."""
    low, high = (np.asarray(v, "float64") for v in (operation.x_min, operation.x_max))
    if low.ndim or high.ndim or not low <= high:
        raise context.refusal("its limits are not two numbers, the smaller first")
    lost = held(context, context.offset_norm(np.maximum(np.abs(low), np.abs(high))))
    return Bound(1.0, context.offset_norm(np.clip(0.0, low, high)), absolute=lost)


@library_rule("Cast", identity=True, converts=True)
def cast(operation, context):
    if "float" not in str(operation.dtype):
        raise context.refusal(f"it rounds to {operation.dtype}")
    return Bound(1.0)  # in real arithmetic: the float64 evaluation skips it


# Arithmetic between tensors, or of one tensor and a constant.
ARITHMETIC = ("Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum")
# Products that sum over axes, likewise.
PRODUCTS = ("Matmul", "Dot", "Tensordot", "Einsum")
# Operations whose constants are real numbers that are computed with, and all that may read one.
NUMERIC = ARITHMETIC + PRODUCTS
READING_CONSTANTS = (*NUMERIC, "Pad", "Take")


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


@library_rule("Add", "Subtract")
def addition(operation, context):
    constant = _constant(context)
    if constant is None:
        return merged(context, "sum", roundings=1)
    return (merged(context, "hypot"), added(context, constant))


@library_rule("Multiply")
def multiplication(operation, context):
    constant = _constant(context)
    if constant is None:
        raise context.refusal("a product of two tensors has no Lipschitz constant")
    return (merged(context, "hypot"), scaled(context, constant))


@library_rule("Divide", "TrueDivide")
def division(operation, context):
    constant = _constant(context)
    if constant is None or not isinstance(context.step.args[0], Value):
        raise context.refusal("dividing by a tensor has no Lipschitz constant")
    if (constant == 0).any():
        raise context.refusal("it divides by zero")
    return (merged(context, "hypot"), scaled(context, 1 / constant))


@library_rule("Maximum", "Minimum")
def extremum(operation, context):
    constant = _constant(context)
    bound = merged(context, "hypot")
    if constant is None:
        return bound
    offset = context.offset_norm(constant)
    return (bound, Bound(1.0, offset, absolute=held(context, offset)))


@library_rule(*PRODUCTS)
def product(operation, context):
    """Of a tensor and a constant: a linear map of the samples."""
    operands = context.step.args
    tensors = [isinstance(v, Value) for v in operands]
    if len(operands) != 2 or context.step.kwargs or sum(tensors) != 1:
        raise context.refusal("a product of several tensors has no Lipschitz constant")
    first, constant = tensors[0], operands[tensors.index(False)]
    weights = context.array(_numbers(constant))
    shape = (None, *context.input_shape)
    try:
        axes = _product_axes(operation, context.step.kind, len(shape), weights.ndim, first)
        blocks = matrices(axes, shape, weights)
    except NoContraction as error:
        raise context.refusal(str(error)) from error
    return block_diagonal(context, blocks)


def _product_axes(operation, kind, rank, weights_rank, tensor_first):
    """(tensor, weights, output), a letter an axis."""
    if kind == "Einsum":
        inputs, _, output = operation.subscripts.partition("->")
        operands = inputs.split(",")[:: 1 if tensor_first else -1]
        subscripts = ",".join(operands) + ("->" + output if output else "")
        return einsum_axes(subscripts, rank)
    if kind == "Matmul" or (kind == "Dot" and tensor_first and weights_rank <= 2):
        return matmul_axes(rank, weights_rank, tensor_first)
    if kind == "Tensordot" and tensor_first:
        return tensordot_axes(rank, weights_rank, operation.axes)
    raise NoContraction("its constant stands first, or has many axes: use keras.ops.einsum")


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


@library_rule("Reshape")
def reshape(operation, context):
    sizes = size(context.input_shape), size(context.output_shape)
    if sizes[0] != sizes[1] or math.isinf(sizes[0]):
        raise context.refusal(
            f"it reshapes samples of shape {context.input_shape} to {context.output_shape}, which "
            "may mix the samples of a batch"
        )
    return Bound(1.0)


@library_rule("Transpose")
def transpose(operation, context):
    if operation.axes is None or operation.axes[0] != 0:
        raise context.refusal("it moves the batch axis")
    return Bound(1.0)


@library_rule("Moveaxis")
def moveaxis(operation, context):
    _axes(context, [*operation.source, *operation.destination])
    return Bound(1.0)


@library_rule("Swapaxes")
def swapaxes(operation, context):
    _axes(context, [operation.axis1, operation.axis2])
    return Bound(1.0)


@library_rule("Flip", "Roll", "Squeeze", "Split", "Sort")
def along_axes(operation, context):
    """Sorting does not increase distances: equal order is what brings two vectors nearest."""
    _axes(context, operation.axis)
    return Bound(1.0)


@library_rule("ExpandDims", "Concatenate", "Stack")
def along_new_axes(operation, context):
    if not all(isinstance(v, Value) for v in keras.tree.flatten(context.step.args)):
        raise context.refusal("it joins tensors with constants")
    _axes(context, operation.axis, rank=len(context.output_shape) + 1)
    return Bound(1.0)


@library_rule("Pad")
def pad(operation, context):
    """Copies entries, or adds a constant: as often as an entry occurs on an axis, it counts."""
    widths = operation.pad_width
    if len(widths) == 1 or any(widths[0]):
        raise context.refusal("it pads the batch axis")
    fillings = [*context.step.args[1:], *context.step.kwargs.values()]
    if any(isinstance(v, Value) for v in fillings):
        raise context.refusal("it pads with a tensor, not with one number")
    value = context.array(_numbers(([v for v in fillings if v is not None] or [0.0])[0]))
    if value.ndim:
        raise context.refusal("it pads with an array, not with one number")
    if operation.mode == "constant":
        added = size(context.output_shape) - size(context.input_shape)
        offset = abs(float(value)) * math.sqrt(added) if value else 0.0
        return Bound(1.0, offset * (1 + 4 * ROUNDING), absolute=held(context, offset))
    largest = max(n for pair in widths for n in pair)
    if operation.mode != "reflect" and (operation.mode != "symmetric" or largest > 1):
        raise context.refusal(
            f"the backends of Keras pad {largest} entries by {operation.mode!r} in different ways: "
            "use 'reflect'"
        )
    return _copies(
        context,
        (
            np.pad(np.arange(_known(context, n)), pair, mode=operation.mode)
            for n, pair in zip(context.input_shape, widths[1:])
            if any(pair)
        ),
    )


def _numbers(value):
    return np.asarray(keras.ops.convert_to_numpy(value))


def _known(context, side):
    """The size of an axis; refuses one that is unknown."""
    if side is None:
        raise context.refusal(f"the sizes of its input {context.input_shape} are unknown")
    return side


def _copies(context, indices):
    """`Bound` of taking entries by these indices on some axes: the most copies of one entry."""
    copies = math.prod(int(np.unique(i, return_counts=True)[1].max(initial=0)) for i in indices)
    return Bound(math.sqrt(copies) * (1 + ROUNDING))


@library_rule("Take")
def take(operation, context):
    (axis,) = _axes(context, operation.axis)
    indices = [*context.step.args[1:], *context.step.kwargs.values()]
    if len(indices) != 1 or any(isinstance(v, Value) for v in keras.tree.flatten(indices)):
        raise context.refusal("its indices are not constant")
    indices = _numbers(indices[0])
    side = _known(context, context.input_shape[axis - 1])
    if indices.dtype.kind not in "iu" or not ((-side <= indices) & (indices < side)).all():
        raise context.refusal(f"not all its indices are whole numbers from {-side} to {side - 1}")
    return _copies(context, [indices % side])


@library_rule("Repeat")
def repeat(operation, context):
    _axes(context, operation.axis)
    return Bound(math.sqrt(np.max(_numbers(operation.repeats))) * (1 + ROUNDING))


@library_rule("Tile")
def tile(operation, context):
    repeats = np.atleast_1d(_numbers(operation.repeats)).tolist()
    rank = len(context.input_shape) + 1
    if len(repeats) > rank or (len(repeats) == rank and repeats[0] != 1):
        raise context.refusal("it works on the batch axis")
    return Bound(math.sqrt(math.prod(repeats)) * (1 + ROUNDING))


@library_rule("GetItem")
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


def adds_up(operation):
    """Whether all it does to its input's entries is to add them up."""
    kind = type(operation).__name__
    return kind in ("Sum", "Cumsum") or (kind == "Norm" and operation.ord == 1)


@library_rule("Sum")
def sum_of(operation, context):
    count = _count(context, operation)
    if count is None:
        raise context.refusal(f"the number of terms of {context.input_shape} is unknown")
    constant = math.sqrt(count) * (1 + ROUNDING)
    total = added_up(context, count)
    relative = 2 * context.arithmetic.gamma(total + 2) * constant
    return Bound(constant, relative=relative, terms=total)


@library_rule("Mean")
def mean(operation, context):
    count = _count(context, operation)
    if count is None:
        return Bound(1.0, relative=math.inf)  # of one entry at least; known when certifying
    constant = (1 + 2 * ROUNDING) / math.sqrt(count)
    total = added_up(context, count)
    return Bound(constant, relative=2 * context.arithmetic.gamma(total + 2) * constant)


@library_rule("Cumsum")
def cumulative_sum(operation, context):
    """The triangular matrix of n ones has norm 1 / (2 sin(pi / (4 n + 2))).

    The inverse of T^T T is the second difference, with eigenvalues 4 sin^2 of these angles.
    """
    (axis,) = _axes(context, operation.axis)
    if operation.dtype is not None:
        raise context.refusal(f"it computes in {operation.dtype}: leave its dtype to the input")
    count = _known(context, context.input_shape[axis - 1])
    constant = (1 + 16 * ROUNDING) / (2 * math.sin(math.pi / (4 * count + 2)))
    total = added_up(context, count)
    relative = 2 * context.arithmetic.gamma(total + 2) * constant
    return Bound(constant, relative=relative, terms=total)


@library_rule("Norm")
def norm(operation, context):
    """Of vectors, or of matrices as vectors: distances of norms are at most norms of distances."""
    axes, order = _axes(context, operation.axis), operation.ord
    if order == math.inf and len(axes) == 1:
        return Bound(1.0)
    if order == 1 and len(axes) == 1:
        return sum_of(operation, context)
    if not (order is None or order == (2 if len(axes) == 1 else "fro")):
        raise context.refusal(f"its order {order!r} over {len(axes)} axes has no rule here")
    count = _count(context, operation)
    # Half the rounding of the sum; squares that vanish, as in L2Pool.
    rounding = math.inf if count is None else (count + 8) * context.arithmetic.rounding
    return Bound(1.0, relative=rounding, absolute=vanishing_squares(context))


@library_rule("Logsumexp")
def log_sum_exp(operation, context):
    """Its gradient is softmax, of a sum and so a norm of at most 1; log(n) at zero.

    Evaluated as m + log(sum exp(x - m)), m the largest entry: exp's argument is off by the
    rounding of 2 |x|, the sum relatively by that of n terms, and the result by its own.
    """
    count = _count(context, operation)
    if count is None:
        raise context.refusal(f"the number of terms of {context.input_shape} is unknown")
    groups = math.sqrt(size(context.output_shape))
    offset = (math.log(count) + 2 * ROUNDING) * groups
    return Bound(
        1.0,
        offset,
        relative=64 * context.arithmetic.rounding,
        absolute=context.arithmetic.rounding * ((2 * count + 64) * groups + 64 * offset),
    )


@library_rule("Max", "Min", "Amax", "Amin")
def largest(operation, context):
    _axes(context, operation.axis)
    if getattr(operation, "initial", None) is not None:
        raise context.refusal("it has an initial value")
    return Bound(1.0)
