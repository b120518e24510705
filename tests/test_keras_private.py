"""What `backend/keras_private.py` relies on in Keras, each name by a test of its own."""

import inspect
import json
import pathlib
import types

import keras
import numpy as np
import pytest
from data import to_numpy

from keras_lipnext.backend import float64_scope, keras_private


@pytest.fixture
def model():
    inputs = keras.Input((3,), name="x")
    x = keras.ops.relu(keras.layers.Dense(2, name="dense")(inputs))
    return keras.Model({"x": inputs}, x)


def fitted(callbacks=(), epochs=3):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    begun = []
    seen = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    x = np.ones((4, 2), "float32")
    model.fit(x, x[:, :1], epochs=epochs, verbose=0, callbacks=[*callbacks, seen])
    return begun


def test_is_graph(model):
    class Halved(keras.Model):
        def call(self, *args, **kwargs):
            return 0.5 * super().call(*args, **kwargs)

    class Called(keras.Sequential):
        def __call__(self, x, **kwargs):
            return super().__call__(2.0 * x, **kwargs)

    assert keras_private.is_graph(model)
    assert keras_private.is_graph(keras.Sequential([keras.Input((3,)), model]))
    assert not keras_private.is_graph(Halved(model.inputs, model.outputs))
    assert not keras_private.is_graph(Called([keras.Input((3,)), keras.layers.Dense(1)]))
    model.call = lambda x: x
    assert not keras_private.is_graph(model)


def test_node_of(model):
    node = keras_private.node_of(model.outputs[0])
    assert type(node.operation).__name__ == "Relu" and not node.is_input
    (read,) = node.input_tensors
    before = keras_private.node_of(read)
    assert before.operation is model.get_layer("dense")
    assert before.arguments.args == (model.inputs[0],) and not before.arguments.kwargs
    assert before.output_tensors[0] is read
    assert keras_private.node_of(model.inputs[0]).is_input
    # A layer that is called twice has a node for each call.
    again = model.get_layer("dense")(model.inputs[0])
    assert keras_private.node_of(again) is not before


def test_input_structure(model):
    assert keras_private.input_structure(model) == {"x": model.inputs[0]}
    assert keras_private.input_structure(keras.Sequential([keras.Input((3,))])) is None


def test_whose_layers_and_operations(model):
    class Dense(keras.layers.Dense):
        pass

    class Relu(type(keras_private.node_of(model.outputs[0]).operation)):
        pass

    inputs = keras.Input((3,))
    for x in (keras.ops.tanh(inputs), inputs + 1, inputs[:, 1:], keras.activations.relu(inputs)):
        assert keras_private.is_keras_operation(keras_private.node_of(x).operation)
    assert not keras_private.is_keras_operation(Relu())
    assert keras_private.is_keras_layer(keras.layers.Dense(1))
    assert not keras_private.is_keras_layer(Dense(1))


def test_layers_within(model):
    outer = keras.layers.TimeDistributed(keras.Sequential([keras.Input((3,)), model]))
    within = keras_private.layers_within(outer)
    assert within[0] is outer and model in within and model.get_layer("dense") in within


def test_build_attributes():
    layers = [keras.layers.Normalization() for _ in range(2)]
    for layer, batch in zip(layers, (None, 5)):
        layer.build((batch, 2))
    (name,) = keras_private.BUILD_ATTRIBUTES
    assert [vars(layer)[name] for layer in layers] == [(None, 2), (5, 2)]
    assert layers[0].get_config().keys() == layers[1].get_config().keys()


def test_held_value_and_hold():
    variable = keras.Variable(np.arange(3.0), dtype="float32")
    assert variable.value is keras_private.held_value(variable) or np.array_equal(
        to_numpy(keras_private.held_value(variable)), [0, 1, 2]
    )
    held = keras_private.held_value(variable)
    keras_private.hold(variable, held * 2)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable.value), [0, 2, 4])
    keras_private.hold(variable, held)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable.value), [0, 1, 2])


def test_scope_value():
    variable, other = keras.Variable(1.0), keras.Variable(2.0)
    assert not keras_private.in_scope() and keras_private.scope_value(variable) is None
    with keras.StatelessScope(state_mapping=[(variable, keras.ops.ones(()) * 5)]):
        assert keras_private.in_scope()
        assert float(keras_private.scope_value(variable)) == 5
        assert keras_private.scope_value(other) is None


def test_layout_of():
    variable = keras.Variable(1.0)
    named = hasattr(variable, "_layout")
    assert named or (keras.version() < "3.15" and keras.backend.backend() != "jax")
    assert keras_private.layout_of(variable) is None
    assert keras_private.layout_of(keras.ops.ones(())) is None
    variable._layout = "laid out"  # as Keras 3.14 says it
    assert keras_private.layout_of(variable) == "laid out"
    variable._layout = types.SimpleNamespace(backend_layout="laid out")
    assert keras_private.layout_of(variable) == "laid out"
    del variable._layout
    assert keras_private.layout_of(variable) is None


def test_promotion_table():
    becomes = dict(keras_private.promotion_table())["float64"]
    # Keras looks results up in it: that is what `float64_scope` changes, for one thread.
    assert keras.backend.result_type("float64", "float64") == becomes
    assert becomes == ("float64" if keras.backend.backend() == "tensorflow" else "float32")
    with float64_scope():
        assert keras.backend.result_type("float64", "float64") == "float64"


