"""The layers inside models of your own: a functional one, and a subclassed one.

    KERAS_BACKEND=torch python examples/custom_model.py      (or jax, or tensorflow)

The functional model is a `CertifiableModel`: certified loss, certified accuracy and `certify` work
on it. The subclassed model is any `keras.Model`, trained by an ordinary Keras optimizer; its
kernels stay orthogonal because their constraint puts them back after each step.
"""

import argparse

import keras
from quickstart import digits

import keras_lipnext as lip


def functional_model():
    inputs = keras.Input((8, 8, 1))
    x = lip.layers.PatchEmbedding(patch_size=2, units=64)(inputs)
    x = lip.layers.PositionalBias()(x)
    x = lip.layers.OrthogonalDense(64, activation="relu")(x)  # any 1-Lipschitz activation
    x = lip.layers.SpatialShift(ratio=1 / 8)(x)
    x = lip.layers.OrthogonalDense(64)(x)
    x = lip.layers.BetaAbs(beta=0.5)(x)
    x = lip.layers.L2Pool()(x)
    outputs = lip.layers.NormalizedDense(10)(x)
    model = lip.CertifiableModel(inputs, outputs)
    model.compile(
        lip.optimizers.ManifoldAdam(1e-2),
        loss=lip.losses.EMMA(epsilon=0.25, temperature=16),
        metrics=["accuracy", lip.metrics.CertifiedAccuracy(0.1)],
    )
    return model


class SubclassedModel(keras.Model):
    """Flattened images through two orthogonal layers with MaxMin, to ten logits."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.flatten = keras.layers.Flatten()
        self.first = lip.layers.OrthogonalDense(128)
        self.second = lip.layers.OrthogonalDense(64)
        self.maxmin = lip.layers.MaxMin()
        self.head = lip.layers.NormalizedDense(10)

    def call(self, inputs):
        x = self.flatten(inputs)
        x = self.maxmin(self.first(x))
        x = self.maxmin(self.second(x))
        return self.head(x)


def main(epochs):
    keras.utils.set_random_seed(0)
    (x_train, y_train), (x_test, y_test) = digits()

    print("A functional model of your own:")
    model = functional_model()
    model.fit(x_train, y_train, epochs=epochs, verbose=2)
    print(lip.certify(model, x_test, y_test, epsilons=(0.1, 0.25)))

    print("\nA subclassed model, trained by keras.optimizers.Adam:")
    model = SubclassedModel()
    # Outside a CertifiableModel the loss is told where the head's pairwise constants are.
    loss = lip.losses.EMMA(epsilon=0.25, temperature=16).bind(model.head)
    model.compile(keras.optimizers.Adam(1e-3), loss=loss, metrics=["accuracy"])
    model.fit(x_train, y_train, epochs=epochs, verbose=2)
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"accuracy on held-out digits: {accuracy:.1%}")
    for layer in (model.first, model.second):
        defect = float(lip.manifolds.stiefel.defect(layer.kernel))
        print(f"{layer.name}: kernel {tuple(layer.kernel.shape)}, orthonormal to {defect:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (10)")
    main(parser.parse_args().epochs)
