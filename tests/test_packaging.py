"""What the source distribution holds, and what the package says of itself."""

import pathlib
import shutil
import subprocess
import sys
import tarfile
import tomllib

import pytest

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
