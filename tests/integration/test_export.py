"""Transformers computes the same from an export, and a Space runs by itself."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_mlflow import root_of, trained_project
from fixtures_registry import (  # noqa: F401 (fixtures)
    TEXT,
    _command,
    _keep_threads,
    _name,
    save_small_model,
    serving,
    version_info,
    write_version,
)
from fixtures_tokenizer import POEM
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sections import RegistryConfig
from pipeline.data.tokenizer import make_tokenizer
from pipeline.model.generator import load_generator
from pipeline.model.weights import load_model
from pipeline.registry.export import EXPORTS, export_version
from pipeline.registry.register import register
from pipeline.system.files import verify_manifest, write_json

ODD = [
    "",
    " ",
    "  two  blanks \n\n and\tothers \u2028\u00a0x ",
    "<|endoftext|> is plain text <|endoftext|>",
    "I'll 'LL don't 'S",
    "naïve é e\u0301 ﬁ Ǆ 字 ١٢ ² ½",
    "🤖👩‍👩‍👧 \x00 \ufeff\u200b",
    "\r\n\r\n" + " " * 3000 + "x",
]


@pytest.fixture(scope="module")
def transformers() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # read when it is imported
        import transformers

        return transformers


@pytest.fixture(scope="module")
def exported(tmp_path_factory, bpe, tokenizer) -> Path:
    """An export of a model with padded ids and untrained positions, neither of which it holds."""
    folder = tmp_path_factory.mktemp("exported")
    version = write_version(folder / "version", bpe, tokenizer, vocab_size=50304, trained_length=8)
    export_version("hf", version / "artifacts", version_info(), folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def exported_tokenizer(exported, transformers) -> Any:
    return transformers.AutoTokenizer.from_pretrained(exported)


def test_transformers_computes_the_same_logits(exported, transformers):
    theirs, loading = transformers.GPT2LMHeadModel.from_pretrained(exported, output_loading_info=True)
    assert not any(loading.values())  # no keys missing, surplus or of another shape
    assert theirs.config.n_positions == len(theirs.transformer.wpe.weight) == 8
    assert theirs.dtype == torch.float32
    ids = torch.randint(50257, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(ids).logits
        assert logits.shape == (3, 8, 50257)
        ours = load_model(exported.parent / "version" / "artifacts" / "model")(ids)
        torch.testing.assert_close(logits, ours[..., :50257], rtol=0, atol=1e-4)


def test_its_tokenizer_gives_the_same_ids_and_decodes_them_to_the_text(exported_tokenizer, tokenizer, shakespeare):
    for text in [*ODD, shakespeare.read_text()[:100_000]]:
        ids = tokenizer.encode(text)
        assert exported_tokenizer(text)["input_ids"] == ids, repr(text[:40])
        assert exported_tokenizer.decode(ids) == text


@settings(max_examples=20, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_its_tokenizer_gives_the_same_ids_for_any_text(exported_tokenizer, tokenizer, text):
    assert exported_tokenizer(text)["input_ids"] == tokenizer.encode(text)


@pytest.fixture(scope="module", params=["bytes", "chars", "bpe:320", "bpe:3000"])
def both(request, transformers, tmp_path_factory, shakespeare) -> tuple[Any, Any]:
    """A tokenizer that is trained on several scripts, or on English, and Transformers' one from its export."""
    folder, text = tmp_path_factory.mktemp("both"), POEM
    if request.param == "bpe:3000":
        text = shakespeare.read_text()[:300_000]
    ours = make_tokenizer(request.param, folder / "tokenizer", [text.encode()])
    version = write_version(folder / "version", folder / "tokenizer", ours, vocab_size=ours.n_vocab + 5)
    export_version("hf", version / "artifacts", version_info(), folder / "hf")
    assert f"The model's vocabulary is {ours.description}, of which" in (folder / "hf" / "README.md").read_text()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    assert model.config.vocab_size == len(theirs) == ours.n_vocab
    assert model.config.eos_token_id == theirs.eos_token_id == theirs.pad_token_id == ours.eot
    return ours, theirs


