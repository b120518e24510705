import re
import types

import keras
import numpy as np
import pytest
from data import to_numpy
from layer_checks import random_input

from keras_lipnext import backend, lipschitz_bound
from keras_lipnext.layers import (
    BetaAbs,
    FullShiftMixing,
    L2Pool,
    LipNeXtBlock,
    NormalizedDense,
    ShiftMixing,
    SpatialShift,
)


@pytest.fixture
def expanded(monkeypatch):
    """A list that grows by every block that is expanded."""
    calls, expand = [], LipNeXtBlock._expanded

    def counted(block, inputs):
        calls.append(block)
        return expand(block, inputs)

    monkeypatch.setattr(LipNeXtBlock, "_expanded", counted)
    return calls


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", ["circular", "zero"])
def test_equals_the_papers_formula(padding, training, expanded):
    """beta_abs(M R^T S(R (x + p)) + b), all matrices whole, in float64."""
    x = random_input((11, 3, 4, 16), "float64")
    with backend.float64_scope():
        block = LipNeXtBlock(1 / 8, 0.75, padding, dtype="float64")
        block.build(x.shape)
        block.positional_bias.bias.assign(random_input((3, 4, 1), "float64", seed=1))
        block.dense.bias.assign(random_input((16,), "float64", seed=2))
        actual = to_numpy(block(keras.ops.convert_to_tensor(x), training=training))
        p = to_numpy(block.positional_bias.bias)
        m, b = to_numpy(block.dense.kernel).T, to_numpy(block.dense.bias)
        rows = to_numpy(block.mixing.kernel).T  # R_s, to be completed to an orthogonal R
        rest = np.linalg.svd(rows)[2][8:]
        r = np.concatenate([rows, rest])
        np.testing.assert_allclose(r @ r.T, np.eye(16), atol=1e-12)
        shift = SpatialShift(1 / 8, padding, dtype="float64")
        shifted = to_numpy(shift(keras.ops.convert_to_tensor((x + p) @ r.T)))
        z = shifted @ r @ m.T + b
        expected = to_numpy(BetaAbs(0.75, dtype="float64")(keras.ops.convert_to_tensor(z)))
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    assert len(expanded) == training


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_training_changes_neither_function_nor_gradients(data_format, expanded):
    """In float64, with respect to the inputs and to all weights."""
    shape = (11, 3, 4, 16) if data_format == "channels_last" else (11, 16, 3, 4)
    x = random_input(shape, "float64")
    with backend.float64_scope():
        block = LipNeXtBlock(1 / 8, data_format=data_format, dtype="float64")
        block.build(shape)
        block.positional_bias.bias.assign(random_input(block.positional_bias.bias.shape, "float64"))
        block.dense.bias.assign(random_input((16,), "float64", seed=2))
        arguments = [x, *(to_numpy(v) for v in block.trainable_variables)]

        def slope(index, training):
            def energy(value):
                at = [*arguments[:index], value, *arguments[index + 1 :]]
                answer, _ = block.stateless_call(at[1:], [], at[0], training=training)
                return keras.ops.sum(keras.ops.sin(answer))

            value = keras.ops.convert_to_tensor(arguments[index])
            return to_numpy(backend.gradient(energy, value))

        found = [[slope(i, t) for i in range(len(arguments))] for t in (True, False)]
    assert len(expanded) == len(arguments)
    for one, other in zip(*found, strict=True):
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_small_batches_full_mixing_and_predictions_are_not_expanded(expanded):
    """The product of the kernels costs as much as 8 more vectors would: 128 are enough for it."""
    block, full = LipNeXtBlock(1 / 8), LipNeXtBlock(1 / 8, mixing="full")
    block(np.ones((10, 3, 4, 16), "float32"), training=True)
    full(np.ones((11, 3, 4, 16), "float32"), training=True)
    block(np.ones((11, 3, 4, 16), "float32"))
    block(np.ones((11, 3, 4, 16), "float32"), training=False)
    assert expanded == []
    block(np.ones((11, 3, 4, 16), "float32"), training=True)
    assert expanded == [block]


def test_changed_blocks_are_not_expanded(expanded):
    """Parts that were exchanged, or a subclass's own, compute something else."""

    class Backwards(LipNeXtBlock):
        @property
        def parts(self):
            return super().parts[::-1]

    x = random_input((11, 3, 4, 16), "float32")
    activated, other, backwards = LipNeXtBlock(1 / 8), LipNeXtBlock(1 / 8), Backwards(1 / 8)
    other.activation = keras.layers.ReLU()
    for block in (activated, other, backwards):
        block.build(x.shape)
        if block is activated:
            block.dense.activation = keras.activations.relu
        answers = [to_numpy(block(x, training=training)) for training in (True, False)]
        np.testing.assert_array_equal(*answers)
    assert expanded == []


def test_which_batches_are_expanded(monkeypatch):
    """TensorFlow's are of no known size, as are those of exported programs. Devices share one."""
    block = LipNeXtBlock(1 / 8)
    block.build((None, 4, 4, 16))

    def expands(batch):
        return block._pays_to_expand(keras.KerasTensor((batch, 4, 4, 16)))

    assert [expands(batch) for batch in (None, 8, 7)] == [True, True, False]
    four = types.SimpleNamespace(device_mesh=types.SimpleNamespace(devices=np.zeros((2, 2))))
    monkeypatch.setattr(keras.distribution, "distribution", lambda: four)
    assert [expands(batch) for batch in (None, 32, 31)] == [True, True, False]


