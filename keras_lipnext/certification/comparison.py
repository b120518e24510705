"""A model's own answers, and batches on which they are compared with its evaluation in float64."""

import keras
import numpy as np

from keras_lipnext.backend import keras_private
from keras_lipnext.distribution import parts_of_a_batch


def own_answer(model, inputs):
    """The model's own output for a batch, of any size also where devices share its batches."""
    sizes = model.inputs[0].shape[0] or len(inputs)
    missing = max(sizes - len(inputs), 0)
    missing += -(len(inputs) + missing) % parts_of_a_batch()
    full = np.concatenate([inputs, np.repeat(inputs[:1], missing, axis=0)]) if missing else inputs
    given = keras_private.input_structure(model)  # {"x": the input}, as its author likes
    if given is not None:
        full = keras.tree.map_structure(lambda tensor, full=full: full, given)
    (answer,) = keras.tree.flatten(model.predict_on_batch(full))
    return keras.ops.convert_to_numpy(answer)[: len(inputs)]


def probes(shape, dtype, seed=0):
    """A batch that tells layers apart: entries of both signs, of many sizes, no two alike."""
    rng = np.random.default_rng(seed)
    if not keras.backend.is_float_dtype(dtype):
        return rng.integers(0, 2 if dtype == "bool" else 128, size=shape)
    x = rng.normal(size=shape)
    x[1::3] = rng.random(size=x[1::3].shape)
    x[2::3] *= 8.0
    return x.astype("float32").astype("float64")
