"""Constants of balls: above every slope in them, close to the gradient in small ones; radii."""

import keras
import numpy as np
import pytest
from chains import dense_chain
from data import to_numpy
from hypothesis import given
from hypothesis import strategies as st

import keras_lipnext as lip
from keras_lipnext.lmi import local as module
from keras_lipnext.lmi._chain import read_chain
from keras_lipnext.lmi._verified import pair_norms
from keras_lipnext.lmi.result import pair_constants

kl = keras.layers


def value(chain, x):
    for layer in chain.layers:
        x = layer(x)
    return x


def steepest(model, centre, radius, seed=0, samples=400, rounds=12):
    """Slopes of all differences of outputs from the centre, found in its ball: from below."""
    chain, random = read_chain(model), np.random.default_rng(seed)
    size = centre.size
    at_centre = value(chain, centre[None])[0]

    def slopes(steps):
        moved = value(chain, centre + steps) - at_centre
        pairs = np.abs(moved[:, :, None] - moved[:, None, :])
        return pairs / np.linalg.norm(steps, axis=1)[:, None, None]

    def in_ball(steps):
        norms = np.linalg.norm(steps, axis=1, keepdims=True)
        return steps * np.minimum(1, radius * (1 - 1e-12) / norms)

    steps = random.normal(size=(samples, size))
    steps *= radius * random.uniform(0.05, 1, (samples, 1)) / np.linalg.norm(steps, axis=1)[:, None]
    found = slopes(steps)
    best = found.max(axis=0)
    for _ in range(rounds):
        i, j = np.unravel_index(random.integers(best.size), best.shape)
        top = steps[np.argsort(-found[:, i, j])[:40]]
        tried = in_ball(np.repeat(top, 10, axis=0) + 0.1 * radius * random.normal(size=(400, size)))
        steps = np.concatenate([top, tried])
        found = slopes(steps)
        best = np.maximum(best, found.max(axis=0))
    return best


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "softplus", "gelu", "elu"])
@pytest.mark.parametrize(
    "radius",
    [pytest.param(1e-3, marks=pytest.mark.once), 0.3, pytest.param(3.0, marks=pytest.mark.once)],
)
def test_no_slope_in_the_ball_is_above_them(activation, radius):
    model = dense_chain((4, 9, 8, 3), activation, seed=3, scale=2.0)
    x = np.random.default_rng(4).normal(size=(3, 4))
    constants = lip.lmi.local_lipschitz(model, x, radius)
    assert constants.shape == (3, 3, 3) and np.isfinite(constants).all()
    for centre, bound in zip(x, constants):
        assert (steepest(model, centre, radius) <= bound * (1 + 1e-9) + 1e-9).all()


@pytest.mark.once
@given(st.integers(0, 10**6), st.sampled_from([1e-2, 0.5, 2.0]))
def test_random_networks(seed, radius):
    random = np.random.default_rng(seed)
    sizes = (*random.integers(1, 7, random.integers(2, 5)), 3)
    activation = random.choice(["relu", "sigmoid", "log_sigmoid", "hard_tanh", "selu"])
    model = dense_chain(tuple(map(int, sizes)), activation, seed=seed, scale=3.0)
    x = random.normal(size=(2, sizes[0])) * 2
    for centre, bound in zip(x, lip.lmi.local_lipschitz(model, x, radius)):
        found = steepest(model, centre, radius, samples=100, rounds=4)
        assert (found <= bound * (1 + 1e-9) + 1e-9).all()


@pytest.mark.once
@pytest.mark.parametrize("activation", ["relu", "tanh", "softplus"])
def test_in_a_small_ball_they_are_the_gradients(activation):
    """And so nothing on the way is coarser than it need be."""
    model = dense_chain((5, 12, 10, 8, 4), activation, seed=1)
    x = np.random.default_rng(2).normal(size=(4, 5))
    constants = lip.lmi.local_lipschitz(model, x, 1e-7)
    chain, step = read_chain(model), 1e-6
    for centre, bound in zip(x, constants):
        steps = step * np.eye(5)
        jacobian = (value(chain, centre + steps) - value(chain, centre - steps)).T / (2 * step)
        gradients = np.linalg.norm(jacobian[:, None] - jacobian[None], axis=-1)
        np.testing.assert_allclose(bound, gradients, rtol=2e-4, atol=1e-9)


