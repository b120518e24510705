"""A whole training step, and a training, as an accelerator would run them: shown on a CPU."""

import collections
import re

import accelerated
import keras
import numpy as np
import pytest
from data import small_lipnext, to_numpy

from keras_lipnext.losses import EMMA
from keras_lipnext.manifolds import Stiefel, stiefel
from keras_lipnext.optimizers import ManifoldAdam, ManifoldMuon


def lowered_step(model, count=4):
    """A training step as JAX hands it to XLA for an NVIDIA GPU, without what `jnp.diagonal` adds.

    That chooses by a constant, the platform, which leaves no branch in the compiled program.
    """
    import jax

    batch = np.zeros((count, *model.input_shape[1:]), "float32"), np.zeros(count, "int32")
    model._symbolic_build(data_batch=batch)
    parts = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state, batch = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (tuple(map(list, parts)), batch)
    )
    text = jax.export.export(jax.jit(model.train_step), platforms=["cuda"])(state, batch)
    functions = re.split(r"(?=  func\.func )", text.mlir_module())
    return "".join(f for f in functions if not f.startswith("  func.func private @diagonal"))


def products_of_stacks(text, depth):
    """{(shape, shape): {what may be lost: number}} of the products of `depth` matrices at once."""
    pattern = rf": \(tensor<{depth}x(\d+x\d+)x(\w+)>, tensor<{depth}x(\d+x\d+)x\w+>\)"
    found = collections.defaultdict(collections.Counter)
    for line in text.splitlines():
        match = re.search(pattern, line) if "stablehlo.dot_general" in line else None
        if match:
            left, operands, right = match.groups()
            asked = re.search(r"precision = \[(\w+)", line)
            found[left, right][asked.group(1) if asked else operands] += 1
    return found


# Kernels of 32 x 32, whose drift is removed by a sixteenth of the rows, and of 32 x 16.
MUON = {
    ("32x32", "32x32"): {"bf16": 8, "HIGH": 1},  # tangent, direction, D^2; step
    ("2x32", "32x32"): {"HIGHEST": 1, "HIGH": 1},  # defect, correction
    ("16x32", "32x16"): {"bf16": 5, "HIGHEST": 1},  # tangents, direction; defect
    ("32x16", "16x16"): {"bf16": 5, "HIGH": 1},
    ("16x16", "16x16"): {"HIGH": 2},
}
ADAM = {
    ("32x32", "32x32"): {"bf16": 1, "HIGH": 3},  # tangent; D^2, D^3 and D^4, step
    ("2x32", "32x32"): {"HIGHEST": 1, "HIGH": 1},
    ("16x32", "32x16"): {"bf16": 2, "HIGHEST": 1},
    ("32x16", "16x16"): {"bf16": 2, "HIGH": 1},
    ("16x16", "16x16"): {"HIGH": 2},
}


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX lowers for what is not there")
@pytest.mark.parametrize("make, expected", [(ManifoldMuon, MUON), (ManifoldAdam, ADAM)])
def test_a_step_has_no_branch_and_each_product_its_precision(make, expected, monkeypatch):
    accelerated.pretend(monkeypatch)
    model = small_lipnext(depth=3, width=32, dtype="mixed_bfloat16")
    model.compile(make(0.01), loss=EMMA(0.5, temperature=16))
    text = lowered_step(model)
    assert not re.search(r"stablehlo\.(case|if|while)", text)
    assert products_of_stacks(text, 3) == expected


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX lowers for what is not there")
@pytest.mark.parametrize("options", [{}, {"use_ema": True}], ids=str)
def test_the_recipe_as_it_comes_has_no_branch(options, monkeypatch):
    """Its schedule, its patches and its metrics among it; an average, too."""
    accelerated.pretend(monkeypatch)
    model = small_lipnext(depth=3, width=32, neck="patches", dtype="mixed_bfloat16")
    if options:
        model.compile(ManifoldMuon(0.01, **options), loss=model.loss)
    assert not re.search(r"stablehlo\.(case|if|while)", lowered_step(model))


