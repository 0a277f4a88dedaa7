"""Proteins of one's own: CSV files by path, fitted models in files and their predictions.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

import csv
import functools
import gzip
import hashlib
import itertools
import re

from test_all import flip  # isort: skip
import numpy as np
import pytest
from scipy.stats import norm, spearmanr

import tiles
from own import model
from proteins import sequences as seqs
from proteins import train as train_protein

FAST = ["--kernel", "seq_fc", "--depth", "1"]


def protein(tmp_path, *flags):
    return train_protein.main([*map(str, flags), "--out", str(tmp_path), "--quiet"])


def written(path, *rows):
    """Writes a CSV file, packed if its name ends in .gz; returns its path."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def table(path):
    """{column: [cells]} of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    return dict(zip(names, map(list, zip(*rows)), strict=True))


@functools.cache
def peptides():
    """((peptide, number), ...): 60 random peptides of 5 to 9 residues; the number depends on residues and their order."""
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list(seqs.RESIDUES), size=rng.integers(5, 10))) for _ in range(60)]
    return tuple((p, round(p.count("A") - p.count("W") + 0.2 * len(p) + sum(map(str.__lt__, p, p[1:])), 6)) for p in rows)


def variants(n=90):
    """((variant, number, part), ...): words of 4 residues, 60 to fit, the next 10 held out, the last 20 to test."""
    sequences, y = seqs._made()
    order = np.random.default_rng(0).permutation(len(y))[:n]
    return tuple((sequences[i], round(float(y[i]), 6), "train" if k < 60 else "valid" if k < 70 else "test")
                 for k, i in enumerate(order))


# ------------------------------------------------------------------------------------------- rows

def test_own_file_is_the_named_split(tmp_path):
    """FLIP's table given by path has the result of the split of that name: with its own columns and --set, and with columns of
    other names, rows in another order, words for all three parts, and packed. Path, columns and digest are recorded."""
    rows = variants()
    flip_like = written(tmp_path / "two_vs_rest.csv", ("sequence", "target", "set", "validation"), *(
        (s, y, "test" if part == "test" else "train", part == "valid") for s, y, part in rows))
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    mine = written(tmp_path / "mine.csv.gz", ("part", "id", "fitness", "Variant"), *(
        (part.upper(), i, y, s.lower()) for i, (s, y, part) in enumerate(shuffled)))
    named = ["--split", "two_vs_rest", "--data", tmp_path]
    columns = ["--dataset", mine, "--sequence", "Variant", "--target", "fitness", "--set", "part"]
    for flags, own in ((["--kernel", "linear"], ["--dataset", flip_like, "--set", "set"]), (["--kernel", "linear"], columns),
                       ([*FAST, "--select", "validation", "--ridge", "1,0.1,0.01"], columns)):
        one, other = protein(tmp_path, *named, *flags), protein(tmp_path, *own, *flags)
        assert one["rows"] == other["rows"] == 70 and one["ridge"] == other["ridge"]
        for key in ("test_spearman", "test_rmse", "test_mse"):
            assert abs(one[key] / other[key] - 1) < 1e-4
        assert [row[0] for row in one["compared"]] == [row[0] for row in other["compared"]]
        solved = 0.02 if "validation" in flags else 1e-4  # ridges are compared with solves to a residual of choose.SEARCH
        assert np.allclose([row[1:] for row in one["compared"]], [row[1:] for row in other["compared"]], rtol=solved)
    known = {"split": str(mine), "sequence": "Variant", "column": "fitness", "set": "part",
             "digest": hashlib.sha256(gzip.open(mine).read()).hexdigest()[:12]}
    assert known.items() <= other["config"].items() and known["digest"] in other["config"]["dataset"]
    assert set(other["config"]) - set(one["config"]) == set(known) - {"split"} and one["config"]["dataset"] == "two_vs_rest"


def test_own_fifth_is_drawn(tmp_path, capsys):
    """Without --set a fifth of the rows, drawn with the seed, is for testing, and the run says so: every row is in one part, a
    seed gives the same rows again and another seed other rows, training rows too. Test rows that are training rows are
    counted, and training rows that repeat another."""
    content = written(tmp_path / "a.csv", ("sequence", "target"), *peptides(), *peptides()[:30]).read_bytes()
    first, again, other = (seqs.own("a.csv", content, seed=seed, quiet=False) for seed in (0, 0, 1))
    assert first.sequences == again.sequences and first.n_train == 72 and first.n_fit == 58 and len(first.targets) == 90
    assert sorted(zip(first.sequences, first.targets)) == sorted([*peptides(), *peptides()[:30]])
    assert set(first.sequences[72:]) != set(other.sequences[72:]) and first.sequences[:72] != other.sequences[:72]
    both = len([s for s in first.sequences[72:] if s in first.sequences[:72]])
    out = capsys.readouterr().out
    assert "note: 18 of the 90 rows of a.csv, drawn with seed 0, are kept for testing" in out
    assert both and f"note: {both} of 18 test rows of a.csv are training rows too" in out
    again = 72 - len(set(first.sequences[:72]))
    assert again and f"note: {again} of 72 training rows of a.csv repeat the sequence of another" in out
    flags = ["--dataset", tmp_path / "a.csv", "--kernel", "linear", "--encoding", "onehot", "--transform", "raw", "--ridge", 1,
             "--tile", 8]
    sizes = protein(tmp_path, *flags, "--sizes", "20,40", "--n_test", 10)
    alone = protein(tmp_path, *flags, "--n_train", 20, "--n_test", 10)
    assert sizes[20]["config"] == alone["config"] and abs(sizes[20]["test_rmse"] / alone["test_rmse"] - 1) < 1e-6


def test_own_positions_that_never_vary(tmp_path, capsys):
    """A residue where all training rows have another one is counted in a note, for test rows and for new rows: no kernel sees
    it."""
    rows = [(f"M{a}{b}K", k, "train") for k, (a, b) in enumerate(itertools.product("ACD", "EFG"))]
    path = written(tmp_path / "a.csv", ("sequence", "target", "set"), *rows, ("MAEK", 1, "test"), ("WAEK", 2, "test"))
    train_protein.main(list(map(str, ["--dataset", path, "--set", "set", *FAST, "--encoding", "onehot", "--transform", "raw",
                                      "--ridge", 0.1, "--save", tmp_path / "m.npz", "--out", tmp_path])))
    note = "have a residue where all training rows have another, such as"
    assert f"note: 1 of 2 test rows of {path} {note} 'WAEK' at position 1: it has no effect" in capsys.readouterr().out
    f = predicted(tmp_path, written(tmp_path / "new.csv", ("sequence",), ["MCFK"], ["MCFA"], ["MAFK"]))["predictions"]
    assert f"note: 1 of 3 rows of {tmp_path}/new.csv {note} 'MCFA' at position 4" in capsys.readouterr().out
    assert f[0] == f[1] != f[2]


def test_own_linear_is_scikit_learn(tmp_path):
    """For sequences of several lengths, linear is scikit-learn's ridge regression on one-hot rows divided by the root of their
    length, at every size, although the longest sequence is a test row: padding changes nothing."""
    from sklearn.linear_model import Ridge
    rows = [*peptides(), ("A" * 15, 3.0)]
    path = written(tmp_path / "a.csv", ("sequence", "target", "set"), *(
        (s, y, "test" if i >= 40 else "train") for i, (s, y) in enumerate(rows)))
    result = protein(tmp_path, "--dataset", path, "--set", "set", "--kernel", "linear", "--encoding", "onehot", "--transform",
                     "raw", "--ridge", 0.5, "--sizes", "20,40", "--tol", 1e-9)
    split = seqs.own("a.csv", path.read_bytes(), part="set")
    x = np.zeros((61, 15, 20))
    for i, s in enumerate(split.sequences):
        x[i, np.arange(len(s)), [seqs.RESIDUES.index(letter) for letter in s]] = len(s) ** -0.5
    x, y = x.reshape(61, -1), split.targets
    for n in (20, 40):
        z = (y[:n] - y[:n].mean()) / y[:n].std()
        f = Ridge(alpha=0.5, fit_intercept=False).fit(x[:n], z).predict(x[40:])
        assert abs(result[n]["test_rmse"] / np.sqrt(np.mean((f * y[:n].std() + y[:n].mean() - y[40:]) ** 2)) - 1) < 1e-5
        assert abs(result[n]["test_spearman"] - spearmanr(f, y[40:]).statistic) < 1e-6


GOOD = ("MA,1,train", "ML,2,train", "MW,3,train", "MC,2,test", "MV,5,test")

@pytest.mark.parametrize("header, lines, flags, words", [
    ("sequence,target", ["MA,1", "ML,nan"], [], "line 3: target 'nan'; expected a finite number"),
    ("sequence,target", ["MA,1", "ML,-inf"], [], "line 3: target '-inf'; expected a finite number"),
    ("sequence,target", ["MA,", "ML,2"], [], "line 2: target ''; expected a finite number"),
    ("sequence,target", [], [], "has no row below its header"),
    ("sequence,target", ["MA,1"], [], "lines 2 to 2: every target is 1"),
    ("sequence,target", ["MA,1", "ML,2", "MW,3"], [], "has 1 rows to fit, 0 to validate and 2 to test; .* two to fit and two"),
    ("sequence,target", ["MA,2", "ML,2", "MW,2"], [], "lines 2 to 4: every target is 2, so there is nothing to learn"),
    ("sequence,target", ["MA,1,5"], [], "line 2: 3 fields, and 2 in the header"),
    ("sequence;target", ["MA;1,5"], [], "line 1: fields are separated by ';'; expected commas, and a point in decimals"),
    ("sequence\ttarget", ["MA\t1"], [], r"line 1: fields are separated by '\\t'; expected commas"),
    ("", ["sequence,target", "MA,1"], [], "line 1: it is empty; expected the names of the columns"),
    ("sequence,target", ["MAX,1", "M*,2"], [], "2 of 2 rows are left out; .* no row remains. Correct the column sequence"),
    ("sequence,y", ["MA,1"], [], "has no column 'target'; its columns are 'sequence', 'y'; name yours with .*--target"),
    ("sequence,target", ["MA,1"], ["--sequence", "peptide"], "has no column 'peptide'; its columns are 'sequence', 'target'"),
    ("sequence,target", ["MA,1"], ["--set", "set"], "has no column 'set'; its columns are 'sequence', 'target'"),
    ("sequence,target,target", ["MA,1,2"], [], "has 2 columns 'target'; expected one"),
    ("", [], [], "has no column 'sequence'; its columns are none"),
    ("sequence,target,set", [*GOOD, "MK,1,none"], ["--set", "set"], "line 7: set 'none'; expected train, validation or test"),
    ("sequence,target,set", GOOD[:4], ["--set", "set"], "has 3 rows to fit, 0 to validate and 1 to test; .* two to test"),
    ("sequence,target,set", GOOD, ["--set", "set", "--n_train", "4"], "n_train=4: .*own.csv allows 2 to 3 rows"),
    ("sequence,target,set", GOOD[2:] + ("MK,3,train",), ["--set", "set"], "the targets of all 2 rows to fit are 3"),
])
def test_own_bad_files(tmp_path, header, lines, flags, words):
    """A faulty file is refused with one line that has its name, and the line of the fault if there is one."""
    (tmp_path / "own.csv").write_text("\n".join([header, *lines]))
    with pytest.raises(ValueError, match=f"own.csv.*{words}" if "n_train" not in words else words) as error:
        protein(tmp_path, "--dataset", tmp_path / "own.csv", "--kernel", "linear", *flags)
    assert "\n" not in str(error.value) and "own.csv" in str(error.value)


def test_own_file_that_is_none(tmp_path):
    """Bytes that are no text, and a packed file that is cut short: one sentence with the name of the file."""
    (tmp_path / "a.csv").write_bytes(b"sequence,target\nM\xff,1\n")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"sequence,target\nMA,1\n" * 9)[:30])
    (tmp_path / "c.csv").write_bytes(gzip.compress(b"sequence,target\nMA,1\n"))
    for name, words in (("a.csv", "line 2: byte 0xff is not UTF-8"), ("b.csv.gz", "truncated"), ("c.csv", "zero bytes|UTF-8")):
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            protein(tmp_path, "--dataset", tmp_path / name)


def test_own_store_knows_the_file(tmp_path):
    """A store never serves the tiles of one file to another: other sequences of the same lengths are refused with one line,
    and a larger set that begins with the same rows has the result of a run without the store."""
    rows = [(s, y, "test" if i < 10 else "train") for i, (s, y) in enumerate(peptides())]
    paths = [written(tmp_path / f"{name}.csv", ("sequence", "target", "set"), *some)
             for name, some in (("a", rows), ("b", [(s[::-1], *rest) for s, *rest in rows]))]
    flags = ["--set", "set", *FAST, "--encoding", "onehot", "--transform", "raw", "--ridge", 0.1, "--tile", 8]
    store = ["--store", tmp_path / "K"]
    protein(tmp_path, "--dataset", paths[0], *flags, "--n_train", 20, *store)
    with pytest.raises(ValueError, match="was made from other inputs: .* Possible causes: other files"):
        protein(tmp_path, "--dataset", paths[1], *flags, "--n_train", 20, *store)
    more = [protein(tmp_path, "--dataset", paths[0], *flags, *kept) for kept in ([], store)]
    assert abs(more[0]["test_rmse"] / more[1]["test_rmse"] - 1) < 1e-6


# ------------------------------------------------------------------------------------------ model

def predicted(tmp_path, path, *flags):
    return protein(tmp_path, "--load", tmp_path / "m.npz", "--predict", path, *flags)


@pytest.mark.parametrize("flags", [[], *(["--kernel", name, *one] for name, *one in (
    ("seq_fc", "--depth", 1), ("seq_cnn_gap", "--depth", 1, "--encoding", "onehot"), ("linear",)))], ids=str)
def test_own_model_predicts_as_the_run(tmp_path, flags):
    """On peptides of several lengths, with all defaults where the kernel is the default one, the saved model predicts the test
    rows as the run did, also beside a sequence that is longer than all of them; and that has the same prediction alone."""
    path = written(tmp_path / "a.csv", ("peptide", "activity", "set"), *(
        (s, y, "test" if i < 15 else "train") for i, (s, y) in enumerate(peptides())))
    result = protein(tmp_path, "--dataset", path, "--sequence", "peptide", "--target", "activity", "--set", "set", *flags,
                     "--save", tmp_path / "m.npz")
    new, y = peptides()[:15], np.array([y for _, y in peptides()[:15]])
    longer = "MKTAYIAKQRQIS"
    f = predicted(tmp_path, written(tmp_path / "new.csv", ("peptide",), *([s] for s, _ in new), [longer]))["predictions"]
    alone = predicted(tmp_path, written(tmp_path / "new.csv", ("s",), [longer]), "--sequence", "s")["predictions"]
    assert abs(f[15] / alone[0] - 1) < 1e-4 and len(set(f.round(4))) > 10
    plain = f[:15]
    assert abs(np.sqrt(np.mean((plain - y) ** 2)) / result["test_rmse"] - 1) < 1e-5
    assert abs(spearmanr(plain, y).statistic - result["test_spearman"]) < 1e-6
    forward = seqs.transform(result["config"]["target"], np.array([y for _, y in peptides()[15:]]))[0]
    if result["config"]["target"] != "rank":  # whose inverse is constant outside the range of the training rows
        assert abs(np.mean((forward(plain) - forward(y)) ** 2) / result["test_mse"] - 1) < 1e-4


@pytest.mark.parametrize("encoding, transform", [("centred", "log"), ("blosum", "rank"), ("onehot", "raw")])
def test_own_model_is_a_dense_solve(tmp_path, encoding, transform):
    """prediction and sd are those of a dense float64 formula: the arc-cosine kernel (Cho and Saul 2009), a Gaussian process on
    a function of the target, and half the width of the interval f - s to f + s brought back. Without --variance there is
    no sd, and the predictions are the same."""
    rows = variants()
    path = written(tmp_path / "a.csv", ("sequence", "target", "set"), *rows)
    flags = ["--dataset", path, "--set", "set", *FAST, "--encoding", encoding, "--transform", transform, "--ridge", 0.1,
             "--b_std", 0.3, "--tol", 1e-9, "--save", tmp_path / "m.npz"]
    protein(tmp_path, *flags)
    plain = predicted(tmp_path, path)
    assert plain["sd"] is None and "sd" not in table(plain["path"])
    sure = predicted(tmp_path, path, "--variance")
    assert (plain["predictions"] == sure["predictions"]).all()

    kept, y = [s for s, *_ in rows], np.array([y for _, y, _ in rows])
    code = np.eye(20) if encoding != "blosum" else seqs.blosum()
    x = np.array([[code[seqs.RESIDUES.index(letter)] for letter in s] for s in kept]).reshape(90, -1)
    x = x - x[:70].mean(axis=0) * (encoding == "centred")
    K = 2 * x @ x.T / 80 + 0.09
    size = np.sqrt(np.diag(K))
    c = np.clip(K / np.outer(size, size), -1, 1)
    K = np.outer(size, size) * (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / np.pi + 0.09
    low, floor, order = y[:70].min(), y[:70].std() / 100, np.sort(y[:70])
    scores = norm.ppf((np.arange(70) + 0.5) / 70)
    forward, inverse = {"raw": (lambda y: y, lambda g: g),
                        "log": (lambda y: np.log(y - low + floor), lambda g: np.exp(g) - floor + low),
                        "rank": (lambda y: np.interp(y, order, scores), lambda g: np.interp(g, scores, order))}[transform]
    g, noise = forward(y[:70]), 0.1 * np.diag(K)[:70].mean()
    A, z = K[:70, :70] + noise * np.eye(70), (g - g.mean()) / g.std()
    f, s2 = K[:, :70] @ np.linalg.solve(A, z), z @ np.linalg.solve(A, z) / 70
    s = np.sqrt(s2 * (np.diag(K) + noise - np.sum(K[:, :70] * np.linalg.solve(A, K[:70]).T, axis=1)))
    left, middle, right = (inverse(h * g.std() + g.mean()) for h in (f - s, f, f + s))
    assert np.allclose(sure["predictions"], middle, rtol=1e-4, atol=1e-5)
    assert np.allclose(sure["sd"], (right - left) / 2, rtol=1e-3, atol=1e-4) and (sure["sd"] > 0).mean() > 0.9
    assert np.allclose(np.array(table(sure["path"])["sd"], float), sure["sd"], rtol=1e-6)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The path of a model of words of 4 residues, two of which vary, trained on the column `Variant, Größe`."""
    folder = tmp_path_factory.mktemp("fitted")
    path = written(folder / "a.csv", ("Variant, Größe", "target"), *((f"M{a}G{b}", i * i % 7 + i) for i, (a, b) in enumerate(
        (a, b) for a in "ACDEFG" for b in "HIKLM")))
    protein(folder, "--dataset", path, "--sequence", "Variant, Größe", "--kernel", "linear", "--encoding", "onehot",
            "--transform", "raw", "--ridge", 1, "--save", folder / "m.npz")
    return folder / "m.npz"


