import math
from collections.abc import Callable
from typing import Any, Self

import keras
from keras import ops

from keras_lipnext.arguments import resolve_data_format
from keras_lipnext.layers.beta_abs import BetaAbs
from keras_lipnext.layers.full_shift_mixing import FullShiftMixing
from keras_lipnext.layers.images import along, channel_axis, channels_along, matmul, sides_of
from keras_lipnext.layers.orthogonal_dense import OrthogonalDense
from keras_lipnext.layers.positional_bias import PositionalBias
from keras_lipnext.layers.shift_mixing import ShiftMixing
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Config, Shape, Tensor

MIXINGS = {"reduced": ShiftMixing, "full": FullShiftMixing}
# The parts whose kernels training multiplies with each other.
EXPANDED = (PositionalBias, ShiftMixing, OrthogonalDense, BetaAbs)
# Vectors a channel that moves from which on that product, once a batch on each device, costs less
# than the pass over the vectors that it saves: at most 1/16 of the block's other products.
ROWS_FOR_EACH_MOVING = 16


def expands(rows: int, moving: int) -> bool:
    """Whether training multiplies the kernels of a block, whose batch has so many vectors."""
    distribution = keras.distribution.distribution()
    devices = distribution.device_mesh.devices.size if distribution else 1
    return rows >= ROWS_FOR_EACH_MOVING * moving * devices


