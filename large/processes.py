"""Several processes, on one machine or on many: how they meet, and the sum by which they communicate.

Every process runs the same program on the same data, computes and multiplies its own tiles, and holds all vectors. The only
communication is the sum `all_reduce`. In a solve its arrays are float64; n rows, c columns not yet solved, rank k:

    a step of the solver            (n, c) for the product with K
    with a preconditioner of rank k (k, c) and (n, c) more, once for each step: 8 c (2 n + k) bytes a step in all
    a true residual                 (n, c), every 20 steps (pcg.CHECK) and before columns are done
    a ridge                         (k, k), once

If one process dies, the others stop with a message: at once in a sum, otherwise GRACE seconds later, or TIMEOUT seconds if
its host has died. (Found by a launcher, or on GPUs if process 0 dies, they stop with JAX's message.) Start all of them
again, or fewer, or more: tiles and solver state in a store that they share serve any number. The file DIR/log-I.txt says
what process I is doing: when its phases begin and end, and how many of its tiles are done.

    python train_cifar.py --store DIR --coordinator HOST0:12345 --processes 2 --process 0     on HOST0
    python train_cifar.py --store DIR --coordinator HOST0:12345 --processes 2 --process 1     on HOST1
    srun --ntasks-per-node=1 python train_cifar.py --store DIR                                under Slurm
    mpirun --map-by ppr:1:node --bind-to none python train_cifar.py --store DIR               under Open MPI

With one process per host, a process takes all GPUs of its host, or all cores if there is no GPU (mpirun binds it to one).
Without the three flags the launcher's variables say who this process is (`launched`), and JAX finds process 0. Flags
win: --processes 1 is alone under any launcher. Give mpirun --coordinator alone if process 0 is not on mpirun's own host, or
if Open MPI is version 5 and the package mpi4py is not installed. On Kubernetes give the flags: see kubernetes.yaml.
Process 0 listens on the coordinator's port; jax.distributed and gloo or NCCL open further ports of their own choice.
Proved by: large/test_large.py
"""

import atexit
import glob
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import selectors
import socket
import threading
import time
from contextlib import suppress
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import experiment
import tiles

PROXIES = "grpc_proxy", "https_proxy", "http_proxy"
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OWN = ("process", "devices", "coordinator", "data", "store", "out", "quiet", "verbose", "wait")  # may differ
TIMEOUT = 60  # seconds until a silent process counts as dead
GRACE = 5  # seconds that a process has to say itself why it ends, once another is gone
GONE = "process {} of {}: another process is gone. Start all of them again: what is in --store is kept"


def start(coordinator=None, processes=None, process=None, gpus=None, wait=300):
    """The Team of all processes; tiles.ALONE if there is only one. Call it before JAX uses a device.

    coordinator: "HOST:PORT" of process 0.   processes, process: how many there are, and the number of this one.
    What is not given, a launcher or JAX says (`launched`).   gpus: how many this process takes; None: all that it
    can see, but one each if a launcher started several on this host.   wait: seconds to wait for the others.
    Raises ValueError: one of the three without the others, no HOST:PORT, a number out of range or taken.   ConnectionError:
    some did not come in time, or JAX does not find them.
    """
    count, index, here = launched()
    by_flags = (processes, process) != (None, None) or coordinator is not None and count == 1
    if not by_flags:
        processes, process = count, index
    if processes == 1 and process in (None, 0):
        return tiles.ALONE
    if by_flags and (None in (coordinator, processes, process) or not 0 <= process < processes):
        raise ValueError(f"--coordinator {coordinator} --processes {processes} --process {process}: give all "
                         "three: HOST:PORT of process 0, the number of processes P, and this one's number, 0 to P - 1")
    if coordinator and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator {coordinator}: expected HOST:PORT of process 0, such as node0:12345")
    if gpus is None and "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = len([number for number in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if number])
    elif gpus is None:
        gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    peers = meet(coordinator, processes, process, wait) if coordinator and processes else []
    ompi_5 = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ  # JAX 0.10 has no other way
    proxies = {name: os.environ.pop(name) for name in PROXIES if name in os.environ}  # gRPC would use them
    try:
        jax.distributed.initialize(
            coordinator, processes, process,  # JAX finds out what is None, and by itself would take one GPU
            local_device_ids=range(gpus) if gpus and (by_flags or here == 1) else None,
            cluster_detection_method="deactivate" if by_flags else "mpi4py" if ompi_5 and not coordinator else None,
            initialization_timeout=wait, heartbeat_timeout_seconds=TIMEOUT, shutdown_timeout_seconds=TIMEOUT)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"JAX does not reach the other processes ({' '.join(str(error).split())}): set --coordinator, "
                              "--processes and --process, or --processes 1 to run alone") from error
    os.environ.update(proxies)
    if jax.process_count() == 1:
        return tiles.ALONE
    all_reduce(np.zeros(1))  # connects now, while all are present: gloo waits only 30 s to connect, but longer in a sum
    team = tiles.Team(jax.process_index(), jax.process_count(), all_reduce)
    if peers and jax.default_backend() == "cpu":  # when a process dies, JAX's service aborts the others with a stack trace;
        jax.distributed.shutdown()  # gloo, once connected, does not need it
    if peers:
        watch(peers, team)
    return team


