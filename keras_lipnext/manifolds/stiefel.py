"""The Stiefel manifold St(m, n) = { X in R^(m x n) : X^T X = I }, m >= n; O(n) is m = n.

Pure functions on tensors of any backend, with leading batch dimensions. A wide matrix (m < n) is
read as the transpose of a point: its rows are orthonormal. Vocabulary after geoopt: `projx` and
`proju` project onto the manifold and onto a tangent space, `retr` and `expmap` move along a
tangent vector.

Example:

```python
stiefel = keras_lipnext.manifolds.stiefel
x = stiefel.random((8, 4))
u = stiefel.proju(x, keras.random.normal((8, 4)))
stiefel.defect(stiefel.retr(x, 0.1 * u)), stiefel.defect(stiefel.expmap(x, 0.1 * u))
```
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lipnext.backend import matmul, one_program
from keras_lipnext.manifolds.fast_exp import fast_exp
from keras_lipnext.manifolds.polar import (
    at_least_float32,
    gram_defect,
    polar,
    skew,
    sym,
    tall,
    transpose,
)
from keras_lipnext.typing import Tensor

# From this size on a random point is drawn in O(m n) instead of O(m n^2) operations.
STRUCTURED_FROM = 2048


def projx(x: Tensor) -> Tensor:
    """Nearest point of the manifold: the polar factor of `x`."""
    return polar(x)


@tall
def proju(x: Tensor, u: Tensor, *, precision: str = "exact") -> Tensor:
    """Orthogonal projection of `u` onto the tangent space { U : X^T U skew } at `x`.

    `precision`: of the products on accelerators, as in `orthogonalize`.
    """
    return u - matmul(x, sym(matmul(transpose(x), u, precision)), precision)


@tall
def retr(x: Tensor, u: Tensor) -> Tensor:
    """Polar retraction of the tangent vector `u` at `x`: the nearest point to `x + u`."""
    return polar(x + u)


@tall
def expmap(x: Tensor, u: Tensor) -> Tensor:
    """Geodesic from `x` along the tangent vector `u`, at time 1, for the canonical metric.

    exp(W) X with the skew W = P U X^T - X U^T P, P = I - X X^T / 2, which satisfies W X = U.
    For a square X this is X exp(X^T U).
    """
    m, n = x.shape[-2:]
    if m == n:
        return matmul(x, fast_exp(skew(matmul(transpose(x), u))))
    pu = u - matmul(x, matmul(transpose(x), u)) / 2
    return matmul(fast_exp(2 * skew(matmul(pu, transpose(x)))), x)


@tall
def defect(x: Tensor) -> Tensor:
    """Distance from orthonormality, `max |X^T X - I|` over entries and batch: a scalar."""
    return ops.stop_gradient(ops.max(ops.abs(gram_defect(x))))


def random(
    shape: Sequence[int],
    seed: int | keras.random.SeedGenerator | None = None,
    dtype: str = "float32",
) -> Tensor:
    """Random point.

    Uniformly distributed (QR of a Gaussian matrix) up to `STRUCTURED_FROM` rows. Above, where QR
    would take minutes for a large model, random columns of a Kronecker product of two uniformly
    distributed orthogonal matrices, with random row order and signs: also exactly orthonormal and
    dense, in O(m n) operations.

    Args:
        shape: Tuple (m, n); wide shapes give orthonormal rows.
        seed: Integer or `keras.random.SeedGenerator`. None draws a fresh one.
        dtype: Floating point dtype of the result.

    Returns:
        Tensor of shape `shape`.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"A random point needs a shape (m, n) of positive sizes. Received: shape={shape}"
        )
    rows, columns = max(shape), min(shape)
    seeds = _seeds(seed)
    working = at_least_float32(dtype)
    factor = _factor_near_sqrt(rows)
    if rows < STRUCTURED_FROM or factor < 16:
        x = _haar(rows, columns, seeds, working)
    else:
        a = _haar(factor, factor, seeds, working)
        b = _haar(rows // factor, rows // factor, seeds, working)
        chosen = keras.random.shuffle(ops.arange(rows), seed=next(seeds))[:columns]
        a = ops.take(a, chosen // (rows // factor), axis=1)
        b = ops.take(b, chosen % (rows // factor), axis=1)
        x = ops.reshape(a[:, None, :] * b[None, :, :], (rows, columns))
        order = keras.random.shuffle(ops.arange(rows), seed=next(seeds))
        signs = 2 * keras.random.randint((rows, 1), 0, 2, seed=next(seeds)) - 1
        x = ops.take(x, order, axis=0) * ops.cast(signs, working)
    x = transpose(x) if shape[0] < shape[1] else x
    return ops.cast(x, dtype)


def _haar(rows: int, columns: int, seeds: Iterator[Any], dtype: str) -> Tensor:
    return _unique_q(keras.random.normal((rows, columns), dtype=dtype, seed=next(seeds)))


@one_program
def _unique_q(x: Tensor) -> Tensor:
    q, r = ops.qr(x)
    # Signs of R's diagonal make the factorisation unique and Q uniformly distributed.
    return q * ops.cast(ops.where(ops.diagonal(r) < 0, -1, 1), x.dtype)


def _seeds(seed: Any) -> Iterator[Any]:
    """Endless distinct seeds from one: keras.random repeats itself for a repeated integer."""
    if isinstance(seed, keras.random.SeedGenerator):
        while True:
            yield seed
    sequence = np.random.SeedSequence(seed)
    while True:
        yield int(sequence.spawn(1)[0].generate_state(1)[0] % (2**31))


def _factor_near_sqrt(n: int) -> int:
    return next(f for f in range(math.isqrt(n), 0, -1) if n % f == 0)
