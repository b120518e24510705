"""The HTML page: complete, self-contained, well-formed, and deaf to what names try to say."""

import base64
import builtins
import dataclasses
import html.parser
import io
import pathlib
import re

import numpy as np
import pytest
from PIL import Image
from test_report import certificate, evidence, full

from keras_lipnext.report.provenance import Sample

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]
VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """Checks the nesting; collects tags, attributes, headings and text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.headings, self.words = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)
        if re.fullmatch("h[1-6]", (self.open or [""])[-1]):
            self.headings.append((self.open[-1], data))

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(tmp_path):
    def make(certificate):
        path = tmp_path / "page.html"
        certificate.to_html(path)
        return Page(path.read_text(encoding="utf-8"))

    return make


def picture(attributes):
    """Pixels of an inlined image."""
    kind, data = attributes["src"].split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        return np.asarray(image.convert("RGB"))


def test_sections(page):
    found = page(full())
    assert found.headings == [
        ("h1", "Certificate of lip"),
        ("h2", "Results"),
        ("h2", "What is promised"),
        ("h2", "Certified accuracy and radii"),
        ("h2", "By class"),
        ("h2", "Samples"),
        ("h3", "Smallest radii"),
        ("h3", "Largest radii"),
        ("h2", "What it rests on"),
        ("h2", "Lipschitz constants of the layers"),
    ]
    for words in (
        "clean accuracy 75.00%",
        "certified robust accuracy at epsilon = 0.4 25.00%",
        "Lipschitz constant K, input to head, proven 1.000000500",
        "Lipschitz constant, input to output, proven 1.250000000",
        "the constant 1.25.",
        "error allowance E of the logits, largest 3e-12",
        "Not promised: that execution in float32",
        "product over 2 layers, proven from the stored weights",
        "sha256 " + "ab" * 32,
        "in float64 on torch, keras_lipnext 0.1.0, keras 3.15.1",
        "note A note on softmax.",
        "class samples clean accuracy CRA(0.1) CRA(0.4) median radius",
        "0 2 50.00% 50.00% 50.00% 0.7",
        "dense Dense 1.25 1.5 proven input",
        "“head”",
    ):
        assert words in found.text
    assert "Not fully proven" not in found.text


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    full().to_html(tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    markup = re.sub("base64,[A-Za-z0-9+/=]*", "", source)
    assert len(markup) < 20_000
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe|\son\w+=", markup)
    for attributes in (a for _, a in Page(source).tags):
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    policies = [a for a in Page(source).all("meta") if a.get("http-equiv")]
    assert policies[0]["content"].startswith("default-src 'none'; img-src data:")


HOSTILE = "\"><script>alert(1)</script>' onload='x' {{ 7 * 7 }} &amp; <!--\u202e"


def test_names_are_escaped(page):
    harmless = page(full(evidence=evidence(("a", "b"), declared=("a",))))
    bound = evidence((HOSTILE, "b"), declared=(HOSTILE,)).bound
    hostile = evidence(
        model=HOSTILE,
        dtypes=(HOSTILE,),
        backend=HOSTILE,
        versions={HOSTILE: HOSTILE},
        weights_hash=HOSTILE,
        bound=dataclasses.replace(bound, head=HOSTILE, notes=(HOSTILE,)),
    )
    found = page(full(evidence=hostile))
    # The same elements in the same order: no name has become markup.
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in harmless.tags]
    shown = " ".join(HOSTILE.replace("\u202e", "\\u202e").split())
    assert found.text.count(shown) >= 8
    assert "\u202e" not in found.text  # it would turn what follows round
    assert "49" not in found.text.replace(shown, "")


def test_figures_say_what_they_show(page):
    curve, histogram, *samples = page(full()).all("img")
    for figure in (curve, histogram):
        assert picture(figure).shape == (600, 900, 3)
    assert "clean accuracy: 75.00%" in curve["alt"]
    assert "from 0 to 0.9, median 0.35" in histogram["alt"]
    assert len(samples) == 4
    assert all(image["alt"] for image in samples)


def test_pictures_of_the_samples(page):
    found = page(full())
    shades = [picture(image)[0, 0].tolist() for image in found.all("img")[2:]]
    # Smallest first; then the largest first. Inputs are i / 4.
    assert shades == [[round(255 * i / 4)] * 3 for i in (0, 1, 3, 2)]
    assert "sample 0 predicted 0 label 0 radius 0" in found.text
    assert "sample 1 predicted 1 (wrong) label 0 radius 0.2" in found.text
    assert "Values from 0, black, to 1, white." in found.text


def with_inputs(*inputs):
    samples = [Sample(i, np.asarray(x, "float32"), 0, 0, 0.1 * i) for i, x in enumerate(inputs)]
    return certificate(extremes=tuple(samples))


@pytest.mark.parametrize(
    "shape, size",
    [
        ((5, 7, 1), (5, 7, 3)),
        ((5, 7, 3), (5, 7, 3)),
        ((1, 5, 7), (5, 7, 3)),
        ((3, 5, 7), (5, 7, 3)),
        ((3, 5, 1), (3, 5, 3)),
    ],
)
def test_layouts_of_images(shape, size, page):
    found = page(with_inputs(np.random.default_rng(0).random(shape)))
    assert picture(found.all("img")[2]).shape == size


@pytest.mark.parametrize("shape", [(6,), (5, 7), (5, 7, 4), (2, 3, 3, 3)])
def test_inputs_that_are_no_images(shape, page):
    found = page(with_inputs(*np.ones((3, *shape))))
    assert len(found.all("img")) == 2
    assert "Values from" not in found.text
    assert "sample predicted label radius 0 0 0 0 1 0 0 0.1" in found.text


@pytest.mark.parametrize(
    "values, words",
    [
        ((0.0, 255.0), "Values from 0, black, to 255, white."),
        ((-2.0, 3.0), "Values from -2, black, to 3, white."),
        ((0.0, 0.5, np.nan, np.inf), "Values from 0, black, to 1, white."),
    ],
)
def test_range_of_values(values, words, page):
    found = page(with_inputs(np.resize(values, (2, 2, 1))))
    assert words in found.text
    assert picture(found.all("img")[2]).min() == 0


def test_without_evidence_labels_and_samples(page):
    found = page(certificate(labels=False))
    assert [text for tag, text in found.headings if tag == "h2"] == [
        "Results",
        "What is promised",
        "Certified accuracy and radii",
        "By class",
    ]
    assert "share of predictions certified at epsilon = 0.1" in found.text
    assert "predicted class samples certified(0.1)" in found.text


def test_one_sample_and_odd_radii(page):
    single = dataclasses.replace(
        certificate(radii=(np.inf,) * 4),
        extremes=(Sample(0, np.zeros((2, 2, 1)), -1, 0, np.inf),),
    )
    found = page(single)
    assert "predicted -1 (wrong) label 0 radius inf" in found.text
    assert ("h3", "Largest radii") not in found.headings


def test_declared_constants_are_announced(page):
    found = page(full(evidence=evidence(declared=("dense",))))
    assert "Not fully proven. The Lipschitz constants of these layers were declared" in found.text
    assert found.text.index("Not fully proven") < found.text.index("Results")
    assert "dense Dense 1.25 1.5 declared input" in found.text


def test_low_precision_is_told(page):
    found = page(full(evidence=evidence(dtypes=("bfloat16",)), low_precision_differences=2))
    assert "the two differ on 2 of 4 samples" in found.text


def test_long_tables_are_folded(page):
    assert not page(full()).all("details")
    found = page(full(evidence=evidence(tuple(f"layer_{i}" for i in range(60)))))
    assert len(found.all("details")) == 1
    assert "60 layers" in found.text


def test_without_jinja2(monkeypatch, tmp_path):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "jinja2":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'keras_lipnext\[plot\]'"):
        full().to_html(tmp_path / "page.html")


def test_numbers_do_not_break_and_shares_are_explained_before_they_stand(tmp_path, page):
    found = page(full())
    assert found.text.index("Certified robust accuracy (CRA) at epsilon: the share") < (
        found.text.index("certified robust accuracy at epsilon = 0.1")
    )
    (rule,) = re.findall(r"\.numbers dd \{(.*)\}", (tmp_path / "page.html").read_text())
    assert "white-space: nowrap" in rule and "overflow-wrap" not in rule
