"""Molecules: files -> SMILES, targets and splits; SMILES -> graphs and fingerprints, with RDKit.

  nci      organic molecules that come with RDKit; target: their log P, computed (Crippen); needs no file and no network
  esol     delaney-processed.csv: 1,128 molecules, measured log solubility (Delaney 2004)
  molhiv   HIV.csv and ogbg-molhiv_scaffold_split.npz (arrays train, val, test of row numbers), or mapping/mol.csv.gz and
           split/scaffold/{train,valid,test}.csv.gz of OGB's archive; target: does the molecule inhibit HIV
  muv      muv.csv.gz: 93,127 molecules, 17 assays, 84 % of the labels missing
  molpcba  OGB's archive, as above: 437,929 molecules, 128 assays, some labels missing
  a path   your own .csv or .csv.gz: a column of SMILES, and columns to predict, numbers or two classes

    rows = smiles.load("esol", "FOLDER"); x = smiles.graphs(rows.mols);   rows, digest = smiles.own("mine.csv", "SMILES", "y")

Targets are float64 (n, tasks), NaN where a label is missing. A split is 80 % for training, 10 % for validation and 10 % for
testing. It is random; or by scaffold (Bemis and Murcko 1996): molecules with the same ring system stay together, and the
largest groups are for training, so that test molecules have other scaffolds; or official, if the data set has one. No pickle
is read.

A graph, as molecules/layers.py reads it, has a row for each atom. The row holds one-hot features (element, number of bonds,
charge, hydrogens, whether in a ring or aromatic, R or S of a stereocentre), then the numbers of the atom itself and of its
neighbours, then their weights, from D^-1/2 (A + I) D^-1/2 or A + I, where A holds 1 or the order of the bond. Hydrogens are
counts, not atoms. However a molecule is written, its graph is the same up to the numbering of its atoms, and its fingerprints
are the same: both come from RDKit's own reading.      Proved by: molecules/test_molecules.py
"""

import hashlib
import os
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import data
from own import tables

DATASETS = {"nci": "rmse", "esol": "rmse", "molhiv": "auc", "muv": "ap", "molpcba": "ap"}  # name -> score
SHA256 = {  # checksums of the tables, unpacked, from which the results were computed
    "esol": "8c06a76f0c6487d29ab0f903e6a7a7139f189ab3c1178f159c8be8964602f189",
    "molhiv": "54713c3205055055ea4214e8c4b0d22d93af7e54ad2c48f4edc866e161e57262",
    "muv": "feac9a780cb5f2e5e1c51e6ba61491a524da544ca1d6e4b542f9ad358fe0527b"}
PARTS = ("train", "val", "test")
SPLITS = ("random", "scaffold", "official")
ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "I", "P", "Si", "B", "Se", "Na", "K", "Cu", "Fe", "Zn", "Sn")
HINT = "expected a .csv or .csv.gz file with a column of SMILES"
FINGERPRINTS = {"morgan": ("GetMorganGenerator", {"radius": 2}), "pairs": ("GetAtomPairGenerator", {}),
                "torsions": ("GetTopologicalTorsionGenerator", {})}  # RDKit's generators and their options
COUNTS = {"bonds": range(7), "charge": range(-2, 3), "hydrogens": range(5)}  # values outside count as the nearest


class Molecules(NamedTuple):
    """What `load` returns: n molecules."""
    smiles: list
    mols: list  # RDKit molecules
    y: np.ndarray  # (n, tasks) float64, NaN where a label is missing
    tasks: list  # their names
    rows: np.ndarray  # the row of each molecule in the file, from 0; unreadable rows are left out
    official: object  # the official split (train, val, test) as positions in these lists, or None
    classes: list  # for each task (negative, positive) as the file writes them; None if it is a number


class Graphs:
    """Graphs stored without padding; x[rows] is the padded array (b, nodes, features + 2 degree) that the kernels take."""

    def __init__(self, atoms, starts, degree, nodes):
        """atoms: (all atoms, features + 2 degree).   starts: (graphs + 1,), the first atom of each graph, and the end."""
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
        """The graphs with these numbers, in this order, as Graphs."""
        lengths = np.diff(self.starts)[rows]
        inside = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])
        return Graphs(self.atoms[inside], np.concatenate([[0], np.cumsum(lengths)]), self.degree, self.nodes)

    def like(self, other):
        """The same graphs, padded as `other` too: with room for as many atoms, and for as many neighbours of an atom."""
        degree, nodes = max(self.degree, other.degree), max(self.nodes, other.nodes)
        features, numbers, weights = np.split(self.atoms, [-2 * self.degree, -self.degree], axis=1)
        room = np.zeros((len(features), degree - self.degree), np.float32)
        return Graphs(np.concatenate([features, numbers, room, weights, room], axis=1), self.starts, degree, nodes)


