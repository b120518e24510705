"""Float32 programs that sum in chosen orders, and networks that the order decides.

A program here is a function of a model and a batch that evaluates its steps in NumPy float32, each
sum of products by one of `ORDERS`. `certify(..., arithmetic="float32")` must hold of all of them.
"""

import contextlib
import dataclasses
import functools

import keras
import numpy as np
import pytest
from data import to_numpy

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.certification import evaluation
from keras_lipnext.layers.sdp_diagonal import guard
from keras_lipnext.lipschitz.model import read
from keras_lipnext.twin import Float64Twin

f32, ops = np.float32, keras.ops
U = 2.0**-24


# Sums of products w x over the last axis, float32 arrays of shapes that broadcast; the result has
# theirs without it. A bias is a term, with 1 for x.


def _chain(terms):
    total = terms[..., 0]
    for k in range(1, terms.shape[-1]):
        total = total + terms[..., k]
    return total


def _pairwise(terms):
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[..., :1])], axis=-1)
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms[..., 0]


def _blocks(size):
    def order(w, x):
        t = w * x
        return _chain(
            np.stack([_chain(t[..., k : k + size]) for k in range(0, t.shape[-1], size)], -1)
        )

    return order


def _sorted(w, x, key):
    t = w * x
    return _chain(np.take_along_axis(t, np.argsort(key(t), axis=-1, kind="stable"), axis=-1))


def _fma(w, x):
    """Fused multiply-add, one after the other: 64 bits hold product and sum exactly enough."""
    total = f32(0) * x[..., 0] * w[..., 0]
    for k in range(x.shape[-1]):
        total = (w[..., k].astype("longdouble") * x[..., k] + total).astype(x.dtype)
    return total


def _kahan(w, x):
    t = w * x
    total, lost = t[..., 0] * f32(0), t[..., 0] * f32(0)
    for k in range(t.shape[-1]):
        y = t[..., k] - lost
        new = total + y
        lost = (new - total) - y
        total = new
    return total


def _flushed(w, x):
    """Subnormal operands and results taken for zero, one after the other."""
    tiny = np.finfo(f32).tiny

    def flush(a):
        return np.where(np.abs(a) < tiny, f32(0), a)

    t = flush(flush(w) * flush(x))
    total = t[..., 0]
    for k in range(1, t.shape[-1]):
        total = flush(total + t[..., k])
    return total


def _permuted(w, x):
    t = w * x
    return _chain(t[..., np.random.default_rng(t.shape[-1]).permutation(t.shape[-1])])


def _tree(w, x):
    """Two partial sums, chosen by chance, added until one is left."""
    t, rng = w * x, np.random.default_rng(x.shape[-1])
    left = [t[..., k] for k in range(t.shape[-1])]
    while len(left) > 1:
        first, second = (left.pop(int(rng.integers(n))) for n in (len(left), len(left) - 1))
        left.append(first + second)
    return left[0]


ORDERS = {
    "forward": lambda w, x: _chain(w * x),
    "reversed": lambda w, x: _chain((w * x)[..., ::-1]),
    "pairwise": lambda w, x: _pairwise(w * x),
    "blocks of 2": _blocks(2),
    "blocks of 16": _blocks(16),
    "blocks of 64": _blocks(64),
    "positive first": lambda w, x: _sorted(w, x, lambda t: -t),
    "negative first": lambda w, x: _sorted(w, x, lambda t: t),
    "large first": lambda w, x: _sorted(w, x, lambda t: -np.abs(t)),
    "small first": lambda w, x: _sorted(w, x, np.abs),
    "permuted": _permuted,
    "random tree": _tree,
    "fused multiply-add": _fma,
    "Kahan": _kahan,
    "flushed to zero": _flushed,
}


@dataclasses.dataclass
class Factors:
    """x -> x scale + shift, as a layer multiplies by factors of its own."""

    scale: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, layer):
        if isinstance(layer, keras.layers.Rescaling):
            return cls(f32(layer.scale), f32(layer.offset))
        gamma, beta, mean, variance = (to_numpy(w) for w in layer.weights)
        scale = gamma / np.sqrt(variance + f32(layer.epsilon))
        return cls(scale, beta - mean * scale)

    def __call__(self, values):
        return values * self.scale.astype(values.dtype) + self.shift.astype(values.dtype)


def folded(steps):
    """The same chain, each factor multiplied into the kernel in front of it, or else behind it."""
    found = []
    for columns, function in steps:
        if isinstance(function, Factors) and found and found[-1][0] is not None:
            last, none = found.pop()
            if none is None:
                last = last.astype(f32) * np.reshape(function.scale, (-1, 1))
                last[:, 0] += function.shift
                found.append((last, None))
                continue
            found.append((last, none))
        while columns is not None and found and _factor_alone(found[-1][1]):
            columns = columns.astype(f32)
            columns[:, 1:] *= found.pop()[1].scale
        found.append((columns, function))
    return found


