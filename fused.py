"""The kernels of kernel.py a hundred times faster: K[p, q] cut into sheets.

For two images of 32 x 32 pixels K[p, q] has 1024 x 1024 elements, p = (r, c), q = (r', c'). Fix how
far apart the two *rows* are, r' = r + a, counted modulo height + 1. All such elements are one sheet:

         r'=0  1  2  3  -         sheet:  a=0  a=1  a=2  a=3  a=4
     r=0   A   B  C  D  .           r=0    A    B    C    D    .
       1   E   F  G  H  .             1    F    G    H    .    E       every letter is a (c, c')
       2   I   J  K  L  .             2    K    L    .    I    J       matrix; the dots are zero:
       3   M   N  O  P  .             3    P    .    M    N    O       rows outside the image
       -   .   .  .  .  .             -    .    .    .    .    .

  conv     The window moves in both images together: F, its neighbours A and K, stand one below the
           other in the same sheet, and c, c' move down the diagonal of their matrix. So a sheet never
           meets another one, whatever the depth, and a window is nine shifted reads of one array.
           At the edge of either image it reads the zeros.
  relu     acts on each element, in the same pass: one read, one write. It multiplies by sqrt(v v'),
           zero outside the images, so that zeros stay zeros and nothing needs a mask.
  pool     Columns: 2 x 2 blocks of each letter. Rows: the pooled letter (0, 0) is A + B + E + F, from
           sheets 0, 1, 4: a table tells each row of each pooled sheet its four rows.
  gap      the sum over all sheets.
  flatten  needs p = q only: where nothing pools, the diagonal of each letter in sheet 0 is all there is.

Many second images lie side by side in the last axis, c' * pairs + pair, so that a processor's vectors
are full and every shift is aligned. A fully connected network is a matrix product and one pass.

    python -c "import fused, numpy as np; print(fused.kernel_fn('myrtle5', 'ntk')(np.eye(8)[None, :, :, None]))"

Cost of an entry: one kappa1 (NTK: and kappa0) per element and relu, 3.3 million for Myrtle-10 on
32 x 32, and 1 row in 33 wasted on zeros.             Proved by: test_all.py, section fused
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernel

SHEET = {"cpu": 2**18, "gpu": 2**24}  # elements of a sheet, all pairs: 1 MB stays in cache; 64 MB


def parse(layers):
    """(stages, ending, tail): the (w_std, b_std) of each (conv, relu) at each resolution; "gap" or
    "flatten"; the layers after it. Raises ValueError where the list has another form."""
    stages, rest = [[]], list(layers)
    while rest and rest[0][0] in ("conv", "pool"):
        if rest[0][0] == "pool":
            stages.append([])
            rest = rest[1:]
        elif rest[1:2] == [("relu",)]:
            stages[-1].append(rest[0][1:])
            rest = rest[2:]
        else:
            break
    names = [layer[0] for layer in rest]
    if names[:1] not in (["gap"], ["flatten"]) or set(names[1:]) - {"dense", "relu"}:
        raise ValueError("fused.py takes (conv, relu) and pool in any number, then gap or flatten, "
                         f"then dense and relu; this network continues with {names}: "
                         "take kernel.kernel_fn")
    return stages, names[0], rest[1:]


def conv_relu(source, target, first, second, w2, b2, step):
    """One conv and one relu: reads the sheets (K,) or (K, T) in `source`, writes those in `target`.

    Sheets are (rows + 2, w + 2, m + 2 step) with a border of zeros; step is how far one column of the
    second image lies from the next in the last axis, 0 where c = c'. first, second: (std, 1 / std)
    of the rows, broadcasting to (rows, w, m), std times sqrt(1/2) and both zero outside the image.
    """
    (std1, inverse1), (std2, inverse2) = first, second

    def window(x):
        n, w, m = x.shape[0] - 2, x.shape[1] - 2, x.shape[2] - 2 * step
        return sum(x[i:i + n, j:j + w, j * step:j * step + m] for i in range(3) for j in range(3))
    K = w2 * window(source[0]) + b2
    scale = std1 * std2
    new = [scale * kernel.kappas(K * (inverse1 * inverse2))[1]]
    if len(target) == 2:  # the cosine in another order, lest XLA store what it shares with K: 1.3x
        kappa0, _ = kernel.kappas(K * inverse1 * inverse2)
        T = K + w2 * window(source[1]) if len(source) == 2 else K
        new.append(jnp.where(scale > 0, kappa0 * T / 2, jnp.zeros_like(T)))
    return tuple(write(sheet, value, step) for sheet, value in zip(target, new))


def write(sheet, value, step):
    return lax.dynamic_update_slice(sheet, value, (1, 1, step))


def run_sheets(convs, rows, first, second, buffers, step, offsets, finish):
    """All convs and relus of one resolution, sheet by sheet: (stack of finish(sheet), buffers).

    rows(a): sheet a before the first conv, (K,) or (K, T).   first: (std, 1 / std), each
    (convs, n, w, 1 or m); second: the same twice over in the rows, so that sheet a is rows a ... a + n.
    buffers: two sets of zero-bordered sheets that every step writes in turn.
    offsets: (start, count), the sheets start, start + 1, ... modulo n.
    """
    n, (start, count) = first[0].shape[1], offsets
    coefficients = jnp.asarray([[w * w / 9, b * b] for w, b in convs], first[0].dtype)

    def layer(k, a, source, target):
        return conv_relu(source, target, [x[k] for x in first],
                         [lax.dynamic_slice_in_dim(x[k], a, n) for x in second],
                         coefficients[k, 0], coefficients[k, 1], step)

    def sheet(carry, _):
        i, (here, there) = carry
        a = (i + start) % n if start else i
        new = rows(a)
        here = tuple(write(x, y, step) for x, y in zip(here, new)) + here[len(new):]
        if convs:
            there = layer(0, a, here[:len(new)], there)

            def two(k, buffers):
                here = layer(2 * k + 1, a, buffers[1], buffers[0])
                return here, layer(2 * k + 2, a, here, buffers[1])
            here, there = lax.fori_loop(0, (len(convs) - 1) // 2, two, (here, there))
            if len(convs) % 2 == 0:
                here = layer(len(convs) - 1, a, there, here)
        last = there if len(convs) % 2 else here
        return (i + 1, (here, there)), tuple(
            finish(x[1:-1, 1:-1, step:x.shape[2] - step]) for x in last)
    (_, buffers), out = lax.scan(sheet, (jnp.int32(0), buffers), length=count)
    return out, buffers


def input_rows(x1, x2):
    """rows(a) of the input layer: the mean over channels of x1 x2; x1 (channels, n, w, 1 or m)."""
    n = x1.shape[1]

    def rows(a):
        products = [p * lax.dynamic_slice_in_dim(q, a, n) for p, q in zip(x1, x2)]
        return (sum(products) / len(products),)
    return rows


def pooled_rows(stacks, offsets):
    """rows(a) after a pool, from the stacks (sheets, n, ...) that `pool_columns` left: the mean of
    the rows (2r, 2r'), (2r, 2r'+1), (2r+1, 2r'), (2r+1, 2r'+1), wherever their sheet is."""
    n, (start, count) = stacks[0].shape[1], offsets
    place = np.zeros(n, int)
    place[(start + np.arange(count)) % n] = np.arange(count)
    a, r = np.ogrid[:n // 2 + 1, :n // 2 + 1]
    r2 = (r + a) % (n // 2 + 1)
    table = np.stack([place[(2 * r2 + j - 2 * r - i) % n] * n + 2 * r + i
                      for i in (0, 1) for j in (0, 1)], axis=-1)
    table = np.where((np.maximum(r, r2) == n // 2)[..., None], n - 1, table)  # row n - 1 is zero

    def rows(a):
        four = lax.dynamic_index_in_dim(jnp.asarray(table), a, keepdims=False)
        return tuple(sum(x.reshape((-1,) + x.shape[2:])[four[:, k]] for k in range(4)) / 4
                     for x in stacks)
    return rows


def pool_columns(pairs):
    def finish(x):
        n, w, _ = x.shape
        x = x.reshape(n, w, w, pairs)
        x = sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        return x.reshape(n, w // 2, w // 2 * pairs)
    return finish


def as_second(x, step):
    """(..., n, w, pairs) of the second images in the layout of a sheet's last axis, rows twice over."""
    if not step:
        return x
    x = x.reshape(x.shape[:-2] + (1, -1))
    return jnp.concatenate([x, x], axis=-3)


