"""Products of a tensor with constant weights, as `einsum` writes them: one matrix each.

`subscripts` name the axes of the tensor, of the weights and of the output. An axis of the tensor
that the weights lack and the output keeps, as the samples', is passed on. Of the others, those of
both operands and the output ("groups") number independent products; those of the tensor that the
output lacks are summed, and those of the weights that it has are new. Each group's map is a matrix
(summed, new), and the whole is block diagonal: its norm is the largest of theirs.
"""

import string

import numpy as np


class NoContraction(ValueError):
    """The product is none of a tensor with weights, or mixes samples; the message says why."""


def einsum_axes(subscripts, rank):
    """(tensor, weights, output) of `subscripts`, one letter an axis, for a tensor of this rank.

    The tensor is the first operand; ellipses are written out.
    """
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    if not arrow:
        raise NoContraction(f"its subscripts {subscripts!r} do not name the output: write '->'")
    tensor, weights = inputs.split(",")
    if "..." in weights:
        raise NoContraction(f"its subscripts {subscripts!r} leave axes of the weights unnamed")
    used = set(inputs + output)
    missing = rank - len(tensor.replace("...", ""))
    free = "".join([c for c in string.ascii_letters if c not in used][: max(missing, 0)])
    return tensor.replace("...", free), weights, output.replace("...", free)


def matmul_axes(tensor_rank, weights_rank, tensor_first):
    """As `einsum_axes`, of `matmul` with weights that are a vector or a matrix."""
    if weights_rank not in (1, 2) or tensor_rank < 2:
        raise NoContraction("its constant is neither a vector nor a matrix: use keras.ops.einsum")
    tensor = string.ascii_lowercase[:tensor_rank]
    summed = tensor[-1] if tensor_first else tensor[-2]
    if weights_rank == 1:
        return tensor, summed, tensor.replace(summed, "")
    weights = f"{summed}Z" if tensor_first else f"Z{summed}"
    return tensor, weights, tensor.replace(summed, "Z")


def tensordot_axes(tensor_rank, weights_rank, axes):
    """As `einsum_axes`, of `tensordot(tensor, weights, axes)`."""
    if isinstance(axes, int):
        axes = (range(tensor_rank - axes, tensor_rank), range(axes))
    pairs = [(int(a) % tensor_rank, int(b) % weights_rank) for a, b in zip(*map(np.ravel, axes))]
    tensor = string.ascii_lowercase[:tensor_rank]
    weights = list(string.ascii_uppercase[:weights_rank])
    for a, b in pairs:
        weights[b] = tensor[a]
    weights = "".join(weights)
    kept = [c for c in tensor + weights if (c in tensor) != (c in weights)]
    return tensor, weights, "".join(kept)


def matrices(axes, shape, weights):
    """The blocks, shape (groups, summed, new).

    Args:
        axes: (tensor, weights, output), strings of letters.
        shape: Of the tensor, with batch axis, None where unknown.
        weights: Float64 array.
    """
    tensor, named, output = axes
    if len(tensor) != len(shape) or len(named) != weights.ndim:
        raise NoContraction(f"its axes {axes} do not fit shapes {shape} and {weights.shape}")
    if any(len(set(names)) != len(names) for names in axes):
        raise NoContraction("it takes diagonals")
    if tensor[0] in named or output[:1] != tensor[0]:
        raise NoContraction("it works on the batch axis")
    sizes = dict(zip(tensor, shape))
    for name, size in zip(named, weights.shape):
        if sizes.get(name, size) != size:
            raise NoContraction(f"shapes {shape} and {weights.shape} broadcast")
    groups = [c for c in named if c in tensor and c in output]
    summed = [c for c in named if c in tensor and c not in output]
    new = [c for c in named if c not in tensor]
    if not set(new) <= set(output):
        raise NoContraction("it sums over an axis of its constant alone: sum it beforehand")
    alone = [sizes[c] for c in tensor if c not in named and c not in output]
    if None in alone:
        raise NoContraction("it sums over an axis of unknown size")
    blocks = weights.transpose([named.index(c) for c in (*groups, *summed, *new)])
    blocks = blocks.reshape(
        int(np.prod([sizes[c] for c in groups])), int(np.prod([sizes[c] for c in summed])), -1
    )
    return np.repeat(blocks, int(np.prod(alone)), axis=1)
