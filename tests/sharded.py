"""Models on eight virtual devices: run by test_distribution in its own process."""

import pathlib
import sys

import lean  # noqa: F401  before Keras

# isort: split
import jax
import keras
import numpy as np
from data import parallel, parts, small_lipnext

from keras_lipnext.manifolds.constraint import RandomStiefel

folder = pathlib.Path(sys.argv[1])
x = np.random.default_rng(0).random((60, 8, 8, 1)).astype("float32")
y = np.arange(60) % 10
DATA, MODEL, BOTH = keras.distribution.DataParallel(), parallel(1, 8), parallel(2, 4)


def raises(text, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ValueError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"nothing raised: {text}")


class Batches(keras.utils.PyDataset):
    """Two batches, of 32 and 28 samples."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        part = slice(32 * index, 32 * index + 32)
        return x[part], y[part]


def check_batches():
    """Of other sizes than all devices' they are refused; a model that was trained on others."""
    with DATA.scope():
        model = small_lipnext(depth=1)
        of_28 = "A batch of 28 samples cannot be split evenly over 8 devices"
        for function in (model.fit, model.evaluate):
            raises(of_28, function, x, y, batch_size=32, verbose=0)
        raises(of_28, model.predict, x, 32)
        raises("batch of 60", model.fit, x, y, batch_size=64)
        raises("batch of 12", model.fit, x[:56], y[:56], 16, validation_split=0.5)
        raises(of_28, model.fit, x[:32], y[:32], 32, validation_data=(x, y))
        model.fit(x, y, batch_size=32, steps_per_epoch=1, verbose=0)
        model.fit(x[:48], y[:48], batch_size=32, validation_split=1 / 3, verbose=0)
        model.evaluate(x[:56], y[:56], batch_size=32, verbose=0)
        assert model.predict(x[:56], verbose=0).shape == (56, 10)
        # The size of a data set's batches shows only when they come: JAX says so.
        raises("partitioned 8 times, but the dimension size is 28", model.fit, Batches(), verbose=0)
    with BOTH.scope():
        raises("over 2 devices", small_lipnext(depth=1).fit, x[:57], y[:57])
    with MODEL.scope():
        assert small_lipnext(depth=1).predict(x[:57], verbose=0).shape == (57, 10)
    return model


def check_certificates(trained):
    """Of a model that is split the same as of one that is not; also after saving and loading."""
    with BOTH.scope():
        patches = small_lipnext(depth=1, neck="patches")
        patches.fit(x[:56], y[:56], batch_size=56, verbose=0)
    for name, distribution, model in (("data", DATA, trained), ("both", BOTH, patches)):
        file = folder / f"{name}.keras"
        with distribution.scope():
            split = model.certify(x, y, verbose=0)
            model.save(file)
            clone = keras.models.clone_model(model)
            assert [parts(v) for v in clone.weights] == [parts(v) for v in model.weights]
        alone = keras.models.load_model(file)
        for a, b in zip(alone.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert all(len(v.value.devices()) == 1 for v in alone.weights)
        whole = alone.certify(x, y, verbose=0)
        assert whole.radii.max() > 0
        # Sums in float64, in another order.
        np.testing.assert_allclose(split.radii, whole.radii, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(split.predictions, whole.predictions)
        np.testing.assert_allclose(split.body_constant, whole.body_constant, rtol=1e-12)
    alone.fit(x[:56], y[:56], batch_size=56, verbose=0)  # it trains on
    with MODEL.scope():  # and goes to another mesh
        other = keras.models.load_model(file)
        assert parts(other.get_layer("head").kernel) == (8, 1)
        np.testing.assert_allclose(
            other.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
        )
    with DATA.scope():
        model = small_lipnext(depth=1, dtype="mixed_bfloat16")
        assert model.certify(x, y, verbose=0).low_precision_differences < 60


def check_fresh_weights():
    """They lie in parts from the start, and large ones are drawn in parts."""
    drawn, draw = [], RandomStiefel.__call__

    def watched(self, shape, dtype=None):
        value = draw(self, shape, dtype)
        drawn.append((shape, isinstance(value, jax.core.Tracer)))
        return value

    RandomStiefel.__call__ = watched
    with MODEL.scope():
        model = small_lipnext(width=3072, depth=1, mixing="full", shift_ratio=1 / 16)
    RandomStiefel.__call__ = draw
    kernels = {v.path: parts(v) for v in model.weights if v.path.endswith("kernel")}
    assert kernels == {
        "patch_embedding/kernel": (1, 8),
        "block_0/mixing/kernel": (8, 1),
        "block_0/dense/kernel": (1, 8),
        "head/kernel": (8, 1),
    }
    # By Keras inside a program whose result is laid out; small ones whole, and then split.
    assert drawn == [((4, 3072), False), ((3072, 3072), True), ((3072, 3072), True)]
    layout = model.get_layer("block_0").dense.kernel.value.sharding
    program = jax.jit(draw, out_shardings=layout, static_argnums=(0, 1))
    analysis = program.lower(RandomStiefel(0), (3072, 3072)).compile().memory_analysis()
    assert analysis.output_size_in_bytes == 4 * 3072**2 / 8
    assert analysis.temp_size_in_bytes < 4 * 3072**2 / 50


assert len(jax.devices()) == 8
check_certificates(check_batches())
check_fresh_weights()
print("sharded models work")
