import builtins
import dataclasses
import json
import math
import warnings

import keras
import numpy as np
import pytest
from data import dense_model
from PIL import Image

import keras_lipnext as lip
from keras_lipnext.certification import Certificate
from keras_lipnext.lipschitz.model import LayerConstant, LipschitzBound
from keras_lipnext.report.provenance import Evidence, Sample


def certificate(labels=True, radii=(0.5, 0.2, 0.0, 0.9), **kwargs):
    return Certificate(
        predictions=np.array([0, 1, 2, 1]),
        radii=np.array(radii),
        labels=np.array([0, 1, 2, 0]) if labels else None,
        epsilons=(0.1, 0.4),
        constant=1.25,
        body_constant=1.0000005,
        **kwargs,
    )


def evidence(names=("stem", "dense"), declared=(), dtypes=("float32",), branch=False, **kwargs):
    reads = ("input", names[0]) if branch else ("input",)
    constants = tuple(
        LayerConstant(name, "Dense", 1.25, 1.5, name not in declared, reads) for name in names
    )
    found = {
        "model": "lip",
        "parameters": 1234,
        "weights_hash": "ab" * 32,
        "dtypes": dtypes,
        "input_shape": (None, 8, 8, 1),
        "backend": "torch",
        "versions": {"keras_lipnext": "0.1.0", "keras": "3.15.1"},
        "bound": LipschitzBound(1.25, 1.0000005, constants, "head", ("A note on softmax.",)),
    }
    return Evidence(**(found | kwargs))


def full(image=True, **kwargs):
    """A certificate of `certify`'s, with all that belongs to it."""
    shape = (4, 4, 1) if image else (4,)
    samples = tuple(
        Sample(i, np.full(shape, i / 4, "float32"), i % 3, 0, radius)
        for i, radius in enumerate((0.0, 0.2, 0.5, 0.9))
    )
    arguments = {
        "error_allowances": np.array([1e-12, 3e-12, np.nan, 2e-12]),
        "evidence": evidence(),
        "extremes": samples,
    }
    return certificate(**(arguments | kwargs))


def test_numbers():
    c = certificate()
    assert c.clean_accuracy == 0.75
    assert c.certified_accuracy == {0.1: 0.5, 0.4: 0.25}
    assert c.certified_share == {0.1: 0.75, 0.4: 0.5}
    assert c.error_allowance is None


def test_error_allowance_passes_over_samples_that_have_none():
    assert full().error_allowance == {"median": 2e-12, "largest": 3e-12}
    unknown = full(error_allowances=np.full(4, np.nan)).error_allowance
    assert math.isnan(unknown["largest"])
    infinite = full(error_allowances=np.array([1e-12, np.inf, np.nan, 1e-12])).error_allowance
    assert infinite == {"median": 1e-12, "largest": np.inf}


def test_an_epsilon_equal_to_the_radius_is_not_certified():
    c = certificate(radii=(0.1, 0.1, 0.1, 0.1))
    assert c.certified_accuracy[0.1] == 0


def test_per_class():
    by_class = {row["class"]: row for row in certificate().per_class}
    assert by_class.keys() == {0, 1, 2}
    assert by_class[0] == {
        "class": 0,
        "samples": 2,
        "clean_accuracy": 0.5,
        "certified_accuracy": {0.1: 0.5, 0.4: 0.5},
        "median_radius": pytest.approx(0.7),
    }
    assert by_class[2]["certified_accuracy"] == {0.1: 0.0, 0.4: 0.0}
    # The classes' shares, weighted by their sizes, are the whole's.
    for epsilon, share in certificate().certified_accuracy.items():
        parts = [r["samples"] * r["certified_accuracy"][epsilon] for r in by_class.values()]
        assert sum(parts) / 4 == share


def test_per_predicted_class_without_labels():
    rows = certificate(labels=False).per_class
    assert [row["class"] for row in rows] == [0, 1, 2]
    assert [row["samples"] for row in rows] == [1, 2, 1]
    assert rows[1]["certified_accuracy"] == {0.1: 1.0, 0.4: 0.5}
    assert rows[1]["clean_accuracy"] is None


