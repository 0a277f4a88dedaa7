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
import subprocess
import sys
import time
from contextlib import contextmanager

import jax
import numpy as np

import augment
import data
import kernel
import pcg
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
    args = parser.parse_args(argv)
    try:
        args.ridge = RIDGES if args.ridge == "auto" else [float(r) for r in args.ridge.split(",")]
    except ValueError:
        parser.error(f"--ridge {args.ridge}: expected a number, numbers separated by commas, or auto")
    if min(args.ridge) < 0:
        parser.error(f"--ridge {min(args.ridge)}: expected numbers >= 0")
    return args


def main(argv=None):
    """Run one experiment; returns what is written to runs.jsonl, as a dict; with --kind both, the
    dicts of the two runs by kind."""
    args = parse(argv)
    run, seconds = provenance(), {}

    with phase("data", seconds):
        x_train, labels, x_test, test_labels = data.load(
            args.dataset, args.data, args.n_train, args.n_test, args.seed)
        fit = {"zca": lambda x: data.zca(x, args.zca_eps), "channel": data.standardise,
               "none": lambda x: lambda z: z.astype(np.float32) / 255}[args.whiten]
        whiten = fit(x_train)
        x_train, x_test = whiten(x_train), whiten(x_test)
        view = augment.expand(len(x_train), args.flips, args.crops, args.seed,
                              pad=x_train.shape[1] // 8)
        x, y = view.of(x_train), data.one_hot(labels)[view.original]

    derive(args, x_train.shape, len(x_test), len(x))
    if not args.quiet:
        print(" ".join(f"{key}={value}" for key, value in vars(args).items() if key != "ridge")
              + " ridge=" + ",".join(f"{ridge:.2g}" for ridge in args.ridge))

    with phase("kernel", seconds):
        kinds = kernel.KINDS if args.kind == "both" else (args.kind,)
        options = {} if args.depth is None else {"depth": args.depth}
        kernel_fn = ENGINES[args.engine](args.kernel, kinds, **options)
        Ks = tiles.gram(kernel_fn, x, args.tile, quiet=args.quiet)
        K_tests = tiles.cross(kernel_fn, x_test, x, args.tile, quiet=args.quiet)

    results = {}
    for kind, K, K_test in zip(kinds, Ks, K_tests):
        results[kind] = regress(args, K, K_test, y, labels, test_labels, view.copies)
        results[kind]["seconds"] = {name: round(s, 3) for name, s in
                                    {**seconds, **results[kind]["seconds"]}.items()}
        results[kind]["entries_per_second"] = results[kind]["entries"] / seconds["kernel"]
        record(args, kind, results[kind], run)
        print(describe(results[kind]))
    return results if args.kind == "both" else results[args.kind]


@contextmanager
def phase(name, seconds):
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def regress(args, K, K_test, y, labels, test_labels, copies):
    """Choose the ridge, solve, predict; what came of it, as a dict."""
    seconds = {}
    with phase("ridge", seconds):
        ridge, validation = choose_ridge(args, K, y, labels, copies)
    with phase("solve", seconds):
        alpha, info = next(solve(args, K, y, [ridge], args.tol))
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
            f"{result['entries_per_second']:.3g} entries/s, "
            + ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())
            + f", peak memory {result['peak_memory_gb']:.1f} GB")


def derive(args, shape, n_test, rows):
    """Fill in what was not asked for: sizes, tile side and rank, all from the size of the problem."""
    args.n_train, args.n_test = shape[0], n_test
    if args.tile is None:  # a tile takes a second or so; a small problem still has ten
        if args.kernel in ("fc", "cnn_vec"):
            side = {"fc": 1024, "cnn_vec": 256}[args.kernel]
        else:
            side = 32 * 1024 // (shape[1] * shape[2]) if args.engine == "fused" else 16
        side *= 8 if jax.default_backend() == "gpu" else 1
        args.tile = max(1, min(side, -(-rows // 4)))
    if args.rank is None:
        args.rank = max(1, min(1000, rows // 10))


def solve(args, K, y, ridges, tol):
    """Yields (alpha, info) of (K + lambda I) alpha = y for each ridge, from the solution before it."""
    diagonal = K.diagonal().mean()
    factor = (pcg.eigenpairs(pcg.partial_cholesky(K, args.rank, args.seed, args.quiet))
              if args.precondition == "lowrank" else None)
    alpha = None
    for ridge in ridges:
        precondition = {"none": lambda: None, "jacobi": lambda: pcg.jacobi(K, ridge * diagonal),
                        "lowrank": lambda: pcg.low_rank(K, ridge * diagonal, factor=factor),
                        }[args.precondition]()
        alpha, info = pcg.solve(K.matvec, y, ridge * diagonal, precondition, tol, args.max_iters,
                                x0=alpha, quiet=args.quiet)
        yield alpha, info


def choose_ridge(args, K, y, labels, copies):
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
    for ridge, (alpha, _) in zip(ridges, solve(args, K.leading(fit), y[:fit], ridges, 1e-3)):
        f = K.matvec(np.concatenate([alpha, np.zeros((len(y) - fit, alpha.shape[1]))]))[held_out]
        table.append([ridge, float(np.mean(f.argmax(axis=1) == labels[n_fit:])),
                      float(np.mean((f - y[held_out]) ** 2))])
        if not args.quiet:
            print(f"ridge {ridge:.2g}: validation accuracy {100 * table[-1][1]:.2f} %, "
                  f"mse {table[-1][2]:.5f}")
    return min(table, key=lambda row: row[2])[0], table


def provenance():
    """Machine, versions and code of a run, taken at its start, for the files may change under it."""
    def git(*command):
        done = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), *command],
                              capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return {"device": jax.local_devices()[0].device_kind, "devices": jax.local_device_count(),
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
                        if key not in ("data", "out", "quiet")}  # where, not what
    result["one_pass"] = args.kind == "both"  # then the kernel's seconds are those of both kinds
    result.update(run)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "runs.jsonl"), "a") as lines:
        lines.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    # Vectors of 512 bits where the processor has them (XLA prefers 256): fused.py is 1.4 times faster.
    os.environ["XLA_FLAGS"] = ("--xla_cpu_prefer_vector_width=512 " + os.environ.get("XLA_FLAGS", ""))
    jax.config.update("jax_num_cpu_devices", os.cpu_count())  # without a GPU: a tile on each core
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU: float32, not TF32
    try:
        main()
    except (ValueError, OSError, MemoryError, ArithmeticError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
