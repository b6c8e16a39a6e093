"""checkpoint: a folder of safetensors and JSON under a manifest -> written whole or not at all, newest valid one wins.

Two kinds. A working checkpoint, `checkpoints/<fingerprint>/step-000123/`, holds all that training needs to go on with
the same bits. A model folder, `models/model/`, holds what everyone else needs: weights with the standard vocabulary,
their shape, and the tokenizer.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.data.tokenizer import BPE_SHA256
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT, ModelConfig
from pipeline.system.errors import IntegrityError, ModelMissing
from pipeline.system.files import (
    CURE,
    UNFINISHED,
    atomic_folder,
    read_json,
    sweep_unfinished,
    verify_manifest,
    write_json,
)

STATE = "state.json"
WEIGHTS = "model.safetensors"
LOST = "it cannot be gone on from"
Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor
Require = Callable[[Path, Tensors, Any], None]  # raises IntegrityError


def save_checkpoint(run_folder: Path, step: int, tensors: Tensors, facts: dict[str, Any]) -> Path:
    """Write `run_folder/step-<step>/` atomically; return it. Raises OutOfSpaceError, all earlier ones left intact."""
    folder = _folder_of(run_folder, step)
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with atomic_folder(folder, needed) as unfinished:
        for stem, group in tensors.items():
            _save_file(group, unfinished / f"{stem}.safetensors")
        write_json(unfinished / STATE, facts)
    return folder


def load_checkpoint(run_folder: Path, step: int) -> tuple[Tensors, dict[str, Any]]:
    """Read back what was saved. Raises IntegrityError, naming the file, unless every byte is as it was written."""
    folder = _folder_of(run_folder, step)
    verify_manifest(folder, LOST)
    tensors = {path.stem: _load_file(path, LOST) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, read_json(folder / STATE)


def checkpoint_steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    names = (path.name.removeprefix("step-") for path in run_folder.glob("step-*"))
    return sorted((int(name) for name in names if re.fullmatch("[0-9]{8,}", name)), reverse=True)


def newest_valid(
    run_folder: Path, up_to: int | None = None, require: Require | None = None
) -> tuple[Tensors, dict[str, Any]] | None:
    """Load the newest checkpoint that is intact, at step `up_to` at most; None where there is none.

    Sweeps what a killed save left; warns of each checkpoint that it passes over, altered or such that `require` raises
    IntegrityError. Raises that too where none is left.
    """
    sweep_unfinished(run_folder)
    steps = [step for step in checkpoint_steps(run_folder) if up_to is None or step <= up_to]
    for step in steps:
        try:
            tensors, facts = load_checkpoint(run_folder, step)
            if require:
                require(_folder_of(run_folder, step), tensors, facts)
            return tensors, facts
        except IntegrityError as error:
            print(f"warning: {error}; falling back to the checkpoint before", file=sys.stderr)
    if steps:
        raise IntegrityError(f"no checkpoint in {run_folder} is intact: `python -m pipeline clean {run_folder.name}`")
    return None


def is_intact(run_folder: Path, step: int) -> bool:
    """Whether the checkpoint of `step` is there, every byte as it was written."""
    try:
        verify_manifest(_folder_of(run_folder, step))
    except IntegrityError:
        return False
    return True


def keep_newest(run_folder: Path, keep: int, also: int | None) -> None:
    """Remove all checkpoints but the newest `keep` and that of step `also`, each renamed first: none is half there."""
    for step in checkpoint_steps(run_folder)[keep:]:
        if step != also:
            doomed = run_folder / f"{UNFINISHED}removed-{step}"
            _folder_of(run_folder, step).rename(doomed)
            shutil.rmtree(doomed)


def save_model(folder: Path, model: GPT, bpe: Path) -> None:
    """Write a model folder: weights expanded to the full vocabulary, config.json and the tokenizer of `bpe`."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights["wte.weight"] = model.vocabulary.unfold_rows(weights["wte.weight"]).contiguous()
    shape = {"model": model.config.model_dump(), "trained_length": model.trained_length}
    needed = sum(tensor.nbytes for tensor in weights.values())
    with atomic_folder(folder, needed) as unfinished:
        _save_file(weights, unfinished / WEIGHTS)
        write_json(unfinished / "config.json", shape)
        for name in BPE_SHA256:
            shutil.copyfile(bpe / name, unfinished / name)


def load_model(folder: Path, counts: np.ndarray | None = None) -> GPT:
    """Load a model folder, in eval mode on the CPU, after checking its every byte.

    `counts`: how often each id occurs in the training text; a model that was trained folded is folded again, exactly,
    which makes it smaller and faster. Raises ModelMissing or IntegrityError.
    """
    if not folder.is_dir():
        raise ModelMissing(f"{folder} not found: `dvc repro` makes it")
    verify_manifest(folder)
    config, trained_length = _read_shape(folder / "config.json")
    weights = _load_file(folder / WEIGHTS, CURE)
    with torch.device("meta"):
        whole = GPT(config, Vocabulary.full(config.vocab_size)).state_dict()
    require_alike(folder / WEIGHTS, weights, {name: tensor.shape for name, tensor in whole.items()}, CURE)
    if counts is not None and counts[config.vocab_size :].any():
        raise IntegrityError(f"{folder} has {config.vocab_size} ids, the text has ids beyond them: {CURE}")
    if config.fold_vocab and counts is not None:
        vocabulary = Vocabulary.of(counts, config.vocab_size)
    else:
        vocabulary = Vocabulary.full(config.vocab_size)
    weights["wte.weight"] = vocabulary.fold_rows(weights["wte.weight"])
    model = GPT(config, vocabulary)
    model.load_state_dict(weights)
    model.trained_length = trained_length
    return model.eval()


def require_alike(path: Path, found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], cure: str) -> None:
    """Raise IntegrityError unless what was `found` in a file are fp32 tensors of these names and shapes."""
    fault = ""
    if names := sorted(found.keys() ^ shapes.keys()):
        fault = f"{'holds' if names[0] in found else 'lacks'} {names[0]}"
    for name, tensor in found.items():
        if not fault and (tensor.dtype, tensor.shape) != (torch.float32, shapes[name]):
            fault = f"holds {name} as {tensor.dtype} {list(tensor.shape)}, not {list(shapes[name])} in fp32"
    if fault:
        raise IntegrityError(f"{path} is of another model, it {fault}: {cure}")


def _read_shape(path: Path) -> tuple[ModelConfig, int]:
    """Shape of a model and how many positions were trained."""
    values = read_json(path)
    try:
        config, trained_length = ModelConfig.model_validate(values["model"]), values["trained_length"]
    except (KeyError, TypeError, ValidationError):
        raise IntegrityError(f"{path} describes no model: {CURE}") from None
    if type(trained_length) is not int or not 1 <= trained_length <= config.block_size:
        raise IntegrityError(f"{path} has trained_length {trained_length!r}, block_size {config.block_size}: {CURE}")
    return config, trained_length


def _load_file(path: Path, cure: str) -> dict[str, Tensor]:
    """Read safetensors. Raises IntegrityError where they are none, whatever their hash says."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing: {cure}") from None
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise IntegrityError(f"{path} holds no tensors ({type(error).__name__}): {cure}") from None


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors, with a full disk as the OSError that it is."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        codes = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        if code := next(
            (code for code in codes if f"os error {code}" in str(error) or f"code: {code}," in str(error)), 0
        ):
            raise OSError(code, os.strerror(code), str(path)) from None
        raise


def _folder_of(run_folder: Path, step: int) -> Path:
    return run_folder / f"step-{step:08d}"
