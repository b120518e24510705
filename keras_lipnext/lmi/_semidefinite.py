"""Multipliers of LipSDP by a semidefinite program. What a solver answers is a candidate only.

    minimise rho   subject to   M(rho, Lambda) >= 0,  Lambda_i >= 0 diagonal,

with M block tridiagonal on (x_0, ..., x_{l-1}): rho I in its first block, -W_l^T W_l in its last,
and for each hidden neuron, of weights w and slopes in [a, b], lambda times the form

    2 x_i^2 - 2 (a + b) x_i (w . x_{i-1}) + 2 a b (w . x_{i-1})^2.

[Fazlyab et al. 2019, arXiv 1906.04893, Theorem 2; the general slopes as in `_verified`.]
"""

import time
import warnings

import numpy as np

from keras_lipnext.arguments import number
from keras_lipnext.installation import installing

VARIANTS = ("neuron", "layer")

# Of the solver's answer in the candidates; the rest is of the point that is known to be feasible.
SHARES = (1.0, 1 - 1e-4, 1 - 1e-3, 0.99, 0.9, 0.5, 0.0)

# Clarabel factorises a matrix as large as the triangle of a block is: beyond this side, SCS.
_CLARABEL_SIDE = 48
_OTHERS = "keras_lipnext.lmi.eclipse_fast, which needs no solver, bounds the same model"


def check_time_limit(time_limit):
    """Raises unless it is None or a positive number of seconds."""
    if time_limit is not None and not 0 < number("time_limit", time_limit) < np.inf:
        raise ValueError(f"`time_limit` must be positive. Received: time_limit={time_limit}")


def solved_multipliers(weights, slopes, start, variant="neuron", **options):
    """Diagonals of Lambda_i / rho, as `_verified` takes them, near the best: several candidates.

    The feasible (rho, Lambda) are a convex set with `start` inside. So what the solver answers, at
    the set's edge and not exactly in it, is followed by points on the way back to `start`.

    Args:
        weights: List of float64 matrices W_i, shape (outputs, inputs).
        slopes: List of (a_i, b_i), one fewer.
        start: (multipliers, rho) that are feasible: they set the scales, so that the solver works
            on numbers near 1.
        variant: "neuron" for one multiplier a neuron, "layer" for one a layer.
        options: `solver`, `time_limit`, `verbose`.

    Returns:
        List of lists of vectors; the last one is that of `start`.

    Raises:
        ImportError: if cvxpy is not installed.
        ValueError: for a solver that is not installed, or has no time limit.
        RuntimeError: if the solver fails or runs out of time.
    """
    multipliers, rho = start
    sides = [1.0, *(1 / np.sqrt(m) for m in multipliers)]  # x_i in units of these
    weights = _compressed(weights)
    scaled = [w / n[:, None] * m for w, n, m in zip(weights, sides[1:], sides)]
    last = weights[-1] * sides[-1] / np.sqrt(rho)
    forms, groups = _forms(scaled, slopes, last.shape[1])
    widest = max((sum(w.shape) for w in scaled), default=0)
    groups = groups if variant == "layer" else None
    found, objective = _solve(forms, groups, last, widest, **options)
    start, objective = np.concatenate(multipliers), objective * rho
    ends = np.cumsum([len(m) for m in multipliers])[:-1]
    answers = []
    for share in SHARES:
        blend = share * rho * found * start + (1 - share) * rho * start
        answers.append(np.split(blend / (share * objective + (1 - share) * rho), ends))
    return answers


def _compressed(weights):
    """The same problem with fewer inputs and outputs: W_1 = R^T Q^T, and W_l = Q R likewise."""
    weights = list(weights)
    if weights[0].shape[1] > len(weights[0]):
        weights[0] = np.linalg.qr(weights[0].T, mode="r").T
    if len(weights[-1]) > weights[-1].shape[1]:
        weights[-1] = np.linalg.qr(weights[-1], mode="r")
    return weights


