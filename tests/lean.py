"""Imported by processes that tests start: they do not find TensorFlow unless it is the backend.

Keras would import it, for seconds, to seed its generator and to ask whether data are its tensors.
"""

import importlib.machinery
import os
import sys


class Without(importlib.machinery.PathFinder):
    """Finds what is installed, but TensorFlow."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "tensorflow" else super().find_spec(name, path, target)


if os.environ.get("KERAS_BACKEND") != "tensorflow":
    sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
