"""Certificates of many decisions a sample, and of one logit: positions, labels, IoU."""

import itertools

import accelerated
import keras
import numpy as np
import pytest
from data import to_numpy

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.certification import decisions
from keras_lipnext.certification.evaluation import Evaluation
from keras_lipnext.lipschitz.model import read
from keras_lipnext.report.many import DenseCertificate, LabelsCertificate, least_mean_iou
from keras_lipnext.twin import Float64Twin

kl, ll = keras.layers, lip.layers
CLASSES = 3


def dense_model(head=None, side=4):
    """Images to logits at each pixel, with a head that is far from normalised."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((side, side, 3))
    x = ll.OrthogonalDense(8)(inputs)
    x = ll.ShiftMixing(1 / 4, padding="zero")(x)
    x = ll.BetaAbs(0.5)(ll.OrthogonalDense(8)(x))
    head = head or kl.Dense(CLASSES, kernel_initializer=keras.initializers.RandomNormal(0, 2.0))
    return keras.Model(inputs, head(x))


def images(count=4, side=4, seed=0):
    return np.random.default_rng(seed).uniform(size=(count, side, side, 3)).astype("float32")


def linear_model(kernel, bias, side=3):
    """Each pixel's logits a linear map of its own channel: the exact radii are known."""
    inputs = keras.Input((side, side, len(kernel)))
    model = keras.Model(inputs, kl.Dense(len(bias))(inputs))
    model.layers[-1].set_weights([np.asarray(kernel, "float32"), np.asarray(bias, "float32")])
    return model


def exact_radii():
    """(model, x, the distances of each pixel to its nearest boundary)."""
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(2, CLASSES)), rng.normal(size=CLASSES)
    model = linear_model(kernel, bias)
    kernel, bias = (to_numpy(w).astype("float64") for w in model.layers[-1].weights)
    x = rng.uniform(size=(4, 3, 3, 2)).astype("float32")
    logits = x.astype("float64") @ kernel + bias
    top = logits.argmax(axis=-1)
    margins = np.take_along_axis(logits, top[..., None], -1) - logits
    apart = np.linalg.norm(kernel.T[:, None] - kernel.T[None], axis=-1)
    with np.errstate(invalid="ignore"):
        ratios = margins / apart[top]
    return model, x, np.nanmin(ratios, axis=-1)


@pytest.mark.parametrize("arithmetic", ["real", "float64"])
def test_radii_of_pixels_are_those_of_the_nearest_boundary(arithmetic):
    model, x, exact = exact_radii()
    certificate = lip.certify(model, x, verbose=0, arithmetic=arithmetic)
    assert isinstance(certificate, DenseCertificate)
    assert (certificate.radii <= exact).all()
    np.testing.assert_allclose(certificate.radii, exact, rtol=1e-6)


def test_radii_in_float32_are_below_and_near():
    model, x, exact = exact_radii()
    radii = lip.certify(model, x, verbose=0, arithmetic="float32").radii
    assert (radii <= exact).all()
    np.testing.assert_allclose(radii, exact, atol=1e-4)


def test_a_1x1_convolution_is_the_same_head():
    model = dense_model()
    twin = dense_model(kl.Conv2D(CLASSES, 1))
    twin.layers[-1].set_weights(
        [
            w.reshape(twin.layers[-1].weights[0].shape) if w.ndim == 2 else w
            for w in model.layers[-1].get_weights()
        ]
    )
    for layer, other in zip(model.layers[1:-1], twin.layers[1:-1]):
        other.set_weights(layer.get_weights())
    x = images()
    one, other = (lip.certify(m, x, verbose=0) for m in (model, twin))
    np.testing.assert_allclose(one.radii, other.radii, rtol=1e-9)
    assert other.evidence.bound.head == twin.layers[-1].name


@pytest.mark.parametrize(
    "head",
    [
        lambda: kl.Conv2D(CLASSES, 3, padding="same"),
        lambda: kl.Conv2D(4, 1, groups=2),
        lambda: keras.Sequential([kl.Dense(CLASSES), kl.UpSampling2D(2)]),
        lambda: kl.TimeDistributed(kl.Dense(CLASSES)),
    ],
)
def test_what_acts_on_more_than_a_position_is_no_head(head):
    certificate = lip.certify(dense_model(head()), images(), verbose=0)
    assert certificate.evidence.bound.head is None
    assert certificate.constant == certificate.body_constant
    assert (certificate.radii > 0).any()


