"""A fitted model of molecules in a file (--save FILE), and its predictions for new ones (--load FILE --predict NEW.csv).

  f(x) = k(x, X) alpha + mean     sd(x)^2 = s^2 (k(x, x) + lambda - k(x, X) A^-1 k(X, x)), with --variance (uncertainty.py)

The file (own/model.py) holds alpha (n, tasks), the mean of each task (tasks,), the SMILES of the training molecules X, and in
JSON the network and what columns and classes are called. Graphs and fingerprints are made again from the SMILES, of X and of
the new molecules together, so that all have room for the largest molecule; a kernel does not depend on that room.

A class is predicted from f, the regression of its label 0 or 1: it is the positive one if f > 1/2. The probability of that is
Phi((f - 1/2) / sd), if the output is normal with mean f and standard deviation sd. Without --variance, sd is the root mean
squared error on rows that the fit left out: leave-one-out; or beyond choose.DENSE rows, or if labels are missing, of each
task on the validation rows.

  n  training molecules   m  new molecules

Proved by: molecules/test_own.py
"""

import argparse

import numpy as np
from scipy.special import ndtr

import experiment
import tiles
from molecules import smiles, train
from own import model, tables, uncertainty

NETWORK = ("kernel", "kind", "depth", "w_std", "b_std", "pool", "jump", "weights", "fingerprints", "tile")


def fitted(result, solver, targets, alpha, mean, K_val, y, left=None):
    """What a model keeps of a fit, as a dict; a number for each task in lists.

    targets, alpha: (n, tasks), in the units of y.   K_val: (rows, n), or None.   y: as of train.one_size.
    left: predictions of the training rows, each by the others, (n, tasks), or None.
    """
    about = model.fitted(result, solver, targets, alpha)
    if left is not None:
        error = left_out(left, y["train"])
    elif K_val is not None:
        error = left_out(K_val.matvec(alpha) + mean, y["val"])
    else:
        error = about["error"] and [about["error"]] * len(mean)
    scales = [uncertainty.prior_scale(*(z[:, [task]] for z in (targets, alpha))) for task in range(len(mean))]
    return {**about, "prior_scale": scales, "error": error, "missing": bool(np.isnan(y["train"]).any()), "alpha": alpha,
            "mean": mean}


def left_out(f, y):
    """The root mean squared error of each task on its labels in y (rows, tasks), that of all tasks for a task without labels;
    None if there is no label."""
    known = ~np.isnan(y)
    squares, count = np.where(known, f - y, 0) ** 2, known.sum(axis=0)
    if not known.any():
        return None
    mse = np.where(count > 0, squares.sum(axis=0) / np.maximum(count, 1), squares.sum() / count.sum())
    return np.sqrt(mse).tolist()


def save(args, rows, numbers, tasks, about):
    """Write the model to args.save.

    rows: the Molecules.   numbers: which of them were fitted.   tasks: (all tasks,) bool, which were.
    about: what `fitted` returns, the scales of the parts of the kernel, and where the run was made.
    """
    alpha, mean = about.pop("alpha"), about.pop("mean")
    names, classes = ([one for one, use in zip(every, tasks) if use] for every in (rows.tasks, rows.classes))
    about = {**about, **{name: getattr(args, name) for name in NETWORK}, "tasks": names, "classes": classes,
             "smiles": args.smiles or "smiles", "score": args.score}
    model.save(args.save, "molecules", about, alpha=alpha, mean=mean, support=np.array([rows.smiles[i] for i in numbers]))


def main(args):
    """Predictions by the model in args.load for the molecules in args.predict, written to predictions.csv in args.out.

    Returns {"path", "predictions" (m, tasks), "sd" (m, tasks) or None, "probabilities" of the positive classes (m, tasks) or
    None}, m: the molecules that RDKit can read.
    """
    about, arrays = model.start(args, "molecules")
    if args.variance and about["missing"]:
        raise ValueError(f"--variance with {args.load}, which was fitted with missing labels: every task has its own matrix, "
                         "so it would take a solve for each row and task; leave it out")
    _, names, lines = smiles.opened(args.predict)
    column, = tables.columns(args.predict, names, [args.smiles or about["smiles"]],
                             "; say with --smiles which of them holds the SMILES")
    lines = [fields for _, fields in lines]
    new = smiles.checked([fields[column] for fields in lines], np.empty((len(lines), 0)), [], None, args.predict, args.quiet,
                         what="get no prediction")
    settings, support = argparse.Namespace(**about, quiet=args.quiet), arrays["support"].tolist()
    x = train.inputs(settings, smiles.molecules(support) + new.mols)
    K_new, K, k_new = kernels(args, settings, x, len(support))
    f, sd = K_new.matvec(arrays["alpha"]) + arrays["mean"], None
    if args.variance:
        sd = np.outer(model.deviation({**about, "prior_scale": 1.0}, K, K_new, k_new, args.quiet),
                      np.sqrt(about["prior_scale"]))
    added, p = columns(about, f, sd)
    added = {name: spread(values, new.rows, len(lines)) for name, values in added.items()}
    path = model.write(args.out, names, lines, added, args.quiet)
    if about["score"] != "rmse" and p is None:
        print("note: no probabilities, for this fit left no rows out: use --variance, or fit with validation rows")
    return {"path": path, "predictions": f, "sd": sd, "probabilities": p}


def kernels(args, settings, inputs, n):
    """K_new (m, n), the kernel of the new molecules with the first n of the inputs; with --variance also K (n, n) and k(x, x)
    of the new ones (m,), else None and 0. A sum of parts is that of the fit."""
    where, parts, k_new = {"quiet": args.quiet, "devices": experiment.devices(args.devices)}, [], 0
    for (part, x), scale in zip(inputs.items(), settings.scales):
        engine, layers = train.network(settings, part, x)
        kernel_fn = engine(layers, settings.kind)
        old, new = (train.taken(x, rows) for rows in np.split(np.arange(len(x)), [n]))
        parts.append([tiles.cross(kernel_fn, new, old, settings.tile, **where)])
        if args.variance:
            parts[-1].append(tiles.gram(kernel_fn, old, settings.tile, **where))
            k_new = k_new + scale * tiles.diagonal(kernel_fn, new, devices=where["devices"])
    return *train.sum_of_parts(parts, n, settings.scales), *[None] * (not args.variance), k_new


def columns(about, f, sd):
    """{name: (m,)}, the columns to add to the input's: of each task its prediction, or its class, sd and probability; and
    the probabilities (m, tasks), None if the targets are numbers or nothing says how sure the fit is."""
    added, p, several = {}, [], len(about["tasks"]) > 1
    for t, (task, pair) in enumerate(zip(about["tasks"], about["classes"])):
        name = f" {task}" * several
        if pair:
            added["class" + name] = np.array(pair)[(f[:, t] > 0.5).astype(int)]
        else:
            added["prediction" + name] = f[:, t]
        if sd is not None:
            added["sd" + name] = sd[:, t]
        if pair and (sd is not None or about["error"]):
            p.append(ndtr((f[:, t] - 0.5) / np.maximum(about["error"][t] if sd is None else sd[:, t], uncertainty.TINY)))
            added[f"p({f'{task} = ' * several}{pair[1]})"] = p[-1]
    return added, np.stack(p, axis=1) if p else None


def spread(values, rows, n):
    """[cell, ...] of n rows: these values in these rows, the others empty."""
    cells = [""] * n
    for row, value in zip(rows, values):
        cells[row] = value
    return cells
