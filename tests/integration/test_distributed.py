"""Two processes compute the steps and the losses that one computes, and fail together."""

import json
import os
import time
from itertools import islice
from unittest.mock import patch

import numpy as np
import pytest
import torch

from pipeline.data.batches import Split, sliding_windows
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.model import evaluate
from pipeline.model.evaluate import text_loss
from pipeline.model.fsdp import is_shard
from pipeline.system.distributed import ALONE, joined, launch, world_here
from pipeline.system.entrypoint import RANK_0_REPORTS_WITHIN_S, exit_code_of
from pipeline.system.errors import InputError, PeerLost
from pipeline.training import loop as loop_module
from tests.trainings import ROOT, end, output_of, start_world
from tests.unit.training.test_loop import MODEL, Loop

IDS = np.random.default_rng(1).integers(0, 32, 300).astype(np.uint16)  # of 40 ids 32 occur: eight share one row
TEXT = Split(Tokens("text", [IDS], 40), Vocabulary(np.arange(32), 40), torch.device("cpu"))
SHAPE = MODEL.updated(n_layer=2)
KINDS = {"muon": {"name": "muon"}, "adamw": {}, "sharded": {"shard": True}}


def a_loop(world, name="adamw", shard=False, dropout=0.0):
    shape = SHAPE.updated(dropout=dropout)
    optim = {"name": name, "max_grad_norm": 0.5, "weight_decay": 0.1}
    with patch.object(torch._C, "_get_accelerator", lambda *_: torch.device("mps")):  # the machine has a GPU
        return Loop(9, 4, 2, TEXT, world, shape, where={"shard": shard}, **optim)


def numbers(loop):
    return [[record.tokens, record.loss, record.grad_norm] for record in loop]


def loss_on_the_text(loop):
    loop.state.model.eval()
    with patch.object(evaluate, "BATCH_TOKENS", 64):  # five batches: two processes get unequal numbers of them
        return text_loss(
            loop.state.model, TEXT, sliding_windows(TEXT.size, 8), 8, loop.machine.autocast(), loop.machine.world
        )


def in_a_world(folder):
    """Runs in each process, which writes its results to a file of its own."""
    world, found = world_here(), {}
    with joined(world):
        for name, options in KINDS.items():
            loop = a_loop(world, **options)
            found[name] = {"steps": numbers(loop), "text_loss": loss_on_the_text(loop)}
            if whole := loop.state.whole_model():
                torch.save({k: v.clone() for k, v in whole.state_dict().items()}, folder / f"{name}-{world.rank}")
            found[name]["same_after_restore"] = restored_equals(world, {**options, "dropout": 0.2})
        found["shards"] = gradients_are_shards(a_loop(world, **KINDS["sharded"]).state)
        found["random"] = torch.rand(1).item()
        found["share"] = world.share(list(range(6)))
        found["largest"] = world.largest(world.rank, 5 - world.rank)
        found["from_main"] = world.on_main(lambda: ["only rank", world.rank])
        try:
            world.on_main(fail)
        except InputError as error:
            found["failure"] = str(error)
        print("printed by rank 0 only")
    (folder / f"found-{world.rank}.json").write_text(json.dumps(found))


def gradients_are_shards(state):
    """Whether a process has only its share of the gradients before the last batch of a step."""
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with loop_module._exchange(state, last=False):
        state.loss(ids, ids, 16).backward()
    return all(is_shard(parameter.grad) for parameter in state.model.parameters())


def fail():
    raise InputError("the error of rank 0")


def restored_equals(world, options):
    """Whether a state that is restored after four of nine steps continues with the same bits."""
    straight = numbers(a_loop(world, **options))
    interrupted, resumed = a_loop(world, **options), a_loop(world, **options)
    list(islice(interrupted, 4))
    tensors = {stem: {k: v.clone() for k, v in group.items()} for stem, group in interrupted.state.tensors().items()}
    torch.distributed.broadcast_object_list(kept := [tensors])  # all processes load the same checkpoint
    resumed.state.restore(kept[0], interrupted.state.scalars())
    return numbers(resumed) == straight[4:]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder, the outputs and the results of two processes."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        processes = start_world(2, in_a_world, folder)
        codes, outputs = [end(process) for process in processes], [output_of(process) for process in processes]
    assert codes == [0, 0], outputs
    return folder, outputs, [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_compute_what_one_computes_and_are_resumed_with_the_same_bits(two, name):
    folder, _, (first, second) = two
    alone = a_loop(ALONE, **KINDS[name])
    for one, both in zip(numbers(alone), first[name]["steps"], strict=True):
        assert both == pytest.approx(one, rel=2e-5)  # sums in fp32, in another order
    weights = torch.load(folder / f"{name}-0", weights_only=True)
    for key, weight in alone.state.model.state_dict().items():
        assert torch.allclose(weights[key], weight, atol=2e-3), key  # AdamW's first steps are signs of tiny gradients
    alone.state.model.load_state_dict(weights)
    assert first[name]["text_loss"] == list(loss_on_the_text(alone))  # the same bits: each batch is summed by itself
    assert first[name] == second[name]
    assert first[name]["same_after_restore"]  # with dropout, for which each process has its own RNG


def test_a_world_shares_agrees_and_fails_together(two):
    _, outputs, (first, second) = two
    assert first["random"] != second["random"]
    assert (first["share"], second["share"]) == ([0, 1, 2], [3, 4, 5])
    assert first["largest"] == second["largest"] == [1, 5]
    assert first["from_main"] == second["from_main"] == ["only rank", 0]
    assert first["shards"]
    assert first["failure"] == second["failure"] == "the error of rank 0"
    assert ["printed by rank 0 only" in output for output in outputs] == [True, False]


FAILING = """
import os, time
from pipeline.system.errors import InputError
from pipeline.system.entrypoint import run_stage

def main():
    if os.environ["RANK"] == "0":
        time.sleep(1)  # so that rank 1 fails first
    raise InputError("rank " + os.environ["RANK"])

run_stage(main)
"""


def test_an_error_of_all_processes_is_printed_by_rank_0_only(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    (tmp_path / "failing.py").write_text(FAILING)
    assert launch(2, "failing", []) == InputError.exit_code
    assert capfd.readouterr().err == "error: rank 0\n"


def test_an_error_of_another_process_is_printed_after_a_delay(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")

    def fails():
        raise InputError("params.yaml: gone")

    assert exit_code_of(fails) == 2
    assert capsys.readouterr().err == "error: params.yaml: gone\n"
    assert waited == [RANK_0_REPORTS_WITHIN_S]


def test_launch_returns_the_exit_code_of_the_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "ends.py").write_text(
        "import os, sys\nif sys.argv[1] == 'die':\n    os.kill(os.getpid(), 9)\nsys.exit(int(sys.argv[1]))"
    )
    assert launch(2, "ends", ["0"]) == 0
    assert launch(2, "ends", ["7"]) == 7
    with pytest.raises(PeerLost, match=r"^SIGKILL ended rank [01]: run the same command again to resume$"):
        launch(2, "ends", ["die"])
