import math

import keras

from keras_lipnext.layers._channels import number, positive_integer


class DivergenceError(RuntimeError):
    """The loss has left all bounds; the weights are spoilt, the last checkpoint is not."""


class StopOnDivergence(keras.callbacks.Callback):
    """Stops training by an error when the loss is not finite or has leapt.

    Of the losses l of the batches two moving averages run, a fast and a slow one. Training stops
    when the fast one is above `factor` times the slow one, or a loss is not finite:

        fast <- fast + (l - fast) / window,       slow <- slow + (l - slow) / (10 * window)

    It ends with an error, not quietly: Keras would otherwise take a checkpoint of the spoilt
    weights when the epoch ends, and delete `BackupAndRestore`'s backups. Stand it before callbacks
    that take checkpoints.

    Example:

    ```python
    callbacks = [
        keras_lipnext.callbacks.StopOnDivergence(),
        keras_lipnext.callbacks.BackupAndRestore("runs/backup"),
    ]
    model.fit(dataset, epochs=90, callbacks=callbacks)
    ```

    Args:
        factor: Number above 1.
        window: Positive integer, batches over which the fast average runs.

    Raises:
        DivergenceError: out of `fit`.
    """

    def __init__(self, factor=3.0, window=20):
        super().__init__()
        if not number("factor", factor) > 1:
            raise ValueError(f"`factor` must be above 1. Received: factor={factor!r}")
        self.factor = factor
        self.window = positive_integer("window", window)
        self._count = 0
        self._fast = self._slow = None

    def on_train_begin(self, logs=None):
        self._fast = self._slow = None

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._count, self._sum = epoch, 0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        mean = float(logs["loss"])
        # Keras logs the mean over the epoch's batches so far: their sum grows by this one's loss.
        total = mean * (batch + 1)
        loss = (total - self._sum) / (batch + 1 - self._count)
        self._sum, self._count = total, batch + 1
        if not math.isfinite(mean):
            self._stop(batch, f"the loss is {mean}")
        if self._fast is None:
            self._fast = self._slow = loss
        self._fast += (loss - self._fast) / self.window
        self._slow += (loss - self._slow) / (10 * self.window)
        if self._fast > self.factor * self._slow > 0:
            self._stop(
                batch, f"the loss rose from about {self._slow:.4g} to {self._fast:.4g} of late"
            )

    def _stop(self, batch, reason):
        raise DivergenceError(
            f"Training stopped at epoch {self._epoch + 1}, batch {batch + 1}: {reason}. The "
            "weights now in memory are spoilt; the last checkpoint is kept. Continue from it with "
            "a lower learning rate, or look for what is wrong with the data."
        )
