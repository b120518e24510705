"""The way from candidate multipliers to proven bounds of a model, that all methods share."""

import dataclasses
import time

import numpy as np

from keras_lipnext.lipschitz.bounds import Method
from keras_lipnext.lmi._chain import read_chain
from keras_lipnext.lmi._verified import float64_vectors, verified_constant, verified_pairs
from keras_lipnext.norms.roundoff import UNIT_ROUNDOFF


@dataclasses.dataclass(frozen=True)
class LipschitzResult:
    """An upper bound of the l2 Lipschitz constant of a model, or of its body: proven.

    `keras_lipnext.lmi.lipsdp`, `eclipse`, `eclipse_diagonal`, `eclipse_fast` and `project` answer
    with it, and `keras_lipnext.certify(..., lipschitz=result)` proves it again from its
    multipliers.

    Attributes:
        constant: Float, rounded up.
        method: "lipsdp-neuron", "lipsdp-layer", "eclipse", "eclipse_diagonal", "eclipse_fast" or
            "rs_lmi".
        status: "verified": the matrix inequality was proven, in float64, to hold for the
            multipliers and this constant.
        part: "logits" if the constant covers the model, "body" if what is in front of its head.
        seconds: Time it took.
        multipliers: Tuple of vectors, the diagonals of the Lambda_i that prove it.
    """

    constant: float
    method: str
    status: str
    part: str
    seconds: float
    multipliers: tuple[np.ndarray, ...] = dataclasses.field(repr=False)

    @property
    def certifying(self) -> Method:
        """`Method` that proves a bound anew from the multipliers.

        Nothing else is taken from this result: if the weights have changed since, or it is another
        model's, it proves less, or nothing.

        Raises:
            ValueError: for multipliers that are no vectors of real numbers; a method that is no
                name.
        """
        if not (isinstance(self.method, str) and self.method.isprintable()):
            raise ValueError(
                "The method of a LipschitzResult must be a name in one line. "
                f"Received: method={self.method!r}"
            )
        multipliers = float64_vectors(self.multipliers)

        def bound(model, part):
            def candidates(chain):
                if not chain.fits(multipliers):
                    sizes = [len(m) for m in multipliers]
                    raise ValueError(
                        f"`lipschitz` has multipliers for hidden layers of {sizes} neurons, and "
                        f"model '{model.name}' has {[len(w) for w in chain.weights[:-1]]}."
                    )
                yield chain.to_units(multipliers)

            return proven_bound(model, part, self.method, candidates)

        title = f"LipSDP with the multipliers of {self.method}"
        return Method(self.method, title, _constants_by(bound))


@dataclasses.dataclass(frozen=True)
class ScaledChain:
    """A model's chain with weights scaled by powers of two to norms near 1.

    x_i in units of 2^(k_1 + ... + k_i) have the weights 2^-k_i W_i, and activations
    phi(2^k v) / 2^k of the same slopes.

    Attributes:
        weights: List of matrices.
        errors: Bounds of their errors in the 2-norm.
        slopes: List of intervals.
        units: k_1 + ... + k_i of each layer: integers. The last is that of the answer.
    """

    weights: list
    errors: list
    slopes: tuple
    units: np.ndarray

    @classmethod
    def of(cls, chain):
        """That of a `Chain` with layers. RuntimeError out of range."""
        exponents = [scale_of(w) for w in chain.weights]
        weights = [np.ldexp(w, -k) for w, k in zip(chain.weights, exponents)]
        errors = [
            # What leaves the normal numbers is lost, and the quotient of the error rounds.
            float(np.ldexp(error, -k)) * (1 + 4 * UNIT_ROUNDOFF) + w.size * 2.0**-1000
            for error, k, w in zip(chain.errors, exponents, weights)
        ]
        units = np.cumsum(exponents)
        if not np.abs(units).max() < 500:
            raise RuntimeError(
                f"The bound of model '{chain.model}' leaves float64: 2^{max(units, key=abs)}."
            )
        return cls(weights, errors, chain.slopes, units)

    def to_units(self, multipliers):
        """Multipliers for the stored weights as those for the scaled ones."""
        return [np.ldexp(m, 2 * k) for m, k in zip(multipliers, self.units)]

    def from_units(self, multipliers):
        """The way back."""
        return [np.ldexp(m, -2 * k) for m, k in zip(multipliers, self.units)]

    def fits(self, multipliers):
        """Whether there is one for each hidden neuron."""
        return [len(m) for m in multipliers] == [len(w) for w in self.weights[:-1]]


