"""Estimate the memory and disk space that a run needs, and refuse a run that does not fit."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipeline.config.sections import OptimConfig, WindowsConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.evaluate import BATCH_TOKENS
from pipeline.model.gpt import GPT
from pipeline.model.loss import CACHED_LOGITS, CHUNK_LOGITS
from pipeline.system.device import Machine
from pipeline.system.errors import OutOfSpaceError
from pipeline.system.limits import free_memory_bytes
from pipeline.training.config import RunConfig
from pipeline.training.optim import SCHEDULES, build_optimizers, state_slots

ENTRY_BYTES = 256  # upper bound for a tensor's entry in a file header
RANDOM_BYTES = 6_000  # RNG state of one process, manifest and state.json
TOKENIZER_BYTES = 1_500_000  # the tokenizer's files in a model's folder


def check_fits(config: RunConfig, vocabulary: Vocabulary, machine: Machine) -> None:
    """Raise OutOfSpaceError if a step needs more memory than is free."""
    windows, free = config.windows, free_bytes(machine)
    for activation_bytes in (at_most_kept, kept_bytes):  # the second takes seconds: only if need be
        needed = device_bytes(step_bytes(config, vocabulary, machine, activation_bytes=activation_bytes), machine)
        if needed <= free:
            return
    needed_gb, free_gb = math.ceil(needed / 1e8) / 10, math.floor(free / 1e8) / 10  # never equal
    raise OutOfSpaceError(
        f"windows.micro_batch_size {windows.micro_batch_size} of windows.seq_len {windows.seq_len} needs "
        f"{needed_gb:,.1f} GB of memory, {free_gb:,.1f} GB are free: make windows.micro_batch_size smaller and "
        "windows.gradient_accumulation_steps larger, or set train.gradient_checkpointing"
    )


def device_bytes(process_bytes: int, machine: Machine) -> int:
    """Memory of all processes on a device, from that of one: those of this machine share a CPU, and none a GPU."""
    return process_bytes * (machine.world.local_size if machine.device.type == "cpu" else 1)


def kept_bytes(config: RunConfig, vocabulary: Vocabulary, machine: Machine) -> int:
    """Bytes of activations that a forward pass of one process keeps for the backward pass, computed without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler, in two seconds

    windows = config.windows.updated(micro_batch_size=config.windows.micro_batch_size // machine.world.size)
    with FakeTensorMode(), torch.device(machine.device):
        model = GPT(config.model, vocabulary).freeze(config.train.freeze)
        activations = _kept_by(model, windows, machine)
        if config.train.gradient_checkpointing:
            model.gradient_checkpointing = True
            one_layer = activations // (config.model.n_layer - config.train.freeze)  # recomputed in the backward pass
            activations = one_layer + _kept_by(model, windows, machine)
    return activations


def at_most_kept(config: RunConfig, vocabulary: Vocabulary, machine: Machine) -> int:
    """An upper bound for `kept_bytes`, often several times as high, that takes no time.

    A token has at most 32 vectors of C numbers in a layer, and four rows of attention scores for each head. The loss
    keeps the gradient of the embeddings; in bf16, the weights are kept in bf16, too.
    """
    shape, windows = config.model, config.windows
    tokens = windows.micro_batch_size // machine.world.size * windows.seq_len
    vectors = 32 * shape.n_embd + 4 * shape.n_head * windows.seq_len  # numbers per token and layer
    numbers = tokens * (shape.n_layer * vectors + 8 * shape.n_embd + 16) + vocabulary.n_rows * shape.n_embd
    return 4 * numbers + 2 * shape.n_params


def step_bytes(
    config: RunConfig,
    vocabulary: Vocabulary,
    machine: Machine,
    evaluated_tokens: int = BATCH_TOKENS,
    activation_bytes: Callable[[RunConfig, Vocabulary, Machine], int] = kept_bytes,
) -> int:
    """Bytes of weights, gradients, optimiser state, activations and logits, for one process of the machine's world.

    A process has its share of the batch. If the model is sharded it has its share of the weights, gradients and
    optimiser state, plus the blocks that FSDP2 unshards at one time. `evaluated_tokens`: in a forward pass of an
    evaluation, at most BATCH_TOKENS; fewer in a short text.
    """
    batch, windows = config.windows.micro_batch_size // machine.world.size, config.windows
    with torch.device("meta"):  # tensors without data
        model = GPT(config.model, vocabulary).freeze(config.train.freeze)
        weights, state = _trained_bytes(model, config.optim)
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    n_logits = min(CHUNK_LOGITS, batch * windows.seq_len * vocabulary.n_rows)
    if machine.device.type == "cpu":
        logits = n_logits * (4 if machine.precision == "fp32" else 2)
        logits += 12 * min(CACHED_LOGITS, n_logits)  # the fp32 arrays of a softmax
    else:
        logits = n_logits * 10  # bf16 or fp16, and fp32 before and after the softmax
    step = activation_bytes(config, vocabulary, machine) + logits
    evaluation = 8 * min(BATCH_TOKENS, evaluated_tokens) * vocabulary.n_rows  # fp32, before and after the softmax
    held = weights + gradients + sum(state)
    if config.train.shard and machine.world.size > 1:
        block = sum(p.numel() * p.element_size() for p in model.h[0].parameters())
        outside = weights - config.model.n_layer * block
        held = held // machine.world.size + 2 * (outside + 2 * block)  # two blocks, with gradients
    if machine.device.type == "cpu":  # freed memory is not returned to the system
        return held + step + evaluation
    return held + max(step, evaluation)


def check_disk(config: RunConfig, vocabulary: Vocabulary, machine: Machine, checkpoints: Path) -> None:
    """Raise OutOfSpaceError if the disk has no room for the run's checkpoints, minus those that it already has.

    The final model is not counted: when it is written there is one checkpoint less.
    """
    checkpoint, _ = saved_bytes(config, vocabulary, machine.world.size)
    held = sum(path.stat().st_size for path in checkpoints.glob("*/*.safetensors"))  # unfinished ones will be removed
    needed = n_checkpoints(config.optim) * checkpoint - held
    place = next(path for path in checkpoints.absolute().parents if path.exists())
    if needed > (free := shutil.disk_usage(place).free):
        raise OutOfSpaceError(
            f"the run may need {needed:,} bytes of disk in {place}, {free:,} bytes are free: make room there "
            "(`python -m pipeline clean` removes old checkpoints) and run the same command again"
        )


def n_checkpoints(optim: OptimConfig) -> int:
    """Checkpoints at once: the newest two, the best, the one being written; before a decay the last and the best."""
    return 4 + 2 * SCHEDULES[optim.schedule].has_plateau


def saved_bytes(config: RunConfig, vocabulary: Vocabulary, processes: int = 1) -> tuple[int, int]:
    """Upper bounds for the disk bytes of a checkpoint and of the finished model, which has the full vocabulary."""
    with torch.device("meta"):
        model = GPT(config.model, vocabulary).freeze(config.train.freeze)
        weights, state = _trained_bytes(model, config.optim)
    headers = ENTRY_BYTES * len(list(model.parameters()))
    checkpoint = weights + headers + sum(state) + ENTRY_BYTES * len(state) + RANDOM_BYTES * processes
    return checkpoint, 4 * config.model.n_params + headers + TOKENIZER_BYTES


def free_bytes(machine: Machine) -> int:
    """Free memory of the device in bytes."""
    if machine.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    if machine.device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return free_memory_bytes()


def _trained_bytes(model: GPT, optim: OptimConfig) -> tuple[int, list[int]]:
    """Bytes of the weights, and of each tensor of the optimiser state. The model may be without data."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    slots = state_slots(build_optimizers(model, optim, torch.float32), optim)
    return weights, [4 * math.prod(shape) for _, _, shape in slots]


def _kept_by(model: GPT, windows: WindowsConfig, machine: Machine) -> int:
    """Bytes that a forward pass keeps for the backward pass: computed for 1 and 2 windows, and extrapolated."""
    weights = {id(storage := p.untyped_storage()): storage for p in model.parameters()}

    def keeps(n_windows: int) -> int:
        storages = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[id(storage)] = storage  # the reference keeps the id from being reused
            return tensor

        inputs = torch.zeros(n_windows, windows.seq_len, dtype=torch.int64)
        with machine.autocast(), saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.loss(inputs, inputs, n_windows * windows.seq_len)
        del loss
        return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)

    one, two = keeps(1), keeps(2)
    return one + (two - one) * (windows.micro_batch_size - 1)
