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

import contextlib
import math
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops
from threadpoolctl import threadpool_limits

from keras_lipnext.backend import matmul
from keras_lipnext.manifolds.fast_exp import fast_exp
from keras_lipnext.manifolds.polar import (
    at_least_float32,
    gram_defect,
    polar,
    polar_of_regular,
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
    """Polar retraction of the tangent vector `u` at `x`: the nearest point to `x + u`.

    (X + U)^T (X + U) = I + U^T U: no singular value is below 1. Of a `u` that is not tangent take
    `projx(x + u)`, which heeds singular matrices.
    """
    return polar_of_regular(x + u)


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
    """Random point, drawn by NumPy: the same for a seed on every backend and device.

    Uniformly distributed (QR of a Gaussian matrix) up to `STRUCTURED_FROM` rows. Above, where QR
    would take minutes for a large model, random columns of a Kronecker product of two uniformly
    distributed orthogonal matrices, with random row order and signs: also exactly orthonormal and
    dense, in O(m n) operations.

    Args:
        shape: Tuple (m, n); wide shapes give orthonormal rows.
        seed: Integer or `keras.random.SeedGenerator`, whose next seed must be known: not inside a
            compiled function. None draws a fresh one.
        dtype: Floating point dtype of the result.

    Returns:
        Tensor of shape `shape`.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"A random point needs a shape (m, n) of positive sizes. Received: shape={shape}"
        )
    rows, columns = max(shape), min(shape)
    if isinstance(seed, keras.random.SeedGenerator):
        seed = ops.convert_to_numpy(seed.next())
    generator = np.random.default_rng(seed)
    working = at_least_float32(dtype)
    factor = _factor_near_sqrt(rows)
    if rows < STRUCTURED_FROM or factor < 16:
        x = ops.convert_to_tensor(_haar(rows, columns, generator, working))
    else:
        a = _haar(factor, factor, generator, working)
        b = _haar(rows // factor, rows // factor, generator, working)
        chosen = generator.permutation(rows)[:columns]
        order, signs = generator.permutation(rows), 2 * generator.integers(2, size=(rows, 1)) - 1
        # What is large is made on the device.
        a = ops.convert_to_tensor(np.take(a, chosen // (rows // factor), axis=1))
        b = ops.convert_to_tensor(np.take(b, chosen % (rows // factor), axis=1))
        x = ops.reshape(a[:, None, :] * b[None, :, :], (rows, columns))
        x = ops.take(x, order, axis=0) * ops.convert_to_tensor(signs, working)
    return ops.cast(transpose(x) if shape[0] < shape[1] else x, dtype)


def _haar(rows: int, columns: int, generator: np.random.Generator, dtype: str) -> np.ndarray:
    x = generator.standard_normal((rows, columns)).astype(dtype)
    # More threads gain little, lose much where the cores are busy, and may round otherwise.
    with threadpool_limits(1, "blas") if columns >= 32 else contextlib.nullcontext():
        q, r = np.linalg.qr(x)
    # Signs of R's diagonal make the factorisation unique and Q uniformly distributed.
    return q * np.where(np.diagonal(r) < 0, -1, 1).astype(dtype)


def _factor_near_sqrt(n: int) -> int:
    return next(f for f in range(math.isqrt(n), 0, -1) if n % f == 0)
