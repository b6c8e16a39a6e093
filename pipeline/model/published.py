"""Start from published weights: compare them with params.yaml, write them to data/init, load them into a model."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.sections import ModelConfig
from pipeline.data.tokenizer import EOT, BytePairTokenizer, GPT2Tokenizer, Tokenizer, as_characters
from pipeline.model.published_files import (
    TOKENIZER,
    TOKENS,
    WEIGHTS,
    Published,
    convert_weights,
    find_published,
    read_model_json,
)
from pipeline.system.errors import InputError
from pipeline.system.files import MANIFEST, atomic_folder, read_json, verify_manifest, write_json

if TYPE_CHECKING:
    from pipeline.model.gpt import GPT

# The stage `tokenizer` writes the weights to data/init, in fp32, with the names and the layout of our model.
INIT_FOLDER, RECORD = "init", "init.json"
REMAKE = "run `dvc repro -f tokenizer`, which makes it again"
SAMPLE_CHARACTERS = 20_000  # of the text, with which two tokenizers are compared


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
    values = read_model_json(path, name)
    theirs = _tokens_of(values, path.name == TOKENIZER)
    if not isinstance(ours, BytePairTokenizer) or not theirs:
        raise InputError(f"{name} has a tokenizer that cannot be compared with {ours.name}: {hint}")
    for token, number in [*ours.ranks.items(), (EOT.encode(), ours.eot)]:
        written = EOT if number == ours.eot else as_characters(token)
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
        raise InputError(f"{name}: {path.name} cannot be read ({' '.join(str(error).split())})") from None


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

    weights, origin = convert_weights(published), {"source": published.name, "commit": published.commit}
    with atomic_folder(folder, sum(tensor.nbytes for tensor in weights.values())) as unfinished:
        save_tensors(weights, unfinished / WEIGHTS)
        write_json(unfinished / RECORD, origin | {"shape": published.shape})


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
