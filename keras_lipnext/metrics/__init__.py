"""Metrics of certified robustness and of critics, for `compile` and `evaluate`."""

from keras_lipnext.metrics.certified import CertifiedAccuracy, CertifiedRadius
from keras_lipnext.metrics.wasserstein import WassersteinEstimate

__all__ = ["CertifiedAccuracy", "CertifiedRadius", "WassersteinEstimate"]
