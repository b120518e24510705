from fractions import Fraction
from unittest import mock

import extended
import keras
import numpy as np
import pytest
from data import small_lipnext

import keras_lipnext as lip
from keras_lipnext.certification import lipschitz_bound, lipschitz_rule
from keras_lipnext.lipschitz import model as lipschitz
from keras_lipnext.lipschitz.model import nominal_constant, read
from keras_lipnext.lipschitz.rules.base import _LAYERS, Context, UnmeasuredContext
from keras_lipnext.lipschitz.rules.layers import normalised_norm
from keras_lipnext.norms.convolutions import convolution_norm_bound

PARTS = ("positional_bias", "mixing", "dense", "activation")


def functional(*layers, shape=(6, 6, 8)):
    inputs = keras.Input(shape)
    x = inputs
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def test_an_orthogonal_network_has_constant_one():
    bound = small_lipnext().lipschitz_bound()
    assert 1 <= bound.body_constant < 1 + 1e-4
    assert bound.head == "head"
    blocks = [f"block_{i}/{p}" for i in (0, 1) for p in PARTS]
    assert [c.name for c in bound.layers] == ["centre", "patch_embedding", *blocks, "pool"]
    assert all(c.proven for c in bound.layers)
    assert bound.declared == ()
    assert "block_1/mixing" in str(bound)
    assert f"from the input to head 'head': {bound.body_constant:.12g}" in str(bound)
    assert f"of the model, input to output: {bound.constant:.12g}" in str(bound)


def test_products_of_known_norms():
    first, second = keras.layers.Dense(5, activation="relu"), keras.layers.Dense(4)
    model = functional(
        keras.layers.Rescaling(-2.5), first, second, keras.layers.Activation("sigmoid"), shape=(3,)
    )
    bound = lipschitz_bound(model)
    norms = [np.linalg.norm(np.asarray(d.get_weights()[0], "float64"), 2) for d in (first, second)]
    assert bound.constant == pytest.approx(2.5 * norms[0] * norms[1] * 0.25, rel=1e-8)
    assert bound.head is None


def test_the_product_is_rounded_up():
    for scale in (0.1, 0.7, 1.3, 1.9):
        model = functional(*(keras.layers.Rescaling(scale) for _ in range(12)))
        assert Fraction(lipschitz_bound(model).constant) >= Fraction(scale) ** 12


def test_a_linear_last_layer_is_the_head():
    for head in (keras.layers.Dense(3), lip.layers.OrthogonalDense(3)):
        bound = lipschitz_bound(functional(lip.layers.OrthogonalDense(7), head, shape=(6,)))
        assert bound.head == head.name
        assert bound.body_constant < 1 + 1e-5


def test_the_constant_is_that_of_the_whole_model():
    """A critic's last layer counts: 100 ||(1, ..., 1)|| for eight inputs."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.set_weights([np.full((8, 1), 100.0), np.zeros(1)])
    bound = lipschitz_bound(model)
    assert 100 * 8**0.5 <= bound.constant < 100 * 8**0.5 * (1 + 1e-8)
    assert bound.body_constant == 1
    assert bound.head == model.layers[-1].name
    certificate = lip.certify(functional(keras.layers.Dense(3), shape=(8,)), np.ones((2, 8)))
    assert certificate.constant == certificate.evidence.bound.constant != certificate.body_constant


@pytest.mark.parametrize("units, end", [(1, None), (3, None), (3, "softmax"), (3, "log_softmax")])
def test_no_pair_of_inputs_is_stretched_by_more_than_the_constant(units, end):
    model = functional(keras.layers.Dense(6, "tanh"), keras.layers.Dense(units, end), shape=(4,))
    model.layers[-1].kernel.assign(3 * model.layers[-1].get_weights()[0])
    bound = lipschitz_bound(model)
    norms = [np.linalg.norm(np.asarray(w, "float64"), 2) for w in model.get_weights()[::2]]
    ending = units**0.5 if end == "log_softmax" else 1.0
    assert bound.constant == pytest.approx(norms[0] * norms[1] * ending, rel=1e-8)
    assert bound.body_constant == pytest.approx(norms[0], rel=1e-8)
    x = np.random.default_rng(0).normal(size=(2, 400, 4))
    (a, b), steps = (model.predict(z, verbose=0) for z in x), np.linalg.norm(x[0] - x[1], axis=1)
    assert (np.linalg.norm(a - b, axis=1) <= bound.constant * steps).all()


@pytest.mark.parametrize("kind", ["activation", "layer", "operation"])
def test_log_softmax_stretches(kind):
    """Beside a large logit it maps e_1 to -(0, 1, 1, 1): the logits' own constant is too small."""
    inputs = keras.Input((4,))
    head = keras.layers.Dense(4, activation="log_softmax" if kind == "activation" else None)
    ends = {"layer": keras.layers.Activation("log_softmax"), "operation": keras.ops.log_softmax}
    model = keras.Model(inputs, ends.get(kind, lambda x: x)(head(inputs)))
    model.set_weights([np.eye(4), np.zeros(4)])
    x = np.array([[50.0, 0, 0, 0], [51.0, 0, 0, 0]])
    a, b = model.predict(x, verbose=0)
    assert np.linalg.norm(a - b) == pytest.approx(3**0.5, rel=1e-5)
    assert lipschitz_bound(model).constant == pytest.approx(2)


