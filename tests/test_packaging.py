"""What the source distribution holds, and what the package says of itself."""

import email
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from oldest import oldest
from packaging.requirements import Requirement

from keras_lipnext.backend.precision import MISCOMPILING_JAXLIB
from keras_lipnext.version import __version__

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("keras_lipnext", "tests", "examples", "benchmarks", "docs", "results")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")
FILES += ("CONTRIBUTING.md", "Makefile", "SECURITY.md", "constraints.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BUILD = """
import setuptools.build_meta as build
build.build_sdist("dist")
build.build_wheel("dist")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of what is distributed, and what it is built to: (folder, sdist, wheel)."""
    folder = tmp_path_factory.mktemp("build")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "results/*.png")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in (folder / "results").iterdir():
        if path.is_dir():  # networks too large for a distribution
            shutil.rmtree(path)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return files, sdist, wheel


def test_the_source_distribution_holds_all_that_tests_and_examples_need(built):
    files, sdist, _ = built
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    of_benchmarks = {name for name in files if re.fullmatch(r"benchmarks/.*\.png", name)}
    assert files - of_benchmarks <= held


def test_the_wheel_holds_the_package_and_nothing_else(built):
    files, _, wheel = built
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in file.namelist() if name.endswith("/METADATA")]
        about = email.message_from_bytes(file.read(metadata))
        (points,) = [name for name in file.namelist() if name.endswith("/entry_points.txt")]
        assert b"lipnext = keras_lipnext.cli:main" in file.read(points)
    assert held == {name for name in files if name.startswith("keras_lipnext/")}
    assert {"keras_lipnext/py.typed", "keras_lipnext/report/page.html"} <= held
    assert about["Name"] == "keras_lipnext" and about["Version"] == __version__
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().startswith("# keras_lipnext")
    assert {name.replace("_", "-") for name in EXTRAS} == set(about.get_all("Provides-Extra"))


def test_the_metadata():
    assert PROJECT["authors"] and PROJECT["urls"] and len(PROJECT["keywords"]) > 5
    for version in ("3.11", "3.12", "3.13"):  # `make release-check PYTHON=...` was run on each
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation
    (keras,) = [name for name in PROJECT["dependencies"] if name.startswith("keras")]
    assert keras == "keras>=3.14"
    assert "Keras 3.14 or newer" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "backend, bounds",
    [
        ("jax", ["jax>=0.8.2", "numpy>=2"]),
        ("torch", ["torch>=2.6", "numpy>=1.26"]),
        ("tensorflow", ["tensorflow>=2.18", "numpy>=1.26"]),
    ],
)
def test_the_oldest_versions_are_the_bounds_promised(backend, bounds):
    """`make test-oldest` runs with them; the newest of two bounds of one name counts."""
    expected = {*bounds, "keras>=3.14", "threadpoolctl>=3.2"}
    assert {f"{name}>={version}" for name, version in oldest(backend).items()} == expected
    others = [line.partition(";")[0] for lines in EXTRAS.values() for line in lines]
    of_the_backend = {line for line in others if re.split("-cpu|>", line)[0] == backend}
    lowest = {line.replace("-cpu", "").partition(",!=")[0] for line in of_the_backend}
    assert lowest == {bounds[0]}


def test_what_compiles_wrong_programs_is_not_installed():
    (jax,) = [line for line in EXTRAS["jax"] if line.startswith("jax")]
    allowed = Requirement(jax).specifier
    assert not [version for version in MISCOMPILING_JAXLIB if version in allowed]
    (pinned,) = re.findall(r"^jaxlib==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned in allowed


def test_a_bound_that_is_not_the_lowest_version_alone_is_an_error(monkeypatch, tmp_path):
    text = (ROOT / "pyproject.toml").read_text().replace("keras>=3.14", "keras>=3.14,<4")
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr("oldest.__file__", str(tmp_path / "tests" / "oldest.py"))
    with pytest.raises(ValueError, match=r"has one bound.*Received: keras>=3.14,<4"):
        oldest("jax")


def test_what_develops_is_composed_of_the_other_extras():
    """A requirement with a bound of its own stands in one place, TensorFlow's two builds apart."""
    (composed,) = [line for line in EXTRAS["dev"] if line.startswith("keras_lipnext[")]
    parts = set(re.findall(r"[\w-]+", composed)) - {"keras_lipnext"}
    every = {"attack-libraries", "checkpoints", "export", "jax", "lmi", "plot", "recipe", "torch"}
    assert parts == every <= set(EXTRAS)
    names = [
        re.match(r"[\w-]+", line)[0]
        for lines in EXTRAS.values()
        for line in lines
        if not line.startswith("keras_lipnext[")
    ]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"tensorflow"}
