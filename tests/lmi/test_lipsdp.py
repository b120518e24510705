"""LipSDP: against a dual solved by other means, its order among the bounds, and its errors."""

import builtins
import itertools

import keras
import numpy as np
import pytest
import scipy.optimize
from chains import dense_chain, largest_stretch, product_of_norms

import keras_lipnext as lip
from keras_lipnext.lmi import _semidefinite
from keras_lipnext.lmi._chain import read_chain

pytestmark = pytest.mark.once

SHAPES = [(4, 6, 3), (6, 5, 7, 2), (3, 8, 8, 8, 4)]
ACTIVATIONS = ["relu", "leaky_relu", "tanh", "sigmoid", "gelu", "selu"]


def brute_force_square(first, second, slopes, seed):
    """min over lambda of the one-hidden-layer dual, by a search without derivatives.

    With G = sum_k 2 lambda_k a b w_k w_k^T and C = diag((a + b) lambda) W_0:
    rho = lambda_max(C^T (2 Lambda - W_1^T W_1)^-1 C - G).
    """
    a, b = slopes

    def square(logarithms):
        m = np.exp(logarithms)
        middle = 2 * np.diag(m) - second.T @ second
        if np.linalg.eigvalsh(middle)[0] <= 1e-12:
            return 1e6
        coupling = (a + b) * m[:, None] * first
        form = coupling.T @ np.linalg.solve(middle, coupling)
        form -= 2 * a * b * (first.T * m) @ first
        return max(np.linalg.eigvalsh(form)[-1], 0)

    random = np.random.default_rng(seed)
    # Above half of the largest eigenvalue they are feasible.
    best = np.full(len(first), np.log(np.linalg.norm(second, 2) ** 2))
    for _ in range(6):
        found = scipy.optimize.minimize(
            square,
            best + 0.1 * random.normal(size=best.shape),
            method="Nelder-Mead",
            options={"maxiter": 4000, "xatol": 1e-8, "fatol": 1e-12, "adaptive": True},
        )
        if found.fun < square(best):
            best = found.x
    return square(best)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid"])
@pytest.mark.parametrize("seed", range(3))
def test_one_hidden_layer_agrees_with_a_brute_force_dual(activation, seed):
    model = dense_chain((4, 4, 3), activation, seed)
    chain = read_chain(model)
    found = lip.lmi.lipsdp(model).constant
    expected = np.sqrt(brute_force_square(*chain.weights, chain.slopes[0], seed))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_order_of_the_bounds_and_a_lower_bound(sizes, activation):
    model = dense_chain(sizes, activation, seed=sum(sizes))
    methods = (lip.lmi.lipsdp, lip.lmi.eclipse, lip.lmi.eclipse_fast)
    ordered = [method(model).constant for method in methods] + [product_of_norms(model)]
    for less, more in itertools.pairwise(ordered):
        assert less <= more * (1 + 1e-6)
    layer = lip.lmi.lipsdp(model, "layer").constant
    assert ordered[0] * (1 - 1e-6) <= layer <= ordered[2] * (1 + 1e-6)
    assert largest_stretch(read_chain(model)) <= ordered[0] * (1 + 1e-6)


def test_it_is_tight_where_the_constant_is_known():
    """Nested orthogonal maps and ReLU: exactly 1, where all neurons are active."""
    model = keras.Sequential([keras.Input((5,))])
    for seed in range(3):
        model.add(lip.layers.OrthogonalDense(5, activation="relu" if seed < 2 else None))
    assert lip.lmi.lipsdp(model).constant == pytest.approx(1, abs=1e-5)
    affine = dense_chain((5, 3))
    norm = np.linalg.norm(affine.layers[0].kernel.numpy(), 2)
    assert norm <= lip.lmi.lipsdp(affine).constant <= norm * (1 + 1e-9)


def test_scaling_layers_scales_the_bound():
    models = [dense_chain((4, 6, 5, 3), seed=2) for _ in range(2)]
    for layer, factor in zip(models[1].layers, (2.0**40, 2.0**-60, 4.0)):
        layer.kernel.assign(layer.kernel * factor)
    first, second = (lip.lmi.lipsdp(model).constant for model in models)
    assert second == first * 2.0**-18


@pytest.mark.slow
def test_deep_networks_where_the_best_rho_is_far_below_the_first():
    model = dense_chain((6,) * 41, seed=1)
    lipsdp, eclipse = lip.lmi.lipsdp(model).constant, lip.lmi.eclipse(model).constant
    assert lipsdp < 0.3 * eclipse < 0.3 * lip.lmi.eclipse_fast(model).constant
    assert largest_stretch(read_chain(model), samples=300, rounds=10) <= lipsdp


def test_dead_neurons():
    model = dense_chain((4, 6, 5, 3), seed=2)
    kernel = model.layers[1].kernel.numpy()
    kernel[2], kernel[:, 1] = 0, 0  # nobody reads neuron 2; neuron 1 of the next reads nothing
    model.layers[1].kernel.assign(kernel)
    chain = read_chain(model)
    for method in (lip.lmi.lipsdp, lip.lmi.eclipse, lip.lmi.eclipse_fast):
        constant = method(model).constant
        assert largest_stretch(chain) <= constant <= product_of_norms(model) * (1 + 1e-9)


