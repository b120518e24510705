"""Every layer with a rule: its float64 evaluation, constant and rounding against 80-bit NumPy."""

import math
import re

import extended
import keras
import numpy as np
import pytest
from data import called, to_numpy

import keras_lipnext as lip
from keras_lipnext.lipschitz.graph import trace
from keras_lipnext.lipschitz.model import (
    Certifiable,
    bound_of,
    lipschitz_bound,
    measured,
    step_bounds,
)
from keras_lipnext.lipschitz.program import program_arithmetic
from keras_lipnext.lipschitz.rounding import forward_errors, input_norms
from keras_lipnext.lipschitz.rules.base import _LAYERS, Context
from keras_lipnext.twin import Float64Twin

kl = keras.layers
needs_long = pytest.mark.skipif(not extended.HAS_LONG, reason="longdouble is float64 here")


def normalization():
    return kl.Normalization(mean=[0.4914, 0.4822, 0.4465], variance=[0.061, 0.0594, 0.0684])


# (layer, shape of a sample, tightness): the constant is at most `tightness` times the largest
# stretch found, None where the search is too weak to tell.
# Layers of the library are here with what the rows of tests/layers/test_every_layer.py have not.
CASES = [
    (lambda: kl.Rescaling(0.1, offset=-0.3), (5,), 1.001),
    (lambda: kl.Rescaling([0.1, 2.3, -0.7], offset=[0.3, 0.1, 0.2]), (4, 4, 3), 1.5),
    (normalization, (4, 4, 3), 1.5),
    (
        lambda: kl.Normalization(mean=[0.4, 0.3], variance=[0.06, 4.0], invert=True),
        (3, 2),
        1.5,
    ),
    (lambda: kl.BatchNormalization(), (4, 3, 5), 1.5),
    (lambda: kl.BatchNormalization(axis=1, scale=False), (5, 3), 1.5),
    (lambda: kl.Dense(6, activation="gelu"), (5,), 3),
    (lambda: kl.Dense(3, use_bias=False), (4, 5), 2),
    (lambda: lip.layers.OrthogonalDense(5, activation="softplus"), (5,), 1.2),
    (lambda: lip.layers.OrthogonalDense(7, axis=1), (5, 3), 1.2),
    (lambda: lip.layers.ShiftMixing(1 / 8), (3, 4, 8), 1.001),
    (lambda: lip.layers.FullShiftMixing(1 / 8), (3, 4, 8), 1.001),
    (lambda: lip.layers.ShiftMixing(1 / 4, "zero"), (3, 4, 8), 1.2),
    (lambda: lip.layers.FullShiftMixing(1 / 4, "zero"), (3, 4, 8), 1.2),
    (lambda: lip.layers.ShiftMixing(1 / 8), (5, 8), 1.001),
    (lambda: lip.layers.GroupSort(None, axis=1), (5, 3), 1.001),
    (lambda: lip.layers.Householder(axis=1), (4, 3), 1.001),
    (lambda: lip.layers.SandwichDense(6, "tanh", use_bias=False), (3, 2), 1.5),
    (lambda: lip.layers.SandwichDense(5, "softplus"), (5,), 3),
    (lambda: lip.layers.SDPDense(4, "aol"), (5,), 2),
    (lambda: lip.layers.SDPDense(6, "sll", "tanh"), (5,), 2),
    (lambda: lip.layers.SDPDense(6, "spectral", use_bias=False), (3, 5), 2),
    (lambda: lip.layers.SDPDense(3, "orthogonal"), (5,), 1.2),
    (lambda: lip.layers.SDPResidualDense(7, "aol", "tanh"), (5,), 1.5),
    (lambda: lip.layers.SDPResidualDense(None, "sll", "softplus"), (3, 5), 1.5),
    (lambda: lip.layers.SDPResidualDense(3, "spectral"), (5,), 1.5),
    (lambda: lip.layers.SDPResidualDense(3, "orthogonal", "sigmoid"), (5,), 1.5),
    (lambda: lip.layers.SDPConv2D(3, 3, "aol", 2), (5, 6, 4), None),
    (lambda: lip.layers.SDPConv2D(5, (3, 2), "sll", padding="circular"), (5, 6, 4), None),
    (lambda: lip.layers.SDPConv2D(4, 2, "spectral", activation="relu"), (5, 6, 3), None),
    (lambda: lip.layers.SDPResidualConv2D(3, 3, "aol"), (5, 4, 2), 1.5),
    (lambda: lip.layers.SDPResidualConv2D(None, (2, 4), "sll", "circular"), (5, 4, 2), 1.5),
    (lambda: lip.layers.SDPResidualConv2D(4, 3, "spectral", activation="tanh"), (5, 4, 2), 1.5),
    (lambda: kl.Conv1D(4, 3, padding="causal", dilation_rate=2), (9, 3), 2),
    (lambda: kl.Conv2D(5, 3, padding="same", activation="relu"), (7, 6, 4), 3),
    (lambda: kl.Conv2D(6, (3, 2), strides=2, groups=2), (7, 8, 4), 3),
    (lambda: kl.Conv2D(3, 5, strides=(2, 3), padding="same"), (7, 8, 2), 3),
    (lambda: kl.Conv2D(8, 2, strides=2), (6, 6, 2), 2),
    (lambda: kl.Conv3D(3, 2, padding="same"), (3, 4, 3, 2), 3),
    (lambda: kl.DepthwiseConv1D(3, depth_multiplier=2), (8, 3), 3),
    (lambda: kl.DepthwiseConv2D(3, padding="same"), (6, 5, 4), 3),
    (lambda: kl.SeparableConv1D(4, 3, padding="same"), (7, 3), 4),
    (lambda: kl.SeparableConv2D(4, 3, strides=2, depth_multiplier=2), (7, 7, 3), 6),
    (lambda: kl.Conv1DTranspose(3, 3, strides=2), (5, 2), 3),
    (lambda: kl.Conv2DTranspose(3, 3, strides=2, padding="same"), (4, 3, 2), 3),
    (lambda: kl.MaxPooling1D(3, strides=1, padding="same"), (7, 2), None),
    (lambda: kl.MaxPooling2D(2), (6, 6, 3), None),
    (lambda: kl.MaxPooling2D(3, strides=2), (7, 7, 3), None),
    (lambda: kl.AveragePooling1D(3, strides=2), (8, 2), 4),
    (lambda: kl.AveragePooling2D(2), (6, 6, 2), 4),
    (lambda: kl.AveragePooling2D((3, 2), padding="same"), (6, 4, 2), 6),
    (lambda: kl.GlobalAveragePooling1D(), (6, 3), 6),
    (lambda: kl.GlobalAveragePooling2D(keepdims=True), (4, 5, 3), 8),
    (lambda: kl.GlobalMaxPooling2D(), (4, 5, 3), None),
    (lambda: kl.Activation("silu"), (7,), 1.6),
    (lambda: kl.Activation("selu"), (7,), 1.9),
    (lambda: kl.ReLU(negative_slope=0.1, max_value=0.7), (7,), 1.9),
    (lambda: kl.LeakyReLU(negative_slope=0.3), (7,), 1.9),
    (lambda: kl.LeakyReLU(negative_slope=1.3), (7,), 1.9),
    (lambda: kl.ELU(alpha=1.4), (7,), 1.9),
    (lambda: kl.PReLU(alpha_initializer="random_normal", shared_axes=[1]), (3, 7), 1.9),
    (lambda: kl.Flatten(), (3, 4), 1.001),
    (lambda: kl.Reshape((4, 3)), (3, 4), 1.001),
    (lambda: kl.Permute((2, 1)), (3, 4), 1.001),
    (lambda: kl.ZeroPadding1D(2), (3, 2), 1.001),
    (lambda: kl.ZeroPadding2D(((1, 2), (0, 1))), (3, 4, 2), 1.001),
    (lambda: kl.Cropping1D((1, 2)), (6, 2), 3),
    (lambda: kl.Cropping2D(((1, 0), (0, 2))), (4, 5, 2), 3),
    (lambda: kl.UpSampling1D(3), (4, 2), 1.001),
    (lambda: kl.UpSampling2D((2, 3)), (4, 5, 2), 1.001),
    (lambda: kl.RepeatVector(5), (4,), 1.001),
    (lambda: kl.UpSampling2D((2, 3), interpolation="bilinear"), (3, 4, 2), 1.001),
    (lambda: kl.UpSampling2D(2, "channels_first", "bilinear"), (2, 3, 4), 1.001),
    (lambda: kl.Resizing(5, 3), (3, 4, 2), 1.001),
    (lambda: kl.Resizing(3, 7, data_format="channels_first"), (2, 5, 3), 1.001),
    (lambda: kl.Resizing(5, 2, interpolation="nearest"), (3, 4, 1), 1.001),
    (lambda: kl.CenterCrop(2, 3), (5, 4, 2), 1.001),
    (lambda: kl.CenterCrop(2, 3, data_format="channels_first"), (2, 2, 4), 1.001),
    (lambda: kl.AdaptiveAveragePooling1D(4), (6, 2), 1.001),
    (lambda: kl.AdaptiveAveragePooling2D((2, 3)), (4, 6, 1), 1.001),
    (lambda: kl.AdaptiveAveragePooling2D(2, "channels_first"), (2, 3, 4), 1.001),
    (lambda: kl.AdaptiveAveragePooling3D((2, 1, 2)), (4, 2, 3, 1), 1.001),
    (lambda: kl.AdaptiveMaxPooling1D(4), (6, 2), 1.5),
    (lambda: kl.AdaptiveMaxPooling2D((2, 4), "channels_first"), (1, 4, 6), 1.5),
    (lambda: kl.EinsumDense("ab,bc->ac", 4, bias_axes="c", activation="tanh"), (5,), 1.5),
    (lambda: kl.EinsumDense("...x,xy->...y", 3, bias_axes="y"), (4, 5), 1.001),
    (lambda: kl.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), (3, 4), 1.001),
    (lambda: kl.EinsumDense("abcd,cde->abe", (None, 5)), (3, 2, 4), 1.001),
    (lambda: kl.EinsumDense("abc,bcd->abd", (3, 2), bias_axes="bd"), (3, 4), 1.001),
    (lambda: kl.EinsumDense("abc,cd->ad", 2), (3, 4), 1.001),
    (lambda: kl.TimeDistributed(kl.Dense(4, activation="softplus")), (3, 5), 1.5),
    (lambda: kl.TimeDistributed(kl.Conv2D(2, 2)), (2, 4, 3, 2), 1.2),
    (lambda: kl.TimeDistributed(kl.BatchNormalization()), (2, 3, 4), 1.001),
    (lambda: kl.TimeDistributed(kl.TimeDistributed(kl.Dense(2))), (2, 3, 4), 1.001),
    (lambda: kl.TimeDistributed(kl.GlobalAveragePooling2D()), (3, 2, 4, 2), 1.001),
    (lambda: kl.TimeDistributed(kl.Resizing(3, 2)), (2, 2, 3, 1), 1.001),
    (lambda: kl.SpectralNormalization(kl.Dense(4, activation="relu")), (5,), 1.5),
    (lambda: kl.SpectralNormalization(kl.Conv2D(3, 2, padding="same")), (3, 4, 2), 1.2),
    (lambda: kl.Activation("sparse_plus"), (7,), 1.005),
    (lambda: kl.Rescaling(np.array([[0.1], [-2.3]])), (2, 3), 1.001),
]


