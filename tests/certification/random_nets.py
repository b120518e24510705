"""Random small classifiers of every kind of layer, and the checks that their certificates pass.

`build(choose)` draws a model by `choose(options)`: from a seed, or from Hypothesis.
"""

import extended
import keras
import numpy as np
from data import to_numpy
from packaging.version import Version

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.certification.evaluation import Evaluation
from keras_lipnext.lipschitz.model import lipschitz_bound, read
from keras_lipnext.radius import pairwise_distances_float64
from keras_lipnext.twin import Float64Twin

kl, ll = keras.layers, lip.layers

ACTIVATIONS = ["linear", "relu", "tanh", "gelu", "silu", "softplus", "leaky_relu", "elu", "selu"]
SLOPES = ["relu", "tanh", "sigmoid", "softplus"]
SDP_BOUNDS = ["aol", "sll", "spectral", "orthogonal"]
STRIDES_WITH_GAPS = 2 if Version(keras.__version__) >= Version("3.15") else 1
MODERATE = [1e-3, 0.5, 1.0, 3.0, 40.0]


def seeded(seed):
    """`choose` from a seed."""
    rng = np.random.default_rng(seed)
    return lambda options: options[int(rng.integers(len(options)))]


def on_vectors(x, choose):
    """One more step on vectors, (batch, n)."""
    n = x.shape[-1]

    def activation():
        return choose(ACTIVATIONS)

    def residual():
        return kl.Add()([x, kl.Dense(n, activation=activation())(x)])

    def nested():
        inner = [keras.Input((n,)), kl.Dense(n, activation=activation()), kl.BatchNormalization()]
        return keras.Sequential(inner)(x)

    def twice():
        layer = ll.OrthogonalDense(n, activation=activation())
        return layer(kl.ReLU(negative_slope=0.2)(layer(x)))

    def arithmetic():
        constant = np.linspace(-2, 3, n).astype("float32")
        return choose(
            [
                lambda: x * 0.3,
                lambda: x / 7.0 - 1.5,
                lambda: 1.0 - x,
                lambda: x * constant,
                lambda: x + constant,
                lambda: keras.ops.maximum(x, 0.25),
                lambda: keras.ops.abs(-x),
                lambda: keras.ops.clip(x, -0.5, 2.0),
                lambda: keras.ops.gelu(x),
                lambda: keras.ops.flip(x, axis=1) - x[:, :1],
            ]
        )()

    def copies():
        indices = np.arange(n + 2) % n
        return choose(
            [
                lambda: keras.ops.repeat(x, 2, axis=1),
                lambda: keras.ops.tile(x, (1, 2)),
                lambda: keras.ops.take(x, indices, axis=1),
                lambda: keras.ops.pad(x, ((0, 0), (1, 1)), mode="reflect") if n > 1 else x,
                lambda: keras.ops.pad(x, ((0, 0), (0, 2)), constant_values=-0.7),
                lambda: keras.ops.sort(x, axis=1),
            ]
        )()

    def sums():
        matrix = np.random.default_rng(n).normal(size=(n, 3)).astype("float32")
        return choose(
            [
                lambda: keras.ops.cumsum(x, axis=1),
                lambda: keras.ops.matmul(x, matrix),
                lambda: keras.ops.einsum("bi,ij->bj", x, matrix),
                lambda: x - keras.ops.logsumexp(x, axis=1, keepdims=True),
                lambda: x + keras.ops.norm(x, axis=(1,), keepdims=True),
                lambda: keras.ops.squareplus(keras.ops.cos(x), b=0.5),
                lambda: keras.ops.soft_shrink(keras.ops.arctan(x), threshold=0.2),
                lambda: keras.activations.relu(x, negative_slope=0.3, max_value=2.0),
            ]
        )()

    options = [
        lambda: kl.Dense(choose([2, 5, 16, 32]), activation=activation())(x),
        lambda: ll.OrthogonalDense(choose([2, 5, 16, 32]), activation=activation())(x),
        lambda: ll.SDPDense(choose([2, 5, 16]), choose(SDP_BOUNDS), choose(SLOPES))(x),
        lambda: ll.SDPResidualDense(choose([None, 3, 9]), choose(SDP_BOUNDS), choose(SLOPES))(x),
        lambda: ll.SandwichDense(choose([2, 5, 16]), choose(SLOPES))(x),
        lambda: ll.BetaAbs(choose([0.5, 1.0]))(x),
        lambda: ll.GroupSort(None)(x),
        lambda: ll.Scale(choose([-2.5, 0.1]))(x),
        lambda: kl.Activation(activation())(x),
        lambda: kl.PReLU(alpha_initializer="random_normal")(x),
        lambda: kl.Rescaling(choose([-2.5, 0.1]), offset=0.7)(x),
        lambda: kl.BatchNormalization()(x),
        lambda: kl.Dropout(0.5)(x),
        lambda: kl.Concatenate()([x, kl.Activation(activation())(x)]),
        lambda: choose([kl.Subtract, kl.Average, kl.Maximum, kl.Minimum])()(
            [x, kl.Dense(n, use_bias=False)(x)]
        ),
        lambda: kl.EinsumDense("ab,bc->ac", 5, bias_axes="c", activation=activation())(x),
        lambda: kl.SpectralNormalization(kl.Dense(5, activation=activation()))(x),
        copies,
        sums,
        residual,
        nested,
        twice,
        arithmetic,
    ]
    if n % 2 == 0:
        options += [lambda: ll.MaxMin()(x), lambda: ll.Householder()(x)]
    return choose(options)()


