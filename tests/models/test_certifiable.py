import keras
import numpy as np
import pytest
from data import small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext.models.training_state import Schedule, TrainingState


def functional_model():
    """Layers of this library in a functional model, as a user puts them together."""
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


def test_a_functional_model_from_training_to_certificate(tmp_path):
    x, y = images()
    model = functional_model()
    history = model.fit(x, y, batch_size=16, verbose=0).history
    assert set(history) == {"loss", "accuracy", "certified_accuracy"}
    certificate = lip.certify(model, x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is lip.CertifiableModel
    np.testing.assert_array_equal(loaded.certify(x, y, verbose=0).radii, certificate.radii)


@pytest.mark.parametrize(
    "arrange", [lambda thing: [thing], lambda thing: {"head": thing}], ids=["list", "dict"]
)
def test_losses_and_metrics_are_bound_wherever_they_stand(arrange):
    model = certifiable(lip.CertifiableModel)
    model.compile(
        "sgd",
        loss=arrange(lip.losses.EMMA(0.3)),
        metrics=arrange(lip.metrics.CertifiedAccuracy(0.1)),
        weighted_metrics=arrange(lip.metrics.CertifiedRadius()),
    )
    logs = model.evaluate(*vectors(), sample_weight=np.ones(48), return_dict=True, verbose=0)
    assert np.isfinite(list(logs.values())).all()


def test_positional_compile_arguments():
    model = certifiable(lip.CertifiableModel)
    model.compile("sgd", lip.losses.EMMA(0.5))
    history = model.fit(*vectors(), batch_size=12, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_two_models_can_share_a_loss():
    x, y = vectors()
    loss = lip.losses.CertifiedCrossEntropy(1.0, ramp=0)
    models = [certifiable(lip.CertifiableModel) for _ in range(2)]
    alone = []
    for model in models:
        model.compile("sgd", lip.losses.CertifiedCrossEntropy(1.0, ramp=0))
        alone.append(model.evaluate(x, y, verbose=0))
    for model in models:
        model.compile("sgd", loss)
    together = [model.evaluate(x, y, verbose=0) for model in models]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert abs(alone[0] - alone[1]) > 1e-6


def test_ordinary_losses_work():
    model = certifiable(lip.CertifiableModel)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(*vectors(), epochs=5, batch_size=12, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_the_state_is_neither_weight_nor_log_nor_saved(tmp_path, digits):
    (x, y), _ = digits
    model = small_lipnext(depth=1)
    weights = len(model.weights)
    history = model.fit(x[:32], y[:32], verbose=0).history
    assert set(history) == {"loss", "accuracy", "certified_accuracy"}
    assert len(model.weights) == weights
    model.save_weights(tmp_path / "model.weights.h5")
    copy = small_lipnext(depth=1, compile=False)
    copy.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(copy.get_weights()[3], model.get_weights()[3])


def descending():
    model = certifiable(lip.CertifiableModel)
    model.compile(keras.optimizers.SGD(0.1), lip.losses.EMMA(0.5))
    return model


@pytest.fixture(scope="module")
def shared():
    """A compiled model for what asks nothing of its weights: its step is traced once."""
    keras.utils.set_random_seed(1)
    return descending()


@pytest.mark.parametrize("kind", ["none", "list", "one", "CallbackList"])
def test_fit_takes_every_kind_of_callbacks(kind, shared):
    model, epochs = shared, []
    recorder = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    callbacks = {
        "none": None,
        "list": [recorder],
        "one": recorder,
        "CallbackList": keras.callbacks.CallbackList([recorder], model=model, epochs=2, steps=4),
    }[kind]
    history = model.fit(*vectors(), epochs=2, batch_size=12, callbacks=callbacks, verbose=0)
    assert len(history.history["loss"]) == 2
    assert epochs == ([] if kind == "none" else [0, 1])


def progress_during(model, *args, **kwargs):
    seen = []
    recorder = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(float(to_numpy(model._state.progress)))
    )
    model.fit(*args, callbacks=[recorder], verbose=0, **kwargs)
    return seen


def test_progress(shared):
    (x, y), model = vectors(), shared
    seen = progress_during(model, x, y, batch_size=12, epochs=4, validation_data=(x, y))
    np.testing.assert_allclose(seen, [0.25, 0.5, 0.75, 1.0], rtol=1e-5)
    seen = progress_during(model, x, y, batch_size=12, epochs=4, initial_epoch=2)
    np.testing.assert_allclose(seen, [0.75, 1.0], rtol=1e-5)
    assert float(to_numpy(model._state.progress)) == 1


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras, when it finds the end
def test_progress_when_the_number_of_steps_is_unknown(shared):
    (x, y), model = vectors(), shared

    def batches():
        while True:
            yield x[:12], y[:12]

    options = {"steps_per_epoch": 4, "epochs": 2, "shuffle": False}
    seen = progress_during(model, batches(), **options)
    np.testing.assert_allclose(seen, [0.5, 1.0], rtol=1e-5)
    tf = pytest.importorskip("tensorflow")
    unknown = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda a, b: True)
    seen = progress_during(model, unknown.batch(12), epochs=4, shuffle=False)
    # The first epoch counts its steps; from then on progress runs within epochs. TensorFlow may
    # count the step that finds the end of the data.
    np.testing.assert_allclose(seen, [0.0, 0.5, 0.75, 1.0], atol=1 / 16 + 1e-5)


def test_an_interrupted_fit_leaves_no_trace(digits):
    (x, y), _ = digits
    model = small_lipnext(depth=1, learning_rate=0.02)

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
    assert float(to_numpy(model._state.middle)) < 0
    assert float(to_numpy(model._state.progress)) == 1


def test_the_head_must_be_linear():
    inputs = keras.Input((6,))
    with pytest.raises(ValueError, match=r"ends in a linear head.*\(MaxMin\).*Softmax belongs"):
        lip.CertifiableModel(inputs, lip.layers.MaxMin()(inputs))
    images = keras.Input((4, 4, 6))
    with pytest.raises(ValueError, match=r"output shape \(None, 4, 4, 6\)"):
        lip.CertifiableModel(images, lip.layers.BetaAbs(0.5)(images))


def test_a_prediction_at_each_position():
    """Loss and metric are those of the positions as samples; the certificate's, but for K."""
    inputs = keras.Input((3, 4, 6))
    x = lip.layers.BetaAbs(0.5)(lip.layers.OrthogonalDense(6)(inputs))
    model = lip.CertifiableModel(inputs, lip.layers.NormalizedDense(3)(x))
    flat_input = keras.Input((6,))
    z = lip.layers.BetaAbs(0.5)(lip.layers.OrthogonalDense(6)(flat_input))
    flat = lip.CertifiableModel(flat_input, lip.layers.NormalizedDense(3)(z))
    flat.set_weights(model.get_weights())
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(8, 3, 4, 6)).astype("float32"), rng.integers(0, 3, (8, 3, 4))
    logs = []
    for network, inputs, labels in (
        (model, x, y),
        (model, x, y[..., None]),
        (model, x, np.eye(3, dtype="float32")[y]),
        (flat, x.reshape(-1, 6), y.ravel()),
    ):
        metric = lip.metrics.CertifiedAccuracy(0.05)
        network.compile("sgd", lip.losses.EMMA(0.1, ramp=0), metrics=[metric])
        logs.append(network.evaluate(inputs, labels, batch_size=96, return_dict=True, verbose=0))
    for found in logs[:3]:
        assert found == pytest.approx(logs[3], rel=1e-5)
    certificate = model.certify(x, y, epsilons=(0.05,), verbose=0)
    assert certificate.certified_accuracy[0.05] == pytest.approx(logs[0]["certified_accuracy"])
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"]).all()
    y[0, 0, 0] = 3
    with pytest.raises(ValueError, match="3 classes: labels are whole numbers"):
        model.fit(x, y, verbose=0)


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
    model = functional_model()
    assert type(keras.models.clone_model(model)) is lip.CertifiableModel
    x, y = images(8)
    clone = keras.models.clone_model(small_lipnext())
    # Keras clones a model of another constructor as a plain functional one, which certifies too.
    clone.set_weights(small_lipnext().get_weights())
    x = x[:, ::4, ::4, :1]
    assert len(lip.certify(clone, x, y, verbose=0).radii) == 8
    with pytest.raises(ValueError, match=r"clone_model.*type\(model\).from_config"):
        clone.fit(x, y, verbose=0)