def built(make, shape, seed=0):
    """A model of one layer whose weights, statistics included, are nothing special."""
    inputs = keras.Input(shape)
    layer = make()
    model = keras.Model(inputs, layer(inputs))
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = to_numpy(weight)
        if "variance" in weight.name:
            value = rng.uniform(0.1, 2, value.shape)
        elif "kernel" not in weight.name:
            value = value + rng.normal(size=value.shape)
        weight.assign(value.astype("float32"))
    return model


def whole(model):
    """The model as one body, its last layer no head."""
    graph = trace(model)
    return Certifiable(graph, graph, None, ())


def samples(shape, count=24, seed=1):
    """Random samples of several sizes, zero among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *shape)) * rng.choice([1e-3, 1, 30], (count,) + (1,) * len(shape))
    x[0] = 0
    return x


def norms(x):
    return np.sqrt((x.reshape(len(x), -1) ** 2).sum(axis=1))


def check(model, x):
    """Float64 evaluation within the allowance, values within r, stretches below the constant.

    Returns the constant, the largest stretch found and whether the model's own float32 answers are
    near the exact ones, which low precision's are not.
    """
    certifiable = whole(model)
    index = certifiable.graph.output
    values = extended.evaluate(certifiable, x)
    exact = values[index]
    computed = Float64Twin(certifiable)(x)
    assert computed.shape == exact.shape
    shapes = {0: x.shape} | {i: v.shape for i, v in values.items()}
    bounds = [step_bounds(s, Context(s, shapes)) for s in certifiable.graph.steps]
    r, d = forward_errors(certifiable.graph, bounds, input_norms(x))[index]
    assert (norms(exact) <= r).all()
    error = norms(computed.astype(extended.LONG) - exact)
    assert (error <= d).all(), float((error / d).max())
    assert (d <= 1e-10 * (1 + r)).all()
    own = check_program(model, x, exact, shapes)
    constant = lipschitz_bound_of(certifiable)
    y = x + np.random.default_rng(5).normal(size=x.shape) * 1e-3
    moved = extended.evaluate(certifiable, y)[index]
    stretches = norms(moved - exact) / norms(y - x)
    assert (stretches <= constant).all(), (float(stretches.max()), constant)
    slope = steepest(certifiable, x[1:])  # at 0 maxima tie, and have no slope
    assert slope <= constant * (1 + 1e-8), (slope, constant)
    near = np.allclose(own, exact.astype("float64"), 2e-4, 2e-4)
    return constant, max(float(stretches.max()), slope), near


def check_program(model, x, exact, shapes):
    """The model's own float32 answer within what float32 may do, or the layer refused for it."""
    single = x.astype("float32")
    certifiable = whole(model)
    graph = certifiable.graph
    try:
        arithmetic = program_arithmetic("float32", certifiable)
        bounds, _ = measured(graph, shapes, arithmetic=arithmetic)
    except ValueError as refused:
        assert re.search("certified as a float32 program|is no float32 program", str(refused))
        return called(model, single)
    scale = 2.0**-24
    given = scale * input_norms(x) + 2.0**-126 * math.sqrt(x[0].size)
    _, d = forward_errors(graph, bounds, input_norms(x), given)[graph.output]
    own = to_numpy(model.predict_on_batch(single))
    error = norms(own.astype(extended.LONG) - exact)
    assert (error <= d).all(), float((error / d).max())
    return own


