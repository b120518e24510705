"""What each choice of architecture and recipe is worth, one table a choice.

    KERAS_BACKEND=jax python benchmarks/ablations.py --data DIR --workers 2 [GROUP ...]
    KERAS_BACKEND=jax python benchmarks/ablations.py --report

Trainings of benchmarks/tune.py that differ from `BASE` by the entries of `GROUPS`: 6 epochs of the
first 20,000 images of CIFAR-10 (JPEG q75 copy), mirrored at random, or of MNIST, measured on 5,000
held-out ones. The test part is not touched. What results/tuning.jsonl has is not run again; means
of what it has are written to results/ablations.json. CPU seconds are of `fit`, one core.
"""

import json

import measuring
import numpy as np
import tune

BASE = {"neck": "patches", "depth": 4, "width": 128, "patch_size": 4, "shift_ratio": 0.0625}
BASE |= {"temperature": 4, "batch": 128, "flip": True}
RADIUS = 36 / 255


def muon(rate=0.02, **more):
    rates = {"learning_rate": rate, "euclidean_learning_rate": rate / 2}
    return {"optimizer": {"class": "ManifoldMuon", **rates, **more}}


def loss(name, **arguments):
    return {"loss": {"class": name, **arguments}}


def emma(name="EMMA", epsilon=3 * RADIUS, temperature=4, **more):
    return loss(name, epsilon=epsilon, temperature=temperature, **more)


def batch(size, at_128=0.02):
    """The rate grows with the root of the batch."""
    return {"batch": size, **muon(round(at_128 * (size / 128) ** 0.5, 4))}


DIGITS = {"data": "mnist", "margin": 2, "epsilon": 0.2, "flip": False, "epochs": 6}
WIDE = DIGITS | {"epsilon": round(1.3 * 1.58 / 3, 4)}
POOL, PAIR = {"neck": "pool"}, {"neck": "pool", "dense_depth": 2}

# {group: {row: what differs from BASE}}.
GROUPS = {
    "neck": {
        "patches": {},
        "patches, `neck_width=128`": {"neck_width": 128},
        "patches, `neck_patch_size=2`": {"neck_patch_size": 2},
        "patches, `neck_patch_size=8`, the whole map": {"neck_patch_size": 8},
        "patches, `dense_depth=3`": {"dense_depth": 3},
        "pool, 8 epochs": POOL | {"epochs": 8},
        "pool, `dense_depth=2`, 8 epochs": PAIR | {"epochs": 8},
        "patches, 24 epochs": {"epochs": 24},
        "pool, 32 epochs": POOL | {"epochs": 32},
    },
    "neck, MNIST": {
        "patches": DIGITS,
        "pool, 8 epochs": DIGITS | POOL | {"epochs": 8},
        "patches, 24 epochs": DIGITS | {"epochs": 24},
        "pool, 32 epochs": DIGITS | POOL | {"epochs": 32},
    },
    "neck, MNIST for 1.58": {
        "patches": WIDE,
        "pool, 8 epochs": WIDE | POOL | {"epochs": 8},
        "patches, 24 epochs": WIDE | {"epochs": 24},
        "pool, 32 epochs": WIDE | POOL | {"epochs": 32},
    },
    "patch size": {
        "4": {},
        "4, 12 epochs": {"epochs": 12},
        "2, 3 epochs": {"patch_size": 2, "epochs": 3},
        "2, width 64": {"patch_size": 2, "width": 64, "neck_width": 256},
    },
    "size": {
        "4 blocks of 128": {},
        "8 blocks of 128, 4 epochs": {"depth": 8, "epochs": 4},
        "2 blocks of 128, 9 epochs": {"depth": 2, "epochs": 9},
        "4 blocks of 256, 3 epochs": {"width": 256, "epochs": 3},
        "4 blocks of 64, 11 epochs": {"width": 64, "neck_width": 256, "epochs": 11},
    },
    "temperature": {
        **{f"{t}": {"temperature": t} for t in (1, 2, 4, 8, 16)},
        "8 to 2": emma("ChangingEMMA", temperature=8, last=2),
        "2 to 8": emma("ChangingEMMA", temperature=2, last=8),
    },
    "loss": {
        "EMMA to 108/255": {},
        "EMMA to 216/255": emma(epsilon=6 * RADIUS),
        "EMMA to 432/255": emma(epsilon=12 * RADIUS),
        "cross-entropy at 36/255": emma("CertifiedCrossEntropy", RADIUS),
        "cross-entropy at 108/255": emma("CertifiedCrossEntropy"),
        "logit annealing": loss("LogitAnnealing"),
        "logit annealing, offset 0.5, T 0.25": loss(
            "LogitAnnealing", offset=0.5, temperature=0.25, gamma=2.0
        ),
    },
    "ramp": {
        "0.5": {},
        "0.1": emma(ramp=0.1),
        "0.25": emma(ramp=0.25),
        "1": emma(ramp=1.0),
    },
    "beta": {
        "0.75": {},
        "0.25": {"beta": 0.25},
        "0.5": {"beta": 0.5},
        "1": {"beta": 1.0},
    },
    "shift ratio": {
        "1/16": {},
        "1/8": {"shift_ratio": 0.125},
        "1/4": {"shift_ratio": 0.25},
    },
    "batch and rate": {
        "128, 0.02": {},
        "128, 0.01": muon(0.01),
        "128, 0.04": muon(0.04),
        "64, 0.014": batch(64),
        "256, 0.028": batch(256),
        "512, 0.04": batch(512),
    },
    "averaging": {
        "none": {},
        "Lookahead, 5 steps": muon(lookahead_period=5),
        "moving average, 0.98": muon(use_ema=True, ema_momentum=0.98),
    },
    "augmentation": {
        "flip": {},
        "none": {"flip": False},
        "flip, shift by 1": {"shift": 1},
        "flip, Cutout of 8": {"cutout": 8},
        "flip, RandAugment 0.1": {"randaugment": 0.1},
        "12 epochs: flip": {"epochs": 12},
        "12 epochs: flip, shift by 1": {"epochs": 12, "shift": 1},
        "12 epochs: flip, shift by 2": {"epochs": 12, "shift": 2},
        "12 epochs: flip, shift by 1, RandAugment 0.1": {
            "epochs": 12,
            "shift": 1,
            "randaugment": 0.1,
        },
    },
    "centring": {
        "none": {},
        "running mean behind each block": {"centring": True},
    },
}


