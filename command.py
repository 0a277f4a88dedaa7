"""What the three scripts have in common: flags to numbers, devices, kernel matrices, one-line errors.

    args = parser.parse_args(argv); command.check(parser, args, "devices", "rank")
    (K, K_test), = command.matrices(kernel_fn, ("nngp",), {"train": x, "test": x_test}, args.store, about, tile)
    if __name__ == "__main__": command.run(main, parse(None).devices)

Proved by: test_all.py, section train
"""

import os

import jax

import hosts
import kernel
import lazy
import regression
import store
import tiles


def check(parser, args, *positive):
    """Makes lists of args.ridge and args.sizes, n_train the largest size unless given; or the parser's error.

    ridge: "auto", or numbers separated by commas, none negative.   sizes: whole numbers, 1 to n_train; they get
    n_train too, and are sorted; [] where neither is given.   positive: names of flags that must be at least 1.
    tol, seed, kind and, where there is one, variance must be possible.
    """
    try:
        args.ridge = regression.RIDGES if args.ridge == "auto" else [float(r) for r in args.ridge.split(",")]
    except ValueError:
        parser.error(f"--ridge {args.ridge}: expected a number, numbers separated by commas, or auto")
    for ridge in args.ridge:
        if not 0 <= ridge < float("inf"):
            parser.error(f"--ridge {ridge}: expected numbers >= 0")
    try:
        sizes = [int(n) for n in args.sizes.split(",")] if args.sizes else []
    except ValueError:
        parser.error(f"--sizes {args.sizes}: expected whole numbers separated by commas")
    if not 0 < args.tol < 1:
        parser.error(f"--tol {args.tol}: expected a number between 0 and 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: expected a whole number >= 0")
    if args.kind != "nngp" and getattr(args, "variance", False):
        parser.error(f"--variance with --kind {args.kind}: the NTK is not the covariance of a process that the network "
                     "samples; use --kind nngp")
    for flag in ("n_train", *positive):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: expected at least 1")
    args.n_train = args.n_train or max(sizes, default=None)
    args.sizes = sorted({*sizes, *([args.n_train] if args.n_train else [])})
    if args.sizes and not 1 <= args.sizes[0] <= args.sizes[-1] <= args.n_train:
        parser.error(f"--sizes {sizes}: expected 1 to n_train={args.n_train}")


def tile_side(cpu, gpu, rows):
    """Side of a tile that takes a second or so, `cpu` or `gpu` by where this runs; a small problem still has ten."""
    return max(1, min(kernel.on({"cpu": cpu, "gpu": gpu}), -(-rows // 4)))


def devices(count):
    """The first `count` devices of this process, or all.  ValueError: there are fewer."""
    found = jax.local_devices()
    if count and len(found) < count:
        raise ValueError(f"--devices {count}, but JAX sees {len(found)} here: {found}")
    return found[:count]


def matrices(kernel_fn, kinds, inputs, folder, about, tile, **where):
    """For every kind (K of the first of `inputs`, for each other one its K with the first).

    kernel_fn: a kind, or a tuple of kinds in one pass -> kernel_fn(x1, x2).   inputs: {name: rows}.
    folder: of a store for each matrix, NAME-KIND; None: tiles stay in memory; "none": kept nowhere, computed in
    every product.   about: what decides a tile but kind and side, {name: value}.   where: devices, quiet, team.
    """
    first, *others = inputs
    x = inputs[first]
    if folder == "none":
        return [(lazy.matrix(fn, x, None, tile, **where),
                 *(lazy.matrix(fn, inputs[name], x, tile, **where) for name in others)) for fn in map(kernel_fn, kinds)]
    kept = dict.fromkeys(inputs)
    if folder:
        seen = {name: store.digests(rows) for name, rows in inputs.items()}
        process = where["team"].index if "team" in where else 0
        kept = {name: tuple(store.create(os.path.join(folder, f"{name}-{kind}"), {**about, "tile": tile, "kind": kind},
                                         seen[name], None if name == first else seen[first], process)
                            for kind in kinds) for name in inputs}
    fn = kernel_fn(kinds)
    return list(zip(tiles.gram(fn, x, tile, store=kept[first], **where),
                    *(tiles.cross(fn, inputs[name], x, tile, store=kept[name], **where) for name in others)))


def run(main, count):
    """main() with the machine set up: `count` devices, or every core, of a CPU; float32 products in full."""
    # Vectors of 512 bits where the processor has them (XLA prefers 256): fused.py is 1.4 times faster.
    os.environ["XLA_FLAGS"] = "--xla_cpu_prefer_vector_width=512 " + os.environ.get("XLA_FLAGS", "")
    jax.config.update("jax_num_cpu_devices", count or os.cpu_count())  # without a GPU
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU: float32, not TF32
    with hosts.guard(ValueError, OSError, MemoryError, ArithmeticError, ImportError):
        main()
