"""Kernel entries a second of every network and kind, beside neural_tangents and the floor, on whatever JAX sees.

    python -m results.speed                            everything: half an hour on two cores, eight minutes on a GPU
    python -m results.speed --only myrtle10,cnn_vec    these networks, in this order

Each line goes to results/speed.jsonl as soon as it is measured, the most important first; `python -m results.report` makes the
tables from it. A line is the median of --rounds calls after a first one, float32.

  here              as the program computes tiles: a block of n x n entries on each device at once (pmap)
  neural_tangents   one jitted block on one device, which has all cores; the batch with most entries a second

Images are 32 x 32 x 3 and normally distributed, sequences have 56 residues, molecules 16 atoms: neural_tangents pads nothing.
Floor: no processor makes more entries than its arithmetic allows. Its rate is taken from a matrix product of 4,096 x 4,096:
one multiply-add for each channel of fc or seq_fc, and INSTRUCTIONS for each element of a convolution and relu (cpu.cpp's, by
count; all go through the same units). On a GPU also no faster than it reads and writes each element once: a copy's rate.
Both are measured before every network and kind, and the tables use the best of a machine, or fc's own rate.

Proved by: results/test_results.py
"""

import argparse
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import experiment
import kernel
import tiles
from fast import fused
from proteins import layers as sequence_layers

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "speed.jsonl")
INSTRUCTIONS = {"nngp": 32, "ntk": 47}
LENGTH, ATOMS = 56, 16
# side of a block here, on a CPU and on a GPU; batches of neural_tangents, likewise
SIDES = {"myrtle10": ((48, 256), ((1, 2, 4), (8, 12, 16))), "cnn_vec": ((1024, 2048), ((64, 128, 256), (256, 512))),
         "fc": ((4000, 16384), ((1000, 4000), (4096, 16384))), "myrtle5": ((48, 256), ((1, 2, 4), (8, 12, 16))),
         "gcn": ((1024, 1024), ((4, 8, 16, 32), (64, 128))), "seq_cnn": ((1024, 4096), ((64, 128), (256, 512))),
         "seq_cnn_gap": ((64, 512), ((16, 32), (64, 128))), "seq_fc": ((2048, 8192), ((512, 1024, 2048), (4096, 8192))),
         "cnn_gap": ((32, 128), ((1, 2, 4), (4, 8))), "myrtle7": ((48, 256), ((1, 2, 4), (8, 12, 16)))}