class Padded(np.ndarray):
    """Graphs as an array (b, nodes, features + 2 degree).   degree: an attribute, set by Graphs."""

    def pixels(self):
        """The bytes by which a store identifies graphs: a digest of each, (b, 32) uint8, independent of the padding."""
        digests = []
        for graph in np.asarray(self):
            features, numbers, weights = np.split(graph[graph.any(axis=1)], [-2 * self.degree, -self.degree], axis=1)
            listed = weights != 0
            digest = hashlib.blake2b(f"{features.shape}".encode(), digest_size=32)
            for part in (features, listed.sum(axis=1), numbers[listed], weights[listed]):
                digest.update(np.ascontiguousarray(part).data.cast("B"))
            digests.append(np.frombuffer(digest.digest(), np.uint8))
        return np.stack(digests)


def chemistry():
    """RDKit's module Chem, with its log messages off.  ImportError: RDKit is not installed."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError as error:
        raise ImportError("RDKit, which reads molecules, is not installed: pip install --no-deps -r "
                          "requirements.txt") from error
    RDLogger.DisableLog("rdApp.*")
    return Chem


def read(smiles):
    """The molecule that RDKit's Chem.MolFromSmiles reads: sanitised, hydrogens as counts, stereo marks at stereocentres only.

    A molecule that RDKit refuses for its valences (boron clusters, metals) is read in the same way without that check.
    Hydrogen remains an atom where RDKit keeps it: an isotope, an ion, H2, or if the direction of a double bond depends on it.
    Raises ValueError: the text is not a SMILES, or holds no molecule.
    """
    Chem = chemistry()
    mol = Chem.MolFromSmiles(smiles) if isinstance(smiles, str) else None
    if mol is None and isinstance(smiles, str):
        mol = _any_valence(Chem, smiles)
    if mol is None or not mol.GetNumAtoms():
        raise ValueError(f"SMILES {smiles!r}: RDKit cannot read it; expected a molecule such as 'CCO'. Correct it or leave it "
                         "out")
    return mol


def _any_valence(Chem, smiles):
    """A molecule as Chem.MolFromSmiles reads it, but without the check of valences; None if that fails too."""
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
    """[RDKit molecule, ...] of RDKit molecules or SMILES.  ValueError: RDKit cannot read one, or one is None."""
    Chem = chemistry()
    mols = [read(mol) if isinstance(mol, str) else mol for mol in mols]
    bad = next((i for i, mol in enumerate(mols) if not isinstance(mol, Chem.Mol)), None)
    if bad is not None or not mols:
        what = f"molecule {bad} (from 0) of {len(mols)} is {mols[bad]!r}" if mols else "got no molecules"
        raise ValueError(f"{what}; expected RDKit molecules or SMILES. Chem.MolFromSmiles returns None for what it cannot "
                         "read; smiles.read names it")
    return mols


def load(name, folder=None, limit=None, quiet=True):
    """The molecules of a data set named above, in the order of the file.

    limit: read only the first `limit` rows; ignored if the data set has an official split.
    Rows whose SMILES RDKit cannot read are left out and named. Unless quiet, a note says if a file differs from ours.
    Raises ValueError: unknown name, a missing column, a target that is not a number (the message names its row).
    FileNotFoundError: a missing file.   ImportError: RDKit is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; choose one of {', '.join(DATASETS)}")
    if name == "nci":
        return _nci(limit, quiet)
    if folder is None:
        raise ValueError(f"{name} needs --data FOLDER, the folder with its files; --help lists them")
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
    smiles, y, tasks, classes = table(path, tasks, limit if official is None else None, None if quiet else SHA256.get(name),
                                      DATASETS[name] != "rmse")
    return checked(smiles, y, tasks, official, path, quiet, split_files, classes)


