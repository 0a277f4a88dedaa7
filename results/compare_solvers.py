"""(K + ridge I) X = Y by this repository and by others, to the same true residual: steps and seconds.

  none, jacobi, rank k    pcg.py with the preconditioners of pcg.py; k automatic or given;
                          K in float32 tiles, the upper half; seconds include the preconditioner
  Cholesky                scipy.linalg.cho_factor and cho_solve, K dense in float64
  jax cg                  jax.scipy.sparse.linalg.cg under jit, K dense in float64; compiled before
  linear_operator         its linear_cg, rank 15 (its default) and larger ones of its pivoted Cholesky, K
                          dense in float64; GPyTorch's solver. Left out where it is not installed:
                          pip install linear_operator

Y is one-hot, ten columns. The stopping rules of the last two are over all columns together: they are
called with ever smaller tolerances, and the first with which |y - A x| <= tol |y| holds in every column
counts, not the search for it. Medians of --repeats rounds over all methods; what takes ten seconds is
called once.

    python compare_solvers.py --data DIR --n 10000                      fc, NTK
    python compare_solvers.py --data DIR --n 2048 --kernel myrtle5 --kind nngp --store STORE
"""

import argparse
import dataclasses
import statistics
import sys
import time

import jax
import numpy as np
from scipy.linalg import cho_factor, cho_solve

import data
import kernel
import regression
import tiles
from large import plan, processes, store
from train_cifar import ENGINES  # fused where it is there

MOST = 5000  # steps allowed
GIVE_UP = 300  # seconds of a call after which no smaller tolerance is tried
EXACT = {"eps": 1e-30, "stop_updating_after": 1e-30}  # of linear_operator: with 1e-10, its own, it stalls above 1e-6


def ours(name, rank=None):
    def run(K, A, y, ridge, tol):
        solver = regression.Solver(K, name, rank, [ridge / K.diagonal().mean()], tol, y.shape[1], max_iters=MOST)
        alpha, info = solver(y, ridge / solver.scale, tol)
        return alpha, info.iterations, solver.rank
    return run


def cholesky(K, A, y, ridge, tol):
    A = A.copy().T  # LAPACK's order; A is symmetric
    A[np.diag_indices(len(A))] += ridge
    return cho_solve(cho_factor(A, lower=True, overwrite_a=True, check_finite=False), y), None, None


def jax_cg(K, A, y, ridge, tol):
    return np.asarray(_jax_cg(jax.numpy.asarray(A), y, ridge, tol)), None, None


@jax.jit
def _jax_cg(A, y, ridge, tol):
    return jax.scipy.sparse.linalg.cg(lambda v: A @ v + ridge * v, y, tol=tol, maxiter=MOST)[0]


def linear_operator_cg(rank):
    def run(K, A, y, ridge, tol):
        import torch
        from linear_operator import operators, settings
        from linear_operator.utils.linear_cg import linear_cg
        A, steps = torch.from_numpy(A), []

        def product(v):
            steps.append(v)
            return A @ v + ridge * v
        with settings.max_preconditioner_size(rank), settings.min_preconditioning_size(1):
            P = operators.AddedDiagLinearOperator(
                operators.DenseLinearOperator(A),
                operators.ConstantDiagLinearOperator(torch.tensor([ridge], dtype=A.dtype), len(A)))._preconditioner()[0]
            alpha = linear_cg(product, torch.from_numpy(y), tolerance=tol, max_iter=MOST, preconditioner=P, **EXACT)
        return alpha.numpy(), len(steps) - 1, None  # the first product is for the start
    return run


def methods(n, ranks):
    """{name: function}, those that can be run here."""
    out = {"Cholesky": cholesky, "jax cg": jax_cg, "none": ours("none"), "jacobi": ours("jacobi")}
    out.update({f"rank {k}": ours("lowrank", k) for k in ranks if k < n}, **{"rank chosen": ours("lowrank")})
    try:
        import linear_operator  # noqa: F401
        out.update({f"linear_operator rank {k}": linear_operator_cg(k) for k in (15, *ranks[:2]) if k < n})
    except ModuleNotFoundError:
        print("linear_operator is not installed: its rows are left out", file=sys.stderr)
    return out


def reach(run, K, A, y, ridge, tol):
    """The first call of `run` whose every column has |y - A x| <= tol |y|: (tolerance it was asked for,
    seconds, steps, rank); None where no tolerance does that."""
    for asked in tol * 10.0 ** -np.arange(0, 4.5, 0.5):
        start = time.perf_counter()
        alpha, steps, rank = run(K, A, y, ridge, float(asked))
        seconds = time.perf_counter() - start
        residual = np.linalg.norm(y - A @ alpha - ridge * alpha, axis=0) / np.linalg.norm(y, axis=0)
        if residual.max() <= tol:
            return float(asked), seconds, steps, rank
        if seconds > GIVE_UP:
            break
    return None