@pytest.mark.once
def test_they_grow_with_the_ball_up_to_those_of_all_inputs():
    model = dense_chain((5, 12, 10, 4), seed=1)
    x = np.random.default_rng(2).normal(size=(6, 5))
    small, middle, large = (lip.lmi.local_lipschitz(model, x, r) for r in (0.01, 0.5, 1e6))
    off = ~np.eye(4, dtype=bool)
    assert (small[:, off] <= middle[:, off] * (1 + 1e-6)).all()
    assert (middle.mean(axis=0)[off] < large.mean(axis=0)[off]).all()
    everywhere = pair_constants(model, lip.lmi.eclipse_diagonal(model).multipliers)
    assert (large[:, off] < 1.25 * everywhere[off]).all()
    each = lip.lmi.local_lipschitz(model, x, np.full(6, 0.5))
    np.testing.assert_array_equal(each, middle)


def test_one_neuron_by_hand():
    """Logits (relu(x), 0) at x = 1: within r > 1 the steepest secant is 1, the mean is not less."""
    model = keras.Sequential([keras.Input((1,)), kl.Dense(1, "relu"), kl.Dense(2)])
    model.set_weights([np.array(w) for w in ([[1.0]], [0.0], [[1.0, 0.0]], [0.0, 0.0])])
    for radius in (0.5, 1.0, 4.0):
        bound = lip.lmi.local_lipschitz(model, [[1.0]], radius)[0, 0, 1]
        assert bound == pytest.approx(1, rel=1e-6) and bound >= 1
    # From -1 the secant to 3 is the steepest in a ball of 4: it rises by 3 over 4.
    bound = lip.lmi.local_lipschitz(model, [[-1.0]], 4.0)[0, 0, 1]
    assert 0.75 <= bound < 0.75 * (1 + 1e-6)
    assert lip.lmi.local_lipschitz(model, [[-1.0]], 0.9)[0, 0, 1] < 1e-6


@pytest.fixture(scope="module")
def plain():
    model = dense_chain((8, 12, 12, 12, 4), seed=5)
    return model, np.random.default_rng(6).normal(size=(60, 8)).astype("float32")


@pytest.mark.parametrize("activation", ["relu", pytest.param("tanh", marks=pytest.mark.once)])
def test_radii_grow_and_no_attack_breaks_them(activation):
    model = dense_chain((8, 12, 12, 12, 4), activation, seed=5)
    x = np.random.default_rng(6).normal(size=(60, 8)).astype("float32")
    everywhere = lip.certify(model, x, epsilons=0.1, verbose=0, lipschitz="eclipse_diagonal")
    local = lip.certify(model, x, epsilons=0.1, verbose=0, lipschitz=lip.lmi.local_lipschitz)
    assert (local.radii >= everywhere.radii).all()
    assert np.median(local.radii) > 1.5 * np.median(everywhere.radii)
    assert local.constant == everywhere.constant
    flipped, _ = lip.certification.pgd(model, x, local.predictions, 0.999 * local.radii)
    assert not flipped.any()
    flipped, _ = lip.certification.pgd(model, x, local.predictions, 4 * local.radii)
    assert flipped.any()


@pytest.mark.once
def test_no_line_leaves_its_class_within_a_radius():
    """Inputs of two numbers: the balls are looked at in all directions."""
    model = dense_chain((2, 12, 10, 4), seed=9, scale=1.5)
    x = np.random.default_rng(1).normal(size=(80, 2)) * 2
    found = lip.certify(model, x, epsilons=0.1, verbose=0, lipschitz="local_lipschitz")
    turns = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    directions = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    chain, nearest = read_chain(model), np.full(len(x), np.inf)
    for share in np.linspace(0.05, 3, 60):
        points = x[:, None] + share * found.radii[:, None, None] * directions
        classes = value(chain, points.reshape(-1, 2)).argmax(axis=1).reshape(len(x), -1)
        flips = (classes != found.predictions[:, None]).any(axis=1) & (found.radii > 0)
        nearest = np.where(flips, np.minimum(nearest, share), nearest)
    assert nearest.min() >= 1
    assert np.median(nearest) < 2  # and the radii are of the size of what is true


