"""One conv and one relu of fused.py in a single pass on a GPU.

XLA makes two GPU kernels of `fused.conv_relu`, one for K and one for T, and both read all nine elements (T: eighteen) of each
window. Here one program walks down the rows of a sheet, in a strip of columns, and keeps the sums of the last two rows in
registers. For each element it reads three of K and three of T, and writes one of each. Letters as in fused.py.

    row r-1   . . .   its sum is in registers           a program's strip: one column of the first image,
    row r     . . .   its sum is in registers           and up to WIDTH neighbours in the last axis,
    row r+1   . . .   was read one row ago              c' * pairs + pair: now K of row r can be computed
    row r+2   . . .   is being read meanwhile

Written in Pallas, which JAX compiles with Triton. Without this file everything runs, only slower.

Cost: 16 bytes of GPU memory traffic per element (NNGP: 8) and about 100 operations.
Proved by: fast/test_fast.py, in Pallas' interpreter; run on one H200, where every kernel agreed to 1e-6
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

import kernel

WIDTH, WARPS = 128, 1  # elements of a strip's row, at most; groups of 32 threads that share it
INTERPRET = False  # True: interpret on a CPU, slowly, for tests


def conv_relu(source, target, stds1, stds2, w2_b2, k, a, step, has_T):
    """`fused.conv_relu` for conv k and sheet a: reads `source`, writes `target` in place, returns it.

    stds1, stds2, w2_b2: of all convs, as in `fused.run_sheets`; stds1 is (convs, n, w, 1) twice.
    """
    n, w, m = target.shape[1] - 2, target.shape[2] - 2, target.shape[3] - 2 * step
    width = min(WIDTH, m & -m)  # m & -m: the largest power of two that divides m
    states, reads_T = len(target), has_T and len(source) == 2

    def strip(source, k_a, w2_b2, std1, inverse1, std2, inverse2, _, target):
        column, start = pl.program_id(0), pl.program_id(1) * width
        k, a = k_a[0], k_a[1]
        w2, b2 = w2_b2[k, 0], w2_b2[k, 1]
        neighbours = pl.ds(start, width)

        def three_columns(state, row):
            return tuple(source[state, row, column + d, pl.ds(d * step + start, width)]
                         for d in (range(3) if w > 1 else [1]))  # left and right of a sequence are zeros

        def one_row(row, carry):
            sums = tuple((above, here, sum(below)) for above, here, below in carry)
            ahead = tuple(three_columns(state, jnp.minimum(row + 3, n + 1)) for state in range(len(carry)))
            K = w2 * sum(sums[0]) + b2
            index2 = k, a + row, column if std2.shape[2] > 1 else 0, neighbours
            scale = std1[k, row, column] * std2[index2]
            kappa0, kappa1 = kernel.kappas(K * (inverse1[k, row, column] * inverse2[index2]))
            place = row + 1, column + 1, pl.ds(step + start, width)
            target[(0, *place)] = scale * kappa1
            if states == 2:
                T = K + w2 * sum(sums[1]) if reads_T else K
                target[(1, *place)] = jnp.where(scale == 0, jnp.zeros_like(T), kappa0 * T / 2)
            return tuple((here, below, values) for (_, here, below), values in zip(sums, ahead))
        lax.fori_loop(0, n, one_row, tuple((sum(three_columns(state, 0)), sum(three_columns(state, 1)),
                                            three_columns(state, 2)) for state in range(1 + reads_T)))

    return pl.pallas_call(
        strip, out_shape=jax.ShapeDtypeStruct(target.shape, target.dtype), grid=(w, m // width),
        input_output_aliases={7: 0}, interpret=INTERPRET, compiler_params=triton.CompilerParams(num_warps=WARPS),
    )(source, jnp.stack([jnp.int32(k), jnp.int32(a)]), w2_b2, *(x[..., 0] for x in stds1), *stds2, target)
