"""Chooses settings on validation data: one training run a line of a file of settings.

    KERAS_BACKEND=jax python benchmarks/tune.py --data DIR settings.jsonl
    KERAS_BACKEND=jax python benchmarks/tune.py --data DIR --report

A line holds the arguments of `keras_lipnext.LipNeXt` that differ from the task's, and, if wanted,

- "optimizer", the class and arguments of an optimizer, and "loss", those of a loss
- "shift" and "flip": images move by up to so many pixels, and are mirrored; "cutout": half of them
  lose a square of so many pixels; "randaugment": Keras', of that strength
- "centring": true for blocks that subtract the batch's mean of each channel, in use a running one
- "margin": so many rows and columns of zeros around each image
- "images", "epochs", "batch", "seed" and "data", "cifar10" or "mnist"
- "part": "whole" to train on what else is held out, when all settings are chosen

Results are appended to results/tuning.jsonl; settings that are there already are not run again. The
task: the first 20,000 images of CIFAR-10 (JPEG q75 copy) in 6 epochs, or of MNIST in 5; certified
accuracy on 5,000 held-out images of the training part, by the model's own float32 metric. The test
part is not touched. `--workers` trainings at a time share the machine, on Linux each with a core of
its own: of a card one small network takes little. "seconds" are those of `fit`, compilation
included, "cpu_seconds" what it took of the cores; "device" is "cpu" or a card's name.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys
import time

import datasets
import keras
import measuring

import keras_lipnext as lip

RESULTS = pathlib.Path(__file__).with_name("results") / "tuning.jsonl"
TASKS = {
    "cifar10": {"epochs": 6, "radii": (36 / 255, 72 / 255, 108 / 255)},
    "digits": {"epochs": 40, "radii": (0.1, 0.25, 0.5)},
    "mnist": {"epochs": 5, "radii": (0.1, 0.3, 0.5, 1.0, 1.58)},
    "fashion_mnist": {"epochs": 5, "radii": (0.1, 0.3, 0.5, 1.0)},
}


@keras.saving.register_keras_serializable("benchmarks")
class LogitAnnealing(keras.losses.Loss):
    """BRONet's loss, temperature (1 - p)^gamma CE, p of (z - offset onehot) / temperature."""

    def __init__(self, offset=2.0, temperature=0.75, gamma=5.0, **kwargs):
        super().__init__(**kwargs)
        self.offset, self.temperature, self.gamma = offset, temperature, gamma

    def call(self, y_true, y_pred):
        labels = keras.ops.reshape(y_true, (-1,))
        labelled = keras.ops.one_hot(labels, y_pred.shape[-1], dtype=y_pred.dtype)
        logits = (y_pred - self.offset * labelled) / self.temperature
        entropy = keras.losses.categorical_crossentropy(labelled, logits, from_logits=True)
        return self.temperature * (1 - keras.ops.exp(-entropy)) ** self.gamma * entropy


@keras.saving.register_keras_serializable("benchmarks")
class ChangingEMMA(lip.losses.EMMA):
    """EMMA whose temperature goes from `temperature` to `last`, by equal factors a step."""

    def __init__(self, epsilon, temperature, last, **kwargs):
        super().__init__(epsilon, temperature, **kwargs)
        self.last = last

    @property
    def temperature(self):
        if getattr(self, "_progress", None) is None:
            return self._first
        return self._first * (self.last / self._first) ** self._progress()

    @temperature.setter
    def temperature(self, value):
        self._first = value


LOSSES = {"LogitAnnealing": LogitAnnealing, "ChangingEMMA": ChangingEMMA}


@keras.saving.register_keras_serializable("benchmarks")
class Centring(keras.layers.Layer):
    """x less its mean over batch and positions, in use less a running mean: a shift, 1-Lipschitz
    once it is trained."""

    lipschitz_constant = 1.0

    def build(self, input_shape):
        self.mean = self.add_weight(
            shape=input_shape[-1:], initializer="zeros", trainable=False, name="mean"
        )

    def call(self, x, training=False):
        if not training:
            return x - self.mean
        mean = keras.ops.mean(x, axis=tuple(range(len(x.shape) - 1)))
        self.mean.assign(0.95 * self.mean + 0.05 * mean)
        return x - mean


def centred(model):
    """`model`, a chain, with a `Centring` behind each block."""
    x = model.inputs[0]
    for layer in model.layers[1:]:
        x = layer(x)
        if isinstance(layer, lip.layers.LipNeXtBlock):
            x = Centring(name=f"{layer.name}_centring")(x)
    return lip.CertifiableModel(model.inputs, x)


