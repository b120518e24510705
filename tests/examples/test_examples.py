"""The examples, as a newcomer runs them; most without a process of their own."""

import argparse
import csv
import functools
import io
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import sklearn.datasets
import sklearn.utils
from data import to_numpy, virtual_devices
from PIL import Image

import keras_lipnext as lip

ROOT = pathlib.Path(__file__).parents[2]

# Of examples that share their recipe, or whose parts have tests of their own on every backend, each
# runs on one.
on_jax, on_torch, on_tensorflow = (
    pytest.mark.skipif(keras.backend.backend() != name, reason=f"runs on {name}")
    for name in ("jax", "torch", "tensorflow")
)


def run(script, *arguments, returncode=0, **environment):
    """What examples/SCRIPT prints; `script` may be another one's path."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **environment},
    )
    assert done.returncode == returncode, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def here(monkeypatch, capsys):
    """What examples/SCRIPT prints, run in this process: its warnings are errors, too."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        # No module of the tests is found, as in a process of its own.
        others = [path for path in sys.path if "tests" not in pathlib.Path(path).parts]
        monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *others])
        monkeypatch.delitem(sys.modules, "data", raising=False)
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return capsys.readouterr().out

    yield run
    keras.distribution.set_distribution(None)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def shallow(monkeypatch):
    """A function that gives each LipNeXt that an example makes so few blocks."""
    make = lip.LipNeXt
    return lambda depth: monkeypatch.setattr(lip, "LipNeXt", functools.partial(make, depth=depth))


def share(text, name):
    return float(re.search(rf"{re.escape(name)} +([0-9.]+)%", text).group(1))


@pytest.mark.slow
def test_quickstart_reaches_its_goals(here, shallow, monkeypatch, tmp_path):
    """Held-out digits, fixed seed: clean >= 97 %, CRA(0.25) >= 88 %, no certified flip.

    That on one backend, in a process of its own, after a third of the training; on the others what
    a tenth reaches, of a quarter of the network and on fewer digits.
    """
    given = ["--output", str(tmp_path / "out"), "--epochs"]
    if keras.backend.backend() == "torch":
        text, goals, held_out = run("quickstart.py", *given, "12"), (97, 88), 360
    else:
        every = sklearn.datasets.load_digits()
        fewer = sklearn.utils.Bunch(images=every.images[:1200], target=every.target[:1200])
        monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: fewer)
        shallow(2)
        text, goals, held_out = here("quickstart.py", *given, "4"), (88, 65), 240
    assert share(text, "clean accuracy") >= goals[0]
    assert share(text, "certified robust accuracy at epsilon = 0.25") >= goals[1]
    assert "PGD attack inside the certified radii: 0 predictions flipped." in text
    assert f"{held_out} of {held_out} flipped" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.keras",
        "certified_accuracy.png",
        "certificate.md",
    }
    with Image.open(tmp_path / "out" / "certified_accuracy.png") as image:
        assert image.size == (900, 600)


@pytest.mark.slow
def test_custom_model(here):
    text = here("custom_model.py", "--epochs", "5")
    assert share(text, "clean accuracy") > 80
    assert float(re.search(r"accuracy on held-out digits: ([0-9.]+)%", text).group(1)) > 80
    defects = re.findall(r"orthonormal to ([0-9.e+-]+)", text)
    assert len(defects) == 2
    assert max(map(float, defects)) < 2e-6


@pytest.mark.slow
@on_jax
def test_attacks_stay_above_the_certificate(tmp_path):
    """foolbox and ART flip no certified prediction; what survives them is at least the CRA."""
    size = ["--samples", "12", "--steps", "5", "--restarts", "1", "--epochs", "3"]
    size += ["--epsilons", "0.1", "0.4", "--output", str(tmp_path / "out")]
    helper, script = ROOT / "tests" / "examples" / "shallow.py", ROOT / "examples" / "attack.py"
    text = run(str(helper), "2", str(script), *size)
    rows = re.findall(r"\| ([0-9.]+) \| ([0-9.]+)% \| ([0-9.]+)% \|", text)
    assert [float(epsilon) for epsilon, _, _ in rows] == [0.1, 0.4]
    clean = float(re.search(r"clean accuracy ([0-9.]+)%", text).group(1))
    for _, certified, empirical in rows:
        assert float(certified) <= float(empirical) <= clean
    # The attacks do their work: at the larger epsilon they break what they cannot at the smaller.
    assert float(rows[1][2]) < float(rows[0][2])
    assert float(re.search(r"certified radius: ([0-9.]+) at the least", text).group(1)) >= 1
    assert "flipped inside 0.999 of their radius: 0\n" in text
    assert {"DDN", "PGD", "APGD-CE", "APGD-DLR", "APGD-T"} <= set(re.findall(r"\] (\S+):", text))
    assert "| 0.4 |" in (tmp_path / "out" / "robust_accuracy.md").read_text()
    with Image.open(tmp_path / "out" / "robust_accuracy.png") as image:
        assert image.size == (900, 600)


