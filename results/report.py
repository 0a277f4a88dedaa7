"""The command that writes the tables and the figure of all curves: runs.jsonl -> results/README.md, results/curves.svg.

    python -m results.report                       write the tables, the table of the front page and the figure
    python -m results.report --check               write nothing; exit with 1 if they differ from the runs
    python -m results.report --runs curve/runs.jsonl --dataset digits --figure curve.png       print and draw other runs

Proved by: results/test_results.py
"""

import argparse
import os
import sys

import numpy as np

import data
from results import pictures
from results.laws import bent_error, forecast, local_exponent
from results.tables import (
    CURVE,
    FEW,
    HERE,
    augmentation,
    cost,
    curves,
    elsewhere,
    families,
    front,
    laws,
    learning,
    load,
    name,
    of_numbers,
    results,
    speed,
    unexplained,
)

SPEED = os.path.join(HERE, "speed.jsonl")


def figure(groups, dataset, path):
    """Draw test error against n, both logarithmic, a panel for each of `tables.families`: the mean and sd at every size, and
    the bent law of curves of four octaves, solid where it was fitted, dashed where it predicts; .svg, .png or .pdf.

    NNGP has round markers, NTK square ones. Hollow markers: with mirror images or crops. The grey is legible on white and on
    black."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    grey, panels, shares = "#7d8590", families(groups, dataset), curves(groups, dataset, unexplained)
    rows = -(-len(panels) // 2)
    page = Figure(figsize=(11, 4.2 * rows), layout="constrained", facecolor="none")
    colours = ["#2f81c7", "#d5652b", "#c25a9c", "#b98900", "#2a9d7c", "#8a6fd1", "#5b9bd5", "#a05a2c"]
    for number, panel in enumerate(panels):
        axes = page.add_subplot(rows, min(2, len(panels)), number + 1, xscale="log", yscale="log", facecolor="none")
        for index, (key, points) in enumerate(panel.items()):
            config, n = dict(zip(CURVE, key)), np.array(list(points))
            mean = np.array([np.mean(errors) for errors in points.values()])
            sd = [np.std(errors, ddof=1) if len(errors) > 1 else 0 for errors in points.values()]
            colour, found = colours[index % len(colours)], forecast(points, shares[key], draws=2)
            if found:
                for start, end, line in ((found.fitted[0], found.fitted[-1], "-"), (found.fitted[-1], max(n), "--")):
                    smooth = np.geomspace(start, end, 50)
                    axes.plot(smooth, bent_error(smooth, *found[1:5]), color=colour, linewidth=1, linestyle=line)
            axes.errorbar(n, mean, sd, color=colour, linestyle="none", capsize=2, markersize=5,
                          marker="o" if config["kind"] == "nngp" else "s",
                          fillstyle="none" if config["flips"] or config["crops"] > 1 else "full",
                          label=f"{name(key)}: {local_exponent(points):.2f}")
        axes.set_xlabel("training images n (line: the law as fitted; dashed: its prediction)", color=grey)
        axes.set_ylabel("test error", color=grey)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 7, 8)))
        axes.yaxis.set_major_formatter(FuncFormatter(
            (lambda y, _: f"{y:.3g}") if of_numbers(groups, dataset) else lambda y, _: f"{100 * y:.3g} %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axes.tick_params(which="both", colors=grey)
        axes.grid(color=grey, alpha=0.25, linewidth=0.5)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(grey)
        axes.legend(loc="lower left", frameon=False, labelcolor=grey, fontsize=8, title="kernel: local exponent")
        axes.get_legend().get_title().set(color=grey, fontsize=8)
    about = pictures.digest((curves(groups, dataset), shares))
    with matplotlib.rc_context({"svg.hashsalt": "scaling", "svg.fonttype": "none"}):
        page.savefig(path, dpi=150, metadata={"Description": about, "Date": None} if path.endswith(".svg") else None)


def parts(groups, dataset):
    """{marker: table} for results/README.md."""
    out = {part.__name__: part(groups, dataset) for part in (results, learning, laws, augmentation, cost)}
    for marker, metric in (("proteins", "test_spearman"), ("molecules", "test_auc"), ("numbers", "test_rmse"),
                           ("assays", "test_ap")):
        out[marker] = elsewhere(groups, metric)
    out["speed"] = speed(SPEED)
    out["landscape"] = "\n\n".join(part(groups, "landscape") for part in (learning, laws))
    return out


def filled(text, tables, where):
    """The text of the page `where` with the tables {NAME: table} put between <!-- NAME: written by results/report.py -->
    and <!-- end of NAME -->.  ValueError: a marker is missing or occurs twice."""
    for marker, table in tables.items():
        begin, end = f"<!-- {marker}: written by results/report.py -->", f"<!-- end of {marker} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{where}: expected the markers {begin} and {end} exactly once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def main(argv=None):
    """Write tables and figure, or check them; returns 1 if --check finds a stale one, else 0."""
    parser = argparse.ArgumentParser(description="Write the tables, power laws and figure of the runs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", default=os.path.join(HERE, "runs.jsonl"), metavar="FILE", help="the runs to read")
    parser.add_argument("--dataset", default="cifar10", help="data set of the learning curves")
    parser.add_argument("--figure", metavar="FILE", help="print the tables and draw this figure; None: write the pages, and "
                        "curves.svg into the folder of the runs")
    parser.add_argument("--readme", default=os.path.join(HERE, "README.md"), metavar="FILE", help="page with all tables")
    parser.add_argument("--front", default=os.path.join(HERE, "..", "README.md"), metavar="FILE", help="front page")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page or figure is stale")
    args = parser.parse_args(argv)
    if args.check and args.figure:
        parser.error("--check with --figure: --check writes nothing; leave one out")
    groups = load(args.runs)
    drawn = curves(groups, args.dataset)
    if not drawn:
        raise ValueError(f"{args.runs} has no kernel with three sizes of {args.dataset}, its ridge chosen among several, and "
                         f"{FEW} or more rows tested; run three or more --sizes so, or give another --dataset: "
                         + ", ".join(sorted({repr(runs[0]["config"]["dataset"]) for runs in groups})))
    if args.figure:
        print(learning(groups, args.dataset), laws(groups, args.dataset), sep="\n\n")
        figure(groups, args.dataset, args.figure)
        return 0
    picture = os.path.join(os.path.dirname(args.runs), "curves.svg")
    stale, pages = [], {}
    for page, tables in ((args.readme, parts(groups, args.dataset)), (args.front, {"front": front(groups, args.dataset)})):
        with open(page) as file:
            text = file.read()
        pages[page] = filled(text, tables, page)
        if pages[page] != text:
            stale.append(page)
    if not args.check:
        for page, text in pages.items():
            with data.replacing(page) as file:
                file.write(text.encode())
        figure(groups, args.dataset, picture)
        return 0
    about = pictures.digest((drawn, curves(groups, args.dataset, unexplained)))
    if not os.path.exists(picture) or about not in open(picture).read():
        stale.append(picture)
    if os.path.samefile(args.runs, pictures.RUNS):
        front_picture = os.path.join(pictures.FOLDER, "curves.svg")
        stale += [front_picture] if pictures.digest(pictures.chosen(groups)) not in open(front_picture).read() else []
    if stale:
        print(f"{' and '.join(stale)}: stale; run python -m results.report and results.pictures", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(str(error))
