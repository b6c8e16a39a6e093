"""The estimated bytes of memory and disk against the real ones, and the refusal of a run that does not fit."""

from dataclasses import replace
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig
from pipeline.data.batches import Split, steps_of
from pipeline.data.token_files import Tokens
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.model.loss import CACHED_LOGITS
from pipeline.model.weights import save_model
from pipeline.system.device import Machine
from pipeline.system.distributed import World
from pipeline.system.errors import OutOfSpaceError
from pipeline.training import preflight
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.config import RunConfig
from pipeline.training.loop import fresh_state, train_steps
from pipeline.training.preflight import (
    at_most_kept,
    check_disk,
    check_fits,
    device_bytes,
    kept_bytes,
    saved_bytes,
    step_bytes,
)

SHAPE = ModelConfig(n_layer=3, n_head=2, n_embd=64, block_size=32, vocab_size=50257, dropout=0.0, fold_vocab=True)
VOCABULARY = Vocabulary.of(np.arange(50257) < 500, 50257)
MACHINE = Machine(torch.device("cpu"), "fp32", 1)


def settings(batch=4, kind="adamw", gradient_checkpointing=False):
    whole = RunConfig.of(load_params())
    config = replace(
        whole,
        model=SHAPE,
        windows=whole.windows.updated(seq_len=32, micro_batch_size=batch),
        optim=whole.optim.updated(name=kind),
        train=whole.train.updated(gradient_checkpointing=gradient_checkpointing),
    )
    return config, VOCABULARY, MACHINE


def test_the_estimate_equals_the_bytes_that_a_real_forward_pass_keeps():
    model, ids = GPT(SHAPE, VOCABULARY).initialise(1), torch.zeros(4, 32, dtype=torch.int64)
    storages = {}
    with saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        loss = model.loss(ids, ids, 128)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = sum(tensor.untyped_storage().nbytes() for place, tensor in storages.items() if place not in own)
    assert loss.requires_grad
    weights = sum(p.numel() * 4 for p in model.parameters())
    logits = (4 + 12) * 4 * 32 * VOCABULARY.n_rows  # fp32, and three arrays of the softmax
    assert step_bytes(*settings(), evaluated_tokens=1) == pytest.approx(4 * weights + kept + logits, rel=0.01)


def test_memory_grows_with_the_batch_and_shrinks_with_gradient_checkpointing_and_muon():
    plain = step_bytes(*settings(batch=64))
    assert step_bytes(*settings(batch=128), 1) > 1.5 * step_bytes(*settings(batch=64), 1)  # without the evaluation
    assert step_bytes(*settings(batch=64, gradient_checkpointing=True)) < plain
    assert step_bytes(*settings(batch=64, kind="muon")) < plain


def test_on_a_cpu_the_bytes_of_an_evaluation_are_added_to_those_of_a_step():
    config, _, machine = settings(batch=1)
    folded, full = (step_bytes(config, v, machine) for v in (VOCABULARY, Vocabulary.full(50257)))
    evaluation, weights, step = (n * (50257 - VOCABULARY.n_rows) for n in (8 * 8192, 5 * 4 * 64, 4 * 32))
    softmax = 12 * (CACHED_LOGITS - 32 * VOCABULARY.n_rows)  # it reads at most CACHED_LOGITS at a time
    assert full - folded == evaluation + weights + step + softmax
    short, long = (step_bytes(config, VOCABULARY, machine, n) for n in (100, 10**9))  # tokens of an evaluation's batch
    assert (long, folded - short) == (folded, 8 * (8192 - 100) * VOCABULARY.n_rows)


def test_a_batch_that_does_not_fit_is_refused_with_the_bytes_it_needs(monkeypatch):  # A14
    with pytest.raises(
        OutOfSpaceError, match=r"windows\.micro_batch_size 1000000000 of windows\.seq_len 32 needs [\d,.]+ GB"
    ) as error:
        check_fits(*settings(batch=10**9))
    assert "windows.gradient_accumulation_steps" in str(error.value)
    assert error.value.exit_code == 5
    monkeypatch.setattr(preflight, "free_bytes", lambda machine: step_bytes(*settings()))
    check_fits(*settings())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_bound_of_the_kept_bytes_is_above_them_for_each_kind_of_attention(
    precision, dropout, gradient_checkpointing
):
    machine = Machine(torch.device("cpu"), precision, 1)
    for n_layer, n_head, n_embd, length, batch in [(1, 4, 12, 8, 16), (3, 4, 12, 600, 4), (2, 1, 128, 600, 1)]:
        config, vocabulary, _ = settings(batch, gradient_checkpointing=gradient_checkpointing)
        shape = config.model.updated(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=length, dropout=dropout)
        config = replace(config, model=shape, windows=config.windows.updated(seq_len=length))
        assert kept_bytes(config, vocabulary, machine) <= at_most_kept(config, vocabulary, machine)


