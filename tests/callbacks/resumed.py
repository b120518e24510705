"""Trains on digits under checkpoints, killed by SIGKILL where told: run by test_checkpoints.

python resumed.py CALLBACK FOLDER RESULT [EPOCH BATCH]
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


if __name__ == "__main__":
    name, folder, result, *at = sys.argv[1:]
    (x, y), _ = load_digits_split()
    keras.utils.set_random_seed(5)
    model = small_lipnext()
    callback = getattr(lip.callbacks, name)(folder, seed=3)
    model.fit(
        Shuffled(x[:256], y[:256]),
        epochs=4,
        callbacks=[callback, *([Kill(*map(int, at))] if at else [])],
        verbose=0,
    )
    weights = [keras.ops.convert_to_numpy(v) for v in model.weights + model.optimizer.variables]
    np.savez(result, *weights)
