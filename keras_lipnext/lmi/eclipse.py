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

Reference: Xu, Sivaranjani 2024, arXiv 2404.04375. General slopes and the proof in floating point
are ours.
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


def _closed_form(p, w, slopes):
    a, b = slopes
    s = np.linalg.eigvalsh(_form(p, w))[-1]
    return np.full(len(w), 1 / (s * (b - a) * max(abs(a), abs(b))))


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
        best = np.inf
        for (m,) in found:
            m = np.maximum(m, 1e-9 * m.max())
            trial = schur_complement(p, w, interval, m, _SLACK)
            form = None if trial is None else output_form(trial, following)
            square = np.inf if form is None else np.linalg.eigvalsh(form)[-1]
            if square < best:
                best, chosen, p_chosen = square, m, trial
        if best == np.inf:
            raise _ill_conditioned()
        multipliers.append(chosen)
        p = p_chosen
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
