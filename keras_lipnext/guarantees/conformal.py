"""Conformal prediction sets that keep their coverage under perturbations of bounded l2 norm.

The score of class y is s(x, y) = max_{j != y} z_j - z_y. Calibrated on n exchangeable samples its
quantile q gives P(s(X, Y) <= q) >= 1 - alpha. For an input x' within epsilon of x

    s(x, y) >= max_{j != y} z_j(x') - z_y(x') - K ||w_j - w_y|| epsilon,

so that all y for which the right side is at most q contain the true class as often, whatever was
done to x. [Massena et al. 2025, arXiv 2506.05434, of whose text only the idea was at hand: the
score of margins and its pairwise constants are ours.]
"""

import dataclasses
import fractions
import math
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_lipnext.arguments import number
from keras_lipnext.batches import class_labels
from keras_lipnext.certification.decisions import decisions_of
from keras_lipnext.guarantees.enclose import enclose
from keras_lipnext.lipschitz.model import read
from keras_lipnext.norms.roundoff import UP_STEP
from keras_lipnext.radius import pair_constants


@dataclasses.dataclass(frozen=True)
class ConformalPredictor:
    """A calibrated model. `sets` answers with prediction sets.

    Attributes:
        model: The model.
        alpha: Share of samples whose set may miss the true class.
        threshold: The scores' quantile q, rounded up; infinite for too few samples.
        samples: How many it was calibrated on.
        weights_hash: The model's, when it was calibrated.
    """

    model: keras.Model
    alpha: float
    threshold: float
    samples: int
    weights_hash: str

    def sets(self, x: Any, epsilon: float = 0.0, batch_size: int = 256) -> np.ndarray:
        """Prediction sets of inputs that may be perturbed by up to epsilon.

        P(the true class is in the set) >= 1 - alpha, over calibration and test samples together, if
        the samples before the perturbation are exchangeable with those of the calibration.

        Args:
            x: Inputs as they are seen: an array or data set, as `certify` takes it.
            epsilon: Float, the largest l2 norm of a perturbation.
            batch_size: Samples evaluated at once, for arrays.

        Returns:
            Booleans, shape (n, classes): which classes are in each set. All of them where an input
            or logit is not finite.

        Raises:
            ValueError: if the model was changed since, or `epsilon` is negative or not finite.
        """
        if not 0 <= number("epsilon", epsilon) < math.inf:
            raise ValueError(f"`epsilon` must be finite and not negative. Received: {epsilon!r}")
        found = _enclosed(self.model, x, batch_size, self.weights_hash)
        (decision,) = decisions_of(read(self.model), found.outputs.shape[-1], "multiclass")
        constants = pair_constants(found.evidence.bound.body_constant, decision.compared.distances)
        changes = constants * epsilon * UP_STEP
        scores = np.full(found.outputs.shape, -np.inf)
        for y in range(scores.shape[-1]):
            # From below: of the rounding of z_j - z_y each interval knows its part.
            least = np.nextafter(found.lower - found.upper[:, [y]], -np.inf) - changes[y]
            least = np.nextafter(least, -np.inf)
            scores[:, y] = np.delete(least, y, axis=1).max(axis=1)
        scores[found.reach.min(axis=1) < 0] = -np.inf
        return scores <= self.threshold


def conformal(
    model: keras.Model,
    x: Any,
    y: npt.ArrayLike,
    alpha: float = 0.1,
    batch_size: int = 256,
    expected_hash: str | None = None,
) -> ConformalPredictor:
    """Calibrates a classifier for prediction sets that hold under perturbations.

    Example:

    ```python
    predictor = keras_lipnext.guarantees.conformal(model, x_val, y_val, alpha=0.1)
    sets = predictor.sets(x_test, epsilon=0.1)
    sets.sum(axis=-1)  # the size of each set
    ```

    Args:
        model: Classifier that `certify` accepts, without softmax at its end.
        x, y: Samples that the model was not trained on, and their labels, integers or one-hot:
            arrays. They must not be perturbed.
        alpha: Share of samples whose set may miss the true class, in (0, 1).
        batch_size, expected_hash: As for `certify`.

    Returns:
        `ConformalPredictor`.

    Raises:
        ValueError: as for `enclose`; if `alpha` is not in (0, 1), labels do not fit, or the model
            answers with less than two logits.
    """
    if not 0 < number("alpha", alpha) < 1:
        raise ValueError(f"`alpha` must be in (0, 1). Received: alpha={alpha!r}")
    read(model)  # refuses what has no outputs that can be known
    shape = tuple(model.outputs[0].shape)
    if len(shape) != 2 or shape[-1] is None or shape[-1] < 2:
        raise ValueError(
            "Prediction sets are of models that answer with the logits of two classes or more, "
            f"shape (batch, classes). Received: output_shape={shape}"
        )
    found = _enclosed(model, x, batch_size, expected_hash)
    labels, rows = class_labels(y, shape[-1]), np.arange(len(found.outputs))
    if len(labels) != len(rows):
        raise ValueError(f"Received {len(rows)} inputs and {len(labels)} labels: they must match.")
    others = found.upper.copy()
    others[rows, labels] = -np.inf
    # From above, so that the threshold is no smaller than the exact scores' quantile.
    scores = np.nextafter(others.max(axis=1) - found.lower[rows, labels], np.inf)
    rank = math.ceil((len(rows) + 1) * (1 - fractions.Fraction(float(alpha))))
    threshold = np.sort(scores)[rank - 1] if rank <= len(rows) else np.inf
    return ConformalPredictor(
        model, alpha, float(threshold), len(rows), found.evidence.weights_hash
    )


def _enclosed(model, x, batch_size, expected_hash):
    """The logits with what rounding may have done to them."""
    return enclose(
        model, x, 0.0, batch_size, verbose=0, expected_hash=expected_hash, arithmetic="real"
    )
