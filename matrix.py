"""A kernel matrix in tiles: which process has which, and the product y = K v where they lie.

K is symmetric: only tiles on and above the diagonal are kept. The product reads each of them once and
uses it twice,
  y_i += K_ij v_j   and, off the diagonal,   y_j += K_ij^T v_i,
and one sum over the processes finishes it.

  n, m  rows, columns   b  tile side   P  processes   c  columns of v

Any n, b, P: the last tiles are smaller. Tile (i, j) belongs to process t mod P, t its number in column
order: j (j + 1) / 2 + i where K is symmetric. t does not depend on n, so a larger K leaves every tile
where it was. Where tiles are kept is not said here: in memory, in a dict; on disk, in a `store.Store`;
or nowhere (lazy.py), and every product computes them anew.

    K = tiles.gram(kernel_fn, x);  K.matvec(v)

Cost: 4 n m bytes, half of them where symmetric; a product 2 n m c operations, and 8 n c bytes summed
over processes.      Proved by: test_all.py, section tiles
"""

import itertools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

TILE = 1024  # 4 MB in float32: small in memory, large enough that a call to a device is not felt
PART = 64, 1024  # rows and columns turned to float64 at a time: they stay in cache between their two uses. For one
# column of v eight times the rows, where Python is felt in each part: 1.35 times faster, four columns 1.47


class Team(NamedTuple):
    """The processes that share a matrix; alone unless `hosts.start` says otherwise."""
    index: int = 0
    count: int = 1
    all_reduce: Callable = lambda array: array  # the sum over processes, the same for all


ALONE = Team()


def free_memory():
    """Bytes of memory that this host has free; infinite where it does not say."""
    if not os.path.exists("/proc/meminfo"):  # only Linux does
        return math.inf
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def check_memory(what, need):
    """Refuse, before it is begun, what this host's memory cannot hold."""
    have = free_memory()
    if need > have:
        raise MemoryError(f"{what} needs {need / 1e9:.1f} GB of memory; this host has {have / 1e9:.1f} GB "
                          "free. Keep tiles on disk with --store DIR, compute them for every product with "
                          "--store none, add processes, or lower --n_train.")


