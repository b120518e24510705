"""Matrix products whose precision belongs to the operation, not to the program's settings.

An orthogonal matrix is none in TF32 or bfloat16, and a sum in TF32 is no bound of the float32 one.
But accelerators multiply float32 in such formats, by default or by a switch of the whole program:

    JAX         float32 is TF32 on GPUs and bfloat16 on TPUs unless a product asks for more
    PyTorch     torch.set_float32_matmul_precision, torch.backends..., torch.autocast
    TensorFlow  TF32, unless tf.config.experimental.enable_tensor_float_32_execution(False)

The switches are left alone: another thread would see them switched, or switch them back. JAX asks
for the precision of each product. On the other two a product that must not be rounded is computed
in float64 where the program allows float32 to be: that no switch reaches. It costs time on
graphics cards for games, and none where PyTorch is left as it comes.
"""

import os
import platform
import re

import keras

PRECISIONS = ("exact", "increment", "direction")


def matmul(a, b, precision="exact"):
    """`a @ b` of floating point tensors of one dtype, by what the result is for.

    On CPUs, and of float64 and bfloat16 anywhere, all three are the plain product.

    Args:
        a, b: Tensors of the current backend, shapes (..., m, k) and (..., k, n).
        precision: What a float32 product may lose on an accelerator.
            "exact": nothing but the rounding of float32. Points of a manifold, their defects,
            bounds.
            "increment": about 2^-11 of its entries (TF32). What is small beside what it is added
            to. On PyTorch 2^-16, in three bfloat16 products, whatever the program's settings.
            "direction": about 2^-8, from bfloat16 operands, summed in float32. What is normalised,
            or projected, afterwards.

    Returns:
        Tensor of shape (..., m, n) and of the dtype of `a`.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"`precision` must be one of {', '.join(PRECISIONS)}. Received: precision={precision!r}"
        )
    backend = keras.backend.backend()
    dtype = keras.backend.standardize_dtype(a.dtype)
    if dtype != "float32":
        precision = "direction" if dtype == "bfloat16" else "exact"
    return _PRODUCTS[backend](a, b, precision)


def ways():
    """What decides how products are computed here, hashable: what a program is traced for."""
    return on_cpu(), _PRODUCTS[keras.backend.backend()]


def on_cpu():
    """Whether the backend computes on the CPU, where float32 products are float32."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.default_backend() == "cpu"
    if backend == "torch":
        import torch

        # Keras takes an accelerator where there is one, and what KERAS_TORCH_DEVICE names.
        others = (torch.cuda, torch.backends.mps, getattr(torch, "xpu", None))
        if any(device is not None and device.is_available() for device in others):
            return False
        named = os.environ.get("KERAS_TORCH_DEVICE") or "cpu"
        return torch.get_default_device().type == "cpu" == named.split(":")[0]
    import tensorflow as tf

    return all(d.device_type.endswith("CPU") for d in tf.config.list_physical_devices())


def _jax_product(a, b, precision):
    import jax

    if precision == "exact" or on_cpu():
        return jax.numpy.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    if precision == "increment":  # TF32 on GPUs, three bfloat16 products on TPUs
        return jax.numpy.matmul(a, b, precision=jax.lax.Precision.HIGH)
    return jax.numpy.matmul(
        a.astype("bfloat16"),
        b.astype("bfloat16"),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=a.dtype,
    )


def _torch_product(a, b, precision):
    import torch

    device, single = a.device.type, a.dtype == torch.float32
    if single and precision != "exact" and device == "cuda" and torch.__version__ >= "2.8":
        if precision == "direction":
            return _from_bfloat16(a.bfloat16(), b.bfloat16())
        a_high, b_high = a.bfloat16(), b.bfloat16()
        a_low, b_low = (a - a_high.float()).bfloat16(), (b - b_high.float()).bfloat16()
        left = torch.cat([a_high, a_low, a_high], dim=-1)
        return _from_bfloat16(left, torch.cat([b_high, b_high, b_low], dim=-2))
    if single and _torch_may_round(device):
        return torch.matmul(a.double(), b.double()).float()
    return torch.matmul(a, b)


