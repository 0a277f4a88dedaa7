"""The kernels of fast/ equal those of kernel.py.

Each test states its claim in its first line. test_all.py sets up JAX, so it is imported first.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys

from test_all import (  # isort: skip
    HERE, POOLED, cifar, images, needs_cifar, network_id, optimised, reference, relative_error,
)
import jax
import numpy as np
import pytest

import augment
import kernel
import train_cifar
from fast import cpu, fused, gpu

# ----------------------------------------------------------------------------------------- kernel

def plain(name, x1, x2=None, **options):
    """NNGP and NTK by the formulas at the top of kernel.py, in NumPy and float64: it costs no compiling.

    K[image, image', p, q] for all pairs of positions, (n1, n2, h, w, h, w), also where a network reads p = q only."""
    layers, (x1, x2) = kernel.network(name, **options), (np.asarray(x, np.float64) for x in (x1, x1 if x2 is None else x2))
    if layers[0] == ("flatten",):
        x1, x2 = (x.reshape(len(x), 1, 1, -1) for x in (x1, x2))
    K = np.einsum("aijc,bklc->abijkl", x1, x2, optimize=True) / x1.shape[-1]
    T, selves = np.zeros_like(K), [np.einsum("aijc,aklc->aijkl", x, x, optimize=True) / x.shape[-1] for x in (x1, x2)]

    def mean(k):
        h, w = k.shape[-2:]
        if layer[0] == "conv":
            padded = np.pad(k, [(0, 0)] * (k.ndim - 4) + [(1, 1)] * 4)
            return sum(padded[..., i:i + h, j:j + w, i:i + h, j:j + w] for i in range(3) for j in range(3)) / 9
        if layer[0] == "pool":
            return sum(k[..., a::2, b::2, c::2, d::2] for a, b, c, d in np.ndindex(2, 2, 2, 2)) / 16
        if layer[0] == "flatten":
            return np.einsum("...ijij->...", k)[..., None, None, None, None] / (h * w)
        return k.mean(axis=(-4, -3, -2, -1), keepdims=True) if layer[0] == "gap" else k

    def activation(K, T, std1, std2):
        scale = std1[..., None, None] * std2[..., None, None, :, :]
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        c = K * inverse
        if layer[0] == "normalize":
            return c, T * inverse
        if layer[0] == "exp":
            E = np.exp(layer[1] * (c - 1))
            return scale * E, layer[1] * E * T
        t = 1 - np.abs(c)
        t[t < 16 * np.finfo(float).eps] = 0  # as in kernel.kappas: the slope of kappa0 is infinite there
        angle = 2 * np.arcsin(np.sqrt(t / 2))  # arccos |c|
        c, angle = np.copysign(1 - t, c), np.where(c < 0, angle, np.pi - angle)
        return scale * (np.sqrt(t * (2 - t)) + angle * c) / (2 * np.pi), angle / np.pi * T / 2

    for layer in layers:
        if layer[0] in ("conv", "dense"):
            K, *selves = (layer[1]**2 * mean(k) + layer[2]**2 for k in (K, *selves))
            T = K + layer[1]**2 * mean(T)
        elif layer[0] in ("relu", "normalize", "exp"):
            std1, std2 = stds = [np.sqrt(np.einsum("aijij->aij", k)) for k in selves]
            K, T = activation(K, T, std1[:, None], std2[None])
            selves = [activation(k, k, std, std)[0] for k, std in zip(selves, stds)]
        else:
            K, T, *selves = map(mean, (K, T, *selves))
    return K[:, :, 0, 0, 0, 0], T[:, :, 0, 0, 0, 0]


@pytest.mark.parametrize("name, head", [("fc", "cosine"), ("fc", "relu"), ("fc", "exp"), ("pooled", "exp"),
                                        ("cnn_vec", "relu")])
def test_kernel_heads_are_neural_tangents(name, head):
    """The heads cosine, relu and exp, in kernel.py and in fused.py, with and without mirror images: between different images
    NNGP and NTK equal those of stax.LayerNorm, Relu and ExpNormalized to 1e-10; k(x, x) is the same for all x. kernel.py
    equals `plain`, with which other tests compare, to 1e-12 for every layer of images."""
    x, layers = images(np.random.default_rng(0), 5, (4, 4, 2)), kernel.network(
        "cnn_gap" if name == "pooled" else name, 1, 1.3, 0.2, head, 1.7)
    layers[2:2] = [("pool",)] * (name == "pooled")
    fn = kernel.kernel_fn(layers, kernel.KINDS)

    def found(x1, x2=None):  # one shape, compiled once
        return fn(x1, x1 if x2 is None else x2)
    a, b = x[:2], x[2:]
    for got, fast, by_numpy, want in zip(found(x), fused.kernel_fn(layers, kernel.KINDS)(a, b), plain(layers, x),
                                         reference(layers, kernel.KINDS, a, b)):
        assert np.allclose(got[:2, 2:], want, rtol=1e-10, atol=1e-12) and np.allclose(fast, want, rtol=1e-10, atol=1e-12)
        assert relative_error(got, by_numpy) < 1e-12
    half = augment.symmetric(found)(x)
    for got, want in zip(fused.kernel_fn(layers, kernel.KINDS, flips=True)(x), half):
        assert np.allclose(got, want, rtol=1e-10, atol=1e-12)
    assert np.ptp(np.diag(found(x)[0])) < 1e-12


# ------------------------------------------------------------------------------------------ fused

def both(name, x1, x2=None, **options):
    """NNGP and NTK of fused.py in float32 and of `plain` in float64: [(fast, exact), ...]."""
    x1, x2 = (None if x is None else np.asarray(x, np.float32) for x in (x1, x2))
    fast = fused.kernel_fn(name, kernel.KINDS, **options)(x1, x2)
    assert all(K.dtype == np.float32 for K in fast)
    return list(zip(fast, plain(name, x1, x2, **options)))


needs_compiler = pytest.mark.skipif(cpu.compiler() is None, reason="there is no C++ compiler")
by_both = pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False], ids=["C++", "XLA"])


