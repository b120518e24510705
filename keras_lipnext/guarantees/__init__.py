"""What can be proven of models besides classes: ranges of outputs, distances, prediction sets."""

from keras_lipnext.guarantees.conformal import ConformalPredictor, conformal
from keras_lipnext.guarantees.enclose import enclose
from keras_lipnext.guarantees.enclosure import Enclosure
from keras_lipnext.guarantees.wasserstein import WassersteinBound, wasserstein

__all__ = [
    "ConformalPredictor",
    "Enclosure",
    "WassersteinBound",
    "conformal",
    "enclose",
    "wasserstein",
]
