"""Predicts the entries, bytes and hours of a run before it starts, from speeds measured on this machine.

Four things are measured: the kernel for about a second on random images of the data set's shape; a product of two float64
matrices; products with tiles in memory, or those of fast/fc.cpp, which keep none; and with --store products with tiles on its
disk, in a folder that is removed afterwards. The rest is arithmetic. Left out: reading the images.

  n  rows of K, copies included   m  test rows   b  tile side   c  classes   r  rank
  P  hosts   D  devices of a host; all are assumed to be as fast as those of this machine

    python train_cifar.py --plan --dataset cifar5m --n_train 5000000 --kernel fc --hosts 256 --devices 8

Proved by: large/test_large.py
"""

import math
import os
import tempfile
import time

import jax
import numpy as np

import augment
import choose
import data
import experiment
import kernel
import pcg
import tiles
import train_cifar
from large import on_the_fly, one_pass, store

STEPS = {"in memory": 25, "on disk": 15, "nowhere": 12}  # assumed, to 1e-6: a larger rank is chosen for dear products
RANK = 1500  # of the preconditioner, assumed; but pcg.MOST for LARGE rows kept nowhere, whose products are dear
LARGE = 100_000
SEARCH = 2  # solves that comparing ridges costs, after leave-one-out on the first rows
NETWORK = 1e9  # bytes/s assumed for the all-reduce between hosts, as of 10 Gbit/s Ethernet; many clusters are faster
EIGEN = 12  # n^3 operations of the eigenvectors of a matrix (n, n), if they were as fast as products


def rate(kernel_fn, shape, tile, devices):
    """Kernel entries/s of all `devices` together, with tiles of side `tile`, without compilation.

    Each device computes one tile, of side 2,048 at most, as many times as fit into a second, at least once.
    """
    tile = min(tile, 2048)
    x = np.random.default_rng(0).standard_normal((tile, *shape), np.float32)
    keys = [(0, 0)] * len(devices)

    def seconds(times):
        start = time.perf_counter()
        for _ in tiles.computed(kernel_fn, [(0, x), (1, x)], (tile, tile), keys * times, devices):
            pass
        return time.perf_counter() - start

    seconds(1)  # compiles
    once = seconds(1)
    times = max(1, int(1 / once))
    return len(keys) * times * tile**2 / (seconds(times) if times > 1 else once)


def rate_on_the_fly(kernel_fn, network, shape, tile, devices):
    """Entries/s of all `devices` together in a product K v with 10 columns that computes its tiles, by fast/fc.cpp; None where
    that does not fit the network."""
    x = np.random.default_rng(0).standard_normal((min(tile, 2048) * 2 * len(devices), *shape), np.float32)
    K = on_the_fly.matrix(kernel_fn, x, None, min(tile, 2048), devices, True, network=network)
    if not K.native:
        return None
    for _ in range(2):  # the second counts
        start = time.perf_counter()
        K.matvec(np.ones((len(x), data.CLASSES)))
    return K.entries / (time.perf_counter() - start)


def product_rate(kept, tile=1024, rows=11):
    """Bytes/s of tiles in a product K v with 10 columns, and when written to `kept`, {} or a store.Store: an array of two.
    K is symmetric, so that all of its 66 tiles but eleven are used twice, which takes 1.3 times as long."""
    K = tiles.TiledMatrix((rows * tile, rows * tile), (tile, tile), True, kept)
    block = np.random.default_rng(0).random((tile, tile), np.float32)
    start = time.perf_counter()
    for key in K.keys():
        kept[key] = block.copy()
    written = time.perf_counter()
    for _ in range(2):  # the second counts: threads and caches are warm, and tiles on disk are checked
        read = time.perf_counter()
        K.matvec(np.ones((K.shape[1], data.CLASSES)))
    return block.nbytes * rows * (rows + 1) // 2 / np.array([time.perf_counter() - read, written - start])


