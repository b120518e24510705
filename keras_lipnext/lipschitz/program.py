"""What a deployed program computes: how far its logits are off, at every point of a ball.

For inputs x' with ||x' - x|| <= rho a value z of the graph, of which the constants from the input
combine to k, has ||z(x')|| <= ||z(x)|| + k rho. What rounding does to it is bounded by nonnegative
multiples of such norms (`forward_errors`), and so affine in rho: with D and d from the same
recursion, d for inputs of norm 1 and without offsets,

    ||computed z(x') - z(x')|| <= D + d rho.

`Program.errors` answers with E_ij(rho) <= b_ij + a_ij rho for the difference of two logits.
[Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 to 4]
"""

import dataclasses
import math
import re

import keras
import numpy as np

from keras_lipnext import backend, layers
from keras_lipnext.lipschitz.composites import declared_composites
from keras_lipnext.lipschitz.model import measured, required_rule
from keras_lipnext.lipschitz.own_precision import types
from keras_lipnext.lipschitz.rounding import FACTORS, MOST_FACTORS, forward_errors, of_rows
from keras_lipnext.lipschitz.rules.axis_maps import AXIS_MAPS
from keras_lipnext.lipschitz.rules.base import Context, size
from keras_lipnext.lipschitz.rules.layers import check_convolution
from keras_lipnext.norms.roundoff import PROGRAMS, ROUNDING, UP_STEP, SumTooLong

ARITHMETICS = ("real", *PROGRAMS)


def program_arithmetic(name, certifiable):
    """The `Arithmetic` of the program that a certificate is to hold of, None for "real".

    Raises:
        ValueError: for a name that is none of `ARITHMETICS`; for "float32" if a setting or device
            lets float32 be less, or the model computes in something else.
    """
    if name not in ARITHMETICS:
        raise ValueError(
            f"`arithmetic` must be one of {', '.join(ARITHMETICS)}. Received: arithmetic={name!r}"
        )
    if name == "float32":
        _check_float32(certifiable)
    if name not in PROGRAMS:
        return None
    program, graph = PROGRAMS[name], certifiable.graph
    # What vanishes of a weight that factors were multiplied into, from both sides, is as small as
    # it is beside the weight: so many times larger beside what the sum reads and is multiplied by.
    vanishing = 2 * _most_in_a_row(graph, lambda operation: _exponent(operation, name))
    return dataclasses.replace(
        program,
        factors=_most_in_a_row(graph, _rounds),
        underflow=program.underflow * 2.0 ** min(vanishing, 1023),
    )


def _check_float32(certifiable):
    """ValueError unless `model.predict` computes in float32, or more, here and now."""
    if reason := backend.reduced_float32():
        raise ValueError(f"No float32 program can be certified in this process: {reason}.")
    given = {keras.config.floatx(), certifiable.graph.input_dtype}
    if "float" not in certifiable.graph.input_dtype:
        raise ValueError(
            f"The model takes inputs of {certifiable.graph.input_dtype}: its program cuts off the "
            "fractions of all others in the ball, and has no radius as a float32 program. Build "
            "it with an input of float32."
        )
    found = [("Its input", given)]
    found += [(step.title, types(step)) for step in certifiable.graph.steps]
    for title, names in found:
        if less := sorted(n for n in names if "float16" in n or "float8" in n):
            raise ValueError(
                f"The model is no float32 program: {title} computes in {less[0]}, whose rounding "
                'is too coarse to certify. arithmetic="float64" certifies the function that its '
                "stored weights define."
            )
    if declared := declared_composites(certifiable.graph):
        raise ValueError(
            f"Layer '{declared[0].name}' cannot be certified as part of a float32 program: that it "
            "computes what its `certified_parts` do, one after the other, is declared, and what "
            "float32 does to it not known."
        )
    if _most_in_a_row(certifiable.graph, _multiplies) > MOST_FACTORS:
        raise ValueError(
            f"The model multiplies by more than {MOST_FACTORS} factors in a row, which compilers "
            "may multiply with one another first: no float32 program of it can be certified."
        )
    for step in certifiable.steps:
        if not required_rule(step).proven:
            raise ValueError(
                f"{step.title} cannot be certified as a float32 program: its rule is declared, and "
                "what float32 does to it not known."
            )


_FACTORS = re.compile(
    "Rescaling|Normalization|BatchNormalization|Multiply|Divide|TrueDivide|Mean"
    r"|Average|(Global|)AveragePooling\dD|Scale|Householder"
)


def inner(operation):
    """What a wrapper such as `TimeDistributed` wraps."""
    while isinstance(operation, keras.layers.Wrapper):
        operation = operation.layer
    return operation


def _multiplies(operation):
    """Whether by factors, as means do."""
    operation = inner(operation)
    return type(operation) in AXIS_MAPS or bool(_FACTORS.fullmatch(type(operation).__name__))


def _factors(operation):
    """The factors of a layer that tells, else NaN."""
    operation = inner(operation)
    if isinstance(operation, keras.layers.Rescaling):
        return np.asarray(operation.scale, "float64")
    if isinstance(operation, layers.Scale):
        return np.asarray(keras.ops.convert_to_numpy(operation.factor), "float64")
    if re.fullmatch(r"AveragePooling\dD", type(operation).__name__):
        return np.float64(math.prod(operation.pool_size))
    return np.float64(math.nan)


def _rounds(operation):
    """Whether by factors other than powers of two, of layers that tell."""
    if not _multiplies(operation):
        return False
    return not np.isin(np.frexp(_factors(operation))[0], [-0.5, 0.0, 0.5]).all()


