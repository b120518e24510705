import re
import types

import keras
import numpy as np
import pytest
from data import dense_model, output_of, small_lipnext, virtual_devices

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
        {"name": "mine"},
        {"remat": True},
        {"neck": "patches", "dense_depth": 12},
        {"dense_depth": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`remat=True` saves nothing")
def test_each_matrix_matches_one_key(options):
    check_keys(small_lipnext(**options))


@on_jax
@pytest.mark.parametrize("copied", ["reduced", "cloned", "loaded"])
def test_each_matrix_of_a_copy_matches_one_key(copied, tmp_path):
    model = small_lipnext(mixing="full", name="mine")
    model.save(tmp_path / "model.keras")
    copies = {
        "reduced": model.reduced,
        "cloned": lambda: keras.models.clone_model(model),
        "loaded": lambda: keras.models.load_model(tmp_path / "model.keras", compile=False),
    }
    check_keys(copies[copied]())


OF_NECKS = {r"(neck|dense_\d+)/kernel", r"(neck|dense_\d+)/bias"}


def check_keys(model):
    layouts = lip.LipNeXt.get_layout_map(mesh(2, 4))
    matched = {v.path: [k for k in layouts if re.fullmatch(k, v.path)] for v in model.weights}
    for v in model.weights:
        keys = matched[v.path]
        repeated = len(v.shape) < 2 or "positional_bias" in v.path  # of as many axes as the input
        assert len(keys) == 1 or (repeated and not keys), (v.path, keys)
        if keys:
            assert len(layouts[v.path].axes) == len(v.shape)
        if len(v.shape) == 2:
            assert "model" in layouts[v.path].axes
    unmatched = set(layouts) - {key for keys in matched.values() for key in keys}
    assert unmatched == (set() if any("dense_0" in v.path for v in model.weights) else OF_NECKS)


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


@on_jax
def test_neck_widths_that_do_not_divide():
    layouts = lip.LipNeXt.get_layout_map(mesh(1, 4))
    with (
        keras.distribution.ModelParallel(layout_map=layouts).scope(),
        pytest.raises(
            ValueError, match=r"18 channels .* 4 devices.*Received: variable neck/kernel"
        ),
    ):
        small_lipnext(neck="patches", neck_width=18)


@pytest.mark.slow
@on_jax
def test_models_on_eight_devices(tmp_path):
    text, _ = output_of("sharded.py", tmp_path, **virtual_devices(8))
    assert "sharded models work" in text


def test_weights_of_several_processes_are_certified_by_none():
    elsewhere = types.SimpleNamespace(is_fully_addressable=False, sharding="of 2 processes")
    weight = types.SimpleNamespace(path="head/kernel", value=elsewhere)
    model = types.SimpleNamespace(name="mine", weights=[weight])
    with pytest.raises(
        RuntimeError, match=r"'mine' .*several processes.*set_distribution\(None\).*head/kernel"
    ):
        lip.certify(model, np.zeros((2, 8, 8, 1)))


@elsewhere
def test_no_silent_training_on_one_device():
    instead = {"tensorflow": "MirroredStrategy", "torch": "DistributedDataParallel"}
    expected = f"does nothing.*{instead[keras.backend.backend()]}.*KERAS_BACKEND=jax"
    with pytest.raises(RuntimeError, match=expected):
        lip.LipNeXt.get_layout_map(None)
    x, y = np.zeros((2, 8, 8, 1)), np.zeros(2)
    model = small_lipnext()
    # Somebody's own model, of which only the optimizer is ours.
    other = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    other.add(keras.layers.Dense(10))
    other.compile(lip.optimizers.ManifoldAdam(), loss="sparse_categorical_crossentropy")
    refused = {
        "LipNeXt": small_lipnext,
        "SLLNet": lip.SLLNet,
        "CertifiableModel": dense_model,
        "fit": lambda: model.fit(x, y),
        "evaluate": lambda: model.evaluate(x, y),
        "predict": lambda: model.predict(x),
        "optimizer": lambda: other.fit(x, y),
    }
    with keras.distribution.DataParallel(devices=["cpu:0"]).scope():
        for call in refused.values():
            with pytest.raises(RuntimeError, match=expected):
                call()
