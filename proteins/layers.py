"""Layers for sequences, added to the layers of kernel.py: mask, conv1d, seq_flatten, seq_gap.

A sequence is an image one position wide, (length, 1, channels). A network for sequences begins with ("mask",). Positions whose
channels are all zero are padding, as at the end of the shorter sequences of an array. They are masked, so padding never
changes k(x, x'): K[p, q] = T[p, q] = 0 if p or q is padding. With l and l' positions that are not padding,

  conv1d       K <- w_std^2 (mean over the 3 positions of a window that moves in both sequences together) + b_std^2, masked
  seq_gap      the sum over p, q divided by l l', as in neural_tangents
  seq_flatten  the sum of [p, p] over the positions p of both, divided by sqrt(l l'): the readout of a sequence is scaled by
               its own length. It is positive definite, and k(x, x) does not shrink with length. If l = l' it is the mean.

Proved by: proteins/test_proteins.py
"""

import kernel


def exists(x):
    """(length, 1): 0 at the positions of x (length, 1, channels) that are padding, 1 at the others."""
    return (x != 0).any(axis=-1).astype(x.dtype)


def masked(K, one, two, power=0.0):
    """K, set to 0 where either input has padding, and divided by (l / length)^power (l' / length)^power.
    ValueError: the network does not begin with mask."""
    if "mask" not in one.notes:
        raise ValueError("conv1d, seq_flatten and seq_gap need the mask: a network for sequences begins with (\"mask\",)")
    e1, e2 = (e / e.mean() ** power for e in (exists(one.x), exists(two.x)))
    return K * kernel.outer(K, e1, e2)


@kernel.layer("mask")
def mask(layer, K, T, one, two):
    one.notes["mask"] = True
    return K, T  # padding is zero, so its K is zero already


@kernel.layer("conv1d", 2)
def conv1d(layer, K, T, one, two):
    return tuple(masked(k, one, two) for k in kernel.dense(layer, K, T, one, two, lambda k: kernel.window(k, 1)))


@kernel.layer("seq_flatten", ends=True)
def seq_flatten(layer, K, T, one, two):
    return kernel.flatten(layer, *(masked(k, one, two, 0.5) for k in (K, T)), one, two)


@kernel.layer("seq_gap", pairs=True, ends=True)
def seq_gap(layer, K, T, one, two):
    return kernel.gap(layer, *(masked(k, one, two, 1.0) for k in (K, T)), one, two)


def check(layers):
    """ValueError: no seq_flatten or seq_gap, or before it a layer that does not keep padding masked."""
    names = [layer[0] for layer in layers]
    end = next((i for i, name in enumerate(names) if name.startswith("seq_")), len(names))
    if set(names[1:end]) - {"conv1d", "relu", "normalize", "exp"} or end == len(names):
        raise ValueError(f"got the layers {layers}; expected (\"mask\",), then any number of (\"conv1d\", w_std, b_std) and "
                         "relu, then (\"seq_flatten\",) or (\"seq_gap\",), then dense and relu")


def positions(layers, x):
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}; this network takes sequences (n, length, channels)")
    return x[:, :, None]


def network(end, convolutions):
    """(depth, w_std, b_std) -> layers, for kernel.NETWORKS: `depth` convolutions and then `end`, or `end` and dense layers."""
    def layers(depth, w_std, b_std):
        conv, dense = [("conv1d", w_std, b_std), ("relu",)], [("dense", w_std, b_std), ("relu",)]
        steps = [conv * (depth or 3), [(end,)]] if convolutions else [[(end,)], dense * (depth or 3)]
        return [("mask",)] + steps[0] + steps[1]
    return layers


kernel.INPUTS["mask"] = kernel.Input(check, positions, lambda layers, x: x)
SEQUENCES = {"seq_fc": network("seq_flatten", False), "seq_cnn": network("seq_flatten", True),
             "seq_cnn_gap": network("seq_gap", True)}  # depth: hidden layers or convolutions, 3 by default
kernel.NETWORKS.update(SEQUENCES)
# neural_tangents' flatten divides by the length of the array, not by sqrt(l l'): equal only for sequences without padding
kernel.REFERENCE.update({
    "mask": None, "seq_flatten": kernel.REFERENCE["flatten"], "seq_gap": kernel.REFERENCE["gap"],
    "conv1d": lambda nt, w_std, b_std: nt.Conv(1, (3, 1), padding="SAME", W_std=w_std, b_std=b_std),
    "inputs of mask": lambda layers, x1, x2: ((x1, x2), {"mask_constant": 0.0})})
