"""`certify` and `lipschitz_bound` take the functions of `keras_lipnext.lmi` themselves."""

import pickle

import numpy as np
import pytest
from chains import dense_chain

import keras_lipnext as lip
from keras_lipnext.lipschitz.bounds import METHODS, method_of


@pytest.mark.parametrize("name", METHODS)
def test_a_function_is_its_name(name):
    assert method_of(getattr(lip.lmi, name)) is method_of(name)


def test_certify():
    model = dense_chain((6, 8, 8, 3), seed=5)
    x = np.random.default_rng(6).normal(size=(5, 6)).astype("float32")
    named = lip.certify(model, x, verbose=0, lipschitz="eclipse_fast")
    given = lip.certify(model, x, verbose=0, lipschitz=lip.lmi.eclipse_fast)
    assert given.body_constant == named.body_constant
    np.testing.assert_array_equal(given.radii, named.radii)
    assert given.evidence.bound.method == named.evidence.bound.method
    pickle.loads(pickle.dumps(given.evidence.bound))
    bound = lip.lipschitz_bound(model, lipschitz=lip.lmi.eclipse_fast)
    assert bound.body_constant == named.body_constant


@pytest.mark.parametrize("wrong", [lip.lmi.loop_transformation, lip.lipschitz_bound, None, 3])
def test_another_function_is_refused(wrong):
    with pytest.raises(ValueError, match=r"one of product, .*functions of these names.*Received:"):
        lip.lipschitz_bound(dense_chain((3, 4, 2)), lipschitz=wrong)
