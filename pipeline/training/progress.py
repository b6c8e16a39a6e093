"""Show the progress of a run: a bar on a terminal, otherwise a line every ten seconds and at each evaluation.

A trial of a study has a line every minute.
"""

import sys
import time

from tqdm import tqdm

from pipeline.system.signals import mute_closed_terminal
from pipeline.tracking.journal import EVALUATED_LOSSES, StepRecord

LINE_EVERY_S, TRIAL_LINE_EVERY_S = 10.0, 60.0


class Progress:
    """Show loss, target, tokens/s and the time to the end of the schedule, starting after `step` and `tokens`.

    `trial` is the name of a trial, whose lines begin with it: several trials may share a terminal, and have no bars.
    Its first line follows after a minute.
    """

    def __init__(self, step: int, tokens: int, max_steps: int, target_loss: float, trial: str = "") -> None:
        self.max_steps, self.target_loss, self._trial = max_steps, target_loss, trial
        self._bar = tqdm(total=max_steps, initial=step, unit="step", disable=bool(trial) or not sys.stderr.isatty())
        self._tokens, self._tokens_per_s = tokens, 0.0
        self._interval_s = TRIAL_LINE_EVERY_S if trial else LINE_EVERY_S
        self._line_due = time.monotonic() + self._interval_s if trial else 0.0

    def close(self) -> None:
        self._bar.close()
        mute_closed_terminal()  # further output must not end the run

    def show(self, record: StepRecord) -> None:
        """Show a step. Outside of a study, a step with an evaluation always gets a line."""
        step_tokens, self._tokens = record.tokens - self._tokens, record.tokens
        speed = step_tokens / record.step_s
        self._tokens_per_s = 0.9 * self._tokens_per_s + 0.1 * speed if self._tokens_per_s else speed
        losses = {name.replace("_", " "): getattr(record, name) for name in EVALUATED_LOSSES}
        losses["estimate"] = record.loss_estimate
        measured = "".join(f", {name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        words = f"loss {record.loss:.4f}{measured}, target {self.target_loss:g}, {self._tokens_per_s:,.0f} tokens/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update()
        elif (measured and not self._trial) or time.monotonic() >= self._line_due:
            left_s = (self.max_steps - record.step) * step_tokens / self._tokens_per_s
            name = f"{self._trial}: {record.tokens:,} tokens, " if self._trial else ""
            print(f"{name}step {record.step}/{self.max_steps}: {words}, at most {left_s:.0f} s left", flush=True)
            self._line_due = time.monotonic() + self._interval_s
