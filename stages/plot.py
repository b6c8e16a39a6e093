"""Stage `plot`: models/{steps,times}.jsonl, models/run.json and reports/*.json -> reports/figures and reports/plots."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.report.figures import RunReport, write_figures, write_tables

    report = RunReport.read(Path("models"), Path("reports"), Path("benchmarks/published"))
    write_figures(report, Path("reports/figures"))
    write_tables(report, Path("reports/plots"))


if __name__ == "__main__":
    run_stage(main)
