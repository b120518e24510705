"""Looks for a false certificate in thousands of random networks; one is one too many.

    KERAS_BACKEND=torch python benchmarks/soundness.py --nets 10000

Each network is drawn from its number: depth 1 to 6, width 2 to 32, every kind of layer and of
operation between layers, weights of sizes from 1e-3 to 40, drifted kernels, biases up to 1e6. It is
certified at random inputs, and checked in 80-bit arithmetic that shares no code with the library:
margins within their allowances, slopes below K, no other prediction at 0.999 of a radius along
gradients and random directions, none of the model's own float32 answers within a radius certified
with arithmetic="float32" (tests/certification/random_nets.py). With --orders networks are chains
of Dense layers, evaluated in NumPy float32 in thirteen orders of summation and by the backend, at
the samples, at the border of their float32 radii, and at floats beside it
(tests/certification/red_team.py). Writes
results/soundness_<backend>.json.
"""

import argparse
import collections
import json
import pathlib
import sys
import time

import keras
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "certification")]

import random_nets  # noqa: E402
import red_team  # noqa: E402


def in_every_order(seed):
    """As `random_nets.check`, of float32 programs in every order of summation."""
    model, x = red_team.drawn(seed)
    radii = red_team.survives(model, x, rounds=1).radii
    certified = int((radii > 0).sum())
    return {
        "certified": certified,
        "certified_in_float32": certified,
        "samples": len(x),
        "steepest": 0.0,
        "kinds": ["Dense"],
    }


def of_every_kind(seed):
    return random_nets.check(random_nets.build(random_nets.seeded(seed), seed), seed)


def main(first, nets, output, check):
    started, kinds, violations = time.time(), collections.Counter(), []
    certified = in_float32 = samples = 0
    steepest = []
    progress = keras.utils.Progbar(nets, unit_name="net")
    for seed in range(first, first + nets):
        try:
            found = check(seed)
        except (AssertionError, ValueError) as error:
            violations.append({"net": seed, "what": str(error)})
        else:
            kinds.update(found["kinds"])
            certified += found["certified"]
            in_float32 += found["certified_in_float32"]
            samples += found["samples"]
            steepest.append(found["steepest"])
        if seed % 100 == 0:  # what it collects costs more than a network's checks
            keras.backend.clear_session()
        progress.add(1)
    result = {
        "backend": keras.backend.backend(),
        "first_net": first,
        "nets": nets,
        "violations": violations,
        "samples": samples,
        "certified_samples": certified,
        "certified_in_float32": in_float32,
        "steepest_slope_over_K": {
            str(q): float(np.percentile(steepest, q)) for q in (50, 90, 99, 100)
        },
        "kinds": dict(kinds.most_common()),
        "minutes": round((time.time() - started) / 60, 1),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{nets} networks, {certified} of {samples} samples certified, {len(kinds)} kinds of step"
    )
    print(f"violations: {len(violations)} {violations[:5]}")
    return 1 if violations else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", type=int, default=10_000, help="networks to draw (10000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (0)")
    parser.add_argument("--orders", action="store_true", help="float32 programs in every order")
    parser.add_argument("--output", type=pathlib.Path, help="(results/soundness_<backend>.json)")
    arguments = parser.parse_args()
    kind = "orders_" if arguments.orders else ""
    default = HERE / "results" / f"soundness_{kind}{keras.backend.backend()}.json"
    check = in_every_order if arguments.orders else of_every_kind
    sys.exit(main(arguments.first, arguments.nets, arguments.output or default, check))
