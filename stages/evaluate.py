"""Stage `evaluate`: models/model and data/tokens -> reports/metrics.json and reports/position_loss.json."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.config.params import load_params
    from pipeline.config.sections import EvaluateConfig
    from pipeline.model.evaluate import evaluate_model
    from pipeline.system.files import write_json
    from pipeline.tracking.run_record import read_run

    config = load_params().section(EvaluateConfig)
    run = read_run(Path("models"))
    metrics, position_loss = evaluate_model(Path("models/model"), Path("data/tokens"), run, config)
    write_json(Path("reports/metrics.json"), metrics)
    write_json(Path("reports/position_loss.json"), position_loss)
    if (held_out := metrics["validation_loss"]) is not None:
        print(f"loss on the held-out text {held_out:.4f}")
    bits = metrics["sliding_bits_per_byte"] or 0.0
    print(
        f"loss from anywhere in the text {metrics['sliding_loss']:.4f} ({bits:.4f} bits per byte), "
        f"in fixed windows {metrics['corpus_loss']:.4f}; "
        f"recited exactly from anywhere: {metrics['verbatim_recall_anywhere']:.1%} of continuations"
    )


if __name__ == "__main__":
    run_stage(main)
