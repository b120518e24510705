"""One reading of labels, for all losses."""

from keras import ops

from keras_lipnext.arguments import are_shares
from keras_lipnext.typing import Tensor


def _check_shape(y_true: Tensor, y_pred: Tensor) -> None:
    """Raises for labels whose shape is not that of the logits' positions, or of the logits."""
    shape, (*positions, classes) = tuple(y_true.shape), y_pred.shape
    rest = shape if len(shape) == len(positions) else shape[:-1]
    if (
        len(shape) - len(positions) not in (0, 1)
        or (len(shape) > len(positions) and shape[-1] not in (1, classes))
        or any(None not in (n, m) and n != m for n, m in zip(rest[1:], positions[1:]))
    ):
        places = "".join(f", {n}" for n in positions[1:])
        raise ValueError(
            f"Labels are integers, shape (batch{places or ','}) or (batch{places}, 1), or "
            f"probabilities, shape (batch{places}, {classes}). Received: y_true of shape {shape}"
        )


def read_classes(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
    """(labels, probabilities), shape (batch, ...) and (batch, ..., classes), of logits `y_pred`.

    Args:
        y_true: Integers, shape (batch, ...) or (batch, ..., 1), or probabilities, shape (batch,
            ..., classes), of which the label is the most probable class. Of a label that is no
            class the probabilities are NaN.
        y_pred: Logits, shape (batch, ..., classes): of each position of dense outputs.
    """
    classes = y_pred.shape[-1]
    _check_shape(y_true, y_pred)
    if are_shares(y_true.shape, classes, len(y_pred.shape)):
        return ops.argmax(y_true, axis=-1), ops.cast(y_true, y_pred.dtype)
    given = ops.reshape(y_true, ops.shape(y_pred)[:-1])
    labels = ops.clip(ops.cast(given, "int32"), 0, classes - 1)
    probabilities = ops.one_hot(labels, classes, dtype=y_pred.dtype)
    # A label outside the classes is a NaN to be seen, not a sample to be skipped. By a division: a
    # NaN that stands ready for it would stop those who search for NaNs.
    inside = ops.cast(given == ops.cast(labels, given.dtype), y_pred.dtype)[..., None]
    return labels, probabilities / inside


def read_members(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """1 where an output's class is the sample's, else 0, in the shape of `y_pred`.

    Of one output the labels are 1, and 0 or -1; others give NaN. Of several as `read_classes`.
    """
    if y_pred.shape[-1] > 1:
        labels, probabilities = read_classes(y_true, y_pred)
        members = ops.one_hot(labels, y_pred.shape[-1], dtype=y_pred.dtype)
        return members + 0 * probabilities
    if len(y_true.shape) == 2 and y_true.shape[-1] != 1:
        raise ValueError(
            "Of one output the labels are 1, and 0 or -1, shape (batch,) or (batch, 1). Received: "
            f"y_true of shape {tuple(y_true.shape)}"
        )
    y_true = ops.cast(ops.reshape(y_true, (-1, 1)), y_pred.dtype)
    valid = (y_true == 1) | (y_true == 0) | (y_true == -1)
    return ops.cast(y_true > 0, y_pred.dtype) / ops.cast(valid, y_pred.dtype)
