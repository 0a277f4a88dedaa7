"""Predicts the entries, bytes and hours of a run before it starts, from speeds measured on this machine.

Three things are measured: the kernel for about a second on random images of the data set's shape; products with tiles in
memory; and with --store products with tiles on its disk, in a folder that is removed afterwards. The rest is arithmetic.

  n  rows of K, copies included   m  test rows   b  tile side   c  classes   r  rank
  P  hosts   D  devices of a host; all are assumed to be as fast as those of this machine

    python train_cifar.py --plan --dataset cifar5m --n_train 5000000 --kernel fc --hosts 256 --devices 8

Proved by: large/test_large.py
"""

import os
import tempfile
import time

import jax
import numpy as np

import data
import tiles
from large import store

STEPS, RANK = 100, 1000  # assumed for a solve and its preconditioner
SEARCH = 2.5  # solves: what comparing all ridges in one pass costs, at most; 37 products for 14 on fc, n = 10,000, 15 ridges
NETWORK = 1e9  # bytes/s assumed for the all-reduce between hosts, as of 10 Gbit/s Ethernet; many clusters are faster


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
            kept.direct = True
            return product_rate(kept)
    except OSError:  # no space or no permission
        return None, None


def estimate(n, m, tile, devices, hosts, rank, entries_rate, product, read=None, write=None,
             pixels=3072, images=None, ridges=1, kinds=1, classes=data.CLASSES, kept="in memory"):
    """The plan as {name: number}. Seconds are wall-clock time, with all hosts at work; `bytes` is the sum over all hosts.

    entries_rate: entries/s of one device, for all kinds in one pass.   product, read: bytes/s of a host in K v, with tiles
    from memory and from disk.   write: bytes/s of a host to disk.   kept: "in memory", "on disk" or "nowhere".
    """
    rows, test_rows = -(-n // tile), -(-m // tile)
    square = tile * tile
    triangle, rectangle = rows * (rows + 1) // 2, test_rows * rows
    entries = (triangle + rectangle) * square
    size = 0 if kept == "nowhere" else 4 * kinds * entries / hosts
    out = {"entries": entries, "tiles": triangle + rectangle, "bytes": size * hosts, "bytes_a_host": size}
    computing = square / (entries_rate * devices * hosts)  # seconds per tile
    if kept == "nowhere":
        out["kernel_seconds"], out["pass_bytes"] = 0.0, 0
        out["pass_seconds"] = triangle * computing
    else:
        out["kernel_seconds"] = max(out["tiles"] * computing, size / (write or np.inf))
        out["pass_bytes"] = 4 * triangle * square / hosts
        out["pass_seconds"] = out["pass_bytes"] / (read or product)
    out["reduce_bytes"] = 16 * n * classes if hosts > 1 else 0
    out["step_seconds"] = out["pass_seconds"] + 2 * out["reduce_bytes"] / NETWORK
    out["search_seconds"] = kinds * STEPS * out["step_seconds"] * (ridges > 1) * min(ridges / 2, SEARCH)
    out["solve_seconds"] = kinds * STEPS * out["step_seconds"] + out["search_seconds"]
    out["device_bytes"] = 4 * (2 * square + 2 * tile * pixels)
    out["host_bytes"] = (5 * (images or n) * pixels + 8 * n * (rank / hosts + 7 * classes)
                         + (size if kept == "in memory" else 0))
    return out


def main(args, kernel_fn, shape, n, m):
    """Prints the plan of a run with these flags and returns it as a dict; see `estimate`.

    args: flags of train_cifar.py, with sizes and tile filled in.   shape: of an image.   n, m: rows of K and K_test.
    """
    devices, tile = jax.local_devices()[:args.devices], min(args.tile, n)
    per_host, ridges = args.devices or len(devices), len(args.ridge)
    measured = args.rate * len(devices) if args.rate else rate(kernel_fn, shape, tile, devices)
    kept = {"none": "nowhere", None: "in memory"}.get(args.store, "on disk")
    product, _ = product_rate({})
    read, write = disk_rates(args.store) if kept == "on disk" else (None, None)
    out = estimate(n, m, tile, per_host, args.hosts, args.rank or RANK, measured / len(devices),
                   product, read, write, int(np.prod(shape)), args.n_train, ridges,
                   2 if args.kind == "both" else 1, args.classes, kept)
    out.update(entries_per_second=measured, product_bytes_per_second=product,
               read_bytes_per_second=read, write_bytes_per_second=write)
    total = out["kernel_seconds"] + out["solve_seconds"]
    disk = f", {read / 1e9:.1f} from disk, written at {write / 1e9:.1f}" if read else ""
    search = f", of it {hours(out['search_seconds'])} for {ridges} ridges in one pass" if ridges > 1 else ""
    print(f"{args.dataset} {args.kernel} {args.kind}: {n:,} rows ({args.n_train:,} images), "
          f"{m:,} test, {args.hosts} x {per_host} devices")
    for what, text in {
            "measured": (f"{args.rate:,.0f} entries/s a device assumed, " if args.rate else
                         f"{measured:,.0f} entries/s on {len(devices)} x {devices[0].device_kind}, ")
                        + f"{product / 1e9:.1f} GB/s of tiles multiplied from memory{disk}",
            "kernel": f"{out['entries']:.4g} entries in {out['tiles']:,} tiles of {tile:,}: "
                      + hours(out["kernel_seconds"]),
            "tiles": f"{amount(out['bytes'])} {kept}, {amount(out['bytes_a_host'])} a host",
            "memory": f"{amount(out['host_bytes'])} a host, {amount(out['device_bytes'])} a device, "
                      "without what the kernel needs",
            "CG step": f"{hours(out['step_seconds'])}, of it {hours(out['pass_seconds'])} for "
                       f"{amount(out['pass_bytes'])} of tiles; {amount(out['reduce_bytes'])} summed over "
                       f"hosts (at {NETWORK / 1e9:g} GB/s)",
            "solve": f"{hours(out['solve_seconds'])}: {STEPS} steps assumed{search}",
            "total": f"{hours(total)}, {hours(total * args.hosts)} of hosts"}.items():
        print(f"{what:10} {text}")
    if out["tiles"] > 1e6 and kept == "on disk":
        print(f"note       {out['tiles']:,} files: a larger --tile makes fewer, 8192 is 268 MB each")
    return {**out, "total_seconds": total}


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
