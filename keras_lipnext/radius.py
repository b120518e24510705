"""Pairwise constants and certified radii: pure functions, shared by losses, metrics and `certify`.

A classifier with logits z(x) = W f(x) + b, whose body f is K-Lipschitz in the l2 norm, keeps its
prediction i for every perturbation of norm below

    r(x) = min_{j != i} max(0, z_i - z_j - E_ij) / (K ||w_i - w_j||)

with E_ij = 0 in exact arithmetic; certificates take the allowance for rounding that
`head_allowances` in lipschitz/rounding.py finds.
[Tsuzuku et al. 2018, arXiv 1802.04034; Leino et al. 2021, arXiv 2102.08452].
"""

import numpy as np
from keras import ops

from keras_lipnext import backend
from keras_lipnext.norms.roundoff import ROUNDING, SMALLEST_DISTANCE, UNIT_ROUNDOFF


@backend.one_program
def pairwise_distances(kernel):
    """`||w_i - w_j||_2` for the columns of `kernel`, shape (d, classes): shape (classes, classes).

    Differentiable, with gradient zero on the diagonal; for training. Certificates use
    `pairwise_distances_float64`.
    """
    gram = backend.matmul(ops.transpose(kernel), kernel)
    squares = ops.diagonal(gram)
    distances = squares[:, None] + squares[None, :] - 2 * gram
    distances = ops.maximum(distances, 0) * (1 - ops.eye(kernel.shape[-1], dtype=kernel.dtype))
    # sqrt has an infinite slope at 0: there the gradient is cut, not infinite.
    positive = distances > 0
    return ops.where(positive, ops.sqrt(ops.where(positive, distances, 1)), 0)


def check_head(head):
    """Raises unless `head` is a built layer that makes the logits of two classes or more."""
    name = getattr(head, "name", head)
    kernel = getattr(head, "kernel", None)
    if kernel is None or len(kernel.shape) != 2:
        state = "" if getattr(head, "built", True) else ", which is not built yet"
        raise ValueError(
            "`bind(head)` takes the layer that makes the logits, built, with a `kernel` of shape "
            "(d, classes): keras_lipnext.layers.NormalizedDense as a rule. Received: "
            f"{name!r} of type {type(head).__name__}{state}"
        )
    if kernel.shape[1] < 2:
        raise ValueError(
            f"Layer '{name}' makes one logit, and certified losses and metrics compare the "
            "logits of at least two classes. Give the head two classes, NormalizedDense(2), or "
            "train the one logit with keras.losses.BinaryCrossentropy(from_logits=True)."
        )


def of_one_head(part, known, head):
    """`head`; ValueError if a loss or metric is bound to another, whose model it would fail."""
    if known is not None and known is not head:
        known, other = (getattr(layer, "name", layer) for layer in (known, head))
        raise ValueError(
            f"{type(part).__name__} '{part.name}' is bound to the head {known!r} already. "
            f"Received: {other!r}. Make a new one for each model"
        )
    return head


def unbound(part, call):
    """The error of a loss or metric that has no head, and how to give it one."""
    return ValueError(
        f"{type(part).__name__} '{part.name}' needs the pairwise constants ||w_i - w_j|| of the "
        "classification head. Compile it in a keras_lipnext.CertifiableModel, which binds a copy, "
        f"and answers in its logs, or call `{call}` with the model's NormalizedDense layer before "
        "`compile`. (keras.models.clone_model makes an ordinary model of a LipNeXt or SLLNet: "
        "type(model).from_config(model.get_config()) makes one of the kind.)"
    )


def head_distances(head, lipschitz_constant):
    """`K ||w_i - w_j||` of a head's kernel as it is now, a tensor of shape (classes, classes)."""
    check_head(head)
    if not backend.has_value(head.kernel):
        raise RuntimeError(
            f"The kernel of layer '{head.name}' cannot be read here: while a step runs on JAX the "
            "model's weights are arguments of the step. Take the loss inside "
            "`model.stateless_compute_loss`, or let the model be a keras_lipnext.CertifiableModel."
        )
    return lipschitz_constant * pairwise_distances(ops.convert_to_tensor(head.kernel))


def pairwise_distances_float64(kernel):
    """As `pairwise_distances`, in NumPy float64, from explicit differences, rounded up.

    A sum of n squares carries a relative error below (n + 2) 2^-53 and its root half of it.
    """
    kernel = np.asarray(kernel, "float64")
    return np.stack([_column_norms(kernel - w[:, None]) for w in kernel.T])