def diagonal(x, step):
    """c = c' of a sheet (n, w, m): (n, w, pairs)."""
    n, w, m = x.shape
    return x.reshape(n, w, w, m // w)[:, np.arange(w), np.arange(w)] if step else x


def deviations(convs, v):
    """(std, 1 / std) before each relu, (convs, n, w, pairs), zero outside the image and std times
    sqrt(1/2), from the input's variance v (n, w, pairs): v <- w_std^2 mean(v) + b_std^2, v <- v / 2."""
    stds = [jnp.zeros_like(v)]
    for w_std, b_std in convs:
        n, w, border = v.shape[0] - 1, v.shape[1], jnp.pad(v[:-1], ((1, 1), (1, 1), (0, 0)))
        v = w_std**2 / 9 * sum(border[i:i + n, j:j + w] for i in range(3) for j in range(3))
        v = jnp.pad(v + b_std**2, ((0, 1), (0, 0), (0, 0)))
        stds.append(jnp.sqrt(v))
        v = v / 2
    stds = jnp.stack(stds[1:] or stds)
    return stds * 0.5**0.5, jnp.where(stds > 0, 1 / jnp.where(stds > 0, stds, 1), 0)


def walk(stages, ending, x1, x2, stds, buffers, step, reach=None):
    """From the images to the ending: (K,) or (K, T), each (pairs,), and the buffers.

    stds(s, rows): `first` and `second` of `run_sheets` at resolution s.
    reach: how many sheets on either side of sheet 0 are wanted at each resolution; None: all.
    """
    rows, buffers = input_rows(x1, x2), list(buffers)
    for s, convs in enumerate(stages):
        first, second = stds(s, rows)
        n, w = first[0].shape[1:3]
        last = s == len(stages) - 1
        one_sheet = last and ending == "flatten"
        r = n if reach is None else reach[s]
        offsets = (0, 1) if one_sheet else (0, n) if 2 * r + 1 >= n else (n - r, 2 * r + 1)
        pairs = second[0].shape[-1] // (w if step else 1)

        def total(x):
            return (diagonal(x, step) if one_sheet else x).reshape(-1, pairs).sum(axis=0)
        out, buffers[s] = run_sheets(convs, rows, first, second, buffers[s], step, offsets,
                                     total if last else pool_columns(pairs))
        rows = None if last else pooled_rows(out, offsets)
    size = (n - 1) * w if one_sheet else ((n - 1) * w)**2
    return tuple(x.sum(axis=0) / size for x in out), buffers


def prepare(stages, ending, full, x):
    """What a block of images x (pairs, h, w, channels) brings to every pair: x (channels, n, w, pairs),
    the `deviations` at each resolution, and K of each image with itself (pairs,), right if `full`.

    The variances after a pool are K[p, p] of the image with itself, for which the 2^pools - 1 sheets
    on either side of sheet 0 suffice.
    """
    pairs, h, w, _ = x.shape
    step = pairs if len(stages) > 1 or ending == "gap" else 0
    x, found = jnp.pad(x.transpose(3, 1, 2, 0), ((0, 0), (0, 1), (0, 0), (0, 0))), []

    def stds(s, rows):
        found.append(deviations(stages[s], diagonal(rows(0)[0], step)))
        return [[jnp.tile(y, (w >> s) if step else 1) for y in found[-1]],
                [as_second(y, step) for y in found[-1]]]
    reach = None if full else [2**k - 1 for k in reversed(range(len(stages)))]
    (K,), _ = walk(stages, ending, jnp.tile(x, w if step else 1), as_second(x, step), stds,
                   empty(stages, h, w, step, pairs, 1, x.dtype), step, reach)
    return x, found, K


def empty(stages, h, w, step, pairs, states, dtype):
    """Per resolution two sets of `states` sheets with their borders, all zero."""
    return [((jnp.zeros(((h >> s) + 3, (w >> s) + 2, ((w >> s) + 2) * step or pairs), dtype),)
             * states,) * 2 for s in range(len(stages))]


def tail_of(layers, K, T, v1, v2):
    """The scalar layers after the ending, on matrices (n1, n2); v1, v2: k(x, x) before them."""
    for layer in layers:
        if layer[0] == "relu":
            K, T = kernel.relu(K, T, jnp.sqrt(v1), jnp.sqrt(v2))
            v1, v2 = v1 / 2, v2 / 2
        else:
            K, T = kernel.linear(layer, K, T)
            v1, v2 = (layer[1]**2 * v + layer[2]**2 for v in (v1, v2))
    return K, T


def kernel_fn(name, kind, **options):
    """`kernel.kernel_fn`, fast: same arguments, same results, same errors.

    Raises ValueError also for a list of layers of another form than (conv, relu) and pool in any
    number, gap or flatten, then dense and relu.
    """
    layers = kernel.network(name, **options) if isinstance(name, str) else list(name)
    stages, ending, tail = parse(layers)
    kernel.chosen(kind, None, None)
    states = 1 if kind in ("nngp", ("nngp",)) else 2
    full = ("relu",) in tail

    def matrices(x1, x2, symmetric):
        """(K,) or (K, T) at the ending, (n1, n2), and k(x, x) of either."""
        (n1, h, w, _), n2 = x1.shape, len(x2)
        pools_or_gap = kernel.carries_pairs(layers)
        sheet = SHEET.get(jax.default_backend(), SHEET["gpu"]) // (h * w * (w if pools_or_gap else 8))
        pairs = min(max(sheet // 8, 1), -(-n2 // 8)) * 8
        step = pairs if pools_or_gap else 0

        def prepared(x):
            x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (-len(x) % pairs,) + x.shape[1:])])
            return lax.map(lambda block: prepare(stages, ending, full, block),
                           x.reshape((-1, pairs) + x.shape[1:]))

        def by_image(y):  # (blocks, ..., pairs) -> (images, ..., 1)
            return jnp.moveaxis(y, -1, 1).reshape((-1,) + y.shape[1:-1])[..., None]
        blocks2 = prepared(x2)
        firsts = jax.tree.map(by_image, blocks2 if symmetric else prepared(x1))
        v1, v2 = firsts[2][:n1, 0], blocks2[2].reshape(-1)[:n2]

        def columns(job):
            block, (x2, stds2, _) = job
            x2, stds2 = jax.tree.map(lambda y: as_second(y, step), (x2, stds2))

            def row(i, carry):
                out, buffers = carry
                x1, stds1, _ = jax.tree.map(lambda y: lax.dynamic_index_in_dim(y, i, 0, False), firsts)
                new, buffers = walk(stages, ending, x1, x2, lambda s, _: (stds1[s], stds2[s]),
                                    buffers, step)
                return tuple(lax.dynamic_update_slice(o, k[None], (i, 0))
                             for o, k in zip(out, new)), buffers
            stop = jnp.minimum((block + 1) * pairs, n1) if symmetric else n1
            out = (jnp.zeros((n1, pairs), x1.dtype),) * states
            return lax.fori_loop(0, stop, row, (
                out, empty(stages, h, w, step, pairs, states, x1.dtype)))[0]
        out = lax.map(columns, (jnp.arange(len(blocks2[2])), blocks2))
        return [jnp.moveaxis(y, 0, 1).reshape(n1, -1)[:, :n2] for y in out], v1, v2

    @jax.jit
    def fn(x1, x2=None):
        symmetric = x2 is None
        x1 = kernel.as_images(layers, x1)
        x2 = x1 if symmetric else kernel.as_images(layers, x2)
        if x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype:
            raise ValueError(f"x1 is {x1.dtype} {x1.shape} and x2 is {x2.dtype} {x2.shape}: all "
                             "but the number of rows must agree")
        if layers[0][0] == "flatten":
            a, b = (x.reshape(len(x), -1) for x in (x1, x2))
            out = [jnp.matmul(a, b.T, precision="highest") / a.shape[1]]
            v1, v2 = ((x * x).mean(axis=1) for x in (a, b))
        else:
            out, v1, v2 = matrices(x1, x2, symmetric)
        K, T = tail_of(tail, out[0], out[-1] if len(out) == 2 else jnp.zeros_like(out[0]), v1, v2)
        K, T = (jnp.triu(k) + jnp.triu(k, 1).T if symmetric else k for k in (K, T))
        return kernel.chosen(kind, K, T)
    return fn
