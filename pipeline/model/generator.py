"""generate: prompts -> text, token by token, the same for a seed, never past the length that the model was trained on.

A text longer than that slides: the model sees at least its last half length, and more until it is full again. It ends
where the model draws <|endoftext|>, which parts the documents that it has learnt.
"""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pipeline.config.sections import TrainConfig
from pipeline.data.corpus_index import CorpusIndex
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.model.decoder import Cache, Decoder, Precision
from pipeline.model.gpt import GPT
from pipeline.model.sampling import Sampling, draw
from pipeline.model.weights import load_model
from pipeline.system.device import prepare_machine
from pipeline.system.errors import InputError

PROMPT_CHARACTERS = 1_000_000  # at most
Finish: TypeAlias = Literal["length", "stop", "end"]  # max_tokens, a stop text, or the end of a document
MOST_GUESSES = 8  # tokens; to check so many takes little longer than to compute one


class Piece(NamedTuple):
    """What one sequence gained in one step."""

    sequence: int  # which of the prompts
    ids: list[int]
    text: str  # whole characters only, and nothing that may turn out to begin a stop text: it may be empty
    finished: Finish | None
    notice: str | None  # what a reader ought to be told, once


class Continuation:
    """One sequence while it is written, as ids and as rows of the model's vocabulary."""

    def __init__(self, number: int, ids: list[int], rows: list[int], sampling: Sampling) -> None:
        self.number, self.ids, self.rows = number, ids, rows
        self.length = len(ids) + sampling.max_tokens  # at the end
        self.generator = torch.Generator().manual_seed((sampling.seed + number) % 2**63)
        self.text = TextStream(sampling.stop)
        self.start = -1  # where the context begins that the cache holds; -1: it holds none
        self.guesses: list[int] = []  # rows that may come next
        self.trust = MOST_GUESSES  # how many guesses are worth checking
        self.slid, self.ended = False, False
        self.notice: str | None = None

    @property
    def n_context(self) -> int:
        """Tokens in the context, the last of which the model may not have read."""
        return len(self.rows) - self.start

    @property
    def finished(self) -> Finish | None:
        if self.text.stopped or self.ended:
            return "stop" if self.text.stopped else "end"
        return "length" if len(self.ids) == self.length else None


