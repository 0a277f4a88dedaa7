"""What k(x, x') is for an infinitely wide network.

A network is a list of layers. For two inputs with positions p and q (pixels; a plain vector has one) two arrays go from layer
to layer, and the variances of each input:
  K[p, q]  covariance of the pre-activations                    NNGP
  T[p, q]  <d f(x)_p / d theta, d f(x')_q / d theta>, theta all parameters   NTK
  v[p], v'[q]  variances K_xx[p, p] and K_x'x'[q, q], once per input

  input              K = <x_p, x'_q> / channels                            T = 0
  dense, conv        K <- w_std^2 mean(K) + b_std^2                        T <- K_new + w_std^2 mean(T)
  relu               K <- sqrt(v v') kappa1(c) / 2,  c = K / sqrt(v v')    T <- kappa0(c) T / 2
  pool, flatten, gap K <- mean(K)                                          T <- mean(T)
  normalize          K <- c                                                T <- T / sqrt(v v')
  exp                K <- sqrt(v v') exp(gamma (c - 1))                    T <- gamma exp(gamma (c - 1)) T

with kappa0(c) = (pi - arccos c) / pi and kappa1(c) = (sqrt(1 - c^2) + (pi - arccos c) c) / pi (Cho & Saul 2009), and mean the
identity (dense), the mean over the 3 x 3 window that moves in both images together (conv), the mean over 2 x 2 windows that
move independently (pool), the mean over p of [p, p] (flatten), the mean over all p, q (gap). NTK parameterisation: Jacot et
al. 2018, Arora et al. 2019.

Where a network never pools, conv, relu and flatten only read p = q. Then K is carried as its diagonal, (h, w) in place of
(h, w, h, w). This is the only optimisation here; fast/fused.py has the others.

A layer of your own is one function with @layer above it; see the README. proteins/ and molecules/ add theirs so.

    python -c "import kernel, numpy as np; print(kernel.kernel_fn('fc', 'ntk')(np.eye(3)))"

Cost of an entry: one kappa1 (NTK: and one kappa0) per position pair and relu.      Proved by: test_all.py, section kernel
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("nngp", "ntk")
W_STD, B_STD = 2**0.5, 0.0  # where not given: weights as He et al. 2015, no biases
BLOCK = 2**18  # array elements worked on at a time where positions are carried: 1 MB stays in cache


class Layer(NamedTuple):
    """What is known of a kind of layer; `layer` makes one."""
    apply: Callable  # (layer, K, T, one, two) -> K, T
    parameters: int  # numbers that follow the name in a list of layers
    variance: bool  # it reads one.std and two.std
    pairs: bool  # it reads K[p, q] of p != q
    ends: bool  # it leaves no positions


class Side(NamedTuple):
    """One of the two inputs, as a layer sees it."""
    x: jax.Array  # (h, w, channels)
    std: jax.Array | None  # sqrt(v), (h, w) or (): before this layer, if it reads variances
    notes: dict  # what layers of one pass over the network leave for each other


class Input(NamedTuple):
    """How the networks of a room, such as proteins/, take their inputs; found in INPUTS by their first layer."""
    check: Callable  # layers -> None, or ValueError
    positions: Callable  # x -> (n, h, w, channels), or ValueError
    features: Callable  # (layers, x (..., channels)) -> what the input layer multiplies


LAYERS = {}  # name -> Layer
INPUTS = {}  # name of a first layer -> Input; images, and vectors before flatten, have none
NETWORKS = {}  # name -> function (depth or None, w_std, b_std) -> layers before the head
REFERENCE = {}  # name -> function (stax, *parameters) -> its layer, or None; "inputs of " + name -> what reference_fn calls


def layer(name, parameters=0, variance=False, pairs=False, ends=False):
    """Adds the function below it, (layer, K, T, one, two) -> K, T, to LAYERS."""
    def add(apply):
        LAYERS[name] = Layer(apply, parameters, variance, pairs, ends)
        return apply
    return add


@layer("dense", 2)
def dense(layer, K, T, one, two, mean=lambda k: k):
    _, w_std, b_std = layer
    K = w_std**2 * mean(K) + b_std**2
    return K, K + w_std**2 * mean(T)


@layer("conv", 2)
def conv(layer, K, T, one, two):
    return dense(layer, K, T, one, two, window)


@layer("relu", variance=True)
def relu(layer, K, T, one, two):
    kappa0, kappa1 = kappas(K * outer(K, inverse(one.std), inverse(two.std)))
    return outer(K, one.std, two.std) * kappa1 / 2, kappa0 * T / 2


@layer("normalize", variance=True)
def normalize(layer, K, T, one, two):
    scale = outer(K, inverse(one.std), inverse(two.std))
    return K * scale, T * scale


@layer("exp", 1, variance=True)
def exp(layer, K, T, one, two):
    E = jnp.exp(layer[1] * (K * outer(K, inverse(one.std), inverse(two.std)) - 1))
    return outer(K, one.std, two.std) * E, layer[1] * E * T


@layer("pool", pairs=True)
def pool(layer, K, T, one, two):
    h, w = K.shape[0] // 2, K.shape[1] // 2
    return tuple(k.reshape(h, 2, w, 2, h, 2, w, 2).mean(axis=(1, 3, 5, 7)) for k in (K, T))


@layer("flatten", ends=True)
def flatten(layer, K, T, one, two):
    return diagonal(K).mean(), diagonal(T).mean()


@layer("gap", pairs=True, ends=True)
def gap(layer, K, T, one, two):
    return K.mean(), T.mean()


def outer(K, a, b):
    """a[p] b[q] for a K of pairs, a[p] b[p] for a K that is carried as its diagonal."""
    return a.reshape(a.shape + (1,) * (K.ndim - a.ndim)) * b[(None,) * (K.ndim - b.ndim)]


@jax.jit
def inverse(std):
    """1 / std, and 0 where std is 0, as of black patches."""
    return jnp.where(std > 0, 1 / jnp.where(std > 0, std, jnp.ones_like(std)), jnp.zeros_like(std))


def window(K, width=3):
    """Mean over the 3 x `width` window that moves in both images together, zeros outside: (h, w[, h, w]).

    A loop, so that XLA keeps the padded array. Unrolled, XLA fuses padding and arithmetic into one loop that branches at
    every element, two to seven times slower on a CPU.
    """
    padded = jnp.pad(K, [(1, 1), (width // 2, width // 2)] * (K.ndim // 2))

    def add(k, total):
        return total + jax.lax.dynamic_slice(padded, (k // width, k % width) * (K.ndim // 2), K.shape)
    return jax.lax.fori_loop(0, 3 * width, add, jnp.zeros_like(K)) / (3 * width)


def diagonal(K):
    """K[p, p]: (h, w, h, w) -> (h, w); what is carried as its diagonal stays as it is."""
    return jnp.einsum("ijij->ij", K) if K.ndim == 4 else K


def _angle_coefficients(degree):
    """Chebyshev interpolant of arccos(1 - t) / (pi sqrt t), smooth on [0, 1], low power first."""
    interpolant = np.polynomial.Chebyshev.interpolate(
        lambda t: 2 * np.arcsin(np.sqrt(t / 2)) / (np.pi * np.sqrt(t)), degree, domain=[0, 1])
    return interpolant.convert(kind=np.polynomial.Polynomial).coef.tolist()


ANGLE = {"float32": _angle_coefficients(6), "float64": _angle_coefficients(19)}


@jax.jit  # traced once for all layers of one shape
def kappas(c):
    """kappa0(c), kappa1(c) of the cosine c, any shape, float32 or float64.

    With t = 1 - |c| and arccos |c| = pi sqrt(t) g(t), g a polynomial,
      kappa0 = 1 - sqrt(t) g(t) for c >= 0, sqrt(t) g(t) for c < 0
      kappa1 = max(c, 0) + t sqrt(t) h(t),  h_k = g_k / (k + 3/2), as kappa1' = kappa0
    so no arccos is called and nothing cancels as c -> -1.
    The slope of kappa0 is infinite at c = 1: a rounding error of 1e-7 in c would change the NTK of an image with itself by
    1e-4. A |c| within 16 units of rounding of 1 therefore counts as 1 (a CIFAR-10 image with itself came out within 9).
    Errors: 2e-7 in float32 and 2e-15 in float64; of kappa0 for c rounded to 1, up to 6e-4 and 3e-8.
    """
    t = 1 - jnp.abs(c)
    t = jnp.where(t < 16 * float(jnp.finfo(c.dtype).eps), jnp.zeros_like(t), t)
    g = h = jnp.zeros_like(t)
    for k, coefficient in reversed(list(enumerate(ANGLE[c.dtype.name]))):
        g, h = g * t + coefficient, h * t + coefficient / (k + 1.5)
    root = 2 * jnp.sqrt(t / 4)  # written differently from sqrt(t) below: XLA would store a shared root in memory, and
    return (jnp.where(c < 0, root * g, 1 - root * g),  # split the loop around it
            jnp.maximum(c, jnp.zeros_like(c)) + t * jnp.sqrt(t) * h)


def on(numbers):
    """The entry of {"cpu": ..., "gpu": ...} for JAX's backend; every backend but the CPU uses "gpu"."""
    return numbers.get(jax.default_backend(), numbers["gpu"])


