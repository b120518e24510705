"""What stands between the blocks of a LipNeXt and its head: 1-Lipschitz, one vector an image.

    "pool"       L2Pool                                                          -> width numbers
    "patches"    patches of the map, each flattened -> OrthogonalDense -> BetaAbs, then flattened

and behind either `dense_depth` times OrthogonalDense -> BetaAbs on that vector. Pooling by norms
forgets the sign and the place of a feature; patches keep both, at a cost per patch, not per
position: a patch of s x s positions of C channels is a vector of s^2 C numbers, rearranged and not
changed, and a matrix with orthonormal columns takes `neck_width` of them on.
"""

import keras

from keras_lipnext import layers


def default_patch_size(height, width, channels, units):
    """Side that tiles a map of this size with the fewest weights of "patches".

    (s^2 C + height width units / s^2) units of them: those of a patch, and of the first layer
    behind.
    """
    sides = [s for s in range(1, min(height, width) + 1) if height % s == width % s == 0]
    return min(sides, key=lambda s: s**2 * channels + height * width * units / s**2)


def patches(architecture):
    """Number of patches of the map; 1 for "pool"."""
    rows, columns = architecture.map
    side = architecture.neck_patch_size
    return (rows // side) * (columns // side) if architecture.neck == "patches" else 1


def kernels(architecture):
    """{name: (shape of its kernel, times it is applied to an image)}, of the head, too."""
    units, found = architecture.neck_width, {}
    features = architecture.width
    if architecture.neck == "patches":
        count = patches(architecture)
        found["neck"] = (architecture.neck_patch_size**2 * features, units), count
        features = count * units
    for index in range(architecture.dense_depth):
        found[f"dense_{index}"] = (features, units), 1
        features = units
    found["head"] = (features, architecture.num_classes), 1
    return found


def neck(x, architecture):
    """The vectors that the head of a LipNeXt gets, of its last feature map."""
    policy, data_format = architecture.dtype, architecture.data_format
    if architecture.neck == "pool":
        x = layers.L2Pool(data_format=data_format, dtype=policy, name="pool")(x)
    else:
        x = _patches(x, architecture)
        x = _orthogonal(x, "neck", architecture)
        x = keras.layers.Flatten("channels_last", dtype=policy, name="neck_flatten")(x)
    for index in range(architecture.dense_depth):
        x = _orthogonal(x, f"dense_{index}", architecture)
    return x


def _patches(x, architecture):
    """Space to depth: each s x s positions of a map become one vector, which lies last."""
    side, channels, policy = architecture.neck_patch_size, architecture.width, architecture.dtype
    rows, columns = (n // side for n in architecture.map)
    if architecture.data_format == "channels_first":
        x = keras.layers.Permute((2, 3, 1), dtype=policy, name="neck_last")(x)
    # Positions of one row of a patch lie beside each other as they are.
    split = (rows, side, columns, side * channels)
    x = keras.layers.Reshape(split, dtype=policy, name="neck_split")(x)
    x = keras.layers.Permute((1, 3, 2, 4), dtype=policy, name="neck_order")(x)
    return keras.layers.Reshape((rows, columns, -1), dtype=policy, name="neck_patches")(x)


def _orthogonal(x, name, architecture):
    policy = architecture.dtype
    x = layers.OrthogonalDense(architecture.neck_width, dtype=policy, name=name)(x)
    return layers.BetaAbs(architecture.beta, dtype=policy, name=f"{name}_activation")(x)
