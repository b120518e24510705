import keras
import numpy as np
import pytest
from data import to_numpy
from dense_nets import largest_gradient, network, penalty

import keras_lipnext as lip
from keras_lipnext import lmi

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def trained(model, digits, epochs, lipschitz=2.0, images=None, **arguments):
    (x, y), _ = digits
    x, y = x[:images], y[:images]
    training = lmi.RSLMI(model, lipschitz, **arguments)
    training.compile(keras.optimizers.Adam(3e-3), CROSS_ENTROPY, metrics=["accuracy"])
    history = training.fit(x, y, batch_size=50, epochs=epochs, verbose=0).history
    return training, history


def digits_network(units=(24, 16)):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Flatten()])
    for n in units:
        model.add(keras.layers.Dense(n, activation="relu"))
    model.add(keras.layers.Dense(10))
    model.build((None, 8, 8, 1))
    return model


@pytest.mark.slow
def test_training_lowers_the_proven_bound(digits):
    _, (x, y) = digits
    plain = digits_network()
    plain.compile(keras.optimizers.Adam(3e-3), CROSS_ENTROPY)
    plain.fit(*digits[0], batch_size=50, epochs=8, verbose=0)
    model = digits_network()
    training, history = trained(model, digits, epochs=8, sketch=8)
    assert np.isfinite(history["loss"]).all()
    before = model.predict(x, verbose=0)
    assert lmi.eclipse_fast(plain).constant > 3 * lmi.eclipse_fast(model).constant
    assert lmi.project(training, 2.0).constant <= 2.0
    assert (before.argmax(axis=1) == y).mean() > 0.75
    # Scaled, not changed: the same predictions.
    after = model.predict(x, verbose=0)
    factor = after[0, 0] / before[0, 0]
    np.testing.assert_allclose(after, factor * before, rtol=1e-4, atol=1e-5)
    assert 0.5 < factor <= 1
    assert largest_gradient(model) <= 2.0
    certificate = lip.certify(model, x, y, epsilons=0.1, lipschitz="eclipse_fast", verbose=0)
    assert certificate.certified_accuracy[0.1] > 0.4


@pytest.mark.parametrize("jit", ["auto", True])
def test_gradients_reach_weights_and_multipliers(jit, digits):
    if jit is True and keras.backend.backend() != "tensorflow":
        pytest.skip("on JAX it is what 'auto' means; torch.compile needs a compiler")
    (x, y), _ = digits
    training = lmi.RSLMI(digits_network((8, 8, 8)), 0.5, sketch=4, weight=100.0)
    before = training.get_weights()
    training.compile("sgd", CROSS_ENTROPY, jit_compile=jit)
    training.fit(x[:100], y[:100], batch_size=50, verbose=0)
    for variable, old in zip(training.weights, before):
        new = to_numpy(variable)
        assert np.isfinite(new).all(), variable.path
        assert np.abs(new - old).max() > 0, variable.path


def test_evaluation_adds_no_penalty_and_draws_nothing(digits):
    (x, y), _ = digits
    model = digits_network()
    training, _ = trained(model, digits, epochs=1, lipschitz=0.1, images=100)
    before = training.get_weights()
    model.compile("sgd", CROSS_ENTROPY)
    found = training.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert found == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)
    for old, new in zip(before, training.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_saving_and_loading(digits, tmp_path):
    (x, y), _ = digits
    training, _ = trained(
        digits_network(), digits, 1, images=100, sketch=6, order=2, rank=3, seed=5
    )
    training.save(tmp_path / "training.keras")
    loaded = keras.models.load_model(tmp_path / "training.keras")
    assert type(loaded) is lmi.RSLMI
    assert loaded.settings == training.settings
    for one, two in zip(training.multipliers(), loaded.multipliers()):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), training.predict(x, verbose=0))
    loaded.fit(x[:50], y[:50], verbose=0)
    assert lmi.project(loaded, 2.0).constant <= 2.0
    loaded.model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    lip.certify(again, x[:8], y[:8], verbose=0)


