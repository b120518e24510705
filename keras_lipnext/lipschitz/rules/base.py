"""One rule a layer class: its Lipschitz constant, and the rounding of its float64 evaluation.

A rule is a function `rule(layer, context)` that answers with a `Bound`, a sequence of them (applied
one after the other), or a number, the l2 Lipschitz constant over the whole tensor at inference.
`context` knows the shapes and measures weights: proven from the stored values when certifying,
nominal (1 on the manifold) when training.

Rules belong to the exact class: a subclass may compute something else. Operations of `keras.ops`
have rules under their name.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable

import keras
import numpy as np

from keras_lipnext.backend import keras_private
from keras_lipnext.manifolds import Stiefel
from keras_lipnext.norms.convolutions import convolution_norm_bound, depthwise_norm_bound
from keras_lipnext.norms.matrices import nonnegative_norm_bound, spectral_norm_bound
from keras_lipnext.norms.roundoff import EVALUATION, ROUNDING
from keras_lipnext.overrides import replaced
from keras_lipnext.typing import Function

# What the norm of a convolution may be too large by, relatively.
FINE, COARSE = 1e-3, 0.25
_BLOCK = 2**24  # entries


@dataclasses.dataclass(frozen=True)
class Bound:
    """What is known of a map f between tensors, in l2 norms over the whole tensor of a sample.

    Attributes:
        constant: ||f(x) - f(y)|| <= constant ||x - y||.
        offset: ||f(0)|| <= offset. None if only the constant was stated: then it is measured, and
            the rounding estimated.
        relative, absolute: the float64 evaluation of f(x) is off by at most
            relative ||x|| + absolute.
        combine: How the norms of several inputs act: "hypot" if f reads them as one tensor, "sum"
            if it adds them up, "mean" if it averages them.
        terms: Number of products in the sums that f ends in, which what is added next may join;
            None if f passes on what it reads.
        inside: (slope, offset): what f computes on its way to f(x) has norms of at most
            slope ||x|| + offset, if more than x and f(x).
    """

    constant: float
    offset: float = 0.0
    relative: float = 0.0
    absolute: float = 0.0
    combine: str = "hypot"
    terms: int | None = None
    inside: tuple[float, float] = (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A registered rule, and what is to be known of its class beside the constant.

    Attributes:
        function: `rule(layer, context)`.
        proven: Whether it comes with the library.
        head: The class is a linear map by `kernel`, shape (inputs, outputs), or a convolution, with
            an activation at most: as the last layer of a model it has pairwise constants, where it
            acts on each position alone.
        converts: It turns whole numbers into floating point ones before it computes, or only
            rearranges them.
        identity: It returns its input at inference.
        numbers: Names of attributes that are no weights and that it computes with.
        evaluation: `evaluation(layer, tensor)`, its answer in float64, where that of Keras would
            not be exact enough; or None.
    """

    function: object
    proven: bool
    head: bool = False
    converts: bool = False
    identity: bool = False
    numbers: tuple = ()
    evaluation: object = None


_LAYERS, _OPERATIONS = {}, {}


def lipschitz_rule(*classes: type) -> Callable[[Function], Function]:
    """Decorator that registers the rule of one or more layer classes.

    A rule of your own is a claim of yours: reports say "declared, not proven" of its layers, and
    estimate their rounding unless the rule answers with a `Bound`. A single layer class can
    declare its constant as well, by an attribute `lipschitz_constant`.

    Example:

    ```python
    @keras.saving.register_keras_serializable("mine")
    class Halve(keras.layers.Layer):
        def call(self, inputs):
            return inputs / 2

    @keras_lipnext.certification.lipschitz_rule(Halve)
    def halve(layer, context):
        return 0.5
    ```

    In a rule, `context.norm(kernel)` bounds the spectral norm of a matrix of the layer,
    `context.convolution_norm(kernel, strides, groups)` that of a convolution, and
    `context.input_shape` is known.
    """

    def register(function):
        for cls in classes:  # what the library knows of the class beside its constant stays true
            rule = _LAYERS.get(cls, Rule(function, proven=False))
            _LAYERS[cls] = dataclasses.replace(rule, function=function, proven=False)
        return function

    return register


def library_rule(*keys, **facts):
    """Decorator that registers a rule of the library, a proof.

    Args:
        *keys: Layer classes, and names of the classes of operations of `keras.ops`.
        **facts: Fields of `Rule`, as `head=True`.
    """

    def register(function):
        for key in keys:
            rules = _OPERATIONS if isinstance(key, str) else _LAYERS
            rules[key] = Rule(function, proven=True, **facts)
        return function

    return register


