"""Detectors of false certificates: functions that raise AssertionError if they find one.

test_soundness.py runs them on the library as it is, and, in the mutant gate, on the library with a
fault put in: every fault must be caught by one of them.
"""

import functools

import extended
import keras
import numpy as np
import random_nets
import red_team
from data import to_numpy
from random_nets import gradients

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.certification.evaluation import Evaluation
from keras_lipnext.lipschitz.model import read
from keras_lipnext.twin import Float64Twin

kl, ll = keras.layers, lip.layers
CHANNELS = ("channels_last", "channels_first")


def polar(matrix):
    """Nearest matrix with orthonormal rows or columns, in float64."""
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def exactly_orthogonal(model, seed=0):
    """Kernels orthonormal to float64, not only to float32."""
    for weight in model.weights:
        if isinstance(weight.constraint, lip.manifolds.Stiefel):
            weight.assign(polar(np.asarray(to_numpy(weight), "float64")))
    return model


def in_float64(make):
    """A model of float64 weights, built where the backend can hold them."""
    with backend.float64_scope():
        keras.config.set_dtype_policy("float64")
        try:
            return exactly_orthogonal(make())
        finally:
            keras.config.set_dtype_policy("float32")


def assign(weight, value):
    """Float64 values to weights that may be float64, which JAX holds in its 64-bit mode only."""
    with backend.float64_scope():
        weight.assign(value)


def shifting_model(padding="circular", mixing="reduced"):
    """Shifts, mixing and pooling behind 8 channels, no stem."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((3, 4, 8))
    x = ll.LipNeXtBlock(1 / 4, 0.5, padding, mixing)(inputs)
    x = ll.SpatialShift(1 / 4, padding)(x)
    return keras.Model(inputs, ll.NormalizedDense(4)(ll.L2Pool()(x)))


def ranked_model(sides, padding, data_format):
    """As `shifting_model`, of series or volumes."""
    keras.utils.set_random_seed(3)
    ratio, shared = 1 / (2 * len(sides)), {"data_format": data_format}
    inputs = keras.Input((*sides, 12) if data_format == "channels_last" else (12, *sides))
    x = ll.LipNeXtBlock(ratio, 0.5, padding, **shared)(inputs)
    x = ll.SpatialShift(ratio, padding, **shared)(x)
    return keras.Model(inputs, ll.NormalizedDense(4)(ll.L2Pool(**shared)(x)))


def full_model():
    """`shifting_model` with the whole R."""
    return shifting_model(mixing="full")


def dense_model():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    x = ll.BetaAbs(1.0)(ll.OrthogonalDense(6)(inputs))
    return keras.Model(inputs, ll.NormalizedDense(4)(ll.OrthogonalDense(6)(x)))


def convolution_model():
    """Everything whose naive constant is too small: overlap, residual sums, statistics."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5, 5, 2))
    x = kl.Normalization(mean=[0.3, 0.4], variance=[0.01, 4.0])(inputs)
    x = kl.Conv2D(2, 3, padding="same", kernel_initializer="ones", activation="relu")(x)
    x = kl.Add()([x, kl.BatchNormalization()(x)])
    x = kl.MaxPooling2D(3, strides=1)(x)
    model = keras.Model(inputs, kl.Dense(3)(kl.Flatten()(x)))
    model.get_layer(index=3).moving_variance.assign([0.25, 9.0])
    return model


def gradient_norms(model, x):
    """{(i, j): norms of the gradients of z_i - z_j at x}, in float64."""
    slopes = gradients(Float64Twin(model), x, np.eye(model.output_shape[-1]))
    slopes = slopes.reshape(*slopes.shape[:2], -1)
    return {
        (i, j): np.linalg.norm(slopes[i] - slopes[j], axis=1)
        for i in range(len(slopes))
        for j in range(i)
    }


def gradient_equality():
    """An orthogonal network preserves gradients: constants neither too large nor too small."""
    for make in (shifting_model, full_model, dense_model):
        equal_gradients(in_float64(make))


def equal_gradients(model):
    x = np.random.default_rng(0).normal(size=(3, *model.input_shape[1:]))
    kernel = np.asarray(to_numpy(model.layers[-1].kernel), "float64")
    for (i, j), norms in gradient_norms(model, x).items():
        expected = np.linalg.norm(kernel[:, i] - kernel[:, j])
        np.testing.assert_allclose(norms / expected, 1, rtol=1e-12)


