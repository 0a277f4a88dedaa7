"""From runs to tables: reads and groups runs.jsonl and makes each table as Markdown.

runs.jsonl holds one line for every run: configuration, result, versions, commit. Runs that differ only in the seed (and so
not in how the ridge was chosen) are repetitions: each draws another subset of the training set, and the test images are the
same. Runs on all training images are no repetitions: the last one counts. A curve is the test error of one kernel at three or
more sizes, with all settings of CURVE equal. (Of --fit_on that is so for zca and zca_unit; on how many images channels are
standardised matters little.)

    print(tables.learning(tables.load("results/runs.jsonl"), "cifar10"))

Proved by: results/test_results.py
"""

import json
import os
import statistics

import numpy as np

from data import DATASETS
from results.laws import fit, forecast, local_exponent
from train_cifar import FIT_ON

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = ["fc", "cnn_vec", "cnn_gap", "myrtle5", "myrtle7", "myrtle10", "seq_fc", "seq_cnn", "seq_cnn_gap", "linear",
           "gcn", "fingerprint", "sum"]
NETWORK = {"w_std": 2**0.5, "b_std": 0.0, "head": "linear", "gamma": None}
CURVE = ("dataset", "kernel", "kind", "depth", *NETWORK, "whiten", "zca_eps", "components", "fit_on", "resize", "flips",
         "crops", "n_test")
SAME = (*CURVE, "n_train")
ABSENT = {**NETWORK, "zca_eps": None, "components": None, "resize": None, "flips": None, "crops": 1}  # in runs without these
SCORES = ("test_accuracy", "test_auc", "test_ap", "test_spearman", "test_rmse")
FEW = 100  # runs with fewer test images only measure time; their accuracy is left out of the tables


def load(path):
    """Runs of a jsonl file, grouped: [[run, ...], ...]; if a seed was run twice, the later run is used. Each gets its line's
    number as "line", and as "subset" its seed, or None where that chooses nothing."""
    groups = {}
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; give --runs the runs.jsonl that a run writes into its --out folder")
    for number, run in lines(path):
        try:
            config = run["config"] = {**ABSENT, **run["config"]}
            if run.get("cg_converged") is False:
                print(f"note: {path}, line {number}: the solve did not converge, so that run is left out")
                continue
            config["flips"] = bool(config["flips"])  # symmetric and explicit flips give the same predictions
            zca, fit_on = str(config["whiten"]).startswith("zca"), config.get("fit_on")
            if "validation" in run and fit_on is None:  # an older run, fitted on what it trained on
                fit_on = config["n_train"]
            config["zca_eps"] = config["zca_eps"] if zca else None
            most = min(FIT_ON, DATASETS.get(config["dataset"], (0, FIT_ON))[1])  # the default
            config["fit_on"] = fit_on if zca and fit_on not in (None, most) else None
            run["search"] = run.pop("validation", None) or run.get("search")  # its former name
            solver = run["ridge"], config.get("rank"), config.get("precondition")
            by = (run.get("select") or "validation",) if run["search"] else solver  # how the ridge was chosen, or what it was
            key, run["line"] = tuple(config[name] for name in SAME) + by + choice(run), number
            whole = config["crops"] == 1 and config["n_train"] == DATASETS.get(config["dataset"], (0, 0))[1]
            run["subset"] = None if whole else config["seed"]
            groups.setdefault(key, {})[run["subset"]] = run
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a run of one of the three experiments: {error!r}") from error
    return [list(runs.values()) for runs in groups.values()]


def choice(run):
    """The networks that a run compared, and how; () if it compared none."""
    networks = [one for one, *_ in run.get("compared") or [] if isinstance(one, dict) and {"depth", *NETWORK} & set(one)]
    return (run["select"], json.dumps(networks, sort_keys=True)) if networks else ()


def lines(path):
    """(number, record) of each complete line of a jsonl file."""
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, json.loads(line)
            except ValueError:
                print(f"note: {path}, line {number} is incomplete (perhaps its run was killed while writing) and is left out")


def score_of(run):
    """The first of SCORES that the run has."""
    return next(name for name in SCORES if name in run)


