"""The model's own answers beside the certificate's: what differs is found, what does not passes."""

import accelerated
import keras
import numpy as np
import pytest
from data import small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext import layers, twin
from keras_lipnext.certification import evaluation
from keras_lipnext.lipschitz.model import read
from keras_lipnext.lipschitz.own_precision import convolves

kl = keras.layers


def model_of(*parts, shape=(4, 4, 1), dtype=None):
    inputs = keras.Input(shape, dtype=dtype)
    x = inputs
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


def pooled(policy):
    pool = kl.MaxPooling2D(2, dtype=policy)
    model = model_of(pool, kl.Flatten(dtype=policy), kl.Dense(3, dtype=policy))
    model.layers[-1].set_weights([np.eye(4, 3), np.arange(3) / 8])
    return model, pool


POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_attribute_that_no_configuration_shows(policy):
    model, pool = pooled(policy)
    x = np.ones((3, 4, 4, 1))  # on which max and average agree
    assert lip.certify(model, x, verbose=0).radii.max() > 0
    pool.pool_mode = "average"
    with pytest.raises(ValueError, match="`pool_mode` is 'average', by its configuration 'max'"):
        lip.certify(model, x, verbose=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_that_differs_only_elsewhere_is_found(policy, monkeypatch):
    """By inputs of the library's own, in every precision: nothing looks at attributes here."""
    monkeypatch.setattr(twin, "_check_attributes", lambda *arguments: None)
    model, pool = pooled(policy)
    pool.pool_mode = "average"
    with pytest.raises(ValueError, match="own predictions are not those of its evaluation"):
        lip.certify(model, np.ones((3, 4, 4, 1)), verbose=0)
    monkeypatch.setattr(evaluation, "probes", lambda shape, dtype: np.ones(shape))
    assert lip.certify(model, np.ones((3, 4, 4, 1)), verbose=0).radii.max() > 0


def softmaxed(*parts):
    return model_of(*parts, shape=(6,))


SOUND = {
    "OrthogonalDense with softmax": lambda: softmaxed(layers.OrthogonalDense(4, "softmax")),
    "Dense with log_softmax": lambda: softmaxed(kl.Dense(4, activation="log_softmax")),
    "softmax twice": lambda: softmaxed(kl.Dense(4), kl.Softmax(), kl.Softmax()),
    "softmax of softmax": lambda: softmaxed(kl.Dense(4, activation="softmax"), kl.Softmax()),
    "log_softmax of softmax": lambda: softmaxed(kl.Dense(4), kl.Softmax(), keras.ops.log_softmax),
    "float16 inside": lambda: softmaxed(
        kl.Dense(6),
        lambda x: keras.ops.cast(keras.ops.cast(x, "float16"), "float32"),
        kl.Dense(4),
    ),
    "bfloat16 inside": lambda: softmaxed(
        lambda x: keras.ops.relu(keras.ops.cast(x, "bfloat16")),
        lambda x: keras.ops.cast(x, "float32"),
        kl.Dense(4),
    ),
    "a layer in bfloat16": lambda: softmaxed(kl.Dense(6, dtype="bfloat16"), kl.Dense(4)),
    "an activation that is a layer": lambda: softmaxed(kl.Dense(4), kl.LeakyReLU(0.1)),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_models_raise_no_alarm(name):
    model = SOUND[name]()
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    certificate = lip.certify(model, x, verbose=0)
    assert (certificate.radii > 0).sum() >= 7  # relu may leave a tie
    assert (certificate.low_precision_differences is None) == ("float16" not in name)
    own = to_numpy(keras.ops.cast(model.predict(x, verbose=0), "float32"))
    agreeing = (own.argmax(axis=1) == certificate.predictions).sum()
    assert agreeing == 8 - (certificate.low_precision_differences or 0)


def test_softmax_in_an_orthogonal_head_is_left_out():
    model = SOUND["OrthogonalDense with softmax"]()
    plain = softmaxed(layers.OrthogonalDense(4))
    plain.set_weights(model.get_weights())
    x = np.random.default_rng(0).normal(size=(8, 6))
    certificate, expected = (
        lip.certify(m, x, verbose=0, arithmetic="real") for m in (model, plain)
    )
    np.testing.assert_allclose(certificate.radii, expected.radii, rtol=1e-12)
    assert "ends in softmax" in certificate.evidence.bound.notes[0]


@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-44])
@pytest.mark.parametrize("place", [0, 1])
def test_weights_too_small_for_float32_raise_no_alarm(scale, place):
    """The model's float32 loses digits of such weights, or all; float64 does not."""
    model = softmaxed(kl.Dense(6, use_bias=False), kl.Dense(4, use_bias=False))
    kernel = model.layers[1 + place].kernel
    kernel.assign(scale * np.random.default_rng(0).normal(size=kernel.shape))
    x = np.random.default_rng(1).normal(size=(8, 6))
    assert (lip.certify(model, x, verbose=0).radii > 0).all()


