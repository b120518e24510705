"""Callbacks beside a checkpoint go on as if nothing had interrupted the training."""

import contextlib
import itertools
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
from data import to_numpy
from test_checkpoints import Interrupt, as_at_first, every_callback

import keras_lipnext as lip
from keras_lipnext.callbacks import BackupAndRestore, OrbaxCheckpoint, StopOnDivergence
from keras_lipnext.callbacks.states import States

EPOCHS = 5
X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
SCORES = (0.5, 0.9, 0.6, 0.7, 0.8)


class Score(keras.callbacks.Callback):
    """Logs what the other callbacks monitor, and the rate that an epoch was trained with."""

    def __init__(self, scores=SCORES):
        super().__init__()
        self.scores, self.rates = scores, []

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = self.scores[epoch]
        self.rates = [*self.rates, float(self.model.optimizer.learning_rate)]


def values(variables):
    return [np.array(to_numpy(v)) for v in variables]


def regressor():
    layers = [keras.layers.Dense(4, name="first"), keras.layers.Dense(1, name="second")]
    model = keras.Sequential([keras.Input((4,)), *layers], name="regressor")
    model.compile(keras.optimizers.SGD(0.04, momentum=0.5, name="sgd"), "mse")
    return model


def train(callbacks, epochs=EPOCHS):
    model = as_at_first(regressor)
    keras.utils.set_random_seed(0)
    history = model.fit(
        X, X[:, :1], batch_size=16, shuffle=False, epochs=epochs, callbacks=callbacks, verbose=0
    )
    return values(model.weights), history.epoch


def interrupted(callbacks, epoch, **options):
    """Trains until an epoch begins, and waits for the checkpoints."""
    with pytest.raises(InterruptedError):
        train([*callbacks, Interrupt(epoch)], **options)
    for callback in callbacks:
        if isinstance(callback, OrbaxCheckpoint):
            callback.wait_until_finished()


def assert_equal(weights, expected):
    for a, b in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@every_callback
@pytest.mark.parametrize("first", [True, False])
def test_rates_fall_as_in_a_run_that_was_not_interrupted(make, first, tmp_path):
    """Whether the checkpoint is taken before or after the callback in the list."""

    def callbacks(folder):
        plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=2, min_delta=1e9)
        others, ours = [Score(), plateau], [make(folder)]
        return ours + others if first else others + ours

    def rates(chosen):
        return next(c.rates for c in chosen if isinstance(c, Score))

    plain = callbacks(tmp_path / "plain")
    weights, _ = train(plain)
    np.testing.assert_allclose(rates(plain), [0.04, 0.04, 0.04, 0.02, 0.02])
    for epoch in (2, 3):  # between two failures to improve, and just after the rate fell
        interrupted(callbacks(tmp_path / str(epoch)), epoch)
        again = callbacks(tmp_path / str(epoch))
        resumed, epochs = train(again)
        assert epochs == list(range(epoch, EPOCHS))
        assert rates(again) == rates(plain)
        assert_equal(resumed, weights)


@every_callback
def test_the_best_model_is_not_overwritten_by_a_worse_one(make, tmp_path):
    def callbacks():
        best = keras.callbacks.ModelCheckpoint(
            tmp_path / "best.weights.h5",
            "score",
            save_best_only=True,
            save_weights_only=True,
            mode="max",
        )
        return [make(tmp_path / "run"), Score(), best]

    interrupted(callbacks(), 2)
    best = (tmp_path / "best.weights.h5").read_bytes()
    chosen = callbacks()
    train(chosen)
    assert (tmp_path / "best.weights.h5").read_bytes() == best
    assert chosen[-1].best == 0.9


