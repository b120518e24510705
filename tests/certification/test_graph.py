"""The graph that certificates read: steps, order, nested models, and the hash."""

import re

import keras
import numpy as np
import pytest
from data import small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext.lipschitz.graph import trace
from keras_lipnext.twin import Float64Twin


def load(path):
    return keras.models.load_model(path, compile=False)


def chain(name="inner", factor=2.0):
    layers = [keras.Input((4,)), keras.layers.Rescaling(factor), keras.layers.Dense(4, name="d")]
    return keras.Sequential(layers, name=name)


def test_blocks_are_unrolled_into_their_parts():
    names = [step.name for step in trace(small_lipnext()).steps]
    parts = ("positional_bias", "mixing", "dense", "activation")
    blocks = [f"block_{i}/{part}" for i in (0, 1) for part in parts]
    assert names == ["centre", "patch_embedding", *blocks, "pool", "head"]


def test_every_step_follows_those_it_reads():
    inputs = keras.Input((4,))
    inner = chain()
    left, right = inner(inputs), keras.layers.ReLU()(inputs)
    outputs = keras.layers.Concatenate()([inner(right), left, right])
    graph = trace(keras.Model(inputs, outputs))
    known = {0}
    for step in graph.steps:
        assert known.issuperset(step.inputs)
        assert known.isdisjoint(step.outputs)
        known.update(step.outputs)
    assert graph.output in known
    # The nested model is used twice: its layers appear twice, under its name.
    assert [s.name for s in graph.steps].count("inner/d") == 2
    assert graph.steps[-1].inputs[2] == graph.steps[-3].inputs[0]


def test_deep_models_need_no_deep_recursion():
    inputs = keras.Input((2,))
    x = inputs
    for _ in range(300):
        x = keras.ops.negative(x)
    assert len(trace(keras.Model(inputs, x)).steps) == 300


def test_models_cut_out_of_others():
    """A model from a layer inside another: the graph begins at its own input."""
    inputs = keras.Input((4,))
    middle = keras.layers.ReLU()(inputs)
    outputs = keras.layers.Dense(3)(middle)
    tail = keras.Model(middle, outputs)
    assert [step.kind for step in trace(tail).steps] == ["Dense"]
    head = keras.Model(inputs, middle)
    assert [step.kind for step in trace(head).steps] == ["ReLU"]


def test_axes_that_keras_would_insert_are_refused():
    inner = keras.Sequential([keras.Input((4, 1)), keras.layers.Flatten()], name="inner")
    inputs = keras.Input((4,))
    with pytest.raises(
        ValueError, match=r"'inner'.*takes inputs of shape \(None, 4, 1\), and the model"
    ):
        trace(keras.Model(inputs, inner(inputs)))


def test_the_hash_follows_the_function(tmp_path):
    model = small_lipnext()
    before = trace(model).digest()
    assert before == trace(model).digest()
    assert re.fullmatch("2:[0-9a-f]{64}", before)
    # Saved and loaded, cast to another policy of computation, or frozen: the same function.
    model.save(tmp_path / "model.keras")
    assert trace(load(tmp_path / "model.keras")).digest() == before
    mixed = small_lipnext(dtype="mixed_bfloat16")
    mixed.set_weights(model.get_weights())
    assert trace(mixed).digest() == before
    model.trainable = False
    assert trace(model).digest() == before
    # One bit of one weight changes it.
    bias = model.get_layer("block_1").dense.bias
    value = to_numpy(bias).copy()
    value[3] = np.nextafter(value[3], np.float32(1))
    bias.assign(value)
    assert trace(model).digest() != before


@pytest.mark.parametrize("change", ["beta", "padding", "wiring", "constant", "class", "shared"])
def test_the_hash_sees_the_architecture(change):
    def model(change=None):
        inputs = keras.Input((4,))
        dense = keras.layers.Dense(4, kernel_initializer="ones")
        other = keras.layers.Dense(4, kernel_initializer="ones")
        slope = 0.2 if change == "beta" else 0.1
        x = keras.layers.LeakyReLU(negative_slope=slope)(dense(inputs))
        x = x * (3.0 if change == "constant" else 2.0)
        cls = keras.layers.Minimum if change == "class" else keras.layers.Maximum
        y = (other if change == "shared" else dense)(x)
        x = cls()([x, inputs if change == "wiring" else y])
        if change == "padding":
            x = keras.ops.roll(x, 1, axis=1)
        return trace(keras.Model(inputs, x)).digest()

    assert model() == model()
    assert model(change) != model()


def test_models_made_of_the_outer_models_own_tensors():
    """A nested application has values of its own, though its tensors are the outer model's."""
    inputs = keras.Input((4,))
    features = keras.layers.Dense(4, name="features")(inputs)
    extractor = keras.Model(inputs, features)
    mirrored = extractor(keras.ops.multiply(inputs, 1e-3))
    model = keras.Model(inputs, keras.layers.Add()([features, mirrored]))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(Float64Twin(model)(x), to_numpy(model(x)), rtol=1e-4, atol=1e-5)
    norm = np.linalg.norm(np.asarray(model.get_layer("features").get_weights()[0]), 2)
    assert lip.lipschitz_bound(model).body_constant == pytest.approx(1.001 * norm, rel=1e-5)


def test_the_hash_tells_outputs_of_one_step_apart():
    inputs = keras.Input((4,))
    halves = keras.ops.split(keras.layers.Dense(4)(inputs), 2, axis=1)
    digests = {trace(keras.Model(inputs, half)).digest() for half in halves}
    assert len(digests) == 2


def test_a_nested_model_changed_after_it_was_used():
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    inner.pop()
    with pytest.raises(ValueError, match=r"makes outputs of shape \(None, 4\), and the model"):
        trace(model)


def test_calls_by_keyword():
    inputs = keras.Input((3,))
    x = keras.layers.Dense(3)(inputs=inputs)
    model = keras.Model(inputs, keras.layers.Add()(inputs=[x, inputs]))
    assert lip.lipschitz_bound(model).body_constant > 1


@pytest.mark.parametrize("name", ["call", "convolution_op"])
def test_replaced_methods_are_noticed(name):
    inputs = keras.Input((4, 4, 2))
    layer = keras.layers.Conv2D(2, 1)
    model = keras.Model(inputs, layer(inputs))
    lip.lipschitz_bound(model)
    setattr(layer, name, lambda *args: 10 * args[0])
    with pytest.raises(ValueError, match=r"\(Conv2D\) cannot be certified"):
        lip.lipschitz_bound(model)


def test_a_block_whose_call_was_replaced_is_refused():
    inputs = keras.Input((4, 4, 8))
    block = lip.layers.LipNeXtBlock(1 / 8)
    model = keras.Model(inputs, block(inputs))
    block.call = lambda x: 10 * x
    with pytest.raises(ValueError, match=r"\(LipNeXtBlock\) cannot be certified"):
        lip.lipschitz_bound(model)
