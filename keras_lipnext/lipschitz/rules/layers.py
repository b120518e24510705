"""The rules of this library's layers and of those of Keras that have a Lipschitz constant."""

import dataclasses
import math

import keras
import numpy as np

from keras_lipnext import backend, layers
from keras_lipnext.activations import ACTIVATION_LAYERS, OPERATION_ACTIVATIONS, broken
from keras_lipnext.lipschitz.rounding import (
    added,
    block_diagonal,
    check_factors,
    joining,
    linear,
    products,
    repeated,
    scaled,
)
from keras_lipnext.lipschitz.rules.activations import INNER_SOFTMAX, activation_bound, activation_of
from keras_lipnext.lipschitz.rules.base import (
    COARSE,
    Bound,
    NominalContext,
    find_rule,
    library_rule,
    size,
)
from keras_lipnext.lipschitz.rules.contractions import NoContraction, einsum_axes, matrices
from keras_lipnext.norms.roundoff import ROUNDING

kl = keras.layers


# At inference these return their input; tests/certification/test_layer_rules.py runs each.
@library_rule(
    kl.ActivityRegularization,
    kl.AlphaDropout,
    kl.AugMix,
    kl.Dropout,
    kl.GaussianDropout,
    kl.GaussianNoise,
    kl.Identity,
    kl.RandAugment,
    kl.RandomBrightness,
    kl.RandomColorDegeneration,
    kl.RandomColorJitter,
    kl.RandomContrast,
    kl.RandomElasticTransform,
    kl.RandomErasing,
    kl.RandomFlip,
    kl.RandomGaussianBlur,
    kl.RandomGrayscale,
    kl.RandomHue,
    kl.RandomInvert,
    kl.RandomPerspective,
    kl.RandomPosterization,
    kl.RandomRotation,
    kl.RandomSaturation,
    kl.RandomSharpness,
    kl.RandomShear,
    kl.RandomTranslation,
    kl.RandomZoom,
    kl.SpatialDropout1D,
    kl.SpatialDropout2D,
    kl.SpatialDropout3D,
    identity=True,
    converts=True,
)
@library_rule("StopGradient", identity=True)
@library_rule("Negative", "Absolute", "Abs", "Fabs", "Copy")
@library_rule(kl.Flatten, kl.Reshape, kl.Permute, converts=True)
@library_rule(kl.ZeroPadding1D, kl.ZeroPadding2D, kl.Cropping1D, kl.Cropping2D, converts=True)
@library_rule(kl.ZeroPadding3D, kl.Cropping3D)
@library_rule(layers.BetaAbs, layers.GroupSort, layers.MaxMin, layers.SpatialShift)
def exact(layer, context):
    """Permutes, drops, repeats no entry, or changes signs: nothing is rounded."""
    return Bound(1.0)


# This library's layers.


@library_rule(layers.L2Pool)
def l2_pool(layer, context):
    """sqrt(sum x^2 + epsilon), channel by channel: half the rounding of the sum."""
    positions = size(context.input_shape) / size(context.output_shape)
    channels = size(context.output_shape)
    offset = math.sqrt(layer.epsilon * channels)
    rounding = (positions + 8) * context.arithmetic.rounding
    if context.arithmetic.program:
        # Of positive numbers: a square, the sum's additions, its epsilon and that of its type, half
        # of it behind the root, which is off by 4 u; second orders.
        rounding = context.arithmetic.gamma(positions + 2) / 2 + 8 * context.arithmetic.unit
    # Squares below the smallest number vanish: entries of 1e-154 do no harm.
    return Bound(1.0, offset, rounding, rounding * offset + vanishing_squares(context))


def vanishing_squares(context):
    """What roots of sums of squares, and of something small, lose to what underflows."""
    smallest = context.arithmetic.smallest**0.5 if context.arithmetic.program else 2.0**-500
    return math.sqrt(size(context.input_shape) + size(context.output_shape)) * smallest


@library_rule(layers.PositionalBias)
def positional_bias(layer, context):
    return added(context, layer.bias)


@library_rule(layers.Scale)
def scale(layer, context):
    return scaled(context, layer.factor)


