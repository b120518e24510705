"""Verified upper bounds of the l2 norms of convolutions, whatever the size of the image.

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
4. Grid. On N equidistant points an axis, the supremum is at most the maximum times the product over
   the axes of `1 / cos(pi d / (2 N))`, d + 1 the number of taps and N > d. Proof: let M be the
   supremum, attained at theta* with unit vectors u, v. Fix all coordinates but one. With a phase a,

       f(t) = Re(exp(-i a - i d t / 2) u* W^(t) v)

   has frequencies of at most d / 2 (f(2 t) is a trigonometric polynomial of degree d), |f| <= M,
   and f(t*) = M for the right a. M. Riesz: then f(t) >= M cos(d (t - t*) / 2) for |t - t*| <=
   pi / d, and some grid point (modulo 2 pi, the period of |u* W^ v|) is within pi / N of t*. There
   |u* W^ v| >= M cos(pi d / (2 N)). Fix that coordinate and go on with the next, from the supremum
   over it, which is no smaller.
   [Ehlich, Zeller 1964; Pfister, Bresler, arXiv 1802.09588]
5. Patches. The convolution is a matrix applied to patches, in which each entry occurs at most
   prod ceil(k / s) times; or a matrix to each entry, whose results overlap as often.
"""

import contextlib
import itertools
import math

import numpy as np
from threadpoolctl import threadpool_limits

from keras_lipnext.certification.norms import (
    UNIT_ROUNDOFF,
    _is_below,
    gamma,
    gram_error,
    real_array,
    remembered,
    scaled,
    spectral_norm_bound,
)

# What the grid may cost: operations in all, and numbers held at once.
_OPERATIONS = 1e11
_NUMBERS = 2**21


