"""Verified upper bounds of spectral norms, in NumPy float64.

Power iteration approaches a norm from below and cannot certify. The Cholesky test can: if the
factorisation of `s^2 I - fl(W^T W) - c I` runs through, with `c` covering every rounding made on
the way, then `||W||_2 <= s`. [Rump 2006; Higham, Accuracy and Stability, Thm 10.7]
"""

import numpy as np

UNIT_ROUNDOFF = 2.0**-53


def gamma(n):
    """Relative error bound of a sum of n products in any order: n u / (1 - n u)."""
    if n * UNIT_ROUNDOFF >= 0.01:
        raise ValueError(f"Rounding errors of sums of {n} terms cannot be bounded usefully.")
    return n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)


def spectral_norm_bound(matrix):
    """Upper bound of `||matrix||_2`, proven, within about 1e-9 of it relatively.

    Args:
        matrix: Array of shape (m, n), any real dtype; converted to float64 exactly.

    Returns:
        Float.

    Raises:
        ValueError: for another rank, non-finite entries, or if no bound could be proven.
    """
    w = np.asarray(matrix, "float64")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"A spectral norm needs a matrix. Received: shape={w.shape}")
    if not np.isfinite(w).all():
        raise ValueError("The matrix has entries that are NaN or infinite; it has no norm.")
    largest = np.abs(w).max()
    if largest == 0:
        return 0.0
    # Scaling by a power of two is exact and keeps squares away from over- and underflow.
    exponent = int(np.frexp(largest)[1])
    w = np.ldexp(w.T if w.shape[0] < w.shape[1] else w, -exponent)
    if exponent > 1000:
        raise ValueError(f"The matrix has entries up to {largest}: its norm may overflow.")
    return float(np.nextafter(np.ldexp(_scaled_bound(w), exponent), np.inf))


def _scaled_bound(w):
    rows, n = w.shape
    gram = w.T @ w
    magnitudes = np.abs(w)
    # |fl(W^T W) - W^T W| <= gamma |W|^T |W|, whose 2-norm is at most ||W||_1 ||W||_inf. Entries
    # that underflow in the products are below 2^-1000: the factor 2 covers them.
    gram_error = 2 * gamma(rows + 2) * magnitudes.sum(0).max() * magnitudes.sum(1).max()
    top = max(np.linalg.eigvalsh(gram)[-1], np.diag(gram).max())
    slack = 2 * gamma(n + 2) * n * top + 2 * gram_error
    for _ in range(8):
        square = top + slack
        if _is_below(gram, square, gram_error):
            return np.sqrt(square) * (1 + 4 * UNIT_ROUNDOFF)
        slack *= 4
    raise ValueError("No bound of the spectral norm could be proven: the Cholesky test failed.")


def _is_below(gram, square, gram_error):
    """Proves `W^T W <= square * I` from the computed Gram matrix, or returns False."""
    n = len(gram)
    trace = n * square
    # Cholesky's backward error, the rounding of the diagonal below, and the Gram matrix's.
    shift = 2 * gamma(n + 2) * trace + 4 * UNIT_ROUNDOFF * square + gram_error
    try:
        np.linalg.cholesky(np.diag(np.full(n, square - shift)) - gram)
    except np.linalg.LinAlgError:
        return False
    return True
