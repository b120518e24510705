import keras
import numpy as np
import pytest
from data import dense_model

import keras_lipnext as lip
from keras_lipnext.metrics import CertifiedAccuracy, CertifiedRadius

CLASSES, SAMPLES = 4, 60


def samples():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, CLASSES)).astype("float32")
    logits = rng.normal(size=(SAMPLES, CLASSES)).astype("float32")
    labels = np.where(rng.random(SAMPLES) < 0.7, logits.argmax(1), rng.integers(0, 4, SAMPLES))
    return kernel, logits, labels


def numpy_radii(kernel, logits):
    radii = []
    for z in logits.astype("float64"):
        i = z.argmax()
        others = [j for j in range(CLASSES) if j != i]
        distances = [np.linalg.norm(kernel[:, i] - kernel[:, j]) for j in others]
        radii.append(min((z[i] - z[j]) / d for j, d in zip(others, distances)))
    return np.array(radii)


def head_of(kernel):
    head = keras.layers.Dense(kernel.shape[1])
    head.build((None, kernel.shape[0]))
    head.set_weights([kernel, np.zeros(kernel.shape[1])])
    return head


def bound(metric, kernel):
    return metric.bind(head_of(kernel))


def expected_values(kind, kernel, logits, labels):
    radii, correct = numpy_radii(kernel, logits), logits.argmax(1) == labels
    return correct & (radii > 0.2) if kind is CertifiedAccuracy else np.where(correct, radii, 0)


def make(kind):
    return CertifiedAccuracy(0.2) if kind is CertifiedAccuracy else CertifiedRadius()


@pytest.mark.parametrize("kind", [CertifiedAccuracy, CertifiedRadius])
def test_equals_numpy_for_any_batching_and_labels(kind):
    kernel, logits, labels = samples()
    expected = expected_values(kind, kernel, logits, labels).mean()
    assert 0.05 < expected < 0.95
    for size in (SAMPLES, 7, 1):
        for y in (labels, labels[:, None], np.eye(CLASSES)[labels]):
            metric = bound(make(kind), kernel)
            for start in range(0, SAMPLES, size):
                metric.update_state(y[start : start + size], logits[start : start + size])
            assert float(metric.result()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [CertifiedAccuracy, CertifiedRadius])
@pytest.mark.parametrize("places", [(6, 10), (3, 4, 5)])
def test_positions_of_dense_outputs_are_samples(kind, places):
    kernel, logits, labels = samples()
    expected = expected_values(kind, kernel, logits, labels)
    rng = np.random.default_rng(1)
    for y, rest in ((labels, ()), (labels, (1,)), (np.eye(CLASSES)[labels], (CLASSES,))):
        for shape in (None, places[:1], places):
            weight = None if shape is None else rng.random(shape)
            of_all = np.ones(places)
            if weight is not None:
                of_all = of_all * weight.reshape(shape + (1,) * (len(places) - len(shape)))
            metric = bound(make(kind), kernel)
            metric.update_state(
                y.reshape(*places, *rest), logits.reshape(*places, CLASSES), sample_weight=weight
            )
            mean = np.average(expected, weights=of_all.ravel())
            assert float(metric.result()) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("kind", [CertifiedAccuracy, CertifiedRadius])
def test_weights_are_honoured(kind):
    kernel, logits, labels = samples()
    weight = np.linspace(0, 1, SAMPLES)
    metric = bound(make(kind), kernel)
    metric.update_state(labels, logits, sample_weight=weight)
    expected = np.average(expected_values(kind, kernel, logits, labels), weights=weight)
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)


def test_ties_and_non_finite_logits_are_not_certified():
    kernel = np.eye(3, dtype="float32")
    logits = np.array([[1, 1, 0], [np.nan, 0, 0], [np.inf, 0, 0], [2, 1, 0]], "float32")
    metric = bound(CertifiedAccuracy(0.0), kernel)
    metric.update_state(np.zeros(4), logits)
    assert float(metric.result()) == 0.25


def test_equal_weight_vectors_are_not_certified():
    kernel = np.array([[1, 1, 0], [0, 0, 1]], "float32")
    metric = bound(CertifiedAccuracy(0.0), kernel)
    metric.update_state([0, 2], np.array([[2, 1, 0], [0, 0, 5]], "float32"))
    assert float(metric.result()) == 0.5


@pytest.mark.parametrize("kind", [CertifiedAccuracy, CertifiedRadius])
def test_unbound(kind):
    with pytest.raises(ValueError, match=r"needs the pairwise constants.*CertifiableModel"):
        make(kind).update_state(np.zeros(2), np.zeros((2, 3)))


def test_bad_epsilon():
    with pytest.raises(ValueError, match=r"`epsilon` must not be negative. Received: epsilon=-1"):
        CertifiedAccuracy(-1)


@pytest.mark.parametrize("kind", [CertifiedAccuracy, CertifiedRadius])
def test_an_unbound_metric_has_no_result(kind):
    """Models bind copies: the one given to them must not answer 0."""
    metric = make(kind)
    dense_model().compile("sgd", lip.losses.EMMA(0.5), metrics=[metric])
    with pytest.raises(ValueError, match="binds a copy, and answers in its logs"):
        metric.result()


