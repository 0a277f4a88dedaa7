"""What k(x, x') is for an infinitely wide network.

A network is a list of layers. For two inputs with positions p and q (pixels; one position for a
plain vector) carry two arrays from layer to layer:
  K[p, q]  covariance of the pre-activations                    NNGP
  T[p, q]  sum over all parameters of d f(x)_p . d f(x')_q      NTK
  v[p]     variance K_xx[p, p], from each input alone: once per input, not once per pair

  input              K = <x_p, x'_q> / channels                            T = 0
  dense, conv        K <- w_std^2 A(K) + b_std^2                           T <- K_new + w_std^2 A(T)
  relu               K <- sqrt(v v') kappa1(c) / 2,  c = K / sqrt(v v')    T <- kappa0(c) T / 2
  normalize          K <- c                                                T <- T / sqrt(v v')
  exp                K <- sqrt(v v') exp(gamma (c - 1))                    T <- gamma exp(gamma (c - 1)) T
  pool, flatten, gap K <- A(K)                                             T <- A(T)
  mask               of a sequence: from here on layers read K[p, q] = T[p, q] = 0 where p or q does not exist
  aggregate          K <- A K A'^T, A and A' of the two graphs             T <- A T A'^T
  sum, mean          sum, mean of K over pairs of nodes that exist         the same of T

with kappa0(c) = (pi - arccos c) / pi and kappa1(c) = (sqrt(1 - c^2) + (pi - arccos c) c) / pi
(Cho & Saul 2009), and A the identity (dense), the mean over the 3 x 3 window moving in both images
together (conv), the same over 3 positions of two sequences (conv1d), the mean over 2 x 2 windows moving
independently (pool), the mean over p of [p, p] (flatten), the mean over all p, q (gap). NTK
parameterisation: Jacot et al. 2018, Arora et al. 2019.

A sequence is an image one position wide, (length, 1, channels). Positions whose channels are all zero, as at the
end of the shorter sequences of an array, do not exist: k(x, x') is the same however far x or x' is padded. Of l
and l' positions that exist, gap is the sum over all p, q divided by l l', as in neural_tangents; flatten is the
sum of [p, p] over those that both have, divided by sqrt(l l'), the network's readout being scaled by its input's
own length: positive definite, and its k(x, x) does not fade with the length. Where l = l' both are the means above.

Graphs (Du et al. 2019): positions are nodes, numbered in any order. x is (n, nodes, features + 2 degree):
of a node its features, then the numbers of up to `degree` nodes that it listens to, itself among them
if it does, then their weights A[p, number]. A graph with fewer nodes ends in rows of zeros, and such
rows do not exist: no pool counts them and no weight leads to them.

Where a network never pools, conv, relu and flatten only ever read p = q: then K is carried as its
diagonal, (h, w) in place of (h, w, h, w). That is all the cleverness here; the speed is elsewhere.

    python -c "import kernel, numpy as np; print(kernel.kernel_fn('fc', 'ntk')(np.eye(3)))"

Cost of an entry: one arccos per position pair and relu.      Proved by: test_all.py, section kernel
"""

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

NETWORKS = ("fc", "cnn_vec", "cnn_gap", "myrtle5", "myrtle7", "myrtle10")
SEQUENCES = ("seq_fc", "seq_cnn", "seq_cnn_gap")
KINDS = ("nngp", "ntk")
LAYERS = {"dense": 2, "conv": 2, "conv1d": 2, "relu": 0, "pool": 0, "flatten": 0, "gap": 0, "mask": 0,  # parameters
          "aggregate": 1, "jump": 0, "sum": 0, "mean": 0, "normalize": 0, "exp": 1}
ELEMENTWISE = ("relu", "normalize", "exp")  # layers that read the variances of both inputs
HEADS = ("linear", "cosine", "relu", "exp")
GRAPH = ("aggregate", "jump", "sum", "mean")  # layers that read the graph
BLOCK = 2**18  # array elements worked on at a time where positions are carried: 1 MB stays in cache