def own(path, column, target, quiet=True):
    """(Molecules, digest) of a CSV file of one's own.  digest: the first 12 digits of its sha256, as it is unpacked.

    column: the name of the column of SMILES.   target: the name of the column to predict, or several, separated by commas. A
    column with exactly two different values holds classes, any other numbers; a line says which.
    Raises ValueError: no target, no row, a column named twice, targets of both sorts, and as `table`.   FileNotFoundError.
    """
    content, names, lines = opened(path)
    tasks = [target] if target in names else [name.strip() for name in (target or "").split(",")]
    if not target:
        raise ValueError(f"{path} has the columns {', '.join(map(repr, names))}: say with --target which to predict")
    at, *_ = tables.columns(path, names, [column, *tasks], "; give columns of it with --smiles and --target")
    if len({column, *tasks}) <= len(tasks):
        raise ValueError(f"--smiles {column} --target {target}: a column is named twice; expected different columns")
    y, classes = targets(path, names, lines, tasks, None)
    sorts = {pair is None: task for task, pair in zip(tasks, classes)}
    if len(sorts) > 1:
        raise ValueError(f"{path}: column {sorts[False]!r} holds two classes and column {sorts[True]!r} numbers; expected "
                         "targets of one sort: fit the others in a run of their own")
    say(path, tasks, classes)
    return (checked([line[at] for _, line in lines], y, tasks, None, path, quiet, classes=classes),
            hashlib.sha256(content).hexdigest()[:12])


def opened(path):
    """(bytes, names of columns, [(line number, fields), ...]) of a CSV file of one's own.  ValueError: it has no row."""
    content = tables.content(path, HINT)
    names, lines = tables.lines(path, content)
    if not lines:
        raise ValueError(f"{path} {'has a header and no rows' if names else 'is empty'}; {HINT}")
    return content, names, lines


def table(path, tasks=None, limit=None, sha256=None, classes=False):
    """SMILES, targets (n, tasks), names of tasks and `targets`' classes from a .csv or .csv.gz file in UTF-8; an empty cell is
    a missing label.

    tasks: names of columns; None: every column except smiles and mol_id.   sha256: the checksum to compare with, or None.
    Raises ValueError: another encoding, a column that is missing or occurs twice, a line with too few or too many fields, and
    as `targets`.
    """
    content = tables.content(path, data.HINT)
    if sha256:
        tables.compare(content, sha256, path)
    columns, lines = tables.lines(path, content, limit)
    tasks = list(tasks or [name for name in columns if name not in ("smiles", "mol_id")])
    tables.columns(path, columns, ["smiles", *tasks])
    y, pairs = targets(path, columns, lines, tasks, classes)
    say(path, *zip(*[(task, pair) for task, pair in zip(tasks, pairs) if pair and [*map(_number, pair)] != [0, 1]]))
    return [line[columns.index("smiles")] for _, line in lines], y, tasks, pairs


