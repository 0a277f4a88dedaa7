"""What the three experiments share: flags, devices, kernel matrices, records, errors of one line.

    args = parser.parse_args(argv); experiment.check(parser, args, "devices", "rank")
    run, seconds = experiment.provenance(), {}
    with regression.phase("kernel", seconds):
        (K, K_test), = experiment.matrices(kernel_fn, ("nngp",), {"train": x, "test": x_test}, None, {}, 1024)
    experiment.record("results", config, {"test_accuracy": 0.5, "seconds": seconds}, run)
    if __name__ == "__main__": experiment.run(main, parse(None))

Proved by: test_all.py, section train
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from contextlib import contextmanager

import jax

import choose
import data
import kernel
import tiles

SETTINGS = {"whiten": str, "zca_eps": float, "depth": int, "w_std": float, "b_std": float, "head": str, "gamma": float}
POSITIVE = ("w_std", "gamma")  # of these; the others may be 0
HERE = os.path.dirname(os.path.abspath(__file__))
ROOMS = ("fast", "large", "own", "proteins", "molecules", "results")
PATIENCE = 5  # seconds
HEADS = ("linear", "cosine", "relu", "exp")


class Parser(argparse.ArgumentParser):
    """A parser whose help shows defaults and whose errors are one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help explains every flag)\n")


def network_flags(group, images_or_sequences=True):
    """Adds the flags that describe a network; each takes several values, separated by commas, to choose from."""
    group.add_argument("--w_std", default=str(kernel.W_STD), help="sd of weights, relative to 1 / sqrt(inputs)")
    group.add_argument("--b_std", default=str(kernel.B_STD), help="sd of biases")
    if images_or_sequences:
        group.add_argument("--head", default="linear", help=f"before the last layer: {', '.join(HEADS)}; "
                           "cosine normalizes the features, relu and exp are kernels of that cosine")
        group.add_argument("--gamma", default="1", help="of --head exp: exp(gamma (cosine - 1))")


def select_flag(group, default):
    group.add_argument("--select", choices=choose.CRITERIA, help="how ridge and network are chosen: leave-one-out, "
                       f"generalised cross-validation, or rows held out; None is {default}")


def check(parser, args, *positive):
    """Makes lists of args.ridge, args.sizes and SETTINGS, n_train the largest size unless given; or the parser's error.

    ridge: "auto", or numbers separated by commas, none negative.   sizes: whole numbers, 1 to n_train; they get
    n_train too, and are sorted; [] where neither is given.   positive: names of flags that must be at least 1.
    tol, seed, kind and, where there is one, variance must be possible.
    """
    for flag, value in vars(args).items():
        if value == "":  # as of a variable of the shell that is not set
            parser.error(f"--{flag} is empty: expected a value, or leave it out")
    try:
        args.ridge = choose.RIDGES if args.ridge == "auto" else [float(r) for r in args.ridge.split(",")]
    except ValueError:
        parser.error(f"--ridge {args.ridge}: expected a number, numbers separated by commas, or auto")
    for ridge in args.ridge:
        if not 0 <= ridge < float("inf"):
            parser.error(f"--ridge {ridge}: expected numbers >= 0")
    try:
        sizes = [int(n) for n in args.sizes.split(",")] if args.sizes else []
    except ValueError:
        parser.error(f"--sizes {args.sizes}: expected whole numbers separated by commas")
    for flag, kind in SETTINGS.items():
        text = getattr(args, flag, None)
        try:
            if isinstance(text, (str, int)):
                setattr(args, flag, [kind(value) for value in str(text).split(",")])
                if kind is float and not all(0 <= value < float("inf") and (value or flag not in POSITIVE)
                                             for value in getattr(args, flag)):
                    raise ValueError
            elif hasattr(args, flag):
                setattr(args, flag, [None])
        except ValueError:
            what = "a whole number" if kind is int else "a number > 0" if flag in POSITIVE else "a number >= 0"
            parser.error(f"--{flag} {text}: expected {what}, or several separated by commas")
    if not 0 < args.tol < 1:
        parser.error(f"--tol {args.tol}: expected a number between 0 and 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: expected a whole number >= 0")
    if args.kind != "nngp" and getattr(args, "variance", False):
        parser.error(f"--variance with --kind {args.kind}: the NTK is not the covariance of a process that the network "
                     "samples; use --kind nngp")
    for flag in ("n_train", *positive):
        values = getattr(args, flag) if isinstance(getattr(args, flag), list) else [getattr(args, flag)]
        if not all(value is None or value >= 1 for value in values):
            parser.error(f"--{flag} {','.join(map(str, values))}: expected at least 1")
    args.n_train = args.n_train or max(sizes, default=None)
    args.sizes = sorted({*sizes, *([args.n_train] if args.n_train else [])})
    if args.sizes and not 1 <= args.sizes[0] <= args.sizes[-1] <= args.n_train:
        parser.error(f"--sizes {','.join(map(str, sizes))}: expected 1 to n_train={args.n_train}")


