"""Train a LipNeXt on CIFAR-10, and certify it on the test images: one file to read and to change.

    KERAS_BACKEND=jax python examples/cifar10.py --smoke          (a minute, needs no data)
    KERAS_BACKEND=jax python examples/cifar10.py                  (Keras downloads the images)
    KERAS_BACKEND=jax python examples/cifar10.py --data FILE      (an .npz: train_images, ...)
    KERAS_BACKEND=jax python examples/cifar10.py --generated FILE (an .npz: images, labels)

    pip install -e '.[jax,plot]'                                  (or torch, or tensorflow)

An archive holds uint8 arrays train_images (n, 32, 32, 3), train_labels (n,), test_images,
test_labels; or JPEG files one after the other, train_bytes, and where they begin, train_offsets.
Started again with the same arguments, it goes on with the epoch in which it was killed. Writes to a
folder: log.csv, best.keras, model.keras, certificate.html, certificate.json.
"""

import argparse
import io
import itertools
import pathlib

import keras
import numpy as np
from image_training import generated

import keras_lipnext as lip

SHAPE, CLASSES = (32, 32, 3), 10
EPSILONS = (36 / 255, 72 / 255, 108 / 255)  # l2, of pixels in [0, 1]


# Data: uint8 images and labels, to train on and to test.


def archive(path, part):
    with np.load(path) as file:
        if f"{part}_images" in file:
            return file[f"{part}_images"], file[f"{part}_labels"].reshape(-1)
        from PIL import Image

        encoded, starts = file[f"{part}_bytes"], file[f"{part}_offsets"]
        files = (encoded[a:b].tobytes() for a, b in itertools.pairwise(starts))
        images = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in files]
        return np.stack(images), file[f"{part}_labels"].reshape(-1)


def made_up(count, seed):
    """Images that are easily told apart: a colour a class, and noise."""
    colours = np.random.default_rng(0).uniform(40, 215, (CLASSES, 1, 1, 3))
    labels = np.arange(count) % CLASSES
    noise = np.random.default_rng(seed).normal(0, 12, (count, *SHAPE))
    return (colours[labels] + noise).clip(0, 255).astype("uint8"), labels


def load(arguments):
    """((x_train, y_train), (x_held_out, y_held_out), (x_test, y_test)), images in [0, 1]."""
    if arguments.smoke:
        train, test = made_up(480, 1), made_up(160, 2)
    elif arguments.data:
        train, test = archive(arguments.data, "train"), archive(arguments.data, "test")
    else:
        train, test = keras.datasets.cifar10.load_data()
    # One in 20 training images chooses the best epoch; test images are for the certificate alone.
    order = np.random.default_rng(arguments.seed).permutation(len(train[0]))
    held_out, rest = np.split(order, [len(order) // 20])
    parts = [tuple(a[chosen] for a in train) for chosen in (rest, held_out)] + [test]
    return [(x.astype("float32") / 255, np.asarray(y).reshape(-1)) for x, y in parts]


# The model: augmentation, which is the identity when it is certified, and a LipNeXt.


def build(arguments):
    inputs = keras.Input(SHAPE)
    x = keras.layers.RandomFlip("horizontal")(inputs)
    x = keras.layers.RandomTranslation(1 / 8, 1 / 8, fill_mode="constant")(x)
    network = lip.LipNeXt(
        depth=arguments.depth,
        width=arguments.width,
        input_shape=SHAPE,
        num_classes=CLASSES,
        patch_size=4,
        neck=arguments.neck,
        compile=False,
    )
    model = lip.CertifiableModel(inputs, network(x))
    angle = arguments.learning_rate
    model.compile(
        lip.optimizers.ManifoldMuon(
            angle, euclidean_learning_rate=angle / 2, schedule=lip.optimizers.cosine()
        ),
        loss=lip.losses.EMMA(3 * arguments.epsilon, temperature=arguments.temperature),
        metrics=["accuracy", lip.metrics.CertifiedAccuracy(arguments.epsilon)],
    )
    return model


def main(arguments):
    keras.utils.set_random_seed(arguments.seed)
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out, test = load(arguments)
    model = build(arguments)
    print(f"{len(train[0]):,} images to train on, {model.count_params():,} weights", flush=True)

    callbacks = [
        lip.callbacks.StopOnDivergence(),
        keras.callbacks.CSVLogger(folder / "log.csv", append=(folder / "backup").exists()),
        keras.callbacks.ModelCheckpoint(
            folder / "best.keras", "val_certified_accuracy", mode="max", save_best_only=True
        ),
        lip.callbacks.BackupAndRestore(folder / "backup", seed=arguments.seed),
    ]
    batches = {"x": train[0], "y": train[1], "batch_size": arguments.batch_size}
    if arguments.generated:
        made, share = generated.load(arguments.generated, arguments.labeller), arguments.share
        batches = {"x": generated.Mixed(train, made, share, arguments.batch_size)}
    settings = {"epochs": arguments.epochs, "validation_data": held_out, "callbacks": callbacks}
    model.fit(**batches, **settings, verbose=2)
    model.save(folder / "model.keras")

    certificate = model.certify(*test, epsilons=EPSILONS)
    print(f"\nCertified on {len(test[0])} test images:\n{certificate}")
    certificate.to_html(folder / "certificate.html")
    certificate.to_json(folder / "certificate.json")
    print(f"\nWritten to {folder.resolve()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", help="an .npz file; without, Keras downloads the images")
    add("--smoke", action="store_true", help="a small network, few images made up, 3 epochs")
    add("--generated", help="an .npz file of generated images, mixed into each batch")
    add("--generated-share", dest="share", type=float, default=0.75, help="of each batch (0.75)")
    add("--labeller", help="a model file or preset that labels generated images without labels")
    add("--epochs", type=int, default=100, help="passes over the data (100)")
    add("--depth", type=int, default=8, help="number of blocks (8)")
    add("--width", type=int, default=256, help="number of channels (256)")
    add("--neck", choices=["pool", "patches"], help="behind the blocks (patches)")
    add("--batch-size", type=int, default=128, help="of training (128)")
    add("--epsilon", type=float, default=36 / 255, help="l2 radius of interest (36/255)")
    add("--temperature", type=float, default=4.0, help="of the EMMA loss (4)")
    add("--learning-rate", type=float, default=0.014, help="radians a step (0.014)")
    add("--seed", type=int, default=0, help="of weights, shuffling, augmentation (0)")
    add("--output", default="runs/cifar10", help="folder (runs/cifar10)")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(epochs=3, depth=2, width=64, batch_size=32)
    main(parser.parse_args())
