"""LipSDP: the best bound that slope restriction alone gives, by one semidefinite program."""

import time

import keras

from keras_lipnext.lmi._semidefinite import VARIANTS, check_time_limit, solved_multipliers
from keras_lipnext.lmi._verified import estimated_square
from keras_lipnext.lmi.eclipse import fast
from keras_lipnext.lmi.result import LipschitzResult, certifies_as, proven_bound

# A solver is exact to some 1e-8 of the rho it starts from. Where the best rho is below this share
# of it, as in deep networks, the program is scaled anew and solved again.
_CLOSE = 0.03
_ROUNDS = 8


@certifies_as("LipSDP-Neuron")
def lipsdp(
    model: keras.Model,
    variant: str = "neuron",
    part: str = "logits",
    solver: str | None = None,
    time_limit: float | None = None,
    verbose: int = 0,
) -> LipschitzResult:
    """Bound of a model's l2 Lipschitz constant by LipSDP, proven.

    Minimises rho over multipliers Lambda_i >= 0, one a hidden neuron, that make the matrix of the
    model's incremental quadratic constraints positive semidefinite; sqrt(rho) is the bound. The
    solver's answer is only a candidate: that the inequality holds is then proven in float64, for a
    rho larger by some 1e-9, relatively, or what the solver's accuracy demands (`_verified`). If it
    is too far off, blends of it with the multipliers of `eclipse_fast` prove more, or those alone.

    The variants are "neuron" and "layer" (one multiplier a layer: faster, weaker). The paper's
    third, "network", is refused: it couples neurons j, k by
    (d_j - d_k) ((v_j - v_k) - (d_j - d_k)) >= 0 for the differences v of two inputs and d of what
    the activation makes of them. That is false: take ReLU, d_j = v_j = 1 where neuron j is active,
    d_k = 0, v_k = 2 where k is not; it says -2 >= 0. What it yields is no bound
    [see also Pauli et al. 2020, arXiv 2005.02929].

    Cost: an interior-point method (Clarabel) serves neighbouring layers of up to 48 neurons
    together, in seconds; beyond, SCS is chosen, less exact, up to some hundreds, in minutes.
    `eclipse_fast` takes thousands.

    Example:

    ```python
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)]
    )
    keras_lipnext.lmi.lipsdp(network).constant
    ```

    Args:
        model: Built functional or Sequential Keras model that is a chain of affine layers and
            activations (Dense, small convolutions, Rescaling, BatchNormalization, ...).
        variant: "neuron" or "layer".
        part: "logits" for the constant from inputs to logits, "body" for what is in front of the
            head, as `certify` uses it.
        solver: Name of a solver of cvxpy: "CLARABEL" or "SCS"; None chooses by size.
        time_limit: Seconds for the solver; None for no limit.
        verbose: 1 to let the solver print.

    Returns:
        `LipschitzResult`.

    Raises:
        ValueError: naming the layer, if the model is no such chain; for an unknown solver or
            variant.
        ImportError: if cvxpy is not installed: pip install 'keras_lipnext[lmi]'.
        RuntimeError: if the solver fails or runs out of time, or float64 cannot prove the bound.

    Reference: Fazlyab et al. 2019, arXiv 1906.04893.
    """
    if variant == "network":
        raise ValueError(
            "variant='network' couples neurons by constraints that do not hold for differences of "
            "activations (arXiv 2005.02929): its number is no bound. Take variant='neuron', the "
            "tightest that is one."
        )
    if variant not in VARIANTS:
        raise ValueError(f"`variant` must be one of {VARIANTS}. Received: variant={variant!r}")
    check_time_limit(time_limit)

    def candidates(chain):
        weights, slopes = chain.weights, chain.slopes
        start = fast(weights, slopes)
        if not slopes:
            return [start[0]]  # an affine map: nothing to choose
        started, solved = time.perf_counter(), []
        for _ in range(_ROUNDS):
            left = time_limit
            if left is not None:
                left = max(left - (time.perf_counter() - started), 1e-3)
            options = {"solver": solver, "time_limit": left, "verbose": verbose}
            solved += solved_multipliers(weights, slopes, start, variant, **options)
            best = min(solved, key=lambda m: estimated_square(weights, slopes, m))
            square = estimated_square(weights, slopes, best)
            if not square < _CLOSE * start[1]:
                break
            start = best, square
        return solved

    return proven_bound(model, part, f"lipsdp-{variant}", candidates)
