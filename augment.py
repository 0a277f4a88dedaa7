"""Flips and crops as an index on the data set; flips at half the price.

An augmented data set of n images is a list of rows (original, flip, offset). The images themselves are made when a tile asks
for them, never all at once. With C crops and flips there are

  copies = C (1 + flips) rows an image, row = original * copies + copy,

so that all copies of the first k images are the first k * copies rows: a leading block of K is the kernel matrix of a smaller
augmented set. Copy 0 is the original. A crop pads the image by `pad` pixels of one colour on each side and cuts it out again
at `offset`, each coordinate in 0 ... 2 pad; (pad, pad) is the image itself. The paper's 20x CIFAR-10 is
expand(50000, flips=True, crops=10), a million rows.

Mirror images need not be rows. With x* the mirror image of x, k(x*, x'*) = k(x, x') for every kernel here, so that

  K of {x_i} and {x_i*} = [[K_1, K_2], [K_2, K_1]],     K_1 = k(x_i, x_j),  K_2 = k(x_i, x_j*),

and both blocks are symmetric. An image and its mirror image have the same label, so (alpha, alpha) is the solution if
(K_1 + K_2 + lambda I) alpha = y, and f(t) = sum over j of (k(t, x_j) + k(t, x_j*)) alpha_j. This is the regression on {x_i}
alone with the kernel k(x, x') + k(x, x'*), which `symmetric` makes. The predictions are the same, not an approximation;
half of the entries are computed, a quarter is kept and multiplied. Crops allow no such shortcut: a crop loses pixels.

    view = augment.expand(len(x), flips=True, crops=10, seed=0)
    K = tiles.gram(kernel_fn, view.of(x));   y = y[view.original]

Cost: 25 bytes a row.      Proved by: test_all.py, section augment
"""

import copy
import math
from collections import OrderedDict
from typing import NamedTuple

import jax
import numpy as np

KEPT = 5 * 2**27  # bytes of whitened images: 54,000 of CIFAR-10


def mirror(x):
    """x*: images (n, h, w, channels), left for right.  ValueError: other shapes."""
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}: only images (n, h, w, channels) have mirror images")
    return x[:, :, ::-1]


def symmetric(kernel_fn):
    """The kernel k(x, x') + k(x, x'*) of a kernel_fn(x1, x2=None) that is k(x, x') and may return several.

    fused.kernel_fn(..., flips=True) is the same, and shares what the two have in common.
    """
    def fn(x1, x2=None):
        return jax.tree.map(lambda a, b: a + b, kernel_fn(x1, x2), kernel_fn(x1, mirror(x1 if x2 is None else x2)))
    return fn


class View(NamedTuple):
    """Rows of an augmented data set: which image, whether flipped, cut out where."""
    original: np.ndarray  # (rows,) int64
    flip: np.ndarray  # (rows,) bool
    offset: np.ndarray  # (rows, 2) int64, (down, right)
    pad: int
    copies: int

    def of(self, x, whiten=None):
        """The augmented images of x (n, h, w, channels): an object with len() and [rows]."""
        return Images(x, self, whiten)


class Images:
    """What `tiles.gram` takes for x: images of a view, flipped, cropped and whitened when a tile asks for them.

    images[rows] are those rows, still to be made; images.on(device) makes them.
    """

    def __init__(self, x, view, whiten=None):
        """x: (n, h, w, channels), kept as it is.   whiten: a data.Whitening, or None."""
        if x.ndim != 4 or view.original.max(initial=0) >= len(x):
            raise ValueError(f"x has shape {x.shape}; this view needs images (n, h, w, channels) "
                             f"with n >= {view.original.max() + 1}")
        self.x, self.view, self.whiten = x, view, whiten
        self.rows = np.arange(len(self))  # of the whole, of which this may be a part
        self.placed, self.made = {}, OrderedDict()  # the whitening on each device; blocks made lately

    def __len__(self):
        return len(self.view.original)

    @property
    def shape(self):
        return (len(self), *self.x.shape[1:])

    @property
    def kept(self):
        """How many whitened images are kept; see `on`."""
        W = (0, 0) if self.whiten is None else self.whiten.W.shape
        return KEPT // (4 * (W[1] or math.prod(self.shape[1:])))

    def __getitem__(self, rows):
        part, (original, flip, offset, pad, copies) = copy.copy(self), self.view
        part.view = View(original[rows], flip[rows], offset[rows], pad, copies)
        part.rows = self.rows[rows]
        return part

    def pixels(self):
        """The images before they are whitened, (len, h, w, channels), as x: crop first, then flip.

        Padding has the mean colour of the images that the whitening was fitted on, or is 0 without one. With black
        padding the leave-one-out error of zca and zca_unit was larger in each of six comparisons (CIFAR-10, fc NNGP, 500
        images in 4 crops, three subsets).
        """
        original, flip, offset, pad, _ = self.view
        x, (h, w) = self.x[original], self.x.shape[1:3]
        moved = (offset != pad).any(axis=1)
        if moved.any():
            padded = np.empty((moved.sum(), h + 2 * pad, w + 2 * pad, x.shape[3]), x.dtype)
            padded[:] = 0 if self.whiten is None else self.whiten.colour
            padded[:, pad:pad + h, pad:pad + w] = x[moved]
            i, j = (offset[moved, axis, None] + np.arange(side) for axis, side in enumerate((h, w)))
            x[moved] = padded[np.arange(len(i))[:, None, None], i[:, :, None], j[:, None, :]]
        x[flip] = x[flip, :, ::-1]
        return x

    def on(self, device):
        """The images (len, h, w, channels), or (len, 1, 1, components): float32 where they are whitened, else of x's dtype. A
        JAX array on the device, or for a CPU a NumPy array, which needs no compiler.

        The blocks made last are kept, up to KEPT bytes: whitening costs 2 d^2 operations an image.
        """
        key, host = self.rows.tobytes(), jax.default_backend() == "cpu"
        if key not in self.made:
            x, whiten = self.pixels(), self.whiten
            if not host:
                x = jax.device_put(x, device)
                if device not in self.placed:
                    self.placed[device] = jax.device_put(whiten, device)
                whiten = self.placed[device]
            self.made[key] = x if whiten is None else whiten(x)
            while len(self.made) > 1 and sum(map(len, self.made.values())) > self.kept:
                self.made.popitem(last=False)
        self.made.move_to_end(key)
        return self.made[key] if host else jax.device_put(self.made[key], device)


def expand(n, flips=False, crops=1, seed=0, pad=4):
    """The view of n images: `crops` crops of each, and their mirror images if `flips`.

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
    chosen = np.full((n, crops), centre)
    if crops > 1:
        drawn = np.array([rng.choice(shifts - 1, crops - 1, replace=False) for _ in range(n)], np.int64)
        chosen[:, 1:] = drawn + (drawn >= centre)  # every shift but the centre
    mirrored = 1 + bool(flips)
    chosen = np.repeat(chosen.reshape(-1), mirrored)
    return View(np.repeat(np.arange(n), crops * mirrored),
                np.tile(np.arange(mirrored) == 1, n * crops),
                np.stack([chosen // (2 * pad + 1), chosen % (2 * pad + 1)], axis=1),
                pad, crops * mirrored)
