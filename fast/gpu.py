"""One conv and one relu of fused.py as a single pass of a GPU.

XLA makes two kernels of `fused.conv_relu`, one for K and one for T, and both read all nine numbers (T: eighteen)
of each window. Here a program walks down the rows of a sheet, a strip of columns wide, and keeps the sums of the
last two rows in registers: three reads of K and three of T an element, one write of each.

    row i-1   . . .   their sum is kept        a program's strip: one column of the first image,
    row i     . . .   their sum is kept        WIDTH neighbours in the last axis, c' * pairs + pair,
    row i+1   . . .   were read a row ago      of the second: now K of row i can be finished
    row i+2   . . .   are read now, and arrive while that is done

Written in Pallas, which JAX hands to Triton. Without this file everything runs, more slowly.

Cost: 16 bytes of the GPU's memory an element (NNGP: 8) and about 100 operations.
Proved by: fast/test_fast.py, in Pallas' interpreter; on an H200 by hand (README.md)
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

import kernel

WIDTH, WARPS = 128, 1  # of a strip, at most; threads / 32 that share it
INTERPRET = False  # True: on a CPU, slowly, for tests


def conv_relu(source, target, first, second, w2_b2, k, a, step, tangent):
    """`fused.conv_relu` of layer k and sheet a: reads `source`, writes `target` in place, returns that.

    first, second, w2_b2: of all layers, as `fused.run_sheets` has them, first (convs, n, w, 1).
    """
    n, w, m = target.shape[1] - 2, target.shape[2] - 2, target.shape[3] - 2 * step
    width = min(WIDTH, m & -m)  # the largest power of two in m
    states, both = len(target), tangent and len(source) == 2

    def strip(source, k_a, w2_b2, std1, inverse1, std2, inverse2, _, target):
        column, start = pl.program_id(0), pl.program_id(1) * width
        k, a = k_a[0], k_a[1]
        w2, b2 = w2_b2[k, 0], w2_b2[k, 1]
        neighbours = pl.ds(start, width)

        def three(state, row):
            return tuple(source[state, row, column + d, pl.ds(d * step + start, width)]
                         for d in (range(3) if w > 1 else [1]))  # beside a sequence are zeros

        def one(row, carry):
            sums = tuple((above, here, sum(below)) for above, here, below in carry)
            ahead = tuple(three(state, jnp.minimum(row + 3, n + 1)) for state in range(len(carry)))
            K = w2 * sum(sums[0]) + b2
            second = k, a + row, column if std2.shape[2] > 1 else 0, neighbours
            scale = std1[k, row, column] * std2[second]
            kappa0, kappa1 = kernel.kappas(K * (inverse1[k, row, column] * inverse2[second]))
            place = row + 1, column + 1, pl.ds(step + start, width)
            target[(0, *place)] = scale * kappa1
            if states == 2:
                T = K + w2 * sum(sums[1]) if both else K
                target[(1, *place)] = jnp.where(scale > 0, kappa0 * T / 2, jnp.zeros_like(T))
            return tuple((here, below, taps) for (_, here, below), taps in zip(sums, ahead))
        lax.fori_loop(0, n, one, tuple((sum(three(state, 0)), sum(three(state, 1)), three(state, 2))
                                       for state in range(1 + both)))

    return pl.pallas_call(
        strip, out_shape=jax.ShapeDtypeStruct(target.shape, target.dtype), grid=(w, m // width),
        input_output_aliases={7: 0}, interpret=INTERPRET, compiler_params=triton.CompilerParams(num_warps=WARPS),
    )(source, jnp.stack([jnp.int32(k), jnp.int32(a)]), w2_b2, *(x[..., 0] for x in first), *second, target)
