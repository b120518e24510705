"""What annotations name: the forms in which Keras takes and gives things.

Keras has no annotations of its own, so its classes are only names to a type checker.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import keras

# Of the backend, or symbolic: jax.Array, torch.Tensor, tf.Tensor and keras.KerasTensor have no
# class in common.
Tensor: TypeAlias = Any
Shape: TypeAlias = Sequence[int | None]
Config: TypeAlias = dict[str, Any]  # of `get_config`
Logs: TypeAlias = dict[str, Any] | None  # of a callback's methods
DType: TypeAlias = str | keras.DTypePolicy | None
Activation: TypeAlias = str | Callable[..., Tensor] | None
Initializer: TypeAlias = str | Config | Callable[..., Tensor] | None
LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule
Path: TypeAlias = str | os.PathLike[str]
# Of `certify`: a function of `keras_lipnext.lmi`, its name or a `LipschitzResult`; they lie above.
LipschitzMethod: TypeAlias = str | Callable[..., Any] | Any
Function = TypeVar("Function", bound=Callable[..., Any])  # what a decorator gives back
