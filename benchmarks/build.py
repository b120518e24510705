"""Time and peak memory to build a LipNeXt, on each backend: `python benchmarks/build.py [size]`.

Each backend builds `LipNeXt(size=...)` with the default 224 x 224 x 3 input and 1000 classes in a
process of its own. The time counts from a loaded library to a built, compiled model; the peak is
the process's resident memory, imports included. Prints a Markdown table and writes JSON beside it.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys

BUILD = """
import json, resource, sys, time
import keras, numpy as np, keras_lipnext as lip
start = time.perf_counter()
model = lip.LipNeXt(size=sys.argv[1])
seconds = time.perf_counter() - start
kernel = model.get_layer("block_0").dense.kernel
print(json.dumps({
    "backend": keras.backend.backend(),
    "seconds": round(seconds, 1),
    "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "parameters": model.count_params(),
    "kernel_defect": float(lip.manifolds.stiefel.defect(kernel)),
    "keras": keras.__version__,
}))
"""


def main(size):
    rows = []
    for backend in ("jax", "torch", "tensorflow"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", BUILD, size],
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    print(f"\nLipNeXt(size={size!r}), {os.cpu_count()} cores\n")
    print("| backend | seconds | peak GiB | parameters | defect of a kernel |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for r in rows:
        print(
            f"| {r['backend']} | {r['seconds']} | {r['peak_gib']} | {r['parameters']:,} "
            f"| {r['kernel_defect']:.1e} |"
        )
    path = pathlib.Path(__file__).with_name("results") / f"build_{size}.json"
    path.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    path.write_text(json.dumps({"size": size, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", nargs="?", default="1b", help="a size of LipNeXt (1b)")
    main(parser.parse_args().size)
