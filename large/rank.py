"""How large a rank of the low-rank preconditioner saves time: `Worth` is asked while F grows.

Without this file, or without a Worth, regression.py takes a rank that is simple and safe, and a little slower.

    pcg.low_rank(K, worth=rank.Worth(n, [(ridge, tol)], product))

Proved by: large/test_large.py
"""

import numpy as np


class Worth:
    """Is one more block of pivots worth its cost?  worth(k, left) -> bool, asked while F grows.

    left, the diagonal of K - F F^T, falls by tr(E^2) / tr(E) a pivot, E = K - F F^T: three quarters of
    E's largest eigenvalue on the kernels we measured. So its fall is the spectrum of K, for free; a line
    through its last three quarters, log against log, says how that goes on: e(k) = e k^-a. Then

      condition(k) = (e(k) + ridge) / (e(n) / 4 + ridge),   steps = log(2 / tol) / 2 sqrt(condition)
      cost(k) = sum over the solves of (steps (product + 4 n k c) + n k^2) + 2 n k^2 + k^3 + k look

    in operations, and k is large enough where a block more no longer lowers the cost. A model: steps are
    right to a factor of two (1/4 is fitted), and the minimum is flat.
    n: rows.   solves: [(ridge, tol), ...] to come.   product: operations of K v, times how much slower
    they run than those of a matrix product.   look: likewise for a column of K.   c: columns of v.
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
        """Steps of each solve with rank k."""
        ridge, tol = np.array(self.solves).T
        lowest = self.eigenvalue(self.n) / 4
        return np.log(2 / tol) / 2 * np.sqrt((self.eigenvalue(k) + ridge) / (lowest + ridge))

    def cost(self, k):
        step = self.product + 4 * self.n * k * self.c
        return self.steps(k).sum() * step + (2 + len(self.solves)) * self.n * k**2 + k**3 + k * self.look
