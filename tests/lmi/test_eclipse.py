"""ECLipsE and its closed form: the paper's recursion, deep and wide networks, general slopes."""

import itertools
import time

import keras
import numpy as np
import pytest
from chains import dense_chain, largest_stretch, product_of_norms
from hypothesis import given
from hypothesis import strategies as st

import keras_lipnext as lip
from keras_lipnext.lmi._chain import read_chain
from keras_lipnext.lmi._verified import schur_complement
from keras_lipnext.lmi.eclipse import _closed_form, fast, scaled
from keras_lipnext.norms.matrices import spectral_norm_bound

pytestmark = pytest.mark.once


def papers_recursion(weights):
    """L of ECLipsE-Fast as the paper writes it, for slopes in [0, 1]."""
    m = np.eye(weights[0].shape[1])
    for w in weights[:-1]:
        s = w @ np.linalg.inv(m) @ w.T
        scale = 2 / np.linalg.norm(s, 2)
        m = scale * np.eye(len(w)) - scale**2 * s / 4
    w = weights[-1]
    return np.sqrt(np.linalg.norm(w @ np.linalg.inv(m) @ w.T, 2))


@pytest.mark.parametrize("sizes", [(5, 7, 3), (6, 9, 4, 8, 2), (10,) * 9], ids=str)
def test_the_closed_form_is_the_papers(sizes):
    model = dense_chain(sizes, seed=1)
    found = lip.lmi.eclipse_fast(model).constant
    expected = papers_recursion(read_chain(model).weights)
    assert expected * (1 - 1e-12) <= found <= expected * (1 + 1e-7)


@given(st.integers(0, 10**6), st.floats(-1, 1), st.floats(0.01, 2), st.integers(1, 4))
def test_never_above_the_product_whatever_the_slopes(seed, low, width, depth):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 9, depth + 2)
    weights = [random.normal(size=(n, m)) for m, n in itertools.pairwise(sizes)]
    slopes = [(low, low + width)] * depth
    square = fast(weights, slopes)[1]
    steepest = max(abs(low), abs(low + width))
    product = np.prod([np.linalg.norm(w, 2) for w in weights]) * steepest**depth
    assert np.sqrt(square) <= product * (1 + 1e-6)


def test_the_closed_form_is_the_best_single_multiplier_of_its_layer():
    """P_1's smallest eigenvalue, over a fine grid of lambda."""
    w = np.random.default_rng(0).normal(size=(4, 6))
    for slopes in [(0.0, 1.0), (0.2, 1.0), (-0.3, 1.1), (-1.0, 0.5)]:
        (m,), _ = fast([w, np.eye(4)], [slopes])

        def least(factor, slopes=slopes, m=m):
            p = schur_complement(np.eye(6), w, slopes, factor * m)
            return -np.inf if p is None else np.linalg.eigvalsh(p)[0]

        best = max(least(factor) for factor in np.linspace(0.3, 1.7, 141))
        assert least(1.0) == pytest.approx(best, rel=1e-9)
        steepest = max(map(abs, slopes))
        assert least(1.0) == pytest.approx(1 / (steepest * np.linalg.norm(w, 2)) ** 2, rel=1e-9)


@given(st.integers(0, 10**6), st.floats(-1, 1), st.floats(0.01, 2))
def test_in_any_units_the_closed_form_keeps_its_promise(seed, low, width):
    """P_1 >= D^-1 / (s_D max(|a|, |b|)^2), and s_T <= 1 for the T of Gershgorin's theorem."""
    random = np.random.default_rng(seed)
    w = random.normal(size=(5, 6))
    s, slopes = w @ w.T, (low, low + width)
    q = random.uniform(0.1, 10, 5)
    rows = (np.abs(s) * q).sum(axis=1) / q
    for d in (random.uniform(0.01, 100, 5), rows):
        m = _closed_form(np.eye(6), w, slopes, d)
        norm = np.linalg.norm(s / np.sqrt(np.outer(d, d)), 2)
        assert norm <= 1 + 1e-12 or d is not rows
        p = schur_complement(np.eye(6), w, slopes, m)
        promised = np.diag(1 / (d * norm * max(map(abs, slopes)) ** 2))
        gap = np.linalg.eigvalsh((p - promised) * np.sqrt(np.outer(d, d)))[0]
        assert gap >= -1e-8 * np.abs(p * np.sqrt(np.outer(d, d))).max()


