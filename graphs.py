"""The kernels of graph networks fast: whole graphs side by side in squares of nodes.

A pair of molecules is an array of 25 x 25 nodes or so: too small for a processor, and no two are alike.
So graphs are laid one after the other into bins of N nodes, as many as fit, and K of two bins is one
N x N array, whatever the graphs: no padding but the last few rows of a bin.

    bin 1: graph a, b, c        K[p, q] of all their nodes,      aggregate: every row becomes the weighted sum
    bin 2: graph d, e           (a d) (a e)                      of the rows of its neighbours, then the
                                (b d) (b e)                      array is transposed, and once more
                                (c d) (c e)

1. A node of a molecule listens to itself and to four others at most, with few exceptions: a sum of FEW rows
   is 5 operations an element where a product with A would be 25, or N. Rows are contiguous, columns are not:
   picking columns takes 4 ns an element, transposing and then picking rows 2. Transposed once a round, K comes
   out as its transpose, so the next round begins with the other graph.
2. XLA fuses what it can, and a sum of rows fused with a transpose reads one number at a time. What is written
   into a buffer larger than itself stays apart (fused.py does that too). Numbers: below.
3. Variances v are those of a bin with itself: once a graph, not once a pair.
4. The first aggregate comes before any relu, so it acts on features: A <x, x'> A'^T = <A x, A' x'>.
5. Pooling is a product with GRAPHS rows; each graph belongs to one bin, its sum is complete there.

  b  graphs, b1 of them rows of K   nodes  of a graph, with padding   f  features of a node   degree  neighbours
  listed of a node   N  nodes of a bin. How many bins there are is known when it runs; loops end there.

    python -c "import graphs, kernel, numpy; print(graphs.kernel_fn(kernel.gcn(1), 'ntk')(numpy.ones((2, 3, 5))))"

Cost of an entry: a round takes for each pair of nodes one kappa1 (NTK: and kappa0), 2 FEW multiplications and one
transposed copy (NTK: twice that). On one core of 2.4 GHz a relu is 0.6 ns, each sum of rows 0.6, the transpose 1:
with 25 nodes and three rounds, a third of it for products (input and pools), 157,000 entries a second of that core,
NTK 88,000, where neural_tangents has 16,000 and 14,000.     Proved by: test_all.py, section graphs
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernel

NODES = {"cpu": 256, "gpu": 4096}  # of a bin, at least; 256 KB: the five arrays in use stay in a core's cache
GRAPHS = {"cpu": 16, "gpu": 256}  # of a bin, at most: its pool is a product with as many rows; 32 cost a core a fifth
FEW = 5  # neighbours summed in one pass; more of them one by one
SPARE = {"cpu": 8, "gpu": 0}  # rows of a buffer beyond the N of a bin, see `write`
STRIPE = 16  # rows transposed at a time


def parse(layers):
    """(degree, rounds, pool, tail) of a list of layers: what comes before the pool without its first
    aggregate, and dense layers after it.  Raises ValueError where the list has another form."""
    names = [layer[0] for layer in layers]
    end = next((i for i, name in enumerate(names) if name in ("sum", "mean")), len(names) - 1)
    degrees = {layer[1] for layer in layers if layer[0] == "aggregate"}
    if (names[0] != "aggregate" or len(degrees) != 1 or set(names[end + 1:]) - {"dense"}
            or set(names[:end]) - {"aggregate", "dense", "relu", "jump"} or names[1:2] != ["dense"]):
        raise ValueError(f"graphs.py takes aggregate and dense, then aggregate, dense, relu and jump, all of one "
                         f"degree, then sum or mean, then dense; this network is {names}: take kernel.kernel_fn")
    return degrees.pop(), layers[1:end], names[end], layers[end + 1:]


def packed(x, b1, pool, N):
    """Graphs x (b, nodes, width), b1 of them and others, laid into bins of N rows: (flat, starts, counts).

    flat (b N + nodes, width + 3): of the nodes of every bin their rows, then which graph of its bin a node belongs
    to, in which row of the bin that begins, and its share in the pool, 0 where there is no node.
    starts (b,): the first graph of each bin.   counts: bins in use, for the first b1 graphs and for all.
    """
    b, nodes, width = x.shape
    exists = (x != 0).any(axis=2)
    sizes = last_true(exists)

    def place(carry, graph):
        (bin, used, graphs), (size, apart) = carry, graph
        new = (used + size > N) | (graphs == kernel.on(GRAPHS)) | apart
        bin, used, graphs = bin + new.astype(jnp.int32), jnp.where(new, 0, used), jnp.where(new, 0, graphs)
        return (bin, used + size, graphs + 1), (bin, used, graphs)
    _, (bin, offset, rank) = lax.scan(place, (jnp.int32(0),) * 3, (sizes, jnp.arange(b) == b1))
    share = exists.astype(x.dtype)
    share = share / share.sum(axis=1, keepdims=True) if pool == "mean" else share

    def lay(g, flat):  # the rows of zeros after a graph are overwritten by the next
        more = jnp.stack([jnp.full(nodes, rank[g], x.dtype), jnp.full(nodes, offset[g], x.dtype), share[g]], axis=1)
        return lax.dynamic_update_slice_in_dim(flat, jnp.concatenate([x[g], more], axis=1), bin[g] * N + offset[g], 0)
    flat = lax.fori_loop(0, b, lay, jnp.zeros((b * N + nodes, width + 3), x.dtype))
    starts = jnp.full(b, b, jnp.int32).at[bin].min(jnp.arange(b, dtype=jnp.int32))
    return flat, starts, (bin[b1 - 1] + 1, bin[-1] + 1)


def unpacked(flat, i, degree, N):
    """Of bin i the features (N, f), its neighbours (numbers (N, degree) int32 in the bin, weights (N, degree), the
    most that a node has), and its pool, (GRAPHS, N)."""
    rows = lax.dynamic_slice_in_dim(flat, i * N, N)
    ends = rows.shape[1] - np.array([2 * degree + 3, degree + 3, 3, 2, 1])
    features, numbers, weights, rank, offset, share = jnp.split(rows, ends, axis=1)
    numbers = (numbers + jnp.broadcast_to(offset, numbers.shape)) * (weights != 0).astype(flat.dtype)
    pool = (rank.T == jnp.arange(kernel.on(GRAPHS), dtype=flat.dtype)[:, None]).astype(flat.dtype) * share.T
    return features, (numbers.astype(jnp.int32), weights, jnp.max(last_true(weights != 0))), pool


def last_true(condition):
    """One more than the place of the last True along the last axis, int32; 0 where there is none."""
    places = jnp.broadcast_to(jnp.arange(1, condition.shape[-1] + 1, dtype=jnp.int32), condition.shape)
    return jnp.max(places * condition.astype(jnp.int32), axis=-1)


def write(buffer, value):
    """`value` into the first rows of a buffer that has more, in place; on a GPU it has no more, and XLA decides."""
    return value if value.shape == buffer.shape else lax.dynamic_update_slice(buffer, value, (0, 0))


def sum_rows(target, K, neighbours):
    """target <- A K: of every row the weighted sum of its neighbours' rows."""
    numbers, weights, most = neighbours

    def term(k):
        column = [lax.dynamic_slice_in_dim(z, k, 1, axis=1) for z in (numbers, weights)]
        return column[1] * K.at[column[0][:, 0]].get(mode="promise_in_bounds")
    few = min(FEW, numbers.shape[1])
    target = write(target, sum(term(k) for k in range(1, few)) + term(0) if few > 1 else term(0))
    return lax.fori_loop(jnp.int32(few), jnp.maximum(most, few), lambda k, target: write(
        target, target[:len(K)] + term(k)), target)


