"""Optimizers that keep orthogonal matrices on their manifold."""

from keras_lipnext.optimizers.manifold_adam import ManifoldAdam
from keras_lipnext.optimizers.manifold_muon import ManifoldMuon
from keras_lipnext.optimizers.schedules import cosine

__all__ = ["ManifoldAdam", "ManifoldMuon", "cosine"]
