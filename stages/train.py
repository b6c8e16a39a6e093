"""Stage `train`: data/tokens -> models/ and reports/timing.json, tracked in MLflow."""

from pathlib import Path

from pipeline.config import load_params
from pipeline.stage import run_stage
from pipeline.tracked_run import run_tracked


def main() -> None:
    run_tracked(load_params(), data=Path("data"), models=Path("models"), timing=Path("reports/timing.json"))


if __name__ == "__main__":
    run_stage(main)
