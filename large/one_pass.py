"""Every ridge in one pass over K, and few ridges of a large K.

A solve (pcg.steps) is a generator that asks for K v or for M^-1 r. Several of them run side by side: what they ask for is
computed together, so that one product with K, and one look at F, serves the columns of all. A product with ten columns or with
a hundred and fifty reads K once.

    Of many ridges, every third is solved first. The others start from the best combination of those solutions, with the
    preconditioner of the nearest ridge: most are then done at once.
    Of a large K (LARGE rows), leave-one-out on the first rows says with which ridge to begin. Its neighbours are compared with
    it, and so on until the best ridge has been compared with both neighbours.
    Where reading K costs most, the solve for the whole of K goes on with the products of the search.

    solver = one_pass.Solver(K, ridges=ridges);  for some in solver.solutions(y, ridges, 1e-3): ...

Cost: a product has c columns for each ridge; the vectors of all solves that run at once take PASS bytes at most.
Proved by: large/test_large.py, section search
"""

import numpy as np
from tqdm import tqdm

import choose
import pcg
import regression

EVERY = 3  # of the ridges that are compared, one in so many is solved first
LARGE = 2 * choose.DENSE  # rows of K from which not all ridges are compared
PASS = 3 * 2**26  # bytes, at most, of the vectors of the solves that run at once
TINY = 1e-100  # a ridge of 0 counts as this


class Run:
    """A solve that `pcg.steps` has begun.  asked: what it waits for, (None, v) or (precondition, r), or None at its end.
    found: what it returned, or the Indefinite that it raised."""

    def __init__(self, solve):
        self.solve, self.found = solve, None
        self.go_on(None)

    def go_on(self, answer):
        self.asked = None
        try:
            self.asked = self.solve.send(answer)
        except StopIteration as end:
            self.found = end.value
        except pcg.Indefinite as error:
            self.found = error


def together(matvec, runs, beside=(), quiet=True):
    """What each of these Runs finds. They run side by side: one product serves all columns of all of them, and of those
    `beside`, which go on only as long as the others do."""
    runs, count = list(runs), 0
    bar = tqdm(total=len(runs), unit="ridge", desc="ridges", disable=quiet or None, leave=False)
    while any(run.asked for run in runs):
        waiting = [run for run in (*runs, *beside) if run.asked]
        if any(run.asked[0] for run in waiting):  # M^-1 first, so that then all wait for K
            waiting = [run for run in waiting if run.asked[0]]
            answers = _preconditioned(*zip(*(run.asked for run in waiting)))
        else:
            vs = [run.asked[1] for run in waiting]
            ends, count = np.cumsum([v.shape[1] for v in vs]), count + 1
            bar.set_postfix_str(f"product {count} with K, {ends[-1]} columns")
            answers = np.split(matvec(vs[0] if len(vs) == 1 else np.concatenate(vs, axis=1)), ends[:-1], axis=1)
        for run, answer in zip(waiting, answers):
            run.go_on(answer)
        bar.update(sum(not run.asked for run in runs) - bar.n)
    bar.close()
    return [run.found for run in runs]


def _preconditioned(inverses, rs):
    """[M^-1 r, ...], together where several come from one LowRank."""
    answers = [None] * len(rs)
    for low in {id(inverse): inverse for inverse in (getattr(one, "low", one) for one in inverses)}.values():
        which = [i for i, one in enumerate(inverses) if getattr(one, "low", one) is low]
        found = (low.apply([inverses[i] for i in which], [rs[i] for i in which]) if hasattr(low, "apply")
                 else [low(rs[i]) for i in which])
        for i, answer in zip(which, found):
            answers[i] = answer
    return answers


def padded(solve, n):
    """The solve of a leading block as one of the whole (n, n) matrix: its v get zeros below, and of K v it takes the first
    rows."""
    answer = None
    while True:
        try:
            precondition, v = solve.send(answer)
        except StopIteration as end:
            return end.value
        if precondition:
            answer = yield precondition, v
        else:
            answer = (yield None, np.concatenate([v, np.zeros((n - len(v), v.shape[1]))]))[:len(v)]


def projected(X, KX, y, ridge):
    """The x in the span of solutions for other ridges with the smallest error (x - A^-1 y)^T A (x - A^-1 y), column by column:
    where a solve may start.   X: solutions (n, c).   KX: K times each.   y: (n, c)."""
    x = np.empty(y.shape)
    for j in range(y.shape[1]):
        V, KV = (np.stack([one[:, j] for one in many]) for many in (X, KX))
        S, U = np.linalg.eigh(V @ V.T)
        U = (U / np.sqrt(np.maximum(S, 1e-300)))[:, S > 1e-12 * S[-1]]  # V^T U is an orthonormal basis
        x[:, j] = V.T @ (U @ np.linalg.solve(U.T @ (V @ KV.T) @ U + ridge * np.eye(U.shape[1]), U.T @ (V @ y[:, j])))
    return x


