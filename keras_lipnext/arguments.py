"""Checks of arguments: they answer with the value, or raise and say what was received."""

import numbers
from collections.abc import Sequence
from typing import Any

import keras


def title(layer: Any) -> str:
    """How error messages name a layer."""
    return f"Layer '{layer.name}' ({type(layer).__name__})"


def resolve_data_format(data_format: str | None) -> str:
    if data_format is None:
        return keras.config.image_data_format()
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(
            "`data_format` must be 'channels_last', 'channels_first' or None. "
            f"Received: data_format={data_format!r}"
        )
    return data_format


def positive_integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return int(value)


def non_negative_integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"`{name}` must be an integer, 0 or more. Received: {name}={value!r}")
    return int(value)


def number(name: str, value: float) -> float:
    """Raises unless `value` is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}")
    return value


def share(name: str, value: float) -> float:
    """Raises unless `value` is a number in [0, 1)."""
    if not 0 <= number(name, value) < 1:
        raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={value!r}")
    return value


def are_shares(shape: Sequence[int], classes: int, rank: int = 2) -> bool:
    """Whether labels of this shape are rows of shares of the classes, one-hot ones included.

    Of one class there are none: shape (n, 1) holds integers. `rank` is that of the logits.
    """
    return len(shape) == rank and shape[-1] == classes > 1
