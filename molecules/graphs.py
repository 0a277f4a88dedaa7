"""The kernels of graph networks fast: what surrounds a node in the same way is computed once.

A pair of molecules is an array of 25 x 25 nodes or so: too small for a processor, and most of it has been computed
before. After l rounds a node has heard of its neighbours up to l steps away and of nothing else, so two nodes with
the same surroundings have the same row in K, in whatever molecules they are. Of the 104,000 atoms of 4,096 molecules
(ogbg-molhiv) 3,900, 24,000 and 45,000 differ up to one, two and three steps.

    bin: graphs a, b, c ...      classes 1         classes 2         classes 3          graphs
    their nodes, one list        of nodes that  <- each a sum of  <- each a sum of   <- each a sum of
                                 look alike        some of those     some of those      some of those

1. Graphs are laid one after the other into bins of NODES nodes, as many as fit. K of two bins is an array for each
   round: its rows are the classes of one bin, its columns those of the other.
2. Classes of round l + 1: nodes whose lists of (class of round l, weight) are the same, in any order. Sorted by a
   hash, equal lists are beside each other; neighbours in that order are compared bit by bit, so a collision can only
   make two classes of one.
3. A K A'^T is twice the same step: every row becomes the weighted sum of a few others, and the array is transposed.
   A pool is that step too: every graph is the sum of its nodes' classes. A row is contiguous, a column is not:
   picking columns takes 4 ns an element, transposing and then picking rows 2.
4. In blocks of SIDE x SIDE, which stay in a core's cache between their sum, their relu and their transpose.
5. Variances v are those of a graph with itself: in small bins of their own, once a node, not once a pair.
6. The first aggregate comes before any relu, so it acts on features: A <x, x'> A'^T = <A x, A' x'>.

  b  graphs, b1 of them rows of K   nodes  of a graph, with padding   f  features of a node   degree  neighbours
  listed of a node   N  nodes of a bin   lists  (numbers (rows, width) int32, weights (rows, width), lengths
  (rows,)): of which rows of an array every row of the next is the sum

    python -c "import graphs, kernel, numpy; print(graphs.kernel_fn(gcn(1), 'ntk')(numpy.ones((2, 3, 5))))"

Cost: for every pair of classes of a round a sum of FEW rows (1.0 ns on one core of an AMD EPYC, Zen 4), its transpose
(0.8), the next sum and its relu (1.2), and in the last round the pool (0.5); NTK: twice that and kappa0. In bins of
4,096 nodes of ogbg-molhiv 810, 2,100 and 2,800 classes: 540,000 entries a second of that core in tiles of 1,024
molecules, NNGP and NTK together 364,000; all nodes of all pairs in bins of 256, which stay in cache: 215,000 and
124,000. Where no two nodes are alike (features that are measured numbers) there is nothing to gain.
Proved by: molecules/test_molecules.py
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernel

NODES = 4096  # of a bin, at least; NNGP: two arrays of 64 MB, NTK: four
GRAPHS = 256  # of a bin, at most
OWN = {"cpu": 256, "gpu": 4096}  # nodes of a bin for variances, at least
SIDE = {"cpu": 256, "gpu": 4096}  # of a block; of NODES and OWN a divisor, of STRIPE a multiple
STRIPE = {"cpu": 16, "gpu": 4096}  # rows of it transposed at a time
FEW = 5  # rows summed in one pass: nearly all that a node of a molecule listens to, itself too


class Bin(NamedTuple):
    """What K needs of one bin, or of all of them, stacked."""
    features: jnp.ndarray  # (N, f), of the classes of the first round, after its aggregate
    lists: list  # of every other round, (N, degree)
    pools: list  # of every round that is pooled, else None, (GRAPHS, nodes)
    counts: jnp.ndarray  # (rounds,): how many of N rows are classes
    stds: jnp.ndarray  # (relus, N), of their classes


def parse(layers):
    """(degree, rounds, pool, tail) of a list of layers: of every round (its layers after the aggregate, whether it
    is pooled), and dense layers after the pool.  Raises ValueError where the list has another form."""
    names = [layer[0] for layer in layers]
    end = next((i for i, name in enumerate(names) if name in ("sum", "mean")), len(names) - 1)
    starts = [i for i, name in enumerate(names[:end]) if name == "aggregate"] + [end]
    rounds = [layers[start + 1:stop] for start, stop in zip(starts, starts[1:])]
    degrees = {layer[1] for layer in layers if layer[0] == "aggregate"}
    plain = [[layer for layer in one[:-1] + one[-1:] * (one[-1:] != [("jump",)])] for one in rounds]
    if (names[0] != "aggregate" or len(degrees) != 1 or set(names[end + 1:]) - {"dense"}
            or {layer[0] for one in plain for layer in one} - {"dense", "relu"} or rounds[-1][-1:] == [("jump",)]):
        raise ValueError(f"graphs.py takes rounds of aggregate, then dense and relu, perhaps jump, all of one degree, "
                         f"then sum or mean, then dense; this network is {names}: take kernel.kernel_fn")
    pooled = [len(one) < len(whole) for one, whole in zip(plain[:-1], rounds)] + [True]
    return degrees.pop(), list(zip(plain, pooled)), names[end], layers[end + 1:]


def packed(sizes, b1, N, nodes):
    """Graphs of these sizes, b1 of them and others, in bins of N rows: (bin (b,), first row in it (b,), where
    (bins, N): node of which row, or that which does not exist; bins of the first b1 graphs, of all)."""
    b = len(sizes)
    most = min(b, 2 * b * nodes // N + b // GRAPHS + 2) + 1  # two in a row hold N nodes, or GRAPHS

    def place(carry, graph):
        (bin, used, graphs), (size, apart) = carry, graph
        new = (used + size > N) | (graphs == GRAPHS) | apart
        bin, used, graphs = bin + new.astype(jnp.int32), jnp.where(new, 0, used), jnp.where(new, 0, graphs)
        return (bin, used + size, graphs + 1), (bin, used)
    _, (bin, offset) = lax.scan(place, (jnp.int32(0),) * 3, (sizes, jnp.arange(b) == b1))
    number = jnp.arange(nodes, dtype=jnp.int32)[None]
    row = jnp.arange(b, dtype=jnp.int32)[:, None] * nodes + number
    there = jnp.where(number < sizes[:, None], (bin * N + offset)[:, None] + number, most * N)
    where = jnp.full(most * N, b * nodes, jnp.int32).at[there].set(row, mode="drop")
    return bin, offset, where.reshape(most, N), (bin[b1 - 1] + 1, bin[-1] + 1)


def loop(count, body, start):
    """body(i, ... body(0, start)), i an int32 whatever JAX's default is."""
    return lax.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), body, start)


