"""Export a registered version for Transformers, for llama.cpp, or as a Hugging Face Space that runs the app.

An export is a function with an entry in EXPORTS. It takes the folder that `open_version` returns, the version info that
`describe_version` returns, and an empty folder to fill; `export gguf` also takes the type of the weights.
"""

import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from pipeline.config.params import load_params
from pipeline.config.recipes import write_values
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import (
    CHARACTERS,
    EOT,
    TOKENIZERS,
    BytePairTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    as_characters,
    load_tokenizer,
    split_into,
)
from pipeline.model.gpt import GPT
from pipeline.model.published_files import CONFIG, CONV1D, WEIGHTS
from pipeline.model.sampling import Sampling
from pipeline.model.weights import load_model
from pipeline.registry.gguf_file import merges_of, tokenizer_model, write_gguf
from pipeline.report.cards import CURVE, gguf_card, model_card, modelfile, space_card
from pipeline.report.figures import curve_figure
from pipeline.report.style import save_png
from pipeline.system.errors import InputError
from pipeline.system.files import atomic_folder, write_json, write_manifest, write_text
from pipeline.system.host import SOURCE_ROOT

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

PROGRAM = ("pipeline", "webapp")  # the packages that app.py imports
APP_REQUIREMENTS = (  # in a Space
    "gradio jinja2 numpy prometheus_client psutil pydantic pyyaml safetensors tiktoken torch tqdm".split()
)
CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"
LOCAL_STUDIES = "journal:///optuna.journal"
PROMPT_TOKENS = 16  # at most, from the beginning of the text, for the example in the model card


def export_version(kind: str, artifacts: Path, info: dict[str, Any], folder: Path, **options: str) -> int:
    """Write the export `kind` of EXPORTS to `folder`, with its options; return its size in bytes.

    Raises InputError if `folder` exists and is not empty, OutOfSpaceError if the disk is full.
    """
    require_empty(folder := folder.resolve())
    with atomic_folder(folder, manifest=False) as unfinished:
        EXPORTS[kind](artifacts, info, unfinished, **options)
        require_empty(folder)  # another program may have written into it in the meantime
    return folder_bytes(folder)


def export_hf(artifacts: Path, info: dict[str, Any], folder: Path) -> None:
    """Write a model that Transformers loads into an empty folder."""
    model, tokenizer = _load("hf", artifacts)
    weights = hf_weights(model, tokenizer.n_vocab)
    config = hf_config(model, tokenizer, len(weights["transformer.wpe.weight"]))
    (folder / WEIGHTS).write_bytes(save(weights, {"format": "pt"}))
    write_json(folder / CONFIG, config)
    generation = {**_special_ids(tokenizer), "max_length": config["n_positions"]}
    write_json(folder / "generation_config.json", generation)
    _write_tokenizer(artifacts / "model", tokenizer, config["n_positions"], folder)
    _write_common(artifacts, info, folder)
    n_params = sum(tensor.numel() for tensor in weights.values())
    described = _described(artifacts, tokenizer, config, n_params)
    write_text(folder / "README.md", model_card(info, described))
    write_manifest(folder)


