"""Preconditioned conjugate gradients for (K + ridge I) X = Y, many right sides at once.

K is only ever multiplied by (n, c) arrays, and for the preconditioner asked for its diagonal and a
few of its columns. Every vector is float64, whatever the tiles are.

  n  rows     c  right sides     r  rank     A = K + ridge I     P  preconditioner, P ~ A
  ridge here is absolute: a number lambda added to the diagonal

    X = 0,  R = Y,  Z = P^-1 R,  D = Z                 every column with its own alpha and beta
    repeat:  Q = A D;  alpha = <R, Z> / <D, Q>;  X += alpha D;  R -= alpha Q
             every CHECK steps, and before a column is called done:  R' = Y - A X
                 freeze the columns with |R'| <= tol |Y|
                 where |R' - R| > |R'| / 10 the recursion is lost:  R = R', beta = 0;
                 freeze a column that has not halved |R'| since it was lost before: rounding
             Z = P^-1 R;  beta = <R, Z> / <R, Z>_before;  D = Z + beta D

Differs from the textbook, and from jax.scipy.sparse.linalg.cg, in:
  1) a step size per column: one for all treats (n, c) as one vector, and the worst column is left
     above the tolerance;
  2) the residual that decides is the true one, Y - A X: the recursive one drifts away from it. It
     replaces the recursive one only where that is lost: done every CHECK steps, it spoils the
     directions, and at condition 1e9 CG without a preconditioner never converged;
  3) the Lanczos matrix behind the coefficients is kept: condition numbers for free;
  4) negative curvature is an error, for then A is not positive definite and X means nothing.

    X, info = pcg.solve(K.matvec, Y, ridge, pcg.low_rank(K, ridge, rank=500))

Cost: a step is one product with K and, for low_rank, two with F, 4 n r c operations.
Proved by: test_all.py, section pcg
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.linalg import cholesky, eigvalsh_tridiagonal, solve_triangular
from tqdm import tqdm

CHECK = 20  # steps between true residuals: one product more in twenty
BLOCK = 128  # pivots drawn at a time
STATE = ("x", "r", "d", "rz", "active", "stepping", "restarted")  # of a solve between two steps
TRACE = ("history", "alphas", "betas")  # what it has recorded


class Info(NamedTuple):
    """What a solve can show for itself."""
    iterations: int  # products of K with all columns, those for true residuals left out
    residual: np.ndarray  # (c,) |y - A x| / |y| of each column, recomputed at the end
    converged: bool  # every residual <= tol
    history: list  # largest residual over the columns, before the first step and after each
    condition: float  # of P^-1 A, largest over smallest Ritz value: a lower bound


def solve(matvec, y, ridge=0.0, precondition=None, tol=1e-6, max_iters=1000, x0=None, quiet=True,
          checkpoint=None):
    """X with |Y - (K + ridge I) X| <= tol |Y| in every column.

    matvec: (n, c) -> (n, c), the product with K, symmetric positive semidefinite.
    y: (n, c) or (n,).   ridge: >= 0, absolute.   precondition: (n, c) -> (n, c), P^-1; None is I.
    x0: where to start, shaped as y.   checkpoint: has load() -> {name: array} or None and
    save({name: array}, finished), as store.Checkpoint; a solve goes on from what it has.
    Returns X, float64, shaped as y, and Info.
    Warns where max_iters steps did not reach tol. Raises ValueError: shapes, NaN in y, ridge < 0.
    ArithmeticError: a direction with <d, A d> <= 0.
    """
    shape, y = np.shape(y), np.array(y, np.float64).reshape(len(y), -1)
    if not np.isfinite(y).all() or ridge < 0:
        raise ValueError(f"y has {np.sum(~np.isfinite(y))} entries that are not finite, ridge is "
                         f"{ridge}: y must be finite and ridge >= 0")

    def product(v):
        return matvec(v) + ridge * v

    def dot(a, b):
        return np.einsum("nc,nc->c", a, b)

    def relative(residual):
        return np.linalg.norm(residual, axis=0) / scale

    precondition = precondition or (lambda r: r)
    scale = np.linalg.norm(y, axis=0)
    scale[scale == 0] = 1  # a zero column is solved by zero
    saved = checkpoint.load() if checkpoint else None
    if saved:
        x, r, d, rz, active, stepping, restarted = (saved[name] for name in STATE)
        history, alphas, betas = (list(saved[name]) for name in TRACE)
    else:
        x = np.zeros_like(y) if x0 is None else np.array(x0, np.float64).reshape(y.shape)
        r = y - product(x) if x.any() else y.copy()
        active = stepping = relative(r) > tol
        restarted = np.full(len(scale), np.inf)
        history, alphas, betas = [float(relative(r).max())], [], []
        z = precondition(r)
        d, rz = z.copy(), dot(r, z)
    bar = tqdm(total=max_iters, initial=len(alphas), unit="step", desc="solve", disable=quiet or None,
               leave=False)
    while active.any() and len(alphas) < max_iters:
        q = product(d)
        curvature = dot(d, q)
        if np.any(curvature[stepping] <= 0):
            raise ArithmeticError(
                f"K + ridge I is not positive definite: <d, A d> / <d, d> = "
                f"{np.min((curvature / np.maximum(dot(d, d), 1e-300))[stepping]):.1e} at step "
                f"{len(alphas) + 1} with ridge {ridge:.1e}. Raise the ridge by more than that.")
        alpha = np.divide(rz, curvature, out=np.zeros_like(rz), where=stepping)
        x += alpha * d
        r -= alpha * q
        residual, lost = relative(r), np.zeros_like(active)
        stepping = active & (residual > tol)  # the others wait for the next true residual
        if len(alphas) % CHECK == CHECK - 1 or not stepping.any():
            true = y - product(x)
            residual = relative(true)
            lost = active & (residual > tol) & (~stepping | (relative(true - r) > 0.1 * residual))
            active = active & (residual > tol) & ~(lost & (residual > restarted / 2))
            restarted[lost] = residual[lost]
            r[:, lost] = true[:, lost]
            stepping = active
        z = precondition(r)
        rz_before, rz = rz, dot(r, z)
        beta = np.divide(rz, rz_before, out=np.zeros_like(rz), where=stepping & ~lost)
        d = z + beta * d
        alphas.append(alpha)
        betas.append(beta)
        history.append(float(residual.max()))
        if checkpoint:
            checkpoint.save(dict(zip(STATE + TRACE, (x, r, d, rz, active, stepping, restarted,
                                                     history, alphas, betas))), not active.any())
        bar.update()
        bar.set_postfix_str(f"residual {history[-1]:.1e} -> {tol:.0e}")
    bar.close()

    residual = relative(y - product(x))
    info = Info(len(alphas), residual, bool((residual <= tol).all()), history,
                _condition(np.array(alphas), np.array(betas)))
    if not info.converged:
        cure = ("Raise --max_iters, --rank or --ridge" if active.any() else
                "Rounding allows no more: raise --ridge")
        warnings.warn(f"not converged: residual {residual.max():.1e} after {len(alphas)} steps, asked "
                      f"for {tol:.0e}. {cure}, or ask for less with --tol.", stacklevel=2)
    return x.reshape(shape), info


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


def jacobi(matrix, ridge):
    """P = diag(K) + ridge I. Nearly a multiple of I where images are normalised, and then no help.

    matrix: has diagonal() -> (n,).   Returns precondition: (n, c) -> (n, c).
    """
    scale = matrix.diagonal()[:, None] + ridge
    return lambda r: r / scale


def partial_cholesky(matrix, rank, seed=0, quiet=True):
    """F (n, k), k <= rank, with F F^T ~ K: randomly pivoted Cholesky.

    The next pivot is drawn in proportion to what is left of the diagonal, diag(K - F F^T); no other
    entry of K decides, and yet F is close to the best of its rank (Chen, Epperly, Tropp, Webber 2022).
    BLOCK pivots are proposed at a time from one distribution and thinned by rejection on the small
    block between them, so that they are distributed as if drawn one by one while K and F are only
    touched by matrix products (Epperly, Tropp, Webber 2024).
    matrix: has shape, diagonal() -> (n,) and columns(indices) -> (n, k), float64.
    Stops early where what is left is rounding: below 1e-7 of the trace, for tiles are float32.
    Cost: n k kernel entries, read; 2 n k^2 operations.
    """
    rng = np.random.default_rng(seed)
    n = matrix.shape[0]
    rank = min(rank, n)
    left = matrix.diagonal()
    trace = left.sum()
    F = np.zeros((n, rank))
    k = 0
    bar = tqdm(total=rank, unit="pivot", desc="preconditioner", disable=quiet or None, leave=False)
    while k < rank and left.sum() > 1e-7 * trace:
        proposed = rng.choice(n, size=min(BLOCK, rank - k), p=left / left.sum())
        columns = matrix.columns(proposed) - F[:, :k] @ F[proposed, :k].T
        pivots = _thin(columns[proposed], left[proposed], rng)
        if not pivots:  # what is left is rounding
            break
        block = columns[np.ix_(proposed[pivots], pivots)]
        lower = cholesky((block + block.T) / 2, lower=True)
        F[:, k:k + len(pivots)] = solve_triangular(lower, columns[:, pivots].T, lower=True).T
        left = np.maximum(left - np.einsum("nk,nk->n", *2 * [F[:, k:k + len(pivots)]]), 0)
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


def eigenpairs(F):
    """U (n, k) orthonormal and S^2 (k,) ascending with F F^T = U diag(S^2) U^T, from the k x k matrix
    F^T F; that squares the condition of F, which `partial_cholesky` bounds. Cost: 4 n k^2."""
    S2, V = np.linalg.eigh(F.T @ F)
    return F @ (V / np.sqrt(S2)), S2


def low_rank(matrix, ridge, rank=None, seed=0, factor=None):
    """P = U (S^2 + ridge) U^T + (s^2 + ridge) (I - U U^T), where F = U S V^T and s = min S.

    F is `partial_cholesky(matrix, rank, seed)`; factor: its `eigenpairs`, where one F serves many
    ridges and the other arguments are not needed. Inside the span of F, P is F F^T + ridge I, inverted
    on its eigenvalues (Woodbury's formula, where nothing cancels). Outside, F F^T + ridge I is only
    ridge, far below K; the smallest eigenvalue found is a better guess (Frangella, Tropp, Udell 2021):
    on CIFAR-10 kernels a condition number up to four orders lower.
    Returns precondition: (n, c) -> (n, c).   For kernels: Diaz, Epperly, Frangella, Tropp, Webber 2023.
    """
    U, S2 = eigenpairs(partial_cholesky(matrix, rank, seed)) if factor is None else factor
    outside = S2[0] + ridge
    shrink = (1 - outside / (S2 + ridge))[:, None]
    return lambda r: (r - U @ (shrink * (U.T @ r))) / outside
