import keras
from keras import ops

from keras_lipnext.certification.radius import certified_radii
from keras_lipnext.layers._channels import number


class CertifiedMetric(keras.metrics.Mean):
    """Weighted mean, over samples, of a quantity derived from the certified radius.

    The pairwise constants come from the model: `CertifiableModel.compile` binds its metrics.
    They are nominal (training) constants, computed in float32: a figure to watch, not a
    certificate; `keras_lipnext.certify` proves. Subclasses define `values(radii, correct)`, the
    quantity averaged, shape (batch,).
    """

    def __init__(self, name, dtype=None):
        super().__init__(name=name, dtype=dtype)
        self._distances = None

    def bind(self, distances):
        """Sets the function that returns `K ||w_i - w_j||`, shape (classes, classes)."""
        self._distances = distances
        return self

    def update_state(self, y_true, y_pred, sample_weight=None):
        if self._distances is None:
            raise ValueError(
                f"{type(self).__name__} needs the pairwise constants K ||w_i - w_j|| of the "
                "classification head. Compile it in a keras_lipnext.CertifiableModel, or call "
                "`metric.bind(function that returns them)`."
            )
        y_pred = ops.convert_to_tensor(y_pred, dtype=self.dtype)
        y_true = ops.convert_to_tensor(y_true)
        one_hot = len(y_true.shape) == 2 and y_true.shape[-1] == y_pred.shape[-1] > 1
        labels = ops.argmax(y_true, axis=-1) if one_hot else ops.reshape(y_true, (-1,))
        radii = certified_radii(y_pred, ops.cast(self._distances(), self.dtype))
        correct = ops.cast(labels, "int32") == ops.cast(ops.argmax(y_pred, axis=-1), "int32")
        super().update_state(self.values(radii, correct), sample_weight=sample_weight)


@keras.saving.register_keras_serializable("keras_lipnext")
class CertifiedAccuracy(CertifiedMetric):
    """Certified robust accuracy: share of samples classified correctly with radius > epsilon.

    Args:
        epsilon: Non-negative float, l2 radius in units of the inputs.
        name: Defaults to "certified_accuracy".
        dtype: As for any Keras metric.
    """

    def __init__(self, epsilon, name="certified_accuracy", dtype=None):
        if not number("epsilon", epsilon) >= 0:
            raise ValueError(f"`epsilon` must not be negative. Received: epsilon={epsilon!r}")
        super().__init__(name=name, dtype=dtype)
        self.epsilon = epsilon

    def values(self, radii, correct):
        return ops.cast(correct & (radii > self.epsilon), self.dtype)

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("keras_lipnext")
class CertifiedRadius(CertifiedMetric):
    """Mean certified radius, counting 0 for samples that are misclassified.

    Args:
        name: Defaults to "certified_radius".
        dtype: As for any Keras metric.
    """

    def __init__(self, name="certified_radius", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def values(self, radii, correct):
        return ops.where(correct, radii, 0)
