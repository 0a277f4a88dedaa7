"""Every claim of the core, in the order in which to read it; the first line of each test is its claim.

  pytest -q -n 3 --benchmark-disable                        all tests, also those of the rooms; one process more than
                                                            there are cores, as some tests wait
  pytest -q --benchmark-disable -m quick                    a part of the core, in under a minute
  pytest -q --benchmark-disable test_all.py                 the core: kernel, tiles, pcg, regression, choose, augment,
                                                            data, train, docs; -k kernel is one section
  pytest --benchmark-only                                   time of K v; python -m results.speed: that of kernels

Oracles: neural_tangents, finite wide networks, dense float64 formulas, scikit-learn, plain loops.
Four CPU devices; strict about dtypes and shapes. Tests on CIFAR-10 skip where it is not beside us. Nothing here needs a room:
what fast/, large/, own/, proteins/, molecules/ and results/ claim is proved in their test_*.py, which import this file first.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import timeit
import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

HERE = os.path.dirname(os.path.abspath(__file__))
# Most of these tests would spend their time in XLA's compiler. Where a claim is about the last digits of a kernel, `optimised`
# compiles it as its users have it; everything else is compiled in a quarter of that time. What XLA_FLAGS says comes last and
# counts: with XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true" all is as users have it, and
# so are benchmarks.
OPTIMISED, QUICKLY = {"xla_backend_optimization_level": 3}, {"xla_backend_optimization_level": 0}
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no such flag, and end if it is given
    OPTIMISED["xla_cpu_use_fusion_emitters"], QUICKLY["xla_cpu_use_fusion_emitters"] = True, False


def xla_flags(options):
    """XLA_FLAGS for {name: value}."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


os.environ["XLA_FLAGS"] = " ".join([xla_flags({"xla_cpu_prefer_vector_width": 512}), *(
    [] if "--benchmark-only" in sys.argv else [xla_flags(QUICKLY)]), os.environ.get("XLA_FLAGS", "")])
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a thread each
    os.environ["NPROC"] = "1"
    threadpool_limits(1)
# what one process of the tests has compiled, the others, and the scripts that tests start, need not compile again
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(HERE, ".pytest_cache", "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

import jax.numpy as jnp  # noqa: E402

import augment  # noqa: E402
import choose  # noqa: E402
import data  # noqa: E402
import experiment  # noqa: E402
import kernel  # noqa: E402
import pcg  # noqa: E402
import regression  # noqa: E402
import tiles  # noqa: E402
import train_cifar  # noqa: E402

CIFAR = os.path.join(HERE, "..", "shared", "data", "cifar10", "cifar-10-batches-bin")
needs_cifar = pytest.mark.skipif(not os.path.exists(CIFAR), reason="CIFAR-10 is not beside the project")
quick = pytest.mark.quick  # under a minute in all, for the loop of editing and testing
every_network = pytest.mark.parametrize("name", kernel.IMAGES)
# a Myrtle network with one convolution at each of two resolutions, which compiles four times as fast
POOLED = [("conv", 1.3, 0.2), ("relu",), ("pool",), ("conv", 1.1, 0.1), ("relu",), ("gap",), ("dense", 1.2, 0.1)]

# ------------------------------------------------------------------------------------------- head

def network_id(value):
    """The name of a parameter in the name of a test."""
    return "pooled" if value is POOLED else str(value)


@contextmanager
def as_users_have_it(x64=False):
    """JAX's defaults: neural_tangents is not for strict JAX, and float64 where x64 is on."""
    with (jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"),
          jax.enable_x64(x64)):
        yield


def optimised(fn):
    """fn, compiled as its users have it; see the head of this file."""
    return jax.jit(fn, compiler_options=OPTIMISED)


def reference(name, kind, *x, **options):
    """neural_tangents' kernel, or the kernels of several kinds."""
    with as_users_have_it(x64=True):
        return np.asarray(kernel.reference_fn(name, kind, **options)(*x))


def relative_error(a, b):
    return np.max(np.abs(np.asarray(a, np.float64) - b) / np.abs(b))


@functools.cache
def cifar(n):
    """The first n training images of CIFAR-10 in a balanced order, channels standardised."""
    x, y, _, _ = data.load("cifar10", CIFAR, n_train=n, n_test=1)
    return whitened(x), y


@functools.cache
def digits(n):
    x, y, _, _ = data.load("digits", n_train=n)
    return whitened(x), y


def whitened(x, protocol="channel", fit=None, zca_eps=None, **options):
    """x whitened by what was fitted on `fit`, or on x itself."""
    return np.asarray(data.whitening(protocol, x if fit is None else fit, **options)(zca_eps)(x))


def linear(a, b):
    """A kernel that compiles at once."""
    return jnp.matmul(a, b.T, precision="highest")


def inputs(n):
    """The first n of a sequence of inputs."""
    return np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)[:n]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def refitted(K, z, ridge):
    """The prediction of each row of z (n, c) by the regression on the n - 1 other rows: n dense solves."""
    A, others = K + ridge * np.diag(K).mean() * np.eye(len(K)), ~np.eye(len(K), dtype=bool)
    return np.array([K[i, rest] @ np.linalg.solve(A[np.ix_(rest, rest)], z[rest]) for i, rest in enumerate(others)])


# ----------------------------------------------------------------------------------------- kernel

def images(rng, n, shape):
    """Random images; row 1 is the opposite of row 0, row 2 is black but for one pixel."""
    x = rng.normal(size=(n, *shape))
    x[1] = -x[0]
    x[2] = 0
    x[2, 0, 0] = 1
    return x


@pytest.mark.parametrize("name, options", [(name, options) for name in kernel.IMAGES for options in (
    {}, {"w_std": 1.2, "b_std": 0.3})
    if name not in (("cnn_vec", "myrtle7") if options else ("cnn_gap", "myrtle5", "myrtle10"))], ids=str)
def test_kernel_is_neural_tangents(name, options):
    """K is neural_tangents': to 1e-10 in float64, and in float32, which the Myrtle networks leave to the others, to 1e-5; odd
    and even sizes. Of the Myrtle networks it is fn(x), off its diagonal, which compiles in half of the time; of the others,
    fn(x1, x2)."""
    rng = np.random.default_rng(0)
    shape = (8, 4, 3) if name.startswith("myrtle") else (5, 4, 2)
    options = {**options, **({"depth": 3} if name in ("cnn_vec", "cnn_gap") else {})}
    x = images(rng, 5, shape), rng.normal(size=(4, *shape))
    compared = np.ones((5, 4), bool)
    if name.startswith("myrtle"):  # neural_tangents is off by 1e-8 where c = 1 or -1: row 1 is the opposite of row 0
        x, compared = [np.delete(np.concatenate(x), 1, axis=0)], ~np.eye(8, dtype=bool)
    fn = optimised(kernel.kernel_fn(name, kernel.KINDS, **options))
    expected = reference(name, kernel.KINDS, *x, **options)
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5))[:1 if name.startswith("myrtle") else 2]:
        for K, want in zip(fn(*(one.astype(dtype) for one in x)), expected):
            assert K.dtype == dtype and relative_error(K[compared], want[compared]) < tolerance


@quick
def test_kernel_heads_by_hand():
    """The NNGP of a head is its formula of the kernel without one, written out."""
    x, gamma = np.random.default_rng(0).normal(size=(4, 3, 3, 2)), 0.7
    K = np.asarray(kernel.kernel_fn("cnn_gap", "nngp", depth=1)(x))
    c = np.clip(K / np.sqrt(np.outer(np.diag(K), np.diag(K))), -1, 1)
    for head, by_hand in {"cosine": c, "exp": np.exp(gamma * (c - 1)),
                          "relu": (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / (2 * np.pi)}.items():
        got = kernel.kernel_fn("cnn_gap", "nngp", depth=1, head=head, gamma=gamma)(x)
        assert np.allclose(got, 2 * by_hand, rtol=1e-7), head  # the last layer: w_std^2 = 2


@needs_cifar
@pytest.mark.parametrize("name, n", [("fc", 20), ("cnn_vec", 8), ("myrtle5", 2)])
def test_kernel_is_neural_tangents_on_cifar(name, n):
    """float32 on real images, each with itself too, is neural_tangents in float64 to 1e-5.

    Myrtle-5 on the middle 16 x 16 pixels: neural_tangents' whole ones take minutes."""
    x = cifar(20)[0][:n]
    x = x[:, 8:24, 8:24] if name == "myrtle5" else x
    exact = x.astype(np.float64)
    for K, expected in zip(optimised(kernel.kernel_fn(name, kernel.KINDS))(x), reference(name, kernel.KINDS, exact)):
        assert relative_error(K, expected) < 1e-5


@pytest.mark.parametrize("name", ["fc", "cnn_vec"])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_kernel_of_an_image_with_itself(name, dtype, tolerance):
    """Where c = 1 exactly, kappa0 = kappa1 = 1: NTK = (depth + 1) NNGP, for a copy as for itself.

    neural_tangents is off by 1e-8 here in float64, the square root of its rounding of c."""
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 3)).astype(dtype)
    both = np.concatenate([x, x])
    nngp, ntk = map(np.asarray, optimised(kernel.kernel_fn(name, kernel.KINDS, depth=4))(both))
    assert relative_error(np.diag(ntk), 5 * np.diag(nngp).astype(np.float64)) < tolerance
    for K in (nngp, ntk):
        assert relative_error(K[:3, 3:], K[:3, :3].astype(np.float64)) < tolerance


@pytest.mark.parametrize("name, depth", [("fc", 3), ("cnn_vec", 2), (POOLED, None)], ids=network_id)
def test_kernel_of_black_images(name, depth):
    """An image without variance gives finite entries: zero without biases, as neural_tangents with."""
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32)
    x[1] = 0
    plain, biased = ([(*one[:2], b_std) if len(one) == 3 else one for one in kernel.network(name, depth)]
                     for b_std in (0, 0.5))
    for K in map(np.asarray, kernel.kernel_fn(plain, kernel.KINDS)(x)):
        assert np.isfinite(K).all() and (K[1] == 0).all() and (K[0, [0, 2]] != 0).all()
    for K, expected in zip(kernel.kernel_fn(biased, kernel.KINDS)(x), reference(biased, kernel.KINDS, x.astype(np.float64))):
        assert relative_error(K, expected) < 1e-5


def test_kernel_of_images_that_cancel():
    """Images of mean 0 that are pooled before the first relu have a variance that is rounding, of either sign: no NaN."""
    x = np.random.default_rng(0).normal(size=(40, 4, 4, 1)).astype(np.float32)
    x -= x.mean(axis=(1, 2), keepdims=True)
    for K in kernel.kernel_fn([("gap",), ("dense", 1.0, 0.0), ("relu",), ("dense", 1.0, 0.0)], kernel.KINDS)(x):
        assert np.abs(K).max() < 1e-6


def finite_network(layers, rng, x, width):
    """NNGP and NTK, (n, n) each, of one random network of this width: the mean over the last weights of f(x) f(x')^T, and
    <df(x) / d theta, df(x') / d theta> by backpropagation. Weights are N(0, 1), scaled by w_std / sqrt(fan-in) where they
    are used. All of it in NumPy, x (n, h, w, channels) float32.

    The gradient with respect to the weights of a layer is A^T D: A holds what they multiply and D the gradient with respect
    to what they make, a row for each position. So <A^T D, A'^T D'> = sum over the elements of (A A'^T) * (D D'^T)."""
    n, saved, shifts = len(x), [], [(i, j) for i in range(3) for j in range(3)]
    for number, (kind, *scales) in enumerate(layers):
        A, W, (_, h, w, c) = x, None, x.shape
        if kind == "conv":
            A = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            A = np.concatenate([A[:, i:i + h, j:j + w] for i, j in shifts], axis=-1)
        if kind in ("dense", "conv"):
            W = rng.standard_normal((A.shape[-1], 1 if number == len(layers) - 1 else width), np.float32)
            features, b = x.reshape(n, -1), rng.standard_normal(W.shape[1], np.float32)
        saved.append((kind, scales, x, A, W))
        x = (scales[0] / len(W)**0.5 * A @ W + scales[1] * b if kind in ("dense", "conv") else
             np.maximum(x, 0) if kind == "relu" else
             x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4)) if kind == "pool" else
             x.mean(axis=(1, 2), keepdims=True) if kind == "gap" else x.reshape(n, 1, 1, -1))
    w_std, b_std = layers[-1][1:]
    nngp, ntk, D = w_std**2 / features.shape[1] * features @ features.T + b_std**2, 0, np.ones_like(x)
    for kind, scales, x, A, W in reversed(saved):
        if kind in ("dense", "conv"):
            a, d = (z.reshape(-1, z.shape[-1]) for z in (A, D))
            elements = (scales[0]**2 / len(W) * a @ a.T + scales[1]**2) * (d @ d.T)
            ntk = ntk + elements.reshape(n, len(a) // n, n, len(a) // n).sum(axis=(1, 3))
            D = scales[0] / len(W)**0.5 * D @ W.T
        if kind == "conv":
            padded, (_, h, w, c) = np.zeros((n, x.shape[1] + 2, x.shape[2] + 2, x.shape[3]), np.float32), x.shape
            for k, (i, j) in enumerate(shifts):
                padded[:, i:i + h, j:j + w] += D[..., k * c:(k + 1) * c]
            D = padded[:, 1:-1, 1:-1]
        D = (D * (x > 0) if kind == "relu" else D.repeat(2, axis=1).repeat(2, axis=2) / 4 if kind == "pool" else
             np.broadcast_to(D / (x.shape[1] * x.shape[2]), x.shape) if kind == "gap" else D.reshape(x.shape))
    return nngp, ntk


@pytest.mark.parametrize("name, options", [("fc", {"b_std": 0.4, "w_std": 1.3}),
                                           ("cnn_vec", {"depth": 2}), (POOLED, {})], ids=network_id)
def test_kernel_is_the_limit_of_wide_networks(name, options):
    """NNGP and NTK of 20 random networks of width 512 average to ours: 4 standard errors + 1 %."""
    layers, rng = kernel.network(name, **options), np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 4, 2)).astype(np.float32)
    draws = [finite_network(layers, rng, x, 512) for _ in range(20)]
    for K, samples in zip(map(np.asarray, kernel.kernel_fn(name, kernel.KINDS, **options)(x)), zip(*draws)):
        error = 4 * np.std(samples, axis=0) / np.sqrt(len(samples)) + 0.01 * np.abs(K)
        assert (np.abs(np.mean(samples, axis=0) - K) < error).all()


