import itertools
from fractions import Fraction
from functools import reduce
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_lipnext.norms import convolutions
from keras_lipnext.norms import matrices as norms
from keras_lipnext.norms.convolutions import _grid, convolution_norm_bound, depthwise_norm_bound

pytestmark = pytest.mark.once

ABOVE = 1 - 1e-14  # NumPy's singular values carry a rounding error


@pytest.fixture(autouse=True)
def empty_cache():
    norms._CACHE.clear()


def windows(size, taps, stride, dilation, padding):
    """For each tap the 0/1 matrix from the entries of an axis to the outputs that read them."""
    reach = (taps - 1) * dilation + 1
    if padding == "same":  # TensorFlow's rule: the odd entry at the end
        outputs = -(-size // stride)
        before = max((outputs - 1) * stride + reach - size, 0) // 2
    elif padding == "causal":
        outputs, before = -(-size // stride), reach - 1
    elif padding == "circular":
        outputs, before = size // stride, reach // 2
    else:
        outputs, before = max((size - reach) // stride + 1, 0), 0
    matrices = np.zeros((taps, outputs, size))
    for t, p in itertools.product(range(taps), range(outputs)):
        entry = p * stride + t * dilation - before
        if padding == "circular":
            entry %= size
        if 0 <= entry < size:
            matrices[t, p, entry] = 1
    return matrices


def ungrouped(kernel, groups):
    """The block diagonal kernel that computes the same."""
    *spatial, inputs, outputs = kernel.shape
    full = np.zeros((*spatial, groups, inputs, groups, outputs // groups))
    for g in range(groups):
        full[..., g, :, g, :] = kernel.reshape(*spatial, inputs, groups, -1)[..., g, :]
    return full.reshape(*spatial, inputs * groups, outputs)


def operator(kernel, sizes, strides, dilations, padding, groups=1):
    """The convolution's matrix, from flattened images to flattened images."""
    kernel = ungrouped(kernel, groups)
    spatial = kernel.shape[:-2]
    axes = [windows(*a, padding) for a in zip(sizes, spatial, strides, dilations)]
    return sum(
        np.kron(reduce(np.kron, [axis[i] for axis, i in zip(axes, t)]), kernel[t].T)
        for t in itertools.product(*map(range, spatial))
    )


def norm(matrix):
    return np.linalg.norm(matrix, 2) if matrix.size else 0.0


def supremum(kernel, strides=None, groups=1, points=64):
    """Nearly the norm on infinite images: the symbol of the blocks, on a fine grid."""
    kernel = ungrouped(kernel, groups)
    spatial = kernel.shape[:-2]
    strides = strides or (1,) * len(spatial)
    symbols = 0
    angles = np.stack(
        np.meshgrid(*[2 * np.pi * np.arange(points) / points] * len(spatial), indexing="ij"), -1
    ).reshape(-1, len(spatial))
    phases = np.array(list(itertools.product(*map(range, strides))))
    for t in itertools.product(*map(range, spatial)):
        block = tuple(i // s for i, s in zip(t, strides))
        place = (phases == [i % s for i, s in zip(t, strides)]).all(1)
        waves = np.exp(1j * angles @ block)
        symbols = symbols + waves[:, None, None] * np.kron(place[:, None], kernel[t])
    return np.linalg.norm(symbols, 2, axis=(1, 2)).max()


def random_kernel(shape, seed, smooth=False):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape)
    if smooth:  # symbols that are not flat, with the maximum off the grid
        kernel = kernel.cumsum(0) * np.cos(rng.uniform(0, 3) * np.arange(shape[0])).reshape(
            -1, *[1] * (len(shape) - 1)
        )
    return kernel


def check(kernel, strides=None, groups=1):
    strides = strides or (1,) * (kernel.ndim - 2)
    bound = convolution_norm_bound(kernel, strides, groups)
    truth = supremum(kernel, strides, groups)
    assert truth * ABOVE <= bound <= 1.02 * truth
    return bound


@settings(max_examples=60)
@given(
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([1, 1, 2]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_one_axis(taps, inputs, outputs, stride, dilation, groups, smooth, seed):
    kernel = random_kernel((taps, inputs, outputs * groups), seed, smooth)
    dilation = 1 if stride > 1 else dilation
    bound = check(kernel, (stride,), groups)
    assert convolution_norm_bound(kernel, stride, groups, dilation) == bound
    for padding in ("valid", "same", "causal", "circular"):
        for size in (1, 2, 3, 5, 7, 8, 12, 20):
            if padding != "circular" or size % stride == 0:
                matrix = operator(kernel, [size], [stride], [dilation], padding, groups)
                assert norm(matrix) * ABOVE <= bound


@settings(max_examples=30)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
    st.integers(1, 2),
    st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.integers(1, 2),
    st.sampled_from([1, 1, 2]),
    st.integers(0, 1000),
)
def test_two_axes(taps, inputs, outputs, strides, dilation, groups, seed):
    kernel = random_kernel((*taps, inputs, outputs * groups), seed)
    dilation = 1 if max(strides) > 1 else dilation
    bound = check(kernel, strides, groups)
    for padding in ("valid", "same", "circular"):
        for sizes in ((1, 2), (4, 5), (6, 4)):
            if padding != "circular" or not any(np.mod(sizes, strides)):
                matrix = operator(kernel, sizes, strides, [dilation] * 2, padding, groups)
                assert norm(matrix) * ABOVE <= bound


def test_three_axes():
    kernel = random_kernel((2, 2, 3, 2, 1), 0)
    for strides in ((1, 1, 1), (2, 1, 3), (1, 2, 2)):
        bound = convolution_norm_bound(kernel, strides)
        truth = supremum(kernel, strides, points=24)
        assert truth * ABOVE <= bound <= 1.02 * truth
        for padding in ("same", "valid"):
            assert norm(operator(kernel, (3, 4, 4), strides, (1, 1, 1), padding)) <= bound


@pytest.mark.parametrize("shape", [(3, 5, 2), (2, 3, 4, 1), (4, 3, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_depthwise(shape, stride):
    kernel = random_kernel(shape, 0)
    bound = depthwise_norm_bound(kernel, stride)
    single = [convolution_norm_bound(kernel[..., c : c + 1, :], stride) for c in range(shape[-2])]
    assert bound == pytest.approx(max(single), rel=3e-3)
    spatial = shape[:-2]
    truth = max(
        supremum(kernel[..., c : c + 1, :], (stride,) * len(spatial)) for c in range(shape[-2])
    )
    assert truth * ABOVE <= bound <= 1.02 * truth
    flat = kernel.reshape(*spatial, 1, -1)
    matrix = operator(flat, [6] * len(spatial), [stride] * 2, [1] * 2, "same", groups=shape[-2])
    assert norm(matrix) * ABOVE <= bound


def test_many_depthwise_channels():
    kernel = random_kernel((3, 3, 512, 1), 0)
    truth = np.abs(np.fft.fft2(kernel, s=(64, 64), axes=(0, 1))).max()
    assert truth * ABOVE <= depthwise_norm_bound(kernel) <= 1.02 * truth


@pytest.mark.parametrize("points", [1e3, 1e12])
def test_a_supremum_between_the_grid_points(points):
    """W[t] turns by t phi: the symbol's norm is the number of taps, at theta = phi and -phi only.

    The largest value on the grid falls below it; the weights of the taps have to make up for that.
    """
    fell_below = 0
    for taps, phi in itertools.product((2, 3, 5, 8), np.linspace(0.1, 3, 12)):
        t = np.arange(taps)
        kernel = np.moveaxis(
            np.array([[np.cos(t * phi), -np.sin(t * phi)], [np.sin(t * phi), np.cos(t * phi)]]),
            -1,
            0,
        )
        with mock.patch.object(convolutions, "_OPERATIONS", 3e5 * points):
            symbol = convolutions._symbol_bound(kernel[None], [taps])
            assert taps * ABOVE <= symbol <= taps * (1.3 if points < 1e6 else 1.002)
            if points < 1e6:  # two axes: both weights
                plane = np.einsum("tab,scd->tsacbd", kernel, kernel).reshape(1, -1, 4, 4)
                assert taps**2 * ABOVE <= convolutions._symbol_bound(plane, [taps, taps])
            with mock.patch.object(convolutions, "_weights", lambda count, points: np.ones(count)):
                unweighted = convolutions._symbol_bound(kernel[None], [taps])
        fell_below += unweighted < taps * ABOVE
    assert fell_below > 20


@pytest.mark.parametrize("count", range(1, 10))
def test_the_weights_make_the_symbol_a_mean_of_those_on_the_grid(count):
    """Note 4 as it stands: nonnegative weights of sum 1, exact for every frequency."""
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 5)
    for points in (count, count + 1, 2 * count + 3, 40):
        weights = convolutions._weights(count, points)
        assert (weights >= 1 - 1e-12).all()
        double = count % 2 == 0
        circle, n = (
            (2 * points, 2 * points - count) if double else (points, points - count // 2 - 1)
        )
        a = np.sin(np.arange(1, n + 2) * np.pi / (n + 2))
        grid = 2 * np.pi * np.arange(circle) / circle
        waves = np.exp(1j * np.subtract.outer(angles, grid)[..., None] * np.arange(n + 1))
        shares = np.abs(waves @ a) ** 2 / (a @ a) / circle
        assert shares.sum(axis=1) == pytest.approx(1, rel=1e-12)
        for t in range(count):
            m = (2 * t - count + 1) if double else t - count // 2
            mean = shares @ (weights[t] * np.exp(1j * m * grid))
            np.testing.assert_allclose(mean, np.exp(1j * m * angles), atol=1e-11)


def test_the_grid_is_as_fine_as_it_promises():
    """Real polynomials that attain their maximum halfway between two points: the worst case."""
    for taps in range(2, 9):
        for cost, excess in ((1e3, 1e-3), (1e3, 0.1), (1e9, 1e-3), (1e11, 1e-3)):
            energies = np.ones(taps)
            (n,), weights = _grid(energies, cost, excess)
            assert n > taps - 1
            if cost == 1e3:
                assert np.sqrt((weights**2).mean()) <= 1 + excess
                assert n < 12 * taps / excess**0.5  # and no finer than need be
            # All taps at distance d / 2 from the middle: cos(d (t - t0) / 2), largest at t0.
            centre = 2 * np.pi * 0.5 / n
            grid = 2 * np.pi * np.arange(n) / n
            values = np.cos((taps - 1) * (grid - centre) / 2) * weights[0]
            assert np.abs(values).max() >= 1 - 1e-12
    sizes, weights = _grid(np.ones((3, 1, 4)), 1.0, 1e-3)
    assert sizes[1] == 1
    assert weights.shape == (3, 1, 4)
    middle, _ = _grid(np.array([1e-6, 1, 1e-6]), 1.0, 1e-3)
    assert middle[0] < 10  # a kernel that is nearly its middle tap needs hardly a grid


@pytest.mark.parametrize("strides, shape", [(1, (1, 1, 6, 5)), (3, (3, 3, 2, 7)), (4, (3, 2, 5))])
def test_patches_and_pointwise_are_tight(strides, shape):
    kernel = random_kernel(shape, 0)
    truth = norm(kernel.reshape(-1, shape[-1]))
    assert truth * ABOVE <= convolution_norm_bound(kernel, strides) <= truth * (1 + 1e-9)
    kernel = np.concatenate([kernel, 2 * random_kernel(shape, 1)], -1)  # two groups
    truth = 2 * norm(random_kernel(shape, 1).reshape(-1, shape[-1]))
    assert truth * ABOVE <= convolution_norm_bound(kernel, strides, 2) <= truth * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_is_above_exact_norms(seed):
    """Nonnegative integer taps of one channel: the norm is their sum. Patches: rank one."""
    rng = np.random.default_rng(seed)
    taps = rng.integers(0, 1000, (3, 3, 1, 1))
    assert int(taps.sum()) <= Fraction(convolution_norm_bound(taps)) <= 1.01 * int(taps.sum())
    u, v = rng.integers(-1000, 1000, 18), rng.integers(-1000, 1000, 8)
    exact = int((u.astype(object) ** 2).sum()) * int((v.astype(object) ** 2).sum())
    kernel = np.outer(u, v).reshape(3, 3, 2, 8)
    assert Fraction(convolution_norm_bound(kernel, 3)) ** 2 >= exact
    # One tap moved away: the same norm, a symbol that is constant on the torus.
    kernel = np.zeros((3, 2, 8))
    kernel[1] = np.outer(u[:2], v)
    exact = int((u[:2].astype(object) ** 2).sum()) * int((v.astype(object) ** 2).sum())
    assert Fraction(convolution_norm_bound(kernel)) ** 2 >= exact


def test_each_bound_alone_is_sound():
    for seed in range(10):
        kernel = random_kernel((3, 2, 2, 3), seed)
        truth = supremum(kernel)
        coarse = convolution_norm_bound(kernel, excess=0.25)
        assert truth * ABOVE <= coarse <= 1.26 * truth
        with mock.patch.object(convolutions, "_symbol_bound", return_value=np.inf):
            patches = convolution_norm_bound(kernel)
        norms._CACHE.clear()
        with mock.patch.object(convolutions, "_largest_norm", return_value=np.inf):
            symbol = convolution_norm_bound(kernel)
        assert truth * ABOVE <= min(symbol, patches)
        assert patches <= truth * 6**0.5
        norms._CACHE.clear()


def test_wrong_eigenvalues_are_found_out():
    """The candidates come from eigvalsh; what they are too low by is noticed."""
    kernel = random_kernel((3, 4, 4), 0)
    truth = supremum(kernel)
    eigvalsh = np.linalg.eigvalsh
    for wrong in (0.0, 0.5, 0.999):
        with mock.patch.object(np.linalg, "eigvalsh", lambda g, w=wrong: w * eigvalsh(g)):
            assert truth * ABOVE <= convolutions._symbol_bound(kernel[None], [3])
    with mock.patch.object(np.linalg, "eigvalsh", side_effect=np.linalg.LinAlgError):
        assert truth * ABOVE <= convolutions._symbol_bound(kernel[None], [3])


def test_costly_grids_are_coarser_or_left_out():
    kernel = random_kernel((3, 3, 4, 4), 0)
    truth = supremum(kernel)
    with mock.patch.object(convolutions, "_OPERATIONS", 1e7):
        assert truth * ABOVE <= convolution_norm_bound(kernel) <= 1.4 * truth
    with mock.patch.object(convolutions, "_OPERATIONS", 1.0):
        assert convolutions._symbol_bound(kernel.reshape(1, 9, 4, 4), [3, 3]) == np.inf


def test_many_channels():
    kernel = random_kernel((2, 32, 32), 0)
    bound = convolution_norm_bound(kernel)
    truth = supremum(kernel)
    assert truth * ABOVE <= bound <= 1.02 * truth


def test_small_chunks_change_nothing():
    kernel = random_kernel((3, 3, 4, 6), 0)
    bound = convolution_norm_bound(kernel, 1, 2)
    norms._CACHE.clear()
    with mock.patch.object(convolutions, "_NUMBERS", 1000):
        assert convolution_norm_bound(kernel, 1, 2) == pytest.approx(bound, rel=3e-4)


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
@pytest.mark.parametrize("shape, groups", [((3, 2, 2), 1), ((3, 1, 4), 4), ((1, 1, 4), 2)])
def test_extreme_scales(scale, shape, groups):
    kernel = random_kernel(shape, 0)
    truth = supremum(kernel, groups=groups)
    assert (
        truth * ABOVE <= convolution_norm_bound(scale * kernel, 1, groups) / scale <= 1.02 * truth
    )


def test_groups_of_different_scales():
    kernel = random_kernel((3, 2, 4), 0)
    kernel[..., :2] *= 1e-200
    truth = supremum(kernel, groups=2)
    assert truth * ABOVE <= convolution_norm_bound(kernel, 1, 2) <= 1.02 * truth


def test_circular_padding_out_of_step_is_not_covered():
    """Why the strides have to divide the size: two windows of two, three entries."""
    kernel = np.ones((2, 1, 1))
    assert convolution_norm_bound(kernel, 2) < norm(np.array([[1.0, 1, 0], [1, 0, 1]]))


def test_equal_kernels_are_bounded_once():
    kernel = random_kernel((3, 2, 4), 0)
    with mock.patch.object(convolutions, "_bound", wraps=convolutions._bound) as inner:
        first = convolution_norm_bound(kernel)
        assert convolution_norm_bound(kernel.copy(), (1,)) == first
        assert inner.call_count == 1
        others = [convolution_norm_bound(kernel, *a) for a in ((2,), (1, 2), (2, 2))]
        assert inner.call_count == 4
        assert len({first, *others}) == 4


def test_zero():
    assert convolution_norm_bound(np.zeros((3, 3, 2, 2))) == 0
    assert depthwise_norm_bound(np.zeros((3, 3, 2, 2))) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite(bad):
    kernel = np.ones((3, 2, 2))
    kernel[1, 0, 1] = bad
    for bound in (convolution_norm_bound, depthwise_norm_bound):
        with pytest.raises(ValueError, match="NaN or infinite"):
            bound(kernel)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((2, 2),), "Received: shape="),
        (((2, 0, 2),), "Received: shape="),
        (((1, 1, 1, 1, 1, 1),), "Received: shape="),
        (((3, 2, 2), 0), "strides=0"),
        (((3, 2, 2), 1.5), "strides=1.5"),
        (((3, 2, 2), (1, 1)), "strides="),
        (((3, 2, 2), 1, 3), "groups=3"),
        (((3, 2, 2), 1, 0), "groups=0"),
    ],
)
def test_refusals(arguments, message):
    shape, *rest = arguments
    with pytest.raises(ValueError, match=message):
        convolution_norm_bound(np.ones(shape), *rest)


def test_depthwise_refusals():
    with pytest.raises(ValueError, match="Received: shape="):
        depthwise_norm_bound(np.ones((2, 2)))


@pytest.mark.parametrize(
    "strides, dilation", [((2,), (3,)), ((3,), (2,)), ((2,), (2,)), ((4,), (6,)), ((2, 1), (1, 2))]
)
@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
def test_strides_with_dilation(strides, dilation, padding):
    """Against the operator on an image; where gaps and strides agree, tight."""
    rank = len(strides)
    for seed in range(3):
        kernel = random_kernel((*(3, 2)[:rank], 2, 3), seed)
        sizes = (40, 9)[:rank]
        truth = norm(operator(kernel, sizes, strides, dilation, padding))
        bound = convolution_norm_bound(kernel, strides, 1, dilation)
        assert truth * ABOVE <= bound <= 1.1 * truth


def test_strides_that_divide_the_dilation_see_a_sparser_image():
    kernel = random_kernel((3, 2, 2), 0)
    assert convolution_norm_bound(kernel, 2, 1, 4) == convolution_norm_bound(kernel)
    assert convolution_norm_bound(kernel, 4, 1, 2) == convolution_norm_bound(kernel, 2)


def small(kernel, sides, strides=1, groups=1, dilation=1, padding="same"):
    """The bound for images of these sides, and the truth; the bound for images of any size."""
    rank = kernel.ndim - 2
    bound = convolution_norm_bound(kernel, strides, groups, dilation, sides, padding)
    truth = norm(operator(kernel, sides, [strides] * rank, [dilation] * rank, padding, groups))
    assert truth * ABOVE <= bound <= truth * (1 + 1e-9) + 1e-300
    assert bound <= convolution_norm_bound(kernel, strides, groups, dilation) * (1 + 1e-9)
    return bound


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([1, 1, 2]),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from(["same", "valid"]),
    st.sampled_from(["random", "rank one", "zero columns"]),
    st.sampled_from([1.0, 1e-30, 1e30]),
    st.integers(0, 1000),
)
def test_small_images(
    taps, inputs, outputs, stride, dilation, groups, sides, padding, kind, scale, seed
):
    kernel = random_kernel((*taps, inputs, outputs * groups), seed)
    if kind == "rank one":
        kernel = kernel[..., :1] * kernel[:1, :1, :1]
    elif kind == "zero columns":
        kernel[..., 1:] = 0
    kernel = scale * kernel
    reach = [(k - 1) * dilation + 1 for k in taps]
    if padding == "valid" and any(k > side for k, side in zip(reach, sides)):
        return  # no output
    small(kernel, sides, stride, groups, dilation, padding)


def test_small_images_with_strides_and_dilation():
    for sides in ((5, 5), (4, 4), (3, 5)):
        small(random_kernel((3, 2, 2, 2), 0), sides, strides=2, dilation=2)
        small(random_kernel((2, 3, 2, 1), 0), sides, strides=2, dilation=3)


def test_a_kernel_larger_than_its_image_counts_by_what_meets_the_image():
    kernel = random_kernel((3, 3, 4, 5), 0)
    assert small(kernel, (1, 1)) == pytest.approx(norm(kernel[1, 1]), rel=1e-9)
    assert small(kernel, (1, 1)) < 0.6 * convolution_norm_bound(kernel)
    assert small(kernel, (4, 4)) < 0.95 * convolution_norm_bound(kernel)
    line = random_kernel((4, 2, 3), 0)
    small(line, (3,), padding="causal")
    small(line, (3,), padding="causal", dilation=2)
    small(random_kernel((2, 2, 3, 2, 1), 0), (2, 3, 2))


def test_small_images_of_depthwise_kernels():
    kernel = random_kernel((3, 3, 5, 2), 0)
    bound = depthwise_norm_bound(kernel, 1, 1, (2, 3), "same")
    truth = norm(operator(kernel.reshape(3, 3, 1, -1), (2, 3), (1, 1), (1, 1), "same", groups=5))
    assert truth * ABOVE <= bound <= truth * (1 + 1e-9)


def test_what_is_remembered_of_small_images_tells_them_apart():
    kernel = random_kernel((3, 3, 2, 2), 0)
    settings = [
        ((2, 2), "same"),
        ((2, 3), "same"),
        ((3, 3), "same"),
        ((3, 3), "valid"),
        (None, None),
    ]
    bounds = [convolution_norm_bound(kernel, 1, 1, 1, *s) for s in settings]
    assert len(set(bounds)) == len(bounds)
    assert bounds == [convolution_norm_bound(kernel, 1, 1, 1, *s) for s in settings]


def test_large_images_and_unknown_sides_have_the_bound_of_all_images():
    kernel = random_kernel((3, 3, 2, 2), 0)
    general = convolution_norm_bound(kernel)
    for sides in ((200, 200), (None, 3)):
        assert convolution_norm_bound(kernel, 1, 1, 1, sides, "same") == general
