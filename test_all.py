"""Every claim of this repository, in the order in which to read it; each test's docstring is its claim.

  pytest -q --benchmark-disable test_all.py                 all of it, a few minutes on two cores
  pytest -q --benchmark-disable test_all.py -k kernel       one section: kernel, fused, tiles, pcg,
                                                            precondition, regression, model, graphs, ...
  pytest --benchmark-only --benchmark-sort=name test_all.py time per kernel entry, 32 x 32 images

Oracles: neural_tangents, finite wide networks, dense float64 formulas, scikit-learn, plain loops.
Four CPU devices; strict about dtypes and shapes. Tests on CIFAR-10 skip where it is not beside us.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import timeit
import tracemalloc
import zipfile
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from scipy.optimize import nnls
from scipy.stats import multivariate_normal, norm, spearmanr
from sklearn.metrics import average_precision_score

os.environ["XLA_FLAGS"] = "--xla_cpu_prefer_vector_width=512"  # as train_cifar.py does
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
from fast import fused, gpu  # noqa: E402
from large import on_the_fly, plan, processes, rank, store  # noqa: E402
from molecules import graphs, missing, smiles  # noqa: E402
from molecules import layers as graph_layers  # noqa: E402
from molecules import train as train_molecule  # noqa: E402
from proteins import layers as sequence_layers  # noqa: E402
from proteins import sequences  # noqa: E402
from proteins import train as train_protein  # noqa: E402
from results import compare_solvers, report  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
CIFAR = os.path.join(HERE, "..", "shared", "data", "cifar10", "cifar-10-batches-bin")
MOLECULES = os.path.join(HERE, "..", "shared", "data", "molecules")
KILLS = int(os.environ.get("KILLS", 3))  # of each test that kills; 20 of them take two minutes
GB1 = os.path.join(HERE, "..", "shared", "data", "protein")
needs_gb1 = pytest.mark.skipif(not os.path.exists(GB1), reason="FLIP's GB1 is not beside the project")
needs_cifar = pytest.mark.skipif(not os.path.exists(CIFAR), reason="CIFAR-10 is not beside the project")
needs_molecules = pytest.mark.skipif(not os.path.exists(MOLECULES), reason="molecules are not beside the project")
needs_rdkit = pytest.mark.skipif(importlib.util.find_spec("rdkit") is None, reason="RDKit is not installed")
both_kinds = pytest.mark.parametrize("kind", kernel.KINDS)
every_network = pytest.mark.parametrize("name", kernel.IMAGES)


@contextmanager
def as_users_have_it(x64=False):
    """JAX's defaults: neural_tangents is not for strict JAX, and float64 where x64 is on."""
    with (jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"),
          jax.enable_x64(x64)):
        yield


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


# ---------------------------------------------------------------------------------------- kernel

def images(rng, n, shape):
    """Random images; row 1 is the opposite of row 0, row 2 is black but for one pixel."""
    x = rng.normal(size=(n, *shape))
    x[1] = -x[0]
    x[2] = 0
    x[2, 0, 0] = 1
    return x


@pytest.mark.parametrize("name, options", [(name, options) for name in kernel.IMAGES for options in (
    {}, {"w_std": 1.2, "b_std": 0.3}) if name != ("myrtle7" if options else "myrtle10")], ids=str)
def test_kernel_is_neural_tangents(name, options):
    """K is neural_tangents': to 1e-10 in float64, to 1e-5 in float32, odd and even sizes."""
    rng = np.random.default_rng(0)
    shape = (8, 4, 3) if name.startswith("myrtle") else (5, 4, 2)
    options = {**options, **({"depth": 3} if name in ("cnn_vec", "cnn_gap") else {})}
    x1, x2 = images(rng, 5, shape), rng.normal(size=(4, *shape))
    fn = kernel.kernel_fn(name, kernel.KINDS, **options)
    for K, K32, expected in zip(fn(x1, x2), fn(x1.astype(np.float32), x2.astype(np.float32)),
                                reference(name, kernel.KINDS, x1, x2, **options)):
        assert K.dtype == np.float64 and relative_error(K, expected) < 1e-10
        assert K32.dtype == np.float32 and relative_error(K32, expected) < 1e-5


@needs_cifar
@pytest.mark.parametrize("name", ["fc", "cnn_vec", "cnn_gap", "myrtle5"])
@pytest.mark.parametrize("head", ["cosine", "relu", "exp"])
def test_kernel_heads_are_neural_tangents(name, head):
    """Normalized readouts, of kernel.py and of fused.py, with and without mirror images: NNGP and NTK are those of
    stax.LayerNorm, Relu and ExpNormalized to 1e-10, between different images; k(x, x) is the same for all x."""
    x, options = images(np.random.default_rng(0), 5, (4, 4, 2)), {"head": head, "gamma": 1.7, "w_std": 1.3, "b_std": 0.2}
    a, b = x[:2], x[2:]
    found = kernel.kernel_fn(name, kernel.KINDS, **options)
    for got, fast, want in zip(found(a, b), fused.kernel_fn(name, kernel.KINDS, **options)(a, b),
                               reference(name, kernel.KINDS, a, b, **options)):
        assert np.allclose(got, want, rtol=1e-10, atol=1e-12) and np.allclose(fast, want, rtol=1e-10, atol=1e-12)
    half = augment.symmetric(found)(x)
    for got, want in zip(fused.kernel_fn(name, kernel.KINDS, flips=True, **options)(x), half):
        assert np.allclose(got, want, rtol=1e-10, atol=1e-12)
    assert np.ptp(np.diag(found(x)[0])) < 1e-12


@pytest.mark.parametrize("head", ["cosine", "relu", "exp"])
def test_kernel_heads_by_hand(head):
    """The NNGP of a head is its formula of the kernel without one, written out."""
    x, gamma = np.random.default_rng(0).normal(size=(4, 3, 3, 2)), 0.7
    K = np.asarray(kernel.kernel_fn("cnn_gap", "nngp", depth=2)(x))
    c = np.clip(K / np.sqrt(np.outer(np.diag(K), np.diag(K))), -1, 1)
    by_hand = {"cosine": c, "exp": np.exp(gamma * (c - 1)),
               "relu": (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / (2 * np.pi)}[head]
    got = kernel.kernel_fn("cnn_gap", "nngp", depth=2, head=head, gamma=gamma)(x)
    assert np.allclose(got, 2 * by_hand, rtol=1e-7)  # the last layer: w_std^2 = 2


@pytest.mark.parametrize("name, n", [("fc", 20), ("cnn_vec", 8), ("myrtle5", 2)])
def test_kernel_is_neural_tangents_on_cifar(name, n):
    """float32 on real images, each with itself too, is neural_tangents in float64 to 1e-5.

    Myrtle-5 on the middle 16 x 16 pixels: neural_tangents' whole ones take minutes."""
    x = cifar(20)[0][:n]
    x = x[:, 8:24, 8:24] if name == "myrtle5" else x
    exact = x.astype(np.float64)
    for K, expected in zip(kernel.kernel_fn(name, kernel.KINDS)(x),
                           reference(name, kernel.KINDS, exact, exact[::-1])):
        assert relative_error(K, expected[:, ::-1]) < 1e-5


@pytest.mark.parametrize("name", ["fc", "cnn_vec"])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_kernel_of_an_image_with_itself(name, dtype, tolerance):
    """Where c = 1 exactly, kappa0 = kappa1 = 1: NTK = (depth + 1) NNGP, for a copy as for itself.

    neural_tangents is off by 1e-8 here in float64, the square root of its rounding of c."""
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 3)).astype(dtype)
    both = np.concatenate([x, x])
    nngp, ntk = (np.asarray(kernel.kernel_fn(name, kind, depth=4)(both)) for kind in kernel.KINDS)
    assert relative_error(np.diag(ntk), 5 * np.diag(nngp).astype(np.float64)) < tolerance
    for K in (nngp, ntk):
        assert relative_error(K[:3, 3:], K[:3, :3].astype(np.float64)) < tolerance


@pytest.mark.parametrize("name", ["fc", "cnn_vec", "cnn_gap", "myrtle5"])
def test_kernel_of_black_images(name):
    """An image without variance gives finite entries: zero without biases, as neural_tangents with."""
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32)
    x[1] = 0
    options = {"depth": 2} if name in ("cnn_vec", "cnn_gap") else {}
    exact = x.astype(np.float64)
    biased = reference(name, kernel.KINDS, exact, exact[::-1], b_std=0.5, **options)
    for K in map(np.asarray, kernel.kernel_fn(name, kernel.KINDS, **options)(x)):
        assert np.isfinite(K).all() and (K[1] == 0).all() and (K[0, [0, 2]] != 0).all()
    for K, expected in zip(kernel.kernel_fn(name, kernel.KINDS, b_std=0.5, **options)(x), biased):
        assert relative_error(K, expected[:, ::-1]) < 1e-5


def finite_network(layers, key, x, width):
    """f(x), (n,), of one random network of this width and its NTK (n, n); and the mean over the last
    weights of f(x) f(x')^T. Weights are N(0, 1), scaled by w_std / sqrt(fan-in) where they are used."""
    params, channels = [], x.shape[-1]
    weights = [layer for layer in layers if layer[0] in ("dense", "conv")]
    for i, layer in enumerate(weights):
        out = 1 if i == len(weights) - 1 else width
        side = 3 if layer[0] == "conv" else 1
        channels = x[0].size if i == 0 and layers[0][0] == "flatten" else channels
        key, k1, k2 = jax.random.split(key, 3)
        if i == len(weights) - 1 and layers[-2] == ("flatten",):
            channels *= x.shape[1] * x.shape[2]
        params.append((jax.random.normal(k1, (side, side, channels, out), x.dtype),
                       jax.random.normal(k2, (out,), x.dtype)))
        channels = out

    def forward(params, x):
        todo = iter(params)
        for layer in layers:
            if layer[0] in ("dense", "conv"):
                W, b = next(todo)
                features = x
                x = layer[1] / W[..., 0].size**0.5 * jax.lax.conv_general_dilated(
                    x, W, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
                x = x + layer[2] * jnp.broadcast_to(b, x.shape)
            elif layer[0] == "relu":
                x = jnp.maximum(x, 0)
            elif layer[0] == "pool":
                n, h, w, c = x.shape
                x = x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
            elif layer[0] == "gap":
                x = x.mean(axis=(1, 2), keepdims=True)
            else:
                x = x.reshape(len(x), 1, 1, -1)
        return x.reshape(-1), features.reshape(len(x), -1)

    w_std, b_std = layers[-1][1:]
    features = forward(params, x)[1]
    nngp = w_std**2 / features.shape[1] * features @ features.T + b_std**2
    ntk = sum(jnp.einsum("ap,bp->ab", g.reshape(len(x), -1), g.reshape(len(x), -1))
              for g in jax.tree.leaves(jax.jacrev(lambda p: forward(p, x)[0])(params)))
    return nngp, ntk


@pytest.mark.parametrize("name, options", [("fc", {"b_std": 0.4, "w_std": 1.3}),
                                           ("cnn_vec", {"depth": 2}), ("myrtle5", {})])
def test_kernel_is_the_limit_of_wide_networks(name, options):
    """NNGP and NTK of 20 random networks of width 512 average to ours: 4 standard errors + 1 %."""
    layers = kernel.network(name, **options)
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
    draw = jax.jit(lambda key: finite_network(layers, key, x, 512))
    draws = [draw(key) for key in jax.random.split(jax.random.key(0), 20)]
    for kind, samples in zip(kernel.KINDS, zip(*draws)):
        samples, K = np.array(samples), np.asarray(kernel.kernel_fn(name, kind, **options)(x))
        error = 4 * samples.std(axis=0) / np.sqrt(len(samples)) + 0.01 * np.abs(K)
        assert (np.abs(samples.mean(axis=0) - K) < error).all()


PEPTIDES = ["M", "GIVEQCCTSICSLYQLENYCN", "NLYIQWLKDGGPSSGRPPPS"]  # one residue, insulin's A chain, Trp-cage
every_sequence_network = pytest.mark.parametrize("name", sequence_layers.SEQUENCES)


def recursion(layers, x, y):
    """NNGP and NTK of two sequences without padding, (l, channels) and (l', channels), in plain loops."""
    K, T = {(a, b): u @ v.T / u.shape[1] for a, u in enumerate((x, y)) for b, v in enumerate((x, y))}, 0
    for name, *std in layers:
        v = [np.diag(K[a, a]) if np.ndim(K[a, a]) else K[a, a] for a in (0, 1)]
        if name == "relu":
            c = {key: np.clip(K[key] / np.sqrt(np.multiply.outer(v[key[0]], v[key[1]])), -1, 1) for key in K}
            T = (np.pi - np.arccos(c[0, 1])) / (2 * np.pi) * T
            K = {key: np.sqrt(np.multiply.outer(v[key[0]], v[key[1]])) / (2 * np.pi)
                 * (np.sqrt(1 - c[key]**2) + (np.pi - np.arccos(c[key])) * c[key]) for key in K}
        elif name in ("dense", "conv1d"):
            def mean(k):
                if name == "dense" or np.ndim(k) == 0:
                    return k
                return np.array([[sum(k[p + d, q + d] for d in (-1, 0, 1) if 0 <= p + d < k.shape[0]
                                      and 0 <= q + d < k.shape[1]) / 3
                                  for q in range(k.shape[1])] for p in range(k.shape[0])])
            K = {key: std[0]**2 * mean(k) + std[1]**2 for key, k in K.items()}
            T = K[0, 1] + std[0]**2 * mean(T)
        elif name == "gap":
            K, T = {key: k.mean() for key, k in K.items()}, np.mean(T)
        elif name == "flatten":
            def own(k):
                return sum(k[p, p] for p in range(min(k.shape))) / np.sqrt(k.shape[0] * k.shape[1])
            T = own(T) if np.ndim(T) else T
            K = {key: own(k) for key, k in K.items()}
    return K[0, 1], T


@every_sequence_network
def test_kernel_of_sequences_is_neural_tangents(name):
    """K of sequences of one length is neural_tangents', to 1e-10 in float64 and 1e-5 in float32."""
    x1, x2 = np.random.default_rng(0).normal(size=(2, 3, 6, 4))
    options = {"depth": 1, "w_std": 1.3, "b_std": 0.4}
    fn = kernel.kernel_fn(name, kernel.KINDS, **options)
    for K, K32, expected in zip(fn(x1, x2), fn(x1.astype(np.float32), x2.astype(np.float32)),
                                reference(name, kernel.KINDS, x1, x2, **options)):
        assert relative_error(K, expected) < 1e-10 and relative_error(K32, expected) < 1e-5


@pytest.mark.parametrize("name, options", [("seq_cnn", {"depth": 1}), ("seq_cnn_gap", {"depth": 2, "b_std": 0.4})],
                         ids=str)
def test_kernel_of_peptides_is_neural_tangents(name, options):
    """Real sequences of different lengths, one residue among them, against neural_tangents' masks; its flatten
    divides by the length of the array, ours by the geometric mean of theirs."""
    x, lengths = sequences.encode(PEPTIDES, "blosum", 0).astype(np.float64), np.array([len(s) for s in PEPTIDES])
    means = x.shape[1] / np.sqrt(lengths[:, None] * lengths[None]) if name == "seq_cnn" else np.ones((1, 1))
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
        for K, expected in zip(kernel.kernel_fn(name, kernel.KINDS, **options)(x.astype(dtype)),
                               reference(name, kernel.KINDS, x, x[::-1].copy(), **options)):
            off = np.abs(np.asarray(K, np.float64) / (expected[:, ::-1] * means) - 1)
            assert off[~np.eye(3, dtype=bool)].max() < tolerance
            assert np.diag(off).max() < max(tolerance, 3e-8)  # neural_tangents' rounding of c = 1


@pytest.mark.parametrize("name, options", [(name, options) for name in sequence_layers.SEQUENCES for options in (
    {"depth": 1}, {"depth": 3, "w_std": 1.2, "b_std": 0.5})], ids=str)
def test_kernel_of_sequences_in_plain_loops(name, options):
    """Every pair of peptides is the recursion in loops over their own positions to 1e-10, so that padding changes
    nothing, bias or not; and K is positive definite."""
    x = sequences.encode(PEPTIDES, "blosum", 0).astype(np.float64)
    own, layers = [z[:len(s)] for z, s in zip(x, PEPTIDES)], kernel.network(name, **options)
    fn = kernel.kernel_fn(name, kernel.KINDS, **options)
    padded = fn(np.pad(x, ((0, 0), (0, 7), (0, 0))))
    for k, (K, K_padded) in enumerate(zip(fn(x), padded)):
        expected = np.array([[recursion(layers, a, b)[k] for b in own] for a in own])
        assert relative_error(K, expected) < 3e-8 and relative_error(K_padded, np.asarray(K)) < 1e-12
        assert relative_error(np.triu(K, 1)[0, 1:], expected[0, 1:]) < 1e-10
        assert np.linalg.eigvalsh(K)[0] > 1e-3 * np.trace(K) / 3


def test_kernel_arccos():
    """kappa0 and kappa1 are NumPy's to 2e-7 in float32 and 2e-15 in float64; at and beyond 1 too."""
    for dtype, tolerance in ((np.float32, 2e-7), (np.float64, 2e-15)):
        c = np.linspace(-1, 1, 100001).astype(dtype)
        kappa0, kappa1 = kernel.kappas(jnp.asarray(c))
        c = c.astype(np.float64)
        angle = np.pi - np.arccos(c)
        assert np.abs(np.asarray(kappa0) - angle / np.pi).max() < tolerance
        assert np.abs(np.asarray(kappa1) - (np.sqrt((1 - c) * (1 + c)) + angle * c) / np.pi).max() < tolerance
        beyond = jnp.asarray([1 + 1e-6, -1 - 1e-6] if dtype == np.float32 else [1 + 1e-15, -1 - 1e-15],
                             dtype)
        assert np.allclose(kernel.kappas(beyond)[0], [1, 0]), "rounding past 1 counts as 1"


@pytest.mark.parametrize("name, positions", [("fc", 1), ("cnn_vec", 16), ("myrtle5", 256)])
def test_kernel_symmetry_and_blocks(name, positions, monkeypatch):
    """fn(x) is fn(x, x), symmetric to the last bit, whatever the block size inside."""
    x = np.random.default_rng(0).normal(size=(7, 4, 4, 3)).astype(np.float32)
    K = np.asarray(kernel.kernel_fn(name, "ntk")(x))
    assert (K == K.T).all() and relative_error(K, np.asarray(kernel.kernel_fn(name, "ntk")(x, x))) < 1e-6
    monkeypatch.setattr(kernel, "BLOCK", 3 * positions)  # 7 columns come as 3 + 3 + 1
    assert relative_error(kernel.kernel_fn(name, "ntk")(x), K) < 1e-6


def test_kernel_inputs():
    """fc takes (n, d) and images alike, integers are read as float32, and a network may be a list."""
    x = np.random.default_rng(0).integers(0, 255, size=(4, 3, 2, 2))
    K = kernel.kernel_fn("fc", "ntk", depth=2)(x)
    assert K.dtype == np.float32
    assert (K == kernel.kernel_fn("fc", "ntk", depth=2)(x.reshape(4, 12).astype(np.float32))).all()
    assert (K == kernel.kernel_fn(kernel.network("fc", depth=2), "ntk")(x)).all()
    assert not np.allclose(K, kernel.kernel_fn("fc", "ntk", depth=3)(x))


@pytest.mark.parametrize("call, words", [
    (lambda: kernel.kernel_fn("resnet", "ntk"), "'resnet' is unknown; choose one of fc, "),
    (lambda: kernel.kernel_fn("fc", "gp"), "'gp' is unknown; choose nngp or ntk"),
    (lambda: kernel.kernel_fn("myrtle5", "ntk", depth=3), "depth=3 does not fit myrtle5"),
    (lambda: kernel.kernel_fn("fc", "ntk", depth=0), "depth=0 does not fit fc"),
    (lambda: kernel.kernel_fn("myrtle5", "ntk")(np.ones((1, 6, 8, 3))), "6x8.*multiples of 4"),
    (lambda: kernel.kernel_fn("myrtle5", "ntk")(np.ones((1, 2, 2, 3))), "2x2.*multiples of 4"),
    (lambda: kernel.kernel_fn("cnn_gap", "ntk")(np.ones((3, 9))), r"\(3, 9\).*\(n, h, w, channels\)"),
    (lambda: kernel.kernel_fn("fc", "ntk")(np.ones((3, 9)), np.ones((3, 8))), "must agree"),
    (lambda: kernel.kernel_fn("fc", "ntk")(np.ones((0, 9))), r"\(0, 9\): at least one input"),
    (lambda: kernel.kernel_fn([("gap",), ("tanh",)], "ntk"), "tanh.*expected"),
    (lambda: kernel.kernel_fn([("dense", 1.0), ("gap",)], "ntk"), r"\('dense', 1.0\).*w_std, b_std"),
    (lambda: kernel.kernel_fn([("relu",)], "ntk"), "at least once"),
    (lambda: kernel.kernel_fn([("conv1d", 1.0, 0.0), ("gap",)], "ntk"), r"sequences begins with \(\"mask\",\)"),
    (lambda: kernel.kernel_fn([("mask",), ("pool",), ("gap",)], "ntk"), "sequences .* no pool"),
    (lambda: kernel.kernel_fn("seq_cnn", "ntk")(np.ones((3, 9))), r"\(3, 9\).*sequences \(n, length, channels\)"),
    (lambda: kernel.kernel_fn(kernel.network("fc"), "ntk", depth=2), "a list of layers has its own"),
])
def test_kernel_errors(call, words):
    """What does not fit is refused in one sentence: what was got, what was expected."""
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------- fused

def both_engines(name, x1, x2=None, **options):
    """NNGP and NTK of fused.py in float32 and of kernel.py in float64: [(fast, exact), ...]."""
    x1, x2 = (None if x is None else np.asarray(x, np.float32) for x in (x1, x2))
    fast = fused.kernel_fn(name, kernel.KINDS, **options)(x1, x2)
    assert all(K.dtype == np.float32 for K in fast)
    x1, x2 = (None if x is None else x.astype(np.float64) for x in (x1, x2))
    return list(zip(fast, map(np.asarray, kernel.kernel_fn(name, kernel.KINDS, **options)(x1, x2))))


@pytest.mark.parametrize("name, shape, options", [
    ("fc", (5, 3, 2), {}), ("cnn_vec", (5, 3, 2), {"w_std": 1.2, "b_std": 0.3}),
    ("cnn_gap", (8, 8, 1), {"w_std": 1.2, "b_std": 0.3}), ("myrtle5", (8, 8, 1), {}),
    ("myrtle7", (4, 12, 2), {"w_std": 1.2, "b_std": 0.3}), ("myrtle10", (12, 8, 11), {})], ids=str)
def test_fused_is_kernel(name, shape, options):
    """fused.py is kernel.py to 1e-5 in float32 and 1e-12 in float64: any shape, number of channels and
    sigma; opposite, nearly black, identical and flipped images."""
    x = images(np.random.default_rng(0), 9, shape).astype(np.float32)
    x[4], x[5] = x[3], x[3][:, ::-1]
    both = both_engines(name, x, x[2:], **options)
    assert all(relative_error(fast, exact) < 1e-5 for fast, exact in both)
    if name in ("fc", "cnn_vec", "myrtle5"):  # the others are the same code
        double = fused.kernel_fn(name, kernel.KINDS, **options)(x.astype(float), x[2:].astype(float))
        assert all(relative_error(fast, exact) < 1e-12 for fast, (_, exact) in zip(double, both))


@pytest.mark.parametrize("name", ["fc", "myrtle5"])
def test_fused_black_images(name):
    """An image without variance: zero without biases, kernel.py with them; nothing is not a number."""
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1))
    x[1] = 0
    for fast, exact in both_engines(name, x, b_std=0.5):
        assert relative_error(fast, exact) < 1e-5
    for K in fused.kernel_fn(name, kernel.KINDS)(x):
        assert np.isfinite(K).all() and not K[1].any()


