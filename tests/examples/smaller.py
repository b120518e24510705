"""Runs an example of several processes on a small network and few images.

EXAMPLE=name python smaller.py [arguments of the script]

With KILLED set, all its processes are killed in its second epoch. Run by test_many_processes: an
example that starts itself again starts this, too.
"""

import functools
import os
import runpy
import signal

if __name__ == "__main__":
    import lean  # noqa: F401  before Keras

import numpy as np
import quickstart

import keras_lipnext as lip


def images():
    """Noise: of digits, whose background is constant, many activations sit at a kink together."""
    x = np.random.default_rng(0).random((384, 8, 8, 1)).astype("float32")
    y = np.arange(384) % 10
    return (x[:320], y[:320]), (x[320:], y[320:])


def shrink(put=setattr):
    """What the examples take from elsewhere is small from here on."""
    put(quickstart, "digits", images)
    put(lip, "LipNeXt", functools.partial(lip.LipNeXt, depth=1, width=16))


class Killed(lip.callbacks.OrbaxCheckpoint):
    """SIGKILL to all processes of the example, once the first epoch is written: no clean-up."""

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self.at = epoch

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if (self.at, batch) == (1, 1):
            self.wait_until_finished()
            if self.is_primary_host():
                os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    shrink()
    if os.environ.get("KILLED"):
        lip.callbacks.OrbaxCheckpoint = Killed
    runpy.run_module(os.environ["EXAMPLE"], run_name="__main__")  # and leaves `sys.argv` as it is
