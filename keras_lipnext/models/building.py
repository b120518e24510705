"""What the model builders share: checks of their arguments, and EMMA's default temperature."""

import math

from keras_lipnext.layers._channels import number, positive_integer

# Logits of a 1-Lipschitz network grow like the norm of images, so with the root of their size.
# Chosen on held-out training images (benchmarks/tune.py, results/tuning.jsonl).
SIZED_TEMPERATURE = 128.0


def check_positive(or_none=False, **values):
    for name, value in values.items():
        if or_none and value is None:
            continue
        if not 0 < number(name, value) < float("inf"):
            raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}")


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
    return (first, *others) if data_format == "channels_last" else (*others, first)


def default_temperature(height, width, _):
    return max(1.0, SIZED_TEMPERATURE / math.sqrt(height * width))