@every_callback
def test_the_best_weights_of_early_stopping_are_kept(make, tmp_path):
    def callbacks(folder):
        stop = keras.callbacks.EarlyStopping(
            "score", patience=3, mode="max", restore_best_weights=True
        )
        return [make(folder), Score(), stop]

    weights, epochs = train(callbacks(tmp_path / "plain"))
    assert epochs == [0, 1, 2, 3, 4]
    interrupted(callbacks(tmp_path / "run"), 3)
    resumed, epochs = train(callbacks(tmp_path / "run"))
    assert epochs == [3, 4]
    assert_equal(resumed, weights)


def interrupted_at_the_end(callbacks):
    """Trains until `fit` is about to end: the last checkpoint is written."""
    end = keras.callbacks.LambdaCallback(on_train_end=lambda logs: next(iter(())))
    with pytest.raises(StopIteration):
        train([end, *callbacks])


@every_callback
def test_a_training_that_was_stopped_stays_so(make, tmp_path):
    """Killed when the last checkpoint was written and `fit` was not yet at its end."""

    def callbacks(patience=1):
        best = {"restore_best_weights": True, "mode": "max"}
        stop = keras.callbacks.EarlyStopping("score", patience=patience, **best)
        return [make(tmp_path / "run"), Score(), stop]

    expected, _ = train([make(tmp_path / "plain"), *callbacks()[1:]])
    chosen = callbacks()
    interrupted_at_the_end(chosen)
    if make is OrbaxCheckpoint:
        chosen[0].wait_until_finished()
    with pytest.warns(UserWarning, match="A callback had ended the training after 3 epochs"):
        uninterrupted = keras.callbacks.LambdaCallback(on_train_end=lambda logs: None)
        resumed, epochs = train([uninterrupted, *callbacks()])
    assert epochs == []
    assert_equal(resumed, expected)


def test_with_other_settings_a_stopped_training_continues(tmp_path):
    def callbacks(patience):
        stop = keras.callbacks.EarlyStopping("score", patience=patience, mode="max")
        return [BackupAndRestore(tmp_path), Score(), stop]

    interrupted_at_the_end(callbacks(1))
    uninterrupted = keras.callbacks.LambdaCallback(on_train_end=lambda logs: None)
    _, epochs = train([uninterrupted, *callbacks(9)])
    assert epochs == [3, 4]


def averaging_sgd():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), "mse")
    return model


def test_averages_in_the_model_are_swapped_back(tmp_path):
    """SwapEMAWeights leaves the averages in the model between two epochs."""

    def train_averaged(*callbacks):
        model = as_at_first(averaging_sgd)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        options = {"epochs": 4, "batch_size": 16, "shuffle": False, "verbose": 0}
        model.fit(X, X[:, :1], callbacks=[*callbacks[:1], swap, *callbacks[1:]], **options)
        return values(model.weights)

    expected = train_averaged(BackupAndRestore(tmp_path / "plain"))
    with pytest.raises(InterruptedError):
        train_averaged(BackupAndRestore(tmp_path / "run"), Interrupt(2))
    assert_equal(train_averaged(BackupAndRestore(tmp_path / "run")), expected)


def averaging(optimizer):
    layers = [lip.layers.OrthogonalDense(4, name="first"), keras.layers.Dense(1, name="second")]
    model = keras.Sequential([keras.Input((4,)), *layers], name="regressor")
    model.compile(optimizer(0.3, use_ema=True, ema_momentum=0.8, name="adam"), "mse")
    return model


def manifold_adam():
    return averaging(lip.optimizers.ManifoldAdam)


def ordinary_adam():
    return averaging(keras.optimizers.Adam)


