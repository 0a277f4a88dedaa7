"""A fitted model in a file (--save FILE), and its predictions for new rows (--load FILE --predict FILE).

  f(x) = k(x, X) alpha     sd(x)^2 = s^2 (k(x, x) + lambda - k(x, X) A^-1 k(X, x)), with --variance (uncertainty.py)

The file is an .npz without pickle: alpha, the training rows X as they were read, and in JSON whatever else f needs. Here is
what every model has in common, and the predictions for images; proteins/predict.py and molecules/predict.py have theirs.

The probability of a class is that of its output being the largest, if each of the c outputs is normal with mean f and standard
deviation sd. One-hot targets minus 1/c sum to zero, so the outputs and their errors do: the covariance of the errors is
sd^2 (I - 1 1^T / c) c / (c - 1), and with two classes the probability is Phi(f / sd). Without --variance, sd is the same for
all rows: the root mean squared error on rows that the fit left out (leave-one-out, or the rows held out).

    about, arrays = model.load("digits.npz", "images")

Proved by: own/test_own.py
"""

import json
import os

import numpy as np

import augment
import data
import experiment
import regression
import tiles
from own import images, tables, uncertainty

PREDICTIONS = "predictions.csv"
FORMAT = 3  # of the file
SHOWN = 5  # predictions that are printed


def save(path, what, about, **arrays):
    """Write a model to a file, completely or not at all.

    what: images, proteins or molecules.   about: a dict that JSON can hold.   arrays: alpha (n, c), and others.
    OSError: it cannot be written.
    """
    with data.replacing(path) as file:
        np.savez(file, format=FORMAT, about=json.dumps({"what": what, **about}), **arrays)


def load(path, what):
    """(about, arrays) of a model of images, proteins or molecules.  ValueError: another file, or damaged.
    FileNotFoundError."""
    with data.intact(path, "is not a model that --save has written, or damaged", "fit and --save it again"):
        with np.load(data.existing(path, "--load takes a file that --save has written"), allow_pickle=False) as file:
            arrays = dict(file)
        if int(arrays.pop("format")) != FORMAT:
            raise ValueError(f"another format than {FORMAT}, which this program reads")
        about = json.loads(str(arrays.pop("about")))
        if not np.isfinite(arrays["alpha"]).all():
            raise ValueError("alpha is not finite")
    if about["what"] != what:
        raise ValueError(f"{path} is a model of {about['what']}, and this program predicts {what}")
    return about, arrays


def start(args, what):
    """`load` of args.load, before any work is done.  ValueError: --variance with an NTK.  OSError: the predictions cannot be
    written into args.out."""
    about, arrays = load(args.load, what)
    if args.variance:
        covariance(about)
    experiment.writable(args.out, PREDICTIONS)
    return about, arrays


def fitted(found, solver, y, alpha):
    """What `deviation` needs of a fit, as a dict.  found: a result of `regression.fit`."""
    mse = found.get("loo_mse") or min((mse for *_, mse in found["search"]), default=None)
    return {"ridge": found["ridge"], "diagonal": float(solver.scale), "prior_scale": uncertainty.prior_scale(y, alpha),
            "error": mse and mse**0.5}


def covariance(about):
    """ValueError: the kernel of this model is the NTK, which is not a covariance."""
    if about["kind"] != "nngp":
        raise ValueError(f"--variance with a model of kind {about['kind']}: the NTK is not the covariance of a process that "
                         "the network samples; fit one with --kind nngp")


def deviation(about, K, K_test, k_test, quiet=True):
    """The predictive standard deviation of each new row, (m,): one solve a row.

    about: with the entries of `fitted`.   K: (n, n) of the training rows.   K_test: (m, n).   k_test: k(x, x), (m,).
    ValueError: as of `covariance`.
    """
    covariance(about)
    solver = regression.Solver(K, ridges=[about["ridge"]], prior=np.full(K.shape[0], about["diagonal"]), quiet=quiet)
    return np.sqrt(about["prior_scale"] * uncertainty.variance(solver, K_test, k_test, about["ridge"]))


def predict(args, network_kernel):
    """Classes of the images in args.predict by the model in args.load, written to predictions.csv in args.out.

    args: of train_cifar.py.   network_kernel: (engine, layers, flips, kind) -> kernel_fn.
    Returns {"path", "classes" (m,), "scores" (m, c), "sd" (m,) or None, "probabilities" (m, c) or None}.
    """
    about, arrays = start(args, "images")
    view = augment.View(**{name: arrays[f"view_{name}"] for name in ("original", "flip", "offset")},
                        pad=about["pad"], copies=about["copies"])
    whiten = data.Whitening(*(arrays[f"whiten_{name}"] for name in data.Whitening._fields))
    names, rows, new = images.new(args.predict, arrays["support"], about["resize"])
    x, x_new = view.of(arrays["support"], whiten), augment.expand(len(new)).of(new, whiten)
    kernel_fn = network_kernel(args.engine, [tuple(layer) for layer in about["layers"]], about["flips"], about["kind"])
    K_test = tiles.cross(kernel_fn, x_new, x, about["tile"], quiet=args.quiet)
    f, sd, p = K_test.matvec(arrays["alpha"]), None, None
    if args.variance:
        K = tiles.gram(kernel_fn, x, about["tile"], quiet=args.quiet)
        sd = deviation(about, K, K_test, tiles.diagonal(kernel_fn, x_new, 16), args.quiet)
    if sd is not None or about["error"]:
        p = uncertainty.probabilities(f, about["error"] if sd is None else sd)
    classes = np.array(about["names"] or range(f.shape[1]))
    added = {"class": classes[f.argmax(axis=1)]}
    if sd is not None:
        added["sd"] = sd
    added.update({f"p({name})": of for name, of in zip(classes, p.T)} if p is not None else {})
    path = write(args.out, names, rows, added, args.quiet)
    if p is None:
        print("note: no probabilities, for this fit left no rows out: use --variance, or fit with several --ridge")
    return {"path": path, "classes": added["class"], "scores": f, "sd": sd, "probabilities": p}


def write(folder, names, rows, added, quiet=False):
    """Write predictions.csv in a folder, the columns `added` {name: (m,)} after the input's own; returns its path."""
    path = os.path.join(folder, PREDICTIONS)
    tables.write(path, names, rows, added)
    first = next(iter(added))
    shown, columns = added[first][:SHOWN], [*names, *added]
    made = sum(str(value) != "" for value in added[first])  # a row that cannot be read has an empty cell
    print(f"{made} predictions in {path}, columns {', '.join(columns[:8])}{', ...' * (len(columns) > 8)}; "
          f"{first} begins {', '.join(map(tables.shown, shown))}{', ...' * (len(rows) > SHOWN)}")
    return path
