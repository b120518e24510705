"""Training that was killed ends with the bits of training that was not."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
from callbacks import resumed
from data import output_of, small_lipnext, to_numpy, virtual_devices

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.backend import keras_private
from keras_lipnext.callbacks import BackupAndRestore, OrbaxCheckpoint
from keras_lipnext.callbacks.resuming import seed_of

TESTS = pathlib.Path(__file__).parents[1]
orbax = pytest.mark.skipif(not importlib.util.find_spec("orbax"), reason="orbax-checkpoint")
every_callback = pytest.mark.parametrize(
    "make", [BackupAndRestore, pytest.param(OrbaxCheckpoint, marks=orbax)]
)
EPOCHS = 4


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a training that nobody kills ends with; neither callback changes it."""
    return resumed.train(BackupAndRestore(tmp_path_factory.mktemp("plain"), seed=3))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of the callbacks' names: what a training leaves that was killed under all of them."""
    folder = tmp_path_factory.mktemp("killed")
    made = [BackupAndRestore] + bool(importlib.util.find_spec("orbax")) * [OrbaxCheckpoint]
    folders = [str(folder / make.__name__) for make in made]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", resumed.__file__, "2", "1", *folders],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.slow
@every_callback
def test_a_killed_training_ends_with_the_same_bits(make, uninterrupted, killed):
    """SIGKILL in the middle of an epoch: weights, moments and counters, bit by bit."""
    assert len(uninterrupted) == 14
    resuming = make(killed / make.__name__, seed=3)
    for a, b in zip(resumed.train(resuming), uninterrupted, strict=True):
        np.testing.assert_array_equal(a, b)


@functools.cache
def made(make):
    """(model, its variables and its optimizer's, their values at first)."""
    keras.utils.set_random_seed(7)
    model = make()
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    return model, variables, [np.array(to_numpy(v)) for v in variables]


def as_at_first(make):
    """What `make` compiles, each time the same model, whose step a backend traces but once."""
    model, variables, values = made(make)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    keras_private.set_initial_epoch(model, None)  # a checkpoint moved it
    return model


def lipnext():
    return small_lipnext(depth=1)


def train(x, y, *callbacks, epochs=EPOCHS, model=None):
    model = model or as_at_first(lipnext)
    keras.utils.set_random_seed(7)
    history = model.fit(
        x[:64], y[:64], batch_size=32, shuffle=False, epochs=epochs, callbacks=callbacks, verbose=0
    )
    return model, history.epoch


