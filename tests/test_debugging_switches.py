"""Models train and evaluate under the switches with which users search for NaN and infinity.

Each switch is one for the process, and programs compiled before it know nothing of it.
"""

import keras
import pytest
from data import output_of


@pytest.mark.slow
def test_nothing_that_is_computed_is_nan_or_infinite():
    switches = {"jax": ["jax_debug_nans", "jax_debug_infs"]}.get(keras.backend.backend(), ["on"])
    for switch in switches:
        text, _ = output_of("debugged.py", switch)
        assert text.splitlines()[-3:] == ["seen", "trains", "evaluates"]  # JAX speaks, too
