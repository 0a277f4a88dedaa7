"""KernelRegressor and scikit-learn's KernelRidge on the same kernel matrix: coefficients, seconds and memory.

Both get K (n, n) of fc NNGP as a file, which was computed in float32, ten centred one-hot columns, and one ridge. KernelRidge
reads it as float64, its default and the precision of its Cholesky factor; KernelRegressor as float32, which is how it keeps K,
and sums its products in float64. Each fits in a process of its own. Memory is that process's peak, less what it had when
everything was imported.

    python -m results.compare_sklearn --data DIR --n 10000
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from sklearn.kernel_ridge import KernelRidge

import data
import experiment
import tiles
from own.estimator import KernelRegressor
from train_cifar import ENGINES

METHODS = ("KernelRidge", "KernelRegressor")


def fit(method, folder, ridge):
    """Fit with one method, in this process, and write coefficients, seconds and bytes to the folder."""
    y, before, start = np.load(f"{folder}/y.npy"), experiment.peak_memory(), time.perf_counter()
    K = np.load(f"{folder}/K.npy")
    if method == "KernelRidge":
        K = K.astype(np.float64)
        alpha = KernelRidge(alpha=ridge * K.diagonal().mean(), kernel="precomputed").fit(K, y).dual_coef_
    else:
        alpha = KernelRegressor(kernel="precomputed", ridge=ridge, tol=1e-8).fit(K, y).dual_coef_
    np.savez(f"{folder}/{method}.npz", alpha=alpha, seconds=time.perf_counter() - start,
             memory=experiment.peak_memory() - before)


def main(argv=None):
    """Print the table, and return {method: {"seconds", "memory"}} and the largest relative difference of a coefficient."""
    parser = argparse.ArgumentParser(description="KernelRegressor beside scikit-learn's KernelRidge on one kernel matrix.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder of CIFAR-10; None: scikit-learn's digits")
    parser.add_argument("--n", type=int, default=1000, help="number of images")
    parser.add_argument("--ridge", type=float, default=0.1, help="relative to mean(diag K)")
    args = parser.parse_args(argv)
    x, labels, _, _ = data.load("cifar10" if args.data else "digits", args.data, args.n, 1)
    x, y = np.asarray(data.whitening("channel", x)()(x)), data.one_hot(labels)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/K.npy", tiles.gram(ENGINES[next(iter(ENGINES))]("fc", "nngp"), x).dense())
        np.save(f"{folder}/y.npy", y - y.mean(axis=0))
        for method in METHODS:
            code = f"from results.compare_sklearn import fit; fit({method!r}, {folder!r}, {args.ridge!r})"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
        found = {method: dict(np.load(f"{folder}/{method}.npz")) for method in METHODS}
    alphas = [found[method].pop("alpha") for method in METHODS]
    difference = np.abs(alphas[1] - alphas[0]).max() / np.abs(alphas[0]).max()
    print(f"n = {args.n:,}, ridge {args.ridge:g}, {tiles.cores()} cores; the coefficients differ by {difference:.1e} of the "
          "largest\n\n| | fit, s | memory, GB |\n| --- | ---: | ---: |")
    for method, one in found.items():
        print(f"| {method} | {one['seconds']:.1f} | {one['memory'] / 1e9:.2f} |")
    return found, difference


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    with experiment.guard(ValueError, OSError, MemoryError, ArithmeticError):
        main()
