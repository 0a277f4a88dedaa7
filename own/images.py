"""Images of your own: an .npz file, .npy files, or a folder that holds a folder of PNG or JPEG files for each class.

  an .npz   arrays x and y, or x_train and y_train; and x_test and y_test, if there is a test set. x: (n, h, w) or (n, h, w,
            channels), bytes or other numbers; or (n, d), which is one pixel with d channels. y: (n,), (n, 1) or one-hot (n,
            classes): whole numbers, words, or True and False.
  .npy      a folder with these arrays as files, x_train.npy and so on. They are mapped into memory, so that of bytes, if
            there is a test set, only the rows that a run takes are read: for images that fill much of the memory
  a folder  DIR/CLASS/*.png or *.jpg, or DIR/train/CLASS/... and DIR/test/CLASS/...; all grey, or all made RGB; what is
            transparent becomes white

Classes are the different labels of the training images, sorted. Where there is no test set, a fifth of each class is one.

    own = images.read("flowers", seed=0);   own.x_train, own.y_train, own.names[own.y_train[0]]

Proved by: own/test_own.py
"""

import os
import zipfile
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import data

SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
EXPECTED = "--predict takes images: an .npy or .npz file, or a folder of PNG or JPEG files"
HINT = "expected x and y, or x_train and y_train; and x_test and y_test, if there is a test set"


class Own(NamedTuple):
    """A data set of one's own."""
    x_train: np.ndarray  # (n, h, w, channels), uint8 or float32
    y_train: np.ndarray  # (n,) int64, numbers of `names`
    x_test: np.ndarray
    y_test: np.ndarray
    names: tuple  # of the classes
    path: str  # where they were read


def read(path, seed=0, resize=None):
    """The Own data set in a file or folder.

    seed: of the test set, where one is drawn.   resize: height and width to bring the files of a folder to.
    ValueError: nothing to read, arrays that do not fit, images of several sizes, one class.   FileNotFoundError.
    """
    train, test = (folder if os.path.isdir(path) and not {"x", "x_train"} & inside(path) else archive)(path, resize)
    names = tuple(np.unique(train[1]).tolist())
    if len(names) < 2:
        raise ValueError(f"{path}: all {len(train[1])} training images are of class {names[0]!r}; expected two or more")
    if test is None:
        held_out = fifth(train[1], seed)
        test = train[0][held_out], train[1][held_out]
        train = train[0][~held_out], train[1][~held_out]
        print(f"note: {path} has no test set: {len(test[1])} of its {len(held_out)} images, a fifth of each class, drawn with "
              f"seed {seed}, are kept for testing")
    unknown = set(np.unique(test[1]).tolist()) - set(names)
    if unknown:
        raise ValueError(f"{path}: the test set has class {sorted(unknown)[0]!r}, which no training image has")
    if train[0].shape[1:] != test[0].shape[1:] or train[0].dtype != test[0].dtype:
        raise ValueError(f"{path}: training images are {train[0].dtype} {train[0].shape[1:]}, test images {test[0].dtype} "
                         f"{test[0].shape[1:]}; expected the same")
    y_train, y_test = (np.searchsorted(np.array(names), y).astype(np.int64) for y in (train[1], test[1]))
    return Own(train[0], y_train, test[0], y_test, names, path)


def note_copies(path, x, x_test):
    """Says how many test images are training images too, and how many training images are copies of others."""
    known = [hash(image.tobytes()) for image in x]
    train = set(known)
    both = sum(hash(image.tobytes()) in train for image in x_test)
    if both:
        print(f"note: {both} of {len(x_test)} test images of {path} are training images too")
    if len(train) < len(known):
        print(f"note: {len(known) - len(train)} of {len(known)} training images of {path} are copies of others, so that "
              "errors on images left out are too small")


def fifth(y, seed):
    """Which rows are the test set, (n,) bool: a fifth of each class, rounded, but never all of it."""
    rng, out = np.random.default_rng(seed), np.zeros(len(y), bool)
    for name in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == name))
        out[rows[:min(max(1, round(len(rows) / 5)), len(rows) - 1)]] = True
    if not out.any():
        raise ValueError(f"each of the {len(y)} images has a class of its own: there is nothing to test on")
    return out


