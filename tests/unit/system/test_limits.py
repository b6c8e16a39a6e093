"""Cores and memory are the minimum over the machine and the cgroups of the process."""

import os
from types import SimpleNamespace

import psutil
import pytest

from pipeline.system import limits
from pipeline.system.limits import cores, free_memory_bytes

V1 = "4:memory:{path}\n3:cpu,cpuacct:{path}\n0::/\n"
V2 = "0::{path}\n"
V1_UNLIMITED = 9223372036854771712


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 8 cores and 1,000 bytes of free memory, with the given cgroup of the process and cgroup files."""

    def build(own, files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(f"{content}\n")

    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)  # macOS lacks it
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    return build


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (V2, {"a/b/cpu.max": "max 100000"}, 8),
        (V2, {"a/b/cpu.max": "250000 100000"}, 2),
        (V2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}, 1),  # of the parent
        (V2, {"cpu.max": "50000 100000"}, 1),  # a container sees its own cgroup as the root
        (V2, {"unified/a/b/cpu.max": "300000 100000"}, 3),
        (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"}, 8),
        (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "400000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"cpu/a/cpu.cfs_quota_us": "20000", "cpu/a/cpu.cfs_period_us": "10000"}, 2),
        (V1, {}, 8),
        ("0::/../x\n", {"cpu.max": "200000 100000"}, 2),  # a cgroup outside of the namespace
    ],
)
def test_cores_are_limited_by_each_cgroup(machine, own, files, expected):
    machine(own.format(path="/a/b"), files)
    assert cores() == expected


def test_a_job_uses_no_more_cores_than_slurm_gives_it(machine, monkeypatch):
    machine(V2, {})
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert cores() == 3


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (V2, {"a/b/memory.max": "max", "a/b/memory.current": "5"}, 1000),
        (
            V2,
            {"a/b/memory.max": "600", "a/b/memory.current": "500", "a/b/memory.stat": "anon 9\ninactive_file 50"},
            150,
        ),
        (V2, {"memory.max": "600", "memory.current": "700"}, 0),
        (V1, {"memory/a/b/memory.limit_in_bytes": V1_UNLIMITED, "memory/a/b/memory.usage_in_bytes": 5}, 1000),
        (
            V1,
            {
                "memory/a/memory.limit_in_bytes": 900,
                "memory/a/memory.usage_in_bytes": 500,
                "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 100",
            },
            500,
        ),
    ],
)
def test_free_memory_is_limited_by_each_cgroup(machine, own, files, expected):
    machine(own.format(path="/a/b"), files)
    assert free_memory_bytes() == expected


def test_a_system_without_cgroups_has_all_its_cores(machine):
    assert cores() == 8
    assert free_memory_bytes() == 1000
