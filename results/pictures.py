"""The pictures of the README, drawn from real computations: kernel, sheets, solve, curves, lesson.

    python -m results.pictures [FOLDER]           half a minute; FOLDER is results/pictures by default

They are SVG with real text and no background, in greys and colours that are legible on white and on black.
Proved by: results/test_pictures.py
"""

import argparse
import contextlib
import json
import os
import zlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import data
import kernel
import pcg
import tiles
from results import tables
from results.laws import bent_error, forecast

try:
    from fast.fused import kernel_fn as engine
except ImportError:
    from kernel import kernel_fn as engine

HERE = os.path.dirname(os.path.abspath(__file__))
RUNS, FOLDER = os.path.join(HERE, "runs.jsonl"), os.path.join(HERE, "pictures")
GREY = "#7d8590"  # legible on white and on black
COLOURS = ["#2f81c7", "#d5652b", "#c25a9c", "#b98900", "#2a9d7c", "#8a6fd1", "#5b9bd5", "#a05a2c"]
style = matplotlib.rc_context({"svg.hashsalt": "pictures", "svg.fonttype": "none", "text.color": GREY, "axes.edgecolor": GREY,
                               "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.titlecolor": GREY,
                               "figure.facecolor": "none", "axes.facecolor": "none"})


def save(figure, folder, name, **metadata):
    figure.savefig(os.path.join(folder, f"{name}.svg"), metadata={"Date": None, **metadata}, transparent=True)


def digest(drawn):
    """A checksum of what a figure of curves is drawn from; the .svg contains it, for results/report.py --check."""
    return f"curves {zlib.crc32(repr(drawn).encode()):08x}"


def owners(K, devices):
    """{tile (i, j): device}: like tiles.computed, which gives each device a run of neighbouring tiles."""
    keys = sorted(K.keys(), key=lambda key: (key[1], key[0]))
    return {tuple(key.tolist()): device for device, run in enumerate(np.array_split(np.array(keys), devices)) for key in run}


@style
def draw_kernel(folder, n=300, tile=60, devices=4):
    """Draw K of n digits, sorted by class, its tiles, and the device that computes each. Returns {tile: device}."""
    x, y, _, _ = data.load("digits", n_train=n)
    order = np.argsort(y, kind="stable")
    K = tiles.gram(kernel.kernel_fn("fc", "nngp"), (x[order] / 16).astype(np.float32), tile=tile, quiet=True)
    owner = owners(K, devices)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    dense = K.dense()
    axes.imshow(dense[::4, ::4], cmap="viridis", extent=(0, n, n, 0), interpolation="nearest")
    for (i, j), device in owner.items():
        axes.add_patch(Rectangle((j * tile + 2, i * tile + 2), tile - 4, tile - 4, fill=False, linewidth=2.2,
                                 edgecolor=["#ffffff", "#ff9a3c", "#ff6fae", "#7fd4ff"][device]))
        axes.text((j + 0.5) * tile, (i + 0.5) * tile, str(device), color="white", ha="center", va="center", fontsize=12)
    ends = np.cumsum(np.bincount(y[order]))
    axes.set_yticks(ends - np.diff([0, *ends]) / 2, [f"{digit}" for digit in range(10)])
    axes.set_xticks([])
    axes.set_ylabel("digit")
    axes.set_title(f"K of {n} digits: only tiles on and above the diagonal exist", fontsize=11)
    figure.text(0.76, 0.5, "the number in a tile:\nthe device that\ncomputes and keeps it\n\nbright: k(x, x′) is large,\n"
                "the images are alike\n\nbelow the diagonal:\nthe same, mirrored", fontsize=10, va="center")
    figure.get_layout_engine().set(rect=(0, 0, 0.76, 1))
    save(figure, folder, "kernel")
    return owner


@style
def draw_sheets(folder):
    """Draw K[p, q] of two images of 4 x 4 pixels, one letter for each pair of rows r and r', and the same letters cut into
    sheets a = r' - r."""
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    letters = "ABCDEFGHIJKLMNOP"
    window, pool = {"A", "F", "K"}, {"A", "B", "E", "F"}
    for axes, columns in ((left, [f"r′={k}" for k in range(4)]), (right, [f"a={k}" for k in range(5)])):
        size = len(columns)
        axes.set(xlim=(-0.9, size), ylim=(size if axes is right else 4, -0.8), aspect="equal")
        axes.axis("off")
        for k, name in enumerate(columns):
            axes.text(k + 0.5, -0.3, name, ha="center", va="center", fontsize=10)
        for r in range(4 + (axes is right)):
            axes.text(-0.45, r + 0.5, f"r={r}" if r < 4 else "–", ha="center", va="center", fontsize=10)
            for k in range(size):
                q = k if axes is left else (r + k) % 5
                letter = letters[4 * r + q] if r < 4 and q < 4 else "0"
                axes.add_patch(Rectangle((k, r), 1, 1, facecolor="none", edgecolor=GREY, linewidth=0.8))
                if letter in window:
                    axes.add_patch(Rectangle((k + 0.06, r + 0.06), 0.88, 0.88, facecolor=COLOURS[0], alpha=0.55, linewidth=0))
                if letter in pool:
                    axes.add_patch(Rectangle((k + 0.14, r + 0.14), 0.72, 0.72, fill=False, edgecolor=COLOURS[1], linewidth=2))
                axes.text(k + 0.5, r + 0.5, letter, ha="center", va="center", fontsize=12 if letter != "0" else 9)
    left.set_title("K[p, q]: each letter holds all pixels\nof row r with all pixels of row r′", fontsize=11)
    right.set_title("the same letters, one sheet a column: r′ = r + a\n(zeros are rows outside the image)", fontsize=11)
    figure.supxlabel("blue: a 3 × 3 window moves in both images together, so it stays in one sheet     "
                     "orange: a 2 × 2 pool takes four letters", fontsize=9, color=GREY)
    save(figure, folder, "sheets")


