"""Generate text from prompts, token by token; the same seed gives the same text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pipeline.config.sections import TrainConfig
from pipeline.data.corpus_index import CorpusIndex
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import Tokenizer, load_tokenizer, whole_length
from pipeline.model.decoder import Decoder, Precision
from pipeline.model.gpt import GPT
from pipeline.model.prompt_lookup import PromptLookup
from pipeline.model.sampling import Sampling, sample
from pipeline.model.weights import load_model
from pipeline.system.device import prepare_machine
from pipeline.system.errors import InputError, ModelMissing

# The context is at most as long as the windows of training. When it is full, its first half is dropped. A text ends at
# max_tokens, before a stop text, or when the model samples the end-of-text token. This token separated the documents
# in training.

PROMPT_CHARACTERS = 1_000_000  # at most
# On a CPU, a step of so many positions takes little longer than one of a single position. In a step of more, drafts are
# only as long as those of three quarters of the sequences: then most of its positions become tokens.
FREE_POSITIONS = 24
Prompt: TypeAlias = str | list[int]  # text, or ids, which may end within a character
Finish: TypeAlias = Literal["length", "stop", "end"]  # max_tokens, a stop text, or the end-of-text token
AUTO = TrainConfig(
    seed=0, device="auto", precision="auto", threads="auto", deterministic=False, compile=False,
    gradient_checkpointing=False, shard=False, processes=1,
)  # fmt: skip


class TokenLogprob(NamedTuple):
    """The log-probability of one token in nats, by the model itself: before temperature, top-k and penalties."""

    id: int
    logprob: float | None  # None: the first token of a text, which nothing predicts
    top: tuple[tuple[int, float], ...] = ()  # the most likely ids and their log-probabilities, in descending order


class Piece(NamedTuple):
    """The tokens that one step adds to one sequence."""

    sequence: int  # index of the prompt
    ids: list[int]
    text: str  # complete characters, up to a possible beginning of a stop text; may be empty
    finished: Finish | None
    notice: str | None  # a message for the user
    logprobs: tuple[TokenLogprob, ...] = ()  # of the ids, and of the end-of-text token that ends them, if requested


class Continuation:
    """The state of one sequence, as ids and, in a batch, as the model's compact ids."""

    def __init__(
        self, number: int, ids: list[int], sampling: Sampling, corpus: CorpusIndex | None, n_top: int | None
    ) -> None:
        """`ids`: the prompt's, which several sequences may share: a batch replaces them by a copy that grows."""
        self.number, self.ids, self.compact_ids = number, ids, list[int]()
        self.sampling, self.n_top = sampling, n_top
        self.max_length = len(ids) + sampling.max_tokens
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.text = TextStream(sampling.stop)
        self.lookup = PromptLookup(corpus)
        self.draft: list[int] = []  # compact ids to be verified
        self.start = -1  # of the context in the cache, which has all of it but the last token; -1: not in the cache yet
        self.ended = False
        self.notice: str | None = None

    @property
    def n_context(self) -> int:
        """Tokens in the context; the last one is not in the cache yet."""
        return len(self.compact_ids) - self.start

    @property
    def finished(self) -> Finish | None:
        if self.text.stopped or self.ended:
            return "stop" if self.text.stopped else "end"
        return "length" if len(self.ids) == self.max_length else None


