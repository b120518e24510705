"""Trains on digits under checkpoints; as a script, killed by SIGKILL: run by test_checkpoints.

python resumed.py EPOCH BATCH FOLDER/CALLBACK...
"""

import os
import pathlib
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
        return len(self.x) // 32

    def on_epoch_begin(self):
        self.order = np.random.permutation(len(self.x))

    def __getitem__(self, index):
        chosen = self.order[32 * index : 32 * (index + 1)]
        return self.x[chosen], self.y[chosen]


def train(*callbacks):
    """Arrays of all that training changed."""
    (x, y), _ = load_digits_split()
    keras.utils.set_random_seed(5)
    # Orbax finds variables by names, which a process counts up.
    keras.backend.clear_session()
    model = small_lipnext(depth=1)
    model.fit(Shuffled(x[:128], y[:128]), epochs=4, callbacks=callbacks, verbose=0)
    return [keras.ops.convert_to_numpy(v) for v in model.weights + model.optimizer.variables]


if __name__ == "__main__":
    import lean  # noqa: F401

    epoch, batch, *folders = sys.argv[1:]
    made = [getattr(lip.callbacks, pathlib.Path(folder).name)(folder, seed=3) for folder in folders]
    train(*made, Kill(int(epoch), int(batch)))
