"""Published weights of a GPT-2, from which training starts: find, check and convert them; load them into a model."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from pipeline.config.sections import INIT, WEIGHTS_FOLDER, ModelConfig
from pipeline.data.remote import AGENT, hub_as_one_line
from pipeline.data.tokenizer import BYTES, EOT, BytePairTokenizer, GPT2Tokenizer, Tokenizer
from pipeline.system.errors import InputError, one_line
from pipeline.system.files import MANIFEST, atomic_folder, read_json, verify_manifest, write_json
from pipeline.system.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.model.gpt import GPT

# A published model is a folder, local or of the Hub, with these files. Pickles are never read.
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENS = "tokenizer.json", "vocab.json"
SMALL = (CONFIG, INDEX, TOKENIZER, TOKENS)
PARTS, PICKLES = "model*.safetensors", "pytorch_model*.bin"

# The stage `tokenizer` writes the weights to data/init, in fp32, with the names and the layout of our model.
INIT_FOLDER, RECORD = "init", "init.json"
REMAKE = "run `dvc repro -f tokenizer`, which makes it again"

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}  # and the defaults
FIXED: dict[str, tuple[Any, ...]] = {  # key of config.json -> values that our model has; the first one is the default
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # published transposed, as (in, out)
MASKS = (".attn.bias", ".attn.masked_bias")  # constants, which some versions of Transformers saved
HEAD = "lm_head.weight"  # of a tied head, if it is saved at all
SAMPLE_CHARACTERS = 20_000  # of the text, with which two tokenizers are compared


class Published(NamedTuple):
    """A published model: its name in params.yaml, its folder and its shape."""

    name: str
    folder: Path
    shape: dict[str, int]  # the keys of SHAPE
    commit: str | None = None  # on the Hub
    download_bytes: int = 0  # of weights that the Hub's cache lacks

    @property
    def config(self) -> ModelConfig:
        blocks: dict[str, Any] = {key: self.shape[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        return ModelConfig(**blocks, block_size=self.shape["n_positions"], dropout=0.0, fold_vocab=False)


# Find and check


def find_published(init: str, root: Path = Path()) -> Published:
    """Find the model that model.init names, and check its config.json; `root`: the project's folder.

    Of a model on the Hub, only the small files are downloaded. Raises InputError if there is no such model, if it is
    not a GPT-2, or if it has no safetensors.
    """
    found = INIT.fullmatch(init)
    if not found or not found["repo"]:
        return read_published(root / init, init)
    from huggingface_hub import errors, get_cached_repo_tree

    folder = _download(init, SMALL)
    try:
        sizes = {file.path: file.size for file in get_cached_repo_tree(found["repo"], revision=folder.name)}
    except errors.CachedRepoTreeNotFoundError:  # offline, and another program has filled the cache
        sizes = {path.name: 0 for path in folder.iterdir()}
    published = _checked(folder, init, list(sizes))
    missing = [name for name in sizes if fnmatch(name, PARTS) and not (folder / name).is_file()]
    return published._replace(commit=folder.name, download_bytes=sum(sizes[name] for name in missing))


def read_published(folder: Path, name: str) -> Published:
    """Check the files of a local folder, which messages call `name`. Raises InputError."""
    if not folder.is_dir():
        why = "is a file" if folder.is_file() else "not found"
        raise InputError(f"{name} {why}: give a folder of a GPT-2, with {CONFIG} and {WEIGHTS}")
    published = _checked(folder, name, [path.name for path in folder.iterdir()])
    _tensors(published)
    return published


def _checked(folder: Path, name: str, files: Sequence[str]) -> Published:
    """The model in `folder`, whose config.json is a GPT-2's; `files`: the names that the model has."""
    config = _json(folder / CONFIG, name)
    if (kind := config.get("model_type")) != "gpt2":
        raise InputError(f"{name} is a model of the type {kind}: only a GPT-2 (model_type gpt2) can be trained on")
    for key, values in FIXED.items():
        if (value := config.get(key, values[0])) not in values:
            raise InputError(f"{name} has {key} {value}, this project's GPT-2 has {values[0]}: use other weights")
    shape = {key: config.get(key, default) for key, default in SHAPE.items()}
    if (width := config.get("n_inner")) not in (None, 4 * shape["n_embd"] if type(shape["n_embd"]) is int else None):
        raise InputError(f"{name} has n_inner {width}, this project's GPT-2 has 4 * n_embd: use other weights")
    published = Published(name, folder, shape)
    try:
        if any(type(value) is not int for value in shape.values()):
            raise ValueError
        _ = published.config
    except (ValueError, ValidationError):
        words = ", ".join(f"{key} {value!r}" for key, value in shape.items())
        raise InputError(f"{name}: {CONFIG} is not of a possible GPT-2 ({words}): use other weights") from None
    if not any(fnmatch(file, PARTS) for file in files):
        why = f"lacks {WEIGHTS}"
        if pickles := [file for file in files if fnmatch(file, PICKLES)]:
            why = f"has its weights only as a pickle ({pickles[0]}), which may run any code and is never read"
        raise InputError(f"{name} {why}: save it by Transformers' save_pretrained, which writes {WEIGHTS}")
    return published


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{name} lacks {path.name}: give a complete folder of a GPT-2") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{name}: {path.name} is not JSON of a model: copy or download it again")
    return values