@pytest.mark.parametrize("sizes", [(8, 5), (6, 9, 4), (20, 30, 30, 30, 10), (10,) * 11], ids=str)
def test_multipliers_a_neuron_are_never_worse_and_better_in_depth(sizes):
    model = dense_chain(sizes, seed=2)
    fine, plain = lip.lmi.eclipse_diagonal(model), lip.lmi.eclipse_fast(model)
    assert fine.constant <= plain.constant * (1 + 1e-6)
    assert largest_stretch(read_chain(model), samples=300, rounds=10) <= fine.constant
    if len(sizes) > 3:
        assert fine.constant < 0.95 * plain.constant
    # The estimate that chooses is what is proven.
    chain = read_chain(model)
    best = min(f(chain.weights, chain.slopes)[1] for f in (fast, scaled))
    assert fine.constant == pytest.approx(np.sqrt(best), rel=1e-6)


def test_neurons_that_nothing_reads_and_rows_of_zeros():
    model = dense_chain((4, 6, 5, 3), seed=3)
    kernels = [layer.kernel.numpy().copy() for layer in model.layers]
    kernels[0][:, 2] = 0
    kernels[1][4] = 0
    for layer, kernel in zip(model.layers, kernels):
        layer.kernel.assign(kernel)
    found = lip.lmi.eclipse_diagonal(model).constant
    assert found <= lip.lmi.eclipse_fast(model).constant * (1 + 1e-6)
    assert largest_stretch(read_chain(model), samples=300, rounds=10) <= found


def test_one_hidden_layer_is_lipsdp():
    model = dense_chain((5, 8, 3), "leaky_relu")
    assert lip.lmi.eclipse(model).constant == pytest.approx(
        lip.lmi.lipsdp(model).constant, rel=1e-5
    )


@pytest.mark.slow
def test_a_hundred_layers_of_80_neurons_in_seconds():
    model = dense_chain((80,) * 101 + (10,))
    started = time.perf_counter()
    result = lip.lmi.eclipse_fast(model)
    assert time.perf_counter() - started < 20
    chain = read_chain(model)
    logarithm = sum(np.log(np.linalg.norm(w, 2)) for w in chain.weights)
    assert np.log(result.constant) < logarithm - 20
    assert result.constant <= papers_recursion(chain.weights) * (1 + 1e-5)


@pytest.mark.slow
def test_wide_layers():
    model = dense_chain((300, 1000, 300, 10))
    assert lip.lmi.eclipse_fast(model).constant < 0.9 * product_of_norms(model)


def test_convolutions_batch_normalization_and_rescaling():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(3, 3, strides=2, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.LeakyReLU(),
            keras.layers.Conv2D(4, 3, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(5),
        ]
    )
    result = lip.lmi.eclipse_fast(model)
    assert largest_stretch(read_chain(model), samples=300, rounds=10) <= result.constant
    # Tighter than the layers one by one: a small image's convolution has less than the kernel's.
    norms = lip.lipschitz_bound(model).constant
    norms *= spectral_norm_bound(model.layers[-1].kernel.numpy())
    assert result.constant < norms


def test_extreme_weights_are_scaled_or_refused():
    small, large = dense_chain((4, 6, 3)), dense_chain((4, 6, 3))
    for layer in large.layers:
        layer.kernel.assign(layer.kernel * 2.0**60)
    constants = [lip.lmi.eclipse_fast(model).constant for model in (small, large)]
    assert constants[1] == constants[0] * 2.0**120
    deep = dense_chain((3,) * 10)
    for layer in deep.layers:
        layer.kernel.assign(layer.kernel * 2.0**70)
    with pytest.raises((ValueError, RuntimeError)):
        lip.lmi.eclipse_fast(deep)


def test_nan_weights_are_refused():
    model = dense_chain((4, 6, 3))
    model.layers[0].kernel.assign(model.layers[0].kernel * np.nan)
    methods = (lip.lmi.eclipse_fast, lip.lmi.eclipse_diagonal, lip.lmi.eclipse, lip.lmi.lipsdp)
    for method in methods:
        with pytest.raises(ValueError, match="NaN"):
            method(model)
