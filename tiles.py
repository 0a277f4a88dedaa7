"""Tile-parallel kernel matrices.

Every entry of K is independent of every other, so K is cut into tiles and each device computes
whole tiles; no device talks to another. K is symmetric: only tiles on and above the diagonal are
computed and kept. The product y = K v reads each of them once and uses it twice,
  y_i += K_ij v_j   and, off the diagonal,   y_j += K_ij^T v_i.

  n, m  rows, columns        b  tile side        D  local devices        c  columns of v

Any n, any b, any D: the last tile of a row or column is computed at full size, with row 0 standing
in for the rows that do not exist (real data, so finite whatever the kernel), and cut to what does.

    K = tiles.gram(kernel.kernel_fn("fc", "nngp"), x_train);  K.matvec(v)

Cost: n (n + b) / (2 D) entries a device; 4 n m bytes, half of them where symmetric; 2 n m c
floating-point operations a product.        Proved by: test_all.py, section tiles
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

TILE = 1024  # 4 MB in float32: small in memory, large enough that a call to a device is not felt
ROWS = 64  # of a tile, turned to float64 at a time: they stay in cache between their two uses


def gram(kernel_fn, x, tile=TILE, devices=None, quiet=False):
    """K = kernel_fn(x, x), (n, n), symmetric to the last bit, as a TiledMatrix.

    kernel_fn: (b, ...), (b, ...) -> (b, b), traceable by JAX; the dtype it returns is stored. Where
    it returns a tuple of these, as with NNGP and NTK in one pass, so does this function.
    x: n inputs: an array, or anything with len(x) and x[rows] for an array of row numbers.
    tile: side b of a tile.   devices: JAX devices to use, by default every local one.
    Raises ValueError: no inputs, a tile below 1, entries that are not finite.  MemoryError: K does
    not fit.
    """
    return _compute(kernel_fn, x, x, tile, devices, quiet, symmetric=True)


def cross(kernel_fn, x1, x2, tile=TILE, devices=None, quiet=False):
    """K = kernel_fn(x1, x2), (n, m), as a TiledMatrix; arguments and errors as for `gram`."""
    return _compute(kernel_fn, x1, x2, tile, devices, quiet, symmetric=False)


def _compute(kernel_fn, x1, x2, tile, devices, quiet, symmetric):
    devices = jax.local_devices() if devices is None else devices
    n, m = len(x1), len(x2)
    if min(n, m, tile) < 1:
        raise ValueError(f"got {n} and {m} inputs and tile={tile}: each must be at least 1")
    sides = min(tile, n), min(tile, m)
    grid = itertools.product(range(-(-n // sides[0])), range(-(-m // sides[1])))
    todo = [(i, j) for i, j in grid if i <= j or not symmetric]
    _check_memory(n, m, 4 * len(todo) * sides[0] * sides[1])

    # Each device walks its own run of consecutive tiles, so a block of x1 is placed on it once a row.
    runs = np.array_split(np.array(todo), len(devices))
    mesh = NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec("device"))
    mapped = jax.pmap(kernel_fn, devices=devices)
    placed = {}

    def inputs(side, x, step):
        """The blocks of one step, one on each device: an array (D, b, ...) of D shards."""
        for device, run in zip(devices, runs):
            index = run[min(step, len(run) - 1)][side] if len(run) else 0
            if placed.get((side, device), (None,))[0] != index:
                rows = np.arange(index * sides[side], (index + 1) * sides[side])
                block = np.asarray(x[np.where(rows < len(x), rows, 0)])
                placed[side, device] = index, jax.device_put(block[None], device)
        shards = [placed[side, device][1] for device in devices]
        return jax.make_array_from_single_device_arrays(
            (len(devices),) + shards[0].shape[1:], mesh, shards)

    matrices = []  # one for each matrix that kernel_fn returns
    bar = tqdm(total=len(todo) * sides[0] * sides[1], unit=" entries", unit_scale=True,
               desc=f"kernel, {len(todo)} tiles", disable=quiet or None, leave=False)

    def keep(results, step):
        results = jax.tree.leaves(results)
        for result in results:
            for shard in result.addressable_shards:
                shard.data.copy_to_host_async()
        if not matrices:
            matrices.extend(TiledMatrix((n, m), sides, symmetric, {}) for _ in results)
        for K, result in zip(matrices, results):
            for run, shard in zip(runs, result.addressable_shards):
                if step < len(run):
                    K._set(tuple(run[step].tolist()), np.asarray(shard.data)[0])
        bar.update(sides[0] * sides[1] * sum(step < len(run) for run in runs))

    with bar:
        pending = None  # dispatch is asynchronous: step s runs while the tiles of s - 1 are stored
        for step in range(len(runs[0])):
            result = mapped(inputs(0, x1, step), inputs(1, x2, step))
            if pending is not None:
                keep(pending, step - 1)
            pending = result
        keep(pending, len(runs[0]) - 1)
    return tuple(matrices) if isinstance(pending, tuple) else matrices[0]


def _check_memory(n, m, need):
    """Refuse before the first tile a matrix that this host cannot hold."""
    if not os.path.exists("/proc/meminfo"):  # only Linux says what is free
        return
    with open("/proc/meminfo") as lines:
        have = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    if need > have:
        raise MemoryError(f"the {n} x {m} kernel needs {need / 1e9:.1f} GB; this host has "
                          f"{have / 1e9:.1f} GB free. Lower --n_train or --n_test.")


@dataclass(frozen=True)
class TiledMatrix:
    """A kernel matrix (n, m) in tiles; symmetric ones keep tiles (i, j) with i <= j only.

    shape: (n, m).   sides: rows and columns of a whole tile.   tiles: {(i, j): array}, ragged at the
    ends. After `leading` the tiles may reach beyond shape; every method reads only what is inside.
    """
    shape: tuple
    sides: tuple
    symmetric: bool
    tiles: dict

    def _set(self, key, tile):
        """Cut a computed tile to the matrix, check it, make a diagonal one symmetric, keep it."""
        rows, cols = (s.stop - s.start for s in self._slices(key))
        tile = tile[:rows, :cols]
        if not np.isfinite(tile).all():
            raise ValueError(f"tile {key} of the kernel has {np.sum(~np.isfinite(tile))} entries that "
                             "are not finite: look for NaN or infinity in the inputs")
        if self.symmetric and key[0] == key[1]:
            tile = np.triu(tile) + np.triu(tile, 1).T
        self.tiles[key] = np.array(tile)  # a copy: the device's buffer is padded, and its own

    def _slices(self, key):
        """The rows and columns of the matrix that tile `key` covers, both inside the matrix."""
        return [slice(k * side, max(k * side, min(size, (k + 1) * side)))
                for k, side, size in zip(key, self.sides, self.shape)]

    def _blocks(self):
        """Every stored tile inside the matrix: (key, rows, columns, array of that shape)."""
        for key, tile in self.tiles.items():
            rows, cols = self._slices(key)
            if rows.stop > rows.start and cols.stop > cols.start:
                yield key, rows, cols, tile[:rows.stop - rows.start, :cols.stop - cols.start]

    @property
    def entries(self):
        """Kernel entries stored inside the matrix: about half of n^2 where it is symmetric."""
        return sum(tile.size for *_, tile in self._blocks())

    def leading(self, n):
        """The leading n x n block of a symmetric matrix; shares the tiles, copies nothing."""
        if not (self.symmetric and 1 <= n <= self.shape[0]):
            raise ValueError(f"leading({n}) of a {self.shape[0]} x {self.shape[1]} matrix: needs a "
                             f"symmetric matrix and 1 <= n <= {self.shape[0]}")
        return replace(self, shape=(n, n))

    def diagonal(self):
        """K[i, i], (n,) float64, of a symmetric matrix."""
        out = np.empty(self.shape[0])
        for (i, j), rows, _, tile in self._blocks():
            if i == j:
                out[rows] = np.diagonal(tile)
        return out

    def columns(self, indices):
        """K[:, indices], (n, len(indices)) float64, in the order asked for."""
        indices = np.asarray(indices)
        out = np.empty((self.shape[0], len(indices)))
        for (i, j), rows, cols, tile in self._blocks():
            inside = (cols.start <= indices) & (indices < cols.stop)
            out[rows, inside] = tile[:, indices[inside] - cols.start]
            if self.symmetric and i != j:
                inside = (rows.start <= indices) & (indices < rows.stop)
                out[cols, inside] = tile[indices[inside] - rows.start].T
        return out

    def matvec(self, v):
        """y = K v: (m, c) float64 -> (n, c) float64; tiles as stored, sums in float64.

        One pass over the tiles on every core. ROWS rows of a tile are turned to float64 and used
        for both of its products while they are in cache.
        """
        if v.shape[0] != self.shape[1] or v.ndim != 2:
            raise ValueError(f"v has shape {v.shape}; a product with a {self.shape[0]} x "
                             f"{self.shape[1]} matrix needs ({self.shape[1]}, c)")

        def product(block):
            (i, j), rows, cols, tile = block
            both = self.symmetric and i != j
            v_i, v_j = v[rows] if both else None, v[cols]
            y_i = np.empty((tile.shape[0], v.shape[1]))
            y_j = np.zeros((tile.shape[1], v.shape[1]))
            for r in range(0, len(tile), ROWS):
                part = tile[r:r + ROWS].astype(np.float64)
                y_i[r:r + ROWS] = part @ v_j
                if both:
                    y_j += part.T @ v_i[r:r + ROWS]
            return rows, y_i, cols, y_j if both else None

        y = np.zeros((self.shape[0], v.shape[1]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for rows, y_i, cols, y_j in pool.map(product, self._blocks()):
                y[rows] += y_i
                if y_j is not None:
                    y[cols] += y_j
        return y

    def dense(self):
        """The whole matrix as one array of the tiles' dtype, for small n."""
        out = np.empty(self.shape, next(iter(self.tiles.values())).dtype)
        for (i, j), rows, cols, tile in self._blocks():
            out[rows, cols] = tile
            if self.symmetric and i != j:
                out[cols, rows] = tile.T
        return out
