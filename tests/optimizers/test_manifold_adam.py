import keras
import numpy as np
import pytest
from data import to_numpy
from optimizers.reference import NumpyManifoldAdam, polar

from keras_lipnext import backend
from keras_lipnext.layers import NormalizedDense, OrthogonalDense
from keras_lipnext.manifolds import RandomStiefel, Stiefel, stiefel
from keras_lipnext.optimizers import ManifoldAdam

SHAPES = [(6, 6), (8, 3), (3, 8), (5,)]


def make_variables(dtype="float64"):
    """One variable of each shape; matrices on the manifold, the vector off it."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape) for shape in SHAPES]
    values = [polar(v) if v.ndim == 2 else v for v in values]
    variables = [keras.Variable(v, dtype=dtype) for v in values]
    for variable in variables[:3]:
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


def small_model(units=12):
    """Square, tall and wide kernels, biases and a head."""
    inputs = keras.Input((units,))
    x = OrthogonalDense(units, activation="relu")(inputs)
    x = OrthogonalDense(units + 4, activation="tanh")(x)
    x = OrthogonalDense(units - 4)(x)
    return keras.Model(inputs, NormalizedDense(3)(x))


def regression_data(units=12, n=64):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, units)).astype("float32")
    return x, np.tanh(x[:, :3])


def kernels(model):
    return [w for w in model.trainable_weights if isinstance(w.constraint, Stiefel)]


def assert_on_manifold(model, tolerance=2e-6):
    assert len(kernels(model)) == 3
    for kernel in kernels(model):
        assert float(stiefel.defect(kernel)) < tolerance


def test_equals_the_formulas():
    with backend.float64_scope():
        variables = make_variables()
        references = [
            NumpyManifoldAdam(to_numpy(v), 0.05, manifold=len(v.shape) == 2) for v in variables
        ]
        optimizer = ManifoldAdam(0.05)
        for step in range(12):
            train(optimizer, variables, 1, first=step)
            for reference, gradient, variable in zip(references, gradients(step), variables):
                reference.step(gradient)
                # Keras holds rates, and TensorFlow casts betas, as float32.
                np.testing.assert_allclose(to_numpy(variable), reference.x, atol=5e-6)


def test_other_variables_take_kerass_adam():
    start = np.array([1.0, -2.0, 3.0], "float32")
    ours, theirs = keras.Variable(start), keras.Variable(start)
    for optimizer, variable in ((ManifoldAdam(0.1), ours), (keras.optimizers.Adam(0.1), theirs)):
        for step in range(5):
            g = np.random.default_rng(step).normal(size=3).astype("float32")
            optimizer.apply([keras.ops.convert_to_tensor(g)], [variable])
    np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))


def test_euclidean_learning_rate():
    with backend.float64_scope():
        variables = make_variables()
        vector = NumpyManifoldAdam(to_numpy(variables[-1]), 0.5, manifold=False)
        matrix = NumpyManifoldAdam(to_numpy(variables[0]), 0.01)
        train(ManifoldAdam(0.01, euclidean_learning_rate=0.5), variables, 4)
        for step in range(4):
            vector.step(gradients(step)[-1])
            matrix.step(gradients(step)[0])
        # Keras holds learning rates as float32 variables.
        np.testing.assert_allclose(to_numpy(variables[-1]), vector.x, atol=3e-5)
        np.testing.assert_allclose(to_numpy(variables[0]), matrix.x, atol=1e-6)


def test_euclidean_learning_rate_schedule():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.0])
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer = ManifoldAdam(0.1, euclidean_learning_rate=schedule)
    values = []
    for _ in range(4):
        optimizer.apply([keras.ops.ones(2)], [variable])
        values.append(to_numpy(variable).copy())
    np.testing.assert_allclose(values[1], -1.0, atol=1e-4)
    np.testing.assert_array_equal(values[3], values[1])


def test_lookahead_equals_the_formulas():
    """Every third step: slow <- slow + 0.5 (fast - slow), projected on the manifold."""
    with backend.float64_scope():
        variables = make_variables()
        fast = [NumpyManifoldAdam(to_numpy(v), 0.05, manifold=len(v.shape) == 2) for v in variables]
        slow = [f.x.copy() for f in fast]
        optimizer = ManifoldAdam(0.05, lookahead_period=3)
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


class Noise(keras.layers.Layer):
    """Holds kernels whose gradients are noise, by a random linear loss."""

    def __init__(self, shapes):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(0)
        self.kernels = [
            self.add_weight(
                shape=shape, initializer=RandomStiefel(i), constraint=Stiefel(), name=f"k{i}"
            )
            for i, shape in enumerate(shapes)
        ]

    def call(self, inputs):
        total = keras.ops.sum(inputs)
        for kernel in self.kernels:
            noise = keras.random.normal(kernel.shape, seed=self.seeds)
            total = total + keras.ops.sum(noise * kernel)
        return total * keras.ops.ones_like(inputs)


@pytest.mark.parametrize("size", [8, 64, 256])
def test_no_drift_after_a_thousand_noisy_steps(size):
    layer = Noise([(size, size), (size, size // 2), (size // 4, size)])
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(ManifoldAdam(1e-2), loss=lambda y, z: z)
    before = [to_numpy(k).copy() for k in layer.kernels]
    model.fit(np.zeros((1000, 1)), np.zeros((1000, 1)), batch_size=1, verbose=0)
    assert int(model.optimizer.iterations) == 1000
    for kernel, start in zip(layer.kernels, before):
        assert float(stiefel.defect(kernel)) < 2e-6
        assert np.abs(to_numpy(kernel) - start).max() > 0.05


def test_a_single_huge_step_stays_on_the_manifold():
    variables = make_variables("float32")
    train(ManifoldAdam(50.0), variables, 2)
    for variable in variables[:3]:
        assert float(stiefel.defect(variable)) < 2e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipnorm": 0.1},
        {"global_clipnorm": 0.1},
        {"clipvalue": 0.01},
        {"weight_decay": 0.1},
        {"use_ema": True, "ema_momentum": 0.9},
        {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 128.0},
        {"lookahead_period": 2},
        {"lookahead_period": 2, "gradient_accumulation_steps": 2, "use_ema": True},
        {"euclidean_learning_rate": 1e-2},
    ],
    ids=str,
)
def test_options_train_on_the_manifold(options):
    x, y = regression_data()
    model = small_model()
    model.compile(ManifoldAdam(1e-2, **options), loss="mse")
    first = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=12, batch_size=16, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.9 * first
    assert_on_manifold(model)


def test_learning_rate_schedule():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.1, 0.0])
    variables = make_variables("float32")
    optimizer = ManifoldAdam(schedule)
    train(optimizer, variables, 2)
    after_two = [to_numpy(v).copy() for v in variables]
    train(optimizer, variables, 2, first=2)
    for variable, before in zip(variables, after_two):
        np.testing.assert_allclose(to_numpy(variable), before, atol=1e-6)


def test_clipnorm_acts_on_the_euclidean_gradient():
    variable = keras.Variable(np.eye(3, dtype="float32"))
    variable.constraint = Stiefel()
    optimizer = ManifoldAdam(0.1, clipnorm=1.0, beta_1=0.0)
    gradient = np.array([[0, 30, 0], [0, 0, 0], [0, 0, 40]], "float32")
    optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    # Clipped to norm 1 (0.6 and 0.8), then projected: skew part 0.3, so v = 0.001 * 0.3^2.
    velocity = to_numpy(optimizer._velocities[0])
    np.testing.assert_allclose(velocity[0, 1], 0.001 * 0.3**2, rtol=1e-5)


def test_gradient_accumulation_equals_the_mean_gradient():
    with backend.float64_scope():
        plain, accumulated = make_variables(), make_variables()
        train(ManifoldAdam(0.05, gradient_accumulation_steps=2), accumulated, 6)
        optimizer = ManifoldAdam(0.05)
        for step in range(0, 6, 2):
            mean = [(a + b) / 2 for a, b in zip(gradients(step), gradients(step + 1))]
            optimizer.apply([keras.ops.convert_to_tensor(g) for g in mean], plain)
        for a, b in zip(plain, accumulated):
            np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=1e-9)


def test_weight_decay_skips_the_manifold():
    decayed, plain = make_variables("float32"), make_variables("float32")
    train(ManifoldAdam(0.01, weight_decay=0.5), decayed, 3)
    train(ManifoldAdam(0.01), plain, 3)
    for a, b in zip(decayed[:3], plain[:3]):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
    assert np.abs(to_numpy(decayed[3]) - to_numpy(plain[3])).max() > 1e-3


def test_weight_decay_with_manifold_variables_only():
    variables = make_variables("float32")[:1]
    optimizer = ManifoldAdam(0.01, weight_decay=0.5)
    optimizer.apply([keras.ops.ones((6, 6))], variables)
    assert float(stiefel.defect(variables[0])) < 2e-6


def test_loss_scale_optimizer():
    x, y = regression_data()
    model = small_model()
    scaled = keras.optimizers.LossScaleOptimizer(ManifoldAdam(1e-2), dynamic_growth_steps=3)
    model.compile(scaled, loss="mse")
    first = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=6, batch_size=16, verbose=0)
    assert model.evaluate(x, y, verbose=0) < first
    assert_on_manifold(model)


def test_ema_is_projected_when_training_ends():
    x, y = regression_data()
    model = small_model()
    model.compile(ManifoldAdam(0.1, use_ema=True, ema_momentum=0.95), loss="mse")
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


@pytest.mark.parametrize("options", [{}, {"lookahead_period": 3}, {"use_ema": True}], ids=str)
def test_saved_state_continues_the_same_training(options, tmp_path):
    x, y = regression_data()

    def fit(model, epochs):
        model.fit(x, y, epochs=epochs, batch_size=16, shuffle=False, verbose=0)

    model = small_model()
    start = model.get_weights()
    model.compile(ManifoldAdam(1e-2, **options), loss="mse")
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    fit(model, 2)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations) == 8
    fit(loaded, 2)
    for a, b, c in zip(model.get_weights(), loaded.get_weights(), start):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.abs(a - c).max() > 1e-4


def test_config_round_trip():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    optimizer = ManifoldAdam(
        0.02,
        euclidean_learning_rate=schedule,
        beta_1=0.8,
        lookahead_period=4,
        lookahead_step=0.7,
        clipnorm=3.0,
    )
    serialized = keras.saving.serialize_keras_object(optimizer)
    assert serialized["registered_name"] == "keras_lipnext>ManifoldAdam"
    copy = keras.saving.deserialize_keras_object(serialized)
    assert copy.get_config() == optimizer.get_config()
    assert float(copy.euclidean_learning_rate(5)) == pytest.approx(float(schedule(5)))


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="Keras has none there")
def test_stateless_apply():
    stateful, stateless = make_variables("float32"), make_variables("float32")
    train(ManifoldAdam(0.05, lookahead_period=2), stateful, 3)
    optimizer = ManifoldAdam(0.05, lookahead_period=2)
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


def test_frozen_kernels_stay():
    x, y = regression_data()
    model = small_model()
    model.layers[1].trainable = False
    before = to_numpy(model.layers[1].kernel).copy()
    model.compile(ManifoldAdam(1e-2), loss="mse")
    model.fit(x, y, epochs=1, verbose=0)
    np.testing.assert_array_equal(to_numpy(model.layers[1].kernel), before)


def test_decay_multiplies_both_rates():
    with backend.float64_scope():
        halved, half = make_variables(), make_variables()
        optimizer = ManifoldAdam(0.05, euclidean_learning_rate=0.2)
        optimizer.decay.assign(0.5)
        train(optimizer, halved, 3)
        train(ManifoldAdam(0.025, euclidean_learning_rate=0.1), half, 3)
        for a, b in zip(halved, half):
            np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=1e-6)


def test_amsgrad_is_refused():
    with pytest.raises(ValueError, match=r"no AMSGrad"):
        ManifoldAdam(amsgrad=True)


def test_bad_euclidean_learning_rate():
    with pytest.raises(ValueError, match=r"`euclidean_learning_rate` must be a number"):
        ManifoldAdam(euclidean_learning_rate="fast")


@pytest.mark.parametrize("period", [0, -1, 2.5, True])
def test_bad_lookahead_period(period):
    with pytest.raises(ValueError, match=r"positive integer or None. Received: lookahead_period="):
        ManifoldAdam(lookahead_period=period)


@pytest.mark.parametrize("step", [0, 1.5, -0.5])
def test_bad_lookahead_step(step):
    with pytest.raises(ValueError, match=r"in \(0, 1\]. Received: lookahead_step="):
        ManifoldAdam(lookahead_step=step)