def use(compiled, monkeypatch):
    """Lets cpu.cpp compute the convolutions, or XLA.  Returns a list that grows when cpu.network is called."""
    calls, network = [], cpu.network
    monkeypatch.setattr(cpu, "network", lambda *rest: calls.append(1) or network(*rest))
    if not compiled:
        monkeypatch.setattr(fused, "cpu", None)
    return calls


CASES = {"fc": ((5, 3, 2), {}), "cnn_vec": ((5, 3, 2), {"w_std": 1.2, "b_std": 0.3}),
         "cnn_gap": ((8, 8, 1), {"w_std": 1.2, "b_std": 0.3, "depth": 3}), "myrtle10": ((12, 8, 11), {"b_std": 0.3})}


@pytest.mark.parametrize("name, compiled", [("fc", False), ("cnn_vec", False), ("cnn_gap", False), *(
    pytest.param(name, True, marks=needs_compiler) for name in ("cnn_vec", "cnn_gap", "myrtle10"))])
def test_fused_is_kernel(name, compiled, monkeypatch):
    """fused.py equals kernel.py, to 1e-5 in float32 and 1e-12 in float64, for any image shape, number of channels, w_std and
    b_std, also for opposite, nearly black, identical and flipped images."""
    calls, (shape, options) = use(compiled, monkeypatch), CASES[name]
    x = images(np.random.default_rng(0), 9, shape).astype(np.float32)
    x[4], x[5] = x[3], x[3][:, ::-1]
    exact = plain(name, x, x[2:], **options)
    # XLA: float64 where only p = q is kept, float32 where pairs are; test_fused_symmetry_and_blocks and _flips have the others
    dtypes = {("fc", False): (np.float32, float), ("cnn_vec", False): (float,)}.get((name, compiled), (np.float32,))
    for dtype in dtypes:
        fn = optimised(fused.kernel_fn(name, kernel.KINDS, **options))
        for fast, want in zip(fn(x.astype(dtype), x[2:].astype(dtype)), exact):
            assert fast.dtype == dtype and relative_error(fast, want) < (1e-5 if dtype == np.float32 else 1e-12)
    assert bool(calls) == compiled


