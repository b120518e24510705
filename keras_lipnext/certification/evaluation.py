"""What `certify` computes of one batch: predictions, radii, and what rounding can have done.

The body is evaluated and bounded once for a batch; from its output follows each `Decision`.
"""

import contextlib
import dataclasses

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.batches import check_batch, check_numbers
from keras_lipnext.certification.comparison import own_answer
from keras_lipnext.certification.decisions import decisions_of
from keras_lipnext.lipschitz.composites import check_composites, probes
from keras_lipnext.lipschitz.model import (
    ask_rules,
    bound_of,
    by_method,
    check_same_shape,
    measured,
)
from keras_lipnext.lipschitz.own_precision import as_certified, margins_apart, own_allowances
from keras_lipnext.lipschitz.program import Program, program_arithmetic
from keras_lipnext.lipschitz.rounding import (
    forward_errors,
    head_allowances,
    input_norms,
    logit_allowances,
    of_rows,
)
from keras_lipnext.lipschitz.rules.base import Bound, size
from keras_lipnext.norms.roundoff import EVALUATION, UP_STEP, gamma
from keras_lipnext.radius import certified_radii_float64, pair_constants
from keras_lipnext.report.provenance import Evidence, policies
from keras_lipnext.twin import Float64Twin


class Evaluation:
    """Predictions, radii and error allowances of batches of one model.

    Args:
        certifiable: `Certifiable`.
        logits: How many it has.
        verbose: 1 for a progress bar over the layers.
        arithmetic, task: As for `certify`.

    Attributes:
        bound: `LipschitzBound` for the inputs seen; where sizes differ, the largest.
        weights_hash: Hash of the model before its weights were read.
    """

    def __init__(self, certifiable, logits, verbose=0, arithmetic="real", task="multiclass"):
        backend.check_compiler()
        self._arithmetic = program_arithmetic(arithmetic, certifiable)
        unclear = ask_rules(certifiable.body)
        check_composites(certifiable.graph)
        self._certifiable = certifiable
        self._verbose = verbose
        try:
            self.weights_hash = certifiable.graph.digest()
            # In float64 norms that follow from the inputs' are enough.
            self._twin = Float64Twin(certifiable, norms=arithmetic == "float32")
        except Exception as error:
            raise next(iter(unclear), error) from error
        self._by_size = {}
        self._padded = None
        self._labels = task == "multilabel"
        self._decisions = decisions_of(certifiable, logits, task)
        self._found = {}
        self._pair_constants = np.inf
        self._local_radii = None
        self.bound = None

    def use(self, method, model):
        """Takes the constants that a `Method` proves, not the product of the layers'."""
        *constants, self._pair_constants = method.function(model)
        self._found = by_method(method, self._certifiable, *constants)
        if method.local:
            self._local_radii = method.local(model)

    def walk(self, model, batches, total, answers, read_labels):
        """Yields (inputs, labels, what is found of them, the model's own answers) batch by batch.

        The model's own answers to the first batch are compared with those in float64.

        Args:
            model: The model.
            batches, total: Of `numpy_batches`.
            answers: Whether the model's own answers are needed; else they are None.
            read_labels: Function of a batch's labels, where it has some.
        """
        graph = self._certifiable.graph
        progress = keras.utils.Progbar(total, unit_name="batch") if self._verbose else None
        batches = (batch for batch in batches if len(batch[0]))
        for index, (inputs, labels) in enumerate(batches):
            check_batch(inputs, labels, graph.input_shape)
            labels = None if labels is None else read_labels(labels)
            self._padded = self._padded or graph.input_shape[0] or len(inputs)
            check_numbers(inputs, graph.input_dtype)
            found = self(inputs, self._padded)
            own = self.own_answers(model, inputs) if answers or index == 0 else None
            if index == 0:
                self.compare(model, inputs, own)
            yield inputs, labels, found, own if answers else None
            if progress:
                progress.update(index + 1)
        if self._padded is None:
            raise ValueError("There is nothing to certify: the data set yielded no batch.")

    def evidence(self, model):
        """`Evidence`, once all is evaluated; ValueError if the model is another one by then."""
        evidence = Evidence.of(model, self._certifiable, self.bound)
        if evidence.weights_hash != self.weights_hash:
            raise ValueError(
                "The model was changed while it was certified, as by training in another thread: "
                "certify a copy, or when it is done."
            )
        return evidence

    def __call__(self, inputs, padded):
        """(predictions, radii, allowances of the deciding class), as `as_decided` shapes them.

        A batch of fewer than `padded` samples is filled up: another size would be compiled anew.
        """
        inputs, found = self._evaluate(inputs, padded)
        with np.errstate(all="ignore"):
            decided = [self._decided(decision, inputs, found) for decision in self._decisions]
        predictions, radii, allowances = map(self.as_decided, zip(*decided))
        finite = self._finite(inputs)
        return np.where(finite, predictions, -1), np.where(finite, radii, 0.0), allowances

    def _evaluate(self, inputs, padded):
        """(inputs in float64, norms of all values or None); `_answer` holds what it answers."""
        inputs = np.asarray(inputs, "float64")
        self._padded = padded
        full = self._full(inputs)
        answer = self._twin(full)
        found = self._twin.norms  # of this call: the next may be of other samples
        if inputs.shape[1:] not in self._by_size:
            self._by_size[inputs.shape[1:]] = self._bounds(inputs.shape, self._twin.shapes(inputs))
            self._check_independence(full, answer)
        self._answer = answer[: len(inputs)]
        self._deciding = []
        return inputs, found

    def _finite(self, inputs):
        """Which samples have finite inputs, in the shape of what is found of each.

        Some layers answer to NaN and infinity with numbers: TensorFlow's relu, tanh.
        """
        finite = np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)
        return finite.reshape(-1, *(1,) * (self._answer.ndim - 2 + self._labels))

    def as_decided(self, parts):
        """What was found of each decision's rows, as one array.

        Its shape is (samples,), or (samples, ...) for decisions at each position, and with the
        labels as last axis where they are independent.
        """
        shape = self._answer.shape[:-1] + ((len(parts),) if self._labels else ())
        return np.stack(parts, axis=-1).reshape(shape)

    def _decided(self, decision, inputs, found):
        """(predictions, radii, allowances of the deciding class) of a decision's rows."""
        bound, bounds, program = self._by_size[inputs.shape[1:]]
        compared, logits = decision.compared, decision.rows(self._answer)
        errors = self.allowances(inputs, logits, bounds, decision)
        distances = pair_constants(bound.body_constant, compared.distances, self._pair_constants)
        rates = 0.0
        if program:
            norms, known = input_norms(inputs), self._norms(inputs, bounds, found)
            constant, rates = program.errors(norms, logits.argmax(axis=-1), compared, known)
            errors = (errors + constant) * UP_STEP
            distances = np.where(distances > 0, (distances + rates) * UP_STEP, 0.0)
        predictions, radii, deciding = certified_radii_float64(logits, distances, errors)
        candidates = [radii]
        if self._local_radii:
            local = self._local_radii(inputs, logits, errors, predictions, radii, rates)
            candidates.append(local)
        if program:
            candidates = [np.minimum(c, self._arithmetic.limit**0.5) for c in candidates]
            # Of all the positions of a sample, or of none: on the largest of their balls.
            balls = [c.reshape(len(inputs), -1).max(axis=1, initial=0.0) for c in candidates]
            within = [program.within_range(norms, ball, compared, known) for ball in balls]
            candidates = [np.where(of_rows(w, len(c)), c, 0.0) for w, c in zip(within, candidates)]
        self._deciding.append(deciding)
        return predictions, np.maximum.reduce(candidates), errors[np.arange(len(errors)), deciding]

    def _full(self, inputs):
        """The batch filled up to the size that was compiled."""
        missing = self._padded - len(inputs) if len(inputs) else 0
        if missing <= 0:
            return inputs
        return np.concatenate([inputs, np.repeat(inputs[:1], missing, axis=0)])

    def own_answers(self, model, inputs):
        """The model's own answers to a batch, in its own precision."""
        wide = "float64" in policies(self._certifiable)
        scope = backend.float64_scope() if wide else contextlib.nullcontext()
        with scope, np.errstate(all="ignore"):  # beyond float32 its answer is infinite
            return own_answer(model, self._full(inputs))[: len(inputs)]

    def compare(self, model, inputs, own):
        """Its `own_answers` must give the margins of the batch just evaluated, but for rounding.

        And those of a batch made to tell layers apart, which the user's may not. A net under
        everything else: it would catch a layer that computes something else than its rule and its
        copy in float64 do.
        """
        self._compare(inputs, self._answer, own)
        made = probes(inputs.shape, self._certifiable.graph.input_dtype)
        answer = self._twin(self._full(np.asarray(made, "float64")))
        self._compare(made, answer, self.own_answers(model, made))

    def _compare(self, inputs, answer, own):
        inputs, answer = np.asarray(inputs, "float64"), answer[: len(inputs)]
        with np.errstate(all="ignore"):
            apart = [
                margins_apart(*self._known(inputs), inputs, d.rows(answer), d.rows(own), d.compared)
                for d in self._decisions
            ]
        if any(found.any() for found in apart):
            raise ValueError(
                "The model's own predictions are not those of its evaluation in float64, by far "
                "more than rounding explains: a layer does something that its configuration does "
                "not show. Build and load the model anew; if that does not help, report it."
            )

    def kept(self, own, predictions):
        """Which of its `own_answers` to the batch just evaluated are finite, and decide so."""
        given = predictions.reshape(-1, len(self._decisions)).T
        rows = (decision.rows(own) for decision in self._decisions)
        return self.as_decided([as_certified(*pair) for pair in zip(rows, given)])

    def own_allowances(self, inputs):
        """What its own precision can do to the margins that decide, of the batch just evaluated."""
        inputs = np.asarray(inputs, "float64")
        with np.errstate(all="ignore"):
            found = [
                own_allowances(*self._known(inputs), inputs, d.rows(self._answer), d.compared)
                for d in self._decisions
            ]
        return self.as_decided(
            [f[np.arange(len(f)), deciding] for f, deciding in zip(found, self._deciding)]
        )

    def _known(self, inputs):
        """(the model, the bounds of its steps, shapes) for inputs of this size."""
        return self._certifiable, self._by_size[inputs.shape[1:]][1], self._twin.shapes(inputs)

    def _norms(self, inputs, bounds, found):
        """{index of a value: upper bounds of its exact norms}, of the computed ones; or None."""
        if found is None:
            return None
        state = forward_errors(self._certifiable.body, bounds, input_norms(inputs))
        return {i: (found[i][: len(inputs)] + state[i][1]) * UP_STEP for i in state}

    def allowances(self, inputs, logits, bounds=None, decision=None):
        """E_ij of the predicted class i of each row of logits, shape (rows, classes)."""
        body, compared = self._certifiable.body, (decision or self._decisions[0]).compared
        bounds = self._by_size[inputs.shape[1:]][1] if bounds is None else bounds
        # Beyond the limit squares overflow: what saturates behind makes a number of infinity again.
        norms, limit = input_norms(inputs), EVALUATION.limit
        state = forward_errors(body, bounds, norms, limit=limit)[body.output]
        r, d = (of_rows(v, len(logits)) for v in state)
        if compared.kernel is None:
            return logit_allowances(logits, d)
        return head_allowances(logits, compared, r, d)

    def _bounds(self, shape, shapes):
        """(`LipschitzBound`, the bounds of the steps) for inputs of this size."""
        steps = self._certifiable.body.steps
        for step in steps:
            for index, expected in zip(step.outputs, step.output_shapes):
                check_same_shape(step, expected, shapes[index])
        progress = keras.utils.Progbar(len(steps), unit_name="layer") if self._verbose else None
        bounds, joint = measured(self._certifiable.body, shapes, progress)
        bounds = [
            tuple(self._measured(step, part, shapes) for part in parts)
            for step, parts in zip(steps, bounds)
        ]
        bound = dataclasses.replace(bound_of(self._certifiable, bounds, joint), **self._found)
        if self.bound is None or bound.body_constant > self.bound.body_constant:
            self.bound = bound
        program = None
        if self._arithmetic:

            def estimated(step, part):
                return self._measured(step, part, shapes)

            program = Program(self._arithmetic, self._certifiable, shapes, estimated)
        return bound, bounds, program

    def _check_independence(self, full, logits):
        """No rule lets a proven layer mix samples; a declared one, or a fixed batch size, might."""
        fixed = self._certifiable.graph.input_shape[0] is not None
        if not (fixed or self.bound.declared) or len(full) < 2:
            return
        turned = np.roll(self._twin(np.roll(full, 1, axis=0)), -1, axis=0)
        scale = np.abs(logits).max(initial=0.0, where=np.isfinite(logits))
        if not np.allclose(turned, logits, rtol=1e-6, atol=1e-6 * scale, equal_nan=True):
            raise ValueError(
                "The model's answer to a sample depends on its place in the batch: no certificate "
                "speaks of that."
            )

    def _measured(self, step, part, shapes):
        """The bound with an estimate of offset and rounding, where only the constant was stated."""
        if part.offset is not None:
            return part
        offset = self._twin.at_zero(step, shapes) * (1 + 2.0**-20)
        entries = sum(size(shapes[i][1:]) for i in (*step.inputs, *step.outputs))
        relative = 16 * gamma(entries + 64)
        return Bound(part.constant, offset, relative * part.constant, relative * offset)
