"""What stands between the blocks and the head: shapes, certificates, training, saved files."""

import keras
import numpy as np
import pytest
from data import called, small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext.models.necks import default_patch_size

BEFORE = ["image", "centre", "patch_embedding", "block_0", "block_1"]
OPTIONS = {"epochs": 2, "batch_size": 32, "verbose": 0}
NECKS = [
    {"neck": "patches"},
    {"neck": "patches", "neck_width": 24, "neck_patch_size": 1, "dense_depth": 2},
    {"neck": "patches", "neck_patch_size": 4, "dense_depth": 0},
    {"neck": "pool", "dense_depth": 2, "neck_width": 24},
]


def kernels(model):
    return {v.path: tuple(v.shape) for v in model.weights if v.path.endswith("kernel")}


def test_the_papers_form_keeps_its_layers():
    model = small_lipnext(neck="pool")
    assert [layer.name for layer in model.layers] == [*BEFORE, "pool", "head"]
    config = model.get_config()
    assert (config["neck"], config["dense_depth"]) == ("pool", 0)
    assert config["neck_width"] is config["neck_patch_size"] is None


@pytest.mark.once
def test_the_default_is_patches_where_that_was_measured_and_else_the_papers_form():
    for options in ({"size": "tiny"}, {"size": "small"}, {"depth": 2, "width": 16}):
        options |= {"input_shape": (8, 8, 1), "num_classes": 10}
        model = lip.LipNeXt(**options, name="model")
        patches = lip.LipNeXt(**options, neck="patches", name="model")
        assert model.get_config() == patches.get_config()
        assert lip.LipNeXt.estimate(**options).parameters == model.count_params()
    for size in ("base", "large", "1b", "2b"):
        pooled, patches, default = (
            lip.LipNeXt.estimate(size, neck=neck).parameters for neck in ("pool", "patches", None)
        )
        assert default == pooled < patches


@pytest.mark.parametrize(
    "options, shapes",
    list(
        zip(
            NECKS,
            [
                {"neck": (64, 32), "dense_0": (128, 32), "head": (32, 10)},
                {"neck": (16, 24), "dense_0": (384, 24), "dense_1": (24, 24), "head": (24, 10)},
                {"neck": (256, 32), "head": (32, 10)},
                {"dense_0": (16, 24), "dense_1": (24, 24), "head": (24, 10)},
            ],
        )
    ),
    ids=str,
)
def test_shapes(options, shapes):
    model = small_lipnext(**options)
    found = {path.removesuffix("/kernel"): shape for path, shape in kernels(model).items()}
    assert {name: found[name] for name in found if name not in BEFORE and "/" not in name} == (
        shapes
    )
    x = np.zeros((3, 8, 8, 1), "float32")
    assert model(x).shape == (3, 10)
    vector = model.layers[-1].input
    assert tuple(vector.shape) == (None, shapes["head"][0])
    activations = [layer for layer in model.layers if isinstance(layer, lip.layers.BetaAbs)]
    assert len(activations) == len(shapes) - 1
    assert {layer.beta for layer in activations} == {0.75}


@pytest.mark.parametrize(
    "sides, side",
    [((8, 8), 4), ((16, 16), 4), ((14, 14), 7), ((7, 7), 7), ((4, 6), 2), ((1, 1), 1)],
)
def test_default_patches(sides, side):
    """Those of the fewest weights, which are counted here."""

    def weights(s):
        return s**2 * 128 * 256 + sides[0] * sides[1] // s**2 * 256**2

    assert default_patch_size(sides, 128, 256) == side
    fitting = [s for s in range(1, 17) if sides[0] % s == sides[1] % s == 0]
    assert weights(side) == min(map(weights, fitting))


