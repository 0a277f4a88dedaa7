"""Molecules of one's own in a CSV file; fitted models in files, and their predictions for new molecules.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

import csv
import functools
import hashlib
import os
import re

import test_all  # noqa: F401  isort: skip
import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

import kernel
from molecules import graphs
from molecules import layers as graph_layers
from molecules import smiles as files
from molecules import train as train_molecule
from molecules.test_molecules import dense_molecules, dense_vectors, needs_rdkit, sum_of_nodes, train_molecules
from own import model

pytestmark = needs_rdkit
SMALL = ["--kernel", "fingerprint", "--depth", "1", "--tile", "6"]  # compiles at once


@functools.cache
def nci(n=60):
    """SMILES (n,) and log P (n,) of molecules that come with RDKit."""
    rows = files.load("nci", limit=n)
    return np.array(rows.smiles), rows.y[:, 0]


def write(path, names, *columns):
    """A CSV file with a list for each column; returns its path."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *zip(*columns)])
    return str(path)


def read(path):
    """(names, rows) of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    return names, rows


def predict(tmp_path, path, *flags):
    """What --load m.npz --predict returns, and {column: (cells)} of the file that it writes."""
    done = train_molecules(tmp_path, "--load", str(tmp_path / "m.npz"), "--predict", path, *flags)
    names, rows = read(done["path"])
    return done, dict(zip(names, zip(*rows)))


FLAGS = {"gcn": ["--pool", "mean", "--weights", "order"], "fingerprint": ["--fingerprints", "morgan,pairs"]}  # no defaults


def dense(part, smiles, w_std=2**0.5, b_std=0.0, names=("morgan",)):
    """The NNGP kernel of all these molecules in float64, by NumPy, with one hidden layer, and FLAGS of gcn; or what stands in
    for that of graphs."""
    if part == "fingerprint":
        return dense_vectors(files.fingerprints(smiles, names).astype(np.float64), 1, w_std, b_std)[0]
    x = files.graphs(smiles, "order")
    layers = graph_layers.gcn(x.degree, 1, pool="mean", w_std=w_std, b_std=b_std)
    if graphs.kernel_fn is sum_of_nodes:
        return np.asarray(sum_of_nodes(layers, "nngp")(*[x[np.arange(len(x))].astype(np.float64)] * 2))
    return dense_molecules(layers, x, len(x))[0]


# ------------------------------------------------------------------------------------------- data

def test_own_file_is_the_named_data(tmp_path, capsys):
    """A file with other names of columns gives the result of the same rows as --dataset esol, and the run records its path,
    its columns and its sha256, all three also under the name by which results/ tells data sets apart."""
    smiles, y = nci()
    write(tmp_path / "delaney-processed.csv", ["measured log solubility in mols per litre", "smiles"], y, smiles)
    named = train_molecules(tmp_path, "--dataset", "esol", "--data", str(tmp_path), *SMALL)
    path = write(tmp_path / "mine.csv", ["logS, mol/l", "structure"], y, smiles)
    capsys.readouterr()
    own = train_molecules(tmp_path, "--dataset", path, "--smiles", "structure", "--target", "logS, mol/l", *SMALL)
    assert f"{path}: numbers in logS, mol/l\n" in capsys.readouterr().out
    assert all(own[key] == named[key] for key in ("test_rmse", "ridge", "search", "loo_mse"))
    digest = hashlib.sha256(open(path, "rb").read()).hexdigest()[:12]
    recorded = {"dataset": f"{path} structure logS, mol/l {digest}", "smiles": "structure", "target": ["logS, mol/l"],
                "score": "rmse", "digest": digest}
    assert {key: own["config"][key] for key in recorded} == recorded


@pytest.mark.parametrize("cells, pair, said", [
    (["inactive", "active"], ["inactive", "active"], "'active' is the positive class and 'inactive' the negative class in y"),
    (["nontoxic", "toxic", ""], ["nontoxic", "toxic"], "'toxic' is the positive"), (["yes", "no"], ["no", "yes"], "'yes' is"),
    (["1.0", "", "0.0", "1"], ["0.0", "1.0"], "1.0 is the positive class and 0.0 the"), (["3", "-1"], ["-1", "3"], "3 is the"),
    (["0", "1", "2"], None, "numbers in y"), (["0.5", "", "1e3", "-2"], None, "numbers in y")], ids=str)
def test_own_targets_are_recognised(tmp_path, capsys, cells, pair, said):
    """Two different values, words or numbers, are classes, more are numbers; one line says so. The larger number or later word
    is positive, or the word in which the other ends. An empty cell is a missing label."""
    column = [cells[i % len(cells)] for i in range(12)]
    rows, _ = files.own(write(tmp_path / "x.csv", ["smiles", "y"], ["C" * (i + 1) for i in range(12)], column), "smiles", "y")
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == 1 and rows.classes == [pair and tuple(pair)]
    number = {"": np.nan, **({pair[0]: 0, pair[1]: 1, "1": 1} if pair else {})}
    assert np.array_equal(rows.y[:, 0], [number[cell] if cell in number else float(cell) for cell in column], equal_nan=True)


def test_own_molecules_in_both_parts(tmp_path, capsys):
    """Molecules that stand among the training and the test rows are counted in a note, and so are those that stand among the
    training rows twice, however they are written; without any there is none."""
    for smiles, said in ((["CCO", "CCN", "OCC", "NCC"] * 5,
                          "note: 2 of 2 test molecules of .* too .stereochemistry apart., such as [CON]{3}\n"
                          "note: 14 of 16 training molecules of .* repeat another .*\n"),
                         (["C" * (i // 2 + 1) + "/\\"[i % 2] + "C=C/F" for i in range(20)],  # isomers, which look alike
                          "note: . of 2 test molecules .*\nnote: . of 16 training .*\n"),
                         (["C" * (i + 1) for i in range(20)], "")):
        path = write(tmp_path / "x.csv", ["smiles", "y"], smiles, range(20))
        args = train_molecule.parse(["--dataset", path, "--target", "y", "--kernel", "fingerprint"])
        train_molecule.divided(args, train_molecule.load(args))
        assert re.fullmatch(f"(?!note).*\n{said}", capsys.readouterr().out)


@pytest.mark.parametrize("column, flags, words", [
    ("1,2,3", [], "has the columns 'smiles', 'y', 'w': say with --target which to predict"),
    ("1,2,3", ["--target", "z"], "has no column 'z'; its columns are 'smiles', 'y', 'w'; give columns of it with --smiles"),
    ("1,2,3", ["--target", "y", "--smiles", "mol"], "has no column 'mol'; its columns are"),
    ("1,2,3", ["--target", "y,y"], "--target y,y: a column is named twice"),
    ("1,2,3", ["--target", "smiles"], "--smiles smiles --target smiles: a column is named twice"),
    ("1,2,3", ["--target", "y,w"], "column 'w' holds two classes and column 'y' numbers; expected targets of one sort"),
    ("1,2,nan", ["--target", "y"], "line 4, column 'y', row 2 .*: 'nan'; expected a finite number .* or an empty cell"),
    ("a,b,nan", ["--target", "y"], "line 4, column 'y', row 2 .*: 'nan'; expected a finite"),
    ("a,b,c", ["--target", "y"], "column 'y': 3 different values, 'a', 'b', 'c'; expected two classes, .* or numbers"),
    ("1,1,1,1,1,1,1,1,1,2,3", ["--target", "y", "--n_train", "2"], "no two different numbers for y, so nothing can be"),
    ("5", ["--target", "y"], "column 'y' has the same value in every row"),
    ("1,2,3", ["--target", "w", "--select", "gcv"], "--select gcv with .*: GCV .* cannot compare by auc; use --select loo"),
    ("1,2,3", ["--target", "y", "--split", "scaffold"], "leaves 0 of the 30 .* the same ring system, or none. Use"),
    ("1,2,3", ["--target", "y", "--n_train", "25"], "n_train=25, .*expected 1 to 24, the molecules of .*x.csv")], ids=str)
def test_own_file_errors(tmp_path, column, flags, words):
    """A column that is not there, named twice or not to be learned from, and a criterion or split that does not fit: one
    sentence with the name of the file."""
    cells = [column.split(",")[i % len(column.split(","))] for i in range(30)]
    path = write(tmp_path / "x.csv", ["smiles", "y", "w"], ["C" * (i + 1) for i in range(30)], cells, ["a", "b"] * 15)
    with pytest.raises(ValueError, match=words) as error:
        train_molecules(tmp_path, "--dataset", path, *flags)
    assert "\n" not in str(error.value) and ("x.csv" in str(error.value) or "named twice" in words)


@pytest.mark.parametrize("name, content, words", [
    ("x.csv", None, "x.csv is not there; expected a .csv or .csv.gz file"), ("", None, "is a folder; expected a .csv"),
    ("x.csv", b"", "x.csv is empty; expected"), ("x.csv", b"smiles,y\n", "x.csv has a header and no rows"),
    ("x.csv", b"smiles,y,y\nC,1,2\n", "x.csv has 2 columns 'y'; expected one"), ("x.csv", b"smiles,y\n\xe9,1\n", "not UTF-8"),
    ("x.csv", b"smiles,y\nC1,1\nx,2\n", "RDKit cannot read any of its 2 SMILES"),
    ("x.csv.gz", b"smiles,y\nC,1\n", "x.csv.gz is truncated or not a gzip file")])
def test_own_files_that_cannot_be_read(tmp_path, name, content, words):
    """A file that is not there, empty, damaged or without a molecule, and a folder: one sentence."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        files.own(str(path), "smiles", "y")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, words", [
    ("--dataset x.txt", "--dataset x.txt: expected one of nci, .*, or the path of a .csv or .csv.gz file"),
    ("--dataset x.csv --data .", "--data changes nothing here: --dataset is a path"),
    ("--target y", "--target changes nothing here: it names a column of your own file, and --dataset nci is none"),
    ("--smiles y", "--smiles changes nothing here: it names a column"), ("--variance", "--variance .*: it belongs to --load"),
    ("--load m", "--load FILE and --predict FILE go together"), ("--predict x.csv", "--load FILE and --predict FILE go"),
    *((f"--load m --predict x.csv {flag}", f"{flag.split()[0]} changes nothing here: --load takes all that from the model")
      for flag in ("--kernel sum", "--dataset x.csv", "--target y", "--save m", "--seed 1", "--tile 9", "--jump")),
    ("--save m --kind both", "--save with --kind both .*: a file holds one model"), ("--save m --sizes 5,9", "one size"),
    ("--save nowhere/m", "nowhere/m cannot be written: expected a file in a folder that is there"),
    ("--save .", ". cannot be written")])
