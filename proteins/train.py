"""Kernel regression with an infinitely wide network on proteins: from a sequence to a number, top to bottom.

  f(x) = k(x, X) (K + lambda I)^-1 y,   K = k(X, X),   lambda = ridge * mean(diag K)

Tiles and solver are those used for images (train_cifar.py); the kernels are others (proteins/layers.py). y is the measured
fitness, or a monotone function of it. Every choice is made on training rows alone: by leave-one-out if K is small
(choose.py), else on validation rows, which are training rows too (FLIP or --set names them; otherwise the last fifth). The
ridge is chosen by mean squared error, whose curve is smooth. The encoding of residues, the function of the target and every
flag of the network that has several values are chosen by Spearman's correlation, which does not depend on that function. Then
all training rows are fitted, and the test rows are read once. Data, encodings and functions: proteins/sequences.py.

  python -m proteins.train                                     1,296 artificial sequences, ten seconds, no file
  python -m proteins.train --split two_vs_rest --data DIR      FLIP's GB1; --help says what DIR must hold
  python -m proteins.train --split three_vs_rest --data DIR --kernel seq_cnn --kind both
  python -m proteins.train --split one_vs_rest --data DIR --w_std 1,1.41,2 --b_std 0,0.5 --depth 1,3
  python -m proteins.train --split two_vs_rest --data DIR --kernel linear --encoding centred --transform raw --ridge 1
  python -m proteins.train --split landscape --data DIR --kernel seq_cnn --sizes 1000,2000,4000,8000,16000
  python -m proteins.train --dataset peptides.csv --sequence peptide --target activity --save peptides.npz
  python -m proteins.train --load peptides.npz --predict new.csv --variance
"""

import argparse
import hashlib
import itertools
import os
from functools import partial

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

import choose
import experiment
import kernel
import regression
import tiles
from own import tables, uncertainty
from proteins import sequences
from proteins.layers import SEQUENCES

try:
    from fast.fused import compiler
    from fast.fused import kernel_fn as engine
except ImportError:  # without fast/, kernel.py computes the same, more slowly
    from kernel import kernel_fn as engine
    compiler = None

COMPARED = choose.DENSE  # most rows on which encodings, functions of the target and networks are compared
NETWORK = ("depth", "w_std", "b_std", "head", "gamma")  # flags that describe a network; linear takes none of them
WHERE = ("data", "out", "quiet", "store", "sizes", "devices", "save", "load", "predict")  # not recorded
FLAGS = {"split": "dataset", "target": "transform", "column": "target"}  # recorded name: flag, where they differ
OWN = ("sequence", "column", "set", "digest")  # recorded with a file of your own


def flags():
    """The parser of the command line."""
    parser = experiment.Parser(
        prog="python -m proteins.train",
        description="Exact kernel regression with infinitely wide networks on proteins.",
        epilog=f"FLIP's files: {' and '.join(sorted({archive for archive, _ in sequences.FILES.values()}))}, from "
               f"{sequences.SOURCE} (there without the prefix flip_gb1_). --data is the folder that holds them, packed or "
               "unpacked.")
    row_flags(parser.add_argument_group("sequences"))
    network = parser.add_argument_group("kernel")
    network.add_argument("--kernel", default="seq_cnn", choices=[*SEQUENCES, "linear"],
                         help="linear: <x, x'>, ridge regression; its --ridge is lambda itself (scikit-learn's alpha); if "
                         "lengths vary, x is divided by the root of its length")
    network.add_argument("--kind", default="nngp", choices=[*kernel.KINDS, "both"],
                         help="both: two runs, with both kernels computed in one pass and the choices made for nngp")
    network.add_argument("--depth", help="number of hidden layers or convolutions; None: 3. This flag and the next four take "
                         "several values, separated by commas: the best is chosen by Spearman's correlation")
    experiment.network_flags(network)
    network.add_argument("--tile", type=int, help="side of a tile of K, in rows; None: chosen from n_train")
    network.add_argument("--store", metavar="DIR", help="keep tiles in this folder and continue from the tiles there; none: "
                         "keep no tiles and compute them in every product; None: tiles stay in memory")
    solver = parser.add_argument_group("solver")
    solver.add_argument("--ridge", default="auto", help="lambda / mean(diag K): one number; or several, separated by "
                        "commas, or auto (10 down to 1e-6): the best on training rows is chosen")
    experiment.select_flag(solver, f"loo for up to {choose.DENSE:,} rows, validation for more, on the rows that FLIP or "
                        "--set names or else on the last fifth of the training rows")
    solver.add_argument("--tol", type=float, default=1e-6, help="stop when |y - A x| <= tol |y|")
    solver.add_argument("--rank", type=int, help="rank of the preconditioner; None: chosen by a cost model")
    solver.add_argument("--variance", action="store_true", help="also compute predictive variances (one solve for each test "
                        "row) and their calibration; with --load, the sd of every prediction; nngp only")
    model_flags(parser.add_argument_group("fitted model"))
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="seed of the order of training rows, of pivots, and without --set of "
                     "the test rows of a file of your own")
    run.add_argument("--devices", type=int, help="number of devices to use; None: every GPU, or else every core")
    run.add_argument("--out", default="runs", metavar="DIR", help="append a line to runs.jsonl in this folder")
    run.add_argument("--quiet", action="store_true", help="print the result and notes about the data, no progress")
    return parser


