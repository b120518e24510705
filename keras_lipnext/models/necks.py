"""What stands between the blocks of a LipNeXt and its head: 1-Lipschitz.

One vector an image, or another input, with output="classes":

    "pool"       L2Pool                                                          -> width numbers
    "patches"    patches of the map, each flattened -> OrthogonalDense -> BetaAbs, then flattened

and behind either `dense_depth` times OrthogonalDense -> BetaAbs on that vector. Pooling by norms
forgets the sign and the place of a feature; patches keep both, at a cost per patch, not per
position: a patch of s x s positions of C channels is a vector of s^2 C numbers, rearranged and not
changed, and a matrix with orthonormal columns takes `neck_width` of them on.

One vector a pixel, or another position of the input, with output="dense": of p x p pixels a patch

    OrthogonalDense to p^2 neck_width units -> BetaAbs, cut into p x p pixels of neck_width numbers

the inverse of the stem, an isometry where p^2 neck_width >= width, then `dense_depth` times
OrthogonalDense -> BetaAbs at each pixel.
"""

import math

import keras

from keras_lipnext import layers


def default_patch_size(sizes, channels, units):
    """Side that tiles a map of these sizes with the fewest weights of "patches".

    (s^2 C + height width units / s^2) units of them: those of a patch, and of the first layer
    behind.
    """
    n, positions, common = len(sizes), math.prod(sizes), math.gcd(*sizes)
    sides = [s for s in range(1, common + 1) if common % s == 0]
    return min(sides, key=lambda s: s**n * channels + positions * units / s**n)


def kernels(architecture):
    """{name: (shape of its kernel, times it is applied to an image)}, of the head, too."""
    units, found, n = architecture.neck_width, {}, len(architecture.map)
    features, times = architecture.width, 1
    if architecture.output == "dense":
        pixels = architecture.patch_size**n
        found["neck"] = (features, pixels * units), math.prod(architecture.map)
        features, times = units, math.prod(architecture.image[:-1])
    elif architecture.neck == "patches":
        side = architecture.neck_patch_size
        count = math.prod(size // side for size in architecture.map)
        found["neck"] = (side**n * features, units), count
        features = count * units
    for index in range(architecture.dense_depth):
        found[f"dense_{index}"] = (features, units), times
        features = units
    found["head"] = (features, architecture.num_classes), times
    return found


def neck(x, architecture):
    """The vectors that the head of a LipNeXt gets, of its last feature map; they lie last."""
    policy, data_format = architecture.dtype, architecture.data_format
    units = architecture.neck_width
    if architecture.output == "dense":
        pixels = architecture.patch_size ** len(architecture.map)
        x = _orthogonal(_channels_last(x, architecture), "neck", pixels * units, architecture)
        x = _pixels(x, architecture)
    elif architecture.neck == "pool":
        x = layers.L2Pool(data_format=data_format, dtype=policy, name="pool")(x)
    else:
        x = _patches(_channels_last(x, architecture), architecture)
        x = _orthogonal(x, "neck", units, architecture)
        x = keras.layers.Flatten("channels_last", dtype=policy, name="neck_flatten")(x)
    for index in range(architecture.dense_depth):
        x = _orthogonal(x, f"dense_{index}", units, architecture)
    return x


def _channels_last(x, architecture):
    if architecture.data_format == "channels_last":
        return x
    axes = (*range(2, len(architecture.map) + 2), 1)
    return keras.layers.Permute(axes, dtype=architecture.dtype, name="neck_last")(x)


def _patches(x, architecture):
    """Space to depth: each s x s positions of a map become one vector, which lies last."""
    side, channels, policy = architecture.neck_patch_size, architecture.width, architecture.dtype
    counts = [size // side for size in architecture.map]
    # Positions of one row of a patch lie beside each other as they are.
    split = [m for count in counts for m in (count, side)]
    split[-1] *= channels
    whole = range(1, len(split) + 1)
    x = keras.layers.Reshape(split, dtype=policy, name="neck_split")(x)
    x = keras.layers.Permute((*whole[::2], *whole[1::2]), dtype=policy, name="neck_order")(x)
    return keras.layers.Reshape((*counts, -1), dtype=policy, name="neck_patches")(x)


def _pixels(x, architecture):
    """Depth to space: of each position's vector the pixels of its patch, in the stem's order."""
    side, policy, n = architecture.patch_size, architecture.dtype, len(architecture.map)
    split = [*architecture.map, *[side] * n]
    split[-1] *= architecture.neck_width
    order = [axis for pair in zip(range(1, n + 1), range(n + 1, 2 * n + 1)) for axis in pair]
    x = keras.layers.Reshape(split, dtype=policy, name="neck_split")(x)
    x = keras.layers.Permute(order, dtype=policy, name="neck_order")(x)
    sides = architecture.image[:-1]
    return keras.layers.Reshape((*sides, -1), dtype=policy, name="neck_pixels")(x)


def _orthogonal(x, name, units, architecture):
    policy = architecture.dtype
    x = layers.OrthogonalDense(units, dtype=policy, name=name)(x)
    return layers.BetaAbs(architecture.beta, dtype=policy, name=f"{name}_activation")(x)
