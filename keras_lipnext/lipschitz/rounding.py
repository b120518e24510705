"""Forward error of the float64 evaluation: what rounding can do to the logits.

For every value z of the graph two numbers a sample are carried along, over the whole tensor:
r >= ||z||, of the exact value, and D >= ||computed z - z||. A `Bound` takes them to

    r' = constant r + offset,      D' = constant D + relative (r + D) + absolute,

since the operation is applied to the computed value, whose norm is at most r + D.
[Higham, Accuracy and Stability of Numerical Algorithms, chapter 3]
"""

import dataclasses
import math

import numpy as np

from keras_lipnext.lipschitz.rules.base import Bound, size
from keras_lipnext.norms.matrices import spectral_norm_bound
from keras_lipnext.norms.roundoff import ROUNDING, UNDERFLOW, UP_STEP, gamma

# Factors are between 2^-these and 2^these; at most `MOST_FACTORS` follow one another in float32.
FACTORS = {"float64": 64, "float32": 16}
MOST_FACTORS = 7


def linear(context, norm, kernel, terms):
    """`Bound` of a product with a kernel (*spatial, inputs, outputs), without bias.

    Args:
        norm: Upper bound of the operator's norm.
        terms: Number of products that are summed for one output, in any order.
    """
    u = context.arithmetic
    magnitude = context.absolute_norm(kernel)
    underflow = u.underflow * terms * (1 + magnitude)
    return Bound(
        norm,
        relative=products(context, terms, magnitude, norm) + u.underflow * size(kernel.shape),
        absolute=underflow * size(context.output_shape),
        terms=terms,
    )


def products(context, terms, magnitude, norm):
    """What sums of products with a matrix are off by, relatively to the norm of what it reads.

    Args:
        terms: Number of products in a sum.
        magnitude: Upper bound of the norm of the matrix of magnitudes.
        norm: Upper bound of the matrix's norm.
    """
    if not context.arithmetic.program:
        return 2 * context.arithmetic.gamma(terms + 2) * magnitude
    if not magnitude <= context.arithmetic.limit**0.5:
        raise context.refusal(f"its kernel's magnitudes, of norm {magnitude}, may overflow")
    magnitudes, sums = context.arithmetic.products(terms)
    return magnitudes * magnitude + sums * norm


def joining(context, terms):
    """What an addend of size 1 adds to the rounding of a sum of products that it may join.

    As its first term, too: so XLA adds biases to the products of single samples.
    """
    u = context.arithmetic
    return sum(u.products(terms)) if u.program else 2 * u.gamma(terms + 2)


def added_up(context, count):
    """Additions in a sum of `count` entries, with those that it may be merged with.

    Of tensors that were put next to each other compilers add up the parts instead, and start the
    sum that a part is with those in front of it. Sums of sums they merge, in an order that need not
    finish one before the next: what was lost where terms cancel is not known any more.
    """
    if context.reduced and count > 1:
        raise context.refusal(
            "it adds up what keras.ops.sum or cumsum added up, which compilers merge in an order "
            "of their own: add up over all axes at once"
        )
    return count + (min(count, context.parts) * context.summed if context.parts > 1 else 0)


def block_diagonal(context, kernels):
    """As `linear`, of kernels (groups, inputs, outputs) that each act on entries of their own."""
    norm = context.largest_norm(kernels)
    bounds = [linear(context, norm, kernel, kernel.shape[0]) for kernel in kernels]
    return Bound(
        norm,
        relative=max(bound.relative for bound in bounds),
        absolute=max(bound.absolute for bound in bounds),
        terms=bounds[0].terms,
    )


def mapped(context, maps):
    """`Bound`s of applying to each axis of `maps`, {axis: matrix}, its matrix of entries >= 0.

    The matrices' entries are rounded, each once, relatively.
    """
    for matrix in maps.values():
        norm = spectral_norm_bound(matrix) * (1 + 2 * ROUNDING)
        bound = linear(context, norm, matrix, len(matrix))
        # Between two axes a tensor may be larger than the output.
        yield dataclasses.replace(bound, absolute=bound.absolute * size(context.input_shape))


def repeated(bound, count):
    """`Bound` of the map applied to each of `count` parts of a tensor, as one tensor."""
    root = math.sqrt(count) * (1 + ROUNDING)
    slope, inside = bound.inside
    offset, absolute, inside = (
        root * v if v else 0.0 for v in (bound.offset, bound.absolute, inside)
    )
    return dataclasses.replace(bound, offset=offset, absolute=absolute, inside=(slope, inside))


def added(context, values, terms=None):
    """`Bound` of adding a constant tensor to one of the output's shape.

    Args:
        values: The tensor.
        terms: Number of products in the sums that it is added to, which it may join: as the first
            term it is rounded as often as they are added. Those of the context by default.
    """
    terms = context.summed if terms is None else terms
    offset = context.offset_norm(values)
    rounding = context.arithmetic.rounding
    absolute = (rounding + joining(context, terms)) * offset
    return Bound(1.0, offset, rounding, absolute, terms=terms)


def held(context, offset):
    """What the entries of a constant of norm `offset` lose where a program holds them."""
    return context.arithmetic.unit * offset if context.arithmetic.program else 0.0


def scaled(context, factors):
    """`Bound` of multiplying entry by entry with broadcast factors.

    Compilers may multiply the factors of several layers first. Within these limits some fifteen of
    them cannot under- or overflow, and no seven in float32.
    """
    check_factors(context, np.abs(context.array(factors)))
    largest = context.largest(factors) * (1 + ROUNDING)
    return Bound(largest, relative=2 * context.arithmetic.rounding * largest)


