import numbers
from collections.abc import Mapping
from typing import Any, Self

import keras
import numpy as np

from keras_lipnext.arguments import number
from keras_lipnext.lmi._dense_chain import dense_chain
from keras_lipnext.lmi.admissibility import Admissibility
from keras_lipnext.typing import Config, Tensor


@keras.saving.register_keras_serializable("keras_lipnext")
class RSLMI(keras.Model):
    """Trains a Dense network towards a Lipschitz constant, by sketched matrix inequalities.

    RS-LMI: randomised-subspace linear matrix inequalities. To the loss of each training step it
    adds, for blocks M_i whose positive semidefiniteness implies that the network is L-Lipschitz,

        weight * sum_i sum_j max(0, margin - eigenvalue_j(S_i^T M_i S_i))^2

    with new random subspaces S_i of `sketch` dimensions in every step. The multipliers of the M_i
    are trained with the network. keras_lipnext/lmi/admissibility.py has the derivation. A step
    costs, beyond the network's own, products of the weights with some 5 `sketch` columns, and
    nothing that grows with the square of the width otherwise.

    **It certifies nothing.** A sketch is a necessary condition, and a penalty is no constraint:
    after training the constant is near L and may be above. So this wrapper cannot be certified
    (`keras_lipnext.certify` refuses it): make the condition hold by `keras_lipnext.lmi.project`,
    which verifies it in full, and certify the network itself, from its stored weights.

    Example:

    ```python
    model = keras.Sequential([
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10),
    ])
    model.build((None, 8, 8, 1))
    training = keras_lipnext.lmi.RSLMI(model, lipschitz=5.0)
    training.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    training.fit(x_train, y_train, epochs=10)
    found = keras_lipnext.lmi.project(training, lipschitz=5.0)
    certificate = keras_lipnext.certify(model, x_test, y_test, lipschitz=found)
    ```

    Args:
        model: Built model to be trained. A chain of Dense layers, with activations of bounded slope
            between them; Dropout, Flatten, and Rescaling in front may stand there too. If it ends
            in softmax, the constant is of the logits before it.
        lipschitz: Positive float, the target L of the l2 Lipschitz constant.
        sketch: Positive integer, dimensions of a subspace; None for the whole matrices: exact, and
            cubic in the width. A sketch as large as a block is the whole block.
        order: Integer, order of the Krylov spaces in which the subspaces are sought. 0 is the plain
            random sketch, which sees little of a large matrix.
        weight: Positive float, weight of the penalty.
        margin: Float in [0, 0.5], how far from singular the blocks (of norm about one) should be.
        rank: Positive integer, rank of the storages between hidden layers beside their diagonals.
        seed: Integer, of the subspaces.
        head: For Dense layers on features that others compute: the nested model of `model` that
            is the chain, or its name. The constant is then of the head alone, from the features
            on, and `model` may be anything else before it.

    Raises:
        ValueError: for other arguments, or naming the layer that does not fit into a chain.

    Reference:
        Abdeen, Kekatos, Jin 2025, arXiv 2506.23977.
    """

    def __init__(
        self,
        model: keras.Model,
        lipschitz: float,
        sketch: int | None = 16,
        order: int = 1,
        weight: float = 10.0,
        margin: float = 0.02,
        rank: int = 8,
        seed: int = 0,
        head: str | keras.Model | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, positive in (("lipschitz", lipschitz), ("weight", weight)):
            if not 0 < number(name, positive) < float("inf"):
                raise ValueError(f"`{name}` must be positive. Received: {name}={positive!r}")
        if not 0 <= number("margin", margin) <= 0.5:
            raise ValueError(f"`margin` must be in [0, 0.5]. Received: margin={margin!r}")
        for name, value, least in (("sketch", sketch, 1), ("order", order, 0), ("rank", rank, 1)):
            whole = (
                isinstance(value, numbers.Integral)
                and not isinstance(value, bool)
                and value >= least
            )
            if not (whole or (name == "sketch" and value is None)):
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}"
                )
        if isinstance(head, keras.Model):
            if not any(layer is head for layer in model.layers):
                raise ValueError(f"`head` must be a layer of the model. Received: head={head!r}")
            head = head.name
        if head is not None:
            nested = [layer.name for layer in model.layers if isinstance(layer, keras.Model)]
            if head not in nested:
                raise ValueError(
                    f"`head` must be a nested model of `model`: {nested}. Received: head={head!r}"
                )
        self.model = model
        self.settings = {
            "lipschitz": lipschitz,
            "sketch": None if sketch is None else int(sketch),
            "order": int(order),
            "weight": weight,
            "margin": margin,
            "rank": int(rank),
            "seed": seed,
            "head": head,
        }
        chain = dense_chain(self.constrained)
        self.admissibility = Admissibility(chain, lipschitz, sketch, order, rank, margin, seed)
        self.built = True

    @property
    def constrained(self) -> keras.Model:
        """The chain of Dense layers whose constant is meant: the model, or its head."""
        head = self.settings["head"]
        return self.model if head is None else self.model.get_layer(head)

    def multipliers(self) -> list[np.ndarray]:
        """The trained multipliers of the hidden layers, in NumPy float64: vectors (units,).

        The Lambda_i of the theorem in keras_lipnext/lmi/_verified.py, as of a `LipschitzResult`.
        """
        return self.admissibility.multiplier_values()

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return self.model(inputs, training=training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return loss
        penalty = self.settings["weight"] * self.admissibility.penalty()
        return loss + keras.ops.cast(penalty, loss.dtype)

    def get_config(self) -> Config:
        config = {"model": keras.saving.serialize_keras_object(self.model), **self.settings}
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config: Config, custom_objects: Mapping[str, Any] | None = None) -> Self:
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects)
        return cls(**{**config, "model": model})
