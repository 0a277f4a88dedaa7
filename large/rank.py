"""Chooses the rank of the low-rank preconditioner that saves most time: `Worth` decides while F grows.

Without the folder large/, regression.py uses a simple and safe rank, which is a little slower.

    pcg.low_rank(K, worth=rank.Worth(n, [(ridge, tol)], product))

Proved by: large/test_large.py
"""

import numpy as np

import choose


def worth(K, ridges, tol, c, size):
    """The Worth of a rank if these absolute ridges are compared and one of them is then solved to `tol`, with c columns of v.
    size: columns of K that are read at a time."""
    n, ridges = K.shape[0], np.sort(ridges)
    solves = [(ridge, choose.SEARCH) for ridge in ridges if len(ridges) > 1]
    product = 2 * n * n * c * K.slowness  # which may have to be measured
    return Worth(n, solves + [(ridges[len(ridges) // 2], tol)], product, K.reads_all * product / size, c)


class Worth:
    """Is one more block of pivots worth its cost?  worth(k, left) -> bool, called before each block, with F of rank k so far.

    left is the diagonal of E = K - F F^T. Each pivot lowers its sum by tr(E^2) / tr(E), which on the kernels we measured is
    three quarters of E's largest eigenvalue. So the decrease shows the spectrum of K at no cost. A straight line through its
    last three quarters, log against log, extrapolates it: e(k) = e k^-a. Then

      condition(k) = (e(k) + ridge) / (e(n) / 4 + ridge),   steps = log(2 / tol) / 2 sqrt(condition)
      cost(k) = sum over the solves of (steps (product + 4 n k c) + n k^2) + 2 n k^2 + k^3 + k look

    in operations, and k is large enough once one more block does not lower the cost. This is a model: its steps are right to a
    factor of two (1/4 is fitted), and the minimum is flat.
    n: rows.   solves: [(ridge, tol), ...], absolute ridges of the solves to come.   product: operations of K v, times how much
    slower they run than those of a matrix product.   look: the same for reading one column of K.   c: columns of v.
    """

    def __init__(self, n, solves, product, look=0.0, c=10):
        self.n, self.solves, self.product, self.look, self.c = n, solves, product, look, c
        self.trace = []  # (k, sum of left)

    def __call__(self, k, left):
        self.trace.append((k, left.sum()))
        if len(self.trace) < 6:
            return True
        ranks, sums = np.array(self.trace).T
        fall = np.maximum(-np.diff(sums) / np.diff(ranks), 1e-12 * sums[0]) / 0.75
        middle = (ranks[1:] + ranks[:-1]) / 2
        late = middle >= k / 4
        slope, level = np.polyfit(np.log(middle[late]), np.log(fall[late]), 1)
        slope = min(slope, 0.0)
        self.eigenvalue = lambda i: np.exp(level) * i**slope
        more = k + ranks[-1] - ranks[-2]
        return more < self.n and self.cost(more) < self.cost(k)

    def steps(self, k):
        """Predicted steps of each solve with rank k."""
        ridge, tol = np.array(self.solves).T
        lowest = self.eigenvalue(self.n) / 4
        return np.log(2 / tol) / 2 * np.sqrt((self.eigenvalue(k) + ridge) / (lowest + ridge))

    def cost(self, k):
        """Predicted operations of all solves with rank k."""
        step = self.product + 4 * self.n * k * self.c
        return self.steps(k).sum() * step + (2 + len(self.solves)) * self.n * k**2 + k**3 + k * self.look
