"""Graphs: their layers, data and experiment.

Each test states its claim in its first line. JAX is set up by test_all.py, which is imported first.
"""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys

from test_all import (  # isort: skip
    HERE, commands, linear, optimised, reference, refitted, relative_error,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import choose
import kernel
import pcg
import regression
import tiles
from molecules import graphs, missing
from molecules import layers as graph_layers
from molecules import smiles as files
from molecules import train as train_molecule

MOLECULES = os.path.join(HERE, "..", "shared", "data", "molecules")
needs_molecules = pytest.mark.skipif(not os.path.exists(MOLECULES), reason="the data sets of molecules are missing")
needs_rdkit = pytest.mark.skipif(importlib.util.find_spec("rdkit") is None, reason="RDKit is not installed")

# ----------------------------------------------------------------------------------------- graphs

def random_graph(rng, n, nodes, features=3, degree=7):
    """A graph of n nodes, padded to `nodes`, as the kernels take it; each node has 1 to `degree` neighbours."""
    x = np.zeros((nodes, features + 2 * degree))
    x[:n, :features] = rng.normal(size=(n, features))
    for row in x[:n]:
        some = rng.choice(n, size=rng.integers(1, min(n, degree) + 1), replace=False)
        row[features:features + len(some)] = some
        row[features + degree:features + degree + len(some)] = rng.uniform(0.2, 1, size=len(some))
    return x


def dense_graphs(layers, x1, x2):
    """NNGP and NTK of two graphs without padding, from the formulas, with NumPy's arccos."""
    degree, f = layers[0][1], x1.shape[1] - 2 * layers[0][1]
    A1, A2 = np.zeros((len(x1),) * 2), np.zeros((len(x2),) * 2)
    for A, x in ((A1, x1), (A2, x2)):
        for p, row in enumerate(x):
            for number, weight in zip(row[f:f + degree].astype(int), row[f + degree:]):
                A[p, number] += weight
    state = {"12": (x1, x2, A1, A2), "11": (x1, x1, A1, A1), "22": (x2, x2, A2, A2)}
    K = {key: x[:, :f] @ y[:, :f].T / f for key, (x, y, _, _) in state.items()}
    T, kept = np.zeros_like(K["12"]), []
    for layer in layers:
        if layer[0] == "aggregate":
            K, T = {key: state[key][2] @ K[key] @ state[key][3].T for key in K}, A1 @ T @ A2.T
        elif layer[0] == "dense":
            K = {key: layer[1]**2 * k + layer[2]**2 for key, k in K.items()}
            T = K["12"] + layer[1]**2 * T
        elif layer[0] == "relu":
            sd = {key: np.sqrt(np.diag(K[key])) for key in ("11", "22")}
            scale = {key: np.outer(sd[key[0] * 2], sd[key[1] * 2]) for key in K}
            cosine = {key: np.clip(K[key] / scale[key], -1, 1) for key in K}
            T = T * (np.pi - np.arccos(cosine["12"])) / (2 * np.pi)
            K = {key: scale[key] / (2 * np.pi) * (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c)
                 for key, c in cosine.items()}
        elif layer[0] == "jump":
            kept.append((K["12"], T))
        else:
            pool = np.sum if layer[0] == "sum" else np.mean
            K, T = {"12": sum(pool(k) for k, _ in [*kept, (K["12"], T)])}, sum(pool(t) for _, t in [*kept, (0, T)])
    return K["12"], T


def sum_of_nodes(layers, kind):
    """A kernel that compiles at once, in place of graphs.kernel_fn: <u, u'>, u the sum over the nodes p of (A x)_p, and as NTK
    the same plus its square."""
    degree = layers[0][1]

    def total(graph):
        features, numbers, weights = jnp.split(graph, graph.shape[1] - np.array([2, 1]) * degree, axis=1)
        return jnp.einsum("pq,pqf->f", weights, features[numbers.astype(jnp.int32)], precision="highest")

    def fn(x1, x2):
        K = linear(jax.vmap(total)(x1), jax.vmap(total)(x2))
        return kernel.chosen(kind, K, K + K**2)
    return fn


@pytest.mark.parametrize("options", [{"hidden": 2}, {"pool": "mean", "w_std": 1.2, "b_std": 0.3}], ids=str)
def test_graphs_are_neural_tangents(options):
    """K and T equal neural_tangents' on the graphs without padding to 1e-10 in float64, for graphs of different sizes, one
    of a single node, and directed edges with any weight. For every other pair of sizes they equal the dense formula."""
    rng, layers = np.random.default_rng(0), graph_layers.gcn(7, 2, **options)
    sizes = (1, 6), (4, 9)
    x1, x2 = (np.stack([random_graph(rng, n, 11) for n in of for _ in range(2)]) for of in sizes)
    exact = optimised(kernel.kernel_fn(layers, kernel.KINDS))(x1, x2)
    for i, p in enumerate(sizes[0]):
        for j, q in enumerate(sizes[1]):
            block = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
            some = x1[block[0], :p], x2[block[1], :q]
            expected = [[[dense_graphs(layers, a, b)[k] for b in some[1]] for a in some[0]] for k in range(2)]
            if i == j:  # neural_tangents compiles anew for each pair of sizes
                by_stax = reference(layers, kernel.KINDS, *some)
                assert relative_error(expected, by_stax) < 1e-10
                expected = by_stax
            assert all(relative_error(K[block], want) < 1e-10 for K, want in zip(exact, expected))


@pytest.mark.parametrize("side, options", [
    (32, {}), (16, {"pool": "mean", "w_std": 1.2, "b_std": 0.3, "jump": True})], ids=str)
def test_graphs_are_the_formula(side, options, monkeypatch):
    """graphs.py, with bins of 32 nodes and 3 graphs, equals the dense formula in NumPy to 1e-10 in float64, and so does
    kernel.py with jump. side: a bin is computed in blocks, as on a CPU, or whole, as on a GPU."""
    for what, number in (("SMALL", 32), ("SIDE", side), ("STRIPE", side)):
        monkeypatch.setitem(getattr(graphs, what), "cpu", number)
    monkeypatch.setattr(graphs, "NODES", 32)
    monkeypatch.setattr(graphs, "GRAPHS", 3)
    rng, layers, sizes = np.random.default_rng(0), graph_layers.gcn(7, 2, **options), (1, 20, 3, 2, 1, 9, 17, 16, 12, 1, 1)
    x = np.stack([random_graph(rng, n, 20) for n in sizes])
    expected = np.moveaxis([[dense_graphs(layers, a[:n], b[:m]) for m, b in zip(sizes[4:], x[4:])]
                            for n, a in zip(sizes, x[:4])], -1, 0)
    for fn in [graphs.kernel_fn] + [kernel.kernel_fn] * ("jump" in options):
        for K, want in zip(fn(layers, kernel.KINDS)(x[:4], x[4:]), expected):
            assert K.dtype == float and relative_error(K, want) < 1e-10


def ring_of_trees(rng, n, nodes, kinds=2, degree=4):
    """A ring of n nodes of a few kinds, some of them with a leaf, so that many nodes have the same surroundings."""
    lists = [[i, (i - 1) % n, (i + 1) % n] for i in range(n)]
    for i in rng.choice(n, size=n // 6, replace=False):
        lists.append([len(lists), i])
        lists[i].append(len(lists) - 1)
    x = np.zeros((nodes, kinds + 2 * degree), np.float32)
    for row, kind, one in zip(x, (rng.random(len(lists)) < 0.1).astype(int), lists):
        row[kind] = 1
        row[kinds:kinds + len(one)] = rng.permutation(one)
        row[kinds + degree:kinds + degree + len(one)] = 0.5
    return x


def surroundings(x, kinds, degree, steps):
    """The surroundings of every node of a graph up to so many steps, as nested tuples."""
    seen = [tuple(row[:kinds]) for row in x]
    for _ in range(steps):
        seen = [tuple(sorted((seen[int(q)], w) for q, w in zip(row[kinds:kinds + degree], row[kinds + degree:]) if w))
                for row in x]
    return seen


def test_graphs_nodes_that_look_alike(monkeypatch):
    """A bin has one class for each distinct surrounding of its nodes after one, two and three rounds, whatever the order of
    the neighbours; these are far fewer than nodes. If all hashes collide there are more classes, and K still equals
    kernel.py's to 1e-6."""
    rng, layers = np.random.default_rng(0), graph_layers.gcn(4)
    x = np.stack([ring_of_trees(rng, n, 30) for n in rng.integers(12, 21, size=16)])
    hashed, bins, made = graphs.hashed, graphs.bins, []
    monkeypatch.setattr(graphs, "bins", lambda *args: made.append(bins(*args)) or made[-1])

    @jax.jit
    def computed(x1, x2, factor):
        """K and T, and the bins from which they were computed; all hashes are multiplied by `factor`."""
        monkeypatch.setattr(graphs, "hashed", lambda rows: factor * hashed(rows))
        return graphs.kernel_fn(layers, kernel.KINDS).__wrapped__(x1, x2), made[-1][0].counts, made[-1][3]

    exact = [np.asarray(K, np.float64) for K in kernel.kernel_fn(layers, kernel.KINDS)(x[:8], x[8:])]
    for collide in (False, True):
        found_by_us, counts, count = computed(x[:8], x[8:], np.uint32(not collide))
        assert count == 2 and len(made) == 1  # one program for both
        for i, half in enumerate((x[:8], x[8:])):
            found = np.asarray(counts[i]) - 1  # one class is that of the rows without a node
            nodes = [graph[graph.any(axis=1)] for graph in half]
            want = [len({one for graph in nodes for one in surroundings(graph, 2, 4, k)}) for k in (1, 2, 3)]
            assert (found >= want).all() and (collide and found[2] > want[2] or (found == want).all())
            assert want[2] < 0.8 * np.count_nonzero(half.any(axis=2))
        for K, want in zip(found_by_us, exact):
            assert relative_error(K, want) < 1e-6


def test_graphs_symmetry_and_tiles():
    """fn(x) equals fn(x, x) and is symmetric to the last bit. Tiles of Graphs, which are padded only when read, are parts
    of it, and `take` returns the graphs asked for."""
    rng = np.random.default_rng(0)
    x = np.stack([random_graph(rng, n, 9) for n in rng.integers(1, 10, size=13)]).astype(np.float32)
    fn = graphs.kernel_fn(graph_layers.gcn(7, 1), "nngp")
    K = np.asarray(fn(x))
    assert (K == K.T).all()
    lengths = (x != 0).any(axis=2).sum(axis=1)
    kept = files.Graphs(np.concatenate([one[:n] for one, n in zip(x, lengths)]),
                            np.concatenate([[0], np.cumsum(lengths)]), 7, 9)
    assert (kept[np.arange(13)] == x).all() and (kept.take([4, 4, 2])[np.arange(3)] == x[[4, 4, 2]]).all()
    for tiled in (tiles.gram(fn, kept, 5, quiet=True), tiles.cross(fn, kept, kept, 5, quiet=True)):  # the latter is fn(x, x)
        assert relative_error(tiled.dense(), K.astype(np.float64)) < 1e-6


@pytest.mark.parametrize("call, words", [
    (lambda: graph_layers.gcn(0), "degree=0, depth=3, hidden=1, pool='sum', .*: expected three positive"),
    (lambda: graph_layers.gcn(4, pool="max"), "pool='max', .*: expected .* sum or mean"),
    (lambda: graphs.kernel_fn(graph_layers.gcn(4), "ntk")(np.ones((2, 3, 8))), r"\(2, 3, 8\).*features \+ 2 degree"),
    (lambda: kernel.kernel_fn(graph_layers.gcn(4), "ntk")(np.ones((3, 9))), r"\(3, 9\).*graphs \(n, nodes, features"),
    (lambda: graphs.kernel_fn(graph_layers.gcn(4), "ntk")(np.ones((2, 3, 9)), np.ones((2, 4, 9))), "must agree"),
    (lambda: graphs.kernel_fn(kernel.network("fc"), "ntk"), "graphs.py takes .*use kernel.kernel_fn"),
    (lambda: graphs.kernel_fn(graph_layers.gcn(4) + [("relu",), ("dense", 1.0, 0.0)], "ntk"), "use kernel.kernel_fn"),
    (lambda: graphs.kernel_fn(graph_layers.gcn(4), "gp"), "'gp' is unknown; choose nngp or ntk"),
])
def test_graphs_errors(call, words):
    """An argument that does not fit is refused with one line."""
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------- molecules

ODD = ("C", "[Na+].[Cl-]", "CCO", "c1ccccc1C(=O)O", "FS(F)(F)(F)(F)F", "C[C@H](N)C(=O)O", "CC(C)(C)c1ccc2ncccc2c1",
       "[CH]12[CH]3[CH]4[CH]5[CH]1[Fe]23451678[CH]2[CH]1[CH]6[CH]7[CH]28")  # a single atom; 6 and 10 neighbours

@needs_rdkit
def test_molecules_are_neural_tangents(monkeypatch):
    """On padded real molecules of 1 to 14 atoms (an isolated atom, a salt, a metal with ten neighbours), in several bins, K in
    float32 equals the dense formula to 1e-5 on every pair, however the atoms are numbered, and neural_tangents in float64 on
    two pairs. fn(x) is symmetric to the last bit."""
    from rdkit import Chem
    monkeypatch.setattr(graphs, "GRAPHS", 6)
    mols, rng = [files.read(one) for one in ODD], np.random.default_rng(0)
    mols += [Chem.RenumberAtoms(mol, rng.permutation(mol.GetNumAtoms()).tolist()) for mol in mols]
    x = files.graphs(mols, least=23)
    layers, packed, sizes = graph_layers.gcn(x.degree, 2), x[np.arange(len(mols))], np.diff(x.starts)
    assert x.degree == 11 and sizes.min() == 1 and sizes.max() >= 11 and packed.shape[1] == 23
    fast = [np.asarray(K) for K in graphs.kernel_fn(layers, kernel.KINDS)(packed)]
    assert all(K.dtype == np.float32 and (K == K.T).all() for K in fast)
    exact, n = [one[:size].astype(np.float64) for one, size in zip(packed, sizes)], len(ODD)
    for pair in np.ndindex(n, n):
        for K, want in zip(fast, dense_graphs(layers, *(exact[i] for i in pair))):
            copies = K.reshape(2, n, 2, n)[:, pair[0], :, pair[1]]
            assert relative_error(copies, want) < 1e-5, (pair, copies, want)
    metals = np.stack([one[:sizes[7]].astype(np.float64) for one in packed[[7, 7 + n]]])  # the same, with other numbers
    for K, want in zip(fast, reference(layers, kernel.KINDS, metals, exact[0][None])):
        assert relative_error(K[[7, 7 + n], 0], want[:, 0]) < 1e-5


@needs_rdkit
def test_molecules_graph_of_one():
    """The features and weights of ethanol, and the weights of a carbonyl with bond orders, are those computed by hand."""
    mol = files.read("CCO")
    x = files.graphs([mol])
    features = x.atoms[:, :-2 * x.degree]
    assert x.degree == 3 and (features.sum(axis=1) == 6).all()
    assert (features[0] == features[1]).sum() < features.shape[1] and features[2, 2] == 1  # oxygen
    A = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1.0]])
    for weights, mol, A in (("sum", mol, A), ("normal", mol, A), ("order", files.read("C=O"), [[1, 2], [2, 1]])):  # noqa: B020
        A = np.array(A, float)
        x = files.graphs([mol], weights)
        got = np.asarray(graph_layers.adjacency(jnp.asarray(x[:1])[0][:, None], x.degree))
        root = np.sqrt(A.sum(axis=1))
        assert np.allclose(got, A if weights == "sum" else A / np.outer(root, root), atol=1e-7)


