"""Many devices: how a LipNeXt's variables are laid out on them, and what must hold before.

`keras.distribution` is the engine: `DataParallel` repeats the model on each device, `ModelParallel`
splits its matrices by a layout map. It does something on JAX only.

Activations of shape (batch, height, width, channels) lie along the model's axis of the mesh by
their channels. `mine` being the channels of a device, it computes

    stem     patches @ kernel[:, mine]
    mixing   sum over devices of x[mine] @ kernel[mine], the few channels to shift, and from these
             x[mine] + changes @ kernel[mine]^T
    dense    x @ kernel[:, mine], x gathered from all devices
    head     sum over devices of x[mine] @ kernel[mine], the logits.
"""

import keras

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


def lipnext_layout_map(
    device_mesh, model_parallel_dim_name="model", data_parallel_dim_name="batch"
):
    """How `keras.distribution.ModelParallel` splits a LipNeXt's matrices. JAX only.

    Each matrix, and the optimizer's moments with it, lies in equal parts on the devices along
    the model's axis of the mesh, and is repeated along the data's. `width` must be a multiple
    of the number of parts.

    Example:

    ```python
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
        ValueError: if the mesh has no such axes.
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
    layouts = keras.distribution.LayoutMap(device_mesh)
    layouts["patch_embedding/kernel"] = (None, model)
    layouts[r"block_\d+/positional_bias/bias"] = (None, None, None)
    layouts[r"block_\d+/mixing/kernel"] = (model, None)
    layouts[r"block_\d+/dense/kernel"] = (None, model)
    layouts[r"block_\d+/dense/bias"] = (model,)
    layouts["head/kernel"] = (model, None)
    return layouts
