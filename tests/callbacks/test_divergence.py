import re

import keras
import numpy as np
import pytest
from test_checkpoints import as_at_first, lipnext

from keras_lipnext.callbacks import BackupAndRestore, DivergenceError, StopOnDivergence


def watched(losses, epochs=1, **arguments):
    """Feeds a callback the losses of batches, as Keras logs them: means over the epoch so far."""
    callback = StopOnDivergence(**arguments)
    callback.on_train_begin()
    for epoch, part in enumerate(np.array_split(losses, epochs)):
        callback.on_epoch_begin(epoch)
        for batch, mean in enumerate(np.cumsum(part) / np.arange(1, len(part) + 1)):
            callback.on_train_batch_end(batch, {"loss": float(mean)})


NOISE = np.random.default_rng(0).gamma(9, 1 / 9, 4000)


@pytest.mark.parametrize(
    "losses",
    [
        np.linspace(1, 6, 2000) * NOISE[:2000],  # EMMA's ramp raises the loss severalfold
        np.linspace(0.3, 1.5, 230) * NOISE[:230],  # also in a short training
        2 * np.exp(-np.arange(900) / 50) + 0.1,
        np.repeat([0.0062, 0.0186, 0.1], 100),  # small: a trained model is trained again
    ],
)
def test_noise_and_a_slow_rise_are_no_divergence(losses):
    watched(losses)
    watched(losses, epochs=3)


@pytest.mark.parametrize("first", [80, 240, 3000])
def test_a_leap_stops_training_within_a_window(first):
    """Also soon after a high loss has fallen."""
    losses = 2 * np.exp(-np.arange(first + 100) / 20) + 0.05
    losses[first:] = 1.2
    losses *= NOISE[: first + 100]
    with pytest.raises(DivergenceError, match=r"the loss rose from about 0\.[01]") as raised:
        watched(losses)
    at = int(re.search(r"epoch 1, batch (\d+)", str(raised.value)).group(1))
    assert first < at <= first + 20
    watched(losses, factor=100)
    watched(losses, floor=5)


def test_one_bad_batch_is_no_divergence():
    losses = np.ones(300)
    losses[200] = 1e4
    watched(losses)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_training(value):
    with pytest.raises(DivergenceError, match=f"epoch 1, batch 4: the loss is {value}"):
        watched([1, 1, 1, value, 1])


def test_a_last_step_that_spoils_the_weights_leaves_no_checkpoint(digits, tmp_path):
    """The loss was still finite: only the weights show it."""
    (x, y), _ = digits

    class Spoil(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                kernel = self.model.get_layer("head").kernel
                kernel.assign(np.nan * kernel)

    options = {"epochs": 4, "batch_size": 32, "shuffle": False, "verbose": 0}
    model, backup = as_at_first(lipnext), BackupAndRestore(tmp_path)
    callbacks = [StopOnDivergence(), Spoil(), backup]
    with pytest.raises(DivergenceError, match="is not finite at the end of the epoch"):
        model.fit(x[:96], y[:96], callbacks=callbacks, **options)
    again = as_at_first(lipnext)
    history = again.fit(x[:96], y[:96], callbacks=[backup], **options)
    assert history.epoch == [2, 3]
    assert np.isfinite(history.history["loss"]).all()


def test_weights_that_are_not_finite_stop_training_whatever_the_loss(digits):
    """A relu that makes 0 of NaN, as TensorFlow's does, keeps the loss finite."""
    (x, y), _ = digits

    def relu(t):
        return keras.ops.where(t > 0, t, keras.ops.zeros_like(t))

    layers = [keras.layers.Dense(4, relu, name="spoilt"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss)
    model.layers[0].kernel.assign(np.full((64, 4), np.nan))
    flat = x[:64].reshape(64, 64)
    assert np.isfinite(model.evaluate(flat, y[:64], verbose=0))
    with pytest.raises(
        DivergenceError, match="spoilt/kernel is not finite at the end of the epoch"
    ):
        model.fit(flat, y[:64], callbacks=[StopOnDivergence()], verbose=0)


def test_the_last_good_checkpoint_is_kept(digits, tmp_path):
    (x, y), _ = digits
    x = np.array(x[:96])

    class Spoil(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                x[70:] = np.nan

    model = as_at_first(lipnext)
    callbacks = [StopOnDivergence(), BackupAndRestore(tmp_path), Spoil()]
    options = {"epochs": 4, "shuffle": False, "verbose": 0}

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            part = slice(32 * index, 32 * (index + 1))
            return x[part], y[:96][part]

    with pytest.raises(DivergenceError, match=r"epoch 3, batch 3: the loss is nan.*is kept"):
        model.fit(Batches(), callbacks=callbacks, **options)
    x[70:] = 0
    again = as_at_first(lipnext)
    history = again.fit(Batches(), callbacks=callbacks[:2], **options)
    assert history.epoch == [2, 3]
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize(
    "arguments, message",
    [({"factor": 1}, "`factor` must be above 1"), ({"window": 0}, "`window` must be a positive")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StopOnDivergence(**arguments)
