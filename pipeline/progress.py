"""progress: step records -> a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

from pipeline.journal import StepRow

LINE_EVERY_S = 10.0


class Progress:
    """Shows loss, target, tokens/s and the time left to the end of the schedule."""

    def __init__(self, first_step: int, max_steps: int, target_loss: float) -> None:
        self.max_steps, self.target_loss = max_steps, target_loss
        self._bar = tqdm(total=max_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty())
        self._line_due = 0.0
        self._tokens_per_s = 0.0

    def show(self, row: StepRow, step_tokens: int, step_s: float, last: bool) -> None:
        """Tell of a step that took `step_s` seconds for `step_tokens` tokens."""
        speed = step_tokens / step_s
        self._tokens_per_s = 0.9 * self._tokens_per_s + 0.1 * speed if self._tokens_per_s else speed
        corpus = f", corpus loss {row['corpus_loss']:.4f}" if "corpus_loss" in row else ""
        words = f"loss {row['loss']:.4f}{corpus}, target {self.target_loss:g}, {self._tokens_per_s:,.0f} tokens/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update()
        elif last or corpus or time.monotonic() >= self._line_due:
            left_s = (self.max_steps - row["step"]) * step_tokens / self._tokens_per_s
            print(f"step {row['step']}/{self.max_steps}: {words}, at most {left_s:.0f} s left", flush=True)
            self._line_due = time.monotonic() + LINE_EVERY_S

    def close(self) -> None:
        self._bar.close()
