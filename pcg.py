"""Preconditioned conjugate gradients for A X = Y, A = K + ridge I, many right-hand sides at once.

K is only ever multiplied by (n, c) arrays. Vectors are float64, whatever the tiles of K are.

  n  rows     c  right-hand sides     M  preconditioner, M ~ A     F  (n, k), K ~ F F^T
  ridge is absolute here: a number lambda added to the diagonal

The method of every textbook is `textbook`, a dozen lines for one right-hand side. `solve` is the same method with what a
real K needs; x, r, z, d and q are (n, c):

    x = 0,  r = y,  z = M^-1 r,  d = z                 every column has its own alpha and beta
    repeat:  q = A d;  alpha = <r, z> / <d, q>;  x += alpha d;  r -= alpha q
             every CHECK steps, and before a column is called done:  r' = y - A x, the true residual
                 freeze the columns with |r'| <= tol |y|
                 if r wrongly says done, or |r' - r| > |r'| / 10, restart the column:  r = r', beta = 0;
                 but freeze it if |r'| has not halved since its last restart: rounding allows no more
             z = M^-1 r;  beta = <r, z> / <r, z>_before;  d = z + beta d

It differs from the textbook, and from jax.scipy.sparse.linalg.cg, in five points:
  1) Each column has its own step size. One step size for all treats (n, c) as one vector, and leaves the worst column above
     the tolerance.
  2) The true residual y - A x decides, because the recursive r drifts away from it. It replaces r only at a restart: doing
     so every CHECK steps spoils the directions, and at condition 1e9 CG without a preconditioner never converged.
  3) A column that rounding keeps from the tolerance is noticed, and left as it is.
  4) The coefficients form a Lanczos matrix, which gives the condition number for free.
  5) Negative curvature is an error, because A is then not positive definite and x means nothing; so is a curvature that is
     zero up to rounding. A few steps of Lanczos' method say how much ridge is missing.

A preconditioner is a function that looks at K once and returns ridge -> M^-1: one look, many ridges. The best is low rank,
F F^T ~ K from k columns of K:

    left = diag K                                             the diagonal of K - F F^T
    repeat:  draw pivots S, i with probability left_i / sum(left)
             C = K[:, S] - F F[S]^T                           the columns S of K - F F^T
             L L^T = C[S];   F = [F, C L^-T];   left -= the squares of the new columns, row by row

(randomly pivoted Cholesky: Chen, Epperly, Tropp, Webber 2022; as a preconditioner of kernel matrices: Diaz, Epperly,
Frangella, Tropp, Webber 2023). With s^2 the smallest eigenvalue of F^T F,

    M = F F^T + diag(w),     w = s^2 sqrt(diag K / mean(diag K)) + ridge
    M^-1 r = t - diag(w)^-1 F (I + F^T diag(w)^-1 F)^-1 F^T t,    t = diag(w)^-1 r    (Woodbury; the middle is k x k)

The usual choice is w = ridge. Outside the span of F, M is then only ridge, far below K. The smallest eigenvalue found is a
better guess (Frangella, Tropp, Udell 2021): on CIFAR-10 it lowers the condition number by up to four orders of magnitude.
The square root is ours, found by trial: the diagonal of K varies by a factor of 40 between images of low and of high
contrast, and with it what F leaves of each row. NTKs then need a third fewer steps than with s^2 alone.

    X, info = pcg.solve(K.matvec, Y, ridge, pcg.low_rank(K)(ridge))

`steps` asks for its products with K and M^-1, so that several solves can share them (large/one_pass.py).

Cost: a step is one product with K and one with M^-1, 4 n k c operations. low_rank: n k entries of K, 2 n k^2 + k^3
operations and n k^2 more for each ridge, 4 n k bytes over all processes (F is float32: any F makes a valid M).
Proved by: test_all.py, section pcg
"""

import copy
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy.linalg import blas, cho_factor, cho_solve, cholesky, eigvalsh_tridiagonal, solve_triangular
from tqdm import tqdm

import tiles