def transpose(target, K):
    """target <- K^T."""
    if target.shape == K.shape:
        return K.T

    def stripe(i, target):
        part = lax.dynamic_slice_in_dim(K, i * STRIPE, STRIPE)
        return lax.dynamic_update_slice_in_dim(target, part.T, i * STRIPE, 1)
    return lax.fori_loop(0, len(K) // STRIPE, stripe, target)


def aggregate(target, spare, K, first, second):
    """target <- (A K A'^T)^T, K (N, N) with the nodes of `first` in its rows; both arrays of `spare` are used."""
    N = len(K)
    one = sum_rows(spare[0], K, first)
    two = transpose(spare[1], one[:N])
    return sum_rows(target, two[:N], second), (one, two)


def walk(rounds, features, neighbours, stds, pools, buffers, tangent):
    """K and T of two bins, pooled: (GRAPHS, GRAPHS) each, and the buffers.

    features: those of both after the first aggregate.   neighbours: (numbers, weights, most) of both.
    stds: (relu's number, K, turned) -> std of rows and of columns.   pools: of both, (GRAPHS, N).
    buffers: four (N + SPARE, N).   tangent: whether T is wanted.
    """
    a, b, spare = *buffers[:2], buffers[2:]
    N, turned, relus = len(features[0]), False, 0
    K = jnp.matmul(features[0], features[1].T, precision="highest") / features[0].shape[1]
    T, out = jnp.zeros_like(K), []

    def pooled(K):
        K = K.T if turned else K
        return jnp.matmul(jnp.matmul(pools[0], K, precision="highest"), pools[1].T, precision="highest")
    for layer in rounds:
        if layer[0] == "aggregate":
            sides = neighbours[::-1] if turned else neighbours
            a, spare = aggregate(a, spare, K, *sides)
            K, turned = a[:N], not turned
            if tangent:
                b, spare = aggregate(b, spare, T, *sides)
                T = b[:N]
        elif layer[0] == "relu":
            k, t = kernel.relu(K, T, *stds(relus, K, turned))
            if tangent:  # first, for it reads K
                b = write(b, t)
                T = b[:N]
            a, relus = write(a, k), relus + 1
            K = a[:N]
        elif layer[0] == "jump":
            out.append((pooled(K), pooled(T)))
        else:
            K, T = kernel.linear(layer, K, T)
    out.append((pooled(K), pooled(T)))
    return tuple(map(sum, zip(*out))), (a, b, *spare)


def prepare(rounds, degree, N, packed, buffers):
    """parts(i) of bin i: its features after the first aggregate, its neighbours and pool as `unpacked` has them, and
    the std before each relu (relus, N)."""
    flat, starts, (_, count) = packed
    b, relus = len(starts), sum(layer[0] == "relu" for layer in rounds)

    def one(i, carry):
        kept, stds, buffers = carry
        features, neighbours, pool = unpacked(flat, i, degree, N)
        numbers, weights, _ = neighbours
        features = sum(weights[:, k, None] * features.at[numbers[:, k]].get(mode="promise_in_bounds")
                       for k in range(degree))
        found = []

        def std(k, K, turned):
            found.append(jnp.sqrt(jnp.maximum(jnp.diagonal(K), 0)))
            return found[-1], found[-1]
        _, buffers = walk(rounds, (features,) * 2, (neighbours,) * 2, std, (pool,) * 2, buffers, False)
        return kept.at[i].set(features), stds.at[i].set(jnp.stack(found)), buffers
    kept = jnp.zeros((b, N, flat.shape[1] - 2 * degree - 3), flat.dtype)
    stds = jnp.zeros((b, relus, N), flat.dtype)
    kept, stds, buffers = lax.fori_loop(jnp.int32(0), count, one, (kept, stds, buffers))
    return lambda i: (kept[i], *unpacked(flat, i, degree, N)[1:], stds[i])


def pairs(rounds, degree, N, tangent, packed, b1):
    """K and T of the first b1 graphs with the others after the pool, as far as there are graphs, in arrays with
    rows and columns to spare.  packed: see there."""
    flat, starts, (count1, count) = packed
    buffers = (jnp.zeros((N + kernel.on(SPARE), N), flat.dtype),) * 4
    parts = prepare(rounds, degree, N, packed, buffers)

    def row(i, carry):
        features1, neighbours1, pool1, stds1 = parts(i)

        def column(j, carry):
            out, buffers = carry
            features2, neighbours2, pool2, stds2 = parts(j)

            def stds(k, K, turned):
                return (stds2[k], stds1[k]) if turned else (stds1[k], stds2[k])
            new, buffers = walk(rounds, (features1, features2), (neighbours1, neighbours2), stds, (pool1, pool2),
                                buffers, tangent)
            place = starts[i], starts[j] - b1  # beyond the graphs of these bins the next ones overwrite it
            return tuple(lax.dynamic_update_slice(o, k, place) for o, k in zip(out, new)), buffers
        return lax.fori_loop(count1, count, column, carry)
    out = (jnp.zeros((b1 + kernel.on(GRAPHS), len(starts) - b1 + kernel.on(GRAPHS)), flat.dtype),) * 2
    return lax.fori_loop(jnp.int32(0), count1, row, (out, buffers))[0]


def kernel_fn(name, kind, **options):
    """`kernel.kernel_fn` of a graph network, fast: same arguments, results and errors.

    name: a list of layers, as kernel.gcn(degree, ...) returns.
    Raises ValueError also for a list of another form than (aggregate, dense), aggregate, dense, relu and jump
    in any number, sum or mean, dense. Runs on one device, `tiles.gram` on all of them.
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
        N = max(kernel.on(NODES), -(-x1.shape[1] // STRIPE) * STRIPE)
        b1, x = len(x1), jnp.concatenate([x1, x2])
        K, T = (z[:b1, :len(x2)] for z in pairs(rounds, degree, N, tangent, packed(x, b1, pool, N), b1))
        for layer in tail:
            K, T = kernel.linear(layer, K, T)
        return kernel.chosen(kind, K, T)
    return fn
