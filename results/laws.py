"""Two laws of a learning curve, with intervals: a power law with a floor, and a law that bends and predicts larger sizes.

A power law, `law`:

  error(n) = a n^-b + c,     a, c >= 0

The fit minimises the sum of squares of (a n^-b + c) / error - 1, each size weighted by its number of runs. For a given b
this is linear in a and c; b is the best value of a grid. The intervals hold 95 % of a parametric bootstrap over subsets: the
mean at each size is drawn from a normal distribution, with the relative sd of single runs divided by the root of the number
of runs. That sd is a power of n, fitted to the sizes with several runs. These intervals cover the true b in 93 of 100
experiments; with resampled runs, three of three, it was 86. They say how the law would vary with other training subsets.

    (a, b, c), intervals = laws.law({1000: [0.62, 0.63], 2000: [0.58, 0.57], 4000: [0.54]})

Curves of classification bend: few images leave the error near chance, and the slope grows with n. A bent law, `forecast`:

  u(n) = (1 + n / n0)^-b,     error = p + q u

u is the test mse divided by that of the best constant, so u(0) = 1: below n0 the curve is flat, above it is a power law. n0
and b minimise the weighted squares of log u over the last four octaves, p and q those of the error over all sizes.
Of the forms tried on the curves of results/README.md this one had the smallest mean and median miss at the largest size; the
others were power laws, also broken or with a floor, a quadratic and a sigmoid in log n, of the error and of u.
`forecast` fits sizes up to N / 4 and predicts the largest size N, which it does not see.

    errors = {100: [0.7, 0.72], 200: [0.65], 400: [0.6], 1600: [0.49]}
    shares = {100: [0.93, 0.94], 200: [0.9], 400: [0.86], 1600: [0.78]}  # u
    laws.forecast(errors, shares).error  # at 1600

Proved by: results/test_results.py
"""

from collections import namedtuple

import numpy as np
from scipy.special import digamma

POWERS = np.arange(1, 401) / 200  # the grid for b
OCTAVES = 4  # u(n) is fitted to this many of the largest sizes' octaves
AHEAD = 4  # a forecast is made from sizes up to N / AHEAD
Forecast = namedtuple("Forecast", "fitted n0 b p q error interval")


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
    if max(weight) == 1:
        return fitted, None
    drawn = mean * (1 + scatter(n, runs) / np.sqrt(weight) * np.random.default_rng(seed).normal(size=(draws, len(n))))
    return fitted, np.percentile(fit(n, np.maximum(drawn, 1e-9), weight), [2.5, 97.5], axis=1).T.tolist()


def scatter(n, runs):
    """The relative sd of a single run at each size, a power of n: n (k,), runs: k arrays, one or more with several runs."""
    log_n, several = np.log(n), [k for k, e in enumerate(runs) if len(e) > 1]
    freedom = np.array([len(runs[k]) - 1 for k in several])
    variance = [max(np.var(runs[k] / runs[k].mean(), ddof=1), 1e-12) for k in several]
    unbiased = np.log(variance) - digamma(freedom / 2) + np.log(freedom / 2)  # digamma removes the bias of the log of chi^2
    line = np.polyfit(log_n[several], unbiased, min(1, len(several) - 1), w=np.sqrt(freedom))
    return np.exp(np.polyval(line, log_n) / 2)


def bent(n, share, error, weight):
    """(n0, b, p, q) of the bent law for each of B curves, each (B,): sizes n (k,), u and errors (B, k), weights (k,)."""
    n, share, error, weight = (np.asarray(z, np.float64) for z in (n, share, error, weight))
    last = n >= max(n) / 2**OCTAVES
    last[-2:] = True
    y, w, n0 = -np.log(share[:, last]), weight[last], np.geomspace(n[0] / 1000, n[-1] * 1000, 600)
    x = np.log1p(n[last] / n0[:, None])  # (grid, k); the model is y = b x
    xx, xy = (w * x * x).sum(axis=1), (w * y) @ x.T  # (grid,), (B, grid)
    best = (xy**2 / xx).argmax(axis=1)
    b = xy[np.arange(len(y)), best] / xx[best]
    w = weight / weight.sum()
    u, e = ((w * z).sum(axis=1, keepdims=True) for z in (share, error))
    q = (w * (share - u) * (error - e)).sum(axis=1) / np.maximum((w * (share - u) ** 2).sum(axis=1), 1e-30)
    return n0[best], b, e[:, 0] - q * u[:, 0], q


def bent_error(n, n0, b, p, q):
    """The error at n of the bent law."""
    return p + q * (1 + n / n0) ** -b


def forecast(errors, shares, draws=1000, seed=0):
    """The bent law of the curves {n: [error, ...]} and {n: [u, ...]}, run by run, fitted to sizes up to a quarter of the
    largest, N. Returns Forecast(fitted sizes, n0, b, p, q, its error at N, 95 % interval), or None if the curve has less
    than four octaves or fewer than three such sizes, or no u.

    The interval is None if no fitted size has several runs. Else it is that of the bootstrap of `law`, the noise of errors
    and of u correlated as in the runs, with the scatter of the measurement at N, which is taken from the largest fitted size.
    """
    largest = max(errors)
    n = np.array([size for size in errors if size * AHEAD <= largest])
    if largest < 16 * min(errors) or len(n) < 3 or np.isnan(np.concatenate([*shares.values()])).any():
        return None
    runs = [[np.array(of[size], np.float64) for size in n] for of in (errors, shares)]
    mean, weight = np.array([[z.mean() for z in of] for of in runs]), np.array([len(z) for z in runs[0]])
    found = [float(z[0]) for z in bent(n, mean[1:], mean[:1], weight)]
    predicted, interval = bent_error(largest, *found), None
    if max(weight) > 1:
        sd = np.array([scatter(n, of) for of in runs])  # (errors or u, k)
        left = [np.concatenate([(z / m - 1) / s for z, m, s in zip(*of) if len(z) > 1]) for of in zip(runs, mean, sd)]
        together = np.linalg.cholesky(np.corrcoef(left) + 1e-9 * np.eye(2)) if np.std(left, axis=1).all() else np.eye(2)
        rng = np.random.default_rng(seed)
        noise = np.einsum("ij,djk->dik", together, rng.normal(size=(draws, 2, len(n)))) * sd / np.sqrt(weight)
        drawn = np.maximum(mean * (1 + noise), 1e-9)
        at_largest = bent_error(largest, *bent(n, drawn[:, 1], drawn[:, 0], weight))
        at_largest = at_largest * (1 + sd[0, -1] / np.sqrt(len(errors[largest])) * rng.normal(size=draws))
        interval = tuple(np.percentile(at_largest, [2.5, 97.5]).tolist())
    return Forecast(n.tolist(), *found, predicted, interval)


def local_exponent(points):
    """-d log error / d log n over the last decade of a curve {n: [error, ...]}; over two octaves if it is shorter. NaN where
    no error is left."""
    n, weight = np.array(list(points), np.float64), np.array([len(errors) for errors in points.values()])
    last = n >= n[-1] / (10 if n[-1] >= 10 * n[0] else 4)
    last[-2:] = True
    mean = np.array([np.mean(errors) for errors in points.values()])
    if not mean[last].all():
        return np.nan
    log_error = np.log(np.where(last, mean, 1))
    return -np.polyfit(np.log(n[last]), log_error[last], 1, w=np.sqrt(weight[last]))[0]
