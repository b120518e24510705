import functools

import accelerated
import keras
import numpy as np
import pytest
from data import stepping, to_numpy
from optimizers.reference import NumpyAdam, NumpyMuon, Reference, polar

from keras_lipnext import backend
from keras_lipnext.layers import NormalizedDense, OrthogonalDense
from keras_lipnext.manifolds import RandomStiefel, Stiefel, stiefel
from keras_lipnext.optimizers import ManifoldAdam, ManifoldMuon, manifold_optimizer

# Two of a kind, so that stacks have more than one member.
SHAPES = [(6, 6), (8, 3), (3, 8), (6, 6), (5,), (5,)]
MATRICES = 4
OPTIMIZERS = {"adam": ManifoldAdam, "muon": ManifoldMuon}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
DIRECTIONS = {ManifoldAdam: NumpyAdam, ManifoldMuon: NumpyMuon}


def make_variables(dtype="float64"):
    """One variable of each shape; matrices on the manifold, the vector off it."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in SHAPES]
    values = [polar(v) if v.ndim == 2 else v for v in values]
    variables = [keras.Variable(v, dtype=dtype) for v in values]
    for variable in variables[:MATRICES]:
        variable.constraint = Stiefel()
    return variables


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return [rng.normal(size=shape) for shape in SHAPES]


def train(optimizer, variables, steps, first=0):
    for step in range(first, first + steps):
        grads = [
            keras.ops.convert_to_tensor(g, dtype=v.dtype)
            for g, v in zip(gradients(step), variables)
        ]
        optimizer.apply(grads, variables)


def small_model(units=12, kinds=3):
    """Square, tall and wide kernels, or fewer kinds; biases and a head."""
    x = inputs = keras.Input((units,))
    for size, activation in ((units, "relu"), (units + 4, "tanh"), (units - 4, None))[:kinds]:
        x = OrthogonalDense(size, activation=activation)(x)
    return keras.Model(inputs, NormalizedDense(3)(x))


def regression_data(units=12, n=64):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, units)).astype("float32")
    return x, np.tanh(x[:, :3])


def kernels(model):
    return [w for w in model.trainable_weights if isinstance(w.constraint, Stiefel)]


def assert_on_manifold(model, tolerance=2e-6, kinds=3):
    assert len(kernels(model)) == kinds
    for kernel in kernels(model):
        assert float(stiefel.defect(kernel)) < tolerance


def references(make, variables, rate, euclidean_rate=None):
    """The formulas' optimizer of each variable."""
    manifold = DIRECTIONS[make]
    return [
        Reference(to_numpy(v), rate, manifold)
        if len(v.shape) == 2
        else Reference(to_numpy(v), euclidean_rate or rate, NumpyAdam, manifold=False)
        for v in variables
    ]


@pytest.mark.parametrize("make", DIRECTIONS)
@pytest.mark.parametrize("euclidean_rate", [None, 0.5])
def test_equals_the_formulas(make, euclidean_rate):
    with backend.float64_scope():
        variables = make_variables()
        expected = references(make, variables, 0.05, euclidean_rate)
        optimizer = make(0.05, euclidean_learning_rate=euclidean_rate)
        for step in range(12):
            train(optimizer, variables, 1, first=step)
            for reference, gradient, variable in zip(expected, gradients(step), variables):
                reference.step(gradient)
                # Keras holds rates, and TensorFlow casts betas, as float32.
                tolerance = 5e-6 * max(1, 20 * (euclidean_rate or 0))
                np.testing.assert_allclose(to_numpy(variable), reference.x, atol=tolerance)


@every_optimizer
def test_stacks_step_like_single_variables(make):
    """Among others of its kind, in stacks or alone: the same variable takes the same step."""
    together, alone = make_variables("float32"), make_variables("float32")
    optimizers = [make(0.05, lookahead_period=2) for _ in alone]
    whole = make(0.05, lookahead_period=2)
    for step in range(4):
        train(whole, together, 1, first=step)
        for optimizer, variable, gradient in zip(optimizers, alone, gradients(step)):
            optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")], [variable])
    for a, b in zip(together, alone):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=2e-6)


