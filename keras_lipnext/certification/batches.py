"""Batches of NumPy arrays from whatever Keras accepts as data."""

import keras
import numpy as np


def numpy_batches(x, y=None, batch_size=256):
    """Iterator over (inputs, labels or None) and the number of batches, None if unknown.

    Args:
        x: Array or tensor, with `y` beside it; or an iterable of batches, `inputs` or
            `(inputs, labels, ...)`: a tf.data.Dataset, torch DataLoader, keras PyDataset.
        y: Integer or one-hot labels for an array `x`; None without labels.
        batch_size: Samples a batch, for arrays.

    Raises:
        ValueError: if `x` and `y` do not fit together.
    """
    if hasattr(x, "shape") or (isinstance(x, (list, tuple)) and y is not None):
        x = _to_numpy(x)
        labels = None if y is None else class_labels(_to_numpy(y))
        if labels is not None and len(labels) != len(x):
            raise ValueError(f"Received {len(x)} inputs and {len(labels)} labels: they must match.")
        if len(x) == 0:
            raise ValueError("There is nothing to certify: received 0 inputs.")
        starts = range(0, len(x), batch_size)
        parts = (slice(s, s + batch_size) for s in starts)
        return ((x[p], None if labels is None else labels[p]) for p in parts), len(starts)
    if y is not None:
        raise ValueError(
            "`y` goes with an array `x`. Received: `y` beside a data set, which must yield "
            f"(inputs, labels) itself, of type {type(x).__name__}"
        )
    if isinstance(x, keras.utils.PyDataset):
        if x.num_batches is None:
            raise ValueError(
                "The PyDataset is infinite (num_batches is None): certify a finite one."
            )
        batches = (x[i] for i in range(x.num_batches))
        return map(_split, batches), x.num_batches
    try:
        batches = iter(x)
    except TypeError:
        raise ValueError(
            "Expected an array, a tf.data.Dataset, a torch DataLoader, a keras PyDataset or an "
            f"iterable of batches. Received: {x!r} of type {type(x).__name__}"
        ) from None
    return map(_split, batches), len(x) if hasattr(x, "__len__") else None


def class_labels(y):
    """Integer labels, shape (n,), from integers, (n,) or (n, 1), or one-hot rows, (n, classes)."""
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] > 1:
        return y.argmax(axis=-1)
    if y.ndim > 2:
        raise ValueError(f"Labels are integers or one-hot rows. Received: shape={y.shape}")
    return y.reshape(-1).astype("int64")


def _split(batch):
    if isinstance(batch, (list, tuple)):
        x, y = batch[0], batch[1] if len(batch) > 1 else None
        return _to_numpy(x), None if y is None else class_labels(_to_numpy(y))
    return _to_numpy(batch), None


def _to_numpy(x):
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
