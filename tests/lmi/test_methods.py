"""`certify` with a bound by matrix inequalities: sound, tighter, and named in every report."""

import json

import keras
import numpy as np
import pytest
from chains import dense_chain
from data import small_lipnext

import keras_lipnext as lip
from keras_lipnext.cli import main

METHODS = {"lipsdp": "LipSDP-Neuron", "eclipse": "ECLipsE", "eclipse_fast": "ECLipsE-Fast"}


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
    gain = product.lipschitz_bound / certificate.lipschitz_bound
    assert gain > 1.2
    assert np.allclose(certificate.radii, gain * product.radii, rtol=1e-9)
    flipped, _ = lip.certification.pgd(model, x, certificate.predictions, 0.999 * certificate.radii)
    assert not flipped.any()


def test_the_constant_is_the_bodys(plain):
    model, x, _ = plain
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz="eclipse_fast")
    assert certificate.lipschitz_bound == lip.lmi.eclipse_fast(model, part="body").constant


def test_without_a_head_it_covers_the_logits():
    inputs = keras.Input((5,))
    x = keras.layers.Dense(6, "relu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, "tanh")(x))
    x = np.random.default_rng(0).normal(size=(20, 5))
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz="eclipse_fast")
    assert certificate.lipschitz_bound == lip.lmi.eclipse_fast(model).constant
    flipped, _ = lip.certification.pgd(model, x, certificate.predictions, 0.999 * certificate.radii)
    assert not flipped.any()


@pytest.mark.parametrize("name", METHODS)
def test_every_report_names_the_method(plain, name, tmp_path):
    model, x, product = plain
    certificate = lip.certify(model, x, epsilons=0.01, verbose=0, lipschitz=name)
    title, layers = METHODS[name], f"{product.lipschitz_bound:.9g}"
    certificate.to_html(tmp_path / "page.html")
    texts = (str(certificate), certificate.to_markdown(), (tmp_path / "page.html").read_text())
    for text in texts:
        assert f"{title} over 3 layers" in text and layers in text
    evidence = certificate.to_dict()["evidence"]
    assert evidence["lipschitz_method"] == name and title in evidence["how_proven"]
    assert title in str(certificate.evidence.bound)
    assert product.to_dict()["evidence"]["lipschitz_method"] == "product"
    assert not any(name in str(product) for name in METHODS.values())


def test_bad_methods_and_models(plain):
    model, x, _ = plain
    with pytest.raises(ValueError, match="lipschitz='best'"):
        lip.certify(model, x, verbose=0, lipschitz="best")
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
    assert written["lipschitz_bound"] < product.lipschitz_bound
    with pytest.raises(SystemExit):
        main([*words, "--lipschitz", "guess"])