def proven_bound(model, part, method, candidates):
    """`LipschitzResult` of a model.

    Args:
        model: Keras model that `read_chain` reads.
        part: "logits" or "body".
        method: Name for the result.
        candidates: Function of a `ScaledChain` that yields lists of multipliers for its scaled
            weights: the best bound that one of them proves is the answer.

    Raises:
        ValueError: if the model is no such chain.
        RuntimeError: if no candidate proves a bound.
    """
    started = time.perf_counter()
    chain = read_chain(model, part)
    if not chain.layers:
        seconds = time.perf_counter() - started
        return LipschitzResult(chain.diagonal, method, "verified", part, seconds, ())
    chain, proofs = ScaledChain.of(chain), []
    for multipliers in candidates(chain):
        proof = verified_constant(chain.weights, chain.errors, chain.slopes, multipliers)
        if proof is not None:
            proofs.append(proof)
    if not proofs:
        raise RuntimeError(
            f"No bound of model '{model.name}' could be proven from the multipliers of {method}: "
            "its matrices are too ill-conditioned for float64, or the multipliers are not its own. "
            "keras_lipnext.lipschitz_bound multiplies the norms of its layers instead "
            "(lipschitz='product')."
        )
    constant, multipliers = min(proofs, key=lambda proof: proof[0])
    return LipschitzResult(
        constant=float(np.ldexp(constant, chain.units[-1])),
        method=method,
        status="verified",
        part=part,
        seconds=time.perf_counter() - started,
        multipliers=tuple(chain.from_units(multipliers)),
    )


def certifies_as(title):
    """Decorator of a function of a model and `part` that answers with a `LipschitzResult`.

    `certify(..., lipschitz=function)` takes it then: it holds the `Method`, of this title.
    """

    def declare(bound):
        bound.certifying = Method(bound.__name__, title, _constants_by(bound))
        return bound

    return declare


def _constants_by(bound):
    """A function from a model to its constant, the body's and the pairs', by such a function."""

    def constants(model):
        # The logits first: what does not fit is refused by its own name.
        logits, body = bound(model, part="logits"), bound(model, part="body")
        pairs = pair_constants(model, body.multipliers, logits.multipliers)
        return logits.constant, body.constant, pairs

    return constants


def pair_constants(model, *candidates):
    """Upper bounds of the Lipschitz constants of z_i - z_j, proven: shape (classes, classes).

    Args:
        model: Keras model that `read_chain` reads.
        *candidates: Lists of multipliers for the stored weights; the best bound of each pair wins.

    Returns:
        Float64 array, infinite where nothing was proven.
    """
    chain = ScaledChain.of(read_chain(model, "logits"))
    best = np.full((len(chain.weights[-1]),) * 2, np.inf)
    for multipliers in map(float64_vectors, candidates):
        if chain.fits(multipliers):
            scaled = chain.to_units(multipliers)
            pairs = verified_pairs(chain.weights, chain.errors, chain.slopes, scaled)
            if pairs is not None:
                best = np.minimum(best, np.ldexp(pairs, chain.units[-1]))
    return best


def scale_of(matrix):
    """Exponent k with ||matrix|| about 2^k, by power iteration. Any k is right: it only scales."""
    vector = np.random.default_rng(0).standard_normal(matrix.shape[1])
    norm = 1.0
    for _ in range(20):
        vector = matrix.T @ (matrix @ vector)
        norm = np.linalg.norm(vector)
        if not 0 < norm < np.inf:
            return int(np.frexp(np.abs(matrix).max())[1])
        vector = vector / norm
    return round(float(np.log2(norm)) / 2)
