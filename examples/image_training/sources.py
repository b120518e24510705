"""Where the examples' images come from: class folders, tensorflow-datasets, or a NumPy archive.

Imports nothing but the standard library until images are read: what is missing is said at once.
A source has `classes`, their number; `count(part)` and `stored(part)`, with part "train", "test" or
"validation", the latter a `tf.data.Dataset` of (stored image, label); `buffer`, how many of them to
shuffle at a time; and `encoded(stored)`, which gives the bytes of an image file or a uint8 image of
shape (height, width, channels). "validation" are 1 in HELD_OUT of the images that were meant for
training, and are not trained on: what is chosen while training is not chosen on test images.
"""

import contextlib
import importlib.util
import itertools
import os
import pathlib
import random
import tempfile
import zipfile

HELD_OUT = 20
SUFFIXES = (".jpg", ".jpeg", ".png")


@contextlib.contextmanager
def opened(arguments, make):
    """The source that `--data`, or `--dataset` and `--data-dir`, name; one made for `--smoke`.

    Args:
        make: Function that writes images for `--smoke` to a folder, and returns the `--data`.

    Raises:
        SystemExit: saying how to get what is missing, packages included.
    """
    needs = {"tensorflow": "data", "jinja2": "plot", "matplotlib": "plot"}
    if arguments.tensorboard:
        needs["tensorboard"] = "data"
    for package, extra in needs.items():
        require(package, extra)
    if arguments.augmentation == "keras-cv":
        require("keras_cv", remedy="pip install keras-cv, or choose another --augmentation")
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data
        if arguments.smoke and not data:
            data = make(pathlib.Path(folder))
        yield _found(data, arguments.dataset, arguments.data_dir)


def _found(data, dataset, data_dir):
    if data is None:
        return Prepared(dataset, data_dir)
    path = pathlib.Path(data)
    return Folders(path) if (path / "train").is_dir() else Archive(path, dataset)


def require(package, extra=None, remedy=None):
    """SystemExit if a package is missing, with the library's extra that has it, or another way."""
    if importlib.util.find_spec(package) is None:
        from keras_lipnext.installation import installing  # imports Keras: only to say this

        ways = [installing(extra)] if extra else []
        ways += [remedy] if remedy else []
        raise SystemExit(
            f"This example needs {package}, which is not installed: {', or '.join(ways)}"
        )