@dataclass(frozen=True)
class TiledMatrix:
    """A kernel matrix (n, m) in tiles; symmetric ones keep tiles (i, j) with i <= j only.

    shape: (n, m).   sides: rows and columns of a whole tile.   tiles: {(i, j): array}, ragged at the
    ends, this process's at least. They may reach beyond shape, after `leading` and from a store;
    every method reads only what is inside.   team: the processes; methods that return an array are
    called by all of them, and all get the same.
    """
    shape: tuple
    sides: tuple
    symmetric: bool
    tiles: dict
    team: Team = ALONE
    found: int = 0  # entries that this process did not have to compute

    def keys(self):
        """This process's tiles inside the matrix, in column order."""
        rows, columns = (-(-size // side) for size, side in zip(self.shape, self.sides))
        total = columns * (columns + 1) // 2 if self.symmetric else rows * columns
        for t in range(self.team.index, total, self.team.count):
            if self.symmetric:
                j = (math.isqrt(8 * t + 1) - 1) // 2
                yield t - j * (j + 1) // 2, j
            else:
                yield t % rows, t // rows

    def put(self, key, tile):
        """Cut a computed tile to the matrix, check it, make a diagonal one symmetric, keep it."""
        rows, cols = (s.stop - s.start for s in self.slices(key))
        tile = tile[:rows, :cols]
        if not np.isfinite(tile).all():
            raise ValueError(f"tile {key} of the kernel has {np.sum(~np.isfinite(tile))} entries that "
                             "are not finite: look for NaN or infinity in the inputs")
        if self.symmetric and key[0] == key[1]:
            tile = np.triu(tile) + np.triu(tile, 1).T
        self.tiles[key] = np.array(tile)  # a copy: the device's buffer is padded, and its own

    def slices(self, key):
        """The rows and columns of the matrix that tile `key` covers, both inside the matrix."""
        return [slice(k * side, min(size, (k + 1) * side))
                for k, side, size in zip(key, self.sides, self.shape)]

    def _block(self, key):
        """Rows, columns and entries of a tile, cut to the matrix."""
        rows, cols = self.slices(key)
        return rows, cols, self.tiles[key][:rows.stop - rows.start, :cols.stop - cols.start]

    def _read(self, key):
        """Read a tile and forget it; its bytes."""
        *_, tile = self._block(key)
        tile.sum()
        return tile.nbytes

    @property
    def _threads(self):
        """A thread for each core, and from a disk two more, so that some read while others multiply."""
        return os.cpu_count() + (0 if isinstance(self.tiles, dict) else 2)

    @property
    def slowness(self):
        """Time of an operation in a product with K over that in a product of float64 matrices, roughly."""
        return 2 if isinstance(self.tiles, dict) else 4

    @property
    def reads_all(self):
        """Whether a few columns cost as much as a product: on a disk, where tiles are read whole."""
        return not isinstance(self.tiles, dict)

    @property
    def entries(self):
        """Kernel entries kept, by all processes: about half of n^2 where it is symmetric."""
        (n, m), b = self.shape, self.sides[0]
        if not self.symmetric:
            return n * m
        return (n * n + n // b * b * b + (n % b) ** 2) // 2  # the squares on the diagonal are whole

    def leading(self, n):
        """The first n columns, and where it is symmetric rows; shares the tiles, copies nothing."""
        if not 1 <= n <= self.shape[1]:
            raise ValueError(f"leading({n}) of a {self.shape[0]} x {self.shape[1]} matrix: needs 1 <= n <= "
                             f"{self.shape[1]}")
        out = replace(self, shape=(n if self.symmetric else self.shape[0], n))
        return replace(out, tiles=self.tiles.part(out.keys())) if hasattr(self.tiles, "part") else out

    def merged(self, side=TILE):
        """The same matrix in memory, in tiles of up to `side`; itself where they are large, shared by
        processes, or would take a third of the memory. A product with tiles of 32 is a hundred times more
        Python than arithmetic."""
        times = side // max(self.sides)
        if times < 2 or self.team.count > 1 or 4 * self.entries > free_memory() / 3:
            return self
        out = replace(self, sides=tuple(times * side for side in self.sides), tiles={})
        for key in self.keys():
            rows, cols, tile = self._block(key)
            into = key[0] // times, key[1] // times
            (top, bottom), (first, last) = ((s.start, s.stop) for s in out.slices(into))
            if into not in out.tiles:
                out.tiles[into] = np.zeros((bottom - top, last - first), tile.dtype)
            whole = out.tiles[into]
            whole[rows.start - top:rows.stop - top, cols.start - first:cols.stop - first] = tile
            if self.symmetric and into[0] == into[1]:
                whole[cols.start - first:cols.stop - first, rows.start - top:rows.stop - top] = tile.T
        return out

    def diagonal(self):
        """K[i, i], (n,) float64, of a symmetric matrix."""
        out = np.zeros(self.shape[0])
        for key in self.keys():
            if key[0] == key[1]:
                rows, _, tile = self._block(key)
                out[rows] = np.diagonal(tile)
        return self.team.all_reduce(out)

    def columns(self, indices):
        """K[:, indices], (n, len(indices)) float64, in the order asked for."""
        indices = np.asarray(indices)
        out = np.zeros((self.shape[0], len(indices)))
        for key in self.keys():
            rows, cols = self.slices(key)
            right = (cols.start <= indices) & (indices < cols.stop)
            below = (rows.start <= indices) & (indices < rows.stop)
            mirrored = self.symmetric and key[0] != key[1] and below.any()
            if right.any() or mirrored:
                *_, tile = self._block(key)
                out[rows, right] = tile[:, indices[right] - cols.start]
                if mirrored:
                    out[cols, below] = tile[indices[below] - rows.start].T
        return self.team.all_reduce(out)

    def rows(self, start, stop):
        """K[start:stop], (stop - start, m) float64, of a matrix that is not symmetric."""
        out = np.zeros((stop - start, self.shape[1]))
        for key in self.keys():
            rows, cols = self.slices(key)
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                *_, tile = self._block(key)
                out[first - start:last - start, cols] = tile[first - rows.start:last - rows.start]
        return self.team.all_reduce(out)

    def matvec(self, v):
        """y = K v: (m, c) float64 -> (n, c) float64; tiles as stored, sums in float64.

        One pass over the tiles, one to a thread. PART entries at a time are turned to float64 and used for
        both products while they are in cache. BLAS's own threads would wait for each other: 40 times
        slower.
        """
        check_vectors(v, self.shape)
        step = PART[0] * max(1, 8 // max(1, v.shape[1]))

        def product(key):
            rows, cols, tile = self._block(key)
            both = self.symmetric and key[0] != key[1]
            v_i, v_j = v[rows] if both else None, v[cols]
            y_i, y_j = np.zeros((tile.shape[0], v.shape[1])), np.zeros((tile.shape[1], v.shape[1]))
            space = np.empty((min(step, tile.shape[0]), min(PART[1], tile.shape[1])))
            for r, s in itertools.product(range(0, len(tile), step), range(0, len(v_j), PART[1])):
                part = tile[r:r + step, s:s + PART[1]]
                part64 = space[:len(part), :part.shape[1]]
                np.copyto(part64, part)
                y_i[r:r + step] += part64 @ v_j[s:s + PART[1]]
                if both:
                    y_j[s:s + PART[1]] += part64.T @ v_i[r:r + step]
            return rows, y_i, cols, y_j if both else None

        y = np.zeros((self.shape[0], v.shape[1]))
        with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(self._threads) as pool:
            for rows, y_i, cols, y_j in pool.map(product, self.keys()):
                y[rows] += y_i
                if y_j is not None:
                    y[cols] += y_j
        return self.team.all_reduce(y)

    def read_rate(self, limit=2**31):
        """Bytes/s at which this process can read its tiles, by the threads of `matvec`, `limit` bytes at
        most and only a sum made of them: what a product would reach if it cost no arithmetic."""
        keys = list(itertools.islice(self.keys(), max(1, limit // (4 * self.sides[0] * self.sides[1]))))
        start = time.perf_counter()
        with ThreadPoolExecutor(self._threads) as pool:
            size = sum(pool.map(self._read, keys))
        return size / (time.perf_counter() - start)

    def dense(self):
        """The whole matrix as one array of the tiles' dtype, for small n.  MemoryError: it is not."""
        first = next(self.keys(), None)
        dtype = np.dtype(np.float32) if first is None else self.tiles[first].dtype
        check_memory(f"the dense {self.shape[0]} x {self.shape[1]} kernel",
                     self.shape[0] * self.shape[1] * dtype.itemsize)
        out = np.zeros(self.shape, dtype)
        for key in self.keys():
            rows, cols, tile = self._block(key)
            out[rows, cols] = tile
            if self.symmetric:
                out[cols, rows] = tile.T
        return self.team.all_reduce(out)


def empty(n, m, tile, symmetric, team=ALONE):
    """The TiledMatrix (n, m) before it has a tile.  ValueError: n, m or tile below 1."""
    if min(n, m, tile) < 1:
        raise ValueError(f"got {n} and {m} inputs and tile={tile}: each must be at least 1")
    return TiledMatrix((n, m), (min(tile, n), min(tile, m)), symmetric, {}, team)


@lru_cache
def _blas():
    return ThreadpoolController()


def check_vectors(v, shape):
    if v.ndim != 2 or v.shape[0] != shape[1]:
        raise ValueError(f"v has shape {v.shape}; a product with a {shape[0]} x {shape[1]} matrix needs "
                         f"({shape[1]}, c)")
