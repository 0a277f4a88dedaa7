"""Kernel regression with an infinitely wide graph network on molecules, top to bottom.

  f(x) = k(x, X) (K + lambda I)^-1 y,   K = k(X, X),   lambda = ridge * mean(diag K)

k is the kernel of a graph network (gcn), of a fully connected network on fingerprints (Morgan counts, or others), or the
sum of the two, each divided by its mean diagonal. y is the label, or the measured number, minus its mean over the training
rows. If labels are missing, every task is solved on the rows that have its label, all tasks together (missing.py). A task
with only one class among the training rows is left out, and a note says so. The rare class gets no extra weight, because the
score (area under the ROC curve, or average precision) depends only on the order of the predictions.

A file of your own has a column of SMILES and one or several targets. A target with exactly two different values is a class,
scored by the area under the ROC curve; any other is a number, scored by the root mean squared error. Several numbers are
divided by their standard deviations first, so that one ridge suits them all.

Ridges, and every flag of the network that has several values, are compared by that score, or by squared error if the targets
are numbers. (Comparing classes by squared error chose a ridge ten times larger on all of molhiv with fingerprints: a
validation AUC of 0.807 instead of 0.823.) They are compared on the validation rows, which are never fitted, or with
--select loo on the training rows, each predicted from all others (choose.py). Test rows are read once.

  python -m molecules.train                                      1,500 molecules that come with RDKit: a minute
  python -m molecules.train --dataset esol --data DIR --split scaffold
  python -m molecules.train --dataset esol --data DIR --kernel sum --select loo --depth 1,3 --b_std 0,0.5
  python -m molecules.train --dataset molhiv --data DIR --kernel fingerprint --fingerprints morgan,pairs,torsions
  python -m molecules.train --dataset molhiv --data DIR --sizes 1000,2000,4000 --kind both --store K
  python -m molecules.train --dataset FILE.csv --smiles structure --target activity --save model.npz
  python -m molecules.train --load model.npz --predict NEW.csv --variance
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
except ImportError:  # without fast/, kernel.py computes the same, more slowly
    from kernel import kernel_fn as vector_kernel

FEW = 1500  # rows of nci that are read: the run takes a minute
RANK = 512  # highest default rank of the preconditioner if labels are missing
PARTS = {"gcn": ("gcn",), "fingerprint": ("fingerprint",), "sum": ("gcn", "fingerprint")}
WHERE = ("data", "out", "quiet", "store", "sizes", "devices",  # do not change the result, so they are not recorded
         "save", "load", "predict", "variance")
WITH_LOAD = ("load", "predict", "smiles", "variance", "out", "quiet", "devices")
SOURCES = """files that DIR must hold: esol: delaney-processed.csv; molhiv: HIV.csv, and the official split as
ogbg-molhiv_scaffold_split.npz (arrays train, val, test of row numbers); muv: muv.csv.gz. These are MoleculeNet's files:
deepchemdata.s3-us-west-1.amazonaws.com/datasets/. For molpcba, and for molhiv instead of these files: the folders mapping
and split of OGB's archive, unpacked: snap.stanford.edu/ogb/data/graphproppred/csv_mol_download/{hiv,pcba}.zip"""


