"""Tiles of a kernel matrix on disk. A killed run loses only the tiles in progress; damaged tiles are detected and recomputed.

A store is a folder that holds one matrix. A file that is only half written is never used:

  manifest.json   what K is: kernel, engine, tile side, dtype, number and checksum of its inputs
  rows.npy        a digest (8 bytes) of the input of each row of K; columns.npy likewise, if K is not symmetric
  3-5.npy         tile (3, 5): written under another name, fsynced, then renamed
  tiles-I.txt     the journal of process I. A line "3 5 1024 1024 1 89abcdef" is the tile, its shape, how often it was written,
                  and the CRC-32 of its file; the line is added after the file was renamed

A tile without a line is not finished and is computed again. If a line has no file, or a file of another size or checksum, the
tile is damaged: it is reported, and the next run computes it again. A process checks the tiles of earlier runs before it
computes any, and its own tiles when it first reads them.

The digests show which inputs the tiles were computed from. A run may have more inputs than the store, or fewer: if the inputs
that both have are the same, every whole tile is used again. A run with other inputs, another kernel or another tile side is
refused with a message that says what differs.

    kept = store.create("DIR", {"kernel": "fc", "tile": 1024}, store.digests(x))
    K = tiles.gram(kernel_fn, x, tile=1024, store=kept)
    python -m large.store DIR       lists the stores in and below DIR and checks their tiles; exit code 1 if one is damaged

Cost: each tile is written once and passes once through a CRC (3 GB/s); digests take 15 microseconds per image.
Proved by: large/test_large.py
"""

import copy
import errno
import fcntl
import glob
import hashlib
import io
import json
import mmap
import os
import re
import sys
import threading
import time
import weakref
import zlib
from contextlib import suppress

import numpy as np
from tqdm import tqdm

import data
import tiles

FORMAT = 1
LINE = re.compile(rb"(\d+) (\d+) (\d+) (\d+) (\d+) ([0-9a-f]{8})")
INPUTS = ("rows", "columns")
DENIED = set()  # folders of checkpoints in which this process may not write