@needs_rdkit
@pytest.mark.parametrize("name", files.FINGERPRINTS)
def test_molecules_fingerprints(name):
    """Fingerprints are log(1 + counts) of RDKit's patterns. Several are concatenated, each with norm 1, or zero if a
    molecule has no such pattern."""
    from rdkit.Chem import rdFingerprintGenerator
    mols = [files.read(one) for one in (*ODD, "CCO")]
    x, make = files.fingerprints(mols, [name], bits=512), {
        "morgan": rdFingerprintGenerator.GetMorganGenerator, "pairs": rdFingerprintGenerator.GetAtomPairGenerator,
        "torsions": rdFingerprintGenerator.GetTopologicalTorsionGenerator}[name](fpSize=512, **(
            {"radius": 2} if name == "morgan" else {}))
    for row, mol in zip(x, mols):
        counts = make.GetCountFingerprint(mol).GetNonzeroElements()
        assert set(np.flatnonzero(row)) == set(counts)
        assert np.allclose(np.exp(row[list(counts)]) - 1, list(counts.values()))
        assert name != "morgan" or set(counts) == set(make.GetFingerprint(mol).GetOnBits())
    other = "pairs" if name != "pairs" else "torsions"
    both = files.fingerprints(mols, [other, name], bits=512)[:, 512:]
    assert np.allclose(both * np.linalg.norm(x, axis=1, keepdims=True), x, atol=1e-6)
    assert np.allclose(np.linalg.norm(both, axis=1), x.any(axis=1)) and x[-1].any() == (name != "torsions")


def refined(names, A, steps=4):
    """Hashes of the surroundings of all nodes up to so many steps, sorted: the same for every numbering of the nodes."""
    names, lists = [hash(name) for name in names], [[] for _ in names]
    for i, j in zip(*(of.tolist() for of in np.nonzero(A))):
        lists[i].append((round(float(A[i, j]), 4), j))
    for _ in range(steps):
        names = [hash((name, *sorted((weight, names[j]) for weight, j in near))) for name, near in zip(names, lists)]
    return sorted(names)


