"""Preconditioners for K + ridge I: nothing, its diagonal, a low-rank approximation.

A preconditioner P ~ K + ridge I is cheap to invert; CG then meets the condition of P^-1 (K + ridge I)
in place of K's. Each function here looks at K once and gives ridge -> P^-1: one look, many ridges.

    low = precondition.low_rank(K)
    x, info = pcg.solve(K.matvec, y, ridge, low(ridge))

  n  rows of K     k  rank     c  columns of r     P^-1: (n, c) -> (n, c), float64     ridge: absolute
  team, if K has one: the processes that share it, (index, count, all_reduce), as matrix.Team. Process
  index holds the rows index, index + count, ... of F; vectors are whole in all of them.

Low rank. The largest part of K that k of its columns give, F F^T ~ K with F (n, k):

    left = diag K                                             the diagonal of K - F F^T
    repeat:  draw pivots S, i with probability left_i / sum(left)
             C = K[:, S] - F F[S]^T                           the columns S of K - F F^T
             L L^T = C[S];   F = [F, C L^-T];   left -= the squares of the new columns, row by row

(randomly pivoted Cholesky: Chen, Epperly, Tropp, Webber 2022; as a preconditioner of kernel matrices:
Diaz, Epperly, Frangella, Tropp, Webber 2023). With s^2 the smallest eigenvalue of F^T F,

    P = F F^T + D,     D = s^2 sqrt(diag K / mean(diag K)) + ridge
    P^-1 r = t - D^-1 F (I + F^T D^-1 F)^-1 F^T t,     t = D^-1 r         (Woodbury; the middle is k x k)

Differs from the textbook's P = F F^T + ridge I in:
  1) outside the span of F, that is only ridge, far below K; the smallest eigenvalue found is a better
     guess (Frangella, Tropp, Udell 2021): on CIFAR-10 a condition up to four orders lower;
  2) rows of K are not alike where images differ in contrast, by a factor of 40 on CIFAR-10, and what F
     leaves of them neither. The square root is ours, found by trial: NTKs need a third fewer steps than with
     s^2 alone, NNGPs as many; with its square NNGPs need a fifth more;
  3) k can be chosen while F grows: `Worth`.
No n x n matrix, no explicit inverse, and F is the only large array.

Cost: n k entries of K; 2 n k^2 + k^3 operations and n k^2 for each ridge; 4 n k / count bytes, for F is kept
in float32 (any F makes a P; sums with it are in float64), twice that when it is finished. P^-1: 4 n k c
operations and two sums over the processes, of (k, c) and (n, c).
Proved by: test_all.py, section precondition
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from scipy.linalg import blas, cho_factor, cho_solve, cholesky, solve_triangular
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

BLOCK = 128  # pivots drawn at a time
MOST = 4096  # rank, where it is not given
ROWS = 256  # of F turned to float64 at a time: they stay in cache


def none(matrix):
    """P = I."""
    return lambda ridge: None


def jacobi(matrix):
    """P = diag(K) + ridge I. Nearly a multiple of I where images are normalised, and then no help."""
    diagonal = matrix.diagonal()[:, None]
    return lambda ridge: lambda r: r / (diagonal + ridge)


def low_rank(matrix, rank=None, seed=0, worth=None, size=BLOCK, quiet=True):
    """The `LowRank` of K; arguments as for `partial_cholesky`."""
    F = partial_cholesky(matrix, rank, seed, worth, size, quiet)
    return LowRank(F, matrix.diagonal(), getattr(matrix, "team", None))


class LowRank:
    """ridge -> P^-1, as above, from F: (n, k) float32, or this process's rows of it; diagonal: of K, (n,)."""

    def __init__(self, F, diagonal, team=None):
        self.F, self.diagonal, self.team = F, diagonal, team
        S2 = np.linalg.eigvalsh(self._gram(np.ones(len(F))), UPLO="U")
        S2 = S2[S2 > 1e-13 * S2[-1:]]  # the others are rounding: fewer rows than k, or a K of rank below k
        self.rank = len(S2)
        spread = diagonal / (diagonal.mean() or 1)
        self.outside = (S2[0] if self.rank else 0) * np.sqrt(np.maximum(spread, 0.01))

    def leading(self, n):
        """The same of the leading n x n block of K: the first rows of F, which it shares."""
        return LowRank(self.F[:len(range(n)[_rows(self.team)])], self.diagonal[:n], self.team)

    def __call__(self, ridge):
        rows, n = _rows(self.team), len(self.diagonal)
        D = (self.outside + ridge)[rows]
        middle = cho_factor(np.eye(self.F.shape[1]) + self._gram(D), lower=False)

        def apply(r):
            # BLAS's own threads go on spinning for a while after each call, and the product with K that
            # comes next, on all cores, took twice as long for it: threads are ours here
            with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
                t = r[rows] / D[:, None]
                parts = pool.map(lambda part: self._F(part).T @ t[part], self._parts())
                within = _sum(self.team, sum(parts, np.zeros((len(middle[0]), r.shape[1]))))
                within = cho_solve(middle, within)

                def finish(part):
                    t[part] -= self._F(part) @ within / D[part, None]
                list(pool.map(finish, self._parts()))
            z = np.zeros((n, r.shape[1]))
            z[rows] = t
            return _sum(self.team, z)
        return apply

    def _gram(self, D):
        """F^T D^-1 F, its upper half."""
        out = np.zeros(2 * self.F.shape[1:], order="F")
        for part in self._parts(8 * ROWS):  # few, for a pass over `out` each
            scaled = self._F(part) * (1 / np.sqrt(D[part, None]))
            out = blas.dsyrk(1.0, scaled.T, beta=1.0, c=out, overwrite_c=True) if scaled.size else out
        return _sum(self.team, out)

    def _F(self, part):
        """These rows of F in float64."""
        return self.F[part].astype(np.float64)

    def _parts(self, rows=ROWS):
        return [slice(start, start + rows) for start in range(0, len(self.F), rows)]


