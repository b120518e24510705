from fractions import Fraction
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_lipnext.norms import matrices as norms
from keras_lipnext.norms.matrices import (
    _gram,
    _gram_iteration,
    _is_below,
    _near_orthogonal_square,
    scaled,
    spectral_norm_bound,
)
from keras_lipnext.norms.roundoff import gamma

pytestmark = pytest.mark.once

KINDS = [
    "random",
    "rank one",
    "repeated rows",
    "orthogonal",
    "drifted",
    "bfloat16",
    "diagonal",
    "clustered",
    "dense top",
    "three values",
]


def near_orthogonal_bound(w):
    """The first thing that `spectral_norm_bound` tries."""
    return scaled(w, _gram, _near_orthogonal_square, np.sqrt)


def gram_iteration_bound(w, iterations=12):
    """And the last."""
    return scaled(w, _gram, lambda gram: _gram_iteration(gram, iterations))


@pytest.fixture(autouse=True)
def empty_cache():
    norms._CACHE.clear()


def orthogonal(rows, columns, rng):
    q, _ = np.linalg.qr(rng.normal(size=(max(rows, columns), min(rows, columns))))
    return q if rows >= columns else q.T


def matrix(kind, rows, columns, seed):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, columns))
    if kind == "random":
        return w
    if kind == "rank one":
        return np.outer(w[:, 0], w[0])
    if kind == "repeated rows":
        return np.repeat(w[:1], rows, axis=0)
    if kind == "diagonal":
        return np.eye(rows, columns) * rng.uniform(1, 1 + 1e-12, size=columns)
    w = orthogonal(rows, columns, rng)
    if kind == "drifted":
        return w + 1e-4 * rng.normal(size=w.shape)
    if kind == "bfloat16":
        return w.astype(ml_dtypes.bfloat16).astype("float64")
    n = min(rows, columns)
    spectrum = {
        "orthogonal": np.ones(n),
        "clustered": np.where(np.arange(n) < n // 2, 1 - 1e-9 * rng.uniform(size=n), 0.5),
        "dense top": np.sqrt(1 - (np.arange(n) / n) ** 2),  # hard for Lanczos
        "three values": np.arange(n) % 3 + 1.0,  # its Krylov spaces have three dimensions
    }[kind]
    q = orthogonal(n, n, rng)
    return (w * spectrum) @ q if rows >= columns else q @ (spectrum[:, None] * w)


@given(
    st.sampled_from(KINDS),
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from([1.0, 1e-30, 1e30, 1e-150, 1e150, 3.0]),
    st.sampled_from([0, 400]),
    st.integers(0, 1000),
)
def test_is_above_the_norm_and_tight(kind, rows, columns, scale, small, seed):
    w = scale * matrix(kind, rows, columns, seed)
    largest = np.linalg.norm(w / scale, 2)
    with mock.patch.object(norms, "_SMALL", small):  # 0: Lanczos for all
        bound = spectral_norm_bound(w) / scale
    # NumPy's own singular value carries a rounding error of some 1e-15.
    assert largest * (1 - 4e-15) <= bound <= largest * (1 + 1e-9)
    # The cheaper bounds are above as well, and as tight as theory says.
    smaller = min(rows, columns)
    assert largest * (1 - 4e-15) <= near_orthogonal_bound(w) / scale
    for iterations in (1, 2, 5, 20):
        bound = gram_iteration_bound(w, iterations) / scale
        excess = smaller ** (2.0 ** -(iterations + 1))
        assert largest * (1 - 4e-15) <= bound <= largest * excess * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_matrices_of_a_trained_size(kind):
    w = matrix(kind, 512, 512, 0).astype("float32")
    largest = np.linalg.norm(w.astype("float64"), 2)
    assert largest * (1 - 2e-15) <= spectral_norm_bound(w) < largest * (1 + 1e-8)


def test_exact_norms():
    """Matrices whose norm is known without computing: the bounds must not fall below."""
    hadamard = np.array([[1.0]])
    for _ in range(6):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    for w, norm in [
        (hadamard, 8.0),
        (np.ones((32, 32)), 32.0),
        (np.eye(50), 1.0),
        (np.eye(50)[::-1, :20], 1.0),
        (np.eye(500), 1.0),
        (np.diag([3.0, 4.0]), 4.0),
        (np.array([[3], [4]]), 5.0),
        (np.full((1, 1), 2.0**-1022), 2.0**-1022),
        (np.full((1, 1), 5e-324), 5e-324),
    ]:
        assert norm <= spectral_norm_bound(w) <= norm * (1 + 1e-9) + 1e-306
        assert norm <= near_orthogonal_bound(w)
        assert norm <= gram_iteration_bound(w, 3)


@pytest.mark.parametrize(
    "bound", [spectral_norm_bound, near_orthogonal_bound, gram_iteration_bound]
)
@pytest.mark.parametrize("seed", range(60))
def test_is_above_exact_norms(bound, seed):
    """Integer matrices of rank one: ||u v^T||^2 = |u|^2 |v|^2 in exact arithmetic.

    The eigenvalue solver's own answer falls below it in a tenth of the cases.
    """
    rng = np.random.default_rng(seed)
    u, v = rng.integers(-1000, 1000, 40), rng.integers(-1000, 1000, 30)
    exact = int((u.astype(object) ** 2).sum()) * int((v.astype(object) ** 2).sum())
    assert Fraction(bound(np.outer(u, v).astype("float64"))) ** 2 >= exact


@pytest.mark.parametrize("size", [8, 64, 128])
def test_the_gram_matrix_is_as_close_as_claimed(size):
    """Integers of 30 bits, whose products do not fit in float64; the truth in Python's integers."""
    integers = np.random.default_rng(size).integers(-(2**30), 2**30, (size, 8))
    gram, error = _gram(np.ldexp(integers.astype("float64"), -30))
    exact = integers.T.astype(object) @ integers.astype(object)
    computed = np.vectorize(lambda g: int(Fraction(g) * 2**60), otypes=[object])(gram)
    difference = (computed - exact).astype("float64") / 2.0**60
    assert 0 < np.linalg.norm(difference, 2) <= error


@pytest.mark.parametrize(
    "bound", [spectral_norm_bound, near_orthogonal_bound, gram_iteration_bound]
)
@pytest.mark.parametrize("columns", [1, 2])
def test_sums_that_lose_many_small_terms(bound, columns):
    """1 + 2^-54 + 2^-54 + ...: many of the small squares vanish, all in one direction."""
    small = 2**16
    w = np.kron(np.eye(columns), np.concatenate([[1.0], np.full(small, 2.0**-27)])[:, None])
    exact = 1 + Fraction(small, 2**54)
    computed = Fraction(float(_gram(w)[0][0, 0]))
    if exact - computed < Fraction(1, 2**50):
        pytest.skip("this BLAS sums more carefully")
    assert Fraction(bound(w)) ** 2 >= exact


def test_near_orthogonal_matrices_need_one_product_only():
    for w in (matrix("orthogonal", 64, 48, 0), 3 * matrix("orthogonal", 48, 64, 0)):
        largest = np.linalg.norm(w, 2)
        assert largest * (1 - 2e-15) <= near_orthogonal_bound(w) <= largest * (1 + 1e-9)
        with mock.patch.object(norms, "_is_below", side_effect=AssertionError):
            assert spectral_norm_bound(w) == near_orthogonal_bound(w)
    # Rounded to float32 the distance is felt, and the Cholesky test has to say how much.
    w = w.astype("float32")
    assert 1e-8 < near_orthogonal_bound(w) / spectral_norm_bound(w) - 1 < 1e-5


def test_the_cholesky_test_refuses_what_is_too_small():
    for n in range(2, 60):
        root = 1j ** np.arange(n)
        # Largest eigenvalue n, exactly; symmetric and Hermitian.
        for gram in (np.ones((n, n)), np.outer(root, root.conj())):
            assert not _is_below(gram, n * (1 - 1e-9), 0.0)
            assert not _is_below(gram, float(n), 0.0)  # equality cannot be proven in rounding
            assert _is_below(gram, n * (1 + 1e-9), 0.0)
            assert not _is_below(gram, n * (1 + 1e-9), 2e-9 * n)  # nor past the Gram matrix's error
    # One of several is too large.
    several = np.stack([np.eye(3), 2 * np.eye(3), np.eye(3)])
    assert _is_below(several, 2.001, 0.0)
    assert not _is_below(several, 1.999, 0.0)
    for bad in (np.full((2, 2), np.nan), np.array([[1, np.nan], [np.nan, 1]])):
        assert not _is_below(bad, 3.0, 0.0)


def power_iteration(gram):
    v = np.random.default_rng(1).normal(size=len(gram))
    for _ in range(10):
        v = gram @ v
        v /= np.linalg.norm(v)
    return v @ gram @ v


@pytest.mark.parametrize("kind", ["drifted", "bfloat16", "random", "diagonal"])
def test_a_power_iteration_would_not_do(kind):
    """Candidates from below are rejected until one is proven; power iteration itself is unsound."""
    w = matrix(kind, 96, 96, 3)
    if kind == "diagonal":
        w[5, 5] = 1.01
    largest = np.linalg.norm(w, 2)
    assert np.sqrt(power_iteration(w.T @ w)) < largest * (1 - 1e-5)
    for candidate in (power_iteration, lambda gram: 0.0, lambda gram: np.trace(gram) / len(gram)):
        with (
            mock.patch.object(norms, "_lanczos", candidate),
            mock.patch.object(norms, "_eigvalsh", candidate),
        ):
            norms._CACHE.clear()
            bound = spectral_norm_bound(w)
        assert largest * (1 - 2e-15) <= bound <= largest * (1 + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_falls_back_on_gram_iteration(kind):
    w = matrix(kind, 20, 30, 0)
    largest = np.linalg.norm(w, 2)
    with mock.patch.object(norms, "_is_below", return_value=False):
        assert largest * (1 - 2e-15) <= spectral_norm_bound(w) <= largest * (1 + 1e-5)


def test_lanczos_failing_leaves_the_gram_matrix_as_it_was():
    w = matrix("dense top", 40, 40, 0)
    gram = w.T @ w
    before = gram.copy()
    with mock.patch.object(norms, "_SMALL", 0):
        assert norms._lanczos(gram, steps=5) is None
        assert norms._lanczos(gram) == pytest.approx(np.linalg.eigvalsh(gram)[-1], rel=1e-9)
    np.testing.assert_array_equal(gram, before)


def test_sees_one_changed_entry():
    w = matrix("orthogonal", 64, 64, 0)
    w[5, 7] += 0.05
    assert spectral_norm_bound(w) >= np.linalg.norm(w, 2) > 1.001


def test_equal_matrices_are_bounded_once():
    w = matrix("random", 7, 5, 0)
    with mock.patch.object(norms, "_cholesky_bound", wraps=norms._cholesky_bound) as inner:
        first = spectral_norm_bound(w)
        assert spectral_norm_bound(w.copy()) == first
        assert spectral_norm_bound(np.asfortranarray(w)) == first
        assert inner.call_count == 1
        assert spectral_norm_bound(w.reshape(5, 7)) != first  # same bytes, another shape
        w[0, 0] += 1e-15  # in place: other bytes
        spectral_norm_bound(w)
        spectral_norm_bound(w.astype("float32"))
        assert inner.call_count == 4
        # uint8 and int8 of the same bytes are other numbers.
        bytes_ = np.full((2, 2), 255, "uint8")
        assert spectral_norm_bound(bytes_) > 500
        assert spectral_norm_bound(bytes_.view("int8")) < 3


def test_the_cache_is_bounded():
    with mock.patch.object(norms, "_CACHE_ENTRIES", 3):
        for i in range(10):
            spectral_norm_bound(np.full((1, 1), i))
    assert len(norms._CACHE) == 3


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", ml_dtypes.bfloat16, "int8", "uint8", "bool"]
)
def test_dtypes_that_float64_holds(dtype):
    w = np.array([[1, 0], [1, 1]]).astype(dtype)
    assert spectral_norm_bound(w) == pytest.approx((1 + 5**0.5) / 2, rel=1e-9)


@pytest.mark.parametrize(
    "w", [np.eye(2) * 1j, np.eye(2, dtype="longdouble"), np.eye(2, dtype=object), [["a"]]]
)
def test_dtypes_that_float64_does_not_hold(w):
    with pytest.raises(ValueError, match="that float64 holds"):
        spectral_norm_bound(w)


def test_integers_that_float64_does_not_hold():
    with pytest.raises(ValueError, match="integers beyond 2"):
        spectral_norm_bound([[2**53 + 1]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_processor_that_flushes_subnormal_numbers_to_zero(dtype):
    torch = pytest.importorskip("torch")
    tiny = np.finfo(dtype).tiny
    subnormal, mixed = np.full((3, 3), tiny / 2, dtype), np.full((3, 3), tiny * 0.75, dtype)
    mixed[0, 0] = tiny
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        bounds = [spectral_norm_bound(w) for w in (subnormal, mixed, np.full_like(mixed, -0.0))]
    finally:
        torch.set_flush_denormal(False)
    assert bounds[0] >= 1.5 * float(tiny)
    assert bounds[1] >= 2.25 * float(tiny)
    assert bounds[2] == 0


def test_zero():
    assert spectral_norm_bound(np.zeros((3, 4))) == 0
    assert spectral_norm_bound(-np.zeros((3, 4))) == 0
    assert near_orthogonal_bound(np.zeros((3, 4))) == 0
    assert gram_iteration_bound(np.zeros((3, 4))) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite(bad):
    w = np.eye(3)
    w[1, 2] = bad
    for bound in (spectral_norm_bound, near_orthogonal_bound, gram_iteration_bound):
        with pytest.raises(ValueError, match="NaN or infinite"):
            bound(w)


def test_overflow():
    with pytest.raises(ValueError, match="may overflow"):
        spectral_norm_bound(np.full((2, 2), 1e308))


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (0, 3)])
def test_not_a_matrix(shape):
    with pytest.raises(ValueError, match=r"needs a matrix. Received: shape="):
        spectral_norm_bound(np.zeros(shape))


def test_gamma():
    assert gamma(1000) >= 1000 * 2.0**-53
    with pytest.raises(ValueError, match="cannot be bounded usefully"):
        gamma(2**53)
