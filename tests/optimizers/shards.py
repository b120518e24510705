"""Trains on eight virtual devices: run by test_replicas in its own process."""

import jax
import keras
import numpy as np

import keras_lipnext as lip

STEPS = 20
x = np.random.default_rng(0).random((64, 8, 8, 1)).astype("float32")
y = np.arange(64) % 4


def network(depth=3, width=16, mixing="reduced"):
    shape = {"input_shape": (8, 8, 1), "num_classes": 4, "patch_size": 2}
    return lip.LipNeXt(depth=depth, width=width, mixing=mixing, **shape)


def train(**options):
    """The model after one epoch a step, of the whole data, and the losses."""
    keras.utils.set_random_seed(0)
    model = network(**options)
    history = model.fit(x, y, batch_size=64, epochs=STEPS, shuffle=False, verbose=0).history
    return model, history["loss"]


def parallel(data, model):
    mesh = keras.distribution.DeviceMesh((data, model), ["batch", "model"])
    layouts = lip.LipNeXt.get_layout_map(mesh)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def parts(variable):
    """In how many parts each axis of a variable lies on the devices."""
    value = variable.value
    return tuple(a // b for a, b in zip(value.shape, value.sharding.shard_shape(value.shape)))


def check_layout(model, devices):
    """Each matrix, and its moments, lies in `devices` parts: 1 / devices of it on each."""
    expected = {"patch_embedding": (1, devices), "mixing": (devices, 1), "dense": (1, devices)}
    expected["head"] = (devices, 1)
    seen = set()
    for v in model.trainable_variables:
        if not v.path.endswith("kernel"):
            continue
        layer = v.path.split("/")[-2]
        prefix = v.path.replace("/", "_") + "_"
        moments = [m for m in model.optimizer.variables if m.path.split("/")[-1].startswith(prefix)]
        assert moments, v.path
        assert all(parts(a) == expected[layer] for a in (v, *moments)), v.path
        seen.add(layer)
    assert seen == set(expected)


def temporary_memory(distribution):
    """Bytes a device needs for a step of the optimizer alone, beside variables and gradients."""
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = network(depth=8, width=64)
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    weights = [v.value for v in model.trainable_variables]
    state = [v.value for v in optimizer.variables]
    places = jax.tree.map(lambda a: a.sharding, (weights, state))
    step = jax.jit(optimizer.stateless_apply, out_shardings=places)
    analysis = step.lower(state, weights, weights).compile().memory_analysis()
    keras.distribution.set_distribution(None)
    return analysis.temp_size_in_bytes


assert len(jax.devices()) == 8
_, reference = train()
assert reference[-1] < reference[0] - 1e-3
for distribution in (keras.distribution.DataParallel(), parallel(1, 8), parallel(2, 4)):
    keras.distribution.set_distribution(distribution)
    model, losses = train()
    keras.distribution.set_distribution(None)
    np.testing.assert_allclose(losses, reference, rtol=1e-5)
    if isinstance(distribution, keras.distribution.ModelParallel):
        check_layout(model, distribution.device_mesh.shape[1])
print("shards agree")

one, eight = temporary_memory(None), temporary_memory(parallel(1, 8))
assert eight < one / 5, (one, eight)
print("shards are small")
