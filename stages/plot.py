"""Stage `plot`: write the run's figures to reports/figures and their data to reports/plots."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.report.figures import RunReport, write_figures
    from pipeline.report.tables import write_tables

    report = RunReport.read(Path("models"), Path("reports"))
    write_figures(report, Path("reports/figures"))
    write_tables(report, Path("reports/plots"))


if __name__ == "__main__":
    run_stage(main)