def test_the_batch_does_not_matter(plain, monkeypatch):
    model, x = plain[0], plain[1][:20]
    whole = lip.certify(model, x, verbose=0, lipschitz="local_lipschitz").radii
    parts = lip.certify(model, x, verbose=0, lipschitz="local_lipschitz", batch_size=7).radii
    np.testing.assert_allclose(parts, whole, rtol=1e-9)
    monkeypatch.setattr(module, "_ENTRIES", 3 * 12**2)  # three samples at once
    parts = lip.certify(model, x, verbose=0, lipschitz="local_lipschitz").radii
    np.testing.assert_allclose(parts, whole, rtol=1e-9)


def test_images_convolutions_and_statistics():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            kl.Rescaling(2.0, -1.0),
            kl.Conv2D(3, 3, strides=2, padding="same"),
            kl.BatchNormalization(),
            kl.LeakyReLU(),
            kl.Conv2D(4, 3, activation="tanh"),
            kl.Flatten(),
            kl.Dense(5),
            kl.Softmax(),
        ]
    )
    random = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(random.uniform(0.2, 1, weight.shape) * random.choice([-1, 1], weight.shape))
    model.layers[2].moving_variance.assign(random.uniform(0.5, 2, 3))
    x = random.random((20, 6, 6, 1)).astype("float32")
    everywhere = lip.certify(model, x, verbose=0, lipschitz="eclipse_diagonal")
    local = lip.certify(model, x, verbose=0, lipschitz="local_lipschitz")
    assert (local.radii >= everywhere.radii).all() and (local.radii > 1.2 * everywhere.radii).any()
    flipped, _ = lip.certification.pgd(model, x, local.predictions, 0.999 * local.radii)
    assert not flipped.any()


@pytest.mark.once
def test_nested_models_and_shared_layers():
    """As the same layers in a row: each use has slopes of its own."""
    inner = keras.Sequential([keras.Input((6,)), kl.Dense(7, "relu")])
    shared = kl.Dense(7, "softplus")
    inputs = keras.Input((2, 3))
    x = shared(shared(inner(kl.Flatten()(inputs))))
    model = keras.Model(inputs, kl.Dense(3)(x))
    flat = keras.Sequential([keras.Input((2, 3)), kl.Flatten()])
    for activation in ("relu", "softplus", "softplus", None):
        flat.add(kl.Dense(3 if activation is None else 7, activation))
    first, second, last = inner.get_weights(), shared.get_weights(), model.layers[-1].get_weights()
    flat.set_weights([*first, *second, *second, *last])
    x = np.random.default_rng(0).normal(size=(5, 2, 3))
    constants = [lip.lmi.local_lipschitz(m, x, 0.5) for m in (model, flat)]
    np.testing.assert_allclose(*constants, rtol=1e-9)


def test_without_a_hidden_layer_it_is_the_distance():
    model = dense_chain((5, 3), seed=2)
    x = np.random.default_rng(3).normal(size=(10, 5))
    product, local = (
        lip.certify(model, x, verbose=0, lipschitz=way) for way in ("product", "local_lipschitz")
    )
    np.testing.assert_allclose(local.radii, product.radii, rtol=1e-7)


@pytest.mark.once
def test_dead_neurons_and_dead_layers():
    model = dense_chain((3, 6, 5, 3), seed=4)
    first = model.layers[0]
    first.bias.assign([-100.0, -100, 100, 1, 0, -1])  # two are off, one is on
    x = np.random.default_rng(5).normal(size=(8, 3))
    for centre, bound in zip(x, lip.lmi.local_lipschitz(model, x, 0.5)):
        assert (steepest(model, centre, 0.5) <= bound * (1 + 1e-9) + 1e-9).all()
    first.bias.assign(np.full(6, -100.0))
    assert lip.lmi.local_lipschitz(model, x, 0.5).max() < 1e-6
    certificate = lip.certify(model, x, verbose=0, lipschitz="local_lipschitz")
    flipped, _ = lip.certification.pgd(model, x, certificate.predictions, 0.99 * certificate.radii)
    assert not flipped.any()


