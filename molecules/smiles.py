"""Molecules: files -> SMILES, targets and splits; SMILES -> graphs and fingerprints, by RDKit.

  nci      organic molecules that come with RDKit; target: its log P (Crippen); no file, no network
  esol     delaney-processed.csv: 1,128 molecules, log solubility (Delaney 2004)
  molhiv   HIV.csv and ogbg-molhiv_scaffold_split.npz (row numbers: train, val, test), or mapping/mol.csv.gz and
           split/scaffold/{train,valid,test}.csv.gz of OGB's own archive: does it stop HIV
  muv      muv.csv.gz: 93,127 molecules, 17 assays, 84 % of the labels missing
  molpcba  OGB's archive, as above: 437,929 molecules, 128 assays, labels missing

    rows = molecules.load("esol", "FOLDER"); x = molecules.graphs(rows.mols)

Targets are float64 (n, tasks), NaN where there is none. Splits: 80 % to train, 10 % to choose by, 10 % to test;
random; or by scaffold (Bemis and Murcko 1996): molecules with one ring system stay together, the largest groups to
train, so that test molecules are of other kinds; or official, where the data come with one. No pickle is read.

A graph, as kernel.py wants it: of an atom one-hot its element, bonds, charge, hydrogens, whether it is aromatic, in
a ring, and its letter R or S, if it has one; the numbers of itself and its neighbours; their weights, of
D^-1/2 (A + I) D^-1/2 or A + I, where A has 1, or the order of the bond. Whichever way a molecule is written, its graph
is the same but for the numbering, and so are its fingerprints: those of RDKit's own reading, where hydrogens are counts
and no atoms.      Proved by: molecules/test_molecules.py
"""

import gzip
import hashlib
import os
import zlib
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import data
from own import tables

DATASETS = {"nci": "rmse", "esol": "rmse", "molhiv": "auc", "muv": "ap", "molpcba": "ap"}  # and their score
SHA256 = {  # of the tables, unpacked, that README's figures were made from
    "esol": "8c06a76f0c6487d29ab0f903e6a7a7139f189ab3c1178f159c8be8964602f189",
    "molhiv": "54713c3205055055ea4214e8c4b0d22d93af7e54ad2c48f4edc866e161e57262",
    "muv": "feac9a780cb5f2e5e1c51e6ba61491a524da544ca1d6e4b542f9ad358fe0527b"}
PARTS = ("train", "val", "test")
SPLITS = ("random", "scaffold", "official")
ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "I", "P", "Si", "B", "Se", "Na", "K", "Cu", "Fe", "Zn", "Sn")
FINGERPRINTS = {"morgan": ("GetMorganGenerator", {"radius": 2}), "pairs": ("GetAtomPairGenerator", {}),
                "torsions": ("GetTopologicalTorsionGenerator", {})}  # of RDKit, with these options
COUNTS = {"bonds": range(7), "charge": range(-2, 3), "hydrogens": range(5)}  # the last stands for more


class Molecules(NamedTuple):
    """What `load` returns; `rows` are numbers of rows in the file, from 0, as all others here are not."""
    smiles: list
    mols: list  # of RDKit
    y: np.ndarray  # (n, tasks)
    tasks: list
    rows: np.ndarray
    official: object  # (train, val, test), positions in these lists, or None


class Graphs:
    """Graphs kept without padding; x[rows] is the padded array (b, nodes, features + 2 degree) of kernel.py."""

    def __init__(self, atoms, starts, degree, nodes):
        """atoms: (atoms of all, features + 2 degree).   starts: where each begins, and the end."""
        self.atoms, self.starts, self.degree, self.nodes = atoms, starts, degree, nodes

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        out = np.zeros((len(rows), self.nodes, self.atoms.shape[1]), np.float32).view(Padded)
        for into, row in zip(out, rows):
            part = self.atoms[self.starts[row]:self.starts[row + 1]]
            into[:len(part)] = part
        out.degree = self.degree
        return out

    def take(self, rows):
        """Those graphs, in that order, as Graphs."""
        lengths = np.diff(self.starts)[rows]
        inside = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])
        return Graphs(self.atoms[inside], np.concatenate([[0], np.cumsum(lengths)]), self.degree, self.nodes)