def series_and_volumes():
    """Equal gradients on one and three spatial axes; slopes with zeros at the border."""
    for sides, formats in (((5,), CHANNELS[::-1]), ((3, 2, 4), CHANNELS)):
        circular, zero = (
            functools.partial(ranked_model, sides, padding, data_format)
            for padding, data_format in zip(("circular", "zero"), formats)
        )
        equal_gradients(in_float64(circular))
        slopes(zero())


def slopes(model, x=None):
    """Gradients of logit differences never exceed K times the distance of the weight vectors."""
    if x is None:
        x = np.random.default_rng(1).normal(size=(8, *model.input_shape[1:]))
    constant = lip.lipschitz_bound(model).body_constant
    kernel = np.asarray(to_numpy(model.layers[-1].kernel), "float64")
    for (i, j), norms in gradient_norms(model, x).items():
        limit = constant * np.linalg.norm(kernel[:, i] - kernel[:, j])
        assert (norms <= limit * (1 + 1e-12)).all(), float((norms / limit).max())


def drifted_slopes(change):
    """Slopes of a model one of whose kernels was changed by `change`."""
    for make, part in ((shifting_model, "mixing"), (full_model, "mixing"), (dense_model, None)):
        model = make()
        layer = getattr(model.layers[1], part) if part else model.layers[1]
        layer.kernel.assign(change(np.asarray(to_numpy(layer.kernel), "float64")))
        slopes(model)


def scaled_layer():
    """One kernel times 1.001."""
    drifted_slopes(lambda w: w * 1.001)


def changed_entry():
    """0.05 on one entry."""
    drifted_slopes(lambda w: w + 0.05 * (np.arange(w.size).reshape(w.shape) == 7))


def noisy_kernel():
    """Noise of 1e-3 on a kernel."""
    drifted_slopes(lambda w: w + 1e-3 * np.random.default_rng(0).normal(size=w.shape))


def rounded_kernel():
    """Kernels rounded to bfloat16: cut to eight bits."""
    for seed in range(3):
        rng = np.random.default_rng(seed)

        def rounded(w, rng=rng):
            w = polar(w + rng.normal(size=w.shape)).astype("float32")
            return (w.view("uint32") + np.uint32(0x8000) & np.uint32(0xFFFF0000)).view("float32")

        drifted_slopes(rounded)


def affine_model(offset=50.0):
    """Biases so large that abs never fires: an affine network, its distances known exactly."""
    model = in_float64(dense_model)
    first, _, second, head = model.layers[1:]
    assign(first.bias, np.full(6, offset))
    # The second bias cancels what the first brings into the logits.
    assign(second.bias, -offset * np.ones(6) @ np.asarray(to_numpy(second.kernel), "float64"))
    assign(head.bias, 0.01 * np.arange(4))
    return model


def affine_truth(model, x):
    """(logits, distances to the nearest boundary, unit steps away from it), in 80 bits."""
    certifiable = read(model)
    logits = extended.logits(certifiable, x)
    matrix = extended.logits(certifiable, np.eye(6)) - extended.logits(
        certifiable, np.zeros((1, 6))
    )
    rows, top = np.arange(len(x)), logits.argmax(axis=1)
    normals = matrix.T[top][:, None] - matrix.T[None]  # (samples, classes, inputs)
    lengths = np.sqrt((normals**2).sum(axis=2))
    lengths[rows, top] = 1
    distances = (logits[rows, top][:, None] - logits) / lengths
    distances[rows, top] = np.inf
    nearest = distances.argmin(axis=1)
    steps = normals[rows, nearest] / lengths[rows, nearest][:, None]
    return logits, distances[rows, nearest], steps


def affine_distances():
    """Radii equal the true distances to 1e-9 and never exceed them; just beyond, they flip."""
    model = affine_model()
    x = np.random.default_rng(0).normal(size=(60, 6))
    certificate = lip.certify(model, x, verbose=0)
    logits, truth, steps = affine_truth(model, x)
    assert (certificate.predictions == logits.argmax(axis=1)).all()
    assert (certificate.radii <= truth).all()
    clear = truth > 0.01  # where the rounding of 1e-12 is far below 1e-9 of the distance
    assert clear.sum() > 50
    assert (certificate.radii > truth * (1 - 1e-9))[clear].all()
    for factor, flips in ((1.0001, True), (0.9999, False)):
        moved = extended.logits(read(model), x - (factor * certificate.radii)[:, None] * steps)
        assert ((moved.argmax(axis=1) != certificate.predictions) == flips)[clear].all()


