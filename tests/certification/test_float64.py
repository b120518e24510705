import keras
import numpy as np
import pytest
from data import small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext.certification.float64 import Float64Twin


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
