import keras
import numpy as np
import pytest
from data import dense_model, to_numpy

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.losses import EMMA, CertifiedCrossEntropy

CLASSES, SAMPLES = 5, 40


@pytest.fixture
def head():
    layer = lip.layers.NormalizedDense(CLASSES)
    layer.build((None, 7))
    return layer


def samples():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(SAMPLES, CLASSES)).astype("float32")
    return logits, rng.integers(0, CLASSES, size=SAMPLES)


def numpy_loss(logits, labels, kernel, epsilon, temperature, demand, probabilities=None):
    """Per sample, from the formula, in float64."""
    losses = []
    for i, (z, y) in enumerate(zip(logits.astype("float64"), labels)):
        d = z - z[y]
        distances = np.linalg.norm(kernel.astype("float64") - kernel[:, [y]], axis=0)
        margin = epsilon * distances
        with np.errstate(divide="ignore", invalid="ignore"):
            e = np.clip(-d / margin, 0.01, 1) if demand == "emma" else np.ones(CLASSES)
        e[y] = 0
        scaled = temperature * (d + e * margin)
        log_softmax = scaled - np.log(np.exp(scaled).sum())
        p = np.eye(CLASSES)[y] if probabilities is None else probabilities[i]
        losses.append(-(p * log_softmax).sum() / temperature)
    return np.array(losses)


@pytest.mark.parametrize("cls, demand", [(EMMA, "emma"), (CertifiedCrossEntropy, "all")])
@pytest.mark.parametrize("epsilon, temperature", [(0.5, 1.0), (0.1, 16.0), (3.0, 0.5)])
def test_equals_the_formula(cls, demand, epsilon, temperature, head):
    logits, labels = samples()
    loss = cls(epsilon, temperature=temperature, reduction=None).bind(head)
    expected = numpy_loss(logits, labels, to_numpy(head.kernel), epsilon, temperature, demand)
    one_hot = np.eye(CLASSES, dtype="float32")[labels]
    for y in (labels, labels[:, None], labels.astype("uint8"), one_hot, one_hot.astype(bool)):
        np.testing.assert_allclose(to_numpy(loss(y, logits)), expected, rtol=2e-5, atol=2e-6)


def test_the_lipschitz_constant_scales_the_margin(head):
    logits, labels = samples()
    scaled = EMMA(0.5, reduction=None).bind(head, lipschitz_constant=2.0)
    doubled = EMMA(1.0, reduction=None).bind(head)
    np.testing.assert_allclose(
        to_numpy(scaled(labels, logits)), to_numpy(doubled(labels, logits)), rtol=1e-6
    )


def test_soft_labels_follow_the_documented_meaning(head):
    logits, labels = samples()
    soft = 0.7 * np.eye(CLASSES)[labels] + 0.3 * np.eye(CLASSES)[(labels + 1) % CLASSES]
    loss = EMMA(0.5, temperature=4.0, reduction=None).bind(head)
    expected = numpy_loss(logits, labels, to_numpy(head.kernel), 0.5, 4.0, "emma", soft)
    actual = to_numpy(loss(soft.astype("float32"), logits))
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


def test_sample_weight_and_reduction(head):
    logits, labels = samples()
    weight = np.linspace(0, 2, SAMPLES).astype("float32")
    each = to_numpy(EMMA(0.5, reduction=None).bind(head)(labels, logits))
    mean = EMMA(0.5).bind(head)(labels, logits, sample_weight=weight)
    np.testing.assert_allclose(to_numpy(mean), (each * weight).mean(), rtol=1e-5)


PLACES = [(2, 4, 5), (4, 10), (2, 2, 2, 5)]


@pytest.mark.parametrize("cls, demand", [(EMMA, "emma"), (CertifiedCrossEntropy, "all")])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_positions_of_dense_outputs_are_samples(cls, demand, places, head):
    logits, labels = samples()
    loss = cls(0.5, temperature=4.0, reduction=None).bind(head)
    expected = numpy_loss(logits, labels, to_numpy(head.kernel), 0.5, 4.0, demand)
    one_hot = np.eye(CLASSES, dtype="float32")[labels]
    z = logits.reshape(*places, CLASSES)
    shapes = ((labels, ()), (labels, (1,)), (one_hot, (CLASSES,)))
    for y in (values.reshape(*places, *rest) for values, rest in shapes):
        found = to_numpy(loss(y, z))
        assert found.shape == places
        np.testing.assert_allclose(found.ravel(), expected, rtol=2e-5, atol=2e-6)
    mean = cls(0.5, temperature=4.0).bind(head)
    np.testing.assert_allclose(
        to_numpy(mean(labels.reshape(places), z)), expected.mean(), rtol=1e-5
    )


