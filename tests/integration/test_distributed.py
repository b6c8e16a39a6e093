"""Several processes train as one does: the same losses, records and files, and the same bits after whatever happens."""

import json
import os
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import torch

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig, OptimConfig, TrainConfig, WindowsConfig
from pipeline.data.batches import Split, steps_of
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.model import evaluate
from pipeline.model.evaluate import corpus_loss
from pipeline.system.device import prepare_machine
from pipeline.system.distributed import ALONE, joined, launch, world_here
from pipeline.system.entrypoint import RANK_0_REPORTS_WITHIN_S, exit_code_of
from pipeline.system.errors import DivergedError, InputError, PeerLost
from pipeline.system.files import read_json, sha256_file
from pipeline.tracking.fingerprint import IDENTITY, Identity
from pipeline.tracking.journal import read_steps
from pipeline.training.checkpoint import checkpoint_steps
from pipeline.training.loop import fresh_state, train_steps
from pipeline.training.run import claim_folder
from tests.integration.test_run import change, prepared, run_folder, workspace  # noqa: F401 (fixtures)
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
IDS = np.random.default_rng(1).integers(0, 32, 300).astype(np.uint16)  # 32 symbols of 40: eight ids are folded into one
VOCABULARY = Vocabulary(np.arange(32), 40)
ROWS = Split(Tokens("text", [IDS], 40), VOCABULARY, torch.device("cpu"))
WINDOWS = WindowsConfig(seq_len=8, micro_batch_size=4, gradient_accumulation_steps=2, order="shuffled")
SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50257, dropout=0.0, fold_vocab=True)


def torchrun(processes, *command, restarts=0):
    """Start processes that meet; what they print is one stream."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run += ["--max-restarts", str(restarts)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DVC_STAGE": "test"}
    return subprocess.Popen(
        [*run, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


class Loop:
    """A tiny run of this process's world."""

    def __init__(self, world, name="adamw", shard=False, dropout=0.0, steps=9):
        params = load_params(ROOT / "params.yaml")
        self.optim = params.section(OptimConfig).updated(
            name=name, lr=0.01, warmup=0, max_grad_norm=0.5, weight_decay=0.1
        )
        train = params.section(TrainConfig).updated(precision="fp32", device="cpu", threads=1, shard=shard)
        self.machine, self.steps = prepare_machine(train, world=world), steps
        self.state = fresh_state(SHAPE.updated(dropout=dropout), VOCABULARY, self.optim, train, self.machine)

    def __iter__(self):
        batches = steps_of(self.state.step + 1, ROWS, WINDOWS, 1, self.machine.world)
        return train_steps(self.state, batches, self.steps, self.optim, self.machine)

    def numbers(self):
        return [[record.tokens, record.loss, record.grad_norm] for record in self]

    def corpus_loss(self):
        self.state.model.eval()
        with patch.object(evaluate, "BATCH_TOKENS", 64):  # five batches, of which two processes have unequal shares
            return corpus_loss(self.state.model, ROWS, 8, self.machine.autocast(), world=self.machine.world)


def in_a_world(folder):
    """What `torchrun` runs: each process leaves what it found in a file of its own."""
    world, found = world_here(), {}
    with joined(world):
        for name, options in KINDS.items():
            loop = Loop(world, **options)
            found[name] = {"steps": loop.numbers(), "corpus_loss": loop.corpus_loss()}
            if whole := loop.state.whole_model():
                torch.save({k: v.clone() for k, v in whole.state_dict().items()}, Path(folder) / f"{name}-{world.rank}")
            found[name]["same_after_restore"] = restored_equals(world, {**options, "dropout": 0.2})
        found["draw"] = torch.rand(1).item()
        found["share"] = world.share(list(range(6)))
        found["largest"] = world.largest(world.rank, 5 - world.rank)
        found["from_main"] = world.on_main(lambda: ["only rank", world.rank])
        try:
            world.on_main(fail)
        except InputError as error:
            found["failure"] = str(error)
        print("heard of rank 0 alone")
    (Path(folder) / f"found-{world.rank}.json").write_text(json.dumps(found))