@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_hdf5_files_are_refused_when_they_are_written(suffix, tmp_path):
    for model in (small_lipnext(), mixing_model()):
        with pytest.raises(ValueError, match=r"save it as model.save\('name.keras'\)"):
            model.save(tmp_path / f"model{suffix}")
        model.save_weights(tmp_path / "model.weights.h5")
        model.load_weights(tmp_path / "model.weights.h5")


def test_steps_are_counted_whatever_the_order_of_the_callbacks_threads():
    """Keras dispatches batch ends to a pool of threads, which may finish in any order."""
    schedule = Schedule(TrainingState())
    schedule.set_params({"epochs": 4, "steps": None})
    schedule.on_epoch_begin(0)
    for batch in (0, 3, 1, 2):
        schedule.on_train_batch_end(batch)
    schedule.on_epoch_end(0)
    assert schedule.state.steps == 4
    schedule.on_epoch_begin(1)
    assert float(to_numpy(schedule.state.increment)) == pytest.approx(1 / 16)


def guides_step(base):
    """The step that Keras' guides write for this backend, for training and evaluation."""
    if keras.backend.backend() == "jax":
        import jax

        class Guide(base):
            def compute_loss_and_updates(
                self, trainable_variables, non_trainable_variables, x, y, training=False
            ):
                y_pred, non_trainable_variables = self.stateless_call(
                    trainable_variables, non_trainable_variables, x, training=training
                )
                loss = self.compute_loss(x, y, y_pred)
                return loss, (y_pred, non_trainable_variables)

            def train_step(self, state, data):
                trainable, non_trainable, optimizer, metrics = state
                x, y = data
                grad_fn = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
                (loss, (y_pred, non_trainable)), grads = grad_fn(
                    trainable, non_trainable, x, y, training=True
                )
                trainable, optimizer = self.optimizer.stateless_apply(optimizer, grads, trainable)
                logs, metrics = self.updated(metrics, loss, y, y_pred)
                return logs, (trainable, non_trainable, optimizer, metrics)

            def test_step(self, state, data):
                trainable, non_trainable, metrics = state
                x, y = data
                loss, (y_pred, non_trainable) = self.compute_loss_and_updates(
                    trainable, non_trainable, x, y, training=False
                )
                logs, metrics = self.updated(metrics, loss, y, y_pred)
                return logs, (trainable, non_trainable, metrics)

            def updated(self, metrics_variables, loss, y, y_pred):
                new, logs = [], {}
                for metric in self.metrics:
                    these = metrics_variables[len(new) : len(new) + len(metric.variables)]
                    if metric.name == "loss":
                        these = metric.stateless_update_state(these, loss)
                    else:
                        these = metric.stateless_update_state(these, y, y_pred)
                    logs[metric.name] = metric.stateless_result(these)
                    new += these
                return logs, new

        return Guide
    if keras.backend.backend() == "torch":
        import torch

        class Guide(base):
            def train_step(self, data):
                x, y = data
                self.zero_grad()
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred)
                loss.backward()
                trainable_weights = list(self.trainable_weights)
                gradients = [v.value.grad for v in trainable_weights]
                with torch.no_grad():
                    self.optimizer.apply(gradients, trainable_weights)
                return self.updated(y, y_pred, loss)

            def test_step(self, data):
                x, y = data
                y_pred = self(x, training=False)
                return self.updated(y, y_pred, self.compute_loss(y=y, y_pred=y_pred))

            def updated(self, y, y_pred, loss):
                for metric in self.metrics:
                    if metric.name == "loss":
                        metric.update_state(loss)
                    else:
                        metric.update_state(y, y_pred)
                return {m.name: m.result() for m in self.metrics}

        return Guide

    import tensorflow as tf

    class Guide(base):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return self.updated(y, y_pred, loss)

        def test_step(self, data):
            x, y = data
            y_pred = self(x, training=False)
            return self.updated(y, y_pred, self.compute_loss(y=y, y_pred=y_pred))

        def updated(self, y, y_pred, loss):
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics}

    return Guide


