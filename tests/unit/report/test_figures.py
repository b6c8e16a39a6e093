"""The figures and tables of a run: their content, and the same bytes for the same run."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from matplotlib import image

from pipeline.report.figures import FIGURES, RunReport, loss_figure, training_figure, write_figures
from pipeline.report.tables import write_tables
from pipeline.system.errors import InputError
from pipeline.system.files import write_json
from pipeline.tracking.journal import Journal, StepRecord

STEP_TOKENS = 256


def write_run(
    folder: Path, steps: int, met: dict[str, int], clip: float | None = 1.0, step_s: float = 0.1
) -> RunReport:
    """Write and read the files of a run whose loss falls from ln 50,257 to 0.09, evenly on a logarithmic scale."""
    models, reports = folder / "models", folder / "reports"
    models.mkdir(parents=True)
    journal = Journal(models)
    for step in range(1, steps + 1):
        loss = 10.82 * (0.09 / 10.82) ** (step / steps)
        record = StepRecord(
            step, step * STEP_TOKENS, loss, 1 + 9 / step, 1e-3 / step, step_s=step_s, memory_bytes=2**30
        )
        record.corpus_loss = loss if step % 10 == 0 or step == steps else None
        journal.append(record)
    journal.close()
    optim = {"name": "muon", "lr": 0.002, "muon_lr": 0.01, "max_grad_norm": clip}
    reached = {rule: {"steps": step, "tokens": step * STEP_TOKENS} for rule, step in met.items()}
    to_target = {"batch": None, "average": None, "corpus": None} | reached
    results = {"corpus_loss": 0.09, "target_loss": 0.1, "train_tokens": 34_219, "to_target": to_target}
    params = {"optim": optim, "target": {"average_steps": 100}}
    run = {"n_params": 30_044_544, "params": params, "results": results, "environment": {}}
    run |= {"fingerprint": "f", "data_sha256": "d"}
    timing = {"tokens_per_s": STEP_TOKENS / step_s, "mfu": "unknown", "train_s": 10.0, "peak_memory_bytes": 2**30}
    write_json(models / "run.json", run)
    write_json(reports / "timing.json", timing)
    write_json(reports / "position_loss.json", [1 / position for position in range(1, 65)])
    return RunReport.read(models, reports)


def texts(figure) -> str:
    """All texts of a figure."""
    found = [text.get_text() for axes in figure.axes for text in [*axes.texts, *axes.get_legend().get_texts()]]
    return "\n".join(found + [axes.get_title(loc="left") for axes in figure.axes])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunReport:
    return write_run(tmp_path_factory.mktemp("finished"), steps=200, met={"batch": 195, "corpus": 200})


def test_a_repeated_run_gives_the_same_bytes_except_for_its_speed(finished, tmp_path, monkeypatch):
    write_figures(finished, tmp_path / "one")
    monkeypatch.setitem(matplotlib.rcParams, "xtick.labelsize", 30)  # a user's matplotlibrc
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    write_figures(write_run(tmp_path, 200, {"batch": 195, "corpus": 200}, step_s=0.2), tmp_path / "two")
    one, two = ({name: (tmp_path / n / f"{name}.png").read_bytes() for name in FIGURES} for n in ("one", "two"))
    assert [name for name in FIGURES if one[name] != two[name]] == ["speed"]
    for picture in one.values():
        assert len(picture) < 100_000  # they are committed
        assert b"matplotlib" not in picture.lower()


def test_a_run_of_one_step_that_met_no_rule_has_figures_too(tmp_path):
    report = write_run(tmp_path, steps=1, met={}, clip=None)
    write_figures(report, tmp_path)
    write_tables(report, tmp_path)
    for name in FIGURES:
        pixels = image.imread(tmp_path / f"{name}.png")
        assert pixels.shape[1] == 880  # a README's width
        assert pixels.min() < 0.1 < 0.9 < pixels.mean()  # dark on white
    assert "target 0.1\nnot reached" in texts(loss_figure(report))
    assert len(training_figure(report).axes[0].texts) == 0  # no line of a clip


def test_the_figures_show_when_each_rule_was_met_the_running_mean_and_the_clip(finished):
    figure = loss_figure(finished)
    notes = figure.get_supxlabel().split("\n")
    assert notes == ["batch rule met: step 195, 49.9k tokens", "corpus rule met: step 200, 51.2k tokens"]
    (marks,) = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert marks == [[195, 0.1], [200, 0.1]]
    assert "mean of 4 steps" in texts(figure)  # a fiftieth of a short run
    assert replace(finished, steps=pd.concat([finished.steps] * 30)).mean_steps == 100  # target.average_steps
    assert [text.get_text() for text in training_figure(finished).axes[0].texts] == ["clip at 1"]


def test_tables_hold_the_journal_by_step(finished, tmp_path):
    write_tables(finished, tmp_path)
    steps = pd.read_csv(tmp_path / "steps.csv", index_col="step")
    assert list(steps.columns) == ["tokens", "loss", "grad_norm", "lr"]
    assert steps.loc[200, "loss"] == pytest.approx(0.09)
    assert list(pd.read_csv(tmp_path / "checks.csv")["step"]) == list(range(10, 201, 10))
    assert pd.read_csv(tmp_path / "position_loss.csv").iloc[0].tolist() == [1, 1.0]  # positions count from 1


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"steps.jsonl contains no steps"):
        RunReport.read(tmp_path / "models", tmp_path / "reports")