def row_flags(rows):
    """Adds the flags that say which rows to fit and test, and how they become numbers."""
    rows.add_argument("--dataset", "--split", default="made", dest="split", metavar="NAME_OR_FILE", help="data set and "
                      f"split: {', '.join(sequences.SPLITS)}; made is artificial. Or your own: the path of a .csv or .csv.gz "
                      "file with a column of sequences and a column of numbers")
    rows.add_argument("--sequence", metavar="COLUMN", help="column of that file with the sequences; None: sequence, or with "
                      "--load the column that the model was trained with")
    rows.add_argument("--target", metavar="COLUMN", dest="column", help="column of that file with the numbers; None: target")
    rows.add_argument("--set", metavar="COLUMN", help="column of that file that says train, validation or test; None: a fifth "
                      "of the rows, drawn with --seed, is for testing")
    rows.add_argument("--data", metavar="DIR", help="folder with FLIP's files")
    rows.add_argument("--n_train", type=int, help="number of training rows, but not for FLIP's splits; None: all")
    rows.add_argument("--sizes", metavar="N,N,...", help="solve for these numbers of training rows too, each time the first "
                      "of the n_train, on blocks of one kernel if the encoding is the same; encoding, transform and network "
                      "are chosen once, at the smallest size")
    rows.add_argument("--n_test", type=int, help="number of test rows, drawn at random; None: all")
    rows.add_argument("--encoding", default="auto", choices=["auto", *sequences.ENCODINGS],
                      help="numbers for residues; auto: the best by Spearman's correlation, as for --transform")
    rows.add_argument("--transform", default="auto", dest="target", choices=["auto", *sequences.TARGETS],
                      help="function of the target that is fitted; its inverse is applied to predictions")


def model_flags(fitted):
    """Adds the flags of a model in a file."""
    fitted.add_argument("--save", metavar="FILE", help="keep what predictions need, as .npz: one kind and one size")
    fitted.add_argument("--load", metavar="FILE", help="fit nothing, but --predict with this model")
    fitted.add_argument("--predict", metavar="FILE.csv", help="new sequences. The rows of this file, with a column prediction "
                        "in the units of the target, go to predictions.csv in --out. With --variance, which needs K again, a "
                        "column sd too: if f with standard deviation s is predicted for a function g of the target, "
                        "(g^-1(f + s) - g^-1(f - s)) / 2")


def own(args):
    """Whether the data set is a file of your own."""
    return args.split not in sequences.SPLITS


def parse(argv):
    """The flags, checked against each other; ridge, sizes and the flags of the network are lists."""
    parser = flags()
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(NETWORK)))  # None if a flag is not given
    given = [flag for flag in NETWORK if getattr(args, flag) is not None]
    if args.kernel == "linear" and given:
        parser.error(f"--{given[0]} with --kernel linear: it has no layers to set; leave it out")
    if args.kernel != "linear":
        vars(args).update({flag: parser.get_default(flag) for flag in set(NETWORK) - set(given)})
    experiment.check(parser, args, "n_test", "rank", "devices", "tile", "depth")
    if args.select == "gcv" and ("auto" in (args.encoding, args.target) or len(experiment.settings(args)) > 1):
        parser.error("--select gcv gives no rank correlation by which to compare encodings, targets and networks: give one "
                     "value of each, or use --select loo or validation")
    experiment.refuse_idle(parser, argv, idle(args))
    if (args.load is None) != (args.predict is None):
        parser.error("--load FILE and --predict FILE go together")
    if args.save and (args.kind == "both" or len(args.sizes) > 1):
        parser.error("--save keeps one model: give one kind and one size, without --kind both and --sizes")
    experiment.check_file(parser, args.save)
    if own(args) and not os.path.isfile(args.split):
        parser.error(f"--dataset {args.split} is {'a folder' if os.path.isdir(args.split) else 'not there'}; expected one of "
                     f"{', '.join(sequences.SPLITS)}, or the path of a .csv or .csv.gz file")
    if own(args):
        args.sequence, args.column = args.sequence or "sequence", args.column or "target"
    if args.split in sequences.FLIP and (args.n_train or args.sizes):
        parser.error(f"--n_train and --sizes with --split {args.split}: FLIP says which rows to train on; use these "
                     "flags with landscape or made")
    return args