def test_own_flags_that_do_not_fit(flags, words, capsys):
    """Flags without effect and flags that contradict each other are refused with one line, before any work."""
    with pytest.raises(SystemExit):
        train_molecule.parse(flags.split())
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1


# ------------------------------------------------------------------------------------------ model

@pytest.mark.parametrize("name", train_molecule.PARTS)
def test_model_predicts_as_the_run(tmp_path, monkeypatch, name):
    """For the test rows a saved model gives the score of its run. Predictions and standard deviations are those of a dense
    float64 formula, also of a molecule with more atoms, and more neighbours of an atom, than any that was fitted. The
    other molecules of a file do not change a prediction."""
    if name == "sum":
        monkeypatch.setattr(graphs, "kernel_fn", sum_of_nodes)
    smiles, y = nci()
    path = write(tmp_path / "x.csv", ["mol", "y"], smiles, y)
    result = train_molecules(tmp_path, "--dataset", path, "--smiles", "mol", "--target", "y", "--kernel", name, "--depth", "1",
                             "--w_std", "1.2", "--b_std", "0.5", "--tile", "6", "--ridge", "0.3,0.1,0.03", "--tol", "1e-9",
                             *sum((FLAGS[part] for part in train_molecule.PARTS[name]), []), "--save", str(tmp_path / "m.npz"))
    train, _, test = files.split(files.own(path, "mol", "y")[0])
    new = [*smiles[test], "FS(F)(F)(F)(F)" + "C" * 40]
    plain = predict(tmp_path, write(tmp_path / "new.csv", ["mol", "id"], new, range(7)))[0]["predictions"][:, 0]
    rounding = 1e-5 if name == "gcn" else 1e-6  # graphs.py sums in an order that depends on the tile, unless it is optimised
    assert abs(np.mean((plain[:6] - y[test]) ** 2)**0.5 / result["test_rmse"] - 1) < rounding
    if name == "gcn":  # kernel.py compiles in a quarter of the time of graphs.py
        monkeypatch.setattr(graphs, "kernel_fn", kernel.kernel_fn)
    done, found = predict(tmp_path, str(tmp_path / "new.csv"), "--variance")
    f, sd = done["predictions"][:, 0], done["sd"][:, 0]
    assert found["id"] == tuple("0123456") and list(found) == ["mol", "id", "prediction", "sd"]
    assert np.allclose(np.array([found["prediction"], found["sd"]], float), [f, sd], rtol=1e-6)
    known, large = files.graphs(smiles.tolist()), files.graphs(new[6:])
    assert known.degree < large.degree and known.nodes < large.nodes
    for rows in ([0, 1, 2, 3, 4, 5], [0])[:0 if name == "gcn" else 2]:  # gcn compiles for each number of nodes: see sum
        fewer, _ = predict(tmp_path, write(tmp_path / "new.csv", ["mol"], [new[i] for i in rows]))
        assert np.allclose(fewer["predictions"][:, 0], f[rows], rtol=1e-5)

    K, n, z = 0, len(train), y[train] - y[train].mean()
    for part in train_molecule.PARTS[name]:
        one = dense(part, [*smiles[train], *new], 1.2, 0.5, ("morgan", "pairs"))
        K = K + one / (np.diag(one)[:n].mean() if name == "sum" else 1)
    shift = result["ridge"] * np.diag(K)[:n].mean()
    A, k = K[:n, :n] + shift * np.eye(n), K[n:, :n]
    alpha = np.linalg.solve(A, z)
    assert np.allclose([plain, f], y[train].mean() + k @ alpha, atol=1e-4)
    variance = np.diag(K)[n:] + shift - np.sum(k * np.linalg.solve(A, k.T).T, axis=1)
    assert np.allclose(sd**2, z @ alpha / n * variance, rtol=1e-3)


