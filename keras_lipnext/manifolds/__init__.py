"""The orthogonal group and the Stiefel manifold, as pure functions and a Keras constraint."""

from keras_lipnext.manifolds import stiefel
from keras_lipnext.manifolds.constraint import RandomStiefel, Stiefel
from keras_lipnext.manifolds.fast_exp import fast_exp
from keras_lipnext.manifolds.orthogonalize import orthogonalize
from keras_lipnext.manifolds.polar import newton_schulz, polar, polar_svd
from keras_lipnext.manifolds.rotation import rotate

__all__ = [
    "RandomStiefel",
    "Stiefel",
    "fast_exp",
    "newton_schulz",
    "orthogonalize",
    "polar",
    "polar_svd",
    "rotate",
    "stiefel",
]
