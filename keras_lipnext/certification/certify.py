"""`certify`: predictions, proven radii and certified robust accuracy of a model on data."""

import contextlib

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.certification.batches import check_numbers, class_labels, numpy_batches
from keras_lipnext.certification.evidence import (
    Evidence,
    Extremes,
    check_hash,
    low_precision,
    policies,
)
from keras_lipnext.certification.float64 import Float64Twin
from keras_lipnext.certification.lipschitz import (
    bound_of,
    check_same_shape,
    read,
    required_rule,
    step_bounds,
)
from keras_lipnext.certification.norms import gamma
from keras_lipnext.certification.radius import (
    certified_radii_float64,
    joint_norms_float64,
    pairwise_distances_float64,
)
from keras_lipnext.certification.report import Certificate
from keras_lipnext.certification.rounding import (
    forward_errors,
    head_allowances,
    input_norms,
    logit_allowances,
)
from keras_lipnext.certification.rules import Bound, Context, size

# The customary radii for colour images in [0, 1].
EPSILONS = (36 / 255, 72 / 255, 108 / 255)


def certify(
    model, x, y=None, epsilons=EPSILONS, batch_size=256, verbose="auto", expected_hash=None
):
    """Certifies a classifier's predictions against perturbations of bounded l2 norm.

    The Lipschitz constant K is an upper bound proven from the stored weights; logits are evaluated
    in float64, and what rounding can have done to their differences, E, is subtracted. The radius
    of a sample predicted as class i is

        min_{j != i} max(0, z_i - z_j - E_ij) / (K ||w_i - w_j||)

    for a linear head with weight vectors w, and `min_j (z_i - z_j - E_ij) / (sqrt(2) K)` without
    one, where K covers the logits. Ties and non-finite logits have radius 0. Inputs are taken as
    real numbers, whatever the dtype of the model's input. A model that computes in bfloat16 or
    float16 is certified from its stored weights, and the samples on which its own low-precision
    prediction differs are counted.

    Args:
        model: Functional or Sequential Keras model that ends in logits, built of layers whose
            Lipschitz constant is known (`certification.lipschitz_rule` adds to them). Softmax at
            its end is left out: it keeps the order of the logits.
        x: Inputs: an array; or a data set that yields `inputs` or `(inputs, labels)` batches
            (tf.data.Dataset, torch DataLoader, keras PyDataset, iterable).
        y: Labels for an array `x`, integers or one-hot. None certifies predictions only.
        epsilons: Radii for which to report certified robust accuracy, in units of the inputs.
        batch_size: Samples evaluated at once, for arrays.
        verbose: 0 for silence, "auto" or 1 for progress bars.
        expected_hash: Hash (`Certificate.evidence.weights_hash`) that the model must have.

    Returns:
        `Certificate`.

    Raises:
        ValueError: for a layer that has no known constant (naming it), weights that are not
            finite, inputs or labels that do not fit the model, negative epsilons, a model of
            another hash than expected.
    """
    epsilons = tuple(float(e) for e in np.atleast_1d(epsilons))
    if not all(0 <= e < np.inf for e in epsilons):
        raise ValueError(f"`epsilons` must be finite and not negative. Received: {epsilons}")
    batches, total = numpy_batches(x, y, batch_size)
    certifiable = read(model)
    check_hash(certifiable, expected_hash)
    classes = model.output_shape[-1]
    if len(model.output_shape) != 2 or classes is None or classes < 2:
        raise ValueError(
            "The model must answer with logits of shape (batch, classes), two classes at least. "
            f"Received: output_shape={model.output_shape}"
        )
    evaluation = _Evaluation(certifiable, classes, verbose)
    own_precision = low_precision(certifiable)
    progress = keras.utils.Progbar(total, unit_name="batch") if verbose else None
    predictions, radii, allowances, labels = [], [], [], []
    differing, extremes, padded = 0, Extremes(), 0
    for index, (inputs, batch_labels) in enumerate(batches):
        if batch_labels is not None:
            if len(batch_labels) != len(inputs):
                raise ValueError(
                    f"A batch has {len(inputs)} inputs and {len(batch_labels)} labels."
                )
            labels.append(class_labels(batch_labels, classes))
        padded = padded or len(inputs)
        check_numbers(inputs, certifiable.graph.input_dtype)
        found = evaluation(inputs, padded)
        if index == 0 and not own_precision:
            evaluation.compare(model, inputs)
        for results, part in zip((predictions, radii, allowances), found):
            results.append(part)
        extremes.update(inputs, found[0], found[1], labels[-1] if labels else None)
        if own_precision:
            own = keras.ops.convert_to_numpy(model.predict_on_batch(inputs))
            differing += int((own.argmax(axis=-1) != found[0]).sum())
        if progress:
            progress.update(index + 1)
    if not predictions:
        raise ValueError("There is nothing to certify: the data set yielded no batch.")
    if labels and len(labels) != len(predictions):
        raise ValueError("Some batches of the data set had labels and some had none.")
    bound = evaluation.bound
    return Certificate(
        predictions=np.concatenate(predictions),
        radii=np.concatenate(radii),
        labels=np.concatenate(labels) if labels else None,
        epsilons=epsilons,
        lipschitz_bound=bound.constant,
        error_allowances=np.concatenate(allowances),
        low_precision_differences=differing if own_precision else None,
        evidence=Evidence.of(model, certifiable, bound),
        extremes=extremes.found(),
        input_range=extremes.input_range,
    )