def certifiable(cls, **kwargs):
    inputs = keras.Input((6,))
    x = lip.layers.BetaAbs(1.0)(lip.layers.OrthogonalDense(6)(inputs))
    return cls(inputs, lip.layers.NormalizedDense(4, name="head")(x), **kwargs)


def vectors(n=48):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6)).astype("float32"), rng.integers(0, 4, n)


@pytest.mark.parametrize("ramp", [0.75, pytest.param(1.0, marks=pytest.mark.once)])
def test_a_step_as_the_guides_write_it_trains_as_keras_own(ramp):
    """Loss with its ramp, certified metrics, weights: all as with the step of Keras itself."""
    x, y = vectors()
    models, logs = [], []
    initial = certifiable(lip.CertifiableModel).get_weights()
    for cls in (lip.CertifiableModel, guides_step(lip.CertifiableModel)):
        model = certifiable(cls)
        model.set_weights(initial)
        model.compile(
            lip.optimizers.ManifoldAdam(0.05),
            lip.losses.EMMA(1.0, temperature=4.0, ramp=ramp),
            metrics=["accuracy", lip.metrics.CertifiedRadius(), lip.metrics.CertifiedAccuracy(0.3)],
        )
        history = model.fit(
            x, y, batch_size=16, epochs=4, shuffle=False, validation_data=(x, y), verbose=0
        ).history
        models.append(model)
        logs.append(history)
    assert logs[0].keys() == logs[1].keys()
    for key, values in logs[0].items():
        np.testing.assert_allclose(logs[1][key], values, rtol=1e-5, err_msg=key)
    for own, guides in zip(*(model.get_weights() for model in models)):
        np.testing.assert_allclose(guides, own, rtol=1e-5, atol=1e-6)
    radii = models[1].certify(x, y, verbose=0)
    expected = np.where(radii.correct, radii.radii, 0).mean()
    assert logs[1]["val_certified_radius"][-1] == pytest.approx(expected, rel=1e-3)


