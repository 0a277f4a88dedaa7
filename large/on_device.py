"""A kernel matrix in the memory of GPUs, multiplied where its tiles lie.

If tiles lay in the host's memory, its processor would multiply them, and the GPUs would idle while the solver works. Here each
tile goes to the device with the most room left. Tiles for which no device has room stay on the host, which multiplies them
while the devices multiply theirs. Results are those of tiles.py: tiles float32, sums float64.

    K = on_device.gram(kernel_fn, x_train);  K.matvec(v)

Cost: a product sends v and y, 8 n c bytes each, to and from every device, and reads each tile once; 4 n^2 / 2 bytes of memory.
Proved by: large/test_large.py, on CPU devices. Not run on GPUs yet.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import tiles
from tiles import ALONE, TILE, TiledMatrix

SHARE = 0.7  # of a device's free memory that tiles may take
STRIP = 1024  # rows of a tile that are converted to float64 at a time


class Tiles(dict):
    """{(i, j): tile}, each on the device with the most room, or on the host.  room: bytes of each device; None: of its free
    memory a SHARE."""

    def __init__(self, devices, room=None):
        self.room = {device: free(device) if room is None else room for device in devices}

    def __setitem__(self, key, tile):
        device = max(self.room, key=self.room.get)
        if self.room[device] >= tile.nbytes:
            self.room[device] -= tile.nbytes
            with jax.enable_x64(True):  # else JAX makes float32 of float64
                tile = jax.device_put(tile, device)
        super().__setitem__(key, tile)

    def __getitem__(self, key):
        tile = super().__getitem__(key)  # an array of a GPU would keep its copy on the host, so it is that of a copy
        return tile if isinstance(tile, np.ndarray) else np.asarray(jnp.copy(tile))


def free(device):
    """Bytes that tiles may take on a device."""
    about = device.memory_stats() or {}
    return SHARE * (about.get("bytes_limit", 0) - about.get("bytes_in_use", 0))


def gram(kernel_fn, x, tile=TILE, devices=None, quiet=False, team=ALONE, kinds=None, room=None):
    """kernel_fn(x, x), an OnDevices; arguments as of `tiles.gram`.   kinds: how many matrices kernel_fn returns as a tuple,
    or None, where it returns one.   room: of Tiles.   MemoryError: what the devices cannot take does not fit on the host.
    """
    devices = devices or jax.local_devices()
    places = tuple(Tiles(devices, room) for _ in range(kinds or 1))
    if room is None:
        for place in places:  # they share the devices
            place.room = {device: size / len(places) for device, size in place.room.items()}
    form = tiles.empty(len(x), len(x), tile, True, team)
    need = 4 * len(places) * sum(1 for _ in form.keys()) * form.sides[0]**2 - sum(sum(place.room.values()) for place in places)
    if need > 0:
        tiles.check_memory(f"what the devices have no room for of the {len(x)} x {len(x)} kernel", need)
    found = tiles.gram(kernel_fn, x, tile, devices, quiet, places if kinds else places[0], team)
    matrices = tuple(OnDevices(**vars(K)) for K in (found if kinds else (found,)))
    return matrices if kinds else matrices[0]


class OnDevices(TiledMatrix):
    """What `gram` makes; its `tiles` are Tiles."""

    def merged(self):
        """The matrix itself: larger tiles would have to lie on the host."""
        return self

    def matvec(self, v):
        """y = K v: (n, c) float64 -> (n, c) float64. Every device adds up its part of y, the host its own, and then all."""
        tiles.check_vectors(v, self.shape)
        n, side, c = self.shape[0], self.sides[0], v.shape[1]
        padded = np.zeros((-(-n // side) * side, c))  # zeros for the rows of tiles that reach beyond n
        padded[:n] = v
        with jax.enable_x64(True):
            vs = {device: jax.device_put(padded, device) for device in self.tiles.room}
            ys = {device: jax.device_put(np.zeros_like(padded), device) for device in self.tiles.room}
            here = []
            for key in self.keys():
                tile = dict.__getitem__(self.tiles, key)
                if isinstance(tile, np.ndarray):
                    here.append(key)
                    continue
                device, = tile.devices()
                ys[device] = _added(ys[device], tile, vs[device], key[0] * side, key[1] * side, key[0] != key[1])
            y, vT = np.zeros_like(v, np.float64), np.ascontiguousarray(v.T)
            for key in here:
                rows, cols, tile = self.cut(key)
                y_i, y_j = tiles.multiplied(tile, vT[:, cols], vT[:, rows] if key[0] != key[1] else None)
                y[rows] += y_i
                if y_j is not None:
                    y[cols] += y_j
            for part in ys.values():
                y += np.asarray(part)[:n]
        return self.team.all_reduce(y)


@partial(jax.jit, donate_argnums=0, static_argnames="both")
def _added(y, tile, v, i, j, both):
    """y with the products of a tile K that begins at row i and column j: K v_j, and if `both` K^T v_i. A strip of rows at a
    time is converted to float64: the whole tile would take twice its memory more."""
    (height, width), c = tile.shape, v.shape[1]
    v_j = jax.lax.dynamic_slice(v, (j, 0), (width, c))
    below = jnp.zeros((width, c))
    for start in range(0, height, STRIP):
        strip = tile[start:start + STRIP].astype(jnp.float64)
        at = i + start, 0
        y_i = jax.lax.dynamic_slice(y, at, (len(strip), c))
        y = jax.lax.dynamic_update_slice(y, y_i + strip @ v_j, at)
        if both:
            below += strip.T @ jax.lax.dynamic_slice(v, at, (len(strip), c))
    if both:
        y = jax.lax.dynamic_update_slice(y, jax.lax.dynamic_slice(y, (j, 0), (width, c)) + below, (j, 0))
    return y
