"""Kernel regression with an infinitely wide network on images, top to bottom.

  f(x) = k(x, X) (K + lambda I)^-1 Y,   K = k(X, X),   lambda = ridge * mean(diag K)

(Adlam et al. 2023, arXiv 2303.05420). Y is one-hot minus 1/classes; the class with the largest f(x) is
the answer. The ridge, and whatever flag is given several values, is chosen on training images alone: by
leave-one-out where K is small (choose.py).

  python train_cifar.py                                            digits, half a minute, offline
  python train_cifar.py --dataset cifar10 --n_train 10000          downloads CIFAR-10 into ./data
  python train_cifar.py --dataset cifar10 --data DIR --kernel cnn_vec --kind ntk --n_train 1000
  python train_cifar.py --dataset cifar10 --data DIR --flips --crops 10 --n_train 1000
  python train_cifar.py --dataset cifar10 --data DIR --sizes 1000,2000,4000,8000
  python train_cifar.py --dataset cifar10 --data DIR --n_train 1000 --depth 1,3,5 --whiten zca,zca_unit --zca_eps 1,100
  python train_cifar.py --save digits.npz
  python train_cifar.py --load digits.npz --predict images.npy
"""

import argparse
import importlib
import json
import os
import zlib
from functools import partial

import numpy as np

import augment
import choose
import data
import experiment
import kernel
import regression
import tiles

ENGINES = {"plain": kernel.kernel_fn, "nt": kernel.reference_fn}
try:
    from fast import fused
    ENGINES = {"fused": fused.kernel_fn, **ENGINES}
except ImportError:  # fast/ may be deleted: kernel.py computes the same, slowly
    pass
HELD_OUT = 5000  # images of the validation split, at most
FIT_ON = 50_000  # images that the whitening is fitted on, at most
LARGEST = 4096  # numbers in an image; for larger images --whiten channel is the default, as zca takes 10 d^3 operations
PLOTS = ".png", ".svg", ".pdf"
WHITENING = {"fc": ("zca", 100.0), "cnn_vec": ("zca", 30.0), "cnn_gap": ("zca_unit", 0.1), "myrtle5": ("zca_unit", 0.1),
             "myrtle7": ("zca_unit", 0.1), "myrtle10": ("zca_unit", 0.1)}  # --whiten and --zca_eps where not given
WHERE = ("data", "out", "quiet", "store", "plan", "hosts", "coordinator", "process", "sizes", "save", "load",
         "predict", "plot", "rate", "verbose", "wait", "names")  # not what was computed: not recorded


