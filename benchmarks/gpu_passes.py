"""Bytes that a LipNeXt block moves on an H200, counted in what XLA compiles for one; without one.

    python -m venv cuda && cuda/bin/pip install "jax[cuda12]" keras threadpoolctl
    KERAS_BACKEND=jax PYTHONPATH=. cuda/bin/python benchmarks/gpu_passes.py
    KERAS_BACKEND=jax PYTHONPATH=OTHER cuda/bin/python benchmarks/gpu_passes.py --name COMMIT

Forward and backward passes in bfloat16 and in float32. What each kernel reads and writes is summed,
apart for products (cuBLAS) and for all others, and given in passes, over the bytes of one
activation, for a block: what 4 blocks move more than 2, halved. "parts" are a block's parts in
order, "expanded" the block as training computes it. Nothing is tuned without a card, and products
are all left to cuBLAS, which takes nearly all of them on a card. Writes results/gpu_passes.json,
figures of other names stay.

With `--memory CASE ...`, cases of benchmarks/gpu.py, instead the bytes that XLA plans for a whole
training step: weights, state and batch, and temporaries, beside `LipNeXt.estimate`.
"""

import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false")

import gpu
import jax
import keras
import measuring
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from training_step import state_on_jax

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.backend import precision
from keras_lipnext.layers import LipNeXtBlock

# What XLA has to know of an H200 (SXM, 141 GB); XLA's GpuTargetConfigProto.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 151397597184
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "sm_9.0"
"""
SHAPES = ((1024, 8, 512), (4096, 14, 128))  # width, side of the square map, batch
DTYPES = ("mixed_bfloat16", "float32")
FORMS = {"parts": False, "expanded": True}
BYTES = {"bf16": 2, "f32": 4, "pred": 1, "s32": 4}
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)")
FREE = ("parameter", "bitcast", "get-tuple-element", "tuple", "constant")


@functools.cache
def card():
    """The sharding of a program for one H200."""
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x1", target_config=H200
    )
    return SingleDeviceSharding(described.devices[0])


def size(shapes):
    """Bytes of arrays as HLO writes them, e.g. "bf16[8,4]{1,0}"; work space, in s8, left out."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    sizes = (
        BYTES[d] * math.prod(map(int, filter(None, n.split(",")))) for d, n in found if d != "s8"
    )
    return sum(sizes)


def computations(text):
    """{name: its instructions (name, shape, kind, operands, the rest of the line)}."""
    found = {}
    for name, body in re.findall(r"\n(?:ENTRY )?%(\S+) [^\n]*\{\n(.*?)\n\}", text, re.DOTALL):
        lines = (INSTRUCTION.match(line) for line in body.splitlines())
        found[name] = [
            (name, shape, kind, re.findall(r"%([\w.-]+)", operands), operands + rest)
            for name, shape, kind, operands, rest in (line.groups() for line in lines if line)
        ]
    return found


def sizes_read(fused, count):
    """What a fusion reads of each operand where that is less than all: only slices of it."""
    sizes = {}
    for name, _, kind, _, rest in fused:
        users = [(k, shape) for _, shape, k, operands, _ in fused if name in operands]
        if kind == "parameter" and users and all("slice" in k for k, _ in users):
            sizes[int(re.match(r"\d+", rest)[0])] = sum(size(shape) for _, shape in users)
    return [sizes.get(index, math.inf) for index in range(count)]


def moved(program):
    """Bytes that the kernels of a compiled program read and write: {"products", "others"}."""
    text = program.as_text()
    parts, shapes, found = computations(text), {}, {"products": 0, "others": 0}
    for name, shape, kind, operands, rest in parts[re.search(r"ENTRY %(\S+)", text)[1]]:
        shapes[name] = shape
        if kind in FREE:
            continue
        operands = [operand for operand in operands if operand in shapes]
        most = [math.inf] * len(operands)
        if fusion := re.search(r"calls=%([\w.-]+)", rest):
            most = sizes_read(parts[fusion[1]], len(operands))
        read = sum(min(size(shapes[x]), limit) for x, limit in zip(operands, most))
        found["products" if kind == "custom-call" else "others"] += size(shape) + read
    return found


