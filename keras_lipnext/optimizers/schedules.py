"""How learning rates change over one `fit`, whatever its number of steps."""

import keras

from keras_lipnext.arguments import share


def cosine(warmup: float = 0.0) -> keras.optimizers.schedules.CosineDecay:
    """A linear warm-up from 0 to 1, then a cosine from 1 to 0, of the share t of a training:

        t / warmup                                        for t < warmup,
        (1 + cos(pi * (t - warmup) / (1 - warmup))) / 2   from there on.

    For `schedule` of the manifold optimizers. It is Keras' `CosineDecay`, and saved as that.

    Example:

    ```python
    schedule = keras_lipnext.optimizers.cosine(warmup=0.05)
    optimizer = keras_lipnext.optimizers.ManifoldMuon(0.01, schedule=schedule)
    model.compile(optimizer, loss=keras_lipnext.losses.EMMA(epsilon=0.25))
    ```

    Args:
        warmup: Share of the training in which the rate rises, in [0, 1).
    """
    share("warmup", warmup)
    if not warmup:
        return keras.optimizers.schedules.CosineDecay(1.0, decay_steps=1.0)
    return keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=1.0 - warmup, warmup_target=1.0, warmup_steps=float(warmup)
    )
