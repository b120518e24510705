import keras
import numpy as np
import pytest
from data import small_lipnext

from keras_lipnext.callbacks import BackupAndRestore, DivergenceError, StopOnDivergence


def watched(losses, epochs=1, **arguments):
    """Feeds a callback the losses of batches, as Keras logs them: means over the epoch so far."""
    callback = StopOnDivergence(**arguments)
    callback.on_train_begin()
    for epoch in range(epochs):
        callback.on_epoch_begin(epoch)
        for batch, mean in enumerate(np.cumsum(losses) / np.arange(1, len(losses) + 1)):
            callback.on_train_batch_end(batch, {"loss": float(mean)})


def test_noise_and_a_slow_rise_are_no_divergence():
    """EMMA's ramp raises the loss severalfold over many epochs."""
    rng = np.random.default_rng(0)
    watched(np.linspace(1, 6, 2000) * rng.gamma(9, 1 / 9, 2000))
    watched(2 * np.exp(-np.arange(300) / 50) + 0.1, epochs=3)


def test_a_leap_stops_training():
    rng = np.random.default_rng(0)
    losses = rng.gamma(9, 1 / 9, 400)
    losses[300:] *= 10
    with pytest.raises(DivergenceError, match=r"epoch 1, batch 3\d\d: the loss rose from about"):
        watched(losses)
    watched(losses, factor=20)


def test_one_bad_batch_is_no_divergence():
    losses = np.ones(300)
    losses[200] = 30
    watched(losses)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_training(value):
    with pytest.raises(DivergenceError, match=f"epoch 1, batch 4: the loss is {value}"):
        watched([1, 1, 1, value, 1])


def test_the_last_good_checkpoint_is_kept(digits, tmp_path):
    (x, y), _ = digits
    x = np.array(x[:96])

    class Spoil(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                x[70:] = np.nan

    model = small_lipnext(depth=1)
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
    again = small_lipnext(depth=1)
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