def archive(path, resize=None):
    """((x, y) to train, (x, y) to test or None) of an .npz, or of a folder of .npy."""
    if resize:
        raise ValueError(f"--resize {resize} is for a folder of image files; {path} is an array")
    keys = inside(path)
    wanted = ("x", "y") if "x" in keys else ("x_train", "y_train")
    wanted += ("x_test", "y_test") if {"x_test", "y_test"} & keys else ()
    if set(wanted) - keys:
        raise ValueError(f"{path} holds {', '.join(sorted(keys)) or 'nothing'}; {HINT}")
    parts = [data.array(*(path, key) if os.path.isfile(path) else [os.path.join(path, f"{key}.npy")]) for key in wanted]
    pairs = []
    if all(x.dtype.kind in "iu" and x.size for x in parts[::2]) and not all(map(bytes_only, parts[::2])):
        parts[::2] = [x.astype(np.float32) for x in parts[::2]]  # both, though one of them may hold small numbers only
    for x, y, key in zip(parts[::2], parts[1::2], wanted[::2]):
        pairs.append((pictures(x, f"{path}, {key}"), classes(y, f"{path}, y{key[1:]}")))
        if len(pairs[-1][0]) != len(pairs[-1][1]):
            raise ValueError(f"{path}: {len(x)} images in {key} and {len(pairs[-1][1])} labels; expected as many")
    return pairs[0], pairs[1] if len(pairs) > 1 else None


def inside(path, hint=HINT):
    """The names of the arrays in an .npz file, or in the .npy files of a folder.  ValueError: it is no .npz, or damaged."""
    if os.path.isdir(path):
        return {name[:-4] for name in os.listdir(path) if name.endswith(".npy")}
    with data.intact(path, "is not a complete .npz archive without pickle", "write it again, with numpy.savez"):
        if not zipfile.is_zipfile(data.existing(path, hint)):
            raise ValueError("it is another kind of file, or cut; tables in CSV are for proteins.train and molecules.train")
        with np.load(path, allow_pickle=False) as file:
            return set(file)


def channels_last(x, where):
    """ValueError: x seems to be (n, channels, h, w)."""
    if x.shape[1] in (1, 3, 4) and x.shape[2] == x.shape[3] > 4:
        raise ValueError(f"{where} is {x.shape}, with channels first; expected (n, h, w, channels): take "
                         "x.transpose(0, 2, 3, 1)")


def pictures(x, where):
    """(n, h, w, channels), uint8 where the numbers are those of bytes, else float32.  ValueError."""
    if x.dtype.kind not in "biuf" or x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise ValueError(f"{where} is {x.dtype} {x.shape}; expected numbers (n, h, w), (n, h, w, channels) or (n, d)")
    x = x[:, None, None] if x.ndim == 2 else x[..., None] if x.ndim == 3 else x
    channels_last(x, where)
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f" and bytes_only(x):
        return x.astype(np.uint8)
    with np.errstate(over="ignore"):  # too large for float32: infinite, and said
        x = x.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
    if len(bad):
        raise ValueError(f"{where}: numbers that are not finite in {len(bad)} of {len(x)} images, the first is image "
                         f"{bad[0]}: remove them")
    return x


def bytes_only(x):
    """Whether all numbers are those of bytes."""
    return x.dtype == np.uint8 or x.min() >= 0 and x.max() <= 255


def classes(y, where):
    """Labels (n,), as they are: whole numbers, words, or True and False.  ValueError."""
    got = f"{where} is {y.dtype} {y.shape}"
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf" and np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all():
        y = y.argmax(axis=1)
    y = y[:, 0] if y.shape[1:] == (1,) else y
    if y.ndim != 1 or y.dtype.kind not in "biufUS":
        raise ValueError(f"{got}; expected a label for each image: (n,), (n, 1), or one-hot rows")
    if y.dtype.kind == "f":
        bad = np.flatnonzero((y != np.floor(y)) | (abs(y) > 2**53))  # NaN, too
        if len(bad):
            raise ValueError(f"{where} has {y[bad[0]]} at row {bad[0]}; expected classes: whole numbers or words")
        y = y.astype(np.int64)
    y = y.astype(str) if y.dtype.kind == "S" else y
    if y.dtype.kind == "U" and (y == "").any():
        raise ValueError(f"{where} has no label at row {np.flatnonzero(y == '')[0]}; expected classes: whole numbers or words")
    return y


def folder(path, resize=None):
    """((x, y) to train, (x, y) to test or None) of a folder."""
    inside = subfolders(path)
    if {"train", "test"} < set(inside):
        others = ", ".join(sorted({*inside} - {"train", "test"}))
        raise ValueError(f"{path} holds train, test and {others}; expected train and test alone, or a folder for each class")
    parts = [os.path.join(path, part) for part in ("train", "test")] if {"train", "test"} == set(inside) else [path]
    for name in [os.path.join(part, name) for part in parts for name in subfolders(part)]:
        others = [one for one in sorted(os.listdir(name)) if not one.lower().endswith(SUFFIXES) and not one.startswith(".")]
        if not files(name):
            raise ValueError(f"{name} has no {', '.join(SUFFIXES)} files directly in it: convert what it holds, or remove it")
        if others:
            print(f"note: {name} holds {len(others)} files or folders that are no {', '.join(SUFFIXES)} and are left out, "
                  f"such as {others[0]}")
    found = [(file, name) for part in parts for name in subfolders(part) for file in files(os.path.join(part, name))]
    if not found:
        raise ValueError(f"{path} has no folder with {', '.join(SUFFIXES)} files in it; expected a folder for each class")
    counts = [sum(file.startswith(os.path.join(part, "")) for file, _ in found) for part in parts]
    if not all(counts):
        raise ValueError(f"{parts[counts.index(0)]} holds no images; expected a folder for each class")
    x = opened([file for file, _ in found], resize)
    y = np.array([name for _, name in found])
    pairs = [(x[:counts[0]], y[:counts[0]]), (x[counts[0]:], y[counts[0]:])]
    return pairs[0], pairs[1] if len(parts) > 1 else None


