"""From runs to tables, laws and figures; the comparison of solvers.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

import json
import re

from test_all import (  # isort: skip
    as_users_have_it, train,
)
import numpy as np
import pytest
from scipy.optimize import nnls

from results import compare_sklearn, compare_solvers, laws, report, speed, tables

# ------------------------------------------------------------------------------------------ hosts

def test_train_solvers_compared(capsys):
    """compare_solvers.py solves one system with every method to the same residual in every column. Low rank takes at most
    half the steps of none. Every method has a line in the table."""
    with as_users_have_it(x64=True):
        results = compare_solvers.main(["--n", "300", "--ranks", "100", "--ridges", "1e-4", "--repeats", "1"])
    steps = {name: steps for (name, _), (seconds, steps, _) in results.items() if seconds > 0}
    assert len(steps) == len(results) >= 6 and steps["none"] >= 2 * steps["rank 100"]
    said = capsys.readouterr().out
    assert all(f"\n| {name} | " in said for name in steps)


def test_train_solvers_take_a_store(tmp_path):
    """compare_solvers.py takes the K that a run has kept, and refuses that of another network or of other images."""
    train(tmp_path, "--n_train", "50", "--n_test", "20", "--kind", "ntk", "--store", str(tmp_path / "K"))
    flags = ["--store", str(tmp_path / "K"), "--ridges", "1e-2", "--only", "none", "--repeats", "1"]
    (_, steps, _), = compare_solvers.main([*flags, "--n", "40"]).values()
    assert steps > 1
    for other in (["--n", "40", "--kernel", "cnn_vec"], ["--n", "60"]):
        with pytest.raises(ValueError, match="train-ntk holds another matrix than"):
            compare_solvers.main([*flags, *other])
    train(tmp_path, "--n_train", "50", "--n_test", "20", "--kind", "ntk", "--store", str(tmp_path / "K1"), "--seed", "1")
    with pytest.raises(ValueError, match="train-ntk holds another matrix than fc of the first 40 images of seed 0"):
        compare_solvers.main([*flags, "--n", "40", "--store", str(tmp_path / "K1")])


def test_train_sklearn_compared(capsys):
    """compare_sklearn.py: KernelRidge and KernelRegressor have the same coefficients, up to the rounding of K v."""
    found, difference = compare_sklearn.main(["--n", "200"])
    assert difference < 1e-6
    said = capsys.readouterr().out
    assert all(f"\n| {method} | " in said and one["seconds"] > 0 for method, one in found.items())


def test_speed_is_measured(tmp_path):
    """speed.py writes a line for each network, kind and engine; its table has their ratio. Myrtle-10's floor counts 3 x 32^4 +
    3 x 16^4 + 3 x 8^4 elements, each 32 instructions, or 8 bytes."""
    path, elements = tmp_path / "speed.jsonl", 3 * (32**4 + 16**4 + 8**4)
    with as_users_have_it():
        lines = speed.main(["--small", "--only", "fc", "--rounds", "1", "--out", str(path)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines and tables.speed(path) == ""
    assert {(line["kind"], line["engine"]) for line in lines} == {
        (kind, engine) for kind in ("nngp", "ntk") for engine in ("here", "neural_tangents")}
    assert np.isclose(speed.floor("myrtle10", "nngp", 64e12, None), 1e12 / elements)
    assert np.isclose(speed.floor("myrtle10", "ntk", 64e12, 16e9), 1e9 / elements)
    for line, rate in zip(lines[:2], (3e6, 2e4)):
        line.update(small=False, entries_per_second=rate, floor=4e6, block=7)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| fc | NTK | 3,000,000 | XLA | 2e+04 (7) | 150 | 75% |" in tables.speed(path)


# ---------------------------------------------------------------------------------------- scaling

@pytest.mark.parametrize("a, b, c", [(2.0, 0.3, 0.0), (1.5, 0.5, 0.2), (0.9, 0.1, 0.0)])
def test_scaling_finds_a_known_law(a, b, c):
    """From points on a n^-b + c the fit recovers a, b and c up to the grid of b; with 1 % noise the mean error of b is below
    0.15."""
    n = 2.0 ** np.arange(5, 15)
    found = np.array(laws.fit(n, (a * n**-b + c)[None], np.ones(10)))[:, 0]
    assert np.allclose(found, [a, b, c], rtol=0.05, atol=0.01)
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=(20, 10))
    _, powers, _ = laws.fit(n, (a * n**-b + c) * noise, np.ones(10))
    assert np.abs(powers - b).mean() < 0.15


def test_scaling_fit_is_the_least():
    """The fit is at least as good as SciPy's non-negative least squares for a and c at every b of the grid, also on noisy
    points whose best a or c is zero."""
    rng, n, weight = np.random.default_rng(0), np.array([10.0, 30, 100, 300, 1000]), np.array([3, 3, 3, 2, 1])
    for shape in (n**-0.3, n**-0.3 - 0.1, np.full(5, 0.5), n**0.1):
        error = shape * (1 + 0.05 * rng.normal(size=5))
        a, b, c = (z[0] for z in laws.fit(n, error[None], weight))
        found = np.linalg.norm(np.sqrt(weight) * ((a * n**-b + c) / error - 1))
        design = [np.sqrt(weight)[:, None] * np.stack([n**-b, np.ones(5)], 1) / error[:, None] for b in laws.POWERS]
        assert found <= min(nnls(M, np.sqrt(weight))[1] for M in design) * (1 + 1e-9)


def test_scaling_interval_covers():
    """The 95 % interval contains the true b in 90 to 99 of 100 experiments with 8 sizes, three subsets each but only one of
    the largest, and errors that scatter by 2 %, less for larger n."""
    n, inside = 2 ** np.arange(7, 15), 0
    for experiment in range(100):
        rng = np.random.default_rng(experiment)
        scatter = 0.02 * (n[0] / n) ** 0.25
        points = {int(k): list((2 * k**-0.3 + 0.1) * (1 + s * rng.normal(size=1 if k == n[-1] else 3)))
                  for k, s in zip(n, scatter)}
        _, (_, (low, high), _) = laws.law(points, draws=300, seed=experiment)
        inside += low <= 0.3 <= high
    assert 90 <= inside <= 99
    assert laws.law({k: v[:1] for k, v in points.items()})[1] is None
    with pytest.raises(ValueError, match="2 sizes"):
        laws.law({10: [0.5], 20: [0.4]})


def broken(n, sharp=1.0, n0=300, b=0.15):
    """(error, u) of a broken power law, flat below n0."""
    u = (1 + (n / n0) ** sharp) ** (-b / sharp)
    return 0.9 - 1.1 * (1 - u) ** 0.95, u


@pytest.mark.parametrize("sharp", [0.7, 0.8, 1.0])
def test_scaling_forecast_of_broken_laws(sharp):
    """Broken power laws whose sharpness and whose error are not those of the bent law, with 0.5 % noise: it predicts the error
    at N within 1.5 points, and a power law with a floor, fitted to the same sizes, misses by more than 4."""
    n = 2 ** np.arange(7, 16)
    for seed in range(10):
        noise = 1 + 0.005 * np.random.default_rng(seed).normal(size=(9, 3))
        errors, shares = ({int(k): list(z * noise[i] ** power) for i, (k, z) in enumerate(zip(n, of))}
                          for of, power in zip(broken(n, sharp), (1, 0.5)))
        found, truth = laws.forecast(errors, shares, draws=2), broken(n[-1], sharp)[0]
        a, b, c = (z[0] for z in laws.fit(n[:7], [[np.mean(errors[k]) for k in n[:7]]], np.ones(7)))
        assert abs(found.error - truth) < 0.015 < 0.04 < a * n[-1] ** -b + c - truth


def test_scaling_forecast_does_not_look_ahead():
    """The forecast finds the law of exact points and is the same whatever was measured above N / 4. A curve of less than four
    octaves, or of fewer than three sizes up to N / 4, has none."""
    n = [100, 200, 400, 1600]
    shares, errors = ({k: [p + q / (1 + k / 100)] for k in n} for p, q in ((0, 1), (0.1, 0.8)))
    found = laws.forecast(errors, shares)
    assert found.interval is None and found.fitted == [100, 200, 400]
    assert np.allclose(found[1:6], [100, 1, 0.1, 0.8, 0.1 + 0.8 / 17], rtol=0.02)
    assert laws.forecast({**errors, 1600: [0.9]}, {**shares, 1600: [0.9]}) == found
    assert laws.forecast({**errors, 800: [0.9], 3200: [1]}, {**shares, 800: [0.9], 3200: [1]}) != found
    for less in ([100, 200, 400, 1500], [100, 400, 1599, 1600]):
        assert laws.forecast(*({k: of[100] for k in less} for of in (errors, shares))) is None


def test_scaling_forecast_interval_covers():
    """The 95 % interval of a forecast contains the measured error in 90 to 99 of 100 experiments with three subsets of each
    size but only one of the largest."""
    n, inside = 2 ** np.arange(7, 15), 0
    for experiment in range(100):
        rng = np.random.default_rng(experiment)
        u = (1 + n / 100) ** -0.1
        noise = 1 + 0.01 * rng.normal(size=(8, 3))
        errors, shares = ({int(k): list(z * m)[:1 if k == n[-1] else 3] for k, z, m in zip(n, of, noise**power)}
                          for of, power in ((0.9 * u, 1), (u, 0.5)))
        low, high = laws.forecast(errors, shares, draws=300, seed=experiment).interval
        inside += low <= errors[n[-1]][0] <= high
    assert 90 <= inside <= 99


def test_scaling_table_of_misses(tmp_path):
    """The table of laws has prediction, measurement and miss of a curve whose law is known: predicted are 10 + 80 / 17 =
    14.7 %, measured 20.0 %. The local exponent is that of a power law. The summary counts what the rows say."""
    fitted = {n: 1 / (1 + n / 100) for n in (100, 200, 400)}
    lines = [fake_run(n, 0.9 - 0.8 * u, test_mse=0.09 * u) for n, u in fitted.items()] + [fake_run(1600, 0.8, test_mse=0.01)]
    lines += [fake_run(n, 1 - n**-0.25, kernel="cnn_vec", test_mse=0.09 * n**-0.25) for n in (100, 200, 400, 800, 1600)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = tables.laws(tables.load(tmp_path / "runs.jsonl"), "cifar10")
    fc, cnn = (next(line.split(" | ") for line in text.splitlines() if line.startswith(f"| {name}")) for name in ("fc", "cnn"))
    assert fc[1:4] == ["1,600", "10,000", "100 … 400"] and fc[5:8] == ["14.7", "20.0", "−5.3"]
    assert cnn[5:7] == ["15.8", "15.8"] and cnn[7].strip("+−") == cnn[8].strip("+−") == "0.0" and cnn[9] == "0.250 |"
    assert "| largest N | 2 | bent | 2.6 | 5.3 | 1 |" in text


def fake_run(n, accuracy, seed=0, validation=((0.1, 0.5, 0.1),), test_mse=0.05, **config):
    """A line of runs.jsonl."""
    return {"test_accuracy": accuracy, "test_mse": test_mse, "ridge": 0.1, "cg_iterations": 7, "peak_memory_gb": 1.5,
            "rows": n,
            "seconds": {"kernel": n / 500, "ridge": 3, "solve": 4}, "validation": list(validation),
            "entries": 5, "entries_computed": 5,
            "config": {**dict(dataset="cifar10", kernel="fc", kind="ntk", depth=None, whiten="channel",
                              zca_eps=0.1, flips=False, crops=1, n_train=n, n_test=10000, seed=seed, rank=None,
                              precondition="lowrank"), **config}}


def test_scaling_tables_of_known_runs(tmp_path, capsys):
    """Two seeds of one experiment are one row, mean ± sd. Sizes form a curve, with explicit and symmetric flips alike, and
    kernels of a family share a table. Scores of proteins are those at the largest n. Runs with few test images appear only as
    cost. --check finds a stale page and a stale figure. A bad line and a missing file are refused with one line."""
    runs, page = tmp_path / "runs.jsonl", tmp_path / "README.md"
    lines = [fake_run(1000, 0.52, 1), fake_run(1000, 0.5), fake_run(1000, 0.52, 1), fake_run(10, 0.1, n_test=9),
             fake_run(100, 0.1, n_test=9), fake_run(1000, 0.1, n_test=9, depth=None),
             *(fake_run(n, 1 - n**-0.25, kernel="cnn_vec", flips=True) for n in (100, 200)),
             fake_run(400, 1 - 400**-0.25, kernel="cnn_vec", flips="symmetric", fit_on=500),
             *(fake_run(n, 0.5, kernel=f"myrtle{depth}") for depth in (5, 10) for n in (100, 200, 400)),
             *({**fake_run(n, 0, seed, dataset="a", split="a", kernel=name), "test_spearman": score,
                "test_accuracy": None} for n, seed, name, score in (
                    (5, 0, "seq_fc", 0.1), (9, 0, "seq_fc", 0.2), (9, 1, "seq_fc", 0.4), (5, 0, "linear", 0.3))),
             *({**fake_run(n, 0, dataset="landscape", split="landscape", kernel="seq_cnn"),
                "test_spearman": 1 - n**-0.5, "test_accuracy": None} for n in (100, 400, 900)),
             {**fake_run(9, 0, dataset="muv", split="a", kernel="gcn"), "test_ap": 0.25, "test_accuracy": None},
             fake_run(1000, 0.54, crops=2, flips="explicit"), fake_run(1000, 0.56, 1, crops=2, flips="symmetric")]
    runs.write_text("".join(json.dumps({k: v for k, v in line.items() if v is not None}) + "\n" for line in lines))
    page.write_text("above" + "".join(f"\n<!-- {part}: written by results/report.py -->\nold\n<!-- end of {part} -->"
                                      for part in ("results", "learning", "laws", "augmentation", "cost",
                                                   "proteins", "molecules", "numbers", "assays",
                                                   "landscape", "speed")) + "\nbelow\n")
    front = tmp_path / "front.md"
    front.write_text("<!-- front: written by results/report.py -->\nold\n<!-- end of front -->\n")
    paths = ["--runs", str(runs), "--readme", str(page), "--front", str(front)]
    assert report.main([*paths, "--check"]) == 1 and "old" in page.read_text()
    assert report.main(paths) == 0 and report.main([*paths, "--check"]) == 0
    assert "| fc NTK | 1,000 | 10,000 | 51.00 ± 1.41 |" in front.read_text()
    runs_of = [fake_run(1000, 0.5), {**fake_run(1000, 0.5, 1), "entries_computed": 1}]
    assert tables.at_once(runs_of) == runs_of[:1]  # the other's time is that of a part of K
    text = page.read_text()
    assert "| fc NTK | 1,000 | 10,000 | 2 | 51.00 ± 1.41 | 0.1 | 7 | 2 | 7 | 1.5 |" in text
    assert "| n | cnn_vec NTK, flips |\n" in text and "| 400 | 77.64 |\n" in text
    assert "\n\n| n | myrtle5 NTK | myrtle10 NTK |\n" in text
    assert "| cnn_vec NTK, flips | 400 | 10,000 | – | – | – | – | – | – | 0.250 |" in text
    assert "| kernel | n | test images | 1 | 2 × 2 |" in text
    assert "| kernel | a, n = 9 |" in text and "| seq_fc NTK | 0.300 ± 0.141 |" in text
    assert "| linear NTK | 0.300 (n = 5) |" in text
    assert "| gcn NTK | 0.250 |" in text
    assert "| n | seq_cnn NTK |" in text and "| seq_cnn NTK | 900 | 10,000 | – | – | – | – | – | – | 0.500 |" in text
    assert "| fc NTK | 1,000 | 10,000 | 51.00 ± 1.41 | 55.00 ± 1.41 |" in text
    assert re.search(r"\| fc NTK: kernel, s \| 0.02 \| 0.2 \| 2 \| 1.00 \|", text)
    assert text.startswith("above") and text.endswith("below\n")
    (tmp_path / "curves.svg").write_text("another")
    assert report.main([*paths, "--check"]) == 1 and "curves.svg: stale" in capsys.readouterr().err
    runs.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 is not a run"):
        report.main(paths)
    runs.write_text(json.dumps(fake_run(1000, 0.5)) + "\n")
    with pytest.raises(ValueError, match="no kernel with three sizes of cifar10, .* run three or more --sizes"):
        report.main(paths)
    runs.unlink()
    with pytest.raises(FileNotFoundError, match="runs.jsonl does not exist; give --runs"):
        report.main(paths)


def test_scaling_networks_that_were_chosen(tmp_path):
    """Runs that compared the same networks, in the same way, are repetitions though they chose different ones. Another way of
    choosing is another row, and other networks to compare are another value of the cell, also where the same was chosen."""
    def run(seed, depth, rmse, select, depths=(1, 2)):
        line = fake_run(9, 0, seed, dataset="esol", split="random", kernel="gcn", depth=depth)
        del line["test_accuracy"]
        return {**line, "test_rmse": rmse, "select": select, "compared": [[{"depth": one}, 0.1, 0.5, 0.2] for one in depths]}
    lines = [run(0, 1, 0.2, "loo"), run(1, 2, 0.4, "loo"), run(0, 1, 0.7, "validation"), run(0, 1, 0.8, "loo", (1, 3))]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = tables.elsewhere(tables.load(tmp_path / "runs.jsonl"), "test_rmse")
    assert "| gcn NTK, network by loo | 0.300 ± 0.141, 0.800 |" in text
    assert "| gcn NTK, network by validation | 0.700 |" in text


def test_scaling_of_other_whitenings(tmp_path):
    """Runs whose whitening was fitted on another number of images are no repetitions. The default may be given or not; older
    runs, whose ridges stand under another name, had another one: as many as they train on."""
    runs = [fake_run(100, 0.5, 1, whiten="zca", fit_on=fit_on) for fit_on in (None, 50_000, 500, None)]
    for run in runs[:3]:
        run["search"] = run.pop("validation")
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    groups = tables.load(tmp_path / "runs.jsonl")
    assert [(len(group), group[0]["config"]["fit_on"]) for group in groups] == [(1, None), (1, 500), (1, 100)]


def test_scaling_of_runs_that_did_not_converge(tmp_path, capsys):
    """A run whose solve did not converge is left out, which a note says."""
    runs = [fake_run(100, 0.5), {**fake_run(100, 0.1, 1), "cg_converged": False}]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert [[run["test_accuracy"] for run in group] for group in tables.load(tmp_path / "runs.jsonl")] == [[0.5]]
    assert "line 2: the solve did not converge, so that run is left out" in capsys.readouterr().out


def test_scaling_of_all_images(tmp_path):
    """With all training images a seed chooses nothing: of two such runs the last counts, and there is no sd. Crops differ."""
    lines = [fake_run(50_000, 0.6 + seed / 10, seed, crops=crops) for crops in (1, 2) for seed in (0, 1)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole, crops = tables.load(tmp_path / "runs.jsonl")
    assert [run["test_accuracy"] for run in whole] == [0.7] and len(crops) == 2


def test_scaling_of_a_learning_curve(tmp_path, capsys):
    """One command runs two kernels on digits at four sizes; another prints table and laws and draws the figure."""
    train(tmp_path, "--kind", "both", "--sizes", "45,90,180,360", "--whiten", "none")
    path = tmp_path / "curve.png"
    assert report.main(["--runs", str(tmp_path / "runs.jsonl"), "--dataset", "digits", "--figure", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| n | fc NNGP, none | fc NTK, none |" in said and "| 360 | 9" in said
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


# ------------------------------------------------------------------------------------------- docs

def test_docs_results_are_what_the_runs_say():
    """The tables of both pages and the figure are what results/report.py makes of results/runs.jsonl."""
    assert report.main(["--check"]) == 0, "run python -m results.report"


def test_results_leave_out_a_torn_line(tmp_path, capsys):
    """An incomplete line of runs.jsonl, as a killed run may leave it, is left out and named."""
    train(tmp_path, "--n_train", "50", "--n_test", "20")
    with open(tmp_path / "runs.jsonl", "a") as lines:
        lines.write('{"config": {"ker\n')
    train(tmp_path, "--n_train", "50", "--n_test", "20", "--seed", "1")
    (runs,) = tables.load(tmp_path / "runs.jsonl")
    assert len(runs) == 2 and "line 2 is incomplete" in capsys.readouterr().out


def test_scaling_of_settings_that_are_no_repetitions(tmp_path, capsys):
    """Runs that compared the same networks on other inputs, and runs whose ridge was chosen in another way, are values of
    their own; a curve takes the later. Errors of numbers stand as they are, without laws. An unknown kernel is last."""
    def run(n, rmse, seed=0, whiten="random morgan", select="loo", depths=(1, 2), **more):
        line = fake_run(n, 0, seed, dataset="esol", split="random", kernel="gcn", whiten=whiten, **more)
        line = {key: value for key, value in line.items() if key not in ("test_accuracy", "test_mse")}
        return {**line, "test_rmse": rmse, "select": select, "compared": [[{"depth": one}, 0.1, 0.5, 0.2] for one in depths]}
    lines = [run(9, 0.9), run(9, 0.6, whiten="random pairs"), run(9, 0.3, depths=()), run(9, 0.2, select="gcv", depths=()),
             *(run(n, 1.25, depths=()) for n in (100, 200)), run(400, 1.5, depths=()),
             run(400, 1.75, select="gcv", depths=()), run(9, 0.4, depths=())]
    lines[-1]["config"]["kernel"] = "mine"
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = tables.load(path)
    small = [runs for runs in groups if runs[0]["config"]["n_train"] == 9]
    text = tables.elsewhere(small, "test_rmse")
    assert "| gcn NTK, network by loo | 0.900, 0.600 |" in text and "| gcn NTK | 0.300, 0.200 |" in text
    assert text.endswith("| mine NTK | 0.400 |")
    assert report.main(["--runs", str(path), "--dataset", "esol", "--figure", str(tmp_path / "esol.svg")]) == 0
    out = capsys.readouterr().out
    assert "| 100 | 1.250 |" in out and "| 400 | 1.750 |" in out and "| – | – | – | – | – | – |" in out
    with pytest.raises(SystemExit):
        report.main(["--runs", str(path), "--check", "--figure", "a.svg"])
