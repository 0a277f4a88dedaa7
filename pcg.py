"""Preconditioned conjugate gradients for (K + ridge I) X = Y, many right sides at once.

K is only ever multiplied by (n, c) arrays. Every vector is float64, whatever the tiles are.

  n  rows     c  right sides     A = K + ridge I     P  preconditioner, P ~ A
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
  3) a column that rounding keeps from the tolerance is noticed and left, with what it has reached;
  4) the Lanczos matrix behind the coefficients is kept: condition numbers for free;
  5) negative curvature is an error, for then A is not positive definite and X means nothing; so is one that
     is zero but for rounding, whose sign depends on the processor; a few steps of Lanczos' method say how
     much ridge is missing.

    X, info = pcg.solve(K.matvec, Y, ridge, precondition.low_rank(K)(ridge))

Cost: a step is one product with K and one with P^-1.      Proved by: test_all.py, section pcg
"""

import time
import warnings
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal
from tqdm import tqdm

SINGULAR = 1e-14  # of the largest <d, A d> / <d, d>: one below it is rounding
CHECK = 20  # steps between true residuals: one product more in twenty


class Info(NamedTuple):
    """What a solve can show for itself."""
    iterations: int  # products of K with all columns, those for true residuals left out
    residual: np.ndarray  # (c,) |y - A x| / |y| of each column, of the x that is returned
    converged: bool  # every residual <= tol
    history: list  # largest residual over the columns, before the first step and after each
    condition: float  # of P^-1 A, largest over smallest Ritz value: a lower bound
    seconds: float  # of this call, and in products with K
    product_seconds: float
    products: int  # with K, those for true residuals too


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
    """K + ridge I has an eigenvalue <= 0.  cure: an absolute ridge with which it has none."""

    def __init__(self, message, cure):
        super().__init__(message)
        self.cure = cure


def solve(matvec, y, ridge=0.0, precondition=None, tol=1e-6, max_iters=1000, x0=None, quiet=True,
          checkpoint=None):
    """X with |Y - (K + ridge I) X| <= tol |Y| in every column.

    matvec: (n, c) -> (n, c), the product with K, symmetric positive semidefinite.
    y: (n, c) or (n,).   ridge: >= 0, absolute.   precondition: (n, c) -> (n, c), P^-1; None is I.
    x0: where to start, shaped as y.   checkpoint: has load() -> {name: array} or None and
    save({name: array}, finished), as store.Checkpoint; a solve goes on from what it has.
    Returns X, float64, shaped as y, and Info.
    Warns where tol is not reached. Raises ValueError: shapes, NaN in y or K, ridge < 0.
    Indefinite: a direction with <d, A d> <= 0, or so little above that rounding may have put it there.
    """
    begun, shape, y = time.perf_counter(), np.shape(y), np.array(y, np.float64).reshape(len(y), -1)
    if not np.isfinite(y).all() or not ridge >= 0:
        raise ValueError(f"y has {np.sum(~np.isfinite(y))} entries that are not finite, ridge is "
                         f"{ridge}: y must be finite and ridge >= 0")
    spent = []

    def product(v):
        start = time.perf_counter()
        out = matvec(v) + ridge * v
        spent.append(time.perf_counter() - start)
        if not np.isfinite(out).all():
            raise ValueError(f"product {len(spent)} with K has {np.sum(~np.isfinite(out))} entries that are not "
                             "finite: look for NaN or infinity in K and in the preconditioner")
        return out

    def relative(residual):
        return np.linalg.norm(residual, axis=0) / scale

    precondition = precondition or (lambda r: r)
    scale = np.linalg.norm(y, axis=0)
    scale[scale == 0] = 1  # a zero column is solved by zero
    saved = checkpoint.load() if checkpoint else None
    state = (State(**{name: list(saved[name]) if kind is list else saved[name]
                      for name, kind in State.__annotations__.items()}) if saved
             else _begin(product, y, precondition, relative, tol, x0))
    x, r, d, rz, active, stepping, restarted, history, alphas, betas = state
    bar = tqdm(total=max_iters, initial=len(alphas), unit="step", desc="solve", disable=quiet or None,
               leave=False)
    highest = 0.0  # Rayleigh quotient, at most the largest eigenvalue
    known = False  # whether `residual` is the true one of x
    while active.any() and len(alphas) < max_iters:
        q = product(d)
        curvature = _dot(d, q)
        quotient = curvature[stepping] / _dot(d, d)[stepping]
        highest = max(highest, quotient.max(initial=0))
        if np.any(quotient <= SINGULAR * highest):
            bar.close()
            raise _indefinite(product, d[:, stepping], curvature[stepping], ridge, len(alphas) + 1)
        alpha = np.divide(rz, curvature, out=np.zeros_like(rz), where=stepping)
        x += alpha * d
        r -= alpha * q
        residual, lost = relative(r), np.zeros_like(active)
        stepping = active & (residual > tol)  # the others wait for the next true residual
        known = len(alphas) % CHECK == CHECK - 1 or not stepping.any()
        if known:
            true = y - product(x)
            residual = relative(true)
            lost = active & (residual > tol) & (~stepping | (relative(true - r) > 0.1 * residual))
            active = active & (residual > tol) & ~(lost & (residual > restarted / 2))
            restarted[lost] = residual[lost]
            r[:, lost] = true[:, lost]
            stepping = active
        z = precondition(r)
        rz_before, rz = rz, _dot(r, z)
        beta = np.divide(rz, rz_before, out=np.zeros_like(rz), where=stepping & ~lost)
        d = z + beta * d
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
        residual = relative(y - product(x))
    info = Info(len(alphas), residual, bool((residual <= tol).all()), history,
                _condition(np.array(alphas), np.array(betas)), time.perf_counter() - begun,
                sum(spent), len(spent))
    if not info.converged:
        _warn(info, tol, active.any())
    return x.reshape(shape), info