def fail():
    raise InputError("what rank 0 met")


def restored_equals(world, options):
    """Whether a state that is restored after four steps continues with the same bits."""
    straight = Loop(world, **options).numbers()
    interrupted, resumed = Loop(world, **options), Loop(world, **options)
    list(islice(interrupted, 4))
    tensors = {stem: {k: v.clone() for k, v in group.items()} for stem, group in interrupted.state.tensors().items()}
    torch.distributed.broadcast_object_list(kept := [tensors])  # as all of them read one checkpoint
    resumed.state.restore(kept[0], interrupted.state.scalars())
    return resumed.numbers() == straight[4:]


KINDS = {"muon": {"name": "muon"}, "adamw": {}, "sharded": {"shard": True}}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """What two processes found, each."""
    folder = tmp_path_factory.mktemp("world")
    program = "import sys; from tests.integration.test_distributed import in_a_world; in_a_world(sys.argv[1])"
    (folder / "program.py").write_text(program)
    process = torchrun(2, str(folder / "program.py"), str(folder))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder, output, [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_take_the_steps_that_one_takes(worlds, name):
    folder, _, found = worlds
    alone = Loop(ALONE, **KINDS[name])
    for one, two in zip(alone.numbers(), found[0][name]["steps"], strict=True):
        assert two == pytest.approx(one, rel=2e-5)  # sums in fp32, in another order
    two = torch.load(folder / f"{name}-0", weights_only=True)
    for key, weight in alone.state.model.state_dict().items():
        assert torch.allclose(two[key], weight, atol=2e-3), key  # AdamW's first steps are signs of gradients near zero
    assert found[0][name] == found[1][name]  # and both know the same of them


@pytest.mark.parametrize("name", KINDS)
def test_the_text_is_measured_by_all_processes_as_by_one(worlds, name):
    folder, _, found = worlds
    alone = Loop(ALONE, **KINDS[name])
    alone.state.model.load_state_dict(torch.load(folder / f"{name}-0", weights_only=True))
    assert found[0][name]["corpus_loss"] == alone.corpus_loss()  # the same bits: each batch is summed by itself


@pytest.mark.fault
@pytest.mark.parametrize("name", KINDS)
def test_what_all_processes_saved_is_resumed_with_the_same_bits_in_each(worlds, name):
    assert all(found[name]["same_after_restore"] for found in worlds[2])  # with dropout, of which each draws its own


def test_a_world_shares_agrees_and_fails_together(worlds):
    _, output, (first, second) = worlds
    assert first["draw"] != second["draw"]  # of dropout
    assert (first["share"], second["share"]) == ([0, 1, 2], [3, 4, 5])
    assert first["largest"] == second["largest"] == [1, 5]
    assert first["from_main"] == second["from_main"] == ["only rank", 0]
    assert first["failure"] == second["failure"] == "what rank 0 met"
    assert output.count("heard of rank 0 alone") == 1


def test_a_process_alone_is_a_world_in_which_all_of_this_does_nothing():
    with joined(world_here()):
        assert world_here() == ALONE
        assert ALONE.share([1, 2]) == [1, 2]
        assert ALONE.largest(3, 4) == [3, 4]
        assert ALONE.on_main(lambda: 5) == 5
        assert ALONE.all_gather(torch.ones(2))[0].sum() == ALONE.add(torch.ones(2)).sum() == 2


WATCHED = """
import os, time
from pipeline.system.distributed import joined, world_here
with joined(world := world_here()):
    print("joined", flush=True)
    if world.rank == 1:
        os._exit(9)
    time.sleep(600)  # stands still, as a GPU does that waits for the other one
"""


@pytest.mark.fault
def test_a_process_that_waits_for_a_dead_one_ends_by_itself(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WATCHED],
            env={
                **os.environ,
                **place,
                "PYTHONPATH": str(ROOT),
                "TORCHELASTIC_RUN_ID": "x",
                "RANK": r,
                "LOCAL_RANK": r,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in "01"
    ]
    assert both[0].stdout.readline() == "joined\n"
    both[1].communicate(timeout=120)
    gone = time.monotonic()
    _, said = both[0].communicate(timeout=120)
    assert time.monotonic() - gone < 5
    assert both[0].returncode == PeerLost.exit_code
    assert f"error: rank 1, process {both[1].pid}, has died: run the same command again to resume" in said


# --- whole runs ------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pipeline.training import train as tracked
from pipeline.system.entrypoint import run_stage
from stages.train import main
from tests.integration.test_run import Untracked

tracked.Recorder = Untracked
run_stage(main)
"""


def start(*arguments, processes=3, restarts=0):
    Path("program.py").write_text(PROGRAM)
    return torchrun(processes, "program.py", *arguments, restarts=restarts)


def finish(process, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def alone(*arguments):
    Path("program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "program.py", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def rows():
    return sum(path.read_text().count("\n") for path in Path("checkpoints").glob("*/times.jsonl"))


def wait_for_rows(process, n, deadline_s=300):
    enough = wait_until(lambda: rows() >= n or process.poll() is not None, deadline_s)
    assert enough, f"{rows()} steps in {deadline_s} s"
    assert process.poll() is None, process.communicate()[0]


def ranks(process):
    """The training processes below torchrun, by rank."""
    children = [p for p in psutil.Process(process.pid).children() if "program.py" in p.cmdline()]
    return sorted(children, key=lambda p: int(p.environ()["RANK"]))


def bits():
    last = max(run_folder().glob("step-*"))
    paths = [Path("models/model/model.safetensors"), Path("models/steps.jsonl"), *sorted(last.glob("*.safetensors"))]
    return {path.name: sha256_file(path) for path in paths}


@pytest.mark.fault
@pytest.mark.slow
def test_a_job_that_is_stopped_or_loses_a_rank_ends_at_once_and_is_resumed_with_the_same_bits(workspace):  # noqa: F811
    # A18; three processes, whose sums depend on their order as those of two do not
    change(Path(), **{"windows.micro_batch_size": 6, "optim.max_tokens": 6 * 64 * 60})
    code, output = finish(start())
    assert code == 0, output
    straight = bits()
    assert read_json(Path("models/run.json"))["environment"]["processes"] == 3
    for path in (Path("checkpoints"), Path("models")):
        path.rename(f"{path}.straight")

    job = start()
    wait_for_rows(job, 5)
    job.terminate()
    began = time.monotonic()
    code, output = finish(job)
    assert time.monotonic() - began < 15  # a loaded machine's; what a step, a save and two exits take is a part of it
    assert code != 0
    assert "error: SIGTERM at step" in output
    assert checkpoint_steps(run_folder())[0] == rows() < 60  # the last step is saved

    job = start()
    wait_for_rows(job, rows() + 5)
    processes = ranks(job)
    processes[1].kill()
    began = time.monotonic()
    code, output = finish(job)
    assert time.monotonic() - began < 5
    assert code != 0
    assert not [p for p in processes if p.is_running()]

    job = start(restarts=1)
    wait_for_rows(job, rows() + 5)
    ranks(job)[0].kill()
    code, output = finish(job)
    assert code == 0, output
    assert output.count("resumes from step") == 2  # and it did so by itself the second time
    assert bits() == straight


@pytest.mark.fault
@pytest.mark.slow
def test_fewer_processes_resume_only_when_told_to_and_the_run_says_so(workspace):  # noqa: F811
    job = start(processes=2)
    wait_for_rows(job, 10)
    ranks(job)[1].kill()
    finish(job)
    saved = checkpoint_steps(run_folder())[0]
    begun = run_folder()

    code, said, _ = alone("--elastic")
    assert code == 0
    assert f"not exact from here on: processes 2 -> 1 after step {saved}" in said
    assert f"resumes from step {saved} of 24" in said
    assert run_folder() == begun
    record = read_json(Path("models/run.json"))
    assert record["inexact"] == [f"processes 2 -> 1 after step {saved}"]
    assert record["environment"]["processes"] == 1
    assert read_steps(Path("models/steps.jsonl")).index.tolist() == list(range(1, 25))

    code, said, _ = alone()  # the run is finished, and the same in the set-up that finished it
    assert "nothing to train" in said
    assert read_json(Path("models/run.json"))["inexact"] == record["inexact"]


def test_another_set_up_takes_over_a_folder_only_where_the_run_is_elastic(tmp_path, capsys):
    two, one = (identity(processes) for processes in (2, 1))
    folder = tmp_path / "f"
    assert claim_folder(folder, two) == (two, [])
    assert claim_folder(folder, one, elastic=True) == (one, ["processes 2 -> 1"])
    (folder / "step-00000003").mkdir()
    assert claim_folder(folder, two) == (two, [])
    assert (
        "environment changed (processes 1 -> 2): starting from step 0. Old checkpoints are in"
        in capsys.readouterr().out
    )
    assert (tmp_path / "f.1" / "step-00000003").is_dir()
    assert [path.name for path in folder.iterdir()] == [IDENTITY]


def test_a_run_that_was_changed_once_is_inexact_for_good(tmp_path):
    changed = {**identity(1), "inexact": ["processes 2 -> 1 after step 7"]}
    claim_folder(tmp_path / "f", changed)
    assert claim_folder(tmp_path / "f", identity(1)) == (changed, [])
    again, what = claim_folder(tmp_path / "f", identity(2), elastic=True)
    assert (again["inexact"], what) == (changed["inexact"], ["processes 1 -> 2"])


def identity(processes):
    return Identity(
        fingerprint="f", data_sha256="d", params={}, sources={}, environment={"processes": processes}, inexact=[]
    )


def test_a_world_that_does_not_divide_the_batch_is_refused_in_one_line(workspace, monkeypatch):  # noqa: F811
    change(Path(), **{"windows.micro_batch_size": 5, "train.processes": 2})
    code, _, said = alone()
    assert code == 2
    assert said == "error: params.yaml: train.processes 2 do not divide windows.micro_batch_size 5 evenly\n"
    change(Path(), **{"train.processes": 1})
    code, said = finish(start(processes=2))
    assert code != 0
    assert said.count("error: 2 processes do not divide windows.micro_batch_size 5 evenly: change one of them\n") == 1
    assert not Path("checkpoints").exists()


ALIKE = """
import os, time
from pipeline.system.errors import InputError
from pipeline.system.entrypoint import run_stage

def main():
    if os.environ["RANK"] == "0":
        time.sleep(1)  # so that the other is first
    raise InputError("rank " + os.environ["RANK"])

run_stage(main)
"""


def test_what_all_meet_is_said_by_rank_0_though_another_is_first(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    (tmp_path / "alike.py").write_text(ALIKE)
    assert launch(2, "alike", []) == InputError.exit_code
    assert capfd.readouterr().err == "error: rank 0\n"


def test_what_another_rank_alone_meets_is_said_in_the_end(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")

    def fails():
        raise InputError("params.yaml: gone")

    assert exit_code_of(fails) == 2
    assert capsys.readouterr().err == "error: params.yaml: gone\n"
    assert waited == [RANK_0_REPORTS_WITHIN_S]


@pytest.mark.slow
def test_the_stage_starts_its_processes_itself_and_ends_with_their_code(workspace):  # noqa: F811
    change(Path(), **{"train.processes": 2, "optim.max_tokens": 1024, "optim.lr": 1e30})
    code, _, said = alone()
    assert code == DivergedError.exit_code
    assert said.count("error: ") == 1
    assert "is nan at step" in said or "is inf at step" in said


def test_what_a_launched_process_exits_with_is_the_jobs_code(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "ends.py").write_text(
        "import os, sys\nif sys.argv[1] == 'die':\n    os.kill(os.getpid(), 9)\nsys.exit(int(sys.argv[1]))"
    )
    assert launch(2, "ends", ["0"]) == 0
    assert launch(2, "ends", ["7"]) == 7
    with pytest.raises(PeerLost, match=r"^SIGKILL ended rank [01]: run the same command again to resume$"):
        launch(2, "ends", ["die"])
