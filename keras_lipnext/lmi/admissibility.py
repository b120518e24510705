"""The admissibility condition layer by layer, seen through random subspaces.

The theorem, its proof and its convention are those at the top of `_verified.py`: diagonal Lambda_i
>= 0 and symmetric P_i with T_i >= 0 for all i make a network sqrt(rho)-Lipschitz. Here rho = L^2 is
given, and the last P is the least that T_l >= 0 allows, W_l^T W_l / L^2. Multiplied by L^2, with
storages X_i = L^2 P_i, X_0 = L^2 I, X_{l-1} = W_l^T W_l, the conditions of the hidden layers are

                    [ X_{i-1} + a b W_i^T D_i W_i    -(a + b)/2 W_i^T D_i ]
    M_i = L^2 T_i = [                                                     ]  >=  0,             (1)
                    [ -(a + b)/2 D_i W_i             D_i - X_i            ]

D_i = 2 L^2 Lambda_i. (1) has the D_i alone: they are what is trained and saved, as logarithms, and
`Admissibility.multiplier_values` is the one way back to the Lambda_i.

Added up, the X_i between layers cancel: the M_i, each in its place, sum to L^2 times the block
tridiagonal matrix of LipSDP. In the other direction nothing is lost if the X_i may be any symmetric
matrices (a block tridiagonal matrix is positive semidefinite iff it is such a sum [Agler et al.
1988]). Here X_i is a positive diagonal plus a matrix of low rank, X_i = R_i^{1/2} (I + V_i V_i^T)
R_i^{1/2}, so that no matrix beside the weights is large; the last one, W_l^T W_l, is exact: with
one hidden layer (1) is LipSDP's condition itself. Without a hidden layer the only block is L^2 I -
W^T W. Where the slope is in [0, b], M_i is linear in (X_{i-1}, X_i, D_i, D_i W_i): a convex
condition.

Scaled by the square root of diag(R_{i-1}, D_i) from both sides, which keeps definiteness,
M_i has a diagonal near one and is of norm near one, whatever the units.

A sketch is S^T M_i S for a tall S with orthonormal columns. It needs W_i S and W_i^T S only: its
cost grows with the width of S beyond one reading of the weights, and no n x n matrix beside them is
formed. It is a necessary condition, no more: M_i may be negative where S does not look.
A random S of few columns looks nearly nowhere: all eigenvalues of S^T M_i S lie near the mean of
those of M_i. So `order` > 0 takes the span of S, M_i S, .., M_i^order S instead, with half of S
kept from the last step, and of it the lowest Ritz vectors: a restarted block Lanczos method, whose
Ritz values follow the lowest eigenvalues of M_i in training. `order` = 0 is the plain random sketch
of the paper.

Reference: Abdeen, Kekatos, Jin 2025, arXiv 2506.23977, for layerwise sketches. The derivation, the
storages and the Krylov sketch are ours. LipSDP: Fazlyab et al. 2019, arXiv 1906.04893.
"""

import itertools

import keras
import numpy as np
from keras import ops

# Multipliers are stored as logarithms divided by this: Adam moves them so much faster than weights.
GAIN = 5.0
ROOM = 1.05


