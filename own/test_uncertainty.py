"""How sure a prediction is: variance, probabilities, calibration.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

from test_all import digits, inputs, train  # isort: skip
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

import kernel
import regression
import tiles
from own import uncertainty


def problem(n=150, m=40, outputs=3):
    """x, K, K_test as matrices in tiles, y, and dense float64 k(X, X), k(x, X), k(x, x)."""
    x, fn = inputs(n + m), kernel.kernel_fn("fc", "nngp", depth=1)
    x, x_test = x[:n].reshape(n, -1), x[n:].reshape(m, -1)
    where = dict(tile=64, quiet=True)
    y = np.random.default_rng(5).normal(size=(n, outputs))
    K, K_test = tiles.gram(fn, x, **where), tiles.cross(fn, x_test, x, **where)
    prior = np.diag(np.asarray(fn(x_test), np.float64)).copy()
    return K, K_test, y, K.dense().astype(np.float64), K_test.dense().astype(np.float64), prior


def test_variance():
    """Variance and scale are those of the dense formulas: of the posterior, and of the likelihood's maximum."""
    K, K_test, y, A, k, prior = problem()
    lam = 0.05 * np.diag(A).mean()
    A += lam * np.eye(len(A))
    solver = regression.Solver(K, rank=50)
    variance = uncertainty.variance(solver, K_test, prior, 0.05, block=16)
    expected = prior + lam - np.einsum("mn,nm->m", k, np.linalg.solve(A, k.T))
    assert np.allclose(variance, expected, rtol=1e-4)
    alpha, _ = solver(y, 0.05, 1e-10)
    s2 = uncertainty.prior_scale(y, alpha)

    def log_likelihood(s2):
        return sum(multivariate_normal(cov=s2 * A).logpdf(column) for column in y.T)
    assert log_likelihood(s2) > max(log_likelihood(0.99 * s2), log_likelihood(1.01 * s2))


@pytest.mark.parametrize("ridge", [1e-6, 1e-4])
def test_variance_at_small_ridges(ridge):
    """Where many eigenvalues of K are below the ridge, the variance is hardly more than lambda: it is right to 1 % even so."""
    x = np.random.default_rng(0).normal(size=(340, 3))
    K = np.exp(-((x[:, None] - x[None]) ** 2).sum(axis=-1) / 8).astype(np.float32)
    train, test = tiles.known(K[:300, :300]), tiles.known(K[300:, :300], symmetric=False)
    found = uncertainty.variance(regression.Solver(train, rank=60), test, np.ones(40), ridge)
    A, k = K[:300, :300] + ridge * np.eye(300), K[300:, :300].astype(np.float64)
    assert np.allclose(found, 1 + ridge - np.einsum("mn,nm->m", k, np.linalg.solve(A, k.T)), rtol=1e-2)


def test_probabilities():
    """Class probabilities are the shares of draws in which each output is the largest."""
    rng = np.random.default_rng(0)
    f, sd = rng.normal(size=(5, 4)), np.array([0.1, 0.3, 1.0, 3.0, 10.0])
    p = uncertainty.class_probabilities(f, sd)
    draws = f + sd[:, None] * rng.normal(size=(200_000, 5, 4))
    share = np.stack([np.bincount(winner, minlength=4) for winner in draws.argmax(axis=2).T]) / 200_000
    assert np.abs(p - share).max() < 5 * 0.5 / 200_000**0.5 and np.allclose(p.sum(axis=1), 1)
    assert np.allclose(uncertainty.class_probabilities(np.zeros((1, 4)), np.ones(1)), 0.25)


def test_calibration():
    """nll, ece and the Gaussian nll are what plain loops make; where the outputs sum to 0, as targets do, the ece is near 0,
    and twice or half the sd is worse in all three."""
    rng = np.random.default_rng(0)
    f, sd = rng.normal(size=(4000, 3)), np.full(4000, 1.0)
    noise = rng.normal(size=f.shape)
    y = f + (noise - noise.mean(axis=1, keepdims=True)) * 1.5**0.5  # of variance 1
    labels = y.argmax(axis=1)
    got, p = uncertainty.calibration(f, sd, labels, y), uncertainty.probabilities(f, sd)
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = [i for i in range(4000) if low <= p[i].max() < low + 1 / 15]
        if inside:
            ece += abs(sum(float(p[i].argmax() == labels[i]) - p[i].max() for i in inside)) / 4000
    assert np.isclose(got["test_ece"], ece) and ece < 0.03
    assert np.isclose(got["test_nll"], np.mean([-np.log(p[i, labels[i]]) for i in range(4000)]))
    assert np.isclose(got["test_gaussian_nll"], -norm(f, sd[:, None]).logpdf(y).mean())
    for other in (0.5, 2.0):
        worse = uncertainty.calibration(f, other * sd, labels, y)
        assert all(worse[name] > got[name] for name in got)


def test_variance_of_a_training_row():
    """The variance of a training row at a tiny ridge is never below lambda s^2, as rounding would have it; probabilities
    for an sd of 0 are those of its limit."""
    x, y = digits(120)
    K = tiles.gram(kernel.kernel_fn("fc", "nngp"), x.astype(np.float32), quiet=True)
    K_test = tiles.cross(kernel.kernel_fn("fc", "nngp"), x[:40].astype(np.float32), x.astype(np.float32), quiet=True)
    solver = regression.Solver(K, rank=20)
    variance = uncertainty.variance(solver, K_test, K.diagonal()[:40], 1e-7)
    assert (variance >= 1e-7 * solver.scale).all() and np.isfinite(variance).all()
    f = np.array([[1.0, 0.5, 0.1], [0.2, 0.2, 0.1]])
    assert np.allclose(uncertainty.class_probabilities(f, np.zeros(2)), [[1, 0, 0], [0.5, 0.5, 0]])
    found = uncertainty.calibration(f, np.zeros(2), np.array([0, 1]), f)
    assert all(np.isfinite(value) for value in found.values())


def test_variance_of_a_run(tmp_path):
    """--variance gives the calibration of a run, and leaves the answer as it is."""
    flags = ["--n_train", "150", "--n_test", "60", "--ridge", "1e-2"]
    result, more = train(tmp_path, *flags), train(tmp_path, *flags, "--variance")
    assert abs(more["test_mse"] / result["test_mse"] - 1) < 1e-6
    assert 0 < more["test_nll"] < np.log(10) and 0 < more["test_ece"] < 0.3