def _factor_alone(function):
    return isinstance(function, Factors) and not function.shift.any()


def steps_of(model):
    """A chain of Dense layers, factors and activations as (columns, function) each.

    Columns, of bias and kernel, have shape (outputs, 1 + inputs) and are float64, or are None; the
    function of the values behind them is elementwise, or None.
    """
    found = []
    for step in read(model).steps:
        layer = step.operation
        if isinstance(layer, lip.layers.BetaAbs):
            found.append((None, functools.partial(_absolute, layer.rectified)))
            continue
        if isinstance(layer, (keras.layers.Rescaling, keras.layers.BatchNormalization)):
            found.append((None, Factors.of(layer)))
            continue
        if not hasattr(layer, "kernel"):
            raise NotImplementedError(step.kind)
        kernel = to_numpy(layer.kernel).astype("float64")
        bias = np.zeros(kernel.shape[1]) if layer.bias is None else to_numpy(layer.bias)
        relu = getattr(layer, "activation", None) is keras.activations.relu
        columns = np.concatenate([bias.astype("float64")[None], kernel]).T
        found.append((columns, _relu if relu else None))
    return found


def _relu(values):
    return np.maximum(values, values.dtype.type(0))


def _absolute(count, values):
    return np.concatenate([np.abs(values[..., :count]), values[..., count:]], axis=-1)


def evaluated(model, x, order, dtype=f32):
    """The logits of a chain of Dense layers and activations in one type, each bias a term.

    `model` may be its `steps_of`.
    """
    values, add = np.asarray(x).astype(dtype), ORDERS[order]
    for columns, function in steps_of(model) if isinstance(model, keras.Model) else model:
        if columns is not None:
            rows = np.concatenate([np.ones_like(values[..., :1]), values], axis=-1)
            values = add(columns.astype(dtype), rows[..., None, :])
        if function:
            values = function(values)
    assert values.dtype == dtype
    return values


# Networks that the order of summation decides.


def absorbing(terms=1024, bias=False, body=False):
    """(model, x): 1 + (many terms of just under half a unit of 1) against a little more than 1.

    In real arithmetic the first logit is larger. From large to small the terms are lost one by one,
    and the second is. With `bias` the 1 is a bias, with `body` the sums are those of a layer in
    front of an activation. Weights and inputs are alike, so that norms are as tight as sums.
    """
    small = np.sqrt(U * 0.999)
    w = np.full(terms, small)
    second = np.zeros(terms)
    if not bias:
        w[0] = 1.0
        second[0] = 1 + 4 * U
    kernel = np.stack([second, w], axis=1)
    biases = np.array([1 + 4 * U, 1.0]) if bias else np.zeros(2)
    inputs = keras.Input((terms,))
    dense, keeping = keras.layers.Dense(2), lip.layers.BetaAbs(0.5)
    outputs = lip.layers.BetaAbs(0.5)(dense(keeping(inputs))) if body else dense(inputs)
    model = keras.Model(inputs, outputs)
    dense.set_weights([kernel, biases])
    x = np.full((1, terms), small)
    x[0, 0] = small if bias else 1.0
    return model, x.astype(f32)


def cancelling(pairs=32, size=2.0**20):
    """(model, x): +size and -size, `pairs` times, around a sum that decides."""
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(2 * pairs + 4)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    first = np.concatenate([np.zeros((4, 2 * pairs)), np.eye(4)], axis=1)
    constants = np.concatenate([np.full(2 * pairs, size), np.zeros(4)])
    head = np.zeros((2 * pairs + 4, 2))
    head[: 2 * pairs : 2, 1], head[1 : 2 * pairs : 2, 1] = 1, -1
    head[2 * pairs :, 1] = 1
    model.layers[1].set_weights([first, constants])
    model.layers[2].set_weights([head, np.zeros(2)])
    return model, np.full((1, 4), 0.2, f32)