def compiled(training, depth, policy, width, side, batch):
    """Gradients of a chain of blocks with respect to weights and inputs."""
    blocks = [LipNeXtBlock(1 / 16, dtype=policy) for _ in range(depth)]
    shape = (batch, side, side, width)
    for block in blocks:
        block.build(shape)
    values = [
        [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in b.trainable_variables] for b in blocks
    ]

    def energy(values, x):
        for block, weights in zip(blocks, values):
            x, _ = block.stateless_call(weights, [], x, training=training)
        return keras.ops.sum(keras.ops.square(keras.ops.cast(x, "float32")))

    x = jax.ShapeDtypeStruct(shape, blocks[0].compute_dtype)
    return (
        jax.jit(jax.grad(energy, (0, 1)), in_shardings=card(), out_shardings=card())
        .lower(values, x)
        .compile()
    )


def planned(case):
    """Gigabytes of a training step of benchmarks/gpu.py, as its "step"."""
    batch, options = gpu.CASES[case]
    model = lip.LipNeXt(**options, neck="pool", dtype=gpu.DTYPE)
    model.optimizer.build(model.trainable_variables)
    shape = model.input_shape[1:]
    parts = state_on_jax(model, np.zeros((1, *shape), "float32"), np.zeros(1, "int32"))
    state = [[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in part] for part in parts]
    data = [
        jax.ShapeDtypeStruct((batch, *shape), "float32"),
        jax.ShapeDtypeStruct((batch,), "int64"),
    ]
    for module in (precision, backend):  # from here on the way of accelerators is taken
        module.on_cpu = lambda: False
    jitted = jax.jit(model.train_step, donate_argnums=0, in_shardings=card(), out_shardings=card())
    plan = jitted.lower(tuple(state), tuple(data)).compile().memory_analysis()
    total = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    total += plan.output_size_in_bytes - plan.alias_size_in_bytes
    estimate = lip.LipNeXt.estimate(**options, neck="pool", batch=batch, dtype=gpu.DTYPE)
    return {
        "case": case,
        "batch": batch,
        "planned_gb": round(total / 1e9, 2),
        "estimated_gb": round(estimate.peak_bytes / 1e9, 2),
    }


def main():
    parser = measuring.parser(__doc__, backends=("own",))
    parser.add_argument("--memory", nargs="+", choices=gpu.CASES, metavar="CASE")
    parser.add_argument("--name", default="now", help='of the package\'s version ("now")')
    arguments = parser.parse_args()
    path = measuring.RESULTS / "gpu_passes.json"
    known = json.loads(path.read_text()) if path.exists() else {"passes": {}, "memory": []}
    known.pop("machine", None)
    if arguments.memory:
        # Each in a process of its own: that a card is there stays pretended.
        spawning = multiprocessing.get_context("spawn")
        for case in arguments.memory:
            with concurrent.futures.ProcessPoolExecutor(1, spawning) as pool:
                row = pool.submit(planned, case).result()
            print(json.dumps(row), flush=True)
            known["memory"] = [of for of in known["memory"] if of["case"] != case] + [row]
            measuring.write("gpu_passes", known)
        return
    rows = []
    for width, side, batch in SHAPES:
        for policy in DTYPES:
            row = {"width": width, "side": side, "batch": batch, "dtype": policy}
            one = batch * side**2 * width * (4 if policy == "float32" else 2)
            for form, training in FORMS.items():
                two, four = (
                    moved(compiled(training, depth, policy, width, side, batch)) for depth in (2, 4)
                )
                row[form] = {key: round((four[key] - two[key]) / 2 / one, 2) for key in four}
            rows.append(row)
            print(json.dumps(row), flush=True)
    known["passes"][arguments.name] = rows
    measuring.write("gpu_passes", known)


if __name__ == "__main__":
    main()
