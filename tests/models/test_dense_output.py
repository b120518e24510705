"""LipNeXt with output="dense": logits at each position, their constants, training, saved files."""

import keras
import numpy as np
import pytest
from data import called, small_lipnext, to_numpy
from layer_checks import largest_stretch

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.twin import Float64Twin

SHAPES = [(6, 4, 1), (12, 2), (4, 2, 4, 1)]
OPTIONS = [{"dense_depth": 1, "neck_width": 3}, {"patch_size": 1, "padding": "zero"}]


def dense(shape=(8, 8, 1), **kwargs):
    keras.utils.set_random_seed(1)
    return small_lipnext(input_shape=shape, output="dense", **({"num_classes": 3} | kwargs))


def masks(count=64, seed=0):
    """Images of noise in which a bright square lies, and the square: (x, y)."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0.2, 0.05, (count, 8, 8, 1)), np.zeros((count, 8, 8), int)
    for image, mask, (i, j) in zip(x, y, rng.integers(0, 5, (count, 2))):
        image[i : i + 4, j : j + 4] += 0.6
        mask[i : i + 4, j : j + 4] = 1
    return x.astype("float32"), y


@pytest.mark.parametrize(
    "shape, options",
    [
        (SHAPES[0], {}),
        (SHAPES[1], OPTIONS[0]),
        (SHAPES[2], OPTIONS[1]),
        *(
            pytest.param(SHAPES[i], options, marks=pytest.mark.once)
            for i, options in (
                *((i, {}) for i in (1, 2)),
                *((i, OPTIONS[0]) for i in (0, 2)),
                *((i, OPTIONS[1]) for i in (0, 1)),
            )
        ),
    ],
    ids=str,
)
def test_no_pair_is_stretched_beyond_the_bound(shape, options):
    model = dense(shape, **options)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "bias" in weight.path:
            weight.assign(rng.normal(0, 0.1, weight.shape))
    assert model.output_shape == (None, *shape[:-1], 3)
    bound = lip.lipschitz_bound(model)
    assert all(layer.proven for layer in bound.layers)
    twin = Float64Twin(model)
    with backend.float64_scope():
        stretch = largest_stretch(twin.tensor, shape, ascents=4)
    # The head reads few of the directions that so few numbers reach.
    assert 0.3 * bound.constant < stretch <= bound.constant * (1 + 1e-9)
    assert bound.body_constant == pytest.approx(1, abs=4e-6)


def test_the_head_and_its_constant_are_those_of_each_pixel():
    """The gradient of a difference of logits of one pixel is at most K ||w_i - w_j||."""
    model = dense(SHAPES[0])
    constant = lip.lipschitz_bound(model).body_constant
    kernel = np.asarray(to_numpy(model.head.kernel), "float64")
    twin = Float64Twin(model)
    x = np.random.default_rng(0).random((4, *SHAPES[0]))

    def difference(t):
        logits = twin.tensor(t)
        return logits[:, 2, 1, 0] - logits[:, 2, 1, 2]

    with backend.float64_scope():
        slope = to_numpy(backend.gradient(difference, keras.ops.convert_to_tensor(x)))
    norms = np.linalg.norm(slope.reshape(4, -1), axis=1)
    assert (norms <= constant * np.linalg.norm(kernel[:, 0] - kernel[:, 2]) * (1 + 1e-9)).all()
    assert (norms > 0.1).all()


def test_pixels_are_put_back_where_they_came_from():
    """With the stem's matrix turned round and nothing in between, an image comes back."""
    model = dense((6, 4, 2), patch_size=2, width=8, shift_ratio=1 / 8, beta=0, neck_width=2)
    model.get_layer("neck").kernel.assign(
        np.transpose(to_numpy(model.get_layer("patch_embedding").kernel))
    )
    pixels, stem, neck, order = (
        model.get_layer(name) for name in ("neck_pixels", "patch_embedding", "neck", "neck_order")
    )
    x = np.random.default_rng(0).random((3, 6, 4, 2)).astype("float32")
    y = pixels(order(model.get_layer("neck_split")(neck(stem(x)))))
    np.testing.assert_allclose(to_numpy(y), x, atol=1e-6)


def test_the_neck_loses_nothing():
    """Numbers of a pixel: at least what keeps a patch's, and as many as there are classes."""
    assert dense(width=16, patch_size=2).head.kernel.shape[0] == 4
    assert dense(width=24, patch_size=2, num_classes=7).head.kernel.shape[0] == 7
    neck = dense(width=24, patch_size=2, num_classes=7).get_layer("neck")
    assert tuple(neck.kernel.shape) == (24, 28)


@pytest.mark.slow
def test_it_learns_masks(tmp_path):
    (x, y), (x_test, y_test) = masks(256), masks(32, seed=1)
    model = dense(num_classes=2, epsilon=0.1, width=32, depth=1)
    with pytest.raises(ValueError, match=r"2 classes: labels are whole numbers from 0 to 1"):
        model.fit(x, y + 1, verbose=0)
    with pytest.raises(ValueError, match=r"Received: shape=\(256, 64\)"):
        model.fit(x, y.reshape(256, 64), verbose=0)
    model.fit(x, y, epochs=20, batch_size=32, verbose=0)
    scores = model.evaluate(x_test, y_test, verbose=0, return_dict=True)
    assert scores["accuracy"] > 0.9
    assert scores["certified_accuracy"] > 0.6
    assert lip.lipschitz_bound(model).body_constant == pytest.approx(1, abs=4e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    np.testing.assert_array_equal(*(called(m, x_test) for m in (loaded, model)))
    again = loaded.evaluate(x_test, y_test[..., None], verbose=0, return_dict=True)
    assert again == pytest.approx(scores, rel=1e-4)
    model.save_to_preset(tmp_path / "preset")
    assert lip.LipNeXt.from_preset(tmp_path / "preset").output_shape == (None, 8, 8, 2)


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.once)]
)
def test_mixed_precision(policy):
    x, y = masks(32)
    model = dense(depth=1, dtype=policy, num_classes=2)
    assert model.get_layer("neck").compute_dtype == policy.removeprefix("mixed_")
    model.fit(x, y, verbose=0)
    assert keras.backend.standardize_dtype(model(x[:2]).dtype) == "float32"


def test_its_temperature_is_of_one_position():
    assert dense((8, 8, 1)).loss.temperature == dense((12, 2)).loss.temperature == 128


def test_configs():
    model = dense(dense_depth=2)
    config = model.get_config()
    assert (config["output"], config["neck"], config["dense_depth"]) == ("dense", None, 2)
    assert lip.LipNeXt.from_config(config).get_config() == config
    reduced = dense(mixing="full").reduced()
    assert reduced.get_config()["output"] == "dense"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"output": "mask"}, r"`output` must be 'classes'.*or 'dense'.*Received: output='mask'"),
        ({"neck": "pool"}, r"`neck` is of output='classes'.*Received: output='dense', neck='pool'"),
        ({"neck_patch_size": 2}, r"`neck_patch_size` is of output='classes'.*neck_patch_size=2"),
        ({"neck_width": 0}, "`neck_width` must be a positive integer"),
        ({"dense_depth": -1}, "`dense_depth` must be an integer, 0 or more"),
    ],
)
@pytest.mark.parametrize("make", [small_lipnext, lip.LipNeXt.estimate])
def test_bad_arguments(make, arguments, message):
    sizes = {"input_shape": (8, 8, 1), "depth": 2, "width": 16, "output": "dense"}
    with pytest.raises(ValueError, match=message):
        make(**(sizes | arguments))
