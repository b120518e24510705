import keras
import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext.layers import FullShiftMixing, ShiftMixing, SpatialShift


def numpy_shift(x, group, padding):
    """Each group moved by one pixel: up, down, left, right."""
    y = x.copy()
    for index, (axis, step) in enumerate([(1, -1), (1, 1), (2, -1), (2, 1)]):
        part = np.roll(x[..., index * group : (index + 1) * group], step, axis=axis)
        if padding == "zero":
            border = [slice(None)] * 4
            border[axis] = 0 if step > 0 else -1
            part[tuple(border)] = 0
        y[..., index * group : (index + 1) * group] = part
    return y


@pytest.mark.parametrize("padding", ["circular", "zero"])
@pytest.mark.parametrize("size", [(4, 5), (1, 3), (2, 1)])
def test_equals_numpy(padding, size):
    x = random_input((2, *size, 16))
    outputs = to_numpy(SpatialShift(1 / 8, padding)(x))
    np.testing.assert_array_equal(outputs, numpy_shift(x, 2, padding))


def test_moves_one_pixel_the_way_it_says():
    x = np.zeros((1, 3, 3, 5), "float32")
    x[0, 1, 1] = 1
    outputs = to_numpy(SpatialShift(1 / 5)(x))[0]
    for channel, position in enumerate([(0, 1), (2, 1), (1, 0), (1, 2), (1, 1)]):
        assert outputs[..., channel].sum() == 1
        assert outputs[(*position, channel)] == 1


def test_global_data_format():
    keras.config.set_image_data_format("channels_first")
    assert SpatialShift().data_format == "channels_first"


@pytest.mark.parametrize("padding", ["circular", "zero"])
def test_unknown_spatial_sizes(padding):
    inputs = keras.Input((None, None, 8))
    outputs = SpatialShift(1 / 8, padding)(inputs)
    assert outputs.shape == (None, None, None, 8)
    model = keras.Model(inputs, outputs)
    for size in ((4, 5), (1, 3)):
        x = random_input((2, *size, 8))
        found = model.predict(x, verbose=0)
        np.testing.assert_array_equal(found, numpy_shift(x, 1, padding))


@pytest.mark.parametrize("ratio", [0, -1 / 8, 0.6])
def test_bad_ratio(ratio):
    with pytest.raises(
        ValueError, match=r"in \(0, 1/2\].*\(0, 1/4\].*\(0, 1/6\]. Received: ratio="
    ):
        SpatialShift(ratio)


@pytest.mark.parametrize("cls", [SpatialShift, ShiftMixing, FullShiftMixing])
@pytest.mark.parametrize("spatial, names", [(1, "series"), (2, "images"), (3, "volumes")])
def test_as_much_moves_in_each_direction_as_there_is(cls, spatial, names):
    most = 2 * spatial
    cls(1 / most).build((2, *[4] * spatial, 12))
    if spatial > 1:
        message = rf"each of {most} directions.*\(0, 1/{most}\] for {names}. Received: ratio="
        with pytest.raises(ValueError, match=message):
            cls(1 / most + 1 / 12).build((2, *[4] * spatial, 12))


def test_bad_padding():
    with pytest.raises(ValueError, match=r"replicating the border is not 1-Lipschitz. Received"):
        SpatialShift(1 / 8, "edge")


def test_channels_not_divisible():
    with pytest.raises(ValueError, match=r"channels=12. With this ratio, multiples of 8 channels"):
        SpatialShift(1 / 8)(np.ones((1, 4, 4, 12)))


def test_bad_rank():
    with pytest.raises(ValueError, match=r"images of rank 4.*Received: input_shape=\(2, 16\)"):
        SpatialShift(1 / 8)(np.ones((2, 16)))


def test_bad_data_format():
    with pytest.raises(ValueError, match=r"`data_format` must be 'channels_last'"):
        SpatialShift(1 / 8, data_format="NHWC")