def growing():
    """(model, x): samples near 0, and two logits that are large and alike far from it."""
    rng = np.random.default_rng(2)
    inputs = keras.Input((64,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    common = 2.0**20 * rng.normal(size=64)
    kernel = np.stack([common, common + rng.normal(size=64)], axis=1)
    model.layers[1].set_weights([kernel, np.array([1.0, 0.0])])
    return model, (1e-8 * rng.normal(size=(40, 64))).astype(f32)


def factors(seed=0, width=24):
    """(model, x): factors in front of kernels and behind them, and constants that cancel."""
    rng, kl = np.random.default_rng(seed), keras.layers
    layers = [
        kl.Rescaling(0.37),
        kl.Rescaling(1.9),
        kl.Dense(width, activation="relu", kernel_initializer="zeros"),
        kl.Dense(width, kernel_initializer="zeros"),
        kl.BatchNormalization(),
        kl.Rescaling(0.3),
        kl.Dense(3, kernel_initializer="zeros"),
        kl.BatchNormalization(),
    ]
    model = keras.Sequential([keras.Input((width,)), *layers])
    for layer in layers:
        if isinstance(layer, kl.Dense):
            kernel = rng.normal(size=layer.kernel.shape) / np.sqrt(width)
            layer.set_weights([kernel, 30 * rng.normal(size=layer.bias.shape)])
        elif isinstance(layer, kl.BatchNormalization):
            size = layer.gamma.shape
            statistics = rng.uniform(0.5, 2, size=(3, *size)) * np.array([[1], [100], [1]])
            layer.set_weights([statistics[0], np.zeros(size), statistics[1], statistics[2]])
    x = rng.normal(size=(12, width)).astype(f32)
    layers[-1].beta.assign(-to_numpy(model.predict_on_batch(x[:1]))[0])
    return model, x


class Slopes:
    """Gradients of weighted sums of the logits, of a batch at once: compiled once."""

    def __init__(self, twin, samples, classes):
        self.twin = twin
        with backend.float64_scope():
            shape = (samples, classes)
            self._weights = keras.Variable(np.zeros(shape), dtype="float64", trainable=False)

        def total(t):
            return keras.ops.sum(twin.tensor(t) * keras.ops.convert_to_tensor(self._weights))

        def gradient(t):
            return backend.gradient(total, t)

        compiles = keras.backend.backend() == "jax"  # where that saves time
        variables = [*twin.variables, self._weights]
        self._gradient = backend.compiled(gradient, variables) if compiles else gradient

    def __call__(self, x, weights):
        with backend.float64_scope():
            self._weights.assign(weights)
        return self.twin.call(self._gradient, x)


class Architecture:
    """A chain of Dense layers, sizes and activations of all kinds, for many draws of weights.

    What certifies, attacks and evaluates it is compiled once.
    """

    samples = 12

    def __init__(self, seed):
        rng = np.random.default_rng([seed])
        self.width, self.classes = int(rng.integers(2, 40)), int(rng.integers(2, 5))
        inputs = x = keras.Input((self.width,))
        self._layers, self._halves = [], []
        zeros = {"kernel_initializer": "zeros"}
        for _ in range(int(rng.integers(0, 4))):
            activation = rng.choice([None, "relu"])
            layer = keras.layers.Dense(int(rng.integers(2, 40)), activation=activation, **zeros)
            x = layer(x)
            self._layers.append(layer)
            self._halves.append(0)
            if rng.random() < 0.5:
                layer = lip.layers.BetaAbs(0.5)
                x = layer(x)
                self._halves[-1] = layer.rectified
        self._layers.append(keras.layers.Dense(self.classes, **zeros))
        self.model = keras.Model(inputs, self._layers[-1](x))
        self._twin = Float64Twin(self.model, norms=True)
        self._slopes = Slopes(self._twin, self.samples, self.classes)

    def draw(self, seed):
        """Sets weights and biases of all sizes; points. The border of two classes is near them."""
        rng = np.random.default_rng(seed)
        if rng.random() < 0.2:
            return self._draw_absorbing(rng)
        offset = 10 ** rng.uniform(-2, 4) * rng.choice([0, 1])
        weights = []
        for layer in self._layers:
            kernel = rng.normal(size=layer.kernel.shape) * 10 ** rng.uniform(-1, 1)
            if rng.random() < 0.3:  # classes, or features, that nearly agree
                kernel = kernel[:, :1] * 10 ** rng.uniform(0, 3) + kernel
            weights += [kernel, offset * rng.normal(size=layer.bias.shape)]
        points = rng.normal(size=(self.samples, self.width)) * 10 ** rng.uniform(-1, 1)
        weights[-1] = np.zeros(self.classes)
        self._set(weights)
        middle = evaluated(self.model, points[:1], "forward")[0]
        self._set([*weights[:-1], -middle])
        return points.astype(f32)

    def _draw_absorbing(self, rng):
        """As `absorbing`: what layers pass on is 1 and terms that it absorbs, or they a bias."""
        small = np.sqrt(U * 0.999)
        weights = []
        for layer in self._layers[:-1]:
            weights += [np.eye(*layer.kernel.shape), np.zeros(layer.bias.shape)]
        features, classes = self._layers[-1].kernel.shape
        kernel, bias = np.zeros((features, classes)), np.full(classes, -1.0)
        kernel[:, 1], bias[:2] = small, 0
        points = np.full((self.samples, self.width), small)
        points *= rng.uniform(0.5, 1, size=points.shape)
        if rng.random() < 0.5:
            bias[:2] = 1 + 4 * U, 1
        else:
            kernel[0, :2], points[:, 0] = (1 + 4 * U, 1), 1
        self._set([*weights, kernel, bias])
        return points.astype(f32)

    def _set(self, weights):
        for layer, *values in zip(self._layers, weights[::2], weights[1::2], strict=True):
            layer.set_weights(values)

    def permuted_answers(self, x, seed):
        """What the backend answers if the channels of inputs and layers change places."""
        rng, weights = (
            np.random.default_rng(seed),
            [w for k in self._layers for w in k.get_weights()],
        )
        first = order = rng.permutation(self.width)
        turned = []
        for kernel, bias, half in zip(weights[::2], weights[1::2], [*self._halves, None]):
            columns = np.arange(len(bias))
            if half is not None:
                columns = np.concatenate(
                    [rng.permutation(columns[:half]), rng.permutation(columns[half:])]
                )
            turned += [kernel[order][:, columns], bias[columns]]
            order = columns
        self._set(turned)
        answers = to_numpy(self.model.predict_on_batch(x[:, first]))
        self._set(weights)
        return answers

    @contextlib.contextmanager
    def compiled_once(self):
        """`certify` evaluates with this architecture's twin, given the weights of now."""

        def twin(certifiable, norms=False):
            sources = [
                w for step in certifiable.steps for w in getattr(step.operation, "weights", ())
            ]
            with backend.float64_scope():
                for target, source in zip(self._twin.variables, sources, strict=True):
                    target.assign(np.asarray(to_numpy(source), "float64"))
            return self._twin

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "Float64Twin", twin)
            yield

    def survives(self, seed, **settings):
        """As `survives`, of weights drawn anew."""
        x = self.draw(seed)
        others = {"its own, channels permuted": lambda p: self.permuted_answers(p, seed)}
        settings |= {"slopes": self._slopes, "others": others}
        with self.compiled_once():
            return survives(self.model, x, rounds=1, **settings)


def flips(model, x, certificate, orders=ORDERS):
    """Orders by which the program's prediction is not the certified one at x, of radius > 0."""
    certified, steps = certificate.radii > 0, steps_of(model)
    return [
        name
        for name in orders
        if (evaluated(steps, x, name).argmax(axis=1) != certificate.predictions)[certified].any()
    ]


def towards_boundary(model, x, certificate, share=1 - 1e-6, slopes=None):
    """Inputs at `share` of each radius from x, along the gradient of the nearest difference."""
    x = np.asarray(x, "float64")
    per_sample = (-1,) + (1,) * (x.ndim - 1)
    slopes = slopes or Slopes(Float64Twin(model), len(x), model.output_shape[-1])
    logits = slopes.twin(x)
    rows, top = np.arange(len(x)), certificate.predictions
    best, found = np.full(len(x), np.inf), x.copy()
    for j in range(logits.shape[1]):
        weights = np.zeros(logits.shape)
        weights[rows, top] += 1
        weights[:, j] -= 1
        slope = slopes(x, weights)
        length = np.linalg.norm(slope.reshape(len(x), -1), axis=1)
        length = np.where(length > 0, length, 1)
        distance = (logits[rows, top] - logits[:, j]) / length
        nearer = (top != j) & (distance < best)
        step = slope / length.reshape(per_sample)
        moved = x - (share * certificate.radii).reshape(per_sample) * step
        found[nearer], best[nearer] = moved[nearer], distance[nearer]
    return found


def neighbours(x, moved, radii, rng):
    """Neighbouring floats of `moved`, a random step an entry, kept within the radii of x."""
    signs = rng.choice(np.array([-np.inf, np.inf], f32), size=moved.shape)
    near = np.nextafter(moved.astype(f32), signs)
    distance = np.linalg.norm((near.astype("float64") - x).reshape(len(x), -1), axis=1)
    inside = distance < radii
    return np.where(inside.reshape(-1, *[1] * (x.ndim - 1)), near, moved)


def survives(
    model,
    x,
    orders=ORDERS,
    rounds=3,
    own=True,
    lipschitz="product",
    arithmetic="float32",
    slopes=None,
    others=None,
):
    """AssertionError if some program predicts otherwise within a certified float32 radius.

    Args:
        arithmetic: The one that is certified; float32 programs cross radii of the others.
        slopes: `Slopes` of the model, None to compile them.
        others: {name of a further program: function from inputs to logits}, or None.
    """
    certificate = lip.certify(model, x, verbose=0, arithmetic=arithmetic, lipschitz=lipschitz)
    rng = np.random.default_rng(0)
    certified = certificate.radii > 0
    x = np.asarray(x, "float64")
    moved = towards_boundary(model, x, certificate, slopes=slopes)
    points = [x, moved, *(neighbours(x, moved, certificate.radii, rng) for _ in range(rounds))]
    steps, everywhere = steps_of(model), np.concatenate(points).astype(f32)
    answers = {name: evaluated(steps, everywhere, name) for name in orders}
    if own:
        answers["its own"] = to_numpy(model.predict_on_batch(everywhere))
    for name, program in (others or {}).items():
        answers[name] = program(everywhere)
    for name, logits in answers.items():
        predictions = logits.argmax(axis=1).reshape(len(points), -1)
        wrong = ((predictions != certificate.predictions) & certified).any(axis=0)
        assert not wrong.any(), f"{name}: {np.flatnonzero(wrong)[:5]}"
    return certificate


# Detectors, for the gate.


def order_of_large_sums():
    """Terms lost one by one, in a head, in a layer, behind a bias."""
    for settings in ({}, {"bias": True}, {"body": True}, {"bias": True, "body": True}):
        model, x = absorbing(**settings)
        certificate = lip.certify(model, x, verbose=0, arithmetic="float32")
        assert not flips(model, x, certificate), settings


def residual_branch():
    """As `absorbing`, the 1 a residual branch that a product's sum starts with."""
    terms, small = 1024, np.sqrt(U * 0.999)
    inputs = keras.Input((terms,))
    product = keras.layers.Dense(2, use_bias=False)
    model = keras.Model(inputs, keras.layers.Add()([product(inputs), inputs[:, :2]]))
    kernel = np.zeros((terms, 2), f32)
    kernel[2:, 1] = small
    product.kernel.assign(kernel)
    x = np.full((1, terms), small, f32)
    x[0, :2] = 1 + 4 * U, 1
    rows = np.concatenate([np.ones((2, 1), f32), np.broadcast_to(x, (2, terms))], axis=1)
    logits = ORDERS["forward"](np.concatenate([x[:, :2], kernel]).T, rows)
    real, program = (lip.certify(model, x, verbose=0, arithmetic=a) for a in ("real", "float32"))
    assert real.radii[0] > 0 and real.predictions[0] == 1 and logits.argmax() == 0
    assert program.radii[0] == 0


ADDENDS = {
    "bias": lambda one, sums: sums[0],
    "branch": lambda one, sums: keras.layers.Add()([one, *sums]),
    "average": lambda one, sums: keras.layers.Average()([one, *sums]) * (1.0 + len(sums)),
    "normalization": lambda one, sums: keras.layers.BatchNormalization(epsilon=2.0**-10)(sums[0]),
    "stack": lambda one, sums: ops.sum(ops.stack([one, *sums], axis=1), axis=1),
    "of one term": lambda one, sums: one + ops.sum(ops.expand_dims(sums[0], 1), axis=1),
}


def starting_with_the_addend(addend="bias", sums=1, margin=128, activation=None, terms=1024):
    """(model, x, answer): 1 + (many terms of just under half a unit of 1), and a little less.

    In real arithmetic the first logit is larger. In float64 a sum that starts with the 1, one of
    `ADDENDS`, loses all of its terms, and so do further ones that start with what it gave:
    `answer`, of which the second is larger, by `margin` units.
    """
    unit = 2.0**-53
    small, little = (f32(np.sqrt(size * unit)) for size in (0.999, margin))  # float32 holds both
    x = np.full((1, terms + 3), small, f32)
    x[0, :3] = 1, 1, little
    first = np.array([[1, 0], [0, 1], [0, little]], f32)
    kernel = np.zeros((terms + 3, 2), f32)
    kernel[3:, 0] = small
    inputs = keras.Input((terms + 3,))
    one = keras.layers.Dense(2, use_bias=False)
    dense = [keras.layers.Dense(2, use_bias=addend == "bias") for _ in range(sums)]
    outputs = ADDENDS[addend](one(inputs[:, :3]), [layer(inputs) for layer in dense])
    if addend in ("bias", "normalization"):
        kernel[2] = first[2]
    one.set_weights([first])
    for layer in dense:
        layer.set_weights([kernel] + [np.ones(2, f32)] * layer.use_bias)
    if activation:
        outputs = keras.layers.Activation(activation)(outputs)
    model = keras.Model(inputs, outputs)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):  # adds the 1 that it is
            layer.set_weights([np.full(2, value) for value in (1, 1, 0, 1 - layer.epsilon)])
    much, more = np.float64(small) ** 2, np.float64(little) ** 2
    assert sums * terms * much > more and 1 + much == 1 < 1 + more
    return model, x, np.array([[1, 1 + more]])