def attacked(model, x, target, radius, steps=15):
    """Inputs at distance `radius` at most that shrink `target(logits)` summed over a sample."""
    twin = Float64Twin(model)
    ascent = backend.compiled(
        lambda t: backend.gradient(lambda v: -target(twin.tensor(v)), t), twin.variables
    )
    column = np.reshape(radius, (-1, 1, 1, 1))

    def unit(v):
        return v / np.maximum(np.sqrt((v**2).sum(axis=(1, 2, 3), keepdims=True)), 1e-300)

    delta = column / 2 * unit(np.random.default_rng(0).normal(size=x.shape))
    for _ in range(steps):
        delta = delta + column / 4 * unit(twin.call(ascent, x + delta))
        delta = delta * np.minimum(
            1,
            column
            / np.maximum(
                np.linalg.norm(delta.reshape(len(x), -1), axis=1).reshape(column.shape), 1e-300
            ),
        )
    return x + delta, twin(x + delta)


def others_ahead(own):
    """Function of logits: the margin of each pixel, smaller the nearer it is to a flip."""

    def margins(logits):
        mine = keras.ops.sum(keras.ops.where(own, logits, 0), axis=-1)
        return mine - keras.ops.max(keras.ops.where(own, -np.inf, logits), axis=-1)

    return margins


def test_attacks_on_one_pixel_flip_it_beyond_and_not_inside_its_radius():
    model, x = dense_model(), images()
    certificate = lip.certify(model, x, verbose=0)
    pixels, factors = [(0, 0), (1, 2), (3, 3)], (0.999, 5.0)
    attacks = list(itertools.product(pixels, factors))
    chosen = np.zeros((len(attacks), *certificate.radii.shape), bool)
    for one, (pixel, _) in zip(chosen, attacks):
        one[:, *pixel] = True
    radii = np.stack([certificate.radii[:, *pixel] for pixel, _ in attacks])
    assert (radii > 0).all()
    own = certificate.predictions[..., None] == np.arange(CLASSES)
    own = np.concatenate([own] * len(attacks))

    def target(logits):
        margins = others_ahead(own)(logits)
        return keras.ops.sum(keras.ops.where(chosen.reshape(margins.shape), margins, 0.0))

    scaled = radii * [[factor] for _, factor in attacks]
    _, logits = attacked(model, np.concatenate([x] * len(attacks)), target, scaled)
    flipped = logits.argmax(axis=-1).reshape(chosen.shape) != certificate.predictions
    flips = 0
    for one, within, pixels, (_, factor) in zip(flipped, radii, chosen, attacks):
        if factor < 1:
            assert not one[certificate.radii >= within[:, None, None]].any()
        else:
            flips += one[pixels].sum()
    assert flips > 0  # the attack does its work


def test_attacks_on_all_pixels_leave_certified_ones_and_the_iou_alone():
    model, x = dense_model(), images(8)
    labels = lip.certify(model, x, verbose=0).predictions.copy()
    labels[:, 0] = (labels[:, 0] + 1) % CLASSES
    radii = lip.certify(model, x, verbose=0).radii
    epsilons = tuple(map(float, np.quantile(radii, (0.2, 0.5, 0.8))))
    certificate = lip.certify(model, x, labels, epsilons=epsilons, verbose=0)
    own = certificate.predictions[..., None] == np.arange(CLASSES)
    own = np.concatenate([own] * len(epsilons))
    all_kept = np.stack([certificate.radii > epsilon for epsilon in epsilons])

    def target(logits):
        margins = keras.ops.maximum(others_ahead(own)(logits), -0.05)
        return keras.ops.sum(keras.ops.where(all_kept.reshape(margins.shape), 0.0, margins))

    moved = np.concatenate([x] * len(epsilons))
    _, logits = attacked(model, moved, target, np.repeat(epsilons, len(x)))
    answers = logits.argmax(axis=-1).reshape(all_kept.shape)
    for epsilon, kept, predictions in zip(epsilons, all_kept, answers):
        assert kept.any()
        assert not kept.all()
        assert (predictions == certificate.predictions)[kept].all()
        found = least_mean_iou(predictions.ravel(), labels.ravel(), np.ones(labels.size, bool))
        assert certificate.certified_mean_iou[epsilon] <= found
        assert certificate.certified_accuracy[epsilon] <= (predictions == labels).mean()
    assert found < certificate.mean_iou  # the last attack did harm


def worst(predictions, labels, kept, classes):
    """Mean IoU over the classes of the labels, the smallest of all that can become of the rest."""
    present, free = np.unique(labels), np.flatnonzero(~kept)
    least = np.inf
    for choice in itertools.product(range(classes), repeat=len(free)):
        found = predictions.copy()
        found[free] = choice
        both = [((found == c) & (labels == c)).sum() for c in present]
        either = [((found == c) | (labels == c)).sum() for c in present]
        least = min(least, np.mean(np.divide(both, either)))
    return least