@style
def draw_solve(folder, n=1000, ridge=1e-5):
    """Draw the residual against the step without preconditioner, with Jacobi and with low rank. Returns {name: Info}."""
    x, y, _, _ = data.load("digits", n_train=n)
    K = tiles.gram(engine("fc", "ntk"), (x / 16).astype(np.float32), quiet=True)
    Y, absolute = data.one_hot(y), ridge * K.diagonal().mean()
    preconditioners = {"no preconditioner": pcg.none(K), "Jacobi: the diagonal": pcg.jacobi(K),
                       "low rank: 100 columns of K": pcg.low_rank(K, 100), "low rank: 300 columns": pcg.low_rank(K, 300)}
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot(yscale="log")
    infos = {}
    for colour, (name, precondition) in zip([GREY, *COLOURS], preconditioners.items()):
        infos[name] = info = pcg.solve(K.matvec, Y, absolute, precondition(absolute), tol=1e-6, max_iters=3000)[1]
        axes.plot(info.history, color=colour, linewidth=1.4, label=f"{name}: {info.iterations} steps")
    axes.set(xlabel="steps (one product with K each)", ylabel="residual |y − A x| / |y|, worst column")
    axes.set_title(f"Solving (K + λI) x = y for {n:,} digits, ridge {ridge:g}", fontsize=11)
    axes.legend(frameon=False, labelcolor=GREY, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "solve")
    return infos


FAMILIES = {"fc": "ntk", "cnn_vec": "nngp", "myrtle5": "nngp", "myrtle10": "nngp"}  # kernel: kind


def chosen(groups):
    """{(kernel, flips): (key of tables.curves, {n: [test error, ...]}, {n: [unexplained share, ...]})}: of each kernel in
    FAMILIES the curve that reaches the highest accuracy on CIFAR-10."""
    found, shares = (tables.curves(groups, "cifar10", *value) for value in ((), (tables.unexplained,)))
    best = {}
    for key in sorted(found, key=lambda key: np.mean(list(found[key].values())[-1]), reverse=True):
        config = dict(zip(tables.CURVE, key))
        if FAMILIES.get(config["kernel"]) == config["kind"] and config["crops"] == 1 and config["n_test"] >= 1000:
            best[config["kernel"], config["flips"]] = key, found[key], shares[key]
    return best


@style
def draw_curves(folder, path=RUNS):
    """Draw the curves that are `chosen`: test accuracy against n, the mean over subsets, with the sd if there are several; and
    the bent law, solid up to a quarter of the largest n, to which it was fitted, dashed where it predicts.  Returns {name: {n:
    [test error, ...]}}."""
    best = chosen(tables.load(path))
    figure = Figure(figsize=(7.6, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log")
    for network, flips in sorted(best, key=lambda one: (list(FAMILIES).index(one[0]), one[1])):
        (key, points, shares), colour = best[network, flips], COLOURS[list(FAMILIES).index(network)]
        law = forecast(points, shares, draws=2)
        if law:
            for start, end, line in ((law.fitted[0], law.fitted[-1], "-"), (law.fitted[-1], max(points), "--")):
                smooth = np.geomspace(start, end, 15)
                axes.plot(smooth, 100 * (1 - bent_error(smooth, *law[1:5])), color=colour, linewidth=1.2, linestyle=line)
        mean = [100 - 100 * np.mean(errors) for errors in points.values()]
        sd = [100 * np.std(errors, ddof=1) if len(errors) > 1 else 0 for errors in points.values()]
        axes.errorbar(list(points), mean, sd, color=colour, linewidth=1.3, linestyle="none", marker="o", markersize=3.5,
                      fillstyle="none" if flips else "full", label=tables.name(key))
    axes.set(xlabel="training images (line: the law as fitted; dashed: its prediction)", ylabel="test accuracy, %")
    axes.set_xticks([100, 1000, 10000, 50000], ["100", "1,000", "10,000", "50,000"])
    axes.set_title("CIFAR-10, ridge chosen on training images", fontsize=11)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, labelcolor=GREY, fontsize=9)
    save(figure, folder, "curves", Description=digest(best))
    return {tables.name(key): points for key, points, _ in best.values()}


@style
def draw_lesson(folder):
    """Draw the picture of the lesson's second chapter, a random network that gets wider, by running the code above it.
    Returns the variables of that code."""
    with open(os.path.join(HERE, "..", "lesson.ipynb")) as file:
        cells = json.load(file)["cells"]
    end = next(k for k, cell in enumerate(cells) if cell["source"][0].startswith("## 3."))
    plt.switch_backend("agg")
    found = {}
    for cell in cells[:end]:
        if cell["cell_type"] == "code":
            plt.close("all")
            with contextlib.redirect_stdout(None):
                exec("".join(cell["source"]).replace("plt.show()", ""), found)
    figure = plt.gcf()
    figure.axes[0].lines[-1].set_color(GREY)
    figure.axes[0].legend(frameon=False, fontsize=7, handlelength=1, labelcolor=GREY)
    save(figure, folder, "lesson")
    plt.close("all")
    return found


def main(folder=FOLDER):
    os.makedirs(folder, exist_ok=True)
    for draw in (draw_kernel, draw_sheets, draw_solve, draw_curves, draw_lesson):
        draw(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the pictures of the README.")
    parser.add_argument("folder", nargs="?", default=FOLDER)
    main(parser.parse_args().folder)