def test_a_step_of_ones_own_in_a_lipnext(digits):
    (x, y), _ = digits
    model = guides_step(lip.LipNeXt)(
        input_shape=(8, 8, 1), num_classes=10, depth=1, width=16, patch_size=2, neck="pool"
    )
    history = model.fit(x[:64], y[:64], validation_data=(x[:64], y[:64]), verbose=0)
    certified = model.certify(x[:64], y[:64], epsilons=[36 / 255], verbose=0).certified_accuracy
    logs = {k: v[-1] for k, v in history.history.items()}
    assert logs["val_certified_accuracy"] == pytest.approx(certified[36 / 255], abs=1 / 64)
    assert set(logs) == {
        prefix + name
        for prefix in ("", "val_")
        for name in ("loss", "accuracy", "certified_accuracy")
    }


def test_a_step_of_ones_own_that_ends_in_keras_own():
    """Steps within steps count once."""

    class Timed(lip.CertifiableModel):
        def train_step(self, *args):
            return super().train_step(*args)

    x, y = vectors()
    model = certifiable(Timed)
    model.compile("sgd", lip.losses.EMMA(1.0))
    np.testing.assert_allclose(
        progress_during(model, x, y, batch_size=12, epochs=4), [0.25, 0.5, 0.75, 1.0], rtol=1e-5
    )
    model.fit(x, y, batch_size=12, epochs=1, steps_per_epoch=2, verbose=0)
    progress = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: progress.append(float(to_numpy(model._state.progress)))
    )
    model.fit(x, y, batch_size=12, epochs=3, callbacks=[watch], verbose=0)
    np.testing.assert_allclose(progress, [1 / 3, 2 / 3, 1.0], rtol=1e-5)


def mean_radius(model, x, y):
    certificate = model.certify(x, y, verbose=0)
    return np.where(certificate.correct, certificate.radii, 0).mean()


