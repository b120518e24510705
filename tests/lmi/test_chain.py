"""Reading models as chains: the chain computes what the model does, and all else is refused."""

from fractions import Fraction
from types import SimpleNamespace

import keras
import mpmath
import numpy as np
import pytest
from chains import dense_chain

import keras_lipnext as lip
from keras_lipnext.lmi import _chain
from keras_lipnext.lmi._affine import AffineLayer, Chain
from keras_lipnext.lmi._chain import LARGEST, _Reader, magnitude_norm, read_chain
from keras_lipnext.lmi.result import ScaledChain

pytestmark = pytest.mark.once

kl = keras.layers


def built(*layers, shape):
    return keras.Sequential([keras.Input(shape), *layers])


def normalization():
    layer = kl.BatchNormalization()
    layer.build((None, 4, 4, 3))
    random = np.random.default_rng(5)
    for weight in layer.weights:
        weight.assign(random.uniform(0.5, 2, weight.shape))
    return layer


MODELS = {
    "dense": lambda: dense_chain((5, 7, 6, 3), "tanh"),
    "one layer": lambda: dense_chain((5, 3)),
    "rescaled": lambda: built(
        kl.Rescaling(1 / 255, 0.5),
        kl.Dense(4, "relu"),
        kl.Rescaling(-3.0, 1.0),
        kl.Dense(2),
        shape=(3,),
    ),
    "merged": lambda: built(kl.Dense(4), kl.Dense(6, "relu"), kl.Dense(5), kl.Dense(2), shape=(3,)),
    "two activations": lambda: built(
        kl.Dense(4, "leaky_relu"), kl.Dropout(0.5), kl.ELU(), kl.Dense(2), shape=(3,)
    ),
    "starts and ends in activations": lambda: built(
        kl.Activation("tanh"), kl.Dense(4, "relu"), shape=(3,)
    ),
    "reshaped": lambda: built(kl.Reshape((2, 6)), kl.Flatten(), kl.Dense(3), shape=(3, 4)),
    "ours": lambda: built(
        lip.layers.OrthogonalDense(6, activation="softplus"),
        lip.layers.NormalizedDense(4),
        kl.LeakyReLU(0.3),
        lip.layers.NormalizedDense(2),
        shape=(5,),
    ),
    "softmax at the end": lambda: built(kl.Dense(4, "relu"), kl.Dense(3), shape=(3,)),
    "convolutions": lambda: built(
        kl.Conv2D(3, 3, strides=2, padding="same", activation="relu"),
        normalization(),
        kl.Conv2D(2, (2, 3), padding="valid"),
        kl.Flatten(),
        kl.Dense(3),
        shape=(8, 7, 2),
    ),
    "one axis, dilated": lambda: built(
        kl.Conv1D(3, 3, padding="same", dilation_rate=2, activation="elu"),
        kl.Conv1D(2, 4, strides=3),
        kl.Flatten(),
        shape=(11, 2),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_chain_computes_what_the_model_computes(name):
    model = MODELS[name]()
    for weight in model.weights:
        if "bias" in weight.path:
            weight.assign(np.random.default_rng(3).normal(size=weight.shape))
    chain = read_chain(model)
    x = np.random.default_rng(4).normal(size=(10, *model.input_shape[1:])).astype("float32")
    expected = model.predict(x, verbose=0).reshape(10, -1)
    found = x.reshape(10, -1).astype("float64")
    for layer in chain.layers:
        found = layer(found)
    assert np.abs(found - expected).max() < 1e-5 * (1 + np.abs(expected).max())
    assert [w.shape[1] for w in chain.weights[1:]] == [len(w) for w in chain.weights[:-1]]
    assert all(layer.activations for layer in chain.layers[:-1])
    assert not chain.layers[-1].activations


def test_stored_matrices_are_exact_and_merged_ones_within_their_error():
    chain = read_chain(MODELS["merged"]())
    assert len(chain.layers) == 2 and all(0 < error < 1e-13 for error in chain.errors)
    assert read_chain(MODELS["dense"]()).errors == [0.0] * 3
    model = MODELS["merged"]()
    first, second = (layer.kernel.numpy().astype(np.longdouble) for layer in model.layers[:2])
    off = (first @ second).T - read_chain(model).weights[0]
    assert np.linalg.norm(off.astype("float64")) <= chain.errors[0]


def test_scaled_matrices_are_within_their_error():
    model = MODELS["rescaled"]()
    kernel = model.layers[1].kernel.numpy().astype(np.longdouble)
    layer = read_chain(model).layers[0]
    off = (kernel.T * np.longdouble(1 / 255) - layer.weight).astype("float64")
    assert 0 < np.linalg.norm(off) <= layer.error < 1e-15


def test_slopes():
    chain = read_chain(MODELS["two activations"]())
    low, high = chain.slopes[0]
    assert low == 0 and 1 <= high < 1 + 1e-15
    leaky = layer_with("leaky_relu", "leaky_relu")
    low, high = leaky.slopes
    assert 0.04 - 1e-15 < low < 0.2**2 and high >= 1
    low, high = layer_with("gelu", "gelu").slopes
    assert -0.1456 < low < -0.1455 and high > 1.27


def layer_with(*names):
    from keras_lipnext.lipschitz.rules.activations import find_activation

    activations = tuple(find_activation(kl.Activation(name)) for name in names)
    return AffineLayer("a", np.eye(1), np.zeros(1), activations=activations)


def test_body_and_logits():
    model = dense_chain((5, 7, 6, 3))
    body, logits = read_chain(model, "body"), read_chain(model, "logits")
    assert len(body.layers) == len(logits.layers) == 3
    assert np.array_equal(body.weights[-1], np.eye(6)) and logits.weights[-1].shape == (3, 6)
    ending = keras.Sequential([*model.layers, kl.Softmax()])
    ending.build((None, 5))
    assert np.array_equal(read_chain(ending).weights[-1], logits.weights[-1])
    with pytest.raises(ValueError, match="part='head'"):
        read_chain(model, "head")


def residual():
    inputs = keras.Input((4,))
    x = kl.Dense(4, "relu", name="inner")(inputs)
    return keras.Model(inputs, kl.Dense(2)(kl.Add(name="sum")([inputs, x])))


REFUSED = {
    "residual": (residual, "Layer 'sum'.*branches"),
    "pooling": (
        lambda: built(
            kl.AveragePooling2D(2, name="pool"), kl.Flatten(), kl.Dense(2), shape=(4, 4, 1)
        ),
        "Layer 'pool'.*class",
    ),
    "BetaAbs": (
        lambda: built(lip.layers.BetaAbs(name="abs"), kl.Dense(2), shape=(4,)),
        "Layer 'abs'.*class",
    ),
    "along an axis": (
        lambda: built(kl.Dense(3, name="along"), kl.Flatten(), kl.Dense(2), shape=(4, 4)),
        "Layer 'along'.*one axis",
    ),
    "groups": (
        lambda: built(kl.Conv2D(2, 3, groups=2, name="grouped"), kl.Flatten(), shape=(4, 4, 2)),
        "Layer 'grouped'.*groups",
    ),
    "large convolution": (
        lambda: built(kl.Conv2D(8, 3, name="large"), kl.Flatten(), shape=(40, 40, 1)),
        f"Layer 'large'.*{LARGEST}",
    ),
    "several scales": (
        lambda: built(kl.Rescaling([1.0, 2.0], name="scales"), kl.Dense(2), shape=(2,)),
        "Layer 'scales'.*one number",
    ),
    "no size": (
        lambda: built(kl.Conv1D(2, 3), kl.GlobalAveragePooling1D(), shape=(None, 2)),
        "no fixed size",
    ),
    "zero": (
        lambda: built(kl.Dense(2, "relu", kernel_initializer="zeros"), kl.Dense(2), shape=(2,)),
        "all-zero",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_is_refused_by_name(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_chain(build())


def test_refusals_name_the_alternative():
    with pytest.raises(ValueError, match="lipschitz='product'"):
        read_chain(residual())


@pytest.mark.slow
def test_no_wide_matrix_is_built_before_it_is_refused():
    model = built(kl.Dense(4000, "relu"), kl.Dense(4200, "relu", name="wide"), shape=(10,))
    with pytest.raises(ValueError, match="Layer 'wide'"):
        read_chain(model)


def test_magnitude_norm_is_a_bound():
    for seed in range(20):
        w = np.random.default_rng(seed).normal(size=(5, 8))
        assert np.linalg.norm(np.abs(w), 2) <= magnitude_norm(w)


STEP = SimpleNamespace(name="step", title="Layer 'step'")


def exact(array):
    return np.vectorize(Fraction)(np.asarray(array, "float64")).astype(object)


def norm(matrix):
    """2-norm of a matrix of Fractions, by mpmath."""
    with mpmath.workdps(50):
        entries = [[mpmath.mpf(v.numerator) / v.denominator for v in row] for row in matrix]
        return max(mpmath.svd_r(mpmath.matrix(entries), compute_uv=False))


def read_steps(size, *steps):
    """(reader, exact matrix) after matrices, and (factors, exact factors, relative error)."""
    reader, truth = _Reader(size), exact(np.eye(size))
    for step in steps:
        if isinstance(step, tuple):
            factors, exactly, relative = step
            reader.stretch(factors, np.zeros(np.shape(factors)), relative)
            truth = np.reshape(exactly, (-1, 1)) * truth
        else:
            reader.multiply(step, np.zeros(len(step)), STEP)
            truth = exact(step) @ truth
    reader.end(STEP)
    return reader.layers[0], truth


def off(layer, truth):
    return norm(exact(layer.weight) - truth)


@pytest.mark.parametrize("exponents", [(300, -540), (-540, 300), (-540, -300), (-540, 540)])
def test_rounding_is_bounded_where_squares_underflow(exponents):
    """Entries that cancel: nothing but the roundings of the product is left."""
    first = np.array([[2.0**53], [1.0], [-(2.0**53)]])
    second = np.array([[1.0, 1.0, 1.0], [0.0, 2.0**-10, 0.0]])
    for order in ([0, 1, 2], [1, 0, 2], [0, 2, 1]):
        steps = first[order] * 2.0 ** exponents[0], second[:, order] * 2.0 ** exponents[1]
        layer, truth = read_steps(1, *steps)
        assert off(layer, truth) <= layer.error
        assert layer.error <= 2.0**10 * 2.0 ** sum(exponents) + 2.0**-1000


@pytest.mark.parametrize("exponent", [-540, -1060])
def test_magnitude_norm_of_tiny_entries(exponent):
    w = np.abs(np.random.default_rng(0).normal(size=(5, 8)))
    w = np.ldexp(w, exponent)
    assert norm(exact(w)) <= magnitude_norm(w)


def test_a_rounded_scale_of_1_is_no_identity():
    """1/49 rounded, times 49 rounds to 1: between two activations that still is an error."""
    f = next(f for f in range(3, 200) if f * (1 / f) == 1 != Fraction(f) * Fraction(1 / f))
    model = built(
        kl.Dense(1, "relu"),
        kl.Rescaling(float(f)),
        kl.Rescaling(1 / f),
        kl.ReLU(),
        kl.Dense(1),
        shape=(1,),
    )
    layers = read_chain(model).layers
    assert len(layers) == 3
    assert 0 < abs(Fraction(f) * Fraction(1 / f) - 1) <= layers[1].error < 1e-15


def test_a_normalisation_that_rounds_to_1_is_no_identity():
    """1 / sqrt(1 + 2^-52) is 1 - 2^-53, and computed as 1."""
    normalised = kl.BatchNormalization(epsilon=2.0**-52, center=False, scale=False)
    model = built(kl.Dense(3, "relu"), normalised, kl.ReLU(), kl.Dense(2), shape=(2,))
    layers = read_chain(model).layers
    assert len(layers) == 3
    assert (layers[1].weight == np.eye(3)).all()
    assert 2.0**-53 <= layers[1].error < 1e-14


# Their product is 1, and computed as 0, or the other way about, whatever the order.
CANCELLING = [
    np.array([[2.0**53], [1.0], [-(2.0**53)]]),
    np.array([[1.0, 1.0, 1.0], [0, 2**-10, 0]]),
]


@pytest.mark.parametrize(
    "last", [np.eye(2) * 2.0**20, (np.array([2.0**20, 1.0]), [Fraction(2) ** 20, Fraction(1)], 0.0)]
)
def test_errors_are_carried_on(last):
    layer, truth = read_steps(1, *CANCELLING, last)
    assert 2.0**19 < off(layer, truth) <= layer.error


def test_the_rounding_of_a_scale_is_bounded():
    w = np.random.default_rng(0).normal(size=(1, 1))
    third = np.float64(1 / 3)
    layer, truth = read_steps(1, w, (third, Fraction(float(third)), 0.0))
    assert 0 < off(layer, truth) <= layer.error < 1e-15


def test_the_factors_of_batch_normalization_round():
    layer = kl.BatchNormalization()
    model = built(layer, kl.ReLU(), kl.Dense(1), shape=(400,))
    random = np.random.default_rng(0)
    for weight, ends in ((layer.gamma, (1.0, 1.2)), (layer.moving_variance, (0.9, 1.0))):
        weight.assign(random.uniform(*ends, weight.shape))
    gammas, variances = (
        [mpmath.mpf(float(v)) for v in keras.ops.convert_to_numpy(w)]
        for w in (layer.gamma, layer.moving_variance)
    )
    first = read_chain(model).layers[0]
    with mpmath.workdps(40):
        epsilon = mpmath.mpf(layer.epsilon)
        truth = [g / mpmath.sqrt(v + epsilon) for g, v in zip(gammas, variances)]
        worst = max(abs(mpmath.mpf(float(w)) - t) for w, t in zip(np.diag(first.weight), truth))
    # More than the one rounding of a product.
    assert 2.0**-53 * first.weight.max() < worst <= first.error / 2


@pytest.mark.parametrize("exponent", [-40, 40])
def test_errors_are_brought_to_the_units_of_their_weights(exponent):
    layer = AffineLayer("a", np.eye(3) * 2.0**exponent, np.zeros(3), error=2.0 ** (exponent - 9))
    scaled = ScaledChain.of(Chain("m", "logits", (layer, layer)))
    for w, error in zip(scaled.weights, scaled.errors):
        assert error / w.max() == pytest.approx(2.0**-9, rel=1e-12)


def test_slopes_near_0_are_rounded_away():
    from keras_lipnext.lipschitz.rules.activations import Activation

    for slope, ends in ((1e-40, (0.0, 1.0)), (-1e-40, (-(2.0**-100), 1.0))):
        activation = Activation(np.tanh, constant=1.0, least=slope)
        assert AffineLayer("a", np.eye(1), np.zeros(1), activations=(activation,)).slopes == ends
    for slope, ends in ((1e-40, (-1.0, 2.0**-100)), (-1e-40, (-1.0, 0.0))):
        activation = Activation(np.tanh, constant=slope, least=-1.0)
        assert AffineLayer("a", np.eye(1), np.zeros(1), activations=(activation,)).slopes == ends


def test_bodies_that_are_diagonal_need_no_matrix(monkeypatch):
    model = built(kl.Flatten(), kl.Rescaling(-0.1), kl.Dense(2), shape=(5, 3))
    monkeypatch.setattr(_chain, "LARGEST", 20)  # the inputs and outputs, and not the inputs twice
    chain = read_chain(model, "body")
    assert not chain.layers and 0.1 < chain.diagonal < 0.1 * (1 + 1e-11)
    result = lip.lmi.eclipse_fast(model, "body")
    assert (result.constant, result.multipliers) == (chain.diagonal, ())
    x = np.random.default_rng(0).normal(size=(4, 5, 3))
    one, other = (
        lip.certify(model, x, epsilons=0.1, verbose=0, lipschitz=lipschitz)
        for lipschitz in ("product", lip.lmi.eclipse_fast(model))
    )
    assert (other.radii > 0).all()
    np.testing.assert_allclose(one.radii, other.radii, rtol=1e-6)
    assert lip.lmi.eclipse_fast(built(kl.Flatten(), kl.Dense(2), shape=(3,)), "body").constant == 1


def test_the_identity_behind_the_last_activation_is_of_limited_size(monkeypatch):
    model = built(kl.Dense(12, "relu", name="hidden"), kl.Dense(3), shape=(4,))
    monkeypatch.setattr(_chain, "LARGEST", 20)
    assert len(read_chain(model).layers) == 2
    with pytest.raises(ValueError, match=r"'hidden'.*12 inputs and 12 outputs, over 20"):
        read_chain(model, "body")


def test_large_linear_models_are_refused_at_once():
    model = built(kl.Flatten(), kl.Dense(2, name="linear"), shape=(224, 224, 3))
    with pytest.raises(ValueError, match=r"'linear'.*150528 inputs.*lipschitz='product'"):
        lip.lipschitz_bound(model, lipschitz="eclipse_fast")
