"""Products with constants as matrices: against NumPy's einsum."""

import numpy as np
import pytest

from keras_lipnext.lipschitz.rules.contractions import (
    NoContraction,
    einsum_axes,
    matmul_axes,
    matrices,
    tensordot_axes,
)

pytestmark = pytest.mark.once


def operator(axes, shape, weights):
    """The whole product as a matrix, from one sample's entries to the output's."""
    tensor, named, output = axes
    eye = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.einsum(f"{tensor},{named}->{output}", eye, weights).reshape(len(eye), -1)


@pytest.mark.parametrize(
    "subscripts, shape, weights",
    [
        ("bi,ij->bj", (3,), (3, 4)),
        ("...i,ij->...j", (2, 3), (3, 4)),
        ("b...i,ji->bj...", (2, 2, 3), (4, 3)),
        ("bhi,hij->bhj", (2, 3), (2, 3, 4)),
        ("bijk,jl->bkl", (2, 3, 2), (3, 4)),
        ("bij,ij->b", (2, 3), (2, 3)),
        ("bij,->bij", (2, 3), ()),
        ("bi,i->bi", (3,), (3,)),
        ("bij,kjl->bikl", (2, 3), (2, 3, 2)),
    ],
)
def test_blocks_have_the_products_norm(subscripts, shape, weights):
    values = np.random.default_rng(0).normal(size=weights)
    axes = einsum_axes(subscripts, len(shape) + 1)
    blocks = matrices(axes, (None, *shape), values)
    whole = operator(axes, shape, values)
    expected = np.linalg.svd(whole, compute_uv=False)
    found = np.linalg.svd(blocks, compute_uv=False)
    assert found.max() == pytest.approx(expected.max())
    # Each block's singular values come as often as the product is applied.
    times = (expected**2).sum() / (found**2).sum()
    assert times == pytest.approx(round(times))


@pytest.mark.parametrize(
    "rank, weights, axes", [(3, (3, 4), 1), (3, (2, 3, 4), 2), (3, (4, 3), [[2], [1]])]
)
def test_tensordot(rank, weights, axes):
    x, values = np.ones((5, 2, 3)), np.random.default_rng(0).normal(size=weights)
    tensor, named, output = tensordot_axes(rank, len(weights), axes)
    np.testing.assert_allclose(
        np.einsum(f"{tensor},{named}->{output}", x, values), np.tensordot(x, values, axes)
    )


@pytest.mark.parametrize("shape", [(3, 4), (3,)])
def test_matmul(shape):
    x, values = np.random.default_rng(0).normal(size=(5, 2, 3)), np.ones(shape)
    tensor, named, output = matmul_axes(3, len(shape), True)
    np.testing.assert_allclose(np.einsum(f"{tensor},{named}->{output}", x, values), x @ values)
    x, values = x.swapaxes(1, 2), values.T
    tensor, named, output = matmul_axes(3, len(shape), False)
    np.testing.assert_allclose(np.einsum(f"{tensor},{named}->{output}", x, values), values @ x)


@pytest.mark.parametrize(
    "axes, shape, weights",
    [
        (("abc", "cd", "acd"), (None, 2, None), (3, 4)),  # a size that only the data tell
        (("ab", "cb", "ac"), (None, 3), (4, 2)),
        (("ab", "bc", "ac"), (None, 2, 3), (3, 4)),
        (("ab", "ac", "abc"), (5, 2), (5, 4)),
    ],
)
def test_what_is_no_such_product(axes, shape, weights):
    with pytest.raises(NoContraction):
        matrices(axes, shape, np.ones(weights))
