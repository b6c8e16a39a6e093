"""Choose where the workers of a study run, on this machine or on a Slurm cluster, and the device of each."""

from typing import NamedTuple

import torch

from pipeline.cluster.jobs import require_slurm
from pipeline.config.sections import SlurmConfig, SweepConfig, TrainConfig
from pipeline.sweep.study import is_sqlite
from pipeline.system.device import gpu_ids
from pipeline.system.errors import InputError
from pipeline.system.limits import cores
from pipeline.system.words import counted

HIDDEN = "-1"  # the id of no GPU: `use_gpu` then hides all of them


class Placement(NamedTuple):
    """The workers of a study. On Slurm each is a task of a job; otherwise they are child processes of the sweep."""

    devices: list[str | None]  # for each worker, one of gpu_ids(), or HIDDEN; None: all devices that it finds
    threads: int  # of each worker
    slurm: SlurmConfig | None = None

    def __str__(self) -> str:
        n_gpus = len(set(self.devices) - {None})
        if self.slurm:
            n_gpus = len(self.devices) * (self.slurm.gpus or 0)
        return f"{counted(len(self.devices), 'worker')} of {counted(self.threads, 'thread')}, {counted(n_gpus, 'GPU')}"


def place_workers(sweep: SweepConfig, train: TrainConfig, slurm: SlurmConfig | None) -> Placement:
    """Give each worker a device and threads.

    Raises InputError if there are more workers than GPUs, unless `sweep.share_devices` allows it, or if the study
    cannot run on Slurm.
    """
    if slurm:
        threads = slurm.cpus or 1 if train.threads == "auto" else train.threads
        return Placement(_devices_on_slurm(sweep, train, slurm), threads, slurm)
    devices = _devices_here(sweep, train)
    return Placement(devices, max(1, cores() // len(devices)) if train.threads == "auto" else train.threads)


def _devices_here(sweep: SweepConfig, train: TrainConfig) -> list[str | None]:
    gpus: list[str | None] = list(gpu_ids()) if train.device in ("auto", "cuda") else []
    if not gpus and train.device in ("auto", "mps") and torch.backends.mps.is_available():
        gpus = [None]  # it is one device, without a name
    n_workers = max(1, len(gpus)) if sweep.workers == "auto" else sweep.workers
    if 0 < len(gpus) < n_workers and not sweep.share_devices:
        raise InputError(
            f"sweep.workers: {n_workers} workers, but {counted(len(gpus), 'GPU')}: choose auto, which starts one for "
            "each GPU, or set sweep.share_devices to true"
        )
    return [gpus[number % len(gpus)] if gpus else None for number in range(n_workers)]


def _devices_on_slurm(sweep: SweepConfig, train: TrainConfig, slurm: SlurmConfig) -> list[str | None]:
    """Slurm shows each task its own GPU. Without `slurm.gpus` a node may show all of them, which others use."""
    require_slurm(slurm)
    if sweep.workers == "auto":
        raise InputError("sweep.workers: auto counts the GPUs of one machine: with --on slurm, give --workers N")
    if is_sqlite(sweep.storage):
        raise InputError(
            f"sweep.storage {sweep.storage}: several nodes cannot share SQLite: choose journal:///optuna.journal"
        )
    for key, count in (("gpus", slurm.gpus), ("nodes", slurm.nodes)):
        if (count or 0) > 1:
            raise InputError(f"slurm.{key} {count}: a trial trains on one device of one node: give --{key} 1")
    if train.device == "cuda" and not slurm.gpus:
        raise InputError("train.device: cuda needs a GPU for each worker: give --gpus 1")
    return [None if slurm.gpus else HIDDEN] * sweep.workers
