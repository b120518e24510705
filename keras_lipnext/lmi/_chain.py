"""A model as a chain of affine maps and slope-restricted activations, in NumPy float64.

    x_0 = input,   x_i = phi_i(W_i x_{i-1} + b_i) for i < l,   answer = W_l x_{l-1} + b_l.

Tensors are flattened in row-major order. Affine layers that follow each other are multiplied, the
rounding of the product bounded; what is no such chain is refused, with the reason.
"""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_lipnext import layers
from keras_lipnext.activations import ACTIVATION_LAYERS, find_activation
from keras_lipnext.lipschitz.composites import check_composites
from keras_lipnext.lipschitz.model import read, required_rule, step_bounds
from keras_lipnext.lipschitz.rules.activations import activation_of
from keras_lipnext.lipschitz.rules.base import Context
from keras_lipnext.lmi._affine import AffineLayer, Chain
from keras_lipnext.norms.convolution_matrix import convolution_matrices, output_sides
from keras_lipnext.norms.roundoff import SMALLEST_NORMAL, UNIT_ROUNDOFF, UP_ERROR, gamma

kl = keras.layers

# Entries of two neighbouring values together: a matrix of this side is factorised for each pair.
LARGEST = 8192


def read_chain(model, part="logits"):
    """Reads a model as a `Chain`.

    Args:
        model: Built functional or Sequential Keras model: Dense, OrthogonalDense, NormalizedDense,
            small Conv1D and Conv2D, Rescaling and BatchNormalization, with activations of bounded
            slope; layers that only reshape, or do nothing at inference.
        part: "logits" for all of the model but a softmax at its end; "body" for what is in front
            of the head, the part that `certify` needs the constant of.

    Raises:
        ValueError: naming the layer that does not fit, and what bounds the model nevertheless.
    """
    if part not in ("logits", "body"):
        raise ValueError(f"`part` must be 'logits' or 'body'. Received: part={part!r}")
    certifiable = read(model)
    check_composites(certifiable.graph)
    head = certifiable.head
    steps = certifiable.body.steps + ((head,) if head and part == "logits" else ())
    shape = certifiable.graph.input_shape[1:]
    if None in shape:
        raise ValueError(f"Model '{model.name}' takes inputs of no fixed size, {shape}. {_WAY_OUT}")
    reader, current, step = _Reader(math.prod(shape)), 0, None
    for step in steps:
        if step.inputs != (current,) or len(step.outputs) != 1:
            raise refusal(step, "it makes the model no chain, but a graph that branches")
        current = step.outputs[0]
        context = Context(step)
        if step is not head:
            step_bounds(step, context)  # refuses what no certificate covers
        reader.read(step, context, step is head)
    if part == "body" and not reader.layers and reader.weight is None:
        return Chain(model.name, part, (), reader.diagonal())
    reader.end(step)
    return Chain(model.name, part, tuple(reader.layers))


_WAY_OUT = (
    "The product of the layers' norms covers it: keras_lipnext.lipschitz_bound, or "
    "certify(..., lipschitz='product')."
)


def refusal(step, reason):
    """The error for a step that has no place in a chain, with the way out."""
    return ValueError(f"{step.title} cannot be read as part of a chain: {reason}. {_WAY_OUT}")


def _on_vectors(activation, context):
    """The activation, of a tensor that the chain holds as vectors.

    PReLU has numbers of its own for entries, which stand where the tensor's axes say.
    """
    shape = context.output_shape
    if len(shape) == 1:
        return activation

    def function(x):
        return ops.reshape(activation.function(ops.reshape(x, (-1, *shape))), ops.shape(x))

    return dataclasses.replace(activation, function=function)


