"""Cost of `certify` against `model.predict` in float64: `python benchmarks/certify_speed.py`.

On each backend, in a process of its own: a LipNeXt on 32 x 32 x 3 images is certified on the same
samples that its copy of dtype float64 predicts, in turns, both warmed up. The proof of the
constants and compilation come once and are timed apart. The figure is the median of the ratios of
one `certify`, less its one-time part, to one `predict`. Prints a Markdown table and writes
results/certify_speed.json.
"""

import json
import statistics
import sys
import time

import measuring

GOAL = 2.5


def measure(samples, repeats, depth, width):
    import keras
    import numpy as np

    import keras_lipnext as lip
    from keras_lipnext import backend
    from keras_lipnext.certification.evaluation import Evaluation
    from keras_lipnext.lipschitz.model import lipschitz_bound, read

    shape = {"input_shape": (32, 32, 3), "num_classes": 10, "depth": depth, "width": width}
    shape |= {"patch_size": 4, "shift_ratio": 1 / 16, "neck": "pool"}
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
        evaluate = Evaluation(certifiable, 10)
        evaluate(x[:256], 256)
        set_up = time.perf_counter() - start

        def certify():
            start = time.perf_counter()
            parts = [evaluate(x[:256], 256)]
            evaluate.compare(model, x[:256], evaluate.own_answers(model, x[:256]))
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


def report(arguments, rows):
    measuring.write("certify_speed", {"settings": measuring.settings(arguments), "rows": rows})
    measuring.table(
        f"certify / predict, float64, {arguments.samples} samples",
        ["backend", "median ratio", "proof of K (s)", "set-up and compilation (s)"],
        [(r["backend"], r["ratio"], r["proof_seconds"], r["set_up_seconds"]) for r in rows],
    )
    return int(any(r["ratio"] > GOAL for r in rows))


if __name__ == "__main__":
    parser = measuring.parser(__doc__)
    parser.add_argument("--samples", type=int, default=2048, help="images (2048)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (5)")
    parser.add_argument("--depth", type=int, default=8, help="blocks (8)")
    parser.add_argument("--width", type=int, default=256, help="channels (256)")
    arguments = parser.parse_args()
    if arguments.child is not None:
        a = arguments
        print(json.dumps(measure(a.samples, a.repeats, a.depth, a.width)))
    else:
        rows = [measuring.child(__file__, backend=b)[0] for b in arguments.backends]
        sys.exit(report(arguments, rows))
