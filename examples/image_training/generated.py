"""Generated images among the real ones of each batch, as in LiResNet++ [arXiv 2310.02513]."""

import keras
import numpy as np

import keras_lipnext as lip


def load(path, labeller=None):
    """(uint8 images, labels) of an archive with `images`, and `labels` or a model that gives them.

    Args:
        labeller: A saved model, or a preset of LipNeXt, whose predictions are taken as labels.
    """
    with np.load(path) as archive:
        if "images" not in archive or archive["images"].dtype != "uint8":
            raise SystemExit(f"{path} needs an array `images` of uint8. It has: {archive.files}")
        images = archive["images"]
        if labeller is None and "labels" in archive:
            return images, archive["labels"].reshape(-1)
    if labeller is None:
        raise SystemExit(f"{path} has no array `labels`: name a model that gives them, --labeller")
    if str(labeller).endswith(".keras"):
        model = keras.saving.load_model(labeller, compile=False)
    else:
        model = lip.LipNeXt.from_preset(labeller)
    labels = [
        np.argmax(model.predict(images[i : i + 500].astype("float32") / 255, verbose=0), axis=-1)
        for i in range(0, len(images), 500)
    ]
    return images, np.concatenate(labels)


class Mixed(keras.utils.PyDataset):
    """Batches of real images and generated ones; an epoch is one pass over the real images.

    Orders itself by NumPy's random state as an epoch begins, so that BackupAndRestore repeats it.

    Args:
        real: (images in [0, 1], labels).
        generated: (images of uint8, labels).
        share: Of each batch that is generated, between 0 and 1, both excluded.
    """

    def __init__(self, real, generated, share, batch_size):
        super().__init__()
        self._count = batch_size - round(share * batch_size), round(share * batch_size)
        if min(self._count) < 1 or len(real[0]) < self._count[0]:
            raise SystemExit(
                "A batch needs real and generated images. Received: "
                f"a share of {share} of {batch_size} images, {len(real[0])} real images"
            )
        if real[0].shape[1:] != generated[0].shape[1:]:
            raise SystemExit(
                f"Generated images must have the shape {real[0].shape[1:]} of the real ones. "
                f"Received: {generated[0].shape[1:]}"
            )
        self._parts = real, generated
        self.on_epoch_begin()

    def __len__(self):
        return len(self._parts[0][0]) // self._count[0]

    def on_epoch_begin(self):
        needed = [count * len(self) for count in self._count]
        # Where there are fewer, generated images are used again in the same order.
        self._orders = [
            np.resize(np.random.permutation(len(part[0])), n)
            for part, n in zip(self._parts, needed)
        ]

    def __getitem__(self, index):
        rows = [
            order[index * count : (index + 1) * count]
            for order, count in zip(self._orders, self._count)
        ]
        (x, y), (made, labels) = ((part[0][r], part[1][r]) for part, r in zip(self._parts, rows))
        images = np.concatenate([x, made.astype("float32") / 255])
        return images, np.concatenate([y, labels.astype(y.dtype)])
