"""What one machine takes for each piece of the program's work, measured in about half a minute; for large/simulate.py.

Each piece runs in the code of a real run, on all devices and cores, but with smaller arrays. Its time is scaled by what it
grows with: entries, bytes, images, elements of vectors. The shortest of three times counts. Of tiles and of products there
are twenty times, because a simulation needs to know how much they vary. They are of tiles of side 2,048 at most; larger
ones vary less.

    rates = measure(n=5_000_000, tile=8192, folder=DIR)        fc on images of 32 x 32 x 3; DIR is on the disk to measure

Proved by: large/test_large.py
"""

import hashlib
import os
import tempfile
import time
import warnings
from typing import NamedTuple

import jax
import numpy as np
from threadpoolctl import threadpool_limits

import augment
import data
import pcg
import tiles
import train_cifar
from large import cifar5m, plan, processes, store

SHAPE = 32, 32, 3


class Rates(NamedTuple):
    """What one host takes, in seconds for what the comment says."""
    tile: np.ndarray = np.zeros(1)  # a tile on one device: times to draw from
    product: np.ndarray = np.zeros(1)  # a byte of tiles in K v by one thread: times to draw from
    devices: int = 1
    threads: int = 1  # that multiply tiles
    write: float = 0.0  # a tile, checked and written
    whiten: float = 0.0  # a block of images, one for each row of a tile, on one device
    kept: int = 2**20  # whitened blocks that a host keeps
    load: float = 0.0  # all images, read and hashed, and the fit of the whitening
    vectors: float = 0.0  # in a step of CG, whatever has no part in a tile or in F
    factor: float = 0.0  # an element of F in M^-1
    call: float = 0.0  # a sum over hosts, on the host itself
    copy: float = 0.0  # a byte of a sum, on the host itself
    network: tuple = (0.0, np.inf)  # latency in seconds, bytes/s


def measure(n, tile, folder=None, rank=plan.RANK, shape=SHAPE, rows=2**19, given=None):
    """The Rates of this machine for the NTK of fc, n images and tiles of this side; its network takes no time.

    folder: for tiles on its disk; None is in memory.   rows: of the vectors to measure with, at most.
    given: (entries/s of a device, bytes/s of tiles in a product, devices) of another machine, which is said to whiten faster
    in the ratio in which it computes entries faster: both are mostly matrix products.
    Raises OSError: tiles cannot be written to the folder.
    """
    devices, side, rng = jax.local_devices(), min(tile, 2048), np.random.default_rng(0)
    kernel_fn = next(iter(train_cifar.ENGINES.values()))("fc", "ntk")
    x = rng.integers(0, 256, (side, *shape), np.uint8)
    W = rng.random((x[0].size, x[0].size), np.float32)
    images = augment.expand(side).of(x, data.Whitening(np.zeros(1, np.float32), np.ones(1, np.float32), W, np.array(False), 0))
    inputs, keys = [(k, x.astype(np.float32)) for k in (0, 1)], [(0, 0)] * len(devices)
    one = tiles.known(rng.random((side, side), np.float32), False, side)
    ones, rows = np.ones(2**22), min(n, rows)

    entries = plan.rate(kernel_fn, shape, tile, devices) / len(devices)
    read, written = plan.disk_rates(folder) if folder else plan.product_rate({}, min(tile, 1024))
    if read is None:
        raise OSError(f"tiles cannot be written to {folder}: give a folder on a disk with 300 MB of free space")
    computed, multiplied, count = given or (entries, read, len(devices))
    computing = times(lambda: list(tiles.computed(kernel_fn, inputs, one.sides, keys, devices)), 20)
    multiplying = times(lambda: one.matvec(np.ones((side, data.CLASSES))), 20)
    checking = shortest(lambda: one.put((0, 0), one.tiles[0, 0])) / side**2
    whitening = shortest(lambda: place(images, devices)) * len(devices) / side
    call = shortest(lambda: processes.all_reduce(ones[:1]))
    threads = tiles.cores() + 2 * bool(folder)
    return Rates(
        tile=tile**2 / computed * computing / computing.mean(),
        product=threads / multiplied * multiplying / multiplying.mean(),
        devices=int(count), threads=threads, write=tile**2 * (4 / written + checking),
        whiten=tile * whitening * entries / computed, kept=max(1, images.kept // tile), load=loading(n),
        vectors=n / rows * undivided(rows, rank), factor=dividing(rank),
        call=call, copy=(shortest(lambda: processes.all_reduce(ones)) - call) / ones.nbytes)


def times(call, number=3):
    """Seconds of each of `number` calls, after a first."""
    took = []
    for _ in range(number + 1):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return np.array(took[1:])


def shortest(call, number=3):
    return times(call, number).min()


def place(images, devices):
    """Each device whitens its share of the images."""
    parts = np.array_split(np.arange(len(images)), len(devices))
    images.made.clear()
    jax.block_until_ready([images[rows].on(device) for rows, device in zip(parts, devices)])


def loading(n):
    """Seconds of reading n images from an .npz in the page cache, hashing them for the store and for the other hosts, and
    of fitting the whitening by one thread, 64 times what a quarter of the images with a quarter of the pixels take."""
    rng, few, fit = np.random.default_rng(0), 1024, train_cifar.FIT_ON
    x = rng.integers(0, 256, (few, *SHAPE), np.uint8)
    small = rng.integers(0, 256, (fit // 4, SHAPE[0] // 2, SHAPE[1] // 2, SHAPE[2]), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for part in range(cifar5m.PARTS + 1):
            np.savez(os.path.join(folder, f"part{part}.npz"), X=x, Y=np.arange(few) % data.CLASSES)
        read = shortest(lambda: cifar5m.load(folder)) / (cifar5m.PARTS + 1)
    hashed = shortest(lambda: (store.digests(x), hashlib.blake2b(x).digest()))  # the latter: processes.agree
    with threadpool_limits(1, user_api="blas"):
        return n / few * (read + hashed) + 64 * shortest(lambda: data.whitening("zca", small)(100.0), 1)


def undivided(rows, rank, classes=data.CLASSES):
    """Seconds of a step of CG in a process that has no tile and no row of F, with vectors (rows, classes)."""
    team = tiles.Team(rows, rows + 1)
    K = tiles.empty(rows, rows, rows, True, team)
    low = pcg.LowRank(np.zeros((0, rank), np.float32), np.ones(rows), team)(1.0)
    y, weights = np.random.default_rng(0).standard_normal((rows, classes)), np.linspace(1, 9, rows)[:, None]

    def solve(steps):
        with warnings.catch_warnings(action="ignore"):  # it is far from the tolerance
            pcg.solve(lambda v: np.multiply(weights, v, out=K.matvec(v)), y, 0.0, lambda r: np.add(r, low(r)), max_iters=steps)
    return (shortest(lambda: solve(5)) - shortest(lambda: solve(1))) / 4


def dividing(rank, rows=8192, classes=data.CLASSES):
    """Seconds that an element of F costs in M^-1."""
    def inverse(rows):
        rng = np.random.default_rng(0)
        low = pcg.LowRank(rng.standard_normal((rows, rank), np.float32), np.ones(rows))(1.0)
        return shortest(lambda: low(np.ones((rows, classes))))
    return max(0.0, inverse(rows) - inverse(rows // 32)) / (rows - rows // 32) / rank
