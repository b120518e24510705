"""Chooses settings on validation data: one training run a line of a file of settings.

    KERAS_BACKEND=jax python benchmarks/tune.py --data DIR settings.jsonl
    KERAS_BACKEND=jax python benchmarks/tune.py --data DIR --report

A line holds the arguments of `keras_lipnext.LipNeXt` that differ from the task's, and, if wanted,

- "optimizer", the class and arguments of an optimizer, and "loss", those of a loss
- "shift" and "flip": images move by up to so many pixels, and are mirrored
- "margin": so many rows and columns of zeros around each image
- "images", "epochs", "batch", "seed" and "data", "cifar10" or "mnist"

Results are appended to results/tuning.jsonl; settings that are there already are not run again. The
task: the first 20,000 images of CIFAR-10 (JPEG q75 copy) in 6 epochs, or of MNIST in 5; certified
accuracy on 5,000 held-out images of the training part, by the model's own float32 metric. The test
part is not touched. `--workers` trainings at a time share the machine: of a card one small network
takes little.
"""

import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys
import time

import datasets
import keras

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


class Training:
    """What settings as above make of a model and its images.

    Attributes:
        model: Compiled `LipNeXt`.
        margin: Rows and columns of zeros around each image.
    """

    def __init__(self, settings, data, part="train"):
        options = dict(settings)
        name = options.pop("data", "cifar10")
        self.seed, images = options.pop("seed", 0), options.pop("images", 20000)
        self.batch, optimizer = options.pop("batch", 128), options.pop("optimizer", None)
        self.epochs = options.pop("epochs", TASKS[name]["epochs"])
        loss, self.margin = options.pop("loss", None), options.pop("margin", 0)
        self.shift, self.flip = options.pop("shift", 0), options.pop("flip", False)
        x, self.y = datasets.load(data, name, part, images)
        self.x = datasets.padded(x, self.margin)
        keras.utils.set_random_seed(self.seed)
        self.model = lip.LipNeXt(input_shape=self.x.shape[1:], num_classes=10, **options)
        if optimizer or loss:
            chosen, criterion = self.model.optimizer, self.model.loss
            if optimizer:
                chosen = _made(lip.optimizers, optimizer, schedule=lip.optimizers.cosine())
            if loss:
                criterion = _made(lip.losses, loss)
            self.model.compile(chosen, criterion, metrics=["accuracy"])

    def fit(self, epochs=None, **arguments):
        """Trains for the settings' epochs, or as many as are given."""
        arguments = {"epochs": epochs or self.epochs, "verbose": 0, **arguments}
        if self.shift or self.flip:
            x = datasets.Augmented(self.x, self.y, self.batch, self.shift, self.flip, self.seed)
            return self.model.fit(x, **arguments)
        return self.model.fit(self.x, self.y, batch_size=self.batch, **arguments)


def _made(module, description, **more):
    arguments = dict(description)
    return getattr(module, arguments.pop("class"), LogitAnnealing)(**arguments, **more)


def run(settings, data):
    """The settings with the results: clean accuracy, CRA at the task's radii, seconds."""
    training = Training(settings, data)
    start = time.perf_counter()
    training.fit()
    seconds, model = time.perf_counter() - start, training.model
    name = settings.get("data", "cifar10")
    x, y = datasets.load(data, name, "validation")
    metrics = [lip.metrics.CertifiedAccuracy(r, name=f"{r:.3f}") for r in TASKS[name]["radii"]]
    model.compile(model.optimizer, model.loss, metrics=["accuracy", *metrics])
    x = datasets.padded(x, training.margin)
    scores = model.evaluate(x, y, batch_size=500, verbose=0, return_dict=True)
    return {"settings": settings, "seconds": round(seconds), **scores}


def in_child(settings, data):
    """`run` in a process of its own; what it says where that fails."""
    command = [sys.executable, "-W", "ignore", __file__, "--data", data, "--one", settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return lines[-1] if lines else f"failed: {settings}: {done.stderr[-500:]}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="settings, one JSON object a line")
    parser.add_argument("--data", help="folder of the image sets")
    parser.add_argument("--report", action="store_true", help="only print the results so far")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time (1)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(json.loads(arguments.one), arguments.data)), flush=True)
        return
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {json.dumps(json.loads(line)["settings"], sort_keys=True) for line in lines}
    if arguments.report:
        for line in lines:
            print(
                " ".join(
                    f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                    for k, v in json.loads(line).items()
                )
            )
        return
    wanted = map(json.loads, pathlib.Path(arguments.file).read_text().splitlines())
    wanted = [s for s in wanted if json.dumps(s, sort_keys=True) not in done]
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        jobs = [pool.submit(in_child, json.dumps(s), arguments.data) for s in wanted]
        for job in concurrent.futures.as_completed(jobs):
            found = job.result()
            print(found, flush=True)
            if found.startswith("{"):
                with RESULTS.open("a") as file:
                    file.write(found + "\n")


if __name__ == "__main__":
    main()
