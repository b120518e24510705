"""Time and memory to prove all constants of a LipNeXt: `python benchmarks/constants.py [size]`.

Builds the model with its default input and 1000 classes, then runs `lipschitz_bound` on it twice:
the second time every norm is remembered by the hash of its weights. The peak is the process's
resident memory (Linux), the model included. Writes results/constants_<size>.json.
"""

import argparse
import json
import os
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import measuring

import keras_lipnext as lip
from keras_lipnext.models.sizes import SIZES


def main(size):
    model = lip.LipNeXt(size=size)
    built = round(measuring.peak_gib(), 2)
    seconds = []
    for verbose in (1, 0):
        start = time.perf_counter()
        bound = lip.lipschitz_bound(model, verbose=verbose)
        seconds.append(round(time.perf_counter() - start, 1))
    result = {
        "size": size,
        "parameters": model.count_params(),
        "backend": keras.backend.backend(),
        "seconds": seconds[0],
        "seconds_again": seconds[1],
        "peak_gib_before": built,
        "peak_gib": round(measuring.peak_gib(), 2),
        "K": bound.body_constant,
        "layers": len(bound.layers),
    }
    measuring.write(f"constants_{size}", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", nargs="?", default="1b", choices=SIZES, help="(1b)")
    main(parser.parse_args().size)
