"""Polar projection: the nearest matrix with orthonormal columns (rows, if the matrix is wide).

For `X = U S V^T` the nearest point of the Stiefel manifold in every unitarily invariant norm is
the polar factor `U V^T`. Newton-Schulz reaches it with matrix products only:

    X <- X (3 I - X^T X) / 2

An eigenvalue `1 + e` of `X^T X` becomes `1 - 3/4 e^2 + 1/4 e^3`: for |e| <= 1 the defect is at
least squared by each step. All functions accept leading batch dimensions and either orientation.
"""

import functools

import keras
from keras import ops

from keras_lipnext import backend

EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}


def sym(a):
    return (a + transpose(a)) / 2


def skew(a):
    return (a - transpose(a)) / 2


def transpose(a):
    return ops.swapaxes(a, -1, -2)


def tall(fn):
    """Lets `fn`, written for matrices with orthonormal columns, accept orthonormal rows too.

    Arithmetic is done in float32 at least: half precision cannot represent an orthogonal matrix
    (and no backend decomposes half-precision matrices).
    """

    @functools.wraps(fn)
    def wrapper(*matrices):
        matrices = [ops.convert_to_tensor(backend.value(a)) for a in matrices]
        if len(matrices[0].shape) < 2:
            raise ValueError(
                f"`{fn.__name__}` expects matrices, shape (..., rows, columns). "
                f"Received: shape={tuple(matrices[0].shape)}"
            )
        dtype = keras.backend.standardize_dtype(matrices[0].dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise ValueError(f"`{fn.__name__}` expects floating point. Received: dtype={dtype}")
        matrices = [ops.cast(a, at_least_float32(dtype)) for a in matrices]
        wide = matrices[0].shape[-2] < matrices[0].shape[-1]
        result = fn(*(map(transpose, matrices) if wide else matrices))
        if len(result.shape) >= 2 and wide:
            result = transpose(result)
        return ops.cast(result, dtype)

    return wrapper


def at_least_float32(dtype):
    return "float64" if dtype == "float64" else "float32"


def gram_defect(x):
    """`X^T X - I`."""
    return transpose(x) @ x - ops.eye(x.shape[-1], dtype=x.dtype)


def frobenius(a):
    """Largest Frobenius norm in a batch of matrices, a scalar."""
    return ops.max(ops.sqrt(ops.sum(ops.square(a), axis=(-2, -1))))


@tall
def polar_svd(x):
    """Polar factor by singular value decomposition: the exact reference."""
    u, _, vh = ops.svd(x, full_matrices=False)
    return u @ vh


def newton_schulz(x, steps):
    """`steps` Newton-Schulz iterations on `x`, shape (..., m, n) with m >= n."""
    for _ in range(steps):
        x = x - x @ gram_defect(x) / 2
    return x


# Newton-Schulz steps of the cheap branches, and all branches. They are made once: JAX compiles a
# branch anew for each new function object.
_STEPS = (1, 3, 6)
_BRANCHES = [
    *(functools.partial(newton_schulz, steps=steps) for steps in _STEPS),
    lambda x: newton_schulz(polar_svd(x), steps=1),
]


@tall
def polar(x):
    """Polar factor of `x` to working precision, by the cheapest means that reaches it.

    One, three or six Newton-Schulz steps, chosen from the measured defect `||X^T X - I||_F`, an
    upper bound of the spectral one; the singular value decomposition where they would not
    converge. A matrix with non-finite entries comes back non-finite.

    Args:
        x: Tensor of shape (..., m, n), floating point. Computed in float32 at least.

    Returns:
        Tensor of the shape and dtype of `x` with orthonormal columns (rows, if m < n).
    """
    # Each step squares the defect: after `steps` of them it ends below `floor` if it starts below
    # floor ** (1 / 2 ** steps).
    floor = 4 * EPSILON[keras.backend.standardize_dtype(x.dtype)]
    defect = frobenius(gram_defect(x))
    # NaN compares false with every threshold and so takes the first branch, which returns NaN.
    branch = sum(ops.cast(defect > floor ** (0.5**steps), "int32") for steps in _STEPS)
    # SVD routines raise or hang on infinities: those go through Newton-Schulz, to NaN.
    branch = ops.where(ops.isfinite(defect), branch, 0)
    return ops.switch(branch, _BRANCHES, x)
