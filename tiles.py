"""Kernel matrices: computed tile by tile on every device, and multiplied where the tiles lie.

No entry of K depends on another, so K is cut into b x b tiles, and each device of each process computes whole tiles; no
device talks to another. K(X, X) is symmetric: only tiles (i, j) with i <= j are computed and kept. The product y = K v
reads every tile once and uses it twice,

  y_i += K_ij v_j   and, off the diagonal,   y_j += K_ij^T v_i,

and one sum over the processes finishes it.

  n, m  rows, columns   b  tile side   c  columns of v   D  devices of a process   P  processes

Any n, b, D, P. The last tiles of a row or column are computed at full size, padded with copies of row 0, so that the
kernel sees only real data, and then cut. Tile number t, counted down the columns, belongs to process t mod P. More
columns do not change t, so a larger training set leaves every tile where it was.

Tiles are kept in a mapping {(i, j): array}: a dict, or whatever has the same methods (large/store.py: a folder).

    K = tiles.gram(kernel.kernel_fn("fc", "nngp"), x_train);  y = K.matvec(v)

Cost: n (n + b) / (2 D P) entries a device; 4 n m bytes, half of them where K is symmetric; a product 2 n m c operations,
and 8 n c bytes summed over processes.      Proved by: test_all.py, section tiles
"""

import itertools
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

try:
    from large import container
except ImportError:  # large/ may be deleted: then a container's limits on cores and memory are not seen
    container = None

TILE = 1024  # default side: 4 MB in float32, small in memory and yet so large that a call to a device costs nothing
PART = 64, 1024  # rows and columns converted to float64 at a time, small enough to stay in cache. One column of v: eight
# times the rows, for then the overhead of Python shows (1.35 times faster); 32 columns or more: four times (1.2)
FEW = 2**24  # products of an entry and a number that take less time in one thread: below about 2,000 rows and ten columns
PIECE = 2**26  # bytes, at most, that processes sum at a time
MEET = 300  # seconds between two meetings of the processes while tiles are computed: a sum gives up after half an hour
LOG = logging.getLogger("progress")  # what this process is doing; large/processes.py writes it to a file


class Team(NamedTuple):
    """The processes that share a matrix. One process alone is the default."""
    index: int = 0
    count: int = 1
    all_reduce: Callable = lambda array: array  # the sum over processes, the same in all of them


ALONE = Team()


def gram(kernel_fn, x, tile=TILE, devices=None, quiet=False, store=None, team=ALONE):
    """K = kernel_fn(x, x), (n, n), exactly symmetric, as a TiledMatrix.

    kernel_fn: (b, ...), (b, ...) -> (b, b), traceable by JAX; the dtype it returns is stored. Where it returns a tuple of
    these, as with NNGP and NTK in one pass, so does this function.
    x: n inputs, an array or an object with len(x) and x[row numbers]. These rows are an array, or have on(device), which
    makes one for that device (augment.Images).
    tile: side b of a tile.   devices: JAX devices to use, by default every local one.
    store: a mapping for the tiles, or a tuple of them; None is a dict in memory. Tiles that it has are not computed.
    team: the processes that share the work.
    Raises ValueError: no inputs, a tile below 1, entries that are not finite.  MemoryError: K does not fit.
    """
    return _matrices(kernel_fn, x, x, tile, devices, quiet, store, team, symmetric=True)


def cross(kernel_fn, x1, x2, tile=TILE, devices=None, quiet=False, store=None, team=ALONE):
    """K = kernel_fn(x1, x2), (n, m), as a TiledMatrix; arguments and errors as for `gram`."""
    return _matrices(kernel_fn, x1, x2, tile, devices, quiet, store, team, symmetric=False)


def known(K, symmetric=True, tile=TILE):
    """A kernel matrix that is there already, an array (n, m), as a TiledMatrix: its tiles are views of it.

    ValueError: K is no matrix, has entries that are not finite, or is not symmetric up to rounding although it should be.
    """
    K = np.asarray(K)
    if K.ndim != 2 or 0 in K.shape or symmetric and K.shape[0] != K.shape[1]:
        raise ValueError(f"K has shape {K.shape}; expected {'(n, n)' if symmetric else '(n, m)'}")
    out = empty(*K.shape, tile, symmetric)
    for key in out.keys():
        rows, cols = out.slices(key)
        out.tiles[key] = part = K[rows, cols]
        if not np.isfinite(part).all():
            raise ValueError(f"K has {np.sum(~np.isfinite(K))} entries that are not finite")
        if symmetric and not np.allclose(part, K[cols, rows].T, rtol=1e-4, atol=1e-5 * abs(part).max()):
            raise ValueError("K is not symmetric; expected k(x, x') = k(x', x)")
    return out


