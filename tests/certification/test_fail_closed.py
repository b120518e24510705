"""Where nothing can be promised, nothing is: radius 0, or an error that says what to do."""

import itertools

import keras
import numpy as np
import pytest
from data import dense_model, small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.norms.roundoff import gamma

X = np.random.default_rng(0).normal(size=(6, 6))


def head_only(kernel, bias):
    inputs = keras.Input((len(kernel),))
    model = keras.Model(inputs, lip.layers.NormalizedDense(len(bias))(inputs))
    model.set_weights([np.asarray(kernel, "float32"), np.asarray(bias, "float32")])
    return model


def test_a_tie_has_radius_zero():
    certificate = lip.certify(head_only(np.eye(3), np.zeros(3)), [[1.0, 1.0, 0.0]], verbose=0)
    assert certificate.radii[0] == 0


def test_a_margin_below_the_rounding_has_radius_zero():
    """The computed logits differ, but no one can say that the exact ones do."""
    model = head_only(np.eye(3), np.full(3, 2.0**20))
    x = np.array([[2.0**-31, 0.0, 0.0], [2.0**-20, 0.0, 0.0]])
    certificate = lip.certify(model, x, verbose=0)
    assert certificate.radii[0] == 0
    assert certificate.radii[1] > 0


@pytest.mark.parametrize("bias", [np.nan, np.inf, -np.inf, 3e38])
def test_logits_that_are_not_finite_have_radius_zero(bias):
    model = dense_model()
    value = to_numpy(model.head.bias).copy()
    value[1] = bias
    model.head.bias.assign(value)
    certificate = lip.certify(model, X, np.zeros(6, int), verbose=0)
    if np.isfinite(bias):
        # An enormous bias is legal: its rounding leaves nothing of the others' margins.
        assert (certificate.predictions == 1).all()
        assert np.isfinite(certificate.radii).all()
    else:
        assert (certificate.radii == 0).all()
        assert (certificate.predictions == -1).all()
        assert certificate.clean_accuracy == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e308])
def test_inputs_without_a_norm_have_radius_zero(bad):
    x = X.copy()
    x[2, 3] = bad
    certificate = lip.certify(dense_model(), x, verbose=0)
    assert certificate.radii[2] == 0
    assert (np.delete(certificate.radii, 2) > 0).all()


def test_biases_that_are_not_finite_raise_where_they_are_inside():
    model = dense_model()
    model.layers[1].bias.assign(np.full(6, np.nan))
    with pytest.raises(ValueError, match=r"\(OrthogonalDense\) has weights that are NaN"):
        lip.certify(model, X, verbose=0)


@pytest.mark.parametrize(
    "value, message", [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (0.0, "all-zero")]
)
@pytest.mark.parametrize(
    "part, mixing",
    [("positional_bias", "reduced"), ("mixing", "reduced"), ("mixing", "full"), ("dense", "full")],
)
def test_weights_that_cannot_be(value, message, part, mixing):
    model = small_lipnext(mixing=mixing)
    layer = getattr(model.get_layer("block_1"), part)
    layer.weights[0].assign(np.full(layer.weights[0].shape, value))
    data = np.zeros((2, 8, 8, 1))
    if value == 0 and part == "positional_bias":
        assert lip.certify(model, data, verbose=0).radii.shape == (2,)
        return
    with pytest.raises(ValueError, match=rf"'block_1/{part}'.*{message}"):
        lip.certify(model, data, verbose=0)


def test_sums_of_sums_are_refused():
    """XLA merges them, also where a mean follows, in an order of its own."""
    inputs = keras.Input((2, 3, 4))
    ops, data = keras.ops, np.ones((1, 2, 3, 4))
    x = ops.transpose(ops.sum(inputs, axis=1), (0, 2, 1))
    pooled = keras.layers.GlobalAveragePooling1D()
    running = ops.cumsum(inputs, axis=1)[:, -1]
    for outputs in (ops.sum(x, axis=2), ops.mean(2 * x, axis=2), pooled(x), ops.sum(running, 1)):
        with pytest.raises(ValueError, match=r"adds up what .* added up.*over all axes at once"):
            lip.certify(keras.Model(inputs, outputs), data, verbose=0)
    at_once, between = ops.sum(inputs, axis=(1, 2)), ops.sum(ops.relu(x), axis=2)
    of_one = ops.sum(ops.sum(inputs[:, :1], axis=1), axis=1)
    for outputs in (at_once, between, of_one):
        assert lip.certify(keras.Model(inputs, outputs), data, verbose=0).radii.shape == (1,)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="releases of jaxlib")
@pytest.mark.parametrize("version", ["0.8.0", "0.8.1", "0.10.1", "0.10.2"])
def test_a_compiler_known_to_be_wrong(version, monkeypatch):
    jaxlib = pytest.importorskip("jaxlib")
    model = dense_model()
    monkeypatch.setattr(jaxlib, "__version__", version)
    inputs = keras.Input((6,))
    sums = keras.Model(inputs, lip.layers.SDPDense(6)(inputs))
    for refused in (lip.certify, lambda *_, **__: lip.lipschitz_bound(sums)):
        with pytest.raises(RuntimeError, match=rf"jaxlib {version} .*wrong numbers.*!=0\.10\.2"):
            refused(model, X, verbose=0)
    monkeypatch.setattr(backend.precision, "on_cpu", lambda: False)  # it is one of CPUs
    backend.check_compiler()


