"""Diagonal matrices T with W^T W <= T, of which SDP-based Lipschitz layers are made.

With any such T and an activation of slope in [0, 1],

    W T^(-1/2) x   and   x - 2 W T^-1 sigma(W^T x + b)   are 1-Lipschitz.

One condition, several members, by what T is:

    spectral     ||W||^2 I                      (linear: spectral normalisation, residual: CPL)
    aol          sum_j |W^T W|_ij               (AOL)
    sll          sum_j |W^T W|_ij q_j / q_i     (SLL, q > 0 learned)
    orthogonal   I, as W^T W = I or W W^T = I

For a convolution W^T W is the correlation of the kernel with itself, and |W^T W| the sum of its
magnitudes over all offsets: Gershgorin's circles of the infinite convolution, of which zero
padding, a stride and wrapping around are restrictions or foldings.

T is a little larger than these formulas, by amounts that belong to its definition: by a factor
`guard(operations)` for what float32 loses in them, and by `UNIT**2` where T is in units of the
largest |W|^2, which keeps columns that are 0 or tiny from being divided by 0. So the constant is at
most 1 in real arithmetic.

The guard. With u = 2^-24, a sum of n products loses at most ((1 - u)^-n - 1) of what their
magnitudes add up to, in any order, and can lose that much if the terms have one sign: constant
columns do. So T, computed in float32, is no smaller than without guard and rounding if each entry
of W^T W is a sum of terms of one sign. Where terms cancel the losses are of either sign, about
u |w_i| |w_j| each and sqrt(m) u in norm relative to diag(|w_i|^2) <= T, m columns: within the
guard, which counts m operations and more, too. That is no proof: `certify` proves what it needs in
float64 and does not rely on it.

Reference: Araujo et al. (ICLR 2023), arXiv 2303.03169; Meunier et al. (ICML 2022), 2110.12690
(CPL); Prach, Lampert (ECCV 2022), 2208.03160 (AOL); Delattre et al. (ICML 2023), 2305.16173 (Gram
iteration). What is added for rounding is ours.
"""

import math
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_lipnext import backend
from keras_lipnext.typing import Tensor

BOUNDS = ("spectral", "aol", "sll", "orthogonal")
UNIT = 2.0**-23  # of float32, in whatever dtype T is computed: it is part of T's definition
Q_RANGE = 20.0  # log q is clipped to +-this: any q > 0 is valid
SQUARINGS = 10  # Gram iteration: ||W||^2 too large by a factor of at most n^(2^-11), n columns
GRID = 6  # points of the symbol's grid an axis, times the kernel's degree
SMALLEST = 2.0**-100  # a kernel with no entry above this counts as 0


