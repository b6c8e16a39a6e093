"""Generate text from prompts, token by token, the same for a seed, within the length that the model was trained on.

The context of a longer text slides: the model sees at least the last half of the trained length, and more until it is
full again. A text ends where the model samples the end-of-text token, which separates the documents that it was trained
on.
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
from pipeline.model.decoder import Decoder, KVCache, Precision
from pipeline.model.gpt import GPT
from pipeline.model.prompt_lookup import PromptLookup
from pipeline.model.sampling import Sampling, sample
from pipeline.model.weights import load_model
from pipeline.system.device import prepare_machine
from pipeline.system.errors import InputError

PROMPT_CHARACTERS = 1_000_000  # at most
Finish: TypeAlias = Literal["length", "stop", "end"]  # max_tokens, a stop text, or the end of a document
AUTO = TrainConfig(
    seed=0, device="auto", precision="auto", threads="auto", deterministic=False, compile=False,
    gradient_checkpointing=False, shard=False, processes=1,
)  # fmt: skip


class Piece(NamedTuple):
    """What one sequence gained in one step."""

    sequence: int  # which of the prompts
    ids: list[int]
    text: str  # whole characters only, and nothing that may turn out to begin a stop text: it may be empty
    finished: Finish | None
    notice: str | None  # what a reader ought to be told, once


class Continuation:
    """One sequence while it is generated, as ids and as the model's compact ids."""

    def __init__(
        self, number: int, ids: list[int], compact_ids: list[int], sampling: Sampling, corpus: CorpusIndex | None
    ) -> None:
        self.number, self.ids, self.compact_ids = number, ids, compact_ids
        self.length = len(ids) + sampling.max_tokens  # at the end
        self.generator = torch.Generator().manual_seed((sampling.seed + number) % 2**63)
        self.text = TextStream(sampling.stop)
        self.lookup = PromptLookup(corpus)
        self.draft: list[int] = []  # compact ids to be verified
        self.start = -1  # where the context begins that the cache holds, but for its last token; -1: it holds none
        self.ended = False
        self.notice: str | None = None

    @property
    def n_context(self) -> int:
        """Tokens in the context, the last of which the model may not have read."""
        return len(self.compact_ids) - self.start

    @property
    def finished(self) -> Finish | None:
        if self.text.stopped or self.ended:
            return "stop" if self.text.stopped else "end"
        return "length" if len(self.ids) == self.length else None


