"""Save and load a model folder: weights, shape and tokenizer."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.sections import ModelConfig
from pipeline.data.tokenizer import tokenizer_in
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.system.errors import IntegrityError, ModelMissing
from pipeline.system.files import HINT, atomic_folder, read_json, verify_manifest, write_json

WEIGHTS, SHAPE = "model.safetensors", "config.json"  # the other files of a model folder are its tokenizer's


def save_model(folder: Path, model: GPT, tokenizer: Path) -> None:
    """Write a model folder: weights for the full vocabulary, config.json and the files of the tokenizer in a folder."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights["wte.weight"] = model.vocabulary.unfold_rows(weights["wte.weight"]).contiguous()
    shape = {"model": model.config.model_dump(), "trained_length": model.trained_length}
    needed = sum(tensor.nbytes for tensor in weights.values())
    with atomic_folder(folder, needed) as unfinished:
        save_tensors(weights, unfinished / WEIGHTS)
        write_json(unfinished / SHAPE, shape)
        for name in tokenizer_in(tokenizer).files:
            shutil.copyfile(tokenizer / name, unfinished / name)


def load_model(folder: Path, counts: np.ndarray | None = None) -> GPT:
    """Load a model folder, in eval mode on the CPU, after verifying its manifest.

    `counts`: how often each id occurs in the training text. With them, a model that was trained with a folded
    vocabulary is folded again. This changes no result, and makes it smaller and faster. Raises ModelMissing or
    IntegrityError.
    """
    if not folder.is_dir():
        raise ModelMissing(f"{folder} not found: `dvc repro` makes it")
    verify_manifest(folder)
    config, trained_length = _read_shape(folder / SHAPE)
    weights = load_tensors(folder / WEIGHTS, HINT)
    vocabulary = Vocabulary.full(config.n_ids)
    with torch.device("meta"):
        unfolded = GPT(config, vocabulary).state_dict()
    check_tensors(folder / WEIGHTS, weights, {name: tensor.shape for name, tensor in unfolded.items()}, HINT)
    if counts is not None and counts[config.n_ids :].any():
        raise IntegrityError(f"{folder} has {config.n_ids} ids, the text has ids beyond them: {HINT}")
    if config.fold_vocab and counts is not None:
        vocabulary = Vocabulary.of(counts, config.n_ids)
    weights["wte.weight"] = vocabulary.fold_rows(weights["wte.weight"])
    with torch.device("meta"):
        model = GPT(config, vocabulary)
    # Copies are aligned, which the tensors of a file are not; to_empty() would import sympy.
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    model.trained_length = trained_length
    return model.eval()


def check_tensors(path: Path, found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], hint: str) -> None:
    """Raise IntegrityError unless the tensors `found` in a file are fp32 and have these names and shapes."""
    fault = ""
    if names := sorted(found.keys() ^ shapes.keys()):
        fault = f"{'contains' if names[0] in found else 'lacks'} {names[0]}"
    for name, tensor in found.items():
        if not fault and (tensor.dtype, tensor.shape) != (torch.float32, shapes[name]):
            fault = f"contains {name} as {tensor.dtype} {list(tensor.shape)}, not {list(shapes[name])} in fp32"
    if fault:
        raise IntegrityError(f"{path} does not fit its config.json: it {fault}: {hint}")


def _read_shape(path: Path) -> tuple[ModelConfig, int]:
    """Shape of a model, and how many of its positions were trained."""
    values = read_json(path)
    try:
        config, trained_length = ModelConfig.model_validate(values["model"]), values["trained_length"]
    except (KeyError, TypeError, ValidationError):
        raise IntegrityError(f"{path} is not the shape of a model: {HINT}") from None
    if config.vocab_size is None:
        raise IntegrityError(f"{path} has no vocab_size: {HINT}")
    if type(trained_length) is not int or not 1 <= trained_length <= config.block_size:
        raise IntegrityError(f"{path} has trained_length {trained_length!r}, block_size {config.block_size}: {HINT}")
    return config, trained_length


def load_tensors(path: Path, hint: str) -> dict[str, Tensor]:
    """Read a safetensors file. Raises IntegrityError if it is missing or is not one."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing: {hint}") from None
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise IntegrityError(f"{path} is not a safetensors file ({type(error).__name__}): {hint}") from None


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError if the disk is full; safetensors itself raises another error."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if found := re.search(r"(?:os error |code: )(\d+)", str(error)):
            raise OSError(code := int(found[1]), os.strerror(code), str(path)) from None
        raise