def test_table():
    text = str(certificate())
    assert "clean accuracy" in text
    assert "75.00%" in text
    assert "certified robust accuracy at epsilon = 0.4" in text
    assert "25.00%" in text
    assert "Lipschitz constant K, input to head, proven" in text
    assert "1.000000500" in text
    assert "Promised:" in text
    assert "Not promised:" in text
    assert "share of predictions certified" in str(certificate(labels=False))


def test_text_says_what_it_rests_on():
    text = str(full())
    lines = text.splitlines()
    assert "K: product over 2 layers, proven from the stored weights" in lines
    assert f"weights: sha256 {'ab' * 32}" in lines
    assert "model: lip, 1,234 parameters, input (None, 8, 8, 1)" in lines
    assert "dtype: float32" in lines
    assert "evaluated: in float64 on torch, keras_lipnext 0.1.0, keras 3.15.1" in lines
    assert "note: A note on softmax." in lines
    (median,) = [line for line in lines if line.startswith("error allowance E of the logits, med")]
    assert median.split()[-1] == "2e-12"
    (largest,) = [line for line in lines if line.startswith("error allowance E of the logits, lar")]
    assert largest.split()[-1] == "3e-12"
    assert "what rounding can have done to them, E, is subtracted" in text
    assert "low precision" not in text


@pytest.mark.parametrize(
    "bound, sentence",
    [
        (evidence(names=()), "K: no layer in front of the head"),
        (evidence(names=("a",)), "K: product over 1 layer, proven from the stored weights"),
        (evidence(branch=True), "K: combined along the graph of 2 layers, proven from"),
        (
            evidence(("a", "b", "c"), declared=("a", "c")),
            "K: product over 3 layers; declared, not proven, for: a, c",
        ),
    ],
)
def test_how_the_constant_was_proven(bound, sentence):
    assert sentence in str(full(evidence=bound))


def test_declared_constants_are_not_called_proven():
    text = str(full(evidence=evidence(declared=("dense",))))
    assert "Lipschitz constant K, input to head, partly declared" in text
    assert "if what was declared, not proven, for dense is true" in text
    assert "proven from the weights" not in text
    assert "proven from the stored weights" not in text


@pytest.mark.parametrize("dtypes", [("mixed_bfloat16",), ("bfloat16", "float32")])
def test_low_precision(dtypes):
    text = str(full(evidence=evidence(dtypes=dtypes), low_precision_differences=3))
    assert (
        "The model computes in bfloat16: the certificate speaks of its stored weights in real "
        "arithmetic, not of what bfloat16 execution predicts; the two differ on 3 of 4 samples."
    ) in text
    assert "predictions that differ in bfloat16" in text
    assert "predictions that differ in low precision" in str(
        certificate(low_precision_differences=0)
    )


def test_names_stay_on_one_line():
    forged = "a\nclean accuracy 100.00%\x1b[31m"
    text = str(full(evidence=evidence((forged,), declared=(forged,), model=forged)))
    assert "\nclean accuracy 100.00%" not in text
    assert "\x1b" not in text
    assert "a\\nclean accuracy 100.00%\\x1b[31m" in text


def test_dictionary_is_json():
    summary = json.loads(json.dumps(certificate().to_dict()))
    assert summary["clean_accuracy"] == 0.75
    assert summary["certified_accuracy"] == {"0.1": 0.5, "0.4": 0.25}
    assert (summary["constant"], summary["body_constant"]) == (1.25, 1.0000005)
    assert summary["samples"] == 4
    assert certificate(labels=False).to_dict()["certified_accuracy"] is None


def test_dictionary_holds_the_evidence():
    summary = full(low_precision_differences=1).to_dict()
    assert summary["error_allowance"] == {"median": 2e-12, "largest": 3e-12}
    assert summary["low_precision_differences"] == 1
    assert summary["per_class"] == certificate().per_class
    found = summary["evidence"]
    assert found["weights_hash"] == "ab" * 32
    assert found["dtypes"] == ["float32"]
    assert found["versions"]["keras"] == "3.15.1"
    assert found["backend"] == "torch"
    assert found["parameters"] == 1234
    assert found["head"] == "head"
    assert found["layers"][1] == {
        "name": "dense",
        "class": "Dense",
        "constant": 1.25,
        "total": 1.5,
        "proven": True,
        "reads": ["input"],
        "bounded_together_with": None,
    }
    assert certificate().to_dict()["evidence"] is None