def test_rates_are_added_to_constants():
    """Logits (relu(x), 0) at 1, margin 1: constant 1 and rate 1 leave half of the radius."""
    model = keras.Sequential([keras.Input((1,)), kl.Dense(1, "relu"), kl.Dense(2)])
    model.set_weights([np.array(w) for w in ([[1.0]], [0.0], [[1.0, 0.0]], [0.0, 0.0])])
    radii = lip.lmi.local_lipschitz.certifying.local(model)
    given = [np.ones((1, 1)), np.array([[1.0, 0.0]]), np.full((1, 2), 1e-9), np.zeros(1, int)]
    plain = radii(*given, np.full(1, 0.1))
    halved = radii(*given, np.full(1, 0.1), np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert 0.97 < plain[0] <= 1 and 0.48 < halved[0] <= 0.5
    assert radii(*given, np.full(1, 0.7))[0] >= 0.7  # what is certified stays so
    assert radii(*given, np.zeros(1))[0] == 0


def test_inputs_that_are_no_numbers_have_radius_zero(plain):
    model, x = plain
    x = x[:4].copy()
    x[1, 0], x[2, 3] = np.nan, np.inf
    found = lip.certify(model, x, verbose=0, lipschitz="local_lipschitz")
    assert (found.radii[1:3] == 0).all() and (found.predictions[1:3] == -1).all()
    assert (found.radii[[0, 3]] > 0).all()


@pytest.mark.once
def test_huge_and_tiny_weights_change_nothing_but_units():
    x = np.random.default_rng(3).normal(size=(3, 4))
    constants = []
    for power in (0, 60, -60):
        model = dense_chain((4, 6, 3), seed=1)
        for layer in model.layers:
            layer.kernel.assign(np.ldexp(to_numpy(layer.kernel), power))
        model.layers[0].bias.assign(np.ldexp(to_numpy(model.layers[0].bias), power))
        constants.append(np.ldexp(lip.lmi.local_lipschitz(model, x, 0.5), -2 * power))
    np.testing.assert_allclose(constants[1], constants[0], rtol=1e-9)
    np.testing.assert_allclose(constants[2], constants[0], rtol=1e-9)


def step_of_the_theorem(seed=0):
    random = np.random.default_rng(seed)
    w = random.normal(size=(6, 6))
    m, h = random.uniform(0.3, 0.7, 6), random.uniform(0.1, 0.3, 6)
    return w @ w.T, m, h


@pytest.mark.once
def test_a_matrix_that_is_too_small_is_rejected(monkeypatch):
    """The proof takes what the formula gives, and nothing that is smaller by a thousandth."""
    c, m, h = step_of_the_theorem()
    seen = []
    real = module._holds
    monkeypatch.setattr(module, "_holds", lambda *a: seen.append(a) or real(*a))
    q = module._activated(c, m, h, np.ones(6))
    assert q is not None
    arguments = [np.array(a) for a in seen[-1]]
    assert real(*arguments)
    largest = np.linalg.eigh(q)[1][:, -1]
    smaller = q - 1e-3 * np.trace(q) * np.outer(largest, largest)
    assert not real(smaller, *arguments[1:])
    assert not real(0.999 * q, *arguments[1:])
    low = np.diag(np.linalg.eigvalsh(c)[-1] * np.full(6, 0.9)) - c  # U - C is not positive
    assert not real(q, *arguments[1:5], low, c)
    assert not real(q * np.nan, *arguments[1:])


@pytest.mark.once
def test_every_difference_that_the_intervals_allow_is_covered():
    """d d^T <= Q for the worst d = s v, v v^T <= C, by sampling both."""
    for seed in range(10):
        c, m, h = step_of_the_theorem(seed)
        q = module._activated(c, m, h, np.ones(6))
        random = np.random.default_rng(seed)
        root = np.linalg.cholesky(c)
        y = random.normal(size=(4000, 6))
        v = y / np.linalg.norm(y, axis=1, keepdims=True) @ root.T
        d = v * (m + h * random.choice([-1, 1], v.shape))
        assert np.einsum("ni,ij,nj->n", d, np.linalg.inv(q), d).max() <= 1


@pytest.mark.once
def test_products_of_inexact_weights_are_covered():
    """W Q W^T of every W within the error."""
    random = np.random.default_rng(0)
    w, error = random.normal(size=(4, 5)), 1e-3
    root = random.normal(size=(5, 5))
    q = root @ root.T
    cover = module._image(w, error, q)
    for _ in range(200):
        off = random.normal(size=w.shape)
        moved = w + error * off / np.linalg.norm(off, 2)
        assert np.linalg.eigvalsh(cover - moved @ q @ moved.T)[0] >= 0
    assert np.linalg.eigvalsh(module._image(w, 0.0, q) - w @ q @ w.T)[0] >= -1e-12
    norms = pair_norms(module._image(w, 0.0))
    exact = np.linalg.norm(w[:, None] - w[None], axis=-1)
    assert (norms >= exact).all() and np.allclose(norms, exact, rtol=1e-6)


def test_a_chain_that_is_not_the_model_is_refused(plain, monkeypatch):
    """A bias that is read wrongly changes no global constant; here it would move the centre."""
    model, x = plain
    real = module.read_chain

    def wrong(*arguments):
        chain = real(*arguments)
        chain.layers[1].bias[0] += 1e-3
        return chain

    monkeypatch.setattr(module, "read_chain", wrong)
    with pytest.raises(ValueError, match="does not compute what the chain"):
        lip.certify(model, x, verbose=0, lipschitz="local_lipschitz")


def test_wrong_arguments(plain):
    model, x = plain
    with pytest.raises(ValueError, match="takes 8 numbers a sample"):
        lip.lmi.local_lipschitz(model, x[:, :5], 1.0)
    for radius in (-1.0, np.nan, np.inf, "1"):
        with pytest.raises(ValueError, match="radius"):
            lip.lmi.local_lipschitz(model, x, radius)


@pytest.mark.once
def test_reports_say_so(plain, tmp_path):
    model, x = plain
    certificate = lip.certify(model, x, verbose=0, lipschitz="local_lipschitz")
    assert "constants of the ball around it" in str(certificate)
    assert certificate.to_dict()["evidence"]["lipschitz_method"] == "local_lipschitz"
    bound = lip.lipschitz_bound(model, verbose=0, lipschitz="local_lipschitz")
    assert bound.constant == lip.lmi.eclipse_diagonal(model).constant


def test_numbers_of_a_prelu_stand_where_the_tensors_axes_say():
    """z_0 - z_1 = 0.5 - relu(-x_0): as many samples as entries could be taken for these."""
    activation = keras.layers.PReLU()
    activation.build((None, 4, 1))
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4),
            keras.layers.Reshape((4, 1)),
            keras.layers.Activation(activation),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    first, head = np.zeros((4, 4)), np.zeros((4, 2))
    first[0], head[2, 0], head[3, 0] = 1, 1, -1
    model.layers[0].set_weights([first, np.zeros(4)])
    activation.set_weights([np.array([1, 1, 1, 0.0]).reshape(4, 1)])
    model.layers[-1].set_weights([head, np.array([0.5, 0])])
    for samples in (1, 3, 4):
        x = np.zeros((samples, 4))
        x[:, 0] = 1
        assert (lip.lmi.local_lipschitz(model, x, 5.0)[:, 0, 1] >= 0.8).all()
        radii = lip.certify(model, x, lipschitz="local_lipschitz", verbose=0).radii
        assert ((radii > 0.9) & (radii <= 1.5)).all()


