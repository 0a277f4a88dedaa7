"""The kernels of graph networks, fast: nodes with the same surroundings are computed once.

The kernel of two molecules is an array of about 25 x 25 nodes. That is too little work for a processor, and most of it was
done for other pairs already. After l rounds a node depends only on the nodes up to l steps away. So two nodes with the same
surroundings have the same row in K, even in different molecules. Of the 104,000 atoms of 4,096 molecules (ogbg-molhiv),
3,900, 24,000 and 45,000 are distinct up to one, two and three steps.

    bin: graphs a, b, c ...      classes 1         classes 2         classes 3          graphs
    all their nodes,             of identical   <- each a sum of  <- each a sum of   <- each a sum of
    in one list                  nodes             classes 1         classes 2          classes 3

1. Graphs are packed one after the other into bins of NODES nodes, as many as fit. For two bins, K is one array for each
   round: its rows are the classes of one bin, its columns the classes of the other.
2. Two nodes are in the same class of round l + 1 if they have the same list of (class of round l, weight), in any order.
   The lists are sorted by a hash, so that equal lists are adjacent. Adjacent lists are then compared bit by bit, so a
   collision can only split a class in two, which is slower but not wrong.
3. A K A'^T is one step done twice: replace every row by the weighted sum of a few rows, then transpose. A pool is the same
   step: a graph is the sum of the classes of its nodes. A row is contiguous and a column is not: gathering columns takes
   4 ns an element, transposing and then gathering rows takes 2 ns.
4. The arrays are computed in blocks of SIDE x SIDE, which stay in a core's cache between sum, relu and transpose.
5. The variances v are entries of the kernel of a graph with itself. They are computed in small bins of their own, once for
   each node instead of once for each pair.
6. The first aggregate comes before any relu, so it is applied to the features: A <x, x'> A'^T = <A x, A' x'>.

  b  graphs, the first b1 of them are rows of K     nodes  of a graph, with padding     f  features of a node
  degree  neighbours listed for a node     N  nodes of a bin
  lists  (numbers (rows, width) int32, weights (rows, width), lengths (rows,)): which rows of an array are summed, with
         which weights, to give each row of the next array

    python -c "import molecules.graphs as g, molecules.layers as l; print(g.kernel_fn(l.gcn(1), 'ntk')([[[1.0, 0, 1]]]))"

Cost for a pair of classes in a round: the sum of FEW rows (1.0 ns on one core of an AMD EPYC, Zen 4), its transpose (0.8),
the second sum and its relu (1.2), and in the last round the pool (0.5). The NTK takes twice that, and kappa0. A bin of 4,096
nodes of ogbg-molhiv has 810, 2,100 and 2,800 classes. In tiles of 1,024 molecules that core computes 540,000 entries a
second, or 364,000 for NNGP and NTK together. Without classes, in bins of 256 nodes, which stay in cache, it computes 215,000
and 124,000. If all nodes differ (real-valued features), classes save nothing.
Proved by: molecules/test_molecules.py
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernel

NODES = 4096  # least size of a bin; a bin takes two arrays of 64 MB for the NNGP, four for the NTK
GRAPHS = 256  # most graphs in a bin
SMALL = {"cpu": 256, "gpu": 4096}  # least size of the small bins for variances, in nodes
SIDE = {"cpu": 256, "gpu": 4096}  # side of a block; it divides NODES and SMALL, and is a multiple of STRIPE
STRIPE = {"cpu": 16, "gpu": 4096}  # rows of a block transposed at a time
FEW = 5  # rows summed in one pass: enough for nearly every atom, its neighbours and itself


class Bin(NamedTuple):
    """What the kernel needs to know of one bin, or of all bins, stacked."""
    features: jnp.ndarray  # (N, f), features of the classes of the first round, after its aggregate
    lists: list  # `lists` of each later round, (N, degree)
    pools: list  # `lists` of each round that is pooled, (GRAPHS, nodes); None for the others
    counts: jnp.ndarray  # (rounds,): how many of the N rows are classes
    stds: jnp.ndarray  # (relus, N), standard deviation of each class before each relu


def parse(layers):
    """(degree, rounds, pool, tail) of a list of layers; rounds: for each (its layers after the aggregate, whether it is
    pooled); tail: the dense layers after the pool.  ValueError: the list has another form."""
    names = [layer[0] for layer in layers]
    end = next((i for i, name in enumerate(names) if name in ("sum", "mean")), len(names) - 1)
    starts = [i for i, name in enumerate(names[:end]) if name == "aggregate"] + [end]
    rounds = [layers[start + 1:stop] for start, stop in zip(starts, starts[1:])]
    degrees = {layer[1] for layer in layers if layer[0] == "aggregate"}
    plain = [[layer for layer in part[:-1] + part[-1:] * (part[-1:] != [("jump",)])] for part in rounds]
    if (names[0] != "aggregate" or len(degrees) != 1 or set(names[end + 1:]) - {"dense"}
            or {layer[0] for part in plain for layer in part} - {"dense", "relu"} or rounds[-1][-1:] == [("jump",)]):
        raise ValueError(f"graphs.py takes rounds of aggregate, dense and relu, with or without jump, all of one degree, "
                         f"then sum or mean, then dense; this network is {names}: use kernel.kernel_fn")
    pooled = [len(part) < len(whole) for part, whole in zip(plain[:-1], rounds)] + [True]
    return degrees.pop(), list(zip(plain, pooled)), names[end], layers[end + 1:]


def packed(sizes, b1, N, nodes):
    """Packs graphs of these sizes into bins of N rows; graph b1 begins a new bin. Returns the bin of each graph (b,); its
    first row there (b,); where (bins, N): which node each row holds, b * nodes if none; (bins of the first b1, of all)."""
    b = len(sizes)
    most = min(b, 2 * b * nodes // N + b // GRAPHS + 2) + 1  # any two successive bins hold N nodes, or GRAPHS graphs

    def place(carry, graph):
        (bin, used, graphs), (size, apart) = carry, graph
        new = (used + size > N) | (graphs == GRAPHS) | apart
        bin, used, graphs = bin + new.astype(jnp.int32), jnp.where(new, 0, used), jnp.where(new, 0, graphs)
        return (bin, used + size, graphs + 1), (bin, used)
    _, (bin, offset) = lax.scan(place, (jnp.int32(0),) * 3, (sizes, jnp.arange(b) == b1))
    number = jnp.arange(nodes, dtype=jnp.int32)[None]
    row = jnp.arange(b, dtype=jnp.int32)[:, None] * nodes + number
    target = jnp.where(number < sizes[:, None], (bin * N + offset)[:, None] + number, most * N)
    where = jnp.full(most * N, b * nodes, jnp.int32).at[target].set(row, mode="drop")
    return bin, offset, where.reshape(most, N), (bin[b1 - 1] + 1, bin[-1] + 1)


def loop(count, body, start):
    """body(count - 1, ... body(0, start)); the index is int32, whatever JAX's default is."""
    return lax.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), body, start)


