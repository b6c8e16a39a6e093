"""What `tokenize` and `train` submit to Slurm, what they follow again, and what they refuse; without a cluster."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cluster.jobs import Job
from pipeline.config.params import load_params
from pipeline.config.sections import SlurmConfig
from pipeline.ops import on_slurm
from pipeline.system.errors import InputError
from pipeline.training.config import RunConfig
from tests.trainings import ROOT, change

PARAMS = load_params(ROOT / "params.yaml")
SLURM = PARAMS.section(SlurmConfig).updated(time_min=90)
TRAIN = ["stages.train", "--params", RunConfig.of(PARAMS).digest]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster that only notes what happens: `did`. `live` is a job that has not ended; `current`: stages, by DVC."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    found = SimpleNamespace(did=[], live=None, current=set(), jobs=[])

    def submit(name, commands, slurm, *, nodes=1, after=None):
        found.did.append((name, commands, nodes, slurm.gpus, after and after.id))
        found.jobs.append(Job(str(len(found.jobs)), name, commands, after and after.id, tmp_path))
        return found.jobs[-1]

    def run_dvc(*arguments, capture_output=False):
        found.did.append(arguments[-2:])
        status = {} if arguments[-1] in found.current else {arguments[-1]: ["changed"]}
        return SimpleNamespace(returncode=0, stdout=json.dumps(status))

    monkeypatch.setattr(on_slurm, "require_slurm", lambda slurm, nodes=1: None)
    monkeypatch.setattr(on_slurm, "submit", submit)
    monkeypatch.setattr(on_slurm, "run_dvc", run_dvc)
    monkeypatch.setattr(on_slurm, "find_live", lambda name: found.live)
    monkeypatch.setattr(on_slurm, "find_jobs", lambda name: [job for job in found.jobs if job.name == name])
    monkeypatch.setattr(on_slurm, "wait", lambda job, stop: found.did.append(f"wait for {job.id}"))
    return found


def test_an_array_divides_the_shards_and_a_last_job_joins_them(cluster):
    Path("data").mkdir()
    with open("data/corpus.txt", "wb") as corpus:
        corpus.truncate(30 << 26)  # 30 shards, of which a tenth is used: 3
    share = ["pipeline", "tokenize", "--shard"]
    for given, n in ((None, 3), (2, 2)):
        cluster.did.clear()
        cluster.jobs.clear()
        on_slurm.tokenize_on_slurm(PARAMS, SLURM, given)
        assert cluster.did == [
            ("repro", "tokenizer"),
            ("--json", "tokenize"),
            ("tokenize", [[*share, str(i), "--of", str(n)] for i in range(n)], 1, None, None),
            ("tokenize-record", [["dvc", "repro", "tokenize"]], 1, None, "0"),
            "wait for 0",
            "wait for 1",
        ]


def test_a_training_is_submitted_with_its_parameters_and_recorded_by_a_last_job_without_gpus(cluster):
    change(Path(), **{"train.processes": 4})
    params = load_params()
    digest = RunConfig.of(params).digest
    on_slurm.train_on_slurm(params, SLURM.updated(nodes=2, gpus=4), elastic=True)
    assert cluster.did == [
        ("repro", "tokenize"),
        ("--json", "train"),
        ("train", [["stages.train", "--params", digest, "--elastic"]], 2, 4, None),
        ("train-record", [["pipeline", "train", "--commit", digest]], 1, None, "0"),
        "wait for 0",
        "wait for 1",
    ]


def test_what_is_up_to_date_is_not_submitted_and_what_runs_is_followed(cluster, capsys):
    cluster.current = {"train"}
    on_slurm.train_on_slurm(PARAMS, SLURM, elastic=False)
    assert cluster.did == [("repro", "tokenize"), ("--json", "train")]
    assert "the stage train is up to date" in capsys.readouterr().out
    cluster.live = Job("7", "train", [TRAIN], None, Path())
    cluster.jobs = [cluster.live, *(Job(id, "train-record", [["x"]], after, Path()) for id, after in ("87", "96"))]
    cluster.did.clear()
    on_slurm.train_on_slurm(PARAMS, SLURM, elastic=False)
    assert cluster.did == ["wait for 7", "wait for 8"]


@pytest.mark.parametrize(
    ("slurm", "live", "words"),
    [
        ({"gpus": 2}, None, "2 GPUs on each node, but train.processes 1: one process uses one GPU"),
        ({"nodes": 3}, None, "windows.micro_batch_size 32 is not divisible by 3 nodes x 1 processes"),
        (
            {},
            ["stages.train", "--params", "0"],
            "job 7 trains with other parameters: wait for it, or `python -m pipeline jobs",
        ),
    ],
)
def test_a_training_that_cannot_work_is_refused_before_anything_happens(cluster, slurm, live, words):
    cluster.live = live and Job("7", "train", [live], None, Path())
    with pytest.raises(InputError, match=words):
        on_slurm.train_on_slurm(PARAMS, SLURM.updated(**slurm), elastic=False)
    assert cluster.did == []


def test_a_result_is_not_recorded_if_params_yaml_has_changed_since(cluster):
    on_slurm.commit_training(PARAMS, TRAIN[-1])
    assert cluster.did == [("--force", "train")]
    change(Path(), **{"optim.lr": 0.5})
    with pytest.raises(InputError, match=r"params.yaml has changed since this job was submitted"):
        on_slurm.commit_training(load_params(), TRAIN[-1])
