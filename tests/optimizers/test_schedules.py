import keras
import numpy as np
import pytest
from data import small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext.optimizers import ManifoldAdam, ManifoldMuon, cosine

WARMUP = 0.25


def by_hand(t, warmup):
    falling = (1 + np.cos(np.pi * (t - warmup) / (1 - warmup))) / 2
    return np.where(t < warmup, t / (warmup or 1), falling)


def factors_of(model, *data, **options):
    """The optimizer's factor in the last step of each epoch of a `fit`."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    factors = []
    recorder = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: factors.append(float(to_numpy(optimizer.decay)))
    )
    model.fit(*data, shuffle=False, callbacks=[recorder], verbose=0, **options)
    return factors


def network(optimizer, cls=lip.CertifiableModel):
    inputs = keras.Input((8, 8, 1))
    model = cls(inputs, lip.layers.NormalizedDense(10)(keras.layers.Flatten()(inputs)))
    model.compile(optimizer, lip.losses.EMMA(0.1))
    return model


@pytest.mark.parametrize("warmup", [0.0, WARMUP, 0.9])
def test_cosine(warmup):
    t = np.linspace(0, 1, 21)
    values = [float(to_numpy(cosine(warmup)(keras.ops.cast(share, "float32")))) for share in t]
    np.testing.assert_allclose(values, by_hand(t, warmup), atol=1e-6)


@pytest.mark.parametrize("warmup", [-0.1, 1.0, "a"])
def test_bad_warmup(warmup):
    with pytest.raises(ValueError, match="`warmup` must be"):
        cosine(warmup)


def test_rates_follow_the_schedule_step_by_step(digits):
    """Two steps an epoch, their values at the middles of eighths; none of it outside `fit`."""
    (x, y), _ = digits
    x, y = x[:32], y[:32]
    model = small_lipnext(depth=1)
    ends = (2 * np.arange(4) + 1.5) / 8  # of the second steps
    expected = by_hand(ends, 0)
    fit = {"batch_size": 16, "epochs": 4}
    np.testing.assert_allclose(factors_of(model, x, y, **fit), expected, rtol=1e-5)
    # Each `fit` begins anew, whatever came before; one that begins later begins in the middle.
    factors = factors_of(model, x, y, **fit, initial_epoch=2)
    np.testing.assert_allclose(factors, expected[2:], rtol=1e-5)
    model.train_on_batch(x[:16], y[:16])
    assert float(to_numpy(model.optimizer.decay)) == 1


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras, when it finds the end
def test_an_epoch_of_unknown_length_has_the_value_of_its_middle():
    tf = pytest.importorskip("tensorflow")
    model = network(ManifoldMuon(0.01, schedule=cosine(WARMUP)))
    x, y = np.zeros((20, 8, 8, 1), "float32"), np.zeros(20, int)
    data = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda a, b: True).batch(10)
    factors = factors_of(model, data, epochs=4)
    assert factors[0] == pytest.approx(0.5)
    if keras.backend.backend() != "tensorflow":  # where the step that finds the end counts, too
        t = np.arange(1, 4) / 4 + 3 / 16  # from then on each step has its own
        np.testing.assert_allclose(factors[1:], by_hand(t, WARMUP), atol=1e-5)


def test_the_schedule_reaches_an_optimizer_that_scales_its_loss_and_is_saved(digits, tmp_path):
    (x, y), _ = digits
    optimizer = ManifoldAdam(1e-3, schedule=cosine(WARMUP))
    model = network(keras.optimizers.LossScaleOptimizer(optimizer))
    expected = by_hand((np.arange(3) + 0.5) / 3, WARMUP)
    fit = {"batch_size": 16, "epochs": 3}
    np.testing.assert_allclose(factors_of(model, x[:16], y[:16], **fit), expected, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    np.testing.assert_allclose(factors_of(loaded, x[:16], y[:16], **fit), expected, rtol=1e-5)


def test_a_model_that_the_user_compiles_keeps_the_rate_it_was_given(digits):
    (x, y), _ = digits
    model = small_lipnext(depth=1)
    model.compile(ManifoldAdam(0.003), model.loss)
    assert factors_of(model, x[:16], y[:16], epochs=2) == [1, 1]


@pytest.mark.parametrize("decayed", [True, False])
def test_files_from_before_schedules_keep_their_cosine(decayed, digits):
    (x, y), _ = digits
    model = small_lipnext(depth=1)
    before, config = model.get_compile_config(), {**model.get_config(), "cosine_decay": decayed}
    del before["optimizer"]["config"]["schedule"]
    model = lip.LipNeXt.from_config(config)
    model.compile_from_config(before)
    if not decayed:
        assert model.optimizer.schedule is None
        return
    expected = by_hand(np.array([0.25, 0.75]), 0)
    np.testing.assert_allclose(factors_of(model, x[:16], y[:16], epochs=2), expected, rtol=1e-5)


def test_a_schedule_that_no_model_tells_the_progress_is_an_error():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(ManifoldAdam(schedule=cosine()), loss="mse", run_eagerly=True)
    with pytest.raises(ValueError, match=r"counts the share of the training done.*bind\(progress"):
        model.fit(np.zeros((2, 2)), np.zeros((2, 1)), verbose=0)
    told = ManifoldAdam(0.1, schedule=cosine()).bind(lambda: 0.5)
    variable = keras.Variable(np.zeros(3))
    told.apply([keras.ops.ones(3)], [variable])
    np.testing.assert_allclose(to_numpy(variable), -0.05, rtol=1e-4)


def test_metrics_that_leave_out_the_state_do_not_lose_the_schedule(digits):
    """On JAX, where a step has no other state than that of the model's metrics: an error."""

    class Model(lip.CertifiableModel):
        shown = ("loss",)

        @property
        def metrics(self):
            return [metric for metric in super().metrics if metric.name in self.shown]

    (x, y), _ = digits
    model = network(ManifoldAdam(1e-3, schedule=cosine()), Model)
    expected = by_hand(np.array([0.25, 0.75]), 0)
    if keras.backend.backend() == "jax":
        with pytest.raises(ValueError, match=r"of Model, .* \[\*super\(\).metrics.*schedule=<"):
            model.fit(x[:16], y[:16], verbose=0)
        model.shown = ("loss", "training_state")
    np.testing.assert_allclose(factors_of(model, x[:16], y[:16], epochs=2), expected, rtol=1e-5)


def test_bad_schedule():
    with pytest.raises(ValueError, match="`schedule` must be a LearningRateSchedule"):
        ManifoldMuon(schedule=0.5)


def test_sll_net_comes_with_a_cosine():
    model = lip.SLLNet(input_shape=(4, 4, 1), depth=1, dense_depth=1, hidden_units=4)
    assert model.optimizer.schedule.get_config() == cosine().get_config()
