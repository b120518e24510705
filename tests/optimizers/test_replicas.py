import os
import pathlib
import subprocess
import sys

import keras
import pytest

TESTS = pathlib.Path(__file__).parents[1]


def output_of(script, **environment):
    """What a script of this folder prints, run in a process with devices of its own."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "optimizers" / script)],
        env={**os.environ, "PYTHONPATH": str(TESTS), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute")
def test_two_replicas_do_not_drift_apart():
    assert "replicas agree" in output_of("replicas.py")


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution")
def test_eight_devices_take_the_same_steps_in_an_eighth_of_the_memory():
    # Every device waits for the others in a thread of its own, from one pool for all programs: were
    # it no larger than the number of devices, two programs in flight could hold it between them for
    # ever (seen once, on two busy cores). So a large pool, and one program at a time.
    pool = {"PJRT_NPROC": "32", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}
    flags = "--xla_force_host_platform_device_count=8 "
    flags += "--xla_cpu_collective_call_terminate_timeout_seconds=300"
    text = output_of("shards.py", XLA_FLAGS=flags, **pool)
    assert "shards agree" in text
    assert "shards are small" in text
