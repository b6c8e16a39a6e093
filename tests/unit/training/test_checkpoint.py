"""A checkpoint is complete or absent, any damage to it is found, and the newest intact one is loaded."""

import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch

from pipeline.config.sections import ModelConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.model.weights import load_model, save_model
from pipeline.system import files
from pipeline.system.errors import InputError, IntegrityError, OutOfSpaceError
from pipeline.system.files import write_manifest
from pipeline.training.checkpoint import (
    checkpoint_steps,
    keep_newest,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
)


def save(folder, step):
    tensors = {"weights": {"w": torch.full((64,), float(step))}, "rng": {"cpu": torch.arange(16, dtype=torch.uint8)}}
    return save_checkpoint(folder, step, tensors, {"step": step})


@pytest.fixture
def three(tmp_path):
    """A run's folder with the checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


def test_every_file_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):  # A4
    calls = []
    for module, name in ((files, "fsync"), (files.os, "rename")):
        original = getattr(module, name)

        def noted(*paths, name=name, original=original):
            calls.append((name, os.path.basename(paths[0])))
            return original(*paths)

        monkeypatch.setattr(module, name, noted)
    save(tmp_path, 1)
    renamed = calls.index(("rename", ".unfinished-step-00000001"))
    synced = {name for call, name in calls[:renamed] if call == "fsync"}
    written = {"weights.safetensors", "rng.safetensors", "state.json", "manifest.json", ".unfinished-step-00000001"}
    assert synced >= written
    assert calls[renamed + 1 :] == [("fsync", tmp_path.name)]


def test_a_checkpoint_has_a_format_and_one_without_it_has_the_first(tmp_path):
    folder = save(tmp_path, 1)
    assert json.loads((folder / "state.json").read_text()) == {"format": 1, "step": 1}
    assert load_checkpoint(tmp_path, 1)[1] == {"step": 1}
    (folder / "state.json").write_text('{"step": 1}')
    write_manifest(folder)
    assert load_checkpoint(tmp_path, 1)[1] == {"step": 1}


def test_a_checkpoint_of_an_unknown_format_is_refused_and_no_earlier_one_is_taken(three):
    (three / "step-00000003" / "state.json").write_text('{"format": 2, "step": 3}')
    write_manifest(three / "step-00000003")
    with pytest.raises(InputError, match=r"^[^\n]*step-00000003 has the checkpoint format 2, but [^\n]*$"):
        newest_valid(three)


def test_any_damage_to_any_file_is_found_and_the_previous_checkpoint_is_loaded(three, capsys, chance):  # A5
    folder = three / "step-00000003"
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        damages = {"cut": whole[:-1], "emptied": b"", "removed": None}
        for bit in (0, 8 * len(whole) - 1, *(chance.randrange(8 * len(whole)) for _ in range(6))):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            damages[f"bit {bit} flipped"] = flipped
        for damage, content in damages.items():
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            assert newest_valid(three)[1]["step"] == 2, f"{path.name} {damage}"
            warned = capsys.readouterr().err
            assert "falling back to the previous checkpoint" in warned
            assert folder.name in warned
            assert path.name in warned or path.name == "manifest.json"  # an altered manifest may name another file
            path.write_bytes(whole)
    assert newest_valid(three)[1]["step"] == 3


def test_without_an_intact_checkpoint_the_error_says_what_to_do(three):  # A5
    for step in (1, 2, 3):
        (three / f"step-{step:08d}" / "state.json").write_text("{}")
    with pytest.raises(IntegrityError, match="python -m pipeline clean") as error:
        newest_valid(three)
    assert error.value.exit_code == 3


def test_a_checkpoint_after_the_best_step_needs_that_of_the_best_step(three, capsys):
    (three / "step-00000002" / "weights.safetensors").unlink()
    assert newest_valid(three, best=3)[1]["step"] == newest_valid(three)[1]["step"] == 3
    assert not capsys.readouterr().err
    assert newest_valid(three, best=2)[1]["step"] == 1
    assert "step-00000002" in capsys.readouterr().err


def test_the_newest_and_the_best_are_kept_and_other_folders_are_not_touched(three):
    shutil.copytree(three / "step-00000001", three / "step-00000009.mine")
    save(three, 4)
    assert checkpoint_steps(three) == [4, 3, 2, 1]
    keep_newest(three, 4, keep=2, also={1, None})
    assert checkpoint_steps(three) == [4, 3, 1]
    assert (three / "step-00000009.mine").is_dir()
    keep_newest(three, 3, keep=2)  # the run has resumed from step 1, since 4 and another one were damaged
    assert checkpoint_steps(three) == [3, 1]


def test_a_full_disk_names_the_bytes_and_leaves_the_last_checkpoint(tmp_path):  # A6
    """RLIMIT_FSIZE replaces the full disk: the system refuses the write half way, without root."""
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"weights": {"w": torch.zeros(1_000_000)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OutOfSpaceError, match=r"4,000,000 bytes needed, [\d,]+ bytes free"):
            save_checkpoint(tmp_path, 2, large, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert newest_valid(tmp_path)[1]["step"] == 1


def test_a_text_with_ids_beyond_those_of_the_model_is_refused(tmp_path, bpe):
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=50257, dropout=0.0, fold_vocab=True)
    model = GPT(shape, Vocabulary.of(np.arange(50257) < 5, 50257)).initialise(seed=1)
    save_model(tmp_path / "model", model, bpe)
    load_model(tmp_path / "model")
    with pytest.raises(IntegrityError, match="has 50257 ids, the text has ids beyond them"):
        load_model(tmp_path / "model", np.ones(60000, np.int64))
