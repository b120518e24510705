"""`LipNeXt.estimate` against what the models are, and against XLA's own analysis."""

import math
import pathlib

import keras
import numpy as np
import pytest
from data import output_of, virtual_devices

import keras_lipnext as lip

on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's analysis")

SIZES = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "sizes.md"
SHAPE = {"input_shape": (16, 16, 3), "num_classes": 10, "patch_size": 2}
CASES = [
    {"depth": 3, "width": 64, "shift_ratio": 1 / 8},
    {"depth": 3, "width": 96, "shift_ratio": 1 / 8, "mixing": "full"},
    {"depth": 3, "width": 64, "shift_ratio": 1 / 8, "neck": "patches", "dense_depth": 2},
]
BATCH = 128


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments",
    [
        {"size": "tiny"},
        {"size": "small", "input_shape": (32, 32, 3), "num_classes": 7},
        {"size": "tiny", "mixing": "full", "input_shape": (8, 8, 1), "num_classes": 10},
        {"depth": 3, "width": 32, "shift_ratio": 1 / 4, "patch_size": 1},
        {"size": "tiny", "data_format": "channels_first"},
        {"size": "tiny", "input_shape": (32, 32, 3), "neck": "patches", "num_classes": 7},
        {"size": "tiny", "neck": "patches", "neck_width": 96, "dense_depth": 0},
        {"size": "tiny", "dense_depth": 3, "neck_width": 96},
    ],
    ids=str,
)
def test_parameters_and_optimizer_state_are_exact(arguments):
    found = lip.LipNeXt.estimate(**arguments)
    model = lip.LipNeXt(**arguments)
    assert found.parameters == model.count_params()
    assert found.weight_bytes == 4 * model.count_params()
    model.optimizer.build(model.trainable_variables)
    state = sum(4 * np.prod(v.shape) for v in model.optimizer.variables if len(v.shape))
    assert found.optimizer_bytes == state


def compiled(function, *arguments):
    import jax

    return jax.jit(function).lower(*arguments).compile()


@on_jax
@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_flops_and_memory_agree_with_xla(arguments):
    from programs import training_step

    found = lip.LipNeXt.estimate(batch=BATCH, **SHAPE, **arguments)
    model = lip.LipNeXt(**SHAPE, **arguments)
    x = np.zeros((BATCH, *SHAPE["input_shape"]), "float32")
    forward = compiled(lambda x: model(x), x).cost_analysis()["flops"]
    assert found.forward_flops * BATCH == pytest.approx(forward, rel=0.15)
    step = training_step(model, BATCH)
    expected = found.training_flops * BATCH + found.optimizer_flops
    assert expected == pytest.approx(step.cost_analysis()["flops"], rel=0.15)
    memory = step.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    assert found.peak_bytes == pytest.approx(peak, rel=0.15)


