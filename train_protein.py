"""Kernel regression with an infinitely wide network on proteins: from a sequence to a number, top to bottom.

  f(x) = k(x, X) (K + lambda I)^-1 y,   K = k(X, X),   lambda = ridge * mean(diag K)

the same tiles and solver as for images (train_cifar.py), other kernels (kernel.SEQUENCES). y is the measured
fitness, or a monotone function of it. Encoding of residues, that function and ridge are chosen on validation rows,
which are part of the training set (FLIP names them; else its last fifth): ridge by mean squared error, for its curve
is smooth, encoding and function by Spearman's correlation, for it is the same for every function. Then all training
rows are fitted, and the test rows are looked at once. proteins.py says what the data, encodings and functions are.

  python train_protein.py                                     1,296 made sequences, ten seconds, no file needed
  python train_protein.py --split two_vs_rest --data DIR      FLIP's GB1; --help says what DIR must hold
  python train_protein.py --split three_vs_rest --data DIR --kernel seq_cnn --kind both
  python train_protein.py --split two_vs_rest --data DIR --kernel linear --encoding centred --target raw --ridge 1
  python train_protein.py --split landscape --data DIR --kernel seq_cnn --sizes 1000,2000,4000,8000,16000
"""

import argparse
from functools import lru_cache, partial

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

import command
import kernel
import lazy
import proteins
import regression
import runs
import tiles

try:
    from fused import kernel_fn as engine
except ModuleNotFoundError:  # fused.py may be deleted: then kernel.py computes the same, slowly
    from kernel import kernel_fn as engine

COMPARED = 4096  # rows on which encodings and functions of the target are compared, at most
WHERE = ("data", "out", "quiet", "store", "sizes", "devices")  # not what was computed: not recorded


def flags():
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Exact kernel regression with infinitely wide networks on proteins.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"FLIP's files: {' and '.join(sorted({archive for archive, _ in proteins.FILES.values()}))}, from "
               f"{proteins.SOURCE} (there without flip_gb1_). --data is the folder they are in, packed or not.")
    rows = parser.add_argument_group("sequences")
    rows.add_argument("--split", default="made", choices=proteins.SPLITS)
    rows.add_argument("--data", metavar="DIR", help="folder that holds FLIP's files")
    rows.add_argument("--n_train", type=int, help="training rows of landscape and made; None is all")
    rows.add_argument("--sizes", metavar="N,N,...", help="solve for these many training rows too, the first ones of "
                      "n_train, on blocks of the same kernel; encoding and target are chosen for the smallest")
    rows.add_argument("--n_test", type=int, help="test rows, the first ones; None is all")
    rows.add_argument("--encoding", default="auto", choices=["auto", *proteins.ENCODINGS])
    rows.add_argument("--target", default="auto", choices=["auto", *proteins.TARGETS],
                      help="function of the target to regress on; its inverse is applied to predictions")
    network = parser.add_argument_group("kernel")
    network.add_argument("--kernel", default="seq_cnn", choices=[*kernel.SEQUENCES, "linear"],
                         help="linear: <x, x'>, ridge regression; its --ridge is lambda itself, scikit-learn's alpha")
    network.add_argument("--kind", default="nngp", choices=[*kernel.KINDS, "both"],
                         help="both: two runs on one pass over the kernel; choices are those of nngp")
    network.add_argument("--depth", type=int, help="hidden layers or convolutions; None is 3")
    network.add_argument("--tile", type=int, help="side of a tile of K; None: from n_train")
    network.add_argument("--store", metavar="DIR", help="keep tiles there, and go on from what is there; none: keep "
                         "no tile, compute all in every product; None: in memory")
    solver = parser.add_argument_group("solver")
    solver.add_argument("--ridge", default="auto", help="lambda / mean(diag K): a number; several, separated by "
                        "commas, or auto (10 down to 1e-6): chosen on validation rows")
    solver.add_argument("--tol", type=float, default=1e-6, help="residual |y - A x| / |y| to reach")
    solver.add_argument("--rank", type=int, help="of the preconditioner; None is as large as saves time")
    solver.add_argument("--variance", action="store_true", help="predictive variance too, a solve for each test "
                        "row, and its calibration; nngp only")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="of the order of training rows, and of pivots")
    run.add_argument("--devices", type=int, help="devices to use; None is every GPU, or else every core")
    run.add_argument("--out", default="results", metavar="DIR", help="runs.jsonl in it gets a line")
    run.add_argument("--quiet", action="store_true", help="print the result line only")
    return parser


def parse(argv):
    """The flags, checked against each other; ridge and sizes as lists of numbers."""
    parser = flags()
    args = parser.parse_args(argv)
    command.check(parser, args, "n_test", "rank", "devices", "tile")
    if args.split in proteins.FLIP and (args.n_train or args.sizes):
        parser.error(f"--n_train and --sizes with --split {args.split}: FLIP says which rows to train on; they are "
                     "for landscape and made")
    return args