def test_a_head_of_zeros_makes_the_model_constant():
    model = functional(lip.layers.OrthogonalDense(4), keras.layers.Dense(3), shape=(4,))
    model.layers[-1].kernel.assign(np.zeros((4, 3)))
    bound = lipschitz_bound(model)
    assert bound.constant == 0
    assert bound.body_constant == pytest.approx(1, abs=1e-5)


def test_shift_mixing_with_a_drifted_kernel():
    """||I + R_s^T (S - I) R_s|| <= sqrt(1 + 4 s^2 (s^2 - 1)), checked on the assembled operator."""
    layer = lip.layers.ShiftMixing(1 / 4)
    model = functional(layer, shape=(3, 2, 4))
    rng = np.random.default_rng(0)
    for size in (0, 1e-3, 0.05):
        kernel = np.asarray(layer.get_weights()[0])
        kernel = kernel + size * rng.normal(size=kernel.shape)
        layer.set_weights([kernel.astype("float32")])
        operator = np.asarray(model.predict(np.eye(24).reshape(24, 3, 2, 4), verbose=0))
        norm = np.linalg.norm(operator.reshape(24, 24).astype("float64"), 2)
        bound = lipschitz_bound(model).constant
        assert norm <= bound * (1 + 1e-6)  # the operator was assembled in float32
        assert bound < norm + 4 * size * 10 + 1e-5


@pytest.mark.parametrize("padding", ["circular", "zero"])
def test_full_shift_mixing_with_a_drifted_kernel(padding):
    """||R^T S R|| <= ||R||^2, checked on the assembled operator."""
    layer = lip.layers.FullShiftMixing(1 / 4, padding)
    model = functional(layer, shape=(3, 2, 4))
    rng = np.random.default_rng(0)
    for size in (0, 1e-3, 0.05, 1.0):
        kernel = np.asarray(layer.get_weights()[0])
        kernel = (kernel + size * rng.normal(size=kernel.shape)).astype("float32")
        layer.set_weights([kernel])
        operator = np.asarray(model.predict(np.eye(24).reshape(24, 3, 2, 4), verbose=0))
        norm = np.linalg.norm(operator.reshape(24, 24).astype("float64"), 2)
        bound = lipschitz_bound(model).constant
        assert norm <= bound * (1 + 1e-6)  # the operator was assembled in float32
        assert bound == pytest.approx(np.linalg.norm(kernel.astype("float64"), 2) ** 2, rel=1e-8)


def test_nested_models():
    inner = keras.Sequential(
        [keras.Input((6,)), lip.layers.OrthogonalDense(6), keras.layers.Dense(6, name="inside")]
    )
    model = functional(inner, lip.layers.MaxMin(), lip.layers.NormalizedDense(3), shape=(6,))
    bound = lipschitz_bound(model)
    norm = np.linalg.norm(np.asarray(inner.layers[-1].get_weights()[0], "float64"), 2)
    assert bound.body_constant == pytest.approx(norm, rel=1e-4)
    assert "inside" in [c.name.rpartition("/")[2] for c in bound.layers]