@every_callback
@pytest.mark.parametrize("make_model", [manifold_adam, ordinary_adam])
def test_averages_are_written_on_their_manifold(make, make_model, tmp_path):
    """Of a model of Keras' own, whose averages nobody else puts back; and training goes on so."""

    def train_averaged(folder, *others):
        model, callback = as_at_first(make_model), make(folder)
        callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True), callback, *others]
        options = {"epochs": 4, "batch_size": 8, "shuffle": False, "verbose": 0}
        try:
            model.fit(X, X[:, :1], callbacks=callbacks, **options)
        except InterruptedError:
            if make is OrbaxCheckpoint:
                callback.wait_until_finished()
        return values([*model.weights, *model.optimizer.variables])

    expected = train_averaged(tmp_path / "plain")
    folder = tmp_path / "run"
    train_averaged(folder, Interrupt(2))
    written = make_model()
    written.optimizer.build(written.trainable_variables)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sharding info not provided")  # Orbax's
        written.load_weights(folder if make is OrbaxCheckpoint else folder / "latest.weights.h5")
    kernel = written.layers[0].kernel
    assert lip.manifolds.stiefel.defect(kernel) < 1e-5
    assert int(written.optimizer.iterations) == 8
    assert_equal(train_averaged(folder), expected)


def test_the_states_belong_to_their_backup(tmp_path):
    """The latest backup is torn: weights and states are those of the one before it."""

    def callbacks(folder):
        plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=2, min_delta=1e9)
        return [BackupAndRestore(folder), Score(), plateau]

    plain = callbacks(tmp_path / "plain")
    weights, _ = train(plain)
    for torn in ("latest.weights.h5", "callbacks-2.npz"):
        folder = tmp_path / torn
        interrupted(callbacks(folder), 3)
        assert sorted(p.name for p in folder.glob("*.npz")) == [
            "callbacks-1.npz",
            "callbacks-2.npz",
        ]
        (folder / torn).write_bytes(b"torn")
        again = callbacks(folder)
        with pytest.warns(UserWarning, match="is not whole"):
            resumed, epochs = train(again)
        assert epochs == [2, 3, 4]
        assert again[1].rates == plain[1].rates
        assert_equal(resumed, weights)


class Holder(keras.callbacks.Callback):
    """Whatever it is given, as attributes."""

    def __init__(self, **values):
        super().__init__()
        vars(self).update(values)


def carried(before, after, change):
    """What `after` is once the changes made to `before` were kept and given back; and the words."""
    states = States([before])
    change(before)
    file = states.to_bytes(False)
    _, anew = States([after]).restore(file)
    return after, anew


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1 + 0.2,
        float("inf"),
        "text",
        [1, (2.5, "b"), {"a": [None]}],
        np.float32(0.1),
        np.arange(6, dtype="int64").reshape(2, 3),
        np.ones(3, ml_dtypes.bfloat16) / 3,
        {"array": np.zeros(0), "dict": {}, "list": 1},
    ],
    ids=repr,
)
def test_plain_values_come_back_as_they_were(value):
    def change(holder):
        holder.value = value

    after, anew = carried(Holder(value="fresh"), Holder(value="fresh"), change)
    assert not anew
    assert type(after.value) is type(value)
    assert keras.tree.map_structure(lambda v: getattr(v, "dtype", None), after.value) == (
        keras.tree.map_structure(lambda v: getattr(v, "dtype", None), value)
    )
    keras.tree.map_structure(np.testing.assert_array_equal, after.value, value)


def test_variables_get_their_values():
    before, after = (Holder(value=keras.Variable([1.0, 2.0])) for _ in range(2))
    kept = after.value
    carried(before, after, lambda holder: holder.value.assign([3.0, 4.0]))
    assert after.value is kept
    np.testing.assert_array_equal(to_numpy(kept), [3, 4])


def test_arrays_changed_in_place_are_seen():
    before, after = (Holder(value=np.zeros(3)) for _ in range(2))
    carried(before, after, lambda holder: holder.value.__iadd__(1))
    np.testing.assert_array_equal(after.value, np.ones(3))


def test_settings_that_a_program_changed_take_effect():
    def change(holder):
        holder.count = 3

    after, _ = carried(Holder(count=0, patience=5), Holder(count=0, patience=9), change)
    assert (after.count, after.patience) == (3, 9)


