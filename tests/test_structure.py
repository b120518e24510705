"""The house's rules that a reader relies on, checked on the source."""

import ast
import pathlib

import keras
import pytest

import keras_lipnext as lip

pytestmark = pytest.mark.once

PACKAGE = pathlib.Path(lip.__file__).parent
ROOMS = [
    "manifolds",
    "layers",
    "certification",
    "lmi",
    "optimizers",
    "losses",
    "metrics",
    "models",
    "callbacks",
]


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_backend_folder_imports_a_backend(path):
    if path.parent.name != "backend":
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"jax", "torch", "tensorflow"}


def rooms_read_by(room):
    return {
        name.split(".")[1]
        for path in (PACKAGE / room).rglob("*.py")
        for name in imported(path)
        if name.startswith("keras_lipnext.") and name.split(".")[1] in ROOMS
    }


@pytest.mark.parametrize(
    "room, below",
    [
        ("manifolds", set()),
        ("layers", {"manifolds"}),
        ("certification", {"manifolds", "layers"}),
        ("lmi", {"layers", "certification"}),
        ("optimizers", {"manifolds", "layers"}),
        ("losses", {"certification", "layers"}),  # certification: radius.py only
        ("metrics", {"certification", "layers"}),
        ("callbacks", {"layers", "models"}),
    ],
)
def test_imports_never_run_back_up(room, below):
    assert rooms_read_by(room) <= below | {room}


@pytest.mark.parametrize("room", ["losses", "metrics"])
def test_losses_and_metrics_read_the_pure_radius_only(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imported(path):
            if name.startswith("keras_lipnext.certification"):
                assert name.startswith("keras_lipnext.certification.radius")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_inits_only_hand_names_on(path):
    source = path.read_text()
    if path.name == "__init__.py":
        for node in ast.parse(source).body:
            assert isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign))


def test_public_names_have_docstrings():
    for room in ROOMS:
        namespace = getattr(lip, room)
        for name in namespace.__all__:
            assert getattr(namespace, name).__doc__, f"{room}.{name}"


def test_every_registered_class_has_the_permanent_package_name():
    for cls in (lip.LipNeXt, lip.CertifiableModel, lip.layers.BetaAbs, lip.losses.EMMA):
        name = keras.saving.get_registered_name(cls)
        assert name == f"keras_lipnext>{cls.__name__}"
