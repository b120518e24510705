import math
import statistics

import keras

from keras_lipnext.arguments import number, positive_integer
from keras_lipnext.typing import Logs


class DivergenceError(RuntimeError):
    """Loss or weights have left all bounds: the weights are spoilt, the last checkpoint is not."""


def check_finite(model):
    """Raises if a weight is not finite, so that no checkpoint is taken of it.

    A step can spoil the weights after its own loss was still finite; and a loss can stay finite
    with such weights, where TensorFlow's relu makes 0 of NaN.

    Raises:
        DivergenceError: naming the weight.
    """
    for variable in model.weights:
        if not keras.ops.all(keras.ops.isfinite(variable)):
            raise DivergenceError(
                f"{variable.path} is not finite at the end of the epoch: no checkpoint of it was "
                f"taken. {ADVICE}"
            )


ADVICE = (
    "The weights now in memory are spoilt; the last checkpoint is kept. Continue from it with a "
    "lower learning rate, or look for what is wrong with the data."
)


class StopOnDivergence(keras.callbacks.Callback):
    """Stops training by an error when the loss or a weight is not finite, or the loss has leapt.

    The median of the last `window` batches' losses is compared with a low, which follows it down at
    once, and up slowly:

        low <- min(median, low + (median - low) / (10 * window))

    Training stops when a loss is not finite, or the median is above `factor * low` and above
    `floor`. A single bad batch moves no median, and a ramp of the loss's own epsilon takes the low
    along. A leap is seen within `window` batches: a checkpoint taken in between is spoilt, too,
    which matters where epochs are shorter than that. Not seen: a rise by less than `factor`, such
    as a collapse to chance, log(classes), of a loss that was not far below it; and losses below 0.
    When an epoch ends the weights must be finite, too: TensorFlow's relu makes 0 of NaN, and the
    loss of spoilt weights stays finite.

    It ends with an error, not quietly: Keras would otherwise take a checkpoint of the spoilt
    weights when the epoch ends, and delete `BackupAndRestore`'s backups. Stand it before callbacks
    that take checkpoints. Reading the loss, it waits for each step to be finished.

    Example:

    ```python
    callbacks = [
        keras_lipnext.callbacks.StopOnDivergence(),
        keras_lipnext.callbacks.BackupAndRestore("runs/backup"),
    ]
    model.fit(x, y, epochs=90, callbacks=callbacks)
    ```

    Args:
        factor: Number above 1.
        window: Positive integer, number of batches.
        floor: Number, in units of the loss: medians below it are never taken for divergence. The
            default suits cross-entropies.

    Raises:
        DivergenceError: out of `fit`.
    """

    def __init__(self, factor: float = 3.0, window: int = 20, floor: float = 0.5) -> None:
        super().__init__()
        if not number("factor", factor) > 1:
            raise ValueError(f"`factor` must be above 1. Received: factor={factor!r}")
        self.factor = factor
        self.window = positive_integer("window", window)
        self.floor = number("floor", floor)
        self._restart()

    def _restart(self):
        self._low = math.inf
        self._losses = []

    def on_train_begin(self, logs: Logs = None) -> None:
        self._restart()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._epoch, self._count, self._sum = epoch, 0, 0.0

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        mean = float(logs["loss"])  # type: ignore[index]
        if not math.isfinite(mean):
            self._stop(batch, f"the loss is {mean}")
        # Keras logs the mean over the epoch's batches so far: their sum grows by this one's loss.
        total = mean * (batch + 1)
        loss = (total - self._sum) / (batch + 1 - self._count)
        self._losses = [*self._losses, loss][-self.window :]
        self._sum, self._count = total, batch + 1
        if len(self._losses) < self.window:
            return
        median = statistics.median(self._losses)
        if math.isfinite(self._low):
            risen = self._low + (median - self._low) / (10 * self.window)
            self._low = min(median, risen)
        else:
            self._low = median
        if median > max(self.factor * self._low, self.floor) and self._low > 0:
            self._stop(batch, f"the loss rose from about {self._low:.4g} to {median:.4g} of late")

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        check_finite(self.model)

    def _stop(self, batch, reason):
        raise DivergenceError(
            f"Training stopped at epoch {self._epoch + 1}, batch {batch + 1}: {reason}. {ADVICE}"
        )
