"""Rules of SDP-based layers where rounding decides: 1 / T against its definition, odd weights."""

import extended
import keras
import numpy as np
import pytest
from test_layer_rules import built, check, needs_long, norms, samples, whole

import keras_lipnext as lip
from keras_lipnext.lipschitz.graph import trace
from keras_lipnext.lipschitz.model import lipschitz_bound
from keras_lipnext.lipschitz.rules.base import Context
from keras_lipnext.lipschitz.rules.sdp import _Form
from keras_lipnext.norms.roundoff import gamma
from keras_lipnext.twin import Float64Twin

ll = lip.layers
# Clipped entries beside others: the mean of all four is what an order of summation makes of it.
LOG_Q = [1e30, 25, 20, -1e30]


def cancelling(order=(0, 1, 2, 3), bound="sll"):
    """A classifier whose columns 0 and 3 are zero, with the hidden units in another order."""
    inputs = keras.Input((4,))
    layer = ll.SDPResidualDense(4, bound)
    model = lip.CertifiableModel(inputs, ll.NormalizedDense(3)(layer(inputs)))
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 4))
    kernel[:, [0, 3]] = 0
    order = list(order)
    layer.kernel.assign(kernel[:, order])
    layer.bias.assign(rng.normal(size=4)[order])
    layer.log_q.assign(np.array(LOG_Q)[order])
    model.layers[-1].kernel.assign(rng.normal(size=(4, 3)))
    return model


def form_of(model):
    return _Form(model.layers[1], Context(trace(model).steps[0]))


@needs_long
def test_clipped_weights_do_not_reach_the_others():
    model = cancelling()
    x = np.random.default_rng(1).normal(size=(200, 4))
    certificate = model.certify(x, verbose=0)
    exact = extended.evaluate(whole(model), x)[trace(model).output]
    assert (exact.argmax(1) == certificate.predictions)[certificate.radii > 0].all()
    assert (certificate.radii > 0).mean() > 0.9


def test_the_order_of_hidden_units_changes_nothing():
    x = np.random.default_rng(1).normal(size=(200, 4))
    first = cancelling()
    expected, form = first.certify(x, verbose=0), form_of(first)
    for order in ((3, 2, 1, 0), (1, 2, 0, 3), (0, 3, 1, 2), (2, 0, 3, 1)):
        model = cancelling(order)
        other = form_of(model)
        assert np.abs(other.inverse / form.inverse[list(order)] - 1).max() <= 2 * form.error
        actual = model.certify(x, verbose=0)
        np.testing.assert_array_equal(actual.predictions, expected.predictions)
        np.testing.assert_allclose(actual.radii, expected.radii, atol=1e-9)


def lopsided(layer, shape):
    """Its last columns 10^7 times smaller than the first, and orthogonal to it."""
    model = built(layer, shape)
    layer = model.layers[1]
    rng = np.random.default_rng(2)
    kernel = np.asarray(keras.ops.convert_to_numpy(layer.kernel), "float64")
    first, *others = (kernel[..., i] for i in range(kernel.shape[-1]))
    first[:] = rng.random(first.shape)
    for column in others:
        column[:] = rng.normal(size=first.shape)
        column -= first * (first * column).sum() / (first * first).sum()
        column *= 1e-7
    layer.kernel.assign(kernel)
    return model


CASES = [
    (lambda: ll.SDPResidualDense(3, "aol", "tanh"), (40,)),
    (lambda: ll.SDPResidualDense(3, "sll"), (40,)),
    (lambda: ll.SDPResidualConv2D(2, 3, "aol"), (5, 4, 6)),
    (lambda: ll.SDPResidualDense(3, "spectral"), (7,)),
]


