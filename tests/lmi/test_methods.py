"""`certify` with a bound by matrix inequalities: sound, tighter, and named in every report."""

import dataclasses
import json
import pickle

import keras
import numpy as np
import pytest
from chains import dense_chain
from data import small_lipnext

import keras_lipnext as lip
from keras_lipnext.cli import main
from keras_lipnext.lmi.result import pair_constants

METHODS = {
    "lipsdp": "LipSDP-Neuron",
    "eclipse": "ECLipsE",
    "eclipse_fast": "ECLipsE-Fast",
    "eclipse_diagonal": "ECLipsE-Diagonal",
}


@pytest.fixture(scope="module")
def plain():
    """A plain Dense network, inputs, and its certificate by the product of norms."""
    model = dense_chain((8, 12, 12, 12, 4), seed=5)
    x = np.random.default_rng(6).normal(size=(60, 8)).astype("float32")
    return model, x, lip.certify(model, x, epsilons=0.01, verbose=0)


@pytest.mark.parametrize("name", METHODS)
def test_radii_grow_and_no_attack_breaks_them(plain, name):
    model, x, product = plain
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz=name)
    assert np.array_equal(certificate.predictions, product.predictions)
    gain = product.body_constant / certificate.body_constant
    assert gain > 1.2
    # Not smaller than by the body's constant, and larger where the pair has a better one.
    assert (certificate.radii >= gain * product.radii * (1 - 1e-9)).all()
    assert (certificate.radii > 1.01 * gain * product.radii).any()
    flipped, _ = lip.certification.pgd(model, x, certificate.predictions, 0.999 * certificate.radii)
    assert not flipped.any()


@pytest.mark.once
def test_the_constant_is_the_bodys(plain):
    model, x, _ = plain
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz="eclipse_fast")
    assert certificate.body_constant == lip.lmi.eclipse_fast(model, part="body").constant


@pytest.mark.once
@pytest.mark.parametrize("name", METHODS)
def test_the_models_constant_is_the_same_by_every_way(plain, name):
    model, x, _ = plain
    found = getattr(lip.lmi, name)(model)
    bound = lip.lipschitz_bound(model, lipschitz=name)
    assert bound.constant == pytest.approx(found.constant, rel=1e-6)
    if name in ("eclipse_fast", "eclipse_diagonal"):  # no solver, so that it repeats itself
        assert bound.constant == found.constant
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz=name)
    assert certificate.constant == pytest.approx(found.constant, rel=1e-6)
    assert bound.body_constant == pytest.approx(certificate.body_constant, rel=1e-6)
    assert bound.constant < lip.lipschitz_bound(model).constant


def test_without_a_head_it_covers_the_logits():
    inputs = keras.Input((5,))
    x = keras.layers.Dense(6, "relu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, "tanh")(x))
    x = np.random.default_rng(0).normal(size=(20, 5))
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz="eclipse_fast")
    assert certificate.body_constant == lip.lmi.eclipse_fast(model).constant
    flipped, _ = lip.certification.pgd(model, x, certificate.predictions, 0.999 * certificate.radii)
    assert not flipped.any()


@pytest.mark.once
@pytest.mark.parametrize("name", METHODS)
def test_every_report_names_the_method(plain, name, tmp_path):
    model, x, product = plain
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz=name)
    title, layers = METHODS[name], f"{product.body_constant:.9g}"
    certificate.to_html(tmp_path / "page.html")
    texts = (str(certificate), certificate.to_markdown(), (tmp_path / "page.html").read_text())
    for text in texts:
        assert f"{title} over 3 layers" in text and layers in text
    evidence = certificate.to_dict()["evidence"]
    assert evidence["lipschitz_method"] == name and title in evidence["how_proven"]
    assert title in str(certificate.evidence.bound)
    assert product.to_dict()["evidence"]["lipschitz_method"] == "product"
    assert not any(name in str(product) for name in METHODS.values())


def logits_of(model, x):
    return model.predict(x, verbose=0).astype("float64")


@pytest.mark.once
def test_radii_are_never_below_those_of_the_logits_constant(plain):
    """What `project` grants, margin / (sqrt(2) L), holds of the certificate too."""
    _, x, _ = plain
    model = dense_chain((8, 12, 12, 12, 4), seed=8)
    found = lip.lmi.project(model, 2.0)
    margins = np.sort(logits_of(model, x), axis=1)
    margins = margins[:, -1] - margins[:, -2]
    for lipschitz in ("eclipse_fast", found):
        certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz=lipschitz)
        assert (certificate.radii >= (1 - 1e-4) * margins / (2**0.5 * 2.0)).all()


