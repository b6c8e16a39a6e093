"""progress: a run's rows -> a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Final, Literal, Self

from tqdm import tqdm

from pipeline.system.signals import mute_closed_terminal
from pipeline.tracking.journal import StepRow, TimeRow

LINE_EVERY_S = 10.0
LOOKS: Final[dict[str, Literal["corpus_loss", "validation_loss"]]] = {
    "corpus": "corpus_loss", "validation": "validation_loss",
}  # fmt: skip


class Progress:
    """Shows loss, target, tokens/s and the time left to the end of the schedule, from step and tokens so far on."""

    def __init__(self, step: int, tokens: int, max_steps: int, target_loss: float) -> None:
        self.max_steps, self.target_loss = max_steps, target_loss
        self._bar = tqdm(total=max_steps, initial=step, unit="step", disable=not sys.stderr.isatty())
        self._line_due = 0.0
        self._tokens = tokens
        self._tokens_per_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        mute_closed_terminal()  # what else the run has to say must not end it

    def show(self, row: StepRow, times: TimeRow) -> None:
        """Tell of a step; of one that looked at a whole text, as the last one does, always."""
        step_tokens, self._tokens = row["tokens"] - self._tokens, row["tokens"]
        speed = step_tokens / times["step_s"]
        self._tokens_per_s = 0.9 * self._tokens_per_s + 0.1 * speed if self._tokens_per_s else speed
        looks = [f", {name} loss {row[key]:.4f}" for name, key in LOOKS.items() if key in row]
        words = (
            f"loss {row['loss']:.4f}{''.join(looks)}, target {self.target_loss:g}, {self._tokens_per_s:,.0f} tokens/s"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update()
        elif looks or time.monotonic() >= self._line_due:
            left_s = (self.max_steps - row["step"]) * step_tokens / self._tokens_per_s
            print(f"step {row['step']}/{self.max_steps}: {words}, at most {left_s:.0f} s left", flush=True)
            self._line_due = time.monotonic() + LINE_EVERY_S
