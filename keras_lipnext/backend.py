"""Bridges to JAX, PyTorch and TensorFlow: the only module that imports one of them.

Everything else in the package is written on `keras.ops`. What `keras.ops` does not offer
(64-bit mode, switching gradients off, input gradients) is here, each written three times.
"""

import contextlib

import keras
from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE


@contextlib.contextmanager
def float64_scope():
    """Context in which computations on float64 tensors stay in float64, on every backend.

    Two things stand in the way. JAX has no float64 unless its 64-bit mode is on. And on JAX and
    PyTorch Keras' dtype promotion turns 64-bit results into 32-bit ones: `keras.ops.matmul` of two
    float64 tensors computes in float32 on PyTorch, `tanh` on JAX. Both are switched inside the
    context only.

    Raises:
        RuntimeError: if the Keras installed would still promote float64 to something else.
    """
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        promotion = BIT64_TO_BIT32_DTYPE["float64"]
        stack.callback(BIT64_TO_BIT32_DTYPE.__setitem__, "float64", promotion)
        BIT64_TO_BIT32_DTYPE["float64"] = "float64"
        if keras.backend.result_type("float64", "float64") != "float64":
            raise RuntimeError(
                f"Keras {keras.__version__} computes float64 operations in lower precision on the "
                f"{keras.backend.backend()} backend: certificates cannot be evaluated."
            )
        yield


def inference_scope():
    """Context in which PyTorch records no gradients; a no-op on JAX and TensorFlow."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def value(variable):
    """The current value of a Keras variable, or of the raw `tf.Variable` an optimizer is handed.

    `keras.ops.convert_to_tensor` passes a `tf.Variable` through as it is. Anything else is returned
    unchanged.
    """
    if isinstance(variable, keras.Variable):
        variable = variable.value
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if isinstance(variable, tf.Variable):
            return tf.convert_to_tensor(variable)
    return variable


def gradient(fn, x):
    """Gradient of `sum(fn(x))` with respect to `x`.

    Args:
        fn: Function from one tensor to a tensor of any shape.
        x: Floating point tensor of the current backend.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.grad(lambda t: keras.ops.sum(fn(t)))(x)
    if backend == "torch":
        import torch

        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            return torch.autograd.grad(fn(leaf).sum(), leaf)[0]
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(fn(x))
        return tape.gradient(total, x)
    raise RuntimeError(
        "keras_lipnext runs on the jax, torch and tensorflow backends of Keras. "
        f"Received: KERAS_BACKEND={backend}. Set it to one of the three before importing keras."
    )