class Solver(regression.Solver):
    """A regression.Solver that solves for several ridges at once."""
    begun, whole = {}, None

    def leading(self, n):
        """As in regression.Solver; its products serve what was begun."""
        part = super().leading(n)
        part.whole = self if self.begun else None
        return part

    def __call__(self, y, ridge, tol=1e-6, x0=None):
        (run, right), self.begun = self.begun.get((ridge, tol), (None, None)), {}
        if run is None or x0 is not None or not np.array_equal(right, y):
            return super().__call__(y, ridge, tol, x0)
        found, = self._together([run], True)
        if isinstance(found, pcg.Indefinite):
            raise found
        return found

    def begin(self, y, ridges, tol):
        """Begin these solves: they go on with the products of others, and one of them is then called for."""
        self.begun = {(ridge, tol): (self._run(y, ridge, self.ready(ridge * self.scale), tol), y) for ridge in ridges}

    def solutions(self, y, ridges, tol):
        """As in regression.Solver, all ridges at once, or as many as memory allows."""
        ridges, most = sorted(set(ridges), reverse=True), at_once(y)
        for start in range(0, len(ridges), most):
            some, found = ridges[start:start + most], []
            for ridge, one in zip(some, self.each(y, some, tol)):
                if isinstance(one, pcg.Indefinite):
                    if not found and not start:
                        raise one
                    if self.verbose:
                        print(f"ridge {ridge:.2g}: {one}")
                    break
                found.append((ridge, one[0]))
            if found:
                yield found
            if len(found) < len(some):
                return

    def each(self, y, ridges, tol=1e-6):
        """What a call returns for each of the ridges, or the Indefinite that it raises, in one pass."""
        first = [*ridges[:-1:EVERY], ridges[-1]] if len(ridges) > EVERY else ridges
        inverses = {ridge: self.ready(ridge * self.scale) for ridge in first}
        quiet = self.quiet or len(ridges) > 1
        runs = [self._run(y, ridge, inverses[ridge], tol, None, quiet) for ridge in first]
        found = dict(zip(first, self._together(runs)))
        solved = [one[0] for one in found.values() if not isinstance(one, pcg.Indefinite)]
        rest, runs, starts = [ridge for ridge in ridges if ridge not in first], [], {}
        if rest and solved:
            KX = np.split(self.K.matvec(np.concatenate(solved, axis=1)), len(solved), axis=1)
            starts = {ridge: projected(solved, KX, y, ridge * self.scale) for ridge in rest}
        for ridge in rest:
            near = min(inverses, key=lambda other: abs(np.log((other + TINY) / (ridge + TINY))))
            runs.append(self._run(y, ridge, inverses[near], tol, starts.get(ridge), quiet))
        found.update(zip(rest, self._together(runs)))
        return [found[ridge] for ridge in ridges]

    def _run(self, y, ridge, inverse, tol, x0=None, quiet=True):
        """A solve, begun."""
        solve = pcg.steps(y, ridge * self.scale, inverse, tol, self.max_iters, x0, quiet,
                          self.keep and self.keep(ridge=ridge, tol=tol, y=y), self.drop)
        return Run(padded(solve, self.whole.K.shape[0]) if self.whole else solve)

    def _together(self, runs, quiet=False):
        """What these runs find, with errors in terms of the relative ridge."""
        beside, K = ([run for run, _ in self.whole.begun.values()], self.whole.K) if self.whole else ((), self.K)
        found = together(K.matvec, runs, beside, quiet or self.quiet or len(runs) < 2)
        return [self.relative(one) if isinstance(one, pcg.Indefinite) else one for one in found]


def at_once(y):
    """How many solves with right-hand sides y may run at once: each takes ten arrays like y."""
    return max(1, PASS // (10 * 8 * y.size))


def first(K, y, ridges, copies=1, by="mse", prior=None, intercept=False):
    """The ridges to begin with: all, or of a large K those around the best for its first rows."""
    if K.shape[0] < LARGE or by != "mse" or hasattr(K, "mask"):
        return ridges
    return around(first_guess(K, y, ridges, copies, prior, intercept), ridges)


def first_guess(K, y, ridges, copies, prior, intercept):
    """The best ridge for the first rows, a quarter of all and choose.DENSE at most, by leave-one-out."""
    n = min(K.shape[0] // 4, choose.DENSE) // copies * copies
    spectrum = choose.Spectrum(K.leading(n).columns(np.arange(n)), None if prior is None else prior.mean(), intercept)
    ridge = choose.best(choose.leave_one_out(spectrum, y[:n], ridges, copies=copies)).ridge
    return regression.agreed(K, ridge)


def walk(solver, y, compare, some, ridges, by="mse", begin=None):
    """[choose.Row, ...] of `some` of the ridges, and of more until the best has been compared with both its neighbours.

    compare: ridges -> [Row, ...].   begin: the residual of a solve for all rows of K that may go on meanwhile, or None.
    Indefinite: even the largest ridge is within the rounding of K.
    """
    if begin and len(some) <= 3 and at_once(y) >= 2 * len(some) and _dear(solver.K, y.shape[1]):
        solver.begin(y, some, begin)
    table, seen = [], []
    while some:
        try:
            table += compare(some)
        except pcg.Indefinite:
            if not table and max(some) == max(ridges):
                raise
        seen += some
        best_yet = regression.agreed(solver.K, choose.best(table, by).ridge if table else max(seen))
        some = [ridge for ridge in around(best_yet, ridges) if ridge not in seen]
        table.sort(key=lambda row: -row.ridge)
    return table


def around(ridge, ridges):
    """The ridge and its neighbours, from the largest down."""
    ridges = sorted(set(ridges), reverse=True)
    i = ridges.index(ridge)
    return ridges[max(0, i - 1):i + 2]


def _dear(K, c):
    """Whether a pass over K costs more than more columns in it, so that it pays to solve for several ridges meanwhile. One
    answer for all processes, for they take part in each other's sums, though they have memory for different caches."""
    dear = K.slowness > 2 + 0.4 * c or getattr(getattr(K, "tiles", None), "direct", False)  # from a disk, past the cache
    return bool(K.team.all_reduce(np.array([float(dear)]))[0])
