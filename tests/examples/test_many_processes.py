"""Several processes on this machine: the same result as one."""

import json
import os
import re
import runpy
import signal
import socket
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


@pytest.fixture
def small(monkeypatch):
    """Sets what smaller.py reads from the environment."""

    def start(example):
        path = os.pathsep.join(filter(None, sys.path))
        for name, value in {**ONE_THREAD, "EXAMPLE": example, "PYTHONPATH": path}.items():
            monkeypatch.setenv(name, value)

    return start


def run(*command, returncode=0, **environment):
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
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
def test_two_jax_processes_killed_and_started_again_train_as_one(
    small, tmp_path, monkeypatch, capfd
):
    """Two with a device each, and one with two: the same sums, so the same bits.

    The two write their parts of each checkpoint and, killed, go on from there. One device sums in
    another order. Weights next to a kink of an activation amplify that: of digits, after 44 steps
    losses differ by 1e-3 of themselves, of noise after 20 by 4e-7 (tests/optimizers/shards.py).
    """
    pytest.importorskip("orbax.checkpoint")
    one, two = tmp_path / "1", tmp_path / "2"
    small("multi_host")
    epochs, environment = 2, virtual_devices(2)
    # XLA splits its sums by the size of its pool of threads.
    same_pool = {"PJRT_NPROC": environment["PJRT_NPROC"]}

    def command(processes, folder):
        given = ["--epochs", epochs, "--output", folder, "--checkpoints", folder / "checkpoints"]
        return list(map(str, [smaller.__file__, "--processes", processes, *given]))

    # Process 0 alone certifies and writes.
    text = run(sys.executable, *command(1, one), **environment)
    assert text.count("1 processes; wrote") == 1
    history = json.loads((one / "history.json").read_text())
    assert len(history["loss"]) == epochs
    assert history["loss"][-1] < history["loss"][0]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = '"$@" --process-id 0 & "$@" --process-id 1 & wait'
    killed = ["sh", "-c", both, "sh", sys.executable, *command(2, two), "--coordinator", address]
    run(*killed, returncode=-signal.SIGKILL, KILLED="1", **same_pool)
    assert (two / "checkpoints" / "0").exists() and not (two / "model.keras").exists()
    # Here the example itself starts the two.
    monkeypatch.setenv(*same_pool.popitem())
    monkeypatch.setattr(sys, "argv", command(2, two))
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("multi_host", run_name="__main__")
    text, log = capfd.readouterr()
    assert ended.value.code == 0, log[-4000:]
    assert text.count("2 processes; wrote") == 1
    first = int(re.search(rf"Epoch (\d)/{epochs}", text).group(1))
    assert first == 2
    for a, b in zip(weights(one), weights(two), strict=True):
        np.testing.assert_array_equal(b, a)


@pytest.fixture
def handlers():
    """Puts back what is done about signals: torchrun leaves its own handlers."""
    before = {one: signal.getsignal(one) for one in signal.valid_signals()}
    yield
    for one, handler in before.items():
        if signal.getsignal(one) is not handler:
            signal.signal(one, handler)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="DistributedDataParallel")
def test_two_torch_processes_train_as_one(small, handlers, tmp_path, monkeypatch, capfd):
    """Over twenty steps, as one up to rounding, and as each other bit by bit.

    Of one process's sums in another order, too, weights differ: on this noise by 1e-7; on digits,
    once an activation's kink was crossed, by 4e-2 (in float64 by 1e-15).
    """
    from torch.distributed import run as torchrun

    example, given = "torch_ddp", ["--steps", "20", "--output"]
    small(example)
    two = ["--standalone", "--nproc-per-node", "2", smaller.__file__]
    torchrun.main([*two, *given, str(tmp_path / "2")])
    assert "2 processes hold the same weights" in capfd.readouterr().out
    smaller.shrink(monkeypatch.setattr)
    monkeypatch.setattr(sys, "argv", [example, *given, str(tmp_path / "1")])
    runpy.run_module(example, run_name="__main__")
    for a, b in zip(weights(tmp_path / "1"), weights(tmp_path / "2"), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)