class _Reader:
    """The affine map since the last activation, x -> W x + b; W None stands for diag(scale)."""

    def __init__(self, size):
        self.layers = []
        self.name = "input"
        self._start(size)

    def _start(self, size):
        self.size, self.weight, self.scale = size, None, np.ones(())
        self.bias, self.error, self.bias_error = np.zeros(size), 0.0, np.zeros(size)

    def read(self, step, context, is_head):
        layer, kind = step.operation, type(step.operation)
        if not isinstance(layer, kl.Layer):
            activation = find_activation(layer)
            if activation:
                self.activate(activation, step)
            elif step.kind != "Reshape" and not required_rule(step).identity:
                raise refusal(step, "it is neither affine nor an activation that is known here")
        elif kind in ACTIVATION_LAYERS:
            self.activate(_on_vectors(activation_of(layer, context), context), step)
        elif kind in _AFFINE:
            matrix, bias = _AFFINE[kind](layer, context, step)
            self.multiply(matrix, bias, step)
            if not is_head and kind is not layers.NormalizedDense:
                self.activate(_on_vectors(activation_of(layer, context), context), step)
        elif kind is kl.Rescaling:
            if np.ndim(layer.scale) or np.ndim(layer.offset):
                raise refusal(step, "only one number as scale and one as offset is read")
            self.stretch(np.float64(layer.scale), np.float64(layer.offset), 0.0)
        elif kind is kl.BatchNormalization:
            self._normalize(layer, context, step)
        elif kind is kl.Flatten and len(context.input_shape) > 1:
            if layer.data_format != "channels_last":
                raise refusal(step, "it permutes entries (data_format='channels_first')")
        elif kind not in (kl.Flatten, kl.Reshape) and not required_rule(step).identity:
            raise refusal(step, "its class is neither affine nor an activation of bounded slope")

    def multiply(self, matrix, bias, step):
        """Appends x -> matrix x + bias."""
        self.name = step.name
        _check_size(step, *matrix.shape)
        magnitude = magnitude_norm(matrix)
        error = magnitude * self.error
        if self.bias.any() or self.bias_error.any():
            sizes = np.abs(matrix) @ np.abs(self.bias) + np.abs(bias)
            off = np.abs(matrix) @ self.bias_error + gamma(len(self.bias) + 2) * sizes
            self.bias_error = off * UP_ERROR + matrix.shape[1] * _LOST
        else:  # exact
            self.bias_error = np.zeros(len(matrix))
        self.bias = matrix @ self.bias + bias
        if self.weight is None and (self.scale == 1).all():
            self.weight = matrix
        elif self.weight is None:
            self.weight = matrix * self.scale
            error += 2 * UNIT_ROUNDOFF * magnitude_norm(self.weight) + self.weight.size * _LOST
        else:
            terms = len(self.weight)
            error += 2 * gamma(terms + 2) * magnitude * magnitude_norm(self.weight)
            self.weight = matrix @ self.weight
            error += terms * self.weight.size * _LOST
        self.error = float(error) * UP_ERROR + _LOST if error else 0.0
        self.size = len(matrix)

    def stretch(self, factors, offsets, relative, off=0.0):
        """Appends x -> factors x + offsets, entry by entry.

        `relative` is the error of the factors, `off` that of each offset.
        """
        largest = float(np.abs(factors).max(initial=0.0))
        target = self.scale if self.weight is None else self.weight
        product = factors * target if target.ndim < 2 else np.reshape(factors, (-1, 1)) * target
        magnitude = np.abs(product).max() if product.ndim < 2 else magnitude_norm(product)
        error = largest * self.error
        if relative or not (np.abs(factors) == 1).all():  # else the product is exact
            error += (relative + 2 * UNIT_ROUNDOFF) * magnitude
            # What underflowed in the product, and in the factors.
            size = np.abs(target).max() if target.ndim < 2 else magnitude_norm(target)
            error += (product.size + size) * _LOST
        self.error = float(error) * UP_ERROR + _LOST if error else 0.0
        if self.weight is None:
            self.scale = product
        else:
            self.weight = product
        sizes = np.abs(factors * self.bias)
        exact = np.all(self.bias == 0) and not (np.any(off) or self.bias_error.any())
        self.bias = factors * self.bias + offsets
        off = off + np.abs(factors) * (1 + relative) * self.bias_error
        off = off + (relative + 4 * UNIT_ROUNDOFF) * (sizes + np.abs(offsets)) + _LOST
        self.bias_error = np.zeros(self.size) if exact else off * UP_ERROR

    def _normalize(self, layer, context, step):
        if layer.axis % (len(context.input_shape) + 1) != len(context.input_shape):
            raise refusal(step, "only the last axis is read as channels")
        mean, variance = context.array(layer.moving_mean), context.array(layer.moving_variance)
        factors = 1 / np.sqrt(variance + layer.epsilon)
        if layer.scale:
            factors = factors * context.array(layer.gamma)
        beta = context.array(layer.beta) if layer.center else 0.0
        repeats = self.size // len(mean)
        off = 16 * UNIT_ROUNDOFF * (np.abs(beta) + np.abs(mean * factors)) + _LOST
        factors, offsets, off = (
            np.tile(values, repeats) for values in (factors, beta - mean * factors, off)
        )
        self.stretch(factors, offsets, 8 * UNIT_ROUNDOFF, off)

    def activate(self, activation, step):
        """Appends an activation: it ends the affine map, or joins the activation before it."""
        low, high = activation.slopes
        if low == high:  # it is linear
            if low != 1:
                self.stretch(np.float64(low), np.float64(0.0), 0.0)
            return
        if not -(2.0**64) < low < high < 2.0**64:
            raise refusal(step, f"the slope of its activation is only known to be in {low, high}")
        untouched = self.weight is None and (self.scale == 1).all() and not self.bias.any()
        # A scale of 1 may be rounded, and a bias of 0.
        untouched = untouched and not (self.error or self.bias_error.any())
        if untouched and self.layers:
            last = self.layers[-1]
            self.layers[-1] = dataclasses.replace(last, activations=(*last.activations, activation))
            return
        if self.weight is None:
            self.name = step.name
        self._finish(step, (activation,))

    def end(self, step):
        """The last affine map."""
        self._finish(step, ())

    def diagonal(self):
        """Upper bound of the norm of the affine map, one of W None."""
        self._check_entries(self.scale)
        norm = float(np.abs(self.scale).max())
        return (norm + self.error) * UP_ERROR if self.error else norm

    def _finish(self, step, activations):
        weight, inputs = self.weight, self.size
        if weight is None:
            _check_size(step, inputs, inputs)
            weight = np.diag(np.broadcast_to(self.scale, inputs))
        self._check_entries(weight)
        self.layers.append(
            AffineLayer(self.name, weight, self.bias, self.error, activations, self.bias_error)
        )
        self._start(len(weight))

    def _check_entries(self, weight):
        if not (np.isfinite(weight).all() and np.abs(weight).max() > 0):
            raise ValueError(
                f"The matrix that ends in layer '{self.name}' is all-zero or not finite."
            )