def order_of_the_evaluation():
    """An evaluation that starts its sums with what is added, as XLA's of one sample does."""
    for settings in (
        {},
        {"activation": "relu"},
        {"addend": "normalization"},
        {"addend": "branch"},
        {"addend": "branch", "sums": 8, "margin": 7500},
        {"addend": "average", "sums": 8, "margin": 7500},
        {"addend": "stack", "sums": 4, "margin": 3000},
        {"addend": "of one term"},
    ):
        model, x, answer = starting_with_the_addend(**settings)

        def lost(twin, inputs, evaluate=Float64Twin.__call__, x=x, answer=answer):
            found = evaluate(twin, inputs)
            return answer if np.array_equal(inputs, x) else found

        for evaluate in (Float64Twin.__call__, lost):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Float64Twin, "__call__", evaluate)
                found = lip.certify(model, x, verbose=0, arithmetic="real")
            assert found.predictions[0] == 0 or found.radii[0] == 0, settings
            assert evaluate is not lost or found.predictions[0] == 1, settings


def cancelling_constants():
    """Large constants that cancel, in every order."""
    model, x = cancelling()
    certificate = lip.certify(model, x, verbose=0, arithmetic="float32")
    assert not flips(model, x, certificate)


def diagonal_in_order(features=2048):
    """T of an SDP layer is a sum, too: from large to small it absorbs all terms but the first.

    So the layer divides by too little, and its own sum is rounded up term by term.
    """
    kernel = np.full(features, f32(U * 0.999))
    kernel[0] = 1
    magnitudes = np.outer(kernel, kernel) * f32(guard(features + 66))  # operations of an entry
    exact, absorbed = (
        magnitudes.astype("float64").sum(axis=1),
        ORDERS["large first"](magnitudes, np.ones(features, f32)),
    )
    x = 1.001 * U / (kernel / np.sqrt(exact))
    x[0] = 1.0625
    real = (x * kernel / np.sqrt(exact)).sum()
    program = ORDERS["forward"](kernel / np.sqrt(absorbed), x.astype(f32))
    border = f32(real + 1.3 * features * U)
    assert program > border
    inputs = keras.Input((features,))
    layer = lip.layers.SDPDense(1, bound="aol", use_bias=False)
    head = keras.layers.Dense(2)
    model = keras.Model(inputs, head(layer(inputs)))
    layer.kernel.assign(kernel[:, None])
    head.set_weights([np.array([[0.0, 1]]), np.array([border, 0])])
    found = [lip.certify(model, x[None], verbose=0, arithmetic=a) for a in ("real", "float32")]
    assert found[0].radii[0] > features * U and (found[0].predictions == 0).all()
    assert found[1].radii[0] == 0