def diagonal(kernel_fn, x, tile=64, devices=None, team=ALONE):
    """k(x, x) of every row of x, (n,) float64, without the rest of the matrix: n b entries."""
    out, K = np.zeros(len(x)), empty(len(x), len(x), tile, True, team)
    keys = [(i, i) for i in range(team.index, -(-len(x) // K.sides[0]), team.count)]
    for key, (part,) in computed(_diagonal(kernel_fn), [(0, x), (1, x)], K.sides, keys, devices):
        rows, _ = K.slices(key)
        out[rows] = part[:rows.stop - rows.start]
    out = team.all_reduce(out)
    if not np.isfinite(out).all():
        raise ValueError(f"{np.sum(~np.isfinite(out))} of {len(out)} elements k(x, x) are not finite: look for NaN or "
                         "infinity in the inputs")
    _large_enough(out.max(initial=0), jnp.result_type(float))
    return out


def _large_enough(most, dtype):
    """ValueError: `most`, the largest k(x, x), is so small that its products vanish in float32."""
    if dtype == np.float32 and 0 < most < 1e-30:
        raise ValueError(f"k(x, x) is {most:.0e} at most, too small for float32: multiply the inputs by a constant")


@lru_cache(maxsize=8)
def _diagonal(kernel_fn):
    return lambda a, b: jnp.diagonal(kernel_fn(a, b))


def _matrices(kernel_fn, x1, x2, tile, devices, quiet, store, team, symmetric):
    """One TiledMatrix, or a tuple of them, with all of this process's tiles."""
    K = empty(len(x1), len(x2), tile, symmetric, team)
    keys = list(K.keys())
    if store is None:
        store = _dicts(kernel_fn, x1, x2, K.sides)
    stores = store if isinstance(store, tuple) else (store,)
    if type(stores[0]) is dict:  # other places say themselves what fits
        check_memory(f"the {len(x1)} x {len(x2)} kernel", 4 * len(stores) * len(keys) * K.sides[0] * K.sides[1])
    shapes = {key: tuple(s.stop - s.start for s in K.slices(key)) for key in keys}
    intact = [one.intact(shapes, quiet) if hasattr(one, "intact") else set(one) for one in stores]
    missing = [key for key in keys if not all(key in there for there in intact)]
    found = sum(math.prod(shapes[key]) for key in set(keys) - set(missing))
    matrices = tuple(replace(K, tiles=one, found=found) for one in stores)
    size, every = K.sides[0] * K.sides[1], sum(1 for _ in replace(K, team=ALONE).keys())
    computed_here, start = 0, time.monotonic()

    def meet(busy):
        """How many processes are still computing, and how many tiles all of them have done."""
        seconds = time.monotonic() - start
        done = len(keys) - len(missing) + computed_here
        LOG.info("kernel %d x %d: %d of %d tiles, %.3g entries/s, %.0f s", *K.shape, done, len(keys),
                 computed_here * size / max(seconds, 1e-9), seconds)
        return team.all_reduce(np.array([busy, done]))

    busy, done = meet(1)
    met = time.monotonic()
    with tqdm(total=every * size, initial=done * size, unit=" entries", unit_scale=True, desc=f"kernel, {every} tiles",
              disable=quiet or None, leave=False) as bar:
        for key, arrays in computed(kernel_fn, [(0, x1), (1, x2)], K.sides, missing, devices):
            for matrix, there, array in zip(matrices, intact, arrays):
                if key not in there:
                    matrix.put(key, array)
            computed_here += 1
            bar.update(min(team.count * size, bar.total - bar.n))  # as if the others were as fast, until the next meeting
            if time.monotonic() > met + MEET:
                _, done = meet(1)
                bar.update(done * size - bar.n)
                met = time.monotonic()
        while busy:  # meet the others until none of them computes any more
            busy, done = meet(0)
            bar.update(done * size - bar.n)
    return matrices if isinstance(store, tuple) else matrices[0]


def _dicts(kernel_fn, x1, x2, sides):
    """A dict for each array that kernel_fn returns."""
    device, row = jax.local_devices()[0], np.zeros(1, int)
    blocks = [block(x, row, device) for x in (x1, x2)]
    arrays = jax.eval_shape(kernel_fn, *(jax.ShapeDtypeStruct((side, *one.shape[1:]), jax.dtypes.canonicalize_dtype(one.dtype))
                                         for side, one in zip(sides, blocks)))
    return tuple({} for _ in arrays) if isinstance(arrays, tuple) else {}


def computed(fn, inputs, sides, keys, devices=None):
    """Yields (key, [arrays that fn returns]) for every key, one key on each device at a time.

    inputs: [(axis, x), ...], one for each argument of fn: block key[axis] of x, sides[axis] rows long; axis is 0 or 1.
    Each device takes a run of neighbouring keys, so that a block is placed once for as long as it is needed. Keys are
    taken in squares whose blocks of rows and columns fit in what x keeps (x.kept rows; an array keeps all).
    """
    devices = jax.local_devices() if devices is None else devices
    group = min(max(1, getattr(x, "kept", sys.maxsize) // (2 * sides[axis])) for axis, x in inputs)
    keys = sorted(keys, key=lambda key: (key[1] // group, key[0] // group, key[1], key[0]))
    runs = np.array_split(np.array(keys, np.int64).reshape(-1, 2), len(devices))
    sharding = NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec("device"))
    mapped, placed = _pmap(fn, tuple(devices)), {}

    def argument(which, step):
        """The blocks of one argument for one step, (D, b, ...), one on each device."""
        axis, x = inputs[which]
        for device, run in zip(devices, runs):
            index = run[min(step, len(run) - 1)][axis] if len(run) else 0
            if placed.get((which, device), (None,))[0] != index:
                rows = np.arange(index * sides[axis], (index + 1) * sides[axis])
                part = block(x, np.where(rows < len(x), rows, 0), device)[None]
                placed[which, device] = index, jax.device_put(part, device)
        shards = [placed[which, device][1] for device in devices]
        return jax.make_array_from_single_device_arrays((len(devices), *shards[0].shape[1:]), sharding, shards)

    def fetched(results, step):
        shards = [result.addressable_shards for result in jax.tree.leaves(results)]
        for shard in sum(shards, []):
            shard.data.copy_to_host_async()
        for device, run in enumerate(runs):
            if step < len(run):
                yield tuple(run[step].tolist()), [np.asarray(of[device].data)[0] for of in shards]

    pending = None  # dispatch is asynchronous: step s runs while the results of step s - 1 are used
    for step in range(len(runs[0])):
        results = mapped(*(argument(which, step) for which in range(len(inputs))))
        if pending is not None:
            yield from fetched(pending, step - 1)
        pending = results
    if pending is not None:
        yield from fetched(pending, len(runs[0]) - 1)


@lru_cache(maxsize=32)
def _pmap(fn, devices):
    """pmap, once for each function: a new one would compile again."""
    return jax.pmap(fn, devices=devices)


def block(x, rows, device):
    """x[rows] as an array for a device: a NumPy array, or a JAX array that is there. Numbers of 8 or 16 bits become float32:
    JAX would compute k in as few, and 3 - 5 is 254 among bytes.
    ValueError: integers that JAX, which keeps 32 bits of them, would change."""
    part = x[rows]
    if hasattr(part, "on"):
        return part.on(device)
    part = np.asarray(part)
    if part.dtype.itemsize < 4 and part.dtype.kind in "biuf":
        return part.astype(np.float32)
    dtype = jax.dtypes.canonicalize_dtype(part.dtype)
    if part.dtype.kind in "iu" and dtype != part.dtype and not np.array_equal(part.astype(dtype), part):
        raise ValueError(f"x holds {part.flat[abs(part).argmax()]}, an integer beyond {dtype}: take x.astype(np.float32)")
    return part


@dataclass(frozen=True)
class TiledMatrix:
    """A kernel matrix (n, m) in tiles; of a symmetric one only tiles (i, j) with i <= j exist.

    shape: (n, m).   sides: rows and columns of a whole tile.   tiles: {(i, j): array}, smaller at the ends, at least
    those of this process. They may reach beyond shape (after `leading`, or from a store); methods read what is inside.
    team: the processes. A method that returns an array is called by all of them, and all get the same array.
    """
    shape: tuple
    sides: tuple
    symmetric: bool
    tiles: dict
    team: Team = ALONE
    found: int = 0  # entries that this process did not have to compute

    def keys(self):
        """This process's tiles inside the matrix, down the columns."""
        rows, columns = (-(-size // side) for size, side in zip(self.shape, self.sides))
        total = columns * (columns + 1) // 2 if self.symmetric else rows * columns
        for t in range(self.team.index, total, self.team.count):
            if self.symmetric:
                j = (math.isqrt(8 * t + 1) - 1) // 2
                yield t - j * (j + 1) // 2, j
            else:
                yield t % rows, t // rows

    def slices(self, key):
        """The rows and the columns of the matrix that a tile covers."""
        return [slice(k * side, min(size, (k + 1) * side)) for k, side, size in zip(key, self.sides, self.shape)]

    def cut(self, key):
        """Rows, columns and entries of a tile, cut to the matrix."""
        rows, cols = self.slices(key)
        return rows, cols, self.tiles[key][:rows.stop - rows.start, :cols.stop - cols.start]

    def put(self, key, tile):
        """Cut a computed tile to the matrix, check it, make one on the diagonal symmetric, keep it."""
        rows, cols = (s.stop - s.start for s in self.slices(key))
        tile = tile[:rows, :cols]
        if not np.isfinite(tile).all():
            raise ValueError(f"tile {key} of the kernel has {np.sum(~np.isfinite(tile))} entries that "
                             "are not finite: look for NaN or infinity in the inputs")
        if self.symmetric and key[0] == key[1]:
            _large_enough(tile.max(), tile.dtype)
            tile = np.triu(tile) + np.triu(tile, 1).T
        self.tiles[key] = np.array(tile)  # a copy: the device's buffer is padded and will be used again

    @property
    def entries(self):
        """Kernel entries kept by all processes: about half of n^2 where it is symmetric."""
        (n, m), b = self.shape, self.sides[0]
        if not self.symmetric:
            return n * m
        return (n * n + n // b * b * b + (n % b) ** 2) // 2  # tiles on the diagonal are whole

    @property
    def reads_all(self):
        """Whether a few columns cost as much as a product: true on a disk, where a tile is read as a whole."""
        return not isinstance(self.tiles, dict)

    @property
    def slowness(self):
        """How much slower an operation of `matvec` is than one of a product of float64 matrices, roughly."""
        return 4 if self.reads_all else 2

    def leading(self, n):
        """The first n columns, and of a symmetric matrix the first n rows. Shares the tiles, copies nothing."""
        if not 1 <= n <= self.shape[1]:
            raise ValueError(f"leading({n}) of a {self.shape[0]} x {self.shape[1]} matrix: needs 1 <= n <= "
                             f"{self.shape[1]}")
        out = replace(self, shape=(n if self.symmetric else self.shape[0], n))
        return replace(out, tiles=self.tiles.part(out.keys())) if hasattr(self.tiles, "part") else out

    def merged(self, side=TILE):
        """The same matrix in memory with tiles of up to `side`, for small tiles: with tiles of 32 a product is a hundred
        times more Python than arithmetic. Returns self where tiles are large, shared by processes, or would take a third
        of the memory."""
        times = side // max(self.sides)
        if times < 2 or self.team.count > 1 or 4 * self.entries > free_memory() / 3:
            return self
        out = replace(self, sides=tuple(times * side for side in self.sides), tiles={})
        for key in self.keys():
            rows, cols, tile = self.cut(key)
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
                rows, _, tile = self.cut(key)
                out[rows] = np.diagonal(tile)
        return self.team.all_reduce(out)

    def columns(self, indices, own=False):
        """K[:, indices], (n, len(indices)) float64, in the order asked for.

        own: float32, and only this process's rows: number `index`, and every `count`-th after it. Then no process holds more
        than these, the entries of its own tiles, and PIECE bytes.
        """
        indices, n, count = np.asarray(indices), self.shape[0], self.team.count
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.shape[1]:
            raise IndexError(f"columns {indices.min()} to {indices.max()} of a {n} x {self.shape[1]} matrix")
        if not own or count == 1:
            out = np.zeros((n, len(indices)), np.float32 if own else np.float64)
            for first, which, entries in self._entries(indices):
                out[first:first + len(entries), which] = entries
            return out if own else self.team.all_reduce(out)
        entries, out = list(self._entries(indices)), []
        step = max(1, PIECE // (4 * len(indices) * count)) * count
        for start in range(0, n, step):
            piece = np.zeros((min(step, n - start), len(indices)), np.float32)
            for first, which, part in entries:
                top, bottom = max(start, first), min(start + len(piece), first + len(part))
                if top < bottom:
                    piece[top - start:bottom - start, which] = part[top - first:bottom - first]
            out.append(self.team.all_reduce(piece)[self.team.index::count])
        return np.concatenate(out)

    def _entries(self, indices):
        """What this process's tiles hold of K[:, indices]: (first row, which of the indices, their entries), ..."""
        for key in self.keys():
            rows, cols = self.slices(key)
            right = np.flatnonzero((cols.start <= indices) & (indices < cols.stop))
            below = np.flatnonzero((rows.start <= indices) & (indices < rows.stop))
            mirrored = self.symmetric and key[0] != key[1] and len(below)
            if len(right) or mirrored:
                *_, tile = self.cut(key)
                if len(right):
                    yield rows.start, right, tile[:, indices[right] - cols.start]
                if mirrored:
                    yield cols.start, below, tile[indices[below] - rows.start].T

    def rows(self, start, stop):
        """K[start:stop], (stop - start, m) float64, of a matrix that is not symmetric."""
        out = np.zeros((stop - start, self.shape[1]))
        for key in self.keys():
            rows, cols = self.slices(key)
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                *_, tile = self.cut(key)
                out[first - start:last - start, cols] = tile[first - rows.start:last - rows.start]
        return self.team.all_reduce(out)

    def matvec(self, v):
        """y = K v: (m, c) float64 -> (n, c) float64; tiles as they are stored, sums in float64.

        One pass over the tiles, each by one thread: BLAS's own threads would wait for each other, 40 times slower.
        """
        check_vectors(v, self.shape)
        few = self.entries * max(8, v.shape[1]) < FEW
        y, vT = np.zeros((self.shape[0], v.shape[1])), np.ascontiguousarray(v.T)

        def product(key):
            rows, cols, tile = self.cut(key)
            both = self.symmetric and key[0] != key[1]
            return rows, cols, *multiplied(tile, vT[:, cols], vT[:, rows] if both else None)
        with one_thread(), ThreadPoolExecutor(self._threads) as pool:
            for rows, cols, y_i, y_j in (map if few else pool.map)(product, self.keys()):
                y[rows] += y_i
                if y_j is not None:
                    y[cols] += y_j
        return self.team.all_reduce(y)

    @property
    def _threads(self):
        """A thread for each core, and two more where tiles are on a disk, so that some read while others multiply."""
        return cores() + 2 * self.reads_all

    def read_rate(self, limit=2**31):
        """Bytes/s at which this process can read its tiles, at most `limit` bytes of them, by the threads of `matvec`: the
        speed of a product whose arithmetic is free."""
        def read(key):
            *_, tile = self.cut(key)
            tile.sum()
            return tile.nbytes
        keys = list(itertools.islice(self.keys(), max(1, limit // (4 * self.sides[0] * self.sides[1]))))
        start = time.perf_counter()
        with ThreadPoolExecutor(self._threads) as pool:
            size = sum(pool.map(read, keys))
        return size / (time.perf_counter() - start)

    def dense(self):
        """The whole matrix as one array of the tiles' dtype, for small n.  MemoryError: it does not fit."""
        first = next(self.keys(), None)
        dtype = np.dtype(np.float32) if first is None else self.tiles[first].dtype
        check_memory(f"the dense {self.shape[0]} x {self.shape[1]} kernel",
                     self.shape[0] * self.shape[1] * dtype.itemsize)
        out = np.zeros(self.shape, dtype)
        for key in self.keys():
            rows, cols, tile = self.cut(key)
            out[rows, cols] = tile
            if self.symmetric:
                out[cols, rows] = tile.T
        return self.team.all_reduce(out)


def multiplied(tile, v_j, v_i=None):
    """K_ij v_j (b, c), and with v_i also K_ij^T v_i (b', c), else None.  tile: K_ij (b, b').   v_j, v_i: (c, b'), (c, b).

    PART entries at a time are converted to float64 and used for both products while they are in cache.
    """
    step = PART[0] * (4 if len(v_j) >= 32 else max(1, 8 // max(1, len(v_j))))
    y_i, y_j = np.zeros((tile.shape[0], len(v_j))), None if v_i is None else np.zeros((len(v_j), tile.shape[1]))
    space = np.empty((min(step, tile.shape[0]), min(PART[1], tile.shape[1])))
    for r, s in itertools.product(range(0, len(tile), step), range(0, tile.shape[1], PART[1])):
        part = tile[r:r + step, s:s + PART[1]]
        part64 = space[:len(part), :part.shape[1]]
        np.copyto(part64, part)
        y_i[r:r + step] += part64 @ v_j[:, s:s + PART[1]].T
        if v_i is not None:
            y_j[:, s:s + PART[1]] += v_i[:, r:r + step] @ part64  # 1.5 times as fast as part64.T @ v_i
    return y_i, None if y_j is None else y_j.T


def empty(n, m, tile, symmetric, team=ALONE):
    """The TiledMatrix (n, m) before it has a tile.  ValueError: n, m or tile below 1."""
    if min(n, m, tile) < 1:
        raise ValueError(f"got {n} and {m} inputs and tile={tile}: each must be at least 1")
    return TiledMatrix((n, m), (min(tile, n), min(tile, m)), symmetric, {}, team)


def check_vectors(v, shape):
    """Raises ValueError unless v can be multiplied by a matrix of this shape."""
    if v.ndim != 2 or v.shape[0] != shape[1]:
        raise ValueError(f"v has shape {v.shape}; a product with a {shape[0]} x {shape[1]} matrix needs "
                         f"({shape[1]}, c)")


def cores():
    """How many cores this process may use: those that taskset or Slurm leave it, and with large/container.py no more than its
    container's share."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, container.cores() if container else count))


def use_cores(devices=None):
    """Sets JAX up, if it has not computed anything yet. Importing this file does so, unless JAX was set up before.

    On a CPU: `devices` devices, by default one for each core that this process may use, and vectors of 512 bits where the
    processor has them (XLA prefers 256, with which fast/fused.py takes 1.4 times as long).   On a GPU: float32 products in
    full, not TF32.
    """
    flag = "--xla_cpu_prefer_vector_width"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{flag}=512 {os.environ.get('XLA_FLAGS', '')}"
    os.environ.setdefault("NPROC", str(cores()))  # XLA's threads
    if jax.config.jax_default_matmul_precision is None:
        jax.config.update("jax_default_matmul_precision", "highest")
    try:
        jax.config.update("jax_num_cpu_devices", devices or cores())
    except RuntimeError:  # JAX has computed: its devices stay as they are
        pass


def free_memory():
    """Bytes of memory that this process may still take: of its host, and with large/container.py of its container; infinite
    where neither says."""
    have = [container.free_memory() if container else math.inf]
    if os.path.exists("/proc/meminfo"):  # only Linux has it
        with open("/proc/meminfo") as lines:
            have += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return max(0, min(have))


def check_memory(what, need):
    """Raises MemoryError, before the work is begun, for what does not fit in this host's memory."""
    have = free_memory()
    if need > have:
        raise MemoryError(f"{what} needs {need / 1e9:.1f} GB of memory; this host has {have / 1e9:.1f} GB "
                          "free. Take fewer rows (--n_train); or in a script keep tiles on disk (--store DIR), and in "
                          "train_cifar.py compute them for every product (--store none) or add processes")


def one_thread():
    """A context in which BLAS uses one thread for each of ours."""
    return _blas().limit(limits=1, user_api="blas")


@lru_cache
def _blas():
    return ThreadpoolController()


if jax.config.jax_num_cpu_devices < 0 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
    use_cores()
