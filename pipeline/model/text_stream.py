"""text_stream: the bytes of tokens -> text that can be shown at once: whole characters, nothing of a stop text."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Text that is written token by token, up to the first of the stop texts."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, data: bytes, last: bool = False) -> str:
        """Take bytes and return what can be shown of the text now; `last`: nothing comes after them."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data, final=last)
        places = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        self.stopped = bool(places)
        shown = min(places) if places else len(self._held) - (0 if last else self._begun())
        text, self._held = self._held[:shown], self._held[shown:]
        return text

    def _begun(self) -> int:
        """How many of the last characters may turn out to begin a stop text."""
        return max((n for text in self._stop for n in range(len(text)) if self._held.endswith(text[:n])), default=0)
