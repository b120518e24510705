"""Classify time series with a 1-Lipschitz network, certify it, attack inside and beyond the radii.

    KERAS_BACKEND=torch python examples/time_series.py       (or jax, or tensorflow)

The series are cylinder, bell and funnel (Saito 1994), a classic test of such classifiers, drawn
here: 128 steps of noise in which, at a random place, a plateau, a rising or a falling ramp lies. A
LipNeXt of shape (128, 1) shifts channels along time. Prints its certificate, what an attack finds
inside and beyond the certified radii, and draws one series of each class with both.
"""

import argparse
import pathlib

import keras
import numpy as np

import keras_lipnext as lip

CLASSES = ("cylinder", "bell", "funnel")
LENGTH = 128
EPSILONS = (0.25, 0.5, 1.0)
DARK, INSIDE, BEYOND = "#1f3b57", "#2a9d8f", "#d1495b"


def series(count, seed):
    """(x, y): series (count, 128, 1), a share of twelve units of Saito's, and their classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, len(CLASSES), count)
    start, length = rng.integers(16, 33, count), rng.integers(32, 97, count)
    t = np.arange(LENGTH) - start[:, None]
    inside = (t >= 0) & (t <= length[:, None])
    rising = t / length[:, None]
    shape = np.choose(y[:, None], [np.ones_like(rising), rising, 1 - rising])
    height = 6 + rng.normal(size=(count, 1))
    x = height * inside * shape + rng.normal(size=(count, LENGTH))
    return ((x + 3) / 12).clip(0, 1)[..., None].astype("float32"), y


def main(arguments):
    keras.utils.set_random_seed(arguments.seed)
    x_train, y_train = series(arguments.samples, seed=0)
    x_test, y_test = series(arguments.held_out, seed=1)

    model = lip.LipNeXt(
        input_shape=(LENGTH, 1), num_classes=3, depth=4, width=64, shift_ratio=1 / 8, epsilon=1 / 3
    )
    model.fit(x_train, y_train, batch_size=64, epochs=arguments.epochs, verbose=2)

    certificate = lip.certify(model, x_test, y_test, epsilons=EPSILONS)
    print(f"\nCertified on {len(x_test)} held-out series ({keras.backend.backend()} backend):")
    print(certificate)

    predictions, radii = certificate.predictions, certificate.radii
    inside, within = lip.certification.pgd(model, x_test, predictions, 0.999 * radii)
    beyond, flipping = lip.certification.pgd(model, x_test, predictions, 2 * radii)
    print(f"\nPGD attack inside the certified radii: {inside.sum()} predictions flipped.")
    print(f"The same attack at twice the radii: {beyond.sum()} of {len(x_test)} flipped.")
    if inside.any():
        raise SystemExit("A certified prediction flipped: this must never happen.")

    survived = {}
    for epsilon in EPSILONS:
        flipped, _ = lip.certification.pgd(model, x_test, y_test, epsilon)
        survived[epsilon] = float(1 - (flipped | (predictions != y_test)).mean())
        print(
            f"epsilon = {epsilon:g}: {certificate.certified_accuracy[epsilon]:.1%} certified, "
            f"{survived[epsilon]:.1%} survive PGD"
        )

    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    found = keras.ops.convert_to_numpy(keras.ops.argmax(model.predict(flipping, verbose=0), -1))
    shown = [middle(radii, (y_test == k) & (predictions == k) & beyond) for k in range(3)]
    rows = [(x_test[i], within[i], flipping[i], predictions[i], found[i], radii[i]) for i in shown]
    plot(rows, certificate, y_test, survived, folder / "time_series.png")
    print(f"Wrote model.keras and time_series.png to {folder.resolve()}")


def middle(radii, eligible):
    """The eligible sample of the median radius."""
    places = np.flatnonzero(eligible)
    return places[np.argsort(radii[places])[len(places) // 2]]


def plot(rows, certificate, labels, survived, path):
    """One series of each class with its attacks; certified accuracy, and what PGD leaves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(10, 5), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(5, 4))
    axes = None
    for row, (x, within, flipping, label, other, radius) in enumerate(rows):
        axes = figure.add_subplot(grid[row, 0], sharex=axes, sharey=axes)
        for values, color, name in (
            (x, DARK, f"{CLASSES[label]}, certified r = {radius:.2f}"),
            (within, INSIDE, f"attacked within r: still {CLASSES[label]}"),
            (flipping, BEYOND, f"attacked within 2 r: {CLASSES[other]}"),
        ):
            front = 3 if color is DARK else 2
            axes.plot(values, color=color, linewidth=front / 2, label=name, zorder=front)
        axes.legend(loc="upper right", frameon=False, fontsize=8, handlelength=1.2)
        axes.set(ylim=(-0.05, 1.45), yticks=(0, 0.5, 1))
        axes.tick_params(labelbottom=row == 2)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time step")
    axes = figure.add_subplot(grid[:, 1])
    right = np.where(certificate.predictions == labels, certificate.radii, 0.0)
    epsilons = np.linspace(0, 1.05 * right.max(), 200)
    axes.plot(epsilons, [100 * (right > e).mean() for e in epsilons], color=DARK, label="certified")
    axes.plot(
        list(survived), [100 * s for s in survived.values()], "o", color=BEYOND, label="after PGD"
    )
    axes.set(xlabel="epsilon (l2, of the whole series)", ylabel="accuracy, %", ylim=(0, 102))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the data (30)")
    parser.add_argument("--samples", type=int, default=1200, help="series to train on (1200)")
    parser.add_argument("--held-out", type=int, default=400, help="series to certify (400)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and shuffling (0)")
    parser.add_argument("--output", default="runs/time_series", help="folder (runs/time_series)")
    main(parser.parse_args())
