"""What follows LipNeXt's blocks, compared at equal epochs: clean accuracy, CRA, seconds.

    KERAS_BACKEND=jax python benchmarks/necks.py --data DIR --set mnist --images 6000 --epochs 3

One training from scratch for each neck, on the first images of the training part; what is reported
is measured on its last 3,000, by the certificate in float64. The test part is not touched. A run's
figures are appended to results/necks.json under its settings. Seconds are of `fit`, compilation
included, one neck after the other: on a machine that does other work they say little.
"""

import argparse
import json
import time

import datasets
import keras
import measuring

import keras_lipnext as lip

HELD_OUT = 3000
NECKS = {
    "pool": {},
    "pool, dense_depth 2": {"dense_depth": 2},
    "patches": {"neck": "patches"},
    "patches, dense_depth 3": {"neck": "patches", "dense_depth": 3},
    "patches of 2": {"neck": "patches", "neck_patch_size": 2},
}
RADII = {"cifar10": (36 / 255, 72 / 255, 108 / 255), "mnist": (0.3, 0.5, 1.0, 1.58)}
EPSILON = {
    "cifar10": 36 / 255,
    "mnist": 1.3 * 1.58 / 3,
}  # EMMA demands margins up to three times it


class Progress(keras.callbacks.Callback):
    """A line an epoch."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def on_epoch_end(self, epoch, logs=None):
        found = " ".join(f"{key} {value:.3f}" for key, value in (logs or {}).items())
        print(f"{self.name}: epoch {epoch + 1}: {found}", flush=True)


def trained(name, arguments, x, y, validation):
    """{figure: value} of one neck."""
    keras.utils.set_random_seed(arguments.seed)
    model = lip.LipNeXt(
        input_shape=x.shape[1:],
        num_classes=10,
        depth=arguments.depth,
        width=arguments.width,
        shift_ratio=1 / 16,
        patch_size=arguments.patch_size,
        epsilon=EPSILON[arguments.set],
        temperature=arguments.temperature,
        **NECKS[name],
    )
    start = time.perf_counter()
    model.fit(
        x,
        y,
        batch_size=arguments.batch,
        epochs=arguments.epochs,
        verbose=0,
        callbacks=[Progress(name)],
    )
    seconds = time.perf_counter() - start
    certificate = model.certify(*validation, epsilons=RADII[arguments.set], verbose=0)
    cra = {f"{radius:.4g}": round(v, 4) for radius, v in certificate.certified_accuracy.items()}
    return {
        "neck": name,
        "weights": model.count_params(),
        "clean": round(certificate.clean_accuracy, 4),
        "cra": cra,
        "body_constant": certificate.body_constant,
        "seconds": round(seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of the image sets")
    parser.add_argument("--set", choices=sorted(RADII), default="mnist")
    parser.add_argument("--necks", nargs="+", choices=list(NECKS), default=list(NECKS))
    for name, value in (("images", 6000), ("epochs", 3), ("batch", 128), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("depth", 4), ("width", 128), ("patch-size", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--temperature", type=float, default=4.0)
    arguments = parser.parse_args()

    x, y = datasets.load(arguments.data, arguments.set, "train", arguments.images)
    held_out = datasets.load(arguments.data, arguments.set, "validation")
    margin = (32 - x.shape[1]) // 2  # patches of four sizes tile a map of 32 x 32
    x, x_held_out = (datasets.padded(a, margin) for a in (x, held_out[0][-HELD_OUT:]))
    validation = x_held_out, held_out[1][-HELD_OUT:]
    rows = []
    for name in arguments.necks:
        rows.append(trained(name, arguments, x, y, validation))
        print(json.dumps(rows[-1]), flush=True)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("data", "necks")}
    settings["backend"] = keras.backend.backend()
    run = {"settings": settings, "validation images": HELD_OUT, "rows": rows}
    path = measuring.RESULTS / "necks.json"
    before = json.loads(path.read_text())["runs"] if path.exists() else []
    kept = [other for other in before if other["settings"] != settings]
    measuring.write("necks", {"runs": [*kept, run]})
    measuring.table(
        f"{arguments.set}, {arguments.images} images, {arguments.epochs} epochs",
        ("neck", "weights", "clean", *(f"CRA({r})" for r in rows[0]["cra"]), "seconds"),
        [
            (
                row["neck"],
                f"{row['weights']:,}",
                f"{row['clean']:.1%}",
                *(f"{v:.1%}" for v in row["cra"].values()),
                row["seconds"],
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