def test_a_layer_used_twice_counts_twice():
    layer = keras.layers.Dense(4)
    model = functional(layer, layer, keras.layers.ReLU(), shape=(4,))
    norm = np.linalg.norm(np.asarray(layer.get_weights()[0], "float64"), 2)
    assert lipschitz_bound(model).constant == pytest.approx(norm**2, rel=1e-8)


class Doubling(keras.layers.Layer):
    def call(self, inputs):
        return 2 * inputs


class Scaling(keras.layers.Layer):
    def call(self, inputs):
        return 3 * inputs


class LoudDense(lip.layers.OrthogonalDense):
    def call(self, inputs):
        return 10 * super().call(inputs)


def test_unknown_layers_are_named():
    with pytest.raises(ValueError, match=r"Layer 'loud' \(Doubling\) cannot be certified"):
        lipschitz_bound(functional(Doubling(name="loud")))


def test_subclasses_do_not_inherit_a_rule():
    with pytest.raises(ValueError, match=r"\(LoudDense\).*lipschitz_rule"):
        lipschitz_bound(functional(LoudDense(8)))


def test_registered_rules_are_used_and_named_as_declared():
    lipschitz_rule(Scaling)(lambda layer, context: 3.0)
    bound = lipschitz_bound(functional(Scaling(name="loud")))
    assert bound.constant == pytest.approx(3)
    assert bound.declared == ("loud",)
    assert "declared, not proven" in str(bound)


class Declared(keras.layers.Layer):
    """A layer that states its own constant."""

    def __init__(self, factor, lipschitz_constant, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.lipschitz_constant = lipschitz_constant

    def call(self, inputs):
        return self.factor * inputs + 1.0

    def get_config(self):
        own = {"factor": self.factor, "lipschitz_constant": self.lipschitz_constant}
        return {**super().get_config(), **own}


def test_a_layer_may_declare_its_constant():
    model = functional(Declared(2.0, 2), lip.layers.NormalizedDense(3), shape=(4,))
    bound = lipschitz_bound(model)
    assert bound.body_constant == pytest.approx(2)
    assert len(bound.declared) == 1
    certificate = lip.certify(model, np.random.default_rng(0).normal(size=(5, 4)), verbose=0)
    assert "declared, not proven" in str(certificate)
    assert 0 < certificate.error_allowances.max() < 1e-11


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_a_declared_constant_that_cannot_be(bad):
    with pytest.raises(ValueError, match=r"its Lipschitz constant was stated as"):
        lipschitz_bound(functional(Declared(1.0, bad)))


def test_replacing_a_library_rule_is_a_declaration():
    """Who overrides a proof has made a claim."""
    rule = _LAYERS[keras.layers.Dense]
    try:
        lipschitz_rule(keras.layers.Dense)(lambda layer, context: 0.1)
        bound = lipschitz_bound(functional(keras.layers.Dense(3), keras.layers.Dense(3)))
        assert len(bound.declared) == 2
    finally:
        _LAYERS[keras.layers.Dense] = rule


def test_a_rule_of_ones_own_leaves_what_the_library_knows_of_the_class_beside_it(monkeypatch):
    """That Rescaling takes whole numbers, and which numbers it computes with."""
    for cls, constant in ((keras.layers.Rescaling, 1 / 255), (keras.layers.Dropout, 1.0)):
        monkeypatch.setitem(_LAYERS, cls, _LAYERS[cls])
        lipschitz_rule(cls)(lambda layer, context, constant=constant: constant)
    inputs = keras.Input((6,), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(keras.layers.Dropout(0.5)(inputs))
    model = keras.Model(inputs, lip.layers.NormalizedDense(3)(x))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6)).astype("uint8")
    certificate = lip.certify(model, pixels, epsilons=(1.0,), verbose=0)
    assert certificate.body_constant == pytest.approx(1 / 255)
    assert len(lipschitz_bound(model).declared) == 2


def test_a_layer_whose_call_was_replaced_is_refused():
    layer = keras.layers.ReLU()
    model = functional(layer)
    layer.call = lambda inputs: 5 * inputs
    with pytest.raises(ValueError, match=r"\(ReLU\) cannot be certified"):
        lipschitz_bound(model)


