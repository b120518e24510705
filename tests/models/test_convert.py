"""Ordinary models become 1-Lipschitz ones, and the report says what became of each layer."""

import itertools

import keras
import numpy as np
import pytest
from data import called, to_numpy

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


KINDS = list(
    itertools.product(["orthogonal", "sdp"], ["max_min", "keep", "beta_abs", "householder"])
)


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
    history = model.fit(IMAGES, labels, batch_size=8, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    certificate = model.certify(IMAGES, labels, verbose=0)
    assert 0.9 < certificate.body_constant < 1.001
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.certify(IMAGES, verbose=0).radii, model.certify(IMAGES, verbose=0).radii
    )


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
        "SDPConv2D, Cropping2D",
        "BetaAbs",
        "Flatten",
        "NormalizedDense",
    ]
    assert 0.9 < conversion.model.lipschitz_bound().body_constant < 1.001


def test_layers_used_twice_stay_one():
    inputs = keras.Input((6,))
    layer = kl.Dense(6, activation="relu")
    model = keras.Model(inputs, kl.Dense(3)(layer(layer(inputs))))
    converted = lip.convert(model).model
    assert sum(isinstance(part, lip.layers.OrthogonalDense) for part in converted.layers) == 1


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
