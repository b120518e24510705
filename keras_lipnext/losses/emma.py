from collections.abc import Callable
from typing import Any, Self

import keras
from keras import ops

from keras_lipnext.arguments import number
from keras_lipnext.losses.labels import read_classes
from keras_lipnext.radius import check_head, head_distances, of_one_head, unbound
from keras_lipnext.typing import Config, Tensor


class CertifiedLoss(keras.losses.Loss):
    """Cross-entropy of logits from which the certificate's margin has been taken.

    With label y, d_j = z_j - z_y and the pairwise constants D_j = K ||w_y - w_j|| of the head:

        loss = cross_entropy(temperature * (d_j + e_j * epsilon * D_j), y) / temperature

    Subclasses define `demanded_share(d, margin)`, which returns `e_j` in [0, 1], shape (batch, ...,
    classes), for the differences `d` and the margins `epsilon * D_j`.

    The constants come from the model: `CertifiableModel.compile` binds the loss to its head. In
    other models call `loss.bind(head)` before `compile`, with `head` the model's
    `NormalizedDense` layer.

    `epsilon` is reached by a linear ramp from `start` over the first `ramp` share of the training,
    of which `CertifiableModel.fit` keeps count; elsewhere, and in evaluation, it is constant.

    Labels are integers, shape (batch,) or (batch, 1), or probabilities, shape (batch, classes):
    one-hot, smoothed or mixed. With probabilities p, y is the most probable class and the
    cross-entropy is taken against p. Of an integer outside the classes the loss is NaN;
    `CertifiableModel` refuses it before a step is taken.

    Of dense outputs, logits of shape (batch, ..., classes), each position is a sample: its labels
    have shape (batch, ...), (batch, ..., 1) or (batch, ..., classes). Sample weights are of
    samples, shape (batch,), or of positions, (batch, ...).
    """

    def __init__(
        self,
        epsilon: float,
        temperature: float = 1.0,
        ramp: float = 0.5,
        start: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("epsilon", epsilon), ("temperature", temperature), ("start", start)):
            if not 0 < number(name, value) < float("inf"):
                raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}")
        if not 0 <= number("ramp", ramp) <= 1:
            raise ValueError(f"`ramp` must be in [0, 1]. Received: ramp={ramp!r}")
        self.epsilon = epsilon
        self.temperature = temperature
        self.ramp = ramp
        self.start = start
        self._head = None
        self._distances: Callable[[], Tensor] | None = None
        self._progress: Callable[[], Tensor] | None = None

    def bind(
        self,
        head: keras.layers.Layer,
        lipschitz_constant: float = 1.0,
        progress: Callable[[], Tensor] | None = None,
    ) -> Self:
        """Takes the pairwise constants from `head`, read anew at each call.

        The binding is not saved: in a model that is no `CertifiableModel`, bind again after
        loading, `model.loss.bind(model.head)`.

        Args:
            head: Layer whose `kernel`, shape (d, classes), makes the logits; built when the loss is
                first called.
            lipschitz_constant: Nominal Lipschitz constant K of what comes before the head.
            progress: Function that returns the share of the training done, a scalar in [0, 1].
        """
        if getattr(head, "built", True):  # else it is looked at when its kernel is read
            check_head(head)
        self._head = of_one_head(self, self._head, head)
        self._distances = lambda: head_distances(head, lipschitz_constant)
        self._progress = progress
        return self

    def current_epsilon(self) -> float | Tensor:
        """The margin radius demanded now: a float or, while a ramp runs, a scalar tensor."""
        if self._progress is None or self.ramp == 0:
            return self.epsilon
        start = min(self.start, self.epsilon)
        done = ops.minimum(ops.cast(self._progress(), self.dtype) / self.ramp, 1.0)
        return start + (self.epsilon - start) * done

    def demanded_share(self, d: Tensor, margin: Tensor) -> Tensor:
        """The share `e_j` of each margin that is demanded, in [0, 1], shape (batch, ..., classes).

        Args:
            d: Differences of logits, z_j - z_y, shape (batch, ..., classes).
            margin: epsilon * D_j, of the same shape.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `demanded_share(d, margin)`: see CertifiedLoss."
        )

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        if sample_weight is not None:
            sample_weight = ops.convert_to_tensor(sample_weight)
            missing = len(y_pred.shape) - 1 - len(sample_weight.shape)
            if missing > 0:  # of images: Keras would take them for weights of the last positions
                shape = (*ops.shape(sample_weight), *[1] * missing)
                sample_weight = ops.reshape(sample_weight, shape)
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        if self._distances is None:
            raise unbound(self, "loss.bind(head)")
        classes = y_pred.shape[-1]
        labels, probabilities = read_classes(y_true, y_pred)
        labelled = ops.one_hot(labels, classes, dtype=y_pred.dtype)
        d = y_pred - ops.sum(labelled * y_pred, axis=-1, keepdims=True)
        constants = ops.cast(self._distances(), y_pred.dtype)
        margin = self.current_epsilon() * ops.take(constants, labels, axis=0)
        logits = self.temperature * (d + self.demanded_share(d, margin) * margin)
        losses = keras.losses.categorical_crossentropy(probabilities, logits, from_logits=True)
        return losses / self.temperature

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "epsilon": self.epsilon,
            "temperature": self.temperature,
            "ramp": self.ramp,
            "start": self.start,
        }


@keras.saving.register_keras_serializable("keras_lipnext")
class EMMA(CertifiedLoss):
    """Efficient margin maximisation: demands only as much margin as a sample can nearly afford.

    With label y, d_j = z_j - z_y and the pairwise constants D_j = K ||w_y - w_j|| of the head:

        e_j  = clip(-d_j / (epsilon * D_j), 0.01, 1)          (no gradient through e_j)
        loss = cross_entropy(temperature * (d_j + e_j * epsilon * D_j), y) / temperature

    Example:

    ```python
    model.compile("adam", loss=keras_lipnext.losses.EMMA(epsilon=36 / 255))
    ```

    Args:
        epsilon: Positive float, the largest l2 radius for which margin is demanded.
        temperature: Positive float. 1 is the published loss; the logits of a 1-Lipschitz network
            on small or low-contrast images are small, and a larger value sharpens them.
        ramp: Share of the training over which epsilon rises linearly from `start`; 0 for a
            constant epsilon. See `CertifiedLoss` for who keeps count.
        start: Positive float, epsilon at the beginning of the ramp (at most `epsilon`).
        name, reduction, dtype: As for any Keras loss.

    Call arguments:
        y_true: Integers, shape (batch,) or (batch, 1), or probabilities, shape (batch, classes).
            With probabilities p (label smoothing, MixUp, CutMix), y is the most probable class
            and the cross-entropy is taken against p.
        y_pred: Logits, shape (batch, classes); (batch, ..., classes) of dense outputs, whose labels
            have shape (batch, ...), (batch, ..., 1) or (batch, ..., classes).

    Raises:
        ValueError: if called unbound, see `bind`.

    Reference:
        Hu et al. 2023, arXiv 2301.12549 and 2310.02513.
    """

    def demanded_share(self, d: Tensor, margin: Tensor) -> Tensor:
        positive = margin > 0
        share = ops.clip(-d / ops.where(positive, margin, 1), 0.01, 1)
        return ops.stop_gradient(ops.where(positive, share, 1))


@keras.saving.register_keras_serializable("keras_lipnext")
class CertifiedCrossEntropy(CertifiedLoss):
    """Cross-entropy of the worst logits within radius epsilon: `e_j = 1` in `EMMA`'s formula.

    The plain certified loss, for comparison. Arguments and labels as in `EMMA`.

    Example:

    ```python
    loss = keras_lipnext.losses.CertifiedCrossEntropy(epsilon=0.25, temperature=8)
    model.compile("adam", loss=loss)
    ```
    """

    def demanded_share(self, d: Tensor, margin: Tensor) -> Tensor:
        return ops.ones_like(margin)