def last_true(condition):
    """One more than the place of the last True along the last axis, int32; 0 where there is none."""
    places = jnp.broadcast_to(jnp.arange(1, condition.shape[-1] + 1, dtype=jnp.int32), condition.shape)
    return jnp.max(places * condition.astype(jnp.int32), axis=-1)


def words(x):
    """The bits of x (N, w) as (N, w or 2 w) uint32."""
    return lax.bitcast_convert_type(x, jnp.uint32).reshape(len(x), -1)


def hashed(rows):
    """A number for each row (N, w) uint32: a sum over its words, each mixed with its place."""
    place = jnp.arange(rows.shape[1], dtype=jnp.uint32)[None] * np.uint32(0x9e3779b9)
    mixed = (rows ^ (rows >> 15)) * np.uint32(0x2c1b3c6d) + place
    mixed = (mixed ^ (mixed >> 12)) * np.uint32(0x297a2d39)
    return (mixed ^ (mixed >> 15)).sum(axis=1, dtype=jnp.uint32)


def classes(rows):
    """Rows (N, w) uint32 that are the same: (the class of each row, a row of each class, how many classes)."""
    order = jnp.argsort(hashed(rows))
    rows = rows[order]
    numbers = jnp.cumsum((rows != jnp.roll(rows, 1, axis=0)).any(axis=1).at[0].set(False), dtype=jnp.int32)
    zeros = jnp.zeros(len(rows), jnp.int32)
    return zeros.at[order].set(numbers), zeros.at[numbers].set(order.astype(jnp.int32)), numbers[-1] + 1


