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


# From m >= MUCH_TALLER n on, iterations on an m x n matrix work on its n x n Gram matrix.
MUCH_TALLER = 3


def much_taller(x: Tensor) -> bool:
    return x.shape[-2] >= MUCH_TALLER * x.shape[-1]


def newton_schulz(x: Tensor, steps: int, defect: Tensor | None = None) -> Tensor:
    """`steps` Newton-Schulz iterations on `x`, shape (..., m, n) with m >= n.

    `defect` is `gram_defect(x)`, if known. Of much taller matrices two products have m rows,
    whatever the number of steps.

    Example:

    ```python
    x = keras_lipnext.manifolds.stiefel.random((8, 4)) * 0.9
    keras_lipnext.manifolds.newton_schulz(x, steps=4)
    ```
    """
    if steps > 1 and much_taller(x):
        return x + matmul(x, _small_steps(gram_defect(x) if defect is None else defect, steps))
    for _ in range(steps):
        x = x - matmul(x, gram_defect(x) if defect is None else defect) / 2
        defect = None
    return x


def _small_steps(defect: Tensor, steps: int) -> Tensor:
    """C of `X (I + C)`, the result of Newton-Schulz steps on X, of E = X^T X - I alone.

    All are polynomials in E. Its small differences from what they cancel are never formed with I.
    """
    change = -defect / 2
    for _ in range(steps - 1):
        squared = 2 * change + matmul(change, change)  # (I + C)^2 - I
        left = defect + squared + matmul(defect, squared)
        change = change - (left + matmul(change, left)) / 2
    return change


# Newton-Schulz steps of the cheap branches, and the most of the other, which the slowest
# convergence to be waited for takes: of singular values 1e-4 times the largest.
_STEPS = (1, 3)
_MOST_STEPS = 30


def _threshold(steps: int, dtype: str) -> float:
    """Largest `||X^T X - I||_F` that `steps` Newton-Schulz steps bring to working precision."""
    return (4 * EPSILON[dtype]) ** (0.5**steps)  # each squares it


# Of (1 + e)^(-1/2) in powers of e: with five terms p, (1 + e) p^2 - 1 is 63/128 e^5 + ...
SERIES = (1, -1 / 2, 3 / 8, -5 / 16, 35 / 128)


def _far(x: Tensor, defect: Tensor) -> Tensor:
    """Six products where the spectral norm is small, as that of an optimizer's step is.

    For noise it is many times smaller than the Frobenius norm, and ||E||_2^2 <= ||E^2||_F.
    """
    squared = matmul(defect, defect)
    # What the series leaves then is what one Newton-Schulz step removes.
    near = (1.5 * _threshold(1, dtype_of(x))) ** (1 / 5)
    branch = ops.cast(ops.sqrt(frobenius(squared)) > near, "int32")
    return ops.switch(branch, (_by_series, _iterated), x, defect, squared)


def _by_series(x: Tensor, defect: Tensor, squared: Tensor) -> Tensor:
    _, c1, c2, c3, c4 = SERIES
    tail = matmul(squared, c2 * ops.eye(x.shape[-1], dtype=x.dtype) + c3 * defect + c4 * squared)
    return newton_schulz(x + matmul(x, c1 * defect + tail), 1)


def _iterated(x: Tensor, *_: Any) -> Tensor:
    """Newton-Schulz steps until they converge; what is near singular is decomposed instead."""
    enough = _threshold(1, dtype_of(x))
    # The largest absolute row sum bounds ||X^T X||_2. Steps converge from singular values <= 1.
    bound = ops.max(ops.sum(ops.abs(matmul(transpose(x), x)), axis=-1), axis=-1)[..., None, None]
    scaled = x / ops.sqrt(ops.where(bound > 0, bound, 1))
    _, scaled, defect = ops.while_loop(
        lambda i, y, e: ops.logical_and(i < _MOST_STEPS, frobenius(e) > enough),
        _counted_step,
        (ops.zeros((), "int32"), scaled, gram_defect(scaled)),
    )
    return ops.cond(
        frobenius(defect) <= enough,
        lambda: newton_schulz(scaled, 1, defect),
        lambda: newton_schulz(_decomposed(x), 1),
    )


def _decomposed(x: Tensor) -> Tensor:
    """Polar factors by SVD, but of a member that is not finite: routines raise or hang on those."""
    finite = ops.all(ops.isfinite(x), axis=(-2, -1), keepdims=True)
    return ops.where(finite, polar_svd(ops.where(finite, x, ops.zeros_like(x))), x)


def _counted_step(i: Tensor, x: Tensor, defect: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = newton_schulz(x, 1, defect)
    return i + 1, x, gram_defect(x)


def _measured(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The branch that `x` asks for, and what it takes."""
    # Squares of large entries overflow; those of orthonormal matrices are at most 1.
    x = x / ops.maximum(ops.max(ops.abs(x), axis=(-2, -1), keepdims=True), 1)
    defect = gram_defect(x)
    size = frobenius(defect)
    branch = sum(ops.cast(size > _threshold(steps, dtype_of(x)), "int32") for steps in _STEPS)
    return branch, x, defect


# Made once: JAX compiles a branch anew for each new function object.
_projected = one_of(
    _measured,
    [
        *(lambda x, defect, steps=steps: newton_schulz(x, steps, defect) for steps in _STEPS),
        _far,
    ],
)


@tall
def polar(x: Tensor) -> Tensor:
    """Polar factor of `x` to working precision, by the cheapest means that reaches it.

    As many Newton-Schulz steps as the measured defect `||X^T X - I||_F` asks for, at two products
    each, or six products where its spectral norm is below about 0.25; further away, as many steps
    as it takes, and the singular value decomposition of matrices near a singular one, where many
    would not be enough. A matrix with non-finite entries comes back non-finite.

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
