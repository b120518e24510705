from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_lipnext.certification.norms import _is_below, gamma, spectral_norm_bound

KINDS = ["random", "rank one", "repeated rows", "orthogonal", "drifted", "bfloat16", "diagonal"]


def matrix(kind, rows, columns, seed):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, columns))
    if kind == "rank one":
        return np.outer(w[:, 0], w[0])
    if kind == "repeated rows":
        return np.repeat(w[:1], rows, axis=0)
    if kind == "diagonal":
        return np.eye(rows, columns) * rng.uniform(1, 1 + 1e-12, size=columns)
    if kind != "random":
        u, _, vh = np.linalg.svd(w, full_matrices=False)
        w = u @ vh
    if kind == "drifted":
        w = w + 1e-4 * rng.normal(size=w.shape)
    if kind == "bfloat16":
        bits = w.astype("float32").view("uint32") & 0xFFFF0000
        w = bits.view("float32").astype("float64")
    return w


@given(
    st.sampled_from(KINDS),
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from([1.0, 1e-30, 1e30, 1e-150, 1e150, 3.0]),
    st.integers(0, 1000),
)
def test_is_above_the_norm_and_tight(kind, rows, columns, scale, seed):
    w = scale * matrix(kind, rows, columns, seed)
    largest = np.linalg.norm(w / scale, 2)
    bound = spectral_norm_bound(w) / scale
    # NumPy's own singular value carries a rounding error of some 1e-15.
    assert largest * (1 - 4e-15) <= bound <= largest * (1 + 1e-9)


def test_exact_norms():
    """Matrices whose norm is known without computing: the bound must not fall below."""
    hadamard = np.array([[1.0]])
    for _ in range(6):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    for w, norm in [
        (hadamard, 8.0),
        (np.ones((32, 32)), 32.0),
        (np.eye(50), 1.0),
        (np.eye(50)[::-1, :20], 1.0),
        (np.diag([3.0, 4.0]), 4.0),
        (np.full((1, 1), 5e-324), 5e-324),
    ]:
        assert norm <= spectral_norm_bound(w) <= norm * (1 + 1e-9) + 1e-323


@pytest.mark.parametrize("seed", range(60))
def test_is_above_exact_norms(seed):
    """Integer matrices of rank one: ||u v^T||^2 = |u|^2 |v|^2 in exact arithmetic.

    The eigenvalue solver's own answer falls below it in a tenth of the cases.
    """
    rng = np.random.default_rng(seed)
    u, v = rng.integers(-1000, 1000, 40), rng.integers(-1000, 1000, 30)
    exact = int((u.astype(object) ** 2).sum()) * int((v.astype(object) ** 2).sum())
    bound = spectral_norm_bound(np.outer(u, v).astype("float64"))
    assert Fraction(bound) ** 2 >= exact


def test_the_cholesky_test_refuses_what_is_too_small():
    for n in range(2, 60):
        gram = np.ones((n, n))  # largest eigenvalue n, exactly
        assert not _is_below(gram, n * (1 - 1e-9), 0.0)
        assert not _is_below(gram, float(n), 0.0)  # equality cannot be proven in rounding
        assert _is_below(gram, n * (1 + 1e-9), 0.0)
        assert not _is_below(gram, n * (1 + 1e-9), 2e-9 * n)  # nor past the Gram matrix's error


def test_sees_one_changed_entry():
    w = matrix("orthogonal", 64, 64, 0)
    w[5, 7] += 0.05
    assert spectral_norm_bound(w) >= np.linalg.norm(w, 2) > 1.001


def test_float32_matrices_of_a_trained_size():
    w = matrix("orthogonal", 512, 512, 0).astype("float32")
    largest = np.linalg.norm(w.astype("float64"), 2)
    assert largest * (1 - 1e-15) <= spectral_norm_bound(w) < largest * (1 + 1e-8)


def test_zero():
    assert spectral_norm_bound(np.zeros((3, 4))) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite(bad):
    w = np.eye(3)
    w[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        spectral_norm_bound(w)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (0, 3)])
def test_not_a_matrix(shape):
    with pytest.raises(ValueError, match=r"needs a matrix. Received: shape="):
        spectral_norm_bound(np.zeros(shape))


def test_gamma():
    assert gamma(1000) >= 1000 * 2.0**-53
    with pytest.raises(ValueError, match="cannot be bounded usefully"):
        gamma(2**53)