class _Evaluation:
    """Predictions, radii and error allowances of batches of one model.

    Attributes:
        bound: `LipschitzBound` for the inputs seen; where sizes differ, the largest.
    """

    def __init__(self, certifiable, classes, verbose=0):
        for step in certifiable.body.steps:
            required_rule(step)
            known = all(None not in shape[1:] for shape in step.input_shapes)
            if known and not isinstance(step.operation, keras.layers.Layer):
                step_bounds(step, Context(step))  # says why it refuses before a backend fails
        self._certifiable = certifiable
        self._verbose = verbose
        self._twin = Float64Twin(certifiable)
        self._by_size = {}
        self._kernel = None
        self.bound = None
        head = certifiable.head
        if head is None:
            self._pairs = np.full((classes, classes), 2.0**0.5 * (1 + 2.0**-52))
        else:
            self._kernel = Context(head).array(head.operation.kernel)
            self._pairs = pairwise_distances_float64(self._kernel)
            self._joint = joint_norms_float64(self._kernel)

    def __call__(self, inputs, padded):
        """(predictions, radii, allowances of the deciding class), shape (samples,) each.

        A batch of fewer than `padded` samples is filled up: another size would be compiled anew.
        """
        inputs = np.asarray(inputs, "float64")
        count = len(inputs)
        full = inputs
        if 0 < count < padded:
            full = np.concatenate([inputs, np.repeat(inputs[:1], padded - count, axis=0)])
        logits = self._twin(full)
        if inputs.shape[1:] not in self._by_size:
            self._by_size[inputs.shape[1:]] = self._bounds(inputs.shape, self._twin.shapes(inputs))
            self._check_independence(full, logits)
        bound, bounds = self._by_size[inputs.shape[1:]]
        self._logits = logits = logits[:count]
        with np.errstate(all="ignore"):
            errors = self.allowances(inputs, logits, bounds)
            distances = bound.constant * self._pairs * (1 + 2.0**-52)
            # A product that underflows is rounded in units that are no longer relative.
            distances = np.where(self._pairs > 0, np.maximum(distances, 2.0**-1000), 0.0)
            predictions, radii, deciding = certified_radii_float64(logits, distances, errors)
        return predictions, radii, errors[np.arange(count), deciding]

    def compare(self, model, inputs):
        """The model itself must give the margins of the batch just evaluated, but for rounding.

        A net under everything else: it would catch a layer that computes something else than its
        rule and its copy in float64 do.
        """
        wide = "float64" in policies(self._certifiable)
        scope = backend.float64_scope() if wide else contextlib.nullcontext()
        with np.errstate(all="ignore"), scope:  # beyond float32 its answer is infinite
            own = keras.ops.convert_to_numpy(model.predict_on_batch(inputs)).astype("float64")
            if self._certifiable.notes and (own >= 0).all():  # shares; others are their logarithms
                own = np.log(np.where(own > 1e-30, own, np.nan))
            inputs, logits = np.asarray(inputs, "float64"), self._logits
            top, rows = logits.argmax(axis=-1), np.arange(len(logits))
            margins, own_margins = (z[rows, top][:, None] - z for z in (logits, own))
            # Float32 rounds 2^29 times as coarsely as float64; accelerators may use TF32.
            slack = 2.0**33 if backend.on_cpu() else 2.0**46
            allowed = slack * self.allowances(inputs, logits) + 1e-6 * np.abs(logits).max()
            if self._certifiable.notes:  # shares near 1/2 lose what small logits differ by
                allowed = allowed + 1e-4 * (1 + np.abs(margins))
            off = np.abs(margins - own_margins) > allowed
        if (off & np.isfinite(own_margins) & np.isfinite(margins)).any():
            raise ValueError(
                "The model's own predictions are not those of its evaluation in float64, by far "
                "more than rounding explains: a layer does something that its configuration does "
                "not show. Build and load the model anew; if that does not help, report it."
            )

    def allowances(self, inputs, logits, bounds=None):
        """E_ij of each sample's predicted class i, shape (samples, classes)."""
        body = self._certifiable.body
        bounds = self._by_size[inputs.shape[1:]][1] if bounds is None else bounds
        r, d = forward_errors(body, bounds, input_norms(inputs))[body.output]
        if self._kernel is None:
            return logit_allowances(logits, d)
        return head_allowances(logits, self._kernel, self._pairs, self._joint, r, d)

    def _bounds(self, shape, shapes):
        """(`LipschitzBound`, the bounds of the steps) for inputs of this size."""
        steps, bounds = self._certifiable.body.steps, []
        progress = keras.utils.Progbar(len(steps), unit_name="layer") if self._verbose else None
        for step in steps:
            for index, expected in zip(step.outputs, step.output_shapes):
                check_same_shape(step, expected, shapes[index])
            parts = step_bounds(step, Context(step, shapes))
            bounds.append(tuple(self._measured(step, part, shapes) for part in parts))
            if progress:
                progress.add(1)
        bound = bound_of(self._certifiable, bounds)
        if self.bound is None or bound.constant > self.bound.constant:
            self.bound = bound
        return bound, bounds

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
