"""scikit-learn's interface: kernel regression with infinitely wide networks in fit and predict.

    from own.estimator import KernelClassifier, KernelRegressor
    model = KernelClassifier(kernel="myrtle5").fit(x_train, y_train);   p = model.predict_proba(x_test)
    f, sd = KernelRegressor(depth=2).fit(X, y).predict(X_new, return_std=True)

  f(x) = k(x, X) alpha + mean of y,   (K + lambda I) alpha = y - mean of y,   lambda = ridge * mean(diag K)

(of a classifier y is one-hot, minus 1/classes, and no mean is taken or added).

Kernel, choice of the ridge, solver and uncertainty are those of train_cifar.py. Inputs are rows (n, d), images (n, h, w,
channels), sequences (n, length, 20) as an Encoding of proteins/sequences.py makes them, graphs (molecules/smiles.Graphs; to
fit and predict, for GridSearchCV cannot take rows of them), or a kernel matrix. They are taken as they are, except images:
unless whiten="none" or the kernel is a function, those are whitened as in train_cifar.py. Standardise the columns of (n, d)
yourself, best in a Pipeline.

Fitted models hold what they were fitted on: predict computes k(x, X), and return_std computes K once more.

Proved by: own/test_estimator.py
"""

import importlib
import inspect
import math
import warnings

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, is_classifier
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_array,
    check_consistent_length,
    check_is_fitted,
    check_random_state,
    check_X_y,
    validate_data,
)

import augment
import choose
import data
import kernel as kernels
import regression
import tiles
from own import images, model, uncertainty
from train_cifar import ENGINES, LARGEST, WHITENING

CHOICES = ("auto", *choose.CRITERIA)


