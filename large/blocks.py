"""Kernel regression from a kernel matrix that others computed: the published Myrtle-10 kernel of CIFAR-10's 60,000 images.

  gs://neural-tangents-kernels/infinite-uncertainty/kernels/myrtle-10/clean

holds the NNGP and the NTK in blocks of 5,000 x 5,000 entries (Adlam et al. 2021, arXiv 2010.07355; layout as its README and
notebook say, google-research/infinite_uncertainty):

  nngp-i-j, ntk-i-j   i <= j: an .npy array, k(x, x') for x in block i (rows) and x' in block j (columns)
                      blocks 0-9 are the training images, 10 and 11 the test images
  labels              an .npy array (60,000, 10), a row for each image in the order of the blocks, the largest at its class

Neither says what whitened the images, nor the dtype of a block. Regression needs K and labels only, and any floating-point
dtype is read. The side of a block is that of block 0-0.

    gsutil -m cp "gs://neural-tangents-kernels/infinite-uncertainty/kernels/myrtle-10/clean/ntk-*" FOLDER
    gsutil cp gs://neural-tangents-kernels/infinite-uncertainty/kernels/myrtle-10/clean/labels FOLDER
    python -m large.blocks FOLDER --kind ntk
    python -m large.blocks FOLDER --kind ntk --n_train 5000

The last needs ntk-0-0, ntk-0-10, ntk-0-11 and labels only. A check: with the NTK and 500 random images of block 0 the notebook
reports a test accuracy of 50.24 %, its ridge picked on the test set. --n_train 500 should come near.

Cost: nothing is copied. Blocks are mapped into memory: a product reads them from the page cache, or from the disk if they do
not fit in it. In float32 the 75 blocks take 7.5 GB. The memory in a record includes what is mapped.
Proved by: large/test_large.py, on small blocks made there in this layout. It was not tried on the original.
"""

import os

import numpy as np

import data
import experiment
import kernel
import regression
import tiles
import train_cifar

TRAIN, TEST = 10, 2  # blocks of images
PLACE = "gs://neural-tangents-kernels/infinite-uncertainty/kernels/myrtle-10/clean"
SYMMETRIC = 1e-4  # the largest |K - K^T| of a block on the diagonal, relative to its largest entry


def main(argv=None):
    """Solve, predict the test images, record; returns what is written to runs.jsonl, as a dict."""
    args = parse(argv)
    experiment.writable(args.out)
    run, seconds = experiment.provenance(), {}
    with regression.phase("kernel", seconds):
        K, K_test = read(args.folder, args.kind, args.n_train)
        n, m, path = K.shape[0], K_test.shape[0], args.labels or os.path.join(args.folder, "labels")
        labels, test_labels = labels_of(path, TRAIN * K_test.sides[0], m)
        labels = labels[:n]
    select, held_out, score = train_cifar.selection(args, labels, 1, len(args.ridge) > 1)
    _, f, result, _ = regression.fit(K, K_test, data.one_hot(labels), args.ridge, select, args.tol, score=score,
                                     held_out=held_out, **train_cifar.solver_options(args))
    accuracy, chance = float(np.mean(f.argmax(axis=1) == test_labels)), 1 / data.CLASSES
    result.update(test_accuracy=accuracy, test_mse=float(np.mean((f - data.one_hot(test_labels)) ** 2)), entries_computed=0,
                  seconds={name: round(s, 3) for name, s in {**seconds, **result["seconds"]}.items()})
    flags = ("kind", "ridge", "select", "tol", "max_iters", "precondition", "rank", "seed")
    unknown = dict.fromkeys(("depth", "whiten", "zca_eps"))
    experiment.record(args.out, {"dataset": "blocks", "kernel": "myrtle10", "n_train": n, "n_test": m, **unknown,
                                 **{flag: getattr(args, flag) for flag in flags}}, result, run, describe)
    if accuracy < chance + 3 * np.sqrt(chance * (1 - chance) / m):
        print(f"note: a test accuracy of {accuracy:.1%} is no better than guessing: the labels of {path} are probably in "
              "another order than the blocks")
    return result


def read(folder, kind, n_train=None):
    """K (n, n) of the first n_train training images, by default all, and K_test (m, n), as tiles.TiledMatrix.

    Every file that this needs is opened at once; its entries are checked where a product first reads them.
    ValueError: a file is damaged or holds something else.   FileNotFoundError: one is not there.
    """
    def path(i, j):
        return os.path.join(folder, f"{kind}-{i}-{j}")
    side = len(mapped(data.existing(path(0, 0), f"fetch it from {PLACE}")))
    data.enough(n_train, TRAIN * side, "n_train", folder)
    n = n_train or TRAIN * side
    train, test = range(-(-n // side)), range(TRAIN, TRAIN + TEST)
    needed = [path(i, j) for i in train for j in (*train[i:], *test)]
    missing = [one for one in needed if not os.path.isfile(one)]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of the {len(needed)} blocks for n_train={n} are not there, the first is "
                                f"{missing[0]}: fetch them from {PLACE}, or lower --n_train")
    K = Blocks({(i, j): path(i, j) for i in train for j in train[i:]}, side)
    K_test = Blocks({(j - TRAIN, i): path(i, j) for i in train for j in test}, side, transposed=True)
    return (tiles.TiledMatrix((n, n), (side, side), True, K),
            tiles.TiledMatrix((TEST * side, n), (side, side), False, K_test))


def mapped(path, side=None):
    """The block in an .npy file, mapped into memory.  side: None is any.  ValueError: damaged, pickled, no such block."""
    with data.intact(path, "is not a complete .npy array without pickle", "fetch it again"):
        array = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    want = (side, side) if side else array.shape[:1] * 2
    if array.dtype.kind != "f" or array.shape != want or min(want, default=0) < 1:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}; expected floating-point numbers "
                         + (f"{want}, as the first block" if side else "(n, n)"))
    return array


