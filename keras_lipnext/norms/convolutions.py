"""Verified upper bounds of the l2 norms of convolutions.

Notes 1 to 5 hold whatever the size of the image is.

1. Strides. With t = s q + r, `y[p] = sum_t W[t] x[p s + t]` is `sum_q W_q X[p + q]`, a convolution
   of stride 1 with ceil(k / s) taps over the blocks `X[p] = (x[p s + r])_r`. Regrouping entries
   is an isometry, so both have the same norm on l2(Z), zeros outside the image.
2. Size and padding. "valid", "same" and causal padding restrict the inputs and the outputs of that
   infinite convolution (shifted by some entries, an isometry): their norms are no larger. A
   circular one of size L samples its symbol at the roots of unity, if s divides L. If s does not,
   the last window wraps out of step and the bound does not hold.
3. Symbol. The infinite convolution's norm is the supremum over the torus of `||W^(theta)||_2`,
   `W^(theta) = sum_t W[t] exp(i t . theta)`. A dilation D evaluates it at D theta: the supremum
   stays. With a stride s, too, if s and D have no factor in common: with t = s q + r,
   `y[p] = sum_t W[t] x[s p + D t]` is `sum_q W_q X[p + D q]` over the blocks
   `X[p] = (x[s p + D r])_r`, and D r takes each remainder of s once. A common factor g only leaves
   out entries: `y` reads none but each g-th of `x`, by a stride s / g and a dilation D / g.
4. Grid. One axis, taps t = 0..d, N > d points theta_j = 2 pi j / N. Times a phase, the symbol is
   `sum_t W[t] exp(i m theta)` with m = t - d / 2. Let

       c(theta) = sum_{|l| <= n} lambda_l exp(i l theta) >= 0,   lambda_0 = 1,   n = N - d / 2 - 1.

   For even d, `mean_j c(theta - theta_j) exp(i m theta_j) = lambda_m exp(i m theta)`: of the
   frequencies l = m modulo N none but m is within n. With m = 0, the weights c / N are positive of
   sum 1. So the symbol at theta is a convex combination of those of the taps `W[t] / lambda_m` at
   the grid points, and its norm at most the largest of theirs. For odd d, m is a half integer: the
   same on the circle twice as long, in units of 1 / 2, where the symbol repeats but for its sign:
   2 N points, n = 2 N - d - 1, and lambda_{2 m}. Several axes: one after the other.
   As c we take Fejer's, |sum_j a_j exp(i j theta)|^2 with a_j = sin((j + 1) pi / (n + 2)), j <= n:
   `lambda_l = sum_j a_j a_{j + l} / sum_j a_j^2`, about 1 - (l pi / (n + 2))^2 / 2: the middle
   tap, often the largest, stays as it is. [Fejer 1916; Polya, Szego, Part VI, problem 52]
5. Patches. The convolution is a matrix applied to patches, in which each entry occurs at most
   prod ceil(k / s) times; or a matrix to each entry, whose results overlap as often.
6. Small images. The convolution of an image of known size is a matrix of moderate size, whose norm
   is found within 1e-9: padding, strides and dilation as they are.
"""

import contextlib
import itertools
import math

import numpy as np
from threadpoolctl import threadpool_limits

from keras_lipnext.norms.convolution_matrix import convolution_matrices, output_sides
from keras_lipnext.norms.matrices import (
    _is_below,
    gram_error,
    real_array,
    remembered,
    scaled,
    spectral_norm_bound,
)
from keras_lipnext.norms.roundoff import UNIT_ROUNDOFF, gamma

# What the grid may cost: operations in all, and numbers held at once.
_OPERATIONS = 2e10
_NUMBERS = 2**21
# Largest matrices of small images: the smaller side, and the entries of all groups.
_SIDE = 2048
_ENTRIES = 2**23