class Generator:
    """A model, ready to write; several threads may use it at once.

    `corpus`: the text that it has learnt. How that goes on is guessed, and several guesses are checked in one pass: it
    is faster where the model recites, and changes nothing that is written (Leviathan et al. 2023; Saxena 2023). So in
    fp32; in bf16 the last bit of a product depends on how many tokens are read at once, by guesses or by a batch, and
    decides now and then between two tokens that are all but equally likely.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, corpus: CorpusIndex | None = None, precision: Precision = "fp32"
    ) -> None:
        self.decoder, self.tokenizer, self.corpus = Decoder(model, precision), tokenizer, corpus
        self.trained_length, self.vocabulary = model.trained_length, model.vocabulary

    def stream(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[Piece]:
        """Continue all prompts at once; sequence i draws with `sampling.seed` + i, as it would alone.

        Raises InputError for a prompt that is too long to read.
        """
        sequences = [self._begin(number, prompt, sampling) for number, prompt in enumerate(prompts)]
        yield from (Piece(each.number, [], "", "length", None) for each in sequences if each.finished)
        cache = self.decoder.new_cache(len(sequences), max((each.length for each in sequences), default=0))
        while writing := [i for i, sequence in enumerate(sequences) if not sequence.finished]:
            if len(writing) < len(sequences):
                sequences = [sequences[i] for i in writing]
                cache.select(writing)
            for sequence, logits in zip(sequences, self._read(sequences, cache), strict=True):
                yield self._write(sequence, logits, sampling)

    def text(self, prompt: str, sampling: Sampling) -> str:
        """The prompt with its continuation."""
        return prompt + "".join(piece.text for piece in self.stream([prompt], sampling))

    def next_tokens(self, prompt: str) -> Tensor:
        """Probability of each id to be the next, (50257,), at temperature 1; 0 for those that are never written."""
        rows = self._rows(self._encode(prompt))
        context = rows[context_start(len(rows), self.trained_length) :]
        hidden = self.decoder.prefill(context[None], self.decoder.new_cache(1), [0])  # (1, T, C)
        of_rows = self.decoder.logits(hidden[0, -1]).softmax(dim=0).cpu()  # (V,)
        of_ids, used = torch.zeros(self.vocabulary.size), self.vocabulary.used
        of_ids[used] = of_rows[: len(used)]
        return of_ids[: self.tokenizer.n_vocab]

    def token_losses(self, ids: Sequence[int]) -> list[float]:
        """Loss of each of `ids` but the first, in nats, in windows of the trained length."""
        rows, losses = self._rows(ids), []
        for begin in range(0, len(rows) - 1, self.trained_length):
            window = rows[begin : begin + self.trained_length + 1]
            hidden = self.decoder.prefill(window[None, :-1], self.decoder.new_cache(1), [0])  # (1, T, C)
            losses += self.decoder.losses(hidden[0], window[1:]).tolist()
        return losses

    def _begin(self, number: int, prompt: str, sampling: Sampling) -> Continuation:
        ids = self._encode(prompt)
        sequence = Continuation(number, ids, self._rows(ids).tolist(), sampling)
        if len(ids) > self.trained_length:
            sequence.notice = f"the prompt has {len(ids):,} tokens, and {self._sight()}"
        return sequence

    def _read(self, sequences: list[Continuation], cache: Cache) -> list[Tensor]:
        """Have the model read what it has not: logits (1 + guesses or more, V) of each sequence, on the CPU."""
        begun = [i for i, sequence in enumerate(sequences) if self._begins_anew(sequence)]
        logits: dict[int, Tensor] = {}
        if going_on := [sequence for i, sequence in enumerate(sequences) if i not in begun]:
            room = cache.limit - max(sequence.n_context for sequence in going_on)
            for sequence in going_on:
                sequence.guesses = self._guess(sequence, room)
            rows = _padded([[sequence.rows[-1], *sequence.guesses] for sequence in sequences])
            kept = [0 if i in begun else sequence.n_context - 1 for i, sequence in enumerate(sequences)]
            hidden = self.decoder.extend(self._to_device(rows), kept, cache)  # (B, T, C)
            logits |= enumerate(self.decoder.logits(hidden).cpu())
        if begun:
            contexts = [sequences[i].rows[sequences[i].start :] for i in begun]
            hidden = self.decoder.prefill(self._to_device(_padded(contexts)), cache, begun)  # (B, T, C)
            last = torch.stack([of_one[len(rows) - 1] for of_one, rows in zip(hidden, contexts, strict=True)])
            logits |= zip(begun, self.decoder.logits(last[:, None]).cpu(), strict=True)
        return [logits[i] for i in range(len(sequences))]

    def _begins_anew(self, sequence: Continuation) -> bool:
        """Whether the sequence's context is not that of which the cache holds a part."""
        start = context_start(len(sequence.rows), self.trained_length)
        anew, slides = start != sequence.start, start > max(sequence.start, 0)
        if slides and not sequence.slid and sequence.start >= 0:
            sequence.notice = f"the text is longer than the model can see: {self._sight()}"
        sequence.start, sequence.slid = start, sequence.slid or slides
        sequence.guesses = []
        return anew

    def _guess(self, sequence: Continuation, room: int) -> list[int]:
        """Up to `room` rows that may come next, as the corpus goes on."""
        n = min(sequence.trust, room, sequence.length - len(sequence.ids) - 1)
        if self.corpus is None or n <= 0:
            return []
        guesses: list[int] = self._rows(self.corpus.draft(sequence.ids[-self.trained_length :], n)).tolist()
        return guesses

    def _write(self, sequence: Continuation, logits: Tensor, sampling: Sampling) -> Piece:
        """Draw the next token, and those after it as long as the guesses come true."""
        before, text = len(sequence.ids), ""
        for one, guess in zip(logits, [*sequence.guesses, None], strict=False):
            row = draw(one, sampling, sequence.rows, sequence.generator)
            token = int(self.vocabulary.used[row])
            if token == self.tokenizer.eot:  # it is no text
                sequence.ended, sequence.notice = True, "the model has ended its document"
                text += sequence.text.add(b"", last=True)
                break
            sequence.rows.append(row)
            sequence.ids.append(token)
            last = len(sequence.ids) == sequence.length
            text += sequence.text.add(self.tokenizer.decode_bytes(sequence.ids[-1:]), last)
            if sequence.finished or row != guess:
                break
        new = sequence.ids[before:]
        if sequence.guesses:
            sequence.trust = min(2 * len(new) - 1, MOST_GUESSES)
        notice, sequence.notice = sequence.notice, None
        return Piece(sequence.number, new, text, sequence.finished, notice)

    def _encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; an empty one begins with <|endoftext|>, as GPT-2's own does."""
        if len(prompt) > PROMPT_CHARACTERS:
            raise InputError(f"a prompt has {len(prompt):,} characters: {PROMPT_CHARACTERS:,} at most")
        return self.tokenizer.encode(prompt) or [self.tokenizer.eot]

    def _rows(self, ids: Sequence[int]) -> Tensor:
        return self._to_device(self.vocabulary.fold(torch.tensor(ids, dtype=torch.int64)))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.decoder.wte.device)

    def _sight(self) -> str:
        half = self.trained_length // 2
        return f"it sees the last {half} to {self.trained_length} tokens, as many as it was trained on"


def context_start(n: int, trained_length: int) -> int:
    """Where the context of `n` tokens begins: all, or else the last of them, more than half the trained length."""
    half = max(1, trained_length // 2)
    return -(-max(0, n - trained_length) // half) * half


def _padded(rows: list[list[int]]) -> Tensor:
    """Split of unequal lengths, (B, T), with row 0 behind the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([each + [0] * (width - len(each)) for each in rows])


def load_generator(folder: Path) -> Generator:
    """Load what a registered version holds, `folder`/model and `folder`/tokens, onto the best device there is.

    Raises ModelMissing, or IntegrityError where a byte of them is not as it was written.
    """
    tokens = TokenFolder(folder / "tokens").train
    model, tokenizer = load_model(folder / "model", tokens.counts()), load_tokenizer(folder / "model")
    machine = prepare_machine(
        TrainConfig(
            seed=0,
            device="auto",
            precision="auto",
            threads="auto",
            deterministic=False,
            compile=False,
            gradient_checkpointing=False,
            shard=False,
            processes=1,
        )
    )
    return Generator(model.to(machine.device), tokenizer, CorpusIndex.of(tokens), machine.precision)


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