class Training:
    """What settings as above make of a model and its images.

    Attributes:
        model: Compiled `LipNeXt`.
        margin: Rows and columns of zeros around each image.
    """

    def __init__(self, settings, data):
        options = dict(settings)
        name, part = options.pop("data", "cifar10"), options.pop("part", "train")
        self.seed, images = options.pop("seed", 0), options.pop("images", 20000)
        self.batch, optimizer = options.pop("batch", 128), options.pop("optimizer", None)
        self.epochs = options.pop("epochs", TASKS[name]["epochs"])
        loss, self.margin = options.pop("loss", None), options.pop("margin", 0)
        names = ("shift", "flip", "cutout", "randaugment")
        self.augmentation = {name: options.pop(name) for name in names if name in options}
        centring = options.pop("centring", False)
        x, self.y = datasets.load(data, name, part, images)
        self.x = datasets.padded(x, self.margin)
        keras.utils.set_random_seed(self.seed)
        self.model = lip.LipNeXt(input_shape=self.x.shape[1:], num_classes=10, **options)
        if optimizer or loss or centring:
            chosen, criterion = self.model.optimizer, self.model.loss
            if centring:
                self.model = centred(self.model)
            if optimizer:
                chosen = _made(lip.optimizers, optimizer, schedule=lip.optimizers.cosine())
            if loss:
                criterion = _made(lip.losses, loss)
            self.model.compile(chosen, criterion, metrics=["accuracy"])

    def fit(self, epochs=None, **arguments):
        """Trains for the settings' epochs, or as many as are given."""
        arguments = {"epochs": epochs or self.epochs, "verbose": 0, **arguments}
        if self.augmentation:
            augmented = datasets.Augmented(self.x, self.y, self.batch, **self.augmentation)
            return self.model.fit(augmented, **arguments)
        return self.model.fit(self.x, self.y, batch_size=self.batch, **arguments)


def _made(module, description, **more):
    arguments = dict(description)
    name = arguments.pop("class")
    return (LOSSES.get(name) or getattr(module, name))(**arguments, **more)


def run(settings, data):
    """The settings with the results: clean accuracy, CRA at the task's radii, seconds."""
    training = Training(settings, data)
    start, of_cores = time.perf_counter(), time.process_time()
    training.fit()
    seconds, model = time.perf_counter() - start, training.model
    of_cores = time.process_time() - of_cores
    name = settings.get("data", "cifar10")
    x, y = datasets.load(data, name, "validation")
    metrics = [lip.metrics.CertifiedAccuracy(r, name=f"{r:.3f}") for r in TASKS[name]["radii"]]
    model.compile(model.optimizer, model.loss, metrics=["accuracy", *metrics])
    x = datasets.padded(x, training.margin)
    scores = model.evaluate(x, y, batch_size=500, verbose=0, return_dict=True)
    seconds = {"seconds": round(seconds), "cpu_seconds": round(of_cores)}
    return {"settings": settings, "device": measuring.device(), **seconds, **scores}


def in_child(settings, data, cores):
    """`run` in a process of its own, on a core taken from the queue; what it says if it fails."""
    core = cores.get()
    command = [sys.executable, "-W", "ignore", __file__, "--data", data, "--one", settings]
    if core is not None:
        command += ["--core", str(core)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    cores.put(core)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return lines[-1] if lines else f"failed: {settings}: {done.stderr[-500:]}"


def results():
    """What was found so far, a dictionary a training."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return list(map(json.loads, lines))


def run_all(wanted, data, workers=1):
    """Trains by those of the settings that were not yet, so many at a time."""
    done = {json.dumps(line["settings"], sort_keys=True) for line in results()}
    texts = {json.dumps(settings, sort_keys=True): json.dumps(settings) for settings in wanted}
    cores = queue.Queue()
    apart = workers > 1 and hasattr(os, "sched_setaffinity")
    for index in range(workers):
        cores.put(index if apart else None)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(in_child, t, data, cores) for k, t in texts.items() if k not in done]
        for job in concurrent.futures.as_completed(jobs):
            found = job.result()
            print(found, flush=True)
            if found.startswith("{"):
                with RESULTS.open("a") as file:
                    file.write(found + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="settings, one JSON object a line")
    parser.add_argument("--data", help="folder of the image sets")
    parser.add_argument("--report", action="store_true", help="only print the results so far")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time (1)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        if arguments.core is not None:
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[arguments.core]})
        print(json.dumps(run(json.loads(arguments.one), arguments.data)), flush=True)
        return
    if arguments.report:
        for line in results():
            print(
                " ".join(
                    f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()
                )
            )
        return
    wanted = map(json.loads, pathlib.Path(arguments.file).read_text().splitlines())
    run_all(wanted, arguments.data, arguments.workers)


if __name__ == "__main__":
    main()