def test_model_of_tasks_with_missing_labels(tmp_path):
    """With missing labels, the classes, the score of the run and the probabilities are those of each task's own dense
    regression, and of the error of its regression on the validation rows; --variance is refused."""
    smiles, y = nci(100)
    rng, words = np.random.default_rng(0), np.array([["no", "yes"], ["inactive", "active"]])
    label = np.stack([y > np.median(y), ["N" in one for one in smiles]], axis=1).astype(int)
    label ^= rng.random(label.shape) < 0.2
    known = rng.random(label.shape) < [0.8, 0.6]
    cells = [np.where(has, word[one], "") for has, word, one in zip(known.T, words, label.T)]
    path = write(tmp_path / "x.csv", ["smiles", "a", "b"], smiles, *cells)
    flags = ["--target", "a,b", *SMALL, "--ridge", "0.1", "--tol", "1e-9", "--save", str(tmp_path / "m.npz")]
    result = train_molecules(tmp_path, "--dataset", path, *flags)
    train, val, test = files.split(files.own(path, "smiles", "a,b")[0])
    done, found = predict(tmp_path, write(tmp_path / "new.csv", ["smiles"], smiles[test]))
    assert list(found) == ["smiles", "class a", "p(a = yes)", "class b", "p(b = active)"]

    K, scores = dense("fingerprint", smiles.tolist()), []
    for t, positive in enumerate(label.T):
        rows, seen = train[known[train, t]], test[known[test, t]]
        A = K[np.ix_(rows, rows)] + 0.1 * np.diag(K)[train].mean() * np.eye(len(rows))
        f = positive[rows].mean() + K[:, rows] @ np.linalg.solve(A, positive[rows] - positive[rows].mean())
        left = val[known[val, t]]
        sd = np.sqrt(np.mean((f[left] - positive[left]) ** 2))
        assert np.allclose(done["predictions"][:, t], f[test], atol=1e-4)
        assert np.allclose(done["probabilities"][:, t], norm.cdf((f[test] - 0.5) / sd), atol=1e-3)
        assert found[f"class {'ab'[t]}"] == tuple(words[t][(f[test] > 0.5).astype(int)])
        scores.append(roc_auc_score(positive[seen], f[seen]))
    assert abs(result["test_auc"] - np.mean(scores)) < 1e-9
    with pytest.raises(ValueError, match="--variance with .*m.npz, which was fitted with missing labels: every task"):
        predict(tmp_path, str(tmp_path / "new.csv"), "--variance")


