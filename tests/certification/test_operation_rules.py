"""Operations of `keras.ops` between layers: evaluation, constant and rounding, and refusals."""

import keras
import numpy as np
import pytest
from test_layer_rules import check, needs_long, samples

from keras_lipnext.certification import lipschitz_bound

ops = keras.ops
MATRIX = np.array([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1]], "float32")
NORM = np.linalg.norm(MATRIX.astype("float64"), 2)
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
    "cos": (ops.cos, (5,), 1),
    "arctan": (ops.arctan, (5,), 1),
    "arcsinh": (ops.arcsinh, (5,), 1),
    "erf": (ops.erf, (5,), 2 / np.pi**0.5),
    "soft_shrink": (lambda x: ops.soft_shrink(x, threshold=0.3), (5,), 1),
    "squareplus": (lambda x: ops.squareplus(x, b=0.7), (5,), 1),
    "sparse_plus": (ops.sparse_plus, (5,), 1),
    "relu with a slope": (
        lambda x: keras.activations.relu(x, negative_slope=-1.2, max_value=0.7),
        (5,),
        1.2,
    ),
    "repeat": (lambda x: ops.repeat(x, 3, axis=1), (4, 2), 3**0.5),
    "repeat unevenly": (lambda x: ops.repeat(x, np.array([1, 3, 2]), axis=2), (2, 3), 3**0.5),
    "tile": (lambda x: ops.tile(x, (1, 2, 3)), (4, 2), 6**0.5),
    "tile the last axis": (lambda x: ops.tile(x, 3), (4, 2), 3**0.5),
    "take": (lambda x: ops.take(x, [3, 0, -1, 1], axis=1), (4, 2), 2**0.5),
    "take a matrix": (lambda x: ops.take(x, np.array([[0, 1], [1, 1]]), axis=-1), (2, 3), 3**0.5),
    "cumsum": (lambda x: ops.cumsum(x, axis=1), (5, 2), 1 / (2 * np.sin(np.pi / 22))),
    "pad with a number": (lambda x: ops.pad(x, ((0, 0), (1, 2)), constant_values=0.7), (3,), 1),
    "reflect": (
        lambda x: ops.pad(x, ((0, 0), (2, 1), (1, 1)), mode="reflect"),
        (4, 3),
        3,  # of 2 1 0 1 2 3 2 and 1 0 1 2 1, one entry comes three times each
    ),
    "symmetric by one": (
        lambda x: ops.pad(x, ((0, 0), (1, 1), (0, 1)), mode="symmetric"),
        (4, 3),
        2,
    ),
    "sort": (lambda x: ops.sort(x, axis=1), (5, 2), 1),
    "norm": (lambda x: ops.norm(x, axis=(1,)), (5, 2), 1),
    "norm of matrices": (lambda x: ops.norm(x, axis=(1, 2), keepdims=True), (3, 2), 1),
    "norm of order 1": (lambda x: ops.norm(x, ord=1, axis=(-1,)), (3, 5), 5**0.5),
    "norm of order infinity": (lambda x: ops.norm(x, ord=np.inf, axis=(1,)), (5, 2), 1),
    "logsumexp": (lambda x: ops.logsumexp(x, axis=1), (5, 2), 1),
    "matmul": (lambda x: ops.matmul(x, MATRIX), (3,), NORM),
    "matmul of sequences": (lambda x: x @ MATRIX, (4, 3), NORM),
    "matmul from the left": (lambda x: ops.matmul(MATRIX.T, x), (3, 2), NORM),
    "matmul with a vector": (lambda x: ops.matmul(x, FACTORS), (2, 3), np.linalg.norm(FACTORS)),
    "dot": (lambda x: ops.dot(x, MATRIX), (4, 3), NORM),
    "tensordot": (lambda x: ops.tensordot(x, MATRIX, axes=1), (4, 3), NORM),
    "einsum": (lambda x: ops.einsum("bni,ij->bjn", x, MATRIX), (2, 3), NORM),
    "einsum, constant first": (lambda x: ops.einsum("ij,...i->...j", MATRIX, x), (2, 3), NORM),
    "einsum of groups": (
        lambda x: ops.einsum("bhi,hij->bhj", x, np.stack([MATRIX, 0.5 * MATRIX])),
        (2, 3),
        NORM,
    ),
    "einsum that sums": (lambda x: ops.einsum("bni,ij->bj", x, MATRIX), (4, 3), 2 * NORM),
    "einsum that scales": (lambda x: ops.einsum("bni,i->bni", x, FACTORS), (2, 3), 2.5),
}
# Where the search finds no slope near the constant: few points have it, or none.
LOOSE = {
    "minimum of two",
    "multiply by a column, broadcasting",
    "silu",
    "split and concatenate",
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
    "padded by symmetry": (
        lambda x: ops.pad(x, ((0, 0), (2, 0), (0, 0)), mode="symmetric"),
        r"backends of Keras pad 2 entries by 'symmetric' in different ways",
    ),
    "padded with itself": (
        lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 0)), constant_values=ops.sum(x, axis=(1, 2))),
        r"pads with a tensor",
    ),
    "padded with an array": (
        lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 0)), constant_values=np.ones(3)),
        r"pads with an array",
    ),
    "indices out of range": (lambda x: ops.take(x, [0, 3], axis=1), r"whole numbers from -3 to 2"),
    "indices that are fractions": (
        lambda x: ops.take(x, np.array([0.5]), axis=1),
        r"whole numbers from -3 to 2",
    ),
    "padded all around": (lambda x: ops.pad(x, 1), r"pads the batch axis"),
    "repeated samples": (lambda x: ops.repeat(x, 2, axis=0), r"works on the batch axis"),
    "repeat of all": (lambda x: ops.repeat(x, 2), r"mixes the samples"),
    "tiled samples": (lambda x: ops.tile(x, (2, 1, 1)), r"works on the batch axis"),
    "tiled in front": (lambda x: ops.tile(x, (2, 1, 1, 1)), r"works on the batch axis"),
    "samples taken": (lambda x: ops.take(x, [0, 0], axis=0), r"works on the batch axis"),
    "take of all": (lambda x: ops.take(x, [0, 0]), r"mixes the samples"),
    "cumsum over samples": (lambda x: ops.cumsum(x, axis=0), r"works on the batch axis"),
    "cumsum of all": (lambda x: ops.cumsum(x), r"mixes the samples"),
    "cumsum in another dtype": (
        lambda x: ops.cumsum(x, axis=1, dtype="float16"),
        r"computes in float16",
    ),
    "sorted samples": (lambda x: ops.sort(x, axis=0), r"works on the batch axis"),
    "sort of all": (lambda x: ops.sort(x, axis=None), r"mixes the samples"),
    "norm over samples": (lambda x: ops.norm(x, axis=0), r"works on the batch axis"),
    "norm of all": (ops.norm, r"mixes the samples"),
    "spectral norm": (
        lambda x: ops.norm(x, ord=2, axis=(1, 2)),
        r"order 2 over 2 axes has no rule",
    ),
    "norm of order 3": (lambda x: ops.norm(x, ord=3, axis=1), r"order 3 over 1 axes has no rule"),
    "logsumexp over samples": (lambda x: ops.logsumexp(x, axis=0), r"works on the batch axis"),
    "logsumexp of all": (ops.logsumexp, r"mixes the samples"),
    "matmul of tensors": (lambda x: ops.matmul(x, x), r"product of several tensors"),
    "matmul of samples": (
        lambda x: ops.matmul(np.ones((2, 3)), ops.sum(x, axis=1)),
        r"works on the batch axis|cannot|not compatible|Inputs|Einsum|shapes",
    ),
    "matmul with a stack": (
        lambda x: ops.matmul(x, np.ones((1, 3, 3))),
        r"neither a vector nor a matrix",
    ),
    "einsum of tensors": (lambda x: ops.einsum("bij,bjk->bik", x, x), r"several tensors"),
    "einsum over samples": (
        lambda x: ops.einsum("bij,bc->cij", x, np.ones((3, 2))),
        r"works on the batch axis",
    ),
    "einsum that sums samples": (
        lambda x: ops.einsum("bij,jk->ik", x, np.ones((3, 2))),
        r"works on the batch axis",
    ),
    "einsum that moves samples": (
        lambda x: ops.einsum("bij,jk->ibk", x, np.ones((3, 2))),
        r"works on the batch axis",
    ),
    "einsum of a diagonal": (
        lambda x: ops.einsum("bii,ik->bk", x, np.ones((3, 2))),
        r"takes diagonals",
    ),
    "einsum that sums its constant": (
        lambda x: ops.einsum("bij,jk->bij", x, np.ones((3, 2))),
        r"sum it beforehand",
    ),
    "einsum without output": (
        lambda x: ops.einsum("bij,jk", x, np.ones((3, 2))),
        r"do not name the output",
    ),
    "dot from the left": (lambda x: ops.dot(np.ones((2, 3)), x), r"its constant stands first"),
    "infinite matrix": (lambda x: ops.matmul(x, np.full((3, 2), np.inf)), r"NaN or infinite"),
    "matrix of zeros": (lambda x: ops.matmul(x, np.zeros((3, 2))), r"all-zero kernel"),
    "glu": (lambda x: ops.glu(ops.tile(x, (1, 1, 2))), r"\(Glu\).*a product of two tensors"),
    "exponential": (ops.exp, r"\(Exp\).*grows ever steeper"),
    "hard_shrink": (ops.hard_shrink, r"\(HardShrink\).*jumps at its threshold"),
    "threshold": (lambda x: ops.threshold(x, 0.5, 0.0), r"\(Threshold\).*jumps at its threshold"),
    "relu that jumps": (
        lambda x: keras.activations.relu(x, threshold=0.5),
        r"jumps at its threshold 0.5",
    ),
    "relu below zero": (
        lambda x: keras.activations.relu(x, max_value=-1.0),
        r"its max_value is -1.0",
    ),
    "soft_shrink that jumps": (
        lambda x: ops.soft_shrink(x, threshold=-0.5),
        r"jumps at its threshold -0.5",
    ),
    "squareplus of a negative number": (lambda x: ops.squareplus(x, b=-1.0), r"its b is -1.0"),
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
    constant, slope, _ = check(functional(function, shape), samples(shape))
    if expected:
        assert constant == pytest.approx(expected, rel=1e-6)
    if name not in LOOSE:  # nor can it be smaller
        assert slope > 0.995 * constant


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    function, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(functional(function, (3, 3)))
