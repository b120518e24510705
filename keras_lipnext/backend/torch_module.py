"""A Keras model of any backend as a module of PyTorch, differentiable: attacks want one."""

import functools

import keras

from keras_lipnext.installation import installing


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
        raise ImportError(f"`as_torch_module` needs PyTorch: {installing('torch')}") from error

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

        def evaluate(x):
            return call(weights(), x)

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
            ctx.save_for_backward(x)
            return torch.tensor(logits, device=x.device)

        @staticmethod
        def backward(ctx, slope):
            return Pullback.apply(ctx.pullback, slope, *ctx.saved_tensors)

    class Pullback(torch.autograd.Function):
        """The gradient, as a function of `x`, so that to differentiate it is an error, not 0."""

        @staticmethod
        def forward(ctx, pullback, slope, x):
            return torch.tensor(pullback(slope.numpy(force=True)), device=x.device)

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError(
                "A model of JAX or TensorFlow has no second derivatives as a PyTorch module. "
                "Set KERAS_BACKEND=torch, where it has."
            )

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
        return np.asarray(logits)[: len(x)], functools.partial(pull_back, vjp, len(x))

    def pull_back(vjp, count, slope):
        return np.asarray(pull(vjp, padded(slope)))[:count]

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
