"""Compare the speed of a training step: this project, Hugging Face's model and a plain loop, in turn, on this machine.

    python -m benchmarks.throughput [--preset 15M 124M] [--rounds 5] [--json FILE]

Every contestant trains the same GPT-2 on the same random tokens, with as many ids as Tiny Shakespeare has. Each runs in
its own process, which is idle while the others run. In a round each takes two steps. Only the second is measured,
because the first starts with cold caches.

Reported are medians: tokens/s, ms per step, the peak memory of the process, and the share of the ceiling. The ceiling
is the speed of a large matrix product in the precision that `train.precision: auto` selects here. The FLOPs of a token
are those of the contestant's head and blocks (Chowdhery et al. 2022), so folding increases tokens/s, but not the share.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig, OptimConfig, TrainConfig
from pipeline.data.batches import Batch
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.system.device import Machine, prepare_machine
from pipeline.system.host import cpu_name
from pipeline.training.loop import fresh_state, train_steps
from pipeline.training.results import flops_per_token

N_USED = 11_706  # ids that occur in Tiny Shakespeare
LENGTH = 256
PRESETS = {
    "15M": {"n_layer": 6, "n_head": 6, "n_embd": 384},
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
}
Step = Callable[[], None]


class Contestant(NamedTuple):
    """A way to train, and how many windows of LENGTH tokens it uses per step."""

    name: str
    windows: int
    folded: bool
    build: Callable[[ModelConfig, list[Batch], Machine], Step]


def ours(kind: str) -> Callable[[ModelConfig, list[Batch], Machine], Step]:
    def build(shape: ModelConfig, batches: list[Batch], machine: Machine) -> Step:
        params = load_params()
        optim = params.section(OptimConfig).updated(name=kind, schedule="constant", warmup=0)
        vocabulary = Vocabulary.of(np.arange(shape.vocab_size) < N_USED, shape.vocab_size)
        state = fresh_state(shape, vocabulary, optim, params.section(TrainConfig), machine)
        records = train_steps(state, iter(lambda: batches, None), 10**9, optim, machine)
        return lambda: next(records) and None

    return build


def plain(shape: ModelConfig, batches: list[Batch], machine: Machine) -> Step:
    """The loop of the published scripts: fp32, all logits, torch's AdamW with its defaults."""
    model = GPT(shape, Vocabulary.full(shape.vocab_size)).initialise(1).to(machine.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    (batch,) = batches

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def hugging_face(autocast: bool) -> Callable[[ModelConfig, list[Batch], Machine], Step]:
    def build(shape: ModelConfig, batches: list[Batch], machine: Machine) -> Step:
        from transformers import GPT2Config, GPT2LMHeadModel, logging

        logging.set_verbosity_error()
        sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd}
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(n_positions=shape.block_size, **sizes, **dropouts)).to(machine.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        (batch,) = batches

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(machine.device.type, torch.bfloat16, enabled=autocast):
                # it shifts the labels itself, so one target in LENGTH is not learnt
                loss = model(input_ids=batch.inputs, labels=batch.inputs).loss
            loss.backward()
            optimizer.step()
            loss.item()

        return step

    return build


CONTESTANTS = (
    Contestant("ours, AdamW", 8, True, ours("adamw")),
    Contestant("ours, Muon", 16, True, ours("muon")),
    Contestant("Hugging Face, bf16 autocast", 8, False, hugging_face(True)),
    Contestant("Hugging Face, fp32", 8, False, hugging_face(False)),
    Contestant("plain loop, fp32", 8, False, plain),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    report = {"machine": machine_name(), "torch": torch.__version__, "presets": {}}
    for preset in arguments.preset:
        print(f"\n{preset} on {report['machine']}, torch {report['torch']}, median of {arguments.rounds} rounds")
        report["presets"][preset] = compare(preset, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def compare(preset: str, rounds: int) -> dict[str, Any]:
    """Measure all contestants in turn; print a table and return its figures by contestant."""
    processes = [ContestantProcess(preset, i) for i in range(len(CONTESTANTS))]
    seconds: list[list[float]] = [[] for _ in processes]
    ceilings = []
    for _ in range(rounds):
        ceilings.append(processes[0].ask("ceiling"))
        for process, times in zip(processes, seconds, strict=True):
            times.append(process.ask("step"))
    ceiling = statistics.median(ceilings)
    columns = "{:28} {:>9} {:>8} {:>7} {:>5} {:>8}"
    print(columns.format(f"of {ceiling / 1e9:,.0f} GFLOP/s", "tokens/s", "ms/step", "tokens", "GiB", "ceiling"))
    figures = {}
    for contestant, process, times in zip(CONTESTANTS, processes, seconds, strict=True):
        tokens, step_s = contestant.windows * LENGTH, statistics.median(times)
        n_rows = N_USED + 1 if contestant.folded else shape_of(preset).vocab_size
        share = flops_per_token(shape_of(preset), n_rows, LENGTH) * tokens / step_s / ceiling
        peak = process.ask("memory")
        figures[contestant.name] = {
            "tokens_per_s": round(tokens / step_s),
            "step_ms": round(step_s * 1e3, 1),
            "step_tokens": tokens,
            "peak_memory_bytes": peak,
            "ceiling_share": round(share, 3),
            "steps_ms": [round(value * 1e3, 1) for value in times],
        }
        row = f"{tokens / step_s:,.0f}", f"{step_s * 1e3:,.0f}", f"{tokens:,}", f"{peak / 2**30:.1f}", f"{share:.0%}"
        print(columns.format(contestant.name, *row))
        process.close()
    return {"ceiling_flops": ceiling, "contestants": figures}


class ContestantProcess:
    """A contestant in its own process, controlled through a pipe."""

    def __init__(self, preset: str, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_contestant, args=(theirs, preset, index), daemon=True)
        self._process.start()
        theirs.close()  # if the process dies, `recv` raises EOFError
        self._pipe.recv()  # waits until it is built and warmed up, so that only one process is built at a time

    def ask(self, what: str) -> float:
        self._pipe.send(what)
        return float(self._pipe.recv())

    def close(self) -> None:
        self._pipe.send("end")
        self._process.join()


def run_contestant(pipe: Connection, preset: str, index: int) -> None:
    """Answer requests until `end`: `step` with seconds, `ceiling` with FLOP/s, `memory` with bytes."""
    contestant = CONTESTANTS[index]
    if contestant.folded:
        machine = prepare_machine(load_params().section(TrainConfig))
    else:  # without this project's settings: only the device is chosen
        machine = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "fp32", torch.get_num_threads())
    ids = torch.randint(N_USED, (contestant.windows, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    ids = ids.to(machine.device)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), contestant.windows * LENGTH)
    step = contestant.build(shape_of(preset), [batch], machine)
    for _ in range(3):
        step()
    pipe.send("ready")
    while (asked := pipe.recv()) != "end":
        pipe.send(
            {
                "step": lambda: [timed(step) for _ in range(2)][1],
                "ceiling": lambda: ceiling(machine),
                "memory": peak_bytes,
            }[asked]()
        )


def timed(step: Step) -> float:
    synchronise()
    started = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def ceiling(machine: Machine) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    size = 8192 if machine.device.type == "cuda" else 2048
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[machine.precision]
    a = torch.randn(size, size, device=machine.device).to(dtype)
    return 2 * size**3 / min(timed(lambda: a @ a) for _ in range(5))


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shape_of(preset: str) -> ModelConfig:
    return ModelConfig(**PRESETS[preset], block_size=1024, vocab_size=50257, dropout=0.0, fold_vocab=True)


def machine_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