def test_model_is_sure_of_classes(tmp_path, capsys):
    """The probability of a class is Phi((f - 1/2) / sd): sd is the leave-one-out error, of each task its own, or with
    --variance the predictive sd. A fit that left no rows out gives none, and says so; an NTK has no variance."""
    smiles, y = nci()
    path = write(tmp_path / "x.csv", ["smiles", "y"], smiles, np.where(y > np.median(y), "4.5", "-2"))
    flags = ["--dataset", path, "--target", "y", *SMALL, "--save", str(tmp_path / "m.npz")]
    result = train_molecules(tmp_path, *flags)
    new = write(tmp_path / "new.csv", ["smiles", "class"], smiles[:9], range(9))
    plain, found = predict(tmp_path, new)
    f = plain["predictions"][:, 0]
    assert list(found) == ["smiles", "class", "class_", "p(4.5)"] and plain["sd"] is None
    assert found["class_"] == tuple("4.5" if one > 0.5 else "-2" for one in f) and len(set(found["class_"])) == 2
    assert np.allclose(np.array(found["p(4.5)"], float), norm.cdf((f - 0.5) / result["loo_mse"]**0.5), rtol=1e-5)
    sure, found = predict(tmp_path, new, "--variance")
    assert np.allclose(np.array(found["p(4.5)"], float), norm.cdf((f - 0.5) / np.array(found["sd"], float)), rtol=1e-4)
    write(tmp_path / "x.csv", ["smiles", "y", "rare"], smiles, y > np.median(y), np.arange(len(y)) % 3 == 0)
    alone = [train_molecules(tmp_path, *flags, "--target", task, "--ridge", "0.1")["loo_mse"]**0.5 for task in ("y", "rare")]
    train_molecules(tmp_path, *flags, "--target", "y,rare", "--ridge", "0.1", "--kind", "nngp")
    assert model.load(str(tmp_path / "m.npz"), "molecules")[0]["error"] == pytest.approx(alone, rel=1e-4)
    train_molecules(tmp_path, *flags, "--ridge", "0.1", "--kind", "ntk")
    with pytest.raises(ValueError, match="--variance with a model of kind ntk"):
        predict(tmp_path, new, "--variance")
    about, arrays = model.load(str(tmp_path / "m.npz"), "molecules")
    model.save(str(tmp_path / "m.npz"), "molecules", {**about, "error": None}, **arrays)
    assert list(predict(tmp_path, new)[1]) == ["smiles", "class", "class_"]
    assert "note: no probabilities" in capsys.readouterr().out


