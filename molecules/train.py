"""Kernel regression with an infinitely wide graph network on molecules, top to bottom.

  f(x) = k(x, X) (K + lambda I)^-1 y,   K = k(X, X),   lambda = ridge * mean(diag K)

k is the kernel of a graph network (gcn), of a fully connected one on fingerprints (Morgan counts, or others), or the
sum of the two, each divided by its mean diagonal. y is the label, or the measured number, minus its mean over the
training rows; where labels are missing every task is solved on its own rows, all together (missing.py), and a task that
has one class only in the training rows is left out, which is said. The rare class has no extra weight, because the score,
area under the ROC curve or average precision, depends on the order only.
Ridges, and whatever flag of the network is given several values, are compared by that score, or by squared error where
numbers are predicted (comparing classes by squared error chose ten times the ridge on all of molhiv, fingerprints: a
validation AUC of 0.807 instead of 0.823). They are compared on the validation rows, which are never fitted, or with
--select loo on the training rows, each predicted from all others (choose.py). Test rows are read once.

  python -m molecules.train                                      1,500 molecules that come with RDKit, a minute
  python -m molecules.train --dataset esol --data DIR --split scaffold
  python -m molecules.train --dataset esol --data DIR --kernel sum --select loo --depth 1,3 --b_std 0,0.5
  python -m molecules.train --dataset molhiv --data DIR --kernel fingerprint --fingerprints morgan,pairs,torsions
  python -m molecules.train --dataset molhiv --data DIR --sizes 1000,2000,4000 --kind both --store K
"""

import argparse
import itertools
import os
from dataclasses import replace
from functools import cache, partial

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

import choose
import experiment
import kernel
import pcg
import regression
from molecules import graphs, missing, smiles
from molecules.layers import gcn

try:
    from fast.fused import kernel_fn as vector_kernel
except ModuleNotFoundError:  # fused.py may be deleted: then kernel.py computes the same, slowly
    from kernel import kernel_fn as vector_kernel

FEW = 1500  # rows of nci that are read: a minute
RANK = 512  # of the preconditioner where tasks have rows of their own, at most
PARTS = {"gcn": ("gcn",), "fingerprint": ("fingerprint",), "sum": ("gcn", "fingerprint")}
WHERE = ("data", "out", "quiet", "store", "sizes", "devices")  # not what was computed: not recorded
SOURCES = """files that DIR must hold: esol: delaney-processed.csv; molhiv: HIV.csv, and the official split as
ogbg-molhiv_scaffold_split.npz (arrays train, val, test of row numbers); muv: muv.csv.gz; all three from MoleculeNet's
page, deepchemdata.s3-us-west-1.amazonaws.com/datasets/. Or for molhiv and molpcba the folder mapping and split of
OGB's archive, as unpacked: snap.stanford.edu/ogb/data/graphproppred/csv_mol_download/{hiv,pcba}.zip"""


def flags():
    """The command line."""
    parser = experiment.Parser(
        description="Exact kernel regression with infinitely wide graph networks on molecules.", epilog=SOURCES)
    rows = parser.add_argument_group("molecules")
    rows.add_argument("--dataset", default="nci", choices=smiles.DATASETS)
    rows.add_argument("--data", metavar="DIR", help="folder that holds the data set's files")
    rows.add_argument("--split", choices=smiles.SPLITS, help="None: official where there is one, else random")
    rows.add_argument("--n_train", type=int, help="training molecules; None is all")
    rows.add_argument("--sizes", metavar="N,N,...", help="solve for these many training molecules too, the first "
                      "ones of n_train, on blocks of the same kernel")
    network = parser.add_argument_group("kernel")
    network.add_argument("--kernel", default="gcn", choices=PARTS)
    network.add_argument("--kind", default="nngp", choices=[*kernel.KINDS, "both"],
                         help="both: two runs on one pass over the kernel")
    network.add_argument("--depth", default="3", help="rounds of gcn, hidden layers on fingerprints. This and the next "
                         "two take several values with commas: the best is chosen as the ridge is")
    experiment.network_flags(network, images_or_sequences=False)
    network.add_argument("--pool", default="sum", choices=["sum", "mean"], help="of gcn, over atoms")
    network.add_argument("--jump", action="store_true", help="pool the atoms after every round, and add up")
    network.add_argument("--weights", default="normal", choices=["normal", "sum", "order"],
                         help="A of gcn: D^-1/2 (A + I) D^-1/2, A + I, or the first with the orders of bonds")
    network.add_argument("--fingerprints", default="morgan", metavar="NAME,...", help="what is counted: "
                         f"{', '.join(smiles.FINGERPRINTS)}, or several; see smiles.fingerprints")
    network.add_argument("--tile", type=int, help="side of a tile of K; None: that of the store, or from kernel and "
                         "n_train")
    network.add_argument("--store", metavar="DIR", help="keep tiles there, and go on from what is there, also with a "
                         "larger n_train; None: in memory")
    solver = parser.add_argument_group("solver")
    solver.add_argument("--ridge", default="auto", help="lambda / mean(diag K): a number; several, separated by "
                        "commas, or auto (10 down to 1e-6): chosen by the score, or by squared error for numbers")
    experiment.select_flag(solver, "validation; loo and gcv need a label of every task for every training molecule, and "
                        "gcv numbers to predict")
    solver.add_argument("--tol", type=float, default=1e-6, help="residual |y - A x| / |y| to reach")
    solver.add_argument("--rank", type=int, help="of the preconditioner; None is as large as saves time")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="of random splits, of the order of training rows, of pivots")
    run.add_argument("--devices", type=int, help="devices to use; None is every GPU, or else every core")
    run.add_argument("--out", default="runs", metavar="DIR", help="runs.jsonl in it gets a line")
    run.add_argument("--quiet", action="store_true", help="print the result line only")
    return parser