def test_binding_takes_the_constants_of_the_head_at_each_reset():
    kernel, logits, labels = samples()
    head = head_of(kernel)
    metric = CertifiedRadius().bind(head, lipschitz_constant=2.0)
    metric.update_state(labels, logits)
    expected = expected_values(CertifiedRadius, kernel, logits, labels).mean()
    assert float(metric.result()) == pytest.approx(expected / 2, rel=1e-5)
    head.kernel.assign(3 * kernel)
    metric.reset_state()
    metric.update_state(labels, logits)
    assert float(metric.result()) == pytest.approx(expected / 6, rel=1e-5)


def test_binding_to_what_is_no_head():
    refused = pytest.raises(ValueError, match=r"`bind\(head\)` takes the layer that makes.*of type")
    relu = keras.layers.ReLU()
    relu.build((None, 3))
    for head in (relu, lambda: np.zeros((3, 3))):
        for part in (CertifiedRadius(), lip.losses.EMMA(0.5)):
            with refused:
                part.bind(head)
    with refused:  # a metric holds one constant a pair of classes
        CertifiedRadius().bind(lip.layers.NormalizedDense(3))


def test_one_head_each():
    """Bound to a second model's head it would answer for the first with the wrong constants."""
    first, second = (head_of(np.ones((2, 3))) for _ in range(2))
    for part in (CertifiedRadius(), lip.losses.EMMA(0.5)):
        assert part.bind(first).bind(first) is part
        with pytest.raises(
            ValueError, match=rf"bound to the head '{first.name}' already. Received"
        ):
            part.bind(second)


def test_one_logit_has_no_pairs():
    head = head_of(np.ones((2, 1)))
    for part in (CertifiedRadius(), lip.losses.EMMA(0.5)):
        with pytest.raises(
            ValueError, match=r"NormalizedDense\(2\).*BinaryCrossentropy\(from_logits"
        ):
            part.bind(head)


def plain_model():
    inputs = keras.Input((4,))
    x = lip.layers.OrthogonalDense(4)(inputs)
    return keras.Model(inputs, lip.layers.NormalizedDense(3, name="head")(x))


def test_bound_in_an_ordinary_model():
    """Logs of `evaluate`, under jit, are those of the certificate."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 4)).astype("float32"), rng.integers(0, 3, 96)
    model = plain_model()
    head = model.get_layer("head")
    model.compile(
        keras.optimizers.SGD(0.5),
        lip.losses.EMMA(0.5).bind(head),
        metrics=[CertifiedRadius().bind(head), CertifiedAccuracy(0.2).bind(head)],
    )
    model.fit(x, y, epochs=2, verbose=0)
    logs = model.evaluate(x, y, return_dict=True, verbose=0)
    certificate = lip.certify(model, x, y, epsilons=[0.2], verbose=0)
    expected = np.where(certificate.correct, certificate.radii, 0).mean()
    assert logs["certified_radius"] == pytest.approx(expected, rel=1e-4)
    assert logs["certified_accuracy"] == pytest.approx(certificate.certified_accuracy[0.2])


def vectors(count):
    """Of the features and classes of `dense_model`, which can learn them."""
    x = np.random.default_rng(0).normal(size=(count, 6)).astype("float32")
    return x, x[:, :4].argmax(axis=1)


def test_two_models_can_share_a_metric():
    x, y = vectors(96)
    metric = CertifiedRadius()
    models = [dense_model() for _ in range(2)]
    for model in models:
        model.compile("sgd", lip.losses.EMMA(0.5), metrics=[metric])
    for model in models:
        logs = model.evaluate(x, y, return_dict=True, verbose=0)
        certificate = lip.certify(model, x, y, verbose=0)
        expected = np.where(certificate.correct, certificate.radii, 0).mean()
        assert 0 < logs["certified_radius"] == pytest.approx(expected, rel=1e-3)


def test_evaluate_agrees_with_certify():
    """Under jit, after training has changed the head, metric and certificate agree."""
    x, y = vectors(320)
    model = dense_model()
    model.compile(
        lip.optimizers.ManifoldAdam(1e-2),
        lip.losses.EMMA(0.3, temperature=16),
        metrics=[CertifiedAccuracy(0.05), CertifiedRadius()],
    )
    model.fit(x, y, epochs=3, verbose=0)
    logs = model.evaluate(x, y, return_dict=True, verbose=0)
    certificate = lip.certify(model, x, y, epsilons=[0.05], verbose=0)
    assert logs["certified_accuracy"] == pytest.approx(
        certificate.certified_accuracy[0.05], abs=1 / 320 + 1e-6
    )
    expected = np.where(certificate.correct, certificate.radii, 0).mean()
    assert logs["certified_radius"] == pytest.approx(expected, rel=1e-3)
    assert 0.1 < certificate.certified_accuracy[0.05] < 0.99