def idle(args):
    """{dest of a flag: why it changes nothing in this run, or False}."""
    if args.load:
        return dict.fromkeys(set(vars(args)) - {"load", "predict", "sequence", "out", "quiet", "devices", "variance"},
                             "--load takes all that from the model's file")
    named = not own(args) and "it names a column of --dataset FILE.csv"
    return {"data": args.split == "made" and "--split made needs no file" or own(args) and "--dataset is a path",
            "sequence": named, "set": named,
            "column": named and f"{named} (the function of the target is --transform)",
            "gamma": "exp" not in (args.head or []) and "it belongs to --head exp",
            "select": not has_choices(args) and "there is nothing to choose"}


def has_choices(args):
    """Whether anything is to be chosen: a ridge, an encoding, a function of the target or a network."""
    return len(args.ridge) > 1 or "auto" in (args.encoding, args.target) or len(experiment.settings(args)) > 1


def main(argv=None):
    """Run one experiment. Returns the line written to runs.jsonl, as a dict; with --sizes {size: line}, with --kind both
    {kind: line or {size: line}}; with --load, what predict.py returns."""
    args = parse(argv)
    if args.load:
        from proteins import predict
        return predict.predict(args, partial(kernel.compiled, engine))
    experiment.writable(args.out)
    run, seconds = experiment.provenance(), {}
    kinds = kernel.KINDS if args.kind == "both" else (args.kind,)
    with regression.phase("data", seconds):
        split = load(args)
        derive(args, split)
    if not args.quiet:
        print(experiment.described(argparse.Namespace(**by_flag(vars(args)))))
    with regression.phase("choose", seconds):
        compared = compare(args, split, kinds[0])
    results = {kind: {} for kind in kinds}
    for sizes, encoding in encodings(args, split):
        spent = dict(seconds)
        with regression.phase("kernel", spent):
            train, test = parts(args, split, sizes[-1])
            if not args.quiet:
                sequences.note_unseen(encoding, train, test, f"test rows of {args.split}")
            x, x_test = encoding(train), encoding(test)
            matrices = kernels(args, kinds, encoding, x, x_test)
        for kind, (K, K_test) in zip(kinds, matrices):
            for n in sizes:
                blocks = [block.leading(n).merged() for block in (K, K_test)]
                result, *fit = one_size(args, kind, *blocks, split, n, encoding)
                result.update(compared=compared, entries=sum(block.entries for block in blocks),
                              compiler=compiler(layers(args, encoding)) if compiler else "XLA")
                result["seconds"] = {name: round(s, 3) for name, s in {**spent, **result["seconds"]}.items()}
                experiment.record(args.out, config(args, kind, n), result, run, describe)
                results[kind][n] = result
    if args.save:
        from proteins import predict
        predict.save(args.save, split, layers(args, encoding), result, *fit)
    if args.split == "made" and not args.quiet:
        print(f"These sequences are artificial; a linear model explains at most {100 * sequences.MADE_LINEAR:.0f} % of the "
              "variance. For a real protein: --split two_vs_rest --data DIR; --help lists the files that DIR must hold. For "
              "your own: --dataset FILE.csv")
    results = {kind: by_size if len(by_size) > 1 else by_size[args.n_train] for kind, by_size in results.items()}
    return results if args.kind == "both" else results[args.kind]


def load(args):
    """The Split that the flags ask for. Of a file, the digest becomes args.digest: SHA-256 of its bytes, unpacked."""
    if not own(args):
        return sequences.load(args.split, args.data, args.seed, args.quiet)
    content = tables.content(args.split)
    args.digest = hashlib.sha256(content).hexdigest()[:12]
    return sequences.own(args.split, content, args.sequence, args.column, args.set, args.seed, args.quiet)