def parse(argv):
    """The flags, checked against each other; ridge, sizes and those of the network as lists of numbers."""
    parser = flags()
    args = parser.parse_args(argv)
    experiment.check(parser, args, "depth", "tile", "rank", "devices")
    args.fingerprints = args.fingerprints.split(",")
    if len(set(args.fingerprints) & set(smiles.FINGERPRINTS)) < len(args.fingerprints):
        parser.error(f"--fingerprints {','.join(args.fingerprints)}: expected {', '.join(smiles.FINGERPRINTS)}, "
                     "or several of these with commas between")
    if args.select == "gcv" and smiles.DATASETS[args.dataset] != "rmse":
        parser.error(f"--select gcv with --dataset {args.dataset}: it estimates a squared error and cannot compare by "
                     f"{smiles.DATASETS[args.dataset]}; use --select loo or validation")
    if args.store == "none":
        parser.error("--store none: not here; give a folder, or leave it out to keep tiles in memory")
    of_gcn = "gcn" not in PARTS[args.kernel] and f"--kernel {args.kernel} has no graphs"
    idle = {"data": args.dataset == "nci" and "the molecules of --dataset nci come with RDKit",
            "pool": of_gcn, "jump": of_gcn, "weights": of_gcn,
            "fingerprints": args.kernel == "gcn" and "--kernel gcn has none"}
    for flag in experiment.given(parser, argv):
        if idle.get(flag):
            parser.error(f"--{flag} changes nothing here: {idle[flag]}. Leave it out")
    return args


