"""Which ridge: by leave-one-out, by generalised cross-validation, or by rows held out.

  A = K + lambda I,   alpha = A^-1 Y,   lambda = ridge * mean(diag K)

  loo         the error on each row of the regression fitted on all the others: alpha_i / [A^-1]_ii, exactly. Where a
              row has copies (flips, crops), all of them are left out at once: the errors on the copies g of an image
              are [A^-1]_gg^-1 alpha_g, and that on the image itself counts.
  gcv         n |alpha|^2 / (tr A^-1)^2, with the mean of A^-1's diagonal in place of each element (Golub, Heath and
              Wahba 1979). Its trace is the mean of <z, A^-1 z> over random signs z (Hutchinson 1990), which are
              columns of the same solve: PROBES of them, or more where K is small.
  validation  the mean squared error on rows that are held out, of the regression fitted on the others

loo gives up no row and has no noise of a split, but needs the eigenvectors of K: K = Q S Q^T, at most DENSE rows. With
them every ridge costs n^2: [A^-1]_ij = sum over k of Q_ik Q_jk / (S_k + lambda). They also give the effective
dimension Tr K A^-1 = sum over k of S_k / (S_k + lambda), the number of directions of K that the ridge lets through.

Where targets are centred (own/, proteins/, molecules/), their mean is that of all rows, also where one is left out.
Its error is then too small by up to about 1/n of itself, the more so the larger the ridge.

  n  rows of K   c  outputs   N  images (rows that are not copies)   ridge is relative: one number for every kernel

With the room large/, each product with K serves all ridges, and of a large K only a few are tried (large/one_pass.py).

Errors are compared by their mean square. Accuracy would be noise on a few hundred images: on subsets of CIFAR-10 it
chose ridges from 0.01 to 1 where the squared error chose 0.3 or 1.

    table = choose.leave_one_out(choose.Spectrum(K.dense()), y, ridges);   ridge = choose.best(table).ridge

Proved by: test_all.py, section choose
"""

from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

import pcg

RIDGES = [10 ** (k / 2) for k in range(2, -13, -1)]  # of --ridge auto: 10 down to 1e-6
SEARCH = 1e-3  # residual to which ridges are compared
DENSE = 4096  # rows, at most, for eigenvectors: 10 s and 0.4 GB on two cores
PROBES = 8  # random signs for the trace of A^-1, at least
CRITERIA = ("loo", "gcv", "validation")


def criterion(select, rows, copies=1):
    """`select`, or where it is None the criterion for a K of so many rows: loo up to DENSE rows, then validation.

    GCV is no default: it assumes that the diagonal of A^-1 is nearly constant, and images differ in contrast. On fc it
    chose ridges two to six times too large (results/README.md).
    ValueError: gcv with copies.
    """
    if select == "gcv" and copies > 1:
        raise ValueError(f"--select gcv with {copies} copies of each image as rows: each predicts the others. Use "
                         "--select loo or validation")
    return select or ("loo" if rows <= DENSE else "validation")


class Row(NamedTuple):
    """What is known of one ridge."""
    ridge: float
    score: float | None  # what `score` makes of the predictions: accuracy, or a correlation
    mse: float  # mean squared error, over rows and outputs
    dimension: float | None = None  # effective dimension


class Spectrum:
    """K = Q S Q^T of a dense symmetric K (n, n), in float64.  scale: mean(diag K), or what ridges are relative to.

    intercept: for a linear K of centred features (K 1 = 0). K gets a constant feature with 1e-4 of the ridge, so that
    leave-one-out fits the intercept anew each time. Otherwise the mean would tell the others about the row left out."""

    def __init__(self, K, scale=None, intercept=False):
        K = np.asarray(K, np.float64)
        scale = float(np.mean(np.diagonal(K)) if scale is None else scale)
        with threadpool_limits(1 if len(K) < 2048 else None, "blas"):  # on a busy machine two threads take ten times as long
            self.S, self.Q = np.linalg.eigh(K + 1e4 * scale if intercept else K)
        self.scale = scale
        self.noise = max(0.0, -self.S[0])  # a kernel has no negative eigenvalue: this is the rounding of its entries

    def inverse(self, ridge):
        """1 / (S + lambda), (n,).  Indefinite: lambda does not exceed the rounding of K."""
        if ridge * self.scale < 2 * self.noise:
            cure = 4 * self.noise / self.scale
            raise pcg.Indefinite(
                f"ridge {ridge:.1e} is within the rounding of K, whose lowest eigenvalue is {self.S[0]:.1e}: its "
                "regression would fit that rounding", cure)
        if self.scale <= 0:
            raise ValueError("k(x, x) is 0 for every row: all inputs are 0, or too small for float32")
        shifted = self.S + ridge * self.scale
        if shifted[0] <= 0:
            raise pcg.Indefinite("K is singular and the ridge is 0", 1e-6)
        return 1 / shifted

    def errors(self, y, ridge, copies=1):
        """Leave-one-out errors y - f (N, c) on every copies-th row of y (n, c), and the effective dimension."""
        inverse = self.inverse(ridge)
        alpha = self.Q @ (inverse[:, None] * (self.Q.T @ y))
        if copies == 1:
            errors = alpha / (self.Q**2 @ inverse)[:, None]
        else:
            Q, alpha = (x.reshape(-1, copies, x.shape[1]) for x in (self.Q, alpha))
            errors = np.linalg.solve((Q * inverse) @ Q.swapaxes(1, 2), alpha)[:, 0]
        return errors, float(np.sum(self.S * inverse))

    def predictions(self, K_test, y, ridges):
        """K_test alpha of each ridge: (m, c) arrays.  K_test: (m, n)."""
        left, right = K_test @ self.Q, self.Q.T @ y
        return [left @ (self.inverse(ridge)[:, None] * right) for ridge in ridges]