def parts(args, split, n):
    """The first n training sequences, and the test sequences."""
    return split.sequences[:n], split.sequences[split.n_train:][:args.n_test]


def encodings(args, split):
    """[(sizes, Encoding), ...]: each size has the encoding fitted on its training rows; sizes that share one are grouped."""
    groups, longest = [], max(map(len, sum(parts(args, split, args.n_train), [])))
    for n in args.sizes:
        encoding = sequences.fit(split.sequences[:n], args.encoding, longest)
        if groups and groups[-1][1].key == encoding.key:
            groups[-1][0].append(n)
        else:
            groups.append(([n], encoding))
    return groups


def kernels(args, kinds, encoding, x, x_test):
    """[(K, K_test), ...], one for each kind.  With --store, every fitted encoding has its own folder of tiles, because an
    encoding fitted on few rows can differ from one fitted on many."""
    known_by = {"kernel": args.kernel, "layers": layers(args, encoding), "engine": engine.__module__, "encoding": encoding.key}
    folder = os.path.join(args.store, encoding.key) if args.store not in (None, "none") else args.store
    return experiment.matrices(partial(network_kernel, args, encoding=encoding), kinds, {"train": x, "test": x_test}, folder,
                               known_by, args.tile, devices=experiment.devices(args.devices), quiet=args.quiet)


def derive(args, split):
    """Fill in n_train, n_test, sizes and tile if they were not given.  ValueError: too few or too many rows, or targets
    from which nothing can be learned."""
    args.n_train = args.n_train or split.n_train
    args.n_test = args.n_test or len(split.targets) - split.n_train
    args.sizes = args.sizes or [args.n_train]
    for what, n, have in (("n_train", args.n_train, split.n_train), ("n_train", args.sizes[0], split.n_train),
                          ("n_test", args.n_test, len(split.targets) - split.n_train)):
        if not 2 <= n <= have:
            raise ValueError(f"{what}={n}: {args.split} allows 2 to {have} rows")
    for n in args.sizes:  # ridges are compared at every size, everything else at the smallest
        choosing = len(args.ridge) > 1 or n == args.sizes[0] and len(candidates(args, split)) > 1
        fit = n_fit(split, n) if choosing and criterion(args, n) == "validation" else None
        check_targets(args, n, split.targets[:fit or n], fit and split.targets[fit:n])
        if fit and fit != split.n_fit and split.n_fit != split.n_train - split.n_train // 5:  # the file names such rows
            print(f"note: n_train={n}: the validation rows that {args.split} names are held out only with all {split.n_train} "
                  f"training rows; here the last {n - fit} are")
    y_test = split.targets[split.n_train:][:args.n_test]
    if np.ptp(y_test) == 0:
        print(f"note: all {len(y_test)} test targets of {args.split} are {y_test[0]:g}, so Spearman's correlation is "
              "undefined; it is recorded as 0")
    if args.tile is None:
        side = 256 if args.kernel == "seq_cnn_gap" else 1024
        args.tile = experiment.tile_side(side, 8192, args.n_train)


def check_targets(args, n, fitted, held_out=None):
    """ValueError: the targets to fit are all equal, or so are the held-out targets on which something is chosen."""
    if np.ptp(fitted) == 0:
        raise ValueError(f"{args.split} with n_train={n}: the targets of all {len(fitted)} rows to fit are {fitted[0]:g}, so "
                         "there is nothing to learn; train on more rows, or on rows whose targets differ")
    if held_out is not None and len(set(held_out)) < 2:
        raise ValueError(f"{args.split} with n_train={n} has {len(held_out)} validation rows with {len(set(held_out))} "
                         "different targets, but choosing needs two; use --select loo, or give one value of --ridge, "
                         "--encoding, --transform and each flag of the network")


def layers(args, encoding):
    """The list of layers for these flags and sequences in this encoding."""
    if args.kernel == "linear":  # one layer; its w_std undoes the means over channels and positions
        positions = len(encoding.positions) if encoding.length else 1  # if lengths vary, seq_flatten divides by sqrt(l l')
        return [("mask",), ("seq_flatten",), ("dense", (positions * len(sequences.RESIDUES)) ** 0.5, 0.0)]
    gamma = 1.0 if args.gamma is None else args.gamma
    return kernel.network(args.kernel, args.depth, args.w_std, args.b_std, args.head, gamma)


def network_kernel(args, kind, encoding):
    """kernel_fn(x1, x2) for these flags and this encoding; kind: one kind, or a tuple of kinds."""
    return kernel.compiled(engine, tuple(layers(args, encoding)), kind)