@pytest.mark.once
@pytest.mark.parametrize("seed", range(60))
def test_iou_is_a_lower_bound_near_the_worst_of_all_masks(seed):
    rng = np.random.default_rng(seed)
    size, classes = rng.integers(3, 16), rng.integers(2, 4)
    labels, predictions = rng.integers(0, classes, (2, size))
    predictions = np.where(rng.random(size) < 0.6, labels, predictions)
    kept = np.ones(size, bool)
    kept[rng.permutation(size)[: rng.integers(0, 7)]] = False
    exact = worst(predictions, labels, kept, classes)
    bound = least_mean_iou(predictions, labels, kept)
    assert bound <= exact + 1e-12
    # Positions are whole, the bound's may be shared between classes.
    assert bound >= exact - 0.05


@pytest.mark.once
def test_iou_counts_what_is_not_certified_in_the_union_of_others():
    labels, predictions = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1])
    kept = np.array([True, True, False, True])
    # (2 / 3 + 1 / 2) / 2: the third pixel is missing from class 0 and comes to class 1.
    found = least_mean_iou(predictions, labels, kept)
    np.testing.assert_allclose(found, 7 / 12, rtol=1e-9)
    assert least_mean_iou(predictions, labels, np.ones(4, bool)) == 1.0
    assert least_mean_iou(predictions, labels, np.zeros(4, bool)) == 0.0


def test_rounding_is_subtracted_at_each_position():
    """Biases of 1e6 leave margins of some 1e-10 that mean nothing."""
    bias = [1e6, 1e6, 0.0]
    model = linear_model([[1.0, 1.0, 0.0]], bias)
    model.layers[-1].kernel.assign([[1.0, np.float32(1 + 2**-23), 0.0]])
    x = np.full((2, 3, 3, 1), 2.0**-12, "float32")
    certificate = lip.certify(model, x, verbose=0, arithmetic="real")
    assert (certificate.radii == 0).all()
    assert (certificate.error_allowances > 1e-10).all()


def test_ignored_labels_count_nowhere():
    model, x = dense_model(), images()
    plain = lip.certify(model, x, verbose=0)
    labels = plain.predictions.copy()
    labels[:, 1:] = 255
    certificate = lip.certify(model, x, labels, epsilons=(0.05,), verbose=0, ignore_class=255)
    assert certificate.clean_accuracy == certificate.mean_iou == 1.0
    share = float((plain.radii[:, 0] > 0.05).mean())
    assert certificate.certified_accuracy == {0.05: share}
    assert {row["class"] for row in certificate.per_class} <= set(range(CLASSES))
    with pytest.raises(ValueError, match="none is left to count"):
        lip.certify(model, x, np.full(labels.shape, 255), verbose=0, ignore_class=255)
    with pytest.raises(ValueError, match="whole numbers from 0 to 2"):
        lip.certify(model, x, labels, verbose=0)


def test_labels_of_positions_in_every_form():
    model, x = dense_model(), images()
    labels = lip.certify(model, x, verbose=0).predictions
    for form in (labels, labels[..., None], np.eye(CLASSES)[labels]):
        assert lip.certify(model, x, form, verbose=0).clean_accuracy == 1.0
    with pytest.raises(ValueError, match=r"Received: shape=\(4, 4\)"):
        lip.certify(model, x, labels[:, 0], verbose=0)


def test_inputs_that_are_not_finite_have_no_answer_anywhere():
    x = images()
    x[1, 0, 0] = np.nan
    certificate = lip.certify(dense_model(), x, verbose=0)
    assert (certificate.predictions[1] == -1).all()
    assert (certificate.radii[1] == 0).all()
    assert (certificate.predictions[[0, 2, 3]] >= 0).all()
    assert certificate.unanswered == certificate.inputs_not_finite == 1


def binary_model(units=1, **settings):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = ll.BetaAbs(0.5)(ll.OrthogonalDense(8)(inputs))
    return keras.Model(inputs, kl.Dense(units, bias_initializer="normal", **settings)(x))


def vectors(count=6):
    return np.random.default_rng(2).normal(size=(count, 4)).astype("float32")


