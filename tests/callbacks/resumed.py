"""Trains a small model under checkpoints; as a script, killed by SIGKILL: run by test_checkpoints.

python resumed.py EPOCH BATCH FOLDER/CALLBACK...
"""

import os
import pathlib
import signal
import sys

if __name__ == "__main__":
    import lean  # before Keras

    lean.HIDDEN.discard("jax")  # Orbax's

# isort: split
import data  # noqa: F401  its settings
import keras
import numpy as np

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
    """Images in an order that NumPy's seed decides, epoch by epoch."""

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


def network():
    """Small: a kernel on its manifold, a head, and the library's optimizer, loss and metric."""
    inputs = keras.Input((8, 8, 1))
    x = lip.layers.OrthogonalDense(16)(keras.layers.Flatten()(inputs))
    x = lip.layers.BetaAbs(0.75)(x)
    model = lip.CertifiableModel(inputs, lip.layers.NormalizedDense(10)(x))
    optimizer = lip.optimizers.ManifoldMuon(0.04, schedule=lip.optimizers.cosine())
    metrics = ["accuracy", lip.metrics.CertifiedAccuracy(0.1)]
    model.compile(optimizer, lip.losses.EMMA(0.3), metrics=metrics)
    return model


def train(*callbacks):
    """Arrays of all that training changed."""
    x, y = np.random.default_rng(0).random((128, 8, 8, 1)).astype("float32"), np.arange(128) % 10
    keras.utils.set_random_seed(5)
    # Orbax finds variables by names, which a process counts up.
    keras.backend.clear_session()
    model = network()
    model.fit(Shuffled(x, y), epochs=4, callbacks=callbacks, verbose=0)
    return [keras.ops.convert_to_numpy(v) for v in model.weights + model.optimizer.variables]


if __name__ == "__main__":
    epoch, batch, *folders = sys.argv[1:]
    made = [getattr(lip.callbacks, pathlib.Path(folder).name)(folder, seed=3) for folder in folders]
    train(*made, Kill(int(epoch), int(batch)))
