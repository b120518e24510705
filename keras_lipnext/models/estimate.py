"""What training a LipNeXt takes, from formulas, without building it.

With C channels, T positions, m columns of a block's mixing kernel (4 * shift_ratio * C of images, 2
of series, 6 of volumes, or C in the full form), p patches' entries, K classes, L blocks and n
images on a device, and for the layers of the neck and the head N kernels of a x b, each applied to
q vectors of an image:

    parameters      p C + L (T + C m + C^2 + C) + N (a b + b)
    FLOPs, forward  2 T p C + L (2 T (2 C m + C^2) + 5 T C + 2 T m) + 2 T C [pool] + 2 N q a b
                    an image
    FLOPs, training three times that, less the gradient with respect to the images; remat: four
                    times for the blocks
    optimizer       one float a matrix's entry (momentum), two for every other one (Adam)
    activations     n T (L (3 C + m) + 2 C); remat: n T (L C + 3 C + m + 2 C), one block at a time;
                    and 2 n N q b
    bytes moved     (d - 1) / d (2 (parameters + L C m) + 2 (entries of blocks' matrices)) on d
                    devices

Bytes moved are those of `keras.distribution.DataParallel`, sent in a ring: gradients are summed
(XLA's CPU compiler sums the two parts of a mixing kernel's apart), each device steps matrices of
its own, and gathers the others with their moments: as many of a shape as a multiple of d. A matrix
that is the only one of its shape is stepped by all of them. Not counted is what blocks do in other
ways in training (`LipNeXtBlock`): the product of two kernels, 6 C^2 m a step with its gradients, at
most 1/16 of the block's FLOPs; and that PyTorch then keeps 2 C + m of a block, not 3 C + m.

A multiplication and an addition are two FLOPs, as XLA counts. Activations are what the backward
pass keeps, and the two tensors it works on, in the compute dtype, and the images; gradients and
variables are in the variables' dtype. A mixed policy keeps a copy of each matrix in the compute
dtype, too. tests/models/test_estimate.py compares with what XLA says of compiled programs.
"""

import collections
import dataclasses
import math

from keras_lipnext import layers
from keras_lipnext.arguments import positive_integer
from keras_lipnext.layers.spatial_shift import moving_channels
from keras_lipnext.manifolds.orthogonalize import MUCH_TALLER
from keras_lipnext.models import necks