@every_optimizer
def test_the_work_does_not_grow_with_the_depth(make, monkeypatch):
    """Equal variables take one step, however many they are; constraints are not called."""
    optimizer, calls = make(0.05), []
    monkeypatch.setattr(Stiefel, "__call__", lambda self, w: calls.append("projection") or w)
    real = type(optimizer).manifold_step
    monkeypatch.setattr(
        type(optimizer),
        "manifold_step",
        lambda self, x, *a: calls.append(x.shape) or real(self, x, *a),
    )
    variables = [v for _ in range(20) for v in make_variables("float32")[:2]]
    optimizer.apply([keras.ops.ones(v.shape) for v in variables], variables)
    assert [tuple(c) for c in calls] == [(20, 6, 6), (20, 8, 3)]


@every_optimizer
def test_variables_that_skip_steps_do_not_drift(make):
    """Gradients in turn: one of them never meets a multiple of the projections' period."""
    variables = [keras.Variable(RandomStiefel(i)((32, 32))) for i in range(2)]
    for variable in variables:
        variable.constraint = Stiefel()
    optimizer, rng = make(0.02), np.random.default_rng(0)
    optimizer.build(variables)
    turns = [stepping(optimizer, [variable]) for variable in variables]
    for step in range(400):
        turns[step % 2]([rng.normal(size=(32, 32)).astype("float32")])
    for variable in variables:
        assert float(stiefel.defect(variable)) < (2e-6 if accelerated.ON_CPU else 3e-5)


@accelerated.of_cpus("accelerators look at a sixteenth of the rows a step")
@every_optimizer
def test_weights_that_were_set_come_back_with_the_next_step(make):
    variables = make_variables("float32")
    optimizer = make(0.01)
    train(optimizer, variables, 2)
    for variable in variables[:MATRICES]:
        variable.assign(1.001 * variable)
    train(optimizer, variables, 1, first=2)
    for variable in variables[:MATRICES]:
        assert float(stiefel.defect(variable)) < 2e-6


@every_optimizer
def test_training_ends_on_the_manifold(make):
    x, y = regression_data()
    model = small_model()
    model.compile(make(1e-2), loss="mse")
    model.fit(x[:48], y[:48], batch_size=16, verbose=0)
    assert_on_manifold(model, 8e-7)


@every_optimizer
def test_lookahead_starts_with_a_variables_first_step(make):
    variables = [keras.Variable(np.ones(3, "float32")) for _ in range(2)]
    optimizer = make(1e-4, lookahead_period=2)
    optimizer.build(variables)
    for first in (1, 0, 0, 0):
        optimizer.apply([keras.ops.ones(3)] * (2 - first), variables[first:])
    np.testing.assert_allclose(to_numpy(variables[0]), 1, atol=1e-2)


@every_optimizer
def test_vectors_have_no_manifold(make):
    variable = keras.Variable(np.ones(3, "float32"))
    variable.constraint = Stiefel()
    with pytest.raises(ValueError, match=r"marks matrices.* Received: variable .*shape \(3,\)"):
        make(0.1).build([variable])


@every_optimizer
def test_constraints_set_later_are_kerass_business(make):
    """Keras projects what the optimizer was not built to keep on the manifold."""
    variable = keras.Variable(RandomStiefel(0)((6, 6)))
    optimizer = make(0.1)
    optimizer.build([variable])
    variable.constraint = Stiefel()
    optimizer.apply([keras.ops.ones((6, 6))], [variable])
    assert float(stiefel.defect(variable)) < 2e-6


@every_optimizer
def test_nothing_to_apply(make):
    optimizer, variables = make(0.1), make_variables("float32")
    before = to_numpy(variables[0]).copy()
    optimizer.apply([], [])
    train(optimizer, variables, 1)
    assert int(optimizer.iterations) == 1
    assert np.abs(to_numpy(variables[0]) - before).max() > 1e-3


@every_optimizer
def test_constraints_stay_where_they_are_during_a_step(make, monkeypatch):
    """Another thread may save the model, or train it, meanwhile."""
    variables, seen = make_variables("float32"), []
    real = make.manifold_step

    def step(*arguments):
        seen.extend(v.constraint for v in variables[:MATRICES])
        return real(*arguments)

    monkeypatch.setattr(make, "manifold_step", step)
    train(make(0.05), variables, 1)
    assert seen and all(isinstance(constraint, Stiefel) for constraint in seen)
    with pytest.raises(Exception, match=r"."):
        make(0.05).apply([keras.ops.ones((2, 2))] * len(variables), variables)
    assert all(isinstance(v.constraint, Stiefel) for v in variables[:MATRICES])


