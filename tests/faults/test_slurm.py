"""Jobs on a real Slurm cluster of two nodes: requeued, cancelled, refused; tokens and losses are those of one machine."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from fixtures_slurm import ask
from fixtures_tokenizer import _project  # noqa: F401 (a fixture)
from waiting import wait_until

from pipeline.cluster.jobs import JobFailed, cancel, find_jobs, find_live, print_jobs, submit, wait
from pipeline.config.params import load_params
from pipeline.config.sections import SlurmConfig
from pipeline.data.encode import write_tokens
from pipeline.data.token_files import data_sha256
from pipeline.system.errors import InputError, Interrupted
from pipeline.system.files import read_json
from pipeline.system.signals import StopSignals
from tests.trainings import ROOT, bits, change, end, epochs, output_of, start_world, train

SHARD_BYTES = 1 << 14
DEFAULTS = load_params(ROOT / "params.yaml").section(SlurmConfig).updated(cpus=1)

pytestmark = pytest.mark.usefixtures("slurm")

# Programs that the jobs run in place of `pipeline` and `stages.train`. Each stops at a moment that a test can see.
SMALL_SHARDS = f"""
import sys, time
from functools import partial
from pathlib import Path
from pipeline.__main__ import main
from pipeline.data import encode

write_shard = encode.write_shard

def pausing(path, *arguments):
    if "train-00003" in path.name and not Path("go").exists():
        path.write_bytes(b"half")
        Path("half").touch()
        time.sleep(600)
    write_shard(path, *arguments)

encode.write_shard = pausing
encode.write_tokens = partial(encode.write_tokens, shard_bytes={SHARD_BYTES})
sys.exit(main(sys.argv[1:]))
"""
PAUSING = """
import time
from pathlib import Path
from pipeline.system.entrypoint import run_stage
from pipeline.training import train as training
from stages.train import main

evaluate = training.evaluate

def pausing(run, record):
    evaluate(run, record)
    if (pause := Path(f"pause-{record.step}")).exists():
        pause.rename(paused := Path(f"paused-{record.step}"))
        while paused.exists():
            time.sleep(0.05)

training.evaluate = pausing
run_stage(main)
"""


def follow(job):
    with StopSignals() as stop:
        wait(job, stop)


def state(job, task=0):
    return read_json(job.folder / f"task-{task}.json")


def reached(name, job):
    """Wait for the file `name`, which a job makes."""
    assert wait_until(lambda: Path(name).exists() or job.ended, 120)
    assert Path(name).exists(), [job.tasks, *(path.read_text() for path in job.folder.glob("*.log"))]


def test_an_array_that_is_requeued_in_the_middle_of_a_shard_writes_the_bytes_of_one_process(
    project, tokenizer, monkeypatch
):
    monkeypatch.chdir(project)
    Path("small_shards.py").write_text(SMALL_SHARDS)
    commands = [["small_shards", "tokenize", "--shard", str(shard), "--of", "2"] for shard in range(2)]
    job = submit("tokenize", commands, DEFAULTS)
    reached("half", job)
    ask("scontrol", "requeue", f"{job.id}_1")
    Path("go").touch()
    follow(job)
    assert [state(job, task)["attempts"] for task in range(2)] == [1, 2]
    (working,) = Path("data").glob(".unfinished-tokens-*")
    made = {path.name: path.stat().st_mtime_ns for path in (working / "tokens").iterdir()}
    arguments = load_params().values["corpus"]["fraction"], load_params().values["corpus"]["val_fraction"]
    write_tokens(Path("data/corpus.txt"), tokenizer, Path("data/tokens"), *arguments, shard_bytes=SHARD_BYTES)
    joined = {path.name: path.stat().st_mtime_ns for path in Path("data/tokens").iterdir()}
    assert made.items() - joined.items() <= {("tokenizer.json", made.get("tokenizer.json"))}  # no shard was made again
    write_tokens(Path("data/corpus.txt"), tokenizer, Path("clean"), *arguments, shard_bytes=SHARD_BYTES)
    assert data_sha256(Path("data/tokens")) == data_sha256(Path("clean"))
