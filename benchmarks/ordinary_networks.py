"""Time and memory to bound ordinary networks of keras.applications: `python ordinary_networks.py`.

Random weights, 10 classes, each network and image size in a process of its own. Seconds of
`lipschitz_bound` alone, CPU seconds of all threads, and the process's peak resident memory (Linux)
before and after; a network that is refused is written down with the reason. On a busy machine, look
at the CPU seconds, with OMP_NUM_THREADS=1. Writes results/ordinary_networks.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import measuring

CASES = (
    ("ResNet50", 32),
    ("ResNet50", 64),
    ("ResNet50", 224),
    ("VGG16", 32),
    ("VGG16", 224),
    ("DenseNet121", 32),
    ("MobileNetV2", 32),
    ("MobileNetV2", 224),
    ("EfficientNetB0", 224),
)


def measure(name, size):
    import keras

    import keras_lipnext as lip

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    result = {
        "network": name,
        "size": size,
        "backend": keras.backend.backend(),
        "parameters": model.count_params(),
        "cores": os.cpu_count(),
        "blas_threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": round(os.getloadavg()[0], 1),
        "peak_gib_before": round(measuring.peak_gib(), 2),
    }
    start, cpu = time.perf_counter(), time.process_time()
    try:
        bound = lip.lipschitz_bound(model, verbose=0)
        result["bound"] = bound.constant
        result["layers"] = len(bound.layers)
    except ValueError as error:
        result["refused"] = str(error)
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["cpu_seconds"] = round(time.process_time() - cpu, 1)
    result["peak_gib"] = round(measuring.peak_gib(), 2)
    print(json.dumps(result))


def main():
    results = []
    for name, size in CASES:
        run = subprocess.run(
            [sys.executable, __file__, name, str(size)], stdout=subprocess.PIPE, check=True
        )
        results.append(json.loads(run.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
        measuring.write("ordinary_networks", {"networks": results})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", nargs="?", help="one network, in this process")
    parser.add_argument("size", nargs="?", type=int, default=224, help="side of its images (224)")
    arguments = parser.parse_args()
    if arguments.network:
        measure(arguments.network, arguments.size)
    else:
        main()