def _forms(weights, slopes, last):
    """(list of forms as sparse (rows, columns, values), layer of each); the first is rho's."""
    offsets = np.cumsum([0, *(w.shape[1] for w in weights), last])
    first = np.arange(offsets[1])
    forms, layers = [(first, first, np.ones(len(first)))], []
    for i, (w, (a, b)) in enumerate(zip(weights, slopes)):
        before = np.arange(offsets[i], offsets[i + 1])
        for k, row in enumerate(w):
            own = np.full(len(row), offsets[i + 1] + k)
            rows = [own[:1], own, before]
            columns = [own[:1], before, own]
            values = [np.full(1, 2.0), -(a + b) * row, -(a + b) * row]
            if a * b:
                rows.append(np.repeat(before, len(row)))
                columns.append(np.tile(before, len(row)))
                values.append(2 * a * b * np.outer(row, row).ravel())
            forms.append(tuple(map(np.concatenate, (rows, columns, values))))
            layers.append(i)
    return forms, np.array(layers, int)


def _solve(forms, groups, last, widest, solver=None, time_limit=None, verbose=0):
    """(multipliers, rho) of the program."""
    cvxpy = _cvxpy()
    from scipy import sparse  # cvxpy brings it

    outputs = last.shape[1]
    side = 1 + max(max(rows.max(), columns.max()) for rows, columns, _ in forms)
    table = sparse.hstack(
        [
            sparse.coo_array((values, (rows * side + columns, np.zeros_like(rows))), (side**2, 1))
            for rows, columns, values in forms
        ],
        "csr",
    )
    if groups is not None:  # one multiplier a layer
        count = groups.max() + 1
        pick = sparse.coo_array((np.ones(len(groups)), (np.arange(len(groups)), groups)))
        table = table @ sparse.block_diag([sparse.eye_array(1), pick], "csr")
    else:
        count = len(forms) - 1
    constant = np.zeros((side, side))
    constant[side - outputs :, side - outputs :] = -last.T @ last
    variable = cvxpy.Variable(1 + count, nonneg=True)
    matrix = cvxpy.reshape(table @ variable + constant.ravel(), (side, side), order="C")
    problem = cvxpy.Problem(cvxpy.Minimize(variable[0]), [matrix >> 0])
    name, settings = _solver(cvxpy, solver, widest, time_limit)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # "Solution may be inaccurate": it is a candidate, and what follows is proven.
            warnings.simplefilter("ignore")
            problem.solve(solver=name, verbose=bool(verbose), **settings)
    except cvxpy.SolverError as error:
        raise RuntimeError(f"The solver {name} failed: {error} {_OTHERS}.") from error
    status, found = problem.status, variable.value
    # SCS calls its answer inaccurate when it was interrupted.
    late = time_limit is not None and time.perf_counter() - started >= time_limit
    if late and status == "optimal_inaccurate":
        status = "user_limit"
    if status not in ("optimal", "optimal_inaccurate") or found is None:
        reason = "ran out of time" if status == "user_limit" else f"ended as '{status}'"
        raise RuntimeError(
            f"The solver {name} {reason}"
            f"{'' if time_limit is None else f' (time_limit={time_limit} s)'}: no multipliers, so "
            f"no bound. Allow more time, or another solver; {_OTHERS}."
        )
    if not (np.isfinite(found).all() and found[0] > 0):
        raise RuntimeError(f"The solver {name} answered with rho={found[0]}. {_OTHERS}.")
    return (found[1:] if groups is None else found[1:][groups]), found[0]


def _cvxpy():
    try:
        import cvxpy
    except ImportError as error:
        raise ImportError(
            f"Semidefinite programs need cvxpy: {installing('lmi')}. {_OTHERS}."
        ) from error
    return cvxpy


def _solver(cvxpy, solver, side, time_limit):
    """(name, settings) of the solver to use."""
    installed = cvxpy.installed_solvers()
    if solver is None:
        order = ("CLARABEL", "SCS") if side <= _CLARABEL_SIDE else ("SCS", "CLARABEL")
        name = next((n for n in order if n in installed), None)
        if name is None:
            raise ImportError(f"No solver is installed: {installing('lmi')}.")
    else:
        name = str(solver).upper()
        if name not in installed:
            raise ValueError(f"`solver` must be one of {installed}. Received: solver={solver!r}")
    limits = {"CLARABEL": "time_limit", "SCS": "time_limit_secs"}
    settings = {"eps": 1e-6, "max_iters": 5000} if name == "SCS" else {}
    if time_limit is not None:
        if name not in limits:
            raise ValueError(
                "`time_limit` is for CLARABEL and SCS. Received: "
                f"time_limit={time_limit}, solver={name}"
            )
        settings[limits[name]] = float(time_limit)
    return name, settings
