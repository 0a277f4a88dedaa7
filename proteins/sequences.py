"""Files -> checked protein sequences: FLIP's GB1 benchmark, the full GB1 landscape, an artificial landscape, your own.

  one_vs_rest, two_vs_rest, three_vs_rest, low_vs_high, sampled     FLIP (Dallago et al. 2021): 8,733 variants of GB1, in
             which 4 of 265 residues vary; training, validation (some of the training rows) and test as in FLIP's files,
             test rows shuffled, so that the first of them stand for all
  landscape  all 149,361 variants that Wu et al. 2016 measured: a random fifth is for testing, the same for every seed; the
             others are in an order drawn by `seed`, so that a smaller training set is the first rows of a larger one
  made       1,296 sequences, all words of 4 residues out of 6; needs no file. The target is a sum over positions of a
             table of main effects, plus a sum over neighbouring positions of a product of two such tables. Every table has
             mean 0, so the two sums are uncorrelated, and a model without interactions can explain at most the share
             MADE_LINEAR of the target's variance.
  FILE.csv   your own: a column of sequences and a column of numbers (`own`)

Rows are in the order fitted, held out (validation), test. An encoding turns residues into numbers, (n, length, 20):

  onehot     one channel is 1: two residues are equal or different
  blosum     the inner product of two residues is their cosine in the positive part of BLOSUM62 (Henikoff & Henikoff 1992),
             which says how readily evolution replaces one by the other
  centred    onehot minus its mean over the training rows, at each position

Only positions that vary among the training rows are encoded: with 261 equal residues of 265, every cosine would be above
0.98. If the training sequences have several lengths, every position is encoded, and shorter sequences end in zeros, which
are masked. An encoding is fitted on training rows alone and encodes every new row by itself.

The regression is on a function of the target y that keeps its order, with mean 0 and variance 1 on the training rows:

  raw   y      log   log(y - min y + sd(y) / 100), for multiplicative effects      rank   normal scores of the ranks of y

    split = sequences.load("two_vs_rest", "protein")
    x = sequences.fit(split.sequences[:split.n_train], "onehot")(split.sequences)

Proved by: proteins/test_proteins.py and proteins/test_own.py
"""

import hashlib
import os
import zipfile
from collections import Counter
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, rankdata

import data
from own import tables

RESIDUES = "ARNDCQEGHILKMFPSTWYV"
FLIP = ("one_vs_rest", "two_vs_rest", "three_vs_rest", "low_vs_high", "sampled")
SPLITS = ("made", *FLIP, "landscape")
ENCODINGS = ("onehot", "blosum", "centred")
TARGETS = ("raw", "log", "rank")
FILES = {  # the archive (FLIP's own name for it lacks the prefix flip_gb1_), and the table in it
    **{split: ("flip_gb1_splits.zip", f"splits/{split}.csv") for split in FLIP},
    "landscape": ("flip_gb1_four_mutations_full_data.csv.zip", "four_mutations_full_data.csv")}
SHA256 = {  # checksums of the tables from which the results were computed
    "one_vs_rest": "e901db7f88f5851f6d5177ca78d8ba9c7b01b4712cd553cb309f29a34f569d02",
    "two_vs_rest": "b368e4564e10e33735f897c9b63f1be7030082e565c6d4e1368d6f1641a310de",
    "three_vs_rest": "b8aa60cc061013a5c2e6f4070593c82976b1d9e5c9058a66ad57c6e9c3cec023",
    "low_vs_high": "190217d19cdafec40d8a961fce2dcbfd9fc89c9f4c6fa994aa90861b06e073fa",
    "sampled": "19bcb946fb9f8fe5ac1d5ed0aa85d4a85848b44744560d9684cc278935f3bd16",
    "landscape": "14cfb23e04edcaf99daa106743782b9289c1c673fcb6193ed90f8f19d33755f3"}
