"""The loop transformation of a Dense network, and its convex admissibility condition.

An activation phi of slope in [a, b] is

    phi(v) = (b - a) / 2 psi(v) + (a + b) / 2 v

with a psi of slope in [-1, 1], entry by entry: |psi_j(v) - psi_j(v')| <= |v_j - v_j'|. With this,
h_i = alpha_i v_i + beta_i psi_i(v_i), alpha = (a + b) / 2, beta = (b - a) / 2, and the network is

    v = E x + F w + c,   w = psi(v),   y = C x + D w + d,

where v stacks the layers' v_i, and F is strictly lower block triangular: v_1 = W_1 x + b_1 and

    v_{i+1} = W_{i+1} (alpha_i v_i + beta_i w_i) + b_{i+1}

give row block i+1 of (E, F, c) from row block i. y is its last row block.

Two inputs that differ by dx have |dw_j| <= |dv_j|. So dw^T Lambda dw <= dv^T Lambda dv for every
diagonal Lambda >= 0, and the network is L-Lipschitz if for one of them

    diag(L^2 I, Lambda) - [C D]^T [C D] - [E F]^T Lambda [E F]  >=  0.                        (1)

By Schur complements that is, for Lambda > 0,

    [ L^2 I      0          C^T     (Lambda E)^T ]
    [ 0          Lambda     D^T     (Lambda F)^T ]
    [ C          D          I       0            ]   >=  0,                                   (2)
    [ Lambda E   Lambda F   0       Lambda       ]

linear in (L^2, Lambda, C, D, Lambda E, Lambda F): the admissible ones form a convex set.

Reference: Abdeen, Kekatos, Jin 2025, arXiv 2506.23977. The derivation is ours.
"""

import dataclasses

import keras
import numpy as np
import numpy.typing as npt

from keras_lipnext import backend
from keras_lipnext.lmi._chain import read_chain


@dataclasses.dataclass(frozen=True)
class TransformedNetwork:
    """A network after the loop transformation, in NumPy float64; see the module's text.

    Attributes:
        E, F, c, C, D, d: Arrays of shapes (n, m), (n, n), (n,), (k, m), (k, n), (k,) for m inputs,
            n hidden units and k outputs.
        psi: List of functions from arrays (batch, units) to such, one a hidden layer.
        sizes: Units of the hidden layers.
    """

    E: np.ndarray
    F: np.ndarray
    c: np.ndarray
    C: np.ndarray
    D: np.ndarray
    d: np.ndarray
    psi: list
    sizes: tuple

    def __call__(self, x: npt.ArrayLike) -> np.ndarray:
        """Outputs, shape (batch, k), for inputs of shape (batch, m): flattened, as stored."""
        x = np.asarray(x, "float64")
        w = np.zeros((len(x), len(self.c)))
        start = 0
        for psi, size in zip(self.psi, self.sizes):
            rows = slice(start, start + size)
            v = x @ self.E[rows].T + w @ self.F[rows].T + self.c[rows]
            w[:, rows] = psi(v)
            start += size
        return x @ self.C.T + w @ self.D.T + self.d

    def quadratic_form(self, lipschitz: float, multipliers: npt.ArrayLike) -> np.ndarray:
        """The left-hand side of (1), shape (m + n, m + n), for `multipliers` of shape (n,)."""
        multipliers = np.asarray(multipliers, "float64")
        outputs, states = np.hstack([self.C, self.D]), np.hstack([self.E, self.F])
        diagonal = np.concatenate([np.full(self.E.shape[1], lipschitz**2), multipliers])
        form = -(states.T * multipliers) @ states
        return np.diag(diagonal) - outputs.T @ outputs + form

    def convex_form(self, lipschitz: float, multipliers: npt.ArrayLike) -> np.ndarray:
        """The matrix of (2): positive semidefinite iff (1) is, for positive multipliers."""
        multipliers = np.asarray(multipliers, "float64")
        states = multipliers[:, None] * np.hstack([self.E, self.F])
        return convex_form(lipschitz**2, multipliers, np.hstack([self.C, self.D]), states)


def convex_form(square, multipliers, outputs, states):
    """The matrix of (2), linear in all arguments.

    Args:
        square: L^2.
        multipliers: Diagonal of Lambda, shape (n,).
        outputs: [C D], shape (k, m + n).
        states: [Lambda E, Lambda F], shape (n, m + n).

    Returns:
        Array of shape (m + k + 2 n,) * 2.
    """
    k, n = len(outputs), len(multipliers)
    m = outputs.shape[1] - n
    below = np.vstack([outputs, states])
    first = np.diag(np.concatenate([np.full(m, square), multipliers]))
    second = np.diag(np.concatenate([np.ones(k), multipliers]))
    return np.block([[first, below.T], [below, second]])


def loop_transformation(model: keras.Model) -> TransformedNetwork:
    """The network's loop transformation.

    Example:

    ```python
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)]
    )
    transformed = keras_lipnext.lmi.loop_transformation(network)
    transformed(np.ones((2, 4)))  # what the network answers, to rounding
    form = transformed.quadratic_form(lipschitz=100.0, multipliers=np.ones(8))
    np.linalg.eigvalsh(form).min()  # at least 0: it is 100-Lipschitz
    ```

    Args:
        model: Built functional or Sequential model, a chain of affine layers (Dense, small
            convolutions) and activations of bounded slope.

    Returns:
        `TransformedNetwork`.

    Raises:
        ValueError: naming the layer, if one does not fit.
    """
    first, *others = read_chain(model).layers
    sizes = [len(first.bias), *(len(layer.bias) for layer in others)]
    total, inputs = sum(sizes), first.weight.shape[1]
    # The last row block is that of y; the columns of w beyond the hidden units stay zero.
    E, F, c = np.zeros((total, inputs)), np.zeros((total, total)), np.zeros(total)
    E[: sizes[0]], c[: sizes[0]] = first.weight, first.bias
    start, psi, before = 0, [], first
    for layer in others:
        middle = start + len(before.bias)
        now, following = slice(start, middle), slice(middle, middle + len(layer.bias))
        a, b = before.slopes
        alpha, beta = (a + b) / 2, (b - a) / 2
        E[following] = alpha * layer.weight @ E[now]
        F[following] = alpha * layer.weight @ F[now]
        F[following, now] += beta * layer.weight
        c[following] = alpha * layer.weight @ c[now] + layer.bias
        psi.append(_psi(before.activations, alpha, beta))
        start, before = middle, layer
    hidden, outputs = slice(start), slice(start, total)
    states, answers = (E[hidden], F[hidden, hidden], c[hidden]), (E[outputs], F[outputs, hidden])
    return TransformedNetwork(*states, *answers, c[outputs], psi, tuple(sizes[:-1]))


def _psi(activations, alpha, beta):
    def psi(v):
        with backend.float64_scope(), backend.inference_scope():
            phi = keras.ops.convert_to_tensor(v, dtype="float64")
            for activation in activations:
                phi = activation.function(phi)
            return (keras.ops.convert_to_numpy(phi) - alpha * v) / beta

    return psi
