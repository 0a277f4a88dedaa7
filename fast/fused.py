"""The kernels of kernel.py a hundred times faster: K[p, q] cut into sheets.

For two images of 32 x 32 pixels K[p, q] has 1024 x 1024 elements, p = (r, c), q = (r', c'). Fix how
far apart the two *rows* are, r' = r + a modulo height + 1. All such elements are one sheet:

         r'=0  1  2  3  -         sheet:  a=0  a=1  a=2  a=3  a=4
     r=0   A   B  C  D  .           r=0    A    B    C    D    .
       1   E   F  G  H  .             1    F    G    H    .    E       every letter is a (c, c')
       2   I   J  K  L  .             2    K    L    .    I    J       matrix; the dots are zero:
       3   M   N  O  P  .             3    P    .    M    N    O       rows outside the image
       -   .   .  .  .  .             -    .    .    .    .    .

  conv     The window moves in both images together: F and its neighbours A and K stand one below
           the other in one sheet, and c, c' move down the diagonal of their matrices. So sheets
           never meet, whatever the depth, and a window is nine shifted reads of one array. At the
           edge of either image it reads the zeros.
  relu     acts on each element, in the same pass: one read, one write. It multiplies by sqrt(v v'),
           zero outside the images, so that zeros stay zeros and nothing needs a mask.
  pool     Columns: 2 x 2 blocks of each letter. Rows: the pooled letter (0, 0) is the mean of A, B,
           E, F, from sheets 0, 1, 4; a table tells each row of each pooled sheet its four rows.
  gap      the sum over all sheets.
  flatten  needs p = q only: where nothing pools, the diagonals of the letters in sheet 0 suffice.

Many second images lie side by side in the last axis, c' * pairs + pair, so that a processor's
vectors are full and every shift is aligned. A fully connected network is a matrix product and a pass.
Sequences are images one position wide: a letter is a number, a window three reads; a position that does not
exist is one more place where sqrt(v) is zero.

    python -c "import fused, numpy; print(fused.kernel_fn('cnn_gap', 'ntk')(numpy.ones((2, 8, 8, 3))))"

Cost of an entry: one kappa1 (NTK: and kappa0) per element and relu, 3.35 million for Myrtle-10 on
32 x 32, and 6 % more for the rows of zeros.          Proved by: fast/test_fast.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import augment
import kernel

try:
    from fast import gpu
except ImportError:  # gpu.py was deleted, or this JAX has no Triton backend: XLA computes on GPUs, too
    gpu = None

ELEMENTWISE = ("relu", "normalize", "exp")
SHEET = {"cpu": 2**18, "gpu": 2**25}  # elements of a sheet, all pairs: 1 MB stays in cache; 128 MB


def on_gpu():
    """Whether gpu.py takes the place of `conv_relu`."""
    return gpu is not None and jax.default_backend() == "gpu"


def parse(layers):
    """(stages, ending, tail): the (w_std, b_std) of each (conv, relu) at each resolution; "gap" or
    "flatten"; the layers after it. Raises ValueError where the list has another form."""
    stages, rest = [[]], [layer for layer in layers if layer != ("mask",)]
    while rest and rest[0][0] in ("conv", "conv1d", "pool"):
        if rest[0][0] == "pool":
            stages.append([])
            rest = rest[1:]
        elif rest[1:2] == [("relu",)]:
            name, w_std, b_std = rest[0]  # of a 3 x 3 window of a sequence 6 are zeros, and 9 its mean divides by
            stages[-1].append((w_std * 3**0.5 if name == "conv1d" else w_std, b_std))
            rest = rest[2:]
        else:
            break
    names = [layer[0].removeprefix("seq_") for layer in rest]
    if names[:1] not in (["gap"], ["flatten"]) or set(names[1:]) - {"dense", *ELEMENTWISE}:
        raise ValueError("fused.py takes (conv or conv1d, relu) and pool in any number, then gap or flatten, "
                         f"then dense, relu, normalize and exp; this network continues with {names}: "
                         "take kernel.kernel_fn")
    return stages, names[0], rest[1:]


def conv_relu(source, target, first, second, w2, b2, step, tangent):
    """One conv and one relu: reads the sheets in `source`, writes those in `target`, returns that.

    Both are (1, n + 2, w + 2, m + 2 step), K alone, or (2, ...), K and T, with a border of zeros;
    step is how far one column of the second image lies from the next in the last axis, 0 where c = c'.
    first, second: (std, 1 / std) of the two images' rows, broadcasting to (n, w, m), std times
    sqrt(1/2) and both zero outside the image.   tangent: whether the source has a T; else it is 0.
    """
    (std1, inverse1), (std2, inverse2) = first, second

    def window(x):
        n, w, m = x.shape[0] - 2, x.shape[1] - 2, x.shape[2] - 2 * step
        return sum(x[i:i + n, j:j + w, j * step:j * step + m]
                   for i in range(3) for j in (range(3) if w > 1 else [1]))  # beside a sequence are zeros
    K = w2 * window(source[0]) + b2
    kappa0, kappa1 = kernel.kappas(K * (inverse1 * inverse2))
    scale = std1 * std2
    if len(target) == 2:
        T = K + w2 * window(source[1]) if tangent else K
        target = write(target, 1, jnp.where(scale > 0, kappa0 * T / 2, jnp.zeros_like(T)), step)
    return write(target, 0, scale * kappa1, step)


def write(sheets, k, value, step):
    """`value` (n, w, m) inside the border of sheet k, in place."""
    return lax.dynamic_update_slice(sheets, value[None], (k, 1, 1, step))


def coefficients(convs, dtype):
    """(w_std^2 / 9, b_std^2) of each conv, (convs, 2)."""
    return jnp.asarray(np.reshape([[w * w / 9, b * b] for w, b in convs], (-1, 2)), dtype)


def run_sheets(convs, rows, first, second, buffers, step, offsets, finish):
    """All convs and relus of one resolution, sheet by sheet: (stack of finish(sheet), buffers).

    rows(a): sheet a before the first conv, (K,) or (K, T).   first: (std, 1 / std), each
    (convs, n, w, 1 or m); second: the same twice over in the rows: sheet a is rows a ... a + n.
    buffers: two arrays of sheets as `conv_relu` has them, written in turn.
    offsets: (start, count), the sheets start, start + 1, ... modulo n.
    """
    n, (start, count) = first[0].shape[1], offsets
    w2_b2 = coefficients(convs, first[0].dtype)

    def layer(k, a, source, target, tangent=True):
        if on_gpu() and first[0].shape[3] == 1:  # else an image with itself, in `prepare`: little to do
            return gpu.conv_relu(source, target, first, second, w2_b2, k, a, step, tangent)
        return conv_relu(source, target, [x[k] for x in first],
                         [lax.dynamic_slice_in_dim(x[k], a, n) for x in second],
                         w2_b2[k, 0], w2_b2[k, 1], step, tangent)

    def sheet(carry, _):
        i, (here, there) = carry
        a = (i + start) % n if start else i
        new = rows(a)
        for k, value in enumerate(new):
            here = write(here, k, value, step)
        if convs:
            there = layer(0, a, here, there, tangent=len(new) == 2)

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
    channels, n = x1.shape[:2]
    group = next(size for size in range(min(channels, 8), 0, -1) if channels % size == 0)

    def rows(a):
        def add(g, total):
            return total + sum(x1[g * group + k] * lax.dynamic_slice_in_dim(x2[g * group + k], a, n)
                               for k in range(group))
        shape = jax.eval_shape(lambda: x1[0] * x2[0, :n])
        return (lax.fori_loop(0, channels // group, add, jnp.zeros_like(shape)) / channels,)
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
    """(..., n, w, pairs) of second images in the layout of a sheet's last axis, rows twice over."""
    if step:
        x = x.reshape(*x.shape[:-2], 1, x.shape[-2] * x.shape[-1])
    return jnp.concatenate([x, x], axis=-3)


