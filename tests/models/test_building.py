"""What the model builders warn of: images of another scale, and of another layout."""

import warnings

import numpy as np
import pytest

import keras_lipnext as lip

MODELS = {
    "LipNeXt": {"depth": 1, "width": 16, "neck": "pool"},
    "SLLNet": {"depth": 1, "width": 4, "dense_depth": 1, "hidden_units": 4},
}


def images(low, high, dtype="float32"):
    """Images whose entries reach from low to high."""
    return np.linspace(low, high, 4 * 64).reshape(4, 8, 8, 1).astype(dtype)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    sizes = {"input_shape": (8, 8, 1), "num_classes": 2, **MODELS[request.param]}
    model = getattr(lip, request.param)(epsilon=0.5, **sizes)
    model.compile("sgd", lip.losses.EMMA(0.5))
    return model


@pytest.mark.parametrize(
    "x, reason",
    [
        (images(0, 255, "uint8"), "from 0 to 255.*0.5 here is 0.002 of the range.*divide by 255"),
        (images(-1, 1), "from -1 to 1.*0.5 here is 0.25 of the range"),
    ],
)
def test_images_outside_0_1_are_warned_of_once(x, reason, model):
    with pytest.warns(UserWarning, match=reason) as record:
        model.fit(x, np.arange(4) % 2, epochs=2, verbose=0)
    (warning,) = [w for w in record if w.category is UserWarning]  # NumPy has others
    assert warning.filename == __file__


def test_images_in_0_1_are_not_warned_of(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(x=images(0, 1), y=np.arange(4) % 2, verbose=0)


def test_of_a_data_set_the_dtype_is_looked_at_and_nothing_read(model):
    tf = pytest.importorskip("tensorflow")
    read = []

    def batches():
        read.append(1)
        yield images(0, 255, "uint8"), np.arange(4) % 2

    for dtype in ("uint8", "float32"):
        data = tf.data.Dataset.from_generator(
            batches, output_signature=(tf.TensorSpec((4, 8, 8, 1), dtype), tf.TensorSpec((4,)))
        )
        before = len(read)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            lip.models.architecture.warn_of_range(data, 0.5)
        assert len(read) == before
        assert [str(w.message) for w in record] == (
            [
                "The data set yields images of dtype uint8. If they go up to 255, epsilon = 0.5 is "
                "0.002 of their range. The model takes images in [0, 1]: divide by 255?"
            ]
            if dtype == "uint8"
            else []
        )


@pytest.mark.once
@pytest.mark.parametrize(
    "shape, data_format, other, moved",
    [
        ((3, 32, 32), "channels_last", "channels_first", r"\(32, 32, 3\)"),
        ((1, 8, 12), "channels_last", "channels_first", r"\(8, 12, 1\)"),
        ((32, 32, 3), "channels_first", "channels_last", r"\(3, 32, 32\)"),
    ],
)
def test_a_shape_that_looks_like_the_other_layout(shape, data_format, other, moved):
    with pytest.warns(
        UserWarning, match=rf"looks like {other}.*data_format='{other}', or input_shape={moved}"
    ):
        lip.LipNeXt(
            input_shape=shape,
            num_classes=2,
            depth=1,
            width=64,
            patch_size=1,
            data_format=data_format,
        )


@pytest.mark.parametrize(
    "shape, data_format",
    [((32, 32, 3), "channels_last"), ((3, 32, 32), "channels_first"), ((3, 3, 3), "channels_last")],
)
def test_plain_shapes_are_not_warned_of(shape, data_format):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lip.LipNeXt.estimate(depth=1, width=64, input_shape=shape, data_format=data_format)
