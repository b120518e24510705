import keras
from keras import ops

from keras_lipnext import backend
from keras_lipnext.manifolds import fast_exp, stiefel
from keras_lipnext.manifolds.polar import skew
from keras_lipnext.optimizers.manifold_optimizer import ManifoldOptimizer


@keras.saving.register_keras_serializable("keras_lipnext")
class ManifoldAdam(ManifoldOptimizer):
    """Adam that moves orthogonal matrices along their manifold, and is plain Adam elsewhere.

    For a square kernel X marked by a `keras_lipnext.manifolds.Stiefel` constraint, with gradient
    G, Adam's moments m, v run on the skew-symmetric Riemannian gradient and the step is geodesic:

        A = skew(X^T G),    D = -lr * m_hat / (sqrt(v_hat) + epsilon),    X <- X exp(D).

    For a rectangular one they run on the tangent projection of G; the Adam direction is projected
    on the tangent space again and followed by the polar retraction. After each step the constraint
    removes the rounding drift with a Newton-Schulz step, so the matrices never leave the manifold.

    `clipnorm`, `global_clipnorm` and `clipvalue` act on the Euclidean gradients, before they are
    projected. Weight decay skips manifold variables. An exponential moving average of the weights
    (`use_ema`) is projected when it overwrites them.

    Example:

    ```python
    model.compile(keras_lipnext.optimizers.ManifoldAdam(1e-2), loss=...)
    ```

    Args:
        learning_rate: Float, `LearningRateSchedule` or callable. On the manifold it is about the
            rotation, in radians, of each plane of coordinates in one step.
        euclidean_learning_rate: Float or `LearningRateSchedule` for the other variables. None uses
            `learning_rate`. A float is constant: callbacks that change `learning_rate` do not
            change it; the cosine of `LipNeXt.fit` multiplies both.
        beta_1, beta_2, epsilon: As in `keras.optimizers.Adam`.
        lookahead_period: Steps between two Lookahead updates (k), or None for no Lookahead.
        lookahead_step: Lookahead's slow step, in (0, 1].
        **kwargs: As for any Keras optimizer (`clipnorm`, `use_ema`, `weight_decay`,
            `gradient_accumulation_steps`, `loss_scale_factor`, ...).

    Reference:
        LipNeXt (Hu et al., ICLR 2026), arXiv 2601.18513; Lookahead (Zhang et al., 2019),
        arXiv 1907.08610.
    """

    def __init__(self, learning_rate=1e-3, name="manifold_adam", **kwargs):
        super().__init__(learning_rate, name=name, **kwargs)

    def manifold_step(self, x, gradient, learning_rate, index):
        square = x.shape[-1] == x.shape[-2]
        if square:
            tangent = skew(ops.transpose(x) @ gradient)
        else:
            tangent = stiefel.proju(x, gradient)
        direction = -learning_rate * self._adam_direction(tangent, index)
        if square:
            return x @ fast_exp(direction)
        return stiefel.retr(x, stiefel.proju(x, direction))

    def _adam_direction(self, gradient, index):
        """m_hat / (sqrt(v_hat) + epsilon), after updating the moments of variable `index`."""
        m, v = (
            ops.cast(backend.value(moments[index]), gradient.dtype)
            for moments in (self._momentums, self._velocities)
        )
        m = m + (gradient - m) * (1 - self.beta_1)
        v = v + (ops.square(gradient) - v) * (1 - self.beta_2)
        self.assign(self._momentums[index], m)
        self.assign(self._velocities[index], v)
        step = ops.cast(self.iterations + 1, gradient.dtype)
        beta_1, beta_2 = (
            ops.convert_to_tensor(b, dtype=gradient.dtype) for b in (self.beta_1, self.beta_2)
        )
        m_hat = m / (1 - beta_1**step)
        v_hat = v / (1 - beta_2**step)
        return m_hat / (ops.sqrt(v_hat) + self.epsilon)
