"""The results of a finished run: the cost of each target rule, throughput, utilisation, and the files of the stage."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.sections import ModelConfig, TargetConfig
from pipeline.data.statistics import bits_per_byte, bytes_per_token
from pipeline.model.weights import save_model
from pipeline.system.device import Machine
from pipeline.system.files import write_json
from pipeline.tracking.journal import STEPS, TIMES, StepRecord, write_lines
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.extension import advice
from pipeline.training.run import Run
from pipeline.training.target import RULES, best_step, first_met, is_out_of_patience


def write_results(run: Run, models: Path, tokenizer: Path, timing: Path) -> None:
    """Write the model of the best step, run.json, the journal and, in a separate file, all times."""
    config, records = run.config, run.records
    split = run.text.validation if RULES[config.target.rule].needs_held_out else run.text.train
    assert split is not None, "a rule that needs a held-out text has one"
    length = bytes_per_token(split.tokens, run.text.tokenizer)
    results = results_of(records, config.target, run.text.train.size, run.max_steps, length)
    if results["model_step"] != run.state.step:
        run.state.restore(*load_checkpoint(run.folder, results["model_step"]))
    model = run.state.whole_model()
    if model is None or not run.world.is_main:
        return
    save_model(models / "model", model, tokenizer)
    write_json(models / "run.json", {**run.identity, "n_params": config.model.n_params, "results": results})
    for name in (STEPS, TIMES):
        write_lines(models / name, [record.line(name) for record in records])
    flops = flops_per_token(config.model, run.text.vocabulary.n_rows, config.windows.seq_len)
    mfu = utilisation(throughput(records), flops, run.machine, str(run.identity["environment"]["device"]))
    write_json(timing, time_report(records, first_met(records, config.target), mfu, run.resumes))
    print(summary(results, records, config.target))
    if results["to_target"][results["rule"]] is None and len(records) == run.max_steps:
        print(advice(config.optim, config.windows, run.text.train.size))


def results_of(
    records: Sequence[StepRecord], target: TargetConfig, train_tokens: int, max_steps: int, bytes_per_token: float
) -> dict[str, Any]:
    """The `results` of models/run.json: the cost of each rule, and the step whose model is kept.

    `bytes_per_token`: of the text whose loss the rule compares.
    """
    best = best_step(records, target)
    assert best is not None, "a run's last step is evaluated"
    return {
        "steps": len(records),
        "max_steps": max_steps,
        "tokens": records[-1].tokens,
        "model_step": best,
        "train_tokens": train_tokens,
        "loss": (loss := getattr(records[best - 1], RULES[target.rule].loss)),
        "bits_per_byte": bits_per_byte(loss, bytes_per_token),
        "target_loss": target.loss,
        "rule": target.rule,
        "to_target": {
            rule: None if step is None else {"steps": step, "tokens": records[step - 1].tokens}
            for rule, step in first_met(records, target).items()
        },
    }


def summary(results: dict[str, Any], records: Sequence[StepRecord], target: TargetConfig) -> str:
    """The results in one line; one more if patience ended the run, and one if the model is not of the last step."""
    cost = results["to_target"][results["rule"]]
    bits = results["bits_per_byte"] or ""
    spent, found = cost or results, "reached after" if cost else "not reached in"
    words = (
        f"target {found} {spent['steps']} steps, {spent['tokens']:,} tokens ({results['rule']} rule, "
        f"target {results['target_loss']:g}, loss {results['loss']:.4f}"
        f"{bits and f', {bits:.4f} bits per byte'})"
    )
    if is_out_of_patience(records, target):
        saved = results["max_steps"] - results["steps"]
        words += f"\nthe last {target.early_stopping_patience} evaluations found no lower validation loss: "
        words += f"early stopping saves {saved:,} of {results['max_steps']:,} steps"
    if (best := results["model_step"]) != results["steps"]:
        name = RULES[target.rule].loss
        last = getattr(records[-1], name)
        words += f"\nthe model of step {best} is kept: its {name} is {results['loss']:.4f}, {last:.4f} at the last step"
    return words


# Peak FLOP/s of dense matrix products, from NVIDIA's data sheets, by words of the device's name; NVL cards are slower.
PEAK_FLOPS = {
    "bf16": {
        "H200": 989e12,
        "H100 PCIe": 756e12,
        "H100": 989e12,
        "A100": 312e12,
        "L4": 121e12,
        "A10G": 70e12,
    },
    "fp16": {"V100": 125e12, "T4": 65e12},
}


def flops_per_token(config: ModelConfig, n_rows: int, length: int) -> int:
    """FLOPs per token, forward and backward: 6 n_weights + 12 L C T (Chowdhery et al. 2022, appendix B)."""
    C, L = config.n_embd, config.n_layer
    return 6 * (L * 12 * C**2 + n_rows * C) + 12 * L * C * length


def utilisation(tokens_per_s: float, flops: int, machine: Machine, device_name: str) -> float | str:
    """Model FLOPs utilisation: the achieved share of the devices' peak, or "unknown" if the peak is unknown.

    Each process of the machine's world has a device of this name.
    """
    peaks = PEAK_FLOPS.get(machine.precision, {})
    peak = next((value for name, value in peaks.items() if re.search(rf"\b{name}\b(?! NVL)", device_name)), None)
    return "unknown" if peak is None else round(tokens_per_s * flops / (peak * machine.world.size), 4)


def time_report(
    records: Sequence[StepRecord], reached: dict[str, int | None], mfu: float | str, resumes: int
) -> dict[str, Any]:
    """The content of reports/timing.json; `reached` is the step at which each rule was met."""

    def until(record: StepRecord) -> dict[str, float]:
        return {"train_s": round(record.train_s, 3), "wall_s": round(record.wall_s, 3)}

    return {
        "tokens_per_s": round(throughput(records), 1),
        "mfu": mfu,
        "peak_memory_bytes": max(record.memory_bytes for record in records),
        **until(records[-1]),
        "resumes": resumes,
        "to_target": {rule: None if step is None else until(records[step - 1]) for rule, step in reached.items()},
    }


def throughput(records: Sequence[StepRecord]) -> float:
    """Tokens per second of training time, over all steps."""
    return records[-1].tokens / records[-1].train_s