@needs_long
@pytest.mark.parametrize("case", range(len(CASES)))
def test_rounding_of_the_diagonal_is_counted(case):
    model = lopsided(*CASES[case])
    layer, form = model.layers[1], form_of(model)
    exact = 1 / extended.sdp_diagonal(layer, form.w.astype(extended.LONG))
    off = np.abs(form.inverse / exact - 1).max()
    assert 0 < off <= form.error < 1e-6
    # All of it reaches the layer's output, beyond what products alone may lose.
    x = samples(CASES[case][1])
    step = trace(model).steps[0]
    bound = lip.lipschitz.rules.base.find_rule(step).function(layer, Context(step))
    exact = extended.evaluate(whole(model), x)[trace(model).output]
    error = norms(Float64Twin(whole(model))(x).astype(extended.LONG) - exact)
    assert (error <= bound.relative * norms(x) + bound.absolute).all()
    assert bound.relative >= 2 * form.error


@needs_long
def test_what_the_diagonal_loses_is_more_than_products_do():
    """Of the check above: without the diagonal's part it would fail."""
    model = lopsided(*CASES[0])
    form, x = form_of(model), samples(CASES[0][1])
    exact = extended.evaluate(whole(model), x)[trace(model).output]
    error = norms(Float64Twin(whole(model))(x).astype(extended.LONG) - exact)
    form.error = 0.0
    kernel = form.w * np.sqrt(form.inverse)
    least = form.product(kernel, 1.0, kernel.size, Context(trace(model).steps[0]), []).relative
    assert (error > 2 * least * norms(x)).any()


@needs_long
@pytest.mark.parametrize("bound", ["aol", "sll", "spectral"])
def test_zero_kernels_are_identities(bound):
    for make, shape in (
        (lambda: ll.SDPResidualDense(3, bound, "softplus"), (4,)),
        (lambda: ll.SDPResidualConv2D(3, 3, bound), (4, 5, 2)),
    ):
        model = built(make, shape)
        model.layers[1].kernel.assign(np.zeros(model.layers[1].kernel.shape))
        constant, _, _ = check(model, samples(shape))
        assert constant == pytest.approx(1, abs=1e-13)
        x = samples(shape)
        np.testing.assert_array_equal(Float64Twin(whole(model))(x), x)
        model.layers[1].bias.assign(np.full(3, np.nan))
        with pytest.raises(ValueError, match="NaN or infinite"):
            lipschitz_bound(model)


@needs_long
@pytest.mark.parametrize(
    "layer, size, kernel",
    [
        (ll.SDPConv2D, (1, 1), 5),
        (ll.SDPResidualConv2D, (2, 3), 7),
        pytest.param(ll.SDPConv2D, (2, 3), 7, marks=pytest.mark.once),
        pytest.param(ll.SDPResidualConv2D, (1, 1), 7, marks=pytest.mark.once),
    ],
)
def test_wrapping_around_more_than_once(layer, size, kernel):
    model = built(lambda: layer(3, kernel, padding="circular"), (*size, 2))
    check(model, samples((*size, 2)))


@needs_long
@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_kernels_of_any_size(size):
    for make, shape in (
        (lambda: ll.SDPResidualDense(3, "sll", "sigmoid"), (4,)),
        (lambda: ll.SDPResidualConv2D(3, 3, "aol"), (4, 5, 2)),
    ):
        model = built(make, shape)
        for weight in model.layers[1].weights[:2]:
            weight.assign(np.asarray(keras.ops.convert_to_numpy(weight)) * size)
        x = samples(shape)
        exact = extended.evaluate(whole(model), x)[trace(model).output]
        error = norms(Float64Twin(whole(model))(x).astype(extended.LONG) - exact)
        step = trace(model).steps[0]
        bound = lip.lipschitz.rules.base.find_rule(step).function(
            step.operation, Context(step, {0: (None, *shape), 1: (None, *shape)})
        )
        assert (error <= bound.relative * norms(x) + bound.absolute).all()


@pytest.mark.once
def test_squarings_are_off_by_as_much_as_columns_add_up():
    """W^T W = I of columns of one magnitude: errors of one sign add up to n times each one's."""
    n = 512
    hadamard = np.ones((1, 1))
    while len(hadamard) < n:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    layer = ll.SDPDense(n, "spectral", use_bias=False)
    inputs = keras.Input((n,))
    model = keras.Model(inputs, layer(inputs))
    layer.kernel.assign(hadamard / np.sqrt(n))
    form = _Form(layer, Context(trace(model).steps[0]))
    assert form.error >= n * gamma(n)