def files_in(folder: Path) -> list[Path]:
    """All files in `folder`, if there is such a folder, that are read if it is a model."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.name in SMALL or fnmatch(path.name, PARTS)]


def files_of(published: Published) -> list[Path]:
    """All files of a local folder that are read."""
    small = (path for name in SMALL if (path := published.folder / name).is_file())
    return [*small, *_parts(published)]


def _parts(published: Published) -> list[Path]:
    """The safetensors files: one, or those that the index lists. Raises InputError if one is missing."""
    names = [WEIGHTS]
    if not (published.folder / WEIGHTS).is_file() and (published.folder / INDEX).is_file():
        listed = _json(published.folder / INDEX, published.name).get("weight_map")
        names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
        if not names or any(not fnmatch(name, PARTS) or "/" in name for name in names):
            raise InputError(f"{published.name}: {INDEX} does not list its files: copy or download it again")
    for name in names:
        if not (published.folder / name).is_file():
            raise InputError(f"{published.name} lacks {name}: copy or download it again{_offline_hint(published.name)}")
    return [published.folder / name for name in names]


def _download(init: str, patterns: Sequence[str], commit: str | None = None) -> Path:
    """Download files of a model on the Hub into the Hub's cache; return their folder. Raises InputError."""
    from huggingface_hub import snapshot_download

    found = INIT.fullmatch(init)
    assert found, "ModelConfig has checked it"
    repo, revision = found["repo"], commit or found["revision"] or "main"
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    download = partial(snapshot_download, repo, user_agent=AGENT, tqdm_class=Bar)
    with hub_as_one_line(init, repo, "model", _offline_hint(init)):
        return Path(download(revision=revision, allow_patterns=list(patterns)))


def _offline_hint(init: str) -> str:
    """Where to put the files of a model on the Hub that cannot be downloaded here."""
    if not (found := INIT.fullmatch(init)) or not (repo := found["repo"]):
        return ""
    place = f"{WEIGHTS_FOLDER}/{repo.rpartition('/')[2]}"
    return (
        f"; on a machine with a network, `hf download {repo} {CONFIG} {WEIGHTS} {TOKENIZER} --local-dir {place}`, "
        f"copy this folder here, and set model.init (or --init) to {place}"
    )


def require_shape(published: Published, model: ModelConfig) -> None:
    """Raise InputError, with all values to set, if params.yaml has other blocks than the weights."""
    keys = [key for key in ("n_layer", "n_head", "n_embd") if getattr(model, key) != published.shape[key]]
    if keys:
        theirs = ", ".join(f"model.{key} to {published.shape[key]}" for key in keys)
        ours = ", ".join(f"model.{key} {getattr(model, key)}" for key in keys)
        raise InputError(f"{published.name} has another shape than params.yaml ({ours}): set {theirs}")