def _from_bfloat16(a, b):
    """Product of stacks, summed and returned in float32; see `torch.bmm`."""
    import torch

    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    product = torch.bmm(a, b, out_dtype=torch.float32)
    return product.reshape(*batch, *product.shape[-2:])


def _torch_may_round(device):
    """Whether the program lets float32 products on a type of device be rounded to less."""
    import torch

    if device not in ("cpu", "cuda", "mps", "xpu"):  # "meta" computes nothing
        return False
    if torch.is_autocast_enabled(device):
        return True
    if not hasattr(torch.backends.cudnn, "conv"):  # before PyTorch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    if device not in backends:
        return False
    return backends[device].matmul.fp32_precision not in ("ieee", "none")


def _tensorflow_product(a, b, precision):
    import tensorflow as tf

    if a.dtype != tf.float32 or on_cpu() or precision == "increment":  # TF32, if it is allowed
        return tf.matmul(a, b)
    # A traced product obeys the switch's later positions, too: so whatever it says.
    dtype = tf.float64 if precision == "exact" else tf.bfloat16
    return tf.cast(tf.matmul(tf.cast(a, dtype), tf.cast(b, dtype)), tf.float32)


_PRODUCTS = {"jax": _jax_product, "torch": _torch_product, "tensorflow": _tensorflow_product}


def float32_products(convolves: bool = True) -> str:
    """What a model's float32 products are computed in here, at the coarsest its settings allow.

    Args:
        convolves: Whether convolutions are among them, for which PyTorch has a switch of its own.

    Returns:
        "float32", "tf32", "bfloat16" or "float16".
    """
    return "float32" if on_cpu() else _FLOAT32[keras.backend.backend()](convolves)


def _jax_float32(convolves):
    import jax

    precision = jax.config.jax_default_matmul_precision
    if precision in ("highest", "float32", "F32_F32_F32"):
        return "float32"
    # By JAX's older names, "bfloat16" among them, GPUs take TF32.
    shortest = precision in (None, "default", "fastest", "bfloat16")
    shorter = re.match(r"(BF16_BF16_(F32|BF16)$|F16_|ANY_F8)", str(precision))
    return "bfloat16" if shorter or (shortest and jax.default_backend() == "tpu") else "tf32"


def _torch_float32(convolves):
    import torch

    others = (torch.backends.mps, getattr(torch, "xpu", None))
    if any(device is not None and device.is_available() for device in others):
        return "tf32"
    if torch.is_autocast_enabled("cuda"):
        return str(torch.get_autocast_dtype("cuda")).removeprefix("torch.")
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        convolutions = cudnn.conv.fp32_precision not in ("ieee", "none")
    else:  # before PyTorch 2.9
        convolutions = cudnn.allow_tf32
    return "tf32" if _torch_may_round("cuda") or (convolves and convolutions) else "float32"


def _tensorflow_float32(convolves):
    import tensorflow as tf

    options = tf.config.optimizer.get_experimental_options()
    mixed = any(on for name, on in options.items() if name.startswith("auto_mixed_precision"))
    # Whatever the switch for TF32 says: what XLA compiled keeps the position that it had then.
    return "float16" if mixed else "tf32"


_FLOAT32 = {"jax": _jax_float32, "torch": _torch_float32, "tensorflow": _tensorflow_float32}


# Releases of jaxlib whose programs for CPUs were seen to compute something else. In 0.8.0 and 0.8.1
# rotations leave the manifold, not every time (tests/manifolds/test_rotation.py). In 0.10.1
# reductions read memory that is not theirs: trainings of LipNeXt end with a segmentation fault
# (tests/models/test_lipnext.py). In 0.10.2 reductions of products are wrong: jax-ml/jax#39103.
MISCOMPILING_JAXLIB = ("0.8.0", "0.8.1", "0.10.1", "0.10.2")


