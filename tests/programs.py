"""What XLA compiles of a model's training step (JAX)."""

import jax
import keras
import numpy as np


def training_step(model, count):
    """The compiled step of `count` images, its state donated and laid out as in `fit`."""
    batch = np.zeros((count, *model.input_shape[1:]), "float32"), np.zeros(count, "int32")
    model._symbolic_build(data_batch=batch)  # optimizer and metrics; nothing is computed
    parts = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in variables] for variables in parts)
    distribution = keras.distribution.distribution()
    if distribution is not None:
        places = [distribution.get_data_layout(a.shape).backend_layout for a in batch]
        batch = list(map(jax.device_put, batch, places))
    places = (None, jax.tree.map(lambda a: a.sharding, state))
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=places)
    return step.lower(state, batch).compile()
