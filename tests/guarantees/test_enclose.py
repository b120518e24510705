"""Intervals of outputs: ground truth, attacks, programs, mutants."""

import keras
import numpy as np
import pytest
from data import saturating

import keras_lipnext as lip
from keras_lipnext.certification import evaluation
from keras_lipnext.guarantees import enclosure as results
from keras_lipnext.guarantees.enclose import Outputs


def linear(kernel, bias, **settings):
    inputs = keras.Input((len(kernel),))
    layer = keras.layers.Dense(len(bias), **settings)
    model = keras.Model(inputs, layer(inputs))
    layer.set_weights([np.asarray(kernel, "float32"), np.asarray(bias, "float32")])
    return model


def check_linear(scale=1.0, outputs=3, epsilon=0.25):
    """Of a linear model the range is known: contained, and tight to 1e-9."""
    rng = np.random.default_rng(0)
    kernel = (scale * rng.normal(size=(8, outputs))).astype("float32").astype("longdouble")
    bias = rng.normal(size=outputs).astype("float32").astype("longdouble")
    x = rng.normal(size=(5, 8)).astype("float32")
    found = lip.enclose(linear(kernel, bias), x, epsilon, verbose=0)
    center = x.astype("longdouble") @ kernel + bias
    reach = epsilon * np.sqrt((kernel**2).sum(axis=0))
    assert (found.lower <= center - reach).all() and (center + reach <= found.upper).all()
    np.testing.assert_allclose(found.upper - found.lower, (2 * reach)[None] + 0 * center, 1e-9)
    limits = np.asarray(center).min() - 0.1 * scale, np.asarray(center).max() + 0.2 * scale
    room = np.minimum(center - limits[0], limits[1] - center)
    exact = room / np.sqrt((kernel**2).sum(axis=0))
    radii = found.radius(*limits)
    assert (radii <= exact).all() and (radii > 0).all()
    np.testing.assert_allclose(radii, exact.astype("float64"), rtol=1e-9)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_linear_model(scale, outputs):
    check_linear(scale, outputs)


def network(last):
    inputs = keras.Input((6,))
    x = lip.layers.OrthogonalDense(16)(inputs)
    x = lip.layers.MaxMin()(x)
    return keras.Model(inputs, last(x))


