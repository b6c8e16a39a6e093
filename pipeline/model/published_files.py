"""The files of a published GPT-2, in a folder or on the Hub: find, check and convert them."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from pipeline.config.sections import INIT, WEIGHTS_FOLDER, ModelConfig
from pipeline.data.remote import AGENT, hub_as_one_line
from pipeline.system.errors import InputError
from pipeline.system.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

# A published model is a folder, local or of the Hub, with these files. Pickles are never read.
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENS = "tokenizer.json", "vocab.json"
SMALL = (CONFIG, INDEX, TOKENIZER, TOKENS)
PARTS, PICKLES = "model*.safetensors", "pytorch_model*.bin"

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
    config = read_model_json(folder / CONFIG, name)
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


def read_model_json(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of the model that messages call `name`. Raises InputError if it is missing or invalid."""
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
        listed = read_model_json(published.folder / INDEX, published.name).get("weight_map")
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
        reason = " ".join(str(error).split())
        raise InputError(
            f"{published.name}: {path.name} is truncated, or not a safetensors file ({reason}): copy or download it "
            "again"
        ) from None


def convert_weights(published: Published) -> "dict[str, Tensor]":
    """The weights with our names and layout, in fp32; those on the Hub are downloaded first.

    Raises InputError if they cannot be downloaded, or cannot be trained on.
    """
    import torch

    if published.commit:
        _download(published.name, [PARTS], published.commit)
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
