"""What the model builders share: checks of their arguments, and EMMA's default temperature."""

import math
import warnings

import numpy as np

from keras_lipnext.arguments import number, positive_integer
from keras_lipnext.models.presets import PRESETS
from keras_lipnext.report.text import range_warning

# Logits of a 1-Lipschitz network grow like the norm of images, so with the root of their size.
# Chosen on held-out training images (benchmarks/tune.py, results/tuning.jsonl).
SIZED_TEMPERATURE = 128.0


def check_positive(or_none=False, **values):
    for name, value in values.items():
        if or_none and value is None:
            continue
        if not 0 < number(name, value) < float("inf"):
            raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}")


def check_training(epsilon, temperature, learning_rate, remat):
    check_positive(epsilon=epsilon)
    check_positive(or_none=True, temperature=temperature, learning_rate=learning_rate)
    if not isinstance(remat, bool):
        raise ValueError(f"`remat` must be True or False. Received: remat={remat!r}")


def warn_of_range(x, epsilon):
    """Warns of images that leave [0, 1], and says what epsilon means there.

    Args:
        x: What `fit` takes. Of arrays the first images are looked at; of a tf.data.Dataset the
            dtype alone, since reading a batch would change what is read next.
        epsilon: The model's.
    """
    found = None
    if len(getattr(x, "shape", ())):
        first = x[:256]
        first = np.asarray(first.detach().cpu() if hasattr(first, "detach") else first)
        if first.dtype.kind in "biuf" and first.size:
            found = range_warning((float(first.min()), float(first.max())), [epsilon])
    elif hasattr(x, "element_spec"):
        images = x.element_spec[0] if isinstance(x.element_spec, tuple) else x.element_spec
        dtype = getattr(getattr(images, "dtype", None), "name", "")
        if "int" in dtype:
            found = (
                f"The data set yields images of dtype {dtype}. If they go up to 255, epsilon = "
                f"{epsilon:.4g} is {epsilon / 255:.2g} of their range."
            )
    if found:
        warnings.warn(f"{found} The model takes images in [0, 1]: divide by 255?", stacklevel=3)


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
            stacklevel=3,
        )
    return (first, *others) if data_format == "channels_last" else (*others, first)


def default_temperature(height, width, _):
    return max(1.0, SIZED_TEMPERATURE / math.sqrt(height * width))


def preset_of(size, depth, width, shift_ratio):
    """{depth, width, shift_ratio} of a named size of LipNeXt, what is given taking precedence."""
    if size is None and (depth is None) != (width is None):
        raise ValueError(
            f"Give `size`, or both `depth` and `width`. Received: depth={depth}, width={width}"
        )
    size = "tiny" if size is None else size
    if size not in PRESETS:
        raise ValueError(f"`size` must be one of {', '.join(PRESETS)}. Received: size={size!r}")
    given = {"depth": depth, "width": width, "shift_ratio": shift_ratio}
    return {**PRESETS[size], **{k: v for k, v in given.items() if v is not None}}


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


def resolved(size, depth, width, shift_ratio, input_shape, num_classes, patch_size, data_format):
    """LipNeXt's sizes, checked, with defaults in place of None.

    Returns:
        (depth, width, shift_ratio, input_shape, (height, width, channels), patch_size)
    """
    if input_shape is None:
        input_shape = (224, 224, 3) if data_format == "channels_last" else (3, 224, 224)
    preset = preset_of(size, depth, width, shift_ratio)
    depth = positive_integer("depth", preset["depth"])
    width = positive_integer("width", preset["width"])
    check_classes(num_classes)
    image = image_sizes(input_shape, data_format)
    if patch_size is None:
        patch_size = default_patch_size(*image, width)
    patch_size = positive_integer("patch_size", patch_size)
    return depth, width, preset["shift_ratio"], tuple(input_shape), image, patch_size
