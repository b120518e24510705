"""Manifold Adam in NumPy float64, straight from the formulas."""

import numpy as np
import scipy.linalg


def polar(x):
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def skew(a):
    return (a - a.T) / 2


def tangent(x, u):
    if x.shape[0] < x.shape[1]:
        return tangent(x.T, u.T).T
    a = x.T @ u
    return u - x @ (a + a.T) / 2


class NumpyManifoldAdam:
    """One variable; `manifold` chooses the geometry from its shape, else plain Adam."""

    def __init__(self, x, rate, manifold=True, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
        self.x, self.rate, self.manifold = x.copy(), rate, manifold
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.m, self.v, self.t = np.zeros_like(x), np.zeros_like(x), 0

    def step(self, gradient):
        self.t += 1
        square = self.manifold and self.x.shape[0] == self.x.shape[1]
        if not self.manifold:
            g = gradient
        elif square:
            g = skew(self.x.T @ gradient)
        else:
            g = tangent(self.x, gradient)
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * g
        self.v = self.beta_2 * self.v + (1 - self.beta_2) * g**2
        m_hat = self.m / (1 - self.beta_1**self.t)
        v_hat = self.v / (1 - self.beta_2**self.t)
        d = -self.rate * m_hat / (np.sqrt(v_hat) + self.epsilon)
        if not self.manifold:
            self.x = self.x + d
        elif square:
            self.x = self.x @ scipy.linalg.expm(d)
        else:
            self.x = polar(self.x + tangent(self.x, d))