def convolution_norm_bound(
    kernel, strides=1, groups=1, dilation_rate=1, sides=None, padding=None, excess=1e-3
):
    """Upper bound of the l2 norm of a convolution, proven.

    Over images of any size, for the paddings "valid", "same" (zeros) and causal; for circular
    padding if the strides divide the image's size. Exact to about 1e-9 if the strides reach over
    the kernel (patches, 1 x 1) or if `sides` are given and small; else within about `excess`, or
    more for many channels, where a finer grid would take too long (1 % at 256, 4 % at 512; for
    thousands, only note 5 is left).

    Args:
        kernel: Array of shape (*spatial, in_channels // groups, out_channels), 1 to 3 spatial axes.
        strides: Integer, or one for each spatial axis.
        groups: Integer, divides out_channels.
        dilation_rate: Integer, or one for each spatial axis. Changes the bound of images of any
            size only where it has a factor in common with the strides.
        sides: The spatial sides of the images; None, or one of them None, if any may come.
        padding: "valid", "same" or "causal", as Keras means them; with `sides`.
        excess: What the bound may be too large by, relatively, to be found faster.

    Returns:
        Float.

    Raises:
        ValueError: for shapes, strides or groups that do not fit, non-finite entries, or if the
            norm may overflow.
    """
    w = real_array(kernel)
    if not 3 <= w.ndim <= 5 or 0 in w.shape:
        raise ValueError(
            "A convolution's kernel has 1 to 3 spatial axes, input and output channels. "
            f"Received: shape={w.shape}"
        )
    strides = _positive("strides", strides, w.ndim - 2)
    dilation_rate = _positive("dilation_rate", dilation_rate, w.ndim - 2)
    (groups,) = _positive("groups", groups, 1)
    if w.shape[-1] % groups:
        raise ValueError(
            f"The groups must divide the output channels. Received: groups={groups}, "
            f"shape={w.shape}"
        )
    small = _small_matrices(w, strides, groups, dilation_rate, sides, padding)
    if small is not None:
        name = ("small images", strides, groups, dilation_rate, tuple(sides), padding)
        return remembered(name, w, lambda: scaled(w, small, _largest_norm))
    strides = tuple(s // math.gcd(s, d) for s, d in zip(strides, dilation_rate))
    taps = [-(-k // s) for k, s in zip(w.shape, strides)]
    if groups == 1 and np.prod(taps) == 1:
        return spectral_norm_bound(w.reshape(-1, w.shape[-1]))
    return remembered(
        ("convolution", strides, groups, excess),
        w,
        lambda: scaled(
            w, lambda w: _polyphase(w, strides, groups), lambda w: _bound(w, taps, excess)
        ),
    )


def depthwise_norm_bound(kernel, strides=1, dilation_rate=1, sides=None, padding=None):
    """Upper bound of the l2 norm of a depthwise convolution: the largest of its channels'.

    Args:
        kernel: Array of shape (*spatial, channels, depth_multiplier), 1 to 3 spatial axes.
        strides, dilation_rate, sides, padding, Returns, Raises: as `convolution_norm_bound`.
    """
    w = np.asarray(kernel)
    if not 3 <= w.ndim <= 5 or 0 in w.shape:
        raise ValueError(
            "A depthwise kernel has 1 to 3 spatial axes, channels and a multiplier. "
            f"Received: shape={w.shape}"
        )
    return convolution_norm_bound(
        w.reshape(*w.shape[:-2], 1, -1), strides, w.shape[-2], dilation_rate, sides, padding
    )


def _positive(name, value, count):
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(values) != count or any(v != int(v) or v < 1 for v in values):
        raise ValueError(f"{name} must be {count} positive integers. Received: {name}={value}")
    return tuple(map(int, values))


def _small_matrices(w, strides, groups, dilation_rate, sides, padding):
    """Function that makes the matrices of note 6 of a kernel, or None if they are too large."""
    if sides is None or None in sides or padding not in ("valid", "same", "causal"):
        return None
    outputs = output_sides(w, sides, strides, padding, dilation_rate)
    rows = math.prod(sides) * w.shape[-2]
    columns = math.prod(outputs) * (w.shape[-1] // groups)
    if not columns or min(rows, columns) > _SIDE or groups * rows * columns > _ENTRIES:
        return None
    return lambda w: convolution_matrices(w, sides, strides, padding, dilation_rate, groups)


def _polyphase(w, strides, groups):
    """The kernel as stride-1 taps: (groups, taps, a, b) with b <= a (transposed if need be)."""
    spatial, taps = w.shape[:-2], [-(-k // s) for k, s in zip(w.shape, strides)]
    w = np.pad(w, [(0, t * s - k) for t, s, k in zip(taps, strides, spatial)] + [(0, 0)] * 2)
    w = w.reshape(*(n for pair in zip(taps, strides) for n in pair), *w.shape[-2:])
    axes = range(len(spatial))
    w = w.transpose([2 * i for i in axes] + [2 * i + 1 for i in axes] + [w.ndim - 2, w.ndim - 1])
    w = w.reshape(np.prod(taps), -1, groups, w.shape[-1] // groups).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(w.swapaxes(2, 3) if w.shape[2] < w.shape[3] else w)


def _bound(w, taps, excess):
    groups, count, a, b = w.shape
    norm = _largest_norm(w.reshape(groups, count * a, b))
    if count == 1:
        return norm
    norm = min(norm, _largest_norm(w.transpose(0, 2, 1, 3).reshape(groups, a, count * b)))
    return min(np.sqrt(count) * norm * (1 + 4 * UNIT_ROUNDOFF), _symbol_bound(w, taps, excess))


def _largest_norm(matrices):
    """Bound of the largest spectral norm among matrices (batch, m, n)."""
    if len(matrices) == 1:
        return spectral_norm_bound(matrices[0])
    if matrices.shape[1] < matrices.shape[2]:
        matrices = matrices.swapaxes(1, 2)
    _, m, n = matrices.shape
    magnitudes = np.abs(matrices)
    error = gram_error(m, _largest_gram(magnitudes))
    chunk = max(1, _NUMBERS // (m * n + 4 * n * n))
    chunks = (matrices[i : i + chunk] for i in range(0, len(matrices), chunk))
    grams = (c.swapaxes(1, 2) @ c for c in chunks)
    return np.sqrt(_largest_square(grams, error, 0.0)) * (1 + 2 * UNIT_ROUNDOFF)


def _largest_gram(magnitudes):
    """The largest `||W^T W||_2` among nonnegative matrices, at most, up to rounding."""
    sums = magnitudes.sum(-1, keepdims=True)
    return (magnitudes.swapaxes(-1, -2) @ sums).max()


def _largest_square(batches, error, margin):
    """Bound of the largest eigenvalue of all Gram matrices, each known within `error`.

    One common square for all, raised by `margin` (relatively) over the eigenvalues of a batch that
    is not below it yet: in random order that is seldom.
    """
    square = 0.0
    for grams in batches:
        n = grams.shape[-1]
        if n == 1:
            square = max(square, float(grams.max()) + error)
            continue
        # Large ones each by itself: eigenvalues of those that are not below cost the most.
        for part in np.split(grams, len(grams)) if n >= 64 else (grams,):
            if not (square and _is_below(part, square, error)):
                square = max(square, _raised(part, error, margin))
    return square * (1 + 4 * UNIT_ROUNDOFF)


def _raised(grams, error, margin):
    n = grams.shape[-1]
    traces = np.trace(grams, axis1=-2, axis2=-1).real
    # The trace of a true Gram matrix is no less than its largest eigenvalue.
    frobenius = float(traces.max()) * (1 + 2 * gamma(n)) + n * error
    try:
        top = float(np.linalg.eigvalsh(grams)[..., -1].max())
    except np.linalg.LinAlgError:
        return frobenius
    spread = n * top - traces.min()
    slack = 4 * gamma(n + 2) * max(spread, 0) + 2 * error
    slack += (margin + (8 * n + 16) * UNIT_ROUNDOFF) * top
    for _ in range(8):
        if _is_below(grams, top + slack, error):
            return top + slack
        slack *= 4
    return frobenius


def _weights(count, points):
    """The `1 / lambda` of note 4, for each of `count` taps on a grid of `points` > count - 1."""
    double = count % 2 == 0  # odd degree: half integers
    n = 2 * points - count if double else points - (count - 1) // 2 - 1
    a = np.sin(np.arange(1, n + 2) * (np.pi / (n + 2)))
    places = [abs(2 * t - count + 1) // (1 if double else 2) for t in range(count)]
    return (a @ a) / np.array([a[: n + 1 - m] @ a[m:] for m in places])


def _grid(energies, cost, excess):
    """(numbers of grid points of the axes, weights of the taps), for an excess that is affordable.

    Args:
        energies: The squares of the taps' Frobenius norms, shape (*taps).
        cost: Of one point.
        excess: By how much the norm of all taps together may grow.
    """
    taps = energies.shape
    while True:
        c = 1.0  # N = c d on each axis makes each axis contribute alike.
        while True:
            sizes = [max(math.ceil(c * (t - 1)), t) for t in taps]
            weights = np.ones(())
            for t, n in zip(taps, sizes):
                weights = np.multiply.outer(weights, _weights(t, n))
            grown = np.sqrt((weights**2 * energies).sum() / energies.sum())
            if grown <= 1 + excess and weights.max() <= 16:
                break
            c *= 1.05
        if np.prod(sizes, dtype=float) / 2 * cost <= _OPERATIONS or excess > 0.25:
            return sizes, weights
        excess *= 1.25


def _symbol_bound(w, taps, excess=1e-3):
    groups, count, a, b = w.shape
    terms = (np.prod([2 * t - 1 for t in taps]) + 1) // 2
    cost = groups * (4 * terms * b**2 + 4 / 3 * b**3 + (3e5 if b > 1 else 1e2))
    cost += 500 * terms + 3e4  # waves and points
    energies = np.einsum("gtab,gtab->t", w, w).reshape(taps)
    sizes, weights = _grid(energies, cost, excess)
    if np.prod(sizes, dtype=float) / 2 * cost > 16 * _OPERATIONS:
        return np.inf
    w = w * weights.reshape(-1, 1, 1)
    # Rounding of the real and of the imaginary part of W^* W: gamma(count a) for the correlations,
    # u for their sums with the transposes, 20 u for cosines and sines (below), gamma(terms) for the
    # sum; all entrywise relative to B^T B, B = sum_t |W[t]|. sqrt(2) < 1.5 for the two parts.
    # Twice the weights' error: on each axis sines off by 8 u change lambda >= 1 / 16 by 18 u, and
    # its two sums of positive numbers have less than 2 N terms.
    size = _largest_gram(np.abs(w).sum(1))
    error = gram_error(count * a + terms + 24 + 8 * sum(sizes) + 2**11, 1.5 * size)
    # Several BLAS threads gain nothing on thousands of small factorisations, and lose a factor of
    # 20 and more while the cores are busy. Below 32 rows BLAS starts none.
    one_thread = threadpool_limits(1, "blas") if b >= 32 else contextlib.nullcontext()
    with one_thread:
        square = _largest_square(_symbol_grams(w, taps, sizes), error, excess / 10)
    return np.sqrt(square) * (1 + 4 * UNIT_ROUNDOFF)


def _symbol_grams(w, taps, sizes):
    """Yields `W^(theta)* W^(theta)` of all groups for half of the grid: (batch, b, b), Hermitian.

    With the correlations R_d = sum_t W[t]^T W[t + d] it is R_0 + sum_d (R_d + R_d^T) cos(d . theta)
    + i (R_d - R_d^T) sin(d . theta), d over one of each pair d, -d. At -theta it is the conjugate.
    """
    groups, _, a, b = w.shape
    w = w.reshape(groups, *taps, a, b)
    offsets, even, odd = [], [], []
    for d in itertools.product(*(range(1 - t, t) for t in taps)):
        if d < (0,) * len(d):
            continue
        first = w[(slice(None), *(slice(max(0, -i), t - max(0, i)) for i, t in zip(d, taps)))]
        second = w[(slice(None), *(slice(max(0, i), t - max(0, -i)) for i, t in zip(d, taps)))]
        first, second = (x.reshape(groups, -1, b) for x in (first, second))
        correlation = first.swapaxes(1, 2) @ second
        transposed = correlation.swapaxes(1, 2)
        offsets.append(d)
        # R_0 once: half of it and half of its transpose, in case they differ by rounding.
        even.append((correlation + transposed) * (0.5 if d == (0,) * len(d) else 1.0))
        odd.append(correlation - transposed)
    even, odd = (np.stack(x).reshape(len(offsets), -1) for x in (even, odd))
    points = np.indices(sizes).reshape(len(sizes), -1).T
    mirrored = np.ravel_multi_index((-points % sizes).T, sizes)
    points = points[np.ravel_multi_index(points.T, sizes) <= mirrored]
    points = np.random.default_rng(0).permutation(points)
    # d . theta = 2 pi p / L with integers p: reduced exactly to |p| <= L / 2, the angle is off by
    # 3 u |angle| < 10 u, its cosine by no more, and the function itself by 4 ulp <= 8 u.
    common = int(np.lcm.reduce(sizes))
    steps = np.array(offsets) * [common // n for n in sizes]
    chunk = max(1, min(_NUMBERS // (groups * b * b + len(offsets)), len(points) // 16))
    for start in range(0, len(points), chunk):
        phases = points[start : start + chunk] @ steps.T % common
        angles = 2 * np.pi * ((phases - common * (2 * phases > common)) / common)
        if b == 1:
            yield (np.cos(angles) @ even).reshape(-1, 1, 1)
            continue
        grams = np.empty((len(phases) * groups, b, b), "complex128")
        grams.real = (np.cos(angles) @ even).reshape(grams.shape)
        grams.imag = (np.sin(angles) @ odd).reshape(grams.shape)
        yield grams