def on_images(x, choose):
    """One more step on images, (batch, h, w, c)."""
    _, h, w, c = x.shape
    same = choose(["same", "valid"]) if min(h, w) >= 3 else "same"
    halves = (-(-h // 2), -(-w // 2))

    def convolution():
        groups = 2 if c % 2 == 0 and choose([False, True]) else 1
        return kl.Conv2D(
            choose([2, 4, 8]),
            choose([1, 2, 3, (3, 2)]),
            strides=choose([1, 1, 2]),
            padding=same,
            groups=groups,
            activation=choose(ACTIVATIONS),
        )(x)

    options = [
        convolution,
        lambda: kl.DepthwiseConv2D(choose([2, 3]), padding=same, depth_multiplier=2)(x),
        lambda: kl.SeparableConv2D(4, 3, padding=same)(x),
        lambda: kl.Conv2DTranspose(3, 3, strides=2)(x) if h * w <= 36 else x,
        lambda: kl.MaxPooling2D(choose([2, 3]), strides=choose([1, 2]), padding="same")(x),
        lambda: kl.AveragePooling2D(2, strides=choose([1, 2]))(x) if min(h, w) >= 2 else x,
        lambda: kl.ZeroPadding2D(1)(x),
        lambda: kl.Cropping2D(((1, 0), (0, 1)))(x) if min(h, w) >= 2 else x,
        lambda: kl.BatchNormalization()(x),
        lambda: ll.PositionalBias()(x),
        lambda: ll.SDPConv2D(
            choose([2, 4]), choose([1, 3, (3, 2)]), choose(SDP_BOUNDS[:3]), choose([1, 2])
        )(x),
        lambda: ll.SDPResidualConv2D(
            choose([None, 3]), choose([2, 3]), choose(SDP_BOUNDS[:3]), activation=choose(SLOPES)
        )(x),
        lambda: ll.OrthogonalDense(choose([4, 8]))(x),
        lambda: kl.Add()([x, kl.Conv2D(c, 3, padding="same", activation="relu")(x)]),
        lambda: keras.ops.roll(x, 1, axis=1) + x,
        lambda: kl.Concatenate()([x, -x]),
        lambda: kl.Permute((2, 1, 3))(x),
        lambda: kl.Resizing(choose([2, 3, 5]), 3, interpolation=choose(["nearest", "bilinear"]))(x),
        lambda: kl.UpSampling2D((1, 2), interpolation="bilinear")(x) if h * w <= 24 else x,
        lambda: kl.CenterCrop(max(h - 1, 1), w)(x),
        lambda: kl.AdaptiveAveragePooling2D(halves)(x) if 3 <= min(h, w) <= max(h, w) <= 12 else x,
        lambda: kl.AdaptiveMaxPooling2D(halves)(x) if 3 <= min(h, w) <= max(h, w) <= 12 else x,
        lambda: kl.TimeDistributed(kl.Conv1D(3, 2, padding="same", activation="relu"))(x),
        # Of one pixel no tap of an even kernel with gaps reads anything.
        lambda: kl.DepthwiseConv2D(
            choose([2, 3]) if min(h, w) >= 3 else 3,
            strides=STRIDES_WITH_GAPS,
            dilation_rate=2,
            padding="same",
        )(x),
        lambda: keras.ops.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0)), mode="symmetric"),
    ]
    if c % 4 == 0:
        padding = choose(["circular", "zero"])
        options += [
            lambda: ll.LipNeXtBlock(1 / 4, 0.5, padding, choose(["reduced", "full"]))(x),
            lambda: choose([ll.ShiftMixing, ll.FullShiftMixing])(1 / 4, padding)(x),
            lambda: ll.SpatialShift(1 / 4, padding)(x),
        ]
    if h % 2 == w % 2 == 0 and c <= 4:
        options.append(lambda: ll.PatchEmbedding(2, 4 * c + 4)(x))
    return choose(options)()


