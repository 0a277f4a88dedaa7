"""CIFAR-5m, tiles on disk, products on the fly, several processes, plans, the rank of the preconditioner.

Each test states its claim in its first line. test_all.py sets up JAX, so it is imported first.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from collections import Counter
from dataclasses import replace

from test_all import (  # isort: skip
    commands,
    Dense, HERE, digits, flip, flipped, labels_of_a_file, refused, rows_to_fit_on, run_small, script, inputs, linear,
    relative_error, spectrum, threads, train,
)
import jax
import numpy as np
import pytest

import augment
import choose
import data
import experiment
import kernel
import pcg
import regression
import tiles
import train_cifar
from large import blocks, cifar5m, container, on_device, on_the_fly, one_pass, plan, processes, rank, rates, simulate, store
from results import tables

KILLS = int(os.environ.get("KILLS", 3))  # kills in each test that kills a run; 20 take two minutes

# ---------------------------------------------------------------------------------------- cifar5m

@pytest.fixture
def cifar5m_folder(tmp_path, monkeypatch):
    """Six parts in the format of CIFAR-5m, every second one compressed; pixel (0, 0) holds the label and the part."""
    monkeypatch.setattr(cifar5m, "BLOCK", 32)
    rng = np.random.default_rng(0)
    for part in range(6):
        X, Y = rng.integers(0, 256, (500, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 500)
        X[:, 0, 0, 0], X[:, 0, 0, 1] = Y, part
        (np.savez if part % 2 else np.savez_compressed)(tmp_path / f"part{part}.npz", X=X, Y=Y)
    return tmp_path


def test_cifar5m(cifar5m_folder):
    """Parts 0-4 are for training, part 5 for testing; images keep their labels; subsets are balanced, nested and mix parts."""
    x, y, x_test, y_test = data.load("cifar5m", cifar5m_folder)
    assert len(x) == 2500 and len(x_test) == 500
    assert (x[:, 0, 0, 0] == y).all() and (x_test[:, 0, 0, 0] == y_test).all()
    assert set(x[:, 0, 0, 1]) == {0, 1, 2, 3, 4} and set(x_test[:, 0, 0, 1]) == {5}
    assert len(np.unique(x.reshape(2500, -1), axis=0)) == 2500
    few, labels, few_test, _ = data.load("cifar5m", cifar5m_folder, n_train=300, n_test=50)
    assert (few == x[:300]).all() and np.bincount(labels).tolist() == [30] * 10
    assert len(set(few[:, 0, 0, 1])) > 1 and (few_test == x_test[:50]).all()


def test_cifar5m_is_streamed(tmp_path):
    """100 rows are read from parts of 25 MB with less than 15 MB of memory."""
    X = np.zeros((8192, 32, 32, 3), np.uint8)
    for part in range(6):
        np.savez(tmp_path / f"part{part}.npz", X=X, Y=np.arange(8192) % 10)
    del X
    tracemalloc.start()
    data.load("cifar5m", tmp_path, n_train=100, n_test=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6 < 25e6


@pytest.mark.parametrize("damage, words", [
    (lambda p: p.unlink(), "part2.npz is not there"),
    (lambda p: p.write_bytes(p.read_bytes()[:5000]), "part2.npz is truncated or not an .npz"),
    (lambda p: np.savez(p, X=np.ones((5, 32, 32, 3))), "holds X.npy; expected X, Y"),
    (lambda p: np.savez(p, X=np.ones((0, 32, 32, 3), np.uint8), Y=np.zeros(0, int)), "part2.npz holds no images"),
    (lambda p: np.savez(p, X=np.ones((500, 32, 32, 3)), Y=np.arange(500) % 10), "float64.*expected uint8"),
    (lambda p: np.savez(p, X=np.ones((500, 32, 32, 3), np.uint8), Y=np.full(500, 77)), "label 77"),
    (lambda p: np.savez(p, X=np.ones((90, 32, 32, 3), np.uint8), Y=np.arange(500) % 10), "part2"),
])
def test_cifar5m_damaged(cifar5m_folder, damage, words):
    """The error names a part that is missing or truncated or has wrong keys, dtype, labels or length."""
    damage(cifar5m_folder / "part2.npz")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        data.load("cifar5m", cifar5m_folder)


def test_cifar5m_any_byte_damaged(tmp_path, monkeypatch):
    """Whichever byte of a part is wrong, its images are read, or the error names the part."""
    monkeypatch.setattr(cifar5m, "BLOCK", 2)
    for part in range(6):
        np.savez(tmp_path / f"part{part}.npz", X=np.zeros((2, 32, 32, 3), np.uint8), Y=np.array([1, 2]))
    for byte in flipped(tmp_path / "part1.npz", 7):
        try:
            assert data.load("cifar5m", tmp_path)[0].shape == (10, 32, 32, 3), byte
        except ValueError as error:
            assert "part1.npz" in str(error), byte


def test_cifar5m_labels(cifar5m_folder):
    """Labels may be a column or one-hot rows; anything else is refused with the name of the file."""
    part, y = cifar5m_folder / "part5.npz", np.arange(90) % 10
    X = np.zeros((90, 32, 32, 3), np.uint8)
    X[:, 0, 0, 0] = np.arange(90)

    def load():
        x, labels = data.load("cifar5m", cifar5m_folder)[2:]
        return labels[np.argsort(x[:, 0, 0, 0])]
    labels_of_a_file(lambda labels: np.savez(part, X=X, Y=labels), load, y)


def test_cifar5m_rows_to_fit_on(cifar5m_folder):
    """n_fit adds training rows, the same that a larger n_train would add, as many as the data set has."""
    rows_to_fit_on("cifar5m", cifar5m_folder, 2500)


# ----------------------------------------------------------------------------------------- blocks

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a Gaussian kernel of 240 digits in the layout of the published one, 12 blocks of 20 images; K; labels."""
    x, y = digits(240)
    K = np.exp(-((x[:, None] - x) ** 2).sum(axis=(2, 3, 4)) / 200).astype(np.float32)
    folder = tmp_path_factory.mktemp("blocks")
    for i in range(12):
        for j in range(i, 12):
            with open(folder / f"ntk-{i}-{j}", "wb") as file:
                np.save(file, K[20 * i:20 * i + 20, 20 * j:20 * j + 20])
    with open(folder / "labels", "wb") as file:
        np.save(file, data.one_hot(y).astype(np.float32))
    return folder, K.astype(np.float64), y


@pytest.fixture
def ours(published, tmp_path):
    """A copy of the published folder, to damage."""
    return pathlib.Path(shutil.copytree(published[0], tmp_path / "blocks"))


def solve_blocks(folder, out, *flags):
    return blocks.main([str(folder), "--kind", "ntk", "--out", str(out), "--quiet", *map(str, flags)])


