"""Sequences: their layers, data and experiment.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

import functools
import json
import os
import zipfile

from test_all import (  # isort: skip
    HERE, both_kinds, commands, fastest, reference, refitted, relative_error, time_it,
)
import jax
import numpy as np
import pytest
from scipy.stats import norm, spearmanr

import choose
import kernel
import tiles
from fast import fused, gpu
from proteins import layers as sequence_layers
from proteins import sequences as seqs
from proteins import train as train_protein
from results import report

GB1 = os.path.join(HERE, "..", "shared", "data", "protein")
PEPTIDES = ["M", "GIVEQCCTSICSLYQLENYCN", "NLYIQWLKDGGPSSGRPPPS"]  # one residue, insulin's A chain, Trp-cage
needs_gb1 = pytest.mark.skipif(not os.path.exists(GB1), reason="FLIP's GB1 is not beside the project")

# ----------------------------------------------------------------------------------------- kernel

def encode(sequences, encoding, n_train):
    """All sequences, by the encoding fitted on the first n_train, or on all."""
    return seqs.fit(sequences[:n_train or None], encoding, max(map(len, sequences)))(sequences)


every_sequence_network = pytest.mark.parametrize("name", sequence_layers.SEQUENCES)

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


@every_sequence_network
def test_kernel_of_sequences_is_neural_tangents(name):
    """K of sequences of one length is neural_tangents', to 1e-10 in float64 and 1e-5 in float32."""
    x1, x2 = np.random.default_rng(0).normal(size=(2, 3, 6, 4))
    options = {"depth": 1, "w_std": 1.3, "b_std": 0.4}
    fn = kernel.kernel_fn(name, kernel.KINDS, **options)
    for K, K32, expected in zip(fn(x1, x2), fn(x1.astype(np.float32), x2.astype(np.float32)),
                                reference(name, kernel.KINDS, x1, x2, **options)):
        assert relative_error(K, expected) < 1e-10 and relative_error(K32, expected) < 1e-5


@pytest.mark.parametrize("name, options", [("seq_cnn", {"depth": 1}), ("seq_cnn_gap", {"depth": 2, "b_std": 0.4})],
                         ids=str)
def test_kernel_of_peptides_is_neural_tangents(name, options):
    """Real sequences of different lengths, one residue among them, against neural_tangents' masks; its flatten
    divides by the length of the array, ours by the geometric mean of theirs."""
    x, lengths = encode(PEPTIDES, "blosum", 0).astype(np.float64), np.array([len(s) for s in PEPTIDES])
    means = x.shape[1] / np.sqrt(lengths[:, None] * lengths[None]) if name == "seq_cnn" else np.ones((1, 1))
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
        for K, expected in zip(kernel.kernel_fn(name, kernel.KINDS, **options)(x.astype(dtype)),
                               reference(name, kernel.KINDS, x, x[::-1].copy(), **options)):
            off = np.abs(np.asarray(K, np.float64) / (expected[:, ::-1] * means) - 1)
            assert off[~np.eye(3, dtype=bool)].max() < tolerance
            assert np.diag(off).max() < max(tolerance, 3e-8)  # neural_tangents' rounding of c = 1


@pytest.mark.parametrize("name, options", [(name, options) for name in sequence_layers.SEQUENCES for options in (
    {"depth": 1}, {"depth": 3, "w_std": 1.2, "b_std": 0.5})], ids=str)
def test_kernel_of_sequences_in_plain_loops(name, options):
    """Every pair of peptides is the recursion in loops over their own positions to 1e-10, so that padding changes
    nothing, bias or not; and K is positive definite."""
    x = encode(PEPTIDES, "blosum", 0).astype(np.float64)
    own, layers = [z[:len(s)] for z, s in zip(x, PEPTIDES)], kernel.network(name, **options)
    fn = kernel.kernel_fn(name, kernel.KINDS, **options)
    padded = fn(np.pad(x, ((0, 0), (0, 7), (0, 0))))
    for k, (K, K_padded) in enumerate(zip(fn(x), padded)):
        expected = np.array([[recursion(layers, a, b)[k] for b in own] for a in own])
        assert relative_error(K, expected) < 3e-8 and relative_error(K_padded, np.asarray(K)) < 1e-12
        assert relative_error(np.triu(K, 1)[0, 1:], expected[0, 1:]) < 1e-10
        assert np.linalg.eigvalsh(K)[0] > 1e-3 * np.trace(K) / 3


