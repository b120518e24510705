"""Image sets of a folder of NumPy archives: mnist.npz, fashion_mnist.npz, cifar10_jpeg.npz."""

import io
import pathlib

import numpy as np

# Of the training part these images are held out to choose settings on.
VALIDATION = {"cifar10": 5000, "mnist": 5000}


def load(folder, name, part, count=None):
    """(images in [0, 1], labels): float32 of shape (n, height, width, channels), and integers.

    Args:
        name: "cifar10" (JPEG q75 copy) or "mnist".
        part: "train", "validation" (the last images of the training part), "whole" (both) or
            "test".
        count: Take this many from the beginning.
    """
    path = pathlib.Path(folder) / {"cifar10": "cifar10_jpeg.npz"}.get(name, f"{name}.npz")
    if not path.exists():
        raise SystemExit(f"--data needs a folder with {path.name}. Received: {folder}")
    archive = np.load(path)
    key = "test" if part == "test" else "train"
    labels = archive[f"{key}_labels"].astype("int32")
    held_out = len(labels) - VALIDATION[name]
    rows = {"test": range(len(labels)), "whole": range(len(labels)), "train": range(held_out)}
    rows = rows.get(part, range(held_out, len(labels)))[:count]
    if f"{key}_images" in archive:
        images = archive[f"{key}_images"][rows.start : rows.stop, ..., None]
    else:
        streams, offsets = archive[f"{key}_bytes"], archive[f"{key}_offsets"]
        images = np.stack([_decoded(streams[offsets[i] : offsets[i + 1]]) for i in rows])
    return (images / 255).astype("float32"), labels[rows.start : rows.stop]


def _decoded(stream):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(stream.tobytes())))
