"""Every code block of README, docs and docstrings is run.

Blocks of a page share one namespace, as a reader types them one after the other; `fit` takes one
step in the place of its epochs, the size "tiny" has two blocks, and of the digits a few are left to
test. Python that cannot run says so in its fence, `python title="Not run: why"`, and must still
compile. Of a shell block the commands of this package run, and of others what they name exists.
"""

import ast
import inspect
import pathlib
import re
import shlex
import tomllib
import types

import keras
import numpy as np
import pytest
import sklearn.datasets
from data import load_digits_split, small_lipnext
from test_structure import PUBLIC

import keras_lipnext as lip
from keras_lipnext import cli
from keras_lipnext.models.sizes import SIZES

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what examples import
]

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.M | re.S)
NOT_RUN = re.compile(r'title="Not run: [^"]{10,}"')
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def blocks(text):
    """(language, what else the fence says, code) of each fenced block."""
    for indent, language, rest, code in FENCE.findall(text):
        yield language, rest.strip(), inspect.cleandoc("\n" + code) if indent else code


def run(code, names, where):
    exec(compile(code, where, "exec"), names)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """An empty folder for what a page reads and writes, little training, few blocks and images."""
    monkeypatch.chdir(tmp_path)
    fit = keras.Model.fit
    short = {"epochs": 1, "steps_per_epoch": 1, "validation_steps": 1, "verbose": 0}
    monkeypatch.setattr(keras.Model, "fit", lambda *args, **kw: fit(*args, **{**kw, **short}))
    monkeypatch.setitem(SIZES, "tiny", {**SIZES["tiny"], "depth": 2})
    data = sklearn.datasets.load_digits()
    few = types.SimpleNamespace(**{k: data[k][:1512] for k in ("images", "data", "target")})
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: few)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(path, quick):
    names = {"__name__": "page"}
    for number, (language, rest, code) in enumerate(blocks(path.read_text())):
        where = f"{path.name}, block {number}"
        if language == "python":
            if rest:
                assert NOT_RUN.fullmatch(rest), f"{where}: {rest}"
                ast.parse(code)
            else:
                run(code, names, where)
        elif language == "sh":
            for line in code.replace("\\\n", " ").splitlines():
                check_command(shlex.split(line, comments=True), where)
        else:
            assert language in ("", "text", "{toctree}", "bibtex"), f"{where}: {language}"


def check_command(words, where):
    """Runs `lipnext`; of what would download or train it is only seen that it exists."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    match words:
        case ["lipnext", *arguments]:
            try:
                assert cli.main(arguments) == 0, where
            except SystemExit as end:  # of --help
                assert end.code == 0, where
        case ["make", *targets]:
            assert {t for t in targets if "=" not in t} <= TARGETS, where
        case ["pip", "install", *what]:
            named = re.findall(r"\[([\w,]+)\]", " ".join(what))
            assert {extra for names in named for extra in names.split(",")} <= set(EXTRAS), where
        case ["python" | "torchrun", *arguments]:
            (script,) = [a for a in arguments if a.endswith(".py")]
            flags = {a for a in arguments[arguments.index(script) :] if a.startswith("--")}
            text = (ROOT / script).read_text()
            if "image_training" in text:
                text += (ROOT / "examples" / "image_training" / "recipe.py").read_text()
            assert flags <= set(re.findall(r"--[\w-]+", text)), where
        case ["git", *_] | ["cd", _] | []:
            pass
        case _:
            raise AssertionError(f"{where}: nobody knows whether this works: {words}")


def documented():
    """{name: docstring} of all that is public, methods and rooms included."""
    owners = {name: getattr(lip, name) for name in PUBLIC}
    for room in PUBLIC:
        for name in getattr(lip, room).__all__:
            owners[f"{room}.{name}"] = getattr(getattr(lip, room), name)
    found = {}
    for name, owner in owners.items():
        members = vars(owner).items() if inspect.isclass(owner) or "." in name else ()
        for member, value in [("", owner), *members]:
            ours = getattr(inspect.unwrap(getattr(value, "__func__", value)), "__module__", "")
            if not member or (not member.startswith("_") and str(ours).startswith("keras_lipnext")):
                found[f"{name}.{member}".strip(".")] = inspect.cleandoc(value.__doc__ or "")
    return found


DOCSTRINGS = {name: text for name, text in documented().items() if "```python" in text}
# Without an example of their own: shown by that of what answers or raises them.
ANSWERS = {
    "callbacks.DivergenceError": "callbacks.StopOnDivergence",
    "certification.Certificate": "certification.certify",
    "certification.DenseCertificate": "certification.certify",
    "certification.LabelsCertificate": "certification.certify",
    "certification.LipschitzBound": "certification.lipschitz_bound",
    "guarantees.ConformalPredictor": "guarantees.conformal",
    "guarantees.Enclosure": "guarantees.enclose",
    "guarantees.WassersteinBound": "guarantees.wasserstein",
    "lmi.LipschitzResult": "lmi.eclipse_fast",
    "lmi.TransformedNetwork": "lmi.loop_transformation",
    "models.Change": "models.convert",
    "models.Conversion": "models.convert",
    "models.Estimate": "models.LipNeXt",
}


@pytest.fixture(scope="module")
def prepared():
    """What examples of docstrings take for granted: data, a trained model, a compiled one."""
    (x_train, y_train), (x, y) = load_digits_split()
    x_train, y_train, x, y = x_train[:64], y_train[:64], x[:16], y[:16]
    keras.utils.set_random_seed(1)
    model = small_lipnext(width=32, epsilon=0.1)
    model.fit(x_train, y_train, epochs=1, verbose=0)
    return {
        "keras": keras,
        "keras_lipnext": lip,
        "np": np,
        "x": x,
        "y": y,
        "model": model,
        **{f"x_{part}": x for part in ("val", "test")},
        **{f"y_{part}": y for part in ("val", "test")},
        "x_train": x_train,
        "y_train": y_train,
    }


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_docstring(name, prepared, quick):
    names = dict(prepared)
    for language, rest, code in blocks(DOCSTRINGS[name]):
        if rest:
            assert NOT_RUN.fullmatch(rest)
            ast.parse(code)
        elif language == "python":
            run(code, names, name)


def test_every_public_name_has_an_example():
    names = {f"{room}.{name}" for room in PUBLIC for name in getattr(lip, room).__all__}
    shown = {name for name in names if any(d.startswith(name) for d in DOCSTRINGS)}
    assert names - shown == set(ANSWERS)
    assert set(ANSWERS.values()) <= shown