def check_compiler():
    """RuntimeError where what computes is known to compute something else than it was told."""
    if keras.backend.backend() != "jax":
        return
    import jax
    import jaxlib

    chosen = jax.config.jax_default_device
    cpu = on_cpu() or "cpu" in (chosen, getattr(chosen, "platform", None))
    if cpu and jaxlib.__version__ in MISCOMPILING_JAXLIB:
        raise RuntimeError(
            f"jaxlib {jaxlib.__version__} compiles programs for CPUs that compute wrong numbers: "
            "nothing it evaluates can be certified. Install another version (pip install "
            '"jax>=0.8.2,!=0.10.1,!=0.10.2"), or certify with KERAS_BACKEND=torch or tensorflow.'
        )


def reduced_float32() -> str | None:
    """Why a model's float32 products may be less than float32 in this process; None if they are it.

    A sentence that names the setting and what to change.
    """
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        if os.environ.get(name, "STRICT").upper() != "STRICT":
            return f"{name}={os.environ[name]} lets oneDNN round float32: unset it"
    if not on_cpu():
        return (
            "accelerators may round float32 products to TF32 or bfloat16, and convolve by other "
            "sums: compute on the CPU (JAX_PLATFORMS=cpu, or CUDA_VISIBLE_DEVICES='')"
        )
    return _REDUCED[keras.backend.backend()]()


def _jax_reduced():
    import jax

    precision = jax.config.jax_default_matmul_precision
    if precision not in (None, "default", "highest", "float32", "F32_F32_F32"):
        return (
            f"jax_default_matmul_precision is {precision!r}: set "
            'jax.config.update("jax_default_matmul_precision", "highest")'
        )
    return _fast_math()


def _torch_reduced():
    import torch

    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it is set by the newer settings, below
        precision = "highest"
    if precision != "highest":
        return (
            f"torch.get_float32_matmul_precision() is {precision!r}: call "
            'torch.set_float32_matmul_precision("highest")'
        )
    mkldnn = torch.backends.mkldnn
    for name, setting in {
        "torch.backends": torch.backends,
        "torch.backends.mkldnn": mkldnn,
        "torch.backends.mkldnn.matmul": getattr(mkldnn, "matmul", None),
        "torch.backends.mkldnn.conv": getattr(mkldnn, "conv", None),
    }.items():
        found = getattr(setting, "fp32_precision", "ieee")
        if found not in ("ieee", "none"):
            return f"{name}.fp32_precision is {found!r}: set it to 'ieee'"
    return "torch.autocast is on: leave its context" if torch.is_autocast_enabled("cpu") else None


def _tensorflow_reduced():
    mode = os.environ.get("TF_SET_ONEDNN_FPMATH_MODE", "STRICT")
    if mode.upper() not in ("STRICT", ""):
        return f"TF_SET_ONEDNN_FPMATH_MODE={mode} lets oneDNN round float32: unset it"
    import tensorflow as tf

    for name, on in tf.config.optimizer.get_experimental_options().items():
        if on and name.startswith("auto_mixed_precision"):
            return f"{name} is on: tf.config.optimizer.set_experimental_options turns it off"
    return _fast_math()


def _fast_math():
    flags = os.environ.get("XLA_FLAGS", "").strip().lower()
    if flags and not flags.startswith("-"):
        return "XLA_FLAGS names a file, whose flags are not known: write them into it"
    if re.search(r"enable_fast_math(?!=(false|0)\b)", flags):
        return "XLA_FLAGS turns fast math on: take it out"
    return None


_REDUCED = {"jax": _jax_reduced, "torch": _torch_reduced, "tensorflow": _tensorflow_reduced}


def indirect_convolutions() -> str | None:
    """Why float32 convolutions may be no plain sums of products in this process; None if they are.

    Winograd's and FFT's algorithms form other sums, that mix neighbouring windows. On x86-64 CPUs
    the backends call oneDNN's direct convolution, Eigen's or their own loops: that an entry does
    not reach windows that it is not in, not by one bit, is tested.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"how convolutions are summed on {platform.machine()} is not known"
    name = keras.backend.backend()
    if name == "tensorflow" and os.environ.get("TF_USE_DEEP_CONV2D", "0") not in ("0", "false", ""):
        return "TF_USE_DEEP_CONV2D lets TensorFlow convolve by Winograd's algorithm: unset it"
    if name == "torch":
        import torch

        if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            return "without oneDNN PyTorch may convolve by Winograd's algorithm or FFT (NNPACK)"
    return None