class Padded(np.ndarray):
    """Graphs as an array (b, nodes, features + 2 degree).   degree: set by who makes it."""

    def pixels(self):
        """What a store knows graphs by: (b, 32) uint8, a digest of each, the same however far it is padded."""
        digests = []
        for graph in np.asarray(self):
            features, numbers, weights = np.split(graph[graph.any(axis=1)], [-2 * self.degree, -self.degree], axis=1)
            there = weights != 0
            one = hashlib.blake2b(f"{features.shape}".encode(), digest_size=32)
            for part in (features, there.sum(axis=1), numbers[there], weights[there]):
                one.update(np.ascontiguousarray(part).data.cast("B"))
            digests.append(np.frombuffer(one.digest(), np.uint8))
        return np.stack(digests)


def chemistry():
    """RDKit's module Chem, silent.  ImportError where RDKit is not installed."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError as error:
        raise ImportError("RDKit, which reads molecules, is not installed: pip install --no-deps -r "
                          "requirements.txt") from error
    RDLogger.DisableLog("rdApp.*")
    return Chem


def read(smiles):
    """The molecule of RDKit that Chem.MolFromSmiles reads: sanitised, hydrogens as counts of their atom, stereo marks only
    where there is a stereocentre.

    What that refuses for a valence (boron clusters, metals) is read without the check of valences, all else the same.
    Hydrogen stays an atom where RDKit keeps it: an isotope, an ion, H2, or what a double bond's direction hangs on.
    Raises ValueError: the text is no SMILES, or no molecule.
    """
    Chem = chemistry()
    mol = Chem.MolFromSmiles(smiles) if isinstance(smiles, str) else None
    if mol is None and isinstance(smiles, str):
        mol = _any_valence(Chem, smiles)
    if mol is None or not mol.GetNumAtoms():
        raise ValueError(f"SMILES {smiles!r}: RDKit cannot read it; expected the text of a molecule, as 'CCO': correct it or "
                         "leave it out")
    return mol


def _any_valence(Chem, smiles):
    """A molecule, or None, as Chem.MolFromSmiles reads it, without the check of valences."""
    mol = Chem.MolFromSmiles(smiles, sanitize=False)
    if mol is None:
        return None
    mol.UpdatePropertyCache(strict=False)
    if Chem.SanitizeMol(mol, Chem.SANITIZE_ALL ^ Chem.SANITIZE_PROPERTIES, catchErrors=True):
        return None
    mol = Chem.RemoveHs(mol, updateExplicitCount=True, sanitize=False)
    mol.UpdatePropertyCache(strict=False)
    Chem.AssignStereochemistry(mol, cleanIt=True, force=True)
    return mol


def molecules(mols):
    """[molecule of RDKit, ...] of these or of SMILES.  ValueError: one that cannot be read, or None in its place."""
    Chem = chemistry()
    mols = [read(one) if isinstance(one, str) else one for one in mols]
    bad = next((i for i, mol in enumerate(mols) if not isinstance(mol, Chem.Mol)), None)
    if bad is not None or not mols:
        what = f"molecule {bad} (from 0) of {len(mols)} is {mols[bad]!r}" if mols else "got no molecules"
        raise ValueError(f"{what}; expected molecules of RDKit or SMILES: Chem.MolFromSmiles gives None for what it cannot "
                         "read, smiles.read says which")
    return mols


def load(name, folder=None, limit=None, quiet=True):
    """The molecules of a data set named above, in the order of the file.

    limit: read the first rows only, where the data set has no official split.
    Rows whose SMILES RDKit cannot read are named and left out.
    Raises ValueError: unknown name, a missing column, a target that is no number, with its row.
    FileNotFoundError: a file that is not there.   ImportError: no RDKit.
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; choose one of {', '.join(DATASETS)}")
    if name == "nci":
        return _nci(limit, quiet)
    if folder is None:
        raise ValueError(f"{name} needs --data FOLDER with its files: see --help")
    official, tasks, split_files = None, None, None
    if name == "esol":
        path, tasks = os.path.join(folder, "delaney-processed.csv"), ["measured log solubility in mols per litre"]
    elif name == "molhiv" and not os.path.exists(os.path.join(folder, "mapping")):
        path, tasks = os.path.join(folder, "HIV.csv"), ["HIV_active"]
        split_files = [os.path.join(folder, "ogbg-molhiv_scaffold_split.npz")] * 3
        official = _npz_split(split_files[0])
    elif name == "muv":
        path = os.path.join(folder, "muv.csv.gz")
    else:
        path = os.path.join(folder, "mapping", "mol.csv.gz")
        split_files = [os.path.join(folder, "split", "scaffold", f"{part}.csv.gz") for part in ("train", "valid", "test")]
        official = [_numbers(file) for file in split_files]
    smiles, y, tasks = table(path, tasks, limit if official is None else None, None if quiet else SHA256.get(name),
                             DATASETS[name] != "rmse")
    return checked(smiles, y, tasks, official, path, quiet, split_files)