def flags():
    """The parser of the command line."""
    parser = experiment.Parser(
        prog="python -m molecules.train",
        description="Exact kernel regression with infinitely wide graph networks on molecules.", epilog=SOURCES)
    rows = parser.add_argument_group("molecules")
    rows.add_argument("--dataset", default="nci", help=f"{', '.join(smiles.DATASETS)}; nci needs no file. Or your own data: "
                      "the path of a .csv or .csv.gz file")
    rows.add_argument("--data", metavar="DIR", help="folder with the data set's files")
    rows.add_argument("--smiles", metavar="COLUMN", help="column of your file that holds the SMILES; None: smiles, or with "
                      "--load the column that the model was fitted with")
    rows.add_argument("--target", metavar="COLUMN,...", help="column of your file to predict, or several, separated by "
                      "commas: classes if it has exactly two different values, else numbers. A cell may be empty")
    rows.add_argument("--split", choices=smiles.SPLITS, help="None: official if the data set has one, else random")
    rows.add_argument("--n_train", type=int, help="number of training molecules; None: all")
    rows.add_argument("--sizes", metavar="N,N,...", help="solve for these numbers of training molecules too, each time the "
                      "first of the n_train, on blocks of the same kernel")
    network = parser.add_argument_group("kernel")
    network.add_argument("--kernel", default="gcn", choices=PARTS, help="sum: of the other two, each with mean diagonal 1")
    network.add_argument("--kind", default="nngp", choices=[*kernel.KINDS, "both"],
                         help="both: two runs, with both kernels computed in one pass")
    network.add_argument("--depth", default="3", help="rounds of gcn, or hidden layers on fingerprints. This flag and the "
                         "next two take several values, separated by commas: the best is chosen in the same way as the ridge")
    experiment.network_flags(network, images_or_sequences=False)
    network.add_argument("--pool", default="sum", choices=["sum", "mean"], help="how gcn pools the atoms")
    network.add_argument("--jump", action="store_true", help="pool the atoms after every round and add up the rounds")
    network.add_argument("--weights", default="normal", choices=["normal", "sum", "order"],
                         help="adjacency of gcn: D^-1/2 (A + I) D^-1/2, A + I, or the first with bond orders in A")
    network.add_argument("--fingerprints", default="morgan", metavar="NAME,...", help="patterns to count: "
                         f"{', '.join(smiles.FINGERPRINTS)}, or several, separated by commas; see smiles.fingerprints")
    network.add_argument("--tile", type=int, help="side of a tile of K, in rows; None: the store's, or chosen from kernel "
                         "and n_train")
    network.add_argument("--store", metavar="DIR", help="keep tiles in this folder and continue from the tiles there, also "
                         "with a larger n_train; None: tiles stay in memory")
    solver = parser.add_argument_group("solver")
    solver.add_argument("--ridge", default="auto", help="lambda / mean(diag K): one number; or several, separated by "
                        "commas, or auto (10 down to 1e-6): the best is chosen")
    experiment.select_flag(solver, "validation; loo and gcv need a label of every task for every training molecule, and "
                        "gcv needs numbers as targets")
    solver.add_argument("--tol", type=float, default=1e-6, help="stop when every column has |y - A x| <= tol |y|")
    solver.add_argument("--rank", type=int, help="rank of the preconditioner; None: chosen by a cost model; "
                        "with missing labels half of the rows, 512 at most")
    model_flags(parser.add_argument_group("fitted model"))
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="seed of random splits, of the order of training rows, of pivots")
    run.add_argument("--devices", type=int, help="number of devices to use; None: every GPU, or else every core")
    run.add_argument("--out", default="runs", metavar="DIR", help="append a line to runs.jsonl in this folder")
    run.add_argument("--quiet", action="store_true", help="print the result and notes about the data, no progress")
    return parser


def model_flags(group):
    """Adds the flags of a model in a file."""
    group.add_argument("--save", metavar="FILE", help="write what predictions need to this file, .npz")
    group.add_argument("--load", metavar="FILE", help="fit nothing, but --predict with the model in this file")
    group.add_argument("--predict", metavar="FILE", help="new molecules, .csv or .csv.gz. Its columns and the predictions "
                       "go to predictions.csv in --out")
    group.add_argument("--variance", action="store_true", help="with --load: also the standard deviation of each "
                       "prediction, at the cost of a solve for each row; nngp only, and only if no label was missing")


def parse(argv):
    """The flags, checked against each other; ridge, sizes and the flags of the network are lists."""
    parser = flags()
    args = parser.parse_args(argv)
    experiment.check(parser, args, "depth", "tile", "rank", "devices")
    args.fingerprints = args.fingerprints.split(",")
    if len(set(args.fingerprints) & set(smiles.FINGERPRINTS)) < len(args.fingerprints):
        parser.error(f"--fingerprints {','.join(args.fingerprints)}: expected {', '.join(smiles.FINGERPRINTS)}, "
                     "or several of these, separated by commas")
    if args.store == "none":
        parser.error("--store none is not available for molecules; give a folder, or leave it out to keep tiles in memory")
    if not args.dataset.lower().endswith((".csv", ".csv.gz")) and args.dataset not in smiles.DATASETS:
        parser.error(f"--dataset {args.dataset}: expected one of {', '.join(smiles.DATASETS)}, or the path of a .csv or "
                     ".csv.gz file")
    experiment.refuse_idle(parser, argv, idle(args))
    if (args.load is None) != (args.predict is None):
        parser.error("--load FILE and --predict FILE go together")
    if args.save and (args.kind == "both" or len(args.sizes) > 1):
        parser.error("--save with --kind both or several --sizes: a file holds one model; choose one kind and one size")
    experiment.check_file(parser, args.save)
    return args


