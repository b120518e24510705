"""Runs the examples for the gallery: what each prints, and its picture, into docs/gallery.

make gallery                  (all of them: some ten minutes)
python docs/_build/gallery.py quickstart attack
"""

import csv
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap

ROOT = pathlib.Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"

# {example: (backend, arguments, the picture it writes)}; None draws the training from its log.
EXAMPLES = {
    "quickstart": ("jax", [], "certified_accuracy.png"),
    "custom_model": ("torch", [], ""),
    "attack": ("jax", ["--samples", "60", "--steps", "20"], "robust_accuracy.png"),
    "layer_zoo": ("torch", [], "layer_zoo.png"),
    "convert": ("torch", [], "convert.png"),
    "time_series": ("torch", [], "time_series.png"),
    "segmentation": ("torch", [], "segmentation.png"),
    "wasserstein": ("torch", [], "wasserstein.png"),
    "signed_distance": ("torch", [], "signed_distance.png"),
    "conformal": ("torch", [], "conformal.png"),
    "mnist": ("tensorflow", ["--smoke", "--epochs", "6"], None),
    "cifar10": ("torch", ["--smoke", "--epochs", "6"], None),
    "imagenet": ("jax", ["--smoke"], None),
}
# Lines that say how far something is, not what came out.
PROGRESS = re.compile(r"^(Epoch \d|\d+/\d+ |\s*$)|[\r\b\x1b]")
WIDTH = 84  # what the page shows without a scroll bar


def run(name):
    backend, arguments, picture = EXAMPLES[name]
    with tempfile.TemporaryDirectory() as folder:
        output = [] if picture == "" else ["--output", folder]
        done = subprocess.run(
            [sys.executable, f"examples/{name}.py", *arguments, *output],
            cwd=ROOT,
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines = [line for line in done.stdout.splitlines() if not PROGRESS.search(line)]
        command = " ".join([f"KERAS_BACKEND={backend} python examples/{name}.py", *arguments])
        text = [f"$ {command}", *(line.replace(folder, f"runs/{name}") for line in lines)]
        wrapped = (textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in text)
        (GALLERY / f"{name}.txt").write_text("\n".join(wrapped) + "\n")
        if picture:
            shutil.copy(pathlib.Path(folder) / picture, GALLERY / f"{name}.png")
        elif picture is None:
            draw(pathlib.Path(folder) / "log.csv", GALLERY / f"{name}.png")


def draw(log, path):
    """Accuracy and certified accuracy on the held-out images, epoch by epoch."""
    from matplotlib.figure import Figure

    with log.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    epochs = range(1, len(rows) + 1)
    for column in ("val_accuracy", "val_certified_accuracy"):
        label = column.removeprefix("val_").replace("_", " ")
        axes.plot(epochs, [100 * float(row[column]) for row in rows], marker="o", label=label)
    axes.set(xlabel="epoch", ylabel="held-out images, %", ylim=(0, 102), xticks=epochs)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    GALLERY.mkdir(exist_ok=True)
    for name in sys.argv[1:] or EXAMPLES:
        print(f"== {name}", flush=True)
        run(name)
