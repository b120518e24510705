import keras
import numpy as np
import pytest
from data import to_numpy

from keras_lipnext import backend


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


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="a setting of JAX")
def test_full_precision_asks_for_float32_products():
    import jax

    def product(x):
        with backend.full_precision():
            return keras.ops.matmul(x, x)

    assert "HIGHEST" in str(jax.make_jaxpr(product)(np.eye(2, dtype="float32")))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="settings of PyTorch")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_full_precision_switches_tf32_off_and_on_again(precision):
    """Convolutions are in TF32 by default, products if a program asks for it."""
    import torch

    def settings():
        backends = torch.backends
        return backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        outside = settings()
        assert outside[0] == "tf32" and (outside[1] == "tf32") == (precision == "high")
        with backend.full_precision():
            assert settings() == ("ieee", "ieee")
        assert settings() == outside
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="settings of PyTorch")
def test_full_precision_by_the_names_of_older_versions():
    import types

    import torch

    from keras_lipnext.backend.core import _float32_settings

    cudnn, matmul = object(), torch.backends.cuda.matmul
    older = types.SimpleNamespace(cudnn=cudnn, cuda=types.SimpleNamespace(matmul=matmul))
    settings = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    assert _float32_settings(older) == settings
    for _, name, _ in settings:
        assert hasattr(torch.backends.cudnn, name) and hasattr(matmul, name)
