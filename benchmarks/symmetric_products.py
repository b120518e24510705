"""Products whose result is symmetric, whole and in blocks of which three of four are computed.

    KERAS_BACKEND=jax python benchmarks/symmetric_products.py

M M^T of stacks of square matrices, as they come in a step of ManifoldMuon: in float32 on a CPU, in
bfloat16 with results in float32 on an accelerator. "rows" multiplies the halves of M by themselves
and by each other and joins the blocks; "stack" multiplies the three pairs as one stack. Measured in
turns, the fastest of seven rounds each; writes results/symmetric_products_<device>.json.
"""

import time

import jax
import jax.numpy as jnp
import measuring

SHAPES = {"gpu": ((8, 4096), (16, 1024)), "cpu": ((1, 1024), (4, 512), (16, 256))}


def product(a, b):
    return jnp.matmul(a, b.mT, preferred_element_type=jnp.float32)


def halves(m):
    half = m.shape[-2] // 2
    return m[..., :half, :], m[..., half:, :]


def joined(first, mixed, second):
    above = jnp.concatenate([first, mixed], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([mixed.mT, second], axis=-1)], axis=-2)


@jax.jit
def whole(m):
    return product(m, m)


@jax.jit
def rows(m):
    a, b = halves(m)
    return joined(product(a, a), product(a, b), product(b, b))


@jax.jit
def stack(m):
    a, b = halves(m)
    return joined(*product(jnp.stack([a, a, b]), jnp.stack([a, b, b])))


def main():
    device = jax.devices()[0]
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    found = []
    for batch, n in SHAPES[device.platform]:
        m = jax.random.normal(jax.random.key(0), (batch, n, n), dtype)
        functions = {"whole": whole, "rows": rows, "stack": stack}
        rounds = max(1, int(2e11 / (batch * n**3) * (1 if dtype == "float32" else 100) / 10))
        best = dict.fromkeys(functions, float("inf"))
        for _ in range(8):  # the first compiles
            for name, function in functions.items():
                start = time.perf_counter()
                for _ in range(rounds):
                    answer = function(m)
                answer.block_until_ready()
                best[name] = min(best[name], (time.perf_counter() - start) / rounds)
        row = {"batch": batch, "n": n, "dtype": dtype}
        found.append(row | {name: float(f"{1e3 * t:.3g}") for name, t in best.items()})
        print({"milliseconds": found[-1]}, flush=True)
    name = device.device_kind.lower().replace(" ", "_")
    measuring.write(f"symmetric_products_{name}", {"milliseconds": found})


if __name__ == "__main__":
    main()