def graph_by_rdkit(mol, order):
    """(features of the atoms as words, A) of a molecule, from RDKit alone."""
    names, A = [], np.eye(mol.GetNumAtoms())
    for atom in mol.GetAtoms():
        names.append((atom.GetSymbol() if atom.GetSymbol() in files.ELEMENTS else "other", min(atom.GetDegree(), 6),
                      min(max(atom.GetFormalCharge(), -2), 2), min(atom.GetTotalNumHs(), 4),
                      2 if atom.GetIsAromatic() else int(atom.IsInRing()), atom.GetPropsAsDict(True, True).get("_CIPCode")))
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        A[i, j] = A[j, i] = max(bond.GetBondTypeAsDouble(), 1) if order else 1
    return names, A / np.sqrt(np.outer(A.sum(axis=1), A.sum(axis=1)))


def graph_by_us(mol, order):
    """The same, read back from the array that `graphs` makes."""
    x, start, columns = files.graphs([mol], "order" if order else "normal"), 0, []
    for words in ((*files.ELEMENTS, "other"), range(7), range(-2, 3), range(5), range(3), (None, "R", "S")):
        part = x.atoms[:, start:start + len(words)]
        assert (part.sum(axis=1) == 1).all()
        columns.append([words[k] for k in part.argmax(axis=1)])
        start += len(words)
    A = np.zeros((len(x.atoms),) * 2)
    for row, atom in zip(A, x.atoms[:, start:]):
        np.add.at(row, atom[:x.degree].astype(int), atom[x.degree:])
    return list(zip(*columns)), A


def notations(mol):
    """SMILES of a molecule with atoms in random order, with hydrogens as atoms, kekulized, or with every bond written."""
    from rdkit import Chem
    single = Chem.Mol(mol)
    Chem.Kekulize(single, clearAromaticFlags=True)
    for k, one in enumerate((mol, Chem.AddHs(mol), single, Chem.AddHs(single))):
        yield from Chem.MolToRandomSmilesVect(one, 1, randomSeed=k, kekuleSmiles=k > 1, allBondsExplicit=k % 2 == 0)
        yield from Chem.MolToRandomSmilesVect(one, 1, randomSeed=k, kekuleSmiles=k > 1, allHsExplicit=True)


STEREO = ("OC[C@H]1OC(O)[C@H](O)[C@@H](O)[C@@H]1O", "C[C@H]1CC[C@@H](C)CC1", "C[C@H](O)[C@@H](O)[C@@H](C)O", "F[C@H](Cl)Br",
          "O[C@H]1[C@H](O)[C@@H](O)[C@H](O)[C@@H](O)[C@@H]1O", "C[S@](=O)c1ccccc1", "C/C=C\\[C@H](O)/C=C/C", "[2H][C@H](O)C",
          "C[C@]12CC[C@H]3[C@@H](CC[C@@H]4C[C@@H](O)CC[C@]34C)[C@@H]1CC[C@@H]2O", "[H]/N=C/C", "F/C=C/F", "[13CH4]", "[2H]C")


@needs_rdkit
def test_molecules_written_in_any_way():
    """Every notation of a molecule gives the same graph up to numbering, and the same fingerprints, as RDKit's own reading:
    random orders of atoms, hydrogens as atoms, kekulized, every bond written. Tested on 500 molecules of NCI, sugars, a
    steroid, isotopes, and stereo marks at rings and double bonds."""
    from rdkit import Chem, RDConfig
    from rdkit.Chem import rdFingerprintGenerator
    lines = open(os.path.join(RDConfig.RDDataDir, "NCI", "first_5K.smi")).read().splitlines()
    make, seen = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048), 0
    for number, smiles in enumerate([*(line.split()[0] for line in lines[::10]), *STEREO]):
        mol = Chem.MolFromSmiles(smiles)
        if mol is None:
            continue
        order = number % 2 == 0
        wanted = refined(*graph_by_rdkit(mol, order))
        counts, seen = np.log1p(make.GetCountFingerprintAsNumPy(mol), dtype=np.float32), seen + 1
        written = {smiles, *notations(mol)}
        mols = [files.read(one) for one in written]
        for one, other in zip(written, mols):
            assert refined(*graph_by_us(other, order)) == wanted, (smiles, one)
        assert (files.fingerprints(mols) == counts).all(), smiles
    assert seen > 500


@needs_rdkit
def test_molecules_hydrogens_and_marks():
    """Explicit hydrogens, stereo marks without a stereocentre and valences that RDKit refuses do not change graph and
    fingerprint. Molecules made of hydrogen alone have a graph, and mirror images have different graphs."""
    def same(one, other):
        mols = [files.read(one), files.read(other)]
        x, y = (refined(*graph_by_us(mol, True)) for mol in mols)
        return x == y and (np.ptp(files.fingerprints(mols, files.FINGERPRINTS), axis=0) == 0).all()
    for one, other, atoms in [
            ("[H]C([H])([H])[H]", "C", 1), ("[H]OCC", "CCO", 3), ("[H]O[H]", "O", 1), ("C[C@H](C)O", "CC(C)O", 4),
            ("C[C@@H](C)[C@](C)(C)C", "CC(C)C(C)(C)C", 7), ("C/C=C", "CC=C", 3), ("[H]n1cccc1", "c1cc[nH]c1", 5),
            ("[H]N(C)(C)(C)C", "C[NH](C)(C)C", 5), ("[H]F(C)C.[H]OC", "C[FH]C.CO", 5), ("C[C@H](C)F(C)C", "CC(C)F(C)C", 6),
            ("[H][H]", "[H][H]", 2), ("[H+]", "[H+]", 1), ("[H]", "[H]", 1), ("[2H][H]", "[H][2H]", 2),
            ("[H-].[Na+]", "[Na+].[H-]", 2)]:
        assert same(one, other) and files.read(one).GetNumAtoms() == atoms, one
        assert files.graphs([one])[:1].shape[1] == atoms and np.isfinite(files.fingerprints([one])).all()
    assert files.read("[2H]C").GetNumAtoms() == 2 and not same("[2H]C", "C")
    assert not same("C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O") and same("C[C@H](N)C(=O)O", "OC(=O)[C@@H](N)C")


@needs_rdkit
@pytest.mark.parametrize("smiles", ["C1CC", "", "nothing", "CC>>CO", None, float("nan")], ids=str)
def test_molecules_unreadable(smiles):
    """A molecule that RDKit cannot read is named in one line, by `read` and by every function that takes molecules."""
    with pytest.raises(ValueError, match=re.escape(f"SMILES {smiles!r}: RDKit cannot read it")) as error:
        files.read(smiles)
    assert "\n" not in str(error.value)
    for make in (files.graphs, files.fingerprints):
        with pytest.raises(ValueError, match="RDKit cannot read it|molecule 1 .* of 2 is (None|nan)"):
            make(["CCO", smiles])
        with pytest.raises(ValueError, match="molecule 1 .* of 2 is None; expected"):
            make([files.read("CCO"), None])
        with pytest.raises(ValueError, match="got no molecules"):
            make([])
        assert (make(["CCO"])[:1] == make([files.read("CCO")])[:1]).all()


def write_csv(path, head, lines):
    with (gzip.open if str(path).endswith(".gz") else open)(path, "wt") as file:
        file.write("\n".join([head, *lines]) + "\n")


@pytest.fixture
def molecule_folder(tmp_path):
    """A folder with small files of every data set: 30 alkanes, alcohols and amines, with two labels."""
    smiles = [f"C{'C' * (i // 3)}{('', 'O', 'N')[i % 3]}" for i in range(30)]
    write_csv(tmp_path / "delaney-processed.csv", "Compound ID,measured log solubility in mols per litre,smiles",
              [f"x,{i / 7:.3f},{one}" for i, one in enumerate(smiles)])
    write_csv(tmp_path / "HIV.csv", "smiles,activity,HIV_active", [
        f"{one},CI,{i % 2}" for i, one in enumerate(smiles)])
    np.savez(tmp_path / "ogbg-molhiv_scaffold_split.npz", train=np.arange(20), val=np.arange(20, 25),
             test=np.arange(25, 30))
    labels = [(f"{i % 2}" if i % 3 else "", f"{i // 2 % 2}" if i % 5 else "") for i in range(30)]
    write_csv(tmp_path / "muv.csv.gz", "A,B,mol_id,smiles", [
        f"{a},{b},id{i},{one}" for i, ((a, b), one) in enumerate(zip(labels, smiles))])
    for folder in ("mapping", "split/scaffold"):
        os.makedirs(tmp_path / "pcba" / folder)
    write_csv(tmp_path / "pcba" / "mapping" / "mol.csv.gz", "task_1,task_2,smiles,mol_id", [
        f"{a},{b},{one},id" for (a, b), one in zip(labels, smiles)])
    for part, (first, last) in {"train": (0, 20), "valid": (20, 25), "test": (25, 30)}.items():
        write_csv(tmp_path / "pcba" / "split" / "scaffold" / f"{part}.csv.gz", str(first),
                  map(str, range(first + 1, last)))
    return tmp_path