def test_error(run):
    """1 - score, for the first of accuracy, area under the ROC curve, average precision and Spearman's correlation that the
    run has; else the root mean squared error."""
    score = score_of(run)
    return run[score] if score == "test_rmse" else 1 - run[score]


def unexplained(run):
    """Test mse / mse of the best constant: (1 - 1/c) / c for one-hot targets of c classes, 1 for standardised targets. NaN
    for molecules, of which it is not recorded."""
    if "test_mse" not in run:
        return np.nan
    classes = run["config"].get("classes", 10)
    return run["test_mse"] / ((1 - 1 / classes) / classes if "test_accuracy" in run else 1)


def curves(groups, dataset, value=test_error):
    """{values of CURVE: {n: [test error, ...]}} for a data set's kernels with three or more sizes whose ridge was chosen.
    value: what stands in place of the test error, a function of a run."""
    out = {}
    for runs in groups:
        config = runs[0]["config"]
        if config["dataset"] == dataset and config["n_test"] >= FEW and runs[0]["search"]:
            points = out.setdefault(tuple(config[name] for name in CURVE), {})
            for run in sorted([*points.get(config["n_train"], {}).values(), *runs], key=lambda run: run["line"]):
                points.setdefault(config["n_train"], {})[run["subset"]] = run  # the later, whatever chose its ridge
    order = sorted(out, key=lambda key: (place(key[1]), *map(str, key)))
    return {key: {n: [value(run) for run in of.values()] for n, of in sorted(out[key].items())}
            for key in order if len(out[key]) >= 3}


def place(kernel):
    """Where rows of a kernel stand in a table: in the order of KERNELS, others last."""
    return KERNELS.index(kernel) if kernel in KERNELS else len(KERNELS)


def name(key):
    """The name of a curve, such as "fc NTK, flips, 10 crops"."""
    config = dict(zip(CURVE, key))
    return " ".join([config["kernel"] + (f" {config['depth']}" if config["depth"] else ""),
                     config["kind"].upper()]) + "".join(
        [", flips" if config["flips"] else "", f", {config['crops']} crops" if config["crops"] > 1 else "",
         f", {config['whiten']}" if config["whiten"] != "channel" else "",
         f" {config['zca_eps']:g}" if config["whiten"] in ("zca", "zca_unit") else "",
         f", {config['components']} components" if config["components"] else "",
         f", fitted on {config['fit_on']:,}" if config["fit_on"] else "",
         f", {config['resize']} x {config['resize']} pixels" if config["resize"] else "",
         *(f", {flag} {config[flag]:.3g}" for flag in ("w_std", "b_std") if config[flag] != ABSENT[flag]),
         f", {config['head']} head" if config["head"] not in (None, "linear") else "",
         f" {config['gamma']:g}" if config["gamma"] else ""])


def percent(errors):
    """Mean ± sd of test errors as accuracies in %."""
    values = [100 * (1 - e) for e in errors]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def decimals(values):
    """Mean ± sd."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(head, rows):
    """A Markdown table; the first column is aligned left, the others right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def families(groups, dataset):
    """[{values of CURVE: {n: [test error, ...]}}, ...]: the curves of kernels alike (myrtle5 and myrtle10) with one whitening;
    those with standardised channels, which is no default, come last."""
    found = {}
    for key, points in curves(groups, dataset).items():
        found.setdefault((key[1].rstrip("0123456789"), key[CURVE.index("whiten")]), {})[key] = points
    return [found[one] for one in sorted(found, key=lambda one: one[1] == "channel")]


def of_numbers(groups, dataset):
    """Whether the errors of this data set are those of numbers, in their unit."""
    return any(runs[0]["config"]["dataset"] == dataset and score_of(runs[0]) == "test_rmse" for runs in groups)


def learning(groups, dataset):
    """Accuracy in %, or for numbers the root mean squared error, against size: one table for each of `families`, with one
    column for each curve."""
    cell = decimals if of_numbers(groups, dataset) else percent
    return "\n\n".join(
        table(["n", *map(name, family)], [
            [f"{n:,}", *(cell(points[n]) if n in points else "" for points in family.values())]
            for n in sorted({n for points in family.values() for n in points})]) for family in families(groups, dataset))


