"""How sure a prediction is: the variance of a Gaussian process, class probabilities, calibration.

The regression f(x) = k(x, X) A^-1 Y, A = K + lambda I, is the posterior mean of a Gaussian process with prior covariance
s^2 k and noise variance s^2 lambda. The variance of a prediction, the same for every output, and the s^2 that maximises the
likelihood of Y are

  var(x) = s^2 (k(x, x) + lambda - k(x, X) A^-1 k(X, x)),     s^2 = mean over outputs of <Y, alpha> / n

(Rasmussen and Williams 2006, equations 2.25, 2.26 and 5.8, where s^2 is part of k). Only the NNGP kernel is the covariance of
the infinitely wide network itself.

  n  training rows   m  test rows   c  outputs

    sd = np.sqrt(uncertainty.prior_scale(y, alpha) * uncertainty.variance(solver, K_test, k_test, ridge))

Proved by: own/test_uncertainty.py
"""

import numpy as np
from scipy.special import ndtr
from tqdm import tqdm

import choose
import data
import tiles

TINY = 1e-100  # an sd of 0 counts as this
COLUMNS = 256  # right-hand sides solved at once
ROWS = 256  # whose class probabilities are computed at once


def variance(solver, K_test, k_test, ridge, block=COLUMNS):
    """(k(x, x) + lambda - k(x, X) A^-1 k(X, x)) of each test row, (m,), without the factor s^2.

    k_test: k(x, x), (m,).   K_test: (m, n).   block: right-hand sides solved at once.
    One solve for each test row. The error of the variance is quadratic in its residual, but divided by the ridge: so the
    residual to reach is choose.SEARCH / 10, or a hundredth of the ridge where that is smaller.
    """
    tol = min(choose.SEARCH / 10, max(ridge / 100, 1e-8))
    m, out = K_test.shape[0], np.empty(K_test.shape[0])
    with tqdm(total=m, unit=" rows", desc="variance", disable=solver.quiet or None,
              leave=False) as bar:
        for start in range(0, m, block):
            stop = min(m, start + block)
            k = K_test.rows(start, stop).T
            explained = np.einsum("nm,nm->m", k, solver(k, ridge, tol)[0])
            out[start:stop] = np.maximum(k_test[start:stop] - explained, 0) + ridge * solver.scale  # 0 but for rounding
            bar.update(stop - start)
    return out


def prior_scale(y, alpha):
    """s^2, the scale of the prior with the largest likelihood: mean over outputs of <y, alpha> / n."""
    return float(np.mean(np.einsum("nc,nc->c", y, alpha)) / len(y))


def class_probabilities(f, sd, nodes=64):
    """P(output c is the largest), (m, c), for independent outputs with means f (m, c) and sd (m,).

    The integral over z of phi(z) prod over j != c of Phi(z + (f_c - f_j) / sd), by Gauss-Hermite quadrature. Each row is
    divided by its sum, which is 1 up to the error of the quadrature.
    """
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    out, sd = np.empty(f.shape), np.maximum(sd, TINY)
    for c in range(f.shape[1]):
        others = np.delete(f, c, axis=1)
        ahead = z[:, None, None] + ((f[:, c, None] - others) / sd[:, None])[None]
        out[:, c] = weights @ ndtr(ahead).prod(axis=2)
    return out / out.sum(axis=1, keepdims=True)


def probabilities(f, sd):
    """The probability of each class, (m, c), from scores f (m, c) and sd: (m,), or one number. The c outputs of a classifier
    sum to 0, so two of them have correlation -1 / (c - 1): their difference has the variance that it would have if they were
    independent, with sd times sqrt(c / (c - 1))."""
    sd = np.broadcast_to(sd, len(f)) * (f.shape[1] / (f.shape[1] - 1)) ** 0.5
    return np.concatenate([class_probabilities(f[i:i + ROWS], sd[i:i + ROWS]) for i in range(0, len(f), ROWS)])


def calibration(f, sd, labels, y, bins=15):
    """How well the uncertainty fits the errors on test rows: {name: number}.

    nll: -log P(label), mean.   ece: sum over bins of confidence, weighted by their share of the rows, of
    |accuracy - mean confidence|, confidence the largest P (Guo et al. 2017).   gaussian_nll: -log density
    of the targets y (m, c) under N(f, sd^2), mean over rows and outputs.
    """
    p, sd = probabilities(f, sd), np.maximum(sd, TINY)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(where, right - confidence, bins)
    gaussian = np.log(2 * np.pi * sd**2)[:, None] / 2 + (f - y) ** 2 / (2 * sd**2)[:, None]
    return {"test_nll": float(-np.log(np.maximum(p[np.arange(len(f)), labels], 1e-300)).mean()),
            "test_ece": float(np.abs(gaps).sum() / len(f)), "test_gaussian_nll": float(gaussian.mean())}


def of_images(kernel_fn, solver, K_test, x_test, y, alpha, f, ridge, labels):
    """The variance of every test image, and how well it is calibrated, as fields of a result."""
    solver.keep = None  # hundreds of right-hand sides: too much to write after every step
    likeliest = prior_scale(y, alpha)
    found = likeliest * variance(solver, K_test, tiles.diagonal(kernel_fn, x_test, 16, team=K_test.team), ridge)
    return {"prior_scale": likeliest, "mean_variance": float(found.mean()),
            **calibration(f, np.sqrt(found), labels, data.one_hot(labels, f.shape[1]))}
