"""An accelerator's ways, taken on a CPU: what is decided by the device, and what it would round."""

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


def round_products(monkeypatch):
    """Products that may lose something do; all others are left as they are."""

    def product(a, b, precision):
        if keras.backend.standardize_dtype(a.dtype) == "bfloat16":  # summed in float32
            single = product(*(keras.ops.cast(m, "float32") for m in (a, b)), precision)
            return keras.ops.cast(single, "bfloat16")
        if precision in BITS:
            a, b = rounded(a, BITS[precision]), rounded(b, BITS[precision])
        return a @ b

    pretend(monkeypatch)
    monkeypatch.setitem(products._PRODUCTS, keras.backend.backend(), product)


def forbid_branches(monkeypatch):
    """Every branch and loop on data is an error."""

    def forbidden(*_, **__):
        raise AssertionError("a branch on data makes an accelerator wait for the host")

    for name in ("switch", "cond", "while_loop", "fori_loop"):
        monkeypatch.setattr(keras.ops, name, forbidden)
