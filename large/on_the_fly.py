"""A kernel matrix computed on the fly: every product evaluates its tiles again and stores none.

For kernels that are cheaper to compute than to read, such as `fc`: a GPU computes a tile in less time than a disk takes to
write and read it, two cores take about as long. Tiles, processes and results are the same as in tiles.py. A GPU also
multiplies the tile that it has computed, in float64, so that only vectors leave it. On a CPU tiles.py multiplies it, or for a
fully connected network fast/fc.cpp, which also computes it, without a way through memory.

    K = on_the_fly.matrix(kernel_fn, x_train);  K.matvec(v)

Cost: a product n (n + b) / (2 D P) entries a device.      Proved by: large/test_large.py
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import tiles
from tiles import ALONE, TILE, TiledMatrix, check_vectors, empty

try:
    from fast import fc
except ImportError:  # fast/ may be deleted
    fc = None


def matrix(kernel_fn, x1, x2=None, tile=TILE, devices=None, quiet=False, team=ALONE, network=None):
    """kernel_fn(x1, x1), or with x2 kernel_fn(x1, x2), as a Lazy matrix.

    Arguments as for `tiles.gram` and `tiles.cross`, but kernel_fn returns one matrix.   network: (layers, kind) of kernel_fn,
    if fast/fc.cpp may compute it where it can.
    """
    symmetric = x2 is None
    x2 = x1 if symmetric else x2
    native = on_host() and network and fc and fc.network(*network)
    return Lazy(empty(len(x1), len(x2), tile, symmetric, team), kernel_fn, x1, x2, devices, quiet, native or None)


ROOM = 2**28  # bytes of inputs that are kept as fc.cpp reads them
HALF = 1.25e9  # entries/s at which half of a matrix takes as long as K v with ten columns in float64 on two cores


def on_host():
    """Whether the host multiplies: where the devices are its own cores."""
    return jax.default_backend() == "cpu"


@dataclass(frozen=True)
class Lazy:
    """What `matrix` makes; methods as in tiles.TiledMatrix."""
    form: TiledMatrix  # gives shape, tiling and team; it holds no tile
    kernel_fn: object
    x1: object
    x2: object
    devices: object
    quiet: bool
    native: object = None  # fast/fc.py's Network

    shape = property(lambda self: self.form.shape)
    team = property(lambda self: self.form.team)
    entries = property(lambda self: self.form.entries)
    reads_all, found = False, None  # as in TiledMatrix: a few columns cost only themselves

    @property
    def slowness(self):
        """As in TiledMatrix, from the time of a tile: 4 for fc with 64 components on a CPU, a million for myrtle10."""
        keys, seconds = [(0, 0)] * len(self.devices or jax.local_devices()), []
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            if self.native:
                self._on_host(np.zeros((self.shape[1], 10)), keys)
            else:
                list(tiles.computed(self.kernel_fn, [(0, self.x1), (1, self.x2)], self.form.sides, keys, self.devices))
            seconds.append(time.perf_counter() - start)
        rate = len(keys) * self.form.sides[0] * self.form.sides[1] / seconds[1]
        rate = self.team.all_reduce(np.array([rate]))[0] / self.team.count  # all must choose the same rank
        return 2 + HALF / rate

    def leading(self, n):
        """The first n columns, and of a symmetric matrix the first n rows."""
        return replace(self, form=self.form.leading(n))

    def merged(self):
        """The matrix itself: its tiles already have the size that suits the devices."""
        return self

    def read_rate(self):
        """None: no tile is read."""

    def diagonal(self):
        """K[i, i], (n,) float64, of a symmetric matrix. Cost: n b entries."""
        return tiles.diagonal(self.kernel_fn, self.x1[np.arange(self.shape[0])], min(64, self.form.sides[0]), self.devices,
                              self.team)

    def columns(self, indices, own=False):
        """K[:, indices], as of tiles.TiledMatrix; with `own` each process computes its rows itself."""
        rows, team = np.arange(self.shape[0])[self.form.team.index::self.form.team.count], self.form.team
        out = np.zeros((len(rows), len(indices)), np.float32 if own else np.float64)
        side = max(1, min(self.form.sides[0], len(rows)))
        inputs = [(0, self.x1[rows]), (1, self.x2[np.asarray(indices)])]
        keys = [(i, 0) for i in range(-(-len(rows) // side))]
        for (i, _), (part,) in self._tiles(self.kernel_fn, inputs, keys, (side, len(indices))):
            out[i * side:(i + 1) * side] = part[:len(rows) - i * side]
        if own:
            return self._finite(out)
        whole = np.zeros((self.shape[0], len(indices)))
        whole[rows] = out
        return self._finite(team.all_reduce(whole))

    def rows(self, start, stop):
        """K[start:stop], (stop - start, m) float64."""
        side, team = self.form.sides[1], self.form.team
        out = np.zeros((stop - start, self.shape[1]))
        keys = [(0, j) for j in range(team.index, -(-self.shape[1] // side), team.count)]
        inputs = [(0, self.x1[np.arange(start, stop)]), (1, self.x2)]
        for (_, j), (part,) in self._tiles(self.kernel_fn, inputs, keys, (stop - start, side)):
            columns = slice(j * side, min(self.shape[1], (j + 1) * side))
            out[:, columns] = part[:, :columns.stop - columns.start]
        return self._finite(self.team.all_reduce(out))

    def matvec(self, v):
        """y = K v: (m, c) float64 -> (n, c) float64, on every device."""
        check_vectors(v, self.shape)
        if on_host():
            return self._finite(self.team.all_reduce(self._on_host(v, list(self.form.keys()))))
        v = np.pad(v, ((0, -len(v) % self.form.sides[1]), (0, 0)))  # zeros for the padded rows, so that they add nothing
        inputs = [(0, self.x1), (1, self.x2), (1, v)] + [(0, v)] * self.form.symmetric
        y = np.zeros((self.shape[0], v.shape[1]))
        with jax.enable_x64(True):
            for key, parts in self._tiles(_product(self.kernel_fn), inputs, list(self.form.keys())):
                if self.form.symmetric and key[0] == key[1]:  # both parts are K_ii v_i up to rounding
                    parts = [(parts[0] + parts[1]) / 2]
                for rows, part in zip(self.form.slices(key), parts):
                    y[rows] += part[:rows.stop - rows.start]
        return self._finite(self.team.all_reduce(y))

    def _on_host(self, v, keys):
        """K v of these tiles. On a CPU each device has a thread, which computes a tile and then multiplies it: faster
        than pmap and XLA's product in float64, for which a whole tile in float64 has to go through memory."""
        y, vT, fn = np.zeros((self.shape[0], v.shape[1])), np.ascontiguousarray(v.T), _jitted(self.kernel_fn)
        free, mine, lock, ready = [*(self.devices or jax.local_devices())], threading.local(), threading.Lock(), {}

        def placed(side, x, number):
            """Block `number` of x on this thread's device, which keeps the last one."""
            if mine.blocks.get(side, (None,))[0] != number:
                rows = np.arange(number * self.form.sides[side], (number + 1) * self.form.sides[side])
                with lock:
                    block = tiles.block(x, np.where(rows < self.shape[side], rows, 0), mine.device)
                mine.blocks[side] = number, jax.device_put(block, mine.device)
            return mine.blocks[side][1]

        def arranged(side, x, number):
            """Block `number` of x as fc.cpp reads it; all threads share these."""
            with lock:
                if (side, number) not in ready:
                    start, stop = number * self.form.sides[side], min((number + 1) * self.form.sides[side], self.shape[side])
                    block = np.asarray(tiles.block(x, np.arange(start, stop), mine.device)).reshape(stop - start, -1)
                    if len(ready) * block.nbytes > ROOM:
                        ready.clear()
                    ready[side, number] = (self.native.columns if side else self.native.rows)(block)
                return ready[side, number]

        def product(key):
            if not hasattr(mine, "device"):
                mine.device, mine.blocks = free.pop(), {}
            rows, cols = self.form.slices(key)
            both = self.form.symmetric and key[0] != key[1]
            if self.native:
                one, two = arranged(0, self.x1, key[0]), arranged(1, self.x2, key[1])
                return rows, cols, *self.native.product(one, two, vT[:, cols], v[rows] if both else None)
            tile = np.asarray(fn(placed(0, self.x1, key[0]), placed(1, self.x2, key[1])))
            tile = tile[:rows.stop - rows.start, :cols.stop - cols.start]
            if self.form.symmetric and not both:
                tile = np.triu(tile) + np.triu(tile, 1).T  # as it is kept in tiles.py
            return rows, cols, *tiles.multiplied(tile, vT[:, cols], vT[:, rows] if both else None)
        with tiles.one_thread(), ThreadPoolExecutor(len(free)) as pool, self._bar(pool.map(product, keys), len(keys)) as bar:
            for rows, cols, y_i, y_j in bar:
                y[rows] += y_i
                if y_j is not None:
                    y[cols] += y_j
        return y

    def _finite(self, out):
        """`out`, checked for NaN and infinity here because the tiles stay on the devices."""
        if not np.isfinite(out).all():
            raise ValueError(f"{np.sum(~np.isfinite(out))} of {out.size} numbers computed from the kernel's tiles are "
                             "not finite: look for NaN or infinity in the inputs")
        return out

    def _tiles(self, fn, inputs, keys, sides=None):
        return self._bar(tiles.computed(fn, inputs, sides or self.form.sides, keys, self.devices), len(keys))

    def _bar(self, results, number):
        return tqdm(results, total=number, unit=" tiles", desc="tiles", disable=self.quiet or None, leave=False)


@lru_cache(maxsize=8)
def _jitted(kernel_fn):
    return jax.jit(kernel_fn)


@lru_cache(maxsize=8)
def _product(kernel_fn):
    """The function that multiplies one tile K: K v_j, and K^T v_i if v_i is given too."""
    def product(a, b, v_j, v_i=None):
        K = kernel_fn(a, b).astype(jnp.float64)
        return K @ v_j if v_i is None else (K @ v_j, K.T @ v_i)
    return product
