import keras
import numpy as np
import pytest
from data import to_numpy

import keras_lipnext as lip


def network(last):
    inputs = keras.Input((4,))
    x = lip.layers.MaxMin()(lip.layers.OrthogonalDense(4)(inputs))
    return keras.Model(inputs, last(lip.layers.OrthogonalDense(1)(x)))


@pytest.mark.parametrize("factor", [3.0, -0.5])
def test_the_stored_factor_is_the_constant(factor):
    """As that of `Rescaling`, which does the same where the factor is given."""
    fixed = network(keras.layers.Rescaling(factor))
    learned = network(lip.layers.Scale(factor))
    for model in (fixed, learned):
        assert lip.lipschitz_bound(model).constant == pytest.approx(abs(factor), rel=1e-6)
    learned.layers[-1].factor.assign(7.0)
    assert lip.lipschitz_bound(learned).constant == pytest.approx(7, rel=1e-6)


def test_a_loss_that_counts_on_the_constant_takes_no_factor_that_grows():
    inputs = keras.Input((4,))
    for layer in (keras.layers.Rescaling(3.0), lip.layers.Scale(3.0)):
        x = layer(lip.layers.OrthogonalDense(4)(inputs))
        outputs = lip.layers.NormalizedDense(3)(x)
        if isinstance(layer, lip.layers.Scale):
            with pytest.raises(ValueError, match=r"\(Scale\).*free to grow in training"):
                lip.CertifiableModel(inputs, outputs)
        else:
            assert lip.CertifiableModel(inputs, outputs).lipschitz_bound().body_constant < 3.00001


def test_it_is_trained():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    inputs = keras.Input((4,))
    layer = lip.layers.Scale()
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.Adam(0.1), loss="mse")
    model.fit(x, 2.0 * x, epochs=40, verbose=0)
    assert float(to_numpy(layer.factor)) == pytest.approx(2, abs=0.1)


def test_refused_factors():
    with pytest.raises(ValueError, match=r"`factor` must be a number. Received: factor='2'"):
        lip.layers.Scale("2")