class Interrupt(keras.callbacks.Callback):
    """Stops `fit` by an error when this epoch begins."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise InterruptedError


@pytest.fixture(scope="module")
def interrupted(digits, tmp_path_factory):
    """Fills a folder with what a training leaves that was stopped when this epoch began."""
    (x, y), _ = digits
    folders = {}

    def fill(make, folder, epoch):
        if (make, epoch) not in folders:
            folders[make, epoch] = tmp_path_factory.mktemp("interrupted")
            callback = make(folders[make, epoch])
            with pytest.raises(InterruptedError):
                train(x, y, callback, Interrupt(epoch))
            if isinstance(callback, OrbaxCheckpoint):
                callback.wait_until_finished()
        shutil.copytree(folders[make, epoch], folder, dirs_exist_ok=True)

    return fill


@pytest.fixture(scope="module")
def assert_continues(digits):
    (x, y), _ = digits
    expected = [np.array(to_numpy(v)) for v in train(x, y)[0].weights]

    def check(make, folder, first_epoch, model=None):
        """`fit` begins with this epoch and ends with the weights of an uninterrupted one."""
        model, epochs = train(x, y, make(folder), model=model)
        assert epochs == list(range(first_epoch, EPOCHS))
        for a, b in zip(model.weights, expected, strict=True):
            np.testing.assert_array_equal(to_numpy(a), b)

    return check


@pytest.mark.parametrize("torn", ["latest.weights.h5", "training_metadata.json"])
def test_a_torn_backup_is_not_used(torn, assert_continues, interrupted, tmp_path):
    interrupted(BackupAndRestore, tmp_path, 2)
    file = tmp_path / torn
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(UserWarning, match="The latest backup in .* is not whole"):
        assert_continues(BackupAndRestore, tmp_path, 1)


def test_weights_without_their_epoch_are_not_used(assert_continues, interrupted, tmp_path):
    """Killed between the two files of a backup: Keras alone would train an epoch twice."""
    interrupted(BackupAndRestore, tmp_path, 2)
    older = (tmp_path / "training_metadata.json.bkp").read_bytes()
    (tmp_path / "training_metadata.json").write_bytes(older)
    with pytest.warns(UserWarning, match="is not whole"):
        assert_continues(BackupAndRestore, tmp_path, 1)


def test_a_first_backup_that_is_torn_is_forgotten(assert_continues, tmp_path):
    (tmp_path / "latest.weights.h5").write_bytes(b"half a file")
    assert_continues(BackupAndRestore, tmp_path, 0)


def test_backups_that_are_all_damaged_are_an_error(digits, interrupted, tmp_path):
    interrupted(BackupAndRestore, tmp_path, 2)
    for name in ("latest.weights.h5", "latest.weights.h5.bkp"):
        (tmp_path / name).write_bytes(b"damaged")
    (x, y), _ = digits
    with pytest.raises(OSError, match=r"No backup in .* is whole.*Delete the folder"):
        train(x, y, BackupAndRestore(tmp_path))


def test_backups_are_deleted_at_the_end_unless_kept(digits, tmp_path):
    (x, y), _ = digits
    train(x, y, BackupAndRestore(tmp_path / "a"), epochs=1)
    assert not (tmp_path / "a").exists()
    train(x, y, BackupAndRestore(tmp_path / "b", delete_checkpoint=False), epochs=1)
    assert (tmp_path / "b" / "latest.weights.h5").exists()


@every_callback
def test_checkpoints_of_another_model_or_optimizer_are_refused(make, digits, interrupted, tmp_path):
    (x, y), _ = digits
    interrupted(make, tmp_path, 1)
    names = sorted(p.name for p in tmp_path.rglob("*"))
    deeper = small_lipnext(depth=2)
    with pytest.raises(ValueError, match=r"are of another model.*first difference, in `weights`"):
        deeper.fit(x[:64], y[:64], callbacks=[make(tmp_path)], verbose=0)
    other = small_lipnext(depth=1)
    other.compile(lip.optimizers.ManifoldAdam(1e-3), loss=other.loss)
    message = "in `optimizer`: ManifoldMuon there, ManifoldAdam here"
    with pytest.raises(ValueError, match=message):
        other.fit(x[:64], y[:64], callbacks=[make(tmp_path)], verbose=0)
    assert sorted(p.name for p in tmp_path.rglob("*")) == names


@every_callback
def test_a_changed_learning_rate_takes_effect(make, digits, interrupted, tmp_path):
    (x, y), _ = digits
    interrupted(make, tmp_path, 1)
    for rate in (None, 1e-3):
        model = small_lipnext(depth=1, learning_rate=rate)
        compiled = float(model.optimizer.learning_rate)
        with pytest.raises(InterruptedError):
            model.fit(x[:64], y[:64], epochs=2, callbacks=[make(tmp_path), Interrupt(1)], verbose=0)
        assert float(model.optimizer.learning_rate) == compiled


@every_callback
def test_the_noise_of_layers_is_repeated(make, digits, tmp_path):
    flat = digits[0][0][:64].reshape(64, -1)
    options = {"epochs": 3, "batch_size": 32, "shuffle": False, "verbose": 0}

    def noisy(name, *callbacks):
        keras.utils.set_random_seed(0)
        layers = [  # new ones, whose generators have other names: no checkpoint brings them back
            keras.layers.GaussianNoise(0.1),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(4, name="top"),
        ]
        model = keras.Sequential([keras.Input((64,)), *layers], name="noisy")
        model.compile(keras.optimizers.Adam(name="adam"), "mse")
        callback = make(tmp_path / name)
        try:
            model.fit(flat, flat[:, :4], callbacks=[callback, *callbacks], **options)
        except InterruptedError:
            if isinstance(callback, OrbaxCheckpoint):
                callback.wait_until_finished()
        return [to_numpy(v) for v in model.weights]

    plain = noisy("plain")
    noisy("resumed", Interrupt(2))
    for a, b in zip(noisy("resumed"), plain, strict=True):
        np.testing.assert_array_equal(a, b)


@orbax
def test_weights_that_would_not_be_found_are_an_error(digits, tmp_path):
    """Keras restores by path, and leaves alone what it does not find."""
    flat = digits[0][0][:64].reshape(64, -1)
    for name in ("one", "two"):
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(4, name=name)])
        model.compile("adam", "mse")
        check = contextlib.nullcontext()
        if name == "two":
            check = pytest.raises(ValueError, match=r"one/kernel.*there, .*two/kernel.*here")
        with check:
            model.fit(flat, flat[:, :4], callbacks=[OrbaxCheckpoint(tmp_path)], verbose=0)


@orbax
def test_when_nothing_is_left_to_train(digits, tmp_path):
    (x, y), _ = digits
    train(x, y, OrbaxCheckpoint(tmp_path), epochs=1)
    with pytest.warns(UserWarning, match="1 epochs are done .* nothing is left of 1 to train"):
        train(x, y, OrbaxCheckpoint(tmp_path), epochs=1)


@orbax
def test_checkpoints_that_are_all_damaged_are_an_error(digits, interrupted, tmp_path):
    """And keep their names."""
    (x, y), _ = digits
    interrupted(OrbaxCheckpoint, tmp_path, 2)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.stat().st_size > 500 and file.suffix != ".json":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(OSError, match=r"No checkpoint in .* can be read"):
        train(x, y, OrbaxCheckpoint(tmp_path))
    assert {"0", "1"} <= {p.name for p in tmp_path.iterdir()}


@orbax
def test_a_damaged_checkpoint_is_set_aside(assert_continues, interrupted, tmp_path):
    interrupted(OrbaxCheckpoint, tmp_path, 2)
    for file in (tmp_path / "1").rglob("*"):
        if file.is_file() and file.stat().st_size > 500:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"The checkpoint .*1 cannot be read"):
        assert_continues(OrbaxCheckpoint, tmp_path, 1)
    assert (tmp_path / "1.damaged").exists()


@orbax
@pytest.mark.parametrize("stage", ["async_save", "save_finalize"])
@pytest.mark.parametrize("anew", [True, False])
def test_fit_at_once_after_an_interruption(stage, anew, digits, tmp_path, monkeypatch):
    """What was interrupted, of which only a thread may be left, is still writing its last epoch."""
    run, go_on = threading.Thread.run, threading.Event()

    def slow(thread):
        if thread.name == stage:
            go_on.wait(60)
        run(thread)

    class Interrupted(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    (x, y), _ = digits
    model, given = as_at_first(lipnext), {"batch_size": 32, "epochs": 2, "verbose": 0}
    callback = OrbaxCheckpoint(tmp_path)
    monkeypatch.setattr(threading.Thread, "run", slow)
    with pytest.raises(KeyboardInterrupt):
        model.fit(x[:64], y[:64], callbacks=[callback, Interrupted()], **given)
    monkeypatch.undo()
    assert any(thread.name == stage for thread in threading.enumerate())
    if anew:
        callback = OrbaxCheckpoint(tmp_path)
    threading.Timer(0.3, go_on.set).start()
    history = model.fit(x[:64], y[:64], callbacks=[callback], **given)
    assert history.epoch == [1]
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"0", "1"}


@orbax
def test_an_unfinished_checkpoint_does_not_count(assert_continues, interrupted, tmp_path):
    interrupted(OrbaxCheckpoint, tmp_path, 2)
    (tmp_path / "1").rename(tmp_path / "1.orbax-checkpoint-tmp")
    assert_continues(OrbaxCheckpoint, tmp_path, 1, lipnext())  # a model of another name


@orbax
@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax's, of one device
def test_the_model_of_the_latest_checkpoint(digits, tmp_path):
    (x, y), _ = digits
    model, _ = train(x, y, OrbaxCheckpoint(tmp_path), epochs=2)
    loaded = keras.saving.load_model(tmp_path)
    assert type(loaded) is lip.LipNeXt
    np.testing.assert_allclose(to_numpy(loaded(x[:8])), to_numpy(model(x[:8])), atol=1e-5)


@pytest.mark.slow
@orbax
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution")
def test_sharded_checkpoints_continue_also_on_another_mesh(tmp_path):
    text, _ = output_of("callbacks/sharded.py", tmp_path, **virtual_devices(4))
    assert text.splitlines() == ["same mesh continues", "another mesh continues"]


def test_backups_by_several_processes_are_refused(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "processes", lambda: 2)
    (x, y), _ = digits
    with pytest.raises(RuntimeError, match=r"2 processes.*OrbaxCheckpoint"):
        train(x, y, BackupAndRestore(tmp_path))


def test_epochs_have_seeds_of_their_own():
    seeds = {seed_of(seed, epoch) for seed in range(20) for epoch in range(100)}
    assert len(seeds) == 2000
    assert all(0 <= s < 2**31 for s in seeds)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "a"])
def test_bad_seeds(seed, tmp_path):
    with pytest.raises(ValueError, match=r"`seed` must be a non-negative integer. Received"):
        BackupAndRestore(tmp_path, seed=seed)


@orbax
@pytest.mark.parametrize("count", [1, None, True])
def test_one_checkpoint_is_not_enough(count, tmp_path):
    with pytest.raises(ValueError, match="`max_to_keep` must be an integer of at least 2"):
        OrbaxCheckpoint(tmp_path, max_to_keep=count)
