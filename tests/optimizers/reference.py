"""The manifold optimizers in NumPy float64, straight from the formulas."""

import numpy as np


def polar(x):
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def skew(a):
    return (a - a.T) / 2


def tangent(x, u):
    """Tangent projection; the orthogonal group's, too: X skew(X^T U)."""
    if x.shape[0] < x.shape[1]:
        return tangent(x.T, u.T).T
    a = x.T @ u
    return u - x @ (a + a.T) / 2


def rotation(d):
    """I + D + D^2/2 + c D^3 + c^2 D^4, of D halved until c^4 D^8 is negligible."""
    c = (1 - np.sqrt(0.5)) / 2
    halvings = 0
    while c**4 * np.linalg.norm(d / 2**halvings, 2) ** 8 > 1e-18:
        halvings += 1
    h = d / 2**halvings
    p = np.eye(len(d)) + h + h @ h / 2 + c * h @ h @ h + c**2 * h @ h @ h @ h
    return np.linalg.matrix_power(p, 2**halvings)


class NumpyAdam:
    """Adam's direction, in its efficient form: epsilon is not corrected for its bias."""

    def __init__(self, like, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.m, self.v, self.t = np.zeros_like(like), np.zeros_like(like), 0

    def __call__(self, gradient):
        self.t += 1
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * gradient
        self.v = self.beta_2 * self.v + (1 - self.beta_2) * gradient**2
        correction = np.sqrt(1 - self.beta_2**self.t) / (1 - self.beta_1**self.t)
        return correction * self.m / (np.sqrt(self.v) + self.epsilon)


class NumpyMuon:
    """Nesterov momentum, orthogonalised by three scaled Newton-Schulz steps."""

    def __init__(self, like, momentum=0.95):
        self.m, self.momentum = np.zeros_like(like), momentum

    def __call__(self, gradient):
        self.m = self.momentum * self.m + gradient
        u, s, vh = np.linalg.svd(gradient + self.momentum * self.m, full_matrices=False)
        s = s / np.sum(s**4) ** 0.25
        low = 0.02 * 2.56
        for _ in range(3):
            scale = np.sqrt(3 / (1 + low + low**2))
            s, low = (scale * z * (3 - (scale * z) ** 2) / 2 for z in (s, low))
        return u * (2 / (1 + low) * s) @ vh


class Reference:
    """One variable `x`; `direction` is a NumpyAdam or NumpyMuon."""

    def __init__(self, x, rate, direction, manifold=True, exp=rotation):
        self.x, self.rate, self.manifold, self.exp = x.copy(), rate, manifold, exp
        self.direction = direction(x)

    def step(self, gradient):
        if not self.manifold:
            self.x = self.x - self.rate * self.direction(gradient)
        elif self.x.shape[0] == self.x.shape[1]:
            d = self.direction(skew(self.x.T @ gradient))
            self.x = self.x @ self.exp(-self.rate * d)
        else:
            d = self.direction(tangent(self.x, gradient))
            self.x = polar(self.x - tangent(self.x, self.rate * d))