def steepest(certifiable, x, entries=1200):
    """The largest norm of the Jacobian, by differences in 80 bits, of some of the samples."""
    index, n = certifiable.graph.output, x[0].size
    points = x[: max(entries // n, 2)]
    size = extended.LONG(2.0**-24)
    steps = size * np.eye(n, dtype=extended.LONG).reshape(n, *x.shape[1:])
    moved = np.concatenate([p + sign * steps for p in points for sign in (1, -1)])
    values = extended.evaluate(certifiable, moved)[index].reshape(len(points), 2, n, -1)
    jacobians = (values[:, 0] - values[:, 1]) / (2 * size)
    return float(np.linalg.norm(jacobians.astype("float64"), 2, axis=(1, 2)).max())


def lipschitz_bound_of(certifiable):
    bounds = [step_bounds(s, Context(s)) for s in certifiable.graph.steps]
    return bound_of(certifiable, bounds).constant


@needs_long
@pytest.mark.parametrize("case", range(len(CASES)))
def test_layer(case):
    make, shape, tightness = CASES[case]
    model = built(make, shape)
    x = samples(shape)
    try:
        constant, stretch, near = check(model, x)
    except UserWarning as warned:
        if "inconsistencies across backends" not in str(warned):
            raise
        pytest.skip("Keras 3.14 on PyTorch, and says so: shifted against the other backends")
    assert near, "not what Keras computes"
    if tightness:
        assert constant <= tightness * stretch


IDENTITIES = [cls for cls, rule in _LAYERS.items() if rule.identity]


@pytest.mark.parametrize("cls", IDENTITIES, ids=lambda cls: cls.__name__)
def test_identities_return_their_input(cls):
    """Also values that no image has: nothing is clipped at inference."""
    arguments = {
        "RandomBrightness": {"factor": 0.2},
        "RandomColorDegeneration": {"factor": 0.2},
        "RandomColorJitter": {"brightness_factor": 0.2},
        "RandomContrast": {"factor": 0.2},
        "RandomHue": {"factor": 0.2},
        "RandomPosterization": {"factor": 4},
        "RandomRotation": {"factor": 0.2},
        "RandomSaturation": {"factor": 0.2},
        "RandomSharpness": {"factor": 0.2},
        "RandomTranslation": {"height_factor": 0.2, "width_factor": 0.2},
        "RandomZoom": {"height_factor": 0.2},
        "AlphaDropout": {"rate": 0.3},
        "Dropout": {"rate": 0.3},
        "GaussianDropout": {"rate": 0.3},
        "GaussianNoise": {"stddev": 0.3},
        "SpatialDropout1D": {"rate": 0.3},
        "SpatialDropout2D": {"rate": 0.3},
        "SpatialDropout3D": {"rate": 0.3},
    }.get(cls.__name__, {})
    shape = {"SpatialDropout1D": (6, 3), "SpatialDropout3D": (4, 4, 4, 3)}.get(
        cls.__name__, (8, 8, 3)
    )
    inputs = keras.Input(shape)
    model = keras.Model(inputs, cls(**arguments)(inputs))
    x = (300 * np.random.default_rng(0).normal(size=(3, *shape))).astype("float32")
    np.testing.assert_array_equal(called(lambda x: model(x, training=False), x), x)
    np.testing.assert_array_equal(Float64Twin(model)(x), x)
    assert lipschitz_bound(model).constant < 1 + 1e-14


@needs_long
@pytest.mark.parametrize("name", ["Add", "Subtract", "Average", "Maximum", "Minimum"])
def test_merges(name):
    inputs = keras.Input((5,))
    branch = kl.Dense(5, activation="tanh")(inputs)
    model = keras.Model(inputs, getattr(kl, name)()([inputs, branch]))
    check(model, samples((5,)))
    norm = np.linalg.norm(np.asarray(model.layers[1].get_weights()[0], "float64"), 2)
    factors = {"Add": 1 + norm, "Subtract": 1 + norm, "Average": (1 + norm) / 2}
    expected = factors.get(name, np.hypot(1, norm))
    assert lipschitz_bound(model).constant == pytest.approx(expected, rel=1e-8)


@needs_long
def test_broadcasting_merges_count_repeated_entries():
    inputs = keras.Input((4, 3))
    pooled = keras.ops.sum(inputs, axis=1, keepdims=True)
    model = keras.Model(inputs, kl.Add()([inputs, pooled]))
    constant, _, _ = check(model, samples((4, 3)))
    # x + sum(x): the ones matrix of 4 rows has norm 4.
    assert constant >= 5 * (1 - 1e-12)
    aligned = np.ones((2, 4, 3))
    values = extended.evaluate(whole(model), np.stack([aligned[0], 0 * aligned[0]]))
    stretch = norms(values[trace(model).output])[0] / norms(aligned)[0]
    assert stretch == pytest.approx(5)


@needs_long
def test_concatenation():
    inputs = keras.Input((4, 3))
    branch = kl.Rescaling(2.0)(inputs)
    model = keras.Model(inputs, kl.Concatenate(axis=1)([inputs, branch]))
    constant, stretch, _ = check(model, samples((4, 3)))
    assert constant == pytest.approx(np.sqrt(5)) == pytest.approx(stretch, rel=1e-6)


def test_max_pooling_with_overlap_reaches_its_constant():
    """One entry that dominates every window it falls into."""
    model = built(lambda: kl.MaxPooling2D(3, strides=1), (5, 5, 1))
    x = np.zeros((2, 5, 5, 1))
    x[0, 2, 2, 0] = 1
    twin = Float64Twin(whole(model))
    assert norms(twin(x))[0] == pytest.approx(3)
    assert lipschitz_bound(model).constant == pytest.approx(3)


def test_unknown_sizes_take_the_worst_case_until_data_comes():
    inputs = keras.Input((None, None, 3))
    x = kl.GlobalAveragePooling2D()(inputs)
    model = keras.Model(inputs, kl.Dense(4)(x))
    assert lipschitz_bound(model).body_constant == pytest.approx(1)
    for size in (1, 4):
        data = np.random.default_rng(0).random((5, size, size, 3))
        certificate = lip.certify(model, data, verbose=0)
        assert certificate.radii.max() > 0
        assert certificate.error_allowances.max() < 1e-13


class Declared(kl.Layer):
    """Of someone else's: its constant is stated, not proven."""

    lipschitz_constant = 1.0

    def call(self, inputs):
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape


REFUSED = [
    (
        lambda: kl.Dense(3, activation="exponential"),
        (4,),
        r"activation 'exponential' has no constant",
    ),
    (lambda: kl.Dense(3, activation="softmax"), (4, 4), r"softmax inside a network"),
    (lambda: kl.Softmax(), (4, 4), r"softmax inside a network"),
    (lambda: kl.Activation(lambda x: 5 * x), (4,), r"no Lipschitz constant is known for its act"),
    (lambda: kl.Activation("hard_shrink"), (4,), r"activation 'hard_shrink'"),
    (lambda: kl.ReLU(threshold=0.5), (4,), r"jumps at its threshold 0.5"),
    (lambda: kl.LayerNormalization(), (4,), r"\(LayerNormalization\)"),
    (lambda: kl.UnitNormalization(), (4,), r"\(UnitNormalization\)"),
    (lambda: kl.Dense(4, activation="glu"), (4,), r"activation 'glu' has no constant: it multipl"),
    (lambda: kl.Dense(3, activation="sparsemax"), (4,), r"activation 'sparsemax' \(known: "),
    (lambda: kl.UpSampling2D(interpolation="bicubic"), (4, 4, 1), r"interpolation is 'bicubic'"),
    (lambda: kl.Resizing(2, 2, interpolation="bicubic"), (4, 4, 1), r"interpolation is 'bicubic'"),
    (lambda: kl.Resizing(2, 2, antialias=True), (4, 4, 1), r"its antialias is on"),
    (lambda: kl.Resizing(2, 2, crop_to_aspect_ratio=True), (4, 5, 1), r"crop_to_aspect_ratio is"),
    (lambda: kl.Resizing(2, 2, pad_to_aspect_ratio=True), (4, 5, 1), r"pad_to_aspect_ratio is on"),
    (lambda: kl.Resizing(2, 2), (None, 5, 1), r"shape \(None, 5, 1\) is unknown"),
    (lambda: kl.CenterCrop(4, 2), (3, 5, 1), r"resizes images that are smaller than 4 x 2"),
    (lambda: kl.CenterCrop(4, 2), (None, 5, 1), r"resizes images that are smaller than 4 x 2"),
    (lambda: kl.AdaptiveAveragePooling1D(7), (14, 1), r"pool 14 entries to 7 in different ways"),
    (lambda: kl.AdaptiveMaxPooling1D(7), (14, 1), r"pool 14 entries to 7 in different ways"),
    (lambda: kl.EinsumDense("ab,bc->ac", 3, activation="softmax"), (4,), r"softmax inside"),
    (lambda: kl.TimeDistributed(kl.LSTM(3)), (2, 3, 4), r"no rule for the layer it wraps, LSTM"),
    (lambda: kl.TimeDistributed(Declared()), (3, 4), r"no rule for the layer it wraps, Declared"),
    (
        lambda: kl.TimeDistributed(keras.Sequential([kl.Dense(3)])),
        (3, 4),
        r"no rule for the layer it wraps, Sequential",
    ),
    (lambda: kl.TimeDistributed(kl.Softmax()), (3, 4), r"softmax inside a network"),
    (lambda: kl.SpectralNormalization(kl.Embedding(5, 3)), (4,), r"\(Embedding\)"),
    (lambda: kl.BatchNormalization(renorm=True), (4,), r"batch renormalisation"),
    (lambda: kl.Normalization(mean=0.0, variance=0.0), (4,), r"standard deviations reach from 0"),
    (lambda: kl.AveragePooling2D(2, padding="same"), (5, 4, 1), r"border windows differently"),
    (lambda: kl.LSTM(3), (4, 2), r"\(LSTM\)"),
    (lambda: kl.Lambda(lambda x: x), (4,), r"\(Lambda\)"),
    (lambda: kl.Embedding(5, 3), (4,), r"\(Embedding\)"),
    (lambda: kl.RandomCrop(2, 2), (4, 4, 1), r"\(RandomCrop\)"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refusals(case):
    make, shape, message = REFUSED[case]
    inputs = keras.Input(shape)
    outputs = make()(inputs)
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(keras.Model(inputs, kl.ReLU()(outputs)))


def test_negative_variance_is_refused():
    model = built(kl.BatchNormalization, (4,))
    model.layers[-1].moving_variance.assign([-1.0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"variance \+ epsilon is -0.999.*not positive"):
        lipschitz_bound(model)


def test_lora_is_refused():
    model = built(lambda: kl.Dense(4), (4,))
    model.layers[-1].enable_lora(2)
    with pytest.raises(ValueError, match="LoRA"):
        lipschitz_bound(keras.Model(model.inputs, kl.ReLU()(model.outputs[0])))


def test_concatenating_samples_is_refused():
    inputs = keras.Input((4,))
    joined = kl.Concatenate(axis=0)([inputs, inputs])
    with pytest.raises(ValueError, match="batch axis"):
        lipschitz_bound(keras.Model(inputs, joined))
