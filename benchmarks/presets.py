"""Trains the networks that come as presets.

    KERAS_BACKEND=jax python benchmarks/presets.py --data DIR --output runs/presets mnist

Each network is trained on the training part without the images held out, and written to a folder of
its name: weights, and settings.json with its figures on the held-out images. `--seconds` ends a
training after about that time, by as many epochs as fit, which settings.json then names; so does
`--epochs`, which takes a training again. An interrupted one goes on where it was, given the same
folder.
"""

import json
import pathlib
import time

import datasets
import keras
import measuring
import tune

import keras_lipnext as lip

SMALL = {"neck": "patches", "depth": 4, "width": 128, "neck_width": 128, "patch_size": 4}
SMALL |= {"temperature": 4, "images": None}
DIGITS = {**SMALL, "data": "mnist", "margin": 2, "batch": 256}
RECIPES = {
    "mnist_small": {**DIGITS, "epsilon": 0.2, "epochs": 4},
    # EMMA demands margins up to three times epsilon: here for 1.58.
    "mnist_small_wide_margin": {**DIGITS, "epsilon": 1.3 * 1.58 / 3, "epochs": 5},
    "fashion_mnist_small": {
        **DIGITS,
        "data": "fashion_mnist",
        "flip": True,
        "epsilon": 0.2,
        "epochs": 4,
    },
    "cifar10_jpeg_small": {**SMALL, "batch": 256, "shift": 1, "flip": True, "epochs": 5},
}


class Clock(keras.callbacks.Callback):
    """Seconds of each epoch."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._start)


def epochs_that_fit(training, seconds):
    """By the second epoch's time, as the first compiles; then the weights are what they were."""
    start, clock = time.perf_counter(), Clock()
    weights = training.model.get_weights()
    training.fit(epochs=2, callbacks=[clock])
    training.model.set_weights(weights)
    left = seconds - (time.perf_counter() - start)
    return max(1, int(left / clock.seconds[-1]))


def train(name, data, folder, epochs=None, seconds=None):
    start = time.perf_counter()
    settings = RECIPES[name]
    training = tune.Training(settings, data)
    epochs = epochs or training.epochs
    if seconds:
        epochs = min(epochs, epochs_that_fit(training, seconds))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {epochs} epochs after {time.perf_counter() - start:.0f} s", flush=True)
    resuming = lip.callbacks.BackupAndRestore(folder / "backup", seed=training.seed)
    training.fit(epochs=epochs, verbose=2, callbacks=[] if seconds else [resuming])
    training.model.save_weights(folder / "model.weights.h5")
    radii = tune.TASKS[settings.get("data", "cifar10")]["radii"]
    metrics = [lip.metrics.CertifiedAccuracy(r, name=f"{r:.3f}") for r in radii]
    training.model.compile(
        training.model.optimizer, training.model.loss, metrics=["accuracy", *metrics]
    )
    x, y = datasets.load(data, settings.get("data", "cifar10"), "validation")
    x = datasets.padded(x, training.margin)
    scores = training.model.evaluate(x, y, batch_size=500, verbose=0, return_dict=True)
    record = {
        "settings": {**settings, "epochs": epochs},
        "held_out": scores,
        "seconds": round(time.perf_counter() - start),
        "backend": keras.backend.backend(),
    }
    (folder / "settings.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: record}), flush=True)


if __name__ == "__main__":
    parser = measuring.parser(__doc__, ())
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--data", help="folder of the image sets")
    parser.add_argument("--output", type=pathlib.Path, help="folder of their folders")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--seconds", type=float, help="of a training, at most")
    arguments = parser.parse_args()
    for name in arguments.names:
        train(name, arguments.data, arguments.output / name, arguments.epochs, arguments.seconds)
