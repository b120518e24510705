"""The house's rules that a reader relies on, checked on the source."""

import ast
import functools
import graphlib
import pathlib

import keras
import pytest

import keras_lipnext as lip

pytestmark = pytest.mark.once

PACKAGE = pathlib.Path(lip.__file__).parent
# From the ground up: each room, or file beside them, with the rooms that it may read.
ROOMS = {
    "version": set(),
    "installation": set(),
    "typing": set(),
    "arguments": set(),
    "norms": set(),
    "overrides": set(),
    "activations": {"norms", "overrides"},
    "backend": {"installation"},
    "distribution": {"backend"},
    "batches": {"arguments"},
    "radius": {"backend", "norms"},
    "manifolds": {"backend", "typing"},
    "layers": {"activations", "arguments", "backend", "manifolds", "typing"},
    "optimizers": {"arguments", "backend", "distribution", "manifolds", "typing"},
    "losses": {"arguments", "radius", "typing"},
    "metrics": {"arguments", "radius", "typing"},
    "lipschitz": {
        *("activations", "arguments", "backend", "layers", "manifolds", "norms", "overrides"),
        "typing",
    },
    "twin": {
        *("activations", "arguments", "backend", "lipschitz", "norms", "overrides"),
    },
    "report": {"installation", "lipschitz", "typing", "version"},
    "certification": {
        *("activations", "arguments", "backend", "batches", "distribution", "radius"),
        *("norms", "lipschitz", "report", "twin", "typing"),
    },
    "guarantees": {
        *("arguments", "batches", "certification", "distribution"),
        *("lipschitz", "norms", "radius", "report", "typing"),
    },
    "lmi": {
        *("activations", "arguments", "backend", "installation", "layers", "lipschitz"),
        *("norms", "overrides", "typing"),
    },
    "models": {
        *("arguments", "backend", "batches", "distribution", "manifolds"),
        *("layers", "optimizers", "losses", "metrics", "lipschitz", "report", "certification"),
        "activations",
        *("installation", "typing", "version"),
    },
    "callbacks": {"arguments", "backend", "models", "typing"},
    "cli": {
        *("backend", "installation", "version", "manifolds"),
        *("lipschitz", "report", "certification", "lmi", "models"),
    },
}
FOYER = {"__init__", "__main__"}
PUBLIC = [
    "manifolds",
    "layers",
    "certification",
    "guarantees",
    "lmi",
    "optimizers",
    "losses",
    "metrics",
    "models",
    "callbacks",
]


def modules():
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def imported(path):
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_backend_folder_imports_a_backend(path):
    if path.parent.name != "backend":
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"jax", "torch", "tensorflow"}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def read_by(path):
    """Names of the modules of this package that a file imports."""
    for name in imported(path):
        if name.startswith("keras_lipnext."):
            target = PACKAGE.joinpath(*name.split(".")[1:])
            if target.is_dir():
                yield target / "__init__.py"
            elif target.with_suffix(".py").exists():
                yield target.with_suffix(".py")


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in modules()} == ROOMS.keys() | FOYER


@pytest.mark.parametrize("room", ROOMS)
def test_imports_never_run_back_up(room):
    read = {room_of(p) for path in modules() if room_of(path) == room for p in read_by(path)}
    assert read <= ROOMS[room] | {room}


def test_no_room_stands_above_itself():
    order = list(graphlib.TopologicalSorter(ROOMS).static_order())
    assert order.index("radius") < order.index("losses") < order.index("models")


def test_no_circle_of_files():
    files = {path: {p for p in read_by(path) if p.name != "__init__.py"} for path in modules()}
    graphlib.TopologicalSorter(files).prepare()  # raises, naming the circle


BY_NAME = ("getattr", "hasattr", "setattr")


def attributes(path):
    """(object, name) of each attribute that a file reads or sets, as source."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            yield ast.unparse(node.args[0]), str(getattr(node.args[1], "value", ""))


def defined(path):
    """Names that a file gives its own functions, classes and attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        stored = isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store)
        if stored and isinstance(node, ast.Name):
            yield node.id
        elif stored and ast.unparse(node.value) in ("self", "cls", "block"):
            yield node.attr


PRIVATE = "backend/keras_private.py"


@functools.cache
def own_names():
    """(names that this package defines outside of PRIVATE, names that PRIVATE reads or sets)."""
    ours = {name for file in modules() if file != PACKAGE / PRIVATE for name in defined(file)}
    return ours, {name for _, name in attributes(PACKAGE / PRIVATE)}


OF_OTHERS = {"sys": {"_getframe"}, "torch": {"_foreach_copy_"}}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_one_file_knows_private_names_of_keras(path):
    if path == PACKAGE / PRIVATE:
        return
    assert not any(name.startswith("keras.src") for name in imported(path))
    strings = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
    assert not any("keras.src" in n.value for n in strings if isinstance(n.value, str))
    ours, theirs = own_names()
    for owner, name in attributes(path):
        if name.startswith("_") and not name.startswith("__"):
            known = name in OF_OTHERS.get(owner, ()) or owner == "super()"
            assert known or (name in ours and name not in theirs), f"{owner}.{name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_inits_only_hand_names_on(path):
    source = path.read_text()
    if path.name == "__init__.py":
        for node in ast.parse(source).body:
            assert isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign))


def test_public_names_have_docstrings():
    for room in PUBLIC:
        namespace = getattr(lip, room)
        for name in namespace.__all__:
            assert getattr(namespace, name).__doc__, f"{room}.{name}"


def test_every_registered_class_has_the_permanent_package_name():
    for cls in (lip.LipNeXt, lip.CertifiableModel, lip.layers.BetaAbs, lip.losses.EMMA):
        name = keras.saving.get_registered_name(cls)
        assert name == f"keras_lipnext>{cls.__name__}"
