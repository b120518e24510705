"""The rules of SDP-based Lipschitz layers.

Their constant is 1 by theorem if W^T W <= T. Here it is proven of the T that is computed: with
||W T^(-1/2)|| <= s, that is W^T W <= s^2 T, the linear layer's constant is s, and the residual
layer's h(x) = x - 2 W T^-1 sigma(W^T x + b) is sqrt(1 + 4 s^2 max(s^2 - 1, 0)). Proof: for inputs
that differ by d, let v = W^T d and g the difference of the activations. Slopes in [0, 1] say
g_i^2 <= g_i v_i, so g^T T^-1 g <= g^T T^-1 v, and

    ||h(x) - h(y)||^2 = ||d||^2 - 4 v^T T^-1 g + 4 g^T T^-1 W^T W T^-1 g
                     <= ||d||^2 + 4 (s^2 - 1) g^T T^-1 g,

where 0 <= g^T T^-1 g <= v^T T^-1 v <= s^2 ||d||^2.

The sandwich layer's h(x) = sqrt(2) A^T Psi sigma(sqrt(2) Psi^-1 B x + b) is s^2, s >= ||[A B]||.
Proof: now v = sqrt(2) Psi^-1 B d, and with w = Psi g and t = ||B^T w||, g_i^2 <= g_i v_i times
Psi_ii^2 says ||w||^2 <= sqrt(2) w^T B d <= sqrt(2) t ||d||. As A A^T <= s^2 I - B B^T,

    ||h(x) - h(y)||^2 = 2 w^T A A^T w <= 2 s^2 ||w||^2 - 2 t^2
                     <= 2 sqrt(2) s^2 t ||d|| - 2 t^2 <= s^4 ||d||^2,

the largest over t, at t = s^2 ||d|| / sqrt(2).
"""

import dataclasses
import itertools
import math

import keras
import numpy as np

from keras_lipnext import backend, layers
from keras_lipnext.layers.sdp_diagonal import Q_RANGE
from keras_lipnext.lipschitz.rounding import added, joining, linear
from keras_lipnext.lipschitz.rules.activations import activation_bound, activation_of
from keras_lipnext.lipschitz.rules.base import Bound, NominalContext, library_rule, size
from keras_lipnext.lipschitz.rules.layers import check_convolution
from keras_lipnext.norms.roundoff import ROUNDING, gamma


@library_rule(layers.SDPDense, layers.SDPConv2D)
def sdp_linear(layer, context):
    if isinstance(context, NominalContext):
        yield Bound(1.0)
    else:
        form = _Form(layer, context)
        kernel = form.w * form.root
        terms = math.prod(kernel.shape[:-2]) * form.columns
        yield form.product(kernel, form.norm(kernel), terms, context, [form.root])
        if layer.bias is not None:
            yield added(context, layer.bias, terms)
    yield activation_bound(activation_of(layer, context), context)


@library_rule(layers.SDPResidualDense, layers.SDPResidualConv2D)
def sdp_residual(layer, context):
    activation = activation_of(layer, context)
    least, largest = activation.slopes
    if least < 0 or largest > 1:
        raise context.refusal("its activation's slope leaves [0, 1]")
    if isinstance(context, NominalContext):
        return Bound(1.0)
    arrays = [context.array(v) for v in (layer.kernel, layer.bias, layer.log_q) if v is not None]
    if not arrays[0].any():
        return Bound(1.0)  # x - 0: the identity, evaluated without rounding
    form = _Form(layer, context)
    kernel = form.w * form.root
    norm, taps = form.norm(kernel), math.prod(kernel.shape[:-2])
    square = norm**2 * (1 + 4 * ROUNDING)
    constant = math.sqrt(1 + 4 * square * max(square - 1, 0.0)) * (1 + 4 * ROUNDING)
    hidden = (*context.input_shape[:-1], form.columns)
    if kernel.ndim == 4 and layer.data_format == "channels_first":
        hidden = (form.columns, *context.input_shape[1:])
    inputs, sizes = taps * kernel.shape[-2], form.scale / form.root  # R = T^(1/2)
    factors = [form.root, sizes]
    parts = [
        form.product(kernel, norm, inputs, _Sized(context, hidden), factors),
        _hidden(context, sizes, form.error, layer.bias, activation, hidden, inputs),
        form.product(kernel, norm, taps * form.columns, context, factors),
    ]
    (r0, r1, d0, d1), inside = _passed(parts)
    rounding = context.arithmetic.rounding
    relative = 2 * d0 + 2 * rounding * (1 + 2 * (r0 + d0)) + joining(context, parts[2].terms)
    absolute = 2 * d1 + 4 * rounding * (r1 + d1)
    up = 1 + 2**-30  # the rounding of these lines
    return Bound(
        constant, 2 * r1 * up, relative * up, absolute * up, terms=parts[2].terms, inside=inside
    )


