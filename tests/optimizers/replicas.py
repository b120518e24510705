"""Trains on two logical CPUs under MirroredStrategy: run by test_replicas in its own process."""

import lean  # noqa: F401  before Keras

# isort: split
import data  # noqa: F401  its settings
import keras
import numpy as np
import tensorflow as tf

import keras_lipnext as lip

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

# Noise: on digits, whose background is constant, many activations sit at a kink together, which
# turns rounding into visible differences.
x = np.random.default_rng(0).random((256, 8, 8, 1)).astype("float32")
y = np.arange(256) % 10


def train(scope, compile):
    keras.utils.set_random_seed(0)
    with scope:
        model = lip.LipNeXt(
            depth=1, width=16, input_shape=(8, 8, 1), num_classes=10, patch_size=2, neck="pool"
        )
        compile(model)
    history = model.fit(x, y, batch_size=64, epochs=2, shuffle=False, verbose=0).history
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
    other, reference = train(tf.distribute.get_strategy().scope(), compile)
    assert int(model.optimizer.iterations.numpy()) == 8
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    # Two halves' sums are rounded differently: by 8e-7 and 3e-6, as seen of three seeds.
    np.testing.assert_allclose(history["loss"], reference["loss"], rtol=1e-6)
    for key in ("accuracy", "certified_accuracy"):
        np.testing.assert_allclose(history[key], reference[key], atol=1 / 256, err_msg=key)
    for v, single in zip(model.trainable_variables, other.trainable_variables, strict=True):
        a, b = (np.asarray(r) for r in strategy.experimental_local_results(v.value))
        assert np.array_equal(a, b), (v.path, np.abs(a - b).max())
        np.testing.assert_allclose(a, np.asarray(single.value), atol=1e-5, err_msg=v.path)
        if isinstance(v.constraint, lip.manifolds.Stiefel):
            assert float(lip.manifolds.stiefel.defect(v)) < 2e-6

# Labels are checked on each replica. The bad one is the second's.
before = model.get_weights()
labels = np.where(np.arange(256) == 60, 10, y)
try:
    model.fit(tf.data.Dataset.from_tensor_slices((x, labels)).batch(64), shuffle=False, verbose=0)
except tf.errors.InvalidArgumentError as error:
    assert "[10]" in str(error), error
else:
    raise AssertionError("labels outside the classes were taken")
for a, b in zip(model.get_weights(), before, strict=True):
    assert np.array_equal(a, b)
print("replicas agree")
