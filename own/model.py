"""A fitted model in a file (--save), and its predictions for new images (--load FILE --predict FILE).

The file is an .npz without pickle. It holds what f(x) = k(x, X) alpha needs: alpha, the training images X, which copies of
them are rows, the whitening, and the network.

    model.save("digits.npz", model.Model(alpha, x_train, view, whiten, about));   fitted = model.load("digits.npz")

Proved by: own/test_own.py
"""

import json
import os
import zipfile
from typing import NamedTuple

import numpy as np

import augment
import data
import tiles

FORMAT = 2  # of the file


class Model(NamedTuple):
    """A fitted model, as a file holds it."""
    alpha: np.ndarray  # (rows, c) float64
    support: np.ndarray  # (n, h, w, channels) uint8, or float32 if such images were read
    view: augment.View  # rows of alpha -> images
    whiten: data.Whitening
    about: dict  # names of the classes, layers, kind, flips, tile, and the record of the run


def save(path, model):
    """Write a Model to a file, completely or not at all.  OSError: it cannot be written."""
    arrays = {"alpha": model.alpha, "support": model.support,
              **{f"view_{name}": value for name, value in model.view._asdict().items()},
              **{f"whiten_{name}": value for name, value in model.whiten._asdict().items()}}
    with data.replacing(path) as file:
        np.savez(file, format=FORMAT, about=json.dumps(model.about), **arrays)


def load(path):
    """The Model in a file.  ValueError: not a model, or damaged.  FileNotFoundError."""
    try:
        with np.load(data.existing(path, "--load takes a file that --save has written"), allow_pickle=False) as file:
            arrays = dict(file)
        if int(arrays["format"]) != FORMAT:
            raise ValueError(f"format {arrays['format']}, and this program reads {FORMAT}")
        view = {name: arrays[f"view_{name}"] for name in augment.View._fields}
        view.update(pad=int(view["pad"]), copies=int(view["copies"]))
        whiten = data.Whitening(*(arrays[f"whiten_{name}"] for name in data.Whitening._fields))
        model = Model(arrays["alpha"], arrays["support"], augment.View(**view), whiten,
                      json.loads(str(arrays["about"])))
        if (len(model.alpha) != len(model.view.original) or model.support.dtype not in (np.uint8, np.float32)
                or not np.isfinite(model.alpha).all()):
            raise ValueError("its arrays do not fit each other")
        return model
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a model that --save has written, or damaged: {error!r}") from error


def predict(args, network_kernel):
    """Scores of the images in args.predict by the model in args.load: {"scores": (m, classes), "path": where they are}.

    args: of train_cifar.py.   network_kernel: (engine, layers, flips, kind) -> kernel_fn.
    """
    fitted = load(args.load)
    about, x = fitted.about, images(args.predict, fitted.support)
    kernel_fn = network_kernel(args.engine, [tuple(layer) for layer in about["layers"]], about["flips"], about["kind"])
    K = tiles.cross(kernel_fn, augment.expand(len(x)).of(x, fitted.whiten),
                    fitted.view.of(fitted.support, fitted.whiten), about["tile"], quiet=args.quiet)
    scores, path = K.matvec(fitted.alpha), os.path.join(args.out, "predictions.npy")
    os.makedirs(args.out, exist_ok=True)
    with data.replacing(path) as file:
        np.save(file, scores)
    names = about.get("names") or range(scores.shape[1])
    classes = ", ".join(str(names[i]) for i in scores[:10].argmax(axis=1))
    print(f"{len(x)} images, classes {classes}{', ...' if len(x) > 10 else ''}; "
          f"their scores {scores.shape} are in {path}")
    return {"scores": scores, "path": path}


def images(path, support):
    """The images of an .npy file, checked: dtype and shape as of those that the model was trained on."""
    x, want = data.array(path, hint="--predict takes an .npy file of images, (m, h, w, channels)"), support.dtype
    x = x.astype(want) if x.dtype.kind == want.kind == "f" else x
    if x.dtype != want or x.shape[1:] != support.shape[1:] or not len(x):
        raise ValueError(f"{path} holds {x.dtype} {x.shape}; the model was trained on images {want} (m, "
                         f"{', '.join(map(str, support.shape[1:]))})")
    if not np.isfinite(x).all():
        raise ValueError(f"{path} holds {np.sum(~np.isfinite(x))} numbers that are not finite: remove those images")
    return x
