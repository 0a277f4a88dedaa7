"""The estimators for scikit-learn.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

from test_all import as_users_have_it, readme, train  # isort: skip
import functools
import pickle
import re
import warnings

import jax
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import choose
import data
import kernel
import tiles
from own.estimator import KernelClassifier, KernelRegressor

FAILS = {"check_methods_subset_invariance": "asks for 1e-7; entries of K are float32, rounded by the shape of a tile"}


@pytest.fixture(autouse=True)
def loose():
    """JAX as its users have it: scikit-learn gives float64."""
    with as_users_have_it():
        yield


def rows(n=120, m=30, d=5):
    """A smooth function of d numbers, with noise: X (n, d), y (n,), and m new ones."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n + m, d))
    y = 7 + np.sin(X[:, 0]) + X[:, 1] * X[:, 2] / 2 + 0.1 * rng.normal(size=n + m)
    return X[:n], y[:n], X[n:], y[n:]


def exact(X, X_new, kind="nngp", **options):
    """K (n, n), k(X_new, X) and k(x, x) of the fc network in float64."""
    fn = kernel.kernel_fn("fc", kind, **options)
    with as_users_have_it(x64=True):
        K, n = np.asarray(fn(np.concatenate([X, X_new]))), len(X)
    return K[:n, :n], K[n:, :n], np.diag(K)[n:]


@pytest.mark.parametrize("estimator", [KernelRegressor, KernelClassifier])
def test_estimator_checks(estimator):
    """scikit-learn's checks of estimators pass, but those named in FAILS, each with its reason. Compiled as in these tests,
    where every shape rounds alike, even those may pass."""
    results = check_estimator(estimator(depth=1), expected_failed_checks=FAILS, on_skip=None)
    assert {one["check_name"] for one in results if one["status"] == "xfail"} <= set(FAILS)
    assert sum(one["status"] == "passed" for one in results) > 45


def test_estimator_is_the_dense_formula():
    """fit and predict are the dense formula in float64 at the ridge with the least leave-one-out error, of n dense solves;
    return_std is sqrt(s^2 (k(x, x) + lambda - k(x, X) A^-1 k(X, x))); several targets at once, as each alone."""
    X, y, X_new, _ = rows()
    ridges, options = [1.0, 1e-2, 1e-4], {"depth": 2, "b_std": 0.3}
    fitted = KernelRegressor(ridge=ridges, tol=1e-9, **options).fit(X, y)
    K, K_new, prior = exact(X, X_new, **options)
    z, scale = y - y.mean(), np.trace(K) / len(K)

    def left_out(ridge):
        A = K + ridge * scale * np.eye(len(K))
        return np.mean([(z[i] - K[i, rest] @ np.linalg.solve(A[np.ix_(rest, rest)], z[rest])) ** 2 for i, rest in (
            (i, np.delete(np.arange(len(K)), i)) for i in range(len(K)))])
    errors = [left_out(ridge) for ridge in ridges]
    assert fitted.ridge_ == ridges[np.argmin(errors)]
    assert np.allclose([row.mse for row in fitted.compared_], errors, rtol=1e-3)
    A = K + fitted.ridge_ * scale * np.eye(len(K))
    alpha = np.linalg.solve(A, z)
    f, sd = fitted.predict(X_new, return_std=True)
    assert np.allclose(f, K_new @ alpha + y.mean(), atol=1e-4) and fitted.dual_coef_.shape == (120, 1)
    variance = z @ alpha / len(z) * (prior + fitted.ridge_ * scale - np.sum(K_new * np.linalg.solve(A, K_new.T).T, axis=1))
    assert np.allclose(sd, variance**0.5, rtol=2e-3)
    both = KernelRegressor(ridge=fitted.ridge_, **options).fit(X, np.stack([y, 2 * y], axis=1)).predict(X_new)
    assert np.allclose(both, np.stack([f, 2 * f], axis=1), atol=1e-4)


def test_estimator_precomputed_is_kernel_ridge():
    """A ready-made kernel matrix gives the coefficients of sklearn.kernel_ridge.KernelRidge, and the kernel's own fit."""
    X, y, X_new, _ = rows()
    K, K_new, _ = exact(X, X_new, depth=1)
    theirs = KernelRidge(alpha=1e-2 * np.trace(K) / len(K), kernel="precomputed").fit(K, y - y.mean())
    ours = KernelRegressor(kernel="precomputed", ridge=1e-2, tol=1e-10).fit(K, y)
    assert np.allclose(ours.dual_coef_[:, 0], theirs.dual_coef_, rtol=1e-5, atol=1e-6)
    assert np.allclose(ours.predict(K_new), theirs.predict(K_new) + y.mean(), atol=1e-6)
    assert np.allclose(KernelRegressor(depth=1, ridge=1e-2).fit(X, y).predict(X_new), ours.predict(K_new), atol=1e-4)
    search = GridSearchCV(clone(ours), {"ridge": [1e-2, 1e2]}, cv=3).fit(K, y)  # takes rows and columns of K
    assert search.best_params_ == {"ridge": 1e-2} and search.best_score_ > 0.5
    with pytest.raises(ValueError, match="K is not symmetric"):
        ours.fit(np.triu(K), y)
    with pytest.raises(ValueError, match="return_std with kernel='precomputed'"):
        ours.predict(K_new, return_std=True)


