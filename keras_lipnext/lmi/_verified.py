"""Proof, in float64, that multipliers bound a chain's Lipschitz constant.

Theorem. Let x_i = phi_i(W_i x_{i-1} + b_i), 0 < i < l, y = W_l x_{l-1} + b_l, every slope of phi_i
in [a_i, b_i], P_0 = I, and P_1, ..., P_{l-1} any symmetric matrices. If diagonal Lambda_i >= 0 make

    T_i = [ P_{i-1} + 2 a_i b_i W_i^T Lambda_i W_i    -(a_i + b_i) W_i^T Lambda_i ]
          [ -(a_i + b_i) Lambda_i W_i                 2 Lambda_i - P_i            ]  >= 0

for 0 < i < l, and T_l = [P_{l-1}, W_l^T; W_l, rho I] >= 0, then x_0 -> y is sqrt(rho)-Lipschitz.

Proof. For two inputs let d_i be the difference of the x_i, v_i = W_i d_{i-1}. Slopes in [a, b] say
(d - a v)(b v - d) >= 0, neuron by neuron, so with 2 Lambda_i >= 0 as weights

    q_i = 2 d_i^T Lambda_i d_i - 2 (a + b) d_i^T Lambda_i v_i + 2 a b v_i^T Lambda_i v_i <= 0.

(d_{i-1}, d_i) in T_i gives  d_{i-1}^T P_{i-1} d_{i-1} + q_i - d_i^T P_i d_i >= 0: what P_i measures
does not grow, d_{l-1}^T P_{l-1} d_{l-1} <= ||d_0||^2. And (d_{l-1}, -W_l d_{l-1} / rho) in T_l
gives ||W_l d_{l-1}||^2 <= rho d_{l-1}^T P_{l-1} d_{l-1}.  []

With the best P_i these are all bounds of LipSDP [Fazlyab et al. 2019, arXiv 1906.04893]: the sum
of the forms T_i is its block-tridiagonal matrix, divided by rho. The Schur complements

    P_i = 2 Lambda_i - (a + b)^2 Lambda_i W_i K_i^{-1} W_i^T Lambda_i,
    K_i = P_{i-1} + 2 a b W_i^T Lambda_i W_i,

are the best, and for [0, 1] and Lambda halved those of ECLipsE [Xu, Sivaranjani 2024, 2404.04375].

What is proven here is T_i >= 0 for the float64 numbers Lambda_i and P_i. However badly they were
computed, they are exact in the theorem; only what is rounded in assembling T_i and in its Cholesky
factorisation counts, and P_i are taken smaller than the best by `slack` to leave room for it.
"""

import numpy as np

from keras_lipnext.norms.matrices import gram_error
from keras_lipnext.norms.roundoff import SMALLEST_NORMAL, UNIT_ROUNDOFF, UP_PROOF, gamma

# How much of 2 Lambda_i is given away, in turn until the proof goes through.
SLACKS = tuple(2.0**-k for k in range(44, 9, -3))


def verified_constant(weights, errors, slopes, multipliers):
    """Upper bound of the Lipschitz constant of a chain, proven; None if no proof goes through.

    Args:
        weights: List of float64 matrices W_i, shape (outputs, inputs).
        errors: Bounds of ||exact W_i - W_i||_2.
        slopes: List of (a_i, b_i), one fewer.
        multipliers: List of vectors, the diagonals of Lambda_i, likewise. Any: negative and NaN
            entries are replaced, and bad ones give a bad bound or none.

    Returns:
        (constant, multipliers): float, rounded up, and the list of vectors that prove it; or None.
    """
    return _first_proof(weights, errors, slopes, multipliers, _last_constant)


def verified_pairs(weights, errors, slopes, multipliers):
    """Upper bounds of the Lipschitz constants of y_i - y_j; None if no proof goes through.

    The theorem's proof with G, symmetric, for rho I: [P_{l-1}, W_l^T; W_l, G] >= 0 gives
    |c^T dy|^2 <= c^T G c |dx|^2 for every c, here c = e_i - e_j.

    Args: as `verified_constant`.

    Returns:
        Array (outputs, outputs), rounded up, zero on the diagonal; or None.
    """
    proof = _first_proof(weights, errors, slopes, multipliers, _last_pairs)
    return None if proof is None else proof[0]