def test_transformers_gives_the_same_ids_with_each_tokenizer_for_ten_thousand_texts(both, chance):
    ours, theirs = both
    alphabet = POEM + "\n\r\t \u00a0\u3000\u2028\x85'srveLl1.-\u00e9\u0301\u064e\u03a9\u6f22\U0001f600\0\x1c\ufeff"

    def random_text() -> str:
        match chance.randrange(4):
            case 0:
                return "".join(chance.choices(alphabet, k=chance.randrange(40)))
            case 1:
                return POEM[chance.randrange(len(POEM)) :][: chance.randrange(60)]
            case 2:  # neighbours that overlap, and special tokens
                return (
                    "".join(chance.choices("ab aabbthe\n'll", k=chance.randrange(40))) + "<|endoftext|> <|endoftext|>"
                )
            case _:
                codes = (chance.randrange(0x110000) for _ in range(chance.randrange(30)))
                return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)

    texts = [*ODD, *(random_text() for _ in range(10_000))]
    for text, found in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert found == ours.encode(text), repr(text)
    for text in texts[:1000]:
        assert theirs.decode(ours.encode(text)) == text


def test_the_cards_example_runs_up_to_the_trained_length(exported, transformers, monkeypatch, capsys):
    monkeypatch.chdir(exported)
    example = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(example, names)
    prompt = names["inputs"]["input_ids"][0].tolist()
    assert TEXT.startswith(names["tokenizer"].decode(prompt))
    assert names["ids"].shape[1] == 8  # trained_length
    assert capsys.readouterr().out.startswith("First Citizen:")


def test_the_command_exports_a_registered_version(store, name, bpe, tmp_path, command, monkeypatch, capsys):
    """Kinds are functions in a table: a new one works by its name."""
    project = trained_project(tmp_path / "project")
    (project / "models" / "model" / "manifest.json").unlink()
    save_small_model(project / "models" / "model", bpe)
    register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1))
    capsys.readouterr()

    def export_title(artifacts: Path, info: dict[str, Any], folder: Path) -> None:
        assert (artifacts / "model").is_dir()
        (folder / "title.txt").write_text(f"{info['name']} {info['version']}")

    monkeypatch.setitem(EXPORTS, "title", export_title)
    assert command("export", "hf", "hf") == command("export", "space", "space", "--version", "1") == 0
    assert command("export", "title", "title") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["hf", "space", "title"]
    assert all(f"{name} version 1, " in line for line in lines)
    assert lines[2].endswith(f", {len(name) + 2} B; see its README.md")
    verify_manifest(tmp_path / "hf")
    assert "| 20 | 160 |" in (tmp_path / "hf" / "README.md").read_text()
    assert load_generator(tmp_path / "space" / "version").trained_length == 16
    assert (tmp_path / "title" / "title.txt").read_text() == f"{name} 1"

    assert command("export", "hf", "new", "--version", "9") == 7
    assert command("export", "onnx", "new") == 2
    write_json(tmp_path / "mine" / "a.json", {})
    (tmp_path / "params.yaml").unlink()
    assert command("export", "hf", "mine") == 2  # refused before params.yaml and the registry are read
    assert not (tmp_path / "new").exists()
    errors = capsys.readouterr().err.splitlines()
    for line, words in zip(
        errors,
        ("has no version '9'", "export onnx: unknown, choose one of hf, gguf, space, title", "exists already"),
        strict=True,
    ):
        assert words in line


def test_a_space_runs_by_itself(bpe, tokenizer, tmp_path):
    from gradio_client import Client

    version = write_version(tmp_path / "version", bpe, tokenizer)
    export_version("space", version / "artifacts", version_info(), folder := tmp_path / "space")
    with (folder / "pipeline" / "__init__.py").open("a") as file:
        file.write("\nprint(__file__)\n")  # to see which one is imported
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"SPACE_ID": "you/shakespeare-gpt2", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}  # as in a Space
    with serving(["app.py"], "/", folder, environment, host="you-shakespeare-gpt2.hf.space") as (address, _):
        answer = Client(address, verbose=False).predict("First Citizen:", 4, 0, api_name="/generate")
    assert answer["model"] == "shakespeare-gpt2 version 3"
    assert answer["finished"]
    assert (folder / "log").read_text().startswith(f"{folder}/pipeline/__init__.py\n")