@pytest.mark.parametrize("name, tail", [("seq_fc", 0), ("seq_cnn", 0), ("seq_cnn_gap", 2)])
def test_fused_sequences(name, tail, monkeypatch):
    """Sequences of 1 to 21 residues with bias, several blocks of columns: kernel.py to 1e-5; also with a relu
    after the ending, which reads k(x, x)."""
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns
    x = encode(PEPTIDES * 4, "blosum", 0)
    x[3:] *= np.random.default_rng(0).uniform(0.5, 1, size=x[3:].shape).astype(np.float32)
    layers = [*kernel.network(name, depth=2, b_std=0.5), ("relu",), ("dense", 1.1, 0.3)]
    layers = layers[:len(layers) - 2 + tail]
    for fast, exact in zip(fused.kernel_fn(layers, kernel.KINDS)(x, x[1:]),
                           kernel.kernel_fn(layers, kernel.KINDS)(x.astype(float), x[1:].astype(float))):
        assert fast.dtype == np.float32 and relative_error(fast, np.asarray(exact)) < 1e-5
    with pytest.raises(ValueError, match="only images have mirror images"):
        fused.kernel_fn(name, "ntk", flips=True)


@pytest.mark.parametrize("name", ["seq_cnn", "seq_cnn_gap"])
def test_fused_sequences_symmetry_and_blocks(name, monkeypatch):
    """fused.py's fn(x) of sequences is symmetric to the last bit and fn(x, x) up to rounding, diagonal included, whatever the
    block of columns and however many rows."""
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns
    fn = fused.kernel_fn(name, "ntk")
    for n in (1, 19):
        x = np.random.default_rng(n).normal(size=(n, 8, 4)).astype(np.float32)
        K = np.asarray(fn(x))
        assert K.shape == (n, n) and K.dtype == np.float32 and np.array_equal(K, K.T)
    assert relative_error(K, np.asarray(fn(x, x))) < 1e-5
    assert relative_error(K, np.asarray(kernel.kernel_fn(name, "ntk")(x))) < 1e-5


def test_fused_sequences_on_a_gpu(monkeypatch):
    """gpu.py, run by Pallas' interpreter, on peptides: kernel.py to 1e-5 in float32 and 1e-12 in float64."""
    x, layers = encode(PEPTIDES, "blosum", 0).astype(float), kernel.network("seq_cnn", b_std=0.3, depth=2)
    exact, conv_relu = kernel.kernel_fn(layers, kernel.KINDS)(x, x[2:]), fused.conv_relu

    def in_prepare_only(source, target, first, *rest):
        assert first[0].shape[2] > 1  # gpu.py should have done a pair of different sequences
        return conv_relu(source, target, first, *rest)
    monkeypatch.setattr(fused, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "INTERPRET", True)
    monkeypatch.setitem(fused.SHEET, "cpu", 1)  # blocks of 8 columns
    monkeypatch.setattr(fused, "conv_relu", in_prepare_only)
    for dtype, tolerance in ((np.float32, 1e-5), (float, 1e-12)):
        for kinds in (kernel.KINDS, "nngp"):
            fast = fused.kernel_fn(layers, kinds)(x.astype(dtype), x[2:].astype(dtype))
            for K, K_exact in zip(fast if kinds == kernel.KINDS else [fast], exact):
                assert K.dtype == dtype and relative_error(K, np.asarray(K_exact)) < tolerance


