import keras
import numpy as np
import pytest
from data import to_numpy

import keras_lipnext as lip


def small(**kwargs):
    arguments = {"input_shape": (8, 8, 1), "depth": 2, "width": 6, "hidden_filters": 4}
    arguments |= {"dense_depth": 1, "hidden_units": 12, "pool_size": 2}
    return lip.SLLNet(**(arguments | kwargs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "bound, options, count, epochs",
    [("sll", {}, 1344, 5), ("spectral", {"learning_rate": 0.02}, 640, 4)],
)
def test_learns_digits_and_certifies(bound, options, count, epochs, digits):
    (x, y), (x_test, y_test) = digits
    model = small(depth=1, bound=bound, epsilon=0.1, **options)
    model.fit(x[:count], y[:count], epochs=epochs, batch_size=32, verbose=0)
    certificate = model.certify(x_test[:200], y_test[:200], epsilons=(0.1, 0.25), verbose=0)
    assert certificate.clean_accuracy > 0.8
    assert certificate.certified_accuracy[0.1] > 0.65
    assert certificate.body_constant < 1 + 1e-6
    flipped, _ = lip.certification.pgd(
        model, x_test[:32], certificate.predictions[:32], 0.999 * certificate.radii[:32]
    )
    assert not flipped.any()


def test_saves_and_trains_on(digits, tmp_path):
    (x, y), _ = digits
    model = small()
    model.layers[3].trainable = False
    model.compile(lip.optimizers.ManifoldAdam(1e-3), loss=model.loss)
    model.fit(x[:64], y[:64], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    np.testing.assert_array_equal(to_numpy(loaded(x[:8])), to_numpy(model(x[:8])))
    assert not loaded.layers[3].trainable
    assert loaded.fit(x[:64], y[:64], verbose=0).history["loss"][0] > 0


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_data_formats(data_format):
    shape = (8, 12, 3) if data_format == "channels_last" else (3, 8, 12)
    model = small(input_shape=shape, data_format=data_format, pool_size=4)
    if data_format == "channels_last" or keras.backend.backend() != "tensorflow":
        assert model(np.zeros((2, *shape), "float32")).shape == (2, 10)
    assert model.layers[-2].kernel.shape[0] == 6 * 2 * 3


def test_mixed_precision(digits):
    (x, y), _ = digits
    for policy in ("mixed_bfloat16", "mixed_float16"):
        model = small(depth=1, dtype=policy)
        history = model.fit(x[:64], y[:64], verbose=0).history
        assert np.isfinite(history["loss"]).all()


@pytest.mark.once
@pytest.mark.slow
def test_sizes():
    model = lip.SLLNet("small", compile=False)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert (kinds.count("SDPResidualConv2D"), kinds.count("SDPResidualDense")) == (20, 7)
    assert model.layers[-2].kernel.shape == (45 * 64, 2048)
    weights = 20 * (9 * 45 * 5 + 5 + 5) + 7 * (45 * 64 * 2048 + 2 * 2048) + (45 * 64 + 1) * 10
    assert model.count_params() == weights


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": "base"}, r"`size` must be one of tiny, small, .* Received: size='base'"),
        ({"pool_size": 3}, r"`pool_size` must divide .* Received: pool_size=3"),
        ({"width": 0}, r"`width` must be a positive integer. Received: width=0"),
        ({"input_shape": (8, 8, 7)}, r"at least the images' number of channels, 7"),
        ({"input_shape": (8, None, 1)}, r"needs a known height"),
        ({"learning_rate": -1.0}, r"`learning_rate` must be positive"),
        ({"activation": "gelu"}, r"whose slope lies in \[0, 1\]"),
        ({"num_classes": 1}, r"`num_classes` must be at least 2"),
        ({"wide": 1}, r"wide"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small(**arguments)