@pytest.mark.parametrize("name", ["fc", "cnn_gap"])
def test_fused_black_images(name):
    """Every entry of a black image is finite: zero without biases, equal to kernel.py with biases."""
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 1))
    x[1] = 0
    for fast, exact in both(name, x, b_std=0.5, depth=2):
        assert relative_error(fast, exact) < 1e-5
    for K in fused.kernel_fn(name, kernel.KINDS, depth=2)(x):
        assert np.isfinite(K).all() and not K[1].any()


@needs_cifar
@pytest.mark.parametrize("name, n", [("cnn_vec", 20), ("myrtle10", 2)])
def test_fused_on_cifar(name, n):
    """fused.py equals kernel.py to 1e-5 on CIFAR-10, also for an image with itself and with its mirror image."""
    x = cifar(20)[0][:n].astype(np.float64)
    x1, x2 = x[:-1], np.concatenate([x, x[:1, :, ::-1]])
    exact = plain(name, x1, x2) if name == "myrtle10" else kernel.kernel_fn(name, kernel.KINDS)(x1, x2)
    fn = optimised(fused.kernel_fn(name, kernel.KINDS))
    for fast, want in zip(fn(x1.astype(np.float32), x2.astype(np.float32)), exact):
        assert fast.dtype == np.float32 and relative_error(fast, want) < 1e-5


def test_fused_on_64_by_64(monkeypatch):
    """fused.py equals kernel.py to 1e-6 on images of 64 x 64, by C++ and by XLA: the mean over 16.8 million pairs of pixels
    does not gather rounding."""
    x1, x2 = np.random.default_rng(0).normal(size=(2, 1, 64, 64, 3)).astype(np.float32)
    layers = [("conv", 2**0.5, 0.0), ("relu",), ("pool",), ("gap",), ("dense", 1.0, 0.0)]
    exact = optimised(kernel.kernel_fn(layers, kernel.KINDS))(x1.astype(np.float64), x2.astype(np.float64))
    for compiled in (True, False) if cpu.compiler() else (False,):
        with monkeypatch.context() as patch:
            calls = use(compiled, patch)
            for fast, want in zip(optimised(fused.kernel_fn(layers, kernel.KINDS))(x1, x2), exact):
                assert fast.dtype == np.float32 and relative_error(fast, want) < 1e-6
            assert bool(calls) == compiled


@by_both
@pytest.mark.parametrize("name, sizes, options", [("fc", (1, 1300), {}), ("cnn_vec", (1, 19), {"depth": 3}),
                                                  (POOLED, (19,), {})], ids=network_id)
def test_fused_symmetry_and_blocks(name, sizes, options, compiled, monkeypatch):
    """fn(x) is symmetric to the last bit and equals fn(x, x) up to rounding, diagonal included, also where the columns
    fill several blocks, for any number of rows."""
    if compiled and name == "fc":
        pytest.skip("fc has no convolutions")
    use(compiled, monkeypatch)
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns, by cpu.cpp of 16
    fn = optimised(fused.kernel_fn(name, "ntk", **options))
    for n in sizes:
        x = np.random.default_rng(n).normal(size=(n, 8, 4, 3)).astype(np.float32)
        K = np.asarray(fn(x))
        assert K.shape == (n, n) and K.dtype == np.float32 and np.array_equal(K, K.T)
    assert relative_error(K, np.asarray(fused.kernel_fn(name, "ntk", **options)(x, x))) < 1e-5
    assert relative_error(K, plain(name, x, **options)[1]) < 1e-5


@pytest.mark.parametrize("engine, name", [(fused, "fc"), (fused, "cnn_vec"), (kernel, "fc")],
                         ids=["vectors", "sheets", "kernel.py"])
def test_fused_both_kinds_in_one_pass(engine, name):
    """A tuple of kinds gives a tuple of matrices in the same order, each equal to that kind computed alone."""
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 3))
    alone = {kind: np.asarray(engine.kernel_fn(name, kind, depth=1)(x, x[:2])) for kind in kernel.KINDS}
    assert all(relative_error(alone[kind], K) < 1e-12 for kind, K in zip(kernel.KINDS, plain(name, x, x[:2], depth=1)))
    for kinds in (("ntk", "nngp"), ("nngp",)):
        together = engine.kernel_fn(name, kinds, depth=1)(x, x[:2])
        assert isinstance(together, tuple) and len(together) == len(kinds)
        for kind, K in zip(kinds, together):
            assert relative_error(K, alone[kind]) < 1e-12