def test_estimator_is_the_script(tmp_path):
    """On the digits the classifier chooses the ridge, and is right on as many test images, as train_cifar.py with the same
    network: whitening, choice and solver are the same. Probabilities add up to one and favour the answer; classes keep their
    words."""
    x, y, x_test, y_test = data.load("digits", n_train=200)
    script = train(tmp_path, "--n_train", "200", "--fit_on", "200", "--depth", "2")
    words = np.array(["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    fitted = KernelClassifier(depth=2).fit(x, words[y])
    p = fitted.predict_proba(x_test)
    assert fitted.ridge_ == script["ridge"] and fitted.score(x_test, words[y_test]) == script["test_accuracy"]
    assert np.allclose(p.sum(axis=1), 1) and (fitted.classes_[p.argmax(axis=1)] == fitted.predict(x_test)).all()
    assert fitted.about_["error"]**2 == pytest.approx(script["loo_mse"], rel=1e-3)
    again = pickle.loads(pickle.dumps(fitted))  # what joblib does
    assert (again.predict(x_test) == fitted.predict(x_test)).all()


def test_estimator_in_scikit_learn():
    """Grid search over depth, w_std and ridge in a pipeline, in two processes, finds the best of its table, and that table
    holds the scores of fits by hand."""
    X, y, _, _ = rows(90)
    pipe = make_pipeline(StandardScaler(), KernelRegressor(ridge=0.01))
    grid = {"kernelregressor__depth": [1, 2], "kernelregressor__w_std": [1.0, 1.5], "kernelregressor__ridge": [1e-3, 10.0]}
    search = GridSearchCV(pipe, grid, cv=3, n_jobs=2).fit(X, y)
    assert search.best_params_["kernelregressor__ridge"] == 1e-3 and len(search.cv_results_["params"]) == 8
    alone = cross_val_score(clone(pipe).set_params(**search.best_params_), X, y, cv=3)
    assert np.allclose(alone.mean(), search.best_score_, atol=1e-5)


def test_estimator_of_sequences():
    """Sequences as proteins/sequences.py encodes them, and a list of layers, give the dense formula."""
    from proteins import layers, sequences  # noqa: F401
    split = sequences.load("made")
    x = sequences.fit(split.sequences[:60], "blosum")(split.sequences[:80])
    y = split.targets[:60]
    named = KernelRegressor(kernel="seq_cnn", depth=1, ridge=0.1, tol=1e-8).fit(x[:60], y).predict(x[60:])
    listed = KernelRegressor(kernel=kernel.network("seq_cnn", 1), ridge=0.1, tol=1e-8).fit(x[:60], y).predict(x[60:])
    fn = kernel.kernel_fn("seq_cnn", "nngp", depth=1)
    with as_users_have_it(x64=True):
        K = np.asarray(fn(x.astype(float)))
    K, K_new = K[:60, :60], K[60:, :60]
    want = K_new @ np.linalg.solve(K + 0.1 * np.trace(K) / 60 * np.eye(60), y - y.mean()) + y.mean()
    assert np.allclose(named, want, atol=1e-4) and np.allclose(listed, want, atol=1e-4)


def test_estimator_of_graphs():
    """Graphs give the dense formula, also for a new molecule whose atoms have more neighbours than any that was fitted."""
    from molecules import layers, smiles
    known = ["CCO", "CCN", "c1ccccc1", "CC(C)O", "CCCC", "CC=O", "OCCO", "CCCl"]
    new = ["CCC", "CC(C)(C)O", "S(F)(F)(F)(F)(F)F"]
    y = np.arange(8.0) % 3
    fitted = KernelRegressor(kernel="gcn", depth=1, ridge=0.1, tol=1e-8).fit(smiles.graphs(known), y)
    both = smiles.graphs(known + new)
    fn = kernel.kernel_fn(layers.gcn(both.degree, 1), "nngp")
    with as_users_have_it(x64=True):
        K = np.asarray(fn(np.asarray(both[np.arange(11)], float)))
    A = K[:8, :8] + 0.1 * np.trace(K[:8, :8]) / 8 * np.eye(8)
    assert np.allclose(fitted.predict(smiles.graphs(new)), K[8:, :8] @ np.linalg.solve(A, y - y.mean()) + y.mean(), atol=1e-4)


def test_estimator_outputs_in_any_units():
    """Each output of a regression has the predictions and the standard deviation that it has alone, in its own units, which do
    not decide the ridge."""
    X, y, X_new, _ = rows(80)
    Y = np.stack([y, 1000 * np.cos(X[:, 1])], axis=1)
    both, sd = KernelRegressor(ridge=0.1, tol=1e-9).fit(X, Y).predict(X_new, return_std=True)
    assert both.shape == sd.shape == (30, 2)
    for k in (0, 1):
        alone, its = KernelRegressor(ridge=0.1, tol=1e-9).fit(X, Y[:, k]).predict(X_new, return_std=True)
        assert np.allclose(both[:, k], alone, rtol=1e-5) and np.allclose(sd[:, k], its, rtol=1e-4)
    Y[:, 1] = np.random.default_rng(0).normal(size=80)
    ridges = [KernelRegressor(depth=1).fit(X, Y * [1, unit]).ridge_ for unit in (1, 1e3, 1e-3)]
    assert len(set(ridges)) == 1


def test_estimator_inputs_that_do_not_fit():
    """Targets that are not finite or not as many as the graphs, a head that graphs have not, too few rows to hold out, inputs
    of zeros, probabilities where none are known: a sentence each. A list of images is an array of them. Integers that JAX
    would cut give what floats do. A whitening by its name is that of auto, if auto takes it."""
    from molecules import smiles
    graphs, X, y = smiles.graphs(["CCO", "CCN", "CCC"]), np.random.default_rng(0).normal(size=(4, 3)), [0, 1, 0, 1]
    singular = KernelClassifier(depth=1, ridge=0).fit(np.concatenate([X, X]), y + y)
    for call, words in (
            (lambda: KernelRegressor(kernel="gcn").fit(graphs, [1.0, np.nan, 2.0]), "NaN"),
            (lambda: KernelRegressor(kernel="gcn").fit(graphs, [1.0, 2.0]), "inconsistent numbers of samples"),
            (lambda: KernelRegressor(kernel="gcn", head="exp").fit(graphs, [1.0, 2.0, 3.0]), "graph network has no such head"),
            (lambda: KernelClassifier(ridge="validation").fit(X, y), "holds out a fifth of the rows; expected 5 or more"),
            (lambda: KernelRegressor(depth=1).fit(0 * X, y), "all inputs are 0"),
            (lambda: singular.predict_proba(X), "no probabilities: ridge=.* leave-one-out fails")):
        with pytest.raises(ValueError, match=words):
            call()
    x, labels, x_test, _ = data.load("digits", n_train=20, n_test=5)
    as_list = KernelClassifier(depth=1, ridge=0.1).fit(list(x), labels)
    assert (as_list.predict(x_test) == KernelClassifier(depth=1, ridge=0.1).fit(x, labels).predict(x_test)).all()
    named, auto, other = (
        KernelClassifier(depth=1, ridge=0.1, whiten=whiten, zca_eps=eps).fit(x, labels).decision_function(x_test)
        for whiten, eps in (("zca", None), ("auto", None), ("zca", 0.1)))
    assert (named == auto).all() and (auto != other).any()
    for options, X_bad, words in (
            ({"kernel": "cnn_vec"}, np.eye(4), "in one pixel a convolution is a dense layer. Take kernel='fc'"),
            ({"whiten": "zca"}, np.eye(4), "whiten='zca', zca_eps=None: of images"),
            ({"kernel": lambda a, b: a @ b.T, "kind": "nngb"}, np.eye(4), "kind='nngb': expected nngp or ntk"),
            ({}, np.ones((4, 3, 8, 8)), r"X is \(4, 3, 8, 8\), with channels first")):
        with pytest.raises(ValueError, match=words):
            KernelClassifier(**options).fit(X_bad, [0, 1, 0, 1])
    with pytest.raises(ValueError, match="zca_eps=1 with whiten='channel', which auto is for .* images so large; expected"):
        KernelClassifier(zca_eps=1).fit(np.ones((2, 65, 64, 1)), [0, 1])
    large = np.random.default_rng(0).integers(0, 10**13, size=(9, 3))
    with jax.enable_x64(False):
        one, same = (KernelRegressor(depth=1, ridge=0.1).fit(z, large[:, 0]).predict(z) for z in (large, large.astype(float)))
    assert np.allclose(one, same, rtol=1e-5)


def test_estimator_counts_copies():
    """Rows that stand twice are counted in a warning where rows left out choose the ridge, and only there."""
    X, y, _, _ = rows(20)
    twice = np.concatenate([X, X[:3]]), np.concatenate([y, y[:3]])
    with pytest.warns(UserWarning, match="3 of 23 rows are copies of others, .* take each row once, or give one ridge"):
        KernelRegressor(depth=1).fit(*twice)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KernelRegressor(depth=1, ridge=0.1).fit(*twice)
        KernelRegressor(depth=1).fit(X, y)


def test_estimator_networks_that_fused_does_not_take():
    """A list of layers that only kernel.py takes is computed by kernel.py."""
    x, y, x_test, _ = data.load("digits", n_train=20, n_test=5)
    layers = (("conv", 1.4, 0.0), ("relu",), ("conv", 1.4, 0.0), ("gap",), ("dense", 1.0, 0.0))
    fitted = KernelClassifier(kernel=layers, ridge=0.1, whiten="none").fit(x, y)
    as_function = KernelClassifier(kernel=kernel.kernel_fn(layers, "nngp"), ridge=0.1).fit(x, y)
    assert np.allclose(fitted.decision_function(x_test), as_function.decision_function(x_test), atol=1e-5)


def test_estimator_holds_out_any_rows(monkeypatch):
    """Above choose.DENSE rows, rows drawn at random are held out, so that rows sorted by class do no harm; the answer is in
    the order of the rows, and a single ridge has an error, for the probabilities."""
    x, y, x_test, y_test = data.load("digits", n_train=200)
    x, y = x[np.argsort(y, kind="stable")], np.sort(y)
    monkeypatch.setattr(choose, "DENSE", 150)
    fitted = KernelClassifier(depth=1, ridge=[1e4, 1e-2]).fit(x, y)
    assert fitted.ridge_ == 1e-2 and fitted.score(x_test, y_test) > 0.9 and fitted.about_["error"] < 0.3
    one = KernelClassifier(depth=1, ridge=1e-2).fit(x, y)
    assert np.allclose(one.predict_proba(x_test), fitted.predict_proba(x_test), atol=1e-3) and 0 < one.about_["error"] < 0.3


@pytest.mark.parametrize("options, words", [
    ({"ridge": "often"}, "ridge='often': expected a number >= 0, several of them, or auto, loo, gcv, validation"),
    ({"ridge": [1, -1]}, r"ridge=\[1, -1\]: expected a number"),
    ({"kernel": "resnet"}, "resnet.* unknown"),
    ({"kernel": [("flatten",), ("dense", 1.0, 0.0)], "depth": 2}, "depth, .* are for named networks; a list of layers has"),
    ({"kernel": lambda a, b: a @ b.T, "w_std": 1.0, "depth": 2}, "depth, w_std: of named networks, and this kernel is none"),
    ({"kernel": "precomputed", "b_std": 1.0}, "b_std: of named networks, and this kernel is none"),
    ({"kernel": "precomputed"}, r"K has shape \(120, 5\); expected \(n, n\)")])
def test_estimator_errors(options, words):
    """What is wrong with a parameter is said in one sentence, when fit sees it."""
    X, y, _, _ = rows()
    with pytest.raises(ValueError, match=words):
        KernelRegressor(**options).fit(X, y)


def test_docs_estimator():
    """What README shows of the estimators runs, and its search finds the best of six."""
    block = next(text for text in re.findall(r"^```python\n(.*?)```", readme(), re.M | re.S) if "own.estimator" in text)
    x, y, x_test, y_test = data.load("digits", n_train=60, n_test=20)
    names = dict(zip(("x_train", "y_train", "x_test", "y_test", "X", "y", "X_new"), (x, y, x_test, y_test, *rows(64)[:3])))
    names["GridSearchCV"] = functools.partial(GridSearchCV, cv=2)  # of 64 rows: the tiles of fits and predictions are equal
    exec(block, names)
    assert names["model"].ridge_ in choose.RIDGES and names["sd"].shape == (30,)
    assert len(names["search"].cv_results_["params"]) == 6


def test_tiles_known():
    """A matrix that is there already is multiplied without a copy, and is what it was."""
    K = np.random.default_rng(0).normal(size=(50, 50))
    K = K + K.T
    known = tiles.known(K, tile=20)
    assert (known.dense() == K).all() and all(np.shares_memory(tile, K) for tile in known.tiles.values())
    assert np.allclose(known.matvec(K), K @ K, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="K has 1 entries that are not finite"):
        tiles.known(np.where(np.arange(50) == 3, np.nan, K)[:, :4][:1], False)
