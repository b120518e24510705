"""The Lipschitz constant of a model, from those of its steps along the graph."""

import collections
import dataclasses
import math
import numbers
import time

import keras

from keras_lipnext.activations import is_softmax
from keras_lipnext.backend import keras_private
from keras_lipnext.lipschitz.bounds import LayerConstant, LipschitzBound, method_of
from keras_lipnext.lipschitz.composites import (
    check_composites,
    composite_notes,
    declared_composites,
)
from keras_lipnext.lipschitz.graph import Graph, Step, trace
from keras_lipnext.lipschitz.rounding import combined, underflow
from keras_lipnext.lipschitz.rules import (
    layers as layer_rules,
)
from keras_lipnext.lipschitz.rules import merging, operations, pooling, sdp  # noqa: F401
from keras_lipnext.lipschitz.rules.base import (
    Bound,
    Context,
    NominalContext,
    UnmeasuredContext,
    find_rule,
    refusal,
    size,
)
from keras_lipnext.norms.matrices import spectral_norm_bound
from keras_lipnext.norms.roundoff import EVALUATION, SMALLEST_DISTANCE, UP_PRODUCT, SumTooLong
from keras_lipnext.overrides import acts_by_default, replaced, unusual_arguments
from keras_lipnext.typing import LipschitzMethod

# Seconds of silence before a bar shows how far the layers are.
_PATIENCE = 3.0


@dataclasses.dataclass(frozen=True)
class Certifiable:
    """A model as certificates read it: the graph of its body, and the linear head behind it.

    Attributes:
        graph: `Graph` of the whole model.
        body: `Graph` without the head.
        head: The linear map that makes the logits, or None.
        notes: Sentences on what was read in a special way.
        shares: The steps that only turn the logits into shares, in order; they are left out. The
            head is one of them if it does so itself.
        ending: Lipschitz constant of what is left out behind the logits: softmax, log_softmax.
    """

    graph: Graph
    body: Graph
    head: Step | None
    notes: tuple
    shares: tuple = ()
    ending: float = 1.0

    @property
    def steps(self):
        return self.body.steps + ((self.head,) if self.head else ())


def read(model):
    """`Certifiable` of a model. Softmax at its end is left out, with a note."""
    graph = trace(model)
    shares, notes, ending = (), composite_notes(graph) + _augmentation_note(graph), 1.0
    makers = {i: step for step in graph.steps for i in step.outputs}
    last, output = makers.get(graph.output), graph.output
    while last is not None and _only_orders(last):
        shares = (last, *shares)
        notes += (
            f"The model ends in softmax (layer '{last.name}'). It keeps the order of the logits: "
            "those in front of it are certified, and its predictions with them.",
        )
        if getattr(last.operation, "activation", None) and len(last.operation.weights):
            break  # a Dense layer with softmax as its activation is the head itself
        ending *= _stretch(last)
        output = last.inputs[0]
        last = makers.get(output)
    head = last if last is not None and _is_head(last) else None
    if head:
        ending *= _stretch(head)
    needed, steps = {head.inputs[0] if head else output}, []
    for step in reversed(graph.steps):
        if step is not head and not needed.isdisjoint(step.outputs):
            steps.append(step)
            needed.update(step.inputs)
    body = dataclasses.replace(
        graph, steps=tuple(reversed(steps)), output=head.inputs[0] if head else output
    )
    return Certifiable(graph, body, head, notes, shares, ending)


def _augmentation_note(graph):
    """Layers that act on a plain call, too, unless it says that it is none of training."""
    names = [
        f"'{step.name}'"
        for step in graph.steps
        if isinstance(step.operation, keras.layers.Layer)
        and acts_by_default(step.operation)
        and (rule := find_rule(step))
        and rule.identity
    ]
    if not names:
        return ()
    which = "Layer " + names[0] if len(names) == 1 else "Layers " + ", ".join(names)
    return (
        f"{which}: augmentation, which counts as the identity. That is so in `predict` and "
        "`model(x, training=False)`; `model(x)` alone changes its inputs at random, and no "
        "certificate speaks of that.",
    )


def _only_orders(step):
    """Whether the step only turns logits into shares: softmax over the last axis."""
    operation, rank = step.operation, len(step.output_shapes[0])
    if len(step.input_shapes) != 1 or rank < 2:
        return False
    if unusual_arguments(operation, step.args, step.kwargs) or replaced(operation):
        return False
    rule = find_rule(step)
    if type(operation) is keras.layers.Activation or (rule and rule.head):
        return is_softmax(getattr(operation, "activation", None))
    named = step.kind in ("Softmax", "LogSoftmax") and operation.axis in (-1, rank - 1)
    return named and keras_private.is_keras_layer(operation)


