"""An ordinary Keras model becomes its 1-Lipschitz counterpart, layer by layer along its graph.

Every value of the new model is about that of the old one divided by a scale, which is carried
along: biases are divided by it, so that they keep their size beside what they are added to.
"""

import dataclasses
import math
import re
from typing import Any

import keras
import numpy as np

from keras_lipnext import layers
from keras_lipnext.activations import ACTIVATION_LAYERS, find_activation, is_softmax
from keras_lipnext.lipschitz.graph import Value, trace
from keras_lipnext.lipschitz.model import step_bounds
from keras_lipnext.lipschitz.rules.base import NominalContext, find_rule
from keras_lipnext.manifolds.polar import polar
from keras_lipnext.models.certifiable import CertifiableModel

kl = keras.layers

ACTIVATIONS = {
    "max_min": layers.MaxMin,
    "beta_abs": layers.BetaAbs,
    "householder": layers.Householder,
    "keep": None,
}
DROPPED = {
    kl.Dropout: "acts in training only",
    kl.SpatialDropout1D: "acts in training only",
    kl.SpatialDropout2D: "acts in training only",
    kl.AlphaDropout: "acts in training only",
    kl.GaussianDropout: "acts in training only",
    kl.BatchNormalization: "its factors are free to grow; norms are kept without it",
    kl.LayerNormalization: "it has no Lipschitz constant; norms are kept without it",
    kl.GroupNormalization: "it has no Lipschitz constant; norms are kept without it",
    kl.RMSNormalization: "it has no Lipschitz constant; norms are kept without it",
    kl.UnitNormalization: "it has no Lipschitz constant; norms are kept without it",
}
_NEW = "new"
# What may stand behind the last activation of a model: behind it nothing pairs channels any more.
_PASSED = (kl.Flatten, kl.Reshape, kl.Permute, kl.Concatenate, kl.Average, kl.Add, *DROPPED)
_SUFFIXES = {kl.Activation: "activation", kl.Rescaling: "scale"}
_SUFFIXES |= {kl.ZeroPadding2D: "pad", kl.Cropping2D: "crop"}
_SHARES = {"Softmax": "softmax", "LogSoftmax": "softmax"}
_SHARES |= {"Sigmoid": "sigmoid", "LogSigmoid": "sigmoid"}
_SIGMOIDS = [
    getattr(module, name)
    for module in (keras.activations, keras.ops)
    for name in ("sigmoid", "log_sigmoid")
]


