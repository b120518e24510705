"""What a model is built of: its builder's arguments, checked, defaults in place of None."""

import dataclasses
import math
import warnings
from typing import Any, ClassVar

import keras
import numpy as np

from keras_lipnext import layers
from keras_lipnext.arguments import (
    non_negative_integer,
    number,
    positive_integer,
    resolve_data_format,
)
from keras_lipnext.layers.images import NAMES, SPATIAL
from keras_lipnext.losses import EMMA
from keras_lipnext.metrics import CertifiedAccuracy
from keras_lipnext.models import necks
from keras_lipnext.models.sizes import POOLED_SIZES, SIZES
from keras_lipnext.report.text import range_warning

# Logits of a 1-Lipschitz network grow like the norm of images, so with the root of their size.
# Chosen on held-out training images (benchmarks/tune.py, results/tuning.jsonl).
SIZED_TEMPERATURE = 128.0
NECKS = ("pool", "patches")
OUTPUTS = ("classes", "dense")
# Most positions of the blocks' map along an axis, by the number of axes, where no patch size is
# given; a mask has details that a class has not.
POSITIONS = {1: 32, 2: 14, 3: 7}
FINER = 4
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
        image: (*sides, channels) of that input shape: (height, width, channels) of images.

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

    # Numbers of spatial axes that inputs of the model may have.
    spatial: ClassVar[tuple[int, ...]] = (2,)

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
            image=image_sizes(self.input_shape, data_format, self.spatial),
            input_shape=tuple(self.input_shape),
        )

    def _resolve(self, **values):
        for name, value in values.items():
            object.__setattr__(self, name, value)  # once, as the instance is made

    def config(self):
        """The arguments, of a model's `get_config`."""
        names = [field.name for field in dataclasses.fields(self) if field.init]
        return {**{name: getattr(self, name) for name in names}, "dtype": self.dtype.name}

    @property
    def pooled(self):
        """Number of positions of an input whose evidence makes one vector of logits."""
        return math.prod(self.image[:-1])

    def compile(self, model, optimizer):
        """Compiles a model of it as builders do: EMMA with its ramp, certified accuracy."""
        if self.dtype.name == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        temperature = self.temperature or max(1.0, SIZED_TEMPERATURE / math.sqrt(self.pooled))
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
        map: (height, width) of the blocks' feature map, in positions; of series and volumes
            likewise.
    """

    patch_size: Any
    depth: Any
    width: Any
    shift_ratio: Any
    beta: float
    padding: str
    mixing: str
    output: str
    neck: Any
    neck_width: Any
    neck_patch_size: Any
    dense_depth: Any
    remat: bool
    entries: int = dataclasses.field(init=False)
    map: tuple = dataclasses.field(init=False)

    spatial: ClassVar[tuple[int, ...]] = tuple(SPATIAL)

    def __post_init__(self):
        if self.input_shape is None:
            first = resolve_data_format(self.data_format) == "channels_first"
            self._resolve(input_shape=(3, 224, 224) if first else (224, 224, 3))
        super().__post_init__()
        if not isinstance(self.remat, bool):
            raise ValueError(f"`remat` must be True or False. Received: remat={self.remat!r}")
        if self.output not in OUTPUTS:
            raise ValueError(
                "`output` must be 'classes' (logits of the whole input) or 'dense' (logits of each "
                f"of its positions). Received: output={self.output!r}"
            )
        sizes = _lipnext_sizes(self.size, self.depth, self.width, self.shift_ratio)
        whole = {name: positive_integer(name, sizes[name]) for name in ("depth", "width")}
        self._resolve(**{**sizes, **whole})
        patch_size = self.patch_size
        if patch_size is None:
            finer = FINER if self.output == "dense" else 1
            patch_size = default_patch_size(self.image[:-1], self.image[-1], self.width, finer)
        self._resolve(patch_size=positive_integer("patch_size", patch_size))
        # Without weights: it refuses what the model's own would.
        stem = layers.PatchEmbedding(
            patch_size, self.width, data_format=self.data_format, name="patch_embedding"
        )
        entries = stem.entries((None, *self.input_shape))
        self._resolve(entries=entries, map=tuple(n // patch_size for n in self.image[:-1]))
        self._resolve_neck()

    @property
    def pooled(self):
        return 1 if self.output == "dense" else super().pooled

    def _resolve_neck(self):
        if self.output == "dense":
            self._resolve_dense()
            return
        if self.neck is None:
            self._resolve(neck="pool" if self.size in POOLED_SIZES else "patches")
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
                side = necks.default_patch_size(self.map, self.width, self.neck_width)
            side = positive_integer("neck_patch_size", side)
            if any(n % side for n in self.map):
                raise ValueError(
                    "The neck tiles the blocks' feature map with patches of "
                    f"{by([side] * len(self.map))} positions. Received: neck_patch_size={side}, a "
                    f"map of {by(self.map)} ({NAMES[len(self.map)]} of {by(self.image[:-1])}, "
                    f"patch_size={self.patch_size}). Choose one of "
                    f"{', '.join(map(str, common_divisors(self.map)))}, or another `patch_size`."
                )
            self._resolve(neck_patch_size=side)

    def _resolve_dense(self):
        for name in ("neck", "neck_patch_size"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` is of output='classes', which makes one vector of an input's "
                    f"positions: leave it out. Received: output='dense', "
                    f"{name}={getattr(self, name)!r}"
                )
        depth = 0 if self.dense_depth is None else self.dense_depth
        self._resolve(dense_depth=non_negative_integer("dense_depth", depth))
        units = self.neck_width
        if units is None:  # nothing is lost, and the classes' weight vectors can all be far apart
            pixels = self.patch_size ** len(self.map)
            units = max(-(-self.width // pixels), self.num_classes)
        self._resolve(neck_width=positive_integer("neck_width", units))


def by(sizes):
    """As errors say sizes: "8 x 8"."""
    return " x ".join(map(str, sizes))


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


def image_sizes(input_shape, data_format, spatial):
    """(*sides, channels) of inputs of this shape, of as many sides as one of `spatial`."""
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) - 1 not in spatial:
        last = ", ".join(f"({', '.join(SPATIAL[n])}, channels)" for n in spatial)
        first = ", ".join(f"(channels, {', '.join(SPATIAL[n])})" for n in spatial)
        of = f" of {', '.join(NAMES[n] for n in spatial)}" if len(spatial) > 1 else ""
        raise ValueError(
            f"`input_shape` is {last}, or {first} with data_format='channels_first'{of}. Received: "
            f"input_shape={input_shape!r}"
        )
    if None in input_shape:
        names = ", ".join(SPATIAL[len(input_shape) - 1])
        raise ValueError(
            f"The model needs a known {names} and number of channels of its "
            f"{NAMES[len(input_shape) - 1]}. Received: input_shape={input_shape}"
        )
    first, *others = input_shape
    last = others[-1]
    ends = (first, last) if data_format == "channels_last" else (last, first)
    if ends[0] in (1, 3) and ends[1] not in (1, 2, 3, 4):
        if data_format == "channels_last":
            likely, moved = "channels_first", (*others, first)
        else:
            likely, moved = "channels_last", (last, first, *others[:-1])
        warnings.warn(
            f"`input_shape={tuple(input_shape)}` looks like {likely}: as {data_format} these are "
            f"{NAMES[len(others)]} of {ends[1]} channels. Pass data_format='{likely}', or "
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


def default_patch_size(sides, channels, units, finer=1):
    """Smallest side >= 2 that leaves few patches, 14 x 14 of images, else the largest that fits.

    With `finer` that many times as many along an axis are few.
    """
    most, n = finer * POSITIONS[len(sides)], len(sides)
    fitting = [p for p in common_divisors(sides) if p**n * channels <= units]
    few = [p for p in fitting if p >= 2 and max(sides) <= most * p]
    if not fitting:
        raise ValueError(
            f"`width` must be at least the {NAMES[n]}' number of channels, {channels}. Received: "
            f"width={units}"
        )
    return few[0] if few else fitting[-1]


def common_divisors(sizes):
    common = math.gcd(*sizes)
    return [p for p in range(1, common + 1) if common % p == 0]


def with_sizes(preset, overriding):
    """A preset's sizes, those that are not None of the others taking precedence."""
    return {**preset, **{name: size for name, size in overriding.items() if size is not None}}
