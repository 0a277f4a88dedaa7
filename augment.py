"""Flips and crops as an index on the data set; flips at a quarter of the price.

An augmented data set of n images is a list of rows (original, flip, offset); the images themselves
are made when a tile asks for them, never all at once. With C crops and flips there are

  copies = C (1 + flips) rows an image, row = original * copies + copy,

so that all copies of the first k images are the first k * copies rows: a leading block of K is the
kernel of a smaller augmented set. Copy 0 is the original. A crop pads the image with `pad` zeros and
cuts it out again at `offset`, each coordinate in 0 ... 2 pad; (pad, pad) is the image itself.
The paper's 20x CIFAR-10 is expand(50000, flips=True, crops=10), a million rows.

Half of them need not be rows. With f the mirror image, k(f x, f x') = k(x, x') for every kernel here, so

  K of {x_i} and {f x_i} = [[A, B], [B, A]],     A = k(x_i, x_j),  B = k(x_i, f x_j),

both symmetric. Where labels are equal, (alpha, alpha) with (A + B + lambda I) alpha = y solves it, and
f(t) = sum over j of (k(t, x_j) + k(t, f x_j)) alpha_j: the regression on {x_i} alone with the kernel
k(x, x') + k(x, f x'), which `symmetric` makes. The same predictions, not an approximation, from half of the
entries, a quarter of the memory and of each product. Crops are no group: padding forgets what it cut off.

    view = augment.expand(len(x), flips=True, crops=10, seed=0)
    K = tiles.gram(kernel_fn, view.of(x));   y = y[view.original]

Cost: 25 bytes a row.      Proved by: test_all.py, section augment
"""

from typing import NamedTuple

import jax
import numpy as np


def mirror(x):
    """f x: images (n, h, w, channels), left for right.  ValueError: other shapes."""
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}: only images (n, h, w, channels) have mirror images")
    return x[:, :, ::-1]


def symmetric(kernel_fn):
    """The kernel k(x, x') + k(x, f x') of a kernel_fn(x1, x2=None) that is k(x, x') and may return several.

    fused.kernel_fn(..., flips=True) is the same, and shares what the two have in common.
    """
    def fn(x1, x2=None):
        return jax.tree.map(lambda a, b: a + b, kernel_fn(x1, x2), kernel_fn(x1, mirror(x1 if x2 is None else x2)))
    return fn


class View(NamedTuple):
    """Rows of an augmented data set: which image, whether flipped, cut out where."""
    original: np.ndarray  # (N,) int64
    flip: np.ndarray  # (N,) bool
    offset: np.ndarray  # (N, 2) int64, (down, right)
    pad: int
    copies: int

    def of(self, x):
        """The augmented images of x (n, h, w, channels): an object with len() and [rows]."""
        return Images(x, self)


class Images:
    """What `tiles.gram` takes for x: images of a view, made when asked for."""

    def __init__(self, x, view):
        if x.ndim != 4 or view.original.max() >= len(x):
            raise ValueError(f"x has shape {x.shape}; this view needs images (n, h, w, channels) "
                             f"with n >= {view.original.max() + 1}")
        self.x, self.view = x, view

    def __len__(self):
        return len(self.view.original)

    def __getitem__(self, rows):
        """Images (len(rows), h, w, channels): crop first, then flip."""
        original, flip, offset, pad, _ = self.view
        h, w = self.x.shape[1:3]
        padded = np.pad(self.x[original[rows]], ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        i = offset[rows, 0, None] + np.arange(h)
        j = offset[rows, 1, None] + np.arange(w)
        j = np.where(flip[rows, None], j[:, ::-1], j)
        return padded[np.arange(len(i))[:, None, None], i[:, :, None], j[:, None, :]]


def expand(n, flips=False, crops=1, seed=0, pad=4):
    """The view of n images with every crop of every image, and its mirror image if `flips`.

    crops: crops an image, the first of them the image itself; the others are drawn without
    repetition among the (2 pad + 1)^2 - 1 shifts, for each image its own. seed: of those draws.
    Raises ValueError: more crops than there are.
    """
    shifts = (2 * pad + 1) ** 2
    if n < 1 or not 1 <= crops <= shifts:
        raise ValueError(f"n={n}, crops={crops}: need n >= 1 and 1 <= crops <= {shifts}, the number "
                         f"of crops with {pad} pixels of padding")
    rng = np.random.default_rng(seed)
    centre = shifts // 2
    drawn = np.array([rng.choice(shifts - 1, crops - 1, replace=False) for _ in range(n)], np.int64)
    chosen = np.full((n, crops), centre)
    chosen[:, 1:] = drawn + (drawn >= centre)  # every shift but the centre
    mirrored = 1 + bool(flips)
    chosen = np.repeat(chosen.reshape(-1), mirrored)
    return View(np.repeat(np.arange(n), crops * mirrored),
                np.tile(np.arange(mirrored) == 1, n * crops),
                np.stack([chosen // (2 * pad + 1), chosen % (2 * pad + 1)], axis=1),
                pad, crops * mirrored)
