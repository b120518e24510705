"""A step along the orthogonal group by matrix products: `X <- X p(D)` for a skew-symmetric D.

With s >= 0 for the eigenvalues of -D^2,

    p(D) = I + D + b D^2                           p^T p - I = b^2 s (s - r)
    p(D) = I + D + D^2/2 + c D^3 + c^2 D^4         p^T p - I = c^4 s^4,   c = (1 - 1/sqrt(2))/2

where b = 1 / (1 + sqrt(1 - r)), r = tr(s^2) / tr(s), about 1/2. What matters of a retraction is
that it is a rotation, and that it agrees with the geodesic to second order: so the coefficients are
not those of the exponential. Those of the quartic cancel s^2 and s^3. The quadratic's b cancels the
trace of the defect, and all of it where the angles are alike, as ManifoldMuon's are; for Adam's on
noise its root mean square is 0.35 n^2 lr^4, of s^2/4 (b = 1/2) it would be 0.94.

Both cost one product to apply and D^2; the quartic one product more. Where even the quartic would
leave too much, D is halved until it does not, and the result squared as often.
"""

import math
from typing import Any

from keras import ops

from keras_lipnext.backend import matmul, one_program
from keras_lipnext.manifolds.polar import EPSILON, dtype_of, largest_finite, newton_schulz
from keras_lipnext.typing import Tensor

CUBIC = (1 - 0.5**0.5) / 2
# What ||p^T p - I||_2 may be, in multiples of the dtype's epsilon.
TOLERANCE = 2


@one_program
def rotate(
    x: Tensor, d: Tensor, norm: float | Tensor | None = None, *, period: int | None = None
) -> Tensor:
    """Moves orthogonal matrices by a rotation close to `exp(d)`.

    Example:

    ```python
    x = keras_lipnext.manifolds.stiefel.random((8, 8))
    a = 0.01 * keras.random.normal((8, 8))
    keras_lipnext.manifolds.rotate(x, a - keras.ops.transpose(a))
    ```

    Args:
        x: Tensor of shape (..., n, n), float32 or float64, orthogonal.
        d: Tensor of the same shape and dtype, skew-symmetric. A batch takes the polynomial that its
            largest member needs.
        norm: Upper bound of `||d||_2`, if known: a scalar. Otherwise one follows from
            `||D^2||_F`, which is loose where many eigenvalues are alike.
        period: For callers who orthonormalise at least every `period` steps, and whenever rows of
            `X^T X - I` are visibly off: the quadratic may then leave up to sqrt(epsilon) in a
            step, where, for directions like noise, what gathers in all of them stays invisible.

    Returns:
        `x p(d)`. It adds at most two epsilons of the dtype to the spectral norm of `X^T X - I` (but
        see `period`), and rounding, and differs from `x exp(d)` by at most about `||d||^3 / 49`,
        or `||d||^3 / 6` where the quadratic is enough.
    """
    d2 = matmul(d, d)
    # The eigenvalues of a skew-symmetric matrix come in pairs: ||D^2||_2^2 <= ||D^2||_F^2 / 2.
    squares, ratio = _squares_and_ratio(d2)
    if norm is None:
        fourth = largest_finite(squares) / 2
    else:
        fourth = ops.square(ops.square(ops.cast(norm, x.dtype)))
    b = 1 / (1 + ops.sqrt(1 - ratio))
    largest = ops.sqrt(fourth)
    # The largest and smallest value of s (s - r) on [0, largest].
    left = ops.square(b) * ops.maximum(largest * (largest - ratio), ops.square(ratio) / 4)
    left, epsilon = largest_finite(left), EPSILON[dtype_of(x)]
    enough = left <= TOLERANCE * epsilon
    if period is not None:
        # 0.18 tr(s^2) / n is the root mean square named above.
        n = x.shape[-1]
        gathered = period * 0.18 * largest_finite(squares) / n
        expected = gathered <= TOLERANCE * epsilon * math.sqrt(n) / 2
        enough = ops.logical_or(enough, ops.logical_and(left <= math.sqrt(epsilon), expected))
    enough = ops.logical_and(enough, ops.isfinite(fourth))  # it overflows for a huge `norm`
    few = CUBIC**4 * ops.square(fourth) <= TOLERANCE * epsilon
    branch = ops.where(enough, 0, ops.where(few, 1, 2))
    branches = (_quadratic, _quartic, _squarings)
    return ops.switch(branch, branches, x, d, d2, b[..., None, None], fourth)


def _squares_and_ratio(d2: Tensor) -> tuple[Tensor, Tensor]:
    """tr(s^2) and r of each matrix."""
    squares = ops.sum(ops.square(d2), axis=(-2, -1))
    trace = -ops.trace(d2, axis1=-2, axis2=-1)
    ratio = ops.where(trace > 0, squares / ops.where(trace > 0, trace, 1), 0)
    return squares, ops.minimum(ratio, 0.5)  # beyond, another polynomial is taken anyway


def quadratic_coefficient(d2: Tensor) -> Tensor:
    """b of each matrix of a stack, of D^2."""
    return 1 / (1 + ops.sqrt(1 - _squares_and_ratio(d2)[1]))


def _quadratic(x: Tensor, d: Tensor, d2: Tensor, b: Tensor, _: Tensor) -> Tensor:
    # Added to X, whose entries it changes little, the rounding of the product hardly counts.
    return x + matmul(x, d + b * d2)


def _quartic(x: Tensor, d: Tensor, d2: Tensor, *_: Any) -> Tensor:
    return x + matmul(x, _quartic_change(d, d2))


def _quartic_change(d: Tensor, d2: Tensor) -> Tensor:
    """p(D) - I."""
    # Minus: of three large summands TensorFlow's memory optimizer makes an AddN with a temporary
    # variable, which fails in a branch ("AlreadyExistsError: tmp_var").
    return d + d2 / 2 - matmul(d2, -CUBIC * d - CUBIC**2 * d2)


def _squarings(x: Tensor, d: Tensor, d2: Tensor, _: Tensor, fourth: Tensor) -> Tensor:
    # Halving divides D^8 by 256, squaring doubles what is left.
    tolerance = TOLERANCE * EPSILON[dtype_of(x)]
    excess = math.log2(CUBIC**4 / tolerance) + 2 * ops.log2(fourth)
    halvings = ops.cast(ops.clip(ops.ceil(excess / 7), 1, 64), "int32")
    scale = ops.power(ops.cast(0.5, x.dtype), ops.cast(halvings, x.dtype))
    change = _quartic_change(d * scale, d2 * ops.square(scale))
    _, change = ops.while_loop(
        lambda i, _: i < halvings,
        lambda i, c: (i + 1, 2 * c + matmul(c, c)),  # (I + C)^2 - I
        (ops.zeros((), "int32"), change),
    )
    return newton_schulz(x + matmul(x, change), 1)  # squaring doubles rounding, too
