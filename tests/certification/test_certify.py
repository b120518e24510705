import itertools

import keras
import numpy as np
import pytest
from data import dense_model, small_lipnext, to_numpy
from random_nets import gradients

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.radius import certified_radii_float64, pairwise_distances_float64
from keras_lipnext.twin import Float64Twin


@pytest.fixture(scope="module")
def certified(trained, digits):
    _, (x, y) = digits
    return lip.certify(trained, x, y, epsilons=(0.05, 0.1), verbose=0), x, y


def test_radii_follow_the_per_pair_rule(certified, trained):
    certificate, x, _ = certified
    logits = Float64Twin(trained)(x)
    kernel = np.asarray(to_numpy(trained.head.kernel), "float64")
    for i in range(0, len(x), 29):
        k = logits[i].argmax()
        nominal = min(
            (logits[i, k] - logits[i, j]) / np.linalg.norm(kernel[:, k] - kernel[:, j])
            for j in range(10)
            if j != k
        )
        assert certificate.predictions[i] == k
        allowance = certificate.error_allowances[i] / (2**0.5 * 0.1)
        exact = nominal / certificate.body_constant
        assert exact - allowance <= certificate.radii[i] <= exact
        # The proof of K costs less than 0.01 % of the radius.
        assert nominal * (1 - 1e-4) < certificate.radii[i] <= nominal


def test_accuracies(certified):
    certificate, _, y = certified
    correct = certificate.predictions == y
    assert certificate.clean_accuracy == correct.mean() > 0.8
    for epsilon in (0.05, 0.1):
        share = (correct & (certificate.radii > epsilon)).mean()
        assert certificate.certified_accuracy[epsilon] == share
        assert 0.2 < share < certificate.clean_accuracy


def stemless_lipnext():
    """What follows the stem, whose 16 channels outnumber the 4 pixels of a patch."""
    inputs = keras.Input((4, 5, 16))
    x = inputs
    for _ in range(4):
        x = lip.layers.LipNeXtBlock(1 / 8)(x)
    return lip.CertifiableModel(inputs, lip.layers.NormalizedDense(6)(lip.layers.L2Pool()(x)))


def difference_slopes(model, x, orthogonal=False):
    """{(i, j): gradient norms of z_i - z_j, shape (samples,)} in float64."""
    twin = Float64Twin(model)
    if orthogonal:  # float32 kernels are orthonormal to 1e-7 only
        with backend.float64_scope():
            for kernel in twin.variables:
                if isinstance(kernel.constraint, lip.manifolds.Stiefel):
                    kernel.assign(lip.manifolds.stiefel.projx(kernel))
    slopes = gradients(twin, x, np.eye(model.output_shape[-1])).reshape(-1, len(x), x[0].size)
    pairs = itertools.combinations(range(len(slopes)), 2)
    return {(i, j): np.linalg.norm(slopes[i] - slopes[j], axis=1) for i, j in pairs}


def head_distances(model):
    kernel = np.asarray(to_numpy(model.head.kernel), "float64")
    return np.linalg.norm(kernel[:, :, None] - kernel[:, None, :], axis=0)


@pytest.mark.parametrize("make", [stemless_lipnext, dense_model])
def test_gradient_equality(make):
    """An orthogonal network preserves gradients exactly: constants neither too large nor small.

    In float64, behind the stem: |grad(z_i - z_j)| = |w_i - w_j| at random inputs, every pair.
    """
    model = make()
    x = np.random.default_rng(0).normal(size=(3, *model.input_shape[1:]))
    for pair, norms in difference_slopes(model, x, orthogonal=True).items():
        np.testing.assert_allclose(norms / head_distances(model)[pair], 1, rtol=1e-12)


def test_local_slopes_stay_below_the_constant(trained, digits):
    """At trained points too, of the network as it is stored."""
    x = digits[1][0][:10]
    for pair, norms in difference_slopes(trained, x).items():
        limit = trained.lipschitz_bound().body_constant * head_distances(trained)[pair]
        assert (norms <= limit * (1 + 1e-12)).all()


