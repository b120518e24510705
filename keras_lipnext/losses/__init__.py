"""Losses that train for certified robustness, and for Wasserstein-1 distances."""

from keras_lipnext.losses.emma import EMMA, CertifiedCrossEntropy
from keras_lipnext.losses.kantorovich_rubinstein import HKR, KantorovichRubinstein

__all__ = ["EMMA", "HKR", "CertifiedCrossEntropy", "KantorovichRubinstein"]
