"""Jobs on a real Slurm cluster of two nodes: requeued, cancelled, refused; results are those of one machine."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fixtures_slurm import ask
from fixtures_tokenizer import _project  # noqa: F401 (a fixture)
from mlflow import MlflowClient
from waiting import wait_until

from pipeline.__main__ import main
from pipeline.cluster.jobs import JobFailed, cancel, find_jobs, submit, wait
from pipeline.config.params import load_params
from pipeline.config.sections import SlurmConfig
from pipeline.data.encode import write_tokens
from pipeline.data.token_files import data_sha256
from pipeline.system.errors import InputError
from pipeline.system.files import read_json
from pipeline.system.processes import run_dvc
from pipeline.system.signals import StopSignals
from tests.trainings import ROOT, STEPS, bits, end, output_of, start_world, train

SHARD_BYTES = 1 << 14
DEFAULTS = load_params(ROOT / "params.yaml").section(SlurmConfig).updated(cpus=1)

pytestmark = pytest.mark.usefixtures("slurm")

# Programs that jobs run in place of `pipeline` and `stages.train`. Each stops at a moment that a test can see.
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
import os, signal, time
from pathlib import Path
from pipeline.system import distributed
from pipeline.system.entrypoint import run_stage
from pipeline.training import train as training
from stages.train import main
from tests.trainings import Untracked

evaluate, launch = training.evaluate, distributed.launch

def pausing(run, record):
    evaluate(run, record)
    if run.world.is_main and (pause := Path(f"pause-{record.step}")).exists():
        pause.rename(f"paused-{record.step}")
        while signal.getsignal(signal.SIGTERM).__self__.received is None:
            time.sleep(0.05)

training.evaluate = pausing
distributed.launch = lambda processes, module, arguments: launch(processes, "pausing", arguments)
os.setpriority = lambda *arguments: None  # at the lowest priority, MLflow's recorder could take minutes here
if Path("untracked").exists():
    training.Recorder = Untracked
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


def test_a_training_that_is_requeued_and_cancelled_resumes_in_its_mlflow_run_with_the_same_bits(straight, workspace):
    Path("pausing.py").write_text(PAUSING)
    for step in (5, 8):
        Path(f"pause-{step}").touch()
    job = submit("train", [["pausing"]], DEFAULTS)
    reached("paused-5", job)
    ask("scontrol", "requeue", job.id)
    reached("paused-8", job)
    assert state(job)["attempts"] == 2
    assert [task.state for task in job.tasks] == ["running"]
    ask("scancel", job.id)
    with pytest.raises(JobFailed, match=rf"job {job.id} \(train\), task 0 on n.: it was cancelled"):
        follow(job)
    log = job.log(0).read_text()
    assert "error: SIGTERM at step 5 of 12" in log
    assert "Slurm runs it again to resume" in log
    assert "resumes from step 5 of 12" in log
    assert "error: SIGTERM at step 8 of 12" in log
    follow(again := submit("train", [["pausing"]], DEFAULTS))
    assert "resumes from step 8 of 12" in again.log(0).read_text()
    assert bits() == bits(straight)
    runs = MlflowClient("sqlite:///mlflow.db").search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert len(MlflowClient("sqlite:///mlflow.db").get_metric_history(runs[0].info.run_id, "loss")) == STEPS


def test_a_training_on_two_nodes_has_the_bits_of_two_processes_of_one_machine(workspace):
    processes = start_world(2, train)
    assert [end(process) for process in processes] == [0, 0], [output_of(process) for process in processes]
    expected = bits()
    shutil.rmtree("checkpoints")
    Path("pausing.py").write_text(PAUSING)
    for name in ("untracked", "pause-5"):
        Path(name).touch()
    job = submit("train", [["pausing"]], DEFAULTS, nodes=2)
    reached("paused-5", job)
    ask("scancel", "--signal=USR2", job.id)  # as Slurm does before the time limit
    follow(job)
    assert "resumes from step 5 of 12" in job.log(0).read_text()
    assert bits() == expected


# Replaces stages.train in the project's folder: the same program without MLflow.
UNTRACKED = f"""
import runpy
from pipeline.system.entrypoint import run_stage
from pipeline.training import train as training
from tests.trainings import Untracked

training.Recorder = Untracked
run_stage(runpy.run_path({str(ROOT / "stages" / "train.py")!r})["main"])
"""
DVC = """
stages:
  tokenize:
    cmd: exit 0
    deps: [data/tokens]
  train:
    cmd: exit 1
    params: [model, windows, optim, train, target, checkpoint, samples]
    deps: [data/tokens, data/tokenizer]
    outs: [models/model, models/run.json, models/steps.jsonl, models/times.jsonl]
    metrics: [reports/timing.json]