# GB of memory: what cards are sold with.
ACCELERATORS = {
    16: "T4, V100",
    24: "L4, RTX 4090",
    40: "A100 40 GB",
    80: "A100, H100",
    141: "H200",
    192: "B200, MI300X",
}
USABLE = 0.9  # share of a card's memory that a program can have for its arrays
# Products in a step of ManifoldMuon: of d x d matrices, drift removal included, of rectangular ones
# and of those that are much taller, with all rows, and of the smaller side alone.
SQUARE_PRODUCTS, RECTANGULAR_PRODUCTS, TALL_PRODUCTS, SMALL_PRODUCTS = 9.25, 14, 10, 7
# Tensors of the logits' size that the loss of dense outputs keeps.
LOSS_TENSORS = 8
# Matrices of the size of a stack that are in use at once in an optimizer's step.
OPTIMIZER_TEMPORARIES = 6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What training a LipNeXt takes. Memory and bytes are of one device.

    Attributes:
        parameters: Number of weights.
        forward_flops: FLOPs of an image's forward pass.
        training_flops: FLOPs of an image's share of a training step, without the optimizer's.
        optimizer_flops: FLOPs of the optimizer, a step.
        weight_bytes: Of the variables.
        copy_bytes: Of their copies in the compute dtype.
        optimizer_bytes: Of the optimizer's state.
        gradient_bytes: Of the gradients.
        activation_bytes: Of what the backward pass keeps.
        temporary_bytes: Of an optimizer step's intermediate results.
        moved_bytes: What a device sends to others in a step.
        batch, devices, dtype: As asked for.
    """

    parameters: int
    forward_flops: float
    training_flops: float
    optimizer_flops: float
    weight_bytes: int
    copy_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    temporary_bytes: int
    moved_bytes: float
    batch: int
    devices: int
    dtype: str

    @property
    def state_bytes(self) -> int:
        """Memory that stays from step to step."""
        return self.weight_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> int:
        """Most memory in use in a training step."""
        working = max(self.activation_bytes + self.copy_bytes, self.temporary_bytes)
        return self.state_bytes + self.gradient_bytes + working

    def suffices(self, gigabytes: float) -> bool:
        """Whether a device with so many GB (10^9 bytes) of memory can take the training step."""
        return self.peak_bytes <= USABLE * gigabytes * 1e9

    @property
    def accelerators(self) -> dict[int, str]:
        """{GB of memory: examples of accelerators} that suffice."""
        return {size: names for size, names in ACCELERATORS.items() if self.suffices(size)}

    def __str__(self) -> str:
        cards = [f"{size} GB ({names})" for size, names in self.accelerators.items()]
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("FLOPs an image, forward", _flops(self.forward_flops)),
            ("FLOPs an image, training", _flops(self.training_flops)),
            ("FLOPs of the optimizer, a step", _flops(self.optimizer_flops)),
            ("weights", _bytes(self.weight_bytes)),
            ("their copies in the compute dtype", _bytes(self.copy_bytes)),
            ("optimizer state", _bytes(self.optimizer_bytes)),
            ("gradients", _bytes(self.gradient_bytes)),
            ("activations", _bytes(self.activation_bytes)),
            ("optimizer's intermediate results", _bytes(self.temporary_bytes)),
            ("peak memory", _bytes(self.peak_bytes)),
            ("bytes sent to other devices, a step", _bytes(self.moved_bytes)),
            ("accelerators that suffice", "; ".join(cards) or "none of up to 192 GB"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        title = f"A step of {self.batch} images on {self.devices} device(s), {self.dtype}; of each:"
        return "\n".join([title, *lines])


def estimate(batch, devices, architecture):
    """`Estimate` of a LipNeXt of this `LipNeXtArchitecture`; see `LipNeXt.estimate`."""
    batch, devices = positive_integer("batch", batch), positive_integer("devices", devices)
    if batch % devices:
        raise ValueError(
            "`batch`, the images of a step on all devices together, must be a multiple of "
            f"`devices`. Received: batch={batch}, devices={devices}"
        )
    blocks, c = architecture.depth, architecture.width
    mixing, remat = architecture.mixing, architecture.remat
    entries, t = architecture.entries, math.prod(architecture.map)
    policy = architecture.dtype
    stored, computed = (_itemsize(d) for d in (policy.variable_dtype, policy.compute_dtype))

    # Without weights: it refuses what the model's own would.
    block = layers.LipNeXtBlock(
        architecture.shift_ratio, architecture.beta, architecture.padding, mixing, dtype=policy
    )
    moving = moving_channels(block.mixing, c, len(architecture.map))
    m = moving if mixing == "reduced" else c
    n = batch // devices

    dense = necks.kernels(architecture)
    (features, classes), heads = dense.pop("head")
    # (rows, columns, number) of the matrices on the manifold.
    shapes = [(entries, c, 1), (c, m, blocks), (c, c, blocks)]
    shapes += [(*shape, 1) for shape, _ in dense.values()]
    on_manifold = sum(a * b * count for a, b, count in shapes)
    biases = sum(b for (_, b), _ in dense.values())
    others = blocks * (t + c) + biases + features * classes + classes
    parameters = on_manifold + others

    stem = 2 * t * entries * c
    of_blocks = blocks * (2 * t * (2 * c * m + c * c) + 5 * t * c + 2 * t * m)
    pooled = architecture.neck == "pool"
    top = 2 * t * c * pooled + 2 * heads * features * classes
    top += sum(2 * count * a * b for (a, b), count in dense.values())
    forward = stem + of_blocks + top
    backward = stem + 2 * (of_blocks + top) + (of_blocks if remat else 0)

    kept = 3 * c + m
    per_image = t * (2 * c + (blocks * c + kept if remat else blocks * kept))
    per_image += sum(2 * count * b for (_, b), count in dense.values())
    logits = LOSS_TENSORS * heads * classes if architecture.output == "dense" else 0
    largest = max(min(a * b * count, max(a * b, 2**22)) for a, b, count in shapes)
    # A stack is lengthened to a multiple of the devices; a lone matrix is stepped on all of them.
    stacks = collections.Counter()
    for a, b, count in shapes:
        stacks[a, b] += count
    stepped = sum(
        -(-count // devices) * devices * a * b for (a, b), count in stacks.items() if count > 1
    )
    return Estimate(
        parameters=parameters,
        forward_flops=forward,
        training_flops=forward + backward,
        optimizer_flops=sum(count * step_flops(a, b) for a, b, count in shapes),
        weight_bytes=stored * parameters,
        copy_bytes=computed * on_manifold if computed != stored else 0,
        optimizer_bytes=stored * (on_manifold + 2 * others),
        gradient_bytes=stored * parameters,
        activation_bytes=n
        * (computed * per_image + stored * (logits + math.prod(architecture.image))),
        temporary_bytes=OPTIMIZER_TEMPORARIES * max(stored, 4) * largest,
        moved_bytes=2 * (devices - 1) / devices * stored * (parameters + blocks * c * m + stepped),
        batch=batch,
        devices=devices,
        dtype=policy.name,
    )


def step_flops(rows, columns):
    """FLOPs of ManifoldMuon's step of a matrix: m n^2 a product, whichever side is the smaller."""
    m, n = max(rows, columns), min(rows, columns)
    if m >= MUCH_TALLER * n:
        return 2 * n**2 * (TALL_PRODUCTS * m + SMALL_PRODUCTS * n)
    return 2 * n**2 * m * (SQUARE_PRODUCTS if m == n else RECTANGULAR_PRODUCTS)


def _itemsize(dtype):
    """Bytes of an entry: "float32" and "bfloat16" end in their bits."""
    return int(dtype.rsplit("float", 1)[1]) // 8


def _flops(count):
    return f"{_scaled(count)}FLOP"


def _bytes(count):
    return f"{_scaled(count)}B"


def _scaled(count):
    power = min(4, int(math.log10(max(count, 1))) // 3)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}"