def subfolders(path):
    return sorted(one for one in os.listdir(path) if os.path.isdir(os.path.join(path, one)) and not one.startswith("."))


def files(path):
    """The image files directly in a folder, in the order of their names."""
    return [os.path.join(path, one) for one in sorted(os.listdir(path)) if one.lower().endswith(SUFFIXES)]


def new(path, like, resize=None):
    """New images for a model: (names of columns, one row for each image, images); what tells an image from the others is the
    name of its file in a folder, or its number in an array.

    path: an .npy file of images, an .npz file with x (or x_test), a folder of files or of folders of files, or one such file.
    like: the images that the model was trained on, whose shape and dtype are required.   resize: as for `read`.
    ValueError, FileNotFoundError.
    """
    if os.path.isdir(path) or path.lower().endswith(SUFFIXES):
        found = sorted(os.path.join(where, one) for where, _, files in os.walk(path) for one in files
                       if one.lower().endswith(SUFFIXES)) if os.path.isdir(path) else [data.existing(path, EXPECTED)]
        if not found:
            raise ValueError(f"{path} has no {', '.join(SUFFIXES)} files in it")
        x, names = opened(found, resize), ["file"]
        rows = [[os.path.relpath(one, path) if os.path.isdir(path) else one] for one in found]
        x = np.repeat(x, 3, axis=3) if x.shape[3] == 1 and like.shape[3] == 3 else x  # all grey, for a model of RGB
    else:
        key = None if not path.endswith(".npz") else "x_test" if "x_test" in inside(path, EXPECTED) else "x"
        x = data.array(path, key, EXPECTED)
        x = x[..., None] if x.ndim == 3 else x[:, None, None] if x.ndim == 2 else x
        names, rows = ["image"], [[i] for i in range(len(x))]
    if x.dtype.kind == "f" == like.dtype.kind or x.dtype.kind in "iu" and x.dtype != np.uint8 and whole(like):
        x = x.astype(like.dtype)
    x = pictures(x, path) if x.dtype != like.dtype and like.dtype == np.uint8 and x.dtype.kind in "biu" and len(x) else x
    if x.dtype != like.dtype or x.shape[1:] != like.shape[1:] or not len(x):
        raise ValueError(f"{path} holds {x.dtype} {x.shape}; the model was trained on images {like.dtype} (m, "
                         f"{', '.join(map(str, like.shape[1:]))})")
    if not np.isfinite(x).all():
        raise ValueError(f"{path} holds {np.sum(~np.isfinite(x))} numbers that are not finite: remove those images")
    return names, rows, x


def whole(x):
    """Whether these are whole numbers in float32, beyond bytes: so `pictures` keeps integers."""
    return x.dtype == np.float32 and not bytes_only(x) and np.array_equal(x, np.floor(x))


def opened(paths, resize=None):
    """The images in these files, uint8 (n, h, w, 1 or 3): grey if all of them are, else RGB."""
    out = []
    for path in tqdm(paths, unit=" images", desc="reading", disable=None, leave=False):
        try:
            with Image.open(path) as image:
                mode = image.mode
                if mode in MODES:
                    image = ImageOps.exif_transpose(image)  # upright, as viewers show it
                    if "A" in mode or "transparency" in image.info:  # its background is white
                        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                    image = image.convert("L" if mode in ("1", "L", "LA") else "RGB")
                    image = image.resize((resize, resize), Image.Resampling.BOX) if resize else image
                    out.append(np.asarray(image))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: remove or replace it") from error
        if mode not in MODES:
            raise ValueError(f"{path} has pixels of mode {mode}; expected 8 bits a channel: convert it")
        if out[-1].shape[:2] != out[0].shape[:2]:
            raise ValueError(f"{path} has {' x '.join(map(str, out[-1].shape[:2]))} pixels and {paths[0]} has "
                             f"{' x '.join(map(str, out[0].shape[:2]))}: bring all to one size with --resize H")
    if any(one.ndim == 3 for one in out):
        out = [one if one.ndim == 3 else np.repeat(one[..., None], 3, axis=2) for one in out]
    x = np.stack(out)
    return x if x.ndim == 4 else x[..., None]
