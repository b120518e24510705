"""What benchmarks/rs_lmi.py compares: ways to train a Dense network for a small Lipschitz constant.

Each is a model around the network, trained by Keras' Adam. Power iteration, one step a training
step, estimates spectral norms in the peers, as is usual for them.
"""

import keras
from keras import ops

from keras_lipnext import lmi

INPUTS, CLASSES = 784, 10


def network(hidden, seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.layers.Dense(n, activation="relu") for n in hidden])
    model.add(keras.layers.Dense(CLASSES))
    model.build((None, INPUTS))
    return model


class Normed(keras.Model):
    """A network with running estimates of its layers' spectral norms."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.vectors = [
            self.add_weight(
                shape=(d.kernel.shape[1], 1), initializer="random_normal", trainable=False
            )
            for d in model.layers
        ]
        self.built = True

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    def norms(self):
        """One step of power iteration; gradients through the estimate only."""
        found = []
        for layer, vector in zip(self.model.layers, self.vectors):
            kernel = ops.convert_to_tensor(layer.kernel)
            fixed = ops.stop_gradient(kernel)
            left = ops.matmul(fixed, ops.convert_to_tensor(vector))
            left = left / ops.norm(left)
            right = ops.matmul(ops.transpose(fixed), left)
            right = right / ops.norm(right)
            vector.assign(right)
            found.append(ops.sum(left * ops.matmul(kernel, right)))
        return found


class SpectralPenalty(Normed):
    """Penalises each layer's norm above the share of L that the product grants it.

    The counterpart of RS-LMI's penalty, weight * sum_i max(0, margin - (1 - norm_i^2 / c^2))^2 with
    c = L^(1/layers), the same margin and weight.
    """

    def __init__(self, model, lipschitz, weight, margin=0.02):
        super().__init__(model)
        self.share = lipschitz ** (1 / len(model.layers))
        self.weight, self.margin = weight, margin

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return loss
        excess = [ops.relu((n / self.share) ** 2 - 1 + self.margin) for n in self.norms()]
        return loss + self.weight * sum(ops.square(e) for e in excess)


class GloRo(Normed):
    """Cross-entropy with one more class, "not robust at epsilon" [Leino et al. 2021, 2102.08452].

    Its logit is max_j z_j + epsilon K ||w_i - w_j|| for the predicted class i, K the product of the
    estimated norms of the hidden layers.
    """

    def __init__(self, model, epsilon):
        super().__init__(model)
        self.epsilon = epsilon

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not training:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        constant = 1.0
        for norm in self.norms()[:-1]:
            constant = constant * norm
        head = ops.convert_to_tensor(self.model.layers[-1].kernel)
        chosen = ops.argmax(y_pred, axis=-1)
        differences = ops.take(head, chosen, axis=1)[:, :, None] - head[:, None, :]
        distances = ops.sqrt(ops.sum(ops.square(differences), axis=0) + 1e-12)
        own = ops.one_hot(chosen, CLASSES)
        others = y_pred + self.epsilon * constant * distances - 1e9 * own
        worst = ops.max(others, axis=-1, keepdims=True)
        extended = ops.concatenate([y_pred, worst], axis=-1)
        return super().compute_loss(x, y, extended, sample_weight, training)


def made(method, model, lipschitz, weight):
    """The model to be trained, for a name such as "RS-LMI 16", "RS-LMI 16, random"."""
    if method == "plain":
        return model
    if method == "GloRo":
        return GloRo(model, 0.3)
    if method == "spectral":
        return SpectralPenalty(model, lipschitz, weight)
    if method == "full LMI":
        return lmi.RSLMI(model, lipschitz, sketch=None, weight=weight)
    size, *random = method.removeprefix("RS-LMI ").split(", ")
    order = 0 if random else 1
    return lmi.RSLMI(model, lipschitz, sketch=int(size), order=order, weight=weight)


def compiled(model, learning_rate=1e-3):
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def best_bound(model, training, rounds=6, steps=100):
    """The smallest `LipschitzResult` that can be proven in some seconds, for whatever was trained.

    ECLipsE-Fast's multipliers, those that RS-LMI trained, and then others fitted to the finished
    weights, the same for all: an RSLMI of the frozen network, with ever smaller targets.
    """
    import numpy as np

    from keras_lipnext.lmi.project import proven_bound

    trained = training.multipliers() if isinstance(training, lmi.RSLMI) else None
    best = proven_bound(model, trained)
    model.trainable = False
    for _ in range(rounds):
        fitting = lmi.RSLMI(model, 0.9 * best.constant, sketch=24, rank=16)
        fitting.compile(
            keras.optimizers.Adam(3e-2), lambda y, outputs: 0.0 * ops.sum(outputs, axis=-1)
        )
        nothing = np.zeros((steps, INPUTS), "float32"), np.zeros(steps, "float32")
        fitting.fit(*nothing, batch_size=1, verbose=0)
        found = proven_bound(model, fitting.multipliers())
        if not found.constant < 0.995 * best.constant:
            break
        best = found
    model.trainable = True
    return best