def affine_truth():
    """Biases so large that abs never fires make the network affine: distances are known."""
    model = dense_model()
    for layer in model.layers:
        if isinstance(layer, lip.layers.OrthogonalDense):
            layer.bias.assign(np.full(6, 50.0))
    twin = Float64Twin(model)
    offset = twin(np.zeros((1, 6)))[0]
    matrix = np.stack([twin(np.eye(6)[[i]])[0] - offset for i in range(6)])
    return model, twin, matrix


def test_ground_truth_in_the_affine_regime():
    model, twin, matrix = affine_truth()
    x = np.random.default_rng(0).normal(size=(50, 6))
    certificate = lip.certify(model, x, verbose=0)
    logits = twin(x)
    for i in range(50):
        k = certificate.predictions[i]
        margins = logits[i, k] - logits[i]
        normals = matrix[:, [k]] - matrix
        with np.errstate(invalid="ignore"):
            distances = margins / np.linalg.norm(normals, axis=0)
        distances[k] = np.inf
        truth = distances.min()
        assert certificate.radii[i] <= truth
        assert certificate.radii[i] == pytest.approx(truth, rel=2e-6)
        # A step of 1.0001 radii straight to the nearest other class flips the prediction.
        j = distances.argmin()
        step = normals[:, j] / np.linalg.norm(normals[:, j])
        across = x[i] - 1.0001 * certificate.radii[i] * step
        short = x[i] - 0.9999 * certificate.radii[i] * step
        assert twin(across[None]).argmax() == j
        assert twin(short[None]).argmax() == k


@pytest.mark.slow
def test_pgd_finds_no_flip_inside_and_some_outside(certified, trained):
    certificate, x, _ = certified
    x, radii, predictions = x[:150], certificate.radii[:150], certificate.predictions[:150]
    inside, adversarial = lip.certification.pgd(trained, x, predictions, 0.999 * radii)
    assert not inside.any()
    moved = np.linalg.norm((adversarial - x).reshape(150, -1), axis=1)
    np.testing.assert_allclose(moved, 0.999 * radii, rtol=1e-6)
    outside, _ = lip.certification.pgd(trained, x, predictions, 3 * radii)
    assert outside.mean() > 0.9


