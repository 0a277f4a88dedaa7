"""What 8 to 1,024 hosts would take, and where more of them stop helping: the program's work, simulated tile by tile.

One machine measures how long each piece of work takes. The simulation deals the pieces out as the program does, draws the
time of each tile from the times measured, and lets every host wait for whom it waits in the program:

  kernel  Every host reads and hashes all images and fits the whitening. Tile t belongs to host t mod P. Each of its D devices
          takes a run of neighbouring tiles and whitens those blocks of images that the host has not kept; one thread writes
          the tiles while the devices compute the next (tiles.computed). Then all wait for the slowest host.
  step    of CG. A host multiplies its tiles, each thread taking the next when it is free (TiledMatrix.matvec), and all wait
          for the slowest; a true residual every CHECK steps is a product more. M^-1 reads n / P rows of F (pcg.LowRank).
          All of x, r, d, ... (n, c) is updated by every host. Sums over hosts: (n, c), (k, c) and (n, c) float64.
  sum     of B bytes in a ring:  call + copy B + 2 (P - 1) (latency + B / P / bandwidth)

  n  rows   b  tile side   P  hosts   D  devices of a host   c  classes   k  rank of the preconditioner, F (n, k)

Measured: all but the network, which is assumed, and with --rates the devices and the product. Hosts are alike and share
neither disk nor network; if one is slower by a tenth, all are. Left out: building the preconditioner, test rows, failures.

    python -m large.simulate --store DIR --plot hosts.svg        a minute; DIR is on the disk to measure
    python -m large.simulate --rates 1e9 2e10 8                  8 devices a host, 1e9 entries/s each; 2e10 bytes/s in K v

Proved by: large/test_large.py
"""

import heapq
from collections import OrderedDict

import numpy as np

import data
import experiment
import pcg
from large import plan
from large.rates import measure

HOSTS = 8, 16, 32, 64, 128, 256, 512, 1024
NETWORKS = {"10 Gbit/s": (30e-6, 1.25e9), "100 Gbit/s": (30e-6, 1.25e10)}  # assumed: latency in seconds, bytes/s
DIVIDED = "tiles", "product", "M^-1"  # the work that hosts divide among themselves