def test_a_head_on_frozen_features(digits):
    features = keras.Sequential(
        [keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.GlobalMaxPooling2D()]
    )
    features.build((None, 8, 8, 1))
    features.trainable = False
    head = network((8,), inputs=4, outputs=10, scale=3.0)
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, head(features(inputs)))
    frozen = features.get_weights()
    training, _ = trained(model, digits, epochs=2, lipschitz=1.0, head=head)
    for old, new in zip(frozen, features.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert training.constrained is head
    assert lmi.project(training, 1.0).constant <= 1.0
    assert lmi.eclipse_fast(head).constant < 1.5


def test_sketches_certify_nothing(digits):
    """By construction: there is no graph to read, and no method to ask."""
    (x, y), _ = digits
    training = lmi.RSLMI(digits_network(), 100.0)
    assert penalty(training) == 0
    for attempt in (
        lambda: lip.certify(training, x, y, verbose=0),
        lambda: lip.lipschitz_bound(training),
        lambda: lmi.eclipse_fast(training),
    ):
        with pytest.raises(ValueError, match="has no graph to certify"):
            attempt()
    assert not {"certify", "lipschitz_bound"} & set(dir(training))
    # Multipliers that were never trained, or spoilt, only make the proof worse.
    bound = lmi.eclipse_fast(training.model).constant
    for variable in training.admissibility.trainable_variables:
        variable.assign(np.full(variable.shape, np.nan))
    assert lmi.project(training, 100.0).constant == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"lipschitz": 0.0}, "`lipschitz` must be positive"),
        ({"weight": -1.0}, "`weight` must be positive"),
        ({"margin": 0.7}, r"`margin` must be in \[0, 0.5\]"),
        ({"sketch": 0}, "`sketch` must be an integer of at least 1. Received: sketch=0"),
        ({"order": None}, "`order` must be an integer"),
        ({"rank": 1.5}, "`rank` must be an integer"),
        ({"head": "nobody"}, "`head` must be a nested model"),
        ({"head": 3}, "`head` must be a nested model"),
        ({"head": keras.Sequential()}, "`head` must be a layer of the model"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        lmi.RSLMI(network(), **{"lipschitz": 1.0, **arguments})


def test_the_name_of_a_dense_layer_is_no_head():
    model = network()
    with pytest.raises(ValueError, match="`head` must be a nested model"):
        lmi.RSLMI(model, 1.0, head=model.layers[-1].name)


def test_integers_of_numpy_count():
    training = lmi.RSLMI(network(), 1.0, sketch=np.int64(4), rank=np.int32(3))
    assert type(training.settings["sketch"]) is int and training.get_config()["rank"] == 3


@pytest.mark.parametrize("sketch", [None, 4])
def test_divergence_gives_nan_on_every_backend(sketch):
    model = network()
    training = lmi.RSLMI(model, 1.0, sketch=sketch)
    assert np.isfinite(penalty(training))
    for value in (np.nan, np.inf):
        model.layers[0].kernel.assign(np.full(model.layers[0].kernel.shape, value))
        assert np.isnan(penalty(training))


def dense(*args, **kwargs):
    return keras.layers.Dense(*args, **kwargs)


@pytest.mark.parametrize(
    "layers, words",
    [
        ([dense(4), dense(3)], "two Dense layers are one"),
        ([dense(4, activation="relu")], "must end in a linear Dense layer"),
        ([keras.layers.ReLU(), dense(3)], "no Dense layer before its activation"),
        ([dense(4, activation="exponential"), dense(3)], "exponential"),
        ([dense(4, activation="relu"), keras.layers.LayerNormalization(), dense(3)], "LayerNorm"),
        ([keras.layers.Reshape((3, 2)), dense(4)], "not one of Dense"),
    ],
)
def test_other_networks_are_refused(layers, words):
    model = keras.Sequential(layers)
    model.build((None, 6))
    with pytest.raises(ValueError, match=words):
        lmi.RSLMI(model, lipschitz=1.0)


def test_branches_are_refused():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(6, activation="relu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Add()([inputs, x])))
    with pytest.raises(ValueError, match="the model branches there"):
        lmi.RSLMI(model, lipschitz=1.0)


def test_softmax_and_rescaling():
    model = keras.Sequential(
        [
            keras.layers.Rescaling(0.25, offset=-1.0),
            keras.layers.Dense(9, activation="relu"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(4, activation="softmax"),
        ]
    )
    model.build((None, 6))
    training = lmi.RSLMI(model, lipschitz=0.01)
    assert training.admissibility.lipschitz == pytest.approx(0.04)
    assert lmi.project(training, 0.01).constant <= 0.01
    assert lmi.eclipse_fast(model).constant <= 0.011