# What a product, its sum, and the two in bounds of their errors lose to underflow.
_LOST = 4 * SMALLEST_NORMAL


def magnitude_norm(matrix):
    """Upper bound of `|| |matrix| ||_2`, and so of the norm of every matrix below it."""
    magnitudes = np.abs(matrix)
    sums = [magnitudes.sum(axis=axis).max() for axis in (0, 1)]
    # The product of the sums underflows for entries below 2^-511.
    return float(np.sqrt(sums[0]) * np.sqrt(sums[1]) * UP_ERROR) + matrix.size * _LOST


def _check_size(step, outputs, inputs):
    if outputs + inputs > LARGEST:
        raise refusal(step, f"it has {inputs} inputs and {outputs} outputs, over {LARGEST} in all")


def _dense(layer, context, step):
    if len(context.input_shape) != 1:
        raise refusal(step, f"it acts along one axis of {context.input_shape}, not on vectors")
    kernel = context.array(layer.kernel)
    bias = np.zeros(kernel.shape[1]) if layer.bias is None else context.array(layer.bias)
    return np.ascontiguousarray(kernel.T), bias


def _convolution(layer, context, step):
    if layer.data_format != "channels_last" or layer.groups != 1 or layer.padding == "causal":
        raise refusal(
            step, "of convolutions, channels-last ones without groups, not causal, are read"
        )
    kernel, shape = context.array(layer.kernel), context.input_shape
    settings = (shape[:-1], layer.strides, layer.padding, layer.dilation_rate)
    outputs = math.prod(output_sides(kernel, *settings)) * kernel.shape[-1]
    _check_size(step, outputs, math.prod(shape))
    matrix = np.ascontiguousarray(convolution_matrices(kernel, *settings)[0].T)
    bias = np.zeros(kernel.shape[-1]) if layer.bias is None else context.array(layer.bias)
    return matrix, np.tile(bias, len(matrix) // len(bias))


_AFFINE = {
    kl.Dense: _dense,
    layers.OrthogonalDense: _dense,
    layers.NormalizedDense: _dense,
    kl.Conv1D: _convolution,
    kl.Conv2D: _convolution,
}
