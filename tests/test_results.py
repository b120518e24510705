"""results/: what is said of trained models, and the script that trains and checks them."""

import functools
import json
import pathlib

import keras
import numpy as np
import pytest

from keras_lipnext.models import presets as trained

pytestmark = pytest.mark.once
ROOT = pathlib.Path(__file__).parents[1]
MODELS = [
    path
    for path in sorted((ROOT / "results").glob("*.json"))
    if "model" in json.loads(path.read_text())
]


@pytest.fixture
def script(monkeypatch):
    """benchmarks/presets.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import presets

    return presets


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_no_attack_leaves_less_than_is_certified(path):
    of = json.loads(path.read_text())
    assert set(of["attacked_accuracy"]) == set(of["certified_accuracy"])
    for epsilon, left in of["attacked_accuracy"].items():
        assert of["attacked_certified"][epsilon] <= left


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_preset_was_trained_by_the_recipe_that_the_script_has(path, script):
    name = path.stem
    folder = ROOT / "results" / name
    if name not in trained.names() and not folder.exists():
        pytest.skip("a distribution has no networks too large for the package")
    metadata = trained.described(folder if folder.exists() else name)["metadata"]
    recipe = {k: v for k, v in script.RECIPES[name].items() if k not in ("data", "margin")}
    assert metadata["recipe"] == json.loads(json.dumps(recipe))


def test_a_file_of_results_is_checked(script, tmp_path, monkeypatch, capsys):
    model = script.lip.LipNeXt.from_preset("digits_tiny")
    monkeypatch.setattr(script, "model_of", lambda _: model)
    monkeypatch.setattr(script, "certified", functools.cache(script.certified))
    claimed = json.loads((ROOT / "results/digits_tiny.json").read_text())

    def checked(**changes):
        path = tmp_path / "claimed.json"
        path.write_text(json.dumps({k: v for k, v in (claimed | changes).items() if v is not None}))
        return script.check(path, None)

    assert checked()
    radius = max(claimed["certified_accuracy"], key=float)
    for changes in (
        {"weights_hash": "2:0"},
        {"data_name": "CIFAR-10"},
        {"arithmetic": "real"},
        {"clean_accuracy": 0.999},
        {"certified_accuracy": claimed["certified_accuracy"] | {radius: 0.99}},
        {"attacked_certified": claimed["attacked_certified"] | {radius: 0.99}},
        {"attacked_accuracy": claimed["attacked_accuracy"] | {radius: 0.0}},
    ):
        assert not checked(**changes)
        assert "DIFFERS" in capsys.readouterr().out
    assert not checked(attacked_samples=None, data_name=None)
    assert "lacks data_name, attacked_samples" in capsys.readouterr().out


def test_a_training_that_was_killed_goes_on_as_if_it_had_not(script, tmp_path, monkeypatch):
    """Its shifted images and its seconds, too."""
    recipe = {"data": "digits", "size": "tiny", "patch_size": 2, "shift": 1, "batch": 64}
    monkeypatch.setitem(script.RECIPES, "trial", {**recipe, "images": 200, "epochs": 3})
    script.train("trial", None, tmp_path / "whole")
    real = script.Clock.on_epoch_end

    def killing(clock, epoch, logs=None):
        real(clock, epoch, logs)
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Clock, "on_epoch_end", killing)
        with pytest.raises(KeyboardInterrupt):
            script.train("trial", None, tmp_path / "killed")
    seen = []
    monkeypatch.setattr(
        script.Clock, "on_epoch_end", lambda *a, **k: seen.append(a[1]) or real(*a, **k)
    )
    monkeypatch.setattr(script.Clock, "on_train_end", lambda c, logs=None: seen.append(c.seconds))
    script.train("trial", None, tmp_path / "killed")
    assert seen[0] == 2 and len(seen[1]) == 3  # the third epoch alone; seconds of all three
    models = [trained.load(tmp_path / name, script.lip.LipNeXt) for name in ("whole", "killed")]
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(a, b)


def test_augmented_batches_are_repeated_from_a_random_state(script):
    x = np.random.default_rng(0).random((20, 4, 4, 1)).astype("float32")
    data = script.datasets.Augmented(x, np.arange(20), 5, shift=1, flip=True)

    def epoch(seed):
        keras.utils.set_random_seed(seed)
        data.on_epoch_begin()
        return [data[i] for i in range(len(data))]

    first, other, again = epoch(1), epoch(2), epoch(1)
    for (a, labels), (b, same) in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(labels, same)
    assert any((a != b).any() for (_, a), (_, b) in zip(first, other, strict=True))
    assert sorted(np.concatenate([labels for _, labels in first])) == list(range(20))
    # Each image is one of its nine shifts, mirrored or not.
    windows = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for images, labels in first:
        for image, label in zip(images, labels, strict=True):
            found = [
                windows[label, i : i + 4, j : j + 4][:, ::step]
                for i in range(3)
                for j in range(3)
                for step in (1, -1)
            ]
            assert any(np.array_equal(image, candidate) for candidate in found)
