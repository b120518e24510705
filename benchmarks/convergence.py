"""Certified accuracy against steps and against time: ManifoldMuon, ManifoldAdam, a Björck twin.

    KERAS_BACKEND=jax python benchmarks/convergence.py --data DIR [--seeds 0 1 2] [--epochs 6]

The first 20,000 images of CIFAR-10 (JPEG q75 copy), batches of 128, four blocks of width 128 on 64
positions an image, so that a step sees 64 x width positions: the same network, data, order of
batches, loss, ramp and cosine for all. Certified accuracy at 36/255 of
5,000 held-out images after each epoch, by the model's own float32 logits, constants taken as 1.
ManifoldMuon has the default rate, ManifoldAdam the best of three on the same held-out images
(results/tuning.jsonl); the twin has ManifoldAdam's, and none was tried. Time is that of the
training steps; the first epoch's includes compilation. In results/convergence.json and .png.

What it does not show: the end of a long training, where the best rates may be others; and times on
accelerators, where the optimizers' share of a step differs.
"""

import time

import bjorck
import datasets
import keras
import measuring
import numpy as np

import keras_lipnext as lip
from keras_lipnext.radius import certified_radii_float64, pairwise_distances_float64

ARGUMENTS = {"depth": 4, "width": 128, "shift_ratio": 1 / 16, "num_classes": 10}
ARGUMENTS |= {"input_shape": (32, 32, 3), "neck": "pool"}


def with_adam():
    model = lip.LipNeXt(**ARGUMENTS)
    optimizer = lip.optimizers.ManifoldAdam(1e-2, schedule=lip.optimizers.cosine())
    model.compile(optimizer, loss=model.loss, metrics=["accuracy"])
    return model


METHODS = {
    "ours: ManifoldMuon": lambda: lip.LipNeXt(**ARGUMENTS),
    "ours: ManifoldAdam": with_adam,
    "Björck, Adam": lambda: bjorck.twin(lip.LipNeXt(**ARGUMENTS), 1e-2),
}


class Curve(keras.callbacks.Callback):
    """Certified accuracy after each epoch, and the seconds of training so far."""

    def __init__(self, x, y):
        super().__init__()
        self.data = x, y
        self.seconds, self.points = 0.0, []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds += time.perf_counter() - self._start
        x, y = self.data
        logits = self.model.predict(x, batch_size=500, verbose=0)
        kernel = keras.ops.convert_to_numpy(self.model.head.kernel).astype("float64")
        distances = pairwise_distances_float64(kernel)
        predictions, radii, _ = certified_radii_float64(logits.astype("float64"), distances)
        right = predictions == y
        self.points.append(
            {
                "epoch": epoch + 1,
                "seconds": round(self.seconds, 1),
                "clean": float(right.mean()),
                "cra": float((right & (radii > 36 / 255)).mean()),
            }
        )
        print(self.points[-1], flush=True)


def train(make, seed, epochs, train_data, validation):
    keras.utils.set_random_seed(seed)
    model = make()
    curve = Curve(*validation)
    model.fit(*train_data, batch_size=128, epochs=epochs, verbose=0, callbacks=[curve])
    return curve.points


def main():
    parser = measuring.parser(__doc__, backends=("own",))
    parser.add_argument("--data", required=True, help="folder of the image sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    train_data = datasets.load(arguments.data, "cifar10", "train", 20000)
    validation = datasets.load(arguments.data, "cifar10", "validation")
    # Seeds outside: what the machine does meanwhile falls on all methods alike.
    curves = {name: [] for name in METHODS}
    for seed in arguments.seeds:
        for name, make in METHODS.items():
            print(name, seed, flush=True)
            curves[name].append(train(make, seed, arguments.epochs, train_data, validation))
    settings = measuring.settings(arguments)
    del settings["data"]
    measuring.write("convergence", {"settings": settings, "curves": curves})
    rows = []
    for name, runs in curves.items():
        last = [run[-1] for run in runs]
        seconds = np.median([point["seconds"] for point in last])
        reference = np.median([run[-1]["seconds"] for run in curves["ours: ManifoldAdam"]])
        scores = (100 * np.mean([point[key] for point in last]) for key in ("clean", "cra"))
        rows.append([name, *(f"{score:.1f}" for score in scores), f"{seconds / reference:.2f}"])
    header = ["method", "clean", "CRA(36/255)", "time / ManifoldAdam's"]
    measuring.table("After the last epoch, per cent", header, rows)

    def panel(key, label):
        def draw(axis):
            for index, (name, runs) in enumerate(curves.items()):
                for run in runs:
                    axis.plot(
                        [point[key] for point in run],
                        [100 * point["cra"] for point in run],
                        f"C{index}o-",
                        markersize=3,
                        label=name if run is runs[0] else None,
                    )
            axis.set(xlabel=label, ylabel="CRA(36/255), %")
            axis.legend(fontsize=7)

        return draw

    measuring.figure("convergence", [[panel("epoch", "epoch"), panel("seconds", "seconds")]])


if __name__ == "__main__":
    main()