class _Kernel(BaseEstimator):
    """What both estimators share."""

    def __init__(self, kernel="fc", kind="nngp", ridge="auto", depth=None, w_std=kernels.W_STD, b_std=kernels.B_STD,
                 head="linear", gamma=1.0, whiten="auto", zca_eps=None, tol=1e-6, tile=None, random_state=0):
        """kernel: a name (kernel.IMAGES; for sequences of proteins/layers.SEQUENCES; gcn), a list of layers as in kernel.py, a
        function (x1, x2) -> K that JAX can trace (once, so that what else it reads stays as it was), or "precomputed": then
        X is K (n, n) in fit, and k(x, X) (m, n) in predict.
        kind: nngp or ntk.   ridge: a number, several to choose from, or how to choose among choose.RIDGES: loo, gcv,
        validation; auto: loo for up to 4,096 rows, else validation. Several are compared by auto.
        depth, w_std, b_std, head, gamma: of a named kernel, as in kernel.network.
        whiten, zca_eps: of images, as in data.whitening; auto: the best known for the kernel.
        tol: residual of the solve.   tile: side of a tile of K, None: chosen.
        random_state: of the preconditioner's pivots, and of the rows held out.
        """
        for name, value in list(locals().items()):
            if name not in ("self", "__class__"):
                setattr(self, name, value)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        tags.input_tags.three_d_array = True
        return tags

    def _fit(self, X, Y, unit=1.0):
        """Solve for targets unit * Y (n, c), centred; one ridge for all Y. Sets the attributes that end in an underscore."""
        given = [name for name, value in self.get_params().items() if name in ("depth", "w_std", "b_std", "head", "gamma")
                 and value != inspect.signature(type(self)).parameters[name].default]
        if given and (callable(self.kernel) or self.kernel == "precomputed"):
            raise ValueError(f"{', '.join(given)}: of named networks, and this kernel is none; leave out")
        if self.kind not in kernels.KINDS:
            raise ValueError(f"kind={self.kind!r}: expected {' or '.join(kernels.KINDS)}")
        self.X_fit_, n = X, len(X)
        self.whitening_ = self._whitening(X)
        ridges, select = self._ridges()
        select = choose.criterion(select, n)
        if select == "validation" and n < 5:
            raise ValueError(f"n_samples={n} with ridge='validation', which holds out a fifth of the rows; expected 5 or more")
        seed = check_random_state(self.random_state).randint(2**31)
        rows = np.random.default_rng(seed).permutation(n) if select == "validation" else np.arange(n)  # sorted classes
        K, fitted = self._gram(X, rows), n - n // 5
        if len(ridges) > 1 and not _is_graphs(X) and (again := n - len({row.tobytes() for row in X})):
            warnings.warn(f"{again} of {n} rows are copies of others, so that errors on rows left out are too small, and so "
                          "may be the ridge that they choose: take each row once, or give one ridge", stacklevel=3)
        need = is_classifier(self) and n > choose.DENSE and len(ridges) == 1  # an error, for probabilities
        ridge, solver, found = regression.choose_ridge(
            K, Y[rows], ridges * (1 + need), select, held_out=(fitted, np.arange(fitted, n)), tol=self.tol, seed=seed)
        alpha, info = solver(Y[rows], ridge, self.tol)
        alpha, Y = unit * alpha, unit * Y
        self.dual_coef_ = np.empty_like(alpha)
        self.dual_coef_[rows] = alpha
        self.ridge_, self.n_iter_, self.residual_ = ridge, info.iterations, float(info.residual.max())
        self.compared_ = [choose.Row(*row) for row in found["search"]]  # ridge, score, mean squared error
        self.about_ = {**model.fitted(found, solver, Y[rows], alpha), "kind": self.kind}
        scales = [uncertainty.prior_scale(Y[rows][:, [k]], alpha[:, [k]]) for k in range(Y.shape[1])]
        self._scales = np.sqrt(np.array(scales) / (self.about_["prior_scale"] or 1))  # of each output, relative to their mean
        return self

    def _ridges(self):
        """The ridges to compare, and the criterion or None."""
        if isinstance(self.ridge, str):
            if self.ridge not in CHOICES:
                raise ValueError(f"ridge={self.ridge!r}: expected a number >= 0, several of them, or {', '.join(CHOICES)}")
            return choose.RIDGES, None if self.ridge == "auto" else self.ridge
        ridges = [float(ridge) for ridge in np.atleast_1d(self.ridge)]
        if not ridges or not all(0 <= ridge < np.inf for ridge in ridges):
            raise ValueError(f"ridge={self.ridge!r}: expected a number >= 0, several of them, or {', '.join(CHOICES)}")
        return ridges, None

    def _kernel_fn(self, X):
        """k(x1, x2) for inputs like X."""
        if callable(self.kernel):
            return self.kernel
        if self.kernel == "gcn":
            if (self.head, self.gamma) != ("linear", 1.0):
                raise ValueError(f"kernel='gcn' with head={self.head!r}, gamma={self.gamma}: a graph network has no such head")
            from molecules import graphs
            from molecules.layers import gcn
            layers, engine = gcn(X.degree, self.depth or 3, w_std=self.w_std, b_std=self.b_std), graphs.kernel_fn
        else:
            if isinstance(self.kernel, str) and self.kernel.startswith("seq_"):
                importlib.import_module("proteins.layers")  # adds its layers to kernel.py's
            engine = next(iter(ENGINES.values()))
            layers = kernels.network(self.kernel, self.depth, self.w_std, self.b_std, self.head, self.gamma)
        if getattr(X, "ndim", 0) in (2, 4) and math.prod(X.shape[1:-1]) == 1 and any(one[0] == "conv" for one in layers):
            raise ValueError(f"kernel={self.kernel!r} and X of shape {X.shape}: in one pixel a convolution is a dense layer. "
                             "Take kernel='fc', or images (n, h, w, channels)")
        try:
            return kernels.compiled(engine, tuple(layers), self.kind)
        except ValueError:  # fast/fused.py does not take every list
            return kernels.compiled(kernels.kernel_fn, tuple(layers), self.kind)

    def _whitening(self, X):
        """The data.Whitening of images X, or None."""
        if getattr(X, "ndim", 0) != 4 or self.kernel == "precomputed" or callable(self.kernel):
            if self.whiten not in ("auto", "none") or self.zca_eps is not None:
                raise ValueError(f"whiten={self.whiten!r}, zca_eps={self.zca_eps}: of images and named networks. "
                                 "Leave them out, and scale other inputs yourself")
            return None
        images.channels_last(X, "X")
        if self.whiten == "none":
            return None
        best, zca_eps = WHITENING.get(str(self.kernel), ("channel", None))
        protocol = self.whiten if self.whiten != "auto" else best if math.prod(X.shape[1:]) <= LARGEST else "channel"
        if self.zca_eps is not None and not protocol.startswith("zca"):
            raise ValueError(f"zca_eps={self.zca_eps} with whiten={protocol!r}"
                             + (", which auto is for this kernel or images so large" if self.whiten == "auto" else "")
                             + "; expected whiten='zca' or 'zca_unit', or zca_eps=None")
        zca_eps = zca_eps if protocol == best else 0.1
        return data.whitening(protocol, X)(zca_eps if self.zca_eps is None else self.zca_eps)

    def _inputs(self, X):
        """X as a tile asks for it: rows (n, d) are images of one pixel; images are whitened a tile at a time."""
        if getattr(X, "dtype", np.dtype(float)).kind in "iu" and X.dtype.itemsize > 4 and not callable(self.kernel):
            X = X.astype(np.float32)  # JAX would keep 32 bits
        if self.whitening_ is not None:
            return augment.expand(len(X)).of(X, self.whitening_)
        return X[:, None, None] if getattr(X, "ndim", 0) == 2 and not callable(self.kernel) else X

    def _gram(self, X, rows):
        """K of these rows of X, as a TiledMatrix."""
        if self.kernel == "precomputed":
            return tiles.known(X if (rows[1:] > rows[:-1]).all() else X[np.ix_(rows, rows)])
        x = self._inputs(X)
        return tiles.gram(self._kernel_fn(X), x.take(rows) if _is_graphs(x) else x[rows], self._side(x), quiet=True)

    def _side(self, x):
        return side(x) if self.tile is None else self.tile

    def _scores(self, X, return_std=False):
        """f (m, c) without the mean of y, and the standard deviation (m,) or None."""
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        if self.kernel == "precomputed":
            if return_std:
                raise ValueError("return_std with kernel='precomputed': it needs k(x, x) of the new rows, which is not in X")
            return tiles.known(X, False).matvec(self.dual_coef_), None
        x, x_fit = self._inputs(X), self._inputs(self.X_fit_)
        if _is_graphs(x):
            x, x_fit = x.like(x_fit), x_fit.like(x)
        kernel_fn = self._kernel_fn(x_fit)
        K_test = tiles.cross(kernel_fn, x, x_fit, self._side(x_fit), quiet=True)
        f, sd = K_test.matvec(self.dual_coef_), None
        if return_std:
            K = self._gram(self.X_fit_, np.arange(len(x_fit)))
            sd = model.deviation(self.about_, K, K_test, tiles.diagonal(kernel_fn, x, 16))
        return f, sd

    def _checked(self, X, y="no_validation", reset=True):
        """X, and y where it is given, checked: finite numbers, of the shape that was fitted."""
        if _is_graphs(X):
            if isinstance(y, str):
                return X
            y = check_array(y, ensure_2d=False, dtype=None if is_classifier(self) else "numeric")
            check_consistent_length(X, y)
            return X, y
        if isinstance(X, (list, tuple)) and hasattr(X[0] if X else None, "shape"):  # of arrays
            X = np.asarray(X)
        options = {"dtype": "numeric", "multi_output": not is_classifier(self), "allow_nd": True, "ensure_min_samples": 2}
        if isinstance(y, str):
            del options["multi_output"], options["ensure_min_samples"]
        if getattr(X, "ndim", 2) < 3:
            return validate_data(self, X, y, reset=reset, **options)
        shape = X.shape[1:]  # what scikit-learn calls n_features
        if reset:
            self.shape_fit_ = shape
        elif shape != getattr(self, "shape_fit_", None):
            raise ValueError(f"X has shape {X.shape}; expected inputs of the shape that was fitted")
        return check_array(X, **options) if isinstance(y, str) else check_X_y(X, y, **options)