def test_the_neck_of_a_wide_network_does_not_outgrow_its_blocks():
    plain, patches = (lip.LipNeXt.estimate("1b", neck=neck) for neck in ("pool", "patches"))
    assert plain.parameters < patches.parameters < 1.5 * plain.parameters


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_patches_are_what_slices_of_the_map_are(data_format):
    first = data_format == "channels_first"
    shape = (1, 8, 12) if first else (8, 12, 1)
    model = small_lipnext(
        input_shape=shape, neck="patches", neck_patch_size=2, data_format=data_format
    )
    x = np.random.default_rng(0).random((3, *shape)).astype("float32")
    ends = [model.get_layer(name).output for name in ("block_1", "neck_patches")]
    features, found = map(to_numpy, keras.Model(model.input, ends)(x))
    if first:
        features = np.moveaxis(features, 1, -1)
    assert found.shape == (3, 2, 3, 64)
    for row in range(2):
        for column in range(3):
            patch = features[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(found[:, row, column], patch.reshape(3, -1))


@pytest.mark.parametrize(
    "options",
    [
        NECKS[1],
        NECKS[3],
        *(pytest.param(NECKS[i], marks=pytest.mark.once) for i in (0, 2)),
    ],
    ids=str,
)
def test_it_trains_and_its_constant_is_1(options, digits, tmp_path):
    (x, y), (x_test, y_test) = digits
    model = small_lipnext(depth=1, epsilon=0.1, **options)
    before = model.get_weights()
    model.fit(x[:320], y[:320], **OPTIONS)
    for old, new, weight in zip(before, model.get_weights(), model.weights, strict=True):
        assert not np.array_equal(old, new), weight.path
    bound = model.lipschitz_bound()
    assert all(layer.proven for layer in bound.layers)
    for layer in bound.layers[:-1]:
        assert layer.constant == pytest.approx(1, abs=1e-6), layer
    certificate = model.certify(x_test, y_test, verbose=0)
    assert certificate.body_constant == pytest.approx(1, abs=2e-6)
    assert certificate.radii.max() > 0.05
    # Nothing behind the blocks tells two images apart by more than they differ.
    vectors = called(keras.Model(model.input, model.layers[-1].input), x_test[:100])
    images = x_test[:100].reshape(100, -1)
    apart, distances = vectors[:50] - vectors[50:], images[:50] - images[50:]
    ratios = np.linalg.norm(apart, axis=-1) / np.linalg.norm(distances, axis=-1)
    assert 0.05 < ratios.max() <= 1 + 1e-5

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    again = loaded.certify(x_test, y_test, verbose=0)
    assert again.evidence.weights_hash == certificate.evidence.weights_hash
    np.testing.assert_array_equal(again.radii, certificate.radii)


def test_configs_from_before_there_were_necks():
    config = small_lipnext().get_config()
    for name in ("neck", "neck_width", "neck_patch_size", "dense_depth"):
        del config[name]
    assert [layer.name for layer in lip.LipNeXt.from_config(config).layers][-2:] == ["pool", "head"]


def test_the_reduced_model_has_the_same_neck(digits):
    _, (x, _) = digits
    model = small_lipnext(depth=1, mixing="full", **NECKS[0])
    model.get_layer("neck").trainable = False
    reduced = model.reduced()
    assert reduced.get_config() == {**model.get_config(), "mixing": "reduced"}
    assert not reduced.get_layer("neck").trainable
    np.testing.assert_array_equal(*(to_numpy(m.get_layer("neck").kernel) for m in (model, reduced)))
    np.testing.assert_allclose(called(reduced, x), called(model, x), atol=2e-5)
    radii = [m.certify(x, verbose=0).radii for m in (model, reduced)]
    np.testing.assert_allclose(*radii, atol=1e-6)


def test_channels_first_is_the_same_function(digits):
    (x, _), _ = digits
    x = x[:10]
    last = small_lipnext(depth=1, **NECKS[0])
    first = small_lipnext(depth=1, input_shape=(1, 8, 8), data_format="channels_first", **NECKS[0])
    first.set_weights([np.reshape(w, v.shape) for w, v in zip(last.get_weights(), first.weights)])
    transposed = np.transpose(x, (0, 3, 1, 2))
    np.testing.assert_allclose(called(first, transposed), called(last, x), atol=1e-5)
    radii = [lip.certify(m, v, verbose=0).radii for m, v in ((first, transposed), (last, x))]
    np.testing.assert_allclose(*radii, atol=1e-12)


@pytest.mark.once  # test_ranks trains a neck of patches so on each backend
def test_mixed_bfloat16(digits):
    (x, y), (x_test, y_test) = digits
    model = small_lipnext(depth=1, dtype="mixed_bfloat16", **NECKS[0])
    assert model.get_layer("neck").compute_dtype == "bfloat16"
    model.fit(x[:64], y[:64], **OPTIONS)
    certificate = model.certify(x_test, y_test, verbose=0)
    assert certificate.body_constant == pytest.approx(1, abs=2e-6)
    assert keras.backend.standardize_dtype(model(x_test[:2]).dtype) == "float32"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"neck": "mean"}, r"`neck` must be 'pool'.*or 'patches'.*Received: neck='mean'"),
        ({"neck": "patches", "neck_width": 0}, "`neck_width` must be a positive integer"),
        ({"neck": "patches", "neck_patch_size": 2.0}, "`neck_patch_size` must be a positive"),
        ({"neck": "patches", "dense_depth": -1}, "`dense_depth` must be an integer, 0 or more"),
        ({"dense_depth": True}, "`dense_depth` must be an integer, 0 or more.*True"),
        (
            {"neck": "patches", "neck_patch_size": 3},
            r"3 x 3 positions. Received: neck_patch_size=3, a map of 4 x 4 \(images of 8 x 8, "
            r"patch_size=2\). Choose one of 1, 2, 4, or",
        ),
        (
            {"neck": "pool", "neck_patch_size": 2},
            r"of neck='patches'.*Received: neck='pool', neck_patch_size=2",
        ),
        (
            {"neck": "pool", "neck_width": 32},
            r"there are none.*`dense_depth`.*neck_width=32, dense_depth=0",
        ),
        ({"neck": "patches", "patch_size": 3}, "tiles images with patches of 3 x 3 pixels"),
    ],
)
@pytest.mark.parametrize("make", [small_lipnext, lip.LipNeXt.estimate])
def test_bad_arguments(make, arguments, message):
    sizes = {"input_shape": (8, 8, 1), "depth": 2, "width": 16, "patch_size": 2}
    with pytest.raises(ValueError, match=message):
        make(**(sizes | arguments))
