"""A run's record: what was asked, what came out, on which machine, by which code; a line of JSON each.

    run, seconds = runs.provenance(), {}
    with runs.phase("kernel", seconds): ...
    runs.record("results", config, {"test_accuracy": 0.5, "seconds": seconds}, run)

Proved by: test_all.py, section train
"""

import datetime
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager

import jax


@contextmanager
def phase(name, seconds):
    """Adds to seconds[name] what the block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def provenance(processes=1):
    """Machine, versions and code of a run, taken at its start, for the files may change under it."""
    def git(*command):
        done = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), *command],
                              capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return {"device": jax.local_devices()[0].device_kind, "devices": jax.local_device_count(),
            "processes": processes, "cores": os.cpu_count(), "jax": jax.__version__,
            "neural_tangents": importlib.metadata.version("neural-tangents"),
            "commit": git("rev-parse", "--short", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", "*.py", "requirements.txt")),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def record(folder, config, result, run):
    """Append to runs.jsonl in `folder` the result, completed by its configuration, `provenance` and the
    most memory this process has used."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    result["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    result.update(config=config, **run)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "runs.jsonl"), "a") as lines:
        lines.write(json.dumps(result) + "\n")
