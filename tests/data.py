"""Data and small models for tests, and processes with virtual devices."""

import functools
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np

import keras_lipnext as lip
from keras_lipnext import backend

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    from tensorflow.python.framework import ops

    # Each operation of a graph would keep the stack that made it, which under pytest is deep: a
    # sixth of the time. Without, as operations of a loaded graph are.
    ops._create_c_op = functools.partial(ops._create_c_op, extract_traceback=False)
    # Graphs that run a few times need no optimizing; alike in the processes that tests compare.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

if keras.backend.backend() == "jax":
    from jax._src.interpreters import mlir

    # JAX loads every dialect of MLIR anew for each program: as long as compiling a small one takes.
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def load_digits_split():
    from sklearn.datasets import load_digits  # which processes without the digits do not find

    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")
    order = np.random.default_rng(3).permutation(len(images))
    train, test = order[:1400], order[1400:]
    return (images[train], data.target[train]), (images[test], data.target[test])


def small_lipnext(**kwargs):
    arguments = {"input_shape": (8, 8, 1), "num_classes": 10, "depth": 2, "width": 16}
    arguments |= {"patch_size": 2, "shift_ratio": 1 / 8}
    if kwargs.get("output") != "dense":
        arguments["neck"] = "pool"
    return lip.LipNeXt(**(arguments | kwargs))


def to_numpy(x):
    """NumPy array of a tensor or variable, bfloat16 included."""
    return keras.ops.convert_to_numpy(backend.value(x))


def in_one_program(function):
    """On JAX a function of tensors as one program, instead of one for each of its operations."""
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)


def traced(function):
    """A function of tensors that is called often, as one program: on TensorFlow, too."""
    if keras.backend.backend() != "tensorflow":
        return in_one_program(function)
    return tf.function(function, autograph=False)


def stepping(optimizer, variables):
    """`apply(gradients)` of an optimizer that takes many steps, as one program."""
    optimizer.build(variables)
    if keras.backend.backend() != "jax":
        apply = traced(lambda gradients: optimizer.apply(gradients, variables))
        return lambda gradients: apply(list(map(keras.ops.convert_to_tensor, gradients)))
    state = [*optimizer.variables, *variables]

    @in_one_program
    def step(values, gradients):
        with keras.StatelessScope(state_mapping=list(zip(state, values))) as scope:
            optimizer.apply(gradients, variables)
        return [scope.get_current_value(variable) for variable in state]

    def apply(gradients):
        for variable, value in zip(state, step([v.value for v in state], gradients)):
            variable.assign(value)

    return apply


def called(function, *arrays):
    """What a layer or another function answers to arrays, in NumPy; one program on JAX."""
    return to_numpy(in_one_program(function)(*map(keras.ops.convert_to_tensor, arrays)))


def output_of(script, *arguments, **environment):
    """(stdout, stderr) of a script of the tests, run in a process with devices of its own."""
    tests = pathlib.Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(tests / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path]), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout, result.stderr


# Every device waits for the others in a thread of its own, from one pool for all programs: were it
# no larger than the number of devices, two programs in flight could hold it between them for ever
# (seen once, on two busy cores). So a large pool, and one program at a time.
def virtual_devices(count):
    """The environment in which JAX sees so many devices, on a CPU with fewer cores."""
    return {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={count} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        "PJRT_NPROC": "32",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
    }


def parallel(data, model):
    """`ModelParallel` of a LipNeXt on data x model devices."""
    mesh = keras.distribution.DeviceMesh((data, model), ["batch", "model"])
    layouts = lip.LipNeXt.get_layout_map(mesh)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def parts(variable):
    """In how many parts each axis of a variable lies on the devices."""
    value = variable.value
    return tuple(a // b for a, b in zip(value.shape, value.sharding.shard_shape(value.shape)))


def dense_model(features=6, classes=4):
    """A CertifiableModel on vectors, without a stem."""
    inputs = keras.Input((features,))
    x = lip.layers.BetaAbs(1.0)(lip.layers.OrthogonalDense(features)(inputs))
    x = lip.layers.OrthogonalDense(features)(x)
    return lip.CertifiableModel(inputs, lip.layers.NormalizedDense(classes)(x))


def saturating():
    """Its squares overflow at 1e155, and what follows makes a number of that again."""
    inputs = keras.Input((2,))
    x = lip.layers.L2Pool()(keras.layers.Reshape((2, 1))(inputs))
    for _ in range(7):
        x = keras.layers.Rescaling(2.0**-64)(x)
    return keras.Model(inputs, keras.ops.clip(x, 0.0, 1e26))