def loud_model(base):
    class Loud(base):
        def call(self, inputs, training=None, mask=None):
            return super().call(10 * inputs, training=training)

    return Loud


def test_models_that_override_call_are_refused():
    inputs = keras.Input((6,))
    outputs = lip.layers.NormalizedDense(3)(lip.layers.OrthogonalDense(6)(inputs))
    with pytest.raises(ValueError, match=r"\(Loud\) overrides `call`"):
        lipschitz_bound(loud_model(keras.Model)(inputs, outputs))
    with pytest.raises(ValueError, match=r"\(Loud\) overrides `call`"):
        loud_model(lip.CertifiableModel)(inputs, outputs)
    nested = loud_model(keras.Sequential)([keras.Input((6,)), lip.layers.MaxMin()])
    with pytest.raises(ValueError, match=r"\(Loud\) overrides `call`"):
        lipschitz_bound(functional(nested, shape=(6,)))


def test_call_arguments_are_refused():
    inputs = keras.Input((6,))
    x = keras.layers.Dropout(0.5)(inputs, training=True)
    with pytest.raises(ValueError, match=r"\(Dropout\).*called with \['training=True'\]"):
        lipschitz_bound(keras.Model(inputs, x))
    x = keras.layers.Dropout(0.5)(inputs, training=False)
    assert lipschitz_bound(keras.Model(inputs, x)).constant == pytest.approx(1)


def test_models_without_a_graph():
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match=r"no graph to certify.*keras.Model\(i, model.call\(i\)\)"):
        lipschitz_bound(Subclassed())
    with pytest.raises(ValueError, match=r"has no graph to certify.*Sequential model on data"):
        lipschitz_bound(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match=r"Expected a keras.Model. Received"):
        lipschitz_bound("model.keras")
    inputs = keras.Input((6,))
    several = keras.Model(inputs, [keras.layers.ReLU()(inputs), inputs])
    with pytest.raises(ValueError, match=r"1 inputs and 2 outputs.*model.inputs, model.outputs\[0"):
        lipschitz_bound(several)