@every_optimizer
def test_large_stacks_are_divided(make, monkeypatch):
    whole, divided = make_variables("float32"), make_variables("float32")
    train(make(0.05), whole, 3)
    monkeypatch.setattr(manifold_optimizer, "STACK_ENTRIES", 40)
    train(make(0.05), divided, 3)
    for a, b in zip(whole, divided):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=1e-6)


@every_optimizer
def test_other_variables_take_kerass_adam(make):
    start = np.array([1.0, -2.0, 3.0], "float32")
    ours, theirs = keras.Variable(start), keras.Variable(start)
    for optimizer, variable in ((make(0.1), ours), (keras.optimizers.Adam(0.1), theirs)):
        for step in range(5):
            g = np.random.default_rng(step).normal(size=3).astype("float32")
            optimizer.apply([keras.ops.convert_to_tensor(g)], [variable])
    # PyTorch fuses Keras' steps, which rounds differently.
    np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=3e-7)


@every_optimizer
def test_other_constraints_are_kept(make):
    variable = keras.Variable(np.array([0.1, 2.0], "float32"))
    variable.constraint = keras.constraints.NonNeg()
    optimizer = make(0.5, lookahead_period=2)
    for _ in range(4):
        optimizer.apply([keras.ops.ones(2)], [variable])
    assert to_numpy(variable)[0] == 0
    assert 0 < to_numpy(variable)[1] < 2


@every_optimizer
def test_embeddings_train(make):
    """Their gradients are sparse on TensorFlow."""
    model = keras.Sequential([keras.layers.Embedding(5, 3), keras.layers.Flatten()])
    model.compile(make(0.1), loss="mse")
    x, y = np.array([[0], [3]]), np.ones((2, 3))
    first = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=10, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.5 * first


@every_optimizer
def test_euclidean_learning_rate_schedule(make):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.0])
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer = make(0.1, euclidean_learning_rate=schedule)
    values = []
    for _ in range(4):
        optimizer.apply([keras.ops.ones(2)], [variable])
        values.append(to_numpy(variable).copy())
    np.testing.assert_allclose(values[1], -1.0, atol=1e-4)
    np.testing.assert_array_equal(values[3], values[1])


@pytest.mark.parametrize("make", DIRECTIONS)
def test_lookahead_equals_the_formulas(make):
    """Every third step: slow <- slow + 0.5 (fast - slow), projected on the manifold."""
    with backend.float64_scope():
        variables = make_variables()
        fast = references(make, variables, 0.05)
        slow = [f.x.copy() for f in fast]
        optimizer = make(0.05, lookahead_period=3)
        for step in range(8):
            train(optimizer, variables, 1, first=step)
            for i, (reference, gradient) in enumerate(zip(fast, gradients(step))):
                reference.step(gradient)
                if (step + 1) % 3 == 0:
                    middle = slow[i] + 0.5 * (reference.x - slow[i])
                    slow[i] = polar(middle) if middle.ndim == 2 else middle
                    reference.x = slow[i].copy()
                np.testing.assert_allclose(to_numpy(variables[i]), reference.x, atol=5e-6)


def test_lookahead_midpoint_is_the_geodesics():
    """On O(n): polar((A + B) / 2) = A exp(log(A^T B) / 2)."""
    import scipy.linalg

    a = polar(np.random.default_rng(0).normal(size=(6, 6)))
    d = np.random.default_rng(1).normal(size=(6, 6))
    d = 0.2 * (d - d.T)
    b = a @ scipy.linalg.expm(d)
    np.testing.assert_allclose(polar((a + b) / 2), a @ scipy.linalg.expm(d / 2), atol=1e-13)


def drifted(make, steps, size):
    """Kernels after steps along noise, and where they began."""
    shapes = [(size, size), (size, size // 2), (size // 4, size)]
    variables = [keras.Variable(RandomStiefel(i)(shape)) for i, shape in enumerate(shapes)]
    for variable in variables:
        variable.constraint = Stiefel()
    before = [to_numpy(v).copy() for v in variables]
    optimizer, rng = make(0.01), np.random.default_rng(0)
    apply = stepping(optimizer, variables)
    for _ in range(steps):
        apply([rng.normal(size=shape).astype("float32") for shape in shapes])
    assert int(optimizer.iterations) == steps
    return optimizer, variables, before


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        *OPTIMIZERS.values(),
        pytest.param(
            functools.partial(ManifoldAdam, retraction="exponential"), marks=pytest.mark.once
        ),
    ],
    ids=[*OPTIMIZERS, "exponential"],
)
def test_no_drift_after_a_thousand_noisy_steps(make):
    optimizer, variables, before = drifted(make, 1000, 64)
    for variable, start in zip(variables, before):
        assert float(stiefel.defect(variable)) < 1e-5
        assert np.abs(to_numpy(variable) - start).max() > 0.05
    optimizer.finalize_variable_values(variables)  # as when `fit` ends
    for variable in variables:
        assert float(stiefel.defect(variable)) < 2e-6


