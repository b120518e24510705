"""Metrics of certified robustness, for `compile` and `evaluate`."""

from keras_lipnext.metrics.certified import CertifiedAccuracy, CertifiedRadius

__all__ = ["CertifiedAccuracy", "CertifiedRadius"]