def measure(runs, K, A, y, ridge, tol, repeats):
    """{method: (median seconds, steps, rank)}, None where tol was not reached, of {method: function}.

    Round by round, every method in each, for the speed of a machine changes by the minute. The first
    round may compile and counts only for what takes ten seconds, which is called no more.
    """
    first = {name: reach(run, K, A, y, ridge, tol) for name, run in runs.items()}
    taken = {name: [call[1]] if call and call[1] > 10 else [] for name, call in first.items()}
    for _ in range(repeats):
        for name, call in first.items():
            if call and call[1] <= 10:
                start = time.perf_counter()
                runs[name](K, A, y, ridge, call[0])
                taken[name].append(time.perf_counter() - start)
    return {name: call and (statistics.median(taken[name]), *call[2:]) for name, call in first.items()}


def problem(args):
    """K as a TiledMatrix and y, one-hot."""
    x, labels, _, _ = data.load("cifar10" if args.data else "digits", args.data, args.n, 1)
    x, y = np.asarray(data.whitening("channel", x)()(x)), data.one_hot(labels)
    if not args.store:
        return tiles.gram(ENGINES[next(iter(ENGINES))](args.kernel, args.kind), x), y
    kept = store.Store(args.store)
    K = tiles.empty(args.n, args.n, kept.about["tile"], True)
    missing = set(K.keys()) - set(kept.lines)
    if missing:
        raise ValueError(f"{args.store} lacks {len(missing)} of the {len(list(K.keys()))} tiles of n = {args.n}: "
                         "let train_cifar.py finish them")
    return dataclasses.replace(K, tiles={key: kept[key].copy() for key in K.keys()}).merged(), y


def cell(name, result):
    """One cell of the table."""
    if result is None:
        return "not reached"
    seconds, steps, rank = result
    return (("" if steps is None else f"{steps:,}, ") + plan.hours(seconds)
            + (f" (rank {rank})" if name == "rank chosen" else ""))


def main(argv=None):
    """Print the table, and return {(method, ridge): (seconds, steps, rank)}."""
    parser = argparse.ArgumentParser(description="Solvers compared on the kernel of CIFAR-10 or digits.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="CIFAR-10's folder; None is scikit-learn's digits")
    parser.add_argument("--n", type=int, default=1000, help="images")
    parser.add_argument("--kernel", default="fc", choices=kernel.IMAGES)
    parser.add_argument("--kind", default="ntk", choices=kernel.KINDS)
    parser.add_argument("--store", metavar="DIR", help="tiles of this K that train_cifar.py has made")
    parser.add_argument("--ranks", default="100,300,1000", help="to compare with the rank chosen")
    parser.add_argument("--ridges", default="1e-6,1e-4,1e-2", help="relative to mean(diag K)")
    parser.add_argument("--tol", type=float, default=1e-6, help="true residual of every column")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", metavar="NAME,...", help="these methods only")
    args = parser.parse_args(argv)
    ridges = [float(ridge) for ridge in args.ridges.split(",")]
    runs = methods(args.n, [int(k) for k in args.ranks.split(",")])
    unknown = set(args.only.split(",")) - set(runs) if args.only else ()
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: expected some of {', '.join(runs)}")
    runs = {name: run for name, run in runs.items() if not args.only or name in args.only.split(",")}

    K, y = problem(args)
    A, results = K.dense().astype(np.float64), {}
    for ridge in ridges:
        found = measure(runs, K, A, y, ridge * K.diagonal().mean(), args.tol, args.repeats)
        results.update({(name, ridge): found[name] for name in runs})
        print(f"ridge {ridge:g}: " + "; ".join(f"{name} {cell(name, found[name])}" for name in runs), file=sys.stderr)
    print(f"{args.kernel} {args.kind}, n = {args.n:,}, residual {args.tol:g}, median of {args.repeats}, "
          f"{tiles.cores()} cores, {jax.local_devices()[0].device_kind}\n")
    print("| method | " + " | ".join(f"ridge {ridge:g}: steps, seconds" for ridge in ridges) + " |")
    print("| --- |" + " ---: |" * len(ridges))
    for name in runs:
        print(f"| {name} | " + " | ".join(cell(name, results[name, ridge]) for ridge in ridges) + " |")
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", tiles.cores())
    with processes.guard(ValueError, OSError, MemoryError, ArithmeticError):
        main()