@accelerated.of_cpus("accelerators look at a sixteenth of the rows a step")
@every_optimizer
def test_a_single_huge_step_stays_on_the_manifold(make):
    variables = make_variables("float32")
    optimizer = make(50.0)
    train(optimizer, variables, 2)
    for variable in variables[:MATRICES]:
        assert float(stiefel.defect(variable)) < 2e-5  # of squaring an exponential ten times
    train(optimizer, variables, 7)  # of which the last one projects
    for variable in variables[:MATRICES]:
        assert float(stiefel.defect(variable)) < 2e-6


OPTIONS = [  # one way of clipping each, and what acts elsewhere
    {"clipnorm": 0.1, "euclidean_learning_rate": 1e-2},
    {"global_clipnorm": 0.1, "weight_decay": 0.1},
    {"clipvalue": 0.01, "loss_scale_factor": 128.0},
    {"use_ema": True, "ema_momentum": 0.9},
]
COMBINED = [
    {},
    {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    {"gradient_accumulation_steps": 2},
    {"lookahead_period": 2, "gradient_accumulation_steps": 2, "use_ema": True},
]


@pytest.mark.parametrize(
    "make, options",
    [
        *((ManifoldAdam, options) for options in OPTIONS + COMBINED),
        *((ManifoldMuon, options) for options in COMBINED),
    ],
    ids=str,
)
def test_options_train_on_the_manifold(make, options):
    x, y = regression_data()
    kinds = 3 if keras.backend.backend() == "torch" else 1
    model = small_model(kinds=kinds)
    model.compile(make(1e-2, **options), loss="mse")
    model.optimizer.build(model.trainable_variables)  # else TensorFlow traces two steps
    losses = model.fit(x, y, epochs=12, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert model.evaluate(x, y, batch_size=16, verbose=0) < 0.9 * losses[0]  # averages, too
    assert_on_manifold(model, kinds=kinds)


@accelerated.of_cpus()
@every_optimizer
def test_learning_rate_schedule(make):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.1, 0.0])
    variables = make_variables("float32")
    optimizer = make(schedule)
    train(optimizer, variables, 2)
    after_two = [to_numpy(v).copy() for v in variables]
    train(optimizer, variables, 2, first=2)
    for variable, before in zip(variables, after_two):
        np.testing.assert_allclose(to_numpy(variable), before, atol=1e-6)


@every_optimizer
def test_gradient_accumulation_equals_the_mean_gradient(make):
    with backend.float64_scope():
        plain, accumulated = make_variables(), make_variables()
        train(make(0.05, gradient_accumulation_steps=2), accumulated, 6)
        optimizer = make(0.05)
        for step in range(0, 6, 2):
            mean = [(a + b) / 2 for a, b in zip(gradients(step), gradients(step + 1))]
            optimizer.apply([keras.ops.convert_to_tensor(g) for g in mean], plain)
        for a, b in zip(plain, accumulated):
            np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=1e-9)


SCHEDULES = {
    "steps": keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.5, 0.1]),
    "exponential": keras.optimizers.schedules.ExponentialDecay(0.5, 3, 0.5),
}


@every_optimizer
@pytest.mark.parametrize("name", SCHEDULES)
def test_accumulated_gradients_follow_schedules_as_in_kerass_adam(make, name):
    """Keras' schedules count batches; bias correction counts updates. So does each of our rates."""
    schedule, options = SCHEDULES[name], {"gradient_accumulation_steps": 3}
    variables = [keras.Variable(np.zeros(3, "float32")) for _ in range(3)]
    optimizers = (
        keras.optimizers.Adam(schedule, **options),
        make(schedule, **options),
        make(0.3, euclidean_learning_rate=schedule, **options),
    )
    for step in range(12):
        gradient = np.random.default_rng(step).normal(size=3).astype("float32")
        for optimizer, variable in zip(optimizers, variables):
            optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    expected, *ours = map(to_numpy, variables)
    for values in ours:
        np.testing.assert_allclose(values, expected, rtol=1e-6)