def table(path, tasks=None, limit=None, sha256=None, classes=False):
    """SMILES, targets (n, tasks) and names of tasks of a .csv or .csv.gz file, UTF-8; an empty cell is no target.

    tasks: names of columns; None: every column but smiles and mol_id.   sha256: what to compare the file with.
    classes: a column holds two numbers or two words; the larger, or the later in the alphabet, becomes 1, the other 0.
    Raises ValueError: another encoding, a column that is not there or there twice, a line with fewer or more fields, a
    target that is no finite number, more than two classes, the same value in every row.
    """
    content = _content(path)
    if sha256:
        data.compare(content, sha256, path)
    columns, lines = tables.lines(path, content, limit)
    tasks = list(tasks or [name for name in columns if name not in ("smiles", "mol_id")])
    tables.columns(path, columns, ["smiles", *tasks])
    y, pairs = np.empty((len(lines), len(tasks))), {}
    for k, task in enumerate(tasks):
        texts = [line[columns.index(task)].strip() for _, line in lines]
        values, bad = _values(texts, classes)
        if bad is not None:
            row = texts.index(bad)
            raise ValueError(f"{path}, line {lines[row][0]}, column {task!r}, row {row} (from 0, after the header): "
                             f"{bad[:40]!r}; expected a number, finite, with a decimal point, or nothing where it is missing")
        found = sorted({value for text, value in values.items() if text})
        if len(found) < 2:
            raise ValueError(f"{path}: {task} has the same value in every row, or none: nothing to learn; leave that column "
                             "out")
        if classes and len(found) > 2:
            raise ValueError(f"{path}, column {task!r}: {len(found)} different values, {', '.join(map(_said, found[:5]))}"
                             f"{' ...' if len(found) > 5 else ''}; expected two classes, as 0 and 1, or nothing")
        if classes:
            values = {text: float(value == found[1]) if text else np.nan for text, value in values.items()}
            pairs.setdefault(tuple(map(_said, found)), []).append(task)
        y[:, k] = [values[text] for text in texts]
    for (low, high), of in pairs.items():
        if (low, high) != ("0", "1"):
            print(f"{path}: {high} is the positive class, {low} the other, of {', '.join(of[:5])}"
                  + f" and {len(of) - 5} more" * (len(of) > 5))
    return [line[columns.index("smiles")] for _, line in lines], y, tasks


def _values(texts, classes):
    """({text: number, or word}, None) of a column's cells, NaN for an empty one; or (..., the first that is neither).

    Words, a whole column of them, are for classes only."""
    def number(text):
        try:
            return float(text) if text and "_" not in text else np.nan
        except ValueError:
            return None
    values = {text: number(text) for text in dict.fromkeys(texts)}
    words = {text for text, value in values.items() if value is None and any(map(str.isalpha, text))}
    if classes and words and set(values) <= words | {""}:
        return {text: text for text in values}, None
    return values, next((text for text, value in values.items() if text and (value is None or not np.isfinite(value))), None)


def _said(value):
    return repr(value[:40]) if isinstance(value, str) else f"{value:g}"


