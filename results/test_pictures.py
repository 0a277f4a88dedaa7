"""The pictures of the README: each is drawn from a real computation, is small and has real text."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from test_all import Dense, data, digits, kernel, linear, spectrum, tiles, train  # isort: skip  (sets JAX up)

import choose
import pcg
from results import pictures, plot, report, tables


def has_text(path, *words):
    """An SVG under 60 KB whose words are text."""
    text = path.read_text()
    assert text.startswith("<?xml") and len(text.encode()) < 60 * 1024
    assert all(re.search(rf"<text[^>]*>[^<]*{re.escape(word)}|<tspan[^>]*>[^<]*{re.escape(word)}", text) for word in words)


def test_pictures_kernel(tmp_path):
    """The picture of the kernel is small and has text; the device written in a tile is the one to which tiles.computed gives
    the tile."""
    owners = pictures.draw_kernel(tmp_path)
    has_text(tmp_path / "kernel.svg", "K of 300 digits", "the device that")
    x, seen = np.zeros((300, 1), np.float32), {}
    K = tiles.empty(300, 300, 60, True)
    for step, (key, _) in enumerate(tiles.computed(linear, [(0, x), (1, x)], K.sides, list(K.keys()))):
        seen.setdefault(step % 4 if step < 12 else step - 12, []).append(key)
    assert set(owners) == set(K.keys()) and sorted(set(owners.values())) == [0, 1, 2, 3]
    for keys in seen.values():
        assert len({owners[key] for key in keys}) == 1


def test_pictures_sheets(tmp_path):
    """The picture of the sheets is small and has text."""
    pictures.draw_sheets(tmp_path)
    has_text(tmp_path / "sheets.svg", "a=4", "r′=3", "3 × 3 window")


def test_pictures_solve(tmp_path):
    """The picture of the solver is small and has text; there low rank needs fewer than half of the steps, and a higher rank
    fewer still."""
    steps = [info.iterations for info in pictures.draw_solve(tmp_path).values()]
    has_text(tmp_path / "solve.svg", "no preconditioner", "Jacobi", "low rank")
    assert 2 * steps[2] < min(steps[:2]) and steps[3] < steps[2]


def test_pictures_curves(tmp_path, monkeypatch):
    """The picture of the curves is small and has text: four to eight curves, each with at least three sizes. There, and in the
    figure of results/README.md, a law is solid up to a quarter of the largest n, or below, and dashed from there to it."""
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure) or (
        savefig(figure, *args, **options) if len(drawn) == 1 else None))
    points = pictures.draw_curves(tmp_path)
    has_text(tmp_path / "curves.svg", "cnn_vec", "myrtle10", "test accuracy")
    assert 4 <= len(points) <= 8 and all(len(of) >= 3 for of in points.values())
    groups = tables.load(pictures.RUNS)
    report.figure(groups, "cifar10", "")
    for figure, number in zip(drawn, (len(points), tables.laws(groups, "cifar10").count("(1 + n")), strict=True):
        solid, dashed = ([line.get_xdata() for axes in figure.axes for line in axes.lines if line.get_linestyle() == style and
                          line.get_marker() == "None"] for style in ("-", "--"))
        assert len(solid) == len(dashed) == number
        assert all(before[-1] == after[0] and 4 * after[0] <= after[-1] * (1 + 1e-9) for before, after in zip(solid, dashed))


def test_pictures_lesson(tmp_path):
    """The picture of the lesson is small and has text. It shows what chapter 2 computes: its errors are those that its text
    states."""
    found = pictures.draw_lesson(tmp_path)
    has_text(tmp_path / "lesson.svg", "width 1000", "kernel_fn", "2,000 networks")
    assert found["error_10"] > 3 * found["error_1000"] > 0 and f"{found['error_1000']:.2f}" == "0.09"


def test_plot_of_residuals():
    """The figure shows the histories it was given, under their names."""
    K, y = spectrum(50, 1e4), np.random.default_rng(0).normal(size=(50, 2))
    infos = {name: pcg.solve(lambda v: K @ v, y, 1e-4, P)[1]
             for name, P in (("none", None), ("half", pcg.low_rank(Dense(K), 25)(1e-4)))}
    axes = Figure().add_subplot()
    plot.residuals(axes, infos)
    for line, (name, info) in zip(axes.lines, infos.items(), strict=True):
        assert list(line.get_ydata()) == info.history and line.get_label().startswith(f"{name}: ")


def test_plot_of_errors(tmp_path):
    """The picture of error against ridge has leave-one-out error, test error and effective dimension; the test error equals
    that of a dense solve."""
    x, labels = digits(80)
    fn, y = kernel.kernel_fn("fc", "nngp"), data.one_hot(labels)
    K = np.asarray(fn(x), np.float64)
    figure = Figure()
    plot.errors(figure.add_subplot(), choose.Spectrum(K[:60, :60]), y[:60], 0.1, K[60:, :60], y[60:])
    left, right = figure.axes
    f = K[60:, :60] @ np.linalg.solve(K[:60, :60] + 10 * np.diag(K[:60, :60]).mean() * np.eye(60), y[:60])
    assert len(left.lines) == 3 and len(right.lines) == 1
    assert abs(left.lines[1].get_ydata()[0] - np.sqrt(np.mean((f - y[60:]) ** 2))) < 1e-6


@pytest.mark.parametrize("more, names", [(["--kind", "both", "--crops", "2"], ["p-nngp.png", "p-ntk.png"]), ([], ["p.png"])])
def test_plot_of_a_run(tmp_path, more, names):
    """--plot draws a picture for each kind and does not change the result of the run."""
    flags = ["--n_train", "40", "--n_test", "20", "--ridge", "0.1", "--depth", "1", "--devices", "1", *more]
    run, plain = train(tmp_path, *flags, "--plot", str(tmp_path / "p.png")), train(tmp_path, *flags)
    assert [(tmp_path / name).stat().st_size > 10_000 for name in names] == [True] * len(names)
    run, plain = (result.get("ntk", result) for result in (run, plain))
    assert run["test_mse"] == plain["test_mse"]
