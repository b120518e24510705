"""Many devices: how a LipNeXt's variables are laid out on them, and what must hold before.

`keras.distribution` is the engine: `DataParallel` repeats the model on each device, `ModelParallel`
splits its matrices by a layout map. It does something on JAX only.

Activations of shape (batch, height, width, channels), or of series or volumes, lie along the
model's axis of the mesh by their channels. `mine` being the channels of a device, it computes

    stem     patches @ kernel[:, mine]
    mixing   sum over devices of x[mine] @ kernel[mine], the few channels to shift, and from these
             x[mine] + changes @ kernel[mine]^T
    dense    x @ kernel[:, mine], x gathered from all devices; so do the neck's layers
    head     sum over devices of x[mine] @ kernel[mine], the logits.
"""

import math

import keras

from keras_lipnext import backend

INSTEAD = {
    "tensorflow": "Build, compile and fit the model in `tf.distribute.MirroredStrategy().scope()`.",
    "torch": (
        "Train with `torch.nn.parallel.DistributedDataParallel`, one process a device: see "
        "examples/torch_ddp.py."
    ),
}


def check_backend():
    """Raises where `keras.distribution` would be ignored: on any backend but JAX."""
    backend = keras.backend.backend()
    if backend != "jax":
        raise RuntimeError(
            f"keras.distribution does nothing on the {backend} backend: training would run on one "
            f"device without a word. {INSTEAD[backend]} Or choose KERAS_BACKEND=jax."
        )


