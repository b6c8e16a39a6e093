"""Find the CPU cores and the memory that this process may use: CPU affinity, cgroups (versions 1, 2), Slurm."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")  # lines of id:controllers:path; version 2 has no controllers


def cores() -> int:
    """The number of CPU cores that this process may use. A quota is rounded down, but to at least 1: 2.5 becomes 2."""
    quotas = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    for folder in _cgroups("cpu"):
        quota, period = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ] or ["max", ""]  # fmt: skip
        if quota not in ("max", "-1"):
            quotas.append(int(quota) / int(period))
    if given := os.environ.get("SLURM_CPUS_PER_TASK"):  # which not every cluster enforces
        quotas.append(int(given))
    return max(1, int(min(quotas)))


def free_memory_bytes() -> int:
    """The memory that this process can still allocate: the minimum over the machine and its cgroups.

    Cached files count as free, since the kernel drops them when memory is needed.
    """
    free = [int(psutil.virtual_memory().available)]
    for folder in _cgroups("memory"):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes") or ["max"]
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        if limit != ["max"] and used:
            stat = _words(folder / "memory.stat")
            values = dict(zip(stat[::2], stat[1::2], strict=True))
            cached = values.get("total_inactive_file") or values.get("inactive_file", "0")  # version 1, version 2
            free.append(int(limit[0]) - int(used[0]) + int(cached))
    return max(0, min(free))


def _cgroups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of its ancestors; some may not exist inside a container."""
    for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if OWN_CGROUPS.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root in (CGROUPS / controllers, CGROUPS / (controller if controllers else "unified")):
            folder = root / path.lstrip("/")
            yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