def mixing_model():
    """A model whose constant grows if its mixing kernel leaves the manifold."""
    inputs = keras.Input((2, 2, 8))
    x = lip.layers.LipNeXtBlock()(inputs)
    return lip.CertifiableModel(inputs, lip.layers.NormalizedDense(3)(lip.layers.L2Pool()(x)))


def small_images(n=48):
    rng = np.random.default_rng(0)
    return rng.random((n, 2, 2, 8)).astype("float32"), rng.integers(0, 3, n)


AVERAGING = {
    "adam": lambda: keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.8),
    "muon": lambda: keras.optimizers.Muon(0.05, use_ema=True, ema_momentum=0.8),
    "overwriting": lambda: keras.optimizers.Adam(
        0.1, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=2
    ),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.8)
    ),
    "manifold": lambda: lip.optimizers.ManifoldAdam(0.1, use_ema=True, ema_momentum=0.8),
}


@pytest.mark.parametrize(
    "optimizer, swapped",
    [
        ("adam", True),
        pytest.param("muon", True, marks=pytest.mark.once),
        ("overwriting", False),
        ("scaled", False),
        ("manifold", True),
    ],
)
def test_averaged_weights_are_put_back(optimizer, swapped):
    """After `fit`, and in its validation, no metric is above the certificate; K stays 1."""
    x, y = small_images()
    model = mixing_model()
    model.compile(
        AVERAGING[optimizer](), lip.losses.EMMA(0.5), metrics=[lip.metrics.CertifiedRadius()]
    )
    seen = []

    def look(logs):
        seen.append((logs["certified_radius"], mean_radius(model, x, y)))

    callbacks = [keras.callbacks.LambdaCallback(on_test_end=look)]
    if swapped:
        callbacks += [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
    for epochs in (2, 1):
        history = model.fit(
            x,
            y,
            epochs=epochs,
            batch_size=12,
            validation_data=(x, y),
            callbacks=callbacks,
            verbose=0,
        )
        assert np.isfinite(history.history["loss"]).all()
        certificate = model.certify(x, y, verbose=0)
        assert 1 - 1e-6 < certificate.lipschitz_bound < 1 + 1e-4
        np.testing.assert_allclose(
            np.linalg.norm(to_numpy(model.head.kernel), axis=0), 1, atol=1e-4
        )
        logs = model.evaluate(x, y, batch_size=12, return_dict=True, verbose=0)
        radius = np.where(certificate.correct, certificate.radii, 0).mean()
        assert logs["certified_radius"] == pytest.approx(radius, rel=1e-4)
    assert len(seen) == 3
    for metric, certified in seen:
        assert 0 < metric == pytest.approx(certified, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "manifold"])
def test_averages_are_evaluated_on_their_manifold(optimizer):
    """Alone, outside of `fit`; afterwards the trained weights are in the model again."""
    x, y = small_images()
    model = mixing_model()
    model.compile(
        AVERAGING[optimizer](), lip.losses.EMMA(0.5), metrics=[lip.metrics.CertifiedRadius()]
    )
    for _ in range(4):
        model.train_on_batch(x, y)
    before, seen = model.get_weights(), []

    def look(logs):
        certificate = model.certify(x, y, verbose=0)
        radius = np.where(certificate.correct, certificate.radii, 0).mean()
        seen.append((certificate.lipschitz_bound, radius))

    callbacks = [
        keras.callbacks.LambdaCallback(on_test_end=look),  # before the weights are swapped back
        keras.callbacks.SwapEMAWeights(),
    ]
    logs = model.evaluate(x, y, 48, callbacks=callbacks, return_dict=True, verbose=0)
    ((bound, radius),) = seen
    assert 1 - 1e-6 < bound < 1 + 1e-4
    assert logs["certified_radius"] == pytest.approx(radius, rel=1e-4)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_weights_off_the_manifold_cost_the_metrics_what_they_cost_the_certificate():
    x, y = small_images()
    model = mixing_model()
    model.compile(
        "sgd",
        lip.losses.EMMA(0.5),
        metrics=[lip.metrics.CertifiedRadius(), lip.metrics.CertifiedAccuracy(0.01)],
    )
    block = model.layers[1]
    kernels = [(k, np.array(to_numpy(k))) for k in (block.mixing.kernel, block.dense.kernel)]
    for noise in (1e-5, 1e-3, 0.1):
        rng = np.random.default_rng(1)
        for kernel, exact in kernels:
            kernel.assign(exact + rng.normal(scale=noise, size=kernel.shape))
        certificate = model.certify(x, y, epsilons=[0.01], verbose=0)
        assert certificate.lipschitz_bound > 1 + noise
        logs = model.evaluate(x, y, batch_size=48, return_dict=True, verbose=0)
        expected = np.where(certificate.correct, certificate.radii, 0).mean()
        assert 0.999 * expected < logs["certified_radius"] < expected * (1 + 2e-6)
        assert logs["certified_accuracy"] <= certificate.certified_accuracy[0.01] + 1e-6
    on_batch = model.test_on_batch(x, y, return_dict=True)
    assert float(on_batch["certified_radius"]) == pytest.approx(logs["certified_radius"])


