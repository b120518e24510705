"""Memory and time of a training step: plain, with rematerialisation, with gradient accumulation.

LipNeXt of width 64 on 32 x 32 images, 256 positions, at several depths, 64 images a step; each case
in a process of its own. Peak: the most that steps have resident beyond what was before them, after
a step of one image, on Linux. `accumulate` takes the 64 images in 4 batches of 16. Beside it stands
what `LipNeXt.estimate` says of activations. Memory and time are taken in runs of their own: to show
what is in use, not what the allocator keeps for later, the former hands all back at once, which is
slow. Prints a Markdown table and writes results/memory.json.

    python benchmarks/memory.py --depths 4 8 16
"""

import json
import os
import time

import measuring

CASES = ("plain", "remat", "accumulate")
IMAGES, PARTS, WARM_UP, STEPS = 64, 4, 2, 5


def measure(case, depth):
    import keras
    import numpy as np
    from training_step import TrainingStep

    import keras_lipnext as lip

    shape = {"input_shape": (32, 32, 3), "num_classes": 10, "patch_size": 2}
    model = lip.LipNeXt(
        depth=depth, width=64, neck="pool", shift_ratio=1 / 8, remat=case == "remat", **shape
    )
    parts = PARTS if case == "accumulate" else 1
    if parts > 1:
        config = model.optimizer.get_config() | {"gradient_accumulation_steps": parts}
        model.compile(lip.optimizers.ManifoldMuon.from_config(config), lip.losses.EMMA(0.4))
    count = IMAGES // parts
    rng = np.random.default_rng(0)
    x = rng.random((count, *shape["input_shape"]), "float32")
    labels = rng.integers(0, 10, (4, count))
    TrainingStep(model, x[:1], labels[:, :1])()
    step = TrainingStep(model, x, labels)
    resident = measuring.resident_gib()
    measuring.forget_peak()
    seconds = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        for _ in range(parts):
            step()
        seconds.append(time.perf_counter() - start)
    estimate = lip.LipNeXt.estimate(
        batch=count,
        depth=depth,
        width=64,
        neck="pool",
        shift_ratio=1 / 8,
        remat=case == "remat",
        **shape,
    )
    return {
        "backend": keras.backend.backend(),
        "depth": depth,
        "case": case,
        "peak_mib": round(1024 * (measuring.peak_gib() - resident)),
        "estimated_mib": round(estimate.activation_bytes / 2**20),
        "seconds": round(min(seconds[WARM_UP:]), 3),
    }


def report(rows):
    measuring.write("memory", {"images": IMAGES, "rows": rows})
    measuring.table(
        "A training step: peak MiB, of activations by the estimate, seconds",
        ["backend, depth", *CASES],
        [
            (
                f"{backend}, {depth}",
                *(
                    f"{r['peak_mib']}, {r['estimated_mib']}, {r['seconds']:.2f}"
                    for r in rows
                    if (r["backend"], r["depth"]) == (backend, depth)
                ),
            )
            for backend, depth in dict.fromkeys((r["backend"], r["depth"]) for r in rows)
        ],
    )


if __name__ == "__main__":
    parser = measuring.parser(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16])
    arguments = parser.parse_args()
    if arguments.child is not None:
        case, depth = arguments.child
        print(json.dumps(measure(case, int(depth))))
    else:
        rows = []
        for backend in arguments.backends:
            for depth in arguments.depths:
                for case in CASES:
                    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
                    (row,) = measuring.child(__file__, case, depth, backend=backend)
                    del os.environ["MALLOC_MMAP_THRESHOLD_"]
                    (timed,) = measuring.child(__file__, case, depth, backend=backend)
                    rows.append(row | {"seconds": timed["seconds"]})
        report(rows)