class Admissibility(keras.layers.Layer):
    """Multipliers of a chain's blocks, and the penalty of their sketches. See the module's text.

    Its weights: for each hidden layer the logarithms of D_i's diagonal, and for those but the last
    the logarithms of R_i's over D_i's and the factor V_i; for each block the part of the
    subspace that is kept; and the state of the random numbers.

    Args:
        chain: `DenseChain`.
        lipschitz: Positive float, the L above.
        sketch: Columns k of a sketch, or None for the whole blocks.
        order: Order of the Krylov spaces.
        rank: Columns of V_i.
        margin: Eigenvalues below it are penalised.
        seed: Integer.
    """

    def __init__(self, chain, lipschitz, sketch, order, rank, margin, seed):
        super().__init__(name="admissibility", dtype="float32")
        self.chain = chain
        self.lipschitz = lipschitz / chain.scale
        self.sketch = sketch
        self.order = order
        self.margin = margin
        self.generator = keras.random.SeedGenerator(seed)
        random = np.random.default_rng(seed)
        self.multipliers, self.ratios, self.factors, self.kept = [], [], [], []
        storages = _initial_storages(chain, self.lipschitz)
        for i, ((a, b), storage) in enumerate(zip(chain.slopes, storages)):
            n = chain.layers[i].kernel.shape[1]
            # With this factor between R_i and D_i (1) is X_{i-1} >= steepest^2 W^T X_i W, for
            # diagonal storages the best there is; somewhat more leaves room for V_i.
            ratio = ROOM * 2 * max(-a, b) / (b - a)
            self.multipliers.append(
                self._logarithms(n, np.log(ratio * storage), f"log_multiplier_{i}")
            )
            if i + 1 < len(chain.slopes):
                self.ratios.append(self._logarithms(n, -np.log(ratio), f"log_ratio_{i}"))
                start = random.normal(size=(n, rank)) * (0.1 / np.sqrt(n))
                self.factors.append(self._weight(start, f"factor_{i}"))
        for i, size in enumerate(self.block_sizes()):
            keep = sketch // 2 if sketch and order and sketch < size else 0
            start = np.linalg.qr(random.normal(size=(size, keep)))[0] if keep else np.zeros((0, 0))
            self.kept.append(self._weight(start, f"kept_{i}", trainable=False) if keep else None)
        self.built = True

    def _logarithms(self, n, value, name):
        return self._weight(np.full(n, value / GAIN), name)

    def _weight(self, value, name, trainable=True):
        variable = self.add_weight(
            shape=value.shape, initializer="zeros", name=name, trainable=trainable
        )
        variable.assign(value.astype("float32"))
        return variable

    def multiplier_values(self):
        """Diagonals of Lambda_i = D_i / (2 L^2), in NumPy float64."""
        values = [np.asarray(ops.convert_to_numpy(v), "float64") for v in self.multipliers]
        return [np.exp(GAIN * v) / (2 * self.lipschitz**2) for v in values]

    def block_sizes(self):
        """Sides of the M_i."""
        sizes = [layer.kernel.shape[0] for layer in self.chain.layers]
        return [m + n for m, n in itertools.pairwise(sizes)] or sizes

    def blocks(self):
        """The scaled M_i at the current weights and multipliers, as operators."""
        kernels = [ops.cast(ops.convert_to_tensor(x.kernel), "float32") for x in self.chain.layers]
        if not self.chain.slopes:
            return [OutputBlock(kernels[0] / self.lipschitz)]
        found, storage, factor = [], ops.full((kernels[0].shape[0],), self.lipschitz**2), None
        for i, slopes in enumerate(self.chain.slopes):
            multiplier = ops.exp(GAIN * ops.convert_to_tensor(self.multipliers[i]))
            if i < len(self.factors):
                ratio = ops.exp(GAIN * ops.convert_to_tensor(self.ratios[i]))
                after = ops.convert_to_tensor(self.factors[i])
                below = ops.sqrt(ratio)[:, None] * after
            else:
                ratio, after = ops.zeros_like(multiplier), None
                below = kernels[-1] / ops.sqrt(multiplier)[:, None]
            left, right = 1 / ops.sqrt(storage), ops.sqrt(multiplier)
            found.append(HiddenBlock(kernels[i], slopes, left, right, factor, ratio, below))
            storage, factor = multiplier * ratio, after
        return found

    def penalty(self):
        """Sum over blocks and eigenvalues of max(0, margin - eigenvalue)^2, of the sketches.

        Draws new sketches, and keeps part of the subspaces for the next call. Its gradient
        regards the subspaces as constant: that of the sketch's eigenvalues.
        """
        total = 0.0
        for block, size, kept in zip(self.blocks(), self.block_sizes(), self.kept):
            vectors = self._subspace(block.constant(), size, kept)
            values = block.values(ops.stop_gradient(vectors))
            total = total + ops.sum(ops.square(ops.relu(self.margin - values)))
        return total

    def _subspace(self, block, size, kept):
        """Ritz vectors, shape (size, k), the lowest first."""
        if not self.sketch or self.sketch >= size:
            basis = ops.eye(size)
            return _ritz(basis, block(basis))
        columns = self.sketch - (0 if kept is None else kept.shape[1])
        new = keras.random.normal((size, columns), seed=self.generator)
        start = new if kept is None else ops.concatenate([ops.convert_to_tensor(kept), new], axis=1)
        spaces = [ops.qr(start)[0]]
        for _ in range(self.order):
            spaces.append(block(spaces[-1]))
        basis = spaces[0] if self.order == 0 else ops.qr(ops.concatenate(spaces, axis=1))[0]
        vectors = _ritz(basis, block(basis))[:, : self.sketch]
        if kept is not None:
            kept.assign(vectors[:, : kept.shape[1]])
        return vectors


