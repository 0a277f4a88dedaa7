"""Several processes, on one machine or on many: who they are, and their sum.

Every process runs the same program on the same data, computes and multiplies its own tiles and holds
all vectors. They meet in one place, `all_reduce`: once in a step of the solver, for (n, c) float64. A
process that dies takes the others down, in a collective at once and otherwise within TIMEOUT; all are
then started again, and the store has what was finished.

    python train_cifar.py --store DIR --coordinator HOST0:12345 --processes 2 --process 0     on HOST0
    python train_cifar.py --store DIR --coordinator HOST0:12345 --processes 2 --process 1     on HOST1
    srun --ntasks-per-node=1 python train_cifar.py --store DIR                                under Slurm

One process a host takes all its GPUs, and where there are none, all its cores.
Listens on the coordinator's port, in process 0, and on what jax.distributed and gloo or NCCL choose.
Proved by: large/test_large.py
"""

import glob
import hashlib
import json
import os
import pathlib
import socket
import time
from contextlib import suppress
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tiles

PROXIES = "grpc_proxy", "https_proxy", "http_proxy"
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OWN = ("process", "devices", "coordinator", "data", "store", "out", "quiet", "verbose", "wait")  # of each process
TIMEOUT = 60  # seconds until a silent process counts as dead


def start(coordinator=None, processes=None, process=None, gpus=None, wait=300):
    """The Team of all processes; tiles.ALONE where there is one. Call before JAX touches a device.

    coordinator: "HOST:PORT" of process 0.   processes, process: how many, and which is this one.
    Without them Slurm is asked, if it runs more than one task.   gpus: how many this process takes;
    None: all that it can see, but under Slurm with several tasks on a node one for each.
    wait: seconds for the others to come.
    Raises ValueError: one of the three without the others, or a number out of range.   ConnectionError: not all came.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    slurm = int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_STEP_NODELIST" in os.environ else 1  # srun
    if not any(given) and slurm == 1:
        return tiles.ALONE
    if any(given) and not (all(given) and 0 <= process < processes):
        raise ValueError(f"--coordinator {coordinator} --processes {processes} --process {process}: give "
                         "HOST:PORT of process 0, their number P, and 0 to P - 1, the same but for the last")
    if any(given) and processes == 1:
        return tiles.ALONE
    tasks = int(os.environ.get("SLURM_NTASKS", 1)) // int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    if gpus is None and "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = len([one for one in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if one])
    elif gpus is None:
        gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    if coordinator:
        meet(coordinator, processes, process, wait)
    proxies = {name: os.environ.pop(name) for name in PROXIES if name in os.environ}  # gRPC would ask them for the way
    jax.distributed.initialize(
        coordinator, processes, process,  # all None: from Slurm, where JAX's own choice is one GPU
        local_device_ids=range(gpus) if gpus and (all(given) or tasks == 1) else None,
        initialization_timeout=wait, heartbeat_timeout_seconds=TIMEOUT, shutdown_timeout_seconds=TIMEOUT)
    os.environ.update(proxies)
    all_reduce(np.zeros(1))  # connects: gloo waits 30 s for that, and as long as it takes later
    return tiles.Team(jax.process_index(), jax.process_count(), all_reduce)


def meet(coordinator, processes, process, wait):
    """Returns once all processes have come to HOST:PORT, and says for whom it waits. JAX alone would abort after a silence.

    ConnectionError: some have not come after `wait` seconds, or one has come twice.
    """
    host, port = coordinator.rsplit(":", 1)
    end = time.monotonic() + wait
    if process > 0:
        print(f"process {process} of {processes}: waiting for process 0 at {coordinator}, {wait} s at most", flush=True)
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), end - time.monotonic()) as there:
                there.sendall(b"%d\n" % process)
                answer = there.recv(3)
                if answer == b"all":
                    return
                if answer == b"two":
                    raise ValueError(f"there is a process {process} at {coordinator} already: give each its own --process")
            time.sleep(0.1)
        raise ConnectionError(f"process {process} of {processes} waited {wait} s for process 0 and the others at "
                              f"{coordinator}: start all of them, with the address of process 0, or raise --wait")
    came, missing = {}, set(range(1, processes))
    with socket.create_server(("", int(port))) as server:
        while missing:
            names = ", ".join(map(str, sorted(missing)))
            print(f"process 0 of {processes}: waiting at {coordinator} for process {names}, {wait} s at most", flush=True)
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                there, _ = server.accept()
                there.settimeout(5)
                number = int(there.recv(16))
            except TimeoutError:
                if time.monotonic() >= end:
                    raise ConnectionError(f"process {names} of {processes} did not come to {coordinator} within {wait} s: "
                                          "start it, or raise --wait") from None
                continue
            except (OSError, ValueError):  # not one of ours
                continue
            if number in missing:
                came[number] = there
                missing.remove(number)
            else:
                there.sendall(b"two")
        for there in came.values():
            there.sendall(b"all")
            there.close()


def all_reduce(array):
    """The sum of every process's array, equal to the last bit in all of them; same shape and dtype.

    Cost: about 2 bytes through the network for each byte of the array, whatever P.
    Raises ConnectionError: another process is gone.
    """
    first = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    mesh = Mesh(np.array([first[process] for process in sorted(first)]), ("process",))
    with jax.enable_x64(True):
        try:
            stacked = jax.make_array_from_process_local_data(
                NamedSharding(mesh, PartitionSpec("process")), np.asarray(array)[None])
            return np.array(_sum(mesh)(stacked).addressable_data(0))
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX raises now the one, now the other
            raise ConnectionError(
                f"process {jax.process_index()} of {jax.process_count()}: another process is gone. "
                "Start all of them again: what is in --store is kept. "
                f"({str(error).splitlines()[0]})") from error


def agree(team, args, *arrays):
    """Raises ValueError in every process unless all run the same code with the same flags on the same data."""
    flags = {flag: value for flag, value in vars(args).items() if flag not in OWN}
    code = [path.read_bytes() for path in sorted(pathlib.Path(HERE).rglob("*.py")) if ".venv" not in path.parts]
    parts = {"flags": json.dumps(flags, default=str).encode(), "code": b"".join(code),
             "data": b"".join(hashlib.blake2b(np.ascontiguousarray(array)).digest() for array in arrays)}
    digests = np.zeros((team.count, len(parts)))  # 48 bits are exact in float64
    digests[team.index] = [int.from_bytes(hashlib.blake2b(part, digest_size=6).digest()) for part in parts.values()]
    digests = team.all_reduce(digests)
    differ = {name: np.flatnonzero(column != column[0]) for name, column in zip(parts, digests.T)}
    if any(map(len, differ.values())):
        raise ValueError("the processes do not do the same: " + "; ".join(
            f"process {', '.join(map(str, those))} has other {name} than process 0" for name, those in differ.items()
            if len(those)) + ". Give all of them the same flags, but for --process, and the same files")


@lru_cache
def _sum(mesh):
    return jax.jit(jax.shard_map(lambda part: jax.lax.psum(part[0], "process"), mesh=mesh,
                                 in_specs=PartitionSpec("process"), out_specs=PartitionSpec()))
