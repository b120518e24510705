"""The `Stiefel` constraint marks a variable as living on the manifold and puts it back there."""

import random
from collections.abc import Sequence

import keras

from keras_lipnext.manifolds import stiefel
from keras_lipnext.typing import Config, Initializer, Tensor


@keras.saving.register_keras_serializable("keras_lipnext")
class Stiefel(keras.constraints.Constraint):
    """Keeps a matrix on the Stiefel manifold: `X^T X = I`, or `X X^T = I` if it is wide.

    Keras applies a constraint after each optimizer step, so any optimizer trains on the manifold
    (a projected gradient method); the optimizers of this library recognise the mark and move
    along it instead. The projection costs two matrix products when the matrix has only drifted.

    Example:

    ```python
    layer = keras.layers.Dense(64, kernel_constraint=keras_lipnext.manifolds.Stiefel())
    ```
    """

    def __call__(self, w: Tensor) -> Tensor:
        return stiefel.projx(w)


@keras.saving.register_keras_serializable("keras_lipnext")
class RandomStiefel(keras.initializers.Initializer):
    """Draws a random point of the Stiefel manifold (see `manifolds.stiefel.random`).

    Example:

    ```python
    layer = keras.layers.Dense(
        64,
        kernel_initializer=keras_lipnext.manifolds.RandomStiefel(seed=0),
        kernel_constraint=keras_lipnext.manifolds.Stiefel(),
    )
    ```

    Args:
        seed: Integer. None draws one from Python's generator, which
            `keras.utils.set_random_seed` seeds.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = random.randint(1, 2**31 - 1) if seed is None else seed

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        return stiefel.random(shape, seed=self.seed, dtype=dtype or keras.config.floatx())

    def get_config(self) -> Config:
        return {"seed": self.seed}


@keras.saving.register_keras_serializable("keras_lipnext")
class ProjectedInitializer(keras.initializers.Initializer):
    """Projects what another initializer draws onto the manifold.

    Args:
        initializer: Any Keras initializer identifier.
    """

    def __init__(self, initializer: Initializer) -> None:
        self.initializer = keras.initializers.get(initializer)

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        return stiefel.projx(self.initializer(shape, dtype=dtype or keras.config.floatx()))

    def get_config(self) -> Config:
        return {"initializer": keras.initializers.serialize(self.initializer)}