@library_rule(layers.Householder)
def householder(layer, context):
    """z - 2 v min(v^T z, 0), v a unit vector whatever the angle: constant 1 in real arithmetic.

    As computed, each entry of v is off by at most e, so v by 1.5 e: 2 v (v^T z) by less than
    4 (1.5 e) |z| and second orders. The other operations, none more than six in a row, act on
    numbers of size 2 |z| at most.
    """
    if isinstance(context, NominalContext):
        return Bound(1.0)
    rounding = context.arithmetic.rounding
    angles = context.largest(layer.angle) / 2
    # A function is off by 64 units of the larger of what it reads and answers.
    unit_vector = 32 * rounding * max(1.0, angles)
    if not unit_vector < 2.0**-8:
        reason = f"an angle of {2 * angles} radians is too large to reflect by"
        context.check_program(reason)
        raise context.refusal(reason)
    relative = 8 * unit_vector + 24 * rounding + 2 * joining(context, context.summed)
    underflow = 4 * context.arithmetic.underflow * size(context.output_shape)
    return Bound(1.0, relative=relative, absolute=underflow, terms=context.summed + 2)


@library_rule(layers.NormalizedDense, head=True)
def normalized_dense(layer, context):
    terms = layer.kernel.shape[0]
    yield linear(context, context.norm(layer.kernel), layer.kernel, terms)
    if layer.bias is not None:
        yield added(context, layer.bias, terms)


@library_rule(layers.PatchEmbedding)
def patch_embedding(layer, context):
    return linear(context, context.norm(layer.kernel), layer.kernel, layer.kernel.shape[0])


@library_rule(layers.ShiftMixing)
def shift_mixing(layer, context):
    """x + (S - I)(x R) R^T.

    With A = S - I, E = R R^T - I and s >= ||R||: T^T T <= I + R^T A^T E A R, and ||A|| <= 2, so
    ||T||^2 <= 1 + 4 s^2 max(s^2 - 1, 0). Both paddings.
    """
    s = context.norm(layer.kernel)
    if s == 0:  # the identity, but nothing that training leads to
        raise context.refusal(
            "it has an all-zero kernel, which should be orthonormal: its weights were not loaded"
        )
    square = s * s
    constant = (1 + 4 * square * max(square - 1, 0.0)) ** 0.5 * (1 + 4 * ROUNDING)
    # In units of the input's norm, each factor 2 for the rounding of what was rounded before:
    u, magnitude = context.arithmetic, context.absolute_norm(layer.kernel)
    channels, moving = layer.kernel.shape
    rows = products(context, channels, magnitude, s)  # x R
    difference = 2 * rows + 4 * u.rounding * s  # (S - I)(x R), of norm at most 2 s
    product = s * difference + 2 * products(context, moving, magnitude, s) * (s + difference)
    total = product + 2 * u.rounding * (1 + 2 * square + product)  # the last addition
    shape = context.output_shape
    return Bound(
        constant,
        relative=total + joining(context, moving) + u.underflow * channels * moving,
        absolute=u.underflow * channels * (1 + magnitude) ** 2 * size(shape),
        terms=moving,
    )


@library_rule(layers.FullShiftMixing)
def full_shift_mixing(layer, context):
    """(S(x R)) R^T: two products of the same norm and roundings around S, exact, of norm 1."""
    channels = layer.kernel.shape[0]
    product = linear(context, context.norm(layer.kernel), layer.kernel, channels)
    return product, Bound(1.0), product


# Dense and convolution layers.


def activated(layer, context):
    return activation_bound(activation_of(layer, context), context)


@library_rule(layers.OrthogonalDense, kl.Dense, head=True)
def dense(layer, context):
    _check_plain(layer, context)
    terms = layer.kernel.shape[0]
    yield linear(context, linear_norm(layer, context), layer.kernel, terms)
    yield from _bias_and_activation(layer, context, terms)


