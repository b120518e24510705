from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_lipnext.arguments import number, resolve_data_format, title
from keras_lipnext.layers.images import (
    NAMES,
    along,
    channel_axis,
    channels_along,
    sides_of,
    spatial_axes,
)
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Config, Shape, Tensor


def directions(spatial: int) -> tuple[tuple[int, int], ...]:
    """(index of the spatial axis, step) of each group: for two axes up, down, left, right."""
    return tuple((axis, step) for axis in range(spatial) for step in (-1, 1))


def moving_channels(layer: keras.layers.Layer, channels: int, spatial: int) -> int:
    """Channels that move in any direction, two along each axis, `ratio * channels` in each."""
    count = 2 * spatial
    if layer.ratio * count > 1:
        raise ValueError(
            f"`ratio`, the share of the channels that moves in each of {count} directions, must be "
            f"in (0, 1/{count}] for {NAMES[spatial]}. Received: ratio={layer.ratio!r} in "
            f"{title(layer)}"
        )
    size = layer.ratio * channels
    if abs(size - round(size)) > 1e-6 or round(size) < 1:
        step = round(1 / layer.ratio)
        raise ValueError(
            f"{title(layer)} moves ratio * channels channels in each "
            f"of {count} directions, which must be a whole number of at least 1. Received: "
            f"ratio={layer.ratio}, channels={channels}. With this ratio, multiples of {step} "
            "channels work."
        )
    return count * round(size)


def shifted_channels(layer: keras.layers.Layer, input_shape: Shape) -> int:
    """Number of channels of what is shifted, which the layer then expects of its inputs.

    As an attribute: in a traced call sizes may be tensors.
    """
    sides_of(layer, input_shape)
    channels, rank = channels_along(layer, input_shape), len(input_shape)
    axes = {channel_axis(layer.data_format) % rank: channels}
    layer.input_spec = keras.layers.InputSpec(ndim=rank, axes=axes)
    return channels


def check_shift(ratio: float, padding: str) -> None:
    if not 0 < number("ratio", ratio) <= 0.5:
        raise ValueError(
            "`ratio`, the share of the channels that moves in each direction, must be in (0, 1/2], "
            f"and for images in (0, 1/4], for volumes in (0, 1/6]. Received: ratio={ratio!r}"
        )
    if padding not in ("circular", "zero"):
        raise ValueError(
            "`padding` must be 'circular' (an isometry) or 'zero' (1-Lipschitz); replicating the "
            f"border is not 1-Lipschitz. Received: padding={padding!r}"
        )


def shift_groups(x: Tensor, moving: int, padding: str, data_format: str) -> Tensor:
    """Moves the first channels, as many in each direction; of an image [0, g) up, [g, 2g) down,
    [2g, 3g) left, [3g, 4g) right. The others stay.
    """
    axis, rank = channel_axis(data_format), len(x.shape)
    # A split at given places is one at data-dependent places to `torch.export`.
    before = (slice(None),) * (axis % rank)
    parts = ops.split(x[(*before, slice(moving))], 2 * (rank - 2), axis=axis)
    rest = x[(*before, slice(moving, None))]
    return ops.concatenate([*_moved(parts, padding, data_format), rest], axis=axis)


def shift_changes(x: Tensor, padding: str, data_format: str) -> Tensor:
    """(S - I) x, where all channels move: as many in each direction.

    Subtracted before the groups are joined, it fuses better on JAX (benchmarks/shifts.py).
    """
    axis = channel_axis(data_format)
    parts = ops.split(x, 2 * (len(x.shape) - 2), axis=axis)
    moved = _moved(parts, padding, data_format)
    return ops.concatenate([after - part for after, part in zip(moved, parts)], axis=axis)


def _moved(parts: Sequence[Tensor], padding: str, data_format: str) -> list[Tensor]:
    """Each of the groups, moved its way."""
    axes = spatial_axes(data_format, len(parts[0].shape))
    move = _roll if padding == "circular" else _slide
    steps = directions(len(axes))
    return [move(part, axes[i], step) for part, (i, step) in zip(parts, steps, strict=True)]


def _roll(x: Tensor, axis: int, step: int) -> Tensor:
    return ops.roll(x, step, axis=axis)


def _slide(x: Tensor, axis: int, step: int) -> Tensor:
    """Moves by one position along `axis`, zeros entering at the border.

    A roll whose wrapped entries are multiplied by 0: slices and padding cost TensorFlow three times
    as much, forward and backward (benchmarks/shifts.py). What is not finite does not vanish.
    """
    size = ops.shape(x)[axis]
    kept = ops.not_equal(ops.arange(size), 0 if step > 0 else size - 1)
    return _roll(x, axis, step) * along(ops.cast(kept, x.dtype), axis, len(x.shape))


@keras.saving.register_keras_serializable(NAMESPACE)
class SpatialShift(keras.layers.Layer):
    """Moves groups of `ratio * channels` channels by one position, two along each spatial axis.

    For an image these are four: up, down, left, right; for a series two, for a volume six. The
    remaining channels stay. A circular shift permutes the entries of the input: an isometry. Zero
    padding drops a border position, row or plane and is 1-Lipschitz. It has no weights. Among
    circular depthwise convolutions with unit stride only shifts (up to sign) preserve norms.

    Example:

    ```python
    layer = keras_lipnext.layers.SpatialShift(ratio=1 / 8)
    layer(np.ones((1, 4, 4, 16))).shape  # (1, 4, 4, 16)
    ```

    Args:
        ratio: Share of the channels that moves in each direction, of which each spatial axis has
            two: in (0, 1/2] for series, (0, 1/4] for images, (0, 1/6] for volumes. `ratio *
            channels` must be a whole number.
        padding: "circular" or "zero".
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Series (batch, length, channels), images (batch, height, width, channels) or volumes (batch,
        depth, height, width, channels), or channels first; batch and spatial sizes may be None.

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
        channels = shifted_channels(self, input_shape)
        self.moving = moving_channels(self, channels, len(input_shape) - 2)

    def call(self, inputs: Tensor) -> Tensor:
        return shift_groups(inputs, self.moving, self.padding, self.data_format)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "ratio": self.ratio,
            "padding": self.padding,
            "data_format": self.data_format,
        }