def network(name, depth=None, w_std=2**0.5, b_std=0.0, head="linear", gamma=1.0):
    """The layers of a named network: a list of (layer,) or (layer, w_std, b_std).

    depth: hidden layers of fc and seq_fc (default 3), convolutions of cnn_vec and cnn_gap (default 8), of
    seq_cnn and seq_cnn_gap (default 3); the number in a Myrtle network's name fixes its depth (Shankar et al. 2020).
    head: what comes before the last dense layer. linear: nothing. cosine: a dense layer, normalized (layer norm), so
    that k(x, x) is the same for all x. relu and exp: a relu on top of that, or exp(gamma (cosine - 1)); both are
    heads of Shankar et al. 2020.
    name may also be such a list itself, which is checked and returned.
    """
    if not isinstance(name, str):
        layers = [tuple(layer) for layer in name]
        bad = [layer for layer in layers if LAYERS.get(layer[0]) != len(layer) - 1]
        names = {layer[0] for layer in layers}
        if bad or not {"flatten", "gap", "sum", "mean"} & names:
            raise ValueError(f"in the list of layers {bad or layers}: expected (\"dense\" or \"conv\", "
                             "w_std, b_std), (\"relu\",), (\"pool\",), and (\"flatten\",) or (\"gap\",) "
                             "at least once; of graphs (\"aggregate\", degree), (\"jump\",), and (\"sum\",) or "
                             "(\"mean\",); (\"normalize\",) and (\"exp\", gamma) anywhere")
        if {"conv1d", "mask"} & names and ({"conv", "pool", *GRAPH} & names or layers[0] != ("mask",)
                                           or ("mask",) in layers[1:]):
            raise ValueError(f"in the list of layers {layers}: a network of sequences begins with (\"mask\",), the "
                             "only one, and has (\"conv1d\", w_std, b_std) in place of conv, no pool and no graph")
        if (depth, w_std, b_std, head, gamma) != network.__defaults__:
            raise ValueError("depth, w_std, b_std, head and gamma are for named networks; a list of layers has its own")
        return layers
    if name not in NETWORKS + SEQUENCES:
        raise ValueError(f"kernel {name!r} is unknown; choose one of {', '.join(NETWORKS + SEQUENCES)}")
    if depth is not None and (name.startswith("myrtle") or depth < 1):
        raise ValueError(f"depth={depth} does not fit {name}: depth is a positive number of layers "
                         "for all but the Myrtle networks, whose depth is in their name")
    if not w_std > 0 or not b_std >= 0:
        raise ValueError(f"w_std={w_std}, b_std={b_std}: expected w_std > 0 and b_std >= 0")
    dense, conv, relu, pool = ("dense", w_std, b_std), ("conv", w_std, b_std), ("relu",), ("pool",)
    heads = {"linear": [], "cosine": [dense, ("normalize",)], "relu": [dense, ("normalize",), relu],
             "exp": [dense, ("normalize",), ("exp", gamma)]}
    if head not in heads or not gamma > 0:
        raise ValueError(f"head={head!r}, gamma={gamma}: expected one of {', '.join(heads)}, and gamma > 0")
    last = heads[head] + [dense]
    if name == "fc":
        return [("flatten",)] + [dense, relu] * (depth or 3) + last
    if name in ("cnn_vec", "cnn_gap"):
        return [conv, relu] * (depth or 8) + [("flatten" if name == "cnn_vec" else "gap",)] + last
    if name == "seq_fc":
        return [("mask",), ("flatten",)] + [dense, relu] * (depth or 3) + last
    if name in ("seq_cnn", "seq_cnn_gap"):
        return ([("mask",)] + [("conv1d", w_std, b_std), relu] * (depth or 3)
                + [("flatten" if name == "seq_cnn" else "gap",)] + last)
    a, b, c = {"myrtle5": (2, 1, 1), "myrtle7": (2, 2, 2), "myrtle10": (3, 3, 3)}[name]
    return [conv, relu] * a + [pool] + [conv, relu] * b + [pool] + [conv, relu] * c + [("gap",)] + last