@pytest.mark.parametrize("n", [200, 90])
def test_blocks_are_the_matrix(published, n):
    """K and K_test of all training images, and of fewer, are the dense matrices; their products agree to 1e-12."""
    folder, dense, _ = published
    K, K_test = blocks.read(folder, "ntk", n)
    assert (K.dense() == dense[:n, :n]).all() and (K_test.dense() == dense[200:, :n]).all()
    v = np.random.default_rng(0).normal(size=(n, 3))
    np.testing.assert_allclose(K.matvec(v), dense[:n, :n] @ v, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(K_test.matvec(v), dense[200:, :n] @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flags, n", [(["--select", "validation"], 200), (["--n_train", 90], 90)])
def test_blocks_solve(published, tmp_path, capsys, flags, n):
    """The ridge is the one that the dense regressions choose, by validation on the last fifth and by leave-one-out; the errors
    on the test images are those of a dense solve; the record can be read by results/tables.py."""
    folder, dense, y = published
    result = solve_blocks(folder, tmp_path, "--ridge", "1,0.1,0.01,0.001", *flags)
    targets, K, scale = data.one_hot(y), dense[:n, :n], np.diag(dense)[:n].mean()

    def predict(rows, fit, ridge):
        return dense[rows, :fit] @ np.linalg.solve(K[:fit, :fit] + ridge * scale * np.eye(fit), targets[:fit])

    def error(ridge):
        if n == 200:
            return np.mean((predict(slice(160, 200), 160, ridge) - targets[160:200]) ** 2)
        inverse = np.linalg.inv(K + ridge * scale * np.eye(n))
        return np.mean((inverse @ targets[:n] / np.diag(inverse)[:, None]) ** 2)
    best = min([1, 0.1, 0.01, 0.001], key=error)
    f = predict(slice(200, 240), n, best)
    assert result["ridge"] == best and result["select"] == ("validation" if n == 200 else "loo")
    assert result["test_mse"] == pytest.approx(np.mean((f - targets[200:]) ** 2), rel=1e-5)
    assert result["test_accuracy"] == np.mean(f.argmax(axis=1) == y[200:]) > 0.5
    assert "guessing" not in capsys.readouterr().out
    (run,), = tables.load(tmp_path / "runs.jsonl")
    assert run["config"]["n_train"] == n and run["config"]["n_test"] == 40 and run["entries_computed"] == 0


def test_blocks_need_only_their_own(published, tmp_path):
    """20 training images need four files: the first block, its two test blocks and the labels."""
    for name in ("ntk-0-0", "ntk-0-10", "ntk-0-11", "labels"):
        shutil.copy(published[0] / name, tmp_path)
    K, K_test = blocks.read(tmp_path, "ntk", 20)
    assert K.shape == (20, 20) and K_test.shape == (40, 20)
    with pytest.raises(FileNotFoundError, match="4 of the 7 blocks for n_train=21 are not there, the first is .*ntk-0-1: "):
        blocks.read(tmp_path, "ntk", 21)


def test_blocks_labels(ours, tmp_path, capsys):
    """Whole numbers and one-hot rows give what rows of -0.1 and 0.9 give; labels in another order are noticed, and a file with
    too few, with probabilities or with NaN is refused."""
    y, wanted = np.load(ours / "labels").argmax(axis=1), blocks.labels_of(ours / "labels", 200, 40)
    for n, labels in enumerate((y, np.eye(10)[y], 2 * np.eye(10)[y] - 1)):
        np.save(tmp_path / f"{n}.npy", labels)
        for found, want in zip(blocks.labels_of(tmp_path / f"{n}.npy", 200, 40), wanted):
            assert found.dtype == np.int64 and (found == want).all()
    np.save(tmp_path / "shuffled.npy", np.random.default_rng(0).permutation(y))
    solve_blocks(ours, tmp_path, "--labels", tmp_path / "shuffled.npy", "--ridge", 0.1)
    assert re.search("note: .* no better than guessing: the labels of .*shuffled.npy", capsys.readouterr().out)
    np.save(tmp_path / "few.npy", y[:200])
    with pytest.raises(ValueError, match="few.npy has 200 labels; expected 240, of 200 training and then 40 test images"):
        blocks.labels_of(tmp_path / "few.npy", 200, 40)
    np.save(tmp_path / "soft.npy", np.random.default_rng(0).dirichlet(np.ones(10), 240))
    np.save(tmp_path / "nan.npy", np.full((240, 10), np.nan))
    for name in ("soft.npy", "nan.npy"):
        with pytest.raises(ValueError, match=f"{name} holds labels float64 .* expected whole numbers"):
            blocks.labels_of(tmp_path / name, 200, 40)


def changed(change):
    """Applies a change to the array in a file."""
    def damage(path):
        array = change(np.load(path))
        with open(path, "wb") as file:
            np.save(file, array)
    return damage


@pytest.mark.parametrize("name, damage, words", [
    ("ntk-0-0", os.remove, "ntk-0-0 is not there; fetch it from gs://"),
    ("ntk-3-7", os.remove, "1 of the 75 blocks for n_train=200 are not there, the first is .*ntk-3-7"),
    ("ntk-3-7", lambda p: p.write_bytes(p.read_bytes()[:-1]), "ntk-3-7 is not a complete .npy array"),
    ("ntk-3-7", lambda p: p.write_bytes(b""), "ntk-3-7 is not a complete .npy array"),
    ("ntk-3-7", changed(lambda K: np.array([{}])), "ntk-3-7 is not a complete .npy array without pickle"),
    ("ntk-3-7", changed(lambda K: K[:19]), r"ntk-3-7 holds float32 \(19, 20\); expected .* \(20, 20\), as the first block"),
    ("ntk-0-0", changed(lambda K: K[0]), r"ntk-0-0 holds float32 \(20,\); expected floating-point numbers \(n, n\)"),
    ("ntk-0-0", changed(lambda K: K[0, 0]), r"ntk-0-0 holds float32 \(\); expected floating-point numbers \(n, n\)"),
    ("ntk-3-10", changed(lambda K: K.astype(int)), "ntk-3-10 holds int64 .* expected floating-point"),
    ("ntk-3-7", changed(lambda K: np.where(K == K.max(), np.nan, K)), "ntk-3-7 has 1 entries that are not finite"),
    ("ntk-5-11", changed(lambda K: K / 0), "ntk-5-11 has 400 entries that are not finite"),
    ("ntk-3-3", changed(np.triu), "ntk-3-3 is not symmetric"),
    ("labels", os.remove, "labels is not there; fetch it from gs://.* --labels"),
])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_blocks_damaged(ours, tmp_path, name, damage, words):
    """One sentence names a file that is missing, truncated, pickled, not finite, not symmetric, of another shape or
    dtype."""
    damage(ours / name)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        solve_blocks(ours, tmp_path, "--ridge", 0.1)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ store

def stored(folder, x, x_test=None, **about):
    """K of x, or of x_test and x, in tiles of 16 stored in a folder."""
    seen = map(store.digests, [x] if x_test is None else [x_test, x])
    kept = store.create(str(folder), {"kernel": "linear", "tile": 16, **about}, *seen)
    return (tiles.gram(linear, x, 16, store=kept) if x_test is None else
            tiles.cross(linear, x_test, x, 16, store=kept))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*-*.npy")}


def test_store_is_memory(tmp_path, capsys):
    """Every method gives the same result from disk as from memory, to the last bit; a second run computes no tile; the report
    counts the tiles."""
    x, x_test, v = inputs(83), inputs(200)[90:121], np.random.default_rng(1).normal(size=(83, 3))
    for again in (False, True):
        for K, kept in ((tiles.gram(linear, x, 16), stored(tmp_path / "train", x)),
                        (tiles.cross(linear, x_test, x, 16), stored(tmp_path / "test", x, x_test))):
            assert (kept.dense() == K.dense()).all() and (kept.matvec(v) == K.matvec(v)).all()
            assert (kept.columns([80, 0, 17]) == K.columns([80, 0, 17])).all()
            assert kept.entries == K.entries and kept.found == again * K.entries
    assert (stored(tmp_path / "train", x).leading(40).matvec(v[:40])
            == tiles.gram(linear, x, 16).leading(40).matvec(v[:40])).all()
    out = subprocess.run([sys.executable, "-m", "large.store", tmp_path], cwd=HERE, capture_output=True, text=True)
    assert out.returncode == 0 and "83 x 83, 21 of 21 tiles" in out.stdout
    assert "31 x 83, 12 of 12 tiles" in out.stdout and out.stdout.count("every tile is intact") == 2
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "manifest.json").write_text('{"name": "of a web page"}')
    assert store.report(str(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "page/manifest.json is damaged or belongs to another program" in said and said.count("every tile is intact") == 2


def test_store_past_the_page_cache(tmp_path, monkeypatch):
    """If the tiles exceed half of the free memory, as many as fit in it, evenly spread, are read through the page cache, the
    others past it: all are the same to the last bit, and damage is detected too. A leading block that fits in that half is
    read through the cache."""
    K, flags, opened = stored(tmp_path, inputs(83)), {}, os.open
    whole = K.dense()

    def spied(path, flag, *rest, **options):
        flags[os.path.basename(path)] = bool(flag & os.O_DIRECT)
        return opened(path, flag, *rest, **options)
    monkeypatch.setattr(tiles, "free_memory", lambda: 10_000)
    monkeypatch.setattr(tiles, "check_memory", lambda *_: None)
    direct = stored(tmp_path, inputs(83))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", spied)
        assert not K.tiles.direct and direct.tiles.direct and (direct.dense() == whole).all()
    past = [flags[f"{i}-{j}.npy"] for i, j in direct.keys()]
    size = sum(direct.tiles[key].nbytes for key in direct.keys())
    assert past.count(False) == len(past) * 5000 // size == 6 and not any(not (a or b) for a, b in zip(past, past[1:]))
    for n, past_cache in ((48, True), (32, False)):  # six and three tiles of 1,024 bytes
        block = direct.leading(n)
        assert block.tiles.direct == past_cache and (block.dense() == whole[:n, :n]).all()
    assert direct.tiles.direct
    flip(tmp_path / "1-3.npy")
    assert stored(tmp_path, inputs(83)).found == K.entries - 256


def test_store_grows(tmp_path):
    """A run with more inputs reuses every whole tile, a run with fewer inputs all tiles, and the matrix is right."""
    for n, found in ((40, 0), (83, 3 * 256), (20, None), (83, None), (96, 15 * 256)):  # entries; None: all
        K = stored(tmp_path, inputs(n))
        assert (K.dense() == tiles.gram(linear, inputs(n), 16).dense()).all()
        assert K.found == (K.entries if found is None else found)


@pytest.mark.parametrize("change, words", [
    (dict(kernel="fc"), "kernel is 'linear' there, 'fc' here"),
    (dict(tile=8), "tile is 16 there, 8 here"),
    (dict(depth=3), "depth is None there, 3 here"),
    (dict(x=inputs(50) + (np.arange(50) == 7)[:, None].astype(np.float32)), "1 of the 40 rows.* number 7"),
    (dict(x=inputs(30)[::-1]), "30 of the 30 rows"),
    (dict(x_test=inputs(40)), "one of the two is symmetric"),
    (dict(manifest='{"format": 2}'), "format 2, and this program reads 1"),
    (dict(manifest='{"form'), "damaged.*[Rr]emove"),
    (dict(manifest=None), "has tiles but no manifest.json.*Remove"),
    (dict(rows=b""), "rows.npy is missing or damaged.*remove"),
])
def test_store_refuses(tmp_path, change, words):
    """A store of another kernel, tile side or inputs is refused, unchanged, with a message that says what differs."""
    stored(tmp_path, inputs(40))
    before = contents(tmp_path)
    if "manifest" in change:
        os.remove(tmp_path / "manifest.json")
        if text := change.pop("manifest"):
            (tmp_path / "manifest.json").write_text(text)
    if "rows" in change:
        (tmp_path / "rows.npy").write_bytes(change.pop("rows"))
    with pytest.raises(ValueError, match=words):
        stored(tmp_path, **{"x": inputs(40), **change})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage, words", [
    (flip, "has checksum [0-9a-f]{8}, not"),
    (lambda path: path.write_bytes(path.read_bytes()[:-5]), "has 1147 bytes, not 1152"),
    (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "has 1153 bytes, not 1152"),
    (os.remove, "is missing"),
])
def test_store_finds_damage(tmp_path, capsys, damage, words):
    """A tile that has a flipped bit, is too short, too long or missing is named by the report and never used in a product; the
    next run computes only this tile again."""
    K, before = stored(tmp_path, inputs(83)), contents(tmp_path)
    damage(tmp_path / "1-3.npy")
    with pytest.raises(ValueError, match=f"1-3.npy {words}"):
        K.matvec(np.ones((83, 1)))
    assert store.report(str(tmp_path)) == 1 and re.search(f"1-3.npy {words}", capsys.readouterr().out)
    if damage is os.remove:  # the command ends with what report returns
        assert subprocess.run([sys.executable, "-m", "large.store", tmp_path], cwd=HERE, capture_output=True).returncode == 1
    K = stored(tmp_path, inputs(83))
    assert re.search(f"1-3.npy {words}.*computed again", capsys.readouterr().out)
    assert K.entries - K.found == 256 and contents(tmp_path) == before
    assert store.report(str(tmp_path)) == 0


def test_store_written_twice(tmp_path):
    """If two journals list the same tile, the line written last counts, whichever process wrote it."""
    x = inputs(83)
    stored(tmp_path, x)
    os.rename(tmp_path / "tiles-0.txt", tmp_path / "tiles-7.txt")  # as if process 7 had written all tiles
    kept = store.Store(str(tmp_path))
    kept[1, 3] = np.full((16, 16), 5, np.float32)
    again = store.Store(str(tmp_path))
    assert store.report(str(tmp_path)) == 0 and (again[1, 3] == 5).all() and len(again.lines) == 21


def test_store_journal_may_be_torn(tmp_path):
    """If a crash leaves only a part of the journal's last line, or nothing of it, only that tile is computed again."""
    stored(tmp_path, inputs(83))
    journal, before = (tmp_path / "tiles-0.txt").read_bytes(), contents(tmp_path)
    last = len(journal) - journal.rindex(b"\n")
    key = tuple(map(int, journal[-last:].split()[:2]))
    for cut in (1, 8, last - 1, last):
        (tmp_path / "tiles-0.txt").write_bytes(journal[:-cut])
        K = stored(tmp_path, inputs(83))
        assert K.entries - K.found == np.prod(K.tiles.lines[key][:2])
        assert contents(tmp_path) == before and len(store.Store(str(tmp_path)).lines) == 21


WRITER = """
import sys, numpy as np
from large import store
kept = store.create(sys.argv[1], {"tile": 64}, np.arange(600, dtype="<u8"))
for t in range(100):
    key = t % 10, t // 10
    if key not in kept.intact({key: (64, 64)}):
        kept[key] = np.random.default_rng(t).standard_normal((64, 64), np.float32)
"""

def test_store_survives_kills(tmp_path, monkeypatch):
    """A run that is killed at random moments and started again each time ends with the tiles of a run that was not killed, to
    the last bit, and the report finds no damage after any kill."""
    whole, killed, rng, left = tmp_path / "whole", tmp_path / "killed", np.random.default_rng(0), [0]

    def finish(folder):
        monkeypatch.setattr(sys, "argv", ["", str(folder)])
        exec(WRITER, {})
    finish(whole)
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", WRITER, killed], cwd=HERE)
        until = left[-1] + rng.integers(1, 2 + 90 // KILLS)
        while len([*killed.glob("*-*.npy")]) < until and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.002))
        process.kill()
        process.wait()
        assert store.report(str(killed)) == 0
        left.append(len(contents(killed)))
    assert len({*left} - {0, 100}) > KILLS // 2  # most kills came while it wrote
    finish(killed)
    assert contents(killed) == contents(whole) and len(contents(whole)) == 100


