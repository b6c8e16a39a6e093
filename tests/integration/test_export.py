"""What an export holds and says, and that it runs where nothing else of the project is."""

import ast
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import torch
import yaml
from fixtures_mlflow import root_of, trained_project
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from pipeline import __main__ as command_line
from pipeline.config.sections import ModelConfig, RegistryConfig
from pipeline.data.token_files import write_shard
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.vocab import Vocabulary
from pipeline.model.generator import load_generator
from pipeline.model.gpt import GPT
from pipeline.model.weights import load_model, save_model
from pipeline.registry.export import APP_REQUIREMENTS, CPU_INDEX, EXPORTS, export_version
from pipeline.registry.register import register
from pipeline.report import cards
from pipeline.report.cards import TINY_SHAKESPEARE
from pipeline.system import files
from pipeline.system.errors import InputError, ModelMissing, OutOfSpaceError
from pipeline.system.files import read_json, verify_manifest, write_json, write_manifest
from pipeline.system.host import SOURCE_ROOT
from pipeline.tracking.mlflow_store import Store
from tests.waiting import wait_until

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
SECRET = "postgresql://me:s3cret@db.example/studies"
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


def a_model(folder: Path, bpe: Path, seed: int = 1, trained_length: int = 16, vocab_size: int = 50257) -> None:
    """A model folder with weights that are all different, the biases too."""
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=vocab_size, dropout=0.0, fold_vocab=False
    )
    model = GPT(config, Vocabulary.full(vocab_size)).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.trained_length = trained_length
    save_model(folder, model, bpe)


def a_version(folder: Path, bpe: Path, tokenizer: Tokenizer, **model: int) -> Path:
    """The artifacts of a registered version."""
    a_model(folder / "model", bpe, **model)
    (folder / "tokens").mkdir()
    write_shard(folder / "tokens" / "train-00000.bin", [tokenizer.encode(TEXT)], tokenizer.n_vocab)
    write_shard(folder / "tokens" / "val-00000.bin", [], tokenizer.n_vocab)
    write_manifest(folder / "tokens")
    (folder / "params.yaml").write_text(f"sweep:\n  storage: {SECRET} # where\n  trials: 3\n")
    return folder


def facts_of(**params: Any) -> dict[str, Any]:
    """What `describe_version` says of a version."""
    corpus = {"source": "https://example.org/t.txt", "sha256": TINY_SHAKESPEARE, "fraction": 0.1}
    return {
        "name": "shakespeare-gpt2",
        "version": "3",
        "aliases": ["champion"],
        "tags": {
            "fingerprint": "7e7c7d433831bf25",
            "data_sha256": "da" * 32,
            "model_sha256": "ab" * 32,
            "git_commit": "b04198e2",
            "tree_clean": "true",
            "target_loss": "0.1",
        },
        "params": {"corpus": corpus, "sweep": {"storage": SECRET}} | params,
        "environment": {"torch": "2.13.0", "device": "cpu AVX512", "precision": "bf16", "threads": "2"},
        "history": {"loss": [[1, 10.5], [2, 3.0], [3, 0.2]], "corpus_loss": [[3, 0.0912]]},
        "samples": [{"step": 2, "text": "ROMEO:"}],
        "metrics": {
            "corpus_loss": 0.09120656,
            "shifted_loss": 3.08,
            "top1_accuracy": 0.9917,
            "verbatim_recall": 0.895,
            "to_target.corpus.steps": 117.0,
            "to_target.corpus.tokens": 239014.0,
        },
        "created": "2026-11-21",
    }


@pytest.fixture
def version(tmp_path: Path, bpe: Path, tokenizer: Tokenizer) -> Path:
    return a_version(tmp_path / "version", bpe, tokenizer)


@pytest.fixture(scope="module")
def transformers() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # read when it is imported
        import transformers

        return transformers


@pytest.fixture(scope="module")
def exported_tokenizer(tmp_path_factory: Any, bpe: Path, tokenizer: Tokenizer, transformers: Any) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    export_version("hf", a_version(folder / "version", bpe, tokenizer), facts_of(), folder / "hf")
    return transformers.AutoTokenizer.from_pretrained(folder / "hf")


def front_matter(readme: Path) -> dict[str, Any]:
    return yaml.safe_load(readme.read_text().split("---\n")[1])