def require_tokenizer(published: Published, ours: Tokenizer, text: str) -> None:
    """Raise InputError unless the model's tokenizer gives the ids of `ours`, compared on `text` and on all tokens."""
    name, hint = published.name, "set corpus.tokenizer to the model's tokenizer"
    if ours.n_vocab > (size := published.shape["vocab_size"]):
        raise InputError(f"{name} has {size:,} ids, the tokenizer {ours.name} {ours.n_vocab:,}: {hint}")
    path = next((path for file in (TOKENIZER, TOKENS) if (path := published.folder / file).is_file()), None)
    if path is None:
        if isinstance(ours, GPT2Tokenizer):  # the tokenizer of nearly every GPT-2
            return
        raise InputError(f"{name} has no {TOKENIZER}, so its ids cannot be compared with {ours.name}: {hint}")
    values = _json(path, name)
    theirs = _tokens_of(values, path.name == TOKENIZER)
    if not isinstance(ours, BytePairTokenizer) or not theirs:
        raise InputError(f"{name} has a tokenizer that cannot be compared with {ours.name}: {hint}")
    characters = {byte: character for character, byte in BYTES.items()}
    for token, number in [*ours.ranks.items(), (EOT.encode(), ours.eot)]:
        written = EOT if number == ours.eot else "".join(characters[byte] for byte in token)
        if (found := theirs.get(written)) != number and not (found is None and number == ours.eot):
            other = "is no token" if found is None else f"has the id {found}"
            raise InputError(
                f"{name} has another tokenizer than {ours.name}: {token!r} {other} there, {number} here: {hint}"
            )
    if path.name == TOKENIZER and (encoded := _encode(path, text, name)) != (expected := ours.encode(text)):
        at = next((i for i, pair in enumerate(zip(encoded, expected, strict=False)) if pair[0] != pair[1]), 0)
        raise InputError(
            f"{name} has another tokenizer than {ours.name}: they split the text apart at token {at}: {hint}"
        )


def _tokens_of(values: Mapping[str, Any], is_tokenizer: bool) -> dict[str, int]:
    """The ids by token of a tokenizer.json or a vocab.json; empty if it is of another kind than a BPE."""
    try:
        if not is_tokenizer:
            return dict(values)
        added = {token["content"]: token["id"] for token in values["added_tokens"]}
        return {**values["model"]["vocab"], **added} if values["model"]["type"] == "BPE" else {}
    except (KeyError, TypeError):
        return {}


def _encode(path: Path, text: str, name: str) -> list[int]:
    from tokenizers import Tokenizer as HFTokenizer

    try:
        tokenizer = HFTokenizer.from_file(str(path))
        tokenizer.encode_special_tokens = True  # as plain text, as in this project
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except Exception as error:  # the library raises no other class
        raise InputError(f"{name}: {path.name} cannot be read ({one_line(error)})") from None


# Write and read data/init


def write_init(model: ModelConfig, folder: Path, tokenizer: Tokenizer, text: str, root: Path = Path()) -> str:
    """Write the weights that `model.init` names to `folder`, an empty folder if it is null; say which.

    `text`: the beginning of the training text, for the comparison of the tokenizers. Raises InputError.
    """
    if model.init is None:
        with atomic_folder(folder):
            return "no published weights: training starts from random ones"
    published = find_published(model.init, root)
    require_shape(published, model)
    require_tokenizer(published, tokenizer, text[:SAMPLE_CHARACTERS])
    write_weights(published, folder)
    return f"the weights of {published.name}, {published.config.n_params:,} parameters"


def write_weights(published: Published, folder: Path) -> None:
    """Download the weights if they are on the Hub, and convert them to `folder`. Raises InputError."""
    from pipeline.model.weights import save_tensors

    if published.commit:
        _download(published.name, [PARTS], published.commit)
    weights, origin = _converted(published), {"source": published.name, "commit": published.commit}
    with atomic_folder(folder, sum(tensor.nbytes for tensor in weights.values())) as unfinished:
        save_tensors(weights, unfinished / WEIGHTS)
        write_json(unfinished / RECORD, origin | {"shape": published.shape})


def _tensors(published: Published) -> dict[str, tuple[Path, str]]:
    """Where each tensor of our model is: a file, and its key there; also HEAD, if it is saved. Reads headers only.

    Raises InputError if they are not those of the shape.
    """
    import torch

    from pipeline.data.vocab import Vocabulary
    from pipeline.model.gpt import GPT

    vocabulary = Vocabulary.full(published.shape["vocab_size"])
    with torch.device("meta"):
        model = GPT(published.config, vocabulary)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, tuple[Path, str]] = {}
    for path in _parts(published):
        with _opened(published, path) as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if (name := key.removeprefix("transformer.")).endswith(MASKS):
                    continue
                header = file.get_slice(key)
                if name not in (*shapes, HEAD) or "F" not in header.get_dtype():  # F32, F16, BF16, F8_...
                    raise InputError(
                        f"{published.name}: {path.name} has {key} ({header.get_dtype()}), which is no weight of a "
                        f"GPT-2 of its {CONFIG}: use weights of a GPT2LMHeadModel"
                    )
                given = tuple(header.get_shape()[::-1] if name.endswith(CONV1D) else header.get_shape())
                if given != (shape := shapes["wte.weight" if name == HEAD else name]):
                    raise InputError(
                        f"{published.name} has {name} as {given}, by its {CONFIG} it is {shape}: use other weights"
                    )
                found[name] = path, key
    if missing := next((name for name in shapes if name not in found), None):
        raise InputError(f"{published.name} has no weight {missing}: use weights of a complete GPT2LMHeadModel")
    return found


