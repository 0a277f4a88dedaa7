"""Tile-parallel kernel matrices.

Every entry of K is independent of every other, so K is cut into tiles and each device of each process
computes whole tiles; no device talks to another. K is symmetric: only tiles on and above the diagonal
are computed and kept. The product y = K v reads each of them once and uses it twice,
  y_i += K_ij v_j   and, off the diagonal,   y_j += K_ij^T v_i,
and one sum over the processes finishes it.

  n, m  rows, columns   b  tile side   D  devices of a process   P  processes   c  columns of v

Any n, b, D, P: the last tile of a row or column is computed at full size, with row 0 standing in
for the rows that do not exist (real data, so finite whatever the kernel), and cut to what does.
Tile (i, j) belongs to process t mod P, t its number in column order: j (j + 1) / 2 + i where K is
symmetric. t does not depend on n, so a larger K leaves every tile where it was.

Where the tiles are kept is not said here: in memory, in a dict; on disk, in a `store.Store`; or nowhere
(lazy.py), and every product computes them anew.

    K = tiles.gram(kernel.kernel_fn("fc", "nngp"), x_train);  K.matvec(v)

Cost: n (n + b) / (2 D P) entries a device; 4 n m bytes, half of them where symmetric; a product 2 n m c
operations, and 8 n c bytes summed over processes.      Proved by: test_all.py, section tiles
"""

import itertools
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

TILE = 1024  # 4 MB in float32: small in memory, large enough that a call to a device is not felt
MEET = 300  # seconds between two meetings while tiles are computed; a collective waits for half an hour
PART = 64, 1024  # rows and columns turned to float64 at a time: they stay in cache between their two uses


class Team(NamedTuple):
    """The processes that share a matrix; alone unless `hosts.start` says otherwise."""
    index: int = 0
    count: int = 1
    all_reduce: Callable = lambda array: array  # the sum over processes, the same for all


ALONE = Team()


def gram(kernel_fn, x, tile=TILE, devices=None, quiet=False, store=None, team=ALONE):
    """K = kernel_fn(x, x), (n, n), symmetric to the last bit, as a TiledMatrix.

    kernel_fn: (b, ...), (b, ...) -> (b, b), traceable by JAX; the dtype it returns is stored. Where
    it returns a tuple of these, as with NNGP and NTK in one pass, so does this function.
    x: n inputs: an array, or anything with len(x) and x[rows] for an array of row numbers.
    tile: side b of a tile.   devices: JAX devices to use, by default every local one.
    store: where tiles are kept and found, a `store.Store`, or a tuple of them; None is in memory.
    team: the processes that share the work.
    Raises ValueError: no inputs, a tile below 1, entries that are not finite.  MemoryError: K does
    not fit.  OSError: a tile could not be written.
    """
    return _compute(kernel_fn, x, x, tile, devices, quiet, store, team, symmetric=True)


def cross(kernel_fn, x1, x2, tile=TILE, devices=None, quiet=False, store=None, team=ALONE):
    """K = kernel_fn(x1, x2), (n, m), as a TiledMatrix; arguments and errors as for `gram`."""
    return _compute(kernel_fn, x1, x2, tile, devices, quiet, store, team, symmetric=False)


def _compute(kernel_fn, x1, x2, tile, devices, quiet, store, team, symmetric):
    K = empty(x1, x2, tile, symmetric, team)
    keys = list(K.keys())
    if store is None:
        check_memory(f"the {len(x1)} x {len(x2)} kernel", 4 * len(keys) * K.sides[0] * K.sides[1])
        blocks = [jnp.asarray(x[np.zeros(1, int)]) for x in (x1, x2)]
        result = jax.eval_shape(kernel_fn, *(jax.ShapeDtypeStruct((side,) + block.shape[1:], block.dtype)
                                             for side, block in zip(K.sides, blocks)))
        store = tuple({} for _ in result) if isinstance(result, tuple) else {}
    kept = store if isinstance(store, tuple) else (store,)
    shapes = {key: tuple(s.stop - s.start for s in K.slices(key)) for key in keys}
    done = [one.intact(shapes, quiet) if hasattr(one, "intact") else one for one in kept]
    todo = [key for key in keys if not all(key in there for there in done)]
    found = sum(math.prod(shapes[key]) for key in keys) - sum(math.prod(shapes[key]) for key in todo)
    matrices = tuple(replace(K, tiles=one, found=found) for one in kept)
    size = K.sides[0] * K.sides[1]
    with tqdm(total=len(keys) * size, initial=(len(keys) - len(todo)) * size, unit=" entries",
              unit_scale=True, desc=f"kernel, {len(keys)} tiles", disable=quiet or None,
              leave=False) as bar:
        met = time.monotonic()
        for key, results in walk(kernel_fn, [(0, x1), (1, x2)], K.sides, todo, devices):
            for K, there, result in zip(matrices, done, results):
                if key not in there:
                    K._set(key, result)
            bar.update(size)
            if team.count > 1 and time.monotonic() > met + MEET:
                team.all_reduce(np.ones(1))
                met = time.monotonic()
        while team.all_reduce(np.zeros(1))[0]:  # how many still compute
            pass
    return matrices if isinstance(store, tuple) else matrices[0]


