"""Images that the examples make themselves for `--smoke`: easily told apart, and noisy."""

TRAIN, TEST = 48, 16  # images of a class


def images(count, classes, height, width, channels, generator):
    """(uint8 images, labels): stripes, whose direction, width and colour tell the class."""
    import numpy as np

    labels = np.arange(count) % classes
    angle, cycles = np.pi / 5 * (labels % 5), 2 + 3 * (labels // 5)
    rows, columns = np.mgrid[:height, :width] / min(height, width)
    along = np.multiply.outer(cycles * np.cos(angle), columns)
    along += np.multiply.outer(cycles * np.sin(angle), rows)
    phase = generator.uniform(0, 1, (count, 1, 1))
    stripes = 0.5 + 0.4 * np.sin(2 * np.pi * (along + phase))
    hue = 2 * np.pi * np.add.outer(labels / classes, np.arange(channels) / 3)
    colour = 0.6 + 0.4 * np.cos(hue) if channels == 3 else np.ones((count, 1))
    noise = generator.normal(0, 0.05, (count, height, width, channels))
    values = stripes[..., None] * colour[:, None, None] + noise
    return np.round(255 * np.clip(values, 0, 1)).astype("uint8"), labels


def class_folders(root, classes=4):
    """Writes JPEG files of two sizes to `root/train/CLASS` and `root/val/CLASS`."""
    import numpy as np

    from image_training.pipeline import tf

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