def last_true(condition):
    """1 + the index of the last True along the last axis, int32; 0 if there is none."""
    places = jnp.broadcast_to(jnp.arange(1, condition.shape[-1] + 1, dtype=jnp.int32), condition.shape)
    return jnp.max(places * condition.astype(jnp.int32), axis=-1)


def words(x):
    """The bits of x (N, w) as uint32: (N, w), or (N, 2 w) for 64-bit numbers."""
    return lax.bitcast_convert_type(x, jnp.uint32).reshape(len(x), -1)


def hashed(rows):
    """A hash (N,) uint32 of each row (N, w) uint32: the sum over its words, each mixed with its column."""
    place = jnp.arange(rows.shape[1], dtype=jnp.uint32)[None] * np.uint32(0x9e3779b9)
    mixed = (rows ^ (rows >> 15)) * np.uint32(0x2c1b3c6d) + place
    mixed = (mixed ^ (mixed >> 12)) * np.uint32(0x297a2d39)
    return (mixed ^ (mixed >> 15)).sum(axis=1, dtype=jnp.uint32)


def classes(rows):
    """Groups equal rows (N, w) uint32: (the class of each row, one row of each class, the number of classes)."""
    order = jnp.argsort(hashed(rows))
    rows = rows[order]
    numbers = jnp.cumsum((rows != jnp.roll(rows, 1, axis=0)).any(axis=1).at[0].set(False), dtype=jnp.int32)
    zeros = jnp.zeros(len(rows), jnp.int32)
    return zeros.at[order].set(numbers), zeros.at[numbers].set(order.astype(jnp.int32)), numbers[-1] + 1


def refined(numbers, weights, group):
    """One round: (`lists` of the next classes, `classes` of the nodes), from the neighbours (numbers, weights) of each node
    and the current class of each node, `group`."""
    numbers, weights = lax.sort((jnp.where(weights != 0, group[numbers], len(group)), weights), num_keys=2)
    group, example, count = classes(jnp.concatenate([words(numbers), words(weights)], axis=1))
    return as_lists(numbers[example], weights[example]), (group, example, count)


def as_lists(numbers, weights):
    """`lists` of these numbers and weights, padded to a width that FEW divides."""
    more = ((0, 0), (0, -weights.shape[1] % FEW))
    numbers, weights = jnp.pad(jnp.where(weights != 0, numbers, 0), more), jnp.pad(weights, more)
    return numbers, weights, last_true(weights != 0)


