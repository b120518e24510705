"""One full training step of a compiled Keras model, as a callable to be timed."""

import itertools

import keras


def unconstrained(model):
    """Takes the constraints off the weights: what is left is an ordinary network."""
    for variable in model.trainable_variables:
        variable.constraint = None


def state_on_jax(model, x, targets):
    """The variables that `model.train_step` takes and returns on JAX, in four lists."""
    model.evaluate(x, targets, verbose=0)  # makes the metrics' state
    parts = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    return tuple(map(list, parts))


class TrainingStep:
    """Takes one training step on a batch; unless `wait` is False it is finished on return.

    Inputs stay, targets change from step to step in turn: drawn at random they cannot be learned.
    On a batch known by heart the optimizers would stand still, which may cost them less.

    What Keras compiles, without the data pipeline and callbacks around it: `model.train_step`,
    jitted on JAX, a tf.function on TensorFlow, eager on PyTorch. On JAX the weights move on in the
    step's own state and the model's variables are left behind.
    """

    def __init__(self, model, x, targets, wait=True):
        self._model = model
        self._waits = wait
        self._targets = itertools.cycle(list(map(keras.ops.convert_to_tensor, targets)))
        self._x = keras.ops.convert_to_tensor(x)
        model.optimizer.build(model.trainable_variables)
        take = {"jax": self._on_jax, "tensorflow": self._on_tensorflow, "torch": self._on_torch}
        self._step = take[keras.backend.backend()]()

    def __call__(self):
        self._step((self._x, next(self._targets)))
        if self._waits:
            self.wait()

    def wait(self):
        """Returns when the steps taken are finished. TensorFlow's are, as soon as they return."""
        if keras.backend.backend() == "jax":
            import jax

            jax.block_until_ready(self._state)
        elif keras.backend.backend() == "torch":
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()

    def weights(self):
        """The trainable weights as NumPy arrays, in the model's order."""
        if keras.backend.backend() == "jax":
            return list(map(keras.ops.convert_to_numpy, self._state[0]))
        return list(map(keras.ops.convert_to_numpy, self._model.trainable_variables))

    def _on_torch(self):
        return self._model.train_step

    def _on_tensorflow(self):
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")  # takes several models for one function retraced
        step = tf.function(self._model.train_step)
        return lambda data: [value.numpy() for value in step(data).values()]

    def _on_jax(self):
        import jax

        model = self._model
        parts = state_on_jax(model, self._x[:1], next(self._targets)[:1])
        # Copies, because donated buffers are gone and the model may be used again.
        self._state = jax.tree.map(lambda v: v.value.copy(), parts)
        step = jax.jit(model.train_step, donate_argnums=0)

        def take(data):
            _, self._state = step(self._state, data)

        return take
