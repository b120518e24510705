"""Formulations of the shift in ShiftMixing: `KERAS_BACKEND=jax python benchmarks/shifts.py`.

Every candidate computes x + (S - I)(x K) K^T and its gradients for x and K, compiled as the
backend trains: jit on JAX, tf.function on TensorFlow, eager on PyTorch. They take turns in one
process, on one thread; each round gives a candidate's time over that of the two products without
any shift, `floor`, and the medians of these ratios count. Time is the process' CPU time, which
other processes on the machine disturb least, and the wall clock on an accelerator. Prints a
Markdown table and writes results/shifts_{backend}.json.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import keras
import numpy as np
from keras import ops
from shift_formulations import STEPS

from keras_lipnext import backend

WIDTHS, RATIOS, PADDINGS = (512, 1024), (1 / 8, 1 / 16), ("circular", "zero")


def trained(step, padding, slope):
    """(x, K) -> (outputs, gradients for x and K), as the backend runs a training step."""
    name = keras.backend.backend()
    if name == "jax":
        import jax

        def both(x, kernel):
            outputs, pullback = jax.vjp(lambda a, b: step(a, b, padding), x, kernel)
            return outputs, *pullback(slope)

        compiled = jax.jit(both)
        return lambda x, kernel: jax.block_until_ready(compiled(x, kernel))
    if name == "tensorflow":
        import tensorflow as tf

        @tf.function
        def both(x, kernel):
            with tf.GradientTape() as tape:
                tape.watch((x, kernel))
                outputs = step(x, kernel, padding)
            return outputs, *tape.gradient(outputs, (x, kernel), slope)

        def run(x, kernel):
            results = both(x, kernel)
            float(results[0][0, 0, 0, 0])  # waits for an accelerator
            return results

        return run
    import torch

    def both(x, kernel):
        x, kernel = (t.detach().requires_grad_() for t in (x, kernel))
        outputs = step(x, kernel, padding)
        results = outputs.detach(), *torch.autograd.grad(outputs, (x, kernel), slope)
        if not backend.on_cpu():
            torch.cuda.synchronize()
        return results

    return both


def measure(width, ratio, padding, arguments):
    """{candidate: median of its time over the floor's}, and the floor's seconds."""
    rng = np.random.default_rng(0)
    shape = (arguments.batch, arguments.side, arguments.side, width)
    kernel, _ = np.linalg.qr(rng.normal(size=(width, round(4 * ratio * width))))
    x, kernel, slope = (
        ops.convert_to_tensor(a.astype("float32"))
        for a in (rng.normal(size=shape), kernel, rng.normal(size=shape))
    )
    steps = {name: trained(step, padding, slope) for name, step in STEPS.items()}
    expected = [ops.convert_to_numpy(a) for a in steps["library"](x, kernel)]
    for name, run in steps.items():
        for _ in range(3):
            results = run(x, kernel)
        if name != "floor":
            for result, right in zip(results, expected, strict=True):
                np.testing.assert_allclose(
                    ops.convert_to_numpy(result), right, atol=1e-2, err_msg=name
                )
    clock = time.process_time if backend.on_cpu() else time.perf_counter
    times = {name: [] for name in steps}
    names = list(steps)
    for _ in range(arguments.repeats):
        for i in rng.permutation(len(names)):  # so that none always follows the same one
            start = clock()
            steps[names[i]](x, kernel)
            times[names[i]].append(clock() - start)
    ratios = {
        name: round(statistics.median(t / f for t, f in zip(times[name], times["floor"])), 3)
        for name in names
    }
    seconds = round(statistics.median(times["floor"]), 4)
    return {"width": width, "ratio": ratio, "padding": padding, "floor_s": seconds, **ratios}


def main(arguments):
    name = keras.backend.backend()
    if name == "torch":
        import torch

        torch.set_num_threads(1)
    elif name == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.get_logger().setLevel("ERROR")  # each candidate is traced once, on purpose
    rows = []
    for width in WIDTHS:
        for ratio in RATIOS:
            for padding in PADDINGS:
                rows.append(measure(width, ratio, padding, arguments))
                print(rows[-1], file=sys.stderr, flush=True)

    tokens = f"{arguments.batch} x {arguments.side} x {arguments.side}"
    print(f"\n{name}, {tokens} tokens, float32: time / time of the two products alone\n")
    columns = [f"{r['width']}, 1/{round(1 / r['ratio'])}, {r['padding']}" for r in rows]
    print("| | " + " | ".join(columns) + " | median |")
    print("| --- |" + " ---: |" * (len(rows) + 1))
    for step in STEPS:
        values = [r[step] for r in rows]
        middle = round(statistics.median(values), 3)
        print(f"| {step} | " + " | ".join(map(str, [*values, middle])) + " |")

    device = "cpu" if backend.on_cpu() else "accelerator"
    module = sys.modules[name]
    machine = {
        "device": device,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "keras": keras.__version__,
        name: module.__version__,
    }
    path = pathlib.Path(__file__).with_name("results") / f"shifts_{name}.json"
    path.parent.mkdir(exist_ok=True)
    answer = {"settings": vars(arguments), "machine": machine, "rows": rows}
    path.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64, help="images (64)")
    parser.add_argument("--side", type=int, default=8, help="height and width (8)")
    parser.add_argument("--repeats", type=int, default=11, help="rounds (11)")
    main(parser.parse_args())
