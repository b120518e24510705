"""Two processes of PyTorch share an optimizer's steps: started by test_replicas."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import lean  # noqa: F401  before Keras

# isort: split
import keras
import numpy as np
import torch
from torch import distributed

import keras_lipnext as lip

distributed.init_process_group("gloo")
PROCESS, STEPS = distributed.get_rank(), 4


class Dense(keras.layers.Layer):
    """Five square matrices, a tall one, and a bias."""

    def build(self, shape):
        mark = {
            "constraint": lip.manifolds.Stiefel(),
            "initializer": lip.manifolds.RandomStiefel(7),
        }
        self.square = [self.add_weight(shape=(6, 6), **mark) for _ in range(5)]
        self.tall = self.add_weight(shape=(9, 3), **mark)
        self.bias = self.add_weight(shape=(4,))


def trained(make, share):
    """(weights and moments after STEPS steps, matrices stepped in each, one by one)."""
    keras.utils.set_random_seed(3)
    layer = Dense()
    layer.build(None)
    counts = []

    class Counted(make):
        def manifold_step(self, x, *rest):
            counts.append((len(x), *x.shape[1:]))
            return super().manifold_step(x, *rest)

    optimizer = Counted(0.05, euclidean_learning_rate=0.1, lookahead_period=2)
    if share:
        optimizer.share_steps()
    draw = np.random.default_rng(0)
    for _ in range(STEPS):
        gradients = [draw.normal(size=v.shape).astype("float32") for v in layer.weights]
        optimizer.apply([torch.from_numpy(g) for g in gradients], layer.weights)
    return [v.numpy() for v in (*layer.weights, *optimizer.variables)], counts


for make in (lip.optimizers.ManifoldMuon, lip.optimizers.ManifoldAdam):
    alone, all_steps = trained(make, False)
    shared, steps = trained(make, True)
    assert all_steps == STEPS * [(5, 6, 6), (1, 9, 3)], all_steps
    assert steps == STEPS * [(3, 6, 6), (1, 9, 3)], steps  # half of five, rounded up
    for a, b in zip(alone, shared, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6)
    mine = torch.from_numpy(np.concatenate([np.ravel(a).astype("float64") for a in shared]))
    everyones = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(everyones, mine)
    assert torch.equal(*everyones)

if PROCESS == 0:
    print("two processes share the steps")
distributed.destroy_process_group()