def checked(smiles, y, tasks, official, path, quiet=True, files=None):
    """Molecules of these rows, without those that RDKit cannot read.

    official: None, or numbers of rows to train, to choose by, to test.   files: where they stand, for what is said.
    Raises ValueError: a part of the split that is empty, has a row that is not there, or a row of another part.
    """
    files = files or [f"the split of {path}"] * 3
    if official is not None:
        _disjoint(official, files, len(smiles))
    mols = []
    for one in tqdm(smiles, desc="molecules", unit=" rows", disable=quiet or None, leave=False):
        try:
            mols.append(read(one))
        except ValueError:
            mols.append(None)
    kept = np.array([i for i, mol in enumerate(mols) if mol is not None], int)
    if len(kept) < len(mols):
        bad = sorted(set(range(len(mols))) - set(kept.tolist()))
        print(f"{path}: {len(bad)} of {len(mols)} rows left out, RDKit cannot read their SMILES: " + ", ".join(
            f"row {row} ({smiles[row][:40]!r})" for row in bad[:5]) + (" ..." if len(bad) > 5 else ""))
    if not len(kept):
        raise ValueError(f"{path}: RDKit can read none of its {len(mols)} SMILES")
    if official is not None:
        position = np.full(len(smiles), -1)
        position[kept] = np.arange(len(kept))
        official = tuple(position[part][position[part] >= 0] for part in official)
        _disjoint(official, [f"{file}, of what RDKit can read" for file in files], len(kept))
    return Molecules([smiles[i] for i in kept], [mols[i] for i in kept], y[kept], list(tasks), kept, official)


def _nci(limit, quiet):
    """Molecules of the National Cancer Institute's open collection, in RDKit's own data folder."""
    chemistry()
    from rdkit import RDConfig
    from rdkit.Chem import Crippen
    path = os.path.join(RDConfig.RDDataDir, "NCI", "first_5K.smi")
    with open(data.existing(path)) as lines:
        smiles = [line.split()[0] for line in lines][:limit]
    rows = checked(smiles, np.zeros((len(smiles), 1)), ["log P"], None, path, quiet)
    return rows._replace(y=np.array([[Crippen.MolLogP(mol)] for mol in rows.mols]))


def _disjoint(parts, files, n):
    """Raises ValueError unless the three parts are numbers of n rows, none empty, none with a row of another."""
    owner = np.full(n, -1)
    for k, (name, part, file) in enumerate(zip(PARTS, map(np.asarray, parts), files)):
        if not len(part):
            raise ValueError(f"{file}: {name} is empty; expected numbers of rows for each of {', '.join(PARTS)}")
        outside = part[(part < 0) | (part >= n)]
        if len(outside):
            raise ValueError(f"{file}: {name} has row {outside[0]}, and the table has 0 to {n - 1}; expected the split of "
                             "this table")
        for row in part[owner[part] >= 0][:1]:
            raise ValueError(f"{file}: row {row} is in {name} and, by {files[owner[row]]}, in {PARTS[owner[row]]}; expected "
                             "disjoint parts: what is fitted tests nothing")
        numbers, times = np.unique(part, return_counts=True)
        if times.max() > 1:
            raise ValueError(f"{file}: row {numbers[times.argmax()]} is in {name} {times.max()} times; expected once")
        owner[part] = k


def _npz_split(path):
    parts = [data.array(path, part) for part in PARTS]
    for name, part in zip(PARTS, parts):
        if part.dtype.kind not in "iu" or part.ndim != 1:
            raise ValueError(f"{path}: {name} holds {part.dtype} {part.shape}; expected numbers of rows, whole, (n,)")
    return [part.astype(np.int64) for part in parts]


