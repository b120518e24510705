from collections.abc import Callable
from typing import Self

import keras
from keras import ops

from keras_lipnext.arguments import are_shares, number
from keras_lipnext.radius import certified_radii, check_head, head_distances, of_one_head, unbound
from keras_lipnext.typing import Config, DType, Tensor


class CertifiedMetric(keras.metrics.Mean):
    """Weighted mean, over samples, of a quantity derived from the certified radius.

    Of dense outputs, logits of shape (batch, ..., classes), each position is a sample.

    The pairwise constants come from the model: `CertifiableModel.compile` binds copies of its
    metrics, so that models can share them, and keeps their constants those of the weights that
    made the predictions. In other models call `metric.bind(head)` before `compile`, with `head` the
    model's `NormalizedDense` layer; the constants are then those of the head when the metric was
    last reset, which Keras does when an epoch or an evaluation begins.

    They are computed in float32: a figure to watch, not a certificate; `keras_lipnext.certify`
    proves. Subclasses define `values(radii, correct)`, the quantity averaged, shape (batch, ...),
    and return their arguments in `get_config`.
    """

    def __init__(self, name: str, dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self._head = None
        self._constants: Callable[[], Tensor] | None = None

    def bind(
        self, head: keras.layers.Layer, lipschitz_constant: float | Callable[[], float] = 1.0
    ) -> Self:
        """Takes the pairwise constants from `head`.

        The binding is not saved: in a model that is no `CertifiableModel`, bind again after
        loading.

        Args:
            head: Built layer whose `kernel`, shape (d, classes), makes the logits.
            lipschitz_constant: Lipschitz constant K of what comes before the head, or a function
                that returns it, called whenever the constants are read.
        """
        check_head(head)
        self._head = of_one_head(self, self._head, head)
        classes = head.kernel.shape[1]
        if self._constants is None:
            # Where all constants are 0 nothing is certified. "mean" reads one value from equal
            # replicas under tf.distribute.
            self._distances = self.add_variable(
                (classes, classes), "zeros", aggregation="mean", name="distances"
            )
        constant = (
            lipschitz_constant if callable(lipschitz_constant) else lambda: lipschitz_constant
        )
        self._constants = lambda: head_distances(head, constant())
        self.read_constants()
        return self

    def read_constants(self) -> None:
        """Takes the pairwise constants of the weights as they are now."""
        if self._constants is not None:
            distances = ops.stop_gradient(self._constants())
            self._distances.assign(ops.cast(distances, self._distances.dtype))

    def values(self, radii: Tensor, correct: Tensor) -> Tensor:
        """The quantity that is averaged, shape (batch, ...).

        Args:
            radii: Certified radii, shape (batch, ...).
            correct: Booleans, shape (batch, ...), whether the prediction is right.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `values(radii, correct)`: see CertifiedMetric."
        )

    def reset_state(self) -> None:
        super().reset_state()
        self.read_constants()

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> None:
        self._check_bound()
        y_pred = ops.convert_to_tensor(y_pred, dtype=self.dtype)
        y_true = ops.convert_to_tensor(y_true)
        shares = are_shares(y_true.shape, y_pred.shape[-1], len(y_pred.shape))
        positions = ops.shape(y_pred)[:-1]
        labels = ops.argmax(y_true, axis=-1) if shares else ops.reshape(y_true, positions)
        radii = certified_radii(y_pred, ops.cast(self._distances, self.dtype))
        correct = ops.cast(labels, "int32") == ops.cast(ops.argmax(y_pred, axis=-1), "int32")
        super().update_state(self.values(radii, correct), sample_weight=sample_weight)

    def result(self) -> Tensor:
        self._check_bound()
        return super().result()

    def _check_bound(self) -> None:
        if self._constants is None:
            raise unbound(self, "metric.bind(head)")


@keras.saving.register_keras_serializable("keras_lipnext")
class CertifiedAccuracy(CertifiedMetric):
    """Certified robust accuracy: share of samples classified correctly with radius > epsilon.

    Example:

    ```python
    metric = keras_lipnext.metrics.CertifiedAccuracy(0.25)
    model.compile("adam", loss=keras_lipnext.losses.EMMA(0.25), metrics=["accuracy", metric])
    ```

    Args:
        epsilon: Non-negative float, l2 radius in units of the inputs.
        name: Defaults to "certified_accuracy".
        dtype: As for any Keras metric.
    """

    def __init__(
        self, epsilon: float, name: str = "certified_accuracy", dtype: DType = None
    ) -> None:
        if not number("epsilon", epsilon) >= 0:
            raise ValueError(f"`epsilon` must not be negative. Received: epsilon={epsilon!r}")
        super().__init__(name=name, dtype=dtype)
        self.epsilon = epsilon

    def values(self, radii: Tensor, correct: Tensor) -> Tensor:
        return ops.cast(correct & (radii > self.epsilon), self.dtype)

    def get_config(self) -> Config:
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("keras_lipnext")
class CertifiedRadius(CertifiedMetric):
    """Mean certified radius, counting 0 for samples that are misclassified.

    Example:

    ```python
    metric = keras_lipnext.metrics.CertifiedRadius()
    model.compile("adam", loss=keras_lipnext.losses.EMMA(0.25), metrics=[metric])
    ```

    Args:
        name: Defaults to "certified_radius".
        dtype: As for any Keras metric.
    """

    def __init__(self, name: str = "certified_radius", dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def values(self, radii: Tensor, correct: Tensor) -> Tensor:
        return ops.where(correct, radii, 0)
