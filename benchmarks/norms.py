"""Time and tightness of proven spectral norms: `python benchmarks/norms.py`.

For float32 matrices within rounding of orthogonal, the time of `spectral_norm_bound` over that of
NumPy's singular values of the same matrix in float64, measured in turns; the median of the ratios,
and how far the bound is above the largest singular value. Then the two kernels of a block of the
1b model, each in a process of its own that has loaded nothing but NumPy: seconds (the median of
three) and peak of resident memory (Linux), and what the model's 32 blocks take. Prints Markdown
tables and writes JSON.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from keras_lipnext.norms import matrices as norms

SIZES = (256, 512, 1024, 2048)
REPEATS = {256: 41, 512: 21, 1024: 11, 2048: 3}
BLOCKS, WIDTH, MOVED = 32, 4096, 1024  # of the 1b model: matrices C x C and C x C/4

ONE_KERNEL = """
import importlib.util, json, pathlib, re, sys, time
import numpy as np
spec = importlib.util.spec_from_file_location("norms", sys.argv[1])
norms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(norms)
kernel = np.load(sys.argv[2])[:, : int(sys.argv[3])]
seconds = []
for _ in range(3):
    norms._CACHE.clear()
    start = time.perf_counter()
    bound = norms.spectral_norm_bound(kernel)
    seconds.append(time.perf_counter() - start)
print(json.dumps({
    "shape": kernel.shape,
    "seconds": round(sorted(seconds)[1], 2),
    # Not ru_maxrss, which a process inherits from the one that starts it.
    "peak_gib": round(
        int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
        / 2**20, 2
    ),
    "bound": bound,
}))
"""


def orthogonal(n, seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return q.astype("float32")


def seconds(function, *arguments, **options):
    start = time.perf_counter()
    answer = function(*arguments, **options)
    return time.perf_counter() - start, answer


def against_singular_values(n):
    bounds, svds, excess = [], [], 0.0
    for seed in range(REPEATS[n]):
        w = orthogonal(n, seed)
        time_bound, bound = seconds(norms.spectral_norm_bound, w)
        time_svd, values = seconds(np.linalg.svd, w.astype("float64"), compute_uv=False)
        bounds.append(time_bound)
        svds.append(time_svd)
        excess = max(excess, bound / float(values[0]) - 1)
    return {
        "n": n,
        "repeats": REPEATS[n],
        "median_ratio": round(statistics.median(b / s for b, s in zip(bounds, svds)), 3),
        "median_seconds": round(statistics.median(bounds), 5),
        "median_seconds_svd": round(statistics.median(svds), 5),
        "largest_excess": excess,
    }


def main():
    rows = []
    for n in SIZES:
        rows.append(against_singular_values(n))
        print(rows[-1], file=sys.stderr)
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.npy"
        np.save(path, orthogonal(WIDTH, 0))
        for columns in (WIDTH, MOVED):
            done = subprocess.run(
                [sys.executable, "-c", ONE_KERNEL, norms.__file__, str(path), str(columns)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            kernels.append(json.loads(done.stdout))
            print(kernels[-1], file=sys.stderr)
    model = round(BLOCKS * sum(kernel["seconds"] for kernel in kernels), 1)

    print(f"\nspectral_norm_bound, near-orthogonal float32, {os.cpu_count()} cores\n")
    print("| n | time / SVD's | seconds | SVD's seconds | bound / norm - 1 |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        print(
            f"| {r['n']} | {r['median_ratio']} | {r['median_seconds']} "
            f"| {r['median_seconds_svd']} | {r['largest_excess']:.1e} |"
        )
    print("\n| kernel | seconds | peak GiB, NumPy and kernel included |")
    print("| --- | ---: | ---: |")
    for r in kernels:
        print(f"| {' x '.join(map(str, r['shape']))} | {r['seconds']} | {r['peak_gib']} |")
    print(f"\nAll kernels of the 1b model's {BLOCKS} blocks: {model} s")

    path = pathlib.Path(__file__).with_name("results") / "norms.json"
    path.parent.mkdir(exist_ok=True)
    machine = {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # other processes may have been running
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    answer = {"machine": machine, "against_svd": rows, "kernels": kernels, "seconds_1b": model}
    path.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
