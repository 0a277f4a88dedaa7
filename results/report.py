"""Runs -> power laws -> the README's tables and figure.

results/runs.jsonl holds a line for every run: configuration, result, versions, commit. Runs that differ in
nothing but the seed are repetitions: each draws another subset of the training set, the test images are
the same. A curve is the test error of one kernel at several sizes n, all else equal, and its law

  error(n) = a n^-b + c,     a, c >= 0

is fitted by least squares of (a n^-b + c) / error - 1, a size counting as often as it was run: for a given b
that is linear in a and c, and b is the best of a grid. Intervals are 95 % of a parametric bootstrap over
subsets: the mean at each size is drawn again, normal, with the relative sd of single runs, a power of n fitted
to the sizes that have several, over the root of the number of runs. (Drawing three deviations from three again
covers the true b in 86 of 100 experiments, this in 93: test_scaling_interval_covers.) They say how the law would
differ with other subsets, for these test images.

    python scaling.py                       tables and figure into README.md, between their markers
    python scaling.py --check               exit with 1 where they are not what the runs say
    python scaling.py --runs curve/runs.jsonl --dataset digits --figure curve.png       print and draw these

Proved by: test_all.py, section scaling
"""

import argparse
import json
import os
import statistics
import sys
import zlib

import numpy as np
from scipy.special import digamma

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = ["fc", "cnn_vec", "cnn_gap", "myrtle5", "myrtle7", "myrtle10", "seq_fc", "seq_cnn", "seq_cnn_gap", "linear",
           "gcn", "fingerprint", "sum"]
NETWORK = {"w_std": 2**0.5, "b_std": 0.0, "head": "linear", "gamma": None}
CURVE = ("dataset", "kernel", "kind", "depth", *NETWORK, "whiten", "zca_eps", "flips", "crops", "n_test")
SAME = (*CURVE, "n_train")
ABSENT = {**NETWORK, "zca_eps": None, "flips": None, "crops": 1}  # what runs mean that do not have it
SCORES = ("test_accuracy", "test_auc", "test_ap", "test_spearman", "test_rmse")
POWERS = np.arange(1, 401) / 200  # what b may be
FEW = 100  # test images; runs with fewer measure cost, and their accuracy is nobody's business


def load(path):
    """Runs of a jsonl file, grouped: [[run, ...], ...]; of a seed run twice, the later one counts."""
    groups = {}
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is not there; --runs takes the runs.jsonl that a run writes into its --out")
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                run = json.loads(line)
                config = run["config"] = {**ABSENT, **run["config"]}
                config["flips"] = bool(config["flips"])  # symmetric and explicit ones: the same predictions
                config["zca_eps"] = config["zca_eps"] if str(config["whiten"]).startswith("zca") else None
                run["search"] = run.pop("validation", None) or run.get("search")  # as it was called before
                solver = run["ridge"], config.get("rank"), config.get("precondition")
                fixed = () if run["search"] else solver
                key = tuple(config[name] for name in SAME) + fixed
                groups.setdefault(key, {})[config["seed"]] = run
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not a run of train_cifar.py: {error!r}") from error
    return [list(runs.values()) for runs in groups.values()]


def test_error(run):
    """1 - accuracy, and where there is none 1 - area under the curve, average precision or Spearman's correlation,
    or the root mean squared error."""
    score = next(name for name in SCORES if name in run)
    return run[score] if score == "test_rmse" else 1 - run[score]


def curves(groups, dataset):
    """{what is equal: {n: [test error, ...]}} of a data set's runs whose ridge was chosen, at three sizes or more."""
    out = {}
    for runs in groups:
        config = runs[0]["config"]
        if config["dataset"] == dataset and config["n_test"] >= FEW and runs[0]["search"]:
            points = out.setdefault(tuple(config[name] for name in CURVE), {})
            points.setdefault(config["n_train"], []).extend(test_error(run) for run in runs)
    order = sorted(out, key=lambda key: (KERNELS.index(key[1]), *map(str, key)))
    return {key: dict(sorted(out[key].items())) for key in order if len(out[key]) >= 3}


def fit(n, error, weight):
    """(a, b, c) of the law, each (B,), for sizes n (k,), errors (B, k), weights (k,)."""
    n, error, weight = (np.asarray(z, np.float64) for z in (n, error, weight))
    v = 1 / error[:, None]  # (B, 1, k); the relative residual is a u + c v - 1
    u = n ** -POWERS[:, None] * v  # (B, powers, k)
    uu, uv, vv, u1, v1 = ((weight * z).sum(axis=2) for z in (u * u, u * v, v * v, u, v))
    determinant = np.maximum(uu * vv - uv**2, 1e-12 * uu * vv)
    a, c = (u1 * vv - v1 * uv) / determinant, (uu * v1 - uv * u1) / determinant
    a, c = np.where(c < 0, u1 / uu, a), np.maximum(c, 0)
    a, c = np.maximum(a, 0), np.where(a < 0, v1 / vv, c)
    best = (np.arange(len(error)), (-a * u1 - c * v1).argmin(axis=1))  # the residual, but for a constant
    return a[best], POWERS[best[1]], c[best]


