"""Batches of NumPy arrays from whatever Keras accepts as data."""

import keras
import numpy as np

from keras_lipnext.arguments import are_shares, positive_integer


def numpy_batches(x, y=None, batch_size=256, input_shape=None):
    """Iterator over (inputs, labels or None) and the number of batches, None if unknown.

    Args:
        x: Array or tensor, with `y` beside it; or an iterable of batches, `inputs` or
            `(inputs, labels, ...)`: a tf.data.Dataset, torch DataLoader, keras PyDataset.
        y: Integer or one-hot labels for an array `x`; None without labels.
        batch_size: Samples a batch, for arrays.
        input_shape: Of the model, with batch axis. If that is fixed, an array's batches are no
            larger.

    Raises:
        ValueError: if `x` and `y` do not fit together or lack the batch axis, or numbers are wider
            than float64.
    """
    positive_integer("batch_size", batch_size)
    batch_size = min(batch_size, (input_shape and input_shape[0]) or batch_size)
    if isinstance(x, tuple) and len(x) == 2 and y is None:
        raise ValueError(
            "Received a pair as `x`: pass inputs and labels apart, `certify(model, x, y)`."
        )
    if isinstance(x, (dict, str)):
        raise ValueError(f"Expected one array or data set as `x`. Received: {type(x).__name__}")
    if isinstance(x, list) and x and isinstance(x[0], (tuple, list)) and hasattr(x[0][0], "shape"):
        return map(_split, x), len(x)
    if hasattr(x, "shape") or isinstance(x, list):
        x = to_numpy(x)
        if x.ndim == 0:
            raise ValueError(f"Expected an array with a batch axis. Received: {x!r}")
        labels = None if y is None else to_numpy(y)
        _check_batch_axis(x, labels, input_shape)
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
    try:
        total = len(x)
    except TypeError:  # a data set of unknown length
        total = None
    return map(_split, batches), total


def check_batch(inputs, labels, input_shape):
    """ValueError unless a batch, and its labels or None, are of one size that the model takes."""
    _check_batch_axis(inputs, labels, input_shape)
    if len(inputs) and not np.size(inputs):
        raise ValueError(f"Inputs hold no numbers. Received: inputs of shape {np.shape(inputs)}")
    if labels is not None and len(labels) != len(inputs):
        raise ValueError(f"A batch has {len(inputs)} inputs and {len(labels)} labels.")
    if len(inputs) > (input_shape[0] or len(inputs)):
        raise ValueError(
            f"The model was built for batches of {input_shape[0]} samples. Received: a batch of "
            f"{len(inputs)}. Batch the data set by {input_shape[0]}, or build the model anew "
            "without a batch size."
        )


def _check_batch_axis(x, labels, input_shape):
    if (input_shape and x.ndim == len(input_shape) - 1) or (labels is not None and not labels.ndim):
        raise ValueError(
            "Inputs and labels have a batch axis in front: for one sample pass `x[None]` and "
            f"`y[None]`; batch a data set. Received: inputs of shape {x.shape}"
            + ("" if input_shape is None else f", where the model takes {input_shape}")
            + ("" if labels is None else f", labels of shape {labels.shape}")
        )


def class_labels(y, classes):
    """Integer labels, shape (n,), from integers, (n,) or (n, 1), or rows of `classes` shares."""
    y = np.asarray(y)
    if y.dtype.kind not in "biuf":
        raise ValueError(f"Labels are integers or one-hot rows. Received: dtype={y.dtype}")
    if are_shares(y.shape, classes):
        return y.argmax(axis=-1)
    if y.ndim not in (1, 2) or y.size != len(y):
        raise ValueError(
            f"Labels are integers, shape (n,) or (n, 1), or one-hot rows, shape (n, {classes}). "
            f"Received: shape={y.shape}"
        )
    labels = y.reshape(-1).astype("int64")
    if not (labels == y.reshape(-1)).all() or not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(
            f"The model has {classes} classes: labels are whole numbers from 0 to {classes - 1}. "
            f"Received: labels from {y.min()} to {y.max()} of dtype {y.dtype}"
        )
    return labels


