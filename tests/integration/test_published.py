"""A GPT-2 that Transformers has saved is trained on to its target, survives a kill, and goes back to Transformers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_registry import version_info

from pipeline.config.params import load_params
from pipeline.config.sections import ModelConfig
from pipeline.data.token_files import TokenFolder
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.published import INIT_FOLDER, with_hash, write_init
from pipeline.model.weights import load_model, load_tensors
from pipeline.registry import reproduce
from pipeline.registry.export import export_version
from pipeline.system.errors import InputError
from pipeline.system.files import read_json, write_json
from pipeline.training.train import read_config
from tests.trainings import bits, change, epochs, run_folder, train, train_until_killed

INIT = Path("data") / INIT_FOLDER


@pytest.fixture(scope="module")
def transformers() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # read when it is imported
        import transformers

        return transformers


@pytest.fixture
def published(workspace, transformers):
    """A random GPT-2 in weights/tiny, from which the workspace's run starts; its first block is frozen."""
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=48)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained("weights/tiny", max_shard_size="2MB")
    shape = {"model.n_embd": 32, "model.block_size": 48, "windows.seq_len": 48, "model.fold_vocab": False}
    fast = {"train.freeze": 1, "train.precision": "fp32", "optim.muon_lr": 0.01}
    change(workspace, **shape, **fast, **{"model.init": "weights/tiny"})
    prepare()
    return model


def prepare():
    """What the stage `tokenizer` does with the weights."""
    tokenizer, tokens = load_tokenizer(Path("data/tokenizer")), TokenFolder(Path("data/tokens")).train
    text = tokenizer.decode(tokens.read(0, 100).tolist())
    return write_init(load_params().section(ModelConfig), INIT, tokenizer, text)


def version():
    """The folder of a version of the trained model."""
    for name in ("models/model", "data/tokens"):
        shutil.copytree(name, Path("version") / Path(name).name)
    shutil.copy("params.yaml", "version")
    return Path("version")


def test_it_trains_to_its_target_and_back_and_our_export_can_be_trained_on(published, transformers, capsys):
    prompt = load_tokenizer(Path("data/tokenizer")).encode("First Citizen:")
    change(
        Path(),
        **{"target.loss": 8.0, "target.rule": "batch", "optim.lr": 0.01, "train.freeze": 0},
        **epochs(Path(), 60, 192),
    )
    train()
    results = read_json(Path("models/run.json"))["results"]
    assert results["to_target"]["batch"] is not None, capsys.readouterr().out
    assert (
        read_json(Path("models/run.json"))["params"]["model"]["init"]
        == with_hash(load_params().section(ModelConfig), INIT).init
    )
    assert read_json(next(Path("checkpoints").glob("*/identity.json")))["fingerprint"]
    export_version("hf", version(), version_info(), Path("weights/again"))
    theirs = transformers.GPT2LMHeadModel.from_pretrained("weights/again").eval()
    same = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "activation_function", "layer_norm_epsilon")
    assert [getattr(theirs.config, key) for key in same] == [getattr(published.config, key) for key in same]
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt])).logits
        torch.testing.assert_close(logits, load_model(Path("models/model"))(torch.tensor([prompt])), rtol=0, atol=1e-5)
        assert (logits - published(torch.tensor([prompt])).logits).abs().max() > 0.1

    first = read_config(load_params(), Path("data"))
    change(Path(), **{"model.init": "weights/again"})
    with pytest.raises(InputError, match=r"data/init has weights/tiny, model.init is weights/again: run `dvc repro"):
        read_config(load_params(), Path("data"))
    prepare()
    trained, again = (load_tensors(path / "model.safetensors", "") for path in (Path("models/model"), INIT))
    assert all(torch.equal(trained[name], again[name]) for name in trained.keys() | again.keys())
    assert read_config(load_params(), Path("data")) != first


def test_a_run_that_was_killed_ends_with_the_same_bits_and_frozen_tensors_with_those_published(published):
    steps = epochs(Path(), 6, 192)
    change(Path(), **steps, **{"checkpoint.interval_steps": 2})
    train()
    expected, start, end = (
        bits(),
        load_tensors(INIT / "model.safetensors", ""),
        load_tensors(Path("models/model/model.safetensors"), ""),
    )
    kept = {name for name in start if torch.equal(start[name], end[name])}
    assert kept == {name for name in start if name.startswith(("wte.", "wpe.", "h.0."))}
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in published.state_dict().items()}
    assert torch.equal(end["wte.weight"], theirs["wte.weight"])

    fingerprint = run_folder().name
    shutil.rmtree("checkpoints")
    shutil.rmtree("models")
    Path("weights/tiny").rename("weights/moved")  # the same weights at another place are the same run
    change(Path(), **{"model.init": "weights/moved"})
    prepare()
    train_until_killed(after_step=5)
    train()
    assert run_folder().name == fingerprint
    assert (run_folder() / "resumes").read_text() == "4\n"
    assert bits() == expected


def test_a_version_is_trained_again_from_its_weights_and_not_from_others(published, tmp_path):
    change(Path(), **epochs(Path(), 2, 192))
    train()
    files, here = version(), Path.cwd()
    project = reproduce._set_up(files, tmp_path / "project", "weights/tiny", here)
    assert read_json(project / "data/init/manifest.json") == read_json(INIT / "manifest.json")
    assert reproduce._fingerprint_here(files) == read_json(Path("models/run.json"))["fingerprint"]
    Path("weights/tiny").rename("weights/moved")  # data/init still has them, whatever they are called now
    record = INIT / "init.json"
    write_json(record, {**read_json(record), "source": "weights/moved"})
    project = reproduce._set_up(files, tmp_path / "moved", "weights/tiny", here)
    assert (project / "data/init/model.safetensors").read_bytes() == (INIT / "model.safetensors").read_bytes()
    assert read_json(project / "data/init/init.json")["source"] == "weights/tiny"
    shutil.rmtree(INIT)
    Path("weights/moved").rename("weights/tiny")
    path = Path("weights/tiny/config.json")
    write_json(path, {**read_json(path), "n_layer": 1})
    with pytest.raises(InputError, match=r"weights/tiny: model.* has transformer.h.1"):
        reproduce._set_up(files, tmp_path / "other", "weights/tiny", here)
    shutil.rmtree("weights/tiny")
    published.transformer.wte.weight.data.add_(1)
    published.save_pretrained("weights/tiny")
    with pytest.raises(InputError, match="weights/tiny has other weights than it had then: put those with sha256:"):
        reproduce._set_up(files, tmp_path / "third", "weights/tiny", here)