def _ritz(basis, product):
    small = ops.matmul(ops.transpose(basis), product)
    small = (small + ops.transpose(small)) / 2
    # Where training diverged, some backends' eigh raise: the answer is NaN, and so is the loss.
    finite = ops.all(ops.isfinite(small))
    vectors = ops.eigh(ops.where(finite, small, ops.zeros_like(small)))[1]
    return ops.where(finite, ops.matmul(basis, vectors), float("nan"))


class OutputBlock:
    """I - W^T W / L^2, for a network without hidden layers. `kernel` is W^T / L."""

    def __init__(self, kernel):
        self.kernel = kernel

    def constant(self):
        return OutputBlock(ops.stop_gradient(self.kernel))

    def __call__(self, s):
        return s - ops.matmul(self.kernel, ops.matmul(ops.transpose(self.kernel), s))

    def values(self, s):
        """s_j^T M s_j for the columns of s, shape (k,)."""
        return _squares(s) - _squares(ops.matmul(ops.transpose(self.kernel), s))


class HiddenBlock:
    """The scaled M_i as an operator on columns (m + n, k), with k columns at a time.

    With W~ = right W left, the scaled weights, it is

        [ I + V V^T + a b W~^T W~     -(a + b)/2 W~^T         ]
        [ -(a + b)/2 W~               I - diag(ratio) - B B^T ].

    Args:
        kernel: W^T, shape (m, n).
        slopes: (a, b).
        left: R_{i-1}^{-1/2}, shape (m,).
        right: D_i^{1/2}, shape (n,).
        factor: V, shape (m, r), or None.
        ratio: R_i over D_i, shape (n,).
        below: B, shape (n, r'): what else X_i has, scaled.
    """

    def __init__(self, kernel, slopes, left, right, factor, ratio, below):
        self.kernel, self.slopes, self.left, self.right = kernel, slopes, left, right
        self.factor, self.ratio, self.below = factor, ratio, below

    def constant(self):
        """The block with no gradient through it."""
        parts = (self.kernel, self.left, self.right, self.factor, self.ratio, self.below)
        kernel, *rest = (None if p is None else ops.stop_gradient(p) for p in parts)
        return HiddenBlock(kernel, self.slopes, *rest)

    def _parts(self, s):
        """The two parts of the columns, and W~ times the first."""
        m = self.kernel.shape[0]
        first, second = s[:m], s[m:]
        image = ops.matmul(ops.transpose(self.kernel), self.left[:, None] * first)
        return first, second, self.right[:, None] * image

    def __call__(self, s):
        first, second, image = self._parts(s)
        (a, b), right = self.slopes, self.right[:, None]
        back = right * (a * b * image - (a + b) / 2 * second)
        top = first + self.left[:, None] * ops.matmul(self.kernel, back)
        if self.factor is not None:
            top = top + ops.matmul(self.factor, ops.matmul(ops.transpose(self.factor), first))
        low = ops.matmul(self.below, ops.matmul(ops.transpose(self.below), second))
        bottom = (1 - self.ratio)[:, None] * second - (a + b) / 2 * image - low
        return ops.concatenate([top, bottom], axis=0)

    def values(self, s):
        """s_j^T M s_j for the columns of s, shape (k,)."""
        first, second, image = self._parts(s)
        a, b = self.slopes
        values = _squares(first) + a * b * _squares(image)
        values = values - (a + b) * ops.sum(image * second, axis=0)
        values = values + ops.sum((1 - self.ratio)[:, None] * ops.square(second), axis=0)
        if self.factor is not None:
            values = values + _squares(ops.matmul(ops.transpose(self.factor), first))
        return values - _squares(ops.matmul(ops.transpose(self.below), second))


def _squares(columns):
    return ops.sum(ops.square(columns), axis=0)


def _initial_storages(chain, lipschitz):
    """r_i of R_i = r_i I for the hidden layers: every block is violated, or satisfied, alike."""
    steepest = [max(-a, b) for a, b in chain.slopes] + [1.0]
    norms = [s * _norm(layer.kernel) for s, layer in zip(steepest, chain.layers)]
    excess = (np.prod(norms) / lipschitz) ** (2 / len(norms))
    return lipschitz**2 * np.cumprod([excess / n**2 for n in norms[:-1]])


def _norm(kernel):
    """Rough estimate of a spectral norm; 1 for a kernel of zeros."""
    kernel = np.asarray(ops.convert_to_numpy(kernel)).astype("float64")
    x = np.random.default_rng(0).normal(size=kernel.shape[1])
    for _ in range(10):
        x = kernel.T @ (kernel @ x)
        size = np.linalg.norm(x)
        if not size > 0:
            return 1.0
        x /= size
    return float(np.linalg.norm(kernel @ x))
