from typing import Any

import keras

from keras_lipnext.arguments import positive_integer, share
from keras_lipnext.backend import matmul
from keras_lipnext.manifolds import branchless, orthogonalize, rotate, stiefel
from keras_lipnext.manifolds.orthogonalize import LARGEST
from keras_lipnext.manifolds.polar import skew, transpose
from keras_lipnext.optimizers.manifold_optimizer import ManifoldOptimizer
from keras_lipnext.typing import Config, LearningRate, Tensor


@keras.saving.register_keras_serializable("keras_lipnext")
class ManifoldMuon(ManifoldOptimizer):
    """Muon on the orthogonal group and the Stiefel manifold, and plain Adam elsewhere.

    For a square kernel X marked by a `keras_lipnext.manifolds.Stiefel` constraint, with gradient
    G, momentum runs on the skew-symmetric Riemannian gradient, its singular values are brought
    close to 1 by Newton-Schulz steps, and X is rotated by the result:

        A = skew(X^T G),    m <- momentum * m + A,    D = -lr * UV^T of m,    X <- X p(D),

    with p(D) = exp(D) to second order. So every plane that the gradient says anything about turns
    by about `lr` radians a step, whatever its size: the steepest descent for the spectral norm. A
    rectangular kernel does the same with the tangent projection of G, projects the direction on
    the tangent space and takes the polar retraction. Beyond plain Adam a step costs a square d x d
    kernel 9 products of d x d matrices, 10 from 0.03 radians on, and a quarter for the drift; an
    m x n one, m >= 3 n, in float32 8 of n^2 m multiplications and 12 of n^3, whichever side is n.

    `clipnorm`, `global_clipnorm` and `clipvalue` act on the Euclidean gradients, before they are
    projected; on the manifold they have hardly an effect, as the length of the momentum does not
    count. Weight decay skips manifold variables. An exponential moving average of the weights
    (`use_ema`) is projected when it overwrites them.

    Example:

    ```python
    optimizer = keras_lipnext.optimizers.ManifoldMuon(0.01, euclidean_learning_rate=0.005)
    model.compile(optimizer, loss=keras_lipnext.losses.EMMA(epsilon=0.25))
    ```

    Args:
        learning_rate: Float, `LearningRateSchedule` or callable: the angle, in radians, by which a
            matrix turns in one step. The best one does not depend on its size, and falls with the
            depth of the network.
        momentum: Decay of the momentum, in [0, 1).
        nesterov: Whether to look ahead along the momentum: `A + momentum * m` instead of `m`.
        newton_schulz_steps: Positive integer, steps of `keras_lipnext.manifolds.orthogonalize`, at
            two products each.
        euclidean_learning_rate: Float or `LearningRateSchedule` of Adam for the other variables.
            None uses `learning_rate`. A float is constant:
            callbacks that change `learning_rate` do not change it; `schedule` multiplies both.
        beta_1, beta_2, epsilon: Of Adam, as in `keras.optimizers.Adam`.
        lookahead_period: Steps between two Lookahead updates (k), or None for no Lookahead.
        lookahead_step: Lookahead's slow step, in (0, 1].
        precision: Of the products on the manifold on accelerators; on CPUs all are float32. "auto":
            a square kernel's step is eight bfloat16 products, one in TF32, a sixteenth of one in
            TF32 and in float32, without a branch; it turns no plane by more than about 0.3 radians,
            and leaves a defect of about 0.1 % of the learning rate until the end of `fit`, which
            projects in float32. Lookahead, `ema_overwrite_frequency` and
            `gradient_accumulation_steps` branch all the same. "float32": the products and branches
            of a step on CPUs, which is slower.
        schedule: Keras `LearningRateSchedule` by whose value both learning rates are multiplied in
            each step of a `CertifiableModel`'s `fit`. In place of a number of steps it gets the
            share of the training done, from 0 to 1, as in `keras_lipnext.optimizers.cosine()`.
        **kwargs: As for any Keras optimizer (`clipnorm`, `use_ema`, `weight_decay`,
            `gradient_accumulation_steps`, `loss_scale_factor`, ...).

    Reference:
        Muon (Jordan et al., 2024); Modular Manifolds (Bernstein, 2025); scaled Newton-Schulz steps
        (Chen and Chow, 2014; The Polar Express, arXiv 2505.16932).
    """

    moment_names = ("momentum",)

    def __init__(
        self,
        learning_rate: LearningRate = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        newton_schulz_steps: int = 3,
        name: str = "manifold_muon",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, name=name, **kwargs)
        self.momentum = share("momentum", momentum)
        self.nesterov = nesterov
        self.newton_schulz_steps = positive_integer("newton_schulz_steps", newton_schulz_steps)

    def manifold_step(
        self, x: Tensor, gradient: Tensor, learning_rate: Tensor, moments: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        (m,) = moments
        rough, precision = self.rough(x), self.direction_precision(x)
        square = x.shape[-1] == x.shape[-2]
        if square:
            tangent = skew(matmul(transpose(x), gradient, precision))
        else:
            tangent = stiefel.proju(x, gradient, precision=precision)
        m = self.momentum * m + tangent
        ahead = tangent + self.momentum * m if self.nesterov else m
        direction = orthogonalize(ahead, steps=self.newton_schulz_steps, precision=precision)
        if square:
            move = branchless.turn if rough else rotate
            return move(x, -learning_rate * skew(direction), LARGEST * learning_rate), [m]
        retract = branchless.retract if rough else stiefel.retr
        return retract(x, stiefel.proju(x, -learning_rate * direction, precision=precision)), [m]

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "newton_schulz_steps": self.newton_schulz_steps,
        }
