"""Trained models in folders."""

import dataclasses
import json
import pathlib
import sys

import keras
import numpy as np
import pytest
import quickstart
from data import small_lipnext as lipnext_of
from data import to_numpy

import keras_lipnext as lip
from keras_lipnext.models import presets
from keras_lipnext.models.built import BuiltModel

RESULTS = pathlib.Path(__file__).parents[2] / "results"


def small_lipnext():
    return lipnext_of(depth=1)


def sll_net():
    sizes = {"depth": 1, "width": 4, "hidden_filters": 4, "dense_depth": 1, "hidden_units": 8}
    return lip.SLLNet(**sizes, input_shape=(8, 8, 1), pool_size=2)


def moved(model):
    """The model with other weights than a new one has."""
    head = model.layers[-1]
    head.bias.assign(np.arange(head.bias.shape[0], dtype="float32"))
    return model


@pytest.mark.parametrize("make", [small_lipnext, sll_net])
def test_a_saved_model_comes_back_compiled_with_its_certificate(make, digits, tmp_path):
    x, y = (a[:20] for a in digits[1])
    model = moved(make())
    certificate = model.certify(x, y, epsilons=(0.1,), verbose=0)
    model.save_to_preset(tmp_path / "mine", certificate, {"licence": "MIT"})
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names == {"config.json", "metadata.json", "model.weights.h5", "certificate.json"}
    metadata = json.loads((tmp_path / "mine/metadata.json").read_text())
    assert metadata["licence"] == "MIT"
    assert metadata["parameter_count"] == model.count_params()
    again = type(model).from_preset(tmp_path / "mine")
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(model(x)))
    assert type(again.optimizer) is type(model.optimizer)
    assert again.get_config() == model.get_config()
    # Without its weights it is a new one.
    fresh = type(model).from_preset(str(tmp_path / "mine"), load_weights=False)
    assert not np.any(to_numpy(fresh.layers[-1].bias))


def test_what_is_frozen_stays_frozen(tmp_path):
    model = small_lipnext()
    model.layers[2].trainable = False
    model.save_to_preset(tmp_path)
    again = lip.LipNeXt.from_preset(tmp_path)
    assert [layer.trainable for layer in again.layers] == [
        layer.trainable for layer in model.layers
    ]


def test_weights_that_are_not_the_certified_ones(digits, tmp_path):
    model = small_lipnext()
    certificate = model.certify(digits[1][0][:4], verbose=0)
    model.save_to_preset(tmp_path, certificate)
    moved(model).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match=r"hash is 2:.* expected: these are other weights"):
        lip.LipNeXt.from_preset(tmp_path)
    with pytest.raises(ValueError, match="these are other weights"):
        model.save_to_preset(tmp_path, certificate)
    # A preset without a certificate does not keep that of the weights before.
    model.save_to_preset(tmp_path)
    lip.LipNeXt.from_preset(tmp_path)


def test_a_folder_is_never_taken_for_a_preset_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_lipnext()
    model.save_to_preset("digits_tiny")
    for name in ("./digits_tiny", pathlib.Path("digits_tiny"), "digits_tiny/"):
        assert lip.LipNeXt.from_preset(name).count_params() == model.count_params()
    with pytest.raises(ValueError, match=r"a preset of the package and a folder here.*'./digits"):
        lip.LipNeXt.from_preset("digits_tiny")
    with pytest.raises(ValueError, match=r"`preset` must be one of"):
        lip.LipNeXt.from_preset("../trained/digits_tiny")