def test_set_promotion_table():
    class Counting(dict):
        asked = 0

        def get(self, *args):
            self.asked += 1
            return super().get(*args)

        def __getitem__(self, key):
            self.asked += 1
            return super().__getitem__(key)

    before = keras_private.promotion_table()
    counting = Counting(before)
    keras_private.set_promotion_table(counting)
    try:
        keras.backend.result_type("float64", "float32")
    finally:
        keras_private.set_promotion_table(before)
    assert counting.asked > 0 or keras.backend.backend() == "tensorflow"


@pytest.mark.parametrize("name", keras_private.OPTIMIZER_HOOKS)
def test_optimizer_hooks_have_these_arguments(name):
    method = getattr(keras.optimizers.Optimizer, name)
    arguments = tuple(inspect.signature(method).parameters)[1:]
    assert arguments == keras_private.OPTIMIZER_HOOKS[name]


def test_optimizer_hooks_are_called():
    called = []

    class Noted(keras.optimizers.SGD):
        def _backend_apply_gradients(self, grads, trainable_variables):
            called.append("apply")
            super()._backend_apply_gradients(grads, trainable_variables)
            trainable_variables[:] = trainable_variables[1:]

        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            called.append("update")
            assert len(grads) == len(trainable_variables) == 2
            super()._backend_update_step(grads, trainable_variables, learning_rate)

        def _apply_weight_decay(self, variables):
            called.append("decay")
            super()._apply_weight_decay(variables)

        def _use_weight_decay(self, variable):
            called.append("use")
            return super()._use_weight_decay(variable)

    class Seven(keras.constraints.Constraint):
        def __call__(self, value):
            return value * 0 + 7

    variables = [keras.Variable(np.ones(2, "float32")) for _ in range(2)]
    for variable in variables:
        variable.constraint = Seven()
    optimizer = Noted(0.5, weight_decay=0.1)
    optimizer.build(variables)
    gradients = [keras.ops.ones((2,))] * 2
    optimizer.apply(gradients, variables)
    assert {"apply", "update", "decay", "use"} <= {*called}
    assert called.index("apply") < called.index("decay") < called.index("update")
    # Only what is left in the list is projected by its constraint.
    np.testing.assert_allclose(to_numpy(variables[0]), 0.45, rtol=1e-5)
    np.testing.assert_array_equal(to_numpy(variables[1]), 7)


def test_variables_of_an_optimizer():
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
    variables = [keras.Variable(np.ones(2, "float32")) for _ in range(3)]
    optimizer.build(variables)
    for index, variable in enumerate(variables):
        assert keras_private.variable_index(optimizer, variable) == index
    keys = {keras_private.variable_key(optimizer, variable) for variable in variables}
    assert len(keys) == 3
    for _ in range(3):
        optimizer.apply([keras.ops.ones((2,))] * 3, variables)
    assert int(keras_private.batches_seen(optimizer)) == 3
    assert int(optimizer.iterations) == 1


def test_initial_epoch():
    class Later(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            assert keras_private.initial_epoch(self.model) == 0
            keras_private.set_initial_epoch(self.model, 2)
            assert keras_private.initial_epoch(self.model) == 2

    epochs = fitted([Later()])
    assert epochs == [2]


def test_backup_files(tmp_path):
    options = {"delete_checkpoint": False, "double_checkpoint": True}
    backup = keras.callbacks.BackupAndRestore(tmp_path, **options)
    fitted([backup])
    (weights, metadata), before = keras_private.backup_files(backup)
    for path in (weights, metadata, *before):
        assert str(path).startswith(str(tmp_path))
    assert read(metadata)["epoch"] == 3
    assert read(before[1])["epoch"] == 2


def read(path):
    return json.loads(pathlib.Path(path).read_text())


def test_seed_state():
    generator = keras.random.SeedGenerator(3)
    assert generator.state.name == keras_private.SEED_STATE


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's trainer")
def test_make_state():
    """No variable is left for the first step to make, and no batch is taken."""
    import tensorflow as tf

    taken = []

    def batches():
        for index in range(3):
            taken.append(index)
            yield np.ones((4, 2), "float32"), np.zeros(4, "int32")

    spec = (tf.TensorSpec((None, 2), tf.float32), tf.TensorSpec((None,), tf.int32))
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    data = data.apply(tf.data.experimental.assert_cardinality(3))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made = []

    class Seen(keras.Sequential):
        def _maybe_symbolic_build(self, iterator=None, data_batch=None):
            keras_private.make_state(self, iterator)
            made.append((self.optimizer.built, len(self.metrics_variables), list(taken)))

    seen = Seen([keras.Input((2,)), keras.layers.Dense(3)])
    seen.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"])
    seen.fit(data, shuffle=False, verbose=0)
    assert made == [(True, 4, [])]  # a total and a count of the loss and of the accuracy
    assert taken == [0, 1, 2]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's trainer")
@pytest.mark.parametrize("training", ["fit", "train_on_batch"])
def test_a_step_is_traced_once(training):
    from data import small_lipnext

    traces = []
    model = small_lipnext()
    step = model.train_step
    model.train_step = lambda data: traces.append(1) or step(data)
    x, y = np.zeros((8, 8, 8, 1), "float32"), np.arange(8)
    if training == "fit":
        model.fit(x, y, batch_size=4, verbose=0)
    else:
        model.train_on_batch(x, y)
    assert len(traces) == 1
