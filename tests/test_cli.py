"""The command `lipnext`: what it prints and writes, and every file it must refuse."""

import datetime
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
import quickstart
from data import dense_model

import keras_lipnext as lip
from keras_lipnext.cli import main
from keras_lipnext.cli.command import _parser

CUSTOM = """
import keras

print("chatter")

@keras.saving.register_keras_serializable("auditee")
class Halve(keras.layers.Layer):
    lipschitz_constant = 0.5

    def call(self, x):
        return x / 2

@keras.saving.register_keras_serializable("auditee")
class Stages(keras.layers.Layer):
    lipschitz_constant = 1.0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stages = [[keras.layers.Dense(6)], [keras.layers.Dense(6)]]

    def build(self, shape):
        for (stage,) in self.stages:
            stage.build(shape)

    def call(self, x):
        for (stage,) in self.stages:
            x = stage(x)
        return x
"""


def image_model():
    inputs = keras.Input((8, 8, 1))
    x = lip.layers.PatchEmbedding(4, 16, name="stem")(inputs)
    x = lip.layers.L2Pool()(lip.layers.SpatialShift(1 / 8)(x))
    return lip.CertifiableModel(inputs, lip.layers.NormalizedDense(10)(x))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """dense.keras and images.keras with their data, x and y, as .npz."""
    keras.utils.set_random_seed(1)
    folder = tmp_path_factory.mktemp("audit")
    random = np.random.default_rng(0)
    for name, model in (("dense", dense_model()), ("images", image_model())):
        model.save(folder / f"{name}.keras")
        x = random.random((30, *model.input_shape[1:]))
        y = random.integers(0, model.output_shape[-1], 30)
        np.savez(folder / f"{name}.npz", x=x, y=y)
    return folder


@pytest.fixture
def lipnext(folder, capsys, monkeypatch):
    """Runs the command in the folder; returns (status, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def run(*words):
        status = main(list(map(str, words)))
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def refuses(lipnext):
    """Asserts that the command fails with one message on stderr that holds all these words."""

    def run(words, *expected, lines=1):
        status, out, err = lipnext(*words)
        assert status == 1
        assert out == ""
        messages = [line for line in err.splitlines() if not line.startswith("lipnext: WARNING")]
        assert len(messages) == lines, err
        assert messages[0].startswith("lipnext: error: ")
        for word in expected:
            assert str(word) in err

    return run


@pytest.mark.parametrize("arithmetic", ["real", "float64", "float32"])
def test_certify_programs(lipnext, tmp_path, arithmetic):
    """The arithmetic is asked for, shown and written; a program costs some of the radius."""
    words = ("certify", "dense.keras", "dense.npz", "--arithmetic", arithmetic, "--samples")
    status, out, _ = lipnext(*words, "--json", tmp_path / "c.json", "--report", tmp_path / "c.html")
    assert status == 0
    assert f"\narithmetic: {arithmetic}: the radii hold of the function" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["arithmetic"] == arithmetic
    page = (tmp_path / "c.html").read_text()
    program = f"every program that evaluates it in {arithmetic}"
    assert (program in page) == (program in out) == (arithmetic != "real")
    lipnext(*words, "--json", tmp_path / "c.json", "--arithmetic", "real")
    real = json.loads((tmp_path / "c.json").read_text())["per_sample"]["radii"]
    given = found["per_sample"]["radii"]
    assert all(a <= b for a, b in zip(given, real))
    assert (given == real) == (arithmetic == "real")


def altered(path, target, weights=None, config=None, drop=(), repeat=()):
    """Copies a .keras file, its HDF5 file and its configuration changed by functions."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name == "model.weights.h5" and weights:
                file = io.BytesIO(content)
                with h5py.File(file, "r+") as h5:
                    weights(h5)
                content = file.getvalue()
            if name == "config.json" and config:
                tree = json.loads(content)
                config(tree)
                content = json.dumps(tree).encode()
            if name not in drop:
                copy.writestr(name, content)
        for name in repeat:
            with pytest.warns(UserWarning, match="Duplicate name"):
                copy.writestr(name, source.read(name))
    return target