def export_gguf(artifacts: Path, info: dict[str, Any], folder: Path, weight_type: str = "f16") -> None:
    """Write a GGUF file and a Modelfile into an empty folder; `weight_type`: one of WEIGHT_TYPES.

    Raises InputError if the package gguf is missing.
    """
    model, tokenizer = _load("gguf", artifacts)
    weights = torch_weights(model, tokenizer.n_vocab)
    name = f"{info['name']}-v{info['version']}-{weight_type}.gguf"
    title = f"{info['name']}, version {info['version']}"
    write_gguf(folder / name, model, weights, tokenizer, weight_type, title)
    config = hf_config(model, tokenizer, len(weights["transformer.wpe.weight"]))
    n_params = sum(tensor.numel() for tensor in weights.values())
    described = _described(artifacts, tokenizer, config, n_params) | {
        "file": name,
        "weight_type": weight_type,
        "tokenizer_name": tokenizer.name,
        "tokenizer_model": tokenizer_model(tokenizer),
        "marks": r"\p{M}" in tokenizer.pieces,
        "temperature": Sampling().temperature,
        "n_continuation": config["n_positions"] - min(PROMPT_TOKENS, max(1, config["n_positions"] // 2)),
    }
    _write_common(artifacts, info, folder)
    write_text(folder / "Modelfile", modelfile(info, described))
    write_text(folder / "README.md", gguf_card(info, described))
    write_manifest(folder)


def _load(kind: str, artifacts: Path) -> tuple[GPT, BytePairTokenizer]:
    """A version's model and tokenizer. Raises InputError if other programs cannot have such a tokenizer."""
    model, tokenizer = load_model(artifacts / "model"), load_tokenizer(artifacts / "model")
    if not isinstance(tokenizer, BytePairTokenizer):
        known = ", ".join(name for name, kind in TOKENIZERS.items() if issubclass(kind, BytePairTokenizer))
        raise InputError(
            f"export {kind}: the model's tokenizer is {tokenizer.name}, only these can be exported: {known}"
        )
    return model, tokenizer


def _write_common(artifacts: Path, info: dict[str, Any], folder: Path) -> None:
    """Write what stands beside a model and its card: parameters, licence, loss curve."""
    _write_params(artifacts, folder)
    shutil.copyfile(SOURCE_ROOT / "LICENSE", folder / "LICENSE")
    if info["history"].get("loss"):
        save_png(curve_figure(info["history"], float(info["tags"]["target_loss"])), folder / CURVE)


def _described(artifacts: Path, tokenizer: BytePairTokenizer, config: dict[str, Any], n_params: int) -> dict[str, Any]:
    """What a model's card needs beside the version info."""
    text = TokenFolder(artifacts / "tokens").train
    n_prompt = min(PROMPT_TOKENS, max(1, config["n_positions"] // 2), len(text))  # the other half: the continuation
    prompt = text.read(0, n_prompt).tolist()
    if tokenizer.eot in prompt:  # half of a short document, which the model continues to its end
        prompt = prompt[: (prompt.index(tokenizer.eot) + 1) // 2]
    return {
        **config,
        "n_params": n_params,
        "n_used": int((text.counts() > 0).sum()),
        "n_tokens": len(text),
        "tokenizer": tokenizer.description,
        "joins_spaces": any(token.startswith(b" ") and token != b" " for token in tokenizer.ranks),
        # A space at the end of a prompt would be encoded as another token.
        "prompt": tokenizer.decode(prompt).rstrip(" \t\r\n"),
    }


def export_space(artifacts: Path, info: dict[str, Any], folder: Path) -> None:
    """Write a Hugging Face Space into an empty folder. Raises InputError if app.py is missing."""
    if not (app := SOURCE_ROOT / "app.py").is_file():
        raise InputError(f"{app} not found: export a Space from a checkout of the project, which `make` installs")
    for name in PROGRAM:
        _copy_tree(SOURCE_ROOT / name, folder / name)
    for name in ("model", "tokens"):
        _copy_tree(artifacts / name, folder / "version" / name)
    for path in (app, SOURCE_ROOT / "LICENSE"):
        shutil.copyfile(path, folder / path.name)
    params = _write_params(artifacts, folder / "version")
    write_json(folder / "version" / "version.json", {**info, "params": params})
    pins = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in APP_REQUIREMENTS]
    write_text(folder / ".gitignore", "__pycache__/\n")
    write_text(folder / "requirements.txt", "\n".join([CPU_INDEX, *pins, ""]))
    python = ".".join(map(str, sys.version_info[:2]))
    write_text(folder / "README.md", space_card(info, metadata.version("gradio"), python, folder_bytes(folder)))


Export = Callable[..., None]  # takes a version's folder, its version info, the folder to fill, and its own options
EXPORTS: dict[str, Export] = {"hf": export_hf, "gguf": export_gguf, "space": export_space}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_empty(folder: Path) -> None:
    """Raise InputError if `folder` is not empty, since a user's files are never overwritten, or cannot be replaced."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already: name a new or an empty folder")
    if folder.exists() and (os.path.ismount(folder) or not os.access(folder.resolve().parent, os.W_OK)):
        raise InputError(f"{folder} is a mount point, or in a read-only folder: name a new folder in it")


def torch_weights(model: GPT, n_vocab: int) -> dict[str, Tensor]:
    """The weights with GPT-2's names, without padded ids and without untrained positions; matrices as (out, in)."""
    weights = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, rows in (("wte", n_vocab), ("wpe", model.trained_length)):
        weights[f"transformer.{name}.weight"] = weights[f"transformer.{name}.weight"][:rows].contiguous()
    return weights


def hf_weights(model: GPT, n_vocab: int) -> dict[str, Tensor]:
    """The same with GPT-2's layout: most matrices as (in, out)."""
    weights = torch_weights(model, n_vocab)
    for name, tensor in weights.items():
        if name.endswith(CONV1D):
            weights[name] = tensor.T.contiguous()
    return weights


def hf_config(model: GPT, tokenizer: Tokenizer, n_positions: int) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": tokenizer.n_vocab,
        "n_positions": n_positions,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.ln_f.eps,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **_special_ids(tokenizer),
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)


def _write_tokenizer(model: Path, tokenizer: BytePairTokenizer, n_positions: int, folder: Path) -> None:
    """Write the tokenizer's files for Transformers: GPT-2's own, or one for its library `tokenizers`."""
    if isinstance(tokenizer, GPT2Tokenizer):
        shutil.copyfile(model / "encoder.json", folder / "vocab.json")
        shutil.copyfile(model / "vocab.bpe", folder / "merges.txt")
    else:
        write_text(folder / "tokenizer.json", _hf_tokenizer(tokenizer).to_str())
    kind = "GPT2Tokenizer" if isinstance(tokenizer, GPT2Tokenizer) else "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", _tokenizer_config(kind, n_positions))


def _hf_tokenizer(tokenizer: BytePairTokenizer) -> "HFTokenizer":
    """The same tokenizer in the library `tokenizers`.

    As tiktoken does, it looks a whole piece of text up first, and then merges any two neighbours that give a token. So
    each pair of tokens that gives a token is one of its merges, in the order of these tokens.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as HFTokenizer

    vocabulary = {as_characters(token): rank for token, rank in tokenizer.ranks.items()}
    merges = [(as_characters(left), as_characters(right)) for left, right in merges_of(tokenizer.ranks)]
    found = HFTokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pieces = r"[\s\S]" if tokenizer.pieces == CHARACTERS else tokenizer.pieces  # another notation than tiktoken's
    found.pre_tokenizer = split_into(pieces)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return found


def _tokenizer_config(kind: str, n_positions: int) -> dict[str, Any]:
    return {
        "tokenizer_class": kind,
        "model_max_length": n_positions,
        "split_special_tokens": True,  # <|endoftext|> in a text is encoded as plain text, as in training
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), EOT),
    }


def _write_params(artifacts: Path, folder: Path) -> dict[str, Any]:
    """Copy params.yaml without `sweep.storage`, which may contain a host and a password; return its values."""
    path = folder / "params.yaml"
    shutil.copyfile(artifacts / "params.yaml", path)
    if "storage" in load_params(path).values.get("sweep", {}):
        write_values({"sweep.storage": LOCAL_STUDIES}, path)
    return load_params(path).values


def _copy_tree(source: Path, target: Path) -> None:
    """Copy a folder without compiled modules; permissions are this user's defaults."""
    shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("__pycache__"))