def leave_one_out(spectrum, y, ridges, score=None, copies=1):
    """[Row, ...] from the largest ridge down, without those that are within the rounding of K.

    score: (predictions (N, c), their rows) -> number, or None.
    Indefinite: every ridge is.
    """
    rows, table = np.arange(0, len(y), copies), []
    for ridge in sorted(ridges, reverse=True):
        try:
            errors, dimension = spectrum.errors(y, ridge, copies)
        except pcg.Indefinite:
            if not table:
                raise
            break
        table.append(Row(ridge, score(y[rows] - errors, rows) if score else None,
                         float(np.mean(errors**2)), dimension))
    return table


def generalised(solver, y, ridges, seed=0, intercept=False):
    """[Row, ...] by GCV, from the largest ridge down.  solver: a regression.Solver.   intercept: as of `Spectrum`.

    K must not hold copies of rows: left alone, each predicts the other.
    """
    n, c = y.shape
    count = max(PROBES, 2**14 // n)  # their error falls with the root of n times their number
    if count < n:
        probes = np.random.default_rng(seed).choice([-1.0, 1.0], (n, count))
    else:  # as many as rows give the trace itself
        probes = n**0.5 * np.eye(n)

    def row(ridge, alpha):
        alpha, z = alpha[:, :c], alpha[:, c:]
        trace = np.einsum("np,np->p", probes, z).mean()
        if intercept and ridge:  # it fits the direction of the ones whole, where A^-1 is 1 / lambda, for K 1 = 0
            trace -= 1 / (ridge * solver.scale)
        return Row(ridge, None, float(n * np.sum(alpha**2) / c / trace**2),
                   n - ridge * solver.scale * trace)
    return [row(*one) for some in solver.solutions(np.concatenate([y, probes], axis=1), ridges, SEARCH)
            for one in some]


def validation(solver, y, ridges, n_fit, held_out, score=None, intercept=False):
    """[Row, ...] on rows held out, from the largest ridge down.

    n_fit: how many rows are fitted, the first.   held_out: numbers of rows after them, or for rows that are not
    of K (K_val, y_val), their kernel with the rows of K and their targets.
    score: (predictions (m, c), their rows) -> number; rows are None for rows that are not of K.
    intercept: as of `Spectrum`; here that of the rows fitted, y = K alpha + shift with 1^T alpha = 0.
    """
    table, share, ones, shift = [], 1.0, np.ones((n_fit, int(intercept))), 0
    for some in solver.leading(n_fit).solutions(np.concatenate([y[:n_fit], ones], axis=1), ridges, SEARCH):
        found = [alpha for _, alpha in some]
        if intercept:  # the last column is that of the ones
            shifts = [alpha[:, :-1].sum(axis=0) / alpha[:, -1].sum() for alpha in found]
            found = [alpha[:, :-1] - alpha[:, -1:] * of for alpha, of in zip(found, shifts)]
            shift = np.concatenate(shifts)
        alpha = np.concatenate(found, axis=1)
        if isinstance(held_out, tuple):
            rows, f, y_val = None, held_out[0].matvec(alpha), held_out[1]
            share = np.mean(getattr(held_out[0], "mask", 1.0))  # of the labels, where some are missing and f = y = 0
        else:  # the rows held out are K times alpha padded with zeros
            alpha = np.concatenate([alpha, np.zeros((len(y) - n_fit, alpha.shape[1]))])
            rows, f, y_val = held_out, solver.K.matvec(alpha)[held_out], y[held_out]
        table += [Row(ridge, score(f, rows) if score else None, float(np.mean((f - y_val) ** 2) / share))
                  for (ridge, _), f in zip(some, np.split(f + shift, len(some), axis=1))]
    return table


def describe(row):
    """A row in words."""
    return (f"mse {row.mse:.5f}" + ("" if row.score is None else f", score {row.score:.4f}")
            + ("" if row.dimension is None else f", effective dimension {row.dimension:.1f}"))


def best(table, by="mse"):
    """The Row with the least mse, or by="score" with the largest score; of several within a thousandth of that, the
    first: the larger ridge needs fewer steps."""
    if by == "score":
        return max(table, key=lambda row: row.score)
    least = min((row.mse for row in table if np.isfinite(row.mse)), default=np.inf)
    if not np.isfinite(least):
        raise ValueError("no ridge has a finite error: look for NaN, infinity and numbers that are too large in the targets")
    return next(row for row in table if row.mse <= 1.001 * least)