@every_optimizer
def test_both_rates_end_a_schedule_together(make):
    """The last of three batches is the first update; the schedule is at its end by then."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.1, 0.0])
    variables = make_variables("float32")
    before = [to_numpy(v).copy() for v in variables]
    train(
        make(schedule, euclidean_learning_rate=schedule, gradient_accumulation_steps=3),
        variables,
        6,
    )
    for variable, start in zip(variables, before):
        np.testing.assert_allclose(to_numpy(variable), start, atol=1e-6)


@every_optimizer
def test_weight_decay_skips_the_manifold(make):
    decayed, plain = make_variables("float32"), make_variables("float32")
    train(make(0.01, weight_decay=0.5), decayed, 3)
    train(make(0.01), plain, 3)
    for a, b in zip(decayed[:MATRICES], plain[:MATRICES]):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
    assert np.abs(to_numpy(decayed[-1]) - to_numpy(plain[-1])).max() > 1e-3


@every_optimizer
def test_weight_decay_with_manifold_variables_only(make):
    variables = make_variables("float32")[:1]
    optimizer = make(0.01, weight_decay=0.5)
    optimizer.apply([keras.ops.ones((6, 6))], variables)
    assert float(stiefel.defect(variables[0])) < 2e-6


@every_optimizer
def test_loss_scale_optimizer(make):
    x, y = regression_data()
    model = small_model()
    scaled = keras.optimizers.LossScaleOptimizer(make(1e-2), dynamic_growth_steps=3)
    model.compile(scaled, loss="mse")
    first = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=6, batch_size=16, verbose=0)
    assert model.evaluate(x, y, verbose=0) < first
    assert_on_manifold(model)


@every_optimizer
def test_ema_is_projected_when_training_ends(make):
    x, y = regression_data()
    model = small_model()
    model.compile(make(0.1, use_ema=True, ema_momentum=0.95), loss="mse")
    model.fit(x, y, epochs=8, batch_size=8, verbose=0)
    averages = [
        average
        for average, v in zip(
            model.optimizer._model_variables_moving_average, model.trainable_variables
        )
        if isinstance(v.constraint, Stiefel)
    ]
    # The averages themselves have left the manifold: the projection had work to do.
    assert max(float(stiefel.defect(a)) for a in averages) > 1e-3
    assert_on_manifold(model)


@every_optimizer
def test_saved_averages_continue_the_same_training(make, tmp_path):
    x, y = regression_data()

    def fit(model, epochs):
        model.fit(x, y, epochs=epochs, batch_size=16, shuffle=False, verbose=0)

    model = small_model()
    start = model.get_weights()
    model.compile(make(1e-2, use_ema=True), loss="mse")
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    fit(model, 2)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations) == 8
    fit(loaded, 2)
    for a, b, c in zip(model.get_weights(), loaded.get_weights(), start):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.abs(a - c).max() > 1e-4


@every_optimizer
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="Keras has none there")
def test_stateless_apply(make):
    stateful, stateless = make_variables("float32"), make_variables("float32")
    train(make(0.05, lookahead_period=2), stateful, 3)
    optimizer = make(0.05, lookahead_period=2)
    optimizer.build(stateless)
    values = [v.value for v in stateless]
    state = [v.value for v in optimizer.variables]
    for step in range(3):
        grads = [keras.ops.convert_to_tensor(g, dtype="float32") for g in gradients(step)]
        values, state = optimizer.stateless_apply(state, grads, values)
    for a, b in zip(stateful, values):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=1e-6)


def test_ordinary_adam_keeps_the_manifold():
    x, y = regression_data()
    model = small_model()
    model.compile(keras.optimizers.Adam(1e-2), loss="mse")
    first = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=10, batch_size=16, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.9 * first
    assert_on_manifold(model)


@every_optimizer
def test_frozen_kernels_stay(make):
    x, y = regression_data()
    model = small_model()
    model.layers[1].trainable = False
    before = to_numpy(model.layers[1].kernel).copy()
    model.compile(make(1e-2), loss="mse")
    model.fit(x, y, epochs=1, verbose=0)
    np.testing.assert_array_equal(to_numpy(model.layers[1].kernel), before)


@every_optimizer
def test_decay_multiplies_both_rates(make):
    with backend.float64_scope():
        halved, half = make_variables(), make_variables()
        optimizer = make(0.05, euclidean_learning_rate=0.2)
        optimizer.decay.assign(0.5)
        train(optimizer, halved, 3)
        train(make(0.025, euclidean_learning_rate=0.1), half, 3)
        for a, b in zip(halved, half):
            np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=1e-6)


@every_optimizer
def test_bad_euclidean_learning_rate(make):
    with pytest.raises(ValueError, match=r"`euclidean_learning_rate` must be a number"):
        make(euclidean_learning_rate="fast")


@pytest.mark.parametrize("period", [0, -1, 2.5, True])
def test_bad_lookahead_period(period):
    with pytest.raises(ValueError, match=r"positive integer or None. Received: lookahead_period="):
        ManifoldAdam(lookahead_period=period)


@pytest.mark.parametrize("step", [0, 1.5, -0.5])
def test_bad_lookahead_step(step):
    with pytest.raises(ValueError, match=r"in \(0, 1\]. Received: lookahead_step="):
        ManifoldAdam(lookahead_step=step)


@every_optimizer
def test_bad_precision(make):
    with pytest.raises(ValueError, match=r"'auto', .*, or 'float32'. Received: precision='tf32'"):
        make(precision="tf32")


@accelerated.of_cpus()
@every_optimizer
def test_precision_changes_nothing_on_a_cpu(make):
    optimizer = make(0.05, precision="float32")
    auto, full = make_variables("float32"), make_variables("float32")
    train(make(0.05), auto, 3)
    train(optimizer, full, 3)
    for a, b in zip(auto, full):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


@accelerated.of_cpus()
@every_optimizer
@pytest.mark.parametrize("dtype, precision", [("float32", "float32"), ("float64", "auto")])
def test_float32_is_what_is_asked_for_on_an_accelerator(make, dtype, precision, monkeypatch):
    with backend.float64_scope():
        expected, variables = make_variables(dtype), make_variables(dtype)
        train(make(0.05), expected, 9)
        accelerated.round_products(monkeypatch)
        train(make(0.05, precision=precision), variables, 9)
        for a, b in zip(expected, variables):
            np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=2e-6)


@every_optimizer
def test_an_accelerator_takes_the_same_steps_roughly_and_without_a_branch(make, monkeypatch):
    expected, variables = make_variables("float32"), make_variables("float32")
    train(make(0.01), expected, 9)
    accelerated.round_products(monkeypatch)
    optimizer = make(0.01)
    optimizer.build(variables)
    with monkeypatch.context() as strict:
        accelerated.forbid_branches(strict)
        train(optimizer, variables, 9)
    for a, b in zip(expected, variables):
        difference = np.abs(to_numpy(a) - to_numpy(b)).max()
        assert difference < 0.01  # of 0.09 radians, where rounding tips small singular values
    for variable in variables[:MATRICES]:
        assert float(stiefel.defect(variable)) < 2e-5
    optimizer.finalize_variable_values(variables)
    for variable in variables[:MATRICES]:
        assert float(stiefel.defect(variable)) < 8e-7


@every_optimizer
def test_no_drift_on_an_accelerator(make, monkeypatch):
    """Nothing gathers in 300 steps of noise beyond what one round of drift removal leaves."""
    accelerated.round_products(monkeypatch)
    _, variables, _ = drifted(make, 300, 32)
    for variable in variables:
        assert float(stiefel.defect(variable)) < 3e-5


@accelerated.of_cpus("the CPU's stacks come first")
@every_optimizer
def test_stacks_are_larger_on_an_accelerator(make, monkeypatch):
    monkeypatch.setattr(manifold_optimizer, "STACK_ENTRIES", 36)
    seen = []
    real = make.manifold_step
    monkeypatch.setattr(
        make, "manifold_step", lambda self, x, *a: seen.append(tuple(x.shape)) or real(self, x, *a)
    )
    train(make(0.05), make_variables("float32"), 1)
    assert seen.count((1, 6, 6)) == 2
    accelerated.pretend(monkeypatch)
    seen.clear()
    train(make(0.05), make_variables("float32"), 1)
    assert seen.count((2, 6, 6)) == 1


@every_optimizer
def test_an_error_in_a_step_is_not_hidden_by_the_averages_after_it(make, monkeypatch):
    """On JAX the variables of a step that failed have no value, which the end of `fit` asks for."""

    def fails(*_):
        raise RuntimeError("of the step")

    model = small_model()
    model.compile(make(1e-2, use_ema=True), loss="mse")
    monkeypatch.setattr(model.optimizer, "manifold_step", fails)
    with pytest.raises(RuntimeError, match="of the step"):
        model.fit(*regression_data(), verbose=0)
