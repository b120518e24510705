"""Three stored models, and the hashes and figures of their certificates, pinned.

Constants come from NumPy alone: they are equal bit for bit wherever NumPy's products are formed by
the same library for the same processor, on every backend. So are the models' hashes, everywhere.
The bounds of SDP layers' diagonals, logits and radii are evaluated by the backend: within rounding.
"""

import json

import keras
import pytest
from golden_figures import FOLDER, NAMES, blas, figures

PINNED = json.loads((FOLDER / "figures.json").read_text())
ROUNDING = 1e-13
BY_THE_BACKEND = ("SDPDense",)


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """(what was pinned, what is found) of one model."""
    path = FOLDER / f"{request.param}.keras"
    return PINNED[request.param], figures(keras.saving.load_model(path, compile=False))


def numbers(hexadecimal):
    return [float.fromhex(h) for h in hexadecimal]


def test_the_files_are_small():
    for name in NAMES:
        assert (FOLDER / f"{name}.keras").stat().st_size < 60_000


def test_hash(pair):
    pinned, found = pair
    assert found["hash"] == pinned["hash"]


def test_constants(pair):
    pinned, found = pair
    assert [kind for kind, *_ in found["layers"]] == [kind for kind, *_ in pinned["layers"]]
    exact = blas() == PINNED["blas"]
    for (kind, *expected), (_, *given) in zip(pinned["layers"], found["layers"]):
        exact = exact and kind not in BY_THE_BACKEND  # totals behind such a layer are its, too
        assert numbers(given) == pytest.approx(numbers(expected), rel=ROUNDING, abs=0)
        if exact:
            assert given == expected
    for key in ("constant", "body_constant"):
        (given,), (expected,) = numbers([found[key]]), numbers([pinned[key]])
        assert given == pytest.approx(expected, rel=ROUNDING, abs=0)
        if exact:
            assert found[key] == pinned[key]


def test_radii(pair):
    pinned, found = pair
    assert found["predictions"] == pinned["predictions"]
    assert found["certified_accuracy"] == pinned["certified_accuracy"]
    for key in ("radii", "allowances"):
        assert numbers(found[key]) == pytest.approx(numbers(pinned[key]), rel=ROUNDING, abs=0)
