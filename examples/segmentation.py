"""Find the pixels of handwritten digits, tell two kinds apart, and certify each pixel.

    KERAS_BACKEND=jax python examples/segmentation.py                    (digits, from scikit-learn)
    KERAS_BACKEND=jax python examples/segmentation.py --data DIR         (DIR/fashion_mnist.npz)

A digit on a noisy ground: each pixel is ground, or ink of a digit with a closed loop (0, 6, 8, 9)
or without one. With Fashion-MNIST: footwear (5, 7, 9) or other clothes, at half the resolution. One
perturbation acts on the whole image. A network of the same shape, trained plainly, is certified by
the product of its layers' norms, for comparison. Settings are chosen with --validation; the test
part is looked at once. Writes the table and pictures of the radii: ground is blue, loops and
footwear are green, other ink is orange.
"""

import argparse
import pathlib

import keras
import numpy as np
from quickstart import digits

import keras_lipnext as lip

EPSILONS = (0.05, 0.1, 0.25)


def load(folder):
    """Parts to train on, to choose by and to report: (images in [0, 1], classes of the image)."""
    if folder is None:
        (x, y), held_out = digits()
        cut = len(x) * 3 // 4
        parts, loops = ((x[:cut], y[:cut]), held_out, (x[cut:], y[cut:])), (0, 6, 8, 9)
        return [(x, np.isin(y, loops)) for x, y in parts]
    path = pathlib.Path(folder) / "fashion_mnist.npz"
    if not path.exists():
        raise SystemExit(f"--data needs a folder with fashion_mnist.npz. Received: {folder}")
    archive, parts, last = np.load(path), [], slice(-1000, None)
    for name, kept in (("train", slice(6000)), ("train", last), ("test", last)):
        x = archive[f"{name}_images"][kept].astype("float32").reshape(-1, 14, 2, 14, 2)
        kind = np.isin(archive[f"{name}_labels"][kept], (5, 7, 9))
        parts.append((x.mean(axis=(2, 4))[..., None] / 255, kind))
    return parts


def masked(images, kinds, seed):
    """Images on a noisy ground, and the class of each pixel: 0 ground, 1 and 2 ink."""
    noise = np.random.default_rng(seed).uniform(0, 0.15, images.shape).astype("float32")
    ink = images[..., 0] > 0.3
    return np.maximum(images, noise), np.where(ink, 1 + kinds[:, None, None], 0)


def lipschitz(shape, width, depth):
    return lip.LipNeXt(
        input_shape=shape,
        num_classes=3,
        output="dense",
        width=width,
        depth=depth,
        epsilon=EPSILONS[0],
    )


def plain(shape, width, depth):
    """Convolutions of the same width and depth, no norm constrained."""
    inputs = keras.Input(shape)
    x = keras.layers.Conv2D(width, 1)(keras.layers.Rescaling(1.0, offset=-0.3)(inputs))
    for _ in range(depth):
        x = keras.layers.Conv2D(width, 3, padding="same", activation="relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    return model


def main(arguments):
    train, *held_out = load(arguments.data)
    part = "validation" if arguments.validation else "test"
    (x, y), (x_test, y_test) = masked(*train, seed=1), masked(*held_out[part == "test"], seed=2)
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"pixels({e:g})" for e in EPSILONS] + [f"mIoU({e:g})" for e in EPSILONS]
    names = ["clean pixels", "clean mIoU", *names, "proven K"]
    lines = [f"| network | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for name, make in (("LipNeXt", lipschitz), ("plain", plain)):
        keras.utils.set_random_seed(arguments.seed)
        model = make(x.shape[1:], arguments.width, arguments.depth)
        model.fit(x, y, batch_size=64, epochs=arguments.epochs, verbose=2)
        certificate = lip.certify(model, x_test, y_test, epsilons=EPSILONS, verbose=0)
        shares = [certificate.clean_accuracy, certificate.mean_iou]
        shares += certificate.certified_accuracy.values()
        shares += certificate.certified_mean_iou.values()
        cells = [f"{100 * share:.1f} %" for share in shares]
        lines.append(f"| {name} | {' | '.join(cells)} | {certificate.body_constant:.4g} |")
        if name != "plain":
            certificate.plot_maps(folder / "segmentation.png", epsilon=EPSILONS[1])
            certificate.plot(folder / "certified_accuracy.png")
            model.save(folder / "model.keras")
            print(f"\n{certificate}\n")
    table = "\n".join(lines)
    print(f"\nCertified at (epsilon), {part} part, {keras.backend.backend()} backend\n\n{table}")
    (folder / "segmentation.md").write_text(table + "\n")
    print(f"\nWrote segmentation.png, segmentation.md and model.keras to {folder.resolve()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of fashion_mnist.npz; digits without")
    parser.add_argument("--validation", action="store_true", help="report on the validation part")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the data (12)")
    parser.add_argument("--width", type=int, default=64, help="channels (64)")
    parser.add_argument("--depth", type=int, default=4, help="blocks, or convolutions (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/segmentation", help="folder (runs/segmentation)")
    main(parser.parse_args())
