"""ECLipsE: the inequality of LipSDP, layer by layer, by small programs or in closed form.

The multipliers are chosen one layer after the other. Given P_{i-1} (`_verified`: what measures
x_{i-1} without growing), with S = W_i P_{i-1}^{-1} W_i^T,

    P_i = 2 Lambda - (a + b)^2 Lambda (S^{-1} + 2 a b Lambda)^{-1} Lambda

ought to be as large as can be. ECLipsE-Fast takes Lambda = lambda I. On an eigenvector of S with
eigenvalue s, P_i is lambda (2 - lambda s (b - a)^2) / (1 + 2 lambda s a b), which falls with s. At
the largest one, s = ||S||, it is itself largest for

    lambda = 1 / (s (b - a) max(|a|, |b|)),   and there P_i = 1 / (s max(|a|, |b|)^2),

so that the bound is never above the product of the norms. For slopes in [0, 1] that is the paper's
lambda = 2 / s, halved since its inequality has Lambda where ours has 2 Lambda. ECLipsE chooses
Lambda diagonal, such that P_i >= c W_{i+1}^T W_{i+1} with c as large as can be: that is LipSDP for
the network of one hidden layer with weights W_i P_{i-1}^{-1/2} and W_{i+1}.

Neurons may be measured in units of their own: for any diagonal D > 0 the same choice, for
D^{-1/2} S D^{-1/2} in place of S, is

    Lambda = D^{-1} / (s_D (b - a) max(|a|, |b|)),   s_D = ||D^{-1/2} S D^{-1/2}||,

and proves P_i >= D^{-1} / (s_D max(|a|, |b|)^2). D = I is ECLipsE-Fast. Any diagonal T >= S, as
the row sums T_jj = sum_k |S_jk| q_k / q_j of Gershgorin's theorem for any q > 0, has s_T <= 1: the
choice Lambda = T^{-1} for slopes in [0, 1] is contained, and improved by the factor s_T. The next
layer sees W_{i+1} P_i^{-1} W_{i+1}^T, of norm s_D ||W_{i+1} D^{1/2}||^2 max(|a|, |b|)^2 at most: D
balances the two factors neuron by neuron if D_jj^2 = S_jj / R_jj, R = W_{i+1}^T W_{i+1}.

Reference: Xu, Sivaranjani 2024, arXiv 2404.04375. General slopes, the units D and the proof in
floating point are ours. Syed, Hu 2025, arXiv 2503.14297, say in their abstract that other feasible
points of LipSDP in closed form contain ECLipsE-Fast and improve on it; their formulas were not at
hand, so that this family is our own answer to the same question, and theirs may differ.
"""

import time

import keras
import numpy as np

from keras_lipnext.lmi._semidefinite import check_time_limit, solved_multipliers
from keras_lipnext.lmi._verified import output_form, schur_complement, without_kernel
from keras_lipnext.lmi.result import LipschitzResult, certifies_as, proven_bound

# Room to stay positive definite in: the proof takes its own.
_SLACK = 2.0**-40


@certifies_as("ECLipsE-Fast")
def eclipse_fast(model: keras.Model, part: str = "logits") -> LipschitzResult:
    """Bound of a model's l2 Lipschitz constant by ECLipsE-Fast, proven. NumPy only.

    Never above the product of the layers' norms, but for rounding. A layer of width n takes some
    30 n^3 operations: 100 layers of 80 neurons half a second, one of 1000 neurons a few.

    Example:

    ```python
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)]
    )
    keras_lipnext.lmi.eclipse_fast(network).constant
    ```

    Args:
        model: Built functional or Sequential Keras model that is a chain of affine layers and
            activations (Dense, small convolutions, Rescaling, BatchNormalization, ...).
        part: "logits" for the constant from inputs to logits, "body" for what is in front of the
            head, as `certify` uses it.

    Returns:
        `LipschitzResult`.

    Raises:
        ValueError: naming the layer, if the model is no such chain.
        RuntimeError: if float64 cannot prove it.

    Reference: Xu, Sivaranjani 2024, arXiv 2404.04375.
    """
    return proven_bound(
        model, part, "eclipse_fast", lambda chain: [fast(chain.weights, chain.slopes)[0]]
    )


@certifies_as("ECLipsE-Diagonal")
def eclipse_diagonal(model: keras.Model, part: str = "logits") -> LipschitzResult:
    """Bound of a model's l2 Lipschitz constant in closed form, neurons in units of their own.

    ECLipsE-Fast with a multiplier a neuron: of three diagonal scalings, derived in this file, each
    layer takes the one that leaves the next layer least. It is greedy, so `eclipse_fast` is tried
    too, and the better of the two is the answer. NumPy only; some four times its cost.

    Args, Returns, Raises: as `eclipse_fast`.

    Reference: ours, after Xu, Sivaranjani 2024, arXiv 2404.04375. Syed, Hu 2025, arXiv 2503.14297,
    announce bounds with the same properties; their formulas may differ.

    Example:

    ```python
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)]
    )
    keras_lipnext.lmi.eclipse_diagonal(network).constant
    ```
    """

    def candidates(chain):
        read = chain.weights, chain.slopes
        yield min((fast(*read), scaled(*read)), key=lambda found: found[1])[0]

    return proven_bound(model, part, "eclipse_diagonal", candidates)


