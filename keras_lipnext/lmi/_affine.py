"""The links of a chain: affine maps, each with the activation behind it."""

import dataclasses

import keras
import numpy as np

from keras_lipnext import backend

# Slopes closer to 0 are rounded away from the interval's middle: products stay clear of underflow.
_LEAST_SLOPE = 2.0**-100


@dataclasses.dataclass(frozen=True)
class AffineLayer:
    """One link of the chain: x -> phi(W x + b).

    Attributes:
        name: Path of the layer that brought the weight, or of the activation.
        weight: Float64, shape (outputs, inputs).
        bias: Float64, shape (outputs,), rounded where layers were multiplied.
        bias_error: Bound of each entry of `bias` minus the exact one, shape (outputs,).
        error: Bound of the 2-norm of `weight` minus the exact matrix; 0 if it is as stored.
        activations: Tuple of `activations.Activation`, applied one after the other;
            empty for the last layer.
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray
    error: float = 0.0
    activations: tuple = ()
    bias_error: np.ndarray | float = 0.0

    @property
    def slopes(self):
        """(a, b): every slope of the activation lies between."""
        low, high = 1.0, 1.0
        for index, activation in enumerate(self.activations):
            ends = [s * t for s in (low, high) for t in activation.slopes]
            low, high = min(ends), max(ends)
            if index:  # products round, but for those with 0
                low = np.nextafter(low, -np.inf) if low else 0.0
                high = np.nextafter(high, np.inf) if high else 0.0
        if 0 < abs(low) < _LEAST_SLOPE:
            low = 0.0 if low > 0 else -_LEAST_SLOPE
        if 0 < abs(high) < _LEAST_SLOPE:
            high = 0.0 if high < 0 else _LEAST_SLOPE
        return float(low), float(high)

    def __call__(self, x):
        """Applies the layer to a batch of vectors: NumPy float64 in and out."""
        x = np.asarray(x, "float64") @ self.weight.T + self.bias
        if self.activations:
            with backend.float64_scope():
                x = keras.ops.convert_to_tensor(x, dtype="float64")
                for activation in self.activations:
                    x = activation.function(x)
                x = keras.ops.convert_to_numpy(x)
        return x


@dataclasses.dataclass(frozen=True)
class Chain:
    """A model, or its body, as a chain of `AffineLayer`s.

    Attributes:
        model: Name of the model.
        part: "logits" or "body".
        layers: Tuple of `AffineLayer`. None for a body that is diagonal: no matrix is made of it.
        diagonal: Without layers, upper bound of the norm of that diagonal; else 1.
    """

    model: str
    part: str
    layers: tuple
    diagonal: float = 1.0

    @property
    def weights(self):
        return [layer.weight for layer in self.layers]

    @property
    def errors(self):
        return [layer.error for layer in self.layers]

    @property
    def slopes(self):
        """Slope intervals of the activations between the weights: one fewer."""
        return [layer.slopes for layer in self.layers[:-1]]
