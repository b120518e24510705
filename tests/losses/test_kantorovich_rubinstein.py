"""KantorovichRubinstein and HKR against NumPy float64."""

import keras
import numpy as np
import pytest
from data import to_numpy

import keras_lipnext as lip
from keras_lipnext.losses import HKR, KantorovichRubinstein


def reference(labels, f, alpha=0.0, margin=1.0):
    classes = f.shape[-1]
    members = (labels[:, None] == np.arange(classes)) if classes > 1 else labels[:, None] > 0
    gaps = [
        f[m, k].mean() - f[~m, k].mean() if m.any() and not m.all() else 0.0
        for k, m in enumerate(members.T)
    ]
    missing = np.maximum(0, margin - np.where(members, f, -f))
    hinge = np.where(members, missing, missing / max(1, classes - 1)).sum(axis=1).mean()
    return alpha * hinge - np.mean(gaps)


@pytest.mark.parametrize("classes", [1, 3])
def test_equals_the_formula(classes):
    rng = np.random.default_rng(0)
    f = rng.normal(size=(20, classes))
    labels = rng.integers(0, max(2, classes), 20)
    forms = [labels, labels[:, None]]
    forms += [2 * labels - 1] if classes == 1 else [np.eye(classes)[labels]]
    for y in forms:
        for loss, expected in (
            (KantorovichRubinstein(), reference(labels, f)),
            (HKR(alpha=4.0, min_margin=0.3), reference(labels, f, 4.0, 0.3)),
        ):
            assert float(loss(y, f.astype("float32"))) == pytest.approx(
                expected, rel=1e-5, abs=1e-6
            )


@pytest.mark.parametrize("loss", [KantorovichRubinstein(), HKR()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("classes", [1, 3])
def test_a_batch_of_one_class_is_finite(loss, classes):
    f = np.random.default_rng(0).normal(size=(6, classes)).astype("float32")
    labels = np.ones(6, "int32")
    found = float(loss(labels, f))
    assert np.isfinite(found)
    alpha = 10.0 if isinstance(loss, HKR) else 0.0
    assert found == pytest.approx(reference(labels, f, alpha), rel=1e-5, abs=1e-6)
    x = keras.ops.convert_to_tensor(f)
    slope = to_numpy(lip.backend.gradient(lambda t: loss.call(labels, t), x))
    assert np.isfinite(slope).all()


def test_labels_that_are_none_give_nan():
    for labels, classes in (([0, 2], 1), ([0, 3], 3)):
        f = np.ones((2, classes), "float32")
        assert np.isnan(float(HKR()(np.array(labels), f)))
    with pytest.raises(ValueError, match="y_true of shape"):
        KantorovichRubinstein()(np.zeros((2, 2)), np.zeros((2, 1)))


def test_sample_weights():
    rng = np.random.default_rng(0)
    f, y, w = rng.normal(size=(8, 1)), np.arange(8) % 2, rng.uniform(size=8)
    each = HKR(reduction=None)
    parts = to_numpy(each(y, f.astype("float32")))
    found = float(HKR(reduction="sum")(y, f.astype("float32"), sample_weight=w))
    assert found == pytest.approx((parts * w).sum(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_critic_finds_the_distance_of_two_shifted_clouds(dtype):
    rng = np.random.default_rng(0)
    p = rng.normal(size=(64, 2)).astype("float32")
    x, y = np.concatenate([p + np.array([3, 4]), p]).astype("float32"), np.repeat([1, 0], 64)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2,))
    critic = keras.Model(inputs, lip.layers.OrthogonalDense(1, dtype=dtype)(inputs))
    critic.compile(keras.optimizers.Adam(0.1), KantorovichRubinstein())
    loss = critic.fit(x, y, batch_size=128, epochs=60, verbose=0).history["loss"][-1]
    assert -5.05 < loss < -4.85
    bound = lip.guarantees.wasserstein(critic, x[:64], x[64:])
    assert 4.85 < bound.lower_bound <= 5 * (1 + 1e-6)  # float32 inputs


@pytest.mark.parametrize("arguments", [{"alpha": -1}, {"min_margin": 0}, {"alpha": np.inf}])
def test_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        HKR(**arguments)


@pytest.mark.parametrize("count", [41, 47, 55])
def test_a_batch_of_one_class_earns_nothing_compiled_either(count):
    """XLA makes a product with 1 / n of a mean, which of so many ones is not 1."""
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(1, kernel_initializer="ones")(inputs))
    model.compile("sgd", KantorovichRubinstein(), jit_compile=keras.backend.backend() != "torch")
    loss = model.evaluate(
        np.full((count, 1), 7.0, "float32"), np.ones(count), batch_size=count, verbose=0
    )
    assert loss == 0


def test_what_is_no_class_gives_nan():
    for label in (1.7, np.nan, 3.0, -1.0):
        loss = HKR(reduction=None)(np.array([label, 1.0]), np.ones((2, 3), "float32"))
        assert np.isnan(to_numpy(loss)).any()
    with pytest.raises(ValueError, match="Received: y_pred of shape"):
        HKR()(np.zeros((2, 5, 1)), np.zeros((2, 5, 1, 1), "float32"))
