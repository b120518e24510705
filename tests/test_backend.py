import accelerated
import keras
import numpy as np
import pytest
from data import to_numpy

from keras_lipnext import backend
from keras_lipnext.backend import precision as products


def exact_pairs():
    """(name, Keras op, NumPy op) for every kind of operation the layers use."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 6))
    ops = keras.ops
    return [
        ("matmul", lambda: ops.matmul(t(a), t(b)), a @ b),
        ("operator", lambda: t(a) @ t(b), a @ b),
        ("tensordot", lambda: ops.tensordot(t(a), t(b), 1), a @ b),
        ("maximum", lambda: ops.maximum(t(a), t(b)), np.maximum(a, b)),
        ("minimum", lambda: ops.minimum(t(a), t(b)), np.minimum(a, b)),
        ("where", lambda: ops.where(t(a) > 0, t(a), t(b)), np.where(a > 0, a, b)),
        ("mean", lambda: ops.mean(t(a)), a.mean()),
        ("sqrt", lambda: ops.sqrt(ops.sum(ops.square(t(a)), axis=0)), np.linalg.norm(a, axis=0)),
        ("tanh", lambda: keras.activations.tanh(t(a)), np.tanh(a)),
        ("sigmoid", lambda: keras.activations.sigmoid(t(a)), 1 / (1 + np.exp(-a))),
        ("softplus", lambda: keras.activations.softplus(t(a)), np.log1p(np.exp(a))),
        ("concatenate", lambda: ops.concatenate([t(a), t(b)]), np.concatenate([a, b])),
        ("roll", lambda: ops.roll(t(a), 1, axis=0), np.roll(a, 1, axis=0)),
    ]


def t(a):
    return keras.ops.convert_to_tensor(a, dtype="float64")


@pytest.mark.parametrize("index", range(13))
def test_float64_scope_computes_in_float64(index):
    with backend.float64_scope():
        name, operation, expected = exact_pairs()[index]
        result = operation()
        assert keras.backend.standardize_dtype(result.dtype) == "float64", name
        np.testing.assert_allclose(to_numpy(result), expected, rtol=1e-14, atol=1e-14)


def test_float64_scope_leaves_nothing_behind():
    before = keras.backend.result_type("float64", "float64")
    with pytest.raises(KeyError), backend.float64_scope():
        assert keras.backend.result_type("float64", "float64") == "float64"
        raise KeyError
    assert keras.backend.result_type("float64", "float64") == before


def test_gradient():
    x = np.array([[1.0, -2.0], [3.0, 0.5]])
    with backend.float64_scope():
        slope = to_numpy(backend.gradient(lambda v: keras.ops.sum(v**3, axis=-1), t(x)))
    np.testing.assert_allclose(slope, 3 * x**2, rtol=1e-14)


def test_value_of_a_variable():
    variable = keras.Variable(np.ones((2, 2)))
    np.testing.assert_array_equal(to_numpy(backend.value(variable)), np.ones((2, 2)))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX runs on TPUs")
def test_tpus_are_refused(monkeypatch):
    import jax

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(RuntimeError, match="no IEEE float64"), backend.float64_scope():
        pass


def test_compiled_functions_read_the_variables_anew():
    variable = keras.Variable(np.ones(3, "float32"))
    doubled = backend.compiled(lambda x: x * variable.value, [variable])
    x = keras.ops.convert_to_tensor(np.arange(3, dtype="float32"))
    np.testing.assert_allclose(to_numpy(doubled(x)), [0, 1, 2])
    variable.assign(np.full(3, 5.0, "float32"))
    np.testing.assert_allclose(to_numpy(doubled(x)), [0, 5, 10])


@pytest.fixture
def pair():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 40, 40))
    return a.astype("float32"), b.astype("float32")


def relative_error(precision, a, b):
    exact = a.astype("float64") @ b.astype("float64")
    product = backend.matmul(*map(keras.ops.convert_to_tensor, (a, b)), precision)
    assert keras.backend.standardize_dtype(product.dtype) == "float32"
    return np.abs(to_numpy(product) - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("precision", ["exact", "increment", "direction"])
def test_on_a_cpu_every_product_is_the_plain_one(pair, precision):
    a, b = map(keras.ops.convert_to_tensor, pair)
    product = backend.matmul(a, b, precision)
    np.testing.assert_array_equal(to_numpy(product), to_numpy(a @ b))


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="decided by the tensors' device")
@pytest.mark.parametrize(
    "precision, least, most",
    [("exact", 0, 1e-6), ("increment", 0, 1e-3), ("direction", 1e-4, 0.01)],
)
def test_on_an_accelerator_products_lose_what_they_may(pair, precision, least, most, monkeypatch):
    monkeypatch.setattr(products, "on_cpu", lambda: False)
    assert least <= relative_error(precision, *pair) < most


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX names each product's precision")
@pytest.mark.parametrize(
    "precision, operands, expected",
    [("exact", "f32", "HIGHEST"), ("increment", "f32", "HIGH"), ("direction", "bf16", "DEFAULT")],
)
@pytest.mark.parametrize("default", [None, "highest", "bfloat16"])
def test_a_programs_default_changes_no_product(precision, operands, expected, default, monkeypatch):
    import jax

    monkeypatch.setattr(products, "on_cpu", lambda: False)
    a = jax.ShapeDtypeStruct((2, 8, 8), "float32")
    with jax.default_matmul_precision(default):
        function = jax.jit(lambda a: backend.matmul(a, a, precision))
        text = jax.export.export(function, platforms=["cuda"])(a).mlir_module()
    (line,) = (line for line in text.splitlines() if "stablehlo.dot_general" in line)
    assert f"(tensor<2x8x8x{operands}>, tensor<2x8x8x{operands}>) -> tensor<2x8x8xf32>" in line
    if expected != "DEFAULT":  # which is not printed
        assert f"precision = [{expected}, {expected}]" in line


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's dispatcher")
@pytest.mark.parametrize(
    "precision, setting, operands, shapes",
    [
        ("exact", "highest", "float32", [(2, 8, 8), (2, 8, 8)]),
        ("exact", "high", "float64", [(2, 8, 8), (2, 8, 8)]),
        ("increment", "high", "bfloat16", [(2, 8, 24), (2, 24, 8)]),  # three of them, summed as one
        ("direction", "high", "bfloat16", [(2, 8, 8), (2, 8, 8)]),
    ],
)
def test_products_of_pytorch_on_cuda(precision, setting, operands, shapes):
    """By tensors that have a device and no values: no card is needed."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                seen.append(([tuple(a.shape) for a in args[:2]], {a.dtype for a in args[:2]}))
            return function(*args, **(kwargs or {}))

    seen = []
    with accelerated.switches_of_pytorch(), FakeTensorMode():
        torch.set_float32_matmul_precision(setting)
        a = torch.empty(2, 8, 8, device="cuda")
        with Seeing():
            product = backend.matmul(a, a, precision)
    assert seen == [(shapes, {getattr(torch, operands)})]
    assert product.dtype == torch.float32 and product.device.type == "cuda"


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="switches of PyTorch")
@pytest.mark.parametrize("setting, rounds", [("highest", False), ("high", True), ("medium", True)])
def test_what_pytorch_is_allowed_to_round_is_computed_in_float64(setting, rounds, pair):
    import torch

    with accelerated.switches_of_pytorch():
        torch.set_float32_matmul_precision(setting)
        for device in ("cpu", "cuda"):
            assert products._torch_may_round(device) == rounds
        assert relative_error("exact", *pair) < (6e-8 if rounds else 1e-6)
        assert torch.get_float32_matmul_precision() == setting


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="switches of PyTorch")
def test_switches_of_older_versions_of_pytorch(monkeypatch):
    """Before 2.9 convolutions had no switch of their own."""
    import torch

    monkeypatch.setattr(torch.backends, "cudnn", object())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert products._torch_may_round("cuda")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert not products._torch_may_round("cuda")


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="switches of PyTorch")
def test_autocast_reaches_no_exact_product(pair):
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error("exact", *pair) < 1e-6


