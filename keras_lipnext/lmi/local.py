"""Lipschitz constants around an input: from the slopes that can occur in the ball around it.

Let x be an input, x' any other with t = ||x' - x|| <= r, and v_i = W_i d_{i-1}, d_i the differences
of the pre-activations and of what the activations make of them, d_0 = x' - x. Say that a matrix
C >= 0 covers a difference v if v v^T <= t^2 C, that is |c^T v| <= t sqrt(c^T C c) for every c.

Theorem. C_1 = W_1 W_1^T covers v_1. Let C cover v, so that |v_k| <= r sqrt(C_kk). Let d_k = s_k v_k
with s_k in [m_k - h_k, m_k + h_k], M and H the diagonal matrices of the m_k and h_k, and u the
neurons with h_k > 0. If a diagonal U and a symmetric Q make

    [ Q - M C M - H U H    M C_:u   ]
    [ C_u: M               U - C_uu ]  >= 0,   the last block > 0,

then Q covers d, and W Q W^T covers W d. So |y_i - y_j| <= t sqrt((e_i - e_j)^T C_l (e_i - e_j)).

Proof. Write d = M v + H w with |w_k| <= |v_k|. Let C > 0 (add a small multiple of I, and let it go
to 0) and U > C_uu: then U > 0, and w^T U^-1 w <= v_u^T U^-1 v_u over the neurons in u, so that

    v^T N^-1 v + w^T U^-1 w <= v^T C^-1 v <= t^2,   N^-1 = C^-1 - U^-1 (in u) > 0,

where N = C + C_:u (U - C_uu)^-1 C_u: (Woodbury). By the inequality of Cauchy and Schwarz
(c^T d)^2 <= t^2 c^T (M N M + H U H) c, and the Schur complement says Q >= M N M + H U H.  []

It is the theorem of `_verified` in other terms, U = 1 / (2 h^2 Lambda), Q = P^-1, for intervals of
each neuron's own; inverses are not needed, so that what is rounded can be covered by adding to C.
What the differences start from is x itself: s_k is the slope of a secant at the known
pre-activation (`_secants`), which moves less than the slopes do in the ball. A ReLU that stays
inactive is dropped, and one that stays active is linear.

U is chosen in closed form, U = s_D D (1 + |m| / h) with s_D = ||D^{-1/2} C_uu D^{-1/2}|| and D_kk^2
= C_kk / ||column k of W_{i+1}||^2, as in `eclipse`; for m = h = 1/2 and D = I that is ECLipsE-Fast.

A constant of the ball of radius r certifies min(r, margin / constant): the search looks for the r
at which both are the same.

Reference: local bounds by slopes within a region: Xu, Sivaranjani 2025, arXiv 2510.05261
(ECLipsE-Gen-Local), of which we know the abstract and summaries. Secants from the centre, the
theorem in this form, its proof in floating point and the search are ours.
"""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_lipnext.lipschitz.bounds import Method
from keras_lipnext.lmi._affine import Chain
from keras_lipnext.lmi._chain import read_chain
from keras_lipnext.lmi._secants import pre_activations, secants
from keras_lipnext.lmi._verified import is_positive, pair_norms, scaling
from keras_lipnext.lmi.eclipse import eclipse_diagonal
from keras_lipnext.lmi.result import ScaledChain
from keras_lipnext.norms.matrices import gram_error
from keras_lipnext.norms.roundoff import UNIT_ROUNDOFF, UP_ERROR

# How much of its diagonal is added to the best Q, in turn until the proof goes through.
_SLACKS = (2.0**-34, 2.0**-26, 2.0**-18)
# Radii tried for a sample, at most, and how close to the best one ends the search.
_ROUNDS, _CLOSE = 10, 1.02
# What covers a difference that is 0, in scaled units: products of it stay clear of underflow.
_LEAST = 2.0**-400
# Entries of the matrices that are held at once.
_ENTRIES = 2**24


def _certifying(function):
    """Decorator: `certify(..., lipschitz=function)` takes it, with constants of all inputs, too."""
    title = "ECLipsE-Diagonal, and for each sample constants of the ball around it"
    everywhere = eclipse_diagonal.certifying.function
    function.certifying = Method(
        function.__name__, title, everywhere, lambda model: _LocalBounds.of(model).radii
    )
    return function


