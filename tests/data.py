"""Data and small models for tests."""

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_lipnext as lip
from keras_lipnext import backend


def load_digits_split():
    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")
    order = np.random.default_rng(3).permutation(len(images))
    train, test = order[:1400], order[1400:]
    return (images[train], data.target[train]), (images[test], data.target[test])


def small_lipnext(**kwargs):
    arguments = {"input_shape": (8, 8, 1), "num_classes": 10, "depth": 2, "width": 16}
    arguments |= {"patch_size": 2, "shift_ratio": 1 / 8}
    return lip.LipNeXt(**(arguments | kwargs))


def to_numpy(x):
    """NumPy array of a tensor or variable, bfloat16 included."""
    return keras.ops.convert_to_numpy(backend.value(x))


def dense_model(features=6, classes=4):
    """A CertifiableModel on vectors, without a stem."""
    inputs = keras.Input((features,))
    x = lip.layers.BetaAbs(1.0)(lip.layers.OrthogonalDense(features)(inputs))
    x = lip.layers.OrthogonalDense(features)(x)
    return lip.CertifiableModel(inputs, lip.layers.NormalizedDense(classes)(x))