def test_what_cannot_be_kept_is_named():
    class Odd(Holder):
        pass

    for value in (iter(()), {1: 2}, keras.metrics.Mean(), object()):
        _, anew = carried(Odd(odd=value, function=len), Odd(odd=value), lambda holder: None)
        assert anew == ["Odd (in odd)"]


def test_fit_names_what_cannot_be_kept(tmp_path):
    def callbacks():
        return [BackupAndRestore(tmp_path), Holder(counter=itertools.count())]

    interrupted(callbacks(), 2)
    with pytest.warns(UserWarning, match=r"begin anew.*plain.*: Holder \(in counter\)\."):
        train(callbacks())


def test_a_log_that_begins_anew_is_named(tmp_path):
    for append in (True, False):
        log = tmp_path / f"{append}.csv"

        def callbacks(log=log, append=append):
            logger = keras.callbacks.CSVLogger(log, append=append)
            return [BackupAndRestore(tmp_path / str(append)), logger]

        before = callbacks()
        interrupted(before, 2)
        before[1].csv_file.close()  # as the end of a process does
        check = contextlib.nullcontext()
        if not append:
            check = pytest.warns(UserWarning, match=r"CSVLogger '.*False.csv' \(append=False\)")
        with check:
            train(callbacks())
        lines = log.read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == list("01234" if append else "234")


def monitors(*names):
    return [keras.callbacks.ModelCheckpoint(f"{name}.keras", name) for name in names]


@pytest.mark.parametrize(
    "names, bests, anew",
    [
        ("ab", (1, 2), 0),
        ("ba", (2, 1), 0),  # the order does not matter
        ("b", (2,), 0),  # one was left out
        ("bca", (2, None, 1), 0),  # one was added
        ("ac", (1, None), 1),  # one monitors something else now
        ("aab", (None, None, 2), 2),  # which of the two it was is not known
    ],
)
def test_a_state_is_given_to_the_callback_it_was_of(names, bests, anew):
    before = monitors("a", "b")
    states = States(before)
    before[0].best, before[1].best = 1, 2
    file = states.to_bytes(True)
    after = monitors(*names)
    stopped, words = States(after).restore(file)
    assert tuple(c.best for c in after) == bests
    assert len(words) == anew
    assert stopped == (sorted(names) == ["a", "b"])


def test_the_watch_over_divergence_goes_on():
    before, after = StopOnDivergence(), StopOnDivergence()
    before.on_train_begin(), after.on_train_begin()

    def change(callback):
        callback.on_epoch_begin(0)
        for batch in range(30):
            callback.on_train_batch_end(batch, {"loss": 1.0})

    carried(before, after, change)
    assert (after._low, after._losses) == (1.0, [1.0] * 20)


def test_callbacks_of_a_certifiable_model(digits, tmp_path):
    """Its own Schedule is not among those beside a checkpoint."""
    (x, y), _ = digits

    def run(*callbacks):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((64,))
        outputs = lip.layers.NormalizedDense(10)(lip.layers.OrthogonalDense(8)(inputs))
        model = lip.CertifiableModel(inputs, outputs)
        model.compile(lip.optimizers.ManifoldAdam(0.04), lip.losses.EMMA(0.1))
        plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=1, min_delta=1e9)
        model.fit(
            x[:64].reshape(64, 64),
            y[:64],
            epochs=4,
            shuffle=False,
            verbose=0,
            callbacks=[plateau, *callbacks],
        )
        return [to_numpy(v) for v in model.weights], float(model.optimizer.learning_rate)

    expected, rate = run(BackupAndRestore(tmp_path / "plain"))
    with pytest.raises(InterruptedError):
        run(BackupAndRestore(tmp_path / "run"), Interrupt(2))
    weights, resumed = run(BackupAndRestore(tmp_path / "run"))
    assert rate == resumed == pytest.approx(0.005)
    assert_equal(weights, expected)