def test_json_file_knows_no_nan(tmp_path):
    infinite = full(
        radii=(np.inf, 0.2, 0.0, 0.9),
        error_allowances=np.full(4, np.nan),
        evidence=evidence(parameters=np.int64(7)),
    )
    infinite = dataclasses.replace(infinite, epsilons=(np.float32(0.5),))
    path = tmp_path / "certificate.json"
    infinite.to_json(path)

    def refuse(token):
        raise AssertionError(token)

    summary = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert summary["mean_radius"] == "inf"
    assert summary["error_allowance"] == {"median": "nan", "largest": "nan"}
    assert summary["evidence"]["parameters"] == 7
    assert summary["certified_accuracy"] == {"0.5": 0.25}


def test_markdown():
    text = certificate().to_markdown()
    assert text.startswith("| quantity | value |\n| --- | ---: |\n| samples | 4 |")
    assert "| clean accuracy | 75.00% |" in text
    assert "\n\n| class | samples | clean accuracy | CRA(0.1) | CRA(0.4) | median radius |" in text
    assert "\n| 0 | 2 | 50.00% | 50.00% | 50.00% | 0.7 |" in text
    assert "\n\nNot promised: " in text
    unlabelled = certificate(labels=False).to_markdown()
    assert "| predicted class | samples | certified(0.1) | certified(0.4) | median" in unlabelled


def test_markdown_shows_names_as_they_are():
    text = full(evidence=evidence(model="a|b<script>*c*")).to_markdown()
    assert "- model: a\\|b&lt;script&gt;\\*c\\*, 1,234 parameters" in text
    assert f"- weights: sha256 {'ab' * 32}" in text


FIGURES = [Certificate.plot, Certificate.plot_radii]


@pytest.mark.once
@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("radii", [(0.5, 0.2, 0.0, 0.9), (np.inf, 0.2, 0.0, 0.9), (0,) * 4])
def test_figures(draw, labels, radii, tmp_path):
    path = tmp_path / "figure.png"
    draw(certificate(labels, radii), path)
    with Image.open(path) as image:
        assert image.size == (900, 600)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels.sum(axis=-1) < 150).sum() > 500  # something is drawn in black
    assert (np.ptp(pixels, axis=-1) <= 2).all()  # nothing hangs on colour


@pytest.mark.once
def test_histogram_counts_every_finite_radius():
    from keras_lipnext.report.plots import radius_histogram

    figure = radius_histogram(certificate(radii=(np.inf, 0.2, 0.0, 0.9)))
    (axes,), (legend,) = figure.axes, figure.legends
    assert sum(bar.get_height() for bar in axes.patches) == 3
    labels = [text.get_text() for text in legend.get_texts()]
    assert {"correct (2)", "wrong (1)"} < set(labels)
    assert "infinite" in axes.get_title()
    assert "units of the inputs" in axes.get_xlabel()


@pytest.mark.once
@pytest.mark.parametrize("draw", FIGURES)
def test_figures_without_matplotlib(draw, monkeypatch, tmp_path):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'keras_lipnext\[plot\]'"):
        draw(certificate(), tmp_path / "curve.png")
    assert "clean accuracy" in str(certificate())


def test_the_range_of_the_inputs_is_said():
    """Epsilon means something only in their units."""
    model = dense_model()
    x = np.array([[0.0, 255, 3, 4, 5, 6], [1, 2, 3, 4, 5, -7.5]])
    found = lip.certify(model, x, batch_size=1, verbose=0)
    assert found.input_range == (-7.5, 255.0)
    assert "inputs: from -7.5 to 255; radii and epsilons are in their units" in str(found)
    assert found.to_dict()["input_range"] == [-7.5, 255.0]


def with_nan(x, *places):
    x = np.array(x, "float64")
    for place, value in places:
        x[place] = value
    return x