def check_factors(context, sizes):
    """Refuses factors of magnitudes that leave the type's range where several are multiplied."""
    exponent = FACTORS[context.arithmetic.name]
    if not ((sizes == 0) | (sizes >= 2.0**-exponent) & (sizes <= 2.0**exponent)).all():
        raise context.refusal(
            f"it multiplies by factors beyond 2^-{exponent} to 2^{exponent}: no radius follows"
        )


def combined(how, values):
    """Norm of the joint input of an operation from the norms of its inputs, rounded up."""
    if len(values) == 1:
        return values[0]
    if how == "sum":
        return sum(values) * UP_STEP
    if how == "mean":
        return sum(values) / len(values) * UP_STEP
    # An array's norm is safe from over- and underflow only after scaling.
    scale = np.maximum.reduce(values)
    with np.errstate(invalid="ignore"):
        ratios = [np.where(scale > 0, v / np.where(scale > 0, scale, 1), 0.0) for v in values]
    return np.sqrt(sum(x * x for x in ratios)) * scale * UP_STEP


@dataclasses.dataclass(frozen=True)
class Compared:
    """Logits z_k = w_k . f + b_k that are compared with one another, as certificates read them.

    Attributes:
        distances: ||w_i - w_j||, or what the constant of z_i - z_j is to the body's without a
            linear head, rounded up, shape (logits, logits).
        kernel: Shape (features, logits), float64; None without a linear head.
        joint: || |w_i| + |w_j| ||, rounded up, shape (logits, logits), or None.
        biases: |b_k|, or 0.
    """

    distances: np.ndarray
    kernel: np.ndarray | None = None
    joint: np.ndarray | None = None
    biases: np.ndarray | float = 0.0


def of_rows(values, rows):
    """What is known of each sample, for each of the rows of logits that it has."""
    return np.repeat(values, rows // max(len(values), 1), axis=0)


def forward_errors(graph, bounds, norms, errors=None, values=None, limit=math.inf):
    """(r, D) of every value, arrays of shape (samples,).

    Args:
        graph: `Graph`.
        bounds: For each step, the sequence of `Bound` of its parts, with known shapes.
        norms: Upper bounds of the inputs' norms, shape (samples,).
        errors: How far off the inputs themselves are, shape (samples,); None if they are exact.
        values: {index of a value: upper bounds of its exact norms, shape (samples,)}, where they
            are known better than by r; or None.
        limit: Norms beyond which computed values may overflow: D is infinite.

    Returns:
        {index of the value: (r, D)}.
    """
    state = {0: (norms, np.zeros_like(norms) if errors is None else errors)}
    for step, parts in zip(graph.steps, bounds):
        r, d = (combined(parts[0].combine, [state[i][k] for i in step.inputs]) for k in (0, 1))
        for part in parts:
            inside = part.inside[0] * (r + d) + part.inside[1]
            r, d = (
                (part.constant * r + part.offset) * UP_STEP,
                (part.constant * d + part.relative * (r + d) + part.absolute) * UP_STEP,
            )
            if limit < math.inf:
                d = np.where((r + d <= limit) & (inside <= limit), d, np.inf)
        for i in step.outputs:
            known = r if values is None else np.minimum(r, values[i])
            state[i] = (known, d)
    return state


def underflow(arithmetic, shapes, constant):
    """What flushing subnormal entries of inputs and outputs to zero may change."""
    return arithmetic.underflow * (1 + constant) * sum(size(shape) for shape in shapes)


def input_norms(x):
    """Upper bounds of ||x||, for a batch of float64 inputs: shape (samples,)."""
    flat = np.abs(x).reshape(len(x), math.prod(x.shape[1:]))
    scale = np.maximum(flat.max(axis=1, initial=0.0), 2.0**-900)
    with np.errstate(invalid="ignore"):
        norms = np.sqrt(((flat / scale[:, None]) ** 2).sum(axis=1)) * scale
    return norms * (1 + (flat.shape[1] + 16) * ROUNDING) + UNDERFLOW


def head_allowances(logits, compared, r, d):
    """E_ij of the margins z_i - z_j of the predicted class i, shape (samples, classes).

    Logits z_k = w_k . f + b_k of features with norm r and error d: the error of f acts through
    w_i - w_j, each dot product adds its own rounding, as the first term of which a bias may be
    rounded as often as its products are added.

    Args:
        logits: Computed, shape (samples, classes).
        compared: `Compared`, these logits, with a linear head.
        r, d: Shape (samples,).
    """
    predictions = np.argmax(logits, axis=-1)
    kernel, biases = compared.kernel, np.broadcast_to(compared.biases, logits.shape[-1:])
    terms = len(kernel)
    errors = compared.distances[predictions] * d[:, None]
    sums = compared.joint[predictions] * (r + d)[:, None] + biases + biases[predictions][:, None]
    errors += 2 * gamma(terms + 2) * sums
    errors += UNDERFLOW * terms * (1 + np.abs(kernel).max(initial=0.0)) * (1 + r + d)[:, None]
    return (errors + _last_roundings(logits, predictions)) * UP_STEP


def logit_allowances(logits, d):
    """As `head_allowances`, without a linear head: D covers the logits themselves."""
    predictions = np.argmax(logits, axis=-1)
    errors = math.sqrt(2) * UP_STEP * d[:, None]
    return (errors + _last_roundings(logits, predictions)) * UP_STEP


def _last_roundings(logits, predictions):
    """Adding to what was summed, and the subtraction z_i - z_j."""
    own = np.abs(logits[np.arange(len(logits)), predictions])
    return 2 * ROUNDING * (np.abs(logits) + own[:, None])