def saved_bytes(model):
    """What PyTorch keeps of a batch's loss for the backward pass, variables left out."""
    import torch

    own = {v.value.untyped_storage().data_ptr() for v in model.variables}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    x = np.random.default_rng(0).random((BATCH, *SHAPE["input_shape"])).astype("float32")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(keras.ops.convert_to_tensor(x), training=True)
        model.compute_loss(y=keras.ops.zeros(BATCH, "int32"), y_pred=logits)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's hooks")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_activations_agree_with_what_pytorch_keeps(arguments, dtype):
    found, measured = {}, {}
    for remat in (False, True):
        options = {"dtype": dtype, "remat": remat, **SHAPE, **arguments}
        found[remat] = lip.LipNeXt.estimate(batch=BATCH, **options).activation_bytes
        measured[remat] = saved_bytes(lip.LipNeXt(**options))
        if arguments.get("mixing") != "full":  # a block expanded keeps one activation less
            sides = [side // SHAPE["patch_size"] for side in SHAPE["input_shape"][:2]]
            entry = 2 if "bfloat16" in dtype else 4
            one = BATCH * math.prod(sides) * arguments["width"] * entry
            measured[remat] += one * (0 if remat else arguments["depth"])
    measured[True] += measured[False] / arguments["depth"]  # the block that is computed anew
    assert found == pytest.approx(measured, rel=0.15)


def test_devices_share_the_batch():
    one, four = (lip.LipNeXt.estimate("base", batch=64, devices=d) for d in (1, 4))
    assert four.activation_bytes == one.activation_bytes / 4
    assert four.optimizer_bytes == one.optimizer_bytes
    assert one.moved_bytes == 0


@pytest.mark.slow
@on_jax
def test_bytes_moved_agree_with_xla():
    ratio, _ = output_of("models/moved.py", **virtual_devices(4))
    assert float(ratio) == pytest.approx(1, rel=0.15)


def test_rematerialisation_costs_a_forward_pass_of_the_blocks():
    plain, remat = (lip.LipNeXt.estimate("base", batch=64, remat=r) for r in (False, True))
    assert remat.activation_bytes < plain.activation_bytes / 2.5
    assert remat.training_flops == pytest.approx(4 / 3 * plain.training_flops, rel=0.01)
    assert remat.optimizer_bytes == plain.optimizer_bytes


def test_mixed_precision_halves_activations():
    plain, mixed = (lip.LipNeXt.estimate("1b", dtype=d) for d in ("float32", "mixed_bfloat16"))
    assert mixed.activation_bytes == pytest.approx(plain.activation_bytes / 2, rel=0.01)
    assert mixed.weight_bytes == plain.weight_bytes
    assert plain.copy_bytes == 0 < mixed.copy_bytes


def test_what_is_printed():
    found = lip.LipNeXt.estimate("1b", batch=64, dtype="mixed_bfloat16", remat=True)
    text = str(found)
    for expected in (f"{found.parameters:,}", "optimizer state", "activations", "GB", "FLOP"):
        assert expected in text
    assert set(found.accelerators) == {s for s in (16, 24, 40, 80, 141, 192) if found.suffices(s)}
    assert not lip.LipNeXt.estimate("2b", batch=4096).accelerators
    assert "none of up to 192 GB" in str(lip.LipNeXt.estimate("2b", batch=4096))


@pytest.mark.parametrize("size", ["1b", "2b"])
def test_the_guide_says_what_large_models_take(size):
    found = [
        lip.LipNeXt.estimate(size, batch=64, dtype="mixed_bfloat16", remat=remat)
        for remat in (False, True)
    ]
    cells = [cell for e in found for cell in (f"{e.peak_bytes / 1e9:.1f}", min(e.accelerators))]
    row = "| {} | {} GB | {} GB | {} GB | {} GB |".format(size, *cells)
    assert row in SIZES.read_text().splitlines()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch": 0}, "`batch` must be a positive integer"),
        ({"devices": -1}, "`devices` must be a positive integer"),
        ({"batch": 3, "devices": 2}, "multiple of `devices`. Received: batch=3, devices=2"),
        ({"size": "huge"}, "`size` must be one of"),
        ({"patch_size": 3, "input_shape": (8, 8, 3)}, "tiles images with patches"),
        ({"patch_size": 0}, "`patch_size` must be a positive integer"),
        ({"patch_size": "2"}, "`patch_size` must be a positive integer"),
        ({"patch_size": 2.0}, "`patch_size` must be a positive integer"),
        ({"patch_size": 8}, "only if units >= patch_size"),
        ({"mixing": "foo"}, "`mixing` must be"),
        ({"shift_ratio": 0.3}, "`ratio`"),
        ({"depth": 2, "width": 63}, "Received"),
        ({"remat": "yes"}, "`remat` must be True or False"),
        ({"epsilon": -1}, "`epsilon` must be positive"),
        ({"beta": 2}, "beta"),
        ({"padding": "x"}, "`padding`"),
        ({"num_class": 3}, r"LipNeXt does not know the arguments \['num_class'\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lip.LipNeXt.estimate(**arguments)
    if not {"batch", "devices"} & set(arguments):  # the model says the same
        with pytest.raises(ValueError, match=message):
            lip.LipNeXt(**arguments)


def test_arguments_without_weight_are_taken():
    plain = lip.LipNeXt.estimate("tiny")
    assert lip.LipNeXt.estimate("tiny", epsilon=0.3, beta=0.5, name="a", compile=False) == plain