def test_scs_agrees_with_clarabel():
    model = dense_chain((5, 8, 8, 3), seed=3)
    exact = lip.lmi.lipsdp(model, solver="clarabel").constant
    assert exact * (1 - 1e-9) <= lip.lmi.lipsdp(model, solver="SCS").constant <= exact * 1.01


def test_the_result_says_what_it_is():
    model = dense_chain((4, 6, 3))
    result = lip.lmi.lipsdp(model)
    assert (result.method, result.status, result.part) == ("lipsdp-neuron", "verified", "logits")
    assert result.seconds > 0 and [m.shape for m in result.multipliers] == [(6,)]
    assert (result.multipliers[0] > 0).all()
    body = lip.lmi.lipsdp(model, "layer", part="body")
    assert body.method == "lipsdp-layer" and body.part == "body"
    norm = np.linalg.norm(model.layers[0].kernel.numpy(), 2)
    assert norm <= body.constant <= norm * (1 + 1e-6)


def test_coupled_neurons_are_refused_for_a_reason():
    """The constraint between two neurons that LipSDP-Network assumes, at the docstring's values."""
    x, y = np.array([1.0, -1.0]), np.array([0.0, -3.0])
    v, d = x - y, np.maximum(x, 0) - np.maximum(y, 0)
    assert (d[0] - d[1]) * ((v[0] - v[1]) - (d[0] - d[1])) == -2
    with pytest.raises(ValueError, match=r"no bound.*'neuron'"):
        lip.lmi.lipsdp(dense_chain((4, 6, 3)), variant="network")
    with pytest.raises(ValueError, match="variant='pairs'"):
        lip.lmi.lipsdp(dense_chain((4, 6, 3)), variant="pairs")


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS"])
def test_a_solver_out_of_time_gives_no_number(solver):
    model = dense_chain((30, 30, 30, 30, 10))
    with pytest.raises(RuntimeError, match="eclipse_fast"):
        lip.lmi.lipsdp(model, solver=solver, time_limit=0.01)
    with pytest.raises(RuntimeError, match=r"out of time.*eclipse_fast"):
        lip.lmi.eclipse(model, solver=solver, time_limit=0.01)


def test_bad_arguments_of_the_solver():
    model = dense_chain((4, 6, 3))
    with pytest.raises(ValueError, match="solver='nobody'"):
        lip.lmi.lipsdp(model, solver="nobody")
    for method in (lip.lmi.lipsdp, lip.lmi.eclipse):
        with pytest.raises(ValueError, match=r"`time_limit` must be positive.*time_limit=-1"):
            method(model, time_limit=-1)
        with pytest.raises(ValueError, match=r"`time_limit` must be a number.*time_limit='5'"):
            method(model, time_limit="5")


def test_a_missing_solver_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_cvxpy(name, *arguments, **options):
        if name.split(".")[0] == "cvxpy":
            raise ImportError("No module named 'cvxpy'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_cvxpy)
    model = dense_chain((4, 6, 3))
    for method in (lip.lmi.lipsdp, lip.lmi.eclipse):
        with pytest.raises(ImportError, match=r"pip install 'keras_lipnext\[lmi\]'.*eclipse_fast"):
            method(model)
    assert lip.lmi.eclipse_fast(model).constant > 0


def test_a_failing_solver_gives_no_number(monkeypatch):
    import cvxpy

    model = dense_chain((4, 6, 3))

    def fails(self, *arguments, **options):
        raise cvxpy.SolverError("it broke.")

    with monkeypatch.context() as patched:
        patched.setattr(cvxpy.Problem, "solve", fails)
        with pytest.raises(RuntimeError, match=r"CLARABEL failed: it broke.*eclipse_fast"):
            lip.lmi.lipsdp(model)
    with monkeypatch.context() as patched:
        patched.setattr(cvxpy.Problem, "solve", lambda self, *a, **k: None)
        with pytest.raises(RuntimeError, match="no multipliers"):
            lip.lmi.lipsdp(model)


@pytest.mark.parametrize("lie", [1e-3, 1e3, -1.0, 0.0])
def test_a_lying_solver_gives_a_bound_nevertheless(monkeypatch, lie):
    """Multipliers that are wrong by orders, and a rho far too small: what is proven is a bound."""
    solve = _semidefinite._solve

    def lies(*arguments, **options):
        found, rho = solve(*arguments, **options)
        return found * lie, rho * 1e-6

    monkeypatch.setattr(_semidefinite, "_solve", lies)
    model = dense_chain((4, 6, 6, 3))
    constant = lip.lmi.lipsdp(model).constant
    assert constant >= largest_stretch(read_chain(model))
    assert constant <= lip.lmi.eclipse_fast(model).constant * (1 + 1e-6)