def _stretch(step):
    """Lipschitz constant of softmax, at most 1, or of log_softmax.

    The derivative of the latter is I - 1 p^T for shares p, of norm sqrt(n) ||p|| <= sqrt(n).
    """
    function = getattr(step.operation, "activation", None)
    stretching = (keras.activations.log_softmax, keras.ops.log_softmax)
    if step.kind != "LogSoftmax" and not any(function is f for f in stretching):
        return 1.0
    return math.sqrt(size(step.output_shapes[0][-1:])) * UP_PRODUCT


def _is_head(step):
    """Whether the step is a plain linear map of each position's features to its logits.

    So that pairwise constants apply: what is in front of it changes by no more at one position than
    at all of them together.
    """
    layer, rule = step.operation, find_rule(step)
    if rule is None or not (rule.head and rule.proven) or not _by_positions(step):
        return False
    if unusual_arguments(layer, step.args, step.kwargs) or getattr(layer, "lora_enabled", False):
        return False
    activation = getattr(layer, "activation", keras.activations.linear)
    plain = activation is keras.activations.linear or is_softmax(activation)
    return plain and not getattr(layer, "quantization_mode", None)


def _by_positions(step):
    """Whether a layer multiplies the last axis of its input alone: Dense, 1 x 1 convolutions."""
    layer, rank = step.operation, len(step.output_shapes[0])
    if len(layer.kernel.shape) == 2:
        return getattr(layer, "axis", -1) in (-1, rank - 1)
    single = set(layer.kernel.shape[:-2]) == {1} and set(layer.strides) == {1}
    return single and layer.groups == 1 and layer.data_format == "channels_last"


def lipschitz_bound(
    model: keras.Model,
    verbose: int | str = "auto",
    lipschitz: LipschitzMethod = "product",
) -> LipschitzBound:
    """Proves upper bounds of a model's l2 Lipschitz constant from its stored weights.

    `constant` of the answer is the model's, from its input to its output; `body_constant` that of
    what is in front of its head, from which `certify` derives radii.

    Example:

    ```python
    bound = keras_lipnext.lipschitz_bound(model)
    print(bound)
    bound.constant, bound.body_constant, bound.declared
    ```

    Args:
        model: Built functional or Sequential Keras model, nested ones included, of one input and
            one output.
        verbose: 1 for a progress bar over the layers, 0 for silence, "auto" for a bar once it has
            taken three seconds.
        lipschitz: As for `certify`.

    Returns:
        `LipschitzBound`.

    Raises:
        ValueError: naming the layer, if one has no known constant or weights without a norm, or
            the method does not cover it; if the model is not built or not a graph of layers.
        RuntimeError, ImportError: as for `certify`.
    """
    method = method_of(lipschitz)
    certifiable = read(model)
    steps = certifiable.body.steps
    for step in steps:
        _check_built_shape(step)
        step_bounds(step, UnmeasuredContext(step))
    check_composites(certifiable.graph)
    progress = _Progress(len(steps), verbose) if verbose and steps else None
    bound = bound_of(certifiable, *measured(certifiable.body, progress=progress))
    if method is None:
        return bound
    return dataclasses.replace(bound, **by_method(method, certifiable, *method.function(model)[:2]))


class _Unmeasured(Context):
    """To ask a rule whether it covers a layer, before anything is measured or evaluated."""

    def equal_sides(self):
        """Sides that are unknown are the data's matter."""
        return True

    def _proven(self, bound, kernel, *arguments):
        self.array(kernel)
        return 1.0


def ask_rules(body):
    """ValueError from the rule of the first layer that it does not cover.

    Before anything is built in float64, which backends refuse with less to say. Where shapes are
    unknown a rule may refuse what it allows once the data tell them: these refusals are answered.
    """
    unclear = []
    for step in body.steps:
        required_rule(step)
        try:
            step_bounds(step, _Unmeasured(step))
        except ValueError as refusal:
            if all(None not in shape[1:] for shape in step.input_shapes):
                raise
            unclear.append(refusal)
    return unclear


class _Progress:
    """A progress bar over the layers: at once, or with "auto" if they take longer than that."""

    def __init__(self, layers, verbose):
        self._layers, self._bar, self._done = layers, None, 0
        self._start = time.monotonic() + (_PATIENCE if verbose == "auto" else 0.0)

    def add(self, count):
        self._done += count
        if self._bar is None and time.monotonic() >= self._start:
            self._bar = keras.utils.Progbar(self._layers, unit_name="layer")
        if self._bar:
            self._bar.update(self._done)


def by_method(method, certifiable, constant, body_constant):
    """Fields of `LipschitzBound` for constants that a `Method` proved; ValueError if unusable."""
    if not 2.0**-500 < body_constant < 2.0**500:
        raise ValueError(
            f"The Lipschitz constant by {method.title} is {body_constant}: no radius follows."
        )
    return {
        "method": dataclasses.replace(method, function=None, local=None),
        "constant": constant
        if certifiable.ending == 1
        else constant * certifiable.ending * UP_PRODUCT,
        "body_constant": body_constant,
    }


