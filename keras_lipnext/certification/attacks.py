"""Projected gradient attack, to check certificates empirically. It proves nothing."""

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.certification.float64 import Float64Twin


def pgd(model, x, labels, radii, steps=20, step_size=0.25, seed=0):
    """l2 PGD that tries to change each prediction within its own radius, in float64.

    Maximises the best other logit minus the label's, by normalised gradient steps projected on the
    ball, from a random start. Inputs are not clipped to [0, 1]: certificates do not need it.

    Args:
        model: Model that `certify` accepts.
        x: Array of inputs.
        labels: Integers, shape (n,): the class to leave, e.g. the predictions.
        radii: Floats, shape (n,): radius of each sample's ball.
        steps: Gradient steps.
        step_size: Step, as a share of the radius.
        seed: Integer seed of the random starts.

    Returns:
        (flipped, adversarial): booleans, shape (n,), whether the prediction left `labels`, and the
        attacked inputs, float64.
    """
    x = np.asarray(x, "float64")
    labels = np.asarray(labels)
    twin = Float64Twin(model)
    per_sample = (-1,) + (1,) * (x.ndim - 1)
    radii = np.asarray(radii, "float64").reshape(per_sample)
    own = np.arange(model.output_shape[-1]) == labels[:, None]

    def excess(tensor):
        logits = twin.tensor(tensor)
        others = keras.ops.where(own, -np.inf, logits)
        label = keras.ops.sum(keras.ops.where(own, logits, 0), axis=-1)
        return keras.ops.max(others, axis=-1) - label

    def unit(v):
        norms = np.sqrt((v**2).sum(axis=tuple(range(1, v.ndim)), keepdims=True))
        return v / np.maximum(norms, 1e-300)

    delta = unit(np.random.default_rng(seed).normal(size=x.shape)) * radii / 2
    for _ in range(steps):
        with backend.float64_scope():
            point = keras.ops.convert_to_tensor(x + delta, dtype="float64")
            slope = keras.ops.convert_to_numpy(backend.gradient(excess, point))
        delta = delta + step_size * radii * unit(slope)
        norms = np.sqrt((delta**2).sum(axis=tuple(range(1, x.ndim)), keepdims=True))
        delta = delta * np.minimum(1, radii / np.maximum(norms, 1e-300))
    adversarial = x + delta
    return twin(adversarial).argmax(axis=-1) != labels, adversarial