class _Listed:
    """A source whose images, or their paths, are in memory: `_all` gives those of a file part."""

    def __init__(self):
        self._parts = {}

    def count(self, part):
        return len(self._listed(part)[1])

    def stored(self, part):
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices(self._listed(part))

    @property
    def buffer(self):
        return self.count("train")

    def _listed(self, part):
        """(images or paths, labels) of a part."""
        if part == "test" and part not in self._parts:
            self._parts[part] = self._all(part)
        if part not in self._parts:
            images, labels = self._all("train")
            total = len(labels)
            held_out = set(random.Random(0).sample(range(total), -(-total // HELD_OUT)))
            for name in ("train", "validation"):
                rows = [i for i in range(total) if (i in held_out) == (name == "validation")]
                self._parts[name] = tuple(
                    [values[i] for i in rows] if isinstance(values, list) else values[rows]
                    for values in (images, labels)
                )
        return self._parts[part]


class Folders(_Listed):
    """Image files in class folders: `root/train/CLASS/*.jpg`, `root/val/CLASS/*.jpg`."""

    def __init__(self, root):
        self._folders = {"train": root / "train", "test": root / "val"}
        names = {}
        for part, folder in self._folders.items():
            if not folder.is_dir():
                raise SystemExit(f"--data needs class folders {folder}/CLASS/*.jpg; there are none")
            names[part] = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if names["train"] != names["test"] or len(names["train"]) < 2:
            raise SystemExit(
                "The same two or more classes must be folders of train and of val. Received: "
                f"{len(names['train'])} in {self._folders['train']}, "
                f"{len(names['test'])} in {self._folders['test']}"
            )
        self._names = names["train"]
        super().__init__()

    @property
    def classes(self):
        return len(self._names)

    @staticmethod
    def encoded(path):
        import tensorflow as tf

        return tf.io.read_file(path)

    def _all(self, part):
        paths, labels = [], []
        for label, name in enumerate(self._names):
            entries = os.scandir(self._folders[part] / name)
            images = sorted(e.path for e in entries if e.name.lower().endswith(SUFFIXES))
            paths += images
            labels += len(images) * [label]
        if not paths:
            raise SystemExit(f"No {', '.join(SUFFIXES)} in {self._folders[part]}/CLASS")
        return paths, labels


class Prepared:
    """A data set that tensorflow-datasets has prepared on this machine, its files undecoded."""

    buffer = 16384  # files of images: 2 GB of ImageNet's; tfds has shuffled them once

    def __init__(self, name, folder=None):
        require("tensorflow_datasets", "data", "read files with --data")
        root = pathlib.Path(
            folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        ).expanduser()
        if not any((root / name.split(":")[0]).rglob("dataset_info.json")):
            manual = ""
            if name.startswith("imagenet2012"):
                manual = (
                    "Before that, with an account of https://image-net.org, download "
                    "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar to "
                    f"{root}/downloads/manual. "
                )
            # Not `tfds build`: that asks for apache-beam.
            raise SystemExit(
                f"There is no prepared '{name}' in {root}. To get it:\n\n"
                f"    python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
                f"data_dir='{root}').download_and_prepare()\"\n\n"
                f"{manual}Or read files of your own with --data, or try the example on images it "
                "makes itself with --smoke."
            )
        self._name, self._root = name, root
        self._opened = None

    def _builder(self):
        if self._opened is None:
            import tensorflow_datasets as tfds

            self._opened = tfds.builder(self._name, data_dir=str(self._root))
            features = self._opened.info.features
            if not {"image", "label"} <= set(features):
                raise SystemExit(
                    f"'{self._name}' has no features 'image' and 'label'. It has: {list(features)}"
                )
        return self._opened

    def _split(self, part):
        splits = self._builder().info.splits
        if part == "test":
            return "validation" if "validation" in splits else "test"  # the former is ImageNet's
        edge = -(-splits["train"].num_examples // HELD_OUT)  # tfds has shuffled them once
        return f"train[{edge}:]" if part == "train" else f"train[:{edge}]"

    @property
    def classes(self):
        return self._builder().info.features["label"].num_classes

    def count(self, part):
        return self._builder().info.splits[self._split(part)].num_examples

    def stored(self, part):
        import tensorflow_datasets as tfds

        examples = self._builder().as_dataset(
            split=self._split(part), decoders={"image": tfds.decode.SkipDecoding()}
        )
        return examples.map(lambda example: (example["image"], example["label"]))

    @staticmethod
    def encoded(stored):
        return stored


class Archive(_Listed):
    """Arrays of a NumPy archive: `train_images`, `train_labels`, `test_images`, `test_labels`.

    Or, for images, the streams of their files one after the other: image i of `train_bytes` runs
    from `train_offsets[i]` to `train_offsets[i + 1]`. A folder stands for its only `NAME*.npz`.
    """

    def __init__(self, path, name):
        archives = sorted(path.glob(f"{name}*.npz")) if path.is_dir() else [path]
        if len(archives) != 1 or not archives[0].is_file():
            raise SystemExit(
                f"--data takes a .npz file, or a folder with one {name}*.npz, or with train/CLASS "
                f"and val/CLASS. Received: {path}"
            )
        self._path = archives[0]
        super().__init__()
        try:
            with zipfile.ZipFile(self._path) as archive:
                keys = {pathlib.PurePath(entry).stem for entry in archive.namelist()}
        except zipfile.BadZipFile as error:
            raise SystemExit(f"{self._path} is no NumPy archive: {error}") from error
        for part in ("train", "test"):
            if f"{part}_labels" not in keys or not keys & {f"{part}_images", f"{part}_bytes"}:
                raise SystemExit(
                    f"{self._path} needs arrays {part}_images (or {part}_bytes and "
                    f"{part}_offsets) and {part}_labels. It has: {', '.join(sorted(keys))}"
                )

    @property
    def classes(self):
        return int(max(self._listed(part)[1].max() for part in ("train", "test"))) + 1

    @staticmethod
    def encoded(stored):
        return stored

    def _all(self, part):
        import numpy as np

        with np.load(self._path) as archive:
            labels = archive[f"{part}_labels"].astype("int64")
            if f"{part}_images" in archive:
                images = archive[f"{part}_images"]
                return images if images.ndim == 4 else images[..., None], labels
            streams = archive[f"{part}_bytes"].tobytes()
            offsets = archive[f"{part}_offsets"]
            return [streams[a:b] for a, b in itertools.pairwise(offsets)], labels
