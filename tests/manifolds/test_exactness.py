"""What is exact on every device, whatever the program lets products lose: shown on a CPU."""

import re

import keras
import numpy as np
import pytest
from data import to_numpy

from keras_lipnext import manifolds
from keras_lipnext.backend import precision
from keras_lipnext.manifolds import RandomStiefel, Stiefel, stiefel
from keras_lipnext.manifolds.constraint import ProjectedInitializer
from keras_lipnext.optimizers import ManifoldAdam, ManifoldMuon

BACKEND = keras.backend.backend()


def finalized(make, **options):
    """The weights after the end of `fit`, as a function of those before."""

    def finalize(x):
        variable = keras.Variable(np.zeros(x.shape, "float32"))
        variable.constraint = Stiefel()
        optimizer = make(**options)
        optimizer.build([variable])
        averages = getattr(optimizer, "_model_variables_moving_average", [])
        mapping = [(v, x) for v in (variable, *averages)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            optimizer.finalize_variable_values([variable])
        return scope.get_current_value(variable)

    return finalize


def sdp_bound(bound, shape):
    """1 / T of an SDP-based layer, which bounds its kernel's norm."""
    from keras_lipnext.layers import sdp_diagonal as _sdp

    size = int(np.prod(shape))

    def inverse(x):
        w = keras.ops.reshape(keras.ops.concatenate([keras.ops.ravel(x)] * 9)[:size], shape)
        log_q = keras.ops.zeros(shape[-1:]) if bound == "sll" else None
        return _sdp.inverse_diagonal(w, log_q, bound=bound)

    return inverse


# Each a function of one matrix.
FUNCTIONS = {
    "fast_exp": lambda x: manifolds.fast_exp(x - stiefel.transpose(x)),
    "newton_schulz": lambda x: manifolds.newton_schulz(x, 2),
    "orthogonalize": manifolds.orthogonalize,
    "polar": manifolds.polar,
    "polar_svd": manifolds.polar_svd,
    "rotate": lambda x: manifolds.rotate(x, x - stiefel.transpose(x)),
    "rotate_period": lambda x: manifolds.rotate(x, x - stiefel.transpose(x), 0.1, period=8),
    "RandomStiefel": lambda x: RandomStiefel(0)(x.shape),
    "Stiefel": Stiefel(),
    "ProjectedInitializer": lambda x: ProjectedInitializer("ones")(x.shape),
    "projx": stiefel.projx,
    "proju": lambda x: stiefel.proju(x, x),
    "retr": lambda x: stiefel.retr(x, 0.1 * x),
    "expmap": lambda x: stiefel.expmap(x, 0.1 * x),
    "expmap_tall": lambda x: stiefel.expmap(x[:, :3], 0.1 * x[:, :3]),
    "defect": stiefel.defect,
    "random": lambda x: stiefel.random((*x.shape[:1], 3), seed=1),
    "random_structured": lambda x: stiefel.random((stiefel.STRUCTURED_FROM, 3), seed=1),
    "finalize_adam": finalized(ManifoldAdam),
    "finalize_muon": finalized(ManifoldMuon, use_ema=True),
    "sdp_spectral": sdp_bound("spectral", (6, 6)),
    "sdp_aol": sdp_bound("aol", (6, 6)),
    "sdp_convolution_spectral": sdp_bound("spectral", (3, 3, 4, 4)),
    "sdp_convolution_sll": sdp_bound("sll", (3, 3, 4, 4)),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def matrix():
    return np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0].astype("float32")


def lowered(function, *shapes):
    """What JAX hands to XLA for an NVIDIA GPU, as text."""
    import jax

    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return jax.export.export(jax.jit(function), platforms=["cuda"])(*arguments).mlir_module()


def products(text):
    return [line for line in text.splitlines() if re.search(r"stablehlo.(dot|convolution)", line)]


@every_function
@pytest.mark.skipif(BACKEND != "jax", reason="JAX states each product's precision")
@pytest.mark.parametrize("default", [None, "bfloat16"])
def test_every_product_for_a_gpu_asks_for_float32(name, default):
    import jax

    with jax.default_matmul_precision(default):
        text = lowered(lambda x: FUNCTIONS[name](x), (6, 6))
    found = products(text)
    assert found or "random" in name.lower()  # a QR decomposition is none
    for line in found:
        assert "precision = [HIGHEST, HIGHEST]" in line


@every_function
@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch rounds float32 on a CPU, too, if asked to")
def test_results_under_autocast_are_those_without(name):
    import torch

    x = keras.ops.convert_to_tensor(matrix())
    expected = to_numpy(FUNCTIONS[name](x))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        result = FUNCTIONS[name](x)
    assert result.dtype == x.dtype
    np.testing.assert_allclose(to_numpy(result), expected, rtol=2e-6, atol=1e-6)


@every_function
@pytest.mark.skipif(BACKEND != "tensorflow", reason="TF32 is a switch of the program")
def test_no_product_on_a_gpu_is_left_to_tf32(name, monkeypatch):
    import tensorflow as tf

    if name.startswith("finalize"):
        pytest.skip("assigns outside of graphs what the constraint, tested here, returns")
    monkeypatch.setattr(precision, "on_cpu", lambda: False)
    x = tf.constant(matrix())
    traced = tf.function(lambda x: FUNCTIONS[name](x)).get_concrete_function(x)
    graphs = [traced.graph, *(f.graph for f in traced.graph._functions.values())]
    operations = [o for graph in graphs for o in graph.get_operations()]
    found = [o for o in operations if "MatMul" in o.type or "Conv" in o.type]
    assert found or "random" in name.lower()
    assert all(o.inputs[0].dtype == tf.float64 for o in found)


def test_the_list_has_every_public_function():
    for name in manifolds.__all__:
        assert name == "stiefel" or name in FUNCTIONS
    for name in ("projx", "proju", "retr", "expmap", "defect", "random"):
        assert callable(getattr(stiefel, name)) and name in FUNCTIONS