def pair_constants(constant, distances, known=np.inf):
    """`K ||w_i - w_j||` in NumPy float64, rounded up: 0 where the weight vectors are equal.

    Args:
        constant: K.
        distances: ||w_i - w_j||, rounded up, of any shape.
        known: Constants of the same differences that were proven otherwise; the smaller is taken.
    """
    constants = np.minimum(constant * distances * (1 + ROUNDING), known)
    # A product that underflows is rounded in units that are no longer relative.
    return np.where(distances > 0, np.maximum(constants, SMALLEST_DISTANCE), 0.0)


def joint_norms_float64(kernel):
    """`|| |w_i| + |w_j| ||` for the columns of `kernel`, rounded up, shape (classes, classes)."""
    magnitudes = np.abs(np.asarray(kernel, "float64"))
    return np.stack([_column_norms(magnitudes + w[:, None]) for w in magnitudes.T])


def _column_norms(matrix):
    """The norms of the columns, rounded up.

    Each column is scaled by a power of two of its own, which is exact: squares that underflow are
    then below 2^-1022 of the largest.
    """
    exponents = np.frexp(np.abs(matrix).max(axis=0))[1]
    norms = np.linalg.norm(np.ldexp(matrix, -exponents), axis=0)
    norms = np.ldexp(norms * (1 + (len(matrix) + 8) * UNIT_ROUNDOFF), exponents)
    # Among subnormal numbers that would round to nearest: nothing but 0 is below 2^-1000.
    return np.where(norms > 0, np.maximum(norms, SMALLEST_DISTANCE), 0.0)


def certified_radii(logits, distances):
    """Radius of each sample, in the backend's tensors; for metrics.

    Args:
        logits: Shape (batch, ..., classes).
        distances: `K ||w_i - w_j||`, shape (classes, classes).

    Returns:
        Shape (batch, ...): at least 0; 0 where the largest logit is tied, or belongs to a class
        with the same weight vector as another, or a logit is not finite.
    """
    predictions = ops.argmax(logits, axis=-1)
    margins = ops.max(logits, axis=-1, keepdims=True) - logits
    needed = ops.take(distances, predictions, axis=0)
    predicted = ops.one_hot(predictions, logits.shape[-1], dtype="bool")
    # Equal weight vectors: a margin between them cannot be told from rounding.
    ratios = ops.where(needed > 0, margins / ops.where(needed > 0, needed, 1), 0)
    radii = ops.min(ops.where(predicted, ops.max(ratios, axis=-1, keepdims=True), ratios), axis=-1)
    finite = ops.all(ops.isfinite(logits), axis=-1)
    return ops.where(finite & (radii > 0), radii, 0)


def certified_radii_float64(logits, distances, allowances=0.0):
    """As `certified_radii`, in NumPy float64, rounded down.

    Args:
        logits: Shape (batch, classes), float64.
        distances: `K ||w_i - w_j||`, rounded up, shape (classes, classes).
        allowances: E_ij, shape (batch, classes): what the computed margin between the predicted
            class and each other may exceed the exact one by.

    Returns:
        (predictions, radii, deciding): `min_j max(0, z_i - z_j - E_ij) / (K ||w_i - w_j||)`, the
        prediction, -1 where a logit is not finite or beyond 2^1000, and the class j that decides,
        each of shape (batch,).
    """
    logits = np.asarray(logits, "float64")
    rows = np.arange(len(logits))
    predictions = np.argmax(logits, axis=-1)
    # Beyond 2^1000 differences and quotients may overflow: such logits count as infinite.
    finite = (np.abs(logits) < 2.0**1000).all(axis=-1)
    needed = distances[predictions]
    safe = np.where(finite[:, None], logits, 0)
    with np.errstate(all="ignore"):
        margins = safe[rows, predictions][:, None] - safe - allowances
        ratios = np.where((needed > 0) & (margins > 0), margins / needed, 0.0)
        ratios[rows, predictions] = np.inf
        deciding = ratios.argmin(axis=-1)
        # One rounding each in the two differences, the quotient and this product.
        radii = np.minimum(ratios[rows, deciding] * (1 - 8 * UNIT_ROUNDOFF), 2.0**1000)
    radii = np.where(finite & (radii > 0), radii, 0.0)
    return np.where(finite, predictions, -1), radii, deciding