def say(path, tasks=(), classes=()):
    """Prints what the targets are: numbers, or which classes."""
    for pair in dict.fromkeys(classes):
        names = [task for task, one in zip(tasks, classes) if one == pair]
        what = f"{_shown(pair[1])} is the positive class and {_shown(pair[0])} the negative class" if pair else "numbers"
        print(f"{path}: {what} in {', '.join(names[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5))


def targets(path, columns, lines, tasks, classes):
    """The columns `tasks` as y (n, tasks), NaN where a cell is empty, and [(negative, positive) or None, ...], their classes.

    classes: True: every column holds two numbers or two words; False: numbers; None: a column with exactly two different
    values holds classes. The larger number or later word becomes 1, the other 0; but of two words of which one ends in the
    other, such as inactive and active, the shorter becomes 1.
    ValueError: a target that is not a finite number, more than two classes, a column with the same value in every row.
    """
    y, pairs = np.empty((len(lines), len(tasks))), []
    for k, task in enumerate(tasks):
        texts = [line[columns.index(task)].strip() for _, line in lines]
        values, bad = _values(texts, classes is not False)
        if bad is not None:
            row = texts.index(bad)
            raise ValueError(f"{path}, line {lines[row][0]}, column {task!r}, row {row} (from 0, after the header): "
                             f"{bad[:40]!r}; expected a finite number with a decimal point, or an empty cell if it is missing")
        distinct = sorted({value for text, value in values.items() if text})
        if len(distinct) < 2:
            raise ValueError(f"{path}: column {task!r} has the same value in every row, or none; there is nothing to learn. "
                             "Remove the column")
        if len(distinct) > 2 and (classes or isinstance(distinct[0], str)):
            raise ValueError(f"{path}, column {task!r}: {len(distinct)} different values, "
                             f"{', '.join(map(_shown, distinct[:5]))}{' ...' if len(distinct) > 5 else ''}; expected two "
                             f"classes, such as 0 and 1, {'or numbers, ' * (classes is None)}or empty cells")
        pairs.append(None)
        if classes is not False and len(distinct) == 2:
            low, high = distinct
            if isinstance(high, str) and high.lower().endswith(low.lower()):
                low, high = high, low
            pairs[k] = tuple(next(text for text in texts if text and values[text] == value) for value in (low, high))
            values = {text: float(value == high) if text else np.nan for text, value in values.items()}
        y[:, k] = [values[text] for text in texts]
    return y, pairs


def _number(text):
    """The number in a cell, NaN if it is empty or has an underscore; None if it is no number."""
    try:
        return float(text) if text and "_" not in text else np.nan
    except ValueError:
        return None


def _values(texts, classes):
    """({text: value}, None) for the cells of a column: a number each, NaN if empty, or with `classes` all of them words.
    If a cell is neither: (..., the text of such a cell)."""
    values = {text: _number(text) for text in dict.fromkeys(texts)}
    words = {text for text, value in values.items() if value is None and any(map(str.isalpha, text))}
    if classes and words and set(values) <= words | {""}:
        return {text: text for text in values}, None
    bad = [text for text, value in values.items() if text and (value is None or not np.isfinite(value))]
    return values, min(bad, key=lambda text: text in words, default=None)


def _shown(value):
    """A value, or the text of a cell, as messages show it."""
    if isinstance(value, str):
        return repr(value[:40]) if _number(value) is None else value
    return f"{value:g}"


def checked(smiles, y, tasks, official, path, quiet=True, files=None, classes=None, what="are left out"):
    """The Molecules of these rows, without rows that RDKit cannot read.

    official: None, or the row numbers for training, validation and test.   files: the files of the three, for messages.
    what: happens to rows that RDKit cannot read, for the message.
    Raises ValueError: a part of the split is empty, names a row outside the table, or shares a row with another part.
    """
    files = files or [f"the split of {path}"] * 3
    if official is not None:
        _disjoint(official, files, len(smiles))
    mols = []
    for text in tqdm(smiles, desc="molecules", unit=" rows", disable=quiet or None, leave=False):
        try:
            mols.append(read(text))
        except ValueError:
            mols.append(None)
    kept = np.array([i for i, mol in enumerate(mols) if mol is not None], int)
    if len(kept) < len(mols):
        bad = sorted(set(range(len(mols))) - set(kept.tolist()))
        print(f"{path}: {len(bad)} of {len(mols)} rows {what} because RDKit cannot read their SMILES: " + ", ".join(
            f"row {row} ({smiles[row][:40]!r})" for row in bad[:5]) + (" ..." if len(bad) > 5 else ""))
    if not len(kept):
        raise ValueError(f"{path}: RDKit cannot read any of its {len(mols)} SMILES")
    if official is not None:
        position = np.full(len(smiles), -1)
        position[kept] = np.arange(len(kept))
        official = tuple(position[part][position[part] >= 0] for part in official)
        _disjoint(official, [f"{file}, rows that RDKit can read" for file in files], len(kept))
    return Molecules([smiles[i] for i in kept], [mols[i] for i in kept], y[kept], list(tasks), kept, official,
                     classes or [None] * len(tasks))


def _nci(limit, quiet):
    """Molecules from the National Cancer Institute's open collection, read from RDKit's data folder."""
    chemistry()
    from rdkit import RDConfig
    from rdkit.Chem import Crippen
    path = os.path.join(RDConfig.RDDataDir, "NCI", "first_5K.smi")
    with open(data.existing(path)) as lines:
        smiles = [line.split()[0] for line in lines][:limit]
    rows = checked(smiles, np.zeros((len(smiles), 1)), ["log P"], None, path, quiet)
    return rows._replace(y=np.array([[Crippen.MolLogP(mol)] for mol in rows.mols]))


def _disjoint(parts, files, n):
    """Raises ValueError unless the three parts are disjoint, not empty, and hold row numbers below n, each once."""
    owner = np.full(n, -1)
    for k, (name, part, file) in enumerate(zip(PARTS, map(np.asarray, parts), files)):
        if not len(part):
            raise ValueError(f"{file}: {name} is empty; expected row numbers for each of {', '.join(PARTS)}")
        outside = part[(part < 0) | (part >= n)]
        if len(outside):
            raise ValueError(f"{file}: {name} has row {outside[0]}, but the table has rows 0 to {n - 1}; expected a split of "
                             "this table")
        for row in part[owner[part] >= 0][:1]:
            raise ValueError(f"{file}: row {row} is in {name} and also, in {files[owner[row]]}, in {PARTS[owner[row]]}; "
                             "expected disjoint parts")
        numbers, times = np.unique(part, return_counts=True)
        if times.max() > 1:
            raise ValueError(f"{file}: row {numbers[times.argmax()]} is in {name} {times.max()} times; expected once")
        owner[part] = k


def _npz_split(path):
    parts = [data.array(path, part) for part in PARTS]
    for name, part in zip(PARTS, parts):
        if part.dtype.kind not in "iu" or part.ndim != 1:
            raise ValueError(f"{path}: {name} holds {part.dtype} {part.shape}; expected row numbers, integers (n,)")
    return [part.astype(np.int64) for part in parts]


def _numbers(path):
    """The row numbers in a file with one number per line, (n,) int64."""
    lines = tables.text(path, tables.content(path, data.HINT)).split()
    try:
        return np.array([int(line) for line in lines], np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}; expected one row number per line") from error


def split(rows, how="random", seed=0):
    """(train, val, test): positions in `rows`. train is shuffled by `seed`, so that its first n are a random subset.

    random: the parts depend on `seed`.   scaffold: the parts do not; groups are dealt out by size, then by scaffold.
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
        except ValueError:  # an unusual valence, which `read` accepts: a group of its own
            scaffold = f"row {rows.rows[i]}"
        groups.setdefault(scaffold, []).append(i)
    parts = [], [], []
    for _, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        room = [cut[0] - len(parts[0]), cut[1] - cut[0] - len(parts[1])]
        parts[0 if len(group) <= room[0] else 1 if len(group) <= room[1] else 2].extend(group)
    train, val, test = (np.array(part, int) for part in parts)
    return rng.permutation(train), val, test


def graphs(mols, weights="normal", quiet=True, least=0):
    """The `Graphs` of RDKit molecules or SMILES.

    weights: "normal", D^-1/2 (A + I) D^-1/2 with D the row sums of A + I; "sum", A + I; "order", like "normal" with
    the bond orders (1, 1.5, 2, 3) in A.   least: smallest number of nodes to pad to.
    """
    parts = []
    for mol in tqdm(molecules(mols), desc="graphs", unit=" molecules", disable=quiet or None, leave=False):
        parts.append((_atoms(mol), _neighbours(mol, weights)))
    degree = max(len(neighbours) for _, lists in parts for neighbours in lists)
    rows = []
    for features, lists in parts:
        out = np.zeros((len(features), features.shape[1] + 2 * degree), np.float32)
        out[:, :features.shape[1]] = features
        for atom, neighbours in enumerate(lists):
            out[atom, -2 * degree:][:len(neighbours)], out[atom, -degree:][:len(neighbours)] = zip(*neighbours)
        rows.append(out)
    starts = np.concatenate([[0], np.cumsum([len(out) for out in rows])])
    return Graphs(np.concatenate(rows), starts, degree, max(least, int(np.diff(starts).max())))


def _atoms(mol):
    """One-hot features of the atoms of a molecule, (atoms, f) float32."""
    counts = list(COUNTS.values())
    widths = [len(ELEMENTS) + 1, *map(len, counts), 3, 3]
    offsets = np.cumsum([0, *widths])
    out = np.zeros((mol.GetNumAtoms(), offsets[-1]), np.float32)
    for i, atom in enumerate(mol.GetAtoms()):
        symbol = atom.GetSymbol()
        places = [ELEMENTS.index(symbol) if symbol in ELEMENTS else len(ELEMENTS)]
        values = atom.GetDegree(), atom.GetFormalCharge(), atom.GetTotalNumHs()
        places += [min(max(value, span[0]), span[-1]) - span[0] for value, span in zip(values, counts)]
        letter = atom.GetProp("_CIPCode") if atom.HasProp("_CIPCode") and int(atom.GetChiralTag()) <= 2 else None
        places += [atom.GetIsAromatic() + (atom.IsInRing() and 1), {"R": 1, "S": 2}.get(letter, 0)]
        out[i, offsets[:-1] + places] = 1
    return out


def _neighbours(mol, weights):
    """For every atom [(neighbour, weight), ...], the atom itself first."""
    lists = [[(i, 1.0)] for i in range(mol.GetNumAtoms())]
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        weight = max(bond.GetBondTypeAsDouble(), 1.0) if weights == "order" else 1.0
        lists[i].append((j, weight))
        lists[j].append((i, weight))
    if weights == "sum":
        return lists
    sums = [sum(weight for _, weight in neighbours) for neighbours in lists]
    return [[(j, weight / (sums[i] * sums[j]) ** 0.5) for j, weight in neighbours] for i, neighbours in enumerate(lists)]


def fingerprints(mols, names=("morgan",), bits=2048, quiet=True):
    """log(1 + count) of each hashed pattern, (n, bits * len(names)) float32.

    names: "morgan", neighbourhoods of radius two; "pairs", pairs of atoms with the number of bonds between them;
    "torsions", paths of four atoms. Several are concatenated, each divided by its norm (zero stays zero).
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
