from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import number, resolve_data_format, title
from keras_lipnext.layers.images import along, channel_axis, image_sizes, spatial_axes
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Config, Shape, Tensor

# Direction of each of the four groups: (index of the spatial axis, step).
DIRECTIONS = ((0, -1), (0, 1), (1, -1), (1, 1))  # up, down, left, right


def group_size(layer: keras.layers.Layer, channels: int) -> int:
    """Channels that move in one direction: `ratio * channels`, which must be whole."""
    size = layer.ratio * channels
    if abs(size - round(size)) > 1e-6 or round(size) < 1:
        step = round(1 / layer.ratio)
        raise ValueError(
            f"{title(layer)} moves ratio * channels channels in each "
            f"of four directions, which must be a whole number of at least 1. Received: "
            f"ratio={layer.ratio}, channels={channels}. With this ratio, multiples of {step} "
            "channels work."
        )
    return round(size)


def check_shift(ratio: float, padding: str) -> None:
    if not 0 < number("ratio", ratio) <= 0.25:
        raise ValueError(
            "`ratio`, the share of the channels that moves in each of four directions, must be "
            f"in (0, 1/4]. Received: ratio={ratio!r}"
        )
    if padding not in ("circular", "zero"):
        raise ValueError(
            "`padding` must be 'circular' (an isometry) or 'zero' (1-Lipschitz); replicating the "
            f"border is not 1-Lipschitz. Received: padding={padding!r}"
        )


def shift_groups(x: Tensor, group: int, padding: str, data_format: str) -> Tensor:
    """Moves channels [0, g) up, [g, 2g) down, [2g, 3g) left, [3g, 4g) right; the others stay."""
    axis = channel_axis(data_format)
    # A split at given places is one at data-dependent places to `torch.export`.
    before = (slice(None),) * (axis % 4)
    moving = ops.split(x[(*before, slice(4 * group))], 4, axis=axis)
    rest = x[(*before, slice(4 * group, None))]
    return ops.concatenate([*_moved(moving, padding, data_format), rest], axis=axis)


def shift_changes(x: Tensor, padding: str, data_format: str) -> Tensor:
    """(S - I) x, where all channels move: up, down, left, right, a quarter each.

    Subtracted before the groups are joined, it fuses better on JAX (benchmarks/shifts.py).
    """
    axis = channel_axis(data_format)
    moving = ops.split(x, 4, axis=axis)
    moved = _moved(moving, padding, data_format)
    return ops.concatenate([after - part for after, part in zip(moved, moving)], axis=axis)


def _moved(parts: Sequence[Tensor], padding: str, data_format: str) -> list[Tensor]:
    """Each of the four groups, moved its way."""
    spatial = spatial_axes(data_format)
    move = _roll if padding == "circular" else _slide
    return [move(part, spatial[i], step) for part, (i, step) in zip(parts, DIRECTIONS)]


def _roll(x: Tensor, axis: int, step: int) -> Tensor:
    return ops.roll(x, step, axis=axis)


def _slide(x: Tensor, axis: int, step: int) -> Tensor:
    """Moves by one position along `axis`, zeros entering at the border.

    A roll whose wrapped entries are multiplied by 0: slices and padding cost TensorFlow three times
    as much, forward and backward (benchmarks/shifts.py). What is not finite does not vanish.
    """
    size = ops.shape(x)[axis]
    kept = ops.not_equal(ops.arange(size), 0 if step > 0 else size - 1)
    return _roll(x, axis, step) * along(ops.cast(kept, x.dtype), axis, 4)


@keras.saving.register_keras_serializable(NAMESPACE)
class SpatialShift(keras.layers.Layer):
    """Moves four groups of `ratio * channels` channels by one pixel: up, down, left, right.

    The remaining channels stay. A circular shift permutes the entries of the input: an isometry.
    Zero padding drops a border row or column and is 1-Lipschitz. It has no weights. Among circular
    depthwise convolutions with unit stride only shifts (up to sign) preserve norms.

    Example:

    ```python
    layer = keras_lipnext.layers.SpatialShift(ratio=1 / 8)
    layer(np.ones((1, 4, 4, 16))).shape  # (1, 4, 4, 16)
    ```

    Args:
        ratio: Share of the channels that moves in each direction, in (0, 1/4]; `ratio * channels`
            must be a whole number.
        padding: "circular" or "zero".
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Images of rank 4; the batch and spatial sizes may be None.

    Output shape:
        The input's.

    Raises:
        ValueError: for another rank, ratio, padding, or channels the groups do not divide.

    Reference:
        LipNeXt (Hu et al., ICLR 2026), Theorem 1, arXiv 2601.18513.
    """

    def __init__(
        self,
        ratio: float = 1 / 8,
        padding: str = "circular",
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_shift(ratio, padding)
        self.ratio = ratio
        self.padding = padding
        self.data_format = resolve_data_format(data_format)

    def build(self, input_shape: Shape) -> None:
        _, _, channels = image_sizes(self, input_shape)
        # In a traced call sizes may be tensors.
        self.group = group_size(self, channels)
        axes = {channel_axis(self.data_format) % 4: channels}
        self.input_spec = keras.layers.InputSpec(ndim=4, axes=axes)

    def call(self, inputs: Tensor) -> Tensor:
        return shift_groups(inputs, self.group, self.padding, self.data_format)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "ratio": self.ratio,
            "padding": self.padding,
            "data_format": self.data_format,
        }
