"""Dense networks for the tests of RS-LMI."""

import keras
import numpy as np
from data import to_numpy

from keras_lipnext import backend, lmi


def network(units=(9, 7), inputs=6, outputs=4, activation="relu", scale=1.0, seed=0):
    model = keras.Sequential([keras.layers.Dense(n, activation=activation) for n in units])
    model.add(keras.layers.Dense(outputs))
    model.build((None, inputs))
    random = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(scale * random.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    return model


def penalty(training):
    with backend.inference_scope():
        return float(to_numpy(training.admissibility.penalty()))


def largest_gradient(model):
    """Largest norm of the Jacobian at random points, from below: it may not exceed a bound."""
    transformed = lmi.loop_transformation(model)
    random = np.random.default_rng(0)
    x = random.normal(size=(500, transformed.E.shape[1])) * 3
    step = random.normal(size=x.shape) * 1e-5
    ratios = np.linalg.norm(transformed(x + step) - transformed(x), axis=1)
    return float((ratios / np.linalg.norm(step, axis=1)).max())
