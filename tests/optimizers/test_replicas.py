import os
import pathlib
import socket
import subprocess
import sys

import keras
import pytest
from data import output_of, virtual_devices

import keras_lipnext as lip


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute")
def test_two_replicas_do_not_drift_apart():
    text, _ = output_of("optimizers/replicas.py")
    assert "replicas agree" in text


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution")
def test_eight_devices_take_the_same_steps_in_an_eighth_of_the_memory():
    text, log = output_of("optimizers/shards.py", **virtual_devices(8), TF_CPP_MIN_LOG_LEVEL="1")
    assert "shards agree" in text
    assert "shards are small" in text
    assert "data parallelism shares the step" in text
    # XLA's warning that it gives every device all parts on the way from one layout to another.
    assert "full rematerialization" not in log


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch.distributed")
def test_two_processes_take_the_steps_of_half_of_the_matrices_each():
    script = pathlib.Path(__file__).with_name("shared_steps.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    settings = os.environ | address | {"WORLD_SIZE": "2"}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    settings["CUDA_VISIBLE_DEVICES"] = ""  # two processes of one card are refused
    started = [
        subprocess.Popen(
            [sys.executable, script],
            env=settings | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()  # nothing to one that has ended
    assert [process.returncode for process in started] == [0, 0], answers
    assert "two processes share the steps" in answers[0][0]


def test_steps_are_shared_by_processes_of_pytorch_alone():
    optimizer = lip.optimizers.ManifoldMuon(0.01)
    with pytest.raises(ValueError, match=r"init_process_group first|keras\.distribution"):
        optimizer.share_steps()
