"""`certify`: predictions, proven radii and certified robust accuracy of a model on data."""

import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_lipnext.batches import decision_labels, numpy_batches
from keras_lipnext.certification.decisions import check_task
from keras_lipnext.certification.evaluation import Evaluation
from keras_lipnext.distribution import check_one_process
from keras_lipnext.lipschitz.bounds import method_of
from keras_lipnext.lipschitz.model import read
from keras_lipnext.lipschitz.own_precision import low_precision
from keras_lipnext.report import text
from keras_lipnext.report.certificate import Certificate
from keras_lipnext.report.many import DenseCertificate, LabelsCertificate
from keras_lipnext.report.provenance import Extremes, check_hash
from keras_lipnext.typing import LipschitzMethod

# The customary radii for colour images in [0, 1].
EPSILONS = (36 / 255, 72 / 255, 108 / 255)


def certify(
    model: keras.Model,
    x: Any,
    y: npt.ArrayLike | None = None,
    epsilons: float | Sequence[float] = EPSILONS,
    batch_size: int = 256,
    verbose: int | str = "auto",
    expected_hash: str | None = None,
    lipschitz: LipschitzMethod = "product",
    arithmetic: str = "float64",
    task: str = "multiclass",
    ignore_class: int | None = None,
) -> Certificate:
    """Certifies a classifier's predictions against perturbations of bounded l2 norm.

    The Lipschitz constant K is an upper bound proven from the stored weights; logits are evaluated
    in float64, and what rounding can have done to their differences, E, is subtracted. The radius
    of a sample predicted as class i is

        min_{j != i} max(0, z_i - z_j - E_ij) / (K ||w_i - w_j||)

    for a linear head with weight vectors w, and `min_j (z_i - z_j - E_ij) / (sqrt(2) K)` without
    one, where K covers the logits. With `lipschitz` by matrix inequalities z_i - z_j has a constant
    of its own, proven likewise, that is taken where it is smaller. Ties have radius 0; inputs and
    logits that are NaN or infinite radius 0 and prediction -1, and are counted. Inputs are taken as
    real numbers, whatever the dtype of the model's input.

    A model that answers at each position, with logits of shape (batch, height, width, classes) or
    (batch, ..., classes), has a radius for each: no perturbation of the whole input that is below
    it changes the prediction there, and so all positions hold together whose radii are above its
    norm. One logit z, of a head of one vector w, predicts class 1 where z > 0, at the radius
    (|z| - E) / (K ||w||). With `task="multilabel"` each logit is a decision of its own like that.

    The radii hold of the function in real arithmetic and, by default, of every program that
    evaluates it in float64, with its sums in any order; with `arithmetic="float32"` of those in
    float32, as `model.predict` is one. What such a program can be off by at distance rho from the
    input is b_ij + a_ij rho: b_ij is subtracted above, a_ij added below. A model that computes in
    bfloat16 or float16 is certified from its stored weights, and the samples on which its own
    low-precision prediction differs are counted.

    Example:

    ```python
    certificate = keras_lipnext.certify(model, x, y, epsilons=(0.1, 0.25))
    print(certificate)
    certificate.radii, certificate.certified_accuracy[0.25]
    ```

    Args:
        model: Functional or Sequential Keras model that ends in logits, built of layers whose
            Lipschitz constant is known (`certification.lipschitz_rule` adds to them). Softmax at
            its end is left out: it keeps the order of the logits.
        x: Inputs: an array; or a data set that yields `inputs` or `(inputs, labels)` batches
            (tf.data.Dataset, torch DataLoader, keras PyDataset, iterable).
        y: Labels for an array `x`, integers or one-hot, of each position or label where there are
            several: (batch, height, width), (batch, labels). None certifies predictions only.
        epsilons: Radii for which to report certified robust accuracy, in units of the inputs.
        batch_size: Samples evaluated at once, for arrays.
        verbose: 0 for silence, "auto" or 1 for progress bars.
        expected_hash: Hash (`Certificate.evidence.weights_hash`) that the model must have.
        lipschitz: How to bound the constant K of the body, what is in front of the head: "product"
            of the layers' constants along the graph; or, for chains of Dense layers and activations
            of bounded slope, by matrix inequalities: a function, `keras_lipnext.lmi.lipsdp`,
            `eclipse`, `eclipse_diagonal` or `eclipse_fast`, or its name; or the `LipschitzResult`
            of one of them or of `lmi.project`, which is proven again from its multipliers. What is
            named is used, whether or not another method would give less. "local_lipschitz", or
            `keras_lipnext.lmi.local_lipschitz`, proves constants of the ball around each sample
            beside that of `eclipse_diagonal`, the `constant` of the certificate: the largest radii,
            at some hundredths of a second a sample for layers of 128, growing with their cube.
        arithmetic: "real": radii of the function in real arithmetic; "float64": of that and of
            every float64 program; "float32": of that and of every float32 program. Inputs are
            rounded to the program's type first. docs/explanation/soundness.md says what is taken
            for granted.
        task: What the last axis of the logits holds: "multiclass", the classes among which the
            largest decides (of one logit: whether it is above 0); "multilabel", independent labels,
            each of which is predicted where its logit is above 0. No shape tells them apart.
        ignore_class: Label of positions that count nowhere, such as -1 or 255; None counts all.

    Returns:
        `Certificate`: `certification.DenseCertificate` for a decision at each position, and
        `certification.LabelsCertificate` for independent labels.

    Raises:
        ValueError: for a layer that has no known constant or that the method does not cover
            (naming it), weights that are not finite, inputs or labels that do not fit the model,
            negative epsilons, a model of another hash than expected; with arithmetic="float32", for
            a setting or device that lets float32 products be less, a model that computes in less,
            or a layer of which it is not known what float32 does to it.
        RuntimeError: if the method's solver fails, or its bound cannot be proven in float64; if the
            model's weights lie on devices of several processes.
        ImportError: if the method's solver is not installed.

    Warns:
        UserWarning: once, if inputs leave [0, 1]: radii and epsilons are in their units; with
            arithmetic="float32", if the model's own answer to a sample that was certified is not
            finite or of another class, which has radius 0 then.
    """
    epsilons = tuple(float(e) for e in np.atleast_1d(epsilons))
    if not all(0 <= e < np.inf for e in epsilons):
        raise ValueError(f"`epsilons` must be finite and not negative. Received: {epsilons}")
    method = method_of(lipschitz)
    check_one_process(model)
    certifiable = read(model)
    batches, total = numpy_batches(x, y, batch_size, certifiable.graph.input_shape)
    check_task(task, model, certifiable)
    output_shape = tuple(model.outputs[0].shape)
    many = len(output_shape) > 2 or task == "multilabel"
    if method is not None and (many or output_shape[-1] == 1):
        raise ValueError(
            f"{method.title} bounds models that answer with the logits of several classes, once a "
            f"sample. Received: output_shape={output_shape}, task={task!r}: certify it by "
            "lipschitz='product'."
        )
    whole = isinstance(ignore_class, numbers.Integral) and not isinstance(ignore_class, bool)
    if ignore_class is not None and not whole:
        raise ValueError(f"`ignore_class` is a whole number. Received: {ignore_class!r}")
    if ignore_class is not None and (len(output_shape) == 2 or task == "multilabel"):
        raise ValueError(
            "`ignore_class` is for the positions of a dense prediction. Received: "
            f"ignore_class={ignore_class!r} for output_shape={output_shape}, task={task!r}"
        )
    evaluation = Evaluation(certifiable, output_shape[-1], verbose, arithmetic, task)
    check_hash(certifiable, expected_hash)
    if method is not None:
        evaluation.use(method, model)
    own_precision = low_precision(certifiable)
    predictions, radii, allowances, own_allowances, labels = [], [], [], [], []
    differing, contradicted, extremes = 0, 0, Extremes()
    # Answers of the program that is certified, or is counted: no radius where they are others.
    answers = own_precision or arithmetic == "float32"

    def read_labels(given: Any) -> np.ndarray:
        return decision_labels(given, output_shape, task, ignore_class)

    walk = evaluation.walk(model, batches, total, answers, read_labels)
    for inputs, batch_labels, found, own in walk:
        if batch_labels is not None:
            labels.append(batch_labels)
        shape = found[0].shape
        for known in [*predictions[:1], *labels[-1:]]:
            if known.shape[1:] != shape[1:]:
                raise ValueError(
                    "All predictions of a certificate, and their labels, are of one shape: certify "
                    f"images of each size by themselves. Received: predictions of shape {shape} "
                    f"beside {known.shape}"
                )
        if answers:
            kept = evaluation.kept(own, found[0])
            differing += int((~kept).sum())
            if arithmetic == "float32":
                contradicted += int((found[1][~kept] > 0).sum())
                found = found[0], np.where(kept, found[1], 0.0), found[2]
        for results, part in zip((predictions, radii, allowances), found):
            results.append(part)
        extremes.update(inputs, found[0], found[1], labels[-1] if labels else None)
        if own_precision:
            own_allowances.append(evaluation.own_allowances(inputs))
    if labels and len(labels) != len(predictions):
        raise ValueError("Some batches of the data set had labels and some had none.")
    bound = evaluation.bound
    evidence = evaluation.evidence(model)
    if message := text.range_warning(extremes.input_range, epsilons):
        warnings.warn(message, stacklevel=2)
    if contradicted:
        warnings.warn(text.contradicted_warning(contradicted), stacklevel=2)
    if labels and ignore_class is not None and all((y == ignore_class).all() for y in labels):
        raise ValueError(f"All labels are ignore_class={ignore_class!r}: none is left to count.")
    kind: type[Certificate] = Certificate
    more: dict[str, Any] = {}
    if task == "multilabel":
        kind = LabelsCertificate
    elif many:
        kind, more = DenseCertificate, {"ignore_class": ignore_class}
    return kind(
        **more,
        predictions=np.concatenate(predictions),
        radii=np.concatenate(radii),
        labels=np.concatenate(labels) if labels else None,
        epsilons=epsilons,
        constant=bound.constant,
        body_constant=bound.body_constant,
        error_allowances=np.concatenate(allowances),
        low_precision_differences=differing if own_precision else None,
        low_precision_allowances=np.concatenate(own_allowances) if own_precision else None,
        evidence=evidence,
        extremes=extremes.found(),
        input_range=extremes.input_range,
        inputs_not_finite=extremes.not_finite,
        arithmetic=arithmetic,
    )