def law(points, draws=1000, seed=0):
    """The law of a curve {n: [error, ...]}: ((a, b, c), their 95 % intervals (3, 2), or None without
    repetitions).  ValueError: fewer sizes than parameters."""
    n, runs = list(points), [np.array(errors) for errors in points.values()]
    if len(n) < 3:
        raise ValueError(f"{len(n)} sizes, {n}: a law of three parameters needs 3 or more")
    mean, weight = np.array([e.mean() for e in runs]), [len(e) for e in runs]
    found = [float(z[0]) for z in fit(n, mean[None], weight)]
    several = [k for k, e in enumerate(runs) if len(e) > 1]
    if not several:
        return found, None
    log_n, freedom = np.log(n), np.array([len(runs[k]) - 1 for k in several])
    variance = [max(np.var(runs[k] / mean[k], ddof=1), 1e-12) for k in several]
    unbiased = np.log(variance) - digamma(freedom / 2) + np.log(freedom / 2)  # of log chi^2
    line = np.polyfit(log_n[several], unbiased, min(1, len(several) - 1), w=np.sqrt(freedom))
    sd = np.exp(np.polyval(line, log_n) / 2) / np.sqrt(weight)
    drawn = mean * (1 + sd * np.random.default_rng(seed).normal(size=(draws, len(n))))
    return found, np.percentile(fit(n, np.maximum(drawn, 1e-9), weight), [2.5, 97.5], axis=1).T.tolist()


def name(key):
    """What a curve is called: "fc NTK, flips, 10 crops"."""
    config = dict(zip(CURVE, key))
    return " ".join([config["kernel"] + (f" {config['depth']}" if config["depth"] else ""),
                     config["kind"].upper()]) + "".join(
        [", flips" if config["flips"] else "", f", {config['crops']} crops" if config["crops"] > 1 else "",
         f", {config['whiten']}" if config["whiten"] != "channel" else "",
         f" {config['zca_eps']:g}" if config["whiten"] in ("zca", "zca_unit") else "",
         *(f", {flag} {config[flag]:.3g}" for flag in ("w_std", "b_std") if config[flag] != ABSENT[flag]),
         f", {config['head']} head" if config["head"] not in (None, "linear") else "",
         f" {config['gamma']:g}" if config["gamma"] else ""])