def opposed_classes():
    """Two weight vectors of opposite sign: what margin / (sqrt(2) max |w|) overstates."""
    inputs = keras.Input((3,))
    model = keras.Model(inputs, ll.NormalizedDense(2)(inputs))
    model.set_weights([np.array([[1.0, -1.0], [0, 0], [0, 0]]), np.zeros(2)])
    radius = lip.certify(model, [[1.0, 0.0, 0.0]], verbose=0).radii[0]
    assert radius <= 1.0
    assert radius > 1 - 1e-12


def unnormalised_head():
    """A stored head of norm 3 must count as such."""
    inputs = keras.Input((3,))
    model = keras.Model(inputs, ll.NormalizedDense(2)(inputs))
    model.set_weights([np.array([[3.0, 0.0], [0, 3.0], [0, 0]]), np.zeros(2)])
    radius = lip.certify(model, [[1.0, 0.5, 0.0]], verbose=0).radii[0]
    assert radius <= 0.5 / 2**0.5
    assert radius > 0.999 * 0.5 / 2**0.5


def boundary_neighbours(model, steps=60, lines=40, seed=0):
    """Inputs within a few floats of a decision boundary: bisected, then neighbour by neighbour."""
    rng = np.random.default_rng(seed)
    twin = Float64Twin(model)
    low, high = (rng.normal(size=(lines, 6)) for _ in range(2))
    classes = twin(low).argmax(axis=1)
    differ = classes != twin(high).argmax(axis=1)
    low, high, classes = low[differ], high[differ], classes[differ]
    for _ in range(80):
        middle = (low + high) / 2
        same = (twin(middle).argmax(axis=1) == classes)[:, None]
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    points = [low, high]
    for step in range(steps):
        near = points[-1].copy()
        column = step % 6
        near[:, column] = np.nextafter(near[:, column], rng.choice([-9.0, 9.0]))
        points.append(near)
    return np.concatenate(points)


def rounding_attack():
    """Cancelling biases of 1e5 and 1e6, inputs a few floats from the boundary."""
    for offset in (1e5, 1e6):
        model = affine_model(offset)
        x = np.concatenate(
            [boundary_neighbours(model), np.random.default_rng(0).normal(size=(40, 6))]
        )
        certificate = lip.certify(model, x, verbose=0, batch_size=len(x))
        logits, truth, _ = affine_truth(model, x)
        certified = certificate.radii > 0
        assert (logits.argmax(axis=1) == certificate.predictions)[certified].all()
        assert (certificate.radii <= truth)[certified].all()
        assert certified[-40:].all()


def ties():
    """Two equal logits, two equal weight vectors: nothing is certified."""
    inputs = keras.Input((3,))
    model = keras.Model(inputs, ll.NormalizedDense(3)(inputs))
    model.set_weights([np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]), np.zeros(3)])
    radii = lip.certify(model, [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], verbose=0).radii
    assert radii[0] == 0
    assert radii[1] > 0


def exact_arithmetic():
    """Margins, slopes and flips of four models, in 80-bit arithmetic."""
    shifting = (shifting_model("zero"), shifting_model("zero", "full"))
    for model in (*shifting, convolution_model(), residual_chain()):
        random_nets.check(model, samples=4)


def cancelling_products():
    """Sums of terms 1e7 times as large as the sum: rounding is seen in the logits.

    Inputs of norm 1e6 meet a kernel of rank one that they are orthogonal to, in the head and in a
    layer that an activation follows.
    """
    rng = np.random.default_rng(5)
    common = rng.normal(size=50)
    x = rng.normal(size=(20, 50))
    x -= np.outer(x @ common, common) / (common @ common)
    x *= 1e6 / np.linalg.norm(x, axis=1, keepdims=True)
    kernel = 1e8 * common[:, None] + rng.normal(size=(50, 4))
    for activation in (None, ll.BetaAbs()):
        inputs = keras.Input((50,))
        outputs = kl.Dense(4, use_bias=False)(inputs)
        model = keras.Model(inputs, activation(outputs) if activation else outputs)
        model.layers[1].kernel.assign(kernel)
        evaluation = Evaluation(read(model), 4)
        evaluation(x, len(x))
        computed, exact = Float64Twin(model)(x), extended.logits(read(model), x)
        rows, top = np.arange(len(x)), computed.argmax(axis=1)
        off = abs((computed - exact) - (computed - exact)[rows, top][:, None])
        assert (off <= evaluation.allowances(x, computed)).all()
        assert off.max() > 1e-3  # there is rounding to be seen


