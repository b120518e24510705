import keras
import pytest
from data import output_of, virtual_devices


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
    # XLA's warning that it gives every device all parts on the way from one layout to another.
    assert "full rematerialization" not in log