def test_a_run_far_below_the_free_memory_is_checked_without_fake_tensors(monkeypatch):
    monkeypatch.setattr(preflight, "kept_bytes", lambda *_: pytest.fail("they import torch's compiler"))
    monkeypatch.setattr(preflight, "free_bytes", lambda machine: 10**10)
    check_fits(*settings())


def test_a_refusal_never_names_as_many_bytes_free_as_needed(monkeypatch):
    monkeypatch.setattr(preflight, "step_bytes", lambda *_, **__: 704_000_000)
    monkeypatch.setattr(preflight, "free_bytes", lambda machine: 703_000_000)
    with pytest.raises(OutOfSpaceError, match=r"needs 0\.8 GB of memory, 0\.7 GB are free"):
        check_fits(*settings())


def test_processes_share_the_memory_of_a_cpu_and_each_has_a_gpu_of_its_own():
    machines = [Machine(torch.device(name), "fp32", 1, world=World(0, 2, 0, 2)) for name in ("cpu", "cuda")]
    assert [device_bytes(7, machine) for machine in machines] == [14, 7]


# The disk


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_and_a_model_are_at_most_as_large_as_estimated_and_not_much_smaller(tmp_path, bpe, kind):  # A7
    config, *_ = settings(kind=kind)
    text = Split(Tokens("text", [np.arange(200, dtype=np.uint16)], 50257), VOCABULARY, MACHINE.device)
    state = fresh_state(config.model, VOCABULARY, config.optim, config.train, MACHINE)
    next(train_steps(state, steps_of(1, text, config.windows, 1), 1, config.optim, MACHINE))
    checkpoint = bytes_in(save_checkpoint(tmp_path, 1, state.tensors(), state.scalars()))
    save_model(tmp_path / "model", state.model, bpe)
    estimate, model = saved_bytes(config, VOCABULARY)
    assert checkpoint <= estimate < 1.03 * checkpoint  # closer for a larger model, whose headers are not larger
    assert bytes_in(tmp_path / "model") <= model < 1.01 * bytes_in(tmp_path / "model")


def test_each_process_adds_its_rng_state_to_a_checkpoint():
    config, *_ = settings()
    alone, four = (saved_bytes(config, VOCABULARY, processes)[0] for processes in (1, 4))
    assert four - alone >= 3 * torch.get_rng_state().numel()


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A run's folder, the bytes of one of its checkpoints, and the free bytes of the disk, which a test sets."""
    disk = Namespace(run=tmp_path / "checkpoints" / "run", free=0)
    disk.checkpoint, _ = saved_bytes(settings()[0], VOCABULARY)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: disk)
    return disk


def require_exactly(needed, disk):
    """Fail unless a run needs exactly this many free bytes."""
    disk.free = needed
    check_disk(*settings(), disk.run)
    disk.free = needed - 1
    place = disk.run.parents[1]
    said = f"the run may need {needed:,} bytes of disk in {place}.*, {needed - 1:,} bytes are free: make room there"
    with pytest.raises(OutOfSpaceError, match=said) as error:
        check_disk(*settings(), disk.run)
    assert error.value.exit_code == 5


def test_a_disk_needs_room_for_four_checkpoints_minus_those_that_the_run_holds(disk):  # A7
    require_exactly(4 * disk.checkpoint, disk)
    assert (
        preflight.n_checkpoints(settings()[0].optim.updated(schedule="wsd")) == 6
    )  # the last and the best before the decay
    held = 0
    for name in ("step-00000007", "step-00000014", ".unfinished-step-00000021"):  # the last is removed at the resume
        (disk.run / name).mkdir(parents=True)
        with (disk.run / name / "weights.safetensors").open("wb") as file:
            held += file.truncate(disk.checkpoint - 5)
    require_exactly(4 * disk.checkpoint - held, disk)
    (disk.run / "step-00000021").mkdir()
    (disk.run / "step-00000021" / "weights.safetensors").open("wb").truncate(disk.checkpoint + 15)
    disk.free = 0
    check_disk(*settings(), disk.run)