def main(argv=None):
    """Run one experiment; returns what is written to runs.jsonl, as a dict; with --kind both a dict of these by
    kind, with --sizes by size."""
    args = parse(argv)
    experiment.writable(args.out)
    run, seconds = experiment.provenance(), {}
    kinds = kernel.KINDS if args.kind == "both" else (args.kind,)
    with regression.phase("data", seconds):
        rows = smiles.load(args.dataset, args.data, FEW if args.dataset == "nci" else None, args.quiet)
        args.split = args.split or ("official" if rows.official is not None else "random")
        parts = smiles.split(rows, args.split, args.seed)
        derive(args, parts)
        parts = (parts[0][:args.n_train], *parts[1:])
        y, mols = rows.y[np.concatenate(parts)], [rows.mols[i] for i in np.concatenate(parts)]
        where = dict(zip(("train", "val", "test"), np.split(np.arange(len(y)), np.cumsum([len(p) for p in parts])[:2])))
        if selected(args) != "validation":
            del where["val"]
            if np.isnan(y[where["train"]]).any():
                raise ValueError(f"--select {args.select}: {args.dataset} has missing labels, so every task has a "
                                 "matrix of its own, of its labelled rows; use --select validation")
        for n in args.sizes:
            check_labels(args, rows.tasks, where, y, n)
        inputs = {part: smiles.graphs(mols, args.weights, args.quiet) if part == "gcn" else
                  smiles.fingerprints(mols, args.fingerprints, quiet=args.quiet) for part in PARTS[args.kernel]}
    if not args.quiet:
        print(experiment.described(args))
    with regression.phase("choose", seconds):
        networks = chosen(args, kinds[0], inputs, where, y)
    results = {kind: {} for kind in kinds}
    for one, compared in networks:
        spent, most = dict(seconds), max(compared)
        with regression.phase("kernel", spent):
            matrices = kernels(one, kinds, inputs, {**where, "train": where["train"][:most]})
        for kind, of_parts in zip(kinds, matrices):
            for n in compared:
                blocks = dict(zip(where, summed(of_parts, n)))
                result = {**one_size(one, blocks, labels(args, where, y, n)), "compared": compared[n],
                          "entries": sum(block.entries for block in blocks.values())}
                result["entries_computed"] = sum(K.entries - K.found for of in of_parts for K in of) if n == most else 0
                result["seconds"] = {name: round(s, 3) for name, s in {**spent, **result["seconds"]}.items()}
                experiment.record(args.out, config(one, kind, n), result, run, describe)
                results[kind][n] = result
        del matrices, of_parts, blocks  # before those of the next network
    if args.dataset == "nci" and not args.quiet:
        print("Here a network learns a formula. For something measured: --dataset esol --data DIR; --help says what "
              "DIR must hold")
    results = {kind: {n: of[n] for n in args.sizes} if len(of) > 1 else of[args.n_train] for kind, of in results.items()}
    return results if args.kind == "both" else results[args.kind]


def derive(args, parts):
    """Fill in what was not asked for; refuse more rows than there are."""
    have = len(parts[0])
    if not all(1 <= n <= have for n in [args.n_train or have, *args.sizes]):
        raise ValueError(f"n_train={args.n_train}, sizes={args.sizes}: {args.dataset} has 1 to {have} molecules to "
                         "train on")
    args.n_train, args.n_test = args.n_train or have, len(parts[2])
    args.sizes = args.sizes or [args.n_train]
    for part, kind in itertools.product(PARTS[args.kernel], kernel.KINDS if args.tile is None and args.store else ()):
        from large import store
        known = store.manifest(os.path.join(args.store, f"train-{part}-{kind}"))
        if known and args.kind in (kind, "both"):
            args.tile = known["tile"]
    if args.tile is None:
        sides = (1024, 8192) if args.kernel == "fingerprint" else (1024, 4096)
        args.tile = experiment.tile_side(*sides, args.n_train)


def selected(args):
    """The criterion: unless asked for another, validation, for the validation rows are there and are not fitted."""
    return args.select or "validation"


def by(args):
    """What is compared, as `choose.best` takes it: the squared error where numbers are predicted, else the score."""
    return "mse" if smiles.DATASETS[args.dataset] == "rmse" else "score"


def taught(args, y):
    """Which tasks have in y (rows, tasks) two classes, or where numbers are predicted one label: (tasks,) bool."""
    least = 1 if smiles.DATASETS[args.dataset] == "rmse" else 2
    return np.array([len(np.unique(of[~np.isnan(of)])) >= least for of in y.T])


def labels(args, where, y, n):
    """{name: (rows, tasks)} of the first n training rows and of the others, for the tasks that those n teach."""
    found = {name: y[numbers[:n] if name == "train" else numbers] for name, numbers in where.items()}
    tasks = taught(args, found["train"])
    return {name: of[:, tasks] for name, of in found.items()}


def check_labels(args, tasks, where, y, n):
    """Says which tasks n training rows cannot teach.  ValueError: they teach none; or other rows cannot measure any of
    them, or cannot choose by them where there is something to choose."""
    score, found = smiles.DATASETS[args.dataset], taught(args, y[where["train"][:n]])
    short = "no number" if score == "rmse" else "labels of one class only"
    choose_by = len(args.ridge) > 1 or len(experiment.settings(args)) > 1
    if not found.any():
        raise ValueError(f"n_train={n}: the first {n} training molecules of {args.dataset} have {short} of "
                         f"{', '.join(tasks[:5])}: they teach nothing, and {score} is not defined; raise --n_train, or take "
                         "another --seed")
    for name, cure in (("val", "use --select loo, "), ("test", "take ")):
        rows = where.get(name)
        if rows is not None and (not len(rows) or (name == "test" or choose_by) and not (found & taught(args, y[rows])).any()):
            raise ValueError(f"split {args.split!r}: the {len(rows)} {name} molecules of {args.dataset} have "
                             f"{short if len(rows) else 'no label'} of what {n} training molecules teach, so that {score} is "
                             f"not defined; {cure}{'one --ridge, ' * (name == 'val' and len(rows) > 0)}another --split or "
                             "another --seed")
    left = [task for task, there in zip(tasks, found) if not there]
    if left:
        print(f"note: n_train={n}: {len(left)} of {len(tasks)} tasks have {short} among the training molecules, and are left "
              f"out: {', '.join(left[:5])}" + " ..." * (len(left) > 5))