def test_weights_of_dense_outputs_are_of_samples_or_of_positions(head):
    logits, labels = samples()
    places, loss = (5, 8, 1), EMMA(0.5).bind(head)
    y, z = labels.reshape(places), logits.reshape(*places, CLASSES)
    each = to_numpy(EMMA(0.5, reduction=None).bind(head)(y, z))
    rng = np.random.default_rng(1)
    for shape in ((5,), places):
        weight = rng.random(shape).astype("float32")
        expected = (each * weight.reshape(shape + (1,) * (3 - len(shape)))).mean()
        found = loss(y, z, sample_weight=keras.ops.convert_to_tensor(weight))
        np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-5)
    square = (5, 8)  # where Keras would multiply rows by the weights of images, if it could
    y, z = labels.reshape(square), logits.reshape(*square, CLASSES)
    weight = rng.random(5).astype("float32")
    expected = (each.reshape(square) * weight[:, None]).mean()
    np.testing.assert_allclose(to_numpy(loss(y, z, sample_weight=weight)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "shape", [(2, 4), (2, 20), (2, 4, 5, 3), (2, 5, 4), (40,), (2, 4, 5, 5, 1)]
)
def test_labels_of_dense_outputs_that_do_not_fit(shape, head):
    logits, _ = samples()
    loss = EMMA(0.5).bind(head)
    message = r"shape \(batch, 4, 5\) or \(batch, 4, 5, 1\), or prob.*\(batch, 4, 5, 5\). Received"
    with pytest.raises(ValueError, match=message):
        loss(np.zeros(shape), logits.reshape(2, 4, 5, CLASSES))


def test_gradient_treats_the_demanded_share_as_constant(head):
    """d loss / d logits = softmax - one_hot, taken at the shifted logits."""
    logits, labels = samples()
    loss = EMMA(0.5, temperature=4.0, reduction="sum").bind(head)
    tensor = keras.ops.convert_to_tensor(logits)
    slope = to_numpy(backend.gradient(lambda z: loss(labels, z), tensor))
    kernel = to_numpy(head.kernel)
    for i, y in enumerate(labels):
        d = logits[i] - logits[i, y]
        margin = 0.5 * np.linalg.norm(kernel - kernel[:, [y]], axis=0)
        e = np.clip(-d / np.where(margin > 0, margin, 1), 0.01, 1)
        shifted = 4 * (d + e * margin)
        p = np.exp(shifted) / np.exp(shifted).sum()
        np.testing.assert_allclose(slope[i], p - np.eye(CLASSES)[y], atol=1e-5)


def test_gradients_of_the_head_are_finite(head):
    logits, labels = samples()
    kernel = head.kernel

    class Head:
        pass

    def by_kernel(value):
        holder = Head()
        holder.kernel = value
        loss = EMMA(0.5, reduction="sum").bind(holder)
        return loss(labels, keras.ops.convert_to_tensor(logits))

    slope = to_numpy(backend.gradient(by_kernel, backend.value(kernel)))
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 1e-3


@pytest.mark.parametrize("cls", [EMMA, CertifiedCrossEntropy])
def test_unbound(cls):
    with pytest.raises(ValueError, match=r"needs the pairwise constants.*loss.bind\(head\)"):
        cls(0.5)(np.zeros(2), np.zeros((2, 3), "float32"))


def test_labels_of_the_wrong_width(head):
    with pytest.raises(ValueError, match=r"\(batch, 5\). Received: y_true of shape \(2, 4\)"):
        EMMA(0.5).bind(head)(np.eye(4)[:2], np.zeros((2, CLASSES), "float32"))


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_outside_the_classes_are_seen(label, head):
    logits, labels = samples()
    labels[3] = label
    losses = to_numpy(EMMA(0.5, reduction=None).bind(head)(labels, logits))
    assert np.isnan(losses).tolist() == [i == 3 for i in range(SAMPLES)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"epsilon": 0}, r"`epsilon` must be positive. Received: epsilon=0"),
        ({"epsilon": None}, r"`epsilon` must be a number. Received: epsilon=None"),
        ({"epsilon": 1, "temperature": -1}, r"`temperature` must be positive"),
        ({"epsilon": 1, "ramp": 2}, r"`ramp` must be in \[0, 1\]. Received: ramp=2"),
        ({"epsilon": 1, "start": 0}, r"`start` must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMMA(**arguments)


def vectors(count=64):
    """Of the features and classes of `dense_model`."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 6)).astype("float32"), rng.integers(0, 4, count)


def epsilons_during(model, **fit):
    """The loss's own epsilon in each call of an eager training."""
    seen = []

    class Watched(EMMA):
        def current_epsilon(self):
            epsilon = super().current_epsilon()
            seen.append(float(to_numpy(epsilon)))
            return epsilon

    loss = Watched(1.0, temperature=4.0, ramp=0.5, start=0.2)
    model.compile("sgd", loss, run_eagerly=True, jit_compile=False)
    model.fit(**fit, verbose=0)
    return seen


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX traces even here; see the next test"
)
def test_epsilon_ramps_over_the_first_half():
    x, y = vectors(80)
    seen = epsilons_during(dense_model(), x=x, y=y, batch_size=20, epochs=4)
    progress = (np.arange(16) + 1) / 16
    # Keras may call the loss once more to build it.
    np.testing.assert_allclose(seen[-16:], 0.2 + 0.8 * np.minimum(progress / 0.5, 1), rtol=1e-5)