@library_rule(kl.EinsumDense)
def einsum_dense(layer, context):
    _check_plain(layer, context)
    try:
        axes = einsum_axes(layer.equation, len(context.input_shape) + 1)
        weights = context.array(layer.kernel)
        blocks = matrices(axes, (None, *context.input_shape), weights)
    except NoContraction as error:
        raise context.refusal(str(error)) from error
    yield block_diagonal(context, blocks)
    yield from _bias_and_activation(layer, context, blocks.shape[1])


@library_rule(kl.Conv1D, kl.Conv2D, kl.Conv3D, head=True)
def convolution(layer, context):
    _check_plain(layer, context)
    check_convolution(context)
    kernel = layer.kernel
    channels = context.input_shape[0 if layer.data_format == "channels_first" else -1]
    if kernel.shape[-2] * layer.groups != channels:
        raise context.refusal(f"its {layer.groups} groups do not fit its kernel and input")
    terms = math.prod(kernel.shape[:-1])
    yield linear(context, linear_norm(layer, context), kernel, terms)
    yield from _bias_and_activation(layer, context, terms)


@library_rule(kl.Conv1DTranspose, kl.Conv2DTranspose, kl.Conv3DTranspose)
def transposed_convolution(layer, context):
    """The adjoint of a convolution with kernel (*spatial, outputs, inputs), cropped."""
    _check_plain(layer, context)
    check_convolution(context)
    kernel = layer.kernel
    terms = math.prod(kernel.shape) // kernel.shape[-2]
    yield linear(context, linear_norm(layer, context), kernel, terms)
    yield from _bias_and_activation(layer, context, terms)


@library_rule(kl.DepthwiseConv1D, kl.DepthwiseConv2D)
def depthwise_convolution(layer, context):
    _check_plain(layer, context)
    check_convolution(context)
    kernel = layer.kernel
    terms = math.prod(kernel.shape[:-2])
    yield linear(context, linear_norm(layer, context), kernel, terms)
    yield from _bias_and_activation(layer, context, terms)


@library_rule(kl.SeparableConv1D, kl.SeparableConv2D)
def separable_convolution(layer, context):
    _check_plain(layer, context)
    check_convolution(context)
    depthwise, pointwise = layer.depthwise_kernel, layer.pointwise_kernel
    norm = _depthwise_norm(layer, context, depthwise)
    yield linear(context, norm, depthwise, math.prod(depthwise.shape[:-2]))
    norm = context.convolution_norm(pointwise)
    yield linear(context, norm, pointwise, pointwise.shape[-2])
    yield from _bias_and_activation(layer, context, pointwise.shape[-2])


# For each class, the axes of the kernel that its output channels run along.
_OUTPUT_AXES = {
    kl.Dense: (-1,),
    layers.OrthogonalDense: (-1,),
    kl.Conv1D: (-1,),
    kl.Conv2D: (-1,),
    kl.Conv3D: (-1,),
    kl.Conv1DTranspose: (-2,),
    kl.Conv2DTranspose: (-2,),
    kl.Conv3DTranspose: (-2,),
    kl.DepthwiseConv1D: (-2, -1),
    kl.DepthwiseConv2D: (-2, -1),
}


def linear_norm(layer, context, kernel=None):
    """Bound of the norm of a layer's linear part, of its own kernel or another of its shape."""
    kernel = layer.kernel if kernel is None else kernel
    kind = type(layer)
    if kind in (kl.Dense, layers.OrthogonalDense):
        return context.norm(kernel)
    if kind in (kl.DepthwiseConv1D, kl.DepthwiseConv2D):
        return _depthwise_norm(layer, context, kernel)
    if kind in (kl.Conv1DTranspose, kl.Conv2DTranspose, kl.Conv3DTranspose):
        return context.convolution_norm(kernel, layer.strides, 1, layer.dilation_rate)
    settings = (layer.strides, layer.groups, layer.dilation_rate)
    return context.convolution_norm(kernel, *settings, _sides(layer, context), layer.padding)


def _depthwise_norm(layer, context, kernel):
    sides = _sides(layer, context)
    return context.depthwise_norm(kernel, layer.strides, layer.dilation_rate, sides, layer.padding)


def _sides(layer, context):
    """The spatial sides of a convolution's input."""
    first = layer.data_format == "channels_first"
    return context.input_shape[1:] if first else context.input_shape[:-1]