@needs_rdkit
def test_molecules_files(molecule_folder):
    """Every data set is read from files in its format: targets, missing labels as NaN, the official split."""
    esol, hiv, muv = (files.load(name, molecule_folder) for name in ("esol", "molhiv", "muv"))
    pcba, ogb = (files.load(name, molecule_folder / "pcba") for name in ("molpcba",) * 2)
    assert [len(rows.mols) for rows in (esol, hiv, muv, pcba, ogb)] == [30] * 5
    assert np.allclose(esol.y[:, 0], np.round(np.arange(30) / 7, 3)) and (hiv.y[:, 0] == np.arange(30) % 2).all()
    for rows in (muv, pcba):
        assert rows.y.shape == (30, 2) and (np.isnan(rows.y[:, 0]) == (np.arange(30) % 3 == 0)).all()
    for rows in (hiv, pcba):
        train, val, test = files.split(rows, "official", seed=1)
        assert (np.sort(train) == np.arange(20)).all() and (val == np.arange(20, 25)).all() and len(test) == 5
    assert muv.official is None and muv.tasks == ["A", "B"]
    path = molecule_folder / "pcba" / "split" / "scaffold" / "valid.csv.gz"
    for content, words in ((b"1\n" + b"9" * 30, "too large"), ("21".encode("utf-16"), "zero bytes"), (b"1.5", "per line")):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=f"{path}.*{words}") as error:
            files.load("molpcba", molecule_folder / "pcba")
        assert str(error.value).count(str(path)) == 1


@needs_rdkit
def test_molecules_splits():
    """Both splits are disjoint and complete. Scaffold: no ring system is in two parts, and every seed gives the same parts,
    also with an aluminium complex whose valence RDKit's scaffolds refuse."""
    rings = ["c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccc2ccccc2c1", "C1CCOC1", "c1ccsc1"]
    smiles = [ring + "C" * i for k, ring in enumerate(rings) for i in range(1, 9 - k)] + ["CCO", "CCN"]
    smiles.append("O=C1O[Al]23(OC1=O)(OC(=O)C(=O)O2)OC(=O)C(=O)O3")
    rows = files.checked(smiles, np.zeros((len(smiles), 1)), ["y"], None, "made")
    for how in ("random", "scaffold"):
        parts = files.split(rows, how, seed=0)
        assert (np.sort(np.concatenate(parts)) == np.arange(len(smiles))).all() and all(map(len, parts))
    for part, other in zip(parts, files.split(rows, "scaffold", seed=7)):
        assert set(part) == set(other)
    ring_of = [next((k for k, ring in enumerate(rings) if one.startswith(ring)), one[:2])
               for one in smiles]
    of_part = [{ring_of[i] for i in part} for part in parts]
    assert not (of_part[0] & of_part[1] or of_part[0] & of_part[2] or of_part[1] & of_part[2])
    with pytest.raises(ValueError, match="split 'official': this data set has random, scaffold$"):
        files.split(rows, "official")


@needs_rdkit
def test_molecules_bad_rows(molecule_folder, capsys):
    """Rows that RDKit cannot read are named and left out, also of the split; unusual valences are read."""
    path = molecule_folder / "HIV.csv"
    lines = path.read_text().splitlines()
    lines[1 + 3], lines[1 + 21], lines[1 + 26] = "C1CC,CI,1", ",CI,1", "CN(C)(C)(C)C,CI,0"
    path.write_text("\n".join(lines))
    rows = files.load("molhiv", molecule_folder)
    said = capsys.readouterr().out
    assert "2 of 30 rows are left out because RDKit cannot read their SMILES: row 3 ('C1CC'), row 21 ('')" in said
    assert len(rows.mols) == 28 and 26 in rows.rows and [len(part) for part in rows.official] == [19, 4, 5]
    assert (rows.rows[rows.official[2]] == np.arange(25, 30)).all()


@needs_rdkit
@pytest.mark.parametrize("file, old, new, words", [
    ("delaney-processed.csv", "smiles", "structure", "'smiles'; its columns are 'Compound ID', 'meas.*', 'structure'$"),
    *(("delaney-processed.csv", "0.286", to, r"line 4, column 'measured log.*', row 2 \(from 0, after the header\): '"
       + re.escape(to.strip('"')) + "'; expected a finite number with a decimal point, or an empty cell")
      for to in ("soluble", "inf", "-Infinity", "nan", "NA", '"0,286"', "1e999", "1_0", "<5")),
    ("delaney-processed.csv", "x,0.286", "x,0,286", "line 4: 4 fields, and 3 in the header; .*decimals with a point"),
    ("delaney-processed.csv", ",CCC\n", "\n", "line 8: 2 fields, and 3 in the header; expected as many"),
    ("delaney-processed.csv", "Compound ID", "smiles", "has 2 columns 'smiles'; expected one"),
    ("delaney-processed.csv", "Compound ID", "measured log solubility in mols per litre", "has 2 columns 'measured log"),
    ("delaney-processed.csv", "x,0.286", 'x,"0.286', "line 31: 2 fields, and 3 in the header"),
    ("delaney-processed.csv", "CCC\n", "C" * 140_000 + "\n", "line 8: field larger than field limit"),
    ("HIV.csv", ",CI,1", ",CI,inf", "line 3, column 'HIV_active', row 1 .*: 'inf'; expected a finite"),
    ("HIV.csv", "smiles", "Smiles", "has no column 'smiles'; its columns are 'Smiles', 'activity', 'HIV_active'$"),
    ("HIV.csv", ",CI,1", ",CI,0", "column 'HIV_active' has the same value in every row"),
    ("ogbg-molhiv_scaffold_split.npz", None, None, "not a complete .npz archive without pickle"),
])
def test_molecules_damaged_files(molecule_folder, file, old, new, words):
    """A damaged file is refused with one line that has its name, and the row if there is one."""
    path = molecule_folder / file
    path.write_bytes(b"nothing" if old is None else path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(ValueError, match=words) as error:
        files.load("esol" if file.startswith("del") else "molhiv", molecule_folder)
    assert file in str(error.value) and "\n" not in str(error.value)


@needs_rdkit
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"nothing",
                                    lambda content: content[:40] + b"damaged" + content[47:]])
def test_molecules_damaged_archives(molecule_folder, damage):
    """A .gz file that is cut short, altered, or not a .gz file is named in one line."""
    for name, folder, file in (("muv", molecule_folder, "muv.csv.gz"),
                               ("molpcba", molecule_folder / "pcba", "split/scaffold/train.csv.gz")):
        path = folder / file
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=f"{file} is truncated or not a gzip file"):
            files.load(name, folder)


@needs_rdkit
@pytest.mark.parametrize("encoding, words", [
    ("utf-8", None), ("utf-8-sig", None), ("utf-16", "has zero bytes, as UTF-16"), ("utf-16-le", "has zero bytes, as UTF-16"),
    ("latin-1", "line 6: byte 0xe9 is not UTF-8; save it")])
def test_molecules_encodings(molecule_folder, encoding, words):
    """UTF-8 is read with and without a byte order mark; any other encoding is refused with one line that names the file."""
    path = molecule_folder / "delaney-processed.csv"
    head, *lines = [line.split(",") for line in path.read_text().splitlines()]
    lines[4][0] = "\u00e9"
    path.write_bytes("\r\n".join(",".join(line[::-1]) for line in [head, *lines]).encode(encoding))  # smiles comes first
    if words is None:
        assert np.allclose(files.load("esol", molecule_folder).y[:, 0], np.round(np.arange(30) / 7, 3))
        return
    with pytest.raises(ValueError, match=words) as error:
        files.load("esol", molecule_folder)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@needs_rdkit
@pytest.mark.parametrize("low, high, said", [
    ("0", "1", ""), ("0.0", "1", ""), ("1", "2", "2 is the positive class and 1 the negative class in A, B"),
    ("-1", "1", "1 is the pos"), ("inactive", "yes", "'yes' is the positive class and 'inactive' the neg"),
    ("False", "True", "'True' is the positive")])
def test_molecules_two_classes(molecule_folder, capsys, low, high, said):
    """Two numbers or two words are two classes; the larger number or later word is the positive class. One line says so
    unless they are 0 and 1. Missing labels stay missing."""
    want = files.load("muv", molecule_folder).y
    capsys.readouterr()
    path = molecule_folder / "muv.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines[1:] = [",".join({"0": low, "1": high}.get(one, one) for one in line.split(",")) for line in lines[1:]]
    write_csv(path, lines[0], lines[1:])
    assert np.array_equal(files.load("muv", molecule_folder).y, want, equal_nan=True)
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == bool(said)


