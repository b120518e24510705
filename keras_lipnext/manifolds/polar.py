"""Polar projection: the nearest matrix with orthonormal columns (rows, if the matrix is wide).

For `X = U S V^T` the nearest point of the Stiefel manifold in every unitarily invariant norm is
the polar factor `U V^T`. Newton-Schulz reaches it with matrix products only:

    X <- X (3 I - X^T X) / 2

An eigenvalue `1 + e` of `X^T X` becomes `1 - 3/4 e^2 + 1/4 e^3`: for |e| <= 1 the defect is at
least squared by each step. All functions accept leading batch dimensions and either orientation.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import keras
from keras import ops

from keras_lipnext import backend
from keras_lipnext.backend import matmul, one_of
from keras_lipnext.typing import Tensor

P = ParamSpec("P")

EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}


def sym(a: Tensor) -> Tensor:
    return (a + transpose(a)) / 2


def skew(a: Tensor) -> Tensor:
    return (a - transpose(a)) / 2


def transpose(a: Tensor) -> Tensor:
    return ops.swapaxes(a, -1, -2)


def tall(fn: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Lets `fn`, written for matrices with orthonormal columns, accept orthonormal rows too.

    Arithmetic is done in float32 at least: half precision cannot represent an orthogonal matrix
    (and no backend decomposes half-precision matrices).
    """

    @functools.wraps(fn)
    def wrapper(*matrices: Any, **options: Any) -> Tensor:
        matrices = tuple(ops.convert_to_tensor(backend.value(a)) for a in matrices)
        if len(matrices[0].shape) < 2:
            raise ValueError(
                f"`{fn.__name__}` expects matrices, shape (..., rows, columns). "
                f"Received: shape={tuple(matrices[0].shape)}"
            )
        dtype = dtype_of(matrices[0])
        if not keras.backend.is_float_dtype(dtype):
            raise ValueError(f"`{fn.__name__}` expects floating point. Received: dtype={dtype}")
        matrices = tuple(ops.cast(a, at_least_float32(dtype)) for a in matrices)
        wide = matrices[0].shape[-2] < matrices[0].shape[-1]
        result = fn(*(map(transpose, matrices) if wide else matrices), **options)
        if len(result.shape) >= 2 and wide:
            result = transpose(result)
        return ops.cast(result, dtype)

    return wrapper