def idle(args):
    """{flag: why it changes nothing in this run, or False}."""
    if args.load:
        return dict.fromkeys(set(vars(args)) - set(WITH_LOAD), "--load takes all that from the model's file")
    named = args.dataset in smiles.DATASETS and f"it names a column of your own file, and --dataset {args.dataset} is none"
    no_graphs = "gcn" not in PARTS[args.kernel] and f"--kernel {args.kernel} uses no graphs"
    return {"data": args.dataset == "nci" and "the molecules of --dataset nci come with RDKit"
            or not named and "--dataset is a path",
            "smiles": named, "target": named, "pool": no_graphs, "weights": no_graphs,
            "jump": no_graphs or args.depth == [1] and "--depth 1 has one round, which is pooled without it",
            "fingerprints": args.kernel == "gcn" and "--kernel gcn uses none", "variance": "it belongs to --load"}


def main(argv=None):
    """Run one experiment. Returns the line written to runs.jsonl, as a dict; with --sizes {size: line}, with --kind both
    {kind: line or {size: line}}; with --load, what predict.py returns."""
    args = parse(argv)
    if args.load:
        from molecules import predict
        return predict.main(args)
    experiment.writable(args.out)
    run, seconds = experiment.provenance(), {}
    kinds = kernel.KINDS if args.kind == "both" else (args.kind,)
    with regression.phase("data", seconds):
        rows = load(args)
        order, where = divided(args, rows)
        y = rows.y[order]
        for n in args.sizes:
            check_labels(args, rows.tasks, where, y, n)
        x = inputs(args, [rows.mols[i] for i in order])
    if not args.quiet:
        print(experiment.described(args))
    with regression.phase("choose", seconds):
        networks = chosen(args, kinds[0], x, where, y)
    results = {kind: {} for kind in kinds}
    for chosen_args, compared in networks:
        spent, largest = dict(seconds), max(compared)
        with regression.phase("kernel", spent):
            matrices = kernels(chosen_args, kinds, x, {**where, "train": where["train"][:largest]})
        for kind, of_parts in zip(kinds, matrices):
            for n in compared:
                scales = scales_of_parts(of_parts, n)
                blocks = dict(zip(where, sum_of_parts(of_parts, n, scales)))
                result, fit = one_size(chosen_args, blocks, labels(args, where, y, n))
                result.update(compared=compared[n], entries=sum(block.entries for block in blocks.values()))
                result["entries_computed"] = sum(K.entries - K.found for part in of_parts for K in part) * (n == largest)
                result["seconds"] = {name: round(s, 3) for name, s in {**spent, **result["seconds"]}.items()}
                experiment.record(args.out, config(chosen_args, kind, n), result, run, describe)
                results[kind][n] = result
        del matrices, of_parts, blocks  # free this memory before the next network
    if args.save:
        from molecules import predict
        predict.save(chosen_args, rows, order[:n], learnable(args, y[:n]), {**run, **fit, "scales": scales})
    if args.dataset == "nci" and not args.quiet:
        print("The target here is a computed quantity (Crippen log P). For measured data: --dataset esol --data DIR; --help "
              "lists the files that DIR must hold")
    results = {kind: {n: by_size[n] for n in args.sizes} if len(by_size) > 1 else by_size[args.n_train]
               for kind, by_size in results.items()}
    return results if args.kind == "both" else results[args.kind]


