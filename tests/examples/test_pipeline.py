"""Where the training examples' images come from, and what is done to them on the way."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from image_training import pipeline, smoke, sources

CORE = ("randaugment", "basic", "none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return sources.Folders(smoke.class_folders(tmp_path_factory.mktemp("folders"), classes=2))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = smoke.archive(tmp_path_factory.mktemp("archive"), side=12, channels=3, classes=2)
    return sources.Archive(path, "images")


def augmentation(name, size=16):
    crop = functools.partial(pipeline.random_resized_crop, size=size)
    return pipeline.augmentation(name, crop, functools.partial(pipeline.central_crop, size=size))


def epoch_of(source, augment, number=0, seed=0):
    """(images, labels) of one epoch."""
    epoch = pipeline.Epoch()
    batches = pipeline.training(source, 8, augment, seed, epoch)
    epoch.on_epoch_begin(number)
    images, labels = zip(*batches.as_numpy_iterator())
    assert len(images) == len(batches)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("name", CORE)
def test_training_images_are_in_range_and_repeatable(folders, name):
    """The same seed and epoch give the same images, whatever the threads do; others do not."""
    augment = augmentation(name)
    images, labels = epoch_of(folders, augment)
    assert images.shape == (88, 16, 16, 3) and images.dtype == "float32"
    assert 0 <= images.min() < 0.1 and 0.9 < images.max() <= 1
    assert np.bincount(labels).min() > 35
    # A pipeline made anew, as by a process that goes on with an interrupted training.
    again, labels_again = epoch_of(folders, augmentation(name))
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)
    for other in ({"number": 1}, {"seed": 1}):
        different, different_labels = epoch_of(folders, augment, **other)
        assert (labels != different_labels).any()
        assert np.abs(images - different).max() > 0.1


def test_augmentations_do_more_and_more(archive):
    """Shift and flip move pixels; RandAugment makes another image each time."""
    shift = functools.partial(pipeline.random_shift, padding=2, channels=3)
    whole = functools.partial(pipeline.whole, channels=3)
    image = next(iter(archive.stored("train")))[0]
    seeds = [tf.constant([0, i], "int64") for i in range(12)]
    made = {}
    for name in CORE:
        augment = tf.function(pipeline.augmentation(name, shift, whole, strength=0.5))
        made[name] = np.stack([augment(image, seed) for seed in seeds])
        assert made[name].min() >= 0 and made[name].max() <= 1
    pixels = {name: np.round(255 * images).astype("uint8") for name, images in made.items()}
    assert (pixels["none"] == image.numpy()).all()
    distinct = {name: len(np.unique(images, axis=0)) for name, images in pixels.items()}
    assert distinct["none"] == 1 and distinct["basic"] > 6 and distinct["randaugment"] == 12
    # Black pixels come in, the rest are the image's.
    known = np.concatenate([image.numpy().reshape(-1, 3), [[0, 0, 0]]])
    assert set(map(tuple, pixels["basic"].reshape(-1, 3))) <= set(map(tuple, known))


def test_flip_is_left_out_where_it_must_be():
    image = tf.constant(np.arange(27, dtype="uint8").reshape(3, 3, 3))
    crop = lambda image, seed: pipeline.scaled(image)  # noqa: E731
    for flip, expected in ((True, 2), (False, 1)):
        augment = pipeline.augmentation("basic", crop, pipeline.scaled, flip)
        made = [augment(image, tf.constant([3, i], "int64")).numpy() for i in range(8)]
        assert len(np.unique(made, axis=0)) == expected


def test_cropping_while_decoding_changes_nothing():
    """Of a JPEG only the crop is decoded: the pixels are those of a lossless copy, cropped.

    At the crop's edge the decoder lacks the neighbours that it would smooth colours with.
    """
    image = smoke.images(1, 4, 48, 64, 3, np.random.default_rng(0))[0][0]
    jpeg = tf.io.encode_jpeg(image)
    pixels = tf.io.decode_jpeg(jpeg)
    crop = tf.function(functools.partial(pipeline.random_resized_crop, size=16))
    for i in range(5):
        seed = tf.constant([0, i], "int64")
        cropped = crop(jpeg, seed)
        lossless = crop(tf.io.encode_png(pixels), seed)
        np.testing.assert_allclose(cropped, lossless, atol=0.08)
        assert np.abs(cropped - lossless).mean() < 2e-3
        np.testing.assert_array_equal(lossless, crop(pixels, seed))


def test_evaluation_yields_each_image_once_in_order(archive):
    prepare = functools.partial(pipeline.whole, channels=3)
    batches = pipeline.evaluation(archive, 10, prepare)
    images, labels = map(np.concatenate, zip(*batches.as_numpy_iterator()))
    expected, expected_labels = archive._all("test")
    np.testing.assert_allclose(images, expected / 255, atol=1e-7)
    np.testing.assert_array_equal(labels, expected_labels)
    assert len(batches) == 4
    (part,) = pipeline.evaluation(archive, 10, prepare, count=7).as_numpy_iterator()
    np.testing.assert_array_equal(part[1], expected_labels[:7])


def test_archives_of_arrays_and_of_files_are_read_alike(archive, tmp_path):
    arrays = {}
    for part in ("train", "test"):
        images, arrays[f"{part}_labels"] = archive._all(part)
        streams = [tf.io.encode_png(image).numpy() for image in images]
        arrays[f"{part}_bytes"] = np.frombuffer(b"".join(streams), "uint8")
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, streams)])
    np.savez(tmp_path / "images.npz", **arrays)
    files = sources.Archive(tmp_path, "images")
    prepare = functools.partial(pipeline.whole, channels=3)
    assert files.classes == archive.classes == 2
    for source in (files, archive):
        assert (source.count("train"), source.count("test")) == (91, 32)
    pairs = zip(*(pipeline.evaluation(s, 32, prepare) for s in (files, archive)), strict=True)
    for (left, left_labels), (right, right_labels) in pairs:
        np.testing.assert_array_equal(left, right)
        np.testing.assert_array_equal(left_labels, right_labels)


def test_validation_images_are_not_trained_on(folders, archive):
    for source in (folders, archive):
        images = {
            part: [stored.tobytes() if hasattr(stored, "tobytes") else stored for stored in values]
            for part in ("train", "validation", "test")
            for values in [[pair[0] for pair in source.stored(part).as_numpy_iterator()]]
        }
        assert {part: len(values) for part, values in images.items()} == {
            "train": 91,
            "validation": 5,
            "test": 32,
        }
        assert len(set().union(*images.values())) == 128


def test_too_few_images_for_a_batch(archive):
    with pytest.raises(SystemExit, match="91 images for training are less than --batch-size 97"):
        pipeline.training(archive, 97, None, 0, pipeline.Epoch())


def test_sources_say_what_is_wrong(tmp_path):
    def message(found):
        with pytest.raises(SystemExit) as raised:
            found()
        return str(raised.value)

    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert "val/CLASS" in message(lambda: sources.Folders(tmp_path))
    (tmp_path / "val" / "dog").mkdir(parents=True)
    assert "same two or more classes" in message(lambda: sources.Folders(tmp_path))
    for name in ("train/dog", "val/cat"):
        (tmp_path / name).mkdir()
    assert "No .jpg" in message(lambda: sources.Folders(tmp_path).count("train"))
    missing = tmp_path / "mnist.npz"
    assert "Received: " + str(missing) in message(lambda: sources.Archive(missing, "mnist"))
    missing.write_text("no archive")
    assert "no NumPy archive" in message(lambda: sources.Archive(missing, "mnist"))
    np.savez(missing, x=np.zeros(3))
    assert "It has: x" in message(lambda: sources.Archive(tmp_path, "mnist"))


def test_prepared_data_sets(tmp_path):
    """Records as tensorflow-datasets prepares them, read by name, their images undecoded."""
    images, labels = smoke.images(25, 3, 20, 28, 3, np.random.default_rng(0))
    stored = [(i, {"image": images[i], "label": labels[i]}) for i in range(25)]
    form = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="stripes",
        version="1.0.0",
        features=tfds.features.FeaturesDict(form),
        split_datasets={"train": stored[:17], "test": stored[17:]},
        data_dir=tmp_path,
        disable_shuffling=True,
    )
    source = sources.Prepared("stripes", tmp_path)
    assert source.classes == 3
    assert [source.count(p) for p in ("train", "validation", "test")] == [16, 1, 8]
    assert next(iter(source.stored("train")))[0].dtype == "string"
    prepare = functools.partial(pipeline.whole, channels=3)
    (batch,) = pipeline.evaluation(source, 8, prepare)
    np.testing.assert_array_equal(np.round(255 * batch[0].numpy()), images[17:])
    np.testing.assert_array_equal(batch[1], labels[17:])
    seen, seen_labels = epoch_of(source, lambda image, seed: prepare(image))
    expected = {(image.tobytes(), label) for image, label in zip(images[1:17], labels[1:17])}
    pixels = np.round(255 * seen).astype("uint8")
    assert {(image.tobytes(), label) for image, label in zip(pixels, seen_labels)} == expected


def test_gpus_stay_the_backend_s():
    if keras.backend.backend() != "tensorflow":
        assert tf.config.get_visible_devices("GPU") == []