def test_a_certificate_that_does_not_fit_is_no_certificate(digits, tmp_path):
    model = small_lipnext()
    model.save_to_preset(tmp_path, model.certify(digits[1][0][:4], verbose=0))
    written = (tmp_path / "certificate.json").read_text()
    for change, message in (
        (lambda c: c["evidence"].update(weights_hash=None), "does not say of which weights"),
        (lambda c: c.update(evidence=None), "does not say of which weights"),
        (
            lambda c: c["evidence"].update(dtypes=["bfloat16"]),
            r"of layers of \['bfloat16'\], these",
        ),
    ):
        content = json.loads(written)
        change(content)
        (tmp_path / "certificate.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            lip.LipNeXt.from_preset(tmp_path)


def test_what_cannot_be_saved_replaces_nothing(digits, tmp_path):
    model = moved(small_lipnext())
    model.save_to_preset(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    certificate = model.certify(digits[1][0][:4], verbose=0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        small_lipnext().save_to_preset(tmp_path, metadata={"data": {1, 2}})
    with pytest.raises(ValueError, match="does not say of which weights"):
        model.save_to_preset(tmp_path, dataclasses.replace(certificate, evidence=None))

    class Unregistered(lip.LipNeXt):
        pass

    unregistered = Unregistered(
        input_shape=(8, 8, 1), num_classes=2, depth=1, width=16, patch_size=2, shift_ratio=1 / 8
    )
    with pytest.raises(ValueError, match="register_keras_serializable"):
        unregistered.save_to_preset(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_preset_of_another_class(tmp_path):
    sll_net().save_to_preset(tmp_path)
    with pytest.raises(ValueError, match=r"of class keras_lipnext>SLLNet, not a LipNeXt"):
        lip.LipNeXt.from_preset(tmp_path)


def test_no_such_preset(tmp_path):
    with pytest.raises(ValueError, match=r"one of .*digits_tiny.* Received: preset='mnist_huge'"):
        lip.LipNeXt.from_preset("mnist_huge")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON file"):
        lip.LipNeXt.from_preset(tmp_path)
    (tmp_path / "config.json").write_text('{"registered_name": ["a"]}')
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json does not name a class"):
        lip.LipNeXt.from_preset(tmp_path)
    (tmp_path / "metadata.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metadata.json is missing"):
        lip.LipNeXt.from_preset(tmp_path)


class Hub:
    """Stands for huggingface_hub."""

    def __init__(self, folder):
        self.folder = folder

    def snapshot_download(self, repository, allow_patterns):
        if self.folder is None:
            raise ConnectionError("no network")
        assert repository == "owner/name"
        assert set(allow_patterns) >= {"config.json", "model.weights.h5"}
        return str(self.folder)


def test_a_preset_on_hugging_face(tmp_path, monkeypatch):
    model = moved(small_lipnext())
    model.save_to_preset(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path))
    again = lip.LipNeXt.from_preset("hf://owner/name")
    np.testing.assert_array_equal(to_numpy(again.weights[-1]), to_numpy(model.weights[-1]))
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(None))
    with pytest.raises(OSError, match=r"hf://owner/name cannot be fetched.*no network"):
        lip.LipNeXt.from_preset("hf://owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'keras_lipnext\[hub\]'"):
        lip.LipNeXt.from_preset("hf://owner/name")


LARGER = sorted(path.parent for path in RESULTS.glob("*/config.json"))  # beside the package


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("digits_tiny", *LARGER) else pytest.param(name, marks=pytest.mark.once)
        for name in (*presets.names(), *LARGER)
    ],
    ids=str,
)
def test_presets_certify_to_the_figures_they_came_with(name):
    """The hash is checked by loading; noise stands for images that are not at hand."""
    found = presets.described(name)
    model = BuiltModel.from_preset(name)
    x = np.random.default_rng(0).random((8, *model.input_shape[1:])).astype("float32")
    certificate = model.certify(x, verbose=0)
    expected = found["metadata"]["noise"]
    assert certificate.predictions.tolist() == expected["predictions"]
    np.testing.assert_allclose(certificate.radii, expected["radii"], rtol=0, atol=1e-9)
    assert certificate.body_constant == pytest.approx(
        found["certificate"]["body_constant"], abs=1e-12
    )
    folder = presets.folder_of(name)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < (16e6 if name in LARGER else 2e6)


@pytest.mark.once
def test_the_presets_are_a_small_part_of_the_package():
    folders = [presets.folder_of(name) for name in lip.LipNeXt.presets]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 8e6


def test_the_digits_preset_on_its_test_images():
    """All of what its certificate says of held-out images, derived anew."""
    claimed = presets.described("digits_tiny")["certificate"]
    model = lip.LipNeXt.from_preset("digits_tiny")
    epsilons = [float(e) for e in claimed["certified_accuracy"]]
    certificate = model.certify(*quickstart.digits()[1], epsilons=epsilons, verbose=0)
    assert certificate.clean_accuracy == claimed["clean_accuracy"]
    assert list(certificate.certified_accuracy.values()) == list(
        claimed["certified_accuracy"].values()
    )
    assert certificate.to_dict()["median_radius"] == pytest.approx(
        claimed["median_radius"], abs=1e-9
    )


def test_names_lists_presets_by_class():
    assert set(lip.LipNeXt.presets) <= set(presets.names())
    assert "digits_tiny" in lip.LipNeXt.presets
    assert not lip.SLLNet.presets
    for metadata in lip.LipNeXt.presets.values():
        assert {"description", "data", "recipe", "licence", "command"} <= set(metadata)
    assert keras.saving.get_registered_object("keras_lipnext>LipNeXt") is lip.LipNeXt
