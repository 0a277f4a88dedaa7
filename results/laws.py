"""The power law of a learning curve, with intervals.

  error(n) = a n^-b + c,     a, c >= 0

The fit minimises the sum of squares of (a n^-b + c) / error - 1, each size weighted by its number of runs. For a given b
this is linear in a and c; b is the best value of a grid. The intervals hold 95 % of a parametric bootstrap over subsets: the
mean at each size is drawn from a normal distribution, with the relative sd of single runs divided by the root of the number
of runs. That sd is a power of n, fitted to the sizes with several runs. These intervals cover the true b in 93 of 100
experiments; with resampled runs, three of three, it was 86. They say how the law would vary with other training subsets.

    (a, b, c), intervals = laws.law({1000: [0.62, 0.63], 2000: [0.58, 0.57], 4000: [0.54]})

Proved by: results/test_results.py
"""

import numpy as np
from scipy.special import digamma

POWERS = np.arange(1, 401) / 200  # the grid for b


def fit(n, error, weight):
    """(a, b, c) of the law for each of B curves, each (B,): sizes n (k,), errors (B, k), weights (k,)."""
    n, error, weight = (np.asarray(z, np.float64) for z in (n, error, weight))
    v = 1 / error[:, None]  # (B, 1, k); the relative residual is a u + c v - 1
    u = n ** -POWERS[:, None] * v  # (B, powers, k)
    uu, uv, vv, u1, v1 = ((weight * z).sum(axis=2) for z in (u * u, u * v, v * v, u, v))
    determinant = np.maximum(uu * vv - uv**2, 1e-12 * uu * vv)
    a, c = (u1 * vv - v1 * uv) / determinant, (uu * v1 - uv * u1) / determinant
    a, c = np.where(c < 0, u1 / uu, a), np.maximum(c, 0)
    a, c = np.maximum(a, 0), np.where(a < 0, v1 / vv, c)
    best = (np.arange(len(error)), (-a * u1 - c * v1).argmin(axis=1))  # the sum of squares, up to a constant
    return a[best], POWERS[best[1]], c[best]


def law(points, draws=1000, seed=0):
    """The law of a curve {n: [error, ...]}: ([a, b, c], their 95 % intervals (3, 2), or None if no size has several runs).
    ValueError: fewer sizes than parameters."""
    n, runs = list(points), [np.array(errors) for errors in points.values()]
    if len(n) < 3:
        raise ValueError(f"got {len(n)} sizes, {n}; a law with three parameters needs at least 3")
    mean, weight = np.array([e.mean() for e in runs]), [len(e) for e in runs]
    fitted = [float(z[0]) for z in fit(n, mean[None], weight)]
    several = [k for k, e in enumerate(runs) if len(e) > 1]
    if not several:
        return fitted, None
    log_n, freedom = np.log(n), np.array([len(runs[k]) - 1 for k in several])
    variance = [max(np.var(runs[k] / mean[k], ddof=1), 1e-12) for k in several]
    unbiased = np.log(variance) - digamma(freedom / 2) + np.log(freedom / 2)  # digamma removes the bias of the log of chi^2
    line = np.polyfit(log_n[several], unbiased, min(1, len(several) - 1), w=np.sqrt(freedom))
    sd = np.exp(np.polyval(line, log_n) / 2) / np.sqrt(weight)
    drawn = mean * (1 + sd * np.random.default_rng(seed).normal(size=(draws, len(n))))
    return fitted, np.percentile(fit(n, np.maximum(drawn, 1e-9), weight), [2.5, 97.5], axis=1).T.tolist()
