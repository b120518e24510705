"""An accelerator's ways, taken on a CPU: what is decided by the device, and what it would round."""

import contextlib

import compiling  # noqa: F401  before what imports a backend
import keras
import pytest

from keras_lipnext import backend
from keras_lipnext.backend import precision as products

ON_CPU = products.on_cpu()  # whatever a test pretends later


def of_cpus(reason="accelerators round float32 products"):
    """A mark: left out where benchmarks/gpu.py runs the tests on a card, for this reason."""
    return pytest.mark.skipif(not ON_CPU, reason=reason)


BITS = {"increment": 10, "direction": 7}  # of TF32 and bfloat16, beside the leading one


def pretend(monkeypatch):
    """From here on the backend computes on an accelerator, as far as the library can tell."""
    for module in (products, backend):
        monkeypatch.setattr(module, "on_cpu", lambda: False)


def rounded(x, bits):
    """float32 to so many bits after the leading one; no compiler takes it for a detour."""
    scaled = x * (2.0 ** (23 - bits) + 1)
    return scaled - (scaled - x)


def rounded_backwards(x, bits):
    """`x`, whose gradient is rounded on its way back."""

    @keras.ops.custom_gradient
    def identity(x):
        def gradient(*arguments, upstream=None):
            return rounded(arguments[0] if upstream is None else upstream, bits)

        return x, gradient

    return identity(x)


def round_products(monkeypatch):
    """Products that may lose something do, a model's own forward and backward among them.

    Those are TF32's in float32; all others are left as they are.
    """
    plain = keras.ops.matmul

    def of_layers(a, b):
        if keras.backend.standardize_dtype(a.dtype) != "float32":
            return plain(a, b)
        bits = BITS["increment"]
        return rounded_backwards(plain(rounded(a, bits), rounded(b, bits)), bits)

    monkeypatch.setattr(keras.ops, "matmul", of_layers)

    def product(a, b, precision):
        if keras.backend.standardize_dtype(a.dtype) == "bfloat16":  # summed in float32
            single = product(*(keras.ops.cast(m, "float32") for m in (a, b)), precision)
            return keras.ops.cast(single, "bfloat16")
        if precision in BITS:
            a, b = rounded(a, BITS[precision]), rounded(b, BITS[precision])
        return a @ b

    pretend(monkeypatch)
    monkeypatch.setitem(products._PRODUCTS, keras.backend.backend(), product)


@contextlib.contextmanager
def switches_of_pytorch():
    """Leaves PyTorch's switches for float32 as they were; the older ones set some of the newer."""
    import torch

    cudnn = torch.backends.cudnn
    parts = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    parts += [getattr(cudnn, name, None) for name in ("conv", "rnn")]
    parts = [part for part in parts if hasattr(part, "fp32_precision")]  # none before PyTorch 2.9
    before = [part.fp32_precision for part in parts]
    older = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older[0])
        cudnn.allow_tf32 = older[1]
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


@contextlib.contextmanager
def float32_as(setting):
    """The program's own setting: "default", "ieee", or what else the backend knows."""
    name = keras.backend.backend()
    if name == "jax":
        import jax

        with jax.default_matmul_precision(
            {"default": None, "ieee": "highest"}.get(setting, setting)
        ):
            yield
    elif name == "torch":
        import torch

        with switches_of_pytorch():
            torch.backends.cudnn.allow_tf32 = setting != "ieee"
            if setting not in ("default", "ieee"):
                torch.set_float32_matmul_precision(setting)
            yield
    else:
        yield


def forbid_branches(monkeypatch):
    """Every branch and loop on data is an error."""

    def forbidden(*_, **__):
        raise AssertionError("a branch on data makes an accelerator wait for the host")

    for name in ("switch", "cond", "while_loop", "fori_loop"):
        monkeypatch.setattr(keras.ops, name, forbidden)
