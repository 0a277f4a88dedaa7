"""A fitted regression in one file, and predictions from it without the training data.

The file is an .npz without pickle: dual coefficients, the training images they belong to (as bytes, with
the augmentation as an index, see augment.py), the whitening, and what kernel it was, as JSON.

  f(x) = sum over rows r of k(whiten(x), view(whiten(support))_r) alpha_r

    python train_cifar.py --save digits.npz
    python train_cifar.py --load digits.npz --predict images.npy      # uint8 (m, h, w, channels)

Cost: 3,072 bytes an image of 32 x 32 and 80 a row; a prediction n kernel entries.
Proved by: test_all.py, section model
"""

import json
import zipfile
from typing import NamedTuple

import numpy as np

import augment
import data
import store

FORMAT = 2


class Model(NamedTuple):
    """What a file holds."""
    alpha: np.ndarray  # (rows, c) float64
    support: np.ndarray  # (n, h, w, channels) uint8, as they were read
    view: augment.View  # rows of alpha -> images
    whiten: data.Whitening
    about: dict  # layers, kind, flips, tile, and whatever else was recorded


def save(path, model):
    """Write it, all or nothing.  OSError: it cannot be written."""
    arrays = {"alpha": model.alpha, "support": model.support,
              **{f"view_{name}": value for name, value in model.view._asdict().items()},
              **{f"whiten_{name}": value for name, value in model.whiten._asdict().items()}}
    with store.replacing(path) as file:
        np.savez(file, format=FORMAT, about=json.dumps(model.about), **arrays)


def load(path):
    """The Model of a file.  ValueError: it is not one, or damaged.  FileNotFoundError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if int(arrays["format"]) != FORMAT:
            raise ValueError(f"format {arrays['format']}, and this program reads {FORMAT}")
        view = {name: arrays[f"view_{name}"] for name in augment.View._fields}
        view.update(pad=int(view["pad"]), copies=int(view["copies"]))
        whiten = data.Whitening(*(arrays[f"whiten_{name}"] for name in data.Whitening._fields))
        model = Model(arrays["alpha"], arrays["support"], augment.View(**view), whiten,
                      json.loads(str(arrays["about"])))
        if (len(model.alpha) != len(model.view.original) or model.support.dtype != np.uint8
                or not np.isfinite(model.alpha).all()):
            raise ValueError("its arrays do not fit each other")
        return model
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there; --load takes a file that --save has written") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a model that --save has written, or damaged: {error!r}") from error


def images(path, shape):
    """The images of an .npy file, checked: uint8 (m, *shape)."""
    try:
        x = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there; --predict takes an .npy file of uint8 images, (m, h, w, "
                                "channels)") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a complete .npy array without pickle: {error}") from error
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.shape[1:] != shape or not len(x):
        got = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {got}; the model was trained on images uint8 (m, "
                         f"{', '.join(map(str, shape))})")
    return x
