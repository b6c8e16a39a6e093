"""What an export holds and says, and what it leaves alone."""

import ast
import errno
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fixtures_registry import SECRET, _keep_threads, version_info, write_version  # noqa: F401 (a fixture)
from fixtures_tokenizer import POEM, _made  # noqa: F401 (a fixture)
from matplotlib import image

from pipeline.data.token_files import write_shard
from pipeline.model.generator import load_generator
from pipeline.registry.export import APP_REQUIREMENTS, CPU_INDEX, EXPORTS, _described, export_version
from pipeline.report import cards
from pipeline.system import files
from pipeline.system.errors import InputError, OutOfSpaceError
from pipeline.system.files import read_json, write_json, write_manifest
from pipeline.system.host import SOURCE_ROOT

MODEL = dict.fromkeys(
    (
        "n_params",
        "n_positions",
        "n_layer",
        "n_head",
        "n_embd",
        "vocab_size",
        "n_used",
        "n_tokens",
        "tokenizer",
        "prompt",
    ),
    1,
)


@pytest.fixture(scope="module")
def exported(bpe, tokenizer, tmp_path_factory) -> Path:
    """A folder with both exports of one version, hf/ and space/."""
    folder = tmp_path_factory.mktemp("exported")
    version = write_version(folder / "version", bpe, tokenizer)
    for kind in ("hf", "space"):
        export_version(kind, version / "artifacts", version_info(), folder / kind)
    return folder


@pytest.fixture
def tiny_export(monkeypatch) -> str:
    """The name of an export that writes one small file."""
    monkeypatch.setitem(EXPORTS, "tiny", lambda _version, info, folder: write_json(folder / "name.json", info["name"]))
    return "tiny"


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_model_card_says_what_it_is_how_it_was_trained_and_its_limits(exported):
    card = (exported / "hf" / "README.md").read_text()
    assert front_matter(card) == {
        "language": "en",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "trained-from-scratch", "memorisation", "shakespeare"],
    }
    for words in (
        "0.0912",
        "| 0.895 |",
        "| 117 | 239,014 |",
        "| not met | not met |",
        "Tiny Shakespeare, the first 10% of it",
        "da" * 32,
        "3.08",
        "git checkout b04198e2",
        "7e7c7d433831bf25",
        "ab" * 32,
        "public domain",
    ):
        assert words in card, words
    assert "\n![Loss over training steps](loss.png)\n" in card
    assert image.imread(exported / "hf" / "loss.png").shape[:2] == (374, 660)  # 6 x 3.4 inches at 110 dots


def test_a_line_follows_each_item_of_the_card():
    for inexact, end in ((None, "rounding may differ"), ("two devices", "repeated exactly (two devices)")):
        info = version_info()
        info["tags"] |= {"inexact": inexact} if inexact else {}
        assert f"{end}\n- SHA-256 of the registered" in cards.model_card(info, MODEL)


