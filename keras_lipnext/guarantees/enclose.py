"""`enclose`: intervals that contain a model's outputs under perturbations of bounded l2 norm.

An output z_k = w_k . f(x) + b_k of a K-Lipschitz body f changes by at most K ||w_k|| per unit of
distance, and without a linear head by K. It is read as the difference to an output that is always
0, so that what rounding may do to it is what `certify` knows of differences:

    |z_k(x') - computed z_k(x)| <= e_k + b_k + (K ||w_k|| + a_k) ||x' - x||.
"""

import warnings
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_lipnext.batches import numpy_batches
from keras_lipnext.certification.evaluation import Evaluation
from keras_lipnext.distribution import check_one_process
from keras_lipnext.guarantees.enclosure import Enclosure
from keras_lipnext.lipschitz.bounds import method_of
from keras_lipnext.lipschitz.model import read
from keras_lipnext.lipschitz.rounding import input_norms, of_rows
from keras_lipnext.norms.roundoff import UNDERFLOW, UP_STEP
from keras_lipnext.radius import pair_constants
from keras_lipnext.report.provenance import check_hash
from keras_lipnext.typing import LipschitzMethod


def enclose(
    model: keras.Model,
    x: Any,
    epsilon: npt.ArrayLike,
    batch_size: int = 256,
    verbose: int | str = "auto",
    expected_hash: str | None = None,
    lipschitz: LipschitzMethod = "product",
    arithmetic: str = "float64",
) -> Enclosure:
    """Encloses a model's outputs for all perturbations of l2 norm up to epsilon.

    For regressors, controllers, critics and whatever else answers with numbers. The constants are
    proven from the stored weights, an output by itself, and rounding is included, as in `certify`.

    Example:

    ```python
    enclosure = keras_lipnext.enclose(model, x, epsilon=0.1)
    print(enclosure)
    enclosure.lower, enclosure.upper
    enclosure.radius(lower=-1, upper=1)  # how far inputs may move before an output may leave them
    ```

    Args:
        model: Functional or Sequential Keras model of layers whose constant is known. It may end in
            activations, but not in softmax: its outputs are enclosed as they are.
        x: Inputs: an array, or a data set as `certify` takes it; labels are left out.
        epsilon: Float, or one a sample, shape (n,), in units of the inputs.
        batch_size, verbose, expected_hash, arithmetic: As for `certify`.
        lipschitz: As for `certify`; methods that bound the ball around each sample are refused.

    Returns:
        `Enclosure`.

    Raises:
        ValueError: as for `certify`; if the model ends in softmax, epsilon is negative or does not
            fit the samples.
        RuntimeError, ImportError: as for `certify`.

    Warns:
        UserWarning: with arithmetic="float32", if the model's own answer is not in its interval,
            which is infinite then.
    """
    epsilon = np.asarray(epsilon, "float64")
    if epsilon.ndim > 1 or not ((epsilon >= 0) & (epsilon < np.inf)).all():
        raise ValueError(
            "`epsilon` must be finite and not negative, one number or one a sample. Received: "
            f"epsilon={epsilon}"
        )
    method = method_of(lipschitz)
    if method is not None and method.local:
        raise ValueError(f"{method.title} bounds differences of logits, not outputs.")
    check_one_process(model)
    certifiable = read(model)
    if certifiable.shares:
        raise ValueError(
            f"The model ends in softmax ({certifiable.shares[0].title}): enclose the logits in "
            "front of it, a model without that layer."
        )
    shape = tuple(model.outputs[0].shape)
    if len(shape) < 2 or shape[-1] is None:
        raise ValueError(
            "The model must answer with outputs of shape (batch, ..., outputs). Received: "
            f"output_shape={shape}"
        )
    batches, total = numpy_batches(x, None, batch_size, certifiable.graph.input_shape)
    evaluation = Outputs(certifiable, shape[-1], verbose, arithmetic)
    check_hash(certifiable, expected_hash)
    if method is not None:
        evaluation.use(method, model)
    answers, start, contradicted = arithmetic == "float32", 0, 0
    parts = []
    for inputs, _, found, own in evaluation.walk(model, batches, total, answers, lambda y: None):
        outputs, allowances, known, rates, evaluated = found
        if parts and outputs.shape[1:] != parts[0][0].shape[1:]:
            raise ValueError(
                "All outputs of an enclosure are of one shape: enclose inputs of each size by "
                f"themselves. Received: {outputs.shape} beside {parts[0][0].shape}"
            )
        balls = epsilon if epsilon.ndim == 0 else epsilon[start : start + len(inputs)]
        if epsilon.ndim and len(balls) != len(inputs):
            raise _mismatch(epsilon, start + len(inputs))
        start += len(inputs)
        balls = np.broadcast_to(balls, (len(inputs),))
        reach = evaluation.reach(balls, known, evaluated)
        each = balls.reshape(-1, *(1,) * (outputs.ndim - 1))
        with np.errstate(all="ignore"):
            most = (allowances + rates * each) * UP_STEP + UNDERFLOW
            lower, upper = (np.nextafter(outputs + sign * most, sign * np.inf) for sign in (-1, 1))
            holds = (reach >= each) & np.isfinite(lower) & np.isfinite(upper)
            if answers:
                kept = (lower <= own) & (own <= upper)
                contradicted += int((holds & ~kept).sum())
                holds &= kept
        lower, upper = np.where(holds, lower, -np.inf), np.where(holds, upper, np.inf)
        parts.append((outputs, lower, upper, balls, allowances, np.where(holds, reach, -1.0)))
    if epsilon.ndim and len(epsilon) != start:
        raise _mismatch(epsilon, start)
    evidence = evaluation.evidence(model)
    if contradicted:
        warnings.warn(
            f"The model's own answers to {contradicted} values are not in their intervals, which "
            "are infinite for that: something on this machine is not as "
            "docs/explanation/soundness.md takes for granted. Rely on none of them, and report it.",
            stacklevel=2,
        )
    outputs, lower, upper, balls, allowances, reach = map(np.concatenate, zip(*parts))
    return Enclosure(
        outputs=outputs,
        lower=lower,
        upper=upper,
        epsilon=balls,
        constants=evaluation.constants,
        allowances=allowances,
        reach=reach,
        evidence=evidence,
        arithmetic=arithmetic,
    )