@pytest.mark.parametrize("name, shape", [("fc", (4, 3, 2)), ("cnn_vec", (5, 3, 2)), (POOLED, (4, 6, 1))], ids=network_id)
def test_fused_flips(name, shape, monkeypatch):
    """flips=True equals augment.symmetric of kernel.py, to 1e-5 in float32 and 1e-12 in float64, for two sets of images and
    for one set, whose matrix is symmetric to the last bit. It also holds where images fill several blocks of columns, and
    with a relu after gap or flatten, which is not linear."""
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 4 images and their mirror images
    x = images(np.random.default_rng(0), 11, shape)
    layers = [*POOLED, ("relu",), ("dense", 1.1, 0.3)] if name is POOLED else kernel.network(name, depth=2, b_std=0.2)
    fast = fused.kernel_fn(layers, kernel.KINDS, flips=True)
    exact = augment.symmetric(functools.partial(plain, layers))
    cases = [(x[3:], float, 1e-12, fast), (None, float, 1e-12, optimised(fast)), (None, np.float32, 1e-5, optimised(fast))]
    for x2, dtype, tolerance, fn in cases:
        for K, K_exact in zip(fn(x.astype(dtype), x2), exact(x, x2)):
            assert K.dtype == dtype and relative_error(K, K_exact) < tolerance and K.shape == K_exact.shape
            assert x2 is not None or np.array_equal(K, K.T)


def test_fused_flips_of_one_column():
    """flips=True holds also where images are one pixel wide, and each is its own mirror image."""
    x = np.random.default_rng(0).normal(size=(12, 6, 1, 2))
    K = fused.kernel_fn("cnn_vec", "nngp", flips=True, depth=1)(x)
    assert relative_error(K, 2 * plain("cnn_vec", x, depth=1)[0]) < 1e-12


@pytest.mark.parametrize("name, flips", [("cnn_vec", False), (POOLED, True)], ids=network_id)
def test_fused_on_a_gpu(name, flips, monkeypatch):
    """gpu.py in Pallas' interpreter equals kernel.py, to 1e-5 in float32 and 1e-12 in float64, with biases, for images that
    are not square and fill several blocks of columns."""
    x = images(np.random.default_rng(0), 9, (4, 6, 2))
    layers = kernel.network(name, b_std=0.3, depth=2) if isinstance(name, str) else [("conv", 0.9, 0.1), ("relu",), *name]
    exact = functools.partial(plain, layers)
    exact = (augment.symmetric(exact) if flips else exact)(x, x[2:])
    monkeypatch.setattr(fused, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "INTERPRET", True)
    monkeypatch.setattr(fused, "conv_relu", in_prepare_only(fused.conv_relu))
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns
    for kinds, dtype, tolerance in ((kernel.KINDS, np.float32, 1e-5), (("nngp",), np.float32, 1e-5),
                                    (kernel.KINDS, float, 1e-12)):
        fast = fused.kernel_fn(layers, kinds, flips=flips)(x.astype(dtype), x[2:].astype(dtype))
        for K, K_exact in zip(fast, exact):
            assert K.dtype == dtype and relative_error(K, K_exact) < tolerance


def in_prepare_only(conv_relu):
    """`fused.conv_relu`, but it fails on pairs of different images: gpu.py should have computed those."""
    def checked(source, target, stds1, *rest):
        assert stds1[0].shape[2] > 1
        return conv_relu(source, target, stds1, *rest)
    return checked


@by_both
@pytest.mark.parametrize("tail", [
    [("pool",), ("conv", 1.5, 0.1), ("relu",), ("flatten",), ("dense", 1.2, 0.1), ("relu",)],
    [("conv", 0.9, 0.0), ("relu",), ("pool",), ("pool",), ("gap",), ("dense", 1.2, 0.1), ("relu",), ("dense", 1.0, 0.2)],
], ids=lambda tail: "-".join(layer[0] for layer in tail))
def test_fused_takes_lists_of_layers(tail, compiled, monkeypatch):
    """Lists of layers that no name stands for work too: flatten after a pool, two pools in a row, relus at the end, a
    different w_std and b_std in each layer."""
    use(compiled, monkeypatch)
    layers = [("conv", 1.1, 0.2), ("relu",), *tail]
    x = np.random.default_rng(0).normal(size=(3, 8, 4, 2))
    for fast, exact in both(layers, x):
        assert relative_error(fast, exact) < 1e-5


