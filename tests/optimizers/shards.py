"""Trains on two virtual devices under ModelParallel: run by test_replicas in its own process."""

import jax
import keras
import numpy as np

import keras_lipnext as lip

assert len(jax.devices()) == 2
x = np.random.default_rng(0).random((64, 8, 8, 1)).astype("float32")
y = np.arange(64) % 4


def train(make):
    keras.utils.set_random_seed(0)
    shape = {"input_shape": (8, 8, 1), "num_classes": 4, "depth": 2, "width": 16}
    model = lip.LipNeXt(**shape, patch_size=2, compile=False)
    model.compile(make(1e-2), loss=lip.losses.EMMA(0.3))
    return model, model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0).history


for make in (lip.optimizers.ManifoldAdam, lip.optimizers.ManifoldMuon):
    _, reference = train(make)
    mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], jax.devices())
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*dense/kernel"] = (None, "model")
    layout[".*mixing/kernel"] = ("model", None)
    parallel = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    keras.distribution.set_distribution(parallel)
    model, history = train(make)
    keras.distribution.set_distribution(None)
    np.testing.assert_allclose(history["loss"], reference["loss"], rtol=1e-4)
    moments = [v for v in model.optimizer.variables if v.path.endswith("dense_kernel_momentum")]
    assert len(moments) == 2
    assert all(tuple(v.value.sharding.spec) == (None, "model") for v in moments)
print("shards agree")
