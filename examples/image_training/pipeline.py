"""The examples' input pipeline, in tf.data whatever Keras' backend: batches of images in [0, 1].

What is drawn at random follows from the seed, the epoch and the image's place in it alone: neither
the number of threads nor an interruption changes it (but for keras-cv, which draws on its own).
"""

import functools

import keras  # before tensorflow: with PyTorch in the same process, that one comes first
import tensorflow as tf

if keras.backend.backend() != "tensorflow":
    tf.config.set_visible_devices([], "GPU")  # its memory is another library's

CENTRE = 0.875  # share of the shorter side that the crop of a test image keeps


class Epoch(keras.callbacks.Callback):
    """Tells a `training` data set which epoch it is in: the callback `fit` must get."""

    def __init__(self):
        super().__init__()
        with tf.device("CPU:0"):
            self.number = tf.Variable(0, dtype="int64", trainable=False)

    def on_epoch_begin(self, epoch, logs=None):
        self.number.assign(epoch)


def training(source, batch_size, augment, seed, epoch):
    """Shuffled batches of augmented images and labels, the last incomplete one left out.

    Args:
        augment: Function of (encoded image, seed of shape (2,)) that returns an image.
        epoch: `Epoch`.
    """
    count = source.count("train")
    if count < batch_size:
        raise SystemExit(f"{count} images for training are less than --batch-size {batch_size}")

    def load(number, index, stored, label):
        base = tf.stack([tf.constant(seed, "int64"), number])
        draw = tf.random.experimental.stateless_fold_in(base, index)
        return augment(source.encoded(stored), draw), label

    stored = source.stored("train")

    def one_epoch(_):
        number = epoch.number.read_value()
        tf.random.set_seed(1)  # of this graph: beside a seed of 0 `shuffle` takes no tensor
        shuffled = stored.shuffle(min(count, source.buffer), seed=seed + number)
        return shuffled.enumerate().map(lambda index, pair: (number, index, *pair))

    images = tf.data.Dataset.range(1).flat_map(one_epoch)
    images = images.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    batches = images.batch(batch_size, drop_remainder=True)
    steps = tf.data.experimental.assert_cardinality(count // batch_size)
    return batches.apply(steps).prefetch(tf.data.AUTOTUNE)


def evaluation(source, batch_size, prepare, count=None, part="test"):
    """Batches of the first `count` images of a part that is not trained on, or of all, and labels.

    Args:
        prepare: Function of an encoded image that returns an image.
    """
    total = source.count(part)
    total = total if count is None else min(count, total)
    images = source.stored(part).take(total)
    images = images.map(
        lambda stored, label: (prepare(source.encoded(stored)), label),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    batches = images.batch(batch_size)
    steps = tf.data.experimental.assert_cardinality(-(-total // batch_size))
    return batches.apply(steps).prefetch(tf.data.AUTOTUNE)


def decoded(image, channels):
    """An image of uint8, shape (height, width, channels), of the bytes of a file or of itself."""
    if image.dtype == tf.string:
        image = tf.io.decode_image(image, channels=channels, expand_animations=False)
    image.set_shape((None, None, channels))
    return image


def scaled(image):
    """In [0, 1], float32."""
    return tf.cast(image, "float32") / 255


def resized(image, size):
    """To `size` x `size`, and to [0, 1]."""
    return scaled(tf.image.resize(image, (size, size), antialias=True))


def whole(image, channels):
    """The image as it is, in [0, 1]."""
    return scaled(decoded(image, channels))


def central_crop(image, size, channels=3):
    """The square in the middle, CENTRE of the shorter side long, resized."""
    image = decoded(image, channels)
    height, width = tf.unstack(tf.shape(image)[:2])
    side = tf.cast(CENTRE * tf.cast(tf.minimum(height, width), "float32"), "int32")
    corner = (height - side) // 2, (width - side) // 2
    return resized(tf.image.crop_to_bounding_box(image, *corner, side, side), size)


def random_resized_crop(image, seed, size, channels=3):
    """8 to 100 % of the area, sides 3/4 to 4/3, resized; of a JPEG only that much is decoded."""
    is_file = image.dtype == tf.string
    if is_file:
        is_jpeg = tf.io.is_jpeg(image)
        shape = tf.cond(
            is_jpeg,
            lambda: tf.io.extract_jpeg_shape(image),
            lambda: tf.shape(decoded(image, channels)),
        )
    else:
        shape = tf.shape(image)
    shape = tf.stack([shape[0], shape[1], channels])
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros((1, 0, 4)),
        seed,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], extent[:2]], axis=0)

    def cropped():
        return tf.image.crop_to_bounding_box(decoded(image, channels), *tf.unstack(window))

    def cropped_jpeg():
        return tf.io.decode_and_crop_jpeg(image, window, channels=channels)

    return resized(tf.cond(is_jpeg, cropped_jpeg, cropped) if is_file else cropped(), size)


def random_shift(image, seed, padding, channels):
    """Cropped back to its size, at a random place, after `padding` black pixels on each side."""
    image = decoded(image, channels)
    shape = tf.shape(image)
    sides = [[padding, padding], [padding, padding], [0, 0]]
    return scaled(tf.image.stateless_random_crop(tf.pad(image, sides), shape, seed))


def random_flip(image, seed):
    return tf.image.stateless_random_flip_left_right(image, seed)


def augmentation(name, crop, prepare, flip=True, strength=0.1):
    """The function of (encoded image, seed) that `training` takes.

    Args:
        name: One of `recipe.AUGMENTATIONS`: "none" is `prepare`; "basic" crops and flips;
            "randaugment" adds Keras' RandAugment, "keras-cv" that of keras-cv.
        crop: Function of (encoded image, seed).
        prepare: Function of an encoded image.
        flip: Whether left and right may be exchanged.
        strength: RandAugment's, in [0, 1].
    """
    if name == "none":
        return lambda image, seed: prepare(image)
    more = None
    if name == "randaugment":
        more = RandAugment(strength)
    elif name == "keras-cv":
        import keras_cv

        cv = keras_cv.layers.RandAugment(value_range=(0, 1), magnitude=strength)

        def more(image, seed):
            return cv(image)

    def augment(image, seed):
        first, second, third = tf.unstack(tf.random.experimental.stateless_split(seed, 3))
        image = crop(image, first)
        image = random_flip(image, second) if flip else image
        image = more(image, third) if more else image
        return tf.clip_by_value(image, 0.0, 1.0)

    return augment


class Draws(keras.random.SeedGenerator):
    """Seeds that follow from a given one, where Keras' own change a state in any order."""

    def following(self, base):
        self._base, self._drawn = base, 0
        return self

    def next(self, ordered=True):
        self._drawn += 1
        return tf.random.experimental.stateless_fold_in(self._base, self._drawn)


class RandAugment:
    """Layers of Keras' RandAugment, as many as it takes, drawn for an image by the seed passed in.

    Only the layers drawn are computed, where Keras computes all and selects. Two are left out: its
    posterization, which at small strengths leaves one bit a channel, and its equalization, which on
    JAX takes 256 operations a channel.
    """

    LAYERS = (
        "random_shear",
        "random_translation",
        "random_rotation",
        "random_brightness",
        "random_color_degeneration",
        "random_contrast",
        "random_sharpness",
        "solarization",
        "auto_contrast",
    )

    def __init__(self, strength):
        keras_own = keras.layers.RandAugment(value_range=(0, 1), factor=strength)
        self._layers = [getattr(keras_own, name) for name in self.LAYERS]
        for layer in self._layers:
            layer.backend.set_backend("tensorflow")
        self._count = keras_own.num_ops
        self._draws = Draws(0)  # holds a variable of Keras': not made while tracing
        self._one = tf.function(self._one, autograph=False)  # traced once for all

    def __call__(self, image, seed):
        for one_seed in tf.unstack(tf.random.experimental.stateless_split(seed, self._count)):
            image = self._one(image, one_seed)
        return image

    def _one(self, image, seed):
        images = image[None]  # some layers answer with a batch whatever they are given

        def apply(layer):
            drawn = layer.get_random_transformation(images, seed=self._draws.following(seed))
            return tf.ensure_shape(layer.transform_images(images, drawn)[0], image.shape)

        branches = [functools.partial(apply, layer) for layer in self._layers]
        index = tf.random.stateless_uniform((), seed, 0, len(branches), "int32")
        return tf.switch_case(index, branches)