def gcn(degree, depth=3, hidden=1, pool="sum", jump=False, w_std=2**0.5, b_std=0.0):
    """The layers of a graph network: depth rounds of aggregate and `hidden` times (dense, relu), a pool, dense.

    degree: of x, see the top.   pool: "sum" or "mean" over nodes.   jump: pool the nodes after every round
    and add these up, each with weights of its own (jumping knowledge): K and T are the sums over rounds.
    """
    if min(degree, depth, hidden) < 1 or pool not in ("sum", "mean") or not w_std > 0 or not b_std >= 0:
        raise ValueError(f"degree={degree}, depth={depth}, hidden={hidden}, pool={pool!r}, w_std={w_std}, "
                         f"b_std={b_std}: expected three positive numbers, sum or mean, w_std > 0 and b_std >= 0")
    step = [("aggregate", degree)] + [("dense", w_std, b_std), ("relu",)] * hidden
    return (step + [("jump",)] * jump) * (depth - 1) + step + [(pool,), ("dense", w_std, b_std)]


def on(numbers):
    """The one of {"cpu": ..., "gpu": ...} for where this runs; that of a GPU for every other accelerator."""
    return numbers.get(jax.default_backend(), numbers["gpu"])


def _angle_coefficients(degree):
    """Chebyshev interpolant of arccos(1 - t) / (pi sqrt t), smooth on [0, 1], low power first."""
    interpolant = np.polynomial.Chebyshev.interpolate(
        lambda t: 2 * np.arcsin(np.sqrt(t / 2)) / (np.pi * np.sqrt(t)), degree, domain=[0, 1])
    return interpolant.convert(kind=np.polynomial.Polynomial).coef.tolist()


ANGLE = {"float32": _angle_coefficients(6), "float64": _angle_coefficients(19)}


def kappas(c):
    """kappa0(c), kappa1(c) of the cosine c, any shape, float32 or float64.

    With t = 1 - |c| and arccos |c| = pi sqrt(t) P(t), P a polynomial,
      kappa0 = 1 - sqrt(t) P(t) for c >= 0, sqrt(t) P(t) for c < 0
      kappa1 = max(c, 0) + t sqrt(t) Q(t),  Q_k = P_k / (k + 3/2), as kappa1' = kappa0
    so no arccos is called and nothing cancels as c -> -1.
    kappa0 has infinite slope at c = 1, so rounding of 1e-7 in c would cost 1e-4 in the NTK of an
    image with itself. A |c| within 16 units of rounding of 1 therefore counts as 1 (a CIFAR-10 image
    with itself came out within 9). Errors: 2e-7 in float32 and 2e-15 in float64, and in kappa0 of a
    c that is that close to 1 without being 1, up to 6e-4 and 3e-8.
    """
    t = 1 - jnp.abs(c)
    t = jnp.where(t < 16 * float(jnp.finfo(c.dtype).eps), jnp.zeros_like(t), t)
    P = Q = jnp.zeros_like(t)
    for k, coefficient in reversed(list(enumerate(ANGLE[c.dtype.name]))):
        P, Q = P * t + coefficient, Q * t + coefficient / (k + 1.5)
    root = 2 * jnp.sqrt(t / 4)  # not the same expression as below: XLA would store a shared root in
    return (jnp.where(c < 0, root * P, 1 - root * P),  # memory, and split the loop around it
            jnp.maximum(c, jnp.zeros_like(c)) + t * jnp.sqrt(t) * Q)