@pytest.mark.parametrize("name, tail", [("seq_fc", 0), ("seq_cnn", 0), ("seq_cnn_gap", 2)])
def test_fused_sequences(name, tail, monkeypatch):
    """Sequences of 1 to 21 residues with bias, several blocks of columns: kernel.py to 1e-5; also with a relu
    after the ending, which reads k(x, x)."""
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns
    x = sequences.encode(PEPTIDES * 4, "blosum", 0)
    x[3:] *= np.random.default_rng(0).uniform(0.5, 1, size=x[3:].shape).astype(np.float32)
    layers = [*kernel.network(name, depth=2, b_std=0.5), ("relu",), ("dense", 1.1, 0.3)]
    layers = layers[:len(layers) - 2 + tail]
    for fast, exact in both_engines(layers, x, x[1:]):
        assert relative_error(fast, exact) < 1e-5
    with pytest.raises(ValueError, match="only images have mirror images"):
        fused.kernel_fn(name, "ntk", flips=True)


@needs_cifar
@pytest.mark.parametrize("name, n", [("cnn_vec", 20), ("cnn_gap", 2), ("myrtle5", 2), ("myrtle10", 2)])
def test_fused_on_cifar(name, n):
    """The same on CIFAR-10, images with themselves and with a mirror image too."""
    x = cifar(20)[0][:n]
    for fast, exact in both_engines(name, x, np.concatenate([x, x[:1, :, ::-1]])):
        assert relative_error(fast, exact) < 1e-5


def test_fused_on_64_by_64():
    """Images of 64 x 64, 16.8 million pairs of pixels."""
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    conv = [("conv", 2**0.5, 0.0), ("relu",)]
    for fast, exact in both_engines([*conv, ("pool",), *conv, ("gap",), ("dense", 1.0, 0.0)], x[:1], x[1:]):
        assert relative_error(fast, exact) < 1e-5


@pytest.mark.parametrize("name", ["fc", "cnn_vec", "myrtle5", "seq_cnn", "seq_cnn_gap"])
def test_fused_symmetry_and_blocks(name, monkeypatch):
    """fn(x) is symmetric to the last bit and fn(x, x) up to rounding, diagonal included, whatever the
    block of columns and however many rows."""
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns
    fn = fused.kernel_fn(name, "ntk")
    for n in (1, 19) if name != "fc" else (1, 1300):
        x = np.random.default_rng(n).normal(size=(n, 8, 4, 3)[:3 if "seq" in name else 4]).astype(np.float32)
        K = np.asarray(fn(x))
        assert K.shape == (n, n) and K.dtype == np.float32 and np.array_equal(K, K.T)
    assert relative_error(K, np.asarray(fn(x, x))) < 1e-5
    assert relative_error(K, np.asarray(kernel.kernel_fn(name, "ntk")(x))) < 1e-5


@pytest.mark.parametrize("name", ["fc", "cnn_vec"])
def test_fused_both_kinds_in_one_pass(name):
    """A tuple of kinds gives a tuple of matrices, each as if asked for alone, in the order asked for."""
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 3))
    alone = {kind: np.asarray(kernel.kernel_fn(name, kind, depth=2)(x, x[:2])) for kind in kernel.KINDS}
    for engine in (fused, kernel):
        for kinds in (("ntk", "nngp"), ("nngp",)):
            together = engine.kernel_fn(name, kinds, depth=2)(x, x[:2])
            assert isinstance(together, tuple) and len(together) == len(kinds)
            for kind, K in zip(kinds, together):
                assert relative_error(K, alone[kind]) < 1e-12


@pytest.mark.parametrize("name, shape", [("fc", (4, 3, 2)), ("cnn_vec", (5, 3, 2)), ("cnn_gap", (4, 6, 1)),
                                         ("myrtle5", (8, 8, 1))])
def test_fused_flips(name, shape, monkeypatch):
    """flips=True is augment.symmetric of kernel.py, to 1e-5 in float32 and 1e-12 in float64: of two sets and
    of one, in which it is symmetric to the last bit; also where images fill several blocks of columns, and
    with a relu after the ending, which is not linear."""
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 4 images and their mirror images
    x = images(np.random.default_rng(0), 11, shape)
    named = kernel.network(name, **({} if name == "myrtle5" else {"depth": 2}), b_std=0.2)
    for layers in (named, [*named, ("relu",), ("dense", 1.1, 0.3)]):
        exact = augment.symmetric(kernel.kernel_fn(layers, kernel.KINDS))
        fast = fused.kernel_fn(layers, kernel.KINDS, flips=True)
        for x2 in (x[3:], None):
            for K, single, K_exact in zip(fast(x, x2), fast(*(z if z is None else z.astype(np.float32)
                                                              for z in (x, x2))), exact(x, x2)):
                assert relative_error(K, np.asarray(K_exact)) < 1e-12 and K.shape == K_exact.shape
                assert relative_error(single, np.asarray(K_exact)) < 1e-5
        assert np.array_equal(K, K.T)


@pytest.mark.parametrize("name, flips", [("cnn_vec", False), ("cnn_gap", True), ("myrtle5", False), ("seq_cnn", False)])
def test_fused_on_a_gpu(name, flips, monkeypatch):
    """gpu.py, run by Pallas' interpreter: kernel.py to 1e-5 in float32 and 1e-12 in float64; images that are not
    square, with bias, several blocks of columns, sequences."""
    x = (sequences.encode(PEPTIDES, "blosum", 0).astype(float) if name == "seq_cnn" else
         images(np.random.default_rng(0), 9, (8, 8, 2) if name == "myrtle5" else (4, 6, 2)))
    layers = kernel.network(name, b_std=0.3, **({} if name == "myrtle5" else {"depth": 2}))
    exact = kernel.kernel_fn(layers, kernel.KINDS)
    exact = (augment.symmetric(exact) if flips else exact)(x, x[2:])
    monkeypatch.setattr(fused, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "INTERPRET", True)
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns
    for dtype, tolerance in ((np.float32, 1e-5), (float, 1e-12)):
        monkeypatch.setattr(fused, "conv_relu", in_prepare_only(fused.conv_relu))
        for kinds in (kernel.KINDS, "nngp"):
            fast = fused.kernel_fn(layers, kinds, flips=flips)(x.astype(dtype), x[2:].astype(dtype))
            for K, K_exact in zip(fast if kinds == kernel.KINDS else [fast], exact):
                assert K.dtype == dtype and relative_error(K, np.asarray(K_exact)) < tolerance


def in_prepare_only(conv_relu):
    """`fused.conv_relu`, which refuses what gpu.py should have done: a pair of different images."""
    def checked(source, target, first, *rest):
        assert first[0].shape[2] > 1
        return conv_relu(source, target, first, *rest)
    return checked


@pytest.mark.parametrize("tail", [
    [("pool",), ("conv", 1.5, 0.1), ("relu",), ("flatten",), ("dense", 1.2, 0.1)],
    [("pool",), ("pool",), ("gap",), ("dense", 1.2, 0.1), ("relu",), ("dense", 1.0, 0.2)],
    [("conv", 0.9, 0.0), ("relu",), ("flatten",), ("dense", 1.2, 0.1), ("relu",)],
], ids=lambda tail: "-".join(layer[0] for layer in tail))
def test_fused_takes_lists_of_layers(tail):
    """Other networks than the named ones: flatten after a pool, two pools running, relus at the end,
    another sigma in each layer."""
    layers = [("conv", 1.1, 0.2), ("relu",), *tail]
    x = np.random.default_rng(0).normal(size=(3, 8, 4, 2))
    for fast, exact in both_engines(layers, x):
        assert relative_error(fast, exact) < 1e-5


@pytest.mark.parametrize("layers", [[("dense", 1.0, 0.0), ("gap",)], [("conv", 1.0, 0.0), ("gap",)],
                                    [("gap",), ("pool",)]])
def test_fused_refuses(layers):
    """A list of another form is refused at once, and the sentence names what does take it."""
    with pytest.raises(ValueError, match="this network continues with .* take kernel.kernel_fn"):
        fused.kernel_fn(layers, "nngp")
    with pytest.raises(ValueError, match="kind 'mean' is unknown"):
        fused.kernel_fn("cnn_gap", "mean")
    with pytest.raises(ValueError, match="images are 8x6"):
        fused.kernel_fn("myrtle5", "nngp")(np.ones((1, 8, 6, 3)))


def test_fused_compiles_loops():
    """The program does not grow with depth: 8 convolutions take the code of 4."""
    x = np.ones((2, 8, 8, 3), np.float32)
    size = {depth: len(fused.kernel_fn("cnn_gap", "ntk", depth=depth).lower(x).as_text().splitlines())
            for depth in (4, 8)}
    assert size[4] == size[8]


# ----------------------------------------------------------------------------------------- tiles

@pytest.mark.parametrize("n, tile", [(1, 8), (7, 8), (8, 8), (9, 8), (19, 8), (19, 1), (3, 100)])
@pytest.mark.parametrize("devices", [1, 3, 4])
def test_tiles_any_size(n, tile, devices):
    """Any n, tile and number of devices: every method is that of the dense kernel tiles."""
    rng = np.random.default_rng(n)
    x, x_test = (rng.normal(size=(rows, 6)).astype(np.float32) for rows in (n, 5))
    fn = kernel.kernel_fn("fc", "ntk")
    options = dict(tile=tile, devices=jax.local_devices()[:devices])
    K, K_test = tiles.gram(fn, x, **options), tiles.cross(fn, x_test, x, **options)
    dense, v = K.dense().astype(np.float64), rng.normal(size=(n, 3))
    assert K.shape == (n, n) and (dense == dense.T).all() and relative_error(fn(x), dense) < 1e-6
    assert relative_error(fn(x_test, x), K_test.dense().astype(np.float64)) < 1e-6
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


def test_tiles_product_in_float64():
    """K v of float32 tiles is summed in float64: exact to 1e-14, where float32 sums are not."""
    x = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    K = tiles.gram(kernel.kernel_fn("fc", "nngp"), x, tile=128)
    v = np.random.default_rng(1).normal(size=(300, 2))
    exact = K.dense().astype(np.longdouble) @ v
    assert np.abs(K.matvec(v) - exact).max() < 1e-14 * np.abs(exact).max() * 10
    assert np.abs(K.dense() @ v.astype(np.float32) - exact).max() > 1e-9 * np.abs(exact).max()


def test_tiles_errors():
    """NaN in the inputs, a v of the wrong shape, no rows, a matrix beyond memory: one sentence each."""
    fn, x = kernel.kernel_fn("fc", "nngp"), np.ones((4, 3), np.float32)
    K = tiles.gram(fn, x)
    with pytest.raises(ValueError, match=r"v has shape \(3, 1\).*needs \(4, c\)"):
        K.matvec(np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"leading\(5\)"):
        K.leading(5)
    with pytest.raises(ValueError, match="at least 1"):
        tiles.gram(fn, x[:0])
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match="not finite: look for NaN"):
        tiles.gram(fn, x)
    bad = on_the_fly.matrix(fn, x, quiet=True)
    for wrong in (bad.diagonal, lambda: bad.columns([2]), lambda: bad.rows(2, 3), lambda: bad.matvec(np.eye(4))):
        with pytest.raises(ValueError, match="of the kernel's tiles are not finite: look for NaN"):
            wrong()
    with pytest.raises(MemoryError, match="1000000 x 1000000 kernel needs 200.* GB .*--store DIR"):
        tiles.gram(fn, np.broadcast_to(np.float32(1), (1000000, 3)))
    with pytest.raises(MemoryError, match="dense 3000000 x 3000000 kernel needs 36000.* GB"):
        dataclasses.replace(K, shape=(3000000,) * 2).dense()


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


# ----------------------------------------------------------------------------------------- store

def linear(a, b):
    """A kernel that compiles at once."""
    return jnp.matmul(a, b.T, precision="highest")


def inputs(n):
    """The first n of a sequence of inputs."""
    return np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)[:n]


def stored(folder, x, x_test=None, **about):
    """K of x in tiles of 16 in a folder, or K of x_test and x."""
    seen = map(store.digests, [x] if x_test is None else [x_test, x])
    kept = store.create(str(folder), {"kernel": "linear", "tile": 16, **about}, *seen)
    return (tiles.gram(linear, x, 16, store=kept) if x_test is None else
            tiles.cross(linear, x_test, x, 16, store=kept))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*-*.npy")}


def test_store_is_memory(tmp_path):
    """Every method gives from disk what it gives from memory, to the last bit; a second run computes
    nothing; the report counts what is there."""
    x, x_test, v = inputs(83), inputs(200)[90:121], np.random.default_rng(1).normal(size=(83, 3))
    for again in (False, True):
        for K, kept in ((tiles.gram(linear, x, 16), stored(tmp_path / "train", x)),
                        (tiles.cross(linear, x_test, x, 16), stored(tmp_path / "test", x, x_test))):
            assert (kept.dense() == K.dense()).all() and (kept.matvec(v) == K.matvec(v)).all()
            assert (kept.columns([80, 0, 17]) == K.columns([80, 0, 17])).all()
            assert kept.entries == K.entries and kept.found == again * K.entries
    assert (stored(tmp_path / "train", x).leading(40).matvec(v[:40])
            == tiles.gram(linear, x, 16).leading(40).matvec(v[:40])).all()
    out = subprocess.run([sys.executable, "tiles.py", tmp_path], cwd=HERE, capture_output=True, text=True)
    assert out.returncode == 0 and "83 x 83, 21 of 21 tiles" in out.stdout
    assert "31 x 83, 12 of 12 tiles" in out.stdout and out.stdout.count("every tile is intact") == 2


def test_store_past_the_page_cache(tmp_path, monkeypatch):
    """Tiles beyond half of the memory are read past the page cache, to the last bit the same, and damage is
    found there too; a leading block within half of it is read through the cache."""
    K = stored(tmp_path, inputs(83))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # 10 kB of memory
    direct = stored(tmp_path, inputs(83))
    assert not K.tiles.direct and direct.tiles.direct and (direct.dense() == K.dense()).all()
    for n, past_cache in ((48, True), (32, False)):  # six and three tiles of 1,024 bytes
        block = direct.leading(n)
        assert block.tiles.direct == past_cache and (block.dense() == K.dense()[:n, :n]).all()
    assert direct.tiles.direct
    flip(tmp_path / "1-3.npy")
    assert stored(tmp_path, inputs(83)).found == K.entries - 256


def test_store_grows(tmp_path):
    """More inputs reuse every whole tile, fewer inputs all of them, and the matrix is right."""
    for n, found in ((40, 0), (83, 3 * 256), (20, None), (83, None), (96, 15 * 256)):  # entries; None: all
        K = stored(tmp_path, inputs(n))
        assert (K.dense() == tiles.gram(linear, inputs(n), 16).dense()).all()
        assert K.found == (K.entries if found is None else found)


@pytest.mark.parametrize("change, words", [
    (dict(kernel="fc"), "kernel is 'linear' there, 'fc' here"),
    (dict(tile=8), "tile is 16 there, 8 here"),
    (dict(depth=3), "depth is None there, 3 here"),
    (dict(x=inputs(50) + (np.arange(50) == 7)[:, None].astype(np.float32)), "1 of the 40 rows.* number 7"),
    (dict(x=inputs(30)[::-1]), "30 of the 30 rows"),
    (dict(x_test=inputs(40)), "one of the two is symmetric"),
    (dict(manifest='{"format": 2}'), "format 2, and this program reads 1"),
    (dict(manifest='{"form'), "damaged.*[Rr]emove"),
    (dict(rows=b""), "rows.npy is missing or damaged.*Remove"),
])
def test_store_refuses(tmp_path, change, words):
    """A store of another kernel, tile side or inputs is refused with what differs, and left alone."""
    stored(tmp_path, inputs(40))
    before = contents(tmp_path)
    if "manifest" in change:
        (tmp_path / "manifest.json").write_text(change.pop("manifest"))
    if "rows" in change:
        (tmp_path / "rows.npy").write_bytes(change.pop("rows"))
    with pytest.raises(ValueError, match=words):
        stored(tmp_path, **{"x": inputs(40), **change})
    assert contents(tmp_path) == before


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage, words", [
    (flip, "has checksum [0-9a-f]{8}, not"),
    (lambda path: path.write_bytes(path.read_bytes()[:-5]), "has 1147 bytes, not 1152"),
    (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "has 1153 bytes, not 1152"),
    (os.remove, "is missing"),
])
def test_store_finds_damage(tmp_path, capsys, damage, words):
    """A tile with a flipped bit, cut short, too long or gone is named by the report, never enters a
    product, and is computed again, it alone, by the next run."""
    K, before = stored(tmp_path, inputs(83)), contents(tmp_path)
    damage(tmp_path / "1-3.npy")
    with pytest.raises(ValueError, match=f"1-3.npy {words}"):
        K.matvec(np.ones((83, 1)))
    assert store.report(str(tmp_path)) == 1 and re.search(f"1-3.npy {words}", capsys.readouterr().out)
    assert subprocess.run([sys.executable, "tiles.py", tmp_path], cwd=HERE, capture_output=True).returncode == 1
    K = stored(tmp_path, inputs(83))
    assert re.search(f"1-3.npy {words}.*computed again", capsys.readouterr().out)
    assert K.entries - K.found == 256 and contents(tmp_path) == before
    assert store.report(str(tmp_path)) == 0


def test_store_written_twice(tmp_path):
    """Of two journals that speak of a tile the one that wrote it last is believed, whoever it was."""
    x = inputs(83)
    stored(tmp_path, x)
    os.rename(tmp_path / "tiles-0.txt", tmp_path / "tiles-7.txt")  # process 7 wrote them all
    kept = store.Store(str(tmp_path))
    kept[1, 3] = np.full((16, 16), 5, np.float32)
    again = store.Store(str(tmp_path))
    assert store.report(str(tmp_path)) == 0 and (again[1, 3] == 5).all() and len(again.lines) == 21


def test_store_journal_may_be_torn(tmp_path):
    """Whatever part of the last line a crash leaves, that tile alone is computed again."""
    stored(tmp_path, inputs(83))
    journal, before = (tmp_path / "tiles-0.txt").read_bytes(), contents(tmp_path)
    last = len(journal) - journal.rindex(b"\n")
    key = tuple(map(int, journal[-last:].split()[:2]))
    for cut in (1, 8, last - 1, last):
        (tmp_path / "tiles-0.txt").write_bytes(journal[:-cut])
        K = stored(tmp_path, inputs(83))
        assert K.entries - K.found == np.prod(K.tiles.lines[key][:2])
        assert contents(tmp_path) == before and len(store.Store(str(tmp_path)).lines) == 21


WRITER = """
import sys, numpy as np, store
kept = store.create(sys.argv[1], {"tile": 64}, np.arange(600, dtype="<u8"))
for t in range(100):
    key = t % 10, t // 10
    if key not in kept.intact({key: (64, 64)}):
        kept[key] = np.random.default_rng(t).standard_normal((64, 64), np.float32)
"""