@pytest.mark.parametrize(
    "batch_size, bad", [(1, np.nan), (2, np.nan), (8, np.nan), (2, np.inf), (8, -np.inf)]
)
def test_what_is_not_finite_does_not_hide_the_range(batch_size, bad):
    """min(inf, nan) is inf: one NaN left its whole batch out."""
    x = with_nan(np.linspace(0.1, 0.9, 24).reshape(4, 6), ((0, 2), bad))
    model = dense_model()
    found = lip.certify(model, x, np.zeros(4, int), batch_size=batch_size, verbose=0)
    assert found.input_range == (0.1, 0.9)
    assert found.predictions[0] == -1 and found.radii[0] == 0 and not found.correct[0]
    assert (found.predictions[1:] >= 0).all() and (found.radii[1:] > 0).all()
    assert (found.unanswered, found.inputs_not_finite) == (1, 1)
    assert found.to_dict()["unanswered"] == found.to_dict()["inputs_not_finite"] == 1
    for text in (str(found), found.to_markdown()):
        assert "samples without an answer, radius 0" in text
        assert "to 1 of 4 samples: NaN or infinity in the inputs of 1, in the logits of 0" in text


def test_no_finite_input_has_no_range():
    found = lip.certify(dense_model(), np.full((2, 6), np.nan), verbose=0)
    assert found.input_range is None
    assert found.unanswered == 2
    assert "nan" not in str(found.to_dict()["input_range"])


def test_layers_that_answer_to_infinity_do_not_make_an_answer_of_it():
    """tanh maps infinity to 1, and TensorFlow's relu NaN to 0."""
    inputs = keras.Input((3,))
    x = keras.layers.Activation("tanh")(inputs)
    model = keras.Model(inputs, lip.layers.NormalizedDense(2)(keras.layers.ReLU()(x)))
    x = [[np.inf, 0.1, 0.2], [np.nan, 0.1, 0.2], [0.3, 0.1, 0.2]]
    found = lip.certify(model, np.array(x), verbose=0)
    assert found.predictions.tolist()[:2] == [-1, -1]
    assert found.inputs_not_finite == 2


def test_logits_that_are_not_finite_are_counted_apart():
    model = dense_model()
    model.head.bias.assign(np.array([np.inf, 0, 0, 0]))
    found = lip.certify(model, np.full((3, 6), 0.5), verbose=0)
    assert (found.unanswered, found.inputs_not_finite) == (3, 0)
    assert "in the inputs of 0, in the logits of 3 more" in str(found)
    assert "no answer" not in str(full())


def test_inputs_outside_0_1_are_warned_of_once():
    x = np.linspace(0, 255, 60).reshape(10, 6)
    with pytest.warns(UserWarning, match="0.5 here is 0.002 of the range") as record:
        lip.certify(dense_model(), x, epsilons=0.5, batch_size=2, verbose=0)
    (warning,) = [w for w in record if w.category is UserWarning]  # NumPy has others
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lip.certify(dense_model(), x / 255, epsilons=0.5, verbose=0)


@pytest.mark.once
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    "epsilons", [(0.1, 0.4), (0.0, 0.05, 0.9), (0.1, 0.101, 0.11), (2.0,), (0.88,), ()]
)
def test_labels_stay_off_lines_off_each_other_and_inside_the_axes(labels, epsilons):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from keras_lipnext.report.plots import accuracy_curve

    whole = dataclasses.replace(certificate(labels), epsilons=epsilons)
    figure = accuracy_curve(whole)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (axes,) = figure.axes
    frame = axes.get_window_extent(renderer)
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert bool(boxes) == bool(epsilons)
    for box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert sum(box.overlaps(other) for other in boxes) == 1  # itself
        if labels:
            line = axes.transData.transform((0, 100 * whole.clean_accuracy))[1]
            assert not box.y0 <= line <= box.y1
        # The curve falls: the lower left corner is above it.
        x, y = axes.transData.inverted().transform((box.x0, box.y0))
        counted = whole.radii[whole.correct] if labels else whole.radii
        assert 100 * (counted > x).sum() / 4 <= y


def test_certified_robust_accuracy_is_explained():
    for text in (str(certificate()), certificate().to_markdown()):
        assert text.count("provably stay so under every perturbation of the input of l2 norm") == 1
        assert text.index("Certified robust accuracy (CRA) at") < text.index("Promised")
    assert "whose prediction, right or wrong, provably stays" in str(certificate(labels=False))


@pytest.mark.parametrize(
    "value, shown",
    [(1.0000005, "1.000000500"), (14.303122955, "14.30312295"), (3.5e12, "3.500000000e+12")],
)
def test_constants_have_ten_digits(value, shown):
    assert f" {shown}\n" in str(dataclasses.replace(certificate(), body_constant=value))
