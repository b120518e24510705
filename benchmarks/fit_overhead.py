"""What `model.fit` takes beyond a loop written by hand in JAX: `python benchmarks/fit_overhead.py`.

    python benchmarks/fit_overhead.py --networks 2/64/16 --steps 10     # quick

Both train the same LipNeXt on the same batches of 32 x 32 x 3 images, with the same loss, metrics
(accuracy, certified accuracy) and optimizer, from the same weights (handwritten.py). The losses of
the first steps must agree. An epoch of `fit` and an epoch of the loop then take turns; the figure
is the median of their ratios. Writes results/fit_overhead.json and .png.

Not shown: shuffling, validation, a progress bar and data that do not fit in memory (all off, or not
used, on both sides); compilation, which comes before. `fit` has a cost a call, so epochs of more
steps than the default would look better. Other backends have no such loop to compare with.
"""

import json
import os

import measuring

os.environ["KERAS_BACKEND"] = "jax"

# Relative, of the mean loss of the first steps; later ones differ more and more, as rounding does.
FIRST, TOLERANCE = 4, 1e-4


def measure(arguments, depth, width, batch):
    import keras
    import numpy as np
    from handwritten import Loop, Settings

    import keras_lipnext as lip

    settings = Settings(learning_rate=1e-3, demanded=0.42, certified=0.14, temperature=16.0)
    model = lip.LipNeXt(
        input_shape=(32, 32, 3),
        num_classes=10,
        patch_size=4,
        neck="pool",
        depth=depth,
        width=width,
        shift_ratio=1 / 16,
        compile=False,
    )
    model.compile(
        lip.optimizers.ManifoldAdam(settings.learning_rate),
        loss=lip.losses.EMMA(settings.demanded, temperature=settings.temperature, ramp=0),
        metrics=["accuracy", lip.metrics.CertifiedAccuracy(settings.certified)],
    )
    loop = Loop(model, settings)
    generator = np.random.default_rng(0)
    x = generator.random((batch * arguments.steps, 32, 32, 3), dtype="float32")
    y = generator.integers(0, 10, len(x)).astype("int32")

    def fit(*data):
        return model.fit(*data, batch_size=batch, shuffle=False, verbose=0).history["loss"][0]

    first = x[: FIRST * batch], y[: FIRST * batch]
    losses = {"loop": loop.epoch(*first, batch)[0], "fit": fit(*first)}
    if not abs(losses["fit"] / losses["loop"] - 1) < TOLERANCE:
        raise SystemExit(f"the two sides do not compute the same: losses {losses}")
    calls = {"loop": lambda: loop.epoch(x, y, batch), "fit": lambda: fit(x, y)}
    timings = measuring.interleaved(calls, arguments.rounds, arguments.seconds)
    return {
        "backend": keras.backend.backend(),
        "network": f"{depth}/{width}/{batch}",
        "losses": losses,
        "epochs": timings.count,
        "loop_step_seconds": round(timings.seconds("loop") / arguments.steps, 5),
        "fit_step_seconds": round(timings.seconds("fit") / arguments.steps, 5),
        "ratio": timings.ratio("fit", "loop"),
    }


def report(arguments, rows):
    measuring.write("fit_overhead", {"settings": measuring.settings(arguments), "rows": rows})
    measuring.table(
        f"model.fit on JAX against a loop by hand, epochs of {arguments.steps} steps",
        ["depth/width/batch", "loop: a step (ms)", "fit: a step (ms)", "ratio", "quartiles"],
        [
            (
                r["network"],
                f"{1000 * r['loop_step_seconds']:.1f}",
                f"{1000 * r['fit_step_seconds']:.1f}",
                r["ratio"]["median"],
                "{} to {}".format(*r["ratio"]["quartiles"]),
            )
            for r in rows
        ],
    )

    def draw(axis):
        names, ratios = [r["network"] for r in rows], [r["ratio"] for r in rows]
        measuring.draw_ratios(axis, range(len(rows)), ratios, None)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(rows)), names)
        axis.set(xlabel="depth/width/batch", ylabel="fit / loop")

    measuring.figure("fit_overhead", [[draw]])


def network(text):
    depth, width, batch = map(int, text.split("/"))
    return depth, width, batch


if __name__ == "__main__":
    parser = measuring.parser(__doc__, backends=("jax",))
    default = [(8, 64, 64), (8, 256, 64), (4, 512, 64)]
    parser.add_argument("--networks", type=network, nargs="+", default=default, help="d/w/batch")
    parser.add_argument("--steps", type=int, default=32, help="of an epoch (32)")
    parser.add_argument("--rounds", type=int, default=32, help="epochs of each, at most (32)")
    parser.add_argument("--seconds", type=float, default=60, help="to stop a network after (60)")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments, *map(int, arguments.child))))
    else:
        report(arguments, [measuring.child(__file__, *n)[0] for n in arguments.networks])