SINGULAR = 1e-14  # of the largest <d, A d> / <d, d>: one below it is rounding
CHECK = 20  # steps between true residuals: one product more in twenty
BLOCK = 128  # pivots drawn at a time
MOST = 4096  # rank, where it is not given
LOOK = 2**28  # bytes, at most, of the columns of K that are drawn at a time, and of a copy of them
ROWS = 256  # of F converted to float64 at a time: they stay in cache


def textbook(matvec, y, ridge=0.0, tol=1e-6, max_iters=1000):
    """x with |y - (K + ridge I) x| <= tol |y|, one right-hand side (n,): conjugate gradients as in every textbook."""
    x, r = np.zeros(len(y)), np.array(y, np.float64)
    d, rr = r.copy(), r @ r
    for _ in range(max_iters):
        if np.sqrt(rr) <= tol * np.linalg.norm(y):
            break
        q = matvec(d[:, None])[:, 0] + ridge * d
        alpha = rr / (d @ q)
        x += alpha * d
        r -= alpha * q
        rr, before = r @ r, rr
        d = r + (rr / before) * d
    return x


class Info(NamedTuple):
    """What a solve can show for itself."""
    iterations: int  # steps, those before a checkpoint too
    residual: np.ndarray  # (c,) |y - A x| / |y| of each column, of the x that is returned
    converged: bool  # every residual <= tol
    history: list  # largest residual over the columns, before the first step and after each
    condition: float  # of M^-1 A, largest over smallest Ritz value: a lower bound
    seconds: float  # of this call
    product_seconds: float  # of those, in products with K
    products: int  # of this call, with K, those for true residuals too


class State(NamedTuple):
    """A solve between two steps; all that `checkpoint` keeps."""
    x: np.ndarray  # (n, c), as r and d
    r: np.ndarray
    d: np.ndarray
    rz: np.ndarray  # (c,), as what follows
    active: np.ndarray  # not yet done nor given up
    stepping: np.ndarray  # and not waiting for its true residual
    restarted: np.ndarray  # the true residual where the recursion was lost last
    history: list
    alphas: list
    betas: list


class Indefinite(ArithmeticError):
    """K + ridge I is not positive definite beyond rounding.  cure: a ridge that is enough, absolute or relative as given."""

    def __init__(self, why, cure, ridge="ridge"):
        super().__init__(f"{why}. Raise the {ridge} to {cure:.1e} or more")
        self.why, self.cure = why, cure


def solve(matvec, y, ridge=0.0, precondition=None, tol=1e-6, max_iters=1000, x0=None, quiet=True,
          checkpoint=None, drop=False):
    """X with |Y - (K + ridge I) X| <= tol |Y| in every column.

    matvec: (n, c) -> (n, c), the product with K, symmetric positive semidefinite.
    y: (n, c) or (n,).   ridge: >= 0, absolute.   precondition: (n, c) -> (n, c), M^-1; None is I.
    x0: where to start, shaped as y.   drop: as in `steps`.   checkpoint: has load() -> {name: array} or None and
    save({name: array}, finished), as store.Checkpoint; a solve goes on from what it has.
    Returns X, float64, shaped as y, and Info.
    Warns where tol is not reached. Raises ValueError: shapes, NaN in y or K, ridge < 0.
    Indefinite: a direction with <d, A d> <= 0, or so little above that rounding may have put it there.
    """
    solve, answer = steps(y, ridge, precondition, tol, max_iters, x0, quiet, checkpoint, drop), None
    while True:
        try:
            inverse, v = solve.send(answer)
        except StopIteration as end:
            return end.value
        answer = inverse(v) if inverse else matvec(v)