@pytest.mark.parametrize("call, words", [
    (lambda: kernel.kernel_fn([("conv1d", 1.0, 0.0), ("gap",)], "ntk")(np.ones((2, 5, 1, 3))),
     r"sequences begins with \(\"mask\",\)"),
    (lambda: kernel.kernel_fn([("seq_gap",), ("dense", 1.0, 0.0)], "ntk")(np.ones((2, 5, 1, 3))), "sequences begins with"),
    (lambda: kernel.kernel_fn([("mask",), ("pool",), ("gap",)], "ntk"), r"\('pool',\).*sequences is \(\"mask\",\), then"),
    (lambda: kernel.kernel_fn([("mask",), ("conv1d", 1.0, 0.0), ("gap",)], "ntk"),
     r"\('gap',\).*\(\"seq_flatten\",\) or \(\"seq_gap\",\), and"),
    (lambda: kernel.kernel_fn([("mask",), ("dense", 1.0, 0.0), ("seq_gap",)], "ntk"), r"sequences is \(\"mask\",\), then"),
    (lambda: kernel.kernel_fn("seq_cnn", "ntk")(np.ones((3, 9))), r"\(3, 9\).*sequences \(n, length, channels\)"),
])
def test_kernel_of_sequences_errors(call, words):
    """What does not fit is refused in one sentence: what was got, what was expected."""
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- proteins

def protein(tmp_path, *flags):
    return train_protein.main([*flags, "--out", str(tmp_path), "--quiet"])