def load(args):
    """The Molecules. Sets args.score, and for a file of one's own also args.smiles, args.target and args.digest.
    ValueError: --select gcv with classes."""
    rows, args.score = None, smiles.DATASETS.get(args.dataset)
    if not args.score:
        args.smiles = args.smiles or "smiles"
        rows, args.digest = smiles.own(args.dataset, args.smiles, args.target, args.quiet)
        args.target, args.score = rows.tasks, "auc" if rows.classes[0] else "rmse"
    if args.select == "gcv" and args.score != "rmse":
        raise ValueError(f"--select gcv with --dataset {args.dataset}: GCV estimates a squared error and cannot compare by "
                         f"{args.score}; use --select loo or validation")
    return rows or smiles.load(args.dataset, args.data, FEW if args.dataset == "nci" else None, args.quiet)


def divided(args, rows):
    """The numbers of the rows that are used, and {name: where in this order they are} for train, which comes first, val and
    test; without val if the criterion does not read it.  Fills in split, n_train, n_test, sizes and tile."""
    args.split = args.split or ("official" if rows.official is not None else "random")
    parts = smiles.split(rows, args.split, args.seed)
    derive(args, parts)
    parts = (parts[0][:args.n_train], *parts[1:])
    if not args.quiet:
        note_copies(args, rows, parts)
    order = np.concatenate(parts)
    where = dict(zip(smiles.PARTS, np.split(np.arange(len(order)), np.cumsum([len(p) for p in parts])[:2])))
    if not len(parts[1]) and not choosing(args):
        del where["val"]
    elif selected(args) != "validation":
        del where["val"]
        if np.isnan(rows.y[parts[0]]).any():
            raise ValueError(f"--select {args.select}: {args.dataset} has missing labels, so every task has its own "
                             "matrix, of the rows with its label; use --select validation")
    return order, where


def note_copies(args, rows, parts):
    """Says how many test molecules are training molecules too, and how many training molecules repeat another, however they
    are written; stereoisomers, which look alike to most kernels here, count as one molecule."""
    write = partial(smiles.chemistry().MolToSmiles, isomericSmiles=False)
    train, _, test = ([write(rows.mols[i]) for i in part] for part in parts)
    known = set(train)
    both = [rows.smiles[i] for i, name in zip(parts[2], test) if name in known]
    if both:
        print(f"note: {len(both)} of {len(test)} test molecules of {args.dataset} are training molecules too (stereochemistry "
              f"apart), such as {both[0]}")
    if len(known) < len(train):
        print(f"note: {len(train) - len(known)} of {len(train)} training molecules of {args.dataset} repeat another "
              "(stereochemistry apart), so that errors on molecules left out are too small")


def derive(args, parts):
    """Fill in n_train, n_test, sizes and tile if they were not given.  ValueError: more rows than the data set has."""
    have, every = len(parts[0]), sum(map(len, parts))
    if args.split == "scaffold" and 5 * have < every:  # one group, too large to train on, is the test set
        raise ValueError(f"split 'scaffold' leaves {have} of the {every} molecules of {args.dataset} for training: most have "
                         "the same ring system, or none. Use --split random")
    if not have:
        raise ValueError(f"split {args.split!r} leaves none of the {every} molecules of {args.dataset} for "
                         "training: expected at least two")
    if not all(1 <= n <= have for n in [args.n_train or have, *args.sizes]):
        raise ValueError(f"n_train={args.n_train}, sizes={args.sizes}: expected 1 to {have}, the molecules of {args.dataset} "
                         "to train on")
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
    """The criterion: --select, or validation, because every split has validation rows and they are not fitted."""
    return args.select or "validation"


def choosing(args):
    """Whether there is anything to choose."""
    return len(args.ridge) > 1 or len(experiment.settings(args)) > 1


def compared_by(args):
    """The argument `by` of `choose.best`: "mse" if the targets are numbers, else "score"."""
    return "mse" if args.score == "rmse" else "score"


def learnable(args, y, tested=False):
    """(tasks,) bool: which tasks have in y (rows, tasks) two classes, or two different numbers; to be tested, one number."""
    least = 1 if args.score == "rmse" and tested else 2
    return np.array([len(np.unique(column[~np.isnan(column)])) >= least for column in y.T])


def labels(args, where, y, n):
    """{name: (rows, tasks)}: labels of the first n training rows and of the other rows, for tasks learnable from those n."""
    rows = {name: y[numbers[:n] if name == "train" else numbers] for name, numbers in where.items()}
    tasks = learnable(args, rows["train"])
    return {name: part[:, tasks] for name, part in rows.items()}