def disk_rates(folder):
    """`product_rate` of a store on the disk of `folder`, read past the page cache; (None, None) if it cannot be written."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            kept = store.create(place, {"tile": 1024}, np.zeros(1, "<u8"))
            kept.cached = set()
            return product_rate(kept)
    except OSError:  # no space or no permission
        return None, None


def operations(side=2048):
    """Operations/s of a product of two float64 matrices."""
    A = np.random.default_rng(0).random((side, side))
    A[:256] @ A
    start = time.perf_counter()
    A @ A
    return 2 * side**3 / (time.perf_counter() - start)


def estimate(n, m, tile, devices, hosts, rank, entries_rate, product, read=None, write=np.inf, pixels=3072, images=None,
             ridges=1, kinds=1, classes=data.CLASSES, kept="in memory", flops=np.inf, fit_on=0, width=None, tol=1e-6,
             base=0):
    """The plan as {name: number}. Seconds are wall-clock time, with all hosts at work; `bytes` is the sum over all hosts.

    entries_rate: entries/s of one device, for all kinds in one pass.   product, read: bytes/s of a host in K v, with tiles
    from memory and from disk.   write: bytes/s of a host to disk or memory.   kept: "in memory", "on disk" or "nowhere".
    flops: operations/s of a host in float64; twice as many in float32.   fit_on: images that a W (pixels, width) is fitted on;
    0: no W.   base: bytes of a process before it has read an image.
    """
    rows, test_rows, images, width = -(-n // tile), -(-m // tile), images or n, width or pixels
    square = tile * tile
    triangle, rectangle = rows * (rows + 1) // 2, test_rows * rows
    entries = (triangle + rectangle) * square
    size = 0 if kept == "nowhere" else 4 * kinds * entries / hosts
    out = {"entries": entries, "tiles": triangle + rectangle, "bytes": size * hosts, "bytes_a_host": size}
    computing = square / (entries_rate * devices * hosts)  # seconds per tile
    out["data_seconds"] = bool(fit_on) * (2 * fit_on * pixels**2 + EIGEN * pixels**3) / flops
    blocks = max(2, augment.KEPT // (4 * width * tile))  # whitened blocks that a host keeps: tiles in squares of so many / 2
    whitened = min(2.0, 4 * hosts / blocks) * out["tiles"] / hosts if rows > blocks else rows + test_rows
    whitening = bool(fit_on) * whitened * tile * pixels * width / flops
    if kept == "nowhere":
        out["kernel_seconds"], out["pass_bytes"] = 0.0, 0
        out["pass_seconds"] = triangle * computing + 4 * triangle * square / hosts / product + whitening
    else:
        out["kernel_seconds"] = out["tiles"] * computing + whitening + (size / write if kept == "in memory" else 0)
        out["kernel_seconds"] = max(out["kernel_seconds"], size / write)
        out["pass_bytes"] = 4 * triangle * square / hosts
        out["pass_seconds"] = out["pass_bytes"] / (read or product)
    out["reduce_bytes"] = 16 * n * classes if hosts > 1 else 0
    out["step_seconds"] = (out["pass_seconds"] + 4 * n * rank * classes / hosts / flops + 2 * out["reduce_bytes"] / NETWORK)
    looks = {"in memory": 0, "on disk": rank / pcg.at_a_time(n, 4 * pcg.BLOCK, hosts) * out["pass_seconds"],
             "nowhere": n * rank / square * computing}[kept]
    out["precondition_seconds"] = kinds * (6 * n * rank**2 / hosts / flops + looks)
    solve = STEPS[kept] * np.log(2 / tol) / np.log(2e6) * out["step_seconds"]
    first = min(n // 4, choose.DENSE) if n > choose.DENSE else n
    out["search_seconds"] = (ridges > 1) * kinds * (EIGEN * first**3 / flops + (n > choose.DENSE) * SEARCH * solve)
    predict = (kept == "nowhere") * rectangle * (computing + 4 * square / hosts / product)  # K_test alpha computes K_test
    out["solve_seconds"] = kinds * (solve + predict) + out["search_seconds"] + out["precondition_seconds"]
    out["device_bytes"] = 4 * (2 * square + 2 * tile * width)
    out["memory"] = memory(n, m, images, pixels, width, classes, rank, hosts, ridges, max(fit_on, images), bool(fit_on),
                           (size if kept == "in memory" else 0) + 2 * devices * 4 * square, base)
    out["host_bytes"] = max(out["memory"].values())
    return out


def memory(n, m, images, pixels, width, classes, rank, hosts, ridges, read, fits, kernel, base):
    """Bytes of a process in each phase, {phase: bytes}: images as bytes, some of them whitened, and what a phase works on."""
    standing = base + (images + m) * pixels + n * (25 + 8 * classes)
    kernel += standing + min(augment.KEPT, 4 * width * n)
    factor, vectors = 4 * n * rank / hosts, 10 * 8 * n * classes
    dense = min(n // 4, choose.DENSE) if n > choose.DENSE else n
    copied = min(read, 60_000)  # CIFAR-10's files are read, and then the rows are taken
    return {"data": base + (read + copied) * pixels + fits * 8 * 6 * pixels**2, "kernel": kernel,
            "preconditioner": kernel + factor + min(pcg.LOOK, 8 * n * pcg.BLOCK / hosts),
            "ridge": kernel + (ridges > 1) * max(factor + min(6 * vectors, max(one_pass.PASS, vectors)), 7 * 8 * dense**2),
            "solve": kernel + factor + vectors}


def main(args, kernel_fn, network, shape, n, m, pixels):
    """Prints the plan of a run with these flags and returns it as a dict; see `estimate`.

    args: flags of train_cifar.py, with sizes and tile filled in.   network: (layers, kind) of the kernel if fast/fc.cpp may
    compute it, else None.   shape: of what the kernel takes.   n, m: rows of K and K_test.   pixels: numbers in an image.
    """
    devices, tile = jax.local_devices()[:args.devices], min(args.tile, n)
    per_host, ridges = args.devices or len(devices), len(args.ridge)
    measured = args.rate * len(devices) if args.rate else rate(kernel_fn, shape, tile, devices)
    kept = {"none": "nowhere", None: "in memory"}.get(args.store, "on disk")
    base, fit_on = experiment.peak_memory(), args.fit_on if args.whiten in ("zca", "zca_unit") else 0
    flops, (product, write) = operations(), product_rate({})
    read, write = disk_rates(args.store) if kept == "on disk" else (None, write)
    kinds = kernel.KINDS if args.kind == "both" else (args.kind,)
    both = network and kept == "nowhere" and not args.rate and [  # each kind is a matrix of its own there
        rate_on_the_fly(kernel_fn, (network[0], kind), shape, tile, devices) for kind in kinds]
    both = both and all(both) and len(both) / sum(1 / one for one in both)
    measured, product = (both, np.inf) if both else (measured, product)
    rank = args.rank or (pcg.MOST if kept == "nowhere" and n >= LARGE else RANK)
    out = estimate(n, m, tile, per_host, args.hosts, rank, measured / len(devices),
                   product, read, write or np.inf, pixels, args.n_train, ridges,
                   len(kinds), args.classes, kept, flops,
                   fit_on, args.components, args.tol, base)
    out.update(entries_per_second=measured, product_bytes_per_second=product,
               read_bytes_per_second=read, write_bytes_per_second=write)
    total = out["data_seconds"] + out["kernel_seconds"] + out["solve_seconds"]
    disk = f", {read / 1e9:.1f} from disk, written at {write / 1e9:.1f}" if read else ""
    search = f", of it {hours(out['search_seconds'])} to choose one of {ridges} ridges" if ridges > 1 else ""
    print(f"{args.dataset} {args.kernel} {args.kind}: {n:,} rows ({args.n_train:,} images), "
          f"{m:,} test, {args.hosts} x {per_host} devices")
    for what, text in {
            "measured": (f"{args.rate:,.0f} entries/s a device assumed, " if args.rate else
                         f"{measured:,.0f} entries/s on {len(devices)} x {devices[0].device_kind}, ")
                        + (f"products of tiles included{disk}" if both else
                           f"{product / 1e9:.1f} GB/s of tiles multiplied from memory{disk}"),
            "data": f"{hours(out['data_seconds'])} to fit the whitening",
            "kernel": f"{out['entries']:.4g} entries in {out['tiles']:,} tiles of {tile:,}: "
                      + hours(out["kernel_seconds"]),
            "tiles": f"{amount(out['bytes'])} {kept}, {amount(out['bytes_a_host'])} a host",
            "memory": f"{amount(out['host_bytes'])} a host: "
                      + ", ".join(f"{phase} {amount(size)}" for phase, size in out["memory"].items())
                      + f"; {amount(out['device_bytes'])} a device, without what the kernel needs",
            "CG step": f"{hours(out['step_seconds'])}, of it {hours(out['pass_seconds'])} for "
                       f"{amount(out['pass_bytes'])} of tiles; {amount(out['reduce_bytes'])} summed over "
                       f"hosts (at {NETWORK / 1e9:g} GB/s)",
            "solve": f"{hours(out['solve_seconds'])}: {STEPS[kept]} steps to 1e-6 assumed{search}",
            "total": f"{hours(total)}, {hours(total * args.hosts)} of hosts"}.items():
        print(f"{what:10} {text}")
    if kept == "on disk" and not read:
        print(f"note       {args.store} cannot be written, so steps are counted at the speed of memory")
    if devices[0].platform != "cpu" and kept != "on disk":
        print("note       steps are counted at the speed of the host; GPUs, which multiply tiles here, are faster")
    if out["tiles"] > 1e6 and kept == "on disk":
        print(f"note       {out['tiles']:,} files: a larger --tile makes fewer, 8192 is 268 MB each")
    return {**out, "total_seconds": total}


def of_images(args):
    """`main` for a run of train_cifar.py: --plan."""
    experiment.compare(args, None)
    _, (shape, n_train, n_test, args.classes) = train_cifar.source(args)
    data.enough(args.fit_on, n_train, "fit_on", args.dataset)
    args.fit_on = min(args.fit_on or train_cifar.FIT_ON, n_train)
    train_cifar.views(args, 1, 1, shape[0] // 8)  # raises ValueError: more crops than there are
    data.enough(args.n_train, n_train, "n_train", args.dataset)
    data.enough(args.n_test, n_test, "n_test", args.dataset)
    n_train, n_test = args.n_train or n_train, args.n_test or n_test
    rows = n_train * args.crops * (2 if args.flips == "explicit" else 1)
    train_cifar.derive(args, (n_train, *shape), n_test, rows)
    kinds = kernel.KINDS if args.kind == "both" else (args.kind,)
    test_rows = n_test * (args.average or 1) * (2 if args.average and not args.flips else 1)
    pixels, seen, layers = math.prod(shape), (1, 1, args.components) if args.components else shape, train_cifar.layers(args)
    args.whiten = "channel" if args.by_default and pixels > train_cifar.LARGEST and not args.components else args.whiten
    network = (layers, args.kind) if args.engine == "fused" and args.flips != "symmetric" else None
    kernel_fn = train_cifar.network_kernel(args.engine, layers, args.flips, kinds)
    return main(args, kernel_fn, network, seen, rows, test_rows, pixels)


def hours(seconds):
    """A time as text, in seconds, minutes, hours or days, whichever unit is easiest to read."""
    for unit, size in (("days", 86400 * 2), ("hours", 3600), ("minutes", 120)):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'hours': 3600, 'minutes': 60}[unit]:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def amount(size):
    """A number of bytes as text."""
    for unit, unit_bytes in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= unit_bytes:
            return f"{size / unit_bytes:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
