"""Callbacks of `fit`: checkpoints to continue from bit for bit, and a stop for spoilt training."""

from keras_lipnext.callbacks.checkpoints import BackupAndRestore, OrbaxCheckpoint
from keras_lipnext.callbacks.divergence import DivergenceError, StopOnDivergence

__all__ = ["BackupAndRestore", "DivergenceError", "OrbaxCheckpoint", "StopOnDivergence"]
