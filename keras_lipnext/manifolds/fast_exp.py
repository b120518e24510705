"""Exponential of a skew-symmetric matrix by matrix products, never silently inaccurate.

    exp(D) = I + D + D^2/2 + ...,
    ||exp(D) - T_m(D)||_2 <= theta^(m+1) / (m+1)!   for the Taylor polynomial T_m, theta >= ||D||_2

LipNeXt (arXiv 2601.18513) truncates by the Frobenius norm, which grows like lr * d for an Adam
step, and lets the error grow to 8e-3. Here the order comes from an upper bound of the SPECTRAL
norm, so the cheap branches stay in use at large widths, and the truncation error stays below
`TOLERANCE` in units of the working precision; beyond them scaling and squaring is exact to
rounding: exp(D) = exp(D / 2^s)^(2^s).
"""

import math

from keras import ops

from keras_lipnext.backend import matmul, one_program
from keras_lipnext.manifolds.polar import EPSILON, at_least_float32, dtype_of, frobenius
from keras_lipnext.typing import Tensor

# Truncation error allowed, in multiples of the working precision's epsilon: 1e-6 in float32.
TOLERANCE = 8


def _largest_theta(order: int, dtype: str) -> float:
    """Largest spectral norm for which the Taylor polynomial of `order` is accurate."""
    allowed = TOLERANCE * EPSILON[dtype]
    return (allowed * math.factorial(order + 1)) ** (1 / (order + 1))


def skew_norm(d: Tensor, d2: Tensor) -> Tensor:
    """Upper bound of `||D||_2` of skew matrices `d`, shape (..., n, n): a scalar, batch maximum.

    The eigenvalues come in pairs +-i t, so ||D||_2^2 <= ||D||_F^2 / 2, and likewise for D^2, which
    gives the tighter bound, ||D||_2^4 <= ||D^2||_F^2 / 2, unless it overflows.
    """
    by_square = (frobenius(d2) / 2**0.5) ** 0.5
    return ops.minimum(frobenius(d) / 2**0.5, by_square)


def _order_2(d: Tensor, d2: Tensor, _: Tensor) -> Tensor:
    return _eye(d) + d + d2 / 2


def _order_4(d: Tensor, d2: Tensor, _: Tensor) -> Tensor:
    return _eye(d) + d + d2 / 2 + matmul(d2, d / 6 + d2 / 24)


def _order_8(d: Tensor, d2: Tensor, _: Tensor) -> Tensor:
    d3 = matmul(d2, d)
    d4 = matmul(d2, d2)
    tail = _eye(d) / 24 + d / 120 + d2 / 720 + d3 / 5040 + d4 / 40320
    return _eye(d) + d + d2 / 2 + d3 / 6 + matmul(d4, tail)


def _scaling_and_squaring(d: Tensor, d2: Tensor, theta: Tensor) -> Tensor:
    dtype = dtype_of(d)
    doublings = ops.ceil(ops.log2(theta / _largest_theta(8, dtype)))
    doublings = ops.cast(ops.clip(doublings, 0, 64), "int32")
    scale = ops.power(ops.cast(0.5, dtype), ops.cast(doublings, dtype))
    _, result = ops.while_loop(
        lambda i, _: i < doublings,
        lambda i, e: (i + 1, matmul(e, e)),
        (ops.zeros((), "int32"), _order_8(d * scale, d2 * scale * scale, theta)),
    )
    return result


def _eye(d: Tensor) -> Tensor:
    return ops.eye(d.shape[-1], dtype=d.dtype)


def fast_exp(d: Tensor) -> Tensor:
    """Matrix exponential of skew-symmetric `d`.

    Example:

    ```python
    a = np.random.default_rng(0).normal(size=(8, 8)).astype("float32")
    keras_lipnext.manifolds.fast_exp(keras.ops.convert_to_tensor(a - a.T))
    ```

    Args:
        d: Tensor of shape (..., n, n), floating point, `d = -d^T`. Computed in float32 at least.
            One order serves the whole batch, chosen from its largest member.

    Returns:
        Tensor of the shape and dtype of `d`. The truncation error is below `TOLERANCE` epsilons;
        rounding adds some that grow with n and with the number of squarings.

    Raises:
        ValueError: if the matrices are not square.

    Reference:
        FastExp, LipNeXt (Hu et al., ICLR 2026), arXiv 2601.18513.
    """
    d = ops.convert_to_tensor(d)
    if len(d.shape) < 2 or d.shape[-1] != d.shape[-2]:
        raise ValueError(f"`fast_exp` expects square matrices. Received: shape={tuple(d.shape)}")
    dtype = dtype_of(d)
    working = at_least_float32(dtype)
    return ops.cast(_exponential(ops.cast(d, working)), dtype)


@one_program
def _exponential(d: Tensor) -> Tensor:
    d2 = matmul(d, d)
    theta = skew_norm(d, d2)
    # NaN compares false: it takes the cheapest branch and stays NaN.
    branch = sum(ops.cast(theta > _largest_theta(m, dtype_of(d)), "int32") for m in (2, 4, 8))
    branches = [_order_2, _order_4, _order_8, _scaling_and_squaring]
    return ops.switch(branch, branches, d, d2, theta)