@pytest.mark.slow
@on_torch
def test_segmentation(here, tmp_path):
    """Certified pixels beyond what the same network, trained plainly, comes to."""
    size = ["--epochs", "3", "--width", "16", "--depth", "2", "--output", str(tmp_path / "out")]
    text = here("segmentation.py", *size)
    rows = re.findall(r"^\| (LipNeXt|plain) \| (.*) \|$", text, flags=re.M)
    shares = {name: [float(s) for s in re.findall(r"([0-9.]+) %", row)] for name, row in rows}
    ours, plain = shares["LipNeXt"], shares["plain"]
    assert ours[0] > 70
    assert all(a > b for a, b in zip(ours[2:5], plain[2:5]))
    assert all(a >= b for a, b in zip(ours[5:], plain[5:]))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "segmentation.png",
        "certified_accuracy.png",
        "segmentation.md",
        "model.keras",
    }


@pytest.mark.slow
@on_torch
def test_layer_zoo(here, tmp_path):
    size = ["--epochs", "2", "--width", "64", "--depth", "2", "--output", str(tmp_path / "out")]
    text = here("layer_zoo.py", *size)
    rows = re.findall(r"^\| (\w+) \| ([0-9.]+) % \|.*\| ([0-9.]+) \|$", text, flags=re.M)
    assert {name for name, _, _ in rows} == {"orthogonal", "SLL", "CPL", "AOL", "spectral"}
    for _, clean, constant in rows:
        assert float(clean) > 60
        assert float(constant) < 1 + 1e-5
    assert (tmp_path / "out" / "layer_zoo.md").exists()
    with Image.open(tmp_path / "out" / "layer_zoo.png") as image:
        assert image.size == (900, 600)


@pytest.mark.slow
@on_torch
def test_convert(here, tmp_path):
    """The ordinary network is the more accurate one, and certified at no epsilon."""
    text = here("convert.py", "--epochs", "5", "--output", str(tmp_path / "out"))
    row = r"^\| [a-z ]+ \| ([0-9.]+) % \| ([0-9.]+) % \|.*\| ([0-9.]+) \|$"
    rows = re.findall(row, text, flags=re.M)
    plain, converted, trained = (list(map(float, row)) for row in rows)
    assert plain[0] > 90 and plain[1] < 70 and plain[2] > 5
    assert converted[2] < 1.001 and trained[2] < 1.001
    assert trained[0] > 80 and trained[1] > 60
    assert re.search(r"dense(_[0-9]+)? \(Dense\)", text) and "NormalizedDense" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "convert.md",
        "convert.png",
        "model.keras",
    }
    with Image.open(tmp_path / "out" / "convert.png") as image:
        assert image.size == (900, 600)


@pytest.mark.slow
@on_torch
def test_time_series(here, tmp_path):
    size = ["--epochs", "6", "--samples", "400", "--held-out", "60"]
    text = here("time_series.py", *size, "--output", str(tmp_path / "out"))
    assert share(text, "clean accuracy") > 75
    assert share(text, "certified robust accuracy at epsilon = 0.25") > 50
    assert "PGD attack inside the certified radii: 0 predictions flipped." in text
    assert int(re.search(r"at twice the radii: ([0-9]+) of 60 flipped", text).group(1)) > 52
    rows = re.findall(r"epsilon = [0-9.]+: ([0-9.]+)% certified, ([0-9.]+)% survive PGD", text)
    assert len(rows) == 3
    assert all(float(certified) <= float(left) for certified, left in rows)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.keras", "time_series.png"}
    with Image.open(tmp_path / "out" / "time_series.png") as image:
        assert image.size == (1500, 750)