def scale(args, K):
    """(n,): lambda = ridge * mean of this; the diagonal of K, or ones for linear, whose ridge is lambda itself."""
    return np.ones(K.shape[0]) if args.kernel == "linear" else K.diagonal()


def has_intercept(args):
    """Whether these flags mean ridge regression with an intercept."""
    return args.kernel == "linear" and args.encoding == "centred"


def spearman(f, y):
    """Spearman's rank correlation of f and y, both (n,); 0 if one of them is constant. Predictions f that differ by rounding
    only, as where few training rows leave many alike, are ties: otherwise their order would be the machine's."""
    ranks = rankdata(np.round(f / (np.abs(f).max() or 1), 5)), rankdata(y)
    return 0.0 if min(map(np.ptp, ranks)) == 0 else float(np.corrcoef(*ranks)[0, 1])


def n_fit(split, n):
    """How many of n training rows are fitted while something is chosen on the other rows."""
    return split.n_fit if n == split.n_train else n - n // 5


def criterion(args, n):
    """The criterion for n training rows: --select, or else leave-one-out up to choose.DENSE rows and validation above."""
    return args.select or ("loo" if n <= choose.DENSE else "validation")


def candidates(args, split):
    """[{flag: value}, ...]: every combination of network, encoding and function of the target to compare."""
    encodings = sequences.ENCODINGS if args.encoding == "auto" else [args.encoding]
    if args.encoding == "auto" and len(set(map(len, split.sequences[:args.n_train]))) > 1:
        encodings = [name for name in encodings if name != "centred"]  # which needs sequences of one length
    targets = sequences.TARGETS if args.target == "auto" else [args.target]
    return [{**network, "encoding": encoding, "target": target}
            for network, encoding, target in itertools.product(experiment.settings(args), encodings, targets)]


