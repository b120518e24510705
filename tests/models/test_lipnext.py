import fractions
import pathlib
import re

import keras
import numpy as np
import pytest
from data import called, small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext.manifolds import Stiefel, stiefel
from keras_lipnext.models.sizes import SIZES, matrix_weights

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "sizes.md"
OPTIONS = {"epochs": 2, "batch_size": 32, "verbose": 0}


@pytest.mark.slow
def test_what_the_readme_begins_with(digits, tmp_path):
    """The calls of its first example, of fewer images and blocks; loaded, the training goes on."""
    (x_train, y_train), (x_test, y_test) = ((x[:64], y[:64]) for x, y in digits)
    model = lip.LipNeXt(  # comes compiled
        size="tiny", depth=1, input_shape=(8, 8, 1), num_classes=10
    )
    history = model.fit(
        x_train, y_train, epochs=2, verbose=0, validation_data=(x_test, y_test)
    ).history
    assert {"accuracy", "certified_accuracy", "val_certified_accuracy"} <= set(history)
    certificate = lip.certify(model, x_test, y_test, epsilons=(0.1, 0.25, 0.5), verbose=0)
    assert "certified robust accuracy at epsilon = 0.25" in str(certificate)
    certificate.plot(tmp_path / "cra.png")
    assert (tmp_path / "cra.png").stat().st_size > 5000
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is lip.LipNeXt
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations) == 4
    np.testing.assert_array_equal(lip.certify(loaded, x_test, verbose=0).radii, certificate.radii)
    for m in (model, loaded):
        m.fit(x_train, y_train, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_learns(digits, trained):
    _, (x_test, y_test) = digits
    certificate = trained.certify(x_test, y_test, epsilons=[0.1], verbose=0)
    assert certificate.clean_accuracy > 0.9
    assert certificate.certified_accuracy[0.1] > 0.6
    for weight in trained.trainable_weights:
        if isinstance(weight.constraint, Stiefel):
            assert float(stiefel.defect(weight)) < 2e-6


def test_defaults_follow_depth_and_image_size():
    for depth, side, rate, temperature in ((1, 8, 0.04, 16.0), (4, 32, 0.02, 4.0)):
        model = small_lipnext(depth=depth, input_shape=(side, side, 1), num_classes=3)
        optimizer = model.optimizer
        assert type(optimizer) is lip.optimizers.ManifoldMuon
        assert float(to_numpy(optimizer.learning_rate)) == pytest.approx(rate)
        assert optimizer.euclidean_learning_rate == pytest.approx(rate / 2)
        assert model.loss.temperature == pytest.approx(temperature)
    # The paper's loss is the least.
    assert small_lipnext(input_shape=(160, 160, 1), depth=1).loss.temperature == 1.0
    model = small_lipnext(learning_rate=0.01, temperature=3)
    assert float(to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.01)
    assert model.loss.temperature == 3


def test_frozen_layers_stay_frozen_when_loaded(digits, tmp_path):
    (x, y), _ = digits
    model = small_lipnext(depth=1)
    model.get_layer("patch_embedding").trainable = False
    model.get_layer("block_0").mixing.trainable = False
    model.compile(lip.optimizers.ManifoldAdam(1e-2), lip.losses.EMMA(0.3))
    model.fit(x[:32], y[:32], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    paths = [{w.path.split("/", 1)[-1] for w in m.trainable_variables} for m in (model, loaded)]
    assert paths[0] == paths[1]
    before = np.array(loaded.get_layer("block_0").mixing.get_weights()[0])
    loaded.fit(x[:32], y[:32], verbose=0)
    np.testing.assert_array_equal(loaded.get_layer("block_0").mixing.get_weights()[0], before)


@pytest.mark.once
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_weight_counts(size):
    model = lip.LipNeXt(size=size, input_shape=(8, 8, 3), num_classes=7, patch_size=2, neck="pool")
    depth, width, ratio = (SIZES[size][k] for k in ("depth", "width", "shift_ratio"))
    stored, paper = matrix_weights(depth, width, ratio)
    assert paper == 2 * depth * width**2
    stem, head = 12 * width, 7 * width + 7
    biases = depth * (16 + width)
    assert model.count_params() == stored + stem + head + biases


def number_of(text):
    value, _, unit = text.partition(" ")
    return float(fractions.Fraction(value)) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[unit]


@pytest.mark.parametrize("text", [GUIDE.read_text(), lip.LipNeXt.__doc__], ids=["guide", "help"])
def test_documented_sizes(text):
    """The tables name all sizes and no other, with their shapes and counts of weights."""
    table = re.search(r"\| size \| depth \| width .*?\n\s*\|[-:| ]*\n(.*?)\n\s*\n", text, re.S)[1]
    rows = [[cell.strip() for cell in line.strip(" |").split("|")] for line in table.splitlines()]
    assert [name for name, *_ in rows] == list(SIZES)
    for name, *cells in rows:
        *shape, stored, paper = map(number_of, cells)
        assert shape == list(SIZES[name].values())
        assert (stored, paper) == pytest.approx(matrix_weights(**SIZES[name]), rel=8e-3)


def test_the_largest_size_is_twice_the_papers():
    assert matrix_weights(**SIZES["2b"])[1] == 2 * matrix_weights(**SIZES["1b"])[1]


@pytest.mark.once
def test_depth_and_width():
    model = lip.LipNeXt(depth=3, width=32, input_shape=(8, 8, 1), num_classes=4)
    blocks = [layer for layer in model.layers if isinstance(layer, lip.layers.LipNeXtBlock)]
    assert len(blocks) == 3
    assert tuple(blocks[0].dense.kernel.shape) == (32, 32)
    deeper = lip.LipNeXt(size="tiny", depth=2, input_shape=(8, 8, 1), num_classes=4)
    assert deeper.get_config()["width"] == 64


@pytest.mark.once
@pytest.mark.parametrize(
    "shape, patch", [((8, 8), 2), ((28, 28), 2), ((32, 32), 4), ((64, 64), 8), ((224, 224), 16)]
)
def test_default_patch_sizes(shape, patch):
    model = lip.LipNeXt(depth=1, width=256, input_shape=(*shape, 1), num_classes=3)
    assert model.get_layer("patch_embedding").patch_size == patch


@pytest.mark.once
def test_default_patches_fit_the_width():
    assert lip.LipNeXt(size="tiny", depth=1).get_layer("patch_embedding").patch_size == 4
    odd = lip.LipNeXt(depth=1, width=16, input_shape=(29, 29, 3), num_classes=3)
    assert odd.get_layer("patch_embedding").patch_size == 1


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("mixed_bfloat16", marks=pytest.mark.once),  # on each backend in test_scale
        "mixed_float16",
        "bfloat16",
    ],
)
def test_low_precision(policy, digits):
    (x, y), (x_test, y_test) = ((x[:256], y[:256]) for x, y in digits)
    model = small_lipnext(depth=1, dtype=policy)
    assert model.dtype_policy.name == "float32"
    before = model.evaluate(x_test, y_test, return_dict=True, verbose=0)
    model.fit(x, y, **OPTIONS)
    after = model.evaluate(x_test, y_test, return_dict=True, verbose=0)
    assert after["loss"] < before["loss"]
    stored = "bfloat16" if policy == "bfloat16" else "float32"
    for weight in model.weights:
        assert keras.backend.standardize_dtype(weight.dtype) == stored
        assert np.isfinite(to_numpy(keras.ops.cast(weight, "float32"))).all()
    certificate = model.certify(x_test, y_test, verbose=0)
    # Stored in bfloat16, kernels are orthogonal to three digits only: K says so.
    assert 1 <= certificate.body_constant < (1.2 if policy == "bfloat16" else 1.0001)