@pytest.mark.parametrize("layers", [[("dense", 1.0, 0.0), ("gap",)], [("conv", 1.0, 0.0), ("gap",)],
                                    [("relu",), ("gap",)]])
def test_fused_refuses(layers):
    """A list of another form is refused at once, and the message says which function to use instead."""
    with pytest.raises(ValueError, match="this network continues with .* use kernel.kernel_fn instead"):
        fused.kernel_fn(layers, "nngp")
    with pytest.raises(ValueError, match="kind 'mean' is unknown"):
        fused.kernel_fn("cnn_gap", "mean")
    with pytest.raises(ValueError, match="images are 8x6"):
        fused.kernel_fn("myrtle5", "nngp")(np.ones((1, 8, 6, 3)))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_fused_keeps_nan(compiled, monkeypatch):
    """NaN in an image is NaN in the NTK of a network that ends without a dense layer, which would add K to it."""
    use(compiled, monkeypatch)
    x = np.ones((3, 8, 8, 1), np.float32)
    x[1, 2, 2, 0] = np.nan
    K = fused.kernel_fn([("conv", 1.4, 0.0), ("relu",), ("conv", 1.4, 0.0), ("relu",), ("gap",)], "ntk")(x, x)
    assert np.array_equal(np.isnan(K), np.logical_or.outer([False, True, False], [False, True, False]))


@needs_compiler
@pytest.mark.parametrize("layers, shape, alone", [
    ([("pool",), ("conv", 1.3, 0.1), ("relu",), ("pool",), ("pool",), ("conv", 0.8, 0.4), ("relu",), ("flatten",),
      ("dense", 1.0, 0.0)], (8, 16), True),
    ([("conv", 1.3, 0.1), ("relu",), ("pool",), ("pool",), ("conv", 1.1, 0.1), ("relu",), ("gap",), ("dense", 1.0, 0.0)],
     (8, 4), False)], ids=["pools and flatten", "one pixel wide"])
def test_fused_on_a_cpu(layers, shape, alone, monkeypatch):
    """cpu.cpp equals kernel.py to 1e-5: NNGP alone, the NTK, images that fill two vectors of 16 in part, mirror images, a pool
    before the first conv, flatten after pools, images that end one pixel wide. NaN in an image is NaN in its row alone."""
    calls, x = use(True, monkeypatch), np.random.default_rng(0).normal(size=(20, *shape, 2)).astype(np.float32)
    exact = np.asarray(plain(layers, x[:3], np.concatenate([x[1:], augment.mirror(x[1:])]))).reshape(2, 3, 2, 19)
    fn = {flips: fused.kernel_fn(layers, kernel.KINDS, flips=flips) for flips in ((False, True) if alone else (True,))}
    for flips, kernel_fn in fn.items():
        for K, K_exact in zip(kernel_fn(x[:3], x[1:]), exact):
            assert relative_error(K, K_exact[:, :1 + flips].sum(axis=1)) < 1e-5
    if alone:
        assert relative_error(fused.kernel_fn(layers, "nngp")(x[:3], x[1:]), exact[0][:, 0]) < 1e-5
    assert len(calls) == len(fn) + alone
    x[1, 1, 1, 1] = np.nan
    want = np.logical_or.outer([False, True, False], np.arange(19) == 0)
    assert all(np.array_equal(np.isnan(K), want) for K in fn[True](x[:3], x[1:]))


def test_fused_builds_a_damaged_library_again(tmp_path, monkeypatch):
    """A library in the cache that was cut, which would end the process that loads it, is built again, here by a program that
    only looks like a compiler."""
    cxx = tmp_path / "c++"
    cxx.write_text("#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\n[ $1 = --version ] || printf 'a library' > $1\n")
    cxx.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = cpu.build(str(cxx))
    os.truncate(built, 4)
    assert cpu.build(str(cxx)) == built and os.path.getsize(built) == 9
    assert os.listdir(os.path.dirname(built)) == [os.path.basename(built)]


