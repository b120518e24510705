"""The Wasserstein-1 distance of two clouds: its proven lower bound beside the truth.

    KERAS_BACKEND=torch python examples/wasserstein.py       (or jax, or tensorflow)

The first cloud is uniform on the unit circle, the second on a circle of radius 3: each point moves
outward by 2 and no plan moves less, so that W1 = 2. A critic of orthogonal layers learns the
distance from the origin, or close to it; what it shows on fresh samples is a true lower bound.
"""

import argparse
import pathlib

import keras
import numpy as np

import keras_lipnext as lip

TRUTH = 2.0


def circles(count, seed):
    """Points of the two circles, at evenly spaced angles from a random start: W1 is exactly 2."""
    start = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    angles = start + 2 * np.pi * np.arange(count) / count
    inner = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return inner, 3 * inner


def build(width=64, depth=3):
    inputs = x = keras.Input((2,))
    for _ in range(depth):
        x = lip.layers.MaxMin()(lip.layers.OrthogonalDense(width)(x))
    critic = lip.CertifiableModel(inputs, lip.layers.OrthogonalDense(1)(x))
    optimizer = lip.optimizers.ManifoldAdam(1e-2, schedule=lip.optimizers.cosine())
    critic.compile(optimizer, loss=lip.losses.KantorovichRubinstein())
    return critic


def main(epochs, folder):
    keras.utils.set_random_seed(0)
    inner, outer = circles(1024, seed=0)
    x = np.concatenate([inner, outer]).astype("float32")
    y = np.repeat([0, 1], 1024)
    critic = build()
    critic.fit(x, y, batch_size=256, epochs=epochs, verbose=2)

    inner, outer = circles(1000, seed=1)
    bound = lip.guarantees.wasserstein(critic, outer, inner)
    print(bound)
    print(f"The distance is {TRUTH}; proven: {bound.lower_bound / TRUTH:.1%} of it.")
    if bound.lower_bound > TRUTH * (1 + 1e-12):
        raise SystemExit("The bound is above the distance: this must never happen.")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bound.to_json(folder / "wasserstein.json")
    plot(critic, inner, outer, bound, folder / "wasserstein.png")
    print(f"Wrote wasserstein.json and wasserstein.png to {folder.resolve()}")


def plot(critic, inner, outer, bound, path):
    """The critic's level lines and the two clouds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    side = np.linspace(-3.6, 3.6, 121)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2).astype("float32")
    values = critic.predict(grid, verbose=0).reshape(121, 121)
    figure, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    drawn = axis.contourf(side, side, values, levels=20, cmap="Greys_r", alpha=0.7)
    figure.colorbar(drawn, label="critic f(x)")
    for points, color, name in ((outer, "tab:blue", "P"), (inner, "tab:orange", "Q")):
        axis.plot(*points[::10].T, ".", color=color, label=name)
    proven = np.floor(1e4 * bound.lower_bound) / 1e4  # what is shown is proven, too
    axis.set(aspect="equal", title=f"proven: W1(P, Q) at least {proven:.4f}; it is {TRUTH:g}")
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60, help="passes over the data (60)")
    parser.add_argument("--output", default="runs/wasserstein", help="folder (runs/wasserstein)")
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.output)
