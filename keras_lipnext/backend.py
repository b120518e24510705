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

            if jax.default_backend() == "tpu":
                raise RuntimeError(
                    "TPUs have no IEEE float64 arithmetic: certificates need it. Set "
                    "JAX_PLATFORMS=cpu before starting Python."
                )
            stack.enter_context(jax.enable_x64(True))
            # A lower precision set for training would reach float64 products too.
            stack.enter_context(jax.default_matmul_precision("highest"))
        promotion = BIT64_TO_BIT32_DTYPE["float64"]
        stack.callback(BIT64_TO_BIT32_DTYPE.__setitem__, "float64", promotion)
        BIT64_TO_BIT32_DTYPE["float64"] = "float64"
        if keras.backend.result_type("float64", "float64") != "float64":
            raise RuntimeError(
                f"Keras {keras.__version__} computes float64 operations in lower precision on the "
                f"{keras.backend.backend()} backend: certificates cannot be evaluated."
            )
        yield


def on_cpu():
    """Whether the backend computes on the CPU, where float32 products are float32."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.default_backend() == "cpu"
    if backend == "torch":
        import torch

        return torch.get_default_device().type == "cpu" and not torch.cuda.is_available()
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


def inference_scope():
    """Context in which PyTorch records no gradients; a no-op on JAX and TensorFlow."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def compiled(function, variables):
    """`function` of one tensor, compiled where the backend compiles: JAX and TensorFlow.

    Args:
        function: Function of one tensor that reads no other state than `variables`.
        variables: List of Keras variables; their values are read anew at each call.
    """
    if keras.backend.backend() == "jax":
        import jax

        @jax.jit
        def pure(values, x):
            # As an argument a weight is not copied into the program as a constant.
            with keras.StatelessScope(state_mapping=list(zip(variables, values))):
                return function(x)

        return lambda x: pure([v.value for v in variables], x)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


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


def torch_module(model, dtype, prepare, logit_scale):
    """`torch.nn.Module` that evaluates a Keras model; see `certification.as_torch_module`.

    Args:
        model: Built Keras model with one input.
        dtype: "float32" or "float64", of the model's input.
        prepare: Function of a tensor of PyTorch, applied to the inputs first.
        logit_scale: Float, multiplies the logits.

    Returns:
        `torch.nn.Module` without parameters, in evaluation mode.

    Raises:
        ImportError: if PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "`as_torch_module` needs PyTorch: pip install 'keras_lipnext[torch]'"
        ) from error

    def weights():
        return [v.value for v in model.variables]

    def call(values, x):
        frozen = map(keras.ops.stop_gradient, values)
        with keras.StatelessScope(state_mapping=list(zip(model.variables, frozen))):
            outputs = keras.tree.flatten(model(x, training=False))
        if len(outputs) != 1:
            raise ValueError(
                f"Model '{model.name}' must have one output. Received: {len(outputs)} outputs."
            )
        return keras.ops.cast(outputs[0], dtype)

    backend = keras.backend.backend()
    if backend == "torch":
        evaluate = lambda x: call(weights(), x)  # noqa: E731
    else:
        bridge = {"jax": _jax_bridge, "tensorflow": _tensorflow_bridge}[backend]
        evaluate = _torch_function(*bridge(call, weights))

    class KerasModule(torch.nn.Module):
        def forward(self, x):
            return logit_scale * evaluate(prepare(x).to(getattr(torch, dtype))).to(x)

    return KerasModule().eval()


def _torch_function(evaluate, linearize):
    """Differentiable function of a tensor of PyTorch, from two functions of NumPy arrays.

    Args:
        evaluate: `x -> logits`.
        linearize: `x -> (logits, pullback)`, where `pullback` maps a gradient with respect to the
            logits to the gradient with respect to `x`.
    """
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            logits, ctx.pullback = linearize(x.numpy(force=True))
            return torch.tensor(logits, device=x.device)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            return torch.tensor(ctx.pullback(slope.numpy(force=True)), device=slope.device)

    def call(x):
        if torch.is_grad_enabled() and x.requires_grad:
            return Function.apply(x)
        return torch.tensor(evaluate(x.numpy(force=True)), device=x.device)

    return call


def _jax_bridge(call, weights):
    """`evaluate` and `linearize`, compiled, with the weights as arguments.

    Attack libraries drop the samples already broken, so that batches come in all sizes. Padded to
    powers of two, they need few compilations.
    """
    import jax
    import numpy as np

    run = jax.jit(call)
    run_vjp = jax.jit(lambda values, x: jax.vjp(lambda t: call(values, t), x))
    pull = jax.jit(lambda pullback, slope: pullback(slope)[0])

    def padded(x):
        missing = (1 << (len(x) - 1).bit_length()) - len(x)
        return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])

    def evaluate(x):
        return np.asarray(run(weights(), padded(x)))[: len(x)]

    def linearize(x):
        logits, vjp = run_vjp(weights(), padded(x))
        pullback = lambda slope: np.asarray(pull(vjp, padded(slope)))[: len(x)]  # noqa: E731
        return np.asarray(logits)[: len(x)], pullback

    return evaluate, linearize


def _tensorflow_bridge(call, weights):
    """`evaluate` and `linearize`, compiled; the variables are read at each call."""
    import tensorflow as tf

    run = tf.function(lambda x: call(weights(), x), reduce_retracing=True)

    def evaluate(x):
        return run(tf.constant(x)).numpy()

    def linearize(x):
        x = tf.constant(x)
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(x)
            logits = run(x)
        return logits.numpy(), lambda slope: tape.gradient(logits, x, tf.constant(slope)).numpy()

    return evaluate, linearize