def steps(y, ridge=0.0, precondition=None, tol=1e-6, max_iters=1000, x0=None, quiet=True, checkpoint=None, drop=True):
    """`solve` as a generator: it yields (None, v) and takes K v, or (precondition, r) and takes M^-1 r; it returns X and Info.
    v, r: (n, at most c).

    drop: leave out columns that are done. False, as in `solve`: keep all, for K or M may differ from column to column.
    """
    begun, shape, y = time.perf_counter(), np.shape(y), np.asarray(y, np.float64).reshape(len(y), -1)
    if not np.isfinite(y).all() or not ridge >= 0:
        raise ValueError(f"y has {np.sum(~np.isfinite(y))} entries that are not finite, ridge is "
                         f"{ridge}: y must be finite and ridge >= 0")
    spent = []

    def product(v, which=True):
        """A v of these columns at least; the others are not used."""
        start = time.perf_counter()
        if np.all(which) or not drop:
            out = ridge * v
            out += yield None, v
        else:
            out = np.zeros_like(v)
            out[:, which] = (yield None, v[:, which]) + ridge * v[:, which]
        spent.append(time.perf_counter() - start)
        if not np.isfinite(out).all():
            raise ValueError(f"product {len(spent)} with K has {np.sum(~np.isfinite(out))} entries that are not "
                             "finite: look for NaN or infinity in K and in the preconditioner")
        return out

    def preconditioned(r, which):
        """M^-1 r of these columns at least; the others are not used."""
        if not precondition or not which.any():
            return r
        if which.all() or not drop:
            return (yield precondition, r)
        out = np.zeros_like(r)
        out[:, which] = yield precondition, r[:, which]
        return out

    def relative(residual):
        return np.linalg.norm(residual, axis=0) / scale

    scale = np.linalg.norm(y, axis=0)
    scale[scale == 0] = 1  # a zero column is solved by zero
    saved = checkpoint.load() if checkpoint else None
    state = yield from (_resumed(saved, preconditioned) if saved else
                        _begin(product, y, preconditioned, relative, tol, x0))
    x, r, d, rz, active, stepping, restarted, history, alphas, betas = state
    bar = tqdm(total=max_iters, initial=len(alphas), unit="step", desc="solve", disable=quiet or None,
               leave=False)
    highest = 0.0  # Rayleigh quotient, at most the largest eigenvalue
    known = False  # whether `residual` is the true one of x
    while active.any() and len(alphas) < max_iters:
        q = yield from product(d, stepping)
        curvature = _dot(d, q)
        quotient = curvature[stepping] / _dot(d, d)[stepping]
        highest = max(highest, quotient.max(initial=0))
        if np.any(quotient <= SINGULAR * highest):
            bar.close()
            raise (yield from _indefinite(product, d[:, stepping], curvature[stepping], ridge, len(alphas) + 1))
        alpha = np.divide(rz, curvature, out=np.zeros_like(rz), where=stepping)
        x += alpha * d
        q *= alpha
        r -= q
        del q
        residual, lost = relative(r), np.zeros_like(active)
        stepping = active & (residual > tol)  # the others wait for the next true residual
        known = len(alphas) % CHECK == CHECK - 1 or not stepping.any()
        if known:
            true = np.where(active, y - (yield from product(x, active)), r)
            residual = relative(true)
            lost = active & (residual > tol) & (~stepping | (relative(true - r) > 0.1 * residual))
            active = active & (residual > tol) & ~(lost & (residual > restarted / 2))
            restarted[lost] = residual[lost]
            lost |= ~active  # r of what is done stays the true one
            r[:, lost] = true[:, lost]
            stepping = active
        z = yield from preconditioned(r, stepping)
        rz_before, rz = rz, _dot(r, z)
        beta = np.divide(rz, rz_before, out=np.zeros_like(rz), where=stepping & ~lost)
        d *= beta
        d += z
        del z
        alphas.append(alpha)
        betas.append(beta)
        history.append(float(residual.max()))
        if checkpoint:
            checkpoint.save(State(x, r, d, rz, active, stepping, restarted, history, alphas,
                                  betas)._asdict(), not active.any())
        bar.update()
        bar.set_postfix_str(f"residual {history[-1]:.1e} -> {tol:.0e}")
    bar.close()

    if not known:
        residual = relative(np.where(active, y - (yield from product(x, active)), r) if active.any() else r)
    info = Info(len(alphas), residual, bool((residual <= tol).all()), history,
                _condition(np.array(alphas), np.array(betas)), time.perf_counter() - begun,
                sum(spent), len(spent))
    if not info.converged:
        _warn(info, tol, active.any())
    return x.reshape(shape), info