class Outputs(Evaluation):
    """Each output of a model by itself, with what it may be off by and how fast that grows.

    Attributes:
        constants: Of each output, the largest of all sizes of inputs, shape (outputs,).
    """

    def __init__(self, certifiable, outputs, verbose=0, arithmetic="real"):
        super().__init__(certifiable, outputs, verbose, arithmetic, task="multilabel")
        self.constants = np.zeros(outputs)

    def __call__(self, inputs, padded):
        """(outputs, allowances, which are finite, constants, what `reach` takes) of a batch."""
        inputs, found = self._evaluate(inputs, padded)
        with np.errstate(all="ignore"):
            allowances, constants = zip(
                *(self._bounded(decision, inputs, found) for decision in self._decisions)
            )
        constants = np.array(constants)
        self.constants = np.maximum(self.constants, constants)
        allowances = self.as_decided(allowances)
        # Beyond 2^1000 sums may overflow: such outputs count as infinite.
        known = (np.abs(self._answer) < 2.0**1000) & np.isfinite(allowances) & self._finite(inputs)
        return self._answer, allowances, known, constants, (inputs, found)

    def _bounded(self, decision, inputs, found):
        """(allowances of each row, constant) of one output."""
        bound, bounds, program = self._by_size[inputs.shape[1:]]
        compared, pairs = decision.compared, decision.rows(self._answer)
        rows, larger = np.arange(len(pairs)), pairs.argmax(axis=-1)
        allowances = self.allowances(inputs, pairs, bounds, decision)[rows, 1 - larger]
        # The whole model's constant holds of each output, too.
        constant = pair_constants(bound.body_constant, compared.distances[0, 1], bound.constant)
        if program:
            norms, values = input_norms(inputs), self._norms(inputs, bounds, found)
            errors, rates = program.errors(norms, larger, compared, values)
            allowances = (allowances + errors[rows, 1 - larger]) * UP_STEP
            constant = (constant + rates[0, 1]) * UP_STEP
        return allowances, constant

    def reach(self, balls, known, evaluated):
        """Radii up to which nothing overflows, of those of `balls` and the largest there is."""
        inputs, found = evaluated
        _, bounds, program = self._by_size[inputs.shape[1:]]
        if program is None:
            return np.where(known, np.inf, -1.0)
        norms, values = input_norms(inputs), self._norms(inputs, bounds, found)
        largest = np.full(len(inputs), self._arithmetic.limit**0.5)
        parts = []
        for decision in self._decisions:
            reach = np.full(len(inputs), -1.0)
            for radius in (balls, largest):
                with np.errstate(all="ignore"):
                    within = program.within_range(norms, radius, decision.compared, values)
                reach = np.where(within & (radius <= largest), np.maximum(reach, radius), reach)
            parts.append(of_rows(reach, known.size // known.shape[-1]))
        return np.where(known, self.as_decided(parts), -1.0)


def _mismatch(epsilon, samples):
    return ValueError(
        f"`epsilon` is one number or one a sample. Received: {len(epsilon)} of them for {samples} "
        "samples or more"
    )