def diagonal(x, step):
    """c = c' of a sheet (n, w, m): (n, w, pairs)."""
    n, w, m = x.shape
    return x.reshape(n, w, w, m // w)[:, np.arange(w), np.arange(w)] if step else x


def deviations(convs, v, sequences):
    """(std, 1 / std) before each relu, (convs, n, w, pairs), zero outside the image and std times
    sqrt(1/2), from the input's variance v (n, w, pairs): v <- w_std^2 mean(v) + b_std^2, v / 2.
    sequences: whether positions of no variance do not exist."""
    n, w = v.shape[0] - 1, v.shape[1]
    outside = v[:-1] == 0 if sequences else jnp.zeros_like(v[:-1], bool)

    def conv_relu(v, conv):
        border = jnp.pad(v[:-1], ((1, 1), (1, 1), (0, 0)))
        v = conv[0] * sum(border[i:i + n, j:j + w] for i in range(3) for j in range(3)) + conv[1]
        v = jnp.pad(jnp.where(outside, jnp.zeros_like(v), v), ((0, 1), (0, 0), (0, 0)))
        return v / 2, jnp.sqrt(v)
    _, stds = lax.scan(conv_relu, v, coefficients(convs, v.dtype))
    return stds * 0.5**0.5, jnp.where(stds > 0, 1 / jnp.where(stds > 0, stds, 1), 0)


def walk(stages, ending, rows, stds, buffers, step, reach=None):
    """From `input_rows` to the ending: (K,) or (K, T), each (pairs,), and the buffers.

    stds(s, rows): `first` and `second` of `run_sheets` at resolution s.
    reach: how many sheets on either side of sheet 0 are wanted at each resolution, by default all.
    """
    buffers = list(buffers)
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


def prepare(stages, ending, full, sequences, step, x):
    """What a block of images x (pairs, h, w, channels) brings to every pair: x as (channels, n, w,
    pairs), its `deviations` at each resolution, and if `full` K of each image with itself (pairs,).

    The variances after a pool are K[p, p] of an image with itself, for which the 2^pools - 1 sheets
    on either side of sheet 0 suffice.
    """
    pairs, h, w, _ = x.shape
    x, found = jnp.pad(x.transpose(3, 1, 2, 0), ((0, 0), (0, 1), (0, 0), (0, 0))), []

    def stds(s, rows):
        found.append(deviations(stages[s], diagonal(rows(0)[0], step), sequences))
        return [[jnp.tile(y, (w >> s) if step else 1) for y in found[-1]],
                [as_second(y, step) for y in found[-1]]]
    reach = None if full else [2**k - 1 for k in reversed(range(len(stages)))]
    rows = input_rows(jnp.tile(x, w if step else 1), as_second(x, step))
    buffers = empty(stages, h, w, step, pairs, 1, x.dtype)
    (K,), _ = walk(stages, ending, rows, stds, buffers, step, reach)
    return x, found, K


def empty(stages, h, w, step, pairs, states, dtype):
    """Per resolution two arrays of `states` sheets with their borders, all zero."""
    shapes = [(states, (h >> s) + 3, (w >> s) + 2, ((w >> s) + 2) * step or pairs)
              for s in range(len(stages))]
    return [(jnp.zeros(shape, dtype),) * 2 for shape in shapes]


def even(n, most):
    """The side, a multiple of 8, of the fewest and most equal blocks of n columns; most: a multiple of 8."""
    side = -(-n // -(-n // most))
    return side + -side % 8


def images(stages, ending, full, states, mirrors, sequences, x1, x2):
    """K or (K, T) at the ending, (n1, mirrors n2), and if `full` k(x, x) of the rows and of the columns.
    Where x2 is None: of x1 with itself, right on and above the diagonal. mirrors: 1, or 2 for the mirror
    images of x2 as n2 more columns: what is prepared for them is that of x2, mirrored.

    Column blocks of `pairs` images, every row against them, one after the other; rows beyond n1 are dropped.
    """
    symmetric, x2 = x2 is None, x1 if x2 is None else x2
    (n1, h, w, _), n2 = x1.shape, len(x2)
    one_column = w == 1 or len(stages) == 1 and ending == "flatten"  # c = c': stds are as large as a sheet
    fit = max(kernel.on(SHEET) // (h * w * (8 if one_column else w)) // 8 * 8, 8)
    pairs = even(n2 * mirrors, fit)
    wide = pairs // mirrors  # images of x2 in a block

    def prepared(x):
        x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (-len(x) % wide, *x.shape[1:]))])
        return lax.map(lambda block: prepare(stages, ending, full, sequences, 0 if one_column else wide, block),
                       x.reshape(-1, wide, *x.shape[1:]))
    step, blocks = 0 if one_column else pairs, prepared(x2)
    by_image = jax.tree.map(  # (blocks, ..., wide) -> (images, ..., 1)
        lambda y: jnp.moveaxis(y, -1, 1).reshape(len(y) * wide, *y.shape[1:-1], 1),
        blocks if symmetric else prepared(x1))

    def columns(job):
        block, (x2, stds2, _) = job
        x2, stds2 = jax.tree.map(lambda y: as_second(jnp.concatenate([y, y[..., ::-1, :]][:mirrors], axis=-1),
                                                     step), (x2, stds2))

        def row(i, rows, carry):
            out, buffers = carry
            stds1 = jax.tree.map(lambda y: y[i], by_image[1])
            new, buffers = walk(stages, ending, rows, lambda s, _: (stds1[s], stds2[s]), buffers, step)
            return tuple(o.at[i].set(k) for o, k in zip(out, new)), buffers

        by_position = x2[:, :h + 1, 0].swapaxes(0, 1)  # here, for in a loop it is a copy each time

        def eight(i, carry):  # rows of sequences, whose sheet 0 before the first conv is a product at each position
            x1 = lax.dynamic_slice_in_dim(by_image[0], 8 * i, 8)[..., 0, 0]
            K = jnp.einsum("icp,pcm->pim", x1, by_position, precision="highest") / x1.shape[1]
            return lax.fori_loop(0, 8, lambda k, carry: row(8 * i + k, lambda a: (K[:, k, None],), carry), carry)
        start = ((jnp.zeros((n1, pairs), x1.dtype),) * states,
                 empty(stages, h, w, step, pairs, states, x1.dtype))
        end = jnp.minimum((block + 1) * wide, n1) if symmetric else n1
        if w == 1 and ending == "flatten":
            return lax.fori_loop(0, -(-end // 8), eight, start)[0]
        return lax.fori_loop(0, end, lambda i, carry: row(i, input_rows(by_image[0][i], x2), carry), start)[0]
    out = lax.map(columns, (jnp.arange(len(blocks[2])), blocks))  # (blocks, n1, pairs)
    out = tuple(y.reshape(-1, n1, mirrors, wide).transpose(1, 2, 0, 3).reshape(n1, mirrors, -1)[:, :, :n2]
                .reshape(n1, -1) for y in out)
    return out, by_image[2][:n1, 0], jnp.tile(blocks[2].reshape(-1)[:n2], mirrors)


def vectors(x1, x2, mirror):
    """K (n1, mirrors n2) of vectors, one position with d channels, and k(x, x) as `images` returns them.
    mirror: the mirror images of x2, where x2 is None of x1, as vectors; None for none of them."""
    def product(a, b):
        return jnp.matmul(a, b.T, precision="highest") / a.shape[1]

    def gram(x, y):  # k(x_i, y_j) = k(x_j, y_i): halves of halves, little more than half of the products
        if len(x) <= 512:
            return product(x, y)
        half = len(x) // 2
        corner = product(x[:half], y[half:])
        return jnp.block([[gram(x[:half], y[:half]), corner], [corner.T, gram(x[half:], y[half:])]])
    x1, x2, mirror = (x if x is None else x.reshape(len(x), -1) for x in (x1, x2, mirror))
    seconds = [x1 if x2 is None else x2] + ([] if mirror is None else [mirror])
    v1, v2 = ((x * x).mean(axis=1) for x in (x1, seconds[0]))
    K = jnp.concatenate([(gram if x2 is None else product)(x1, y) for y in seconds], axis=1)
    return (K,), v1, jnp.tile(v2, len(seconds))


def own_lengths(ending, x1, x2, out, v1, v2):
    """Means over all positions of sequences, made the sums over those that exist divided as in kernel.py."""
    share1, share2 = ((x != 0).any(axis=-1).mean(axis=(1, 2), dtype=x.dtype) ** (0.5 if ending == "flatten" else 1)
                      for x in (x1, x1 if x2 is None else x2))
    return [K / (share1[:, None] * share2[None]) for K in out], v1 / share1**2, v2 / share2**2


def scalars(layers, K, T, v1, v2):
    """K and T after the layers that follow; v1, v2: k(x, x) of rows and columns."""
    for layer in layers:
        if layer[0] in ELEMENTWISE:
            K, T = kernel.after(layer, K, T, jnp.sqrt(v1), jnp.sqrt(v2))
            v1, v2 = ({"relu": v / 2, "normalize": (v > 0).astype(v.dtype), "exp": v}[layer[0]] for v in (v1, v2))
        else:
            K, T = kernel.after(layer, K, T)
            v1, v2 = (layer[1]**2 * v + layer[2]**2 for v in (v1, v2))
    return K, T


def kernel_fn(name, kind, flips=False, **options):
    """`kernel.kernel_fn`, fast: same arguments, same results, same errors.

    flips: k(x, x') + k(x, f x') in place of k(x, x'), f x' being the mirror image of x' (augment.py).
    Raises ValueError also for a list of layers of another form than (conv, relu) and pool in any
    number, gap or flatten, then dense, relu, normalize and exp. Runs on one device, `tiles.gram` on all of them.
    """
    layers = kernel.network(name, **options)
    stages, ending, tail = parse(layers)
    kernel.chosen(kind, None, None)
    states, mirrors = 1 if kind in ("nngp", ("nngp",)) else 2, 1 + bool(flips)
    sequences = layers[0] == ("mask",)
    if sequences and flips:
        raise ValueError(f"flips with {name}: only images have mirror images")

    @jax.jit
    def fn(x1, x2=None):
        given = x1 if x2 is None else x2
        x1, x2 = kernel.as_pair(layers, x1, x2)
        if layers[sequences][0].endswith("flatten"):
            mirror = kernel.as_images(layers, augment.mirror(given)) if flips else None
            out, v1, v2 = vectors(x1, x2, mirror)
        else:
            full = any(layer[0] in ELEMENTWISE for layer in tail)
            out, v1, v2 = images(stages, ending, full, states, mirrors, sequences, x1, x2)
        if sequences:
            out, v1, v2 = own_lengths(ending, x1, x2, out, v1, v2)
        K, T = scalars(tail, out[0], out[1] if len(out) == 2 else jnp.zeros_like(out[0]), v1, v2)
        K, T = (sum(jnp.split(k, mirrors, axis=1)) for k in (K, T))
        if x2 is None:
            K, T = (jnp.triu(k) + jnp.triu(k, 1).T for k in (K, T))
        return kernel.chosen(kind, K, T)
    return fn