def test_predictions_as_in_training_are_not_certified():
    """They are of another program than that of the parts, which a certificate is about."""
    inputs = keras.Input((4, 4, 16))
    x = L2Pool()(LipNeXtBlock(1 / 8)(inputs, training=True))
    model = keras.Model(inputs, NormalizedDense(3)(x))
    with pytest.raises(ValueError, match=r"LipNeXtBlock.*training=True.*not as at inference"):
        lipschitz_bound(model)


def test_parts_inherit_the_dtype():
    block = LipNeXtBlock(dtype="mixed_bfloat16")
    block.build((None, 4, 4, 8))
    assert {part.dtype_policy.name for part in block.parts} == {"mixed_bfloat16"}


def test_mixing_chooses_the_layer():
    kinds = {mixing: type(LipNeXtBlock(mixing=mixing).mixing) for mixing in ("reduced", "full")}
    assert kinds == {"reduced": ShiftMixing, "full": FullShiftMixing}
    assert type(LipNeXtBlock().mixing) is ShiftMixing
    with pytest.raises(ValueError, match=r"'reduced'.*or 'full'.*Received: mixing='whole'"):
        LipNeXtBlock(mixing="whole")


def test_channels_not_divisible():
    with pytest.raises(ValueError, match=r"multiples of 8 channels work"):
        LipNeXtBlock(1 / 8)(np.ones((1, 4, 4, 20)))


def freeze_block(block):
    block.trainable = False


def freeze_mixing(block):
    block.mixing.trainable = False


def freeze_dense(block):
    block.dense.trainable = False


def freeze_all_but_dense(block):
    block.trainable = False
    block.dense.trainable = True


@pytest.mark.parametrize(
    "freeze, nested",
    [
        (freeze_block, False),
        (freeze_mixing, True),
        (freeze_dense, False),
        (freeze_all_but_dense, True),
        pytest.param(freeze_block, True, marks=pytest.mark.once),
        pytest.param(freeze_mixing, False, marks=pytest.mark.once),
        pytest.param(freeze_dense, True, marks=pytest.mark.once),
        pytest.param(freeze_all_but_dense, False, marks=pytest.mark.once),
    ],
)
def test_what_is_frozen_stays_so_in_files(freeze, nested, tmp_path):
    """A part that came back trainable would also cost the optimizer its state, with a warning."""
    images = keras.Input((4, 4, 8))
    block = LipNeXtBlock(name="block")
    if nested:
        x = keras.Model(images, block(images))(images)
    else:
        x = block(images)
    model = keras.Model(images, NormalizedDense(3)(L2Pool()(x)))
    freeze(block)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.train_on_batch(random_input((2, 4, 4, 8)), random_input((2, 3)))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [v.path for v in loaded.trainable_variables] == [
        v.path for v in model.trainable_variables
    ]
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)
    for ours, theirs in zip(model.optimizer.variables, loaded.optimizer.variables):
        np.testing.assert_array_equal(to_numpy(theirs), to_numpy(ours))


@pytest.mark.parametrize("when", ["constructor", "before building", "after building"])
def test_a_frozen_block_has_no_trainable_part_whenever_it_was_frozen(when):
    block = LipNeXtBlock(trainable=when != "constructor")
    if when == "before building":
        block.trainable = False
    block.build((None, 4, 4, 8))
    if when == "after building":
        block.trainable = False
    assert not any(v.trainable for v in block.variables)
    copy = LipNeXtBlock.from_config(block.get_config())
    assert copy.get_config() == block.get_config()
    copy.build((None, 4, 4, 8))
    copy.trainable = True
    assert all(v.trainable for v in copy.variables)
    assert copy.get_config()["frozen"] == []


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="lowers with jax")
@pytest.mark.parametrize("training", [False, True])
def test_products_and_sums_on_an_accelerator(training):
    """Of a product with several batch axes XLA makes the gradient by transposing both operands.

    And it transposes activations for a sum over axes that do not lie side by side. What is compiled
    for a card: benchmarks/gpu_passes.py.
    """
    import jax

    block = LipNeXtBlock(1 / 8)
    block.build((8, 4, 4, 16))

    def energy(values, x):
        answer, _ = block.stateless_call(values, [], x, training=training)
        return keras.ops.sum(keras.ops.square(answer))

    values = [v.value for v in block.trainable_variables]
    gradients = jax.jit(jax.grad(energy, (0, 1)))
    exported = jax.export.export(gradients, platforms=["cuda"])(values, random_input((8, 4, 4, 16)))
    lines = exported.mlir_module().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line]
    # Three, in training with that of the kernels a fourth, and two for the gradients of each.
    assert len(products) == (12 if training else 9)
    for product in products:
        assert "batching_dims" not in product
        assert product.count("tensor<") == 3 and re.fullmatch(
            r".*contracting_dims = \[[01]\] x \[[01]\].*", product
        ), product
    sums = re.findall(r"dimensions = \[([\d, ]*)\] : \(tensor<([\dx]*)x", "\n".join(lines))
    assert len(sums) == 3
    for axes, shape in sums:
        sizes = list(map(int, shape.split("x")))
        axes = [axis for axis in map(int, axes.split(",")) if sizes[axis] > 1]
        assert axes == list(range(axes[0], axes[-1] + 1)), (axes, shape)
