"""What callbacks share from which training continues bit for bit after a kill at any moment.

What Keras does not look after is done here:

- Each epoch starts from seeds of its own, made from `seed` and the epoch's number, layers' own seed
  generators included. So an epoch that is begun again, in another process, draws the same.
- How many steps an epoch has, which a dataset of unknown length does not tell, is kept.
- Checkpoints of another model or optimizer are an error, and weights that are not finite are not
  saved. A learning rate that the program has changed since takes effect.
- The callbacks beside it, which begin each `fit` anew, get their states back. An epoch is written
  when all of them are done with it.
- Averages of weights that SwapEMAWeights has left in any model are written as the constraints of
  the weights want them, and stay so.
"""

import itertools
import json
import pathlib
import warnings

import keras
import numpy as np

from keras_lipnext.backend import keras_private
from keras_lipnext.callbacks.divergence import check_finite
from keras_lipnext.callbacks.states import States, list_that_calls
from keras_lipnext.models.training_state import Schedule, TrainingState, put_back
from keras_lipnext.typing import Logs

TRAINING = "training.json"  # what was trained, and how


def seed_of(seed, epoch, *layer):
    """One 31-bit seed for each epoch, and for each layer in it; they have nothing in common."""
    return int(np.random.SeedSequence([seed, epoch, *layer]).generate_state(1)[0] >> 1)


def variables_of(model, by_path):
    """Shapes, and paths where they matter, of all that a checkpoint holds, as JSON has them."""
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)

    def described(variables):
        return [[v.path if by_path else "", list(v.shape)] for v in variables]

    return {
        "weights": described(model.weights),
        "optimizer": type(optimizer).__name__,
        "state": described(optimizer.variables),
    }


class Resuming(keras.callbacks.Callback):
    """Seeds each epoch, and keeps what else the training goes on from.

    Args:
        folder: Where the checkpoints are.
        seed: Non-negative integer.
    """

    _by_path = False  # whether a checkpoint's variables are found by their paths
    _writes = True  # whether this process is the one to write what all share
    _kept = 2  # checkpoints

    def _set_up(self, folder, seed):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}")
        self.seed = seed
        self._folder = pathlib.Path(folder)
        self._last = Last(self)
        self._states = None

    def on_train_begin(self, logs: Logs = None) -> None:
        callers = list_that_calls(self)
        if callers is not None and self._last not in callers.callbacks:
            callers.callbacks.append(self._last)  # and so called after all others, now already
        self._beside = [] if callers is None else callers.callbacks
        self._compiled_rate = self._rate()
        stored = read(self._folder / TRAINING) or {}
        variables = variables_of(self.model, self._by_path)
        if stored.get("variables", variables) != variables:
            raise ValueError(
                f"The checkpoints in {self._folder} are of another model or another optimizer. "
                "Give each training a folder of its own, or delete this one to train from the "
                f"beginning. {_difference(stored['variables'], variables)}"
            )
        super().on_train_begin(logs)
        self._load()
        if stored and stored["learning_rate"] != self._compiled_rate is not None:
            self.model.optimizer.learning_rate = self._compiled_rate
        if stored and self._state:
            self._state.steps = stored["steps"]
        self._states = None

    def _load(self):
        """Restores the latest checkpoint, where Keras' own callback does not."""

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        super().on_epoch_begin(epoch, logs)
        keras.utils.set_random_seed(seed_of(self.seed, epoch))
        generators = [v for v in self.model.variables if v.name == keras_private.SEED_STATE]
        for index, state in enumerate(generators):
            state.assign([seed_of(self.seed, epoch, index), 0])

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        check_finite(self.model)
        if self._states is None:  # called by no list, beside nothing
            self.save(epoch, logs)

    def resume_others(self) -> None:
        """Gives the callbacks beside this one, all of them begun, their states back."""
        ours = (Resuming, Last, Schedule, keras.callbacks.History, keras.callbacks.ProgbarLogger)
        self._states = States([c for c in self._beside if not isinstance(c, ours)])
        done = keras_private.initial_epoch(self.model)
        path = self._states_of(done - 1)
        if not done or not path.exists():
            return
        stopped, anew = self._states.restore(path.read_bytes())
        loggers = [c for c in self._beside if isinstance(c, keras.callbacks.CSVLogger)]
        anew += [f"CSVLogger '{c.filename}' (append=False)" for c in loggers if not c.append]
        if anew:
            warnings.warn(
                "Training continues, but these callbacks begin anew, since a checkpoint keeps only "
                f"what is plain (see help(keras_lipnext.callbacks.BackupAndRestore)): "
                f"{'; '.join(anew)}.",
                stacklevel=2,
            )
        if stopped and done < self.params["epochs"]:
            warnings.warn(
                f"A callback had ended the training after {done} epochs, according to "
                f"{self._folder}: nothing is left to train. With other callbacks, or other "
                "settings of them, it would continue.",
                stacklevel=2,
            )
            keras_private.set_initial_epoch(self.model, self.params["epochs"])

    def save(self, epoch: int, logs: Logs = None) -> None:
        """Writes the checkpoint of an epoch that all callbacks are done with.

        Averages that SwapEMAWeights has left in the model are put back on their manifolds before,
        as `CertifiableModel.fit` does.
        """
        check_finite(self.model)
        put_back(self.model)
        if self._writes and self._states:
            self._folder.mkdir(parents=True, exist_ok=True)
            states = self._states.to_bytes(bool(self.model.stop_training))
            replace(self._states_of(epoch), states)
        super().on_epoch_end(epoch, logs)
        if self._writes:
            training = {
                "variables": variables_of(self.model, self._by_path),
                "learning_rate": self._compiled_rate,
                "steps": getattr(self._state, "steps", None),
            }
            write(self._folder / TRAINING, training)
            for path in self._folder.glob(self._states_of("*").name):
                if int(path.stem.split("-")[1]) <= epoch - self._kept:
                    path.unlink()

    def _states_of(self, epoch):
        return self._folder / f"callbacks-{epoch}.npz"

    @property
    def _state(self):
        state = getattr(self.model, "_state", None)
        return state if isinstance(state, TrainingState) else None

    def _rate(self):
        """The learning rate; None if a schedule gives it."""
        rate = self.model.optimizer.learning_rate
        return float(rate) if isinstance(rate, keras.Variable) else None


def _difference(stored, current):
    """The first difference between two results of `variables_of`, in words."""
    for name, values in current.items():
        if stored[name] != values:
            lists = [v if isinstance(v, list) else [v] for v in (stored[name], values)]
            pairs = itertools.zip_longest(*lists)
            there, here = next(pair for pair in pairs if pair[0] != pair[1])
            return f"The first difference, in `{name}`: {there} there, {here} here."


def read(path):
    return json.loads(path.read_text()) if path.exists() else None


def write(path, content):
    replace(path, json.dumps(content).encode())


def replace(path, content):
    """All of it or nothing."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)


class Last(keras.callbacks.Callback):
    """Stands behind all other callbacks, where a `Resuming` one need not."""

    def __init__(self, owner):
        super().__init__()
        self._owner = owner

    def on_train_begin(self, logs=None):
        self._owner.resume_others()

    def on_epoch_end(self, epoch, logs=None):
        self._owner.save(epoch, logs)
