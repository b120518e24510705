"""Writes the golden models and their figures: three small models, weights from NumPy's seed 0.

    KERAS_BACKEND=torch python tests/golden/golden_figures.py models | figures

The models are made once and committed; `figures.json` is what `certify` finds of them, in hex.
"""

import json
import pathlib
import sys

import keras
import numpy as np
from threadpoolctl import threadpool_info

import keras_lipnext as lip

FOLDER = pathlib.Path(__file__).parent
NAMES = ("lipnext", "sll_net", "functional")


def lipnext():
    return lip.LipNeXt(
        input_shape=(8, 8, 1),
        num_classes=3,
        depth=1,
        width=8,
        patch_size=2,
        shift_ratio=1 / 8,
        neck="pool",
    )


def sll_net():
    return lip.SLLNet(
        input_shape=(8, 8, 1),
        num_classes=3,
        depth=1,
        width=4,
        hidden_filters=3,
        dense_depth=1,
        hidden_units=6,
    )


def functional():
    """Layers of Keras and ours, operations of keras.ops, a residual sum and a nested model."""
    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Rescaling(0.5, offset=-0.25)(inputs)
    x = keras.layers.Conv2D(3, 3, padding="same", activation="relu")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.ops.abs(x) * 0.75
    x = lip.layers.L2Pool(2)(x)
    x = keras.layers.Flatten()(x)
    x = lip.layers.OrthogonalDense(10)(x)
    x = keras.layers.Add()([x, lip.layers.SDPDense(10)(x)])
    nested = keras.Sequential([keras.Input((10,)), lip.layers.MaxMin(axis=-1, name="sort")])
    x = lip.layers.BetaAbs(0.5)(nested(keras.ops.pad(x[:, :-1], ((0, 0), (0, 1)))))
    return keras.Model(inputs, lip.layers.NormalizedDense(3)(x))


def drawn(variable, rng):
    """Numbers that a variable of this name and shape may hold."""
    shape = tuple(variable.shape)
    if "variance" in variable.path:
        return rng.uniform(0.5, 1.5, shape)
    values = rng.standard_normal(shape)
    if variable.constraint is not None and len(shape) == 2:
        q, _ = np.linalg.qr(values if shape[0] >= shape[1] else values.T)
        return q if shape[0] >= shape[1] else q.T
    return values / np.sqrt(max(np.prod(shape[:-1]), 4.0))


def stored(name):
    return keras.saving.load_model(FOLDER / f"{name}.keras", compile=False)


def batch(model):
    shape = (5, *model.input_shape[1:])
    x = np.random.default_rng(1).random(shape).astype("float32")
    return x, np.arange(5) % 3


def blas():
    """What forms NumPy's products here: its last bits are the library's and the processor's."""
    libraries = [
        i for i in threadpool_info() if i["user_api"] == "blas" and "numpy" in i["filepath"]
    ]
    return [[i.get(k) for k in ("internal_api", "version", "architecture")] for i in libraries]


def figures(model):
    """The certificate's figures, floats in hex."""
    certificate = lip.certify(
        model, *batch(model), epsilons=(0.01, 0.1), verbose=0, arithmetic="real"
    )
    layers = certificate.evidence.bound.layers
    return {
        "hash": certificate.evidence.weights_hash,
        "constant": certificate.constant.hex(),
        "body_constant": certificate.body_constant.hex(),
        "layers": [[a.kind, a.constant.hex(), a.total.hex()] for a in layers],
        "predictions": certificate.predictions.tolist(),
        "radii": [r.hex() for r in certificate.radii.tolist()],
        "allowances": [e.hex() for e in certificate.error_allowances.tolist()],
        "certified_accuracy": list(certificate.certified_accuracy.values()),
    }


def main(what):
    if what == "models":
        for name in NAMES:
            model, rng = globals()[name](), np.random.default_rng(0)
            for variable in model.weights:
                variable.assign(drawn(variable, rng))
            model.save(FOLDER / f"{name}.keras")
    loaded = {
        name: keras.saving.load_model(FOLDER / f"{name}.keras", compile=False) for name in NAMES
    }
    found = {name: figures(model) for name, model in loaded.items()}
    path = FOLDER / "figures.json"
    path.write_text(json.dumps({"blas": blas(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
