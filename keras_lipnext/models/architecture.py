"""What a model is built of: its builder's arguments, checked, defaults in place of None."""

import dataclasses
import math
import warnings
from typing import Any

import keras
import numpy as np

from keras_lipnext import layers
from keras_lipnext.arguments import (
    non_negative_integer,
    number,
    positive_integer,
    resolve_data_format,
)
from keras_lipnext.losses import EMMA
from keras_lipnext.metrics import CertifiedAccuracy
from keras_lipnext.models import necks
from keras_lipnext.models.sizes import SIZES
from keras_lipnext.report.text import range_warning

# Logits of a 1-Lipschitz network grow like the norm of images, so with the root of their size.
# Chosen on held-out training images (benchmarks/tune.py, results/tuning.jsonl).
SIZED_TEMPERATURE = 128.0
NECKS = ("pool", "patches")
# Units of "patches" in widths of the blocks, as in trials on held-out training images, 256 of 128;
# and at most, so that the projection of a wide network's patches does not outgrow its blocks.
PATCHES_WIDTH, PATCHES_WIDEST = 2, 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The arguments that LipNeXt and SLLNet share, which document them.

    What is `Any` may be None, or a name, until it is resolved as the instance is made.

    Attributes:
        input_shape: As given, a tuple.
        data_format: Resolved.
        dtype: The `keras.DTypePolicy`.
        image: (height, width, channels) of that input shape.

    Raises:
        ValueError: for arguments that no model has.
    """

    size: str | None
    input_shape: Any
    num_classes: int
    epsilon: float
    temperature: float | None
    learning_rate: float | None
    data_format: Any
    dtype: Any
    image: tuple = dataclasses.field(init=False)

    def __post_init__(self):
        _check_positive(epsilon=self.epsilon)
        for name in ("temperature", "learning_rate"):
            if getattr(self, name) is not None:
                _check_positive(**{name: getattr(self, name)})
        check_classes(self.num_classes)
        data_format = resolve_data_format(self.data_format)
        self._resolve(
            data_format=data_format,
            dtype=keras.dtype_policies.get(self.dtype or keras.config.dtype_policy()),
            image=image_sizes(self.input_shape, data_format),
            input_shape=tuple(self.input_shape),
        )

    def _resolve(self, **values):
        for name, value in values.items():
            object.__setattr__(self, name, value)  # once, as the instance is made

    def config(self):
        """The arguments, of a model's `get_config`."""
        names = [field.name for field in dataclasses.fields(self) if field.init]
        return {**{name: getattr(self, name) for name in names}, "dtype": self.dtype.name}

    def compile(self, model, optimizer):
        """Compiles a model of it as builders do: EMMA with its ramp, certified accuracy."""
        if self.dtype.name == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        height, width, _ = self.image
        temperature = self.temperature or max(1.0, SIZED_TEMPERATURE / math.sqrt(height * width))
        model.compile(
            optimizer,
            loss=EMMA(3 * self.epsilon, temperature=temperature),
            metrics=["accuracy", CertifiedAccuracy(self.epsilon)],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LipNeXtArchitecture(Architecture):
    """What `LipNeXt` documents; sizes are numbers here, but None where a neck has no such.

    Attributes:
        entries: Numbers in a patch of an image.
        map: (height, width) of the blocks' feature map, in positions.
    """

    patch_size: Any
    depth: Any
    width: Any
    shift_ratio: Any
    beta: float
    padding: str
    mixing: str
    neck: str
    neck_width: Any
    neck_patch_size: Any
    dense_depth: Any
    remat: bool
    entries: int = dataclasses.field(init=False)
    map: tuple = dataclasses.field(init=False)

    def __post_init__(self):
        if self.input_shape is None:
            first = resolve_data_format(self.data_format) == "channels_first"
            self._resolve(input_shape=(3, 224, 224) if first else (224, 224, 3))
        super().__post_init__()
        if not isinstance(self.remat, bool):
            raise ValueError(f"`remat` must be True or False. Received: remat={self.remat!r}")
        sizes = _lipnext_sizes(self.size, self.depth, self.width, self.shift_ratio)
        whole = {name: positive_integer(name, sizes[name]) for name in ("depth", "width")}
        self._resolve(**{**sizes, **whole})
        patch_size = self.patch_size
        if patch_size is None:
            patch_size = default_patch_size(*self.image, self.width)
        self._resolve(patch_size=positive_integer("patch_size", patch_size))
        # Without weights: it refuses what the model's own would.
        stem = layers.PatchEmbedding(
            patch_size, self.width, data_format=self.data_format, name="patch_embedding"
        )
        entries = stem.entries((None, *self.input_shape))
        self._resolve(entries=entries, map=tuple(n // patch_size for n in self.image[:2]))
        self._resolve_neck()

    def _resolve_neck(self):
        if self.neck not in NECKS:
            raise ValueError(
                "`neck` must be 'pool' (L2 pooling, the paper's form) or 'patches' (orthogonal "
                f"projections of patches of the feature map). Received: neck={self.neck!r}"
            )
        patches = self.neck == "patches"
        if self.neck_patch_size is not None and not patches:
            raise ValueError(
                "`neck_patch_size` is of neck='patches': leave it out, or choose that neck. "
                f"Received: neck={self.neck!r}, neck_patch_size={self.neck_patch_size!r}"
            )
        depth = int(patches) if self.dense_depth is None else self.dense_depth
        self._resolve(dense_depth=non_negative_integer("dense_depth", depth))
        if self.neck_width is not None and not patches and not self.dense_depth:
            raise ValueError(
                "`neck_width` is of the layers between pooling and head, and there are none: "
                "leave it out, or set `dense_depth`. Received: "
                f"neck={self.neck!r}, neck_width={self.neck_width!r}, dense_depth=0"
            )
        if patches or self.dense_depth:
            units = self.neck_width
            if units is None:
                widened = min(PATCHES_WIDTH * self.width, PATCHES_WIDEST)
                units = widened if patches else self.width
            self._resolve(neck_width=positive_integer("neck_width", units))
        if patches:
            side = self.neck_patch_size
            if side is None:
                side = necks.default_patch_size(*self.map, self.width, self.neck_width)
            side = positive_integer("neck_patch_size", side)
            rows, columns = self.map
            if rows % side or columns % side:
                common = math.gcd(rows, columns)
                fitting = [s for s in range(1, common + 1) if common % s == 0]
                raise ValueError(
                    f"The neck tiles the blocks' feature map with patches of {side} x {side} "
                    f"positions. Received: neck_patch_size={side}, a map of {rows} x {columns} "
                    f"(images of {self.image[0]} x {self.image[1]}, patch_size="
                    f"{self.patch_size}). Choose one of {', '.join(map(str, fitting))}, or "
                    "another `patch_size`."
                )
            self._resolve(neck_patch_size=side)


def _check_positive(**values):
    for name, value in values.items():
        if not 0 < number(name, value) < float("inf"):
            raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}")


def warn_of_range(x, epsilon):
    """Warns of images that leave [0, 1], and says what epsilon means there.

    Args:
        x: What `fit` takes. Of arrays the first images are looked at; of a tf.data.Dataset the
            dtype alone, since reading a batch would change what is read next.
        epsilon: The model's.
    """
    message = None
    if len(getattr(x, "shape", ())):
        first = x[:256]
        first = np.asarray(first.detach().cpu() if hasattr(first, "detach") else first)
        if first.dtype.kind in "biuf" and first.size:
            message = range_warning((float(first.min()), float(first.max())), [epsilon])
    elif hasattr(x, "element_spec"):
        images = x.element_spec[0] if isinstance(x.element_spec, tuple) else x.element_spec
        dtype = getattr(getattr(images, "dtype", None), "name", "")
        if "int" in dtype:
            message = (
                f"The data set yields images of dtype {dtype}. If they go up to 255, epsilon = "
                f"{epsilon:.4g} is {epsilon / 255:.2g} of their range."
            )
    if message:
        warnings.warn(f"{message} The model takes images in [0, 1]: divide by 255?", stacklevel=3)


def check_classes(num_classes):
    if positive_integer("num_classes", num_classes) < 2:
        raise ValueError(f"`num_classes` must be at least 2. Received: num_classes={num_classes}")


def image_sizes(input_shape, data_format):
    """(height, width, channels) of images of this shape."""
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3:
        raise ValueError(
            "`input_shape` is (height, width, channels), or (channels, height, width) with "
            f"data_format='channels_first'. Received: input_shape={input_shape!r}"
        )
    if None in input_shape:
        raise ValueError(
            "The model needs a known height, width and number of channels of its images. "
            f"Received: input_shape={input_shape}"
        )
    first, *others = input_shape
    last = others[-1]
    ends = (first, last) if data_format == "channels_last" else (last, first)
    if ends[0] in (1, 3) and ends[1] not in (1, 2, 3, 4):
        if data_format == "channels_last":
            likely, moved = "channels_first", (*others, first)
        else:
            likely, moved = "channels_last", (last, first, others[0])
        warnings.warn(
            f"`input_shape={tuple(input_shape)}` looks like {likely}: as {data_format} these are "
            f"images of {ends[1]} channels. Pass data_format='{likely}', or "
            f"input_shape={moved}.",
            stacklevel=5,  # above the constructors: where the model is asked for
        )
    return (first, *others) if data_format == "channels_last" else (*others, first)


def _lipnext_sizes(size, depth, width, shift_ratio):
    """{depth, width, shift_ratio} of a named size of LipNeXt, what is given taking precedence."""
    if size is None and (depth is None) != (width is None):
        raise ValueError(
            f"Give `size`, or both `depth` and `width`. Received: depth={depth}, width={width}"
        )
    size = "tiny" if size is None else size
    if size not in SIZES:
        raise ValueError(f"`size` must be one of {', '.join(SIZES)}. Received: size={size!r}")
    overriding = {"depth": depth, "width": width, "shift_ratio": shift_ratio}
    return with_sizes(SIZES[size], overriding)


def default_patch_size(height, width, channels, units):
    """Smallest side >= 2 that leaves at most 14 x 14 patches, else the largest that fits."""
    divisors = [p for p in range(1, min(height, width) + 1) if height % p == width % p == 0]
    fitting = [p for p in divisors if p * p * channels <= units]
    few = [p for p in fitting if p >= 2 and max(height, width) <= 14 * p]
    if not fitting:
        raise ValueError(
            f"`width` must be at least the images' number of channels, {channels}. Received: "
            f"width={units}"
        )
    return few[0] if few else fitting[-1]


def with_sizes(preset, overriding):
    """A preset's sizes, those that are not None of the others taking precedence."""
    return {**preset, **{name: size for name, size in overriding.items() if size is not None}}
