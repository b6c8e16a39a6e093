"""Write a run's series as CSV tables, since `dvc plots` does not read JSON lines."""

from pathlib import Path

import pandas as pd

from pipeline.report.figures import RunReport
from pipeline.system.files import write_text
from pipeline.tracking.journal import EVALUATED_LOSSES


def write_tables(report: RunReport, folder: Path) -> None:
    """Write steps.csv, checks.csv (the evaluations) and position_loss.csv."""
    steps = report.steps
    checks = [column for column in (*EVALUATED_LOSSES, "loss_estimate") if column in steps]
    positions = pd.DataFrame({"loss": report.position_loss}).rename_axis("position")
    positions.index += 1
    for name, table in {
        "steps.csv": steps[["step", "tokens", "loss", "grad_norm", "lr"]].set_index("step"),
        "checks.csv": steps[["step", "tokens", *checks]].set_index("step").dropna(subset=checks, how="all"),
        "position_loss.csv": positions,
    }.items():
        write_text(folder / name, table.to_csv(float_format="%.6g", lineterminator="\n"))
