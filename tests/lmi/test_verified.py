"""The proof in floating point: right multipliers pass, wrong ones and too small constants fail."""

import itertools
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_lipnext.lmi import _verified
from keras_lipnext.lmi._verified import (
    prove,
    schur_complement,
    verified_constant,
    verified_pairs,
)
from keras_lipnext.lmi.eclipse import fast

pytestmark = pytest.mark.once


def random_chain(seed, sizes=(4, 6, 5, 3), spread=0.0):
    random = np.random.default_rng(seed)
    return [
        random.normal(size=(n, m)) / np.sqrt(m) * np.exp(spread * random.normal(size=(n, 1)))
        for m, n in itertools.pairwise(sizes)
    ]


def exact_square(weights, slopes, multipliers):
    """rho of these multipliers, by the best P_i, in 60 digits; None if they are not feasible."""
    form = exact_form(weights, slopes, multipliers)
    with mpmath.workdps(60):
        return None if form is None else max(mpmath.eigsy(form, eigvals_only=True))


def exact_form(weights, slopes, multipliers):
    """W_l P_{l-1}^-1 W_l^T of these multipliers."""
    with mpmath.workdps(60):
        p = mpmath.eye(weights[0].shape[1])
        for w, (a, b), m in zip(weights, slopes, multipliers):
            w, m = mpmath.matrix(w.tolist()), mpmath.diag([mpmath.mpf(float(v)) for v in m])
            a, b = mpmath.mpf(a), mpmath.mpf(b)
            coupling = (a + b) * m * w
            k = p + 2 * a * b * w.T * m * w
            p = 2 * m - coupling * mpmath.inverse(k) * coupling.T
            if min(mpmath.eigsy(p, eigvals_only=True)) <= 0:
                return None
        w = mpmath.matrix(weights[-1].tolist())
        return w * mpmath.inverse(p) * w.T


@given(
    st.integers(0, 10**6),
    st.sampled_from([(0.0, 1.0), (0.2, 1.0), (-0.13, 1.13), (0.0, 0.25), (-0.5, 0.4)]),
    st.sampled_from([0.0, 1.0, 6.0]),
)
def test_proven_constants_are_above_the_exact_one_of_their_multipliers(seed, interval, spread):
    weights = random_chain(seed, spread=spread)
    slopes = [interval] * 2
    multipliers = fast(weights, slopes)[0]
    random = np.random.default_rng(seed)
    # By 0.8 some would be infeasible, and prove nothing.
    multipliers = [m * random.uniform(0.9, 1.0, m.shape) for m in multipliers]
    constant, used = verified_constant(weights, [0.0] * 3, slopes, multipliers)
    exact = exact_square(weights, slopes, used)
    assert exact is not None
    assert constant**2 >= exact
    assert constant**2 <= float(exact) * (1 + 1e-7)


@given(
    st.integers(0, 10**6),
    st.sampled_from([(0.0, 1.0), (-0.13, 1.13), (0.0, 0.25)]),
    st.sampled_from([0.0, 1.0, 6.0]),
)
def test_proven_pairs_are_above_the_exact_ones_of_their_multipliers(seed, interval, spread):
    weights = random_chain(seed, spread=spread)
    weights[-1][1] = weights[-1][0] + 1e-9  # two classes that are nearly one
    slopes = [interval] * 2
    multipliers = [0.9 * m for m in fast(weights, slopes)[0]]
    pairs = verified_pairs(weights, [0.0] * 3, slopes, multipliers)
    # Any others, feasible, are above: the proof shrinks them by some slack.
    shrunk = verified_constant(weights, [0.0] * 3, slopes, multipliers)[1]
    form = exact_form(weights, slopes, shrunk)
    assert (pairs == pairs.T).all() and (np.diag(pairs) == 0).all()
    largest = max(float(form[i, i]) for i in range(3))
    for i, j in itertools.combinations(range(3), 2):
        with mpmath.workdps(60):
            square = form[i, i] + form[j, j] - 2 * form[i, j]
        assert pairs[i, j] ** 2 >= square
        assert pairs[i, j] ** 2 <= float(square) + 1e-6 * largest


def test_norms_of_pairs_are_rounded_up_where_they_cancel():
    random = np.random.default_rng(0)
    rows = random.normal(size=(40, 1)) + 1e-9 * random.normal(size=(40, 3))
    g = rows @ rows.T
    norms = _verified.pair_norms(g)
    for i, j in itertools.combinations(range(len(g)), 2):
        exact = Fraction(g[i, i]) + Fraction(g[j, j]) - 2 * Fraction(g[i, j])
        assert Fraction(norms[i, j]) ** 2 >= exact


