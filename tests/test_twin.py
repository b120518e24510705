import concurrent.futures
import contextlib
import threading

import keras
import numpy as np
import pytest
from data import dense_model, small_lipnext, to_numpy
from keras.src.backend.common import dtypes

import keras_lipnext as lip
from keras_lipnext import backend, twin
from keras_lipnext.lipschitz.rules import base as rules
from keras_lipnext.twin import Float64Twin


def numpy_lipnext(model, x):
    """The whole network in NumPy float64, from the stored weights."""
    blocks = [layer for layer in model.layers if isinstance(layer, lip.layers.LipNeXtBlock)]
    p = model.get_layer("patch_embedding").patch_size
    b, h, w, c = x.shape
    z = x - 0.5
    z = z.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    z = z.reshape(b, h // p, w // p, p * p * c)
    z = z @ np.asarray(model.get_layer("patch_embedding").get_weights()[0], "float64")
    for block in blocks:
        bias, rows, dense, dense_bias = (
            np.asarray(to_numpy(v), "float64")
            for v in (
                block.positional_bias.bias,
                block.mixing.kernel,
                block.dense.kernel,
                block.dense.bias,
            )
        )
        z = z + bias
        s = z @ rows
        moved, g = s.copy(), s.shape[-1] // 4
        for i, (axis, step) in enumerate([(1, -1), (1, 1), (2, -1), (2, 1)]):
            moved[..., i * g : (i + 1) * g] = np.roll(s[..., i * g : (i + 1) * g], step, axis=axis)
        z = (z + (moved - s) @ rows.T) @ dense + dense_bias
        cut = round(block.beta * z.shape[-1])
        z[..., :cut] = np.abs(z[..., :cut])
    z = np.sqrt((z**2).sum(axis=(1, 2)) + 1e-12)
    kernel, bias = model.head.get_weights()
    return z @ kernel.astype("float64") + bias.astype("float64")


def perturb(model, seed=0):
    """Biases and rescaled weights as training leaves them: nothing at its initial value."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = to_numpy(weight)
        weight.assign(value + 0.1 * rng.normal(size=value.shape) * (value == 0))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_equals_numpy_to_float64_precision(policy):
    model = small_lipnext(dtype=policy)
    perturb(model)
    x = np.random.default_rng(1).random((20, 8, 8, 1))
    np.testing.assert_allclose(Float64Twin(model)(x), numpy_lipnext(model, x), atol=2e-14)


@keras.saving.register_keras_serializable("tests")
class Drawn(keras.initializers.Initializer):
    """Counts how often it draws."""

    times = 0

    def __call__(self, shape, dtype=None):
        Drawn.times += 1
        return keras.ops.ones(shape, dtype)


class KeepsItsFirstWeights(keras.layers.Layer):
    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1],), initializer="ones")
        self.first = to_numpy(self.kernel)

    def call(self, inputs):
        return inputs * keras.ops.convert_to_tensor(self.first, inputs.dtype)


def test_what_stored_weights_replace_is_not_drawn(monkeypatch):
    """But of a layer of someone else's, which may compute with what was drawn."""
    rule = rules.Rule(lambda layer, context: rules.Bound(1.0), proven=False)
    monkeypatch.setitem(rules._LAYERS, KeepsItsFirstWeights, rule)
    inputs = keras.Input((3,))
    x = keras.layers.Dense(2, kernel_initializer=Drawn())(inputs)
    model, before = keras.Model(inputs, KeepsItsFirstWeights()(x)), Drawn.times
    assert before > 0
    x = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(Float64Twin(model)(x), x.sum(-1, keepdims=True) * np.ones(2))
    assert Drawn.times == before


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Rescaling(0.1, offset=-0.3),
        keras.layers.ReLU(negative_slope=0.1, max_value=0.7),
        keras.layers.Activation("tanh"),
        keras.layers.Dense(6, activation="softplus"),
        lip.layers.OrthogonalDense(6, activation="elu"),
        keras.layers.Dropout(0.5),
    ],
    ids=lambda layer: layer.name,
)
def test_keras_layers_run_in_float64(layer):
    formulas = {
        "Rescaling": lambda x: 0.1 * x - 0.3,
        "ReLU": lambda x: np.where(x < 0, 0.1 * x, np.minimum(x, 0.7)),
        "Activation": np.tanh,
        "Dense": lambda x: np.logaddexp(affine(layer, x), 0),
        "OrthogonalDense": lambda x: np.where(
            affine(layer, x) > 0, affine(layer, x), np.expm1(affine(layer, x))
        ),
        "Dropout": lambda x: x,
    }
    inputs = keras.Input((6,))
    twin = Float64Twin(keras.Model(inputs, layer(inputs)))
    x = np.random.default_rng(0).normal(size=(50, 6))
    expected = formulas[type(layer).__name__](x)
    np.testing.assert_allclose(twin(x), expected, rtol=1e-14, atol=1e-15)


def affine(layer, x):
    kernel, bias = (np.asarray(w, "float64") for w in layer.get_weights())
    return x @ kernel + bias