def main(argv=None):
    """Run one experiment; returns what is written to runs.jsonl, as a dict; with --kind both a dict of these by
    kind, with --sizes by size."""
    args = parse(argv)
    run, seconds = runs.provenance(), {}
    kinds = kernel.KINDS if args.kind == "both" else (args.kind,)
    with runs.phase("data", seconds):
        split = proteins.load(args.split, args.data, args.seed, args.quiet)
        derive(args, split)
    if not args.quiet:
        print(" ".join(f"{key}={value}" for key, value in vars(args).items() if key != "ridge")
              + " ridge=" + ",".join(f"{ridge:.2g}" for ridge in args.ridge))
    with runs.phase("choose", seconds):
        compared = choose(args, split, kinds[0])
    with runs.phase("kernel", seconds):
        x = proteins.encode(split.sequences, args.encoding, args.sizes[0])
        x, x_test = x[:args.n_train], x[split.n_train:][:args.n_test]
        matrices = command.matrices(partial(network_kernel, args, x=x), kinds, {"train": x, "test": x_test}, args.store,
                                    {"kernel": args.kernel, "depth": args.depth or 3}, args.tile,
                                    devices=command.devices(args.devices), quiet=args.quiet)
    results = {kind: {} for kind in kinds}
    for kind, (K, K_test) in zip(kinds, matrices):
        for n in args.sizes:
            blocks = [block.leading(n).merged() for block in (K, K_test)]
            result = {**experiment(args, kind, *blocks, split, n, x_test), "compared": compared,
                      "entries": sum(block.entries for block in blocks)}
            result["seconds"] = {name: round(s, 3) for name, s in {**seconds, **result["seconds"]}.items()}
            runs.record(args.out, config(args, kind, n), result, run)
            print(describe(result), flush=True)
            results[kind][n] = result
    if args.split == "made" and not args.quiet:
        print(f"These sequences are made; a linear model explains {100 * proteins.MADE_LINEAR:.0f} % of the variance "
              "at most. For a real protein: --split two_vs_rest --data DIR; --help says what DIR must hold")
    results = {kind: of if len(of) > 1 else of[args.n_train] for kind, of in results.items()}
    return results if args.kind == "both" else results[args.kind]


def derive(args, split):
    """Fill in what was not asked for: sizes and tile side."""
    args.n_train = args.n_train or split.n_train
    args.n_test = args.n_test or len(split.targets) - split.n_train
    args.sizes = args.sizes or [args.n_train]
    for what, n, have in (("n_train", args.n_train, split.n_train), ("n_train", args.sizes[0], split.n_train),
                          ("n_test", args.n_test, len(split.targets) - split.n_train)):
        if not 2 <= n <= have:
            raise ValueError(f"{what}={n}, but {args.split} has 2 to {have} rows to give")
    several = len(args.ridge) > 1 or "auto" in (args.encoding, args.target)
    if several and n_fit(split, args.sizes[0]) == args.sizes[0]:
        raise ValueError(f"{args.split} with n_train={args.sizes[0]} has no validation rows to choose on; give "
                         "--encoding, --target, and one number with --ridge")
    if args.tile is None:
        side = 256 if args.kernel == "seq_cnn_gap" else 1024
        args.tile = command.tile_side(side, 8192, args.n_train)


def network_kernel(args, kind, x):
    """kernel_fn(x1, x2) of these flags for inputs like x (n, length, channels); kind: one, or a tuple of them."""
    return compiled(args.kernel, args.depth, kind, x.shape[1] * x.shape[2])


@lru_cache
def compiled(name, depth, kind, size):
    """One function for all encodings: a new one would compile anew."""
    if name == "linear":  # a network of one layer, without the means over channels and positions
        return engine([("mask",), ("flatten",), ("dense", size**0.5, 0.0)], kind)
    return engine(name, kind, **({} if depth is None else {"depth": depth}))


def scale(args, K):
    """(n,), to whose mean ridges are relative."""
    return np.ones(K.shape[0]) if args.kernel == "linear" else K.diagonal()


def spearman(f, y):
    """Spearman's rank correlation of f and y, (n,); 0 where one of them is constant and so has no order."""
    ranks = rankdata(f), rankdata(y)
    return 0.0 if min(map(np.ptp, ranks)) == 0 else float(np.corrcoef(*ranks)[0, 1])


def n_fit(split, n):
    """How many of n training rows are fitted while something is chosen on the others."""
    return split.n_fit if n == split.n_train else n - n // 5