def test_store_survives_kills(tmp_path):
    """Killed at random moments and started again each time: the tiles are those of a run that was
    left alone, to the last bit, and the report finds nothing wrong at any time."""
    def start(folder):
        return subprocess.Popen([sys.executable, "-c", WRITER, folder], cwd=HERE)
    assert start(tmp_path / "whole").wait() == 0
    rng, killed = np.random.default_rng(0), 0
    while killed < KILLS:
        process = start(tmp_path / "killed")
        try:
            process.wait(rng.uniform(0.1, 0.5))
            shutil.rmtree(tmp_path / "killed")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        if (tmp_path / "killed" / "manifest.json").exists():
            assert store.report(str(tmp_path / "killed")) == 0
    assert start(tmp_path / "killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and len(contents(tmp_path / "whole")) == 100


def test_store_holds_a_few_tiles_in_memory(tmp_path):
    """A product of a matrix of 36 tiles, 9 MB, holds no more than a tile for each thread."""
    x = np.random.default_rng(0).normal(size=(2048, 3)).astype(np.float32)
    kept = store.create(str(tmp_path), {"tile": 256}, store.digests(x))
    K = tiles.gram(linear, x, 256, store=kept)
    tracemalloc.start()
    K.matvec(np.ones((2048, 2)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (os.cpu_count() + 2) * (256 * 256 * 4 + 256 * 256 * 8 * 2) < 36 * 256 * 256 * 4


DRIVER = """
import sys; sys.path.insert(0, ".")
import jax.numpy as jnp, numpy as np, store, tiles
x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
try:
    kept = store.create(sys.argv[1], {"tile": 32}, store.digests(x))
    K = tiles.gram(lambda a, b: jnp.matmul(a, b.T), x, 32, store=kept, quiet=True)
    print(f"found {K.found} of {K.entries}, sum {K.matvec(np.ones((300, 1))).sum():.6f}")
except OSError as error:
    sys.exit(str(error))
"""


def test_store_on_a_full_and_on_a_read_only_disk(tmp_path):
    """A full disk, then a read-only one: one sentence and exit code 1, what was finished is kept and
    intact; given room, the same command ends as if nothing had been. A finished store needs no right
    to write."""
    run = f'"{sys.executable}" -c "$DRIVER" disk/K'
    script = f"""mkdir disk; mount -t tmpfs -o size=100k tmpfs disk
        {run}; echo "exit $?"; "{sys.executable}" {HERE}/tiles.py disk
        mount -o remount,ro disk; {run}; echo "exit $?"
        mount -o remount,rw,size=9m disk; {run}
        mount -o remount,ro disk; {run}"""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small disk (unshare -rm)")
    out = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "DRIVER": DRIVER, "PYTHONPATH": HERE})
    assert re.search(r"could not be written: No space left on device\. Whatever was finished is kept: free "
                     r"some space and run the same command again", out.stderr)
    assert re.search(r"could not be written: Read-only file system\. Whatever was finished is kept: make the "
                     r"folder writable", out.stderr)
    assert out.stdout.count("exit 1") == 2 and "every tile is intact" in out.stdout
    first, second = re.findall(r"found (\d+) of (\d+), sum (.*)", out.stdout)
    assert 0 < int(first[0]) < int(first[1]) == int(second[0]) and first[2] == second[2]


def test_tiles_merged(tmp_path):
    """A matrix in larger tiles has the entries it had, for any n, also a leading block, and from a disk."""
    for n, side in ((37, 12), (40, 10), (9, 100), (64, 8)):
        x, x_test = inputs(n), inputs(200)[150:167]
        for K in (tiles.gram(linear, x, 3, quiet=True), tiles.cross(linear, x_test, x, 3, quiet=True),
                  tiles.gram(linear, x, 3, quiet=True).leading(n - 2)):
            large = K.merged(side)
            assert large.sides[0] > 3 and (large.dense() == K.dense()).all() and large.entries >= K.entries
            assert (large.rows(1, 6) == K.dense()[1:6]).all() or K.symmetric
    kept = stored(tmp_path, inputs(40))
    assert isinstance(kept.merged(32).tiles, dict) and (kept.merged(32).dense() == kept.dense()).all()
    assert kept.merged(16) is kept


# ------------------------------------------------------------------------------------------ lazy

@pytest.mark.parametrize("devices", [1, 3])
def test_lazy_is_kept(devices):
    """A matrix that is kept nowhere has the methods and the answers of one in memory, for any n."""
    for n in (1, 37):
        x, x_test = inputs(n), inputs(200)[50:61]
        v = np.random.default_rng(1).normal(size=(n, 3))
        where = dict(tile=16, devices=jax.local_devices()[:devices], quiet=True)
        for K, kept in ((on_the_fly.matrix(linear, x, **where), tiles.gram(linear, x, **where)),
                        (on_the_fly.matrix(linear, x_test, x, **where), tiles.cross(linear, x_test, x, **where))):
            assert K.shape == kept.shape and K.entries == kept.entries
            assert np.allclose(K.matvec(v), kept.matvec(v), rtol=1e-5, atol=1e-5)
            indices = np.array([n - 1, 0])
            assert np.allclose(K.columns(indices), kept.columns(indices), rtol=1e-5, atol=1e-5)
            if not kept.symmetric:
                assert np.allclose(K.rows(3, 9), kept.rows(3, 9), rtol=1e-5, atol=1e-5)
                assert np.allclose(kept.rows(3, 9), linear(x_test, x)[3:9], rtol=1e-5, atol=1e-5)
                half = -(-n // 2)
                assert np.allclose(K.leading(half).matvec(v[:half]), kept.rows(0, 11)[:, :half] @ v[:half],
                                   rtol=1e-5, atol=1e-5)
        K, kept, k = on_the_fly.matrix(linear, x, **where), tiles.gram(linear, x, **where), -(-n // 2)
        assert np.allclose(K.diagonal(), kept.diagonal(), rtol=1e-5, atol=1e-5)
        assert np.allclose(K.leading(k).matvec(v[:k]), kept.leading(k).matvec(v[:k]), rtol=1e-5, atol=1e-5)
        product = K.matvec(np.eye(n))
        assert np.allclose(product, product.T, rtol=1e-14)  # CG needs it



# ------------------------------------------------------------------------------------------- pcg

class Dense:
    """What pcg asks of a matrix, of an array."""

    def __init__(self, K):
        self.K, self.shape, self.matvec = K, K.shape, lambda v: K @ v

    def diagonal(self):
        return np.diag(self.K).copy()

    def columns(self, indices):
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


def test_pcg_is_scikit_learn():
    """On digits, tiles and CG give the dual coefficients of scikit-learn's KernelRidge."""
    from sklearn.kernel_ridge import KernelRidge
    x, labels = digits(400)
    K, y = tiles.gram(kernel.kernel_fn("fc", "ntk"), x, tile=128), data.one_hot(labels)
    ridge = 1e-3 * K.diagonal().mean()
    alpha, _ = pcg.solve(K.matvec, y, ridge, pcg.low_rank(K, 40)(ridge), tol=1e-10)
    model = KernelRidge(alpha=ridge, kernel="precomputed").fit(K.dense().astype(np.float64), y)
    assert np.allclose(alpha, regression.dual_coef_, rtol=1e-6, atol=1e-8 * np.abs(alpha).max())


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
    x, labels = digits(1400) if source == "digits" else cifar(2000)
    K, y = tiles.gram(kernel.kernel_fn("fc", "nngp"), x, tile=512), data.one_hot(labels)
    ridge = 1e-4 * K.diagonal().mean()
    counts = [pcg.solve(K.matvec, y, ridge, P, max_iters=5000)[1].iterations
              for P in (None, pcg.jacobi(K)(ridge), pcg.low_rank(K, len(x) // 5)(ridge))]
    assert counts[0] >= 4 * counts[2] and counts[1] > 0.5 * counts[0]


def test_pcg_condition():
    """The condition number read off the coefficients is that of K + ridge I to 1 %."""
    K = spectrum(100, 1e4)
    _, info = pcg.solve(lambda v: K @ v, np.random.default_rng(0).normal(size=(100, 1)), 1e-3,
                        tol=1e-12, max_iters=1000)
    values = np.linalg.eigvalsh(K) + 1e-3
    assert abs(info.condition / (values[-1] / values[0]) - 1) < 0.01
    assert len(info.history) == info.iterations + 1 and info.history[0] == 1


def test_pcg_says_so():
    """Too few steps, a tolerance beyond rounding, an indefinite K, NaN: said, each in one sentence."""
    K, y = spectrum(200, 1e8), np.random.default_rng(0).normal(size=(200, 2))
    with pytest.warns(UserWarning, match="not converged: residual .* after 5 steps, .*--max_iters"):
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


def test_pcg_checkpoint(tmp_path, capsys):
    """A checkpoint gives back what it was given, to one that asks about the same solve; it is not
    written at every step; a damaged one is said and not used."""
    path, about = str(tmp_path / "solve" / "a.npz"), {"ridge": 0.1, "rows": 5}
    kept = store.Checkpoint(path, about, tiles.ALONE)
    assert kept.load() is None
    for step in range(100):
        kept.save({"x": np.full(3, step)}, False)
    assert store.Checkpoint(path, about, tiles.ALONE).load()["x"][0] < 99
    kept.save({"x": np.full(3, 7.5), "history": [1.0]}, True)
    state = store.Checkpoint(path, about, tiles.ALONE).load()
    assert set(state) == {"x", "history"} and (state["x"] == 7.5).all()
    assert store.Checkpoint(path, {**about, "ridge": 1.0}, tiles.ALONE).load() is None
    flip(tmp_path / "solve" / "a.npz")
    assert kept.load() is None and "damaged: this solve starts anew" in capsys.readouterr().out


def test_pcg_indefinite():
    """A kernel that rounding has made indefinite, and rows that are alike without a ridge, are named, and
    the ridge suggested cures them, though not by a hundred times what it must."""
    rng = np.random.default_rng(0)
    K, y = spectrum(300, 1e9), rng.normal(size=(300, 3))
    K = K.astype(np.float16).astype(np.float64)  # eigenvalues down to -1e-3 of the mean
    lowest = np.linalg.eigvalsh(K)[0]
    singular = [G @ G.T for G in rng.normal(size=(20, 40, 30))]  # rounding gives the zeros a sign of its own
    for K, lowest, y in ((K, lowest, y), *((G, 0.0, y[:40]) for G in singular)):
        with pytest.raises(pcg.Indefinite, match="not positive definite.* eigenvalue of .*Raise the ridge") as error:
            pcg.solve(lambda v: K @ v, y, 0.0, max_iters=5000)
        cure = error.value.cure
        assert -lowest < cure < -3 * lowest + 1e-5 * np.linalg.norm(K, 2)
        assert pcg.solve(lambda v: K @ v, y, cure, max_iters=5000)[1].converged
    with pytest.raises(pcg.Indefinite):
        pcg.solve(lambda v: -v, y, 0.5)


def test_pcg_draws():
    """The figure shows the histories it was given, under their names."""
    from matplotlib.figure import Figure
    K, y = spectrum(50, 1e4), np.random.default_rng(0).normal(size=(50, 2))
    infos = {name: pcg.solve(lambda v: K @ v, y, 1e-4, P)[1]
             for name, P in (("none", None), ("half", pcg.low_rank(Dense(K), 25)(1e-4)))}
    axes = Figure().add_subplot()
    pcg.draw(axes, infos)
    for line, (name, info) in zip(axes.lines, infos.items(), strict=True):
        assert list(line.get_ydata()) == info.history and line.get_label().startswith(f"{name}: ")


# ---------------------------------------------------------------------------------- precondition

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


def test_precondition_low_rank_formula():
    """P^-1 is the inverse of F F^T + s^2 sqrt(diag K / mean) + ridge, made densely, for n beyond what a
    thread takes; for a leading block, of the first rows of F, also where they are fewer than its columns."""
    K = spectrum(60, 1e5) * np.outer(*2 * [np.linspace(1, 3, 60)])
    low = pcg.low_rank(Dense(K), 20)
    for n in (60, 45, 11):
        F, d = low.F[:n].astype(np.float64), np.diag(K)[:n]
        s2 = np.linalg.svd(F, compute_uv=False)[:20].min() ** 2
        P = F @ F.T + np.diag(s2 * np.sqrt(d / d.mean()) + 1e-3)
        inverse = (low if n == 60 else low.leading(n))(1e-3)(np.eye(n))
        assert np.allclose(inverse @ P, np.eye(n), atol=1e-7) and low.leading(n).rank == min(n, 20)
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


@pytest.mark.parametrize("source, ridge", [("power", 1e-6), ("power", 1e-2), ("digits", 1e-4)])
def test_precondition_rank_is_worth_it(source, ridge):
    """The rank chosen while F grows is one whose cost, with the steps really taken, is at most a fifth
    above that of the best of six ranks; a product that costs more is worth a larger rank."""
    n = 600
    K = spectrum(n, 1e4) if source == "power" else np.asarray(
        kernel.kernel_fn("fc", "nngp")(digits(n)[0]), np.float64)
    y, product = np.random.default_rng(0).normal(size=(n, 10)), 2 * n * n * 10
    ridge *= np.diag(K).mean()
    worth = rank.Worth(n, [(ridge, 1e-6)], product)
    chosen = pcg.low_rank(Dense(K), None, worth=worth, size=16)

    def cost(low):
        k = low.F.shape[1]
        steps = pcg.solve(Dense(K).matvec, y, ridge, low(ridge), max_iters=3000)[1].iterations
        return steps * (product + 4 * n * k * 10) + 3 * n * k**2 + k**3
    best = min(cost(pcg.low_rank(Dense(K), k)) for k in (20, 40, 80, 120, 160, 240))
    assert 16 < chosen.rank < n // 2 and cost(chosen) < 1.2 * best
    dearer = rank.Worth(n, [(ridge, 1e-6)], 10 * product)
    assert pcg.low_rank(Dense(K), None, worth=dearer, size=16).rank > chosen.rank


# ------------------------------------------------------------------------------------ regression

def problem(n=150, m=40, outputs=3):
    """x, K, K_test as matrices in tiles, y, and dense float64 k(X, X), k(x, X), k(x, x)."""
    x, fn = inputs(n + m), kernel.kernel_fn("fc", "nngp")
    x, x_test = x[:n].reshape(n, -1), x[n:].reshape(m, -1)
    where = dict(tile=64, quiet=True)
    y = np.random.default_rng(5).normal(size=(n, outputs))
    K, K_test = tiles.gram(fn, x, **where), tiles.cross(fn, x_test, x, **where)
    prior = np.diag(np.asarray(fn(x_test), np.float64)).copy()
    return K, K_test, y, K.dense().astype(np.float64), K_test.dense().astype(np.float64), prior


def test_regression_variance():
    """Variance and scale are those of the dense formulas: of the posterior, and of the likelihood's maximum."""
    K, K_test, y, A, k, prior = problem()
    lam = 0.05 * np.diag(A).mean()
    A += lam * np.eye(len(A))
    solver = regression.Solver(K, rank=50)
    variance = regression.variance(solver, K_test, prior, 0.05, block=16)
    expected = prior + lam - np.einsum("mn,nm->m", k, np.linalg.solve(A, k.T))
    assert np.allclose(variance, expected, rtol=1e-4)
    alpha, _ = solver(y, 0.05, 1e-10)
    s2 = regression.scale(y, alpha)

    def log_likelihood(s2):
        return sum(multivariate_normal(cov=s2 * A).logpdf(column) for column in y.T)
    assert log_likelihood(s2) > max(log_likelihood(0.99 * s2), log_likelihood(1.01 * s2))


def test_regression_probabilities():
    """Class probabilities are the shares of draws in which each output is the largest."""
    rng = np.random.default_rng(0)
    f, sd = rng.normal(size=(5, 4)), np.array([0.1, 0.3, 1.0, 3.0, 10.0])
    p = regression.class_probabilities(f, sd)
    draws = f + sd[:, None] * rng.normal(size=(200_000, 5, 4))
    share = np.stack([np.bincount(winner, minlength=4) for winner in draws.argmax(axis=2).T]) / 200_000
    assert np.abs(p - share).max() < 5 * 0.5 / 200_000**0.5 and np.allclose(p.sum(axis=1), 1)
    assert np.allclose(regression.class_probabilities(np.zeros((1, 4)), np.ones(1)), 0.25)


def test_regression_calibration():
    """nll, ece and the Gaussian nll are what plain loops make; labels drawn from P have an ece near 0,
    and twice or half the sd is worse in all three."""
    rng = np.random.default_rng(0)
    f, sd = rng.normal(size=(4000, 3)), np.full(4000, 1.0)
    y = f + rng.normal(size=f.shape)
    labels = y.argmax(axis=1)
    got, p = regression.calibration(f, sd, labels, y), regression.class_probabilities(f, sd)
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = [i for i in range(4000) if low <= p[i].max() < low + 1 / 15]
        if inside:
            ece += abs(sum(float(p[i].argmax() == labels[i]) - p[i].max() for i in inside)) / 4000
    assert np.isclose(got["test_ece"], ece) and ece < 0.03
    assert np.isclose(got["test_nll"], np.mean([-np.log(p[i, labels[i]]) for i in range(4000)]))
    assert np.isclose(got["test_gaussian_nll"], -norm(f, sd[:, None]).logpdf(y).mean())
    for other in (0.5, 2.0):
        worse = regression.calibration(f, other * sd, labels, y)
        assert all(worse[name] > got[name] for name in got)


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


# ---------------------------------------------------------------------------------------- choose

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


def test_choose_gcv_is_its_formula():
    """GCV from a block solve with random signs is n |alpha|^2 / (tr A^-1)^2 of a dense inverse, to what its probes
    leave of the trace, and chooses a neighbour of the same ridge at least."""
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


def test_choose_criteria():
    """Where none is asked for: leave-one-out for a small K, GCV for a large one, validation for a large one with
    copies; GCV with copies is refused."""
    assert [choose.criterion(None, *size) for size in ((4096, 1), (4096, 4), (4097, 1), (4097, 2))] == [
        "loo", "loo", "gcv", "validation"]
    assert choose.criterion("loo", 10**6, 2) == "loo"
    with pytest.raises(ValueError, match="gcv with 2 copies .* --select loo or validation"):
        choose.criterion("gcv", 100, 2)


def test_choose_prefers_the_larger_ridge():
    """Of ridges within a thousandth of the least error, the largest is taken; by score, the best score."""
    table = [choose.Row(1.0, 0.9, 2.0), choose.Row(0.1, 0.7, 1.0005), choose.Row(0.01, 0.8, 1.0)]
    assert choose.best(table).ridge == 0.1 and choose.best(table, "score").ridge == 1.0


def test_choose_ridges_that_are_too_small(capsys):
    """A ridge with which K is not positive definite is no candidate, nor is a smaller one; alone, it is an
    error that names a ridge, in the user's terms, that will do."""
    K = spectrum(100, 1e6).astype(np.float16).astype(np.float64)
    K = tiles.TiledMatrix(K.shape, K.shape, True, {(0, 0): K})
    y = np.random.default_rng(0).normal(size=(100, 2))
    lowest = np.linalg.eigvalsh(K.dense())[0] / K.diagonal().mean()
    solver = regression.Solver(K, "none", quiet=False)
    table = choose.validation(solver, y, [1.0, 0.1, 1e-9, 1e-10], 80, np.arange(80, 100))
    assert [row.ridge for row in table] == [1.0, 0.1] and "not positive definite" in capsys.readouterr().out
    assert [row.ridge for row in choose.leave_one_out(choose.Spectrum(K.dense()), y, [1.0, 0.1, 1e-9])] == [1.0, 0.1]
    with pytest.raises(pcg.Indefinite, match="within the rounding of K") as error:
        choose.leave_one_out(choose.Spectrum(K.dense()), y, [1e-9])
    assert choose.leave_one_out(choose.Spectrum(K.dense()), y, [error.value.cure])
    with pytest.raises(pcg.Indefinite, match=r"--ridge \d") as error:
        solver(y, 1e-9)
    assert -lowest < error.value.cure < -4 * lowest and solver(y, error.value.cure)[1].converged


def test_choose_draws(tmp_path):
    """The picture of error against ridge has leave-one-out, test error and effective dimension in it."""
    from matplotlib.figure import Figure
    x, labels = digits(80)
    fn, y = kernel.kernel_fn("fc", "nngp"), data.one_hot(labels)
    K = np.asarray(fn(x), np.float64)
    figure = Figure()
    choose.draw(figure.add_subplot(), choose.Spectrum(K[:60, :60]), y[:60], 0.1, K[60:, :60], y[60:])
    left, right = figure.axes
    f = K[60:, :60] @ np.linalg.solve(K[:60, :60] + 10 * np.diag(K[:60, :60]).mean() * np.eye(60), y[:60])
    assert len(left.lines) == 3 and len(right.lines) == 1
    assert abs(left.lines[1].get_ydata()[0] - np.sqrt(np.mean((f - y[60:]) ** 2))) < 1e-6


# ----------------------------------------------------------------------------------------- model

def test_model_predicts(tmp_path, capsys):
    """A saved model, loaded where the training set is not, gives the scores of the run that saved it."""
    flags = ["--n_train", "60", "--n_test", "50", "--kernel", "cnn_vec", "--depth", "2", "--kind", "ntk", "--flips",
             "--crops", "2", "--ridge", "0.1", "--whiten", "zca", "--tol", "1e-9"]
    result = train(tmp_path, *flags, "--save", str(tmp_path / "m.npz"))
    x_test, labels = data.load("digits", n_train=60, n_test=50)[2:]
    np.save(tmp_path / "x.npy", x_test)
    done = train(tmp_path, "--load", str(tmp_path / "m.npz"), "--predict", str(tmp_path / "x.npy"))
    scores = np.load(tmp_path / "predictions.npy")
    assert (done["scores"] == scores).all() and f"classes {scores[0].argmax()} " in capsys.readouterr().out
    assert abs(np.mean((scores - data.one_hot(labels)) ** 2) / result["test_mse"] - 1) < 1e-6


@pytest.mark.parametrize("spoil, words", [
    (lambda m, x: flip(m), "m.npz is not a model that --save has written, or damaged"),
    (lambda m, x: m.write_bytes(m.read_bytes()[:900]), "m.npz is not a model"),
    (lambda m, x: np.savez(m, alpha=np.ones(3)), "m.npz is not a model .*format"),
    (lambda m, x: np.save(x, np.zeros((2, 8, 8, 1))), r"holds float64 \(2, 8, 8, 1\); .* uint8 \(m, 8, 8, 1\)"),
    (lambda m, x: np.save(x, np.zeros((2, 9, 8, 1), np.uint8)), r"holds uint8 \(2, 9, 8, 1\)"),
    (lambda m, x: x.unlink(), "x.npy is not there; --predict takes an .npy file of uint8 images"),
    (lambda m, x: np.save(x, np.array([{}])), "x.npy is not a complete .npy array without pickle"),
    (lambda m, x: np.savez(open(x, "wb"), a=np.ones(2)), "holds an archive"),
])
def test_model_damaged(tmp_path, spoil, words):
    """A model or a file of images that is damaged, pickled or of another shape: one sentence."""
    train(tmp_path, "--n_train", "30", "--n_test", "5", "--ridge", "1", "--save", str(tmp_path / "m.npz"))
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 1), np.uint8))
    spoil(tmp_path / "m.npz", tmp_path / "x.npy")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train(tmp_path, "--load", str(tmp_path / "m.npz"), "--predict", str(tmp_path / "x.npy"))


# --------------------------------------------------------------------------------------- augment

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


def test_augment_in_tiles():
    """The kernel of a view, made tile by tile, is the kernel of all its images made at once."""
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    view, fn = augment.expand(4, flips=True, crops=3, pad=1), kernel.kernel_fn("cnn_vec", "ntk", depth=2)
    K = tiles.gram(fn, view.of(x), tile=7)
    everything = view.of(x).pixels()
    assert relative_error(K.dense(), np.asarray(fn(everything), np.float64)) < 1e-5


@pytest.mark.parametrize("protocol", ["none", "channel", "zca", "zca_unit"])
def test_augment_whitens_what_a_tile_asks_for(protocol, monkeypatch):
    """Bytes are flipped and cropped and then whitened: a block of a view is the whitening of its pixels, however few
    blocks are kept; and the kernel made of such blocks, by several devices, is that of all of them at once."""
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    whiten, fn = data.whitening(protocol, x)(0.1), kernel.kernel_fn("fc", "nngp")
    view = augment.expand(40, flips=True, crops=3, pad=2)
    assert view.of(x, whiten)[np.arange(50)].pixels().dtype == np.uint8
    corner = view.of(x, whiten)[np.flatnonzero((view.offset == 0).all(axis=1) & ~view.flip)].pixels()[:, 0, 0]
    assert len(corner) and (corner == np.rint(x.mean(axis=(0, 1, 2)))).all()
    want = np.asarray(whiten(view.of(x, whiten).pixels()))
    for kept in (0, 5 * 2**27):
        monkeypatch.setattr(augment, "KEPT", kept)
        images = view.of(x, whiten)
        rows = np.array([7, 100, 3])
        for device in jax.devices()[:2]:
            block = images[rows].on(device)
            assert block.devices() == {device} and np.allclose(block, want[rows], rtol=1e-5, atol=1e-6)
        assert len(images.made) == 1
        assert relative_error(tiles.gram(fn, images, tile=50).dense(), np.asarray(fn(want), np.float64)) < 1e-5


@every_network
@both_kinds
def test_augment_symmetric(name, kind):
    """k(f x, f x') = k(x, x'), and so the regression with k(x, x') + k(x, f x') on x predicts what that with k
    on x and f x does: to 1e-5, also of images that are their own mirror image, at a quarter of the entries."""
    x = np.random.default_rng(0).normal(size=(12, 4, 8, 2))
    x[3], x, x_test = (x[3] + x[3][:, ::-1]) / 2, x[:8], x[8:]
    y, fn, ridge = np.random.default_rng(1).normal(size=(8, 3)), kernel.kernel_fn(name, kind), 1e-3
    both = np.concatenate([x, augment.mirror(x)])
    K = np.asarray(fn(both))
    assert relative_error(K[8:, 8:], K[:8, :8]) < 1e-10 and relative_error(K[8:, :8], K[:8, 8:]) < 1e-10
    f = fn(x_test, both) @ np.linalg.solve(K + ridge * np.eye(16), np.concatenate([y, y]))
    half = augment.symmetric(fn)
    g = half(x_test, x) @ np.linalg.solve(half(x) + ridge * np.eye(8), y)
    assert np.abs(f - g).max() < 1e-5 * np.abs(f).max() and 4 * half(x).size == K.size


def test_augment_errors():
    """More crops than shifts, images that are too few, mirror images of vectors are refused."""
    with pytest.raises(ValueError, match=r"\(3, 5\): only images"):
        augment.symmetric(kernel.kernel_fn("fc", "nngp"))(np.ones((3, 5)))
    with pytest.raises(ValueError, match="1 <= crops <= 9"):
        augment.expand(5, crops=10, pad=1)
    with pytest.raises(ValueError, match=r"n >= 5"):
        augment.expand(5).of(np.zeros((4, 8, 8, 1)))


# ------------------------------------------------------------------------------------------ data

def test_data_digits():
    """1,437 + 360 real images, uint8; the same test images for every seed."""
    x, y, x_test, y_test = data.load("digits")
    assert x.shape == (1437, 8, 8, 1) and x_test.shape == (360, 8, 8, 1) and x.dtype == np.uint8
    assert y.dtype == np.int64 and set(y) == set(range(10)) and x.max() == 16
    assert (data.load("digits", seed=5)[2] == x_test).all() and (data.load("digits", seed=5)[0] != x).any()


def test_data_order():
    """Every prefix is balanced to one image, sizes are nested, seeds differ, all rows come once."""
    _, y, _, _ = data.load("digits", n_train=1000)
    for n in (10, 37, 500, 1000):
        counts = np.bincount(data.load("digits", n_train=n)[1], minlength=10)
        assert counts.max() - counts.min() <= 1
        assert (data.load("digits", n_train=n)[1] == y[:n]).all()
    labels = np.repeat(np.arange(10), 7)
    assert sorted(data.order(labels, 0)) == list(range(70))
    assert (data.order(labels, 0) != data.order(labels, 1)).any()
    plain = labels[data.order(labels, 0, balanced=False)]
    assert sorted(plain) == sorted(labels) and len(set(plain[:10])) < 10


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
    assert np.allclose(x.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
    assert np.allclose(x.std((0, 1, 2)) / 255, [0.2470, 0.2435, 0.2616], atol=1e-4)


@pytest.mark.parametrize("damage, words", [
    (lambda d: (d / "data_batch_3.bin").unlink(), "data_batch_3.bin is not there; give --data"),
    (lambda d: (d / "test_batch.bin").write_bytes(b"x" * 100), "has 100 bytes; a CIFAR-10 batch has"),
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


def test_data_rows_asked_for():
    """More rows than there are, no rows, an unknown name: refused with the numbers."""
    with pytest.raises(ValueError, match="n_train=2000, but digits has 1 to 1437 rows"):
        data.load("digits", n_train=2000)
    with pytest.raises(ValueError, match="n_test=0"):
        data.load("digits", n_test=0)
    with pytest.raises(ValueError, match="'mnist' is unknown; choose one of digits"):
        data.load("mnist")


@pytest.fixture
def cifar5m_folder(tmp_path, monkeypatch):
    """Six parts in the format of CIFAR-5m, compressed and not; pixel (0, 0) holds label and part."""
    monkeypatch.setattr(data, "BLOCK", 32)
    rng = np.random.default_rng(0)
    for part in range(6):
        X, Y = rng.integers(0, 256, (500, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 500)
        X[:, 0, 0, 0], X[:, 0, 0, 1] = Y, part
        (np.savez if part % 2 else np.savez_compressed)(tmp_path / f"part{part}.npz", X=X, Y=Y)
    return tmp_path


def test_data_cifar5m(cifar5m_folder):
    """Parts 0-4 train, part 5 tests; rows and labels stay together; balanced, nested, across parts."""
    x, y, x_test, y_test = data.load("cifar5m", cifar5m_folder)
    assert len(x) == 2500 and len(x_test) == 500
    assert (x[:, 0, 0, 0] == y).all() and (x_test[:, 0, 0, 0] == y_test).all()
    assert set(x[:, 0, 0, 1]) == {0, 1, 2, 3, 4} and set(x_test[:, 0, 0, 1]) == {5}
    assert len(np.unique(x.reshape(2500, -1), axis=0)) == 2500
    few, labels, few_test, _ = data.load("cifar5m", cifar5m_folder, n_train=300, n_test=50)
    assert (few == x[:300]).all() and np.bincount(labels).tolist() == [30] * 10
    assert len(set(few[:, 0, 0, 1])) > 1 and (few_test == x_test[:50]).all()


def test_data_cifar5m_is_streamed(tmp_path):
    """100 rows of parts of 25 MB are read without holding 10 MB."""
    X = np.zeros((8192, 32, 32, 3), np.uint8)
    for part in range(6):
        np.savez(tmp_path / f"part{part}.npz", X=X, Y=np.arange(8192) % 10)
    del X
    tracemalloc.start()
    data.load("cifar5m", tmp_path, n_train=100, n_test=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6 < 25e6


@pytest.mark.parametrize("damage, words", [
    (lambda p: p.unlink(), "part2.npz is not there"),
    (lambda p: p.write_bytes(p.read_bytes()[:5000]), "part2.npz is truncated or not an .npz"),
    (lambda p: np.savez(p, X=np.ones((5, 32, 32, 3))), "holds X.npy; expected X, Y"),
    (lambda p: np.savez(p, X=np.ones((500, 32, 32, 3)), Y=np.arange(500) % 10), "float64.*expected uint8"),
    (lambda p: np.savez(p, X=np.ones((500, 32, 32, 3), np.uint8), Y=np.full(500, 77)), "label 77"),
    (lambda p: np.savez(p, X=np.ones((90, 32, 32, 3), np.uint8), Y=np.arange(500) % 10), "part2"),
])
def test_data_cifar5m_damaged(cifar5m_folder, damage, words):
    """A part that is missing, truncated, of the wrong keys, dtype, labels or length is named."""
    damage(cifar5m_folder / "part2.npz")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        data.load("cifar5m", cifar5m_folder)


def archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest()


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


def test_data_whitening():
    """zca with eps = 0 makes the covariance of what it was fitted on the identity; channel makes every channel mean 0
    and deviation 1; none divides by 255; each sees one image at a time, and only the images it was fitted on."""
    x = correlated(500)
    z = whitened(x, "zca", zca_eps=0).reshape(500, -1)
    assert z.dtype == np.float32 and np.abs(z.mean(axis=0)).max() < 1e-3
    assert np.abs(z.T @ z / 500 - np.eye(48)).max() < 1e-3
    s = whitened(x)
    assert np.allclose(s.mean((0, 1, 2)), 0, atol=1e-4) and np.allclose(s.std((0, 1, 2)), 1, atol=1e-4)
    assert np.allclose(whitened(x, "none"), x / 255, atol=1e-6)
    for protocol in data.WHITENING:
        assert np.allclose(whitened(x[:1], protocol, x, 0.3)[0], whitened(x[:9], protocol, x, 0.3)[0], atol=1e-5)
    for protocol in ("zca", "zca_unit"):
        with pytest.raises(ValueError, match="zca_eps=0: .* singular.*zca_eps > 0"):
            whitened(x, protocol, x[:20], 0)
    with pytest.raises(ValueError, match="'pca' is unknown; choose one of none, channel, zca, zca_unit"):
        data.whitening("pca", x)


def correlated(n):
    x = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    x[:, :, 1:] = (x[:, :, 1:].astype(int) + x[:, :, :-1]) // 2  # neighbours are alike
    return x


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


@pytest.mark.parametrize("protocol", ["channel", "zca", "zca_unit"])
def test_data_whitening_of_mirror_images(protocol):
    """Fitted with flips, the whitened mirror image is the mirror image of the whitened image."""
    x = correlated(100)
    for flips, same in ((True, True), (False, protocol == "channel")):
        whiten = data.whitening(protocol, x, flips=flips)(0.1)
        off = np.abs(whiten(x[:, :, ::-1]) - whiten(x)[:, :, ::-1]).max() / np.abs(whiten(x)).max()
        assert (off < 1e-5) == same


def test_data_rows_to_fit_on(cifar5m_folder):
    """n_fit brings more training rows, those that a larger n_train would bring, as far as there are."""
    for name, folder, most in (("digits", None, 1437), ("cifar5m", cifar5m_folder, 2500)):
        x = data.load(name, folder)[0]
        for n_train, n_fit, n in ((100, 400, 400), (100, 50, 100), (100, 10**6, most), (None, 400, most)):
            assert (data.load(name, folder, n_train, n_fit=n_fit)[0] == x[:n]).all()


def test_data_one_hot():
    """Targets are 1 - 1/classes for the class and -1/classes elsewhere."""
    assert np.allclose(data.one_hot(np.array([2, 0]), 4),
                       [[-0.25, -0.25, 0.75, -0.25], [0.75, -0.25, -0.25, -0.25]])


# ----------------------------------------------------------------------------------------- train

def train(tmp_path, *flags):
    return train_cifar.main([*flags, "--out", str(tmp_path), "--quiet"])


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
    result = train(tmp_path, "--n_train", "300", "--kernel", "cnn_vec", "--depth", "2", "--kind", "ntk",
                   "--ridge", "1e-3", "--whiten", "channel", "--fit_on", "200")
    x, labels, x_test, test_labels = data.load("digits", n_train=300)
    x, x_test = (whitened(z, fit=x[:200]).astype(np.float64) for z in (x, x_test))
    K = reference("cnn_vec", "ntk", x, depth=2)
    A = K + 1e-3 * np.diag(K).mean() * np.eye(300)
    f = reference("cnn_vec", "ntk", x_test, x, depth=2) @ np.linalg.solve(A, data.one_hot(labels))
    assert result["test_accuracy"] == np.mean(f.argmax(axis=1) == test_labels)
    assert abs(result["test_mse"] - np.mean((f - data.one_hot(test_labels)) ** 2)) < 1e-5


@needs_cifar
@both_kinds
def test_train_cifar_is_a_dense_solve(tmp_path, kind):
    """On CIFAR-10 too, 1,500 images: accuracy within 0.1 point of dense Cholesky at the same ridge."""
    result = train(tmp_path, "--dataset", "cifar10", "--data", CIFAR, "--n_train", "1500", "--n_test",
                   "2000", "--kind", kind, "--whiten", "channel")
    everything, labels, x_test, test_labels = data.load("cifar10", CIFAR, n_test=2000)
    whiten = data.whitening("channel", everything)()
    x, labels = np.asarray(whiten(everything[:1500]), np.float64), labels[:1500]
    x_test = np.asarray(whiten(x_test), np.float64)
    K = np.asarray(kernel.kernel_fn("fc", kind)(x))
    A = K + result["ridge"] * np.diag(K).mean() * np.eye(1500)
    f = np.asarray(kernel.kernel_fn("fc", kind)(x_test, x)) @ np.linalg.solve(A, data.one_hot(labels))
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
    flags = ["--n_train", "100", "--n_test", "50", "--ridge", "1e-3"]
    seen = {train(tmp_path, *flags)["test_mse"]}
    for more in (["--kind", "ntk"], ["--kernel", "cnn_vec"], ["--depth", "5"], ["--whiten", "none"],
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
    """Three engines, one answer; --kind both is the two runs, each with its line in runs.jsonl.

    neural_tangents to 1e-4 only: of an image with itself its float32 kappa0 has an error of 1e-4,
    the square root of the rounding of c."""
    flags = ["--n_train", "60", "--n_test", "40", "--kernel", "cnn_gap", "--depth", "2", "--ridge", "0.1"]
    with as_users_have_it():
        seen = {engine: train(tmp_path, *flags, "--kind", "both", "--engine", engine)
                for engine in ("fused", "plain", "nt")}
    for kind in kernel.KINDS:
        for engine, tolerance in (("plain", 1e-5), ("nt", 1e-4)):
            mse = seen[engine][kind]["test_mse"]
            assert abs(mse / seen["fused"][kind]["test_mse"] - 1) < tolerance
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["config"]["kind"] for run in lines] == ["nngp", "ntk"] * 3
    assert all(run["one_pass"] and run["seconds"]["kernel"] > 0 for run in lines)
    alone = train(tmp_path, *flags, "--kind", "ntk")
    assert abs(alone["test_mse"] / seen["fused"]["ntk"]["test_mse"] - 1) < 1e-5


def test_train_without_fused(tmp_path):
    """fused.py and gpu.py can be deleted: kernel.py does the work, and --engine fused is no longer offered; and
    gpu.py alone."""
    for name in os.listdir(HERE):
        if name.endswith(".py") and name not in ("fused.py", "gpu.py"):
            shutil.copy(os.path.join(HERE, name), tmp_path)
    def run(*flags):
        return subprocess.run([sys.executable, "train_cifar.py", "--n_train", "50", "--ridge", "1", *flags],
                              cwd=tmp_path, capture_output=True, text=True)
    assert "engine=plain" in run().stdout
    assert "--engine: invalid choice: 'fused'" in run("--engine", "fused").stderr
    shutil.copy(os.path.join(HERE, "fused.py"), tmp_path)
    assert "engine=fused" in run().stdout


@pytest.mark.parametrize("part", ["train", "test"])
def test_train_store_refuses_before_it_computes(tmp_path, part):
    """Where the store of K or of K_test holds something else, no tile of either is computed first."""
    flags = ["--n_train", "60", "--ridge", "1", "--store", str(tmp_path / "K")]
    train(tmp_path, *flags, "--n_test", "30")
    for name in os.listdir(tmp_path / "K"):
        if not name.startswith(part):
            shutil.rmtree(tmp_path / "K" / name)
    with pytest.raises(ValueError, match=f"{part}-nngp holds another matrix|{part}-nngp was made from other inputs"):
        train(tmp_path, *flags, "--n_test", "30", "--seed", "1", "--depth", "2")
    assert not [path for path in (tmp_path / "K").rglob("*-*.npy") if not path.parent.name.startswith(part)]


def test_train_store(tmp_path):
    """With a store the answers are those without; a second run computes no entry; a larger n_train takes up the tiles
    of the smaller; --kind both takes up what one kind has left; another network or whitening is refused."""
    flags = ["--n_test", "50", "--ridge", "1e-2,1e-3", "--tile", "20", "--depth", "1", "--fit_on", "1000", "--rank",
             "9"]  # for rank is chosen by what a product costs, another on a disk
    keep = ["--store", str(tmp_path / "K")]
    for n, computed in ((60, 60 * 80 // 2 + 60 * 50), (60, 0), (100, 100 * 120 // 2 - 2400 + 2000)):
        result = train(tmp_path, "--n_train", str(n), *flags, *keep)
        assert result["entries_computed"] == computed
        assert result["test_mse"] == train(tmp_path, "--n_train", str(n), *flags)["test_mse"]
    both = train(tmp_path, "--n_train", "100", *flags, *keep, "--kind", "both")
    assert both["nngp"]["test_mse"] == result["test_mse"]
    assert not (tmp_path / "K" / "solve-nngp").exists()  # of no more use once the result is recorded
    derived = train(tmp_path, "--n_train", "100", *flags[:4], *flags[6:], *keep)  # tile: that of the store
    assert derived["entries_computed"] == 0 and derived["config"]["tile"] == 20
    for more, words in ((["--depth", "2"], "layers is .* there"), (["--b_std", "1"], "layers is .* there"),
                        (["--fit_on", "900"], "fitted_on is .* there"), (["--flips"], "fitted_on is|flips is None there"),
                        (["--whiten", "channel"], "whiten is 'zca' there, 'channel' here")):
        with pytest.raises(ValueError, match="holds another matrix: .*" + words):
            train(tmp_path, "--n_train", "60", *flags, *keep, *more)
    with pytest.raises(ValueError, match=r"rows that both have\s+differ, .*--seed"):
        train(tmp_path, "--n_train", "60", "--seed", "1", "--whiten", "none", "--n_test", "50", "--ridge", "1", "--store",
              str(tmp_path / "L"))
        train(tmp_path, "--n_train", "60", "--seed", "2", "--whiten", "none", "--n_test", "50", "--ridge", "1", "--store",
              str(tmp_path / "L"))


def test_train_sizes(tmp_path):
    """--sizes are the runs of these sizes, on leading blocks of one kernel: each has the ridge, the answer and the
    configuration of a run alone."""
    flags = ["--n_test", "50", "--ridge", "1,0.1", "--flips", "--tile", "30", "--tol", "1e-9"]
    whole = train(tmp_path, *flags, "--sizes", "80,20,50")
    assert list(whole) == [20, 50, 80] and [whole[n]["rows"] for n in whole] == [20, 50, 80]
    for n in (20, 50, 80):
        alone = train(tmp_path, *flags, "--n_train", str(n))
        assert abs(whole[n]["test_mse"] / alone["test_mse"] - 1) < 1e-6 and whole[n]["ridge"] == alone["ridge"]
        assert whole[n]["config"]["n_train"] == n and whole[n]["entries"] == alone["entries"] == (
            alone["entries_computed"])
        assert whole[n]["config"] == alone["config"] and alone["config"]["fit_on"] == 1437
        assert whole[n]["entries_computed"] == (alone["entries"] if n == 80 else 0)
    both = train(tmp_path, *flags, "--n_train", "80", "--sizes", "50", "--kind", "both", "--whiten", "none",
                 "--store", str(tmp_path / "K"))
    unwhitened = train(tmp_path, *flags, "--n_train", "50", "--whiten", "none", "--kind", "ntk")
    assert abs(both["ntk"][50]["test_mse"] / unwhitened["test_mse"] - 1) < 1e-5
    assert both["ntk"][50]["ridge"] == unwhitened["ridge"] and set(both["nngp"]) == {50, 80}
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3 + 3 + 4 + 1


@pytest.mark.parametrize("more", [[], ["--crops", "3"], ["--whiten", "channel"], ["--engine", "plain", "--kind", "both"], ["--store"],
                                  ["--ridge", "1,0.1,0.01"]], ids=str)
def test_train_flips_are_exact(tmp_path, more):
    """--flips answers as --flips explicit does, ridge for ridge, to 1e-5, from half of the entries, or a
    quarter of K; also with crops, from a store, and with a ridge chosen by leave-one-out, all copies of an image
    left out; for the whitening is fitted on mirror images too."""
    flags = ["--n_train", "60", "--n_test", "50", "--kernel", "cnn_vec", "--depth", "2", "--ridge", "0.1",
             "--tol", "1e-9", *more]
    results = [train(tmp_path, *flags, *([str(tmp_path / flips)] if "--store" in more else []), "--flips", flips)
               for flips in ("symmetric", "explicit")]
    for half, whole in zip(*(of.values() if "both" in more else [of] for of in results)):
        assert half["ridge"] == whole["ridge"] and abs(half["test_mse"] / whole["test_mse"] - 1) < 1e-5
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
    """A run says what its solve has done and how fast, with a residual for each class; --variance gives
    calibration; --plot a figure of all preconditioners; both leave the answer as it is."""
    flags = ["--n_train", "150", "--n_test", "60", "--ridge", "1e-2", "--out", str(tmp_path)]
    result = train_cifar.main(flags)
    said = capsys.readouterr().out
    assert re.search(r"solve: \d+ steps of .* rank \d+, residuals .* GB/s, \d+ % of the rate", said)
    assert re.search(r"leave-one-out: mse \S+, effective dimension \S+ of 150", said) and "leave-one-out " in said
    assert len(result["cg_residuals"]) == 10 and max(result["cg_residuals"]) == result["cg_residual"] <= 1e-6
    assert len(result["cg_history"]) == result["cg_iterations"] + 1 and result["rank"] > 0
    assert result["read_bytes_per_second"] > 0 and result["product_bytes_per_second"] > 0
    train_cifar.main([*flags, "--tol", "1e-11"])
    assert "note: rounding K to float32 alone makes a residual of about" in capsys.readouterr().out
    for store_flag in ([], ["--store", "none"]):
        more = train(tmp_path, *flags[:-2], *store_flag, "--variance", "--plot", str(tmp_path / "p.png"))
        assert abs(more["test_mse"] / result["test_mse"] - 1) < 1e-6
        assert 0 < more["test_nll"] < np.log(10) and 0 < more["test_ece"] < 0.3
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_train_survives_kills(tmp_path):
    """Killed at random moments, of the tiles and of the solve, and started again each time, it ends with
    the tiles of a run left alone, to the last bit, and with its answer."""
    def start(name):
        return subprocess.Popen(
            [sys.executable, os.path.join(HERE, "train_cifar.py"), "--n_train", "700", "--tile", "40", "--quiet",
             "--store", tmp_path / name, "--out", tmp_path / f"{name}-results", "--ridge", "1e-8,1e-7",
             "--precondition", "none", "--max_iters", "4000"], stdout=subprocess.PIPE, text=True)
    whole = start("whole")
    assert "test accuracy" in whole.communicate(timeout=300)[0] and whole.returncode == 0
    rng = np.random.default_rng(0)
    for kill in range(KILLS):
        process = start("killed")
        begun = tmp_path / "killed" / ("train-nngp/tiles-0.txt" if kill < KILLS // 2 else "solve-nngp")
        while process.poll() is None and not begun.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert store.report(str(tmp_path / "killed")) == 0
    last = start("killed")
    assert last.communicate(timeout=300) and last.returncode == 0
    for part in ("train-nngp", "test-nngp"):
        assert contents(tmp_path / "killed" / part) == contents(tmp_path / "whole" / part)
    whole, killed = (json.loads((tmp_path / f"{name}-results" / "runs.jsonl").read_text().splitlines()[-1])
                     for name in ("whole", "killed"))
    assert killed["entries_computed"] < whole["entries_computed"]
    assert abs(killed["test_mse"] / whole["test_mse"] - 1) < 1e-6


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
    flags = ["--n_train", "150", "--n_test", "60", "--ridge", "1,0.1,0.01", "--select", select, "--whiten", "zca,zca_unit",
             "--zca_eps", "0.1,10", "--depth", "1,3", "--b_std", "0,0.3"]
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
    assert len(table) == 2 * 2 * 2 * 2 and len({json.dumps(row[0]) for row in table}) == len(table)
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


@pytest.mark.parametrize("name", kernel.IMAGES)
def test_train_defaults(name):
    """Every network has a whitening of its own, and a flag that is given wins."""
    args = train_cifar.parse(["--kernel", name])
    assert (args.whiten[0], args.zca_eps[0]) == train_cifar.WHITENING[name]
    assert train_cifar.parse(["--kernel", name, "--whiten", "channel"]).whiten == ["channel"]
    assert train_cifar.parse(["--kernel", name, "--zca_eps", "7"]).zca_eps == [7.0]


def test_train_devices_that_are_not_there(tmp_path):
    """More devices than JAX sees are refused."""
    with pytest.raises(ValueError, match="--devices 5, but JAX sees 4 here"):
        train(tmp_path, "--n_train", "20", "--ridge", "1", "--devices", "5")


@pytest.mark.parametrize("flags, words", [
    (["--n_train", "2000"], "ValueError: n_train=2000, but digits has 1 to 1437 rows"),
    (["--kernel", "fc", "--depth", "-1"], "ValueError: depth=-1 does not fit fc"),
    (["--dataset", "cifar10", "--data", "nowhere"], "FileNotFoundError: .*data_batch_1.bin is not there"),
    (["--n_train", "4", "--select", "validation"], "ValueError: n_train=4: a validation split needs at least 5 images"),
    (["--flips", "explicit", "--select", "gcv"], "ValueError: --select gcv with 2 copies"),
    (["--whiten", "pca"], "--whiten pca: expected none, channel, zca, zca_unit"),
    (["--depth", "1,x"], "--depth 1,x: expected a whole number, or several separated by commas"),
    (["--w_std", "0"], "ValueError: w_std=0.0, b_std=0.0: expected w_std > 0 and b_std >= 0"),
    (["--head", "softmax"], "ValueError: head='softmax', .* expected one of linear, cosine, relu, exp"),
    (["--whiten", "zca", "--zca_eps", "nan"], "ValueError: zca_eps=nan"),
    (["--plan", "--depth", "1,2"], "--plan and --load take one network: one value for each of its flags"),
    (["--ridge", "often"], "--ridge often: expected a number"),
    (["--ridge", "-1"], "expected numbers >= 0"),
    (["--ridge", "1,nan"], "--ridge nan: expected numbers >= 0"),
    (["--tol", "nan"], "--tol nan: expected a number between 0 and 1"),
    (["--seed", "-1"], "--seed -1: expected a whole number >= 0"),
    (["--tile", "0"], "ValueError: .* tile=0: each must be at least 1"),
    (["--crops", "10"], "ValueError: .*1 <= crops <= 9"),
    (["--n_train", "20", "--fit_on", "3000"], "ValueError: --fit_on 3000, but there are 1437 training images"),
    (["--devices", "0"], "--devices 0: expected at least 1"),
    (["--sizes", "10,x"], "--sizes 10,x: expected whole numbers separated by commas"),
    (["--sizes", "10,30", "--n_train", "20"], r"--sizes \[10, 30\]: expected 1 to n_train=20"),
    (["--rank", "0"], "--rank 0: expected at least 1"),
    (["--load", "m.npz"], "--load FILE and --predict FILE go together"),
    (["--load", "m.npz", "--predict", "x.npy"], "FileNotFoundError: m.npz is not there; --load takes a file"),
    (["--kind", "ntk", "--variance"], "--variance with --kind ntk: .*use --kind nngp"),
    (["--kind", "both", "--save", "m.npz"], "--save with --kind both: a file holds one model"),
    (["--store", "README.md"], "OSError: the store README.md.* cannot be made: (File exists|Not a directory)"),
    (["--coordinator", "h:1"], "ValueError: --coordinator h:1 .*give HOST:PORT of process 0"),
])
def test_train_errors(flags, words, tmp_path):
    """At the command line, what is wrong is one line, without a traceback."""
    done = subprocess.run([sys.executable, "train_cifar.py", "--out", tmp_path, *flags], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode and re.search(words, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------- proteins

def protein(tmp_path, *flags):
    return train_protein.main([*flags, "--out", str(tmp_path), "--quiet"])


@needs_gb1
def test_proteins_gb1(capsys):
    """FLIP's files: rows fitted, held out and test as its README counts them, 4 of 265 residues vary, the wild
    type has fitness 1; the landscape's test rows are the same for every seed, its training rows in another order."""
    for split, counts in zip(sequences.FLIP, ((25, 28), (381, 424), (2691, 2990), (4580, 5089), (6289, 6988))):
        loaded = sequences.load(split, GB1, quiet=False)
        assert loaded[2:] == counts and len(loaded.sequences) == len(loaded.targets) == 8733
        assert sequences.encode(loaded.sequences, "onehot", loaded.n_train).shape == (8733, 4, 20)
    wild = "MQYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE"
    assert [y for s, y in zip(*loaded[:2]) if s.startswith(wild)] == [1.0]
    first, second = (sequences.load("landscape", GB1, seed, quiet=False) for seed in (0, 1))
    assert capsys.readouterr().out == ""  # no note that these were other files than those of SHA256
    n = first.n_train
    assert (len(first.targets), n, first.n_fit) == (149361, 119489, 119489 - 119489 // 5)
    assert first.sequences[n:] == second.sequences[n:] and first.sequences[:9] != second.sequences[:9]
    assert sorted(first.sequences[:n]) == sorted(second.sequences[:n])


def test_proteins_made():
    """The made landscape is what it says: 1,296 sequences, variance 1, of which least squares on one-hot explains
    exactly the share of the main effects."""
    sequences, y = sequences._made()
    assert len(set(sequences)) == 6**4 and abs(y.mean()) < 1e-12 and abs(y.var() - 1) < 1e-12
    x = sequences.encode(sequences, "onehot", 0).reshape(1296, -1).astype(float)
    residual = y - x @ np.linalg.lstsq(x, y)[0]
    assert abs(1 - residual.var() - sequences.MADE_LINEAR) < 1e-12


def test_proteins_encodings():
    """onehot: inner products count equal residues. blosum: residues of length 1, cosines in the order of BLOSUM62,
    whose triangle is symmetric with the published sums; centred: mean 0 over training rows. Constant positions are
    left out, shorter sequences end in zeros."""
    sequences = ["MAGIW", "MLGIW", "MLGVW", "MAGVY"]
    x = sequences.encode(sequences, "onehot", 2)
    assert x.shape == (4, 3, 20) and x.dtype == np.float32
    assert (np.einsum("npc,mpc->nm", x, x) == [[sum(a == b for a, b in zip(s[1::2] + s[4:], t[1::2] + t[4:]))
                                                for t in sequences] for s in sequences]).all()
    B = sequences.blosum() @ sequences.blosum().T
    at = {residue: i for i, residue in enumerate(sequences.RESIDUES)}
    assert np.allclose(np.diag(B), 1) and np.linalg.matrix_rank(B) == 19
    for a, near, far in ("ILP", "DEW", "FYD", "KRC", "STW"):
        assert B[at[a], at[near]] > 0.3 > 0 > B[at[a], at[far]]
    centred = sequences.encode(sequences, "centred", 2)
    assert centred.shape == (4, 1, 20) and np.abs(centred[:2].mean(axis=0)).max() < 1e-7
    ragged = sequences.encode(["MA", "M", "MAW"], "blosum", 3)
    assert ragged.shape == (3, 3, 20) and (np.abs(ragged).max(axis=2) > 0).sum(axis=1).tolist() == [2, 1, 3]


@pytest.mark.parametrize("name", sequences.TARGETS)
def test_proteins_targets(name):
    """Each function of the target keeps the order, has mean 0 and variance 1 on the rows it was fitted on, and its
    inverse gives them back; ties stay ties; beyond the range it stays finite."""
    y = np.array([3.0, 0, 0, 1, 8, 0.5])
    forward, inverse = sequences.transform(name, y)
    z = forward(y)
    assert abs(z.mean()) < 1e-12 and abs(z.var() - 1) < 1e-12 and np.allclose(inverse(z), y, atol=1e-12)
    assert (np.argsort(z, kind="stable") == np.argsort(y, kind="stable")).all() and z[1] == z[2]
    assert np.isfinite(forward(np.array([-5.0, 100]))).all() and np.isfinite(inverse(np.array([-3.0, 3]))).all()


@pytest.mark.parametrize("text, words", [
    ("sequence,target,set\nMA,1,train\n", "has no column validation; it has sequence, target, set"),
    ("", "has no column sequence, set, target, validation; it has none"),
    ("sequence,target,set,validation\n", "has no row below its header"),
    ("sequence,target,set,validation\nMA,1,train,\nMXA,2,test,\n", "line 3: residue 'X' at position 2; expected"),
    ("sequence,target,set,validation\nMA,1,train,\n,2,test,\n", "line 3: an empty sequence; expected"),
    ("sequence,target,set,validation\nMA,?,train,\n", "line 2: target '\\?'; expected a finite number"),
    ("sequence,target,set,validation\nMA,nan,train,\n", "line 2: target 'nan'; expected a finite number"),
    ("sequence,target,set,validation\nMA\n", "line 2: set None; expected train or test"),
    ("sequence,target,set,validation\nMA,1,valid,\n", "line 2: set 'valid'; expected train or test"),
    ("sequence,target,set,validation\nMA,1,train,\nML,1,test,\n", "lines 2 to 3: every target is 1"),
    ("sequence,target,set,validation\nMA,1,train,\nML,2,train,True\n", "1 rows to fit, 1 to validate and 0 to test"),
])
def test_proteins_bad_files(tmp_path, text, words):
    """What is wrong in a file is said in one sentence, with its line."""
    (tmp_path / "two_vs_rest.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        sequences.load("two_vs_rest", str(tmp_path))
    assert "\n" not in str(error.value)


def test_proteins_files_elsewhere(tmp_path, capsys):
    """The same rows from an archive, from its folder unpacked, from a bare table; a sentence where there is none."""
    text = "sequence,target,set,validation\nMA,1,train,\nMW,3,test,\nML,2,train,True\n"
    with pytest.raises(FileNotFoundError, match="flip_gb1_splits.zip, .* is there; fetch it from https"):
        sequences.load("sampled", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "flip_gb1_splits.zip", "w") as file:
        file.writestr("splits/sampled.csv", text)
    found = [sequences.load("sampled", str(tmp_path))]
    with pytest.raises(ValueError, match="holds no splits/one_vs_rest.csv"):
        sequences.load("one_vs_rest", str(tmp_path))
    os.replace(tmp_path / "flip_gb1_splits.zip", tmp_path / "splits.zip")  # FLIP's own name for it
    found.append(sequences.load("sampled", str(tmp_path), quiet=False))
    assert "splits.zip is not the file that the figures in README.md were made from" in capsys.readouterr().out
    (tmp_path / "splits.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="truncated"):
        sequences.load("sampled", str(tmp_path))
    for path in (tmp_path / "splits" / "sampled.csv", tmp_path / "sampled.csv"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        found.append(sequences.load("sampled", str(tmp_path)))
        path.unlink()
    for split in found:
        assert split.sequences == ["MA", "ML", "MW"] and split.targets.tolist() == [1, 2, 3] and split[2:] == (1, 2)


def test_proteins_smoke(tmp_path, capsys):
    """With no flags, a landscape that is known: an interaction between neighbours that ridge regression cannot
    see, seq_cnn does; one line of runs.jsonl, and what to pass for the real thing."""
    result = train_protein.main(["--out", str(tmp_path), "--kernel", "seq_fc"])
    assert "--split two_vs_rest --data DIR" in capsys.readouterr().out
    assert result["test_spearman"] > 0.99 and result["test_rmse"] < 0.1 and result["cg_converged"]
    assert json.loads((tmp_path / "runs.jsonl").read_text()) == result
    assert len(result["compared"]) == len(sequences.ENCODINGS) * len(sequences.TARGETS)
    linear = protein(tmp_path, "--kernel", "linear", "--encoding", "onehot", "--target", "raw")
    assert abs(linear["test_rmse"]**2 - (1 - sequences.MADE_LINEAR)) < 0.1


@needs_gb1
@pytest.mark.parametrize("split, published", [("one_vs_rest", 0.28), ("two_vs_rest", 0.59), ("three_vs_rest", 0.76),
                                              ("low_vs_high", 0.34)])
def test_proteins_ridge_is_scikit_learn(tmp_path, split, published):
    """Ridge regression by this solver, with an intercept by centring, is scikit-learn's on one-hot, test rows'
    RMSE to 1e-4, and has the published Spearman's correlation to two digits: the check of data and metric."""
    from sklearn.linear_model import Ridge
    result = protein(tmp_path, "--split", split, "--data", GB1, "--kernel", "linear", "--encoding", "centred",
                     "--target", "raw", "--ridge", "1")
    sequences, y, _, n = sequences.load(split, GB1)
    x = sequences.encode(sequences, "onehot", n).reshape(len(y), -1).astype(np.float64)
    f = Ridge(alpha=1.0).fit(x[:n], y[:n]).predict(x[n:])
    assert round(result["test_spearman"], 2) == published == round(spearmanr(f, y[n:]).statistic, 2)
    assert abs(result["test_rmse"] - np.sqrt(np.mean((f - y[n:])**2))) < 1e-4


def test_proteins_is_a_dense_solve(tmp_path):
    """Choices and predictions are those of dense float64 formulas: with --select validation, validation rows are the
    last fifth of the training rows, functions of the target are fitted on the others, then all are fitted."""
    result = protein(tmp_path, "--n_train", "100", "--encoding", "onehot", "--ridge", "0.1,0.001", "--depth", "1",
                     "--kind", "ntk", "--tol", "1e-9", "--select", "validation")
    sequences, y, *_ = sequences.load("made")
    x, n_train = sequences.encode(sequences, "onehot", 100).astype(np.float64), sequences.load("made").n_train
    K = np.asarray(kernel.kernel_fn("seq_cnn", "ntk", depth=1)(x, x[:100]))

    def solve(n, target, ridge):
        forward, _ = sequences.transform(target, y[:n])
        A = K[:n, :n] + ridge * np.diag(K[:n, :n]).mean() * np.eye(n)
        return K[:, :n] @ np.linalg.solve(A, forward(y[:n])), forward(y)
    best = []
    for row, target in zip(result["compared"], sequences.TARGETS):
        tried = [(np.mean((f - z)[80:100]**2), ridge, spearmanr(f[80:100], y[80:100]).statistic)
                 for ridge in (0.1, 0.001) for f, z in [solve(80, target, ridge)]]
        mse, ridge, correlation = min(tried)
        assert row[:2] == [{"target": target}, ridge] and np.allclose(row[2:], [correlation, mse], rtol=0.02)
        best.append((correlation, target))
    target = max(best)[1]
    assert result["config"]["target"] == target
    f = solve(100, target, result["ridge"])[0][n_train:]
    assert abs(result["test_spearman"] - spearmanr(f, y[n_train:]).statistic) < 1e-4
    inverse = sequences.transform(target, y[:100])[1]
    assert abs(result["test_rmse"] - np.sqrt(np.mean((inverse(f) - y[n_train:])**2))) < 1e-4


def refitted(K, z, ridge):
    """The prediction of each row of z (n, c) by the regression on the n - 1 other rows: n dense solves."""
    A, others = K + ridge * np.diag(K).mean() * np.eye(len(K)), ~np.eye(len(K), dtype=bool)
    return np.array([K[i, rest] @ np.linalg.solve(A[np.ix_(rest, rest)], z[rest]) for i, rest in enumerate(others)])


@pytest.mark.parametrize("most", [train_protein.COMPARED, 20])
def test_proteins_leave_one_out_is_refits(tmp_path, monkeypatch, most):
    """By n refits in float64: encoding, target, depth and b_std have the best Spearman correlation of leave-one-out
    predictions, each at the ridge with the least mse; of 40 rows where 20 may be compared, on every second one. Then
    the ridge is chosen in the same way on all rows."""
    monkeypatch.setattr(train_protein, "COMPARED", most)
    result = protein(tmp_path, "--n_train", "40", "--kernel", "seq_fc", "--depth", "1,2", "--b_std", "0,1", "--ridge",
                     "0.1,0.01")
    sequences, y, *_ = sequences.load("made")

    fn = functools.cache(lambda **network: kernel.kernel_fn("seq_fc", "nngp", **network))

    def best(depth, b_std, encoding, target, rows):
        x, y_rows = sequences.encode(sequences, encoding, 40)[rows].astype(np.float64), y[rows]
        K, z = np.asarray(fn(depth=depth, b_std=b_std)(x)), sequences.transform(target, y_rows)[0](y_rows)
        found = [(ridge, refitted(K, z, ridge)) for ridge in (0.1, 0.01)]
        return min(([ridge, spearmanr(f, y_rows).statistic, np.mean((f - z) ** 2)] for ridge, f in found),
                   key=lambda row: row[2])
    settings = [(depth, b_std, encoding, target) for depth in (1, 2) for b_std in (0.0, 1.0)
                for encoding in sequences.ENCODINGS for target in sequences.TARGETS]
    table = [best(*one, np.arange(0, 40, 2 if most == 20 else 1)) for one in settings]
    assert [list(row[0].values()) for row in result["compared"]] == list(map(list, settings))
    assert np.allclose([row[1:] for row in result["compared"]], table, rtol=1e-4)
    chosen = settings[max(range(len(table)), key=lambda i: table[i][1])]
    assert tuple(result["config"][flag] for flag in ("depth", "b_std", "encoding", "target")) == chosen
    whole = best(*chosen, np.arange(40))
    assert np.allclose([result[key] for key in ("ridge", "loo_score", "loo_mse")], whole, rtol=1e-4)
    assert result["select"] == "loo" and result["cg_converged"]


def test_proteins_networks_are_compared(tmp_path):
    """Each flag of the network takes several values: the run is that with the chosen values alone, which are recorded;
    each has its row of the table; linear has no such flag."""
    flags = ["--n_train", "60", "--encoding", "onehot", "--target", "raw", "--kernel", "seq_cnn"]
    several = protein(tmp_path, *flags, "--w_std", "1,2", "--b_std", "0.5", "--head", "linear,exp", "--gamma", "1,2")
    assert [row[0] for row in several["compared"]] == [{"w_std": w_std, "head": head, "gamma": gamma} for w_std in (
        1.0, 2.0) for head, gamma in (("linear", None), ("exp", 1.0), ("exp", 2.0))]
    best = max(several["compared"], key=lambda row: row[2])
    assert best[0].items() <= several["config"].items() and best[2] > min(row[2] for row in several["compared"])
    alone = protein(tmp_path, *flags, "--b_std", "0.5",
                    *(f"--{flag}={value}" for flag, value in best[0].items() if value))
    assert alone["compared"] == [] and alone["config"] == several["config"] and alone["search"] == several["search"]
    assert alone["test_spearman"] == several["test_spearman"] and alone["loo_score"] == best[2]


@pytest.mark.parametrize("select", ["loo", "validation"])
def test_proteins_never_looks_at_test_rows(tmp_path, monkeypatch, select):
    """Other or permuted targets in the test rows change nothing but the test results: the same encoding, target, depth,
    w_std and ridge."""
    flags = ["--n_train", "60", "--kernel", "seq_fc", "--depth", "1,2", "--w_std", "1,2", "--b_std", "1", "--select",
             select, "--ridge", "1,0.1,0.01"]
    first, load = protein(tmp_path, *flags), sequences.load
    for change in (np.negative, np.random.default_rng(0).permutation):
        def other(*args):
            split = load(*args)
            split.targets[split.n_train:] = change(split.targets[split.n_train:])
            return split
        monkeypatch.setattr(proteins, "load", other)
        second = protein(tmp_path, *flags)
        assert all(first[key] == second[key] for key in ("compared", "ridge", "search", "config", "loo_score"))
        assert (abs(first["test_spearman"] + second["test_spearman"]) < 1e-9) == (change is np.negative)
        assert abs(first["test_spearman"] - second["test_spearman"]) > 0.1


def test_proteins_criteria(tmp_path, monkeypatch):
    """Without --select: leave-one-out up to choose.DENSE rows, beyond them validation; a set of 4 rows is solved, and one
    of FLIP's form that names no validation rows; GCV chooses a ridge where there is nothing else to choose."""
    one = ["--kernel", "seq_fc", "--encoding", "onehot", "--target", "raw"]
    assert protein(tmp_path, *one, "--n_train", "4")["select"] == "loo"
    gcv, loo = (protein(tmp_path, *one, "--n_train", "100", "--select", select) for select in ("gcv", "loo"))
    assert gcv["select"] == "gcv" and 0.1 < gcv["ridge"] / loo["ridge"] < 10 and gcv["search"][0][1] is None
    monkeypatch.setattr(choose, "DENSE", 50)
    sizes = protein(tmp_path, *one, "--sizes", "50,60")
    assert [sizes[n]["select"] for n in (50, 60)] == ["loo", "validation"] and "loo_score" not in sizes[60]
    rows = [f"M{'ACDEF'[i // 5]}{'GHIKL'[i % 5]},{i % 7},{'train' if i % 5 else 'test'}," for i in range(25)]
    (tmp_path / "two_vs_rest.csv").write_text("\n".join(["sequence,target,set,validation", *rows]))
    flags = ["--split", "two_vs_rest", "--data", str(tmp_path), "--kernel", "seq_fc"]
    assert protein(tmp_path, *flags)["rows"] == 20
    with pytest.raises(ValueError, match="two_vs_rest with n_train=20 has no validation rows .* use --select loo"):
        protein(tmp_path, *flags, "--select", "validation")


def test_proteins_stores_know_their_network(tmp_path):
    """A store never serves tiles of another network: another w_std, b_std or head is refused in one sentence."""
    flags = ["--n_train", "20", "--encoding", "onehot", "--target", "raw", "--kernel", "seq_fc", "--ridge", "0.1",
             "--store", str(tmp_path / "K")]
    protein(tmp_path, *flags)
    for other in ("--w_std=1", "--b_std=1", "--head=relu"):
        with pytest.raises(ValueError, match="train-nngp holds another matrix: layers is .* Give this run a store"):
            protein(tmp_path, *flags, other)
    assert protein(tmp_path, *flags)["cg_converged"]


def test_proteins_sizes_store_and_kinds(tmp_path):
    """A size is its own run, on blocks of one kernel; tiles that are kept, or none, or both kinds in one pass give
    the same; and the sizes are a curve that scaling.py fits and draws."""
    flags = ["--encoding", "onehot", "--target", "raw", "--kernel", "seq_fc", "--tile", "32", "--n_test", "120"]
    sizes = protein(tmp_path, *flags, "--sizes", "25,50,100", "--kind", "both", "--store", str(tmp_path / "K"))
    for kind, n, kept in (("nngp", 100, []), ("ntk", 100, ["--store", str(tmp_path / "K")]),
                          ("ntk", 50, ["--store", "none"])):
        alone = protein(tmp_path / "alone", *flags, "--n_train", str(n), "--kind", kind, *kept)
        assert alone["config"] == sizes[kind][n]["config"] and alone["ridge"] == sizes[kind][n]["ridge"]
        assert abs(alone["test_rmse"] - sizes[kind][n]["test_rmse"]) < 1e-5
    path = tmp_path / "curve.png"
    assert report.main(["--runs", str(tmp_path / "runs.jsonl"), "--dataset", "made", "--figure", str(path)]) == 0
    curve = report.curves(report.load(tmp_path / "runs.jsonl"), "made")
    assert [points[100] for points in curve.values()] == [[1 - sizes[kind][100]["test_spearman"]]
                                                          for kind in kernel.KINDS]


def test_proteins_variance(tmp_path):
    """Mean and variance are those of a dense Gaussian process, and calibration is its formulas'."""
    result = protein(tmp_path, "--n_train", "60", "--n_test", "30", "--encoding", "blosum", "--target", "raw",
                     "--ridge", "0.1", "--kernel", "seq_fc", "--variance", "--tol", "1e-9")
    sequences, y, _, n_train = sequences.load("made")
    x = sequences.encode(sequences, "blosum", 60).astype(np.float64)
    rows = np.r_[:60, n_train:n_train + 30]
    K, z = np.asarray(kernel.kernel_fn("seq_fc", "nngp")(x[rows])), sequences.transform("raw", y[:60])[0](y[rows])
    noise = 0.1 * np.diag(K)[:60].mean()
    solved = np.linalg.solve(K[:60, :60] + noise * np.eye(60), K[:60])
    f, scale = solved[:, 60:].T @ z[:60], z[:60] @ np.linalg.solve(K[:60, :60] + noise * np.eye(60), z[:60]) / 60
    sd = np.sqrt(scale * (np.diag(K) + noise - (K[:60] * solved).sum(axis=0))[60:])
    assert abs(result["test_gaussian_nll"] + norm.logpdf(z[60:], f, sd).mean()) < 1e-3
    for p in (50, 90):
        low, high = norm.interval(p / 100, f, sd)
        assert abs(result[f"test_coverage_{p}"] - np.mean((low <= z[60:]) & (z[60:] <= high))) < 0.04
    assert abs(result["test_sd_spearman"] - spearmanr(sd, np.abs(f - z[60:])).statistic) < 0.01


@pytest.mark.parametrize("flags, words", [
    (["--split", "two_vs_rest"], "needs --data FOLDER, the folder that holds flip_gb1_splits.zip"),
    (["--split", "landscape", "--data", "nowhere"], "nowhere.*is there; fetch it from https"),
    (["--n_train", "2000"], "n_train=2000, but made has 2 to 1037 rows"),
    (["--devices", "5"], "--devices 5, but JAX sees 4 here"),
    (["--n_test", "300"], "n_test=300, but made has 2 to 259 rows"),
    (["--n_train", "4", "--select", "validation"], "n_train=4 has no validation rows to choose on; use --select loo"),
    (["--n_train", "4", "--select", "validation", "--encoding", "onehot", "--target", "raw"],
     "n_train=4 has no validation rows to choose on; use --select loo"),
    (["--head", "cos"], "head='cos', gamma=1.0: expected one of linear, cosine, relu, exp"),
    (["--w_std", "0"], "w_std=0.0, b_std=0.0: expected w_std > 0"),
])
def test_proteins_errors(flags, words, tmp_path):
    """What does not fit is one sentence."""
    with pytest.raises((ValueError, OSError), match=words) as error:
        protein(tmp_path, *flags)
    assert "\n" not in str(error.value)


def test_proteins_commands(capsys):
    """The commands of the docstring are understood, and what contradicts is refused at once."""
    shown = re.findall(r"python train_protein.py (--.*?)(?:  .*)?$", train_protein.__doc__, re.M)
    assert len(shown) >= 4
    for command in shown:
        train_protein.parse(experiment.split())
    for flags, words in ((["--ridge", "often"], "--ridge often: expected a number"),
                         (["--ridge", "-1"], "numbers >= 0"), (["--kind", "ntk", "--variance"], "use --kind nngp"),
                         (["--tile", "0"], "at least 1"), (["--depth", "3,0"], "at least 1"),
                         (["--w_std", "1,big"], "--w_std 1,big: expected a number, or several"),
                         (["--kernel", "linear", "--b_std", "0"], "--b_std with --kernel linear"),
                         (["--kernel", "linear", "--dep=3"], "--depth with --kernel linear"),
                         (["--select", "gcv"], "use --select loo or validation"),
                         (["--select", "gcv", "--encoding", "onehot", "--target", "raw", "--depth", "1,2"],
                          "use --select loo or validation"),
                         (["--n_train", "20", "--sizes", "10,50"], "expected 1 to n_train=20"),
                         (["--split", "sampled", "--sizes", "9"], "FLIP says which rows to train on")):
        with pytest.raises(SystemExit):
            train_protein.parse(flags)
        assert words in capsys.readouterr().err
# ---------------------------------------------------------------------------------------- graphs

def random_graph(rng, n, nodes, features=3, degree=7):
    """A graph of n nodes as kernel.py wants it, padded to `nodes`: each listens to up to `degree` of them."""
    x = np.zeros((nodes, features + 2 * degree))
    x[:n, :features] = rng.normal(size=(n, features))
    for row in x[:n]:
        some = rng.choice(n, size=rng.integers(1, min(n, degree) + 1), replace=False)
        row[features:features + len(some)] = some
        row[features + degree:features + degree + len(some)] = rng.uniform(0.2, 1, size=len(some))
    return x


def dense_graphs(layers, x1, x2):
    """NNGP and NTK of two graphs without padding, by the formulas, with NumPy's arccos."""
    degree, f = layers[0][1], x1.shape[1] - 2 * layers[0][1]
    A1, A2 = np.zeros((len(x1),) * 2), np.zeros((len(x2),) * 2)
    for A, x in ((A1, x1), (A2, x2)):
        for p, row in enumerate(x):
            for number, weight in zip(row[f:f + degree].astype(int), row[f + degree:]):
                A[p, number] += weight
    state = {"12": (x1, x2, A1, A2), "11": (x1, x1, A1, A1), "22": (x2, x2, A2, A2)}
    K = {key: x[:, :f] @ y[:, :f].T / f for key, (x, y, _, _) in state.items()}
    T, kept = np.zeros_like(K["12"]), []
    for layer in layers:
        if layer[0] == "aggregate":
            K, T = {key: state[key][2] @ K[key] @ state[key][3].T for key in K}, A1 @ T @ A2.T
        elif layer[0] == "dense":
            K = {key: layer[1]**2 * k + layer[2]**2 for key, k in K.items()}
            T = K["12"] + layer[1]**2 * T
        elif layer[0] == "relu":
            sd = {key: np.sqrt(np.diag(K[key])) for key in ("11", "22")}
            scale = {key: np.outer(sd[key[0] * 2], sd[key[1] * 2]) for key in K}
            cosine = {key: np.clip(K[key] / scale[key], -1, 1) for key in K}
            T = T * (np.pi - np.arccos(cosine["12"])) / (2 * np.pi)
            K = {key: scale[key] / (2 * np.pi) * (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c)
                 for key, c in cosine.items()}
        elif layer[0] == "jump":
            kept.append((K["12"], T))
        else:
            pool = np.sum if layer[0] == "sum" else np.mean
            K, T = {"12": sum(pool(k) for k, _ in [*kept, (K["12"], T)])}, sum(pool(t) for _, t in [*kept, (0, T)])
    return K["12"], T


@pytest.mark.parametrize("options", [{"hidden": 2}, {"pool": "mean", "w_std": 1.2, "b_std": 0.3}], ids=str)
def test_graphs_are_neural_tangents(options):
    """K and T are neural_tangents' of the graphs without padding to 1e-10 in float64: graphs of different sizes,
    one node too, and directed edges with any weight."""
    rng, layers = np.random.default_rng(0), graph_layers.gcn(7, 2, **options)
    sizes = (1, 6), (4, 9)
    x1, x2 = (np.stack([random_graph(rng, n, 11) for n in of for _ in range(2)]) for of in sizes)
    exact = kernel.kernel_fn(layers, kernel.KINDS)(x1, x2)
    for i, p in enumerate(sizes[0]):
        for j, q in enumerate(sizes[1]):
            block = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
            expected = reference(layers, kernel.KINDS, x1[block[0], :p], x2[block[1], :q])
            assert all(relative_error(K[block], want) < 1e-10 for K, want in zip(exact, expected))


@pytest.mark.parametrize("side, options", [
    (16, {}), (16, {"pool": "mean", "w_std": 1.2, "b_std": 0.3}), (16, {"jump": True}), (32, {"jump": True})], ids=str)
def test_graphs_are_the_formula(side, options, monkeypatch):
    """graphs.py, in bins of 32 nodes and 3 graphs, is the dense formula in NumPy, and kernel.py is where all rounds
    are pooled: to 1e-10 in float64 and 1e-5 in float32. side: in blocks of a bin, as on a CPU, and whole, as on a
    GPU."""
    for what, number in (("OWN", 32), ("SIDE", side), ("STRIPE", side)):
        monkeypatch.setitem(getattr(graphs, what), "cpu", number)
    monkeypatch.setattr(graphs, "NODES", 32)
    monkeypatch.setattr(graphs, "GRAPHS", 3)
    rng, layers, sizes = np.random.default_rng(0), graph_layers.gcn(7, 2, **options), (1, 20, 3, 2, 1, 9, 17, 16, 12, 1, 1)
    x = np.stack([random_graph(rng, n, 20) for n in sizes])
    expected = np.moveaxis([[dense_graphs(layers, a[:n], b[:m]) for m, b in zip(sizes[4:], x[4:])]
                            for n, a in zip(sizes, x[:4])], -1, 0)
    runs = [(graphs.kernel_fn, float, 1e-10), (graphs.kernel_fn, np.float32, 1e-5)]
    for fn, dtype, tolerance in runs + [(kernel.kernel_fn, float, 1e-10)] * ("jump" in options):
        for K, want in zip(fn(layers, kernel.KINDS)(x[:4].astype(dtype), x[4:].astype(dtype)), expected):
            assert K.dtype == dtype and relative_error(K, want) < tolerance


def ring_of_trees(rng, n, nodes, kinds=2, degree=4):
    """A ring of n nodes of a few kinds, some with a leaf: many have the same surroundings."""
    lists = [[i, (i - 1) % n, (i + 1) % n] for i in range(n)]
    for i in rng.choice(n, size=n // 6, replace=False):
        lists.append([len(lists), i])
        lists[i].append(len(lists) - 1)
    x = np.zeros((nodes, kinds + 2 * degree), np.float32)
    for row, kind, one in zip(x, (rng.random(len(lists)) < 0.1).astype(int), lists):
        row[kind] = 1
        row[kinds:kinds + len(one)] = rng.permutation(one)
        row[kinds + degree:kinds + degree + len(one)] = 0.5
    return x


def surroundings(x, kinds, degree, steps):
    """Of every node of a graph what it sees in so many steps, in nested tuples."""
    seen = [tuple(row[:kinds]) for row in x]
    for _ in range(steps):
        seen = [tuple(sorted((seen[int(q)], w) for q, w in zip(row[kinds:kinds + degree], row[kinds + degree:]) if w))
                for row in x]
    return seen


@pytest.mark.parametrize("collide", [False, True])
def test_graphs_nodes_that_look_alike(collide, monkeypatch):
    """The classes of a bin are the different surroundings of its nodes after one, two and three rounds, far fewer than
    nodes, whatever order neighbours are named in; where every hash is the same there are more of them, and K is the
    same: kernel.py's to 1e-6."""
    if collide:
        monkeypatch.setattr(graphs, "hashed", lambda rows: jnp.zeros(len(rows), jnp.uint32))
    rng, layers = np.random.default_rng(0), graph_layers.gcn(4)
    x = np.stack([ring_of_trees(rng, n, 30) for n in rng.integers(12, 21, size=16)])
    degree, rounds, pool, _ = graphs.parse(layers)
    N = 30 * 16
    every, _, _, count = graphs.bins(jnp.asarray(x), 8, rounds, degree, pool, N, N)
    assert count == 2
    for i, half in enumerate((x[:8], x[8:])):
        found = np.asarray(every.counts[i]) - 1  # one class is that of the rows without a node
        nodes = [graph[graph.any(axis=1)] for graph in half]
        want = [len({one for graph in nodes for one in surroundings(graph, 2, 4, k)}) for k in (1, 2, 3)]
        assert (found >= want).all() and (collide and found[2] > want[2] or (found == want).all())
        assert want[2] < 0.8 * np.count_nonzero(half.any(axis=2))
    for K, want in zip(graphs.kernel_fn(layers, kernel.KINDS)(x[:8], x[8:]),
                       kernel.kernel_fn(layers, kernel.KINDS)(x[:8], x[8:])):
        assert relative_error(K, np.asarray(want, np.float64)) < 1e-6


def test_graphs_symmetry_and_tiles():
    """fn(x) is fn(x, x), symmetric to the last bit; tiles of any side are parts of it, also of Graphs, which are
    padded only when read; and what `take` takes is what is there."""
    rng = np.random.default_rng(0)
    x = np.stack([random_graph(rng, n, 9) for n in rng.integers(1, 10, size=13)]).astype(np.float32)
    fn = graphs.kernel_fn(graph_layers.gcn(7, 2), "nngp")
    K = np.asarray(fn(x))
    assert (K == K.T).all() and relative_error(K, np.asarray(fn(x, x), np.float64)) < 1e-6
    lengths = (x != 0).any(axis=2).sum(axis=1)
    kept = smiles.Graphs(np.concatenate([one[:n] for one, n in zip(x, lengths)]),
                            np.concatenate([[0], np.cumsum(lengths)]), 7, 9)
    assert (kept[np.arange(13)] == x).all() and (kept.take([4, 4, 2])[np.arange(3)] == x[[4, 4, 2]]).all()
    tiled = tiles.gram(fn, kept, 5, quiet=True)
    assert relative_error(tiled.dense(), K.astype(np.float64)) < 1e-6


@pytest.mark.parametrize("call, words", [
    (lambda: graph_layers.gcn(0), "degree=0, depth=3, hidden=1, pool='sum': expected three positive"),
    (lambda: graph_layers.gcn(4, pool="max"), "pool='max': expected .* sum or mean"),
    (lambda: graphs.kernel_fn(graph_layers.gcn(4), "ntk")(np.ones((2, 3, 8))), r"\(2, 3, 8\).*features \+ 2 degree"),
    (lambda: kernel.kernel_fn(graph_layers.gcn(4), "ntk")(np.ones((3, 9))), r"\(3, 9\).*graphs \(n, nodes, features"),
    (lambda: graphs.kernel_fn(graph_layers.gcn(4), "ntk")(np.ones((2, 3, 9)), np.ones((2, 4, 9))), "must agree"),
    (lambda: graphs.kernel_fn(kernel.network("fc"), "ntk"), "graphs.py takes .*take kernel.kernel_fn"),
    (lambda: graphs.kernel_fn(graph_layers.gcn(4) + [("relu",), ("dense", 1.0, 0.0)], "ntk"), "take kernel.kernel_fn"),
    (lambda: graphs.kernel_fn(graph_layers.gcn(4), "gp"), "'gp' is unknown; choose nngp or ntk"),
])
def test_graphs_errors(call, words):
    """What does not fit is refused in one sentence."""
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- molecules

ODD = ("C", "[Na+].[Cl-]", "CCO", "c1ccccc1C(=O)O", "FS(F)(F)(F)(F)F", "C[C@H](N)C(=O)O", "CC(C)(C)c1ccc2ncccc2c1",
       "[CH]12[CH]3[CH]4[CH]5[CH]1[Fe]23451678[CH]2[CH]1[CH]6[CH]7[CH]28")  # an atom alone; 6 and 10 neighbours


@needs_rdkit
def test_molecules_are_neural_tangents():
    """On real molecules of 1 to 14 atoms, an isolated atom, a salt, and a metal with ten neighbours among them,
    float32 is neural_tangents in float64 to 1e-5, and the formula on every pair; padded, and with their atoms
    numbered otherwise."""
    from rdkit import Chem
    mols, rng = [smiles.read(one) for one in ODD], np.random.default_rng(0)
    mols += [Chem.RenumberAtoms(mol, rng.permutation(mol.GetNumAtoms()).tolist()) for mol in mols]
    x = smiles.graphs(mols, least=23)
    layers, packed, sizes = graph_layers.gcn(x.degree, 2), x[np.arange(len(mols))], np.diff(x.starts)
    assert x.degree == 11 and sizes.min() == 1 and sizes.max() >= 11 and packed.shape[1] == 23
    fast = [np.asarray(K) for K in graphs.kernel_fn(layers, kernel.KINDS)(packed, packed)]
    exact, n = [one[:size].astype(np.float64) for one, size in zip(packed, sizes)], len(ODD)
    for pair in np.ndindex(n, n):
        for K, want in zip(fast, dense_graphs(layers, *(exact[i] for i in pair))):
            copies = K.reshape(2, n, 2, n)[:, pair[0], :, pair[1]]
            assert relative_error(copies, want) < 1e-5, (pair, copies, want)
    for pair in ((0, 3), (7, 2)):
        for K, want in zip(fast, reference(layers, kernel.KINDS, *(exact[i][None] for i in pair))):
            assert relative_error(K[pair], want[0, 0]) < 1e-5


@needs_rdkit
def test_molecules_graph_of_one():
    """Ethanol by hand: its atoms' features, and the three kinds of weights; a carbonyl's with orders of bonds."""
    mol = smiles.read("CCO")
    x = smiles.graphs([mol])
    features = x.atoms[:, :-2 * x.degree]
    assert x.degree == 3 and (features.sum(axis=1) == 6).all()
    assert (features[0] == features[1]).sum() < features.shape[1] and features[2, 2] == 1  # oxygen
    A = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1.0]])
    for weights, mol, A in (("sum", mol, A), ("normal", mol, A), ("order", smiles.read("C=O"), [[1, 2], [2, 1]])):
        A = np.array(A, float)
        x = smiles.graphs([mol], weights)
        got = np.asarray(graph_layers.adjacency(jnp.asarray(x[:1])[0][:, None], x.degree))
        root = np.sqrt(A.sum(axis=1))
        assert np.allclose(got, A if weights == "sum" else A / np.outer(root, root), atol=1e-7)


@needs_rdkit
@pytest.mark.parametrize("name", smiles.FINGERPRINTS)
def test_molecules_fingerprints(name):
    """log(1 + counts) of RDKit's patterns, of all and no others; where there are counts there are bits. Several
    stand one after the other, each of norm 1, or zero where a molecule has no such pattern."""
    from rdkit.Chem import rdFingerprintGenerator
    mols = [smiles.read(one) for one in (*ODD, "CCO")]
    x, make = smiles.fingerprints(mols, [name], bits=512), {
        "morgan": rdFingerprintGenerator.GetMorganGenerator, "pairs": rdFingerprintGenerator.GetAtomPairGenerator,
        "torsions": rdFingerprintGenerator.GetTopologicalTorsionGenerator}[name](fpSize=512, **(
            {"radius": 2} if name == "morgan" else {}))
    for row, mol in zip(x, mols):
        counts = make.GetCountFingerprint(mol).GetNonzeroElements()
        assert set(np.flatnonzero(row)) == set(counts)
        assert np.allclose(np.exp(row[list(counts)]) - 1, list(counts.values()))
        assert name != "morgan" or set(counts) == set(make.GetFingerprint(mol).GetOnBits())
    other = "pairs" if name != "pairs" else "torsions"
    both = smiles.fingerprints(mols, [other, name], bits=512)[:, 512:]
    assert np.allclose(both * np.linalg.norm(x, axis=1, keepdims=True), x, atol=1e-6)
    assert np.allclose(np.linalg.norm(both, axis=1), x.any(axis=1)) and x[-1].any() == (name != "torsions")


def write_csv(path, head, lines):
    with (gzip.open if str(path).endswith(".gz") else open)(path, "wt") as file:
        file.write("\n".join([head, *lines]) + "\n")


@pytest.fixture
def molecule_folder(tmp_path):
    """The files of every data set, small, in one folder: 30 alkanes, alcohols and amines; two labels."""
    smiles = [f"C{'C' * (i // 3)}{('', 'O', 'N')[i % 3]}" for i in range(30)]
    write_csv(tmp_path / "delaney-processed.csv", "Compound ID,measured log solubility in mols per litre,smiles",
              [f"x,{i / 7:.3f},{one}" for i, one in enumerate(smiles)])
    write_csv(tmp_path / "HIV.csv", "smiles,activity,HIV_active", [
        f"{one},CI,{i % 2}" for i, one in enumerate(smiles)])
    np.savez(tmp_path / "ogbg-molhiv_scaffold_split.npz", train=np.arange(20), val=np.arange(20, 25),
             test=np.arange(25, 30))
    labels = [(f"{i % 2}" if i % 3 else "", f"{i // 2 % 2}" if i % 5 else "") for i in range(30)]
    write_csv(tmp_path / "muv.csv.gz", "A,B,mol_id,smiles", [
        f"{a},{b},id{i},{one}" for i, ((a, b), one) in enumerate(zip(labels, smiles))])
    for folder in ("mapping", "split/scaffold"):
        os.makedirs(tmp_path / "pcba" / folder)
    write_csv(tmp_path / "pcba" / "mapping" / "mol.csv.gz", "task_1,task_2,smiles,mol_id", [
        f"{a},{b},{one},id" for (a, b), one in zip(labels, smiles)])
    for part, (first, last) in {"train": (0, 20), "valid": (20, 25), "test": (25, 30)}.items():
        write_csv(tmp_path / "pcba" / "split" / "scaffold" / f"{part}.csv.gz", str(first),
                  map(str, range(first + 1, last)))
    return tmp_path


@needs_rdkit
def test_molecules_files(molecule_folder):
    """Every data set is read from files of its format: targets, missing labels as NaN, the official split."""
    esol, hiv, muv = (smiles.load(name, molecule_folder) for name in ("esol", "molhiv", "muv"))
    pcba, ogb = (smiles.load(name, molecule_folder / "pcba") for name in ("molpcba",) * 2)
    assert [len(rows.mols) for rows in (esol, hiv, muv, pcba, ogb)] == [30] * 5
    assert np.allclose(esol.y[:, 0], np.round(np.arange(30) / 7, 3)) and (hiv.y[:, 0] == np.arange(30) % 2).all()
    for rows in (muv, pcba):
        assert rows.y.shape == (30, 2) and (np.isnan(rows.y[:, 0]) == (np.arange(30) % 3 == 0)).all()
    for rows in (hiv, pcba):
        train, val, test = smiles.split(rows, "official", seed=1)
        assert (np.sort(train) == np.arange(20)).all() and (val == np.arange(20, 25)).all() and len(test) == 5
    assert muv.official is None and muv.tasks == ["A", "B"]


@needs_rdkit
def test_molecules_splits():
    """Random: disjoint, all, another for another seed. Scaffold: no ring system in two parts, the same each time;
    an aluminium complex, whose valence RDKit's scaffolds refuse, included."""
    rings = ["c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccc2ccccc2c1", "C1CCOC1", "c1ccsc1"]
    smiles = [ring + "C" * i for k, ring in enumerate(rings) for i in range(1, 9 - k)] + ["CCO", "CCN"]
    smiles.append("O=C1O[Al]23(OC1=O)(OC(=O)C(=O)O2)OC(=O)C(=O)O3")
    rows = smiles.checked(smiles, np.zeros((len(smiles), 1)), ["y"], None, "made")
    for how in ("random", "scaffold"):
        parts = smiles.split(rows, how, seed=0)
        assert (np.sort(np.concatenate(parts)) == np.arange(len(smiles))).all() and all(map(len, parts))
    for part, other in zip(parts, smiles.split(rows, "scaffold", seed=7)):
        assert set(part) == set(other)
    ring_of = [next((k for k, ring in enumerate(rings) if one.startswith(ring)), one[:2])
               for one in smiles]
    of_part = [{ring_of[i] for i in part} for part in parts]
    assert not (of_part[0] & of_part[1] or of_part[0] & of_part[2] or of_part[1] & of_part[2])
    with pytest.raises(ValueError, match="split 'official': this data set has random, scaffold$"):
        smiles.split(rows, "official")


@needs_rdkit
def test_molecules_bad_rows(molecule_folder, capsys):
    """What RDKit cannot read is named by its row and left out, of the split too; unusual valences are read."""
    path = molecule_folder / "HIV.csv"
    lines = path.read_text().splitlines()
    lines[1 + 3], lines[1 + 21], lines[1 + 26] = "C1CC,CI,1", ",CI,1", "CN(C)(C)(C)C,CI,0"
    path.write_text("\n".join(lines))
    rows = smiles.load("molhiv", molecule_folder)
    said = capsys.readouterr().out
    assert "2 of 30 rows left out, RDKit cannot read their SMILES: row 3 ('C1CC'), row 21 ('')" in said
    assert len(rows.mols) == 28 and 26 in rows.rows and [len(part) for part in rows.official] == [19, 4, 5]
    assert (rows.rows[rows.official[2]] == np.arange(25, 30)).all()


@needs_rdkit
@pytest.mark.parametrize("file, old, new, words", [
    ("delaney-processed.csv", "smiles", "structure", "has no column 'smiles', but Compound ID, measured"),
    ("delaney-processed.csv", "0.286", "soluble", r"row 2 \(from 0, after the header\): .*'soluble'.*a number"),
    ("HIV.csv", ",CI,1", ",CI,0", "HIV_active has the same value in every row"),
    ("ogbg-molhiv_scaffold_split.npz", None, None, "truncated or not an .npz archive"),
])
def test_molecules_damaged_files(molecule_folder, file, old, new, words):
    """What is wrong with a file is one sentence with its name, and the row where there is one."""
    path = molecule_folder / file
    path.write_bytes(b"nothing" if old is None else path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(ValueError, match=words) as error:
        smiles.load("esol" if file.startswith("del") else "molhiv", molecule_folder)
    assert file in str(error.value) and "\n" not in str(error.value)


@needs_rdkit
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"nothing",
                                    lambda content: content[:40] + b"damaged" + content[47:]])
def test_molecules_damaged_archives(molecule_folder, damage):
    """A packed file that is cut short, none, or altered is named in one sentence."""
    for name, folder, file in (("muv", molecule_folder, "muv.csv.gz"),
                               ("molpcba", molecule_folder / "pcba", "split/scaffold/train.csv.gz")):
        path = folder / file
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=f"{file} is truncated or not packed by gzip"):
            smiles.load(name, folder)


@needs_rdkit
@needs_molecules
def test_molecules_files_are_ours(capsys, molecule_folder):
    """A note says where a file is not the one that README's figures were made from."""
    tables = {"esol": ("delaney-processed.csv", ["measured log solubility in mols per litre"]),
              "molhiv": ("HIV.csv", ["HIV_active"]), "muv": ("muv.csv.gz", None)}
    assert set(tables) == set(smiles.SHA256)
    for name, (file, columns) in tables.items():
        for folder, notes in ((MOLECULES, 0), (molecule_folder, 1)):
            smiles.table(os.path.join(folder, file), columns, sha256=smiles.SHA256[name])
            assert capsys.readouterr().out.count("is not the file that the figures in README.md") == notes


def test_molecules_need_rdkit(monkeypatch):
    """Without RDKit: one sentence that says what to install."""
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ImportError, match="RDKit, which reads molecules, is not installed: pip install"):
        smiles.load("nci")


def test_molecules_tasks_are_dense_solves():
    """Tasks with labels of their own rows, solved together: each is the dense solution of its own system; its
    preconditioner is the inverse of the dense one, and spares steps."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(120, 4))
    dense = np.exp(-((z[:, None] - z) ** 2).sum(axis=2) / 4)
    K = tiles.gram(lambda a, b: jnp.exp(-((a[:, None] - b[None]) ** 2).sum(axis=2) / 4), z, 50, quiet=True)
    mask = rng.random((120, 3)) < [0.2, 0.6, 1.0]
    y = np.where(mask, rng.normal(size=(120, 3)), 0)
    low = pcg.low_rank(K, 40)
    look = missing.Look(low, mask)
    masked = missing.Labelled(K, mask)
    x, info = pcg.solve(masked.matvec, y, 1e-3, look(1e-3), 1e-10)
    assert info.converged and pcg.solve(masked.matvec, y, 1e-3, tol=1e-10)[1].iterations > 2 * info.iterations
    for t, rows in enumerate(mask.T):
        A = dense[np.ix_(rows, rows)] + 1e-3 * np.eye(rows.sum())
        assert np.allclose(x[rows, t], np.linalg.solve(A, y[rows, t]), rtol=1e-6, atol=1e-6) and not x[~rows, t].any()
        F = low.F[rows].astype(np.float64)
        P = F @ F.T + np.diag(low.outside[rows] + 1e-3)
        assert np.allclose(P @ look(1e-3)(y)[rows, t], y[rows, t], atol=1e-9)
    first = masked.leading(70)
    assert np.allclose(first.matvec(y[:70]), mask[:70] * (dense[:70, :70] @ y[:70]), atol=1e-5)
    assert look.leading(70)(1e-3)(y[:70]).shape == (70, 3)


def test_molecules_ridge_from_rows_outside():
    """Ridges are compared on rows outside of K as on the same rows of a larger K."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(100, 3)), rng.normal(size=(100, 2))
    K, part = tiles.gram(linear, z, 32, quiet=True), tiles.gram(linear, z[:80], 32, quiet=True)
    outside = tiles.cross(linear, z[80:], z[:80], 32, quiet=True), y[80:]
    ridges, seen = [1.0, 0.1, 0.01], []

    def score(f, rows):
        seen.append(rows)
        return np.mean(f)
    whole, part = (regression.Solver(one, "none", prior=np.ones(one.shape[0])) for one in (K, part))
    inside = choose.validation(whole, y, ridges, 80, np.arange(80, 100), score)
    apart = choose.validation(part, y[:80], ridges, 80, outside, score)
    assert np.allclose([row[:3] for row in inside], [row[:3] for row in apart], rtol=1e-6)
    assert all((rows == np.arange(80, 100)).all() for rows in seen[:3]) and seen[3:] == [None] * 3
    by_score = choose.best(apart, "score")
    assert by_score == max(apart, key=lambda row: row.score) and len({row.score for row in apart}) == 3


def train_molecules(tmp_path, *flags):
    return train_molecule.main([*flags, "--out", str(tmp_path), "--quiet"])


@needs_rdkit
@pytest.mark.parametrize("flags", [["--kernel", "sum", "--kind", "ntk", "--depth", "2", "--pool", "mean", "--b_std",
                                    "0,0.5", "--fingerprints", "morgan,pairs"],
                                   ["--depth", "1", "--jump", "--weights", "order", "--w_std", "1.2", "--b_std", "0.5"]],
                         ids=str)
def test_molecules_train_is_a_dense_solve(tmp_path, monkeypatch, flags):
    """With no file: molecules that come with RDKit; predictions are those of a dense float64 solve with kernel.py,
    at the ridge, and of two at the b_std, that is best on the validation rows. One line of runs.jsonl with all there is
    to know."""
    monkeypatch.setattr(train_molecule, "FEW", 60)
    result = train_molecules(tmp_path, *flags, "--ridge", "0.1,1e-3,1e-5")
    assert json.loads((tmp_path / "runs.jsonl").read_text()) == result and result["cg_converged"]
    rows = smiles.load("nci", limit=60)
    parts = smiles.split(rows)
    mols, y = [rows.mols[i] for i in np.concatenate(parts)], [rows.y[part] for part in parts]
    config, n, m, scores = result["config"], len(parts[0]), len(parts[1]), {}
    x, prints = smiles.graphs(mols, config["weights"]), smiles.fingerprints(mols, config["fingerprints"])
    for b_std in [row[0]["b_std"] for row in result["compared"]] or [0.5]:
        network = {"depth": config["depth"], "w_std": config["w_std"], "b_std": b_std}
        fns = [(graph_layers.gcn(x.degree, pool=config["pool"], jump=config["jump"], **network), x[np.arange(60)])]
        fns += [(kernel.network("fc", **network), prints)] * (config["kernel"] == "sum")
        K = 0
        for layers, inputs in fns:
            one = np.asarray(kernel.kernel_fn(layers, config["kind"])(inputs.astype(np.float64)))
            K = K + one / np.diag(one)[:n].mean()
        for ridge in (0.1, 1e-3, 1e-5):
            A = K[:n, :n] + ridge * np.diag(K)[:n].mean() * np.eye(n)
            f = y[0].mean() + K[n:, :n] @ np.linalg.solve(A, y[0] - y[0].mean())
            scores[b_std, ridge] = [np.sqrt(np.mean((part - label) ** 2)) for part, label in (
                (f[:m], y[1]), (f[m:], y[2]))]
    best = min(scores, key=lambda one: scores[one][0])
    assert (config["b_std"], result["ridge"]) == best
    assert abs(result["test_rmse"] / scores[best][1] - 1) < 1e-3


@needs_rdkit
def test_molecules_train_tasks(tmp_path, molecule_folder):
    """Missing labels, both kinds, two sizes, tiles on disk that are found again: the score is scikit-learn's
    average precision of each task's own dense solution."""
    flags = ["--dataset", "molpcba", "--data", str(molecule_folder / "pcba"), "--kernel", "fingerprint", "--depth",
             "1", "--ridge", "0.01", "--store", str(tmp_path / "K")]
    both = train_molecules(tmp_path, *flags, "--kind", "both", "--sizes", "10,20")
    assert set(both) == set(kernel.KINDS) and set(both["ntk"]) == {10, 20}
    result = train_molecules(tmp_path, *flags, "--kind", "nngp")
    assert result["test_ap"] == both["nngp"][20]["test_ap"] and result["tasks"] == 2
    rows = smiles.load("molpcba", str(molecule_folder / "pcba"))
    parts = smiles.split(rows, "official")
    x, (y, _, y_test) = smiles.fingerprints(rows.mols).astype(np.float64), (rows.y[part] for part in parts)
    K = np.asarray(kernel.kernel_fn("fc", "nngp", depth=1)(x))
    found = []
    for t in range(2):
        known, seen = ~np.isnan(y[:, t]), ~np.isnan(y_test[:, t])
        mine = parts[0][known]
        A = K[np.ix_(mine, mine)] + 0.01 * np.diag(K)[parts[0]].mean() * np.eye(len(mine))
        f = K[np.ix_(parts[2], mine)] @ np.linalg.solve(A, y[known, t] - y[known, t].mean())
        found.append(average_precision_score(y_test[seen, t], f[seen]))
    assert abs(result["test_ap"] - np.mean(found)) < 1e-6


@needs_rdkit
@pytest.mark.parametrize("dataset", ["esol", "molhiv"])
def test_molecules_leave_one_out_is_refits(tmp_path, molecule_folder, dataset):
    """With --select loo, depth, b_std and ridge are the best by n refits on the training rows in float64: numbers by
    squared error, classes by the area under the curve."""
    from sklearn.metrics import roc_auc_score
    result = train_molecules(tmp_path, "--dataset", dataset, "--data", str(molecule_folder), "--kernel", "fingerprint",
                             "--select", "loo", "--depth", "1,2", "--b_std", "0,1", "--ridge", "1,0.1,0.01")
    rows = smiles.load(dataset, str(molecule_folder))
    train = smiles.split(rows, "random" if dataset == "esol" else "official")[0]
    x, y = smiles.fingerprints([rows.mols[i] for i in train]).astype(np.float64), rows.y[train]
    table = []
    for depth, b_std in ((1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)):
        K = np.asarray(kernel.kernel_fn("fc", "nngp", depth=depth, b_std=b_std)(x))
        for ridge in (1.0, 0.1, 0.01):
            f = y.mean() + refitted(K, y - y.mean(), ridge)
            error = np.mean((f - y) ** 2)
            table.append([ridge, np.sqrt(error) if dataset == "esol" else roc_auc_score(y, f), error, depth, b_std])
    order = (lambda row: row[2]) if dataset == "esol" else (lambda row: -row[1])
    of_settings = [min(table[i:i + 3], key=order) for i in range(0, 12, 3)]
    assert [row[0] for row in result["compared"]] == [{"depth": row[3], "b_std": row[4]} for row in of_settings]
    assert np.allclose([row[1:] for row in result["compared"]], [row[:3] for row in of_settings], rtol=1e-4)
    best = min(of_settings, key=order)
    assert [result["config"][flag] for flag in ("depth", "b_std")] == best[3:] and result["select"] == "loo"
    assert np.allclose([result[key] for key in ("ridge", "loo_score", "loo_mse")], best[:3], rtol=1e-4)


@needs_rdkit
@pytest.mark.parametrize("select", choose.CRITERIA)
def test_molecules_networks_are_compared(tmp_path, monkeypatch, select):
    """Of several values of depth and b_std, the run is that with the best values by the criterion alone; each pair of
    values has its row, which is the best row of a run with it."""
    monkeypatch.setattr(train_molecule, "FEW", 100)
    flags = ["--kernel", "fingerprint", "--select", select, "--ridge", "1,0.01,1e-4", "--w_std", "1.2"]
    several = train_molecules(tmp_path, *flags, "--depth", "1,2", "--b_std", "0,0.5")
    alone = [train_molecules(tmp_path, *flags, *(f"--{flag}={value}" for flag, value in row[0].items()))
             for row in several["compared"]]
    assert len(alone) == 4 and several["config"]["w_std"] == 1.2
    for row, run in zip(several["compared"], alone):
        best = choose.best([choose.Row(*one) for one in run["search"]])
        assert row[1] == best.ridge and (row[2] is None) == (select == "gcv") and abs(row[3] / best.mse - 1) < 1e-3
    best = alone[min(range(4), key=lambda i: several["compared"][i][3])]
    assert best["config"] == several["config"] and best["test_rmse"] == several["test_rmse"]
    assert len({run["test_rmse"] for run in alone}) == 4


@needs_rdkit
@pytest.mark.parametrize("select", ["loo", "validation"])
def test_molecules_never_look_at_test_rows(tmp_path, molecule_folder, monkeypatch, select):
    """Permuted labels of the test rows, and with --select loo of the validation rows too, change nothing but the test
    score: the same depth, b_std and ridge."""
    flags = ["--dataset", "molhiv", "--data", str(molecule_folder), "--kernel", "fingerprint", "--select", select,
             "--depth", "1,2", "--b_std", "0,1", "--ridge", "1,0.1,0.01"]
    first, load = train_molecules(tmp_path, *flags), smiles.load

    def other(*args):
        rows = load(*args)
        for part in rows.official[1 + (select == "validation"):]:
            rows.y[part] = np.roll(rows.y[part], 1)
        return rows
    monkeypatch.setattr(molecules, "load", other)
    second = train_molecules(tmp_path, *flags)
    assert all(first[key] == second[key] for key in ("compared", "ridge", "search", "config", "loo_score"))
    assert first["test_auc"] != second["test_auc"]


@needs_rdkit
def test_molecules_stores_know_their_network(tmp_path, molecule_folder):
    """A store never serves tiles of another network: another w_std, b_std or depth is refused in one sentence."""
    flags = ["--dataset", "esol", "--data", str(molecule_folder), "--kernel", "fingerprint", "--ridge", "0.1",
             "--store", str(tmp_path / "K")]
    first = train_molecules(tmp_path, *flags)
    for other in ("--w_std=1", "--b_std=1", "--depth=2"):
        with pytest.raises(ValueError, match="train-fingerprint-nngp holds another matrix: layers is .* Give this run"):
            train_molecules(tmp_path, *flags, other)
    assert train_molecules(tmp_path, *flags)["test_rmse"] == first["test_rmse"]


@needs_rdkit
def test_molecules_criteria_that_do_not_fit(tmp_path, molecule_folder, capsys):
    """Leave-one-out and GCV with missing labels, and GCV of classes, are refused in one sentence that says what to use;
    the commands of the docstring are understood."""
    for select in ("loo", "gcv"):
        with pytest.raises((ValueError, SystemExit)) as error:
            train_molecules(tmp_path, "--dataset", "molpcba", "--data", str(molecule_folder / "pcba"), "--select",
                            select)
        said = capsys.readouterr().err.splitlines()[-1:] + [str(error.value)]
        assert "use --select" in "".join(said) and ("has missing labels" in said[-1]) == (select == "loo")
    path = molecule_folder / "delaney-processed.csv"
    path.write_text(path.read_text().replace("x,0.286,", "x,,"))
    with pytest.raises(ValueError, match="--select gcv: esol has missing labels, .*; use --select validation$"):
        train_molecules(tmp_path, "--dataset", "esol", "--data", str(molecule_folder), "--select", "gcv")
    shown = re.findall(r"python train_molecule.py (--.*?)(?:  .*)?$", train_molecule.__doc__, re.M)
    assert len(shown) >= 4 and all(train_molecule.parse(one.split()) for one in shown)


@needs_rdkit
@needs_molecules
def test_molecules_official_split_is_ogbs():
    """The files of ogbg-molhiv are read: 41,127 rows in three parts, 1,443 active, none left out."""
    path = os.path.join(MOLECULES, "HIV.csv")
    smiles, y, _ = smiles.table(path, ["HIV_active"])
    parts = smiles._npz_split(os.path.join(MOLECULES, "ogbg-molhiv_scaffold_split.npz"))
    assert len(smiles) == 41_127 and y.sum() == 1443 and [len(part) for part in parts] == [32_901, 4113, 4113]
    assert (np.sort(np.concatenate(parts)) == np.arange(41_127)).all()
    hard = [i for i, one in enumerate(smiles) if "->" in one or "[Co" in one][:50]
    assert all(smiles.read(smiles[i]) is not None for i in hard)


@needs_rdkit
@pytest.mark.parametrize("flags, words", [
    (["--dataset", "esol"], "ValueError: esol needs --data FOLDER with its files"),
    (["--dataset", "muv", "--data", "nowhere"], "FileNotFoundError: .*muv.csv.gz is not there; give --data"),
    (["--ridge", "often"], "--ridge often: expected a number, numbers separated by commas, or auto"),
    (["--store", "none"], "--store none: not here; give a folder"),
    (["--fingerprints", "morgan,maccs"], "--fingerprints morgan,maccs: expected morgan, pairs, torsions"),
    (["--fingerprints", "morgan,morgan"], "--fingerprints morgan,morgan: expected"),
    (["--devices", "5"], "ValueError: --devices 5, but JAX sees 4 here"),
    (["--n_train", "5000"], "ValueError: n_train=5000, .*nci has 1 to 1200 molecules to train on"),
    (["--split", "official"], "ValueError: split 'official': this data set has random, scaffold"),
    (["--depth", "0"], r"--depth \[?0\]?: expected at least 1"),
    (["--w_std", "-1"], "ValueError: .*w_std=-1.0, b_std=0.0: expected .*w_std > 0"),
])
def test_molecules_train_errors(flags, words, tmp_path, capsys):
    """What is wrong is said in one sentence."""
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        train_molecules(tmp_path, *flags)
    said = capsys.readouterr().err if error.type is SystemExit else f"{error.type.__name__}: {error.value}"
    assert re.search(words, said.splitlines()[-1])


@needs_rdkit
def test_molecules_train_error_without_traceback(tmp_path):
    """And at the command line in one line."""
    done = subprocess.run([sys.executable, "train_molecule.py", "--dataset", "esol", "--out", tmp_path], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode and done.stderr.splitlines()[-1].startswith("ValueError: esol needs --data FOLDER")
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------- hosts

def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def team(count, *flags, slurm=False, last=()):
    """Start train_cifar.py as `count` processes on loopback: digits, sizes that nothing divides."""
    common = ["--n_train", "203", "--n_test", "101", "--tile", "32", "--ridge", "1e-3,1e-2", "--quiet",
              *map(str, flags)]
    port, running = free_port(), []
    for index in range(count):
        where = [] if slurm else ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count),
                                  "--process", str(index)]
        env = {**os.environ, "XLA_FLAGS": ""}
        if slurm:
            env.update(SLURM_JOB_ID=str(port), SLURM_STEP_NODELIST="localhost", SLURM_NTASKS=str(count),
                       SLURM_PROCID=str(index), SLURM_LOCALID="0", SLURM_STEP_NUM_NODES=str(count))
        running.append(subprocess.Popen(
            [sys.executable, os.path.join(HERE, "train_cifar.py"), *common, *where,
             *(last if index == count - 1 else ())], env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return running


@pytest.mark.parametrize("count, devices, slurm, where", [
    (2, 2, True, "K"), (4, 1, False, "none")])
def test_hosts_one_answer(tmp_path, count, devices, slurm, where):
    """2 and 4 processes, told by Slurm or by flags, with tiles on disk or nowhere, give the answer of one
    to 1e-6, and one result line; each has written its share of the tiles."""
    flags = ["--store", tmp_path / "K" if where == "K" else where, "--out", tmp_path, "--devices", devices]
    done = [(process.communicate(timeout=300), process.returncode)
            for process in team(count, *flags, slurm=slurm)]
    assert [code for _, code in done] == [0] * count, done
    assert [out.count("test accuracy") for (out, _), _ in done] == [1] + [0] * (count - 1)
    together, = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    alone = train(tmp_path, "--n_train", "203", "--n_test", "101", "--ridge", "1e-3,1e-2")
    assert together["processes"] == count and together["devices"] == devices
    assert together["test_accuracy"] == alone["test_accuracy"] and together["ridge"] == alone["ridge"]
    assert abs(together["test_mse"] / alone["test_mse"] - 1) < 1e-6
    if where == "K":
        shares = [len((tmp_path / "K" / "train-nngp" / f"tiles-{i}.txt").read_text().split("\n")) - 1
                  for i in range(count)]
        assert shares == [14, 14] and store.report(str(tmp_path / "K")) == 0


def test_hosts_one_dies(tmp_path):
    """One process of two is killed in the middle of a solve: the other ends within a minute with a
    sentence, not a hang; started again, they go on from what was finished and end as if nothing was."""
    flags = ["--store", tmp_path / "K", "--out", tmp_path, "--devices", 1, "--precondition", "none",
             "--ridge", "1e-9", "--tol", "1e-9", "--max_iters", 3000]
    running = team(2, *flags)
    solving = tmp_path / "K" / "solve-nngp"
    while not (solving.exists() and list(solving.glob("*.npz"))):
        assert all(process.poll() is None for process in running), running[0].communicate()
        time.sleep(0.01)
    running[1].kill()
    start = time.monotonic()
    out, err = running[0].communicate(timeout=100)
    running[1].communicate()
    assert running[0].returncode == 1 and time.monotonic() - start < 60
    assert re.search("process 0 of 2: another process is gone. Start all of them again: what is in --store", err)
    for process in (again := team(2, *flags)):
        assert process.wait(timeout=300) == 0, process.communicate()
    result, = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    alone = train(tmp_path, "--n_train", "203", "--n_test", "101", *map(str, flags[6:]))
    assert result["entries_computed"] == 0 and result["cg_iterations"] > 100
    assert abs(result["test_mse"] / alone["test_mse"] - 1) < 1e-6
    [process.communicate() for process in again]


SLOW = """
import sys, time
import jax.numpy as jnp, numpy as np
import hosts, tiles
index, port = map(int, sys.argv[1:])
team, tiles.MEET, sums = processes.start(f"127.0.0.1:{port}", 2, index), 0.2, []

class Rows:
    def __len__(self):
        return 40
    def __getitem__(self, rows):
        time.sleep(0.1 * index)
        return np.ones((len(rows), 3), np.float32)

reduce = lambda array: sums.append(1) or team.all_reduce(array)
K = tiles.gram(lambda a, b: a @ b.T, Rows(), 4, quiet=True, team=team._replace(all_reduce=reduce))
assert K.matvec(np.ones((40, 1))).sum() == 4800
sys.exit(len(sums))
"""


def test_hosts_wait_for_the_slowest():
    """While one process computes, the other does not wait in one sum, which gives up after half an hour,
    but meets it every MEET seconds; both meet equally often and go on together."""
    port = free_port()
    met = [process.wait(timeout=100) for process in [
        subprocess.Popen([sys.executable, "-c", SLOW, str(index), str(port)], cwd=HERE) for index in range(2)]]
    assert met[0] == met[1] > 5


def test_hosts_errors():
    """One flag of the three without the others, or a number that is not there: one sentence."""
    for given in (("h:1", None, None), (None, 2, 0), ("h:1", 2, 2), ("h:1", 2, -1)):
        with pytest.raises(ValueError, match="give HOST:PORT of process 0, their number P, and 0 to P - 1"):
            processes.start(*given)
    assert processes.start() == processes.start("h:1", 1, 0) == tiles.ALONE


def test_hosts_error_in_one_ends_all(tmp_path):
    """A process that fails while the other waits for it says why, and both end at once."""
    start = time.monotonic()
    running = team(2, "--out", tmp_path, "--devices", 1, last=["--n_test", "1000"])
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [1, 1] and time.monotonic() - start < 60
    assert "another process is gone" in said[0] and "n_test=1000, but digits has 1 to 360 rows" in said[1]


def test_train_solvers_compared(capsys):
    """compare_solvers.py solves one system by all it knows, to the same residual in every column; low rank
    takes half the steps of none, or fewer; a line of its table for each."""
    with as_users_have_it(x64=True):
        results = compare_solvers.main(["--n", "300", "--ranks", "100", "--ridges", "1e-4", "--repeats", "1"])
    steps = {name: steps for (name, _), (seconds, steps, _) in results.items() if seconds > 0}
    assert len(steps) == len(results) >= 6 and steps["none"] >= 2 * steps["rank 100"]
    said = capsys.readouterr().out
    assert all(f"\n| {name} | " in said for name in steps)


# ------------------------------------------------------------------------------------------ plan

def test_plan_adds_up():
    """The plan of 10 rows, 3 test rows, tiles of 4, two hosts with two devices, counted by hand: 6 tiles
    of K and 3 of K_test; of sixteen entries each; 100 steps."""
    out = plan.estimate(10, 3, 4, 2, 2, 5, entries_rate=9.0, product=48.0, read=24.0, write=1e9, pixels=7,
                        classes=10, kept="on disk")
    assert out["tiles"] == 9 and out["entries"] == 144 and out["bytes"] == 576
    assert out["kernel_seconds"] == 144 / 36 and out["bytes_a_host"] == 288
    assert out["pass_bytes"] == 6 * 16 * 4 / 2 and out["pass_seconds"] == 192 / 24
    assert out["reduce_bytes"] == 800 and out["step_seconds"] == 8 + 1600 / plan.NETWORK
    assert out["solve_seconds"] == 100 * out["step_seconds"]
    memory = plan.estimate(10, 3, 4, 2, 1, 5, 9.0, 48.0, ridges=4)
    assert memory["pass_seconds"] == 6 * 16 * 4 / 48 and memory["reduce_bytes"] == 0
    assert memory["solve_seconds"] == 300 * memory["step_seconds"]
    lazily = plan.estimate(10, 3, 4, 2, 2, 5, 9.0, 48.0, kept="nowhere")
    assert lazily["kernel_seconds"] == lazily["bytes"] == 0 and lazily["pass_seconds"] == 96 / 36
    both = plan.estimate(10, 3, 4, 2, 2, 5, 9.0, 48.0, 24.0, 2.0, kinds=2, kept="on disk")
    assert both["kernel_seconds"] == 576 / 2  # the disk is slower than the kernel
    assert both["bytes"] == 1152 and both["pass_bytes"] == 192
    assert both["solve_seconds"] == 200 * both["step_seconds"]


def test_plan_of_five_million(tmp_path, capsys):
    """5 million images on 256 hosts are planned in seconds, nothing is loaded or started, and the
    numbers printed are those of the paper's problem."""
    out = train_cifar.main(["--plan", "--dataset", "cifar5m", "--n_train", "5000000", "--n_test", "10000",
                            "--hosts", "256", "--devices", "2", "--tile", "4096", "--store",
                            str(tmp_path / "K"), "--ridge", "0.1"])
    text = capsys.readouterr().out
    assert not (tmp_path / "K").exists() and not list(tmp_path.iterdir())
    assert abs(out["entries"] / (5e6**2 / 2 + 5e6 * 1e4) - 1) < 0.01 and out["tiles"] == 1221 * 1222 / 2 + 3 * 1221
    assert "5,000,000 rows" in text and "256 x 2 devices" in text and "50.3 TB on disk, 197 GB a host" in text
    assert out["total_seconds"] == out["kernel_seconds"] + out["solve_seconds"]
    n_entries = out["entries"] / (out["entries_per_second"] / 2 * 512)
    assert out["kernel_seconds"] >= n_entries * 0.99


# --------------------------------------------------------------------------------------- scaling

@pytest.mark.parametrize("a, b, c", [(2.0, 0.3, 0.0), (1.5, 0.5, 0.2), (0.9, 0.1, 0.0)])
def test_scaling_finds_a_known_law(a, b, c):
    """Points on a n^-b + c give a, b and c back, to the grid of b; with noise of 1 %, b within 0.15."""
    n = 2.0 ** np.arange(5, 15)
    found = np.array(report.fit(n, (a * n**-b + c)[None], np.ones(10)))[:, 0]
    assert np.allclose(found, [a, b, c], rtol=0.05, atol=0.01)
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=(20, 10))
    _, powers, _ = report.fit(n, (a * n**-b + c) * noise, np.ones(10))
    assert np.abs(powers - b).mean() < 0.15


def test_scaling_fit_is_the_least():
    """No b of the grid with scipy's non-negative least squares for a and c does better than what is found, on
    noisy points whose best a or c is zero too."""
    rng, n, weight = np.random.default_rng(0), np.array([10.0, 30, 100, 300, 1000]), np.array([3, 3, 3, 2, 1])
    for shape in (n**-0.3, n**-0.3 - 0.1, np.full(5, 0.5), n**0.1):
        error = shape * (1 + 0.05 * rng.normal(size=5))
        a, b, c = (z[0] for z in report.fit(n, error[None], weight))
        found = np.linalg.norm(np.sqrt(weight) * ((a * n**-b + c) / error - 1))
        design = [np.sqrt(weight)[:, None] * np.stack([n**-b, np.ones(5)], 1) / error[:, None] for b in report.POWERS]
        assert found <= min(nnls(M, np.sqrt(weight))[1] for M in design) * (1 + 1e-9)


def test_scaling_interval_covers():
    """The 95 % interval of b holds the b that made the points in 90 to 99 of 100 experiments: 8 sizes, three
    subsets each but one of the largest, whose errors scatter by 2 %, less for larger n."""
    n, inside = 2 ** np.arange(7, 15), 0
    for experiment in range(100):
        rng = np.random.default_rng(experiment)
        scatter = 0.02 * (n[0] / n) ** 0.25
        points = {int(k): list((2 * k**-0.3 + 0.1) * (1 + s * rng.normal(size=1 if k == n[-1] else 3)))
                  for k, s in zip(n, scatter)}
        _, (_, (low, high), _) = report.law(points, draws=300, seed=experiment)
        inside += low <= 0.3 <= high
    assert 90 <= inside <= 99
    assert report.law({k: v[:1] for k, v in points.items()})[1] is None
    with pytest.raises(ValueError, match="2 sizes"):
        report.law({10: [0.5], 20: [0.4]})


def fake_run(n, accuracy, seed=0, validation=((0.1, 0.5, 0.1),), **config):
    """A line of runs.jsonl."""
    return {"test_accuracy": accuracy, "ridge": 0.1, "cg_iterations": 7, "peak_memory_gb": 1.5, "rows": n,
            "seconds": {"kernel": n / 500, "ridge": 3, "solve": 4}, "validation": list(validation),
            "entries": 5, "entries_computed": 5,
            "config": {**dict(dataset="cifar10", kernel="fc", kind="ntk", depth=None, whiten="channel",
                              zca_eps=0.1, flips=False, crops=1, n_train=n, n_test=10000, seed=seed, rank=None,
                              precondition="lowrank"), **config}}


def test_scaling_tables_of_known_runs(tmp_path, capsys):
    """Two seeds of one experiment are one row, mean ± sd; sizes are a curve, explicit and symmetric flips the
    same, and kernels of a family share a table; copies of the same images are a row; scores of proteins are those
    at the largest n, and have their curve; runs with few test images are cost; the figure is noticed as well as the
    page where it is stale; a bad line is named, and what is missing."""
    runs, page = tmp_path / "runs.jsonl", tmp_path / "README.md"
    lines = [fake_run(1000, 0.52, 1), fake_run(1000, 0.5), fake_run(1000, 0.52, 1), fake_run(10, 0.1, n_test=9),
             fake_run(100, 0.1, n_test=9), fake_run(1000, 0.1, n_test=9, depth=None),
             *(fake_run(n, 1 - n**-0.25, kernel="cnn_vec", flips=True) for n in (100, 200)),
             fake_run(400, 1 - 400**-0.25, kernel="cnn_vec", flips="symmetric", fit_on=500),
             *(fake_run(n, 0.5, kernel=f"myrtle{depth}") for depth in (5, 10) for n in (100, 200, 400)),
             *({**fake_run(n, 0, seed, dataset="a", split="a", kernel=name), "test_spearman": score,
                "test_accuracy": None} for n, seed, name, score in (
                    (5, 0, "seq_fc", 0.1), (9, 0, "seq_fc", 0.2), (9, 1, "seq_fc", 0.4), (5, 0, "linear", 0.3))),
             *({**fake_run(n, 0, dataset="landscape", split="landscape", kernel="seq_cnn"),
                "test_spearman": 1 - n**-0.5, "test_accuracy": None} for n in (100, 400, 900)),
             {**fake_run(9, 0, dataset="muv", split="a", kernel="gcn"), "test_ap": 0.25, "test_accuracy": None},
             fake_run(1000, 0.54, crops=2, flips="explicit"), fake_run(1000, 0.56, 1, crops=2, flips="symmetric")]
    runs.write_text("".join(json.dumps({k: v for k, v in line.items() if v is not None}) + "\n" for line in lines))
    page.write_text("above" + "".join(f"\n<!-- {part}: written by scaling.py -->\nold\n<!-- end of {part} -->"
                                      for part in ("results", "learning", "laws", "augmentation", "cost",
                                                   "proteins", "molecules", "numbers", "assays",
                                                   "landscape")) + "\nbelow\n")
    paths = ["--runs", str(runs), "--readme", str(page)]
    assert report.main([*paths, "--check"]) == 1 and "old" in page.read_text()
    assert report.main(paths) == 0 and report.main([*paths, "--check"]) == 0
    text = page.read_text()
    assert "| fc NTK | 1,000 | 10,000 | 2 | 51.00 ± 1.41 | 0.1 | 7 | 2 | 7 | 1.5 |" in text
    assert "| n | cnn_vec NTK, flips |\n" in text and "| 400 | 77.64 |\n" in text
    assert "\n\n| n | myrtle5 NTK | myrtle10 NTK |\n" in text
    assert "| cnn_vec NTK, flips | 100 … 400 | 10,000 | 1 | 0.25 | 0 |" in text
    assert "| kernel | n | test images | 1 | 2 × 2 |" in text
    assert "| kernel | a, n = 9 |" in text and "| seq_fc NTK | 0.300 ± 0.141 |" in text
    assert "| linear NTK | 0.300 (n = 5) |" in text
    assert "| gcn NTK | 0.250 |" in text
    assert "| n | seq_cnn NTK |" in text and "| seq_cnn NTK | 100 … 900 | 10,000 | 1 | 0.5 | 0 |" in text
    assert "| fc NTK | 1,000 | 10,000 | 51.00 ± 1.41 | 55.00 ± 1.41 |" in text
    assert re.search(r"\| fc NTK: kernel, s \| 0.02 \| 0.2 \| 2 \| 1.00 \|", text)
    assert text.startswith("above") and text.endswith("below\n")
    (tmp_path / "curves.svg").write_text("another")
    assert report.main([*paths, "--check"]) == 1 and "curves.svg: stale" in capsys.readouterr().err
    runs.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 is not a run"):
        report.main(paths)
    runs.write_text(json.dumps(fake_run(1000, 0.5)) + "\n")
    with pytest.raises(ValueError, match="no kernel with three sizes of cifar10; run --sizes"):
        report.main(paths)
    runs.unlink()
    with pytest.raises(FileNotFoundError, match="runs.jsonl is not there; --runs takes"):
        report.main(paths)


def test_scaling_of_a_learning_curve(tmp_path, capsys):
    """Two kernels on digits at four sizes, one command each way: table, laws and a figure that is a picture."""
    train(tmp_path, "--kind", "both", "--sizes", "45,90,180,360", "--whiten", "none")
    path = tmp_path / "curve.png"
    assert report.main(["--runs", str(tmp_path / "runs.jsonl"), "--dataset", "digits", "--figure", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| n | fc NNGP, none | fc NTK, none |" in said and "| 360 | 9" in said
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


# ------------------------------------------------------------------------------------------ docs

def readme():
    with open(os.path.join(HERE, "README.md")) as file:
        return file.read()


def test_docs_results_are_what_the_runs_say():
    """README's tables and its figure are what scaling.py makes of results/runs.jsonl."""
    assert report.main(["--check"]) == 0, "python scaling.py writes it anew"


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


def commands(script=train_cifar):
    """The flags of every command with this script that README and docstrings show, as lists."""
    everything = re.sub(r"\\\n *", "", readme() + script.__doc__ + processes.__doc__ + plan.__doc__)
    shown = re.findall(rf"python (?:-u )?{script.__name__}.py ([^`\n#&]*)", everything)
    return [re.sub(r"  .*", "", command).split() for command in shown if "--" in command and "--help" not in command]


SMALL = {"--dataset": "digits", "--n_train": "40", "--n_test": "20", "--crops": "3", "--average": "2",
         "--fit_on": "10", "--tile": "16", "--hosts": "2", "--sizes": "10,20,40", "--kernel": "fc"}


def test_docs_commands_run(tmp_path, monkeypatch):
    """Every command that README and docstrings show runs, made small: digits in place of CIFAR, 40 images, fc in
    place of convolutions. Those of several processes are parsed only; section hosts runs some. So are those of
    proteins and molecules that need files; their sections run such."""
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", data.load("digits", None, 10, 10)[2])
    assert len(commands()) > 20
    for command in commands():
        train_cifar.parse(command)
        small = [SMALL.get(flag, value) for flag, value in zip(["", *command], command)]
        if "--data" in small:
            at = small.index("--data")
            del small[at:at + 2]
        if "--process" not in small:
            shutil.rmtree("K", ignore_errors=True)
            train_cifar.main(["--n_train", "40", "--n_test", "20", *small, "--quiet"])
    for script in (train_protein, train_molecule):
        assert len(commands(script)) > 3
        for command in commands(script):
            script.parse(command)


def test_docs_forks(monkeypatch):
    """What README shows of forking does what it says: a frozen layer adds nothing to the NTK, so that of a
    network with one layer trained is its NNGP; the Gaussian kernel's solution is the dense one; the
    preconditioner inverts the diagonal blocks; the list of layers is a network."""
    blocks = dict(zip(("network", "layer", "kernel", "preconditioner"),
                      re.findall(r"^```python\n(.*?)```", readme(), re.M | re.S)))
    body = re.search(r"(if layer.*)", blocks["layer"], re.S)[1]
    scope = {"linear": kernel.linear}
    exec("def forked(layer, K, T):\n    " + body.replace("\n", "\n    ") + "\n    return linear(layer, K, T)", scope)
    monkeypatch.setattr(kernel, "linear", scope["forked"])
    monkeypatch.setitem(kernel.LAYERS, "frozen", 1)
    x, x_test = np.random.default_rng(0).normal(size=(2, 12, 4, 4, 1))
    nngp, ntk = kernel.kernel_fn([("flatten",), ("frozen", 1.3), ("relu",), ("dense", 1.1, 0.0)],
                                 kernel.KINDS)(x)
    assert np.allclose(nngp, ntk, rtol=1e-12)
    scope = dict(fused=fused, tiles=tiles, jnp=jnp, np=np, pcg=pcg, precondition=precondition, ridge=0.1, x_train=x,
                 x_test=x_test, y=np.random.default_rng(1).normal(size=(12, 2)))
    with as_users_have_it(x64=True):
        exec(blocks["network"] + blocks["kernel"] + blocks["preconditioner"], scope)
    K, K_test = (np.exp(-((z[:, None] - x) ** 2).mean(axis=(2, 3, 4)) / 2) for z in (x, x_test))
    assert np.allclose(scope["f"], K_test @ np.linalg.solve(K + 0.1 * np.eye(12), scope["y"]), atol=1e-5)
    B = scope["block_jacobi"](Dense(K), 5)(0.1)(np.eye(12))
    assert np.allclose(np.linalg.inv(B[5:10, 5:10]), K[5:10, 5:10] + 0.1 * np.eye(5)) and not B[:5, 5:].any()


def test_docs_readme():
    """README gives two commands for a fresh machine and names every file with its length."""
    text = readme()
    assert len(re.findall("^python3 -m venv ", text, re.M)) == 2
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M):
        with open(os.path.join(HERE, name)) as file:
            assert len(file.readlines()) == int(lines), name
    listed = set(re.findall(r"^\| `(\w+\.py)` \| \d+ \|", text, re.M))
    assert listed == {name for name in os.listdir(HERE) if name.endswith(".py")}


# ------------------------------------------------------------------------------------- benchmark

# Rows and columns of the block timed at 32 x 32 x 3; of neural_tangents every size is tried first.
BLOCK = {"fc": {"fused": 4000, "kernel": 4000, "neural_tangents": (1000, 4000)},
         "cnn_vec": {"fused": 1024, "kernel": 128, "neural_tangents": (64, 128, 256)}}
POOLED = {"fused": 64, "kernel": 2, "neural_tangents": (1, 2, 4)}


def time_it(benchmark, call, what, amount):
    """Rounds for half a second, three at least, after a first call; extra_info holds what / s at the median."""
    with as_users_have_it():
        call()
        rounds = 1 if benchmark.disabled else max(3, round(0.5 / timeit.timeit(call, number=1)))
        out = benchmark.pedantic(call, rounds=rounds)
    if not benchmark.disabled:
        benchmark.extra_info[what + "/s"] = amount / benchmark.stats.stats.median
    return out


def fastest(call, sizes):
    """The n of these for which call(n)() takes the least time an entry."""
    def seconds_per_entry(n):
        with as_users_have_it():
            call(n)()
            return min(timeit.repeat(call(n), number=1, repeat=3)) / n**2
    return min(sizes, key=seconds_per_entry)


@every_network
@both_kinds
@pytest.mark.parametrize("engine", ["fused", "kernel", "neural_tangents"])
def test_benchmark(benchmark, name, kind, engine):
    """Seconds for a block of n x n entries, float32, two different sets of images.

    fused.py in tiles on one CPU device a core, as train_cifar.py runs it; the others, and fc, on one
    device with a thread a core."""
    if benchmark.disabled and name != "fc":
        pytest.skip("one network shows that it runs; --benchmark-only times them all")
    benchmark.group = f"{name} {kind}"
    n = 3 if benchmark.disabled else BLOCK.get(name, POOLED)[engine]
    make = {"fused": fused.kernel_fn, "kernel": kernel.kernel_fn, "neural_tangents": kernel.reference_fn}
    fn, side = make[engine](name, kind), 8 if benchmark.disabled else 32
    devices = jax.local_devices()[:os.cpu_count()]

    def call(n):
        rng = np.random.default_rng(0)
        x1, x2 = (rng.normal(size=(n, side, side, 3)).astype(np.float32) for _ in range(2))
        if engine == "fused" and name != "fc":
            return lambda: tiles.cross(fn, x1, x2, n // 2, devices, quiet=True).dense()
        return lambda: fn(x1, x2).block_until_ready()
    if isinstance(n, tuple):
        n = fastest(call, n)
    benchmark.extra_info["n"] = n
    K = time_it(benchmark, call(n), "entries", n * n)
    assert K.shape == (n, n) and K.dtype == np.float32 and np.isfinite(K).all()


@needs_rdkit
@both_kinds
@pytest.mark.parametrize("engine", ["graphs", "neural_tangents"])
def test_benchmark_graphs(benchmark, kind, engine):
    """Seconds for a block of n x n entries of `gcn`, three rounds, float32: molecules of RDKit's collection, of 16
    atoms for neural_tangents, so that it pads nothing, of 14 to 18 for graphs.py, since there are 283 of 16; in tiles
    on one CPU device a core, as for images."""
    benchmark.group = f"gcn {kind}"
    n, sizes = {"graphs": (1280, range(14, 19)), "neural_tangents": ((4, 8, 16, 32), [16])}[engine]
    n = 3 if benchmark.disabled else n
    mols = [mol for mol in smiles.load("nci").mols if mol.GetNumAtoms() in sizes]
    x = smiles.graphs(mols[:n if isinstance(n, int) else max(n)])
    layers, devices = graph_layers.gcn(x.degree, 1 if benchmark.disabled else 3), jax.local_devices()[:os.cpu_count()]
    fn = {"graphs": graphs.kernel_fn, "neural_tangents": kernel.reference_fn}[engine](layers, kind)

    def call(n):
        part = x[np.arange(n)]
        if engine == "graphs":
            return lambda: tiles.cross(fn, part, part, -(-n // 2), devices, quiet=True).dense()
        return lambda: fn(part, part).block_until_ready()
    if isinstance(n, tuple):
        n = fastest(call, n)
    benchmark.extra_info["n"] = n
    K = time_it(benchmark, call(n), "entries", n * n)
    assert K.shape == (n, n) and K.dtype == np.float32 and np.isfinite(K).all()


@every_sequence_network
@both_kinds
@pytest.mark.parametrize("length, engine", [(length, engine) for length in (4, 56)
                                            for engine in ("fused", "neural_tangents")])
def test_benchmark_sequences(benchmark, name, kind, length, engine):
    """Seconds for a block of n x n entries of two different sets of sequences of 20 letters, float32: the positions
    of GB1 that vary, and all of its domain; devices as above."""
    if benchmark.disabled and (length, kind) != (4, "nngp"):
        pytest.skip("one length shows that it runs; --benchmark-only times both")
    benchmark.group = f"{name} {kind}, {length} residues"
    sizes = {("seq_fc", 4): (1024, 2048), ("seq_fc", 56): (512, 1024, 2048), ("seq_cnn", 4): (256, 512),
             ("seq_cnn", 56): (64, 128), ("seq_cnn_gap", 4): (128, 256), ("seq_cnn_gap", 56): (16, 32)}[name, length]
    n = 3 if benchmark.disabled else sizes if engine == "neural_tangents" else 1024 if length == 56 else \
        2048 if name == "seq_fc" else 4096
    fn = {"fused": fused.kernel_fn, "neural_tangents": kernel.reference_fn}[engine](name, kind)

    def call(n):
        x1, x2 = np.eye(20, dtype=np.float32)[np.random.default_rng(0).integers(0, 20, (2, n, length))]
        if engine == "fused" and name != "seq_fc":
            devices = jax.local_devices()[:os.cpu_count()]
            return lambda: tiles.cross(fn, x1, x2, -(-n // 2), devices, quiet=True)
        return lambda: fn(x1, x2).block_until_ready()
    if isinstance(n, tuple):
        n = fastest(call, n)
    benchmark.extra_info["n"] = n
    K = time_it(benchmark, call(n), "entries", n * n)
    K = K.dense() if isinstance(K, tiles.TiledMatrix) else K
    assert K.shape == (n, n) and K.dtype == np.float32 and np.isfinite(K).all()


def test_benchmark_matrix_product(benchmark):
    """The floor of fc: the bare float32 product of 4,000 and 4,000 images."""
    n = 3 if benchmark.disabled else 4000
    x1, x2 = np.random.default_rng(0).normal(size=(2, n, 3072)).astype(np.float32)
    product = jax.jit(lambda x1, x2: jnp.matmul(x1, x2.T, precision="highest"))
    time_it(benchmark, lambda: product(x1, x2).block_until_ready(), "entries", n * n)


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


@both_kinds
def test_benchmark_kappas(benchmark, kind):
    """The floor of the others: kappa1 (ntk: and kappa0) of numbers in cache, on every core."""
    devices, rounds = jax.local_devices()[:os.cpu_count()], 2 if benchmark.disabled else 5000
    x = np.random.default_rng(0).uniform(-1, 1, size=(len(devices), 2**14)).astype(np.float32)

    def relu(_, c):
        kappa0, kappa1 = kernel.kappas(c)
        return kappa1 - 0.5 if kind == "nngp" else kappa1 - 0.5 * kappa0
    loop = jax.pmap(lambda c: jax.lax.fori_loop(0, rounds, relu, c), devices=devices)
    time_it(benchmark, lambda: loop(x).block_until_ready(), "relus", rounds * x.size)


SHARE = """
import os, sys, time
n, count, index, port = map(int, sys.argv[1:])
os.sched_setaffinity(0, {index})  # a core each, as a host each
import jax, numpy as np
import fused, hosts, tiles
team = processes.start(f"127.0.0.1:{port}", count, index)
x = np.random.default_rng(0).standard_normal((n, 32, 32, 3), np.float32)
kernel_fn = fused.kernel_fn("cnn_vec", "ntk")
for rows in (n // 4, n):  # the first compiles
    team.all_reduce(np.zeros(1))
    start = time.perf_counter()
    tiles.gram(kernel_fn, x[:rows], n // 8, quiet=True, team=team)
    team.all_reduce(np.zeros(1))
if index == 0:
    print(time.perf_counter() - start)
"""


def test_benchmark_two_processes(benchmark):
    """The tiles of one K by one process and by two, a core each: parallel efficiency t1 / (2 t2)."""
    if benchmark.disabled or os.cpu_count() < 2:
        pytest.skip("what it times is tested under hosts; --benchmark-only times it, on two cores or more")

    def seconds(count):
        n, port = 1024, free_port()
        running = [subprocess.Popen([sys.executable, "-c", SHARE, *map(str, (n, count, index, port))], cwd=HERE,
                                    stdout=subprocess.PIPE, text=True) for index in range(count)]
        out = [process.communicate(timeout=600)[0] for process in running]
        assert [process.returncode for process in running] == [0] * count
        return float(out[0].splitlines()[-1])
    pairs = np.array(benchmark.pedantic(lambda: [(seconds(1), seconds(2)) for _ in range(3)], rounds=1))
    benchmark.extra_info["efficiency"] = np.median(pairs[:, 0] / (2 * pairs[:, 1]))
