"""What a finished run reached, and its throughput, utilisation and times."""

from collections.abc import Sequence
from typing import Any

from pipeline.config.sections import ModelConfig, TargetConfig
from pipeline.system.device import Machine
from pipeline.tracking.journal import StepRow, TimeRow
from pipeline.training.target import RULES, best_step, first_met, is_out_of_patience


def results_of(rows: list[StepRow], target: TargetConfig, train_tokens: int) -> dict[str, Any]:
    """The results in models/run.json: what each rule cost, and of which step the model is that is kept."""
    best, reached = best_step(rows, target), first_met(rows, target)
    assert best is not None, "a run ends with a look"
    return {
        "steps": len(rows),
        "tokens": rows[-1]["tokens"],
        "model_step": best,
        "train_tokens": train_tokens,
        "corpus_loss": rows[best - 1]["corpus_loss"],
        "target_loss": target.loss,
        "rule": target.rule,
        "to_target": {
            rule: None if (step := reached[rule]) is None else {"steps": step, "tokens": rows[step - 1]["tokens"]}
            for rule in RULES
        },
    }


def in_words(results: dict[str, Any], rows: list[StepRow], target: TargetConfig) -> str:
    """The results in a line, and why the run ended where that is not plain."""
    cost = results["to_target"][results["rule"]]
    found = f"{results['rule']} rule, target {results['target_loss']:g}, corpus loss {results['corpus_loss']:.4f}"
    if cost:
        words = f"target reached after {cost['steps']} steps, {cost['tokens']:,} tokens ({found})"
    else:
        words = f"target not reached in {results['steps']} steps, {results['tokens']:,} tokens ({found})"
    if is_out_of_patience(rows, target):
        words += f"\nthe last {target.early_stopping_patience} looks at the held-out text found no lower loss"
    return words


# Dense peaks in FLOP/s of the tensor cores, from NVIDIA's data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "bf16": {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "A10G": 70e12},
    "fp16": {"V100": 125e12, "T4": 65e12},
}


def flops_per_token(config: ModelConfig, n_rows: int, length: int) -> int:
    """FLOPs of forward and backward for a token: 6 a weight, and attention's (Chowdhery et al. 2022, appendix B)."""
    C, L = config.n_embd, config.n_layer
    return 6 * (L * 12 * C**2 + n_rows * C) + 12 * L * C * length


def utilisation(tokens_per_s: float, flops: int, machine: Machine, device_name: str) -> float | str:
    """Model FLOPs utilisation: share of the device's known peak, or "unknown" where that is not known."""
    peaks = PEAK_FLOPS.get(machine.precision, {})
    peak = next((value for name, value in peaks.items() if name in device_name), None)
    return "unknown" if peak is None else round(tokens_per_s * flops / peak, 4)


def time_report(
    steps: Sequence[StepRow], times: Sequence[TimeRow], reached: dict[str, int | None], mfu: float | str, resumes: int
) -> dict[str, Any]:
    """The contents of reports/timing.json; `reached`: the step at which each rule was met."""
    last = times[-1]
    return {
        "tokens_per_s": throughput(steps, times),
        "mfu": mfu,
        "peak_memory_bytes": max(row["memory_bytes"] for row in times),
        "train_s": round(last["train_s"], 3),
        "wall_s": round(last["wall_s"], 3),
        "resumes": resumes,
        "to_target": {
            rule: None
            if step is None
            else {"train_s": round(times[step - 1]["train_s"], 3), "wall_s": round(times[step - 1]["wall_s"], 3)}
            for rule, step in reached.items()
        },
    }


def throughput(steps: Sequence[StepRow], times: Sequence[TimeRow]) -> float:
    """Tokens a second of training time, all steps together."""
    return round(steps[-1]["tokens"] / times[-1]["train_s"], 1)