@quick
def test_kernel_arccos():
    """kappa0 and kappa1 are NumPy's to 2e-7 in float32 and 2e-15 in float64; at and beyond 1 too."""
    for dtype, tolerance in ((np.float32, 2e-7), (np.float64, 2e-15)):
        c = np.linspace(-1, 1, 100001).astype(dtype)
        kappa0, kappa1 = optimised(kernel.kappas)(jnp.asarray(c))
        c = c.astype(np.float64)
        angle = np.pi - np.arccos(c)
        assert np.abs(np.asarray(kappa0) - angle / np.pi).max() < tolerance
        assert np.abs(np.asarray(kappa1) - (np.sqrt((1 - c) * (1 + c)) + angle * c) / np.pi).max() < tolerance
        beyond = jnp.asarray([1 + 1e-6, -1 - 1e-6] if dtype == np.float32 else [1 + 1e-15, -1 - 1e-15],
                             dtype)
        assert np.allclose(kernel.kappas(beyond)[0], [1, 0]), "rounding past 1 counts as 1"


@pytest.mark.parametrize("name, positions", [("fc", 1), ("cnn_vec", 16), ("cnn_gap", 256)])
def test_kernel_symmetry_and_blocks(name, positions, monkeypatch):
    """fn(x) is fn(x, x), symmetric to the last bit, whatever the block size inside."""
    x = np.random.default_rng(0).normal(size=(7, 4, 4, 3)).astype(np.float32)
    fn = optimised(kernel.kernel_fn(name, "ntk", depth=1))
    K = np.asarray(fn(x))
    assert (K == K.T).all() and relative_error(K, np.asarray(fn(x, x))) < 1e-6
    monkeypatch.setattr(kernel, "BLOCK", 3 * positions)  # 7 columns come as 3 + 3 + 1
    assert relative_error(kernel.kernel_fn(name, "ntk", depth=1)(x), K) < 1e-6


def test_kernel_inputs():
    """fc takes (n, d) and images alike, integers are read as float32, and a network may be a list."""
    x = np.random.default_rng(0).integers(0, 255, size=(4, 3, 2, 2))
    K = kernel.kernel_fn("fc", "ntk", depth=2)(x)
    assert K.dtype == np.float32
    assert (K == kernel.kernel_fn("fc", "ntk", depth=2)(x.reshape(4, 12).astype(np.float32))).all()
    assert (K == kernel.kernel_fn(kernel.network("fc", depth=2), "ntk")(x)).all()
    assert not np.allclose(K, kernel.kernel_fn("fc", "ntk", depth=3)(x))


@quick
@pytest.mark.parametrize("call, words", [
    (lambda: kernel.kernel_fn("resnet", "ntk"), "'resnet' is unknown; choose one of fc, "),
    (lambda: kernel.kernel_fn("fc", "gp"), "'gp' is unknown; choose nngp or ntk"),
    (lambda: kernel.kernel_fn("myrtle5", "ntk", depth=3), "depth=3 does not fit myrtle5"),
    (lambda: kernel.kernel_fn("fc", "ntk", depth=0), "depth=0 does not fit fc"),
    (lambda: kernel.kernel_fn("myrtle5", "ntk")(np.ones((1, 6, 8, 3))), "6x8.*multiples of 4"),
    (lambda: kernel.kernel_fn("myrtle5", "ntk")(np.ones((1, 2, 2, 3))), "2x2.*multiples of 4"),
    (lambda: kernel.kernel_fn("cnn_gap", "ntk")(np.ones((3, 9))), r"\(3, 9\).*\(n, h, w, channels\)"),
    (lambda: kernel.kernel_fn("fc", "ntk")(np.ones((3, 9)), np.ones((3, 8))), "must agree"),
    (lambda: kernel.kernel_fn("fc", "ntk")(np.ones((0, 9))), r"\(0, 9\): expected at least one input"),
    (lambda: kernel.kernel_fn([("gap",), ("tanh",)], "ntk"), "tanh.*expected"),
    (lambda: kernel.kernel_fn([("dense", 1.0), ("gap",)], "ntk"), r"\('dense', 1.0\).*\(\"dense\", number, number\)"),
    (lambda: kernel.kernel_fn([("relu",)], "ntk"), r"\('relu',\).*expected .* among them flatten or gap"),
    (lambda: kernel.kernel_fn(kernel.network("fc"), "ntk", depth=2), "a list of layers has its own"),
    (lambda: kernel.kernel_fn([("flatten",), ("conv", 1.0, 0.0)], "ntk"), r"\('conv', .* comes after \('flatten',\), which"),
    (lambda: kernel.kernel_fn([("gap",), ("relu",), ("pool",)], "ntk"), r"\('pool',\) comes after \('gap',\), which leaves"),
])
def test_kernel_errors(call, words):
    """What does not fit is refused in one sentence: what was got, what was expected."""
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ tiles

def exponential(a, b):
    """A kernel without zeros that compiles at once."""
    return jnp.exp(linear(a, b) / 6)


@pytest.mark.parametrize("n, tile, devices", [(1, 8, 1), (7, 8, 1), (8, 8, 1), (9, 8, 1), (19, 8, 1), (19, 1, 1), (3, 100, 1),
                                              (9, 8, 3), (19, 8, 3), (19, 1, 3), (1, 8, 4), (19, 8, 4), (3, 100, 4)])
def test_tiles_any_size(n, tile, devices):
    """Any n, tile and number of devices: every method is that of the dense kernel matrix, which NumPy computes."""
    rng = np.random.default_rng(n)
    x, x_test = (rng.normal(size=(rows, 6)).astype(np.float32) for rows in (n, 5))
    options = dict(tile=tile, devices=jax.local_devices()[:devices])
    K, K_test = tiles.gram(exponential, x, **options), tiles.cross(exponential, x_test, x, **options)
    dense, v = K.dense().astype(np.float64), rng.normal(size=(n, 3))
    assert K.shape == (n, n) and (dense == dense.T).all()
    for found, rows in ((K, x), (K_test, x_test)):
        assert relative_error(found.dense(), np.exp(rows.astype(np.float64) @ x.T / 6)) < 1e-6
    assert np.allclose(K.matvec(v), dense @ v, rtol=1e-13, atol=1e-12)
    assert np.allclose(K_test.matvec(v), K_test.dense().astype(np.float64) @ v, rtol=1e-13, atol=1e-12)
    indices = rng.integers(0, n, 4)
    assert (K.columns(indices) == dense[:, indices]).all() and (K.diagonal() == np.diag(dense)).all()
    assert (K_test.columns(indices) == K_test.dense()[:, indices]).all()
    for k in {1, -(-n // 2), n}:
        block = K.leading(k)
        assert (block.dense() == dense[:k, :k]).all() and block.tiles is K.tiles
        assert np.allclose(block.matvec(v[:k]), dense[:k, :k] @ v[:k], rtol=1e-13, atol=1e-12)
        assert (block.diagonal() == np.diag(dense)[:k]).all()
        assert (block.columns([k - 1])[:, 0] == dense[:k, k - 1]).all()


@quick
def test_tiles_store_the_upper_triangle():
    """Of 25 tiles the 15 on and above the diagonal are computed and kept, in float32."""
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    calls = []

    def fn(x1, x2):
        jax.debug.callback(lambda: calls.append(1))
        return kernel.kernel_fn("fc", "nngp")(x1, x2)
    K = tiles.gram(fn, x, tile=10, devices=jax.local_devices()[:1])
    jax.effects_barrier()
    assert len(calls) == len(K.tiles) == 15 and K.entries == 1500
    assert all(tile.dtype == np.float32 for tile in K.tiles.values())


@quick
def test_tiles_ask_for_rows():
    """x may be anything with len and rows; no more than a tile's rows are asked for at a time."""
    x, asked = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32), []

    class Rows:
        def __len__(self):
            return len(x)

        def __getitem__(self, rows):
            asked.append(len(rows))
            return x[rows]
    fn = kernel.kernel_fn("fc", "ntk")
    K = tiles.gram(fn, Rows(), tile=5)
    assert max(asked) == 5 and relative_error(K.dense(), np.asarray(fn(x), np.float64)) < 1e-6


@quick
def test_tiles_product_in_float64():
    """K v of float32 tiles is summed in float64: exact to 1e-14, where float32 sums are not."""
    x = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    K = tiles.gram(kernel.kernel_fn("fc", "nngp"), x, tile=128)
    v = np.random.default_rng(1).normal(size=(300, 2))
    exact = K.dense().astype(np.longdouble) @ v
    assert np.abs(K.matvec(v) - exact).max() < 1e-14 * np.abs(exact).max() * 10
    assert np.abs(K.dense() @ v.astype(np.float32) - exact).max() > 1e-9 * np.abs(exact).max()


@quick
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.float16, bool])
def test_tiles_of_small_numbers(dtype):
    """Inputs of 8 and 16 bits give what they give in float32, whatever the kernel does to them: no byte wraps round."""
    def kernel_fn(a, b):
        return jnp.exp(-((a[:, None] - b[None]) ** 2).sum(axis=-1) / 9e3)
    x = np.random.default_rng(0).integers(0, 120, (9, 3)).astype(dtype)
    assert np.array_equal(tiles.gram(kernel_fn, x).dense(), tiles.gram(kernel_fn, x.astype(np.float32)).dense())
    assert np.array_equal(tiles.diagonal(kernel_fn, x), np.ones(9))


@quick
def test_tiles_errors():
    """NaN in the inputs, numbers too small for float32, integers that JAX would cut, a v of the wrong shape, no rows, a matrix
    beyond memory: one sentence each."""
    fn, x = kernel.kernel_fn("fc", "nngp"), np.ones((4, 3), np.float32)
    K = tiles.gram(fn, x)
    with pytest.raises(ValueError, match=r"v has shape \(3, 1\).*needs \(4, c\)"):
        K.matvec(np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"leading\(5\)"):
        K.leading(5)
    for column in (-1, 4):
        with pytest.raises(IndexError, match=f"columns 0 to 4 of a 4 x 4 matrix|columns {column} to"):
            K.columns([0, column])
    with pytest.raises(ValueError, match="at least 1"):
        tiles.gram(fn, x[:0])
    with pytest.raises(ValueError, match="too small for float32: multiply the inputs by a constant"):
        tiles.gram(fn, np.float32(1e-18) * x)
    with jax.enable_x64(False), pytest.raises(ValueError, match="too small for float32: multiply the inputs by a constant"):
        tiles.diagonal(fn, np.float32(1e-18) * x)
    for large in (x.astype(np.int64) * 2**31, np.where(x == 1, 2**32, 0).astype(np.uint64)):
        with jax.enable_x64(False), pytest.raises(ValueError, match=r"x holds \d+, an integer beyond u?int32: take x.astype"):
            tiles.gram(kernel.kernel_fn("fc", "nngp", depth=1), large)
    with jax.enable_x64(False):  # smaller ones are as good as float32
        assert np.array_equal(tiles.gram(fn, x.astype(np.int64)).dense(), K.dense())
    far = tiles.gram(lambda a, b: jnp.exp(-((a - b.T) ** 2)), np.array([[0], [0], [9], [9]], np.float32), tile=2)
    assert 0 < far.tiles[0, 1].max() < 1e-30  # between rows that are far apart that is no error
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match="not finite: look for NaN"):
        tiles.gram(fn, x)
    with pytest.raises(MemoryError, match="1000000 x 1000000 kernel needs 200.* GB .*--store DIR"):
        tiles.gram(fn, np.broadcast_to(np.float32(1), (1000000, 3)))
    with pytest.raises(MemoryError, match="1000000 x 1000000 kernel needs 400.* GB"):  # two matrices
        tiles.gram(kernel.kernel_fn("fc", kernel.KINDS), np.broadcast_to(np.float32(1), (1000000, 3)))
    with pytest.raises(MemoryError, match="dense 3000000 x 3000000 kernel needs 36000.* GB"):
        dataclasses.replace(K, shape=(3000000,) * 2).dense()


@quick
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiles_belong_to_one_process(symmetric):
    """Every tile is some process's and of no other, shares differ by one tile at most, and a larger
    matrix leaves every tile with the process that had it."""
    def owners(columns, count):
        teams = [tiles.Team(index, count) for index in range(count)]
        shares = [list(tiles.TiledMatrix((3, columns), (1, 1), symmetric, {}, team).keys()) for team in teams]
        assert max(map(len, shares)) <= min(map(len, shares)) + 1
        keys = sum(shares, [])
        assert sorted(keys) == sorted((i, j) for j in range(columns) for i in range(
            j + 1 if symmetric else 3))
        return {key: index for index, share in enumerate(shares) for key in share}
    for count in (1, 2, 3, 7):
        small, large = owners(5, count), owners(9, count)
        assert all(large[key] == small[key] for key in small)


# -------------------------------------------------------------------------------------------- pcg

class Dense:
    """What pcg asks of a matrix, of an array."""

    def __init__(self, K):
        self.K, self.shape, self.matvec = K, K.shape, lambda v: K @ v

    def diagonal(self):
        return np.diag(self.K).copy()

    def columns(self, indices, own=True):
        return self.K[:, indices]


def spectrum(n, condition, seed=0):
    """A dense matrix with eigenvalues from 1 to 1 / condition, falling as a power."""
    U = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return (U * np.arange(1, n + 1) ** (-np.log(condition) / np.log(n))) @ U.T


@pytest.mark.parametrize("condition, tol", [(1e3, 2e-7), (1e6, 2e-7), (1e9, 2e-7), (1e10, 1e-5)])
@pytest.mark.parametrize("name", ["none", "jacobi", "lowrank"])
def test_pcg_is_cholesky(condition, tol, name):
    """Predictions K x are those of a dense float64 Cholesky solve to five times the residual asked for: 1e-6
    up to condition 1e9, and 5e-5, where without a preconditioner rounding allows no more, at 1e10."""
    n = 200
    K, y = spectrum(n, condition), np.random.default_rng(1).normal(size=(n, 4))
    ridge = 1 / condition
    P = {"none": pcg.none, "jacobi": pcg.jacobi,
         "lowrank": lambda K: pcg.low_rank(K, rank=100)}[name](Dense(K))(ridge)
    x, info = pcg.solve(Dense(K).matvec, y, ridge, P, tol=tol, max_iters=50000)
    L = np.linalg.cholesky(K + ridge * np.eye(n))
    exact = np.linalg.solve(L.T, np.linalg.solve(L, y))
    assert info.converged and np.abs(K @ (x - exact)).max() < 5 * tol * np.abs(K @ exact).max()


@quick
def test_pcg_textbook():
    """The textbook's method and `solve` without a preconditioner make the same steps: Cholesky's answer, each."""
    K, y = spectrum(80, 1e3), np.random.default_rng(0).normal(size=80)
    x = pcg.textbook(lambda v: K @ v, y, 1e-3, tol=1e-9)
    assert np.allclose(pcg.textbook(lambda v: v, np.arange(3)), np.arange(3))  # integers too
    assert np.abs(x - np.linalg.solve(K + 1e-3 * np.eye(80), y)).max() < 1e-6 * np.abs(x).max()
    five = [pcg.textbook(lambda v: K @ v, y, 1e-3, max_iters=5)]
    with pytest.warns(UserWarning, match="not converged"):
        five.append(pcg.solve(lambda v: K @ v, y, 1e-3, max_iters=5)[0])
    assert np.allclose(*five, rtol=1e-10)


