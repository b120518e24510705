"""What the source distribution holds, and what the package says of itself."""

import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import pytest
from oldest import oldest

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("keras_lipnext", "tests", "examples", "benchmarks", "docs")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FILES += ("CONTRIBUTING.md", "Makefile", "constraints.txt")


def test_the_source_distribution_holds_all_that_tests_and_examples_need(tmp_path):
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.png")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    expected = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    build = "import setuptools.build_meta as build; build.build_sdist('dist')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert expected <= held


def test_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["authors"] and project["urls"]
    assert "Programming Language :: Python :: 3.11" in project["classifiers"]
    (keras,) = [name for name in project["dependencies"] if name.startswith("keras")]
    assert keras == "keras>=3.14"
    assert "Keras 3.14 or newer" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "backend, bounds",
    [
        ("jax", ["jax>=0.8", "numpy>=2"]),
        ("torch", ["torch>=2.6", "numpy>=1.26"]),
        ("tensorflow", ["tensorflow>=2.18", "numpy>=1.26"]),
    ],
)
def test_the_oldest_versions_are_the_bounds_promised(backend, bounds):
    """`make test-oldest` runs with them; the newest of two bounds of one name counts."""
    expected = {*bounds, "keras>=3.14", "threadpoolctl>=3.2"}
    assert {f"{name}>={version}" for name, version in oldest(backend).items()} == expected
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    others = [line.partition(";")[0] for name in extras for line in extras[name]]
    of_the_backend = {line for line in others if re.split("-cpu|>", line)[0] == backend}
    assert {line.replace("-cpu", "") for line in of_the_backend} == {bounds[0]}


def test_a_bound_that_is_not_the_lowest_version_alone_is_an_error(monkeypatch, tmp_path):
    text = (ROOT / "pyproject.toml").read_text().replace("keras>=3.14", "keras>=3.14,<4")
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr("oldest.__file__", str(tmp_path / "tests" / "oldest.py"))
    with pytest.raises(ValueError, match=r"has one bound.*Received: keras>=3.14,<4"):
        oldest("jax")
