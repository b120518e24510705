"""The nearest orthogonal direction of a gradient, to the accuracy an optimizer needs.

For `M = U S V^T` the polar factor `U V^T` by scaled Newton-Schulz steps,

    M <- a M (3 I - (a M)^T (a M)) / 2,      a^2 = 3 / (u^2 + u l + l^2),

where l and u bound the singular values of interest: a is the scale for which the cubic maps [l, u]
to the interval [q, 1] that is shortest in proportion. Each step costs two products and multiplies
small singular values by up to 2.6. [Chen, Chow, 2014: A stable scaling of Newton-Schulz]

Of a much taller matrix all steps together are M Q with a polynomial Q in its n x n Gram matrix,
G <- G P^2, Q <- Q P, P = a (3 I - a^2 G) / 2: two products have as many rows as M, not eight. G is
rounded at its largest eigenvalue, so l^2 must be well above that.
"""

from keras import ops

from keras_lipnext import backend
from keras_lipnext.backend import matmul, one_program
from keras_lipnext.manifolds.polar import EPSILON, dtype_of, tall, transpose
from keras_lipnext.typing import Tensor


def scales(smallest: float, steps: int) -> tuple[list[float], float]:
    """([a of each step], factor of the last result) for singular values in [smallest, 1].

    The factor centres the last interval [q, 1] at 1.
    """
    found, low = [], smallest
    for _ in range(steps):
        found.append((3 / (1 + low + low**2)) ** 0.5)
        low = found[-1] * low * (3 - (found[-1] * low) ** 2) / 2
    return found, 2 / (1 + low)


# Singular value that no result exceeds by more than rounding, with the default of `smallest`.
LARGEST = 1.23
# From m >= MUCH_TALLER n on, steps on an m x n matrix work on its n x n Gram matrix.
MUCH_TALLER = 3


@tall
@one_program
def orthogonalize(
    m: Tensor, *, steps: int = 4, smallest: float | None = None, precision: str = "exact"
) -> Tensor:
    """Brings the singular values of `m` close to 1 and keeps its singular vectors.

    Example:

    ```python
    keras_lipnext.manifolds.orthogonalize(keras.random.normal((8, 4)))
    ```

    Args:
        m: Tensor of shape (..., rows, columns), floating point. Computed in float32 at least.
        steps: Newton-Schulz steps.
        smallest: Singular values s_i above this share of (sum of s_j^4)^(1/4), which is between the
            largest one and n^(1/4) times that, come close to 1, within 23 % with the defaults; the
            smaller ones come out the smaller. With the default, None, no value comes out above
            1.23: it is 0.02 for four steps, and 2.56 times as much for each step less.
        precision: Of the products, on accelerators: "exact", float32, or "direction", bfloat16
            operands and results, summed in float32, which moves singular values by about 1 %.
            Norms are computed in float32.

    Returns:
        Tensor of the shape and dtype of `m`; zeros where it is zero. As an odd polynomial in `m` it
        is skew-symmetric, up to rounding, where `m` is.
    """
    smallest = 0.02 * 2.56 ** (4 - steps) if smallest is None else smallest
    factors, last = scales(smallest, steps)
    # Scaled before squaring: squares of small gradients underflow. The Gram matrix then gives a
    # bound of the spectral norm that is far tighter than the Frobenius norm of M itself.
    m = m / _positive(ops.max(ops.abs(m), axis=(-2, -1), keepdims=True))
    gram = matmul(transpose(m), m, precision)
    squared = _positive(ops.sqrt(ops.sum(ops.square(gram), axis=(-2, -1), keepdims=True)))
    m, gram = m / ops.sqrt(squared), gram / squared
    fine = precision == "exact" and smallest**2 > 1000 * EPSILON[dtype_of(m)]
    if fine and m.shape[-2] >= MUCH_TALLER * m.shape[-1]:
        return last * matmul(m, _small_steps(gram, factors))
    # What is rounded for each product anyway is kept as it is rounded: half of the memory moved.
    rough = precision == "direction" and dtype_of(m) == "float32" and not backend.on_cpu()
    kept = "bfloat16" if rough else dtype_of(m)
    m, gram = ops.cast(m, kept), ops.cast(gram, kept)
    for index, a in enumerate(factors):
        gram = gram if index == 0 else matmul(transpose(m), m, precision)
        m = (1.5 * a) * m - matmul(m, (0.5 * a**3) * gram, precision)
    return last * ops.cast(m, "float32") if rough else last * m


def _small_steps(gram: Tensor, factors: list[float]) -> Tensor:
    """Q of the steps with these scales, of the Gram matrix alone."""
    identity, product = ops.eye(gram.shape[-1], dtype=gram.dtype), None
    for index, a in enumerate(factors):
        factor = (1.5 * a) * identity - (0.5 * a**3) * gram
        product = factor if product is None else matmul(product, factor)
        if index + 1 < len(factors):
            gram = matmul(matmul(gram, factor), factor)
    return product


def _positive(scale: Tensor) -> Tensor:
    return ops.where(scale > 0, scale, 1.0)
