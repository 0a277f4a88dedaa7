"""CIFAR-5m: six million images in six .npz files, read without holding a whole file in memory.

part0.npz ... part4.npz are for training, part5.npz is for testing: X uint8 (1000448, 32, 32, 3), Y the labels. A run reads all
labels (40 MB), lets data.order choose the rows, and then keeps only the blocks of BLOCK images that contain these rows. The
rows are shuffled block by block, so that few rows need few blocks.

    x_train, y_train, x_test, y_test = cifar5m.load("DIR", n_train=100_000, n_test=10_000)

Proved by: large/test_large.py
"""

import os
import zipfile

import numpy as np
from tqdm import tqdm

import data

BLOCK = 1024  # images read together: 3 MB
PARTS = 5  # files for training; the sixth is for testing


def load(folder, n_train=None, n_test=None, seed=0, n_fit=0):
    """x_train, y_train, x_test, y_test; arguments and errors as in data.load."""
    return (*_read(folder, range(PARTS), n_train, seed, "n_train", n_fit),
            *_read(folder, [PARTS], n_test, 0, "n_test"))


def _read(folder, parts, n, seed, what, n_fit=0):
    """n images of these parts (None: all) and their labels, and further training images until there are n_fit."""
    paths = [os.path.join(folder, f"part{part}.npz") for part in parts]
    labels, blocks = [], []
    for path in paths:
        with _opened(path) as file:
            y = list(_rows(file, path, "Y", None))
            if not y:
                raise ValueError(f"{path} holds no images: fetch it again")
            labels.append(data.labels(np.concatenate(y), path))
        blocks.append((blocks[-1][-1] + 1 if blocks else 0) + np.arange(len(labels[-1])) // BLOCK)
    data.enough(n, sum(map(len, labels)), what, folder)
    starts = np.cumsum([0] + [len(y) for y in labels])
    rows = data.order(np.concatenate(labels), seed, blocks=np.concatenate(blocks))[:n and max(n, n_fit)]
    x, y = np.empty((len(rows), 32, 32, 3), np.uint8), np.empty(len(rows), np.int64)
    for path, start, part in zip(paths, starts, labels):
        places = np.flatnonzero((start <= rows) & (rows < start + len(part)))  # in x, of the rows that this file holds
        if not len(places):
            continue
        local = rows[places] - start
        wanted = np.unique(local // BLOCK).tolist()
        with _opened(path) as file:
            bar = tqdm(wanted, desc=path, unit=" blocks", disable=None, leave=False)
            for block, images in zip(bar, _rows(file, path, "X", wanted)):
                images, block_labels = data.checked(images, part[block * BLOCK:(block + 1) * BLOCK], path)
                in_block = local // BLOCK == block
                x[places[in_block]] = images[local[in_block] - block * BLOCK]
                y[places[in_block]] = block_labels[local[in_block] - block * BLOCK]
    return x, y


def _opened(path):
    """The archive.  ValueError: it is truncated, or lacks X or Y.  FileNotFoundError."""
    data.existing(path)
    with data.intact(path, "is truncated or not an .npz archive"):
        file = zipfile.ZipFile(path)
    names = file.namelist()
    if not {"X.npy", "Y.npy"} <= set(names):
        raise ValueError(f"{path} holds {', '.join(names)}; expected X, Y")
    return file


def _rows(file, path, key, blocks):
    """Yields blocks of BLOCK rows of one array of an .npz.   blocks: their numbers, ascending; None: all.

    The array is read as a stream from its start, one block in memory at a time, and blocks that are not wanted are skipped.
    So compressed archives work too. Reading through 3 GB takes seconds.
    """
    with data.intact(path, f"holds a damaged {key}"), file.open(f"{key}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f".npy of version {version}; expected 1.0 or 2.0")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        if fortran or dtype.hasobject or not shape:
            raise ValueError(f"{dtype} {shape}, Fortran order {fortran}; expected plain numbers in C order")
        for block in range(max(blocks) + 1 if blocks else -(-shape[0] // BLOCK)):
            number = max(0, min(BLOCK, shape[0] - block * BLOCK))
            size = number * int(np.prod(shape[1:])) * dtype.itemsize
            content = stream.read(size)
            if len(content) != size:
                raise ValueError(f"truncated: {len(content)} bytes where {size} were expected")
            if blocks is None or block in blocks:
                yield np.frombuffer(content, dtype).reshape(number, *shape[1:])
