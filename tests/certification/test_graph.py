"""The graph that certificates read: steps, order, nested models, and the hash."""

import keras
import numpy as np
import pytest
from data import small_lipnext, to_numpy

from keras_lipnext.certification.graph import trace


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
    with pytest.raises(ValueError, match=r"'inner'.*takes inputs of shape \(None, 4, 1\) and is"):
        trace(keras.Model(inputs, inner(inputs)))


def test_the_hash_follows_the_function(tmp_path):
    model = small_lipnext()
    before = trace(model).digest()
    assert before == trace(model).digest()
    assert len(before) == 64
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
