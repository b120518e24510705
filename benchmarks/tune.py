"""Chooses optimizer settings on validation data: one training run a line of a file of settings.

    KERAS_BACKEND=jax python benchmarks/tune.py --data DIR settings.jsonl
    KERAS_BACKEND=jax python benchmarks/tune.py --data DIR --report

A line holds the arguments of `keras_lipnext.LipNeXt` that differ from the task's, and, under
"optimizer", the class and arguments of an optimizer. Results are appended to results/tuning.jsonl;
settings that are there already are not run again. The task: the first 20,000 images of CIFAR-10
(JPEG q75 copy) in 6 epochs, or of MNIST in 5; certified accuracy on 5,000 held-out images of the
training part, by the model's own float32 metric. The test part is not touched.
"""

import argparse
import json
import pathlib
import time

import datasets
import keras

import keras_lipnext as lip

RESULTS = pathlib.Path(__file__).with_name("results") / "tuning.jsonl"
TASKS = {
    "cifar10": {"epochs": 6, "radii": (36 / 255, 72 / 255, 108 / 255)},
    "mnist": {"epochs": 5, "radii": (0.1, 0.3, 0.5)},
}


def run(settings, data):
    """The settings with the results: clean accuracy, CRA at three radii, seconds."""
    options = dict(settings)
    name = options.pop("data", "cifar10")
    seed, images = options.pop("seed", 0), options.pop("images", 20000)
    batch, optimizer = options.pop("batch", 128), options.pop("optimizer", None)
    epochs = options.pop("epochs", TASKS[name]["epochs"])
    x, y = datasets.load(data, name, "train", images)
    validation = datasets.load(data, name, "validation")
    keras.utils.set_random_seed(seed)
    model = lip.LipNeXt(input_shape=x.shape[1:], num_classes=10, **options)
    if optimizer:
        arguments = dict(optimizer)
        make = getattr(lip.optimizers, arguments.pop("class"))
        schedule = lip.optimizers.cosine()
        model.compile(make(**arguments, schedule=schedule), model.loss, metrics=["accuracy"])
    start = time.perf_counter()
    model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)
    seconds = time.perf_counter() - start
    metrics = [lip.metrics.CertifiedAccuracy(r, name=f"{r:.3f}") for r in TASKS[name]["radii"]]
    model.compile(model.optimizer, model.loss, metrics=["accuracy", *metrics])
    scores = model.evaluate(*validation, batch_size=500, verbose=0, return_dict=True)
    return {"settings": settings, "seconds": round(seconds), **scores}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="settings, one JSON object a line")
    parser.add_argument("--data", help="folder of the image sets")
    parser.add_argument("--report", action="store_true", help="only print the results so far")
    arguments = parser.parse_args()
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
    for line in pathlib.Path(arguments.file).read_text().splitlines():
        settings = json.loads(line)
        if json.dumps(settings, sort_keys=True) in done:
            continue
        found = json.dumps(run(settings, arguments.data))
        print(found, flush=True)
        with RESULTS.open("a") as file:
            file.write(found + "\n")


if __name__ == "__main__":
    main()