def create(folder, about, rows, columns=None, process=0):
    """Opens the store in `folder`, or makes one.

    about: {name: value}, everything that the tiles depend on, `tile` included; it must agree with the folder's manifest. dtype
    is float32 unless given.   rows, columns: `digests` of the inputs of rows and of columns; columns is None if K is
    symmetric.   process: the number of the process whose journal to write.
    Raises ValueError: the folder holds another matrix.   OSError: it cannot be read or written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(f"the store {folder} cannot be made: {error.strerror}") from error
    lock = locked(os.path.join(folder, f"tiles-{process}.txt"))
    written = any(map(os.path.getsize, glob.glob(os.path.join(glob.escape(folder), "tiles-*.txt"))))
    known = manifest(folder)  # another process may just have made it, but before the first tile
    if written and known is None:
        raise ValueError(f"{folder} has tiles but no manifest.json, so it is unknown of which matrix. Remove it, or give this "
                         "run a store of its own")
    want = json.loads(json.dumps({"format": FORMAT, "dtype": "float32", **about}))
    seen = {"rows": rows} if columns is None else {"rows": rows, "columns": columns}
    if known is not None:
        names = [name for name in {**want, **known} if name not in INPUTS]
        differ = [f"{name} is {known.get(name)!r} there, {want.get(name)!r} here"
                  for name in names if known.get(name) != want.get(name)]
        if not differ and ("columns" in known) != ("columns" in seen):
            differ = ["one of the two is symmetric, the other is not"]
        if differ:
            raise ValueError(f"{folder} holds another matrix: {'; '.join(differ)}. Give this run a "
                             "store of its own")
    for name, new in seen.items():
        old = np.zeros(0, "<u8") if known is None else inputs(folder, name, known)
        shared = min(len(old), len(new))
        changed = np.flatnonzero(old[:shared] != new[:shared])
        if len(changed):
            raise ValueError(
                f"{folder} was made from other inputs: {len(changed)} of the {shared} {name} that both have "
                f"differ, the first is number {changed[0]}. Possible causes: other files, another --seed, other flags "
                "for inputs (of images --whiten, --fit_on, --n_test, augmentation). Give this run a store of its own")
        if len(new) > len(old):
            write(os.path.join(folder, f"{name}.npy"), header(new.dtype, new.shape), new.tobytes())
        longer = max(old, new, key=len)
        want[name] = {"number": len(longer), "crc": zlib.crc32(longer.tobytes())}
    if want != known:
        write(os.path.join(folder, "manifest.json"), json.dumps(want, indent=1).encode())
    for name in os.listdir(folder):  # left by killed runs; a file younger than an hour may be in use by another process
        path = os.path.join(folder, name)
        with suppress(FileNotFoundError):
            if name.endswith(".tmp") and os.path.getmtime(path) < time.time() - 3600:
                os.remove(path)
    kept = Store(folder, process)
    kept.lock = lock  # held as long as this store is in use
    return kept


class Lock:
    """An open, locked file. It is closed, and so unlocked, when the last reference to it is gone."""

    def __init__(self, file):
        self.file = file

    def __del__(self):
        self.file.close()


LOCKS = weakref.WeakValueDictionary()  # of this process: {path: Lock}


def locked(journal):
    """The Lock on a journal, which may have only one writer; None if it cannot be locked.  OSError: another process has it."""
    path = os.path.realpath(journal)
    try:
        held = LOCKS.get(path)
        if held and os.path.exists(path) and os.path.samestat(os.fstat(held.file.fileno()), os.stat(path)):
            return held
        lock = Lock(open(path, "ab"))
        fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        LOCKS[path] = lock
        return lock
    except BlockingIOError as error:
        raise OSError(f"{os.path.dirname(journal)} is in use by another run: wait until it ends, or give this run a store "
                      "of its own. Processes that share a run of train_cifar.py need --coordinator, --processes and "
                      "--process") from error
    except OSError:
        return None  # a store that we may only read, or a file system without locks


class Store:
    """The tiles of one matrix, {(i, j): array}, in a folder made by `create`.

    store[key] returns an array in memory that this thread's next read overwrites: copy it to keep it.
    store[key] = tile returns when the tile is on disk. Any number of threads may read, only one may write.
    Raises ValueError: the folder is not a store, or a tile is damaged.   OSError: a file cannot be read or written.
    """

    def __init__(self, folder, process=0):
        self.folder, self.journal = folder, os.path.join(folder, f"tiles-{process}.txt")
        self.about = manifest(folder)
        if self.about is None:
            raise ValueError(f"{folder} has no manifest.json: it is not a store")
        self.dtype = np.dtype(self.about["dtype"])
        self.trusted, self.local = set(), threading.local()
        self.cached = None  # the keys that are read through the page cache, or None: all
        self.lines, self.times = {}, {}  # (i, j): (rows, columns, crc) from its last line; (i, j): times written
        for name in sorted(os.listdir(folder)):
            if re.fullmatch(r"tiles-\d+\.txt", name):
                with open(os.path.join(folder, name), "rb") as file:
                    for match in filter(None, map(LINE.fullmatch, file.read().split(b"\n"))):
                        i, j, rows, columns, times = map(int, match.groups()[:5])
                        if times > self.times.get((i, j), 0):
                            self.times[i, j] = times
                            self.lines[i, j] = rows, columns, int(match[6], 16)

    @property
    def entries(self):
        """Entries of all finished tiles."""
        return sum(rows * columns for rows, columns, _ in self.lines.values())

    def intact(self, shapes, quiet=True):
        """The keys of `shapes`, {key: (rows, columns)}, whose tiles are stored, undamaged and at least that large.

        Damaged tiles are reported and dropped, so that they are computed again.
        """
        self.cached = self._cached(shapes)
        stored = [key for key, shape in shapes.items()
                  if key in self.lines and np.all(np.array(self.lines[key][:2]) >= shape)]
        for key in tqdm(stored, desc=f"checking {self.folder}", unit=" tiles", leave=False,
                        disable=quiet or None):
            problem = self.damage(key)
            if problem:
                tqdm.write(f"{problem}: the tile is computed again")
                del self.lines[key]
        return {key for key in stored if key in self.lines}

    def _cached(self, shapes):
        """The keys of {key: (rows, columns)} whose tiles are read through the page cache, or None: all.

        We take the page cache to be half of the free memory. If it cannot hold all tiles, each tile would push out another
        before that one is read again. So a share of the tiles, evenly spread, stays in it, and the others are read past it."""
        size = sum(rows * columns for rows, columns in shapes.values()) * self.dtype.itemsize
        share = tiles.free_memory() / 2 / max(1, size)
        taken = np.floor(np.arange(len(shapes) + 1) * min(share, 1.0))
        return None if share >= 1 else {key for key, more in zip(shapes, np.diff(taken)) if more}

    @property
    def direct(self):
        """Whether some tiles are read past the page cache."""
        return self.cached is not None

    def part(self, keys):
        """A copy of this store for reading only the tiles `keys`."""
        part = copy.copy(self)
        part.cached = self._cached({key: self.lines[key][:2] for key in keys}) if self.direct else None
        return part

    def damage(self, key):
        """What is wrong with a finished tile, as a message, or None."""
        try:
            self[key]
        except (ValueError, OSError) as error:
            return str(error)

    def path(self, key):
        return os.path.join(self.folder, f"{key[0]}-{key[1]}.npy")

    def __contains__(self, key):
        return key in self.lines

    def __getitem__(self, key):
        rows, columns, crc = self.lines[key]
        start = len(header(self.dtype, (rows, columns)))
        size = start + rows * columns * self.dtype.itemsize
        cached = self.cached
        length = self._read(self.path(key), size + 1, cached is not None and key not in cached)
        if length != size:
            raise ValueError(f"{self.path(key)} has {os.path.getsize(self.path(key))} bytes, not {size}")
        content = memoryview(self.local.buffer)[:size]
        if key not in self.trusted:
            if zlib.crc32(content) != crc:
                raise ValueError(f"{self.path(key)} has checksum {zlib.crc32(content):08x}, not {crc:08x}")
            self.trusted.add(key)
        return np.frombuffer(content[start:], self.dtype).reshape(rows, columns)

    def _read(self, path, size, past_cache):
        """Reads up to `size` bytes of a file into this thread's buffer; returns how many it read."""
        if len(getattr(self.local, "buffer", b"")) < size:
            self.local.buffer = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        flag = getattr(os, "O_DIRECT", 0) if past_cache else 0
        try:
            with open(path, "rb", buffering=0, opener=lambda p, f: os.open(p, f | flag)) as file:
                length = read = file.readinto(self.local.buffer)
                while read and read % mmap.PAGESIZE == 0 and length < size:  # one call reads 2 GB at most
                    read = file.readinto(memoryview(self.local.buffer)[length:])
                    length += read
                return length
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except OSError as error:
            if not flag or error.errno != errno.EINVAL:
                raise
            self.cached = None  # this file system cannot bypass the page cache
            return self._read(path, size, False)

    def __setitem__(self, key, tile):
        if tile.dtype != self.dtype:
            raise ValueError(f"tile {key} is {tile.dtype}, and {self.folder} holds {self.dtype}")
        parts = header(self.dtype, tile.shape), np.ascontiguousarray(tile).data.cast("B")
        write(self.path(key), *parts)
        crc = zlib.crc32(parts[1], zlib.crc32(parts[0]))
        self.times[key] = self.times.get(key, 0) + 1
        with data.said(self.journal), open(self.journal, "ab", buffering=0) as journal:
            # begins with a new line, because a killed run may have left the last one incomplete
            journal.write(b"\n%d %d %d %d %d %08x" % (*key, *tile.shape, self.times[key], crc))
        self.lines[key] = *tile.shape, crc
        self.trusted.discard(key)