def growing_inputs():
    """A program's rounding grows with its inputs: none at x = 0, some at the border."""
    for lipschitz in ("product", "local_lipschitz"):
        certificate = survives(*growing(), lipschitz=lipschitz)
        assert (certificate.radii > 0).all()


def side_by_side(*functions):
    """A model that applies to each input, of as many, a function of its own."""
    inputs = keras.Input((len(functions),))
    parts = [f(inputs[:, k : k + 1]) for k, f in enumerate(functions)]
    return keras.Model(inputs, keras.ops.concatenate(parts, axis=-1))


def tied_by_float32():
    """Differences that float32 does not hold: of inputs, of constants, of shares."""
    ops = keras.ops
    low, high = (float(f32(0.1)) * (1 - k * U / 4) for k in (1, 0))
    inputs = keras.Input((2,))
    cases = [
        (keras.Model(inputs, ops.abs(inputs)), [[1.0, 1 + 2.0**-25]]),
        (side_by_side(lambda x: ops.maximum(x, low), lambda x: ops.maximum(x, high)), [[0.0, 0.0]]),
        (side_by_side(lambda x: ops.clip(x, low, 1), lambda x: ops.clip(x, high, 1)), [[0.0, 0.0]]),
        (keras.Model(inputs, keras.layers.Softmax()(inputs)), [[0.0, 2.0**-30]]),
    ]
    for model, x in cases:
        x = np.asarray(x)
        real = lip.certify(model, x, verbose=0, arithmetic="real")
        own = to_numpy(model.predict_on_batch(x.astype(f32))).argmax(axis=1)
        assert real.radii[0] > 0 and real.predictions[0] == 1 and own[0] == 0
        assert lip.certify(model, x, verbose=0, arithmetic="float32").radii[0] == 0