@lru_cache
def _blas():
    return ThreadpoolController()


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


def block(n):
    """Pivots to draw at a time where a look at K is cheap: few for a small K, for Worth wants to choose."""
    return int(np.clip(n // 64, 16, BLOCK))


def partial_cholesky(matrix, rank=None, seed=0, worth=None, size=BLOCK, quiet=True):
    """F (n, k), k <= rank, with F F^T ~ K, float32: randomly pivoted Cholesky; this process's rows of it.

    No entry of K decides on a pivot but what is left of the diagonal, and yet F is close to the best of
    its rank. `size` pivots are proposed at a time from one distribution and thinned by rejection on the
    small block between them, so that they are distributed as if drawn one by one while K and F are
    touched by matrix products only (Epperly, Tropp, Webber 2024).
    matrix: has shape, diagonal() -> (n,), columns(indices) -> (n, len(indices)) float64, perhaps team.
    rank: None is n / 2 or MOST at most.   worth: a `Worth`, asked before each block whether it pays.
    Stops early where what is left is rounding: below 1e-7 of the trace, for tiles are float32.
    """
    rng = np.random.default_rng(seed)
    n, team = matrix.shape[0], getattr(matrix, "team", None)
    rank = min(MOST, max(1, n // 2)) if rank is None else min(rank, n)
    left = matrix.diagonal()
    trace = left.sum()
    rows, count = _rows(team), team.count if team else 1
    F = np.zeros((rank, len(range(n)[rows])), np.float32).T  # columns beyond k, not touched, take no memory
    k = 0
    bar = tqdm(total=rank, unit="pivot", desc="preconditioner", disable=quiet or None, leave=False)
    while k < rank and left.sum() > 1e-7 * trace and (worth is None or worth(k, left)):
        proposed = rng.choice(n, size=min(size, rank - k), p=left / left.sum())
        columns = matrix.columns(proposed)
        F_S, here = np.zeros((len(proposed), k)), proposed % count == (team.index if team else 0)
        F_S[here] = F[proposed[here] // count, :k]
        F_S = _sum(team, F_S)
        small = columns[proposed] - F_S @ F_S.T
        columns = columns[rows] - F[:, :k] @ F_S.T.astype(np.float32)
        pivots = _thin(small, left[proposed], rng)
        if not pivots:  # what is left is rounding
            break
        small = small[np.ix_(pivots, pivots)]
        lower = cholesky((small + small.T) / 2, lower=True)
        F[:, k:k + len(pivots)] = new = solve_triangular(lower, columns[:, pivots].T, lower=True).T
        squares = np.zeros(n)
        squares[rows] = np.einsum("nk,nk->n", new, new)
        left = np.maximum(left - _sum(team, squares), 0)
        left[proposed[pivots]] = 0
        k += len(pivots)
        bar.update(len(pivots))
    bar.close()
    return np.ascontiguousarray(F[:, :k])


def _thin(block, left, rng):
    """Which of the proposed pivots to keep, in order: proposal i with probability (what is left of
    its diagonal entry now) / (what was left when it was proposed).  block: (b, b) of K - F F^T."""
    block, kept = block.copy(), []
    for i in range(len(block)):
        if block[i, i] > max(rng.random(), 1e-6) * left[i]:
            kept.append(i)
            block -= np.outer(block[:, i], block[i]) / block[i, i]
    return kept


def _rows(team):
    """Which rows of F a process holds."""
    return slice(None) if team is None else slice(team.index, None, team.count)


def _sum(team, array):
    return array if team is None else team.all_reduce(array)
