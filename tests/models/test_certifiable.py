import keras
import numpy as np
import pytest
import tensorflow as tf
from data import small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext.models.training_state import Schedule, TrainingState


def design_card_model():
    """The functional model of the design card, at its shapes."""
    inputs = keras.Input((32, 32, 3))
    x = lip.layers.PatchEmbedding(patch_size=4, units=128)(inputs)
    x = lip.layers.OrthogonalDense(128, activation="relu")(x)  # any 1-Lipschitz activation
    x = lip.layers.SpatialShift(ratio=1 / 8)(x)
    x = lip.layers.OrthogonalDense(128)(x)
    x = lip.layers.BetaAbs(beta=0.5)(x)
    x = lip.layers.L2Pool()(x)
    outputs = lip.layers.NormalizedDense(10)(x)
    model = lip.CertifiableModel(inputs, outputs)  # a keras.Model that knows its constants
    model.compile(
        lip.optimizers.ManifoldAdam(1e-3),
        loss=lip.losses.EMMA(epsilon=36 / 255),
        metrics=["accuracy", lip.metrics.CertifiedAccuracy(36 / 255)],
    )
    return model


def images(n=32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((n, 32, 32, 3)).astype("float32"), rng.integers(0, 10, n)


def test_the_design_cards_model(tmp_path):
    x, y = images()
    model = design_card_model()
    history = model.fit(x, y, epochs=2, batch_size=16, verbose=0).history
    assert set(history) == {"loss", "accuracy", "certified_accuracy"}
    certificate = lip.certify(model, x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is lip.CertifiableModel
    np.testing.assert_array_equal(loaded.certify(x, y, verbose=0).radii, certificate.radii)
    loaded.fit(x, y, verbose=0)


@pytest.mark.parametrize(
    "arrange", [lambda thing: [thing], lambda thing: {"head": thing}], ids=["list", "dict"]
)
def test_losses_and_metrics_are_bound_wherever_they_stand(arrange, digits):
    (x, y), _ = digits
    model = small_lipnext()
    model.compile(
        "sgd",
        loss=arrange(lip.losses.EMMA(0.3)),
        metrics=arrange(lip.metrics.CertifiedAccuracy(0.1)),
        weighted_metrics=arrange(lip.metrics.CertifiedRadius()),
    )
    logs = model.evaluate(x[:32], y[:32], sample_weight=np.ones(32), return_dict=True, verbose=0)
    assert np.isfinite(list(logs.values())).all()


def test_positional_compile_arguments(digits):
    (x, y), _ = digits
    model = small_lipnext()
    model.compile("sgd", lip.losses.EMMA(0.3))
    history = model.fit(x[:32], y[:32], verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_two_models_can_share_a_loss(digits):
    (x, y), _ = digits
    x, y = x[:64], y[:64]
    loss = lip.losses.CertifiedCrossEntropy(1.0, ramp=0)
    models = [small_lipnext(num_classes=10, compile=False) for _ in range(2)]
    alone = []
    for model in models:
        model.compile("sgd", lip.losses.CertifiedCrossEntropy(1.0, ramp=0))
        alone.append(model.evaluate(x, y, verbose=0))
    for model in models:
        model.compile("sgd", loss)
    together = [model.evaluate(x, y, verbose=0) for model in models]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert abs(alone[0] - alone[1]) > 1e-6


def test_ordinary_losses_work(digits):
    (x, y), _ = digits
    model = small_lipnext(compile=False)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(x[:64], y[:64], epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_the_state_is_neither_weight_nor_log_nor_saved(tmp_path, digits):
    (x, y), _ = digits
    model = small_lipnext()
    weights = len(model.weights)
    history = model.fit(x[:32], y[:32], verbose=0).history
    assert set(history) == {"loss", "accuracy", "certified_accuracy"}
    assert len(model.weights) == weights
    np.testing.assert_allclose(
        to_numpy(model._state.distances),
        lip.certification.radius.pairwise_distances_float64(to_numpy(model.head.kernel)),
        atol=0.05,
    )
    model.save_weights(tmp_path / "model.weights.h5")
    copy = small_lipnext(compile=False)
    copy.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(copy.get_weights()[3], model.get_weights()[3])


@pytest.mark.parametrize("kind", ["none", "list", "one", "CallbackList"])
def test_fit_takes_every_kind_of_callbacks(kind, digits):
    (x, y), _ = digits
    model = small_lipnext()
    epochs = []
    recorder = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    callbacks = {
        "none": None,
        "list": [recorder],
        "one": recorder,
        "CallbackList": keras.callbacks.CallbackList([recorder], model=model, epochs=2, steps=1),
    }[kind]
    history = model.fit(x[:32], y[:32], epochs=2, callbacks=callbacks, verbose=0)
    assert len(history.history["loss"]) == 2
    assert epochs == ([] if kind == "none" else [0, 1])


def progress_during(model, *args, **kwargs):
    seen = []
    recorder = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(float(to_numpy(model._state.progress)))
    )
    model.fit(*args, callbacks=[recorder], verbose=0, **kwargs)
    return seen


def test_progress(digits):
    (x, y), _ = digits
    x, y = x[:40], y[:40]
    model = small_lipnext()
    seen = progress_during(model, x, y, batch_size=10, epochs=4, validation_data=(x, y))
    np.testing.assert_allclose(seen, [0.25, 0.5, 0.75, 1.0], rtol=1e-5)
    seen = progress_during(model, x, y, batch_size=10, epochs=4, initial_epoch=2)
    np.testing.assert_allclose(seen, [0.75, 1.0], rtol=1e-5)
    assert float(to_numpy(model._state.progress)) == 1


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras, when it finds the end
def test_progress_when_the_number_of_steps_is_unknown(digits):
    (x, y), _ = digits

    def batches():
        while True:
            yield x[:8], y[:8]

    options = {"steps_per_epoch": 4, "epochs": 2, "shuffle": False}
    model = small_lipnext()
    seen = progress_during(model, batches(), **options)
    np.testing.assert_allclose(seen, [0.5, 1.0], rtol=1e-5)
    unknown = tf.data.Dataset.from_tensor_slices((x[:40], y[:40])).filter(lambda a, b: True)
    seen = progress_during(model, unknown.batch(10), epochs=4, shuffle=False)
    # The first epoch counts its steps; from then on progress runs within epochs. TensorFlow may
    # count the step that finds the end of the data.
    np.testing.assert_allclose(seen, [0.0, 0.5, 0.75, 1.0], atol=1 / 16 + 1e-5)


def test_an_interrupted_fit_leaves_no_trace(digits):
    (x, y), _ = digits
    model = small_lipnext(learning_rate=0.02)

    def stop(epoch, logs):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(
            x[:32],
            y[:32],
            epochs=4,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=stop)],
            verbose=0,
        )
    assert float(to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.02)
    assert float(to_numpy(model.optimizer.decay)) == 1
    assert float(to_numpy(model._state.progress)) == 1


def test_the_head_must_be_linear():
    inputs = keras.Input((6,))
    with pytest.raises(ValueError, match=r"ends in a linear head.*\(MaxMin\).*Softmax belongs"):
        lip.CertifiableModel(inputs, lip.layers.MaxMin()(inputs))
    images = keras.Input((4, 4, 6))
    with pytest.raises(ValueError, match=r"output shape \(None, 4, 4, 3\)"):
        lip.CertifiableModel(images, lip.layers.NormalizedDense(3)(images))


def test_unknown_arguments_are_named():
    inputs = keras.Input((6,))
    with pytest.raises(ValueError, match=r"does not know the arguments \['foo'\]"):
        lip.CertifiableModel(inputs, lip.layers.NormalizedDense(3)(inputs), foo=1)


def test_a_nominal_constant_other_than_one_reaches_loss_and_metric():
    inputs = keras.Input((6,))
    x = lip.layers.OrthogonalDense(6)(keras.layers.Rescaling(2.0)(inputs))
    model = lip.CertifiableModel(inputs, lip.layers.NormalizedDense(4)(x))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 6)).astype("float32"), rng.integers(0, 4, 200)
    loss = lip.losses.CertifiedCrossEntropy(0.3, ramp=0)
    model.compile("sgd", loss, metrics=[lip.metrics.CertifiedRadius()])
    logs = model.evaluate(x, y, return_dict=True, verbose=0)
    certificate = lip.certify(model, x, y, verbose=0)
    assert certificate.body_constant == pytest.approx(2, rel=1e-5)
    radii = np.where(certificate.correct, certificate.radii, 0)
    assert logs["certified_radius"] == pytest.approx(radii.mean(), rel=1e-4)
    kernel = to_numpy(model.head.kernel)
    distances = 2 * np.linalg.norm(kernel[:, :, None] - kernel[:, None, :], axis=0)
    logits = to_numpy(model(x))
    worst = logits + 0.3 * distances[y]
    worst = worst - worst[np.arange(200), y][:, None]
    expected = np.log(np.exp(worst).sum(axis=1)).mean()
    assert logs["loss"] == pytest.approx(expected, rel=1e-4)


