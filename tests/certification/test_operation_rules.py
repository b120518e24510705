"""Operations of `keras.ops` between layers: evaluation, constant and rounding, and refusals."""

import keras
import numpy as np
import pytest
from test_layer_rules import check, needs_long, samples

from keras_lipnext.certification import lipschitz_bound

ops = keras.ops
FACTORS = np.array([0.1, -2.5, 1.7], "float32")

# (function, shape of a sample, its constant where it is known exactly).
CASES = {
    "divide by 255": (lambda x: x / 255.0, (3,), 1 / 255),
    "multiply by a number": (lambda x: 0.3 * x, (3,), 0.3),
    "multiply by a vector": (lambda x: x * FACTORS, (2, 3), 2.5),
    "divide by a vector": (lambda x: x / FACTORS, (2, 3), 10),
    "multiply by a column, broadcasting": (lambda x: x * FACTORS, (2, 1), 2.5 * 3**0.5),
    "subtract from a number": (lambda x: 1.0 - x, (3,), 1),
    "add a number": (lambda x: x + 0.1, (3,), 1),
    "add itself": (lambda x: x + x, (3,), 2),
    "subtract itself, flipped": (lambda x: x - ops.flip(x, axis=1), (3,), 2),
    "negative and absolute": (lambda x: ops.abs(-x), (3,), 1),
    "maximum with a number": (lambda x: ops.maximum(x, 0.1), (3,), 1),
    "minimum of two": (lambda x: ops.minimum(x, 2.0 * x), (3,), 5**0.5),
    "clip": (lambda x: ops.clip(x, -0.1, 0.7), (3,), 1),
    "clip away from zero": (lambda x: ops.clip(x, 0.1, 0.7), (3,), 1),
    "cast": (lambda x: ops.cast(x, "float16"), (3,), 1),
    "stop_gradient": (ops.stop_gradient, (3,), 1),
    "reshape": (lambda x: ops.reshape(x, (-1, 6)), (2, 3), 1),
    "transpose": (lambda x: ops.transpose(x, (0, 2, 1)), (2, 3), 1),
    "moveaxis": (lambda x: ops.moveaxis(x, 1, -1), (2, 3), 1),
    "swapaxes": (lambda x: ops.swapaxes(x, 1, 2), (2, 3), 1),
    "roll": (lambda x: ops.roll(x, 2, axis=1), (5, 3), 1),
    "expand and squeeze": (lambda x: ops.squeeze(ops.expand_dims(x, 2), axis=2), (5, 3), 1),
    "split and concatenate": (
        lambda x: ops.concatenate(ops.split(x, 2, axis=1)[::-1], axis=1),
        (4, 3),
        2**0.5,
    ),
    "stack": (lambda x: ops.stack([x, -x], axis=1), (3,), 2**0.5),
    "pad": (lambda x: ops.pad(x, ((0, 0), (1, 2))), (3,), 1),
    "slices": (lambda x: x[:, 1:, ::2], (4, 5), 1),
    "ellipsis": (lambda x: x[..., 1:, None], (4,), None),
    "sum": (lambda x: ops.sum(x, axis=(1, 2)), (3, 4, 2), 12**0.5),
    "mean": (lambda x: ops.mean(x, axis=1, keepdims=True), (4, 2), 0.5),
    "max": (lambda x: ops.max(x, axis=1), (4, 2), 1),
    "min": (lambda x: ops.min(x, axis=-1, keepdims=True), (4, 2), 1),
    "relu": (ops.relu, (5,), 1),
    "leaky_relu": (lambda x: ops.leaky_relu(x, negative_slope=0.1), (5,), 1),
    "elu": (lambda x: ops.elu(x, alpha=1.3), (5,), 1.3),
    "gelu by tanh": (lambda x: ops.gelu(x, approximate=True), (5,), 1.1289931),
    "gelu": (lambda x: ops.gelu(x, approximate=False), (5,), 1.1289042),
    "silu": (ops.silu, (5,), 1.0998394),
    "tanh": (ops.tanh, (5,), 1),
    "sin": (ops.sin, (5,), 1),
}
REFUSED = {
    "product of tensors": (lambda x: x * x, r"product of two tensors"),
    "quotient": (lambda x: 1.0 / (x + 3.0), r"dividing by a tensor"),
    "divide by zero": (lambda x: x / np.zeros(3, "float32"), r"divides by zero"),
    "infinite constant": (lambda x: x * np.inf, r"NaN or infinite"),
    "another value for each sample": (
        lambda x: x + np.ones((7, 3, 3), "float32"),
        r"gives each sample of a batch another value",
    ),
    "samples mixed by reshape": (
        lambda x: ops.reshape(x, (-1, 9 * 2)),
        r"may mix the samples of a batch",
    ),
    "samples mixed by transpose": (lambda x: ops.transpose(x, (1, 0, 2)), r"moves the batch axis"),
    "transpose of all": (ops.transpose, r"moves the batch axis"),
    "moveaxis": (lambda x: ops.moveaxis(x, 0, 1), r"works on the batch axis"),
    "swapaxes": (lambda x: ops.swapaxes(x, 0, 1), r"works on the batch axis"),
    "flip of samples": (lambda x: ops.flip(x, axis=0), r"works on the batch axis"),
    "flip of all": (lambda x: ops.flip(x), r"mixes the samples"),
    "roll of all": (lambda x: ops.roll(x, 1), r"mixes the samples"),
    "sum over samples": (lambda x: ops.sum(x, axis=0, keepdims=True), r"works on the batch axis"),
    "mean of all": (lambda x: ops.reshape(ops.mean(x), (1, 1)), r"mixes the samples|mix"),
    "samples concatenated": (
        lambda x: ops.concatenate([x, x], axis=0),
        r"works on the batch axis",
    ),
    "stacked in front": (lambda x: ops.stack([x, x], axis=0), r"works on the batch axis"),
    "padded samples": (lambda x: ops.pad(x, ((1, 0), (0, 0), (0, 0))), r"pads the batch axis"),
    "padded with ones": (
        lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 0)), constant_values=1.0),
        r"something else than zeros",
    ),
    "reflected": (
        lambda x: ops.pad(x, ((0, 0), (1, 1), (0, 0)), mode="reflect"),
        r"something else than zeros",
    ),
    "some samples only": (lambda x: x[1:, :], r"does more than take slices of each sample"),
    "slices by ellipsis": (lambda x: x[..., 1:, :, :], r"does more than take slices of each"),
    "one sample": (lambda x: x[0], r"does more than take slices of each sample"),
    "square": (ops.square, r"'square' \(Square\) cannot be certified: no Lipschitz constant is"),
    "softmax": (lambda x: ops.softmax(x, axis=1), r"softmax inside a network"),
    "cast to integers": (lambda x: ops.cast(x, "int32"), r"rounds to int32"),
    "ranks broadcast": (lambda x: x + ops.sum(x, axis=1), r"broadcasts shapes"),
}


def functional(function, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, function(inputs))


@needs_long
@pytest.mark.parametrize("name", CASES)
def test_operation(name):
    function, shape, expected = CASES[name]
    constant, _, _ = check(functional(function, shape), samples(shape))
    if expected:
        assert constant == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    function, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(functional(function, (3, 3)))