def check_labels(args, tasks, where, y, n):
    """Prints which tasks cannot be learned from n training rows.  ValueError: none can; or the test rows have a score for
    none of them; or the validation rows have none although there is something to choose."""
    score, usable = args.score, learnable(args, y[where["train"][:n]])
    short = "no two different numbers" if score == "rmse" else "only one class"
    if not usable.any():
        raise ValueError(f"n_train={n}: the first {n} training molecules of {args.dataset} have {short} for "
                         f"{', '.join(tasks[:5])}, so nothing can be learned and {score} is not defined; raise --n_train or "
                         "use another --seed")
    for name, cure in (("val", "use --select loo, "), ("test", "use ")):
        rows = where.get(name)
        if rows is not None and (name == "test" or choosing(args)) and not (usable & learnable(args, y[rows], True)).any():
            raise ValueError(f"split {args.split!r}: the {len(rows)} {name} molecules of {args.dataset} have "
                             f"{short if len(rows) else 'no label'} in each task that can be learned from {n} training "
                             f"molecules, so {score} is not defined; {cure}"
                             f"{'one --ridge, ' * (name == 'val' and len(rows) > 0)}another --split or another --seed")
    left_out = [task for task, use in zip(tasks, usable) if not use]
    if left_out:
        print(f"note: n_train={n}: {len(left_out)} of {len(tasks)} tasks have {short} among the training molecules and are "
              f"left out: {', '.join(left_out[:5])}" + " ..." * (len(left_out) > 5))


def inputs(args, mols):
    """{part: the inputs of its kernel}."""
    return {part: smiles.graphs(mols, args.weights, args.quiet) if part == "gcn" else
            smiles.fingerprints(mols, args.fingerprints, quiet=args.quiet) for part in PARTS[args.kernel]}


def network(args, part, x):
    """The engine of a part (gcn or fingerprint), and its layers."""
    if part == "gcn":
        return graphs.kernel_fn, gcn(x.degree, args.depth, pool=args.pool, jump=args.jump, w_std=args.w_std, b_std=args.b_std)
    return vector_kernel, kernel.network("fc", args.depth, args.w_std, args.b_std)


def kernels(args, kinds, inputs, where):
    """For every kind and every part [K, K_val, K_test]: K of the training rows, then of the other rows with these.

    inputs: {part: all rows}.   where: {name: numbers of its rows}, train first, then those of val and test that are used."""
    of_parts = []
    for part, x in inputs.items():
        engine, layers = network(args, part, x)
        rows = {f"{name}-{part}": taken(x, of) for name, of in where.items()}
        known_by = [layer[:1] if layer[0] == "aggregate" else layer for layer in layers]  # without degree: only padding
        of_parts.append(experiment.matrices(
            partial(kernel.compiled, engine, tuple(layers)), kinds, rows, args.store, {"kernel": part, "layers": known_by},
            args.tile, devices=experiment.devices(args.devices), quiet=args.quiet))
    return list(zip(*of_parts))


def taken(x, rows):
    """The inputs with these numbers."""
    return x.take(rows) if isinstance(x, smiles.Graphs) else x[rows]


def scales_of_parts(of_parts, n):
    """What each part of a sum is multiplied by: 1 / the mean diagonal of its K of the first n training rows."""
    if len(of_parts) == 1:
        return [1.0]
    return [float(np.float32(1 / part[0].leading(n).diagonal().mean())) for part in of_parts]


def sum_of_parts(of_parts, n, scales):
    """[K, K_val, K_test] for the first n training rows: a single part as it is; of two parts the sum, each multiplied by its
    scale, in memory."""
    blocks = [[block.leading(n).merged() for block in part] for part in of_parts]
    if len(blocks) == 1:
        return blocks[0]
    return [replace(same[0], tiles={key: sum(np.float32(scale) * block.cut(key)[2] for scale, block in zip(scales, same))
                                    for key in same[0].keys()}) for same in zip(*blocks)]