def test_store_holds_a_few_tiles_in_memory(tmp_path):
    """A product with a matrix of 36 tiles (9 MB) holds at most one tile per thread in memory."""
    x = np.random.default_rng(0).normal(size=(2048, 3)).astype(np.float32)
    kept = store.create(str(tmp_path), {"tile": 256}, store.digests(x))
    K = tiles.gram(linear, x, 256, store=kept)
    tracemalloc.start()
    K.matvec(np.ones((2048, 2)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (os.cpu_count() + 2) * (256 * 256 * 4 + 256 * 256 * 8 * 2) < 36 * 256 * 256 * 4


DRIVER = """
import gc, os, sys
import jax.numpy as jnp, numpy as np, tiles
from large import store
x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)

def run():
    try:
        kept = store.create("disk/K", {"tile": 32}, store.digests(x))
        K = tiles.gram(lambda a, b: jnp.matmul(a, b.T), x, 32, store=kept, quiet=True)
        print(f"found {K.found} of {K.entries}, sum {K.matvec(np.ones((300, 1))).sum():.6f}")
    except OSError as error:
        print(error)

for command in ("mount -t tmpfs -o size=100k tmpfs disk", "mount -o remount,ro disk", "mount -o remount,rw,size=9m disk",
                "mount -o remount,ro disk"):
    gc.collect()  # a disk cannot be made read-only while the last run's journal is open
    assert os.system(command) == 0
    run()
    store.report("disk")
"""

def test_store_on_a_full_and_on_a_read_only_disk(tmp_path):
    """On a full disk, and then on a read-only one, a run ends with an OSError of one line; finished tiles are kept and intact.
    Once there is space, the same run gives the right result. A finished store can be read without permission to write."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system does not allow mounting a small disk (unshare -rm)")
    (tmp_path / "disk").mkdir()
    out = subprocess.run(["unshare", "-rm", sys.executable, "-c", DRIVER], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": HERE})
    assert out.returncode == 0, out.stderr
    kept = "could not be written: {}. {} and run the same command again; what is finished in a --store is kept".format
    full, read_only, first, second = (out.stdout.splitlines()[k] for k in (0, 3, 6, 9))
    assert full.endswith(kept("No space left on device", "Free some space"))
    assert read_only.endswith(kept("Read-only file system", "Make the folder writable"))
    assert out.stdout.count("every tile is intact") == 4 and len(out.stdout.splitlines()) == 12
    first, second = (re.fullmatch(r"found (\d+) of (\d+), sum (.*)", line).groups() for line in (first, second))
    assert 0 < int(first[0]) < int(first[1]) == int(second[0]) and first[2] == second[2]


def test_tiles_merged(tmp_path):
    """merged() changes the tiles but no entry, for any n, also of a leading block and of a store."""
    for n, side in ((37, 12), (40, 10), (9, 100), (64, 8)):
        x, x_test = inputs(n), inputs(200)[150:167]
        for K in (tiles.gram(linear, x, 3, quiet=True), tiles.cross(linear, x_test, x, 3, quiet=True),
                  tiles.gram(linear, x, 3, quiet=True).leading(n - 2)):
            large = K.merged(side)
            assert large.sides[0] > 3 and (large.dense() == K.dense()).all() and large.entries >= K.entries
            assert (large.rows(1, 6) == K.dense()[1:6]).all() or K.symmetric
    kept = stored(tmp_path, inputs(40))
    assert isinstance(kept.merged(32).tiles, dict) and (kept.merged(32).dense() == kept.dense()).all()
    assert kept.merged(16) is kept



# ------------------------------------------------------------------------------------------- on the fly

@pytest.mark.parametrize("devices, on_host", [(1, True), (3, True), (3, False)])
def test_on_the_fly_is_kept(devices, on_host, monkeypatch):
    """A matrix computed on the fly has the same methods and results as one in memory, for any n, whether the devices multiply
    or the host does."""
    monkeypatch.setattr(on_the_fly, "on_host", lambda: on_host)
    for n in (1, 37):
        x, x_test = inputs(n), inputs(200)[50:61]
        v = np.random.default_rng(1).normal(size=(n, 3))
        where = dict(tile=16, devices=jax.local_devices()[:devices], quiet=True)
        for K, kept in ((on_the_fly.matrix(linear, x, **where), tiles.gram(linear, x, **where)),
                        (on_the_fly.matrix(linear, x_test, x, **where), tiles.cross(linear, x_test, x, **where))):
            assert K.shape == kept.shape and K.entries == kept.entries
            assert np.allclose(K.matvec(v), kept.matvec(v), rtol=1e-5, atol=1e-5)
            indices = np.array([n - 1, 0])
            assert np.allclose(K.columns(indices), kept.columns(indices), rtol=1e-5, atol=1e-5)
            if not kept.symmetric:
                assert np.allclose(K.rows(3, 9), kept.rows(3, 9), rtol=1e-5, atol=1e-5)
                assert np.allclose(kept.rows(3, 9), linear(x_test, x)[3:9], rtol=1e-5, atol=1e-5)
                half = -(-n // 2)
                assert np.allclose(K.leading(half).matvec(v[:half]), kept.rows(0, 11)[:, :half] @ v[:half],
                                   rtol=1e-5, atol=1e-5)
        K, kept, k = on_the_fly.matrix(linear, x, **where), tiles.gram(linear, x, **where), -(-n // 2)
        assert np.allclose(K.diagonal(), kept.diagonal(), rtol=1e-5, atol=1e-5)
        assert np.allclose(K.leading(k).matvec(v[:k]), kept.leading(k).matvec(v[:k]), rtol=1e-5, atol=1e-5)
        product = K.matvec(np.eye(n))
        assert np.allclose(product, product.T, rtol=1e-14)  # CG needs it
        if devices == 1:  # and four processes that sum have it all
            for several in threads(4, lambda team: on_the_fly.matrix(linear, x, **where, team=team).matvec(v)):
                assert np.allclose(several, K.matvec(v), rtol=1e-12, atol=1e-12)



@pytest.mark.parametrize("room", [0, 3000, 10**9])
def test_on_device_is_kept(room, monkeypatch):
    """A matrix whose tiles lie on devices, as many as they have room for, and the others on the host, is the one in memory:
    products, also of leading blocks and of two kernels in one pass, to the rounding of float64; columns bit by bit."""
    monkeypatch.setattr(on_device, "STRIP", 7)
    x, v = inputs(69), np.random.default_rng(1).normal(size=(69, 3))
    where = dict(tile=16, devices=jax.local_devices()[:3], quiet=True)
    kept = tiles.gram(linear, x, **where)
    K, (both, other) = (on_device.gram(fn, x, **where, kinds=kinds, room=room)
                        for fn, kinds in ((linear, None), (lambda a, b: (linear(a, b), linear(a, b) ** 2), 2)))
    there = {device: 0 for device in where["devices"]}
    for tile in dict.values(K.tiles):
        for device in tile.devices() if isinstance(tile, jax.Array) else ():
            there[device] += tile.nbytes
    whole = sum(tile.nbytes for tile in K.tiles.values())
    placed = sum(there.values())
    assert max(there.values()) <= room and (placed == whole if room > whole else placed >= 2 * room)
    for n in (69, 40, 16, 5):
        for one, tol in ((K, 1e-12), (both, 1e-12)):
            got, want = one.leading(n).matvec(v[:n]), kept.leading(n).matvec(v[:n])
            assert np.allclose(got, want, rtol=0, atol=tol * np.abs(want).max())
    assert np.allclose(other.matvec(v), (kept.dense() ** 2).astype(np.float64) @ v, rtol=1e-5, atol=1e-4)
    assert (K.columns([68, 3]) == kept.columns([68, 3])).all() and (K.diagonal() == kept.diagonal()).all()
    assert K.merged() is K and (K.dense() == kept.dense()).all()
    monkeypatch.setattr(tiles, "free_memory", lambda: 10**4)
    if room > whole:  # the host need not have room for what the devices keep
        assert np.allclose(on_device.gram(linear, x, **where, room=room).matvec(v), kept.matvec(v), rtol=1e-12)
    if not room:
        with pytest.raises(MemoryError, match="what the devices have no room for of the 69 x 69 kernel needs"):
            on_device.gram(linear, x, **where, room=room)
    place = on_device.Tiles(where["devices"], 100)
    place[0, 0] = np.full((2, 2), 1 / 3)
    assert isinstance(dict.__getitem__(place, (0, 0)), jax.Array) and (place[0, 0] == np.full((2, 2), 1 / 3)).all()


def test_on_device_run(tmp_path, monkeypatch):
    """Where the backend is no CPU, a run keeps K on its devices, and its answer is that of a run in the host's memory. Without
    the room large/ it runs in the host's memory."""
    flags = ["--n_train", "100", "--n_test", "50", "--tile", "32", "--ridge", "0.1", "--kind", "both", "--depth", "1",
             "--whiten", "none", "--devices", "2"]
    alone, used, gram = train(tmp_path, *flags), [], on_device.gram
    monkeypatch.setattr(on_device, "gram", lambda *args, **options: used.append(1) or gram(*args, **options, room=9000))
    monkeypatch.setattr(experiment, "on_gpu", lambda: True)
    there = train(tmp_path, *flags)
    assert used and all(abs(there[kind]["test_mse"] / alone[kind]["test_mse"] - 1) < 1e-6 for kind in kernel.KINDS)
    find_spec = experiment.importlib.util.find_spec
    monkeypatch.setattr(experiment.importlib.util, "find_spec",  # the room is not there
                        lambda name, *more: None if name == "large" else find_spec(name, *more))
    assert train(tmp_path, *flags)["nngp"]["test_mse"] == alone["nngp"]["test_mse"] and len(used) == 1


def test_on_the_fly_says_where_nan_is():
    """If the inputs of a matrix computed on the fly contain NaN, every method raises an error that says so."""
    x = np.ones((4, 3), np.float32)
    x[2, 1] = np.nan
    bad = on_the_fly.matrix(kernel.kernel_fn("fc", "nngp"), x, quiet=True)
    for wrong in (lambda: bad.columns([2]), lambda: bad.rows(2, 3), lambda: bad.matvec(np.eye(4))):
        with pytest.raises(ValueError, match="from the kernel's tiles are not finite: look for NaN"):
            wrong()
    with pytest.raises(ValueError, match="not finite: look for NaN"):
        bad.diagonal()



# -------------------------------------------------------------------------------------------- pcg

def failing(number):
    """data.replacing where writing fails with this errno."""
    @contextlib.contextmanager
    def replacing(path):
        with data.said(path):
            raise OSError(number, os.strerror(number))
        yield
    return replacing


def test_train_checkpoints_of_one_kernel():
    """Whatever changes K or the solve names another checkpoint, so that none is used for another kernel."""
    def path(*flags):
        args = train_cifar.parse(["--store", "K", "--ridge", "1", *flags])
        args.whiten, args.zca_eps, args.depth, args.w_std, args.b_std, args.head, args.gamma, args.fitted_on = (
            args.whiten[0], args.zca_eps[0], args.depth[0], args.w_std[0], args.b_std[0], args.head[0], args.gamma[0], "0")
        return train_cifar.checkpoint(args, tiles.ALONE, args.kind, 9, [], 1.0, args.tol, np.ones((9, 2))).path
    paths = [path(), path(), *(path(*flags.split()) for flags in (
        "--depth 2", "--w_std 1.1", "--b_std 0.5", "--head cosine", "--kernel cnn_vec", "--kind ntk", "--engine plain",
        "--flips", "--whiten channel", "--zca_eps 3", "--components 5", "--seed 1", "--tol 1e-3", "--rank 9"))]
    assert paths[0] == paths[1] and len(set(paths)) == len(paths) - 1


def test_pcg_checkpoint(tmp_path, capsys, monkeypatch):
    """A checkpoint returns the state that was saved, but only for the same solve. It is not written at every step, nor in a
    store that may only be read. A damaged one, whichever byte is wrong, is reported and not used. Once removed, nothing
    is left of it, nor of what killed runs were writing."""
    path, about = str(tmp_path / "solve" / "a.npz"), {"ridge": 0.1, "rows": 5}
    kept = store.Checkpoint(path, about, tiles.ALONE)
    assert kept.load() is None
    for step in range(100):
        kept.save({"x": np.full(3, step)}, False)
    assert store.Checkpoint(path, about, tiles.ALONE).load()["x"][0] < 99
    kept.save({"x": np.full(3, 7.5), "history": [1.0]}, True)
    state = store.Checkpoint(path, about, tiles.ALONE).load()
    assert set(state) == {"x", "history"} and (state["x"] == 7.5).all()
    assert store.Checkpoint(path, {**about, "ridge": 1.0}, tiles.ALONE).load() is None
    flip(tmp_path / "solve" / "a.npz")
    assert kept.load() is None and "damaged: this solve starts anew" in capsys.readouterr().out
    flip(tmp_path / "solve" / "a.npz")
    for one in flipped(tmp_path / "solve" / "a.npz"):
        state = kept.load()
        assert state is None or set(state) == {"x", "history"}, one
    capsys.readouterr()
    with monkeypatch.context() as patch:  # a store that may only be read; a full disk is no such store
        patch.setattr(data, "replacing", failing(errno.EACCES))
        kept.save({"x": np.zeros(3)}, True)
        kept.save({"x": np.zeros(3)}, True)
        assert capsys.readouterr().out == f"{tmp_path}/solve may not be written: the state of solves is not kept\n"
        store.DENIED.clear()
        patch.setattr(data, "replacing", failing(errno.ENOSPC))
        with pytest.raises(OSError, match="Free some space"):
            store.Checkpoint(path, about, tiles.ALONE).save({"x": np.zeros(3)}, True)
    (tmp_path / "solve" / "a.npz.12ab34cd.tmp").write_bytes(b"half")
    kept.remove()
    assert not (tmp_path / "solve").exists()



# ----------------------------------------------------------------------------------- precondition

@pytest.mark.parametrize("source, ridge", [("power", 1e-6), ("power", 1e-2), ("digits", 1e-4)])
def test_precondition_rank_is_worth_it(source, ridge):
    """The cost of the rank that Worth chooses, computed with the steps really taken, is at most 20 % above that of the best of
    six ranks; a more expensive product leads to a larger rank."""
    n = 600
    K = spectrum(n, 1e4) if source == "power" else np.asarray(
        kernel.kernel_fn("fc", "nngp")(digits(n)[0]), np.float64)
    y, product = np.random.default_rng(0).normal(size=(n, 10)), 2 * n * n * 10
    ridge *= np.diag(K).mean()
    worth = rank.Worth(n, [(ridge, 1e-6)], product)
    chosen = pcg.low_rank(Dense(K), None, worth=worth, size=16)

    def cost(low):
        k = low.F.shape[1]
        steps = pcg.solve(Dense(K).matvec, y, ridge, low(ridge), max_iters=3000)[1].iterations
        return steps * (product + 4 * n * k * 10) + 3 * n * k**2 + k**3
    best = min(cost(pcg.low_rank(Dense(K), k)) for k in (20, 40, 80, 120, 160, 240))
    assert 16 < chosen.rank < n // 2 and cost(chosen) < 1.2 * best
    dearer = rank.Worth(n, [(ridge, 1e-6)], 10 * product)
    assert pcg.low_rank(Dense(K), None, worth=dearer, size=16).rank > chosen.rank



# ----------------------------------------------------------------------------------------- search

@pytest.mark.parametrize("name", regression.PRECONDITIONERS)
def test_search_all_ridges_in_one_pass(name, monkeypatch):
    """All ridges solved in one pass give what each gives alone and what a dense solve gives, to 1e-6, with fewer products.
    Columns that are done drop out. The errors by validation, also three ridges at a time, are those of dense solves."""
    x, labels = digits(120)
    K, y = tiles.gram(kernel.kernel_fn("fc", "nngp"), x, tile=40, quiet=True), data.one_hot(labels)
    A, ridges, widths = K.dense().astype(np.float64), [10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3], []

    class Counted(tiles.TiledMatrix):
        def matvec(self, v):
            widths.append(v.shape[1])
            return super().matvec(v)
    K = Counted(*(getattr(K, field) for field in K.__dataclass_fields__))
    solver = one_pass.Solver(K, name, rank=24, max_iters=10000)
    alone = [solver(y, ridge, 1e-12)[0] for ridge in ridges]
    solver.begin(2 * y, ridges[:1], 1e-12)  # of other targets: not what is asked for
    assert (solver(y, ridges[0], 1e-12)[0] == alone[0]).all()
    passes, widths[:] = len(widths), []
    together = [one[0] for one in solver.each(y, ridges, 1e-12)]
    assert len(widths) < 0.8 * passes and widths[0] == 40 and min(widths) < 10
    for ridge, *found in zip(ridges, alone, together):
        want = np.linalg.solve(A + ridge * np.diag(A).mean() * np.eye(120), y)
        assert all(relative_error(one, want) < 1e-6 for one in found)
    monkeypatch.setattr(choose, "SEARCH", 1e-12)
    whole = choose.validation(solver, y, ridges, 96, np.arange(96, 120))
    monkeypatch.setattr(one_pass, "PASS", 3 * 80 * 96 * 10)
    runs = choose.validation(solver, y, ridges, 96, np.arange(96, 120))
    assert [row.ridge for row in whole] == [row.ridge for row in runs] == ridges
    for row in whole + runs:
        want = np.linalg.solve(A[:96, :96] + row.ridge * np.diag(A)[:96].mean() * np.eye(96), y[:96])
        assert abs(row.mse / np.mean((A[96:, :96] @ want - y[96:]) ** 2) - 1) < 1e-6


def test_search_is_the_same_in_all_processes():
    """If a pass over K is expensive for one process of a team, whose memory holds fewer tiles, all of them search as for an
    expensive one: otherwise they would wait for different sums."""
    for others, here, dear in ((0, False, False), (1, False, True), (0, True, True)):
        team = tiles.Team(0, 2, lambda array, others=others: array + others)
        K = types.SimpleNamespace(slowness=2, tiles=types.SimpleNamespace(direct=here), team=team)
        assert one_pass._dear(K, 10) is dear


@pytest.mark.parametrize("select", ["validation", "gcv"])
def test_search_walks_from_the_first_rows(select, monkeypatch):
    """Of a large K only a few ridges are compared, and the choice is that of comparing all; also where the best of the first
    rows is far off. Where a product costs more than its columns, the solve goes on beside the search, and the answer is the
    same as alone, to 1e-6; K is then read at most 1.5 times as often as for that solve alone."""
    x, labels = digits(300)
    K, y, widths = tiles.gram(kernel.kernel_fn("fc", "nngp"), x, tile=64, quiet=True), data.one_hot(labels), []
    y = y + np.random.default_rng(0).normal(scale=0.4, size=y.shape)  # so that the best ridge is none of the least

    class Slow(tiles.TiledMatrix):
        slowness = 9

        def matvec(self, v):
            widths.append(v.shape[1])
            return super().matvec(v)
    slow = Slow(*(getattr(K, field) for field in K.__dataclass_fields__))
    options = dict(held_out=(240, np.arange(240, 300)), name="lowrank", rank=60, tol=1e-9)
    all_of_them = regression.choose_ridge(K, y, choose.RIDGES, select, **options)
    monkeypatch.setattr(one_pass, "LARGE", 200)
    for matrix, guess in ((K, None), (slow, None), (K, 10.0), (K, 0.01)):
        widths.clear()
        with monkeypatch.context() as patch:
            if guess:
                patch.setattr(one_pass, "first_guess", lambda *_: guess)
            ridge, solver, found = regression.choose_ridge(matrix, y, choose.RIDGES, select, **options)
        assert ridge == all_of_them[0] and len(found["search"]) < (15 if guess else 6)
        rows = {row[0]: row[2] for row in all_of_them[2]["search"]}
        assert all(abs(row[2] / rows[row[0]] - 1) < 0.01 for row in found["search"])
        alpha, want = solver(y, ridge, 1e-9)[0], regression.Solver(slow, "lowrank", 60)(y, ridge, 1e-9)
        assert np.abs(alpha - want[0]).max() < 1e-6 * np.abs(alpha).max()
        if matrix is slow and select == "validation":
            assert max(widths) == 60 and len(widths) - want[1].products <= 1.5 * want[1].products


# ------------------------------------------------------------------------------------------ train

@pytest.mark.parametrize("part", ["train", "test"])
def test_train_store_refuses_before_it_computes(tmp_path, part):
    """If the store of K or of K_test holds another matrix, the run is refused before it computes a tile of either."""
    flags = ["--n_train", "60", "--ridge", "1", "--devices", "1", "--store", str(tmp_path / "K")]
    train(tmp_path, *flags, "--n_test", "30")
    for name in os.listdir(tmp_path / "K"):
        if not name.startswith(part):
            shutil.rmtree(tmp_path / "K" / name)
    with pytest.raises(ValueError, match=f"{part}-nngp holds another matrix|{part}-nngp was made from other inputs"):
        train(tmp_path, *flags, "--n_test", "30", "--seed", "1", "--depth", "2")
    assert not [path for path in (tmp_path / "K").rglob("*-*.npy") if not path.parent.name.startswith(part)]


def test_train_store(tmp_path):
    """A store does not change the results; a second run computes no entry; a larger n_train uses the tiles of the smaller one;
    --kind both uses the tiles of a run with one kind; another network or whitening is refused."""
    flags = ["--n_test", "50", "--ridge", "1e-2,1e-3", "--tile", "20", "--depth", "1", "--fit_on", "1000", "--devices",
             "2", "--rank", "9"]  # given, because the chosen rank depends on the cost of a product, which differs on a disk
    keep = ["--store", str(tmp_path / "K")]
    for n, computed in ((60, 60 * 80 // 2 + 60 * 50), (60, 0), (100, 100 * 120 // 2 - 2400 + 2000)):
        result = train(tmp_path, "--n_train", str(n), *flags, *keep)
        assert result["entries_computed"] == computed
        assert result["test_mse"] == train(tmp_path, "--n_train", str(n), *flags)["test_mse"]
    both = train(tmp_path, "--n_train", "100", *flags, *keep, "--kind", "both")
    assert both["nngp"]["test_mse"] == result["test_mse"]
    assert not (tmp_path / "K" / "solve-nngp").exists()  # deleted once the result is recorded
    derived = train(tmp_path, "--n_train", "100", *flags[:4], *flags[6:], *keep)  # takes the tile side of the store
    assert derived["entries_computed"] == 0 and derived["config"]["tile"] == 20
    for more, words in ((["--depth", "2"], "layers is .* there"), (["--b_std", "1"], "layers is .* there"),
                        (["--fit_on", "900"], "fitted_on is .* there"), (["--flips"], "fitted_on is|flips is None there"),
                        (["--whiten", "channel"], "whiten is 'zca' there, 'channel' here")):
        with pytest.raises(ValueError, match="holds another matrix: .*" + words):
            train(tmp_path, "--n_train", "60", *flags, *keep, *more)
    with pytest.raises(ValueError, match="holds another matrix: .*fitted_on is"):
        train(tmp_path, "--n_train", "60", "--seed", "1", "--whiten", "none", "--n_test", "50", "--ridge", "1", "--store",
              str(tmp_path / "L"))
        train(tmp_path, "--n_train", "60", "--seed", "2", "--whiten", "none", "--n_test", "50", "--ridge", "1", "--store",
              str(tmp_path / "L"))


def test_train_sizes(tmp_path):
    """--sizes gives, from leading blocks of one kernel, the same ridge, result and configuration for each size as a run of
    that size alone."""
    flags = ["--n_test", "50", "--ridge", "1,0.1", "--flips", "--tile", "20", "--depth", "1", "--tol", "1e-9",
             "--devices", "2"]  # whitening compiles for each device and shape
    whole = train(tmp_path, *flags, "--sizes", "80,20,50")
    assert list(whole) == [20, 50, 80] and [whole[n]["rows"] for n in whole] == [20, 50, 80]
    for n in (20, 50, 80):
        alone = train(tmp_path, *flags, "--n_train", str(n))
        assert abs(whole[n]["test_mse"] / alone["test_mse"] - 1) < 1e-6 and whole[n]["ridge"] == alone["ridge"]
        assert whole[n]["config"]["n_train"] == n and whole[n]["entries"] == alone["entries"] == (
            alone["entries_computed"])
        assert whole[n]["config"] == alone["config"] and alone["config"]["fit_on"] == 1437
        assert whole[n]["entries_computed"] == (alone["entries"] if n == 80 else 0)
    both = train(tmp_path, *flags, "--n_train", "80", "--sizes", "50", "--kind", "both", "--whiten", "none",
                 "--store", str(tmp_path / "K"))
    unwhitened = train(tmp_path, *flags, "--n_train", "50", "--whiten", "none", "--kind", "ntk")
    assert abs(both["ntk"][50]["test_mse"] / unwhitened["test_mse"] - 1) < 1e-5
    assert both["ntk"][50]["ridge"] == unwhitened["ridge"] and set(both["nngp"]) == {50, 80}
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3 + 3 + 4 + 1


def test_train_flips_from_a_store(tmp_path):
    """With a store, --flips symmetric gives the results of --flips explicit to 1e-5, with fewer than half of the entries."""
    flags = ["--n_train", "60", "--n_test", "50", "--kernel", "cnn_vec", "--depth", "2", "--ridge", "0.1", "--tol", "1e-9",
             "--devices", "2"]
    half, whole = (train(tmp_path, *flags, "--store", str(tmp_path / flips), "--flips", flips)
                   for flips in ("symmetric", "explicit"))
    assert half["ridge"] == whole["ridge"] and abs(half["test_mse"] / whole["test_mse"] - 1) < 1e-5
    assert half["test_accuracy"] == whole["test_accuracy"] and whole["rows"] == 2 * half["rows"]
    assert half["entries"] < 0.45 * whole["entries"]


def test_train_evidence_on_the_fly(tmp_path):
    """With --store none, --variance gives calibration and --plot a figure too; neither changes the result."""
    flags = ["--n_train", "128", "--n_test", "64", "--tile", "64", "--ridge", "1e-2", "--depth", "1", "--devices", "1",
             "--store", "none"]
    more = train(tmp_path, *flags, "--variance", "--plot", str(tmp_path / "p.png"))
    assert abs(more["test_mse"] / train(tmp_path, *flags)["test_mse"] - 1) < 1e-6
    assert 0 < more["test_nll"] < np.log(10) and 0 < more["test_ece"] < 0.3
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_train_errors(tmp_path, monkeypatch):
    """A store that is a file, and one flag of three, are refused with one line."""
    monkeypatch.chdir(HERE)
    with pytest.raises(OSError, match="the store README.md.* cannot be made: (File exists|Not a directory)") as error:
        train(tmp_path, "--store", "README.md")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--coordinator h:1 .*give all three: HOST:PORT of process 0") as error:
        train(tmp_path, "--coordinator", "h:1")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The digits as images of one's own: processes that read this file need not import scikit-learn, their longest work."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, **dict(zip(("x_train", "y_train", "x_test", "y_test"), data.load("digits"))))
    return str(path)


def test_train_survives_kills(tmp_path, pictures):
    """A run that is killed at random moments, while it computes tiles and while it solves, and started again each time, ends
    with the tiles of a run that was not killed, to the last bit, and with the same result."""
    def flags(name):
        return ["--dataset", pictures, "--n_train", "700", "--tile", "40", "--store", str(tmp_path / name), "--ridge",
                "1e-8,1e-7", "--precondition", "none", "--max_iters", "4000"]
    whole = train(tmp_path, *flags("whole"))
    rng, folder, ended = np.random.default_rng(0), tmp_path / "killed", []
    for kill in range(KILLS):
        begun, parts = time.time(), "train-nngp/tiles-0.txt" if kill < KILLS // 2 else "solve-nngp/*.npz"
        process = script(tmp_path, *flags("killed"), "--quiet")
        while process.poll() is None and not any(path.stat().st_mtime > begun for path in folder.glob(parts)):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        ended.append(process.poll())
        process.kill()
        process.communicate()
        assert store.report(str(folder)) == 0
    assert ended.count(None) > KILLS // 2, ended  # the others were faster
    killed = train(tmp_path, *flags("killed"))
    for part in ("train-nngp", "test-nngp"):
        assert contents(folder / part) == contents(tmp_path / "whole" / part)
    assert killed["entries_computed"] == 0 < whole["entries_computed"]
    assert abs(killed["test_mse"] / whole["test_mse"] - 1) < 1e-6



# ------------------------------------------------------------------------------------------ processes

def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


LAUNCHERS = {  # the variables that each sets for process i of n; mpirun's include those of the step in which it runs
    "flags": lambda port, n, i: {},
    "srun": lambda port, n, i: dict(SLURM_JOB_ID=port, SLURM_STEP_NODELIST="localhost", SLURM_NTASKS=n, SLURM_PROCID=i,
                                    SLURM_STEP_NUM_TASKS=n, SLURM_LOCALID=0, SLURM_STEP_NUM_NODES=n),
    "mpirun": lambda port, n, i: dict(LAUNCHERS["srun"](port, 1, 0), OMPI_COMM_WORLD_SIZE=n, OMPI_COMM_WORLD_RANK=i,
                                      OMPI_COMM_WORLD_LOCAL_RANK=i, OMPI_COMM_WORLD_LOCAL_SIZE=n,
                                      OMPI_MCA_orte_hnp_uri=f"{port << 12}.0;tcp://127.0.0.1:1")}
SMALL = ["--n_train", "203", "--n_test", "101", "--tile", "32", "--depth", "1", "--whiten", "channel", "--ridge", "1e-3,1e-2"]


def team(count, *flags, launcher="flags", last=(), **proxies):
    """Starts train_cifar.py as `count` processes on one machine, with sizes that the tile side does not divide."""
    common = [*SMALL, "--quiet", *map(str, flags)]
    port, running = free_port(), []
    for index in range(count):
        where = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process", str(index)]
        where = where if launcher == "flags" else []
        variables = LAUNCHERS[launcher](port, count, index)
        env = {**os.environ, **proxies, "XLA_FLAGS": "", **{name: str(value) for name, value in variables.items()}}
        running.append(subprocess.Popen(
            [sys.executable, os.path.join(HERE, "train_cifar.py"), *common, *where,
             *(last if index == count - 1 else ())], env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return running


def one_process(tmp_path, *flags):
    """What a single process records of this run, compiled as several are: rounding in K moves the test mse by 1e-7."""
    running, = team(1, *flags, "--out", tmp_path / "alone")
    assert running.communicate(timeout=300) and running.returncode == 0
    return json.loads((tmp_path / "alone" / "runs.jsonl").read_text())


@pytest.mark.parametrize("devices, launcher, where", [(2, "srun", "K"), (1, "mpirun", "none")])
def test_processes_one_answer(tmp_path, pictures, devices, launcher, where):
    """Two processes, started without flags with the variables of Slurm or Open MPI, with tiles on disk or on the fly, give
    the result of one process to 1e-7 and record one line; each process has written its share of the tiles, and a log of its
    phases. One process that goes on with this store computes none. (More: the next test, and four on the fly above.)"""
    same = ["--dataset", pictures, "--tol", "1e-9", "--tile", "32" if where == "K" else "64"]
    flags = [*same, "--store", tmp_path / "K" if where == "K" else where, "--out", tmp_path, "--devices", devices]
    done = [(process.communicate(timeout=300), process.returncode)
            for process in team(2, *flags, launcher=launcher)]
    assert [code for _, code in done] == [0, 0], done
    assert [out.count("test accuracy") for (out, _), _ in done] == [1, 0]
    together, = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    alone = one_process(tmp_path, *same, *(["--store", "none"] if where == "none" else []))
    assert together["processes"] == 2 and together["devices"] == devices
    assert together["test_accuracy"] == alone["test_accuracy"] and together["ridge"] == alone["ridge"]
    assert abs(together["test_mse"] / alone["test_mse"] - 1) < 1e-7
    if where == "K":
        for index in range(2):
            log = (tmp_path / "K" / f"log-{index}.txt").read_text().splitlines()
            assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line) for line in log)
            said = re.findall(r"(data|kernel|solve) (begins|ends, [\d.]+ s)$|(\d+) of (14) tiles", "\n".join(log), re.M)
            assert [phase for phase, *_ in said if phase] == ["data", "data", "kernel", "kernel", "solve", "solve"]
            assert [done for *_, done, _ in said if done] == ["0", "14"] * 2  # of K and of K_test
        shares = [len((tmp_path / "K" / "train-nngp" / f"tiles-{i}.txt").read_text().split("\n")) - 1
                  for i in range(2)]
        assert shares == [14, 14] and store.report(str(tmp_path / "K")) == 0
        again = train(tmp_path, *SMALL, *same, "--store", str(tmp_path / "K"))
        assert again["entries_computed"] == 0 and abs(again["test_mse"] / alone["test_mse"] - 1) < 1e-7


def test_processes_run_survives_kills(tmp_path, pictures):
    """If one process is killed in the middle of a solve, the others end within a minute with one sentence. Started again in
    another number, they continue from the finished tiles and the state of the solve, and reach the result of one process. A
    proxy in the environment does not matter."""
    same = ["--dataset", pictures, "--precondition", "none", "--ridge", "1e-9", "--tol", "1e-9", "--max_iters", "3000"]
    flags = [*same, "--store", tmp_path / "K", "--out", tmp_path, "--devices", 1]
    solving = tmp_path / "K" / "solve-nngp"
    for kill in range(max(1, KILLS // 3)):
        running = team(2 + kill % 2, *flags)
        begun = time.time()
        while not any(path.stat().st_mtime > begun for path in solving.glob("*.npz")):
            assert all(process.poll() is None for process in running), running[0].communicate()
            time.sleep(0.01)
        running.pop(kill % 2 - 1).kill()
        start = time.monotonic()
        for process in running:
            refused(process, r"^ConnectionError: process \d of \d: another process is gone. Start all of them again")
        assert time.monotonic() - start < 60
    path, = solving.glob("*.npz")
    state = dict(np.load(path))
    state["history"][0] = 7  # a mark, to see that the solve goes on from here
    np.savez(path, **state)
    done = [process.communicate(timeout=300) for process in team(
        3 - kill % 2, *flags, **dict.fromkeys(processes.PROXIES, "http://127.0.0.1:9"))]
    result, = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    alone = one_process(tmp_path, *same)
    assert result["entries_computed"] == 0 and result["cg_iterations"] > 100 and result["cg_history"][0] == 7, done
    assert abs(result["test_mse"] / alone["test_mse"] - 1) < 1e-7
    assert not solving.exists()


@pytest.mark.parametrize("count", [1, 3])
def test_processes_messages(count):
    """A step sends (n, c) for the product, and with rank k (k, c) and (n, c) more, float64: 8 c (2 n + k) bytes. A true
    residual sends (n, c), a ridge (k, k). Columns that are solved are not sent. All processes take part in the same sums."""
    n, c, k = 61, 2, 7
    K = tiles.known(spectrum(n, 1e4).astype(np.float32), tile=16)
    y = np.random.default_rng(0).normal(size=(n, 1)) * [[1, 2, 0]]  # as many steps for both columns; the third is solved by 0

    def work(team):
        sent = []
        shared = replace(K, team=team._replace(all_reduce=lambda array: sent.append(array) or team.all_reduce(array)))
        low, ridge = pcg.low_rank(shared, k, size=4), 1e-5 * K.diagonal().mean()
        del sent[:]
        _, info = pcg.solve(shared.matvec, y, ridge, low(ridge), tol=1e-8, drop=True)
        return info, Counter(array.shape for array in sent), sum(array.nbytes for array in sent)
    for info, shapes, size in threads(count, work):
        residuals = info.products - info.iterations
        assert info.converged and info.iterations > 40 and residuals <= info.iterations // pcg.CHECK + 2
        assert shapes == {(n, c): 2 * info.iterations + residuals, (c, k): info.iterations, (k, k): 1}
        assert size == info.iterations * 8 * c * (2 * n + k) + residuals * 8 * n * c + 8 * k * k


SLOW = """
import io, os, signal, sys, time
import jax.numpy as jnp, numpy as np
import tiles
from large import processes
index, port = map(int, sys.argv[1:])
processes.GRACE = 0.1
team, tiles.MEET, sums, shown = processes.start(f"127.0.0.1:{port}", 2, index), 0.06, [], []

class Bar(tiles.tqdm):
    def __init__(self, **options):
        super().__init__(**{**options, "file": io.StringIO(), "disable": False})
    def update(self, n):
        super().update(n)
        shown.append(self.n / self.total)
tiles.tqdm = Bar

class Rows:
    def __len__(self):
        return 40
    def __getitem__(self, rows):
        time.sleep(0.08 * index)
        return np.ones((len(rows), 3), np.float32)

reduce = lambda array: sums.append(1) or team.all_reduce(array)
K = tiles.gram(lambda a, b: a @ b.T, Rows(), 4, quiet=True, team=team._replace(all_reduce=reduce))
assert K.matvec(np.ones((40, 1))).sum() == 4800
print(len(sums), *shown, flush=True)
if index == 0:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""

def test_processes_wait_for_the_slowest():
    """A process that has finished its tiles meets the slower one in a sum every MEET seconds, because a single sum would time
    out after half an hour; both take part in equally many sums. The progress bar counts the tiles of both. If process 0 is
    killed while the other is in no sum, that ends with one sentence."""
    port = free_port()
    running = [subprocess.Popen([sys.executable, "-c", SLOW, str(index), str(port)], cwd=HERE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for index in range(2)]
    outs = [process.communicate(timeout=100) for process in running]
    (met, *shown), (met_by_other, *_) = [map(float, out.splitlines()[-1].split()) for out, _ in outs]
    assert met == met_by_other > 5
    waiting = shown[-3:]  # process 0 has long done its half
    assert waiting == sorted(waiting) and 0.5 <= waiting[0] < waiting[-1] == 1
    assert running[1].returncode == 1 and outs[1][1] == f"ConnectionError: {processes.GONE.format(1, 2)}.\n"


def test_store_has_one_writer(tmp_path, pictures):
    """A second run on a store in use, of the same or another size, is refused at its start with a message. It does not disturb
    the first run, and once that ends the store is free."""
    def flags(n):
        return ["--dataset", pictures, "--n_train", str(n), "--ridge", "0.1", "--tile", "20", "--store", str(tmp_path / "K")]
    first = script(tmp_path, *flags(900), "--quiet")  # over a thousand tiles
    while not any(one.stat().st_size for one in (tmp_path / "K").glob("*/tiles-0.txt")) and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    for n in (900, 300):
        with pytest.raises(OSError, match=".*-nngp is in use by another run: wait until"):
            train(tmp_path, *flags(n))
        assert first.poll() is None
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=300)
    assert "test accuracy" in out, err
    assert train(tmp_path, *flags(300))["entries_computed"] == 0


def test_store_keeps_the_state_of_another_solve(tmp_path):
    """A run that ends deletes the state of its own solve, but not that of another, killed solve in the same store."""
    flags = ["--n_train", "60", "--n_test", "20", "--store", str(tmp_path / "K")]
    (tmp_path / "K" / "solve-nngp").mkdir(parents=True)
    other = tmp_path / "K" / "solve-nngp" / "00000000.npz"
    other.write_text("")
    train(tmp_path, *flags)
    assert os.listdir(tmp_path / "K" / "solve-nngp") == [other.name]
    other.unlink()
    train(tmp_path, *flags, "--ridge", "1")
    assert not (tmp_path / "K" / "solve-nngp").exists()


def test_store_has_a_finished_solve(tmp_path, monkeypatch):
    """A run that ends after its solve, here while it predicts, takes no further step when it is started again."""
    flags = ["--n_train", "60", "--n_test", "20", "--ridge", "0.1", "--store", str(tmp_path / "K")]
    with monkeypatch.context() as patch:
        patch.setattr(train_cifar, "scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, *flags)
    again, whole = train(tmp_path, *flags, "--verbose"), train(tmp_path, *flags[:-2])
    assert again["test_mse"] == pytest.approx(whole["test_mse"], rel=1e-6) and again["cg_iterations"] == whole["cg_iterations"]
    assert again["product_bytes_per_second"] is None


def test_store_of_another_network(tmp_path, monkeypatch):
    """If a default in kernel.py is changed, as in a fork, a store with tiles of the old network is refused."""
    flags = ["--n_train", "60", "--n_test", "20", "--store", str(tmp_path / "K"), "--ridge", "1"]
    train(tmp_path, *flags)
    monkeypatch.setitem(kernel.NETWORKS, "fc", lambda depth, w_std, b_std: kernel.NETWORKS["cnn_vec"](1, 1.3, b_std))
    with pytest.raises(ValueError, match="holds another matrix: layers is"):
        train(tmp_path, *flags)


def test_processes_do_the_same(tmp_path, pictures):
    """If processes have different flags or data, all of them end at their first sum, with a message that says which differ."""
    done = [process.communicate(timeout=100)[1] for process in team(
        2, "--out", tmp_path, "--devices", 1, "--dataset", pictures, last=["--seed", "3"])]
    words = "ValueError: the processes differ: process 1 has other flags than process 0; process 1 has other data than"
    assert all(re.search(words, err) and "Traceback" not in err for err in done), done
    given = [train_cifar.parse([]), train_cifar.parse(["--devices", "3", "--quiet"]), train_cifar.parse(["--ridge", "10"])]

    def agree(team):
        with pytest.raises(ValueError, match="differ: process 2 has other flags than process 0. Give all of them the same"):
            processes.agree(team, given[team.index], np.ones(3))
        processes.agree(team, given[team.index % 2], np.ones(3))
        return "refused, then agreed"
    assert threads(3, agree) == ["refused, then agreed"] * 3


def test_processes_that_do_not_come(tmp_path, capsys):
    """A process that waits prints for which others, and ends after --wait seconds with a message."""
    for index, waits, ends in ((0, "waiting at .* for process 1, 1 s", "process 1 of 2 did not come to"),
                               (1, "waiting for process 0 at", "process 1 of 2 waited 1 s for process 0")):
        with pytest.raises(ConnectionError, match=f"^{ends}"):
            train(tmp_path, "--n_train", "50", "--ridge", "1", "--devices", "1", "--processes", "2", "--wait", "1",
                  "--coordinator", f"127.0.0.1:{free_port()}", "--process", str(index))
        assert re.search(waits, capsys.readouterr().out)


def test_processes_that_start_again():
    """A process that dies while process 0 waits for another, and is started again, takes its place."""
    port, came = free_port(), []

    def come(process):
        came.append(processes.meet(f"127.0.0.1:{port}", 3, process, 20))
    first = threading.Thread(target=come, args=(0,))
    first.start()
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as dies:
            dies.sendall(b"1\n")
            time.sleep(0.2)
            break
    threads = [threading.Thread(target=come, args=(process,)) for process in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in (first, *threads):
        thread.join(30)
    assert sorted(map(len, came)) == [1, 1, 2]


def test_processes_of_the_same_number():
    """If two of three processes are started as process 1, the later one is refused."""
    port, said = free_port(), []

    def come(process):
        try:
            processes.meet(f"127.0.0.1:{port}", 3, process, 20)
            said.append("came")
        except (ValueError, ConnectionError) as error:
            said.append(str(error))
    threads = [threading.Thread(target=come, args=(process,)) for process in (0, 1, 1)]
    for thread in threads:
        thread.start()
    while not said:
        time.sleep(0.01)
    assert "there is a process 1 at" in said[0]
    come(2)
    for thread in threads:
        thread.join()
    assert said[1:] == ["came"] * 3


def test_processes_errors():
    """One of the three flags without the others, or a process number out of range, is refused with a message. A log that
    cannot be written ends no run."""
    for given in (("h:1", None, None), (None, 2, 0), ("h:1", 2, 2), ("h:1", 2, -1)):
        with pytest.raises(ValueError, match="give all three: HOST:PORT of process 0, the number of processes P"):
            processes.start(*given)
    for given in ("host", "host:", "host:a", ":1"):
        with pytest.raises(ValueError, match=f"^--coordinator {given}: expected HOST:PORT of process 0, such as"):
            processes.start(given, 2, 0)
    assert processes.start() == processes.start("h:1", 1, 0) == tiles.ALONE
    processes.log(os.path.join(HERE, "README.md"), 0)
    assert not tiles.LOG.handlers


@pytest.fixture
def started(monkeypatch):
    """(variables, flags of start) -> what start asks of JAX: address, count, number, devices, method; None: to be alone."""
    asked = []
    for name in os.environ:
        if re.match("OMPI_|SLURM_|TPU_|MEGASCALE_|KUBERNETES_|JOB_COMPLETION_INDEX|CUDA_VISIBLE", name):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *who, local_device_ids, cluster_detection_method, **_:
                        asked.append((*who, local_device_ids and [*local_device_ids], cluster_detection_method)))
    monkeypatch.setattr(jax, "process_count", lambda: 8)
    for name in ("meet", "all_reduce"):
        monkeypatch.setattr(processes, name, lambda *_: None)

    def start(variables, *flags, gpus=None):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, str(value))
            asked.clear()
            alone = processes.start(*flags, gpus=gpus) == tiles.ALONE
            assert alone != bool(asked) and len(asked) <= 1
            if not flags:  # the team agrees, and --wait is refused where there is one process
                assert alone == (processes.launched()[0] == 1) == (experiment.team(None, None, None, None) == tiles.ALONE)
                with pytest.raises(ValueError, match="--wait 3 changes nothing") if alone else contextlib.nullcontext():
                    experiment.team(None, None, None, None, 3)
                del asked[1:]
        return asked[0] if asked else None
    return start


def test_processes_of_a_launcher(started):
    """Of Slurm's and Open MPI's variables JAX gets how many processes there are and the number of this one. A task alone, a
    shell in a step of one task of a larger job, and mpirun -n 1, also in such a job, stay alone; flags win over variables."""
    srun, mpirun = (LAUNCHERS[name](7, 8, 5) for name in ("srun", "mpirun"))
    assert started({}) is None and started(srun) == started(mpirun) == (None, 8, 5, None, None)
    assert started({**LAUNCHERS["srun"](7, 8, 0), "SLURM_STEP_NUM_TASKS": 1}) is started(LAUNCHERS["srun"](7, 1, 0)) is None
    one = LAUNCHERS["mpirun"](7, 1, 0)
    assert started(one) is started({**one, "SLURM_STEP_NUM_TASKS": 8}) is None
    assert started({"SLURM_NTASKS": 8, "SLURM_PROCID": 0}) is None  # a batch script
    assert started(srun, "h:1", 3, 2) == started(mpirun, "h:1", 3, 2) == ("h:1", 3, 2, None, "deactivate")
    assert started(srun, None, 1) is started(mpirun, "h:1", 1, 0) is None
    assert started(srun, "h:1") == started(mpirun, "h:1") == ("h:1", 8, 5, None, None)
    del mpirun["OMPI_MCA_orte_hnp_uri"]  # Open MPI 5
    assert started(mpirun) == (None, 8, 5, None, "mpi4py") and started(mpirun, "h:1") == ("h:1", 8, 5, None, None)
    assert started(srun, gpus=2)[3] == started({}, "h:1", 3, 2, gpus=2)[3] == [0, 1]
    assert started(mpirun, gpus=2)[3] is started({**srun, "SLURM_STEP_NUM_NODES": 7}, gpus=2)[3] is None  # JAX: one each
    for wrong in (("h:1", 3), ("h:1", None, 5), (None, 8, 5), (None, 3)):
        with pytest.raises(ValueError, match="give all three"):
            started(srun, *wrong)


def test_processes_that_jax_finds(started, monkeypatch):
    """On TPUs of several hosts, and in a pod of an Indexed Job with the package kubernetes, JAX finds all; a single pod, a pod
    without the package, one host of TPUs, and these variables without TPUs stay alone. What JAX then misses is one line."""
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": 443}
    job, jax_asked = {**pod, "JOB_COMPLETION_INDEX": 0}, (None, None, None, None, None)
    find_spec = experiment.importlib.util.find_spec
    for installed in (False, True):
        monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name, *more: (
            installed or None if name == "kubernetes" else find_spec(name, *more)))
        assert started(pod) is None and started(job) == (jax_asked if installed else None)
        assert started(job, "h:1", 8, 5) == ("h:1", 8, 5, None, "deactivate") and started(job, None, 1) is None
    two, one = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": 1}, {"TPU_WORKER_HOSTNAMES": "localhost"}
    assert started(two) is None
    monkeypatch.setattr(type(jax.config), "jax_platforms", "tpu,cpu")
    for several in (two, {"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, {**one, "MEGASCALE_NUM_SLICES": 2}, {}):
        assert started(several) == jax_asked
    assert started(one) is started({"TPU_SKIP_MDS_QUERY": 1}) is started({"TPU_PROCESS_ADDRESSES": "local"}) is None
    monkeypatch.setattr(jax, "process_count", lambda: 1)  # as Google's server says of one host
    assert processes.start() == tiles.ALONE
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: json.loads("{\n?"))  # a ValueError
    with pytest.raises(ConnectionError, match="JAX does not reach the other processes .Expecting.*set --coordinator"):
        processes.start()


def test_processes_error_in_one_ends_all(tmp_path, pictures):
    """If a process fails while the other waits for it, it prints why, and both end within a minute."""
    start = time.monotonic()
    running = team(2, "--dataset", pictures, "--out", tmp_path, "--devices", 1, last=["--n_test", "1000"])
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [1, 1] and time.monotonic() - start < 60
    assert "another process is gone" in said[0] and f"n_test=1000: expected 1 to 360, the rows of {pictures}" in said[1]



# ------------------------------------------------------------------------------------------- plan

def test_plan_adds_up():
    """A plan equals a count by hand: 10 rows, 3 test rows, tiles of 4, two hosts with two devices each, so 6 tiles of K and 3
    of K_test with sixteen entries each. Memory is the largest of its phases, and whitening takes its operations."""
    out = plan.estimate(10, 3, 4, 2, 2, 5, entries_rate=9.0, product=48.0, read=24.0, write=1e9, pixels=7,
                        classes=10, kept="on disk")
    assert out["tiles"] == 9 and out["entries"] == 144 and out["bytes"] == 576
    assert out["kernel_seconds"] == 144 / 36 and out["bytes_a_host"] == 288
    assert out["pass_bytes"] == 6 * 16 * 4 / 2 and out["pass_seconds"] == 192 / 24
    assert out["reduce_bytes"] == 1600 and out["step_seconds"] == 8 + 3200 / plan.NETWORK
    assert out["solve_seconds"] == plan.STEPS["on disk"] * out["step_seconds"] + 5 / 512 * out["pass_seconds"]
    memory = plan.estimate(10, 3, 4, 2, 1, 5, 9.0, 48.0, ridges=4)
    assert memory["pass_seconds"] == 6 * 16 * 4 / 48 and memory["reduce_bytes"] == 0
    assert memory["solve_seconds"] == plan.STEPS["in memory"] * memory["step_seconds"]  # ten rows: loo is free
    whitened = plan.estimate(10, 3, 4, 2, 1, 5, 9.0, 48.0, pixels=7, flops=1e3, fit_on=20, ridges=4, base=11)
    assert whitened["data_seconds"] == (2 * 20 * 49 + 12 * 343) / 1e3
    assert abs(whitened["kernel_seconds"] - 8 - 4 * 4 * 49 / 1e3) < 1e-12  # each of four blocks once
    assert whitened["memory"]["data"] == 11 + 2 * 20 * 7 + 48 * 49
    kernel = 11 + 13 * 7 + 10 * (25 + 80) + 9 * 16 * 4 + 2 * 2 * 4 * 16 + 10 * 7 * 4
    assert whitened["memory"]["kernel"] == kernel and whitened["host_bytes"] == kernel + 4 * 10 * 5 + 6 * 8000
    lazily = plan.estimate(10, 3, 4, 2, 2, 5, 9.0, 48.0, kept="nowhere")
    assert lazily["kernel_seconds"] == lazily["bytes"] == 0 and lazily["pass_seconds"] == 96 / 36 + 384 / 2 / 48
    more = plan.estimate(10, 11, 4, 2, 2, 5, 9.0, 48.0, kept="nowhere")  # 6 tiles more of K_test
    assert abs(more["solve_seconds"] - lazily["solve_seconds"] - 6 * (16 / 36 + 64 / 2 / 48)) < 1e-12
    both = plan.estimate(10, 3, 4, 2, 2, 5, 9.0, 48.0, 24.0, 2.0, kinds=2, kept="on disk")
    assert both["kernel_seconds"] == 576 / 2  # the disk is slower than the kernel
    assert both["bytes"] == 1152 and both["pass_bytes"] == 192
    assert both["solve_seconds"] == 2 * plan.STEPS["on disk"] * both["step_seconds"] + 2 * 5 / 512 * both["pass_seconds"]


def test_plan_counts_the_columns_of_a_look():
    """Of a million rows on one host 33 columns are read at a time, and so the preconditioner costs 1,500 / 33 passes."""
    assert pcg.at_a_time(10**6, 512) == 33 and pcg.at_a_time(10**6, 512, 64) == 512 and pcg.at_a_time(5 * 10**6, 512) == 16
    out = plan.estimate(10**6, 10, 8192, 2, 1, 1500, 1e7, 1e9, 1e9, kept="on disk")
    assert out["precondition_seconds"] == 1500 / 33 * out["pass_seconds"]


def test_plan_of_five_million(tmp_path, capsys):
    """5 million images on 256 hosts are planned in seconds without loading data or writing a file, and the plan prints the
    expected numbers for the paper's problem."""
    out = train_cifar.main(["--plan", "--dataset", "cifar5m", "--n_train", "5000000", "--n_test", "10000",
                            "--hosts", "256", "--devices", "2", "--tile", "4096", "--store",
                            str(tmp_path / "K"), "--ridge", "0.1"])
    text = capsys.readouterr().out
    assert not (tmp_path / "K").exists() and not list(tmp_path.iterdir())
    assert abs(out["entries"] / (5e6**2 / 2 + 5e6 * 1e4) - 1) < 0.01 and out["tiles"] == 1221 * 1222 / 2 + 3 * 1221
    assert "5,000,000 rows" in text and "256 x 2 devices" in text and "50.3 TB on disk, 197 GB a host" in text
    assert out["total_seconds"] == out["data_seconds"] + out["kernel_seconds"] + out["solve_seconds"]
    n_entries = out["entries"] / (out["entries_per_second"] / 2 * 512)
    assert out["kernel_seconds"] >= n_entries * 0.99
    for flags, words in ((["--n_train", "1438"], "n_train=1438: expected 1 to 1437"), (["--n_test", "361"], "n_test=361: "),
                         (["--crops", "10"], "1 <= crops <= 9"), (["--fit_on", "1438"], "fit_on=1438: expected 1 to 1437")):
        with pytest.raises(ValueError, match=words):  # as the run itself would
            train_cifar.main(["--plan", *flags])



# ----------------------------------------------------------------------------------------- memory

class Shifted:
    """K = D + 1 1^T / n with a diagonal D, which takes no memory: what choosing the ridge and solving need of a matrix."""
    team, slowness, reads_all, found = tiles.ALONE, 4, False, None

    def __init__(self, n):
        self.shape, self.D = (n, n), 1 + np.arange(n) % 7 / 7

    def matvec(self, v):
        return self.D[:, None] * v + v.mean(axis=0)

    def diagonal(self):
        return self.D + 1 / len(self.D)

    def columns(self, indices, own=False):
        out = np.full((len(self.D), len(indices)), 1 / len(self.D), np.float32)
        out[indices, np.arange(len(indices))] += self.D[indices].astype(np.float32)
        return out

    def leading(self, n):
        return Shifted(n)


def test_memory_grows_by_the_byte(monkeypatch):
    """A row more takes at most 1.04 KB in preconditioner (rank 64), ridge search over fifteen ridges and solve with ten
    classes, from 50,000 to 200,000 rows; sizes and limits are three tenths of that here. With an image of CIFAR, its place in
    the view and its label that is below 4.3 KB."""
    monkeypatch.setattr(choose, "DENSE", 256)
    monkeypatch.setattr(one_pass, "PASS", 3 * one_pass.PASS // 10)
    monkeypatch.setattr(pcg, "LOOK", 3 * pcg.LOOK // 10)

    def peak(n):
        K, y = Shifted(n), np.random.default_rng(0).normal(size=(n, 10))
        tracemalloc.start()
        ridge, solver, _ = regression.choose_ridge(K, y, choose.RIDGES, "validation", rank=64,
                                                   held_out=(n * 4 // 5, np.arange(n * 4 // 5, n)))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        alpha, _ = solver(y, ridge)
        assert np.allclose(K.matvec(alpha) + ridge * solver.scale * alpha, y, atol=1e-5)
        both = np.array([most, tracemalloc.get_traced_memory()[1]])
        tracemalloc.stop()
        return both
    assert ((peak(60_000) - peak(15_000)) / 45_000 < 1040).all()
    view = augment.expand(2)
    assert 1040 + 3072 + sum(part.nbytes for part in view[:3]) / 2 + 2 * 80 < 4300

# -------------------------------------------------------------------------------------- container

def test_container_cores_and_memory(tmp_path, monkeypatch):
    """Cores and memory are those of the control groups, version 1 and 2, of the group or of one above it."""
    group, root = tmp_path / "cgroup", tmp_path / "fs"
    monkeypatch.setattr(container, "GROUP", str(group))
    monkeypatch.setattr(container, "GROUPS", str(root))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert tiles.cores() == 16
    free = tiles.free_memory()

    def files(folder, **contents):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (root / folder / name.replace("__", ".")).write_text(text)
    group.write_text("0::/a/b\n")
    files("a", cpu__max="400000 100000\n", memory__max="1000000\n", memory__current="700000\n",
          memory__stat="anon 1\ninactive_file 20000\nactive_file 30000\n")
    files("a/b", cpu__max="max 100000\n", memory__max="max\n", memory__current="5\n", memory__stat="inactive_file 0\n")
    assert tiles.cores() == 4 and tiles.free_memory() == 350_000
    files("a/b", cpu__max="50000 100000\n")
    assert tiles.cores() == 1  # half a core
    group.write_text("4:memory:/x\n3:cpu,cpuacct:/x\n")
    files("cpu/x", cpu__cfs_quota_us="300000\n", cpu__cfs_period_us="100000\n")
    files("memory/x", memory__limit_in_bytes="2000000\n", memory__usage_in_bytes="1500000\n",
          memory__stat="active_file 5\ninactive_file 5\ntotal_inactive_file 3\ntotal_active_file 4\n")
    assert tiles.cores() == 3 and tiles.free_memory() == 500_007
    files("cpu/x", cpu__cfs_quota_us="-1\n")
    files("memory/x", memory__limit_in_bytes=str(2**63 - 4096))
    assert tiles.cores() == 16 and abs(tiles.free_memory() / free - 1) < 0.5
    with pytest.raises(MemoryError):
        tiles.check_memory("this", 10 * free)


# --------------------------------------------------------------------------------------- simulate

@pytest.mark.parametrize("n, tile, hosts", [(1, 4, 1), (40, 4, 3), (41, 4, 8), (7, 16, 2), (200, 8, 5)])
def test_simulate_owns_what_processes_own(n, tile, hosts):
    """The simulation gives each host the tiles that TiledMatrix.keys gives that process of a team."""
    owned = [list(zip(i.tolist(), j.tolist())) for i, j in simulate.owned(n, tile, hosts)]
    assert owned == [list(tiles.empty(n, n, tile, True, tiles.Team(host, hosts)).keys()) for host in range(hosts)]


@pytest.mark.parametrize("kept", [1, 7])
def test_simulate_whitens_what_a_run_whitens(kept, monkeypatch):
    """The simulated loop whitens as many blocks as the real one, for each host and any number of kept blocks."""
    n, tile, hosts, seen = 68, 4, 3, []
    monkeypatch.setattr(augment, "KEPT", 4 * 4 * kept * tile)
    x = np.random.default_rng(0).integers(0, 256, (n, 2, 2, 1), np.uint8)
    whiten = data.whitening("channel", x)()
    pixels, flat = augment.Images.pixels, lambda a, b: linear(a.reshape(len(a), -1), b.reshape(len(b), -1))
    monkeypatch.setattr(augment.Images, "pixels", lambda self: seen.append(1) or pixels(self))
    for devices in (1, 3):
        for host, (i, j) in enumerate(simulate.owned(n, tile, hosts)):
            seen.clear()
            K = tiles.empty(n, n, tile, True, tiles.Team(host, hosts))
            images = augment.expand(n).of(x, whiten)
            list(tiles.computed(flat, [(0, images), (1, images)], K.sides, list(K.keys()), jax.local_devices()[:devices]))
            one = rates.Rates(devices=devices, kept=kept)
            assert simulate.computing(i, j, one, np.random.default_rng(0))[1] == len(seen) > n // tile // 2


def test_simulate_is_arithmetic_without_spread():
    """If all tiles take equally long and nothing else takes time, the kernel takes ceil(ceil(tiles / P) / D) of them, and a
    product ceil(tiles / (P threads)): efficiency is what rounding up leaves. A disk or a whitening slower than the devices
    decides alone. Parts add up to the time."""
    rng, n, b = np.random.default_rng(0), 300, 10  # 465 tiles
    for hosts in (1, 8, 64, 512):
        for devices in (1, 3):
            one = rates.Rates(tile=np.full(1, 2.0), product=np.full(1, 0.01), devices=devices, threads=devices)
            share = (465 + hosts - 1) // hosts
            rounds = (share + devices - 1) // devices
            kernel, step = (phase(n, b, hosts, one, rng) for phase in (simulate.kernel_phase, simulate.cg_step))
            assert np.isclose(sum(kernel.values()), 2 * rounds) and np.isclose(sum(step.values()), 1.05 * 4 * rounds)
            for parts in (kernel, step):
                assert np.isclose(simulate.efficiency(parts), 465 / (hosts * devices * rounds))
            slow = simulate.kernel_phase(n, b, hosts, one._replace(write=5.0, load=7.0), rng)
            assert np.isclose(sum(slow.values()), 7 + 2 + 5 * share)
            whitened = simulate.kernel_phase(n, b, hosts, one._replace(whiten=100.0, kept=1000), rng)
            assert hosts > 1 or devices > 1 or np.isclose(sum(whitened.values()), 2 * 465 + 100 * 30)


def test_simulate_waits_for_the_slowest():
    """With times 1 or 3, equally likely, and one tile a host, the kernel takes 3 unless all draw 1, 3 - 2^(1 - P) on average.
    Devices of a host get their third tile when all have done their first. The same seed gives the same times."""
    one, rng = rates.Rates(tile=np.array([1.0, 3.0])), np.random.default_rng(0)
    for rows, hosts in ((1, 1), (2, 3), (3, 6)):  # tiles a side
        took = [sum(simulate.kernel_phase(rows, 1, hosts, one, rng).values()) for _ in range(300)]
        assert abs(np.mean(took) - 3 + 2 * 0.5**hosts) < 8 * (0.5**hosts * (1 - 0.5**hosts) / 300)**0.5  # four standard errors
    tables = [simulate.kernel_phase(30, 1, 4, one, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert tables[0] == tables[1] != tables[2]

    class Times:  # six tiles, three for each of two devices: the first waits from 2 to 10, then takes 10
        choice = staticmethod(lambda values, size: np.array([1.0, 1.0, 10.0, 10.0, 1.0, 1.0]))
    assert simulate.computing(*simulate.owned(3, 1, 1)[0], rates.Rates(devices=2), Times)[0] == 20


def test_simulate_sums_end_the_scaling():
    """A sum costs nothing on one host and, with many, two bytes of network a byte and 2 (P - 1) latencies. What is divided
    falls as 1 / P, vectors do not, sums grow: efficiency falls to zero, and at last sums take nearly all of a step."""
    one = rates.Rates(product=np.full(1, 1e-9), vectors=1e-3, call=1e-3, copy=1e-9, network=(1e-4, 1e8))
    assert simulate.summed(10**6, 1, one) == 0
    assert np.isclose(simulate.summed(10**6, 2, one), 1e-3 + 1e-3 + 2e-4 + 1e-2)
    assert np.isclose(simulate.summed(10**6, 1001, one), 1e-3 + 1e-3 + 0.2 + 2e-2 * 1000 / 1001)
    counts = 1, 4, 16, 64, 256, 1024
    steps = [simulate.cg_step(6000, 100, hosts, one, np.random.default_rng(0)) for hosts in counts]
    shares = [simulate.efficiency(parts) for parts in steps]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.97 and shares[-1] < 0.01
    assert all(np.isclose(parts["product"] * hosts, steps[0]["product"]) for parts, hosts in zip(steps, counts))
    assert [parts["vectors"] for parts in steps] == [1e-3] * 6 and steps[-1]["sums"] > 0.95 * sum(steps[-1].values())
    assert simulate.loss(steps[-1]).startswith("sums ")


def test_simulate_prints_and_draws(tmp_path, monkeypatch, capsys):
    """The command prints a row for each number of hosts, draws an SVG under 60 KB with real text, and writes no other file."""
    monkeypatch.chdir(tmp_path)
    one = rates.Rates(np.array([0.9, 1.1]), np.full(1, 1e-9), 2, 2, 0.1, 0.1, 6, 1.0, 1e-3, 1e-9, 1e-3, 1e-9)
    monkeypatch.setattr(simulate, "measure", lambda n, tile, folder, given: one)
    rows = simulate.main(["--n", "10000", "--tile", "1000", "--plot", "hosts.svg"])
    out, picture = capsys.readouterr().out, (tmp_path / "hosts.svg").read_text()
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][2:] == [f"{P:,}" for P in rows]
    assert list(rows) == [8, 16, 32, 64, 128, 256, 512, 1024] and os.listdir() == ["hosts.svg"]
    assert len(picture) < 60 * 1024 and all(re.search(f"<text[^>]*>{word}<", picture) for word in ("hosts", "kernel", "1,024"))


def test_simulate_rates_are_those_of_this_machine(monkeypatch):
    """Rates are positive; tiles take as long as plan.py measures, on average; given rates replace the measured ones, and the
    whitening is faster in the ratio of the entries."""
    monkeypatch.setattr(plan, "rate", lambda fn, shape, tile, devices: 1e6 * len(devices))
    monkeypatch.setattr(plan, "product_rate", lambda kept, tile: (1e9, 2e9))
    monkeypatch.setattr(train_cifar, "FIT_ON", 100)
    here = rates.measure(600, 64, None, rank=8, shape=(4, 4, 1))
    monkeypatch.setattr(rates, "loading", lambda n: 1.0)
    given = rates.measure(600, 64, None, rank=8, shape=(4, 4, 1), given=(1e9, 4e9, 8))
    for one, rate, product, devices in ((here, 1e6, 1e9, len(jax.local_devices())), (given, 1e9, 4e9, 8)):
        assert np.isclose(one.tile.mean(), 64**2 / rate) and one.devices == devices and len(one.tile) == len(one.product) == 20
        assert np.isclose(one.threads / one.product.mean(), product) and one.write > 4 * 64**2 / 2e9
        assert all(0 < value < 600 for value in (one.whiten, one.load, one.vectors, one.call, one.kept / 1e6))
    assert 100 < here.whiten / given.whiten < 10_000



# ------------------------------------------------------------------------------------------- docs

SLURM, KUBERNETES, CONTAINER = (pathlib.Path(HERE, "large", name).read_text()
                                for name in ("slurm.sh", "kubernetes.yaml", "Containerfile"))

def test_docs_commands_run(tmp_path, monkeypatch):
    """Every command with --store or --plan in README, docstrings and the script for Slurm runs, with smaller sizes. Those with
    several processes, as in the manifest for Kubernetes, are only parsed; test_processes_one_answer runs some."""
    monkeypatch.chdir(tmp_path)
    shown = commands("train_cifar.py", train_cifar.__doc__, processes.__doc__, plan.__doc__, SLURM,
                     KUBERNETES.replace("$JOB_COMPLETION_INDEX", "31"), CONTAINER)
    assert {"$SCRATCH/cifar5m-fc", "/shared/cifar5m-fc"} < {*sum(shown, [])}
    shown = [command for command in shown if {"--store", "--plan", "--process"} & {*command}]
    assert {blocks.parse(command).n_train for command in commands("large.blocks", blocks.__doc__)} >= {None, 5000}
    for command in shown:
        train_cifar.parse(command)
        if "--process" not in command:
            shutil.rmtree("K", ignore_errors=True)
            run_small(command)



def test_docs_clusters():
    """The script for Slurm is valid bash; in the manifest for Kubernetes as many pods run as processes are waited for, and the
    address of process 0 is that of pod 0; the container gets the packages that README.md installs, and every room."""
    subprocess.run(["bash", "-n"], input=SLURM, text=True, check=True)
    assert set(re.findall(r"(?:completions:|parallelism:|--processes) (\d+)", KUBERNETES)) == {"32"}
    service, job, _, volume = re.findall(r"^ +(?:- )?name: (\w+)\n", KUBERNETES, re.M)[:4]
    assert {service} == set(re.findall(r"subdomain: (\w+)", KUBERNETES)) and f"--coordinator {job}-0.{service}:" in KUBERNETES
    assert {job} == set(re.findall(r"job-name: (\w+)", KUBERNETES)) and "completionMode: Indexed" in KUBERNETES
    assert f"mountPath: /{volume}" in KUBERNETES and f"name: {volume}\n          persistentVolumeClaim:" in KUBERNETES
    install, = re.findall(r"^RUN (.*) && pip install -q .jax.cuda12.*$", CONTAINER, re.M)
    assert f".venv/bin/{install} && " in pathlib.Path(HERE, "README.md").read_text()
    copied = set(re.findall(r"^COPY (\S+)", CONTAINER, re.M))
    assert copied == {"*.py", "requirements.txt", *experiment.ROOMS}



# -------------------------------------------------------------------------------------- benchmark

SHARE = """
import os, sys, time
n, count, index, port = map(int, sys.argv[1:])
os.sched_setaffinity(0, {index})  # one core per process, as if each had its own host
import jax, numpy as np
import tiles
from fast import fused
from large import processes
team = processes.start(f"127.0.0.1:{port}", count, index)
x = np.random.default_rng(0).standard_normal((n, 32, 32, 3), np.float32)
kernel_fn = fused.kernel_fn("cnn_vec", "ntk")
for rows in (n // 4, n):  # the first compiles
    team.all_reduce(np.zeros(1))
    start = time.perf_counter()
    tiles.gram(kernel_fn, x[:rows], n // 8, quiet=True, team=team)
    team.all_reduce(np.zeros(1))
if index == 0:
    print(time.perf_counter() - start)
"""

def test_benchmark_two_processes(benchmark):
    """Time to compute the tiles of one K with one process and with two, one core each: parallel efficiency t1 / (2 t2)."""
    if benchmark.disabled or os.cpu_count() < 2:
        pytest.skip("timed only with --benchmark-only, on two cores or more; its correctness is tested above")

    def seconds(count):
        n, port = 1024, free_port()
        running = [subprocess.Popen([sys.executable, "-c", SHARE, *map(str, (n, count, index, port))], cwd=HERE,
                                    stdout=subprocess.PIPE, text=True) for index in range(count)]
        out = [process.communicate(timeout=600)[0] for process in running]
        assert [process.returncode for process in running] == [0] * count
        return float(out[0].splitlines()[-1])
    pairs = np.array(benchmark.pedantic(lambda: [(seconds(1), seconds(2)) for _ in range(3)], rounds=1))
    benchmark.extra_info["efficiency"] = np.median(pairs[:, 0] / (2 * pairs[:, 1]))


CHECK = """
import json, os, sys, time, warnings
n, tile, rank, count, index, port = map(int, sys.argv[1:])
os.sched_setaffinity(0, {index % 2})  # a core for each process, or for two of them
time.perf_counter = time.process_time  # other work on the same cores does not count
warnings.simplefilter("ignore")
import jax, numpy as np
import augment, data, pcg, tiles, train_cifar
from large import processes, rates
team, rng = processes.start(f"127.0.0.1:{port}", count, index), np.random.default_rng(0)
augment.KEPT = 4 * tile * 4 * 768  # four blocks: each process whitens most of them again and again
x, y = rng.integers(0, 256, (n, 16, 16, 3), np.uint8), rng.standard_normal((n, 10))
kernel_fn = next(iter(train_cifar.ENGINES.values()))("fc", "ntk")
whiten = jax.device_put(data.whitening("zca", x[:1500])(1.0), jax.local_devices()[0])

def took(call, times=5):
    out = []
    for _ in range(times):
        team.all_reduce(np.zeros(1))
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return np.median(out)

def gram(rows=n, team=team):
    images = augment.expand(rows).of(x, whiten)
    images.placed[jax.local_devices()[0]] = whiten
    return tiles.gram(kernel_fn, images, tile, quiet=True, team=team)

gram(2 * tile, tiles.ALONE)  # compiles
K = gram()
ridge = 1e-3 * K.diagonal().mean()
inverse = pcg.low_rank(K, rank)(ridge)
few, many = (took(lambda: pcg.solve(K.matvec, y, ridge, inverse, 1e-300, steps)) for steps in (20, 60))
sums = [took(lambda: team.all_reduce(np.ones(size)), 40) for size in (1, 10 * n)]
one = rates.measure(n, tile, None, rank, (16, 16, 3))._replace(load=0.0) if count == 1 else ()
print(json.dumps([took(gram), (many - few) / 40, *sums, [np.asarray(value).tolist() for value in one]]))
"""

def test_benchmark_simulation(benchmark):
    """K and a step of CG by 1, 2 and 4 processes on two cores, and simulated from rates of one process and sums of two:
    seconds of processor time of the busier core agree within a factor of two."""
    if benchmark.disabled or os.cpu_count() < 2:
        pytest.skip("timed only with --benchmark-only, on two cores or more; its parts are tested above")
    n, tile, rank = 4000, 384, 200

    def measured(count):
        port = free_port()
        running = [subprocess.Popen([sys.executable, "-c", CHECK, *map(str, (n, tile, rank, count, index, port))], cwd=HERE,
                                    stdout=subprocess.PIPE, text=True) for index in range(count)]
        out = [json.loads(process.communicate(timeout=600)[0].splitlines()[-1]) for process in running]
        cores = [np.sum([times[:4] for times in out[core::2]], axis=0) for core in range(min(2, count))]
        return np.max(cores, axis=0), out[0][4]

    def compare():
        times = {count: measured(count) for count in (1, 2, 4)}
        one = rates.Rates(*(np.array(value) if isinstance(value, list) else value for value in times[1][1]))
        short, long = times[2][0][2:]
        one = one._replace(network=(max(0, (short - one.call) / 2), 1 / max(1e-12, (long - short) / (80 * n) - one.copy)))
        for count, (took, _) in times.items():
            busy = {name: value * max(1, count / 2) for name, value in one._asdict().items()
                    if name not in ("devices", "threads", "kept", "network")}
            for real, phase, more in zip(took, (simulate.kernel_phase, simulate.cg_step), ((), (rank,))):
                ours = np.median([sum(phase(n, tile, count, one._replace(**busy), np.random.default_rng(seed), *more).values())
                                  for seed in range(9)])
                benchmark.extra_info[f"{phase.__name__}, {count}"] = f"{real:.4f} s, simulated {ours:.4f}: {ours / real:.2f}"
                assert 0.5 < ours / real < 2
    benchmark.pedantic(compare, rounds=1)
    print(benchmark.extra_info)
