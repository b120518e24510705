from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import number
from keras_lipnext.losses.labels import read_members
from keras_lipnext.typing import Config, Tensor


@keras.saving.register_keras_serializable("keras_lipnext")
class KantorovichRubinstein(keras.losses.Loss):
    """Difference of means, whose largest value over 1-Lipschitz f is the Wasserstein-1 distance.

        loss = -( mean of f over the class - mean of f over all others )

    for the one output f of a critic, and the mean of that over the outputs of several classes, each
    against all others. A class that a batch lacks, or has alone, has no such difference and counts
    0. Of a 1-Lipschitz model its negative estimates W1, up to the batch's noise.

    Example:

    ```python
    inputs = keras.Input((8,))
    critic = keras.Model(inputs, keras_lipnext.layers.OrthogonalDense(1)(inputs))
    critic.compile("adam", loss=keras_lipnext.losses.KantorovichRubinstein())
    ```

    Args:
        name, reduction, dtype: As for any Keras loss. Each sample's loss is weighted so that their
            mean, the default reduction, is the formula.

    Call arguments:
        y_true: Of one output: 1, and 0 or -1, shape (batch,) or (batch, 1). Of several: integers,
            shape (batch,) or (batch, 1), or probabilities, shape (batch, classes), whose most
            probable class counts. Of other labels the loss is NaN.
        y_pred: Shape (batch, 1) or (batch, classes).

    Reference:
        Serrurier et al. 2021, arXiv 2006.06520; Bethune et al. 2022, arXiv 2104.05097.
    """

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        y_pred = _with_outputs(y_pred)
        return -differences(read_members(y_true, y_pred), y_pred)


@keras.saving.register_keras_serializable("keras_lipnext")
class HKR(keras.losses.Loss):
    """Hinge loss and Kantorovich-Rubinstein loss, for classifiers and distance fields.

        loss = alpha * hinge - ( mean of f over the class - mean of f over all others )

    With one output and s = 1 or -1 by the label, `hinge = max(0, min_margin - s f)`. With several,
    of label y, it is `max(0, min_margin - f_y)` and the mean over the others of
    `max(0, min_margin + f_k)`. The second term is that of `KantorovichRubinstein`.

    Example:

    ```python
    model = keras.Sequential([keras.Input((8,)), keras_lipnext.layers.OrthogonalDense(1)])
    model.compile("adam", loss=keras_lipnext.losses.HKR(alpha=10, min_margin=0.5))
    ```

    Args:
        alpha: Float, 0 or more, the hinge's weight.
        min_margin: Positive float, in units of the outputs.
        name, reduction, dtype: As for any Keras loss.

    Call arguments:
        y_true, y_pred: As for `KantorovichRubinstein`.

    Reference:
        Serrurier et al. 2021, arXiv 2006.06520; Bethune et al. 2022, arXiv 2104.05097.
    """

    def __init__(self, alpha: float = 10.0, min_margin: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= number("alpha", alpha) < float("inf"):
            raise ValueError(f"`alpha` must be 0 or more, and finite. Received: alpha={alpha!r}")
        if not 0 < number("min_margin", min_margin) < float("inf"):
            raise ValueError(
                f"`min_margin` must be positive and finite. Received: min_margin={min_margin!r}"
            )
        self.alpha = alpha
        self.min_margin = min_margin

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        y_pred = _with_outputs(y_pred)
        members = read_members(y_true, y_pred)
        missing = ops.relu(self.min_margin - (2 * members - 1) * y_pred)
        own = ops.sum(members * missing, axis=-1)
        others = ops.sum((1 - members) * missing, axis=-1) / max(1, y_pred.shape[-1] - 1)
        return self.alpha * (own + others) - differences(members, y_pred)

    def get_config(self) -> Config:
        return {**super().get_config(), "alpha": self.alpha, "min_margin": self.min_margin}


def differences(members: Tensor, y_pred: Tensor) -> Tensor:
    """Each sample's part in the difference of means, shape (batch,): their mean is the whole."""
    # Counted, in float32 at least: a mean of ones may be rounded to something else than 1.
    dtype = "float64" if keras.backend.standardize_dtype(y_pred.dtype) == "float64" else "float32"
    members, y_pred = ops.cast(members, dtype), ops.cast(y_pred, dtype)
    own = ops.sum(members, axis=0, keepdims=True)
    others = ops.sum(1 - members, axis=0, keepdims=True)
    both = (own > 0) & (others > 0)
    # Where there is no difference nothing is divided by 0, in the gradient neither.
    own, others = (ops.where(both, count, 1) for count in (own, others))
    weights = (own + others) * (members / own - (1 - members) / others)
    return ops.mean(ops.where(both, weights, 0 * members) * y_pred, axis=-1)


def _with_outputs(y_pred: Tensor) -> Tensor:
    if len(y_pred.shape) > 2:
        raise ValueError(
            "Outputs have shape (batch,), (batch, 1) or (batch, classes). Received: y_pred of "
            f"shape {tuple(y_pred.shape)}"
        )
    return ops.reshape(y_pred, (-1, 1)) if len(y_pred.shape) == 1 else y_pred