def _content(path):
    """The bytes of a file, unpacked where its name ends in .gz."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(data.existing(path), "rb") as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or not packed by gzip: {error}") from error


def _numbers(path):
    """A row number a line."""
    lines = tables.text(path, _content(path)).split()
    try:
        return np.array([int(line) for line in lines], np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}; expected a row number a line") from error


def split(rows, how="random", seed=0):
    """(train, val, test), positions; train shuffled by `seed`, so that its first n are a random part of it.

    random: by `seed` as well.   scaffold: the same for every seed; groups in order of size, then of scaffold.
    """
    rng, n = np.random.default_rng(seed), len(rows.mols)
    if how not in SPLITS or how == "official" and rows.official is None:
        raise ValueError(f"split {how!r}: this data set has {', '.join(SPLITS[:2 + (rows.official is not None)])}")
    if how == "official":
        train, val, test = rows.official
        return rng.permutation(train), val, test
    cut = [n * 8 // 10, n * 9 // 10]
    if how == "random":
        return tuple(np.split(rng.permutation(n), cut))
    chemistry()
    from rdkit.Chem.Scaffolds import MurckoScaffold
    groups = {}
    for i, mol in enumerate(rows.mols):
        try:
            scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=mol, includeChirality=False)
        except ValueError:  # an unusual valence, which `read` lets pass: a group of its own
            scaffold = f"row {rows.rows[i]}"
        groups.setdefault(scaffold, []).append(i)
    parts = [], [], []
    for _, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        room = [cut[0] - len(parts[0]), cut[1] - cut[0] - len(parts[1])]
        parts[0 if len(group) <= room[0] else 1 if len(group) <= room[1] else 2].extend(group)
    train, val, test = (np.array(part, int) for part in parts)
    return rng.permutation(train), val, test


def graphs(mols, weights="normal", quiet=True, least=0):
    """The `Graphs` of molecules of RDKit, or of SMILES.

    weights: "normal", D^-1/2 (A + I) D^-1/2 with D the row sums of A + I; "sum", A + I; "order", as normal with
    the orders of bonds (1, 1.5, 2, 3) in A.   least: nodes, at least.
    """
    everything = []
    for mol in tqdm(molecules(mols), desc="graphs", unit=" molecules", disable=quiet or None, leave=False):
        everything.append((_atoms(mol), _neighbours(mol, weights)))
    degree = max(len(one) for _, lists in everything for one in lists)
    rows = []
    for features, lists in everything:
        out = np.zeros((len(features), features.shape[1] + 2 * degree), np.float32)
        out[:, :features.shape[1]] = features
        for atom, one in enumerate(lists):
            out[atom, -2 * degree:][:len(one)], out[atom, -degree:][:len(one)] = zip(*one)
        rows.append(out)
    starts = np.concatenate([[0], np.cumsum([len(out) for out in rows])])
    return Graphs(np.concatenate(rows), starts, degree, max(least, int(np.diff(starts).max())))


def _atoms(mol):
    """Features (atoms, f)."""
    counts = list(COUNTS.values())
    widths = [len(ELEMENTS) + 1, *map(len, counts), 3, 3]
    offsets = np.cumsum([0, *widths])
    out = np.zeros((mol.GetNumAtoms(), offsets[-1]), np.float32)
    for i, atom in enumerate(mol.GetAtoms()):
        symbol = atom.GetSymbol()
        places = [ELEMENTS.index(symbol) if symbol in ELEMENTS else len(ELEMENTS)]
        values = atom.GetDegree(), atom.GetFormalCharge(), atom.GetTotalNumHs()
        places += [min(max(value, of[0]), of[-1]) - of[0] for value, of in zip(values, counts)]
        letter = atom.GetProp("_CIPCode") if atom.HasProp("_CIPCode") and int(atom.GetChiralTag()) <= 2 else None
        places += [atom.GetIsAromatic() + (atom.IsInRing() and 1), {"R": 1, "S": 2}.get(letter, 0)]
        out[i, offsets[:-1] + places] = 1
    return out


def _neighbours(mol, weights):
    """Of every atom [(neighbour, weight), ...], itself first."""
    lists = [[(i, 1.0)] for i in range(mol.GetNumAtoms())]
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        weight = max(bond.GetBondTypeAsDouble(), 1.0) if weights == "order" else 1.0
        lists[i].append((j, weight))
        lists[j].append((i, weight))
    if weights == "sum":
        return lists
    sums = [sum(weight for _, weight in one) for one in lists]
    return [[(j, weight / (sums[i] * sums[j]) ** 0.5) for j, weight in one] for i, one in enumerate(lists)]


def fingerprints(mols, names=("morgan",), bits=2048, quiet=True):
    """How often each hashed pattern occurs, log(1 + count), (n, bits len(names)).

    names: "morgan", neighbourhoods of up to two bonds; "pairs", two atoms and how many bonds are between them;
    "torsions", paths of four atoms. Of several, each is divided by its own norm (without a pattern it stays zero).
    """
    mols = molecules(mols)
    from rdkit.Chem import rdFingerprintGenerator
    makers = [getattr(rdFingerprintGenerator, make)(fpSize=bits, **options)
              for make, options in map(FINGERPRINTS.get, names)]
    out = np.zeros((len(mols), len(names), bits), np.float32)
    for row, mol in zip(out, tqdm(mols, desc="fingerprints", unit=" molecules", disable=quiet or None, leave=False)):
        for part, maker in zip(row, makers):
            part += maker.GetCountFingerprintAsNumPy(mol)
    np.log1p(out, out=out)
    if len(names) > 1:
        out /= np.maximum(np.linalg.norm(out, axis=2, keepdims=True), 1e-30)
    return out.reshape(len(mols), -1)
