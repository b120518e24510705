"""LipNeXt whose orthogonal matrices are parametrised by Björck's iteration, for comparison.

The stored weights V are free, and the layer multiplies by the limit of

    W <- W (3 I - W^T W) / 2,        W_0 = V / (an upper bound of ||V||_2),

in every forward pass, so that gradients run back through all of its steps. This is what deel-lip
and orthogonium do by default. [Anil, Lucas, Grosse, 2019, arXiv 1811.05381]
"""

import keras
from keras import ops

import keras_lipnext as lip
from keras_lipnext.layers.spatial_shift import shift_changes
from keras_lipnext.manifolds.polar import newton_schulz, transpose

ITERATIONS = 15  # as in deel-lip


def orthonormal(kernel):
    """Björck's iteration on a tall or square kernel."""
    gram = transpose(kernel) @ kernel
    largest = ops.sqrt(ops.max(ops.sum(ops.abs(gram), axis=-1)))
    return newton_schulz(kernel / largest, ITERATIONS)


class BjorckDense(lip.layers.OrthogonalDense):
    """OrthogonalDense with free weights, square and channels last."""

    lipschitz_constant = 1.0

    def build(self, input_shape):
        super().build(input_shape)
        self.kernel.constraint = None

    def call(self, inputs):
        return inputs @ orthonormal(ops.convert_to_tensor(self.kernel)) + self.bias


class BjorckMixing(lip.layers.ShiftMixing):
    """ShiftMixing with free weights."""

    lipschitz_constant = 1.0

    def build(self, input_shape):
        super().build(input_shape)
        self.kernel.constraint = None

    def call(self, inputs):
        kernel = orthonormal(ops.convert_to_tensor(self.kernel))
        changes = shift_changes(inputs @ kernel, self.padding, self.data_format)
        return inputs + changes @ transpose(kernel)


def twin(model, learning_rate):
    """A CertifiableModel like the compiled LipNeXt `model`: Adam, the same loss and cosine."""
    config = model.get_config()
    inputs = keras.Input(config["input_shape"])
    x = keras.layers.Rescaling(1.0, offset=-0.5)(inputs)
    x = lip.layers.PatchEmbedding(config["patch_size"], config["width"])(x)
    for _ in range(config["depth"]):
        x = lip.layers.PositionalBias()(x)
        x = BjorckMixing(config["shift_ratio"], config["padding"])(x)
        x = BjorckDense(config["width"])(x)
        x = lip.layers.BetaAbs(config["beta"])(x)
    x = lip.layers.L2Pool()(x)
    answer = lip.CertifiableModel(inputs, lip.layers.NormalizedDense(config["num_classes"])(x))
    # Of free weights ManifoldAdam is plain Adam, with the factor that the cosine sets.
    optimizer = lip.optimizers.ManifoldAdam(learning_rate, schedule=lip.optimizers.cosine())
    answer.compile(optimizer, loss=model.loss, metrics=["accuracy"])
    return answer
