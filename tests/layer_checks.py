"""What every layer of the library must do, whatever it computes: a layer is a `Row`."""

import dataclasses
import inspect
import tempfile
from collections.abc import Callable
from unittest import mock

import extended
import keras
import numpy as np
from data import called, in_one_program, to_numpy, traced
from test_layer_rules import built, check, lipschitz_bound_of, samples, whole

from keras_lipnext import backend
from keras_lipnext.manifolds import Stiefel, stiefel
from keras_lipnext.optimizers import ManifoldAdam


@dataclasses.dataclass
class Row:
    """A layer, its arguments and what is expected of it.

    Attributes:
        cls: Class of the layer.
        arguments: Keyword arguments of its constructor.
        input_shape: With the batch size.
        output_shape: With the batch size.
        nominal: The Lipschitz constant that the layer is made to have, or None.
        reached: Least share of the certified constant that the search for pairs finds.
        variant: Whether an earlier row of the class does the checks that depend on the class only.
        once: Whether rows that other backends check have its options, too, in other combinations.
        sizes: Whether the layer needs to know height and width.
        exact: The layer's formula, of (layer, x) in 80-bit NumPy, where `extended.LAYERS` has none.
    """

    cls: type
    arguments: dict
    input_shape: tuple
    output_shape: tuple
    nominal: float | None = 1.0
    reached: float = 0.9
    variant: bool = False
    once: bool = False
    sizes: bool = False
    exact: Callable | None = None

    def __str__(self):
        values = [f"{name}={value}" for name, value in self.arguments.items()]
        return "-".join([self.cls.__name__, *values, "x".join(map(str, self.input_shape[1:]))])

    def layer(self, **kwargs):
        return self.cls(**self.arguments, **kwargs)

    def parameters(self):
        """Names of the constructor's arguments, without those of every Keras layer."""
        named = inspect.signature(self.cls.__init__).parameters.values()
        return {p.name for p in named if p.kind is not p.VAR_KEYWORD} - {"self"}


def check_layer(row):
    """All checks that apply to a row."""
    for one in CHECKS:
        if applies(one, row):
            one(row)


def applies(one, row):
    """Whether a check applies to a row."""
    if one is check_data_formats:
        return "data_format" in row.parameters()
    if one is check_rule and not extended.HAS_LONG:
        return False
    if row.variant and one is check_rule:  # of images a full row has it
        return len(row.input_shape) != 4 and "data_format" in row.parameters()
    return not row.variant or one in (check_shapes, check_config, check_certificate)


def once(one, row):
    """Whether a check of a row leaves nothing to be seen by another backend.

    Where the rule is checked, and by it what a backend computes, the constant is NumPy's.
    """
    if row.once or one is check_config:
        return True
    return one is check_certificate and applies(check_rule, row)


def of_unknown_size(row):
    """The input shape without the sizes that the layer need not know."""
    axis = row.arguments.get("axis", -1) % len(row.input_shape)
    inner = [None if i != axis and not row.sizes else n for i, n in enumerate(row.input_shape)]
    return (None, *inner[1:])


