"""Prediction sets of digits that keep their coverage under attack.

    KERAS_BACKEND=torch python examples/conformal.py         (or jax, or tensorflow)

A set contains the true class with probability 90 %, by a calibration on held-out images. Under an
attack that promise breaks; sets for perturbations up to epsilon, by the model's Lipschitz constant,
keep it, and grow as little as they may.
"""

import argparse
import pathlib

import keras
import numpy as np
from quickstart import digits

import keras_lipnext as lip

ALPHA, EPSILONS = 0.1, (0.1, 0.25, 0.5)


def main(epochs, folder):
    keras.utils.set_random_seed(0)
    (x_train, y_train), (x_test, y_test) = digits()
    (x_train, x_cal), (y_train, y_cal) = (np.split(a, [1100]) for a in (x_train, y_train))
    model = lip.LipNeXt(
        size="tiny", input_shape=(8, 8, 1), num_classes=10, patch_size=2, epsilon=0.5 / 3
    )
    model.fit(x_train, y_train, batch_size=64, epochs=epochs, verbose=2)

    predictor = lip.guarantees.conformal(model, x_cal, y_cal, alpha=ALPHA)
    rows = np.arange(len(x_test))
    print(f"\nCoverage of {len(x_test)} test digits, at least {1 - ALPHA:.0%} promised, clean: ")
    print(f"{predictor.sets(x_test)[rows, y_test].mean():.1%}\n")
    print("| epsilon | plain sets, attacked | robust sets, attacked | mean size |")
    print("| ---: | ---: | ---: | ---: |")
    table = []
    for epsilon in EPSILONS:
        radii = np.full(len(x_test), 0.9999 * epsilon)
        _, attacked = lip.certification.pgd(model, x_test, y_test, radii)
        plain = predictor.sets(attacked)[rows, y_test].mean()
        sets = predictor.sets(attacked, epsilon)
        covered, size = sets[rows, y_test].mean(), sets.sum(axis=-1).mean()
        table.append((plain, covered, size))
        print(f"| {epsilon:g} | {100 * plain:.1f} % | {100 * covered:.1f} % | {size:.2f} |")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot(np.array(table), folder / "conformal.png")
    print(f"\nWrote conformal.png to {folder.resolve()}")


def plot(table, path):
    """Coverage under attack, and the size of the sets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for column, label, look in ((0, "plain sets", "o--"), (1, "robust sets", "o-")):
        axes[0].plot(EPSILONS, 100 * table[:, column], look, label=label)
    axes[0].axhline(100 * (1 - ALPHA), color="black", linestyle=":", label="promised")
    axes[0].set(xlabel="epsilon (l2)", ylabel="coverage under PGD, %", ylim=(0, 103))
    axes[0].legend(loc="lower left", frameon=False)
    axes[1].plot(EPSILONS, table[:, 2], "o-", color="tab:orange")
    axes[1].set(xlabel="epsilon (l2)", ylabel="mean size of robust sets (of 10)", ylim=(0, 10))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12, help="passes over the data (12)")
    parser.add_argument("--output", default="runs/conformal", help="folder (runs/conformal)")
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.output)