@needs_rdkit
@pytest.mark.parametrize("column, words", [
    (["0", "1", "2"], "column 'A': 3 different values, 0, 1, 2; expected two classes"),
    (["CA", "CI", "CM"], "column 'A': 3 different values, 'CA', 'CI', 'CM'; expected two"),
    ([f"{i / 7:.2f}" for i in range(30)], r"column 'A': 30 different values, 0, 0.14, 0.29, 0.43, 0.57 \.\.\.; expected two"),
    (["1", "active"], "line 3, column 'A', row 1 .*: 'active'; expected a finite number"),
    (["0,5", "1,5"], "line 2, column 'A', row 0 .*: '0,5'; expected a finite number")], ids=str)
def test_molecules_more_than_two_classes(molecule_folder, column, words):
    """More than two values in a column of classes, such as measured numbers, are refused with one line."""
    write_csv(molecule_folder / "muv.csv.gz", "A,mol_id,smiles", [
        f'"{column[i % len(column)]}",id{i},{"C" * (i + 1)}' for i in range(30)])
    with pytest.raises(ValueError, match="muv.csv.gz.* " + words) as error:
        files.load("muv", molecule_folder)
    assert "\n" not in str(error.value)


@needs_rdkit
@pytest.mark.parametrize("part, rows, words", [
    ("test", [25, 3], "row 3 is in test and also, in .*, in train"),
    ("val", [20, 19], "row 19 is in val and also, in .*, in train"), ("val", [], "val is empty; expected row numbers"),
    ("test", [24, 25], "row 24 is in test and also, in .*, in val"),
    ("train", [0, 30], "train has row 30, but the table has rows 0 to 29"),
    ("train", [-1, 3], "train has row -1, but the table"),
    ("train", [0, 1, 2, 1], "row 1 is in train 2 times; expected once")], ids=str)
def test_molecules_splits_that_leak(molecule_folder, part, rows, words):
    """An official split, from .npz or OGB's files, is refused if parts share a row, name a row outside the table, name a row
    twice or are empty; the line names the file and the row."""
    split = {"train": np.arange(20), "val": np.arange(20, 25), "test": np.arange(25, 30), part: np.array(rows, int)}
    np.savez(molecule_folder / "ogbg-molhiv_scaffold_split.npz", **split)
    for name, numbers in split.items():
        (molecule_folder / "pcba" / "split" / "scaffold" / f"{name.replace('val', 'valid')}.csv.gz").write_bytes(
            gzip.compress("\n".join(map(str, numbers)).encode()))
    for name, folder, file in (("molhiv", molecule_folder, "ogbg-molhiv_scaffold_split.npz"),
                               ("molpcba", molecule_folder / "pcba", f"{part.replace('val', 'valid')}.csv.gz")):
        with pytest.raises(ValueError, match=words) as error:
            files.load(name, folder)
        assert file in str(error.value) and "\n" not in str(error.value)


@needs_rdkit
@pytest.mark.parametrize("rows", [np.arange(20) % 2 == 0, np.arange(20) / 2, np.arange(20)[None]],
                         ids=["mask", "float", "2-D"])
def test_molecules_splits_of_other_kinds(molecule_folder, rows):
    """Masks, fractions and arrays of another shape are refused as row numbers."""
    np.savez(molecule_folder / "ogbg-molhiv_scaffold_split.npz", train=rows, val=np.arange(20, 25), test=np.arange(25, 30))
    with pytest.raises(ValueError, match="scaffold_split.npz: train holds .*; expected row numbers, integers"):
        files.load("molhiv", molecule_folder)


@needs_rdkit
def test_molecules_splits_without_readable_rows(molecule_folder):
    """A split is refused with one line if RDKit can read none of the rows of one part."""
    path = molecule_folder / "HIV.csv"
    lines = path.read_text().splitlines()
    lines[21:26] = [f"C1CC,CI,{i % 2}" for i in range(5)]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="split.npz, rows that RDKit can read: val is empty"):
        files.load("molhiv", molecule_folder)


@needs_rdkit
@needs_molecules
def test_molecules_files_are_ours(capsys, molecule_folder):
    """A note says if a file is not the one from which the figures of the README were computed."""
    tables = {"esol": ("delaney-processed.csv", ["measured log solubility in mols per litre"]),
              "molhiv": ("HIV.csv", ["HIV_active"]), "muv": ("muv.csv.gz", None)}
    assert set(tables) == set(files.SHA256)
    for name, (file, columns) in tables.items():
        for folder, notes in ((MOLECULES, 0), (molecule_folder, 1)):
            files.table(os.path.join(folder, file), columns, sha256=files.SHA256[name])
            assert capsys.readouterr().out.count("is not the file that the figures in results/README.md") == notes


def test_molecules_need_rdkit(monkeypatch):
    """Without RDKit, one line says what to install."""
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ImportError, match="RDKit, which reads molecules, is not installed: pip install"):
        files.load("nci")


def test_molecules_tasks_are_dense_solves():
    """Tasks with labels on different rows, solved together, each have the dense solution of their own system. Their
    preconditioner is the inverse of the dense matrix P, and it halves the steps."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(120, 4))
    dense = np.exp(-((z[:, None] - z) ** 2).sum(axis=2) / 4)
    K = tiles.gram(lambda a, b: jnp.exp(-((a[:, None] - b[None]) ** 2).sum(axis=2) / 4), z, 50, quiet=True)
    mask = rng.random((120, 3)) < [0.2, 0.6, 1.0]
    y = np.where(mask, rng.normal(size=(120, 3)), 0)
    low = pcg.low_rank(K, 40)
    look = missing.Look(low, mask)
    masked = missing.Labelled(K, mask)
    x, info = pcg.solve(masked.matvec, y, 1e-3, look(1e-3), 1e-10)
    assert info.converged and pcg.solve(masked.matvec, y, 1e-3, tol=1e-10)[1].iterations > 2 * info.iterations
    for t, rows in enumerate(mask.T):
        A = dense[np.ix_(rows, rows)] + 1e-3 * np.eye(rows.sum())
        assert np.allclose(x[rows, t], np.linalg.solve(A, y[rows, t]), rtol=1e-6, atol=1e-6) and not x[~rows, t].any()
        F = low.F[rows].astype(np.float64)
        P = F @ F.T + np.diag(low.outside[rows] + 1e-3)
        assert np.allclose(P @ look(1e-3)(y)[rows, t], y[rows, t], atol=1e-9)
    first = masked.leading(70)
    assert np.allclose(first.matvec(y[:70]), mask[:70] * (dense[:70, :70] @ y[:70]), atol=1e-5)
    assert look.leading(70)(1e-3)(y[:70]).shape == (70, 3)


def test_molecules_rmse_of_tasks():
    """Tasks without a label do not count; without any label there is no score."""
    y = np.array([[1.0, np.nan, 5.0], [3.0, np.nan, np.nan]])
    assert train_molecule.rmse(np.ones((2, 3)), y) == (2**0.5 + 4) / 2
    with pytest.raises(ValueError, match="no task has a label among 2 rows"):
        train_molecule.rmse(np.ones((2, 1)), y[:, [1]])


def test_molecules_ridge_from_rows_outside():
    """Comparing ridges on rows outside K gives the same numbers as comparing them on the same rows of a larger K."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(100, 3)), rng.normal(size=(100, 2))
    K, part = tiles.gram(linear, z, 32, quiet=True), tiles.gram(linear, z[:80], 32, quiet=True)
    outside = tiles.cross(linear, z[80:], z[:80], 32, quiet=True), y[80:]
    ridges, seen = [1.0, 0.1, 0.01], []

    def score(f, rows):
        seen.append(rows)
        return np.mean(f)
    whole, part = (regression.Solver(one, "none", prior=np.ones(one.shape[0])) for one in (K, part))
    inside = choose.validation(whole, y, ridges, 80, np.arange(80, 100), score)
    apart = choose.validation(part, y[:80], ridges, 80, outside, score)
    assert np.allclose([row[:3] for row in inside], [row[:3] for row in apart], rtol=1e-6)
    assert all((rows == np.arange(80, 100)).all() for rows in seen[:3]) and seen[3:] == [None] * 3
    by_score = choose.best(apart, "score")
    assert by_score == max(apart, key=lambda row: row.score) and len({row.score for row in apart}) == 3


def train_molecules(tmp_path, *flags):
    return train_molecule.main([*flags, "--out", str(tmp_path), "--quiet"])


def dense_molecules(layers, x, m):
    """NNGP and NTK (n, m) of n Graphs and the first m of them, by `dense_graphs`."""
    exact = [x.atoms[start:end].astype(np.float64) for start, end in zip(x.starts, x.starts[1:])]
    out = np.zeros((2, len(exact), m))
    for i, j in np.ndindex(out.shape[1:]):
        out[:, i, j] = out[:, j, i] if j < i < m else dense_graphs(layers, exact[i], exact[j])
    return out