MUTANTS = {
    "one layer x 1.001": lambda w: w * 1.001,
    "one entry + 0.05": lambda w: w + 0.05 * np.eye(*w.shape)[:, ::-1],
    "noise 1e-3": lambda w: w + 1e-3 * np.random.default_rng(0).normal(size=w.shape),
    "x 3": lambda w: 3 * w,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("part", ["mixing", "dense"])
def test_weights_off_the_manifold_raise_the_constant(name, part):
    """What a mutant does to a kernel, K must show: the local slope never exceeds K."""
    model = small_lipnext()
    layer = getattr(model.get_layer("block_1"), part)
    before = model.lipschitz_bound().body_constant
    kernel = np.asarray(layer.get_weights()[0])
    mutant = MUTANTS[name](kernel).astype("float32")
    layer.kernel.assign(mutant)
    bound = model.lipschitz_bound().body_constant
    assert bound > before + 1e-6
    if part == "dense":
        norm = np.linalg.norm(mutant.astype("float64"), 2)
        assert bound == pytest.approx(before * norm, rel=1e-5)
    x = np.random.default_rng(0).random((5, 8, 8, 1))
    for pair, norms in difference_slopes(model, x).items():
        assert norms.max() <= bound * head_distances(model)[pair] * (1 + 1e-12)


def test_an_unnormalised_head_keeps_its_radii():
    """Radii depend on the classifier, not on the scale of its head."""
    model = dense_model()
    x = np.random.default_rng(0).normal(size=(20, 6))
    before = lip.certify(model, x, verbose=0).radii
    for weight in model.head.weights:
        weight.assign(4 * weight)
    np.testing.assert_allclose(lip.certify(model, x, verbose=0).radii, before, rtol=1e-12)


def test_adding_a_constant_to_all_logits_changes_nothing():
    model = dense_model()
    x = np.random.default_rng(0).normal(size=(20, 6))
    before = lip.certify(model, x, verbose=0).radii
    model.head.bias.assign(to_numpy(model.head.bias) + 8.0)
    np.testing.assert_allclose(lip.certify(model, x, verbose=0).radii, before, rtol=1e-10)


def test_class_permutation():
    model = dense_model()
    x = np.random.default_rng(0).normal(size=(20, 6))
    before = lip.certify(model, x, verbose=0)
    order = np.array([2, 0, 3, 1])
    kernel, bias = model.head.get_weights()
    model.head.set_weights([kernel[:, order], bias[order]])
    after = lip.certify(model, x, verbose=0)
    np.testing.assert_array_equal(order[after.predictions], before.predictions)
    np.testing.assert_allclose(after.radii, before.radii, rtol=1e-12)


def test_circular_translation_of_a_model_without_position():
    model = small_lipnext()
    x = np.random.default_rng(0).random((10, 8, 8, 1))
    moved = np.roll(x, (2, 4), axis=(1, 2))  # whole patches
    radii = [lip.certify(model, v, verbose=0).radii for v in (x, moved)]
    np.testing.assert_allclose(*radii, rtol=1e-10)


def test_without_a_linear_head_the_constant_covers_the_logits():
    inputs = keras.Input((6,))
    outputs = lip.layers.MaxMin()(lip.layers.OrthogonalDense(6)(inputs))
    model = keras.Model(inputs, outputs)
    x = np.random.default_rng(0).normal(size=(20, 6))
    certificate = lip.certify(model, x, verbose=0)
    logits = np.sort(Float64Twin(model)(x), axis=1)
    expected = (logits[:, -1] - logits[:, -2]) / (np.sqrt(2) * certificate.body_constant)
    np.testing.assert_allclose(certificate.radii, expected, rtol=1e-10)


def test_ties_and_non_finite_weights():
    model = dense_model()
    x = np.random.default_rng(0).normal(size=(5, 6))
    model.head.bias.assign([np.nan, 0, 0, 0])
    certificate = lip.certify(model, x, np.zeros(5, int), verbose=0)
    assert (certificate.radii == 0).all()
    assert certificate.clean_accuracy == 0
    model.head.kernel.assign(np.full((6, 4), np.nan))
    with pytest.raises(ValueError, match="has weights that are NaN or infinite"):
        lip.certify(model, x, verbose=0)


def test_equal_weight_vectors_have_radius_zero():
    """Their margin is rounding, however the backend sums: it must not look like infinity."""
    inputs = keras.Input((33,))
    model = lip.CertifiableModel(inputs, lip.layers.NormalizedDense(3)(inputs))
    column = np.random.default_rng(0).normal(size=(33, 1))
    model.set_weights([np.repeat(column / np.linalg.norm(column), 3, axis=1), np.zeros(3)])
    x = np.random.default_rng(1).normal(size=(64, 33))
    for batch_size in (1, 7, 64):
        assert lip.certify(model, x, batch_size=batch_size, verbose=0).radii.max() == 0


def test_the_sqrt_2_rule_would_be_unsound():
    """The per-pair rule is not margin / (sqrt(2) K max|w|), which overstates opposed classes."""
    logits, kernel = np.array([[1.0, -1.0]]), np.array([[1.0, -1.0]])
    _, radii, _ = certified_radii_float64(logits, pairwise_distances_float64(kernel))
    assert radii[0] == pytest.approx(1.0)  # x = 1 reaches the boundary at 0
    assert radii[0] < 2 / np.sqrt(2)
