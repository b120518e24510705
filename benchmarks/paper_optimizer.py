"""The LipNeXt paper's step for square matrices, for comparison (arXiv 2601.18513; no code exists).

    A = skew(X^T G),    D = -lr * m_hat / (sqrt(v_hat) + epsilon),    X <- X FastExp(D)

FastExp truncates the exponential by the Frobenius norm of D. The products are arranged as
favourably as we know: the terms in D^3 and D^4 cost one together. One order serves a stack of
matrices, chosen from its largest norm.
"""

from keras import ops

import keras_lipnext as lip
from keras_lipnext.manifolds.polar import frobenius, skew, transpose

NORMS = (0.05, 0.25, 1.0)  # largest of the orders 2, 3 and 4; the exact exponential beyond


class PaperAdam(lip.optimizers.ManifoldAdam):
    """ManifoldAdam that moves square matrices by FastExp and leaves drift to the epoch's end."""

    def manifold_step(self, x, gradient, learning_rate, moments):
        if x.shape[-1] != x.shape[-2]:
            return super().manifold_step(x, gradient, learning_rate, moments)
        direction, moments = self.adam(skew(transpose(x) @ gradient), learning_rate, moments)
        return x @ fast_exp(-direction), moments

    @staticmethod
    def remove_drift(x):
        return x


def fast_exp(d):
    norm = frobenius(d)
    branch = sum(ops.cast(norm >= bound, "int32") for bound in NORMS)
    eye = ops.eye(d.shape[-1], dtype=d.dtype)
    return ops.switch(branch, (_order_2, _order_3, _order_4, _exact), d, eye)


def _order_2(d, eye):
    return eye + d + d @ d / 2


def _order_3(d, eye):
    return eye + d + (d @ d) @ (eye / 2 + d / 6)


def _order_4(d, eye):
    d2 = d @ d
    return eye + d + d2 @ (eye / 2 + d / 6 + d2 / 24)


def _exact(d, _):
    return lip.manifolds.fast_exp(d)
