"""Kernel regression with an infinitely wide network on images, top to bottom.

  f(x) = k(x, X) (K + lambda I)^-1 Y,   K = k(X, X),   lambda = ridge * mean(diag K)

(Adlam et al. 2023, arXiv 2303.05420). Y is one-hot minus 1/classes; the class with the largest f(x) is
the answer. ridge and nothing else is tuned, on the last fifth of the training set (5,000 images at most).

  python train_cifar.py                                            digits, ten seconds, no network
  python train_cifar.py --dataset cifar10 --n_train 10000          downloads CIFAR-10 into ./data
  python train_cifar.py --dataset cifar10 --data DIR --kernel cnn_vec --kind ntk --n_train 1000
  python train_cifar.py --dataset cifar10 --data DIR --flips --crops 10 --n_train 1000
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np

import augment
import data
import hosts
import kernel
import lazy
import pcg
import plan
import store
import tiles

try:
    import fused
except ModuleNotFoundError:  # fused.py may be deleted: then kernel.py computes the same, slowly
    fused = None

ENGINES = {"plain": kernel.kernel_fn, "nt": kernel.reference_fn}
if fused:
    ENGINES = {"fused": fused.kernel_fn, **ENGINES}
RIDGES = [10 ** (k / 2) for k in range(2, -13, -1)]  # of --ridge auto: 10 down to 1e-6
HELD_OUT = 5000  # images of the validation split, at most
WHERE = ("data", "out", "quiet", "store", "plan", "hosts", "coordinator", "process")  # not what: not recorded


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Exact kernel regression with infinitely wide networks on images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    images = parser.add_argument_group("images")
    images.add_argument("--dataset", default="digits", choices=data.DATASETS)
    images.add_argument("--data", metavar="DIR", help="folder that holds the data set's files")
    images.add_argument("--n_train", type=int, help="training images; None is all")
    images.add_argument("--n_test", type=int, help="test images; None is all")
    images.add_argument("--whiten", default="channel", choices=["zca", "channel", "none"],
                        help="fitted on the training images; none is pixels / 255")
    images.add_argument("--fit_on", type=int, metavar="N", help="fit the whitening on the first N "
                        "training images, None is all: with N fixed a larger n_train reuses a store's tiles")
    images.add_argument("--zca_eps", type=float, default=0.1,
                        help="regularisation of zca, relative to the mean eigenvalue")
    images.add_argument("--flips", action="store_true", help="add every image's mirror image")
    images.add_argument("--crops", type=int, default=1,
                        help="crops an image, the first being itself; padding is height / 8")
    network = parser.add_argument_group("kernel")
    network.add_argument("--kernel", default="fc", choices=kernel.NETWORKS)
    network.add_argument("--kind", default="nngp", choices=[*kernel.KINDS, "both"],
                         help="both: two runs on one pass over the kernel, for the price of ntk")
    network.add_argument("--depth", type=int, help="hidden layers of fc (None is 3), convolutions of "
                         "cnn_vec and cnn_gap (None is 8)")
    network.add_argument("--engine", default=next(iter(ENGINES)), choices=ENGINES,
                         help="what computes the kernel: fused.py, kernel.py or neural_tangents")
    network.add_argument("--tile", type=int, help="side of a tile of K; None: from kernel and n_train")
    network.add_argument("--store", metavar="DIR", help="keep tiles and solver state there, and go on from "
                         "what is there; none: keep no tile, compute all in every product; None: in memory")
    solver = parser.add_argument_group("solver")
    solver.add_argument("--ridge", default="auto", help="lambda / mean(diag K): a number; several, "
                        "separated by commas, or auto (10 down to 1e-6): chosen on the last fifth of "
                        "the training set")
    solver.add_argument("--tol", type=float, default=1e-6, help="residual |y - A x| / |y| to reach")
    solver.add_argument("--max_iters", type=int, default=1000, help="CG steps allowed")
    solver.add_argument("--precondition", default="lowrank", choices=["none", "jacobi", "lowrank"])
    solver.add_argument("--rank", type=int, help="of lowrank; None is rows / 10, 1000 at most")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="of subset, crops and pivots")
    run.add_argument("--out", default="results", metavar="DIR", help="runs.jsonl in it gets a line")
    run.add_argument("--quiet", action="store_true", help="print the result line only")
    run.add_argument("--plan", action="store_true", help="measure the rate for a moment, print hours and "
                     "bytes of this run on --hosts with --devices each, and stop")
    many = parser.add_argument_group("machines")
    many.add_argument("--devices", type=int, metavar="D", help="devices of a process; None is every GPU, or "
                      "else every core")
    many.add_argument("--hosts", type=int, default=1, metavar="P", help="of --plan")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; under Slurm, leave out")
    many.add_argument("--processes", type=int, metavar="P", help="how many there are")
    many.add_argument("--process", type=int, metavar="I", help="which of them this one is, 0 to P - 1")
    args = parser.parse_args(argv)
    try:
        args.ridge = RIDGES if args.ridge == "auto" else [float(r) for r in args.ridge.split(",")]
    except ValueError:
        parser.error(f"--ridge {args.ridge}: expected a number, numbers separated by commas, or auto")
    if min(args.ridge) < 0:
        parser.error(f"--ridge {min(args.ridge)}: expected numbers >= 0")
    for flag in ("devices", "hosts", "fit_on"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: expected at least 1")
    return args


def main(argv=None):
    """Run one experiment; returns what is written to runs.jsonl, as a dict; with --kind both, the
    dicts of the two runs by kind."""
    args = parse(argv)
    kinds = kernel.KINDS if args.kind == "both" else (args.kind,)
    options = {} if args.depth is None else {"depth": args.depth}
    kernel_fn = partial(ENGINES[args.engine], args.kernel, **options)
    if args.plan:
        shape, n_train, n_test = data.DATASETS[args.dataset]
        n_train, n_test = args.n_train or n_train, args.n_test or n_test
        rows = n_train * args.crops * (1 + args.flips)
        derive(args, (n_train, *shape), n_test, rows)
        return plan.main(args, kernel_fn(kinds), shape, rows)
    team = hosts.start(args.coordinator, args.processes, args.process, args.devices)
    args.quiet = args.quiet or team.index > 0
    run, seconds = provenance(team), {}

    with phase("data", seconds):
        x_train, labels, x_test, test_labels = load(args)
        view = augment.expand(len(x_train), args.flips, args.crops, args.seed,
                              pad=x_train.shape[1] // 8)
        x, y = view.of(x_train), data.one_hot(labels)[view.original]

    derive(args, x_train.shape, len(x_test), len(x))
    if not args.quiet:
        print(" ".join(f"{key}={value}" for key, value in vars(args).items() if key != "ridge")
              + " ridge=" + ",".join(f"{ridge:.2g}" for ridge in args.ridge))

    with phase("kernel", seconds):
        matrices = kernels(args, kernel_fn, kinds, x, x_test, team)

    results = {}
    for kind, K, K_test in zip(kinds, *matrices):
        keep = partial(checkpoint, args, team, kind)
        results[kind] = regress(args, K, K_test, y, labels, test_labels, view.copies, keep)
        results[kind]["seconds"] = {name: round(s, 3) for name, s in
                                    {**seconds, **results[kind]["seconds"]}.items()}
        computed = None if args.store == "none" else (  # None: in every product
            results[kind]["entries"] - int(team.all_reduce(np.array([K.found + K_test.found]))[0]))
        results[kind].update(entries_computed=computed,
                             entries_per_second=(computed or 0) / seconds["kernel"])
        if team.index == 0:
            record(args, kind, results[kind], run)
            print(describe(results[kind]), flush=True)
            if on_disk(args):
                shutil.rmtree(os.path.join(args.store, f"solve-{kind}"), ignore_errors=True)
    return results if args.kind == "both" else results[args.kind]


def load(args):
    """x_train, labels, x_test, test_labels, whitened."""
    x_train, labels, x_test, test_labels = data.load(
        args.dataset, args.data, args.n_train, args.n_test, args.seed)
    if args.fit_on and args.fit_on > len(x_train):
        raise ValueError(f"--fit_on {args.fit_on}, but there are {len(x_train)} training images")
    fit = {"zca": lambda x: data.zca(x, args.zca_eps), "channel": data.standardise,
           "none": lambda x: lambda z: z.astype(np.float32) / 255}[args.whiten]
    whiten = fit(x_train[:args.fit_on])
    return whiten(x_train), labels, whiten(x_test), test_labels


def on_disk(args):
    return args.store not in (None, "none")


def kernels(args, kernel_fn, kinds, x, x_test, team):
    """A K and a K_test of each kind: ((K, ...), (K_test, ...))."""
    devices = jax.local_devices()[:args.devices]
    if args.devices and len(devices) < args.devices:
        raise ValueError(f"--devices {args.devices}, but JAX sees {len(devices)} here: {devices}")
    where = {"devices": devices, "quiet": args.quiet, "team": team}
    if args.store == "none":
        fns = [kernel_fn(kind) for kind in kinds]
        return ([lazy.matrix(fn, x, None, args.tile, **where) for fn in fns],
                [lazy.matrix(fn, x_test, x, args.tile, **where) for fn in fns])
    kept = None, None
    if on_disk(args):
        layers = kernel.network(*kernel_fn.args, **kernel_fn.keywords)
        depth = sum(layer[0] == "relu" for layer in layers)
        about = {"kernel": args.kernel, "depth": depth, "engine": args.engine, "tile": args.tile}
        rows, test_rows = store.digests(x), store.digests(x_test)
        kept = [tuple(store.create(os.path.join(args.store, f"{part}-{kind}"), {**about, "kind": kind},
                                   *inputs, process=team.index) for kind in kinds)
                for part, inputs in (("train", [rows]), ("test", [test_rows, rows]))]
    fn = kernel_fn(kinds)
    return (tiles.gram(fn, x, args.tile, store=kept[0], **where),
            tiles.cross(fn, x_test, x, args.tile, store=kept[1], **where))


def checkpoint(args, team, kind, **about):
    """Where the solve that `about` describes keeps its state, in the store if there is one."""
    if not on_disk(args):
        return None
    about = {**about, **{name: getattr(args, name) for name in ("precondition", "rank", "seed")}}
    name = zlib.crc32(json.dumps(about).encode())
    return store.Checkpoint(os.path.join(args.store, f"solve-{kind}", f"{name:08x}.npz"), about, team)


@contextmanager
def phase(name, seconds):
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def regress(args, K, K_test, y, labels, test_labels, copies, keep):
    """Choose the ridge, solve, predict; what came of it, as a dict.  keep: of `solve`."""
    seconds = {}
    with phase("ridge", seconds):
        ridge, validation = choose_ridge(args, K, y, labels, copies, keep)
    with phase("solve", seconds):
        alpha, info = next(solve(args, K, y, [ridge], args.tol, keep))
    with phase("predict", seconds):
        f = K_test.matvec(alpha)
    return {"test_accuracy": float(np.mean(f.argmax(axis=1) == test_labels)),
            "test_mse": float(np.mean((f - data.one_hot(test_labels)) ** 2)),
            "ridge": ridge, "validation": validation, "rows": len(y),
            "cg_iterations": info.iterations, "cg_residual": float(info.residual.max()),
            "cg_converged": info.converged, "condition": info.condition,
            "entries": K.entries + K_test.entries, "seconds": seconds}


def describe(result):
    """The result line."""
    config, seconds = result["config"], result["seconds"]
    copies = result["rows"] // config["n_train"]
    return (f"{config['dataset']} {config['kernel']} {config['kind']} n_train={config['n_train']}"
            f"{f' x {copies}' if copies > 1 else ''} n_test={config['n_test']}: "
            f"test accuracy {100 * result['test_accuracy']:.2f} %, ridge {result['ridge']:.2g}, "
            f"CG {result['cg_iterations']} steps to {result['cg_residual']:.1e}, "
            + {0: "every entry found in the store, ", None: "K computed in every product, "}.get(
                result["entries_computed"], f"{result['entries_per_second']:.3g} entries/s, ")
            + ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())
            + f", peak memory {result['peak_memory_gb']:.1f} GB")


def derive(args, shape, n_test, rows):
    """Fill in what was not asked for: sizes, tile side and rank, all from the size of the problem."""
    args.n_train, args.n_test = shape[0], n_test
    for kind in kernel.KINDS if args.tile is None and on_disk(args) else ():
        known = store.manifest(os.path.join(args.store, f"train-{kind}"))
        if known and args.kind in (kind, "both"):
            args.tile = known["tile"]
    if args.tile is None:  # a tile takes a second or so; a small problem still has ten
        if args.kernel in ("fc", "cnn_vec"):
            side = {"fc": 1024, "cnn_vec": 256}[args.kernel]
        else:
            side = 32 * 1024 // (shape[1] * shape[2]) if args.engine == "fused" else 16
        side *= 8 if jax.default_backend() == "gpu" else 1
        args.tile = max(1, min(side, -(-rows // 4)))
    if args.rank is None:
        args.rank = max(1, min(1000, rows // 10))


def solve(args, K, y, ridges, tol, keep):
    """Yields (alpha, info) of (K + lambda I) alpha = y for each ridge, from the solution before it.

    keep: {what decides a solve} -> its checkpoint or None."""
    diagonal = K.diagonal().mean()
    factor = (pcg.eigenpairs(pcg.partial_cholesky(K, args.rank, args.seed, args.quiet))
              if args.precondition == "lowrank" else None)
    alpha = None
    for ridge in ridges:
        precondition = {"none": lambda: None, "jacobi": lambda: pcg.jacobi(K, ridge * diagonal),
                        "lowrank": lambda: pcg.low_rank(K, ridge * diagonal, factor=factor),
                        }[args.precondition]()
        alpha, info = pcg.solve(K.matvec, y, ridge * diagonal, precondition, tol, args.max_iters,
                                x0=alpha, quiet=args.quiet, checkpoint=keep(
                                    ridge=ridge, tol=tol, rows=len(y), y=zlib.crc32(y.tobytes())))
        yield alpha, info


def choose_ridge(args, K, y, labels, copies, keep):
    """The ridge with the least mse on the last fifth of the training images (HELD_OUT at most), and
    the table [[ridge, accuracy, mse], ...]. Not the best accuracy: that is noise on a few hundred
    images: on subsets of CIFAR-10 it picked 0.01 to 1 where mse picked 0.3 or 1.

    Nothing is computed anew: the kernel of the images fitted is a leading block of K, and the
    predictions on the others are K times alpha padded with zeros, at rows of unaugmented images.
    To 1e-3 in the residual, from the largest ridge down, the easy direction; all of them, for the mse
    of pooled kernels rises before it falls. One ridge needs no choice.
    """
    ridges = sorted(args.ridge, reverse=True)
    if len(ridges) == 1:
        return ridges[0], []
    n = len(labels)
    n_fit = n - min(n // 5, HELD_OUT)
    if n_fit == n:
        raise ValueError(f"n_train={n}: choosing among {len(ridges)} ridges needs at least 5 images "
                         "for a validation split; give one number with --ridge")
    fit, held_out = n_fit * copies, np.arange(n_fit, n) * copies
    table = []
    for ridge, (alpha, _) in zip(ridges, solve(args, K.leading(fit), y[:fit], ridges, 1e-3, keep)):
        f = K.matvec(np.concatenate([alpha, np.zeros((len(y) - fit, alpha.shape[1]))]))[held_out]
        table.append([ridge, float(np.mean(f.argmax(axis=1) == labels[n_fit:])),
                      float(np.mean((f - y[held_out]) ** 2))])
        if not args.quiet:
            print(f"ridge {ridge:.2g}: validation accuracy {100 * table[-1][1]:.2f} %, "
                  f"mse {table[-1][2]:.5f}")
    return min(table, key=lambda row: row[2])[0], table


def provenance(team):
    """Machine, versions and code of a run, taken at its start, for the files may change under it."""
    def git(*command):
        done = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), *command],
                              capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return {"device": jax.local_devices()[0].device_kind, "devices": jax.local_device_count(),
            "processes": team.count,
            "cores": os.cpu_count(), "jax": jax.__version__,
            "neural_tangents": importlib.metadata.version("neural-tangents"),
            "commit": git("rev-parse", "--short", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", "*.py", "requirements.txt")),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def record(args, kind, result, run):
    """Append the result, with its configuration and `provenance`, to runs.jsonl as one line."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    result["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    result["config"] = {key: value for key, value in {**vars(args), "kind": kind}.items()
                        if key not in WHERE}
    result["one_pass"] = args.kind == "both"  # then the kernel's seconds are those of both kinds
    result.update(run)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "runs.jsonl"), "a") as lines:
        lines.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    # Vectors of 512 bits where the processor has them (XLA prefers 256): fused.py is 1.4 times faster.
    os.environ["XLA_FLAGS"] = ("--xla_cpu_prefer_vector_width=512 " + os.environ.get("XLA_FLAGS", ""))
    jax.config.update("jax_num_cpu_devices", parse(None).devices or os.cpu_count())  # without a GPU
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU: float32, not TF32
    with hosts.guard(ValueError, OSError, MemoryError, ArithmeticError):
        main()