class Generator:
    """A model with its tokenizer; several threads may use it at the same time.

    `corpus`: the training text, for prompt-lookup decoding.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, corpus: CorpusIndex | None = None, precision: Precision = "fp32"
    ) -> None:
        self.decoder, self.tokenizer, self.corpus = Decoder(model, precision, tokenizer.n_vocab), tokenizer, corpus
        self.trained_length, self.vocabulary = model.trained_length, model.vocabulary

    def stream(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[Piece]:
        """Continue all prompts at once; sequence i samples with `sampling.seed` + i, as it would alone.

        Raises InputError for a prompt that is too long to read.
        """
        sequences = [self._begin(number, prompt, sampling) for number, prompt in enumerate(prompts)]
        yield from (Piece(each.number, [], "", "length", None) for each in sequences if each.finished)
        cache = self.decoder.new_cache(len(sequences), max((each.length for each in sequences), default=0))
        while unfinished := [i for i, sequence in enumerate(sequences) if not sequence.finished]:
            if len(unfinished) < len(sequences):
                sequences = [sequences[i] for i in unfinished]
                cache.select(unfinished)
            for sequence, logits in zip(sequences, self._read(sequences, cache), strict=True):
                yield self._write(sequence, logits, sampling)

    def text(self, prompt: str, sampling: Sampling) -> str:
        """The prompt with its continuation."""
        return prompt + "".join(piece.text for piece in self.stream([prompt], sampling))

    def next_tokens(self, prompt: str) -> Tensor:
        """Probability of each id to be the next, (n_vocab,), at temperature 1; 0 for those that are never sampled."""
        compact_ids = self._fold(self._encode(prompt))
        context = compact_ids[context_start(len(compact_ids), self.trained_length) :]
        hidden = self.decoder.prefill(context[None], self.decoder.new_cache(1), [0])  # (1, T, C)
        probabilities = self.decoder.logits(hidden[0, -1]).softmax(dim=0).cpu()  # (V,)
        of_ids, used = torch.zeros(self.vocabulary.size), self.vocabulary.used
        of_ids[used] = probabilities[: len(used)]
        return of_ids[: self.tokenizer.n_vocab]

    def token_losses(self, ids: Sequence[int]) -> list[float]:
        """Loss of each of `ids` but the first, in nats, in windows of the trained length."""
        compact_ids, losses = self._fold(ids), []
        for begin in range(0, len(compact_ids) - 1, self.trained_length):
            window = compact_ids[begin : begin + self.trained_length + 1]
            hidden = self.decoder.prefill(window[None, :-1], self.decoder.new_cache(1), [0])  # (1, T, C)
            losses += self.decoder.losses(hidden[0], window[1:]).tolist()
        return losses

    def _begin(self, number: int, prompt: str, sampling: Sampling) -> Continuation:
        ids = self._encode(prompt)
        sequence = Continuation(number, ids, self._fold(ids).tolist(), sampling, self.corpus)
        if len(ids) > self.trained_length:
            sequence.notice = f"the prompt has {len(ids):,} tokens, and {self._sight()}"
        return sequence

    def _read(self, sequences: list[Continuation], cache: KVCache) -> list[Tensor]:
        """Logits (1 + draft tokens or more, V) after each sequence's last token and its draft, on the CPU."""
        begun = [i for i, sequence in enumerate(sequences) if self._begins_context(sequence)]
        logits: dict[int, Tensor] = {}
        if extended := [sequence for i, sequence in enumerate(sequences) if i not in begun]:
            room = cache.limit - max(sequence.n_context for sequence in extended)
            for sequence in extended:
                context = sequence.ids[-self.trained_length :]
                draft = sequence.lookup.draft(context, min(room, sequence.length - len(sequence.ids) - 1))
                sequence.draft = self._fold(draft).tolist()
            new = self._padded([[sequence.compact_ids[-1], *sequence.draft] for sequence in sequences])
            lengths = [0 if i in begun else sequence.n_context - 1 for i, sequence in enumerate(sequences)]
            logits |= enumerate(self.decoder.logits(self.decoder.extend(new, lengths, cache)).cpu())  # (B, T, V)
        if begun:
            contexts = [sequences[i].compact_ids[sequences[i].start :] for i in begun]
            hidden = self.decoder.prefill(self._padded(contexts), cache, begun)  # (B, T, C)
            last = torch.stack([of_one[len(ids) - 1] for of_one, ids in zip(hidden, contexts, strict=True)])  # (B, C)
            logits |= zip(begun, self.decoder.logits(last[:, None]).cpu(), strict=True)
        return [logits[i] for i in range(len(sequences))]

    def _begins_context(self, sequence: Continuation) -> bool:
        """Move the start of the sequence's context; return whether it is not the one that the cache holds."""
        before = sequence.start
        sequence.start, sequence.draft = context_start(len(sequence.compact_ids), self.trained_length), []
        if before == 0 < sequence.start:
            sequence.notice = f"the text is longer than the model can see: {self._sight()}"
        return sequence.start != before

    def _write(self, sequence: Continuation, logits: Tensor, sampling: Sampling) -> Piece:
        """Sample the next token, and those after it as long as the draft is accepted."""
        before, text = len(sequence.ids), ""
        for one, drafted in zip(logits, [*sequence.draft, None], strict=False):
            compact_id = sample(one, sampling, sequence.compact_ids, sequence.generator)
            token = int(self.vocabulary.used[compact_id])
            if token == self.tokenizer.eot:  # it is no text
                sequence.ended, sequence.notice = True, "the model has ended its document"
                text += sequence.text.add(b"", last=True)
                break
            sequence.compact_ids.append(compact_id)
            sequence.ids.append(token)
            last = len(sequence.ids) == sequence.length
            text += sequence.text.add(self.tokenizer.decode_bytes([token]), last)
            if sequence.finished or compact_id != drafted:
                break
        new = sequence.ids[before:]
        if sequence.draft:
            sequence.lookup.adapt(len(new) - 1)
        notice, sequence.notice = sequence.notice, None
        return Piece(sequence.number, new, text, sequence.finished, notice)

    def _encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; an empty one begins with the end of text, as GPT-2's own does."""
        if len(prompt) > PROMPT_CHARACTERS:
            raise InputError(f"a prompt has {len(prompt):,} characters: {PROMPT_CHARACTERS:,} at most")
        return self.tokenizer.encode(prompt) or [self.tokenizer.eot]

    def _fold(self, ids: Sequence[int]) -> Tensor:
        return self.vocabulary.fold(torch.tensor(ids, dtype=torch.int64)).to(self.decoder.wte.device)

    def _padded(self, compact_ids: list[list[int]]) -> Tensor:
        """Lists of unequal lengths as one tensor, (B, T), with zeros behind the shorter ones."""
        width = max(map(len, compact_ids))
        return torch.tensor([each + [0] * (width - len(each)) for each in compact_ids], device=self.decoder.wte.device)

    def _sight(self) -> str:
        half = self.trained_length // 2
        return f"it sees the last {half} to {self.trained_length} tokens, as many as it was trained on"


def context_start(n: int, trained_length: int) -> int:
    """Where the context of `n` tokens begins: all, or else the last of them, more than half the trained length."""
    half = max(1, trained_length // 2)
    return -(-max(0, n - trained_length) // half) * half


def load_generator(folder: Path) -> Generator:
    """Load what a registered version holds, `folder`/model and `folder`/tokens, onto the best device there is.

    Raises ModelMissing, or IntegrityError where a byte of them is not as it was written.
    """
    tokens = TokenFolder(folder / "tokens").train
    model, tokenizer = load_model(folder / "model", tokens.counts()), load_tokenizer(folder / "model")
    machine = prepare_machine(AUTO)
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