def compare(args, split, kind):
    """Sets args.encoding, args.target and the flags of the network to the values whose predictions of training rows have
    the best Spearman correlation, each at the ridge with the least mse.

    Rows: the training rows of the smallest size, evenly thinned to at most COMPARED. With loo, each row is predicted from all
    others and functions of the target are fitted on all rows; with validation, both use the fitted rows only, and the
    validation rows are predicted.  Returns [[{flag: value}, ridge, Spearman, mse], ...], or [] if there is nothing to choose.
    """
    tried, table, n = candidates(args, split), [], args.sizes[0]
    several = [flag for flag in tried[0] if len({setting[flag] for setting in tried}) > 1]
    step = -(-n // COMPARED)
    loo = criterion(args, -(-n // step)) == "loo"
    end = n if loo else n_fit(split, n)
    rows = np.concatenate([np.arange(0, end, step), np.arange(end, n, step)])
    fitted, y = -(-end // step), split.targets[rows]
    if several:
        check_targets(args, n, y[:fitted], None if loo else y[fitted:])
    for shared, group in itertools.groupby(tried if several else [], lambda setting: {**setting, "target": None}):
        network = argparse.Namespace(**{**vars(args), **shared})
        encoding = sequences.fit(split.sequences[:n], network.encoding)
        x = encoding([split.sequences[row] for row in rows])
        K = tiles.gram(network_kernel(network, kind, encoding), x, args.tile, experiment.devices(args.devices),
                       args.quiet).merged()
        prior = scale(args, K)
        if loo:
            spectrum = choose.Spectrum(K.columns(np.arange(len(y))), prior.mean(), has_intercept(network))
        else:
            solver = regression.solver_class()(K, ridges=args.ridge, tol=choose.SEARCH, seed=args.seed, prior=prior)
        for setting in group:
            z = sequences.transform(setting["target"], y[:fitted])[0](y)[:, None]
            ridges = (choose.leave_one_out(spectrum, z, args.ridge, score(y)) if loo else choose.validation(
                solver, z, args.ridge, fitted, np.arange(fitted, len(y)), score(y), has_intercept(network)))
            table.append([{flag: setting[flag] for flag in several}, *choose.best(ridges)[:3]])
            if not args.quiet:
                print(" ".join(f"{flag}={value}" for flag, value in by_flag(table[-1][0]).items())
                      + ": ridge {:.2g}, Spearman {:.4f}, mse {:.5f}".format(*table[-1][1:]))
    best = max(range(len(table)), key=lambda i: table[i][2], default=0)
    vars(args).update(tried[best])
    if table and not args.quiet:
        print("chosen: " + " ".join(f"{flag}={value}" for flag, value in by_flag(table[best][0]).items()))
    return table


def score(y):
    """The function (predictions (m, 1), their rows) -> Spearman's correlation of the predictions with y[rows]."""
    return lambda f, rows: spearman(f[:, 0], y[rows])


def one_size(args, kind, K, K_test, split, n, encoding):
    """Choose the ridge, solve and predict for one size.  Returns the result as a dict, the Solver, and z and alpha, (n, 1)."""
    y, y_test = split.targets[:n], split.targets[split.n_train:][:args.n_test]
    forward, inverse = sequences.transform(args.target, y)
    fitted, z = n_fit(split, n), forward(y)[:, None]
    alpha, f, result, solver = regression.fit(
        K, K_test, z, args.ridge, criterion(args, n), args.tol, score=score(y), held_out=(fitted, np.arange(fitted, n)),
        rank=args.rank, seed=args.seed, quiet=args.quiet, prior=scale(args, K), intercept=has_intercept(args))
    result = {"test_spearman": spearman(f[:, 0], y_test),
              "test_rmse": float(np.sqrt(np.mean((inverse(f[:, 0]) - y_test) ** 2))),
              "test_mse": float(np.mean((f[:, 0] - forward(y_test)) ** 2)), **result}  # test_mse: of forward(y)
    if args.variance:
        with regression.phase("variance", result["seconds"]):
            k_test = tiles.diagonal(network_kernel(args, kind, encoding), encoding(parts(args, split, n)[1]), 16,
                                    experiment.devices(args.devices))
            variance = uncertainty.prior_scale(z, alpha) * uncertainty.variance(solver, K_test, k_test, result["ridge"])
        result.update(calibration(f[:, 0], np.sqrt(variance), forward(y_test)))
    return result, solver, z, alpha


def calibration(f, sd, z):
    """How well the predicted sd describes the errors f - z; all (m,). Returns {name: number}, each name after test_:

    gaussian_nll: mean over rows of -log density of z under N(f, sd^2).   coverage_P: share of rows within the central P %
    interval of N(f, sd^2); P % if sd is right.   sd_spearman: Spearman's correlation of sd and |f - z|.
    """
    off = np.abs(f - z)
    return {"test_gaussian_nll": float(np.mean(np.log(2 * np.pi * sd**2) / 2 + (off / sd) ** 2 / 2)),
            **{f"test_coverage_{p}": float(np.mean(off <= sd * ndtri(0.5 + p / 200))) for p in (50, 90)},
            "test_sd_spearman": spearman(sd, off)}


def by_flag(settings):
    """Settings under the names of their flags, for messages."""
    return {FLAGS.get(name, name): value for name, value in settings.items()}


def config(args, kind, n):
    """The settings that decide the result; results/ reads the split as `dataset`, of a file with its column and digest, and
    encoding and target as `whiten`."""
    columns = [one for one in (args.sequence, args.set) if one not in (None, "sequence")] if own(args) else []
    hidden, dataset = (WHERE, [args.split, *columns, args.column, args.digest]) if own(args) else (
        (*WHERE, *OWN), [args.split])
    return {**{key: value for key, value in vars(args).items() if key not in hidden}, "kind": kind, "n_train": n,
            "dataset": " ".join(dataset), "whiten": f"{args.encoding} {args.target}"}


def describe(result):
    """The result line."""
    config = result["config"]
    return (f"{config['split']} {config['kernel']} {config['kind']} {config['encoding']} {config['target']} "
            f"n_train={config['n_train']} n_test={config['n_test']}: test Spearman {result['test_spearman']:.4f}, "
            + (f"leave-one-out {result['loo_score']:.4f}, " if "loo_score" in result else "")
            + f"RMSE {result['test_rmse']:.4g}, ridge {result['ridge']:.2g}, CG {result['cg_iterations']} steps to "
            f"{result['cg_residual']:.1e}, "
            + (f"coverage of 50 and 90 % intervals {100 * result['test_coverage_50']:.0f} and "
               f"{100 * result['test_coverage_90']:.0f} %, nll {result['test_gaussian_nll']:.3f}, "
               if "test_coverage_50" in result else "")
            + ", ".join(f"{name} {s:.1f} s" for name, s in result["seconds"].items())
            + f", kernel compiled by {result['compiler']}, peak memory {result['peak_memory_gb']:.1f} GB")


if __name__ == "__main__":
    experiment.run(main, parse(None))
