"""Files -> checked arrays: images uint8 (n, h, w, channels), labels int64 (n,) in 0 ... classes - 1.

  digits      1,797 scans of 8 x 8 pixels that come with scikit-learn: no file, no network
  cifar10     the binary version: a folder with data_batch_1.bin ... 5, test_batch.bin, or downloaded
  cifar10.1   train on cifar10, test on cifar10.1_v6_data.npy, cifar10.1_v6_labels.npy in the folder
  cifar10.2   train on cifar10, test on cifar102_test.npz in the folder
  cifar100    the binary version: a folder with train.bin and test.bin; its 100 fine labels
  cifar5m     part0.npz ... part4.npz to train, part5.npz to test, 1,000,448 images each

Training rows are shuffled by `seed`, and the classes are dealt out in turn: for every k the first k rows are a balanced
training set, and a larger n_train begins with the smaller one. Test rows are the same for every seed: the first n_test of
the test file (CIFAR-5m: large/cifar5m.py). Of data of one's own every part has the classes in the proportions of the whole,
n_test rows too. Pickled files are refused.

    x_train, y_train, x_test, y_test = data.load("cifar10", "cifar-10-batches-bin", n_train=1000)

`whitening` is fitted on training images; it needs no labels.   Proved by: test_all.py, section data
"""

import errno
import hashlib
import importlib.util
import os
import secrets
import tarfile
import tokenize
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from scipy.linalg import blas
from tqdm import tqdm

DATASETS = {  # shape of an image, training images, test images, classes
    "digits": ((8, 8, 1), 1437, 360, 10), "cifar10": ((32, 32, 3), 50_000, 10_000, 10),
    "cifar10.1": ((32, 32, 3), 50_000, 2_000, 10), "cifar10.2": ((32, 32, 3), 50_000, 2_000, 10),
    "cifar100": ((32, 32, 3), 50_000, 10_000, 100),
    "cifar5m": ((32, 32, 3), 5 * 1_000_448, 1_000_448, 10)}
CLASSES = 10  # where nothing else is said
WHITENING = ("none", "channel", "zca", "zca_unit")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # of the archive, from the page it is linked from
HINT = "give --data the folder that holds it"
FLAT = 1e-5  # sd of an image of one colour, at most, relative to its root mean square
BATCH = 10_000  # records in a file of CIFAR-10
DAMAGED = (ValueError, TypeError, KeyError, AttributeError, SyntaxError, EOFError, NotImplementedError, RuntimeError,
           tokenize.TokenError, zlib.error, zipfile.BadZipFile)  # what NumPy and zipfile raise when they read a damaged file


def load(name, folder=None, n_train=None, n_test=None, seed=0, n_fit=0):
    """x_train, y_train, x_test, y_test of a data set named above, or of the four arrays that an own.images.Own begins with.

    folder: where its files are; without one, cifar10 is looked for and downloaded in ./data.
    n_train, n_test: rows wanted, None for all.   seed: of the order of the training rows.
    n_fit: training rows to return in all, for fitting a whitening; rows beyond n_train follow the others.
    Raises ValueError: unknown name, more rows than there are, a damaged file, wrong labels.   FileNotFoundError.
    """
    if isinstance(name, str) and name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; choose one of {', '.join(DATASETS)}")
    if name == "cifar5m":
        from large import cifar5m
        return cifar5m.load(folder or "data", n_train, n_test, seed, n_fit)
    own = not isinstance(name, str)
    if own:
        train, test, name = name[:2], name[2:4], name.path
    elif name == "digits":
        train, test = _digits()
    elif name == "cifar100":
        train, test = (_records(os.path.join(folder or "data", f"{part}.bin"), number, 2, 100)
                       for part, number in (("train", 50_000), ("test", 10_000)))
    else:
        folder = folder or _download()
        train, test = _cifar10(folder)
        if name == "cifar10.1":
            paths = [os.path.join(folder, f"cifar10.1_v6_{part}.npy") for part in ("data", "labels")]
            test = checked(*map(array, paths), *paths)
        elif name == "cifar10.2":
            path = os.path.join(folder, "cifar102_test.npz")
            test = checked(array(path, "images"), array(path, "labels"), path)
    enough(n_train, len(train[1]), "n_train", name)
    enough(n_test, len(test[1]), "n_test", name)
    rows = order(train[1], seed, not own)[:n_train and max(n_train, n_fit)]
    test_rows = order(test[1], 0, False)[:n_test] if own and n_test else slice(n_test)
    return train[0][rows], train[1][rows], test[0][test_rows], test[1][test_rows]