@needs_gb1
def test_proteins_gb1(capsys):
    """FLIP's files: rows fitted, held out and test as its README counts them, 4 of 265 residues vary, the wild
    type has fitness 1; the landscape's test rows are the same for every seed, its training rows in another order."""
    for split, counts in zip(seqs.FLIP, ((25, 28), (381, 424), (2691, 2990), (4580, 5089), (6289, 6988))):
        loaded = seqs.load(split, GB1, quiet=False)
        assert loaded[2:] == counts and len(loaded.sequences) == len(loaded.targets) == 8733
        vary = 3 if split == "one_vs_rest" else 4  # its 28 training rows vary at three of the four positions
        assert encode(loaded.sequences, "onehot", loaded.n_train).shape == (8733, vary, 20)
    wild = "MQYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE"
    assert [y for s, y in zip(*loaded[:2]) if s.startswith(wild)] == [1.0]
    first, second = (seqs.load("landscape", GB1, seed, quiet=False) for seed in (0, 1))
    assert capsys.readouterr().out == ""  # no note that these were other files than those of SHA256
    n = first.n_train
    assert (len(first.targets), n, first.n_fit) == (149361, 119489, 119489 - 119489 // 5)
    assert first.sequences[n:] == second.sequences[n:] and first.sequences[:9] != second.sequences[:9]
    assert sorted(first.sequences[:n]) == sorted(second.sequences[:n])


def test_proteins_made():
    """The made landscape is what it says: 1,296 sequences, variance 1, of which least squares on one-hot explains
    exactly the share of the main effects."""
    sequences, y = seqs._made()
    assert len(set(sequences)) == 6**4 and abs(y.mean()) < 1e-12 and abs(y.var() - 1) < 1e-12
    x = encode(sequences, "onehot", 0).reshape(1296, -1).astype(float)
    residual = y - x @ np.linalg.lstsq(x, y)[0]
    assert abs(1 - residual.var() - seqs.MADE_LINEAR) < 1e-12


def test_proteins_encodings():
    """onehot: inner products count equal residues. blosum: residues of length 1, cosines in the order of BLOSUM62,
    whose triangle is symmetric with the published sums; centred: mean 0 over training rows. Constant positions are
    left out, shorter sequences end in zeros."""
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
    """Each function of the target keeps the order, has mean 0 and variance 1 on the rows it was fitted on, and its
    inverse gives them back; ties stay ties; beyond the range it stays finite."""
    y = np.array([3.0, 0, 0, 1, 8, 0.5])
    forward, inverse = seqs.transform(name, y)
    z = forward(y)
    assert abs(z.mean()) < 1e-12 and abs(z.var() - 1) < 1e-12 and np.allclose(inverse(z), y, atol=1e-12)
    assert (np.argsort(z, kind="stable") == np.argsort(y, kind="stable")).all() and z[1] == z[2]
    assert np.isfinite(forward(np.array([-5.0, 100]))).all() and np.isfinite(inverse(np.array([-3.0, 3]))).all()


@pytest.mark.parametrize("text, words", [
    ("sequence,target,set\nMA,1,train\n", "has no column 'validation', but 'sequence', 'target', 'set'"),
    ("", "has no column 'sequence', but is empty"),
    ("sequence,target,set,validation\n", "has no row below its header"),
    ("sequence,target,set,validation\nM*,1,train,\nMXA,2,test,\n", "2 of 2 rows have .* '\\*' \\(1\\); 'X' .*no row is left"),
    ("sequence,target,set,validation\n,2,test,\n", "1 of 1 rows have a sequence with no letter .*no row is left"),
    ("sequence,target,set,validation\nMA,1.5,train,\nML,0,5,test,\n", "line 3: 5 fields, and 4 in the header"),
    ('sequence,target,set,validation\nMA,"1,5",train,\n', "line 2: target '1,5'; expected .* decimal point"),
    ("sequence,target,set,validation\nMA,inf,train,\n", "line 2: target 'inf'; expected a finite number"),
    ("sequence,target,set,validation\nMA,1,train,maybe\n", "line 2: validation 'maybe'; expected True or False"),
    ("sequence,target,set,set,validation\nMA,1,train,train,\n", "has 2 columns 'set'; expected one"),
    ("sequence,target,set,validation\nMA,?,train,\n", "line 2: target '\\?'; expected a finite number"),
    ("sequence,target,set,validation\nMA,nan,train,\n", "line 2: target 'nan'; expected a finite number"),
    ("sequence,target,set,validation\nMA\n", "line 2: 1 fields, and 4 in the header"),
    ("sequence,target,set,validation\nMA,1,valid,\n", "line 2: set 'valid'; expected train or test"),
    ("sequence,target,set,validation\nMA,1,train,\nML,1,test,\n", "lines 2 to 3: every target is 1"),
    ("sequence,target,set,validation\nMA,1,train,\nML,2,train,True\n", "1 rows to fit, 1 to validate and 0 to test"),
])
def test_proteins_bad_files(tmp_path, text, words):
    """What is wrong in a file is said in one sentence, with its line."""
    (tmp_path / "two_vs_rest.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        seqs.load("two_vs_rest", str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding, words", [
    ("utf-8-sig", None), ("utf-16", "zero bytes"), ("utf-16-le", "zero bytes"), ("latin-1", "not UTF-8")])
def test_proteins_encodings_of_text(tmp_path, encoding, words):
    """A table in UTF-8 is read, with a byte order mark too; any other encoding is refused by the name of the file."""
    table = "sequence,target,set,validation,\xe9tat\nMA,1,train,,\nML,2,test,,\n"
    (tmp_path / "two_vs_rest.csv").write_bytes(table.encode(encoding))
    if words is None:
        assert seqs.load("two_vs_rest", str(tmp_path)).sequences == ["MA", "ML"]
    else:
        with pytest.raises(ValueError, match=f"two_vs_rest.csv.* {words}"):
            seqs.load("two_vs_rest", str(tmp_path))


def test_proteins_tables_as_people_have_them(tmp_path, capsys):
    """Lower case is upper case, truth is written in any usual way, rows with other letters are left out and counted, and
    sequences that are trained on and tested are counted."""
    lines = ["ma,1,train,TRUE", "ML,2,train,0", "MW,3,TRAIN,1.0", "MX,4,train,", "M*,4,train,", "M-,4,test,", "MK,5,test,nO",
             "MR,6,train,False", "ML,2,test,"]
    (tmp_path / "two_vs_rest.csv").write_text("sequence,target,set,validation\n" + "\n".join(lines) + "\n\n")
    split = seqs.load("two_vs_rest", str(tmp_path), quiet=False)
    assert split.sequences == ["ML", "MR", "MA", "MW", "MK", "ML"] and split[2:] == (2, 4)
    said = capsys.readouterr().out
    assert "3 of 9 rows have a sequence with 'X' (1); '*' (1); '-' (1)" in said
    assert "1 sequences of two_vs_rest are training rows and test rows too, such as ML" in said


@pytest.mark.parametrize("encoding", seqs.ENCODINGS)
def test_proteins_encoding_is_fitted_on_training_rows(encoding):
    """A row is encoded alike whatever other rows are encoded with it; padding to a longer row keeps the kernel; a row that
    does not fit is one sentence."""
    train, new = ["MAGIW", "MLGIW", "MLGVW"], ["MCGVY", "AAAAA"]
    fitted = seqs.fit(train, encoding)
    assert (fitted(new + train)[:2] == fitted(new)).all() and (fitted(new)[1:] == fitted(new[1:])).all()
    assert fitted(new).shape == (2, 2, 20)
    with pytest.raises(ValueError, match="sequence 2 of 2 has 6 residues; expected 5, as the training rows have"):
        fitted(["MAGIW", "MAGIWW"])
    if encoding != "centred":
        K = [np.asarray(kernel.kernel_fn("seq_cnn", "ntk")(seqs.fit(PEPTIDES, encoding, longest)(PEPTIDES).astype(float)))
             for longest in (0, 30)]
        assert relative_error(*K) < 1e-10
        with pytest.raises(ValueError, match="sequence 1 of 1 has 40 residues; expected at most 21"):
            seqs.fit(PEPTIDES, encoding)(["A" * 40])


def test_proteins_several_lengths(tmp_path, monkeypatch):
    """Sequences of several lengths run with all defaults: auto compares the encodings that can take them."""
    rng = np.random.default_rng(0)
    peptides = ["".join(rng.choice(list(seqs.RESIDUES), size=rng.integers(5, 9))) for _ in range(60)]
    split = seqs.Split(peptides, np.array([p.count("A") + 0.1 * len(p) for p in peptides]), 40, 48)
    monkeypatch.setattr(seqs, "load", lambda *_: split)
    result = protein(tmp_path, "--kernel", "seq_fc")
    assert {row[0]["encoding"] for row in result["compared"]} == {"onehot", "blosum"} and result["cg_converged"]


@pytest.mark.parametrize("flags", [["--kernel", name, "--encoding", encoding] for name, encoding in zip(
    ("seq_fc", "seq_cnn", "linear"), ("centred", "onehot", "blosum"))], ids=str)
def test_proteins_sizes_equal_runs_alone(tmp_path, flags):
    """Each size of a row gives what it gives alone, whatever is fitted on its rows; stores too."""
    flags = [*flags, "--target", "log", "--n_test", "60", "--ridge", "0.1,1", "--tile", "16"]
    together = protein(tmp_path, *flags, "--sizes", "12,40", "--store", str(tmp_path / "K"))
    for n in (12, 40):
        alone = protein(tmp_path, *flags, "--n_train", str(n))
        assert {**together[n]["config"], "tile": 0} == {**alone["config"], "tile": 0}
        assert abs(together[n]["test_rmse"] / alone["test_rmse"] - 1) < 1e-5 and together[n]["ridge"] == alone["ridge"]
        again = protein(tmp_path, *flags, "--n_train", str(n), "--store", str(tmp_path / "K"))
        assert abs(again["test_rmse"] / alone["test_rmse"] - 1) < 1e-5


def test_proteins_files_elsewhere(tmp_path, capsys):
    """The same rows from an archive, from its folder unpacked, from a bare table; a sentence where there is none."""
    text = "sequence,target,set,validation\nMA,1,train,\nMW,3,test,\nML,2,train,True\n"
    with pytest.raises(FileNotFoundError, match="flip_gb1_splits.zip, .* is there; fetch it from https"):
        seqs.load("sampled", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "flip_gb1_splits.zip", "w") as file:
        file.writestr("splits/sampled.csv", text)
    found = [seqs.load("sampled", str(tmp_path))]
    with pytest.raises(ValueError, match="holds no splits/one_vs_rest.csv"):
        seqs.load("one_vs_rest", str(tmp_path))
    os.replace(tmp_path / "flip_gb1_splits.zip", tmp_path / "splits.zip")  # FLIP's own name for it
    found.append(seqs.load("sampled", str(tmp_path), quiet=False))
    assert "splits.zip is not the file that the figures in README.md were made from" in capsys.readouterr().out
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
    """With no flags, a landscape that is known: an interaction between neighbours that ridge regression cannot
    see, seq_cnn does; one line of runs.jsonl, and what to pass for the real thing."""
    result = train_protein.main(["--out", str(tmp_path), "--kernel", "seq_fc"])
    assert "--split two_vs_rest --data DIR" in capsys.readouterr().out
    assert result["test_spearman"] > 0.99 and result["test_rmse"] < 0.1 and result["cg_converged"]
    assert json.loads((tmp_path / "runs.jsonl").read_text()) == result
    assert len(result["compared"]) == len(seqs.ENCODINGS) * len(seqs.TARGETS)
    linear = protein(tmp_path, "--kernel", "linear", "--encoding", "onehot", "--target", "raw")
    assert abs(linear["test_rmse"]**2 - (1 - seqs.MADE_LINEAR)) < 0.1


@needs_gb1
@pytest.mark.parametrize("split, published", [("one_vs_rest", 0.28), ("two_vs_rest", 0.59), ("three_vs_rest", 0.76),
                                              ("low_vs_high", 0.34)])
def test_proteins_ridge_is_scikit_learn(tmp_path, split, published):
    """Ridge regression by this solver, with an intercept by centring, is scikit-learn's on one-hot, test rows'
    RMSE to 1e-4, and has the published Spearman's correlation to two digits: the check of data and metric."""
    from sklearn.linear_model import Ridge
    result = protein(tmp_path, "--split", split, "--data", GB1, "--kernel", "linear", "--encoding", "centred",
                     "--target", "raw", "--ridge", "1")
    sequences, y, _, n = seqs.load(split, GB1)
    x = encode(sequences, "onehot", n).reshape(len(y), -1).astype(np.float64)
    f = Ridge(alpha=1.0).fit(x[:n], y[:n]).predict(x[n:])
    assert round(result["test_spearman"], 2) == published == round(spearmanr(f, y[n:]).statistic, 2)
    assert abs(result["test_rmse"] - np.sqrt(np.mean((f - y[n:])**2))) < 1e-4


def test_proteins_is_a_dense_solve(tmp_path):
    """Choices and predictions are those of dense float64 formulas: with --select validation, validation rows are the
    last fifth of the training rows, functions of the target are fitted on the others, then all are fitted."""
    result = protein(tmp_path, "--n_train", "100", "--encoding", "onehot", "--ridge", "0.1,0.001", "--depth", "1",
                     "--kind", "ntk", "--tol", "1e-9", "--select", "validation")
    sequences, y, *_ = seqs.load("made")
    x, n_train = encode(sequences, "onehot", 100).astype(np.float64), seqs.load("made").n_train
    K = np.asarray(kernel.kernel_fn("seq_cnn", "ntk", depth=1)(x, x[:100]))

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
    """By n refits in float64: encoding, target, depth and b_std have the best Spearman correlation of leave-one-out
    predictions, each at the ridge with the least mse; of 40 rows where 20 may be compared, on every second one. Then
    the ridge is chosen in the same way on all rows."""
    monkeypatch.setattr(train_protein, "COMPARED", most)
    result = protein(tmp_path, "--n_train", "40", "--kernel", "seq_fc", "--depth", "1,2", "--b_std", "0,1", "--ridge",
                     "0.1,0.01")
    sequences, y, *_ = seqs.load("made")

    fn = functools.cache(lambda **network: kernel.kernel_fn("seq_fc", "nngp", **network))

    def best(depth, b_std, encoding, target, rows):
        x, y_rows = encode(sequences, encoding, 40)[rows].astype(np.float64), y[rows]
        K, z = np.asarray(fn(depth=depth, b_std=b_std)(x)), seqs.transform(target, y_rows)[0](y_rows)
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


def test_proteins_networks_are_compared(tmp_path):
    """Each flag of the network takes several values: the run is that with the chosen values alone, which are recorded;
    each has its row of the table; linear has no such flag."""
    flags = ["--n_train", "60", "--encoding", "onehot", "--target", "raw", "--kernel", "seq_cnn"]
    several = protein(tmp_path, *flags, "--w_std", "1,2", "--b_std", "0.5", "--head", "linear,exp", "--gamma", "1,2")
    assert [row[0] for row in several["compared"]] == [{"w_std": w_std, "head": head, "gamma": gamma} for w_std in (
        1.0, 2.0) for head, gamma in (("linear", None), ("exp", 1.0), ("exp", 2.0))]
    best = max(several["compared"], key=lambda row: row[2])
    assert best[0].items() <= several["config"].items() and best[2] > min(row[2] for row in several["compared"])
    alone = protein(tmp_path, *flags, "--b_std", "0.5",
                    *(f"--{flag}={value}" for flag, value in best[0].items() if value))
    assert alone["compared"] == [] and alone["config"] == several["config"] and alone["search"] == several["search"]
    assert alone["test_spearman"] == several["test_spearman"] and alone["loo_score"] == best[2]


@pytest.mark.parametrize("select", ["loo", "validation"])
def test_proteins_never_looks_at_test_rows(tmp_path, monkeypatch, select):
    """Other or permuted targets in the test rows change nothing but the test results: the same encoding, target, depth,
    w_std and ridge."""
    flags = ["--n_train", "60", "--kernel", "seq_fc", "--depth", "1,2", "--w_std", "1,2", "--b_std", "1", "--select",
             select, "--ridge", "1,0.1,0.01"]
    first, load = protein(tmp_path, *flags), seqs.load
    for change in (np.negative, np.random.default_rng(0).permutation):
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
    """Without --select: leave-one-out up to choose.DENSE rows, beyond them validation; a set of 4 rows is solved, and one
    of FLIP's form that names no validation rows; GCV chooses a ridge where there is nothing else to choose."""
    one = ["--kernel", "seq_fc", "--encoding", "onehot", "--target", "raw"]
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


def test_proteins_stores_know_their_network(tmp_path):
    """A store never serves tiles of another network: another w_std, b_std or head is refused in one sentence."""
    flags = ["--n_train", "20", "--encoding", "onehot", "--target", "raw", "--kernel", "seq_fc", "--ridge", "0.1",
             "--store", str(tmp_path / "K")]
    protein(tmp_path, *flags)
    for other in ("--w_std=1", "--b_std=1", "--head=relu"):
        with pytest.raises(ValueError, match="train-nngp holds another matrix: layers is .* Give this run a store"):
            protein(tmp_path, *flags, other)
    assert protein(tmp_path, *flags)["cg_converged"]


def test_proteins_sizes_store_and_kinds(tmp_path):
    """A size is its own run, on blocks of one kernel; tiles that are kept, or none, or both kinds in one pass give
    the same; and the sizes are a curve that scaling.py fits and draws."""
    flags = ["--encoding", "onehot", "--target", "raw", "--kernel", "seq_fc", "--tile", "32", "--n_test", "120"]
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
    """Mean and variance are those of a dense Gaussian process, and calibration is its formulas'."""
    result = protein(tmp_path, "--n_train", "60", "--n_test", "30", "--encoding", "blosum", "--target", "raw",
                     "--ridge", "0.1", "--kernel", "seq_fc", "--variance", "--tol", "1e-9")
    sequences, y, _, n_train = seqs.load("made")
    x = encode(sequences, "blosum", 60).astype(np.float64)
    rows = np.r_[:60, n_train:n_train + 30]
    K, z = np.asarray(kernel.kernel_fn("seq_fc", "nngp")(x[rows])), seqs.transform("raw", y[:60])[0](y[rows])
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
    (["--split", "landscape", "--data", "nowhere"], "nowhere.*is there; fetch it from https"),
    (["--n_train", "2000"], "n_train=2000, but made has 2 to 1037 rows"),
    (["--devices", "5"], "--devices 5, but JAX sees 4 here"),
    (["--n_test", "300"], "n_test=300, but made has 2 to 259 rows"),
    (["--n_train", "4", "--select", "validation"],
     "n_train=4 has 0 validation rows with 0 different targets: .* use --select loo"),
    (["--n_train", "4", "--select", "validation", "--encoding", "onehot", "--target", "raw"],
     "n_train=4 has 0 validation rows with 0 different targets: .* use --select loo"),
    (["--head", "cos"], "head='cos', gamma=1.0: expected one of linear, cosine, relu, exp"),
    (["--w_std", "0"], "w_std=0.0, b_std=0.0: expected w_std > 0"),
])
def test_proteins_errors(flags, words, tmp_path):
    """What does not fit is one sentence."""
    with pytest.raises((ValueError, OSError), match=words) as error:
        protein(tmp_path, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, words", [
    (["--data", "x"], "--data changes nothing here: the sequences of --split made are made here"),
    (["--gamma", "2"], "--gamma changes nothing here: it belongs to --head exp"),
    (["--ridge", "1", "--encoding", "onehot", "--target", "raw", "--select", "loo"], "--select changes nothing here")])