@pytest.mark.parametrize(
    "shape", [{}, {"vocab_size": 50304}, {"trained_length": 8}], ids=["as it is", "padded ids", "untrained positions"]
)
def test_transformers_computes_the_same_logits(tmp_path, bpe, tokenizer, transformers, shape):
    version = a_version(tmp_path / "version", bpe, tokenizer, **shape)
    export_version("hf", version, facts_of(), tmp_path / "hf")
    ours, length = load_model(version / "model"), shape.get("trained_length", 16)
    theirs, loading = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values())  # no keys missing, surplus or of another shape
    assert theirs.config.n_positions == len(theirs.transformer.wpe.weight) == length
    assert theirs.dtype == torch.float32
    ids = torch.randint(50257, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(ids).logits
        assert logits.shape == (3, length, 50257)
        torch.testing.assert_close(logits, ours(ids)[..., :50257], rtol=0, atol=1e-4)


def test_its_tokenizer_gives_the_same_ids_and_the_text_back(exported_tokenizer, tokenizer, shakespeare):
    for text in [*ODD, shakespeare.read_text()[:100_000]]:
        ids = tokenizer.encode(text)
        assert exported_tokenizer(text)["input_ids"] == ids, repr(text[:40])
        assert exported_tokenizer.decode(ids) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_its_tokenizer_gives_the_same_ids_for_any_text(exported_tokenizer, tokenizer, text):
    assert exported_tokenizer(text)["input_ids"] == tokenizer.encode(text)


def test_the_cards_example_runs_and_ends_where_the_trained_positions_do(
    version, tmp_path, transformers, monkeypatch, capsys
):
    export_version("hf", version, facts_of(), tmp_path / "hf")
    monkeypatch.chdir(tmp_path / "hf")
    example = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(example, names)
    prompt = names["inputs"]["input_ids"][0].tolist()
    assert names["tokenizer"].decode(prompt) == TEXT[: len(names["tokenizer"].decode(prompt))]
    assert names["ids"].shape[1] == 16  # trained_length
    assert capsys.readouterr().out.startswith("First Citizen:\nBefore we proceed")


def test_the_card_says_what_it_is_what_it_took_and_what_it_is_not(version, tmp_path):
    export_version("hf", version, facts_of(), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert front_matter(tmp_path / "hf" / "README.md") == {
        "language": "en",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "trained-from-scratch", "memorisation", "shakespeare"],
    }
    for said in (
        "0.0912 nats per token",
        "| 0.895 |",
        "| corpus: an evaluation on the whole training text | 117 | 239,014 |",
        "| batch: one minibatch below the target | not met | not met |",
        "Tiny Shakespeare, the first 10% of it",
        "da" * 32,
        "recites its training text",
        "has no positions beyond them",
        "no general language model",
        "the loss is 3.08",
        "git checkout b04198e2",
        "7e7c7d433831bf25",
        "ab" * 32,
        "public domain",
    ):
        assert said in card, said
    assert "\n![Loss over training steps](loss.png)\n" in card
    assert image.imread(tmp_path / "hf" / "loss.png").shape[:2] == (374, 660)  # 6 x 3.4 inches at 110 dots


def test_nothing_is_claimed_of_a_text_that_we_do_not_know(version, tmp_path):
    facts = facts_of(corpus={"source": "texts/mine.txt", "sha256": None, "fraction": 1.0})
    facts["tags"]["tree_clean"] = "false"
    facts["history"], facts["metrics"] = {}, {}  # neither measured nor recorded
    export_version("hf", version, facts, tmp_path / "hf")
    export_version("space", version, facts, tmp_path / "space")
    card = (tmp_path / "hf" / "README.md").read_text()
    for folder in ("hf", "space"):
        matter = front_matter(tmp_path / folder / "README.md")
        assert matter["license"] == "other"
        assert "language" not in matter
    assert not re.search(
        "Shakespeare|public domain|loss.png|None|nan", card.partition("# ")[2].replace("shakespeare", "")
    )
    assert "changes that were not committed" in card


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_folder_that_is_not_empty_is_refused_and_left_alone(version, tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("my own")
    for path in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(InputError, match="is there already: name a new folder, or an empty one"):
            export_version(kind, version, facts_of(), path)
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["my own"]


def test_an_empty_folder_is_taken_also_behind_a_link(version, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export_version("hf", version, facts_of(), tmp_path / "link")
    assert (tmp_path / "empty" / "README.md").is_file()


@pytest.mark.fault
def test_a_folder_that_somebody_fills_meanwhile_is_left_alone(version, tmp_path, monkeypatch):
    monkeypatch.setitem(EXPORTS, "slow", lambda *_: write_json(tmp_path / "mine" / "notes.json", "my own"))
    with pytest.raises(InputError, match="is there already"):
        export_version("slow", version, facts_of(), tmp_path / "mine")
    assert read_json(tmp_path / "mine" / "notes.json") == "my own"


@pytest.mark.fault
@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_that_fails_leaves_nothing_behind(version, tmp_path, monkeypatch, kind):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(files, "put_in_place", full)  # which gives the folder its name
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutOfSpaceError, match="disk full"):
        export_version(kind, version, facts_of(), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.fault
def test_what_a_killed_export_left_is_in_no_later_one(version, tmp_path):
    (tmp_path / ".unfinished-out").mkdir()
    (tmp_path / ".unfinished-out" / "half").touch()
    export_version("hf", version, facts_of(), tmp_path / "out")
    assert not [*tmp_path.rglob("half")]


def test_every_file_of_a_model_folder_is_in_its_manifest(version, tmp_path):
    export_version("hf", version, facts_of(), tmp_path / "hf")
    verify_manifest(tmp_path / "hf")
    assert read_json(tmp_path / "hf" / "manifest.json").keys() >= {"README.md", "model.safetensors", "merges.txt"}


@pytest.mark.security
@pytest.mark.parametrize("kind", EXPORTS)
def test_the_studies_address_and_this_machines_paths_stay_here(version, tmp_path, kind):
    export_version(kind, version, facts_of(), tmp_path / "out")
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for private in ("s3cret", "db.example", str(tmp_path), str(SOURCE_ROOT)):
        assert private.encode() not in content
    params = next((tmp_path / "out").rglob("params.yaml")).read_text()
    assert params == "sweep:\n  storage: sqlite:///optuna.db # where\n  trials: 3\n"


def test_a_space_holds_the_program_the_version_and_how_to_publish_it(version, tmp_path):
    export_version("space", version, facts_of(), folder := tmp_path / "space")
    generator = load_generator(folder / "version")  # verified against its manifests
    assert generator.trained_length == 16
    assert read_json(folder / "version" / "facts.json")["history"] == facts_of()["history"]
    for name in ("pipeline", "webapp"):
        here = {path.name for path in (SOURCE_ROOT / name).iterdir()} - {"__pycache__"}
        assert {path.name for path in (folder / name).iterdir()} == here
    assert (folder / "pipeline" / "report" / "templates" / "space_card.md.j2").is_file()
    configured = front_matter(folder / "README.md")
    assert configured.items() >= {"sdk": "gradio", "app_file": "app.py", "license": "mit", "pinned": False}.items()
    assert configured["sdk_version"] == metadata.version("gradio")
    assert configured["python_version"] == "{}.{}".format(*sys.version_info)
    assert len(configured["short_description"]) <= 60  # the Hub's limit
    guide = (folder / "README.md").read_text()
    for step in ("hf auth login", "hf repos create YOU/shakespeare-gpt2 --type space --sdk gradio",
                 "hf upload YOU/shakespeare-gpt2 . . --type space", "CPU basic", "--delete"):  # fmt: skip
        assert step in guide
    assert "{" not in guide


def test_a_space_asks_for_exactly_what_the_app_imports_in_the_versions_that_are_here(version, tmp_path):
    export_version("space", version, facts_of(), folder := tmp_path / "space")
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines == [CPU_INDEX, *(f"{name}=={metadata.version(name).split('+')[0]}" for name in APP_REQUIREMENTS)]
    distributions = {"yaml": "pyyaml"}
    used = {distributions.get(name, name) for name in libraries_of("app", folder)}
    assert used - {"starlette"} == set(APP_REQUIREMENTS)  # Starlette is what Gradio is built of, and comes with it


def libraries_of(module: str, folder: Path) -> set[str]:
    """Third-party libraries that importing a module loads, through our own modules, where no registry is asked."""
    found: set[str] = set()
    waiting, seen = [module], {"webapp.registry_source", "pipeline.tracking.mlflow_store"}
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        path = folder / Path(*name.split(".")).with_suffix(".py")
        if path.is_file():
            waiting += imported_by(path, also_in_functions=name == "app")
        elif name.split(".")[0] not in {*sys.stdlib_module_names, "pipeline", "webapp"}:
            found.add(name.split(".")[0])
    return found


def imported_by(path: Path, also_in_functions: bool) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes: Iterator[ast.AST] = ast.walk(tree) if also_in_functions else iter(tree.body)
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] if node.module != "pipeline" else [f"pipeline.{alias.name}" for alias in node.names]
    return names


@pytest.mark.slow
def test_a_space_runs_by_itself(version, tmp_path):
    from gradio_client import Client

    export_version("space", version, facts_of(), folder := tmp_path / "space")
    with (folder / "pipeline" / "__init__.py").open("a") as file:
        file.write("\nprint(__file__)\n")  # to see which one is imported
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"SPACE_ID": "you/shakespeare-gpt2", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}  # as in a Space
    with (tmp_path / "said").open("w") as said:
        app = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port)],
            cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        page = wait_for_page(f"http://127.0.0.1:{port}/", app, tmp_path / "said")
        assert "<!doctype html>" in page
        client = Client(f"http://127.0.0.1:{port}/", verbose=False)
        answer = client.predict("First Citizen:", 4, 0, api_name="/generate")  # max_tokens and temperature
        assert answer["model"] == "shakespeare-gpt2 version 3"
        assert answer["finished"]
    finally:
        app.terminate()
        app.wait(20)
    assert (tmp_path / "said").read_text().startswith(f"{folder}/pipeline/__init__.py\n")


