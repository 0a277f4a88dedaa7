"""K v of a fully connected network on a CPU, for a kernel matrix that is kept nowhere: fc.cpp, called from Python.

XLA computes a tile, then NumPy multiplies it: both go through memory. fc.cpp does both while the tile is in the cache.

    net = fc.network(layers, kind)                               None where fc.cpp does not fit
    y_i, y_j = net.product(net.rows(x), net.columns(x2), v2.T, v)        K v2, and K^T v unless v is None

Proved by: fast/test_fc.py
"""

import ctypes
from functools import lru_cache
from typing import NamedTuple

import numpy as np

import kernel
from fast import cpu


class Block(NamedTuple):
    """Inputs as fc.cpp reads them: x, and sqrt(k(x, x) / 2) and 1 / sqrt(k(x, x)) before each relu, (layers, n)."""
    n: int
    x: np.ndarray
    std: np.ndarray
    inverse: np.ndarray


def network(layers, kind):
    """The Network of these layers, if they are flatten, several times dense and relu, and dense, kind is one kernel, and the
    C++ compiler works; else None."""
    hidden = (len(layers) - 2) // 2
    names = ["flatten", *["dense", "relu"] * hidden, "dense"]
    if kind not in kernel.KINDS or [one[0] for one in layers] != names or not hidden or not library():
        return None
    return Network(np.square([one[1:] for one in layers if one[0] == "dense"]), 1 + kernel.KINDS.index(kind))


@lru_cache(maxsize=1)
def library():
    """The functions of fc.cpp, or None."""
    return cpu.loaded("fc.cpp")


class Network(NamedTuple):
    """w_std^2 and b_std^2 of each dense layer, (layers + 1, 2); states: 1 for K, 2 for T."""
    w2_b2: np.ndarray
    states: int

    def _block(self, x, pad, arranged):
        x = np.asarray(x, np.float32)
        K, stds = np.einsum("nd,nd->n", x, x, dtype=np.float64) / x.shape[1], []
        for w2, b2 in self.w2_b2[:-1]:
            K = w2 * K + b2
            stds.append(np.sqrt(np.pad(K, (0, pad))))
            K = K / 2
        stds = np.array(stds)
        inverse = np.divide(1, stds, out=np.zeros_like(stds), where=stds > 0)
        return Block(len(x) + pad, arranged(x), (stds / 2**0.5).astype(np.float32), inverse.astype(np.float32))

    def rows(self, x):
        """The Block of inputs x (n, d) for the rows of K."""
        return self._block(x, 0, lambda x: np.ascontiguousarray(np.pad(x, ((0, library().rows_at_once()), (0, 0)))))

    def columns(self, x):
        """The Block of inputs x (n, d) for the columns of K: padded with zeros, in panels of a few columns."""
        width = library().panel_columns()
        pad = -len(x) % width
        return self._block(x, pad, lambda x: np.ascontiguousarray(
            np.pad(x, ((0, pad), (0, 0))).reshape(-1, width, x.shape[1]).swapaxes(1, 2)))

    def product(self, one, two, vT, v=None):
        """K v2, (n, c), and K^T v, (m, c), or None without v; float64.  one, two: Blocks of n rows and m columns of K.
        vT: v2^T, (c, m).   v: (n, c)."""
        (c, m), w2_b2 = vT.shape, np.ascontiguousarray(self.w2_b2.T, np.float32)
        right, y, yT = np.zeros((c, two.n)), np.zeros((one.n, c)), np.zeros((c, two.n))
        right[:, :m] = vT
        v = None if v is None else np.ascontiguousarray(v, np.float64)
        if two.n - m not in range(library().panel_columns()) or v is not None and v.shape != y.shape:
            raise ValueError(f"a tile of {one.n} x {two.n} with panels: v is {v if v is None else v.shape}, vT {vT.shape}")
        library().product(
            self.states, ctypes.c_long(one.x.shape[1]), ctypes.c_long(len(one.std)), *map(_pointer, w2_b2), ctypes.c_long(c),
            ctypes.c_long(one.n), *map(_pointer, (one.x, one.std, one.inverse, v, y)),
            ctypes.c_long(two.n), *map(_pointer, (two.x, two.std, two.inverse, right, yT)))
        return y, None if v is None else yT[:, :m].T


def _pointer(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)