def choose(args, split, kind):
    """Sets args.encoding and args.target where they are auto; returns [[encoding, target, ridge, mse, Spearman of
    the validation rows], ...], every ridge being the one with the least mse.

    On the training rows of the smallest size, COMPARED at most, evenly from fitted and held out; functions of the
    target are fitted on the fitted ones.
    """
    encodings = proteins.ENCODINGS if args.encoding == "auto" else [args.encoding]
    names = proteins.TARGETS if args.target == "auto" else [args.target]
    if len(encodings) == len(names) == 1:
        return []
    n, sparse = args.sizes[0], -(-args.sizes[0] // COMPARED)
    rows = [np.arange(*ends, sparse) for ends in ((0, n_fit(split, n)), (n_fit(split, n), n))]
    fitted, rows = len(rows[0]), np.concatenate(rows)
    y = split.targets[rows]
    columns = np.stack([proteins.transform(name, y[:fitted])[0](y) for name in names], axis=1)
    held_out, table = np.arange(fitted, len(rows)), []
    for encoding in encodings:
        x = proteins.encode(split.sequences, encoding, n)[rows]
        K = tiles.gram(network_kernel(args, kind, x), x, args.tile, command.devices(args.devices), args.quiet).merged()
        solver = regression.Solver(K, ridges=args.ridge, tol=regression.SEARCH, c=len(names), seed=args.seed,
                                   prior=scale(args, K))
        _, found = regression.choose_ridge(solver, columns, fitted, held_out, args.ridge, lambda f: [
            (float(np.mean((f[:, c] - columns[held_out, c]) ** 2)), spearman(f[:, c], y[held_out]))
            for c in range(len(names))])
        for c, name in enumerate(names):
            (mse, correlation), ridge = min((scores[c], ridge) for ridge, scores, _ in found)
            table.append([encoding, name, ridge, mse, correlation])
    args.encoding, args.target = max(table, key=lambda row: row[-1])[:2]
    if not args.quiet:
        print("\n".join(f"{encoding:8} {name:5} ridge {ridge:8.2g}: validation mse {mse:.4f}, Spearman {s:.4f}"
                        for encoding, name, ridge, mse, s in table) + f"\nchosen: {args.encoding}, {args.target}")
    return table


def experiment(args, kind, K, K_test, split, n, x_test):
    """Choose the ridge, solve, predict, for one size: what came of it, as a dict."""
    y, y_test = split.targets[:n], split.targets[split.n_train:][:args.n_test]
    forward, inverse = proteins.transform(args.target, y)
    fitted, z = n_fit(split, n), forward(y)[:, None]
    alpha, f, result, solver = regression.fit(
        K, K_test, z, args.ridge, fitted, np.arange(fitted, n), lambda f: spearman(f[:, 0], y[fitted:]), args.tol,
        rank=args.rank, seed=args.seed, quiet=args.quiet, prior=scale(args, K))
    result = {"test_spearman": spearman(f[:, 0], y_test),
              "test_rmse": float(np.sqrt(np.mean((inverse(f[:, 0]) - y_test) ** 2))),
              "test_mse": float(np.mean((f[:, 0] - forward(y_test)) ** 2)), **result}  # of forward(y)
    if args.variance:
        with runs.phase("variance", result["seconds"]):
            k_test = lazy.matrix(network_kernel(args, kind, x_test), x_test, None, 16, command.devices(args.devices),
                                 args.quiet).diagonal()
            variance = regression.scale(z, alpha) * regression.variance(solver, K_test, k_test, result["ridge"])
        result.update(calibration(f[:, 0], np.sqrt(variance), forward(y_test)))
    return result


def calibration(f, sd, z):
    """How well sd says how far f is from z, (m,) each: {name: number}.

    gaussian_nll: -log density of z under N(f, sd^2), mean over rows.   coverage_P: share of rows within the
    central P % interval of N(f, sd^2), P % if sd is right.   sd_spearman: of sd and |f - z|.
    """
    off = np.abs(f - z)
    return {"test_gaussian_nll": float(np.mean(np.log(2 * np.pi * sd**2) / 2 + (off / sd) ** 2 / 2)),
            **{f"test_coverage_{p}": float(np.mean(off <= sd * ndtri(0.5 + p / 200))) for p in (50, 90)},
            "test_sd_spearman": spearman(sd, off)}


def config(args, kind, n):
    """What decides the result of this run; dataset and whiten as scaling.py calls them."""
    return {**{key: value for key, value in vars(args).items() if key not in WHERE}, "kind": kind, "n_train": n,
            "dataset": args.split, "whiten": f"{args.encoding} {args.target}"}


def describe(result):
    """The result line."""
    config = result["config"]
    return (f"{config['split']} {config['kernel']} {config['kind']} {config['encoding']} {config['target']} "
            f"n_train={config['n_train']} n_test={config['n_test']}: test Spearman {result['test_spearman']:.4f}, "
            f"RMSE {result['test_rmse']:.4f}, ridge {result['ridge']:.2g}, CG {result['cg_iterations']} steps to "
            f"{result['cg_residual']:.1e}, "
            + (f"coverage of 50 and 90 % intervals {100 * result['test_coverage_50']:.0f} and "
               f"{100 * result['test_coverage_90']:.0f} %, nll {result['test_gaussian_nll']:.3f}, "
               if "test_coverage_50" in result else "")
            + ", ".join(f"{name} {s:.1f} s" for name, s in result["seconds"].items())
            + f", peak memory {result['peak_memory_gb']:.1f} GB")


if __name__ == "__main__":
    command.run(main, parse(None).devices)