@pytest.mark.filterwarnings("ignore:Inputs range")
def test_one_logit_decides_as_two_classes_do():
    model, x = binary_model(), vectors()
    kernel, bias = model.layers[-1].get_weights()
    two = keras.Model(model.inputs, kl.Dense(2)(model.layers[-2].output))
    two.layers[-1].set_weights([np.pad(kernel, ((0, 0), (1, 0))), np.pad(bias, (1, 0))])
    y = (model.predict(x, verbose=0) > 0).astype(int)
    for arithmetic in ("real", "float64", "float32"):
        one = lip.certify(model, x, y, verbose=0, arithmetic=arithmetic)
        other = lip.certify(two, x, y[:, 0], verbose=0, arithmetic=arithmetic)
        assert type(one) is lip.certification.Certificate
        assert one.clean_accuracy == 1
        np.testing.assert_array_equal(one.predictions, other.predictions)
        np.testing.assert_allclose(one.radii, other.radii, rtol=1e-12)
    logits = np.abs(Float64Twin(model)(x)[:, 0])
    exact = logits / np.linalg.norm(kernel.astype("float64")) / one.body_constant
    np.testing.assert_allclose(one.radii, exact, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Inputs range")
def test_independent_labels_are_as_many_models_of_one_logit():
    model, x = binary_model(3), vectors()
    y = np.random.default_rng(0).integers(0, 2, (6, 3))
    certificate = lip.certify(model, x, y, (0.05, 0.2), verbose=0, task="multilabel")
    assert isinstance(certificate, LabelsCertificate)
    kernel, bias = model.layers[-1].get_weights()
    for k in range(3):
        single = keras.Model(model.inputs, kl.Dense(1)(model.layers[-2].output))
        single.layers[-1].set_weights([kernel[:, [k]], bias[[k]]])
        one = lip.certify(single, x, y[:, k], (0.05, 0.2), verbose=0)
        np.testing.assert_array_equal(certificate.predictions[:, k], one.predictions)
        np.testing.assert_allclose(certificate.radii[:, k], one.radii, rtol=1e-12)
        assert certificate.per_label[k]["certified_accuracy"] == one.certified_accuracy
    right = certificate.predictions == y
    expected = (right & (certificate.radii > 0.05)).all(axis=1).mean()
    assert certificate.certified_set_accuracy[0.05] == expected
    assert certificate.set_accuracy == right.all(axis=1).mean()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "relu"])
def test_decisions_at_0_are_of_logits(activation):
    with pytest.raises(ValueError, match="certify the model of the logits in front of it"):
        lip.certify(binary_model(activation=activation), vectors(), verbose=0)
    with pytest.raises(ValueError, match="certify the model of the logits in front of it"):
        model = keras.Sequential([binary_model(2), kl.Activation(activation)])
        lip.certify(model, vectors(), verbose=0, task="multilabel")


@pytest.mark.parametrize(
    "behind",
    [
        lambda: [kl.Activation("linear", dtype="float32")],
        lambda: [kl.Dropout(0.1), kl.Identity()],
        lambda: [kl.Reshape((1, 1))],
        lambda: [kl.Reshape((1, 1, 1)), kl.UpSampling2D(2), kl.AveragePooling2D(2)],
    ],
    ids=["linear", "dropout", "reshape", "upsampling"],
)
def test_what_passes_a_sigmoid_on_does_not_hide_it(behind):
    model = keras.Sequential([binary_model(activation="sigmoid"), *behind()])
    with pytest.raises(ValueError, match="certify the model of the logits in front of it"):
        lip.certify(model, vectors(), verbose=0)


def test_a_wrapper_does_not_hide_a_sigmoid():
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, kl.TimeDistributed(kl.Dense(1, activation="sigmoid"))(inputs))
    with pytest.raises(ValueError, match="certify the model of the logits in front of it"):
        lip.certify(model, np.zeros((2, 3, 4), "float32"), verbose=0)


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="no such convolution on CPUs")
def test_channels_first_are_not_read_along_the_width():
    inputs = keras.Input((3, 4, 4))
    model = keras.Model(inputs, kl.Conv2D(5, 1, data_format="channels_first")(inputs))
    x = np.zeros((2, 3, 4, 4), "float32")
    with pytest.raises(ValueError, match=r"keras\.layers\.Permute"):
        lip.certify(model, x, verbose=0)
    last = keras.Model(inputs, kl.Permute((2, 3, 1))(model.output))
    assert lip.certify(last, x, verbose=0).predictions.shape == (2, 4, 4)


