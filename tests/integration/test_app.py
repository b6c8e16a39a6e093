"""The app without a browser: a champion that moves, how it starts."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fixtures_app import INFO, LINES, WINDOW, Stub, _at_full_speed, _page, _source, _version, ask, event  # noqa: F401 (fixtures)
from fixtures_mlflow import root_of, trained_project

import app
from pipeline.config.sections import RegistryConfig
from pipeline.registry.artifacts import fetch_version
from pipeline.registry.register import register
from pipeline.system.errors import InputError, IntegrityError, ModelMissing
from tests.waiting import wait_until
from webapp import registry_source
from webapp.completion import complete
from webapp.model_source import Folder, Served
from webapp.tabs.about import about_html
from webapp.tabs.training import run_html

ROOT = Path(__file__).parents[2]


@pytest.fixture
def served(source: Stub) -> Served:
    return source.current()


# the champion moves


class FakeStore:
    """What registry_source asks of the catalog: versions that can be moved, broken and lost."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.champion, self.broken, self.looked, self.opened = folder, "1", set[str](), 0, []

    def find(self, store: Any, name: str, which: str) -> Any:
        self.looked += 1
        number = self.champion if which == "champion" else which
        if number not in ("1", "2", "3"):
            raise ModelMissing(f"{name} has no {which}: `dvc repro` makes one")
        return type("Version", (), {"version": number, "name": name, "aliases": ["champion"]})

    def open(self, store: Any, version: Any) -> Path:
        self.opened.append(version.version)
        if version.version in self.broken:
            raise IntegrityError(f"version {version.version} is altered (SHA-256 ab, expected cd)")
        return self.folder

    def describe(self, store: Any, version: Any) -> dict[str, Any]:
        return INFO | {"version": version.version}


