"""Keras' own checkpoints at the end of each epoch, made so that training continues from them.

A checkpoint that is not whole is set aside with a warning, and the one before it is used.
"""

import hashlib
import json
import os
import pathlib
import shutil
import threading
import warnings

import keras

from keras_lipnext import backend
from keras_lipnext.backend import keras_private
from keras_lipnext.callbacks.resuming import Resuming, read, write
from keras_lipnext.typing import Logs, Path

WHOLE = "whole.json"  # the digests of the backups that were written to their end


class BackupAndRestore(Resuming, keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` whose `fit` ends with the bits of an uninterrupted one.

    Start the interrupted program again, unchanged: `fit` continues with the epoch in which it was
    killed. Weights, optimizer, the losses' ramp, the cosine decay and the order of the data are
    those of a run that was never interrupted. Two backups are kept, each under a digest that is
    written last; one that was torn is not used.

    Example:

    ```python
    model.fit(x, y, epochs=30, callbacks=[keras_lipnext.callbacks.BackupAndRestore("runs/backup")])
    ```

    The order of the data is repeated where it follows from Python's, NumPy's or the backend's
    random state when the epoch begins: of arrays, PyTorch's DataLoader, or a
    `keras.utils.PyDataset` that orders itself in `on_epoch_begin`. Not where it follows from what
    happened before: a generator, `tf.data`'s own `shuffle`, arrays with `steps_per_epoch`, a
    `PyDataset` of several workers without `shuffle=False`; and on TensorFlow, arrays without
    `shuffle=False`. (For `tf.data` see examples/image_training/pipeline.py.) These, too, continue
    with the right weights.

    The callbacks beside it in the list go on, too: what has changed in their attributes since
    training began is kept with each epoch, if it is None, a number, text, a NumPy array, a variable
    or lists, tuples and dictionaries (with text as keys) of those. So it is in ReduceLROnPlateau,
    EarlyStopping, ModelCheckpoint and SwapEMAWeights. A warning names the callbacks, and their
    attributes, that begin anew all the same. Not seen is what a function remembers, a
    LambdaCallback's as well. Callbacks are told apart by class, monitored quantity and file: they
    may change places, come and go, and their settings may change. `CSVLogger` needs `append=True`
    to keep the lines of before. An epoch is written when all callbacks are done with it. `fit`
    returns the history of the epochs that it trained itself.

    Args:
        backup_dir: Folder for the backups and nothing else, of one training. A local path.
        seed: Non-negative integer, of the order of the data and of layers' noise. In each epoch it
            takes the place of `keras.utils.set_random_seed`'s.
        delete_checkpoint: Whether to delete the backups when `fit` has come to its end.

    Raises:
        OSError: if there are backups, none of them whole.
        ValueError: if they are of another model or optimizer.
        DivergenceError: if weights are not finite when an epoch ends; the backup before is kept.
        RuntimeError: in one of several processes, which `OrbaxCheckpoint` is made for.
    """

    def __init__(self, backup_dir: Path, seed: int = 0, delete_checkpoint: bool = True) -> None:
        super().__init__(
            os.fspath(backup_dir), double_checkpoint=True, delete_checkpoint=delete_checkpoint
        )
        self._set_up(backup_dir, seed)

    def on_train_begin(self, logs: Logs = None) -> None:
        count = backend.processes()
        if count > 1:
            raise RuntimeError(
                f"{count} processes train together, and each would write these backups: use "
                "keras_lipnext.callbacks.OrbaxCheckpoint, with the same folder in all processes."
            )
        self._prepare()
        super().on_train_begin(logs)

    def save(self, epoch: int, logs: Logs = None) -> None:
        super().save(epoch, logs)
        write(self._folder / WHOLE, [self._digest(*self._pairs()[0]), *self._whole()][:2])

    def _pairs(self):
        """(weights, metadata) of the latest backup, and of the one before it."""
        return keras_private.backup_files(self)

    def _whole(self):
        return read(self._folder / WHOLE) or []

    def _prepare(self):
        """Puts the newest whole backup where Keras looks for the latest."""
        latest, previous = self._pairs()
        whole = self._whole()
        if self._digest(*latest) in whole:
            return
        if self._digest(*previous) in whole:
            warnings.warn(
                f"The latest backup in {self._folder} is not whole: training continues from the "
                "one before it.",
                stacklevel=2,
            )
            for source, target in zip(previous, latest):
                shutil.copyfile(source, target)
        elif whole:
            raise OSError(
                f"No backup in {self._folder} is whole: their files have been changed or damaged. "
                "Delete the folder to train from the beginning."
            )
        else:
            # Killed before the first backup was complete: nothing to continue from.
            for path in (*latest, *previous):
                pathlib.Path(path).unlink(missing_ok=True)

    def _digest(self, weights, metadata):
        """Of the bytes of both and of the callbacks' states; None if there is no such backup."""
        try:
            epoch = json.loads(pathlib.Path(metadata).read_text())["epoch"]
        except (OSError, ValueError):
            return None
        states = self._states_of(epoch - 1)
        total = hashlib.sha256()
        for path in (weights, metadata, *([states] if states.exists() else [])):
            if not os.path.exists(path):
                return None
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


class OrbaxCheckpoint(Resuming, keras.callbacks.OrbaxCheckpoint):
    """`keras.callbacks.OrbaxCheckpoint` that `fit` continues from: sharded, in the background.

    Each process writes its own shards, and reads those it needs, also onto another number of
    devices. On the same devices `fit` ends with the bits of an uninterrupted one, where
    `BackupAndRestore` would. A checkpoint that was not finished does not count; one that cannot be
    read is renamed to `<epoch>.damaged`, and the one before it is used. Checkpoints stay when `fit`
    has come to its end: a `fit` of more epochs continues from them. Variables are found
    by the names of layers and optimizer: name them if a program makes more than one model.

    Example:

    ```python
    callback = keras_lipnext.callbacks.OrbaxCheckpoint("runs/checkpoints")
    model.fit(x, y, epochs=90, callbacks=[callback])
    ```

    Needs `pip install 'keras_lipnext[checkpoints]'`. `keras.saving.load_model(directory)` makes the
    model of the latest checkpoint.

    Args:
        directory: Folder for the checkpoints and nothing else, of one training.
        seed: Non-negative integer, of the order of the data and of layers' noise. In each epoch it
            takes the place of `keras.utils.set_random_seed`'s.
        max_to_keep: Number of checkpoints to keep, at least 2.
        save_on_background: Whether to write while training goes on.

    Raises:
        OSError: if there are checkpoints, none of them readable.
        ValueError, DivergenceError: as `BackupAndRestore`.
    """

    _by_path = True

    def __init__(
        self, directory: Path, seed: int = 0, max_to_keep: int = 2, save_on_background: bool = True
    ) -> None:
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
        self._kept = max_to_keep + 1  # the last is still being written
        self._writes = self.is_primary_host()

    def _load(self):
        wait_for_saves()
        folder, damaged = self._folder, []
        found = sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
        for path in reversed(found):
            try:
                with warnings.catch_warnings():
                    # Without a distribution Keras names no devices; they are those it was saved on.
                    warnings.filterwarnings("ignore", message="Sharding info not provided")
                    self.model.load_weights(folder)  # the latest
            except MemoryError:
                raise
            except Exception as error:  # Orbax has no class of its own for a damaged file
                if self.is_multihost_enabled():
                    raise OSError(
                        f"The checkpoint {path} cannot be read. Rename or delete it and start all "
                        "processes again: training continues from the one before it."
                    ) from error
                damaged.append((path, error))
                path.rename(path.with_suffix(".damaged"))
                continue
            keras_private.set_initial_epoch(self.model, int(path.name) + 1)
            break
        if found and len(damaged) == len(found):
            for path, _ in damaged:
                path.with_suffix(".damaged").rename(path)
            raise OSError(
                f"No checkpoint in {folder} can be read. Delete the folder to train from the "
                "beginning."
            ) from damaged[0][1]
        for path, reason in damaged:
            warnings.warn(
                f"The checkpoint {path} cannot be read ({reason}) and is now called "
                f"{path.stem}.damaged: training continues from the one before it.",
                stacklevel=2,
            )
        self.checkpointer.reload()
        done, epochs = keras_private.initial_epoch(self.model), self.params["epochs"]
        if done >= epochs:
            warnings.warn(
                f"{done} epochs are done according to {folder}: nothing is left of {epochs} to "
                "train.",
                stacklevel=2,
            )


def wait_for_saves():
    """Waits until nothing is written by this process in the background.

    A `fit` that was interrupted does not wait for what it was writing. Neither folder nor callback
    leads to that: Orbax's threads have names.

    Raises:
        Exception: if one of them fails.
    """
    for thread in threading.enumerate():
        if thread.name in ("async_save", "save_finalize"):
            thread.join()