def owned(n, tile, hosts):
    """[(rows i, columns j) of the tiles of each host], as TiledMatrix.keys."""
    rows = -(-n // tile)
    j = np.repeat(np.arange(rows), np.arange(1, rows + 1))
    i = np.arange(len(j)) - j * (j + 1) // 2
    return [(i[host::hosts], j[host::hosts]) for host in range(hosts)]


def computing(i, j, rates, rng):
    """Seconds in which one host computes and writes these tiles, and how many blocks it whitens: the loop of tiles.computed,
    with a clock for the main thread and one for each device."""
    group = max(1, rates.kept // 2)
    order = np.lexsort((i, j, i // group, j // group))
    runs = np.array_split(np.stack([i[order], j[order], np.arange(len(i))], 1), rates.devices)
    took, runs = rng.choice(rates.tile, len(i)).tolist(), [run.tolist() for run in runs]
    main, free, done, placed, made, whitened = 0.0, [0.0] * rates.devices, [], {}, OrderedDict(), 0
    for step in range(len(runs[0]) + 1):
        before, done = done, []
        started = [(device, run[step]) for device, run in enumerate(runs) if step < len(run)]
        for side in (0, 1):
            for device, key in started:
                block, free[device] = key[side], max(free[device], main)
                if placed.get((side, device)) != block:
                    placed[side, device] = block
                    if block not in made:
                        whitened, free[device] = whitened + 1, free[device] + rates.whiten
                    made[block] = True
                    made.move_to_end(block)
                    if len(made) > max(1, rates.kept):
                        made.popitem(last=False)
        for device, key in started:
            free[device] += took[key[2]]
            done.append(free[device])
        for end in before:  # the results of one step are fetched while the next one runs
            main = max(main, end) + rates.write
    return main, whitened


def multiplying(pieces, threads):
    """Seconds until threads have done pieces of work that take these seconds; a free thread takes the next."""
    free = [0.0] * threads
    for seconds in pieces:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def summed(size, hosts, rates):
    """Seconds of a sum over hosts of arrays of `size` bytes."""
    latency, bandwidth = rates.network
    return (hosts > 1) * (rates.call + size * rates.copy + 2 * (hosts - 1) * (latency + size / hosts / bandwidth))


def kernel_phase(n, tile, hosts, rates, rng):
    """{part: seconds} of the time until all hosts have their tiles of K."""
    shares = owned(n, tile, hosts)
    ends, whitened = zip(*(computing(i, j, rates, rng) for i, j in shares))
    number, devices = sum(len(i) for i, _ in shares), hosts * rates.devices
    parts = {"tiles": number * rates.tile.mean() / devices, "whitening": sum(whitened) * rates.whiten / devices}
    parts["disk"] = max(0.0, number * rates.write / hosts - sum(parts.values()))
    return {**parts, "waiting": max(ends) - sum(parts.values()), "loading": rates.load, "sums": summed(8, hosts, rates)}


def cg_step(n, tile, hosts, rates, rng, rank=plan.RANK, classes=data.CLASSES):
    """{part: seconds} of a step of CG."""
    sides = np.minimum(tile, n - tile * np.arange(-(-n // tile)))
    sizes = [4 * sides[i] * sides[j] for i, j in owned(n, tile, hosts)]
    ends = [multiplying((size * rng.choice(rates.product, len(size))).tolist(), rates.threads) for size in sizes]
    product = sum(map(np.sum, sizes)) * rates.product.mean() / rates.threads / hosts
    products, vectors = 1 + 1 / pcg.CHECK, summed(8 * n * classes, hosts, rates)
    return {"product": products * product, "waiting": products * (max(ends) - product), "vectors": rates.vectors,
            "M^-1": n * rank * rates.factor / hosts,
            "sums": (products + 1) * vectors + summed(8 * rank * classes, hosts, rates)}


def efficiency(parts):
    """The part of its time in which a host does work that the hosts divide."""
    return sum(parts.get(part, 0.0) for part in DIVIDED) / sum(parts.values())


def table(n, tile, rates, seed=0):
    """{hosts: {"kernel": its parts, name of a network: the parts of a step}}."""
    out = {}
    for hosts in HOSTS:
        rng = np.random.default_rng(seed)
        out[hosts] = {"kernel": kernel_phase(n, tile, hosts, rates, rng)}
        for name, network in NETWORKS.items():
            out[hosts][name] = cg_step(n, tile, hosts, rates._replace(network=network), rng)
    return out


def loss(parts):
    """What takes most of the rest, as text."""
    name = max(parts.keys() - {*DIVIDED}, key=parts.get)
    return f"{name} {parts[name] / sum(parts.values()):.0%}"


def draw(path, title, rows):
    """Draw time and efficiency against hosts."""
    from results import pictures
    figure = pictures.Figure(figsize=(8.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, name in zip(pictures.COLOURS, rows[HOSTS[0]]):
        parts, look = [of[name] for of in rows.values()], dict(color=colour, linewidth=1.3, marker="o", markersize=3.5)
        left.plot(HOSTS, [sum(of.values()) for of in parts], label=name if name == "kernel" else f"CG step, {name}", **look)
        right.plot(HOSTS, [100 * efficiency(of) for of in parts], **look)
    left.set(yscale="log", ylabel="seconds")
    left.legend(frameon=False, labelcolor=pictures.GREY, fontsize=9)
    right.set(ylim=(0, 105), ylabel="efficiency, %")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="hosts")
        axes.set_xticks(HOSTS, [f"{hosts:,}" for hosts in HOSTS], fontsize=8)
        axes.minorticks_off()
        axes.grid(color=pictures.GREY, alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, metadata={"Date": None}, transparent=True)


def main(argv=None):
    """Measure, simulate, print the table and draw the figure; returns what `table` returns."""
    parser = experiment.Parser(prog="python -m large.simulate",
                               description="Time and efficiency of the kernel and of a step of CG on 8 "
                               "to 1,024 hosts, for the NTK of fc")
    parser.add_argument("--n", type=int, default=5_000_000, help="rows of K")
    parser.add_argument("--tile", type=int, default=8192, help="side of a tile")
    parser.add_argument("--store", metavar="DIR", help="tiles lie on the disk of DIR, which is measured; else in memory")
    parser.add_argument("--rates", type=float, nargs=3, metavar=("ENTRIES", "BYTES", "DEVICES"), help="of another host: "
                        "kernel entries/s of a device, bytes/s of tiles in a product, devices")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw time and efficiency against hosts")
    args = parser.parse_args(argv)
    if min(args.n, args.tile, *(args.rates or ())) < 1:
        parser.error("--n, --tile and --rates: expected numbers that are at least 1")
    args.tile = min(args.tile, args.n)
    rates = measure(args.n, args.tile, args.store, given=args.rates)
    of = args.tile**2 / rates.tile.mean(), rates.tile.std() / rates.tile.mean(), rates.threads / rates.product.mean() / 1e9
    print(f"a device  {of[0]:,.0f} entries/s, sd of equal tiles {of[1]:.1%}; {args.tile:,} images whitened in "
          f"{plan.hours(rates.whiten)}\na host    {rates.devices} devices; {of[2]:.1f} GB/s of tiles multiplied, "
          f"{4 * args.tile**2 / rates.write / 1e9:.1f} written; images read and whitening fitted in {plan.hours(rates.load)}; "
          f"vectors of a step {plan.hours(rates.vectors)}\nnetworks  {', '.join(NETWORKS)}, and "
          f"{1e6 * max(NETWORKS.values())[0]:g} microseconds of latency: assumed\n")
    rows = table(args.n, args.tile, rates)
    names = list(rows[HOSTS[0]])
    print("| hosts |" + "".join(f" {name if name == 'kernel' else f'CG step, {name}'} | efficiency | largest loss |"
                                for name in names))
    print("| ---: |" + " ---: | ---: | --- |" * len(names))
    for hosts, of in rows.items():
        print(f"| {hosts:,} |" + "".join(f" {plan.hours(sum(parts.values()))} | {efficiency(parts):.0%} | {loss(parts)} |"
                                         for parts in of.values()), flush=True)
    if args.plot:
        from results import pictures
        pictures.style(draw)(args.plot, f"fc NTK, n = {args.n:,}, tiles of {args.tile:,}", rows)
    return rows


if __name__ == "__main__":
    with experiment.guard(ValueError, OSError, MemoryError):
        main()