def test_a_form_of_the_outputs_that_is_too_small_is_rejected():
    """The mutant: G below W P^-1 W^T along one direction, by one part in 10^8."""
    weights, slopes, (m,) = two_layer()
    p = schur_complement(np.eye(4), weights[0], slopes[0], m)
    w = weights[1]
    form = w @ np.linalg.inv(p) @ w.T
    form, largest = (form + form.T) / 2, np.linalg.eigvalsh(form)[-1]
    direction = np.array([1.0, -1.0, 0.0])
    change = 1e-8 * largest * np.outer(direction, direction)
    margin = 1e-10 * largest * np.eye(3)
    assert _verified._last_holds(p, w, 0.0, form + margin)
    assert not _verified._last_holds(p, w, 0.0, form + margin - change)
    assert not _verified._last_holds(p, w, 1e-8, form + margin)  # the weights' error is paid for


def two_layer():
    weights = random_chain(3, (4, 6, 3))
    slopes = [(0.0, 1.0)]
    return weights, slopes, fast(weights, slopes)[0]


@pytest.mark.parametrize("factor", [2.0, 10.0, 1e8])
def test_multipliers_that_are_too_large_prove_nothing(factor):
    weights, slopes, multipliers = two_layer()
    # Twice the closed form is where P_1 loses its rank.
    assert verified_constant(weights, [0.0] * 2, slopes, [factor * 1.01 * multipliers[0]]) is None


def test_one_wrong_multiplier_proves_nothing_or_more():
    weights, slopes, (m,) = two_layer()
    right, _ = verified_constant(weights, [0.0] * 2, slopes, [m])
    for k in range(len(m)):
        for value in (0.0, -1.0, np.nan, np.inf, 1e3 * m[k]):
            wrong = m.copy()
            wrong[k] = value
            answer = verified_constant(weights, [0.0] * 2, slopes, [wrong])
            if answer is not None:
                exact = exact_square(weights, slopes, answer[1])
                assert answer[0] ** 2 >= exact
                assert answer[0] > right / 2  # the true constant is not far below


def test_negative_multipliers_are_no_proof():
    weights, slopes, (m,) = two_layer()
    assert prove(weights, [0.0] * 2, slopes, [m], 1e-12) is not None
    assert prove(weights, [0.0] * 2, slopes, [-m], 1e-12) is None
    assert prove(weights, [0.0] * 2, slopes, [m * np.nan], 1e-12) is None


@pytest.mark.parametrize("excess", [1e-6, 1e-9])
def test_a_rho_that_is_too_small_is_rejected(excess):
    """The mutant: the last inequality at the exact rho, shrunk."""
    weights, slopes, (m,) = two_layer()
    p = schur_complement(np.eye(4), weights[0], slopes[0], m)
    w = weights[1]
    exact = float(np.linalg.eigvalsh(w @ np.linalg.inv(p) @ w.T)[-1])
    for rho, holds in ((exact * (1 + excess), True), (exact * (1 - excess), False)):
        matrix = np.block([[p, w.T], [w, rho * np.eye(len(w))]])
        scale = _verified.scaling(matrix)
        assert _verified.is_positive(matrix, scale, 0.0) is holds


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 1.0), (-0.13, 1.13), (-1.0, 0.3)])
@pytest.mark.parametrize("entry", [(0, 0), (1, 3), (3, 3)])
def test_a_p_that_is_too_large_is_rejected(entry, interval, monkeypatch):
    """The mutant: P_1 larger than the Schur complement in one entry, by one part in 10^8."""
    w, last = random_chain(3, (6, 4, 3))
    (m,), _ = fast([w, last], [interval])
    p = schur_complement(np.eye(6), w, interval, m, 1e-12)
    wrong = p.copy()
    i, j = entry
    wrong[i, j] += 1e-8 * np.linalg.eigvalsh(p)[-1]
    wrong[j, i] = wrong[i, j]
    assert _verified._hidden_holds(np.eye(6), w, 0.0, interval, m, p)
    assert not _verified._hidden_holds(np.eye(6), w, 0.0, interval, m, wrong)
    assert prove([w, last], [0.0] * 2, [interval], [m], 1e-12) is not None
    monkeypatch.setattr(_verified, "schur_complement", lambda *arguments: wrong)
    assert prove([w, last], [0.0] * 2, [interval], [m], 1e-12) is None


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 1.0), (-0.13, 1.13)])
@pytest.mark.parametrize("which", [0, 1])
def test_the_error_of_merged_weights_is_paid_for(which, interval):
    weights = random_chain(3, (4, 6, 3))
    slopes, errors = [interval], [0.0, 0.0]
    multipliers = fast(weights, slopes)[0]
    exact, _ = verified_constant(weights, errors, slopes, multipliers)
    errors[which] = 1e-5
    paid, used = verified_constant(weights, errors, slopes, multipliers)
    assert paid > exact * (1 + 1e-6)
    # Every network within the error obeys it: here, one moved along its largest direction.
    u, _, v = np.linalg.svd(weights[which])
    moved = list(weights)
    moved[which] = weights[which] + 1e-5 * np.outer(u[:, 0], v[0])
    assert paid**2 >= exact_square(moved, slopes, used)