# Of products and of convolutions, on an accelerator.
FLOAT32 = {
    "jax": {
        "default": ("tf32", "tf32"),
        "ieee": ("float32", "float32"),
        "bfloat16": ("tf32", "tf32"),
        "tensorfloat32": ("tf32", "tf32"),
        "BF16_BF16_F32": ("bfloat16", "bfloat16"),
        "BF16_BF16_F32_X3": ("tf32", "tf32"),
    },
    "torch": {
        "default": ("float32", "tf32"),
        "ieee": ("float32", "float32"),
        "high": ("tf32", "tf32"),
        "medium": ("tf32", "tf32"),
    },
    "tensorflow": {"default": ("tf32", "tf32")},
}[keras.backend.backend()]


@pytest.mark.parametrize("setting, expected", FLOAT32.items(), ids=FLOAT32)
def test_what_float32_products_are_computed_in(setting, expected, monkeypatch):
    with accelerated.float32_as(setting):
        if accelerated.ON_CPU:
            assert {backend.float32_products(c) for c in (False, True)} == {"float32"}
            accelerated.pretend(monkeypatch)
        assert tuple(backend.float32_products(c) for c in (False, True)) == expected


def test_an_unknown_precision():
    with pytest.raises(
        ValueError, match=r"exact, increment, direction. Received: precision='fast'"
    ):
        backend.matmul(keras.ops.eye(2), keras.ops.eye(2), "fast")


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch traces nothing")
def test_one_program_is_traced_once_for_all_callers(monkeypatch):
    traces = []

    @backend.one_program
    def scaled(x, shift=None, *, factor):
        traces.append((tuple(x.shape), factor, backend.on_cpu()))
        y = factor * x
        return y if shift is None else y + shift

    x = np.arange(3, dtype="float32")
    shift = keras.Variable(1.0)

    def two_calls(x):
        return scaled(x, factor=2.0) + scaled(x + 1, factor=2.0) + scaled(x, shift, factor=3.0)

    for _ in range(2):
        answer = backend.compiled(lambda x: two_calls(x), [])(keras.ops.convert_to_tensor(x))
        np.testing.assert_allclose(to_numpy(answer), 7 * x + 3)
    assert sorted(traces) == [((3,), 2.0, True), ((3,), 3.0, True)]
    accelerated.pretend(monkeypatch)  # what was traced for another device is not used
    backend.compiled(lambda x: two_calls(x), [])(keras.ops.convert_to_tensor(x))
    assert sorted(traces[2:]) == [((3,), 2.0, False), ((3,), 3.0, False)]