def test_a_head_of_zeros_certifies_nothing():
    certificate = lip.certify(head_only(np.zeros((3, 2)), [1.0, 0.0]), np.ones((2, 3)), verbose=0)
    assert (certificate.radii == 0).all()


def test_sums_too_long_for_float64_are_refused():
    with pytest.raises(ValueError, match="cannot be bounded usefully"):
        gamma(2.0**53)


@pytest.mark.parametrize("scale", [0.0, 1e-310, 1e200])
def test_constants_that_no_radius_follows_from(scale):
    inputs = keras.Input((3,))
    scaled = keras.layers.Rescaling(scale)(keras.layers.Rescaling(max(scale, 1.0))(inputs))
    model = keras.Model(inputs, lip.layers.NormalizedDense(2)(scaled))
    with pytest.raises(ValueError, match=r"no radius follows"):
        lip.certify(model, np.ones((1, 3)), verbose=0)


def test_an_unknown_layer_is_named_with_the_ways_out():
    inputs = keras.Input((6,))
    x = keras.layers.LayerNormalization(name="norm")(inputs)
    model = keras.Model(inputs, lip.layers.NormalizedDense(3)(x))
    with pytest.raises(ValueError, match=r"'norm' \(LayerNormalization\).*lipschitz_rule.*attr"):
        lip.certify(model, X, verbose=0)


def test_inputs_of_another_shape():
    with pytest.raises(ValueError, match=r"inputs of shape \(None, 6\). Received: a batch of"):
        lip.certify(dense_model(), X[:, :5], verbose=0)


def test_a_model_of_another_hash():
    model = dense_model()
    right = lip.certify(model, X, verbose=0).evidence.weights_hash
    assert lip.certify(model, X, verbose=0, expected_hash=right).radii.max() > 0
    with pytest.raises(ValueError, match=rf"The model's hash is {right}, not the 00ff expected"):
        lip.certify(model, X, verbose=0, expected_hash="00ff")


# Layers that cannot be evaluated in float64: their rules say why, as in `lipschitz_bound`.


def lambda_activation(model, layer):
    layer.activation = lambda x: x * 2


def quantized(mode):
    return lambda model, layer: model.quantize(mode)


def lora(model, layer):
    layer.enable_lora(2)


UNFIT = {
    "lambda": (lambda_activation, "no Lipschitz constant is known for its activation '<lambda>'"),
    "int8": (quantized("int8"), r"it is quantized \(int8\)"),
    "int4": (quantized("int4"), r"it is quantized \(int4\)"),
    "float8": (quantized("float8"), r"it is quantized \(float8\)"),
    "lora": (lora, "it holds a LoRA beside its kernel"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, place",
    [
        *itertools.product(("lambda", "float8", "lora"), (0, 1)),
        ("int8", 0),
        ("int4", 1),
        pytest.param("int8", 1, marks=pytest.mark.once),
        pytest.param("int4", 0, marks=pytest.mark.once),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_layers_changed_after_building_are_refused_by_their_rules(name, place):
    change, reason = UNFIT[name]
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6), keras.layers.Dense(4)])
    change(model, model.layers[place])
    with pytest.raises(ValueError, match=rf"\(Dense\) cannot be certified: {reason}"):
        lip.certify(model, X, verbose=0)


def test_a_lambda_in_a_model_of_unknown_size_is_refused_by_its_rule():
    inputs = keras.Input((None, None, 1))
    x = keras.layers.Conv2D(3, 3, activation=lambda t: 2 * t)(inputs)
    model = keras.Model(inputs, keras.layers.GlobalMaxPooling2D()(x))
    with pytest.raises(ValueError, match=r"known for its activation '<lambda>'"):
        lip.certify(model, np.zeros((2, 4, 4, 1)), verbose=0)


class Unsaved(keras.layers.Layer):
    """Its configuration does not give its argument."""

    lipschitz_constant = 1.0

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, inputs):
        return inputs

    def get_config(self):
        return {"name": self.name}


def test_a_layer_without_a_configuration_is_named():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3)(Unsaved(2.0, name="mine")(inputs)))
    with pytest.raises(ValueError, match=r"'mine' \(Unsaved\) cannot be built in float64"):
        lip.certify(model, X, verbose=0)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("before", [True, False])
def test_a_bias_switched_after_building(place, before):
    model = keras.Sequential([keras.Input((6,)), *(dense(6, before) for _ in range(2))])
    model.layers[place].use_bias = not before
    with pytest.raises(ValueError, match=r"\(Dense\) was changed after it was built: it holds"):
        lip.certify(model, X, verbose=0)


def dense(units, use_bias):
    return keras.layers.Dense(units, use_bias=use_bias)


def test_a_model_changed_while_it_is_certified():
    model = dense_model()

    def batches():
        yield X
        model.layers[1].bias.assign(np.ones(6))
        yield X

    with pytest.raises(ValueError, match="changed while it was certified"):
        lip.certify(model, batches(), verbose=0)


@pytest.mark.parametrize("given", [lambda t: t, lambda t: [t], lambda t: {t.name: t}])
def test_one_input_and_one_output_by_name(given):
    model = dense_model()
    named = keras.Model(given(model.inputs[0]), {"logits": model.outputs[0]})
    expected = lip.certify(model, X, verbose=0).radii
    np.testing.assert_array_equal(lip.certify(named, X, verbose=0).radii, expected)