@_certifying
def local_lipschitz(model: keras.Model, x: Any, radius: Any) -> np.ndarray:
    """Bounds, of each input's ball, of how fast the differences of two outputs can change in it.

    For every x' with ||x' - x|| <= radius, the difference z_i - z_j of two outputs changes by at
    most the answer's [sample, i, j] times ||x' - x||: proven in float64, whatever is rounded.
    `certify(..., lipschitz="local_lipschitz")` seeks for each sample the ball that certifies most.
    keras_lipnext/lmi/local.py has the theorem.

    Example:

    ```python
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)]
    )
    keras_lipnext.lmi.local_lipschitz(network, np.ones((2, 4)), radius=0.1)  # shape (2, 3, 3)
    ```

    Args:
        model: As for `eclipse_fast`. The slopes of activations with one bend, or an S, are bounded
            locally; those of others (gelu, silu, ...) and of several in a row as everywhere.
        x: Inputs, shape (samples, ...), exact as float64.
        radius: Float or array (samples,), in units of the inputs.

    Returns:
        Float64 array (samples, outputs, outputs), rounded up, infinite where nothing was proven.

    Raises:
        ValueError: naming the layer, if the model is no such chain; for inputs of another size.
    """
    local = _LocalBounds.of(model)
    x = local.flat(x)
    radii = np.asarray(radius)
    if radii.dtype.kind not in "fiu" or not ((radii >= 0) & (radii < np.inf)).all():
        raise ValueError(f"`radius` must be finite and not negative. Received: radius={radius!r}")
    radii = np.broadcast_to(radii.astype("float64"), len(x))
    centres = pre_activations(local.chain, x)
    found = [_pairs(c) for c in local.covers(centres, radii)]
    return np.ldexp(np.reshape(found, (len(x), *local.pairs_shape)), local.scaled.units[-1])


