"""Imported, before Keras, by processes that tests start: they do not find what they do not need.

Keras would import, for seconds, TensorFlow, to seed its generator and to ask whether data are its
tensors, JAX for checkpoints, scikit-learn and Matplotlib for parts of its own. It does without.
"""

import importlib.machinery
import os
import sys

BACKENDS = {"tensorflow", "jax"} - {os.environ.get("KERAS_BACKEND", "tensorflow")}
HIDDEN = {"matplotlib", "sklearn"} | BACKENDS


class Without(importlib.machinery.PathFinder):
    """Finds what is installed, but what is hidden."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in HIDDEN else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