def test_a_layer_used_twice_and_equal_names():
    inputs = keras.Input((6,))
    dense = lip.layers.OrthogonalDense(6)
    inner = [
        keras.Sequential([keras.Input((6,)), keras.layers.Dense(6, name="same")]) for _ in range(2)
    ]
    model = keras.Model(inputs, inner[1](inner[0](dense(dense(inputs)))))
    x = np.random.default_rng(0).normal(size=(5, 6))
    y = affine(dense, affine(dense, x))
    for part in inner:
        y = affine(part.layers[-1], y)
    np.testing.assert_allclose(Float64Twin(model)(x), y, atol=1e-14)


class Stubborn(keras.layers.Layer):
    """Holds a float32 weight whatever its dtype."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="ones", dtype="float32")

    def call(self, inputs):
        return inputs


def test_a_layer_that_will_not_be_float64():
    inputs = keras.Input((6,))
    with pytest.raises(ValueError, match=r"'stubborn' \(Stubborn\) built its weight.*float32"):
        Float64Twin(keras.Model(inputs, Stubborn(name="stubborn")(inputs)))


class Narrowing(keras.layers.Layer):
    """Computes in float32 whatever its dtype, and answers in the dtype it was given."""

    lipschitz_constant = 1.0

    def call(self, inputs):
        return keras.ops.cast(self.narrow(inputs), inputs.dtype)

    def narrow(self, inputs):
        return keras.ops.cast(inputs, "float32")


class NarrowingNow(Narrowing):
    """As above, in a branch taken at run time."""

    def narrow(self, inputs):
        def low():
            return keras.ops.cast(keras.ops.cast(inputs, "float32"), inputs.dtype)

        return keras.ops.cond(keras.ops.sum(inputs) > 0, low, lambda: inputs)


class Answering32(Narrowing):
    def call(self, inputs):
        return keras.ops.cast(inputs, "float32")


@pytest.mark.parametrize("cls", [Narrowing, NarrowingNow, Answering32])
def test_a_layer_that_computes_in_lower_precision_is_named(cls):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3)(cls(name="low")(inputs)))
    with pytest.raises(ValueError, match=rf"^Layer 'low' \({cls.__name__}\) computes in lower"):
        lip.certify(model, np.ones((2, 6)), verbose=0)


class Masking32(keras.layers.Layer):
    """Numbers of its own in float32, exact in float64, are no loss."""

    lipschitz_constant = 1.0

    def call(self, inputs):
        return keras.ops.multiply(inputs, keras.ops.ones_like(inputs, dtype="float32"))


def test_constants_in_float32_are_no_loss():
    inputs = keras.Input((6,))
    x = np.random.default_rng(0).normal(size=(5, 6))
    np.testing.assert_array_equal(Float64Twin(keras.Model(inputs, Masking32()(inputs)))(x), x)


def test_wrong_input_shape():
    with pytest.raises(ValueError, match=r"inputs of shape \(None, 8, 8, 1\). Received: a batch"):
        Float64Twin(small_lipnext())(np.zeros((2, 8, 9, 1)))


def test_patches_that_do_not_tile_never_mix_images():
    inputs = keras.Input((None, None, 1))
    x = lip.layers.L2Pool()(lip.layers.PatchEmbedding(2, 8)(inputs))
    model = keras.Model(inputs, lip.layers.NormalizedDense(4)(x))
    assert Float64Twin(model)(np.ones((16, 4, 6, 1))).shape == (16, 4)
    with pytest.raises(Exception, match=r"reshape|shape|Cannot"):
        Float64Twin(model)(np.ones((16, 5, 5, 1)))


@pytest.mark.parametrize("name", ["two words", "a\nb", "ä:#?"])
def test_names_that_a_backend_would_not_take(name):
    """A file may name its layers as it likes."""
    inputs = keras.Input((6,))
    layer = keras.layers.Rescaling(2.0)
    model = keras.Model(inputs, layer(inputs))
    layer._name = name
    np.testing.assert_array_equal(Float64Twin(model)(np.ones((2, 6))), 2 * np.ones((2, 6)))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="others can")
def test_channels_first_convolutions_on_tensorflow_and_a_cpu():
    inputs = keras.Input((2, 6, 6))
    layer = keras.layers.Conv2D(3, 3, data_format="channels_first")
    model = keras.Model(inputs, layer(inputs))
    with pytest.raises(ValueError, match=r"channels-first convolutions.*KERAS_BACKEND=torch"):
        Float64Twin(model)(np.ones((1, 2, 6, 6)))


# Threads.


def in_thread(function):
    """Starts it in a thread of its own; the future of its answer."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


class Gate(keras.layers.Layer):
    """Passes on what it is given; a float64 batch of 64 samples waits for `passing` first."""

    passing = None

    def __init__(self, place, **kwargs):
        super().__init__(**kwargs)
        self.place = place

    def call(self, inputs):
        if inputs.shape[0] == 64 and keras.backend.standardize_dtype(inputs.dtype) == "float64":
            self.passing[self.place]()
        return inputs

    def get_config(self):
        return {**super().get_config(), "place": self.place}


