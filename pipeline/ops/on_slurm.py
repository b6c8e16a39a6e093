"""The stages `tokenize` and `train` as jobs of a Slurm cluster, whose nodes share the project's folder."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.cluster.jobs import Job, cancel, find_jobs, find_live, require_slurm, submit, wait
from pipeline.config.params import Params
from pipeline.config.sections import CorpusConfig, SlurmConfig
from pipeline.data.encode import SHARD_BYTES
from pipeline.system.errors import InputError
from pipeline.system.host import run_dvc
from pipeline.system.signals import StopSignals
from pipeline.training.config import RunConfig

MAX_TASKS = 16  # of an array, unless --workers says another number
RECORD = "-record"  # ends the name of the job that records in dvc.lock what another one has made


def tokenize_on_slurm(params: Params, slurm: SlurmConfig, n_tasks: int | None) -> None:
    """Encode the text in an array of `n_tasks` tasks; a last job joins the shards by `dvc repro tokenize`."""
    require_slurm(slurm)
    if (job := find_live("tokenize")) is None:
        config = params.section(CorpusConfig)
        _repro("tokenizer")
        if _is_up_to_date("tokenize"):
            return
        n_shards = math.ceil(Path("data/corpus.txt").stat().st_size * config.fraction / SHARD_BYTES)
        n = n_tasks or max(1, min(MAX_TASKS, n_shards))
        commands = [["pipeline", "tokenize", "--shard", str(shard), "--of", str(n)] for shard in range(n)]
        job = _submit_both("tokenize", commands, ["dvc", "repro", "tokenize"], slurm, nodes=1)
    _follow(job)


def train_on_slurm(params: Params, slurm: SlurmConfig, elastic: bool) -> None:
    """Train in a job of `slurm.nodes` nodes; a last job records the result in dvc.lock.

    Raises InputError if the nodes, processes and GPUs do not match, or if a training of other parameters has not ended.
    """
    require_slurm(slurm, slurm.nodes)
    config = RunConfig.of(params)
    each, batch = config.train.processes, config.windows.micro_batch_size
    if slurm.gpus not in (None, each):
        raise InputError(f"{slurm.gpus} GPUs on each node, but train.processes {each}: one process uses one GPU")
    if batch % (each * slurm.nodes):
        raise InputError(
            f"windows.micro_batch_size {batch} is not divisible by {slurm.nodes} nodes x {each} processes: "
            "change one of them"
        )
    command = ["stages.train", "--params", config.digest, *(["--elastic"] if elastic else [])]
    if (job := find_live("train")) is None:
        _repro("tokenize")
        if _is_up_to_date("train"):
            return
        job = _submit_both("train", [command], ["pipeline", "train", "--commit", config.digest], slurm, slurm.nodes)
    elif job.commands != [command]:
        raise InputError(
            f"job {job.id} trains with other parameters: wait for it, or `python -m pipeline jobs --cancel {job.id}`"
        )
    _follow(job)


def commit_training(params: Params, digest: str) -> None:
    """Record the finished training in dvc.lock. Raises InputError if params.yaml has changed since its start."""
    RunConfig.of(params).require_digest(digest)
    if run_dvc("commit", "--force", "train").returncode:
        raise InputError("`dvc commit -f train` failed, see the error above: fix it and repeat it")


def _submit_both(
    name: str, commands: Sequence[Sequence[str]], last: Sequence[str], slurm: SlurmConfig, nodes: int
) -> Job:
    """Submit a job, and one that runs `last` after it."""
    job = submit(name, commands, slurm, nodes=nodes)
    try:
        submit(f"{name}{RECORD}", [last], slurm.updated(gpus=None), after=job)
    except InputError:
        cancel(job.id)
        raise
    return job


def _follow(job: Job) -> None:
    """Wait for a job, and for the one after it."""
    with StopSignals() as stop:
        for each in (job, *(last for last in find_jobs(f"{job.name}{RECORD}") if last.after == job.id)):
            wait(each, stop)


def _repro(stage: str) -> None:
    # The wait for another DVC command's lock is short: the stages up to `tokenize` take seconds.
    if run_dvc("--wait-for-lock", "repro", stage).returncode:
        raise InputError(f"`dvc repro {stage}` failed, see the error above: fix it first")


def _is_up_to_date(stage: str) -> bool:
    """Whether `dvc repro` would do nothing; says so."""
    done = run_dvc("status", "--json", stage, capture_output=True)
    if found := done.returncode == 0 and json.loads(done.stdout) == {}:
        print(f"the stage {stage} is up to date")
    return found