def launched():
    """(how many processes a launcher has started, the number of this one, how many of them are on this host), as its
    variables say: Open MPI's mpirun, Slurm's srun. (1, 0, 1): no launcher, or one process.

    (None, None, 1): JAX has to find out. On TPUs it asks Google's server where no variable names the hosts. In a pod of
    Kubernetes' Indexed Job it asks Kubernetes, if the package `kubernetes` is installed (jax[k8s]).
    """
    env = os.environ
    if "OMPI_COMM_WORLD_SIZE" in env:  # before Slurm, as in JAX: mpirun starts by srun on other hosts
        return tuple(int(env[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK", "LOCAL_SIZE"))
    if "SLURM_STEP_NODELIST" in env:  # SLURM_NTASKS may be of the job: a shell that salloc opened is a step of one task
        count = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", 1))
        return count, int(env.get("SLURM_PROCID", 0)), -(-count // int(env.get("SLURM_STEP_NUM_NODES", 1)))
    asked = "JOB_COMPLETION_INDEX" in env and importlib.util.find_spec("kubernetes")
    if "tpu" in (jax.config.jax_platforms or ""):  # so JAX sets it where it finds TPUs
        hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        asked = "," in hosts if hosts else "TPU_SKIP_MDS_QUERY" not in env
        asked = asked or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return (None, None, 1) if asked else (1, 0, 1)


def team(coordinator, processes, process, devices, wait=None, store=None):
    """`start`, and a log of each process in the folder `store`.  ValueError: --wait where there is one process."""
    found = start(coordinator, processes, process, devices, 300 if wait is None else wait)
    if wait is not None and found.count == 1:
        raise ValueError(f"--wait {wait} changes nothing here: there is one process. Leave it out")
    if found.count > 1 and store not in (None, "none"):
        log(store, found.index)
    return found


def _gone(peer):
    """Whether the process at the other end has closed its socket."""
    peer.setblocking(False)
    try:
        return not peer.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        peer.settimeout(5)


def meet(coordinator, processes, process, wait):
    """The sockets by which process 0 and each of the others stay connected, once all of them have reached HOST:PORT. Prints
    which it waits for: JAX alone waits silently, then aborts.

    ConnectionError: some have not come after `wait` seconds.   ValueError: another process came with the same number.
    """
    host, port = coordinator.rsplit(":", 1)
    end = time.monotonic() + wait
    if process > 0:
        print(f"process {process} of {processes}: waiting for process 0 at {coordinator}, {wait} s at most", flush=True)
        while time.monotonic() < end:
            with suppress(OSError):
                peer = socket.create_connection((host.strip("[]"), int(port)), end - time.monotonic())
                peer.sendall(b"%d\n" % process)
                answer = peer.recv(3)
                if answer == b"all":
                    return [peer]
                if answer == b"two":
                    raise ValueError(f"there is a process {process} at {coordinator} already: give each its own --process")
            time.sleep(0.1)
        raise ConnectionError(f"process {process} of {processes} waited {wait} s for process 0 and the others at "
                              f"{coordinator}: start all of them, each with the address of process 0, or raise --wait")
    peers = {}
    with socket.create_server(("", int(port))) as server:
        while missing := {number for number in range(1, processes) if number not in peers or _gone(peers[number])}:
            names = ", ".join(map(str, sorted(missing)))
            print(f"process 0 of {processes}: waiting at {coordinator} for process {names}, {wait} s at most", flush=True)
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                peer, _ = server.accept()
                peer.settimeout(5)
                number = int(peer.recv(16))
            except TimeoutError:
                if time.monotonic() >= end:
                    raise ConnectionError(f"process {names} of {processes} did not come to {coordinator} within {wait} s: "
                                          "start it, or raise --wait") from None
                continue
            except (OSError, ValueError):  # some other program connected
                continue
            if number in missing or number in peers and _gone(peers[number]):
                peers[number] = peer
            else:
                peer.sendall(b"two")
        for peer in peers.values():
            peer.sendall(b"all")
    return list(peers.values())


def watch(peers, team):
    """Ends this process with a message if one at `peers` is gone: its socket closes before it has said "end", or its host is
    silent for TIMEOUT seconds. Process 0 sees all the others, and they see process 0, which passes it on."""
    over = threading.Event()

    def leave():
        over.set()
        for peer in peers:
            with suppress(OSError):
                peer.sendall(b"end")

    def look():
        with selectors.DefaultSelector() as running:
            for peer in peers:
                running.register(peer, selectors.EVENT_READ)
            while running.get_map():
                for key, _ in running.select():
                    with suppress(OSError):
                        if key.fileobj.recv(3) == b"end":
                            running.unregister(key.fileobj)
                            continue
                    for peer in peers:
                        with suppress(OSError):
                            peer.shutdown(socket.SHUT_RDWR)
                    if not over.wait(GRACE + (team.index == 0)):  # process 0 ends last: JAX's service on GPUs is in it
                        experiment.end(f"ConnectionError: {GONE.format(team.index, team.count)}.", 1)
                    return
    for peer in peers:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", TIMEOUT // 2), ("TCP_KEEPINTVL", TIMEOUT // 6), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):  # Linux
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    atexit.register(leave)
    threading.Thread(target=look, daemon=True).start()


def log(folder, process):
    """From now on, what this process is doing is added to log-I.txt in `folder`; nothing if that cannot be written."""
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        lines = logging.FileHandler(os.path.join(folder, f"log-{process}.txt"))
        lines.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        lines.handleError = lambda record: None  # a full disk ends the run where it writes a tile
        tiles.LOG.addHandler(lines)
        tiles.LOG.setLevel(logging.INFO)


def all_reduce(array):
    """The sum of the arrays of all processes, of the same shape and dtype, and equal to the last bit in all of them.

    Cost: about 2 bytes through the network for each byte of the array, for any P; tiles.PIECE bytes at a time.
    Raises ConnectionError: another process is gone.
    """
    array = np.asarray(array)
    pieces = np.array_split(array.reshape(-1), max(1, -(-array.nbytes // tiles.PIECE)))
    return np.concatenate([_all_reduce(piece) for piece in pieces]).reshape(array.shape)


def _all_reduce(array):
    """`all_reduce` of at most tiles.PIECE bytes, (m,): on a device there is never more."""
    first = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    mesh = Mesh(np.array([first[process] for process in sorted(first)]), ("process",))
    with jax.enable_x64(True):
        try:
            stacked = jax.make_array_from_process_local_data(
                NamedSharding(mesh, PartitionSpec("process")), array[None])
            return np.array(_sum(mesh)(stacked).addressable_data(0))
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX raises either
            raise ConnectionError(
                f"{GONE.format(jax.process_index(), jax.process_count())}. ({str(error).splitlines()[0]})") from error


def agree(team, args, *arrays):
    """Raises ValueError, in every process, unless all run the same code with the same flags on the same data."""
    flags = {flag: value for flag, value in vars(args).items() if flag not in OWN}
    paths = sorted(path for ending in ("*.py", "*.cpp") for path in pathlib.Path(HERE).rglob(ending))
    code = [path.read_bytes() for path in paths if ".venv" not in path.parts]
    parts = {"flags": json.dumps(flags, default=str).encode(), "code": b"".join(code),
             "data": b"".join(hashlib.blake2b(np.ascontiguousarray(array)).digest() for array in arrays)}
    digests = np.zeros((team.count, len(parts)))  # 48 bits are exact in float64
    digests[team.index] = [int.from_bytes(hashlib.blake2b(part, digest_size=6).digest()) for part in parts.values()]
    digests = team.all_reduce(digests)
    differing = {name: np.flatnonzero(column != column[0]) for name, column in zip(parts, digests.T)}
    if any(map(len, differing.values())):
        raise ValueError("the processes differ: " + "; ".join(
            f"process {', '.join(map(str, others))} has other {name} than process 0" for name, others in differing.items()
            if len(others)) + ". Give all of them the same flags, except --process, and the same files")


@lru_cache
def _sum(mesh):
    return jax.jit(jax.shard_map(lambda part: jax.lax.psum(part[0], "process"), mesh=mesh,
                                 in_specs=PartitionSpec("process"), out_specs=PartitionSpec()))