def test_the_ramp_runs_under_jit_without_recompiling():
    """Losses reported by `fit` at rate 0 follow the ramp, and the loss is traced but once."""
    x, y = vectors()
    traces = []

    class Counted(EMMA):
        def call(self, y_true, y_pred):
            traces.append(1)
            return super().call(y_true, y_pred)

    model = dense_model()
    model.compile(keras.optimizers.SGD(0.0), Counted(2.0, temperature=4.0, ramp=0.5, start=0.1))
    losses = []
    for initial_epoch in range(6):
        traces.clear()
        history = model.fit(
            x, y, batch_size=64, initial_epoch=initial_epoch, epochs=initial_epoch + 1, verbose=0
        )
        losses += history.history["loss"]
    # One step an epoch of one epoch: progress is 1 at once, so the loss is constant ...
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    traces.clear()
    ramped = model.fit(x, y, batch_size=64, epochs=8, verbose=0).history["loss"]
    if keras.backend.backend() != "torch":  # torch runs eagerly by default
        assert not traces
    expected = []
    logits = to_numpy(model(x))
    for epoch in range(8):
        epsilon = 0.1 + 1.9 * min((epoch + 1) / 8 / 0.5, 1)
        losses = numpy_losses(logits, y, to_numpy(model.head.kernel), epsilon)
        expected.append(losses.mean())
    # ... and over eight epochs it rises with epsilon for four, then stays.
    np.testing.assert_allclose(ramped, expected, rtol=1e-3)


def numpy_losses(logits, labels, kernel, epsilon):
    rows = np.arange(len(labels))
    d = logits - logits[rows, labels][:, None]
    distances = np.linalg.norm(kernel[:, :, None] - kernel[:, None, :], axis=0)[labels]
    margin = epsilon * distances
    e = np.clip(-d / np.where(margin > 0, margin, 1), 0.01, 1)
    scaled = 4.0 * (d + e * margin)
    return (np.log(np.exp(scaled).sum(axis=1)) - scaled[rows, labels]) / 4.0


def test_evaluation_uses_the_full_epsilon():
    x, y = vectors()
    model = dense_model()
    model.compile(keras.optimizers.SGD(0.0), EMMA(2.0, temperature=4.0, ramp=1.0))
    expected = numpy_losses(to_numpy(model(x)), y, to_numpy(model.head.kernel), 2.0).mean()
    history = model.fit(x, y, validation_data=(x, y), epochs=2, verbose=0).history
    np.testing.assert_allclose(history["val_loss"], expected, rtol=1e-3)
    logs = model.evaluate(x, y, return_dict=True, verbose=0)
    assert logs["loss"] == pytest.approx(expected, rel=1e-3)


def test_a_head_may_be_bound_before_it_is_built():
    """As in a subclassed model, which builds its layers in the first step."""
    logits, labels = samples()
    late = lip.layers.NormalizedDense(CLASSES)
    loss = EMMA(0.5).bind(late)
    with pytest.raises(ValueError, match="not built yet"):
        loss(labels, logits)
    late.build((None, 7))
    answer, expected = (to_numpy(part(labels, logits)) for part in (loss, EMMA(0.5).bind(late)))
    assert answer == expected
    with pytest.raises(ValueError, match="bind"):
        EMMA(0.5).bind("head")