HEADS = {
    "orthogonal": lambda: lip.layers.OrthogonalDense(1),
    "dense": lambda: keras.layers.Dense(1),
    "normalized": lambda: lip.layers.NormalizedDense(1),
    "tanh": lambda: keras.layers.Dense(2, activation="tanh"),
    "many": lambda: keras.layers.Dense(3),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("arithmetic", ["real", "float64", "float32"])
def test_searches_stay_inside(head, arithmetic):
    """Steps along each output's gradient, up and down, to the border of the ball."""
    keras.utils.set_random_seed(0)
    model = network(HEADS[head]())
    x = np.random.default_rng(1).normal(size=(8, 6)).astype("float32")
    found = lip.enclose(model, x, 0.3, verbose=0, arithmetic=arithmetic)
    at_once = found.radius(found.lower, found.upper)
    assert (at_once <= 0.3 * (1 + 1e-6)).all() and (at_once > 0.29).all()
    twin = lip.twin.Float64Twin(model)
    for k in range(found.outputs.shape[-1]):
        for sign in (-1, 1):
            climb = lip.backend.compiled(
                lambda t, k=k, sign=sign: lip.backend.gradient(
                    lambda v: sign * twin.tensor(v)[:, k], t
                ),
                twin.variables,
            )
            delta = np.zeros_like(x, "float64")
            for _ in range(4):
                slope = twin.call(climb, x + delta)
                delta = 0.3 * slope / np.linalg.norm(slope, axis=1, keepdims=True)
                reached = twin(x + delta)
                assert (found.lower <= reached).all() and (reached <= found.upper).all()
            assert np.abs(reached - found.outputs)[:, k].max() > 0.1 * found.width[:, k].max() / 2
    own = model.predict((x + delta).astype("float32"), verbose=0)
    if arithmetic == "float32":
        assert (found.lower <= own).all() and (own <= found.upper).all()


def test_one_epsilon_a_sample_and_batches():
    model, x = network(HEADS["many"]()), np.random.default_rng(0).normal(size=(7, 6))
    epsilon = np.linspace(0, 0.6, 7)
    whole = lip.enclose(model, x, epsilon, verbose=0)
    parts = lip.enclose(model, [(x[:4], x[:4]), (x[4:], x[4:])], epsilon, verbose=0)
    np.testing.assert_allclose(whole.lower, parts.lower, rtol=1e-12)
    assert (np.diff(whole.width[:, 0]) > 0).all()
    for wrong in (epsilon[:6], np.r_[epsilon, 1]):
        with pytest.raises(ValueError, match="one a sample"):
            lip.enclose(model, x, wrong, verbose=0)


@pytest.mark.parametrize("arithmetic", ["real", "float64"])
def test_what_is_not_finite_has_no_interval(arithmetic):
    x = np.zeros((3, 6))
    x[1, 2], x[2, 0] = np.nan, np.inf
    found = lip.enclose(network(HEADS["dense"]()), x, 0.1, verbose=0, arithmetic=arithmetic)
    assert np.isfinite(found.width[0]).all()
    assert (found.lower[1:] == -np.inf).all() and (found.upper[1:] == np.inf).all()
    assert (found.radius()[1:] == 0).all() and (found.radius()[0] > 1e6).all()


@pytest.mark.parametrize("arithmetic", ["real", "float64"])
def test_what_saturates_behind_an_overflow_has_no_interval(arithmetic):
    """`certify` neither: the exact logits are 6.9e20 and 1e24, the computed ones 1e26 and 1e24."""
    model, x = saturating(), np.array([[3e155, 4e155]])
    found = lip.enclose(model, x, 0.0, verbose=0, arithmetic=arithmetic)
    assert found.lower[0, 0] == -np.inf and found.radius()[0, 0] == 0
    head = keras.layers.Dense(2)
    classifier = keras.Model(model.input, head(model.output))
    head.set_weights([np.array([[1.0, 0.0]]), np.array([0.0, 1e24])])
    assert lip.certify(classifier, x, verbose=0, arithmetic=arithmetic).radii[0] == 0


def test_radii_do_not_overflow():
    """Within 1.7e308 in each of 10,000 entries the output leaves the limit."""
    model = linear(np.full((10000, 1), 1e-10), [0.0])
    found = lip.enclose(model, np.zeros((1, 10000)), 0.0, verbose=0, arithmetic="real")
    assert found.radius(upper=1.5e302)[0, 0] <= 2.0**1000
    assert found.radius()[0, 0] == np.inf


def test_float32_programs_are_enclosed():
    """Sums in other orders, of products rounded or fused, at the inputs themselves."""
    rng = np.random.default_rng(3)
    kernel, x = (rng.normal(size=s).astype("float32") for s in ((200, 1), (50, 200)))
    model, scale = linear(kernel, [0.0]), np.float32(1e6)
    model.layers[-1].kernel.assign(kernel * scale)
    found = lip.enclose(model, x * scale, 0.0, verbose=0, arithmetic="float32")
    real = lip.enclose(model, x * scale, 0.0, verbose=0, arithmetic="real")
    outside = 0
    for order in (np.arange(200), np.arange(200)[::-1], *(rng.permutation(200) for _ in range(8))):
        total = np.zeros(50, "float32")
        for k in order:
            total = total + x[:, k] * scale * (kernel[k, 0] * scale)
        assert (found.lower[:, 0] <= total).all() and (total <= found.upper[:, 0]).all()
        outside += ((total < real.lower[:, 0]) | (real.upper[:, 0] < total)).sum()
    assert outside > 100  # what float32 does is seen


def test_float32_reaches_no_further_than_it_can():
    model = network(HEADS["dense"]())
    x = np.r_[np.zeros((1, 6)), np.full((1, 6), 2.0**57)]
    found = lip.enclose(model, x, 0.1, verbose=0, arithmetic="float32")
    assert np.isfinite(found.width[0, 0]) and found.width[1, 0] == np.inf
    assert found.radius()[0, 0] <= 2.0**28 and found.radius()[1, 0] == 0
    far = lip.enclose(model, x[:1], 2.0**29, verbose=0, arithmetic="float32")
    assert far.width[0, 0] == np.inf


def test_images_of_two_sizes_are_refused():
    inputs = keras.Input((None, None, 2))
    model = keras.Model(inputs, keras.layers.Conv2D(3, 3, padding="same")(inputs))
    with pytest.raises(ValueError, match="of one shape"):
        lip.enclose(model, iter([np.zeros((2, 4, 4, 2)), np.zeros((2, 5, 4, 2))]), 0.1, verbose=0)
    parts = [np.zeros((0, 4, 4, 2)), np.zeros((2, 4, 4, 2)), np.zeros((0, 4, 4, 2))]
    assert len(lip.enclose(model, iter(parts), 0.1, verbose=0).outputs) == 2


def test_images_as_outputs():
    inputs = keras.Input((4, 4, 2))
    model = keras.Model(inputs, keras.layers.Conv2D(3, 3, padding="same")(inputs))
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 2))
    found = lip.enclose(model, x, 0.1, verbose=0)
    assert found.lower.shape == (2, 4, 4, 3)
    assert (found.lower < found.outputs).all() and (found.outputs < found.upper).all()


