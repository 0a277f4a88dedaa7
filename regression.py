"""From a kernel matrix to predictions: the ridge, a solver, predictions.

  f(x) = k(x, X) alpha,     alpha = A^-1 Y,     A = K + lambda I,     lambda = ridge * mean(diag K)

This f is also the posterior mean of a Gaussian process with covariance k; how sure it is: own/uncertainty.py.

  n  training rows   m  test rows   c  outputs   ridge  relative to mean(diag K), so that it means the same for every kernel

Nothing is computed again for another ridge: K and the preconditioner's columns of it serve all ridges that are compared, and
with large/one_pass.py each product with K does, too.

    alpha, f, result, solver = regression.fit(K, K_test, y, [0.01, 0.1, 1.0], "loo")

Proved by: test_all.py, section regression
"""

import importlib
import time
from contextlib import contextmanager

import numpy as np

import choose
import pcg
from tiles import LOG, free_memory

ROUNDING = 2.0**-24  # of a float32 entry of K, relative
PRECONDITIONERS = {"lowrank": pcg.low_rank, "jacobi": pcg.jacobi,
                   "none": pcg.none}


@contextmanager
def phase(name, seconds):
    """Adds to seconds[name] what the block takes; the log says when it begins and ends."""
    start = time.perf_counter()
    LOG.info("%s begins", name)
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    LOG.info("%s ends, %.1f s", name, time.perf_counter() - start)


