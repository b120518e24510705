"""RS-LMI training against its peers on MNIST: accuracy, proven bound, CRA, time, memory.

    python benchmarks/rs_lmi.py --data DIR
    python benchmarks/rs_lmi.py --data DIR --images 2000 --epochs 1 --targets 5 --widths 64  # quick

Dense networks of ReLU layers, Adam, cross-entropy; methods in rs_lmi_methods.py. Of --weights, the
penalty's is chosen by CRA(0.3) on 5,000 images held out of the training part; the test part is
evaluated once for each method and target L, with the chosen weight. The full LMI, slow, is trained
for --full-targets only.

- bound: of the stored weights, proven in float64 by LipSDP's matrix inequality; multipliers are
  sought in the same way for every method. `product` is that of the layers' norms.
- CRA(eps): by `certify` with these multipliers: each pair of classes has a constant of its own.
- seconds of training; memory: peak while training less what was resident before, each method in a
  process of its own.
- "spectral at equal accuracy": the spectral penalty's bound, between its own targets (which are
  more) interpolated at the accuracy of the row.
- step times: networks of two hidden layers, batch 128, all methods in turns in one process.

Writes results/rs_lmi.json and .png.

Not shown: tuned learning rates, long trainings, several seeds, accelerators. "random" is the
sketch as published, without Krylov spaces. GloRo trains at epsilon 0.3 and knows no target.
"""

import json
import time

import datasets
import measuring

EPSILONS = (0.1, 0.3, 0.5)
UNTARGETED = ("plain", "GloRo")
MORE = (2.0, 10.0, 40.0)  # targets of the spectral penalty for its curve
LARGEST_FULL = 256  # width up to which the full LMI's step is timed


def methods(arguments):
    sketches = [f"RS-LMI {k}" for k in arguments.sketches]
    random = [f"RS-LMI {k}, random" for k in arguments.sketches[-2:-1] or arguments.sketches]
    return [*sketches, *random, "full LMI", "spectral"]


def data(arguments, part, count=None):
    images, labels = datasets.load(arguments.data, "mnist", part, count)
    return images.reshape(len(images), -1), labels


def figures(model, bound, images, labels):
    """Clean accuracy and CRA."""
    import keras_lipnext as lip

    certificate = lip.certify(
        model, images, labels, EPSILONS, batch_size=1000, verbose=0, lipschitz=bound
    )
    shares = certificate.certified_accuracy
    return {"clean": certificate.clean_accuracy, "cra": {str(e): shares[e] for e in EPSILONS}}


def train(arguments, method, lipschitz):
    """One method and target: all weights, the best on the validation part, then the test part."""
    from rs_lmi_methods import best_bound, compiled, made, network

    from keras_lipnext.lmi.project import proven_bound

    images, labels = data(arguments, "train", arguments.images)
    weights = arguments.weights
    if method in UNTARGETED:
        weights = [0.0]
    best = None
    for weight in weights:
        model = network(arguments.hidden)
        training = compiled(made(method, model, lipschitz, weight))
        training.fit(images[:256], labels[:256], batch_size=128, epochs=1, verbose=0)
        model.set_weights(network(arguments.hidden).get_weights())
        training = compiled(made(method, model, lipschitz, weight))
        measuring.forget_peak()
        before, start = measuring.resident_gib(), time.perf_counter()
        training.fit(images, labels, batch_size=128, epochs=arguments.epochs, verbose=0)
        seconds = time.perf_counter() - start
        peak = measuring.peak_gib() - before
        bound = best_bound(model, training)
        score = figures(model, bound, *data(arguments, "validation"))["cra"]["0.3"]
        if best is None or score > best[0]:
            best = score, weight, model, bound, seconds, peak
    score, weight, model, bound, seconds, peak = best
    return {
        "method": method,
        "target": None if method in UNTARGETED else lipschitz,
        "weight": weight,
        "validation": score,
        **figures(model, bound, *data(arguments, "test")),
        "bound": bound.constant,
        "eclipse_fast": proven_bound(model).constant,
        "seconds": round(seconds, 1),
        "mib": round(1024 * peak),
    }


def time_steps(arguments, width):
    """Seconds of a training step of each method."""
    import keras
    import numpy as np
    from rs_lmi_methods import compiled, made, network
    from training_step import TrainingStep

    random = np.random.default_rng(0)
    images = random.random((128, 784), dtype="float32")
    labels = random.integers(0, 10, (64, 128))

    def step(method):
        training = compiled(made(method, network((width, width)), 5.0, 10.0))
        return TrainingStep(training, images, labels)

    names = [m for m in methods(arguments) if m != "full LMI" or width <= LARGEST_FULL]
    calls = {name: step(name) for name in ["plain", *names]}
    timings = measuring.interleaved(calls, arguments.rounds, arguments.limit)
    return {
        "backend": keras.backend.backend(),
        "width": width,
        "rounds": timings.count,
        "seconds": {name: timings.seconds(name) for name in calls},
        "ratios": {name: timings.ratio(name, "plain") for name in calls},
    }


