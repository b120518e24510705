"""Orthogonal layers on PyTorch, ours and the peers': each as a training step of the same network.

The network: blocks of a d x d layer with bias, then the absolute value of half the channels. The
loss is the squared distance to targets drawn at random.
"""

import itertools

import keras
import torch
from torch.nn.utils.parametrizations import orthogonal
from training_step import TrainingStep

import keras_lipnext as lip

PLAIN, PLAIN_KERAS = "Linear + torch's Adam", "Dense + Keras' Adam"
OURS, SLL = "ours, ManifoldAdam", "orthogonium SLL block"
LEARNING_RATE = 1e-3


class HalfAbs(torch.nn.Module):
    """Absolute value of the first half of the channels."""

    def forward(self, x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first.abs(), second], dim=-1)


class TorchStep:
    """Takes one training step of a network of PyTorch."""

    def __init__(self, layers, x, targets, optimizer=torch.optim.Adam, activation=HalfAbs):
        self._layers = layers
        self._network = torch.nn.Sequential(*(m for layer in layers for m in (layer, activation())))
        parameters = [p for p in self._network.parameters() if p.requires_grad]
        self._optimizer = optimizer(parameters, lr=LEARNING_RATE)
        self._x, self._targets = x, itertools.cycle(targets)

    def __call__(self):
        self._optimizer.zero_grad()
        difference = self._network(self._x) - next(self._targets)
        difference.square().sum(dim=-1).mean().backward()
        self._optimizer.step()

    def matrices(self):
        """The matrices that the layers multiply with."""
        with torch.no_grad():
            return [layer.weight.detach() for layer in self._layers]


class KerasStep(TrainingStep):
    """Takes one training step of a network of Keras."""

    def __init__(self, layers, x, targets, optimizer):
        self._layers = layers
        parts = (m for layer in layers for m in (layer, lip.layers.BetaAbs(0.5)))
        model = keras.Sequential([keras.Input(x.shape[1:]), *parts])
        model.compile(optimizer(LEARNING_RATE), loss=squared_distance)
        super().__init__(model, x, targets)

    def matrices(self):
        return [layer.kernel.value.detach() for layer in self._layers]


def squared_distance(y_true, y_pred):
    return keras.ops.sum(keras.ops.square(y_pred - y_true), axis=-1)


def _torch(layer, **options):
    return lambda blocks, d, *data: TorchStep([layer(d) for _ in range(blocks)], *data, **options)


def _keras(layer, optimizer):
    return lambda blocks, d, *data: KerasStep([layer(d) for _ in range(blocks)], *data, optimizer)


def _parametrized(name):
    return _torch(lambda d: orthogonal(torch.nn.Linear(d, d), orthogonal_map=name))


def _orthogonium(name):
    def layer(d):
        from orthogonium import reparametrizers
        from orthogonium.layers.linear import OrthoLinear

        return OrthoLinear(d, d, ortho_params=getattr(reparametrizers, f"{name}_ORTHO_PARAMS"))

    return _torch(layer)


def _sll(blocks, d, *data):
    from orthogonium.layers.conv.SLL import SDPBasedLipschitzDense

    layers = [SDPBasedLipschitzDense(d, d, d) for _ in range(blocks)]
    return TorchStep(layers, *data, activation=torch.nn.Identity)


def _torchlip(d):
    from deel.torchlip import SpectralLinear

    return SpectralLinear(d, d)


def _geoopt(manifold):
    def make(blocks, d, *data):
        import geoopt

        layers = []
        for _ in range(blocks):
            layer = torch.nn.Linear(d, d)
            start = torch.nn.init.orthogonal_(layer.weight.detach().clone())
            layer.weight = geoopt.ManifoldParameter(start, manifold=getattr(geoopt, manifold)())
            layers.append(layer)
        return TorchStep(layers, *data, optimizer=geoopt.optim.RiemannianAdam)

    return make


# name: function of (blocks, d, x, targets) that makes the step.
METHODS = {
    PLAIN: _torch(lambda d: torch.nn.Linear(d, d)),
    PLAIN_KERAS: _keras(keras.layers.Dense, keras.optimizers.Adam),
    OURS: _keras(lip.layers.OrthogonalDense, lip.optimizers.ManifoldAdam),
    "ours, ManifoldMuon": _keras(lip.layers.OrthogonalDense, lip.optimizers.ManifoldMuon),
    "ours, Keras' Adam and projection": _keras(lip.layers.OrthogonalDense, keras.optimizers.Adam),
    "torch matrix_exp": _parametrized("matrix_exp"),
    "torch Cayley": _parametrized("cayley"),
    "torch Householder": _parametrized("householder"),
    "orthogonium Björck (default)": _orthogonium("DEFAULT"),
    "orthogonium Björck, pass-through": _orthogonium("BJORCK_PASS_THROUGH"),
    "orthogonium QR": _orthogonium("QR"),
    "orthogonium Cholesky": _orthogonium("CHOLESKY"),
    "orthogonium exp": _orthogonium("EXP"),
    "deel-torchlip SpectralLinear": _torch(_torchlip),
    "geoopt RiemannianAdam, QR": _geoopt("EuclideanStiefel"),
    "geoopt RiemannianAdam, Cayley": _geoopt("CanonicalStiefel"),
    SLL: _sll,
}
NOT_ORTHOGONAL = {PLAIN, PLAIN_KERAS, SLL}


def step(name, blocks, d, tokens):
    """The training step of a method on random data, after one step.

    Raises:
        Exception: whatever the method's package raises, or its import.
    """
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    x, *targets = torch.randn(5, tokens, d) / d**0.5
    answer = METHODS[name](blocks, d, x, targets)
    answer()
    return answer


def defect(matrices):
    """max |W^T W - I| over entries and matrices, in float64."""
    eye = torch.eye(len(matrices[0]), dtype=torch.float64)
    return max(float((w.double().T @ w.double() - eye).abs().max()) for w in matrices)