def pools_and_factors():
    """Sums of squares and of means that absorb their terms, factors that float32 rounds away."""
    n, ones = 1024, np.ones(1024, f32)
    small = np.full(n, np.sqrt(U * 0.999))
    small[0] = 1
    inputs, images = keras.Input((n, 2)), keras.Input((n, 1, 2))
    squares = np.zeros((n, 1, 2))
    squares[0, 0, 0], squares[:, 0, 1] = 1 + n * U / 4, small
    terms = (small**2).astype(f32)
    means = np.stack([np.full(n, f32((1 + n * U / 2) / n)), terms], axis=1)
    total = ORDERS["large first"](terms, ones)
    factor, rescaling = 1 + 0.9 * U, keras.layers.Rescaling
    seven = [rescaling(factor) for _ in range(7)]
    scaled = side_by_side(
        rescaling(1 + 2 * U), lambda x: functools.reduce(lambda y, s: s(y), seven, x)
    )
    cases = [
        (keras.Model(images, lip.layers.L2Pool()(images)), squares, np.sqrt(total)),
        (keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(inputs)), means, total / f32(n)),
        (scaled, np.ones(2), f32(1) * f32(factor)),
    ]
    for model, x, answer in cases:
        found = [lip.certify(model, x[None], verbose=0, arithmetic=a) for a in ("real", "float32")]
        first = Float64Twin(model)(x[None])[0, 0]
        assert found[0].predictions[0] == 1 and found[0].radii[0] > 0 and answer < first
        assert found[1].radii[0] == 0, model.layers[-1].name


