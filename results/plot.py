"""The picture of one run (--plot): the error against the ridge, and the residual against the step.

    python train_cifar.py --n_train 600 --plot ridge.png

Left, for up to choose.DENSE rows: leave-one-out error, test error and effective dimension at every ridge, and the ridge that
was chosen. Right: the same system solved with every preconditioner.   Proved by: results/test_pictures.py
"""

import os

import numpy as np
from matplotlib.figure import Figure  # opens no window and has no global state

import choose
import data
import regression


def draw(path, title, K, K_test, prior, y, ridge, y_test, copies=1, tol=1e-6, **options):
    """Write the picture to `path`; every preconditioner is tried.

    prior: (n,), to whose mean ridges are relative.   copies: rows of K for each training image (mirror images, crops).
    options: of regression.Solver.
    """
    infos, rows = {}, K.shape[0]
    for name in regression.PRECONDITIONERS:
        solver = regression.Solver(K, ridges=ridge, tol=tol, c=y.shape[1], prior=prior,
                                   **{**options, "name": name, "verbose": False})
        infos[name] = solver(y, ridge, tol)[1]
    small = rows <= choose.DENSE
    figure = Figure(figsize=(11 if small else 6, 4), layout="constrained")
    axes = figure.subplots(1, 1 + small, squeeze=False)[0]
    if small:
        spectrum = choose.Spectrum(K.columns(np.arange(rows)), prior.mean())
        K_plain = K_test.columns(np.arange(rows))[::K_test.shape[0] // len(y_test)]  # without the crops of test images
        errors(axes[0], spectrum, y, ridge, K_plain, y_test, copies)
    residuals(axes[-1], infos)
    if K.team.index == 0:
        figure.suptitle(title)
        for ax in figure.axes:
            ax.spines["top"].set_visible(False)
        with data.replacing(path) as file:
            figure.savefig(file, dpi=150, format=os.path.splitext(path)[1][1:])


def errors(axes, spectrum, y, ridge, K_test=None, y_test=None, copies=1):
    """Draw the root mean squared leave-one-out error against the ridge, and the test error if K_test (m, n) and y_test
    (m, c) are given; on the right axis the effective dimension; a vertical line at the chosen `ridge`."""
    ridges = [r for r in np.geomspace(10, 1e-7, 65) if r * spectrum.scale > 4 * spectrum.noise]
    table = choose.leave_one_out(spectrum, y, ridges, copies=copies)
    axes.plot(ridges, np.sqrt([row.mse for row in table]), label="leave-one-out error")
    if K_test is not None:
        errors = [np.sqrt(np.mean((f - y_test) ** 2)) for f in spectrum.predictions(K_test, y, ridges)]
        axes.plot(ridges, errors, linestyle="--", label="test error, for comparison only")
    axes.axvline(ridge, color="grey", linewidth=0.8, label=f"chosen: {ridge:.2g}")
    axes.set(xscale="log", xlabel="ridge", ylabel="root mean squared error")
    right = axes.twinx()
    right.plot(ridges, [row.dimension for row in table], color="C2", linewidth=0.8, linestyle=":")
    right.set_ylabel(f"effective dimension, of {len(y):,} (dotted)", color="C2")
    axes.legend(frameon=False)


def residuals(axes, infos):
    """Draw the residual against the step, one line for each entry of infos {name: Info}."""
    for name, info in infos.items():
        axes.plot(info.history, label=f"{name}: {info.iterations} steps, {info.seconds:.2g} s")
    axes.set(xlabel="steps (products with K)", yscale="log", ylabel="largest |y - A x| / |y| over columns")
    axes.legend(frameon=False)