@quick
def test_pcg_is_scikit_learn():
    """On digits, tiles and CG give the dual coefficients of scikit-learn's KernelRidge."""
    from sklearn.kernel_ridge import KernelRidge
    x, labels = digits(400)
    K, y = tiles.gram(kernel.kernel_fn("fc", "ntk"), x, tile=128), data.one_hot(labels)
    ridge = 1e-3 * K.diagonal().mean()
    alpha, _ = pcg.solve(K.matvec, y, ridge, pcg.low_rank(K, 40)(ridge), tol=1e-10)
    model = KernelRidge(alpha=ridge, kernel="precomputed").fit(K.dense().astype(np.float64), y)
    assert np.allclose(alpha, model.dual_coef_, rtol=1e-6, atol=1e-8 * np.abs(alpha).max())


@quick
def test_pcg_residual_of_every_column():
    """Every column meets the tolerance, the true residual is reported, a zero column stays zero.

    jax.scipy's cg, one step size for all columns, leaves the worst one above the tolerance."""
    K, rng = spectrum(200, 1e6), np.random.default_rng(0)
    U = np.linalg.eigh(K)[1]
    y = np.stack([U[:, -1] * 1e3, rng.normal(size=200), np.zeros(200), 1e-6 * rng.normal(size=200)], 1)
    x, info = pcg.solve(lambda v: K @ v, y, 1e-6, tol=1e-6, max_iters=10000)
    norm = np.linalg.norm(y, axis=0) + (np.arange(4) == 2)
    true = np.linalg.norm(y - K @ x - 1e-6 * x, axis=0) / norm
    assert info.converged and true.max() <= 1e-6 and (x[:, 2] == 0).all()
    assert np.allclose(info.residual, true, atol=1e-12)
    theirs, _ = jax.scipy.sparse.linalg.cg(lambda v: jnp.asarray(K) @ v + 1e-6 * v, jnp.asarray(y),
                                           tol=1e-6, maxiter=10000)
    assert (np.linalg.norm(y - K @ theirs - 1e-6 * theirs, axis=0) / norm).max() > 1e-6


