"""Ways to move an orthogonal matrix along a skew-symmetric direction: cost, accuracy, defect.

    KERAS_BACKEND=torch python benchmarks/retractions.py          (or jax, tensorflow)

Directions are those of Adam on noise: entries of standard deviation 0.23 lr. In results/
retractions_{backend}.json and a table, of each candidate and each rate:

- Cost: time of a step as a multiple of one product of two n x n matrices, interleaved medians; the
  projection of every eighth step counted where there is one.
- Error: ||X' - X exp(D)||_F / ||D||_F, with the exponential in float64.
- Defect: the largest entry of |X^T X - I| seen at the end of 10,000 float32 steps, at its own size.

Candidates: `exponential` (the library's FastExp, order from a spectral bound), `fast_exp_paper`
(LipNeXt's: order from the Frobenius norm, no projection), `taylor_2_newton_schulz` (both in each
step), `polar` (X + X D, projected), `cayley` (a linear solve), and `polynomial` (the library's
default: `rotate`, projected every eighth step). A step computes D from nothing: the product
X^T G that all of them need comes on top.
"""

import functools
import os

import keras
import measuring
import numpy as np
import scipy.linalg
from keras import ops
from paper_optimizer import fast_exp as paper_exp

from keras_lipnext import backend
from keras_lipnext.manifolds import fast_exp, newton_schulz, polar, rotate
from keras_lipnext.optimizers.manifold_optimizer import PROJECTION_PERIOD


def eye(x):
    return ops.eye(x.shape[-1], dtype=x.dtype)


def exponential(x, d):
    return x @ fast_exp(d)


def fast_exp_paper(x, d):
    return x @ paper_exp(d)


def taylor_2_newton_schulz(x, d):
    moved = x @ d
    return newton_schulz(x + moved + moved @ d / 2, 1)


def polar_retraction(x, d):
    return polar(x + x @ d)


def cayley(x, d):
    return x @ ops.solve(eye(d) - d / 2, eye(d) + d / 2)


POLYNOMIAL = functools.partial(rotate, period=PROJECTION_PERIOD)
PERIODIC = {"polynomial": POLYNOMIAL, "exponential": exponential, "cayley": cayley}
ALWAYS = {
    "fast_exp_paper": fast_exp_paper,
    "taylor_2_newton_schulz": taylor_2_newton_schulz,
    "polar": polar_retraction,
}
CANDIDATES = PERIODIC | ALWAYS


def direction(n, rate, seed=0):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return 0.23 * rate * (np.triu(a, 1) - np.triu(a, 1).T)


def compiled(function):
    """Compiled as the optimizers are: not at all on PyTorch."""
    if keras.backend.backend() == "jax":
        import jax

        jitted = jax.jit(function)
        return lambda *a: jax.block_until_ready(jitted(*a))
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


def costs(n, rate, rounds):
    """{candidate: time of a step over that of a product}."""
    x, d = (ops.convert_to_tensor(a.astype("float32")) for a in (np.eye(n), direction(n, rate)))
    calls = {"product": functools.partial(compiled(ops.matmul), x, d)}
    calls["projection"] = functools.partial(compiled(polar), x)
    for name, candidate in CANDIDATES.items():
        calls[name] = functools.partial(compiled(candidate), x, d)
    timings = measuring.interleaved(calls, rounds, 60)
    found = {name: timings.ratio(name, "product")["median"] for name in calls}
    for name in PERIODIC:
        found[name] += found["projection"] / PROJECTION_PERIOD
    return {name: round(found[name], 2) for name in ("projection", *CANDIDATES)}


def error(candidate, n, rate):
    d = direction(n, rate)
    with backend.float64_scope():
        moved = candidate(*(ops.convert_to_tensor(a) for a in (np.eye(n), d)))
        moved = ops.convert_to_numpy(moved)
    return float(np.linalg.norm(moved - scipy.linalg.expm(d)) / np.linalg.norm(d))


def defect(name, n, rate, steps):
    step = compiled(CANDIDATES[name])
    project = compiled(polar)
    x = ops.eye(n, dtype="float32")
    directions = [
        ops.convert_to_tensor(direction(n, rate, seed).astype("float32")) for seed in range(50)
    ]
    for index in range(steps):
        if name in PERIODIC and index % PROJECTION_PERIOD == 0:
            x = project(x)
        x = step(x, directions[index % len(directions)])
    x = ops.convert_to_numpy(x).astype("float64")
    return float(np.abs(x.T @ x - np.eye(n)).max())


def main():
    parser = measuring.parser(__doc__, backends=("own",))
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--defect-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10000)
    arguments = parser.parse_args()
    results = []
    with backend.inference_scope():
        for rate in arguments.rates:
            by_size = {n: costs(n, rate, arguments.rounds) for n in arguments.sizes}
            for name, candidate in CANDIDATES.items():
                results.append(
                    {
                        "candidate": name,
                        "rate": rate,
                        "products": {n: found[name] for n, found in by_size.items()},
                        "error": error(candidate, arguments.defect_size, rate),
                        "defect": defect(name, arguments.defect_size, rate, arguments.steps),
                    }
                )
                print(results[-1], flush=True)
    rows = [
        [
            f"{r['candidate']}, lr {r['rate']:g}",
            *r["products"].values(),
            f"{r['error']:.1e}",
            f"{r['defect']:.1e}",
        ]
        for r in results
    ]
    name = keras.backend.backend()
    header = ["candidate", *(f"n = {n}" for n in arguments.sizes), "error", "defect"]
    measuring.table(f"Products a step on {name}", header, rows)
    settings = measuring.settings(arguments)
    measuring.write(f"retractions_{name}", {"settings": settings, "results": results})


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
