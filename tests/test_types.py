"""What is public is annotated, for type checkers and for whoever reads `help`."""

import inspect
import pathlib
import re
import tomllib
import typing

import keras
import pytest
from test_structure import PUBLIC

import keras_lipnext as lip
from keras_lipnext.losses.emma import CertifiedLoss
from keras_lipnext.metrics.certified import CertifiedMetric
from keras_lipnext.optimizers.manifold_optimizer import ManifoldOptimizer

pytestmark = pytest.mark.once

PACKAGE = pathlib.Path(lip.__file__).parent
SETTINGS = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]


def members(owner):
    """What is public of a class, inherited from this library included, or of a module."""
    ours = [c for c in getattr(owner, "__mro__", ()) if c.__module__.startswith("keras_lipnext.")]
    for part in ours or [owner]:
        for name, member in vars(part).items():
            if not name.startswith("_") or name in ("__init__", "__call__", "__str__"):
                yield getattr(member, "fget", None) or getattr(member, "__func__", member)


def public_functions():
    """{name: function} of all that is public, without the decorators around it."""
    owners = [getattr(lip, name) for name in lip.__all__ if name not in PUBLIC]
    for room in (getattr(lip, name) for name in PUBLIC):
        owners += [getattr(room, name) for name in room.__all__]
    found = {}
    for owner in owners:
        inside = inspect.isclass(owner) or inspect.ismodule(owner)
        for function in map(
            inspect.unwrap, filter(callable, members(owner) if inside else [owner])
        ):
            # What a module only imports is not its own, as what a class takes from elsewhere is.
            home = owner.__name__ if inspect.ismodule(owner) else "keras_lipnext."
            if inspect.isfunction(function) and function.__module__.startswith(home):
                found[f"{function.__module__}.{function.__qualname__}"] = function
    return found


FUNCTIONS = public_functions()


def not_annotated(function):
    """Names of a function's parameters, and "return", that have no annotation."""
    signature = inspect.signature(function)
    method = re.search(r"\w\.\w+$", function.__qualname__)
    named = {
        name: parameter.annotation
        for index, (name, parameter) in enumerate(signature.parameters.items())
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not (method and index == 0)
    }
    annotations = {**named, "return": signature.return_annotation}
    return [name for name, value in annotations.items() if value is inspect.Signature.empty]


def test_the_public_functions_are_found():
    modules = {name.split(".")[1] for name in FUNCTIONS}
    assert modules >= {*PUBLIC, "lipschitz", "report", "distribution"}
    for name in (
        "certification.certify.certify",
        "lipschitz.rules.base.lipschitz_rule",
        "layers.sdp_base.SDPLayer.get_config",
        "layers.sdp_dense.SDPDense.__init__",
        "manifolds.stiefel.proju",
        "models.certifiable.CertifiableModel.train_step",
        "models.lipnext.LipNeXt.estimate",
        "report.certificate.Certificate.certified_accuracy",
    ):
        assert f"keras_lipnext.{name}" in FUNCTIONS


def test_public_functions_are_annotated():
    missing = {name: not_annotated(function) for name, function in FUNCTIONS.items()}
    assert {name: names for name, names in missing.items() if names} == {}


def test_a_lost_annotation_is_found():
    class Scaling:
        def scaled(self, x, factor: float = 1.0, *rest, **options):
            return x * factor

    assert not_annotated(Scaling.scaled) == ["x", "return"]


def test_annotations_resolve():
    for function in FUNCTIONS.values():
        typing.get_type_hints(function)


def test_type_checkers_are_told():
    assert (PACKAGE / "py.typed").exists()
    assert "py.typed" in SETTINGS["setuptools"]["package-data"]["keras_lipnext"]
    assert SETTINGS["mypy"]["packages"] == ["keras_lipnext"]


class NoLoss(CertifiedLoss):
    """Defines nothing."""


class NoMetric(CertifiedMetric):
    """Defines nothing."""


class NoOptimizer(ManifoldOptimizer):
    """Defines nothing."""


def head():
    layer = lip.layers.NormalizedDense(3)
    layer.build((None, 2))
    return layer


def test_subclasses_are_told_what_they_must_define():
    labels, logits = keras.ops.zeros((1,), "int32"), keras.ops.zeros((1, 3))
    with pytest.raises(NotImplementedError, match=r"NoLoss.*demanded_share\(d, margin\)"):
        NoLoss(0.1).bind(head())(labels, logits)
    with pytest.raises(NotImplementedError, match=r"NoMetric.*values\(radii, correct\)"):
        NoMetric("none").bind(head()).update_state(labels, logits)
    kernel = keras.Variable([[1.0]])
    kernel.constraint = lip.manifolds.Stiefel()
    with pytest.raises(NotImplementedError, match=r"NoOptimizer.*manifold_step\(x, gradient"):
        NoOptimizer(0.1, name="none").apply([keras.ops.ones((1, 1))], [kernel])
