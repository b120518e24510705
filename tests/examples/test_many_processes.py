"""Several processes on this machine: the same result as one."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import smaller
from data import virtual_devices

import keras_lipnext  # noqa: F401  registers its classes with Keras

pytestmark = pytest.mark.slow
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # sums in the same order whatever else the machine does


def run(example, *command, returncode=0, **environment):
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **ONE_THREAD, "EXAMPLE": example, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert done.returncode == returncode, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def weights(folder):
    return keras.models.load_model(folder / "model.keras", compile=False).get_weights()


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution")
def test_two_jax_processes_killed_and_started_again_train_as_one(tmp_path):
    """Two with a device each, and one with two: the same sums, so the same bits.

    The two write their parts of each checkpoint and, killed, go on from there. One device sums in
    another order. Weights next to a kink of an activation amplify that: of digits, after 44 steps
    losses differ by 1e-3 of themselves, of noise after 20 by 4e-7 (tests/optimizers/shards.py).
    """
    pytest.importorskip("orbax.checkpoint")
    one, two = tmp_path / "1", tmp_path / "2"
    epochs, environment = 3, virtual_devices(2)
    # XLA splits its sums by the size of its pool of threads.
    same_pool = {"PJRT_NPROC": environment["PJRT_NPROC"]}

    def train(processes, folder, **options):
        given = ("--epochs", epochs, "--output", folder, "--checkpoints", folder / "checkpoints")
        command = (smaller.__file__, "--processes", processes, *given)
        return run("multi_host", *command, **options)

    # Process 0 alone certifies and writes.
    assert train(1, one, **environment).count("1 processes; wrote") == 1
    history = json.loads((one / "history.json").read_text())
    assert len(history["loss"]) == epochs
    assert history["loss"][-1] < history["loss"][0]

    train(2, two, KILLED="1", returncode=-signal.SIGKILL, **same_pool)
    assert (two / "checkpoints" / "0").exists() and not (two / "model.keras").exists()
    text = train(2, two, **same_pool)
    assert text.count("2 processes; wrote") == 1
    first = int(re.search(rf"Epoch (\d)/{epochs}", text).group(1))
    assert 2 <= first <= epochs
    for a, b in zip(weights(one), weights(two), strict=True):
        np.testing.assert_array_equal(b, a)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="DistributedDataParallel")
def test_two_torch_processes_train_as_one(tmp_path, monkeypatch):
    """Over twenty steps, as one up to rounding, and as each other bit by bit.

    Of one process's sums in another order, too, weights differ: on this noise by 1e-7; on digits,
    once an activation's kink was crossed, by 4e-2 (in float64 by 1e-15).
    """
    example, given = "torch_ddp", ["--steps", "20", "--output"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    text = run(example, *launcher, smaller.__file__, *given, tmp_path / "2")
    assert "2 processes hold the same weights" in text
    smaller.shrink(monkeypatch.setattr)
    monkeypatch.setattr(sys, "argv", [example, *given, str(tmp_path / "1")])
    runpy.run_module(example, run_name="__main__")
    for a, b in zip(weights(tmp_path / "1"), weights(tmp_path / "2"), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)
