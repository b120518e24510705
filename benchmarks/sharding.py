"""Memory a device needs to train one LipNeXt on 1 to 8 devices: `python benchmarks/sharding.py`.

    python benchmarks/sharding.py --width 64 --depth 4 --meshes 1x1 1x8     # quick

A fixed model and batch under `keras.distribution.ModelParallel` with `LipNeXt.get_layout_map`, on
virtual CPU devices, a process for each mesh of DATA x MODEL devices. Writes results/sharding.json.
What is shown is XLA's own account of the compiled training step (`memory_analysis`), which is one
device's: what the step is given (weights, moments, its part of the batch), and the room for
temporaries, of which the optimizer's alone is shown too, from compiling its step apart. Buffers
that are not alive at once share room. The batch is small, so that weights, not activations, decide:
of those each device keeps whole the ones that its matrices multiply (split batches by a data axis
of the mesh for that).

The optimizer's temporaries are a few times what it steps at once: per device one matrix, or a stack
of up to 2^20 entries, four of the default model's. One device steps its eight in two goes, two do
in one: from one to two they fall by less than half.

Not shown: an accelerator's figures, whose compiler fuses otherwise; speed, which virtual devices on
the same cores say nothing about.
"""

import json
import os
import sys

import measuring

os.environ["KERAS_BACKEND"] = "jax"


def bytes_of(function, *arguments, **options):
    import jax

    analysis = jax.jit(function, **options).lower(*arguments).compile().memory_analysis()
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


def measure(arguments, data, parts):
    import jax
    import keras
    import numpy as np

    import keras_lipnext as lip

    assert len(jax.devices()) == data * parts
    mesh = keras.distribution.DeviceMesh((data, parts), ["batch", "model"])
    layouts = lip.LipNeXt.get_layout_map(mesh)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    model = lip.LipNeXt(
        depth=arguments.depth,
        width=arguments.width,
        shift_ratio=1 / 16,
        input_shape=(8, 8, 3),
        patch_size=4,
        neck="pool",
        num_classes=10,
    )
    x = np.zeros((arguments.batch, 8, 8, 3), "float32")
    y = np.zeros(arguments.batch, "int32")
    model._symbolic_build(data_batch=(x, y))  # optimizer and metrics; nothing is computed
    weights, state, optimizer_state, metrics = (
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )
    whole = (weights, state, optimizer_state, metrics)
    given, temporary = bytes_of(
        model.train_step,
        whole,
        (x, y),
        donate_argnums=0,
        out_shardings=(None, jax.tree.map(lambda a: a.sharding, whole)),
    )
    step = (weights, optimizer_state)
    _, optimizers = bytes_of(
        model.optimizer.stateless_apply,
        optimizer_state,
        weights,
        weights,
        out_shardings=jax.tree.map(lambda a: a.sharding, step),
    )
    return {
        "mesh": [data, parts],
        "given_bytes": given,
        "temporary_bytes": temporary,
        "optimizer_temporary_bytes": optimizers,
    }


def report(arguments, rows):
    measuring.write("sharding", {"settings": measuring.settings(arguments), "rows": rows})
    keys = ("given_bytes", "temporary_bytes", "optimizer_temporary_bytes")
    total = [r["given_bytes"] + r["temporary_bytes"] for r in rows]
    measuring.table(
        f"memory of one device (MiB), depth {arguments.depth}, width {arguments.width}, batch "
        f"{arguments.batch}",
        [
            "data x model devices",
            "weights and moments",
            "temporaries",
            "optimizer's alone",
            "peak",
            "of one's",
        ],
        [
            (
                "{} x {}".format(*r["mesh"]),
                *(f"{r[key] / 2**20:.2f}" for key in keys),
                f"{peak / 2**20:.2f}",
                f"{peak / total[0]:.3f}",
            )
            for r, peak in zip(rows, total)
        ],
    )


if __name__ == "__main__":
    parser = measuring.parser(__doc__, backends=("jax",))
    parser.add_argument("--depth", type=int, default=8, help="blocks (8)")
    parser.add_argument("--width", type=int, default=512, help="channels (512)")
    parser.add_argument("--batch", type=int, default=8, help="images (8)")
    meshes = ["1x1", "1x2", "1x4", "1x8", "2x4"]
    parser.add_argument("--meshes", nargs="+", default=meshes, help="DATAxMODEL devices, one first")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments, *map(int, arguments.child))))
        sys.exit()
    found = []
    # One pool of threads for all devices, and one program at a time: see tests/data.py.
    os.environ |= {"PJRT_NPROC": "32", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}
    for mesh in arguments.meshes:
        data, parts = map(int, mesh.split("x"))
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={data * parts}"
        found += measuring.child(__file__, data, parts)
    report(arguments, found)
