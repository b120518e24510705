"""Labels that certified losses take, checked before a step is taken with them."""

import keras
from keras import ops

from keras_lipnext import backend
from keras_lipnext.arguments import are_shares
from keras_lipnext.batches import class_labels, to_numpy


def check_labels(y, output_shape):
    """Raises for labels that are not of the classes.

    Args:
        y: Integers, shape (n,) or (n, 1), or probabilities, shape (n, classes); alone, or the only
            array in a list or dictionary. None and structures of several arrays are not looked at.
            Of dense outputs such labels for each position.
        output_shape: Shape of the model's logits, (None, classes) or (None, *positions, classes).

    Raises:
        ValueError: saying which labels were received.
    """
    labels = _only_array(y)
    if labels is None:
        return
    labels = to_numpy(backend.of_this_process(labels))
    *positions, classes = output_shape[1:]
    class_labels(_of_positions(labels, positions, classes), classes)
    if labels.dtype.kind == "f" and not (labels >= 0).all():
        raise ValueError("Probabilities as labels are at least 0. Received: negative ones or NaN")


def _of_positions(labels, positions, classes):
    """The labels of dense outputs, of all positions one below the other; others as they are."""
    shape = labels.shape[1:]
    if not positions:
        return labels
    if len(shape) in (len(positions), len(positions) + 1) and all(
        n in (m, None) for n, m in zip(positions, shape)
    ):
        if len(shape) == len(positions) or shape[-1] == 1:
            return labels.reshape(-1)
        if shape[-1] == classes:
            return labels.reshape(-1, classes)
    places = ", ".join(map(str, positions))
    raise ValueError(
        f"Labels are integers, shape (n, {places}), or probabilities, shape (n, {places}, "
        f"{classes}). Received: shape={labels.shape}"
    )


def with_labels_checked(data, output_shape):
    """The batch of a step on TensorFlow, with labels that are there only once they are checked.

    As `check_labels`, in a program that runs in front of the step: XLA, which may compile the step,
    leaves checks out.
    """
    y = keras.utils.unpack_x_y_sample_weight(data)[1]
    labels = _only_array(y)
    if labels is None:
        return data
    classes = output_shape[-1]
    if are_shares(labels.shape, classes, len(output_shape)):
        valid, message = labels >= 0, "Probabilities as labels are at least 0."
    else:
        whole = ops.cast(labels, "int32")
        valid = (ops.cast(whole, labels.dtype) == labels) & (whole >= 0) & (whole < classes)
        message = (
            f"The model has {classes} classes: labels are whole numbers from 0 to {classes - 1}."
        )
    checked = backend.check_each(labels, valid, message)
    return keras.tree.map_structure(lambda a: checked if a is labels else a, data)


def _only_array(y):
    arrays = [a for a in keras.tree.flatten(y) if a is not None]
    return arrays[0] if len(arrays) == 1 and hasattr(arrays[0], "shape") else None
