"""Where the tiles of K are: in a folder, in the memory of GPUs, or nowhere.

    (K, K_test), = places.matrices(kernel_fn, ("nngp",), {"train": x, "test": x_test}, "store", {"layers": layers}, 1024)

Proved by: large/test_large.py
"""

import os

import tiles
from large import on_device, on_the_fly, store


def matrices(kernel_fn, kinds, inputs, folder, about, tile, **where):
    """What `experiment.matrices` returns, for a folder, "none", or on GPUs None; arguments as there."""
    first, *others = inputs
    x = inputs[first]
    if folder == "none":
        found = []
        for kind in kinds:
            network = (about["layers"], kind) if about.get("engine") == "fused" and "flips" not in about else None
            pair = ((x, None), *((inputs[name], x) for name in others))
            found.append(tuple(on_the_fly.matrix(kernel_fn(kind), *both, tile, network=network, **where) for both in pair))
        return found
    kept, fn = dict.fromkeys(inputs), kernel_fn(kinds)
    if folder:
        seen = {name: store.digests(rows) for name, rows in inputs.items()}
        process = where["team"].index if "team" in where else 0
        kept = {name: tuple(store.create(os.path.join(folder, f"{name}-{kind}"), {**about, "tile": tile, "kind": kind},
                                         seen[name], None if name == first else seen[first], process)
                            for kind in kinds) for name in inputs}
        square = tiles.gram(fn, x, tile, store=kept[first], **where)
    else:
        square = on_device.gram(fn, x, tile, kinds=len(kinds), **where)
    return list(zip(square, *(tiles.cross(fn, inputs[name], x, tile, store=kept[name], **where) for name in others)))