class Checkpoint:
    """The state of a solve in an .npz file without pickle, replaced as a whole; for `pcg.solve`.

    about: {name: value}, what identifies the solve: a state is used only if it agrees.   team: process 0 reads and writes the
    file and sends its content to the others, so that the folder need not be shared.
    """

    def __init__(self, path, about, team):
        self.path, self.about, self.team = path, json.dumps(about), team
        self.saved, self.took = time.monotonic(), 0.0

    def load(self):
        """The state, {name: array}; None if there is no file, or it is damaged or belongs to another solve."""
        content = b""
        if self.team.index == 0 and os.path.exists(self.path):
            with open(self.path, "rb") as file:
                content = file.read()
        content = np.frombuffer(content, np.uint8)
        size = self.team.all_reduce(np.array([len(content)]))[0]
        if size == 0:
            return None
        content = self.team.all_reduce(content if len(content) else np.zeros(size, np.uint8))
        try:
            with data.intact(self.path, "is damaged"):
                state = dict(np.load(io.BytesIO(content.tobytes()), allow_pickle=False))
                about = str(state.pop("about"))
        except ValueError:
            return print(f"{self.path} is damaged: this solve starts anew")
        return state if about == f"{self.about} {sorted(state)}" else None

    def save(self, state, finished=False):
        """Writes the state if `finished`, or if writing takes less than a twentieth of the time since it was last written. In
        a store that may only be read, nothing is written, and one line says so."""
        folder = os.path.dirname(self.path)
        if self.team.index == 0 and folder not in DENIED and (finished or time.monotonic() > self.saved + 20 * self.took):
            start = time.monotonic()
            try:
                with data.said(self.path):
                    os.makedirs(folder, exist_ok=True)
                with data.replacing(self.path) as file:
                    np.savez(file, about=f"{self.about} {sorted(state)}", **state)
            except OSError as error:
                if error.__cause__.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                DENIED.add(folder)
                print(f"{folder} may not be written: the state of solves is not kept")
            self.saved = time.monotonic()
            self.took = self.saved - start

    def remove(self):
        """Deletes the file, once its run is over."""
        if self.team.index == 0:
            with suppress(OSError):
                for path in [self.path, *glob.glob(f"{glob.escape(self.path)}.*.tmp")]:  # those are of killed runs
                    os.remove(path)
                os.rmdir(os.path.dirname(self.path))  # unless another solve keeps its state there


