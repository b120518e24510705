"""Train the same small network with each family of 1-Lipschitz layers, and compare.

    KERAS_BACKEND=jax python examples/layer_zoo.py                       (digits, from scikit-learn)
    KERAS_BACKEND=jax python examples/layer_zoo.py --data DIR            (DIR/fashion_mnist.npz)

Four layers of one width between an orthogonal embedding and a normalised head. The linear layers
(orthogonal, AOL, spectral) are followed by |x| on half the channels, the residual ones (SLL, CPL)
hold a ReLU. All have the same loss, schedule and number of steps. ManifoldMuon trains the first,
Adam the others, at rates that were not tuned. Prints one table, writes it and a plot.
"""

import argparse
import pathlib
import time

import keras
import numpy as np
from quickstart import digits

import keras_lipnext as lip

ll = lip.layers


def linear(layer):
    return lambda width: keras.Sequential([layer(width), ll.BetaAbs(0.5)])


def muon():
    return lip.optimizers.ManifoldMuon(0.02, schedule=lip.optimizers.cosine())


def adam():
    # Plain Adam: none of these layers has a weight on a manifold.
    return lip.optimizers.ManifoldAdam(3e-3, schedule=lip.optimizers.cosine())


# (layer of a width, optimizer)
ZOO = {
    "orthogonal": (linear(ll.OrthogonalDense), muon),
    "SLL": (lambda width: ll.SDPResidualDense(bound="sll"), adam),
    "CPL": (lambda width: ll.SDPResidualDense(bound="spectral"), adam),
    "AOL": (linear(lambda width: ll.SDPDense(width, "aol")), adam),
    "spectral": (linear(lambda width: ll.SDPDense(width, "spectral")), adam),
}


def load(folder, validation):
    """((x, y), (x, y)) to train on and to report, images flattened, in [0, 1]."""
    if folder is None:
        parts = tuple((x.reshape(len(x), -1), y) for x, y in digits())
    else:
        path = pathlib.Path(folder) / "fashion_mnist.npz"
        if not path.exists():
            raise SystemExit(f"--data needs a folder with fashion_mnist.npz. Received: {folder}")
        archive = np.load(path)
        parts = tuple(
            (
                (archive[f"{name}_images"].reshape(-1, 784) / 255).astype("float32"),
                archive[f"{name}_labels"].astype("int32"),
            )
            for name in ("train", "test")
        )
    if validation:  # the last tenth of the training part, and no look at the rest
        x, y = parts[0]
        cut = len(x) * 9 // 10
        parts = (x[:cut], y[:cut]), (x[cut:], y[cut:])
    return parts


def build(name, features, width, depth, epsilon):
    """A compiled CertifiableModel of `depth` layers of the zoo's member `name`."""
    make, optimizer = ZOO[name]
    inputs = keras.Input((features,))
    x = keras.layers.Rescaling(1.0, offset=-0.5)(inputs)
    x = ll.OrthogonalDense(width)(x)
    for _ in range(depth):
        x = make(width)(x)
    model = lip.CertifiableModel(inputs, ll.NormalizedDense(10)(x))
    model.compile(
        optimizer(),
        loss=lip.losses.EMMA(3 * epsilon, temperature=max(1.0, 128 / features**0.5)),
        metrics=["accuracy", lip.metrics.CertifiedAccuracy(epsilon)],
    )
    return model


class StepTime(keras.callbacks.Callback):
    """Median seconds of a training step."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def median(self):
        return float(np.median(self.seconds))


def main(arguments):
    (x, y), test = load(arguments.data, arguments.validation)
    epsilons = tuple(arguments.epsilons)
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["clean", *(f"CRA({e:g})" for e in epsilons), "ms a step", "weights", "proven K"]
    lines = [f"| layers | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    curves = {}
    for name in ZOO:
        keras.utils.set_random_seed(arguments.seed)
        model = build(name, x.shape[1], arguments.width, arguments.depth, epsilons[0])
        timer = StepTime()
        fit = {"batch_size": arguments.batch_size, "epochs": arguments.epochs, "verbose": 0}
        model.fit(x, y, callbacks=[timer], **fit)
        certificate = model.certify(*test, epsilons=epsilons, verbose=0)
        shares = [certificate.clean_accuracy, *certificate.certified_accuracy.values()]
        cells = [f"{100 * share:.1f} %" for share in shares]
        cells += [f"{1e3 * timer.median:.1f}", f"{model.count_params():,}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {certificate.body_constant:.6f} |")
        print(lines[-1], flush=True)
        right = certificate.predictions == test[1]
        curves[name] = np.sort(np.where(right, certificate.radii, 0.0))
    table = "\n".join(lines)
    print(f"\n{keras.backend.backend()} backend\n\n{table}")
    (folder / "layer_zoo.md").write_text(table + "\n")
    plot(curves, folder / "layer_zoo.png")
    print(f"\nWrote layer_zoo.md and layer_zoo.png to {folder.resolve()}")


def plot(curves, path):
    """Certified robust accuracy against epsilon."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, radii in curves.items():
        axis.step(radii, 100 * (1 - np.arange(1, len(radii) + 1) / len(radii)), label=name)
    axis.set(xlabel="epsilon (l2)", ylabel="certified robust accuracy, %", ylim=(0, 100))
    axis.set_xlim(left=0)
    axis.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of fashion_mnist.npz; digits without")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data (20)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=128, help="of all layers (128)")
    parser.add_argument("--depth", type=int, default=4, help="layers (4)")
    parser.add_argument(
        "--epsilons", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="the first is trained"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="report held-out training data")
    parser.add_argument("--output", default="runs/layer_zoo", help="folder (runs/layer_zoo)")
    main(parser.parse_args())