WORDS = {"set": {"train": "train", "test": "test"}, "validation": {
    **dict.fromkeys(("true", "t", "yes", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0", "0.0", ""), False)},
    "part": {"train": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}}
EXPECTED = {"set": "train or test", "validation": "True, yes, 1; or False, no, 0 or an empty cell",
            "part": "train, validation or test"}
SOURCE = "https://github.com/J-SNACKKB/FLIP, folder splits/gb1"
MADE_LINEAR = 0.6
BLOSUM62_ROWS = """
    4 -1 5 -2 0 6 -2 -2 1 6 0 -3 -3 -3 9 -1 1 0 0 -3 5 -1 0 0 2 -4 2 5 0 -2 0 -1 -3 -2 -2 6 -2 0 1 -1 -3 0 0 -2
    8 -1 -3 -3 -3 -1 -3 -3 -4 -3 4 -1 -2 -3 -4 -1 -2 -3 -4 -3 2 4 -1 2 0 -1 -3 1 1 -2 -1 -3 -2 5 -1 -1 -2 -3 -1
    0 -2 -3 -2 1 2 -1 5 -2 -3 -3 -3 -2 -3 -3 -3 -1 0 0 -3 0 6 -1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4 7 1 -1 1
    0 -1 0 0 0 -1 -2 -2 0 -1 -2 -1 4 0 -1 0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1 1 5 -3 -3 -4 -4 -2 -2 -3 -2 -2
    -3 -2 -3 -1 1 -4 -3 -2 11 -2 -2 -2 -3 -2 -1 -2 -3 2 -1 -1 -2 -1 3 -3 -2 -2 2 7 0 -3 -3 -3 -1 -2 -2 -3 -3 3 1
    -2 1 -1 -2 -2 0 -3 -1 4
"""  # the lower triangle, residues in the order of RESIDUES


class Split(NamedTuple):
    """Rows in the order fitted, held out, test."""
    sequences: list  # (n_train + n_test) str
    targets: np.ndarray  # (n_train + n_test,) float64
    n_fit: int  # rows fitted while something is chosen; the other n_train - n_fit are the validation rows
    n_train: int  # training rows, validation rows included


def load(name, folder=None, seed=0, quiet=True):
    """The Split named above.

    folder: holds the archives of FILES, or their tables, in `splits` or directly.   seed: for `landscape` and `made`.
    quiet: do not compare the file with SHA256, and do not count test rows that are training rows too.
    Rows whose sequence has letters other than RESIDUES are left out; a line says how many.
    Raises ValueError: unknown name; a file that is not text; a column that is missing or occurs twice; a target, set or
    validation with no meaning (the message names its line); no row to fit or to test; equal targets.   FileNotFoundError.
    """
    if name not in SPLITS:
        raise ValueError(f"split {name!r} is unknown; choose one of {', '.join(SPLITS)}")
    if name == "made":
        return _shuffled(*_made(), seed)
    if folder is None:
        raise ValueError(f"split {name} needs --data FOLDER, the folder that holds {FILES[name][0]} "
                         f"(download it from {SOURCE}); --split made needs no file")
    what = f"{FILES[name][1]} in {folder}"
    path, content = _table(name, folder, quiet)
    if name == "landscape":
        return _checked(_shuffled(*_columns(path, content, "sequence", "Fitness"), seed), what, quiet)
    sequences, targets, part, held_out = _columns(path, content, "sequence", "target", set="set", validation="validation")
    turn = np.where(part == "test", np.random.default_rng(0).random(len(part)), -1)  # the file is sorted by position
    order = np.argsort(turn, kind="stable")
    split = _parted([sequences[i] for i in order], targets[order], np.where(part == "test", 2, held_out)[order])
    return _checked(split, what, quiet)


def own(path, content, sequence="sequence", target="target", part=None, seed=0, quiet=True):
    """The Split of a CSV file of your own, given its bytes.

    sequence, target, part: names of columns. `part` says train, validation (also valid or val) or test; validation rows are
    training rows too. None: a fifth of the rows is for testing.   seed: of that fifth, and of the order of the training rows.
    quiet: say neither how many rows are for testing nor how many of them are training rows too.
    Rows with other letters, ValueError: as for `load`, but two rows to fit and two to test are needed.
    """
    sequences, targets, *parts = _columns(path, content, sequence, target, "; name yours with --sequence, --target and --set",
                                          **({"part": part} if part else {}))
    order = np.random.default_rng(seed).permutation(len(targets))
    tested = max(2, round(len(order) / 5))
    parts = parts[0][order] if parts else np.where(np.arange(len(order)) < tested, 2, 0)
    split = _parted([sequences[i] for i in order], targets[order], parts)
    if split.n_fit == split.n_train:  # no row is named for validation
        split = split._replace(n_fit=split.n_train - split.n_train // 5)
    split = _checked(split, path, quiet, least=2)
    if part is None and not quiet:
        print(f"note: {tested} of the {len(order)} rows of {path}, drawn with seed {seed}, are kept for testing; to "
              "choose them, add a column of train and test and name it with --set")
    return split


def _parted(sequences, targets, parts):
    """The Split of these rows, sorted by `parts`: 0 fitted, 1 held out, 2 test; rows of one part keep their order."""
    order, sizes = np.argsort(parts, kind="stable"), np.bincount(parts, minlength=3)
    return Split([sequences[i] for i in order], targets[order], int(sizes[0]), int(sizes[:2].sum()))


def _checked(split, what, quiet, least=1):
    """The split, if it has `least` rows to fit and to test, or a ValueError; with notes of test rows that are training rows
    too, and of training rows that have the same sequence."""
    fit, test = split.n_fit, split.sequences[split.n_train:]
    if min(fit, len(test)) < least:
        number = ("one", "two")[least - 1]
        raise ValueError(f"{what} has {fit} rows to fit, {split.n_train - fit} to validate and {len(test)} to test; expected "
                         f"at least {number} to fit and {number} to test")
    train = set(split.sequences[:split.n_train])
    both = [sequence for sequence in test if sequence in train]
    if both and not quiet:
        print(f"note: {len(both)} of {len(test)} test rows of {what} are training rows too, such as {both[0]}")
    if len(train) < split.n_train and not quiet:
        print(f"note: {split.n_train - len(train)} of {split.n_train} training rows of {what} repeat the sequence of another, "
              "so that errors on rows left out are too small")
    return split


def _shuffled(sequences, targets, seed):
    """The Split of these rows: a fifth for testing, the same for every seed; the others in an order drawn by `seed`, with
    the last fifth of them held out."""
    order = np.random.default_rng(0).permutation(len(targets))
    test, train = np.split(order, [len(order) // 5])
    order = np.concatenate([train[np.random.default_rng(seed).permutation(len(train))], test])
    return Split([sequences[i] for i in order], targets[order], len(train) - len(train) // 5, len(train))


def _made(letters=6, length=4):
    """All sequences of `length` residues, and their targets, of variance 1."""
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(3, length, letters))
    tables -= tables.mean(axis=2, keepdims=True)
    states = np.indices((letters,) * length).reshape(length, -1).T
    main, left, right = (np.stack([table[p][states[:, p]] for p in range(length)]) for table in tables)
    parts = main.sum(axis=0), (left[:-1] * right[1:]).sum(axis=0)
    shares = MADE_LINEAR, 1 - MADE_LINEAR
    targets = sum(share**0.5 * part / part.std() for share, part in zip(shares, parts))
    return ["".join(RESIDUES[i] for i in row) for row in states], targets


def clean(text):
    """A cell as a sequence: lower case is read as upper case."""
    text = text.strip()
    return text.upper() if text.isascii() else text  # upper() turns some other letters into two letters S


def _columns(path, content, sequence, target, hint="", **others):
    """sequences (list), targets (n,) float64 and the other columns of a table, checked line by line.

    sequence, target: names of columns.   hint: as for `tables.columns`.   others: {key of WORDS: name of the column}.
    Rows whose sequence has no letter or letters other than RESIDUES are left out.
    """
    sequences, columns, odd = [], [], Counter()  # odd: how often each other letter occurs, in rows; "" for no letter
    names, lines = tables.lines(path, content)
    places = tables.columns(path, names, (sequence, target, *others.values()), hint)
    for line, fields in lines:
        text, value, *words = (fields[place].strip() for place in places)
        text = clean(text)
        unknown = set(text) - set(RESIDUES)
        if unknown or not text:
            odd.update(unknown or {""})
            continue
        sequences.append(text)
        columns.append([_number(value, target, path, line),
                        *(_word(word, key, others[key], path, line) for word, key in zip(words, others))])
    left = len(lines) - len(sequences)
    if left:
        counts = ", ".join(f"{repr(letter) if letter else 'no letter'} in {count}" for letter, count in odd.most_common(20))
        left_out = f"{path}: {left} of {len(lines)} rows are left out; expected only the letters {RESIDUES}: {counts}"
        if not sequences:
            raise ValueError(f"{left_out}; no row remains. Correct the column {sequence}")
        print(left_out)
    if not sequences:
        raise ValueError(f"{path} has no row below its header")
    targets, *rest = map(np.array, zip(*columns))
    if np.ptp(targets) == 0:
        raise ValueError(f"{path}, lines 2 to {lines[-1][0]}: every {target} is {targets[0]:g}, so there is nothing to learn")
    return sequences, targets, *rest


def _number(text, column, path, line):
    try:
        value = float(text.replace("_", "?"))  # Python reads 1_5 as 15
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"{path}, line {line}: {column} {text!r}; expected a finite number"
                         + (", with a decimal point" if "," in text else "") + ". Correct the line or remove it")
    return value


def _word(text, key, column, path, line):
    """The meaning of a word, WORDS[key]."""
    if text.lower() not in WORDS[key]:
        raise ValueError(f"{path}, line {line}: {column} {text!r}; expected {EXPECTED[key]}. Correct the line or remove it")
    return WORDS[key][text.lower()]


def _table(name, folder, quiet):
    """The csv file of a split: its name for messages, and its bytes, compared with SHA256 unless quiet."""
    path, content = _found(*FILES[name], folder)
    if not quiet:
        tables.compare(content, SHA256[name], path)
    return path, content


def _found(archive, member, folder):
    """The name for messages and the bytes of a file, from the folder or from an archive in it."""
    for path in (os.path.join(folder, member), os.path.join(folder, os.path.basename(member))):
        if os.path.exists(path):
            return path, tables.content(path)
    path, own = os.path.join(folder, archive), os.path.join(folder, archive.removeprefix("flip_gb1_"))
    path = own if os.path.exists(own) else path
    if not os.path.exists(path):
        raise FileNotFoundError(f"found none of {path}, {own} and {os.path.join(folder, member)}; download one of them from "
                                f"{SOURCE} and give --data the folder that holds it")
    with data.intact(path, f"is truncated or holds no {member}", "fetch it again"), zipfile.ZipFile(path) as file:
        return f"{member} in {path}", file.read(member)


class Encoding(NamedTuple):
    """A fitted encoding. Called on a list of n sequences it returns (n, p, 20) float32; shorter sequences end in zeros.

    length: residues in every sequence; None if the training rows have several lengths.
    positions: (p,), the positions that vary; None: all.   mean: (p, 20), subtracted; None: nothing is.
    longest: if lengths vary, the number of positions p: residues in the longest training row, or in a longer row to come.
    """
    name: str
    length: int | None
    positions: np.ndarray | None
    mean: np.ndarray | None
    longest: int

    def __call__(self, sequences):
        """ValueError: a letter that is not a residue, or a length that the training rows do not allow."""
        for i, text in enumerate(sequences, 1):
            if fault := self.fault(text):
                raise ValueError(f"sequence {i} of {len(sequences)}, {short(text)}, {fault}. Leave it out")
        codes = letters(sequences, self.length or self.longest)
        codes = codes if self.positions is None else codes[:, self.positions]
        table = np.zeros((256, 20))
        table[np.frombuffer(RESIDUES.encode(), np.uint8)] = np.eye(20) if self.name != "blosum" else blosum()
        x = table.astype(np.float32)[codes]
        return x if self.mean is None else x - self.mean

    def fault(self, text):
        """Why this sequence cannot be encoded, or None."""
        other, least, most = set(text) - set(RESIDUES), self.length or 1, self.length or self.longest
        if other:
            return f"has the letter {min(other)!r}; expected only {RESIDUES}"
        if not least <= len(text) <= most:
            expected = f"{most}, as in the training rows" if self.length else f"1 to {most}"
            return f"has {len(text)} residues; expected {expected}"

    @property
    def key(self):
        """The name and a digest of what was fitted: encodings with the same key encode every sequence in the same way."""
        fitted = [field.tolist() if isinstance(field, np.ndarray) else field for field in self]
        return f"{self.name}-{hashlib.blake2b(repr(fitted).encode(), digest_size=6).hexdigest()}"


def short(text):
    """A sequence for messages."""
    return f"{text[:30]!r}{'...' * (len(text) > 30)}"


def letters(sequences, longest):
    """The letters as bytes, (n, longest) uint8, with spaces at the end of shorter sequences."""
    return np.frombuffer("".join(s.ljust(longest) for s in sequences).encode(), np.uint8).reshape(-1, longest)


def fit(sequences, name, longest=0):
    """The Encoding `name`, fitted on training sequences.

    longest: if lengths vary, residues in the longest sequence to be encoded later; padding never changes the kernel.
    Raises ValueError: unknown encoding; no sequences; no position varies; "centred" for sequences of several lengths.
    """
    if name not in ENCODINGS:
        raise ValueError(f"encoding {name!r} is unknown; choose one of {', '.join(ENCODINGS)}")
    if not sequences:
        raise ValueError("got no training sequences; an encoding is fitted on them")
    lengths = {len(sequence) for sequence in sequences}
    most = max(lengths)
    if len(lengths) > 1:
        if name == "centred":
            raise ValueError(f"encoding centred with sequences of {min(lengths)} to {most} residues: the same position means "
                             "different things in them; use onehot or blosum")
        return Encoding(name, None, None, None, max(most, longest))
    codes = letters(sequences, most)
    positions = np.flatnonzero((codes != codes[:1]).any(axis=0))
    if not len(positions):
        raise ValueError(f"all {len(sequences)} training sequences are equal, so no position varies")
    encoding = Encoding(name, most, positions, None, most)
    return encoding if name != "centred" else encoding._replace(
        mean=encoding(sequences).mean(axis=0, dtype=np.float64).astype(np.float32))


def note_unseen(encoding, train, new, what):
    """Says how many new sequences differ from the training sequences where those are all equal, which no kernel can see."""
    if encoding.length and new:
        unseen = letters(new, encoding.length) != letters(train[:1], encoding.length)
        unseen[:, encoding.positions] = False
        rows = np.flatnonzero(unseen.any(axis=1))
        if len(rows):
            print(f"note: {len(rows)} of {len(new)} {what} have a residue where all training rows have another, such as "
                  f"{short(new[rows[0]])} at position {unseen[rows[0]].argmax() + 1}: it has no effect")


def blosum():
    """V sqrt(max(S, 0)) of BLOSUM62 = V S V^T, (20, 20), with each row scaled to norm 1, as in onehot."""
    B = np.zeros((20, 20))
    B[np.tril_indices(20)] = BLOSUM62_ROWS.split()
    S, V = np.linalg.eigh(B + np.tril(B, -1).T)
    root = V * np.sqrt(np.maximum(S, 0))
    return root / np.linalg.norm(root, axis=1, keepdims=True)


def transform(name, y):
    """(forward, inverse): the function `name` of TARGETS fitted on y (n,), and its inverse, both (m,) -> (m,).

    Outside the range of y, `log` replaces values below min y by min y, and `rank` is constant in both directions.
    Raises ValueError: unknown name; all y are equal.
    """
    if name not in TARGETS:
        raise ValueError(f"target {name!r} is unknown; choose one of {', '.join(TARGETS)}")
    if np.ptp(y) == 0:
        raise ValueError(f"the {len(y)} training targets are all {y[0]:g}, so there is nothing to learn")
    low, floor = y.min(), y.std() / 100
    values, where = np.unique(y, return_index=True)
    scores = norm.ppf((rankdata(y) - 0.5) / len(y))[where]
    function, undo = {
        "raw": (lambda y: y, lambda z: z),
        "log": (lambda y: np.log(np.maximum(y - low, 0) + floor), lambda z: np.exp(z) - floor + low),
        "rank": (lambda y: np.interp(y, values, scores), lambda z: np.interp(z, scores, values))}[name]
    mean, sd = function(y).mean(), function(y).std()
    return lambda y: (function(y) - mean) / sd, lambda z: undo(z * sd + mean)