@pytest.mark.once
def test_neurons_that_no_output_sees_do_not_count():
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(2, "relu"), keras.layers.Dense(2)]
    )
    kernel, outer = np.ones((1, 2)), np.array([[1.0, 0], [0, 0]])
    model.set_weights([kernel, np.array([10.0, 0]), outer, np.zeros(2)])
    assert 1 <= lip.lmi.local_lipschitz(model, np.zeros((1, 1)), 0.5)[0, 0, 1] < 1.5


def test_a_larger_ball_in_which_something_may_overflow_takes_no_radius_away():
    kl = keras.layers
    hidden, head = kl.Dense(2, "relu"), kl.Dense(3)
    model = keras.Sequential([keras.Input((2,)), hidden, head, kl.Softmax(), kl.Softmax()])
    hidden.set_weights([np.eye(2) * 100, -np.ones(2) * 1e5])
    head.set_weights([np.ones((2, 3)) * np.array([1, -1, 0.5]), np.array([1000, 0, 0])])
    x = np.zeros((1, 2), "float32")
    methods = ("eclipse_diagonal", "local_lipschitz")
    everywhere, local = (
        lip.certify(model, x, lipschitz=m, arithmetic="float32", verbose=0).radii[0]
        for m in methods
    )
    assert local >= everywhere > 3