def vanishing_numbers():
    """Numbers below 2^-126 vanish or lose digits, squares above 2^128 are infinite."""

    def times(factor):  # in a kernel, with which no compiler multiplies another beforehand
        unit = keras.initializers.Identity(factor)
        return keras.layers.Dense(2, use_bias=False, kernel_initializer=unit)

    shrinking = [times(2.0**-26) for _ in range(5)]
    growing = [times(2.0**26) for _ in range(5)]
    inputs = keras.Input((2,))
    model = keras.Sequential([inputs, *shrinking, *growing])
    x = 2.0**-24 * np.array([[1.0, 1.2], [0.1, 0.2]])
    certificate = lip.certify(model, x, verbose=0, arithmetic="float32")
    own = to_numpy(model.predict_on_batch(x.astype(f32))).argmax(axis=1)
    assert (own == 0).all() and (certificate.predictions == 1).all()
    assert (certificate.radii == 0).all()
    images = keras.Input((1, 1, 2))
    pooled = lip.layers.L2Pool()(times(2.0**26)(images))
    model = keras.Model(images, pooled)
    x = 2.0**38 * np.array([2.0, 3.0]).reshape(1, 1, 1, 2)
    assert lip.certify(model, x, verbose=0, arithmetic="float64").radii[0] > 0.5
    own = to_numpy(model.predict_on_batch(x.astype(f32)))
    assert np.isinf(own).all()
    assert lip.certify(model, x, verbose=0, arithmetic="float32").radii[0] == 0
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(2, use_bias=False)(inputs))
    model.layers[-1].kernel.assign([[2.0**70, 2.0**71]])
    x = np.array([[2.0**60]])
    assert lip.certify(model, x, verbose=0, arithmetic="float64").radii[0] > 2.0**59
    assert np.isinf(to_numpy(model.predict_on_batch(x.astype(f32)))).all()
    assert lip.certify(model, x, verbose=0, arithmetic="float32").radii[0] == 0


def folded_away():
    """Factors inside wrappers, and weights that vanish where 2^-112 is multiplied into them."""
    layers, count = keras.layers, 7
    for wrap in (lambda layer: layer, layers.TimeDistributed):
        factors = [wrap(layers.Rescaling(1 - k * 1e-3)) for k in range(1, count + 1)]
        model = keras.Sequential(
            [keras.Input((1, 1)), *factors, layers.Flatten(), layers.Dense(2, use_bias=False)]
        )
        model.layers[-1].kernel.assign([[1.0, 1 + 20 * U]])  # seven factors may turn these round
        x = np.ones((1, 1, 1))
        assert lip.certify(model, x, verbose=0, arithmetic="real").radii[0] > 0
        assert lip.certify(model, x, verbose=0, arithmetic="float32").radii[0] == 0
    down, up = ([layers.Rescaling(2.0**k) for _ in range(count)] for k in (-16, 16))
    middle, last = layers.Dense(1, use_bias=False), layers.Dense(2)
    model = keras.Sequential([keras.Input((1,)), *down, middle, *up, last])
    middle.kernel.assign([[2.0**-20]])
    last.set_weights([np.array([[1.0, 0.0]]), np.array([0.0, 1.0])])
    x = np.full((1, 1), 2.0**30)
    # Multiplied into the weight they leave 2^-132: a program that flushes it to 0 answers 1.
    found = [lip.certify(model, x, verbose=0, arithmetic=a) for a in ("real", "float32")]
    assert found[0].predictions[0] == 0 and found[0].radii[0] > 0
    assert found[1].radii[0] == 0


def read_out(layer, shape, kernel, bias=(0.0, 0.0), first=False):
    """A classifier: a dense layer on what `layer` answers, or on its first entry."""
    inputs = keras.Input(shape)
    x = keras.layers.Flatten()(layer(inputs))
    head = keras.layers.Dense(2)
    model = keras.Model(inputs, head(x[:, :1] if first else x))
    head.set_weights([np.asarray(kernel), np.asarray(bias)])
    return model