def _check_built_shape(step):
    """Refuses a layer that was changed after the model was built, so that its shapes are stale."""
    layer = isinstance(step.operation, keras.layers.Layer)
    if not layer or not required_rule(step).proven:
        return
    shapes = step.input_shapes
    many = keras.tree.is_nested(step.args[0]) if step.args else False
    made = step.operation.compute_output_shape(list(shapes) if many else shapes[0])
    check_same_shape(step, step.output_shapes[0], tuple(made))


def check_same_shape(step, built, found):
    """ValueError if outputs of shape `found` are not those that the model was built with."""
    if len(built) != len(found) or any(
        n is not None and m is not None and n != m for n, m in zip(built[1:], found[1:])
    ):
        raise refusal(
            step.title,
            f"it makes outputs of shape {found}, and was built for {built}: build the model anew",
        )


@dataclasses.dataclass(frozen=True)
class Joint:
    """Constant of a linear layer and the batch normalisation behind it, as one map.

    Attributes:
        name: Of the linear layer.
        given: Index of the value that it reads.
        constant: From there to the normalisation's output.
    """

    name: str
    given: int
    constant: float


def measured(body, shapes=None, progress=None, arithmetic=EVALUATION):
    """(the `Bound`s of each step of a body, {position of a batch normalisation: `Joint`}).

    Args:
        body: `Graph`.
        shapes: {index of a value: its shape}, those the model was built with by default.
        progress: Progress bar to move on by one for each step, or None.
        arithmetic: `Arithmetic` whose rounding the `Bound`s speak of.
    """
    readers = collections.Counter([body.output, *(i for s in body.steps for i in s.inputs)])
    contexts = [Context(step, shapes) for step in body.steps]
    # Of each value what `Context` says of a step's inputs.
    bounds, joint, summed, parts, reduced = [], {}, {0: 0}, {0: 1}, {0: False}
    following = {first: position for position, first in _normalised(body)}
    for position, (step, context) in enumerate(zip(body.steps, contexts)):
        context.arithmetic = arithmetic
        context.summed = max(summed[i] for i in step.inputs)
        context.joined = sum(summed[i] for i in step.inputs)
        context.parts = sum(parts[i] for i in step.inputs)
        context.reduced = any(reduced[i] for i in step.inputs)
        after = following.get(position)
        norms = after and layer_rules.normalised_norm(context, contexts[after])
        if norms:
            joint[after] = Joint(step.name, step.inputs[0], norms[0])
            # What only the normalisation reads matters to the allowance for rounding alone.
            if readers[step.outputs[0]] == 1:
                context.coarse = True
                context.known_norm = norms[1] if math.isfinite(norms[1]) else None
        bounds.append(step_bounds(step, context))
        terms, new = context.summed, False
        for part in bounds[-1]:
            if part.terms is not None:
                # Of one term it may be no sum: XLA drops those, and products with 1.
                terms = max(terms, 1) if part.terms == 1 else part.terms
                new = new or part.terms != 1
        summed |= dict.fromkeys(step.outputs, terms)
        beside = bounds[-1][0].combine not in ("sum", "mean")
        count = context.parts if beside else max(parts[i] for i in step.inputs)
        parts |= dict.fromkeys(step.outputs, 1 if new else count)
        of_sums = operations.adds_up(step.operation) if new else context.reduced
        reduced |= dict.fromkeys(step.outputs, of_sums)
        if progress:
            progress.add(1)
    return bounds, joint


def _normalised(body):
    """(position, position of the layer in front) of each batch normalisation, both by our rules."""
    makers = {i: position for position, step in enumerate(body.steps) for i in step.outputs}
    for position, step in enumerate(body.steps):
        rule = find_rule(step)
        if rule and rule.function is layer_rules.batch_normalization and step.inputs[0] in makers:
            first = makers[step.inputs[0]]
            if required_rule(body.steps[first]).proven:
                yield position, first


def bound_of(certifiable, bounds, joint=None):
    """`LipschitzBound` of a model, from the `Bound`s of its body's steps and their `Joint`s."""
    total, constants = _combined_along(certifiable.body, bounds, joint)
    head, whole = certifiable.head, total
    if head:
        norm = spectral_norm_bound(Context(head).matrix(head.operation.kernel))
        # A head of zeros makes the model constant; a product that underflows is not 0.
        whole = max(total * norm * UP_PRODUCT, SMALLEST_DISTANCE) if norm else 0.0
    if certifiable.ending != 1:
        whole *= certifiable.ending * UP_PRODUCT
    return LipschitzBound(
        float(whole),
        total,
        constants,
        head.name if head else None,
        certifiable.notes,
        composites=tuple(c.name for c in declared_composites(certifiable.graph)),
    )