@pytest.fixture
def catalog(version: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    fake = FakeStore(version)
    monkeypatch.setattr(registry_source, "open_registry", lambda root: None)
    monkeypatch.setattr(registry_source, "find_version", fake.find)
    monkeypatch.setattr(registry_source, "open_version", fake.open)
    monkeypatch.setattr(registry_source, "describe_version", fake.describe)
    monkeypatch.setattr(registry_source, "list_versions", lambda *_: [fake.find(None, "x", n) for n in "321"])
    monkeypatch.setattr(registry_source, "CHECK_S", 0.0)
    monkeypatch.setattr(registry_source, "RETRY_S", 0.0)
    return fake


def becomes(registry: registry_source.Registry, holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold, while requests come in."""

    def after_a_request() -> bool:
        registry.current()
        return holds()

    return wait_until(after_a_request, 60)


def serves(registry: registry_source.Registry, label: str) -> bool:
    return becomes(registry, lambda: registry.current().label == label)


def test_a_new_champion_is_served_without_a_restart(catalog):
    registry = registry_source.Registry(Path(), "parrot", "champion")
    before = registry.current()
    completion = complete(before, "All:", 1, max_tokens=10)
    catalog.champion = "2"
    assert serves(registry, "parrot version 2")
    assert list(completion)[-1].served.label == "parrot version 1"  # whoever has begun ends with the same
    assert catalog.opened == ["1", "2"]  # each loaded once, however often it is asked for


@pytest.mark.fault
def test_the_champion_moves_to_and_fro_under_load_and_each_reply_is_of_one_version(catalog, served):  # E7
    registry = registry_source.Registry(Path(), "parrot", "champion")
    alone = {n: list(complete(served, "All:", 1, max_tokens=10, seed=n))[-1].text(0) for n in range(25)}

    def reply(n: int) -> tuple[int, set[str], str]:
        parts = [
            (each.served.label, each.text(0)) for each in complete(registry.current(), "All:", 1, max_tokens=10, seed=n)
        ]
        return n, {label for label, _ in parts}, parts[-1][1]

    catalog.broken = {"3"}
    replies = []
    with ThreadPoolExecutor(8) as pool:
        for number, stays in (("2", "2"), ("1", "1"), ("3", "1"), ("2", "2")):
            catalog.champion = number
            replies += [pool.submit(reply, n) for n in alone]  # which are written while it moves
            moved = f"parrot version {stays}"
            assert becomes(registry, lambda moved=moved: registry.current().label == moved)
            assert number == stays or becomes(registry, lambda: "version 3 is altered" in (registry.trouble or ""))
    for n, labels, text in (each.result() for each in replies):
        assert len(labels) == 1
        assert text == alone[n]
    assert {label for each in replies for label in each.result()[1]} == {"parrot version 1", "parrot version 2"}


def test_the_registry_is_asked_every_few_seconds_at_most(catalog, monkeypatch):
    monkeypatch.setattr(registry_source, "CHECK_S", 60.0)
    registry = registry_source.Registry(Path(), "parrot", "champion")
    before = catalog.looked
    for _ in range(100):
        registry.current()
    with registry._checking:  # whatever look has been begun is over
        assert catalog.looked == before


@pytest.mark.fault
def test_a_champion_that_is_altered_or_lost_leaves_the_one_before_and_says_so(catalog):
    registry = registry_source.Registry(Path(), "parrot", "champion")
    catalog.champion, catalog.broken = "2", {"2"}
    assert becomes(registry, lambda: "version 2 is altered" in (registry.trouble or ""))
    assert registry.current().label == "parrot version 1"
    catalog.champion = "9"
    assert becomes(registry, lambda: "has no champion" in (registry.trouble or ""))
    assert "parrot version 1 stays" in registry.trouble
    catalog.champion, catalog.broken = "2", set()
    assert serves(registry, "parrot version 2")
    assert registry.trouble is None


@pytest.mark.fault
def test_after_a_failure_the_files_are_not_read_again_at_once(catalog, monkeypatch):
    registry = registry_source.Registry(Path(), "parrot", "champion")
    monkeypatch.setattr(registry_source, "RETRY_S", 60.0)
    catalog.champion, catalog.broken = "2", {"2"}
    assert becomes(registry, lambda: registry.trouble is not None)
    with registry._checking:
        assert registry._due > time.monotonic() + 30
    assert catalog.opened == ["1", "2"]


def test_nobody_waits_while_a_new_champion_is_loaded(catalog, monkeypatch):
    registry = registry_source.Registry(Path(), "parrot", "champion")
    loading, go_on, loaded = threading.Event(), threading.Event(), threading.Event()

    def slow(store: Any, version: Any) -> Path:
        loading.set()
        go_on.wait(60)
        loaded.set()
        return catalog.folder

    monkeypatch.setattr(registry_source, "open_version", slow)
    catalog.champion = "2"
    registry.current()
    assert loading.wait(60)
    assert registry.current().label == "parrot version 1"
    assert not loaded.is_set()
    go_on.set()
    assert serves(registry, "parrot version 2")


def test_only_a_few_versions_stay_in_memory(catalog, monkeypatch):
    monkeypatch.setattr(registry_source, "KEPT", 2)
    registry = registry_source.Registry(Path(), "parrot", "champion")
    for number in ("2", "3", "1", "2", "3"):
        assert registry.open(number).info["version"] == number
    assert registry._load.cache_info().currsize == 2
    with pytest.raises(InputError, match="not in the registry"):
        registry.open("../1")


@pytest.mark.fault
def test_a_real_registry_is_served_its_champion_moves_and_an_altered_one_is_not_served(
    store, version, tmp_path, monkeypatch
):
    config = RegistryConfig(model=f"app-{uuid4().hex[:8]}", max_target_loss=0.1)

    def add(loss: float) -> None:
        project = trained_project(tmp_path / str(loss), corpus_loss=loss)
        shutil.rmtree(project / "models" / "model")
        shutil.copytree(version / "model", project / "models" / "model")
        assert register(root_of(store), project, config)["champion"]

    add(0.09)
    registry = registry_source.Registry(root_of(store), config.model, "champion")
    assert registry.current().info["aliases"] == ["candidate", "champion"]
    add(0.08)
    registry._due = 0.0
    assert serves(registry, f"{config.model} version 2")
    assert registry.versions() == ["2", "1"]
    assert registry.open("1").info["metrics"]["corpus_loss"] == 0.09
    assert "Gradient norm" in run_html(registry.current())
    assert "What it is not" in about_html(registry.current())
    add(0.07)
    folder = fetch_version(store, store.client.get_model_version(config.model, "3"), "artifacts/model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    registry._due = 0.0
    assert becomes(registry, lambda: "version 3" in (registry.trouble or ""))
    assert registry.current().label == f"{config.model} version 2"


# at the start


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with params.yaml and without a store, in which app.py is called."""
    text = (ROOT / "params.yaml").read_text().replace("model: shakespeare-gpt2", "model: other-gpt2")
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "clean_environment", lambda: None)
    return tmp_path


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "run `dvc repro`"),
        (["--folder", "nowhere"], "nowhere not found"),
        (["--folder", "empty"], "export space"),
        (["--share"], "unrecognized arguments: --share"),
        (["--port", "many"], "invalid int value: 'many'"),
    ],
)
def test_without_a_model_it_ends_with_words_that_say_how_to_get_one(project, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    with pytest.raises((ModelMissing, SystemExit)) as told:
        app.main()
    assert words in str(told.value) + capsys.readouterr().err


@pytest.mark.fault
def test_a_failed_start_is_one_line_and_an_exit_code(project):
    done = subprocess.run([sys.executable, ROOT / "app.py"], cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7
    assert done.stderr.startswith("error: no MLflow store")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("arguments", "name"), [([], "other-gpt2"), (["--model", "mine"], "mine")])
def test_the_default_model_is_the_one_that_params_yaml_names(project, monkeypatch, arguments, name):
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    monkeypatch.setattr(registry_source, "Registry", lambda root, name, which: (root, name, which))
    assert app.open_source(app.parse()) == (project, name, "champion")


def test_a_port_that_is_none_is_refused_in_words(version, project, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--folder", str(version), "--port", "99999"])
    with pytest.raises(InputError, match=r"cannot use .*:99999"):
        app.main()


@pytest.mark.fault
def test_an_altered_folder_is_not_served(version, tmp_path):
    folder = Path(shutil.copytree(version, tmp_path / "version"))
    weights = folder / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        Folder(folder)