def summed(K, lists, r, s, shape):
    """The block of `shape` at (r, s) of the array whose rows are the weighted sums of rows of K given by `lists`."""
    numbers, weights, lengths = (lax.dynamic_slice_in_dim(z, r, shape[0]) for z in lists)
    one_row = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))

    def partial_sum(k):
        out = 0
        for d in range(FEW):
            number, weight = (lax.dynamic_slice_in_dim(z, k * FEW + d, 1, axis=1) for z in (numbers, weights))
            start = jnp.concatenate([number, jnp.full_like(number, s)], axis=1)
            out += weight * lax.gather(K, start, one_row, (1, shape[1]), mode="promise_in_bounds")
        return out
    more = (jnp.max(lengths) + FEW - 1) // FEW
    return lax.fori_loop(jnp.int32(1), more, lambda k, out: out + partial_sum(k), partial_sum(0))


def sweep(targets, rows, columns, sides, block):
    """targets <- block(r, s, targets) for all r below `rows` and s below `columns`, in steps of `sides`."""
    rows, columns = (-(-n // side) for n, side in zip((rows, columns), sides))
    return loop(rows, lambda i, t: loop(columns, lambda j, t: block(i * sides[0], j * sides[1], t), t), targets)


def put_transposed(target, block, r, s):
    """target with block^T written at (s, r), STRIPE rows at a time."""
    stripe = math.gcd(kernel.on(STRIPE), len(block))

    def step(i, target):
        part = lax.dynamic_slice_in_dim(block, i * stripe, stripe)
        return lax.dynamic_update_slice(target, part.T, (s, r + i * stripe))
    return loop(len(block) // stripe, step, target)


def pair_of_bins(rounds, one, two, buffers, side):
    """Pooled K of two bins, and T if there are buffers for it, (GRAPHS, GRAPHS) each; and the buffers, to be used again.

    buffers: two arrays (N, N) for K, and two for T.   side: of a block."""
    square, G = (side, side), GRAPHS
    few = math.gcd(G, kernel.on(STRIPE))  # graphs pooled at a time; the largest of them sets the number of passes
    state, spare = ([pair[k] for pair in buffers] for k in (0, 1))
    pools, relus = [], 0
    for l, (layers, pooled) in enumerate(rounds):
        counts = one.counts[l], two.counts[l]
        if l:  # compute (A K A'^T)^T: the rows, so far the classes of `one`, become those of `two`
            before = two.counts[l - 1]

            def across(r, s, targets):
                return [put_transposed(t, summed(K, one.lists[l - 1], r, s, square), r, s) for t, K in zip(targets, state)]
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
            def pool(K):
                def across(r, s, half):
                    return put_transposed(half, summed(K, one.pools[l], r, s, (few, side)), r, s)
                half = sweep(jnp.zeros((len(K), G), K.dtype), G, counts[1], (few, side), across)

                def down(r, s, out):
                    return lax.dynamic_update_slice(out, summed(half, two.pools[l], r, s, (few, G)), (r, s))
                out = sweep(jnp.zeros((G, G), K.dtype), G, G, (few, G), down)
                return out if l % 2 else out.T
            pools.append([pool(K) for K in state])
    return [sum(of_rounds) for of_rounds in zip(*pools)], list(zip(state, spare))


def stds_of_bin(rounds, features, lists, groups):
    """Standard deviation before each relu of the nodes of a small bin, (relus, N); arguments as `levels` returns them."""
    square, zero, stds = (len(features),) * 2, (jnp.int32(0),) * 2, []
    K = jnp.matmul(features, features.T, precision="highest") / features.shape[1]
    for l, (layers, _) in enumerate(rounds):
        for _ in range(2 * bool(l)):
            K = put_transposed(jnp.zeros(square, K.dtype), summed(K, lists[l - 1], 0, 0, square), *zero)
        for layer in layers:
            if layer[0] == "relu":
                std = jnp.sqrt(jnp.maximum(jnp.diagonal(K), 0))
                stds.append(std[groups[l][0]])
                K, _ = kernel.after(layer, K, K, std, std)
            else:
                K, _ = kernel.after(layer, K, K)
    return jnp.stack(stds) if stds else jnp.zeros((0, len(K)), K.dtype)


def levels(nodes, degree, offset, rounds):
    """(features of the classes of the first round, `lists` of each later round, `classes` of each round) of a bin with
    nodes (N, f + 2 degree).   offset: (N,), the first row of each node's graph."""
    features, numbers, weights = jnp.split(nodes, nodes.shape[1] - np.array([2, 1]) * degree, axis=1)
    numbers = jnp.where(weights != 0, numbers.astype(jnp.int32) + offset[:, None], 0)
    group, example, _ = classes(words(features))
    features, lists, groups = features[example], [], []
    for _ in range(rounds):
        new, grouped = refined(numbers, weights, group)
        lists.append(new)
        groups.append(grouped)
        group = grouped[0]
    return summed(features, lists[0], 0, 0, features.shape), lists[1:], groups


def stack(make, count, most):
    """make(i) for i < count, stacked, and zeros from there up to `most`."""
    out = jax.tree.map(lambda z: jnp.zeros((most, *z.shape), z.dtype), jax.eval_shape(make, 0))
    return loop(count, lambda i, out: jax.tree.map(lambda o, z: o.at[i].set(z), out, make(i)), out)


def bins(x, b1, rounds, degree, pool, N):
    """Packs graphs x (b, nodes, width): (their `Bin`s, stacked; the first graph of each bin; how many bins the first b1
    graphs take, how many all take)."""
    b, nodes, width = x.shape
    exists = (x != 0).any(axis=2)
    sizes = last_true(exists)
    flat = jnp.concatenate([x.reshape(b * nodes, width), jnp.zeros((1, width), x.dtype)])
    share = exists.astype(x.dtype)
    share = share / share.sum(axis=1, keepdims=True) if pool == "mean" else share

    def levels_of(where, offset):
        """`levels` of the bin with these nodes."""
        graph = jnp.minimum(where // nodes, b - 1)
        return levels(flat[where], degree, offset[graph], len(rounds))

    small = -(-max(kernel.on(SMALL), nodes) // 16) * 16
    bin, offset, where, (_, count) = packed(sizes, b1, small, nodes)
    stds = stack(lambda i: stds_of_bin(rounds, *levels_of(where[i], offset)), count, len(where))
    stds = jnp.moveaxis(stds, 1, 0).reshape(stds.shape[1], -1)
    number = jnp.arange(nodes, dtype=jnp.int32)[None]
    stds = stds[:, jnp.minimum((bin * small + offset)[:, None] + number, stds.shape[1] - 1).ravel()]
    stds = jnp.concatenate([stds, jnp.zeros((len(stds), 1), x.dtype)], axis=1)  # one column for each node, as `flat` has rows

    bin, offset, where, (count1, count) = packed(sizes, b1, N, nodes)
    starts = jnp.full(len(where), b, jnp.int32).at[bin].min(jnp.arange(b, dtype=jnp.int32))

    def make(i):
        features, lists, groups = levels_of(where[i], offset)
        graph = starts[i] + jnp.arange(GRAPHS, dtype=jnp.int32)
        inside = (graph < b) & (bin[jnp.minimum(graph, b - 1)] == i)
        graph = jnp.minimum(graph, b - 1)
        place = jnp.minimum(offset[graph][:, None] + number, N - 1)
        pools = [as_lists(group[place], jnp.where(inside[:, None], share[graph], 0)) if pooled else None
                 for (group, _, _), (_, pooled) in zip(groups, rounds)]
        examples = [groups[l][1] for l, (layers, _) in enumerate(rounds) for layer in layers if layer[0] == "relu"]
        of_classes = [stds[k][where[i][rows]] for k, rows in enumerate(examples)]
        of_classes = jnp.stack(of_classes) if of_classes else jnp.zeros((0, N), x.dtype)
        return Bin(features, lists, pools, jnp.stack([count for *_, count in groups]), of_classes)
    return stack(make, count, len(where)), starts, count1, count


def pairs(x, b1, rounds, degree, pool, tangent):
    """[K], or [K, T] if `tangent`, of the first b1 graphs of x with the others, after the pool."""
    b, nodes, _ = x.shape
    side = min(kernel.on(SIDE), -(-b * nodes // 16) * 16)
    N = -(-max(nodes, min(NODES, b * nodes)) // side) * side
    stacked, starts, count1, count = bins(x, b1, rounds, degree, pool, N)

    def row(i, carry):
        def column(j, carry):
            out, buffers = carry
            one, two = (jax.tree.map(lambda z: z[k], stacked) for k in (i, j))
            new, buffers = pair_of_bins(rounds, one, two, buffers, side)
            place = starts[i], starts[j] - b1  # what lies beyond the graphs of these bins is overwritten by later bins
            return [lax.dynamic_update_slice(o, k, place) for o, k in zip(out, new)], buffers
        return lax.fori_loop(count1, count, column, carry)
    out = [jnp.zeros((b1 + GRAPHS, b - b1 + GRAPHS), x.dtype)] * (1 + tangent)
    out, _ = loop(count1, row, (out, [(jnp.zeros((N, N), x.dtype),) * 2] * len(out)))
    return [z[:b1, :b - b1] for z in out]


def kernel_fn(name, kind, **options):
    """`kernel.kernel_fn` of a graph network, fast: same arguments, results and errors.

    name: a list of layers, as gcn(degree, ...) returns it. Runs on one device; `tiles.gram` uses all of them.
    Raises ValueError also unless the list is rounds of aggregate, then any number of dense and relu, with or without jump;
    then sum or mean; then dense.
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
