"""Every optimizer, loss, metric and activation does what Keras asks of all: a new one is a `Row`.

Their formulas have tests of their own: of optimizers test_manifold_optimizer, by `DIRECTIONS`, of
losses test_emma and test_kantorovich_rubinstein, of metrics test_certified and
test_wasserstein_estimate, of activations test_activations, by `EXACT`.
"""

import dataclasses
import inspect

import keras
import numpy as np
import pytest
from data import to_numpy

import keras_lipnext as lip
from keras_lipnext.activations import FUNCTIONS
from keras_lipnext.losses import EMMA, HKR, CertifiedCrossEntropy, KantorovichRubinstein
from keras_lipnext.metrics import CertifiedAccuracy, CertifiedRadius, WassersteinEstimate
from keras_lipnext.optimizers import ManifoldAdam, ManifoldMuon, cosine


@dataclasses.dataclass
class Row:
    """A class, and a value, not the default one, for each argument of its constructor."""

    cls: type
    arguments: dict

    def __str__(self):
        return self.cls.__name__

    def make(self):
        return self.cls(**self.arguments)


STEPPING = {
    "name": "an_optimizer",
    "learning_rate": 0.02,
    "euclidean_learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5),
    "beta_1": 0.8,
    "beta_2": 0.99,
    "epsilon": 1e-6,
    "lookahead_period": 2,
    "lookahead_step": 0.75,
    "precision": "float32",
    "schedule": cosine(0.25),
}
DEMANDING = {"epsilon": 0.3, "temperature": 4.0, "ramp": 0.25, "start": 0.05}
OPTIMIZERS = [
    Row(ManifoldAdam, {**STEPPING, "retraction": "exponential"}),
    Row(ManifoldMuon, {**STEPPING, "momentum": 0.9, "nesterov": False, "newton_schulz_steps": 4}),
]
LOSSES = [
    Row(EMMA, DEMANDING),
    Row(CertifiedCrossEntropy, DEMANDING),
    Row(KantorovichRubinstein, {}),
    Row(HKR, {"alpha": 3.0, "min_margin": 0.2}),
]
METRICS = [
    Row(CertifiedAccuracy, {"epsilon": 0.2, "name": "a_metric", "dtype": "float32"}),
    Row(CertifiedRadius, {"name": "a_metric", "dtype": "float32"}),
    Row(WassersteinEstimate, {"name": "a_metric", "dtype": "float32"}),
]
ROWS = [*OPTIMIZERS, *LOSSES, *METRICS]


def test_every_public_class_has_a_row():
    public = [
        value
        for room in (lip.optimizers, lip.losses, lip.metrics)
        for value in (getattr(room, name) for name in room.__all__)
        if isinstance(value, type)
    ]
    assert sorted(map(str, ROWS)) == sorted(cls.__name__ for cls in public)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_config(row):
    """It has every argument with its value, and makes the same object again."""
    defaults = {}
    for cls in reversed(row.cls.__mro__):
        if cls.__module__.startswith("keras_lipnext") and "__init__" in vars(cls):
            named = inspect.signature(cls.__init__).parameters.values()
            defaults |= {p.name: p.default for p in named if p.kind is not p.VAR_KEYWORD}
    defaults.pop("self", None)  # of a class without arguments of its own
    assert set(row.arguments) == set(defaults)
    made = row.make()
    config = made.get_config()
    for name, value in row.arguments.items():
        assert value != defaults[name], f"{name} has its default in the table"
        if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
            value = keras.optimizers.schedules.serialize(value)
        expected = pytest.approx(value) if isinstance(value, float) else value
        assert config[name] == expected, name
    serialized = keras.saving.serialize_keras_object(made)
    assert serialized["registered_name"] == f"keras_lipnext>{row.cls.__name__}"
    for copy in (row.cls.from_config(config), keras.saving.deserialize_keras_object(serialized)):
        assert copy.get_config() == config


@pytest.mark.parametrize(
    "rows",
    [  # on each backend one of each optimizer and metric, and of two of the losses
        pytest.param(rows, marks=[pytest.mark.once] * (i in (1, 2)))
        for i, rows in enumerate(zip(OPTIMIZERS * 2, LOSSES, METRICS[:2] * 2, strict=True))
    ],
    ids=lambda rows: "-".join(map(str, rows)),
)
def test_a_model_that_is_saved_trains_on_as_if_it_had_not_been(rows, tmp_path):
    """In mixed precision, compiled as the backend does; a step's state is part of the file."""
    inputs = keras.Input((6,))
    x = lip.layers.OrthogonalDense(6, activation="relu", dtype="mixed_bfloat16")(inputs)
    model = lip.CertifiableModel(inputs, lip.layers.NormalizedDense(3)(x))
    optimizer, loss, metric = (row.make() for row in rows)
    model.compile(optimizer, loss, metrics=[metric])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(48, 6)).astype("float32"), np.arange(48) % 3
    fit = {"batch_size": 16, "shuffle": False, "verbose": 0}
    model.fit(x, y, **fit)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_compile_config() == model.get_compile_config()
    before = model.get_weights()
    rows = [list(each.fit(x, y, **fit).history.values()) for each in (model, loaded)]
    assert np.isfinite(rows[0]).all()
    np.testing.assert_allclose(*rows, rtol=1e-6)
    for a, b, old in zip(model.get_weights(), loaded.get_weights(), before, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.abs(a - old).max() > 1e-4


def test_activations(tmp_path):
    """A model of all of them: saved, in mixed precision, compiled, and certified in float64."""
    inputs = x = keras.Input((4,))
    for name in FUNCTIONS:
        x = keras.layers.Activation(name, dtype="mixed_bfloat16")(x)
    model = keras.Model(inputs, lip.layers.NormalizedDense(3)(x))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    bound = lip.certification.lipschitz_bound(model, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = lip.certification.lipschitz_bound(loaded, verbose=0)
    assert (again.constant, again.body_constant) == (bound.constant, bound.body_constant)
    factors = np.array([FUNCTIONS[name].constant for name in FUNCTIONS])
    assert bound.body_constant == pytest.approx(np.prod(factors), rel=1e-12)
    certificate = lip.certify(loaded, x, verbose=0)  # compares the model's predictions with its own
    assert (certificate.radii >= 0).all()
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))
