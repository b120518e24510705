import os
import pathlib
import subprocess
import sys

import keras
import pytest

TESTS = pathlib.Path(__file__).parents[1]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute")
def test_two_replicas_do_not_drift_apart():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "optimizers" / "replicas.py")],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "replicas agree" in result.stdout, result.stdout[-2000:] + result.stderr[-4000:]