class KernelRegressor(RegressorMixin, _Kernel):
    """Kernel regression of numbers y (n,) or (n, c), in whatever units: every output has its own standard deviation, and where
    there are several each is divided by its own for the choice of their ridge.

    Attributes: X_fit_, dual_coef_ (alpha, (n, c)), intercept_ (the mean of y), ridge_ (that was chosen), compared_ (ridges and
    their errors), n_iter_ (CG steps), residual_ (of the solve), n_features_in_ for X (n, d).
    """

    def fit(self, X, y):
        """Choose the ridge and solve.  Returns self.  ValueError: X or y do not fit each other, or are not finite numbers."""
        X, y = self._checked(X, y)
        y = np.asarray(y, np.float64)
        self.intercept_, self._flat = y.mean(axis=0), y.ndim == 1
        Y = (y - self.intercept_).reshape(len(y), -1)
        sd = Y.std(axis=0)
        unit = np.where(sd > 0, sd, 1) if len(sd) > 1 else 1.0  # the ridge is not chosen for the largest numbers
        return self._fit(X, Y / unit, unit)

    def predict(self, X, return_std=False):
        """f (m,) or (m, c); with return_std also its predictive standard deviation, of kind nngp: a solve a row."""
        f, sd = self._scores(X, return_std)
        sd = sd if sd is None or self._flat else np.outer(sd, self._scales)
        f = (f[:, 0] if self._flat else f) + self.intercept_
        return (f, sd) if return_std else f

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class KernelClassifier(ClassifierMixin, _Kernel):
    """Kernel regression of classes: one output a class, 1 - 1/classes for it and -1/classes else; the largest is the answer.

    Attributes: as of KernelRegressor, and classes_.
    """

    def fit(self, X, y):
        """Choose the ridge and solve.  Returns self.  ValueError: X or y do not fit each other, or there is one class."""
        X, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"all {len(y)} rows are of class {self.classes_[0]!r}; expected two or more classes")
        return self._fit(X, data.one_hot(labels.astype(np.int64), len(self.classes_)))

    def decision_function(self, X):
        """The outputs (m, classes); with two classes, as scikit-learn has it, that of the second, (m,)."""
        f, _ = self._scores(X)
        return f[:, 1] if len(self.classes_) == 2 else f

    def predict(self, X):
        """The class with the largest output, (m,)."""
        best = self._scores(X)[0].argmax(axis=1)
        return self.classes_[best]

    def predict_proba(self, X, return_std=False):
        """Probabilities (m, classes): each output is normal, its standard deviation the error on rows left out; or with
        return_std=True the predictive one, of kind nngp: a solve a row."""
        f, sd = self._scores(X, return_std)
        if sd is None and self.about_["error"] is None:
            raise ValueError(f"no probabilities: ridge={self.ridge_:.1e} is within the rounding of K, so leave-one-out fails. "
                             "Raise the ridge, or use return_std=True")
        return uncertainty.probabilities(f, self.about_["error"] if sd is None else sd)


def _is_graphs(x):
    return hasattr(x, "atoms")


def side(x):
    """Side of a tile: a power of two, so that few shapes are compiled, for about a second of work, and ten tiles or more."""
    most = 1024 if _is_graphs(x) else max(16, 2**15 // max(32, math.prod(x.shape[1:-1])))
    return min(most, max(8, 2 ** math.ceil(math.log2(-(-len(x) // 4)))))