@certifies_as("ECLipsE")
def eclipse(
    model: keras.Model,
    part: str = "logits",
    solver: str | None = None,
    time_limit: float | None = None,
    verbose: int = 0,
) -> LipschitzResult:
    """Bound of a model's l2 Lipschitz constant by ECLipsE, one program a layer, proven.

    It is greedy: each program makes the most of its own layer, with the closed form of
    `eclipse_fast` to fall back on, and in theory that can come out ahead over all layers. So it is
    tried too, and the better of the two is the answer.

    Example:

    ```python
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)]
    )
    keras_lipnext.lmi.eclipse(network).constant
    ```

    Args:
        model, part: As for `eclipse_fast`.
        solver: Name of a solver of cvxpy: "CLARABEL" or "SCS"; None chooses by size.
        time_limit: Seconds for all programs together; None for no limit.
        verbose: 1 to let the solver print.

    Returns:
        `LipschitzResult`.

    Raises:
        ValueError: naming the layer, if the model is no such chain; for an unknown solver.
        ImportError: if cvxpy is not installed: pip install 'keras_lipnext[lmi]'.
        RuntimeError: if the solver fails or runs out of time, or float64 cannot prove the bound.

    Reference: Xu, Sivaranjani 2024, arXiv 2404.04375.
    """

    check_time_limit(time_limit)

    def candidates(chain):
        read = chain.weights, chain.slopes
        yield _greedy(*read, solver=solver, time_limit=time_limit, verbose=verbose)
        yield fast(*read)[0]

    return proven_bound(model, part, "eclipse", candidates)


def fast(weights, slopes):
    """(multipliers, rho) of ECLipsE-Fast, not proven: lists of vectors, and the bound's square."""
    weights = without_kernel(weights)
    p, multipliers = np.eye(weights[0].shape[1]), []
    for w, interval in zip(weights, slopes):
        m = _closed_form(p, w, interval)
        multipliers.append(m)
        p = schur_complement(p, w, interval, m, _SLACK)
        if p is None:
            raise _ill_conditioned()
    return multipliers, np.linalg.eigvalsh(_form(p, weights[-1]))[-1]


def _closed_form(p, w, slopes, scale=1.0):
    """Lambda, for D of the diagonal `scale`."""
    a, b = slopes
    s = np.linalg.eigvalsh(_form(p, w / np.sqrt(np.broadcast_to(scale, len(w)))[:, None]))[-1]
    return np.full(len(w), 1 / (s * (b - a) * max(abs(a), abs(b)))) / scale


# D_jj = S_jj^x / R_jj^y: ECLipsE-Fast; the balance of a layer with the next; all given to the next.
_POWERS = ((0.0, 0.0), (0.5, 0.5), (0.5, 1.0))


def scaled(weights, slopes):
    """As `fast`, with the best of some scalings D in each layer, one layer after the other."""
    weights = without_kernel(weights)
    p, multipliers = np.eye(weights[0].shape[1]), []
    square = np.linalg.eigvalsh(_form(p, weights[0]))[-1]
    for w, following, interval in zip(weights, weights[1:], slopes):
        inner = _floored(_squares(p, w))
        outer = _floored((following**2).sum(axis=0))
        candidates = (_closed_form(p, w, interval, inner**x / outer**y) for x, y in _POWERS)
        chosen, p, square = _best(p, w, following, interval, candidates)
        multipliers.append(chosen)
    return multipliers, square


def _best(p, w, following, interval, candidates):
    """(multipliers of a layer, the P that they lead to, the square of the bound) for the best."""
    best = np.inf
    for m in candidates:
        trial = schur_complement(p, w, interval, m, _SLACK)
        form = None if trial is None else output_form(trial, following)
        square = np.inf if form is None else np.linalg.eigvalsh(form)[-1]
        if square < best:
            best, chosen, p_chosen = square, m, trial
    if best == np.inf:
        raise _ill_conditioned()
    return chosen, p_chosen, best


def _squares(p, w):
    """The diagonal of W P^-1 W^T."""
    try:
        return (np.linalg.solve(np.linalg.cholesky(p), w.T) ** 2).sum(axis=0)
    except np.linalg.LinAlgError as error:
        raise _ill_conditioned() from error


def _floored(values):
    """Values >= 0, none below a millionth of the largest: a scaling, and no division by zero."""
    return np.maximum(values, 1e-6 * values.max()) if values.max() > 0 else np.ones(len(values))


def _greedy(weights, slopes, time_limit=None, **options):
    p, multipliers = np.eye(weights[0].shape[1]), []
    started = time.perf_counter()
    for w, following, interval in zip(weights, weights[1:], slopes):
        left = None
        if time_limit is not None:
            left = max(time_limit - (time.perf_counter() - started), 1e-3)
        # W P^{-1/2}, up to a rotation of what it reads.
        whitened = np.linalg.solve(np.linalg.cholesky(p), w.T).T
        start = fast([whitened, following], [interval])
        found = solved_multipliers(
            [whitened, following], [interval], start, time_limit=left, **options
        )
        candidates = (np.maximum(m, 1e-9 * m.max()) for (m,) in found)
        chosen, p, _ = _best(p, w, following, interval, candidates)
        multipliers.append(chosen)
    return multipliers


def _form(p, w):
    form = output_form(p, w)
    if form is None:
        raise _ill_conditioned()
    return form


def _ill_conditioned():
    return RuntimeError(
        "ECLipsE met a matrix that is not positive definite in float64. "
        "keras_lipnext.lipschitz_bound multiplies the norms of the layers instead "
        "(lipschitz='product')."
    )