def ahead(points, shares, end, draws=1000):
    """(forecast of the curve that ends at size `end`, its miss there, the miss of a power law with a floor fitted to the same
    sizes), in points; or None if `laws.forecast` makes none."""
    points, shares = ({n: of[n] for n in of if n <= end} for of in (points, shares))
    found = forecast(points, shares, draws)
    if found:
        mean = {n: statistics.mean(errors) for n, errors in points.items()}
        a, b, c = (z[0] for z in fit(found.fitted, [[mean[n] for n in found.fitted]], [len(points[n]) for n in found.fitted]))
        return found, 100 * (found.error - mean[end]), 100 * (a * end**-b + c - mean[end])
    return None


def laws(groups, dataset):
    """What the bent law of each curve, fitted to sizes up to N / 4, predicts for its largest size N; what was measured; and
    the local exponent. Under the table: the misses of all curves, also if they ended at smaller sizes."""
    rows, misses, earlier, inside = [], [], [], []
    shares = curves(groups, dataset, unexplained)
    for key, points in curves(groups, dataset).items():
        row, (*smaller, largest) = ["–"] * 6, points
        earlier += [short[1:] for n in smaller if (short := ahead(points, shares[key], n, draws=2))]
        if whole := ahead(points, shares[key], largest):
            found, measured = whole[0], statistics.mean(points[largest])
            misses.append(whole[1:])
            interval = ""
            if found.interval:
                low, high = found.interval
                inside.append(low <= measured <= high)
                interval = f" ({100 * low:.1f} … {100 * high:.1f})"
            row = [f"{found.fitted[0]:,} … {found.fitted[-1]:,}", f"(1 + n / {found.n0:,.3g})^−{found.b:.3f}",
                   f"{100 * found.error:.1f}{interval}", f"{100 * measured:.1f}",
                   *(f"{miss:+.1f}".replace("-", "−") for miss in whole[1:])]
        rows.append([name(key), f"{largest:,}", f"{key[-1]:,}", *row, f"{local_exponent(points):.3f}".replace("nan", "–")])
    text = table(["kernel", "N", "tested on", "fitted n", "u(n)", "predicted at N, %", "measured, %", "miss, points",
                  "power law's miss", "local exponent"], rows)
    if len(misses) < 2:
        return text
    summary = [[where, f"{len(of)}", law, f"{np.median(miss):.1f}", f"{miss.max():.1f}", f"{(miss <= 1).sum()}"]
               for where, of in (("largest N", misses), ("smaller N", earlier)) if of
               for law, miss in zip(("bent", "power, floor"), np.abs(of).T)]
    return "\n\n".join([text, table(["miss in points at the", "cases", "law", "median", "largest", "at most 1"], summary),
                        f"{sum(inside)} of {len(inside)} errors measured at the largest N lie in the 95 % interval."])


def augmentation(groups, dataset):
    """Accuracy with the same images in more and more copies (crops x mirror images); one row for each kernel and n."""
    accuracies = {}
    for runs in groups:
        config = runs[0]["config"]
        if config["dataset"] == dataset and config["n_test"] >= FEW and runs[0]["search"]:
            key = tuple(1 if k == "crops" else k != "flips" and config[k] for k in CURVE), config["n_train"]
            accuracies.setdefault(key, {})[config["crops"], config["flips"]] = percent(
                [test_error(run) for run in runs])
    accuracies = {key: copies for key, copies in accuracies.items() if any(crops > 1 for crops, _ in copies)}
    columns = sorted({key for copies in accuracies.values() for key in copies})
    head = [f"{crops}{' × 2' if flips else ''}" for crops, flips in columns]
    return table(["kernel", "n", "test images", *head], [
        [name(key), f"{n:,}", f"{key[-1]:,}", *(copies.get(column, "") for column in columns)]
        for (key, n), copies in accuracies.items()])