def dense_vectors(x, depth, w_std=2**0.5, b_std=0.0):
    """NNGP and NTK (n, n) of a fully connected network on x (n, d), by `dense_graphs`: n nodes, each its only neighbour."""
    x = np.column_stack([x, np.arange(len(x)), np.ones(len(x))])
    return dense_graphs([("aggregate", 1), *[("dense", w_std, b_std), ("relu",)] * depth, ("dense", w_std, b_std)], x, x)


@needs_rdkit
@pytest.mark.parametrize("engine, ridges, flags", [
    (graphs.kernel_fn, (0.1, 1e-3, 1e-5), ["--kernel", "sum", "--kind", "ntk", "--depth", "1", "--pool", "mean", "--b_std",
                                           "0.5", "--fingerprints", "morgan,pairs"]),
    (kernel.kernel_fn, (0.1, 1e-2, 1e-3), ["--depth", "2", "--jump", "--weights", "order", "--w_std", "1.2",
                                           "--b_std", "0.5"])],
    ids=["graphs.py", "kernel.py with jump"])
def test_molecules_train_is_a_dense_solve(tmp_path, monkeypatch, engine, ridges, flags):
    """On the molecules that come with RDKit, predictions equal those of a dense float64 solve with the formulas in NumPy, at
    the ridge that is best on the validation rows. runs.jsonl gets one line with the whole result. engine: of the graphs;
    kernel.py's compiles faster."""
    monkeypatch.setattr(train_molecule, "FEW", 60)
    monkeypatch.setattr(graphs, "kernel_fn", engine)
    result = train_molecules(tmp_path, *flags, "--ridge", ",".join(map(str, ridges)), "--tile", "6")
    assert json.loads((tmp_path / "runs.jsonl").read_text()) == result and result["cg_converged"]
    rows = files.load("nci", limit=60)
    parts = files.split(rows)
    mols, y = [rows.mols[i] for i in np.concatenate(parts)], [rows.y[part] for part in parts]
    config, n, m, scores = result["config"], len(parts[0]), len(parts[1]), {}
    x, prints = files.graphs(mols, config["weights"]), files.fingerprints(mols, config["fingerprints"])
    network, kind = [config[key] for key in ("depth", "w_std", "b_std")], kernel.KINDS.index(config["kind"])
    depth, w_std, b_std = network
    layers = graph_layers.gcn(x.degree, depth, pool=config["pool"], jump=config["jump"], w_std=w_std, b_std=b_std)
    assert ("jump",) in layers or config["kernel"] == "sum"
    one = dense_molecules(layers, x, n)[kind]
    K = one / np.diag(one).mean()
    if config["kernel"] == "sum":
        one = dense_vectors(prints.astype(float), *network)[kind][:, :n]
        K = K + one / np.diag(one).mean()
    for ridge in ridges:
        A = K[:n] + ridge * np.diag(K).mean() * np.eye(n)
        f = y[0].mean() + K[n:] @ np.linalg.solve(A, y[0] - y[0].mean())
        scores[ridge] = [np.sqrt(np.mean((part - label) ** 2)) for part, label in ((f[:m], y[1]), (f[m:], y[2]))]
    best = min(scores, key=lambda one: scores[one][0])
    assert result["ridge"] == best
    assert abs(result["test_rmse"] / scores[best][1] - 1) < 1e-3


@needs_rdkit
def test_molecules_train_tasks(tmp_path, molecule_folder):
    """With missing labels, both kinds, two sizes and tiles reused from disk, the score equals scikit-learn's average
    precision of each task's own dense solution."""
    flags = ["--dataset", "molpcba", "--data", str(molecule_folder / "pcba"), "--kernel", "fingerprint", "--depth",
             "1", "--ridge", "0.01", "--store", str(tmp_path / "K")]
    both = train_molecules(tmp_path, *flags, "--kind", "both", "--sizes", "10,20")
    assert set(both) == set(kernel.KINDS) and set(both["ntk"]) == {10, 20}
    result = train_molecules(tmp_path, *flags, "--kind", "nngp")
    assert result["test_ap"] == both["nngp"][20]["test_ap"] and result["tasks"] == 2
    rows = files.load("molpcba", str(molecule_folder / "pcba"))
    parts = files.split(rows, "official")
    x, (y, _, y_test) = files.fingerprints(rows.mols).astype(np.float64), (rows.y[part] for part in parts)
    K = dense_vectors(x, 1)[0]
    found = []
    for t in range(2):
        known, seen = ~np.isnan(y[:, t]), ~np.isnan(y_test[:, t])
        mine = parts[0][known]
        A = K[np.ix_(mine, mine)] + 0.01 * np.diag(K)[parts[0]].mean() * np.eye(len(mine))
        f = K[np.ix_(parts[2], mine)] @ np.linalg.solve(A, y[known, t] - y[known, t].mean())
        found.append(average_precision_score(y_test[seen, t], f[seen]))
    assert abs(result["test_ap"] - np.mean(found)) < 1e-6


@needs_rdkit
@pytest.mark.parametrize("dataset", ["esol", "molhiv"])
def test_molecules_leave_one_out_is_refits(tmp_path, molecule_folder, dataset):
    """With --select loo, depth, b_std and ridge are the best in n refits on the training rows in float64: by
    squared error for numbers, by area under the ROC curve for classes."""
    from sklearn.metrics import roc_auc_score
    result = train_molecules(tmp_path, "--dataset", dataset, "--data", str(molecule_folder), "--kernel", "fingerprint",
                             "--select", "loo", "--depth", "1,2", "--b_std", "0,1", "--ridge", "1,0.1,0.01", "--tile", "3")
    rows = files.load(dataset, str(molecule_folder))
    train = files.split(rows, "random" if dataset == "esol" else "official")[0]
    x, y = files.fingerprints([rows.mols[i] for i in train]).astype(np.float64), rows.y[train]
    table = []
    for depth, b_std in ((1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)):
        K = dense_vectors(x, depth, b_std=b_std)[0]
        for ridge in (1.0, 0.1, 0.01):
            f = y.mean() + refitted(K, y - y.mean(), ridge)
            error = np.mean((f - y) ** 2)
            table.append([ridge, np.sqrt(error) if dataset == "esol" else roc_auc_score(y, f), error, depth, b_std])
    order = (lambda row: row[2]) if dataset == "esol" else (lambda row: -row[1])
    of_settings = [min(table[i:i + 3], key=order) for i in range(0, 12, 3)]
    assert [row[0] for row in result["compared"]] == [{"depth": row[3], "b_std": row[4]} for row in of_settings]
    assert np.allclose([row[1:] for row in result["compared"]], [row[:3] for row in of_settings], rtol=1e-4)
    best = min(of_settings, key=order)
    assert [result["config"][flag] for flag in ("depth", "b_std")] == best[3:] and result["select"] == "loo"
    assert np.allclose([result[key] for key in ("ridge", "loo_score", "loo_mse")], best[:3], rtol=1e-4)


@needs_rdkit
@pytest.mark.parametrize("select", choose.CRITERIA)
def test_molecules_networks_are_compared(tmp_path, monkeypatch, select):
    """With several values of depth and b_std, the result is that of a run with the best pair alone. Each pair has its row
    in the table, equal to the best row of a run with that pair."""
    monkeypatch.setattr(train_molecule, "FEW", 100)
    flags = ["--kernel", "fingerprint", "--select", select, "--ridge", "1,0.01,1e-4", "--w_std", "1.2", "--tile", "10"]
    several = train_molecules(tmp_path, *flags, "--depth", "1,2", "--b_std", "0,0.5")
    alone = [train_molecules(tmp_path, *flags, *(f"--{flag}={value}" for flag, value in row[0].items()))
             for row in several["compared"]]
    assert len(alone) == 4 and several["config"]["w_std"] == 1.2
    for row, run in zip(several["compared"], alone):
        best = choose.best([choose.Row(*one) for one in run["search"]])
        assert row[1] == best.ridge and (row[2] is None) == (select == "gcv") and abs(row[3] / best.mse - 1) < 1e-3
    best = alone[min(range(4), key=lambda i: several["compared"][i][3])]
    assert best["config"] == several["config"] and best["test_rmse"] == several["test_rmse"]
    assert len({run["test_rmse"] for run in alone}) == 4