def _combined_along(body, bounds, joint=None):
    """(constant, tuple of `LayerConstant`) of a graph, from its steps' `Bound`s and `Joint`s.

    A `Joint` counts where it is less than both layers' constants, one after the other.
    """
    joint = joint or {}
    totals, names, constants, zeros = {0: 1.0}, {0: "input"}, [], []
    for position, (step, parts) in enumerate(zip(body.steps, bounds)):
        constant, joined = 1.0, ""
        for part in parts:
            constant *= part.constant * UP_PRODUCT
        before = combined(parts[0].combine, [totals[i] for i in step.inputs])
        total = before * constant * UP_PRODUCT
        pair = joint.get(position)
        if pair and totals[pair.given] * pair.constant * UP_PRODUCT < total:
            total, joined = totals[pair.given] * pair.constant * UP_PRODUCT, pair.name
        zero = before == 0 or any(part.constant == 0 for part in parts)
        if zero:  # exactly: a constant branch adds nothing to what it is added to
            total = 0.0
            zeros.append(step)
        # Well inside the range of float64, so that nothing under- or overflows on the way, not even
        # where a compiler multiplies the factors of several layers first.
        elif not 2.0**-500 < total < 2.0**500:
            raise ValueError(
                f"The product of the layers' Lipschitz constants is {total} at '{step.name}': no "
                "radius follows."
            )
        for i in step.outputs:
            totals[i], names[i] = total, step.name
        rule = find_rule(step)
        reads = tuple(names[i] for i in step.inputs)
        constants.append(
            LayerConstant(step.name, step.kind, constant, total, rule.proven, reads, joined)
        )
    total = float(totals[body.output])
    if total == 0:
        raise ValueError(
            f"{zeros[0].title} has an all-zero kernel or factor: the model is constant, and no "
            "radius follows, or its weights were not loaded."
        )
    return total, tuple(constants)


def nominal_constant(certifiable):
    """The body's constant by construction: every marked kernel counts as exactly orthogonal.

    For losses and metrics in training. A layer whose norm training can change has none: an error.
    """
    bounds = [step_bounds(step, NominalContext(step)) for step in certifiable.body.steps]
    return _combined_along(certifiable.body, bounds)[0]


def required_rule(step):
    """The `Rule` for a step; ValueError, with the ways out, if there is none."""
    rule = find_rule(step)
    if rule is not None:
        return rule
    if isinstance(step.operation, keras.layers.Layer):
        raise refusal(step.title, "no Lipschitz constant is known for its class")
    raise refusal(
        f"Operation '{step.name}' ({step.kind})",
        "no Lipschitz constant is known for this operation of keras.ops",
    )


def step_bounds(step, context):
    """The `Bound`s of the parts of one step; ValueError if its constant is unknown."""
    rule = required_rule(step)
    is_layer = isinstance(step.operation, keras.layers.Layer)
    if not rule.converts:
        whole = [d for d in step.input_dtypes if "float" not in d]
        if whole:
            raise context.refusal(
                f"it computes in {whole[0]}, not in real numbers: begin with keras.layers.Rescaling"
            )
    unusual = unusual_arguments(step.operation, step.args, step.kwargs) if is_layer else ()
    if unusual:
        raise context.refusal(f"it is called with {unusual}, not as at inference")
    arguments = keras.tree.flatten(step.args[:1] if is_layer else step.args)
    constants = [a for a in arguments if hasattr(a, "shape")]
    if constants and (is_layer or step.kind not in operations.READING_CONSTANTS):
        raise context.refusal("it reads a constant: add or multiply constants by keras.ops")
    try:
        answer = rule.function(step.operation, context)
        if isinstance(answer, numbers.Real):
            # Its rounding is estimated when certifying, and as little proven as the constant.
            answer = Bound(float(answer), offset=None)
        parts = (answer,) if isinstance(answer, Bound) else tuple(answer)
    except SumTooLong as error:
        context.check_program(str(error))
        raise context.refusal(str(error)) from error
    batches = {shape[0] for shape in (*step.input_shapes, *step.output_shapes) if shape}
    if len(batches) > 1:  # as of a layer that takes samples for the rows of one image
        raise context.refusal("its output has another number of samples than its input")
    for part in parts:
        if not part.constant >= 0:
            raise context.refusal(f"its Lipschitz constant was stated as {part.constant}")
    growth = math.prod(max(part.constant, 1.0) for part in parts)
    shapes = (*context.input_shapes, context.output_shape)
    flushed = underflow(context.arithmetic, shapes, growth)
    return (*parts, Bound(1.0, absolute=flushed))
