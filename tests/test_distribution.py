import re

import keras
import numpy as np
import pytest
from data import dense_model, small_lipnext

import keras_lipnext as lip

on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution")
elsewhere = pytest.mark.skipif(keras.backend.backend() == "jax", reason="Keras ignores it there")


def mesh(*shape, names=("batch", "model")):
    # Devices that need not exist: a mesh that is only looked at.
    devices = [f"cpu:{i}" for i in range(np.prod(shape))]
    return keras.distribution.DeviceMesh(shape, list(names), devices)


@on_jax
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixing": "full"},
        {"depth": 12, "width": 32},
        {"data_format": "channels_first", "input_shape": (1, 8, 8)},
        {"dtype": "mixed_bfloat16"},
    ],
    ids=str,
)
def test_each_matrix_matches_one_key(options):
    layouts = lip.LipNeXt.get_layout_map(mesh(2, 4))
    model = small_lipnext(**options)
    matched = {v.path: [k for k in layouts if re.fullmatch(k, v.path)] for v in model.weights}
    for v in model.weights:
        keys = matched[v.path]
        assert len(keys) == 1 or (len(v.shape) < 2 and not keys), (v.path, keys)
        if keys:
            assert len(layouts[v.path].axes) == len(v.shape)
        if v.path.endswith("kernel"):
            assert "model" in layouts[v.path].axes
    assert {key for keys in matched.values() for key in keys} == set(layouts)


@on_jax
def test_the_axes_of_the_mesh_may_have_other_names():
    layouts = lip.LipNeXt.get_layout_map(mesh(2, 4, names=("data", "tensor")), "tensor", "data")
    assert layouts["block_11/dense/kernel"].axes == (None, "tensor")
    with pytest.raises(ValueError, match=r"no axis 'model'.*\['data', 'tensor'\]"):
        lip.LipNeXt.get_layout_map(mesh(2, 4, names=("data", "tensor")))
    with pytest.raises(ValueError, match=r"must be a keras.distribution.DeviceMesh.*8"):
        lip.LipNeXt.get_layout_map(8)


@on_jax
def test_widths_that_do_not_divide():
    layouts = lip.LipNeXt.get_layout_map(mesh(1, 3))
    with (
        keras.distribution.ModelParallel(layout_map=layouts).scope(),
        pytest.raises(
            ValueError, match=r"16 channels .* 3 devices.* multiple of 3.*patch_embedding"
        ),
    ):
        small_lipnext(width=16, patch_size=1, input_shape=(8, 8, 3))


@elsewhere
def test_no_silent_training_on_one_device():
    instead = {"tensorflow": "MirroredStrategy", "torch": "DistributedDataParallel"}
    expected = f"does nothing.*{instead[keras.backend.backend()]}.*KERAS_BACKEND=jax"
    with pytest.raises(RuntimeError, match=expected):
        lip.LipNeXt.get_layout_map(None)
    model = small_lipnext()
    distribution = keras.distribution.DataParallel(devices=["cpu:0"])
    with distribution.scope():
        for construct in (small_lipnext, dense_model):
            with pytest.raises(RuntimeError, match=expected):
                construct()
        with pytest.raises(RuntimeError, match=expected):
            model.fit(np.zeros((2, 8, 8, 1)), np.zeros(2))