def test_in_training_metrics_follow_the_head_from_step_to_step():
    """From the first one on, when Keras has not built its metrics yet on some backends."""
    x, y = vectors()
    model = certifiable(lip.CertifiableModel)
    model.compile(
        keras.optimizers.SGD(5.0), lip.losses.EMMA(0.5), metrics=[lip.metrics.CertifiedRadius()]
    )
    (metric,) = model._find_metrics()
    before = to_numpy(metric._distances)
    model.fit(x, y, batch_size=16, verbose=0)
    assert np.abs(to_numpy(metric._distances) - before).max() > 1e-2


def test_weights_that_cannot_be_certified_have_metrics_of_0():
    x, y = small_images()
    model = mixing_model()
    model.compile("sgd", lip.losses.EMMA(0.5), metrics=[lip.metrics.CertifiedAccuracy(0.0)])
    kernel = model.layers[1].dense.kernel
    kernel.assign(np.zeros(kernel.shape))
    logs = model.evaluate(x, y, batch_size=48, return_dict=True, verbose=0)
    assert logs["certified_accuracy"] == 0


BAD_LABELS = {
    "negative": lambda y: np.where(np.arange(len(y)) == 30, -1, y),
    "too large": lambda y: np.where(np.arange(len(y)) == 30, 4, y),
    "fractional": lambda y: np.where(np.arange(len(y)) == 30, 1.5, y).astype("float32"),
    "column": lambda y: np.where(np.arange(len(y)) == 30, 7, y)[:, None],
    "shares": lambda y: np.where(np.arange(len(y))[:, None] == 30, np.nan, np.eye(4)[y]),
}


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 4

    def __getitem__(self, index):
        part = slice(12 * index, 12 * index + 12)
        return self.x[part], self.y[part]


@pytest.mark.parametrize(
    "kind, source",
    [(kind, "data set") for kind in BAD_LABELS]
    + [("negative", source) for source in ("arrays", "validation", "evaluate", "batch")],
)
def test_labels_outside_the_classes_are_an_error(kind, source, shared):
    """With the first batch that has them, weights being those of the batches before."""
    x, y = vectors()
    bad = BAD_LABELS[kind](y)
    # Given labels of another rank, TensorFlow would trace a step for labels of any rank.
    model = shared if bad.ndim == 1 else descending()
    before = [np.array(w) for w in model.get_weights()]
    calls = {
        "arrays": lambda: model.fit(x, bad, batch_size=12, verbose=0),
        "validation": lambda: model.fit(x, y, 12, validation_data=(x, bad), verbose=0),
        "data set": lambda: model.fit(Batches(x, bad), shuffle=False, verbose=0),
        "evaluate": lambda: model.evaluate(Batches(x, bad), verbose=0),
        "batch": lambda: model.train_on_batch(x, bad),
    }
    message = r"at least 0" if kind == "shares" else r"4 classes: labels are whole numbers"
    with pytest.raises(Exception, match=message):
        calls[source]()
    after = model.get_weights()
    if source == "data set":
        assert all(np.isfinite(w).all() for w in after)
        assert any((a != b).any() for a, b in zip(after, before))
    else:
        for a, b in zip(after, before):
            np.testing.assert_array_equal(a, b)
    assert np.isfinite(model.evaluate(x, y, batch_size=12, verbose=0))


