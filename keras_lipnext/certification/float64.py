"""A twin of a model that evaluates the same stored weights in float64."""

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.certification.lipschitz import layer_chain
from keras_lipnext.layers._channels import title


class Float64Twin:
    """Evaluates `model` in float64, on any backend, whatever its dtype policy.

    The layers are rebuilt from their configurations with dtype float64 and given the stored
    weights, which float64 holds exactly. `predict` and `fit` would cast inputs to float32, so
    batches go to the layers directly.
    """

    def __init__(self, model):
        self._input, *chain = layer_chain(model)
        with backend.float64_scope():
            tensor = inputs = keras.Input(batch_shape=self._input.batch_shape, dtype="float64")
            for index, layer in enumerate(chain):
                twin = type(layer).from_config(_float64_config(layer, f"{index}_{layer.name}"))
                tensor = twin(tensor)
                for target, source in zip(twin.weights, layer.weights, strict=True):
                    if keras.backend.standardize_dtype(target.dtype) != "float64":
                        raise ValueError(
                            f"{title(layer)} built its weight "
                            f"'{target.path}' in {target.dtype} although its dtype is float64: it "
                            "cannot be evaluated exactly enough to certify."
                        )
                    target.assign(np.asarray(keras.ops.convert_to_numpy(source), "float64"))
            self._model = keras.Model(inputs, tensor)

    def __call__(self, x):
        """Outputs for one batch, a NumPy float64 array."""
        x = np.asarray(x, "float64")
        expected = tuple(self._input.batch_shape)
        if x.ndim != len(expected) or any(
            n is not None and n != m for n, m in zip(expected[1:], x.shape[1:])
        ):
            raise ValueError(
                f"The model takes inputs of shape {expected}. Received: a batch of shape {x.shape}"
            )
        with backend.float64_scope(), backend.inference_scope():
            outputs = self.tensor(keras.ops.convert_to_tensor(x, dtype="float64"))
            outputs = keras.ops.convert_to_numpy(outputs)
        if outputs.dtype != np.float64 or len(outputs) != len(x):
            raise ValueError(
                f"The model, built in float64, answered {outputs.shape} in {outputs.dtype} to a "
                f"batch of {len(x)} inputs."
            )
        return outputs

    def tensor(self, x):
        """Outputs for a float64 tensor of the backend, differentiable."""
        return self._model(x, training=False)


def _float64_config(layer, name):
    """Configuration of the twin. TensorFlow would pass Python floats on as float32."""
    config = {k: np.float64(v) if type(v) is float else v for k, v in layer.get_config().items()}
    return {**config, "name": name, "dtype": "float64"}