def float64_vectors(multipliers):
    """Multipliers as float64 vectors: rounded before they count, they are exact in the theorem.

    Computed with in a narrower dtype, they would bring roundings that no allowance covers.

    Raises:
        ValueError: for anything but a list or tuple of vectors of real numbers.
    """
    if isinstance(multipliers, (list, tuple)):
        arrays = [np.asarray(m) for m in multipliers]
        if all(a.ndim == 1 and np.can_cast(a.dtype, "float64", "same_kind") for a in arrays):
            with np.errstate(over="ignore"):  # from longdouble: infinite proves nothing
                return [a.astype("float64") for a in arrays]
        received = [f"{a.dtype} of shape {a.shape}" for a in arrays]
    else:
        received = type(multipliers).__name__
    raise ValueError(
        "The multipliers of a LipschitzResult must be a list or tuple of vectors of real numbers, "
        f"one a hidden layer. Received: {received}"
    )


def _first_proof(weights, errors, slopes, multipliers, last):
    candidates = [_positive(m) for m in float64_vectors(multipliers)]
    for slack in SLACKS:
        # T_i has slack if the coupling between neighbours shrinks: later multipliers by more.
        shrunk = [m * (1 - 4 * slack) ** (i + 1) for i, m in enumerate(candidates)]
        answer = prove(weights, errors, slopes, shrunk, slack, last)
        if answer is not None:
            return answer, shrunk
    return None


def prove(weights, errors, slopes, multipliers, slack, last=None):
    """What `last` proves from these multipliers as they are, the constant; None if nothing."""
    p, multipliers = np.eye(weights[0].shape[1]), float64_vectors(multipliers)
    with np.errstate(all="ignore"):
        for w, error, interval, m in zip(weights, errors, slopes, multipliers):
            if not (m >= 0).all():
                return None
            following = schur_complement(p, w, interval, m, slack)
            if following is None or not _hidden_holds(p, w, error, interval, m, following):
                return None
            p = following
        return (last or _last_constant)(p, weights[-1], errors[-1])


def schur_complement(p, w, slopes, m, slack=0.0):
    """P_i from P_{i-1}, with `slack` * 2 Lambda_i subtracted; symmetric. None if K is indefinite.

    It proves nothing: `prove` takes any P_i.
    """
    a, b = slopes
    largest = np.diag(2 * m * (1 - slack))
    if a + b == 0:
        return largest  # nothing couples x_i to x_{i-1}, and K may be singular
    k = p + 2 * a * b * (w.T * m) @ w if a * b else p
    half = _half(k, w * ((a + b) * m)[:, None])
    if half is None:
        return None
    p = largest - half.T @ half
    return (p + p.T) / 2


def estimated_square(weights, slopes, multipliers):
    """The rho that these multipliers may prove; inf if they are not feasible. It proves nothing."""
    weights = without_kernel(weights)
    p = np.eye(weights[0].shape[1])
    for w, interval, m in zip(weights, slopes, multipliers):
        p = schur_complement(p, w, interval, _positive(m), SLACKS[0])
        if p is None:
            return np.inf
    form = output_form(p, weights[-1])
    return np.inf if form is None else np.linalg.eigvalsh(form)[-1]


def without_kernel(weights):
    """The chain on the inputs that matter, those orthogonal to W_1's kernel; it proves nothing.

    Searches try many multipliers: for images on small layers this makes them many times faster.
    """
    first = weights[0]
    if first.shape[1] > first.shape[0]:
        first = np.linalg.qr(first.T, mode="r").T
    return [first, *weights[1:]]


def output_form(p, w):
    """`W P^-1 W^T` or its other side, whichever is smaller; its largest eigenvalue is rho."""
    half = _half(p, w)
    if half is None:
        return None
    return half @ half.T if len(half) < len(w) else half.T @ half


def _half(p, w):
    """`L^-1 W^T` for P = L L^T; None if P is not positive definite."""
    try:
        half = np.linalg.solve(np.linalg.cholesky(p), w.T)
    except np.linalg.LinAlgError:
        return None
    return half if np.isfinite(half).all() else None


def _positive(m):
    """Multipliers as the theorem needs them. A 0 would need W_{i+1} to ignore the neuron."""
    m = np.where(np.isfinite(m), m, 0.0)
    return np.maximum(m, max(1e-9 * m.max(initial=0.0), SMALLEST_NORMAL))