def test_a_first_batch_with_bad_labels_costs_no_weights():
    """JAX's trainer has taken them out of the model by then."""
    x, y = vectors()
    model = certifiable(lip.CertifiableModel)
    model.compile(keras.optimizers.SGD(0.1), lip.losses.EMMA(0.5))
    before = model.get_weights()
    for call in (model.fit, model.evaluate):
        with pytest.raises(Exception, match="4 classes"):
            call(Batches(x, y - 9), verbose=0)
        for a, b in zip(model.get_weights(), before):
            np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.data")
@pytest.mark.parametrize(
    "kind, options",
    [
        ("negative", {"jit_compile": True}),
        ("column", {"jit_compile": True}),
        ("shares", {"jit_compile": True, "steps_per_execution": 3}),
        ("too large", {"jit_compile": False, "steps_per_execution": 3}),
        ("fractional", {"run_eagerly": True}),
    ],
)
def test_labels_of_a_tf_data_set_are_checked_in_front_of_what_xla_compiles(kind, options):
    """XLA leaves checks out of what it compiles: weights became NaN without a word."""
    import tensorflow as tf

    x, y = vectors()
    bad = BAD_LABELS[kind](y)
    inputs = keras.Input((6,))
    model = lip.CertifiableModel(inputs, lip.layers.NormalizedDense(4)(inputs))
    model.compile(keras.optimizers.SGD(0.1), lip.losses.EMMA(0.5), **options)
    before = model.get_weights()
    batches = tf.data.Dataset.from_tensor_slices((x, bad)).batch(12)
    message = r"at least 0" if kind == "shares" else r"4 classes: labels are whole numbers"
    value = {"negative": "-1", "too large": "4", "fractional": "1.5", "column": "7"}
    message = rf"(?s){message}.*Received:\W*{value.get(kind, 'nan')}\b"
    for call in (
        lambda: model.evaluate(batches, verbose=0),
        lambda: model.fit(batches.skip(2), shuffle=False, verbose=0),
        lambda: model.train_on_batch(x[24:36], bad[24:36]),
    ):
        with pytest.raises(Exception, match=message):
            call()
        for a, b in zip(model.get_weights(), before):
            np.testing.assert_array_equal(a, b)
    assert model.predict(batches, verbose=0).shape == (48, 4)  # takes no labels
    with pytest.raises(Exception, match=message):
        model.fit(batches, shuffle=False, verbose=0)  # whose third batch it is
    after = model.get_weights()
    assert all(np.isfinite(w).all() for w in after)
    assert any((a != b).any() for a, b in zip(after, before))
    logs = model.fit(batches.take(2), shuffle=False, verbose=0).history
    assert np.isfinite(logs["loss"]).all()


def test_labels_of_other_losses_are_their_own_affair():
    x, y = vectors()
    model = certifiable(lip.CertifiableModel)
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    model.compile("sgd", ignoring)
    y[3] = -1
    assert np.isfinite(model.fit(x, y, batch_size=12, verbose=0).history["loss"]).all()


def test_one_logit():
    inputs = keras.Input((6,))
    x = lip.layers.OrthogonalDense(6)(inputs)
    model = lip.CertifiableModel(inputs, lip.layers.NormalizedDense(1)(x))
    for part in ({"loss": lip.losses.EMMA(0.5)}, {"metrics": [lip.metrics.CertifiedRadius()]}):
        with pytest.raises(ValueError, match=r"NormalizedDense\(2\).*BinaryCrossentropy"):
            model.compile("sgd", **part)
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    x, y = vectors()
    assert np.isfinite(model.fit(x, y % 2, batch_size=12, verbose=0).history["loss"]).all()
    assert model.certify(x, y % 2, verbose=0).predictions.shape == (len(x),)