def _dot(a, b):
    return np.einsum("nc,nc->c", a, b)


def _begin(product, y, preconditioned, relative, tol, x0):
    """The state before the first step."""
    x = np.zeros_like(y) if x0 is None else np.array(x0, np.float64).reshape(y.shape)
    r = y - (yield from product(x)) if x.any() else y.copy()
    residual = relative(r)
    z = yield from preconditioned(r, residual > tol)
    return State(x, r, z.copy(), _dot(r, z), residual > tol, residual > tol,
                 np.full(y.shape[1], np.inf), [float(residual.max())], [], [])


def _resumed(saved, preconditioned):
    """The state that a checkpoint has kept, {name: array}. All columns restart if M is no longer the same, as where another
    number of processes chose another rank: the next directions would not be conjugate to the old ones."""
    state = State(**{name: list(saved[name]) if kind is list else saved[name] for name, kind in State.__annotations__.items()})
    z = yield from preconditioned(state.r, state.stepping)
    rz = _dot(state.r, z)
    if np.allclose(rz, state.rz, rtol=1e-4, atol=0):
        return state
    return state._replace(d=z.copy(), rz=rz, betas=[*state.betas[:-1], np.zeros_like(rz)])


def _warn(info, tol, unfinished):
    reached, steps = info.residual.max(), info.iterations
    why = ("Raise max_iters, the rank or the ridge" if unfinished else
           f"{np.sum(info.residual > tol)} of {len(info.residual)} columns stopped falling: in float64, at "
           f"condition {info.condition:.0e}, rounding allows no more. Raise the ridge or the rank")
    warnings.warn(f"not converged: residual {reached:.1e} after {steps} steps, asked for {tol:.0e}. {why}, "
                  "or ask for less: a larger tol", stacklevel=3)


def _indefinite(product, d, curvature, ridge, step):
    """The error for directions d with <d, A d> = curvature <= 0, with a ridge that would have done.

    Lanczos' method from the worst of them finds nearly the lowest eigenvalue of A. The cure adds 1.5 times its size to the
    ridge, and at least a millionth of the largest.
    """
    quotient = curvature / np.maximum(_dot(d, d), 1e-300)
    lowest, highest = yield from _extremes(product, d[:, quotient.argmin()])
    lowest = min(lowest, quotient.min())
    if highest <= 0:  # y lies where K is 0
        _, highest = yield from _extremes(product, np.random.default_rng(0).choice([-1.0, 1.0], len(d)))
    cure = ridge + max(-1.5 * lowest, 1e-6 * highest)
    return Indefinite(
        f"K + ridge I is not positive definite: with an absolute ridge of {ridge:.2e} it has an eigenvalue "
        f"of {lowest:.1e} (found at step {step}). Rows that are alike make K singular, and rounding of its "
        "entries makes it indefinite", cure)


def _extremes(product, start, steps=40):
    """The lowest and the highest eigenvalue of A projected on {start, A start, ...}: Lanczos' method."""
    basis, main, beside = [start / np.linalg.norm(start)], [], []
    for _ in range(min(steps, len(start))):
        w = (yield from product(basis[-1][:, None]))[:, 0]
        main.append(w @ basis[-1])
        for _ in range(2):  # once leaves what rounding has left
            w -= np.stack(basis, 1) @ (np.stack(basis) @ w)
        beside.append(np.linalg.norm(w))
        if beside[-1] <= 1e-12 * np.abs(main).max():
            break
        basis.append(w / beside[-1])
    ritz = eigvalsh_tridiagonal(np.array(main), np.array(beside[:len(main) - 1]))
    return ritz[0], ritz[-1]


def _condition(alphas, betas):
    """Largest over smallest eigenvalue of the Lanczos matrix of the column that ran longest.

    Its diagonal is 1/alpha_k + beta_(k-1)/alpha_(k-1), beside it sqrt(beta_k)/alpha_k.
    """
    if not len(alphas):
        return 1.0
    column = (alphas > 0).sum(axis=0).argmax()
    steps = alphas[:, column] > 0
    alpha, beta = alphas[steps, column], betas[steps, column][:-1]
    main = 1 / alpha
    main[1:] += beta / alpha[:-1]
    ritz = eigvalsh_tridiagonal(main, np.sqrt(beta) / alpha[:-1])
    return float(ritz[-1] / ritz[0]) if ritz[0] > 0 else float("inf")