def test_own_columns_come_back(tmp_path, fitted, capsys):
    """predictions.csv begins with the bytes of the input: quoted commas, quotes and line ends, empty cells, letters outside
    ASCII, a column that is named prediction already. Rows that cannot be predicted are kept with an empty cell; a note counts
    them and names the first line of each reason."""
    rows = [["", "MAGH", 'say ""hi"", é', "1"], [" x ", " magh ", "two\nlines", ""], ["0010", "MAGHK", "", ""],
            ["日本", "MXGH", "", "-0"], ["", "", "", ""], ["", "MYGH", ",", "1e5"], ["", "MAXH", "", ""]]
    path = written(tmp_path / "new.csv", ("id", "Variant, Größe", "note", "prediction"), *rows)
    done = protein(tmp_path, "--load", fitted, "--predict", path)
    text = open(done["path"], encoding="utf-8", newline="").read()
    before = path.read_text("utf-8").replace("two\nlines", "two lines").splitlines()
    after = text.replace("two\nlines", "two lines").splitlines()
    assert len(after) == 8 and after[0] == before[0] + ",prediction_"
    for old, new, value in zip(before[1:], after[1:], done["predictions"]):
        assert new == f"{old}," + ("" if np.isnan(value) else f"{value:.7g}")
    assert np.isnan(done["predictions"]).tolist() == [False, False, True, True, True, False, True]
    assert done["predictions"][0] == done["predictions"][1] != done["predictions"][5]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: no prediction for")]
    assert [line.partition(" of 7 rows of ")[0][-1] for line in notes] == ["2", "1", "1"]
    for words, line in zip(("line 6: 'MXGH' has the letter 'X'; expected only ARND",
                            "line 5: 'MAGHK' has 5 residues; expected 4, as in the training rows",
                            "line 7: '' has 0 residues"), notes):
        assert words in line and "new.csv" in line


