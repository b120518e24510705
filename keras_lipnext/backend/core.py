"""Values, gradients off and of inputs, stacks: each written three times."""

import contextlib

import keras
import numpy as np

from keras_lipnext.backend import keras_private
from keras_lipnext.backend.sharding import collected, dealt


def processes():
    """Number of processes that compute together by `keras.distribution.initialize`."""
    if keras.backend.backend() != "jax":
        return 1
    import jax

    return jax.process_count()


def of_this_process(x):
    """What this process holds of an array that lies on several processes' devices, in any order.

    Entries that are held twice come twice; anything else than such a JAX array comes as it is.
    """
    if getattr(x, "is_fully_addressable", True):
        return x
    return np.concatenate([np.asarray(shard.data) for shard in x.addressable_shards])


def inference_scope():
    """Context in which PyTorch records no gradients; a no-op on JAX and TensorFlow."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def value(variable):
    """The current value of a Keras variable, or of the raw `tf.Variable` an optimizer is handed.

    `keras.ops.convert_to_tensor` passes a `tf.Variable` through as it is. The sparse gradients of
    embeddings on TensorFlow become dense. Anything else is returned unchanged.
    """
    if isinstance(variable, keras.Variable):
        variable = variable.value
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if isinstance(variable, (tf.Variable, tf.IndexedSlices)):
            return tf.convert_to_tensor(variable)
    return variable


def has_value(variable):
    """Whether a Keras variable can be read here; True for tensors.

    While a step runs on JAX a variable has a value only inside the scope that was given one: Keras
    reads all others as their initializer's draw, without a word.
    """
    if not isinstance(variable, keras.Variable):
        return True
    held = (keras_private.held_value(variable), keras_private.scope_value(variable))
    return any(value is not None for value in held)


def stacked(values, sharding=None):
    """Variables or tensors of one shape and dtype as one tensor, shape (len(values), ...).

    With the sharding of a variable its members are `sharding.dealt` out to the devices. On
    PyTorch in one call: `keras.ops.stack` and `Variable.value` look at each of them at length,
    which for hundreds of variables takes longer than a small network's training step.
    """
    if keras.backend.backend() == "torch" and not keras_private.in_scope():
        import torch

        values = [
            keras_private.held_value(v) if isinstance(v, keras.Variable) else v for v in values
        ]
        return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)
    values = [value(v) for v in values]
    if sharding is not None:
        return dealt(values, sharding)
    if len(values) == 1:
        return keras.ops.expand_dims(values[0], 0)
    return keras.ops.stack(values)


def assign_stacked(optimizer, variables, values, sharding=None):
    """Assigns the members of a stack to variables; see `stacked`."""
    if keras.backend.backend() == "torch" and not keras_private.in_scope():
        import torch

        torch._foreach_copy_(list(map(keras_private.held_value, variables)), values.unbind())
        return
    if sharding is not None:
        members = collected(values, sharding, len(variables))
    else:
        members = keras.ops.unstack(values, len(variables))
    for variable, member in zip(variables, members):
        optimizer.assign(variable, member)


def check_each(x, known, message):
    """`x`, which a program of TensorFlow has only where `known`, of its shape, holds throughout.

    Else an error that says the message and the first values that are not known. XLA leaves it out.
    """
    import tensorflow as tf

    unknown = tf.boolean_mask(x, tf.logical_not(known))[:8]
    check = tf.debugging.Assert(tf.reduce_all(known), [message, "Received:", unknown])
    with tf.control_dependencies([check]):
        return tf.identity(x)


def rows(x, first, size):
    """`x[..., first : first + size, :]` of a tensor `first`, of which only the device knows."""
    if keras.backend.backend() == "torch":
        return x.index_select(-2, _indices(x, first, size))
    start = [0] * len(x.shape)
    start[-2] = first
    return keras.ops.slice(x, start, (*x.shape[:-2], size, x.shape[-1]))


def with_rows(x, first, new):
    """`x` with `x[..., first : first + size, :]` replaced by `new`; see `rows`."""
    if keras.backend.backend() == "torch":
        return x.index_copy(-2, _indices(x, first, new.shape[-2]), new)
    start = [0] * len(x.shape)
    start[-2] = first
    return keras.ops.slice_update(x, start, new)


def _indices(x, first, size):
    import torch

    return first + torch.arange(size, device=x.device)


def replicas():
    """Number of replicas that TensorFlow's distribution strategy keeps in step; 1 elsewhere."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def gradient(fn, x):
    """Gradient of `sum(fn(x))` with respect to `x`.

    Args:
        fn: Function from one tensor to a tensor of any shape.
        x: Floating point tensor of the current backend.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.grad(lambda t: keras.ops.sum(fn(t)))(x)
    if backend == "torch":
        import torch

        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            return torch.autograd.grad(fn(leaf).sum(), leaf)[0]
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(fn(x))
        return tape.gradient(total, x)
    raise RuntimeError(
        "keras_lipnext runs on the jax, torch and tensorflow backends of Keras. "
        f"Received: KERAS_BACKEND={backend}. Set it to one of the three before importing keras."
    )