def digests(x, block=1024):
    """A 64-bit BLAKE2b digest of each input, its dtype and shape: (n,) uint64."""
    out = []
    for start in range(0, len(x), block):
        rows = x[np.arange(start, min(start + block, len(x)))]
        rows = np.ascontiguousarray(rows.pixels() if hasattr(rows, "pixels") else rows)
        prefix = hashlib.blake2b(f"{rows.dtype} {rows.shape[1:]}".encode(), digest_size=8)
        for row in rows:
            row_hash = prefix.copy()
            row_hash.update(row.data.cast("B"))
            out.append(row_hash.digest())
    return np.frombuffer(b"".join(out), "<u8")


def header(dtype, shape):
    """The header of an .npy file, as bytes; those of its C-ordered array follow."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return out.getvalue()


def write(path, *parts):
    """Writes the bytes of `parts` to the file `path`, completely or not at all."""
    with data.replacing(path) as file:
        for part in parts:
            file.write(part)


def manifest(folder):
    """The manifest of a store as a dict, or None if there is none.  ValueError: it is damaged."""
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, "rb") as file:
            known = json.loads(file.read())
        if known["format"] != FORMAT:
            raise ValueError(f"format {known['format']}, and this program reads {FORMAT}")
        np.dtype(known["dtype"]), known["rows"]["number"], known["tile"]
        return known
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or belongs to another program ({error!r}): give the run a store of its own, or "
                         f"remove {folder} if it is one") from error


def inputs(folder, name, known):
    """The `digests` of rows or columns that the manifest `known` counts; the file may hold more, if a run was killed while it
    added them."""
    path = os.path.join(folder, f"{name}.npy")
    with data.intact(path, "is missing or damaged, so the inputs of the tiles are unknown", f"remove {folder}"):
        if not os.path.exists(path):
            raise ValueError("no such file")
        counted = np.load(path, allow_pickle=False)[:known[name]["number"]]
        if zlib.crc32(counted.tobytes()) != known[name]["crc"]:
            raise ValueError("its checksum is wrong")
        return counted


def report(folder):
    """Prints what the stores in and below `folder` hold, checks every tile, and returns the number of damaged tiles and
    stores."""
    stores, damaged = 0, 0
    for place, _, names in sorted(os.walk(folder)):
        if "manifest.json" not in names:
            continue
        stores, here = stores + 1, 0
        try:
            kept = Store(place)
            for name in set(INPUTS) & set(kept.about):
                inputs(place, name, kept.about)
        except ValueError as error:  # the others are checked all the same
            print(error)
            damaged += 1
            continue
        about = kept.about
        n, m = (about.get(name, about["rows"])["number"] for name in INPUTS)
        rows, columns = (-(-size // about["tile"]) for size in (n, m))
        whole = rows * columns if "columns" in about else rows * (rows + 1) // 2
        size = kept.entries * kept.dtype.itemsize
        print(f"{place}: {n:,} x {m:,}, {len(kept.lines):,} of {whole:,} tiles, {size / 1e9:.3g} GB; "
              + " ".join(f"{name}={value}" for name, value in about.items()
                         if name not in ("format", *INPUTS)))
        for key in tqdm(sorted(kept.lines), unit=" tiles", leave=False, disable=None):
            problem = kept.damage(key)
            if problem:
                tqdm.write(problem)
                here += 1
        print(f"{here} damaged: the next run computes them again" if here else "every tile is intact")
        damaged += here
    if not stores:
        raise ValueError(f"{folder} contains no store: give the folder that a run had as --store")
    return damaged


if __name__ == "__main__":
    try:
        sys.exit(min(1, sum(map(report, sys.argv[1:] or ["."]))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
