"""Start-up of LipNeXt against its depth: `python benchmarks/startup.py`.

    python benchmarks/startup.py --depths 2 4 --width 64 --skip-base --backends jax     # quick

Time from loaded libraries to the end of the first `train_on_batch`, building, tracing and
compilation included, the time of the third, and the peak of resident memory, libraries included;
each (backend, form, depth) in a process of its own. "plain" is the same network with its
constraints taken off and Keras' Adam: what it takes is Keras' and the backend's share. Images are
32 x 32 x 3, patches 4 x 4, batches of 16; then size base as published, 224 x 224 x 3 and 1000
classes, batches of 4. Writes results/startup.json and .png; other backends' rows there are kept.

Not shown: accelerators, whose compilers are slower; JAX's persistent compilation cache, which is
off here; `jit_compile=True` on TensorFlow, which Keras leaves off on CPUs. One run each: repeat to
see the spread. Processes run one after the other, so drifts of the machine are not cancelled.
"""

import json
import time

import measuring

FORMS = ("ours", "plain")


def measure(arguments, form, depth):
    import keras
    import numpy as np
    from training_step import unconstrained

    import keras_lipnext as lip

    base = depth == "base"
    shape, batch = ((224, 224, 3), 4) if base else ((32, 32, 3), 16)
    sizes = {"size": "base"} if base else {"depth": int(depth), "width": arguments.width}
    if not base:
        sizes |= {"patch_size": 4, "num_classes": 10, "shift_ratio": 1 / 16}
    x = np.random.default_rng(0).random((batch, *shape), dtype="float32")
    y = np.zeros(batch, "int32")
    loaded = measuring.resident_gib()

    start = time.perf_counter()
    model = lip.LipNeXt(input_shape=shape, neck="pool", **sizes)
    if form == "plain":
        unconstrained(model)
        metrics = ["accuracy", lip.metrics.CertifiedAccuracy(36 / 255)]
        model.compile(keras.optimizers.Adam(1e-3), model.loss, metrics=metrics)
    built = time.perf_counter()
    model.train_on_batch(x, y)
    first = time.perf_counter()
    model.train_on_batch(x, y)
    second = time.perf_counter()
    model.train_on_batch(x, y)
    return {
        "backend": keras.backend.backend(),
        "form": form,
        "depth": depth if base else int(depth),
        "build_seconds": round(built - start, 2),
        "first_step_seconds": round(first - start, 2),
        "step_seconds": round(time.perf_counter() - second, 4),
        "loaded_gib": round(loaded, 2),
        "peak_gib": round(measuring.peak_gib(), 2),
    }


def report(arguments, rows):
    measuring.write("startup", {"settings": measuring.settings(arguments), "rows": rows})
    measuring.table(
        f"From loaded libraries to the first step, width {arguments.width} (base: 32 x 1024)",
        ["backend, form, depth", "build (s)", "first step done (s)", "a step (s)", "peak GiB"],
        [
            (
                f"{r['backend']}, {r['form']}, {r['depth']}",
                r["build_seconds"],
                r["first_step_seconds"],
                r["step_seconds"],
                r["peak_gib"],
            )
            for r in rows
        ],
    )
    measuring.figure(
        "startup",
        [
            [
                panel(rows, "first_step_seconds", "first step done (s)"),
                panel(rows, "peak_gib", "peak GiB"),
            ]
        ],
    )


def panel(rows, key, label):
    def draw(axis):
        lines = dict.fromkeys((r["backend"], r["form"]) for r in rows)
        for backend, form in lines:
            line = [r for r in rows if (r["backend"], r["form"]) == (backend, form)]
            line = [r for r in line if r["depth"] != "base"]
            style = "o-" if form == "ours" else "o--"
            axis.plot(
                [r["depth"] for r in line],
                [r[key] for r in line],
                style,
                color=f"C{measuring.BACKENDS.index(backend)}",
                label=f"{backend}, {form}",
            )
        axis.set(xlabel="depth", ylabel=label)
        axis.set_xticks(sorted({r["depth"] for r in rows if r["depth"] != "base"}))
        axis.set_ylim(bottom=0)
        axis.legend()

    return draw


if __name__ == "__main__":
    parser = measuring.parser(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--width", type=int, default=256, help="channels (256)")
    parser.add_argument("--skip-base", action="store_true", help="leave size base out")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments, *arguments.child)))
    else:
        depths = [*arguments.depths, *([] if arguments.skip_base else ["base"])]
        path = measuring.RESULTS / "startup.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in rows if row["backend"] not in arguments.backends]
        rows += [
            measuring.child(__file__, form, depth, backend=backend)[0]
            for backend in arguments.backends
            for depth in depths
            for form in FORMS
        ]
        report(arguments, rows)
