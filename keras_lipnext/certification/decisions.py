"""What a model decides of a sample: which of its logits are compared with one another.

A model of several classes decides once, or once at each position of an image: the body's output is
K-Lipschitz as a whole, and so at each position. One logit z = w . f + b decides between z and a
logit that is always 0, the kernel [0, w]; several independent labels are as many such decisions.
"""

import dataclasses
import re

import keras
import numpy as np

from keras_lipnext.activations import find_activation
from keras_lipnext.lipschitz.program import inner
from keras_lipnext.lipschitz.rounding import Compared
from keras_lipnext.lipschitz.rules.base import Context, find_rule
from keras_lipnext.norms.roundoff import ROUNDING
from keras_lipnext.radius import joint_norms_float64, pairwise_distances_float64

TASKS = ("multiclass", "multilabel")


@dataclasses.dataclass(frozen=True)
class Decision:
    """A decision of each position: the largest of all logits, or whether one is above 0.

    Attributes:
        compared: `Compared`, the logits.
        logit: Index of the one logit; None compares all.
    """

    compared: Compared
    logit: int | None = None

    def rows(self, answer):
        """The logits compared, shape (samples * positions, classes), in a model's answer."""
        flat = answer.reshape(-1, answer.shape[-1])
        if self.logit is None:
            return flat
        chosen = flat[:, self.logit]
        return np.stack([np.zeros_like(chosen), chosen], axis=-1)


def decisions_of(certifiable, logits, task):
    """The `Decision`s of a model of so many logits: one, or one a label."""
    kernel, biases, head = None, np.zeros(logits), certifiable.head
    if head is not None:
        kernel = Context(head).matrix(head.operation.kernel)
        if head.operation.bias is not None:
            # Not finite, they leave no logit finite and no radius.
            stored = np.asarray(keras.ops.convert_to_numpy(head.operation.bias))
            biases = np.abs(stored.astype("float64"))
    if task == "multiclass" and logits > 1:
        return (Decision(_compared(kernel, biases, 2.0**0.5)),)
    return tuple(
        Decision(
            _compared(
                None if kernel is None else np.pad(kernel[:, [k]], ((0, 0), (1, 0))),
                np.pad(biases[[k]], (1, 0)),
                1.0,
            ),
            k,
        )
        for k in range(logits)
    )


def _compared(kernel, biases, apart):
    """`Compared`; without a head differences have the constant `apart` times the logits'."""
    if kernel is None:
        return Compared(np.full((len(biases),) * 2, apart * (1 + ROUNDING)))
    return Compared(pairwise_distances_float64(kernel), kernel, joint_norms_float64(kernel), biases)


# Steps that pass a number's sign on: they move, repeat, leave out or average numbers.
_PASSING = re.compile(
    r"Identity|Cast|Reshape|Flatten|Permute|Transpose|Moveaxis|Swapaxes|Squeeze|ExpandDims|GetItem"
    r"|RepeatVector|(Cropping|ZeroPadding|UpSampling)\dD|(Global|)(Average|Max)Pooling\dD"
)


def _channels_first(step):
    return getattr(inner(step.operation), "data_format", None) == "channels_first"


def _maker(certifiable):
    """The step that makes the answer, but for what passes it on; None where it is an input."""
    if certifiable.head is not None:
        return certifiable.head
    makers = {i: step for step in certifiable.body.steps for i in step.outputs}
    step = makers.get(certifiable.body.output)
    while step is not None and len(step.inputs) == 1 and _passes_on(step):
        step = makers.get(step.inputs[0])
    return step


def _passes_on(step):
    rule, operation = find_rule(step), step.operation
    activation = getattr(operation, "activation", None)
    if type(operation) is keras.layers.Activation and activation is keras.activations.linear:
        return True
    return bool((rule and rule.identity) or _PASSING.fullmatch(step.kind))


def check_task(task, model, certifiable):
    """ValueError unless the model's output can be read as this task's logits."""
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}. Received: task={task!r}")
    shape = tuple(model.outputs[0].shape)
    if len(shape) < 2 or shape[-1] is None:
        raise ValueError(
            "The model must answer with logits of shape (batch, classes), or (batch, height, "
            "width, classes), (batch, ..., classes) for one decision a position. Received: "
            f"output_shape={shape}"
        )
    maker = _maker(certifiable)
    steps = certifiable.steps
    if len(shape) > 2 and steps and _channels_first(steps[-1]):
        raise ValueError(
            f"Each position's decision is read along the last axis, and {steps[-1].title} puts its "
            "channels first. Let keras.layers.Permute move them to the end. Received: "
            f"output_shape={shape}"
        )
    if task == "multiclass" and shape[-1] > 1:
        return
    last = certifiable.shares[-1] if certifiable.shares else None
    if last is None and maker is not None:
        operation = inner(maker.operation)
        linear = getattr(operation, "activation", None) is keras.activations.linear
        last = maker if find_activation(operation) is not None and not linear else None
    if last is not None:
        raise ValueError(
            f"The model ends in an activation, {last.title}, and a decision between two answers is "
            "whether a logit is above 0, of which sigmoid makes one half: certify the model of "
            "the logits in front of it. Train that with "
            "keras.losses.BinaryCrossentropy(from_logits=True)."
        )
