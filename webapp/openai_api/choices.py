"""Turn the updates of a request into the choices of OpenAI's answer."""

from collections.abc import Sequence
from typing import Any

from pipeline.data.tokenizer import EOT, Tokenizer, whole_length
from pipeline.model.generator import Finish, Piece, TokenLogprob
from webapp.engine import Scores

REASONS: dict[Finish, str] = {"length": "length", "stop": "stop", "end": "stop"}


class Choice:
    """One choice. `take` returns what has been added since its last call, for a stream; `whole` is everything."""

    def __init__(self, index: int, tokenizer: Tokenizer, echoed: str | None, reports: bool) -> None:
        """`echoed`: the prompt, if it is returned; `reports`: with log-probabilities."""
        self._index, self._tokenizer, self._reports = index, tokenizer, reports
        self._text = echoed or ""
        self._n_characters = 0  # of the reported tokens, the prompt's included if it is echoed
        self._bytes = b""  # the beginning of a character
        self._pending: list[tuple[int, TokenLogprob]] = []  # offset in the text, and token
        self._taken = 0  # characters
        self._changed = bool(echoed)
        self._finish: Finish | None = None
        self.n_tokens = 0

    def add(self, update: Piece | Scores) -> None:
        if isinstance(update, Piece):
            if not self.n_tokens:  # the new text is decoded by itself, without bytes of the prompt
                self._bytes = b""
            self._text += update.text
            self.n_tokens += len(update.ids) + (update.finished == "end")
            self._finish = update.finished
        for token in update.logprobs:
            data = b"" if token.id == self._tokenizer.eot else self._tokenizer.decode_bytes([token.id])
            begun = len((self._bytes + data[:1]).decode("utf-8", errors="replace"))  # the token is in the last of these
            self._pending.append((self._n_characters + max(0, begun - 1), token))
            self._bytes += data
            whole = whole_length(self._bytes)
            self._n_characters += len(self._bytes[:whole].decode("utf-8", errors="replace"))
            self._bytes = self._bytes[whole:]
        self._changed = True

    def take(self) -> dict[str, Any] | None:
        """A choice with the new text, and the tokens that begin in it; None if there is nothing new."""
        if not self._changed:
            return None
        final = self._finish is not None
        until = len(self._text) if not final or self._finish == "stop" else float("inf")
        ready = [token for token in self._pending if token[0] < until]
        text, self._taken = self._text[self._taken :], len(self._text)
        self._pending = [] if final else self._pending[len(ready) :]
        self._changed = False
        if not (text or ready or final):
            return None
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(ready) if self._reports else None,
            "finish_reason": REASONS[self._finish] if self._finish else None,
        }

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprob]]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.id) for _, token in tokens],
            "token_logprobs": [token.logprob for _, token in tokens],
            "top_logprobs": [self._top(token) for _, token in tokens],
            "text_offset": [offset for offset, _ in tokens],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        """The most likely tokens and, as OpenAI does it, the token itself."""
        if token.logprob is None:
            return None
        return {self._name(i): logprob for i, logprob in (*token.top, (token.id, token.logprob))}

    def _name(self, token: int) -> str:
        """A token as text; a part of a character as bytes:\\x.., so that no two tokens have the same name."""
        if token == self._tokenizer.eot:
            return EOT
        data = self._tokenizer.decode_bytes([token])
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