def percent(errors, sign=1):
    """Mean ± sd of accuracies (sign 1) or errors (-1), in %."""
    values = [100 * (1 - e if sign > 0 else e) for e in errors]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(head, rows):
    """Markdown; the first column to the left, the others to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def learning(groups, dataset):
    """Accuracy against size: a table for each family of kernels (myrtle5 and myrtle10 are one), in it a column for
    each curve."""
    families = {}
    for key, points in curves(groups, dataset).items():
        families.setdefault(key[1].rstrip("0123456789"), {})[key] = points
    return "\n\n".join(
        table(["n", *map(name, found)], [
            [f"{n:,}", *(percent(points[n]) if n in points else "" for points in found.values())]
            for n in sorted({n for points in found.values() for n in points})]) for found in families.values())


def laws(groups, dataset):
    """a, b, c of each such curve."""
    rows = []
    for key, points in curves(groups, dataset).items():
        values, intervals = law(points)
        rows.append([name(key), f"{min(points):,} … {max(points):,}", f"{key[-1]:,}", *(
            f"{value:.3g}" + (f" ({low:.3g} … {high:.3g})" if intervals else "")
            for value, (low, high) in zip(values, intervals or [(0, 0)] * 3))])
    return table(["kernel", "n", "tested on", "a", "b", "c"], rows)


def augmentation(groups, dataset):
    """Accuracy of the same images in more and more copies, crops x mirror images; a row for each kernel and n."""
    found = {}
    for runs in groups:
        config = runs[0]["config"]
        if config["dataset"] == dataset and config["n_test"] >= FEW and runs[0]["search"]:
            key = tuple(1 if k == "crops" else k != "flips" and config[k] for k in CURVE), config["n_train"]
            found.setdefault(key, {})[config["crops"], config["flips"]] = percent(
                [test_error(run) for run in runs])
    found = {key: copies for key, copies in found.items() if any(crops > 1 for crops, _ in copies)}
    columns = sorted({key for copies in found.values() for key in copies})
    head = [f"{crops}{' × 2' if flips else ''}" for crops, flips in columns]
    return table(["kernel", "n", "test images", *head], [
        [name(key), f"{n:,}", f"{key[-1]:,}", *(copies.get(column, "") for column in columns)]
        for (key, n), copies in found.items()])


def elsewhere(groups, metric):
    """Proteins and molecules: the mean score of every kernel with its sd over seeds, at its largest n; a column for
    each data set whose score is `metric`. Settings that were all run stand one after the other."""
    found, most = {}, {}
    for runs in groups:
        config = runs[0]["config"]
        if next(name for name in SCORES if name in runs[0]) == metric and config["n_test"] >= FEW:
            row, n = f"{config['kernel']} {config['kind'].upper()}", config["n_train"]
            column = " ".join(dict.fromkeys([config["dataset"], config["split"]]))
            most[column] = max(most.get(column, 0), n)
            values = [run[metric] for run in runs]
            sd = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            found.setdefault(row, {}).setdefault(column, {}).setdefault(n, []).append(
                f"{statistics.mean(values):.3f}{sd}")

    def cell(sizes, largest):
        n = max(sizes, default=largest)
        return ", ".join(sizes.get(n, [])) + ("" if n == largest else f" (n = {n:,})")
    rows = sorted(found, key=lambda row: KERNELS.index(row.split()[0]))
    most = dict(sorted(most.items(), key=lambda of: of[1]))
    return table(["kernel", *(f"{column}, n = {n:,}" for column, n in most.items())], [
        [row, *(cell(found[row].get(column, {}), n) for column, n in most.items())] for row in rows])


def results(groups, dataset):
    """A row for each experiment that is no point of such a curve, or its largest, nor has crops."""
    in_curve = curves(groups, dataset)
    rows = []
    for runs in sorted(groups, key=lambda runs: (KERNELS.index(runs[0]["config"]["kernel"]), *(
            runs[0]["config"][k] for k in ("n_train", "kind", "crops", "flips")))):
        config = runs[0]["config"]
        key = tuple(config[k] for k in CURVE)
        if config["dataset"] != dataset or config["n_test"] < FEW or (
                runs[0]["search"] and (
                    config["crops"] > 1 or config["n_train"] < max(in_curve.get(key, [0])))):
            continue
        ridges = sorted({run["ridge"] for run in runs})
        at_once = [run for run in runs
                   if run.get("entries_computed", run.get("entries")) == run.get("entries")]
        copies = config["crops"] * (1 + config["flips"])

        def median(value, runs=runs):
            return f"{statistics.median(value(run) for run in runs):.0f}" if runs else "–"
        rows.append([
            name(key), f"{config['n_train']:,}" + (f" × {copies}" if copies > 1 else ""), f"{config['n_test']:,}",
            len(runs), percent([test_error(run) for run in runs]),
            " … ".join(f"{ridge:.2g}" for ridge in (ridges[:1] + ridges[1:][-1:])),
            median(lambda run: run["cg_iterations"]), median(lambda run: run["seconds"]["kernel"], at_once),
            median(lambda run: run["seconds"]["ridge"] + run["seconds"]["solve"]),
            f"{max(run['peak_memory_gb'] for run in runs):.1f}"])
    return table(["kernel", "images to train", "to test", "seeds", "accuracy % ± sd", "ridge", "CG steps",
                  "kernel s", "ridge + solve s", "memory GB"], rows)


def cost(groups, dataset):
    """Kernel seconds and CG steps against n, from runs with few test images and one ridge; the last column
    is the slope of a line through their logarithms."""
    found = {}
    for runs in groups:
        config, seconds = runs[0]["config"], statistics.median(run["seconds"]["kernel"] for run in runs)
        if config["n_test"] < FEW and config["dataset"] == dataset:
            what = f"{config['kernel']} {config['kind'].upper()}"
            if runs[0].get("entries_computed"):
                found.setdefault(f"{what}: kernel, s", {}).setdefault(config["n_train"], []).append(seconds)
            rank = config["rank"] or "chosen" if config["precondition"] == "lowrank" else config["precondition"]
            found.setdefault(f"{what}: CG steps, ridge {runs[0]['ridge']:g}, rank {rank}", {})[
                config["n_train"]] = [statistics.median(run["cg_iterations"] for run in runs)]
    sizes = sorted({n for points in found.values() for n in points})
    rows = []
    for what, points in sorted(found.items()):
        points = {n: min(values) for n, values in points.items()}
        slope = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0] if len(points) > 2 else None
        rows.append([what, *(f"{points[n]:.3g}" if n in points else "" for n in sizes),
                     "" if slope is None else f"{slope:.2f}"])
    return table(["", *(f"n = {n:,}" for n in sizes), "slope"], rows)


def figure(groups, dataset, path):
    """Test error against n, both logarithmic: every size with its sd, the law through them; .svg, .png or .pdf.

    Grey that is read on white and on black, no background; a marker of its own for NNGP and NTK, hollow
    and dashed with mirror images or crops, half full and dotted where whitened otherwise than by channel."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    matplotlib.rcParams.update({"svg.hashsalt": "scaling", "svg.fonttype": "path"})
    grey, found = "#7d8590", curves(groups, dataset)
    page = Figure(figsize=(8.5, 4.6), layout="constrained", facecolor="none")
    axes = page.add_subplot(xscale="log", yscale="log", facecolor="none")
    colours = dict(zip(KERNELS, ["#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#009e73"] * 3))
    for key, points in found.items():
        config, n = dict(zip(CURVE, key)), np.array(list(points))
        mean = np.array([np.mean(errors) for errors in points.values()])
        sd = [np.std(errors, ddof=1) if len(errors) > 1 else 0 for errors in points.values()]
        a, b, c = law(points, draws=2)[0]
        smooth, colour = np.geomspace(n.min(), n.max(), 100), colours[config["kernel"]]
        line, fill = ("--", "none") if config["flips"] or config["crops"] > 1 else (
            ("-", "full") if config["whiten"] == "channel" else (":", "bottom"))
        axes.plot(smooth, a * smooth**-b + c, color=colour, linewidth=1, linestyle=line)
        axes.errorbar(n, mean, sd, color=colour, linestyle="none", capsize=2, markersize=5,
                      marker="o" if config["kind"] == "nngp" else "s", fillstyle=fill,
                      label=f"{name(key)}: b = {b:.2f}")
    axes.set_xlabel("training images n", color=grey)
    axes.set_ylabel("test error", color=grey)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 7, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.tick_params(which="both", colors=grey)
    axes.grid(color=grey, alpha=0.25, linewidth=0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(grey)
    page.legend(loc="outside right center", frameon=False, labelcolor=grey, fontsize=8)
    metadata = {"Description": digest(found), "Date": None} if path.endswith(".svg") else None
    page.savefig(path, dpi=150, metadata=metadata)


def digest(found):
    """What a figure of these curves is drawn from, as a number that it carries."""
    return f"curves {zlib.crc32(repr(found).encode()):08x}"


def filled(text, groups, dataset):
    """The README with every <!-- NAME: written by scaling.py --> ... <!-- end of NAME --> filled anew."""
    parts = {part.__name__: part(groups, dataset) for part in (results, learning, laws, augmentation, cost)}
    for name, metric in (("proteins", "test_spearman"), ("molecules", "test_auc"), ("numbers", "test_rmse"),
                         ("assays", "test_ap")):
        parts[name] = elsewhere(groups, metric)
    parts["landscape"] = "\n\n".join(part(groups, "landscape") for part in (learning, laws))
    for name, part in parts.items():
        begin, end = f"<!-- {name}: written by scaling.py -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md needs the markers {begin} and {end}, once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return text


def main(argv=None):
    """Write tables and figure, or check them; returns 1 where --check finds one stale."""
    parser = argparse.ArgumentParser(description="Tables, power laws and figure of the runs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", default=os.path.join(HERE, "results", "runs.jsonl"), metavar="FILE")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--figure", metavar="FILE", help="print the tables and draw this figure; None: README.md "
                        "and results/curves.svg")
    parser.add_argument("--readme", default=os.path.join(HERE, "README.md"), metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    args = parser.parse_args(argv)
    groups = load(args.runs)
    found = curves(groups, args.dataset)
    if not found:
        raise ValueError(f"{args.runs} has no kernel with three sizes of {args.dataset}; run --sizes of three or more, "
                         "or give --dataset another")
    if args.figure:
        print(learning(groups, args.dataset), laws(groups, args.dataset), sep="\n\n")
        figure(groups, args.dataset, args.figure)
        return 0
    drawn = os.path.join(os.path.dirname(args.runs), "curves.svg")
    with open(args.readme) as file:
        text = file.read()
    new = filled(text, groups, args.dataset)
    if not args.check:
        with open(args.readme, "w") as file:
            file.write(new)
        figure(groups, args.dataset, drawn)
        return 0
    stale = ["README.md"] if new != text else []
    if not os.path.exists(drawn) or digest(found) not in open(drawn).read():
        stale.append(drawn)
    if stale:
        print(f"{' and '.join(stale)}: stale; run python scaling.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(str(error))
