"""Reference evaluation of certifiable models in 80-bit arithmetic, written in plain NumPy.

It shares no code with the library or with Keras: what it disagrees with is a finding. On machines
whose longdouble is float64 the tests that need it are skipped.
"""

import fractions
import itertools
import math

import keras
import numpy as np

from keras_lipnext.lipschitz.graph import Value

LONG = np.longdouble
PI = LONG("3.14159265358979323846264338327950288")
HAS_LONG = np.finfo(LONG).eps < 2.0**-60


def wide(weight):
    return np.asarray(keras.ops.convert_to_numpy(weight), "float64").astype(LONG)


def erf(x):
    """2/sqrt(pi) exp(-x^2) sum_k 2^k x^(2k+1) / (2k+1)!!: positive terms only, so it is stable."""
    a = np.minimum(abs(x), LONG(6.5))  # beyond, 1 - erf is below 1e-19
    total = term = a
    for k in range(1, 220):
        term = term * (2 * a * a / (2 * k + 1))
        total = total + term
    return np.sign(x) * total * np.exp(-a * a) * 2 / np.sqrt(PI)


def c(value):
    """A configured number: a double, exactly."""
    return LONG(float(value))


def _softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-abs(x)))


def leaky(slope):
    return lambda x: np.where(x > 0, x, c(slope) * x)


def elu(alpha):
    return lambda x: np.where(x > 0, x, c(alpha) * np.expm1(np.minimum(x, 0)))


def parametric_relu(layer, x):
    return np.where(x > 0, x, wide(layer.alpha) * x)


def gelu_tanh(x):
    inner = np.sqrt(2 / PI) * (x + c(0.044715) * x**3)
    return x * (1 + np.tanh(inner)) / 2


ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": leaky(0.2),
    "elu": elu(1.0),
    "celu": elu(1.0),
    "selu": lambda x: c(1.0507009873554805) * elu(1.6732632423543772)(x),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(LONG(2)))) / 2,
    "silu": lambda x: x * (1 + np.tanh(x / 2)) / 2,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "softplus": _softplus,
    "log_sigmoid": lambda x: -_softplus(-x),
    "squareplus": lambda x: np.where(
        x > 0, (x + np.sqrt(x * x + 4)) / 2, 2 / (np.sqrt(x * x + 4) + abs(x))
    ),
    "softsign": lambda x: x / (1 + abs(x)),
    "sparse_plus": lambda x: np.where(abs(x) < 1, (x + 1) ** 2 / 4, np.maximum(x, 0)),
    "soft_shrink": lambda x: np.sign(x) * np.maximum(abs(x) - LONG(0.5), 0),
    "tanh": np.tanh,
    "tanh_shrink": lambda x: x - np.tanh(x),
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "sigmoid": lambda x: (1 + np.tanh(x / 2)) / 2,
    "hard_sigmoid": lambda x: np.clip(x / 6 + LONG(0.5), 0, 1),
    "sparse_sigmoid": lambda x: np.clip((x + 1) / 2, 0, 1),
    "hard_silu": lambda x: x * np.clip(x / 6 + LONG(0.5), 0, 1),
}


def activated(layer, x):
    if isinstance(layer.activation, keras.layers.PReLU):
        return parametric_relu(layer.activation, x)
    name = layer.activation.__name__
    return x if name in ("softmax", "log_softmax") else ACTIVATIONS[name](x)


def dense(layer, x):
    axis = getattr(layer, "axis", -1)
    y = np.moveaxis(np.moveaxis(x, axis, -1) @ wide(layer.kernel), -1, axis)
    if layer.bias is not None:
        shape = [1] * y.ndim
        shape[axis] = -1
        y = y + wide(layer.bias).reshape(shape)
    return activated(layer, y) if hasattr(layer, "activation") else y


