"""What all SDP-based layers must do: their constant in float32, and gradients, at odd weights."""

import extended
import keras
import numpy as np
from data import to_numpy

from keras_lipnext import backend
from keras_lipnext.certification.convolutions import convolution_norm_bound
from keras_lipnext.certification.norms import spectral_norm_bound


def kernels(shape, rng, count):
    """Random kernels of many kinds: sizes from 1e-30 to 1e15, zero columns, rank one, sparse."""
    for index in range(count):
        w = rng.normal(size=shape)
        kind = index % 8
        if kind == 1:  # rank one: T leaves no slack
            w = np.ones((*shape[:-2], 1, 1)) * rng.random((shape[-2], 1)) * rng.random(shape[-1])
        elif kind == 2:
            w[..., rng.random(shape[-1]) < 0.5] = 0
        elif kind == 3:
            w[..., rng.random(shape[-2]) < 0.5, :] = 0
        elif kind == 4:
            w *= 10.0 ** rng.uniform(-12, 0, shape[-1])
        elif kind == 5:
            w *= 10.0 ** rng.uniform(-12, 0, (shape[-2], 1))
        elif kind == 6:
            w *= rng.random(shape) < 0.2
        elif kind == 7:
            w = np.ones(shape)
        scale = (1, 1e-30, 1e15, 1e-8)[index // 8 % 4]
        yield (w * scale).astype("float32")


def norm(kernel):
    kernel = np.asarray(kernel, "float32")
    return spectral_norm_bound(kernel) if kernel.ndim == 2 else convolution_norm_bound(kernel)


def check_constants(layer, input_shape, count, grid=1.0):
    """||W T^(-1/2)|| <= 1 + 1e-6, as float32 numbers; `grid`: what the norm's bound may add."""
    layer.build(input_shape)
    rng = np.random.default_rng(0)
    largest = 0.0
    for kernel in kernels(tuple(layer.kernel.shape), rng, count):
        layer.kernel.assign(kernel)
        if layer.log_q is not None:
            layer.log_q.assign(rng.normal(size=layer.log_q.shape) * 10 ** rng.uniform(-1, 3))
        w, inverse, _ = (to_numpy(part) for part in layer.diagonal_form())
        effective = w * np.sqrt(inverse)
        assert effective.dtype == "float32"
        assert np.isfinite(effective).all()
        largest = max(largest, norm(effective))
    assert largest <= (1 + 1e-6) * grid, largest
    return largest


def check_values(layer, input_shape, kind):
    """The outputs, in float32, against the formula in 80-bit NumPy, to 1e-5."""
    layer.build((None, *input_shape))
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    x = rng.normal(size=(3, *input_shape)).astype("float32")
    expected = extended.LAYERS[kind](layer, x.astype(extended.LONG))
    np.testing.assert_allclose(to_numpy(layer(x)), expected.astype("float64"), rtol=1e-5, atol=1e-5)


def check_gradients(make, input_shape):
    """The kernel's gradient, in float64, against differences of the loss."""
    with backend.float64_scope():
        layer = make(dtype="float64")
        layer.build((None, *input_shape))
        rng = np.random.default_rng(2)
        for weight in layer.weights:
            weight.assign(rng.normal(size=weight.shape))
        x = keras.ops.convert_to_tensor(rng.normal(size=(2, *input_shape)))
        target = keras.ops.convert_to_tensor(
            rng.normal(size=(2, *layer.compute_output_shape((2, *input_shape))[1:]))
        )
        for weight in layer.weights:
            start = np.asarray(to_numpy(weight), "float64")

            def loss(value, weight=weight):
                with keras.StatelessScope(state_mapping=[(weight, value)]):
                    return keras.ops.sum(layer(x) * target)

            value = keras.ops.convert_to_tensor(start)
            slope = to_numpy(backend.gradient(loss, value))
            assert np.isfinite(slope).all()
            direction = rng.normal(size=start.shape)
            step = 1e-5
            ahead, behind = (
                float(to_numpy(loss(keras.ops.convert_to_tensor(start + s * direction))))
                for s in (step, -step)
            )
            numeric = (ahead - behind) / (2 * step)
            np.testing.assert_allclose((slope * direction).sum(), numeric, rtol=2e-4, atol=1e-6)


def check_gradients_are_finite(layer, input_shape):
    """In float32, of kernels that are zero, or have zero rows and columns."""
    layer.build((None, *input_shape))
    x = keras.ops.convert_to_tensor(np.ones((2, *input_shape), "float32"))
    shape = tuple(layer.kernel.shape)
    some = np.zeros(shape, "float32")
    some[..., 0, 0] = 1
    for kernel in (np.zeros(shape, "float32"), some, 1e-30 * some, 1e15 * some):

        def loss(value):
            with keras.StatelessScope(state_mapping=[(layer.kernel, value)]):
                return keras.ops.sum(layer(x) ** 2)

        slope = to_numpy(backend.gradient(loss, keras.ops.convert_to_tensor(kernel)))
        assert np.isfinite(slope).all()
