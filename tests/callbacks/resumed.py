"""Trains on digits under checkpoints; as a script, killed by SIGKILL: run by test_checkpoints.

python resumed.py CALLBACK FOLDER EPOCH BATCH
"""

import os
import signal
import sys

import keras
import numpy as np
from data import load_digits_split, small_lipnext

import keras_lipnext as lip


class Kill(keras.callbacks.Callback):
    """SIGKILL in the middle of an epoch: no handler, no clean-up."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Shuffled(keras.utils.PyDataset):
    """Digits in an order that NumPy's seed decides, epoch by epoch."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y, self.order = x, y, np.arange(len(x))

    def __len__(self):
        return len(self.x) // 64

    def on_epoch_begin(self):
        self.order = np.random.permutation(len(self.x))

    def __getitem__(self, index):
        chosen = self.order[64 * index : 64 * (index + 1)]
        return self.x[chosen], self.y[chosen]


def train(*callbacks):
    """Arrays of all that training changed."""
    (x, y), _ = load_digits_split()
    keras.utils.set_random_seed(5)
    # Orbax finds variables by names, which a process counts up.
    keras.backend.clear_session()
    model = small_lipnext()
    model.fit(Shuffled(x[:256], y[:256]), epochs=4, callbacks=callbacks, verbose=0)
    return [keras.ops.convert_to_numpy(v) for v in model.weights + model.optimizer.variables]


if __name__ == "__main__":
    name, folder, *at = sys.argv[1:]
    train(getattr(lip.callbacks, name)(folder, seed=3), Kill(*map(int, at)))
