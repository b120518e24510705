"""What a LipNeXt block moves and takes: as its parts in order, and expanded as in training.

    KERAS_BACKEND=jax python benchmarks/block_forms.py

Forward and backward passes of 4 blocks of shift ratio 1/16, in turns: CPU seconds on a CPU, which
other processes disturb least, seconds on an accelerator, where activations are bfloat16. "passes"
are the bytes that XLA's compiled program reads and writes, and "kept" those of its temporaries,
over the bytes of one activation, for a block: what 4 blocks take more than 2, halved. On PyTorch,
which compiles nothing, only time. Not for TensorFlow. Writes results/block_forms_*.json.
"""

import statistics
import time

import keras
import measuring
import numpy as np

from keras_lipnext import backend
from keras_lipnext.layers import LipNeXtBlock

# Width, side of the square map, batch.
SHAPES = {True: ((128, 8, 128), (256, 8, 64), (512, 8, 64)), False: ((1024, 8, 512),)}
FORMS = {"parts": False, "expanded": True}


def program(training, depth, width, side, batch):
    """(a function without arguments that computes all gradients, bytes of a compiled program)."""
    keras.utils.set_random_seed(0)
    policy = "float32" if backend.on_cpu() else "mixed_bfloat16"
    blocks = [LipNeXtBlock(1 / 16, dtype=policy) for _ in range(depth)]
    x = np.random.default_rng(0).normal(size=(batch, side, side, width))
    x = keras.ops.convert_to_tensor(x, blocks[0].compute_dtype)
    for block in blocks:
        block.build(x.shape)
    values = [[v.value for v in block.trainable_variables] for block in blocks]

    def energy(values, x):
        for block, weights in zip(blocks, values):
            x, _ = block.stateless_call(weights, [], x, training=training)
        return keras.ops.sum(keras.ops.cast(x, "float32"))

    if keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(jax.grad(energy, (0, 1))).lower(values, x).compile()
        one = x.size * x.dtype.itemsize
        moved = compiled.cost_analysis()["bytes accessed"] / one
        kept = compiled.memory_analysis().temp_size_in_bytes / one
        return lambda: jax.block_until_ready(compiled(values, x)), {"passes": moved, "kept": kept}
    import torch

    leaves = [[v.detach().requires_grad_() for v in of] for of in values]
    x = x.detach().requires_grad_()
    flat = [v for of in leaves for v in of]

    def gradients():
        torch.autograd.grad(energy(leaves, x), [*flat, x])
        if not backend.on_cpu():
            torch.cuda.synchronize()

    return gradients, {}


def measure(shape, rounds):
    clock = time.process_time if backend.on_cpu() else time.perf_counter
    found, calls, seconds = {}, {}, {form: [] for form in FORMS}
    for form, training in FORMS.items():
        calls[form], four = program(training, 4, *shape)
        _, two = program(training, 2, *shape)
        found[form] = {key: round((four[key] - two[key]) / 2, 2) for key in four}
    for index in range(rounds):
        for form in list(FORMS)[:: -1 if index % 2 else 1]:
            start = clock()
            calls[form]()
            seconds[form].append(clock() - start)
    for form in FORMS:
        ratios = [a / b for a, b in zip(seconds[form][2:], seconds["parts"][2:])]
        found[form] |= {
            "milliseconds": round(1e3 * statistics.median(seconds[form][2:]) / 4, 2),
            "ratio": round(statistics.median(ratios), 3),
        }
    return dict(zip(("width", "side", "batch"), shape)) | found


def main():
    parser = measuring.parser(__doc__, backends=("own",))
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if keras.backend.backend() == "tensorflow":
        parser.error("on JAX and PyTorch only. Received: KERAS_BACKEND=tensorflow")
    rows = []
    for shape in SHAPES[backend.on_cpu()]:
        rows.append(measure(shape, arguments.rounds))
        print(rows[-1], flush=True)
    device = measuring.device().lower().replace(" ", "_")
    measuring.write(f"block_forms_{keras.backend.backend()}_{device}", {"rows": rows})


if __name__ == "__main__":
    main()