@needs_rdkit
@pytest.mark.parametrize("select", ["loo", "validation"])
def test_molecules_never_look_at_test_rows(tmp_path, molecule_folder, monkeypatch, select):
    """Permuting the labels of the test rows, and with --select loo of the validation rows too, changes only the test score:
    depth, b_std and ridge stay the same."""
    flags = ["--dataset", "molhiv", "--data", str(molecule_folder), "--kernel", "fingerprint", "--select", select,
             "--depth", "1,2", "--b_std", "0,1", "--ridge", "1,0.1,0.01"]
    first, load = train_molecules(tmp_path, *flags), files.load

    def other(*args):
        rows = load(*args)
        for part in rows.official[1 + (select == "validation"):]:
            rows.y[part] = np.roll(rows.y[part], 1)
        return rows
    monkeypatch.setattr(files, "load", other)
    second = train_molecules(tmp_path, *flags)
    assert all(first[key] == second[key] for key in ("compared", "ridge", "search", "config", "loo_score"))
    assert first["test_auc"] != second["test_auc"]


@needs_rdkit
def test_molecules_stores_know_their_network(tmp_path, molecule_folder):
    """A store never returns tiles of another network: another w_std, b_std or depth is refused with one line."""
    flags = ["--dataset", "esol", "--data", str(molecule_folder), "--kernel", "fingerprint", "--ridge", "0.1",
             "--store", str(tmp_path / "K")]
    first = train_molecules(tmp_path, *flags)
    for other in ("--w_std=1", "--b_std=1", "--depth=2"):
        with pytest.raises(ValueError, match="train-fingerprint-nngp holds another matrix: layers is .* Give this run"):
            train_molecules(tmp_path, *flags, other)
    assert train_molecules(tmp_path, *flags)["test_rmse"] == first["test_rmse"]


@needs_rdkit
@pytest.mark.parametrize("flags", [
    ["--kernel", "sum", "--depth", "1", "--kind", "both"],
    ["--kernel", "fingerprint", "--depth", "1,3", "--b_std", "0,1"],
    ["--kernel", "fingerprint", "--depth", "1,3", "--select", "loo"]], ids=" ".join)
def test_molecules_sizes_are_runs_alone(tmp_path, monkeypatch, flags):
    """With --sizes, every size has the result of a run with that size alone, for every kernel and for the ridge and network
    that are chosen; also if the sizes choose different networks."""
    monkeypatch.setattr(train_molecule, "FEW", 100)
    monkeypatch.setattr(graphs, "kernel_fn", sum_of_nodes)
    flags = [*flags, "--ridge", "1,0.01,1e-4", "--tile", "10"]
    row = train_molecules(tmp_path, *flags, "--sizes", "20,80")
    for n in (20, 80):
        alone = train_molecules(tmp_path, *flags, "--n_train", str(n))
        for one, other in [(row[kind][n], alone[kind]) for kind in kernel.KINDS] if "both" in flags else [(row[n], alone)]:
            assert one["config"] == other["config"] and one["ridge"] == other["ridge"]
            for key in ("test_rmse", "loo_mse", "loo_score", "search", "compared"):
                numbers = [json.loads(re.sub(r'"\w+": ', "", json.dumps(of[key])).replace("{", "[").replace("}", "]").replace(
                    "null", "0")) for of in (one, other)]
                assert np.allclose(*map(flat, numbers), rtol=1e-3), key
    if "1,3" in flags and "loo" not in flags:
        assert row[20]["config"]["depth"] != row[80]["config"]["depth"]
        with pytest.raises(ValueError, match=r"one network, but --sizes \[20, 80\] choose 2: \[20\] depth=1 .*; give each"):
            train_molecules(tmp_path, *flags, "--sizes", "20,80", "--store", str(tmp_path / "K"))


def flat(numbers):
    return np.concatenate([flat(one) for one in numbers]) if isinstance(numbers, list) and numbers else np.atleast_1d(numbers)