def main(argv=None):
    """Run one experiment; returns what is written to runs.jsonl, as a dict; with --kind both a dict of these by kind, with
    --sizes by size; with --load, what own/model.py returns; with --plan, the plan."""
    args = parse(argv)
    if args.load:
        from own import model
        return model.predict(args, network_kernel)
    if args.plan:
        from large import plan
        return plan.of_images(args)
    team = experiment.team(args.coordinator, args.processes, args.process, args.devices, args.wait, args.store)
    args.quiet, args.verbose = args.quiet or team.index > 0, args.verbose and team.index == 0
    if team.index == 0:
        experiment.writable(args.out)
    for flag, room in ("save", "own.model"), ("variance", "own.uncertainty"), ("plot", "results.plot"):
        if getattr(args, flag):  # missing rooms are said before hours of work
            importlib.import_module(room)
    run, seconds, kinds = experiment.provenance(team.count), {}, kernel.KINDS if args.kind == "both" else (args.kind,)

    with regression.phase("data", seconds):
        (x_train, labels, x_test, test_labels), fits = load(args)
        view, view_test = views(args, len(x_train), len(x_test), x_train.shape[1] // 8)
        if len(labels) > 1 and (labels == labels[0]).all():
            raise ValueError(f"all {len(labels)} training images are of class {labels[0]}: there is nothing to learn")
        y = data.one_hot(labels, args.classes)[view.original]
    derive(args, x_train.shape, len(test_labels), len(y))
    if team.count > 1:
        from large import processes
        processes.agree(team, args, x_train, labels, x_test, test_labels)
    if args.verbose:
        print(experiment.described(args))
    with regression.phase("choose", seconds):
        compared = experiment.compare(args, partial(evaluate, args, kinds[0], view, x_train, y, labels, fits, team))
        # now each flag has one value, the best
        args.zca_eps = eps(args)
        whiten = fits[args.whiten](args.zca_eps)

    with regression.phase("kernel", seconds):  # K = k(X, X) and k(x, X), a pair for each kind
        x, x_test = view.of(x_train, whiten), view_test.of(x_test, whiten)
        kernel_of = partial(network_kernel, args.engine, layers(args), args.flips)  # kind -> kernel_fn
        matrices = kernels(args, kernel_of, kinds, x, x_test, team)
        priors = diagonals(args, kinds, [K for K, _ in matrices], x, team)

    results, states = {kind: {} for kind in kinds}, []
    for kind, (K_all, K_test_all), prior in zip(kinds, matrices, priors):
        for n in args.sizes:
            rows, spent = n * view.copies, {}
            blocks = [block.leading(rows) for block in (K_all, K_test_all)]
            K, K_test = (block.merged() for block in blocks)
            with regression.phase("ridge", spent):
                select, held_out, score = selection(args, labels[:n], view.copies, len(args.ridge) > 1)
                ridge, solver, found = regression.choose_ridge(
                    K, y[:rows], args.ridge, select, score, held_out, view.copies, tol=args.tol, prior=prior[:rows],
                    keep=partial(checkpoint, args, team, kind, n, states), **solver_options(args))
            with regression.phase("solve", spent):
                alpha, info = solver(y[:rows], ridge, args.tol)  # (K + lambda I) alpha = Y
            with regression.phase("predict", spent):
                f = K_test.matvec(alpha)  # f(x) = k(x, X) alpha
            result = {**scores(args, f, test_labels), **found, **regression.evidence(solver, y[:rows], alpha, info)}
            if args.variance:
                from own import uncertainty
                with regression.phase("variance", spent):
                    result.update(uncertainty.of_images(kernel_of(kind), solver, K_test, x_test, y[:rows], alpha, f, ridge,
                                                        test_labels))
            result.update(compared=compared, one_pass=args.kind == "both", entries=sum(block.entries for block in blocks),
                          **computed(args, n, K_all, K_test_all, team, seconds["kernel"]),
                          seconds={name: round(s, 3) for name, s in {**seconds, **spent}.items()})
            if team.index == 0:
                experiment.record(args.out, config(args, kind, n), result, run, describe)
            results[kind][n] = result
        if args.plot:
            from results import plot
            path = args.plot if args.kind != "both" else f"-{kind}".join(os.path.splitext(args.plot))
            plot.draw(path, f"{args.dataset} {args.kernel} {kind}, {K.shape[0]:,} rows", K, K_test, prior, y, ridge,
                      data.one_hot(test_labels, args.classes), view.copies, tol=args.tol, **solver_options(args))
    if args.save and team.index == 0:
        from own import model
        about = {**{name: getattr(args, name) for name in ("kernel", "kind", "flips", "tile", "names", "resize")}, **run,
                 **model.fitted(result, solver, y[:rows], alpha), "layers": layers(args)}
        model.save(args.save, "images", {**about, "pad": view.pad, "copies": view.copies}, alpha=alpha, support=x_train,
                   view_original=view.original, view_flip=view.flip, view_offset=view.offset,
                   **{f"whiten_{name}": value for name, value in whiten._asdict().items()})
    for state in states:
        state.remove()
    results = {kind: of if len(of) > 1 else of[args.n_train] for kind, of in results.items()}
    return results if args.kind == "both" else results[args.kind]


def views(args, n, m, pad):
    """The augmented training set and test set, as augment.View."""
    both = bool(args.average) and not args.flips  # the mean over mirror images too
    return (augment.expand(n, args.flips == "explicit", args.crops, args.seed, pad),
            augment.expand(m, both, args.average or 1, args.seed + 1, pad))


def source(args):
    """What `data.load` takes, and its shape, training images, test images and classes: a name, or images of one's own."""
    if args.dataset in data.DATASETS:
        return args.dataset, data.DATASETS[args.dataset]
    from own import images
    own = images.read(args.dataset, args.seed, args.resize)
    return own, (own.x_train.shape[1:], len(own.y_train), len(own.y_test), len(own.names))


def load(args):
    """(x_train, labels, x_test, test_labels), images as bytes, and {protocol: zca_eps -> the whitening fitted so}. Sets
    args.classes, names, fit_on and fitted_on, and the default --whiten of large images."""
    n_fit, (images, (*_, args.classes)) = args.fit_on or FIT_ON, source(args)
    args.names = getattr(images, "names", None)
    x, labels, x_test, test_labels = data.load(images, args.data, args.n_train, args.n_test, args.seed, n_fit=n_fit)
    n = args.n_train or len(x)
    if args.flips and x.shape[2] == 1:
        raise ValueError(f"--flips: what {args.dataset} holds is one pixel wide, each its own mirror image: leave it out")
    if x.shape[1:3] == (1, 1) and args.kernel != "fc":
        raise ValueError(f"--kernel {args.kernel}: {args.dataset} holds images of one pixel, where a convolution is dense. "
                         "Take --kernel fc, or images (n, h, w, channels)")
    if args.names and not args.quiet:
        from own import images as own
        own.note_copies(args.dataset, x[:n], x_test)
    if (args.fit_on or 0) > len(x):
        raise ValueError(f"--fit_on {args.fit_on}, but there are {len(x)} training images")
    args.fit_on = min(n_fit, len(x))
    if args.by_default and x[0].size > LARGEST and not args.components:
        args.whiten, args.zca_eps = ["channel"], [None]
        print(f"note: --whiten channel, for images of {x[0].size:,} numbers: with --whiten {WHITENING[args.kernel][0]}, the "
              f"best for {args.kernel} on small ones, whitening takes 10 x {x[0].size:,}^3 operations")
    fits = {protocol: data.whitening(protocol, x[:args.fit_on], bool(args.flips), args.quiet, args.components)
            for protocol in set(args.whiten)}
    args.fitted_on = f"{zlib.crc32(np.ascontiguousarray(x[:args.fit_on])):08x}"
    return (x[:n].copy() if n < len(x) else x, labels[:n], x_test, test_labels), fits


def eps(args):
    """--zca_eps, or if it was not given that of WHITENING for its protocol, 0.1 for another; None for those without."""
    protocol, zca_eps = WHITENING[args.kernel]
    default = {"zca": 0.1, "zca_unit": 0.1, protocol: zca_eps}.get(args.whiten)
    return default if args.zca_eps is None else args.zca_eps


def layers(args):
    """The network of these flags, as kernel.network lists it."""
    gamma = 1.0 if args.gamma is None else args.gamma
    return kernel.network(args.kernel, args.depth, args.w_std, args.b_std, args.head, gamma)


def network_kernel(engine, layers, flips, kind):
    """kernel_fn(x1, x2) of a network; kind: one, or a tuple of them."""
    if flips != "symmetric":
        return kernel.compiled(ENGINES[engine], tuple(layers), kind)
    if engine == "fused":
        return kernel.compiled(fused.kernel_fn, tuple(layers), kind, flips=True)
    return augment.symmetric(kernel.compiled(ENGINES[engine], tuple(layers), kind))


def on_disk(args):
    return args.store not in (None, "none")


def identity(args):
    """What decides an entry of K but its inputs and its kind, as a store keeps it."""
    return {"layers": layers(args), "engine": args.engine, "whiten": args.whiten, "zca_eps": args.zca_eps,
            "fitted_on": args.fitted_on, **({"components": args.components} if args.components else {}),
            **({"flips": args.flips} if args.flips == "symmetric" else {})}  # of the kernel; explicit ones are rows


def kernels(args, kernel_of, kinds, x, x_test, team):
    """[(K, K_test) of each kind]."""
    return experiment.matrices(kernel_of, kinds, {"train": x, "test": x_test}, args.store, identity(args), args.tile,
                               devices=experiment.devices(args.devices), quiet=args.quiet, team=team)


def diagonals(args, kinds, matrices, x, team):
    """k(x, x) of each training row, (n,) for each kind; ridges are relative to its mean. It is the diagonal of K, but without
    the mirror images where those are in the kernel, so that a ridge means what it means with explicit ones."""
    if args.flips != "symmetric":
        return [K.diagonal() for K in matrices]
    side = 64 if args.kernel in ("fc", "cnn_vec") else 8
    fns = [network_kernel(args.engine, layers(args), None, kind) for kind in kinds]
    return [tiles.diagonal(fn, x, side, experiment.devices(args.devices), team) for fn in fns]


def selection(args, labels, copies, needed=True):
    """How ridges are compared on n images: the criterion, (n_fit, rows held out) for validation, the score.
    needed: whether there is anything to compare."""
    n = len(labels)
    select, n_fit = choose.criterion(args.select, n * copies, copies), n - min(n // 5, HELD_OUT)
    if needed and select == "validation" and n_fit == n:
        raise ValueError(f"n_train={n}: a validation split needs at least 5 images; give one number with --ridge")
    present, classes = np.unique(labels[n_fit:]), len(np.unique(labels))
    expected = min(classes, n - n_fit)
    if needed and select == "validation" and (2 * len(present) < expected or len(present) == 1 < expected):  # others ran out
        text = f"the last {n - n_fit} training images, which are held out, are of {len(present)} of {classes} classes"
        if args.select or copies > 1:
            raise ValueError(f"{text}: they cannot choose a ridge. Take fewer with --n_train, or give one number with --ridge")
        print(f"note: {text}, so gcv chooses")
        select = "gcv"

    def score(f, rows):
        return float(np.mean(f.argmax(axis=1) == labels[rows // copies]))
    return select, (n_fit * copies, np.arange(n_fit, n) * copies), score


def evaluate(args, kind, view, x_train, y, labels, fits, team, setting):
    """[choose.Row, ...] of one setting of the flags with several values, on the first images: the smallest of --sizes,
    choose.DENSE rows at most."""
    one = argparse.Namespace(**{**vars(args), **setting})
    n = min(args.sizes[0], max(5, choose.DENSE // view.copies))
    x, rows = view.of(x_train, fits[one.whiten](eps(one)))[np.arange(n * view.copies)], n * view.copies
    K = tiles.gram(network_kernel(one.engine, layers(one), one.flips, kind), x, min(args.tile, -(-rows // 4)),
                   experiment.devices(args.devices), args.quiet, team=team).merged()
    prior, = diagonals(one, (kind,), [K], x, team)
    select, held_out, score = selection(args, labels[:n], view.copies)
    return regression.search(K, y[:rows], args.ridge, select, score=score, held_out=held_out, copies=view.copies,
                             prior=prior, **{**solver_options(args), "verbose": False})


def solver_options(args):
    """What these flags say about a regression.Solver."""
    return {"name": args.precondition, "rank": args.rank, "seed": args.seed, "max_iters": args.max_iters,
            "quiet": args.quiet, "verbose": args.verbose}


def scores(args, f, test_labels):
    """Accuracy and mean squared error of predictions f (rows, c) for the test images, with --average also the accuracy of
    their mean over the copies of an image."""
    f = f.reshape(len(test_labels), -1, f.shape[1])
    out = {"test_accuracy": float(np.mean(f[:, 0].argmax(axis=1) == test_labels)),
           "test_mse": float(np.mean((f[:, 0] - data.one_hot(test_labels, args.classes)) ** 2))}
    if args.average:
        out["test_accuracy_averaged"] = float(np.mean(f.mean(axis=1).argmax(axis=1) == test_labels))
    return out


def checkpoint(args, team, kind, n, states, ridge, tol, y):
    """Where this solve keeps its state, in the store if there is one; also put into the list `states`."""
    if not on_disk(args):
        return None
    from large import store
    about = {**identity(args), "n": n, "ridge": ridge, "tol": tol, "rows": len(y), "y": zlib.crc32(y.tobytes()),
             "precondition": args.precondition, "rank": args.rank, "seed": args.seed}
    name = zlib.crc32(json.dumps(about).encode())
    states.append(store.Checkpoint(os.path.join(args.store, f"solve-{kind}", f"{name:08x}.npz"), about, team))
    return states[-1]


def config(args, kind, n):
    """What decides the result of this run, as it would be asked for alone."""
    return {key: value for key, value in {**vars(args), "kind": kind, "n_train": n}.items() if key not in WHERE}


def computed(args, n, K, K_test, team, seconds):
    """As fields of a result: how many entries were computed for the run of n images, how fast, and by which compiler's
    program. None if every product computes them; 0 if they were found, or are counted with the largest n."""
    compiler = fused.compiler(layers(args)) if args.engine == "fused" else "XLA"
    if args.store == "none":
        return {"entries_computed": None, "entries_per_second": None, "compiler": "C++" if K.native else compiler}
    found = int(team.all_reduce(np.array([K.found + K_test.found]))[0])
    count = K.entries + K_test.entries - found if n == args.n_train else 0
    return {"entries_computed": count, "entries_per_second": count / seconds, "compiler": compiler}


def describe(result):
    """The result as a block of a few aligned lines."""
    config, seconds = result["config"], result["seconds"]
    copies, percent = result["rows"] // config["n_train"], "{:.2f} %".format
    rate = {0: "none computed", None: f"computed in every product, compiled by {result['compiler']}"}.get(
        result["entries_computed"], f"{result['entries_per_second'] or 0:.3g} entries/s, compiled by {result['compiler']}")
    lines = {
        "fitted": f"{config['dataset']} {config['kernel']} {config['kind']} n_train={config['n_train']}"
                  + (f" x {copies}" if copies > 1 else "") + f" n_test={config['n_test']}, whitened by {config['whiten']}"
                  + (f" {config['zca_eps']:g}" if config["zca_eps"] else "")
                  + (f", {config['components']} components," if config["components"] else "")
                  + f" fitted on {config['fit_on']:,} images",
        "test accuracy": percent(100 * result["test_accuracy"])
                         + (f", leave-one-out {percent(100 * result['loo_score'])}" if "loo_score" in result else "")
                         + (f", averaged over crops {percent(100 * result['test_accuracy_averaged'])}"
                            if "test_accuracy_averaged" in result else "")
                         + (f", nll {result['test_nll']:.3f}, ece {result['test_ece']:.3f}" if "test_nll" in result else ""),
        "ridge": f"{result['ridge']:.2g}" + (f", chosen by {result['select']}" if result["select"] else ", given")
                 + (f", effective dimension {result['effective_dimension']:,.0f} of {result['rows']:,}"
                    if "effective_dimension" in result else ""),
        "solve": f"{result['cg_iterations']} steps to a residual of {result['cg_residual']:.1e}",
        "kernel": rate,
        "time": ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items()),
        "memory": f"{result['peak_memory_gb']:.1f} GB at most"}
    return "\n".join(f"{name:14}{text}" for name, text in lines.items())


def derive(args, shape, n_test, rows):
    """Fill in what was not asked for: sizes and tile side, from the size of the problem."""
    args.n_train, args.n_test = shape[0], n_test
    args.sizes = args.sizes or [args.n_train]
    for kind in kernel.KINDS if args.tile is None and on_disk(args) else ():
        from large import store
        known = store.manifest(os.path.join(args.store, f"train-{kind}"))
        if known and args.kind in (kind, "both"):
            args.tile = known["tile"]
    if args.tile is None:
        if args.kernel in ("fc", "cnn_vec"):
            side = {"fc": 2048 if args.store == "none" else 1024, "cnn_vec": 256}[args.kernel]
        else:
            side = 32 * 1024 // (shape[1] * shape[2]) if args.engine == "fused" else 16
        args.tile = experiment.tile_side(side, (8 if args.kernel == "fc" else 16) * side, rows)


def parse(argv):
    """The flags, checked against each other; ridge and sizes as lists of numbers."""
    parser = flags()
    args = parser.parse_args(argv)
    experiment.check(parser, args, "n_test", "devices", "hosts", "resize", "fit_on", "components", "crops", "rank", "tile",
                     "max_iters", "average", "rate")
    args.by_default = args.whiten == args.zca_eps == [None]
    args.whiten = [value or WHITENING[args.kernel][0] for value in args.whiten]
    unknown = set(args.whiten) - set(data.WHITENING)
    if unknown:
        parser.error(f"--whiten {','.join(args.whiten)}: expected {', '.join(data.WHITENING)}, or several of these")
    if args.plan and args.load:
        parser.error("--plan with --load: choose one; predictions are not planned")
    if (args.plan or args.load) and len(experiment.settings(args)) > 1:
        parser.error("--plan and --load take one network: one value for each of its flags")
    if args.plan and (len(args.sizes) > 1 or args.variance or args.plot):
        parser.error("--plan counts one solve: leave out --sizes, --variance and --plot")
    if args.plan and (args.select not in (None, "validation") or args.precondition != "lowrank"):
        parser.error("--plan counts a search by validation rows and the low-rank preconditioner: leave out --select and "
                     "--precondition")
    if args.dataset not in data.DATASETS and not os.path.exists(args.dataset):
        parser.error(f"--dataset {args.dataset}: expected one of {', '.join(data.DATASETS)}, or the path of an .npz file or "
                     "of a folder of .npy files or images")
    if not args.plan:
        experiment.refuse_idle(parser, argv, idle(args))
    if (args.load is None) != (args.predict is None):
        parser.error("--load FILE and --predict FILE go together")
    if args.components and (args.kernel != "fc" or args.flips == "symmetric" or set(args.whiten) - {"zca", "zca_unit"}):
        parser.error("--components makes vectors of whitened images: use --kernel fc, --whiten zca or zca_unit, and for "
                     "mirror images --flips explicit")
    if args.average and args.variance:
        parser.error("--variance with --average: choose one; the variance is of single images")
    if args.kind == "both" and args.save:
        parser.error("--save with --kind both: a file holds one model; choose nngp or ntk")
    if args.plot and os.path.splitext(args.plot)[1] not in PLOTS:
        parser.error(f"--plot {args.plot}: expected a name that ends in {', '.join(PLOTS)}")
    for path in (args.save, args.plot):
        experiment.check_file(parser, path)
    return args


def idle(args):
    """{flag: why it changes nothing in this run, or False}."""
    if args.load:
        return dict.fromkeys(set(vars(args)) - {"load", "predict", "out", "quiet", "engine", "devices",
                                                    "variance"},
                             "--load takes all that from the model's file")
    several = len(args.ridge) > 1 or len(experiment.settings(args)) > 1
    named = args.dataset in data.DATASETS
    return {"data": (args.dataset == "digits" and "the digits come with scikit-learn; --dataset says which files to read"
                     or not named and "--dataset is a path"),
            "resize": named and f"the images of {args.dataset} are of one size",
            "zca_eps": not {"zca", "zca_unit"} & set(args.whiten) and f"--whiten {','.join(args.whiten)} has no such number",
            "gamma": "exp" not in args.head and "it belongs to --head exp",
            "rank": args.precondition != "lowrank" and f"--precondition {args.precondition} has no rank",
            "select": not several and "there is one ridge and one network, so nothing is chosen",
            "fit_on": args.whiten == ["none"] and args.crops == 1 and "--whiten none fits nothing",
            "hosts": "it belongs to --plan", "rate": "it belongs to --plan"}


def flags():
    """The command line."""
    parser = experiment.Parser(description="Exact kernel regression with infinitely wide networks on images.")
    images = parser.add_argument_group("images")
    images.add_argument("--dataset", default="digits", help=f"{', '.join(data.DATASETS)}; or your own: the path of an .npz "
                        "file (x, y, and x_test, y_test if there is a test set), of a folder with these arrays as .npy files, "
                        "or of a folder with a folder of PNG or JPEG files for each class")
    images.add_argument("--resize", type=int, metavar="H", help="bring the files of such a folder to H x H pixels")
    images.add_argument("--data", metavar="DIR", help="folder that holds the data set's files")
    images.add_argument("--n_train", type=int, help="training images; None is all")
    images.add_argument("--sizes", metavar="N,N,...", help="solve for these many training images too, the "
                        "first ones of n_train, on blocks of the same kernel; n_train is then the largest, "
                        "unless given")
    images.add_argument("--n_test", type=int, help="test images; None is all")
    images.add_argument("--whiten", help="how images are whitened, z -> W z, W = U (S + zca_eps tr(C) / d)^(-1/2) U^T, "
                        "C = U S U^T = mean of z z^T: zca, z = image - mean image; zca_unit, z = image minus its own "
                        "mean, divided by its norm, as in published results. channel: minus mean, divided by sd of each "
                        "channel; none: bytes / 255. None: the best for the kernel (results/README.md)")
    images.add_argument("--zca_eps", help="regularisation of both zca; None: the best for the kernel with its own --whiten, "
                        "else 0.1")
    images.add_argument("--components", type=int, metavar="K", help="of both zca, for fc: keep the first K principal "
                        "components only, which makes the kernel cheaper; None: all")
    images.add_argument("--fit_on", type=int, metavar="N", help="fit the whitening on N training images; it may exceed "
                        f"n_train. None is all there are, {FIT_ON:,} at most")
    images.add_argument("--flips", nargs="?", const="symmetric", choices=["symmetric", "explicit"],
                        help="train on every image's mirror image too; symmetric, which --flips alone means: by "
                        "the kernel k(x, x') + k(x, mirror image of x'), the same predictions from half of the "
                        "entries; explicit: as more rows")
    images.add_argument("--crops", type=int, default=1,
                        help="number of crops of each training image, the first the image itself; padding is height / 8")
    images.add_argument("--average", type=int, metavar="N", help="also report the accuracy of predictions averaged over N "
                        "crops of each test image, the first the image itself, and, without --flips, over their mirror "
                        "images (with --flips those have equal predictions)")
    network = parser.add_argument_group("kernel")
    network.add_argument("--kernel", default="fc", choices=kernel.IMAGES,
                         help="fc: dense layers; cnn_vec, cnn_gap: convolutions, then dense or the mean over pixels; myrtle: "
                         "convolutions and pooling")
    network.add_argument("--kind", default="nngp", choices=[*kernel.KINDS, "both"],
                         help="both: two runs on one pass over the kernel, for the price of ntk; where a flag has several "
                         "values, they share the best of nngp")
    network.add_argument("--depth", help="hidden layers of fc (None is 3), convolutions of cnn_vec and cnn_gap (None is "
                         "8). This and the next four, like --whiten and --zca_eps, take several values with commas: "
                         "the best is chosen as the ridge is")
    experiment.network_flags(network)
    network.add_argument("--engine", default=next(iter(ENGINES)), choices=ENGINES,
                         help="what computes the kernel: fused.py, kernel.py or neural_tangents")
    network.add_argument("--tile", type=int, help="side of a tile of K; None: from kernel and n_train")
    network.add_argument("--store", metavar="DIR", help="keep tiles and solver state there, and go on from "
                         "what is there; none: keep no tile, compute all in every product; None: in memory")
    solver = parser.add_argument_group("solver")
    solver.add_argument("--ridge", default="auto", help="lambda / mean(diag K): a number; several, "
                        "separated by commas, or auto (10 down to 1e-6): chosen on training images")
    experiment.select_flag(solver, f"loo for K of up to {choose.DENSE:,} rows, beyond that validation, on the last fifth of "
                        f"the training images, {HELD_OUT:,} at most")
    solver.add_argument("--tol", type=float, default=1e-6, help="residual |y - A x| / |y| to reach")
    solver.add_argument("--max_iters", type=int, default=1000, help="CG steps allowed")
    solver.add_argument("--precondition", default="lowrank", choices=regression.PRECONDITIONERS,
                        help="of CG: from columns of K, its diagonal, or none")
    solver.add_argument("--rank", type=int, help="of lowrank; None: chosen by a cost model")
    solver.add_argument("--plot", metavar="FILE", help="draw error and effective dimension against the ridge, and solve "
                        "with every preconditioner and draw residual against step: .png, .svg or .pdf")
    solver.add_argument("--variance", action="store_true", help="predictive variance too, a solve for each "
                        "test image, and its calibration (nll, ece); nngp only")
    fitted = parser.add_argument_group("fitted model")
    fitted.add_argument("--save", metavar="FILE", help="keep what predictions need, as .npz")
    fitted.add_argument("--load", metavar="FILE", help="fit nothing, but --predict with this model")
    fitted.add_argument("--predict", metavar="FILE", help="new images: a folder of PNG or JPEG files, or .npy or .npz "
                        "(m, h, w, channels), of the model's shape and dtype. Their classes and probabilities go to "
                        "predictions.csv in --out; with --variance, whose standard deviations need K again, those too")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="of subset, crops and pivots")
    run.add_argument("--out", default="runs", metavar="DIR", help="runs.jsonl in it gets a line")
    run.add_argument("--quiet", action="store_true", help="print the result and notes about the data, no progress")
    run.add_argument("--verbose", action="store_true", help="print the flags, every ridge and what the solve reached")
    run.add_argument("--plan", action="store_true", help="measure the rate for a moment, print hours and "
                     "bytes of this run on --hosts with --devices each, and stop")
    many = parser.add_argument_group("machines")
    many.add_argument("--devices", type=int, metavar="D", help="devices of a process; None is every GPU, or "
                      "else every core")
    many.add_argument("--hosts", type=int, default=1, metavar="P", help="of --plan")
    many.add_argument("--rate", type=float, metavar="R", help="of --plan: kernel entries/s of a device, of all "
                      "kinds at once, in place of measuring it here")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; leave out under Slurm, Open MPI or on "
                      "TPUs, where JAX finds it")
    many.add_argument("--processes", type=int, metavar="P", help="how many there are; 1: alone, whatever a launcher says")
    many.add_argument("--wait", type=int, metavar="S", help="seconds that processes wait for each other at first; None: 300")
    many.add_argument("--process", type=int, metavar="I", help="which of them this one is, 0 to P - 1")
    return parser


if __name__ == "__main__":
    experiment.run(main, parse(None))
