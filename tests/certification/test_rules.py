"""Options and states of layers that a rule must look at, and what it must refuse."""

import re

import accelerated
import keras
import numpy as np
import pytest
from data import to_numpy
from packaging.version import Version
from test_layer_rules import check, needs_long, samples, whole

import keras_lipnext as lip
from keras_lipnext.lipschitz.graph import trace
from keras_lipnext.lipschitz.model import step_bounds
from keras_lipnext.lipschitz.rules.base import NominalContext
from keras_lipnext.twin import Float64Twin

kl, ops = keras.layers, keras.ops


def model_of(function, shape, **options):
    inputs = keras.Input(shape, **options) if shape else keras.Input(**options)
    return keras.Model(inputs, function(inputs))


@needs_long
@pytest.mark.skipif(Version(keras.__version__) < Version("3.15"), reason="Keras refuses both")
@pytest.mark.parametrize(
    "cls, arguments, shape",
    [
        (kl.DepthwiseConv2D, {"kernel_size": 2, "dilation_rate": 3}, (7, 6, 1)),
        (kl.DepthwiseConv1D, {"kernel_size": 3, "dilation_rate": 2, "padding": "same"}, (13, 2)),
        (kl.SeparableConv2D, {"filters": 2, "kernel_size": 2, "dilation_rate": 2}, (6, 5, 2)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_strides_with_dilation(cls, arguments, shape):
    """Keras allows both for these."""
    layer = cls(strides=2, **arguments)
    model = model_of(layer, shape)
    x = samples(shape, 6)
    constant, slope, _ = check(model, x)
    if "depthwise" in layer.name:
        assert constant <= 1.1 * slope
    np.testing.assert_allclose(Float64Twin(whole(model))(x), to_numpy(model(x)), 1e-4, 1e-4)


@needs_long
@pytest.mark.parametrize("offset", [0.3, np.array([0.3, -2.0])[:, None, None]], ids=["one", "each"])
def test_scales_by_channel_under_channels_first(offset):
    """Keras moves the scale's axis there, and not the offset's."""
    keras.config.set_image_data_format("channels_first")
    try:
        model = model_of(kl.Rescaling(np.array([0.1, -2.3]), offset), (2, 3, 4))
        x = samples((2, 3, 4))
        constant, slope, _ = check(model, x)
        assert constant == pytest.approx(2.3)
        assert constant <= 1.001 * slope
        np.testing.assert_allclose(Float64Twin(whole(model))(x), to_numpy(model(x)), 1e-5, 1e-5)
        flawed = model_of(kl.Rescaling(0.1, np.array([0.3, 1.0])), (2, 3, 4))
        with pytest.raises(ValueError, match="neither one number nor one for each entry"):
            lip.lipschitz_bound(flawed)
    finally:
        keras.config.set_image_data_format("channels_last")


@needs_long
@pytest.mark.parametrize("cls", [kl.Dense, kl.Activation])
def test_a_parametric_relu_as_activation(cls):
    """Its weights come with the first call; before, and in training, nothing is known of them."""
    activation = kl.PReLU()
    layer = cls(4, activation=activation) if cls is kl.Dense else cls(activation)
    model = model_of(layer, (4,))
    behind = keras.Model(model.inputs, kl.ReLU()(model.outputs[0]))
    with pytest.raises(ValueError, match="a PReLU, is not built"):
        lip.lipschitz_bound(behind)
    x = samples((4,))
    model(x)
    activation.alpha.assign([-2.0, 0.3, 0.0, 1.5])
    constant, slope, _ = check(model, x)
    assert slope <= constant <= 2.0 * 3
    if cls is kl.Activation:
        assert constant == pytest.approx(2) == pytest.approx(slope)
    np.testing.assert_allclose(Float64Twin(whole(model))(x), to_numpy(model(x)), 1e-4, 1e-4)
    for step in trace(model).steps:
        with pytest.raises(ValueError, match="free to grow in training"):
            step_bounds(step, NominalContext(step))
    activation.alpha.assign([np.nan, 0, 0, 0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        lip.lipschitz_bound(behind)


@pytest.mark.parametrize(
    "layer",
    [kl.EinsumDense("abc,cd->abd", (None, 2)), kl.TimeDistributed(kl.Dense(2))],
    ids=["einsum", "slices"],
)
def test_wrapped_and_contracted_kernels_are_free_in_training(layer):
    for step in trace(model_of(layer, (3, 4))).steps:
        with pytest.raises(ValueError, match="free to grow in training"):
            step_bounds(step, NominalContext(step))


def test_slices_of_kernels_that_stay_orthogonal():
    model = model_of(kl.TimeDistributed(lip.layers.OrthogonalDense(2)), (3, 4))
    (step,) = trace(model).steps
    assert all(part.constant == 1 for part in step_bounds(step, NominalContext(step)))


def test_a_wrapped_head():
    """Spectral normalisation divides its kernel in training only: the stored one counts."""
    layer = kl.SpectralNormalization(kl.Dense(2, use_bias=False))
    model = model_of(layer, (2,))
    layer.layer.kernel.assign([[3.0, 0.0], [0.0, 0.5]])
    certificate = lip.certify(model, [[1.0, 1.0]], verbose=0)
    assert certificate.evidence.bound.head == layer.name
    assert certificate.radii[0] == pytest.approx(2.5 / np.hypot(3, 0.5))
    layer.lipschitz_constant = 0.1  # of no effect: the class has a rule
    assert lip.certify(model, [[1.0, 1.0]], verbose=0).radii[0] == certificate.radii[0]
    with pytest.raises(ValueError, match="SpectralNormalization"):
        inputs = keras.Input((2,))
        lip.lipschitz_bound(keras.Model(inputs, kl.ReLU()(layer(inputs, training=True))))


def test_sizes_that_data_bring_to_resizing_and_sums():
    """Refused without data, certified with them."""
    inputs = keras.Input((None, None, 1))
    x = ops.cumsum(kl.CenterCrop(2, 2)(kl.Resizing(3, 4)(inputs)), axis=1)
    model = keras.Model(inputs, kl.Dense(2)(kl.Flatten()(x)))
    with pytest.raises(ValueError, match="is unknown"):
        lip.lipschitz_bound(model)
    certificate = lip.certify(model, np.random.default_rng(0).random((3, 5, 6, 1)), verbose=0)
    assert certificate.radii.max() > 0


def test_whole_numbers_may_be_cropped_but_not_resized():
    def model(layer):
        inputs = keras.Input((4, 4, 1), dtype="uint8")
        return keras.Model(inputs, kl.Dense(2)(kl.Flatten()(kl.Rescaling(0.1)(layer(inputs)))))

    assert lip.lipschitz_bound(model(kl.CenterCrop(2, 2))).constant > 0
    with pytest.raises(ValueError, match="computes in uint8"):
        lip.lipschitz_bound(model(kl.Resizing(2, 2)))


REFUSED = {
    "scale that widens": (lambda x: kl.Rescaling([1.0] * 5)(x), (1,), "neither one number"),
    "scale by sample": (
        lambda x: kl.Rescaling(np.array([[1.0], [-1.0]]))(x),
        (2,),
        "neither one number",
    ),
    "limits that widen": (
        lambda x: ops.clip(x, np.full(5, -9.0), np.full(5, 9.0)),
        (1,),
        "limits are not two numbers",
    ),
    "limits crossed": (lambda x: ops.clip(x, 1.0, -1.0), (1,), "limits are not two numbers"),
    "celu of negative alpha": (lambda x: ops.celu(x, alpha=-1.0), (2,), "alpha is -1.0"),
    "negative max_value": (lambda x: kl.ReLU(max_value=2.0)(x), (2,), None),
    "constant joined": (
        lambda x: ops.stack([x, np.full((1, 2), 1e17)], axis=-1),
        (2,),
        "reads a constant",
    ),
    "constant merged": (lambda x: kl.Add()([x, np.full((1, 2), 1e17)]), (2,), "reads a constant"),
    "celu of huge alpha": (lambda x: ops.celu(x, alpha=1e306), (2,), "alpha is 1e\\+306"),
    "factors that fold": (
        lambda x: x * np.array([2.0**-60, 2.0**-70]),
        (2,),
        r"beyond 2\^-64 to 2\^64",
    ),
    "complex constant": (lambda x: x * np.array([1j, 2j]), (2,), "complex|NaN|does not hold"),
    "integer arithmetic": (None, (2,), "computes in uint8"),
    "branches of unknown sizes": (
        lambda x: kl.Add()([x, kl.AveragePooling1D(8)(x)]),
        (None, 4),
        "whose unknown sizes only the data tell",
    ),
    "extreme branch": (
        lambda x: kl.Add()([x, kl.Rescaling(1e300)(kl.Rescaling(1e-200)(kl.Rescaling(1e-200)(x)))]),
        (2,),
        "no radius follows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    function, shape, message = REFUSED[name]
    if name == "integer arithmetic":
        inputs = keras.Input(shape, dtype="uint8")
        shifted = ops.subtract(inputs, ops.convert_to_tensor(np.array([128, 0], "uint8")))
        model = keras.Model(inputs, kl.Rescaling(1 / 255)(shifted))
    elif name == "complex constant" and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow does not build it")
    else:
        model = model_of(function, shape)
    if name == "negative max_value":
        model.layers[-1].max_value, message = -1.0, "max_value is -1.0"
    with pytest.raises(ValueError, match=message):
        lip.lipschitz_bound(model)


@pytest.mark.parametrize(
    "layer",
    [
        kl.BatchNormalization(axis=0),
        kl.Normalization(axis=0, mean=[0.0, 5, 0, 5], variance=[1.0] * 4),
    ],
    ids=["batch", "input"],
)
def test_normalisation_over_the_batch_axis_is_refused(layer):
    inputs = keras.Input(batch_shape=(4, 2))
    with pytest.raises(ValueError, match="works on the batch axis"):
        lip.lipschitz_bound(keras.Model(inputs, layer(inputs)))


def test_sizes_that_only_the_data_tell():
    """x + mean of 8 positions broadcast: 1 + 1 where the pooled branch has one position."""
    inputs = keras.Input((None, 4))
    pooled = kl.AveragePooling1D(8)(inputs)
    body = kl.Flatten()(kl.Add()([inputs, pooled]))
    model = keras.Model(inputs, kl.GlobalAveragePooling1D()(ops.expand_dims(body, -1)))
    model = keras.Model(inputs, kl.Dense(2)(model.outputs[0]))
    certificate = lip.certify(model, np.ones((2, 8, 4)), verbose=0)
    constants = {layer.kind: layer.constant for layer in certificate.evidence.bound.layers}
    assert constants["Add"] == pytest.approx(8**0.5)
    totals = {layer.kind: layer.total for layer in certificate.evidence.bound.layers}
    assert totals["Add"] >= 2


def test_layers_changed_after_building():
    inputs = keras.Input((8, 8, 1))
    layer = kl.Conv2D(1, 1)
    outputs = kl.Dense(2)(kl.GlobalAveragePooling2D()(layer(inputs)))
    model = keras.Model(inputs, outputs)
    layer.strides = (4, 4)
    for function in (lip.lipschitz_bound, lambda m: lip.certify(m, np.ones((1, 8, 8, 1)))):
        with pytest.raises(ValueError, match="build the model anew"):
            function(model)


def test_groups_changed_after_building():
    layer = kl.Conv2D(4, 1, use_bias=False)
    model = model_of(lambda x: kl.ReLU()(layer(x)), (4, 4, 2))
    layer.groups = 2
    with pytest.raises(ValueError, match="2 groups do not fit"):
        lip.lipschitz_bound(model)


def test_a_kernel_replaced_by_a_tensor():
    layer = lip.layers.NormalizedDense(2, use_bias=False)
    model = model_of(layer, (2,))
    layer.kernel = ops.convert_to_tensor(-3 * np.eye(2, dtype="float32"))
    with pytest.raises(ValueError, match="not one of its weights"):
        lip.certify(model, [[1.0, 2.0]], verbose=0)


def test_an_adapted_normalization_counts_its_samples_in_integers():
    layer = kl.Normalization()
    layer.adapt(np.array([[0.0, 5], [2, 9]], "float32"))
    model = model_of(lambda x: kl.Dense(2)(layer(x)), (2,))
    x = np.array([[0.3, 7.0], [1.0, 5.5]])
    np.testing.assert_allclose(Float64Twin(model)(x), to_numpy(model(x.astype("float32"))), 1e-4)
    assert lip.lipschitz_bound(model).body_constant == pytest.approx(1)  # deviations 1 and 2


def test_activations_given_in_other_ways():
    for activation in (ops.relu, ops.tanh, ops.gelu, kl.LeakyReLU(negative_slope=0.1)):
        for layer in (kl.Dense(3, activation=activation), kl.Activation(activation)):
            model = model_of(layer, (3,))
            x = np.random.default_rng(0).normal(size=(7, 3))
            expected = to_numpy(model(x.astype("float32")))
            np.testing.assert_allclose(Float64Twin(model)(x), expected, rtol=1e-4, atol=1e-5)
            assert lip.lipschitz_bound(keras.Model(model.inputs, kl.ReLU()(model.outputs[0])))


@keras.saving.register_keras_serializable("tests")
class Cast(kl.Layer):
    """A layer of someone's, named like an operation that the evaluation skips."""

    lipschitz_constant = 1.0

    def call(self, inputs):
        return -inputs


@keras.saving.register_keras_serializable("tests")
class Shares(kl.Layer):
    """Softmax inside a network, truthfully declared."""

    lipschitz_constant = 1.0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.activation = keras.activations.softmax

    def call(self, inputs):
        return self.activation(inputs)


@keras.saving.register_keras_serializable("tests")
class Gate(kl.Layer):
    """Trains by default, and its factor may be changed."""

    lipschitz_constant = 9.0

    def __init__(self, factor=2.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, inputs, training=True):
        return -inputs if training else self.factor * inputs


@pytest.mark.parametrize("cls", [Cast, Shares, Gate])
def test_layers_of_others_are_evaluated_as_they_are(cls):
    layer = cls()
    model = model_of(lambda x: kl.Dense(2)(layer(x)), (3,))
    if cls is Gate:
        layer.factor = -3.0
    x = np.random.default_rng(0).normal(size=(5, 3))
    expected = model.predict(x.astype("float32"), verbose=0)
    np.testing.assert_allclose(Float64Twin(model)(x), expected, rtol=1e-4, atol=1e-5)


@keras.saving.register_keras_serializable("tests")
class BatchMean(kl.Layer):
    """Declared, and wrong to be: it mixes the samples of a batch."""

    lipschitz_constant = 2.0

    def call(self, inputs):
        return inputs + inputs[:1]


def test_answers_that_depend_on_the_place_in_the_batch_are_refused():
    model = model_of(lambda x: kl.Dense(2)(BatchMean()(x)), (3,))
    with pytest.raises(ValueError, match="depends on its place in the batch"):
        lip.certify(model, np.random.default_rng(0).normal(size=(5, 3)), verbose=0)


def test_whole_numbers_as_constants():
    """Beyond 32 bits, and of narrow dtypes: as the real numbers they are."""
    x = np.array([[1.0, -2.0]])
    for function, expected in (
        (lambda t: t * 3_000_000_000, x * 3e9),
        (lambda t: t + 2**40, x + 2.0**40),
        (lambda t: t * np.array([200, 100], "uint8"), x * [200, 100]),
    ):
        try:
            model = model_of(function, (2,))
        except (OverflowError, ValueError, TypeError):
            continue  # the backend itself refuses
        np.testing.assert_array_equal(Float64Twin(model)(x), expected)


def test_tiny_columns_beside_large_ones():
    """Their squares underflow if all columns are scaled alike."""
    from keras_lipnext.radius import pairwise_distances_float64

    kernel = np.zeros((1001, 3))
    kernel[:, 0] = 1.5e-162
    kernel[0, 2] = 1.0
    distances = pairwise_distances_float64(kernel)
    assert distances[0, 1] >= 1.5e-162 * 1001**0.5 * (1 - 1e-15)
    assert distances[0, 1] <= 1.5e-162 * 1001**0.5 * (1 + 1e-12)


@keras.saving.register_keras_serializable("tests")
class Hidden(kl.Layer):
    """Computes with a number that neither its configuration nor a plain attribute shows."""

    lipschitz_constant = 5.0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._factor = 1.0

    def call(self, inputs):
        return self._factor * inputs


def test_the_models_own_predictions_are_compared():
    layer = Hidden()
    model = model_of(lambda x: kl.Dense(3)(layer(x)), (4,))
    x = np.random.default_rng(0).normal(size=(5, 4))
    assert lip.certify(model, x, verbose=0).radii.max() > 0
    layer._factor = -2.0 if accelerated.ON_CPU else -200.0  # within what TF32 may lose there
    model.make_predict_function(force=True)
    with pytest.raises(ValueError, match="own predictions are not those of its evaluation"):
        lip.certify(model, x, verbose=0)


def test_settings_of_layers_of_others_are_in_the_hash():
    layer = Gate()
    model = model_of(lambda x: kl.Dense(2)(layer(x)), (3,))
    before = trace(model).digest()
    layer.factor = -3.0
    assert trace(model).digest() != before


def test_fractions_for_a_model_of_whole_numbers():
    model = model_of(lambda x: kl.Dense(2)(kl.Rescaling(1 / 255)(x)), (3,), dtype="uint8")
    x = np.array([[0, 128, 255.0]])
    assert lip.certify(model, x, verbose=0).radii[0] > 0
    with pytest.raises(ValueError, match="would cut off fractions"):
        lip.certify(model, x + 0.5, verbose=0)
    with pytest.raises(ValueError, match=r"Inputs are real numbers. Received: dtype=complex"):
        lip.certify(model, x * 1j, verbose=0)


def test_whole_numbers_may_be_rearranged_before_they_are_scaled():
    inputs = keras.Input((4, 4, 1), dtype="uint8")
    x = kl.Flatten()(kl.RandomFlip()(kl.Cropping2D(1)(inputs)))
    model = keras.Model(inputs, kl.Dense(2)(kl.Rescaling(1 / 255)(x)))
    data = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), "uint8")
    assert lip.certify(model, data, verbose=0).radii.max() > 0


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="a setting of JAX")
def test_a_low_matmul_precision_does_not_reach_float64():
    import jax

    model = model_of(lambda x: kl.Dense(4)(kl.Dense(64, activation="relu")(x)), (32,))
    x = np.random.default_rng(0).normal(size=(5, 32))
    expected = Float64Twin(model)(x)
    with jax.default_matmul_precision("BF16_BF16_F32"):
        np.testing.assert_allclose(Float64Twin(model)(x), expected, rtol=1e-12)


def test_subnormal_weight_vectors():
    """Rounded to nearest among subnormal numbers, a distance could come out too small."""
    from keras_lipnext.radius import joint_norms_float64, pairwise_distances_float64

    kernel = np.array([[2.0**-1074, 0.0, 0.0], [0.0, 2.0**-1074, 0.0]])
    distances = pairwise_distances_float64(kernel)
    assert distances[0, 1] == 2.0**-1000
    assert distances[0, 0] == 0
    assert (joint_norms_float64(kernel)[0, :2] == 2.0**-1000).all()


def test_small_logits_behind_softmax_are_not_taken_for_another_function():
    """In float32 their shares are all 1/2, but for rounding."""
    model = model_of(kl.Dense(2, activation="softmax"), (3,))
    model.layers[-1].set_weights([np.full((3, 2), 1e-4) * [1, -1], np.zeros(2)])
    x = np.random.default_rng(0).normal(size=(9, 3))
    assert lip.certify(model, x, verbose=0).radii.max() > 0


def test_the_documentation_lists_what_has_a_rule():
    from keras_lipnext import certification
    from keras_lipnext.activations import FUNCTIONS
    from keras_lipnext.lipschitz.rules import base as rules
    from keras_lipnext.lipschitz.rules import operations as operation_rules
    from keras_lipnext.lipschitz.rules.layers import softmax

    paragraphs = [" ".join(p.split()) for p in certification.__doc__.split("\n\n")]
    listed = {}
    for paragraph in paragraphs:
        head, colon, names = paragraph.partition(": ")
        if colon:
            listed[head] = set(names.rstrip(".").split(", "))
    identities = {cls.__name__ for cls, rule in rules._LAYERS.items() if rule.identity}
    assert listed["Layers that return their input at inference"] == identities
    keras_own = {cls.__name__ for cls in rules._LAYERS if cls.__module__.startswith("keras.")}
    assert listed["Layers of Keras"] == keras_own - identities - {"Softmax"}
    assert listed["Activations, as names, functions or layers"] == set(FUNCTIONS)
    refusing = (operation_rules.without_constant, softmax)
    operations = {n for n, rule in rules._OPERATIONS.items() if rule.function not in refusing}
    assert {"ReLU", "GetItem"} <= operations  # in the last paragraph, in words
    names = {re.sub("(?<!^)(?=[A-Z])", "_", n).lower() for n in operations - {"ReLU", "GetItem"}}
    title = "Operations of keras.ops, with a tensor and a constant where they take two"
    assert listed[title] == names
    if Version(keras.__version__) >= Version("3.15"):  # older ones lack some
        assert all(hasattr(ops, name) for name in names)


@pytest.mark.parametrize("name", ["abs", "flip", "add", "take"])
def test_operations_whose_call_was_replaced_are_refused(name):
    """They exist in memory only, and the twin would run the same."""
    function = {
        "abs": ops.abs,
        "flip": lambda x: ops.flip(x, axis=1),
        "add": lambda x: ops.add(x, 1.0),
        "take": lambda x: ops.take(x, np.array([0, 0]), axis=1),
    }[name]
    model = model_of(function, (2,))
    assert lip.lipschitz_bound(model).constant < 1.5
    operation = model.operations[-1]
    own = operation.call
    operation.call = lambda *args: 100 * own(*args)
    for refused in (lip.lipschitz_bound, lambda m: lip.certify(m, np.ones((1, 2)), verbose=0)):
        with pytest.raises(ValueError, match=f"'{operation.name}'.*cannot be certified"):
            refused(model)


def test_an_activation_whose_call_was_replaced_is_refused():
    activation = kl.LeakyReLU(0.1)
    model = model_of(kl.Dense(3, activation=activation), (2,))
    lip.lipschitz_bound(model)
    activation.call = lambda x: 100 * x
    with pytest.raises(ValueError, match="no Lipschitz constant is known for its activation"):
        lip.lipschitz_bound(model)


@pytest.mark.parametrize("layer", [kl.Resizing(4, 4), kl.Resizing(8, 3), kl.CenterCrop(4, 4)])
def test_samples_taken_for_rows_of_one_image_are_refused(layer):
    """Keras resizes the batch axis of a tensor of rank 3."""
    for function, shape in ((layer, (8, 5)), (kl.TimeDistributed(layer), (3, 8, 5))):
        with pytest.raises(ValueError, match=r"another number of samples|rows of one image"):
            lip.lipschitz_bound(model_of(function, shape))


def test_taking_nothing_is_constant():
    with pytest.raises(ValueError, match="constant"):
        lip.lipschitz_bound(model_of(lambda x: ops.take(x, np.zeros(0, int), axis=1), (3,)))