@keras.saving.register_keras_serializable(NAMESPACE)
class LipNeXtBlock(keras.layers.Layer):
    """The LipNeXt block, `beta_abs(M R^T S(R (x + p)) + b)`: 1-Lipschitz, an isometry before
    the nonlinearity when shifts are circular.

    `p` is a `PositionalBias`, `R^T S R` a `ShiftMixing`, `M` and `b` an `OrthogonalDense`, of as
    many units as the input has channels, and the activation a `BetaAbs`.

    Example:

    ```python
    block = keras_lipnext.layers.LipNeXtBlock(shift_ratio=1 / 8, beta=0.5)
    block(np.ones((1, 4, 4, 16))).shape  # (1, 4, 4, 16)
    ```

    Args:
        shift_ratio: Share of the channels that moves in each direction, of which each spatial axis
            has two: in (0, 1/2] for series, (0, 1/4] for images, (0, 1/6] for volumes.
        beta: Share of the channels that the activation rectifies, in [0, 1].
        padding: "circular" or "zero".
        mixing: "reduced" for `ShiftMixing`, which stores and multiplies with the rows of R that
            move, or "full" for `FullShiftMixing`, the paper's form: the same function, dearer.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Series (batch, length, channels), images (batch, height, width, channels) or volumes (batch,
        depth, height, width, channels), or channels first, of known spatial sizes.

    Output shape:
        The input's.

    In training, of batches that are large enough or of unknown size, it multiplies M with R_s^T
    and does not form the sum of inputs and shifts: the same function, rounded otherwise.

    Parts can be frozen apart, `block.mixing.trainable = False`, and stay so in saved files.

    Raises:
        ValueError: for another `mixing`, and as its parts do.

    Reference:
        LipNeXt (Hu et al., ICLR 2026), arXiv 2601.18513.
    """

    def __init__(
        self,
        shift_ratio: float = 1 / 8,
        beta: float = 0.75,
        padding: str = "circular",
        mixing: str = "reduced",
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if mixing not in MIXINGS:
            raise ValueError(
                "`mixing` must be 'reduced' (the rows of R that move) or 'full' (the paper's "
                f"form). Received: mixing={mixing!r}"
            )
        self.shift_ratio = shift_ratio
        self.beta = beta
        self.padding = padding
        self._mixing = mixing
        self.data_format = resolve_data_format(data_format)
        self._axis = channel_axis(self.data_format)
        shared = {"data_format": self.data_format, "dtype": self.dtype_policy}
        self.positional_bias = PositionalBias(name="positional_bias", **shared)
        self.mixing = MIXINGS[mixing](shift_ratio, padding, name="mixing", **shared)
        self.activation = BetaAbs(beta, axis=self._axis, name="activation", dtype=self.dtype_policy)
        self.dense: OrthogonalDense | None = None  # until the number of channels is known
        if not self.trainable:  # the parts were not there when it was set
            for part in self.parts:
                part.trainable = False
        # Names of the parts that are to be frozen once they are there.
        self._frozen: tuple[str, ...] | None = None

    @property
    def parts(self) -> tuple[keras.layers.Layer, ...]:
        """The layers applied, in order; without the dense one before the block is built.

        Saved files name the weights of `positional_bias` by this property: it keeps its name.
        """
        parts = (self.positional_bias, self.mixing, self.dense, self.activation)
        return tuple(part for part in parts if part is not None)

    def certified_parts(self) -> tuple[keras.layers.Layer, ...]:
        """The block is the composition of its parts: certificates read them one by one."""
        return self.parts

    def build(self, input_shape: Shape) -> None:
        sides_of(self, input_shape)
        channels = channels_along(self, input_shape)
        self.dense = OrthogonalDense(
            channels, axis=self._axis, name="dense", dtype=self.dtype_policy
        )
        frozen = self._names_of_frozen()
        for part in self.parts:
            part.build(input_shape)
            part.trainable = part.name not in frozen
        self._frozen = None

    def _names_of_frozen(self) -> list[str]:
        """Keras saves and sets only what a layer itself is: parts keep count of theirs here."""
        if self._frozen is not None:
            return list(self._frozen)
        frozen = [part.name for part in self.parts if not part.trainable]
        return frozen + ["dense"] * (not self.built and not self.trainable)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if training is True and self._pays_to_expand(inputs):
            return self._expanded(inputs)
        x = inputs
        for part in self.parts:
            x = part(x)
        return x

    def rematerialized_call(
        self, layer_call: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Callable[..., Tensor]:
        """`layer_call`, computed anew in the backward pass where a `keras.RematScope` says so.

        `training` is bound: TensorFlow takes no keywords here, and JAX would make an array of it.
        """

        def bound(*inputs: Tensor) -> Tensor:
            return layer_call(*inputs, **kwargs)

        call = super().rematerialized_call(bound, *args)
        return lambda *inputs, **_: call(*inputs)

    def _pays_to_expand(self, inputs: Tensor) -> bool:
        """Whether the parts are the usual ones, and the product of their kernels is small."""
        parts = self.parts
        if tuple(map(type, parts)) != EXPANDED or parts[2].activation != keras.activations.linear:
            return False
        sizes = list(inputs.shape)
        del sizes[self._axis]
        if not all(isinstance(size, int) for size in sizes):
            return True
        return expands(math.prod(sizes), self.mixing.moving)

    def _expanded(self, inputs: Tensor) -> Tensor:
        """The same function with `M (x + R_s^T c) = M x + (M R_s^T) c`, what moves being `c`.

        The sum in brackets, as large as the inputs, is not formed. Training only: what a
        certificate bounds are the parts.
        """
        positional_bias, mixing, dense, activation = self.parts
        axis = self._axis
        # Cast here: outside of the parts' calls nothing else does, and each only once.
        moving = ops.cast(mixing.kernel, mixing.compute_dtype)
        kernel = ops.cast(dense.kernel, dense.compute_dtype)
        bias = ops.cast(dense.bias, dense.compute_dtype)
        x = positional_bias(inputs)
        # Transposed: else XLA on GPUs makes one product of R_s x and M R_s^T, and for that a copy
        # of x with M below it.
        moved = ops.transpose(ops.matmul(ops.transpose(kernel), moving))
        changes = matmul(mixing.changes(x, moving), moved, axis)
        x = matmul(x, kernel, axis) + changes
        return activation(x + along(bias, axis, len(x.shape)))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "shift_ratio": self.shift_ratio,
            "beta": self.beta,
            "padding": self.padding,
            "mixing": self._mixing,
            "data_format": self.data_format,
            "frozen": self._names_of_frozen(),
        }

    @classmethod
    def from_config(cls, config: Config) -> Self:
        config = dict(config)
        frozen = config.pop("frozen", None)
        block = cls(**config)
        block._frozen = None if frozen is None else tuple(frozen)
        return block
