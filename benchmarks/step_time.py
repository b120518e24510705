"""Time of a full training step of LipNeXt: `python benchmarks/step_time.py`.

    python benchmarks/step_time.py --widths 64 --tokens 256 --rounds 16     # quick

On each backend, in a process of its own, these take turns on the same random images of 32 x 32 x 3
in patches of 4 x 4, with the same loss (EMMA), metrics and learning rate, in float32:

- ours: shift ratio 1/16 and 1/8, ManifoldAdam; 1/16 with ManifoldMuon too
- the paper's form: the whole R, FastExp (paper_optimizer.py), and a polar retraction by SVD at the
  end of each epoch, measured apart and charged to its 390 steps (CIFAR-10, batches of 128)
- plain: networks of the same layers with the constraints taken off, Keras' Adam. "FLOPs of 1/16"
  has two thin products and one square one a block, as ours; "full shape" three square ones.

`tokens` are positions times images. What is timed covers whole periods of our drift removal
(measuring.py). Writes results/step_time.json and .png; `norm_in_fast_exp` there is the norm that
decides the branch FastExp takes.

Not shown: data loading and callbacks (fit_overhead.py), accuracy after a step (the optimizers do
not learn equally much from one), accelerators, lower precision, several devices. The paper's form
is timed at 1/16 only; its products do not depend on the ratio. The stem and the head, the same in
all, draw ratios towards 1 in narrow and shallow networks.
"""

import gc
import json
import time

import measuring

EPOCH = 390
POSITIONS = 64
RATIOS = (
    ("paper", "ours 1/16"),
    ("paper", "ours 1/8"),
    ("ours 1/16", "plain, FLOPs of 1/16"),
    ("ours 1/8", "plain, FLOPs of 1/8"),
    ("ours 1/16, Muon", "plain, FLOPs of 1/16"),
    ("ours 1/16", "plain, full shape"),
    ("paper", "plain, full shape"),
)


def steps(depth, width, tokens, learning_rate):
    """{name: training step} on one batch."""
    import keras
    import numpy as np
    from paper_optimizer import PaperAdam
    from training_step import TrainingStep, unconstrained

    import keras_lipnext as lip

    generator = np.random.default_rng(0)
    x = generator.random((tokens // POSITIONS, 32, 32, 3), dtype="float32")
    labels = generator.integers(0, 10, (64, len(x)))

    def step(optimizer, ratio=1 / 16, mixing="reduced"):
        model = lip.LipNeXt(
            input_shape=(32, 32, 3),
            num_classes=10,
            patch_size=4,
            neck="pool",
            depth=depth,
            width=width,
            shift_ratio=ratio,
            mixing=mixing,
            compile=False,
        )
        if optimizer is keras.optimizers.Adam:
            unconstrained(model)
        model.compile(
            optimizer(learning_rate),
            loss=lip.losses.EMMA(108 / 255, temperature=16.0),
            metrics=["accuracy", lip.metrics.CertifiedAccuracy(36 / 255)],
        )
        return TrainingStep(model, x, labels)

    plain, ours = keras.optimizers.Adam, lip.optimizers.ManifoldAdam
    return {
        "plain, full shape": step(plain, mixing="full"),
        "plain, FLOPs of 1/16": step(plain),
        "plain, FLOPs of 1/8": step(plain, 1 / 8),
        "ours 1/16": step(ours),
        "ours 1/8": step(ours, 1 / 8),
        "ours 1/16, Muon": step(lip.optimizers.ManifoldMuon),
        "paper": step(PaperAdam, mixing="full"),
    }


def svd_seconds(kernel):
    """Of one polar retraction by SVD, the fastest of five."""
    import keras

    from keras_lipnext.manifolds import polar_svd

    seconds = []
    kernel = keras.ops.convert_to_tensor(kernel)
    for _ in range(5):
        start = time.perf_counter()
        keras.ops.convert_to_numpy(polar_svd(kernel))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def largest_rotation(step, shape):
    """Frobenius norm of D in the paper's next step: ||exp(D) - I||_F = ||X_new - X||_F."""
    import numpy as np

    before = [w for w in step.weights() if w.shape == shape]
    step()
    after = [w for w in step.weights() if w.shape == shape]
    return max(float(np.linalg.norm(b - a)) for a, b in zip(before, after))


def measure(arguments, width, tokens):
    import keras

    from keras_lipnext.optimizers.manifold_optimizer import PROJECTION_PERIOD

    calls = steps(arguments.depth, width, tokens, arguments.learning_rate)
    kernel = next(w for w in calls["paper"].weights() if w.shape == (width, width))
    svd = 2 * arguments.depth * svd_seconds(kernel)
    timings = measuring.interleaved(
        calls,
        arguments.rounds,
        arguments.seconds,
        period=PROJECTION_PERIOD,
        charges={"paper": svd / EPOCH},
    )
    return {
        "backend": keras.backend.backend(),
        "width": width,
        "tokens": tokens,
        "rounds": timings.count,
        "seconds": {name: round(timings.seconds(name), 5) for name in calls},
        "ratios": {f"{a} / {b}": timings.ratio(a, b) for a, b in RATIOS},
        "svd_seconds_an_epoch": round(svd, 3),
        "norm_in_fast_exp": round(largest_rotation(calls["paper"], (width, width)), 3),
    }


def measure_all(arguments):
    import keras

    for width in arguments.widths:
        for tokens in arguments.tokens:
            row = measure(arguments, width, tokens)
            print(json.dumps(row), flush=True)
            keras.backend.clear_session()
            gc.collect()


def report(arguments, rows):
    measuring.write("step_time", {"settings": measuring.settings(arguments), "rows": rows})
    measuring.table(
        f"Full training step, {arguments.depth} blocks, float32: medians of ratios",
        ["backend, width, tokens", *(f"{a} / {b}" for a, b in RATIOS)],
        [
            (
                f"{row['backend']}, {row['width']}, {row['tokens']}",
                *(f"{r['median']:.2f}" for r in row["ratios"].values()),
            )
            for row in rows
        ],
    )
    shown = [f"{a} / {b}" for a, b in (RATIOS[0], RATIOS[2])]
    measuring.figure(
        "step_time",
        [[panel(rows, backend, name) for backend in arguments.backends] for name in shown],
    )


def panel(rows, backend, name):
    def draw(axis):
        for width in sorted({row["width"] for row in rows}):
            line = [r for r in rows if (r["backend"], r["width"]) == (backend, width)]
            measuring.draw_ratios(
                axis, [r["tokens"] for r in line], [r["ratios"][name] for r in line], f"{width}"
            )
        axis.set(title=backend, xlabel="tokens", ylabel=name, xscale="log")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.legend(title="width")

    return draw


if __name__ == "__main__":
    parser = measuring.parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--depth", type=int, default=2, help="blocks (2)")
    parser.add_argument("--rounds", type=int, default=64, help="rounds of a size, at most (64)")
    parser.add_argument("--seconds", type=float, default=20, help="to stop a size after (20)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the paper's (1e-3)")
    arguments = parser.parse_args()
    if arguments.child is not None:
        measure_all(arguments)
    else:
        rows = [r for b in arguments.backends for r in measuring.child(__file__, backend=b)]
        report(arguments, rows)