def test_augmentation_is_noted():
    model = model_of(kl.RandomFlip(name="flip"), kl.Dropout(0.5), kl.Flatten(), kl.Dense(3))
    x = np.random.default_rng(0).random((4, 4, 4, 1))
    (note,) = lip.certify(model, x, verbose=0).evidence.bound.notes
    assert note.startswith("Layer 'flip': augmentation, which counts as the identity")
    plain = model_of(kl.Dropout(0.5), kl.Flatten(), kl.Dense(3))
    assert lip.lipschitz_bound(plain).notes == ()


# Settings under which products on an accelerator are float32, and TF32.
SINGLE, SHORTER = {
    "jax": ("ieee", "default"),
    "torch": ("default", "high"),
    "tensorflow": (None, "default"),
}[keras.backend.backend()]


def compared(make, setting, monkeypatch, wrong=0.0):
    """Whether own answers on a pretended accelerator pass; one logit is wrong by so much of all."""
    accelerated.pretend(monkeypatch)
    with accelerated.float32_as(setting):
        model = make()
        x = np.random.default_rng(0).random((4, *model.input_shape[1:])).astype("float32")
        evaluated = evaluation.Evaluation(read(model), model.output_shape[-1])
        evaluated(x, len(x))
        own = np.array(evaluated.own_answers(model, x))
        own[-1, -1] += wrong * np.ptp(own)
        try:
            evaluated.compare(model, x, own)
        except ValueError as error:
            assert "are not those of its evaluation" in str(error)
            return False
    return True


def dense():
    return model_of(layers.OrthogonalDense(6), layers.OrthogonalDense(4), shape=(6,))


def in_a_graph(function, shape):
    """The operation that Keras makes of a function of a series and a kernel of this shape."""
    kernel = keras.ops.ones(shape)
    return function(keras.Input((4, 1)), kernel)._keras_history.operation


@pytest.mark.parametrize(
    "operation, expected",
    [
        (lambda: kl.Dense(2), False),
        (lambda: kl.EinsumDense("ab,bc->ac", output_shape=2), False),
        (lambda: layers.OrthogonalDense(2), False),
        (lambda: in_a_graph(keras.ops.matmul, (1, 2)), False),
        (lambda: kl.Conv1D(2, 2), True),
        (lambda: kl.TimeDistributed(kl.Conv2D(2, 2)), True),
        (lambda: layers.SDPConv2D(2, 3), True),
        (lambda: in_a_graph(keras.ops.conv, (2, 1, 2)), True),
        (lambda: kl.LSTM(2), True),  # cuDNN has a switch for these, too
        (lambda: type("Mine", (kl.Dense,), {})(2), True),  # who knows
    ],
)
def test_what_may_convolve(operation, expected):
    assert convolves(operation()) == expected


@pytest.mark.skipif(SINGLE is None, reason="nothing says that products are float32")
def test_float32_on_an_accelerator_is_compared_as_such(monkeypatch):
    assert compared(small_lipnext, SINGLE, monkeypatch)
    assert not compared(small_lipnext, SINGLE, monkeypatch, wrong=0.05)
    accelerated.round_products(monkeypatch)
    assert not compared(dense, SINGLE, monkeypatch)


def test_tf32_on_an_accelerator_raises_no_alarm(monkeypatch):
    accelerated.round_products(monkeypatch)
    for make in (small_lipnext, dense):
        assert compared(make, SHORTER, monkeypatch)
        assert not compared(make, SHORTER, monkeypatch, wrong=10.0)