def settings(row, seed):
    found = BASE | row
    if not found["flip"]:
        del found["flip"]
    return found | ({"seed": seed} if seed else {})


def seen(row):
    """What was found of a row, a dictionary a seed."""
    key = json.dumps(settings(row, 0), sort_keys=True)
    found = []
    for result in tune.results():
        without = {k: v for k, v in result["settings"].items() if k != "seed"}
        on_cpu = result.get("device", "cpu") == "cpu"  # whose seconds the tables give
        if on_cpu and json.dumps(without, sort_keys=True) == key:
            found.append(result)
    return found


def summary(rows):
    """[{name, seeds, CPU seconds, means of clean accuracy and of CRA at each radius}]."""
    table = []
    for name, row in rows.items():
        found = seen(row)
        if not found:
            continue
        radii = [key for key in found[0] if key[0].isdigit()]
        means = {k: round(float(np.mean([f[k] for f in found])), 4) for k in ("accuracy", *radii)}
        one = {"name": name, "seeds": len(found), "clean": means.pop("accuracy"), "cra": means}
        table.append(one | {"cpu_seconds": float(np.median([f["cpu_seconds"] for f in found]))})
    return table


def main():
    parser = measuring.parser(__doc__, backends=("own",))
    parser.add_argument("groups", nargs="*", default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--data", help="folder of the image sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time (1)")
    parser.add_argument("--report", action="store_true", help="no training, only the tables")
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(GROUPS)
    if unknown:
        parser.error(f"groups are {', '.join(GROUPS)}. Received: {', '.join(sorted(unknown))}")
    if not arguments.report:
        wanted = [
            settings(row, seed)
            for group in arguments.groups
            for row in GROUPS[group].values()
            for seed in arguments.seeds
        ]
        tune.run_all(wanted, arguments.data, arguments.workers)
    groups = {group: summary(rows) for group, rows in GROUPS.items()}
    measuring.write("ablations", {"groups": {k: v for k, v in groups.items() if len(v) > 1}})
    for group in arguments.groups:
        if groups[group]:
            heads = ("", "seeds", "CPU seconds", "clean", *groups[group][0]["cra"])
            cells = [
                (
                    of["name"],
                    of["seeds"],
                    f"{of['cpu_seconds']:.0f}",
                    *(f"{100 * v:.1f}" for v in (of["clean"], *of["cra"].values())),
                )
                for of in groups[group]
            ]
            measuring.table(group, heads, cells)


if __name__ == "__main__":
    main()