@pytest.mark.slow
@on_jax
def test_wasserstein(here, tmp_path):
    """Below the known distance, and above 0.9 of it."""
    text = here("wasserstein.py", "--epochs", "20", "--output", str(tmp_path / "out"))
    bound = json.loads((tmp_path / "out" / "wasserstein.json").read_text())
    assert 0.9 * 2 < bound["lower_bound"] <= 2
    assert bound["constant"] < 1 + 1e-5 and "proven" in text
    with Image.open(tmp_path / "out" / "wasserstein.png") as image:
        assert image.size == (750, 600)


@pytest.mark.slow
@on_torch
def test_signed_distance(here, tmp_path):
    text = here("signed_distance.py", "--epochs", "10", "--output", str(tmp_path / "out"))
    assert float(re.search(r"Mean error ([0-9.]+)", text).group(1)) < 0.03
    assert (tmp_path / "out" / "signed_distance.png").exists()


@pytest.mark.slow
@on_torch
def test_conformal(here, shallow, monkeypatch, tmp_path):
    """Sets for perturbed digits cover them, where plain sets do not."""
    import quickstart

    shallow(2)
    train, held_out = quickstart.digits()
    fewer = train, tuple(a[:120] for a in held_out)
    monkeypatch.setattr(quickstart, "digits", lambda: fewer)
    text = here("conformal.py", "--epochs", "4", "--output", str(tmp_path / "out"))
    rows = re.findall(r"\| ([0-9.]+) \| ([0-9.]+) % \| ([0-9.]+) % \| ([0-9.]+) \|", text)
    assert len(rows) == 3
    assert all(float(robust) > 85 for _, _, robust, _ in rows)
    assert float(rows[-1][1]) < float(rows[-1][2])
    assert (tmp_path / "out" / "conformal.png").exists()


TRAINING = ("imagenet.py", "cifar10.py", "mnist.py")
RECORDS = {"log.csv", "best.keras", "model.keras", "certificate.html", "certificate.json"}


def check_records(folder, text, epochs):
    """Images were learned and certified, and everything is written."""
    assert {path.name for path in folder.iterdir()} >= RECORDS
    log = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in log] == [str(i) for i in range(epochs)]
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["clean_accuracy"] > 0.6
    smallest = next(iter(certificate["certified_accuracy"].values()))
    assert 0.2 < smallest <= certificate["clean_accuracy"]
    assert certificate["body_constant"] < 1 + 1e-5
    assert share(text, "clean accuracy") == round(100 * certificate["clean_accuracy"], 2)
    assert "</html>" in (folder / "certificate.html").read_text()


def settings(model):
    """(the model's, its optimizer's) in a .keras file."""
    with zipfile.ZipFile(model) as file:
        config = json.loads(file.read("config.json"))
    return config["config"], config["compile_config"]["optimizer"]["config"]


@pytest.mark.slow
@on_jax
def test_imagenet_smoke(tmp_path):
    """From files to the report; matrices over two devices, batches over three: 64 do not divide."""
    folder = tmp_path / "out"
    given = ["--tensorboard", "--model-parallel", "2", "--batch-size", "30"]
    given += ["--smoke", "--depth", "1", "--epochs", "3", "--output", str(folder)]
    text = run("imagenet.py", *given, **virtual_devices(6))
    check_records(folder, text, epochs=3)
    assert {path.name for path in folder.iterdir()} == RECORDS | {"tensorboard"}
    assert list((folder / "tensorboard" / "train").glob("events*"))
    assert "Certified on 64 test images" in text
    network, optimizer = settings(folder / "model.keras")
    assert network["dtype"] == "mixed_bfloat16" and not network["remat"]
    assert not optimizer["use_ema"]


@pytest.mark.slow
@on_torch
def test_cifar10_smoke(here, tmp_path):
    """One file that can be read; an archive of arrays, or of JPEG files, serves as images made."""
    text = here("cifar10.py", "--smoke", "--output", str(tmp_path / "out"))
    check_records(tmp_path / "out", text, epochs=3)
    assert "Certified on 160 test images" in text
    assert len((ROOT / "examples" / "cifar10.py").read_text().splitlines()) <= 150


@pytest.mark.slow
@on_tensorflow
def test_cifar10_with_generated_images(here, tmp_path):
    import cifar10

    images, labels = cifar10.made_up(300, 7)
    np.savez(tmp_path / "made.npz", images=images, labels=labels)
    given = ["--generated", str(tmp_path / "made.npz"), "--output", str(tmp_path / "out")]
    text = here("cifar10.py", "--smoke", *given)
    check_records(tmp_path / "out", text, epochs=3)
    # 456 real images in batches of 8 real and 24 generated ones.
    assert "57/57" in text and "Certified on 160 test images" in text


