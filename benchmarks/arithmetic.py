"""What a certificate of programs costs: `python benchmarks/arithmetic.py`.

Each network is certified in real arithmetic, for float64 and for float32 programs on the same
samples. The loss is what a radius shrinks by; for networks that were not trained, whose radii mean
nothing, beside 36/255. The time is that of a whole `certify`, nothing remembered. Prints a Markdown
table and writes results/arithmetic.json.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import measuring
import numpy as np

import keras_lipnext as lip
from keras_lipnext.lipschitz.program import ARITHMETICS
from keras_lipnext.norms import matrices

EPSILON = 36 / 255


def digits():
    """The quickstart's model, trained for a few epochs, and held-out digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")
    order = np.random.default_rng(0).permutation(len(images))
    train, test = np.split(order, [len(order) * 4 // 5])
    model = lip.LipNeXt(
        size="tiny",
        input_shape=(8, 8, 1),
        num_classes=10,
        patch_size=2,
        neck="pool",
        epsilon=0.5 / 3,
    )
    model.fit(images[train], data.target[train], batch_size=64, epochs=10, verbose=0)
    return model, images[test]


def noise(count):
    """Images of 32 x 32 x 3 pixels, drawn from [0, 1]."""
    return np.random.default_rng(0).random((count, 32, 32, 3)).astype("float32")


def lipnext(depth, width, count):
    model = lip.LipNeXt(
        input_shape=(32, 32, 3),
        num_classes=10,
        depth=depth,
        width=width,
        patch_size=4,
        neck="pool",
        shift_ratio=1 / 16,
    )
    return model, noise(count)


def sll_net():
    return lip.SLLNet(size="small", input_shape=(32, 32, 3), num_classes=10), noise(8)


def ordinary():
    """Three convolutions with batch normalisation and max pooling, and a Dense layer."""
    layers = [keras.Input((32, 32, 3))]
    for filters in (32, 64, 128):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers), noise(64)


NETWORKS = {
    "tiny on digits (quickstart, trained)": digits,
    "LipNeXt 8 x 128": lambda: lipnext(8, 128, 64),
    "LipNeXt 8 x 256": lambda: lipnext(8, 256, 64),
    "LipNeXt 12 x 512": lambda: lipnext(12, 512, 32),
    "LipNeXt 32 x 1024": lambda: lipnext(32, 1024, 4),
    "SLLNet small": sll_net,
    "ordinary CNN": ordinary,
}


def measure(name, repeats):
    keras.utils.set_random_seed(0)
    model, x = NETWORKS[name]()
    radii, seconds = {}, {a: [] for a in ARITHMETICS}
    row = {"network": name, "samples": len(x)}
    lip.certify(model, x[:1], verbose=0)  # what a process does once
    begun = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - begun > 60:
            break
        for arithmetic in ARITHMETICS:
            matrices._CACHE.clear()
            start = time.perf_counter()
            try:
                certificate = lip.certify(model, x, verbose=0, arithmetic=arithmetic)
            except ValueError as refused:
                row[f"refused_{arithmetic}"] = str(refused)
                continue
            seconds[arithmetic].append(time.perf_counter() - start)
            radii[arithmetic] = certificate.radii
            row[f"allowance_{arithmetic}"] = certificate.error_allowance["median"]
            row["body_constant"] = certificate.body_constant
    real = radii["real"]
    row["median_radius"] = float(np.median(real))
    row["seconds_real"] = round(statistics.median(seconds["real"]), 2)
    large = real >= np.median(real)
    for arithmetic in [a for a in ARITHMETICS[1:] if a in radii]:
        loss = real - radii[arithmetic]
        # Where a radius falls to 0 that is all that can be seen of the loss.
        row[f"loss_{arithmetic}"] = float(np.median(loss[large]))
        row[f"relative_loss_{arithmetic}"] = float(np.median((loss / real)[large]))
        row[f"certified_{arithmetic}"] = float((radii[arithmetic] > 0).mean())
        row[f"time_{arithmetic}"] = round(
            statistics.median(seconds[arithmetic]) / statistics.median(seconds["real"]), 2
        )
    return row


def table(rows):
    lines = [
        "| network | median radius | loss, float64 | loss, float32 | of 36/255 | still certified | "
        "time, float64 | time, float32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        if "loss_float32" not in r:
            lines.append(f"| {r['network']} | {r['median_radius']:.4g} | refused |")
            continue
        least = "at least " * (r["relative_loss_float32"] == 1)
        lines.append(
            f"| {r['network']} | {r['median_radius']:.4g} | {r['relative_loss_float64']:.1e} | "
            f"{least}{r['loss_float32']:.2e} ({r['relative_loss_float32']:.2%}) | "
            f"{r['loss_float32'] / EPSILON:.1%} | {r['certified_float32']:.0%} | "
            f"{r['time_float64']} | {r['time_float32']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        rows.append(measure(name, arguments.repeats))
        print(rows[-1], flush=True)
    print(table(rows))
    measuring.write("arithmetic", {"settings": measuring.settings(arguments), "rows": rows})
