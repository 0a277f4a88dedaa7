"""Tiles of a kernel matrix on disk: killed at any instant, nothing finished is lost; damage is found.

A store is a folder that holds one matrix. Nothing half-written is ever believed:

  manifest.json   what K is: kernel, engine, tile side, dtype, number and checksum of its inputs
  rows.npy        a digest (8 bytes) of every input that belongs to a row of K; columns.npy likewise
  3-5.npy         tile (3, 5): written under another name, fsynced, then renamed
  tiles-I.txt     the journal of process I: "3 5 1024 1024 1 89abcdef", tile, shape, how often it was
                  written, and the CRC-32 of its file; a line is added once the file has its name

A file without a line is not finished and is computed again. A line without its file, or with a file
of another size or checksum, is damage: it is named, and computed again by the next run. A process
checks the tiles it finds before it computes, those it wrote where it first reads them.

The digests tell whose tiles these are. A run may bring more inputs than the store has seen, or fewer:
where those that both have are the same, every whole tile still serves. A run with other inputs,
another kernel or tile side is refused, and the refusal says what differs.

    kept = store.create("DIR", {"kernel": "fc", "tile": 1024}, store.digests(x))
    K = tiles.gram(kernel_fn, x, tile=1024, store=kept)
    python -m large.store DIR       what the stores below DIR hold; exit code 1 if anything is damaged

Cost: the bytes of a tile once to disk and through a CRC (3 GB/s); 15 microseconds an image for digests.
Proved by: large/test_large.py
"""

import copy
import errno
import fcntl
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
import zipfile
import zlib
from contextlib import suppress

import numpy as np
from tqdm import tqdm

import data
import tiles

FORMAT = 1
LINE = re.compile(rb"(\d+) (\d+) (\d+) (\d+) (\d+) ([0-9a-f]{8})")
INPUTS = ("rows", "columns")


