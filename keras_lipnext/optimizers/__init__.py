"""Optimizers that keep orthogonal matrices on their manifold."""

from keras_lipnext.optimizers.manifold_adam import ManifoldAdam
from keras_lipnext.optimizers.manifold_muon import ManifoldMuon

__all__ = ["ManifoldAdam", "ManifoldMuon"]
