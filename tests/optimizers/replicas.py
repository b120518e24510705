"""Trains on two logical CPUs under MirroredStrategy: run by test_replicas in its own process."""

import keras
import numpy as np
import tensorflow as tf
from data import load_digits_split

import keras_lipnext as lip

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

(x, y), (x_test, y_test) = load_digits_split()
x, y = x[:512], y[:512]


def train(scope, compile):
    keras.utils.set_random_seed(0)
    with scope:
        model = lip.LipNeXt(depth=2, width=16, input_shape=(8, 8, 1), num_classes=10, patch_size=2)
        compile(model)
    history = model.fit(x, y, batch_size=64, epochs=4, shuffle=False, verbose=0).history
    return model, history


def as_it_comes(model):
    assert isinstance(model.optimizer, lip.optimizers.ManifoldMuon)


def with_lookahead(model):
    optimizer = lip.optimizers.ManifoldAdam(1e-2, lookahead_period=3)
    loss = lip.losses.EMMA(0.5, temperature=16)
    model.compile(optimizer, loss, metrics=["accuracy", lip.metrics.CertifiedAccuracy(0.1)])


for compile in (as_it_comes, with_lookahead):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    model, history = train(strategy.scope(), compile)
    assert int(model.optimizer.iterations.numpy()) == 32
    for v in model.trainable_variables:
        a, b = (np.asarray(r) for r in strategy.experimental_local_results(v.value))
        assert np.array_equal(a, b), (v.path, np.abs(a - b).max())
    _, reference = train(tf.distribute.get_strategy().scope(), compile)
    for key in ("loss", "accuracy", "certified_accuracy"):
        difference = np.abs(np.array(history[key]) - np.array(reference[key])).max()
        assert difference < 0.02, (key, history[key], reference[key])
    for v in model.trainable_variables:
        if isinstance(v.constraint, lip.manifolds.Stiefel):
            assert float(lip.manifolds.stiefel.defect(v)) < 2e-6
print("replicas agree")
