"""An ordinary network becomes a 1-Lipschitz one: certificates before and after, side by side.

    KERAS_BACKEND=torch python examples/convert.py           (or jax, or tensorflow)

A small convolutional network is trained on the digits of scikit-learn as anyone would, and
certified by the product of its layers' proven constants. `lip.convert` makes its 1-Lipschitz
counterpart, which starts from its weights, is trained on for as long, and certified in the same
way. Writes the report of the conversion, both tables and a picture of both curves to a folder.
"""

import argparse
import pathlib

import keras
import numpy as np
from quickstart import digits

import keras_lipnext as lip

EPSILONS = (0.05, 0.1, 0.25, 0.5)


def ordinary():
    """As found in a tutorial: convolutions, batch normalisation, pooling, dropout, softmax."""
    kl = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            kl.Conv2D(16, 2, strides=2),
            kl.BatchNormalization(),
            kl.ReLU(),
            kl.Conv2D(32, 3, padding="same", activation="relu"),
            kl.MaxPooling2D(2),
            kl.Flatten(),
            kl.Dropout(0.3),
            kl.Dense(64, activation="relu"),
            kl.Dense(10, activation="softmax"),
        ]
    )


def curve(certificate, labels):
    """Radii of the samples that are right, 0 of the others, in order."""
    return np.sort(np.where(certificate.predictions == labels, certificate.radii, 0.0))


def main(arguments):
    keras.utils.set_random_seed(arguments.seed)
    (x, y), (x_test, y_test) = digits()
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    fit = {"batch_size": 64, "epochs": arguments.epochs, "verbose": 0}

    plain = ordinary()
    plain.compile("adam", loss="sparse_categorical_crossentropy")
    plain.fit(x, y, **fit)
    before = lip.certify(plain, x_test, y_test, epsilons=EPSILONS, verbose=0)

    conversion = lip.convert(plain, activation=arguments.activation)
    print(f"What became of each layer:\n\n{conversion}\n")
    model = conversion.model
    unturned = lip.certify(model, x_test, y_test, epsilons=EPSILONS, verbose=0)

    model.compile(
        lip.optimizers.ManifoldAdam(1e-2, schedule=lip.optimizers.cosine()),
        loss=lip.losses.EMMA(epsilon=0.5, temperature=16),
    )
    model.fit(x, y, **fit)
    after = lip.certify(model, x_test, y_test, epsilons=EPSILONS, verbose=0)

    names = ["clean", *(f"CRA({e:g})" for e in EPSILONS), "constant"]
    lines = [f"| network | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    found = {"ordinary": before, "converted": unturned, "converted and trained": after}
    for name, certificate in found.items():
        shares = [certificate.clean_accuracy, *certificate.certified_accuracy.values()]
        cells = [*(f"{100 * share:.1f} %" for share in shares), f"{certificate.body_constant:.4g}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(f"{len(x_test)} held-out digits, {keras.backend.backend()} backend\n\n{table}")
    (folder / "convert.md").write_text(f"```\n{conversion}\n```\n\n{table}\n")
    model.save(folder / "model.keras")
    plot({name: curve(c, y_test) for name, c in found.items()}, folder / "convert.png")
    print(f"\nWrote convert.md, convert.png and model.keras to {folder.resolve()}")


def plot(curves, path):
    """Certified robust accuracy against epsilon."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, radii in curves.items():
        epsilons = np.append(0.0, radii[radii > 0])
        certified = 100 * np.arange(len(epsilons))[::-1] / len(radii)
        axis.step(epsilons, certified, where="post", label=name)
    axis.set(xlabel="epsilon (l2)", ylabel="certified robust accuracy, %", ylim=(0, 102))
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20, help="of each training (20)")
    parser.add_argument(
        "--activation",
        default="max_min",
        choices=["max_min", "beta_abs", "householder", "keep"],
        help="in the converted network (max_min)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/convert", help="folder (runs/convert)")
    main(parser.parse_args())