def network(name, depth=None, w_std=W_STD, b_std=B_STD, head="linear", gamma=1.0):
    """The layers of a named network, as a list of (layer, parameters ...).

    name: of NETWORKS, or such a list itself, which is checked and returned.
    depth: hidden layers of fc (default 3), convolutions of cnn_vec and cnn_gap (default 8); the number in a Myrtle
    network's name fixes its depth (Shankar et al. 2020).
    head: what comes before the last dense layer. linear: nothing. cosine: a dense layer, normalized (layer norm), so that
    k(x, x) is the same for all x. relu and exp: a relu on top of that, or exp(gamma (cosine - 1)); both are heads of
    Shankar et al. 2020.
    Raises ValueError: an unknown name, layer or head, parameters that do not fit.
    """
    if not isinstance(name, str):
        if (depth, w_std, b_std, head, gamma) != network.__defaults__:
            raise ValueError("depth, w_std, b_std, head and gamma are for named networks; a list of layers has its own")
        return checked([tuple(one) for one in name])
    if name not in NETWORKS:
        raise ValueError(f"kernel {name!r} is unknown; choose one of {', '.join(NETWORKS)}")
    if depth is not None and (name.startswith("myrtle") or depth < 1):
        raise ValueError(f"depth={depth} does not fit {name}: depth is a positive number of layers "
                         "for all but the Myrtle networks, whose depth is in their name")
    if not w_std > 0 or not b_std >= 0:
        raise ValueError(f"w_std={w_std}, b_std={b_std}: expected w_std > 0 and b_std >= 0")
    last = ("dense", w_std, b_std)
    heads = {"linear": [], "cosine": [last, ("normalize",)], "relu": [last, ("normalize",), ("relu",)],
             "exp": [last, ("normalize",), ("exp", gamma)]}
    if head not in heads or not gamma > 0:
        raise ValueError(f"head={head!r}, gamma={gamma}: expected one of {', '.join(heads)}, and gamma > 0")
    return NETWORKS[name](depth, w_std, b_std) + heads[head] + [last]


