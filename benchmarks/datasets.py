"""Image sets of a folder of NumPy archives: mnist.npz, fashion_mnist.npz, cifar10_jpeg.npz."""

import io
import pathlib
import sys

import keras
import numpy as np

# Of the training part these images are held out to choose settings on.
VALIDATION = {"cifar10": 5000, "mnist": 5000, "fashion_mnist": 5000, "digits": 237}


def load(folder, name, part, count=None):
    """(images in [0, 1], labels): float32 of shape (n, height, width, channels), and integers.

    Args:
        name: "cifar10" (JPEG q75 copy), "mnist", "fashion_mnist", or "digits", scikit-learn's, for
            which no folder is needed.
        part: "train", "validation" (the last images of the training part), "whole" (both) or
            "test".
        count: Take this many from the beginning.
    """
    if name == "digits":
        return _digits(part, count)
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


def _digits(part, count):
    """As examples/quickstart.py splits them."""
    sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
    import quickstart

    train, test = quickstart.digits()
    held_out = len(train[1]) - VALIDATION["digits"]
    parts = {
        "train": [a[:held_out] for a in train],
        "validation": [a[held_out:] for a in train],
        "whole": train,
        "test": test,
    }
    images, labels = parts[part]
    return images[:count], labels[:count].astype("int32")


def _decoded(stream):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(stream.tobytes())))


def padded(images, margin):
    """Images in a margin of zeros, e.g. MNIST's 28 x 28 in 32 x 32, which patches of 4 tile."""
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


class Augmented(keras.utils.PyDataset):
    """Batches in an order of their own each epoch, images shifted and perhaps mirrored.

    Order, shifts and flips follow from NumPy's random state as an epoch begins, so that
    BackupAndRestore repeats them.

    Args:
        images, labels: As `load` returns them.
        batch: Images of a batch; what is left over at the end of an epoch is left out of it.
        shift: Most pixels an image moves by in each direction, zeros entering.
        flip: Whether half of the images are mirrored.
        cutout: Side of a square of grey that half of the images get, anywhere inside.
        randaugment: Strength in [0, 1] of Keras' RandAugment, as the examples use it.
    """

    def __init__(self, images, labels, batch, shift=0, flip=False, cutout=0, randaugment=0.0):
        super().__init__()  # one worker: others would fetch batches before the epoch's order
        self._windows = np.lib.stride_tricks.sliding_window_view(
            padded(images, shift), images.shape[1:3], axis=(1, 2)
        )
        self._labels, self._batch, self._shift, self._flip = labels, batch, shift, flip
        self._cutout = cutout
        self._changed = _randaugment(randaugment) if randaugment else None
        self.on_epoch_begin()

    def __len__(self):
        return len(self._labels) // self._batch

    def __getitem__(self, index):
        rng = np.random.default_rng((self._seed, index))
        rows = self._order[index * self._batch : (index + 1) * self._batch]
        down, right = rng.integers(0, 2 * self._shift + 1, (2, len(rows)))
        images = np.moveaxis(self._windows[rows, down, right], 1, -1)
        if self._flip:
            mirrored = rng.random(len(rows)) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        if self._changed:
            seeds = rng.integers(0, 2**31, (len(rows), 2), dtype="int32")
            images = np.clip(self._changed(images, seeds), 0, 1)
        if self._cutout:
            side, chosen = self._cutout, np.flatnonzero(rng.random(len(rows)) < 0.5)
            corners = rng.integers(0, images.shape[1] - side + 1, (len(chosen), 2))
            for row, (top, left) in zip(chosen, corners, strict=True):
                images[row, top : top + side, left : left + side] = 0.5
        return images, self._labels[rows]

    def on_epoch_begin(self):
        self._order = np.random.permutation(len(self._labels))
        self._seed = np.random.randint(2**31)


def _randaugment(strength):
    """The examples' RandAugment, a function of (images, seeds) of a batch."""
    import tensorflow as tf

    sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
    from image_training.pipeline import RandAugment

    one = RandAugment(strength)

    @tf.function
    def batch(images, seeds):
        return tf.map_fn(lambda pair: one(*pair), (images, seeds), fn_output_signature="float32")

    return lambda images, seeds: batch(images, seeds).numpy()