def test_void_positions_are_integers():
    model, x = dense_model(), images()
    y = lip.certify(model, x, verbose=0).predictions
    hot = np.eye(CLASSES)[y]
    for void in (0.0, np.nan, -1.0):
        hot[0, 0, 0] = void
        with pytest.raises(ValueError, match="rows that are of no class"):
            lip.certify(model, x, hot, verbose=0, ignore_class=255)
    for wrong in ("void", 0.5, True, [0, 1]):
        with pytest.raises(ValueError, match="is a whole number"):
            lip.certify(model, x, y, verbose=0, ignore_class=wrong)


def test_what_is_refused():
    x = images()
    for arguments, message in [
        ({"lipschitz": "eclipse_fast"}, "lipschitz='product'"),
        ({"lipschitz": "local_lipschitz"}, "lipschitz='product'"),
        ({"task": "dense"}, "task='dense'"),
    ]:
        with pytest.raises(ValueError, match=message):
            lip.certify(dense_model(), x, verbose=0, **arguments)
    with pytest.raises(ValueError, match="`ignore_class` is for the positions"):
        lip.certify(binary_model(2), vectors(), verbose=0, ignore_class=0)
    with pytest.raises(ValueError, match="in the shape of the logits"):
        lip.certify(binary_model(2), vectors(), np.zeros(6), verbose=0, task="multilabel")


def test_images_of_two_sizes_are_refused():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, kl.Dense(CLASSES)(inputs))
    batches = [images(2, side) for side in (3, 4)]
    with pytest.raises(ValueError, match="images of each size by themselves"):
        lip.certify(model, iter(batches), verbose=0)


def test_shares_at_each_position_are_left_out():
    model = dense_model()
    shares = keras.Model(model.inputs, kl.Softmax()(model.outputs[0]))
    one, other = (lip.certify(m, images(), verbose=0, arithmetic="real") for m in (model, shares))
    np.testing.assert_array_equal(one.radii, other.radii)
    assert "softmax" in other.evidence.bound.notes[0]


def test_a_model_that_answers_otherwise_is_refused():
    model, x = dense_model(), images()
    evaluation = Evaluation(read(model), CLASSES)
    evaluation(x, len(x))
    own = evaluation.own_answers(model, x)
    evaluation.compare(model, x, own)
    own = own.copy()
    own[-1, -1, -1] += np.array([0.0, 0.5, 1.0]) * (1 if accelerated.ON_CPU else 1e4)
    with pytest.raises(ValueError, match="are not those of its evaluation in float64"):
        evaluation.compare(model, x, own)


@pytest.mark.once
def test_reports(tmp_path):
    model, x = dense_model(), images()
    labels = np.random.default_rng(0).integers(0, CLASSES, (4, 4, 4))
    certificate = lip.certify(model, x, labels, epsilons=(0.1,), verbose=0)
    text = str(certificate)
    assert "mean IoU, certified at epsilon = 0.1" in text
    assert "below the position's radius" in text
    certificate.to_json(tmp_path / "c.json", samples=True)
    assert "certified_mean_iou" in (tmp_path / "c.json").read_text()
    assert "mean IoU" in certificate.to_markdown()
    certificate.plot(tmp_path / "curve.png")
    certificate.plot_radii(tmp_path / "radii.png")
    certificate.plot_maps(tmp_path / "maps.png")
    with pytest.raises(ValueError, match="has no HTML page"):
        certificate.to_html(tmp_path / "c.html")


def merely_missing(predictions, labels, kept):
    """The IoU with what is not certified missing from its class, and in no other's union."""
    return np.mean(
        [
            (kept & (predictions == c) & (labels == c)).sum()
            / ((kept & (predictions == c)) | (labels == c)).sum()
            for c in np.unique(labels)
        ]
    )


MUTANTS = {
    "merely_missing": lambda patch: patch.setitem(globals(), "least_mean_iou", merely_missing),
    "heads_of_unit_norm": lambda patch: patch.setattr(
        decisions, "pairwise_distances_float64", lambda k: np.full((k.shape[1],) * 2, 1e-2)
    ),
    "rounding_dropped": lambda patch: patch.setattr(
        Evaluation, "allowances", lambda self, inputs, logits, *rest: np.zeros(logits.shape)
    ),
}


@pytest.mark.once
@pytest.mark.parametrize(
    ("mutant", "detector"),
    [
        ("heads_of_unit_norm", test_attacks_on_one_pixel_flip_it_beyond_and_not_inside_its_radius),
        ("heads_of_unit_norm", test_radii_in_float32_are_below_and_near),
        ("merely_missing", test_iou_counts_what_is_not_certified_in_the_union_of_others),
        ("rounding_dropped", test_rounding_is_subtracted_at_each_position),
    ],
)
def test_mutants_are_caught(mutant, detector, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        detector()
