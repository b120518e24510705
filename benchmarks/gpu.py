"""Training steps on one accelerator, beside what the card can do: `python benchmarks/gpu.py`.

    python benchmarks/gpu.py --backends torch --cases "16 x 1024"
    python benchmarks/gpu.py --tests        # instead: which tests of the library fail on the card
    python benchmarks/gpu.py --backends jax --cases "16 x 1024" --profile   # kernels by time, too

First the card's own rates: products of 8192 x 8192 matrices, and of 32 pairs of 1024 x 1024 at
once, in bfloat16, in TF32 and in float32. Then, in mixed_bfloat16 on random images:

- step: a whole training step of `LipNeXt` as it comes compiled (ManifoldMuon, EMMA, metrics)
- forward + backward: the same without constraints, plain SGD; what is missing is the optimizer's
- for the first network also the paper's full mixing, and Keras' Adam without constraints

with images a second, the share of the card's bfloat16 rate (FLOPs by `LipNeXt.estimate`, without
the optimizer's), peak memory beside the estimate's, the first step's seconds, and, after 50 steps
and the projection that ends `fit`, the defect of the kernels and the proven constant K in front of
the head. Last the quickstart: its digits trained on the card, K and certified accuracy.

Each program has a process of its own, one after the other: compilation takes all cores, and XLA
tries its products on the card. Only the proof of a finished one's K goes on beside the next, whose
building and first step it may slow. Figures are printed as soon as they are known; writes
results/gpu_<card>.json.
"""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time

import measuring

BACKENDS = ("jax", "torch")
SMALL = {"input_shape": (32, 32, 3), "num_classes": 10, "patch_size": 4}
CASES = {
    "16 x 1024": (512, {"depth": 16, "width": 1024, "shift_ratio": 1 / 16, **SMALL}),
    "8 x 4096": (128, {"depth": 8, "width": 4096, "shift_ratio": 1 / 16}),
    "base": (256, {"size": "base"}),
    "large": (128, {"size": "large"}),
    "1b": (64, {"size": "1b"}),
    "trial": (8, {"depth": 2, "width": 64, "shift_ratio": 1 / 16, **SMALL}),  # for a CPU
}
VARIANTS = ("step", "forward + backward", "full mixing", "Adam")
STEPS, TIMED = 50, 20
ROOMS = ("manifolds", "optimizers", "layers", "losses", "models", "certification")
DTYPE = "mixed_bfloat16"


def synchronize():
    """Waits until PyTorch's device is done; JAX's arrays are waited for by `TrainingStep`."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def peak_bytes():
    """Most device memory in use so far, None where the framework keeps no account."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def rates(size, batch, width):
    """TFLOP/s of products, {precision: (size x size, `batch` of width x width)}."""
    import keras

    measure = _jax_product if keras.backend.backend() == "jax" else _torch_product
    return {
        precision: [measure(precision, *shape) for shape in ((1, size), (batch, width))]
        for precision in ("bfloat16", "tf32", "float32")
    }


def _jax_product(precision, batch, n):
    import jax
    import jax.numpy as jnp

    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    # The default of float32 on GPUs is TF32.
    setting = "highest" if precision == "float32" else "default"
    x = jax.random.normal(jax.random.key(0), (batch, n, n), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=setting))
    return _rate(lambda: product(x, x), jax.block_until_ready, batch, n)


def _torch_product(precision, batch, n):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    x = torch.randn(batch, n, n, dtype=dtype, device=device)
    return _rate(lambda: x @ x, lambda _: synchronize(), batch, n)


def _rate(product, wait, batch, n):
    for _ in range(3):
        wait(product())
    start = time.perf_counter()
    for _ in range(10):
        answer = product()
    wait(answer)
    return rounded(10 * 2 * batch * n**3 / (time.perf_counter() - start) / 1e12)


def rounded(value):
    """To three digits."""
    return float(f"{value:.3g}")


def kernel_times(step, count=3):
    """What `count` steps spend on the card, {kernel: milliseconds a step}, longest first."""
    import collections
    import tempfile

    import jax

    times = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(count):
                step()
            step.wait()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            lines = list(plane.lines) if plane.name.startswith("/device:GPU") else []
            streams = [line for line in lines if line.name.startswith("Stream")]
            for event in (event for line in streams or lines for event in line.events):
                operation = dict(event.stats).get("hlo_op", "")
                times[f"{operation} {event.name[:60]}"] += event.duration_ns / count / 1e6
    return {name: rounded(milliseconds) for name, milliseconds in times.most_common(40)}