class Generator:
    """A model with its tokenizer; safe to use from several threads.

    `corpus`: the training text, for prompt-lookup decoding.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, corpus: CorpusIndex | None = None, precision: Precision = "fp32"
    ) -> None:
        self.decoder, self.tokenizer, self.corpus = Decoder(model, precision, tokenizer.n_vocab), tokenizer, corpus
        self.trained_length, self.vocabulary = model.trained_length, model.vocabulary

    def start(
        self, prompt: Prompt, sampling: Sampling, number: int = 0, seed_offset: int = 0, n_top: int | None = None
    ) -> Continuation:
        """A sequence for a RunningBatch, with the seed `sampling.seed` + `seed_offset`; its pieces have its `number`.

        `n_top`: report the log-probability of each token and of the `n_top` most likely ones; None: report none.
        Raises InputError for a prompt of more than PROMPT_CHARACTERS.
        """
        ids = self.encode(prompt)
        seeded = sampling.model_copy(update={"seed": (sampling.seed + seed_offset) % 2**63})
        sequence = Continuation(number, ids, seeded, self.corpus, n_top)
        if len(ids) > self.trained_length:
            sequence.notice = f"the prompt has {len(ids):,} tokens, but {self._limit()}"
        return sequence

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Piece]:
        """Continue all prompts in one batch. Sequence i gets the same text as alone with `sampling.seed` + i.

        Raises InputError for a prompt of more than PROMPT_CHARACTERS.
        """
        sequences = [self.start(prompt, sampling, number, number) for number, prompt in enumerate(prompts)]
        yield from (Piece(each.number, [], "", "length", None) for each in sequences if each.finished)
        batch = RunningBatch(self, [each for each in sequences if not each.finished])
        while batch.sequences:
            for _, piece in batch.step():
                if isinstance(piece, Exception):
                    raise piece
                yield piece

    def text(self, prompt: str, sampling: Sampling) -> str:
        """The prompt with its continuation."""
        return prompt + "".join(piece.text for piece in self.stream([prompt], sampling))

    def next_tokens(self, prompt: Prompt) -> Tensor:
        """Probabilities of the next id, (n_vocab,), at temperature 1; 0 for ids that are never sampled."""
        compact_ids = self._fold(self.encode(prompt))
        context = compact_ids[context_start(len(compact_ids), self.trained_length) :]
        hidden = self.decoder.prefill(context[None], self.decoder.new_cache(1), [0])  # (1, T, C)
        probabilities = self.decoder.logits(hidden[0, -1]).softmax(dim=0).cpu()  # (V,)
        of_ids, used = torch.zeros(self.vocabulary.size), self.vocabulary.used
        of_ids[used] = probabilities[: len(used)]
        return of_ids[: self.tokenizer.n_vocab]

    def score(self, ids: Sequence[int], n_top: int) -> Iterator[list[TokenLogprob]]:
        """The log-probabilities of `ids`, window by window, each id after the context that `stream` would have there.

        Each has the `n_top` most likely ids as well. The sum over a text of one window is minus its `token_losses`.
        """
        compact_ids, bias = self._fold(ids), self.vocabulary.unused_bias
        yield [TokenLogprob(ids[0], None)]
        target = 1
        while target < len(ids):
            start = context_start(target, self.trained_length)
            stop = min(len(ids), start + self.trained_length + 1)
            hidden = self.decoder.prefill(compact_ids[None, start : stop - 1], self.decoder.new_cache(1), [0])
            logits = self.decoder.all_logits(hidden[0, target - 1 - start :])  # (targets, V)
            of_targets = logits.log_softmax(dim=1).cpu()
            unused = (compact_ids[target:stop] == self.vocabulary.n_rows - 1) & (self.vocabulary.n_unused > 0)
            own = of_targets.gather(1, compact_ids[target:stop, None].cpu())[:, 0] - bias * unused.cpu()
            yield [
                TokenLogprob(token, float(logprob), self._top(row, n_top))
                for token, logprob, row in zip(ids[target:stop], own, of_targets, strict=True)
            ]
            target = stop

    def token_losses(self, ids: Sequence[int]) -> list[float]:
        """Loss of each of `ids` but the first, in nats, in windows of the trained length."""
        compact_ids, losses = self._fold(ids), []
        for begin in range(0, len(compact_ids) - 1, self.trained_length):
            window = compact_ids[begin : begin + self.trained_length + 1]
            hidden = self.decoder.prefill(window[None, :-1], self.decoder.new_cache(1), [0])  # (1, T, C)
            losses += self.decoder.losses(hidden[0], window[1:]).tolist()
        return losses

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, the same list if it is one; an empty one becomes the end-of-text token, as in GPT-2."""
        if not isinstance(prompt, str):
            return prompt or [self.tokenizer.eot]
        if len(prompt) > PROMPT_CHARACTERS:
            raise InputError(f"a prompt has {len(prompt):,} characters: {PROMPT_CHARACTERS:,} at most")
        return self.tokenizer.encode(prompt) or [self.tokenizer.eot]

    def _top(self, logprobs: Tensor, n: int) -> tuple[tuple[int, float], ...]:
        """The `n` most likely ids that can be sampled, with their log-probabilities, from those of all rows, (V,)."""
        top = logprobs[: self.decoder.n_sampled].topk(min(n, self.decoder.n_sampled))
        return tuple(zip(self.vocabulary.used[top.indices].tolist(), top.values.tolist(), strict=True))

    def _fold(self, ids: Sequence[int]) -> Tensor:
        return self.vocabulary.fold(torch.tensor(ids, dtype=torch.int64)).to(self.decoder.wte.device)

    def _padded(self, compact_ids: list[list[int]]) -> Tensor:
        """Pad lists of unequal lengths with zeros, and stack them to one tensor, (B, T)."""
        width = max(map(len, compact_ids))
        return torch.tensor([each + [0] * (width - len(each)) for each in compact_ids], device=self.decoder.wte.device)

    def _limit(self) -> str:
        half = self.trained_length // 2
        return f"the model reads only the last {half} to {self.trained_length} tokens, as in training"