def random_input(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def check_shapes(row):
    """Of a call, a symbolic one and the layer's own answer; None for what is not known."""
    x, output_shape = random_input(row.input_shape), row.output_shape
    assert tuple(row.layer().compute_output_shape(row.input_shape)) == output_shape
    axis = row.arguments.get("axis", -1) % len(x.shape)
    for unknown in ((None, *row.input_shape[1:]), of_unknown_size(row)):
        layer = row.layer()
        symbolic = layer(keras.KerasTensor(unknown)).shape
        assert tuple(layer.compute_output_shape(unknown)) == symbolic
        assert len(symbolic) == len(output_shape)
        assert symbolic[0] is None, f"batch size {symbolic[0]}, made of None"
        assert all(n in (None, size) for n, size in zip(symbolic, output_shape))
        # What does not depend on an unknown size is known.
        assert symbolic[axis if len(symbolic) == len(x.shape) else -1] is not None
        if unknown[1:] == row.input_shape[1:]:
            assert symbolic[1:] == output_shape[1:]
    if not applies(check_data_formats, row):  # which calls it, too
        assert called(layer, x).shape == output_shape


def check_config(row):
    """It has every argument with its value, and makes the same layer again."""
    layer = row.layer(name="a_name")
    config = layer.get_config()
    assert row.parameters() <= set(config), row.parameters() - set(config)
    for name, value in row.arguments.items():
        if isinstance(value, (bool, float, str)):
            stored = config[name]
            if isinstance(stored, dict):  # of an initializer, given by its name
                stored = keras.initializers.get(value).__class__.__name__
                value = config[name]["class_name"]
            assert stored == value, f"{name}={value} is {stored} in the config"
    copy = row.cls.from_config(config)
    assert copy.get_config() == config
    assert copy.name == "a_name"
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == f"keras_lipnext>{row.cls.__name__}"
    restored = keras.saving.deserialize_keras_object(serialized)
    assert restored.get_config() == config


def check_dtypes(row):
    """The outputs' and the weights' under every policy; the answers are finite."""
    policies = ("float32", "float64", "mixed_bfloat16", "mixed_float16")
    with backend.float64_scope():
        layers = [row.layer(dtype=policy) for policy in policies]
        for layer in layers:
            layer.build(row.input_shape)
        x = keras.ops.convert_to_tensor(random_input(row.input_shape, "float64"))
        answers = in_one_program(lambda x: [layer(x) for layer in layers])(x)
        for layer, outputs in zip(layers, answers):
            dtype = keras.backend.standardize_dtype(outputs.dtype)
            assert dtype == layer.compute_dtype, layer.dtype_policy.name
            assert dtype == layer.compute_output_spec(keras.KerasTensor(row.input_shape)).dtype
            for weight in layer.weights:
                assert keras.backend.standardize_dtype(weight.dtype) == layer.variable_dtype
            assert np.isfinite(to_numpy(keras.ops.cast(outputs, "float32"))).all()


def check_training_and_saving(row):
    """A compiled model trains, its kernels by any optimizer, keeps these, saves and loads."""
    inputs = keras.Input(row.input_shape[1:])
    model = keras.Model(inputs, row.layer()(inputs))
    x = random_input(row.input_shape)
    target = random_input((row.input_shape[0], *model.output_shape[1:]), seed=1)
    trained = model.trainable_weights
    optimizers = [ManifoldAdam(1e-2)] if trained else []
    if any(weight.constraint for weight in trained):
        optimizers.insert(0, keras.optimizers.SGD(0.1))
    for optimizer in optimizers:
        # XLA takes a second of each on TensorFlow.
        jit = {"torch": False, "jax": True}.get(
            keras.backend.backend(), optimizer is optimizers[-1]
        )
        model.compile(optimizer, loss="mse", jit_compile=jit)
        optimizer.build(trained)  # else TensorFlow traces, and XLA compiles, two steps
        initial = model.get_weights()
        for _ in range(3):
            model.train_on_batch(x, target)
        for weight, old, new in zip(model.weights, initial, model.get_weights()):
            moved = np.abs(old - new).max() > 0
            assert moved or not weight.trainable, f"{weight.path} did not train"
            if isinstance(weight.constraint, Stiefel):
                assert float(stiefel.defect(weight)) < 2e-6
    before = called(model, x)
    assert np.isfinite(before).all()
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.models.load_model(f"{folder}/model.keras")
    for stored, weight in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(stored, weight)
    np.testing.assert_array_equal(called(loaded, x), before)
    np.testing.assert_allclose(model.predict_on_batch(x), before, rtol=1e-5, atol=1e-6)


def check_batch_independence(row):
    layer = row.layer()
    layer.build(row.input_shape)
    x = random_input((5, *row.input_shape[1:]))
    whole_batch = called(layer, x)
    for start, stop in ((0, 1), (1, 5)):
        part = called(layer, x[start:stop])
        np.testing.assert_allclose(part, whole_batch[start:stop], rtol=1e-5, atol=1e-6)


def check_certificate(row):
    """What pairs are stretched <= the certified constant <= the nominal one, up to rounding."""
    model = built(row.layer, row.input_shape[1:])
    constant = lipschitz_bound_of(whole(model))
    with backend.float64_scope():
        layer = row.layer(dtype="float64")
        layer.build(row.input_shape)
        layer.set_weights([np.asarray(w, "float64") for w in model.get_weights()])
        stretch = largest_stretch(layer, row.input_shape[1:])
    assert stretch <= constant * (1 + 1e-9), f"{stretch} > {constant}, which is certified"
    assert stretch >= row.reached * constant, f"{stretch} of {constant}: the search is too weak"
    if row.nominal is not None:
        assert constant <= row.nominal * (1 + 2e-6), f"{constant} > {row.nominal}, the nominal one"


def check_rule(row):
    """The rule's constant, offset and rounding against the layer's formula in 80-bit NumPy."""
    formulas = {row.cls.__name__: row.exact} if row.exact else {}
    shape = row.input_shape[1:]
    with mock.patch.dict(extended.LAYERS, formulas):
        *_, near = check(built(row.layer, shape), samples(shape))
    assert near, "float32 answers are not those of the formula"


def largest_stretch(function, shape, pairs=16, ascents=6):
    """The largest ||f(x + h u) - f(x)|| / ||h u|| found: far and near pairs, then by ascent.

    The steps u <- J^T J u climb to the largest singular value of the Jacobian.
    """

    def row_norms(x):
        return keras.ops.sqrt(keras.ops.sum(keras.ops.reshape(x, (pairs, -1)) ** 2, axis=1))

    @traced
    def step(x, u, h):
        stretched = (function(x + h * u) - function(x)) / h
        climbed = backend.gradient(lambda t: function(t) * stretched, x)
        return row_norms(stretched) / row_norms(u), climbed

    shape = (pairs, *shape)
    x, u = (random_input(shape, "float64", seed=seed) for seed in (1, 2))
    x *= np.resize([1e-3, 1.0, 1.0, 30.0], (pairs, *(1 for _ in shape[1:])))
    largest = 0.0
    for h in (3.0,) + (1e-4,) * ascents:
        stretches, climbed = step(*map(keras.ops.convert_to_tensor, (x, u, np.float64(h))))
        largest = max(largest, float(to_numpy(stretches).max()))
        size = np.abs(to_numpy(climbed)).reshape(pairs, -1).max(axis=1)
        u = to_numpy(climbed) / np.maximum(size, 1e-30).reshape(pairs, *(1 for _ in shape[1:]))
    return largest


def check_data_formats(row):
    """Channels first and last compute the same function with the same weights.

    The latter is built without sizes that it need not know.
    """
    last, first = (row.layer(data_format=f"channels_{end}") for end in ("last", "first"))
    x = random_input(row.input_shape)
    last.build(of_unknown_size(row))
    transposed = np.moveaxis(x, -1, 1)
    first.build(transposed.shape)
    first.set_weights(
        [np.reshape(w, target.shape) for w, target in zip(last.get_weights(), first.weights)]
    )
    expected, actual = called(last, x), called(first, transposed)
    assert expected.shape == row.output_shape
    if actual.ndim == x.ndim:
        actual = np.moveaxis(actual, 1, -1)
        assert tuple(first.compute_output_shape(transposed.shape))[1] == expected.shape[-1]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


CHECKS = (
    check_shapes,
    check_config,
    check_dtypes,
    check_training_and_saving,
    check_batch_independence,
    check_certificate,
    check_rule,
    check_data_formats,
)