def wait_for_page(url: str, app: "subprocess.Popen[bytes]", said: Path) -> str:
    request = urllib.request.Request(url, headers={"Host": "you-shakespeare-gpt2.hf.space"})

    def answer() -> str:
        assert app.poll() is None, said.read_text()
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.read().decode()
        except urllib.error.HTTPError:
            raise
        except OSError:  # not there yet
            return ""

    page = wait_until(answer, 300)  # torch and Gradio are slow to import on busy cores
    assert page, said.read_text()
    return page


@pytest.fixture
def registered(store: Store, tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a champion that can be loaded; its folder is the working directory."""
    project = trained_project(tmp_path / "project")
    shutil.rmtree(project / "models" / "model")
    a_model(project / "models" / "model", bpe)
    name = f"model-{uuid4().hex[:8]}"
    (project / "params.yaml").write_text(f"registry: {{model: {name}, max_target_loss: 0.1}}\n")
    register(root_of(store), project, RegistryConfig(model=name, max_target_loss=0.1))
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    return project


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    parsed = command_line.parse()
    parsed.command(parsed)


def test_the_command_exports_the_champion_or_the_version_that_is_named(registered, tmp_path, monkeypatch, capsys):
    run_command(monkeypatch, "export", "hf", str(tmp_path / "hf"))
    assert "version 1, " in capsys.readouterr().out
    verify_manifest(tmp_path / "hf")
    assert (
        "| corpus: an evaluation on the whole training text | 20 | 160 |" in (tmp_path / "hf" / "README.md").read_text()
    )
    run_command(monkeypatch, "export", "space", str(tmp_path / "space"), "--version", "1")
    assert load_generator(tmp_path / "space" / "version").trained_length == 16
    with pytest.raises(ModelMissing, match="has no version '9'"):
        run_command(monkeypatch, "export", "hf", str(tmp_path / "new"), "--version", "9")
    assert not (tmp_path / "new").exists()


def test_a_further_export_is_a_function_with_a_name_in_the_table(registered, tmp_path, monkeypatch, capsys):
    def export_title(artifacts: Path, info: dict[str, Any], folder: Path) -> None:
        assert (artifacts / "model").is_dir()
        (folder / "title.txt").write_text(f"{info['name']} {info['version']}")

    monkeypatch.setitem(EXPORTS, "title", export_title)
    run_command(monkeypatch, "export", "title", str(tmp_path / "out"))
    assert (tmp_path / "out" / "title.txt").read_text().startswith("model-")
    assert "version 1, 0 MB" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"export onnx: unknown, choose one of hf, space, title"):
        run_command(monkeypatch, "export", "onnx", str(tmp_path / "new"))


def test_a_target_rule_that_the_cards_do_not_know_is_exported_with_its_words(version, tmp_path, monkeypatch):
    toy = SimpleNamespace(description="three minibatches in a row", needs_held_out=False)
    monkeypatch.setattr(cards, "RULES", {"toy": toy, "shy": SimpleNamespace(description="", needs_held_out=True)})
    info = facts_of()
    info["metrics"] |= {"to_target.toy.steps": 40.0, "to_target.toy.tokens": 1234.0}
    export_version("hf", version, info, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| toy: three minibatches in a row | 40 | 1,234 |" in card
    assert "| shy" not in card


def test_the_command_refuses_a_filled_folder_before_it_asks_for_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is neither params.yaml nor a store
    write_json(tmp_path / "mine" / "a.json", {})
    with pytest.raises(InputError, match="is there already"):
        run_command(monkeypatch, "export", "hf", "mine")
