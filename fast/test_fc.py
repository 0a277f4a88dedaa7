"""K v of a fully connected network by fc.cpp.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

import time
from concurrent.futures import ThreadPoolExecutor

from test_all import inputs, reference, train  # isort: skip
import jax
import numpy as np
import pytest

import kernel
import tiles
from fast import cpu, fc, fused
from large import on_the_fly

both_kinds = pytest.mark.parametrize("kind", kernel.KINDS)
pytestmark = pytest.mark.skipif(cpu.compiler() is None, reason="there is no C++ compiler")


@both_kinds
def test_fc_is_neural_tangents(kind):
    """The kernel matrix that fc.cpp multiplies, entry by entry, is neural_tangents' to the rounding of float32, with one
    hidden layer and with three, with biases and without, for an input of zeros too."""
    x, x2 = inputs(37).copy(), inputs(107)[37:]
    x[3] = 0
    for options in ({"depth": 1}, {"depth": 3, "w_std": 1.3, "b_std": 0.4}):
        net = fc.network(kernel.network("fc", **options), kind)
        one, two = net.rows(x), net.columns(x2)
        K, KT = net.product(one, two, np.eye(70), np.eye(37, 70))
        expected = reference("fc", kind, x.astype(np.float64), x2.astype(np.float64), **options)
        assert np.abs(K - expected).max() < 1e-6 * np.abs(expected).max() and np.array_equal(K, KT[:, :37].T)


@pytest.mark.parametrize("columns", [1, 10, 23])
def test_fc_products_are_those_of_its_matrix(columns):
    """Any number of rows and columns: the products with v from both sides are NumPy's with the matrix itself, in float64."""
    net, rng = fc.network(kernel.network("fc"), "nngp"), np.random.default_rng(columns)
    for n, m in ((1, 1), (25, 257), (100, 300), (49, 512)):
        x, x2 = (rng.normal(size=(rows, 7)).astype(np.float32) for rows in (n, m))
        v, v2, one, two = rng.normal(size=(n, columns)), rng.normal(size=(m, columns)), net.rows(x), net.columns(x2)
        K, _ = net.product(one, two, np.eye(m))
        y, y2 = net.product(one, two, v2.T, v)
        assert np.allclose(y, K @ v2, rtol=1e-12, atol=1e-12 * np.abs(K).sum())
        assert np.allclose(y2, K.T @ v, rtol=1e-12, atol=1e-12 * np.abs(K).sum())
        assert np.array_equal(net.product(one, two, v2.T)[0], y) and net.product(one, two, v2.T)[1] is None


@both_kinds
def test_fc_on_the_fly(kind):
    """A matrix kept nowhere that fc.cpp multiplies is the one that is kept, for tiles of any size, on one device and on four,
    and exactly symmetric."""
    layers, x, v = kernel.network("fc", 2), inputs(130), np.random.default_rng(0).normal(size=(130, 10))
    fn = kernel.compiled(fused.kernel_fn, tuple(layers), kind)
    kept = tiles.gram(fn, x, 64, quiet=True)
    for tile, devices in ((64, jax.local_devices()[:1]), (33, None), (200, None)):
        K = on_the_fly.matrix(fn, x, None, tile, devices, quiet=True, network=(layers, kind))
        assert K.native and np.linalg.norm(K.matvec(v) - kept.matvec(v)) < 1e-6 * np.linalg.norm(kept.matvec(v))
        dense = K.matvec(np.eye(130))
        assert np.array_equal(dense, dense.T) and K.leading(70).matvec(v[:70]).shape == (70, 10)
        assert np.allclose(K.leading(70).matvec(v[:70]), dense[:70, :70] @ v[:70], rtol=1e-9, atol=1e-9)
    cross = on_the_fly.matrix(fn, x[:40], x, 33, quiet=True, network=(layers, kind))
    assert np.allclose(cross.matvec(v), dense[:40] @ v, rtol=1e-5, atol=1e-5 * np.abs(dense).max())


def test_fc_of_a_run(tmp_path, monkeypatch):
    """A run with --store none calls fc.cpp, and says what a run with K in memory says; NaN in an image is still found."""
    calls, product = [], fc.Network.product
    monkeypatch.setattr(fc.Network, "product", lambda *args: calls.append(1) or product(*args))
    flags = ["--n_train", "60", "--n_test", "30", "--ridge", "0.01", "--depth", "2"]
    kept = train(tmp_path, *flags)
    assert not calls
    nowhere = train(tmp_path, *flags, "--store", "none")
    assert calls and abs(nowhere["test_mse"] / kept["test_mse"] - 1) < 1e-5
    assert (kept["compiler"], nowhere["compiler"]) == ("XLA", "C++")
    x = inputs(20).copy()
    x[7] = np.nan
    bad = on_the_fly.matrix(kernel.kernel_fn("fc", "nngp"), x, quiet=True, network=(kernel.network("fc"), "nngp"))
    with pytest.raises(ValueError, match="not finite"):
        bad.matvec(np.ones((20, 1)))


def test_fc_leaves_other_networks_alone():
    """Networks that are not dense and relu in turn, kinds in one pass, and symmetric flips are left to XLA."""
    for layers in (kernel.network("cnn_vec"), kernel.network("fc", head="relu"), [("flatten",), ("dense", 1.0, 0.0)]):
        assert fc.network(layers, "nngp") is None
    assert fc.network(kernel.network("fc"), ("nngp", "ntk")) is None


def test_benchmark_fc(benchmark):
    """K v on the fly as a share of its floor, the matrix product and kappa1 of as many entries by fc.cpp without a column of
    v: median of seven turns. n = 49,152, 64 numbers an input, ten columns, every core."""
    if benchmark.disabled:
        pytest.skip("timed only with --benchmark-only; its correctness is tested above")
    n, side, count = 24 * 2048, 2048, 300
    x, v = np.random.default_rng(0).standard_normal((n, 64), np.float32), np.random.default_rng(1).standard_normal((n, 10))
    K = on_the_fly.matrix(kernel.kernel_fn("fc", "nngp"), x, None, side, None, True, network=(kernel.network("fc"), "nngp"))
    one, two = K.native.rows(x[:side]), K.native.columns(x[side:2 * side])

    def floor():
        with ThreadPoolExecutor(tiles.cores()) as pool:
            list(pool.map(lambda _: K.native.product(one, two, np.zeros((0, side)), np.zeros((side, 0))), range(count)))

    def turn():
        times = []
        for call, entries in ((lambda: K.matvec(v), K.entries), (floor, count * side**2)):
            start = time.perf_counter()
            call()
            times.append(1e9 * (time.perf_counter() - start) / entries)
        return times
    turn()
    turns = np.array(benchmark.pedantic(lambda: [turn() for _ in range(7)], rounds=1))
    whole, alone = np.median(turns, axis=0)
    share = np.median(turns[:, 1] / turns[:, 0])
    benchmark.extra_info.update(ns_an_entry=whole, floor_ns=alone, share=share)
    print(f"K v {whole:.2f} ns an entry, floor {alone:.2f} ns, median of their ratios {share:.2f}")
