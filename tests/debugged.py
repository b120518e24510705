"""Trains and evaluates under debugging switches: run by test_debugging_switches in its process."""

import contextlib

import lean  # noqa: F401  before Keras

# isort: split

import keras
import numpy as np
from data import small_lipnext

import keras_lipnext as lip


def searched():
    """Context, for the rest of the program, in which a NaN that is computed is an error."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        for switch, bad in (("jax_debug_nans", np.nan), ("jax_debug_infs", np.inf)):
            jax.config.update(switch, True)
            with contextlib.suppress(FloatingPointError):
                jax.jit(lambda x, bad=bad: x * bad)(1.0)
                raise AssertionError(f"{switch} sees nothing")
            jax.config.update(switch, False)
        jax.config.update("jax_debug_nans", True)
        jax.config.update("jax_debug_infs", True)
        return contextlib.nullcontext()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.debugging.enable_check_numerics()
        return contextlib.nullcontext()
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    torch.autograd.set_detect_anomaly(True)

    class Search(TorchDispatchMode):
        """PyTorch's own switch looks at gradients only."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (list, tuple)) else [result]:
                uninitialised = "empty" in function.__name__
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    assert uninitialised or torch.isfinite(value).all(), function
            return result

    return Search()


x = np.random.default_rng(0).random((64, 8, 8, 1)).astype("float32")
y = np.arange(64) % 10
keras.utils.set_random_seed(0)
with searched():
    try:  # the switch is on
        zero = keras.ops.zeros(())
        keras.ops.log(zero) * 0
    except Exception:
        print("seen")
    model = small_lipnext(depth=1)
    optimizer = lip.optimizers.ManifoldMuon(0.02, lookahead_period=2)
    metrics = ["accuracy", lip.metrics.CertifiedAccuracy(0.1), lip.metrics.CertifiedRadius()]
    model.compile(optimizer, lip.losses.EMMA(0.1), metrics=metrics)
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    print("trains")
    assert np.isfinite(model.evaluate(x, y, verbose=0)).all()
    print("evaluates")