@needs_compiler
def test_fused_without_a_compiler(tmp_path, monkeypatch, capsys):
    """Without a compiler, or with one that fails, one line says so, and XLA computes the same; CXX= says nothing. A second
    process builds nothing, unless the cache cannot be written. Loading what was built leaves the smallest numbers as they
    are."""
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)

    def program():  # that JAX compiles; an unknown name of a C++ function would not be found
        return fused.kernel_fn("cnn_vec", "ntk", depth=1).lower(x).as_text()
    with monkeypatch.context() as patch:
        use(False, patch)
        by_xla = program()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in cpu.FLAGS))  # builds faster
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'cpu.cpp:1:1: error: no such header' >&2; exit 1; }\n")
    failing.chmod(0o755)
    for cxx, words in (("", ""), ("no-such-compiler", "no C++ compiler on PATH"), (str(failing), "error: no such header")):
        monkeypatch.setenv("CXX", cxx)
        cpu.available.cache_clear()
        assert program() == by_xla
        said = capsys.readouterr().err
        assert len(said.splitlines()) == bool(words) and words in said and fused.compiler("cnn_vec") == "XLA"
    monkeypatch.delenv("CXX")
    cpu.available.cache_clear()
    assert fused.compiler("cnn_vec") == "C++" and fused.compiler("fc") == "XLA"
    built = cpu.build(cpu.compiler())
    time = os.stat(built).st_mtime_ns
    assert built.startswith(str(tmp_path)) and cpu.build(cpu.compiler()) == built and os.stat(built).st_mtime_ns == time
    assert np.float32(1e-40) * np.float32(1) != 0
    assert os.listdir(os.path.dirname(built)) == [os.path.basename(built)]
    monkeypatch.setenv("XDG_CACHE_HOME", built)  # where no folder can be made
    cpu.available.cache_clear()
    assert fused.compiler("cnn_vec") == "C++" and os.path.dirname(cpu.available()) != os.path.dirname(built)
    assert capsys.readouterr().err == ""


def test_fused_compiles_loops():
    """The program that JAX compiles does not grow with depth: it is as long for 8 convolutions as for 4."""
    x = np.ones((2, 8, 8, 3), np.float32)
    size = {depth: len(fused.kernel_fn("cnn_gap", "ntk", depth=depth).lower(x).as_text().splitlines())
            for depth in (4, 8)}
    assert size[4] == size[8]


def test_fused_without_triton(monkeypatch):
    """Where JAX has no Triton backend, which it has announced to drop, fused.py works on a GPU without gpu.py."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr("jax.experimental.pallas.triton")
    monkeypatch.delitem(sys.modules, "fast.gpu")
    monkeypatch.delattr("fast.gpu")
    with pytest.raises(ImportError):
        importlib.import_module("fast.gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = np.eye(4)[None, ..., None]
    assert not fused.on_gpu() and fused.compiler([("conv", 1.0, 0.0), ("relu",), ("gap",)]) == "XLA"
    assert relative_error(fused.kernel_fn("cnn_vec", "nngp", depth=1)(x), plain("cnn_vec", x, depth=1)[0]) < 1e-12


def test_fused_imports_no_pallas():
    """On a CPU fused.py leaves Pallas alone, which takes a fifth of a second to import."""
    code = "import sys\nfrom fast import fused\nfused.on_gpu()\nprint('jax.experimental.pallas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_train_is_fused(tmp_path, capsys):
    """If fast/ is present, train_cifar.py computes its kernels with fused.py, also after gpu.py and cpu.py were deleted."""
    flags = ["--n_train", "50", "--n_test", "10", "--ridge", "1", "--verbose", "--out", str(tmp_path)]
    train_cifar.main(flags)
    said = capsys.readouterr().out
    assert "engine=fused" in said and "test accuracy" in said
    for name in os.listdir(HERE):
        if name.endswith(".py"):
            shutil.copy(os.path.join(HERE, name), tmp_path)
    shutil.copytree(os.path.join(HERE, "fast"), tmp_path / "fast", ignore=shutil.ignore_patterns("?pu.*", "__pycache__"))
    done = subprocess.run([sys.executable, "train_cifar.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert "engine=fused" in done.stdout and "test accuracy" in done.stdout, done.stderr