def given(parser, argv=None):
    """The names of the flags that stand on the command line."""
    absent = object()
    names = vars(parser.parse_args([]))
    return [name for name, value in vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))).items()
            if value is not absent]


def refuse_idle(parser, argv, idle):
    """The parser's error for a flag on the command line that changes nothing in this run.  idle: {dest of the flag: why,
    or False}."""
    names = {action.dest: action.option_strings[0] for action in parser._actions}
    for flag in given(parser, argv):
        if idle.get(flag):
            parser.error(f"{names[flag]} changes nothing here: {idle[flag]}. Leave it out")


def check_file(parser, path):
    """The parser's error for a file that could not be written at the end of the run.  path: None is no file."""
    folder = os.path.dirname(os.path.abspath(path or "."))
    if path and (os.path.isdir(path) or not os.access(folder, os.W_OK)):
        parser.error(f"{path} cannot be written: expected a file in a folder that is there and can be written")


def settings(args):
    """[{flag: value}, ...]: every combination of the values of SETTINGS that were given; what is not used is None."""
    given, found = {flag: getattr(args, flag) for flag in SETTINGS if hasattr(args, flag)}, []
    for values in itertools.product(*given.values()):
        one = dict(zip(given, values))
        unused = ["zca_eps"] * (one.get("whiten") in ("none", "channel")) + ["gamma"] * (one.get("head", "exp") != "exp")
        one.update(dict.fromkeys(set(unused) & set(one)))
        if one not in found:
            found.append(one)
    return found


def compare(args, evaluate, by="mse"):
    """Sets each of SETTINGS to one value: where several were given, those of the best row.

    evaluate: a dict of `settings` -> [choose.Row, ...], a row for each ridge.   by: as in `choose.best`.
    Returns [[settings, ridge, score, mse], ...] of what was compared, [] where there was nothing to choose.
    """
    found, several = settings(args), {flag for flag in SETTINGS if len(getattr(args, flag, [])) > 1}
    rows = [choose.best(evaluate(one), by) for one in found] if several else [None] * len(found)
    best = rows.index(choose.best(rows, by)) if several else 0
    for flag, value in found[best].items():
        setattr(args, flag, value)
    table = [({flag: one[flag] for flag in one if flag in several}, row) for one, row in zip(found, rows) if several]
    if several and not args.quiet:
        print("\n".join(" ".join(f"{flag}={value}" for flag, value in one.items())
                        + f": ridge {row.ridge:.2g}, {choose.describe(row)}" for one, row in table))
        print("chosen: " + " ".join(f"{flag}={value}" for flag, value in table[best][0].items()))
    return [[one, *row[:3]] for one, row in table]


def described(args):
    """The flags in one line."""
    def text(value):
        return ",".join(f"{one:.3g}" if isinstance(one, float) else str(one) for one in (
            value if isinstance(value, list) else [value]))
    return " ".join(f"{key}={text(value)}" for key, value in vars(args).items())