def order(labels, seed, balanced=True, blocks=None):
    """A shuffled order of the rows.  balanced: the first row of every class, then the second of every class ... until they run
    out. Otherwise the first row of every class, and then each class in proportion to its number of rows.

    blocks: a block number for each row. Rows of one block then stay near each other, so that the first n rows lie in few
    blocks.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    if blocks is not None:
        rank = rng.permutation(blocks.max() + 1)
        shuffled = shuffled[np.argsort(rank[blocks[shuffled]], kind="stable")]
    turn = np.empty(len(labels))
    for label in np.unique(labels):
        where = np.flatnonzero(labels[shuffled] == label)
        turn[where[1:]] = np.arange(1.5, len(where)) / (1 if balanced else len(where))
        turn[where[0]] = 0
    return shuffled[np.lexsort((rng.random(len(labels)), turn))]


def enough(wanted, have, what, where):
    if wanted is not None and not 1 <= wanted <= have:
        raise ValueError(f"{what}={wanted}: expected 1 to {have}, the rows of {where}")


def _digits():
    """scikit-learn's digits, read from its file, for importing the package takes two seconds; the same 360 of them are always
    the test set."""
    package, = importlib.util.find_spec("sklearn").submodule_search_locations
    table = np.loadtxt(os.path.join(package, "datasets", "data", "digits.csv.gz"), delimiter=",")
    x, y = table[:, :-1].reshape(-1, 8, 8, 1).astype(np.uint8), table[:, -1].astype(np.int64)
    rows = order(y, seed=0)
    return (x[rows[360:]], y[rows[360:]]), (x[rows[:360]], y[rows[:360]])


def _cifar10(folder):
    """Five files to train, and one to test."""
    x, y = zip(*[_records(os.path.join(folder, f"data_batch_{i}.bin"), BATCH) for i in range(1, 6)])
    return (np.concatenate(x), np.concatenate(y)), _records(os.path.join(folder, "test_batch.bin"), BATCH)


def _records(path, number, label_bytes=1, classes=CLASSES):
    """Images and labels of a binary file of CIFAR: each record is one or two label bytes, the last of which counts, then the
    planes R, G and B of 1,024 bytes each."""
    size, want = os.path.getsize(existing(path)), number * (label_bytes + 3072)
    if size != want:
        raise ValueError(f"{path} has {size} bytes; {number:,} records of CIFAR have {want}. The file is truncated or not of "
                         "the binary version: fetch it again")
    records = np.fromfile(path, np.uint8).reshape(number, -1)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return checked(images, records[:, label_bytes - 1], path, classes=classes)


def existing(path, hint=HINT):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is {'a folder' if os.path.isdir(path) else 'not there'}; {hint}")
    return path


def labels(y, path, classes=CLASSES):
    """Labels as they stand in a file -> int64 (n,) in 0 ... classes - 1.

    y: whole numbers of any dtype, (n,) or (n, 1), or one-hot rows (n, classes).
    ValueError: anything else, with the name of the file and the first bad row.
    """
    y = np.asarray(y)
    got = f"{path} holds labels {y.dtype} {y.shape}"
    if y.dtype.kind in "iuf" and y.shape[1:] == (1,):
        y = y[:, 0]
    elif y.dtype.kind in "iufb" and y.shape[1:] == (classes,) and ((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all():
        y = y.argmax(axis=1)
    if y.ndim != 1 or y.dtype.kind not in "iuf":
        raise ValueError(f"{got}; expected whole numbers (n,) or (n, 1), or one-hot rows (n, {classes})")
    bad = np.flatnonzero(~((y >= 0) & (y < classes) & (y == np.floor(y))))  # NaN is in no range
    if len(bad):
        raise ValueError(f"{path} has label {y[bad[0]]} at row {bad[0]}; expected whole numbers, 0 to {classes - 1}")
    return y.astype(np.int64)


def checked(x, y, path, labels_path=None, classes=CLASSES):
    """Images uint8 (n, 32, 32, 3) and labels (n,) of a file, or of two.  ValueError: a sentence about what is wrong."""
    y = labels(y, labels_path or path, classes)
    if x.dtype != np.uint8 or x.shape != (len(y), 32, 32, 3):
        raise ValueError(f"{path} holds images {x.dtype} {x.shape} and {len(y)} labels; expected uint8 (n, 32, 32, 3) and n "
                         "labels")
    return x, y


@contextmanager
def intact(path, what, cure="fetch or write it again"):
    """Turns whatever NumPy and zipfile raise when they read a damaged file into one sentence, a ValueError."""
    try:
        yield
    except (OSError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is to read before the start, where damage says
            raise
        text = "it is another kind of file, or a pickle" if "allow_pickle" in str(error) else error
        raise ValueError(f"{path} {what} ({text}): {cure}") from error


def array(path, key=None, hint=HINT):
    """The array in an .npy file, or one array of an .npz.  ValueError: damaged, pickled, no such array."""
    with intact(path, f"is not a complete {'.npz archive' if key else '.npy array'} without pickle"):
        file = np.load(existing(path, hint), None if key else "r", allow_pickle=False)  # an .npy is mapped, not read
        if key is None and isinstance(file, np.ndarray):
            return np.asarray(file)
        if key is None or isinstance(file, np.ndarray) or key not in file:
            found = "one array" if isinstance(file, np.ndarray) else "the arrays " + ", ".join(file)
            raise ValueError(f"it holds {found}" + (f", and not {key}" if key else ""))
        return file[key]


def _download(folder="data"):
    """CIFAR-10's binary version into ./data, once: checked by its digest, then extracted."""
    target = os.path.join(folder, "cifar-10-batches-bin")
    if os.path.exists(os.path.join(target, "test_batch.bin")):
        return target
    os.makedirs(folder, exist_ok=True)
    archive = os.path.join(folder, os.path.basename(URL))
    digest = hashlib.md5()
    try:
        with urllib.request.urlopen(URL) as source, open(archive + ".part", "wb") as out, tqdm(
                total=int(source.headers.get("Content-Length") or 0), unit="B", unit_scale=True,
                desc=archive, disable=None) as bar:
            while chunk := source.read(2**20):
                digest.update(chunk)
                out.write(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise OSError(f"CIFAR-10 could not be fetched from {URL} ({error}); fetch and extract it "
                      "elsewhere and give the folder with --data") from error
    if digest.hexdigest() != MD5:
        os.remove(archive + ".part")
        raise ValueError(f"{URL} arrived with md5 {digest.hexdigest()}, expected {MD5}: try again")
    os.replace(archive + ".part", archive)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")  # no links, no paths outside the folder
    return target


@contextmanager
def said(path):
    """Turns a failure to write `path` into one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OSError(f"{path} could not be written: {error.strerror}. "
                      f"{'Free some space' if full else 'Make the folder writable'} and run the same command again; what is "
                      "finished in a --store is kept") from error


@contextmanager
def replacing(path):
    """A file to write that becomes `path` at the end: a killed run leaves the old file, or none, never half a file."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    with said(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise


def one_hot(y, classes=CLASSES):
    """Labels (n,) -> targets (n, classes) float64: 1 - 1/classes for the class, -1/classes else."""
    return np.eye(classes)[labels(y, "y", classes)] - 1 / classes


class Whitening(NamedTuple):
    """x -> W (x - mean) / sd, image by image; if `unit`, each image first loses its own mean and is divided by its norm.

    Call it on images (n, h, w, channels), uint8 or float: float32, of the same shape, or (n, 1, 1, k) where W leaves k
    components. A NumPy array is whitened by NumPy, a JAX array on its device.
    It is a pytree: jax.device_put(whitening, device) gives the same function for images on that device.
    """
    mean: np.ndarray  # (channels,) or (h, w, channels), as sd
    sd: np.ndarray
    W: np.ndarray  # (d, d), symmetric, d = h w channels; (d, k) for k components; (0, 0) for none
    unit: np.ndarray  # bool, ()
    colour: np.ndarray  # (channels,) of the images' dtype, the mean colour of what it was fitted on, for the padding of crops

    def __call__(self, x):
        return (_whitened if isinstance(x, np.ndarray) else _on_device)(self, x, bool(self.unit))


def centred(x):
    """z of zca_unit: each image minus its own mean, divided by its norm. An image of one colour, of which only rounding is
    left, becomes 0."""
    size = (x * x).sum(axis=(1, 2, 3), keepdims=True) ** 0.5
    z = x - x.mean(axis=(1, 2, 3), keepdims=True)
    norm = (z * z).sum(axis=(1, 2, 3), keepdims=True) ** 0.5
    flat = (norm <= FLAT * size).astype(x.dtype)
    return z * (1 - flat) / (norm + flat)


def _whitened(whitening, x, unit):
    mean, sd, W, _, _ = whitening
    x = x.astype(np.float32)
    x = centred(x) if unit else x
    mean, sd = (y.reshape((1,) * (4 - y.ndim) + y.shape) for y in (mean, sd))
    x = (x - mean) / sd
    shape = x.shape if W.shape[0] == W.shape[1] else (len(x), 1, 1, W.shape[1])
    return (x.reshape(len(x), -1) @ W).reshape(shape) if W.size else x


@partial(jax.jit, static_argnums=2)
def _on_device(whitening, x, unit):
    with jax.default_matmul_precision("highest"):
        return _whitened(whitening, x, unit)


def whitening(protocol, x, flips=False, quiet=True, components=None):
    """zca_eps -> the Whitening named `protocol`, fitted on the images x (n, h, w, channels), uint8.

    none      x / 255; numbers that are no bytes as they are
    channel   (x - mean of its channel) / (sd of its channel)
    zca       z = x / 255 - mean image,                C = sum over images of z z^T / n,   x -> W z
    zca_unit  z = (x - mean of x) / |x - mean of x|,   C = sum over images of z z^T / n,   x -> W z
              W = U (S + zca_eps tr(C) / d)^(-1/2) U^T,   C = U S U^T (d, d),   d = h w channels

    zca_unit is the protocol of published results with these kernels (Shankar et al. 2020): every image is centred and
    scaled by itself, C is not centred. flips: fit on the mirror images too. Then W commutes with the mirror, so that
    an image may be mirrored before or after.
    components: k < d; then x -> (S_k + zca_eps tr(C) / d)^(-1/2) U_k^T z, the k eigenvectors with the largest
    eigenvalues: images become vectors. With all d, these would be W z but for a rotation.
    Cost: n d^2 operations for C and 10 d^3 for its eigenvectors, in float64: 50,000 images of d = 3,072 take 20 s on
    two cores.
    Raises ValueError: unknown protocol; zca_eps = 0 where C is singular; components not in 1 ... d - 1.
    """
    if protocol not in WHITENING:
        raise ValueError(f"whitening {protocol!r} is unknown; choose one of {', '.join(WHITENING)}")
    unit, no_W = np.array(protocol == "zca_unit"), np.zeros((0, 0), np.float32)
    channels = x.mean(axis=(0, 1, 2), dtype=np.float64)
    colour = np.rint(channels).astype(np.uint8) if x.dtype == np.uint8 else channels.astype(np.float32)
    if protocol == "none":
        sd = np.full(1, 255 if x.dtype == np.uint8 else 1, np.float32)
        return lambda zca_eps=None: Whitening(np.zeros(1, np.float32), sd, no_W, unit, colour)
    if protocol == "channel":
        squares = sum(((x[start:start + 2048] - channels) ** 2).sum(axis=(0, 1, 2)) for start in range(0, len(x), 2048))
        sd = np.sqrt(squares / (x.size / len(channels)))
        sd[sd <= 1e-9 * abs(channels)] = 1  # a constant channel carries nothing, and its mean may be rounded
        return lambda zca_eps=None: Whitening(channels.astype(np.float32), sd.astype(np.float32), no_W, unit, colour)
    mean, sd = np.zeros(x.shape[1:]), np.full(1, 1 if unit else 255, np.float32)
    if not unit:
        mean = x.mean(axis=0, dtype=np.float64)
        mean = (mean + mean[:, ::-1]) / 2 if flips else mean
    C = np.zeros((mean.size,) * 2, order="F")
    for start in tqdm(range(0, len(x), 2048), desc=f"whitening, {protocol}", unit=" blocks of 2,048 images",
                      disable=quiet or None, leave=False):
        z = (x[start:start + 2048] - mean) / sd[0]
        z = centred(z) if unit else z
        C = blas.dsyrk(1 / len(x), z.reshape(len(z), -1).T, beta=1.0, c=C, overwrite_c=True)  # its upper half
    C = np.triu(C) + np.triu(C, 1).T
    if flips:
        mirror = np.arange(mean.size).reshape(mean.shape)[:, ::-1].reshape(-1)
        C = (C + C[np.ix_(mirror, mirror)]) / 2
    if not C.any():
        raise ValueError(f"all {len(x)} images are {'of one colour' if unit else 'the same'}: there is nothing to whiten. "
                         "Take other images, or --whiten none")
    if components and not 1 <= components < len(C):
        raise ValueError(f"components={components}: expected 1 to {len(C) - 1}, fewer than the numbers of an image")
    S, U = np.linalg.eigh(C)

    def of(zca_eps):
        shifted = np.maximum(S, 0) + zca_eps * S.mean()
        if not shifted[-components if components else 0] > 1e-12 * S.mean():
            raise ValueError(f"zca_eps={zca_eps}: the covariance of {len(x)} images is singular; whitening it needs "
                             "zca_eps > 0")
        if components:
            W = U[:, -components:] / np.sqrt(shifted[-components:])
        else:
            W = (U / np.sqrt(shifted)) @ U.T
        return Whitening(mean.astype(np.float32), sd, W.astype(np.float32), unit, colour)
    return of