def at_least_float32(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def dtype_of(x: Tensor) -> str:
    return keras.backend.standardize_dtype(x.dtype)


def gram_defect(x: Tensor) -> Tensor:
    """`X^T X - I`."""
    return matmul(transpose(x), x) - ops.eye(x.shape[-1], dtype=x.dtype)


def frobenius(a: Tensor) -> Tensor:
    """Largest Frobenius norm in a batch of matrices, those that are not finite left out."""
    return largest_finite(ops.sqrt(ops.sum(ops.square(a), axis=(-2, -1))))


def largest_finite(values: Tensor) -> Tensor:
    """The largest finite one of non-negative values, 0 if there is none: a scalar.

    One member of a batch that is not finite must not decide what is done to the others.
    """
    return ops.max(ops.where(ops.isfinite(values), values, ops.zeros_like(values)))


@tall
def polar_svd(x: Tensor) -> Tensor:
    """Polar factor by singular value decomposition: the exact reference.

    Example:

    ```python
    keras_lipnext.manifolds.polar_svd(keras.random.normal((8, 4)))
    ```
    """
    u, _, vh = ops.svd(x, full_matrices=False)
    return matmul(u, vh)


def newton_schulz(x: Tensor, steps: int, defect: Tensor | None = None) -> Tensor:
    """`steps` Newton-Schulz iterations on `x`, shape (..., m, n) with m >= n.

    `defect` is `gram_defect(x)`, if known.

    Example:

    ```python
    x = keras_lipnext.manifolds.stiefel.random((8, 4)) * 0.9
    keras_lipnext.manifolds.newton_schulz(x, steps=4)
    ```
    """
    for _ in range(steps):
        x = x - matmul(x, gram_defect(x) if defect is None else defect) / 2
        defect = None
    return x


# The most steps to be waited for before a matrix is decomposed: what the slowest convergence takes,
# of singular values 1e-4 times the largest.
_MOST_STEPS = 30
# Of matrices that are not, where steps grow small singular values by half each.
_MOST_STEPS_OF_REGULAR = 60


def _close(defect: Tensor) -> Tensor:
    """Whether one Newton-Schulz step, which squares the defect, leaves working precision."""
    return frobenius(defect) <= (4 * EPSILON[dtype_of(defect)]) ** 0.5


def _measured(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(whether it is close, `x`, its defect)."""
    # Squares of large entries overflow, those of small ones vanish. Of orthonormal columns the
    # largest entry lies between 1 / sqrt(m) and 1.
    largest = ops.max(ops.abs(x), axis=(-2, -1), keepdims=True)
    small = ops.logical_and(largest > 0, largest < 0.5 / x.shape[-2] ** 0.5)
    x = x / ops.where(small, largest, ops.maximum(largest, 1))
    defect = gram_defect(x)
    return _close(defect), x, defect


def _last_step(x: Tensor, defect: Tensor) -> Tensor:
    return newton_schulz(x, 1, defect)


def _until_close(x: Tensor, defect: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`x` after Newton-Schulz steps, none if it is close already, and what defect they leave."""
    # Steps converge from ||E||_2 <= 1. Else the largest absolute row sum bounds ||X^T X||_2, and X
    # is scaled by that, its defect measured anew: it is small beside the I that was subtracted.
    norm = ops.sqrt(ops.sum(ops.square(defect), axis=(-2, -1), keepdims=True))
    gram = defect + ops.eye(x.shape[-1], dtype=x.dtype)
    bound = ops.max(ops.sum(ops.abs(gram), axis=-1, keepdims=True), axis=-2, keepdims=True)
    x = x / ops.sqrt(ops.where(ops.logical_and(norm > 1, bound > 0), bound, 1.0))
    defect = ops.cond(ops.any(norm > 1), lambda: gram_defect(x), lambda: defect)
    _, x, defect = ops.while_loop(
        lambda i, x, e: ops.logical_and(i < most, ops.logical_not(_close(e))),
        _counted_step,
        (ops.zeros((), "int32"), x, defect),
    )
    return x, defect


def _counted_step(i: Tensor, x: Tensor, defect: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = newton_schulz(x, 1, defect)
    return i + 1, x, gram_defect(x)


def _of_any(x: Tensor, defect: Tensor) -> Tensor:
    """Newton-Schulz steps; what is near singular, where many would not do, is decomposed."""
    y, e = _until_close(x, defect, _MOST_STEPS)
    return _last_step(*ops.cond(_close(e), lambda: (y, e), lambda: _decomposed(x)))


def _of_regular(x: Tensor, defect: Tensor) -> Tensor:
    return _last_step(*_until_close(x, defect, _MOST_STEPS_OF_REGULAR))


def _decomposed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factors by SVD, but of a member that is not finite: routines raise or hang on those."""
    finite = ops.all(ops.isfinite(x), axis=(-2, -1), keepdims=True)
    y = ops.where(finite, polar_svd(ops.where(finite, x, ops.zeros_like(x))), x)
    return y, gram_defect(y)


# Made once: JAX compiles anew for each new function object.
_projected = one_of(_measured, _last_step, _of_any)
_projected_regular = one_of(_measured, _last_step, _of_regular)


@tall
def polar(x: Tensor) -> Tensor:
    """Polar factor of `x` to working precision, by the cheapest means that reaches it.

    As many Newton-Schulz steps, at two products each, as the measured defect `||X^T X - I||_F` asks
    for, and the singular value decomposition of matrices near a singular one, where many would not
    be enough. A matrix with non-finite entries comes back non-finite.

    Example:

    ```python
    x = keras.random.normal((8, 4))
    keras_lipnext.manifolds.stiefel.defect(keras_lipnext.manifolds.polar(x))  # some 1e-7
    ```

    Args:
        x: Tensor of shape (..., m, n), floating point. Computed in float32 at least.

    Returns:
        Tensor of the shape and dtype of `x` with orthonormal columns (rows, if m < n).
    """
    return _projected(x)


@tall
def polar_of_regular(x: Tensor) -> Tensor:
    """`polar` of matrices known not to be singular, but for rounding.

    Nothing is decomposed: a program that takes it is smaller.
    """
    return _projected_regular(x)
