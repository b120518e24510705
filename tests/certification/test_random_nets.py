"""Random networks of every kind of layer: nothing their certificates say is false."""

import collections

import extended
import keras
import pytest
import random_nets
import random_sums
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_lipnext.lipschitz import rounding
from keras_lipnext.lipschitz.rules import layers, merging, operations

pytestmark = pytest.mark.skipif(not extended.HAS_LONG, reason="longdouble is float64 here")

# JAX and TensorFlow compile each network anew. benchmarks/soundness.py runs thousands.
EXAMPLES = {"torch": 80, "tensorflow": 10}.get(keras.backend.backend(), 8)


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(st.data(), st.integers(0, 10_000))
def test_random_networks(data, seed):
    model = random_nets.build(lambda options: data.draw(st.sampled_from(options)), seed)
    random_nets.check(model, seed)


@pytest.mark.slow
def test_the_networks_are_of_many_kinds_and_mostly_certified():
    """The generator itself: else the test above could pass on nothing."""
    kinds, certified, steepest = collections.Counter(), 0, []
    count = 8 if keras.backend.backend() == "torch" else 3
    for seed in range(count):
        model = random_nets.build(random_nets.seeded(seed), seed)
        found = random_nets.check(model, seed, samples=3)
        kinds.update(found["kinds"])
        certified += found["certified"]
        steepest.append(found["steepest"])
    assert len(kinds) >= (12 if count == 8 else 6)
    assert certified >= 1.5 * count
    assert max(steepest) > (0.3 if count == 8 else 0.2)


@pytest.fixture(scope="module", params=["float64", "float32"])
def sums(request):
    count = 12 if keras.backend.backend() == "jax" else 6
    found = [random_sums.evaluated(seed, request.param) for seed in range(count)]
    assert sum(one is not None for one in found) > count / 2
    return [one for one in found if one is not None]


@pytest.mark.slow
def test_random_sums_lose_no_more_than_is_allowed(sums):
    assert all(one.share() <= 1 for one in sums)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA, which orders sums anew")
def test_random_sums_lose_what_the_allowances_are_for(sums, monkeypatch):
    """The test above could fail: XLA starts sums with what joins them."""
    assert sum(one.units > 6 for one in sums) >= len(sums) / 4
    for module in (rounding, merging, layers):
        monkeypatch.setattr(module, "joining", lambda *a: 0.0)
    monkeypatch.setattr(operations, "added_up", lambda context, count: count)
    assert sum(one.share() > 1 for one in sums) >= len(sums) / 4