def test_certify(lipnext, folder):
    files = {option: folder / f"out.{option}" for option in ("report", "json", "markdown")}
    status, out, err = lipnext(
        *("certify", "images.keras", "images.npz", "--epsilons", "0.1", "0.25"),
        *("--batch-size", 8, "--limit", 20),
        *(word for option, path in files.items() for word in (f"--{option}", path)),
    )
    assert (status, err) == (0, "")
    assert out.startswith("samples   ")
    assert "certified robust accuracy at epsilon = 0.25" in out
    assert "Not promised:" in out
    summary = json.loads(files["json"].read_text())
    assert summary["samples"] == 20
    data = np.load(folder / "images.npz")
    model = keras.models.load_model(folder / "images.keras", compile=False)
    expected = lip.certify(model, data["x"][:20], data["y"][:20], (0.1, 0.25), verbose=0)
    assert summary["certified_accuracy"] == {
        str(e): share for e, share in expected.certified_accuracy.items()
    }
    assert summary["evidence"]["weights_hash"] == expected.evidence.weights_hash
    assert files["report"].read_text().startswith("<!DOCTYPE html>")
    assert files["markdown"].read_text().startswith("| quantity | value |")


def test_progress_goes_to_stderr(lipnext, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, out, err = lipnext("certify", "dense.keras", "dense.npz")
    assert out.startswith("samples   ")
    assert "/batch" in err


def test_certify_without_labels(lipnext, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((5, 6)))
    status, out, _ = lipnext("certify", "dense.keras", tmp_path / "x.npz")
    assert status == 0
    assert "share of predictions certified at epsilon = 0.1412" in out
    assert "accuracy" not in out


def test_many_decisions(lipnext, refuses, tmp_path):
    inputs = keras.Input((4, 4, 2))
    model = keras.Model(inputs, lip.layers.NormalizedDense(2)(inputs))
    model.save(tmp_path / "dense.keras")
    x = np.random.default_rng(0).uniform(size=(3, 4, 4, 2)).astype("float32")
    y = model.predict(x, verbose=0).argmax(axis=-1)
    y[:, 0] = -1
    np.savez(tmp_path / "data.npz", x=x, y=y)
    words = ["certify", tmp_path / "dense.keras", tmp_path / "data.npz"]
    status, text, _ = lipnext(*words, "--ignore-class", "-1", "--json", tmp_path / "c.json")
    assert status == 0
    assert re.search(r"mean IoU +100.00%", text)
    assert json.loads((tmp_path / "c.json").read_text())["positions"] == [4, 4]
    page = ["--report", tmp_path / "page.html"]
    refuses([*words, *page], "--report writes a page on one decision a sample")


def test_inspect(lipnext, tmp_path):
    status, out, err = lipnext("inspect", "images.keras", "--json", tmp_path / "model.json")
    assert (status, err) == (0, "")
    summary = json.loads((tmp_path / "model.json").read_text())
    model = keras.models.load_model("images.keras", compile=False)
    bound = model.lipschitz_bound()
    assert summary["constant"] == bound.constant
    assert summary["body_constant"] == bound.body_constant
    assert f"{bound.constant:.10g} of the model, from input to output" in out
    assert summary["how_proven"] in out
    assert summary["weights_hash"] in out
    assert f"{summary['parameters']:,} parameters" in out
    assert "(None, 8, 8, 1) to (None, 10)" in out
    assert [layer["name"] for layer in summary["layers"]] == [r.name for r in bound.layers]
    for layer in bound.layers:
        assert layer.name in out
    assert summary["defects"].keys() == {"stem"}
    assert 0 < summary["defects"]["stem"] < 1e-6


def test_defects_show_a_kernel_off_the_manifold(lipnext, tmp_path):
    model = dense_model()
    layer = model.layers[1]
    layer.kernel.assign(1.5 * np.eye(6))
    model.save(tmp_path / "off.keras")
    lipnext("inspect", tmp_path / "off.keras", "--json", tmp_path / "off.json")
    summary = json.loads((tmp_path / "off.json").read_text())
    assert summary["defects"][layer.name] == pytest.approx(1.25)


@pytest.mark.slow
def test_python_m_keras_lipnext_prints_the_report_alone(folder):
    done = subprocess.run(
        [sys.executable, "-m", "keras_lipnext", "inspect", "dense.keras"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model      certifiable_model")
    assert done.stdout.rstrip().splitlines()[-1].startswith("orthogonal_dense")


def test_a_preset_in_place_of_a_file(lipnext, tmp_path):
    """Certified on the images held out, it answers what its own certificate says."""
    status, out, _ = lipnext("presets")
    assert status == 0
    (line,) = (line for line in out.splitlines() if line.startswith("digits_tiny"))
    x, y = quickstart.digits()[1]
    np.savez(tmp_path / "digits.npz", x=x, y=y)
    report = tmp_path / "report.json"
    status, *_ = lipnext("certify", "digits_tiny", str(tmp_path / "digits.npz"), "--json", report)
    found = json.loads(report.read_text())
    assert status == 0
    assert f"  {found['clean_accuracy']:.1%}  " in line
    assert found["source"]["files"][0]["name"] == "digits_tiny"
    lip.LipNeXt.from_preset("digits_tiny").save_to_preset(tmp_path / "mine")
    status, _, error = lipnext(
        "inspect", tmp_path / "mine", "--json", tmp_path / "mine" / "model.weights.h5"
    )
    assert status == 1 and "is read by this command, and would be overwritten" in error


def test_hash(lipnext, refuses, tmp_path):
    lipnext("inspect", "dense.keras", "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())["weights_hash"]
    assert lipnext("inspect", "dense.keras", "--expect-hash", found.upper())[0] == 0
    status, *_ = lipnext("certify", "dense.keras", "dense.npz", "--expect-hash", found)
    assert status == 0
    for command in (["inspect", "dense.keras"], ["certify", "dense.keras", "dense.npz"]):
        refuses([*command, "--expect-hash", "0" * 64], found, "0" * 64, "other weights")


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Imports the auditee's module from a folder of its own, and forgets it again."""
    (tmp_path / "auditee.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)

    def forget():
        sys.modules.pop("auditee", None)
        for name in [n for n in keras.saving.get_custom_objects() if n.startswith("auditee>")]:
            del keras.saving.get_custom_objects()[name]

    import auditee

    yield auditee, forget
    forget()


def test_a_class_of_ones_own_needs_its_module(custom, lipnext, refuses, tmp_path):
    auditee, forget = custom
    inputs = keras.Input((6,))
    outputs = lip.layers.NormalizedDense(4)(auditee.Halve(name="halve")(inputs))
    path = tmp_path / "halve.keras"
    keras.Model(inputs, outputs).save(path)
    forget()
    refuses(["inspect", path], "needs the class 'Halve'", "--import MODULE")
    refuses(["inspect", path, "--import", "no_such"], "Module 'no_such' cannot be imported")
    status, out, err = lipnext("inspect", path, "--import", "auditee")
    assert status == 0
    assert "WARNING: not fully proven. The constants of halve were declared" in err
    assert "declared, not proven" in out
    assert "chatter" not in out  # stdout is for the report alone
    assert "chatter" in err
    status, out, err = lipnext("certify", path, "dense.npz", "--strict")
    assert status == 1
    assert "Lipschitz constant K, input to head, partly declared" in out
    assert err.endswith("lipnext: error: with --strict, every constant must be proven.\n")


def test_names_cannot_forge_lines(lipnext, tmp_path):
    inputs = keras.Input((6,))
    name = "a\nclean accuracy   100.00%\x1b[2J"
    outputs = lip.layers.NormalizedDense(4)(lip.layers.BetaAbs(name=name)(inputs))
    keras.Model(inputs, outputs, name=name).save(tmp_path / "forged.keras")
    status, out, _ = lipnext("inspect", tmp_path / "forged.keras")
    assert status == 0
    assert out.count("a\\nclean accuracy   100.00%\\x1b[2J") == 2
    assert "\nclean accuracy" not in out
    assert "\x1b" not in out


# Model files.


def test_missing_and_foreign_files(refuses, tmp_path):
    refuses(["inspect", "absent.keras"], "absent.keras: no such file")
    refuses(["inspect", "model.h5"], "model.h5: expected a .keras file")
    (tmp_path / "text.keras").write_text("not a zip")
    refuses(["inspect", tmp_path / "text.keras"], "truncated or damaged", "not a zip")


def test_truncated_file(refuses, folder, tmp_path):
    content = (folder / "dense.keras").read_bytes()
    for share in (0.3, 0.9):
        (tmp_path / "cut.keras").write_bytes(content[: int(share * len(content))])
        refuses(["inspect", tmp_path / "cut.keras"], "truncated or damaged")


def test_flipped_bit(refuses, folder, tmp_path):
    content = bytearray((folder / "dense.keras").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bit.keras").write_bytes(content)
    refuses(["inspect", tmp_path / "bit.keras"], "checksum of model.weights.h5 is wrong")


@pytest.mark.parametrize("member", ["config.json", "metadata.json", "model.weights.h5"])
def test_missing_member(member, refuses, folder, tmp_path):
    path = altered(folder / "dense.keras", tmp_path / "part.keras", drop=[member])
    refuses(["inspect", path], f"lacks {member}", "Received: [")


def test_member_twice(refuses, folder, tmp_path):
    path = altered(folder / "dense.keras", tmp_path / "twice.keras", repeat=["config.json"])
    refuses(["inspect", path], "holds a member twice")


KERNEL = "layers/orthogonal_dense/vars/0"


def without(name):
    def change(h5):
        del h5[name]

    return change


def replaced(array):
    def change(h5):
        del h5[KERNEL]
        h5[KERNEL] = array

    return change


def added(name):
    def change(h5):
        h5[name] = np.zeros(3, "float32")

    return change


@pytest.mark.parametrize(
    "change, reason",
    [
        (without(KERNEL), "OrthogonalDense name="),
        (without("layers/orthogonal_dense/vars"), "OrthogonalDense name="),
        (without("layers/orthogonal_dense"), "OrthogonalDense name="),
        (without("layers"), "NormalizedDense name="),
        (replaced(np.zeros((5, 6))), "OrthogonalDense name="),
        (replaced(np.zeros((1, 6))), "OrthogonalDense name="),
        (replaced(np.float32(1)), "OrthogonalDense name="),
        (replaced(np.full((6, 6), b"text")), "OrthogonalDense name="),
        (added("layers/orthogonal_dense/vars/7"), "OrthogonalDense name="),
        (added("layers/other/vars/0"), "no layer of its configuration reads: layers/other/vars/0"),
        # Keras loads it, rounded to the float32 of the kernel.
        (replaced(np.eye(6) + 1e-12), f"'{KERNEL}' was not loaded as it is stored"),
    ],
)
def test_weights_that_do_not_fit(change, reason, refuses, folder, tmp_path):
    path = altered(folder / "dense.keras", tmp_path / "weights.keras", weights=change)
    refuses(["inspect", path], reason)
    refuses(["certify", path, "dense.npz"], reason)


@pytest.mark.parametrize("group", ["stages", "stages/container", "stages/container_1"])
def test_missing_nested_weights_which_keras_leaves_random(group, custom, refuses, tmp_path):
    """Keras warns, loads and keeps fresh random weights: nothing to certify."""
    auditee, _ = custom
    inputs = keras.Input((6,))
    outputs = lip.layers.NormalizedDense(4)(auditee.Stages()(inputs))
    keras.Model(inputs, outputs).save(tmp_path / "stages.keras")
    path = altered(
        tmp_path / "stages.keras",
        tmp_path / "part.keras",
        weights=without(f"layers/stages/{group}"),
    )
    with pytest.warns(UserWarning, match="retain their freshly-initialized weights"):
        keras.models.load_model(path)
    refuses(["inspect", path], "lacks weights of the model", f"layers/stages/{group}")


def test_damaged_hdf5_inside_a_sound_archive(refuses, folder, tmp_path):
    path = tmp_path / "hdf5.keras"
    with zipfile.ZipFile(folder / "dense.keras") as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            copy.writestr(name, content[:3000] if name == "model.weights.h5" else content)
    refuses(["inspect", path], "Keras cannot load it", "truncated file")


def layer_config(tree, kind):
    return next(e for e in tree["config"]["layers"] if e["class_name"] == kind)["config"]


def more_units(tree):
    layer_config(tree, "NormalizedDense")["units"] = 9


def unknown_argument(tree):
    layer_config(tree, "NormalizedDense")["bogus"] = 1


def foreign_class(tree):
    entry = next(e for e in tree["config"]["layers"] if e["class_name"] == "BetaAbs")
    entry.update(module="os", class_name="system", registered_name=None)


def no_model(tree):
    tree.clear()


@pytest.mark.parametrize(
    "change, reason",
    [
        (more_units, "its weights do not fit its configuration"),
        (unknown_argument, "Keras cannot load it: "),
        (foreign_class, "needs the class 'system'"),
        (no_model, "Keras cannot load it: "),
    ],
)
def test_altered_configuration(change, reason, refuses, folder, tmp_path):
    path = altered(folder / "dense.keras", tmp_path / "config.keras", config=change)
    refuses(["inspect", path], reason)


def test_lambda_layers_are_not_run(refuses, tmp_path):
    inputs = keras.Input((6,))
    outputs = lip.layers.NormalizedDense(4)(keras.layers.Lambda(lambda x: 2 * x)(inputs))
    keras.Model(inputs, outputs).save(tmp_path / "lambda.keras")
    refuses(["inspect", tmp_path / "lambda.keras"], "holds code of its own", "Lambda")


def test_layers_without_a_constant_are_all_named(refuses, tmp_path):
    inputs = keras.Input((6,))
    x = keras.layers.LayerNormalization(name="first")(inputs)
    x = keras.layers.LayerNormalization(name="second")(x)
    keras.Model(inputs, lip.layers.NormalizedDense(4)(x)).save(tmp_path / "norm.keras")
    path = tmp_path / "norm.keras"
    refuses(["inspect", path], "Layer 'first'", "Layer 'second'", "lipschitz_rule", lines=2)
    refuses(["certify", path, "dense.npz"], "Layer 'first'", "cannot be certified")


def test_bfloat16_model_file(lipnext, tmp_path):
    """Its weights are compared bit by bit, whatever NumPy thinks of bfloat16."""
    keras.config.set_dtype_policy("bfloat16")
    dense_model().save(tmp_path / "half.keras")
    status, out, _ = lipnext("certify", tmp_path / "half.keras", "dense.npz")
    assert status == 0
    assert "The model computes in bfloat16" in out


# Data files.


def data_file(path, **arrays):
    np.savez(path, **arrays)
    return path


X, Y = np.full((4, 6), 0.5), np.arange(4)
BAD = X.copy()
BAD[2, 3] = np.nan


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"images": X, "labels": Y}, "no inputs named x or x_test: choose by --x-key. Received: ["),
        ({"y": Y}, "Received: ['y']"),
        ({"x": X, "x_test": X, "y": Y}, "holds both x and x_test: choose by --x-key"),
        ({"x": X.astype(object)}, "holds Python objects"),
        ({"x": X, "y": Y.astype(object)}, "holds Python objects"),
        ({"x": np.float64(1)}, "x must have a batch axis"),
        ({"x": X[:, :5]}, "takes x of shape (n, 6). Received: shape (4, 5)"),
        ({"x": X[0]}, "takes x of shape (n, 6). Received: shape (6,)"),
        ({"x": X[:0]}, "nothing to certify"),
        ({"x": X.astype(str)}, "x must be real numbers. Received: dtype <U"),
        ({"x": BAD}, "NaN or infinity in 1 of 4 samples, the first at index 2"),
        ({"x": np.where(X > 1, X, np.inf)}, "NaN or infinity in 4 of 4 samples"),
        ({"x": X, "y": Y[:3]}, "4 inputs, 3 labels"),
        ({"x": X, "y": Y + 1}, "The model has 4 classes"),
        ({"x": X, "y": -Y}, "labels from -3 to 0"),
        ({"x": X, "y": np.where(Y > 1, Y, np.nan)}, "labels that are NaN or infinite"),
        ({"x": X, "y": np.zeros((4, 3))}, "Received: shape=(4, 3)"),
    ],
)
def test_data_that_does_not_fit(arrays, reason, refuses, tmp_path):
    path = data_file(tmp_path / "data.npz", **arrays)
    refuses(["certify", "dense.keras", path], reason)


def test_limit_does_not_hide_a_mismatch(refuses, tmp_path):
    path = data_file(tmp_path / "data.npz", x=X, y=Y[:3])
    refuses(["certify", "dense.keras", path, "--limit", 2], "4 inputs, 3 labels")


def test_files_that_are_no_npz(refuses, folder, tmp_path):
    refuses(["certify", "dense.keras", "absent.npz"], "absent.npz: no such file")
    (tmp_path / "text.npz").write_text("1, 2, 3")
    refuses(
        ["certify", "dense.keras", tmp_path / "text.npz"], "no .npz or .npy file of plain arrays"
    )
    (tmp_path / "empty.npy").write_text("")
    refuses(["certify", "dense.keras", tmp_path / "empty.npy"], "empty.npy: ")
    content = (folder / "dense.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    refuses(["certify", "dense.keras", tmp_path / "cut.npz"], "cut.npz")
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 1
    (tmp_path / "bit.npz").write_bytes(flipped)
    refuses(["certify", "dense.keras", tmp_path / "bit.npz"], "Bad CRC-32")


@pytest.mark.parametrize(
    "x, reason",
    [
        (np.arange(24, dtype="uint8").reshape(4, 6) * 11, "range from 0 to 253"),
        (X - 1, "range from -0.5 to -0.5"),
        (np.linspace(-1, 1, 24).reshape(4, 6), "0.1 here is 0.05 of the range"),
    ],
)
def test_inputs_outside_0_1_are_warned_of(x, reason, lipnext, tmp_path):
    path = data_file(tmp_path / "data.npz", x=x)
    status, out, err = lipnext("certify", "dense.keras", path, "--epsilons", 0.1)
    assert status == 0
    assert out.startswith("samples")
    assert err.startswith("lipnext: WARNING: Inputs range from ")
    assert reason in err


def test_arrays_of_other_names_and_files(lipnext, folder, tmp_path):
    """Each way to name the same inputs and labels certifies the same."""
    data = np.load(folder / "dense.npz")
    x, y = data["x"], data["y"]
    objects = np.array([{}], dtype=object)  # is not read
    data_file(tmp_path / "keras.npz", x_train=objects, y_train=objects, x_test=x, y_test=y)
    data_file(tmp_path / "named.NPZ.npz", images=x, labels=y, x=x[:3], y=y[:3])
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    (tmp_path / "x.npy").rename(tmp_path / "x.NPY")
    out = tmp_path / "out.json"
    expected = None
    for words in (
        ["dense.npz"],
        [tmp_path / "keras.npz"],
        [tmp_path / "named.NPZ.npz", "--x-key", "images", "--y-key", "labels"],
        [tmp_path / "x.NPY", "--labels", tmp_path / "y.npy"],
        [tmp_path / "named.NPZ.npz", "--x-key", "images", "--labels", tmp_path / "y.npy"],
    ):
        status, _, err = lipnext("certify", "dense.keras", *words, "--json", out, "--samples")
        assert (status, err) == (0, "")
        found = json.loads(out.read_text())
        assert found["per_sample"]["labels"] == y.tolist()
        expected = expected or found["per_sample"]
        assert found["per_sample"] == expected
    assert lipnext("certify", "dense.keras", tmp_path / "x.NPY", "--json", out)[0] == 0
    assert json.loads(out.read_text())["clean_accuracy"] is None


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--x-key", "images"], "holds no array 'images'. Received: ['x', 'y']"),
        (["--y-key", "labels"], "holds no array 'labels'. Received: ['x', 'y']"),
        (["--y-key", "y", "--labels", "y.npy"], "asked for twice"),
        (["--labels", "absent.npy"], "absent.npy: no such file"),
        (["--labels", "dense.npz"], "dense.npz: must be an .npy file of labels"),
    ],
)
def test_names_that_do_not_fit(words, reason, refuses):
    refuses(["certify", "dense.keras", "dense.npz", *words], reason)


def test_keys_are_not_for_single_arrays(refuses, tmp_path):
    np.save(tmp_path / "x.npy", X)
    refuses(["certify", "dense.keras", tmp_path / "x.npy", "--x-key", "x"], "is a single array")
    np.save(tmp_path / "y.npy", Y[:3])
    words = ["certify", "dense.keras", tmp_path / "x.npy", "--labels", tmp_path / "y.npy"]
    refuses(words, "y.npy: x and y must match. Received: 4 inputs, 3 labels")


def test_a_suffix_in_capitals(lipnext, folder, tmp_path):
    path = tmp_path / "DENSE.KERAS"
    path.write_bytes((folder / "dense.keras").read_bytes())
    status, out, _ = lipnext("inspect", path)
    assert status == 0
    assert str(path) in out


def test_the_report_names_files_date_and_command(lipnext, folder, tmp_path):
    out = tmp_path / "out.json"
    words = ["certify", "dense.keras", "dense.npz", "--limit", "5", "--json", str(out)]
    words += ["--report", str(tmp_path / "page.html")]
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    status, text, _ = lipnext(*words)
    assert status == 0
    source = json.loads(out.read_text())["source"]
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("dense.keras", "dense.npz")
    }
    assert source["files"] == [
        {
            "role": role,
            "name": name,
            "sha256": digests[name],
            "arrays": arrays,
        }
        for role, name, arrays in (("model", "dense.keras", []), ("data", "dense.npz", ["x", "y"]))
    ]
    assert source["command"] == shlex.join(["lipnext", *words])
    made = datetime.datetime.fromisoformat(source["date"])
    assert before <= made <= datetime.datetime.now(datetime.UTC)
    page = (tmp_path / "page.html").read_text()
    for report in (text, page):
        assert f"dense.keras, sha256 {digests['dense.keras']}" in report
        assert f"dense.npz, x, y, sha256 {digests['dense.npz']}" in report
        assert f"{source['date']} by: lipnext certify" in report
    status, text, _ = lipnext("inspect", "dense.keras", "--json", out)
    assert json.loads(out.read_text())["source"]["files"][0]["sha256"] == digests["dense.keras"]
    assert digests["dense.keras"] in text