def test_global_mixed_precision(digits):
    keras.config.set_dtype_policy("mixed_bfloat16")
    (x, y), _ = digits
    model = small_lipnext(depth=1)
    block = model.get_layer("block_0")
    assert block.dense.compute_dtype == "bfloat16"
    assert model.get_layer("pool").compute_dtype == "float32"
    outputs = model(x[:2])
    assert keras.backend.standardize_dtype(outputs.dtype) == "float32"
    model.fit(x[:64], y[:64], verbose=0)


def test_channels_first_is_the_same_function(digits):
    (x, _), _ = digits
    x = x[:10]
    last = small_lipnext(depth=1)
    first = small_lipnext(depth=1, input_shape=(1, 8, 8), data_format="channels_first")
    weights = [np.reshape(w, v.shape) for w, v in zip(last.get_weights(), first.weights)]
    first.set_weights(weights)
    transposed = np.transpose(x, (0, 3, 1, 2))
    np.testing.assert_allclose(called(first, transposed), called(last, x), atol=1e-5)
    radii = [lip.certify(m, v, verbose=0).radii for m, v in ((first, transposed), (last, x))]
    np.testing.assert_allclose(*radii, atol=1e-12)


@pytest.mark.parametrize(
    "padding, ratio",
    [pytest.param("circular", 1 / 8, marks=pytest.mark.once), ("zero", 1 / 4)],
)
def test_the_reduced_model_is_the_same_function(padding, ratio, digits, tmp_path):
    """After training, saving and loading: exact kernels, the same predictions and radii."""
    (x, y), (x_test, _) = ((x[:128], y[:128]) for x, y in digits)
    model = small_lipnext(depth=1, mixing="full", padding=padding, shift_ratio=ratio)
    model.fit(x, y, **OPTIONS)
    model.save(tmp_path / "full.keras")
    model = keras.models.load_model(tmp_path / "full.keras")
    reduced = model.reduced()
    assert type(reduced) is lip.LipNeXt
    assert reduced.get_config() == {**model.get_config(), "mixing": "reduced"}
    assert not reduced.compiled
    for target, source in zip(reduced.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(target, source[..., : target.shape[-1]])
    assert tuple(reduced.get_layer("block_0").mixing.kernel.shape) == (16, 4 * ratio * 16)
    difference = called(reduced, x_test) - called(model, x_test)
    assert np.abs(difference).max() < 2e-5
    certificates = [m.certify(x_test, verbose=0) for m in (model, reduced)]
    np.testing.assert_array_equal(*(c.predictions for c in certificates))
    np.testing.assert_allclose(*(c.radii for c in certificates), atol=1e-6)
    assert certificates[0].radii.max() > 0.1
    assert all(layer.proven for layer in model.lipschitz_bound().layers)
    reduced.compile(lip.optimizers.ManifoldAdam(1e-2), lip.losses.EMMA(0.3))
    reduced.fit(x[:64], y[:64], verbose=0)
    np.testing.assert_array_equal(model.certify(x_test, verbose=0).radii, certificates[0].radii)


def test_the_reduced_model_keeps_what_is_frozen():
    model = small_lipnext(mixing="full", dtype="mixed_bfloat16")
    model.get_layer("block_1").mixing.trainable = False
    reduced = model.reduced()
    assert not reduced.get_layer("block_1").mixing.trainable
    assert reduced.get_layer("block_0").mixing.trainable
    assert reduced.get_layer("block_0").dense.compute_dtype == "bfloat16"
    copy = reduced.reduced()
    for a, b in zip(copy.get_weights(), reduced.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_full_form_has_the_papers_weight_count(size):
    arguments = {"size": size, "input_shape": (8, 8, 1), "num_classes": 10}
    full, reduced = (lip.LipNeXt(**arguments, mixing=m) for m in ("full", "reduced"))
    stored, paper = matrix_weights(**SIZES[size])
    assert full.count_params() - reduced.count_params() == paper - stored


def test_jit_and_eager_agree(digits):
    (x, y), _ = digits
    losses = []
    for eager in (True, False):
        keras.utils.set_random_seed(3)
        # Kernels of one shape: what runs eagerly is compiled for each shape anew.
        model = small_lipnext(depth=1, patch_size=4, shift_ratio=1 / 4, compile=False)
        model.compile(
            lip.optimizers.ManifoldAdam(1e-2),
            lip.losses.EMMA(0.3, temperature=4),
            run_eagerly=eager,
            jit_compile=False if keras.backend.backend() == "torch" else not eager,
        )
        losses.append(model.fit(x[:64], y[:64], epochs=2, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_config_round_trip():
    model = small_lipnext(beta=0.5, padding="zero", epsilon=0.2, temperature=4.0, name="net")
    copy = lip.LipNeXt.from_config(model.get_config())
    assert copy.get_config() == model.get_config()
    assert copy.name == "net"
    assert not copy.compiled
    by_hand = lip.LipNeXt.from_config({"input_shape": (8, 8, 1), "num_classes": 3})
    assert by_hand.output_shape == (None, 3)


def test_summary_counts(capsys):
    model = small_lipnext()
    model.summary()
    assert f"{model.count_params():,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": "huge"}, f"`size` must be one of {', '.join(SIZES)}. Received"),
        ({"depth": None}, r"both `depth` and `width`. Received: depth=None, width=16"),
        ({"depth": 0}, r"`depth` must be a positive integer"),
        ({"width": -8}, r"`width` must be a positive integer"),
        ({"num_classes": 1}, r"`num_classes` must be at least 2"),
        ({"shift_ratio": 0.3}, r"`ratio`.*in \(0, 1/4\]"),
        ({"width": 20}, r"multiples of 8 channels"),
        ({"beta": 2}, r"`beta` must be in \[0, 1\]"),
        ({"beta": None}, r"`beta` must be a number"),
        ({"padding": "edge"}, r"`padding` must be"),
        ({"mixing": "half"}, r"`mixing` must be 'reduced'.*Received: mixing='half'"),
        ({"patch_size": 8}, r"units >= patch_size\^2 \* channels = 64. Received: units=16"),
        ({"patch_size": 3}, r"not a multiple of 3"),
        ({"patch_size": 0}, r"`patch_size` must be a positive integer"),
        ({"num_class": 3}, r"LipNeXt does not know the arguments \['num_class'\]"),
        ({"learning_rate": "fast"}, r"`learning_rate` must be a number"),
        ({"epsilon": None}, r"`epsilon` must be a number"),
        ({"epsilon": -0.1}, r"`epsilon` must be positive. Received: epsilon=-0.1"),
        ({"temperature": 0}, r"`temperature` must be positive"),
        (
            {"input_shape": 8},
            r"`input_shape` is \(length, channels\), \(height, width, ch.*Received",
        ),
        ({"input_shape": (8,)}, r"`input_shape` is \(length, channels\), \(height, width, ch"),
        ({"input_shape": (None, 8, 1)}, r"needs a known height, width and number of channels"),
        (
            {"input_shape": (8, 8, 99), "patch_size": None},
            r"at least.*channels, 99. Received: width",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_lipnext(**arguments)


def test_numpy_integers_are_integers():
    assert small_lipnext(num_classes=np.int64(10)).output_shape == (None, 10)


@pytest.mark.slow
def test_the_billion_parameter_model_builds(capsys):
    """In seconds, under 4 GiB: benchmarks/build.py measures. All blocks on one backend."""
    depth = 32 if keras.backend.backend() == "torch" else 1
    model = lip.LipNeXt(size="1b", depth=depth)
    stored, _ = matrix_weights(**{**SIZES["1b"], "depth": depth})
    stem, head, biases = 768 * 4096, 4096 * 1000 + 1000, depth * (14 * 14 + 4096)
    assert model.count_params() == stored + stem + head + biases
    model.summary()
    assert f"{model.count_params():,}" in capsys.readouterr().out
    block = model.get_layer(f"block_{depth - 1}")
    assert tuple(block.dense.kernel.shape) == (4096, 4096)
    assert tuple(block.mixing.kernel.shape) == (4096, 1024)
    assert float(stiefel.defect(block.mixing.kernel)) < 2e-6
