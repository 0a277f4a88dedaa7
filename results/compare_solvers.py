"""(K + ridge I) X = Y solved by this repository and by others, to the same true residual: steps and seconds.

  none, jacobi, rank k    pcg.py with its preconditioners; k is given, or chosen automatically ("rank chosen");
                          K is the upper half in float32 tiles; the seconds include making the preconditioner
  Cholesky                scipy.linalg.cho_factor and cho_solve, K dense in float64
  jax cg                  jax.scipy.sparse.linalg.cg under jit, K dense in float64; compiled before it is timed if
                          it takes less than ten seconds
  linear_operator         GPyTorch's solver, linear_cg, with its pivoted Cholesky of rank 15 (its default) and larger,
                          K dense in float64. Left out if it is not installed: pip install linear_operator

Y is one-hot, ten columns. jax cg and linear_operator stop on all columns together. They are therefore called with smaller and
smaller tolerances until |y - A x| <= tol |y| holds in every column; only the call that reaches this is timed. Seconds are
medians over --repeats rounds, each of which calls all methods; a method that takes over ten seconds is called once.

    python -m results.compare_solvers --data DIR --n 10000                      fc, NTK
    python -m results.compare_solvers --data DIR --n 2048 --kernel myrtle5 --kind nngp --store STORE
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time

import jax
import numpy as np
from scipy.linalg import cho_factor, cho_solve

import data
import experiment
import kernel
import regression
import tiles
from large import plan, store
from train_cifar import ENGINES  # the fused engine first, if fast/ is there

MOST = 5000  # most steps of a solver
GIVE_UP = 300  # if a call takes longer, in seconds, no smaller tolerance is tried
EXACT = {"eps": 1e-30, "stop_updating_after": 1e-30}  # for linear_operator: its default 1e-10 stalls above 1e-6


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
        return alpha.numpy(), len(steps) - 1, None  # the first product computes the initial residual
    return run


def methods(n, ranks):
    """{name: function (K, A, y, ridge, tol) -> (solution, steps, rank)} of the methods that can run here."""
    out = {"Cholesky": cholesky, "jax cg": jax_cg, "none": ours("none"), "jacobi": ours("jacobi")}
    out.update({f"rank {k}": ours("lowrank", k) for k in ranks if k < n}, **{"rank chosen": ours("lowrank")})
    try:
        import linear_operator  # noqa: F401
        out.update({f"linear_operator rank {k}": linear_operator_cg(k) for k in (15, *ranks[:2]) if k < n})
    except ModuleNotFoundError:
        print("linear_operator is not installed, so its rows are left out: pip install linear_operator", file=sys.stderr)
    return out


def reach(run, K, A, y, ridge, tol):
    """(tolerance asked for, seconds, steps, rank) of the first call of `run` that reaches |y - A x| <= tol |y| in every
    column; None if no tolerance does."""
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
    """{method: function} -> {method: (median seconds, steps, rank)}, None for a method that did not reach tol.

    Every round calls every method, because the speed of a machine varies from minute to minute. The first round may include
    compilation. It counts only for methods that take over ten seconds, which are not called again.
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
    """K as a TiledMatrix, and y, one-hot."""
    x, labels, _, _ = data.load("cifar10" if args.data else "digits", args.data, args.n, 1)
    y = data.one_hot(labels)
    if not args.store:
        x = np.asarray(data.whitening("channel", x)()(x))
        return tiles.gram(ENGINES[next(iter(ENGINES))](args.kernel, args.kind), x), y
    kept = store.Store(os.path.join(args.store, f"train-{args.kind}"))
    layers = json.loads(json.dumps(kernel.network(args.kernel)))
    rows = store.inputs(kept.folder, "rows", kept.about)[:args.n]
    if kept.about["layers"] != layers or "flips" in kept.about or not np.array_equal(rows, store.digests(x)):
        raise ValueError(f"{kept.folder} holds another matrix than {args.kernel} of the first {args.n} images of seed 0")
    K = tiles.empty(args.n, args.n, kept.about["tile"], True)
    missing = set(K.keys()) - set(kept.lines)
    if missing:
        raise ValueError(f"{kept.folder} lacks {len(missing)} of the {len(list(K.keys()))} tiles for n = {args.n}; "
                         "compute them with train_cifar.py")
    whiten = f"{kept.about['whiten']} {kept.about.get('zca_eps') or ''}"
    print(f"{kept.folder}: images whitened by {whiten.strip()}", file=sys.stderr)
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
    parser = argparse.ArgumentParser(description="Compare solvers on a kernel matrix of CIFAR-10 or digits.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder of CIFAR-10; None: scikit-learn's digits")
    parser.add_argument("--n", type=int, default=1000, help="number of images")
    parser.add_argument("--kernel", default="fc", choices=kernel.IMAGES)
    parser.add_argument("--kind", default="ntk", choices=kernel.KINDS)
    parser.add_argument("--store", metavar="DIR", help="--store of a run of train_cifar.py that has computed this K")
    parser.add_argument("--ranks", default="100,300,1000", help="ranks to compare with the rank that is chosen")
    parser.add_argument("--ridges", default="1e-6,1e-4,1e-2", help="ridges, relative to mean(diag K)")
    parser.add_argument("--tol", type=float, default=1e-6, help="true residual to reach in every column, |y - A x| / |y|")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over which the median is taken")
    parser.add_argument("--only", metavar="NAME,...", help="compare only these methods")
    args = parser.parse_args(argv)
    try:
        ridges, ranks = [float(ridge) for ridge in args.ridges.split(",")], [int(k) for k in args.ranks.split(",")]
    except ValueError as error:
        parser.error(f"{error}: --ridges expects numbers and --ranks whole numbers, separated by commas")
    if min(args.repeats, args.n, *ranks) < 1 or min(ridges) < 0 or not 0 < args.tol < 1:
        parser.error("expected --repeats, --n and --ranks of at least 1, --ridges >= 0 and --tol between 0 and 1")
    runs = methods(args.n, ranks)
    unknown = set(args.only.split(",")) - set(runs) if args.only else ()
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: expected some of {', '.join(runs)}")
    runs = {name: run for name, run in runs.items() if not args.only or name in args.only.split(",")}

    K, y = problem(args)
    A, results = K.dense().astype(np.float64), {}
    for ridge in ridges:
        measured = measure(runs, K, A, y, ridge * K.diagonal().mean(), args.tol, args.repeats)
        results.update({(name, ridge): measured[name] for name in runs})
        print(f"ridge {ridge:g}: " + "; ".join(f"{name} {cell(name, measured[name])}" for name in runs), file=sys.stderr)
    print(f"{args.kernel} {args.kind}, n = {args.n:,}, residual {args.tol:g}, median of {args.repeats}, "
          f"{tiles.cores()} cores, {jax.local_devices()[0].device_kind}\n")
    print("| method | " + " | ".join(f"ridge {ridge:g}: steps, seconds" for ridge in ridges) + " |")
    print("| --- |" + " ---: |" * len(ridges))
    for name in runs:
        print(f"| {name} | " + " | ".join(cell(name, results[name, ridge]) for ridge in ridges) + " |")
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    with experiment.guard(ValueError, OSError, MemoryError, ArithmeticError):
        main()