def empty(x1, x2, tile, symmetric, team):
    """The TiledMatrix of these inputs before it has a tile: its shape and tiling."""
    n, m = len(x1), len(x2)
    if min(n, m, tile) < 1:
        raise ValueError(f"got {n} and {m} inputs and tile={tile}: each must be at least 1")
    return TiledMatrix((n, m), (min(tile, n), min(tile, m)), symmetric, {}, team)


def walk(fn, inputs, sides, keys, devices=None):
    """Yields (key, list of the arrays that fn returns) for every key, a key on each device at a time.

    inputs: [(0 or 1, rows), ...], what fn is called with: of `rows` the block with number key[0] or
    key[1], of sides[0] or sides[1] rows. Each device walks its own run of consecutive keys, so that a
    block is placed on it once for as long as it is needed.
    """
    devices = jax.local_devices() if devices is None else devices
    runs = np.array_split(np.array(keys, np.int64).reshape(-1, 2), len(devices))
    mesh = NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec("device"))
    mapped = _mapped(fn, tuple(devices))
    placed = {}

    def blocks(which, step):
        """The blocks of one argument for one step, one on each device: (D, b, ...) in D shards."""
        side, x = inputs[which]
        for device, run in zip(devices, runs):
            index = run[min(step, len(run) - 1)][side] if len(run) else 0
            if placed.get((which, device), (None,))[0] != index:
                rows = np.arange(index * sides[side], (index + 1) * sides[side])
                block = np.asarray(x[np.where(rows < len(x), rows, 0)])
                placed[which, device] = index, jax.device_put(block[None], device)
        shards = [placed[which, device][1] for device in devices]
        return jax.make_array_from_single_device_arrays(
            (len(devices),) + shards[0].shape[1:], mesh, shards)

    def fetch(results, step):
        shards = [result.addressable_shards for result in jax.tree.leaves(results)]
        for shard in sum(shards, []):
            shard.data.copy_to_host_async()
        for device, run in enumerate(runs):
            if step < len(run):
                yield tuple(run[step].tolist()), [np.asarray(of[device].data)[0] for of in shards]

    pending = None  # dispatch is asynchronous: step s runs while the results of s - 1 are used
    for step in range(len(runs[0])):
        result = mapped(*(blocks(which, step) for which in range(len(inputs))))
        if pending is not None:
            yield from fetch(pending, step - 1)
        pending = result
    if pending is not None:
        yield from fetch(pending, len(runs[0]) - 1)


@lru_cache(maxsize=8)
def _mapped(fn, devices):
    """pmap, once: a new one would compile anew."""
    return jax.pmap(fn, devices=devices)


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

    def _set(self, key, tile):
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
        return replace(self, shape=(n if self.symmetric else self.shape[0], n))

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

        def product(key):
            rows, cols, tile = self._block(key)
            both = self.symmetric and key[0] != key[1]
            v_i, v_j = v[rows] if both else None, v[cols]
            y_i, y_j = np.zeros((tile.shape[0], v.shape[1])), np.zeros((tile.shape[1], v.shape[1]))
            space = np.empty(PART)
            for r, s in itertools.product(range(0, len(tile), PART[0]), range(0, len(v_j), PART[1])):
                part = tile[r:r + PART[0], s:s + PART[1]]
                part64 = space[:len(part), :part.shape[1]]
                np.copyto(part64, part)
                y_i[r:r + PART[0]] += part64 @ v_j[s:s + PART[1]]
                if both:
                    y_j[s:s + PART[1]] += part64.T @ v_i[r:r + PART[0]]
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


@lru_cache
def _blas():
    return ThreadpoolController()


def check_vectors(v, shape):
    if v.ndim != 2 or v.shape[0] != shape[1]:
        raise ValueError(f"v has shape {v.shape}; a product with a {shape[0]} x {shape[1]} matrix needs "
                         f"({shape[1]}, c)")


if __name__ == "__main__":
    import store

    try:
        sys.exit(min(1, sum(map(store.report, sys.argv[1:] or ["."]))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
