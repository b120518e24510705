"""A step along the orthogonal group by matrix products: `X <- X p(D)` for a skew-symmetric D.

    p(D) = I + D + D^2/2                           with p^T p = I + D^4/4
    p(D) = I + D + D^2/2 + c D^3 + c^2 D^4         with p^T p = I + c^4 D^8,   c = (1 - 1/sqrt(2))/2

The coefficients of the quartic are those that cancel D^4 and D^6 in p^T p, not those of the
exponential: what matters of a retraction is that it is a rotation, and that it agrees with the
geodesic to second order. Both cost one product to apply and D^2; the quartic one product more.
Where even the quartic would leave too much, D is halved until it does not, and the result squared
as often.
"""

import math

from keras import ops

from keras_lipnext.manifolds.polar import EPSILON, dtype_of, largest_finite, newton_schulz

CUBIC = (1 - 0.5**0.5) / 2
# What ||p^T p - I||_2 may be, in multiples of the dtype's epsilon.
TOLERANCE = 2


def rotate(x, d, norm=None):
    """Moves orthogonal matrices by a rotation close to `exp(d)`.

    Args:
        x: Tensor of shape (..., n, n), float32 or float64, orthogonal.
        d: Tensor of the same shape and dtype, skew-symmetric. A batch takes the polynomial that its
            largest member needs.
        norm: Upper bound of `||d||_2`, if known: a scalar. Otherwise one follows from
            `||D^2||_F`, which is loose where many eigenvalues are alike.

    Returns:
        `x p(d)`. It adds at most two epsilons of the dtype to the spectral norm of `X^T X - I`, and
        rounding, and differs from `x exp(d)` by at most about `||d||^3 / 49`, or `||d||^3 / 6`
        where the quadratic is enough.
    """
    d2 = d @ d
    if norm is None:
        # The eigenvalues of a skew-symmetric matrix come in pairs: ||D^2||_2^2 <= ||D^2||_F^2 / 2.
        fourth = largest_finite(ops.sum(ops.square(d2), axis=(-2, -1))) / 2
    else:
        fourth = ops.square(ops.square(ops.cast(norm, x.dtype)))
    tolerance = TOLERANCE * EPSILON[dtype_of(x)]
    branch = sum(ops.cast(left > tolerance, "int32") for left in (fourth / 4, CUBIC**4 * fourth**2))
    return ops.switch(branch, (_quadratic, _quartic, _squarings), x, d, d2, fourth)


def _quadratic(x, d, d2, _):
    # Added to X, whose entries it changes little, the rounding of the product hardly counts.
    return x + x @ (d + d2 / 2)


def _quartic(x, d, d2, _):
    return x + x @ _quartic_change(d, d2)


def _quartic_change(d, d2):
    """p(D) - I."""
    return d + d2 / 2 + d2 @ (CUBIC * d + CUBIC**2 * d2)


def _squarings(x, d, d2, fourth):
    # Halving divides D^8 by 256, squaring doubles what is left.
    tolerance = TOLERANCE * EPSILON[dtype_of(x)]
    excess = math.log2(CUBIC**4 / tolerance) + 2 * ops.log2(fourth)
    halvings = ops.cast(ops.clip(ops.ceil(excess / 7), 1, 64), "int32")
    scale = ops.power(ops.cast(0.5, x.dtype), ops.cast(halvings, x.dtype))
    change = _quartic_change(d * scale, d2 * ops.square(scale))
    _, change = ops.while_loop(
        lambda i, _: i < halvings,
        lambda i, c: (i + 1, 2 * c + c @ c),  # (I + C)^2 - I
        (ops.zeros((), "int32"), change),
    )
    return newton_schulz(x + x @ change, 1)  # squaring doubles rounding, too