def _dot(a, b):
    return np.einsum("nc,nc->c", a, b)


def _begin(product, y, precondition, relative, tol, x0):
    """The state before the first step."""
    x = np.zeros_like(y) if x0 is None else np.array(x0, np.float64).reshape(y.shape)
    r = y - product(x) if x.any() else y.copy()
    residual = relative(r)
    z = precondition(r)
    return State(x, r, z.copy(), _dot(r, z), residual > tol, residual > tol,
                 np.full(y.shape[1], np.inf), [float(residual.max())], [], [])


def _warn(info, tol, unfinished):
    reached, steps = info.residual.max(), info.iterations
    why = ("Raise --max_iters, --rank or --ridge" if unfinished else
           f"{np.sum(info.residual > tol)} of {len(info.residual)} columns stopped falling: in float64, at "
           f"condition {info.condition:.0e}, rounding allows no more. Raise --ridge or --rank")
    warnings.warn(f"not converged: residual {reached:.1e} after {steps} steps, asked for {tol:.0e}. {why}, "
                  "or ask for less with --tol.", stacklevel=3)


def _indefinite(product, d, curvature, ridge, step):
    """The error for directions d with <d, A d> = curvature <= 0, with a ridge that would have done.

    Lanczos' method from the worst of them finds the lowest eigenvalue of A, or nearly: half of it is
    added on top, and a millionth of the largest where it is zero.
    """
    quotient = curvature / np.maximum(_dot(d, d), 1e-300)
    lowest, highest = _extremes(product, d[:, quotient.argmin()])
    lowest = min(lowest, quotient.min())
    cure = ridge + max(-1.5 * lowest, 1e-6 * highest)
    return Indefinite(
        f"K + ridge I is not positive definite: with an absolute ridge of {ridge:.2e} it has an eigenvalue "
        f"of {lowest:.1e} (found at step {step}). Rows that are alike make K singular, and rounding of its "
        f"entries less than that. Raise the ridge to {cure:.1e} or more", cure)


def _extremes(product, start, steps=40):
    """The lowest and the highest eigenvalue of A projected on {start, A start, ...}: Lanczos' method."""
    basis, main, beside = [start / np.linalg.norm(start)], [], []
    for _ in range(min(steps, len(start))):
        w = product(basis[-1][:, None])[:, 0]
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


def draw(axes, infos):
    """Residual against step, a line for each of {name: Info}."""
    for name, info in infos.items():
        axes.plot(info.history, label=f"{name}: {info.iterations} steps, {info.seconds:.2g} s")
    axes.set(xlabel="steps (products with K)", yscale="log", ylabel="largest |y - A x| / |y| over columns")
    axes.legend(frameon=False)
