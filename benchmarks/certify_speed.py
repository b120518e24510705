"""Cost of `certify` against `model.predict` in float64: `python benchmarks/certify_speed.py`.

On each backend, in a process of its own: a LipNeXt on 32 x 32 x 3 images is certified on the same
samples that its copy of dtype float64 predicts, in turns, both warmed up. The proof of the
constants and compilation come once and are timed apart. The figure is the median of the ratios of
one `certify`, less its one-time part, to one `predict`. Prints a Markdown table and writes
results/certify_speed.json.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

GOAL = 2.5


def measure(samples, repeats, depth, width):
    import keras
    import numpy as np

    import keras_lipnext as lip
    from keras_lipnext import backend
    from keras_lipnext.certification import certify as _
    from keras_lipnext.certification.lipschitz import lipschitz_bound, read

    evaluation_class = sys.modules["keras_lipnext.certification.certify"]._Evaluation
    shape = {"input_shape": (32, 32, 3), "num_classes": 10, "depth": depth, "width": width}
    shape |= {"patch_size": 4, "shift_ratio": 1 / 16}
    model = lip.LipNeXt(**shape)
    x = np.random.default_rng(0).random((samples, 32, 32, 3))
    with backend.float64_scope():
        twin = lip.LipNeXt(**shape, dtype="float64")
        twin.set_weights([np.asarray(w, "float64") for w in model.get_weights()])
        start = time.perf_counter()
        twin.predict(x[:256], batch_size=256, verbose=0)
        first_predict = time.perf_counter() - start

        def predict():
            start = time.perf_counter()
            logits = twin.predict(x, batch_size=256, verbose=0)
            return time.perf_counter() - start, logits

        certifiable = read(model)
        start = time.perf_counter()
        lipschitz_bound(model)
        proof = time.perf_counter() - start
        start = time.perf_counter()
        evaluate = evaluation_class(certifiable, 10)
        evaluate(x[:256], 256)
        set_up = time.perf_counter() - start

        def certify():
            start = time.perf_counter()
            parts = [evaluate(x[:256], 256)]
            evaluate.compare(model, x[:256])
            parts += [evaluate(x[i : i + 256], 256) for i in range(256, samples, 256)]
            return time.perf_counter() - start, np.concatenate([p[0] for p in parts])

        ratios = []
        for _ in range(repeats):
            seconds, predictions = certify()
            reference, logits = predict()
            ratios.append(seconds / reference)
        agree = float((logits.argmax(axis=1) == predictions).mean())
    return {
        "backend": keras.backend.backend(),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in ratios],
        "proof_seconds": round(proof, 2),
        "set_up_seconds": round(set_up, 2),
        "first_predict_seconds": round(first_predict, 2),
        "predict_seconds": round(reference, 2),
        "same_predictions": agree,
    }


def main(arguments):
    rows = []
    for backend in ("jax", "torch", "tensorflow"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--child", *sys.argv[1:]],
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    print(f"\ncertify / predict, float64, {arguments.samples} samples, {os.cpu_count()} cores\n")
    print("| backend | median ratio | proof of K (s) | set-up and compilation (s) |")
    print("| --- | ---: | ---: | ---: |")
    for r in rows:
        print(f"| {r['backend']} | {r['ratio']} | {r['proof_seconds']} | {r['set_up_seconds']} |")
    settings = {k: v for k, v in vars(arguments).items() if k != "child"}
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    path = pathlib.Path(__file__).with_name("results") / "certify_speed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=1) + "\n"
    )
    return int(any(r["ratio"] > GOAL for r in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2048, help="images (2048)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (5)")
    parser.add_argument("--depth", type=int, default=8, help="blocks (8)")
    parser.add_argument("--width", type=int, default=256, help="channels (256)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        a = arguments
        print(json.dumps(measure(a.samples, a.repeats, a.depth, a.width)))
    else:
        sys.exit(main(arguments))