def residual_chain():
    """x + x three times: its constant is 8, reached everywhere."""
    inputs = keras.Input((4,))
    x = inputs
    for _ in range(3):
        x = kl.Add()([x, x])
    model = keras.Model(inputs, kl.Dense(3)(x))
    return model


def replicated_border():
    """Zero padding keeps slopes below 1, at border pixels too; replicating the border does not."""
    inputs = keras.Input((3, 4, 8))
    x = ll.SpatialShift(1 / 4, "zero")(inputs)
    model = keras.Model(inputs, kl.Dense(2)(kl.Flatten()(x)))
    kernel = np.zeros((96, 2))
    kernel[[8 * 4 * 2, 8 * 4], 0] = 1  # a border pixel and its neighbour, of the first group
    model.layers[-1].set_weights([kernel, np.zeros(2)])
    slopes(model)


def overlapping_windows():
    """All windows that hold the one large entry answer with it; all taps pull the same way."""
    spike = np.zeros((2, 5, 5, 1))
    spike[:, 2, 2] = 1
    for layer in (
        kl.MaxPooling2D(3, strides=1),
        kl.Conv2D(1, 3, kernel_initializer="ones"),
        kl.AveragePooling2D(3, strides=1),
    ):
        inputs = keras.Input((5, 5, 1))
        model = keras.Model(inputs, kl.Dense(2)(kl.Flatten()(layer(inputs))))
        kernel = np.stack([np.ones(9), np.zeros(9)], axis=1)
        model.layers[-1].set_weights([kernel, np.zeros(2)])
        slopes(model, spike)


def residual_reflection():
    """x - 2 W relu(W^T x + b), every unit active, W a little too large: beyond a reflection."""
    inputs = keras.Input((6,))
    layer = ll.SDPResidualDense(3, "orthogonal")
    model = keras.Model(inputs, ll.NormalizedDense(4)(layer(inputs)))
    layer.bias.assign(np.full(3, 50.0))
    layer.kernel.assign(1.05 * np.asarray(to_numpy(layer.kernel)))
    weights = 0.1 * np.random.default_rng(0).normal(size=(6, 4))
    weights[:, :2] += np.outer(to_numpy(layer.kernel)[:, 0], [1, -1])
    model.layers[-1].kernel.assign(weights)
    slopes(model)


def sandwiched_reflection():
    """2 A^T Psi relu(Psi^-1 B x + b), every unit active, A = B and [A B] a little too large."""
    inputs = keras.Input((6,))
    layer = ll.SandwichDense(6)
    model = keras.Model(inputs, ll.NormalizedDense(4)(layer(inputs)))
    layer.bias.assign(np.full(6, 50.0))
    layer.log_psi.assign(np.linspace(-0.5, 1, 6))
    layer.kernel.assign(1.05 * np.sqrt(0.5) * np.concatenate([np.eye(6), np.eye(6)]))
    slopes(model)


def turned_pairs():
    """Pairs of channels reflected by angles of all sizes, on both sides of each mirror."""
    inputs = keras.Input((6,))
    layer = ll.Householder(angle_initializer="random_normal")
    model = keras.Model(inputs, ll.NormalizedDense(4)(layer(inputs)))
    layer.angle.assign([0.3, 2.0, -9.0])
    slopes(model)


def bends_ahead():
    """A ReLU that wakes up one step away decides 1.2 steps away, and nothing does before.

    Of a local constant's radius: the slope counts from where the bend is, not less.
    """
    for depth in (1, 2):
        model = keras.Sequential([keras.Input((1,))])
        for _ in range(depth):
            model.add(kl.Dense(1, "relu"))
        model.add(kl.Dense(2))
        model.layers[0].set_weights([np.ones((1, 1)), -np.ones(1)])
        for layer in model.layers[1:-1]:
            layer.set_weights([np.ones((1, 1)), np.zeros(1)])
        model.layers[-1].set_weights([np.array([[-5.0, 0.0]]), np.array([1.0, 0.0])])
        found = lip.certify(model, np.zeros((1, 1)), verbose=0, lipschitz="local_lipschitz")
        assert 1.15 < found.radii[0] <= 1.2


ALL = (
    ties,
    opposed_classes,
    unnormalised_head,
    scaled_layer,
    changed_entry,
    noisy_kernel,
    rounded_kernel,
    affine_distances,
    rounding_attack,
    gradient_equality,
    series_and_volumes,
    replicated_border,
    overlapping_windows,
    residual_reflection,
    sandwiched_reflection,
    turned_pairs,
    exact_arithmetic,
    cancelling_products,
    *red_team.ALL,
    bends_ahead,
)