def normalised_norm(linear_context, context):
    """Bounds of the norm of a linear layer and the batch normalisation behind it, as one map.

    That of the kernel with each output channel times the normalisation's factor; and what follows
    for the linear layer alone, infinite unless all factors are alike. None if the step of
    `linear_context` is no linear layer alone, or of channels along another axis.
    """
    layer, normalisation = linear_context.step.operation, context.step.operation
    axes = _OUTPUT_AXES.get(type(layer))
    if axes is None or layer.activation is not keras.activations.linear:
        return None
    rank = len(context.input_shape) + 1
    channels_first = getattr(layer, "data_format", None) == "channels_first"
    axis = getattr(layer, "axis", 1 if channels_first else -1)
    if axis % rank != normalisation.axis % rank:
        return None
    _check_plain(layer, linear_context)
    kernel = linear_context.array(layer.kernel)
    if not kernel.any():
        return None
    factors, _ = _normalising_factors(normalisation, context)
    sides = [n if i - kernel.ndim in axes else 1 for i, n in enumerate(kernel.shape)]
    product = kernel * factors.reshape(sides)
    norm = linear_norm(layer, linear_context, product)
    # Relatively, an entry is off by what its factor is and one unit: 16 ROUNDING cover twice that.
    # Of subnormal numbers, times 2^64 at most, all may be lost.
    norm += 16 * ROUNDING * linear_context.absolute_norm(product)
    norm = norm * (1 + 4 * ROUNDING) + kernel.size * 2.0**-900
    least, largest = np.abs(factors).min(), np.abs(factors).max()
    alike = largest <= (1 + COARSE) * least and largest > 0
    return norm, float(norm / least) * (1 + 16 * ROUNDING) if alike else math.inf


def _bias_and_activation(layer, context, terms):
    if layer.bias is not None:
        yield added(context, layer.bias, terms)
    yield activated(layer, context)


def check_convolution(context):
    """Refuses a float32 program whose convolutions may be no plain sums of products."""
    if reason := backend.indirect_convolutions():
        context.check_program(reason)


def _check_plain(layer, context):
    if getattr(layer, "quantization_mode", None):
        raise context.refusal(f"it is quantized ({layer.quantization_mode})")
    if getattr(layer, "lora_enabled", False):
        raise context.refusal("it holds a LoRA beside its kernel: merge it first")


# Activation layers.


@library_rule(*ACTIVATION_LAYERS, *OPERATION_ACTIVATIONS)
def activation_layer(layer, context):
    if broken(layer):
        raise context.refusal(broken(layer))
    return activation_bound(activation_of(layer, context), context)


@library_rule(kl.PReLU)
def parametric_relu(layer, context):
    constant = max(1.0, context.largest(layer.alpha))
    return Bound(constant, relative=4 * context.arithmetic.rounding * constant)


@library_rule(kl.TimeDistributed)
def time_distributed(layer, context):
    """The wrapped layer, applied to each slice: together they are one block diagonal map."""
    step = slice_step(context.step)
    rule = find_rule(step)
    if rule is None or not rule.proven:
        raise context.refusal(f"the library has no rule for the layer it wraps, {step.kind}")
    answer = rule.function(step.operation, context.of_slices(step))
    for bound in (answer,) if isinstance(answer, Bound) else answer:
        yield repeated(bound, size(context.input_shape[:1]))


def slice_step(step):
    """The step of the layer that a `TimeDistributed` wraps, on one slice."""
    shapes = [
        tuple((shape[0], *shape[2:]) for shape in shapes)
        for shapes in (step.input_shapes, step.output_shapes)
    ]
    wrapped = step.operation.layer
    return dataclasses.replace(
        step, operation=wrapped, kwargs={}, input_shapes=shapes[0], output_shapes=shapes[1]
    )


@library_rule(kl.Softmax, "Softmax", "LogSoftmax")
def softmax(layer, context):
    raise context.refusal(INNER_SOFTMAX)


# Scaling of inputs and channels.


