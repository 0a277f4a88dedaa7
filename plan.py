"""What a run will take, before it is begun: entries, bytes, hours, from a rate measured here.

The kernel is computed for a moment on random images of the data set's shape, a tile is multiplied, a
file is written to the disk and read back; the rest is arithmetic. Nothing else is touched.

  n  rows of K, copies included   m  test rows   b  tile side   c  classes   r  rank
  P  hosts   D  devices a host; every one is taken to be as fast as those here

    python train_cifar.py --plan --dataset cifar5m --n_train 5000000 --kernel fc --hosts 256 --devices 8

Proved by: test_all.py, section plan
"""

import os
import tempfile
import time

import jax
import numpy as np

import data
import tiles

STEPS = 100  # of a solve, for want of a better guess
NETWORK = 1e9  # bytes/s of the all-reduce between hosts: 10 Gbit/s Ethernet, faster elsewhere


def rate(kernel_fn, shape, tile, devices):
    """Kernel entries a second of all `devices` together, tiles of side b, compilation left out.

    A tile on each device, 2,048 on a side at most, as often as fits into a second, once at least.
    """
    tile = min(tile, 2048)
    x = np.random.default_rng(0).standard_normal((tile, *shape), np.float32)
    keys = [(0, 0)] * len(devices)

    def once(times):
        start = time.perf_counter()
        for _ in tiles.walk(kernel_fn, [(0, x), (1, x)], (tile, tile), keys * times, devices):
            pass
        return time.perf_counter() - start

    once(1)  # compiles
    seconds = once(1)
    times = max(1, int(1 / seconds))
    return len(keys) * times * tile**2 / (once(times) if times > 1 else seconds)


def product_rate(tile, classes):
    """Bytes of tiles a second in K v, on every core, from memory."""
    keys = 4 * os.cpu_count()
    tile = min(tile, 2048)
    K = tiles.TiledMatrix((tile, keys * tile), (tile, tile), False,
                          {(0, j): np.ones((tile, tile), np.float32) for j in range(keys)})
    v = np.ones((keys * tile, classes))
    K.matvec(v)
    start = time.perf_counter()
    K.matvec(v)
    return 4 * keys * tile**2 / (time.perf_counter() - start)


def disk_rates(folder, size=2**28):
    """Bytes a second written to `folder` and, out of the page cache, read back; or None, None."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    block = np.random.default_rng(0).bytes(size // 16)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.perf_counter()
            for _ in range(16):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            read = time.perf_counter()
            while file.read(size // 16):
                pass
            return size / (written - start), size / (time.perf_counter() - read)
    except (OSError, AttributeError):  # no room, no right, no such call: then it is not known
        return None, None


def estimate(n, m, tile, devices, hosts, rank, entries_rate, product, read=None, write=None,
             pixels=3072, images=None, ridges=1, classes=data.CLASSES, store=None):
    """The plan as {name: number}; bytes and seconds of each host, all hosts working at once.

    entries_rate: entries/s of one device.  product, read, write: bytes/s of a host.
    """
    rows, test_rows = -(-n // tile), -(-m // tile)
    square = tile * tile
    entries = rows * (rows + 1) // 2 * square + test_rows * rows * square
    size = 4 * entries / hosts
    out = {"entries": entries, "tiles": entries // square, "bytes": 4 * entries, "bytes_a_host": size}
    triangle = rows * (rows + 1) // 2 / (entries // square)  # what of them a product reads
    out["kernel_seconds"] = entries / (entries_rate * devices * hosts)
    out["pass_bytes"] = 0 if store == "none" else size * triangle
    if store == "none":
        out["pass_seconds"] = out["kernel_seconds"] * triangle
        out["kernel_seconds"] = 0.0
    else:
        out["pass_seconds"] = out["pass_bytes"] / min(product, read or product)
        out["kernel_seconds"] = max(out["kernel_seconds"], size / (write or np.inf))
    out["reduce_bytes"] = 8 * n * classes if hosts > 1 else 0
    out["step_seconds"] = out["pass_seconds"] + 2 * out["reduce_bytes"] / NETWORK
    out["solve_seconds"] = STEPS * out["step_seconds"] * (1 + (ridges if ridges > 1 else 0) / 2)
    out["device_bytes"] = 4 * (2 * square + 2 * tile * pixels)
    out["host_bytes"] = (5 * (images or n) * pixels + 8 * n * (2 * rank + 7 * classes)
                         + (0 if store else size))
    return out


def main(args, kernel_fn, shape, n):
    """Print the plan of a run with these flags and return it as a dict; see `estimate`.

    args: of train_cifar.py, sizes, tile and rank filled in.   shape: of an image.   n: rows of K.
    """
    devices, tile = jax.local_devices()[:args.devices], min(args.tile, n)
    per_host, ridges = args.devices or len(devices), len(args.ridge)
    measured = rate(kernel_fn, shape, tile, devices)
    product = product_rate(tile, data.CLASSES)
    write, read = disk_rates(args.store) if args.store not in (None, "none") else (None, None)
    out = estimate(n, args.n_test, tile, per_host, args.hosts, args.rank, measured / len(devices),
                   product, read, write, int(np.prod(shape)), args.n_train, ridges, store=args.store)
    out.update(entries_per_second=measured, product_bytes_per_second=product,
               read_bytes_per_second=read, write_bytes_per_second=write)
    total = out["kernel_seconds"] + out["solve_seconds"]
    kept = {"none": "nowhere", None: "in memory"}.get(args.store, "on disk")
    disk = f", disk written at {write / 1e9:.1f}, read at {read / 1e9:.1f} GB/s" if read else ""
    search = f", {ridges} ridges at half that each" if ridges > 1 else ""
    print(f"{args.dataset} {args.kernel} {args.kind}: {n:,} rows ({args.n_train:,} images), "
          f"{args.n_test:,} test, {args.hosts} x {per_host} devices")
    for what, text in {
            "measured": f"{measured:,.0f} entries/s on {len(devices)} x {devices[0].device_kind}, "
                        f"{product / 1e9:.1f} GB/s of tiles multiplied{disk}",
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
    if out["tiles"] > 1e6 and args.store not in (None, "none"):
        print(f"note       {out['tiles']:,} files: a larger --tile makes fewer, 8192 is 268 MB each")
    return {**out, "total_seconds": total}


def hours(seconds):
    """Seconds, minutes, hours or days, whichever is read most easily."""
    for unit, size in (("days", 86400 * 2), ("hours", 3600), ("minutes", 120)):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'hours': 3600, 'minutes': 60}[unit]:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def amount(size):
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