@library_rule(layers.SandwichDense)
def sandwich(layer, context):
    activation = activation_of(layer, context)
    least, largest = activation.slopes
    if least < 0 or largest > 1:
        raise context.refusal("its activation's slope leaves [0, 1]")
    norm = context.norm(layer.kernel)
    if isinstance(context, NominalContext):
        return Bound(1.0)
    kernel = context.array(layer.kernel)
    outer, inner = kernel[: layer.units], kernel[layer.units :]
    if norm == 0:
        raise context.refusal(
            "it has an all-zero kernel, which should be orthonormal: its weights were not loaded"
        )
    constant = norm * norm * (1 + 4 * ROUNDING)
    sizes = math.sqrt(2) * np.exp(-np.clip(context.array(layer.log_psi), -Q_RANGE, Q_RANGE))
    hidden = (*context.input_shape[:-1], layer.units)
    error = 2**9 * context.arithmetic.unit  # the exponential is off as q of `_Form` is
    parts = [
        _folded(linear(_Sized(context, hidden), norm, inner, len(inner)), inner, [sizes], context),
        _hidden(context, sizes, error, layer.bias, activation, hidden, len(inner)),
        _folded(linear(context, norm, outer, layer.units), outer, [sizes], context),
    ]
    (r0, r1, d0, d1), inside = _passed(parts)
    rounding = 2 * context.arithmetic.rounding  # of the factor 2, with room
    relative, absolute = 2 * d0 + 2 * rounding * (r0 + d0), 2 * d1 + 2 * rounding * (r1 + d1)
    up = 1 + 2**-30
    return Bound(
        constant, 2 * r1 * up, relative * up, absolute * up, terms=layer.units, inside=inside
    )


def _folded(bound, kernel, factors, context):
    """The `Bound` of a product into whose weights these factors, or 1 / factors, may go."""
    rounded = 16 * context.arithmetic.rounding * context.absolute_norm(kernel)
    lost = _vanishing(kernel, factors, context)
    return dataclasses.replace(bound, relative=bound.relative + 2 * rounded + lost)


def _vanishing(kernel, factors, context):
    """What weights lose that vanish with these factors, or 1 / factors, in them."""
    largest = sum(float(f.max() + (1 / f).max()) for f in factors)
    return context.arithmetic.underflow * kernel.size * largest


def _passed(parts):
    """((r0, r1, d0, d1), inside): behind these parts r <= r0 ||x|| + r1, D <= d0 ||x|| + d1.

    And `Bound.inside` of them all, one after the other.
    """
    r0, r1, d0, d1 = 1.0, 0.0, 0.0, 0.0
    within = [(0.0, 0.0)]
    for part in parts:
        slope, offset = part.inside
        within.append((slope * (r0 + d0), slope * (r1 + d1) + offset))
        d0 = part.constant * d0 + part.relative * (r0 + d0)
        d1 = part.constant * d1 + part.relative * (r1 + d1) + part.absolute
        r0, r1 = part.constant * r0, part.constant * r1 + part.offset
        within.append((r0 + d0, r1 + d1))
    return (r0, r1, d0, d1), tuple(map(max, zip(*within)))


def _hidden(context, sizes, error, bias, activation, shape, terms):
    """`Bound` of a -> R^-1 sigma(R a + b), R diagonal, a sums of `terms` products, of this shape.

    Entry by entry; with beta = (|b| + |sigma(0)|) / R the values are at most |a| + beta. R and
    R^-1 are each off by error / 2 and a few roundings, relatively, as R a is; an error of
    R a + b passes sigma no larger and R^-1 takes its size away. The factor 2 is for second
    orders.

    A compiler may multiply R into what is summed: then each product vanishes by itself in R a, as
    large in a as 1 / R, and b may join the sum. What sigma reads may be larger than a by R: it has
    to stay in the type's range, too.
    """
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise context.refusal("the diagonal that divides its kernel is not finite")
    values = 0.0 if bias is None else np.abs(context.array(bias))
    beta = (values + activation.at_zero) / sizes
    offset = context.offset_norm(beta, shape)
    u = context.arithmetic
    if not (sizes.max() <= u.limit and sizes.min() * u.limit >= 1):
        context.check_program(
            f"the diagonal that divides its kernel reaches from {sizes.min()} to {sizes.max()}"
        )
    relative = 2 * (error + (16 + activation.ulps / 2) * u.rounding)
    underflow = u.underflow * size(shape) * (1 + terms * float((1 / sizes).max()))
    absolute = relative * offset + underflow
    if bias is not None:
        absolute += joining(context, terms) * context.offset_norm(values / sizes, shape)
    if u.program and activation.cancelling:
        lost = context.offset_norm(activation.cancelling / sizes, shape)
        absolute += relative * lost
    read = float(sizes.max()) * (1 + relative), context.offset_norm(values, shape)
    return Bound(activation.constant, offset, relative, absolute, inside=read)


class _Sized:
    """A context whose layer's output has another shape: that of the hidden units."""

    def __init__(self, context, shape):
        self._context = context
        self.output_shape = shape

    def __getattr__(self, name):
        return getattr(self._context, name)


