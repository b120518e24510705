"""Bytes that four virtual devices exchange in a training step: run by test_estimate.

Prints the ratio of XLA's collectives, in a ring, to `LipNeXt.estimate`.
"""

import re

import jax
import keras
import numpy as np
from programs import training_step

import keras_lipnext as lip

ARGUMENTS = {
    "input_shape": (16, 16, 3),
    "num_classes": 10,
    "patch_size": 2,
    "depth": 4,
    "width": 64,
    "shift_ratio": 1 / 8,
}
BATCH, DEVICES = 32, 4
# What a device of a ring sends, in times of (devices - 1) / devices of the result.
SENT = {"all-reduce": 2, "all-gather": 1}

assert len(jax.devices()) == DEVICES
keras.distribution.set_distribution(keras.distribution.DataParallel())
program = training_step(lip.LipNeXt(**ARGUMENTS), BATCH).as_text()

total = 0
collectives = r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
for shapes, name in re.findall(collectives, program):
    for bits, sizes in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", shapes):
        entries = np.prod([int(n) for n in sizes.split(",") if n])
        total += SENT[name] * entries * int(bits) / 8
measured = (DEVICES - 1) / DEVICES * total
estimate = lip.LipNeXt.estimate(batch=BATCH, devices=DEVICES, **ARGUMENTS)
print(measured / estimate.moved_bytes)
