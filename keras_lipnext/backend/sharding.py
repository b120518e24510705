"""Stacks of matrices on several devices (JAX) or processes (PyTorch): each steps some, whole.

A matrix alone in its stack is stepped by all of them: in the same time, and its results need not be
sent around.
"""

import keras
import numpy as np

from keras_lipnext.backend import keras_private


def sharding_of(variable):
    """How `keras.distribution` lays out a Keras variable: a `jax.sharding.NamedSharding`, or None.

    Where it does nothing, on PyTorch and TensorFlow, and without a distribution it is None.
    """
    return keras_private.layout_of(variable)


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
        Their stack, lengthened by repetition to a multiple of the number of devices; of one matrix
        a stack of one, which each device has.
    """
    count, devices = len(values), devices_of(sharding)
    length = 1 if count == 1 else -(-count // devices) * devices
    stack = keras.ops.stack([values[i % count] for i in range(length)])
    for layout in _layouts(sharding, length):
        stack = _laid_out(stack, layout)
    return stack


def collected(stack, sharding, count):
    """The first `count` members of a `dealt` stack as a list, each laid out by `sharding` again."""
    for layout in reversed(_layouts(sharding, stack.shape[0])):
        stack = _laid_out(stack, layout)
    return keras.ops.unstack(stack[:count], count)


def _layouts(sharding, length):
    """Of a stack so long, from members that lie as `sharding` says to members that lie whole.

    First the axes of the mesh along which members are repeated deal out the stack: each device
    keeps some of what it has. Then those along which members are split do: all-to-all. In one step
    XLA would first give every device all members whole.
    """
    from jax.sharding import NamedSharding, PartitionSpec

    mesh, spec = sharding.mesh, sharding.spec
    split = [name for names in spec if names for name in np.atleast_1d(names)]
    repeated = tuple(name for name in mesh.axis_names if name not in split)
    alone = ((None, *spec), ())
    specs = alone if length == 1 else ((None, *spec), (repeated, *spec), ((*repeated, *split),))
    return [NamedSharding(mesh, PartitionSpec(*axes)) for axes in specs]


def _laid_out(tensor, sharding):
    # Keras constrains tensors inside jit and moves those outside.
    return keras.distribution.distribute_tensor(tensor, sharding)


def check_process_group():
    """Raises unless this is PyTorch and one of the processes of `torch.distributed`."""
    if keras.backend.backend() != "torch":
        raise ValueError(
            "Processes share steps on PyTorch alone: on JAX keras.distribution deals the matrices "
            f"out to devices by itself. Received: KERAS_BACKEND={keras.backend.backend()}"
        )
    from torch import distributed

    if not distributed.is_initialized():
        raise ValueError(
            "Processes that share steps need torch.distributed.init_process_group first: start "
            "them by torchrun, see examples/torch_ddp.py."
        )


def processes_of(group):
    """Number of processes of a group of `torch.distributed`, None for all of them."""
    from torch import distributed

    return distributed.get_world_size(group)


def in_shares(function, stacks, group):
    """What `function` makes of stacks, computed by each process for its share of the members.

    Args:
        function: Of stacks of as many members; returns a list of such stacks. Members do not mix.
        stacks: Tensors of the same first dimension, equal in all processes.
        group: Of `torch.distributed`, None for all processes.

    Returns:
        List of stacks, the same bits in all processes.
    """
    import torch
    from torch import distributed

    count, processes = len(stacks[0]), processes_of(group)
    share = -(-count // processes)
    mine = (torch.arange(share) + share * distributed.get_rank(group)) % count
    results = function(*(stack[mine.to(stack.device)] for stack in stacks))
    gathered = []
    for result in results:
        parts = [torch.empty_like(result) for _ in range(processes)]
        distributed.all_gather(parts, result.contiguous(), group=group)
        gathered.append(torch.cat(parts)[:count])
    return gathered
