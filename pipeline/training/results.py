"""run_results: the rows of a finished run -> what it came to, in figures and in words."""

from typing import Any

from pipeline.tracking.journal import StepRow
from pipeline.training.target import RULES, TargetConfig, best_step, first_met, is_out_of_patience


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