def test_samples_on_demand(lipnext, tmp_path):
    out = tmp_path / "out.json"
    for words, wanted in ((["--samples"], True), ([], False)):
        assert lipnext("certify", "dense.keras", "dense.npz", "--json", out, *words)[0] == 0
        found = json.loads(out.read_text())
        assert ("per_sample" in found) == wanted
        if wanted:
            model = keras.models.load_model("dense.keras", compile=False)
            data = np.load("dense.npz")
            expected = lip.certify(model, data["x"], data["y"], verbose=0)
            assert found["per_sample"] == {
                "predictions": expected.predictions.tolist(),
                "radii": expected.radii.tolist(),
                "labels": data["y"].tolist(),
            }


# Options.


def test_epsilons_may_be_fractions(lipnext, tmp_path):
    out = tmp_path / "out.json"
    words = ["certify", "dense.keras", "dense.npz", "--json", out, "--epsilons"]
    assert lipnext(*words, "36/255", "0.25", "1e-3")[0] == 0
    shares = json.loads(out.read_text())["certified_accuracy"]
    assert list(shares) == [str(36 / 255), "0.25", "0.001"]


def test_negative_epsilon(refuses):
    words = ["certify", "dense.keras", "dense.npz", "--epsilons"]
    refuses([*words, "-0.1"], "`epsilons` must be finite and not negative", "-0.1")
    refuses([*words, "nan"], "`epsilons` must be finite and not negative")


