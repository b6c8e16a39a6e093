"""Measure tokens/s with one, two, ... processes, and estimate tokens/s of 8 and 64 GPUs.

    python -m benchmarks.scaling [--preset 15M 124M] [--rounds 3] [--json FILE]

On a CPU: one process with one thread, one with two threads, two processes with one thread each. On GPUs: one process,
two, four and so on, up to all GPUs. Replicated (DDP) and sharded (FSDP2), with the same global batch and AdamW, in
turn. The figure of a job is the median of its steps. Reported is the median of the jobs.

The estimate, for a step of the same global batch on N GPUs, 8 in a machine:

    step_s(N)     = max(compute_s / N, FLOOR_S) + exchange_s(N) - hidden
    exchange_s(N) = 2 (N - 1) / N * gradient_bytes / bandwidth + LATENCY_S * ceil(log2 N)

A ring all-reduce sends each byte of the fp32 gradients 2 (N - 1) / N times (Patarasuk and Yuan 2009). `hidden` is the
part of the exchange that overlaps the backward pass. It is at least 0, and at most the duration of the backward pass,
two thirds of the computation. The estimate is the range between both. Assumptions:

- bandwidth: 350 GB/s for each GPU within a machine (NVLink 4), 45 GB/s between machines (400 Gb/s InfiniBand for each
  GPU);
- LATENCY_S for each doubling of N;
- FLOOR_S: the time to launch the kernels of a step, which is the shortest possible step;
- compute_s: measured on one GPU. Without a GPU it is the time of a step at ASSUMED_MFU of an H200's peak, and the
  output says so.

On a CPU the same formula, with the measured bandwidth of an all-reduce, is compared with the step of two processes.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.throughput import N_USED, PRESETS, machine_name, shape_of, synchronise
from pipeline.config.params import load_params
from pipeline.config.sections import OptimConfig, TrainConfig
from pipeline.data.batches import Batch
from pipeline.data.vocab import Vocabulary
from pipeline.system.device import prepare_machine
from pipeline.system.distributed import joined, launch, world_here
from pipeline.system.limits import cores
from pipeline.training.loop import fresh_state, train_steps
from pipeline.training.results import PEAK_FLOPS, flops_per_token

WINDOWS, LENGTH = 16, 256  # of a step, summed over all processes
STEPS = 7  # of a job; the first two are not measured
FLOOR_S, LATENCY_S = 4e-3, 1e-5
WITHIN, BETWEEN = 350e9, 45e9  # bytes per second and GPU, within a machine and between machines
ASSUMED_MFU = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": machine_name(), "torch": torch.__version__, "presets": {}}
    for preset in arguments.preset:
        print(f"\n{preset} on {report['machine']}, {WINDOWS * LENGTH:,} tokens a step, {arguments.rounds} rounds")
        report["presets"][preset] = compare(preset, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def contestants() -> dict[str, dict[str, Any]]:
    """The jobs by name: number of processes, threads of each, and whether they shard the model."""
    if n_gpus := torch.cuda.device_count():
        sizes = [2**i for i in range(n_gpus.bit_length())]
        jobs = {f"{n} GPU{'s' * (n > 1)}": {"processes": n, "threads": cores() // n, "shard": False} for n in sizes}
        return jobs | {f"{n} GPUs, sharded": {**jobs[f"{n} GPUs"], "shard": True} for n in sizes if n > 1}
    return {
        "1 process, 1 thread": {"processes": 1, "threads": 1, "shard": False},
        "1 process, 2 threads": {"processes": 1, "threads": 2, "shard": False},
        "2 processes, 1 thread each": {"processes": 2, "threads": 1, "shard": False},
        "2 processes, sharded": {"processes": 2, "threads": 1, "shard": True},
    }


def compare(preset: str, rounds: int) -> dict[str, Any]:
    """Run all jobs in turn; print the measured figures and the estimate, and return both."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in contestants()}
    for _ in range(rounds):
        for name, job in contestants().items():
            measured[name].append(run(preset, **job))
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in measured.items()
    }
    print(f"{'':28} {'tokens/s':>9} {'ms/step':>8} {'speed-up':>8}")
    (first, *_) = (base for base in medians if base in ("1 GPU", "1 process, 2 threads"))
    for name, figures in medians.items():
        step_s = figures["step_s"]
        speed_up = medians[first]["step_s"] / step_s
        print(f"{name:28} {WINDOWS * LENGTH / step_s:9,.0f} {step_s * 1e3:8,.0f} {speed_up:8.2f}")
    return {"measured": medians, "against": first, "on_paper": estimate(preset, medians, first)}


