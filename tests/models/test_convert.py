"""Ordinary models become 1-Lipschitz ones, and the report says what became of each layer."""

import keras
import numpy as np
import pytest
from data import called, small_lipnext, to_numpy

import keras_lipnext as lip

kl = keras.layers
RNG = np.random.default_rng(0)
IMAGES = RNG.random((24, 8, 8, 1)).astype("float32")


def network():
    """Of every kind of layer that `convert` replaces, with weights as training leaves them."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = kl.Rescaling(1.0, offset=-0.5)(inputs)
    x = kl.BatchNormalization(name="norm")(kl.Conv2D(8, 3, padding="same", name="first")(x))
    x = kl.ReLU(name="active")(x)
    y = kl.Conv2D(8, 3, padding="same", activation="relu")(x)
    x = kl.Add(name="sum")([x, y])
    x = kl.MaxPooling2D(3, strides=2, padding="same", name="pool")(x)
    x = kl.Conv2D(32, 2, strides=2, name="patches")(x)
    x = kl.Conv2D(12, 1, activation="gelu", name="pixels")(x)
    x = kl.AveragePooling2D(2, name="mean")(x)
    x = kl.Dropout(0.3, name="dropout")(kl.Flatten()(x))
    x = kl.Dense(16, activation="relu", name="dense")(x)
    model = keras.Model(inputs, kl.Dense(3, activation="softmax", name="last")(x))
    for weight in model.weights:
        noise = RNG.uniform(0.1, 1, weight.shape)
        weight.assign(3 * to_numpy(weight) + (noise if "kernel" not in weight.name else 0))
    return model


KINDS = [
    (kind, activation)
    if (kind == "sdp") == (activation in ("keep", "householder"))
    else pytest.param(kind, activation, marks=pytest.mark.once)
    for kind in ("orthogonal", "sdp")
    for activation in ("max_min", "keep", "beta_abs", "householder")
]


@pytest.mark.parametrize("kind, activation", KINDS)
def test_the_constant_is_about_1(kind, activation):
    conversion = lip.convert(network(), kind, activation)
    assert isinstance(conversion.model, lip.CertifiableModel)
    assert conversion.cannot == ()
    bound = conversion.model.lipschitz_bound()
    assert 0.9 < bound.body_constant < 1.001
    for part in bound.layers:  # the product is no accident of a small factor beside a large one
        if part.kind not in ("AveragePooling2D", "Rescaling", "Activation"):
            assert 0.9 < part.constant < 1.001, part


def test_the_report_says_what_became_of_each_layer():
    conversion = lip.convert(network())
    found = {c.layer: (c.became, c.weights) for c in conversion.changes}
    assert found["first"] == ("SDPConv2D", "kept")
    assert found["norm"] == ("", "folded")
    assert found["active"] == ("MaxMin", "")
    assert found["sum"] == ("Average", "")
    assert found["pool"] == ("MaxPooling2D", "")
    assert found["patches"] == ("PatchEmbedding", "projected")
    assert found["pixels"] == ("OrthogonalDense, MaxMin", "projected")
    assert found["mean"] == ("AveragePooling2D, Rescaling", "")
    assert found["dropout"][0] == ""
    assert found["dense"] == ("OrthogonalDense, MaxMin", "projected")
    assert found["last"] == ("NormalizedDense", "normalised")
    lines = str(conversion).splitlines()
    assert len(lines) == 1 + len(conversion.changes)
    assert "first (Conv2D)" in str(conversion) and "(left out)" in str(conversion)


def test_it_trains_is_saved_and_certified(tmp_path):
    model = lip.convert(network()).model
    labels = np.arange(24) % 3
    model.compile(lip.optimizers.ManifoldAdam(1e-2), loss=lip.losses.EMMA(epsilon=0.1))
    history = model.fit(IMAGES, labels, batch_size=8, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    certificate = model.certify(IMAGES, labels, verbose=0)
    assert 0.9 < certificate.body_constant < 1.001
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.certify(IMAGES, verbose=0).radii, certificate.radii)


def orthogonal(rows, columns, size):
    return size * np.linalg.qr(RNG.normal(size=(rows, rows)))[0][:, :columns]


@pytest.mark.parametrize("kind", ["orthogonal", "sdp"])
def test_a_scaled_network_keeps_its_function(kind):
    """Kernels that are multiples of orthonormal ones, biases: the logits change by one factor."""
    inputs = keras.Input((6,))
    x = kl.Dense(8, activation="relu")(inputs)
    model = keras.Model(inputs, kl.Dense(4)(kl.Dense(8, activation="relu")(x)))
    for layer, size in zip(model.layers[1:], (5.0, 0.3, 2.0)):
        rows, columns = layer.kernel.shape
        kernel = orthogonal(max(rows, columns), min(rows, columns), size)
        layer.kernel.assign(kernel if rows >= columns else kernel.T)
        layer.bias.assign(RNG.normal(size=columns))
    x = RNG.normal(size=(16, 6)).astype("float32")
    converted = lip.convert(model, kind, "keep").model
    np.testing.assert_allclose(called(converted, x) * 3.0, called(model, x), rtol=1e-3, atol=1e-4)


def test_a_folded_batch_normalisation_keeps_the_function():
    inputs = keras.Input((5, 5, 2))
    x = kl.Conv2D(4, 3, padding="valid", use_bias=False)(inputs)
    x = kl.Flatten()(kl.ReLU()(kl.BatchNormalization()(x)))
    model = keras.Model(inputs, x)
    for weight in model.weights:
        weight.assign(RNG.uniform(0.5, 2, weight.shape))
    x = RNG.normal(size=(16, 5, 5, 2)).astype("float32")
    ours, theirs = called(lip.convert(model, activation="keep").model, x), called(model, x)
    factor = (ours * theirs).sum() / (theirs**2).sum()
    np.testing.assert_allclose(ours, factor * theirs, rtol=1e-3, atol=1e-5)
    assert 0 < factor < 1


def test_a_model_without_a_head_is_an_ordinary_one():
    inputs = keras.Input((6, 6, 2))
    model = keras.Model(inputs, kl.Conv2D(3, 3, padding="same")(inputs))
    converted = lip.convert(model).model
    assert type(converted) is not lip.CertifiableModel
    assert converted.output_shape == model.output_shape
    assert 0.9 < lip.lipschitz_bound(converted).constant < 1.001


def test_images_with_their_channels_first():
    inputs = keras.Input((2, 8, 8))
    x = kl.Conv2D(6, 1, data_format="channels_first", activation="relu")(inputs)
    x = kl.ReLU()(kl.Conv2D(5, 3, strides=2, data_format="channels_first")(x))
    model = keras.Model(inputs, kl.Dense(3)(kl.Flatten("channels_first")(x)))
    conversion = lip.convert(model)
    assert [c.became for c in conversion.changes] == [
        "OrthogonalDense, MaxMin",
        "ZeroPadding2D, SDPConv2D, Cropping2D",
        "BetaAbs",
        "Flatten",
        "NormalizedDense",
    ]
    assert 0.9 < conversion.model.lipschitz_bound().body_constant < 1.001


def test_a_layer_used_twice_stays_one_of_the_first_use():
    inputs = keras.Input((6,))
    layer = kl.Dense(6, name="twice")
    model = keras.Model(inputs, kl.Dense(3)(layer(layer(inputs))))
    layer.set_weights([10 * np.eye(6), np.ones(6)])
    conversion = lip.convert(model)
    (found,) = [m for m in conversion.model.layers if isinstance(m, lip.layers.OrthogonalDense)]
    np.testing.assert_allclose(to_numpy(found.bias), 0.1, rtol=1e-5)
    assert [c.weights for c in conversion.changes] == ["projected", "shared", "normalised"]


def test_a_head_that_is_used_before_says_so():
    inputs = keras.Input((6,))
    layer = kl.Dense(6)
    conversion = lip.convert(keras.Model(inputs, layer(layer(inputs))))
    assert [c.became for c in conversion.changes] == ["OrthogonalDense", "NormalizedDense"]
    assert "weights of its own" in conversion.changes[1].why


def sequence(shape, *parts):
    return keras.Sequential([keras.Input(shape), *parts])


SHARES = {
    "sigmoid": [kl.Dense(4, "sigmoid")],
    "sigmoid of keras.ops": [kl.Dense(4, keras.ops.sigmoid)],
    "log_sigmoid": [kl.Dense(4, "log_sigmoid")],
    "a layer": [kl.Dense(4), kl.Activation("sigmoid")],
    "a layer within": [kl.Dense(4, activation=kl.Activation("sigmoid"))],
    "behind softmax": [kl.Dense(4, "sigmoid"), kl.Softmax()],
    "normalised": [kl.Dense(4), kl.BatchNormalization(), kl.Activation("sigmoid")],
}


@pytest.mark.parametrize("activation", ["max_min", "keep"])
@pytest.mark.parametrize("ending", SHARES)
def test_shares_at_the_end_are_left_to_the_loss(ending, activation):
    parts = [type(part).from_config(part.get_config()) for part in SHARES[ending]]
    conversion = lip.convert(sequence((6,), kl.Dense(8), *parts), activation=activation)
    assert isinstance(conversion.model, lip.CertifiableModel)
    assert isinstance(conversion.model.layers[-1], lip.layers.NormalizedDense)
    assert any("sigmoid belongs into the loss" in c.why for c in conversion.changes)


def test_a_binary_classifier_decides_as_before():
    model = sequence((6,), kl.Dense(6), kl.Dense(1, "sigmoid"))
    model.layers[0].set_weights([orthogonal(6, 6, 3.0), RNG.normal(size=6)])
    model.layers[1].bias.assign([0.2])
    x = RNG.normal(size=(64, 6)).astype("float32")
    yes = called(model, x) > 0.5
    assert 0 < yes.mean() < 1
    np.testing.assert_array_equal(called(lip.convert(model).model, x) > 0, yes)


TWO_SIGMOIDS = [kl.Concatenate(), kl.Average(), kl.Add()]


@pytest.mark.parametrize("merge", TWO_SIGMOIDS, ids=lambda layer: type(layer).__name__)
def test_no_activation_pairs_the_outputs_of_branches(merge):
    inputs = keras.Input((6,))
    outputs = merge([kl.Dense(1, "sigmoid")(inputs), kl.Dense(1, "sigmoid")(inputs)])
    kinds = [type(m) for m in lip.convert(keras.Model(inputs, outputs)).model.layers]
    assert lip.layers.BetaAbs not in kinds and lip.layers.MaxMin not in kinds


@pytest.mark.parametrize(
    "parts, became",
    [
        ([kl.Dense(2, "tanh")], "OrthogonalDense, tanh"),
        ([kl.Dense(2, "tanh"), kl.Reshape((2, 1))], "OrthogonalDense, tanh"),
        ([kl.Dense(2), kl.Activation("tanh")], "Activation"),
        ([kl.Dense(2, "gelu")], "OrthogonalDense, gelu, Rescaling"),
    ],
)
def test_other_activations_at_the_end_stay(parts, became):
    conversion = lip.convert(sequence((6,), kl.Dense(4, "relu"), *parts))
    assert became in [c.became for c in conversion.changes[1:]]
    assert not {"MaxMin", "BetaAbs"} & set(", ".join(c.became for c in conversion.changes[1:]))
    assert lip.lipschitz_bound(conversion.model).constant < 1.001


def test_an_activation_at_the_end_that_cannot_stay_is_refused():
    with pytest.raises(ValueError, match=r"'wild' \(Dense\): no constant is known"):
        lip.convert(sequence((6,), kl.Dense(2, "exponential", name="wild")))
    with pytest.raises(ValueError, match="free to grow"):
        lip.convert(sequence((6,), kl.Dense(2), kl.PReLU()))


@pytest.mark.parametrize("activation", ["max_min", "keep"])
@pytest.mark.parametrize(
    "part",
    [
        kl.Activation("softmax"),
        kl.Softmax(),
        kl.Dense(4, "softmax"),
        kl.Dense(4, activation=kl.Softmax()),
    ],
)
def test_a_softmax_inside_is_refused(part, activation):
    part = type(part).from_config(part.get_config() | {"name": "shares"})
    model = sequence((4,), kl.Dense(4), part, kl.Dense(2))
    with pytest.raises(ValueError, match=r"'shares'.*softmax inside"):
        lip.convert(model, activation=activation)


@pytest.mark.parametrize(
    "last",
    [
        kl.Dense(3, "softmax"),
        kl.Conv2D(3, 1, activation="softmax"),
        kl.Conv2D(3, 1, activation="sigmoid"),
        kl.Conv2D(3, 1),
    ],
)
def test_dense_predictions_end_in_a_head(last):
    last = type(last).from_config(last.get_config())
    model = sequence((4, 4, 2), kl.Conv2D(4, 3, padding="same", activation="relu"), last)
    conversion = lip.convert(model)
    assert isinstance(conversion.model, lip.CertifiableModel)
    assert conversion.model.output_shape == (None, 4, 4, 3)
    assert conversion.changes[-1].became == "NormalizedDense"
    kernel = to_numpy(last.kernel).reshape(4, 3)
    expected = kernel / np.linalg.norm(kernel, axis=0)
    found = to_numpy(conversion.model.head.kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_shares_along_another_axis_make_no_head():
    model = sequence((4, 2), kl.Dense(3), kl.Softmax(axis=1))
    with pytest.raises(ValueError, match="softmax inside"):
        lip.convert(model)


WINDOWS = [(8, 3, 2), (9, 3, 2), (8, 5, 2), (12, 5, 4), (8, 2, 3), (9, 4, 2)]


@pytest.mark.parametrize(
    "size, k, stride, padding",
    [
        # On each backend, every second one; what pads them is known before.
        (*sizes, padding)
        if (i + j) % 2 == 0
        else pytest.param(*sizes, padding, marks=pytest.mark.once)
        for i, sizes in enumerate(WINDOWS)
        for j, padding in enumerate(("same", "valid"))
    ],
)
def test_convolutions_with_kept_weights_read_the_same_windows(size, k, stride, padding):
    model = sequence((size, 7, 1), kl.Conv2D(2, k, strides=(stride, 1), padding=padding))
    conversion = lip.convert(model)
    assert conversion.changes[0].weights == "kept"
    x = RNG.normal(size=(3, size, 7, 1)).astype("float32")
    ours, theirs = called(conversion.model, x), called(model, x)
    factor = (ours * theirs).sum() / (theirs**2).sum()
    np.testing.assert_allclose(ours, factor * theirs, rtol=1e-3, atol=1e-5)
    assert lip.lipschitz_bound(conversion.model).constant < 1.001


def test_windows_of_images_of_unknown_size_are_said_to_shift():
    parts = [kl.Conv2D(2, 3, strides=s, padding="same") for s in (1, 2)]
    changes = lip.convert(sequence((None, 8, 1), *parts)).changes
    assert changes[0].why == "" and "may be shifted" in changes[1].why


@pytest.mark.parametrize("cls", [kl.MaxPooling2D, kl.AveragePooling2D])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("side, size, stride", [(8, 3, 2), (9, 2, 2), (8, 3, 1), (7, 2, 3)])
def test_pooling_makes_as_many_windows(cls, padding, side, size, stride):
    conversion = lip.convert(sequence((side, side, 2), cls(size, stride, padding)))
    expected = cls(size, stride, padding).compute_output_shape((None, side, side, 2))
    assert conversion.model.output_shape == expected
    assert lip.lipschitz_bound(conversion.model).constant < 1.001


def test_averages_at_the_border_count_zeros():
    conversion = lip.convert(sequence((3, 3, 1), kl.AveragePooling2D(2, padding="same")))
    found = called(conversion.model, np.ones((1, 3, 3, 1), "float32"))
    np.testing.assert_allclose(found[0, ..., 0], [[2, 1], [1, 0.5]])
    assert "zeros count at the border" in conversion.changes[0].why


def test_a_scaled_activation_divides_the_biases_behind_it():
    """Dense with gelu, and Dense and gelu in two layers, are converted alike."""
    biases = []
    for parts in ([kl.Dense(6, "gelu")], [kl.Dense(6), kl.Activation("gelu")]):
        model = sequence((6,), *parts, kl.Dense(6, bias_initializer="ones"))
        model.layers[0].set_weights([3 * np.eye(6), np.zeros(6)])
        model.layers[-1].kernel.assign(np.eye(6))
        head = lip.convert(model, activation="keep").model.layers[-1]
        biases.append(to_numpy(head.bias))
    np.testing.assert_allclose(biases[0], 1 / (3 * 1.1289042), rtol=1e-5)
    np.testing.assert_allclose(biases[0], biases[1], rtol=1e-5)


def test_slopes_that_training_moves_are_not_kept_inside():
    model = sequence((6,), kl.Dense(6), kl.PReLU(), kl.Dense(3))
    change = lip.convert(model, activation="keep").changes[1]
    assert change.became == "MaxMin" and "free to grow" in change.why


def test_lipnext_itself_is_converted():
    model = small_lipnext(num_classes=3, depth=1)
    conversion = lip.convert(model, activation="keep")
    ours, theirs = called(conversion.model, IMAGES), called(model, IMAGES)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_converted_is_named_all_at_once():
    inputs = keras.Input((6, 4))
    x = kl.Dense(4, activation="relu")(inputs)
    x = kl.Lambda(lambda x: x * x, name="square")(x)
    x = kl.LSTM(5, name="memory")(x)
    model = keras.Model(inputs, kl.Dense(3)(x))
    with pytest.raises(ValueError, match=r"(?s)'square' \(Lambda\).*'memory' \(LSTM\)"):
        lip.convert(model)
    with pytest.raises(ValueError, match="'memory'"):  # nothing of another shape can stand there
        lip.convert(model, strict=False)


def test_what_may_be_left_out():
    inputs = keras.Input((6,))
    x = kl.Lambda(lambda x: x * x, name="square")(kl.Dense(4)(inputs))
    conversion = lip.convert(keras.Model(inputs, kl.Dense(3)(x)), strict=False)
    assert len(conversion.cannot) == 1 and "'square' (Lambda)" in conversion.cannot[0]
    assert "Cannot be converted: " in str(conversion)
    assert 0.9 < conversion.model.lipschitz_bound().body_constant < 1.001


@pytest.mark.parametrize("name", ["kind", "activation", "bound"])
def test_unknown_arguments(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be one of .*Received: {name}='other'"):
        lip.convert(network(), **{name: "other"})
