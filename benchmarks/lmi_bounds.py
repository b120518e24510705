"""Bounds by matrix inequalities against width and depth: `python benchmarks/lmi_bounds.py`.

Random Dense networks with ReLU, Gaussian weights of variance 1 / inputs, ten outputs. Every bound
is the library's proven one; the figure is the bound over the product of the layers' spectral norms,
with seconds and the peak of memory above what was resident before, a process for each method.
Widths are those of three hidden layers, depths are numbers of hidden layers of `--neurons` neurons.
LipSDP and ECLipsE are given up beyond `--time-limit` seconds, and left out for sizes above the one
where they were. Prints Markdown tables, writes results/lmi_bounds.json and, with the `plot` extra,
results/lmi_bounds.png.
"""

import json
import subprocess

import measuring

METHODS = ("lipsdp", "eclipse", "eclipse_fast")
SOLVED = METHODS[:2]


def measure(method, width, depth, time_limit):
    import keras
    import numpy as np

    import keras_lipnext as lip
    from keras_lipnext.lmi._chain import read_chain

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((width,))])
    for index in range(depth):
        scaled = keras.initializers.VarianceScaling(1.0, "fan_in", "untruncated_normal", seed=index)
        model.add(keras.layers.Dense(width, activation="relu", kernel_initializer=scaled))
    model.add(keras.layers.Dense(10, kernel_initializer=scaled))
    norms = [np.linalg.norm(w, 2) for w in read_chain(model).weights]
    if method in SOLVED:
        import cvxpy  # noqa: F401  (its own memory and import time are not the method's)
    measuring.forget_peak()
    before = measuring.resident_gib()
    options = {"time_limit": time_limit} if method in SOLVED else {}
    row = {"method": method, "width": width, "depth": depth}
    try:
        result = getattr(lip.lmi, method)(model, **options)
    except RuntimeError as error:
        return {**row, "failed": str(error)}
    logarithm = np.log(result.constant) - np.log(norms).sum()
    return {
        **row,
        "bound_over_product": float(np.exp(logarithm)),
        "seconds": round(result.seconds, 3),
        "peak_gib": round(measuring.peak_gib() - before, 3),
    }


def cell(row):
    if row is None or "failed" in row:
        return "-"
    return f"{row['bound_over_product']:.3g}; {row['seconds']:.2g} s; {row['peak_gib']:.2g} GiB"


def sweep(method, key, arguments):
    """Prints a row for each size, from small to large, until the method gives up."""
    for size in sorted(getattr(arguments, f"{key}s")):
        width, depth = (size, 3) if key == "width" else (arguments.neurons, size)
        row = measure(method, width, depth, arguments.time_limit)
        print(json.dumps(row), flush=True)
        if "failed" in row:
            break


def rows_of(method, key):
    try:
        return measuring.child(__file__, method, key, backend="torch")
    except subprocess.CalledProcessError as error:  # out of memory, say
        return [{"method": method, key: None, "failed": str(error)}]


def panel(rows, key, value, label):
    def draw(axis):
        for method in METHODS:
            points = [r for r in rows if r["method"] == method and "failed" not in r]
            axis.plot([r[key] for r in points], [r[value] for r in points], "o-", label=method)
        axis.set(xlabel=key, ylabel=label, xscale="log", yscale="log")
        axis.legend()

    return draw


def main():
    parser = measuring.parser(__doc__, backends=("torch",))
    parser.add_argument("--widths", nargs="+", type=int, default=[10, 30, 100, 300, 1000])
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 5, 10, 30, 100])
    parser.add_argument("--neurons", type=int, default=10, help="of a layer, where depths vary")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds, for solvers")
    arguments = parser.parse_args()
    if arguments.child:
        sweep(*arguments.child, arguments)
        return
    sweeps = {
        key: [row for method in METHODS for row in rows_of(method, key)]
        for key in ("width", "depth")
    }
    for key, rows in sweeps.items():
        found = {(row["method"], row[key]): row for row in rows}
        sizes = sorted({row[key] for row in rows if row[key]})
        lines = [[size, *(cell(found.get((m, size))) for m in METHODS)] for size in sizes]
        measuring.table(
            f"bound / product of norms, seconds, memory, by {key}", [key, *METHODS], lines
        )
    measuring.write("lmi_bounds", {"settings": measuring.settings(arguments), **sweeps})
    values = (("bound_over_product", "bound / product"), ("seconds", "seconds"))
    measuring.figure(
        "lmi_bounds", [[panel(rows, key, *v) for v in values] for key, rows in sweeps.items()]
    )


if __name__ == "__main__":
    main()