@pytest.mark.parametrize("source", ["digits", pytest.param("cifar", marks=needs_cifar)])
def test_pcg_low_rank_cuts_iterations(source):
    """Rank n/5 on a real kernel at ridge 1e-4: at least four times fewer iterations; Jacobi: none."""
    x, labels = digits(600) if source == "digits" else cifar(1000)
    K, y = tiles.gram(kernel.kernel_fn("fc", "nngp"), x, tile=512), data.one_hot(labels)
    ridge = 1e-4 * K.diagonal().mean()
    counts = [pcg.solve(K.matvec, y, ridge, P, max_iters=5000)[1].iterations
              for P in (None, pcg.jacobi(K)(ridge), pcg.low_rank(K, len(x) // 5)(ridge))]
    assert counts[0] >= 4 * counts[2] and counts[1] > 0.5 * counts[0]


@quick
def test_pcg_condition():
    """The condition number read off the coefficients is that of K + ridge I to 1 %."""
    K = spectrum(100, 1e4)
    _, info = pcg.solve(lambda v: K @ v, np.random.default_rng(0).normal(size=(100, 1)), 1e-3,
                        tol=1e-12, max_iters=1000)
    values = np.linalg.eigvalsh(K) + 1e-3
    assert abs(info.condition / (values[-1] / values[0]) - 1) < 0.01
    assert len(info.history) == info.iterations + 1 and info.history[0] == 1


@quick
def test_pcg_says_so():
    """Too few steps, a tolerance beyond rounding, an indefinite K, NaN: said, each in one sentence."""
    K, y = spectrum(200, 1e8), np.random.default_rng(0).normal(size=(200, 2))
    with pytest.warns(UserWarning, match="not converged: residual .* after 5 steps, .* Raise max_iters, the rank or"):
        assert not pcg.solve(lambda v: K @ v, y, 1e-8, max_iters=5)[1].converged
    with pytest.warns(UserWarning, match="2 of 2 columns stopped falling: .* rounding allows no more. Raise"):
        info = pcg.solve(lambda v: K @ v, y, 1e-3, tol=1e-17, max_iters=5000)[1]
    assert info.iterations < 1000 and info.residual.max() < 1e-10
    with pytest.raises(ValueError, match="y has 1 entries that are not finite"):
        pcg.solve(lambda v: v, np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="ridge is nan: y must be finite and ridge >= 0"):
        pcg.solve(lambda v: v, y, np.nan)
    with pytest.raises(ValueError, match="product 1 with K has 400 entries that are not finite: look for NaN"):
        pcg.solve(lambda v: np.nan * v, y)


@quick
def test_pcg_edges():
    """n = 1, more columns than rows, vectors, exact duplicates, a start at the solution: all right."""
    for K, y in ((np.full((1, 1), 3.0), np.ones((1, 1))), (np.eye(3), np.ones((3, 7))),
                 (np.ones((4, 4)), np.arange(4.0)), (np.eye(3), np.zeros((3, 2)))):
        for P in (None, pcg.jacobi(Dense(K))(0.1), pcg.low_rank(Dense(K), 10)(0.1)):
            x, info = pcg.solve(lambda v: K @ v, y, 0.1, P, tol=1e-10)
            assert info.converged and x.shape == y.shape
            assert np.allclose(x, np.linalg.solve(K + 0.1 * np.eye(len(K)), y))
            assert pcg.solve(lambda v: K @ v, y, 0.1, P, tol=1e-8, x0=x)[1].iterations == 0
    K, y = np.diag(np.arange(1.0, 31)), np.ones((30, 2))
    y[1:, 0] = 0  # exactly solved in one step, while the other column takes thirty
    x, info = pcg.solve(lambda v: K @ v, y, 0.1)
    assert info.converged and np.allclose(x, y / (np.diag(K) + 0.1)[:, None], atol=1e-5)


class Memory:
    """A checkpoint that keeps every state."""
    def __init__(self, *states):
        self.states = list(states)

    def load(self):
        return self.states[-1] if self.states else None

    def save(self, state, finished):
        self.states.append({name: np.array(value) for name, value in state.items()})


@pytest.mark.parametrize("source", ["none", "lowrank"])
def test_pcg_resumes(source):
    """From the state after any step a solve goes on as if it had not been broken off: same solution to
    the last bit, same steps, same condition; from its last state it has nothing to do."""
    A, y = spectrum(60, 1e6), np.random.default_rng(1).normal(size=(60, 3))
    P = pcg.low_rank(Dense(A), 20)(1e-5) if source == "lowrank" else None
    trace = Memory()
    x, info = pcg.solve(lambda v: A @ v, y, 1e-5, P, 1e-9, checkpoint=trace)
    assert info.iterations == len(trace.states) > 20
    for state in trace.states[::7] + trace.states[-1:]:
        again = pcg.solve(lambda v: A @ v, y, 1e-5, P, 1e-9, checkpoint=Memory(state))
        assert (again[0] == x).all() and again[1].history == info.history
        assert again[1].condition == info.condition and again[1].iterations == info.iterations


@quick
def test_pcg_resumes_with_another_preconditioner():
    """A solve that goes on with another preconditioner, as after a run with another number of processes, takes as many steps
    as one that starts from the same x, to 5 %, though the old directions are not conjugate to the new ones."""
    A, y = spectrum(300, 1e6), np.random.default_rng(1).normal(size=(300, 3))
    before, after = (pcg.low_rank(Dense(A), rank)(1e-5) for rank in (20, 60))
    trace = Memory()
    pcg.solve(lambda v: A @ v, y, 1e-5, before, 1e-8, checkpoint=trace)
    for done in (5, 40):
        state = {name: value.copy() for name, value in trace.states[done - 1].items()}
        fresh = pcg.solve(lambda v: A @ v, y, 1e-5, after, 1e-8, x0=state["x"])[1]
        again = pcg.solve(lambda v: A @ v, y, 1e-5, after, 1e-8, checkpoint=Memory(state))[1]
        assert again.converged and abs(again.iterations - done - fresh.iterations) <= 0.05 * fresh.iterations


@quick
def test_pcg_indefinite():
    """A kernel that rounding has made indefinite, and rows that are alike without a ridge, are named, and
    the ridge suggested cures them, though not by a hundred times what it must."""
    rng = np.random.default_rng(0)
    K, y = spectrum(300, 1e9), rng.normal(size=(300, 3))
    K = K.astype(np.float16).astype(np.float64)  # eigenvalues down to -1e-3 of the mean
    lowest = np.linalg.eigvalsh(K)[0]
    singular = [G @ G.T for G in rng.normal(size=(20, 40, 30))]  # rounding gives the zeros a sign of its own
    for K, lowest, y in ((K, lowest, y), *((G, 0.0, y[:40]) for G in singular)):  # noqa: B020
        with pytest.raises(pcg.Indefinite, match="not positive definite.* eigenvalue of .*Raise the ridge") as error:
            pcg.solve(lambda v: K @ v, y, 0.0, max_iters=5000)
        cure = error.value.cure
        assert -lowest < cure < -3 * lowest + 1e-5 * np.linalg.norm(K, 2)
        assert pcg.solve(lambda v: K @ v, y, cure, max_iters=5000)[1].converged
    with pytest.raises(pcg.Indefinite):
        pcg.solve(lambda v: -v, y, 0.5)
    with pytest.raises(pcg.Indefinite, match="Raise the ridge to [1-9]") as error:  # y lies where K is 0
        pcg.solve(lambda v: np.ones((4, 4)) @ v, np.array([1.0, -1, 1, -1]))
    assert 0 < error.value.cure < 1e-4



@quick
def test_precondition_partial_cholesky():
    """On a matrix of its rank right to 1e-5, for F is float32; on a real kernel within twice the best
    error at half its rank."""
    G = np.random.default_rng(0).normal(size=(200, 30))
    F = pcg.partial_cholesky(Dense(G @ G.T), 100).astype(np.float64)
    assert F.shape[1] == 30 and np.allclose(F @ F.T, G @ G.T, atol=1e-5 * (G @ G.T).max())
    K = np.asarray(kernel.kernel_fn("fc", "nngp")(digits(500)[0]), np.float64)
    for rank in (20, 100, 300):  # within and beyond one block of pivots
        F = pcg.partial_cholesky(Dense(K), rank).astype(np.float64)
        left = np.diag(K) - np.sum(F**2, axis=1)
        assert F.shape[1] == rank and left.min() > -1e-5 * K.max()
        assert left.sum() < 2 * np.linalg.eigvalsh(K)[:-rank // 2].sum()


@quick
def test_precondition_low_rank_formula():
    """P^-1 is the inverse of F F^T + s^2 sqrt(diag K / mean) + ridge, made densely, for n beyond what a
    thread takes; for a leading block, of the first rows of F and w, also where they are fewer than F's columns."""
    K = spectrum(60, 1e5) * np.outer(*2 * [np.linspace(1, 3, 60)])
    low, d = pcg.low_rank(Dense(K), 20), np.diag(K)
    F = low.F.astype(np.float64)
    P = F @ F.T + np.diag(np.linalg.svd(F, compute_uv=False)[:20].min() ** 2 * np.sqrt(d / d.mean()) + 1e-3)
    for n in (60, 45, 11):
        inverse = (low if n == 60 else low.leading(n))(1e-3)(np.eye(n))
        assert np.allclose(inverse @ P[:n, :n], np.eye(n), atol=1e-7)
    assert np.allclose(pcg.low_rank(Dense(np.zeros((3, 3))))(0.5)(np.eye(3)), 2 * np.eye(3))
    F, r = np.random.default_rng(0).normal(size=(5000, 3)), np.random.default_rng(1).normal(size=(5000, 2))
    z = pcg.LowRank(F, np.ones(5000))(1.0)(r)
    s2 = np.linalg.eigvalsh(F.T @ F)[0]
    assert np.allclose(F @ (F.T @ z) + (1 + s2) * z, r)


def threads(count, work):
    """[work(team)] of `count` threads that sum as processes do."""
    barrier, parts, out = threading.Barrier(count), {}, [None] * count

    def run(index):
        def all_reduce(array):
            parts[index] = np.array(array)
            barrier.wait()
            total = sum(parts[i] for i in range(count))
            barrier.wait()
            return total
        out[index] = work(tiles.Team(index, count, all_reduce))
    running = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    [one.start() for one in running], [one.join() for one in running]
    return out


@quick
@pytest.mark.parametrize("count", [1, 3])
def test_tiles_columns_by_process(count, monkeypatch):
    """Each process gets its rows of columns of K, whose entries lie in tiles of all: those of the whole, piece by piece."""
    monkeypatch.setattr(tiles, "PIECE", 4 * 3 * 20)  # rows of three columns of float32 that are summed at a time
    x, indices = inputs(61), np.array([60, 0, 17])

    def work(team):
        return tiles.gram(linear, x, 16, jax.local_devices()[:1], True, team=team).columns(indices, own=True)
    whole = tiles.gram(linear, x, 16, quiet=True).columns(indices)
    for index, own in enumerate(threads(count, work)):
        assert own.dtype == np.float32 and (own == whole[index::count]).all()


@quick
@pytest.mark.parametrize("count", [2, 5])
def test_precondition_rows_by_process(count):
    """Processes that hold their rows of F only, some of them none, have the pivots, the spectrum and the
    P^-1 of one that holds all, also for a leading block, as far as F is: to float32."""
    K, r = spectrum(4 if count == 5 else 61, 1e4), np.random.default_rng(0).normal(size=(61, 3))
    def work(team):
        low = pcg.low_rank(Shared(K, team), 20, size=7)
        return low.F, low.outside, low(1e-3)(r[:len(K)]), low.leading(len(K) // 2)(1e-3)(r[:len(K) // 2])
    alone, = threads(1, work)
    for index, (F, *shared) in enumerate(threads(count, work)):
        assert np.allclose(F, alone[0][index::count], atol=1e-6 * np.abs(alone[0]).max())
        assert all(np.allclose(a, b, atol=1e-5 * np.abs(b).max()) for a, b in zip(shared, alone[1:]))


class Shared(Dense):
    """Dense, with a team."""
    def __init__(self, K, team):
        super().__init__(K)
        self.team = team

    def columns(self, indices, own=True):
        return self.K[self.team.index::self.team.count, indices]


# ------------------------------------------------------------------------------------- regression

@quick
def test_regression_rounding():
    """The residual that the exact kernel leaves of a solution with float32 tiles is the predicted one, to a
    factor of ten; and no more steps make it smaller."""
    x, fn = digits(300)[0].astype(np.float64), kernel.kernel_fn("fc", "ntk")
    exact = np.asarray(fn(x))
    K = tiles.TiledMatrix(exact.shape, exact.shape, True, {(0, 0): exact.astype(np.float32)})
    y, solver = data.one_hot(digits(300)[1]), regression.Solver(K, rank=60)
    for tol in (1e-9, 1e-12):
        alpha, _ = solver(y, 1e-4, tol)
        residual = y - exact @ alpha - 1e-4 * solver.scale * alpha
        reached = (np.linalg.norm(residual, axis=0) / np.linalg.norm(y, axis=0)).max()
        assert 0.1 < reached / regression.rounding(solver, y, alpha) < 10 and reached > 10 * tol


# ----------------------------------------------------------------------------------------- choose

@quick
def test_choose_leave_one_out_is_refits():
    """Leave-one-out errors of a real kernel are those of n regressions on the n - 1 other images, to 1e-8."""
    x, labels = digits(60)
    K, y = np.asarray(kernel.kernel_fn("cnn_vec", "ntk", depth=2)(x.astype(np.float64))), data.one_hot(labels)
    spectrum = choose.Spectrum(K)
    for ridge in (1.0, 1e-2, 1e-4):
        errors, dimension = spectrum.errors(y, ridge)
        lam = ridge * np.diag(K).mean()
        for i in range(60):
            rest = np.delete(np.arange(60), i)
            alpha = np.linalg.solve(K[np.ix_(rest, rest)] + lam * np.eye(59), y[rest])
            assert np.abs(errors[i] - (y[i] - K[i, rest] @ alpha)).max() < 1e-8
        assert abs(dimension - np.trace(K @ np.linalg.inv(K + lam * np.eye(60)))) < 1e-8


@quick
def test_choose_leaves_out_all_copies():
    """With mirror images and crops as rows, all copies of an image are left out: the error on the image is that of the
    regression on every copy of the others, to 1e-8; with the symmetric kernel it is the same."""
    x, labels = digits(24)
    view, fn = augment.expand(24, flips=True, crops=2, pad=1), kernel.kernel_fn("fc", "nngp")
    rows, y = view.of(x.astype(np.float64)).pixels(), data.one_hot(labels)[view.original]
    K = np.asarray(fn(rows))
    errors, _ = choose.Spectrum(K).errors(y, 0.01, copies=4)
    for i in range(24):
        rest = np.flatnonzero(view.original != i)
        alpha = np.linalg.solve(K[np.ix_(rest, rest)] + 0.01 * np.diag(K).mean() * np.eye(92), y[rest])
        assert np.abs(errors[i] - (y[4 * i] - K[4 * i, rest] @ alpha)).max() < 1e-8
    x, both = x.astype(np.float64), augment.expand(24, flips=True).of(x.astype(np.float64)).pixels()
    whole, y = np.asarray(fn(both)), data.one_hot(labels)
    explicit, _ = choose.Spectrum(whole).errors(np.repeat(y, 2, axis=0), 0.01, copies=2)
    half, _ = choose.Spectrum(np.asarray(augment.symmetric(fn)(x)), np.diag(whole).mean()).errors(y, 0.01)
    assert np.abs(explicit - half).max() < 1e-8


@quick
def test_choose_gcv_is_its_formula():
    """GCV from a block solve with random signs is n |alpha|^2 / (tr A^-1)^2 of a dense inverse, to what its probes
    leave of the trace, and chooses the same ridge; for few rows it is exact."""
    x, labels = digits(300)
    K = tiles.gram(kernel.kernel_fn("fc", "nngp"), x, tile=128, quiet=True)
    A, y, ridges = K.dense().astype(np.float64), data.one_hot(labels), [1.0, 0.1, 0.01, 1e-3]
    table = choose.generalised(regression.Solver(K, rank=100), y, ridges)
    want = []
    for row, ridge in zip(table, ridges):
        inverse = np.linalg.inv(A + ridge * np.diag(A).mean() * np.eye(300))
        want.append(300 * np.mean(np.sum((inverse @ y) ** 2, axis=0)) / np.trace(inverse) ** 2)
        assert row.ridge == ridge and abs(row.mse / want[-1] - 1) < 0.05
        assert abs(row.dimension - np.trace(A @ inverse)) < 0.03 * 300
    assert choose.best(table).ridge == ridges[int(np.argmin(want))]
    few = choose.generalised(regression.Solver(K.leading(100), rank=50), y[:100], [0.1])[0]
    inverse = np.linalg.inv(A[:100, :100] + 0.1 * np.diag(A)[:100].mean() * np.eye(100))
    assert abs(few.mse * np.trace(inverse)**2 / 100 / np.mean(np.sum((inverse @ y[:100]) ** 2, axis=0)) - 1) < 1e-2


@quick
def test_choose_with_an_intercept():
    """With intercept, a linear K of centred features chooses as ridge regression with an intercept: by validation the errors
    are those of scikit-learn's, fitted on the other rows alone; by GCV those of the hat matrix, whose trace counts it."""
    from sklearn.linear_model import Ridge
    rng = np.random.default_rng(0)
    X, y, ridges = rng.normal(size=(90, 4)), rng.normal(size=(90, 2)), [1.0, 0.1]
    y[60:] += 3  # a mean that the rows fitted do not know
    centred, y = X - X.mean(axis=0), y - y.mean(axis=0)
    K = tiles.known(centred @ centred.T)
    solver = regression.Solver(K, rank=4)
    for row in choose.validation(solver, y, ridges, 60, np.arange(60, 90), intercept=True):
        absolute = row.ridge * np.einsum("nd,nd->n", centred, centred)[:60].mean()
        f = Ridge(alpha=absolute).fit(X[:60], y[:60]).predict(X[60:])
        assert abs(row.mse / np.mean((f - y[60:]) ** 2) - 1) < 1e-3
    for row in choose.generalised(solver, y, ridges, intercept=True):
        features = np.concatenate([centred, np.ones((90, 1))], axis=1)
        penalty = row.ridge * solver.scale * np.diag([1, 1, 1, 1, 0])
        hat = features @ np.linalg.solve(features.T @ features + penalty, features.T)
        residual = y - hat @ y
        assert abs(row.mse / (90 * np.mean(np.sum(residual**2, axis=0)) / np.trace(np.eye(90) - hat) ** 2) - 1) < 1e-3
        assert abs(row.dimension - np.trace(hat)) < 1e-2


@quick
def test_choose_validation_is_dense_solves():
    """Without a room, too: the errors on the rows held out are those of dense solves, from the largest ridge down, and of
    ridges within the rounding of K there are none."""
    x, labels = digits(120)
    K, y = tiles.gram(kernel.kernel_fn("fc", "nngp"), x, tile=40, quiet=True), data.one_hot(labels)
    A = K.dense().astype(np.float64)
    table = choose.validation(regression.Solver(K, rank=24), y, [0.01, 1.0, 0.1], 96, np.arange(96, 120))
    assert [row.ridge for row in table] == [1.0, 0.1, 0.01]
    for row in table:
        alpha = np.linalg.solve(A[:96, :96] + row.ridge * np.diag(A)[:96].mean() * np.eye(96), y[:96])
        assert abs(row.mse / np.mean((A[96:, :96] @ alpha - y[96:]) ** 2) - 1) < 0.01
    K = tiles.known(np.diag([1.0, 1.0, 1.0, -1e-3]))
    rows = choose.validation(regression.Solver(K, "none"), np.eye(4), [1.0, 1e-5], 4, (K, np.eye(4)))
    assert [row.ridge for row in rows] == [1.0]


@quick
def test_choose_criteria():
    """Where none is asked for: leave-one-out for a small K, validation for a large one; GCV with copies is refused."""
    assert [choose.criterion(None, *size) for size in ((4096, 1), (4096, 4), (4097, 1), (4097, 2))] == [
        "loo", "loo", "validation", "validation"]
    assert choose.criterion("loo", 10**6, 2) == "loo"
    with pytest.raises(ValueError, match="gcv with 2 copies .* --select loo or validation"):
        choose.criterion("gcv", 100, 2)


@quick
def test_choose_among_no_finite_errors():
    """Targets too large to square, and inputs of 0, are said in a sentence; a ridge without a finite error is not chosen."""
    rows = [choose.Row(1.0, None, np.nan), choose.Row(0.1, None, 2.0), choose.Row(0.01, None, np.inf)]
    assert choose.best(rows).ridge == 0.1
    with pytest.raises(ValueError, match="no ridge has a finite error: look for NaN"):
        choose.best(rows[::2])
    with pytest.raises(ValueError, match="all inputs are 0"):
        choose.leave_one_out(choose.Spectrum(np.zeros((3, 3))), np.ones((3, 1)), [1.0])


def test_choose_prefers_the_larger_ridge():
    """Of ridges within a thousandth of the least error, the largest is taken; by score, the best score."""
    table = [choose.Row(1.0, 0.9, 2.0), choose.Row(0.1, 0.7, 1.0005), choose.Row(0.01, 0.8, 1.0)]
    assert choose.best(table).ridge == 0.1 and choose.best(table, "score").ridge == 1.0


@quick
def test_choose_ridges_that_are_too_small(capsys):
    """A ridge with which K is not positive definite is no candidate, nor is a smaller one; alone, it is an
    error that names a ridge, in the user's terms, that will do."""
    K = spectrum(100, 1e6).astype(np.float16).astype(np.float64)
    K = tiles.TiledMatrix(K.shape, K.shape, True, {(0, 0): K})
    y = np.random.default_rng(0).normal(size=(100, 2))
    lowest = np.linalg.eigvalsh(K.dense())[0] / K.diagonal().mean()
    solver = regression.Solver(K, "none", verbose=True)
    table = choose.validation(solver, y, [1.0, 0.1, 1e-9, 1e-10], 80, np.arange(80, 100))
    assert [row.ridge for row in table] == [1.0, 0.1] and "not positive definite" in capsys.readouterr().out
    assert [row.ridge for row in choose.leave_one_out(choose.Spectrum(K.dense()), y, [1.0, 0.1, 1e-9])] == [1.0, 0.1]
    with pytest.raises(pcg.Indefinite, match="within the rounding of K") as error:
        choose.leave_one_out(choose.Spectrum(K.dense()), y, [1e-9])
    assert choose.leave_one_out(choose.Spectrum(K.dense()), y, [error.value.cure])
    with pytest.raises(pcg.Indefinite, match=r"Raise the relative ridge \(--ridge\) to \d") as error:
        solver(y, 1e-9)
    assert -lowest < error.value.cure < -4 * lowest and solver(y, error.value.cure)[1].converged


# ---------------------------------------------------------------------------------------- augment

@quick
@pytest.mark.parametrize("flips, crops", [(False, 1), (True, 1), (False, 3), (True, 4)])
def test_augment_is_a_loop(flips, crops):
    """Rows of a view are the images that a plain loop pads, cuts and mirrors, in any order."""
    x = np.random.default_rng(0).normal(size=(5, 8, 6, 2)).astype(np.float32)
    view = augment.expand(5, flips, crops, seed=3, pad=2)
    assert view.copies == crops * (1 + flips) and len(view.of(x)) == 5 * view.copies
    rows = np.random.default_rng(1).permutation(5 * view.copies)
    for row, got in zip(rows, view.of(x)[rows].pixels()):
        wide = np.zeros((12, 10, 2), np.float32)
        wide[2:10, 2:8] = x[row // view.copies]
        down, right = view.offset[row]
        cut = wide[down:down + 8, right:right + 6]
        assert (got == (cut[:, ::-1] if view.flip[row] else cut)).all()


@quick
def test_augment_copies():
    """Copy 0 is the original, no copy comes twice, half are mirrored, fewer images are a prefix."""
    x = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    view = augment.expand(6, flips=True, crops=10, seed=0, pad=1 + 1)
    copies = view.of(x).pixels().reshape(6, 20, -1)
    assert (copies[:, 0] == x.reshape(6, -1)).all()
    assert all(len(np.unique(copies[i], axis=0)) == 20 for i in range(6))
    assert view.flip.reshape(6, 20).sum(axis=1).tolist() == [10] * 6
    assert (view.original == np.repeat(np.arange(6), 20)).all()
    small = augment.expand(3, flips=True, crops=10, seed=0, pad=2)
    assert (small.offset == view.offset[:60]).all() and (small.flip == view.flip[:60]).all()
    assert (augment.expand(6, True, 10, seed=1, pad=2).offset != view.offset).any()


@quick
def test_augment_in_tiles():
    """The kernel of a view, made tile by tile, is the kernel of all its images made at once."""
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    view, fn = augment.expand(4, flips=True, crops=3, pad=1), kernel.kernel_fn("cnn_vec", "ntk", depth=2)
    K = tiles.gram(fn, view.of(x), tile=7)
    everything = view.of(x).pixels()
    assert relative_error(K.dense(), np.asarray(fn(everything), np.float64)) < 1e-5


@pytest.mark.parametrize("protocol, backend", [("none", "cpu"), ("channel", "cpu"), ("zca", "cpu"), ("zca_unit", "cpu"),
                                               ("zca", "gpu"), ("zca_unit", "gpu")])
def test_augment_whitens_what_a_tile_asks_for(protocol, backend, monkeypatch):
    """Bytes are flipped and cropped and then whitened, by NumPy for a CPU and by JAX on another device: a block of a view is
    the whitening of its pixels, however few blocks are kept; and the kernel made of such blocks, by several devices, is
    that of all of them at once."""
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    whiten, fn = data.whitening(protocol, x)(0.1), kernel.kernel_fn("fc", "nngp")
    view = augment.expand(40, flips=True, crops=3, pad=2)
    assert view.of(x, whiten)[np.arange(50)].pixels().dtype == np.uint8
    corner = view.of(x, whiten)[np.flatnonzero((view.offset == 0).all(axis=1) & ~view.flip)].pixels()[:, 0, 0]
    assert len(corner) and (corner == np.rint(x.mean(axis=(0, 1, 2)))).all()
    want = np.asarray(whiten(view.of(x, whiten).pixels()))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for kept in (0, 5 * 2**27):
        monkeypatch.setattr(augment, "KEPT", kept)
        images = view.of(x, whiten)
        rows = np.array([7, 100, 3])
        for device in jax.devices()[:2]:
            block = images[rows].on(device)
            assert backend == "cpu" or block.devices() == {device}
            assert np.allclose(block, want[rows], rtol=1e-5, atol=1e-6)
        assert len(images.made) == 1
        assert relative_error(tiles.gram(fn, images, tile=50).dense(), np.asarray(fn(want), np.float64)) < 1e-5


@pytest.mark.parametrize("name, options", [("fc", {"depth": 1}), ("cnn_vec", {"depth": 1}), (POOLED, {})], ids=network_id)
def test_augment_symmetric(name, options):
    """k(f x, f x') = k(x, x'), and so the regression with k(x, x') + k(x, f x') on x predicts what that with k
    on x and f x does: to 1e-5, also of images that are their own mirror image, at a quarter of the entries."""
    x = np.random.default_rng(0).normal(size=(16, 4, 8, 2))
    x[3], x, x_test = (x[3] + x[3][:, ::-1]) / 2, x[:8], x[8:]
    y, fn, ridge = np.random.default_rng(1).normal(size=(8, 3)), kernel.kernel_fn(name, kernel.KINDS, **options), 1e-3
    blocks = [[fn(a, b) for b in (x, augment.mirror(x))] for a in (x, augment.mirror(x), x_test)]  # one shape: compiled once
    half = augment.symmetric(fn)
    for kind, (H, H_test) in enumerate(zip(half(x), half(x_test, x))):
        K = np.block([[np.asarray(K[kind]) for K in row] for row in blocks])
        K, K_test = K[:16], K[16:]
        assert relative_error(K[8:, 8:], K[:8, :8]) < 1e-10 and relative_error(K[8:, :8], K[:8, 8:]) < 1e-10
        f = K_test @ np.linalg.solve(K + ridge * np.eye(16), np.concatenate([y, y]))
        g = H_test @ np.linalg.solve(H + ridge * np.eye(8), y)
        assert np.abs(f - g).max() < 1e-5 * np.abs(f).max() and 4 * H.size == K.size


@quick
def test_augment_errors():
    """More crops than shifts, images that are too few, mirror images of vectors are refused."""
    with pytest.raises(ValueError, match=r"\(3, 5\): only images"):
        augment.symmetric(kernel.kernel_fn("fc", "nngp"))(np.ones((3, 5)))
    with pytest.raises(ValueError, match="1 <= crops <= 9"):
        augment.expand(5, crops=10, pad=1)
    with pytest.raises(ValueError, match=r"n >= 5"):
        augment.expand(5).of(np.zeros((4, 8, 8, 1)))


# ------------------------------------------------------------------------------------------- data

@quick
def test_data_digits():
    """1,437 + 360 real images, uint8, those of scikit-learn's own loader; the same test images for every seed."""
    from sklearn.datasets import load_digits
    x, y, x_test, y_test = data.load("digits")
    ours = np.column_stack([np.concatenate([x, x_test]).reshape(-1, 64), np.concatenate([y, y_test])])
    assert np.array_equal(np.unique(ours, axis=0), np.unique(np.column_stack(load_digits(return_X_y=True)), axis=0))
    assert x.shape == (1437, 8, 8, 1) and x_test.shape == (360, 8, 8, 1) and x.dtype == np.uint8
    assert y.dtype == np.int64 and set(y) == set(range(10)) and x.max() == 16
    assert (data.load("digits", seed=5)[2] == x_test).all() and (data.load("digits", seed=5)[0] != x).any()


@quick
def test_data_order():
    """Every prefix is balanced to one image, sizes are nested, seeds differ, all rows come once; not balanced, the first rows
    have all classes, and all other stretches their proportions."""
    _, y, _, _ = data.load("digits", n_train=1000)
    for n in (10, 37, 500, 1000):
        counts = np.bincount(data.load("digits", n_train=n)[1], minlength=10)
        assert counts.max() - counts.min() <= 1
        assert (data.load("digits", n_train=n)[1] == y[:n]).all()
    labels = np.repeat(np.arange(10), 7)
    assert sorted(data.order(labels, 0)) == list(range(70))
    assert (data.order(labels, 0) != data.order(labels, 1)).any()
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    shares = data.order(labels, 0, balanced=False)
    assert sorted(shares) == list(range(1000)) and (shares != data.order(labels, 1, balanced=False)).any()
    shares = labels[shares]
    assert set(shares[:3]) == {0, 1, 2}
    for start in range(0, 1000, 200):
        assert abs(np.bincount(shares[start:start + 200], minlength=3) - [180, 18, 2]).max() <= 2


@pytest.fixture
def cifar_folder(tmp_path, monkeypatch):
    """Files in the formats of CIFAR-10, 10.1 and 10.2 with 20 records each, pixel (0, 0) the label."""
    monkeypatch.setattr(data, "BATCH", 20)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        records = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        records[:, 0] = records[:, 1] = np.arange(20) % 10
        records.tofile(tmp_path / f"{name}.bin")
    images, labels = rng.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8), np.arange(7)
    np.save(tmp_path / "cifar10.1_v6_data.npy", images)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", labels.astype(np.int32))
    np.savez(tmp_path / "cifar102_test.npz", images=images[:5], labels=labels[:5])
    return tmp_path


@quick
def test_data_cifar10(cifar_folder):
    """Records are read as label, then planes R, G, B row by row; 10.1 and 10.2 replace the test set."""
    x, y, x_test, y_test = data.load("cifar10", cifar_folder)
    assert x.shape == (100, 32, 32, 3) and x_test.shape == (20, 32, 32, 3)
    assert (x[:, 0, 0, 0] == y).all() and (x_test[:, 0, 0, 0] == y_test).all()
    record = np.fromfile(cifar_folder / "test_batch.bin", np.uint8)[3 * 3073:4 * 3073]
    assert x_test[3, 5, 7, 2] == record[1 + 2 * 1024 + 5 * 32 + 7]
    for name, n in (("cifar10.1", 7), ("cifar10.2", 5)):
        loaded = data.load(name, cifar_folder)
        assert (loaded[0] == x).all() and loaded[2].shape == (n, 32, 32, 3)
        assert loaded[3].tolist() == list(range(n))


@needs_cifar
def test_data_cifar10_is_the_real_one():
    """The images beside the project have CIFAR-10's published balance, means and deviations."""
    x, y, x_test, y_test = data.load("cifar10", CIFAR)
    assert np.bincount(y).tolist() == [5000] * 10 and np.bincount(y_test).tolist() == [1000] * 10
    values = np.arange(256) / 255
    counts = [np.bincount(x[..., channel].ravel(), minlength=256) / x[..., 0].size for channel in range(3)]
    assert np.allclose([count @ values for count in counts], [0.4914, 0.4822, 0.4465], atol=1e-4)
    assert np.allclose([(count @ values**2 - (count @ values) ** 2) ** 0.5 for count in counts], [0.2470, 0.2435, 0.2616],
                       atol=1e-4)


@quick
def test_data_images_of_one_colour():
    """By zca_unit an image of one colour becomes 0, whatever rounding leaves of it: as bytes, float32, and on a device. One
    pixel that differs by one is no rounding."""
    x, size = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), np.float32(255)
    x[:4] = np.array([26, 77, 178, 255], np.uint8)[:, None, None, None]
    whiten, whiten_floats = (data.whitening("zca_unit", images)(0.1) for images in (x, x / size))
    seen = x[:5].copy()
    seen[4] = 255
    seen[4, 0, 0, 0] = 254
    for found in (whiten(seen), whiten_floats(seen / size), np.asarray(whiten_floats(jnp.asarray(seen / size)))):
        assert not found[:4].any() and np.linalg.norm(found[4]) > 0.1
    assert np.allclose(whiten.W, whiten_floats.W, rtol=1e-3, atol=1e-3)


def test_data_nothing_to_whiten():
    """Images that are all the same, or each of one colour, have no covariance: one sentence says which."""
    with pytest.raises(ValueError, match="all 8 images are the same"):
        data.whitening("zca", np.full((8, 2, 2, 1), 7, np.uint8))
    with pytest.raises(ValueError, match="all 8 images are of one colour"):
        data.whitening("zca_unit", np.arange(8, dtype=np.uint8).repeat(4).reshape(8, 2, 2, 1))


@quick
def test_data_cifar100(tmp_path):
    """A record of CIFAR-100: a coarse label, the fine one, which counts, and three planes; a record too few is refused."""
    rng = np.random.default_rng(0)
    x, fine = rng.integers(0, 256, (5, 32, 32, 3), np.uint8), np.array([3, 99, 0, 42, 7])
    rows = [bytes([1, label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(x, fine)]
    (tmp_path / "train.bin").write_bytes(b"".join(rows))
    images, labels = data._records(str(tmp_path / "train.bin"), 5, 2, 100)
    assert (images == x).all() and (labels == fine).all()
    with pytest.raises(ValueError, match="train.bin has 15370 bytes; 50,000 records of CIFAR have 153700000"):
        data.load("cifar100", str(tmp_path))


@quick
@pytest.mark.parametrize("damage, words", [
    (lambda d: (d / "data_batch_3.bin").unlink(), "data_batch_3.bin is not there; give --data"),
    (lambda d: (d / "test_batch.bin").write_bytes(b"x" * 100), "has 100 bytes; 20 records of CIFAR have"),
    (lambda d: (d / "data_batch_1.bin").write_bytes(b"\x0b" * 20 * 3073), "label 11 at row 0; expected"),
    (lambda d: np.save(d / "cifar10.1_v6_data.npy", np.ones((7, 3, 3, 3))), "float64.*expected uint8"),
    (lambda d: np.save(d / "cifar10.1_v6_data.npy", np.array([{}] * 7)), "without pickle"),
    (lambda d: (d / "cifar10.1_v6_labels.npy").write_bytes(b""), "labels.npy is not a complete"),
])
def test_data_damaged_files(cifar_folder, damage, words):
    """Missing, truncated, wrong shape, wrong label, pickled: the file is named and what is wrong."""
    damage(cifar_folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        data.load("cifar10.1" if "10.1" in words or "uint8" in words or "pickle" in words
                  or "labels.npy" in words else "cifar10", cifar_folder)
    assert "\n" not in str(error.value)


def flipped(path, step=1):
    """For every step-th byte of a file: its number, while that byte is another."""
    content = path.read_bytes()
    for number in range(0, len(content), step):
        path.write_bytes(content[:number] + bytes([content[number] ^ 0x15]) + content[number + 1:])
        yield number
    path.write_bytes(content)


@quick
def test_data_any_byte_damaged(tmp_path):
    """Whichever byte of an .npy or .npz is wrong, an array is read, or a sentence names the file."""
    np.save(tmp_path / "x.npy", np.arange(3.0))
    np.savez_compressed(tmp_path / "x.npz", x=np.arange(3.0))
    for name, key in (("x.npy", None), ("x.npz", "x")):
        for byte in flipped(tmp_path / name):
            try:
                assert isinstance(data.array(str(tmp_path / name), key), np.ndarray)
            except ValueError as error:
                assert re.match(f".*{name} is not a complete .* without pickle .*again$", str(error)), byte


@quick
def test_data_rows_asked_for():
    """More rows than there are, no rows, an unknown name: refused with the numbers."""
    with pytest.raises(ValueError, match="n_train=2000: expected 1 to 1437, the rows of digits"):
        data.load("digits", n_train=2000)
    with pytest.raises(ValueError, match="n_test=0"):
        data.load("digits", n_test=0)
    with pytest.raises(ValueError, match="'mnist' is unknown; choose one of digits"):
        data.load("mnist")


def archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest()


@quick
def test_data_download(cifar_folder, tmp_path, monkeypatch):
    """The archive is checked by its digest and extracted once; a wrong digest or path is refused."""
    members = {f"cifar-10-batches-bin/{f.name}": f.read_bytes() for f in cifar_folder.glob("*.bin")}
    url, md5 = archive(tmp_path / "cifar-10-binary.tar.gz", members)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setattr(data, "URL", url)
    with pytest.raises(ValueError, match=f"arrived with md5 {md5}, expected"):
        data.load("cifar10")
    assert not list(home.glob("data/*"))
    monkeypatch.setattr(data, "MD5", md5)
    assert data.load("cifar10")[0].shape == (100, 32, 32, 3)
    monkeypatch.setattr(data, "URL", "file:///nowhere")
    assert data.load("cifar10")[0].shape == (100, 32, 32, 3), "not fetched twice"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="could not be fetched from file:///nowhere"):
        data.load("cifar10")
    url, md5 = archive(tmp_path / "evil.tar.gz", {"../../evil": b"x"})
    monkeypatch.setattr(data, "URL", url)
    monkeypatch.setattr(data, "MD5", md5)
    with pytest.raises(tarfile.FilterError):
        data.load("cifar10")


@quick
def test_data_whitening():
    """zca with eps = 0 makes the covariance of what it was fitted on the identity; channel makes every channel mean 0
    and deviation 1; none divides by 255; each sees one image at a time, and only the images it was fitted on."""
    x = correlated(500)
    z = whitened(x, "zca", zca_eps=0).reshape(500, -1)
    assert z.dtype == np.float32 and np.abs(z.mean(axis=0)).max() < 1e-3
    assert np.abs(z.T @ z / 500 - np.eye(48)).max() < 1e-3
    s = whitened(x)
    assert np.allclose(s.mean((0, 1, 2)), 0, atol=1e-4) and np.allclose(s.std((0, 1, 2)), 1, atol=1e-4)
    flat = np.stack([x[..., 0] / 255, np.full(x.shape[:3], 0.7)], axis=3)  # float64, whose mean is rounded
    assert data.whitening("channel", flat)().sd[1] == 1
    assert np.allclose(whitened(x, "none"), x / 255, atol=1e-6)
    assert np.array_equal(data.whitening("none", flat)()(flat[:2].astype(np.float32)), flat[:2].astype(np.float32))
    for protocol in data.WHITENING:
        assert np.allclose(whitened(x[:1], protocol, x, 0.3)[0], whitened(x[:9], protocol, x, 0.3)[0], atol=1e-5)
    for protocol in ("zca", "zca_unit"):
        with pytest.raises(ValueError, match="zca_eps=0: .* singular.*zca_eps > 0"):
            whitened(x, protocol, x[:20], 0)
    with pytest.raises(ValueError, match="components=48: expected 1 to 47, fewer than the numbers of an image"):
        data.whitening("zca", x, components=48)
    with pytest.raises(ValueError, match="'pca' is unknown; choose one of none, channel, zca, zca_unit"):
        data.whitening("pca", x)


def correlated(n):
    x = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    x[:, :, 1:] = (x[:, :, 1:].astype(int) + x[:, :, :-1]) // 2  # neighbours are alike
    return x


@quick
@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("protocol", ["zca", "zca_unit"])
def test_data_whitening_is_its_formula(protocol, flips):
    """Both protocols are their formulas written out in float64, with the mirror images as rows if flips; also of an
    image of one colour, and of images that they were not fitted on."""
    x, new = correlated(300), np.random.default_rng(1).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    new[0] = 77
    fit = np.concatenate([x, x[:, :, ::-1]]) if flips else x

    def before(x):
        flat = x.reshape(len(x), -1).astype(np.float64)
        if protocol == "zca":
            return flat / 255 - (fit / 255).reshape(len(fit), -1).mean(axis=0)
        own = flat - flat.mean(axis=1, keepdims=True)
        return own / np.maximum(np.sqrt((own**2).sum(axis=1, keepdims=True)), 1e-300)
    C = before(fit).T @ before(fit) / len(fit)
    S, U = np.linalg.eigh(C)
    W = U @ np.diag((S + 0.1 * np.trace(C) / 48) ** -0.5) @ U.T
    got = whitened(new, protocol, x, 0.1, flips=flips).reshape(9, -1)
    assert np.abs(got - before(new) @ W).max() < 1e-4 * np.abs(got).max()
    few = whitened(new, protocol, x, 0.1, flips=flips, components=7)  # up to signs
    want = before(new) @ U[:, -7:] / np.sqrt(S[-7:] + 0.1 * np.trace(C) / 48)
    assert few.shape == (9, 1, 1, 7) and np.abs(abs(few[:, 0, 0]) - abs(want)).max() < 1e-4 * np.abs(want).max()


@quick
@pytest.mark.parametrize("protocol", ["channel", "zca", "zca_unit"])
def test_data_whitening_takes_little_memory(protocol):
    """Fitting works on blocks: it never holds all images as floats."""
    x = np.random.default_rng(0).integers(0, 256, (50_000, 8, 8, 1), np.uint8)
    tracemalloc.start()
    whiten = data.whitening(protocol, x)(0.1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 * x.nbytes < 8 * x.size / 3
    if protocol == "channel":
        assert np.allclose([whiten.mean, whiten.sd], [[x.mean()], [x.std()]], rtol=1e-6)


@quick
@pytest.mark.parametrize("protocol", ["channel", "zca", "zca_unit"])
def test_data_whitening_of_mirror_images(protocol):
    """Fitted with flips, the whitened mirror image is the mirror image of the whitened image."""
    x = correlated(100)
    for flips, same in ((True, True), (False, protocol == "channel")):
        whiten = data.whitening(protocol, x, flips=flips)(0.1)
        off = np.abs(whiten(x[:, :, ::-1]) - whiten(x)[:, :, ::-1]).max() / np.abs(whiten(x)).max()
        assert (off < 1e-5) == same


def rows_to_fit_on(name, folder, most):
    x = data.load(name, folder)[0]
    for n_train, n_fit, n in ((100, 400, 400), (100, 50, 100), (100, 10**6, most), (None, 400, most)):
        assert (data.load(name, folder, n_train, n_fit=n_fit)[0] == x[:n]).all()


@quick
def test_data_rows_to_fit_on():
    """n_fit brings more training rows, those that a larger n_train would bring, as far as there are."""
    rows_to_fit_on("digits", None, 1437)


def labels_of_a_file(save, load, y):
    """Labels as a column, one-hot, float or small integers are y; all else is refused by the name of the file.
    save(labels) writes them; load() -> labels."""
    for same in (y[:, None], np.eye(10)[y], np.eye(10, dtype=bool)[y], y.astype(np.float32), y[:, None].astype(np.uint8)):
        save(same)
        assert (load() == y).all() and load().dtype == np.int64
    for bad, words in ((y + 0.5, "label .*5 at row 0"), (np.where(y == y[3], np.nan, y), "label nan at row"),
                       (y.astype(str), r"labels <U\d+"), (np.tile(y[:, None], 2), "labels int64 .*, 2"),
                       (np.eye(10)[y] + np.eye(10)[(y + 1) % 10], "labels float64 .*, 10"), (y - 1, "label -1 at row"),
                       (y + 2.0**40, "at row 0"), (y[:, None, None], "labels int64"), (y.astype(complex), "labels complex")):
        save(bad)
        with pytest.raises(ValueError, match=words) as error:
            load()
        assert "npy" in str(error.value) or "npz" in str(error.value)


@quick
def test_data_labels(cifar_folder):
    """What a file holds as labels: (n,), (n, 1) and one-hot rows mean the same, anything else is refused by name."""
    def save2(y):
        np.savez(cifar_folder / "cifar102_test.npz", images=images2, labels=y)
    images2 = np.load(cifar_folder / "cifar102_test.npz")["images"]
    y1, y2 = np.arange(len(np.load(cifar_folder / "cifar10.1_v6_labels.npy"))) % 10, np.arange(len(images2)) % 10
    labels_of_a_file(lambda y: np.save(cifar_folder / "cifar10.1_v6_labels.npy", y),
                     lambda: data.load("cifar10.1", cifar_folder)[3], y1)
    labels_of_a_file(save2, lambda: data.load("cifar10.2", cifar_folder)[3], y2)


@quick
def test_data_one_hot():
    """Targets are 1 - 1/classes for the class and -1/classes elsewhere."""
    assert np.allclose(data.one_hot(np.array([2, 0]), 4),
                       [[-0.25, -0.25, 0.75, -0.25], [0.75, -0.25, -0.25, -0.25]])
    for bad in ([-1, 0], [0, 4], [0.5, 1], ["a", "b"]):
        with pytest.raises(ValueError, match="y (has label|holds labels)"):
            data.one_hot(np.array(bad), 4)


# ------------------------------------------------------------------------------------------ train

def train(tmp_path, *flags):
    return train_cifar.main([*flags, "--out", str(tmp_path), "--quiet"])


@quick
def test_train_smoke(tmp_path):
    """With no flags: 97 % or more on digits, and one line of runs.jsonl with all there is to know."""
    result = train(tmp_path)
    assert result["test_accuracy"] >= 0.97 and result["cg_converged"] and result["cg_residual"] <= 1e-6
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0]) == result
    assert result["entries"] >= 1437 * 1438 // 2 + 1437 * 360
    assert {"test_mse", "ridge", "cg_iterations", "entries_per_second", "seconds", "peak_memory_gb",
            "device", "devices", "jax", "neural_tangents", "commit", "dirty"} <= set(result)
    assert result["config"]["seed"] == 0 and result["config"]["n_train"] == 1437
    assert max(result["search"], key=lambda row: row[1])[1] > 0.97 and result["select"] == "loo"
    assert result["loo_score"] > 0.97 and 0 < result["effective_dimension"] < 1437


def test_train_is_a_dense_solve(tmp_path):
    """Accuracy and error are those of a dense float64 Cholesky solve of neural_tangents' kernel."""
    result = train(tmp_path, "--n_train", "150", "--n_test", "100", "--kernel", "cnn_vec", "--depth", "2", "--kind", "ntk",
                   "--ridge", "1e-3", "--whiten", "channel", "--fit_on", "120")
    x, labels, x_test, test_labels = data.load("digits", n_train=150, n_test=100)
    x, x_test = (whitened(z, fit=x[:120]).astype(np.float64) for z in (x, x_test))
    K = reference("cnn_vec", "ntk", x, depth=2)
    A = K + 1e-3 * np.diag(K).mean() * np.eye(150)
    f = reference("cnn_vec", "ntk", x_test, x, depth=2) @ np.linalg.solve(A, data.one_hot(labels))
    assert result["test_accuracy"] == np.mean(f.argmax(axis=1) == test_labels)
    assert abs(result["test_mse"] - np.mean((f - data.one_hot(test_labels)) ** 2)) < 1e-5


@needs_cifar
def test_train_cifar_is_a_dense_solve(tmp_path):
    """On CIFAR-10 too, 1,500 images: accuracy within 0.1 point of dense Cholesky at the same ridge, for both kinds."""
    results = train(tmp_path, "--dataset", "cifar10", "--data", CIFAR, "--n_train", "1500", "--n_test",
                    "2000", "--kind", "both", "--whiten", "channel", "--fit_on", "2000")
    x, labels, x_test, test_labels = data.load("cifar10", CIFAR, n_train=2000, n_test=2000)
    whiten = data.whitening("channel", x)()
    x, labels = np.asarray(whiten(x[:1500]), np.float64), labels[:1500]
    x_test = np.asarray(whiten(x_test), np.float64)
    for result, K in zip(results.values(), kernel.kernel_fn("fc", kernel.KINDS)(np.concatenate([x, x_test]), x)):
        K, K_test = np.split(np.asarray(K), [1500])
        A = K + result["ridge"] * np.diag(K).mean() * np.eye(1500)
        f = K_test @ np.linalg.solve(A, data.one_hot(labels))
        assert abs(result["test_accuracy"] - np.mean(f.argmax(axis=1) == test_labels)) < 0.001
        assert result["test_accuracy"] > 0.37


def test_train_flags_that_change_nothing(tmp_path):
    """Tile side, preconditioner, rank and device count change the way, not the answer: a ridge that
    magnifies the rounding of K, 6e-8, by no more than 10."""
    flags = ["--n_train", "250", "--n_test", "100", "--ridge", "0.1", "--tol", "1e-9"]
    expected = train(tmp_path, *flags)
    for more in (["--tile", "37"], ["--precondition", "none"], ["--precondition", "jacobi"],
                 ["--rank", "7"], ["--max_iters", "300"]):
        assert abs(train(tmp_path, *flags, *more)["test_mse"] / expected["test_mse"] - 1) < 1e-6, more
    done = subprocess.run([sys.executable, "train_cifar.py", *flags, "--out", tmp_path], cwd=HERE,
                          capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[-1])
    assert result["devices"] == os.cpu_count() and "test accuracy" in done.stdout
    assert abs(result["test_mse"] / expected["test_mse"] - 1) < 1e-6


def test_train_flags_that_change_something(tmp_path):
    """Every flag does what it says: each one gives another answer."""
    flags = ["--n_train", "100", "--n_test", "50", "--ridge", "1e-3", "--depth", "1", "--tile", "25"]  # compiles at once
    seen = {train(tmp_path, *flags)["test_mse"]}
    for more in (["--kind", "ntk"], ["--kernel", "cnn_vec"], ["--depth", "2"], ["--whiten", "none"],
                 ["--whiten", "channel"], ["--whiten", "zca_unit"], ["--zca_eps", "3"], ["--flips"], ["--crops", "3"],
                 ["--w_std", "1", "--b_std", "0.5"], ["--b_std", "0.5"], ["--head", "relu"], ["--head", "exp"],
                 ["--head", "exp", "--gamma", "3"],
                 ["--flips", "--crops", "3"], ["--ridge", "1"], ["--seed", "1"], ["--n_train", "90"],
                 ["--n_test", "40"], ["--fit_on", "50"], ["--tol", "0.3"], ["--flips", "--ridge", "auto"]):
        mse = train(tmp_path, *flags, *more)["test_mse"]
        assert mse not in seen, more
        seen.add(mse)
    with pytest.warns(UserWarning, match="not converged"):
        assert train(tmp_path, *flags, "--max_iters", "2")["cg_iterations"] == 2
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len({json.dumps([run["config"], run["ridge"]]) for run in lines}) == len(lines)


def test_train_engines_and_both_kinds(tmp_path):
    """All engines that are there, one answer; --kind both is the two runs, each with its line in runs.jsonl.

    neural_tangents to 1e-4 only: of an image with itself its float32 kappa0 has an error of 1e-4,
    the square root of the rounding of c."""
    flags = ["--n_train", "24", "--n_test", "12", "--kernel", "cnn_gap", "--depth", "1", "--ridge", "0.1"]
    with as_users_have_it():
        seen = {engine: train(tmp_path, *flags, "--kind", "both", "--engine", engine)
                for engine in train_cifar.ENGINES}
    first = next(iter(seen))  # fused, where fast/ is there
    for kind in kernel.KINDS:
        for engine, tolerance in (("plain", 1e-5), ("nt", 1e-4)):
            mse = seen[engine][kind]["test_mse"]
            assert abs(mse / seen[first][kind]["test_mse"] - 1) < tolerance
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["config"]["kind"] for run in lines] == ["nngp", "ntk"] * len(seen)
    assert all(run["one_pass"] and run["seconds"]["kernel"] > 0 for run in lines)
    alone = train(tmp_path, *flags, "--kind", "ntk")
    assert abs(alone["test_mse"] / seen[first]["ntk"]["test_mse"] - 1) < 1e-5


def test_train_flips_are_exact(tmp_path):
    """--flips answers as --flips explicit does, ridge for ridge, to 1e-5, from half of the entries, or a
    quarter of K; also with crops, and with a ridge chosen by leave-one-out, all copies of an image left out; for the
    whitening is fitted on mirror images too."""
    flags = ["--n_train", "64", "--n_test", "50", "--kernel", "cnn_vec", "--depth", "1", "--ridge", "0.1",
             "--tol", "1e-9", "--tile", "16"]  # one shape, which compiles once for all of these
    for more in ([], ["--crops", "3"], ["--whiten", "channel"], ["--ridge", "1,0.1,0.01"],
                 ["--engine", "plain", "--kind", "both"]):
        results = [train(tmp_path, *flags, *more, "--flips", flips) for flips in ("symmetric", "explicit")]
        for half, whole in zip(*(of.values() if "both" in more else [of] for of in results)):
            assert half["ridge"] == whole["ridge"] and abs(half["test_mse"] / whole["test_mse"] - 1) < 1e-5, more
            assert half["test_accuracy"] == whole["test_accuracy"] and whole["rows"] == 2 * half["rows"]
            assert half["entries"] < 0.45 * whole["entries"]


@pytest.mark.parametrize("flips", [[], ["--flips"]])
def test_train_averages(tmp_path, flips):
    """--average N adds the accuracy of the mean over N crops of each test image, and without --flips over their
    mirror images; the answer for the images themselves stays as it is."""
    flags = ["--n_train", "100", "--n_test", "80", "--ridge", "0.1", "--tol", "1e-9", "--whiten", "channel", *flips]
    plain, averaged = train(tmp_path, *flags), train(tmp_path, *flags, "--average", "3")
    assert averaged["test_accuracy"] == plain["test_accuracy"]
    assert abs(averaged["test_mse"] / plain["test_mse"] - 1) < 1e-6
    everything, labels, bytes_test, test_labels = data.load("digits", None, None, 80)
    x, labels, fn = whitened(everything).astype(np.float64)[:100], labels[:100], kernel.kernel_fn("fc", "nngp")
    fn = augment.symmetric(fn) if flips else fn
    ridge = 0.1 * np.diag(kernel.kernel_fn("fc", "nngp")(x)).mean()
    alpha = np.linalg.solve(fn(x) + ridge * np.eye(100), data.one_hot(labels))
    view = augment.expand(80, not flips, 3, 1, pad=1)
    x_test = whitened(view.of(bytes_test, data.whitening("channel", everything)()).pixels(), fit=everything).astype(np.float64)
    f = (fn(x_test, x) @ alpha).reshape(80, view.copies, 10).mean(axis=1)
    assert averaged["test_accuracy_averaged"] == np.mean(f.argmax(axis=1) == test_labels)
    with pytest.raises(SystemExit):
        train(tmp_path, "--average", "2", "--variance")


def test_train_evidence(tmp_path, capsys):
    """A run says what its solve has done and how fast, with a residual for each class."""
    flags = ["--n_train", "150", "--n_test", "60", "--ridge", "1e-2", "--out", str(tmp_path)]
    result = train_cifar.main([*flags, "--verbose"])
    said = capsys.readouterr().out
    assert re.search(r"solve: \d+ steps of .* rank \d+, residuals .* multiplied at \S+ GB/s, read alone at \S+ GB/s", said)
    assert re.search(r"effective dimension \S+ of 150", said) and "leave-one-out " in said and result["loo_mse"] > 0
    assert len(result["cg_residuals"]) == 10 and max(result["cg_residuals"]) == result["cg_residual"] <= 1e-6
    assert len(result["cg_history"]) == result["cg_iterations"] + 1 and result["rank"] > 0
    assert result["read_bytes_per_second"] > 0 and result["product_bytes_per_second"] > 0
    train_cifar.main([*flags, "--tol", "1e-11"])
    assert "note: rounding K to float32 alone makes a residual of about" in capsys.readouterr().out


def test_train_ridge_comes_from_validation(tmp_path):
    """--select validation: the ridge is the best on the last fifth of the training set."""
    flags = ["--n_train", "200", "--ridge", "10,1,0.01,1e-4", "--flips", "--whiten", "channel"]
    result = train(tmp_path, *flags, "--select", "validation")
    x, y, _, _ = data.load("digits")
    view, fn = augment.expand(160, flips=True, pad=1), kernel.kernel_fn("fc", "nngp")
    x, y = whitened(x).astype(np.float64)[:200], y[:200]
    fit, targets = view.of(x[:160]).pixels(), data.one_hot(y)[view.original]
    K, K_val = (np.asarray(fn(z, fit), np.float64) for z in (fit, x[160:]))
    for ridge, accuracy, mse in result["search"]:
        f = K_val @ np.linalg.solve(K + ridge * np.diag(K).mean() * np.eye(320), targets)
        assert abs(accuracy - np.mean(f.argmax(axis=1) == y[160:])) <= 1 / 40 + 1e-9
        assert abs(mse / np.mean((f - data.one_hot(y[160:])) ** 2) - 1) < 0.02
    assert result["ridge"] == choose.best([choose.Row(*row) for row in result["search"]]).ridge


def test_train_ridge_comes_from_leave_one_out(tmp_path):
    """By default: the ridge is the best of the regressions that leave out one image each, mirror images and all."""
    flags = ["--n_train", "40", "--ridge", "10,1,0.01,1e-4", "--flips", "--whiten", "channel"]
    result = train(tmp_path, *flags)
    x, y, _, _ = data.load("digits")
    x, y, fn = whitened(x).astype(np.float64)[:40], data.one_hot(y[:40]), kernel.kernel_fn("fc", "nngp")
    rows, targets = np.concatenate([x, x[:, :, ::-1]]), np.concatenate([y, y])
    K = np.asarray(fn(rows))
    for ridge, accuracy, mse in result["search"]:
        f = []
        for i in range(40):
            rest = np.delete(np.arange(80), [i, 40 + i])
            A = K[np.ix_(rest, rest)] + ridge * np.diag(K).mean() * np.eye(78)
            f.append(K[i, rest] @ np.linalg.solve(A, targets[rest]))
        assert abs(accuracy - np.mean(np.argmax(f, axis=1) == y.argmax(axis=1))) < 1e-9
        assert abs(mse / np.mean((f - y) ** 2) - 1) < 1e-4
    assert result["ridge"] == choose.best([choose.Row(*row) for row in result["search"]]).ridge
    assert abs(result["loo_mse"] / min(row[2] for row in result["search"]) - 1) < 1e-3


@pytest.mark.parametrize("select", choose.CRITERIA)
def test_train_choices_never_see_a_test_row(tmp_path, monkeypatch, select):
    """With the test labels permuted and the test images replaced, every choice is the same: whitening and its
    regularisation, depth, b_std, ridge."""
    flags = ["--n_train", "150", "--n_test", "60", "--ridge", "1,0.1,0.01", "--select", select, "--depth", "1,3",
             *({"loo": ["--whiten", "zca,zca_unit", "--zca_eps", "0.1,10"], "gcv": ["--b_std", "0,0.3"],
                "validation": ["--whiten", "zca", "--zca_eps", "0.1,10"]}[select])]
    choices = ("whiten", "zca_eps", "depth", "b_std")
    result = train(tmp_path, *flags)
    real = data.load

    def spoilt(*args, **options):
        x, y, x_test, y_test = real(*args, **options)
        return x, y, 255 - x_test, np.random.default_rng(0).permutation(y_test)
    monkeypatch.setattr(data, "load", spoilt)
    again = train(tmp_path, *flags)
    assert again["test_accuracy"] != result["test_accuracy"]
    assert again["ridge"] == result["ridge"] and again["compared"] == result["compared"]
    assert all(again["config"][name] == result["config"][name] for name in choices)
    table = result["compared"]
    assert len(table) == len({json.dumps(row[0]) for row in table}) == {"loo": 8, "gcv": 4, "validation": 4}[select]
    best = min(table, key=lambda row: row[3])
    chosen = next(row for row in table if all(result["config"][name] == value for name, value in row[0].items()))
    assert chosen[3] <= 1.001 * best[3]


def test_train_compares_as_runs_alone_do(tmp_path):
    """What is compared are the leave-one-out errors of runs with one value each; a value that has no meaning for
    another is not tried twice."""
    flags = ["--n_train", "80", "--n_test", "20", "--ridge", "1,0.1,0.01", "--depth", "2"]
    result = train(tmp_path, *flags, "--whiten", "channel,zca", "--zca_eps", "1,100", "--head", "linear,exp", "--w_std",
                   "1.5")
    assert len(result["compared"]) == 3 * 2
    for setting, ridge, _, mse in result["compared"]:
        named = [word for name, value in setting.items() if value is not None for word in (f"--{name}", str(value))]
        alone = train(tmp_path, *flags, "--w_std", "1.5", *named)
        assert alone["ridge"] == ridge and abs(alone["loo_mse"] / mse - 1) < 1e-5


@quick
@pytest.mark.parametrize("name", kernel.IMAGES)
def test_train_defaults(name):
    """Every network has a whitening of its own, and a flag that is given wins."""
    def whitenings(*flags):
        args = train_cifar.parse(["--kernel", name, *flags])
        settings = [SimpleNamespace(**{**vars(args), **one}) for one in experiment.settings(args)]
        return [(one.whiten, train_cifar.eps(one)) for one in settings]
    best = train_cifar.WHITENING[name]
    assert whitenings() == [best] and whitenings("--zca_eps", "7") == [(best[0], 7.0)]
    other = {"zca": "zca_unit", "zca_unit": "zca"}[best[0]]
    assert whitenings("--whiten", f"channel,{other},{best[0]},none") == [("channel", None), (other, 0.1), best, ("none", None)]


@quick
def test_train_devices_that_are_not_there(tmp_path):
    """More devices than JAX sees are refused."""
    with pytest.raises(ValueError, match="--devices 5, but JAX sees 4 here"):
        train(tmp_path, "--n_train", "20", "--ridge", "1", "--devices", "5")


def refused(running, words):
    """A process that has begun fails with one line, and without a traceback."""
    _, err = running.communicate()
    assert running.returncode and re.search(words, err) and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("flags, words", [
    (["--n_train", "2000"], "ValueError: n_train=2000: expected 1 to 1437, the rows of digits"),
    (["--kernel", "fc", "--depth", "-1"], "ValueError: depth=-1 does not fit fc"),
    (["--dataset", "cifar10", "--data", "nowhere"], "FileNotFoundError: .*data_batch_1.bin is not there"),
    (["--n_train", "4", "--select", "validation"], "ValueError: n_train=4: a validation split needs at least 5 images"),
    (["--flips", "explicit", "--select", "gcv"], "ValueError: --select gcv with 2 copies"),
    (["--whiten", "pca"], "--whiten pca: expected none, channel, zca, zca_unit"),
    (["--depth", "1,x"], "--depth 1,x: expected a whole number, or several separated by commas"),
    (["--w_std", "0"], "--w_std 0: expected a number > 0, or several"),
    (["--head", "softmax"], "ValueError: head='softmax', .* expected one of linear, cosine, relu, exp"),
    (["--whiten", "zca", "--zca_eps", "nan"], "--zca_eps nan: expected a number >= 0, or several"),
    (["--plan", "--depth", "1,2"], "--plan and --load take one network: one value for each of its flags"),
    (["--ridge", "often"], "--ridge often: expected a number"),
    (["--ridge", "-1"], "expected numbers >= 0"),
    (["--ridge", "1,nan"], "--ridge nan: expected numbers >= 0"),
    (["--store", ""], "--store is empty: expected a value, or leave it out"),
    (["--tol", "nan"], "--tol nan: expected a number between 0 and 1"),
    (["--zca_eps", "inf"], "--zca_eps inf: expected a number >= 0, or several"),
    (["--w_std", "-1"], "--w_std -1: expected a number > 0, or several"),
    (["--seed", "-1"], "--seed -1: expected a whole number >= 0"),
    (["--tile", "0"], "--tile 0: expected at least 1"),
    (["--n_test", "-7"], "--n_test -7: expected at least 1"),
    (["--crops", "0"], "--crops 0: expected at least 1"),
    (["--plan", "--rate", "-5"], "--rate -5.0: expected at least 1"),
    (["--plan", "--variance"], "--plan counts one solve: leave out --sizes, --variance and --plot"),
    (["--plan", "--select", "loo"], "--plan counts a search by validation rows and the low-rank preconditioner: leave out"),
    (["--plan", "--precondition", "none"], "--plan counts .* leave out --select and --precondition"),
    (["--plan", "--load", "m.npz", "--predict", "x.npy"], "--plan with --load: choose one"),
    (["--head", "exp", "--gamma", "0"], "--gamma 0: expected a number > 0, or several"),
    (["--crops", "10"], "ValueError: .*1 <= crops <= 9"),
    (["--n_train", "20", "--fit_on", "3000"], "ValueError: --fit_on 3000, but there are 1437 training images"),
    (["--devices", "0"], "--devices 0: expected at least 1"),
    (["--sizes", "10,x"], "--sizes 10,x: expected whole numbers separated by commas"),
    (["--sizes", "10,30", "--n_train", "20"], "--sizes 10,30: expected 1 to n_train=20"),
    (["--rank", "0"], "--rank 0: expected at least 1"),
    (["--components", "9", "--flips"], "--components makes vectors of whitened images: .* --flips explicit"),
    (["--components", "9", "--whiten", "zca,none"], "--components makes .* --whiten zca or zca_unit"),
    (["--plan", "--components", "9", "--whiten", "channel"], "--components makes .* --whiten zca or zca_unit"),
    (["--load", "m.npz"], "--load FILE and --predict FILE go together"),
    (["--load", "m.npz", "--predict", "x.npy"], "FileNotFoundError: m.npz is not there; --load takes a file"),
    (["--kind", "ntk", "--variance"], "--variance with --kind ntk: .*use --kind nngp"),
    (["--kind", "both", "--save", "m.npz"], "--save with --kind both: a file holds one model"),
    (["--load", ".", "--predict", "x.npy"], "FileNotFoundError: . is a folder; --load takes a file"),
    (["--save", "nowhere/m.npz"], "nowhere/m.npz cannot be written: expected a file in a folder that is there"),
    (["--plot", "."], "--plot .: expected a name that ends in"),
])
def test_train_errors(flags, words, tmp_path, capsys):
    """What is wrong with the flags is said in one line."""
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        train_cifar.main(["--out", str(tmp_path), "--quiet", *flags])
    text = f"{type(error.value).__name__}: {error.value}" if error.type is not SystemExit else capsys.readouterr().err
    assert re.search(words, text) and len(text.splitlines()) == 1, text


@pytest.mark.parametrize("flags, words", [(["--n_train", "2000"], "^ValueError: n_train=2000: expected 1 to 1437"),
                                          (["--ridge", "often"], "^train_cifar.py: --ridge often: expected a number")])
def test_train_errors_of_the_script(flags, words, tmp_path):
    """At the command line, what is wrong is one line, without a traceback, and the script fails."""
    refused(script(tmp_path, *flags), words)


@pytest.mark.parametrize("flags, words", [
    (["--data", "x"], "--data changes nothing here: the digits come with scikit-learn"),
    (["--whiten", "channel", "--zca_eps", "1"], "--zca_eps changes nothing here: --whiten channel has no such number"),
    (["--gamma", "2"], "--gamma changes nothing here: it belongs to --head exp"),
    (["--precondition", "none", "--rank", "9"], "--rank changes nothing here: --precondition none has no rank"),
    (["--ridge", "1", "--select", "loo"], "--select changes nothing here: there is one ridge and one network"),
    (["--whiten", "none", "--fit_on", "50"], "--fit_on changes nothing here"),
    (["--hosts", "3"], "--hosts changes nothing here: it belongs to --plan"),
    (["--load", "m", "--predict", "x", "--ridge", "1"], "--ridge changes nothing here: --load takes all that")])
def test_train_flags_without_effect(flags, words, capsys):
    """A flag that changes nothing in a run is an error that says why, also where it has the default's value."""
    with pytest.raises(SystemExit):
        train_cifar.parse(flags)
    assert words in capsys.readouterr().err
    assert train_cifar.parse(["--zca_eps", "100"]).zca_eps == [100.0]  # which is used


def imbalanced(monkeypatch, n=2000):
    """Digits whose classes run out: 100 of classes 1 and 2 each, the others of class 0."""
    x = np.random.default_rng(0).integers(0, 17, (n, 8, 8, 1), dtype=np.uint8)
    y = np.array([0] * (n - 200) + [1] * 100 + [2] * 100)
    rows = data.order(y, 0)
    monkeypatch.setattr(data, "load", lambda *_, **__: (x[rows], y[rows], x[:50], y[:50]))


def test_train_validation_that_says_nothing(tmp_path, monkeypatch, capsys):
    """Held-out images of one class choose no ridge: gcv does, or the run is refused; so are training images of one class."""
    imbalanced(monkeypatch)
    monkeypatch.setattr(choose, "DENSE", 500)
    assert train(tmp_path, "--ridge", "1,0.1")["select"] == "gcv"
    assert "held out, are of 1 of 3 classes, so gcv chooses" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the last 400 training images, which are held out, are of 1 of 3 classes"):
        train(tmp_path, "--ridge", "1,0.1", "--select", "validation")
    x = np.random.default_rng(0).integers(0, 17, (20, 8, 8, 1), dtype=np.uint8)
    monkeypatch.setattr(data, "load", lambda *_, **__: (x, np.full(20, 3), x, np.full(20, 3)))
    with pytest.raises(ValueError, match="all 20 training images are of class 3"):
        train(tmp_path)


@quick
def test_train_sizes_equal_runs_alone(tmp_path):
    """Each size of a row gives what it gives alone, with crops, flips and a choice of ridges; the record runs again."""
    flags = ["--n_test", "40", "--crops", "2", "--flips", "--ridge", "1e-3,1e-2"]
    together = train(tmp_path, "--sizes", "30,60", *flags)
    for n in (30, 60):
        alone = train(tmp_path, "--n_train", str(n), *flags)
        assert together[n]["ridge"] == alone["ridge"]
        assert {**together[n]["config"], "tile": 0} == {**alone["config"], "tile": 0}
        assert abs(together[n]["test_mse"] / alone["test_mse"] - 1) < 1e-6


def test_train_more_than_ten_classes(tmp_path, monkeypatch):
    """A data set of 14 classes, added as README says, is a dense solve with 14 outputs."""
    rng, load = np.random.default_rng(0), data.load
    y = np.arange(112) % 14
    means = rng.integers(40, 215, (14, 8, 8, 1))
    x = (means[y] + rng.integers(-40, 40, (112, 8, 8, 1))).astype(np.uint8)
    monkeypatch.setitem(data.DATASETS, "mine", ((8, 8, 1), 84, 28, 14))
    monkeypatch.setattr(data, "load", lambda name, *rest, **more: (
        (x[:84], y[:84], x[84:], y[84:]) if name == "mine" else load(name, *rest, **more)))
    result = train(tmp_path, "--dataset", "mine", "--ridge", "0.01")
    z = whitened(x, "zca", x[:84], 100.0)
    K = np.asarray(kernel.kernel_fn("fc", "nngp")(z.astype(float)))
    A = K[:84, :84] + 0.01 * np.diag(K)[:84].mean() * np.eye(84)
    f = K[84:, :84] @ np.linalg.solve(A, np.eye(14)[y[:84]] - 1 / 14)
    assert result["test_accuracy"] == np.mean(f.argmax(axis=1) == y[84:]) and result["config"]["classes"] == 14
    assert abs(result["test_mse"] / np.mean((f - np.eye(14)[y[84:]] + 1 / 14) ** 2) - 1) < 1e-4


def begun(command, **env):
    """A process that hears Ctrl-C, as one that was started in a terminal does; what starts the tests may ignore it."""
    def hear():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, cwd=HERE, env={**os.environ, **env}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=hear)


def script(tmp_path, *flags, before=(), **env):
    """train_cifar.py in a process of its own, which has begun; `before`: a command that runs it."""
    return begun([*before, sys.executable, "train_cifar.py", "--out", tmp_path, *map(str, flags)], **env)


def test_train_without_git(tmp_path):
    """A machine without git runs everything; the record says that nothing is known of the commit."""
    out, err = script(tmp_path, "--n_train", 50, PATH=str(tmp_path)).communicate()
    run = json.loads((tmp_path / "runs.jsonl").read_text())
    assert "test accuracy" in out and run["commit"] is run["dirty"] is None, err


@pytest.mark.skipif(not shutil.which("taskset"), reason="taskset is not here")
def test_train_takes_the_cores_it_may_use(tmp_path):
    """Held to one core by taskset, a run takes one device."""
    out, err = script(tmp_path, "--n_train", 50, before=("taskset", "-c", "0")).communicate()
    run = json.loads((tmp_path / "runs.jsonl").read_text())
    assert run["devices"] == run["cores"] == 1, err


@pytest.mark.parametrize("store", [False, True])
def test_train_interrupted(tmp_path, store):
    """Ctrl-C ends a run with one line that says what is kept, and exit code 130."""
    running = script(tmp_path, "--kernel", "cnn_gap", "--depth", 2, "--n_train", 1400, "--tile", 8,  # minutes of work
                     "--verbose", *(["--store", tmp_path / "K"] if store else []), PYTHONUNBUFFERED="1")
    assert running.stdout.readline()  # the flags
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    last = err.splitlines()[-1]
    assert running.returncode == 130 and "Traceback" not in err and last.startswith("interrupted: "), err
    assert (f"is in {tmp_path / 'K'}; run the same command" if store else "with --store DIR") in last


def test_train_interrupted_in_a_callback():
    """Ctrl-C ends the run with one line also where its exception is swallowed, as in a callback of the garbage collector."""
    code = ("import argparse, experiment, gc, time\nexperiment.PATIENCE = 1\n"
            "def busy(*_):\n    print(1, flush=True)\n    time.sleep(100)\n"
            "def deaf():\n    gc.callbacks.append(busy)\n    while True:\n        gc.collect()\n"
            "experiment.run(deaf, argparse.Namespace(devices=1))")
    running = begun([sys.executable, "-c", code])
    assert running.stdout.readline()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and err.startswith("interrupted: nothing was kept") and len(err.splitlines()) == 1, err


@quick
def test_train_out_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """--out that cannot be written is refused before any work and named; a disk that fills up later costs the record, not the
    result, which is printed first."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tiles, "gram", None)
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(OSError, match=f"--out {out}: .*runs.jsonl cannot be written"):
            train_cifar.main(["--out", str(out), "--n_train", "20"])
    monkeypatch.undo()
    if os.path.exists("/dev/full"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "runs.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match="runs.jsonl could not be written: No space left"):
            train_cifar.main(["--out", str(tmp_path / "out"), "--n_train", "20", "--quiet"])
        assert "test accuracy" in capsys.readouterr().out


@quick
def test_train_record_after_a_torn_line(tmp_path):
    """Half a line at the end of runs.jsonl, of a run that was killed, does not swallow the next record."""
    (tmp_path / "runs.jsonl").write_text('{"a": 1}\n{"b": ')
    experiment.record(tmp_path, {"n": 1}, {"c": 2}, {})
    first, torn, last = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert first == '{"a": 1}' and torn == '{"b": ' and json.loads(last)["c"] == 2


@quick
@pytest.mark.parametrize("before, devices, precision", [
    ("", tiles.cores(), "highest"), ("import jax; jax.config.update('jax_num_cpu_devices', 3); ", 3, None),
    ("import jax; jax.devices(); ", 1, "highest")])
def test_tiles_use_every_core(before, devices, precision):
    """In a notebook, too, JAX sees a device for each core and XLA the flag for wide vectors, unless JAX was set up before."""
    code = before + ("import os, jax, tiles; print(jax.local_device_count(), jax.config.jax_default_matmul_precision, "
                     "'--xla_cpu_prefer_vector_width=512' in os.environ.get('XLA_FLAGS', ''))")
    running = begun([sys.executable, "-c", code], XLA_FLAGS="")
    out, err = running.communicate()
    assert out.split() == [str(devices), str(precision), str(precision is not None)], err


# ------------------------------------------------------------------------------------------- docs

def readme():
    with open(os.path.join(HERE, "README.md")) as file:
        return file.read()


def test_docs_requirements_are_pinned():
    """Every package installed beside ours is pinned exactly, what they require included."""
    with open(os.path.join(HERE, "requirements.txt")) as file:
        lines = [line.split(";")[0].strip() for line in file if not line.startswith("#") and line.strip()]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    for name in pinned - {"neural-tangents"}:  # whose TensorFlow is never imported
        for need in importlib.metadata.requires(name) or []:
            if ";" not in need:
                assert re.match(r"[\w.-]+", need)[0].lower().replace("_", "-") in pinned, (name, need)


def commands(name, *texts):
    """The flags of every command with this script or module that README and these texts show, as lists."""
    everything = re.sub(r"\\\n *", "", "\n".join([readme(), *texts]))
    shown = re.findall(rf"python (?:-u )?(?:-m )?{re.escape(name)} ([^`\n#&]*)", everything)
    return [re.sub(r"  .*", "", command).split() for command in shown if "--" in command and "--help" not in command]


SMALL = {"--dataset": "digits", "--n_train": "40", "--n_test": "20", "--crops": "3", "--average": "2",
         "--fit_on": "10", "--tile": "16", "--hosts": "2", "--sizes": "10,20,40", "--kernel": "fc"}


def run_small(command):
    """The run that these flags of train_cifar.py ask for, made small: digits in place of CIFAR, 40 images, fc in place of
    convolutions."""
    small = [SMALL.get(flag, value) for flag, value in zip(["", *command], command)]
    if "--data" in small:
        at = small.index("--data")
        del small[at:at + 2]
    train_cifar.main([*([] if "--load" in small else ["--n_train", "40", "--n_test", "20"]), *small, "--quiet"])


def test_docs_commands_run(tmp_path, monkeypatch):
    """Every command with train_cifar.py that README and its docstring show runs, made small. Those with --store, --plan,
    several processes, --save, --load or --resize are parsed only: the tests of large/ and own/ run them."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("photos")
    shown = commands("train_cifar.py", train_cifar.__doc__)
    assert len(shown) > 10
    for command in shown:
        train_cifar.parse(command)
        if not {"--store", "--plan", "--process", "--save", "--load", "--resize"} & {*command}:
            run_small(command)


@quick
def test_docs_eight_lines():
    """The paper in eight lines, at the top of the README: it runs, and prints the accuracy that it says."""
    block = re.search(r"^```python\n(.*?)```", readme(), re.M | re.S)[1]
    done = subprocess.run([sys.executable, "-c", block], cwd=HERE, capture_output=True, text=True, check=True)
    assert len(block.splitlines()) == 8 and float(done.stdout) > 0.985
    assert f"{float(done.stdout):.2f}" == re.search(r"K_test.matvec.*: ([0-9.]+) correct", block)[1]


def test_docs_output(tmp_path, capsys):
    """What README shows of a first run is what it prints: the same words, numbers within 1 %."""
    shown = re.search(r"^fitted .*?(?=\n```)", readme(), re.M | re.S)[0]
    train(tmp_path)
    printed = "\n".join(capsys.readouterr().out.splitlines()[-7:][:len(shown.splitlines())])
    number = r"[\d.,]*\d"
    assert re.sub(number, "0", printed) == re.sub(number, "0", shown)
    numbers = [[float(one.replace(",", "")) for one in re.findall(number, text)] for text in (printed, shown)]
    assert np.allclose(*numbers, rtol=0.01)


def test_docs_forks(monkeypatch):
    """What README shows of forking does what it says: a frozen layer adds nothing to the NTK, so that of a
    network with one layer trained is its NNGP, and it has a name; the Gaussian kernel's solution is
    the dense one; the preconditioner inverts the diagonal blocks; the list of layers is a network."""
    blocks = dict(zip(("eight", "network", "layer", "kernel", "preconditioner"),
                      re.findall(r"^```python\n(.*?)```", readme(), re.M | re.S)))
    for table in (kernel.LAYERS, kernel.NETWORKS):
        monkeypatch.setitem(table, "frozen", None)  # removed again at the end
    exec(blocks["layer"], {"kernel": kernel})
    x, x_test = np.random.default_rng(0).normal(size=(2, 12, 4, 4, 1))
    nngp, ntk = kernel.kernel_fn([("flatten",), ("frozen", 1.3), ("relu",), ("dense", 1.1, 0.0)], kernel.KINDS)(x)
    assert np.allclose(nngp, ntk, rtol=1e-12) and kernel.kernel_fn("frozen", "nngp", depth=2)(x).shape == (12, 12)
    scope = dict(kernel=kernel, tiles=tiles, jnp=jnp, np=np, pcg=pcg, lam=0.1, x_train=x, x_test=x_test,
                 Y=np.random.default_rng(1).normal(size=(12, 2)))
    with as_users_have_it(x64=True):
        exec(blocks["network"] + blocks["kernel"] + blocks["preconditioner"], scope)
    K, K_test = (np.exp(-((z[:, None] - x) ** 2).mean(axis=(2, 3, 4)) / 2) for z in (x, x_test))
    assert np.allclose(scope["f"], K_test @ np.linalg.solve(K + 0.1 * np.eye(12), scope["Y"]), atol=1e-5)
    B = scope["block_jacobi"](Dense(K), 5)(0.1)(np.eye(12))
    assert np.allclose(np.linalg.inv(B[5:10, 5:10]), K[5:10, 5:10] + 0.1 * np.eye(5)) and not B[:5, 5:].any()


@quick
def test_docs_readme():
    """README is short, gives its two commands by line 40, and links to files that are there."""
    text = readme()
    lines = text.splitlines()
    at = [number for number, line in enumerate(lines, 1) if line.startswith("python3 -m venv ")]
    assert len(at) == 2 and max(at) <= 40 and len(lines) <= 250 and len(text.split()) <= 2500
    for link in re.findall(r"\]\(([^)]+)\)", text):
        room = os.path.join(HERE, link.partition("/")[0])
        assert link.startswith("https://") or os.path.exists(os.path.join(HERE, link)) or (
            os.path.basename(room) in experiment.ROOMS and not os.path.exists(room)), link


def test_docs_core_stands_alone(tmp_path):
    """The files of the top level, copied alone into an empty folder, do the experiment: digits, flips and crops, a Myrtle
    network, by kernel.py; their tests run there; a flag that needs a room says so in one line."""
    for name in os.listdir(HERE):
        if os.path.isfile(os.path.join(HERE, name)):
            shutil.copy(os.path.join(HERE, name), tmp_path)

    # a process for each run and for pytest, forked after the imports, which take longer than the runs
    code = ("import json, os, sys, experiment, train_cifar\nfor name, *flags in json.loads(sys.argv[1]):\n"
            "    if not os.fork():\n        sys.stderr = sys.stdout\n        sys.argv = [name, *flags]\n"
            "        if name == 'pytest':\n            import pytest\n            sys.exit(pytest.main(flags))\n"
            "        experiment.run(train_cifar.main, train_cifar.parse(None))\n        sys.exit(0)\n"
            "    print('exit', os.waitstatus_to_exitcode(os.wait()[1]), '<end>', flush=True)")
    runs = [["train_cifar.py", "--n_train", "40", "--n_test", "10", "--verbose", *more] for more in (
        ["--flips", "--crops", "2"], ["--kernel", "myrtle5", "--n_train", "6", "--n_test", "2", "--ridge", "1"])]
    runs += [["train_cifar.py", *more] for more in (["--engine", "fused"], ["--n_train", "40", "--store", "K"], ["--plan"])]
    tests = ["-q", "--benchmark-disable", "test_all.py", "-k", "arccos or tiles_errors or train_evidence"]
    done = subprocess.run([sys.executable, "-c", code, json.dumps([*runs, ["pytest", *tests]])], cwd=tmp_path,
                          capture_output=True, text=True)
    flips, myrtle, engine, store, plan, tested, _ = done.stdout.split("<end>")
    for said in (flips, myrtle):
        assert "test accuracy" in said and "engine=plain" in said and said.endswith("exit 0 "), done
    assert "--engine: invalid choice: 'fused'" in engine and engine.endswith("exit 2 "), done
    for said in (store, plan):
        assert "the folder large/ is not there" in said.splitlines()[-2] and "Traceback" not in said, done
    assert re.search(r"[1-9]\d* passed", tested) and tested.endswith("exit 0 "), done


# -------------------------------------------------------------------------------------- benchmark

def time_it(benchmark, call, what, amount):
    """Rounds for half a second, three at least, after a first call; extra_info holds what / s at the median."""
    with as_users_have_it():
        call()
        rounds = 1 if benchmark.disabled else max(3, round(0.5 / timeit.timeit(call, number=1)))
        out = benchmark.pedantic(call, rounds=rounds)
    if not benchmark.disabled:
        benchmark.extra_info[what + "/s"] = amount / benchmark.stats.stats.median
    return out


@pytest.mark.parametrize("who", ["tiles", "numpy, float32", "numpy, float64"])
def test_benchmark_product(benchmark, who):
    """K v with ten columns, n = 10,000: tiles in float32 and sums in float64, half of K read, against NumPy's
    product of the whole of K with v, both in float32 or both in float64."""
    benchmark.group, n = "K v", 30 if benchmark.disabled else 10_000
    K = tiles.gram(linear, np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32), quiet=True)
    v, dense = np.random.default_rng(1).normal(size=(n, 10)), K.dense()
    dtype = np.float32 if who == "numpy, float32" else np.float64
    dense, v32 = dense.astype(dtype), v.astype(dtype)
    y = time_it(benchmark, (lambda: K.matvec(v)) if who == "tiles" else lambda: dense @ v32, "products", 1)
    assert np.allclose(y, dense @ v32, rtol=1e-3, atol=1e-3 * np.abs(y).max())
