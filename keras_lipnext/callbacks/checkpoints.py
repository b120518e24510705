"""Keras' own checkpoints, made so that training continues bit for bit after a kill at any moment.

A checkpoint is taken at the end of each epoch. What Keras does not look after is done here:

- Each epoch starts from seeds of its own, made from `seed` and the epoch's number. So an epoch that
  is begun again, in another process, draws the same order of the data and the same noise.
- A checkpoint that is not whole is set aside with a warning, and the one before it is used.
- How many steps an epoch has, which a dataset of unknown length does not tell, is kept.
"""

import hashlib
import json
import os
import pathlib
import shutil
import warnings

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.models.training_state import TrainingState

WHOLE = "whole.json"  # the digests of the backups that were written to their end
STEPS = "steps.json"  # the number of steps of an epoch


def seed_of(seed, epoch):
    """One 31-bit seed for each epoch; those of different epochs have nothing in common."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0] >> 1)


class _Resuming(keras.callbacks.Callback):
    """Seeds each epoch, and keeps the number of steps that the model's schedule has counted.

    Args:
        folder: Where the checkpoints are.
        seed: Non-negative integer.
    """

    def _set_up(self, folder, seed):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}")
        self.seed = seed
        self._folder = pathlib.Path(folder)

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        known = _read(self._folder / STEPS)
        if known and isinstance(self._state, TrainingState):
            self._state.steps = known

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        keras.utils.set_random_seed(seed_of(self.seed, epoch))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if isinstance(self._state, TrainingState) and self._writes:
            _write(self._folder / STEPS, self._state.steps)

    _writes = True  # whether this process is the one to write what all share

    @property
    def _state(self):
        return getattr(self.model, "_state", None)


def _read(path):
    return json.loads(path.read_text()) if path.exists() else None


def _write(path, content):
    """All of it or nothing."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content))
    new.replace(path)


