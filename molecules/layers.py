"""Layers for graphs, added to the layers of kernel.py: aggregate, jump, sum, mean; and gcn, a network of them.

Du et al. 2019. Positions are nodes, numbered in any order. x is (n, nodes, features + 2 degree). The row of node p holds its
features, then the numbers q of up to `degree` nodes from which it aggregates (often including p itself), then the weights
A[p, q]. A graph with fewer nodes ends in rows of zeros. These are padding: no pool counts them and no weight leads to them.

  aggregate   K <- A K A'^T, with A and A' of the two graphs                     T likewise
  jump        K and T of this round are pooled too and added at the end (jumping knowledge): each round has its own weights
  sum, mean   sum or mean of K over pairs of nodes that are not padding          T likewise

Proved by: molecules/test_molecules.py
"""

import jax
import jax.numpy as jnp

import kernel


@kernel.layer("aggregate", 1, pairs=True)
def aggregate(layer, K, T, one, two):
    A1, A2 = adjacency(one.x, layer[1]), adjacency(two.x, layer[1])
    return tuple(jnp.einsum("pr,risj,qs->piqj", A1, k, A2, precision="highest") for k in (K, T))


@kernel.layer("jump", pairs=True)
def jump(layer, K, T, one, two):
    one.notes.setdefault("jumps", []).append((K, T))
    return K, T


@kernel.layer("sum", pairs=True, ends=True)
def pool_sum(layer, K, T, one, two, weigh=lambda e: e):
    weight1, weight2 = (weigh((side.x != 0).any(axis=(1, 2)).astype(K.dtype)) for side in (one, two))
    K, T = (sum(ks) for ks in zip((K, T), *one.notes.get("jumps", [])))
    return tuple(jnp.einsum("p,piqj,q->", weight1, k, weight2, precision="highest") for k in (K, T))


@kernel.layer("mean", pairs=True, ends=True)
def pool_mean(layer, K, T, one, two):
    return pool_sum(layer, K, T, one, two, lambda e: e / e.sum())


def adjacency(x, degree):
    """The adjacency A (nodes, nodes) of a graph x (nodes, 1, features + 2 degree)."""
    numbers, weights = x[:, 0, -2 * degree:-degree].astype(jnp.int32), x[:, 0, -degree:]
    return jnp.zeros((len(x), len(x)), x.dtype).at[jnp.arange(len(x))[:, None], numbers].add(weights)


def features(layers, x):
    """The features of x (..., features + 2 degree), without numbers and weights: (..., features)."""
    return x[..., :x.shape[-1] - 2 * layers[0][1]]


def positions(layers, x):
    if x.ndim != 3 or features(layers, x).shape[-1] < 1:
        raise ValueError(f"x has shape {x.shape}; this network takes graphs (n, nodes, features + 2 degree)")
    return x[:, :, None]


def gcn(degree, depth=3, hidden=1, pool="sum", jump=False, w_std=2**0.5, b_std=0.0):
    """The layers of a graph network: `depth` rounds of aggregate and `hidden` times (dense, relu); then a pool and dense.

    degree: as in x, see the top.   pool: "sum" or "mean" over nodes.   jump: pool the nodes after every round, each round
    with its own weights (jumping knowledge): K and T are then sums over rounds.   ValueError: a value out of range.
    """
    if min(degree, depth, hidden) < 1 or pool not in ("sum", "mean") or not w_std > 0 or not b_std >= 0:
        raise ValueError(f"degree={degree}, depth={depth}, hidden={hidden}, pool={pool!r}, w_std={w_std}, "
                         f"b_std={b_std}: expected three positive numbers, sum or mean, w_std > 0 and b_std >= 0")
    step = [("aggregate", degree)] + [("dense", w_std, b_std), ("relu",)] * hidden
    return (step + [("jump",)] * jump) * (depth - 1) + step + [(pool,), ("dense", w_std, b_std)]


def _reference(layers, x1, x2):
    """The inputs for neural_tangents, which takes A as an argument of its own, `pattern`."""
    degree = layers[0][1]
    pattern = tuple(jax.vmap(lambda graph: adjacency(graph, degree).T[:, None, :, None])(x) for x in (x1, x2))
    return (features(layers, x1), features(layers, x2)), {"pattern": pattern}


kernel.INPUTS["aggregate"] = kernel.Input(lambda layers: None, positions, features)
kernel.REFERENCE.update({
    "aggregate": lambda nt, degree: nt.Aggregate((1, 2), 0, 3), "sum": lambda nt: nt.GlobalSumPool(),
    "mean": lambda nt: nt.GlobalAvgPool(), "inputs of aggregate": _reference})