def network(args, part, x):
    """The engine of a part, and its layers."""
    if part == "gcn":
        return graphs.kernel_fn, gcn(x.degree, args.depth, pool=args.pool, jump=args.jump, w_std=args.w_std,
                                            b_std=args.b_std)
    return vector_kernel, kernel.network("fc", args.depth, args.w_std, args.b_std)


def kernels(args, kinds, inputs, where):
    """For every kind, for every part, [K, ...]: K of the training rows, then that of each other name's with these.

    inputs: {part: all rows}.   where: {name: numbers of its rows}, train first."""
    of_parts = []
    for part, x in inputs.items():
        engine, layers = network(args, part, x)
        rows = {f"{name}-{part}": x.take(of) if part == "gcn" else x[of] for name, of in where.items()}
        about = [layer[:1] if layer[0] == "aggregate" else layer for layer in layers]  # its degree is that of the padding
        of_parts.append(experiment.matrices(
            partial(engine, layers), kinds, rows, args.store, {"kernel": part, "layers": about}, args.tile,
            devices=experiment.devices(args.devices), quiet=args.quiet))
    return list(zip(*of_parts))


def summed(of_parts, n):
    """[K, ...] for the first n training rows: the sum over parts, each divided by the mean diagonal of its K of these
    rows; of one part as it is.  Tiles of the same keys, in memory."""
    blocks = [[block.leading(n).merged() for block in of] for of in of_parts]
    if len(blocks) == 1:
        return blocks[0]
    scales = [np.float32(1 / of[0].diagonal().mean()) for of in blocks]
    return [replace(same[0], tiles={key: sum(scale * block.tiles[key] for scale, block in zip(scales, same))
                                    for key in same[0].keys()}) for same in zip(*blocks)]


def chosen(args, kind, inputs, where, y):
    """[(args, {n: compared}), ...]: of the flags that were given several values the ones that each size chooses, as it
    would alone; sizes that choose the same share a network.  compared: of `experiment.compare`."""
    found, table = {}, cache(lambda setting: criteria(args, kind, inputs, where, y, dict(setting)))
    for n in args.sizes:
        one = argparse.Namespace(**vars(args))
        if len(args.sizes) > 1 and len(experiment.settings(args)) > 1 and not args.quiet:
            print(f"n_train={n}:")
        compared = experiment.compare(one, lambda setting: table(tuple(setting.items()))[n], by(args))
        name = " ".join(f"{flag}={getattr(one, flag)}" for flag in experiment.SETTINGS if hasattr(one, flag))
        found.setdefault(name, (one, {}))[1][n] = compared
    if len(found) > 1 and args.store:
        raise ValueError(f"--store {args.store}: it holds one network, and --sizes {args.sizes} choose {len(found)}: "
                         f"{'; '.join(f'{list(sizes)} {name}' for name, (_, sizes) in found.items())}; give one value of each "
                         "flag, or every size a run and a store of its own")
    return list(found.values())


def criteria(args, kind, inputs, where, y, setting):
    """{n: [choose.Row, ...]} of one setting of the flags that were given several values, for a kind: for every size on its
    first choose.DENSE training molecules, at most."""
    few = {n: min(n, choose.DENSE) for n in args.sizes}
    one = argparse.Namespace(**{**vars(args), **setting, "store": None})
    where = {name: rows[:max(few.values())] if name == "train" else rows for name, rows in where.items() if name != "test"}
    matrices, found = kernels(one, (kind,), inputs, where)[0], {}
    for n, m in few.items():
        K, targets, _, options = problem(one, dict(zip(where, summed(matrices, m))), labels(args, where, y, m))
        found[n] = regression.search(K, targets, args.ridge, **{**options, "quiet": True})
    return found


