"""The slopes that an activation can have between a point and those near it, proven.

For v known up to `off` and every v' within `reach` of it, the slope of the secant from v to v' is a
mean of phi's. If that rises first and falls then (`Activation.bends`), the secant's, as a function
of v or of v', does the same: it is least at the ends of the intervals, in one of four secants that
are computed. Where phi is convex on all of the interval it grows with v and with v', and where phi
is concave it falls: it is largest at an end, too. Where v lies on the concave side and the interval
reaches across to q < v, no secant is steeper than if phi had its largest slope from the interval's
start to q; likewise on the convex side. On a piece where phi is linear it is phi's slope,
exactly. All else is bounded by the slopes that phi has anywhere.
"""

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.norms.roundoff import UNIT_ROUNDOFF, UP_ERROR, gamma

# More than what a handful of operations on float64 numbers, and an underflow among them, can do.
_OUTWARD = 2.0**-50
_LOST = 2.0**-900


def evaluated(activation, x):
    """phi of a float64 array (samples, neurons), and a bound of each entry's error."""
    # JAX compiles each shape anew: of numbers of samples there are few.
    missing = (1 << (len(x) - 1).bit_length()) - len(x)
    padded = np.pad(x, ((0, missing), (0, 0)))
    with backend.float64_scope():
        tensor = keras.ops.convert_to_tensor(padded, dtype="float64")
        y = keras.ops.convert_to_numpy(activation.function(tensor))
    if y.shape != padded.shape or y.dtype != x.dtype:
        raise ValueError(
            f"An activation answers to entries of shape {padded.shape} with {y.dtype} of shape "
            f"{y.shape}: local bounds need one that acts on each entry of a vector."
        )
    size = activation.constant * np.abs(x) + activation.at_zero
    return y[: len(x)], activation.ulps * UNIT_ROUNDOFF * size * UP_ERROR + _LOST


def pre_activations(chain, x):
    """[(v, off)] of each layer of a `Chain`: W x + b at inputs x, and bounds of its errors.

    Args:
        chain: `Chain` with layers.
        x: Exact inputs, float64 of shape (samples, inputs).

    Returns:
        List of pairs of arrays (samples, outputs).
    """
    found, off = [], np.zeros_like(x)
    for layer in chain.layers:
        magnitudes = np.abs(layer.weight).T
        v = x @ layer.weight.T + layer.bias
        sizes = np.abs(x) @ magnitudes + np.abs(layer.bias)
        # In a matrix that was multiplied, `error` covers every row's.
        rows = layer.error * (np.abs(x) + off).sum(axis=1, keepdims=True)
        off = off @ magnitudes + gamma(x.shape[1] + 4) * sizes + layer.bias_error + rows
        off = off * UP_ERROR + _LOST
        found.append((v, off))
        x = v
        for activation in layer.activations:
            x, rounding = evaluated(activation, x)
            off = activation.constant * off * UP_ERROR + rounding
    return found


def secants(layer, v, off, reach):
    """(low, high): bounds of (phi(v') - phi(v)) / (v' - v) for all v' within `reach` of v.

    Args:
        layer: `AffineLayer` with activations.
        v, off: Arrays (samples, neurons): computed pre-activations, and bounds of their errors.
        reach: Likewise, bounds of |v' - v|.

    Returns:
        Two arrays (samples, neurons).
    """
    least, largest = layer.slopes
    low, high = np.full_like(v, least), np.full_like(v, largest)
    if len(layer.activations) > 1:
        return low, high
    (activation,) = layer.activations
    inner = _interval(v, off)
    start, end = _interval(v, off + reach)
    convex_to, concave_from = activation.bends
    if concave_from <= convex_to:
        values = {}
        for name, point in (("a", inner[0]), ("b", inner[1]), ("start", start), ("end", end)):
            values[name] = (point, *evaluated(activation, point))
        quotients = [
            _quotient(values[p], values[q])
            for p, q in (("start", "a"), ("start", "b"), ("a", "end"), ("b", "end"))
        ]
        low = np.maximum(low, np.min([below for below, _ in quotients], axis=0))
        rising, falling = quotients[3][1], quotients[0][1]
        high = np.where(end <= convex_to, np.minimum(high, rising), high)
        high = np.where(start >= concave_from, np.minimum(high, falling), high)
        for bend, far, near in ((concave_from, start, "a"), (convex_to, end, "b")):
            if np.isfinite(bend):
                steepest = _across(activation, bend, far, values[near], largest)
                high = np.where(steepest < high, steepest, high)
    for first, last, slope in activation.pieces:
        inside = (start >= first) & (end <= last)
        low, high = np.where(inside, slope, low), np.where(inside, slope, high)
    return low, high


def _across(activation, bend, far, near, largest):
    """Upper bound of secants from `near` to `far` and points before, `largest` beyond the bend.

    It is the mean of phi's slope from `near` to the bend and of `largest` from there to `far`,
    which grows with the latter's share; infinite unless the bend lies between the two.
    """
    point, value, off = near
    at_bend, rounding = evaluated(activation, np.full_like(point, bend))
    rise, rest, run = np.abs(value - at_bend), np.abs(far - bend), np.abs(far - point)
    between = (far - bend) * (bend - point) >= 0
    total = rise * (1 + 2 * UNIT_ROUNDOFF) + off + rounding + largest * rest * (1 + _OUTWARD)
    found = total / np.where(run > 0, run, 1.0)
    return np.where(between & (run > 0), found + _OUTWARD * np.abs(found), np.inf)


def _interval(v, reach):
    """[v - reach, v + reach], rounded outward."""
    reach = reach + _OUTWARD * (np.abs(v) + reach)
    return v - reach, v + reach


def _quotient(left, right):
    """Lower and upper bound of a slope between points of known values; infinite where they meet."""
    (p, f, below), (q, g, above) = left, right
    rise, run = g - f, q - p
    off = below + above + 2 * UNIT_ROUNDOFF * np.abs(rise)
    safe = np.where(run > 0, run, 1.0)
    low, high = (rise - off) / safe, (rise + off) / safe
    low, high = low - _OUTWARD * np.abs(low) - _LOST, high + _OUTWARD * np.abs(high) + _LOST
    return np.where(run > 0, low, -np.inf), np.where(run > 0, high, np.inf)
