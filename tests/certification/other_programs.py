"""Answers of saved models in a process of its own, with its own settings: paths of two folders.

Of each `<name>.keras` in the first, to the inputs `<name>.npy`, at once and one by one: as
`<name>.npz` in the second.
"""

import pathlib
import sys

import lean  # noqa: F401  before Keras

# isort: split
import keras
import numpy as np

import keras_lipnext  # noqa: F401  its layers

folder, results = map(pathlib.Path, sys.argv[1:])
for path in folder.glob("*.keras"):
    model, x = keras.models.load_model(path), np.load(path.with_suffix(".npy"))
    parts = {"at once": [x], "one by one": np.split(x, len(x))}
    answers = {
        name: np.concatenate(
            [keras.ops.convert_to_numpy(model.predict_on_batch(b)) for b in batches]
        )
        for name, batches in parts.items()
    }
    np.savez(results / path.stem, **answers)
