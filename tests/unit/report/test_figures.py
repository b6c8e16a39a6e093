"""The figures and tables of a run: their content, and the same bytes for the same run."""

from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from pipeline.report import style
from pipeline.report.figures import FIGURES, RunReport, loss_figure, position_figure, training_figure, write_figures
from pipeline.report.tables import write_tables

STEP_TOKENS = 256


def report_of(n_steps: int, met: dict[str, int], clip: float | None = 1.0, step_s: float = 0.1) -> RunReport:
    """A run whose loss falls from ln 50,257 to 0.09, evenly on a logarithmic scale."""
    step = np.arange(1, n_steps + 1)
    loss = 10.82 * (0.09 / 10.82) ** (step / n_steps)
    steps = {"step": step, "tokens": step * STEP_TOKENS, "loss": loss, "grad_norm": 1 + 9 / step, "lr": 1e-3 / step}
    steps["corpus_loss"] = np.where((step % 10 == 0) | (step == n_steps), loss, np.nan)
    times = {"step": step, "step_s": step_s, "memory_bytes": 2**30}
    reached = {rule: {"steps": step, "tokens": step * STEP_TOKENS} for rule, step in met.items()}
    to_target = {"batch": None, "average": None, "corpus": None} | reached
    optim = {"name": "muon", "lr": 0.002, "muon_lr": 0.01, "max_grad_norm": clip}
    run = {"params": {"optim": optim, "target": {"average_steps": 100}}}
    run["results"] = {
        "loss": 0.09,
        "bits_per_byte": 0.0393,
        "rule": "corpus",
        "target_loss": 0.1,
        "to_target": to_target,
    }
    timing = {"tokens_per_s": STEP_TOKENS / step_s, "mfu": "unknown", "train_s": 10.0, "peak_memory_bytes": 2**30}
    return RunReport(pd.DataFrame(steps), pd.DataFrame(times), run, [1 / n for n in range(1, 65)], timing)


def texts(figure) -> str:
    """All texts of a figure."""
    found = [text.get_text() for axes in figure.axes for text in [*axes.texts, *axes.get_legend().get_texts()]]
    return "\n".join(found + [axes.get_title(loc="left") for axes in figure.axes])


@pytest.fixture(scope="module")
def finished() -> RunReport:
    return report_of(200, {"batch": 195, "corpus": 200})


def test_a_repeated_run_gives_the_same_bytes_except_for_its_speed(finished, tmp_path, monkeypatch):
    write_figures(finished, tmp_path / "one")
    monkeypatch.setitem(matplotlib.rcParams, "xtick.labelsize", 30)  # a user's matplotlibrc
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    write_figures(report_of(200, {"batch": 195, "corpus": 200}, step_s=0.2), tmp_path / "two")
    one, two = ({name: (tmp_path / n / f"{name}.png").read_bytes() for name in FIGURES} for n in ("one", "two"))
    assert [name for name in FIGURES if one[name] != two[name]] == ["speed"]
    for picture in one.values():
        assert len(picture) < 100_000  # they are committed
        assert b"matplotlib" not in picture.lower()


def test_a_run_of_one_step_that_met_no_rule_has_figures_too(tmp_path):
    report = report_of(1, {}, clip=None)
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
    assert "Loss 0.09 (0.0393 bits per byte, corpus rule)" in texts(figure)
    assert "1 is 0.437 bits per byte" in figure.axes[0].get_ylabel()
    assert "mean of 4 steps" in texts(figure)  # a fiftieth of a short run
    assert replace(finished, steps=pd.concat([finished.steps] * 30)).mean_steps == 100  # target.average_steps
    assert [text.get_text() for text in training_figure(finished).axes[0].texts] == ["clip at 1"]
    assert "not reached" not in texts(figure)
    assert "target 0.1\nnot reached" in texts(loss_figure(report_of(200, {"batch": 195})))  # by the rule of the run


def overfitted(n_steps: int = 200, best: int = 120, **results) -> RunReport:
    """A run whose held-out loss is lowest, 2.0, at `best`, with an evaluation at every twentieth step."""
    report = report_of(n_steps, {})
    step = report.steps["step"]
    loss = 2 + ((step - best) / 100) ** 2
    held_out = report.steps.assign(validation_loss=loss.where(step % 20 == 0)).set_index("step", drop=False)
    run = report.run | {"results": report.run["results"] | {"rule": "validation", **results}}
    return replace(report, steps=held_out, run=run)


def test_the_loss_figure_shows_overfitting_and_what_early_stopping_saved():
    figure = loss_figure(overfitted(max_steps=1000))
    notes = figure.get_supxlabel().split("\n")
    assert notes == [
        "lowest held-out loss 2.0000 at step 120; 2.6400 at step 200",
        "early stopping saved 800 of 1,000 steps",
    ]
    (curve,) = [line for line in figure.axes[0].lines if line.get_label() == "held out"]
    assert (curve.get_linestyle(), list(curve.get_xdata())) == ("-", list(range(20, 201, 20)))
    (mark,) = [line.get_xdata() for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert list(mark) == [120, 120]
    assert "step 120: 2.000" in texts(figure)
    assert "after 200 steps" in texts(figure)
    assert "after 120 of 200 steps" in texts(loss_figure(overfitted(model_step=120)))  # of which the model is
    for whole in (overfitted(max_steps=200), overfitted(), overfitted(max_steps=1000, to_target={
        "validation": {"steps": 200, "tokens": 51_200}
    })):  # fmt: skip
        assert "early stopping" not in loss_figure(whole).get_supxlabel()


def test_the_losses_of_the_training_text_have_no_bits_per_byte_of_the_held_out_text(finished):
    labels = [position_figure(report).axes[0].get_ylabel() for report in (finished, overfitted())]
    assert labels == ["loss (nats per token; 1 is 0.437 bits per byte)", "loss (nats per token)"]


def test_a_logarithmic_axis_has_at_least_two_ticks():
    for low in np.geomspace(0.05, 12, 25):
        for ratio in (1.1, 1.3, 1.6, 2, 3, 5, 100):
            axes = Figure().subplots()
            axes.plot([low, low * ratio])
            style.log_scale(axes)
            bottom, top = axes.get_ylim()
            ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
            assert 1 < len(ticks) < 13, (low, ratio, ticks)


def test_a_short_number_has_the_unit_that_it_has_after_rounding():
    assert [style.short(n) for n in (512, 49_920, 999_949, 999_999, 16_100_000)] == [
        "512",
        "49.9k",
        "1M",
        "1M",
        "16.1M",
    ]


def test_tables_hold_the_journal_by_step(finished, tmp_path):
    write_tables(finished, tmp_path)
    steps = pd.read_csv(tmp_path / "steps.csv", index_col="step")
    assert list(steps.columns) == ["tokens", "loss", "grad_norm", "lr"]
    assert steps.loc[200, "loss"] == pytest.approx(0.09)
    assert list(pd.read_csv(tmp_path / "checks.csv")["step"]) == list(range(10, 201, 10))
    assert pd.read_csv(tmp_path / "position_loss.csv").iloc[0].tolist() == [1, 1.0]  # positions count from 1