def elsewhere(groups, metric):
    """Proteins and molecules: the mean score of every kernel ± sd over seeds, at its largest n; one column for each data set
    whose score is `metric`. If a kernel was run with several settings, their scores are separated by commas. Runs that
    compared the same networks are repetitions, whichever network each of them chose; they have a row of their own."""
    scores, largest_n = {}, {}
    for runs in groups:
        config = runs[0]["config"]
        if score_of(runs[0]) == metric and config["n_test"] >= FEW:
            n, row = config["n_train"], f"{config['kernel']} {config['kind'].upper()}" + (
                f", network by {runs[0]['select']}" if choice(runs[0]) else "")
            column = " ".join(dict.fromkeys([config["dataset"], config["split"]]))
            largest_n[column] = max(largest_n.get(column, 0), n)
            settings = scores.setdefault(row, {}).setdefault(column, {}).setdefault(n, {})
            compared = {flag for one, *_ in runs[0].get("compared") or [] if isinstance(one, dict) for flag in one}
            compared |= {"whiten"} if compared & {"encoding", "target"} else set()
            same = json.dumps([config[flag] for flag in SAME if flag not in compared])
            settings.setdefault((choice(runs[0]), same) if choice(runs[0]) else len(settings), []).extend(
                run[metric] for run in runs)

    def cell(sizes, largest):
        n = max(sizes, default=largest)
        return ", ".join(map(decimals, sizes.get(n, {}).values())) + ("" if n == largest else f" (n = {n:,})")
    rows = sorted(scores, key=lambda row: place(row.split()[0]))
    largest_n = dict(sorted(largest_n.items(), key=lambda of: of[1]))
    return table(["kernel", *(f"{column}, n = {n:,}" for column, n in largest_n.items())], [
        [row, *(cell(scores[row].get(column, {}), n) for column, n in largest_n.items())] for row in rows])


def results(groups, dataset):
    """One row for each experiment with a fixed ridge; and, without crops, for the largest size of each curve and every
    experiment that belongs to no curve."""
    in_curve = curves(groups, dataset)
    rows = []
    for runs in sorted(groups, key=lambda runs: (place(runs[0]["config"]["kernel"]), *(
            runs[0]["config"][k] for k in ("n_train", "kind", "crops", "flips")))):
        config = runs[0]["config"]
        key = tuple(config[k] for k in CURVE)
        if config["dataset"] != dataset or config["n_test"] < FEW or (
                runs[0]["search"] and (
                    config["crops"] > 1 or config["n_train"] < max(in_curve.get(key, [0])))):
            continue
        ridges = sorted({run["ridge"] for run in runs})
        copies = config["crops"] * (1 + config["flips"])

        def median(value, runs=runs):
            return f"{statistics.median(value(run) for run in runs):.0f}" if runs else "–"
        rows.append([
            name(key), f"{config['n_train']:,}" + (f" × {copies}" if copies > 1 else ""), f"{config['n_test']:,}",
            len(runs), percent([test_error(run) for run in runs]),
            " … ".join(f"{ridge:.2g}" for ridge in (ridges[:1] + ridges[1:][-1:])),
            median(lambda run: run["cg_iterations"]), median(lambda run: run["seconds"]["kernel"], at_once(runs)),
            median(lambda run: run["seconds"]["ridge"] + run["seconds"]["solve"]),
            f"{max(run['peak_memory_gb'] for run in runs):.1f}"])
    return table(["kernel", "images to train", "to test", "seeds", "accuracy % ± sd", "ridge", "CG steps",
                  "kernel s", "ridge + solve s", "memory GB"], rows)


def at_once(runs):
    """The runs that computed all entries, and found none in a store."""
    return [run for run in runs if run.get("entries_computed", run.get("entries")) == run.get("entries")]