@pytest.mark.once
def test_generated_images_are_mixed_in(tmp_path):
    """Each real image once an epoch, the share asked for, other orders in other epochs."""
    from image_training import generated

    real = np.full((40, 2, 2, 3), 0.5, "float32"), np.arange(40)
    made = np.full((5, 2, 2, 3), 255, "uint8"), 100 + np.arange(5)
    np.random.seed(0)
    batches = generated.Mixed(real, made, 0.75, 16)
    epochs = []
    for _ in range(2):
        batches.on_epoch_begin()
        x, y = (np.stack(parts) for parts in zip(*(batches[i] for i in range(len(batches)))))
        assert x.shape == (10, 16, 2, 2, 3) and x.dtype == "float32"
        assert (x[:, :4] == 0.5).all() and (x[:, 4:] == 1).all()
        assert sorted(y[:, :4].ravel()) == list(range(40))
        assert np.array_equal(np.bincount(y[:, 4:].ravel())[100:], [24] * 5)
        epochs.append(y)
    assert not np.array_equal(*epochs)
    np.random.seed(0)
    again = generated.Mixed(real, made, 0.75, 16)
    again.on_epoch_begin()
    assert np.array_equal(again[0][1], epochs[0][0])
    for share in (0.0, 1.0, 0.01):
        with pytest.raises(SystemExit, match="needs real and generated images"):
            generated.Mixed(real, made, share, 16)
    with pytest.raises(SystemExit, match="must have the shape"):
        generated.Mixed(real, (made[0][:, :1], made[1]), 0.75, 16)


@pytest.mark.once
def test_generated_images_are_labelled_by_a_model(tmp_path):
    from image_training import generated

    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), "uint8")
    np.savez(tmp_path / "labelled.npz", images=images, labels=np.arange(30)[:, None])
    np.savez(tmp_path / "bare.npz", images=images)
    np.savez(tmp_path / "floats.npz", images=images / 255)
    assert np.array_equal(generated.load(tmp_path / "labelled.npz")[1], np.arange(30))
    model = lip.LipNeXt.from_preset("digits_tiny")
    answers = np.argmax(model.predict(images.astype("float32") / 255, verbose=0), axis=-1)
    found = generated.load(tmp_path / "bare.npz", "digits_tiny")
    assert np.array_equal(found[0], images) and np.array_equal(found[1], answers)
    model.save(tmp_path / "model.keras")
    saved = generated.load(tmp_path / "labelled.npz", str(tmp_path / "model.keras"))
    assert np.array_equal(saved[1], answers)
    for name, message in (("bare", "--labeller"), ("floats", "of uint8")):
        with pytest.raises(SystemExit, match=message):
            generated.load(tmp_path / f"{name}.npz")


@pytest.mark.once
def test_cifar10_reads_archives_of_arrays_and_of_jpeg_files(tmp_path):
    import cifar10

    images, labels = cifar10.made_up(40, 0)
    arrays = {
        f"{part}_{name}": value
        for part in ("train", "test")
        for name, value in (("images", images), ("labels", labels[:, None]))
    }
    np.savez(tmp_path / "arrays.npz", **arrays)
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files):
        Image.fromarray(image).save(file, "JPEG", quality=95)
    encoded = [np.frombuffer(file.getvalue(), "uint8") for file in files]
    jpeg = {"bytes": np.concatenate(encoded), "labels": labels}
    jpeg["offsets"] = np.concatenate([[0], np.cumsum([len(one) for one in encoded])])
    np.savez(
        tmp_path / "jpeg.npz", **{f"{p}_{k}": v for p in ("train", "test") for k, v in jpeg.items()}
    )
    for name, off in (("arrays", 0), ("jpeg", 12)):
        options = argparse.Namespace(smoke=False, data=tmp_path / f"{name}.npz", seed=0)
        train, held_out, (x, y) = cifar10.load(options)
        assert [len(part[0]) for part in (train, held_out)] == [38, 2]
        np.testing.assert_array_equal(y, labels)
        assert np.abs(255 * x - images).mean() <= off


