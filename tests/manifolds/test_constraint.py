import keras
import numpy as np
import pytest
from data import to_numpy

from keras_lipnext.manifolds import RandomStiefel, Stiefel, stiefel
from keras_lipnext.manifolds.constraint import ProjectedInitializer


def test_projects():
    w = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    assert float(stiefel.defect(Stiefel()(w))) < 2e-6


@pytest.mark.parametrize(
    "thing", [Stiefel(), RandomStiefel(3), ProjectedInitializer("glorot_normal")]
)
def test_serialisation(thing):
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(thing))
    assert type(copy) is type(thing)
    assert copy.get_config() == thing.get_config()


def test_in_an_ordinary_dense_layer():
    layer = keras.layers.Dense(6, kernel_constraint=Stiefel())
    model = keras.Sequential([keras.Input((9,)), layer])
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    rng = np.random.default_rng(0)
    model.fit(rng.normal(size=(32, 9)), rng.normal(size=(32, 6)), epochs=2, verbose=0)
    assert float(stiefel.defect(layer.kernel)) < 2e-6


def test_seeds_follow_keras():
    draws = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        draws.append(to_numpy(RandomStiefel()((6, 6))))
    np.testing.assert_array_equal(*draws)
    assert np.abs(to_numpy(RandomStiefel()((6, 6))) - draws[0]).max() > 1e-3