class _Form:
    """W and 1 / T of a layer in float64, W scaled.

    Attributes:
        w: Shape (*spatial, rows, columns).
        inverse: 1 / T as computed, shape (columns,).
        root: Its square root.
        error: |inverse - the exact one| <= error * inverse.
    """

    def __init__(self, layer, context):
        kernel = context.array(layer.kernel)
        log_q = None if layer.log_q is None else context.array(layer.log_q)
        backend.check_compiler()
        with backend.float64_scope(), backend.inference_scope():
            tensors = (
                None if a is None else keras.ops.convert_to_tensor(a, dtype="float64")
                for a in (kernel, log_q)
            )
            form = layer.diagonal_form(*tensors)
            self.w, self.inverse, self.scale = map(keras.ops.convert_to_numpy, form)
        self.columns = self.w.shape[-1]
        self._context, self._bound = context, layer.bound
        if self.w.ndim == 4:
            check_convolution(context)
        if not (np.isfinite(self.inverse).all() and (self.inverse > 0).all()):
            raise context.refusal("the diagonal that divides its kernel is not finite")
        self.root = np.sqrt(self.inverse)
        q = np.ones(self.columns)
        if log_q is not None:
            q = np.exp(np.clip(log_q, -Q_RANGE, Q_RANGE))
        self._q = q
        # |fl(W^T W) - W^T W| <= gamma |W|^T |W|, over all offsets B^T B with B = sum_t |W[t]|.
        magnitudes = np.abs(self.w).reshape(-1, *self.w.shape[-2:]).sum(0)
        self._magnitudes = magnitudes.T @ magnitudes
        offsets = math.prod(2 * k - 1 for k in self.w.shape[:-2])
        terms = math.prod(self.w.shape[:-1]) + offsets * self.columns + 64
        if self._bound == "spectral":
            # The answer is a Schatten norm of W^T W, and no more off than that norm of the error of
            # a product is relative to ||W^T W||_2: gamma ||A||_F ||B||_F is at most gamma n times
            # that, n columns; of the symbol, taps times more, as the largest ||W^(theta)||_F^2 of
            # the grid is at least the mean, sum ||W[t]||_F^2. Each squaring counts half as much as
            # the one before: 4 covers their sum, and second orders.
            *taps, rows, columns = self.w.shape
            sums = context.arithmetic.gamma(2 * (rows + columns) + math.prod(taps) + 24)
            self.error = 4 * math.prod(taps) * columns * sums
        elif self._bound == "orthogonal":
            self.error = 0.0
        else:
            sums = self._magnitudes @ q / q
            u = context.arithmetic
            self.error = float((u.gamma(terms) * sums * self.inverse).max()) + 2**9 * u.unit
        if not self.error < 2.0**-8:
            context.check_program("the diagonal T that it computes is too far off in float32")
            raise context.refusal(
                "the sizes of its columns differ so much that rounding decides what divides them"
            )

    def norm(self, kernel):
        """Bound of ||W T^(-1/2)||, of the exact T."""
        if kernel.ndim == 2:
            norm = self._context.norm(kernel)
        else:
            norm = self._context.convolution_norm(kernel)
            if self._bound in ("aol", "sll"):
                norm = min(norm, self._gershgorin())
        return norm * (1 + self.error) * (1 + 8 * ROUNDING)

    def _gershgorin(self):
        """By circles of the infinite convolution: the square is the largest of sums over T."""
        error = gamma(math.prod(self.w.shape[:-1]) + 8)
        sums = np.abs(self._correlations()).sum(axis=0) + error * self._magnitudes
        terms = gamma(self.columns + 8)
        return float(np.sqrt((self.inverse * (sums @ self._q) / self._q).max() * (1 + 2 * terms)))

    def _correlations(self):
        """W^T W at each offset, shape (offsets, columns, columns)."""
        sizes = self.w.shape[:2]
        products = []
        for d in itertools.product(*(range(1 - k, k) for k in sizes)):
            one, two = (
                self.w[tuple(slice(max(0, s * i), k - max(0, -s * i)) for i, k in zip(d, sizes))]
                for s in (1, -1)
            )
            products.append(one.reshape(-1, self.columns).T @ two.reshape(-1, self.columns))
        return np.stack(products)

    def product(self, kernel, norm, terms, context, factors):
        """`Bound` of a product with W T^(-1/2), or its adjoint, without bias.

        `factors` are those that a compiler may multiply in, or leave behind the sum: `root`, which
        makes up for the products that vanish in front of it, is one.
        """
        bound, u = linear(context, norm, kernel, terms), context.arithmetic
        own = (self.error + 16 * u.rounding) * context.absolute_norm(kernel)
        if u.program:  # what T is off by scales whole columns
            own = self.error * norm + 16 * u.rounding * context.absolute_norm(kernel)
        vanishing = u.underflow * terms * size(context.output_shape) * float(self.root.max())
        return dataclasses.replace(
            bound,
            relative=bound.relative + 2 * own + _vanishing(kernel, factors, context),
            absolute=bound.absolute + vanishing,
        )
