"""Train a LipNeXt on handwritten digits, certify it, and attack it inside its certified radii.

    KERAS_BACKEND=jax python examples/quickstart.py          (or torch, or tensorflow)

The 1,797 images of 8 x 8 pixels ship inside scikit-learn. A fifth of them is held out and used
once, at the end. Writes the table and the plot of certified robust accuracy to a folder.
"""

import argparse
import pathlib

import keras
import numpy as np

import keras_lipnext as lip

EPSILONS = (0.1, 0.25, 0.5)


def digits(seed=0):
    """((x_train, y_train), (x_test, y_test)) with images (n, 8, 8, 1) in [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("The digits come with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = np.split(order, [len(order) * 4 // 5])
    return (images[train], data.target[train]), (images[test], data.target[test])


def main(epochs, seed, folder):
    keras.utils.set_random_seed(seed)
    (x_train, y_train), (x_test, y_test) = digits()

    model = lip.LipNeXt(
        size="tiny", input_shape=(8, 8, 1), num_classes=10, patch_size=2, epsilon=0.5 / 3
    )
    model.fit(x_train, y_train, batch_size=64, epochs=epochs, verbose=2)

    certificate = lip.certify(model, x_test, y_test, epsilons=EPSILONS)
    print(f"\nCertified on {len(x_test)} held-out digits ({keras.backend.backend()} backend):")
    print(certificate)

    flipped, _ = lip.certification.pgd(
        model, x_test, certificate.predictions, 0.999 * certificate.radii
    )
    beyond, _ = lip.certification.pgd(model, x_test, certificate.predictions, 3 * certificate.radii)
    print(f"\nPGD attack inside the certified radii: {flipped.sum()} predictions flipped.")
    print(f"The same attack at three times the radii: {beyond.sum()} of {len(x_test)} flipped.")
    if flipped.any():
        raise SystemExit("A certified prediction flipped: this must never happen.")

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    certificate.plot(folder / "certified_accuracy.png")
    (folder / "certificate.md").write_text(certificate.to_markdown())
    print(f"Wrote model.keras, certified_accuracy.png and certificate.md to {folder.resolve()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40, help="passes over the data (40)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and shuffling (0)")
    parser.add_argument("--output", default="runs/quickstart", help="folder (runs/quickstart)")
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.seed, arguments.output)
