"""The same certificate on every device: one run a device, then a comparison of what they wrote.

    KERAS_BACKEND=torch python benchmarks/gpu_certificate.py build/models --make   # on a CPU
    KERAS_BACKEND=jax python benchmarks/gpu_certificate.py build/models --output gpu.json
    python benchmarks/gpu_certificate.py --compare cpu.json gpu.json

`--make` trains three small models on digits (scikit-learn) and saves them beside held-out digits: a
LipNeXt, an SLLNet, and an ordinary network of convolutions with batch normalisation. A run
certifies the files with arithmetic="real" and "float64" on the device that Keras takes, and writes
constants, predictions and radii; with "float32" it writes what that is refused with. A comparison
fails if hashes or predictions differ, or a constant or radius by more than 1e-9 of the larger of 1
and itself; it writes results/gpu_certificate.json.
"""

import argparse
import json
import pathlib
import sys
import time

import measuring

TOLERANCE = 1e-9
SAMPLES = 300
ARITHMETICS = ("real", "float64", "float32")


def models():
    """{name: a model of digits, compiled}."""
    import keras

    import keras_lipnext as lip

    shape = {"input_shape": (8, 8, 1), "num_classes": 10}
    layers = [keras.Input((8, 8, 1))]
    for filters in (16, 32):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    ordinary = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ordinary.compile(optimizer="adam", loss=loss)
    sizes = {"depth": 2, "width": 16, "hidden_filters": 24, "dense_depth": 2, "hidden_units": 64}
    return {
        "lipnext": lip.LipNeXt(size="tiny", patch_size=2, neck="pool", epsilon=0.5 / 3, **shape),
        "sll_net": lip.SLLNet(**sizes, pool_size=2, epsilon=0.25, **shape),
        "ordinary": ordinary,
    }


def make(folder):
    """Trains the models, and saves them with the samples to certify."""
    import keras
    import numpy as np
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")
    train, test = np.split(np.random.default_rng(0).permutation(len(images)), [-SAMPLES])
    keras.utils.set_random_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "digits.npz", x=images[test], y=data.target[test])
    for name, model in models().items():
        model.fit(images[train], data.target[train], batch_size=64, epochs=5, verbose=0)
        model.save(folder / f"{name}.keras")


def certified(folder):
    """A row for each file and arithmetic."""
    import keras
    import numpy as np

    import keras_lipnext as lip

    with np.load(folder / "digits.npz") as digits:
        x, y = digits["x"], digits["y"]
    for path in sorted(folder.glob("*.keras")):
        model = keras.models.load_model(path)
        for arithmetic in ARITHMETICS:
            row = {"model": path.stem, "arithmetic": arithmetic}
            start = time.perf_counter()
            try:
                found = lip.certify(model, x, y, verbose=0, arithmetic=arithmetic)
            except ValueError as refusal:
                yield {**row, "refused": str(refusal)}
                continue
            yield {
                **row,
                "weights_hash": found.evidence.weights_hash,
                "constant": found.constant,
                "body_constant": found.body_constant,
                "layers": {b.name: b.constant for b in found.evidence.bound.layers},
                "seconds": round(time.perf_counter() - start, 2),
                "median_radius": float(np.median(found.radii)),
                "predictions": found.predictions.tolist(),
                "radii": found.radii.tolist(),
                "error_allowances": found.error_allowances.tolist(),
            }


def run(folder, output):
    import keras

    rows = []
    for row in certified(folder):
        rows.append(row)
        shown = {k: v for k, v in row.items() if not isinstance(v, (list, dict))}
        print(json.dumps(shown), flush=True)
    facts = {"device": measuring.device(), "backend": keras.backend.backend()}
    content = {**facts, "machine": measuring.machine(), "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content) + "\n")


def compare(first, *others):
    """1 if a file's certificates are not those of the first file; prints by how much."""
    import numpy as np

    def rows(path):
        content = json.loads(path.read_text())
        found = {(r["model"], r["arithmetic"]): r for r in content["rows"] if "refused" not in r}
        return f"{content['backend']}, {content['device']}", found

    title, reference = rows(first)
    table, differences, failed = [], [], False
    for path in others:
        other, found = rows(path)
        for key in reference.keys() & found.keys():
            mine, its = reference[key], found[key]
            alike = all(mine[k] == its[k] for k in ("weights_hash", "predictions"))
            apart = {}
            for field in ("body_constant", "constant", "radii", "error_allowances"):
                a, b = np.asarray(mine[field]), np.asarray(its[field])
                size = np.maximum(1, np.maximum(abs(a), abs(b)))
                apart[field] = float((abs(a - b) / size).max())
            failed = failed or not alike or not max(apart.values()) <= TOLERANCE
            says = "same" if alike else "DIFFER"
            names = {"with": other, "model": key[0], "arithmetic": key[1]}
            differences.append({**names, "hash and predictions": says, **apart})
            table.append((", ".join((other, *key)), says, *(f"{v:.1e}" for v in apart.values())))
        # What one of them refuses is no difference, but for what both must answer.
        for name in {name for name, _ in reference}:
            for arithmetic in ("real", "float64"):
                if (name, arithmetic) not in reference.keys() & found.keys():
                    print(f"{other}: {name}, {arithmetic} is missing")
                    failed = True
    header = ["", "hash, predictions", "K of the body", "K", "radii", "allowances"]
    measuring.table(f"Differences from {title}", header, sorted(table))
    differences.sort(key=lambda row: (row["with"], row["model"], row["arithmetic"]))
    measuring.write("gpu_certificate", {"reference": title, "differences": differences})
    return int(failed or not table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, nargs="?", help="where the models are")
    parser.add_argument("--make", action="store_true", help="train them first, into the folder")
    parser.add_argument("--output", type=pathlib.Path, help="file to write")
    parser.add_argument("--compare", type=pathlib.Path, nargs="+", help="files that were written")
    arguments = parser.parse_args()
    if arguments.compare:
        sys.exit(compare(*arguments.compare))
    if arguments.folder is None or not (arguments.make or arguments.output):
        parser.error("name a folder, and --make or an --output file")
    if arguments.make:
        make(arguments.folder)
    if arguments.output:
        run(arguments.folder, arguments.output)
