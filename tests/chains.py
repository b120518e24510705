"""Chains of affine layers and activations for tests, and lower bounds of their constants."""

import keras
import numpy as np

from keras_lipnext.lmi._chain import read_chain


def dense_chain(sizes, activation="relu", seed=0, scale=1.0):
    """Dense model of these widths, inputs first, with random weights and biases."""
    random = np.random.default_rng(seed)
    model = keras.Sequential([keras.Input((sizes[0],))])
    for index, units in enumerate(sizes[1:]):
        last = index == len(sizes) - 2
        model.add(keras.layers.Dense(units, activation=None if last else activation))
    for layer in model.layers:
        inputs, units = layer.kernel.shape
        layer.kernel.assign(scale * random.normal(size=(inputs, units)) / np.sqrt(inputs))
        layer.bias.assign(0.3 * random.normal(size=units))
    return model


def product_of_norms(model, part="logits"):
    """What the layers' norms and slopes multiply to, in plain floating point."""
    chain = read_chain(model, part)
    norms = [np.linalg.norm(w, 2) for w in chain.weights]
    return np.prod(norms) * np.prod([max(map(abs, s)) for s in chain.slopes])


def largest_stretch(chain, seed=0, samples=2000, rounds=30):
    """Lower bound of the constant of a chain: a search for pairs of points far apart afterwards.

    From many random points, short steps along the direction that the map stretches most there,
    found by power iteration on differences; the best are refined.
    """
    random = np.random.default_rng(seed)
    inputs = chain.weights[0].shape[1]

    def value(x):
        for layer in chain.layers:
            x = layer(x)
        return x

    def stretch(x, direction, size=1e-4):
        moved = value(x + size * direction) - value(x - size * direction)
        return np.linalg.norm(moved, axis=-1) / (2 * size)

    x = 3 * random.normal(size=(samples, inputs))
    direction = random.normal(size=x.shape)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    best = stretch(x, direction)
    for step in np.geomspace(1.0, 0.02, rounds):
        point = x + step * random.normal(size=x.shape)
        turned = direction + step * random.normal(size=x.shape)
        turned /= np.linalg.norm(turned, axis=-1, keepdims=True)
        for new_x, new_direction in ((point, direction), (x, turned), (point, turned)):
            found = stretch(new_x, new_direction)
            better = (found > best)[:, None]
            x, direction = np.where(better, new_x, x), np.where(better, new_direction, direction)
            best = np.maximum(best, found)
    return float(best.max())