def checked(layers):
    """The list itself.  ValueError: a layer that is unknown or has another number of parameters, no layer that ends, a layer
    after it that needs positions."""
    known = {"(" + ", ".join([f'"{name}"', *["number"] * one.parameters]) + ("" if one.parameters else ",") + ")"
             for name, one in LAYERS.items()}
    bad = [one for one in layers if one[0] not in LAYERS or LAYERS[one[0]].parameters != len(one) - 1]
    if bad or not any(LAYERS[one[0]].ends for one in layers):
        ends = " or ".join(name for name, one in LAYERS.items() if one.ends)
        raise ValueError(f"in the list of layers {bad or layers}: expected some of {', '.join(sorted(known))}, among them "
                         f"{ends}")
    end = next(k for k, one in enumerate(layers) if LAYERS[one[0]].ends)
    late = [one for one in layers[end + 1:] if one[0] == "conv" or LAYERS[one[0]].pairs or LAYERS[one[0]].ends]
    if late:
        raise ValueError(f"in the list of layers {late[0]} comes after {layers[end]}, which leaves one position")
    if layers[0][0] in INPUTS:
        INPUTS[layers[0][0]].check(layers)
    return layers


def _fc(depth, w_std, b_std):
    return [("flatten",)] + [("dense", w_std, b_std), ("relu",)] * (depth or 3)


def _cnn(end):
    return lambda depth, w_std, b_std: [("conv", w_std, b_std), ("relu",)] * (depth or 8) + [(end,)]


def _myrtle(a, b, c):
    def layers(depth, w_std, b_std):
        step = [("conv", w_std, b_std), ("relu",)]
        return step * a + [("pool",)] + step * b + [("pool",)] + step * c + [("gap",)]
    return layers


NETWORKS.update(fc=_fc, cnn_vec=_cnn("flatten"), cnn_gap=_cnn("gap"), myrtle5=_myrtle(2, 1, 1), myrtle7=_myrtle(2, 2, 2),
                myrtle10=_myrtle(3, 3, 3))
IMAGES = tuple(NETWORKS)  # the networks of images; rooms then add to NETWORKS those of other inputs