"""  # DVC itself cannot train


@pytest.mark.parametrize("record_is_cancelled", [False, True])
def test_the_command_train_ends_with_the_result_in_dvc_lock_and_trains_once_though_it_was_interrupted(
    workspace, record_is_cancelled
):
    for path, text in {
        "stages/__init__.py": "",
        "stages/train.py": UNTRACKED,
        "dvc.yaml": DVC,
        ".dvc/config": "[core]\n    no_scm = true\n    analytics = false\n",
    }.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)
    arguments = ["train", "--on", "slurm", "--cpus", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as head:
        assert wait_until(lambda: find_jobs("train-record") or head.poll() is not None, 60)
        assert head.poll() is None, head.communicate()[0]
        (record,) = find_jobs("train-record")
        ask("scontrol", "hold", record.id)
        (job,) = find_jobs("train")
        assert wait_until(lambda: job.ended or head.poll() is not None, 120)
        head.send_signal(signal.SIGINT)
        said, _ = head.communicate(timeout=60)
    assert head.returncode == 130, said
    assert "is still in Slurm: the same command follows it" in said
    assert job.succeeded, said
    assert "train" not in yaml.safe_load(Path("dvc.lock").read_text())["stages"]
    ask(*(["scancel"] if record_is_cancelled else ["scontrol", "release"]), record.id)
    assert main(arguments) == 0
    assert find_jobs("train") == [job]
    assert [each.succeeded for each in find_jobs("train-record")] == ([False, True] if record_is_cancelled else [True])
    recorded = {out["path"] for out in yaml.safe_load(Path("dvc.lock").read_text())["stages"]["train"]["outs"]}
    assert {"models/model", "reports/timing.json"} <= recorded
    assert run_dvc("status", "--json", "train", capture_output=True).stdout.strip() == "{}"


SLEEPER = """
import signal, sys, time
from pathlib import Path

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
Path("started").touch()
while not Path("go").exists():
    time.sleep(0.05)
"""


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """The command of a job that runs until the file `go` is there."""
    monkeypatch.chdir(tmp_path)
    Path("sleeper.py").write_text(SLEEPER)
    return [["sleeper"]]


def why(job):
    return job.tasks[0].why


def test_a_job_that_slurm_refuses_or_that_waits_says_why_in_one_line(sleeper, monkeypatch):
    with pytest.raises(InputError, match=r"Slurm refuses partition nope, .*: invalid partition specified: nope"):
        submit("x", sleeper, DEFAULTS.updated(partition="nope"))
    assert find_jobs() == []
    too_long = submit("x", sleeper, DEFAULTS.updated(time_min=61))
    assert wait_until(lambda: "limit of the partition" in why(too_long), 20), why(too_long)
    cancel(too_long.id)
    whole = submit("x", sleeper, DEFAULTS.updated(cpus=2), nodes=2)
    reached("started", whole)
    waiting = submit("x", sleeper, DEFAULTS.updated(cpus=2, partition="one"))
    assert wait_until(lambda: why(waiting), 20) == "Resources (the nodes are in use)"
    Path("go").touch()
    for job in (whole, waiting):
        follow(job)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="no sbatch on the PATH"):
        patch.setenv("PATH", "/nowhere")
        submit("x", sleeper, DEFAULTS)


def test_the_last_task_of_an_array_that_is_cancelled_stays_cancelled_while_another_runs(sleeper, monkeypatch):
    job = submit("x", sleeper * 2, DEFAULTS)
    monkeypatch.setenv("LOGNAME", "nobody")  # a colleague, who shares the folder, sees the same
    assert wait_until(lambda: all(Path(job.folder / f"task-{task}.json").exists() for task in range(2)), 60)
    ask("scancel", f"{job.id}_1")
    assert wait_until(lambda: [task.state for task in job.tasks] == ["running", "cancelled"], 30), job.tasks
    Path("go").touch()
    with pytest.raises(JobFailed, match=r"task 1 on n.: it was cancelled"):
        follow(job)


def test_a_job_whose_node_dies_starts_again_and_one_that_fails_ends_those_after_it(sleeper):
    job = submit("x", sleeper, DEFAULTS)
    reached("started", job)
    Path("started").unlink()
    ask("scontrol", "update", f"nodename={job.tasks[0].node}", "state=down", "reason=test")
    reached("started", job)
    Path("go").touch()
    follow(job)
    assert state(job)["attempts"] == 2
    failing = submit("x", [["no_such_module"]], DEFAULTS)
    after = submit("x", sleeper, DEFAULTS, after=failing)
    with pytest.raises(JobFailed, match=r"task 0 on n.: exit code 1, .*: No module named no_such_module: see"):
        follow(failing)
    with pytest.raises(JobFailed, match="it was cancelled"):
        follow(after)