@contextmanager
def _opened(published: Published, path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises InputError, in the block too, if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{published.name}: {path.name} is truncated, or not a safetensors file ({one_line(error)}): copy or "
            "download it again"
        ) from None


def _converted(published: Published) -> "dict[str, Tensor]":
    """The tensors with our names and layout, in fp32. Raises InputError if they cannot be trained on."""
    import torch

    found: dict[str, Tensor] = {}
    for name, (path, key) in _tensors(published).items():
        with _opened(published, path) as file:
            tensor = file.get_tensor(key)
        found[name] = (tensor.T if name.endswith(CONV1D) else tensor).float().contiguous()
        if not found[name].isfinite().all():
            raise InputError(f"{published.name}: {key} has values that are not finite: use other weights")
    if (head := found.pop(HEAD, None)) is not None and not torch.equal(head, found["wte.weight"]):
        raise InputError(f"{published.name} has a head of its own ({HEAD}), this project's GPT-2 ties it: use others")
    return found


def with_hash(model: ModelConfig, folder: Path) -> ModelConfig:
    """The shape with the SHA-256 of the weights in `folder` as `init`, after verifying them.

    Raises InputError if they are not those of `model.init` or do not fit the shape, IntegrityError if they are altered.
    """
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} has no weights, model.init is {model.init}: run `dvc repro tokenizer`")
    verify_manifest(folder, REMAKE)
    record = read_json(folder / RECORD)
    if record["source"] != model.init:
        raise InputError(f"{folder} has {record['source']}, model.init is {model.init}: run `dvc repro tokenizer`")
    require_shape(Published(record["source"], folder, record["shape"]), model)
    return model.updated(init=hash_of(folder))


def hash_of(folder: Path) -> str | None:
    """The hash of the weights in `folder` by its manifest, which is not verified; None if it has none."""
    if not (folder / WEIGHTS).is_file() or not (folder / MANIFEST).is_file():
        return None
    return f"sha256:{read_json(folder / MANIFEST)[WEIGHTS]['sha256']}"


def copy_init(source: Path, folder: Path, name: str) -> None:
    """Copy the weights in the folder `source`, with `name` as the place where they come from."""
    with atomic_folder(folder) as unfinished:
        shutil.copyfile(source / WEIGHTS, unfinished / WEIGHTS)
        write_json(unfinished / RECORD, read_json(source / RECORD) | {"source": name})


def origin_of(folder: Path) -> str:
    """Where the weights in `folder` come from, such as hf://gpt2@COMMIT."""
    record = read_json(folder / RECORD)
    return f"{record['source'].partition('@')[0]}@{record['commit']}" if record["commit"] else str(record["source"])


def load_published(model: "GPT", folder: Path) -> None:
    """Copy the weights in `folder`, which `with_hash` has verified, into a model with the same blocks.

    The embedding gets the rows of its token ids; ids that the weights lack are padding, and get the mean of all rows. A
    shorter model gets the first positions. A longer one repeats the positions from the first on (Beltagy et al. 2020),
    so that a text that fits into the published model has the same logits.
    """
    import torch
    from safetensors import safe_open

    from pipeline.model.fsdp import assign

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name, parameter in model.named_parameters():
            tensor = file.get_tensor(name)
            if name == "wte.weight":
                padding = tensor.mean(dim=0, keepdim=True).expand(max(0, parameter.shape[0] - len(tensor)), -1)
                tensor = torch.cat([tensor, padding])[: parameter.shape[0]]
            elif name == "wpe.weight":
                tensor = tensor[torch.arange(parameter.shape[0]) % len(tensor)]
            assign(parameter, tensor)
