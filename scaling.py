"""Results -> the README's table.

results/runs.jsonl holds a line for every run that train_cifar.py has made: configuration, result,
versions, commit. Runs that differ in nothing but the seed are one row: mean and standard deviation
over the seeds, each of which draws another subset of the training set; the test images are the same.

    python scaling.py            write the table into README.md, between its two markers
    python scaling.py --check    fail if the table there is not what the runs say

Proved by: test_all.py, section docs
"""

import argparse
import json
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
BEGIN, END = "<!-- results: written by scaling.py -->", "<!-- end of results -->"
SAME = ("dataset", "kernel", "kind", "depth", "whiten", "zca_eps", "flips", "crops", "fit_on", "n_train",
        "n_test")
HEAD = """| kernel | kind | images to train | to test | seeds | accuracy % ± sd | ridge | CG steps | kernel s | \
ridge + solve s | memory GB |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def load(path):
    """Runs of a jsonl file, grouped: [[run, ...], ...]; of a seed run twice, the later one counts."""
    groups = {}
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                run = json.loads(line)
                run["config"].setdefault("fit_on", None)  # the flag is younger than the first runs
                key = tuple(run["config"][name] for name in SAME)
                groups.setdefault(key, {})[run["config"]["seed"]] = run
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not a run of train_cifar.py: {error!r}") from error
    return [list(runs.values()) for runs in groups.values()]


def row(runs):
    """One line of the table: mean ± sd of the accuracy over the seeds, medians of the rest."""
    config = runs[0]["config"]
    accuracy = [100 * run["test_accuracy"] for run in runs]
    spread = f" ± {statistics.stdev(accuracy):.2f}" if len(runs) > 1 else ""
    ridges = sorted({run["ridge"] for run in runs})
    at_once = [run for run in runs
               if run.get("entries_computed", run.get("entries")) == run.get("entries")]
    copies = config["crops"] * (1 + config["flips"])

    def median(value, runs=runs):
        return f"{statistics.median(value(run) for run in runs):.0f}" if runs else "–"
    cells = [
        config["kernel"], config["kind"].upper(),
        f"{config['n_train']:,}" + (f" × {copies}" if copies > 1 else ""), f"{config['n_test']:,}",
        len(runs), f"{statistics.mean(accuracy):.2f}{spread}",
        " … ".join(f"{ridge:.2g}" for ridge in (ridges[:1] + ridges[1:][-1:])),
        median(lambda run: run["cg_iterations"]),
        median(lambda run: run["seconds"]["kernel"], at_once),
        median(lambda run: run["seconds"]["ridge"] + run["seconds"]["solve"]),
        f"{max(run['peak_memory_gb'] for run in runs):.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(path, dataset="cifar10"):
    """The table of one data set, sorted by kernel, kind and size."""
    groups = [runs for runs in load(path) if runs[0]["config"]["dataset"] == dataset]
    order = ["fc", "cnn_vec", "cnn_gap", "myrtle5", "myrtle7", "myrtle10"]
    groups.sort(key=lambda runs: (order.index(runs[0]["config"]["kernel"]),
                                  runs[0]["config"]["n_train"], runs[0]["config"]["kind"]))
    return "\n".join([HEAD, *map(row, groups)])


def main(argv=None):
    """Write the table, or check it; returns 1 where --check finds it stale."""
    parser = argparse.ArgumentParser(description="Write the table of results into README.md.")
    parser.add_argument("--runs", default=os.path.join(HERE, "results", "runs.jsonl"))
    parser.add_argument("--readme", default=os.path.join(HERE, "README.md"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    args = parser.parse_args(argv)
    with open(args.readme) as file:
        text = file.read()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{args.readme} needs the markers {BEGIN} and {END}, once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{table(args.runs)}\n{END}{after}"
    if args.check:
        if new != text:
            print("README.md is stale: run python scaling.py", file=sys.stderr)
        return int(new != text)
    with open(args.readme, "w") as file:
        file.write(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
