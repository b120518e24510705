import functools
from collections.abc import Callable
from typing import Any

import keras

from keras_lipnext.backend import matmul
from keras_lipnext.manifolds import branchless, fast_exp, rotate, stiefel
from keras_lipnext.manifolds.polar import skew, transpose
from keras_lipnext.optimizers.manifold_optimizer import PROJECTION_PERIOD, ManifoldOptimizer
from keras_lipnext.typing import Config, LearningRate, Tensor

RETRACTIONS: dict[str, Callable[..., Tensor]] = {
    "polynomial": functools.partial(rotate, period=PROJECTION_PERIOD),
    "exponential": lambda x, d: matmul(x, fast_exp(d)),
}


@keras.saving.register_keras_serializable("keras_lipnext")
class ManifoldAdam(ManifoldOptimizer):
    """Adam that moves orthogonal matrices along their manifold, and is plain Adam elsewhere.

    For a square kernel X marked by a `keras_lipnext.manifolds.Stiefel` constraint, with gradient
    G, Adam's moments m, v run on the skew-symmetric Riemannian gradient and the step is a rotation:

        A = skew(X^T G),    D = -lr * m_hat / (sqrt(v_hat) + epsilon_t),    X <- X p(D),

    with p(D) = exp(D) to second order and, as in Keras' Adam, epsilon_t = epsilon / sqrt(1 -
    beta_2^t). For a rectangular one they run on the tangent projection of G; the Adam direction is
    projected on the tangent space again and followed by the polar retraction. Every few steps a
    Newton-Schulz step removes the rounding drift of square ones. Beyond plain Adam a step costs a
    square d x d kernel 3 or 4 products of d x d matrices, by the size of D, and a quarter of one
    for the drift.

    `clipnorm`, `global_clipnorm` and `clipvalue` act on the Euclidean gradients, before they are
    projected. Weight decay skips manifold variables. An exponential moving average of the weights
    (`use_ema`) is projected when it overwrites them.

    Example:

    ```python
    optimizer = keras_lipnext.optimizers.ManifoldAdam(1e-3)
    model.compile(optimizer, loss=keras_lipnext.losses.EMMA(epsilon=0.25))
    ```

    Args:
        learning_rate: Float, `LearningRateSchedule` or callable. On the manifold it is about the
            rotation, in radians, of each plane of coordinates in one step.
        retraction: "polynomial", `keras_lipnext.manifolds.rotate`, or "exponential", LipNeXt's
            geodesic step `X exp(D)` by `keras_lipnext.manifolds.fast_exp`, which costs more
            and waits for the host. Of square kernels only.
        euclidean_learning_rate: Float or `LearningRateSchedule` for the other variables. None uses
            `learning_rate`. A float is constant: callbacks that change `learning_rate` do not
            change it; `schedule` multiplies both.
        beta_1, beta_2, epsilon: As in `keras.optimizers.Adam`.
        lookahead_period: Steps between two Lookahead updates (k), or None for no Lookahead.
        lookahead_step: Lookahead's slow step, in (0, 1].
        precision: Of the products on the manifold on accelerators; on CPUs all are float32. "auto":
            a square kernel's step is one bfloat16 product, three in TF32, a sixteenth of one in
            TF32 and in float32, without a branch; it turns no plane by more than about 1 radian,
            and leaves a defect of about 0.1 % of the learning rate until the end of `fit`, which
            projects in float32. Lookahead, `ema_overwrite_frequency`, `retraction="exponential"`
            and `gradient_accumulation_steps` branch all the same. "float32": the products and
            branches of a step on CPUs, which is slower.
        schedule: Keras `LearningRateSchedule` by whose value both learning rates are multiplied in
            each step of a `CertifiableModel`'s `fit`. In place of a number of steps it gets the
            share of the training done, from 0 to 1, as in `keras_lipnext.optimizers.cosine()`.
        **kwargs: As for any Keras optimizer (`clipnorm`, `use_ema`, `weight_decay`,
            `gradient_accumulation_steps`, `loss_scale_factor`, ...).

    Reference:
        LipNeXt (Hu et al., ICLR 2026), arXiv 2601.18513; Lookahead (Zhang et al., 2019),
        arXiv 1907.08610.
    """

    moment_names = ("momentum", "velocity")

    def __init__(
        self,
        learning_rate: LearningRate = 1e-3,
        retraction: str = "polynomial",
        name: str = "manifold_adam",
        **kwargs: Any,
    ) -> None:
        if retraction not in RETRACTIONS:
            raise ValueError(
                f"`retraction` must be one of {', '.join(RETRACTIONS)}. Received: "
                f"retraction={retraction!r}"
            )
        super().__init__(learning_rate, name=name, **kwargs)
        self.retraction = retraction

    def manifold_step(
        self, x: Tensor, gradient: Tensor, learning_rate: Tensor, moments: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        rough, precision = self.rough(x), self.direction_precision(x)
        if x.shape[-1] == x.shape[-2]:
            tangent = skew(matmul(transpose(x), gradient, precision))
            direction, moments = self.adam(tangent, learning_rate, moments)
            if rough and self.retraction == "polynomial":
                return branchless.turn(x, -direction), moments
            return RETRACTIONS[self.retraction](x, -direction), moments
        tangent = stiefel.proju(x, gradient, precision=precision)
        direction, moments = self.adam(tangent, learning_rate, moments)
        retract = branchless.retract if rough else stiefel.retr
        return retract(x, stiefel.proju(x, -direction, precision=precision)), moments

    def get_config(self) -> Config:
        return {**super().get_config(), "retraction": self.retraction}
