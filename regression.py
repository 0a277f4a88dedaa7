"""From a kernel matrix to predictions: the ridge, a solver, predictions.

  f(x) = k(x, X) alpha,     alpha = A^-1 Y,     A = K + lambda I,     lambda = ridge * mean(diag K)

This f is also the posterior mean of a Gaussian process with covariance k; how sure it is: own/uncertainty.py.

  n  training rows   m  test rows   c  outputs   ridge  relative to mean(diag K), so that it means the same for every kernel

Nothing is computed again for another ridge: K, the preconditioner's columns of it, and each product with K serve all ridges
that are compared.

    alpha, f, result, solver = regression.fit(K, K_test, y, [0.01, 0.1, 1.0], "loo")

Proved by: test_all.py, section regression
"""

import time
from contextlib import contextmanager

import numpy as np

import choose
import pcg
from tiles import LOG

TINY = 1e-100  # a ridge of 0 counts as this
EVERY = 3  # of the ridges that are compared, one in so many is solved first
LARGE = 2 * choose.DENSE  # rows of K from which not all ridges are compared
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
            n, ridges = K.shape[0], np.sort(np.atleast_1d(ridges)) * self.scale
            solves = [(ridge, choose.SEARCH) for ridge in ridges if len(ridges) > 1]
            product = 0 if rank else 2 * n * n * c * K.slowness  # which may have to be measured
            block = 4 * pcg.BLOCK if K.reads_all else pcg.block(n)
            worth = None if rank else _worth(
                n, solves + [(ridges[len(ridges) // 2], tol)], product, K.reads_all * product / block, c)
            rank = rank or (None if worth else max(1, min(n // 8, 1000)))  # simple and safe, where nothing is known of costs
            self.ready = pcg.low_rank(K, rank, seed, worth, block, quiet)
        elif ready is None:
            self.ready = PRECONDITIONERS[name](K)
        self.rank, self.begun, self.whole = getattr(self.ready, "rank", None), {}, None

    def leading(self, n):
        """The Solver of the leading n x n block of K; it shares the preconditioner, and its products serve what was begun."""
        ready = self.ready.leading(n) if hasattr(self.ready, "leading") else None
        part = Solver(self.K.leading(n), self.name, max_iters=self.max_iters, quiet=self.quiet, verbose=self.verbose,
                      keep=self.keep, ready=ready, prior=self.prior[:n])
        part.whole = self if self.begun else None
        return part

    def __call__(self, y, ridge, tol=1e-6, x0=None):
        """alpha (n, c) and pcg.Info; errors as of `pcg.solve`, but in terms of the relative ridge."""
        run, self.begun = self.begun.get((ridge, tol)), {}
        found = (self._together([ridge], [run], True) if run else self.each(y, [ridge], tol, x0))[0]
        if isinstance(found, pcg.Indefinite):
            raise found
        return found

    def begin(self, y, ridges, tol):
        """Begin these solves: they go on with the products of others, and one of them is then called for."""
        self.begun = {(ridge, tol): self._run(y, ridge, self.ready(ridge * self.scale), tol) for ridge in ridges}

    def each(self, y, ridges, tol=1e-6, x0=None):
        """What a call returns for each of the ridges, or the Indefinite that it raises.

        In one pass: each product with K serves all of them. Of many ridges, first every EVERY-th and the last are solved. The
        others start from the best combination of those solutions, with the preconditioner of the nearest: most are then done
        at once.
        """
        first = [*ridges[:-1:EVERY], ridges[-1]] if len(ridges) > EVERY else ridges
        inverses = {ridge: self.ready(ridge * self.scale) for ridge in first}
        quiet = self.quiet or len(ridges) > 1
        runs = [self._run(y, ridge, inverses[ridge], tol, x0, quiet) for ridge in first]
        found = dict(zip(first, self._together(first, runs)))
        solved = [one[0] for one in found.values() if not isinstance(one, pcg.Indefinite)]
        rest, runs, starts = [ridge for ridge in ridges if ridge not in first], [], {}
        if rest and solved:
            KX = np.split(self.K.matvec(np.concatenate(solved, axis=1)), len(solved), axis=1)
            starts = {ridge: pcg.projected(solved, KX, y, ridge * self.scale) for ridge in rest}
        for ridge in rest:
            near = min(inverses, key=lambda other: abs(np.log((other + TINY) / (ridge + TINY))))
            runs.append(self._run(y, ridge, inverses[near], tol, starts.get(ridge), quiet))
        found.update(zip(rest, self._together(rest, runs)))
        return [found[ridge] for ridge in ridges]

    def _run(self, y, ridge, inverse, tol, x0=None, quiet=True):
        """A solve, begun."""
        solve = pcg.steps(y, ridge * self.scale, inverse, tol, self.max_iters, x0, quiet,
                          self.keep and self.keep(ridge=ridge, tol=tol, y=y), drop=not hasattr(self.K, "mask"))
        return pcg.Run(pcg.padded(solve, self.whole.K.shape[0]) if self.whole else solve)

    def _together(self, ridges, runs, quiet=False):
        """What these runs find, with errors in terms of the relative ridge."""
        beside, K = (self.whole.begun.values(), self.whole.K) if self.whole else ((), self.K)
        found = pcg.together(K.matvec, runs, beside, quiet or self.quiet or len(runs) < 2)
        for i, one in enumerate(found):
            if isinstance(one, pcg.Indefinite):
                cure = one.cure / self.scale
                found[i] = pcg.Indefinite(f"{one}: --ridge {cure:.1e}", cure)
        return found


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
    From LARGE rows, not all ridges are compared: only those around the best of the first rows, until the best is none of
    the outermost.
    """
    select, spectrum, table, prior = select if len(ridges) > 1 else None, None, [], options.get("prior")
    if select == "loo" or K.shape[0] <= choose.DENSE and not hasattr(K, "mask"):  # molecules/missing.py: no one spectrum
        spectrum = choose.Spectrum(K.columns(np.arange(K.shape[0])), None if prior is None else prior.mean(), intercept)
    if select == "loo":
        table = choose.leave_one_out(spectrum, y, ridges, score, copies)
    some = [choose.best(table, by).ridge] if table else ridges
    if select and not table and K.shape[0] >= LARGE and by == "mse" and not hasattr(K, "mask"):
        some = choose.around(_first_guess(K, y, ridges, copies, prior, intercept), ridges)
    solver = Solver(K, ridges=some, tol=tol, c=y.shape[1], **options)
    if select == "gcv":
        table = choose.walk(lambda some: choose.generalised(solver, y, some, options.get("seed", 0)), some, ridges, by)
    elif select == "validation":
        if len(some) <= 3 and choose.at_once(y) >= 2 * len(some) and _dear(K, y.shape[1]):
            solver.begin(y, some, tol)  # it goes on beside the search
        table = choose.walk(lambda some: choose.validation(solver, y, some, *held_out, score), some, ridges, by)
    if solver.verbose:
        print("\n".join(f"ridge {row.ridge:8.2g}: {select} {choose.describe(row)}" for row in table))
    ridge = choose.best(table, by).ridge if table else ridges[0]
    ridge = float(K.team.all_reduce(np.array([ridge * (K.team.index == 0)]))[0])  # one choice, should hosts round apart
    found = {"ridge": ridge, "select": select, "search": [list(row[:3]) for row in table]}
    try:
        row, = choose.leave_one_out(spectrum, y, [ridge], score, copies) if spectrum else [None]
    except pcg.Indefinite:  # the ridge is within the rounding of K
        row = None
    if row:
        found.update({"loo_mse": row.mse, "effective_dimension": row.dimension}, **({"loo_score": row.score} if score else {}))
    return ridge, solver, found


def _dear(K, c):
    """Whether a pass over K costs more than more columns in it, so that it pays to solve for several ridges meanwhile."""
    return K.slowness > 2 + 0.4 * c or getattr(getattr(K, "tiles", None), "direct", False)  # from a disk, past the cache


def _first_guess(K, y, ridges, copies, prior, intercept):
    """The best ridge for the first rows, a quarter of all and choose.DENSE at most, by leave-one-out."""
    n = min(K.shape[0] // 4, choose.DENSE) // copies * copies
    spectrum = choose.Spectrum(K.leading(n).columns(np.arange(n)), None if prior is None else prior.mean(), intercept)
    ridge = choose.best(choose.leave_one_out(spectrum, y[:n], ridges, copies=copies)).ridge
    return float(K.team.all_reduce(np.array([ridge * (K.team.index == 0)]))[0])


def search(K, y, ridges, select, **options):
    """[choose.Row, ...]: how good each ridge is, also where there is only one.  options: of `choose_ridge`."""
    found = choose_ridge(K, y, list(ridges) * (1 + (len(ridges) == 1)), select, **options)[2]
    return [choose.Row(*row) for row in found["search"]]


def evidence(solver, y, alpha, info):
    """How a solve went: steps, residuals, condition, rates, as fields of a result."""
    K, read = solver.K, solver.K.read_rate()
    result = {
        "rows": len(y), "rank": solver.rank, "cg_iterations": info.iterations, "cg_converged": info.converged,
        "condition": info.condition, "cg_residual": float(info.residual.max()), "cg_residuals": info.residual.tolist(),
        "cg_history": [float(f"{r:.3g}") for r in info.history], "rounding": rounding(solver, y, alpha),
        "step_seconds": info.seconds / max(1, info.iterations),
        "product_bytes_per_second": read and 4 * K.entries * info.products / info.product_seconds,
        "read_bytes_per_second": read and read * K.team.count}
    if solver.verbose:
        print(f"solve: {info.iterations} steps of {result['step_seconds']:.2g} s, rank {solver.rank or 0}, residuals "
              f"{info.residual.min():.1e} to {info.residual.max():.1e}, condition {info.condition:.3g}"
              + (f"; tiles multiplied at {result['product_bytes_per_second'] / 1e9:.2f} GB/s, read alone at "
                 f"{result['read_bytes_per_second'] / 1e9:.2f} GB/s" if read else ""))
    if solver.tol < result["rounding"] / 100 and not solver.quiet:
        print(f"note: rounding K to float32 alone makes a residual of about {result['rounding']:.0e}; steps from there to "
              f"{solver.tol:.0e} fit that rounding")
    return result


def _worth(*cost):
    """large/rank.py's model of what a rank costs and saves, or None where that room is not there."""
    try:
        from large import rank
    except ImportError:
        return None
    return rank.Worth(*cost)


def rounding(solver, y, alpha):
    """The residual that rounding K to float32 causes, |dK alpha| / |y| of the worst column, roughly.

    An entry is at most the diagonal, and off by up to ROUNDING times itself, at random:
    |dK alpha| ~ ROUNDING mean(diag K) sqrt(n / 3) |alpha|. Steps to a smaller residual fit that noise.
    """
    size = np.linalg.norm(alpha, axis=0) / np.maximum(np.linalg.norm(y, axis=0), 1e-300)
    return float(ROUNDING * solver.K.diagonal().mean() * np.sqrt(len(y) / 3) * size.max())
