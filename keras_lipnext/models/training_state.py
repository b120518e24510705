"""What losses and metrics must know of the model, and the callback that keeps it up to date."""

import math

import keras
from keras import ops


class TrainingState(keras.metrics.Metric):
    """Pairwise constants and training progress, held as metric state.

    On JAX a jitted step hands losses and metrics explicit state: of the model's own variables,
    metrics see none. The state of a tracked metric reaches both, is not a weight of the model and
    is not saved with it. It adds no entry to the logs.
    """

    def __init__(self, classes):
        super().__init__(name="training_state")
        # Infinite until the first step: nothing is certified before the constants are known.
        # "mean" reads one value from equal replicas under tf.distribute.
        unknown = keras.initializers.Constant(float("inf"))
        self.distances = self.add_variable(
            (classes, classes), unknown, aggregation="mean", name="distances"
        )
        self.progress = self.add_variable((), "ones", aggregation="mean", name="progress")
        self.increment = self.add_variable((), "zeros", aggregation="mean", name="increment")
        self.steps = None  # of an epoch, once one has shown it

    def update_state(self, distances, advance):
        """Takes the constants of the current weights; `advance` counts one training step."""
        self.distances.assign(ops.cast(ops.stop_gradient(distances), self.distances.dtype))
        if advance:
            self.progress.assign(ops.minimum(self.progress + self.increment, 1.0))

    def result(self):
        return {}

    def reset_state(self):
        """Keeps its state: it is not a statistic of an epoch."""

    def save_own_variables(self, store):
        """Saves nothing: the model's weights determine it."""

    def load_own_variables(self, store):
        """Loads nothing."""


class Schedule(keras.callbacks.Callback):
    """Keeps count of the share of the training done, and decays the learning rate by a cosine.

    Progress runs from 0 to 1 over the epochs of one `fit`, step by step where the number of steps
    is known: from the second epoch on if the data does not tell. With `cosine`, the optimizer's
    `decay` factor is, in each epoch, the cosine's value at the epoch's middle.
    """

    async_safe = True  # counting batches need not wait for the device

    def __init__(self, state, cosine=False):
        super().__init__()
        self.state = state
        self.cosine = cosine
        self.state.steps = None
        self._batches = []

    def on_epoch_begin(self, epoch, logs=None):
        epochs, steps = self.params["epochs"], self.params.get("steps") or self.state.steps
        self.state.progress.assign(min(epoch / epochs, 1.0))
        self.state.increment.assign(1 / (epochs * steps) if steps else 0.0)
        if self.cosine:
            self._set_decay((1 + math.cos(math.pi * (epoch + 0.5) / epochs)) / 2)

    def on_train_batch_end(self, batch, logs=None):
        # Keras may call this from several threads, out of order: appending is atomic.
        self._batches.append(batch)

    def on_epoch_end(self, epoch, logs=None):
        self.state.steps = max(self._batches, default=-1) + 1
        self._batches = []

    def finish(self):
        """Full progress, and no decay; also after an interrupted training."""
        self.state.progress.assign(1.0)
        self.state.increment.assign(0.0)
        if self.cosine and self.model is not None:
            self._set_decay(1.0)

    def _set_decay(self, factor):
        optimizer = self.model.optimizer
        getattr(optimizer, "inner_optimizer", optimizer).decay.assign(factor)
