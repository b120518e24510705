"""What mixed_bfloat16 costs in accuracy: the quickstart's digits, against float32, same seeds.

Trains the model of examples/quickstart.py for 44 epochs, 1,012 steps, in both precisions, and
certifies it on the 360 held-out digits. Prints Markdown tables and writes results/bfloat16.json:
of each run the loss in evaluation, clean and certified accuracy, held-out samples that the model's
own precision predicts otherwise than float64, and the kernels' largest defect, max |X^T X - I|.

    python benchmarks/bfloat16.py --backends jax torch --seeds 0 1 2
"""

import json
import pathlib
import statistics
import sys
import time

import measuring

POLICIES = ("float32", "mixed_bfloat16")
EPSILONS = (0.1, 0.25, 0.5)
EPOCHS = 44


def run(policy, seed):
    import keras

    import keras_lipnext as lip

    sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
    from quickstart import digits

    keras.utils.set_random_seed(seed)
    train, test = digits()
    arguments = {"input_shape": (8, 8, 1), "num_classes": 10, "patch_size": 2, "epsilon": 0.5 / 3}
    model = lip.LipNeXt(size="tiny", neck="pool", dtype=policy, **arguments)
    start = time.perf_counter()
    model.fit(*train, batch_size=64, epochs=EPOCHS, verbose=0)
    seconds = time.perf_counter() - start
    stored = {keras.backend.standardize_dtype(v.dtype) for v in model.trainable_variables}
    moments = {
        keras.backend.standardize_dtype(v.dtype)
        for v in model.optimizer.variables
        if v.shape != () and "float" in keras.backend.standardize_dtype(v.dtype)
    }
    certificate = model.certify(*test, epsilons=EPSILONS, verbose=0)
    return {
        "backend": keras.backend.backend(),
        "policy": policy,
        "seed": seed,
        "steps": int(model.optimizer.iterations),
        "loss": model.evaluate(*test, return_dict=True, verbose=0)["loss"],
        "clean": certificate.clean_accuracy,
        "cra": {str(e): share for e, share in certificate.certified_accuracy.items()},
        "predicted_otherwise": certificate.low_precision_differences or 0,
        "defect": max(
            float(lip.manifolds.stiefel.defect(v))
            for v in model.trainable_variables
            if isinstance(v.constraint, lip.manifolds.Stiefel)
        ),
        "weights": sorted(stored),
        "moments": sorted(moments),
        "seconds": round(seconds, 1),
    }


def figures(row):
    return {"loss": row["loss"], "clean": row["clean"], **row["cra"]}


def summary(rows):
    """[{backend, figure: mean of bfloat16 minus float32 over the seeds}], shares in points."""
    found = []
    for backend in dict.fromkeys(r["backend"] for r in rows):
        means = [
            {
                key: statistics.mean(
                    figures(r)[key]
                    for r in rows
                    if r["backend"] == backend and r["policy"] == policy
                )
                for key in figures(rows[0])
            }
            for policy in POLICIES
        ]
        plain, mixed = means
        points = {k: round(100 * (mixed[k] - plain[k]), 2) for k in plain if k != "loss"}
        found.append(
            {
                "backend": backend,
                "loss_ratio": round(mixed["loss"] / plain["loss"], 4),
                "points": points,
            }
        )
    return found


def report(rows):
    rows.sort(key=lambda r: (r["backend"], r["seed"], r["policy"]))
    differences = summary(rows)
    measuring.write("bfloat16", {"rows": rows, "differences": differences})
    measuring.table(
        "Quickstart's digits, held out, per cent",
        [
            "backend, seed, policy",
            "loss",
            "clean",
            *map(str, EPSILONS),
            "otherwise",
            "defect",
            "seconds",
        ],
        [
            (
                f"{r['backend']} {r['seed']} {r['policy']}",
                f"{r['loss']:.4f}",
                *(f"{100 * s:.2f}" for s in (r["clean"], *r["cra"].values())),
                r["predicted_otherwise"],
                f"{r['defect']:.1e}",
                r["seconds"],
            )
            for r in rows
        ],
    )
    measuring.table(
        "mixed_bfloat16 less float32, mean over seeds, points",
        ["backend", "loss, ratio", "clean", *map(str, EPSILONS)],
        [(d["backend"], d["loss_ratio"], *d["points"].values()) for d in differences],
    )


if __name__ == "__main__":
    parser = measuring.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.child is not None:
        policy, seed = arguments.child
        print(json.dumps(run(policy, int(seed))))
    else:
        path = measuring.RESULTS / "bfloat16.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in rows if row["backend"] not in arguments.backends]
        rows += [
            row
            for seed in arguments.seeds
            for backend in arguments.backends
            for policy in POLICIES
            for row in measuring.child(__file__, policy, seed, backend=backend)
        ]
        report(rows)
