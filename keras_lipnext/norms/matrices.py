"""Verified upper bounds of spectral norms, in NumPy float64.

Power iteration approaches a norm from below and cannot certify. The Cholesky test can: if the
factorisation of `s^2 I - fl(W^T W) - c I` runs through, with `c` covering every rounding made on
the way, then `||W||_2 <= s`. [Rump 2006; Higham, Accuracy and Stability, Thm 10.3 and 10.7]

What the proofs take for granted: IEEE float64; sums of products in any order, with or without
fused multiply-add, as conventional BLAS and LAPACK form them (no Strassen, no 3M); results that
underflow are wrong by at most 2^-1022, flushed to zero or not.
"""

import hashlib

import numpy as np

from keras_lipnext.norms.roundoff import ARITHMETIC, SMALLEST_NORMAL, UNIT_ROUNDOFF, UP_PROOF, gamma

# Candidates come from `eigvalsh` up to this size, where Lanczos is no faster.
_SMALL = 160
_BLOCK = 2**24  # entries whose magnitudes are held at once
_CACHE = {}
_CACHE_ENTRIES = 4096


def spectral_norm_bound(matrix):
    """Upper bound of `||matrix||_2`, proven, within about 1e-9 of it relatively.

    Bounds are remembered by the matrix's bytes: the same weights are bounded once a process.

    Args:
        matrix: Array of shape (m, n), of a dtype that float64 holds exactly.

    Returns:
        Float.

    Raises:
        ValueError: for another rank or dtype, non-finite entries, or if the norm may overflow.
    """
    w = _real_matrix(matrix)
    return remembered("matrix", w, lambda: scaled(w, _gram, _cholesky_bound))


def nonnegative_norm_bound(matrix, steps=24):
    """Upper bound of `||A||_2` of a matrix of entries >= 0, without a factorisation.

    For every v > 0, ||A||^2 is at most the largest ratio (A^T A v)_i / v_i [Collatz, Wielandt];
    from v = 1, where that is at most ||A||_1 ||A||_inf, steps of the power method lower it.

    Args:
        matrix: Float64, shape (m, n), entries >= 0 and finite.
        steps: Steps at most.
    """
    largest = float(matrix.max(initial=0.0))
    if largest == 0:
        return 0.0
    exponent = int(np.frexp(largest)[1])
    a = np.ldexp(matrix, -exponent)
    v, square = np.ones(a.shape[1]), np.inf
    for _ in range(steps):
        w = a.T @ (a @ v)
        found = float((w / v).max())
        if found >= square * (1 - 1e-3):
            break
        square = found
        # Positive, whatever a column holds; the bound holds for every such v.
        v = np.maximum(w / w.max(), 1e-30)
    # Sums of m and of n numbers of one sign, a product each; 2^-400 covers those that underflow.
    norm = np.sqrt(min(square, found) * (1 + 2 * gamma(sum(a.shape) + 8)) + 2.0**-400)
    return float(np.ldexp(norm * UP_PROOF, exponent))


def real_array(array):
    """The argument as a NumPy array, if float64 can hold its values exactly; else ValueError."""
    array = np.asarray(array)
    if not np.can_cast(array.dtype, np.float64, "safe"):
        raise ValueError(
            f"A norm is proven from real numbers that float64 holds. Received: dtype={array.dtype}"
        )
    if array.dtype.kind in "iu" and array.size and max(array.max(), -int(array.min())) > 2**53:
        raise ValueError("The array has integers beyond 2^53, which float64 cannot hold.")
    return array


def _real_matrix(matrix):
    w = real_array(matrix)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"A spectral norm needs a matrix. Received: shape={w.shape}")
    return w


def remembered(kind, array, compute):
    """`compute()`, or its earlier result for an array of the same bytes, dtype and shape."""
    digest = hashlib.sha256(np.ascontiguousarray(array).view("uint8")).digest()
    key = (kind, array.dtype.name, array.dtype.byteorder, array.shape, digest)
    bound = _CACHE.get(key)
    if bound is None:
        bound = compute()
        if len(_CACHE) >= _CACHE_ENTRIES:
            for oldest in list(_CACHE)[:1]:  # of a copy: other threads may be adding
                _CACHE.pop(oldest, None)
        _CACHE[key] = bound
    return bound