@pytest.mark.parametrize("text, flags, words", [
    ("peptide,x\nMAGH,1\n", [], "has no column 'Variant, Größe'; its columns are 'peptide', 'x'; name yours with --seq"),
    ("peptide,x\nMAGH,1\n", ["--sequence", "y"], "has no column 'y'; its columns are 'peptide', 'x'"),
    ("peptide\n", ["--sequence", "peptide"], "has no row below its header"),
    ("peptide,x\nMAG,1\nMAX,2\n", ["--sequence", "peptide"],
     "none of the 2 rows of .*new.csv can be predicted; line 2: 'MAG' has 3 residues; expected 4, as in the training rows"),
    ("peptide,x\nMAGH,1,2\n", ["--sequence", "peptide"], "line 2: 3 fields, and 2 in the header"),
    (None, [], "is not there; --predict takes a CSV file"),
])
def test_own_bad_new_files(tmp_path, fitted, text, flags, words):
    """A file of new sequences that is missing or faulty is refused with one line that names it."""
    if text is not None:
        (tmp_path / "new.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        protein(tmp_path, "--load", fitted, "--predict", tmp_path / "new.csv", *flags)
    assert "\n" not in str(error.value) and "new.csv" in str(error.value) and not (tmp_path / "predictions.csv").exists()


def test_own_model_refused(tmp_path, monkeypatch):
    """A model of images, a damaged file, and --variance with an NTK: one sentence each, before any kernel is computed."""
    rows = [(s, y) for s, y in peptides()[:20]]
    path = written(tmp_path / "a.csv", ("sequence", "target"), *rows)
    protein(tmp_path, "--dataset", path, "--kernel", "linear", "--kind", "ntk", "--ridge", 1, "--save", tmp_path / "m.npz")
    monkeypatch.setattr(tiles, "cross", None)
    with pytest.raises(ValueError, match="--variance with a model of kind ntk: .* fit one with --kind nngp"):
        predicted(tmp_path, path, "--variance")
    flip(tmp_path / "m.npz")
    with pytest.raises(ValueError, match="m.npz is not a model that --save has written, or damaged"):
        predicted(tmp_path, path)
    model.save(tmp_path / "m.npz", "images", {}, alpha=np.ones(3))
    with pytest.raises(ValueError, match="m.npz is a model of images, and this program predicts proteins"):
        predicted(tmp_path, path)


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "nowhere.csv"], "--dataset nowhere.csv is not there; expected one of made, .*, or the path of a .csv"),
    (["--split", "/"], "--dataset / is a folder; expected one of made"),
    (["--sequence", "s"], "--sequence changes nothing here: it names a column of --dataset FILE.csv. Leave it out"),
    (["--target", "raw"], "--target changes nothing here: .* \\(the function of the target is --transform\\)"),
    (["--split", "sampled", "--data", "x", "--set", "set"], "--set changes nothing here"),
    (["--dataset", "FILE", "--data", "x"], "--data changes nothing here: --dataset is a path"),
    (["--dataset", "FILE", "--save", "/nowhere/m.npz"], "/nowhere/m.npz cannot be written: expected a file in a folder"),
    (["--dataset", "FILE", "--save", "/tmp"], "/tmp cannot be written"),
    (["--kind", "both", "--save", "m.npz"], "--save keeps one model: give one kind and one size"),
    (["--sizes", "10,20", "--save", "m.npz"], "--save keeps one model"),
    (["--load", "m.npz"], "--load FILE and --predict FILE go together"),
    (["--predict", "a.csv"], "--load FILE and --predict FILE go together"),
    *((["--load", "m.npz", "--predict", "a.csv", *idle], f"{idle[0]} changes nothing here: --load takes all that")
      for idle in (["--dataset", "FILE"], ["--target", "y"], ["--transform", "log"], ["--set", "set"], ["--seed", "1"],
                   ["--kernel", "seq_fc"], ["--ridge", "1"], ["--save", "b.npz"], ["--store", "K"], ["--tile", "8"]))])
def test_own_flags(tmp_path, capsys, flags, words):
    """A flag that does nothing, contradicts another or names a file that cannot be: one line that names the flag as typed."""
    path = str(written(tmp_path / "a.csv", ("sequence", "target"), *peptides()))
    with pytest.raises(SystemExit):
        train_protein.parse([path if flag == "FILE" else flag for flag in flags])
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1