def to_vectors(x, choose):
    return choose(
        [
            kl.Flatten,
            ll.L2Pool,
            kl.GlobalAveragePooling2D,
            kl.GlobalMaxPooling2D,
        ]
    )()(x)


def build(choose, seed=0):
    """A random classifier with random weights."""
    keras.utils.set_random_seed(seed)
    image = choose([False, True])
    shape = (choose([3, 4, 6]), 4, choose([1, 4])) if image else (choose([2, 7, 32]),)
    inputs = keras.Input(shape)
    x = inputs
    depth = choose([1, 2, 3, 4, 5, 6])
    for _ in range(depth):
        x = on_images(x, choose) if image else on_vectors(x, choose)
        if image and choose([False, False, True]):
            x, image = to_vectors(x, choose), False
    if image:
        x = to_vectors(x, choose)
    classes = choose([2, 3, 5])
    head = choose(["dense", "normalized", "softmax", "softmax layer", "none"])
    if head == "dense":
        x = kl.Dense(classes)(x)
    elif head == "normalized":
        x = ll.NormalizedDense(classes)(x)
    elif head == "none":
        x = kl.Activation("tanh")(kl.Dense(classes)(x))
    else:
        x = kl.Dense(classes, activation="softmax" if head == "softmax" else None)(x)
        x = kl.Softmax()(x) if head == "softmax layer" else x
    model = keras.Model(inputs, x)
    randomise(model, choose, seed)
    return model