def measure(case, variant, profile):
    """Prints rows, and "trained" when only the proof of K is left, which is the cores' work."""
    import keras
    import numpy as np
    from training_step import TrainingStep, unconstrained

    import keras_lipnext as lip

    batch, options = CASES[case]
    start = time.perf_counter()
    mixing = "full" if variant == "full mixing" else "reduced"
    model = lip.LipNeXt(**options, neck="pool", mixing=mixing, dtype=DTYPE)
    built = time.perf_counter() - start
    if variant in ("forward + backward", "Adam"):
        unconstrained(model)
        plain = keras.optimizers.Adam if variant == "Adam" else keras.optimizers.SGD
        model.compile(plain(1e-4), loss=model.loss, metrics=["accuracy"])
    rng = np.random.default_rng(0)
    x = rng.random((batch, *model.input_shape[1:]), "float32")
    labels = rng.integers(0, model.output_shape[-1], (4, batch))
    step = TrainingStep(model, x, labels, wait=False)
    start = time.perf_counter()
    step()
    step.wait()
    first = time.perf_counter() - start
    for _ in range(3):
        step()
    step.wait()
    start = time.perf_counter()
    for _ in range(TIMED):
        step()
    step.wait()
    seconds = (time.perf_counter() - start) / TIMED
    training = lip.LipNeXt.estimate(**options, neck="pool", batch=batch, dtype=DTYPE, mixing=mixing)
    row = {
        "case": case,
        "variant": variant,
        "backend": keras.backend.backend(),
        "batch": batch,
        "milliseconds": round(1e3 * seconds, 2),
        "images_a_second": round(batch / seconds),
        "tflops": rounded(batch * training.training_flops / seconds / 1e12),
        "first_step_seconds": round(first, 1),
        "build_seconds": round(built, 1),
        "peak_gb": peak_bytes() and rounded(peak_bytes() / 1e9),
        "estimated_gb": rounded(training.peak_bytes / 1e9),
    }
    print(json.dumps(row), flush=True)
    for _ in range(STEPS - TIMED - 4):
        step()
    weights = step.weights()
    if profile == "profile" and keras.backend.backend() == "jax":
        print(json.dumps({"case": case, "kernels": kernel_times(step), "of": variant}), flush=True)
    if variant != "step":
        return
    for variable, value in zip(model.trainable_variables, weights):
        variable.assign(value)
    kernels = [v for v in model.trainable_variables if v.constraint is not None]
    kernels = [v for v in kernels if isinstance(v.constraint, lip.manifolds.Stiefel)]
    drift = max(_defect(v) for v in kernels)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    row = {
        "case": case,
        "backend": keras.backend.backend(),
        "steps": STEPS,
        "defect": drift,
        "defect_at_the_end_of_fit": max(_defect(v) for v in kernels),
    }
    print("trained", flush=True)
    row["K_minus_1"] = lip.lipschitz_bound(model).body_constant - 1
    print(json.dumps(row), flush=True)


def _defect(kernel):
    """max |X^T X - I|, in float64 on the CPU."""
    import keras
    import numpy as np

    x = keras.ops.convert_to_numpy(kernel).astype("float64")
    x = x.T if x.shape[0] < x.shape[1] else x
    return float(np.abs(x.T @ x - np.eye(x.shape[1])).max())


def quickstart(epochs):
    """The quickstart's model and data; its figures on the images held out."""
    import keras

    sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
    from quickstart import EPSILONS, digits

    import keras_lipnext as lip

    keras.utils.set_random_seed(0)
    (x, y), test = digits()
    model = lip.LipNeXt("tiny", (8, 8, 1), 10, patch_size=2, neck="pool", epsilon=0.5 / 3)
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    certificate = lip.certify(model, *test, epsilons=EPSILONS, verbose=0).to_dict()
    bound = lip.lipschitz_bound(model)
    return {
        "case": "quickstart",
        "epochs": epochs,
        "backend": keras.backend.backend(),
        "K_minus_1": bound.body_constant - 1,
        "clean_accuracy": certificate["clean_accuracy"],
        "certified_accuracy": certificate["certified_accuracy"],
    }


