"""The convolutions of fused.py on a CPU, in C++: cpu.cpp is built here on first use, and called from JAX. So is fc.cpp.

The compiler is $CXX, or the first of c++, g++ and clang++ that is on PATH; CXX= (empty) turns this file off. The library is
kept in ~/.cache/infinite-networks (or below $XDG_CACHE_HOME) under a name made of source, command and processor, so that
another version, compiler or machine builds its own. Building takes seconds, once. Without a compiler, or if it fails, one line
says so, and XLA compiles fused.py's own loops. Numbers are float32; float64 is left to XLA.

Proved by: fast/test_fast.py
"""

import atexit
import ctypes
import glob
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zlib
from contextlib import suppress
from functools import lru_cache

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import kernel

HERE = os.path.dirname(os.path.abspath(__file__))
LANES = 16  # second images that are computed together, as in cpu.cpp
FLAGS = "-std=c++17", "-O3", "-ffast-math", "-fPIC", "-mcpu=native" if platform.machine() == "arm64" else "-march=native"


def compiler():
    """Path of the C++ compiler, or None."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, filter(None, names))), None)


def processor():
    """What -march=native depends on."""
    try:
        with open("/proc/cpuinfo") as file:
            return platform.machine() + "".join(sorted({line for line in file if line.startswith(("flags", "Features"))}))
    except OSError:
        return platform.machine() + platform.processor()


def build(cxx, name="cpu.cpp"):
    """Path of the library of a C++ file, built with the compiler `cxx` unless it is there. Its name ends with its checksum: to
    load a library that a full disk or a crash has cut would end the process.  Raises OSError or CalledProcessError."""
    source, coefficients = os.path.join(HERE, name), ",".join(f"{value!r}f" for value in kernel.ANGLE["float32"])
    compile_ = [cxx, *FLAGS, f"-DCOEFFICIENTS={coefficients}", "-isystem", jax.ffi.include_dir(), "-c", source]
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    with open(source, "rb") as file:
        about = file.read(), compile_, version, processor(), jaxlib.__version__
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(cache, "infinite-networks")
    for path in glob.glob(os.path.join(glob.escape(folder), f"{name[:-4]}-{digest}-*.so")):
        if path.endswith(f"-{checksum(path)}.so"):
            return path
        with suppress(OSError):
            os.remove(path)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:  # a home that cannot be written: built for this process alone
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:  # several processes may build at once: each renames its own
        subprocess.run([*compile_, "-o", f"{new}/a.o"], capture_output=True, text=True, check=True)
        # linked without -ffast-math, with which GCC would change how the whole process rounds tiny numbers
        subprocess.run([cxx, "-shared", f"{new}/a.o", "-o", f"{new}/a.so"], capture_output=True, text=True, check=True)
        path = os.path.join(folder, f"{name[:-4]}-{digest}-{checksum(f'{new}/a.so')}.so")
        os.replace(f"{new}/a.so", path)
    return path


def checksum(path):
    with open(path, "rb") as file:
        return f"{zlib.crc32(file.read()):08x}"


@lru_cache(maxsize=1)
def available():
    """Builds and loads cpu.cpp.  Returns the name under which JAX knows it; None if that failed."""
    library = loaded("cpu.cpp")
    if library:
        jax.ffi.register_ffi_target(library._name, jax.ffi.pycapsule(library.network), platform="cpu")
    return library and library._name


def loaded(name):
    """The library of a C++ file; None if it could not be built, which one line says."""
    cxx, slow = compiler(), "it is computed by XLA, at about half the speed"
    if cxx is None:
        if os.environ.get("CXX") != "":
            print(f"fast/cpu.py: no C++ compiler on PATH for {name}; {slow}", file=sys.stderr)
        return None
    try:
        return ctypes.cdll.LoadLibrary(build(cxx, name))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        print(f"fast/cpu.py: {cxx} could not build {name} ({next((line for line in reason if 'error' in line), reason[0])}); "
              f"{slow}", file=sys.stderr)
        return None


def pixels(x, stds):
    """x (channels, h + 1, w, ...) and the `fused.deviations` of each resolution as cpu.cpp reads them: without the row of
    zeros, and the numbers of all convs in one axis. A sequence (w = 1) becomes one row, whose loops are longer."""
    x, lying = x[:, :-1], x.shape[2] == 1
    return (x.swapaxes(1, 2) if lying else x,
            *(jnp.concatenate([y[k][:, :-1].reshape(-1, *y[k].shape[3:]) for y in stds]) for k in range(2)))


def network(stages, ending, states, rows, firsts, seconds, w2_b2):
    """K, or K and T, of the first `rows` of n1 images with sixteen others, before the dense layers: (states, n1, 16).

    firsts: x, std, 1 / std of `pixels`, for each of n1 images.   seconds: the same of sixteen images, in the last axis.
    w2_b2: `fused.coefficients` of all convs."""
    call = jax.ffi.ffi_call(available(), jax.ShapeDtypeStruct((states, len(firsts[0]), LANES), jnp.float32))
    return call(rows, *firsts, *seconds, w2_b2, convs=np.array([len(convs) for convs in stages], np.int64),
                flatten=ending == "flatten")