def test_proteins_flags_without_effect(flags, words, capsys):
    """A flag that changes nothing in a run is an error of one line that says why."""
    with pytest.raises(SystemExit):
        train_protein.parse(flags)
    assert words in capsys.readouterr().err


def test_proteins_commands(capsys):
    """The commands of README and docstring are understood, and what contradicts is refused at once."""
    assert len(shown := commands("proteins.train", train_protein.__doc__)) > 3
    for command in shown:
        train_protein.parse(command)
    for flags, words in ((["--ridge", "often"], "--ridge often: expected a number"),
                         (["--ridge", "-1"], "numbers >= 0"), (["--kind", "ntk", "--variance"], "use --kind nngp"),
                         (["--tile", "0"], "at least 1"), (["--depth", "3,0"], "at least 1"),
                         (["--w_std", "1,big"], "--w_std 1,big: expected a number, or several"),
                         (["--kernel", "linear", "--b_std", "0"], "--b_std with --kernel linear"),
                         (["--kernel", "linear", "--dep=3"], "--depth with --kernel linear"),
                         (["--select", "gcv"], "use --select loo or validation"),
                         (["--select", "gcv", "--encoding", "onehot", "--target", "raw", "--depth", "1,2"],
                          "use --select loo or validation"),
                         (["--n_train", "20", "--sizes", "10,50"], "expected 1 to n_train=20"),
                         (["--split", "sampled", "--sizes", "9"], "FLIP says which rows to train on")):
        with pytest.raises(SystemExit):
            train_protein.parse(flags)
        assert words in capsys.readouterr().err