class BackupAndRestore(_Resuming, keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` whose `fit` ends with the bits of an uninterrupted one.

    Start the interrupted program again, unchanged: `fit` continues with the epoch in which it was
    killed. Weights, optimizer, the losses' ramp, the cosine decay and the order of the data are
    those of a run that was never interrupted. Two backups are kept, each under a digest that is
    written last; one that was torn is not used.

    Example:

    ```python
    model.fit(x, y, epochs=30, callbacks=[keras_lipnext.callbacks.BackupAndRestore("runs/backup")])
    ```

    On TensorFlow give the data in an order of its own (`shuffle=False`, or a `keras.utils.
    PyDataset` that orders each epoch): the shuffling of arrays inside Keras cannot be repeated
    from the middle there.

    Args:
        backup_dir: Folder for the backups and nothing else, of one training. A local path.
        seed: Non-negative integer, of the order of the data and of layers' noise.
        delete_checkpoint: Whether to delete the backups when `fit` has come to its end.

    Raises:
        OSError: if there are backups, none of them whole.
        RuntimeError: in one of several processes, which `OrbaxCheckpoint` is made for.
    """

    def __init__(self, backup_dir, seed=0, delete_checkpoint=True):
        super().__init__(
            os.fspath(backup_dir), double_checkpoint=True, delete_checkpoint=delete_checkpoint
        )
        self._set_up(backup_dir, seed)

    def on_train_begin(self, logs=None):
        count = backend.processes()
        if count > 1:
            raise RuntimeError(
                f"{count} processes train together, and each would write these backups: use "
                "keras_lipnext.callbacks.OrbaxCheckpoint, with the same folder in all processes."
            )
        self._prepare()
        super().on_train_begin(logs)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        _write(self._folder / WHOLE, [self._digest(*self._pairs()[0]), *self._whole()][:2])

    def _pairs(self):
        """(weights, metadata) of the latest backup, and of the one before it."""
        return (
            (self._weights_path, self._training_metadata_path),
            (self._prev_weights_path, self._prev_training_metadata_path),
        )

    def _whole(self):
        return _read(self._folder / WHOLE) or []

    def _prepare(self):
        """Puts the newest whole backup where Keras looks for the latest."""
        latest, previous = self._pairs()
        known = self._whole()
        if self._digest(*latest) in known:
            return
        if self._digest(*previous) in known:
            warnings.warn(
                f"The latest backup in {self._folder} is not whole: training continues from the "
                "one before it.",
                stacklevel=2,
            )
            for source, target in zip(previous, latest):
                shutil.copyfile(source, target)
        elif known:
            raise OSError(
                f"No backup in {self._folder} is whole: their files have been changed or damaged. "
                "Delete the folder to train from the beginning."
            )
        else:
            # Killed before the first backup was complete: nothing to continue from.
            for path in (*latest, *previous):
                pathlib.Path(path).unlink(missing_ok=True)

    def _digest(self, *paths):
        """Of the files' bytes; None if one is missing."""
        total = hashlib.sha256()
        for path in paths:
            if not os.path.exists(path):
                return None
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


class OrbaxCheckpoint(_Resuming, keras.callbacks.OrbaxCheckpoint):
    """`keras.callbacks.OrbaxCheckpoint` that `fit` continues from: sharded, in the background.

    Each process writes its own shards, and reads those it needs, also onto another number of
    devices. On the same devices `fit` ends with the bits of an uninterrupted one, as
    `BackupAndRestore` says. A checkpoint that was not finished does not count; one that cannot be
    read is renamed to `<epoch>.damaged`, and the one before it is used. Checkpoints stay when `fit`
    has come to its end: a `fit` of more epochs continues from them.

    Example:

    ```python
    callback = keras_lipnext.callbacks.OrbaxCheckpoint("runs/checkpoints")
    model.fit(dataset, epochs=90, callbacks=[callback])
    ```

    Needs `pip install 'keras_lipnext[checkpoints]'`. `keras.saving.load_model(directory)` makes the
    model of the latest checkpoint.

    Args:
        directory: Folder for the checkpoints and nothing else, of one training.
        seed: Non-negative integer, of the order of the data and of layers' noise.
        max_to_keep: Number of checkpoints to keep, at least 2.
        save_on_background: Whether to write while training goes on.

    Raises:
        OSError: if there are checkpoints, none of them readable.
    """

    def __init__(self, directory, seed=0, max_to_keep=2, save_on_background=True):
        if isinstance(max_to_keep, bool) or not isinstance(max_to_keep, int) or max_to_keep < 2:
            raise ValueError(
                "`max_to_keep` must be an integer of at least 2, so that there is a checkpoint to "
                f"return to. Received: max_to_keep={max_to_keep!r}"
            )
        super().__init__(
            os.path.abspath(directory),
            monitor="loss",
            max_to_keep=max_to_keep,
            save_on_background=save_on_background,
        )
        self._set_up(self.directory, seed)
        self._writes = self.is_primary_host()

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        folder = self._folder
        found = sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        for path in reversed(found):
            try:
                with warnings.catch_warnings():
                    # Without a distribution Keras names no devices; they are those it was saved on.
                    warnings.filterwarnings("ignore", message="Sharding info not provided")
                    self.model.load_weights(folder)  # the latest
            except Exception as error:  # Orbax has no class of its own for a damaged file
                if self.is_multihost_enabled():
                    raise OSError(
                        f"The checkpoint {path} cannot be read. Rename or delete it and start all "
                        "processes again: training continues from the one before it."
                    ) from error
                warnings.warn(
                    f"The checkpoint {path} cannot be read ({error}): training continues from the "
                    "one before it.",
                    stacklevel=2,
                )
                path.rename(path.with_suffix(".damaged"))
                self.checkpointer.reload()
                continue
            self.model._initial_epoch = int(path.name) + 1
            return
        if found:
            raise OSError(
                f"No checkpoint in {folder} can be read. Delete the folder to train from the "
                "beginning."
            )