@dataclasses.dataclass(frozen=True)
class _LocalBounds:
    """A model's chain, its scaled weights, and what covers its first pre-activations."""

    chain: Chain
    scaled: ScaledChain
    first: np.ndarray

    @classmethod
    def of(cls, model):
        chain = read_chain(model, "logits")
        scaled = ScaledChain.of(chain)
        return cls(chain, scaled, _image(scaled.weights[0], scaled.errors[0]))

    @property
    def pairs_shape(self):
        return (len(self.scaled.weights[-1]),) * 2

    def flat(self, x):
        """Inputs as vectors; ValueError if they are no such ones."""
        x = np.asarray(x, "float64")
        inputs = self.chain.weights[0].shape[1]
        if x.ndim < 2 or x[0].size != inputs:
            raise ValueError(
                f"Model '{self.chain.model}' takes {inputs} numbers a sample. Received: x of shape "
                f"{x.shape}"
            )
        return x.reshape(len(x), inputs)

    def covers(self, centres, radii):
        """What covers the outputs' differences in each sample's ball, in scaled units.

        Args:
            centres: As of `pre_activations`.
            radii: Shape (samples,).

        Returns:
            List of matrices; of infinite ones where nothing was proven.
        """
        side = max(map(len, self.scaled.weights))
        size = max(1, _ENTRIES // side**2)
        found = []
        for start in range(0, len(radii), size):
            part = slice(start, start + size)
            found += self._covers([(v[part], off[part]) for v, off in centres], radii[part])
        return found

    def _covers(self, centres, radii):
        covers = [self.first] * len(radii)
        weights, errors = self.scaled.weights[1:], self.scaled.errors[1:]
        for layer, (v, off), unit, w, error in zip(
            self.chain.layers, centres, self.scaled.units, weights, errors
        ):
            with np.errstate(all="ignore"):
                roots = np.sqrt([np.diagonal(c) for c in covers]) * UP_ERROR
                reach = np.ldexp(radii[:, None] * roots, unit) * UP_ERROR
                intervals = zip(covers, *secants(layer, v, off, reach))
                covers = [_through(*each, w, error) for each in intervals]
        return covers

    def radii(self, inputs, logits, allowances, predictions, radii, rates=0.0):
        """Radii that are no smaller than those given, and certified in balls.

        Args:
            inputs: Exact, shape (samples, ...).
            logits, allowances: z_k as computed, and E_ij of the predicted class i: (samples,
                classes).
            predictions: Shape (samples,).
            radii: Certified ones, shape (samples,); where they are 0 they stay so.
            rates: What to add to the constants of z_i - z_j, as for a program whose rounding grows
                with the distance: broadcast to (classes, classes).
        """
        best, x = radii.copy(), self.flat(inputs)
        rows = np.flatnonzero((radii > 0) & np.isfinite(x).all(axis=1))
        if not len(rows):
            return best
        classes, allowances, logits = predictions[rows], allowances[rows], logits[rows]
        centres = pre_activations(self.chain, x[rows])
        _check_same(self.chain, centres[-1], logits, allowances, classes)
        margins = logits[np.arange(len(rows)), classes][:, None] - logits - allowances
        rates = np.broadcast_to(rates, self.pairs_shape)[classes]
        tried, going = best[rows], np.arange(len(rows))
        low, high = tried.copy(), np.full(len(rows), np.inf)
        for _ in range(_ROUNDS):
            covers = self.covers([(v[going], off[going]) for v, off in centres], tried[going])
            limits = [
                _certified(c, self.scaled.units[-1], i, m, r)
                for c, i, m, r in zip(covers, classes[going], margins[going], rates[going])
            ]
            tried[going], low[going], high[going] = _narrowed(
                tried[going], np.array(limits), low[going], high[going]
            )
            going = going[high[going] > _CLOSE * low[going]]
            if not len(going):
                break
        best[rows] = low
        return best


def _narrowed(tried, limits, low, high):
    """(radii to try next, low, high), when a ball of radius `tried` certifies up to `limits`.

    `low` is certified. The limit falls as the ball grows, so that the best radius is between any
    ball and its limit, below `high`.
    """
    low = np.maximum(low, _within(tried, limits))
    high = np.minimum(high, np.maximum(tried, limits))
    following = np.sqrt(tried) * np.sqrt(limits)
    inside = (following > low) & (following < high)
    following = np.where(inside, following, np.sqrt(low) * np.sqrt(high))
    return np.minimum(following, 2 * low), low, high


def _within(radii, limits):
    """What balls of these radii certify: their constants say nothing of what is outside."""
    return np.minimum(radii, limits)


def _pairs(cover):
    """Constants of the differences of two outputs; infinite where nothing was proven."""
    if not np.isfinite(cover).all():
        return np.where(np.eye(len(cover)), 0.0, np.inf)
    return pair_norms(cover)


def _certified(cover, unit, own, margins, rates):
    """min_j margin / (constant + rate) over other classes j, rounded down; 0 if there is none."""
    with np.errstate(all="ignore"):
        constants = np.ldexp(_pairs(cover)[own], unit) + rates
        limits = np.where(constants > 0, margins / constants, 0.0) * (1 - 8 * UNIT_ROUNDOFF)
    limits[own] = np.inf
    limit = limits.min()
    return limit if 0 < limit < np.inf else 0.0


def _check_same(chain, last, logits, allowances, classes):
    """ValueError unless the chain's outputs have the margins of the logits, but for rounding."""
    (own, off), rows = last, np.arange(len(classes))
    apart = (own[rows, classes] - logits[rows, classes])[:, None] - (own - logits)
    sizes = np.abs(own) + np.abs(own[rows, classes])[:, None]
    allowed = allowances + off + off[rows, classes][:, None] + 16 * UNIT_ROUNDOFF * sizes
    if not (np.abs(apart) <= allowed).all():
        raise ValueError(
            f"Model '{chain.model}' does not compute what the chain read from it does: a layer "
            "does something that its configuration does not show. Build and load the model anew; "
            "if that does not help, report it."
        )


def _through(c, low, high, w, error):
    """What covers W d, from what covers v and the intervals of d_k / v_k; infinite if unproven."""
    m = (low + high) / 2
    h = np.where(low == high, 0.0, np.maximum(high - m, m - low) * (1 + 4 * UNIT_ROUNDOFF))
    h = np.where(h > 0, np.maximum(h, 2.0**-100), h)
    alive = np.flatnonzero((m != 0) | (h != 0))
    w, m, h = w[:, alive], m[alive], h[alive]
    q = _activated(c[np.ix_(alive, alive)], m, h, (w**2).sum(axis=0))
    return np.full((len(w),) * 2, np.inf) if q is None else _image(w, error, q)


def _activated(c, m, h, outer):
    """A matrix Q of the theorem, proven; None if there is none.

    Args:
        c: What covers v, of the neurons that are not dead.
        m, h: Vectors.
        outer: How much of each neuron the next layer sees. It proves nothing.
    """
    if not len(c):
        return c
    loose = np.flatnonzero(h)
    inner = c[np.ix_(loose, loose)]
    coupling = c[loose] * m
    u = _multipliers(inner, np.abs(m[loose]) / h[loose], outer[loose])
    if u is None:
        return None
    straight = m[:, None] * c * m
    spread = h[loose] ** 2 * u
    bottom = np.diag(u) - inner
    try:
        q = coupling.T @ np.linalg.solve(bottom, coupling)
    except np.linalg.LinAlgError:
        return None
    q = (q + q.T) / 2 + (straight + straight.T) / 2
    q[loose, loose] += spread
    diagonal = np.diagonal(q).copy()
    for slack in _SLACKS:
        np.fill_diagonal(q, diagonal * (1 + slack))
        if _holds(q, straight, loose, spread, coupling, bottom, inner):
            return q
    return None


def _multipliers(inner, ratios, outer):
    """U in closed form. None if it is not to be had; it proves nothing."""
    if not len(inner):
        return np.zeros(0)
    largest = outer.max()
    outer = np.maximum(outer, 1e-6 * largest) if largest > 0 else np.ones_like(outer)
    d = np.sqrt(np.diagonal(inner) / outer)
    if not (np.isfinite(d).all() and d.min() > 0):
        return None
    try:
        top = np.linalg.eigvalsh(inner / np.sqrt(np.outer(d, d)))[-1]
    except np.linalg.LinAlgError:
        return None
    return top * d * (1 + np.clip(ratios, 2.0**-20, 2.0**30))


def _holds(q, straight, loose, spread, coupling, bottom, inner):
    """Whether the theorem's inequality holds, of the numbers as they are."""
    top = q - straight
    top[loose, loose] -= spread
    matrix = np.block([[top, coupling.T], [coupling, bottom]])
    scale = scaling(matrix)
    if scale is None:
        return False
    # Three roundings or fewer lead to each product, one to each sum: below 8 u of all its terms.
    terms = np.abs(q) + np.abs(straight)
    terms[loose, loose] += spread
    sizes = np.block([[terms, np.abs(coupling.T)], [np.abs(coupling), np.abs(bottom)]])
    sizes[len(q) :, len(q) :] += 2 * np.abs(inner)
    sizes = np.ldexp(sizes, scale[:, None] + scale)
    return is_positive(matrix, scale, 8 * UNIT_ROUNDOFF * np.sqrt(np.vdot(sizes, sizes)))


def _image(w, error, q=None):
    """A symmetric matrix above W Q W^T for every exact W within `error` of w; Q = I if None."""
    magnitudes = np.abs(w)
    if q is None:
        c, sums = w @ w.T, magnitudes.sum(axis=0)
        norm = 1.0
    else:
        c, sums = w @ q @ w.T, np.abs(q) @ magnitudes.sum(axis=0)
        norm = float(np.trace(q))
    # |computed - exact| <= gamma |W| |Q| |W|^T, entry by entry, of two sums, one after the other.
    # The 2-norm of the right-hand side is at most its largest row sum.
    off = gram_error(sum(w.shape) + w.shape[1] + 8, (magnitudes @ sums).max(initial=0.0))
    if error:
        off += (2 * np.linalg.norm(w) + error) * error * norm
    c = (c + c.T) / 2
    c[np.diag_indices(len(c))] += max(off * UP_ERROR, _LEAST)
    return c
