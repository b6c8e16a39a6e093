"""A run's folder and its environment, and the number of processes of a run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.params import Params, load_params
from pipeline.data.encode import write_tokens
from pipeline.data.tokenizer import make_tokenizer
from pipeline.system import distributed
from pipeline.system.distributed import ALONE, World
from pipeline.system.errors import InputError, IntegrityError
from pipeline.tracking.fingerprint import IDENTITY, Identity
from pipeline.tracking.journal import StepRecord
from pipeline.training import consumers
from pipeline.training import train as training
from pipeline.training.config import RunConfig
from pipeline.training.extension import set_aside
from pipeline.training.run import Run, claim_folder
from stages.train import main
from tests.trainings import ROOT, change


def identity(processes):
    return Identity(
        fingerprint="f", data_sha256="d", params={}, sources={}, environment={"processes": processes}, inexact=[]
    )


def test_a_folder_keeps_its_environment_until_the_run_has_resumed_or_the_folder_is_set_aside(tmp_path):
    two, one = (identity(processes) for processes in (2, 1))
    folder = tmp_path / "f"
    assert claim_folder(folder, two) == (two, [])
    assert claim_folder(folder, one) == (one, ["processes 2 -> 1"])
    assert claim_folder(folder, two) == (two, [])  # killed before it had resumed: nothing has changed
    (folder / "step-00000003").mkdir()
    assert set_aside(folder) == tmp_path / "f.1"
    assert (tmp_path / "f.1" / "step-00000003").is_dir()
    assert claim_folder(folder, one) == (one, [])
    assert [path.name for path in folder.iterdir()] == [IDENTITY]
    assert set_aside(folder) == tmp_path / "f.2"


def test_a_run_that_is_inexact_once_stays_inexact(tmp_path):
    changed = {**identity(1), "inexact": ["processes 2 -> 1 after step 7"]}
    claim_folder(tmp_path / "f", changed)
    assert claim_folder(tmp_path / "f", identity(1)) == (changed, [])
    again, what = claim_folder(tmp_path / "f", identity(2))
    assert (again["inexact"], what) == (changed["inexact"], ["processes 1 -> 2"])


def test_a_damaged_identity_of_the_run_itself_is_refused_with_the_command_that_removes_the_run(tmp_path):
    claim_folder(folder := tmp_path / "f", identity(1))
    (folder / IDENTITY).write_text("{")
    with pytest.raises(IntegrityError, match=r"identity.json is not JSON .*: `python -m pipeline clean f`$"):
        claim_folder(folder, identity(1))


def test_a_run_counts_its_own_gpu_memory(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    for name in ("_fresh_state", "_resume"):
        monkeypatch.setattr(Run, name, lambda *_: None)
    for device in ("cpu", "cuda"):
        Run(None, SimpleNamespace(world=ALONE, device=torch.device(device)), None, tmp_path, identity(1), [])
    assert calls == ["reset"]


def test_a_sample_of_a_sharded_model_is_made_on_the_cpu_in_fp32(tmp_path, monkeypatch):
    model = torch.nn.Module()
    model.wte = torch.nn.Embedding(1, 1)
    samples = SimpleNamespace(interval_steps=1, prompts=["p"], max_tokens=1)
    text = SimpleNamespace(tokenizer=None, train=SimpleNamespace(tokens=None))
    run = SimpleNamespace(
        world=ALONE, config=SimpleNamespace(samples=samples), text=text, folder=tmp_path, finished=False
    )
    run.state, precisions = SimpleNamespace(whole_model=lambda: model), []
    made = SimpleNamespace(text=lambda prompt, how: prompt)
    monkeypatch.setattr(consumers, "Generator", lambda *_, precision: precisions.append(precision) or made)
    (tmp_path / "samples").mkdir()
    for device in ("cuda", "cpu"):
        run.machine = SimpleNamespace(device=torch.device(device), precision="bf16")
        consumers.sample(run, StepRecord(1, 1, 1.0, 1.0, 1.0))
    assert precisions == ["fp32", "bf16"]


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(monkeypatch):
    params = load_params(ROOT / "params.yaml")
    params.values["windows"]["micro_batch_size"] = 5
    monkeypatch.setattr(training, "world_here", lambda: World(rank=0, size=2))
    monkeypatch.setattr(training, "n_vocab_in", lambda _: 50_257)
    with pytest.raises(InputError, match=r"^windows.micro_batch_size 5 is not divisible by the 2 processes: change"):
        training.run_tracked(params, Path("data"), Path("models"), Path("timing.json"))
    params = Params({**params.values, "train": {**params.values["train"], "processes": 2}}, params.path)
    with pytest.raises(InputError, match=r"windows.micro_batch_size 5 is not divisible by train.processes 2$"):
        training.run_tracked(params, Path("data"), Path("models"), Path("timing.json"))


def test_a_held_out_text_of_one_token_is_refused_with_its_length(tmp_path):
    (tmp_path / "corpus.txt").write_text("Speak, speak.\n" * 99 + "\n")
    tokenizer = make_tokenizer("bytes", tmp_path / "tokenizer", [])
    write_tokens(tmp_path / "corpus.txt", tokenizer, tmp_path / "tokens", val_fraction=1e-6)
    params = load_params(ROOT / "params.yaml")
    params.values["target"]["rule"] = "validation"
    config, machine = RunConfig.of(params).sized_for(tokenizer.n_vocab), SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"the held-out text has 1 tokens, needs 2: raise corpus\.val_fraction$"):
        training.read_data(config, machine, tmp_path)


def test_the_stage_launches_its_processes_and_exits_with_their_code(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    change(tmp_path, **{"train.processes": 2})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--elastic"])
    launched = []
    monkeypatch.setattr(distributed, "launch", lambda *arguments: launched.append(arguments) or 7)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert (exit_.value.code, launched) == (7, [(2, "stages.train", ["--elastic"])])