def kernels():
    """Three of each shape of `MUON` and `ADAM`."""
    variables = [keras.Variable(np.eye(32, n, dtype="float32")) for n in (32, 16) * 3]
    for variable in variables:
        variable.constraint = Stiefel()
    return variables


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's graphs")
@pytest.mark.parametrize("make, expected", [(ManifoldMuon, MUON), (ManifoldAdam, ADAM)])
def test_a_step_of_tensorflow_has_no_branch_and_each_product_its_precision(
    make, expected, monkeypatch
):
    import tensorflow as tf

    accelerated.pretend(monkeypatch)
    variables, optimizer = kernels(), make(0.01)
    optimizer.build(variables)
    step = tf.function(lambda *gradients: optimizer.apply(gradients, variables))
    traced = step.get_concrete_function(*(tf.TensorSpec(v.shape, "float32") for v in variables))
    graphs = [traced.graph, *(f.graph for f in traced.graph._functions.values())]
    operations = [o for graph in graphs for o in graph.get_operations()]
    assert not [o for o in operations if re.search("If|Case|While|Switch|Svd", o.type)]
    asked = {"bfloat16": "bf16", "float32": "HIGH", "float64": "HIGHEST"}
    found = collections.defaultdict(collections.Counter)
    for operation in operations:
        if "MatMul" in operation.type:
            a, b = operation.inputs
            assert a.shape[0] == b.shape[0] == 3
            shapes = tuple("x".join(map(str, m.shape[1:])) for m in (a, b))
            found[shapes][asked[a.dtype.name]] += 1
    assert found == expected


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's dispatcher")
@pytest.mark.parametrize("make, expected", [(ManifoldMuon, MUON), (ManifoldAdam, ADAM)])
def test_a_step_of_pytorch_reads_nothing_and_each_product_has_its_precision(
    make, expected, monkeypatch
):
    """What each precision is on CUDA: tests/test_backend.py."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Forbidding(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            read = re.search("local_scalar_dense|nonzero|svd|equal.default", str(function))
            assert not read, f"{function} waits for the device"
            return function(*args, **(kwargs or {}))

    accelerated.pretend(monkeypatch)
    asked = {"direction": "bf16", "increment": "HIGH", "exact": "HIGHEST"}
    found = collections.defaultdict(collections.Counter)

    def product(a, b, precision):
        assert a.shape[0] == b.shape[0] == 3
        shapes = tuple("x".join(map(str, m.shape[1:])) for m in (a, b))
        found[shapes][asked[precision]] += 1
        return torch.matmul(a, b)

    monkeypatch.setitem(accelerated.products._PRODUCTS, "torch", product)
    variables, optimizer = kernels(), make(0.01)
    optimizer.build(variables)
    gradients = [torch.ones(*v.shape) for v in variables]
    with Forbidding():
        optimizer.apply(gradients, variables)
    assert found == expected


def spectral_excess(model):
    """By how much the kernels' norms multiply to more than 1."""
    kernels = [v for v in model.trainable_variables if isinstance(v.constraint, Stiefel)]
    norms = [np.linalg.norm(to_numpy(v).astype("float64"), 2) for v in kernels]
    return sum(np.log(norms)) / len(norms)


@pytest.mark.parametrize("make", [ManifoldMuon, ManifoldAdam])
def test_training_in_rounded_products_ends_on_the_manifold(make, digits, monkeypatch):
    """TF32 and bfloat16 wherever float32 is not asked for: 32 kernels would have K - 1 < 1e-5.

    What that does to certified accuracy: benchmarks/rounded_products.py.
    """
    accelerated.round_products(monkeypatch)
    (x, y), _ = digits
    model = small_lipnext(epsilon=0.1)
    model.compile(make(0.01), loss=model.loss, metrics=["accuracy"])
    history = model.fit(x[:1024], y[:1024], epochs=3, batch_size=64, verbose=0).history
    assert history["accuracy"][-1] > 0.6  # chance is 0.1
    for variable in model.trainable_variables:
        if isinstance(variable.constraint, Stiefel):
            assert float(stiefel.defect(variable)) < 2e-6
    assert spectral_excess(model) * 3 * 32 < 1e-5
