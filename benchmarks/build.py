"""Time and peak memory to build a LipNeXt, on each backend: `python benchmarks/build.py [size]`.

Each backend builds `LipNeXt(size=...)` with the default 224 x 224 x 3 input and 1000 classes in a
process of its own. The time counts from a loaded library to a built, compiled model; the peak is
the process's resident memory, imports included. Prints a Markdown table and writes
results/build_<size>.json.
"""

import json
import time

import measuring


def measure(size):
    import keras

    import keras_lipnext as lip

    start = time.perf_counter()
    model = lip.LipNeXt(size=size)
    seconds = time.perf_counter() - start
    peak = measuring.peak_gib()
    kernel = model.get_layer("block_0").dense.kernel
    return {
        "backend": keras.backend.backend(),
        "seconds": round(seconds, 1),
        "peak_gib": round(peak, 2),
        "parameters": model.count_params(),
        "kernel_defect": float(lip.manifolds.stiefel.defect(kernel)),
    }


def report(size, rows):
    measuring.write(f"build_{size}", {"size": size, "rows": rows})
    measuring.table(
        f"LipNeXt(size={size!r})",
        ["backend", "seconds", "peak GiB", "parameters", "defect of a kernel"],
        [
            (
                r["backend"],
                r["seconds"],
                r["peak_gib"],
                f"{r['parameters']:,}",
                f"{r['kernel_defect']:.1e}",
            )
            for r in rows
        ],
    )


if __name__ == "__main__":
    parser = measuring.parser(__doc__)
    parser.add_argument("size", nargs="?", default="1b", help="a size of LipNeXt (1b)")
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(arguments.size)))
    else:
        rows = [measuring.child(__file__, backend=b)[0] for b in arguments.backends]
        report(arguments.size, rows)
