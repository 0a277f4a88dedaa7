"""The kernels of kernel.py, a hundred times faster: K[p, q] is cut into sheets.

For two images of 32 x 32 pixels K[p, q] has 1024 x 1024 elements, p = (r, c) in the first and q = (r', c') in the second.
Fix the row offset a = r' - r modulo height + 1. All elements with the same a form one sheet:

         r'=0  1  2  3  -         sheet:  a=0  a=1  a=2  a=3  a=4
     r=0   A   B  C  D  .           r=0    A    B    C    D    .
       1   E   F  G  H  .             1    F    G    H    .    E       every letter is a (c, c')
       2   I   J  K  L  .             2    K    L    .    I    J       matrix; the dots are zero:
       3   M   N  O  P  .             3    P    .    M    N    O       rows outside the image
       -   .   .  .  .  .             -    .    .    .    .    .

Many second images lie side by side in the last axis of a sheet, at c' * pairs + pair, so that a processor's vectors are full
and every shift is aligned. The letters of this file:

  h, w    height and width of an image at the current resolution (a pool halves them); a sequence has w = 1
  n       rows of a sheet: h + 1, the last one zero          a   number of a sheet, 0 ... n - 1
  pairs   second images that are computed together, each with the same first image
  step    distance from c' to c' + 1 in the last axis: pairs, or 0 where only c = c' is kept
  m       length of the last axis: w * pairs, or pairs if step = 0. A sheet is an array (n, w, m).
  stages  for each resolution s the list of its convs, [(w_std, b_std), ...]; a pool starts the next
  states  1 for K alone, 2 for K and T

  conv     The window moves in both images together: F and its neighbours A and K stand one below the other in one sheet, and
           c and c' move down the diagonal of their matrices. So a conv never mixes two sheets, whatever the depth, and a
           window is nine shifted reads of one array. At the edge of either image it reads the zeros.
  relu     acts on each element, in the same pass: one read, one write. It multiplies by sqrt(v v'), which is zero outside
           the images: zeros stay zeros, and no mask is needed.
  pool     Columns: the mean over 2 x 2 blocks of each letter. Rows: the pooled letter (0, 0) is the mean of A, B, E and F,
           which lie in sheets 0, 1 and 4. A precomputed index table lists, for every row of every pooled sheet, the four
           rows that it averages.
  gap      is the sum over all elements of all sheets, divided by (h w)^2.
  flatten  needs p = q only. If no layer pools, the diagonals (c = c') of the letters in sheet 0 suffice.

On CPUs with a C++ compiler cpu.cpp takes the place of sheets and convs; on GPUs gpu.py takes that of one conv and relu.
A fully connected network is one matrix product and one pass over its result.
Sequences are images one position wide: a letter is a number, and a window is three reads. At padding, too, sqrt(v) is zero.

    python -c "from fast import fused; import numpy; print(fused.kernel_fn('cnn_gap', 'ntk')(numpy.ones((2, 8, 8, 3))))"

Cost of an entry: one kappa1 (NTK: and one kappa0) per element and relu, 3.35 million for Myrtle-10 on 32 x 32, and 6 % more
for the rows of zeros.          Proved by: fast/test_fast.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import augment
import kernel

try:
    from fast import cpu
except ImportError:  # cpu.py was deleted
    cpu = None

ELEMENTWISE = ("relu", "normalize", "exp")
SHEET = {"cpu": 2**18, "gpu": 2**25}  # elements of a sheet, all pairs: 1 MB stays in a CPU's cache; 128 MB on a GPU


def on_gpu():
    """Whether gpu.py replaces `conv_relu`. Imported only there: Pallas takes a fifth of a second."""
    if jax.default_backend() != "gpu":
        return False
    try:
        from fast import gpu  # noqa: F401
    except ImportError:  # gpu.py was deleted, or this JAX has no Triton backend: then XLA compiles for GPUs too
        return False
    return True


def on_cpu(dtype):
    """Whether cpu.py replaces `run_network`."""
    return cpu is not None and jax.default_backend() == "cpu" and dtype == jnp.float32 and bool(cpu.available())


def compiler(name, **options):
    """What compiles the convolutions of this network here, in float32: C++, Triton, or XLA, which compiles all else."""
    convs = any(layer[0].startswith("conv") for layer in kernel.network(name, **options))
    return "Triton" if convs and on_gpu() else "C++" if convs and on_cpu(jnp.float32) else "XLA"


def parse(layers):
    """A list of layers as (stages, ending, tail): the (w_std, b_std) of each (conv, relu), in one list for each resolution;
    "gap" or "flatten"; the layers after it.  Raises ValueError: the list has another form."""
    stages, rest = [[]], [layer for layer in layers if layer != ("mask",)]
    while rest and rest[0][0] in ("conv", "conv1d", "pool"):
        if rest[0][0] == "pool":
            stages.append([])
            rest = rest[1:]
        elif rest[1:2] == [("relu",)]:
            name, w_std, b_std = rest[0]  # w_std^2 is divided by 9 later, but a window of a sequence has 3 positions
            stages[-1].append((w_std * 3**0.5 if name == "conv1d" else w_std, b_std))
            rest = rest[2:]
        else:
            break
    names = [layer[0].removeprefix("seq_") for layer in rest]
    if names[:1] not in (["gap"], ["flatten"]) or set(names[1:]) - {"dense", *ELEMENTWISE}:
        raise ValueError("fused.py takes any number of (conv or conv1d, relu) and pool, then gap or flatten, then any of "
                         f"dense, relu, normalize and exp; this network continues with {names}: use kernel.kernel_fn instead")
    return stages, names[0], rest[1:]


def conv_relu(source, target, stds1, stds2, w2, b2, step, has_T):
    """One conv and one relu: reads the sheets in `source`, writes those in `target`, returns `target`.

    Both are (states, n + 2, w + 2, m + 2 step) with a border of zeros: K, or K and T.
    stds1, stds2: (std, 1 / std) of the first image and of the second images, broadcasting to (n, w, m), zero outside the
    image. std is multiplied by sqrt(1/2), which makes the 1/2 of a relu.   has_T: whether `source` holds a T; otherwise T = 0.
    """
    (std1, inverse1), (std2, inverse2) = stds1, stds2

    def window(x):
        n, w, m = x.shape[0] - 2, x.shape[1] - 2, x.shape[2] - 2 * step
        return sum(x[i:i + n, j:j + w, j * step:j * step + m]
                   for i in range(3) for j in (range(3) if w > 1 else [1]))  # left and right of a sequence are zeros
    K = w2 * window(source[0]) + b2
    kappa0, kappa1 = kernel.kappas(K * (inverse1 * inverse2))
    scale = std1 * std2
    if len(target) == 2:
        T = K + w2 * window(source[1]) if has_T else K
        target = write(target, 1, jnp.where(scale == 0, jnp.zeros_like(T), kappa0 * T / 2), step)
    return write(target, 0, scale * kappa1, step)


def write(sheets, k, value, step):
    """Writes `value` (n, w, m) inside the border of sheets[k]; XLA does it in place."""
    return lax.dynamic_update_slice(sheets, value[None], (k, 1, 1, step))


def coefficients(convs, dtype):
    """(w_std^2 / 9, b_std^2) of each conv, (convs, 2)."""
    return jnp.asarray(np.reshape([[w * w / 9, b * b] for w, b in convs], (-1, 2)), dtype)


def run_sheets(convs, initial_sheet, stds1, stds2, buffers, step, offsets, finish):
    """All convs and relus of one resolution, sheet by sheet: (stack of finish(sheet), buffers).

    initial_sheet(a): sheet a before the first conv, (K,) or (K, T).   stds1: (std, 1 / std), each (convs, n, w, 1 or m).
    stds2: likewise, each (convs, 2n, 1 or w, m): the rows appear twice, so that sheet a needs rows a ... a + n - 1.
    buffers: two arrays of sheets as in `conv_relu`, written in turn.
    offsets: (start, count), for the sheets start, start + 1, ... modulo n.
    """
    n, (start, count) = stds1[0].shape[1], offsets
    w2_b2 = coefficients(convs, stds1[0].dtype)

    def layer(k, a, source, target, has_T=True):
        if on_gpu() and stds1[0].shape[3] == 1:  # otherwise `prepare` pairs images with themselves, which is little work
            from fast import gpu
            return gpu.conv_relu(source, target, stds1, stds2, w2_b2, k, a, step, has_T)
        return conv_relu(source, target, [x[k] for x in stds1],
                         [lax.dynamic_slice_in_dim(x[k], a, n) for x in stds2],
                         w2_b2[k, 0], w2_b2[k, 1], step, has_T)

    def run_sheet(carry, _):
        i, (even, odd) = carry  # the buffers after an even and after an odd number of convs
        a = (i + start) % n if start else i
        initial = initial_sheet(a)
        for k, value in enumerate(initial):
            even = write(even, k, value, step)
        if convs:
            odd = layer(0, a, even, odd, has_T=len(initial) == 2)

            def two_layers(k, buffers):
                even = layer(2 * k + 1, a, buffers[1], buffers[0])
                return even, layer(2 * k + 2, a, even, buffers[1])
            even, odd = lax.fori_loop(0, (len(convs) - 1) // 2, two_layers, (even, odd))
            if len(convs) % 2 == 0:
                even = layer(len(convs) - 1, a, odd, even)
        last = odd if len(convs) % 2 else even
        return (i + 1, (even, odd)), tuple(
            finish(x[1:-1, 1:-1, step:x.shape[2] - step]) for x in last)
    (_, buffers), out = lax.scan(run_sheet, (jnp.int32(0), buffers), length=count)
    return out, buffers


def input_sheets(x1, x2):
    """`initial_sheet` of the input layer: mean over channels of x1 x2.  x1: (channels, n, w, 1 or m), x2: of `as_second`."""
    channels, n = x1.shape[:2]
    group = next(size for size in range(min(channels, 8), 0, -1) if channels % size == 0)  # channels added in one pass

    def initial_sheet(a):
        def add(g, total):
            return total + sum(x1[g * group + k] * lax.dynamic_slice_in_dim(x2[g * group + k], a, n)
                               for k in range(group))
        shape = jax.eval_shape(lambda: x1[0] * x2[0, :n])
        return (lax.fori_loop(0, channels // group, add, jnp.zeros_like(shape)) / channels,)
    return initial_sheet


def pooled_sheets(stacks, offsets):
    """The `initial_sheet` after a pool, from the stacks (sheets, n, ...) that `pool_columns` returned: the mean of the rows
    (2r, 2r'), (2r, 2r'+1), (2r+1, 2r'), (2r+1, 2r'+1), whichever sheet they are in."""
    n, (start, count) = stacks[0].shape[1], offsets
    position = np.zeros(n, int)  # of each sheet in a stack
    position[(start + np.arange(count)) % n] = np.arange(count)
    a, r = np.ogrid[:n // 2 + 1, :n // 2 + 1]
    r2 = (r + a) % (n // 2 + 1)  # r'
    table = np.stack([position[(2 * r2 + j - 2 * r - i) % n] * n + 2 * r + i
                      for i in (0, 1) for j in (0, 1)], axis=-1)
    table = np.where((np.maximum(r, r2) == n // 2)[..., None], n - 1, table)  # row n - 1 is zero

    def initial_sheet(a):
        four_rows = lax.dynamic_index_in_dim(jnp.asarray(table), a, keepdims=False)
        return tuple(sum(x.reshape((-1,) + x.shape[2:])[four_rows[:, k]] for k in range(4)) / 4
                     for x in stacks)
    return initial_sheet


def pool_columns(pairs):
    """A `finish` for `run_sheets`: the mean over 2 x 2 columns (c, c'), (n, w, w * pairs) -> (n, w/2, w/2 * pairs)."""
    def finish(x):
        n, w, _ = x.shape
        x = x.reshape(n, w, w, pairs)
        x = sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        return x.reshape(n, w // 2, w // 2 * pairs)
    return finish


def as_second(x, step):
    """Numbers of second images, (..., n, w, pairs), laid out as in a sheet: (..., 2n, 1 or w, m), the rows twice."""
    if step:
        x = x.reshape(*x.shape[:-2], 1, x.shape[-2] * x.shape[-1])
    return jnp.concatenate([x, x], axis=-3)


def diagonal(x, step):
    """The elements c = c' of a sheet: (n, w, m) -> (n, w, pairs)."""
    n, w, m = x.shape
    return x.reshape(n, w, w, m // w)[:, np.arange(w), np.arange(w)] if step else x


def deviations(convs, v, sequences):
    """(std, 1 / std) before each relu, each (convs, n, w, pairs): std times sqrt(1/2), both zero outside the image.

    v: variances before the first conv, (n, w, pairs); conv: v <- w_std^2 mean(v) + b_std^2; relu: v <- v / 2.
    sequences: whether positions with zero variance are padding."""
    n, w = v.shape[0] - 1, v.shape[1]
    outside = v[:-1] == 0 if sequences else jnp.zeros_like(v[:-1], bool)

    def conv_relu(v, conv):
        border = jnp.pad(v[:-1], ((1, 1), (1, 1), (0, 0)))
        v = conv[0] * sum(border[i:i + n, j:j + w] for i in range(3) for j in range(3)) + conv[1]
        v = jnp.pad(jnp.where(outside, jnp.zeros_like(v), v), ((0, 1), (0, 0), (0, 0)))
        return v / 2, jnp.sqrt(jnp.maximum(v, 0))
    _, stds = lax.scan(conv_relu, v, coefficients(convs, v.dtype))
    return stds * 0.5**0.5, jnp.where(stds > 0, 1 / jnp.where(stds > 0, stds, 1), 0)


def run_network(stages, ending, initial_sheet, stds_at, buffers, step, max_offset=None):
    """From `input_sheets` to gap or flatten: (K,) or (K, T), each (pairs,), and the buffers.

    stds_at(s, initial_sheet): stds1 and stds2 of `run_sheets` at resolution s.
    max_offset: at resolution s only the sheets at most max_offset[s] from sheet 0, on either side; by default all.
    """
    buffers = list(buffers)
    for s, convs in enumerate(stages):
        stds1, stds2 = stds_at(s, initial_sheet)
        n, w = stds1[0].shape[1:3]
        last = s == len(stages) - 1
        only_sheet_0 = last and ending == "flatten"
        most = n if max_offset is None else max_offset[s]
        offsets = (0, 1) if only_sheet_0 else (0, n) if 2 * most + 1 >= n else (n - most, 2 * most + 1)
        pairs = stds2[0].shape[-1] // (w if step else 1)

        def total(x):
            return (diagonal(x, step) if only_sheet_0 else x).reshape(-1, pairs).sum(axis=0)
        out, buffers[s] = run_sheets(convs, initial_sheet, stds1, stds2, buffers[s], step, offsets,
                                     total if last else pool_columns(pairs))
        initial_sheet = None if last else pooled_sheets(out, offsets)
    size = (n - 1) * w if only_sheet_0 else ((n - 1) * w)**2
    return tuple(x.sum(axis=0) / size for x in out), buffers


def prepare(stages, ending, full, sequences, step, x):
    """What every entry with one of the images x (pairs, h, w, channels) needs, computed once: x as (channels, n, w, pairs),
    its `deviations` at each resolution, and if `full` K of each image with itself, (pairs,).

    The variances after a pool are K[p, p] of an image with itself. They need only the 2^pools - 1 sheets on either side of
    sheet 0.
    """
    pairs, h, w, _ = x.shape
    x, stds = jnp.pad(x.transpose(3, 1, 2, 0), ((0, 0), (0, 1), (0, 0), (0, 0))), []

    def stds_at(s, initial_sheet):
        stds.append(deviations(stages[s], diagonal(initial_sheet(0)[0], step), sequences))
        return [[jnp.tile(y, (w >> s) if step else 1) for y in stds[-1]],
                [as_second(y, step) for y in stds[-1]]]
    max_offset = None if full else [2**k - 1 for k in reversed(range(len(stages)))]
    initial_sheet = input_sheets(jnp.tile(x, w if step else 1), as_second(x, step))
    buffers = empty(stages, h, w, step, pairs, 1, x.dtype)
    (K,), _ = run_network(stages, ending, initial_sheet, stds_at, buffers, step, max_offset)
    return x, stds, K


def empty(stages, h, w, step, pairs, states, dtype):
    """The buffers of each resolution, all zero: two arrays of `states` sheets with their borders."""
    shapes = [(states, (h >> s) + 3, (w >> s) + 2, ((w >> s) + 2) * step or pairs)
              for s in range(len(stages))]
    return [(jnp.zeros(shape, dtype),) * 2 for shape in shapes]


def block_side(n, most):
    """The side of the fewest equal blocks that cover n columns, a multiple of 8.   most: the largest, a multiple of 8."""
    side = -(-n // -(-n // most))
    return side + -side % 8


def images(stages, ending, full, states, mirrors, sequences, x1, x2):
    """K or (K, T) after gap or flatten, (n1, mirrors n2), and if `full` k(x, x) of the rows and of the columns.

    If x2 is None: of x1 with itself; only entries on and above the diagonal are right.   mirrors: 1, or 2 for the mirror
    images of x2 as n2 more columns; what is prepared for x2 is mirrored, not computed again.
    Columns are computed in blocks of `pairs` images, one block after the other, and in a block row by row.
    """
    symmetric, x2 = x2 is None, x1 if x2 is None else x2
    (n1, h, w, _), n2 = x1.shape, len(x2)
    only_diagonal = w == 1 or len(stages) == 1 and ending == "flatten"  # c = c': then stds are as large as a sheet
    most = max(kernel.on(SHEET) // (h * w * (8 if only_diagonal else w)) // 8 * 8, 8)
    compiled = on_cpu(x1.dtype)
    pairs = cpu.LANES if compiled else block_side(n2 * mirrors, most)
    per_block = pairs // mirrors  # images of x2

    def filled(x):  # up to a whole number of blocks
        return jnp.concatenate([x, jnp.broadcast_to(x[:1], (-len(x) % per_block, *x.shape[1:]))])
    step, inputs = 0 if only_diagonal else pairs, [filled(x2)] if symmetric else [filled(x2), filled(x1)]
    prepared = lax.map(lambda block: prepare(stages, ending, full, sequences, 0 if only_diagonal else per_block, block),
                       jnp.concatenate(inputs).reshape(-1, per_block, *x2.shape[1:]))  # of both in one program
    count = len(inputs[0]) // per_block
    blocks = jax.tree.map(lambda y: y[:count], prepared)
    by_image = jax.tree.map(  # (blocks, ..., per_block) -> (images, ..., 1)
        lambda y: jnp.moveaxis(y, -1, 1).reshape(len(y) * per_block, *y.shape[1:-1], 1),
        blocks if symmetric else jax.tree.map(lambda y: y[count:], prepared))

    firsts = jax.tree.map(lambda y: y[:n1, ..., 0], jax.vmap(cpu.pixels)(*by_image[:2])) if compiled else None

    def column_block(numbered):
        block, (x2, stds2, _) = numbered
        rows = jnp.minimum((block + 1) * per_block, n1) if symmetric else jnp.int32(n1)
        x2, stds2 = jax.tree.map(lambda y: jnp.concatenate([y, y[..., ::-1, :]][:mirrors], axis=-1), (x2, stds2))
        if compiled:
            w2_b2 = jnp.concatenate([coefficients(convs, x1.dtype) for convs in stages])
            return tuple(cpu.network(stages, ending, states, rows, firsts, cpu.pixels(x2, stds2), w2_b2))
        x2, stds2 = jax.tree.map(lambda y: as_second(y, step), (x2, stds2))

        def one_row(i, initial_sheet, carry):
            out, buffers = carry
            stds1 = jax.tree.map(lambda y: y[i], by_image[1])
            new, buffers = run_network(stages, ending, initial_sheet, lambda s, _: (stds1[s], stds2[s]), buffers, step)
            return tuple(o.at[i].set(k) for o, k in zip(out, new)), buffers

        by_position = x2[:, :h + 1, 0].swapaxes(0, 1)  # outside the loop: inside, XLA would copy it in every iteration

        def eight_rows(i, carry):  # of sequences: one matrix product at each position gives sheet 0 before the first conv
            x1 = lax.dynamic_slice_in_dim(by_image[0], 8 * i, 8)[..., 0, 0]
            K = jnp.einsum("icp,pcm->pim", x1, by_position, precision="highest") / x1.shape[1]
            return lax.fori_loop(0, 8, lambda k, carry: one_row(8 * i + k, lambda a: (K[:, k, None],), carry), carry)
        zeros = ((jnp.zeros((n1, pairs), x1.dtype),) * states,
                 empty(stages, h, w, step, pairs, states, x1.dtype))
        if w == mirrors == 1 and ending == "flatten":  # the last eight may reach beyond n1: those rows are dropped
            return lax.fori_loop(0, -(-rows // 8), eight_rows, zeros)[0]
        return lax.fori_loop(0, rows, lambda i, carry: one_row(i, input_sheets(by_image[0][i], x2), carry), zeros)[0]
    out = lax.map(column_block, (jnp.arange(len(blocks[2]), dtype=jnp.int32), blocks))  # (blocks, n1, pairs) each
    out = tuple(y.reshape(-1, n1, mirrors, per_block).transpose(1, 2, 0, 3).reshape(n1, mirrors, -1)[:, :, :n2]
                .reshape(n1, -1) for y in out)
    return out, by_image[2][:n1, 0], jnp.tile(blocks[2].reshape(-1)[:n2], mirrors)


def vectors(x1, x2, mirror):
    """K (n1, mirrors n2) of vectors, one position with d channels each, and k(x, x) as `images` returns them.

    mirror: the mirror images of x2 (of x1 if x2 is None) as vectors; None: no mirror images."""
    def product(a, b):
        return jnp.matmul(a, b.T, precision="highest") / a.shape[1]

    def gram(x, y):  # symmetric: k(x_i, y_j) = k(x_j, y_i). Halving again and again saves nearly half of the products
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
    """Means over all positions of padded sequences, turned into those of proteins/layers.py: the sum is divided by l l' (gap)
    or sqrt(l l') (flatten), where l and l' count the positions that are not padding."""
    share1, share2 = ((x != 0).any(axis=-1).mean(axis=(1, 2), dtype=x.dtype) ** (0.5 if ending == "flatten" else 1)
                      for x in (x1, x1 if x2 is None else x2))
    return [K / (share1[:, None] * share2[None]) for K in out], v1 / share1**2, v2 / share2**2


def scalars(layers, K, T, v1, v2):
    """K and T after the layers that follow gap or flatten.  v1, v2: k(x, x) of rows and of columns."""
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

    flips: k(x, x') + k(x, x'*) in place of k(x, x'), where x'* is the mirror image of x' (augment.py).
    Raises ValueError also if a list of layers is not (conv, relu) and pool in any number, then gap or flatten, then any of
    dense, relu, normalize and exp.   Runs on one device; `tiles.gram` uses all of them.
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
