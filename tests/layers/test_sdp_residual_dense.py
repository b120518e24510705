import keras
import pytest
import sdp_checks

from keras_lipnext.activations import FUNCTIONS
from keras_lipnext.layers import SDPResidualDense
from keras_lipnext.layers import sdp_diagonal as _sdp

BOUNDS = ["aol", "sll", "spectral", "orthogonal"]


@pytest.mark.parametrize("bound", BOUNDS)
def test_equals_numpy(bound):
    layer = SDPResidualDense(5, bound, activation="softplus")
    sdp_checks.check_values(layer, (7,), "SDPResidualDense")


@pytest.mark.parametrize("bound", BOUNDS[:3])
@pytest.mark.parametrize("hidden, features", [(8, 8), (5, 12), (12, 5)])
def test_constant_of_any_kernel(bound, hidden, features):
    sdp_checks.check_constants(SDPResidualDense(hidden, bound), (None, features), 64)


@pytest.mark.parametrize("bound", BOUNDS[:3])
@pytest.mark.parametrize("features", [1024, 7680])
def test_constant_of_long_columns(bound, features):
    sdp_checks.check_long_columns(SDPResidualDense(2, bound), features)


@pytest.mark.parametrize("bound", BOUNDS[:3])
def test_guards_hold_for_sums_in_any_order(bound, monkeypatch):
    """The slowest order there is; without guard it loses a hundred times what is allowed."""
    sdp_checks.sum_in_order(monkeypatch)
    layer = SDPResidualDense(2, bound)
    sdp_checks.check_long_columns(layer, 7680)
    monkeypatch.setattr(_sdp, "guard", lambda operations: 1.0)
    with pytest.raises(AssertionError):
        sdp_checks.check_long_columns(layer, 7680)


@pytest.mark.parametrize("bound", BOUNDS[:3])
def test_diagonal_equals_its_definition(bound):
    for hidden in (4, 9):
        sdp_checks.check_diagonal(SDPResidualDense(hidden, bound, dtype="float64"), (7,))


@pytest.mark.parametrize("bound", BOUNDS[:3])
def test_half_precision_with_kernels_of_any_size(bound):
    sdp_checks.check_half_precision(SDPResidualDense(6, bound, dtype="mixed_float16"), (5,))


def test_policies():
    sdp_checks.check_policies(SDPResidualDense, {}, (3,))


def test_activations():
    sdp_checks.check_activations(SDPResidualDense, {}, "0, 1")


@pytest.mark.parametrize("bound", BOUNDS[:3])
def test_gradients(bound):
    sdp_checks.check_gradients(lambda **k: SDPResidualDense(5, bound, "tanh", **k), (4,))
    sdp_checks.check_gradients_are_finite(SDPResidualDense(5, bound), (4,))


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_only_slopes_in_0_1_are_taken(name):
    least, largest = FUNCTIONS[name].slopes
    if least >= 0 and largest <= 1:
        SDPResidualDense(activation=name)
    else:
        with pytest.raises(ValueError, match=r"whose slope lies in \[0, 1\].*Received: activation"):
            SDPResidualDense(activation=name)


def test_other_callables_are_refused():
    for activation in (lambda x: -x, keras.ops.abs):
        with pytest.raises(ValueError, match=r"whose slope lies in \[0, 1\]"):
            SDPResidualDense(activation=activation)


def test_slopes_that_training_changes_are_refused():
    activation = keras.layers.PReLU(alpha_initializer="zeros")
    activation.build((None, 4))
    for free in (activation, keras.layers.Activation(activation)):
        with pytest.raises(ValueError, match=r"whose slope lies in \[0, 1\]"):
            SDPResidualDense(activation=free)
