"""Images that the examples make themselves for `--smoke`: easily told apart, and noisy."""

TRAIN, TEST = 48, 16  # images of a class


def images(count, classes, height, width, channels, generator):
    """(uint8 images, labels): stripes whose direction tells the class."""
    import numpy as np

    labels = np.arange(count) % classes
    angle = np.pi * labels / classes
    rows, columns = np.mgrid[:height, :width] / min(height, width)
    along = np.multiply.outer(np.cos(angle), columns) + np.multiply.outer(np.sin(angle), rows)
    phase = generator.uniform(0, 2 * np.pi, (count, 1, 1))
    stripes = 0.5 + 0.4 * np.sin(6 * np.pi * along + phase)
    tint = generator.uniform(0.8, 1, (count, 1, 1, channels))
    noise = generator.normal(0, 0.05, (count, height, width, channels))
    return np.round(255 * np.clip(stripes[..., None] * tint + noise, 0, 1)).astype("uint8"), labels


def class_folders(root, classes=4):
    """Writes JPEG files of two sizes to `root/train/CLASS` and `root/val/CLASS`."""
    import numpy as np
    import tensorflow as tf

    generator = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("val", TEST)):
        for size, (height, width) in enumerate(((48, 48), (40, 56))):
            made = images(count * classes // 2, classes, height, width, 3, generator)
            for index, (image, label) in enumerate(zip(*made)):
                folder = root / part / f"class_{label}"
                folder.mkdir(parents=True, exist_ok=True)
                file = tf.io.encode_jpeg(image, quality=90)
                (folder / f"{size}_{index}.jpg").write_bytes(file.numpy())
    return root


def archive(folder, side, channels, classes=10):
    """Writes an archive of arrays as MNIST's."""
    import numpy as np

    generator, arrays = np.random.default_rng(0), {}
    for part, count in (("train", TRAIN), ("test", TEST)):
        made = images(count * classes, classes, side, side, channels, generator)
        arrays |= dict(zip((f"{part}_images", f"{part}_labels"), made))
    np.savez(folder / "images.npz", **arrays)
    return folder / "images.npz"