def _exponent(operation, name):
    """The largest |log2 c| of its factors c but 0, in a program of this type."""
    if not _multiplies(operation):
        return 0
    factors = np.abs(_factors(operation))
    factors = factors[factors != 0]
    most = np.abs(np.log2(factors)).max(initial=0)
    return most if np.isfinite(most) else FACTORS[name]


def _most_in_a_row(graph, count):
    """The largest sum of what layers count that have no weighted sum between them."""
    counts = {0: 0}
    for step in graph.steps:
        before = max(counts[i] for i in step.inputs)
        mine = count(step.operation)
        if not mine and hasattr(inner(step.operation), "kernel"):
            before = 0
        counts.update(dict.fromkeys(step.outputs, before + mine))
    return max(counts.values())


class Program:
    """Bounds of a program of one model, for inputs of one size.

    Args:
        arithmetic: `Arithmetic` of the program.
        certifiable: `Certifiable`.
        shapes: {index of a value: its shape}.
        estimated: Function of a step and a `Bound` whose offset was not stated: one with an
            estimate.
    """

    def __init__(self, arithmetic, certifiable, shapes, estimated):
        self._arithmetic, self._body = arithmetic, certifiable.body
        self._shares = len(certifiable.shares)
        self._entries = size(shapes[0][1:])
        bounds, _ = measured(certifiable.body, shapes, arithmetic=arithmetic)
        self._bounds = [
            tuple(estimated(step, part) for part in parts)
            for step, parts in zip(certifiable.body.steps, bounds)
        ]
        if head := certifiable.head:
            context = Context(head, shapes)
            context.arithmetic = arithmetic
            kernel = context.matrix(head.operation.kernel)
            if len(head.operation.kernel.shape) > 2:  # 1 x 1
                check_convolution(context)
            try:
                arithmetic.products(len(kernel))
            except SumTooLong as error:
                context.check_program(str(error))
                raise
        homogeneous = [
            tuple(dataclasses.replace(part, offset=0.0, absolute=0.0) for part in parts)
            for parts in self._bounds
        ]
        one = np.ones(1)
        self._slopes = forward_errors(self._body, homogeneous, one, arithmetic.unit * one)

    def errors(self, norms, predictions, compared, values=None):
        """(b, a): what is added to z_i - z_j of the predicted class i, and how fast it grows.

        Args:
            norms: Upper bounds of the norms of the inputs, shape (samples,).
            predictions: Predicted classes, shape (rows,): of each sample in turn, as many.
            compared: `Compared`, the logits.
            values: {index of a value: upper bounds of its norms, shape (samples,)}; None if they
                are to follow from the inputs'.

        Returns:
            b_ij for i as predicted, shape (rows, classes); a_ij, shape (classes, classes).
        """
        state = self._state(norms, values)[self._body.output]
        state = [of_rows(v, len(predictions)) for v in state]
        slopes = self._slopes[self._body.output]
        own = self._own(compared, *state)
        rates = self._own(compared, *slopes, constant=0.0)
        mine = own[np.arange(len(own)), predictions]
        distances = compared.distances
        constant = distances[predictions] * state[1][:, None] + own + mine[:, None]
        return constant * UP_STEP, (distances * slopes[1] + rates + rates.T) * UP_STEP

    def within_range(self, norms, radii, compared, values=None):
        """Whether nothing can overflow on balls of these radii, shape (samples,)."""
        if values is not None:
            values = {i: v + self._slopes[i][0] * radii for i, v in values.items()}
        state = self._state(norms + radii, values)[self._body.output]
        # Without a head nothing else looks at what the body may have lost.
        finite = np.isfinite(state[1])
        largest = np.where(finite, self._own(compared, *state).max(axis=1), np.inf)
        # Between several softmaxes differences are at most 1; see `_own`.
        return np.isfinite(largest) & ((self._shares < 2) | (largest <= 0.25))

    def _state(self, norms, values):
        u = self._arithmetic
        given = u.unit * norms + u.smallest * math.sqrt(self._entries)
        given = np.where(norms <= u.limit, given, np.inf)
        return forward_errors(self._body, self._bounds, norms, given, values, u.limit)

    def _own(self, compared, r, d, constant=1.0):
        """What each logit's own dot product and shares may be off by, shape (rows, classes).

        Of features of norm r that are off by d; with `constant` 0, how fast that grows with them.

        A softmax behind the logits rounds z - max z relatively, and the shares, by less than 512 u
        each; log_softmax its differences. Of the shares of n classes the largest is at least 1/n,
        and differs from another by at least m / (2 n) if the logits do by m <= 1: where another
        softmax follows, what that may be off by counts 2 n times.
        """
        u, classes, kernel = self._arithmetic, len(compared.distances), compared.kernel
        norm = (r + d)[:, None]
        norms = 1.0  # without a linear head a logit's own rounding is in D
        if kernel is not None:
            norms = np.sqrt((kernel**2).sum(axis=0))
            norms = norms * (1 + (len(kernel) + 16) * ROUNDING) + 2.0**-500
        sizes = norms * norm + constant * compared.biases
        own = np.zeros((len(r), classes))
        if kernel is not None:
            own = own + sum(u.products(len(kernel))) * sizes
            own += u.underflow * len(kernel) * (1 + np.abs(kernel).max()) * (constant + norm)
            own[~((sizes <= u.limit**1.5) & (norm <= u.limit))] = np.inf  # it may overflow
        if self._shares:
            share = u.unit * (16 * sizes + constant * (512 + 8 * classes))
            own = own + share * sum((2.0 * classes) ** k for k in range(self._shares))
        return own