def scaled(array, *steps):
    """A norm's bound by `steps`, one after the other, from the array scaled into [-1, 1].

    Scaling by a power of two is exact and keeps squares away from over- and underflow. Only entries
    that end below 2^-1022 may be lost, each by less than that: `size * 2^-1022` in norm, and far
    less than the factor (1 + 8 u) below grants to a norm of at least 1/2. A processor told to take
    subnormal numbers for zero loses those of the input too, in float32 already below 2^-126.
    """
    array = np.asarray(array)
    largest = max(float(array.max()), -float(array.min()))  # NaN if there is one
    if not np.isfinite(largest):
        raise ValueError("The matrix has entries that are NaN or infinite; it has no norm.")
    wide = array.dtype.kind == "f" and array.itemsize >= 8
    _, smallest = ARITHMETIC["float64" if wide else "float32"]
    lost = 2 * array.size * smallest
    if not largest >= smallest:
        bits = np.ascontiguousarray(array).view(f"{array.dtype.byteorder}u{array.itemsize}")
        return lost if (bits << 1).any() else 0.0  # without the signs
    exponent = int(np.frexp(largest)[1])
    if exponent > 1000:
        raise ValueError(f"The matrix has entries up to {largest}: its norm may overflow.")
    value = array.astype("float64")  # one copy, which each step may let go of
    np.ldexp(value, -exponent, out=value)
    for step in steps:
        value = step(value)
    return float(np.ldexp(value * UP_PROOF, exponent) + lost)


