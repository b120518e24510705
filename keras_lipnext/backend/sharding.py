"""Stacks of matrices on several devices (JAX): each device steps whole matrices of its own."""

import keras


def sharding_of(variable):
    """How `keras.distribution` lays out a Keras variable: a `jax.sharding.NamedSharding`, or None.

    Where it does nothing, on PyTorch and TensorFlow, and without a distribution it is None.
    """
    return getattr(getattr(variable, "_layout", None), "backend_layout", None)


def devices_of(sharding):
    """Number of devices of a sharding's mesh; 1 for None."""
    return 1 if sharding is None else sharding.mesh.size


def dealt(values, sharding):
    """Deals a stack of matrices out to the devices of the mesh, whole ones to each.

    A product of two matrices that lie in parts on several devices needs all of one of them on each
    device. A stack of matrices does not: members exchange their parts once, and everything a step
    does to them is local to a device and takes 1 / devices of the memory.

    Args:
        values: List of tensors of one shape, each laid out by `sharding`.
        sharding: `jax.sharding.NamedSharding`.

    Returns:
        Their stack, lengthened by repetition to a multiple of the number of devices.
    """
    devices = devices_of(sharding)
    length = -(-len(values) // devices) * devices
    stack = keras.ops.stack([values[i % len(values)] for i in range(length)])
    in_parts, whole = _of_stacks(sharding)
    return _laid_out(_laid_out(stack, in_parts), whole)


def collected(stack, sharding, count):
    """The first `count` members of a `dealt` stack as a list, each laid out by `sharding` again."""
    in_parts, whole = _of_stacks(sharding)
    stack = _laid_out(_laid_out(stack, whole), in_parts)
    return keras.ops.unstack(stack[:count], count)


def _of_stacks(sharding):
    """(of a stack whose members lie as `sharding` says, of one whose members lie whole)."""
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = sharding.mesh
    in_parts = NamedSharding(mesh, PartitionSpec(None, *sharding.spec))
    return in_parts, NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def _laid_out(tensor, sharding):
    # Keras constrains tensors inside jit and moves those outside.
    return keras.distribution.distribute_tensor(tensor, sharding)
