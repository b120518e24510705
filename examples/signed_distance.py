"""The signed distance field of a 2-D shape, learned by hKR from inside and outside alone.

    KERAS_BACKEND=torch python examples/signed_distance.py   (or jax, or tensorflow)

No distance is ever shown to the network: points are labelled as inside or outside. A 1-Lipschitz
network that separates the two with the largest difference of means is, up to its sign, the distance
to the shape's border [Bethune et al. 2023, arXiv 2301.13577]. The value proves that there is no
border nearer than it says, which `lip.enclose` makes exact: `radius(lower=0)`.
"""

import argparse
import pathlib

import keras
import numpy as np

import keras_lipnext as lip

HALF = np.array([0.6, 0.35])  # of the rectangle's sides


def distance(points):
    """Signed distance to the rectangle, negative inside."""
    away = np.abs(points) - HALF
    outside = np.linalg.norm(np.maximum(away, 0), axis=-1)
    return outside + np.minimum(away.max(axis=-1), 0)


def build(width=64, depth=4):
    inputs = keras.Input((2,))
    x = lip.layers.OrthogonalDense(width)(inputs)
    for _ in range(depth):
        x = lip.layers.MaxMin()(lip.layers.OrthogonalDense(width)(x))
    model = lip.CertifiableModel(inputs, lip.layers.OrthogonalDense(1)(x))
    optimizer = lip.optimizers.ManifoldAdam(5e-3, schedule=lip.optimizers.cosine())
    model.compile(optimizer, loss=lip.losses.HKR(alpha=100, min_margin=0.02))
    return model


def main(epochs, folder):
    keras.utils.set_random_seed(0)
    points = np.random.default_rng(0).uniform(-1, 1, size=(8192, 2)).astype("float32")
    model = build()
    model.fit(points, distance(points) > 0, batch_size=256, epochs=epochs, verbose=2)

    side = np.linspace(-1, 1, 101)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    enclosure = lip.enclose(model, grid, epsilon=0.0, verbose=0)
    print(enclosure)
    learned, exact = enclosure.outputs[:, 0], distance(grid)
    error = np.abs(learned - exact)
    wrong = ((learned > 0) != (exact > 0)).mean()
    print(
        f"\nMean error {error.mean():.4f}, median {np.median(error):.4f}; sign wrong: {wrong:.2%}"
    )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot(side, learned.reshape(101, 101), exact.reshape(101, 101), folder / "signed_distance.png")
    print(f"Wrote signed_distance.png to {folder.resolve()}")


def plot(side, learned, exact, path):
    """The learned field with the true contour, and its error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    limit = np.abs(exact).max()
    panels = (
        ("learned distance", learned, {"cmap": "RdBu", "vmin": -limit, "vmax": limit}),
        ("error", np.abs(learned - exact), {"cmap": "Greys", "vmin": 0}),
    )
    for axis, (title, values, look) in zip(axes, panels):
        drawn = axis.pcolormesh(side, side, values, shading="gouraud", **look)
        figure.colorbar(drawn, ax=axis, shrink=0.9)
        axis.add_patch(pyplot.Rectangle(-HALF, *(2 * HALF), fill=False, linewidth=1.5))
        axis.set(title=title, aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    axes[0].contour(side, side, learned, [0], colors="tab:orange", linestyles="--")
    lines = [
        pyplot.Line2D([], [], color=c, ls=s) for c, s in (("black", "-"), ("tab:orange", "--"))
    ]
    axes[0].legend(lines, ["true border", "learned"], loc="lower left", fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data (20)")
    parser.add_argument("--output", default="runs/signed_distance", help="runs/signed_distance")
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.output)