class RunningBatch:
    """Sequences that a Generator continues together. They join between two steps, and leave when they are finished."""

    def __init__(self, generator: Generator, sequences: Sequence[Continuation] = ()) -> None:
        """With `sequences`, the cache is no longer than these need."""
        self._generator, self._decoder = generator, generator.decoder
        self.sequences: list[Continuation] = []
        self._cache = self._decoder.new_cache(0, max((each.max_length for each in sequences), default=0))
        self.add(*sequences)

    def add(self, *sequences: Continuation) -> None:
        for sequence in sequences:
            sequence.ids = list(sequence.ids)
            sequence.compact_ids = self._generator._fold(sequence.ids).tolist()
        self.sequences += sequences
        self._cache.add(len(sequences))

    def remove(self, sequence: Continuation) -> None:
        """Remove a sequence; the last one takes its row."""
        row, last = self.sequences.index(sequence), self.sequences.pop()
        if last is not sequence:
            self.sequences[row] = last
        self._cache.remove(row)
        self._cache.shorten(max((each.n_context for each in self.sequences), default=0))

    def step(self) -> list[tuple[Continuation, Piece | Exception]]:
        """Add tokens to every sequence, at least one each, and remove those that are finished.

        An exception instead of a piece: sampling from this sequence failed, which was removed.
        """
        pieces = list[tuple[Continuation, Piece | Exception]]()
        for sequence, logits in zip(list(self.sequences), self._next_logits(), strict=True):
            try:
                pieces.append((sequence, self._sample_tokens(sequence, *logits)))
            except Exception as error:  # of any kind: the others continue
                pieces.append((sequence, error))
        for sequence, piece in pieces:
            if isinstance(piece, Exception) or piece.finished:
                self.remove(sequence)
        return pieces

    def _next_logits(self) -> list[tuple[Tensor, Tensor]]:
        """Logits on the CPU after each sequence's last token and its draft, (t, V), t is at least 1 + draft tokens.

        With them the logarithm of the sum of the exponentials of all logits, (t,), also of those that are masked; it is
        empty if no sequence reports log-probabilities.
        """
        sequences, cache = self.sequences, self._cache
        moved = [i for i, sequence in enumerate(sequences) if self._move_context(sequence)]
        logits: dict[int, tuple[Tensor, Tensor]] = {}
        if extended := [sequence for i, sequence in enumerate(sequences) if i not in moved]:
            room = cache.limit - max(sequence.n_context for sequence in extended)
            drafts = [
                sequence.lookup.draft(sequence.ids, min(room, sequence.max_length - len(sequence.ids) - 1))
                for sequence in extended
            ]
            width = max(map(len, drafts))
            if len(sequences) * (1 + width) > FREE_POSITIONS:
                width = sorted(map(len, drafts))[len(drafts) // 4]
            for sequence, draft in zip(extended, drafts, strict=True):
                sequence.draft = self._generator._fold(draft[:width]).tolist()
            new = self._generator._padded([[sequence.compact_ids[-1], *sequence.draft] for sequence in sequences])
            lengths = [0 if i in moved else sequence.n_context - 1 for i, sequence in enumerate(sequences)]
            logits |= enumerate(self._masked(self._decoder.extend(new, lengths, cache)))  # (B, T, V)
        if moved:
            contexts = [sequences[i].compact_ids[sequences[i].start :] for i in moved]
            hidden = self._decoder.prefill(self._generator._padded(contexts), cache, moved)  # (B, T, C)
            last = torch.stack([of_one[len(ids) - 1] for of_one, ids in zip(hidden, contexts, strict=True)])  # (B, C)
            logits |= zip(moved, self._masked(last[:, None]), strict=True)
        return [logits[i] for i in range(len(sequences))]

    def _move_context(self, sequence: Continuation) -> bool:
        """Set the start of the sequence's context; return whether that differs from the context in the cache."""
        before = sequence.start
        sequence.start, sequence.draft = context_start(len(sequence.compact_ids), self._decoder.trained_length), []
        if before == 0 < sequence.start:
            sequence.notice = f"the text is longer than the context: {self._generator._limit()}"
        return sequence.start != before

    def _masked(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What `_next_logits` returns, for each sequence of `hidden`, (B, T, C)."""
        logits = self._decoder.all_logits(hidden).cpu()  # (B, T, V)
        reported = any(sequence.n_top is not None for sequence in self.sequences)
        norms = logits.logsumexp(dim=2) if reported else logits.new_empty((*logits.shape[:1], 0))
        return list(zip(self._decoder.mask(logits), norms, strict=True))

    def _sample_tokens(self, sequence: Continuation, logits: Tensor, norms: Tensor) -> Piece:
        """Sample the next token, and further ones as long as the draft is accepted."""
        tokenizer, used = self._generator.tokenizer, self._generator.vocabulary.used
        before, text, logprobs = len(sequence.ids), "", list[TokenLogprob]()
        for i, drafted in enumerate([*sequence.draft, None]):
            compact_id = sample(logits[i], sequence.sampling, sequence.compact_ids, sequence.generator)
            token = int(used[compact_id])
            if sequence.n_top is not None:
                of_all = logits[i] - norms[i]  # (V,)
                top = self._generator._top(of_all, sequence.n_top)
                logprobs.append(TokenLogprob(token, float(of_all[compact_id]), top))
            if token == tokenizer.eot:
                sequence.ended, sequence.notice = True, "the model has ended its document"
                text += sequence.text.add(b"", last=True)
                break
            sequence.compact_ids.append(compact_id)
            sequence.ids.append(token)
            last = len(sequence.ids) == sequence.max_length
            text += sequence.text.add(tokenizer.decode_bytes([token]), last)
            if sequence.finished or compact_id != drafted:
                break
        new = sequence.ids[before:]
        if sequence.draft:
            sequence.lookup.adapt(len(new) - 1)
        notice, sequence.notice = sequence.notice, None
        return Piece(sequence.number, new, text, sequence.finished, notice, tuple(logprobs))


def context_start(n: int, trained_length: int) -> int:
    """Start of the context in `n` tokens: the first multiple of half the trained length from which the rest fits."""
    half = max(1, trained_length // 2)
    return -(-max(0, n - trained_length) // half) * half


def load_generator(folder: Path, precision: Literal["auto", "fp32", "bf16"] = "auto") -> Generator:
    """Load a registered version, `folder`/model and `folder`/tokens, onto the best device of this machine.

    Raises ModelMissing if it is missing, IntegrityError if a file is altered.
    """
    for part in (folder / "model", folder / "tokens"):
        if not part.is_dir():
            raise ModelMissing(f"{part} not found: give the folder of a registered version")
    tokens = TokenFolder(folder / "tokens").train
    model, tokenizer = load_model(folder / "model", tokens.counts()), load_tokenizer(folder / "model")
    machine = prepare_machine(AUTO.model_copy(update={"precision": precision}))
    return Generator(model.to(machine.device), tokenizer, CorpusIndex.of(tokens), machine.precision)


class TextStream:
    """Decode bytes to whole characters piece by piece, up to the first stop text; invalid bytes become U+FFFD.

    The beginning of a character is kept back: at the end, it is one that max_tokens cut.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._bytes = b""  # the beginning of a character
        self._pending = ""  # decoded, and not returned yet

    def add(self, data: bytes, last: bool = False) -> str:
        """Append bytes and return the text that is final now; `last`: no more bytes follow."""
        if self.stopped:
            return ""
        self._bytes += data
        whole = whole_length(self._bytes)
        self._pending += self._bytes[:whole].decode("utf-8", errors="replace")
        self._bytes = self._bytes[whole:]
        places = [place for text in self._stop if (place := self._pending.find(text)) >= 0]
        self.stopped = bool(places)
        end = min(places) if places else len(self._pending) - (0 if last else self._partial_stop())
        text, self._pending = self._pending[:end], self._pending[end:]
        return text

    def _partial_stop(self) -> int:
        """Number of characters at the end of the text that may be the beginning of a stop text."""
        pending = self._pending
        lengths = ((text, range(min(len(text), len(pending) + 1))) for text in self._stop)
        return max((n for text, possible in lengths for n in possible if pending.endswith(text[:n])), default=0)