def _folded(layer, x):
    """The answer of an SDP or sandwich layer of one linear unit to x, by a program of its own.

    What is multiplied with the sum in front of the activation goes into its weights, the bias is
    its first term, and subnormal numbers are flushed to zero.
    """
    order, residual = ORDERS["flushed to zero"], isinstance(layer, lip.layers.SDPResidualDense)
    if residual:
        kernel, size, inverse = (to_numpy(v) for v in layer.residual_form())
        front, back = kernel[:, 0], kernel[:, 0]
    else:
        kernel, (size, inverse) = to_numpy(layer.kernel), (to_numpy(v) for v in layer.scales())
        front, back = kernel[1:, 0], kernel[:1, 0]
    bias = f32(0) if layer.bias is None else to_numpy(layer.bias)[0]
    read = order(np.append(bias, front * size), np.append(f32(1), x.astype(f32)))
    product = order(back[:, None], (order(read[None], inverse) * f32(1)).reshape(1, 1))
    return (x.astype(f32) if residual else f32(0)) - 2 * (product if residual else -product)


def folded_in_front():
    """Terms that vanish one by one, or that a bias absorbs, where R is multiplied into a kernel."""
    n, units = 2**14, {"activation": "linear", "use_bias": False}
    ones, half = np.ones(n), np.sqrt(0.5)
    lost = 0.99 * U * np.sqrt(n)  # so small that a bias of 1 absorbs each term
    shift = 1 + lost * np.sqrt(n) / 2
    small = lip.layers.SDPResidualDense(1, "aol", **units)
    biased = lip.layers.SDPResidualDense(1, "orthogonal", "linear")
    steep = lip.layers.SandwichDense(1, **units)
    pinned = lip.layers.SandwichDense(1, "linear")
    models = [
        (read_out(small, (n,), np.outer(2.0**-7 * ones, [1, 0])), -0.99 * 2.0**-63 * ones),
        (
            read_out(biased, (n,), [[-half, 0]], [0, shift], first=True),
            np.append(0, lost / half * ones[1:]),
        ),
        (read_out(steep, (n,), [[1.0, 0]], [0, 2.0**-86]), 2.0**-91 * ones),
        (read_out(pinned, (n,), [[1.0, 0]], [0, shift]), lost * ones),
    ]
    small.kernel.assign(2.0**-63 * ones[:, None])
    biased.kernel.assign(half * np.append(1, ones[1:] / np.sqrt(n))[:, None])
    steep.log_psi.assign([20.0])
    for layer in (steep, pinned):
        layer.kernel.assign(half * np.append(1, ones / np.sqrt(n))[:, None])
    for layer in (biased, pinned):
        layer.bias.assign([1.0])
    for model, x in models:
        layer, head = model.layers[1], model.layers[-1]
        kernel, bias = (to_numpy(w) for w in head.weights)
        features = _folded(layer, x)[: len(kernel)]
        logits = (features[:, None] * kernel).sum(axis=0, dtype=f32) + bias
        real, program = (
            lip.certify(model, x[None], verbose=0, arithmetic=a) for a in ("real", "float32")
        )
        assert real.predictions[0] == 0 and real.radii[0] > 0 and logits.argmax() == 1
        assert program.radii[0] == 0


def squares_inside():
    """What an activation reads inside of a layer may overflow, where neither end is large."""
    layers, units = lip.layers, {"activation": "squareplus", "use_bias": False}
    cases = [
        (layers.SDPResidualDense(1, "spectral", **units), (1,), 2.0**50, 14745.6),
        (layers.SDPResidualConv2D(1, 1, "spectral", **units), (1, 1, 1), 2.0**50, 14745.6),
        (layers.SandwichDense(1, **units), (1,), np.sqrt(0.5), 0.9 * 2.0**35),
    ]
    for layer, shape, kernel, size in cases:
        sign = 1.0 if isinstance(layer, layers.SandwichDense) else -1.0
        model = read_out(layer, shape, [[sign, 0.0]])
        layer.kernel.assign(np.full(layer.kernel.shape, kernel))
        if sign > 0:
            layer.log_psi.assign([-20.0])
        for factor in (1.0, 2.0**-12):
            x = np.full((1, *shape), size * factor)
            found = lip.certify(model, x, verbose=0, arithmetic="float32")
            border = (x + 0.999 * found.radii[0]).astype(f32)
            assert np.isfinite(to_numpy(model.predict_on_batch(border))).all()
        assert found.radii[0] > 0.9 * x.sum()  # far from all limits nothing is lost
    # Float64 evaluates this one: the square of 2^126 times 2^386 is infinite there, too.
    model = read_out(layers.SDPResidualDense(1, "spectral", **units), (1,), [[-1.0, 0.0]])
    model.layers[1].kernel.assign([[2.0**126]])
    x = np.full((1, 1), 1.8 * 2.0**385)
    found = lip.certify(model, x, verbose=0, arithmetic="float64")
    border = x + 0.999 * found.radii[0]
    assert np.isfinite(Float64Twin(model)(border)).all()


ALL = (
    folded_in_front,
    squares_inside,
    folded_away,
    order_of_large_sums,
    residual_branch,
    order_of_the_evaluation,
    cancelling_constants,
    diagonal_in_order,
    growing_inputs,
    tied_by_float32,
    pools_and_factors,
    vanishing_numbers,
)
