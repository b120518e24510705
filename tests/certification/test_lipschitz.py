from fractions import Fraction

import keras
import numpy as np
import pytest
from data import small_lipnext

import keras_lipnext as lip
from keras_lipnext.certification import lipschitz_bound, lipschitz_rule
from keras_lipnext.certification.lipschitz import layer_chain, nominal_constant


def functional(*layers, shape=(6, 6, 8)):
    inputs = keras.Input(shape)
    x = inputs
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def test_an_orthogonal_network_has_constant_one():
    bound = small_lipnext().lipschitz_bound()
    assert 1 <= bound.constant < 1 + 1e-4
    assert bound.head.name == "head"
    names = [name for name, _, _ in bound.constants]
    assert names == ["image", "centre", "patch_embedding", "block_0", "block_1", "pool"]
    assert "block_1" in str(bound)
    assert "head: head" in str(bound)


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
        assert bound.head is head
        assert bound.constant < 1 + 1e-5


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


def test_nested_models():
    inner = keras.Sequential(
        [keras.Input((6,)), lip.layers.OrthogonalDense(6), keras.layers.Dense(6, name="inside")]
    )
    model = functional(inner, lip.layers.MaxMin(), lip.layers.NormalizedDense(3), shape=(6,))
    bound = lipschitz_bound(model)
    norm = np.linalg.norm(np.asarray(inner.layers[-1].get_weights()[0], "float64"), 2)
    assert bound.constant == pytest.approx(norm, rel=1e-4)
    assert "inside" in [name for name, _, _ in bound.constants]


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


def test_registered_rules_are_used():
    lipschitz_rule(Scaling)(lambda layer, norm: 3.0)
    assert lipschitz_bound(functional(Scaling())).constant == pytest.approx(3)


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


@pytest.mark.parametrize(
    "layer, reason",
    [
        (keras.layers.Dense(3, activation="softmax"), r"activation 'softmax'"),
        (keras.layers.Dense(3, activation="gelu"), r"activation 'gelu'"),
        (keras.layers.Activation(lambda x: 5 * x), r"no Lipschitz constant is known for its act"),
        (keras.layers.ReLU(threshold=0.5), r"jumps at its threshold 0.5"),
        (keras.layers.Rescaling([1.0] * 8), r"its scale is not one number"),
        (keras.layers.LayerNormalization(), r"\(LayerNormalization\)"),
        (keras.layers.MaxPooling2D(3, 1), r"\(MaxPooling2D\)"),
        (keras.layers.BatchNormalization(), r"\(BatchNormalization\)"),
    ],
)
def test_refusals(layer, reason):
    with pytest.raises(ValueError, match=reason):
        lipschitz_bound(functional(layer))


def test_operations_and_merges_are_refused():
    inputs = keras.Input((6,))
    with pytest.raises(ValueError, match=r"it is an operation, not a layer"):
        lipschitz_bound(keras.Model(inputs, inputs / 255.0))
    with pytest.raises(ValueError, match=r"\(Add\).*combines several tensors"):
        lipschitz_bound(keras.Model(inputs, keras.layers.Add()([inputs, inputs])))


def test_models_without_a_graph():
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match=r"has no graph to certify.*functional model"):
        lipschitz_bound(Subclassed())
    with pytest.raises(ValueError, match=r"has no graph to certify.*Sequential model on data"):
        lipschitz_bound(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match=r"Expected a keras.Model. Received"):
        lipschitz_bound("model.keras")
    inputs = keras.Input((6,))
    with pytest.raises(ValueError, match=r"1 inputs and 2 outputs"):
        lipschitz_bound(keras.Model(inputs, [keras.layers.ReLU()(inputs), inputs]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_name_their_layer(bad):
    model = small_lipnext()
    kernel = model.get_layer("block_1").dense.kernel
    value = np.asarray(model.get_layer("block_1").dense.get_weights()[0]).copy()
    value[0, 0] = bad
    kernel.assign(value)
    with pytest.raises(ValueError, match=r"'dense' \(OrthogonalDense\): .*NaN or infinite"):
        lipschitz_bound(model)


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
    assert nominal_constant(small_lipnext()) == pytest.approx(1, rel=1e-12)
    free = functional(keras.layers.Dense(5), lip.layers.NormalizedDense(3), shape=(6,))
    with pytest.raises(ValueError, match=r"\(Dense\).*free to grow in training"):
        nominal_constant(free)


def test_the_chain_lists_what_a_sample_passes():
    assert [type(layer).__name__ for layer in layer_chain(small_lipnext())] == [
        "InputLayer",
        "Rescaling",
        "PatchEmbedding",
        "LipNeXtBlock",
        "LipNeXtBlock",
        "L2Pool",
        "NormalizedDense",
    ]
