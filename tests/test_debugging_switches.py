"""Models train and evaluate under the switches with which users search for NaN and infinity.

The switches are the process's, and programs compiled before them know nothing of them.
"""

import pytest
from data import output_of


@pytest.mark.slow
def test_nothing_that_is_computed_is_nan_or_infinite():
    text, _ = output_of("debugged.py")
    assert text.splitlines()[-3:] == ["seen", "trains", "evaluates"]  # JAX speaks, too
