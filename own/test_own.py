"""Fitted models in files, their predictions, and images of one's own.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

import csv
import shutil
import tracemalloc

from test_all import flip, train  # isort: skip
import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm

import data
import kernel
import train_cifar
from own import images, model, uncertainty


def table(path):
    """{column: [cells]} of a CSV file."""
    with open(path, newline="") as file:
        names, *rows = csv.reader(file)
    return dict(zip(names, map(list, zip(*rows)), strict=True))


# ------------------------------------------------------------------------------------------ model

def test_model_predicts(tmp_path, capsys):
    """A saved model, loaded where the training set is not, gives the scores of the run that saved it."""
    flags = ["--n_train", "60", "--n_test", "50", "--kernel", "cnn_vec", "--depth", "2", "--kind", "ntk", "--flips",
             "--crops", "2", "--ridge", "0.1", "--whiten", "zca", "--tol", "1e-9"]
    result = train(tmp_path, *flags, "--save", str(tmp_path / "m.npz"))
    x_test, labels = data.load("digits", n_train=60, n_test=50)[2:]
    np.save(tmp_path / "x.npy", x_test)
    done = train(tmp_path, "--load", str(tmp_path / "m.npz"), "--predict", str(tmp_path / "x.npy"))
    scores, found = done["scores"], table(done["path"])
    assert found["class"] == [str(i) for i in scores.argmax(axis=1)] and found["image"] == [str(i) for i in range(50)]
    assert f"class begins {scores[0].argmax()}, " in capsys.readouterr().out
    assert abs(np.mean((scores - data.one_hot(labels)) ** 2) / result["test_mse"] - 1) < 1e-6


def test_model_damaged(tmp_path):
    """A model or a file of images that is damaged, pickled or of another shape: one sentence."""
    train(tmp_path, "--n_train", "30", "--n_test", "5", "--ridge", "1", "--save", str(tmp_path / "saved.npz"))
    for number, (spoil, words) in enumerate([
        (lambda m, x: flip(m), "m.npz is not a model that --save has written, or damaged"),
        (lambda m, x: m.write_bytes(m.read_bytes()[:900]), "m.npz is not a model"),
        (lambda m, x: np.savez(m, alpha=np.ones(3)), "m.npz is not a model .*format"),
        (lambda m, x: model.save(m, "proteins", {}, alpha=np.ones(3)), "m.npz is a model of proteins, and this program"),
        (lambda m, x: np.save(x, np.zeros((2, 8, 8, 1))), r"holds float64 \(2, 8, 8, 1\); .* uint8 \(m, 8, 8, 1\)"),
        (lambda m, x: np.save(x, np.zeros((2, 9, 8, 1), np.uint8)), r"holds uint8 \(2, 9, 8, 1\)"),
        (lambda m, x: x.unlink(), "x.npy is not there; --predict takes images"),
        (lambda m, x: np.save(x, np.array([{}])), "x.npy is not a complete .npy array without pickle"),
        (lambda m, x: np.savez(open(x, "wb"), a=np.ones(2)), "it holds the arrays a"),
        (lambda m, x: (x.unlink(), x.mkdir()), "x.npy has no .png, .jpg, .jpeg files in it"),
    ]):
        (tmp_path / str(number)).mkdir()
        path, x = tmp_path / str(number) / "m.npz", tmp_path / str(number) / "x.npy"
        shutil.copy(tmp_path / "saved.npz", path)
        np.save(x, np.zeros((2, 8, 8, 1), np.uint8))
        spoil(path, x)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            train(tmp_path, "--load", str(path), "--predict", str(x))


def test_model_probabilities_of_two_classes():
    """With two classes, one output says all: the probability is Phi(f / sd)."""
    f = np.array([[0.3, -0.3], [-0.01, 0.01], [0.0, 0.0]])
    assert np.allclose(uncertainty.probabilities(f, 0.25), norm.cdf(f / 0.25), atol=1e-6)


def test_model_predictions_that_cannot_be_written(tmp_path, monkeypatch):
    """A folder --out that cannot hold predictions.csv, and --variance with an NTK, are refused before a tile is computed."""
    train(tmp_path, "--n_train", "30", "--n_test", "5", "--ridge", "1", "--kind", "ntk", "--save", str(tmp_path / "m.npz"))
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 1), np.uint8))
    monkeypatch.setattr(model.tiles, "cross", None)
    load = ["--load", str(tmp_path / "m.npz"), "--predict", str(tmp_path / "x.npy")]
    with pytest.raises(OSError, match="m.npz.x: .*predictions.csv cannot be written .Not a directory.; give a folder"):
        train_cifar.main([*load, "--quiet", "--out", str(tmp_path / "m.npz" / "x")])
    with pytest.raises(ValueError, match="--variance with a model of kind ntk"):
        train(tmp_path, *load, "--variance")


def test_own_folder_with_a_slash(tmp_path):
    """A folder is the same with a slash at its end, as shells complete it."""
    for k, name in enumerate(["a", "b"] * 4):
        (tmp_path / "x" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 20 * k).save(tmp_path / "x" / name / f"{k}.png")
    one, other = (images.read(f"{tmp_path}/x{slash}") for slash in ("", "/"))
    assert all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4])) and one.names == other.names == ("a", "b")


def test_model_of_own_images(tmp_path, capsys):
    """A model of one's own images, floats with words for labels, is loaded, predicts as the run that saved it, and says the
    words; numbers that are not finite are refused."""
    x, y, x_test, y_test = data.load("digits", n_train=60, n_test=50)
    x, x_test, words = x / 16, x_test / 16, np.array([f"n{i}" for i in range(10)])
    np.savez(tmp_path / "x.npz", x_train=x, y_train=words[y], x_test=x_test, y_test=words[y_test])
    flags = ["--ridge", "0.1", "--tol", "1e-9", "--crops", "2"]
    result = train(tmp_path, "--dataset", str(tmp_path / "x.npz"), *flags, "--save", str(tmp_path / "m.npz"))
    np.save(tmp_path / "new.npy", x_test)
    load = ["--load", str(tmp_path / "m.npz"), "--predict", str(tmp_path / "new.npy")]
    scores, classes = (train(tmp_path, *load)[name] for name in ("scores", "classes"))
    assert (classes == words[scores.argmax(axis=1)]).all()
    assert abs(np.mean((scores - data.one_hot(y_test)) ** 2) / result["test_mse"] - 1) < 1e-6
    assert f"begins n{scores[0].argmax()}, n{scores[1].argmax()}, " in capsys.readouterr().out
    np.save(tmp_path / "new.npy", np.full_like(x_test, np.nan))
    with pytest.raises(ValueError, match="new.npy holds 3200 numbers that are not finite"):
        train(tmp_path, *load)


def test_model_is_sure_as_the_formula(tmp_path):
    """predictions.csv of a folder of images, with --variance: names of files, and the sd and the probabilities of a dense
    float64 formula; without it, the same sd for all, the root mean squared leave-one-out error; an NTK
    has none."""
    x, y, x_test, y_test = data.load("digits", n_train=60, n_test=12)
    x, x_test = (np.minimum(16.0 * z, 255).astype(np.uint8) for z in (x, x_test))
    np.savez(tmp_path / "x.npz", x_train=x[..., 0], y_train=y, x_test=x_test, y_test=y_test)
    for i, image in enumerate(x_test):
        (tmp_path / "new" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / "new" / f"{i % 2}" / f"{i:02}.png")
    fit = ["--dataset", str(tmp_path / "x.npz"), "--whiten", "none", "--tol", "1e-9", "--save", str(tmp_path / "m.npz")]
    result = train(tmp_path, *fit, "--ridge", "1,0.1,0.01")
    load = ["--load", str(tmp_path / "m.npz"), "--predict", str(tmp_path / "new")]
    plain, sure = train(tmp_path, *load), train(tmp_path, *load, "--variance")
    found = table(sure["path"])
    assert found["file"] == sorted(found["file"]) and found["file"][0] == "0/00.png" and len(found["p(9)"]) == 12

    order = [2 * i for i in range(6)] + [2 * i + 1 for i in range(6)]  # folder 0, then folder 1
    a, b = (z.astype(np.float32) / 255 for z in (x, x_test[order]))
    both = np.asarray(kernel.kernel_fn("fc", "nngp")(np.concatenate([a, b]), np.concatenate([a, b])), np.float64)
    K, K_test, k_test = both[:60, :60], both[60:, :60], both[60:, 60:]
    A = K + result["ridge"] * np.diagonal(K).mean() * np.eye(60)
    Y = data.one_hot(y)
    f, s2 = K_test @ np.linalg.solve(A, Y), np.mean(Y * np.linalg.solve(A, Y) * 1.0)
    v = s2 * (np.diagonal(k_test) - np.sum(K_test * np.linalg.solve(A, K_test.T).T, axis=1) + A[0, 0] - K[0, 0])
    assert np.allclose(sure["sd"], v**0.5, rtol=1e-3) and np.allclose(np.array(found["sd"], float), v**0.5, rtol=1e-3)
    draws = np.random.default_rng(0).normal(size=(20_000, 10))
    draws = (draws - draws.mean(axis=1, keepdims=True)) / 0.9**0.5  # errors sum to zero; each has sd 1
    for i, p in enumerate(sure["probabilities"]):
        assert np.allclose(p, np.bincount((f[i] + v[i]**0.5 * draws).argmax(axis=1), minlength=10) / 20_000, atol=0.015)
    assert plain["sd"] is None
    draws *= result["loo_mse"]**0.5
    for i, p in enumerate(plain["probabilities"]):
        assert np.allclose(p, np.bincount((f[i] + draws).argmax(axis=1), minlength=10) / 20_000, atol=0.015)
    train(tmp_path, *fit, "--ridge", "1", "--kind", "ntk")
    with pytest.raises(ValueError, match="--variance with a model of kind ntk"):
        train(tmp_path, *load, "--variance")


# ----------------------------------------------------------------------------------------- images

def pictures(folder, classes=3, each=5, side=8, seed=0):
    """A folder with a folder of grey PNG files for each class: noise around an image of the class."""
    rng = np.random.default_rng(seed)
    for name in range(classes):
        (folder / f"class{name}").mkdir(parents=True)
        base = rng.integers(0, 256, (side, side))
        for i in range(each):
            image = np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / f"class{name}" / f"{i}.png")
    return folder


def test_own_folder_is_its_files(tmp_path, capsys):
    """A folder of images: the pixels of its files, classes by the names of folders, a fifth of each class to test, the same
    for one seed; train/ and test/ are taken as they are; every class of more than ten is counted."""
    pictures(tmp_path / "mine", classes=12, each=5)
    own = images.read(str(tmp_path / "mine"), 0)
    assert own.names == tuple(sorted(f"class{i}" for i in range(12))) and own.x_train.shape == (48, 8, 8, 1)
    assert (np.bincount(own.y_test) == 1).all() and "12 of its 60 images" in capsys.readouterr().out
    files = [np.asarray(Image.open(tmp_path / "mine" / "class3" / f"{i}.png")) for i in range(5)]
    kept = own.x_train[own.y_train == own.names.index("class3")][..., 0]
    assert sum(any((one == x).all() for x in kept) for one in files) == 4
    for part in ("train", "test"):
        pictures(tmp_path / "both" / part, classes=3, each={"train": 6, "test": 2}[part])
    both = images.read(str(tmp_path / "both"))
    assert (len(both.y_train), len(both.y_test)) == (18, 6)
    result = train(tmp_path, "--dataset", str(tmp_path / "mine"), "--ridge", "0.1")
    assert result["test_accuracy"] == 1.0 and result["config"]["classes"] == 12


def test_own_archive_is_the_digits(tmp_path):
    """The digits in an .npz, as bytes (n, h, w) with words for labels, and as float64, give the accuracy and the mse of the
    digits by name, whose training and test sets they hold."""
    x, y, x_test, y_test = data.load("digits", n_train=100)
    words = np.array(["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    alone = train(tmp_path, "--n_train", "100", "--fit_on", "100", "--ridge", "0.1")
    for change in (lambda x: x[..., 0], lambda x: x.astype(float)):
        np.savez(tmp_path / "x.npz", x_train=change(x), y_train=words[y], x_test=change(x_test), y_test=words[y_test])
        own = train(tmp_path, "--dataset", str(tmp_path / "x.npz"), "--ridge", "0.1")
        assert own["test_accuracy"] == alone["test_accuracy"] and abs(own["test_mse"] / alone["test_mse"] - 1) < 1e-4


def test_own_archive_has_a_test_set(tmp_path):
    """x and y with x_test and y_test: these are tested. Whole numbers beyond bytes stay as they are, also where one of the
    two has small ones only, and a model predicts new ones of the same dtype; but not bytes, which may be anything."""
    x, y, x_test, y_test = data.load("digits", n_train=60, n_test=20)
    for factor in (1, 100):
        x_other = np.minimum(x_test.astype(np.int64) * factor, 255)
        np.savez(tmp_path / "x.npz", x=x.astype(np.int64) * factor, y=y, x_test=x_other, y_test=y_test)
        own = images.read(str(tmp_path / "x.npz"))
        assert own.x_train.dtype == own.x_test.dtype == (np.uint8 if factor == 1 else np.float32)
        assert np.array_equal(own.x_train, x * np.float32(factor)) and np.array_equal(own.x_test[..., 0], x_other[..., 0])
    fit = ["--dataset", str(tmp_path / "x.npz"), "--ridge", "0.1", "--save", str(tmp_path / "m.npz")]
    result = train(tmp_path, *fit)
    assert result["config"]["n_test"] == 20
    np.save(tmp_path / "new.npy", x_other)
    load = ["--load", str(tmp_path / "m.npz"), "--predict", str(tmp_path / "new.npy")]
    assert np.mean(np.array(train(tmp_path, *load)["scores"]).argmax(axis=1) == y_test) == result["test_accuracy"]
    np.save(tmp_path / "new.npy", x_other.astype(np.uint8))
    with pytest.raises(ValueError, match="holds uint8 .* trained on images float32"):
        train(tmp_path, *load)


def test_own_folder_with_other_files(tmp_path, capsys):
    """Files that are no images are left out, which a note says; what is transparent becomes white; what a camera has stored
    turned is upright."""
    folder = pictures(tmp_path / "mine")
    (folder / "class0" / "notes.txt").write_text("")
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4, :, 3] = 255  # black above, below transparent
    Image.fromarray(clear).save(folder / "class1" / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise
    Image.fromarray(clear[..., 3]).save(folder / "class1" / "turned.png", exif=turned)
    own = images.read(str(folder))
    assert "holds 1 files or folders that" in (said := capsys.readouterr().out) and "left out, such as notes.txt" in said
    below = np.repeat([0, 255], 32 * 3).reshape(8, 8, 3)
    for wanted in (below, below.swapaxes(0, 1)):  # white below; on the right, where the turned one has it above
        assert sum(np.array_equal(image, wanted) for image in (*own.x_train, *own.x_test)) == 1


def test_own_large_images_are_not_decorrelated(tmp_path, monkeypatch, capsys):
    """Images of more numbers than LARGEST are whitened by channel, which a note says; a --whiten that is given is kept."""
    monkeypatch.setattr(train_cifar, "LARGEST", 63)
    flags = ["--n_train", "30", "--n_test", "10", "--ridge", "0.1"]
    default = train(tmp_path, *flags)
    assert default["config"]["whiten"] == "channel" and "note: --whiten channel, for images of 64" in capsys.readouterr().out
    assert default["test_mse"] == train(tmp_path, *flags, "--whiten", "channel")["test_mse"]
    assert train(tmp_path, *flags, "--whiten", "zca")["config"]["whiten"] == "zca"


@pytest.mark.parametrize("spoil, words", [
    (lambda d: [shutil.rmtree(d / f"class{i}") for i in range(3)], "has no folder with"),
    (lambda d: [one.rename(one.with_suffix(".webp")) for one in (d / "class1").iterdir()], "class1 has no .png, .jpg, .jpeg"),
    (lambda d: [(d / f"class{i}").rename(d / name) for i, name in enumerate(("train", "test", "val"))],
     "holds train, test and val; expected train and test alone"),
    (lambda d: (d / "class1" / "2.png").write_bytes((d / "class1" / "2.png").read_bytes()[:20]), "2.png cannot be read"),
    (lambda d: shutil.rmtree(d / "class0") or shutil.rmtree(d / "class1"), "are of class 'class2'; expected two or more"),
    (lambda d: (d / "class1" / "2.png").write_bytes(b"no"), "2.png cannot be read as an image"),
    (lambda d: Image.new("L", (9, 8)).save(d / "class1" / "2.png"), "2.png has 8 x 9 pixels .* with --resize H"),
])
def test_own_folder_errors(tmp_path, spoil, words):
    """An empty folder, one class, an image that is none, sizes that differ: one sentence that names the file."""
    folder = pictures(tmp_path / "mine")
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        train(tmp_path, "--dataset", str(folder))


@pytest.mark.parametrize("arrays, words", [
    ({"a": np.ones(3)}, "holds a; expected x and y"),
    ({"x": np.ones((4, 2, 2)), "y": np.arange(3)}, "4 images in x and 3 labels"),
    ({"x": np.ones((4, 3, 8, 8)), "y": np.arange(4)}, r"with channels first; .*: take x.transpose\(0, 2, 3, 1\)"),
    ({"x": np.full((4, 2, 2), np.nan), "y": np.arange(4) % 2}, "numbers that are not finite in 4 of 4 images"),
    ({"x": np.ones((4, 2, 2)), "y": np.array([0, 1, np.nan, 1])}, "has nan at row 2; expected classes"),
    ({"x": np.ones((4, 2, 2)), "y": np.array([0, 1, None, 1])}, "without pickle"),
    ({"x": np.ones((4, 2, 2)), "y": np.array([0, 1, np.inf, 1])}, "has inf at row 2; expected classes"),
    ({"x": np.ones((4, 2, 2)), "y": np.array(["a", "b", "", "a"])}, "has no label at row 2"),
    ({"x": np.full((4, 2, 2), 1e300), "y": np.arange(4) % 2}, "numbers that are not finite in 4 of 4 images"),
    ({"x": np.ones((4, 2, 2)), "y": np.arange(4) % 2, "x_test": np.ones((1, 2, 2))}, "holds x, x_test, y; expected x and y"),
    ({"x_train": np.ones((4, 2, 2)), "y_train": np.arange(4) % 2, "x_test": np.ones((1, 2, 2)), "y_test": np.array([7])},
     "the test set has class 7"),
])
def test_own_archive_errors(tmp_path, arrays, words):
    """Arrays that are missing or do not fit, labels that are no classes: one sentence with the name of the file."""
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=f"x.npz.*{words}"):
        train(tmp_path, "--dataset", str(tmp_path / "x.npz"))


def test_own_copies_are_counted(tmp_path, capsys):
    """Images that stand in both parts, and copies among the training images, are counted in notes; if there are none, there is
    no note."""
    x, y, x_test, y_test = data.load("digits", n_train=40, n_test=20)
    for more, test, said in ((x[:0], x_test, []), (x[:2], np.concatenate([x_test, x[:3]]), [
            "3 of 23 test images of {} are training images too",
            "2 of 42 training images of {} are copies of others, so that errors on images left out are too small"])):
        np.savez(tmp_path / "x.npz", x_train=np.concatenate([x, more]), y_train=np.concatenate([y, y[:len(more)]]),
                 x_test=test, y_test=np.concatenate([y_test, y[:len(test) - 20]]))
        train_cifar.main(["--dataset", str(tmp_path / "x.npz"), "--ridge", "1", "--depth", "1", "--out", str(tmp_path)])
        notes = [line[6:] for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert notes == [one.format(tmp_path / "x.npz") for one in said]


def test_own_rare_classes(tmp_path):
    """Sorted rows, a tenth of them of the second class: rows held out, smaller sets, and a part of the test rows have a tenth
    of them too. More test rows begin with the fewer, as a store needs it."""
    x, y = np.random.default_rng(0).normal(size=(300, 5)), np.repeat(["no", "yes"], [270, 30])
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x[::-1], y_test=y[::-1])
    own = images.read(str(tmp_path / "x.npz"))
    labels, x_test, y_test = data.load(own, n_test=50)[1:]
    assert (data.load(own, n_test=70)[2][:50] == x_test).all()
    assert abs(labels[-60:].sum() - 6) <= 1 and abs(labels[:100].sum() - 10) <= 1 and abs(y_test.sum() - 5) <= 1
    rows = [int(np.flatnonzero((own.x_test == row).all(axis=(1, 2, 3)))[0]) for row in x_test]
    assert (own.y_test[rows] == y_test).all()
    assert train(tmp_path, "--dataset", str(tmp_path / "x.npz"), "--select", "validation", "--ridge", "1,0.1",
                 "--depth", "1")["select"] == "validation"


def test_own_vectors_have_no_mirror_images(tmp_path):
    """--flips is refused for rows of numbers, of which it would only change what a ridge means."""
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(20, 5)), y=np.arange(20) % 2)
    for flips in ("symmetric", "explicit"):
        with pytest.raises(ValueError, match="--flips: what .*x.npz holds is one pixel wide"):
            train(tmp_path, "--dataset", str(tmp_path / "x.npz"), "--flips", flips)


def test_own_vectors_have_no_neighbours(tmp_path):
    """A convolutional network is refused for rows of numbers, for which it is the fully connected one."""
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(20, 5)), y=np.arange(20) % 2)
    with pytest.raises(ValueError, match="--kernel cnn_vec: .*x.npz holds images of one pixel.* Take --kernel fc"):
        train(tmp_path, "--dataset", str(tmp_path / "x.npz"), "--kernel", "cnn_vec")


def test_own_archive_damaged(tmp_path):
    """An archive cut short, one array or a table in place of an archive: one sentence that names the file."""
    np.savez(tmp_path / "x.npz", x=np.ones((9, 4, 4)), y=np.arange(9))
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:500])
    np.save(tmp_path / "y.npy", np.ones((9, 4)))
    (tmp_path / "z.csv").write_text("x,y\n1,2\n")
    for name in ("x.npz", "y.npy", "z.csv"):
        with pytest.raises(ValueError, match=f"{name} is not a complete .npz archive without pickle .*tables in CSV are for "):
            train(tmp_path, "--dataset", str(tmp_path / name))


def test_own_npy_files_are_mapped(tmp_path):
    """Arrays in a folder of .npy files are those of an .npz, and of the images only the rows that are wanted take memory."""
    rng, names = np.random.default_rng(0), ("x_train", "y_train", "x_test", "y_test")
    x, y = rng.integers(0, 256, (4000, 16, 16, 3), np.uint8), rng.integers(0, 5, 4000)
    arrays = dict(zip(names, (x, y, x[:50], y[:50])))
    np.savez(tmp_path / "all.npz", **arrays)
    (tmp_path / "separate").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "separate" / f"{name}.npy", array)
    for mine, theirs in zip(images.read(tmp_path / "separate"), images.read(tmp_path / "all.npz")[:5]):
        assert np.array_equal(mine, theirs)
    tracemalloc.start()
    x_train, *_ = data.load(images.read(str(tmp_path / "separate")), n_train=40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x_train.shape == (40, 16, 16, 3) and peak < x.nbytes / 4
    (tmp_path / "separate" / "y_test.npy").unlink()
    with pytest.raises(ValueError, match="separate holds x_test, x_train, y_train; expected x and y"):
        images.read(str(tmp_path / "separate"))