def _hidden_holds(p, w, error, slopes, m, following):
    """Whether T_i >= 0, for every exact W_i within `error` of w."""
    a, b = slopes
    rows = np.abs(a + b) * m
    top = p
    f = w * np.sqrt(2 * m * np.abs(a * b))[:, None] if a * b else None
    if f is not None:
        top = p + np.sign(a * b) * (f.T @ f)
    matrix = _assembled(top, w * ((a + b) * -m)[:, None], np.diag(2 * m) - following)
    scale = scaling(matrix)
    if scale is None:
        return False
    inputs, outputs = np.ldexp(1.0, scale[: len(p)]), np.ldexp(1.0, scale[len(p) :])
    # Four roundings an entry of the coupling, one of each sum: below 8 u of what T holds.
    allowance = 8 * UNIT_ROUNDOFF * _frobenius(matrix, scale)
    # In W_i itself, where layers were multiplied: in the coupling, and quadratically in the form.
    allowance += (rows * outputs).max() * inputs.max() * error
    if f is not None:
        f = np.abs(f * inputs)
        # Each entry of F has three roundings, a product of two six: gamma(n + 18) covers them.
        size = min((f.T @ f.sum(axis=1)).max(), np.vdot(f, f))
        allowance += gram_error(len(f) + 16, size)
        off = np.sqrt(2 * m.max() * np.abs(a * b)) * inputs.max() * error
        allowance += off * (2 * np.sqrt(np.vdot(f, f)) + off)
    return is_positive(matrix, scale, allowance * (1 + 2.0**-20))


def _last_constant(p, w, error):
    """sqrt(rho), proven; None if P is not positive."""
    form = output_form(p, w)
    if form is None:
        return None
    estimate = np.linalg.eigvalsh(form)[-1]
    for slack in SLACKS:
        rho = estimate * (1 + slack)
        if _last_holds(p, w, error, np.diag(np.full(len(w), rho))):
            return float(np.sqrt(rho) * UP_PROOF)
    return None


def _last_pairs(p, w, error):
    """sqrt((e_i - e_j)^T G (e_i - e_j)), proven; None if P is not positive."""
    half = _half(p, w)
    if half is None:
        return None
    form = half.T @ half
    form = (form + form.T) / 2
    diagonal = np.diagonal(form)
    room = np.maximum(diagonal, 2.0**-20 * diagonal.max())
    for slack in SLACKS:
        g = form + np.diag(slack * room)
        if _last_holds(p, w, error, g):
            return pair_norms(g)
    return None


def pair_norms(g):
    """`sqrt((e_i - e_j)^T G (e_i - e_j))` of a positive semidefinite G, rounded up."""
    sums = np.add.outer(np.diagonal(g), np.diagonal(g))
    squares = sums - 2 * g + 8 * UNIT_ROUNDOFF * (sums + 2 * np.abs(g))
    return np.sqrt(squares) * UP_PROOF * (1 - np.eye(len(g)))


def _last_holds(p, w, error, g):
    """Whether [P, W^T; W, G] >= 0, for every exact W within `error` of w."""
    matrix = _assembled(p, w, g)
    scale = scaling(matrix)
    if scale is None:
        return False
    factors = np.ldexp(1.0, scale)
    allowance = factors[: len(p)].max() * factors[len(p) :].max() * error
    return is_positive(matrix, scale, allowance * (1 + 2.0**-20))


def _assembled(top, coupling, bottom):
    return np.block([[top, coupling.T], [coupling, bottom]])


def scaling(matrix):
    """Exponents k such that diag(2^k) T diag(2^k) has a diagonal in [1/2, 2); None if none has.

    A congruence, and exact: positive or not, T stays so. Errors are measured behind it.
    """
    diagonal = np.diagonal(matrix)
    if not ((diagonal > 2.0**-900) & (diagonal < 2.0**900)).all():
        return None
    return -(np.frexp(diagonal)[1] // 2)


def _frobenius(matrix, scale):
    scaled = np.ldexp(matrix, scale[:, None] + scale)
    return np.sqrt(np.vdot(scaled, scaled))


def is_positive(matrix, scale, error):
    """Proves that every symmetric matrix within `error` of the scaled one is >= 0, or says False.

    If the Cholesky factorisation of A - c I, A of size n, runs through, the smallest eigenvalue of
    A is at least c - g / (1 - g) tr A - the rounding of the diagonal, g = gamma(n + 1) [Rump 2006;
    Higham, Accuracy and Stability, Thm 10.3]. So c covers `error`, twice that with n + 2 for
    kernels that multiply by reciprocals, and 8 u (2 + error) for the diagonal, whose entries are
    below 2: one eighth is needed. The rest covers what underflowed, below 2^-1022 an entry or
    product, scaled up by 2^900 at most: less than n^2 2^-122.
    """
    scaled = np.ldexp(matrix, scale[:, None] + scale)
    n = len(scaled)
    diagonal = np.einsum("ii->i", scaled)
    shift = error + 2 * gamma(n + 2) * diagonal.sum() + 8 * UNIT_ROUNDOFF * (2 + error)
    diagonal -= shift * (1 + 2.0**-20)
    if not diagonal.min() > 0:
        return False
    try:
        factor = np.linalg.cholesky(scaled)  # of the lower triangle
    except np.linalg.LinAlgError:
        return False
    return bool(np.isfinite(np.diagonal(factor)).all())  # not every LAPACK stops at a NaN
