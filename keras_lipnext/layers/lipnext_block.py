import math
from typing import Any, Self

import keras
from keras import ops

from keras_lipnext.arguments import resolve_data_format
from keras_lipnext.layers.beta_abs import BetaAbs
from keras_lipnext.layers.full_shift_mixing import FullShiftMixing
from keras_lipnext.layers.images import channel_axis, channels_along, matmul, sides_of
from keras_lipnext.layers.orthogonal_dense import OrthogonalDense
from keras_lipnext.layers.positional_bias import PositionalBias
from keras_lipnext.layers.shift_mixing import ShiftMixing
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Config, Shape, Tensor

MIXINGS = {"reduced": ShiftMixing, "full": FullShiftMixing}
# Vectors a channel that moves from which on the product of a block's kernels, once a batch, costs
# less than the pass over the vectors that it saves: at most 4 % of the block's products.
ROWS_FOR_EACH_MOVING = 16


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

    In training, of batches that are large enough, the product M R_s^T of its kernels replaces a
    pass over the inputs: the same function, rounded otherwise.

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
        # JAX traces it where blocks are recomputed: then it is not known, and nothing is kept.
        if training is True and self._pays_to_expand(inputs):
            return self._expanded(inputs)
        x = inputs
        for part in self.parts:
            x = part(x)
        return x

    def _pays_to_expand(self, inputs: Tensor) -> bool:
        """Whether the product of the two kernels is small beside that with the inputs."""
        if self._mixing != "reduced":
            return False
        sizes = list(inputs.shape)
        del sizes[self._axis]
        return None in sizes or math.prod(sizes) >= ROWS_FOR_EACH_MOVING * self.mixing.moving

    def _expanded(self, inputs: Tensor) -> Tensor:
        """The same function with `M (x + R_s^T c) = M x + (M R_s^T) c`, what moves being `c`.

        The sum in brackets, as large as the inputs, is not formed: a pass less in each direction,
        and nothing of it is kept for the backward pass. Training only: what a certificate bounds
        are the parts.
        """
        x = self.positional_bias(inputs)
        changes = self.mixing.changes(x)
        kernel = ops.matmul(ops.transpose(self.mixing.kernel), self.dense.kernel)
        return self.activation(self.dense(x) + matmul(changes, kernel, self._axis))

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