@pytest.mark.once
def test_a_result_is_proven_again(plain):
    model, x, _ = plain
    best = lip.lmi.lipsdp(model)
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz=best)
    assert "LipSDP with the multipliers of lipsdp-neuron" in str(certificate)
    assert str(pickle.loads(pickle.dumps(certificate))) == str(certificate)
    flipped, _ = lip.certification.pgd(model, x, certificate.predictions, 0.999 * certificate.radii)
    assert not flipped.any()
    # A number that somebody wrote into it counts for nothing.
    forged = dataclasses.replace(best, constant=1e-3, part="body", status="verified")
    again = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz=forged)
    assert np.array_equal(again.radii, certificate.radii)
    # Nor do the multipliers of other weights: they prove what they prove, or nothing.
    other = dense_chain((8, 12, 12, 12, 4), seed=5)
    other.set_weights([0.9 * w for w in model.get_weights()])
    moved = lip.certify(other, x, epsilons=0.01, verbose=0, lipschitz=best)
    flipped, _ = lip.certification.pgd(other, x, moved.predictions, 0.999 * moved.radii)
    assert not flipped.any() and (moved.radii > 0).all()
    other.set_weights([1.1 * w for w in model.get_weights()])
    with pytest.raises(RuntimeError, match="not its own"):
        lip.certify(other, x, epsilons=0.01, verbose=0, lipschitz=best)
    with pytest.raises(ValueError, match=r"layers of \[12, 12, 12\] neurons"):
        lip.certify(dense_chain((8, 6, 4), seed=0), x, verbose=0, lipschitz=best)


@pytest.mark.once
def test_pairs_take_the_better_of_both_multipliers(plain):
    model, _, _ = plain
    body, logits = (lip.lmi.lipsdp(model, part=part).multipliers for part in ("body", "logits"))
    *_, pairs = lip.lmi.lipsdp.certifying.function(model)
    ones = [pair_constants(model, multipliers) for multipliers in (body, logits)]
    assert (ones[1] < ones[0] * (1 - 1e-6)).any()
    np.testing.assert_allclose(pairs, np.minimum(*ones), rtol=1e-6)


def result_with(multipliers, method="eclipse"):
    return lip.lmi.LipschitzResult(1.0, method, "verified", "logits", 0.0, multipliers)


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_given_multipliers_of_any_dtype_certify_no_more_than_is_true(dtype):
    """Logits (x, -x) for x > 0: the distance of 1 to the boundary is 1."""
    slope = 0.5 if dtype == "int8" else 0.85
    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(1, use_bias=False),
            keras.layers.LeakyReLU(slope),
            keras.layers.Dense(2, use_bias=False),
        ]
    )
    model.layers[0].kernel.assign([[1.0]])
    model.layers[2].kernel.assign([[1.0, -1.0]])
    best = 1 / (1 - slope)
    spread = {"float16": 4e-3, "float32": 3e-7, "int8": 0.0}[dtype]
    shares = 1 + spread * np.linspace(-1, 1, 9)
    radii = []
    for m in np.unique((shares * best).astype(dtype)):
        given = result_with((np.array([m]),))
        try:
            certificate = lip.certify(model, [[1.0]], epsilons=0.1, verbose=0, lipschitz=given)
        except RuntimeError:  # nothing proven
            continue
        radii.append(certificate.radii[0])
    assert 0.9 < max(radii) <= 1


@pytest.mark.once
@pytest.mark.parametrize(
    "multipliers",
    [None, (1.0, 2.0, 3.0), iter([np.ones(12)] * 3)],
    ids=["None", "numbers", "iterator"],
)
def test_results_without_vectors_are_refused(plain, multipliers):
    model, x, _ = plain
    with pytest.raises(ValueError, match="multipliers of a LipschitzResult must be"):
        lip.certify(model, x, verbose=0, lipschitz=result_with(multipliers))


@pytest.mark.once
def test_names_of_methods_are_text_in_one_line(plain, tmp_path):
    model, x, _ = plain
    found = lip.lmi.eclipse_fast(model)
    named = dataclasses.replace(found, method="<script>")
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz=named)
    certificate.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "multipliers of &lt;script&gt;" in page
    assert "multipliers of <script>" not in page
    for method in ("a\nb", None):
        wrong = dataclasses.replace(found, method=method)
        with pytest.raises(ValueError, match="must be a name in one line"):
            lip.certify(model, x, verbose=0, lipschitz=wrong)


@pytest.mark.once
def test_bad_methods_and_models(plain):
    model, x, _ = plain
    with pytest.raises(ValueError, match="lipschitz='best'"):
        lip.certify(model, x, verbose=0, lipschitz="best")
    with pytest.raises(ValueError, match=r"lipschitz=1\.0"):
        lip.lipschitz_bound(model, lipschitz=1.0)
    with pytest.raises(ValueError, match=r"cannot be read as part of a chain.*product"):
        lip.certify(small_lipnext(), np.zeros((2, 8, 8, 1)), verbose=0, lipschitz="eclipse_fast")


def test_the_command(plain, tmp_path, monkeypatch, capsys):
    model, x, product = plain
    monkeypatch.chdir(tmp_path)
    model.save("model.keras")
    np.savez("data.npz", x=x)
    words = ["certify", "model.keras", "data.npz", "--json", "out.json", "--epsilons", "0.01"]
    assert main([*words, "--lipschitz", "eclipse_fast"]) == 0
    assert "ECLipsE-Fast over 3 layers" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["body_constant"] < product.body_constant
    assert main(["inspect", "model.keras", "--lipschitz", "eclipse_fast"]) == 0
    assert (
        f"K          {written['body_constant']:.10g} from input to head, ECLipsE-Fast"
        in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        main([*words, "--lipschitz", "guess"])