def test_the_ways_out_that_errors_name_are_ways_out():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.head = lip.layers.OrthogonalDense(6), lip.layers.NormalizedDense(3)

        def call(self, inputs):
            return self.head(self.first(inputs))

    model, i = Subclassed(), keras.Input((6,))
    functional = keras.Model(i, model.call(i))
    constant = lipschitz_bound(functional).constant
    assert functional.layers[-1] is model.head
    model = keras.Model(i, {"a": model.call(i), "b": keras.layers.Rescaling(3.0)(i)})
    found = [lipschitz_bound(keras.Model(model.inputs, o)).constant for o in model.outputs]
    assert found == pytest.approx([constant, 3], rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_name_their_layer(bad):
    model = small_lipnext()
    kernel = model.get_layer("block_1").dense.kernel
    value = np.asarray(model.get_layer("block_1").dense.get_weights()[0]).copy()
    value[0, 0] = bad
    kernel.assign(value)
    with pytest.raises(ValueError, match=r"'block_1/dense' \(OrthogonalDense\) .*NaN or infinite"):
        lipschitz_bound(model)


def test_residual_branches_add_up():
    """L2 norms along the graph: 1 + |W| for x + W x, and the product of two such blocks."""
    inputs = keras.Input((4,))
    x, norms = inputs, []
    for _ in range(2):
        dense = keras.layers.Dense(4)
        x = keras.layers.Add()([x, dense(x)])
        norms.append(np.linalg.norm(np.asarray(dense.get_weights()[0], "float64"), 2))
    bound = lipschitz_bound(keras.Model(inputs, keras.layers.ReLU()(x)))
    assert bound.constant == pytest.approx((1 + norms[0]) * (1 + norms[1]), rel=1e-8)
    add = bound.layers[1]
    assert add.reads == ("input", bound.layers[0].name)
    assert add.total == pytest.approx(1 + norms[0], rel=1e-8)


def test_branches_that_do_not_reach_the_output_do_not_count():
    inputs = keras.Input((4,))
    unused = keras.layers.Rescaling(50.0)(inputs)
    unread = keras.layers.LayerNormalization()(unused)
    assert unread is not None
    model = keras.Model(inputs, keras.layers.ReLU()(inputs))
    assert lipschitz_bound(model).constant == pytest.approx(1)


@pytest.mark.parametrize("kind", ["activation", "layer", "Activation", "operation", "log"])
def test_softmax_at_the_end_is_left_out_and_said(kind):
    inputs = keras.Input((4,))
    x = lip.layers.OrthogonalDense(4)(inputs)
    logits = keras.layers.Dense(3, activation="softmax" if kind == "activation" else None)
    outputs = logits(x)
    ends = {
        "layer": keras.layers.Softmax(),
        "Activation": keras.layers.Activation("softmax"),
        "operation": keras.ops.softmax,
        "log": keras.ops.log_softmax,
    }
    model = keras.Model(inputs, ends[kind](outputs) if kind in ends else outputs)
    bound = lipschitz_bound(model)
    assert bound.head == logits.name
    assert bound.body_constant < 1 + 1e-5
    assert "ends in softmax" in bound.notes[0]
    data = np.random.default_rng(0).normal(size=(9, 4))
    certificate = lip.certify(model, data, verbose=0, arithmetic="real")
    plain = keras.Model(inputs, keras.layers.Dense(3, name="plain")(x))
    plain.layers[-1].set_weights(logits.get_weights())
    expected = lip.certify(plain, data, verbose=0, arithmetic="real")
    np.testing.assert_array_equal(certificate.predictions, expected.predictions)
    np.testing.assert_allclose(certificate.radii, expected.radii, rtol=1e-12)
    np.testing.assert_array_equal(
        certificate.predictions, np.argmax(keras.ops.convert_to_numpy(model(data)), axis=1)
    )


def test_certifiable_models_end_in_logits():
    inputs = keras.Input((4,))
    outputs = keras.layers.Softmax()(lip.layers.NormalizedDense(3)(inputs))
    with pytest.raises(ValueError, match="Softmax belongs into the loss"):
        lip.CertifiableModel(inputs, outputs)


def test_all_zero_weights():
    layer = keras.layers.Dense(4, kernel_initializer="zeros")
    with pytest.raises(ValueError, match=r"\(Dense\) has an all-zero kernel"):
        lipschitz_bound(functional(layer, keras.layers.ReLU(), shape=(4,)))


def test_constants_beyond_floating_point():
    layers = [keras.layers.Rescaling(1e200), keras.layers.Rescaling(1e200)]
    with pytest.raises(ValueError, match=r"no radius follows"):
        lipschitz_bound(functional(*layers))
    with pytest.raises(ValueError, match=r"no radius follows"):
        lipschitz_bound(functional(keras.layers.Rescaling(0.0)))


def test_nominal_constants():
    assert nominal_constant(read(small_lipnext())) == pytest.approx(1, rel=1e-12)
    free = functional(keras.layers.Dense(5), lip.layers.NormalizedDense(3), shape=(6,))
    with pytest.raises(ValueError, match=r"\(Dense\).*free to grow in training"):
        nominal_constant(read(free))


def zero_branches():
    dense = keras.layers.Dense(4, kernel_initializer="zeros")
    normalised = keras.Sequential(
        [keras.layers.Dense(4), keras.layers.BatchNormalization(gamma_initializer="zeros")]
    )
    convolution = keras.Sequential(
        [
            keras.layers.Reshape((4, 1)),
            keras.layers.Conv1D(1, 3, padding="same", kernel_initializer="zeros"),
            keras.layers.Flatten(),
            keras.layers.ReLU(),
            keras.layers.Dense(4),
        ]
    )
    return {
        "Dense": lambda x: keras.layers.Add()([x, dense(x)]),
        "bias": lambda x: keras.layers.Add()([dense(x), keras.layers.Activation("tanh")(x)]),
        "subtracted": lambda x: x - keras.layers.Rescaling(0.0, 3.0)(x),
        "factor": lambda x: x + 0.0 * keras.layers.Dense(4)(x),
        "BatchNormalization": lambda x: keras.layers.Add()([x, normalised(x)]),
        "Conv1D": lambda x: keras.layers.Add()([convolution(x), x]),
    }


@pytest.mark.parametrize("name", zero_branches())
def test_a_constant_branch_adds_nothing(name):
    """The constant is that of the other branch; the radii are those of the model without it."""
    inputs = keras.Input((4,))
    head = keras.layers.Dense(3)
    model = keras.Model(inputs, head(zero_branches()[name](inputs)))
    bound = lipschitz_bound(model)
    assert bound.body_constant == pytest.approx(1, rel=1e-12)
    assert 0 in [layer.total for layer in bound.layers]
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    certificate = lip.certify(model, x, verbose=0)
    if name in ("Dense", "factor", "Conv1D", "BatchNormalization"):
        expected = lip.certify(keras.Model(inputs, head(inputs)), x, verbose=0)
        np.testing.assert_allclose(certificate.radii, expected.radii, rtol=1e-9)
    assert (certificate.radii > 0).all()


def test_constant_as_a_whole():
    """Wherever the zero stands, and also where two constant branches meet."""
    inputs = keras.Input((4,))

    def zero(x):
        return keras.layers.Dense(4, kernel_initializer="zeros", bias_initializer="ones")(x)

    for make in (
        lambda x: keras.layers.Dense(4)(zero(x)),
        lambda x: keras.layers.Add()([zero(x), zero(keras.layers.ReLU()(x))]),
        lambda x: 0.0 * keras.layers.Dense(4)(x),
    ):
        model = keras.Model(inputs, keras.layers.ReLU()(make(inputs)))
        with pytest.raises(ValueError, match="all-zero kernel or factor: the model is constant"):
            lipschitz_bound(model)


def test_a_product_that_underflows_is_not_zero():
    """Tiny numbers are refused, not taken for a constant branch."""
    inputs = keras.Input((4,))
    x = Declared(1.0, 2.0**-1000)(Declared(1.0, 2.0**-400)(inputs))
    model = keras.Model(inputs, keras.layers.Add()([inputs, x]))
    with pytest.raises(ValueError, match="no radius follows"):
        lipschitz_bound(model)


def randomised(model, seed=0, spread=1.0):
    """Weights and statistics that are nothing special, factors of either sign among them."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = np.asarray(keras.ops.convert_to_numpy(weight))
        if "variance" in weight.name:
            value = rng.uniform(0.1, 0.1 + 4 * spread, value.shape)
        else:
            value = rng.normal(size=value.shape)
        weight.assign(value.astype("float32"))
    return model


def operator_norm(model):
    """Norm of the linear part of an affine model, from its answers in float64."""
    shape = model.input_shape[1:]
    count = int(np.prod(shape))
    data = np.concatenate([np.zeros((1, *shape)), np.eye(count).reshape(count, *shape)])
    values = extended.evaluate(read(model), data)[read(model).graph.output]
    values = np.asarray(values, "float64").reshape(count + 1, -1)
    return np.linalg.norm(values[1:] - values[0], 2)


LINEAR = {
    "Dense": (lambda: keras.layers.Dense(6), (5,), -1),
    "Dense without bias": (lambda: keras.layers.Dense(6, use_bias=False), (5,), -1),
    "Dense along images": (lambda: keras.layers.Dense(6), (2, 3, 5), -1),
    "OrthogonalDense": (lambda: lip.layers.OrthogonalDense(6, axis=1), (5, 3), 1),
    "Conv1D": (lambda: keras.layers.Conv1D(4, 3, padding="causal"), (4, 3), -1),
    "Conv2D": (lambda: keras.layers.Conv2D(4, 3, strides=2, padding="same"), (4, 3, 2), -1),
    "groups": (lambda: keras.layers.Conv2D(6, 2, groups=2), (3, 3, 4), -1),
    "depthwise": (
        lambda: keras.layers.DepthwiseConv2D(2, depth_multiplier=2, padding="same"),
        (3, 2, 3),
        -1,
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_batch_normalisation_is_bounded_together_with_the_linear_layer_in_front(name):
    make, shape, axis = LINEAR[name]
    for seed in range(3):
        inputs = keras.Input(shape)
        linear = make()
        normalisation = keras.layers.BatchNormalization(axis=axis)
        model = randomised(keras.Model(inputs, normalisation(linear(inputs))), seed)
        bound = lipschitz_bound(model)
        truth = operator_norm(model)
        assert truth * (1 - 1e-13) <= bound.body_constant <= truth * (1 + 1e-8)
        first, second = bound.layers
        assert second.joined == first.name
        assert bound.body_constant < 0.999 * first.constant * second.constant
        assert f"bounded together with {first.name}" in str(bound)


def test_a_transposed_convolution_and_the_normalisation_behind_it():
    for padding in ("same", "valid"):
        inputs = keras.Input((4, 3, 2))
        linear = keras.layers.Conv2DTranspose(4, 3, strides=2, padding=padding)
        model = keras.Model(inputs, keras.layers.BatchNormalization()(linear(inputs)))
        bound = lipschitz_bound(randomised(model))
        assert operator_norm(model) * (1 - 1e-13) <= bound.body_constant
        assert bound.layers[1].joined
        assert bound.body_constant < 0.99 * bound.layers[0].constant * bound.layers[1].constant


def test_five_pairs_gain_much():
    inputs = keras.Input((16,))
    x = inputs
    for _ in range(5):
        x = keras.layers.Dense(16)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    bound = lipschitz_bound(randomised(keras.Model(inputs, x)))
    product = np.prod([layer.constant for layer in bound.layers])
    assert bound.body_constant < product / 1.9


@pytest.mark.parametrize("kind", ["activation", "axis", "between", "declared"])
def test_what_is_no_linear_layer_alone_is_not_bounded_together(kind):
    inputs = keras.Input((4, 4))
    x = keras.layers.Dense(4, activation="relu" if kind == "activation" else None)(inputs)
    if kind == "between":
        x = keras.layers.Reshape((4, 4))(x)
    x = keras.layers.BatchNormalization(axis=1 if kind == "axis" else -1)(x)
    model = randomised(keras.Model(inputs, x))
    rule = _LAYERS[keras.layers.Dense]
    try:
        if kind == "declared":
            lipschitz_rule(keras.layers.Dense)(lambda layer, context: 5.0)
        bound = lipschitz_bound(model)
    finally:
        _LAYERS[keras.layers.Dense] = rule
    assert not any(layer.joined for layer in bound.layers)
    product = np.prod([layer.constant for layer in bound.layers])
    assert bound.body_constant == pytest.approx(product, rel=1e-12)


def test_a_linear_layer_that_others_read_keeps_its_own_tight_constant():
    inputs = keras.Input((40, 40, 2))
    linear = keras.layers.Conv2D(2, 3, padding="same")
    x = linear(inputs)
    y = keras.layers.BatchNormalization()(x)
    bound = lipschitz_bound(randomised(keras.Model(inputs, keras.layers.Add()([x, y]))))
    own = convolution_norm_bound(np.asarray(keras.ops.convert_to_numpy(linear.kernel)))
    assert bound.layers[0].constant == pytest.approx(own, rel=1e-12)
    assert bound.layers[1].joined
    # Read by the normalisation alone, it may be coarse: the whole does not depend on it.
    other = keras.Model(inputs, keras.layers.BatchNormalization()(linear(inputs)))
    bound = lipschitz_bound(randomised(other, 1))
    own = convolution_norm_bound(np.asarray(keras.ops.convert_to_numpy(linear.kernel)))
    assert own * (1 - 1e-3) <= bound.layers[0].constant <= 1.26 * own


def test_a_normalisation_of_factors_that_are_alike():
    """Then the linear layer's own norm follows from that of both: never below the true one."""
    inputs = keras.Input((5,))
    linear, normalisation = keras.layers.Dense(6), keras.layers.BatchNormalization()
    model = randomised(keras.Model(inputs, normalisation(linear(inputs))))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        normalisation.gamma.assign(rng.uniform(0.9, 1.1, 6) * rng.choice([-3, 3], 6))
        normalisation.moving_variance.assign(np.ones(6))
        bound = lipschitz_bound(model)
        truth = np.linalg.norm(np.asarray(linear.get_weights()[0], "float64"), 2)
        assert truth * (1 - 1e-13) <= bound.layers[0].constant <= 1.26 * truth
        assert operator_norm(model) * (1 - 1e-13) <= bound.body_constant


def test_the_rounding_of_the_scaled_kernel_is_covered():
    """One entry: its scaled magnitude is the norm, an exact number that is known."""
    inputs = keras.Input((1,))
    linear, normalisation = keras.layers.Dense(1), keras.layers.BatchNormalization()
    model = keras.Model(inputs, normalisation(linear(inputs)))
    below = 0
    for seed in range(20):
        randomised(model, seed)
        with mock.patch.object(Context, "norm", lambda self, kernel: float(abs(kernel[0, 0]))):
            (first, second) = read(model).body.steps
            found, own = normalised_norm(Context(first), Context(second))
        values = [float(v[0]) for v in normalisation.get_weights()]
        factor, variance = values[0], values[3]
        weight = float(linear.get_weights()[0][0, 0])
        total = Fraction(variance) + Fraction(normalisation.epsilon)
        exact = Fraction(factor) ** 2 * Fraction(weight) ** 2
        assert Fraction(found) ** 2 * total >= exact
        assert Fraction(own) >= abs(Fraction(weight))
        rounded = abs(weight * (factor / np.sqrt(np.float64(variance + normalisation.epsilon))))
        below += Fraction(float(rounded)) ** 2 * total < exact
    assert below  # without a cover it would be too small


def test_certificates_use_what_is_bounded_together():
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(8)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.ReLU()(x)))
    randomised(model)
    bound = lipschitz_bound(model)
    data = np.random.default_rng(0).normal(size=(9, 6)).astype("float32")
    certificate = lip.certify(model, data, verbose=0)
    assert certificate.body_constant == bound.body_constant
    assert certificate.evidence.bound.layers[1].joined == bound.layers[0].name
    assert "batch normalisation bounded together" in str(certificate)
    written = certificate.to_dict()["evidence"]["layers"]
    assert written[1]["bounded_together_with"] == bound.layers[0].name
    assert 0 < certificate.error_allowances.max() < 1e-11