# -------------------------------------------------------------------------------------- benchmark

@every_sequence_network
@both_kinds
@pytest.mark.parametrize("length, engine", [(length, engine) for length in (4, 56)
                                            for engine in ("fused", "neural_tangents")])
def test_benchmark_sequences(benchmark, name, kind, length, engine):
    """Seconds for a block of n x n entries of two different sets of sequences of 20 letters, float32: the positions
    of GB1 that vary, and all of its domain; devices as above."""
    if benchmark.disabled and (length, kind) != (4, "nngp"):
        pytest.skip("one length shows that it runs; --benchmark-only times both")
    benchmark.group = f"{name} {kind}, {length} residues"
    sizes = {("seq_fc", 4): (1024, 2048), ("seq_fc", 56): (512, 1024, 2048), ("seq_cnn", 4): (256, 512),
             ("seq_cnn", 56): (64, 128), ("seq_cnn_gap", 4): (128, 256), ("seq_cnn_gap", 56): (16, 32)}[name, length]
    n = 3 if benchmark.disabled else sizes if engine == "neural_tangents" else 1024 if length == 56 else \
        2048 if name == "seq_fc" else 4096
    fn = {"fused": fused.kernel_fn, "neural_tangents": kernel.reference_fn}[engine](name, kind)

    def call(n):
        x1, x2 = np.eye(20, dtype=np.float32)[np.random.default_rng(0).integers(0, 20, (2, n, length))]
        if engine == "fused" and name != "seq_fc":
            devices = jax.local_devices()[:os.cpu_count()]
            return lambda: tiles.cross(fn, x1, x2, -(-n // 2), devices, quiet=True)
        return lambda: fn(x1, x2).block_until_ready()
    if isinstance(n, tuple):
        n = fastest(call, n)
    benchmark.extra_info["n"] = n
    K = time_it(benchmark, call(n), "entries", n * n)
    K = K.dense() if isinstance(K, tiles.TiledMatrix) else K
    assert K.shape == (n, n) and K.dtype == np.float32 and np.isfinite(K).all()
