"""Scaling a trained network to a Lipschitz constant that is proven of its stored weights."""

from collections.abc import Callable

import keras
import numpy as np

from keras_lipnext.arguments import number
from keras_lipnext.lmi._dense_chain import dense_chain
from keras_lipnext.lmi._verified import output_form, schur_complement, without_kernel
from keras_lipnext.lmi.eclipse import fast
from keras_lipnext.lmi.result import LipschitzResult
from keras_lipnext.lmi.result import proven_bound as prove
from keras_lipnext.lmi.rs_lmi import RSLMI

# Scaling rounds the weights to their dtype: a few attempts, each further below, from its spacing.
ATTEMPTS = 8
# The trained multipliers are scaled layer by layer by powers of these, coarse to fine.
STEPS, LONGEST = (2.0, 1.4, 1.1, 1.03, 1.01), 20


def project(
    model: keras.Model,
    lipschitz: float,
    bound: Callable[[keras.Model], LipschitzResult] | None = None,
) -> LipschitzResult:
    """Scales the last Dense layer such that the network's constant is proven to be at most L.

    The outputs, biases included, are multiplied by one factor <= 1, the proven bound's excess. So
    predictions stay what they are, and certified radii too, as margins shrink like the constant. A
    network that satisfies the bound already is left alone.

    The bound is one of the whole stored weights in float64 with every rounding accounted for, never
    of sketches: the smallest that LipSDP's matrix inequality proves with the multipliers that an
    `RSLMI` trained, or with those of ECLipsE-Fast, which needs none and is never above the product
    of the layers' norms. `bound` takes another method: `keras_lipnext.lmi.lipsdp`, for example.

    Example:

    ```python
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)]
    )
    found = keras_lipnext.lmi.project(network, lipschitz=1.0)
    assert found.constant <= 1
    keras_lipnext.certify(network, np.ones((2, 4)), lipschitz=found)
    ```

    Args:
        model: `RSLMI`, or built chain of Dense layers, see there. Changed in place.
        lipschitz: Positive float, L.
        bound: Function from a Keras model to the `LipschitzResult` of its logits.

    Returns:
        `LipschitzResult` of the network as it is now stored: its `constant` is at most `lipschitz`.

    Raises:
        ValueError: for a model that is no chain of Dense layers, weights that are not finite, or a
            `bound` that answers something else.
        RuntimeError: if float64 cannot prove any bound.
        In either case the weights are left as they were.
    """
    if not 0 < number("lipschitz", lipschitz) < float("inf"):
        raise ValueError(f"`lipschitz` must be positive. Received: lipschitz={lipschitz!r}")
    training = model if isinstance(model, RSLMI) else None
    network = training.constrained if training else model
    chain = dense_chain(network)
    multipliers = training.multipliers() if training else None

    def current():
        result = bound(network) if bound else proven_bound(network, multipliers)
        if not isinstance(result, LipschitzResult) or result.part != "logits":
            raise ValueError(
                "`bound` must answer with the LipschitzResult of the logits, as "
                f"keras_lipnext.lmi.eclipse does. Received: {result!r}"
            )
        return result

    result = current()
    weights = chain.layers[-1].weights
    stored = [np.array(keras.ops.convert_to_numpy(w)) for w in weights]
    dtype = keras.backend.standardize_dtype(chain.layers[-1].kernel.dtype)
    spacing = 2.0**-7 if dtype == "bfloat16" else float(np.finfo(dtype).eps)
    room, factor, trained = max(spacing, 1e-7), 1.0, multipliers
    try:
        for attempt in range(ATTEMPTS):
            if result.constant <= lipschitz:
                break
            factor *= lipschitz / result.constant * (1 - min(room * 4**attempt, 0.5))
            for weight, values in zip(weights, stored):
                weight.assign(keras.ops.cast(values.astype("float64") * factor, weight.dtype))
            if trained:  # they scale like the squares of the outputs
                multipliers = [m * factor**2 for m in trained]
            result = current()
        if not result.constant <= lipschitz:
            raise ValueError(
                f"Scaling did not bring the bound below {lipschitz}: it is {result.constant}. Does "
                "`bound` depend on the last layer's weights?"
            )
    except Exception:
        for weight, values in zip(weights, stored):
            weight.assign(values)
        raise
    return result


def proven_bound(network, multipliers=None):
    """`LipschitzResult` of a chain from trained multipliers and from ECLipsE-Fast's: the better.

    Args:
        network: Built chain of Dense layers.
        multipliers: As `RSLMI.multipliers` answers.
    """

    def candidates(chain):
        yield fast(chain.weights, chain.slopes)[0]
        if multipliers and chain.fits(multipliers):
            trained = chain.to_units(multipliers)
            yield scaled_multipliers(chain.weights, chain.slopes, trained)

    return prove(network, "logits", "rs_lmi", candidates)


def scaled_multipliers(weights, slopes, multipliers):
    """The multipliers with a factor for each layer that makes the bound small; proves nothing."""
    weights = without_kernel(weights)

    def square(factors):
        p = np.eye(weights[0].shape[1])
        for w, (a, b), m, factor in zip(weights, slopes, multipliers, factors):
            if a + b == 0:  # then the complement does not depend on K, which has to be >= 0
                lowest = np.linalg.eigvalsh(p + 2 * a * b * (w.T * (m * factor)) @ w)[0]
                if not lowest >= 0:
                    return np.inf
            p = schur_complement(p, w, (a, b), m * factor, 1e-9)
            if p is None:
                return np.inf
        form = output_form(p, weights[-1])
        return np.inf if form is None else np.linalg.eigvalsh(form)[-1]

    factors = np.ones(len(multipliers))
    best = square(factors)
    for step in STEPS:
        for i in range(len(factors)):
            for direction in (step, 1 / step):
                for _ in range(LONGEST):
                    trial = factors.copy()
                    trial[i:] *= direction  # those behind have to follow
                    value = square(trial)
                    if not value < best * (1 - 1e-6):
                        break
                    factors, best = trial, value
    return [m * f for m, f in zip(multipliers, factors)]
