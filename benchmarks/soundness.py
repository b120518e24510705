"""Looks for a false certificate in thousands of random networks; one is one too many.

    KERAS_BACKEND=torch python benchmarks/soundness.py --nets 10000

Each network is drawn from its number: depth 1 to 6, width 2 to 32, every kind of layer and of
operation between layers, weights of sizes from 1e-3 to 40, drifted kernels, biases up to 1e6. It is
certified at random inputs, and checked in 80-bit arithmetic that shares no code with the library:
margins within their allowances, slopes below K, no other prediction at 0.999 of a radius along
gradients and random directions, none of the model's own float32 answers within a radius certified
with arithmetic="float32" (tests/certification/random_nets.py). Writes
results/soundness_<backend>.json.

    KERAS_BACKEND=torch python benchmarks/soundness.py --orders --nets 10000

Networks are chains of Dense layers, evaluated in NumPy float32 in fifteen orders of summation and
by the backend, with its channels in their order and permuted, at the samples, at the border of
their float32 radii, and at floats beside it (tests/certification/red_team.py). Many draws of
weights share sizes and layers, so that these are compiled once. The first 500 networks are searched
within naive radii, too: with no allowance for programs, that of float64, that of sums by halves.
Writes results/soundness_orders_<backend>.json.
"""

import argparse
import collections
import json
import pathlib
import sys
import time
import warnings

import keras
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "certification")]

import random_nets  # noqa: E402
import red_team  # noqa: E402
import test_soundness  # noqa: E402


class InEveryOrder:
    """As `of_every_kind`, of float32 programs in every order of summation.

    Attributes:
        facts: For the results: draws of an architecture, {what is counted: networks}.
    """

    searched = 500

    def __init__(self, draws):
        self.draws = draws
        self.naive = dict.fromkeys(
            ("networks", "no allowance", "unit of float64", "pairwise sums"), 0
        )
        self.facts = {"draws_of_an_architecture": draws, "naive": self.naive}
        self._number, self._architecture = None, None

    def __call__(self, seed):
        number, draw = divmod(seed, self.draws)
        if number != self._number:
            keras.backend.clear_session()
            self._number, self._architecture = number, red_team.Architecture(number)
        draw = [number, draw]
        radii = self._architecture.survives(draw).radii
        if self.naive["networks"] < self.searched:
            self.naive["networks"] += 1
            self.naive["no allowance"] += self._crossed(draw, arithmetic="real")
            with test_soundness.unguarded(test_soundness.unit_of_float64):
                self.naive["unit of float64"] += self._crossed(draw)
            with test_soundness.unguarded(test_soundness.pairwise_sums):
                self.naive["pairwise sums"] += self._crossed(draw)
        certified = int((radii > 0).sum())
        return {
            "certified": certified,
            "certified_in_float32": certified,
            "samples": len(radii),
            "steepest": 0.0,
            "kinds": ["Dense"],
        }

    def _crossed(self, draw, **settings):
        try:
            self._architecture.survives(draw, **settings)
        except AssertionError:
            return 1
        return 0


def of_every_kind(seed):
    return random_nets.check(random_nets.build(random_nets.seeded(seed), seed), seed)


def main(first, nets, output, check):
    warnings.filterwarnings("error", message="The model's own answers")
    started, kinds, violations = time.time(), collections.Counter(), []
    certified = in_float32 = samples = 0
    steepest = []
    for seed in range(first, first + nets):
        try:
            found = check(seed)
        except (AssertionError, ValueError, UserWarning) as error:
            violations.append({"net": seed, "what": str(error)})
        else:
            kinds.update(found["kinds"])
            certified += found["certified"]
            in_float32 += found["certified_in_float32"]
            samples += found["samples"]
            steepest.append(found["steepest"])
        done = seed + 1 - first
        if done % 100 == 0:  # what it collects costs more than a network's checks
            keras.backend.clear_session()
            print(f"{done} networks, {len(violations)} violations", flush=True)
        if done % 1000 and done < nets:
            continue
        result = {
            "backend": keras.backend.backend(),
            "first_net": first,
            "nets": done,
            "violations": violations,
            "samples": samples,
            "certified_samples": certified,
            "certified_in_float32": in_float32,
            "steepest_slope_over_K": {
                str(q): float(np.percentile(steepest, q)) for q in (50, 90, 99, 100)
            },
            "kinds": dict(kinds.most_common()),
            "minutes": round((time.time() - started) / 60, 1),
            **getattr(check, "facts", {}),
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
    parser.add_argument("--draws", type=int, default=50, help="of weights, an architecture (50)")
    parser.add_argument("--output", type=pathlib.Path, help="(results/soundness_<backend>.json)")
    arguments = parser.parse_args()
    kind = "orders_" if arguments.orders else ""
    default = HERE / "results" / f"soundness_{kind}{keras.backend.backend()}.json"
    check = InEveryOrder(arguments.draws) if arguments.orders else of_every_kind
    sys.exit(main(arguments.first, arguments.nets, arguments.output or default, check))
