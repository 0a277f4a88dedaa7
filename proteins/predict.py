"""A fitted model of proteins in a file (--save FILE), and its predictions for new sequences (--load FILE --predict FILE.csv).

  f(x) = k(x, X) alpha        prediction = g^-1(f)        sd = (g^-1(f + s) - g^-1(f - s)) / 2

g is the function of the target that was fitted (--transform), and s the standard deviation of f (own/model.py), with noise:
that of a new measurement. The prediction is in the units of the target, and so is sd: half the width of the interval that
g^-1 makes of f - s to f + s. If g is raw, sd is exact. If it is rank, g^-1 ends at the smallest and the largest training
target, so sd is small there.

The file holds the training sequences, their targets, alpha, and in JSON what else f needs. Encoding and g are fitted again on
the training rows, as in the run.

  python -m proteins.train --dataset peptides.csv --sequence peptide --target activity --save peptides.npz
  python -m proteins.train --load peptides.npz --predict new.csv --variance

Proved by: proteins/test_own.py
"""

from collections import Counter

import numpy as np

import experiment
import tiles
from own import model, tables
from proteins import sequences

SHOWN = 5  # reasons for rows without a prediction that are printed


def save(path, split, layers, result, solver, z, alpha):
    """Write a model to a file.  layers: of its network.   result: the recorded line.   The others: as of train.one_size."""
    about = {**result["config"], **model.fitted(result, solver, z, alpha), "layers": layers, "commit": result["commit"],
             "date": result["date"]}
    model.save(path, "proteins", about, alpha=alpha, sequences=np.array(split.sequences[:len(z)]),
               targets=split.targets[:len(z)])


def predict(args, network_kernel):
    """Targets of the sequences in args.predict by the model in args.load, written to predictions.csv in args.out: the rows of
    the file, then prediction, and with args.variance sd. Both are empty where a sequence cannot be encoded; a note says why.

    args: of train.py.   network_kernel: (layers, kind) -> kernel_fn.
    Returns {"path", "predictions": (m,), "sd": (m,) or None}, with NaN where there is no prediction.
    ValueError: no row can be predicted; --variance with an NTK.
    """
    about, arrays = model.start(args, "proteins")
    names, lines = tables.lines(args.predict, tables.content(args.predict, "--predict takes a CSV file"))
    place, = tables.columns(args.predict, names, [args.sequence or about.get("sequence", "sequence")],
                            "; name yours with --sequence")
    new = [sequences.clean(fields[place]) for _, fields in lines]
    known = [text for text in new if set(text) <= set(sequences.RESIDUES)]
    train = arrays["sequences"].tolist()
    encoding = sequences.fit(train, about["encoding"], max(map(len, known), default=0))
    kept = usable(args.predict, encoding, new, [line for line, _ in lines])
    sequences.note_unseen(encoding, train, [new[i] for i in kept], f"rows of {args.predict}")
    x, x_new = encoding(train), encoding([new[i] for i in kept])
    kernel_fn, devices = network_kernel(tuple(map(tuple, about["layers"])), about["kind"]), experiment.devices(args.devices)
    K_test = tiles.cross(kernel_fn, x_new, x, about["tile"], devices, args.quiet).merged()
    f, inverse = K_test.matvec(arrays["alpha"])[:, 0], sequences.transform(about["target"], arrays["targets"])[1]
    found = {"prediction": inverse(f)}
    if args.variance:
        K = tiles.gram(kernel_fn, x, about["tile"], devices, args.quiet).merged()
        s = model.deviation(about, K, K_test, tiles.diagonal(kernel_fn, x_new, 16, devices), args.quiet)
        found["sd"] = (inverse(f + s) - inverse(f - s)) / 2
    for name, values in found.items():
        found[name] = np.full(len(new), np.nan)
        found[name][kept] = values
    cells = {name: ["" if np.isnan(value) else value for value in values] for name, values in found.items()}
    path = model.write(args.out, names, [fields for _, fields in lines], cells, args.quiet)
    return {"path": path, "predictions": found["prediction"], "sd": found.get("sd")}


def usable(path, encoding, new, lines):
    """The numbers of the sequences that can be encoded, with a note of the others.  lines: of the file.  ValueError: none."""
    faults = list(map(encoding.fault, new))
    kept, reasons = [i for i, fault in enumerate(faults) if fault is None], Counter(filter(None, faults))
    if not new:
        raise ValueError(f"{path} has no row below its header")
    for fault, count in reasons.most_common(SHOWN):
        i = faults.index(fault)
        what = f"line {lines[i]}: {sequences.short(new[i])} {fault}"
        if not kept:
            raise ValueError(f"none of the {len(new)} rows of {path} can be predicted; {what}")
        print(f"note: no prediction for {count} of {len(new)} rows of {path}, the first in {what}")
    if len(reasons) > SHOWN:
        print(f"note: no prediction for {len(faults) - len(kept)} rows in all")
    return kept