def decision_labels(y, logits, task="multiclass", ignore=None):
    """Labels in the shape of the predictions of a model with logits of this shape.

    Args:
        y: As `class_labels` takes them; with positions (batch, ...), or (batch, ..., 1), or one-hot
            along a last axis. Of independent labels 0 or 1 each, in the shape of the logits.
        logits: Shape of the model's output, batch axis included, None where unknown.
        task: "multiclass" or "multilabel".
        ignore: Label that is let pass, or None.
    """
    y = np.asarray(y)
    *positions, classes = logits[1:]
    if task == "multilabel":
        if y.shape[-1:] != (classes,) or y.ndim != len(logits):
            raise ValueError(
                f"Independent labels are 0 or 1, in the shape of the logits, {logits}. Received: "
                f"shape={y.shape}"
            )
        return class_labels(y.reshape(-1), 2).reshape(y.shape)
    classes = max(classes, 2)
    if not positions:
        return class_labels(y, classes)
    shape = y.shape[: len(positions) + 1]
    fits = len(shape) == len(positions) + 1 and y.shape[len(shape) :] in ((), (1,), (classes,))
    if not fits or any(n not in (None, m) for n, m in zip(positions, shape[1:])):
        raise ValueError(
            f"The model decides at each position of {tuple(positions)}: labels are integers of "
            f"shape (n, *positions), or one-hot of shape (n, *positions, {classes}). Received: "
            f"shape={y.shape}"
        )
    flat = y.reshape(-1, classes) if y.shape[len(shape) :] == (classes,) else y.reshape(-1)
    if flat.ndim > 1 and not ((flat >= 0).all() and (flat.sum(axis=1) > 0).all()):
        raise ValueError(
            "One-hot labels of positions hold rows that are of no class, all zero, negative or "
            "NaN. Pass integers, with `ignore_class` for the positions that are not to count."
        )
    left = np.zeros(len(flat), bool) if flat.ndim > 1 or ignore is None else flat == ignore
    found = np.full(len(flat), -1 if ignore is None else ignore)
    if not left.all():
        found[~left] = class_labels(flat[~left], classes)
    return found.reshape(shape)


def check_numbers(x, dtype):
    """ValueError unless a batch holds real numbers that a model input of this dtype takes as such.

    A model of whole numbers would cut fractions off.
    """
    x = np.asarray(x)
    if x.dtype.kind not in "biuf":
        raise ValueError(f"Inputs are real numbers. Received: dtype={x.dtype}")
    if x.dtype.kind in "iu" and x.size and max(x.max(), -int(x.min())) > 2**53:
        raise ValueError("The inputs hold integers beyond 2^53, which float64 cannot.")
    if not keras.backend.is_float_dtype(dtype) and (x != np.floor(x)).any():
        raise ValueError(
            f"The model takes inputs of dtype {dtype} and would cut off fractions. Received: "
            f"fractional inputs of dtype {x.dtype}"
        )


def _split(batch):
    if isinstance(batch, (list, tuple)):
        x, y = batch[0], batch[1] if len(batch) > 1 else None
        return to_numpy(x), None if y is None else to_numpy(y)
    return to_numpy(batch), None


def to_numpy(x):
    """The array that is checked, shown and computed with: in the byte order of this machine."""
    if hasattr(x, "detach"):  # a torch tensor; NumPy has no bfloat16
        x = x.detach().cpu()
        x = x.float() if "bfloat16" in str(x.dtype) else x
    x = np.asarray(x)
    if x.dtype.kind == "f" and x.dtype.itemsize > 8:  # no backend has such numbers
        wide = x.astype("float64")
        if (wide != x)[~np.isnan(x)].any():
            raise ValueError(
                f"Received numbers of dtype {x.dtype} that float64 does not hold: round them to "
                "float64 first."
            )
        return wide
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