def problem(args, blocks, y):
    """K, targets (n, tasks), their mean (tasks,), and how ridges are compared, as options of `regression.fit`.

    blocks: {"train": K (n, n), "val": K_val (rows, n)}, the latter where the criterion is validation.
    y: {"train": ..., "val": ...}, (rows, tasks), NaN where there is no label.
    """
    masks, K = {name: ~np.isnan(of) for name, of in y.items()}, blocks["train"]
    mean = np.where(masks["train"], y["train"], 0).sum(axis=0) / np.maximum(masks["train"].sum(axis=0), 1)
    targets = {name: np.where(masks[name], of - mean, 0) for name, of in y.items()}
    measure = SCORES[smiles.DATASETS[args.dataset]]
    options = {"select": selected(args), "by": by(args), "rank": args.rank, "seed": args.seed, "quiet": args.quiet,
               "score": lambda f, rows: measure(f + mean, y["val"] if rows is None else y["train"][rows])}
    if "val" in blocks:
        K_val = blocks["val"] if masks["val"].all() else missing.Labelled(blocks["val"], masks["val"])
        options["held_out"] = K.shape[0], (K_val, targets["val"])
    if not masks["train"].all():
        low = pcg.low_rank(K, args.rank or min(RANK, max(1, K.shape[0] // 2)), args.seed, quiet=args.quiet)
        options["look"], K = missing.Look(low, masks["train"]), missing.Labelled(K, masks["train"])
    return K, targets["train"], mean, options


def one_size(args, blocks, y):
    """Choose the ridge, solve, predict, for one size: what came of it, as a dict.  blocks, y: as of `problem`, with
    "test" in them too."""
    K, targets, mean, options = problem(args, blocks, y)
    _, f, result, _ = regression.fit(K, blocks["test"], targets, args.ridge, tol=args.tol, **options)
    score = smiles.DATASETS[args.dataset]
    return {f"test_{score}": SCORES[score](f + mean, y["test"]), "tasks": len(mean),
            "labels": int(np.sum(~np.isnan(y["train"]))), **result}


def rmse(f, y):
    """Root mean squared error over the labels, mean over tasks."""
    return float(np.mean(np.sqrt(np.nanmean((f - y) ** 2, axis=0))))


def per_task(measure):
    """The mean over tasks of measure(labels, f) on the labelled rows; tasks without both classes there do not
    count, as OGB has it."""
    def mean(f, y):
        known = [(f[rows, t], y[rows, t]) for t, rows in enumerate(~np.isnan(y).T)]
        found = [measure(labels, one) for one, labels in known if len(set(labels)) > 1]
        if not found:
            raise ValueError(f"no task has labels of both classes among {len(y)} rows: nothing to measure; take more")
        return float(np.mean(found))
    return mean


SCORES = {"rmse": rmse, "auc": per_task(roc_auc_score), "ap": per_task(average_precision_score)}


def config(args, kind, n):
    """What decides the result of this run; whiten is what results/ calls the encoding."""
    encoding = [args.split]
    if args.kernel != "fingerprint":
        encoding += [args.weights, args.pool] + ["jump"] * args.jump
    if args.kernel != "gcn" and args.fingerprints != ["morgan"]:
        encoding += args.fingerprints
    return {**{key: value for key, value in vars(args).items() if key not in WHERE}, "kind": kind, "n_train": n,
            "whiten": " ".join(encoding)}


def describe(result):
    """The result line."""
    config = result["config"]
    name = smiles.DATASETS[config["dataset"]]
    scores = {ridge: score for ridge, score, _ in result["search"]}
    return (f"{config['dataset']} {config['kernel']} {config['kind']} {config['whiten']} n_train={config['n_train']} "
            f"n_test={config['n_test']}: test {name} {result['test_' + name]:.4f}, "
            + (f"validation {scores[result['ridge']]:.4f}, " if result["select"] == "validation" else "")
            + (f"leave-one-out {result['loo_score']:.4f}, " if "loo_score" in result else "")
            + f"ridge {result['ridge']:.2g}, CG {result['cg_iterations']} steps to {result['cg_residual']:.1e}, "
            f"{result['entries_computed'] / max(result['seconds']['kernel'], 1e-9):.3g} entries/s, "
            + ", ".join(f"{name} {s:.1f} s" for name, s in result["seconds"].items())
            + f", peak memory {result['peak_memory_gb']:.1f} GB")


if __name__ == "__main__":
    experiment.run(main, parse(None))
