"""CSV files as people have them: bytes -> names of columns and lines, or one sentence that says what is wrong and where;
and back, with columns added.

    names, lines = tables.lines(path, tables.content(path));   smiles, = tables.columns(path, names, ["smiles"])

Proved by: proteins/test_proteins.py and molecules/test_molecules.py
"""

import csv
import gzip
import hashlib
import io
import os
import zlib

import data


def content(path, hint="expected a CSV file"):
    """The bytes of a file, unpacked if its name ends in .gz.  ValueError: it is damaged.   FileNotFoundError."""
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(data.existing(path, hint), "rb") as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or not a gzip file: {error}") from error


def compare(content, sha256, path):
    """Prints a note if the unpacked bytes of a file are not those that the published figures were made from."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        print(f"note: {path} is not the file that the figures in results/README.md were made from: sha256 {found}, "
              f"there {sha256}")


def text(path, content):
    """The text of these bytes of a file.  ValueError: they are not UTF-8."""
    if b"\0" in content:
        raise ValueError(f"{path} has zero bytes, as UTF-16 does; expected UTF-8: save it in that encoding")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {content[:error.start].count(10) + 1}: byte 0x{content[error.start]:02x} is not "
                         "UTF-8; save it in that encoding") from error


def lines(path, content, limit=None):
    """(names of columns, [(line number, fields), ...]) of a CSV file, given its bytes; the first `limit` rows.

    ValueError: not UTF-8, no names in the first line, fields that are not separated by commas, a line with more or fewer of
    them than the header.
    """
    reader, found = csv.reader(io.StringIO(text(path, content), newline="")), []
    try:
        columns = [name.strip() for name in next(reader, [])]
        other = next((mark for mark in ";\t|" if mark in "".join(columns)), None)
        if not any(columns) and content.strip():
            raise ValueError("it is empty; expected the names of the columns")
        if len(columns) == 1 and other:
            raise ValueError(f"fields are separated by {other!r}; expected commas, and a point in decimals")
        for line in reader:
            if len(found) == limit:
                break
            if line and len(line) != len(columns):  # an empty line is no row
                raise ValueError(f"{len(line)} fields, and {len(columns)} in the header; expected as many: quote a field that "
                                 "holds a comma, write decimals with a point")
            if line:
                found.append((reader.line_num, line))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return columns, found


def columns(path, names, wanted, hint=""):
    """[position of each of the `wanted` columns].  ValueError: one that is not there, or there twice.
    hint: what to do if one is not there."""
    for name in wanted:
        if name not in names:
            raise ValueError(f"{path} has no column {name!r}; its columns are {', '.join(map(repr, names)) or 'none'}{hint}")
        if names.count(name) > 1:
            raise ValueError(f"{path} has {names.count(name)} columns {name!r}; expected one: rename or remove the others")
    return [names.index(name) for name in wanted]


def write(path, names, rows, added):
    """Write a CSV file, completely or not at all: the columns `names` of `rows`, then those of `added`, {name: (n,)}.

    A name of `added` that is among `names` gets an underscore. Numbers have seven digits.
    """
    header = list(names)
    for name in added:
        while name in header:
            name += "_"
        header.append(name)
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(
        [header, *([*row, *map(shown, new)] for row, new in zip(rows, zip(*added.values()), strict=True))])
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with data.replacing(path) as file:
        file.write(out.getvalue().encode())


def shown(value):
    """A cell as text."""
    return f"{value:.7g}" if isinstance(value, float) else str(value)
