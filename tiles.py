"""Kernel matrices, tile by tile, on every device.

Every entry of K is independent of every other, so K is cut into tiles and each device of each process
computes whole tiles; no device talks to another. Where K is symmetric, tiles on and above the diagonal
only. What comes out is a matrix.TiledMatrix, or one for each kind.

  n, m  rows, columns   b  tile side   D  devices of a process   P  processes

Any n, b, D, P: the last tile of a row or column is computed at full size, with row 0 standing in
for the rows that do not exist (real data, so finite whatever the kernel), and cut to what does.

    K = tiles.gram(kernel.kernel_fn("fc", "nngp"), x_train);  K.matvec(v)

Cost: n (n + b) / (2 D P) entries a device.      Proved by: test_all.py, section tiles
"""

import math
import sys
import time
from dataclasses import replace
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from matrix import ALONE, TILE, check_memory, empty

MEET = 300  # seconds between two meetings while tiles are computed; a collective waits for half an hour


def gram(kernel_fn, x, tile=TILE, devices=None, quiet=False, store=None, team=ALONE):
    """K = kernel_fn(x, x), (n, n), symmetric to the last bit, as a TiledMatrix.

    kernel_fn: (b, ...), (b, ...) -> (b, b), traceable by JAX; the dtype it returns is stored. Where
    it returns a tuple of these, as with NNGP and NTK in one pass, so does this function.
    x: n inputs: an array, or anything with len(x) and, for an array of row numbers, x[rows]: an array, or what
    has on(device) to make one there, as augment.Images.
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
    K = empty(len(x1), len(x2), tile, symmetric, team)
    keys = list(K.keys())
    if store is None:
        check_memory(f"the {len(x1)} x {len(x2)} kernel", 4 * len(keys) * K.sides[0] * K.sides[1])
        blocks = [placed(x, np.zeros(1, int), jax.local_devices()[0]) for x in (x1, x2)]
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
                    K.put(key, result)
            bar.update(size)
            if team.count > 1 and time.monotonic() > met + MEET:
                team.all_reduce(np.ones(1))
                met = time.monotonic()
        while team.all_reduce(np.zeros(1))[0]:  # how many still compute
            pass
    return matrices if isinstance(store, tuple) else matrices[0]


def walk(fn, inputs, sides, keys, devices=None):
    """Yields (key, list of the arrays that fn returns) for every key, a key on each device at a time.

    inputs: [(0 or 1, rows), ...], what fn is called with: of `rows` the block with number key[0] or
    key[1], of sides[0] or sides[1] rows. Each device walks its own run of consecutive keys, so that a
    block is placed on it once for as long as it is needed. Keys are taken in squares, so large that the blocks of
    rows and columns of one fit in what x keeps (x.kept rows; an array is all there).
    """
    devices = jax.local_devices() if devices is None else devices
    group = min(max(1, getattr(x, "kept", sys.maxsize) // (2 * sides[side])) for side, x in inputs)
    keys = sorted(keys, key=lambda key: (key[1] // group, key[0] // group, key[1], key[0]))
    runs = np.array_split(np.array(keys, np.int64).reshape(-1, 2), len(devices))
    mesh = NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec("device"))
    mapped = _mapped(fn, tuple(devices))
    here = {}

    def blocks(which, step):
        """The blocks of one argument for one step, one on each device: (D, b, ...) in D shards."""
        side, x = inputs[which]
        for device, run in zip(devices, runs):
            index = run[min(step, len(run) - 1)][side] if len(run) else 0
            if here.get((which, device), (None,))[0] != index:
                rows = np.arange(index * sides[side], (index + 1) * sides[side])
                here[which, device] = index, placed(x, np.where(rows < len(x), rows, 0), device)[None]
        shards = [here[which, device][1] for device in devices]
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


def placed(x, rows, device):
    """The block x[rows] as an array on a device."""
    block = x[rows]
    return block.on(device) if hasattr(block, "on") else jax.device_put(np.asarray(block), device)


@lru_cache(maxsize=8)
def _mapped(fn, devices):
    """pmap, once: a new one would compile anew."""
    return jax.pmap(fn, devices=devices)


if __name__ == "__main__":
    import store

    try:
        sys.exit(min(1, sum(map(store.report, sys.argv[1:] or ["."]))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
