"""What `tokenize` and `train` submit to Slurm, what they follow again, and what they refuse; without a cluster."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.params import load_params
from pipeline.config.sections import SlurmConfig
from pipeline.data.token_files import data_sha256
from pipeline.ops import on_slurm
from pipeline.system import processes
from pipeline.system.device import prepare_machine
from pipeline.system.errors import InputError, Interrupted
from pipeline.system.files import write_json
from pipeline.tracking.fingerprint import identify
from pipeline.training.config import RunConfig
from pipeline.training.train import read_config
from tests.trainings import ROOT, change

PARAMS = load_params(ROOT / "params.yaml")
SLURM = PARAMS.section(SlurmConfig).updated(time_min=90)
DIGEST = RunConfig.of(PARAMS).digest
TRAIN = ["stages.train", "--params", DIGEST]
RECORD = ["pipeline", "train", "--commit", DIGEST]


def job(identity, name, commands=(TRAIN,), after=None, state="running"):
    ends = {"ended": state != "running", "succeeded": state == "done"}
    return SimpleNamespace(id=identity, name=name, commands=list(commands), after=after, **ends)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster that only notes what happens: `did`, and `asked`, the GPUs and nodes that it was asked for.

    `jobs` are those so far; `refused` the name of one that Slurm refuses; `current` the stages that are up to date;
    `trained`: whether models/ has the result of the present parameters.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    found = SimpleNamespace(
        asked=[], did=[], jobs=[], refused=None, current=set(), trained=False, during_submit=lambda: None
    )

    def submit(name, commands, slurm, *, nodes=1, after=None):
        found.during_submit()
        if name == found.refused:
            raise InputError("Slurm refuses it")
        found.did.append((name, commands, nodes, slurm.gpus, after and after.id))
        found.jobs.append(job(f"new {len(found.jobs)}", name, commands, after and after.id))
        return found.jobs[-1]

    def wait(followed, stop):
        stop.raise_if_received("here")
        found.did.append(f"wait for {followed.id}")
        followed.ended = followed.succeeded = True

    def run_dvc(*arguments, capture_output=False):
        found.did.append(" ".join(arguments))
        status = {} if arguments[-1] in found.current else {arguments[-1]: ["changed"]}
        return SimpleNamespace(returncode=0, stdout=json.dumps(status))

    def find_jobs(name):
        return [each for each in found.jobs if each.name == name]

    monkeypatch.setattr(on_slurm, "require_slurm", lambda slurm, nodes=1: found.asked.append((slurm.gpus, nodes)))
    monkeypatch.setattr(on_slurm, "submit", submit)
    monkeypatch.setattr(on_slurm, "wait", wait)
    for module in (on_slurm, processes):  # the module of `repro_stage`
        monkeypatch.setattr(module, "run_dvc", run_dvc)
    monkeypatch.setattr(on_slurm, "find_jobs", find_jobs)
    monkeypatch.setattr(on_slurm, "find_live", lambda name: next((j for j in find_jobs(name) if not j.ended), None))
    monkeypatch.setattr(on_slurm, "cancel", lambda identity: found.did.append(f"cancel {identity}"))
    monkeypatch.setattr(on_slurm, "_is_trained", lambda params: found.trained)
    return found


def corpus(n_shards):
    Path("data").mkdir(exist_ok=True)
    with open("data/corpus.txt", "wb") as file:
        file.truncate(n_shards << 26)


def test_an_array_without_gpus_divides_the_shards_and_a_last_job_joins_them(cluster):
    corpus(30)  # of which a tenth is used: 3
    share = ["pipeline", "tokenize", "--shard"]
    for given, n in ((None, 3), (2, 2)):
        cluster.did.clear()
        cluster.jobs.clear()
        on_slurm.tokenize_on_slurm(PARAMS, SLURM.updated(gpus=4), given)
        assert cluster.asked.pop() == (None, 1)
        assert cluster.did == [
            "--wait-for-lock repro tokenizer",
            "status --json tokenize",
            ("tokenize", [[*share, str(i), "--of", str(n)] for i in range(n)], 1, None, None),
            ("tokenize-record", [["dvc", "--wait-for-lock", "repro", "tokenize"]], 1, None, "new 0"),
            "wait for new 0",
            "wait for new 1",
        ]


def test_a_training_is_submitted_with_its_parameters_and_recorded_by_a_last_job_without_gpus(cluster):
    change(Path(), **{"train.processes": 4})
    params = load_params()
    digest = RunConfig.of(params).digest
    on_slurm.train_on_slurm(params, SLURM.updated(nodes=2, gpus=4), elastic=True)
    assert cluster.did == [
        "--wait-for-lock repro tokenize",
        "status --json train",
        ("train", [["stages.train", "--params", digest, "--elastic"]], 2, 4, None),
        ("train-record", [["pipeline", "train", "--commit", digest]], 1, None, "new 0"),
        "wait for new 0",
        "wait for new 1",
    ]


def test_what_is_up_to_date_is_not_submitted(cluster, capsys):
    cluster.current = {"train"}
    on_slurm.train_on_slurm(PARAMS, SLURM, elastic=False)
    assert cluster.did == ["--wait-for-lock repro tokenize", "status --json train"]
    assert "the stage train is up to date" in capsys.readouterr().out


PREPARED = ["--wait-for-lock repro tokenize", "status --json train"]  # of the present text
RECORD_ONLY = ("train-record", [RECORD], 1, None, "7")


@pytest.mark.parametrize(
    ("training", "record", "trained", "did"),
    [
        ("running", "running", False, ["wait for 7", "wait for 8"]),
        ("running", None, False, [RECORD_ONLY, "wait for 7", "wait for new 2"]),
        ("running", "failed", False, [RECORD_ONLY, "wait for 7", "wait for new 2"]),
        ("done", "running", True, ["wait for 8"]),
        ("done", "failed", True, [*PREPARED, RECORD_ONLY, "wait for new 2"]),
        ("done", None, True, [*PREPARED, RECORD_ONLY, "wait for new 2"]),
        ("done", "failed", False, "all"),  # models/ has the result of another training
        ("done", "done", True, "all"),  # and the stage is not up to date, as after `dvc repro -f`
        ("failed", "running", False, "all"),  # Slurm will cancel the record
    ],
)
def test_what_runs_is_followed_and_only_what_is_missing_is_submitted(cluster, training, record, trained, did):
    cluster.trained = trained
    cluster.jobs = [job("6", "train", state="done"), job("7", "train", state=training)]
    if record:
        cluster.jobs.append(job("8", "train-record", [RECORD], "7", record))
    on_slurm.train_on_slurm(PARAMS, SLURM, elastic=False)
    if did == "all":
        assert [name for name, *_ in cluster.did[2:4]] == ["train", "train-record"]
    else:
        assert [str(each).replace(f"new {2 + bool(record)}", "new 2") for each in cluster.did] == list(map(str, did))


def test_a_result_that_was_recorded_by_hand_is_not_recorded_again(cluster):
    cluster.current = {"train"}
    cluster.jobs = [job("7", "train", state="done"), job("8", "train-record", [RECORD], "7", "failed")]
    on_slurm.train_on_slurm(PARAMS, SLURM, elastic=False)
    assert cluster.did == PREPARED


@pytest.mark.parametrize(("record", "did"), [("running", ["wait for 8"]), ("failed", "all")])
def test_the_shards_are_not_encoded_again_while_the_job_that_joins_them_waits(cluster, record, did):
    corpus(1)
    cluster.jobs = [job("7", "tokenize", state="done"), job("8", "tokenize-record", after="7", state=record)]
    on_slurm.tokenize_on_slurm(PARAMS, SLURM, None)
    assert cluster.did == did if did != "all" else cluster.did[2][0] == "tokenize"


def test_a_signal_while_jobs_are_submitted_leaves_both(cluster):
    cluster.during_submit = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises((Interrupted, KeyboardInterrupt)) as ended:
        on_slurm.train_on_slurm(PARAMS, SLURM, elastic=False)
    assert ended.type is Interrupted
    assert [each.name for each in cluster.jobs] == ["train", "train-record"]
    assert not any("cancel" in each for each in cluster.did)


@pytest.mark.parametrize("is_new", [True, False])
def test_without_its_record_a_new_job_is_cancelled_and_an_earlier_one_is_kept(cluster, is_new):
    cluster.jobs = [] if is_new else [job("7", "train")]
    cluster.refused = "train-record"
    with pytest.raises(InputError, match="Slurm refuses it"):
        on_slurm.train_on_slurm(PARAMS, SLURM, elastic=False)
    assert ("cancel new 0" in cluster.did) == is_new
    assert "cancel 7" not in cluster.did


@pytest.mark.parametrize(
    ("slurm", "live", "words"),
    [
        ({"gpus": 2}, None, "2 GPUs on each node, but train.processes 1: one process uses one GPU"),
        ({"nodes": 3}, None, "windows.micro_batch_size 32 is not divisible by 3 nodes x 1 processes"),
        (
            {},
            ["stages.train", "--params", "0"],
            "job 7 trains with other parameters: wait for it, or `python -m pipeline jobs --cancel 7`",
        ),
        ({}, [*TRAIN, "--elastic"], "job 7 trains with --elastic: wait for it"),
    ],
)
def test_a_training_that_cannot_work_is_refused_before_anything_happens(cluster, slurm, live, words):
    cluster.jobs = [job("7", "train", [live])] if live else []
    with pytest.raises(InputError, match=words):
        on_slurm.train_on_slurm(PARAMS, SLURM.updated(**slurm), elastic=False)
    assert cluster.did == []


def test_a_result_is_not_recorded_if_it_is_not_that_of_the_present_parameters_tokens_and_code(cluster):
    with pytest.raises(InputError, match=r"the tokens or the code have changed since this job was submitted"):
        on_slurm.commit_training(PARAMS, DIGEST)
    cluster.trained = True
    on_slurm.commit_training(PARAMS, DIGEST)
    assert cluster.did == ["--wait-for-lock commit --force train"]
    change(Path(), **{"optim.lr": 0.5})
    with pytest.raises(InputError, match=r"params.yaml has changed since this job was submitted"):
        on_slurm.commit_training(load_params(), DIGEST)


def test_a_result_belongs_to_its_parameters_and_tokens(workspace):
    config = read_config(params := load_params(), Path("data"))
    identity = identify(data_sha256(Path("data/tokens")), config.decisive, prepare_machine(config.train))
    Path("models").mkdir()
    write_json(Path("models/run.json"), {**identity, "n_params": 7, "results": {}})
    assert on_slurm._is_trained(params)
    change(Path(), **{"optim.lr": 0.5})
    assert not on_slurm._is_trained(load_params())
    Path("data/tokens/manifest.json").write_text("{}")
    assert not on_slurm._is_trained(params)
    shutil.rmtree("models")
    assert not on_slurm._is_trained(params)