def none(matrix):
    """M = I."""
    return lambda ridge: None


def jacobi(matrix):
    """M = diag(K) + ridge I. If all images have the same norm it is a multiple of I, and no help."""
    diagonal = matrix.diagonal()[:, None]
    return lambda ridge: lambda r: r / (diagonal + ridge)


def at_a_time(n, size, count=1):
    """How many columns of K (n, n) are read at a time by `count` processes: `size`, or what takes LOOK bytes, at least 16."""
    return min(size, max(16, LOOK // (8 * (n // count + 1))))


def low_rank(matrix, rank=None, seed=0, worth=None, size=BLOCK, quiet=True):
    """The `LowRank` of K; arguments as for `partial_cholesky`."""
    F = partial_cholesky(matrix, rank, seed, worth, size, quiet)
    return LowRank(F, matrix.diagonal(), getattr(matrix, "team", None))


class LowRank:
    """ridge -> M^-1, as above, from F: (n, k) float32, or this process's rows of it; diagonal: of K, (n,)."""

    def __init__(self, F, diagonal, team=None):
        self.F, self.diagonal, self.team = F, diagonal, team
        S2 = np.linalg.eigvalsh(self._gram(np.ones(len(F))), UPLO="U")
        S2 = S2[S2 > 1e-13 * S2[-1:]]  # the others are rounding: fewer rows than k, or a K of rank below k
        self.rank = len(S2)
        spread = diagonal / (diagonal.mean() or 1)
        self.outside = (S2[0] if self.rank else 0) * np.sqrt(np.maximum(spread, 0.01))  # none far below the others

    def leading(self, n):
        """The same of the leading n x n block of K: the first rows of F and of w, which it shares."""
        part = copy.copy(self)
        part.F, part.diagonal = self.F[:len(range(n)[_rows(self.team)])], self.diagonal[:n]
        part.outside = self.outside[:n]
        return part

    def __call__(self, ridge):
        return Inverse(self, (self.outside + ridge)[_rows(self.team)])

    def apply(self, inverses, rs):
        """[M^-1 r, ...] of each of these inverses and its r (n, c): F is read once for all of them."""
        rows, k, ends = _rows(self.team), self.F.shape[1], np.cumsum([r.shape[1] for r in rs])
        middles = [one.middle for one in inverses]  # here, by all processes together, and not in a thread of one
        z = np.zeros((len(self.diagonal), ends[-1]))
        t = z[rows]  # a view
        places = [slice(end - r.shape[1], end) for end, r in zip(ends, rs)]
        for one, r, place in zip(inverses, rs, places):
            np.divide(r[rows], one.w[:, None], out=t[:, place])
        # BLAS's own threads go on spinning for a while after each call, and the product with K that
        # comes next, on all cores, took twice as long for it: threads are ours here
        with tiles.one_thread(), ThreadPoolExecutor(tiles.cores()) as pool:
            each = map if self.F.size * max(8, ends[-1]) < tiles.FEW else pool.map
            parts = each(lambda part: t[part].T @ self._F(part), self._parts())
            within = np.split(_sum(self.team, sum(parts, np.zeros((ends[-1], k)))).T, ends[:-1], axis=1)
            within = np.concatenate(list(each(cho_solve, middles, within)), axis=1)

            def finish(part):
                away = self._F(part) @ within
                for one, place in zip(inverses, places):
                    t[part, place] -= away[:, place] / one.w[part, None]
            list(each(finish, self._parts()))
        return np.split(_sum(self.team, z), ends[:-1], axis=1)

    def _gram(self, w):
        """F^T diag(w)^-1 F, its upper half."""
        out = np.zeros(2 * self.F.shape[1:], order="F")
        for part in self._parts(8 * ROWS):  # few, for a pass over `out` each
            scaled = self._F(part) * (1 / np.sqrt(w[part, None]))
            out = blas.dsyrk(1.0, scaled.T, beta=1.0, c=out, overwrite_c=True) if scaled.size else out
        return _sum(self.team, out)

    def _F(self, part):
        """These rows of F in float64."""
        return self.F[part].astype(np.float64)

    def _parts(self, rows=ROWS):
        return [slice(start, start + rows) for start in range(0, len(self.F), rows)]


class Inverse:
    """r -> M^-1 r, of a LowRank and one ridge.  w: diag(w) of M, this process's rows."""

    def __init__(self, low, w):
        self.low, self.w, self._middle = low, w, None

    @property
    def middle(self):
        """I + F^T diag(w)^-1 F, factorised when it is first used."""
        if self._middle is None:
            self._middle = cho_factor(np.eye(self.low.F.shape[1]) + self.low._gram(self.w), lower=False)
        return self._middle

    def __call__(self, r):
        return self.low.apply([self], [r])[0]


def block(n):
    """Pivots to draw at a time where columns are cheap: few for a small K, so that the rank can be chosen finely."""
    return int(np.clip(n // 64, 16, BLOCK))


def partial_cholesky(matrix, rank=None, seed=0, worth=None, size=BLOCK, quiet=True):
    """F (n, k), k <= rank, with F F^T ~ K, float32: randomly pivoted Cholesky; this process's rows of it.

    Pivots depend only on what is left of the diagonal, and yet F is close to the best of
    its rank. `size` pivots are proposed at a time from one distribution and thinned by rejection on the
    small block between them, so that they are distributed as if drawn one by one while K and F are
    touched by matrix products only (Epperly, Tropp, Webber 2024).
    matrix: has shape, diagonal() -> (n,), columns(indices, own=True) -> this process's rows of these columns, perhaps team.
    rank: None is n / 2, at most MOST.   worth: large/rank.py's Worth, asked before each block
    whether it pays.
    Stops early where what is left is rounding: below 1e-7 of the trace, for tiles are float32.
    """
    rng = np.random.default_rng(seed)
    n, team = matrix.shape[0], getattr(matrix, "team", None)
    rank = min(MOST, max(1, n // 2)) if rank is None else min(rank, n)
    left = matrix.diagonal()
    trace = left.sum()
    rows, count = _rows(team), team.count if team else 1
    size = at_a_time(n, size, count)
    F = np.zeros((rank, len(range(n)[rows])), np.float32).T  # columns beyond k, not touched, take no memory
    k = 0
    bar = tqdm(total=rank, unit="pivot", desc="preconditioner", disable=quiet or None, leave=False)
    while k < rank and left.sum() > 1e-7 * trace and (worth is None or worth(k, left)):
        proposed = rng.choice(n, size=min(size, rank - k), p=left / left.sum())
        columns = matrix.columns(proposed, own=True)
        both, here = np.zeros((len(proposed), k + len(proposed))), proposed % count == (team.index if team else 0)
        both[here] = np.hstack([F[proposed[here] // count, :k], columns[proposed[here] // count]])
        F_S, small = np.split(_sum(team, both), [k], axis=1)
        small = small - F_S @ F_S.T
        pivots = _thin(small, left[proposed], rng)
        if not pivots:  # what is left is rounding
            break
        small = small[np.ix_(pivots, pivots)]
        lower = cholesky((small + small.T) / 2, lower=True)
        columns, F_S, squares = columns[:, pivots], F_S[pivots].T.astype(np.float32), np.zeros(n)
        for start in range(0, len(columns), 64 * ROWS):  # in float64 all at once would take twice the memory of `columns`
            part = slice(start, start + 64 * ROWS)
            rest = columns[part] - F[part, :k] @ F_S
            F[part, k:k + len(pivots)] = new = solve_triangular(lower, rest.T, lower=True).T
            squares[rows][part] = np.einsum("nk,nk->n", new, new)
        left = np.maximum(left - _sum(team, squares), 0)
        left[proposed[pivots]] = 0
        k += len(pivots)
        bar.update(len(pivots))
    bar.close()
    return F[:, :k]


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