class Blocks(dict):
    """The tiles of a tiles.TiledMatrix, {(i, j): array}, mapped from files. As a dict it counts as memory: the rank of the
    preconditioner is chosen for products from the page cache.

    paths: {(i, j): file}.   side: of a block.   transposed: a tile is the transpose of its block; else K is symmetric.
    Raises ValueError, where a block is first read: entries that are not finite, or a block on the diagonal of K is not
    symmetric.
    """

    def __init__(self, paths, side, transposed=False):
        super().__init__({key: mapped(path, side).T if transposed else mapped(path, side) for key, path in paths.items()})
        self.paths, self.transposed, self.checked = paths, transposed, set()

    def __getitem__(self, key):
        array, path = super().__getitem__(key), self.paths[key]
        if key not in self.checked:
            if not np.isfinite(array).all():
                raise ValueError(f"{path} has {np.sum(~np.isfinite(array))} entries that are not finite: fetch it again")
            rounding = max(SYMMETRIC, np.finfo(array.dtype).eps)
            if key[0] == key[1] and not self.transposed and abs(array - array.T).max() > rounding * abs(array).max():
                raise ValueError(f"{path} is not symmetric; expected k(x, x') = k(x', x) in a block on the diagonal")
            self.checked.add(key)
        return array


def labels_of(path, n, m):
    """Labels of n training and m test images in an .npy file: whole numbers, or one-hot rows, however shifted and scaled."""
    y = data.array(path, hint=f"fetch it from {PLACE}, or give another file with --labels")
    if y.ndim == 2 and y.shape[1] == data.CLASSES and y.dtype.kind == "f":
        y = (y - y.min()) / (np.ptp(y) or 1)
        y = np.where(abs(y - y.round()) < 1e-3, y.round(), y)  # 0.9 + 0.1 is not 1 in float32
    y = data.labels(y, path)
    if len(y) != n + m:
        raise ValueError(f"{path} has {len(y):,} labels; expected {n + m:,}, of {n:,} training and then {m:,} test images")
    return y[:n], y[n:]


def describe(result):
    """The result as a block of a few aligned lines."""
    config = result["config"]
    lines = {"fitted": f"blocks {config['kind']} n_train={config['n_train']} n_test={config['n_test']}",
             "test accuracy": f"{100 * result['test_accuracy']:.2f} %",
             "ridge": f"{result['ridge']:.2g}" + (f", chosen by {result['select']}" if result["select"] else ", given"),
             "solve": f"{result['cg_iterations']} steps to a residual of {result['cg_residual']:.1e}",
             "time": ", ".join(f"{name} {s:.1f} s" for name, s in result["seconds"].items())}
    return "\n".join(f"{name:14}{text}" for name, text in lines.items())


def parse(argv):
    parser = experiment.Parser(prog="python -m large.blocks", description="Kernel regression with the published Myrtle-10 "
                               f"kernel of CIFAR-10's 60,000 images. Fetch its blocks from {PLACE} (a Google Cloud Storage "
                               "bucket) and the file labels with them. Tested on made blocks, not tried on the original.")
    parser.set_defaults(sizes=None, devices=None, precondition="lowrank")
    parser.add_argument("folder", metavar="FOLDER", help="holds the blocks, nngp-i-j or ntk-i-j, and labels")
    parser.add_argument("--labels", metavar="FILE", help="an .npy file, training images first, in the order of the blocks; "
                        "None is labels in FOLDER. In a wrong order the test accuracy is about 10 %%, and a note says so")
    parser.add_argument("--kind", default="nngp", choices=kernel.KINDS, help="which of the published kernels")
    parser.add_argument("--n_train", type=int, help="the first training images; None is all, and fewer need fewer blocks")
    parser.add_argument("--ridge", default="auto", help="lambda / mean(diag K): a number; several, separated by commas, or "
                        "auto (10 down to 1e-6): chosen on training images")
    experiment.select_flag(parser, "as in train_cifar.py")
    parser.add_argument("--tol", type=float, default=1e-6, help="residual |y - A x| / |y| to reach")
    parser.add_argument("--max_iters", type=int, default=1000, help="CG steps allowed")
    parser.add_argument("--rank", type=int, help="of the preconditioner; None: chosen by a cost model")
    parser.add_argument("--seed", type=int, default=0, help="of the preconditioner's columns")
    parser.add_argument("--out", default="runs", metavar="DIR", help="runs.jsonl in it gets a line")
    parser.add_argument("--quiet", action="store_true", help="print the result only, no progress")
    parser.add_argument("--verbose", action="store_true", help="print every ridge and what the solve reached")
    args = parser.parse_args(argv)
    experiment.check(parser, args, "max_iters", "rank")
    return args


if __name__ == "__main__":
    experiment.run(main, parse(None))