def test_checks_are_those_of_certify(tmp_path):
    model, x = network(HEADS["many"]()), np.zeros((2, 6))
    with pytest.raises(ValueError, match="hash"):
        lip.enclose(model, x, 0.1, verbose=0, expected_hash="2:0")
    with pytest.raises(ValueError, match="softmax"):
        lip.enclose(network(keras.layers.Dense(3, activation="softmax")), x, 0.1, verbose=0)
    for epsilon in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="epsilon"):
            lip.enclose(model, x, epsilon, verbose=0)
    found = lip.enclose(model, x, 0.1, verbose=0)
    with pytest.raises(ValueError, match="Limits"):
        found.radius(1, 0)
    assert "every output" in str(found)
    found.to_json(tmp_path / "enclosure.json", samples=True)
    assert "per_sample" in (tmp_path / "enclosure.json").read_text()


def check_cancelling():
    """Sums 1e7 times smaller than their terms: rounding alone moves the output."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(200, 1)).astype("float32") * np.float32(1e6)
    x = rng.normal(size=(50, 200)).astype("float32") * np.float32(1e6)
    exact = x.astype("longdouble") @ kernel.astype("longdouble")
    found = lip.enclose(linear(kernel, [0.0]), x, 0.0, verbose=0, arithmetic="real")
    assert (found.lower <= exact).all() and (exact <= found.upper).all()


def test_rounding_is_included():
    check_cancelling()


def smaller_constant(monkeypatch):
    real = Outputs._bounded
    shrunk = lambda *a: (real(*a)[0], real(*a)[1] * 0.999)  # noqa: E731
    monkeypatch.setattr(Outputs, "_bounded", shrunk)


def no_rounding(monkeypatch):
    zero = lambda self, inputs, logits, *a: 0 * logits  # noqa: E731
    monkeypatch.setattr(evaluation.Evaluation, "allowances", zero)


def wrong_sign(monkeypatch):
    real = results.Enclosure.radius
    swapped = lambda self, low, high: real(self, -high, -low)  # noqa: E731
    monkeypatch.setattr(results.Enclosure, "radius", swapped)


@pytest.mark.parametrize(
    "mutant, check",
    [
        (smaller_constant, check_linear),
        (no_rounding, check_cancelling),
        (wrong_sign, check_linear),
    ],
    ids=lambda f: f.__name__,
)
def test_mutants_are_found(mutant, check, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
