"""The champion moves while it is served, with a fake catalog; integration/test_app.py has a real registry."""

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fixtures_app import INFO, _version  # noqa: F401 (fixture)

from pipeline.system.errors import InputError, IntegrityError, ModelMissing
from tests.waiting import wait_until
from webapp import registry_source
from webapp.completion import complete
from webapp.registry_source import Registry


class Catalog:
    """Versions 1 to 4 of one model, which can be made champion, altered and removed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.champion, self.altered, self.n_checks, self.opened = folder, "1", set[str](), 0, []
        self.copies = list[Path]()
        self.ready = threading.Event()  # versions load once it is set
        self.ready.set()

    def find(self, store: Any, name: str, which: str) -> Any:
        self.n_checks += 1
        number = self.champion if which == "champion" else which
        if number not in ("1", "2", "3", "4"):
            raise ModelMissing(f"{name} has no {which}: `dvc repro` makes one")
        aliases = ["champion"] if number == self.champion else []
        return SimpleNamespace(version=number, name=name, aliases=aliases, creation_timestamp=0)

    def aliases_of(self, store: Any, name: str) -> dict[str, str]:
        return {"champion": self.champion}

    def open(self, store: Any, version: Any, copies: Path) -> Path:
        self.opened.append(version.version)
        self.copies.append(Path(shutil.copytree(self.folder, copies / "artifacts")))  # as of a remote store
        assert self.ready.wait(60)
        if version.version in self.altered:
            raise IntegrityError(f"version {version.version} is altered (SHA-256 ab, expected cd)")
        return self.copies[-1]

    def describe(self, store: Any, version: Any, files: Path) -> dict[str, Any]:
        return INFO | {"version": version.version, "aliases": version.aliases}


@pytest.fixture
def catalog(version: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    fake = Catalog(version)
    monkeypatch.setattr(registry_source, "open_registry", lambda root: None)
    monkeypatch.setattr(registry_source, "find_version", fake.find)
    monkeypatch.setattr(registry_source, "aliases_of", fake.aliases_of)
    monkeypatch.setattr(registry_source, "open_version", fake.open)
    monkeypatch.setattr(registry_source, "describe_version", fake.describe)
    monkeypatch.setattr(registry_source, "list_versions", lambda *_: [fake.find(None, "x", n) for n in "4321"])
    monkeypatch.setattr(registry_source, "CHECK_S", 600.0)  # a test checks by itself
    return fake


@pytest.fixture
def registry(catalog: Catalog) -> Registry:
    return Registry(Path(), "parrot", "champion")


def test_a_new_champion_is_served_once_it_is_loaded_and_no_request_waits_for_it(catalog, registry):
    completion = complete(registry.current(), "All:", 1, max_tokens=10)
    catalog.ready.clear()
    catalog.champion = "2"
    following = threading.Thread(target=registry.follow)
    following.start()
    assert wait_until(lambda: catalog.opened == ["1", "2"], 60)
    assert registry.current().label == "parrot version 1"
    catalog.ready.set()
    following.join(60)
    assert registry.current().label == "parrot version 2"
    assert list(completion)[-1].served.label == "parrot version 1"  # a stream ends with the version of its start
    assert catalog.opened == ["1", "2"]  # each is loaded once
    assert registry.open("1").info["aliases"] == []  # what the page says of the version before
    n_checks = catalog.n_checks
    assert registry.open("1").info["version"] == "1"  # an event of an open page does not wait for the registry
    assert catalog.n_checks == n_checks


def test_an_altered_or_missing_champion_leaves_the_previous_one_and_the_reason(catalog, registry):  # E7
    catalog.champion, catalog.altered = "2", {"2"}
    assert registry.follow() == registry_source.RETRY_S
    assert "version 2 is altered" in registry.trouble
    assert registry.current().label == "parrot version 1"
    catalog.champion = "9"
    registry.follow()
    assert "has no champion" in registry.trouble
    assert "parrot version 1 stays" in registry.trouble
    catalog.champion, catalog.altered = "2", set()
    assert registry.follow() == registry_source.CHECK_S
    assert registry.current().label == "parrot version 2"
    assert registry.trouble is None


def test_the_first_request_after_a_promotion_gets_the_new_version(catalog, monkeypatch):
    monkeypatch.setattr(registry_source, "CHECK_S", 0.01)
    registry = Registry(Path(), "parrot", "champion")
    catalog.champion = "2"
    assert wait_until(lambda: catalog.opened == ["1", "2"], 20)  # while nobody asks
    assert wait_until(lambda: registry.current().label == "parrot version 2", 20)


def test_an_alias_that_moves_between_versions_that_are_not_served_is_followed(catalog):
    registry = Registry(Path(), "parrot", "3")
    for champion in ("1", "2"):
        catalog.champion = champion
        assert registry.open(champion).label == f"parrot version {champion}"
        registry.follow()
        assert {n for n in ("1", champion, "3") if registry.open(n).info["aliases"] == ["champion"]} == {champion}


def test_only_a_few_versions_stay_in_memory(catalog, registry):
    for number in ("2", "3", "4", "2"):
        assert registry.open(number).info["version"] == number
    assert registry._load.cache_info().currsize == registry_source.KEPT == 3
    with pytest.raises(InputError, match="not in the registry"):
        registry.open("../1")


def test_the_copy_of_a_remote_version_is_removed_once_it_is_loaded_or_refused(catalog, registry):
    catalog.altered = {"2"}
    with pytest.raises(IntegrityError):
        registry.open("2")
    assert [copy.parent.exists() for copy in catalog.copies] == [False, False]
    maps = Path("/proc/self/maps")  # a removed file would stay on the disk while it is mapped
    assert not maps.exists() or str(catalog.copies[0]) not in maps.read_text()
    assert list(complete(registry.current(), "All:", 1, max_tokens=3))[-1].n_tokens == 3
