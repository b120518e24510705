from typing import Any

import keras
from keras import ops

from keras_lipnext.typing import DType, Tensor


@keras.saving.register_keras_serializable("keras_lipnext")
class WassersteinEstimate(keras.metrics.Metric):
    """Difference of a critic's means over two samples: a Wasserstein-1 distance, as far as learned.

    mean of f where the label is 1, less that where it is 0 or -1, over the epoch; 0 while one of
    the two has not been seen. For a 1-Lipschitz critic it is at most the distance of the samples,
    but for rounding: a figure to watch. `keras_lipnext.guarantees.wasserstein` proves a bound.

    Example:

    ```python
    inputs = keras.Input((8,))
    critic = keras.Model(inputs, keras_lipnext.layers.OrthogonalDense(1)(inputs))
    metric = keras_lipnext.metrics.WassersteinEstimate()
    critic.compile("adam", keras_lipnext.losses.KantorovichRubinstein(), metrics=[metric])
    ```

    Args:
        name: Defaults to "wasserstein_estimate".
        dtype: As for any Keras metric.

    Raises:
        ValueError: if the model has several outputs.

    Reference:
        Serrurier et al. 2021, arXiv 2006.06520.
    """

    def __init__(self, name: str = "wasserstein_estimate", dtype: DType = None) -> None:
        super().__init__(name=name, dtype=dtype)
        zeros = {"initializer": "zeros", "dtype": self.dtype}
        # Of the labels that are not 1, and of those that are.
        self._sums = self.add_variable((2,), name="sums", **zeros)
        self._counts = self.add_variable((2,), name="counts", **zeros)

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> None:
        """Adds a batch.

        Args:
            y_true: 1, and 0 or -1, shape (batch,) or (batch, 1).
            y_pred: The critic's answers, shape (batch,) or (batch, 1).
            sample_weight: Shape (batch,) or (batch, 1), or None.
        """
        shape = tuple(y_pred.shape)
        if len(shape) > 2 or (len(shape) == 2 and shape[-1] != 1):
            raise ValueError(
                f"A Wasserstein estimate is of one output, (batch, 1). Received: y_pred of {shape}"
            )
        values, labels = (ops.reshape(a, (-1,)) for a in (y_pred, y_true))
        first = ops.cast(ops.cast(labels, self.dtype) > 0, self.dtype)
        weights = ops.stack([1 - first, first])
        if sample_weight is not None:
            weights = weights * ops.cast(ops.reshape(sample_weight, (-1,)), self.dtype)
        self._sums.assign_add(ops.sum(weights * ops.cast(values, self.dtype), axis=-1))
        self._counts.assign_add(ops.sum(weights, axis=-1))

    def result(self) -> Any:
        """The difference of means so far, a scalar."""
        sums, counts = ops.convert_to_tensor(self._sums), ops.convert_to_tensor(self._counts)
        means = sums / ops.where(counts > 0, counts, 1)
        return ops.where(ops.all(counts > 0), means[1] - means[0], 0)