def randomise(model, choose, seed):
    """Weights as no initializer leaves them: drifted kernels, large and cancelling biases."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = np.asarray(to_numpy(weight), "float64")
        noise = rng.normal(size=value.shape)
        if "variance" in weight.name:
            value = rng.uniform(0.05, 2, value.shape)
        elif isinstance(weight.constraint, lip.manifolds.Stiefel):
            value = value + choose([0, 1e-4, 0.03]) * noise
        elif "kernel" in weight.name:
            value = choose(MODERATE) * noise / np.sqrt(max(value.shape[0], 1))
        else:
            value = value + choose([0, 0.3, 3.0, 1e6]) * noise
        weight.assign(value.astype("float32"))


def gradients(twin, x, weights):
    """Gradients at x of sums of the logits with each row of weights, (rows, *x.shape).

    In one program, of as many copies of x as there are rows.
    """
    weights = np.asarray(weights, "float64")
    rows = np.repeat(weights, len(x), axis=0)

    def total(t):
        return keras.ops.sum(twin.tensor(t) * keras.ops.convert_to_tensor(rows, dtype="float64"))

    def gradient(t):
        return backend.gradient(total, t)

    if keras.backend.backend() == "jax":  # where that saves time
        gradient = backend.compiled(gradient, twin.variables)
    copies = np.tile(x, (len(weights), *(1 for _ in x.shape[1:])))
    return twin.call(gradient, copies).reshape(len(weights), *x.shape)


def check(model, seed=0, samples=6):
    """Raises AssertionError if anything the certificate says is false; returns what it measured.

    In 80-bit arithmetic: every margin within its allowance; no slope above K; no other prediction
    at 0.999 of a radius, along gradients and along random directions.
    """
    rng = np.random.default_rng(seed)
    shape = model.input_shape[1:]
    x = rng.normal(size=(samples, *shape)) * rng.choice([0.05, 1.0, 5.0])
    certifiable = read(model)
    bound = lipschitz_bound(model)
    classes = model.output_shape[-1]
    evaluation = Evaluation(certifiable, classes)
    predictions, radii, _ = evaluation(x, samples)
    evaluation.compare(
        model, x, evaluation.own_answers(model, x)
    )  # raises if the model's own float32 margins are far off
    twin = Float64Twin(certifiable)
    exact = extended.logits(certifiable, x)
    computed = twin(x)
    rows = np.arange(samples)
    errors = evaluation.allowances(x, computed)
    top = computed.argmax(axis=1)
    margin = computed[rows, top][:, None] - computed
    exact_margin = exact[rows, top][:, None] - exact
    assert (abs(margin - exact_margin) <= errors).all(), "a margin is off by more than E"
    assert np.isfinite(errors).all()
    certified = radii > 0
    assert (exact.argmax(axis=1) == predictions)[certified].all(), "a certified prediction is wrong"

    if certifiable.head is None:
        pairs = np.full((classes, classes), np.sqrt(2.0))
    else:
        pairs = pairwise_distances_float64(to_numpy(certifiable.head.operation.kernel))
    steepest = 0.0
    directions = [rng.normal(size=x.shape) for _ in range(2)]
    others = [(j + 1 + seed % (classes - 1)) % classes for j in range(classes)]
    found = gradients(twin, x, np.eye(classes)[others] - np.eye(classes))
    for j, (i, slope) in enumerate(zip(others, found)):
        lengths = np.linalg.norm(slope.reshape(samples, -1), axis=1)
        needed = bound.body_constant * pairs[i, j]
        if needed > 0:
            assert (lengths <= needed * (1 + 1e-9)).all(), "a slope exceeds K"
            steepest = max(steepest, float(lengths.max() / needed))
        directions.append(slope)
    moved = within(x, radii, directions)
    found = extended.logits(certifiable, np.concatenate(moved)).argmax(axis=1)
    flipped = found.reshape(len(moved), samples) != predictions
    assert not flipped[:, certified].any(), "a certified prediction flipped"
    return {
        "certified": int(certified.sum()),
        "certified_in_float32": check_program(model, certifiable, x, directions),
        "samples": samples,
        "steepest": steepest,
        "kinds": [step.kind for step in certifiable.steps],
    }


def within(x, radii, directions):
    """Points at 0.999 of each radius from x, in each direction and against it."""
    samples, column = len(x), (-1,) + (1,) * (x.ndim - 1)
    moved = []
    for direction in directions:
        # Gradients where gelu saturates are of size 1e-200, and their squares vanish.
        largest = np.abs(direction).reshape(samples, -1).max(axis=1).reshape(column)
        direction = direction / np.where(largest > 0, largest, 1)
        lengths = np.linalg.norm(direction.reshape(samples, -1), axis=1).reshape(column)
        step = 0.999 * np.minimum(radii, 1e12).reshape(column) * direction
        step = step / np.where(lengths > 0, lengths, 1)
        taken = np.linalg.norm(step.reshape(samples, -1), axis=1)
        assert (taken <= np.minimum(radii, 1e12)).all(), "the check itself steps too far"
        moved += [x + step, x - step]
    return moved


def check_program(model, certifiable, x, directions):
    """As `check`, of the model's own float32 answers; the number of samples certified of them."""
    try:
        evaluation = Evaluation(certifiable, model.output_shape[-1], arithmetic="float32")
        predictions, radii, _ = evaluation(x, len(x))
    except ValueError as refused:
        reasons = ("certified as a float32 program", "factors beyond 2^-16 to 2^16")
        assert any(reason in str(refused) for reason in reasons), refused
        return 0
    certified = radii > 0
    points = [x, *within(x, radii, directions)]
    # What leaves the range of float32 is certified to be of no use.
    own = to_numpy(model.predict_on_batch(np.concatenate(points).astype("float32")))
    wrong = own.argmax(axis=1).reshape(len(points), -1) != predictions
    assert not wrong[:, certified].any(), "a float32 program's certified prediction flipped"
    return int(certified.sum())
