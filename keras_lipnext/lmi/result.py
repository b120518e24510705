"""What a bound by matrix inequalities is answered as, and the way to it that all methods share."""

import dataclasses
import time

import numpy as np

from keras_lipnext.certification.norms import UNIT_ROUNDOFF
from keras_lipnext.lmi._chain import read_chain
from keras_lipnext.lmi._verified import verified_constant


@dataclasses.dataclass(frozen=True)
class LipschitzResult:
    """An upper bound of the l2 Lipschitz constant of a model, or of its body: proven.

    Attributes:
        constant: Float, rounded up.
        method: "lipsdp-neuron", "lipsdp-layer", "eclipse" or "eclipse_fast".
        status: "verified": the matrix inequality was proven, in float64, to hold for the
            multipliers and this constant.
        part: "logits" if the constant covers the model, "body" if what is in front of its head.
        seconds: Time it took.
        multipliers: Tuple of vectors, the diagonals of the Lambda_i that prove it, for the weights
            scaled by powers of two to norms near 1.
    """

    constant: float
    method: str
    status: str
    part: str
    seconds: float
    multipliers: tuple = dataclasses.field(repr=False)


def proven_bound(model, part, method, candidates):
    """`LipschitzResult` of a model.

    Args:
        model: Keras model that `read_chain` reads.
        part: "logits" or "body".
        method: Name for the result.
        candidates: Function of (weights, slopes), lists of matrices of norms near 1 and of
            intervals, that yields lists of multipliers: the best bound that one of them proves is
            the answer.

    Raises:
        ValueError: if the model is no such chain.
        RuntimeError: if no candidate proves a bound.
    """
    started = time.perf_counter()
    chain = read_chain(model, part)
    exponents = [scale_of(w) for w in chain.weights]
    weights = [np.ldexp(w, -k) for w, k in zip(chain.weights, exponents)]
    errors = [
        # What leaves the normal numbers is lost, and the quotient of the error rounds.
        float(np.ldexp(error, -k)) * (1 + 4 * UNIT_ROUNDOFF) + w.size * 2.0**-1000
        for error, k, w in zip(chain.errors, exponents, weights)
    ]
    proofs = []
    for multipliers in candidates(weights, chain.slopes):
        proof = verified_constant(weights, errors, chain.slopes, multipliers)
        if proof is not None:
            proofs.append(proof)
    if not proofs:
        raise RuntimeError(
            f"No bound of model '{model.name}' could be proven from the multipliers of {method}: "
            "its matrices are too ill-conditioned for float64. keras_lipnext.lipschitz_bound "
            "multiplies the norms of its layers instead (lipschitz='product')."
        )
    constant, multipliers = min(proofs, key=lambda proof: proof[0])
    total = sum(exponents)
    if not -500 < total < 500:
        raise RuntimeError(f"The bound of model '{model.name}' leaves float64: 2^{total}.")
    return LipschitzResult(
        constant=float(np.ldexp(constant, total)),
        method=method,
        status="verified",
        part=part,
        seconds=time.perf_counter() - started,
        multipliers=tuple(multipliers),
    )


def scale_of(matrix):
    """Exponent k with ||matrix|| about 2^k, by power iteration. Any k is right: it only scales.

    x_i in units of 2^(k_1 + ... + k_i) have the weights 2^-k_i W_i, and activations
    phi(2^k v) / 2^k of the same slopes.
    """
    vector = np.random.default_rng(0).standard_normal(matrix.shape[1])
    norm = 1.0
    for _ in range(20):
        vector = matrix.T @ (matrix @ vector)
        norm = np.linalg.norm(vector)
        if not 0 < norm < np.inf:
            return int(np.frexp(np.abs(matrix).max())[1])
        vector = vector / norm
    return round(float(np.log2(norm)) / 2)
