"""The stages `tokenize` and `train` as jobs of a Slurm cluster, whose nodes share the project's folder."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.cluster.jobs import Job, cancel, find_jobs, find_live, require_slurm, submit, wait
from pipeline.config.params import Params
from pipeline.config.sections import CorpusConfig, SlurmConfig
from pipeline.data.encode import SHARD_BYTES
from pipeline.data.token_files import data_sha256
from pipeline.system.errors import InputError
from pipeline.system.processes import repro_stage, run_dvc
from pipeline.system.signals import StopSignals
from pipeline.tracking.fingerprint import fingerprint_of
from pipeline.tracking.run_record import read_run
from pipeline.training.config import RunConfig

MAX_TASKS = 16  # of an array, unless --workers says another number
RECORD = "-record"  # ends the name of the job that records in dvc.lock what another one has made


def tokenize_on_slurm(params: Params, slurm: SlurmConfig, n_tasks: int | None) -> None:
    """Encode the text in an array of `n_tasks` tasks; a last job joins the shards by `dvc repro tokenize`."""
    require_slurm(slurm := slurm.updated(gpus=None))
    commands: list[list[str]] = []
    job, record = _unrecorded("tokenize")
    if job and job.succeeded and not record:  # the array finds its shards, unless the text has changed since
        job = None
    if job is None:
        config = params.section(CorpusConfig)
        repro_stage("tokenizer")
        if _is_up_to_date("tokenize"):
            return
        n_shards = math.ceil(Path("data/corpus.txt").stat().st_size * config.fraction / SHARD_BYTES)
        n = n_tasks or max(1, min(MAX_TASKS, n_shards))
        commands = [["pipeline", "tokenize", "--shard", str(shard), "--of", str(n)] for shard in range(n)]
    last = ["dvc", "--wait-for-lock", "repro", "tokenize"]
    _submit_and_follow("tokenize", commands, last, slurm, 1, job, record)


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
    job, record = _unrecorded("train")
    if job is None or (job.succeeded and not record):
        repro_stage("tokenize")
        if _is_up_to_date("train"):
            return
        if job and not (job.commands == [command] and _is_trained(params)):
            job = None
    elif job.commands != [command]:
        flag = "trains without --elastic" if elastic else "trains with --elastic"
        differs = flag if config.digest in job.commands[0] else "trains with other parameters"
        live = record if record and job.succeeded else job
        raise InputError(f"job {live.id} {differs}: wait for it, or `python -m pipeline jobs --cancel {live.id}`")
    last = ["pipeline", "train", "--commit", config.digest]
    _submit_and_follow("train", [command], last, slurm, slurm.nodes, job, record)


def commit_training(params: Params, digest: str) -> None:
    """Record the finished training in dvc.lock.

    Raises InputError if params.yaml has changed since its start, or if models/ has the result of another training.
    """
    RunConfig.of(params).require_digest(digest)
    if not _is_trained(params):
        raise InputError("the tokens or the code have changed since this job was submitted: submit it again")
    if run_dvc("--wait-for-lock", "commit", "--force", "train").returncode:
        raise InputError("`dvc commit -f train` failed, see the error above: fix it and repeat it")


def _is_trained(params: Params) -> bool:
    """Whether models/ has the result of a training with these parameters, the present tokens and the present code."""
    from pipeline.training.train import read_config  # imports torch

    data, models = Path("data"), Path("models")
    if not (models / "run.json").is_file():
        return False
    present = fingerprint_of(data_sha256(data / "tokens"), read_config(params, data).decisive)
    return bool(read_run(models)["fingerprint"] == present)


def _unrecorded(name: str) -> tuple[Job | None, Job | None]:
    """The job of a name whose result is not recorded yet, and the job that records it, unless that one has failed.

    It is the job that has not ended, or the last one if it has succeeded.
    """
    job = find_live(name) or next(reversed(find_jobs(name)), None)
    if job is None or (job.ended and not job.succeeded):
        return None, None
    records = [record for record in find_jobs(f"{name}{RECORD}") if record.after == job.id]
    if any(record.succeeded for record in records):
        return None, None
    return job, next((record for record in records if not record.ended), None)


def _submit_and_follow(
    name: str,
    commands: Sequence[Sequence[str]],
    last: Sequence[str],
    slurm: SlurmConfig,
    nodes: int,
    job: Job | None,
    record: Job | None,
) -> None:
    """Submit a job, and one that runs `last` after it, except those that `_unrecorded` has found. Wait for both.

    A signal is only recorded until both are submitted: a job without the other would never be recorded.
    """
    with StopSignals() as stop:
        found = job
        try:
            job = job or submit(name, commands, slurm, nodes=nodes)
            record = record or submit(f"{name}{RECORD}", [last], slurm.updated(gpus=None), after=job)
        except InputError:
            if job and not found:
                cancel(job.id)
            stop.raise_if_received("before the jobs were submitted")  # Ctrl-C also ends sbatch
            raise
        if not (found and found.succeeded):
            wait(job, stop)
        wait(record, stop)


def _is_up_to_date(stage: str) -> bool:
    """Whether `dvc repro` would do nothing; says so."""
    done = run_dvc("status", "--json", stage, capture_output=True)
    if found := done.returncode == 0 and json.loads(done.stdout) == {}:
        print(f"the stage {stage} is up to date")
    return found