def chosen(args, kind, inputs, where, y):
    """[(args with one value for each flag, {n: compared}), ...]: every size chooses the values of the flags as a run of
    this size alone would; sizes that choose the same values share a network.  compared: from `experiment.compare`."""
    networks, table = {}, cache(lambda setting: criteria(args, kind, inputs, where, y, dict(setting)))
    for n in args.sizes:
        best = argparse.Namespace(**vars(args))
        if len(args.sizes) > 1 and len(experiment.settings(args)) > 1 and not args.quiet:
            print(f"n_train={n}:")
        compared = experiment.compare(best, lambda setting: table(tuple(setting.items()))[n], compared_by(args))
        name = " ".join(f"{flag}={getattr(best, flag)}" for flag in experiment.SETTINGS if hasattr(best, flag))
        networks.setdefault(name, (best, {}))[1][n] = compared
    if len(networks) > 1 and args.store:
        raise ValueError(f"--store {args.store} holds one network, but --sizes {args.sizes} choose {len(networks)}: "
                         f"{'; '.join(f'{list(sizes)} {name}' for name, (_, sizes) in networks.items())}; give each flag one "
                         "value, or run each size alone with its own store")
    return list(networks.values())


def criteria(args, kind, inputs, where, y, setting):
    """{n: [choose.Row, ...]}: a row for each ridge, for one setting of the flags and one kind. Every size is compared on its
    first training molecules, at most choose.DENSE."""
    few = {n: min(n, choose.DENSE) for n in args.sizes}
    tried = argparse.Namespace(**{**vars(args), **setting, "store": None})
    where = {name: rows[:max(few.values())] if name == "train" else rows for name, rows in where.items() if name != "test"}
    matrices, table = kernels(tried, (kind,), inputs, where)[0], {}
    for n, m in few.items():
        blocks = dict(zip(where, sum_of_parts(matrices, m, scales_of_parts(matrices, m))))
        K, targets, _, options = problem(tried, blocks, labels(args, where, y, m))
        table[n] = regression.search(K, targets, args.ridge, **{**options, "quiet": True})
    return table