def run(preset: str, processes: int, threads: int, shard: bool) -> dict[str, float]:
    """Run one job in child processes; return what it measured."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.NamedTemporaryFile() as file:
        code = launch(processes, "benchmarks.scaling", ["job", preset, str(threads), str(int(shard)), file.name])
        if code:
            sys.exit(f"a job of {processes} processes failed with {code}")
        return dict(json.loads(Path(file.name).read_text()))


def job(preset: str, threads: int, shard: bool, path: Path) -> None:
    """Train STEPS steps together with the other processes of the job; rank 0 writes the medians to `path`."""
    world = world_here()
    params = load_params()
    optim = params.section(OptimConfig).updated(name="adamw", schedule="constant", warmup=0)
    train = params.section(TrainConfig).updated(threads=threads, shard=shard)
    with joined(world):
        machine = prepare_machine(train, world=world)
        shape = shape_of(preset)
        vocabulary = Vocabulary.of(np.arange(shape.vocab_size) < N_USED, shape.vocab_size)
        state = fresh_state(shape, vocabulary, optim, train, machine)
        ids = torch.randint(N_USED, (WINDOWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
        ids = torch.stack(world.share(list(ids))).to(machine.device)
        batch = Batch(ids[:, :-1].clone(), ids[:, 1:].clone(), WINDOWS * LENGTH)
        records = train_steps(state, iter(lambda: [batch], None), STEPS, optim, machine)
        steps = [timed(lambda: next(records)) for _ in range(STEPS)]
        gradient = torch.zeros(sum(p.numel() for p in state.model.parameters()), device=machine.device)
        exchanges = [timed(lambda: world.add(gradient)) for _ in range(5)] if not shard else [0.0]
        found = {
            "step_s": statistics.median(steps[2:]),
            "gradient_bytes": gradient.nbytes,
            "exchange_s": statistics.median(exchanges),
        }
        if world.is_main:
            path.write_text(json.dumps(found))


def timed(work: Any) -> float:
    """Seconds of `work`, measured from a barrier of all processes."""
    if dist.is_initialized():
        dist.barrier()
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def estimate(preset: str, medians: dict[str, dict[str, float]], first: str) -> dict[str, Any]:
    """Print and return the estimate for 8 and 64 GPUs, and for the two processes that were measured."""
    gradient_bytes = medians[first]["gradient_bytes"]
    if torch.cuda.is_available():
        compute_s, origin = medians[first]["step_s"], "measured"
    else:
        flops = flops_per_token(shape_of(preset), N_USED + 1, LENGTH) * WINDOWS * LENGTH
        compute_s, origin = flops / (ASSUMED_MFU * PEAK_FLOPS["bf16"]["H200"]), f"assumed: {ASSUMED_MFU:.0%} of an H200"
    print(
        f"estimate, from {compute_s * 1e3:.1f} ms on one GPU ({origin}) and {gradient_bytes / 1e6:,.0f} MB of gradients"
    )
    found: dict[str, Any] = {"compute_s": compute_s, "compute_is": origin, "gpus": {}}
    for n, bandwidth in ((8, WITHIN), (64, BETWEEN)):
        slowest, fastest = step_seconds(n, compute_s, gradient_bytes, bandwidth)
        found["gpus"][n] = {"step_s": [fastest, slowest]}
        speed = [WINDOWS * LENGTH / step_s for step_s in (slowest, fastest)]
        print(f"{n:4} GPUs: {speed[0]:,.0f} to {speed[1]:,.0f} tokens/s, {fastest * 1e3:.1f} to {slowest * 1e3:.1f} ms")
    if two := medians.get("2 processes, 1 thread each"):
        bandwidth = gradient_bytes / two["exchange_s"]  # 2 (N - 1) / N is 1
        slowest, fastest = step_seconds(
            2, medians["1 process, 1 thread"]["step_s"], gradient_bytes, bandwidth, floor_s=0
        )
        found["two_processes"] = {"bandwidth": bandwidth, "step_s": [fastest, slowest], "measured_s": two["step_s"]}
        print(
            f"   2 processes here, at {bandwidth / 1e9:.2f} GB/s: {fastest * 1e3:,.0f} to {slowest * 1e3:,.0f} ms "
            f"by the formula, {two['step_s'] * 1e3:,.0f} measured"
        )
    return found


def step_seconds(
    n: int, compute_s: float, gradient_bytes: float, bandwidth: float, floor_s: float = FLOOR_S
) -> tuple[float, float]:
    """Seconds of a step of n processes: without overlap of the exchange, and with the largest possible overlap."""
    compute = max(compute_s / n, floor_s)
    exchange = 2 * (n - 1) / n * gradient_bytes / bandwidth + LATENCY_S * math.ceil(math.log2(n))
    return compute + exchange, compute + max(0.0, exchange - 2 / 3 * compute)


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        job(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1", Path(sys.argv[5]))
    else:
        main()