def cancelling_model():
    """A large bias and its opposite: in float32 what is left over is off by a thousandth."""
    inputs = keras.Input((2, 6))
    x = Gate("first")(inputs)
    x = keras.layers.Dense(6)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = Gate("second")(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    first, second = np.random.default_rng(0).normal(size=(2, 6, 6)).astype("float32")
    first, second = np.linalg.qr(first)[0], second[:, :3]
    bias = -np.full(6, 1e5) @ second
    model.set_weights([first, np.full(6, 1e5), second, bias])
    weights = [np.asarray(w, "float64") for w in model.get_weights()]

    def distances(x):
        """To the nearest class of this affine function."""
        matrix = weights[0] @ weights[2]
        logits = x.mean(axis=1) @ matrix + (weights[1] @ weights[2] + weights[3])
        normals = matrix.T / 2**0.5
        top, rows = logits.argmax(axis=1), np.arange(len(x))
        with np.errstate(invalid="ignore"):
            found = (logits[rows, top][:, None] - logits) / np.linalg.norm(
                normals[top][:, None] - normals, axis=-1
            )
        found[rows, top] = np.inf
        return found.min(axis=1)

    return model, distances


def certified_beside_another_thread(monkeypatch):
    """(radii, distances): the other thread leaves and enters the scope at the worst moments."""
    entered, first, left, second, again, done = (threading.Event() for _ in range(6))

    def pause(reached, awaited):
        reached.set()
        assert awaited.wait(60)

    monkeypatch.setattr(
        Gate,
        "passing",
        {"first": lambda: pause(first, left), "second": lambda: pause(second, again)},
    )
    # Proven, lest a second evaluation, which nobody disturbs, be compared with the first.
    identity = rules.Rule(lambda layer, context: rules.Bound(1.0), proven=True)
    monkeypatch.setitem(rules._LAYERS, Gate, identity)
    model, distances = cancelling_model()
    x = np.random.default_rng(1).normal(size=(64, 2, 6))

    def other():
        with backend.float64_scope():
            pause(entered, first)
        pause(left, second)
        with backend.float64_scope():
            pause(again, done)

    other = in_thread(other)
    assert entered.wait(60)
    try:
        radii = in_thread(lambda: lip.certify(model, x, verbose=0).radii).result()
    finally:
        for event in (first, second, done):
            event.set()
        other.result()
    return radii, distances(x)


def test_another_thread_takes_no_float64_away(monkeypatch):
    before = keras.backend.result_type("float64", "float64")
    radii, distances = certified_beside_another_thread(monkeypatch)
    assert (radii <= distances).all()
    assert radii.max() > 0
    assert keras.backend.result_type("float64", "float64") == before


def switching_the_table(monkeypatch):
    """The scope without its protection: one entry of one table, for all threads."""
    table = dict(dtypes.BIT64_TO_BIT32_DTYPE)

    @contextlib.contextmanager
    def switched():
        found = table["float64"]
        table["float64"] = "float64"
        yield
        table["float64"] = found

    monkeypatch.setattr(dtypes, "BIT64_TO_BIT32_DTYPE", table)
    monkeypatch.setattr(backend.float64, "_promotion_kept", switched)


needs_switch = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="there Keras keeps float64 anyway"
)


@needs_switch
def test_a_table_switched_for_all_threads_would_give_false_radii(monkeypatch):
    """The mutant: neither the scope is the thread's own, nor are the results looked at."""
    switching_the_table(monkeypatch)
    monkeypatch.setattr(twin, "_check_float64", lambda *arguments: None)
    radii, distances = certified_beside_another_thread(monkeypatch)
    assert (radii > distances * (1 + 1e-6)).sum() > 10


@needs_switch
def test_the_results_are_looked_at_whatever_the_scope_does(monkeypatch):
    switching_the_table(monkeypatch)
    with pytest.raises(ValueError, match=r"^Layer .* computes in lower precision"):
        certified_beside_another_thread(monkeypatch)


@pytest.mark.slow
def test_threads_that_certify_train_and_predict():
    """Each finds what it finds alone, and trains and predicts in float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6)).astype("float32")
    first, second, fresh, other = (dense_model() for _ in range(4))
    y = rng.integers(0, 4, size=32)

    def certify(model):
        return [lip.certify(model, x, verbose=0).radii for _ in range(3)]

    def train():
        model = keras.models.clone_model(fresh)
        model.set_weights(fresh.get_weights())
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        fitted = model.fit(x, y, batch_size=4, epochs=20, shuffle=False, verbose=0)
        assert keras.backend.result_type("float64", "float64") == promoted
        return fitted.history["loss"]

    def predict():
        answers = [other.predict(x, verbose=0) for _ in range(8)]
        assert {a.dtype.name for a in answers} == {"float32"}
        return answers

    promoted = keras.backend.result_type("float64", "float64")
    tasks = [lambda: certify(first), lambda: certify(second), train, predict]
    alone = [task() for task in tasks]
    together = [task.result() for task in [in_thread(task) for task in tasks]]
    for one, other in zip(alone, together):
        np.testing.assert_allclose(other, one, rtol=1e-10)
    assert keras.backend.result_type("float64", "float64") == promoted