def convolution_norm_bound(kernel, strides=1, groups=1, dilation_rate=1):
    """Upper bound of the l2 norm of a convolution over images of any size, proven.

    For the paddings "valid", "same" (zeros) and causal; for circular padding if the strides divide
    the image's size. Exact to about 1e-9 if the strides reach over the kernel (patches, 1 x 1);
    else within about 0.1 %, or more for many channels, where a finer grid would take too long (for
    thousands, only note 5 is left).

    Args:
        kernel: Array of shape (*spatial, in_channels // groups, out_channels), 1 to 3 spatial axes.
        strides: Integer, or one for each spatial axis.
        groups: Integer, divides out_channels.
        dilation_rate: Integer, or one for each spatial axis. Changes the bound only where it has a
            factor in common with the strides.

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
    strides = tuple(s // math.gcd(s, d) for s, d in zip(strides, dilation_rate))
    (groups,) = _positive("groups", groups, 1)
    if w.shape[-1] % groups:
        raise ValueError(
            f"The groups must divide the output channels. Received: groups={groups}, "
            f"shape={w.shape}"
        )
    taps = [-(-k // s) for k, s in zip(w.shape, strides)]
    if groups == 1 and np.prod(taps) == 1:
        return spectral_norm_bound(w.reshape(-1, w.shape[-1]))
    return remembered(
        ("convolution", strides, groups),
        w,
        lambda: scaled(w, lambda w: _polyphase(w, strides, groups), lambda w: _bound(w, taps)),
    )


def depthwise_norm_bound(kernel, strides=1, dilation_rate=1):
    """Upper bound of the l2 norm of a depthwise convolution: the largest of its channels'.

    Args:
        kernel: Array of shape (*spatial, channels, depth_multiplier), 1 to 3 spatial axes.
        strides, dilation_rate, Returns, Raises: as `convolution_norm_bound`.
    """
    w = np.asarray(kernel)
    if not 3 <= w.ndim <= 5 or 0 in w.shape:
        raise ValueError(
            "A depthwise kernel has 1 to 3 spatial axes, channels and a multiplier. "
            f"Received: shape={w.shape}"
        )
    return convolution_norm_bound(
        w.reshape(*w.shape[:-2], 1, -1), strides, w.shape[-2], dilation_rate
    )


def _positive(name, value, count):
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(values) != count or any(v != int(v) or v < 1 for v in values):
        raise ValueError(f"{name} must be {count} positive integers. Received: {name}={value}")
    return tuple(map(int, values))


def _polyphase(w, strides, groups):
    """The kernel as stride-1 taps: (groups, taps, a, b) with b <= a (transposed if need be)."""
    spatial, taps = w.shape[:-2], [-(-k // s) for k, s in zip(w.shape, strides)]
    w = np.pad(w, [(0, t * s - k) for t, s, k in zip(taps, strides, spatial)] + [(0, 0)] * 2)
    w = w.reshape(*(n for pair in zip(taps, strides) for n in pair), *w.shape[-2:])
    axes = range(len(spatial))
    w = w.transpose([2 * i for i in axes] + [2 * i + 1 for i in axes] + [w.ndim - 2, w.ndim - 1])
    w = w.reshape(np.prod(taps), -1, groups, w.shape[-1] // groups).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(w.swapaxes(2, 3) if w.shape[2] < w.shape[3] else w)


def _bound(w, taps):
    groups, count, a, b = w.shape
    norm = _largest_norm(w.reshape(groups, count * a, b))
    if count == 1:
        return norm
    norm = min(norm, _largest_norm(w.transpose(0, 2, 1, 3).reshape(groups, a, count * b)))
    return min(np.sqrt(count) * norm * (1 + 4 * UNIT_ROUNDOFF), _symbol_bound(w, taps))


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
        elif not (square and _is_below(grams, square, error)):
            square = max(square, _raised(grams, error, margin))
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


def _grid(taps, cost):
    """Numbers of grid points of the axes, and the factor of note 4."""
    excess = 1e-3
    while True:
        # N = c d on each axis makes each axis contribute alike.
        c = np.pi / 2 / np.arccos((1 + excess) ** (-1 / len(taps)))
        sizes = [max(int(np.ceil(c * (t - 1))), t) for t in taps]
        if np.prod(sizes, dtype=float) / 2 * cost <= _OPERATIONS or excess > 0.25:
            break
        excess *= 1.25
    # The cosines' errors are relative ones of a few u: N > d keeps them away from 0.
    factors = [1 / np.cos(np.pi / 2 * ((t - 1) / n)) for t, n in zip(taps, sizes)]
    return sizes, float(np.prod(factors)) * (1 + 2**10 * UNIT_ROUNDOFF)


def _symbol_bound(w, taps):
    groups, count, a, b = w.shape
    terms = (np.prod([2 * t - 1 for t in taps]) + 1) // 2
    cost = groups * (4 * terms * b**2 + 4 / 3 * b**3 + (3e5 if b > 1 else 1e2))
    cost += 500 * terms + 3e4  # waves and points
    sizes, factor = _grid(taps, cost)
    if np.prod(sizes, dtype=float) / 2 * cost > 16 * _OPERATIONS:
        return np.inf
    # Rounding of the real and of the imaginary part of W^* W^: gamma(count a) for the correlations,
    # u for their sums with the transposes, 20 u for cosines and sines (below), gamma(terms) for the
    # sum; all entrywise relative to B^T B, B = sum_t |W[t]|. sqrt(2) < 1.5 for the two parts.
    size = _largest_gram(np.abs(w).sum(1))
    error = gram_error(count * a + terms + 24, 1.5 * size)
    # Several BLAS threads gain nothing on thousands of small factorisations, and lose a factor of
    # 20 and more while the cores are busy. Below 32 rows BLAS starts none.
    one_thread = threadpool_limits(1, "blas") if b >= 32 else contextlib.nullcontext()
    with one_thread:
        square = _largest_square(_symbol_grams(w, taps, sizes), error, (factor - 1) / 10)
    return factor * np.sqrt(square) * (1 + 4 * UNIT_ROUNDOFF)


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
