"""Three stored models, and the hashes and figures of their certificates, pinned.

Constants come from NumPy alone: they are equal bit for bit wherever NumPy's products are formed by
the same library for the same processor, on every backend. So are the models' hashes, everywhere.
The bounds of SDP layers' diagonals, logits and radii are evaluated by the backend: within rounding.
"""

import json

import keras
import pytest
from golden_figures import FOLDER, NAMES, batch, blas, figures, stored

import keras_lipnext as lip
from keras_lipnext.lipschitz.graph import class_name, trace

PINNED = json.loads((FOLDER / "figures.json").read_text())
ROUNDING = 1e-13
BY_THE_BACKEND = ("SDPDense",)


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """(what was pinned, what is found) of one model."""
    return PINNED[request.param], figures(stored(request.param))


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


def test_the_hash_names_no_module_of_ours(monkeypatch):
    model = stored("functional")
    before = trace(model).digest()
    for cls in (lip.layers.BetaAbs, lip.layers.OrthogonalDense, keras.layers.Dense):
        monkeypatch.setattr(cls, "__module__", f"keras.moved_{cls.__name__}")
    assert trace(model).digest() == before


def test_classes_of_one_name_have_different_names_in_hashes():
    class Add(keras.layers.Layer):
        pass

    layer = class_name(keras.layers.Add)
    inputs = keras.Input((2,))
    (step,) = trace(keras.Model(inputs, inputs + 1)).steps
    mine = class_name(Add)
    registered = class_name(keras.saving.register_keras_serializable("mine")(Add))
    assert layer == "keras.layers.Add"
    assert class_name(type(step.operation)) == "keras.ops.Add"
    assert mine.startswith(f"{__name__}:") and mine.endswith("Add")
    assert registered == "mine>Add"
    assert class_name(lip.layers.BetaAbs) == "keras_lipnext>BetaAbs"


def test_a_hash_of_the_first_format_is_refused_by_its_name():
    model = stored("lipnext")
    old = "6fe9860bd74fefdc12e1c25fa8e1ea85bfed73574ebcb176bc05cb5cf47d99b1"  # in format 1
    message = rf"The model's hash is 2:[0-9a-f]{{64}}, not the {old} expected, which is of format 1"
    with pytest.raises(ValueError, match=message):
        lip.certify(model, *batch(model), verbose=0, expected_hash=old)
