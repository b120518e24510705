"""Certified radii of ordinary MNIST networks by each bound: `python local_bounds.py --data DIR`.

Dense networks, Adam, cross-entropy, batches of 128; "RS-LMI" is trained towards a constant of 5 by
`lmi.RSLMI`. Each is certified on the first `--samples` images of the test part by the product of
the layers' norms, ECLipsE-Fast, its form with a multiplier a neuron, and constants of each image's
ball: median radius, certified robust accuracy, seconds a sample (the constant of all inputs
included). "attack" is the accuracy that PGD leaves. Writes results/local_bounds.json.

Not shown: several seeds, wider networks, solvers (`lmi_bounds.py` has those).
"""

import os
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import datasets
import measuring

NETWORKS = (
    ("2 x 128, ReLU", (128, 128), "relu", None),
    ("3 x 64, ReLU", (64, 64, 64), "relu", None),
    ("2 x 128, tanh", (128, 128), "tanh", None),
    ("2 x 128, ReLU, RS-LMI", (128, 128), "relu", 5.0),
)
METHODS = ("product", "eclipse_fast", "eclipse_diagonal", "local_lipschitz")
EPSILONS = (0.1, 0.3, 0.5, 1.0)


def trained(hidden, activation, target, arguments):
    import keras

    import keras_lipnext as lip

    images, labels = datasets.load(arguments.data, "mnist", "train", arguments.images)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten()])
    for units in hidden:
        model.add(keras.layers.Dense(units, activation))
    model.add(keras.layers.Dense(10))
    training = model if target is None else lip.lmi.RSLMI(model, target)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    training.compile("adam", loss)
    training.fit(images, labels, batch_size=128, epochs=arguments.epochs, verbose=0)
    return model


def measure(name, hidden, activation, target, arguments):
    import numpy as np

    import keras_lipnext as lip

    model = trained(hidden, activation, target, arguments)
    images, labels = datasets.load(arguments.data, "mnist", "test", arguments.samples)
    row = {"network": name, "bounds": {}}
    for method in METHODS:
        start, cpu = time.perf_counter(), time.process_time()
        found = lip.certify(model, images, labels, EPSILONS, verbose=0, lipschitz=method)
        row["clean"] = found.clean_accuracy
        row["bounds"][method] = {
            "constant": found.constant,
            "median_radius": float(np.median(found.radii)),
            "cra": {str(e): share for e, share in found.certified_accuracy.items()},
            "seconds_a_sample": (time.perf_counter() - start) / len(images),
            "cpu_seconds_a_sample": (time.process_time() - cpu) / len(images),
        }
        print(name, method, row["bounds"][method], flush=True)
    row["attack"] = {}
    for epsilon in EPSILONS:
        flipped, _ = lip.certification.pgd(model, images, labels, np.full(len(images), epsilon))
        right = (found.predictions == labels) & ~flipped
        row["attack"][str(epsilon)] = float(right.mean())
        # No attack may succeed where a radius says so.
        assert not (flipped & (found.predictions == labels) & (found.radii > epsilon)).any()
    return row


def cell(bound):
    shares = " / ".join(f"{100 * bound['cra'][str(e)]:.1f}" for e in EPSILONS)
    return f"{bound['median_radius']:.3f}; {shares} %"


def main():
    parser = measuring.parser(__doc__, backends=())
    parser.add_argument("--data", required=True, help="folder with mnist.npz")
    parser.add_argument("--images", type=int, default=None, help="of the training part (all)")
    parser.add_argument("--epochs", type=int, default=5, help="of training (5)")
    parser.add_argument("--samples", type=int, default=1000, help="to certify (1000)")
    arguments = parser.parse_args()
    rows = [measure(*network, arguments) for network in NETWORKS]
    title = "Median radius; CRA at " + ", ".join(map(str, EPSILONS))
    header = ["network", *METHODS, "seconds a sample", "attack"]
    table = [
        [
            row["network"],
            *(cell(row["bounds"][method]) for method in METHODS),
            f"{row['bounds']['local_lipschitz']['seconds_a_sample']:.2g}",
            " / ".join(f"{100 * share:.1f}" for share in row["attack"].values()) + " %",
        ]
        for row in rows
    ]
    measuring.table(title, header, table)
    measuring.write("local_bounds", {"settings": measuring.settings(arguments), "networks": rows})


if __name__ == "__main__":
    main()
