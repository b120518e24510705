"""The share of the training done, the callback that keeps count of it, and weights put back."""

import itertools

import keras
from keras import ops

from keras_lipnext import backend
from keras_lipnext.backend import keras_private

NOT_TRAINING = -1.0


class TrainingState(keras.metrics.Metric):
    """The share of the training done, held as metric state.

    On JAX a jitted step hands its parts explicit state. That of a tracked metric is part of it,
    is not a weight of the model and is not saved with it. It adds no entry to the logs.
    """

    def __init__(self):
        super().__init__(name="training_state")
        # "mean" reads one value from equal replicas under tf.distribute.
        self.progress = self.add_variable((), "ones", aggregation="mean", name="progress")
        self.increment = self.add_variable((), "zeros", aggregation="mean", name="increment")
        # Of the running step, or epoch where steps are not known: what schedules of learning rates
        # read. Negative while no `fit` runs.
        initializer = keras.initializers.Constant(NOT_TRAINING)
        self.middle = self.add_variable((), initializer, aggregation="mean", name="middle")
        self.steps = None  # of an epoch, once one has shown it

    def advance(self):
        """Counts one training step."""
        self.progress.assign(ops.minimum(self.progress + self.increment, 1.0))
        self.middle.assign_add(self.increment)

    def update_state(self, *args, **kwargs):
        """Learns nothing from labels and predictions, which steps hand to every metric."""

    def result(self):
        return {}

    def reset_state(self):
        """Keeps its state: it is not a statistic of an epoch."""

    def save_own_variables(self, store):
        """Saves nothing: the model's weights determine it."""

    def load_own_variables(self, store):
        """Loads nothing."""


class Schedule(keras.callbacks.Callback):
    """Keeps count of the share of the training done.

    Progress runs from 0 to 1 over the epochs of one `fit`, step by step where the number of steps
    is known: from the second epoch on if the data does not tell.
    """

    async_safe = True  # counting batches need not wait for the device

    def __init__(self, state):
        super().__init__()
        self.state = state
        self.state.steps = None
        self._batches = []

    def on_epoch_begin(self, epoch, logs=None):
        epochs, steps = self.params["epochs"], self.params.get("steps") or self.state.steps
        increment = 1 / (epochs * steps) if steps else 0.0
        self.state.progress.assign(min(epoch / epochs, 1.0))
        self.state.increment.assign(increment)
        # Each step begins by an increment.
        behind = -increment / 2 if steps else 0.5 / epochs
        self.state.middle.assign(epoch / epochs + behind)

    def on_train_batch_end(self, batch, logs=None):
        # Keras may call this from several threads, out of order: appending is atomic.
        self._batches.append(batch)

    def on_epoch_end(self, epoch, logs=None):
        self.state.steps = max(self._batches, default=-1) + 1
        self._batches = []

    def on_train_end(self, logs=None):
        self.finish()  # before other callbacks look at the weights

    def finish(self):
        """Full progress, weights put back; also after an interrupted training."""
        self.state.progress.assign(1.0)
        self.state.increment.assign(0.0)
        self.state.middle.assign(NOT_TRAINING)
        if self.model is not None:
            put_back(self.model)


class PutBack(keras.callbacks.Callback):
    """Puts weights back that the callback in front of it, SwapEMAWeights, has moved."""

    def on_epoch_end(self, epoch, logs=None):
        put_back(self.model)

    def on_test_begin(self, logs=None):
        put_back(self.model)


def with_weights_put_back(callbacks):
    """The callbacks of a `fit` or `evaluate`, as a list, with a PutBack behind SwapEMAWeights."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    elif not isinstance(callbacks, (list, tuple)):
        callbacks = [] if callbacks is None else [callbacks]
    swaps = keras.callbacks.SwapEMAWeights
    pairs = ([each, PutBack()] if isinstance(each, swaps) else [each] for each in callbacks)
    return list(itertools.chain.from_iterable(pairs))


@backend.one_program
def _largest_change(x, y):
    return ops.max(ops.abs(ops.cast(x, "float32") - ops.cast(y, "float32")))


def put_back(model):
    """Puts trainable weights back where their constraints keep them, if they are off visibly.

    Averages of weights are: `use_ema=True` leaves them in the model when `fit` ends. Keras'
    optimizers apply constraints after their steps only.
    """
    state = model.optimizer.variables if model.optimizer else ()
    shared = {id(keras_private.held_value(v)) for v in state}
    for variable in model.trainable_variables:
        if keras_private.held_value(variable) is None:
            continue  # JAX: given to a step that failed; its error is to be seen
        value = backend.value(variable)
        if variable.constraint is not None:
            with backend.inference_scope():
                kept = ops.cast(variable.constraint(value), variable.dtype)
                moved = _largest_change(kept, value)
            # Rounding alone moves entries by less.
            half = keras.backend.standardize_dtype(variable.dtype) in ("bfloat16", "float16")
            if float(moved) > (2**-6 if half else 1e-4):
                variable.assign(kept)
                continue
        if id(keras_private.held_value(variable)) in shared:
            # JAX: an average that has become the weight shares its buffer, and one that is given
            # to a step twice is an error.
            variable.assign(ops.copy(value))
