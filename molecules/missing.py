"""One kernel and many tasks, each with labels for only some of the rows.

Task t has labels in the rows where M[:, t] = 1; elsewhere M and y are 0. The system of task t consists of its labelled rows
and columns of K alone. It has the same solution as

  A_t alpha_t = y_t,     A_t = M_t K M_t + lambda I,     M_t = diag M[:, t]

because A_t is lambda I on all other rows, where y and therefore alpha are zero. All tasks share each product with K:

    (A V)[:, t] = M_t K M_t v_t + lambda v_t        is        M * (K @ (M * V)) + lambda V

Each task has its own preconditioner, from the same F F^T ~ K, F (n, k), and the same diagonal w as in pcg.py:
P_t = M_t F F^T M_t + diag(w). Its Woodbury formula has M_t F in place of F.

  n  rows   c  tasks   k  rank

    K = missing.Labelled(K, M);  regression.fit(K, K_test, y, ..., ready=missing.Look(low, M))

Cost: a product costs as much as with K; the preconditioner c n k^2 operations for each ridge.
Proved by: molecules/test_molecules.py
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve


@dataclass(frozen=True)
class Labelled:
    """K for many tasks: its product with v is M * (K @ (M * v)), or M * (K @ v) if K is not symmetric.

    K: a tiles.TiledMatrix (n, m).   mask: M, (n, c).   v: (m, c), or several of these side by side. If K is not symmetric, v
    is 0 in rows without a label.
    """
    K: object
    mask: np.ndarray

    def __getattr__(self, name):  # everything else (shape, diagonal, entries, read_rate ...) is K's
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.K, name)

    def matvec(self, v):
        mask = np.tile(self.mask, v.shape[1] // self.mask.shape[1])
        return mask * self.K.matvec(mask * v if self.K.symmetric else v)

    def leading(self, n):
        mask = self.mask[:n] if self.K.symmetric else self.mask
        return Labelled(self.K.leading(n), mask)


class Look:
    """The preconditioner: ridge -> function that applies P_t^-1 to every column t.  low: the pcg.LowRank of K.   mask: M."""

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
