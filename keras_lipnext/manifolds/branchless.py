"""Steps along the manifold for accelerators: no branch on data, float32 where a point needs it.

A branch on data makes an accelerator wait for the host, which then has nothing queued for it; and
float32 products are 8 to 15 times slower than those in TF32 and bfloat16. So each function here
takes one way for all, and asks of each product for what it needs (`backend.matmul`): what is added
to a point may be rough, as it is small; what is measured of it, the defect, must be exact.

The ways differ from `rotate` and `polar` in two respects. A step that turns further than a bound
named below is shortened, as no fixed polynomial serves all. And drift is not removed at once but
row by row, all of it in two dozen steps: so what a step leaves may be a little more than rounding
until then.
"""

from keras import ops

from keras_lipnext import backend
from keras_lipnext.backend import matmul
from keras_lipnext.manifolds.polar import gram_defect, skew, sym, tall, transpose
from keras_lipnext.manifolds.rotation import CUBIC, quadratic_coefficient
from keras_lipnext.typing import Tensor

# In radians: what a step by the quadratic and by the quartic may turn. Of p^T p - I they leave at
# most 1e-3 there, and 2e-7 at a tenth and a third of it.
QUADRATIC_LIMIT = 0.3
QUARTIC_LIMIT = 1.0
# What a thin matrix may grow, ||X^T X - I||_2, before a step is shortened.
RETRACTION_LIMIT = 0.5
# Of (1 + e)^(-1/2) in powers of e: with five terms p, (1 + e) p^2 - 1 is 63/128 e^5 + ...
SERIES = (1, -1 / 2, 3 / 8, -5 / 16, 35 / 128)
PERIOD = 16  # the share of the rows whose drift a step removes is 1 / PERIOD


def turn(x: Tensor, d: Tensor, norm: Tensor | None = None) -> Tensor:
    """`x p(d)`, a rotation of orthogonal matrices close to `x exp(d)`; see `rotate`.

    Args:
        x: Tensor of shape (..., n, n), float32, orthogonal.
        d: Tensor of the same shape and dtype, skew-symmetric.
        norm: Upper bound of `||d||_2`, a scalar: then p is the quadratic, at two products. Without
            it p is the quartic, at three, and each matrix has a bound of its own, (||D^4||_F^2 /
            2)^(1/8), at most n^(1/8) times too large.
    """
    if norm is not None:
        d = d * ops.minimum(1.0, QUADRATIC_LIMIT / ops.maximum(norm, QUADRATIC_LIMIT))
        d2 = matmul(d, d, "direction")  # of the size of the step's square
        return x + matmul(x, d + quadratic_coefficient(d2)[..., None, None] * d2, "increment")
    # Eighth powers of the largest row sum, which bounds the norm, must not overflow.
    rows = ops.max(ops.sum(ops.abs(d), axis=-1, keepdims=True), axis=-2, keepdims=True)
    d = d * (1e4 / ops.maximum(rows, 1e4))
    d2 = matmul(d, d, "increment")
    both = matmul(d2, CUBIC * d + CUBIC**2 * d2, "increment")
    third, fourth = skew(both), sym(both)  # c D^3 and c^2 D^4
    eighth = ops.sum(ops.square(fourth), axis=(-2, -1), keepdims=True) / (2 * CUBIC**4)
    bound = ops.power(eighth, 1 / 8)
    t = QUARTIC_LIMIT / ops.maximum(bound, QUARTIC_LIMIT)
    change = t * d + t**2 / 2 * d2 + t**3 * third + t**4 * fourth
    return x + matmul(x, change, "increment")


@tall
def retract(x: Tensor, u: Tensor) -> Tensor:
    """Polar retraction of the tangent vectors `u` at thin matrices `x`: polar(x + u).

    Five terms of (I + E)^(-1/2), E the exact defect of `x + u`: one exact product, two rough ones
    and two of the smaller side. It removes what drift `x` has, too.
    """
    defect = gram_defect(x + u)
    squared = matmul(defect, defect, "increment")
    bound = ops.sqrt(ops.sqrt(ops.sum(ops.square(squared), axis=(-2, -1), keepdims=True)))
    share = RETRACTION_LIMIT / ops.maximum(bound, RETRACTION_LIMIT)
    y, defect, squared = x + ops.sqrt(share) * u, share * defect, share**2 * squared
    _, c1, c2, c3, c4 = SERIES
    tail = c2 * ops.eye(x.shape[-1], dtype=x.dtype) + c3 * defect + c4 * squared
    return y + matmul(y, c1 * defect + matmul(squared, tail, "increment"), "increment")


def remove_drift(x: Tensor, step: Tensor) -> Tensor:
    """Makes a sixteenth of an orthogonal matrix's rows orthonormal, and orthogonal to the others.

    To first order, with E = R X^T - (their rows of I) of the rows R: R <- R - W * E X, W being 1/2
    in the columns of R's own, whose error both sides share, and 1 in the others. An exact product
    of all rows costs as much as the rest of a step; so each step measures some, the same cost each
    time and for any number of matrices.

    Args:
        x: Tensor of shape (..., n, n), float32, near orthogonal ones.
        step: Integer tensor, the number of steps before.

    Returns:
        Tensor of the shape and dtype of `x`. Far from orthogonal matrices it approaches them
        slowly, but never leaves.
    """
    n = x.shape[-1]
    size = -(-n // PERIOD)
    # Multiples of an irrational share, nearly: all rows have their turn within 24 steps, and within
    # 37 steps of their own for a variable that takes every r-th only, r up to 32.
    block = step % 2048 * 941 % 2048 * -(-n // size) // 2048
    first = ops.minimum(block * size, n - size)
    indices = first + ops.arange(size, dtype="int32")
    columns = ops.arange(n, dtype="int32")
    rows = backend.rows(x, first, size)
    defect = matmul(rows, transpose(x)) - ops.cast(columns == indices[:, None], x.dtype)
    inside = ops.logical_and(columns >= first, columns < first + size)
    defect = defect * ops.where(inside, 0.5, 1.0)
    # Rounding alone leaves row sums of about epsilon n.
    largest = ops.max(ops.sum(ops.abs(defect), axis=-1, keepdims=True), axis=-2, keepdims=True)
    defect = defect * (0.25 / ops.maximum(largest, 0.25))
    return backend.with_rows(x, first, rows - matmul(defect, x, "increment"))
