"""Losses that train for certified robustness."""

from keras_lipnext.losses.emma import EMMA, CertifiedCrossEntropy

__all__ = ["EMMA", "CertifiedCrossEntropy"]