def test_the_rounding_of_every_entry_may_add_up():
    """Entries of either sign: their errors, 4.5 u each, may act as the matrix of magnitudes."""
    hadamard = np.ones((1, 1))
    for _ in range(6):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    inputs = keras.Input((64,))
    linear, normalisation = keras.layers.Dense(64), keras.layers.BatchNormalization()
    model = keras.Model(inputs, normalisation(linear(inputs)))
    linear.kernel.assign(hadamard)
    (first, second) = read(model).body.steps
    with mock.patch.object(Context, "norm", lambda self, kernel: np.linalg.norm(kernel, 2)):
        found, _ = normalised_norm(Context(first), Context(second))
    factor = 1 / np.sqrt(1 + normalisation.epsilon)
    assert found >= 8 * factor + 4.5 * 2.0**-53 * 64 * factor
    assert found <= 8 * factor * (1 + 1e-12)


def test_progress_is_shown_of_what_takes_long(capsys):
    model = functional(keras.layers.Dense(3), keras.layers.ReLU(), shape=(4,))
    for verbose, patience, shown in ((0, 0, False), ("auto", 60, False), ("auto", 0, True)):
        with mock.patch.object(lipschitz, "_PATIENCE", patience):
            lipschitz_bound(model, verbose=verbose)
        assert ("layer" in capsys.readouterr().out) == shown
    lipschitz_bound(model, verbose=1)
    assert "2/2" in capsys.readouterr().out


def test_what_is_refused_is_refused_before_norms_are_measured():
    """A layer without a rule, a rule that refuses, at the very end of the model."""
    for last in (keras.layers.LayerNormalization(), keras.layers.ReLU(threshold=1.0)):
        model = functional(keras.layers.Dense(3), last, shape=(4,))
        with (
            mock.patch.object(Context, "norm", side_effect=AssertionError("measured")) as norm,
            mock.patch.object(UnmeasuredContext, "norm", return_value=1.0),
            pytest.raises(ValueError, match="cannot be certified"),
        ):
            lipschitz_bound(model)
        assert not norm.called
