import json
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from matplotlib import image

from pipeline.report.figures import FIGURES, RunReport, loss_figure, training_figure, write_figures
from pipeline.report.tables import write_tables
from pipeline.system.errors import InputError
from pipeline.tracking.journal import write_lines

STEP_TOKENS = 256


def write_run(folder: Path, steps: int, met: dict[str, int], clip: float | None = 1.0, step_s: float = 0.1) -> None:
    """The files of a run whose loss falls evenly, on a logarithmic scale, from ln 50,257 to 0.09."""
    rows, times = [], []
    for step in range(1, steps + 1):
        loss = 10.82 * (0.09 / 10.82) ** (step / steps)
        rows.append(
            {"step": step, "tokens": step * STEP_TOKENS, "loss": loss, "grad_norm": 1 + 9 / step, "lr": 1e-3 / step}
        )
        if step % 10 == 0 or step == steps:
            rows[-1]["corpus_loss"] = loss
        times.append({"step": step, "step_s": step_s, "train_s": step * step_s, "wall_s": step * step_s,
                      "memory_bytes": 2**30, "logged_ms": step})  # fmt: skip
    (folder / "models").mkdir()
    write_lines(folder / "models/steps.jsonl", rows)
    write_lines(folder / "models/times.jsonl", times)
    results = {
        "corpus_loss": rows[-1]["corpus_loss"],
        "target_loss": 0.1,
        "train_tokens": 34_219,
        "to_target": {rule: {"steps": met[rule], "tokens": met[rule] * STEP_TOKENS} if rule in met else None
                      for rule in ("batch", "average", "corpus")},
    }  # fmt: skip
    params = {
        "optim": {"name": "muon", "lr": 0.002, "muon_lr": 0.01, "max_grad_norm": clip},
        "target": {"average_steps": 100},
    }
    timing = {"tokens_per_s": STEP_TOKENS / step_s, "mfu": "unknown", "train_s": 10.0, "peak_memory_bytes": 2**30}
    for name, value in {
        "models/run.json": {
            "n_params": 30_044_544,
            "params": params,
            "results": results,
            "fingerprint": "f",
            "data_sha256": "d",
            "environment": {},
        },
        "reports/timing.json": timing,
        "reports/position_loss.json": [1 / position for position in range(1, 65)],
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))


def read_run(folder: Path) -> RunReport:
    return RunReport.read(folder / "models", folder / "reports")


def texts(figure) -> str:
    """All that is written in a figure."""
    found = [text.get_text() for axes in figure.axes for text in [*axes.texts, *axes.get_legend().get_texts()]]
    return "\n".join(found + [axes.get_title(loc="left") for axes in figure.axes])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write_run(folder, steps=200, met={"batch": 195, "corpus": 200})
    return folder


@pytest.fixture(scope="module")
def pictures(finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_figures(read_run(finished), folder)
    return folder


def test_the_same_run_gives_the_same_bytes(finished, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "xtick.labelsize", 30)  # a user's matplotlibrc
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    write_figures(read_run(finished), tmp_path)
    for name in FIGURES:
        picture = (pictures / f"{name}.png").read_bytes()
        assert picture == (tmp_path / f"{name}.png").read_bytes()
        assert len(picture) < 100_000  # they are committed
        assert b"matplotlib" not in picture.lower()


def test_times_show_in_the_figure_of_speed_alone(pictures, tmp_path):
    write_run(tmp_path, steps=200, met={"batch": 195, "corpus": 200}, step_s=0.2)  # twice as slow
    write_figures(read_run(tmp_path), tmp_path)
    names = [f"{name}.png" for name in FIGURES]
    differing = [name for name in names if (pictures / name).read_bytes() != (tmp_path / name).read_bytes()]
    assert differing == ["speed.png"]


@pytest.mark.parametrize("steps", [1, 30])
def test_short_runs_that_met_no_rule_are_drawn_too(steps, tmp_path):
    write_run(tmp_path, steps, met={}, clip=None)
    report = read_run(tmp_path)
    write_figures(report, tmp_path / "figures")
    write_tables(report, tmp_path / "plots")
    for name in FIGURES:
        pixels = image.imread(tmp_path / f"figures/{name}.png")
        assert pixels.shape[1] == 880  # a README's width
        assert pixels.min() < 0.1 < 0.9 < pixels.mean()  # dark signs on white
    assert "target 0.1\nnot reached" in texts(loss_figure(report))


def test_each_rule_that_was_met_is_marked_at_its_step(finished):
    figure = loss_figure(read_run(finished))
    notes = figure.get_supxlabel().split("\n")
    assert notes == ["batch rule met: step 195, 49.9k tokens", "corpus rule met: step 200, 51.2k tokens"]
    (marks,) = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert marks == [[195, 0.1], [200, 0.1]]


def test_the_mean_runs_over_a_fiftieth_of_a_short_run_and_at_most_over_the_rules_steps(finished, tmp_path):
    assert "mean of 4 steps" in texts(loss_figure(read_run(finished)))
    write_run(tmp_path, steps=6000, met={})
    assert read_run(tmp_path).mean_steps == 100  # target.average_steps


def test_the_clip_is_drawn_where_there_is_one(finished, tmp_path):
    def levels(report: RunReport) -> list[str]:
        return [text.get_text() for text in training_figure(report).axes[0].texts]

    assert levels(read_run(finished)) == ["clip at 1"]
    write_run(tmp_path, steps=2, met={}, clip=None)
    assert levels(read_run(tmp_path)) == []


def test_tables_hold_the_journal_by_step(finished, tmp_path):
    write_tables(read_run(finished), tmp_path)
    steps = pd.read_csv(tmp_path / "steps.csv", index_col="step")
    assert list(steps.columns) == ["tokens", "loss", "grad_norm", "lr"]
    assert steps.loc[200, "loss"] == pytest.approx(0.09)
    assert list(pd.read_csv(tmp_path / "checks.csv")["step"]) == list(range(10, 201, 10))
    assert pd.read_csv(tmp_path / "position_loss.csv").iloc[0].tolist() == [1, 1.0]  # positions count from 1


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"steps.jsonl holds no steps"):
        read_run(tmp_path)
