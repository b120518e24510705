"""What every layer of the library must do, whatever it computes."""

import tempfile

import keras
import numpy as np
from data import to_numpy

from keras_lipnext import backend
from keras_lipnext.manifolds import Stiefel, stiefel


def check_layer(cls, arguments, input_shape, output_shape, lipschitz=True):
    """Runs all checks on `cls(**arguments)`; the shapes include a batch size."""
    check_shapes(cls, arguments, input_shape, output_shape)
    check_config(cls, arguments, input_shape)
    check_dtypes(cls, arguments, input_shape)
    check_training_and_saving(cls, arguments, input_shape)
    check_batch_independence(cls, arguments, input_shape)
    if lipschitz:
        check_non_expansive(cls, arguments, input_shape)


def check_variant(cls, arguments, input_shape, output_shape):
    """The checks that depend on the arguments, for further arguments of a layer."""
    check_shapes(cls, arguments, input_shape, output_shape)
    check_config(cls, arguments, input_shape)
    check_non_expansive(cls, arguments, input_shape)


def random_input(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def check_shapes(cls, arguments, input_shape, output_shape):
    layer = cls(**arguments)
    outputs = layer(random_input(input_shape))
    assert tuple(outputs.shape) == output_shape
    assert tuple(layer.compute_output_shape(input_shape)) == output_shape
    unknown = (None, *input_shape[1:])
    symbolic = cls(**arguments)(keras.Input(batch_shape=unknown))
    assert symbolic.shape == (None, *output_shape[1:])
    assert tuple(cls(**arguments).compute_output_shape(unknown)) == (None, *output_shape[1:])


def check_config(cls, arguments, input_shape):
    layer = cls(**arguments, name="a_name")
    copy = cls.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert copy.name == "a_name"
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == f"keras_lipnext>{cls.__name__}"
    restored = keras.saving.deserialize_keras_object(serialized)
    assert restored.get_config() == layer.get_config()
    for name, value in arguments.items():
        assert name in layer.get_config(), f"{name}={value} is not in the config"


def check_dtypes(cls, arguments, input_shape):
    for policy in ("float32", "float64", "mixed_bfloat16", "mixed_float16"):
        with backend.float64_scope():
            layer = cls(**arguments, dtype=policy)
            outputs = layer(keras.ops.convert_to_tensor(random_input(input_shape, "float64")))
            dtype = keras.backend.standardize_dtype(outputs.dtype)
            assert dtype == layer.compute_dtype, policy
            assert dtype == layer.compute_output_spec(keras.KerasTensor(input_shape)).dtype
            for weight in layer.weights:
                assert keras.backend.standardize_dtype(weight.dtype) == layer.variable_dtype
            assert np.isfinite(to_numpy(keras.ops.cast(outputs, "float32"))).all()


def check_training_and_saving(cls, arguments, input_shape):
    """A compiled model trains by an ordinary optimizer, keeps its kernels, saves and loads."""
    inputs = keras.Input(input_shape[1:])
    model = keras.Model(inputs, cls(**arguments)(inputs))
    x = random_input(input_shape)
    target = random_input((input_shape[0], *model.output_shape[1:]), seed=1)
    model.compile(keras.optimizers.Adam(1e-2), loss="mse")
    if model.trainable_weights:
        initial = model.get_weights()
        model.fit(x, target, epochs=3, verbose=0)
        for old, new in zip(initial, model.get_weights()):
            assert np.abs(old - new).max() > 0
    for weight in model.trainable_weights:
        if isinstance(weight.constraint, Stiefel):
            assert float(stiefel.defect(weight)) < 2e-6
    before = to_numpy(model(x))
    assert np.isfinite(before).all()
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.models.load_model(f"{folder}/model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)), before)
    np.testing.assert_allclose(model.predict(x, verbose=0), before, rtol=1e-5, atol=1e-6)


def check_batch_independence(cls, arguments, input_shape):
    layer = cls(**arguments)
    x = random_input((5, *input_shape[1:]))
    whole = to_numpy(layer(x))
    for start, stop in ((0, 1), (1, 5)):
        part = to_numpy(layer(x[start:stop]))
        np.testing.assert_allclose(part, whole[start:stop], rtol=1e-5, atol=1e-6)


def check_non_expansive(cls, arguments, input_shape):
    """||f(x) - f(y)|| <= ||x - y|| in float64, for far and near pairs."""
    with backend.float64_scope():
        layer = cls(**arguments, dtype="float64")
        x = random_input((64, *input_shape[1:]), "float64")
        for scale in (1.0, 1e-3):
            step = scale * random_input(x.shape, "float64", seed=2)
            outputs = to_numpy(layer(keras.ops.convert_to_tensor(np.concatenate([x, x + step]))))
            change = (outputs[64:] - outputs[:64]).reshape(64, -1)
            ratios = np.linalg.norm(change, axis=1) / np.linalg.norm(step.reshape(64, -1), axis=1)
            assert ratios.max() <= 1 + 1e-9


def check_data_formats(cls, arguments, input_shape, image_output=True):
    """Channels first and last compute the same function with the same weights."""
    last = cls(**arguments, data_format="channels_last")
    first = cls(**arguments, data_format="channels_first")
    x = random_input(input_shape)
    expected = to_numpy(last(x))
    transposed = np.transpose(x, (0, 3, 1, 2))
    first.build(transposed.shape)
    first.set_weights(
        [np.reshape(w, target.shape) for w, target in zip(last.get_weights(), first.weights)]
    )
    actual = to_numpy(first(transposed))
    if image_output:
        actual = np.transpose(actual, (0, 2, 3, 1))
        assert tuple(first.compute_output_shape(transposed.shape))[1] == expected.shape[-1]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