def problem(args, blocks, y):
    """K, targets (n, tasks), what turns f into predictions, and options of `regression.fit`: how ridges are compared.

    blocks: {"train": K (n, n), "val": K_val (rows, n)}, the latter if the criterion is validation.
    y: {"train": ..., "val": ...}, (rows, tasks), NaN where a label is missing.
    Targets are (y - mean) / unit, predictions unit * f + mean. unit is 1, but if several numbers are predicted, their standard
    deviations: so that the ridge is not chosen for the task with the largest numbers.
    """
    masks, K = {name: ~np.isnan(part) for name, part in y.items()}, blocks["train"]
    count = np.maximum(masks["train"].sum(axis=0), 1)
    mean = np.where(masks["train"], y["train"], 0).sum(axis=0) / count
    unit = np.ones(len(mean))
    if args.score == "rmse" and len(mean) > 1:
        sd = np.sqrt((np.where(masks["train"], y["train"] - mean, 0) ** 2).sum(axis=0) / count)
        unit = np.where(sd > 0, sd, 1)
    targets = {name: np.where(masks[name], (part - mean) / unit, 0) for name, part in y.items()}
    measure = SCORES[args.score]
    options = {"select": selected(args), "by": compared_by(args), "rank": args.rank, "seed": args.seed, "quiet": args.quiet,
               "score": lambda f, rows: measure(unit * f + mean, y["val"] if rows is None else y["train"][rows])}
    if "val" in blocks:
        K_val = blocks["val"] if masks["val"].all() else missing.Labelled(blocks["val"], masks["val"])
        options["held_out"] = K.shape[0], (K_val, targets["val"])
    if not masks["train"].all():
        low = pcg.low_rank(K, args.rank or min(RANK, max(1, K.shape[0] // 2)), args.seed, quiet=args.quiet)
        options["ready"], K = missing.Look(low, masks["train"]), missing.Labelled(K, masks["train"])
    return K, targets["train"], (mean, unit), options


def one_size(args, blocks, y):
    """Choose the ridge, solve and predict for one size; returns the result as a dict, and with --save what a model keeps of
    the fit (predict.py), else None.  blocks, y: as for `problem`, and "test" in both."""
    K, targets, (mean, unit), options = problem(args, blocks, y)
    measure, fit, left = options["score"], None, None

    def score(f, rows):
        nonlocal left  # the last are those at the ridge that was chosen
        left = unit * f + mean if rows is not None else left
        return measure(f, rows)
    options["score"] = score
    alpha, f, result, solver = regression.fit(K, blocks["test"], targets, args.ridge, tol=args.tol, **options)
    if args.save:
        from molecules import predict
        fit = predict.fitted(result, solver, unit * targets, unit * alpha, mean, blocks.get("val"), y,
                             left if "loo_mse" in result else None)
    return {f"test_{args.score}": SCORES[args.score](unit * f + mean, y["test"]), "tasks": len(mean),
            **({"test_rmse_of_tasks": [rmse(one[:, None], two[:, None]) for one, two in zip((unit * f + mean).T, y["test"].T)
                                       if not np.isnan(two).all()]} if args.score == "rmse" and len(mean) > 1 else {}),
            "labels": int(np.sum(~np.isnan(y["train"]))), **result}, fit


def rmse(f, y):
    """Root mean squared error over the labels of a task, mean over the tasks that have any."""
    known = ~np.isnan(y).all(axis=0)
    if not known.any():
        raise ValueError(f"no task has a label among {len(y)} rows, so there is no score; use more rows")
    return float(np.mean(np.sqrt(np.nanmean((f - y)[:, known] ** 2, axis=0))))


def per_task(measure):
    """The mean over tasks of measure(labels, predictions) on the labelled rows; tasks without both classes are left out,
    as in OGB's evaluator. Predictions that differ by rounding only, as of molecules with one fingerprint, are ties: without
    this, their order and the score would depend on the machine."""
    def mean(f, y):
        f = np.round(f, 5)
        known = [(f[rows, t], y[rows, t]) for t, rows in enumerate(~np.isnan(y).T)]
        scores = [measure(labels, predictions) for predictions, labels in known if len(set(labels)) > 1]
        if not scores:
            raise ValueError(f"no task has labels of both classes among {len(y)} rows, so there is no score; use more rows")
        return float(np.mean(scores))
    return mean


SCORES = {"rmse": rmse, "auc": per_task(roc_auc_score), "ap": per_task(average_precision_score)}


def config(args, kind, n):
    """The settings that decide the result; results/ reads the encoding under the name `whiten`, and as `dataset` of a file of
    one's own its path, targets and digest."""
    encoding = [args.split]
    if args.kernel != "fingerprint":
        encoding += [args.weights, args.pool] + ["jump"] * args.jump
    if args.kernel != "gcn" and args.fingerprints != ["morgan"]:
        encoding += args.fingerprints
    dataset = [args.dataset] if args.dataset in smiles.DATASETS else [
        args.dataset, *[args.smiles] * (args.smiles != "smiles"), *args.target, args.digest]
    return {**{key: value for key, value in vars(args).items() if key not in WHERE}, "kind": kind, "n_train": n,
            "dataset": " ".join(dataset), "whiten": " ".join(encoding)}


def describe(result):
    """The result line."""
    config = result["config"]
    name = config["score"]
    scores = {ridge: score for ridge, score, _ in result["search"]}
    return (f"{config['dataset']} {config['kernel']} {config['kind']} {config['whiten']} n_train={config['n_train']} "
            f"n_test={config['n_test']}: test {name} {result['test_' + name]:.4g}, "
            + (f"the mean of {', '.join(f'{of:.4g}' for of in result['test_rmse_of_tasks'])}, "
               if "test_rmse_of_tasks" in result else "")
            + (f"validation {scores[result['ridge']]:.4g}, " if result["select"] == "validation" else "")
            + (f"leave-one-out {result['loo_score']:.4g}, " if "loo_score" in result else "")
            + f"ridge {result['ridge']:.2g}, CG {result['cg_iterations']} steps to {result['cg_residual']:.1e}, "
            f"{result['entries_computed'] / max(result['seconds']['kernel'], 1e-9):.3g} entries/s, compiled by XLA, "
            + ", ".join(f"{name} {s:.1f} s" for name, s in result["seconds"].items())
            + f", peak memory {result['peak_memory_gb']:.1f} GB")


if __name__ == "__main__":
    experiment.run(main, parse(None))