def test_layers_whose_constant_can_grow_are_refused():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(6, name="free")(inputs)
    with pytest.raises(ValueError, match=r"Layer 'free' \(Dense\).*free to grow in training"):
        lip.CertifiableModel(inputs, lip.layers.NormalizedDense(3)(x))


@pytest.mark.parametrize("requested", ["auto", False, True])
def test_jit_is_saved_as_it_was_asked_for(requested):
    """Not as what "auto" became on this backend, which may be wrong for the next."""
    model = small_lipnext()
    assert model.get_compile_config()["jit_compile"] == "auto"
    model.compile("sgd", lip.losses.EMMA(0.3), jit_compile=requested)
    assert model.get_compile_config()["jit_compile"] == requested
    assert small_lipnext(compile=False).get_compile_config() == {}


def test_clones():
    model = design_card_model()
    assert type(keras.models.clone_model(model)) is lip.CertifiableModel
    x, y = images(8)
    clone = keras.models.clone_model(small_lipnext())
    # Keras clones a model of another constructor as a plain functional one, which certifies too.
    clone.set_weights(small_lipnext().get_weights())
    assert len(lip.certify(clone, x[:, ::4, ::4, :1], y, verbose=0).radii) == 8


def test_steps_are_counted_whatever_the_order_of_the_callbacks_threads():
    """Keras dispatches batch ends to a pool of threads, which may finish in any order."""
    schedule = Schedule(TrainingState(3))
    schedule.set_params({"epochs": 4, "steps": None})
    schedule.on_epoch_begin(0)
    for batch in (0, 3, 1, 2):
        schedule.on_train_batch_end(batch)
    schedule.on_epoch_end(0)
    assert schedule.state.steps == 4
    schedule.on_epoch_begin(1)
    assert float(to_numpy(schedule.state.increment)) == pytest.approx(1 / 16)