def check_distribution(shapes=None):
    """Raises if the current `keras.distribution` cannot be had; does nothing if there is none.

    Args:
        shapes: {path: shape} of variables that are about to be made.

    Raises:
        RuntimeError: on another backend than JAX.
        ValueError: if a variable's layout splits an axis into parts that are not equal.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    check_backend()
    mesh = distribution.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape))
    for path, shape in (shapes or {}).items():
        layout = distribution.get_tensor_layout(path)
        for size, name in zip(shape, layout.axes if layout else ()):
            if name is not None and size % sizes[name]:
                raise ValueError(
                    f"{size} channels cannot be split evenly over {sizes[name]} devices. Choose a "
                    f"multiple of {sizes[name]}, or fewer devices along '{name}'. Received: "
                    f"variable {path} of shape {tuple(shape)}, laid out as {layout.axes} on a mesh "
                    f"of {sizes}"
                )


def parts_of_a_batch():
    """In how many equal parts the current distribution splits this process's batches: 1 if none."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    check_backend()
    mesh = distribution.device_mesh
    replicas = mesh.shape[list(mesh.axis_names).index(distribution.batch_dim_name)]
    return max(1, replicas // backend.processes())


def check_batches(x, batch_size=None, steps=None):
    """Raises if not every batch of an array can be split evenly over the devices.

    JAX raises, too, but in the middle of the work, and where that is `evaluate` or `predict` Keras
    then leaves a model without weights. How large the batches of a data set are shows only then.

    Args:
        x: What `fit`, `evaluate` and `predict` take.
        batch_size: Samples a batch; None is Keras' 32.
        steps: Number of batches that are taken; None takes all samples.

    Raises:
        RuntimeError: on another backend than JAX, under a distribution.
        ValueError: if a batch does not divide.
    """
    parts = parts_of_a_batch()
    samples = None if parts == 1 else _samples(x)
    if samples is None:
        return
    batch_size = batch_size or 32
    taken = samples if steps is None else min(samples, steps * batch_size)
    for size in (min(taken, batch_size), taken % batch_size):
        if size % parts:
            raise ValueError(
                f"A batch of {size} samples cannot be split evenly over {parts} devices. Choose a "
                f"batch size that is a multiple of {parts}, and leave samples out at the end, or "
                f"repeat some, until their number is a multiple of {parts}, too. Received: "
                f"{samples} samples in batches of {batch_size}"
            )


def check_fit(
    x=None,
    batch_size=None,
    epochs=1,
    validation_split=0.0,
    validation_data=None,
    steps_per_epoch=None,
    validation_steps=None,
    validation_batch_size=None,
    **others,
):
    """`check_batches` of what `fit` is given: training and validation data."""
    if parts_of_a_batch() == 1:
        return
    samples = _samples(x)
    if samples is not None and validation_split:
        x = range(math.floor(samples * (1 - validation_split)))
        validation_data = (range(samples - len(x)),)
    check_batches(x, batch_size, steps_per_epoch and steps_per_epoch * epochs)
    if isinstance(validation_data, (tuple, list)):
        batch_size = validation_batch_size or batch_size
        check_batches(validation_data[0], batch_size, validation_steps)


def _samples(x):
    """Number of samples of an array, or of a structure of arrays; None for anything else."""
    if isinstance(x, range):
        return len(x)
    first = next(iter(keras.tree.flatten(x)), None)
    return first.shape[0] if getattr(first, "shape", None) else None


def check_one_process(model):
    """Raises if a model's weights lie, in parts or copies, on devices of several processes."""
    for variable in model.weights:
        if not getattr(variable.value, "is_fully_addressable", True):
            raise RuntimeError(
                f"The weights of model '{model.name}' lie on devices of several processes, and one "
                "process cannot certify them. Give them to a model that one process makes after "
                "keras.distribution.set_distribution(None), by get_weights and set_weights as in "
                "examples/multi_host.py, or by a checkpoint where no process holds them all. "
                f"Received: {variable.path} laid out as {variable.value.sharding}"
            )


def lipnext_layout_map(
    device_mesh: keras.distribution.DeviceMesh,
    model_parallel_dim_name: str = "model",
    data_parallel_dim_name: str = "batch",
) -> keras.distribution.LayoutMap:
    """How `keras.distribution.ModelParallel` splits a LipNeXt's matrices. JAX only.

    Each matrix, and the optimizer's moments with it, lies in equal parts on the devices along
    the model's axis of the mesh, and is repeated along the data's; what has no layout is on each
    device. `width`, a neck's `neck_width` and with output="dense" its number of units, must be
    multiples of the number of parts.

    Example:

    ```python title="Not run: needs eight devices of JAX"
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"])
    layout_map = keras_lipnext.LipNeXt.get_layout_map(mesh)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
    )
    model = keras_lipnext.LipNeXt(size="1b")
    ```

    Args:
        device_mesh: `keras.distribution.DeviceMesh`.
        model_parallel_dim_name: The mesh's axis that matrices are split along.
        data_parallel_dim_name: The mesh's axis that batches are split along.

    Returns:
        `keras.distribution.LayoutMap`.

    Raises:
        RuntimeError: on another backend than JAX, where Keras would ignore it.
        ValueError: if the mesh has no such axes, or they are the same.
    """
    check_backend()
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            "`device_mesh` must be a keras.distribution.DeviceMesh. Received: "
            f"device_mesh={device_mesh!r}"
        )
    model = model_parallel_dim_name
    for name in (model, data_parallel_dim_name):
        if name not in device_mesh.axis_names:
            raise ValueError(
                f"The mesh has no axis '{name}'. Received: axis_names={device_mesh.axis_names}. "
                "Make it with DeviceMesh((data, model), ['batch', 'model']), or say what its axes "
                "are called."
            )
    if model == data_parallel_dim_name:
        raise ValueError(
            "Matrices and batches are split along different axes. Received: "
            f"model_parallel_dim_name=data_parallel_dim_name={model!r}"
        )
    layouts = keras.distribution.LayoutMap(device_mesh)
    layouts["patch_embedding/kernel"] = (None, model)
    layouts[r"block_\d+/mixing/kernel"] = (model, None)
    layouts[r"block_\d+/dense/kernel"] = (None, model)
    layouts[r"block_\d+/dense/bias"] = (model,)
    layouts[r"(neck|dense_\d+)/kernel"] = (None, model)
    layouts[r"(neck|dense_\d+)/bias"] = (model,)
    layouts["head/kernel"] = (model, None)
    return layouts