class Solver:
    """(y, ridge, tol) -> alpha, info, for one K and one preconditioner of it."""

    def __init__(self, K, name="lowrank", rank=None, ridges=(), tol=1e-6, c=1, seed=0, max_iters=1000,
                 quiet=True, verbose=False, keep=None, ready=None, prior=None):
        """name: of PRECONDITIONERS.   rank, seed: of low_rank. rank None takes the rank that saves most time when `ridges` are
        compared and one is solved to `tol`, with c columns.
        keep: (ridge, tol, y) -> the checkpoint of that solve, or None.   ready: the preconditioner, if there is one already.
        prior: (n,), to whose mean ridges are relative; None is the diagonal of K.
        """
        self.prior = K.diagonal() if prior is None else prior
        self.K, self.name, self.ready, self.scale = K, name, ready, self.prior.mean()
        self.max_iters, self.quiet, self.verbose, self.keep, self.tol = max_iters, quiet, verbose, keep, tol
        if ready is None and name == "lowrank":
            size = 4 * pcg.BLOCK if K.reads_all else pcg.block(K.shape[0])
            model = _large("rank") if np.size(ridges) and not rank else None
            worth = model and model.worth(K, np.atleast_1d(ridges) * self.scale, tol, c,
                                           pcg.at_a_time(K.shape[0], size, K.team.count))
            rank = rank or (None if worth else max(1, min(K.shape[0] // 8, 1000)))  # simple, where nothing is known of costs
            self.ready = pcg.low_rank(K, rank, seed, worth, size, quiet)
        elif ready is None:
            self.ready = PRECONDITIONERS[name](K)
        self.rank = getattr(self.ready, "rank", None)
        self.drop = not hasattr(K, "mask")  # a mask (molecules/missing.py): K differs from column to column

    def leading(self, n):
        """The Solver of the leading n x n block of K; it shares the preconditioner."""
        ready = self.ready.leading(n) if hasattr(self.ready, "leading") else None
        return type(self)(self.K.leading(n), self.name, max_iters=self.max_iters, quiet=self.quiet, verbose=self.verbose,
                          keep=self.keep, ready=ready, prior=self.prior[:n])

    def __call__(self, y, ridge, tol=1e-6, x0=None):
        """alpha (n, c) and pcg.Info; errors as of `pcg.solve`, but in terms of the relative ridge."""
        absolute, checkpoint = ridge * self.scale, self.keep and self.keep(ridge=ridge, tol=tol, y=y)
        try:
            return pcg.solve(self.K.matvec, y, absolute, self.ready(absolute), tol, self.max_iters, x0, self.quiet, checkpoint,
                             self.drop)
        except pcg.Indefinite as error:
            raise self.relative(error) from None

    def relative(self, error):
        """A pcg.Indefinite in terms of the relative ridge."""
        return pcg.Indefinite(error.why, error.cure / self.scale, "relative ridge (--ridge)")

    def solutions(self, y, ridges, tol):
        """Yields [(ridge, alpha), ...] from the largest ridge, the easiest, down. Ends at a ridge for which A is not positive
        definite; raises pcg.Indefinite if that is the largest.

        It does not stop at the first rise of the error: with pooling the error rises before it falls."""
        for ridge in sorted(set(ridges), reverse=True):
            try:
                alpha, _ = self(y, ridge, tol)
            except pcg.Indefinite as error:
                if ridge == max(ridges):
                    raise
                if self.verbose:
                    print(f"ridge {ridge:.2g}: {error}")
                return
            yield [(ridge, alpha)]


def fit(K, K_test, y, ridges, select="loo", tol=1e-6, **options):
    """Choose the ridge, solve, predict: alpha (n, c), f (m, c), the evidence as {name: value}, and the Solver.

    options: of `choose_ridge`.
    """
    seconds = {}
    with phase("ridge", seconds):
        ridge, solver, found = choose_ridge(K, y, ridges, select, tol=tol, **options)
    with phase("solve", seconds):
        alpha, info = solver(y, ridge, tol)
    with phase("predict", seconds):
        f = K_test.matvec(alpha)
    return alpha, f, {**found, **evidence(solver, y, alpha, info), "seconds": seconds}, solver


def choose_ridge(K, y, ridges, select="loo", score=None, held_out=None, copies=1, by="mse", tol=1e-6, intercept=False,
                 **options):
    """The best of the ridges, a Solver for it, and what was measured, as fields of a result.

    select: of choose.CRITERIA; one ridge needs no choice.   held_out: for validation, (n_fit, rows held out) as
    `choose.validation` takes them.   score, copies, by, intercept: as in choose.py.   tol: of the solve to come.   options:
    of `Solver`.   Up to choose.DENSE rows the fields hold the leave-one-out error of the best ridge, however it was chosen.
    """
    select, spectrum, table, prior = select if len(ridges) > 1 else None, None, [], options.get("prior")
    if select == "loo" or K.shape[0] <= choose.DENSE and not hasattr(K, "mask"):  # a mask: no single spectrum
        if select == "loo" and 40 * K.shape[0]**2 > free_memory():
            raise MemoryError(f"leave-one-out needs the eigenvectors of K: {40e-9 * K.shape[0]**2:.1f} GB of memory for "
                              f"{K.shape[0]:,} rows; this host has {free_memory() / 1e9:.1f} GB free. Choose the ridge by "
                              "validation (--select)")
        spectrum = choose.Spectrum(K.columns(np.arange(K.shape[0])), None if prior is None else prior.mean(), intercept)
    if select == "loo":
        table = choose.leave_one_out(spectrum, y, ridges, score, copies)
    many, some = _large("one_pass"), [agreed(K, choose.best(table, by).ridge)] if table else ridges
    if many and select and not table:
        some = many.first(K, y, ridges, copies, by, prior, intercept)
    solver = solver_class()(K, ridges=some, tol=tol, c=y.shape[1], **options)
    compare = {"gcv": lambda some: choose.generalised(solver, y, some, options.get("seed", 0), intercept),
               "validation": lambda some: choose.validation(solver, y, some, *held_out, score, intercept)}.get(select)
    if compare:
        begin = tol if select == "validation" else None
        table = many.walk(solver, y, compare, some, ridges, by, begin) if many else compare(ridges)
    if solver.verbose:
        print("\n".join(f"ridge {row.ridge:8.2g}: {select} {choose.describe(row)}" for row in table))
    ridge = agreed(K, choose.best(table, by).ridge if table else ridges[0])
    found = {"ridge": ridge, "select": select, "search": [list(row[:3]) for row in table]}
    try:
        row, = choose.leave_one_out(spectrum, y, [ridge], score, copies) if spectrum else [None]
    except pcg.Indefinite:  # the ridge is within the rounding of K
        row = None
    if row:
        found.update({"loo_mse": row.mse, "effective_dimension": row.dimension}, **({"loo_score": row.score} if score else {}))
    return ridge, solver, found


def agreed(K, ridge):
    """Process 0's choice, in all processes of K: hosts may round apart."""
    return float(K.team.all_reduce(np.array([ridge * (K.team.index == 0)]))[0])


def search(K, y, ridges, select, **options):
    """[choose.Row, ...]: how good each ridge is, also where there is only one.  options: of `choose_ridge`."""
    twice = list(ridges) * (1 + (len(ridges) == 1))  # a single one too is measured if it is given twice
    found = choose_ridge(K, y, twice, select, **options)[2]
    return [choose.Row(*row) for row in found["search"]]


def evidence(solver, y, alpha, info):
    """How a solve went: steps, residuals, condition, rates, as fields of a result."""
    K, read = solver.K, solver.K.read_rate()
    result = {
        "rows": len(y), "rank": solver.rank, "cg_iterations": info.iterations, "cg_converged": info.converged,
        "condition": info.condition, "cg_residual": float(info.residual.max()), "cg_residuals": info.residual.tolist(),
        "cg_history": [float(f"{r:.3g}") for r in info.history], "rounding": rounding(solver, y, alpha),
        "step_seconds": info.seconds / max(1, info.products),
        "product_bytes_per_second": 4 * K.entries * info.products / info.product_seconds if read and info.products else None,
        "read_bytes_per_second": read and read * K.team.count}
    if solver.verbose:
        print(f"solve: {info.iterations} steps of {result['step_seconds']:.2g} s, rank {solver.rank or 0}, residuals "
              f"{info.residual.min():.1e} to {info.residual.max():.1e}, condition {info.condition:.3g}"
              + (f"; tiles multiplied at {result['product_bytes_per_second'] / 1e9:.2f} GB/s, read alone at "
                 f"{result['read_bytes_per_second'] / 1e9:.2f} GB/s" if result["product_bytes_per_second"] else ""))
    if solver.tol < result["rounding"] / 100 and not solver.quiet:
        print(f"note: rounding K to float32 alone makes a residual of about {result['rounding']:.0e}; steps from there to "
              f"{solver.tol:.0e} fit that rounding")
    return result


def solver_class():
    """Solver, or with large/ the one that solves for several ridges at once."""
    many = _large("one_pass")
    return many.Solver if many else Solver


def _large(name):
    """A file of large/, or None where that room is not there."""
    try:
        return importlib.import_module(f"large.{name}")
    except ImportError:
        return None


def rounding(solver, y, alpha):
    """The residual that rounding K to float32 causes, |dK alpha| / |y| of the worst column, roughly.

    An entry is at most the diagonal, and off by up to ROUNDING times itself, at random:
    |dK alpha| ~ ROUNDING mean(diag K) sqrt(n / 3) |alpha|. Steps to a smaller residual fit that noise.
    """
    size = np.linalg.norm(alpha, axis=0) / np.maximum(np.linalg.norm(y, axis=0), 1e-300)
    return float(ROUNDING * solver.K.diagonal().mean() * np.sqrt(len(y) / 3) * size.max())
