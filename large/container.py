"""What a container leaves to its processes: cores and memory, by Linux's control groups of version 1 and 2.

    container.cores(), container.free_memory()   both infinite where no group sets a limit, or where there are none

tiles.py asks, so that a run takes no more threads than its share of the processors, and refuses what would not fit. A limit
may stand in the group of the process, or in any group above it.      Proved by: large/test_large.py, section container
"""

import math
import pathlib
import re

GROUP, GROUPS = "/proc/self/cgroup", "/sys/fs/cgroup"  # which groups this process is in; what they may use
NO_LIMIT = 2**62  # bytes; version 1 writes 2^63 less a page where there is no limit


def cores():
    """How many whole cores the quotas leave; 0 is less than one."""
    shares = [text.split() for text, in control_groups("", "cpu.max")]  # "quota period" in microseconds
    shares += control_groups("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    return min((int(quota) // int(period) for quota, period in shares if quota.strip() not in ("max", "-1")), default=math.inf)


def free_memory():
    """How many bytes the limits leave. Files in the page cache do not count as used.  (In memory.stat of version 1, lines that
    begin with total_ include the groups below, as usage does.)"""
    groups = control_groups("", "memory.max", "memory.current", "memory.stat")
    groups += control_groups("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return min((int(limit) - int(used) + sum(map(int, re.findall(
        rf"^{'total_' * ('total_inactive_file' in stat)}(?:in)?active_file (\d+)", stat, re.M)))
                for limit, used, stat in groups if limit.strip() != "max" and int(limit) < NO_LIMIT), default=math.inf)


def control_groups(controller, *files):
    """The contents of `files` in each control group of this process, its own first, [] where there are none.
    controller: of version 1; "" is version 2."""
    found = []
    try:
        with open(GROUP) as lines:
            paths = [line.rstrip().split(":", 2)[1:] for line in lines]
    except OSError:
        return []
    for path in [path.strip("/") for names, path in paths if controller in names.split(",")]:
        places = [path.rsplit("/", up)[0] for up in range(path.count("/") + 1)] if path else []
        for place in [*places, ""]:
            try:
                found.append([pathlib.Path(GROUPS, controller, place, file).read_text() for file in files])
            except OSError:  # no such limit, or a group that this container does not see
                continue
    return found