@dataclasses.dataclass(frozen=True)
class Change:
    """What became of one layer.

    Attributes:
        layer: Its name in the model that was converted.
        kind: Name of its class.
        became: What stands in its place, "" if nothing does.
        weights: "kept", "projected" (on the Stiefel manifold), "normalised", "folded" (into the
            layer in front), "shared" (with its first use), "new" (drawn at random), or "" without
            weights.
        why: A remark, or "".
    """

    layer: str
    kind: str
    became: str
    weights: str = ""
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` answers with; as text, a table of the changes.

    Attributes:
        model: The 1-Lipschitz model; a `CertifiableModel` if it ends in a head.
        changes: A `Change` a layer, in order.
        cannot: Sentences on the layers that were left out as they cannot be converted.
    """

    model: keras.Model
    changes: tuple[Change, ...]
    cannot: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("layer", "became", "weights", "why")]
        rows += [
            (f"{c.layer} ({c.kind})", c.became or "(left out)", c.weights, c.why)
            for c in self.changes
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(f"Cannot be converted: {reason}" for reason in self.cannot)])


def convert(
    model: keras.Model,
    kind: str = "orthogonal",
    activation: str = "max_min",
    bound: str = "spectral",
    strict: bool = True,
) -> Conversion:
    """Makes the 1-Lipschitz counterpart of an ordinary Keras model, and says what it changed.

    It starts from the weights of the model where their shapes allow, and is to be trained on from
    there: with its scales a network loses what they had learned.

    - Dense becomes `OrthogonalDense` (kernel: the nearest orthonormal one) or `SDPDense`, the last
      one, whose output is (batch, ..., classes), `NormalizedDense`, as does a last Conv2D of single
      pixels, channels last.
    - Conv2D becomes `PatchEmbedding` where its windows tile the image and it has filters enough,
      `OrthogonalDense` where they are single pixels, else `SDPConv2D`, of the same windows.
    - Activations become `activation`, but for one at the end: softmax and sigmoid are left out
      there, so that the model answers in logits, and others stay. A softmax elsewhere is refused.
    - Dropout and normalisation layers are left out; a batch normalisation behind a linear layer is
      first folded into its weights.
    - Windows of max pooling that overlap become disjoint ones; averages are scaled to norm 1;
      GlobalAveragePooling2D becomes `L2Pool`.
    - Add becomes Average. What else has a known constant c stays, divided by c if that is above 1.

    Example:

    ```python
    plain = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    conversion = keras_lipnext.convert(plain)
    print(conversion)
    conversion.model.compile("adam", keras_lipnext.losses.EMMA(epsilon=0.3))
    ```

    Args:
        model: Built functional or Sequential model of one input and one output; stays as it is.
        kind: "orthogonal" or "sdp", of the Dense layers.
        activation: "max_min", "beta_abs", "householder", or "keep" for those of the model. Where
            the number of channels is odd, `BetaAbs` stands for those that pair channels.
        bound: Of the SDP layers. "spectral" divides a kernel by its norm and so keeps its function
            up to a scale; "aol" is cheaper to train, and changes it.
        strict: Whether a layer that cannot be converted is an error. Else it is left out where its
            output is of its input's shape.

    Returns:
        `Conversion`.

    Raises:
        ValueError: for an unknown `kind`, `activation` or `bound`; naming all layers that cannot be
            converted; if the model is not built, or not a graph of layers.
    """
    for name, value, known in (
        ("kind", kind, ("orthogonal", "sdp")),
        ("activation", activation, tuple(ACTIVATIONS)),
        ("bound", bound, ("spectral", "aol", "sll")),
    ):
        if value not in known:
            raise ValueError(
                f"`{name}` must be one of {', '.join(known)}. Received: {name}={value!r}"
            )
    converter = _Converter(trace(model), kind, activation, bound)
    outputs = converter.run()
    if converter.cannot and (strict or converter.broken):
        raise ValueError(
            f"Model '{model.name}' cannot be converted:\n- " + "\n- ".join(converter.cannot)
        )
    cls = CertifiableModel if converter.head else keras.Model
    converted = cls(inputs=converter.inputs, outputs=outputs, name=f"{model.name}_lipschitz")
    return Conversion(converted, tuple(converter.changes), tuple(converter.cannot))


class _Refused(ValueError):
    """Why a layer cannot be converted."""


class _Converter:
    """Walks the steps of a graph and makes the new model's values."""

    def __init__(self, graph, kind, activation, bound):
        self._graph, self._kind, self._activation = graph, kind, activation
        self._bound = bound
        self.inputs = keras.Input(graph.input_shape[1:], dtype=graph.input_dtype)
        self._values, self._scales = {0: self.inputs}, {0: 1.0}
        self._made, self._names = {}, set()
        self.changes, self.cannot, self.broken = [], [], False
        self._final, self.head = _ending(graph)
        self._folded = _foldable(graph)
        self._factors = {}  # by which the scale grows, of each layer that has its weights
        # Which axis of images holds the channels, where no layer says so.
        first = [getattr(s.operation, "data_format", None) for s in graph.steps]
        self._image_axis = 1 if "channels_first" in first else -1

    def run(self):
        """The output of the new model."""
        for step in self._graph.steps:
            reads = [self._values[i] for i in step.inputs]
            try:
                value, scale = self._converted(step, reads)
            except ValueError as refused:
                self.cannot.append(
                    str(refused) if isinstance(refused, _Refused) else _reason(step, refused)
                )
                value, scale = reads[0], self._scales[step.inputs[0]]
                if step.output_shapes[0] != step.input_shapes[0]:
                    # Goes on in the shape of the old model, to name all that cannot be converted.
                    value, self.broken = keras.Input(step.output_shapes[0][1:]), True
                self._note(step, "", why="cannot be converted")
            for i in step.outputs:
                self._values[i], self._scales[i] = value, scale
        return self._values[self._graph.output]

    def _converted(self, step, reads):
        operation, scale = step.operation, self._scales[step.inputs[0]]
        kind = type(operation)
        final = step.outputs in self._final
        if final and _only_shares(step):
            self._note(step, "", why=_logits(step))
            return reads[0], scale
        if step.inputs in self._folded:
            self._note(step, "", "folded", "into the layer in front")
            return reads[0], scale
        if kind in DROPPED:
            self._note(step, "", why=DROPPED[kind])
            return reads[0], scale
        if step.outputs == self.head:
            return self._last(step, reads[0], scale)
        if kind is kl.Dense:
            return self._dense(step, reads[0], scale)
        if kind is kl.Conv2D:
            return self._convolution(step, reads[0], scale)
        if _shares(step) == "softmax":
            raise _inner_softmax(step)
        bends = kind in ACTIVATION_LAYERS or _is_activation(operation)
        if not final and (kind is kl.PReLU or (bends and self._activation != "keep")):
            value, became = self._nonlinear(reads[0], step)
            grows = kind is kl.PReLU and self._activation == "keep"
            self._note(step, became, why="its slopes are free to grow" if grows else "")
            return value, scale
        if kind in (kl.MaxPooling2D, kl.AveragePooling2D):
            return self._pooling(step, reads[0], scale)
        if kind is kl.GlobalAveragePooling2D and not operation.keepdims:
            pooled = self._layer(layers.L2Pool, step, data_format=operation.data_format)(reads[0])
            self._note(step, "L2Pool", why="the mean of many entries has a small norm")
            positions = math.prod(n or 1 for n in reads[0].shape[1:]) / pooled.shape[-1]
            return pooled, scale / math.sqrt(positions)
        if step.kind == "Add" and len(reads) > 1:
            scales = [self._scales[i] for i in step.inputs]
            self._note(step, "Average", why=f"a sum of {len(reads)} is not 1-Lipschitz")
            average = self._layer(kl.Average, step)(reads)
            return average, len(reads) * float(np.mean(scales))
        return self._kept(step, reads)

    # Linear layers.

    def _last(self, step, x, scale):
        kernel, bias, why = self._weights(step)
        units = kernel.shape[-1]
        made = self._layer(layers.NormalizedDense, step, units, use_bias=bias is not None)
        x = made(x)
        weights, _ = self._assign(made, kernel, bias, scale, "normalised")
        if sum(other.operation is step.operation for other in self._graph.steps) > 1:
            why = _joined(why, "applied elsewhere, too: here by weights of its own")
        self._note(step, "NormalizedDense", weights, _joined(why, _shares(step) and _logits(step)))
        return x, scale

    def _dense(self, step, x, scale):
        cls = layers.SDPDense if self._kind == "sdp" else layers.OrthogonalDense
        return self._linear(step, cls, (step.operation.units,), {}, x, scale)

    def _convolution(self, step, x, scale):
        layer = step.operation
        if layer.groups != 1 or max(layer.dilation_rate) != 1:
            raise _Refused(f"{step.title}: groups and dilation have no 1-Lipschitz counterpart")
        size, strides, filters = tuple(layer.kernel_size), tuple(layer.strides), layer.filters
        first = layer.data_format == "channels_first"
        channels, sides = (x.shape[1], x.shape[2:]) if first else (x.shape[-1], x.shape[1:3])
        if size == (1, 1) and strides == (1, 1) and not (first and self._kind == "sdp"):
            cls, settings = layers.OrthogonalDense, {"axis": 1 if first else -1}
            if self._kind == "sdp":
                cls, settings = layers.SDPDense, {}
            return self._linear(step, cls, (filters,), settings, x, scale)
        tiles = size == strides and size[0] == size[1] > 1 and None not in sides
        tiles = tiles and not any(n % size[0] for n in sides)
        if tiles and filters >= size[0] ** 2 * channels:
            settings = {"data_format": layer.data_format}
            return self._linear(step, layers.PatchEmbedding, (size[0], filters), settings, x, scale)
        settings = {"strides": strides, "data_format": layer.data_format}
        if None in sides and layer.padding == "valid":
            raise _Refused(f"{step.title}: padding 'valid' needs images of a known size")
        grids, why = [_grid(*a, layer.padding) for a in zip(sides, size, strides)], ""
        if None in grids:
            why = "its windows may be shifted: where they are depends on the size of the images"
        grids = [grid or (0, (0, 0)) for grid in grids]
        zeros = tuple((front, 0) for front, _ in grids)
        crop = tuple(ends for _, ends in grids)
        return self._linear(
            step, layers.SDPConv2D, (filters, size), settings, x, scale, why, zeros, crop
        )

    def _linear(self, step, cls, arguments, settings, x, scale, why="", zeros=(), crop=()):
        """A layer of a class with a kernel, the old one's weights, and its activation."""
        kernel, bias, folded = self._weights(step)
        if cls is layers.PatchEmbedding:
            why = "it has no bias" if bias is not None else ""
        else:
            settings = {**settings, "use_bias": bias is not None}
        if cls in (layers.SDPDense, layers.SDPConv2D):
            settings["bound"] = self._bound
        made = self._layer(cls, step, *arguments, **settings)
        x, padded = self._framed(step, x, kl.ZeroPadding2D, zeros)
        x = made(x)
        weights, scale = self._assign(made, kernel, bias, scale, "projected")
        x, cropped = self._framed(step, x, kl.Cropping2D, crop)
        became, why = [*padded, cls.__name__, *cropped], _joined(folded, why)
        function = step.operation.activation
        final = step.outputs in self._final
        if final and _shares(step):
            why = _joined(why, _logits(step))
        elif _shares(step) == "softmax":
            raise _inner_softmax(step)
        elif function is not keras.activations.linear:
            if final or self._activation == "keep":
                x, added, constant = self._plain_activation(step, x)
                scale = scale * constant
            else:
                x, added = self._nonlinear(x, step, made)
            became.append(added)
        self._note(step, ", ".join(became), weights, why)
        return x, scale

    def _weights(self, step):
        """(kernel, bias or None, remark), a batch normalisation behind the layer folded in."""
        layer = step.operation
        kernel = _array(layer.kernel)
        bias = None if layer.bias is None else _array(layer.bias)
        if step.outputs not in self._folded:
            return kernel, bias, ""
        norm = self._folded[step.outputs]
        factor = 1 / np.sqrt(_array(norm.moving_variance) + norm.epsilon)
        if norm.scale:
            factor = factor * _array(norm.gamma)
        bias = (0.0 if bias is None else bias) - _array(norm.moving_mean)
        bias = bias * factor + (_array(norm.beta) if norm.center else 0.0)
        return kernel * factor, bias, "normalisation folded in"

    def _assign(self, made, kernel, bias, scale, how):
        """(what became of the weights, the scale of what the layer makes)."""
        if id(made) in self._factors:
            return "shared", scale * self._factors[id(made)]
        flat, factor = kernel.reshape(-1, kernel.shape[-1]), 1.0
        target = tuple(made.kernel.shape)
        if math.prod(target) != kernel.size or not (np.isfinite(flat).all() and flat.any()):
            return _NEW, 1.0
        stiefel = isinstance(made, (layers.OrthogonalDense, layers.PatchEmbedding))
        if isinstance(made, layers.NormalizedDense):
            factor = np.linalg.norm(flat, axis=0)
            if not factor.all():
                return _NEW, 1.0
            value = flat / factor
        elif stiefel:
            projected = polar(flat.astype("float32"))
            value = np.asarray(keras.ops.convert_to_numpy(projected), "float64")
            factor = np.linalg.norm(flat) / np.linalg.norm(value)
        else:
            value, how = kernel, "kept"
        made.kernel.assign(value.reshape(target))
        if hasattr(made, "effective_kernel"):
            effective = keras.ops.convert_to_numpy(made.effective_kernel())
            factor = np.linalg.norm(flat) / np.linalg.norm(effective.astype("float64"))
        if bias is not None and getattr(made, "bias", None) is not None:
            made.bias.assign(bias / (scale * factor))
        self._factors[id(made)] = factor
        return how, scale * factor

    def _framed(self, step, x, cls, ends):
        """(value, names of the layers): with ((top, bottom), (left, right)) added or cut off."""
        if not any(map(any, ends)):
            return x, ()
        settings = {"data_format": step.operation.data_format}
        return self._beside(cls, step, ends, **settings)(x), (cls.__name__,)

    # What is between them.

    def _nonlinear(self, x, step, made=None):
        """(value, name of the layer) of the activation that was asked for, over the channels."""
        cls = ACTIVATIONS[self._activation] or layers.MaxMin
        axis = self._image_axis if len(x.shape) == 4 else -1
        if made is not None and getattr(made, "axis", -1) != -1:
            axis = made.axis
        if x.shape[axis] % 2:
            cls = layers.BetaAbs
        suffix = "" if made is None else "activation"
        return self._layer(cls, step, axis=axis, suffix=suffix)(x), cls.__name__

    def _plain_activation(self, step, x):
        """(value, names of the layers, what it is divided by) of the layer's own activation."""
        activation = find_activation(step.operation)
        if activation is None:
            raise _Refused(f"{step.title}: no constant is known of its activation")
        x = self._beside(kl.Activation, step, step.operation.activation)(x)
        name = getattr(step.operation.activation, "__name__", "Activation")
        if activation.constant <= 1:
            return x, name, 1.0
        x = self._beside(kl.Rescaling, step, 1 / activation.constant)(x)
        return x, f"{name}, Rescaling", activation.constant

    def _pooling(self, step, x, scale):
        """Disjoint windows, as many as there were; of averages the norm 1 by a factor."""
        layer = step.operation
        size, strides = tuple(layer.pool_size), tuple(layer.strides)
        windows, why = tuple(map(min, size, strides)), ""
        if windows != size:
            why = f"windows of {size} at strides of {strides} overlap"
        sides = x.shape[2:] if layer.data_format == "channels_first" else x.shape[1:3]
        average, same = isinstance(layer, kl.AveragePooling2D), layer.padding == "same"
        zeros, crop = (), ()
        if None in sides:
            if average and same:
                why = _joined(why, "windows that cross the border are left out")
        elif same and average:
            # Averages of the entries within the image alone would have a larger norm.
            missing = [
                max((-(-n // s) - 1) * s + w - n, 0) for n, w, s in zip(sides, windows, strides)
            ]
            zeros = tuple((m // 2, m - m // 2) for m in missing)
            why = _joined(why, "zeros count at the border" if any(missing) else "")
        elif not same:
            axes = list(zip(sides, size, windows, strides))
            surplus = [(n - w) // s - (n - k) // s for n, k, w, s in axes]
            front = [(k - w) // 2 // s for _, k, w, s in axes]
            crop = tuple((min(f, r), r - min(f, r)) for f, r in zip(front, surplus))
        x, padded = self._framed(step, x, kl.ZeroPadding2D, zeros)
        if max(strides) == 1:
            x, cropped = self._framed(step, x, kl.Cropping2D, crop)
            why = "disjoint windows of one entry: nothing is pooled"
            self._note(step, ", ".join(cropped), why=why)
            return x, scale
        made = self._layer(
            type(layer),
            step,
            windows,
            strides=strides,
            padding="valid" if average else layer.padding,
            data_format=layer.data_format,
        )
        x, cropped = self._framed(step, made(x), kl.Cropping2D, crop)
        became = [*padded, step.kind, *cropped]
        if average:
            factor = math.sqrt(math.prod(windows))
            x = self._beside(kl.Rescaling, step, factor)(x)
            scale, became = scale / factor, [*became, "Rescaling"]
            why = _joined(why, "a mean of n entries has norm 1 / sqrt(n)")
        self._note(step, ", ".join(became), why=why)
        return x, scale

    def _kept(self, step, reads):
        """The layer or operation itself, divided by its constant if that is above 1."""
        rule = find_rule(step)
        if rule is None or not rule.proven:
            raise _Refused(f"{step.title}: it has no Lipschitz constant that is known")
        operation = step.operation
        if isinstance(operation, keras.layers.Layer):
            if id(operation) not in self._made:
                copy = type(operation).from_config(
                    {**operation.get_config(), "name": self._name(step, "")}
                )
                self._made[id(operation)] = copy
            operation = self._made[id(operation)]
        args, kwargs = keras.tree.map_structure(
            lambda a: self._values[a.index] if isinstance(a, Value) else a,
            (step.args, step.kwargs),
        )
        value = operation(*args, **kwargs)
        if not isinstance(value, keras.KerasTensor):
            raise _Refused(f"{step.title}: it makes several outputs")
        if getattr(operation, "weights", None):
            operation.set_weights(step.operation.get_weights())
        shapes = tuple(tuple(t.shape) for t in reads), (tuple(value.shape),)
        moved = dataclasses.replace(step, input_shapes=shapes[0], output_shapes=shapes[1])
        parts = step_bounds(moved, NominalContext(moved))
        constant = math.prod(part.constant for part in parts)
        count, how = len(reads), parts[0].combine
        constant *= {"sum": count, "hypot": math.sqrt(count), "mean": 1}[how]
        scale = float(np.mean([self._scales[i] for i in step.inputs]))
        # Scaling that is part of the model, as that of pixels to [0, 1], is not undone.
        if constant > 1 + 1e-6:
            self._note(step, f"{step.kind}, Rescaling", why=f"its constant is {constant:.4g}")
            divided = self._beside(kl.Rescaling, step, 1 / constant)(value)
            return divided, scale * constant
        self._note(step, step.kind, "kept" if getattr(operation, "weights", None) else "")
        return value, scale

    def _beside(self, cls, step, *arguments, **settings):
        """A new layer without weights beside the one in a step's place."""
        policy = getattr(step.operation, "dtype_policy", None)
        name = self._name(step, _SUFFIXES[cls])
        return cls(*arguments, **settings, dtype=policy, name=name)

    def _layer(self, cls, step, *arguments, suffix="", **settings):
        """A new layer in a step's place: one, if the model applies the old one several times."""
        key = (id(step.operation), cls, suffix)
        if key not in self._made:
            operation = step.operation
            policy = getattr(operation, "dtype_policy", None)
            made = cls(*arguments, **settings, dtype=policy, name=self._name(step, suffix))
            made.trainable = getattr(operation, "trainable", True)
            self._made[key] = made
        return self._made[key]

    def _name(self, step, suffix):
        base = re.sub(r"[^A-Za-z0-9_.]", "_", step.name) + (f"_{suffix}" if suffix else "")
        name, count = base, 1
        while name in self._names:
            name, count = f"{base}_{count}", count + 1
        self._names.add(name)
        return name

    def _note(self, step, became, weights="", why=""):
        self.changes.append(Change(step.name, step.kind, became, weights, why))


def _ending(graph):
    """(outputs of the steps behind which no linear one comes, those of the head or None).

    The activation of a linear layer is no step of its own.
    """
    makers = {i: step for step in graph.steps for i in step.outputs}
    final, values = set(), [graph.output]
    while values:
        step = makers.get(values.pop())
        if step is not None and step.outputs not in final:
            final.add(step.outputs)
            if type(step.operation) in _PASSED or _only_shares(step):
                values.extend(step.inputs)
    inner = {i for step in graph.steps if step.outputs not in final for i in step.inputs}
    final = {outputs for outputs in final if inner.isdisjoint(outputs)}
    last = makers.get(graph.output)
    while last is not None and (type(last.operation) in DROPPED or _only_shares(last)):
        last = makers.get(last.inputs[0])
    return final, last.outputs if last is not None and _is_last(last) else None


def _is_last(step):
    """Whether a step at the end is a linear map of each position's features to its logits."""
    layer = step.operation
    if type(layer) is layers.NormalizedDense:
        return True
    if type(layer) is kl.Conv2D:
        single = {*layer.kernel_size, *layer.strides} == {1} and layer.groups == 1
        linear = single and layer.data_format == "channels_last"
    else:
        linear = type(layer) is kl.Dense
    return linear and (layer.activation is keras.activations.linear or bool(_shares(step)))


def _shares(step):
    """ "softmax" or "sigmoid" if the step is one, or a layer that ends in one, else ""."""
    operation = step.operation
    if type(operation) is kl.Softmax or not isinstance(operation, kl.Layer):
        return _SHARES.get(step.kind, "")
    known = type(operation) in (kl.Dense, kl.Conv2D, kl.Activation)
    function = operation.activation if known else None
    while type(function) is kl.Activation:
        function = function.activation
    if is_softmax(function) or type(function) is kl.Softmax:
        return "softmax"
    return "sigmoid" if any(function is f for f in _SIGMOIDS) else ""


def _only_shares(step):
    """Whether the step only turns logits, along the last axis, into shares."""
    last = getattr(step.operation, "axis", -1) in (-1, len(step.output_shapes[0]) - 1)
    return bool(_shares(step)) and last and type(step.operation) not in (kl.Dense, kl.Conv2D)


def _logits(step):
    return f"a {_shares(step)} belongs into the loss: the model answers in logits"


def _inner_softmax(step):
    return _Refused(f"{step.title}: a softmax inside a network has no useful constant")


def _joined(*remarks):
    return "; ".join(filter(None, remarks))


def _grid(n, k, stride, padding):
    """What gives `SDPConv2D` the windows of a Conv2D along one side, None if n is not known.

    (zeros to add in front, outputs to cut off (in front, behind)): its own windows of k entries
    start at (k - 1) // 2 in front of the image, where Keras starts by its size.
    """
    front, before = (k - 1) // 2, 0
    if n is None:
        return (0, (0, 0)) if stride == 1 else None
    count = (n - k) // stride + 1
    if padding == "same":
        count = -(-n // stride)
        before = max((count - 1) * stride + k - n, 0) // 2
    zeros = (before - front) % stride
    cut = (front + zeros - before) // stride
    return zeros, (cut, -(-(n + zeros) // stride) - cut - count)


def _foldable(graph):
    """{outputs of a linear step: the batch normalisation that alone reads them}."""
    makers = {i: step for step in graph.steps for i in step.outputs}
    found = {}
    for step in graph.steps:
        before = makers.get(step.inputs[0])
        if type(step.operation) is not kl.BatchNormalization or before is None:
            continue
        linear = before.operation
        readers = [s for s in graph.steps if step.inputs[0] in s.inputs]
        rank = len(step.input_shapes[0])
        first = getattr(linear, "data_format", None) == "channels_first"
        axis = (1 if first else -1) % rank
        uses = [s for s in graph.steps if s.operation is linear or s.operation is step.operation]
        if (
            type(linear) in (kl.Dense, kl.Conv2D)
            and linear.activation is keras.activations.linear
            and step.operation.axis % rank == axis
            and len(readers) == 1
            and len(uses) == 2
            and step.inputs[0] != graph.output
        ):
            found[before.outputs] = step.operation
    return found


def _is_activation(operation):
    """Whether an operation of `keras.ops` is an activation."""
    return not isinstance(operation, keras.layers.Layer) and find_activation(operation) is not None


def _reason(step, error):
    text = str(error)
    return text if text.startswith(step.title) else f"{step.title}: {text}"


def _array(weight: Any) -> Any:
    return np.asarray(keras.ops.convert_to_numpy(weight), "float64")