def find_rule(step):
    """The `Rule` for a step of a graph, or None."""
    operation = step.operation
    if replaced(operation):
        return None  # an instance whose methods were replaced is not what its class says
    if not isinstance(operation, keras.layers.Layer):
        of_keras = keras_private.is_keras_operation(operation)
        return _OPERATIONS.get(type(operation).__name__) if of_keras else None
    rule = _LAYERS.get(type(operation))
    declared = getattr(operation, "lipschitz_constant", None)
    if rule is None and isinstance(declared, numbers.Real):
        return Rule(lambda layer, context: declared, proven=False)
    return rule


def refusal(name, reason):
    """The error for a step that cannot be certified, with the ways out."""
    return ValueError(
        f"{name} cannot be certified: {reason}. Replace it by a layer whose Lipschitz constant is "
        "known, as those of keras_lipnext.layers; or state its constant: "
        "@keras_lipnext.certification.lipschitz_rule for its class, or an attribute "
        "`lipschitz_constant` of a layer of your own."
    )


class Context:
    """What a rule may ask: shapes, and proven measures of the stored weights.

    Attributes:
        step: The step of the graph.
        input_shape, output_shape: Without the batch axis, None where unknown.
        input_shapes: Those of all inputs.
        coarse: Whether the norm of a convolution may be too large by a quarter, to be found faster.
        known_norm: A bound of the norm of the layer's only kernel that was found already, or None.
        arithmetic: `Arithmetic` of the evaluation whose rounding is bounded.
        summed: Number of products in the sums that its input may end in; of several the largest.
        joined: That of several inputs together: adding them, a compiler starts the next one's sum
            with what it has of the others.
        parts: How many tensors lie next to each other in its inputs. Summed, they are added.
        reduced: Whether an input is what `keras.ops.sum` or the like made, moved or scaled at most.
    """

    coarse = False
    known_norm: float | None = None
    arithmetic = EVALUATION
    summed = 0
    joined = 0
    parts = 1
    reduced = False

    def __init__(self, step, shapes=None):
        self.step = step
        shapes = shapes or dict(
            zip(step.inputs + step.outputs, step.input_shapes + step.output_shapes)
        )
        self.input_shapes = tuple(shapes[i][1:] for i in step.inputs)
        self.input_shape = self.input_shapes[0]
        self.output_shape = shapes[step.outputs[0]][1:]

    def of_slices(self, step):
        """The context of a step that works on slices of this one's, along its first axis."""
        slices = (s[1:] for s in (*self.input_shapes, self.output_shape))
        indices = (*step.inputs, *step.outputs)
        context = type(self)(step, {i: (None, *s) for i, s in zip(indices, slices)})
        for name in ("arithmetic", "summed", "joined", "parts", "reduced"):
            setattr(context, name, getattr(self, name))
        return context

    def refusal(self, reason):
        return refusal(self.step.title, reason)

    def check_program(self, reason):
        """Refuses a program in float32, for a reason that does not hold of float64 ones."""
        if self.arithmetic.name == "float32":
            raise ValueError(
                f"{self.step.title} cannot be certified as a float32 program: {reason}. "
                'arithmetic="float64" certifies the function.'
            )

    def array(self, weight):
        """The stored values in float64; ValueError if one is not finite."""
        if not isinstance(weight, (keras.Variable, np.ndarray, np.generic, int, float)):
            # A kernel replaced by a tensor, which `weights` does not show.
            if getattr(self.step.operation, "weights", None) is not None:
                raise self.refusal("what it multiplies with is not one of its weights")
        elif isinstance(weight, keras.Variable) and not any(
            weight is stored for stored in getattr(self.step.operation, "weights", (weight,))
        ):
            raise self.refusal("it uses a weight that is not one of its own")
        array = np.asarray(keras.ops.convert_to_numpy(weight))
        if array.dtype == np.float32:
            exact, wide = True, array.astype("float64")
        else:
            # bfloat16 has a kind of its own, "V".
            exact = array.dtype.kind in "biufV" and (array.astype("float64") == array).all()
            wide = array.astype("float64") if array.dtype.kind in "biufV" else np.full((), np.nan)
        if not np.isfinite(wide).all():
            raise ValueError(f"{self.step.title} has weights that are NaN or infinite.")
        if not exact:
            raise self.refusal(f"float64 does not hold its values of dtype {array.dtype}")
        return wide

    def matrix(self, kernel):
        """The stored values of a head's kernel, shape (features, logits), of a 1 x 1 kernel too."""
        values = self.array(kernel)
        return values.reshape(values.shape[-2:])

    def equal_sides(self):
        """Whether sides that are unknown may be taken to be equal: only the data can tell."""
        return False

    def norm(self, kernel):
        """Upper bound of the spectral norm of a matrix."""
        return self._proven(spectral_norm_bound, kernel)

    def largest_norm(self, kernels):
        """Upper bound of the spectral norms of matrices, shape (count, inputs, outputs)."""
        return self._proven(lambda values: max(map(spectral_norm_bound, values)), kernels)

    def convolution_norm(
        self, kernel, strides=1, groups=1, dilation_rate=1, sides=None, padding=None
    ):
        """Upper bound of the norm of a convolution, kernel (*spatial, inputs, outputs).

        With the spatial sides of its input and its padding, that for images of this size.
        """
        excess = COARSE if self.coarse else FINE
        settings = (strides, groups, dilation_rate, sides, padding, excess)
        return self._proven(convolution_norm_bound, kernel, *settings)

    def depthwise_norm(self, kernel, strides=1, dilation_rate=1, sides=None, padding=None):
        """Upper bound of the norm of a depthwise convolution."""
        return self._proven(depthwise_norm_bound, kernel, strides, dilation_rate, sides, padding)

    def largest(self, values):
        """Largest magnitude of a factor that multiplies entries."""
        return float(np.abs(self.array(values)).max(initial=0.0))

    def offset_norm(self, values, shape=None):
        """Norm of what is broadcast and added to a tensor of `shape`, the output's by default."""
        shape = self.output_shape if shape is None else shape
        values = self.array(values)
        repeats = max(size(shape) / max(values.size, 1), 1.0)
        return _norm(values) * math.sqrt(repeats) * (1 + (values.size + 8) * ROUNDING)

    def absolute_norm(self, kernel):
        """Upper bound of the norm of the kernel's magnitudes, kernel (*spatial, inputs, outputs).

        ||A||_2 <= sqrt(||A||_1 ||A||_inf): the largest sums over what one input feeds and over
        what one output reads. Of a program nearer to the norm, which is no less than it.
        """
        values = self.array(kernel)
        values = values.reshape(-1, *values.shape[-2:])
        if self.arithmetic.program:
            # The symbol's entries are largest at frequency 0, where all taps add up.
            return nonnegative_norm_bound(sum(np.abs(taps) for taps in values))
        step = max(1, _BLOCK // values[:, :1].size)  # large ones by parts, to spare their copies
        reads, feeds = 0.0, []
        for start in range(0, values.shape[1], step):
            magnitudes = np.abs(values[:, start : start + step])
            reads = reads + magnitudes.sum(axis=(0, 1))
            feeds.append(magnitudes.sum(axis=(0, 2)).max())
        return float(np.sqrt(reads.max()) * np.sqrt(max(feeds)) * (1 + values.size * ROUNDING))

    def _proven(self, bound, kernel, *arguments):
        if self.known_norm is not None:
            return self.known_norm
        values = self.array(kernel)
        try:
            norm = bound(values, *arguments)
        except ValueError as error:
            raise ValueError(f"{self.step.title}: {error}") from error
        return norm


class UnmeasuredContext(Context):
    """Takes every norm for 1: for what the rules refuse before anything that takes long."""

    known_norm = 1.0

    def absolute_norm(self, kernel):
        return 0.0


class NominalContext(Context):
    """In training: kernels marked as orthonormal have norm 1, whatever else is free to change."""

    def norm(self, kernel):
        if not isinstance(getattr(kernel, "constraint", None), Stiefel):
            raise self._free()
        return 1.0

    def largest_norm(self, kernels):
        raise self._free()

    def convolution_norm(self, kernel, *arguments):
        raise self._free()

    def depthwise_norm(self, kernel, *arguments):
        raise self._free()

    def array(self, weight):
        if isinstance(weight, keras.Variable):
            raise self._free()
        return super().array(weight)

    def offset_norm(self, values, shape=None):
        return 0.0  # no constant depends on it

    def equal_sides(self):
        """In training, sides that are unknown are taken to be equal."""
        return True

    def absolute_norm(self, kernel):
        return 0.0  # rounding is no matter of training

    def _free(self):
        return self.refusal(
            "its norm is free to grow in training, so that its nominal constant is unknown"
        )


def size(shape):
    """Number of entries of a tensor; infinite where a side is unknown."""
    return math.inf if None in shape else math.prod(shape)


def _norm(values):
    """||values||, not rounded; inf past the largest float."""
    largest = np.abs(values).max(initial=0.0)
    if largest == 0 or not np.isfinite(largest):
        return float(largest)
    exponent = int(np.frexp(largest)[1])
    return float(np.ldexp(np.linalg.norm(np.ldexp(values, -exponent)), exponent))