def refined(numbers, weights, group):
    """Nodes with these neighbours, of these classes: (lists of the next classes, and `classes` of them)."""
    numbers, weights = lax.sort((jnp.where(weights != 0, group[numbers], len(group)), weights), num_keys=2)
    group, found, count = classes(jnp.concatenate([words(numbers), words(weights)], axis=1))
    return as_lists(numbers[found], weights[found]), (group, found, count)


def as_lists(numbers, weights):
    """`lists`, of a width that FEW divides."""
    more = ((0, 0), (0, -weights.shape[1] % FEW))
    numbers, weights = jnp.pad(jnp.where(weights != 0, numbers, 0), more), jnp.pad(weights, more)
    return numbers, weights, last_true(weights != 0)


def summed(K, lists, r, s, shape):
    """The block of `shape` at (r, s) of: every row the weighted sum of rows of K."""
    numbers, weights, lengths = (lax.dynamic_slice_in_dim(z, r, shape[0]) for z in lists)
    one_row = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))

    def some(k):
        out = 0
        for d in range(FEW):
            number, weight = (lax.dynamic_slice_in_dim(z, k * FEW + d, 1, axis=1) for z in (numbers, weights))
            start = jnp.concatenate([number, jnp.full_like(number, s)], axis=1)
            out += weight * lax.gather(K, start, one_row, (1, shape[1]), mode="promise_in_bounds")
        return out
    return lax.fori_loop(jnp.int32(1), (jnp.max(lengths) + FEW - 1) // FEW, lambda k, out: out + some(k), some(0))


def sweep(targets, rows, columns, sides, block):
    """targets <- block(r, s, targets) for all r below `rows` and s below `columns`, in steps of sides."""
    rows, columns = (-(-n // side) for n, side in zip((rows, columns), sides))
    return loop(rows, lambda i, t: loop(columns, lambda j, t: block(i * sides[0], j * sides[1], t), t), targets)


def turned(target, block, r, s):
    """target <- block^T at (s, r)."""
    stripe = math.gcd(kernel.on(STRIPE), len(block))

    def step(i, target):
        part = lax.dynamic_slice_in_dim(block, i * stripe, stripe)
        return lax.dynamic_update_slice(target, part.T, (s, r + i * stripe))
    return loop(len(block) // stripe, step, target)


def walk(rounds, one, two, buffers, side):
    """K, and T where there are buffers for it, of two bins, pooled: (GRAPHS, GRAPHS) each, and the buffers.

    buffers: for K and perhaps T two (N, N).   side: of a block."""
    square, G = (side, side), GRAPHS
    few = math.gcd(G, kernel.on(STRIPE))  # graphs pooled at a time, in as many passes as the largest of them needs
    state, spare = ([pair[k] for pair in buffers] for k in (0, 1))
    pools, relus = [], 0
    for l, (layers, pooled) in enumerate(rounds):
        counts = one.counts[l], two.counts[l]
        if l:  # (A K A'^T)^T: rows are the classes of `one`, then those of `two`
            before = two.counts[l - 1]

            def across(r, s, targets):
                return [turned(t, summed(K, one.lists[l - 1], r, s, square), r, s) for t, K in zip(targets, state)]
            spare = sweep(spare, counts[0], before, square, across)
            one, two, counts = two, one, counts[::-1]

        def after(r, s, targets):
            if l:
                new = [summed(K, one.lists[l - 1], r, s, square) for K in spare]
            else:
                f1, f2 = (lax.dynamic_slice_in_dim(bin.features, at, side) for bin, at in ((one, r), (two, s)))
                new = [jnp.matmul(f1, f2.T, precision="highest") / f1.shape[1]]
            K, T = new if len(new) > 1 else (new[0], jnp.zeros_like(new[0]))
            k = relus
            for layer in layers:
                if layer[0] == "relu":
                    K, T = kernel.after(layer, K, T, *(lax.dynamic_slice_in_dim(bin.stds[k], at, side)
                                                       for bin, at in ((one, r), (two, s))))
                    k += 1
                else:
                    K, T = kernel.after(layer, K, T)
            return [lax.dynamic_update_slice(t, k, (r, s)) for t, k in zip(targets, (K, T))]
        state = sweep(state, *counts, square, after)
        relus += sum(layer[0] == "relu" for layer in layers)
        if pooled:
            def graphs(K):
                def across(r, s, half):
                    return turned(half, summed(K, one.pools[l], r, s, (few, side)), r, s)
                half = sweep(jnp.zeros((len(K), G), K.dtype), G, counts[1], (few, side), across)

                def down(r, s, out):
                    return lax.dynamic_update_slice(out, summed(half, two.pools[l], r, s, (few, G)), (r, s))
                out = sweep(jnp.zeros((G, G), K.dtype), G, G, (few, G), down)
                return out if l % 2 else out.T
            pools.append([graphs(K) for K in state])
    return [sum(of) for of in zip(*pools)], list(zip(state, spare))


def own(rounds, features, lists, groups):
    """std before each relu of the nodes of one bin, (relus, N); arguments as in `bins`, for a small bin."""
    square, zero, stds = (len(features),) * 2, (jnp.int32(0),) * 2, []
    K = jnp.matmul(features, features.T, precision="highest") / features.shape[1]
    for l, (layers, _) in enumerate(rounds):
        for _ in range(2 * bool(l)):
            K = turned(jnp.zeros(square, K.dtype), summed(K, lists[l - 1], 0, 0, square), *zero)
        for layer in layers:
            if layer[0] == "relu":
                std = jnp.sqrt(jnp.maximum(jnp.diagonal(K), 0))
                stds.append(std[groups[l][0]])
                K, _ = kernel.after(layer, K, K, std, std)
            else:
                K, _ = kernel.after(layer, K, K)
    return jnp.stack(stds) if stds else jnp.zeros((0, len(K)), K.dtype)


def levels(nodes, degree, offset, rounds):
    """(features, lists, groups) of the nodes (N, f + 2 degree) of a bin: of the first round, of every other one, and
    `classes` of every one.   offset (N,): where each node's graph begins."""
    features, numbers, weights = jnp.split(nodes, nodes.shape[1] - np.array([2, 1]) * degree, axis=1)
    numbers = jnp.where(weights != 0, numbers.astype(jnp.int32) + offset[:, None], 0)
    group, found, _ = classes(words(features))
    features, lists, groups = features[found], [], []
    for _ in range(rounds):
        new, found = refined(numbers, weights, group)
        lists.append(new)
        groups.append(found)
        group = found[0]
    return summed(features, lists[0], 0, 0, features.shape), lists[1:], groups


def stack(make, count, most):
    """make(i) for i < count, stacked, with zeros up to `most`."""
    out = jax.tree.map(lambda z: jnp.zeros((most, *z.shape), z.dtype), jax.eval_shape(make, 0))
    return loop(count, lambda i, out: jax.tree.map(lambda o, z: o.at[i].set(z), out, make(i)), out)


def bins(x, b1, rounds, degree, pool, N, side):
    """(the `Bin`s of graphs x (b, nodes, width), stacked, first graph of each, bins of the first b1, of all)."""
    b, nodes, width = x.shape
    exists = (x != 0).any(axis=2)
    sizes = last_true(exists)
    flat = jnp.concatenate([x.reshape(b * nodes, width), jnp.zeros((1, width), x.dtype)])
    share = exists.astype(x.dtype)
    share = share / share.sum(axis=1, keepdims=True) if pool == "mean" else share

    def of(where, offset):
        """`levels` of a bin."""
        graph = jnp.minimum(where // nodes, b - 1)
        return levels(flat[where], degree, offset[graph], len(rounds))

    small = -(-max(kernel.on(OWN), nodes) // 16) * 16
    bin, offset, where, (_, count) = packed(sizes, b1, small, nodes)
    stds = stack(lambda i: own(rounds, *of(where[i], offset)), count, len(where))
    stds = jnp.moveaxis(stds, 1, 0).reshape(stds.shape[1], -1)
    number = jnp.arange(nodes, dtype=jnp.int32)[None]
    stds = stds[:, jnp.minimum((bin * small + offset)[:, None] + number, stds.shape[1] - 1).ravel()]
    stds = jnp.concatenate([stds, jnp.zeros((len(stds), 1), x.dtype)], axis=1)  # of a node, as in `flat`

    bin, offset, where, (count1, count) = packed(sizes, b1, N, nodes)
    starts = jnp.full(len(where), b, jnp.int32).at[bin].min(jnp.arange(b, dtype=jnp.int32))

    def make(i):
        features, lists, groups = of(where[i], offset)
        graph = starts[i] + jnp.arange(GRAPHS, dtype=jnp.int32)
        here = (graph < b) & (bin[jnp.minimum(graph, b - 1)] == i)
        graph = jnp.minimum(graph, b - 1)
        place = jnp.minimum(offset[graph][:, None] + number, N - 1)
        pools = [as_lists(group[place], jnp.where(here[:, None], share[graph], 0)) if pooled else None
                 for (group, _, _), (_, pooled) in zip(groups, rounds)]
        found = [groups[l][1] for l, (layers, _) in enumerate(rounds) for layer in layers if layer[0] == "relu"]
        mine = [stds[k][where[i][rows]] for k, rows in enumerate(found)]
        mine = jnp.stack(mine) if mine else jnp.zeros((0, N), x.dtype)
        return Bin(features, lists, pools, jnp.stack([count for *_, count in groups]), mine)
    return stack(make, count, len(where)), starts, count1, count


def pairs(x, b1, rounds, degree, pool, tangent):
    """K, and T if `tangent`, of the first b1 graphs of x with the others, after the pool."""
    b, nodes, _ = x.shape
    side = min(kernel.on(SIDE), -(-b * nodes // 16) * 16)
    N = -(-max(nodes, min(NODES, b * nodes)) // side) * side
    everything, starts, count1, count = bins(x, b1, rounds, degree, pool, N, side)

    def row(i, carry):
        def column(j, carry):
            out, buffers = carry
            new, buffers = walk(rounds, *(jax.tree.map(lambda z: z[k], everything) for k in (i, j)), buffers, side)
            place = starts[i], starts[j] - b1  # beyond the graphs of these bins the next ones overwrite it
            return [lax.dynamic_update_slice(o, k, place) for o, k in zip(out, new)], buffers
        return lax.fori_loop(count1, count, column, carry)
    out = [jnp.zeros((b1 + GRAPHS, b - b1 + GRAPHS), x.dtype)] * (1 + tangent)
    out, _ = loop(count1, row, (out, [(jnp.zeros((N, N), x.dtype),) * 2] * len(out)))
    return [z[:b1, :b - b1] for z in out]


def kernel_fn(name, kind, **options):
    """`kernel.kernel_fn` of a graph network, fast: same arguments, results and errors.

    name: a list of layers, as gcn(degree, ...) returns.
    Raises ValueError also for a list of another form than rounds of aggregate, dense and relu in any number, perhaps
    jump; then sum or mean, then dense. Runs on one device, `tiles.gram` on all of them.
    """
    layers = kernel.network(name, **options)
    degree, rounds, pool, tail = parse(layers)
    kernel.chosen(kind, None, None)
    tangent = kind not in ("nngp", ("nngp",))

    @jax.jit
    def fn(x1, x2=None):
        if x2 is None:
            return jax.tree.map(lambda K: jnp.triu(K) + jnp.triu(K, 1).T, fn(x1, x1))
        x1, x2 = (x[:, :, 0] for x in kernel.as_pair(layers, x1, x2))
        K, T = (pairs(jnp.concatenate([x1, x2]), len(x1), rounds, degree, pool, tangent) * 2)[:2]
        for layer in tail:
            K, T = kernel.after(layer, K, T)
        return kernel.chosen(kind, K, T)
    return fn
