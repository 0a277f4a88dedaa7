"""One kernel, many tasks, each with labels for some of the rows only.

Task t has labels where M[:, t] = 1, y[:, t] = 0 elsewhere. Its own system has its labelled rows and columns of K
alone; it is solved by

  A_t alpha_t = y_t,     A_t = M_t K M_t + lambda I,     M_t = diag M[:, t]

for A_t is lambda I on all other rows, where y and so alpha are zero. All tasks share each product with K:

    (A V)[:, t] = M_t K M_t v_t + lambda v_t        is        M * (K @ (M * V)) + lambda V

and each has its own preconditioner, from the same F F^T ~ K, F (n, k) (pcg.py): with D_t = M_t (s^2 .. +
lambda), P_t = M_t F F^T M_t + D_t, whose Woodbury formula has M_t F in place of F.

  n  rows   c  tasks   k  rank

    K = missing.Labelled(K, M);  regression.fit(K, K_test, y, ..., look=missing.Look(low, M))

Cost: of a product, that of K's; of the preconditioner c times n k^2 for each ridge.   Proved by: molecules/test_molecules.py
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve


@dataclass(frozen=True)
class Labelled:
    """M * (K @ v): K with the rows of column t that have no label in task t set to zero.

    K: a tiles.TiledMatrix, (n, m).   mask: M, (n, c).   v: (m, c), zero where a column of K has no label.
    """
    K: object
    mask: np.ndarray

    def __getattr__(self, name):  # shape, diagonal, entries, read_rate ... are those of K
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.K, name)

    def matvec(self, v):
        return self.mask * self.K.matvec(self.mask * v if self.K.symmetric else v)

    def leading(self, n):
        mask = self.mask[:n] if self.K.symmetric else self.mask
        return Labelled(self.K.leading(n), mask)


class Look:
    """ridge -> P^-1 of every task.  low: the pcg.LowRank of K.   mask: M, (n, c)."""

    def __init__(self, low, mask):
        self.low, self.mask, self.rank = low, mask, low.rank

    def leading(self, n):
        return Look(self.low.leading(n), self.mask[:n])

    def __call__(self, ridge):
        F, D = self.low.F.astype(np.float64), self.low.outside + ridge
        scaled = F / D[:, None]
        middles = [cho_factor(np.eye(F.shape[1]) + F[rows].T @ scaled[rows]) for rows in self.mask.T > 0]

        def apply(r):
            t = self.mask * r / D[:, None]
            within = F.T @ t
            within = np.stack([cho_solve(middle, column) for middle, column in zip(middles, within.T)], axis=1)
            return t - self.mask * (scaled @ within)
        return apply