@given(st.integers(0, 10**6), st.floats(-1e-13, 1e-13))
def test_nearly_singular_matrices_are_only_accepted_if_positive(seed, shift):
    """_is_positive against 60 digits, where rounding decides."""
    random = np.random.default_rng(seed)
    q, _ = np.linalg.qr(random.normal(size=(8, 8)))
    matrix = (q * np.array([0.0, *random.uniform(0.1, 2, 7)])) @ q.T + shift * np.eye(8)
    matrix = (matrix + matrix.T) / 2
    scale = _verified.scaling(matrix)
    if scale is not None and _verified.is_positive(matrix, scale, 0.0):
        with mpmath.workdps(60):
            least = min(mpmath.eigsy(mpmath.matrix(matrix.tolist()), eigvals_only=True))
            assert least >= 0


def test_extreme_scales_are_refused_or_right():
    for scale in (2.0**-480, 2.0**480):
        weights, slopes, (m,) = two_layer()
        weights = [weights[0] * scale, weights[1]]
        answer = verified_constant(weights, [0.0] * 2, slopes, [m / scale**2])
        assert answer is None or (np.isfinite(answer[0]) and answer[0] > 0)
    assert verified_constant(weights, [0.0] * 2, slopes, [np.full(6, np.inf)]) is None


@pytest.mark.parametrize("dtype", ["float16", "float32", "longdouble", "int8"])
def test_multipliers_of_any_dtype_count_in_float64(dtype):
    """Of two maps by 1 and slopes up to 1 no bound is below 1."""
    weights, found = [np.eye(1)] * 2, 0
    for slope in (0.5, 0.85, *np.linspace(-0.9, 0.8, 9)):
        shares = 1 + np.outer([1e-2, 3e-7], np.linspace(-1, 1, 30))
        for m in np.unique((shares / (1 - slope)).astype(dtype))[:, None]:
            answers = [verified_constant(weights, [0.0] * 2, [(slope, 1.0)], [m])]
            proven = prove(weights, [0.0] * 2, [(slope, 1.0)], [m], 2.0**-30)
            answers.append(None if proven is None else (proven,))
            for answer in filter(None, answers):
                found += 1
                assert answer[0] >= 1
    assert found


@pytest.mark.parametrize(
    "multipliers",
    [None, (1.0, 2.0), (np.ones((6, 2)),), (np.ones(6) + 0j,), (np.array([None] * 6),), ("a",)],
    ids=["None", "numbers", "matrix", "complex", "objects", "text"],
)
def test_multipliers_that_are_no_real_vectors_are_refused(multipliers):
    weights, slopes, _ = two_layer()
    for attempt in (
        lambda: verified_constant(weights, [0.0] * 2, slopes, multipliers),
        lambda: prove(weights, [0.0] * 2, slopes, multipliers, 1e-12),
    ):
        with pytest.raises(ValueError, match="must be a list or tuple of vectors of real numbers"):
            attempt()


@pytest.mark.parametrize("n, error", [(2, 0.0), (2, 1e-12), (500, 0.0)])
def test_the_factorisations_rounding_is_allowed_for(n, error):
    """The smallest eigenvalue known: that of one block [[1, 1 - t], [1 - t, 1]] is t."""
    u = 2.0**-53
    allowance = 2 * (n + 2) * n * u + 8 * u * (2 + error)
    for share, holds in ((0.8, False), (1.3, True)):
        matrix = np.eye(n)
        matrix[0, 1] = matrix[1, 0] = 1 - (error + share * allowance)
        assert _verified.is_positive(matrix, np.zeros(n, int), error) is holds


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 1.0), (-0.2, 1.0)])
@pytest.mark.parametrize("error", [0.0, 1e-12, 0.1])
def test_what_is_allowed_for_when_t_is_assembled(interval, error, monkeypatch):
    """All scales are 1 here: half of the roundings that the text counts, and the exact change."""
    (a, b), seen = interval, []
    w = random_chain(3, (6, 4))[0] / 4
    m = np.full(4, 0.9)
    monkeypatch.setattr(_verified, "scaling", lambda matrix: np.zeros(len(matrix), int))
    monkeypatch.setattr(_verified, "is_positive", lambda *arguments: seen.append(arguments))
    _verified._hidden_holds(np.eye(6), w, error, interval, m, np.eye(4) * 0.8)
    matrix, _, allowed = seen[0]
    u, f = 2.0**-53, w * np.sqrt(1.8 * abs(a * b))
    needed = 8 * u * np.linalg.norm(matrix) + (a + b) * 0.9 * error
    # The product's rounding, and the change by a W that is off along its largest direction.
    needed += 4 * u * np.linalg.norm(np.abs(f).T @ np.abs(f), 2)
    change = error * np.sqrt(1.8 * abs(a * b))
    needed += change * (2 * np.linalg.norm(f, 2) + change)
    assert needed * (1 - 1e-9) <= allowed <= 30 * needed


def test_pairs_of_equal_entries_keep_their_roundings():
    """Of g_ii + g_jj - 2 g_ij, which cancels, something is left for what was rounded."""
    pairs = _verified._last_pairs(np.eye(2), np.array([[0.6, 0.8], [0.6, 0.8]]), 0.0)
    assert pairs[0, 1] ** 2 >= 2.0**-53 * 4