def inputs(name, n, small=False):
    """Two sets of n inputs, twice the same for gcn."""
    rng = np.random.default_rng(0)
    if name == "gcn":
        from molecules import smiles
        mols = [mol for mol in smiles.load("nci").mols if mol.GetNumAtoms() == ATOMS]
        x = smiles.graphs((mols * (1 + n // len(mols)))[:n])
        return x, x
    if name in sequence_layers.SEQUENCES:
        return np.eye(20, dtype=np.float32)[rng.integers(0, 20, (2, n, 4 if small else LENGTH))]
    return rng.normal(size=(2, n, *((8, 8) if small else (32, 32)), 3)).astype(np.float32)


def floor(name, kind, flops, copy):
    """Entries/s that the machine's arithmetic, and on a GPU its memory, allow at most; None for gcn, which computes alike
    atoms once.  flops: of a matrix product.  copy: bytes/s read and written by a copy, None on a CPU."""
    if name == "gcn":
        return None
    if name in ("fc", "seq_fc"):
        return flops / (2 * (20 * LENGTH if name == "seq_fc" else 3072))
    h, w, elements = LENGTH if name.startswith("seq") else 32, 1 if name.startswith("seq") else 32, 0
    network = kernel.network(name)
    flat = any(layer[0].endswith("flatten") for layer in network)
    for layer in network:
        h, w = (h // 2, w // 2) if layer[0] == "pool" else (h, w)
        elements += layer[0].startswith("conv") * (h * w) ** (1 if flat else 2)
    allowed = [flops / 2 / (INSTRUCTIONS[kind] * elements)]
    return min(allowed + ([copy / (8 * (1 + (kind == "ntk")) * elements)] if copy else []))


def median(call, rounds):
    """Seconds of a call: the median after a first one, which compiles."""
    taken = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def processor():
    """The name of the device: of a CPU, that of its kind."""
    kind = jax.local_devices()[0].device_kind
    if kind == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            text = file.read()
        names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
        return (names[0] if names else kind) + (" with AVX-512" if " avx512f " in text else "")
    return kind


def everywhere(x):
    """A copy of x on each device."""
    return jax.pmap(lambda x: x)(np.stack([x] * jax.local_device_count()))


def machine(rounds, n=4096):
    """(FLOP/s of a matrix product in float32, bytes/s of a copy or None on a CPU) of all devices."""
    devices, x = jax.local_device_count(), everywhere(np.ones((n, n), np.float32))
    product = jax.pmap(lambda x: jnp.matmul(x, x, precision="highest"))
    flops = 2 * n**3 * devices / median(lambda: product(x).block_until_ready(), rounds)
    if jax.default_backend() == "cpu":
        return flops, None
    copy = jax.pmap(lambda x: x + 1)
    return flops, 8 * n**2 * devices / median(lambda: copy(x).block_until_ready(), rounds)


def ours(name, kind, n, small=False):
    """(call, entries of a call) of this repository."""
    devices, (x1, x2) = jax.local_devices(), inputs(name, n, small)
    if name == "gcn":  # its tiles are put together on the host
        from molecules import graphs
        from molecules.layers import gcn
        fn = graphs.kernel_fn(gcn(x1.degree, 3), kind)
        return lambda: tiles.cross(fn, x1, x2, -(-n // len(devices)), devices, quiet=True), n * n
    x1, x2 = everywhere(x1), everywhere(x2)
    fn = jax.pmap(fused.kernel_fn(name, kind))
    return lambda: fn(x1, x2).block_until_ready(), len(devices) * n * n


def theirs(name, kind, n, small=False):
    """(call, entries of a call) of neural_tangents."""
    x1, x2 = inputs(name, n, small)
    network = name
    if name == "gcn":
        from molecules.layers import gcn
        network, x1, x2 = gcn(x1.degree, 3), x1[np.arange(n)], x2[np.arange(n)]
    fn = kernel.reference_fn(network, kind)
    return lambda: fn(x1, x2).block_until_ready(), n * n


def main(argv=None):
    """Measure, and append a line for each network, kind and engine to --out.  Returns the lines."""
    parser = argparse.ArgumentParser(description="Kernel entries a second, beside neural_tangents and the floor.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", default=",".join(SIDES), metavar="NETWORK,...", help="these networks, in this order")
    parser.add_argument("--rounds", type=int, default=3, help="calls, of which the median counts")
    parser.add_argument("--small", action="store_true", help="tiny blocks of small inputs, which measure nothing")
    parser.add_argument("--out", default=PATH, metavar="FILE", help="where the lines go")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if set(names) - set(SIDES):
        parser.error(f"--only {args.only}: expected some of {', '.join(SIDES)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    experiment.check_file(parser, args.out)
    about, lines, gpu = experiment.provenance(), [], jax.default_backend() != "cpu"
    for name in names:
        for kind in ("ntk", "nngp"):
            sides = SIDES[name][0][gpu], *SIDES[name][1][gpu]
            flops, copy = machine(args.rounds, 64 if args.small else 4096)  # anew: the speed of a machine varies
            for engine, call, batches in (("here", ours, sides[:1]), ("neural_tangents", theirs, sides[1:])):
                tried = {}
                for n in (2,) if args.small else batches:
                    run, entries = call(name, kind, n, args.small)
                    tried[entries / median(run, args.rounds)] = n
                rate = max(tried)
                compiler = fused.compiler(name) if engine == "here" and name != "gcn" else "XLA"
                lines.append({"network": name, "kind": kind, "engine": engine, "compiler": compiler, "block": tried[rate],
                              "entries_per_second": rate, "floor": floor(name, kind, flops, copy), "flops": flops,
                              "copy": copy, "small": args.small, **about, "device": processor()})
                with open(args.out, "a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(f"{name} {kind} {engine}: {rate:,.3g} entries/s", flush=True)
    return lines


if __name__ == "__main__":
    tiles.use_cores()
    main()