def covariance(layers, x1, x2):
    """The input layer, <x_p, x'_q> / channels: (h, w, channels) twice -> (h, w, h, w), or (h, w) where that is enough."""
    x1, x2 = (features(layers, x) for x in (x1, x2))
    subscripts = "ijc,klc->ijkl" if carries_pairs(layers) else "ijc,ijc->ij"
    return jnp.einsum(subscripts, x1, x2, precision="highest") / x1.shape[-1]


def features(layers, x):
    """What the input layer multiplies: x, without what a room's layers read beside it."""
    return INPUTS[layers[0][0]].features(layers, x) if layers[0][0] in INPUTS else x


def carries_pairs(layers):
    """Whether some layer reads p != q, so that all of K[p, q] is needed and not its diagonal."""
    return any(LAYERS[one[0]].pairs for one in layers)


def deviations(layers, x):
    """sqrt(v) before each layer that reads variances, for one input x (h, w, channels): the recursion of x with itself."""
    K, stds, notes = covariance(layers, x, x), [], {}
    for layer in layers:
        rule = LAYERS[layer[0]]
        if rule.variance:
            stds.append(jnp.sqrt(jnp.maximum(diagonal(K), 0)))  # a mean of what cancels may round to less
        side = Side(x, stds[-1] if rule.variance else None, notes)
        K, _ = rule.apply(layer, K, K, side, side)  # T is not needed: K stands in
    return stds


def pair(layers, kind, x1, x2, stds1, stds2):
    """k(x1, x2) of two inputs (h, w, channels), scalars: the recursion at the top of this file."""
    K = covariance(layers, x1, x2)
    T, stds, notes = jnp.zeros_like(K), iter(zip(stds1, stds2)), {}
    for layer in layers:
        rule = LAYERS[layer[0]]
        std1, std2 = next(stds) if rule.variance else (None, None)
        K, T = rule.apply(layer, K, T, Side(x1, std1, notes), Side(x2, std2, notes))
    return chosen(kind, K, T)


def after(layer, K, T, std1=None, std2=None):
    """K and T after one layer that does not look at the inputs; std1, std2: sqrt(v) of both, where it reads variances."""
    return LAYERS[layer[0]].apply(layer, K, T, Side(None, std1, {}), Side(None, std2, {}))


def chosen(kind, K, T):
    """K, T or a tuple of them, as kind ("nngp", "ntk" or a tuple of these) says; else ValueError."""
    unknown = set([kind] if isinstance(kind, str) else kind) - set(KINDS)
    if unknown or not kind:
        raise ValueError(f"kind {kind!r} is unknown; choose {' or '.join(KINDS)}, or a tuple of them")
    return (K, T)[KINDS.index(kind)] if isinstance(kind, str) else tuple((K, T)[KINDS.index(k)] for k in kind)


def as_images(layers, x):
    """x as (n, h, w, channels), checked against the network; a network that starts by flattening
    takes (n, d), and an image as one position with h*w*channels channels."""
    x = jnp.asarray(x)
    if 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}: expected at least one input, and no side of 0")
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    if layers[0][0] in INPUTS:
        return INPUTS[layers[0][0]].positions(layers, x)
    if layers[0][0] == "flatten" and x.ndim >= 2:
        return x.reshape(x.shape[0], 1, 1, -1)
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}; this network takes images (n, h, w, channels)")
    side = 2 ** sum(one[0] == "pool" for one in layers)
    if x.shape[1] % side or x.shape[2] % side:
        raise ValueError(f"images are {x.shape[1]}x{x.shape[2]}, but this network halves them "
                         f"{side.bit_length() - 1} times: height and width must be positive "
                         f"multiples of {side}")
    return x


def as_pair(layers, x1, x2):
    """x1 and x2 `as_images`, checked against each other; x2 may be None and then stays so."""
    x1 = as_images(layers, x1)
    if x2 is None:
        return x1, None
    x2 = as_images(layers, x2)
    if x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype:
        raise ValueError(f"x1 is {x1.dtype} {x1.shape} and x2 is {x2.dtype} {x2.shape}: all but the "
                         "number of rows must agree")
    return x1, x2