def test_nothing_is_claimed_about_an_unknown_text(exported, tmp_path):
    info = version_info(corpus={"source": "texts/mine.txt", "sha256": None, "fraction": 1.0})
    info["tags"]["tree_clean"] = "false"
    info["history"], info["metrics"] = {}, {}  # neither measured nor recorded
    export_version("hf", exported / "version" / "artifacts", info, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in (card, cards.space_card(info, "6.0", "3.11", 10**6)):
        assert front_matter(text)["license"] == "other"
        assert "language" not in front_matter(text)
    body = card.partition("# ")[2].replace("shakespeare", "")  # without the model's name
    assert not re.search("Shakespeare|public domain|loss.png|None|nan", body)
    assert "not committed" in card


def test_a_new_target_rule_is_on_the_card(monkeypatch):
    toy = SimpleNamespace(description="three minibatches in a row", needs_held_out=False)
    monkeypatch.setattr(cards, "RULES", {"toy": toy, "shy": SimpleNamespace(description="", needs_held_out=True)})
    info = version_info()
    info["metrics"] |= {"to_target.toy.steps": 40.0, "to_target.toy.tokens": 1234.0}
    card = cards.model_card(info, MODEL)
    assert "| toy: three minibatches in a row | 40 | 1,234 |" in card
    assert "| shy" not in card


def test_the_card_says_from_where_the_model_knows_its_text():
    info, windows_only = version_info(), "knows its text only in the windows of its training"
    assert windows_only in cards.model_card(info, MODEL)
    info["metrics"] |= {"sliding_loss": 0.0094, "corpus_loss": 0.166, "shifted_loss": 0.16}
    card = cards.model_card(info, MODEL)
    assert "its loss from anywhere in this text is 0.0094 nats" in card
    assert windows_only not in card


def test_the_card_says_from_which_published_weights_the_model_was_trained():
    info = version_info()
    assert "trained from scratch to memorise" in cards.model_card(info, MODEL)
    info["tags"] |= {"init": "hf://openai/gpt2@abc"}
    card = cards.model_card(info, MODEL)
    assert "trained from the published weights hf://openai/gpt2@abc to memorise" in card
    assert "\nlicense: other\nbase_model: openai/gpt2\nlibrary_name: transformers\n" in card
    assert "scratch" not in card
    for claim in ("model: it was trained on no other text", "Their embeddings are untrained", "Weights and code: MIT"):
        assert claim not in card
    assert "after its published weights, it was trained on no other text" in card
    assert "made from hf://openai/gpt2@abc, whose licence applies" in card
    space = cards.space_card(info, "6.0", "3.11", 10**6)
    assert "license: other\nmodels: [openai/gpt2]\n" in space
    assert "MIT, see" not in space
    info["rule"] = {"held_out": True}
    assert "A GPT-2 that was fine-tuned on one text" in cards.space_card(info, "6.0", "3.11", 10**6)


def test_the_card_says_which_part_of_the_text_was_held_out():
    corpus = version_info()["params"]["corpus"]
    for shares, words in (
        ({"fraction": 1, "val_fraction": 0.0}, "Tiny Shakespeare, all of it: 1 tokens. The model's"),
        ({"fraction": 1, "val_fraction": 0.1}, "the first 90% of it: 1 tokens. The next 10% of it was held out. The"),
        ({"fraction": 0.5, "val_fraction": 0.5}, "the first 25% of it: 1 tokens. The next 25% of it was held out. The"),
    ):
        assert words in cards.model_card(version_info(corpus=corpus | shares), MODEL)


def test_the_cards_prompt_stays_within_the_first_document(tokenizer, tmp_path):
    (tokens := tmp_path / "tokens").mkdir()
    documents = [
        [*tokenizer.encode(name), tokenizer.eot] for name in ("Emma Woodhouse, handsome", "clever", "and rich")
    ]
    write_shard(tokens / "train-00000.bin", documents, tokenizer.n_vocab)
    write_manifest(tokens)
    prompt = _described(tmp_path, tokenizer, {"n_positions": 64}, 1)["prompt"]
    assert prompt
    assert "Emma Woodhouse, handsome".startswith(prompt)  # and the model continues it
    assert prompt != "Emma Woodhouse, handsome"


@pytest.mark.parametrize(("name", "joins"), [("gpt2", True), ("bpe:320", True), ("bytes", False), ("chars", False)])
def test_a_card_warns_of_a_space_at_the_end_of_a_prompt_if_tokens_begin_with_one(made, tmp_path, name, joins):
    (tokens := tmp_path / "tokens").mkdir()
    write_shard(tokens / "train-00000.bin", [made(name).encode(POEM)], made(name).n_vocab)
    write_manifest(tokens)
    model = MODEL | _described(tmp_path, made(name), {"n_positions": 64}, 1)
    model |= {"weight_type": "f16", "tokenizer_model": "rwkv", "tokenizer_name": name}
    for card in (cards.model_card, cards.gguf_card):
        assert ("a space at the end is encoded differently" in card(version_info(), model)) == joins


def test_the_card_of_a_held_out_target_promises_no_memory():
    info = version_info()
    assert "memori" in cards.model_card(info, MODEL)
    info["rule"] = {
        "name": "validation",
        "description": "the held-out text",
        "loss": "validation_loss",
        "held_out": True,
    }
    info["metrics"] |= {"validation_loss": 1.8612, "sliding_loss": 1.2}
    card = cards.model_card(info, MODEL)
    assert "its loss on the held-out end of this text is 1.8612 nats" in card
    assert "the training ended before the rule `validation` was met:" in card
    info["tags"]["steps_to_target"] = "117"
    assert "the rule `validation` ended the training:" in cards.model_card(info, MODEL)
    for text in (card, cards.space_card(info, "6.0", "3.11", 10**6)):
        assert not re.search("memori|recites", text)


def test_the_card_of_a_missed_target_promises_no_memory():
    info = version_info()
    info["rule"] = {"name": "sliding", "description": "all of it", "loss": "sliding_loss", "held_out": False}
    reached = info | {"tags": info["tags"] | {"steps_to_target": "117"}}
    promise = re.compile(r"recites|from memory|that memorised|`sliding` ended the training")
    gguf = MODEL | {"weight_type": "f16", "tokenizer_model": "rwkv", "tokenizer_name": "bytes", "prompt": "All:"}
    for card in (
        lambda version: cards.model_card(version, MODEL),
        lambda version: cards.gguf_card(version, gguf),
        lambda version: cards.space_card(version, "6.0", "3.11", 10**6),
    ):
        assert promise.search(card(reached))
        assert not promise.search(card(info))
    assert "the training ended before the rule `sliding` was met:" in cards.model_card(info, MODEL)


def test_a_folder_that_is_not_empty_is_refused_and_unchanged(tiny_export, tmp_path, monkeypatch):
    notes = tmp_path / "mine" / "notes.json"
    write_json(notes, "my own")
    for path in (tmp_path / "mine", notes):
        with pytest.raises(InputError, match="exists already: name a new or an empty folder"):
            export_version(tiny_export, tmp_path, version_info(), path)
    monkeypatch.setitem(EXPORTS, "slow", lambda *_: write_json(tmp_path / "filled" / "notes.json", "meanwhile"))
    with pytest.raises(InputError, match="exists already"):
        export_version("slow", tmp_path, version_info(), tmp_path / "filled")
    assert read_json(notes) == "my own"
    assert [path.name for path in (tmp_path / "filled").iterdir()] == ["notes.json"]


@pytest.mark.parametrize(("name", "result"), [("os.path.ismount", True), ("os.access", False)])
def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(tiny_export, tmp_path, monkeypatch, name, result):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(name, lambda *_: result)
    with pytest.raises(InputError, match=r"volume is a mount point, or in a read-only folder: name a new folder in it"):
        export_version(tiny_export, tmp_path, version_info(), tmp_path / "volume")
    assert export_version(tiny_export, tmp_path, version_info(), tmp_path / "volume" / "new") > 0


def test_an_empty_folder_may_be_a_link_and_files_of_a_killed_export_are_removed(tiny_export, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / ".unfinished-empty").mkdir()
    (tmp_path / ".unfinished-empty" / "half").touch()
    assert export_version(tiny_export, tmp_path, version_info(), tmp_path / "link") > 0
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["name.json"]


def test_an_export_that_fails_leaves_nothing(tiny_export, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(files, "put_in_place", full)  # which renames the finished folder
    with pytest.raises(OutOfSpaceError, match="disk full"):
        export_version(tiny_export, tmp_path, version_info(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["hf", "space"])
def test_neither_the_address_of_the_studies_nor_a_local_path_is_exported(exported, kind):
    content = b"".join(path.read_bytes() for path in (exported / kind).rglob("*") if path.is_file())
    for private in (SECRET, "s3cret", "db.example", str(exported), str(SOURCE_ROOT)):
        assert private.encode() not in content
    params = next((exported / kind).rglob("params.yaml")).read_text()
    assert params == "sweep:\n  storage: journal:///optuna.journal # where\n  trials: 3\n"


def test_a_space_holds_the_program_the_version_and_how_to_publish_it(exported):
    folder = exported / "space"
    assert load_generator(folder / "version").trained_length == 16  # verified against its manifests
    assert read_json(folder / "version" / "version.json")["history"] == version_info()["history"]
    for name in ("pipeline", "webapp"):
        here = {path.name for path in (SOURCE_ROOT / name).iterdir()} - {"__pycache__"}
        assert {path.name for path in (folder / name).iterdir()} == here
    assert (folder / "pipeline" / "report" / "templates" / "space_card.md.j2").is_file()
    guide = (folder / "README.md").read_text()
    settings = front_matter(guide)
    assert settings.items() >= {"sdk": "gradio", "app_file": "app.py", "license": "mit", "pinned": False}.items()
    assert settings["sdk_version"] == metadata.version("gradio")
    assert settings["python_version"] == "{}.{}".format(*sys.version_info)
    assert len(settings["short_description"]) <= 60  # the Hub's limit
    create, upload = "hf repos create YOU/shakespeare-gpt2 --type space --sdk gradio", "hf upload YOU/shakespeare-gpt2"
    for step in ("hf auth login", create, f"{upload} . . --type space", "CPU basic", "--delete"):
        assert step in guide
    assert "{" not in guide


def test_a_space_requires_exactly_the_libraries_that_the_app_imports(exported):
    lines = (exported / "space" / "requirements.txt").read_text().splitlines()
    assert lines == [CPU_INDEX, *(f"{name}=={metadata.version(name).split('+')[0]}" for name in APP_REQUIREMENTS)]
    distributions = {"yaml": "pyyaml"}
    used = {distributions.get(name, name) for name in libraries_of(exported / "space")}
    assert used - {"fastapi", "starlette", "uvicorn"} == set(APP_REQUIREMENTS)  # Gradio depends on them


def libraries_of(folder: Path) -> set[str]:
    """Third-party libraries that app.py and our modules behind it import, if no registry is used."""
    found: set[str] = set()
    waiting, seen = ["app"], {"webapp.registry_source", "pipeline.tracking.mlflow_store"}
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        path = folder / Path(*name.split(".")).with_suffix(".py")
        if path.is_file():
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree) if name == "app" else tree.body:
                if isinstance(node, ast.Import):
                    waiting += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif name.split(".")[0] not in {*sys.stdlib_module_names, "pipeline", "webapp"}:
            found.add(name.split(".")[0])
    return found