def tile_side(cpu, gpu, rows):
    """Side of a tile that takes a second or so, `cpu` or `gpu` by where this runs; a small problem still has ten."""
    return max(1, min(kernel.on({"cpu": cpu, "gpu": gpu}), -(-rows // 4)))


def devices(count):
    """The first `count` devices of this process, or all.  ValueError: there are fewer."""
    found = jax.local_devices()
    if count and len(found) < count:
        raise ValueError(f"--devices {count}, but JAX sees {len(found)} here: {found}")
    return found[:count]


def matrices(kernel_fn, kinds, inputs, folder, about, tile, **where):
    """For every kind (K of the first of `inputs`, for each other one its K with the first).

    kernel_fn: a kind, or a tuple of kinds in one pass -> kernel_fn(x1, x2).   inputs: {name: rows}.
    folder: of a store for each matrix, NAME-KIND; None: tiles stay in memory, K on GPUs in theirs; "none": kept nowhere,
    computed in every product (large/places.py).   about: what decides a tile but kind and side, {name: value}.
    where: devices, quiet, team.
    """
    if folder or on_gpu() and importlib.util.find_spec("large"):  # without that room the host multiplies
        from large import places
        return places.matrices(kernel_fn, kinds, inputs, folder, about, tile, **where)
    (_, x), *others = inputs.items()
    fn = kernel_fn(kinds)
    return list(zip(tiles.gram(fn, x, tile, **where), *(tiles.cross(fn, rows, x, tile, **where) for _, rows in others)))


def on_gpu():
    return jax.default_backend() != "cpu"


def team(coordinator, processes, process, devices, wait=None, store=None):
    """The processes that share the work, tiles.ALONE where there is one: see large/processes.py."""
    if (coordinator, processes, process, wait) == (None,) * 4 and not importlib.util.find_spec("large"):
        return tiles.ALONE
    from large import processes as several
    return several.team(coordinator, processes, process, devices, wait, store)


def provenance(processes=1):
    """Machine, versions and code of a run, taken at its start, for the files may change under it."""
    def git(*command):
        try:
            done = subprocess.run(["git", "-C", HERE, *command], capture_output=True, text=True)
        except OSError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", "*.py", "*.cpp", "requirements.txt")
    return {"device": jax.local_devices()[0].device_kind, "devices": jax.local_device_count(),
            "processes": processes, "cores": tiles.cores(), "jax": jax.__version__,
            "neural_tangents": importlib.metadata.version("neural-tangents"),
            "commit": git("rev-parse", "--short", "HEAD"),
            "dirty": None if changed is None else bool(changed),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def writable(folder, name="runs.jsonl"):
    """Makes `folder`.  OSError: the file `name` cannot be written there, said before any work is done."""
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.lexists(path):
            open(path, "ab").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out {folder}: {path} cannot be written ({error.strerror}); give a folder that can") from error


def peak_memory():
    """The most memory this process has used, in bytes."""
    try:  # getrusage counts what the process that started this one had used, too
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def record(folder, config, result, run, describe=None):
    """Append to runs.jsonl in `folder` the result, completed by its configuration, `provenance` and the most memory this
    process has used. It is printed first, described by describe(result)."""
    result["peak_memory_gb"] = peak_memory() / 1e9
    result.update(config=config, **run)
    if describe:
        print(describe(result), flush=True)
    path = os.path.join(folder, "runs.jsonl")
    with data.said(path):
        os.makedirs(folder, exist_ok=True)
        with open(path, "ab+") as lines:
            size = lines.seek(0, os.SEEK_END)
            lines.seek(max(0, size - 1))
            torn = size and lines.read() != b"\n"  # a run was killed while it wrote
            lines.write(b"\n" * bool(torn) + json.dumps(result).encode() + b"\n")


@contextmanager
def guard(*expected, store=None):
    """Ends the process with one line for an error of an expected kind or for Ctrl-C, else with a traceback. It ends at
    once: a process that first waited for the others to end would leave them hanging."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in ROOMS:
            room = error.name.partition(".")[0]
            message = f"the folder {room}/ is not there, and a flag needs it: fetch it, or leave the flag out"
        elif isinstance(error, expected):
            message = f"{type(error).__name__}: {error}"
        elif isinstance(error, KeyboardInterrupt):
            message = interrupted(store)
        elif isinstance(error, SystemExit):
            raise
        else:
            message = "".join(traceback.format_exception(error))
        end(message, 130 if isinstance(error, KeyboardInterrupt) else 1)


def interrupted(store):
    """What a run says that Ctrl-C has ended."""
    return (f"interrupted: what was finished is in {store}; run the same command again to go on"
            if store else "interrupted: nothing was kept; runs with --store DIR go on where they were")


def end(message, code):
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def on_interrupt(store):
    """Makes Ctrl-C end this process in any case. Python swallows an exception that is raised in a callback of the garbage
    collector, where JAX has one, and prints its traceback; so that is not printed, and the process also ends if it is still
    there PATIENCE seconds later."""
    def handler(signum, frame):
        sys.unraisablehook = lambda _: None
        timer = threading.Timer(PATIENCE, end, (interrupted(store), 130))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else it is ignored on purpose, as by nohup
        signal.signal(signal.SIGINT, handler)


def run(main, args):
    """main() on --devices devices, or every core that this process may use."""
    tiles.use_cores(args.devices)
    store = None if getattr(args, "store", None) in (None, "none") else args.store
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"  # one line
    on_interrupt(store)
    with guard(ValueError, OSError, MemoryError, ArithmeticError, ImportError, store=store):
        main()
