"""`certify`: predictions, proven radii and certified robust accuracy of a model on data."""

import keras
import numpy as np

from keras_lipnext.certification.batches import class_labels, numpy_batches
from keras_lipnext.certification.float64 import Float64Twin
from keras_lipnext.certification.lipschitz import lipschitz_bound
from keras_lipnext.certification.radius import (
    certified_radii_float64,
    pairwise_distances_float64,
)
from keras_lipnext.certification.report import Certificate

# The customary radii for colour images in [0, 1].
EPSILONS = (36 / 255, 72 / 255, 108 / 255)


def certify(model, x, y=None, epsilons=EPSILONS, batch_size=256, verbose="auto"):
    """Certifies a classifier's predictions against perturbations of bounded l2 norm.

    The Lipschitz constant K is an upper bound proven from the stored weights; logits are evaluated
    in float64; the radius of a sample predicted as class i is

        min_{j != i} (z_i - z_j) / (K ||w_i - w_j||)

    for a linear head with weight vectors w, and `min_j (z_i - z_j) / (sqrt(2) K)` without one,
    where K covers the logits. Ties and non-finite logits have radius 0. Inputs are taken as real
    numbers, whatever the dtype of the model's input.

    Args:
        model: Functional or Sequential Keras model that ends in logits, built of layers whose
            Lipschitz constant is known (`certification.lipschitz_rule` adds to them).
        x: Inputs: an array; or a data set that yields `inputs` or `(inputs, labels)` batches
            (tf.data.Dataset, torch DataLoader, keras PyDataset, iterable).
        y: Labels for an array `x`, integers or one-hot. None certifies predictions only.
        epsilons: Radii for which to report certified robust accuracy, in units of the inputs.
        batch_size: Samples evaluated at once, for arrays.
        verbose: 0 for silence, "auto" or 1 for a progress bar.

    Returns:
        `Certificate`.

    Raises:
        ValueError: for a layer that has no known constant (naming it), weights that are not
            finite, inputs or labels that do not fit the model, negative epsilons.
    """
    epsilons = tuple(float(e) for e in np.atleast_1d(epsilons))
    if not all(0 <= e < np.inf for e in epsilons):
        raise ValueError(f"`epsilons` must be finite and not negative. Received: {epsilons}")
    batches, total = numpy_batches(x, y, batch_size)
    bound = lipschitz_bound(model)
    classes = model.output_shape[-1]
    if len(model.output_shape) != 2 or classes < 2:
        raise ValueError(
            "The model must answer with logits of shape (batch, classes), two classes at least. "
            f"Received: output_shape={model.output_shape}"
        )
    twin = Float64Twin(model)
    distances = _distances(bound, classes)
    progress = keras.utils.Progbar(total, unit_name="batch") if verbose else None
    predictions, radii, labels = [], [], []
    for index, (inputs, batch_labels) in enumerate(batches):
        batch_predictions, batch_radii = certified_radii_float64(twin(inputs), distances)
        predictions.append(batch_predictions)
        radii.append(batch_radii)
        if batch_labels is not None:
            if len(batch_labels) != len(inputs):
                raise ValueError(
                    f"A batch has {len(inputs)} inputs and {len(batch_labels)} labels."
                )
            labels.append(class_labels(batch_labels, classes))
        if progress:
            progress.update(index + 1)
    if not predictions:
        raise ValueError("There is nothing to certify: the data set yielded no batch.")
    if labels and len(labels) != len(predictions):
        raise ValueError("Some batches of the data set had labels and some had none.")
    return Certificate(
        predictions=np.concatenate(predictions),
        radii=np.concatenate(radii),
        labels=np.concatenate(labels) if labels else None,
        epsilons=epsilons,
        lipschitz_bound=bound.constant,
    )


def _distances(bound, classes):
    """K ||w_i - w_j||, rounded up."""
    if bound.head is None:
        distances = np.full((classes, classes), 2.0**0.5 * (1 + 2.0**-52))
    else:
        kernel = keras.ops.convert_to_numpy(bound.head.kernel)
        if not np.isfinite(np.asarray(kernel, "float64")).all():
            raise ValueError(f"Layer '{bound.head.name}' has weights that are NaN or infinite.")
        distances = pairwise_distances_float64(kernel)
    return bound.constant * distances * (1 + 2.0**-52)