def guard(operations: int) -> float:
    """The factor that makes up for as many roundings of float32: (1 - u)^-n, about exp(n u)."""
    return math.exp(operations * UNIT / 2)


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is that: T is never computed in half precision."""
    x = ops.convert_to_tensor(x)
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")


@backend.one_program
def scaled(w: Tensor) -> tuple[Tensor, Tensor]:
    """(w / s, s) with s the largest magnitude: both W T^(-1/2) and W T^-1 s do not depend on s."""
    largest = ops.max(ops.abs(ops.stop_gradient(w)))
    s = ops.where(largest > SMALLEST, largest, ops.ones_like(largest))
    return w / s, s


@backend.one_program
def inverse_diagonal(w: Tensor, log_q: Tensor | None = None, *, bound: str) -> Tensor:
    """1 / T of a scaled W, shape (columns,).

    Args:
        w: Shape (*spatial, rows, columns); without spatial axes a matrix, else a convolution's
            kernel, which takes `columns` channels to `rows` or, as its adjoint, back.
        log_q: Shape (columns,), for "sll".
        bound: "spectral", "aol" or "sll".
    """
    if bound == "spectral":
        return ops.ones_like(w[(0,) * (len(w.shape) - 1)]) / (_spectral(w) + UNIT**2)
    return 1 / (_row_sums(w, log_q) + UNIT**2)


def _row_sums(w: Tensor, log_q: Tensor | None) -> Tensor:
    magnitudes, offsets = _correlation(w)
    # Of one entry: its products, the sum over offsets and over the columns, a few operations more.
    operations = math.prod(w.shape[:-1]) + offsets + w.shape[-1] + 64
    magnitudes = magnitudes * guard(operations)
    if log_q is None:
        return ops.sum(magnitudes, axis=1)
    # Common factors of q cancel. Taking the mean of log q out first would not: it may be as far off
    # as the largest of them, and move the others across the range.
    q = ops.exp(ops.clip(log_q, -Q_RANGE, Q_RANGE))
    return backend.matmul(magnitudes, q[:, None])[:, 0] / q


def _correlation(w: Tensor) -> tuple[Tensor, int]:
    """(|W^T W| summed over all offsets, number of offsets).

    Offset by offset, as matrix products: a convolution would also multiply with the padding.
    """
    if len(w.shape) == 2:
        w = w[None, None]
    height, width, _, columns = w.shape
    half = [(y, x) for y in range(height) for x in range(1 - width, width) if y > 0 or x >= 0]
    magnitudes = 0
    for y, x in half:
        moved = w[y:, max(x, 0) : width + min(x, 0)]
        still = w[: height - y, max(-x, 0) : width - max(x, 0)]
        moved, still = (ops.reshape(a, (-1, columns)) for a in (moved, still))
        products = ops.abs(backend.matmul(ops.transpose(moved), still))
        # The opposite offset's is the transpose.
        magnitudes = magnitudes + (
            products if (y, x) == (0, 0) else products + ops.transpose(products)
        )
    return magnitudes, 2 * len(half) - 1


def _spectral(w: Tensor) -> Tensor:
    """||W||^2, from above: lambda <= ||G^(2^k)||_F^(2^-k), squared and scaled k times.

    Of a convolution the largest of its symbol's on a grid, times what can lie between the points
    (norms/convolutions.py, note 4).
    """
    if len(w.shape) == 2:
        if w.shape[0] < w.shape[1]:
            w = ops.transpose(w)
        parts, factor = (backend.matmul(ops.transpose(w), w)[None],), 1.0
        operations = sum(w.shape)
    else:
        if w.shape[2] < w.shape[3]:  # the symbol's adjoint, of the same norm
            w = ops.transpose(w, (0, 1, 3, 2))
        parts, factor = _symbol_grams(w)
        # W^(theta) counts twice in its Gram matrix; sqrt(2) for real and imaginary parts.
        operations = 3 * (math.prod(w.shape[:2]) + w.shape[2] + w.shape[3])
    first = root = _root(parts)
    logarithm = 0.0
    for index in range(1, SQUARINGS + 1):
        parts = _squared([p / root[:, None, None] for p in parts])
        root = _root(parts)
        logarithm = logarithm + ops.log(root) / 2**index
    # Whatever `root` is divided by is multiplied with again, so that only the last one's rounding
    # counts, 2^-10 of it; each squaring counts half as much as the one before, and the logarithms
    # are at most log(columns).
    return factor * guard(operations + 128) * ops.max(first * ops.exp(logarithm))


def _root(parts: Sequence[Tensor]) -> Tensor:
    """Frobenius norms of a stack. The addend keeps that of 0, and its gradient, finite."""
    return ops.sqrt(sum(ops.sum(ops.sum(p * p, axis=2), axis=1) for p in parts) + UNIT**4)


def _squared(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The square of symmetric matrices, or of Hermitian ones as (real, imaginary) parts."""
    real, *imaginary = parts
    if not imaginary:
        return (backend.matmul(real, real),)
    (imaginary,) = imaginary
    cross = backend.matmul(real, imaginary)
    # (A + iB)^2 with A symmetric and B antisymmetric: AB + BA = AB - (AB)^T.
    return (
        backend.matmul(real, real) - backend.matmul(imaginary, imaginary),
        cross - ops.transpose(cross, (0, 2, 1)),
    )


def _symbol_grams(w: Tensor) -> tuple[tuple[Tensor, ...], float]:
    """((real, imaginary) of W^(theta)* W^(theta) on half a grid, the factor of the grid)."""
    height, width, rows, columns = w.shape
    sizes = [max(GRID * (k - 1), 1) for k in (height, width)]
    points = np.indices(sizes).reshape(2, -1).T
    mirrored = np.ravel_multi_index((-points % sizes).T, sizes)
    points = points[np.ravel_multi_index(points.T, sizes) <= mirrored]  # the others' conjugates
    taps = np.indices((height, width)).reshape(2, -1).T
    angles = 2 * np.pi * (points / sizes) @ taps.T
    flat = ops.reshape(w, (height * width, rows * columns))
    real, imaginary = (
        ops.reshape(
            backend.matmul(ops.cast(wave(angles), w.dtype), flat), (len(points), rows, columns)
        )
        for wave in (np.cos, np.sin)
    )
    adjoint, other = (ops.transpose(x, (0, 2, 1)) for x in (real, imaginary))
    parts = (
        backend.matmul(adjoint, real) + backend.matmul(other, imaginary),
        backend.matmul(adjoint, imaginary) - backend.matmul(other, real),
    )
    factor = math.prod(
        1 / math.cos(math.pi * (k - 1) / (2 * n)) ** 2 for k, n in zip((height, width), sizes)
    )
    return parts, factor
