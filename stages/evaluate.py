"""Stage `evaluate`: models/model and data/tokens -> reports/metrics.json."""

from pathlib import Path

from pipeline.config import load_params
from pipeline.evaluate import EvaluateConfig, evaluate_model
from pipeline.files import read_json, write_json
from pipeline.stage import run_stage


def main() -> None:
    config = load_params().section(EvaluateConfig)
    run = read_json(Path("models/run.json"))
    write_json(Path("reports/metrics.json"), evaluate_model(Path("models/model"), Path("data/tokens"), run, config))


if __name__ == "__main__":
    run_stage(main)
