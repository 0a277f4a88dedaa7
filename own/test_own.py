"""Fitted models in files, and their predictions.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

from test_all import flip, train  # isort: skip
import numpy as np
import pytest

import data

# ------------------------------------------------------------------------------------------ model

def test_model_predicts(tmp_path, capsys):
    """A saved model, loaded where the training set is not, gives the scores of the run that saved it."""
    flags = ["--n_train", "60", "--n_test", "50", "--kernel", "cnn_vec", "--depth", "2", "--kind", "ntk", "--flips",
             "--crops", "2", "--ridge", "0.1", "--whiten", "zca", "--tol", "1e-9"]
    result = train(tmp_path, *flags, "--save", str(tmp_path / "m.npz"))
    x_test, labels = data.load("digits", n_train=60, n_test=50)[2:]
    np.save(tmp_path / "x.npy", x_test)
    done = train(tmp_path, "--load", str(tmp_path / "m.npz"), "--predict", str(tmp_path / "x.npy"))
    scores = np.load(tmp_path / "predictions.npy")
    assert (done["scores"] == scores).all() and f"classes {scores[0].argmax()} " in capsys.readouterr().out
    assert abs(np.mean((scores - data.one_hot(labels)) ** 2) / result["test_mse"] - 1) < 1e-6


@pytest.mark.parametrize("spoil, words", [
    (lambda m, x: flip(m), "m.npz is not a model that --save has written, or damaged"),
    (lambda m, x: m.write_bytes(m.read_bytes()[:900]), "m.npz is not a model"),
    (lambda m, x: np.savez(m, alpha=np.ones(3)), "m.npz is not a model .*format"),
    (lambda m, x: np.save(x, np.zeros((2, 8, 8, 1))), r"holds float64 \(2, 8, 8, 1\); .* uint8 \(m, 8, 8, 1\)"),
    (lambda m, x: np.save(x, np.zeros((2, 9, 8, 1), np.uint8)), r"holds uint8 \(2, 9, 8, 1\)"),
    (lambda m, x: x.unlink(), "x.npy is not there; --predict takes an .npy file of uint8 images"),
    (lambda m, x: np.save(x, np.array([{}])), "x.npy is not a complete .npy array without pickle"),
    (lambda m, x: np.savez(open(x, "wb"), a=np.ones(2)), "it holds the arrays a"),
    (lambda m, x: (x.unlink(), x.mkdir()), "x.npy is a folder; --predict takes an .npy file"),
])
def test_model_damaged(tmp_path, spoil, words):
    """A model or a file of images that is damaged, pickled or of another shape: one sentence."""
    train(tmp_path, "--n_train", "30", "--n_test", "5", "--ridge", "1", "--save", str(tmp_path / "m.npz"))
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 1), np.uint8))
    spoil(tmp_path / "m.npz", tmp_path / "x.npy")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train(tmp_path, "--load", str(tmp_path / "m.npz"), "--predict", str(tmp_path / "x.npy"))
