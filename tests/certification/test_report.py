import builtins
import json

import numpy as np
import pytest
from PIL import Image

from keras_lipnext.certification import Certificate


def certificate(labels=True, radii=(0.5, 0.2, 0.0, 0.9)):
    return Certificate(
        predictions=np.array([0, 1, 2, 1]),
        radii=np.array(radii),
        labels=np.array([0, 1, 2, 0]) if labels else None,
        epsilons=(0.1, 0.4),
        lipschitz_bound=1.0000005,
    )


def test_numbers():
    c = certificate()
    assert c.clean_accuracy == 0.75
    assert c.certified_accuracy == {0.1: 0.5, 0.4: 0.25}
    assert c.certified_share == {0.1: 0.75, 0.4: 0.5}


def test_an_epsilon_equal_to_the_radius_is_not_certified():
    c = certificate(radii=(0.1, 0.1, 0.1, 0.1))
    assert c.certified_accuracy[0.1] == 0


def test_table():
    text = str(certificate())
    assert "clean accuracy" in text
    assert "75.00%" in text
    assert "certified robust accuracy at epsilon = 0.4" in text
    assert "25.00%" in text
    assert "1.000000500" in text
    assert "Promised:" in text
    assert "Not promised:" in text
    assert "share of predictions certified" in str(certificate(labels=False))


def test_dictionary_is_json():
    summary = json.loads(json.dumps(certificate().to_dict()))
    assert summary["clean_accuracy"] == 0.75
    assert summary["certified_accuracy"] == {"0.1": 0.5, "0.4": 0.25}
    assert summary["lipschitz_bound"] == 1.0000005
    assert summary["samples"] == 4
    assert certificate(labels=False).to_dict()["certified_accuracy"] is None


def test_markdown():
    text = certificate().to_markdown()
    assert text.startswith("| quantity | value |\n| --- | ---: |\n| samples | 4 |")
    assert "| clean accuracy | 75.00% |" in text


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("radii", [(0.5, 0.2, 0.0, 0.9), (np.inf, 0.2, 0.0, 0.9), (0,) * 4])
def test_plot(labels, radii, tmp_path):
    path = tmp_path / "curve.png"
    certificate(labels, radii).plot(path)
    with Image.open(path) as image:
        assert image.size == (900, 600)
        pixels = np.asarray(image.convert("L"))
    assert (pixels < 50).sum() > 500  # something is drawn in black


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'keras_lipnext\[plot\]'"):
        certificate().plot(tmp_path / "curve.png")