@needs_rdkit
def test_molecules_stores_grow(tmp_path, molecule_folder, monkeypatch):
    """A larger n_train with the same store computes only the new entries and has the result of a fresh run, even if its
    molecules have more atoms and more neighbours."""
    order, padding, make = np.random.default_rng(0).permutation(100), [], files.graphs
    smiles = {row: "C" * (1 + row % 9) + "NOCF"[row % 4] for row in range(100)}
    smiles[order[40]] = "CC(C)(C)CCCCCCCCCCCCCCCCCC"
    write_csv(molecule_folder / "delaney-processed.csv", "measured log solubility in mols per litre,smiles",
              [f"{np.sin(row):.3f},{smiles[row]}" for row in range(100)])
    monkeypatch.setattr(graphs, "kernel_fn", sum_of_nodes)
    monkeypatch.setattr(files, "graphs", lambda *args: padding.append(make(*args)) or padding[-1])
    flags = ["--dataset", "esol", "--data", str(molecule_folder), "--kernel", "sum", "--depth", "1", "--ridge", "0.01,1e-3"]
    small, large = (train_molecules(tmp_path, *flags, "--store", str(tmp_path / "K"), "--n_train", n, *tile)
                    for n, tile in (("30", ["--tile", "10"]), ("50", [])))
    fresh = train_molecules(tmp_path, *flags, "--n_train", "50", "--tile", "10")
    assert [(x.degree, x.nodes) for x in padding[:2]] == [(3, 10), (5, 22)]
    assert small["entries_computed"] == 2 * ((30 * 30 + 30 * 10) // 2 + 2 * 10 * 30)
    assert large["entries_computed"] == 2 * ((50 * 50 + 50 * 10) // 2 + 2 * 10 * 50) - small["entries_computed"]
    assert large["config"]["tile"] == 10 and large["ridge"] == fresh["ridge"]
    assert np.allclose([large[key] for key in ("test_rmse", "loo_mse")], [fresh[key] for key in ("test_rmse", "loo_mse")],
                       rtol=1e-4)
    again = train_molecules(tmp_path, *flags, "--store", str(tmp_path / "K"), "--n_train", "30")
    assert again["entries_computed"] == 0 and abs(again["test_rmse"] / small["test_rmse"] - 1) < 1e-6


@needs_rdkit
def test_molecules_digests_without_padding():
    """The digest of a graph in a store depends on the graph alone, not on padding, degree or the other graphs in the array.
    Graphs that differ in an atom, a bond or a weight have different digests."""
    from large import store
    some = ["CCO", "CCN", "CC=O", "C1CC1", "CCC", "C"]
    alone = [store.digests(files.graphs([one], "order"))[0] for one in some]
    assert len(set(alone)) == len(some)
    together = files.graphs([*some, "CC(C)(C)C" + "C" * 20], "order", least=50)
    for block in (2, 1024):
        assert (store.digests(together, block)[:len(some)] == alone).all()
    assert (store.digests(together.take([2, 0])) == [alone[2], alone[0]]).all()
    assert store.digests(files.graphs(["CC=O"], "normal"))[0] != alone[2]


def made_assays(folder, values=("0", "1"), n=100):
    """Writes a table in MUV's format: does a molecule contain nitrogen, with some wrong labels. Returns SMILES and labels."""
    rng = np.random.default_rng(0)
    smiles = [f"{'C' * (1 + i // 10)}{'NOSF'[i % 4]}{'C' * (1 + i % 10)}".replace("F", "C(F)") for i in range(n)]
    label = [int(("N" in one) ^ (rng.random() < 0.1)) for one in smiles]
    write_csv(folder / "muv.csv.gz", "A,mol_id,smiles", [f"{values[k]},id,{one}" for k, one in zip(label, smiles)])
    return smiles, np.array(label)


@needs_rdkit
@pytest.mark.parametrize("values", [("0", "1"), ("1", "2"), ("inactive", "yes")], ids=" ".join)
def test_molecules_labels_of_any_name(tmp_path, molecule_folder, values):
    """With labels 0 and 1, 1 and 2, or words, the average precision equals scikit-learn's of the dense solution, with the
    larger label or later word as the positive class."""
    _, y = made_assays(molecule_folder, values)
    result = train_molecules(tmp_path, "--dataset", "muv", "--data", str(molecule_folder), "--kernel", "fingerprint",
                             "--depth", "1", "--ridge", "0.1")
    rows = files.load("muv", str(molecule_folder))
    train, _, test = files.split(rows)
    K = dense_vectors(files.fingerprints(rows.mols).astype(np.float64), 1)[0]
    A = K[np.ix_(train, train)] + 0.1 * np.diag(K)[train].mean() * np.eye(len(train))
    f = K[np.ix_(test, train)] @ np.linalg.solve(A, y[train] - y[train].mean())
    assert len(np.unique(f.round(5))) < len(test)  # some molecules have one fingerprint: ties, whatever rounding does
    assert abs(result["test_ap"] - average_precision_score(y[test], f.round(5))) < 1e-6
    assert abs(result["test_ap"] - average_precision_score(1 - y[test], f)) > 0.05


@needs_rdkit
@pytest.mark.parametrize("part, flags, words", [
    ("train", [], "n_train=20: the first 20 training molecules of molhiv have only one class for HIV_active, so nothing"),
    ("train", ["--ridge", "1", "--sizes", "5,20"], "n_train=5: the first 5 training molecules"),
    ("train", ["--select", "loo"], "n_train=20: the first 20"),
    ("val", [], "split 'official': the 5 val molecules .* only one class .*; use --select loo, one --ridge, another --split"),
    ("val", ["--ridge", "1", "--depth", "1,2"], "the 5 val molecules .* only one class"),
    ("test", ["--ridge", "1"], "the 5 test molecules .* only one class .*auc is not defined; use another --split")], ids=str)
def test_molecules_one_class_only(tmp_path, molecule_folder, monkeypatch, part, flags, words):
    """If the training rows have one class only (any kernel then has an AUC of 0.5), or the test rows, or the validation rows
    although something is to be chosen, the run is refused with one line before any kernel is computed."""
    lines = [f"{'C' * (1 + i)},CI,{i % 2}" for i in range(30)]
    for i in {"train": range(20), "val": range(20, 25), "test": range(25, 30)}[part]:
        lines[i] = lines[i][:-1] + "0"
    write_csv(molecule_folder / "HIV.csv", "smiles,activity,HIV_active", lines)
    monkeypatch.setattr(train_molecule, "kernels", None)
    with pytest.raises(ValueError, match=words) as error:
        train_molecules(tmp_path, "--dataset", "molhiv", "--data", str(molecule_folder), *flags)
    assert "\n" not in str(error.value)


@needs_rdkit
def test_molecules_too_few_to_split(tmp_path, molecule_folder):
    """A random split that leaves no validation row is refused with one line where something is chosen; leave-one-out needs
    none, nor does a single ridge."""
    path = molecule_folder / "delaney-processed.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:6]) + "\n")
    flags = ["--dataset", "esol", "--data", str(molecule_folder), "--kernel", "fingerprint", "--depth", "1", "--ridge", "0.1"]
    with pytest.raises(ValueError, match="split 'random': the 0 val molecules .*; use --select loo, another --split"):
        train_molecules(tmp_path, *flags, "--depth", "1,2")
    for more in ([], ["--select", "loo"]):
        assert train_molecules(tmp_path, *flags, *more)["rows"] == 4


@needs_rdkit
def test_molecules_one_class_where_nothing_is_chosen(tmp_path, molecule_folder):
    """Validation rows of one class are accepted with a single ridge, or if the training rows choose."""
    lines = [f"{'C' * (1 + i)},CI,{i % 2 if not 20 <= i < 25 else 1}" for i in range(30)]
    write_csv(molecule_folder / "HIV.csv", "smiles,activity,HIV_active", lines)
    for flags in (["--ridge", "1"], ["--select", "loo"]):
        result = train_molecules(tmp_path, "--dataset", "molhiv", "--data", str(molecule_folder), "--kernel", "fingerprint",
                                 "--depth", "1", *flags)
        assert 0 <= result["test_auc"] <= 1


@needs_rdkit
def test_molecules_tasks_of_one_class_are_left_out(tmp_path, molecule_folder, capsys):
    """A task with only one class in the training rows is named and left out, at those sizes where it has one: the score is
    that of the other task alone."""
    folder, official = molecule_folder / "pcba", np.random.default_rng(0).permutation(20)  # as `split` has it for seed 0
    label = np.stack([np.arange(30) % 2, np.isin(np.arange(30), [*official[12:], 21, 28])]).astype(int)
    table = folder / "mapping" / "mol.csv.gz"
    flags = ["--dataset", "molpcba", "--kernel", "fingerprint", "--depth", "1", "--ridge", "0.01", "--data", str(folder)]
    write_csv(table, "A,B,smiles,mol_id", [f"{a},{b},{'C' * (i // 2 + 1)}{'NO'[a]},id" for i, (a, b) in enumerate(label.T)])
    result = train_molecules(tmp_path, *flags, "--sizes", "12,20")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("note: n_train=12: 1 of 2 tasks have only one class among the training molecules and are "
                       "left out: B") and result[12]["tasks"] == 1 and result[20]["tasks"] == 2
    write_csv(table, "A,smiles,mol_id", [f"{a},{'C' * (i // 2 + 1)}{'NO'[a]},id" for i, a in enumerate(label[0])])
    alone = train_molecules(tmp_path, *flags, "--n_train", "12")
    assert abs(alone["test_ap"] - result[12]["test_ap"]) < 1e-9


@needs_rdkit
def test_molecules_criteria_that_do_not_fit(tmp_path, molecule_folder, capsys):
    """Leave-one-out and GCV with missing labels, and GCV with classes, are refused with one line that says what to use. The
    commands of README and docstring are accepted."""
    for select in ("loo", "gcv"):
        with pytest.raises((ValueError, SystemExit)) as error:
            train_molecules(tmp_path, "--dataset", "molpcba", "--data", str(molecule_folder / "pcba"), "--select",
                            select)
        said = capsys.readouterr().err.splitlines()[-1:] + [str(error.value)]
        assert "use --select" in "".join(said) and ("has missing labels" in said[-1]) == (select == "loo")
    path = molecule_folder / "delaney-processed.csv"
    path.write_text(path.read_text().replace("x,0.286,", "x,,"))
    with pytest.raises(ValueError, match="--select gcv: esol has missing labels, .*; use --select validation$"):
        train_molecules(tmp_path, "--dataset", "esol", "--data", str(molecule_folder), "--select", "gcv")
    shown = commands("molecules.train", train_molecule.__doc__)
    assert len(shown) > 3 and all(map(train_molecule.parse, shown))


@needs_rdkit
@needs_molecules
def test_molecules_official_split_is_ogbs():
    """The files of ogbg-molhiv are read completely: 41,127 rows in three parts, 1,443 active; metal complexes too."""
    path = os.path.join(MOLECULES, "HIV.csv")
    smiles, y, *_ = files.table(path, ["HIV_active"])
    parts = files._npz_split(os.path.join(MOLECULES, "ogbg-molhiv_scaffold_split.npz"))
    assert len(smiles) == 41_127 and y.sum() == 1443 and [len(part) for part in parts] == [32_901, 4113, 4113]
    assert (np.sort(np.concatenate(parts)) == np.arange(41_127)).all()
    hard = [i for i, one in enumerate(smiles) if "->" in one or "[Co" in one][:50]
    assert all(files.read(smiles[i]) is not None for i in hard)


@needs_rdkit
@pytest.mark.parametrize("flags, words", [
    (["--dataset", "esol"], "ValueError: esol needs --data FOLDER, the folder with its files"),
    (["--dataset", "muv", "--data", "nowhere"], "FileNotFoundError: .*muv.csv.gz is not there; give --data"),
    (["--ridge", "often"], "--ridge often: expected a number, numbers separated by commas, or auto"),
    (["--store", "none"], "--store none is not available for molecules; give a folder"),
    (["--fingerprints", "morgan,maccs"], "--fingerprints morgan,maccs: expected morgan, pairs, torsions"),
    (["--fingerprints", "morgan,morgan"], "--fingerprints morgan,morgan: expected"),
    (["--devices", "5"], "ValueError: --devices 5, but JAX sees 4 here"),
    (["--n_train", "5000"], "ValueError: n_train=5000, .*expected 1 to 1200, the molecules of nci to train on"),
    (["--split", "official"], "ValueError: split 'official': this data set has random, scaffold"),
    (["--depth", "0"], r"--depth \[?0\]?: expected at least 1"),
    (["--w_std", "-1"], "--w_std -1: expected a number > 0, or several"),
])
def test_molecules_train_errors(flags, words, tmp_path, monkeypatch, capsys):
    """A wrong flag is refused with one line that says what was expected."""
    if "--n_train" not in flags:
        monkeypatch.setattr(train_molecule, "FEW", 30)
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        train_molecules(tmp_path, *flags)
    said = capsys.readouterr().err if error.type is SystemExit else f"{error.type.__name__}: {error.value}"
    assert re.search(words, said.splitlines()[-1])


@needs_rdkit
def test_molecules_train_error_without_traceback(tmp_path):
    """At the command line an error is one line without traceback."""
    done = subprocess.run([sys.executable, "-m", "molecules.train", "--dataset", "esol", "--out", tmp_path], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode and done.stderr.splitlines()[-1].startswith("ValueError: esol needs --data FOLDER")
    assert "Traceback" not in done.stderr


@needs_rdkit
@pytest.mark.parametrize("flags, words", [
    (["--data", "x"], "--data changes nothing here: the molecules of --dataset nci come with RDKit"),
    (["--kernel", "fingerprint", "--jump"], "--jump changes nothing here: --kernel fingerprint uses no graphs"),
    (["--depth", "1", "--jump"], "--jump changes nothing here: --depth 1 has one round, which is pooled without it"),
    (["--fingerprints", "morgan"], "--fingerprints changes nothing here: --kernel gcn uses none")])
def test_molecules_flags_without_effect(flags, words, capsys):
    """A flag without effect is refused with one line that says why."""
    with pytest.raises(SystemExit):
        train_molecule.parse(flags)
    assert words in capsys.readouterr().err