def window(K, width=3):
    """Mean over the 3 x `width` window moving in both images together, zeros outside: (h, w[, h, w]).

    A loop, so that XLA keeps the padded array: unrolled, it fuses padding and arithmetic into one
    loop that branches at every element, two to seven times slower on a CPU.
    """
    padded = jnp.pad(K, [(1, 1), (width // 2, width // 2)] * (K.ndim // 2))

    def add(k, total):
        return total + jax.lax.dynamic_slice(padded, (k // width, k % width) * (K.ndim // 2), K.shape)
    return jax.lax.fori_loop(0, 3 * width, add, jnp.zeros_like(K)) / (3 * width)


def pool(K):
    """Mean over 2 x 2 windows, in each image by itself: (h, w, h, w) -> (h/2, w/2, h/2, w/2)."""
    h, w = K.shape[0] // 2, K.shape[1] // 2
    return K.reshape(h, 2, w, 2, h, 2, w, 2).mean(axis=(1, 3, 5, 7))


def diagonal(K):
    """K[p, p]: (h, w, h, w) -> (h, w); what is carried as its diagonal stays as it is."""
    return jnp.einsum("ijij->ij", K) if K.ndim == 4 else K


def linear(layer, K, T):
    """K and T after any layer that mixes positions or channels linearly."""
    name = layer[0]
    if name == "mask":
        return K, T  # what it does is done by `masked`, before every layer
    if name in ("dense", "conv", "conv1d"):
        w_std, b_std = layer[1:]
        mean = {"dense": lambda k: k, "conv": window, "conv1d": lambda k: window(k, 1)}[name]
        K = w_std**2 * mean(K) + b_std**2
        return K, K + w_std**2 * mean(T)
    mean = {"pool": pool, "flatten": lambda k: diagonal(k).mean(), "gap": jnp.mean}[name]
    return mean(K), mean(T)


def graph_layer(layer, K, T, x1, x2, kept):
    """K and T (nodes, 1, nodes, 1) after a layer of GRAPH; x1, x2 (nodes, 1, features + 2 degree) name the
    neighbours.  kept: the (K, T) of the jumps so far, added up where the nodes are pooled."""
    name = layer[0]
    if name == "jump":
        kept.append((K, T))
        return K, T
    if name == "aggregate":
        A1, A2 = adjacency(x1, layer[1]), adjacency(x2, layer[1])
        return tuple(jnp.einsum("pr,risj,qs->piqj", A1, k, A2, precision="highest") for k in (K, T))
    weight1, weight2 = ((x != 0).any(axis=(1, 2)).astype(K.dtype) for x in (x1, x2))
    if name == "mean":
        weight1, weight2 = weight1 / weight1.sum(), weight2 / weight2.sum()
    K, T = (sum(ks) for ks in zip((K, T), *kept))
    return tuple(jnp.einsum("p,piqj,q->", weight1, k, weight2, precision="highest") for k in (K, T))


def adjacency(x, degree):
    """A (nodes, nodes) of a graph x (nodes, 1, features + 2 degree)."""
    numbers, weights = x[:, 0, -2 * degree:-degree].astype(jnp.int32), x[:, 0, -degree:]
    return jnp.zeros((len(x), len(x)), x.dtype).at[jnp.arange(len(x))[:, None], numbers].add(weights)


def features(layers, x):
    """x without what `aggregate` reads: (..., features)."""
    return x[..., :x.shape[-1] - 2 * next((layer[1] for layer in layers if layer[0] == "aggregate"), 0)]


def elementwise(layer, K, T, std1, std2):
    """K and T after a layer of ELEMENTWISE; std1 and std2 are sqrt(v) of the two inputs, zero for black patches."""
    def outer(a, b):
        return a.reshape(a.shape + (1,) * (K.ndim - a.ndim)) * b[(None,) * (K.ndim - b.ndim)]

    def inverse(s):
        return jnp.where(s > 0, 1 / jnp.where(s > 0, s, jnp.ones_like(s)), jnp.zeros_like(s))
    scale = outer(inverse(std1), inverse(std2))
    if layer[0] == "normalize":
        return K * scale, T * scale
    if layer[0] == "exp":
        E = jnp.exp(layer[1] * (K * scale - 1))
        return outer(std1, std2) * E, layer[1] * E * T
    kappa0, kappa1 = kappas(K * scale)
    return outer(std1, std2) * kappa1 / 2, kappa0 * T / 2


def covariance(x1, x2, pools):
    """The input layer, <x_p, x'_q> / channels: (h, w, channels) twice -> (h, w, h, w) or (h, w)."""
    subscripts = "ijc,klc->ijkl" if pools else "ijc,ijc->ij"
    return jnp.einsum(subscripts, x1, x2, precision="highest") / x1.shape[-1]


def exists(layers, x):
    """1 where the sequence x (length, 1, channels) has a position, else 0; None for images, which have all."""
    return (x != 0).any(axis=-1).astype(x.dtype) if layers[0] == ("mask",) else None


def masked(layer, K, T, exists1, exists2):
    """K and T as `layer` reads them: 0 where a position does not exist, and before flatten and gap scaled so
    that their mean over all positions is what the top of this file says."""
    if exists1 is None or K.ndim == 0:
        return K, T
    power = {"flatten": 0.5, "gap": 1.0}.get(layer[0], 0.0)
    exists1, exists2 = (e / e.mean() ** power for e in (exists1, exists2))
    both = exists1.reshape(exists1.shape + (1,) * (K.ndim - 2)) * exists2.reshape((1,) * (K.ndim - 2) + exists2.shape)
    return K * both, T * both


def deviations(layers, x):
    """sqrt(v) before each layer of ELEMENTWISE, for one input x (h, w, channels): the recursion of x with itself."""
    K, there = covariance(features(layers, x), features(layers, x), carries_pairs(layers)), exists(layers, x)
    stds, kept = [], []
    for layer in layers:
        K, _ = masked(layer, K, K, there, there)
        if layer[0] in ELEMENTWISE:
            stds.append(jnp.sqrt(diagonal(K)))
            K, _ = elementwise(layer, K, K, stds[-1], stds[-1])
        elif layer[0] in GRAPH:
            K, _ = graph_layer(layer, K, K, x, x, kept)
        else:
            K, _ = linear(layer, K, K)
    return stds


def pair(layers, kind, x1, x2, stds1, stds2):
    """k(x1, x2) of two inputs (h, w, channels), scalars: the recursion at the top of this file."""
    K = covariance(features(layers, x1), features(layers, x2), carries_pairs(layers))
    T = jnp.zeros_like(K)
    stds, there, kept = iter(zip(stds1, stds2)), (exists(layers, x1), exists(layers, x2)), []
    for layer in layers:
        K, T = masked(layer, K, T, *there)
        if layer[0] in GRAPH:
            K, T = graph_layer(layer, K, T, x1, x2, kept)
        else:
            K, T = elementwise(layer, K, T, *next(stds)) if layer[0] in ELEMENTWISE else linear(layer, K, T)
    return chosen(kind, K, T)


def chosen(kind, K, T):
    """K, T or a tuple of them, as kind ("nngp", "ntk" or a tuple of these) says; else ValueError."""
    unknown = set([kind] if isinstance(kind, str) else kind) - set(KINDS)
    if unknown or not kind:
        raise ValueError(f"kind {kind!r} is unknown; choose {' or '.join(KINDS)}, or a tuple of them")
    return (K, T)[KINDS.index(kind)] if isinstance(kind, str) else tuple(
        (K, T)[KINDS.index(k)] for k in kind)


def carries_pairs(layers):
    """True where some layer mixes p != q, so that all of K[p, q] is needed and not its diagonal."""
    return any(layer[0] in ("pool", "gap", *GRAPH) for layer in layers)


def as_images(layers, x):
    """x as (n, h, w, channels), checked against the network; a network that starts by flattening
    takes (n, d), and an image as one position with h*w*channels channels."""
    x = jnp.asarray(x)
    if 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}: at least one input, none of its sides empty")
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    if any(layer[0] in GRAPH for layer in layers):
        if x.ndim != 3 or not features(layers, x).shape[-1]:
            raise ValueError(f"x has shape {x.shape}; this network takes graphs (n, nodes, features + 2 degree)")
        return x[:, :, None]
    if layers[0][0] == "flatten" and x.ndim >= 2:
        return x.reshape(x.shape[0], 1, 1, -1)
    if layers[0][0] == "mask":
        if x.ndim != 3:
            raise ValueError(f"x has shape {x.shape}; this network takes sequences (n, length, channels)")
        return x[:, :, None]
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}; this network takes images (n, h, w, channels)")
    side = 2 ** sum(layer[0] == "pool" for layer in layers)
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

    name: one of NETWORKS or SEQUENCES, or a list of layers as `network` returns.
    kind: "nngp", "ntk", or a tuple of them for a tuple of matrices in one pass.
    options: depth, w_std, b_std, head, gamma of `network`.
    x1, x2: (n, h, w, channels), or (n, d) for fc, (n, length, channels) for sequences. Computed in float32, or
    in float64 where x1 is float64. fn(x) is fn(x, x), exactly symmetric. fn may be jitted, vmapped and pmapped.
    Raises ValueError: unknown name or kind, images that do not fit the network.
    """
    layers = network(name, **options)
    chosen(kind, None, None)

    @jax.jit
    def fn(x1, x2=None):
        if x2 is None:
            return jax.tree.map(lambda K: jnp.triu(K) + jnp.triu(K, 1).T, fn(x1, x1))
        x1, x2 = as_pair(layers, x1, x2)
        positions = x1.shape[1] * x1.shape[2]
        size = positions**2 if carries_pairs(layers) else positions
        cols = len(x2) if size == 1 else BLOCK // size
        rows = len(x1) if size == 1 else BLOCK // (size * len(x2))
        a, b = ((x, blocked(lambda one: deviations(layers, one), x, BLOCK // size))
                for x in (x1, x2))
        return blocked(lambda one: blocked(
            lambda two: pair(layers, kind, one[0], two[0], one[1], two[1]), b, cols), a, rows)
    return fn


def blocked(f, xs, size):
    """vmap of f over the leading axis of xs, `size` at a time (at least one)."""
    n = jax.tree.leaves(xs)[0].shape[0]
    return jax.vmap(f)(xs) if size >= n else jax.lax.map(f, xs, batch_size=max(1, size))


def stax():
    """The module neural_tangents.stax, 0.6.5, on a JAX that is newer than its last release.

    The package's __init__ imports TensorFlow and names that JAX has removed; an empty package with
    the right __path__ stands in for it. jax.random.KeyArray is the one removed name stax needs.
    """
    if "neural_tangents" not in sys.modules:
        spec = importlib.util.find_spec("neural_tangents")
        if spec is None:
            raise ImportError("neural_tangents is not installed: "
                              "pip install --no-deps -r requirements.txt")
        package = types.ModuleType("neural_tangents")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["neural_tangents"] = package
        jax.random.KeyArray = jax.Array
    from neural_tangents import stax as module
    return module


def reference_fn(name, kind, **options):
    """The same network built with neural_tangents.stax; same signature and result as kernel_fn.

    But for sequences of several lengths: its flatten divides by the length of the array, not by their own.
    """
    nt = stax()
    layers = network(name, **options)
    build = {
        "dense": lambda w_std, b_std: nt.Dense(1, W_std=w_std, b_std=b_std),
        "conv": lambda w_std, b_std: nt.Conv(1, (3, 3), padding="SAME", W_std=w_std, b_std=b_std),
        "conv1d": lambda w_std, b_std: nt.Conv(1, (3, 1), padding="SAME", W_std=w_std, b_std=b_std),
        "relu": nt.Relu, "pool": lambda: nt.AvgPool((2, 2), (2, 2)), "flatten": nt.Flatten,
        "gap": nt.GlobalAvgPool, "mean": nt.GlobalAvgPool, "sum": nt.GlobalSumPool,
        "aggregate": lambda degree: nt.Aggregate((1, 2), 0, 3),
        "normalize": lambda: nt.LayerNorm(-1, eps=0.0), "exp": lambda gamma: nt.ExpNormalized(gamma)}
    kernel = nt.serial(*[build[layer[0]](*layer[1:]) for layer in layers if layer != ("mask",)])[2]
    mask = {"mask_constant": 0.0} if layers[0] == ("mask",) else {}

    @jax.jit
    def fn(x1, x2=None):
        x1, x2 = as_images(layers, x1), x2 if x2 is None else as_images(layers, x2)
        if not any(layer[0] in GRAPH for layer in layers):
            return kernel(x1, x2, kind, **mask)
        degree = next(layer[1] for layer in layers if layer[0] == "aggregate")
        pattern = tuple(jax.vmap(lambda one: adjacency(one, degree).T[:, None, :, None])(x) for x in (x1, x2))
        return kernel(features(layers, x1), features(layers, x2), kind, pattern=pattern)
    return fn
