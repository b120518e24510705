import keras
import numpy as np
import pytest
import sdp_checks

from keras_lipnext.activations import FUNCTIONS
from keras_lipnext.layers import SDPDense

BOUNDS = ["aol", "sll", "spectral", "orthogonal"]
FREE = BOUNDS[:3]


@pytest.mark.parametrize("bound", BOUNDS)
def test_equals_numpy(bound):
    sdp_checks.check_values(SDPDense(5, bound, activation="elu"), (7,), "SDPDense")


@pytest.mark.parametrize("bound", FREE)
@pytest.mark.parametrize("units, features", [(8, 8), (5, 12), (12, 5), (1, 6), (70, 90)])
def test_constant_of_any_kernel(bound, units, features):
    largest = sdp_checks.check_constants(SDPDense(units, bound), (None, features), 64)
    assert largest > 1 - 1e-4  # the rank one kernels reach it


def test_a_diagonal_that_is_too_small_would_be_seen(monkeypatch):
    """The check of the constant is no formality: T without the terms off its diagonal."""
    from keras_lipnext.layers import sdp_diagonal as _sdp

    monkeypatch.setattr(_sdp, "_row_sums", lambda w, log_q: keras.ops.sum(w**2, axis=0))
    with pytest.raises(AssertionError):
        sdp_checks.check_constants(SDPDense(8, "aol"), (None, 8), 16)


@pytest.mark.parametrize("bound", FREE)
def test_diagonal_equals_its_definition(bound):
    for units, features in ((5, 7), (7, 4), (2, 300)):
        sdp_checks.check_diagonal(SDPDense(units, bound, dtype="float64"), (features,))


@pytest.mark.parametrize("bound", FREE)
def test_a_diagonal_in_float32_of_units(bound):
    """The linear layer's kernel is W^T: its rows are the columns."""
    layer = SDPDense(7680, bound)
    layer.build((None, 2))
    layer.kernel.assign(np.array([[1.0], [0.7]]) * np.ones((1, 7680)))
    kernel = np.asarray(sdp_checks.to_numpy(layer.effective_kernel()), "float64")
    assert 1 - 1e-3 < np.linalg.norm(kernel, 2) <= 1 + 1e-6


def test_policies():
    sdp_checks.check_policies(SDPDense, {"units": 4}, (3,))


def test_activations():
    sdp_checks.check_activations(SDPDense, {"units": 4}, "-1, 1")
    SDPDense(4, activation=keras.ops.exp)  # not known: `certify` refuses it
    SDPDense(4, activation="softmax")  # 1-Lipschitz


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_steep_activations_are_refused(name):
    if FUNCTIONS[name].constant > 1:
        with pytest.raises(ValueError, match=rf"lies in \[-1, 1\].*activation='{name}'. Another"):
            SDPDense(4, activation=name)
    else:
        SDPDense(4, activation=name)


@pytest.mark.parametrize("bound", FREE)
def test_gradients(bound):
    sdp_checks.check_gradients(lambda **k: SDPDense(5, bound, "tanh", **k), (4,))
    sdp_checks.check_gradients_are_finite(SDPDense(5, bound), (4,))


@pytest.mark.parametrize("bound", FREE)
def test_scaling_the_kernel_changes_nothing(bound):
    layer = SDPDense(5, bound)
    layer.build((None, 4))
    kernel = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    layer.kernel.assign(kernel)
    reference = np.asarray(sdp_checks.to_numpy(layer.effective_kernel()))
    for factor in (2.0**-90, 2.0**60):
        layer.kernel.assign(kernel * np.float32(factor))
        np.testing.assert_array_equal(sdp_checks.to_numpy(layer.effective_kernel()), reference)


@pytest.mark.parametrize("bound", ["AOL", "cayley", None])
def test_bad_bound(bound):
    with pytest.raises(ValueError, match=r"`bound` must be one of spectral, aol, sll, orthogonal"):
        SDPDense(4, bound)


def test_bad_units():
    with pytest.raises(ValueError, match=r"`units` must be a positive integer. Received: units=0"):
        SDPDense(0)