def _gram(w):
    """(`fl(W^T W)` of the smaller side, a bound of its error in the 2-norm)."""
    if w.shape[0] < w.shape[1]:
        w = w.T
    # |fl(W^T W) - W^T W| <= gamma |W|^T |W| entrywise. The 2-norm of the right-hand side is at most
    # its largest row sum, and at most its trace ||W||_F^2.
    row_sum = 0.0
    block = max(1, _BLOCK // w.shape[1])  # of rows, to spare a copy of all
    for start in range(0, len(w), block):
        magnitudes = np.abs(w[start : start + block])
        row_sum = row_sum + magnitudes.T @ magnitudes.sum(1)
    row_sum = row_sum.max()
    gram = w.T @ w
    return gram, gram_error(len(w), min(row_sum, np.trace(gram)))


def gram_error(rows, size):
    """Bound of `||fl(W^T W) - W^T W||_2` from one of `|| |W|^T |W| ||_2` computed in float64."""
    # 1.1 covers the rounding of `size`; 2^-900 covers products that underflow.
    return 1.1 * gamma(rows + 2) * float(size) + 2.0**-900


def _diagonal(matrices):
    """The diagonals of (..., n, n), as a view to write through."""
    return np.einsum("...ii->...i", matrices)


def _near_orthogonal_square(gram_and_error):
    """Upper bound of `||W||_2^2` that is tight if the columns are nearly orthonormal, or scaled so.

        ||W||^2 <= c + ||W^T W - c I||_2,   ||E||_2 <= min(||E||_F, ||E||_inf),

    with the mean of the diagonal of `W^T W` as `c`: any c is valid, this one makes `||E||_F` the
    smallest. No eigenvalues.
    """
    gram, error = gram_and_error
    n = len(gram)
    diagonal = _diagonal(gram).copy()
    centre = diagonal.mean()
    # The diagonal's subtraction rounds relatively, as the sums do; squares that underflow are
    # n 2^-511 at most in the Frobenius norm, far below `error` >= 2^-55.
    _diagonal(gram)[:] -= centre
    frobenius = np.sqrt(np.vdot(gram, gram))
    magnitudes = np.abs(gram)
    _diagonal(gram)[:] = diagonal
    # Rows and columns: where the product was not formed symmetrically, this bounds the mean of E
    # and E^T, which is as close to the true one.
    row_sum = max(magnitudes.sum(0).max(), magnitudes.sum(1).max())
    distance = min(frobenius, row_sum) * (1 + 2 * gamma(n * n + 2)) + error
    return (centre + distance) * UP_PROOF


def _cholesky_bound(gram_and_error):
    gram, error = gram_and_error
    n, trace = len(gram), np.trace(gram)
    square = _near_orthogonal_square(gram_and_error)
    if square <= trace / n * (1 + 2e-9):  # ||W||^2 is no less than the mean of its eigenvalues
        return np.sqrt(square)
    for estimate, tolerance in ((_lanczos, 2e-10), (_eigvalsh, 8 * n * UNIT_ROUNDOFF)):
        top = estimate(gram)
        if top is None:
            continue
        slack = 4 * gamma(n + 2) * max(n * top - trace, 0) + 2 * error
        slack += (tolerance + 16 * UNIT_ROUNDOFF) * top
        for _ in range(4):
            if _is_below(gram, top + slack, error):
                return np.sqrt(top + slack)
            slack *= 4
    return _gram_iteration(gram_and_error, 20)


def _is_below(gram, square, error):
    """Proves `W^T W <= square * I` from the computed Gram matrix, or returns False.

    Args:
        gram: Array of shape (..., n, n), symmetric or Hermitian: one or several, all to be below.
        square: Float.
        error: Float, bound of the Gram matrices' error in the 2-norm.
    """
    n = gram.shape[-1]
    shifted = -gram
    diagonal = _diagonal(shifted.real)
    diagonal += square
    if not diagonal.min() > 0:
        return False
    # If the factorisation of A runs through, then R* R = A + D with ||D||_2 <= g / (1 - g) tr A,
    # g = gamma(n + 1) [Rump 2006; Higham, Thm 10.3]: no eigenvalue of A is below minus that. n + 2
    # is for kernels that multiply by reciprocals; the 2 covers 1 - g and the trace's rounding; 8 u
    # the roundings of the diagonal and of this line, and products that underflow.
    # Complex: the proof goes through with both parts of a sum of n products, real sums of 2 n, off
    # by gamma(2 n) sum |x| |y|, together sqrt(2) times that.
    trace = diagonal.sum(-1).max()
    backward = 4 * gamma(2 * n + 8) if np.iscomplexobj(gram) else 2 * gamma(n + 2)
    diagonal -= backward * trace + 8 * UNIT_ROUNDOFF * square + error
    try:
        factor = np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return bool(np.isfinite(_diagonal(factor).real).all())  # not every LAPACK stops at a NaN


def _eigvalsh(gram):
    try:
        return np.linalg.eigvalsh(gram)[-1]
    except np.linalg.LinAlgError:
        return None


def _lanczos(gram, steps=200):
    """Estimate of the largest eigenvalue, about 1e-10 relatively, or None. It proves nothing.

    Lanczos' method with full reorthogonalisation. Convergence is relative to the spectrum's width:
    shifted by its mean, eigenvalues that all lie within 1e-6 of 1 are told apart in a few steps.
    """
    n = len(gram)
    if n <= _SMALL:
        return None
    diagonal = _diagonal(gram).copy()
    centre = diagonal.mean()
    _diagonal(gram)[:] -= centre  # in place, to spare a copy; put back below
    steps = min(steps, n)
    basis, small = np.empty((steps, n)), np.zeros((steps, steps))
    v = np.random.default_rng(0).standard_normal(n)
    v /= np.linalg.norm(v)
    top = None
    for k in range(steps):
        basis[k] = v
        v = gram @ v
        small[k, k] = basis[k] @ v
        for _ in range(2):  # twice is enough [Parlett]
            v -= (basis[: k + 1] @ v) @ basis[: k + 1]
        beta = np.linalg.norm(v)
        # Breakdown: the space is invariant and has, from a random start, all distinct eigenvalues.
        ended = beta <= 4 * UNIT_ROUNDOFF * centre
        if ended or k % 10 == 9 or k == steps - 1:
            values, vectors = np.linalg.eigh(small[: k + 1, : k + 1])
            residual = beta * abs(vectors[-1, -1])
            gap = values[-1] - values[-2] if k else 0.0
            tolerance = 1e-10 * (centre + values[-1])
            # An eigenvalue's error is at most its residual, and residual^2 / gap if it is alone.
            if ended or residual * min(1, residual / max(gap, SMALLEST_NORMAL)) <= tolerance:
                top = centre + values[-1]
                break
        if k + 1 < steps:
            small[k, k + 1] = small[k + 1, k] = beta
            v /= beta
    _diagonal(gram)[:] = diagonal
    return top


def _gram_iteration(gram_and_error, iterations):
    """Upper bound of `||W||_2` from `W_0 = W`, `W_{k+1} = W_k^T W_k`: `||W_k||_F^(2^-k)`.

    Too large by a factor of at most n^(2^-(k+1)), n columns and k >= 1 `iterations`, and by
    rounding. [Delattre et al., arXiv 2305.16173 and 2402.00240; the rounding is ours]
    """
    gram, error = gram_and_error
    n = len(gram)
    errors, exponents = [error], []
    for _ in range(iterations - 1):
        exponents.append(int(np.frexp(np.abs(gram).max())[1]))
        gram, error = _gram(np.ldexp(gram, -exponents[-1]))
        errors.append(error)
    # ||W_k|| by its Frobenius or largest row sum (of a symmetric matrix); then back up, each
    # level by ||A||^2 <= ||fl(A^T A)|| + error. (1 + 8 u) covers these few operations, and the
    # entries lost below 2^-1022 in scaling: every norm on the way is at least 1/4.
    norm = np.sqrt(np.vdot(gram, gram)) * (1 + gamma(n * n + 2))
    for level_error, exponent in zip(reversed(errors), [*reversed(exponents), 0]):
        norm = np.sqrt((norm + level_error) * UP_PROOF)
        norm = np.ldexp(norm, exponent)
    return float(norm)
