import numpy as np
import pytest
from dense_nets import largest_gradient, network

import keras_lipnext as lip
from keras_lipnext import lmi


@pytest.mark.parametrize("bound", [None, lmi.eclipse_fast])
def test_projecting_any_dense_network(bound):
    model = network((9,), scale=3.0)
    before = model.get_weights()
    found = lmi.project(model, 0.5, bound)
    assert 0.49999 < found.constant <= 0.5
    assert lmi.eclipse_fast(model).constant <= 0.5 * (1 + 1e-9)
    for old, new in zip(before[:-2], model.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert largest_gradient(model) <= 0.5


def test_bounds_of_something_else_are_refused():
    """`lipschitz_bound` is that of the body: taken for the whole it would prove nothing."""
    model = network()
    for bound in (lip.lipschitz_bound, lambda model: lmi.eclipse_fast(model, part="body")):
        with pytest.raises(ValueError, match="LipschitzResult of the logits"):
            lmi.project(model, 1.0, bound)
    fixed = lmi.eclipse_fast(model)
    with pytest.raises(ValueError, match="depend on the last layer's weights"):
        lmi.project(model, fixed.constant / 2, lambda model: fixed)
    with pytest.raises(ValueError, match="`lipschitz` must be positive"):
        lmi.project(model, -1.0)