def test_model_leaves_the_input_as_it_is(tmp_path, capsys):
    """Every cell of the input comes back as it was: commas, quotes, line breaks, spaces, empty cells, other alphabets. Rows
    that RDKit cannot read keep their line, without a prediction, and are named. --smiles names another column of SMILES."""
    smiles, y = nci()
    path = write(tmp_path / "x.csv", ["smiles", "y"], smiles, y)
    train_molecules(tmp_path, "--dataset", path, "--target", "y", *SMALL, "--save", str(tmp_path / "m.npz"))
    odd = [["a, b", "CCO", ""], ['say "x"', "no molecule", " space "], ["two\r\nlines", "CCN", "0.10"], ["ναι, 是", "", "1e5"]]
    names = ["name, as sold", "structure", "prediction"]
    new = write(tmp_path / "new.csv", names, *zip(*odd))
    capsys.readouterr()
    with pytest.raises(ValueError, match="new.csv has no column 'smiles'; its columns are 'name, as sold', .*; say with --"):
        predict(tmp_path, new)
    done = predict(tmp_path, new, "--smiles", "structure")[0]
    said, (found, rows) = capsys.readouterr().out, read(done["path"])
    assert found == [*names, "prediction_"] and [row[:3] for row in rows] == odd
    assert [bool(row[3]) for row in rows] == [True, False, True, False] and done["predictions"].shape == (2, 1)
    assert f"2 predictions in {done['path']}" in said
    assert f"{new}: 2 of 4 rows get no prediction because RDKit cannot read their SMILES: row 1 ('no molecule'), row 3" in said
    assert os.listdir(tmp_path).count("predictions.csv") == 1


def test_own_targets_of_any_unit(tmp_path):
    """The ridge that several numbers share, and their predictions, do not depend on the units of one of them. The score is the
    mean over the targets of the root mean squared error, in the units of each."""
    smiles, y = nci()
    rows, found = np.stack([[len(one) for one in smiles], y], axis=1), []
    for unit in ([1e-3, 1], [1e3, 1]):
        path = write(tmp_path / "x.csv", ["smiles", "a", "b"], smiles, *(rows * unit).T)
        result = train_molecules(tmp_path, "--dataset", path, "--target", "a,b", *SMALL, "--save", str(tmp_path / "m.npz"))
        test = files.split(files.own(path, "smiles", "a,b")[0])[2]
        done, columns = predict(tmp_path, write(tmp_path / "new.csv", ["smiles"], smiles[test]), "--variance")
        assert list(columns)[1:] == ["prediction a", "sd a", "prediction b", "sd b"]
        error = done["predictions"] - rows[test] * unit
        each = np.sqrt(np.mean(error**2, axis=0))
        assert abs(each.mean() / result["test_rmse"] - 1) < 1e-6 and np.allclose(result["test_rmse_of_tasks"], each, rtol=1e-6)
        found.append([np.full((6, 2), result["ridge"]), done["predictions"] / unit, done["sd"] / unit])
    assert np.allclose(*found, rtol=1e-4)