def create(folder, about, rows, columns=None, process=0):
    """The store in `folder`, made where there is none.

    about: {name: value} that must agree with the folder's manifest: whatever decides a tile, `tile`
    among them; dtype is float32 unless given.   rows, columns: `digests` of the inputs of rows and of
    columns, the latter None where K is symmetric.   process: whose journal to write.
    Raises ValueError: the folder holds another matrix.   OSError: it cannot be read or written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(f"the store {folder} cannot be made: {error.strerror}") from error
    lock = locked(os.path.join(folder, f"tiles-{process}.txt"))
    known = manifest(folder)
    want = json.loads(json.dumps({"format": FORMAT, "dtype": "float32", **about}))
    seen = {"rows": rows} if columns is None else {"rows": rows, "columns": columns}
    if known is not None:
        names = [name for name in {**want, **known} if name not in INPUTS]
        differ = [f"{name} is {known.get(name)!r} there, {want.get(name)!r} here"
                  for name in names if known.get(name) != want.get(name)]
        if not differ and ("columns" in known) != ("columns" in seen):
            differ = ["one of the two is symmetric"]
        if differ:
            raise ValueError(f"{folder} holds another matrix: {'; '.join(differ)}. Give this run a "
                             "store of its own")
    for name, new in seen.items():
        old = np.zeros(0, "<u8") if known is None else _inputs(folder, name, known)
        shared = min(len(old), len(new))
        other = np.flatnonzero(old[:shared] != new[:shared])
        if len(other):
            raise ValueError(
                f"{folder} was made from other inputs: {len(other)} of the {shared} {name} that both have "
                f"differ, first number {other[0]}: other files, --seed, --whiten or augmentation, or a "
                "whitening fitted on other images (see --fit_on). Give this run a store of its own")
        if len(new) > len(old):
            write(os.path.join(folder, f"{name}.npy"), header(new.dtype, new.shape), new.tobytes())
        longer = max(old, new, key=len)
        want[name] = {"number": len(longer), "crc": zlib.crc32(longer.tobytes())}
    if want != known:
        write(os.path.join(folder, "manifest.json"), json.dumps(want, indent=1).encode())
    for name in os.listdir(folder):  # what killed runs left; younger ones may be another process's
        path = os.path.join(folder, name)
        with suppress(FileNotFoundError):
            if name.endswith(".tmp") and os.path.getmtime(path) < time.time() - 3600:
                os.remove(path)
    kept = Store(folder, process)
    kept.lock = lock  # until nobody uses this store any more
    return kept


class Lock:
    """An open, locked file; closed, and so unlocked, with the last reference."""

    def __init__(self, file):
        self.file = file

    def __del__(self):
        self.file.close()


LOCKS = weakref.WeakValueDictionary()  # of this process: {path: Lock}


def locked(journal):
    """The Lock on a journal: it has one writer.  OSError: another process has it.  None where nothing can be locked."""
    path = os.path.realpath(journal)
    try:
        held = LOCKS.get(path)
        if held and os.path.exists(path) and os.path.samestat(os.fstat(held.file.fileno()), os.stat(path)):
            return held
        LOCKS[path] = lock = Lock(open(path, "ab"))
        fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError as error:
        raise OSError(f"{os.path.dirname(journal)} is in use by another run: wait until that ends, or give this run a store "
                      "of its own. Processes that share a run need --coordinator, --processes and --process") from error
    except OSError:
        return None  # a store that is only read, or a file system without locks


class Store:
    """The tiles of one matrix, {(i, j): array}, in a folder that `create` has made.

    store[key] is read into memory that this thread's next read overwrites: copy what must last.
    store[key] = tile is on disk when it returns. Every thread may read, one may write.
    Raises ValueError: no store there, or a tile that is damaged.   OSError: reading, writing.
    """

    def __init__(self, folder, process=0):
        self.folder, self.journal = folder, os.path.join(folder, f"tiles-{process}.txt")
        self.about = manifest(folder)
        if self.about is None:
            raise ValueError(f"{folder} has no manifest.json: it is not a store")
        self.dtype = np.dtype(self.about["dtype"])
        self.trusted, self.local = set(), threading.local()
        self.direct = False  # read past the page cache: twice as fast where that cannot hold the tiles
        self.lines, self.times = {}, {}  # (i, j): rows, columns, crc of the last line; times written
        for name in sorted(os.listdir(folder)):
            if re.fullmatch(r"tiles-\d+\.txt", name):
                with open(os.path.join(folder, name), "rb") as file:
                    for found in filter(None, map(LINE.fullmatch, file.read().split(b"\n"))):
                        i, j, rows, columns, times = map(int, found.groups()[:5])
                        if times > self.times.get((i, j), 0):
                            self.times[i, j] = times
                            self.lines[i, j] = rows, columns, int(found[6], 16)

    @property
    def entries(self):
        """Entries of all finished tiles."""
        return sum(rows * columns for rows, columns, _ in self.lines.values())

    def intact(self, shapes, quiet=True):
        """The keys of `shapes`, {key: (rows, columns)}, whose tiles are here, undamaged and as large.

        The damaged are named, and forgotten, so that they are computed again.
        """
        self.direct = self._large(shapes.values())
        here = [key for key, shape in shapes.items()
                if key in self.lines and np.all(np.array(self.lines[key][:2]) >= shape)]
        for key in tqdm(here, desc=f"checking {self.folder}", unit=" tiles", leave=False,
                        disable=quiet or None):
            problem = self.damage(key)
            if problem:
                tqdm.write(f"{problem}: it is computed again")
                del self.lines[key]
        return {key for key in here if key in self.lines}

    def _large(self, shapes):
        """Whether tiles of these (rows, columns) are more than the page cache can hold: half of the free memory."""
        return sum(rows * columns for rows, columns in shapes) * self.dtype.itemsize > tiles.free_memory() / 2

    def part(self, keys):
        """The same tiles for one who reads only `keys`: through the page cache, where that can hold these."""
        part = copy.copy(self)
        part.direct = self.direct and self._large(self.lines[key][:2] for key in keys)
        return part

    def damage(self, key):
        """A sentence on what is wrong with a finished tile, or None."""
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
        length = self._read(self.path(key), size + 1)
        if length != size:
            raise ValueError(f"{self.path(key)} has {os.path.getsize(self.path(key))} bytes, not {size}")
        content = memoryview(self.local.buffer)[:size]
        if key not in self.trusted:
            if zlib.crc32(content) != crc:
                raise ValueError(f"{self.path(key)} has checksum {zlib.crc32(content):08x}, not {crc:08x}")
            self.trusted.add(key)
        return np.frombuffer(content[start:], self.dtype).reshape(rows, columns)

    def _read(self, path, size):
        """Read up to `size` bytes of a file into this thread's buffer; how many there were."""
        if len(getattr(self.local, "buffer", b"")) < size:
            self.local.buffer = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        past_cache = getattr(os, "O_DIRECT", 0) if self.direct else 0
        try:
            with open(path, "rb", buffering=0, opener=lambda p, f: os.open(p, f | past_cache)) as file:
                length = read = file.readinto(self.local.buffer)
                while read and read % mmap.PAGESIZE == 0 and length < size:  # one call reads 2 GB at most
                    read = file.readinto(memoryview(self.local.buffer)[length:])
                    length += read
                return length
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except OSError as error:
            if not past_cache or error.errno != errno.EINVAL:
                raise
            self.direct = False  # a file system that has no such thing
            return self._read(path, size)

    def __setitem__(self, key, tile):
        if tile.dtype != self.dtype:
            raise ValueError(f"tile {key} is {tile.dtype}, and {self.folder} holds {self.dtype}")
        parts = header(self.dtype, tile.shape), np.ascontiguousarray(tile).data.cast("B")
        write(self.path(key), *parts)
        crc = zlib.crc32(parts[1], zlib.crc32(parts[0]))
        self.times[key] = self.times.get(key, 0) + 1
        with data.said(self.journal), open(self.journal, "ab", buffering=0) as journal:
            # starts a new line: that of a run killed before may be torn
            journal.write(b"\n%d %d %d %d %d %08x" % (*key, *tile.shape, self.times[key], crc))
        self.lines[key] = *tile.shape, crc
        self.trusted.discard(key)


