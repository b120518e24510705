"""What the documents name exists, and what they show works."""

import functools
import importlib
import inspect
import pathlib
import re
import runpy

import detectors
import extended
import keras
import layer_checks
import pytest
from test_soundness import MUTANTS
from test_structure import PUBLIC, ROOMS

import keras_lipnext as lip
from keras_lipnext import layers
from keras_lipnext.layers import orthogonal_dense
from keras_lipnext.lipschitz.rules import base
from keras_lipnext.lipschitz.rules import layers as layer_rules

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXPLANATION = [page for page in PAGES if page.parent.name == "explanation"]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCUMENTS = [*PAGES, CONTRIBUTING, ROOT / "README.md"]
# Made in CONTRIBUTING's example.
EXAMPLE = {"keras_lipnext/layers/scaled_residual.py"}

every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


@functools.cache
def definitions(path):
    """Names of functions, classes and constants that a file defines."""
    found = re.findall(r"^ *(?:def|class) (\w+)|^(\w+)(?:: \w+)? = ", path.read_text(), re.M)
    return {name for pair in found for name in pair if name}


def test_there_are_documents():
    names = {path.name for path in PAGES}
    assert names >= {"architecture.md", "mathematics.md", "soundness.md", "keras_contract.md"}
    readme = (ROOT / "README.md").read_text()
    # The index and what is made are the site's alone.
    for path in {*PAGES, CONTRIBUTING} - {ROOT / "docs" / "index.md", ROOT / "docs" / "cli.md"}:
        assert f"({path.relative_to(ROOT)})" in readme
    assert len(readme.splitlines()) <= 110


def test_the_table_of_the_readme_is_that_of_the_results():
    figures = runpy.run_path(str(ROOT / "docs" / "_build" / "figures.py"))
    assert figures["readme"]() in (ROOT / "README.md").read_text()


NAMED = r"\b((?:keras_lipnext|tests|benchmarks|examples)/[\w./]*\w)(?:::([\w.]+))?"


@every_document
def test_files_exist_and_define_what_is_named_in_them(path):
    for file, name in re.findall(NAMED, path.read_text()):
        if file in EXAMPLE:
            continue
        assert (ROOT / file).exists(), file
        assert set(name.split(".")) - {""} <= (definitions(ROOT / file) if name else set()), name


def test_files_that_the_source_names_exist():
    for path in (ROOT / "keras_lipnext").rglob("*.py"):
        for file, _ in re.findall(NAMED, path.read_text()):
            assert (ROOT / file).exists(), f"{path}: {file}"


@every_document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


@every_document
def test_public_names_resolve(path):
    for dotted in re.findall(
        r"(?<![.\w])(?:keras_lipnext|lip)((?:\.[A-Za-z_]\w*)+)", path.read_text()
    ):
        value = lip
        for name in dotted[1:].split("."):
            if not hasattr(value, name):
                importlib.import_module(f"{value.__name__}.{name}")
            value = getattr(value, name)


@pytest.mark.parametrize("path", EXPLANATION, ids=lambda path: path.name)
def test_tests_exist(path):
    known = set().union(*(definitions(file) for file in (ROOT / "tests").rglob("*.py")))
    known |= {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"\btest_\w+", path.read_text())) <= known


def rows(page, first):
    """Cells of the table of a page whose heading begins with this word."""
    lines = (ROOT / "docs" / "explanation" / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = lines[start + 2 :]
    end = next(i for i, line in enumerate(table) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:end]]


def test_the_table_of_rooms_is_that_of_the_imports():
    above = set()
    cells = rows("architecture.md", "room")
    table = [(room.strip("`"), set(re.findall(r"\w+", read))) for room, _, read in cells]
    for room, read in table:
        assert read <= above, room
        above.add(room)
    assert dict(table) == ROOMS


def test_the_table_of_mutants_is_that_of_the_gate():
    *_, mutants, found_by = zip(*rows("soundness.md", "it must survive"))
    names = [name for cell in mutants for name in re.findall(r"\w+", cell)]
    assert sorted(names) == sorted(mutant.__name__ for mutant in MUTANTS)
    names = {name for cell in found_by for name in re.findall(r"\w+", cell)}
    assert names == {detector.__name__ for detector in detectors.ALL}


def test_figures_come_from_files(monkeypatch):
    """Each figure that a page names is made; one that nobody makes stops the build."""
    figures = runpy.run_path(str(ROOT / "docs" / "_build" / "figures.py"))
    pages = "\n".join(path.read_text() for path in PAGES)
    named = set(re.findall(r"\{\{ (\w+) \}\}", pages))
    assert named == set(figures["FIGURES"])
    for name in named:
        text = figures["filled"](f"{{{{ {name} }}}}")
        assert text.strip() and "{{" not in text and "nan" not in text, name
    with pytest.raises(KeyError, match="no figure"):
        figures["filled"]("about {{ guess }} %")


REFERENCE = runpy.run_path(str(ROOT / "docs" / "_build" / "reference.py"))


def test_the_reference_has_an_entry_for_every_public_name():
    assert set(REFERENCE["ROOMS"]) == set(PUBLIC)
    assert set(lip.__all__) - {"__version__"} <= set(REFERENCE["targets"]()) | set(PUBLIC)
    pages = REFERENCE["pages"]()
    for room in PUBLIC:
        text = pages[f"reference/{room}.md"]
        assert REFERENCE["public_names"](f"keras_lipnext.{room}") == getattr(lip, room).__all__
        for name in getattr(lip, room).__all__:
            entry = rf"^:+{{py:(?:class|function|module)}} (?:keras_lipnext\.{room}\.)?{name}\b"
            assert len(re.findall(entry, text, re.M)) == 1, name


def test_the_reference_reads_signatures_and_sections_as_python_does():
    """The site is built from the source as text: it must say what `help` says."""
    for room in PUBLIC:
        for name in getattr(lip, room).__all__:
            value = getattr(getattr(lip, room), name)
            text = REFERENCE["entries"](f"keras_lipnext.{room}", name)
            if inspect.isclass(value) and issubclass(value, keras.layers.Layer):
                parameters = set(inspect.signature(value.__init__).parameters) - {"self"}
                shown = set(re.findall(r"\w+", text.splitlines()[0].partition("(")[2]))
                assert parameters <= shown, name
            described = re.findall(r"^ {4}(\w+): ", section("Args", inspect.getdoc(value)), re.M)
            for argument in described:
                assert f"- `{argument}`: " in text, f"{name}: {argument}"


def section(title, docstring):
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", docstring or "", re.M)
    return found[1] if found else ""


def test_contributing_is_short():
    assert len(CONTRIBUTING.read_text().splitlines()) < 80


def test_the_layer_of_contributing_is_added_as_it_says(monkeypatch):
    layer, rule, row = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.S)
    imports = {**vars(orthogonal_dense), "number": lip.arguments.number}
    exec(layer, imports)
    cls = imports["ScaledResidual"]
    monkeypatch.setattr(layers, "ScaledResidual", cls, raising=False)
    monkeypatch.setattr(base, "_LAYERS", dict(base._LAYERS))
    exec(rule, dict(vars(layer_rules)))
    names = {"Row": layer_checks.Row, "extended": extended, "ScaledResidual": cls}
    layer_checks.check_layer(eval(row, names))
