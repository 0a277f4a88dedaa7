"""Sequences: their layers, data and experiment.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

import json
import os
import zipfile

from test_all import (  # isort: skip
    HERE, commands, optimised, reference, refitted, relative_error,
)
import numpy as np
import pytest
from scipy.stats import norm, spearmanr
from sklearn.linear_model import Ridge

import choose
import kernel
from fast import fused, gpu
from proteins import layers as sequence_layers
from proteins import sequences as seqs
from proteins import train as train_protein
from results import report

GB1 = os.path.join(HERE, "..", "shared", "data", "protein")
PEPTIDES = ["M", "GIVEQCCTSICSLYQLENYCN", "NLYIQWLKDGGPSSGRPPPS"]  # one residue, insulin's A chain, Trp-cage
needs_gb1 = pytest.mark.skipif(not os.path.exists(GB1), reason="FLIP's GB1 files are missing")

# ----------------------------------------------------------------------------------------- kernel

def encode(sequences, encoding, n_train):
    """All sequences encoded, with the encoding fitted on the first n_train, or on all if n_train is 0."""
    return seqs.fit(sequences[:n_train or None], encoding, max(map(len, sequences)))(sequences)


def fully_connected(x, depth, b_std=0.0):
    """NNGP and NTK (n, n) of seq_fc with w_std^2 = 2 on sequences (n, length, channels) of one length, by NumPy: the
    arc-cosine kernels (Cho and Saul 2009), once for each hidden layer."""
    x = x.reshape(len(x), -1)
    K = T = 2 * x @ x.T / x.shape[1] + b_std**2
    for _ in range(depth):
        size = np.sqrt(np.multiply.outer(np.diag(K), np.diag(K)))
        c = np.clip(K / size, -1, 1)
        K, slopes = size * (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / np.pi + b_std**2, (np.pi - np.arccos(c)) / np.pi
        T = K + slopes * T
    return K, T


def recursion(layers, x, y):
    """NNGP and NTK of two sequences without padding, (l, channels) and (l', channels), in plain loops."""
    K, T = {(a, b): u @ v.T / u.shape[1] for a, u in enumerate((x, y)) for b, v in enumerate((x, y))}, 0
    for name, *std in layers:
        v = [np.diag(K[a, a]) if np.ndim(K[a, a]) else K[a, a] for a in (0, 1)]
        if name == "relu":
            c = {key: np.clip(K[key] / np.sqrt(np.multiply.outer(v[key[0]], v[key[1]])), -1, 1) for key in K}
            T = (np.pi - np.arccos(c[0, 1])) / (2 * np.pi) * T
            K = {key: np.sqrt(np.multiply.outer(v[key[0]], v[key[1]])) / (2 * np.pi)
                 * (np.sqrt(1 - c[key]**2) + (np.pi - np.arccos(c[key])) * c[key]) for key in K}
        elif name in ("dense", "conv1d"):
            def mean(k):
                if name == "dense" or np.ndim(k) == 0:
                    return k
                return np.array([[sum(k[p + d, q + d] for d in (-1, 0, 1) if 0 <= p + d < k.shape[0]
                                      and 0 <= q + d < k.shape[1]) / 3
                                  for q in range(k.shape[1])] for p in range(k.shape[0])])
            K = {key: std[0]**2 * mean(k) + std[1]**2 for key, k in K.items()}
            T = K[0, 1] + std[0]**2 * mean(T)
        elif name == "seq_gap":
            K, T = {key: k.mean() for key, k in K.items()}, np.mean(T)
        elif name == "seq_flatten":
            def own(k):
                return sum(k[p, p] for p in range(min(k.shape))) / np.sqrt(k.shape[0] * k.shape[1])
            T = own(T) if np.ndim(T) else T
            K = {key: own(k) for key, k in K.items()}
    return K[0, 1], T


@pytest.mark.parametrize("name, options", [(name, options) for name in sequence_layers.SEQUENCES for options in (
    {"depth": 1}, {"depth": 2, "w_std": 1.3, "b_std": 0.5})], ids=str)
def test_kernel_of_sequences_in_plain_loops(name, options):
    """For every pair of peptides of several lengths, one of a single residue, K equals the recursion in loops over their own
    positions to 1e-10, with and without bias, so padding, before or behind, changes nothing; K is positive definite. And it is
    neural_tangents' with masks, to 1e-10 in float64 and 1e-5 in float32, except that its flatten divides by the length of the
    array and ours by the geometric mean of the two lengths: with a bias only those of the array's length are compared."""
    peptides = [*PEPTIDES, PEPTIDES[1][::-1], PEPTIDES[1][7:] + PEPTIDES[1][:7]]
    x, lengths = encode(peptides, "blosum", 0).astype(np.float64), np.array([len(s) for s in peptides])
    own, layers, different = [z[:len(s)] for z, s in zip(x, peptides)], kernel.network(name, **options), ~np.eye(5, dtype=bool)
    fn = optimised(kernel.kernel_fn(name, kernel.KINDS, **options))
    padded, moved = (fn(np.pad(x, ((0, 0), pad, (0, 0)))) for pad in ((0, 7), (3, 4)))
    expected = np.moveaxis([[recursion(layers, a, b) for b in own] for a in own], 2, 0)
    for K, K_moved, by_hand in zip(padded, moved, expected):
        assert relative_error(K, by_hand) < 3e-8 and relative_error(K_moved, np.asarray(K)) < 1e-12
        assert relative_error(K[different], by_hand[different]) < 1e-10
        assert np.linalg.eigvalsh(K[:3, :3])[0] > 1e-3 * np.trace(K[:3, :3]) / 3
    if options == {"depth": 1} and name != "seq_cnn":  # without a bias, of flatten all lengths
        return
    means = x.shape[1] / np.sqrt(np.outer(lengths, lengths)) * (name != "seq_cnn_gap") + (name == "seq_cnn_gap")
    same = (means == 1) | (options == {"depth": 1})
    for K, K32, nt in zip(padded, fn(x.astype(np.float32)), reference(name, kernel.KINDS, x, x[::-1].copy(), **options)):
        for found, tolerance in ((K, 1e-10), (K32, 1e-5)):
            off = np.abs(np.asarray(found, np.float64) / (nt[:, ::-1] * means) - 1)
            assert off[same & different].max() < tolerance
            assert np.diag(off)[np.diag(same)].max() < max(tolerance, 3e-8)  # neural_tangents' rounding of c = 1


@pytest.mark.parametrize("name, depth, tail", [("seq_fc", 2, 0), ("seq_cnn", 3, 0), ("seq_cnn_gap", 2, 2)])
def test_fused_sequences(name, depth, tail, monkeypatch):
    """fused.py equals kernel.py to 1e-5 on sequences of 1 to 21 residues, with bias and several blocks of columns, also
    with a relu after the readout, which reads k(x, x). fn(x) is symmetric to the last bit and equals it too, diagonal
    included, for any number of rows."""
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns
    x = encode(PEPTIDES * 6, "blosum", 0)
    x[3:] *= np.random.default_rng(0).uniform(0.5, 1, size=x[3:].shape).astype(np.float32)
    layers = [*kernel.network(name, depth=depth, b_std=0.5), ("relu",), ("dense", 1.1, 0.3)]
    layers = layers[:len(layers) - 2 + tail]
    fn, exact = optimised(fused.kernel_fn(layers, kernel.KINDS)), kernel.kernel_fn(layers, kernel.KINDS)(x.astype(float))
    calls = {"seq_fc": [(x, x[1:])], "seq_cnn": [(x,), (x[:1],)], "seq_cnn_gap": [(x,), (x, x[1:])]}  # each call compiles
    for call in calls[name]:
        for fast, K in zip(fn(*call), exact):
            K = np.asarray(K)[:len(call[0]), len(call) - 1:][:, :len(call[0])]
            assert fast.dtype == np.float32 and fast.shape == K.shape and relative_error(fast, K) < 1e-5
            assert len(call) == 2 or np.array_equal(fast, fast.T)
    with pytest.raises(ValueError, match="only images have mirror images"):
        fused.kernel_fn(name, "ntk", flips=True)


def test_fused_sequences_on_a_gpu(monkeypatch):
    """gpu.py, run by Pallas' interpreter, equals kernel.py on peptides to 1e-5 in float32 and 1e-12 in float64."""
    x, layers = encode(PEPTIDES, "blosum", 0).astype(float), kernel.network("seq_cnn", b_std=0.3, depth=2)
    exact, conv_relu = kernel.kernel_fn(layers, kernel.KINDS)(x, x[2:]), fused.conv_relu

    def in_prepare_only(source, target, stds1, *rest):
        assert stds1[0].shape[2] > 1  # gpu.py should have done a pair of different sequences
        return conv_relu(source, target, stds1, *rest)
    monkeypatch.setattr(fused, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "INTERPRET", True)
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns
    monkeypatch.setattr(fused, "conv_relu", in_prepare_only)
    for dtype, kinds, tolerance in ((np.float32, "nngp", 1e-5), (np.float32, kernel.KINDS, 1e-5),
                                    (float, kernel.KINDS, 1e-12)):
        fast = fused.kernel_fn(layers, kinds)(x.astype(dtype), x[2:].astype(dtype))
        for K, K_exact in zip(fast if kinds == kernel.KINDS else [fast], exact):
            assert K.dtype == dtype and relative_error(K, np.asarray(K_exact)) < tolerance


@pytest.mark.parametrize("call, words", [
    (lambda: kernel.kernel_fn([("conv1d", 1.0, 0.0), ("gap",)], "ntk")(np.ones((2, 5, 1, 3))),
     r"for sequences begins with \(\"mask\",\)"),
    (lambda: kernel.kernel_fn([("seq_gap",), ("dense", 1.0, 0.0)], "ntk")(np.ones((2, 5, 1, 3))), "sequences begins with"),
    (lambda: kernel.kernel_fn([("mask",), ("pool",), ("gap",)], "ntk"), r"\('pool',\).*expected \(\"mask\",\), then"),
    (lambda: kernel.kernel_fn([("mask",), ("conv1d", 1.0, 0.0), ("gap",)], "ntk"),
     r"\('gap',\).*\(\"seq_flatten\",\) or \(\"seq_gap\",\), then"),
    (lambda: kernel.kernel_fn([("mask",), ("dense", 1.0, 0.0), ("seq_gap",)], "ntk"), r"expected \(\"mask\",\), then"),
    (lambda: kernel.kernel_fn("seq_cnn", "ntk")(np.ones((3, 9))), r"\(3, 9\).*sequences \(n, length, channels\)"),
])
def test_kernel_of_sequences_errors(call, words):
    """An argument that does not fit is refused with one line: what was got, what was expected."""
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- proteins

def protein(tmp_path, *flags):
    return train_protein.main([*flags, "--out", str(tmp_path), "--quiet"])


@needs_gb1
def test_proteins_gb1(capsys):
    """FLIP's files give the numbers of rows in FLIP's README, 4 of 265 residues vary, and the wild type has fitness 1. So
    does the landscape."""
    for split, counts in zip(seqs.FLIP, ((25, 28), (381, 424), (2691, 2990), (4580, 5089), (6289, 6988))):
        loaded = seqs.load(split, GB1, quiet=False)
        assert loaded[2:] == counts and len(loaded.sequences) == len(loaded.targets) == 8733
        vary = 3 if split == "one_vs_rest" else 4  # its 28 training rows vary at three of the four positions
        assert len(seqs.fit(loaded.sequences[:loaded.n_train], "onehot").positions) == vary
    wild = "MQYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE"
    assert [y for s, y in zip(*loaded[:2]) if s.startswith(wild)] == [1.0]
    landscape = seqs.load("landscape", GB1, quiet=False)
    assert capsys.readouterr().out == ""  # no note that these were other files than those of SHA256
    assert (len(landscape.targets), *landscape[2:]) == (149361, 119489 - 119489 // 5, 119489)
    assert [y for s, y in zip(*landscape[:2]) if s.startswith(wild)] == [1.0]


def test_proteins_made():
    """The artificial landscape has 1,296 sequences and variance 1. Least squares on one-hot explains exactly the share
    MADE_LINEAR of that variance."""
    sequences, y = seqs._made()
    assert len(set(sequences)) == 6**4 and abs(y.mean()) < 1e-12 and abs(y.var() - 1) < 1e-12
    x = encode(sequences, "onehot", 0).reshape(1296, -1).astype(float)
    residual = y - x @ np.linalg.lstsq(x, y)[0]
    assert abs(1 - residual.var() - seqs.MADE_LINEAR) < 1e-12


def test_proteins_encodings():
    """onehot: inner products count equal residues. blosum: residues have norm 1, and their cosines are positive for similar
    residues, negative for others. centred: mean 0 over the training rows. Constant positions are left out, and shorter
    sequences end in zeros."""
    sequences = ["MAGIW", "MLGIW", "MLGVW", "MAGVY"]
    x = encode(sequences, "onehot", 4)
    assert x.shape == (4, 3, 20) and x.dtype == np.float32
    assert (np.einsum("npc,mpc->nm", x, x) == [[sum(a == b for a, b in zip(s[1::2] + s[4:], t[1::2] + t[4:]))
                                                for t in sequences] for s in sequences]).all()
    B = seqs.blosum() @ seqs.blosum().T
    at = {residue: i for i, residue in enumerate(seqs.RESIDUES)}
    assert np.allclose(np.diag(B), 1) and np.linalg.matrix_rank(B) == 19
    for a, near, far in ("ILP", "DEW", "FYD", "KRC", "STW"):
        assert B[at[a], at[near]] > 0.3 > 0 > B[at[a], at[far]]
    centred = encode(sequences, "centred", 2)
    assert centred.shape == (4, 1, 20) and np.abs(centred[:2].mean(axis=0)).max() < 1e-7
    ragged = encode(["MA", "M", "MAW"], "blosum", 3)
    assert ragged.shape == (3, 3, 20) and (np.abs(ragged).max(axis=2) > 0).sum(axis=1).tolist() == [2, 1, 3]


@pytest.mark.parametrize("name", seqs.TARGETS)
def test_proteins_targets(name):
    """Each function of the target keeps order and ties, has mean 0 and variance 1 on the rows it was fitted on, and has an
    inverse; outside the range of those rows both are finite."""
    y = np.array([3.0, 0, 0, 1, 8, 0.5])
    forward, inverse = seqs.transform(name, y)
    z = forward(y)
    assert abs(z.mean()) < 1e-12 and abs(z.var() - 1) < 1e-12 and np.allclose(inverse(z), y, atol=1e-12)
    assert (np.argsort(z, kind="stable") == np.argsort(y, kind="stable")).all() and z[1] == z[2]
    assert np.isfinite(forward(np.array([-5.0, 100]))).all() and np.isfinite(inverse(np.array([-3.0, 3]))).all()


@pytest.mark.parametrize("text, words", [
    ("sequence,target,set\nMA,1,train\n", "has no column 'validation'; its columns are 'sequence', 'target', 'set'"),
    ("", "has no column 'sequence'; its columns are none"),
    ("sequence,target,set,validation\n", "has no row below its header"),
    ("sequence,target,set,validation\nM*,1,train,\nMXA,2,test,\n",
     r"two_vs_rest.csv: 2 of 2 rows are left out; .*: '\*' in 1, 'X' in 1; no row remains. Correct the column sequence"),
    ("sequence,target,set,validation\n,2,test,\n", "1 of 1 rows are left out; .*: no letter in 1; no row remains"),
    ("sequence,target,set,validation\nMA,-inf,train,\n", "line 2: target '-inf'; expected a finite number"),
    ("sequence,target,set,validation\nMA,1_5,train,\n", "line 2: target '1_5'; expected a finite number"),
    ("sequence,target,set,validation\nMA,,train,\n", "line 2: target ''; expected a finite number"),
    ("sequence,target,set,validation\nMA,1,,\n", "line 2: set ''; expected train or test"),
    ("sequence,target,set,validation\nMA,1,train,2\n", "line 2: validation '2'; expected True, yes, 1; or False"),
    ("Sequence,target,set,validation\nMA,1,train,\n", "has no column 'sequence'; its columns are 'Sequence', 'target', 'set'"),
    ("sequence;target;set;validation\nMA;1.5;train;\n", "line 1: fields are separated by ';'; expected commas"),
    ("sequence,target,set,validation\nMA,1,test,\nML,2,test,True\n", "0 rows to fit, 0 to validate and 2 to test"),
    ("sequence,target,set,validation\nMA,1,train,yes\nML,2,test,\n", "0 rows to fit, 1 to validate and 1 to test"),
    ("sequence,target,set,validation\nMA,1.5,train,\nML,0,5,test,\n", "line 3: 5 fields, and 4 in the header"),
    ('sequence,target,set,validation\nMA,"1,5",train,\n', "line 2: target '1,5'; expected .* decimal point"),
    ("sequence,target,set,validation\nMA,inf,train,\n", "line 2: target 'inf'; expected a finite number"),
    ("sequence,target,set,validation\nMA,1,train,maybe\n", "line 2: validation 'maybe'; expected True, yes, 1; or False"),
    ("sequence,target,set,set,validation\nMA,1,train,train,\n", "has 2 columns 'set'; expected one"),
    ("sequence,target,set,validation\nMA,?,train,\n", "line 2: target '\\?'; expected a finite number"),
    ("sequence,target,set,validation\nMA,nan,train,\n", "line 2: target 'nan'; expected a finite number"),
    ("sequence,target,set,validation\nMA\n", "line 2: 1 fields, and 4 in the header"),
    ("sequence,target,set,validation\nMA,1,valid,\n", "line 2: set 'valid'; expected train or test"),
    ("sequence,target,set,validation\nMA,1,train,\nML,1,test,\n", "lines 2 to 3: every target is 1"),
    ("sequence,target,set,validation\nMA,1,train,\nML,2,train,True\n", "1 rows to fit, 1 to validate and 0 to test"),
])
def test_proteins_bad_files(tmp_path, text, words):
    """A faulty table is refused with one line that has the name of the file, and the line of the fault if there is one."""
    (tmp_path / "two_vs_rest.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        seqs.load("two_vs_rest", str(tmp_path))
    assert "\n" not in str(error.value) and "two_vs_rest.csv" in str(error.value)


@pytest.mark.parametrize("encoding, words", [
    ("utf-8-sig", None), ("utf-16", "zero bytes"), ("utf-16-le", "zero bytes"), ("latin-1", "not UTF-8")])
def test_proteins_encodings_of_text(tmp_path, encoding, words):
    """A table in UTF-8 is read, also with a byte order mark; any other encoding is refused with the name of the file."""
    table = "sequence,target,set,validation,\xe9tat\nMA,1,train,,\nML,2,test,,\n"
    (tmp_path / "two_vs_rest.csv").write_bytes(table.encode(encoding))
    if words is None:
        assert seqs.load("two_vs_rest", str(tmp_path)).sequences == ["MA", "ML"]
    else:
        with pytest.raises(ValueError, match=f"two_vs_rest.csv.* {words}"):
            seqs.load("two_vs_rest", str(tmp_path))


def test_proteins_tables_as_people_have_them(tmp_path, capsys):
    """Lower case is read as upper case. Rows with other letters are left out and counted in one line, even if they have no
    target. Test rows that are training rows too are counted in one note."""
    lines = ["ma,1,train,True", "ML,2,train,", "MW,3,TRAIN,1", "MX,4,train,", "MXB*,?,train,", "M-,4,test,", "MK,5,test,",
             "MR,6,train,False", "ML,2,test,", "ml,2.5,test,", "M\u00df,1,train,", "M.U,1,test,", ",1,test,", " MC ,7,test,"]
    (tmp_path / "two_vs_rest.csv").write_text("sequence,target,set,validation\n" + "\n".join(lines) + "\n\n", "utf-8")
    split = seqs.load("two_vs_rest", str(tmp_path), quiet=False)
    assert split.sequences[:4] == ["ML", "MR", "MA", "MW"] and split.targets[:4].tolist() == [2, 6, 1, 3]
    assert split[2:] == (2, 4)
    tests = [("MC", 7), ("MK", 5), ("ML", 2), ("ML", 2.5)]
    assert sorted(zip(split.sequences[4:], split.targets[4:].tolist())) == tests
    _, left_out, note = capsys.readouterr().out.splitlines()  # the first line says that this is not FLIP's file
    assert "two_vs_rest.csv: 6 of 14 rows are left out; expected only the letters ARNDCQEGHILKMFPSTWYV: 'X' in 2" in left_out
    assert all(f"{letter!r} in 1" in left_out for letter in "B*-\u00df.U") and "no letter in 1" in left_out
    assert note.startswith("note: 2 of 4 test rows of splits/two_vs_rest.csv in") and note.endswith("too, such as ML")


@pytest.mark.parametrize("words, held_out", [
    (("TRUE", "True", "true", "1", "1.0", "yes"), True), (("FALSE", "False", "0", "0.0", "", " "), False)])
def test_proteins_truth_in_any_words(tmp_path, words, held_out):
    """Every usual way to write true makes a row a validation row; every usual way to write false does not."""
    rows = [f"M{residue},{i},Train,{word}" for i, (residue, word) in enumerate(zip(seqs.RESIDUES, words))]
    rows = ["sequence,target,set,validation", "MW,8,train,False", "MY,9,TEST,", *rows]
    (tmp_path / "sampled.csv").write_text("\n".join(rows))
    assert seqs.load("sampled", str(tmp_path))[2:] == (1 if held_out else 1 + len(words), 1 + len(words))


def test_proteins_landscape_tables(tmp_path, capsys):
    """A landscape that is too small to hold out a fifth is refused. A note counts the test rows whose variant, measured
    twice, is among the training rows too. Every seed has the same test rows, and the training rows in another order."""
    path = tmp_path / "four_mutations_full_data.csv"
    path.write_text("sequence,Fitness\nMA,1\nML,2\n")
    with pytest.raises(ValueError, match="four_mutations_full_data.csv in .* has 2 rows to fit, 0 to validate and 0 to test"):
        seqs.load("landscape", str(tmp_path))
    path.write_text("sequence,Fitness\n" + "".join(f"M{'AL'[i % 2]},{i}\n" for i in range(10)))
    assert len(seqs.load("landscape", str(tmp_path), quiet=False).sequences) == 10
    assert "note: 2 of 2 test rows of four_mutations_full_data.csv in" in capsys.readouterr().out
    path.write_text("sequence,Fitness\n" + "".join(f"M{a}{b},{i}\n" for i, a in enumerate(seqs.RESIDUES) for b in "ACDEF"))
    first, second = (seqs.load("landscape", str(tmp_path), seed) for seed in (0, 1))
    n = first.n_train
    assert (len(first.targets), n, first.n_fit) == (100, 80, 64) == (len(second.targets), second.n_train, second.n_fit)
    assert first.sequences[n:] == second.sequences[n:] and first.sequences[:9] != second.sequences[:9]
    assert sorted(zip(*first[:2])) == sorted(zip(*second[:2])) and sorted(first.sequences[:n]) == sorted(second.sequences[:n])


@pytest.mark.parametrize("encoding", seqs.ENCODINGS)
def test_proteins_encoding_is_fitted_on_training_rows(encoding):
    """The encoding of a row does not depend on the rows encoded with it, and padding to a longer row keeps the kernel. A row
    that does not fit is refused with one line."""
    train, new = ["MAGIW", "MLGIW", "MLGVW"], ["MCGVY", "AAAAA"]
    fitted = seqs.fit(train, encoding)
    assert (fitted(new + train)[:2] == fitted(new)).all() and (fitted(new)[1:] == fitted(new[1:])).all()
    by_hand = {row: np.array([[letter == residue for residue in seqs.RESIDUES] for letter in row[1::2]], float)
               for row in train + new}  # positions 1 and 3 vary among the training rows
    mean = sum(by_hand[row] for row in train) / 3 * (encoding == "centred")
    if encoding != "blosum":
        assert np.abs(fitted(new) - [by_hand[row] - mean for row in new]).max() < 1e-7
    assert fitted(new).shape == (2, 2, 20)
    for bad, words in (("MAGIWW", "'MAGIWW', has 6 residues; expected 5, as in the training rows"),
                       ("MAGI", "'MAGI', has 4 residues; expected 5"), ("MAGXW", "'MAGXW', has the letter 'X'; expected"),
                       ("magiw", "'magiw', has the letter 'a'"), ("", "'', has 0 residues"),
                       ("MA IW", "'MA IW', has the letter ' '")):
        with pytest.raises(ValueError, match=f"sequence 2 of 2, {words}"):
            fitted(["MAGIW", bad])
    if encoding != "centred":
        fn = kernel.compiled(kernel.kernel_fn, tuple(kernel.network("seq_cnn", depth=2)), "ntk")
        K = [np.asarray(fn(seqs.fit(PEPTIDES, encoding, longest)(PEPTIDES).astype(float))) for longest in (0, 30)]
        assert relative_error(*K) < 1e-10
        with pytest.raises(ValueError, match=r"sequence 1 of 1, 'A{30}'\.\.\., has 40 residues; expected 1 to 21"):
            seqs.fit(PEPTIDES, encoding)(["A" * 40])


def test_proteins_several_lengths(tmp_path, monkeypatch):
    """Sequences of several lengths run with all defaults: auto compares only the encodings that can take them. A test row
    that does not fit the encoding is refused with one line that has its number and its letters."""
    rng = np.random.default_rng(0)
    peptides = ["".join(rng.choice(list(seqs.RESIDUES), size=rng.integers(5, 9))) for _ in range(60)]
    split = seqs.Split(peptides, np.array([p.count("A") + 0.1 * len(p) for p in peptides]), 40, 48)
    monkeypatch.setattr(seqs, "load", lambda *_: split)
    result = protein(tmp_path, "--kernel", "seq_fc")
    assert {row[0]["encoding"] for row in result["compared"]} == {"onehot", "blosum"} and result["cg_converged"]
    with pytest.raises(ValueError, match="centred with sequences of 5 to 8 residues: .*; use onehot or blosum"):
        protein(tmp_path, "--kernel", "seq_fc", "--encoding", "centred")
    split = seqs.Split([peptide[:5] for peptide in peptides[:50]] + peptides[50:], split.targets, 40, 48)
    with pytest.raises(ValueError, match="sequence [3-9] of 12, '[A-Y]{6,8}', has [6-8] residues; expected 5, as in"):
        protein(tmp_path, "--kernel", "seq_fc")


SIZES = ["--transform", "log", "--n_test", "60", "--ridge", "0.1,1", "--tile", "16"]


@pytest.mark.parametrize("name, encoding", [
    ("seq_fc", "blosum"), ("seq_cnn", "onehot"), ("seq_cnn_gap", "centred"),  # a network knows no encoding, and linear does:
    *(("linear", encoding) for encoding in seqs.ENCODINGS)])  # centred rows have an intercept, and positions count
def test_proteins_sizes_equal_runs_alone(tmp_path, monkeypatch, name, encoding):
    """With --sizes, every size has the result of a run with that size alone and the recorded configuration, for every kernel
    and encoding, although 4 rows vary at fewer positions than 40; and both continue from one store."""
    split = seqs.load("made")
    order = sorted(range(split.n_train), key=lambda i: split.sequences[i][:2] != "AR")  # rows that begin with AR first
    rows, n = [*order, *range(split.n_train, len(split.targets))], split.n_train
    split = seqs.Split([split.sequences[i] for i in rows], split.targets[rows], n - n // 5, n)
    assert [len(seqs.fit(split.sequences[:n], "onehot").positions) for n in (4, 40)] == [2, 4]
    monkeypatch.setattr(seqs, "load", lambda *_: split)
    flags, store = ["--kernel", name, "--encoding", encoding, *SIZES], ["--store", str(tmp_path / "K")]
    flags += [] if name == "linear" else ["--depth", "1"]
    together = protein(tmp_path, *flags, "--sizes", "4,40", *store)
    for n in (4, 40):
        alone, again = (protein(tmp_path, *flags, "--n_train", str(n), *kept) for kept in ([], store))
        assert together[n]["config"] == alone["config"] == again["config"]
        for one in (together[n], again):
            assert one["ridge"] == alone["ridge"] and abs(one["test_spearman"] - alone["test_spearman"]) < 1e-3
            assert abs(one["test_rmse"] / alone["test_rmse"] - 1) < 1e-5


def test_proteins_sizes_are_scikit_learn(tmp_path):
    """With --sizes 20,700, ridge regression on centred sequences equals scikit-learn's with an intercept, fitted on the first
    n one-hot rows: the two sizes do not share a mean."""
    result = protein(tmp_path, "--kernel", "linear", "--encoding", "centred", "--transform", "raw", "--ridge", "1", "--sizes",
                     "20,700")
    split = seqs.load("made")
    x = np.array([[letter == residue for letter in s for residue in "ARNDCQ"] for s in split.sequences], float)
    for n in (20, 700):
        f, y = Ridge(alpha=1.0).fit(x[:n], split.targets[:n]).predict(x[split.n_train:]), split.targets[split.n_train:]
        assert abs(result[n]["test_spearman"] - spearmanr(f, y).statistic) < 1e-4
        assert abs(result[n]["test_rmse"] - np.sqrt(np.mean((f - y) ** 2))) < 1e-4


@pytest.mark.parametrize("encoding", ["onehot", "centred"])
def test_proteins_sizes_are_dense_solves(tmp_path, encoding):
    """With --sizes, a network with one hidden layer equals the arc-cosine formula (Cho and Saul 2009) and a dense solve in
    NumPy: every size has its own mean, its own mean and sd of the target, and a ridge relative to its own diagonal."""
    result = protein(tmp_path, "--kernel", "seq_fc", "--depth", "1", "--encoding", encoding, "--transform", "raw", "--ridge",
                     "0.1", "--b_std", "0.3", "--sizes", "10,200", "--tol", "1e-8")
    split = seqs.load("made")
    x = np.array([[letter == residue for letter in s for residue in seqs.RESIDUES] for s in split.sequences], float)
    for n in (10, 200):
        K, _ = fully_connected(x - x[:n].mean(axis=0) * (encoding == "centred"), 1, 0.3)  # four positions of 20 channels
        y, n_train = split.targets, split.n_train
        z = (y[:n] - y[:n].mean()) / y[:n].std()
        f = K[n_train:, :n] @ np.linalg.solve(K[:n, :n] + 0.1 * np.diag(K)[:n].mean() * np.eye(n), z)
        ties = np.round(f / np.abs(f).max(), 5)
        assert abs(result[n]["test_spearman"] - spearmanr(ties, y[n_train:]).statistic) < 1e-4
        assert abs(result[n]["test_rmse"] - np.sqrt(np.mean((f * y[:n].std() + y[:n].mean() - y[n_train:])**2))) < 1e-5


def test_proteins_choices_for_a_row_are_recorded(tmp_path):
    """Choices made at the smallest size are recorded for every size, and a run with the recorded values has that result."""
    row = protein(tmp_path, "--kernel", "seq_fc", "--sizes", "30,60", "--depth", "1,2", "--b_std", "0,1", "--n_test", "60")
    for n in (30, 60):
        config = row[n]["config"]
        alone = protein(tmp_path, "--n_train", str(n), *(
            f"--{train_protein.FLAGS.get(name, name)}={config[name]}" for name in (
                "kernel", "encoding", "target", "depth", "w_std", "b_std", "n_test", "tile")),
            "--ridge", ",".join(map(str, config["ridge"])))
        assert alone["compared"] == [] and len(row[n]["compared"]) == 36 and alone["config"] == config
        assert alone["ridge"] == row[n]["ridge"] and abs(alone["test_rmse"] / row[n]["test_rmse"] - 1) < 1e-5


def test_proteins_files_elsewhere(tmp_path, capsys):
    """An archive, its unpacked folder and a bare table give the same rows; if none exists, one line says what to download."""
    text = "sequence,target,set,validation\nMA,1,train,\nMW,3,test,\nML,2,train,True\n"
    with pytest.raises(FileNotFoundError, match="found none of .*flip_gb1_splits.zip, .*; download one of them from https"):
        seqs.load("sampled", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "flip_gb1_splits.zip", "w") as file:
        file.writestr("splits/sampled.csv", text)
    found = [seqs.load("sampled", str(tmp_path))]
    with pytest.raises(ValueError, match="holds no splits/one_vs_rest.csv"):
        seqs.load("one_vs_rest", str(tmp_path))
    os.replace(tmp_path / "flip_gb1_splits.zip", tmp_path / "splits.zip")  # FLIP's own name for it
    found.append(seqs.load("sampled", str(tmp_path), quiet=False))
    assert "splits.zip is not the file that the figures in results/README.md were made from" in capsys.readouterr().out
    (tmp_path / "splits.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="truncated"):
        seqs.load("sampled", str(tmp_path))
    for path in (tmp_path / "splits" / "sampled.csv", tmp_path / "sampled.csv"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        found.append(seqs.load("sampled", str(tmp_path)))
        path.unlink()
    for split in found:
        assert split.sequences == ["MA", "ML", "MW"] and split.targets.tolist() == [1, 2, 3] and split[2:] == (1, 2)


def test_proteins_smoke(tmp_path, capsys):
    """Without data flags, the artificial landscape is learned, with an interaction between neighbours that ridge regression
    cannot represent. runs.jsonl gets one line. What compiled the kernel and the flags for real data are printed."""
    result = train_protein.main(["--out", str(tmp_path), "--kernel", "seq_fc"])
    said = capsys.readouterr().out
    assert "--split two_vs_rest --data DIR" in said and "kernel compiled by XLA, peak memory" in said
    assert result["test_spearman"] > 0.99 and result["test_rmse"] < 0.1 and result["cg_converged"]
    assert json.loads((tmp_path / "runs.jsonl").read_text()) == result
    assert len(result["compared"]) == len(seqs.ENCODINGS) * len(seqs.TARGETS)
    linear = protein(tmp_path, "--kernel", "linear", "--encoding", "onehot", "--transform", "raw")
    assert abs(linear["test_rmse"]**2 - (1 - seqs.MADE_LINEAR)) < 0.1


@needs_gb1
@pytest.mark.parametrize("split, published", [("one_vs_rest", 0.28), ("two_vs_rest", 0.59), ("three_vs_rest", 0.76),
                                              ("low_vs_high", 0.34)])
def test_proteins_ridge_is_scikit_learn(tmp_path, monkeypatch, split, published):
    """Ridge regression with this solver, on centred sequences, has the test RMSE of scikit-learn's with an intercept on
    one-hot to 1e-4, and the published Spearman correlation to two digits, which checks data and metric."""
    monkeypatch.setattr(choose, "DENSE", 1000)  # no eigenvectors of larger matrices
    result = protein(tmp_path, "--split", split, "--data", GB1, "--kernel", "linear", "--encoding", "centred",
                     "--transform", "raw", "--ridge", "1")
    sequences, y, _, n = seqs.load(split, GB1)
    x = encode(sequences, "onehot", n).reshape(len(y), -1).astype(np.float64)
    f = Ridge(alpha=1.0).fit(x[:n], y[:n]).predict(x[n:])
    assert round(result["test_spearman"], 2) == published == round(spearmanr(f, y[n:]).statistic, 2)
    assert abs(result["test_rmse"] - np.sqrt(np.mean((f - y[n:])**2))) < 1e-4


def test_proteins_is_a_dense_solve(tmp_path):
    """Choices and predictions equal those of dense float64 formulas: with --select validation, validation rows are the last
    fifth of the training rows, functions of the target are fitted on the others, and in the end all rows are fitted."""
    result = protein(tmp_path, "--n_train", "100", "--encoding", "onehot", "--ridge", "0.1,0.001", "--depth", "1",
                     "--kernel", "seq_fc", "--kind", "ntk", "--tol", "1e-9", "--select", "validation")
    sequences, y, *_ = seqs.load("made")
    x, n_train = encode(sequences, "onehot", 100).astype(np.float64), seqs.load("made").n_train
    K = fully_connected(x, 1)[1][:, :100]

    def solve(n, target, ridge):
        forward, _ = seqs.transform(target, y[:n])
        A = K[:n, :n] + ridge * np.diag(K[:n, :n]).mean() * np.eye(n)
        return K[:, :n] @ np.linalg.solve(A, forward(y[:n])), forward(y)
    best = []
    for row, target in zip(result["compared"], seqs.TARGETS):
        tried = [(np.mean((f - z)[80:100]**2), ridge, spearmanr(f[80:100], y[80:100]).statistic)
                 for ridge in (0.1, 0.001) for f, z in [solve(80, target, ridge)]]
        mse, ridge, correlation = min(tried)
        assert row[:2] == [{"target": target}, ridge] and np.allclose(row[2:], [correlation, mse], rtol=0.02)
        best.append((correlation, target))
    target = max(best)[1]
    assert result["config"]["target"] == target
    f = solve(100, target, result["ridge"])[0][n_train:]
    assert abs(result["test_spearman"] - spearmanr(f, y[n_train:]).statistic) < 1e-4
    inverse = seqs.transform(target, y[:100])[1]
    assert abs(result["test_rmse"] - np.sqrt(np.mean((inverse(f) - y[n_train:])**2))) < 1e-4


@pytest.mark.parametrize("most", [train_protein.COMPARED, 20])
def test_proteins_leave_one_out_is_refits(tmp_path, monkeypatch, most):
    """By n refits in float64: encoding, target, depth and b_std are those with the best Spearman correlation of leave-one-out
    predictions, each at the ridge with the least mse; if at most 20 of 40 rows may be compared, on every second row. Then
    the ridge is chosen in the same way on all rows."""
    monkeypatch.setattr(train_protein, "COMPARED", most)
    result = protein(tmp_path, "--n_train", "40", "--kernel", "seq_fc", "--depth", "1,2", "--b_std", "0,1", "--ridge",
                     "0.1,0.01")
    sequences, y, *_ = seqs.load("made")

    def best(depth, b_std, encoding, target, rows):
        x, y_rows = encode(sequences, encoding, 40)[rows].astype(np.float64), y[rows]
        K, z = fully_connected(x, depth, b_std)[0], seqs.transform(target, y_rows)[0](y_rows)
        found = [(ridge, refitted(K, z, ridge)) for ridge in (0.1, 0.01)]
        return min(([ridge, spearmanr(f, y_rows).statistic, np.mean((f - z) ** 2)] for ridge, f in found),
                   key=lambda row: row[2])
    settings = [(depth, b_std, encoding, target) for depth in (1, 2) for b_std in (0.0, 1.0)
                for encoding in seqs.ENCODINGS for target in seqs.TARGETS]
    table = [best(*one, np.arange(0, 40, 2 if most == 20 else 1)) for one in settings]
    assert [list(row[0].values()) for row in result["compared"]] == list(map(list, settings))
    assert np.allclose([row[1:] for row in result["compared"]], table, rtol=1e-4)
    chosen = settings[max(range(len(table)), key=lambda i: table[i][1])]
    assert tuple(result["config"][flag] for flag in ("depth", "b_std", "encoding", "target")) == chosen
    whole = best(*chosen, np.arange(40))
    assert np.allclose([result[key] for key in ("ridge", "loo_score", "loo_mse")], whole, rtol=1e-4)
    assert result["select"] == "loo" and result["cg_converged"]


def test_proteins_leave_one_out_has_an_intercept(tmp_path):
    """Leave-one-out of linear on centred sequences is n refits of scikit-learn's Ridge with an intercept on one-hot residues,
    also where hardly any residue occurs twice. There, without an intercept of its own, a refit would know the row left out
    from the mean: targets in any order would be predicted in this order."""
    rng, ridges = np.random.default_rng(0), (1.0, 1e-3)
    sequence = [list("AAAAAAAA") for _ in range(24)]
    for k, row in enumerate(sequence):
        row[k % 8] = seqs.RESIDUES[1 + k // 2]
    path = tmp_path / "x.csv"
    y = rng.normal(size=30).round(4)
    rows = ["".join(row) for row in sequence] + ["CCCCCCCC"] * 6
    path.write_text("sequence,target,set\n" + "".join(
        f"{s},{v},{'train' if k < 24 else 'test'}\n" for k, (s, v) in enumerate(zip(rows, y))))
    result = protein(tmp_path, "--dataset", str(path), "--set", "set", "--kernel", "linear", "--encoding", "centred",
                     "--transform", "raw", "--ridge", ",".join(map(str, ridges)))
    x, z = encode(rows, "onehot", 24)[:24].reshape(24, -1), (y[:24] - y[:24].mean()) / y[:24].std()
    refits = [np.array([Ridge(alpha=ridge).fit(np.delete(x, i, 0), np.delete(z, i)).predict(x[i:i + 1])[0]
                        for i in range(24)]) for ridge in ridges]
    assert np.allclose([row[1:] for row in result["search"]],
                       [[spearmanr(f, z).statistic, np.mean((f - z) ** 2)] for f in refits], rtol=1e-4)


def test_proteins_networks_are_compared(tmp_path):
    """With several values for flags of the network, the result is that of a run with the chosen values alone, which are
    recorded; every combination has its row in the table."""
    flags = ["--n_train", "60", "--encoding", "onehot", "--transform", "raw", "--kernel", "seq_fc", "--depth", "1"]
    several = protein(tmp_path, *flags, "--w_std", "1,2", "--b_std", "0.5", "--head", "linear,exp", "--gamma", "1,2")
    assert [row[0] for row in several["compared"]] == [{"w_std": w_std, "head": head, "gamma": gamma} for w_std in (
        1.0, 2.0) for head, gamma in (("linear", None), ("exp", 1.0), ("exp", 2.0))]
    best = max(several["compared"], key=lambda row: row[2])
    assert best[0].items() <= several["config"].items() and best[2] > min(row[2] for row in several["compared"])
    alone = protein(tmp_path, *flags, "--b_std", "0.5",
                    *(f"--{flag}={value}" for flag, value in best[0].items() if value))
    assert alone["compared"] == [] and alone["config"] == several["config"] and alone["search"] == several["search"]
    assert alone["test_spearman"] == several["test_spearman"] and alone["loo_score"] == best[2]


@pytest.mark.parametrize("select, network, changes", [
    ("loo", ["--depth", "1,2"], (np.negative, np.random.default_rng(0).permutation)),
    ("validation", ["--depth", "1", "--w_std", "1,2"], (np.random.default_rng(0).permutation,))], ids=["loo", "validation"])
def test_proteins_never_looks_at_test_rows(tmp_path, monkeypatch, select, network, changes):
    """Negating or permuting the targets of the test rows changes only the test results: encoding, target, depth, w_std and
    ridge stay the same."""
    flags = ["--n_train", "60", "--n_test", "100", "--kernel", "seq_fc", *network, "--b_std", "1", "--select", select,
             "--ridge", "1,0.1,0.01"]
    first, load = protein(tmp_path, *flags), seqs.load
    for change in changes:
        def other(*args):
            split = load(*args)
            split.targets[split.n_train:] = change(split.targets[split.n_train:])
            return split
        monkeypatch.setattr(seqs, "load", other)
        second = protein(tmp_path, *flags)
        assert all(first[key] == second[key] for key in ("compared", "ridge", "search", "config", "loo_score"))
        assert (abs(first["test_spearman"] + second["test_spearman"]) < 1e-9) == (change is np.negative)
        assert abs(first["test_spearman"] - second["test_spearman"]) > 0.1


def test_proteins_criteria(tmp_path, monkeypatch):
    """Without --select: leave-one-out up to choose.DENSE rows, validation above. 4 rows can be solved, and so can a table of
    FLIP's form without validation rows. GCV chooses a ridge if nothing else is to be chosen."""
    one = ["--kernel", "seq_fc", "--encoding", "onehot", "--transform", "raw"]
    assert protein(tmp_path, *one, "--n_train", "4")["select"] == "loo"
    gcv, loo = (protein(tmp_path, *one, "--n_train", "100", "--select", select) for select in ("gcv", "loo"))
    assert gcv["select"] == "gcv" and 0.1 < gcv["ridge"] / loo["ridge"] < 10 and gcv["search"][0][1] is None
    monkeypatch.setattr(choose, "DENSE", 50)
    sizes = protein(tmp_path, *one, "--sizes", "50,60")
    assert [sizes[n]["select"] for n in (50, 60)] == ["loo", "validation"] and "loo_score" not in sizes[60]
    rows = [f"M{'ACDEF'[i // 5]}{'GHIKL'[i % 5]},{i % 7},{'train' if i % 5 else 'test'}," for i in range(25)]
    (tmp_path / "two_vs_rest.csv").write_text("\n".join(["sequence,target,set,validation", *rows]))
    flags = ["--split", "two_vs_rest", "--data", str(tmp_path), "--kernel", "seq_fc"]
    assert protein(tmp_path, *flags)["rows"] == 20
    with pytest.raises(ValueError, match="two_vs_rest with n_train=20 has 0 validation rows .* use --select loo"):
        protein(tmp_path, *flags, "--select", "validation")


def test_proteins_few_test_rows_stand_for_all(tmp_path):
    """FLIP's files are sorted; the first test rows are a sample of all, the same for every seed."""
    rows = [f"MA,{i},{'train' if i < 9 else 'test'}," for i in range(1009)]
    (tmp_path / "two_vs_rest.csv").write_text("\n".join(["sequence,target,set,validation", *rows]))
    one, other = (seqs.load("two_vs_rest", str(tmp_path), seed).targets[9:] for seed in (0, 1))
    assert (one == other).all() and sorted(one) == list(range(9, 1009)) and abs(one[:100].mean() - 508.5) < 90  # 3 sd


def table_of(path, validation, targets, test=None):
    """Writes a table of FLIP's form: 20 training rows with these targets and words for validation, and 5 test rows."""
    rows = [f"M{'ACDEF'[i // 5]}{'GHIKL'[i % 5]}" for i in range(25)]
    rows = [f"{row},{y},train,{held}" for row, y, held in zip(rows, targets, validation)] + [
        f"{row},{y},test," for row, y in zip(rows[20:], range(5) if test is None else test)]
    path.write_text("\n".join(["sequence,target,set,validation", *rows]))


@pytest.mark.parametrize("held_out, same, words", [
    (0, False, "n_train=20 has 0 validation rows with 0 different targets"),
    (1, False, "n_train=20 has 1 validation rows with 1 different targets"),
    (6, True, "n_train=20 has 6 validation rows with 1 different targets"),
    (20, True, "the targets of all 14 rows to fit are 3, so there is nothing to learn")])
def test_proteins_validation_rows_that_say_nothing(tmp_path, monkeypatch, held_out, same, words):
    """Validation rows that are too few or have equal targets are refused with one line, whether validation is asked for or
    is the default. Leave-one-out chooses on the same rows, and with one value for each flag no validation is needed."""
    y = [i % 7 for i in range(20)]
    if held_out == 20:
        y[6:], held_out = [3] * 14, 6
    elif same:
        y[:held_out] = [3] * held_out
    table_of(tmp_path / "two_vs_rest.csv", [i < held_out for i in range(20)], y)
    flags = ["--split", "two_vs_rest", "--data", str(tmp_path), "--kernel", "seq_fc", "--depth", "1"]
    for more in (["--select", "validation"], ["--encoding", "onehot", "--transform", "raw"], ["--ridge", "0.1"]):
        with monkeypatch.context() as patch:
            patch.setattr(choose, "DENSE", 2048 if "--select" in more else 10)
            with pytest.raises(ValueError, match=words) as error:
                protein(tmp_path, *flags, *more)
            assert "\n" not in str(error.value)
    result = protein(tmp_path, *flags)
    assert result["select"] == "loo" and all(np.isfinite(row[2]) and row[2] != 0 for row in result["compared"])
    monkeypatch.setattr(choose, "DENSE", 10)
    one = protein(tmp_path, *flags, "--encoding", "onehot", "--transform", "raw", "--ridge", "0.1")
    assert one["select"] is None and np.isfinite(one["test_spearman"])


def test_proteins_thinned_validation_rows(tmp_path, monkeypatch):
    """If thinning leaves only 1 of 2 validation rows for comparing networks, the run is refused with one line."""
    table_of(tmp_path / "two_vs_rest.csv", [i < 2 for i in range(20)], range(20))
    monkeypatch.setattr(train_protein, "COMPARED", 10)
    with pytest.raises(ValueError, match="n_train=20 has 1 validation rows with 1 different targets.* use --select loo"):
        protein(tmp_path, "--split", "two_vs_rest", "--data", str(tmp_path), "--kernel", "seq_fc", "--select", "validation")


def test_proteins_equal_targets(tmp_path, capsys):
    """Equal training targets are refused with one line, at every size. Equal test targets give a note and a Spearman
    correlation of 0, and the root mean squared error is still computed."""
    table_of(tmp_path / "two_vs_rest.csv", [""] * 20, [1.5] * 20)
    flags = ["--split", "two_vs_rest", "--data", str(tmp_path), "--kernel", "linear", "--encoding", "centred"]
    with pytest.raises(ValueError, match="two_vs_rest with n_train=20: the targets of all 20 rows to fit are 1.5") as error:
        protein(tmp_path, *flags)
    assert "\n" not in str(error.value)
    table_of(tmp_path / "two_vs_rest.csv", [""] * 20, range(20), [2] * 5)
    result = protein(tmp_path, *flags, "--transform", "raw", "--ridge", "1e9")
    assert "note: all 5 test targets of two_vs_rest are 2, so Spearman's" in capsys.readouterr().out
    assert result["test_spearman"] == 0 and abs(result["test_rmse"] - (np.arange(20).mean() - 2)) < 1e-6
    (tmp_path / "four_mutations_full_data.csv").write_text("sequence,Fitness\n" + "".join(
        f"M{a}{b},{(a, b) == ('A', 'A'):d}\n" for a in seqs.RESIDUES for b in "ACDEF"))
    with pytest.raises(ValueError, match="landscape with n_train=3: the targets of all 3 rows to fit are 0"):
        protein(tmp_path, "--split", "landscape", "--data", str(tmp_path), "--sizes", "3,60", "--kernel", "linear")


def test_proteins_stores_know_their_network(tmp_path, monkeypatch):
    """A store never returns tiles of another network: another w_std, b_std or head, another default, another layer in a named
    network or another engine is refused with one line. Every fitted encoding has its own tiles."""
    flags = ["--n_train", "20", "--transform", "raw", "--kernel", "seq_fc", "--ridge", "0.1"]
    kept, onehot = ["--store", str(tmp_path / "K")], ["--encoding", "onehot"]
    first = protein(tmp_path, *flags, *onehot, *kept)
    with monkeypatch.context() as patch:
        def refused(*other, words="layers"):
            with pytest.raises(ValueError, match=f"train-nngp holds another matrix: {words} is .* Give this run a store"):
                protein(tmp_path, *flags, *onehot, *kept, *other)
        for other in ("--w_std=1", "--b_std=1", "--head=relu"):
            refused(other)
        for name in ("W_STD", "B_STD"):
            patch.setattr(kernel, name, 1.0)
            changed = protein(tmp_path, *flags, *onehot)["test_rmse"] / first["test_rmse"]
            assert (abs(changed - 1) > 1e-3) == (name == "B_STD")  # without a bias, w_std only scales K
            refused()
            patch.undo()
        plain = kernel.NETWORKS["seq_fc"]
        patch.setitem(kernel.NETWORKS, "seq_fc", lambda depth, w_std, b_std: [
            ("dense", 1.0, 0.1) if layer[0] == "dense" else layer for layer in plain(depth, w_std, b_std)])
        refused()
        patch.undo()
        patch.setattr(train_protein, "engine", kernel.kernel_fn)
        refused(words="engine")
    for encoding in ("centred", "blosum", "onehot"):
        for seed in ("0", "1") if encoding == "centred" else ("0",):
            of = [*flags, "--encoding", encoding, "--seed", seed]
            assert abs(protein(tmp_path, *of, *kept)["test_rmse"] / protein(tmp_path, *of)["test_rmse"] - 1) < 1e-6
    about = [json.loads(path.read_text()) for path in sorted((tmp_path / "K").glob("*/train-nngp/manifest.json"))]
    assert [one["encoding"].split("-")[0] for one in about] == ["blosum", "centred", "centred", "onehot"]
    assert len({one["encoding"] for one in about}) == 4


def test_proteins_sizes_store_and_kinds(tmp_path):
    """With --sizes, --kind both and --store, every result equals that of a run alone, in memory, from the store or with
    --store none; and the sizes form a curve that results/report.py fits and draws."""
    flags = ["--encoding", "onehot", "--transform", "raw", "--kernel", "seq_fc", "--depth", "1", "--tile", "25", "--n_test",
             "100"]
    sizes = protein(tmp_path, *flags, "--sizes", "25,50,100", "--kind", "both", "--store", str(tmp_path / "K"))
    for kind, n, kept in (("nngp", 100, []), ("ntk", 100, ["--store", str(tmp_path / "K")]),
                          ("ntk", 50, ["--store", "none"])):
        alone = protein(tmp_path / "alone", *flags, "--n_train", str(n), "--kind", kind, *kept)
        assert alone["config"] == sizes[kind][n]["config"] and alone["ridge"] == sizes[kind][n]["ridge"]
        assert abs(alone["test_rmse"] - sizes[kind][n]["test_rmse"]) < 1e-5
    path = tmp_path / "curve.png"
    assert report.main(["--runs", str(tmp_path / "runs.jsonl"), "--dataset", "made", "--figure", str(path)]) == 0
    curve = report.curves(report.load(tmp_path / "runs.jsonl"), "made")
    assert [points[100] for points in curve.values()] == [[1 - sizes[kind][100]["test_spearman"]]
                                                          for kind in kernel.KINDS]


def test_proteins_variance(tmp_path):
    """Mean and variance equal those of a dense Gaussian process, and the calibration equals SciPy's formulas."""
    result = protein(tmp_path, "--n_train", "60", "--n_test", "30", "--encoding", "blosum", "--transform", "raw",
                     "--ridge", "0.1", "--kernel", "seq_fc", "--variance", "--tol", "1e-9")
    sequences, y, _, n_train = seqs.load("made")
    x = encode(sequences, "blosum", 60).astype(np.float64)
    rows = np.r_[:60, n_train:n_train + 30]
    K, z = fully_connected(x[rows], 3)[0], seqs.transform("raw", y[:60])[0](y[rows])
    noise = 0.1 * np.diag(K)[:60].mean()
    solved = np.linalg.solve(K[:60, :60] + noise * np.eye(60), K[:60])
    f, scale = solved[:, 60:].T @ z[:60], z[:60] @ np.linalg.solve(K[:60, :60] + noise * np.eye(60), z[:60]) / 60
    sd = np.sqrt(scale * (np.diag(K) + noise - (K[:60] * solved).sum(axis=0))[60:])
    assert abs(result["test_gaussian_nll"] + norm.logpdf(z[60:], f, sd).mean()) < 1e-3
    for p in (50, 90):
        low, high = norm.interval(p / 100, f, sd)
        assert abs(result[f"test_coverage_{p}"] - np.mean((low <= z[60:]) & (z[60:] <= high))) < 0.04
    assert abs(result["test_sd_spearman"] - spearmanr(sd, np.abs(f - z[60:])).statistic) < 0.01


@pytest.mark.parametrize("flags, words", [
    (["--split", "two_vs_rest"], "needs --data FOLDER, the folder that holds flip_gb1_splits.zip"),
    (["--split", "landscape", "--data", "nowhere"], "found none of nowhere.*; download one of them from https"),
    (["--n_train", "2000"], "n_train=2000: made allows 2 to 1037 rows"),
    (["--devices", "5"], "--devices 5, but JAX sees 4 here"),
    (["--n_test", "300"], "n_test=300: made allows 2 to 259 rows"),
    (["--n_train", "4", "--select", "validation"],
     "n_train=4 has 0 validation rows with 0 different targets, .* use --select loo"),
    (["--n_train", "4", "--select", "validation", "--encoding", "onehot", "--transform", "raw"],
     "n_train=4 has 0 validation rows with 0 different targets, .* use --select loo"),
    (["--head", "cos"], "head='cos', gamma=1.0: expected one of linear, cosine, relu, exp"),
])
def test_proteins_errors(flags, words, tmp_path):
    """An argument that does not fit is refused with one line."""
    with pytest.raises((ValueError, OSError), match=words) as error:
        protein(tmp_path, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, words", [
    (["--data", "x"], "--data changes nothing here: --split made needs no file"),
    (["--gamma", "2"], "--gamma changes nothing here: it belongs to --head exp"),
    (["--ridge", "1", "--encoding", "onehot", "--transform", "raw", "--select", "loo"], "--select changes nothing here")])
def test_proteins_flags_without_effect(flags, words, capsys):
    """A flag without effect is refused with one line that says why."""
    with pytest.raises(SystemExit):
        train_protein.parse(flags)
    assert words in capsys.readouterr().err


def test_proteins_commands(capsys, tmp_path, monkeypatch):
    """The commands of README and docstring are accepted, and flags that contradict each other are refused."""
    monkeypatch.chdir(tmp_path)
    for name in ("peptides.csv", "variants.csv", "new.csv", "variants.npz"):
        (tmp_path / name).touch()
    assert len(shown := commands("proteins.train", train_protein.__doc__)) > 3
    for command in shown:
        train_protein.parse(command)
    for flags, words in ((["--ridge", "often"], "--ridge often: expected a number"),
                         (["--ridge", "-1"], "numbers >= 0"), (["--kind", "ntk", "--variance"], "use --kind nngp"),
                         (["--tile", "0"], "at least 1"), (["--depth", "3,0"], "at least 1"),
                         (["--w_std", "0"], "--w_std 0: expected a number > 0"),
                         (["--w_std", "1,big"], "--w_std 1,big: expected a number > 0, or several"),
                         (["--kernel", "linear", "--b_std", "0"], "--b_std with --kernel linear"),
                         (["--kernel", "linear", "--dep=3"], "--depth with --kernel linear"),
                         (["--select", "gcv"], "use --select loo or validation"),
                         (["--select", "gcv", "--encoding", "onehot", "--transform", "raw", "--depth", "1,2"],
                          "use --select loo or validation"),
                         (["--n_train", "20", "--sizes", "10,50"], "expected 1 to n_train=20"),
                         (["--split", "sampled", "--sizes", "9"], "FLIP says which rows to train on")):
        with pytest.raises(SystemExit):
            train_protein.parse(flags)
        assert words in capsys.readouterr().err