class Checkpoint:
    """The state of a solve as an .npz without pickle, replaced as a whole; for `pcg.solve`.

    about: {name: value} that must agree for a state to be taken up.   team: process 0 reads and writes,
    and sends to the others what it read, so that the folder need not be shared.
    """

    def __init__(self, path, about, team):
        self.path, self.about, self.team = path, json.dumps(about), team
        self.saved, self.took = time.monotonic(), 0.0

    def load(self):
        """The state, {name: array}, or None where there is none, or of another solve, or damaged."""
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
            state = dict(np.load(io.BytesIO(content.tobytes()), allow_pickle=False))
        except (ValueError, zipfile.BadZipFile, EOFError):
            return print(f"{self.path} is damaged: this solve starts anew")
        return state if str(state.pop("about")) == self.about else None

    def save(self, state, finished=False):
        """Write the state, where that costs less than a twentieth of the time since the last one."""
        if self.team.index == 0 and (finished or time.monotonic() > self.saved + 20 * self.took):
            start = time.monotonic()
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with data.replacing(self.path) as file:
                np.savez(file, about=self.about, **state)
            self.saved = time.monotonic()
            self.took = self.saved - start

    def remove(self):
        """Forget the state: the run that it belongs to is over."""
        if self.team.index == 0:
            with suppress(OSError):
                os.remove(self.path)
                os.rmdir(os.path.dirname(self.path))  # unless another solve keeps its state there


def digests(x, block=1024):
    """A 64-bit BLAKE2b digest of each input x[rows], its dtype and shape: (n,) uint64."""
    out = []
    for start in range(0, len(x), block):
        rows = x[np.arange(start, min(start + block, len(x)))]
        rows = np.ascontiguousarray(rows.pixels() if hasattr(rows, "pixels") else rows)
        kind = hashlib.blake2b(f"{rows.dtype} {rows.shape[1:]}".encode(), digest_size=8)
        for row in rows:
            one = kind.copy()
            one.update(row.data.cast("B"))
            out.append(one.digest())
    return np.frombuffer(b"".join(out), "<u8")


def header(dtype, shape):
    """The bytes of an .npy file before those of its C-ordered array."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return out.getvalue()


def write(path, *parts):
    """The bytes of `parts` as the file `path`."""
    with data.replacing(path) as file:
        for part in parts:
            file.write(part)


def manifest(folder):
    """What the manifest of a store says, or None where there is none."""
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, "rb") as file:
            known = json.loads(file.read())
        if known["format"] != FORMAT:
            raise ValueError(f"format {known['format']}, and this program reads {FORMAT}")
        np.dtype(known["dtype"]), known["rows"]["number"]
        return known
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or another program's: {error!r}. Remove {folder}") from error


def _inputs(folder, name, known):
    """The digests that the manifest speaks of; a run killed while it added more may have left those."""
    path = os.path.join(folder, f"{name}.npy")
    try:
        found = np.load(path, allow_pickle=False)[:known[name]["number"]]
        if zlib.crc32(found.tobytes()) != known[name]["crc"]:
            raise ValueError("its checksum is wrong")
        return found
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}), so nobody knows what the tiles were made "
                         f"from. Remove {folder}") from error


def report(folder):
    """Print what the stores in `folder` and below hold and check every tile; the number of damaged."""
    found, damaged = 0, 0
    for place, _, names in sorted(os.walk(folder)):
        if "manifest.json" not in names:
            continue
        found += 1
        kept = Store(place)
        about = kept.about
        n, m = (about.get(name, about["rows"])["number"] for name in INPUTS)
        rows, columns = (-(-size // about["tile"]) for size in (n, m))
        whole = rows * columns if "columns" in about else rows * (rows + 1) // 2
        size = kept.entries * kept.dtype.itemsize
        print(f"{place}: {n:,} x {m:,}, {len(kept.lines):,} of {whole:,} tiles, {size / 1e9:.3g} GB; "
              + " ".join(f"{name}={value}" for name, value in about.items()
                         if name not in ("format", *INPUTS)))
        for name in INPUTS:
            if name in about:
                _inputs(place, name, about)
        for key in tqdm(sorted(kept.lines), unit=" tiles", leave=False, disable=None):
            problem = kept.damage(key)
            if problem:
                tqdm.write(problem)
                damaged += 1
        print(f"{damaged} damaged: the next run computes them again" if damaged else "every tile is intact")
    if not found:
        raise ValueError(f"{folder} has no store in it; give the folder of a run's --store")
    return damaged


if __name__ == "__main__":
    try:
        sys.exit(min(1, sum(map(report, sys.argv[1:] or ["."]))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