def start(backend, *arguments):
    """A child process that answers in lines."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # one process may still hold what it trained
    }
    command = [sys.executable, "-W", "ignore", __file__, "--child", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def rows_of(process, until=None):
    """The JSON objects a child prints until it says so or ends, printed here too."""
    rows, reported = [], process.returncode is not None
    for line in process.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            print(line, end="", flush=True)
        elif line == f"{until}\n":
            return rows
    if process.wait() and not reported:
        print(f"failed: {process.args[4:]} (exit status {process.returncode})", flush=True)
    return rows


def shares(rows, case, bfloat16):
    """{case: share of the card's rate of forward + backward and of the step, optimizer's share}."""
    found = {r["variant"]: r for r in rows if r["case"] == case and "variant" in r}
    if not {"step", "forward + backward"} <= found.keys():
        return {}
    step, passes = found["step"], found["forward + backward"]
    answer = {
        "passes_share": round(passes["tflops"] / bfloat16, 3),
        "step_share": round(step["tflops"] / bfloat16, 3),
        "optimizer_share": round(1 - passes["milliseconds"] / step["milliseconds"], 3),
    }
    print(json.dumps({case: answer}), flush=True)
    return {case: answer}


def run_tests(backends, workers):
    """Lists the tests that fail on the card."""
    root = pathlib.Path(__file__).parent.parent
    for backend in backends:
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "OMP_NUM_THREADS": "1",
            "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # their programs run once
        }
        rooms = [f"tests/{room}" for room in ROOMS]
        options = ["-vv", "-n", str(workers), "--dist", "worksteal", "--tb=short"]
        options += ["-p", "no:benchmark", "-p", "no:cacheprovider"]
        options += ["--continue-on-collection-errors"]  # of tests that want TensorFlow, too
        command = [sys.executable, "-m", "pytest", *options, *rooms]
        print(f"== {backend}", flush=True)
        subprocess.run(command, cwd=root, env=environment, check=False)


def main(arguments):
    content = {}
    for backend in arguments.backends:
        (facts,) = rows_of(start(backend, "rates"))
        rows, known = [], {}
        content[backend] = {**facts, "rows": rows, "shares": known, "quickstart": []}
        name = f"gpu_{facts['card'].lower().replace(' ', '_')}"
        profile = "profile" if arguments.profile else "plain"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            rest = []
            for index, case in enumerate(arguments.cases):
                for variant in arguments.variants or VARIANTS[: 2 if index else 4]:
                    child = start(backend, "measure", case, variant, profile)
                    rows += rows_of(child, until="trained")
                    rest.append(pool.submit(rows_of, child))
                known |= shares(rows, case, facts["rates"]["bfloat16"][0])
                measuring.write(name, content)  # what is known, should the machine be taken away
            for answer in rest:
                rows += answer.result()
        if arguments.epochs:
            rows = rows_of(start(backend, "quickstart", arguments.epochs))
            content[backend]["quickstart"] += rows
            measuring.write(name, content)


def child(kind, *arguments):
    if kind == "measure":
        measure(*arguments)
    elif kind == "quickstart":
        print(json.dumps(quickstart(int(arguments[0]))), flush=True)
    else:
        card = measuring.device()
        size = (8192, 32, 1024) if card != "cpu" else (512, 4, 128)
        print(json.dumps({"card": card, "rates": rates(*size)}), flush=True)


if __name__ == "__main__":
    parser = measuring.parser(__doc__, BACKENDS)
    known = list(CASES)
    parser.add_argument("--cases", nargs="+", choices=known, default=known[:-1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="see above (all)")
    parser.add_argument("--epochs", type=int, default=40, help="of the quickstart (40), or 0")
    parser.add_argument("--profile", action="store_true", help="kernels by time, too (JAX)")
    parser.add_argument("--tests", action="store_true", help="run the tests on the card instead")
    parser.add_argument("--workers", type=int, default=8, help="processes of --tests (8)")
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
    elif arguments.tests:
        run_tests(arguments.backends, arguments.workers)
    else:
        main(arguments)