def cost(groups, dataset):
    """Kernel seconds and CG steps against n, from runs with fewer than FEW test images; the last column is the slope of a
    line through their logarithms."""
    measured = {}
    for runs in groups:
        config, whole = runs[0]["config"], at_once(runs)
        if config["n_test"] < FEW and config["dataset"] == dataset:
            kernel = name(tuple(config[k] for k in CURVE))
            if whole:
                measured.setdefault(f"{kernel}: kernel, s", {}).setdefault(config["n_train"], []).append(
                    statistics.median(run["seconds"]["kernel"] for run in whole))
            rank = config["rank"] or "chosen" if config["precondition"] == "lowrank" else config["precondition"]
            measured.setdefault(f"{kernel}: CG steps, ridge {runs[0]['ridge']:g}, rank {rank}", {})[
                config["n_train"]] = [statistics.median(run["cg_iterations"] for run in runs)]
    sizes = sorted({n for points in measured.values() for n in points})
    rows = []
    for label, points in sorted(measured.items()):
        points = {n: min(values) for n, values in points.items()}
        slope = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0] if len(points) > 2 else None
        rows.append([label, *(f"{points[n]:.3g}" if n in points else "" for n in sizes),
                     "" if slope is None else f"{slope:.2f}"])
    return table(["", *(f"n = {n:,}" for n in sizes), "slope"], rows)


def speed(path):
    """A table for each machine in speed.jsonl: for each network and kind the last line here and of neural_tangents."""
    machines = {}
    for _, line in lines(path):
        if not line["small"]:
            key = line["network"], line["kind"], line["engine"]
            machines.setdefault((line["device"], line["devices"]), {})[key] = line
    out = []
    for (device, count), measured in machines.items():
        best = max(line["entries_per_second"] * line["flops"] / line["floor"] if (name, engine) == ("fc", "here")
                   else line["flops"] for (name, _, engine), line in measured.items())  # fc is a matrix product, too
        rows, order = [], [name for name in KERNELS if any(name == key[0] for key in measured)]
        for name, kind in ((name, kind) for name in order for kind in ("nngp", "ntk")):
            one, other = (measured.get((name, kind, engine)) for engine in ("here", "neural_tangents"))
            if one:
                rate, floor = one["entries_per_second"], (one["floor"] or 0) * best / one["flops"]
                rows.append([name, kind.upper(), f"{rate:,.3g}" if rate < 1000 else f"{rate:,.0f}", one["compiler"],
                             f"{other['entries_per_second']:,.3g} ({other['block']})" if other else "",
                             f"{rate / other['entries_per_second']:.3g}" if other else "",
                             f"{rate / floor:.0%}" if floor else ""])
        last = max(measured.values(), key=lambda line: line["date"])
        made = f"{best / 1e9:,.0f} GFLOP/s in a matrix product" + (
            f", {last['copy'] / 1e12:.1f} TB/s in a copy" if last["copy"] else "")
        out.append(f"{count} x {device}, {made}, JAX {last['jax']}, {last['date'][:10]}, commit {last['commit']}:\n\n" + table(
            ["network", "kind", "here, entries/s", "compiled by", "neural_tangents (batch)", "ratio", "of the floor"], rows))
    return "\n\n".join(out)


FRONT = (("fc", "ntk", False), ("fc", "ntk", True), ("cnn_vec", "nngp", False), ("cnn_vec", "nngp", True),
         ("myrtle5", "nngp", True), ("myrtle10", "nngp", True))  # kernel, kind, flips


def front(groups, dataset):
    """The table of the front page: for each kernel in FRONT the best run, by test accuracy, whose ridge was chosen."""
    rows = []
    for wanted in FRONT:
        matching = [runs for runs in groups if runs[0]["config"]["dataset"] == dataset and runs[0]["search"]
                    and runs[0]["config"]["crops"] == 1 and runs[0]["config"]["n_test"] >= 1000
                    and tuple(runs[0]["config"][k] for k in ("kernel", "kind", "flips")) == wanted]
        if matching:
            runs = min(matching, key=lambda runs: statistics.mean(test_error(run) for run in runs))
            config, whole = runs[0]["config"], at_once(runs)
            whole = [run for run in whole if run.get("device") == whole[-1].get("device")]
            seconds = [run["seconds"]["kernel"] for run in whole]
            time = f"{statistics.median(seconds) / 60:.1f} min, {whole[-1].get('device')}" if whole else ""
            rows.append([name(tuple(config[k] for k in CURVE)), f"{config['n_train']:,}", f"{config['n_test']:,}",
                         percent([test_error(run) for run in runs]), time])
    return table(["kernel", "images", "test images", "accuracy, %", "time of K, device"], rows)