def at_equal_accuracy(row, rows):
    """The spectral penalty's bound at this row's accuracy, by interpolation; None outside."""
    import numpy as np

    # The best of its bounds that reach each accuracy: what a user of the penalty could choose.
    points = sorted((r["clean"], r["bound"]) for r in rows if r["method"] == "spectral")
    accuracies = np.array([p[0] for p in points])
    bounds = np.minimum.accumulate(np.array([p[1] for p in points])[::-1])[::-1]
    if not len(points) or not accuracies[0] <= row["clean"] <= accuracies[-1]:
        return None
    return float(np.exp(np.interp(row["clean"], accuracies, np.log(bounds))))


def report(arguments, rows, times):
    for row in rows:
        row["spectral_at_equal_accuracy"] = at_equal_accuracy(row, rows)
    content = {"settings": measuring.settings(arguments), "rows": rows, "steps": times}
    measuring.write("rs_lmi", content)
    measuring.table(
        f"MNIST, {arguments.images} images, {arguments.epochs} epochs, hidden {arguments.hidden}",
        ["method, target", "clean %", "bound", "spectral at equal accuracy"]
        + [f"CRA({e}) %" for e in EPSILONS]
        + ["seconds", "MiB"],
        [
            (
                row["method"] + (f", {row['target']:g}" if row["target"] else ""),
                f"{100 * row['clean']:.1f}",
                f"{row['bound']:.3g}",
                f"{row['spectral_at_equal_accuracy']:.3g}"
                if row["spectral_at_equal_accuracy"]
                else "",
                *(f"{100 * share:.1f}" for share in row["cra"].values()),
                row["seconds"],
                row["mib"],
            )
            for row in rows
        ],
    )
    names = [n for n in methods(arguments) if any(n in t["ratios"] for t in times)]
    measuring.table(
        "Training step over that of plain training, batch 128: medians of ratios",
        ["width", "plain, ms", *names],
        [
            (
                t["width"],
                f"{1000 * t['seconds']['plain']:.1f}",
                *(f"{t['ratios'][n]['median']:.2f}" if n in t["ratios"] else "" for n in names),
            )
            for t in times
        ],
    )
    measuring.figure("rs_lmi", [[bounds_panel(rows), steps_panel(times, names)]])


def bounds_panel(rows):
    def draw(axis):
        for method in dict.fromkeys(r["method"] for r in rows):
            line = sorted((r for r in rows if r["method"] == method), key=lambda r: r["bound"])
            clean = [100 * r["clean"] for r in line]
            axis.plot([r["bound"] for r in line], clean, marker="o", markersize=4, label=method)
        axis.set(xlabel="proven Lipschitz bound", ylabel="clean accuracy, %", xscale="log")
        axis.legend(fontsize=7)

    return draw


def steps_panel(times, names):
    def draw(axis):
        for name in names:
            line = [t for t in times if name in t["ratios"]]
            if line:
                ratios = [t["ratios"][name] for t in line]
                measuring.draw_ratios(axis, [t["width"] for t in line], ratios, name)
        axis.set(xlabel="width", ylabel="step / plain step", xscale="log", yscale="log")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.legend(fontsize=7)

    return draw


def main(arguments):
    def one(*what):
        return measuring.child(__file__, *what, backend=arguments.backend)[0]

    rows = [one("train", method, 0) for method in UNTARGETED]
    for method in methods(arguments):
        more = [t for t in MORE if t not in arguments.targets] if method == "spectral" else []
        targets = arguments.full_targets if method == "full LMI" else arguments.targets
        rows += [one("train", method, t) for t in sorted([*targets, *more])]
    report(arguments, rows, [one("time", width) for width in arguments.widths])


def measure(arguments):
    kind, *what = arguments.child
    if kind == "time":
        return time_steps(arguments, int(what[0]))
    return train(arguments, what[0], float(what[1]))


if __name__ == "__main__":
    parser = measuring.parser(__doc__, backends=("own",))
    parser.add_argument("--data", required=True, help="folder of the image sets")
    parser.add_argument("--backend", default="torch", choices=measuring.BACKENDS)
    parser.add_argument("--targets", type=float, nargs="+", default=[1.0, 5.0, 20.0], help="L ...")
    parser.add_argument("--full-targets", type=float, nargs="*", default=[5.0], help="it is slow")
    parser.add_argument("--sketches", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--weights", type=float, nargs="+", default=[10.0], help="(10)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--images", type=int, default=10000, help="to train on (10000)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=16, help="rounds of a width, at most (16)")
    parser.add_argument("--limit", type=float, default=20, help="seconds to stop a width after")
    arguments = parser.parse_args()
    if arguments.child is None:
        main(arguments)
    else:
        print(json.dumps(measure(arguments)))