def kernel_fn(name, kind, **options):
    """The kernel matrix function of a network: fn(x1, x2=None) -> (n1, n2).

    name: one of NETWORKS, or a list of layers as `network` returns.
    kind: "nngp", "ntk", or a tuple of them for a tuple of matrices in one pass.
    options: depth, w_std, b_std, head, gamma of `network`.
    x1, x2: (n, h, w, channels), or (n, d) for fc. Computed in float32, or in float64 if x1 is that and jax_enable_x64 is
    set. Of integers JAX keeps 32 bits; tiles.py refuses larger ones. fn(x) is fn(x, x), exactly symmetric. fn may be jitted,
    vmapped and pmapped.
    Raises ValueError: unknown name or kind, images that do not fit the network.
    """
    layers = network(name, **options)
    chosen(kind, None, None)  # raises ValueError here, not at the first call

    @jax.jit
    def fn(x1, x2=None):
        x1, x2 = as_pair(layers, x1, x2)
        x = x1 if x2 is None else jnp.concatenate([x1, x2])
        positions = x.shape[1] * x.shape[2]
        size = positions**2 if carries_pairs(layers) else positions
        both = x, blocked(lambda one: deviations(layers, one), x, BLOCK // size)
        a, b = (jax.tree.map(lambda y: y[rows], both) for rows in (slice(len(x1)), slice(len(x1) * (x2 is not None), None)))
        cols = len(b[0]) if size == 1 else BLOCK // size
        rows = len(x1) if size == 1 else BLOCK // (size * len(b[0]))
        K = blocked(lambda one: blocked(
            lambda two: pair(layers, kind, one[0], two[0], one[1], two[1]), b, cols), a, rows)
        return jax.tree.map(lambda K: jnp.triu(K) + jnp.triu(K, 1).T, K) if x2 is None else K
    return fn


@lru_cache(maxsize=32)
def compiled(engine, layers, kind, **options):
    """engine(layers, kind, ...), such as kernel_fn, made once for each network: JAX compiles every new function again.
    layers: a tuple."""
    return engine(list(layers), kind, **options)


def blocked(f, xs, size):
    """vmap of f over the leading axis of xs, `size` at a time (at least one). The last block is filled with copies of the
    first row: a block of its own size would be compiled again."""
    n = jax.tree.leaves(xs)[0].shape[0]
    if size >= n:
        return jax.vmap(f)(xs)
    blocks = -(-n // max(1, size))
    side = -(-n // blocks)

    def cut(x):
        x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (blocks * side - n, *x.shape[1:]))])
        return x.reshape(blocks, side, *x.shape[1:])
    return jax.tree.map(lambda y: y.reshape(blocks * side, *y.shape[2:])[:n], jax.lax.map(jax.vmap(f), jax.tree.map(cut, xs)))


# ---- the same networks by neural_tangents: the oracle of the tests, and --engine nt

REFERENCE.update({
    "dense": lambda nt, w_std, b_std: nt.Dense(1, W_std=w_std, b_std=b_std),
    "conv": lambda nt, w_std, b_std: nt.Conv(1, (3, 3), padding="SAME", W_std=w_std, b_std=b_std),
    "relu": lambda nt: nt.Relu(), "pool": lambda nt: nt.AvgPool((2, 2), (2, 2)), "flatten": lambda nt: nt.Flatten(),
    "gap": lambda nt: nt.GlobalAvgPool(), "normalize": lambda nt: nt.LayerNorm(-1, eps=0.0),
    "exp": lambda nt, gamma: nt.ExpNormalized(gamma)})


def stax():
    """The module neural_tangents.stax, 0.6.5, on a JAX that is newer than its last release.

    The package's __init__ imports TensorFlow and names that JAX has removed; an empty package with
    the right __path__ stands in for it. jax.random.KeyArray is the one removed name stax needs.
    """
    if "neural_tangents" not in sys.modules:
        spec = importlib.util.find_spec("neural_tangents")
        if spec is None:
            raise ImportError("neural_tangents is not installed: pip install --no-deps -r requirements.txt")
        package = types.ModuleType("neural_tangents")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["neural_tangents"] = package
        jax.random.KeyArray = jax.Array
    from neural_tangents import stax as module
    return module


def reference_fn(name, kind, **options):
    """The same network built with neural_tangents.stax; same signature and result as kernel_fn."""
    nt, layers = stax(), network(name, **options)
    chosen(kind, None, None)
    kernel = nt.serial(*[REFERENCE[one[0]](nt, *one[1:]) for one in layers if REFERENCE[one[0]]])[2]
    inputs = REFERENCE.get("inputs of " + layers[0][0], lambda layers, x1, x2: ((x1, x2), {}))

    @jax.jit
    def fn(x1, x2=None):
        x1, x2 = as_images(layers, x1), x2 if x2 is None else as_images(layers, x2)
        (x1, x2), more = inputs(layers, x1, x2)
        return kernel(x1, x2, kind, **more)
    return fn
