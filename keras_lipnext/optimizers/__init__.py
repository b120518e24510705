"""Optimizers that keep orthogonal matrices on their manifold."""

from keras_lipnext.optimizers.manifold_adam import ManifoldAdam

__all__ = ["ManifoldAdam"]