def patch_embedding(layer, x):
    p, kernel = layer.patch_size, wide(layer.kernel)
    counts = [n // p for n in x.shape[1:-1]]
    y = np.empty((len(x), *counts, kernel.shape[1]), LONG)
    for place in np.ndindex(*counts):
        patch = x[(slice(None), *(slice(i * p, (i + 1) * p) for i in place))]
        y[(slice(None), *place)] = patch.reshape(len(x), -1) @ kernel
    return y


def shifted(x, group, padding):
    y = x.copy()
    for i, (axis, step) in enumerate(itertools.product(range(1, x.ndim - 1), (-1, 1))):
        part = np.roll(x[..., i * group : (i + 1) * group], step, axis=axis)
        if padding == "zero":
            edge = [slice(None)] * x.ndim
            edge[axis] = 0 if step > 0 else -1
            part[tuple(edge)] = 0
        y[..., i * group : (i + 1) * group] = part
    return y


def spatial_shift(layer, x):
    return shifted(x, round(layer.ratio * x.shape[-1]), layer.padding)


def shift_mixing(layer, x):
    kernel = wide(layer.kernel)
    rows = x @ kernel
    return (
        x + (shifted(rows, kernel.shape[1] // (2 * (x.ndim - 2)), layer.padding) - rows) @ kernel.T
    )


def full_shift_mixing(layer, x):
    rotation = wide(layer.kernel).T
    rotated = np.einsum("rc,b...c->b...r", rotation, x)
    moved = shifted(rotated, round(layer.ratio * len(rotation)), layer.padding)
    return np.einsum("rc,b...r->b...c", rotation, moved)


def beta_abs(layer, x):
    y = np.moveaxis(x.copy(), layer.axis, -1)
    cut = round(layer.beta * y.shape[-1])
    y[..., :cut] = abs(y[..., :cut])
    return np.moveaxis(y, -1, layer.axis)


def max_min(layer, x):
    a, b = np.split(x, 2, axis=layer.axis)
    return np.concatenate([np.maximum(a, b), np.minimum(a, b)], axis=layer.axis)


def group_sort(layer, x):
    y = np.moveaxis(x, layer.axis, -1)
    size = layer.group_size or y.shape[-1]
    groups = y.reshape(*y.shape[:-1], size, -1)
    ordered = np.sort(groups, axis=-2)[..., ::-1, :].reshape(y.shape)
    return np.moveaxis(ordered, -1, layer.axis)


def householder(layer, x):
    """The published form: the identity on one side, the reflection matrix on the other."""
    first, second = np.split(np.moveaxis(x, layer.axis, -1), 2, axis=-1)
    angle = wide(layer.angle)
    sine, cosine = np.sin(angle), np.cos(angle)
    ahead = np.sin(angle / 2) * first - np.cos(angle / 2) * second > 0
    first, second = (
        np.where(ahead, first, cosine * first + sine * second),
        np.where(ahead, second, sine * first - cosine * second),
    )
    return np.moveaxis(np.concatenate([first, second], axis=-1), -1, layer.axis)


def sandwich_dense(layer, x):
    kernel = wide(layer.kernel)
    psi = np.exp(np.clip(wide(layer.log_psi), -20, 20))
    root = np.sqrt(LONG(2))
    hidden = activated(layer, with_bias(layer, root / psi * (x @ kernel[layer.units :])))
    return root * (psi * hidden) @ kernel[: layer.units].T


def windows(x, size, strides, padding, dilation=None, fill=0):
    """{tap: the entries under it}, over all positions; Keras' padding rules, channels last."""
    dilation = dilation or (1,) * len(size)
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation)]
    pads = [(0, 0)]
    for n, k, s in zip(x.shape[1:-1], reach, strides):
        total = max((-(-n // s) - 1) * s + k - n, 0) if padding == "same" else 0
        total, before = (k - 1, k - 1) if padding == "causal" else (total, total // 2)
        pads.append((before, total - before))
    x = np.pad(x, [*pads, (0, 0)], constant_values=fill)
    counts = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], reach, strides)]
    for tap in itertools.product(*map(range, size)):
        starts = [t * d for t, d in zip(tap, dilation)]
        yield (
            tap,
            x[
                (
                    slice(None),
                    *(slice(a, a + (m - 1) * s + 1, s) for a, m, s in zip(starts, counts, strides)),
                )
            ],
        )


def convolve(x, kernel, strides, padding, dilation, groups=1):
    out, size = 0, kernel.shape[:-2]
    parts = np.split(kernel, groups, axis=-1)
    for tap, entries in windows(x, size, strides, padding, dilation):
        pieces = np.split(entries, groups, axis=-1)
        out = out + np.concatenate([e @ w[tap] for e, w in zip(pieces, parts)], axis=-1)
    return out


def depthwise(x, kernel, strides, padding, dilation):
    out = 0
    for tap, entries in windows(x, kernel.shape[:-2], strides, padding, dilation):
        out = out + entries[..., None] * kernel[tap]
    return out.reshape(*out.shape[:-2], -1)


def convolution(layer, x):
    y = convolve(
        x, wide(layer.kernel), layer.strides, layer.padding, layer.dilation_rate, layer.groups
    )
    return activated(layer, y if layer.bias is None else y + wide(layer.bias))


def depthwise_convolution(layer, x):
    y = depthwise(x, wide(layer.kernel), layer.strides, layer.padding, layer.dilation_rate)
    return activated(layer, y if layer.bias is None else y + wide(layer.bias))


def separable_convolution(layer, x):
    kernel = wide(layer.depthwise_kernel)
    y = depthwise(x, kernel, layer.strides, layer.padding, layer.dilation_rate)
    y = y @ wide(layer.pointwise_kernel).reshape(y.shape[-1], -1)
    return activated(layer, y if layer.bias is None else y + wide(layer.bias))


def transposed_convolution(layer, x):
    """Scatters each input entry over a window; cropped as Keras does for "valid" and "same"."""
    kernel, strides = wide(layer.kernel), layer.strides
    size = kernel.shape[:-2]
    full = [(n - 1) * s + k for n, k, s in zip(x.shape[1:-1], size, strides)]
    out = np.zeros((len(x), *full, kernel.shape[-2]), LONG)
    for tap in itertools.product(*map(range, size)):
        place = tuple(
            slice(t, t + (n - 1) * s + 1, s) for t, n, s in zip(tap, x.shape[1:-1], strides)
        )
        out[(slice(None), *place)] += x @ kernel[tap].T
    if layer.padding == "same":
        for axis, (n, s, k) in enumerate(zip(x.shape[1:-1], strides, size), start=1):
            before = max(k - s, 0) // 2
            out = np.take(out, range(before, before + n * s), axis=axis)
    return activated(layer, out if layer.bias is None else out + wide(layer.bias))


def max_pooling(layer, x):
    taken = windows(x, layer.pool_size, layer.strides, layer.padding, fill=-np.inf)
    return np.maximum.reduce([entries for _, entries in taken])


def average_pooling(layer, x):
    sums, counts = 0, 0
    for array, ones in zip(
        windows(x, layer.pool_size, layer.strides, layer.padding),
        windows(np.ones_like(x), layer.pool_size, layer.strides, layer.padding),
    ):
        sums, counts = sums + array[1], counts + ones[1]
    return sums / counts


def batch_normalization(layer, x):
    shape = [1] * x.ndim
    shape[layer.axis] = -1
    y = x - wide(layer.moving_mean).reshape(shape)
    y = y / np.sqrt(wide(layer.moving_variance) + c(layer.epsilon)).reshape(shape)
    if layer.scale:
        y = y * wide(layer.gamma).reshape(shape)
    return y + wide(layer.beta).reshape(shape) if layer.center else y


def normalization(layer, x):
    mean, deviation = wide(layer.mean), np.sqrt(wide(layer.variance))
    return mean + x * deviation if layer.invert else (x - mean) / deviation


def relu(layer, x):
    top = np.inf if layer.max_value is None else c(layer.max_value)
    return np.where(x > 0, np.minimum(x, top), c(layer.negative_slope) * x)


def padded(layer, x):
    return np.pad(x, [(0, 0), *np.reshape(layer.padding, (-1, 2)), (0, 0)])


def cropped(layer, x):
    crops = np.reshape(layer.cropping, (-1, 2))
    return x[(slice(None), *(slice(a, n - b) for (a, b), n in zip(crops, x.shape[1:-1])))]


def along(x, axis, rows):
    """Each output entry of an axis a function of the input's entries of that axis."""
    x = np.moveaxis(x, axis, 0)
    return np.moveaxis(np.stack([row(x) for row in rows]), 0, axis)


def fraction(value):
    return LONG(value.numerator) / LONG(value.denominator)


def interpolating(kind, inputs, outputs):
    """What each output entry of a resized axis is, from exact positions."""
    for i in range(outputs):
        centre = fractions.Fraction(2 * i + 1, 2) * inputs / outputs
        if kind == "nearest":
            yield lambda x, k=int(centre): x[k]
            continue
        place = min(max(centre - fractions.Fraction(1, 2), 0), inputs - 1)
        low = int(place)
        high, part = min(low + 1, inputs - 1), fraction(place - low)
        yield lambda x, a=low, b=high, t=part: x[a] * (1 - t) + x[b] * t


def resized(kind, first_axis, sizes, x):
    for axis, size in enumerate(sizes, start=first_axis):
        x = along(x, axis, interpolating(kind, x.shape[axis], size))
    return x


def first_spatial(layer):
    return 2 if layer.data_format == "channels_first" else 1


def resizing(layer, x):
    return resized(layer.interpolation, first_spatial(layer), (layer.height, layer.width), x)


def adaptive_pooling(reduce):
    def pool(layer, x):
        for axis, outputs in enumerate(layer.output_size, start=first_spatial(layer)):
            inputs = x.shape[axis]
            cuts = [fractions.Fraction(i * inputs, outputs) for i in range(outputs + 1)]
            slices = [slice(math.floor(a), math.ceil(b)) for a, b in itertools.pairwise(cuts)]
            x = along(x, axis, [lambda x, s=s: reduce(x[s]) for s in slices])
        return x

    return pool


def centre_cropped(layer, x):
    first = first_spatial(layer)
    for axis, size in enumerate((layer.height, layer.width), start=first):
        start = (x.shape[axis] - size) // 2
        x = x.take(range(start, start + size), axis=axis)
    return x


def einsum_dense(layer, x):
    y = np.einsum(layer.equation, x, wide(layer.kernel))
    return activated(layer, y if layer.bias is None else y + wide(layer.bias))


def time_distributed(layer, x):
    inner = layer.layer
    slices = [LAYERS[type(inner).__name__](inner, x[:, t]) for t in range(x.shape[1])]
    return np.stack(slices, axis=1)


def rescaled(layer, x):
    scale, offset = (np.asarray(v, "float64").astype(LONG) for v in (layer.scale, layer.offset))
    if scale.ndim == 1 and keras.config.image_data_format() == "channels_first":
        scale = scale[:, None, None]
    return x * scale + offset


def upsampled(layer, x):
    if getattr(layer, "interpolation", "nearest") == "bilinear":
        first = first_spatial(layer)
        sizes = [n * x.shape[a] for a, n in enumerate(layer.size, start=first)]
        return resized("bilinear", first, sizes, x)
    for axis, times in enumerate(np.atleast_1d(layer.size), start=1):
        x = np.repeat(x, times, axis=axis)
    return x


def correlations(w):
    """W^T W of a convolution at every offset, kernel (h, w, rows, columns): one circle each."""
    h, v = w.shape[:2]
    full = np.pad(w, [(h - 1, h - 1), (v - 1, v - 1), (0, 0), (0, 0)])
    for a, b in itertools.product(range(2 * h - 1), range(2 * v - 1)):
        part = full[a : a + h, b : b + v]
        yield sum(part[t].T @ w[t] for t in np.ndindex(h, v))


def symbols(w, count=6):
    """The symbol of a convolution on the library's grid, and the grid's factor."""
    h, v = w.shape[:2]
    sizes = [max(count * (k - 1), 1) for k in (h, v)]
    factor = 1
    for k, n in zip((h, v), sizes):
        factor = factor / np.cos(PI * (k - 1) / (2 * n)) ** 2
    found = []
    for a, b in np.ndindex(*sizes):
        turns = [
            2 * PI * (LONG(a * i) / sizes[0] + LONG(b * j) / sizes[1]) for i, j in np.ndindex(h, v)
        ]
        taps = w.reshape(h * v, *w.shape[2:])
        found.append(sum((np.cos(t) + 1j * np.sin(t)) * k for t, k in zip(turns, taps)))
    return found, factor


def sdp_diagonal(layer, w):
    """T of W, scaled to a largest entry of 1, as sdp_diagonal.py defines it."""
    unit, columns = LONG(2.0**-24), w.shape[-1]
    if layer.bound == "orthogonal":
        return np.ones(columns, LONG)
    if not w.any():
        return np.full(columns, 4 * unit**2)
    kernels = list(correlations(w)) if w.ndim == 4 else [w.T @ w]
    if layer.bound == "spectral":
        operations, matrices, factor = 128 + sum(w.shape), [w], LONG(1)
        if w.ndim == 4:
            operations = 128 + 3 * (w.shape[0] * w.shape[1] + sum(w.shape[2:]))
            matrices, factor = symbols(w)
        tops = []
        for matrix in matrices:
            matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.conj().T
            gram, root = matrix.conj().T @ matrix, LONG(1)
            for k in range(11):
                size = np.sqrt((abs(gram) ** 2).sum())
                root = root * size ** (LONG(1) / 2**k)
                gram = gram / size @ (gram / size)
            tops.append(root)
        return np.full(columns, factor * np.exp(operations * unit) * max(tops) + 4 * unit**2)
    q = np.ones(columns, LONG)
    if layer.bound == "sll":
        log_q = wide(layer.log_q)
        q = np.exp(np.clip(log_q, -20, 20))
    operations = int(np.prod(w.shape[:-1])) + len(kernels) + columns + 64
    sums = sum(abs(k) for k in kernels) * np.exp(operations * unit)
    return sums @ q / q + 4 * unit**2


def sdp_scaled(w):
    size = abs(w).max()
    return (w / size, size) if size > 2.0**-100 else (w, LONG(1))


def with_bias(layer, x):
    return x if layer.bias is None else x + wide(layer.bias)


def sdp_dense(layer, x):
    kernel = wide(layer.kernel).T
    w = kernel if layer.bound == "orthogonal" else sdp_scaled(kernel)[0]
    return activated(layer, with_bias(layer, x @ (w / np.sqrt(sdp_diagonal(layer, w))).T))


def sdp_residual_dense(layer, x):
    kernel = wide(layer.kernel)
    w, size = (kernel, LONG(1)) if layer.bound == "orthogonal" else sdp_scaled(kernel)
    hidden = activated(layer, with_bias(layer, x @ kernel))
    return x - 2 * hidden @ (w / sdp_diagonal(layer, w)).T / size


def sdp_convolve(layer, x, kernel, strides=(1, 1), adjoint=False):
    if adjoint:
        kernel = kernel[::-1, ::-1].swapaxes(2, 3)
    pads = [((k - 1) // 2, k // 2)[:: -1 if adjoint else 1] for k in kernel.shape[:2]]
    mode = "wrap" if layer.padding == "circular" else "constant"
    x = np.pad(x, [(0, 0), *pads, (0, 0)], mode=mode)
    return convolve(x, kernel, strides, "valid", None)


def sdp_conv2d(layer, x):
    w, _ = sdp_scaled(wide(layer.kernel).swapaxes(2, 3))
    kernel = (w / np.sqrt(sdp_diagonal(layer, w))).swapaxes(2, 3)
    return activated(layer, with_bias(layer, sdp_convolve(layer, x, kernel, layer.strides)))


def sdp_residual_conv2d(layer, x):
    kernel = wide(layer.kernel)
    w, size = sdp_scaled(kernel)
    hidden = activated(layer, with_bias(layer, sdp_convolve(layer, x, kernel)))
    up = w / sdp_diagonal(layer, w)
    return x - 2 * sdp_convolve(layer, hidden, up, adjoint=True) / size


def identity(layer, x):
    return x


LAYERS = {
    "Dense": dense,
    "OrthogonalDense": dense,
    "NormalizedDense": dense,
    "PatchEmbedding": patch_embedding,
    "PositionalBias": lambda layer, x: x + wide(layer.bias),
    "ShiftMixing": shift_mixing,
    "FullShiftMixing": full_shift_mixing,
    "SpatialShift": spatial_shift,
    "SDPDense": sdp_dense,
    "SDPResidualDense": sdp_residual_dense,
    "SDPConv2D": sdp_conv2d,
    "SDPResidualConv2D": sdp_residual_conv2d,
    "BetaAbs": beta_abs,
    "GroupSort": group_sort,
    "Householder": householder,
    "SandwichDense": sandwich_dense,
    "Scale": lambda layer, x: x * wide(layer.factor),
    "MaxMin": max_min,
    "L2Pool": lambda layer, x: np.sqrt(
        (x**2).sum(axis=tuple(range(1, x.ndim - 1))) + c(layer.epsilon)
    ),
    "Conv1D": convolution,
    "Conv2D": convolution,
    "Conv3D": convolution,
    "DepthwiseConv1D": depthwise_convolution,
    "DepthwiseConv2D": depthwise_convolution,
    "SeparableConv1D": separable_convolution,
    "SeparableConv2D": separable_convolution,
    "Conv1DTranspose": transposed_convolution,
    "Conv2DTranspose": transposed_convolution,
    "MaxPooling1D": max_pooling,
    "MaxPooling2D": max_pooling,
    "AveragePooling1D": average_pooling,
    "AveragePooling2D": average_pooling,
    "GlobalMaxPooling2D": lambda layer, x: x.max(axis=(1, 2), keepdims=layer.keepdims),
    "GlobalAveragePooling1D": lambda layer, x: x.mean(axis=1),
    "GlobalAveragePooling2D": lambda layer, x: x.mean(axis=(1, 2), keepdims=layer.keepdims),
    "BatchNormalization": batch_normalization,
    "Normalization": normalization,
    "Rescaling": rescaled,
    "Resizing": resizing,
    "CenterCrop": centre_cropped,
    "AdaptiveAveragePooling1D": adaptive_pooling(lambda x: x.mean(axis=0)),
    "AdaptiveAveragePooling2D": adaptive_pooling(lambda x: x.mean(axis=0)),
    "AdaptiveAveragePooling3D": adaptive_pooling(lambda x: x.mean(axis=0)),
    "AdaptiveMaxPooling1D": adaptive_pooling(lambda x: x.max(axis=0)),
    "AdaptiveMaxPooling2D": adaptive_pooling(lambda x: x.max(axis=0)),
    "AdaptiveMaxPooling3D": adaptive_pooling(lambda x: x.max(axis=0)),
    "EinsumDense": einsum_dense,
    "TimeDistributed": time_distributed,
    "Activation": activated,
    "ReLU": relu,
    "LeakyReLU": lambda layer, x: leaky(layer.negative_slope)(x),
    "ELU": lambda layer, x: elu(layer.alpha)(x),
    "PReLU": parametric_relu,
    "Flatten": lambda layer, x: x.reshape(len(x), -1),
    "Reshape": lambda layer, x: x.reshape(len(x), *layer.target_shape),
    "Permute": lambda layer, x: x.transpose(0, *layer.dims),
    "ZeroPadding1D": padded,
    "ZeroPadding2D": padded,
    "Cropping1D": cropped,
    "Cropping2D": cropped,
    "UpSampling1D": upsampled,
    "UpSampling2D": upsampled,
    "RepeatVector": lambda layer, x: np.repeat(x[:, None], layer.n, axis=1),
    "Identity": identity,
    "Dropout": identity,
    "GaussianNoise": identity,
}

MERGES = {
    "Add": lambda layer, xs: sum(xs),
    "Subtract": lambda layer, xs: xs[0] - xs[1],
    "Average": lambda layer, xs: sum(xs) / len(xs),
    "Maximum": lambda layer, xs: np.maximum.reduce(xs),
    "Minimum": lambda layer, xs: np.minimum.reduce(xs),
    "Concatenate": lambda layer, xs: np.concatenate(xs, axis=layer.axis),
}


def axes(operation):
    axis = operation.axis
    return tuple(axis) if isinstance(axis, (list, tuple)) else axis


def padded_by(o, x, constant_values=None):
    if o.mode == "constant":
        return np.pad(x, o.pad_width, constant_values=c(constant_values or 0))
    return np.pad(x, o.pad_width, mode=o.mode)


def vector_norm(o, x):
    if o.ord == np.inf:
        return abs(x).max(axis=axes(o), keepdims=o.keepdims)
    if o.ord == 1:
        return abs(x).sum(axis=axes(o), keepdims=o.keepdims)
    return np.sqrt((x * x).sum(axis=axes(o), keepdims=o.keepdims))


def log_sum_exp(o, x):
    top = x.max(axis=axes(o), keepdims=True)
    y = top + np.log(np.exp(x - top).sum(axis=axes(o), keepdims=True))
    return y if o.keepdims else np.squeeze(y, axes(o))


OPERATIONS = {
    "Add": lambda o, a, b: a + b,
    "Subtract": lambda o, a, b: a - b,
    "Multiply": lambda o, a, b: a * b,
    "TrueDivide": lambda o, a, b: a / b,
    "Divide": lambda o, a, b: a / b,
    "Maximum": lambda o, a, b: np.maximum(a, b),
    "Minimum": lambda o, a, b: np.minimum(a, b),
    "Negative": lambda o, x: -x,
    "Absolute": lambda o, x: abs(x),
    "Abs": lambda o, x: abs(x),
    "Copy": lambda o, x: x,
    "StopGradient": lambda o, x: x,
    "Cast": lambda o, x: x,
    "Clip": lambda o, x: np.clip(x, c(o.x_min), c(o.x_max)),
    "Reshape": lambda o, x: x.reshape(len(x), *o.newshape[1:]),
    "Transpose": lambda o, x: x.transpose(o.axes),
    "Moveaxis": lambda o, x: np.moveaxis(x, o.source, o.destination),
    "Swapaxes": lambda o, x: np.swapaxes(x, o.axis1, o.axis2),
    "Flip": lambda o, x: np.flip(x, axes(o)),
    "Roll": lambda o, x: np.roll(x, o.shift, axes(o)),
    "Squeeze": lambda o, x: np.squeeze(x, axes(o)),
    "ExpandDims": lambda o, x: np.expand_dims(x, axes(o)),
    "Concatenate": lambda o, xs: np.concatenate(xs, axis=o.axis),
    "Stack": lambda o, xs: np.stack(xs, axis=o.axis),
    "Split": lambda o, x: np.split(x, o.indices_or_sections, axis=o.axis),
    "Pad": padded_by,
    "Repeat": lambda o, x: np.repeat(x, o.repeats, axis=o.axis),
    "Tile": lambda o, x: np.tile(x, o.repeats),
    "Take": lambda o, x, indices: np.take(x, np.asarray(indices, int), axis=o.axis),
    "Cumsum": lambda o, x: np.cumsum(x, axis=o.axis),
    "Sort": lambda o, x: np.sort(x, axis=o.axis),
    "Matmul": lambda o, a, b: np.matmul(a, b),
    "Dot": lambda o, a, b: np.dot(a, b),
    "Tensordot": lambda o, a, b: np.tensordot(a, b, o.axes),
    "Einsum": lambda o, a, b: np.einsum(o.subscripts, a, b),
    "Norm": vector_norm,
    "Logsumexp": log_sum_exp,
    "GetItem": lambda o, x, key: x[tuple(key) if isinstance(key, list) else key],
    "Sum": lambda o, x: x.sum(axis=axes(o), keepdims=o.keepdims),
    "Mean": lambda o, x: x.mean(axis=axes(o), keepdims=o.keepdims),
    "Max": lambda o, x: x.max(axis=axes(o), keepdims=o.keepdims),
    "Min": lambda o, x: x.min(axis=axes(o), keepdims=o.keepdims),
    "Relu": lambda o, x: np.maximum(x, 0),
    "Tanh": lambda o, x: np.tanh(x),
    "Silu": lambda o, x: ACTIVATIONS["silu"](x),
    "Gelu": lambda o, x: gelu_tanh(x) if o.approximate else ACTIVATIONS["gelu"](x),
    "LeakyRelu": lambda o, x: leaky(o.negative_slope)(x),
    "Elu": lambda o, x: elu(o.alpha)(x),
    "Sin": lambda o, x: np.sin(x),
    "Cos": lambda o, x: np.cos(x),
    "Arctan": lambda o, x: np.arctan(x),
    "Arcsinh": lambda o, x: np.sign(x) * np.arcsinh(abs(x)),
    "Erf": lambda o, x: erf(x),
    "ReLU": relu,
    "SoftShrink": lambda o, x: np.sign(x) * np.maximum(abs(x) - c(o.threshold), 0),
    "Squareplus": lambda o, x: (x + np.sqrt(x * x + c(o.b))) / 2,
    "SparsePlus": lambda o, x: ACTIVATIONS["sparse_plus"](x),
}


def _constant(value):
    if isinstance(value, float):
        return c(value)
    array = hasattr(value, "dtype") and np.asarray(keras.ops.convert_to_numpy(value))
    return array.astype("float64").astype(LONG) if array is not False else value


def step_values(step, values):
    """Outputs of one step, a list, from {index: array}."""
    args, kwargs = keras.tree.map_structure(
        lambda a: values[a.index] if isinstance(a, Value) else _constant(a),
        (step.args, step.kwargs),
    )
    if not isinstance(step.operation, keras.layers.Layer):
        outputs = OPERATIONS[step.kind](step.operation, *args, **kwargs)
    elif step.kind in MERGES:
        outputs = MERGES[step.kind](step.operation, args[0])
    else:
        outputs = LAYERS[step.kind](step.operation, args[0])
    return outputs if isinstance(outputs, list) else [outputs]


def evaluate(certifiable, x):
    """{index: array in longdouble} of every value of the model, softmax left out."""
    values = {0: np.asarray(x, "float64").astype(LONG)}
    for step in certifiable.steps:
        values.update(zip(step.outputs, step_values(step, values)))
    return values


def logits(certifiable, x):
    """The model's logits in longdouble."""
    index = certifiable.head.outputs[0] if certifiable.head else certifiable.body.output
    return evaluate(certifiable, x)[index]