@library_rule(kl.Rescaling, converts=True, numbers=("scale", "offset"))
def rescaling(layer, context):
    scale, offset = np.asarray(layer.scale), np.asarray(layer.offset)
    # The layer looks the format up, and moves the axis of its scale, not of its offset.
    if scale.ndim and keras.config.image_data_format() == "channels_first":
        scale = scale.reshape(scale.shape + (1,) * (3 - scale.ndim))
    whole = (1, *context.input_shape)
    for values in (scale, offset):
        sides = zip(values.shape[::-1], whole[::-1])
        if values.ndim > len(whole) or not all(side in (1, n) for side, n in sides):
            raise context.refusal(
                f"its scale or offset of shape {values.shape} is neither one number nor one for "
                f"each entry of some axes of inputs of shape {context.input_shape}"
            )
    yield scaled(context, scale)
    yield added(context, offset)


@library_rule(kl.Normalization, converts=True, numbers=("mean", "variance"))
def normalization(layer, context):
    """(x - mean) / max(std, epsilon): divided by the smallest standard deviation."""
    if 0 in {a % (len(context.input_shape) + 1) for a in np.atleast_1d(layer.axis or [])}:
        raise context.refusal("it works on the batch axis")
    # Tensors, made from the weights or the configuration.
    mean, variance = (
        context.array(np.asarray(keras.ops.convert_to_numpy(v), "float64"))
        for v in (layer.mean, layer.variance)
    )
    deviation = np.sqrt(variance)
    least = max(2.0**-64, 2 * keras.backend.epsilon())  # below, Keras divides by its epsilon
    if not ((deviation >= least) & (deviation <= 2.0**64)).all():
        raise context.refusal(
            f"its standard deviations reach from {deviation.min()} to {deviation.max()}"
        )
    if layer.invert:
        yield scaled(context, deviation * (1 + 4 * ROUNDING))
        yield added(context, mean)
        return
    factors = 1 / deviation
    check_factors(context, factors)
    largest = context.largest(factors) * (1 + 8 * ROUNDING)
    yield added(context, mean)
    yield Bound(largest, relative=8 * context.arithmetic.rounding * largest)


@library_rule(kl.BatchNormalization)
def batch_normalization(layer, context):
    """gamma (x - mean) / sqrt(variance + epsilon) + beta, of the moving statistics."""
    if layer.renorm:
        raise context.refusal("batch renormalisation keeps statistics of its own")
    if layer.axis % (len(context.input_shape) + 1) == 0:
        raise context.refusal("it works on the batch axis")
    scale, mean = _normalising_factors(layer, context)
    beta = context.array(layer.beta) if layer.center else np.zeros_like(mean)
    largest = context.largest(scale) * (1 + 8 * ROUNDING)
    # Backends compute x s + (beta - mean s) or (x - mean) s + beta: both within this.
    magnitude = context.offset_norm(np.abs(beta) + np.abs(mean * scale))
    rounding = 16 * context.arithmetic.rounding * _grown(layer, context)
    joined = joining(context, context.summed)
    yield Bound(
        largest,
        context.offset_norm(beta - mean * scale) + 16 * ROUNDING * magnitude,
        rounding * largest,
        rounding * magnitude + joined * (magnitude + context.offset_norm(mean) * largest),
    )


def _grown(layer, context):
    """How many times epsilon is larger than its sum with a variance, 1 if none is negative.

    A program rounds epsilon to its type: relatively to the sum that counts as often.
    """
    total = context.array(layer.moving_variance) + layer.epsilon
    return max(1.0, float((layer.epsilon / total).max())) if context.arithmetic.program else 1.0


def _normalising_factors(layer, context):
    """(gamma / sqrt(variance + epsilon), mean), the factors off by less than 4 u relatively."""
    mean, variance = context.array(layer.moving_mean), context.array(layer.moving_variance)
    total = variance + layer.epsilon
    if not (total > 0).all():
        raise context.refusal(f"its variance + epsilon is {total.min()}, not positive")
    scale = 1 / np.sqrt(total)
    if layer.scale:
        scale = scale * context.array(layer.gamma)
    check_factors(context, np.abs(scale))
    return scale, mean