@pytest.mark.parametrize(
    "words",
    [
        ["--limit", "0"],
        ["--batch-size", "-3"],
        ["--expect-hash", "abc"],
        ["--epsilons", "small"],
        ["--epsilons", "36/0"],
        ["--epsilons", "36/255/2"],
        ["--safe-mode", "off"],
    ],
)
def test_wrong_options(words, lipnext, capsys):
    with pytest.raises(SystemExit) as exit:
        lipnext("certify", "dense.keras", "dense.npz", *words)
    assert exit.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_targets_are_checked_first(refuses, monkeypatch):
    words = ["certify", "absent.keras", "dense.npz"]
    refuses([*words, "--json", "nowhere/out.json"], "nowhere/out.json: there is no such folder")
    refuses([*words, "--json", "."], "is a folder, not a file")
    refuses([*words, "--json", "a", "--report", "./a"], "./a: is written by this command")
    refuses([*words, "--json", "dense.npz"], "dense.npz: is read by this command")
    refuses([*words, "--samples"], "--samples adds to the JSON file")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refuses([*words, "--json", "out.json"], "out.json: may not be written to")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuses([*words, "--report", "out.html"], "pip install 'keras_lipnext[plot]'")


def test_an_error_in_someone_elses_layer_is_one_line(refuses, monkeypatch):
    def fail(*args):
        raise KeyError("config")

    monkeypatch.setattr("keras_lipnext.cli.command.read", fail)
    refuses(["inspect", "dense.keras"], "KeyError: 'config'")


HELP = {"lipnext": [], "lipnext_certify": ["certify"], "lipnext_inspect": ["inspect"]}
HELP["lipnext_presets"] = ["presets"]


@pytest.mark.once
@pytest.mark.parametrize("page", HELP)
def test_help_is_what_the_documents_show_and_its_examples_parse(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([*HELP[page], "--help"])
    text = capsys.readouterr().out
    file = pathlib.Path(__file__).parents[1] / "docs" / "cli" / f"{page}.txt"
    shown = f"$ {' '.join(['lipnext', *HELP[page], '--help'])}\n{text}"
    assert file.read_text() == shown, f"{file} should be:\n{shown}"
    examples = re.findall(r"^  (lipnext .*)", text, re.M)
    assert len(examples) >= 3 and max(map(len, examples)) < 78
    for example in examples:
        try:
            _parser().parse_args(shlex.split(example)[1:])
        except SystemExit as end:  # of --help; of an option that does not exist it is 2
            assert end.code == 0, example
