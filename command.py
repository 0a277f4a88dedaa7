"""What the three scripts have in common: flags to numbers, devices, kernel matrices, one-line errors.

    args = parser.parse_args(argv); command.numbers(parser, args, "devices", "rank")
    (K, K_test), = command.matrices(kernel_fn, ("nngp",), {"train": x, "test": x_test}, args.store, about, tile)
    if __name__ == "__main__": command.run(main, parse(None).devices)

Proved by: test_all.py, section train
"""

import os

import jax

import hosts
import lazy
import regression
import store
import tiles


def numbers(parser, args, *positive):
    """Makes lists of args.ridge and args.sizes, n_train the largest size unless given; or the parser's error.

    ridge: "auto", or numbers separated by commas, none negative.   sizes: whole numbers, 1 to n_train; they get
    n_train too, and are sorted; [] where neither is given.   positive: names of flags that must be at least 1.
    """
    try:
        args.ridge = regression.RIDGES if args.ridge == "auto" else [float(r) for r in args.ridge.split(",")]
    except ValueError:
        parser.error(f"--ridge {args.ridge}: expected a number, numbers separated by commas, or auto")
    if not min(args.ridge) >= 0:
        parser.error(f"--ridge {min(args.ridge)}: expected numbers >= 0")
    try:
        sizes = [int(n) for n in args.sizes.split(",")] if args.sizes else []
    except ValueError:
        parser.error(f"--sizes {args.sizes}: expected whole numbers separated by commas")
    for flag in ("n_train", *positive):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: expected at least 1")
    args.n_train = args.n_train or max(sizes, default=None)
    args.sizes = sorted({*sizes, *([args.n_train] if args.n_train else [])})
    if args.sizes and not 1 <= args.sizes[0] <= args.sizes[-1] <= args.n_train:
        parser.error(f"--sizes {sizes}: expected 1 to n_train={args.n_train}")


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
    x, *others = inputs.values()
    pairs = [(x, None), *((other, x) for other in others)]
    if folder == "none":
        return [tuple(lazy.matrix(fn, *pair, tile, **where) for pair in pairs) for fn in map(kernel_fn, kinds)]
    kept = [None] * len(pairs)
    if folder:
        first, *rest = map(store.digests, inputs.values())
        process = where["team"].index if "team" in where else 0
        sides = [[first], *([one, first] for one in rest)]
        kept = [tuple(store.create(os.path.join(folder, f"{name}-{kind}"), {**about, "tile": tile, "kind": kind},
                                   *of, process=process) for kind in kinds) for name, of in zip(inputs, sides)]
    fn = kernel_fn(kinds)
    return list(zip(tiles.gram(fn, x, tile, store=kept[0], **where),
                    *(tiles.cross(fn, other, x, tile, store=one, **where) for other, one in zip(others, kept[1:]))))


def run(main, count):
    """main() with the machine set up: `count` devices, or every core, of a CPU; float32 products in full."""
    # Vectors of 512 bits where the processor has them (XLA prefers 256): fused.py is 1.4 times faster.
    os.environ["XLA_FLAGS"] = "--xla_cpu_prefer_vector_width=512 " + os.environ.get("XLA_FLAGS", "")
    jax.config.update("jax_num_cpu_devices", count or os.cpu_count())  # without a GPU
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU: float32, not TF32
    with hosts.guard(ValueError, OSError, MemoryError, ArithmeticError, ImportError):
        main()
