import dataclasses

import keras
import numpy as np
import pytest
from dense_nets import largest_gradient, network

import keras_lipnext as lip
from keras_lipnext import lmi
from keras_lipnext.lmi.project import ATTEMPTS


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_networks_of_short_dtypes(dtype):
    """Half a step of bfloat16 is 0.4 %: scaling by less changes nothing."""
    keras.config.set_dtype_policy(dtype)
    try:
        models = [network((8, 8), scale=2.0, seed=seed) for seed in range(6)]
    finally:
        keras.config.set_dtype_policy("float32")
    for model in models:
        assert lmi.eclipse_fast(model).constant > 1
        assert 0.9 < lmi.project(model, 1.0).constant <= 1


def test_the_last_attempt_counts():
    model = network()
    results = iter([*[2.0] * ATTEMPTS, 0.9])
    found = lmi.eclipse_fast(model)

    def bound(model):
        return dataclasses.replace(found, constant=next(results))

    assert lmi.project(model, 1.0, bound).constant == 0.9


def test_weights_are_as_they_were_after_a_failure():
    model = network()
    before = model.get_weights()
    fixed = lmi.eclipse_fast(model)
    for attempt in (
        lambda: lmi.project(model, 1e-300),  # scaled to zero
        lambda: lmi.project(model, fixed.constant / 2, lambda model: fixed),
    ):
        with pytest.raises(ValueError):
            attempt()
        for old, new in zip(before, model.get_weights()):
            np.testing.assert_array_equal(old, new)


def test_bounds_of_something_else_are_refused():
    """A `LipschitzBound` has no multipliers; a bound of the body says nothing of the rest."""
    model = network()
    for bound in (lip.lipschitz_bound, lambda model: lmi.eclipse_fast(model, part="body")):
        with pytest.raises(ValueError, match="LipschitzResult of the logits"):
            lmi.project(model, 1.0, bound)
    fixed = lmi.eclipse_fast(model)
    with pytest.raises(ValueError, match="depend on the last layer's weights"):
        lmi.project(model, fixed.constant / 2, lambda model: fixed)
    with pytest.raises(ValueError, match="`lipschitz` must be positive"):
        lmi.project(model, -1.0)
