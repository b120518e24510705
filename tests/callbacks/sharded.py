"""Sharded checkpoints on four virtual devices: run by test_checkpoints in its own process.

python sharded.py FOLDER
"""

import shutil
import sys

import lean  # noqa: F401  before Keras

# isort: split
import jax
import keras
import numpy as np

import keras_lipnext as lip
from keras_lipnext.callbacks import OrbaxCheckpoint

x = np.random.default_rng(0).random((64, 8, 8, 1)).astype("float32")
y = np.arange(64) % 4


def train(mesh, epochs, *callbacks):
    mesh = keras.distribution.DeviceMesh(mesh, ["batch", "model"])
    layouts = lip.LipNeXt.get_layout_map(mesh)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    keras.utils.set_random_seed(0)
    shape = {"input_shape": (8, 8, 1), "num_classes": 4, "patch_size": 2}
    model = lip.LipNeXt(depth=1, width=16, **shape)
    options = {"batch_size": 64, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, epochs=epochs, callbacks=callbacks, **options)
    return model, history.epoch


def state(model):
    return [np.asarray(v.value) for v in model.weights + model.optimizer.variables]


class Stop(keras.callbacks.Callback):
    """Ends `fit` by an error when epoch 2 begins: a schedule of four was begun."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise InterruptedError


assert len(jax.devices()) == 4
expected = state(train((1, 4), 4)[0])
stopped = OrbaxCheckpoint(f"{sys.argv[1]}/stopped")
try:
    train((1, 4), 4, stopped, Stop())
except InterruptedError:
    stopped.wait_until_finished()
for name, mesh in (("same", (1, 4)), ("another", (2, 2))):
    folder = shutil.copytree(f"{sys.argv[1]}/stopped", f"{sys.argv[1]}/{name}")
    model, epochs = train(mesh, 4, OrbaxCheckpoint(folder))
    assert epochs == [2, 3], epochs
    parts = {v.value.sharding.shard_shape(v.shape) for v in model.get_layer("block_0").weights}
    assert (16, 16 // mesh[1]) in parts, parts
    for a, b in zip(state(model), expected, strict=True):
        if name == "same":
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, atol=1e-5)
    print(name, "mesh continues")
