"""LipNeXt of series and volumes: shapes, training, certificates, attacks, saved files."""

import keras
import numpy as np
import pytest
from data import called, small_lipnext

import keras_lipnext as lip
from keras_lipnext.models.architecture import default_patch_size

SHAPES = {1: (12, 2), 3: (4, 4, 8, 1)}
NECKS = ({}, {"neck": "patches", "neck_patch_size": 2})


def waves(shape, count=192, seed=0):
    """Samples of two classes that differ in their slope along the first axis: (x, y)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, count)
    ramp = np.linspace(-0.4, 0.4, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = 0.5 + ramp * (2 * y - 1).reshape(-1, *[1] * len(shape)) * np.ones(shape)
    return (x + rng.normal(0, 0.05, x.shape)).astype("float32"), y


def model_of(shape, **kwargs):
    keras.utils.set_random_seed(1)
    return small_lipnext(input_shape=shape, num_classes=2, **kwargs)


@pytest.mark.parametrize(
    "spatial, options",
    [
        *zip(SHAPES, NECKS, strict=True),
        *(pytest.param(*pair, marks=pytest.mark.once) for pair in zip(SHAPES, reversed(NECKS))),
    ],
    ids=str,
)
def test_it_trains_and_is_certified(spatial, options, tmp_path):
    """Constants of 1, radii that PGD does not break, and breaks beyond, the same from files."""
    shape = SHAPES[spatial]
    (x, y), (x_test, y_test) = waves(shape), waves(shape, 32, seed=1)
    model = model_of(shape, depth=1, epsilon=0.1, **options)
    before = model.get_weights()
    model.fit(x, y, epochs=4, batch_size=32, verbose=0)
    for old, new, weight in zip(before, model.get_weights(), model.weights, strict=True):
        assert not np.array_equal(old, new), weight.path
    bound = model.lipschitz_bound()
    assert all(layer.proven for layer in bound.layers)
    certificate = model.certify(x_test, y_test, epsilons=[0.1], verbose=0)
    assert certificate.body_constant == pytest.approx(1, abs=2e-6)
    assert certificate.clean_accuracy > 0.9
    assert certificate.certified_accuracy[0.1] > 0.5
    inside, _ = lip.certification.pgd(
        model, x_test, certificate.predictions, 0.999 * certificate.radii
    )
    beyond, _ = lip.certification.pgd(model, x_test, certificate.predictions, 3 * certificate.radii)
    assert not inside.any()
    assert beyond.mean() > 0.5
    float32 = model.certify(x_test, y_test, verbose=0, arithmetic="float32")
    assert (float32.radii <= certificate.radii).all() and float32.radii.max() > 0.05

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    again = loaded.certify(x_test, y_test, verbose=0)
    assert again.evidence.weights_hash == certificate.evidence.weights_hash
    np.testing.assert_array_equal(again.radii, certificate.radii)
    loaded.fit(x[:32], y[:32], verbose=0)

    model.save_to_preset(tmp_path / "preset", certificate)
    preset = lip.LipNeXt.from_preset(tmp_path / "preset")
    np.testing.assert_array_equal(preset.certify(x_test, verbose=0).radii, certificate.radii)


@pytest.mark.parametrize(
    "spatial, options",
    [
        (1, NECKS[0]),
        (3, NECKS[1]),
        (1, {"output": "dense"}),
        pytest.param(1, NECKS[1], marks=pytest.mark.once),
        pytest.param(3, NECKS[0], marks=pytest.mark.once),
        pytest.param(3, {"output": "dense"}, marks=pytest.mark.once),
    ],
    ids=str,
)
def test_channels_first_is_the_same_function(spatial, options):
    shape = SHAPES[spatial]
    x = np.random.default_rng(0).random((5, *shape)).astype("float32")
    last = model_of(shape, depth=1, **options)
    first = model_of((shape[-1], *shape[:-1]), data_format="channels_first", depth=1, **options)
    rng = np.random.default_rng(1)
    weights = [
        rng.normal(size=w.shape) if "bias" in v.path else w
        for v, w in zip(last.weights, last.get_weights())
    ]
    last.set_weights(weights)
    first.set_weights([np.reshape(w, v.shape) for w, v in zip(weights, first.weights)])
    moved = np.moveaxis(x, -1, 1)
    assert first.output_shape == last.output_shape
    np.testing.assert_allclose(called(first, moved), called(last, x), atol=1e-5)
    constants = [lip.lipschitz_bound(m).body_constant for m in (first, last)]
    assert constants == pytest.approx([1, 1], abs=4e-6)


@pytest.mark.parametrize("spatial", SHAPES)
def test_the_reduced_model_is_the_same_function(spatial):
    shape = SHAPES[spatial]
    model = model_of(shape, depth=1, mixing="full", padding="zero")
    reduced = model.reduced()
    assert tuple(reduced.get_layer("block_0").mixing.kernel.shape) == (16, 2 * spatial * 2)
    x = np.random.default_rng(0).random((5, *shape)).astype("float32")
    np.testing.assert_allclose(called(reduced, x), called(model, x), atol=2e-5)
    radii = [m.certify(x, verbose=0).radii for m in (model, reduced)]
    np.testing.assert_allclose(*radii, atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize(
    "options",
    [*NECKS, {"mixing": "full", "dense_depth": 1}, {"output": "dense", "dense_depth": 1}],
    ids=str,
)
def test_estimates_are_exact(spatial, options):
    arguments = {"input_shape": SHAPES[spatial], "depth": 2, "width": 16, "num_classes": 3}
    found = lip.LipNeXt.estimate(patch_size=2, **arguments, **options)
    model = lip.LipNeXt(patch_size=2, **arguments, **options)
    assert found.parameters == model.count_params()
    model.optimizer.build(model.trainable_variables)
    state = sum(4 * np.prod(v.shape) for v in model.optimizer.variables if len(v.shape))
    assert found.optimizer_bytes == state


@pytest.mark.parametrize(
    "policy, spatial, options",
    [
        ("mixed_bfloat16", 1, NECKS[1]),
        ("mixed_float16", 3, NECKS[0]),
        pytest.param("mixed_float16", 1, NECKS[0], marks=pytest.mark.once),
        pytest.param("mixed_bfloat16", 3, NECKS[1], marks=pytest.mark.once),
    ],
    ids=str,
)
def test_mixed_precision(policy, spatial, options):
    x, y = waves(SHAPES[spatial], 32)
    remat = policy == "mixed_float16" and keras.backend.backend() != "jax"
    model = model_of(SHAPES[spatial], depth=1, dtype=policy, remat=remat, **options)
    model.fit(x, y, verbose=0)
    assert keras.backend.standardize_dtype(model(x[:2]).dtype) == "float32"
    assert model.certify(x, y, verbose=0).body_constant == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize(
    "sides, units, finer, patch",
    [
        ((128,), 64, 1, 4),
        ((128,), 3, 1, 2),
        ((96,), 64, 4, 2),
        ((1000,), 64, 1, 40),
        ((28, 28, 28), 1024, 1, 4),
        ((28, 28, 28), 1024, 4, 2),
        ((5, 3, 4), 64, 1, 1),
        ((224, 224), 1024, 4, 4),
        ((28, 28), 64, 4, 2),
    ],
)
def test_default_patch_sizes(sides, units, finer, patch):
    assert default_patch_size(sides, 1, units, finer) == patch


def test_the_temperature_follows_the_number_of_positions():
    found = {s: model_of(shape).loss.temperature for s, shape in SHAPES.items()}
    assert found[1] == pytest.approx(128 / np.sqrt(12))
    assert found[3] == pytest.approx(128 / np.sqrt(128))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"input_shape": (8,)},
            r"\(length, channels\), \(height, width, channels\), \(depth",
        ),
        ({"input_shape": (2, 2, 2, 2, 1)}, r"of series, images, volumes. Received: input_shape="),
        ({"input_shape": (None, 1)}, r"needs a known length and number of channels of its series"),
        ({"input_shape": (4, None, 4, 1)}, r"known depth, height, width and number of channels"),
        ({"input_shape": (8, 1), "shift_ratio": 0.6}, r"`ratio`.*\(0, 1/2\]"),
        ({"input_shape": (8, 8, 8, 1), "shift_ratio": 1 / 4}, r"\(0, 1/6\] for volumes. Received"),
        ({"input_shape": (9, 1)}, r"series with patches of 2 positions. Received: length=9"),
        ({"input_shape": (8, 99), "patch_size": None}, r"series' number of channels, 99"),
        (
            {"input_shape": (8, 1), "neck": "patches", "neck_patch_size": 3},
            r"patches of 3 positions.*map of 4 \(series of 8, patch_size=2\). Choose one of 1, 2,",
        ),
    ],
)
@pytest.mark.parametrize("make", [small_lipnext, lip.LipNeXt.estimate])
def test_bad_arguments(make, arguments, message):
    sizes = {"depth": 2, "width": 16, "patch_size": 2}
    with pytest.raises(ValueError, match=message):
        make(**(sizes | arguments))


def test_channels_in_front_are_pointed_out():
    with pytest.warns(UserWarning, match=r"looks like channels_first.*series of 128 channels.*"):
        lip.LipNeXt(input_shape=(1, 128), depth=1, width=128, patch_size=1, num_classes=2)


def test_series_are_not_for_sll_nets():
    with pytest.raises(ValueError, match=r"`input_shape` is \(height, width, channels\), or "):
        lip.SLLNet(input_shape=(8, 1))
