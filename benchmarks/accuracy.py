"""What LipNeXt reaches in minutes: clean and certified accuracy on test data, three seeds.

    KERAS_BACKEND=jax python benchmarks/accuracy.py --data DIR [patches tuned cifar10 mnist full]

On CIFAR-10 nothing is set but the size of the network and the length of the training, except for
"tuned"; there and on MNIST what is set was chosen on held-out images (results/tuning.jsonl). The
test part is evaluated once, by `certify`, in float64. Tasks:

- patches: the first 20,000 images of CIFAR-10 (JPEG q75 copy), 6 epochs, no augmentation, 4 blocks
  of width 128, LipNeXt's defaults.
- tuned: the same, but of width 192, beta 0.5, and EMMA's ramp a quarter of the training.
- cifar10: the same with L2 pooling, the paper's neck, and width 256.
- mnist: 60,000 images, 10 epochs, 8 blocks of width 128, L2 pooling.
- full: as cifar10, but with the paper's three-product block, `mixing="full"`, to see that the
  reduced form loses nothing.

A run is written to results/accuracy.json as soon as it is done, and not made again.
"""

import json
import time

import datasets
import keras
import measuring
import numpy as np

import keras_lipnext as lip

PATCHES = {"size": "small", "depth": 4, "input_shape": (32, 32, 3), "num_classes": 10}
CIFAR = PATCHES | {"neck": "pool"}
PATCHES |= {"width": 128}
TUNED = PATCHES | {"width": 192, "beta": 0.5}
TUNED |= {"loss": {"epsilon": 3 * 36 / 255, "temperature": 4, "ramp": 0.25}}
MNIST = {"depth": 8, "width": 128, "patch_size": 4, "input_shape": (28, 28, 1), "num_classes": 10}
MNIST |= {"neck": "pool", "epsilon": 0.2, "temperature": 9.0, "learning_rate": 0.008}
TASKS = {
    "patches": ("cifar10", 20000, 6, PATCHES, (36 / 255, 72 / 255, 108 / 255)),
    "tuned": ("cifar10", 20000, 6, TUNED, (36 / 255, 72 / 255, 108 / 255)),
    "cifar10": ("cifar10", 20000, 6, CIFAR, (36 / 255, 72 / 255, 108 / 255)),
    "mnist": ("mnist", None, 10, MNIST, (0.1, 0.3, 0.5)),
    "full": ("cifar10", 20000, 6, CIFAR | {"mixing": "full"}, (36 / 255, 72 / 255, 108 / 255)),
}


def done():
    path = measuring.RESULTS / "accuracy.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def run(task, seed, folder):
    data, count, epochs, arguments, epsilons = TASKS[task]
    train = datasets.load(folder, data, "train" if count else "whole", count)
    keras.utils.set_random_seed(seed)
    loss = arguments.get("loss")
    model = lip.LipNeXt(**{key: value for key, value in arguments.items() if key != "loss"})
    if loss:
        model.compile(model.optimizer, lip.losses.EMMA(**loss), metrics=["accuracy"])
    start = time.perf_counter()
    model.fit(*train, batch_size=128, epochs=epochs, verbose=2)
    seconds = time.perf_counter() - start
    certificate = model.certify(
        *datasets.load(folder, data, "test"), epsilons=epsilons, batch_size=500, verbose=0
    )
    return {
        "task": task,
        "seed": seed,
        "clean": certificate.clean_accuracy,
        "cra": {f"{e:.4g}": share for e, share in certificate.certified_accuracy.items()},
        "lipschitz": certificate.body_constant,
        "defect": max(
            float(lip.manifolds.stiefel.defect(w))
            for w in model.weights
            if isinstance(w.constraint, lip.manifolds.Stiefel)
        ),
        "seconds": round(seconds),
    }


def main():
    parser = measuring.parser(__doc__, backends=("own",))
    parser.add_argument("tasks", nargs="*", default=list(TASKS), choices=[*TASKS, []])
    parser.add_argument("--data", required=True, help="folder of the image sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    for task in arguments.tasks:
        for seed in arguments.seeds:
            if not any(r["task"] == task and r["seed"] == seed for r in done()):
                result = run(task, seed, arguments.data)
                # Read again: other tasks may be running in another process.
                results = sorted([*done(), result], key=lambda r: (r["task"], r["seed"]))
                measuring.write("accuracy", {"results": results})
    results = done()
    rows = []
    for task in dict.fromkeys(r["task"] for r in results):
        runs = [r for r in results if r["task"] == task]
        columns = [[r["clean"] for r in runs], *zip(*(r["cra"].values() for r in runs))]
        cells = (f"{100 * np.mean(c):.1f} ± {100 * np.std(c):.1f}" for c in columns)
        rows.append([f"{task} ({len(runs)} seeds)", *cells])
    measuring.table("Per cent, on test data", ["task", "clean", "CRA 1", "CRA 2", "CRA 3"], rows)


if __name__ == "__main__":
    main()