@pytest.mark.slow
def test_mnist_smoke(here, tmp_path):
    """Averaged weights and rematerialisation; on JAX the batches spread over all devices."""
    spread, folder = keras.backend.backend() == "jax", tmp_path / "out"
    arguments = ["--data-parallel"] if spread else ["--remat"]
    arguments += ["--smoke", "--depth", "1", "--epochs", "2"]
    arguments += ["--ema", "0.9", "--certify-images", "100"]
    arguments += ["--output", str(folder)]
    text = here("mnist.py", *arguments)
    check_records(folder, text, epochs=2)
    assert "Certified on 100 test images" in text
    assert f"each of {len(keras.distribution.list_devices()) if spread else 1} device(s)" in text
    network, optimizer = settings(folder / "model.keras")
    assert network["dtype"] == "float32" and network["remat"] == ("--remat" in arguments)
    assert optimizer["use_ema"] and optimizer["ema_momentum"] == 0.9


@pytest.mark.slow
@on_tensorflow
def test_training_that_was_killed_goes_on(here, tmp_path):
    """SIGKILL in the middle of an epoch: the same records and weights in the end, bit by bit."""
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    options = ["--smoke", "--depth", "1", "--epochs", "2", "--output"]
    check_records(plain, here("mnist.py", *options, str(plain)), epochs=2)
    script = str(ROOT / "examples" / "mnist.py")
    helper = str(ROOT / "tests" / "examples" / "killed.py")
    run(helper, script, *options, str(killed), returncode=-signal.SIGKILL)
    assert {path.name for path in killed.iterdir()} == {"backup", "log.csv", "best.keras"}
    text = here("mnist.py", *options, str(killed))
    assert "Epoch 1/2" not in text and "Epoch 2/2" in text
    assert {path.name for path in killed.iterdir()} == RECORDS
    assert (killed / "log.csv").read_bytes() == (plain / "log.csv").read_bytes()
    for name in ("model.keras", "best.keras"):
        ours, theirs = (keras.saving.load_model(folder / name) for folder in (killed, plain))
        for a, b in zip(ours.variables, theirs.variables, strict=True):
            np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


@on_jax
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model-parallel", "3"], "does not divide 2 devices"),
        (["--data-parallel", "--batch-size", "33"], "cannot be split evenly over 2 devices"),
    ],
)
def test_what_cannot_be_spread_is_said(flags, message, here, monkeypatch):
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["cpu:0", "cpu:1"])
    with pytest.raises(SystemExit, match=message):
        here("mnist.py", "--smoke", *flags)


@on_jax
def test_batches_are_spread_over_all_devices(monkeypatch):
    from image_training import recipe

    chosen, network = [], {"size": "tiny", "input_shape": (28, 28, 1), "num_classes": 10}
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["cpu:0", "cpu:1", "cpu:2"])
    monkeypatch.setattr(keras.distribution, "set_distribution", chosen.append)
    options = {"batch_size": 30, "epochs": 2, "dtype": "float32"}
    arguments = argparse.Namespace(data_parallel=True, model_parallel=None, **options)
    assert recipe.distribute(arguments) == 3
    assert [type(one) for one in chosen] == [keras.distribution.DataParallel]
    source = argparse.Namespace(count=lambda part: 91, classes=10)
    assert "each of 3 device(s)" in recipe.summary(arguments, source, network, 3, 3)


DATASETS = {"imagenet.py": "imagenet2012", "mnist.py": "mnist"}


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("script, dataset", DATASETS.items())
def test_missing_data_is_said_at_once(script, dataset, tmp_path):
    """How to get it, before anything heavy is imported."""
    (tmp_path / "tensorflow_datasets.py").touch()  # stands for the package: it is not imported
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "examples" / script)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    imports, message = done.stderr.split(f"There is no prepared '{dataset}' in {tmp_path}")
    command = f"tfds.builder('{dataset}', data_dir='{tmp_path}').download_and_prepare()"
    assert command in message and "--data" in message and "--smoke" in message
    assert ("ILSVRC2012_img_train.tar" in message) == (script == "imagenet.py")
    roots = {line.split("|")[-1].strip().split(".")[0] for line in imports.splitlines()}
    assert "argparse" in roots
    assert not roots & {"keras", "numpy", "tensorflow", "jax", "torch"}


@pytest.mark.once
@pytest.mark.parametrize(
    "script",
    [
        *("quickstart.py", "custom_model.py", "attack.py", "layer_zoo.py", "convert.py"),
        *("wasserstein.py", "signed_distance.py", "conformal.py", "segmentation.py"),
        *("time_series.py", *TRAINING),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what examples import
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert "--epochs" in capsys.readouterr().out


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch):
    import layer_zoo
    import quickstart

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for load in (quickstart.digits, lambda: layer_zoo.load(None, False)):
        with pytest.raises(SystemExit, match="pip install scikit-learn"):
            load()
