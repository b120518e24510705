"""What all SDP-based layers must do: their constant in float32, and gradients, at odd weights."""

import math

import extended
import keras
import numpy as np
import pytest
from data import called, in_one_program, to_numpy, traced

from keras_lipnext import backend
from keras_lipnext.backend import programs
from keras_lipnext.norms.convolutions import convolution_norm_bound
from keras_lipnext.norms.matrices import spectral_norm_bound


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
        # Eight kernels are of size 1; more, of each kind ever other sizes.
        scale = (1, 1e-30, 1e15, 1e-8)[(index // 8 + index) % 4 if count > 8 else 0]
        yield (w * scale).astype("float32")


def norm(kernel):
    kernel = np.asarray(kernel, "float32")
    return spectral_norm_bound(kernel) if kernel.ndim == 2 else convolution_norm_bound(kernel)


def check_constants(layer, input_shape, count, grid=1.0):
    """||W T^(-1/2)|| <= 1 + 1e-6, as float32 numbers; `grid`: what the norm's bound may add."""
    layer.build(input_shape)
    rng = np.random.default_rng(0)
    form = traced(layer.diagonal_form)
    largest = 0.0
    for kernel in kernels(tuple(layer.kernel.shape), rng, count):
        log_q = None
        if layer.log_q is not None:
            log_q = rng.normal(size=layer.log_q.shape) * 10 ** rng.uniform(-1, 3)
            log_q = keras.ops.convert_to_tensor(log_q, "float32")
        w, inverse, _ = map(to_numpy, form(keras.ops.convert_to_tensor(kernel), log_q))
        effective = w * np.sqrt(inverse)
        assert effective.dtype == "float32"
        assert np.isfinite(effective).all()
        largest = max(largest, norm(effective))
    assert largest <= (1 + 1e-6) * grid, largest
    return largest


def check_diagonal(layer, input_shape):
    """1 / T in float64 against its definition in 80-bit NumPy: guards and the range of q, too."""
    rng = np.random.default_rng(3)
    with backend.float64_scope():
        layer.build((None, *input_shape))
        form = traced(layer.diagonal_form)
        for kernel in kernels(tuple(layer.kernel.shape), rng, 8):
            kernel = keras.ops.convert_to_tensor(kernel, dtype="float64")
            log_q = None
            if layer.log_q is not None:
                log_q = 10 ** rng.uniform(-1, 2) * rng.normal(size=layer.log_q.shape) + 15
                layer.log_q.assign(log_q)
                log_q = keras.ops.convert_to_tensor(log_q)
            layer.kernel.assign(kernel)
            w, inverse, scale = map(to_numpy, form(kernel, log_q))
            assert inverse.dtype == "float64"
            assert scale == (abs(to_numpy(kernel)).max() or 1)
            exact = extended.sdp_diagonal(layer, w.astype(extended.LONG))
            np.testing.assert_allclose(inverse, (1 / exact).astype("float64"), rtol=1e-11)


def check_executed_kernel(layer, sides, limit=1 + 1e-6):
    """The float32 kernel that images are multiplied with, as a matrix, in float64.

    The largest singular value of the convolution of small images; of a residual layer the largest
    of x - 2 D S D^T x for S = 1 and for random diagonal S in [0, 1].
    """
    layer.build((None, *sides, 3))
    rng = np.random.default_rng(4)
    basis = np.eye(3 * np.prod(sides)).reshape(-1, *sides, 3)
    residual = hasattr(layer, "residual_form")

    @traced
    def used_for(kernel):
        with keras.StatelessScope(state_mapping=[(layer.kernel, kernel)]):
            return layer.residual_form()[0] if residual else layer.effective_kernel()

    convolved = traced(layer._convolved)
    largest = 0.0
    for kernel in kernels(tuple(layer.kernel.shape), rng, 8):
        used = to_numpy(used_for(keras.ops.convert_to_tensor(kernel)))
        assert used.dtype == "float32"
        with backend.float64_scope():
            used = keras.ops.convert_to_tensor(used, dtype="float64")
            x = keras.ops.convert_to_tensor(basis, dtype="float64")
            down = to_numpy(convolved(x, used)).reshape(len(basis), -1)
        if residual:
            for slopes in (1.0, rng.random(down.shape[1])):
                step = np.eye(len(basis)) - 2 * (down * slopes) @ down.T
                largest = max(largest, np.linalg.norm(step, 2))
        else:
            largest = max(largest, np.linalg.norm(down, 2))
    assert largest <= limit, largest
    return largest


def sum_in_order(monkeypatch):
    """From here on matrix products are added up one after the other, in float32."""
    monkeypatch.setattr(programs, "_traces", lambda: False)  # operation by operation
    monkeypatch.setattr(backend, "matmul", _product_in_order)


def _product_in_order(a, b, precision="exact"):
    a, b = to_numpy(a), to_numpy(b)
    if a.ndim > 2:
        return keras.ops.stack([_product_in_order(x, y) for x, y in zip(a, b)])
    product = np.empty((len(a), b.shape[1]), "float32")
    for i, j in np.ndindex(*product.shape):
        product[i, j] = np.cumsum(a[i] * b[:, j], dtype="float32")[-1]
    return keras.ops.convert_to_tensor(product)


def check_long_columns(layer, features):
    """Columns of equal entries, whose products all round the same way."""
    if not layer.built:
        layer.build((None, features))
    largest = 0.0
    for entries in ((1.0, 0.7), (1.0, 0.1), (1.0, 1 / 3), (1.0, 0.9)):
        layer.kernel.assign(np.ones((features, 1)) * np.array(entries))
        w, inverse, _ = map(to_numpy, layer.diagonal_form())
        largest = max(largest, np.linalg.norm(np.asarray(w * np.sqrt(inverse), "float64"), 2))
    assert 1 - 1e-3 < largest <= 1 + 1e-6, largest


def check_half_precision(layer, input_shape, dtype="float16"):
    """A mixed policy's outputs near those of float32, whatever the kernel's size."""
    rng = np.random.default_rng(5)
    layer.build((None, *input_shape))
    single = type(layer).from_config({**layer.get_config(), "dtype": "float32"})
    single.build((None, *input_shape))
    x = rng.normal(size=(3, *input_shape)).astype("float32")
    kernel = rng.normal(size=layer.kernel.shape)
    bias = 0.1 * rng.normal(size=layer.bias.shape)

    def answers(kernel, bias):
        found = []
        for one in (layer, single):
            values = [(one.kernel, kernel), (one.bias, bias)]
            with keras.StatelessScope(state_mapping=values):
                found.append((keras.ops.cast(one(x), "float32"), *one.diagonal_form()))
        return found

    answers = in_one_program(answers)
    for size in (1.0, 1e-8, 1e-6, 1e3, 1e5, 1e10):
        weights = (keras.ops.convert_to_tensor(w * size, "float32") for w in (kernel, bias))
        (half, *form), (full, *exact) = answers(*weights)
        np.testing.assert_allclose(to_numpy(half), to_numpy(full), atol=0.02)
        # T is that of the stored kernel, not of a rounded one.
        for part, whole in zip(form, exact, strict=True):
            np.testing.assert_array_equal(to_numpy(part), to_numpy(whole))


def check_policies(cls, arguments, input_shape):
    """Half precision throughout, with the default initializers; integer inputs."""
    for dtype in ("float16", "bfloat16"):
        layer = cls(**arguments, dtype=dtype)
        outputs = layer(np.ones((2, *input_shape), "float32"))
        assert keras.backend.standardize_dtype(outputs.dtype) == dtype
        assert keras.backend.standardize_dtype(layer.kernel.dtype) == dtype
        assert np.isfinite(to_numpy(keras.ops.cast(outputs, "float32"))).all()
        assert np.abs(to_numpy(keras.ops.cast(layer.kernel, "float32"))).max() > 0
    layer = cls(**arguments)
    x = np.random.default_rng(6).integers(0, 255, (2, *input_shape)).astype("uint8")
    outputs = layer(x)
    assert keras.backend.standardize_dtype(outputs.dtype) == "float32"
    np.testing.assert_array_equal(to_numpy(outputs), to_numpy(layer(x.astype("float32"))))


def check_activations(cls, arguments, slopes):
    """Layers and functions of `keras.ops` given as activations are taken for what they are."""
    kl = keras.layers
    taken = [kl.ReLU(), kl.ReLU(6.0, 0.1), kl.LeakyReLU(0.3), kl.ELU(0.7), keras.ops.relu, "relu"]
    taken += [kl.Activation("tanh"), keras.ops.leaky_relu, None]
    refused = ["gelu", keras.ops.gelu, "selu", "exponential", "log_softmax", kl.LeakyReLU(1.1)]
    refused += [kl.ELU(1.3), kl.ReLU(negative_slope=1.1), kl.ReLU(threshold=0.5)]
    refused += [kl.Activation("silu")]
    for activation in taken:
        layer = cls(**arguments, activation=activation)
        copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
        assert type(copy.activation) is type(layer.activation)
    for activation in refused:
        with pytest.raises(ValueError, match=rf"whose slope lies in \[{slopes}\].*Received: act"):
            cls(**arguments, activation=activation)


def check_values(layer, input_shape, kind):
    """The outputs, in float32, against the formula in 80-bit NumPy, to 1e-5."""
    layer.build((None, *input_shape))
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    if layer.log_q is not None:
        layer.log_q.assign(np.resize([1e30, -1e30, 0.5], layer.log_q.shape))  # clipped
    x = rng.normal(size=(3, *input_shape)).astype("float32")
    expected = extended.LAYERS[kind](layer, x.astype(extended.LONG))
    np.testing.assert_allclose(called(layer, x), expected.astype("float64"), rtol=1e-5, atol=1e-5)


def check_gradients(make, input_shape):
    """The gradient of each weight, in float64, against differences of the loss."""
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
        shapes = [tuple(weight.shape) for weight in layer.weights]
        ends = np.cumsum([math.prod(shape) for shape in shapes])

        def loss(values):
            parts = keras.ops.split(values, [int(end) for end in ends[:-1]])
            parts = [keras.ops.reshape(part, shape) for part, shape in zip(parts, shapes)]
            with keras.StatelessScope(state_mapping=list(zip(layer.weights, parts))):
                return keras.ops.sum(layer(x) * target)

        both = in_one_program(lambda values: (loss(values), backend.gradient(loss, values)))
        start = np.concatenate([to_numpy(weight).ravel() for weight in layer.weights])
        slope = to_numpy(both(keras.ops.convert_to_tensor(start))[1])
        assert np.isfinite(slope).all()
        for part in np.split(np.arange(len(start)), ends[:-1]):
            direction = np.zeros(len(start))
            direction[part] = rng.normal(size=len(part))
            step = 1e-5
            ahead, behind = (
                float(to_numpy(both(keras.ops.convert_to_tensor(start + s * direction))[0]))
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

    def loss(value):
        with keras.StatelessScope(state_mapping=[(layer.kernel, value)]):
            return keras.ops.sum(layer(x) ** 2)

    gradient = in_one_program(lambda value: backend.gradient(loss, value))
    for kernel in (np.zeros(shape, "float32"), some, 1e-30 * some, 1e15 * some):
        assert np.isfinite(to_numpy(gradient(keras.ops.convert_to_tensor(kernel)))).all()
